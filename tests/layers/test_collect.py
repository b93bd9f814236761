"""Statistics are those of plain loops, come with the chunks, and are joined once."""

from __future__ import annotations

import dask
import dask.array as da
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dask_ep import Experts, MoELayer, Router, collect, expert_parallel
from dask_ep.experts import local_experts
from dask_ep.graph import statistics as graph_statistics
from dask_ep.layers.collect import WHAT
from dask_ep.placement.policies import balanced
from tests.compare import assert_close
from tests.plain_statistics import make_layer, statistics
from tests.strategies import Case, cases

KINDS = ["linear", "callables", "mlp", "gated", "gated_fused"]
F = 5
IN_TILES = [name for name in WHAT if name not in ("gram", "router")]


def assert_same(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> None:
    """Counts exactly; values within 5e-6 of the largest one."""
    for name, array in got.items():
        if array.dtype.kind == "i":
            np.testing.assert_array_equal(array, want[name], err_msg=name)
            continue
        assert array.shape == want[name].shape, name
        scale = max(np.abs(want[name]).max(initial=0.0), 1.0)
        if name == "mean_output.sum":  # of numbers that cancel
            scale = max(scale, np.sqrt(got["coverage.rows"].max()) * got["amax.output"].max())
        assert np.abs(array - want[name]).max(initial=0.0) <= 5e-6 * scale, name


@settings(max_examples=25)
@given(cases(even=False), st.sampled_from(KINDS), st.booleans(), st.data())
def test_statistics_are_those_of_plain_loops(case: Case, kind: str, on_input: bool, data):
    E, (d, d_out) = case.num_experts, case.W.shape[1:]
    layer = make_layer(kind, E, d, F, d_out, seed=data.draw(st.integers(0, 99)), on_input=on_input)
    tokens, routing, topk_weights = case.dask()
    load = np.bincount(case.routing[case.routing >= 0], minlength=E)
    ranks = data.draw(st.integers(1, E))
    got = collect(
        tokens,
        layer.experts,
        what=IN_TILES,
        routing=(routing, topk_weights),
        world_size=ranks,
        placement=data.draw(st.sampled_from([None, balanced(load, ranks)])),
        with_output=data.draw(st.booleans()),
    )
    (got,) = dask.compute(got, scheduler="sync")
    got.pop("output", None)
    want = statistics(
        case.tokens, case.routing, case.topk_weights, layer.plain, on_input=layer.on_input
    )
    assert_same(got, want)
    assert not any(np.isnan(array).any() for array in got.values())
    assert got.keys() >= want.keys() - {name for name in want if name.startswith("gram")}


def small(k: int = 3, n: int = 90, E: int = 6) -> tuple[da.Array, tuple[da.Array, da.Array]]:
    rng = np.random.default_rng(0)
    arrays = (
        rng.standard_normal((n, 8)).astype("f4"),
        np.argsort(rng.random((n, E)), axis=1)[:, :k],
        rng.random((n, k)).astype("f4"),
    )
    tokens, *routing = (da.from_array(a, chunks=(7, -1)) for a in arrays)
    return tokens, tuple(routing)


@pytest.mark.parametrize("k", [1, 3])
def test_the_output_comes_from_the_same_pass_and_has_the_same_bits(k):
    tokens, (indices, weights) = small(k)
    calls = []
    matrices = np.random.default_rng(1).standard_normal((6, 8, 8)).astype("f4")

    def function(e):
        def apply(rows):
            calls.append(len(rows))
            return rows @ matrices[e]

        return apply

    experts = [function(e) for e in range(6)]
    got = collect(tokens, experts, what=["amax"], routing=(indices, weights), with_output=True)
    (got,) = dask.compute(got, scheduler="sync")
    assert sum(calls) == 90 * k
    want = expert_parallel(tokens, indices, experts, topk_weights=weights, world_size=1)
    np.testing.assert_array_equal(got["output"], want.compute(scheduler="sync"))


def test_bits_do_not_depend_on_ranks_schedulers_or_whether_the_output_is_wanted(monkeypatch):
    monkeypatch.setattr(graph_statistics, "GROUP_CHUNKS", 4)
    tokens, routing = small()
    experts = make_layer("gated", 6, 8, F, 8, seed=0).experts

    def found(scheduler: str, **options):
        got = collect(tokens, experts, what=IN_TILES, routing=routing, **options)
        return dask.compute(got, scheduler=scheduler, num_workers=3)[0]

    want = found("sync", world_size=1)
    for got in (
        found("threads", world_size=3),
        found("threads", world_size=2, with_output=True),
        found("processes", world_size=2),
    ):
        for name, array in want.items():
            np.testing.assert_array_equal(got[name], array, err_msg=name)


def test_hidden_columns_that_are_computed_apart_are_one_row(monkeypatch):
    monkeypatch.setattr(local_experts, "HIDDEN_COLUMNS", 3)
    tokens, routing = small()
    layer = make_layer("gated", 6, 8, 7, 8, seed=0)
    got = collect(tokens, layer.experts, what=["amax", "sumsq"], routing=routing)
    (got,) = dask.compute(got, scheduler="sync")
    assert got["amax.hidden"].shape == (6, 7)
    assert_same(got, statistics(*(a.compute() for a in (tokens, *routing)), layer.plain))


def test_a_layer_routes_by_itself_and_keeps_its_shape():
    rng = np.random.default_rng(0)
    experts = make_layer("gated", 6, 8, F, 8, seed=0).experts
    layer = MoELayer(Router(6, 2), experts, rng.standard_normal((6, 8), dtype="f4"), residual=True)
    hidden = da.from_array(rng.standard_normal((2, 9, 8)), chunks=(1, 4, 8))
    got = collect(hidden, layer, what=["usage", "reap"], with_output=True)
    assert got["output"].chunks == hidden.chunks
    (got,) = dask.compute(got, scheduler="sync")
    assert_close(got["output"], layer(hidden).compute(scheduler="sync"), 1e-12)
    want = layer.tokens_per_expert(hidden).compute(scheduler="sync")
    np.testing.assert_array_equal(got["usage.rows"], want)
    np.testing.assert_array_equal(got["reap.rows"], want)
    given = collect(hidden, layer, what=["usage"], routing=layer.route(hidden))
    np.testing.assert_array_equal(given["usage.rows"].compute(scheduler="sync"), want)


def test_usage_alone_sends_no_row_through_an_expert():
    tokens, routing = small()

    def refuse(rows):
        raise AssertionError("an expert was computed")

    got = collect(tokens, [refuse] * 6, what=["usage", "coactivation"], routing=routing)
    (got,) = dask.compute(got, scheduler="sync")
    assert got["coverage.rows"].sum() == got["usage.rows"].sum() == 270


def test_building_computes_nothing_and_tasks_grow_with_the_chunks(monkeypatch):
    tokens, routing = small()
    experts = make_layer("gated", 6, 8, F, 8, seed=0).experts
    monkeypatch.setattr(dask.base, "get_scheduler", None)  # whatever computed would fail
    tasks = {}
    for rows in (30, 15, 10):
        chunked = [a.rechunk((rows, -1)) for a in (tokens, *routing)]
        got = collect(chunked[0], experts, what=IN_TILES, routing=tuple(chunked[1:]), world_size=2)
        graph = got["reap.score"].__dask_graph__()
        tasks[90 // rows] = sum(str(key).startswith("('ep_") for key in graph)
    assert tasks[9] - tasks[6] == tasks[6] - tasks[3] == 9  # usage, chunk and partial of each


def test_what_is_wrong_is_said():
    tokens, routing = small()
    experts = make_layer("linear", 6, 8, F, 8, seed=0).experts
    with pytest.raises(ValueError, match="what must be some of usage, .*, but has 'ammax'"):
        collect(tokens, experts, what=["ammax"], routing=routing)
    with pytest.raises(ValueError, match="what must name something"):
        collect(tokens, experts, what=[], routing=routing)
    with pytest.raises(ValueError, match="routing must be given for experts without a router"):
        collect(tokens, experts, what=["usage"])
    with pytest.raises(
        TypeError, match=r"routing of a layer must be both \(indices, topk_weights\)"
    ):
        collect(tokens, make_layer("gated", 6, 8, F, 8, seed=0), what="usage", routing=routing[0])
    with pytest.raises(TypeError, match="hidden must be a Dask array, but is a ndarray"):
        collect(np.ones((3, 8)), experts, what=["usage"], routing=routing)


@pytest.mark.parametrize("what", ["usage", "amax"])
def test_bad_routing_is_named_with_its_row(what):
    tokens, (indices, weights) = small()
    bad = indices.compute()
    bad[40, 1] = 6
    bad = da.from_array(bad, chunks=(7, -1))
    experts = make_layer("linear", 6, 8, F, 8, seed=0).experts
    got = collect(tokens, experts, what=[what], routing=(bad, weights))
    with pytest.raises(ValueError, match=r"row 40 of the whole array.*routing\[5, 1\] is 6"):
        dask.compute(got, scheduler="sync")


def test_rows_of_bfloat16_and_large_values_keep_their_size():
    experts = Experts.linear(np.eye(4, dtype="f4")[None])
    tokens = da.from_array(np.array([[3e5, -7e18, 0, 1]], "f4"))
    got = collect(tokens, experts, what=["amax"], routing=da.zeros(1, dtype=int))
    found = got["amax.input"].compute(scheduler="sync")
    np.testing.assert_array_equal(found, np.abs(tokens.compute()))
