"""Routers choose and weigh as the plain loops of `plain_routers` do, and ties are decided."""

from __future__ import annotations

import dataclasses
import itertools

import dask
import dask.array as da
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dask_ep.layers.capacity import Capacity, ExpertChoice, choose_rows, limit_capacity
from dask_ep.layers.routing import Router, all_scores, look_up, route, weigh_chosen
from tests import plain_routers
from tests.strategies import row_chunks

SCORES = ["softmax", "sigmoid", "sqrtsoftplus", "softmax_chosen", "sigmoid_chosen", "sparsemixer"]


@st.composite
def routers(draw) -> Router:
    size, groups = draw(st.integers(2, 5)), draw(st.integers(1, 4))
    topk_groups = draw(st.integers(1, groups))
    score = draw(st.sampled_from(SCORES))
    if score not in SCORES[:3]:
        groups = topk_groups = 1
    return Router(
        num_experts=size * groups,
        k=draw(st.integers(1, size * topk_groups)),
        score=score,
        groups=groups,
        topk_groups=topk_groups,
        group_score=draw(st.sampled_from(["max", "top2"])),
        norm_topk_prob=draw(st.booleans()),
        norm_eps=draw(st.sampled_from([0.0, 1e-20, 0.25])),
        norm_min=draw(st.sampled_from([0.0, 2.0])),
        scale=draw(st.sampled_from([1.0, 2.5])),
        jitter=draw(st.sampled_from([0.01, 0.1])),
        logit_scale=draw(st.sampled_from([1.0, 0.5])),
        logit_softcap=draw(st.sampled_from([None, 1.5])),
        masked_score=draw(st.sampled_from([None, 0.0])),
    )


def route_logits(logits, router, **biases):
    """Route rows whose logits are given: the weights are the identity."""
    return route(logits, router, np.eye(router.num_experts, dtype=np.float32), **biases)


def choices_that_are_close(logits, router, selection_bias) -> bool:
    """Whether float32 and float64 may choose differently without either being wrong."""
    unbiased = dataclasses.replace(router, k=router.num_experts, groups=1, topk_groups=1,
                                   norm_topk_prob=False, scale=1.0)  # fmt: skip
    if router.score in ("softmax_chosen", "sigmoid_chosen", "sparsemixer"):
        choice = [plain_routers.bounded(float(z), router) for z in logits]
    else:
        choice = [w for _, w in sorted(plain_routers.route_row(list(map(float, logits)), unbiased))]
    choice = plain_routers.add(choice, selection_bias)
    size = router.num_experts // router.groups
    pairs = [sum(sorted(choice[g : g + size])[-2:]) for g in range(0, len(choice), size)]
    gaps = []
    for values in (choice, pairs):
        gaps += [b - a for a, b in itertools.pairwise(sorted(values))]
    return any(0 < gap < 1e-5 for gap in gaps)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_every_router_agrees_with_the_plain_loops(data):
    router = data.draw(routers())
    E = router.num_experts
    grid = st.integers(-24, 24).map(lambda i: i / 4 + 1 / 16)  # exact in float32; many are equal
    logits = np.array(
        data.draw(st.lists(st.lists(grid, min_size=E, max_size=E), max_size=6)), np.float32
    ).reshape(-1, E)
    router_bias = data.draw(st.none() | st.lists(grid, min_size=E, max_size=E))
    router_bias = None if router_bias is None else np.array(router_bias, np.float32)
    bias = data.draw(st.none() | st.lists(grid.map(lambda b: b / 8), min_size=E, max_size=E))
    if router.score == "sparsemixer":
        bias = None
    selection_bias = None if bias is None else np.array(bias, np.float32)

    scales = data.draw(st.none() | st.lists(grid, min_size=E, max_size=E))
    per_expert_scale = None if scales is None else np.array(scales, np.float32)

    indices, topk_weights = route_logits(
        logits,
        router,
        bias=router_bias,
        selection_bias=selection_bias,
        per_expert_scale=per_expert_scale,
    )

    logits = logits if router_bias is None else logits + router_bias
    assert (indices.dtype, topk_weights.dtype) == (np.int32, np.float32)
    assert indices.shape == topk_weights.shape == (len(logits), router.k)
    for row, chosen, weights in zip(logits, indices, topk_weights, strict=True):
        expected = plain_routers.route_row(list(map(float, row)), router, bias, scales)
        if chosen.tolist() != [e for e, _ in expected]:
            assert choices_that_are_close(row, router, bias)
            continue
        np.testing.assert_allclose(weights, [w for _, w in expected], rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("score", SCORES)
def test_among_equal_scores_the_lowest_index_is_chosen(score):
    logits = np.array([[1, 3, 3, 3, 1, 3], [2, 2, 2, 2, 2, 2]], np.float32)
    indices, _ = route_logits(logits, Router(6, 3, score))
    assert indices.tolist() == [[1, 2, 3], [0, 1, 2]]


@pytest.mark.parametrize("group_score", ["max", "top2"])
def test_among_equal_groups_the_lowest_is_chosen(group_score):
    logits = np.array([[1, 2, 4, 3, 4, 3, 4, 3]], np.float32)
    router = Router(8, 3, "sigmoid", groups=4, topk_groups=2, group_score=group_score)
    indices, _ = route_logits(logits, router)
    assert indices.tolist() == [[2, 4, 3]]


def test_group_score_changes_the_choice():
    logits = np.array([[5, -5, 3, 3]], np.float32)
    best = Router(4, 1, "sigmoid", groups=2, topk_groups=1, group_score="max")
    pair = dataclasses.replace(best, group_score="top2")
    assert route_logits(logits, best)[0].tolist() == [[0]]
    assert route_logits(logits, pair)[0].tolist() == [[2]]


def test_a_router_may_read_rows_that_it_normalises():
    rng = np.random.default_rng(0)
    hidden, weight = rng.standard_normal((5, 8)), rng.standard_normal((4, 8))
    router = Router(4, 2, norm_topk_prob=True, logit_scale=0.5)
    normal = hidden / np.sqrt((hidden**2).mean(axis=1, keepdims=True) + 0.1)
    plain, normalised = (
        route(normal, router, weight),
        route(hidden, dataclasses.replace(router, input_norm_eps=0.1), weight),
    )
    np.testing.assert_array_equal(plain[0], normalised[0])
    np.testing.assert_allclose(plain[1], normalised[1], rtol=1e-6)
    assert (route(hidden, router, weight)[1] != plain[1]).any()


def test_what_a_router_must_be_told_is_checked():
    with pytest.raises(ValueError, match="logit_softcap must be above 0, but is -1"):
        Router(4, 2, logit_softcap=-1)
    with pytest.raises(ValueError, match="input_norm_eps must be a finite number, but is 'a'"):
        Router(4, 2, input_norm_eps="a")
    with pytest.raises(ValueError, match=r"per_expert_scale must be \(4,\)"):
        route_logits(np.ones((1, 4), "f4"), Router(4, 2), per_expert_scale=np.ones(3, "f4"))


def test_a_selection_bias_chooses_and_does_not_weigh():
    logits = np.zeros((1, 3), np.float32)
    router = Router(3, 1, "sigmoid")
    indices, weights = route_logits(logits, router, selection_bias=np.float32([0, 0, 1]))
    assert (indices.item(), weights.item()) == (2, 0.5)


def test_an_expert_can_be_shut_by_a_bias_of_minus_infinity():
    logits = np.array([[9, 1, 2, 8]], np.float32)
    bias = np.float32([-np.inf, 0, 0, -np.inf])
    indices, weights = route_logits(logits, Router(4, 3, "softmax_chosen"), bias=bias)
    assert sorted(indices[0].tolist()) == [0, 1, 2]  # never the same expert twice
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-6)
    assert weights[0, indices[0].tolist().index(0)] == 0


@pytest.mark.parametrize("dtype", [np.float64, np.float16, ml_dtypes.bfloat16])
def test_routing_is_float32_whatever_comes(dtype):
    rng = np.random.default_rng(1)
    hidden, weight = rng.standard_normal((30, 8)).astype(dtype), rng.standard_normal((6, 8))
    router = Router(6, 2, norm_topk_prob=True)
    expected = route(hidden.astype(np.float32), router, weight.astype(np.float32))
    for got, want in zip(route(hidden, router, weight), expected, strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)


def test_rows_beyond_one_tile_are_routed_alike():
    rng = np.random.default_rng(2)
    logits = rng.integers(-5, 5, (70_000, 5)).astype(np.float32)  # 1.3 MB: more than a tile
    router = Router(5, 2, "softmax")
    indices, weights = route_logits(logits, router)
    first, rest = route_logits(logits[:7], router), route_logits(logits[69_000:], router)
    np.testing.assert_array_equal(indices[:7], first[0])
    np.testing.assert_array_equal(indices[69_000:], rest[0])
    np.testing.assert_array_equal(weights[69_000:], rest[1])


@pytest.mark.parametrize(("d", "E"), [(33, 8), (256, 64), (1000, 60)])
def test_a_row_is_routed_alike_whatever_the_other_rows_are(d, E):
    rng = np.random.default_rng(d)
    hidden = rng.standard_normal((700, d), dtype=np.float32)
    weight = rng.standard_normal((E, d), dtype=np.float32) / d**0.5
    router = Router(E, 4, "sigmoid", norm_topk_prob=True)
    whole = route(hidden, router, weight)
    for rows in (1, 7, 100):
        parts = [route(hidden[i : i + rows], router, weight) for i in range(0, 700, rows)]
        for got, want in zip(map(np.concatenate, zip(*parts, strict=True)), whole, strict=True):
            np.testing.assert_array_equal(got, want)


def test_extreme_logits_do_not_overflow():
    logits = np.array([[-1e30, 1e30, 0.0], [-200, -300, -400]], np.float32)
    for score in SCORES[:5]:
        _, weights = route_logits(logits, Router(3, 2, score))
        assert np.isfinite(weights).all()


# --- tables ------------------------------------------------------------------------------------


def test_a_table_gives_each_token_its_experts_and_a_router_weighs_them():
    rng = np.random.default_rng(3)
    table = np.array([[0, 3], [2, 1], [3, 0]])
    token_ids = np.array([2, 2, 0, 1])
    indices = look_up(token_ids, table)
    assert indices.tolist() == [[3, 0], [3, 0], [0, 3], [2, 1]]
    logits = rng.standard_normal((4, 4)).astype(np.float32)
    router = Router(4, 2, "sqrtsoftplus", norm_topk_prob=True, norm_eps=1e-20, scale=1.5)
    weights = weigh_chosen(logits, indices, router, np.eye(4, dtype=np.float32))
    for row, chosen, got in zip(logits, indices, weights, strict=True):
        scores = [np.log1p(np.exp(float(row[e]))) ** 0.5 for e in chosen]
        np.testing.assert_allclose(got, [1.5 * s / sum(scores) for s in scores], rtol=1e-5)


def test_weigh_chosen_gives_back_what_route_gave():
    rng = np.random.default_rng(4)
    hidden = rng.standard_normal((20, 6)).astype(np.float32)
    weight, bias = rng.standard_normal((8, 6)).astype(np.float32), rng.standard_normal(8)
    for score in SCORES[:5]:
        router = Router(8, 3, score, norm_topk_prob=score in SCORES[:3], scale=2.0)
        indices, weights = route(hidden, router, weight, bias=bias)
        again = weigh_chosen(hidden, indices, router, weight, bias=bias)
        np.testing.assert_array_equal(again, weights)


# --- whole batches -------------------------------------------------------------------------------


@st.composite
def routed_batches(draw):
    n, k, E = draw(st.integers(1, 12)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    indices = draw(st.lists(st.lists(st.integers(-1, E - 1), min_size=k, max_size=k),
                            min_size=n, max_size=n))  # fmt: skip
    # Few different weights, of either sign: most are equal to some other.
    value = st.sampled_from([-2.0, -0.0, 0.0, 1e-30, 0.5, 0.5000001, 3.0])
    weights = draw(st.lists(st.lists(value, min_size=k, max_size=k), min_size=n, max_size=n))
    chunks = (draw(row_chunks(n)), -1)
    return (
        E,
        da.from_array(np.array(indices), chunks=chunks),
        da.from_array(np.array(weights, np.float32), chunks=chunks),
    )


@given(routed_batches(), st.floats(0.05, 3), st.sampled_from(["score", "position"]))
@settings(max_examples=40, deadline=None)
def test_capacity_agrees_with_the_plain_loops(batch, factor, drop):
    E, indices, weights = batch
    kept = limit_capacity(indices, weights, E, Capacity(factor, drop))
    capacity = int(np.ceil(round(factor * indices.size / E, 6)))
    expected = plain_routers.drop_over_capacity(
        indices.compute().tolist(), weights.compute().tolist(), capacity, drop
    )
    assert kept.chunks == indices.chunks
    da.utils.assert_eq(kept, np.array(expected, np.int32))


@given(routed_batches(), st.floats(0.05, 3))
@settings(max_examples=30, deadline=None)
def test_expert_choice_agrees_with_the_plain_loops(batch, factor):
    _, _, scores = batch
    n, E = scores.shape
    indices = choose_rows(scores, factor).compute(scheduler="sync")
    capacity = int(np.ceil(round(factor * n / E, 6)))
    expected = plain_routers.expert_choice(scores.compute().tolist(), capacity)
    assert {(i, indices[i, j]) for i, j in zip(*np.nonzero(indices >= 0), strict=True)} == expected
    assert all(indices[i, e] == e for i, e in expected)


@pytest.mark.parametrize("drop", ["score", "position"])
def test_capacity_does_not_depend_on_chunks_and_takes_unknown_ones(drop):
    rng = np.random.default_rng(5)
    indices = rng.integers(0, 7, (500, 3))
    weights = rng.random((500, 3), dtype=np.float32).round(2)
    results = []
    for rows in (500, 77, 10):
        x, w = (da.from_array(a, chunks=(rows, -1)) for a in (indices, weights))
        results.append(limit_capacity(x, w, 7, Capacity(0.9, drop)).compute())
    x, w = (da.from_array(a, chunks=(77, -1)) for a in (indices, weights))
    everything = da.ones(500, chunks=77, dtype=bool)
    unknown = limit_capacity(x[everything], w[everything], 7, Capacity(0.9, drop))
    for result in [*results[1:], unknown.compute()]:
        np.testing.assert_array_equal(result, results[0])
    per_expert = np.bincount(results[0][results[0] >= 0], minlength=7)
    assert per_expert.max() == np.ceil(0.9 * 1500 / 7)


def test_building_a_capacity_limit_computes_nothing():
    def refuse(*args, **kwargs):
        raise AssertionError("computed")

    x = da.zeros((10, 2), chunks=(3, -1), dtype=np.int64)
    with dask.config.set(scheduler=refuse):
        limit_capacity(x, x.astype(np.float32), 3, Capacity(1.0))
        choose_rows(x.astype(np.float32), 1.0)


def test_all_scores_are_those_that_route_uses():
    rng = np.random.default_rng(6)
    hidden, weight = rng.standard_normal((9, 4)), rng.standard_normal((5, 4))
    for score in SCORES[:3]:
        scores = all_scores(hidden, score, weight)
        indices, weights = route(hidden, Router(5, 5, score), weight)
        np.testing.assert_array_equal(np.take_along_axis(scores, indices.astype(int), 1), weights)


# --- messages ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score": "tanh"}, "score must be one of 'softmax'.* but is 'tanh'"),
        (
            {"apply_router_weight_on_input": "both"},
            "apply_router_weight_on_input must be True or False, but is 'both'",
        ),
        ({"group_score": "mean"}, "group_score must be one of 'max', 'top2', but is 'mean'"),
        ({"k": 9}, r"k must be in \[1, 8\], but is 9"),
        ({"k": 0}, r"k must be in \[1, 8\], but is 0"),
        ({"groups": 3}, "groups must divide num_experts=8, but is 3"),
        ({"groups": 4, "topk_groups": 5}, r"topk_groups must be in \[1, 4\] .*but is 5"),
        ({"groups": 4, "k": 3}, "must hold at least k=3 experts, but topk_groups=1 groups of 2"),
        ({"groups": 8, "topk_groups": 4, "group_score": "top2"}, "groups of at least 2 experts"),
        ({"k": 2.5}, "k must be a whole number, but is 2.5"),
        ({"groups": True}, "groups must be a whole number, but is True"),
        ({"scale": "2"}, "scale must be a finite number, but is '2'"),
        ({"norm_min": float("nan")}, "norm_min must be a finite number, but is nan"),
        ({"norm_topk_prob": "yes"}, "norm_topk_prob must be True or False, but is 'yes'"),
        ({"groups": 4, "topk_groups": 2, "score": "sigmoid_chosen"}, "groups need a score of all"),
    ],
)
def test_a_router_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(Router(8, 2), **changes)


@pytest.mark.parametrize(
    ("arrays", "error", "message"),
    [
        ({"weight": np.ones((4, 3))}, ValueError, r"weight must be \(4, 2\) .* shape \(4, 3\)"),
        ({"weight": np.ones((4, 2), int)}, TypeError, "weight must hold floats, .* int64"),
        ({"bias": np.ones(3)}, ValueError, r"bias must be \(4,\) .* shape \(3,\)"),
        ({"selection_bias": np.ones((1, 4))}, ValueError, r"selection_bias must be \(4,\)"),
        ({"bias": np.float32([0, 0, np.nan, 0])}, ValueError, r"NaN, but bias\[2\] is"),
        ({"hidden": np.ones(2)}, ValueError, r"tokens must be \(n, d\)"),
        ({"hidden": np.ones((5, 2), int)}, TypeError, "tokens must hold floats"),
        (
            {"hidden": np.array([[1, 1], [1, np.nan], [np.inf, 1]])},
            ValueError,
            "NaN for row 1, and for 2 of 3 rows",
        ),
    ],
)
def test_arrays_that_do_not_fit_are_refused(arrays, error, message):
    arrays = {"hidden": np.ones((3, 2)), "weight": np.ones((4, 2))} | arrays
    hidden, weight = arrays.pop("hidden"), arrays.pop("weight")
    with pytest.raises(error, match=message):
        route(hidden, Router(4, 2), weight, **arrays)


def test_tables_and_chosen_experts_that_do_not_fit_are_refused():
    table = np.zeros((3, 2), int)
    with pytest.raises(ValueError, match=r"must be in \[0, 3\).* token_ids\[1\] is 3"):
        look_up(np.array([0, 3]), table)
    with pytest.raises(ValueError, match=r"token_ids must be an \(n,\) array of integers"):
        look_up(np.array([0.5]), table)
    with pytest.raises(ValueError, match=r"table must be a \(vocabulary, k\) array of integers"):
        look_up(np.array([0]), table[0])
    hidden, weight = np.ones((3, 2)), np.ones((4, 2))
    with pytest.raises(ValueError, match=r"k=2 columns, \(3, 2\), but have shape \(3, 1\)"):
        weigh_chosen(hidden, np.zeros((3, 1), int), Router(4, 2), weight)
    with pytest.raises(ValueError, match=r"indices must be in \[0, 4\), but range from -1 to 4"):
        weigh_chosen(hidden, np.array([[0, 4], [-1, 0], [0, 0]]), Router(4, 2), weight)
    with pytest.raises(ValueError, match="its selection_bias must be None"):
        route(hidden, Router(4, 2, "sparsemixer"), weight, selection_bias=np.ones(4))
    with pytest.raises(ValueError, match="sparsemixer weighs only what it chose"):
        weigh_chosen(hidden, np.zeros((3, 2), int), Router(4, 2, "sparsemixer"), weight)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Capacity(0), "factor must be a positive number, but is 0"),
        (lambda: Capacity(1, "random"), "drop must be 'score' or 'position', but is 'random'"),
        (lambda: ExpertChoice(0, 1), "num_experts must be at least 1, but is 0"),
        (lambda: ExpertChoice(4, -1), "factor must be a positive number, but is -1"),
        (lambda: ExpertChoice(4, 1, "max"), "score must be one of .* but is 'max'"),
        (
            lambda: ExpertChoice(4, 1, apply_router_weight_on_input="no"),
            "apply_router_weight_on_input must be True or False",
        ),
    ],
)
def test_limits_that_cannot_be_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
