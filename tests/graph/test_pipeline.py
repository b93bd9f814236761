"""The graph is lazy, exact in its tasks, streams, and gives what the plain loops give."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import threading

import dask
import dask.array as da
import numpy as np
import pytest
import zarr
from dask.array.utils import assert_eq
from distributed import Client, Scheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from dask_ep import Experts, Placement, expert_parallel, open_tokens, store
from dask_ep.graph import pipeline as pipeline_module
from dask_ep.graph.keys import read_rank, read_ranks_key
from dask_ep.graph.pipeline import UnpinnedWarning, count_tasks, workers_in_use
from dask_ep.kernel import reference
from dask_ep.placement.policies import POLICIES, balanced, contiguous, place
from dask_ep.placement.replica_choice import ticket_load
from dask_ep.storage.source import Source
from tests.compare import assert_close, whole_layer
from tests.strategies import Case, cases

E, D, N = 8, 6, 60


def layer(seed: int = 0, k: int = 2, n: int = N) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "tokens": rng.standard_normal((n, D)),
        "routing": np.argsort(rng.random((n, E)), axis=1)[:, :k],
        "topk_weights": rng.random((n, k)),
        "W": rng.standard_normal((E, D, D)),
    }


def build(data: dict[str, np.ndarray], chunks: object = 20, **kwargs) -> da.Array:
    return expert_parallel(
        da.from_array(data["tokens"], chunks=(chunks, -1)),
        da.from_array(data["routing"], chunks=(chunks, -1)),
        data["W"],
        topk_weights=da.from_array(data["topk_weights"], chunks=(chunks, -1)),
        **kwargs,
    )


def refuse_to_compute(*args, **kwargs):
    raise AssertionError("something was computed while the graph was built")


# --- values ------------------------------------------------------------------------------


@settings(max_examples=40)
@given(cases(even=False), st.sampled_from(["sync", "threads"]))
def test_equals_the_plain_loops_over_any_layer(case: Case, scheduler: str):
    tokens, routing, topk_weights = case.dask()
    y = expert_parallel(
        tokens, routing, case.W, topk_weights=topk_weights, world_size=case.world_size
    )
    assert y.chunks[0] == tokens.chunks[0]
    with dask.config.set(scheduler=scheduler):
        assert_close(y.compute(), whole_layer(case), case.tolerance)
        assert_eq(y, y.compute())


@settings(max_examples=30)
@given(cases(dtypes=[np.float64], even=False), st.data())
def test_a_placement_changes_nothing_but_the_place(case: Case, data):
    load = np.bincount(case.routing[case.routing >= 0], minlength=case.num_experts)
    ranks = data.draw(st.integers(1, case.num_experts))
    placement = data.draw(st.sampled_from([balanced(load, ranks), contiguous(len(load), ranks)]))
    tokens, routing, topk_weights = case.dask()
    y = expert_parallel(tokens, routing, case.W, topk_weights=topk_weights, placement=placement)
    assert_close(y.compute(scheduler="sync"), whole_layer(case), case.tolerance)


def test_without_copies_and_with_one_slot_a_placement_keeps_every_bit():
    data = layer(k=1)
    placement = Placement(np.random.default_rng(0).permutation(E).reshape(4, 2))
    assert_eq(build(data, world_size=1), build(data, placement=placement), rtol=0, atol=0)


@pytest.mark.parametrize(
    "scheduler", ["threads", pytest.param("processes", marks=pytest.mark.slow)]
)
def test_every_scheduler_gives_the_same_bits(scheduler):
    y = build(layer(), world_size=4)
    want = y.compute(scheduler="sync")
    np.testing.assert_array_equal(y.compute(scheduler=scheduler, num_workers=2), want)


def test_one_expert_is_the_dense_layer():
    data = layer()
    tokens = da.from_array(data["tokens"], chunks=(20, -1))
    y = expert_parallel(tokens, da.zeros(N, chunks=20, dtype=int), data["W"][:1])
    assert_eq(y, data["tokens"] @ data["W"][0])


@pytest.mark.parametrize("world_size", [1, 4])
def test_identity_experts_give_the_input_bit_for_bit(world_size):
    data = layer(k=1)
    y = expert_parallel(
        da.from_array(data["tokens"], chunks=(20, -1)),
        da.from_array(data["routing"], chunks=(20, -1)),
        [np.positive] * E,
        world_size=world_size,
    )
    assert_eq(y, data["tokens"], rtol=0, atol=0)


@pytest.mark.parametrize("world_size", [1, 2])
def test_dask_weights_and_gated_experts(world_size):
    rng = np.random.default_rng(0)
    w = {n: rng.standard_normal(s) for n, s in {"gate": (E, D, 9), "up": (E, D, 9)}.items()}
    w["down"] = rng.standard_normal((E, 9, D))
    experts = Experts.gated(**{n: da.from_array(a, chunks=(3, 2, 4)) for n, a in w.items()})
    data = layer()
    y = expert_parallel(
        da.from_array(data["tokens"], chunks=(20, -1)),
        da.from_array(data["routing"], chunks=(20, -1)),
        experts,
        world_size=world_size,
    )
    plain = [reference.gated(w["gate"][e], w["up"][e], w["down"][e]) for e in range(E)]
    want = reference.moe(data["tokens"], data["routing"], plain, d_out=D)
    assert_close(y.compute(scheduler="sync"), want, 1e-12)


# --- chunks ---------------------------------------------------------------------------------------


def test_routing_takes_the_chunks_of_the_tokens():
    data = layer()
    y = expert_parallel(
        da.from_array(data["tokens"], chunks=(25, 4)),
        da.from_array(data["routing"], chunks=(7, 1)),
        data["W"],
        topk_weights=da.from_array(data["topk_weights"], chunks=(N, 1)),
        world_size=2,
    )
    assert y.chunks == ((25, 25, 10), (D,))
    assert_eq(y, build(data, world_size=1).compute())


@pytest.mark.parametrize("world_size", [1, 2])
def test_chunks_of_unknown_length(world_size):
    data = layer()
    keep = data["tokens"][:, 0] > 0
    known = {n: da.from_array(a, chunks=(20, -1)) for n, a in data.items() if n != "W"}
    some = {n: a[known["tokens"][:, 0] > 0] for n, a in known.items()}
    y = expert_parallel(
        some["tokens"],
        some["routing"],
        data["W"],
        topk_weights=some["topk_weights"],
        world_size=world_size,
    )
    assert np.isnan(y.chunks[0]).all()
    assert_close(y.compute(scheduler="sync"), build(data, world_size=1).compute()[keep], 1e-12)


# --- the graph ---------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [60, 20, 7])
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_exactly_as_many_tasks_as_the_formula_says(chunks, world_size):
    y = build(layer(), chunks=chunks, world_size=world_size)
    steps = [str(key[0]).rsplit("-", 1)[0] for key in y.__dask_graph__() if "ep_" in str(key[0])]
    C, R = y.numblocks[0], world_size
    assert len(steps) == count_tasks(C, R) == (C + 1 if R == 1 else C + R + 1)
    counts = {step: steps.count(step) for step in set(steps)}
    ranks = {} if R == 1 else {"ep_ranks": 1}
    assert counts == {"ep_experts": R, "ep_chunk": C} | ranks


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("rechunked", [False, True])
def test_what_owners_are_found_by_keeps_its_key_through_optimisation(world_size, rechunked):
    y = build(layer(), world_size=world_size)
    if rechunked:
        y = y.rechunk((7, -1))
    (optimised,) = dask.optimize((y + 1).sum())
    found = [key for key in optimised.__dask_graph__() if read_rank(key) or read_ranks_key(key)]
    assert len(found) == (0 if world_size == 1 else world_size + 1)


@pytest.mark.parametrize("world_size", [1, 2, 16])
def test_a_chunk_is_one_task_from_file_to_file(tmp_path, world_size):
    """Through our doors and through Dask's: reading, the exchange and writing are fused."""
    rng, E = np.random.default_rng(0), 16
    arrays = {
        "tokens": rng.standard_normal((40, D)),
        "routing": rng.integers(0, E, (40, 2)),
        "weights": rng.random((40, 2)),
    }
    for name, array in arrays.items():
        da.from_array(array, chunks=(8, -1)).to_zarr(str(tmp_path / f"{name}.zarr"))
    for openings in (da.from_zarr, open_tokens):
        opened = {name: openings(str(tmp_path / f"{name}.zarr")) for name in arrays}
        y = expert_parallel(
            opened["tokens"], opened["routing"], np.ones((E, D, D)),
            topk_weights=opened["weights"], world_size=world_size,
        )  # fmt: skip
        target = zarr.create_array(
            str(tmp_path / f"{openings.__name__}.zarr"), shape=y.shape, chunks=(8, D), dtype="f8"
        )
        with store(y, tmp_path / "y.zarr", compute=False, overwrite=True) as ours:
            for output in (da.store(y, target, compute=False, lock=False), ours):
                (optimised,) = dask.optimize(output)
                # a string names an array that was opened, or the end of all
                tasks = [key for key in dict(optimised.__dask_graph__()) if isinstance(key, tuple)]
                assert len(tasks) == count_tasks(y.numblocks[0], world_size)


class CountingArray:
    """An array whose reads are counted."""

    def __init__(self, array: np.ndarray):
        self.array, self.shape, self.dtype, self.ndim = array, array.shape, array.dtype, array.ndim
        self.reads: list[object] = []
        self._lock = threading.Lock()

    def __getitem__(self, index):
        with self._lock:
            self.reads.append(index)
        return self.array[index]

    def __dask_tokenize__(self):
        return ("CountingArray", id(self))


@pytest.mark.parametrize("world_size", [1, 4])
def test_each_chunk_is_read_once(world_size):
    data = layer()
    source = CountingArray(data["tokens"])
    y = expert_parallel(
        da.from_array(source, chunks=(20, -1), asarray=False, meta=data["tokens"][:0]),
        da.from_array(data["routing"], chunks=(20, -1)),
        data["W"],
        world_size=world_size,
    )
    assert source.reads == []
    y.compute(scheduler="threads", num_workers=2)
    assert len(source.reads) == 3


class CountingSource(Source):
    """A source as of a file, in which every read of an expert is noted."""

    def __init__(self, array: np.ndarray):
        self.shape, self.dtype, self.name = array.shape, array.dtype, "file"
        self.array, self.read_experts = array, []

    def read(self, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        self.read_experts.extend(range(start, stop))
        return self.array[start:stop]

    def fingerprint(self):
        return self._describe()


@pytest.mark.parametrize("world_size", [1, 4])
def test_each_expert_is_read_once_by_all_threads_together(world_size):
    data = layer()
    source = CountingSource(data["W"])
    y = build(data | {"W": Experts.linear(source)}, chunks=7, world_size=world_size)
    assert source.read_experts == []
    y.compute(scheduler="threads", num_workers=4)
    assert sorted(source.read_experts) == list(range(E))


@pytest.mark.parametrize("world_size", [1, 4])
def test_a_slice_loads_only_what_it_needs(world_size):
    data = layer()
    source = CountingArray(data["tokens"])
    y = expert_parallel(
        da.from_array(source, chunks=(20, -1), asarray=False, meta=data["tokens"][:0]),
        da.from_array(data["routing"], chunks=(20, -1)),
        data["W"],
        world_size=world_size,
    )
    first = y[:5].compute(scheduler="sync")
    assert len(source.reads) == 1
    (optimised,) = dask.optimize(y[:5])
    chunks = [key for key in optimised.__dask_graph__() if "ep_chunk" in str(key)]
    assert len([key for key in chunks if isinstance(key, tuple)]) == 1
    np.testing.assert_array_equal(first, y.compute(scheduler="sync")[:5])


@pytest.mark.parametrize("world_size", [1, 4])
def test_chunks_stream(world_size):
    """However many chunks there are, few are alive at once."""
    live, most, lock = set(), [0], threading.Lock()

    def load(block_id):
        with lock:
            live.add(block_id[0])
            most[0] = max(most[0], len(live))
        return np.ones((5, D))

    def drop(block, block_id):
        with lock:
            live.discard(block_id[0])
        return block[:0]

    tokens = da.map_blocks(
        load, chunks=((5,) * 40, (D,)), dtype=float, meta=np.empty((0, 0)), name="load"
    )
    y = expert_parallel(
        tokens, da.zeros(200, chunks=5, dtype=int), layer()["W"], world_size=world_size
    )
    done = y.map_blocks(drop, chunks=((0,) * 40, (D,)), dtype=float, meta=np.empty((0, 0)))
    done.compute(scheduler="threads", num_workers=2)
    assert most[0] <= 6


def test_building_computes_nothing_and_calls_nothing():
    def never(x):
        raise AssertionError("an expert was called while the graph was built")

    data = layer()
    with dask.config.set(scheduler=refuse_to_compute):
        build(data, world_size=2)
        expert_parallel(
            da.from_array(data["tokens"], chunks=(20, -1)),
            da.from_array(data["routing"], chunks=(20, -1)),
            [never] * E,
            world_size=2,
        )


def test_names_follow_from_the_inputs():
    data, other = layer(), layer(seed=1)
    with dask.config.set({"tokenize.ensure-deterministic": True}):
        names = [build(data, world_size=2).name for _ in range(2)]
        assert names[0] == names[1]
        different = [
            build(data | {"W": other["W"]}, world_size=2).name,
            build(data | {"tokens": other["tokens"]}, world_size=2).name,
            build(data, world_size=4).name,
            build(data, placement=balanced(np.arange(E), 2)).name,
        ]
        assert len({names[0], *different}) == 5


@pytest.mark.parametrize("world_size", [1, 2])
def test_it_composes(world_size, tmp_path):
    data = layer()
    y, want = build(data, world_size=world_size), build(data, world_size=1).compute()
    assert_eq(y.sum(axis=0), want.sum(axis=0))
    assert_eq(y[3:41:2, 1], want[3:41:2, 1])
    y.to_zarr(tmp_path / "y.zarr")
    assert_eq(da.from_zarr(tmp_path / "y.zarr"), want)
    a, b = np.empty((N, D)), np.empty((N, D))
    da.store([y, y + 1], [a, b], lock=False)
    assert_eq(b - a, np.ones((N, D)))
    routing = da.from_array(data["routing"], chunks=(20, -1))
    twice = expert_parallel(y, routing, data["W"], world_size=world_size)
    plain = [reference.linear(W) for W in data["W"]]
    assert_eq(twice, reference.moe(want, data["routing"], plain, d_out=D))


# --- placed by a policy's name ----------------------------------------------------------


@pytest.mark.parametrize("policy", ["packed", "balanced", "exact"])
def test_a_policy_reads_the_routing_once_and_no_token(policy):
    data, read = layer(), []

    def count(block, block_info):
        read.append(block_info[0]["chunk-location"])
        return block

    routing = da.from_array(data["routing"], chunks=(20, 2))
    counted = routing.map_blocks(count, dtype=routing.dtype, meta=routing._meta)
    tokens = da.from_array(data["tokens"], chunks=(20, -1))
    unread = tokens.map_blocks(refuse_to_compute, dtype=tokens.dtype, meta=tokens._meta)
    y = expert_parallel(unread, counted, data["W"], world_size=4, placement=policy)
    assert sorted(read) == [(0, 0), (1, 0), (2, 0)]
    load = ticket_load(data["routing"], E)
    same = expert_parallel(
        unread, counted, data["W"], world_size=4, placement=place(policy, load, 4)
    )
    assert y.name == same.name
    read.clear()
    expert_parallel(unread, counted, data["W"], world_size=1, placement=policy)
    expert_parallel(unread, counted, data["W"], world_size=4, placement="contiguous")
    assert read == [], "what does not depend on the load does not ask for it"


@settings(max_examples=25, deadline=None)
@given(cases(even=False), st.sampled_from(POLICIES))
def test_a_policy_changes_nothing_but_the_place(case: Case, policy: str):
    tokens, routing, topk_weights = case.dask()
    with dask.config.set(scheduler="sync"):
        y = expert_parallel(
            tokens,
            routing,
            case.W,
            topk_weights=topk_weights,
            world_size=case.world_size,
            placement=policy,
        )
        assert_close(y.compute(), whole_layer(case), case.tolerance)


def test_a_placement_file_works_like_the_placement_in_it(tmp_path):
    data, placement = layer(), place("balanced", np.arange(1, E + 1), 4)
    (tmp_path / "placement.json").write_text(placement.to_json())
    asked = (placement, tmp_path / "placement.json", str(tmp_path / "placement.json"))
    assert len({build(data, world_size=4, placement=one).name for one in asked}) == 1


def test_a_policy_on_chunks_of_unknown_length():
    data = layer()
    keep = da.from_array(np.arange(N) % 3 > 0, chunks=20)
    tokens, routing = (
        da.from_array(data[name], chunks=(20, -1))[keep] for name in ("tokens", "routing")
    )
    with dask.config.set(scheduler="sync"):
        y = expert_parallel(tokens, routing, data["W"], world_size=4, placement="exact").compute()
        plain = expert_parallel(tokens, routing, data["W"], world_size=1).compute()
    np.testing.assert_allclose(y, plain, atol=1e-12)


# --- what is refused, and said ----------------------------------------------------------

TOKENS = da.ones((N, D), chunks=(20, D))
ROUTING = da.zeros((N, 2), chunks=(20, 2), dtype=int)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"tokens": np.ones((N, D))}, TypeError, "tokens must be a Dask array, but is a ndarray"),
        ({"routing": np.zeros(N, int)}, TypeError, "routing must be a Dask array"),
        ({"tokens": da.ma.masked_equal(TOKENS, 1)}, TypeError, "tokens must not be a masked"),
        (
            {"routing": da.ma.masked_equal(ROUTING, 0)},
            TypeError,
            "be a masked array; .*in routing, -1 means no expert",
        ),
        ({"world_size": 2.0}, TypeError, "world_size must be a whole number, but is 2.0"),
        ({"world_size": True}, TypeError, "world_size must be a whole number, but is True"),
        ({"routing": ROUTING[:50]}, ValueError, "routing has .*50 rows|50 rows .* tokens have 60"),
        ({"routing": ROUTING.astype(float)}, TypeError, "integer expert indices.*float64"),
        ({"tokens": TOKENS.astype(int)}, TypeError, "tokens must hold floats"),
        ({"tokens": TOKENS.astype(">f8")}, TypeError, r"byte order .* >f8; .*'float64'"),
        ({"tokens": TOKENS[:, :4]}, ValueError, "width d=6, but tokens have width 4"),
        ({"topk_weights": TOKENS}, ValueError, r"topk_weights have \(60, 6\) and routing has"),
        ({"world_size": 0}, ValueError, "world_size must be at least 1, but is 0"),
        ({"experts": 3}, TypeError, "experts must be an Experts"),
        (
            {"placement": np.array([[0, 1, 2, 3], [4, 5, 6, 7]])},
            ValueError,
            "placement must be a Placement, one of",
        ),
        (
            {"placement": "best"},
            ValueError,
            "or the path of a file, but is 'best'",
        ),
        (
            {"placement": contiguous(4, 2)},
            ValueError,
            "placement is for 4 experts on 2 ranks, but there are 8 experts and world_size=2",
        ),
        (
            {"tokens": TOKENS[TOKENS[:, 0] > 0], "routing": da.zeros(N, chunks=30, dtype=int)},
            ValueError,
            r"tokens have 3 and routing 2.*compute_chunk_sizes\(\)",
        ),
    ],
)
def test_what_cannot_be_built_is_refused(changes, error, message):
    good = {"tokens": TOKENS, "routing": ROUTING, "experts": np.ones((E, D, D)), "world_size": 2}
    with pytest.raises(error, match=message):
        expert_parallel(**(good | changes))


@pytest.mark.parametrize(
    ("world_size", "place"),
    [(1, "dispatch of token chunk 2 at rank 0 of 1"), (2, "pack of token chunk 2")],
)
def test_a_bad_index_is_found_in_its_chunk(world_size, place):
    data = layer()
    data["routing"][45, 1] = 8
    with pytest.raises(ValueError, match=place + ".*8"):
        build(data, world_size=world_size).compute(scheduler="sync")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x: np.ma.masked_greater(x, 3), TypeError, "tokens must not be a masked"),
        (lambda x: x[:, 0], ValueError, r"tokens must be \(n, d\), but have shape \(20,\)"),
    ],
)
@pytest.mark.parametrize("world_size", [1, 2])
def test_chunks_that_are_not_what_the_array_says_are_refused(world_size, change, error, message):
    tokens = TOKENS.map_blocks(change, dtype=TOKENS.dtype, meta=TOKENS._meta)
    y = expert_parallel(tokens, ROUTING, np.ones((E, D, D)), world_size=world_size)
    with pytest.raises(error, match=r"token chunk \d( at rank.*)?: " + message):
        y.compute(scheduler="sync")


def test_an_error_of_an_experts_own_says_where_it_came_from():
    def fails(x):
        if len(x):
            raise ZeroDivisionError("mine")
        return x

    y = expert_parallel(TOKENS, ROUTING, [fails] * E, world_size=2)
    with pytest.raises(ZeroDivisionError) as caught:
        y.compute(scheduler="sync")
    assert re.match(
        r"dask_ep: dispatch of token chunk \d at rank 0 of 2", caught.value.__notes__[0]
    )


def test_an_error_that_needs_more_than_words_stays_as_it_is():
    y = expert_parallel(TOKENS, ROUTING, [lambda x: json.loads("[")] * E, world_size=2)
    with pytest.raises(json.JSONDecodeError) as caught:
        y.compute(scheduler="sync")
    assert "dispatch of token chunk" in caught.value.__notes__[0]


@pytest.mark.parametrize("world_size", [1, 2])
def test_functions_cannot_change_the_tokens(world_size):
    """Rows that come sorted by expert are a view of the token chunk."""
    held = np.ones((6, D))
    tokens = da.from_array(held, chunks=(6, D)).persist(scheduler="sync")
    routing = da.zeros(6, chunks=6, dtype=int)
    y = expert_parallel(tokens, routing, [lambda x: x.__imul__(2)] * E, world_size=world_size)
    with pytest.raises(ValueError, match="dispatch of token chunk 0.*read-only"):
        y.compute(scheduler="sync")
    assert (tokens.compute(scheduler="sync") == 1).all()


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_nan_weight_is_found_though_its_row_goes_nowhere(world_size):
    weights = np.ones((N, 2))
    weights[45, 1] = np.nan
    routing = da.where(da.arange(N, chunks=20)[:, None] == 45, -1, ROUTING)
    y = expert_parallel(
        TOKENS,
        routing,
        np.ones((E, D, D)),
        topk_weights=da.from_array(weights, chunks=(20, 2)),
        world_size=world_size,
    )
    with pytest.raises(ValueError, match=r"token chunk 2.*topk_weights\[5, 1\] is \(1"):
        y.compute(scheduler="sync")


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("k", [None, 2])
def test_no_rows_in_several_chunks(world_size, k):
    routing = da.zeros((0,) if k is None else (0, k), chunks=-1, dtype=int)
    tokens = da.zeros((0, D), chunks=((0, 0), D))
    y = expert_parallel(tokens, routing, np.ones((E, D, 3)), world_size=world_size)
    assert y.chunks == ((0, 0), (3,))
    assert y.compute(scheduler="sync").shape == (0, 3)


@pytest.mark.parametrize("world_size", [1, 2])
def test_functions_are_asked_once_for_their_width(world_size):
    """Also if their experts serve many chunks: a call may be expensive."""
    probed = []

    def function(rows):
        if not len(rows):
            probed.append(rows.shape)
        return rows

    experts = Experts.callables([function] * E, d_out=D)
    routing = da.arange(N, chunks=TOKENS.chunks[0]) % E
    assert len(routing.chunks[0]) > 1
    expert_parallel(TOKENS, routing, experts, world_size=world_size).compute(scheduler="sync")
    assert probed == [(0, D)] * E


def test_functions_that_return_another_width_than_declared_are_refused():
    y = expert_parallel(TOKENS, ROUTING, [lambda x: x[:, :2]] * E)
    with pytest.raises(ValueError, match=r"width 6, but gave 2; use .*d_out=2"):
        y.compute(scheduler="sync")


def test_ranks_in_few_bits():
    experts = np.ones((300, D, D))
    made = [expert_parallel(TOKENS, ROUTING, experts, world_size=n) for n in (np.int8(3), 3)]
    assert made[0].name == made[1].name
    assert (made[0].compute(scheduler="sync") == 2 * D).all()


def test_many_tasks_are_warned_of(monkeypatch):
    monkeypatch.setattr(pipeline_module, "TASKS_ADVISED", 10)
    with pytest.warns(da.PerformanceWarning, match="3 chunks and 8 ranks make 12 tasks"):
        build(layer(), world_size=8)


@pytest.fixture(scope="module")
def client():
    with Client(
        n_workers=3, threads_per_worker=1, processes=False, dashboard_address="127.0.0.1:0"
    ) as client:
        yield client


def test_a_client_in_use_gives_one_rank_per_worker_and_the_same_bits(client):
    data = layer()
    with pytest.warns(UnpinnedWarning, match="the 3 ranks have no owners.*own_experts"):
        y = build(data)
    assert count_tasks(3, 3) == sum("ep_" in str(key) for key in y.__dask_graph__())
    got = y.compute()
    with dask.config.set(scheduler="sync"):
        assert len(build(data).__dask_graph__()) < len(
            y.__dask_graph__()
        )  # that goes before the client: one rank
        np.testing.assert_array_equal(got, build(data, world_size=3).compute())


def test_under_an_asynchronous_client():
    data = layer()

    async def compute():
        async with Client(
            n_workers=2, processes=False, dashboard_address="127.0.0.1:0", asynchronous=True
        ) as client:
            with pytest.warns(UnpinnedWarning, match="the 2 ranks have no owners"):
                y = build(data)
            return await client.compute(y)

    with dask.config.set(scheduler="sync"):
        expected = build(data, world_size=2).compute()
    np.testing.assert_array_equal(asyncio.run(compute()), expected)


def test_under_an_asynchronous_client_that_was_not_awaited():
    async def worlds():
        async with Scheduler(port=0, dashboard_address=":0", host="127.0.0.1") as scheduler:
            client = Client(scheduler.address, asynchronous=True)
            with client.as_current():  # whatever other client there is
                before = workers_in_use()
                await client
                after = workers_in_use()
            await client.close()
        return before, after

    assert asyncio.run(worlds()) == (1, 1)


def test_the_dashboard_shows_the_steps_by_name(client):
    with pytest.warns(UnpinnedWarning):
        layers = [build(layer()), build(layer(), world_size=2)]
    done = client.persist(layers)
    client.gather(client.futures_of(done))
    steps = {"ep_experts", "ep_ranks", "ep_chunk"}
    shown = client.run_on_scheduler(lambda dask_scheduler: set(dask_scheduler.task_prefixes))
    assert shown >= steps
    groups = client.run_on_scheduler(lambda dask_scheduler: set(dask_scheduler.task_groups))
    tokens = {y.name.rpartition("-")[2] for y in layers}
    assert {name for name in groups if name.startswith("ep_")} == {
        f"{step}-{token}" for step in steps for token in tokens
    }, "one group for each step of each layer"


def test_array_expressions_of_their_own_package_are_refused_by_name():
    expression = type("Array", (), {"__module__": "dask_array._collection"})()
    match = r"tokens must be a Dask array, but is a dask_array\.Array \(an array expression"
    with pytest.raises(TypeError, match=match):
        expert_parallel(expression, da.zeros(4, dtype=int), np.ones((1, 2, 2)))
    with pytest.raises(TypeError, match=match.replace("tokens", "routing")):
        expert_parallel(da.ones((4, 2)), expression, np.ones((1, 2, 2)))
    with pytest.raises(TypeError, match=r"a Dask array, but got a dask_array\.Array \(an array ex"):
        store(expression, "y.npy")


@pytest.mark.slow
def test_array_expressions_are_refused():
    code = """
import numpy as np, dask.array as da, dask_ep
try:
    dask_ep.expert_parallel(da.ones((4, 2)), da.zeros(4, dtype=int), np.ones((1, 2, 2)))
except RuntimeError as error:
    assert "array.query-planning" in str(error), error
else:
    raise SystemExit("no error")
"""
    subprocess.run(
        [sys.executable, "-c", code], env={"DASK_ARRAY__QUERY_PLANNING": "True"}, check=True
    )
