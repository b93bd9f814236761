"""Statistics are those of plain loops, come with the chunks, and are joined once."""

from __future__ import annotations

from collections import Counter

import dask
import dask.array as da
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dask_ep import Experts, MoELayer, Router, collect, expert_parallel
from dask_ep.experts import local_experts
from dask_ep.experts.stored_experts import held_as_stored
from dask_ep.graph import gram, row_choice
from dask_ep.layers.collect import WHAT, Wanted, begin_collection
from dask_ep.placement.policies import balanced, exact
from tests.compare import assert_close
from tests.plain_statistics import make_layer, statistics
from tests.strategies import Case, cases

KINDS = ["linear", "callables", "mlp", "gated", "gated_fused"]
F = 5
SEEN = [name for name in WHAT if name != "router"]


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
        what=SEEN,
        routing=(routing, topk_weights),
        world_size=ranks,
        placement=data.draw(st.sampled_from([None, balanced(load, ranks), exact(load, ranks)])),
        with_output=data.draw(st.booleans()),
    )
    (got,) = dask.compute(got, scheduler="sync")
    got.pop("output", None)
    want = statistics(
        case.tokens, case.routing, case.topk_weights, layer.plain, on_input=layer.on_input
    )
    assert_same(got, want)
    assert not any(np.isnan(array).any() for array in got.values())
    assert got.keys() == want.keys() - {"gram.output"}


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


@pytest.mark.slow
def test_bits_do_not_depend_on_ranks_schedulers_or_whether_the_output_is_wanted():
    tokens, routing = small()
    experts = make_layer("gated", 6, 8, F, 8, seed=0).experts

    def found(scheduler: str, **options):
        got = collect(tokens, experts, what=SEEN, routing=routing, **options)
        return dask.compute(got, scheduler=scheduler, num_workers=3)[0]

    want = found("sync", world_size=1)
    for got in (
        found("threads", world_size=3),
        found("threads", world_size=2, with_output=True),
        found("processes", world_size=2),
    ):
        for name, array in want.items():
            np.testing.assert_array_equal(got[name], array, err_msg=name)


@pytest.mark.parametrize("kind", ["linear", "mlp", "gated", "gated_fused"])
def test_experts_that_are_held_as_stored_have_the_same_statistics(kind):
    tokens, routing = small()
    experts = make_layer(kind, 6, 8, F, 8, seed=0).experts
    got, want = (
        dask.compute(collect(tokens, each, what=SEEN, routing=routing), scheduler="sync")[0]
        for each in (held_as_stored(experts), experts)
    )
    assert got.keys() == want.keys()
    for name, array in want.items():
        np.testing.assert_array_equal(got[name], array, err_msg=name)


def test_hidden_columns_that_are_computed_apart_are_one_row(monkeypatch):
    monkeypatch.setattr(local_experts, "HIDDEN_COLUMNS", 3)
    tokens, routing = small()
    layer = make_layer("gated", 6, 8, 7, 8, seed=0)
    got = collect(tokens, layer.experts, what=["amax", "sumsq", "gram"], routing=routing)
    (got,) = dask.compute(got, scheduler="sync")
    assert got["amax.hidden"].shape == (6, 7)
    assert_same(got, statistics(*(a.compute() for a in (tokens, *routing)), layer.plain))


def test_a_layer_routes_by_itself_and_keeps_its_shape():
    rng = np.random.default_rng(0)
    experts = make_layer("gated", 6, 8, F, 8, seed=0).experts
    shared = make_layer("gated", 2, 8, F, 8, seed=1).experts
    layer = MoELayer(
        Router(6, 2), experts, rng.standard_normal((6, 8), dtype="f4"), shared=shared,
        residual=True,
    )  # fmt: skip
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
        got = collect(chunked[0], experts, what=SEEN, routing=tuple(chunked[1:]), world_size=2)
        graph = got["reap.score"].__dask_graph__()
        tasks[90 // rows] = sum(str(key).startswith("('ep_") for key in graph)
    assert tasks[9] - tasks[6] == tasks[6] - tasks[3] == 9  # usage, chunk and partial of each


def test_a_chunk_is_sorted_once_for_the_grams_of_all_experts(monkeypatch):
    sorts, plain = [], gram.sort_slots

    def counted(routing, *arguments):
        sorts.append(len(routing))
        return plain(routing, *arguments)

    monkeypatch.setattr(gram, "sort_slots", counted)
    tokens, routing = small()
    experts = make_layer("gated", 6, 8, F, 8, seed=0).experts
    got = collect(tokens, experts, what=["gram"], routing=routing)
    graph = got["gram.input"].__dask_graph__()
    names = Counter(key[0].partition("-")[0] for key in graph if isinstance(key, tuple))
    assert (names["ep_sort"], names["ep_pick"], names["ep_gram"]) == (13, 13, 6)
    want = dask.compute(got, scheduler="sync")[0]["gram.input"]
    assert sorted(sorts) == [6] + [7] * 12
    wanted = Wanted(("gram",))
    for together, block in ((1, None), (4, range(3))):
        found = begin_collection(
            tokens, experts, wanted, routing=routing, picked_together=together, block=block
        ).grams["gram.input"]  # fmt: skip
        assert found.shape == want.shape, "of all experts, where others are observed by block"
        np.testing.assert_array_equal(found[2:5].compute(scheduler="sync"), want[2:5])


def test_wrong_arguments_are_refused():
    tokens, routing = small()
    experts = make_layer("linear", 6, 8, F, 8, seed=0).experts
    layer = MoELayer(Router(6, 2), experts, np.ones((6, 8)))
    with pytest.raises(ValueError, match="what must be some of usage, .*, but has 'ammax'"):
        collect(tokens, experts, what=["ammax"], routing=routing)
    with pytest.raises(ValueError, match="what must name something"):
        collect(tokens, experts, what=[], routing=routing)
    with pytest.raises(ValueError, match="routing must be given for experts without a router"):
        collect(tokens, experts, what=["usage"])
    with pytest.raises(
        TypeError, match=r"routing of a layer must be both \(indices, topk_weights\)"
    ):
        collect(tokens, layer, what="usage", routing=routing[0])
    with pytest.raises(TypeError, match="routing of a layer must be both"):
        collect(tokens, layer, what="usage", routing=(routing[0], None))
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


@settings(max_examples=15)
@given(cases(even=False, repeats=False), st.sampled_from(["all", 0.3]), st.data())
def test_rows_that_nobody_routed_are_seen_but_not_counted(case: Case, rows, data):
    E, (d, d_out) = case.num_experts, case.W.shape[1:]
    layer = make_layer("gated", E, d, F, d_out, seed=0)
    tokens, routing, topk_weights = case.dask()
    block = data.draw(st.sampled_from([range(E), range(E // 2, E)]))

    def collected(x: da.Array, r: da.Array, w: da.Array | None) -> dict[str, np.ndarray]:
        found = begin_collection(
            x, layer.experts, Wanted(("amax", "mean_output", "reap", "sumsq"), rows, seed=3),
            routing=(r, w), world_size=case.world_size, block=block,
        )  # fmt: skip
        return dask.compute(found.arrays(), scheduler="sync")[0]

    got = collected(tokens, routing, topk_weights)
    first = np.int64(block.start)
    slots = case.routing if case.routing.ndim == 2 else case.routing[:, None]
    local = np.where((slots >= first) & (slots < block.stop), slots - first, -1)
    chosen = (local[:, :, None] == np.arange(len(block))).any(axis=1)
    others = ~chosen
    if rows != "all":
        numbers = row_choice._uniform(0, len(local), block, 3)
        assert numbers.shape == others.shape
        others &= numbers < rows
    weights = case.topk_weights
    weights = weights if weights is None or weights.ndim == 2 else weights[:, None]
    want = statistics(
        case.tokens, local, weights, layer.plain[block.start : block.stop], others=others
    )
    assert_same(got, want)
    whole = (a if a is None else a.rechunk({0: -1}) for a in (tokens, routing, topk_weights))
    np.testing.assert_array_equal(collected(*whole)["coverage.rows"], got["coverage.rows"])


def test_a_share_is_a_share_whatever_the_seed():
    counts = [(row_choice._uniform(0, 4000, range(5), seed) < 0.1).sum() for seed in (0, 1)]
    assert all(1850 < count < 2150 for count in counts)
    assert len(set(counts)) == 2


def test_the_output_is_the_same_with_other_rows():
    tokens, routing = small()
    experts = make_layer("gated", 6, 8, F, 8, seed=0).experts
    got = collect(tokens, experts, what=["amax"], routing=routing, rows="all", with_output=True)
    (got,) = dask.compute(got, scheduler="sync")
    want = expert_parallel(tokens, routing[0], experts, topk_weights=routing[1])
    np.testing.assert_array_equal(got["output"], want.compute(scheduler="sync"))
    np.testing.assert_array_equal(got["coverage.rows"], 90)


@pytest.mark.parametrize(
    "router",
    [
        Router(6, 2),
        Router(6, 2, "sigmoid", groups=3, topk_groups=2),
        Router(6, 1, "softmax_chosen"),
        Router(6, 6, "sqrtsoftplus"),
        Router(6, 2, "sparsemixer"),
        Router(6, 4, "sigmoid", groups=3, topk_groups=2),
    ],
    ids=lambda router: f"{router.score}-{router.k}",
)
def test_statistics_of_a_router_are_those_of_plain_loops(router):
    rng = np.random.default_rng(0)
    experts = make_layer("gated", 6, 8, F, 8, seed=0).experts
    weight = rng.standard_normal((6, 8), dtype="f4")
    bias = None if router.score == "sparsemixer" else rng.random(6, dtype="f4")
    scale = rng.random(8, dtype="f4")
    layer = MoELayer(router, experts, weight, selection_bias=bias, input_scale=scale)
    x = rng.standard_normal((50, 8))
    got = collect(da.from_array(x, chunks=(20, -1)), layer, what=["router"])
    (got,) = dask.compute(got, scheduler="sync")
    want = plain_router(x, router, weight * scale, bias)
    for name, array in want.items():
        np.testing.assert_allclose(got[f"router.{name}"], array.mean(axis=0), rtol=1e-5)
        if array.ndim == 1:
            edges, counts = got[f"router.{name}_edges"], got[f"router.{name}_histogram"]
            clipped = np.clip(array, edges[0], edges[-1] * (1 - 1e-9))
            assert np.abs(np.histogram(clipped, edges)[0] - counts).sum() <= 2  # at an edge
            assert counts.sum() == len(array)
    assert got["router.rows"] == 50
    if "margin" not in want:  # a row chooses all that it may
        assert got["router.margin"] == got["router.margin_histogram"].sum() == 0


def plain_router(x, router, weight, bias) -> dict[str, np.ndarray]:
    """Probabilities (n, E); entropy, z-loss and margin (n,) of rows, one after the other."""
    found: dict[str, list] = {"probability": [], "entropy": [], "z_loss": [], "margin": []}
    for row in x:
        logits = weight.astype("f8") @ row
        kind = router.score.removesuffix("_chosen")
        if kind == "sigmoid":
            scores = 1 / (1 + np.exp(-logits))
        elif kind == "sqrtsoftplus":
            scores = np.sqrt(np.log1p(np.exp(logits)))
        else:
            scores = np.exp(logits) / np.exp(logits).sum()
        choice = logits if router.score in ("softmax_chosen", "sparsemixer") else scores
        choice = choice + (0 if bias is None else bias)
        if router.grouped:
            best = np.argsort(-choice.reshape(3, 2).max(axis=1))[: router.topk_groups]
            choice = np.concatenate([choice[2 * g : 2 * g + 2] for g in best])
        p = scores / scores.sum()
        found["probability"].append(p)
        found["entropy"].append(-(p * np.log(p)).sum())
        found["z_loss"].append(np.log(np.exp(logits).sum()) ** 2)
        if router.k < len(choice):
            ordered = np.sort(choice)[::-1]
            found["margin"].append(ordered[router.k - 1] - ordered[router.k])
    return {name: np.array(values) for name, values in found.items() if values}


def test_experts_without_a_router_have_no_statistics_of_one():
    tokens, routing = small()
    experts = make_layer("gated", 6, 8, F, 8, seed=0).experts
    with pytest.raises(ValueError, match="statistics of the router need a layer"):
        collect(tokens, experts, what=["router"], routing=routing)
    with pytest.raises(ValueError, match=r"rows must be 'routed', 'all' or a share in \(0, 1\]"):
        collect(tokens, experts, what=["amax"], routing=routing, rows=1.5)
