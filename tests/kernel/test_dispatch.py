"""The kernel gives what the plain loops give, and refuses what it cannot serve."""

from __future__ import annotations

import itertools

import dask.array as da
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dask_ep import expert_parallel_dispatch
from dask_ep.kernel import host_kernel, reference
from dask_ep.kernel.expert import Expert, Linear
from tests.compare import assert_close, whole_layer
from tests.strategies import TOKEN_DTYPES, Case, cases

W4 = np.stack([float(e + 1) * np.eye(3) for e in range(4)])


def run_all_ranks(case: Case) -> list[np.ndarray]:
    return [
        expert_parallel_dispatch(
            case.tokens,
            case.routing,
            case.local_Ws(rank),
            rank,
            case.world_size,
            topk_weights=case.topk_weights,
        )
        for rank in range(case.world_size)
    ]


@given(cases())
def test_equals_the_plain_loops_on_every_rank(case: Case):
    for rank, got in enumerate(run_all_ranks(case)):
        want = reference.expert_parallel_dispatch(
            case.tokens,
            case.routing,
            [reference.linear(W.astype(np.float64)) for W in case.local_Ws(rank)],
            rank,
            case.world_size,
            case.topk_weights,
            d_out=case.W.shape[2],
        )
        assert got.dtype == case.tokens.dtype
        assert_close(got, want, case.tolerance)


@given(cases(dtypes=[np.float64]))
def test_the_sum_over_ranks_is_the_layer(case: Case):
    assert_close(sum(run_all_ranks(case)), whole_layer(case), case.tolerance)


@given(cases(), st.sampled_from(["list", "stack", "callables"]))
def test_experts_in_any_form_give_the_same(case: Case, form: str):
    Ws = case.local_Ws(0)
    compute = np.float64 if case.tokens.dtype == np.float64 else np.float32
    forms = {
        "list": list(Ws),
        "stack": Ws,
        "callables": [(lambda x, W=W: x @ W.astype(compute)) for W in Ws],
    }
    got, want = (
        expert_parallel_dispatch(case.tokens, case.routing, experts, 0, case.world_size)
        for experts in (forms[form], list(Ws))
    )
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("dtype", TOKEN_DTYPES)
@pytest.mark.parametrize("presorted", [False, True])
def test_identity_experts_give_the_input_bit_for_bit(dtype, presorted):
    rng = np.random.default_rng(0)
    tokens = rng.standard_normal((500, 6)).astype(dtype)
    routing = rng.integers(0, 4, 500)
    routing = np.sort(routing) if presorted else routing
    out = expert_parallel_dispatch(tokens, routing, [lambda x: x] * 4, 0, 1)
    np.testing.assert_array_equal(out, tokens)


def test_one_expert_is_the_dense_layer():
    rng = np.random.default_rng(0)
    tokens, W = rng.standard_normal((300, 8), "f4"), rng.standard_normal((1, 8, 5), "f4")
    out = expert_parallel_dispatch(tokens, np.zeros(300, int), W, 0, 1)
    np.testing.assert_array_equal(out, tokens @ W[0])


@settings(max_examples=20)
@given(cases(dtypes=[np.float32], repeats=False), st.randoms(use_true_random=False))
def test_renumbering_the_experts_changes_nothing_with_one_slot_a_row(case: Case, random):
    routing = case.routing if case.routing.ndim == 1 else case.routing[:, 0]
    number = np.array(random.sample(range(case.num_experts), case.num_experts))
    renumbered = np.where(routing < 0, -1, number[routing])
    got, want = (
        expert_parallel_dispatch(case.tokens, numbers, Ws, 0, 1)
        for numbers, Ws in ((renumbered, case.W[np.argsort(number)]), (routing, case.W))
    )
    np.testing.assert_array_equal(got, want)


def test_tiles_cut_a_large_segment(monkeypatch):
    rng = np.random.default_rng(0)
    tokens, W = rng.standard_normal((3000, 64), "f4"), rng.standard_normal((2, 64, 32), "f4")
    routing, weights = rng.integers(0, 2, (3000, 2)), rng.random((3000, 2), "f4")
    whole = expert_parallel_dispatch(tokens, routing, W, 0, 1, topk_weights=weights)
    monkeypatch.setattr(host_kernel, "TILE_ROWS", (1, 64))
    experts = [Counter(w) for w in W]
    tiled = expert_parallel_dispatch(tokens, routing, experts, 0, 1, topk_weights=weights)
    assert all(max(expert.rows) <= 64 < sum(expert.rows) for expert in experts)
    assert_close(tiled, whole, 1e-6)


class Counter(Linear):
    """A linear expert that notes how many rows each call has."""

    def __init__(self, W):
        super().__init__(W)
        self.rows = []

    def __call__(self, rows, out=None):
        self.rows.append(len(rows))
        return super().__call__(rows, out)


class Recorder(Expert):
    """An identity expert that keeps what it was handed."""

    d = d_out = 4

    def __init__(self, apply_router_weight_on_input: bool = False):
        self.apply_router_weight_on_input = apply_router_weight_on_input
        self.rows, self.outs = [], []

    def __call__(self, rows, out=None):
        self.rows.append(rows)
        self.outs.append(out)
        out[...] = rows
        return out


def test_presorted_rows_are_neither_gathered_nor_scattered():
    tokens, experts = np.random.default_rng(0).random((10, 4)), [Recorder(), Recorder()]
    out = expert_parallel_dispatch(tokens, np.repeat([0, 1], 5), experts, 0, 1)
    for expert in experts:
        assert all(np.shares_memory(rows, tokens) for rows in expert.rows)
        assert all(np.shares_memory(y, out) for y in expert.outs)


def test_each_expert_gets_its_rows_in_order_and_only_if_it_has_some():
    tokens, experts = np.arange(24.0).reshape(6, 4), [Recorder(), Recorder(), Recorder()]
    expert_parallel_dispatch(tokens, np.array([2, 0, 2, 0, -1, 2]), experts, 0, 1)
    assert [len(expert.rows) for expert in experts] == [1, 0, 1]
    np.testing.assert_array_equal(experts[0].rows[0], tokens[[1, 3]])
    np.testing.assert_array_equal(experts[2].rows[0], tokens[[0, 2, 5]])


@pytest.mark.parametrize("routing", [[0, 1, 0], [0, 0, 1]], ids=["gathered", "presorted"])
def test_a_weight_on_the_input_leaves_the_tokens_as_they_are(routing):
    tokens = np.arange(12.0).reshape(3, 4)
    before, weights = tokens.copy(), np.array([0.5, 2.0, 3.0])
    experts = [Recorder(True), Recorder(True)]
    out = expert_parallel_dispatch(tokens, np.array(routing), experts, 0, 1, topk_weights=weights)
    np.testing.assert_array_equal(tokens, before)
    np.testing.assert_array_equal(out, tokens * weights[:, None])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_infinity_stay_in_their_row(bad):
    rng = np.random.default_rng(0)
    tokens, W = rng.standard_normal((50, 4), "f4"), rng.standard_normal((2, 4, 3), "f4")
    routing, weights = rng.integers(0, 2, (50, 2)), rng.random((50, 2), "f4")
    clean = expert_parallel_dispatch(tokens, routing, W, 0, 1, topk_weights=weights)
    tokens[7, 2] = bad
    with np.errstate(invalid="ignore"):
        dirty = expert_parallel_dispatch(tokens, routing, W, 0, 1, topk_weights=weights)
    assert not np.isfinite(dirty[7]).any()
    np.testing.assert_array_equal(np.delete(dirty, 7, 0), np.delete(clean, 7, 0))


@pytest.mark.parametrize("shape", [(0,), (0, 3)])
def test_no_rows(shape):
    out = expert_parallel_dispatch(np.empty((0, 3), "f4"), np.empty(shape, int), W4, 0, 1)
    assert out.shape == (0, 3)
    assert out.dtype == np.float32


def test_a_rank_without_rows_gives_zeros_of_the_right_width():
    experts = [lambda x: x[:, :2]] * 2
    out = expert_parallel_dispatch(np.ones((4, 3)), np.zeros(4, int), experts, 1, 2)
    np.testing.assert_array_equal(out, np.zeros((4, 2)))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.uint64])
def test_unsigned_routing_at_every_rank(dtype):
    routing = np.array([0, 3, 2, 1], dtype)
    total = sum(
        expert_parallel_dispatch(np.ones((4, 3)), routing, W4[2 * r : 2 * r + 2], r, 2)
        for r in range(2)
    )
    np.testing.assert_array_equal(total[:, 0], [1, 4, 3, 2])


@pytest.mark.parametrize(
    ("dtype", "value"),
    [(np.int8, 4), (np.int64, 2**60), (np.int64, -2), (np.uint64, 2**64 - 1), (np.uint8, 255)],
)
@pytest.mark.parametrize("rank", [0, 1])
def test_an_index_out_of_range_is_never_dropped(dtype, value, rank):
    routing = np.array([[0, 1], [2, value]], dtype)
    message = rf"\[-1, 4\).*routing\[1, 1\] is {value}, and 1 of 4.*2 experts a rank.*world_size=2"
    with pytest.raises(ValueError, match=message):
        expert_parallel_dispatch(np.ones((2, 3)), routing, W4[:2], rank, 2)


def test_a_rank_in_few_bits_owns_what_it_should():
    """100 experts a rank are more than an int8 can count."""
    tokens, routing = np.ones((4, 2)), np.array([0, 100, 200, 299])
    out = expert_parallel_dispatch(tokens, routing, [np.eye(2)] * 100, np.int8(2), np.int8(3))
    np.testing.assert_array_equal(out[:, 0], [0, 0, 1, 1])


def test_ranks_with_unequal_numbers_of_experts_are_refused():
    five, routing = [*W4, W4[0]], np.array([0, 3, 4])
    message = r"\[-1, 4\).*is 4.*in direct calls of the kernel, world_size must divide"
    with pytest.raises(ValueError, match=message):
        expert_parallel_dispatch(np.ones((3, 3)), routing, five[3:], 1, 2)


REFUSED = {
    "float routing": (
        {"routing": np.zeros(2)},
        TypeError,
        r"routing must hold integer expert indices, but has dtype float64; convert",
    ),
    "tokens of another byte order": (
        {"tokens": np.ones((2, 3), ">f8")},
        TypeError,
        r"tokens must have the byte order of this machine.* >f8; convert with astype\('float64'\)",
    ),
    "masked tokens": (
        {"tokens": np.ma.ones((2, 3))},
        TypeError,
        r"tokens must not be a masked array",
    ),
    "masked routing": (
        {"routing": np.ma.zeros(2, int)},
        TypeError,
        r"routing must not be a masked array; .*in routing, -1 means no expert",
    ),
    "masked weights": (
        {"topk_weights": np.ma.ones(2)},
        TypeError,
        r"topk_weights must not be a masked array",
    ),
    "integer tokens": (
        {"tokens": np.ones((2, 3), int)},
        TypeError,
        r"tokens must hold floats, but have dtype int64",
    ),
    "tokens of three axes": (
        {"tokens": np.ones((2, 3, 1))},
        ValueError,
        r"tokens must be \(n, d\), but have shape \(2, 3, 1\)",
    ),
    "routing of other length": (
        {"routing": np.zeros(3, int)},
        ValueError,
        r"one row per token row, but has 3 rows \(shape \(3,\)\) and tokens have 2",
    ),
    "routing of three axes": (
        {"routing": np.zeros((2, 1, 1), int)},
        ValueError,
        r"routing must be \(n,\) or \(n, k\), but has shape \(2, 1, 1\)",
    ),
    "routing without slots": (
        {"routing": np.zeros((2, 0), int)},
        ValueError,
        r"at least one slot, but has shape \(2, 0\)",
    ),
    "width of the first expert": (
        {"tokens": np.ones((2, 5))},
        ValueError,
        r"expert_Ws\[0\] takes rows of width 3, but tokens have width d=5",
    ),
    "widths of the experts": (
        {"expert_Ws": [np.ones((3, 3)), np.ones((3, 2))]},
        ValueError,
        r"expert_Ws\[1\] has d_out=2 and expert_Ws\[0\] has d_out=3",
    ),
    "no experts": ({"expert_Ws": []}, ValueError, r"expert_Ws is empty.*at least one expert"),
    "one matrix": (
        {"expert_Ws": np.ones((3, 3))},
        ValueError,
        r"\(E/R, d, d_out\), but has shape \(3, 3\); a single expert is a list",
    ),
    "an expert of three axes": (
        {"expert_Ws": [np.ones((3, 3, 3))]},
        ValueError,
        r"expert_Ws\[0\] must be a \(d, d_out\) matrix, but has shape \(3, 3, 3\)",
    ),
    "an expert of integers": (
        {"expert_Ws": [np.ones((3, 3), int)]},
        TypeError,
        r"expert_Ws\[0\] must hold floats, but has dtype int64",
    ),
    "an expert of text": (
        {"expert_Ws": ["W"]},
        TypeError,
        r"expert_Ws\[0\] must be .* a callable .* but is a str",
    ),
    "a callable of the wrong shape": (
        {"expert_Ws": [lambda x: x.sum()]},
        ValueError,
        r"expert_Ws\[0\] must map rows \(m, d\) to rows .* but gave shape \(\)",
    ),
    "a callable that drops rows": (
        {"expert_Ws": [lambda x: x[:1]]},
        ValueError,
        r"expert_Ws\[0\].*rows \(2, 3\) must give \(2, 3\), but gave shape \(1, 3\)",
    ),
    "rank too large": ({"rank": 2}, ValueError, r"rank must be in \[0, 2\).* but is 2"),
    "rank below zero": ({"rank": -1}, ValueError, r"rank must be in \[0, 2\).* but is -1"),
    "rank of half": ({"rank": 0.5}, TypeError, r"rank must be a whole number, but is 0.5"),
    "no ranks": ({"world_size": 0}, ValueError, r"world_size must be at least 1, but is 0"),
    "weights of another shape": (
        {"topk_weights": np.ones((2, 2))},
        ValueError,
        r"topk_weights have \(2, 2\) and routing has \(2,\)",
    ),
    "integer weights": (
        {"topk_weights": np.ones(2, int)},
        TypeError,
        r"topk_weights must hold floats, but have dtype int64",
    ),
    "NaN weight": (
        {"topk_weights": np.array([1.0, np.nan])},
        ValueError,
        r"must not be NaN, but topk_weights\[1\] is \(1 of 2 are\)",
    ),
    "a list of tokens": (
        {"tokens": [[1.0]]},
        TypeError,
        r"tokens must be a NumPy or CuPy array, but is a list",
    ),
    "a Dask array": (
        {"tokens": da.ones((2, 3))},
        TypeError,
        r"tokens must be .* but is a Array; for Dask arrays use dask_ep.expert_parallel",
    ),
}


@pytest.mark.parametrize("routing", [[0, 0, 1], [1, 0, 1]], ids=["sorted", "unsorted"])
def test_functions_cannot_change_the_tokens(routing):
    """Rows that come sorted by expert are a view of the tokens."""
    tokens = np.ones((3, 2))
    double = lambda rows: np.multiply(rows, 2, out=rows)  # noqa: E731
    with pytest.raises(ValueError, match="read-only"):
        expert_parallel_dispatch(tokens, np.array(routing), [double, double], 0, 1)
    assert (tokens == 1).all()


@pytest.mark.parametrize(("changes", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused_with_what_must_hold_and_what_came(changes, error, message):
    good = {
        "tokens": np.ones((2, 3)),
        "routing": np.zeros(2, int),
        "expert_Ws": W4[:2],
        "rank": 0,
        "world_size": 2,
    }
    with pytest.raises(error, match=message):
        expert_parallel_dispatch(**(good | changes))


def test_the_same_input_gives_the_same_bits():
    rng = np.random.default_rng(0)
    tokens, W = rng.standard_normal((400, 16), "f4"), rng.standard_normal((8, 16, 16), "f4")
    routing, weights = rng.integers(0, 8, (400, 4)), rng.random((400, 4), "f4")
    runs = [
        expert_parallel_dispatch(tokens, routing, W, 0, 1, topk_weights=weights) for _ in range(3)
    ]
    for a, b in itertools.pairwise(runs):
        np.testing.assert_array_equal(a, b)


@given(st.data(), st.sampled_from(["float32", "float64"]), st.booleans())
def test_rows_are_added_one_after_the_other(data, dtype, weighed):
    """In this order, each rounded: that is what makes the bits repeat."""
    n, m, d = (data.draw(st.integers(1, 9)) for _ in range(3))
    rows = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=m, max_size=m)))
    random = np.random.default_rng(data.draw(st.integers(0, 99)))
    out, y = random.standard_normal((n, d)).astype(dtype), random.standard_normal((m, 2 * d))
    weights = random.random(m).astype(dtype) if weighed else None
    y = y.astype(dtype)[:, ::2]
    want = out.copy()
    for i, row in enumerate(rows):
        want[row] += y[i] if weights is None else weights[i] * y[i]
    host_kernel.add_rows(out, rows, y, weights)
    np.testing.assert_array_equal(out, want)


def test_rows_are_never_added_to_a_copy():
    with pytest.raises(ValueError, match="copy"):
        host_kernel.add_rows(np.zeros((3, 4))[:, :2], np.arange(3), np.ones((3, 2)))
