"""Products of bfloat16 on a device have the accuracy of float32, unless rounding is asked for.

The arithmetic is shown by cuBLAS's calls and the CUDA kernels as `device_kernels` carries them out.
A card adds up in an order and with a rounding of its own: see `test_gpu.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from dask_ep import Experts, expert_parallel_dispatch
from dask_ep.arrays import gemms
from dask_ep.arrays.gemms import TERMS
from dask_ep.experts.stored_experts import held_as_stored
from dask_ep.experts.weights import Weight
from dask_ep.kernel import device_kernel, operands, reference
from dask_ep.kernel.dispatch import dispatch
from dask_ep.kernel.expert import Linear
from tests.device_double import namespace as xp
from tests.device_double import on_device
from tests.device_kernels import COMPILER, Cublas, RawKernel, kernels
from tests.kernel.test_bfloat16 import Case, a_layer, error, exact, some

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler"),
    pytest.mark.slow,  # a compiler is a process
]

bf16 = np.dtype(ml_dtypes.bfloat16)
KINDS = ["linear", "mlp", "gated", "gated_fused"]


@pytest.fixture
def cublas() -> Iterator[Cublas]:
    with kernels() as cublas:
        yield cublas


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each kernel was launched."""
    counts: Counter[str] = Counter()
    launch = RawKernel.__call__

    def note(self: RawKernel, *arguments: Any) -> None:
        counts[self._name] += 1
        launch(self, *arguments)

    monkeypatch.setattr(RawKernel, "__call__", note)
    return counts


def every_call(cublas: Cublas) -> list[Any]:
    return [*cublas.calls, *(call for batch in cublas.batches for call in batch)]


def computed(case: Case, precision: str = "float32", dtype: Any = bf16) -> np.ndarray:
    """The layer's float32 sums on a device, before they are rounded to the tokens' dtype."""
    loaded = np.float32 if precision == "float32" else case.tokens.dtype
    local = case.experts.with_precision(precision).load(xp=xp, dtype=np.dtype(loaded))
    there = [on_device(a) for a in (case.tokens.astype(dtype), case.routing, case.topk_weights)]
    return dispatch(*there, local, 0, 1, dtype=np.dtype("f4")).get()


def in_float32(case: Case) -> np.ndarray:
    """The same by products of float32 on the host."""
    weights = {
        n: Weight.of(np.stack(w.read(np.dtype("f8"))).astype("f4"), n)
        for n, w in case.experts.weights.items()
    }
    wide = Experts(case.experts.kind, weights, case.experts.options)
    tokens, W = case.tokens.astype("f4"), wide.load(xp=xp)
    there = map(on_device, (tokens, case.routing, case.topk_weights))
    return dispatch(*there, W, 0, 1, dtype=np.dtype("f4")).get()


@pytest.mark.parametrize("to_nearest", [True, False])
@pytest.mark.parametrize("massive", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_layers_have_the_accuracy_of_float32(cublas, kind, massive, to_nearest):
    """Two hundred layers in all; on average no more than 1.2 times the error of float32, and half
    as much more where sums are rounded towards zero."""
    errors, cublas.to_nearest = [], to_nearest
    for seed in range(25):
        case = a_layer(kind, seed, massive)
        want = exact(case)
        errors.append((error(computed(case), want), error(in_float32(case), want)))
    split, wide = np.array(errors).mean(axis=0)
    assert split <= (1.2 if to_nearest else 1.7) * wide
    assert np.max(errors) < 1e-6


@pytest.mark.parametrize("kind", ["mlp", "gated", "gated_fused"])
def test_rounded_layers_are_those_of_a_model_in_bfloat16(cublas, kind):
    case = a_layer(kind, seed=2)
    assert 1e-4 < error(computed(case, "bfloat16"), exact(case)) < 1e-2


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (("bfloat16", True, "float32"), "cuBLAS in 16 bits, as exact as float32"),
        (("float32", True, "bfloat16"), "cuBLAS in 16 bits, rounded"),
        (("float16", False, "bfloat16"), "cuBLAS in 16 bits, rounded"),
        (("float16", False, "float32"), "cuBLAS"),
        (("float32", False, "bfloat16", True), "cuBLAS, as TF32"),
        (("float64", True, "bfloat16", True), "cuBLAS"),
    ],
)
def test_what_multiplies_is_named(asked, words):
    dtype, *how = asked
    assert operands.multiplied_on_gpus(np.dtype(dtype), *how) == words


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_tokens_that_are_not_bfloat16_are_split_or_rounded(cublas, dtype):
    case = a_layer("gated", seed=4)
    case = case._replace(tokens=some(*case.tokens.shape, seed=5).astype(dtype))
    assert error(computed(case, dtype=dtype), exact(case)) < 1e-6
    assert 1e-4 < error(computed(case, "bfloat16", dtype=dtype), exact(case)) < 1e-2


@pytest.mark.parametrize("held", [np.float16, np.float32])
def test_weights_that_are_not_bfloat16_are_multiplied_in_float32(cublas, held):
    case = a_layer("gated", seed=4)
    arrays = [
        some(4, *w.shape[1:], seed=e).astype(held)
        for e, w in enumerate(case.experts.weights.values())
    ]
    case = case._replace(
        experts=Experts.gated(*arrays),
        functions=[reference.gated(*(a[e].astype("f8") for a in arrays)) for e in range(4)],
    )
    assert error(computed(case), exact(case)) < 1e-6
    modes = {(call.mode, call.kind) for call in every_call(cublas)}
    assert modes == {(Cublas.CUBLAS_COMPUTE_32F, np.float32)}


def test_weights_on_rows_before_experts_are_not_rounded(cublas):
    """As in Llama 4: the row times its weight is no bfloat16 number."""
    arrays = [
        some(4, *shape, seed=seed, dtype=bf16)
        for seed, shape in enumerate([(16, 24)] * 2 + [(24, 16)])
    ]
    experts = Experts.gated(*arrays, apply_router_weight_on_input=True)
    tokens, weights = (
        some(40, 16, seed=3, dtype=bf16),
        np.random.default_rng(4).random(40, np.float32),
    )
    there = on_device(tokens), on_device(np.arange(40) % 4), on_device(weights)
    got = dispatch(*there, experts.load(xp=xp), 0, 1, dtype=np.dtype("f4")).get()
    plain = [reference.gated(*(a[e].astype("f8") for a in arrays)) for e in range(4)]
    rows = tokens.astype("f8") * weights[:, None].astype("f8")
    assert error(got, np.stack([plain[i % 4](row) for i, row in enumerate(rows)])) < 1e-6


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "values",
    [[np.inf, 1], [-np.inf, 1], [np.inf, -np.inf], [np.nan, 1], [3.4e38, 1], [-3.4e38, 0],
     [1e-38, 0], [2e-38, -1e-40], [0, 0]],
    ids=str,
)  # fmt: skip
def test_rows_that_bfloat16_cannot_say_are_what_they_are_in_float32(values, compiled):
    """All but what is smaller than 2**-133, the smallest bfloat16."""
    w, smallest = np.array([[1.0, 0.5], [0.25, -1.0]], bf16), 2.0**-133
    x = np.array([[1.0, 2.0], values, [3.0, 4.0]], np.float32)
    x[1][np.isnan(x[1])] = np.uint32(0x7F800001).view(np.float32)  # NaN in the last bit alone
    with np.errstate(all="ignore"):
        want = x @ w.astype("f4")
    if not compiled:
        got = Linear(on_device(w))(on_device(x)).get()
    else:
        with kernels():
            got = Linear(on_device(w))(on_device(x)).get()
    np.testing.assert_allclose(got, want, rtol=0, atol=2 * smallest)


@pytest.mark.parametrize("compiled", [False, True])
def test_parts_add_up_to_every_number_exactly(compiled):
    """Of either sign, ordinary and subnormal, up to the largest."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 2**32, (500, 8), np.uint32).view(np.float32)
    x[~np.isfinite(x)] = np.finfo("f4").max
    out = xp.empty((3, *x.shape), dtype=bf16)
    if compiled:
        with kernels():
            device_kernel._weigh(on_device(x), None, 1, None, out)
    else:
        operands.write(on_device(x), out)
    parts = out.get().astype("f8")
    left = x - parts.sum(axis=0)
    assert (left[np.abs(x) >= 2.0**-109] == 0).all()
    assert np.abs(left).max() < 2.0**-133
    assert (np.abs(parts[1:]) <= np.abs(parts[:-1]) * 2.0**-7 + 2.0**-133).all()


@pytest.mark.parametrize("terms", [700, 2100])
def test_long_sums_are_as_exact_as_those_of_float32(cublas, monkeypatch, terms):
    """Although tensor cores round towards zero; which a product that rounds anyway may let them."""
    x, w = some(32, terms, dtype=bf16), some(terms, 32, seed=1, dtype=bf16)
    want = x.astype("f8") @ w.astype("f8")
    one = Linear(on_device(w))
    assert error(one(on_device(x)).get(), want) < 1e-6
    assert len(cublas.calls) == -(-terms // TERMS)
    assert error(one(on_device(x.astype("f4"))).get(), want) < 1e-6
    assert len(cublas.calls) == 2 * -(-terms // TERMS) + 2, "two parts are small enough"
    cublas.calls.clear()
    rounded = Linear(on_device(w), "bfloat16")(on_device(x)).get()
    assert len(cublas.calls) == 1
    assert error(rounded, want) > 1e-6


@pytest.mark.parametrize(
    ("dtype", "precision", "parts"),
    [(bf16, "float32", (1, 3)), (bf16, "bfloat16", (1, 1)), ("f4", "float32", (3, 3)),
     ("f4", "bfloat16", (1, 1))],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("padded", [False, True])
def test_a_chunk_launches_no_more_than_the_law_says(
    cublas, launched, monkeypatch, dtype, precision, parts, padded
):
    """See `device_kernel`: of products for each expert, or for all where they have as many rows,
    one for each part, and for each `TERMS` of the largest; one pass to gather the rows in parts,
    one to activate into parts, and two to add up."""
    if not padded:
        monkeypatch.setattr(device_kernel, "PADDED_ROWS", (0, 0))
    case = a_layer("gated_fused", 2)
    width, hidden = case.experts.d, case.experts.hidden
    monkeypatch.setattr(gemms, "TERMS", 16)
    computed(case, precision, dtype)
    rows = "gather" if dtype == bf16 else "weigh"
    assert launched == dict.fromkeys(["sort_keys", rows, "gate", "sort_rows", "combine"], 1)
    each = every_call(cublas)
    assert {call.kind for call in each} == {bf16.type}
    wanted = sum(parts)
    if precision == "float32":
        wanted += -(-width // 16) - 1 + -(-hidden // 16) - 1
    calls = [len(cublas.batches)] if padded else [len(cublas.calls)]
    assert calls == [wanted if padded else 4 * wanted]
    assert sum(call.add == 0 for call in each) == 4 * 2, "the others add in place"


def test_parts_are_added_by_the_stream_that_multiplied_the_first(cublas, monkeypatch):
    monkeypatch.setattr(device_kernel, "PADDED_ROWS", (0, 0))
    matrices = [on_device(some(6, 5, seed=e, dtype=bf16)) for e in range(7)]
    bounds = [(3 * e, 3 * e + 3 - (e == 2)) for e in range(7)]
    rows, out = on_device(some(21, 6)), xp.zeros((21, 5), dtype="f4")
    Linear.together(list(map(Linear, matrices)), rows, bounds, out)
    calls = iter(cublas.calls)
    for triple in zip(calls, calls, calls, strict=True):
        assert len({(call.handle, id(call.stream)) for call in triple}) == 1
        assert [call.add for call in triple] == [0, 1, 1]
    for matrix, (start, stop) in zip(matrices, bounds, strict=True):
        want = rows.get()[start:stop].astype("f8") @ matrix.get().astype("f8")
        assert error(out.get()[start:stop], want) < 1e-6


def test_experts_held_as_stored_and_gate_and_up_apart_are_as_exact(cublas):
    case = a_layer("gated", seed=2)
    want = exact(case)
    assert error(computed(case._replace(experts=held_as_stored(case.experts))), want) < 1e-6
    apart = Experts.gated(*(on_device(w.parts.array) for w in case.experts.weights.values()))
    assert error(computed(case._replace(experts=apart)), want) < 1e-6


def test_an_output_in_16_bits_is_rounded_once(cublas):
    case = a_layer("gated", seed=2)
    there = [on_device(a) for a in (case.tokens, case.routing, case.topk_weights)]
    got = expert_parallel_dispatch(
        *there[:2], case.experts.load(xp=xp), 0, 1, topk_weights=there[2]
    )
    assert got.get().tobytes() == computed(case).astype(bf16).tobytes()
