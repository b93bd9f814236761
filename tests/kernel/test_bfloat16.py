"""Products of bfloat16 have the accuracy of float32, and what they cannot hold is float32."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import dask.array as da
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from dask_ep import Experts, MoELayer, Router, expert_parallel, expert_parallel_dispatch
from dask_ep.arrays import blas
from dask_ep.arrays.blas import bfloat16_library
from dask_ep.arrays.onednn_kernels import Packed
from dask_ep.errors import JobError
from dask_ep.experts.quantized import QuantizedSource, float8
from dask_ep.experts.stored_experts import held_as_stored
from dask_ep.jobs.backends import Threads
from dask_ep.jobs.build import open_inputs
from dask_ep.jobs.inspect import inspect_path
from dask_ep.jobs.job import load_job
from dask_ep.jobs.plan import plan
from dask_ep.jobs.run import run_job
from dask_ep.jobs.verify import ROUNDED_TOLERANCE, TOLERANCES, verify_job
from dask_ep.kernel import bfloat16, reference
from dask_ep.kernel.bfloat16 import (
    BFLOAT16,
    LARGEST,
    SMALLEST,
    SPLIT_ROWS,
    multiplied_by,
    multiply,
    narrowed,
    serves,
)
from dask_ep.kernel.dispatch import dispatch
from dask_ep.kernel.expert import laid_out
from dask_ep.laws.work import Work
from dask_ep.layers.checkpoint import load_moe_layer
from dask_ep.pricing.plan_text import figures_of
from dask_ep.storage.sources import open_source
from tests.checkpoints import FIXTURES, LAYER

bf16 = ml_dtypes.bfloat16

FLUSHED = 2.0**-126
"""CPUs take numbers below this for 0, and writes 0 for them."""


class Emulated:
    """What oneDNN does with bfloat16, in NumPy."""

    def __init__(self) -> None:
        self.products = 0

    def __str__(self) -> str:
        return "NumPy"

    def pack(self, w) -> None:
        return None

    def widened(self, w) -> np.ndarray:
        return w.astype(np.float32)

    def multiply(self, x, w, out, *, add=False) -> bool:
        assert x.dtype == w.dtype == BFLOAT16
        assert out.dtype == np.float32
        self.products += 1
        a, b = (np.array(m, np.float32) for m in (x, w))
        for m in (a, b):
            m[np.abs(m) < FLUSHED] = 0
        with np.errstate(all="ignore"):
            y = a @ b + (out if add else 0)
        y[np.abs(y) < FLUSHED] = 0
        out[...] = y
        return True


@pytest.fixture(autouse=True, params=["with AMX", "without AMX"])
def splitting_pays(request, monkeypatch):
    """Whether float32 rows are split, however many they are."""
    pays = request.param == "with AMX"
    monkeypatch.setattr(blas, "splitting_pays", lambda: pays)
    return pays


@pytest.fixture(
    params=[
        "emulated",
        pytest.param(
            "real",
            marks=pytest.mark.skipif(
                bfloat16_library() is None, reason="no oneDNN, or a CPU without 16-bit products"
            ),
        ),
    ]
)
def library(request, monkeypatch):
    """Products of bfloat16 as in NumPy, and as this machine has them."""
    used = Emulated() if request.param == "emulated" else bfloat16_library()
    monkeypatch.setattr(blas, "bfloat16_library", lambda: used)
    return used


def some(*shape: int, seed: int = 0, dtype=np.float32) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32).astype(dtype)


def error(y: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(y.astype("f8") - want).max() / np.abs(want).max())


# --- one product ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float16, bf16])
@pytest.mark.parametrize("by_columns", [False, True])
def test_a_product_has_the_accuracy_of_float32(dtype, by_columns, library):
    w = some(300, 200, dtype=bf16)
    w = np.asfortranarray(w) if by_columns else w
    x = some(100, 300, seed=1).astype(dtype)
    x = x if dtype == bf16 else x.astype(np.float32)
    want = x.astype("f8") @ w.astype("f8")
    y = multiply(x, w)
    assert y.dtype == np.float32
    assert error(y, want) < max(1.2 * error(x.astype("f4") @ w.astype("f4"), want), 3e-7)
    rounded = multiply(x, w, precision="bfloat16")
    assert (error(rounded, want) > 1e-4) == (dtype != bf16)
    assert error(rounded, want) < 5e-3


def test_zero_parts_are_not_multiplied(monkeypatch):
    emulated = Emulated()
    monkeypatch.setattr(blas, "bfloat16_library", lambda: emulated)
    w, counts = some(8, 8, dtype=bf16), []
    for x in (some(8, 8, dtype=bf16), some(8, 8, dtype="f2"), some(8, 8)):
        emulated.products = 0
        multiply(x.astype("f4"), w)
        counts.append(emulated.products)
    assert counts == [1, 2, 3]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", [np.float32, bf16])
@pytest.mark.parametrize(
    "values",
    [
        [np.inf, 1.0],
        [-np.inf, 1.0],
        [np.inf, -np.inf],
        [np.nan, 1.0],
        [3.4e38, 1.0],
        [-3.4e38, 0.0],
        [1e-40, 0.0],
        [2e-38, -1e-45],
        [0.0, 0.0],
    ],
    ids=str,
)
def test_a_row_that_cannot_be_split_is_multiplied_in_float32(values, dtype, precision, library):
    w = np.array([[1.0, 0.5], [0.25, -1.0]], bf16)
    with np.errstate(over="ignore"):
        x = np.array([[1.0, 2.0], values, [3.0, 4.0]], np.float32).astype(dtype)
    with np.errstate(all="ignore"):
        want = x.astype("f4") @ w.astype("f4")
        y = multiply(x, w, precision=precision)
    np.testing.assert_array_equal(y, want)


@pytest.mark.parametrize("value", [0.9 * SMALLEST, 1.1 * LARGEST, np.inf, np.nan])
def test_a_matrix_that_cannot_be_is_not_multiplied_in_16_bits(value, library):
    assert serves(np.zeros((2, 2), bf16))
    assert serves(some(2, 2, dtype=bf16))
    assert not serves(some(2, 2))
    assert not serves(np.full((2, 2), value, bf16))
    assert not serves(np.full((2, 2), -value, bf16))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", [np.float32, bf16])
@pytest.mark.parametrize("rows", [1, SPLIT_ROWS - 1, SPLIT_ROWS, 200])
def test_packed_matrices_give_the_same_product(rows, dtype, precision, library):
    w, x = some(128, 192, seed=1, dtype=bf16), some(rows, 128).astype(dtype)
    packed = laid_out(w)
    assert isinstance(packed, Packed) != isinstance(library, Emulated)
    y, plain = (multiply(x, m, precision=precision) for m in (packed, w))
    assert error(y, plain.astype("f8")) < 1e-6
    wide = w.astype("f4")
    assert laid_out(wide) is wide, "as it was"


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_matrices_that_lie_in_any_way(data):
    m, d, f = (data.draw(st.integers(0, 9)) for _ in range(3))
    seed, library = data.draw(st.integers(0, 99)), bfloat16_library() or Emulated()
    x = some(m, 2 * d, seed=seed, dtype=data.draw(st.sampled_from([bf16, np.float32])))
    w, whole = some(d, f, seed=seed + 1, dtype=bf16), np.full((m, f + 2), np.nan, "f4")
    ways = [lambda a: a[:, ::2], lambda a: a[:, d:], lambda a: a[::-1, :d]]
    x = data.draw(st.sampled_from(ways))(x)
    w = data.draw(st.sampled_from([lambda a: a, np.asfortranarray, lambda a: a[::-1, ::-1]]))(w)
    want = x.astype("f8") @ w.astype("f8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blas, "bfloat16_library", lambda: library)
        patch.setattr(bfloat16, "SPLIT_ROWS", data.draw(st.sampled_from([1, 1 << 20])))
        out = whole[:, 1:-1]
        assert multiply(x, w, out) is out
    np.testing.assert_allclose(out, want, rtol=0, atol=1e-5)
    assert np.isnan(whole[:, [0, -1]]).all()  # nothing next to it was touched


def test_weights_are_narrowed_where_they_lose_nothing(library):
    exact = some(70, 1000, dtype=bf16).astype("f4")
    assert narrowed(exact).dtype == bf16
    np.testing.assert_array_equal(narrowed(exact).astype("f4"), exact)
    exact[-1, -1] = np.float32(1 / 3)
    assert narrowed(exact) is exact


def test_nothing_is_narrowed_without_the_library(float32_products):
    exact = np.ones((2, 2), np.float32)
    assert narrowed(exact) is exact
    assert not serves(exact.astype(bf16))


@pytest.mark.parametrize(
    ("flags", "taken", "pays"),
    [
        ("vendor_id\t: GenuineIntel\nflags\t: amx_bf16 amx_tile", True, True),
        ("vendor_id\t: GenuineIntel\nflags\t: avx512_bf16 amx_bf16_not", True, False),
        ("vendor_id\t: AuthenticAMD\nflags\t: avx512_bf16", True, False),
        ("vendor_id\t: AuthenticAMD\nflags\t: avx512f", False, False),
        ("", False, False),
    ],
)
def test_the_library_is_chosen_by_flags_of_the_cpu(flags, taken, pays, monkeypatch):
    monkeypatch.undo()  # what says whether splitting pays
    monkeypatch.setattr(blas, "_cpuinfo", lambda: flags)
    monkeypatch.setattr(blas, "installed_onednn", lambda: "oneDNN")
    assert (bfloat16_library.__wrapped__() == "oneDNN") == taken
    assert blas.splitting_pays.__wrapped__() == pays


# --- layers of all kinds -------------------------------------------------------------------------


class Case(NamedTuple):
    """A layer of one kind, in bfloat16, and what a row of it is in float64."""

    experts: Experts
    functions: list
    tokens: np.ndarray
    routing: np.ndarray
    topk_weights: np.ndarray


def a_layer(kind: str, seed: int, massive: bool = False) -> Case:
    """Four experts; with massive activations some columns of rows are thousands of times larger."""
    rng = np.random.default_rng(seed)
    n, d, f, E, k = 48, int(rng.integers(8, 80)), int(rng.integers(8, 120)), 4, 2

    def weight(*shape):
        w = rng.standard_normal((E, *shape), np.float32) * shape[0] ** -0.5
        return w.astype(bf16)

    tokens = rng.standard_normal((n, d), np.float32)
    if massive:
        tokens[:, rng.integers(d, size=2)] *= 3000
        tokens[rng.integers(n, size=2)] *= 100
    routing = np.argsort(rng.random((n, E)), axis=1)[:, :k]
    arrays = {
        "linear": {"w": weight(d, f)},
        "mlp": {"up": weight(d, f), "down": weight(f, d)},
        "gated": {"gate": weight(d, f), "up": weight(d, f), "down": weight(f, d)},
        "gated_fused": {"gate_up": weight(d, 2 * f), "down": weight(f, d)},
    }[kind]
    if seed % 2 and kind != "linear":
        arrays["down_bias"] = rng.standard_normal((E, d), np.float32)
    options = {}
    if kind == "gated_fused":
        arrays["output_scale"] = 1 + 0.3 * rng.standard_normal((E, d), np.float32)
        options = {"output_norm_eps": 1e-3}
    each = [{name: a[e].astype("f8") for name, a in arrays.items()} for e in range(E)]
    return Case(
        getattr(Experts, kind)(**arrays, **options),
        [plain(kind, one, **options) for one in each],
        tokens.astype(bf16),
        routing,
        rng.random((n, k), np.float32),
    )


def plain(kind: str, arrays: dict[str, np.ndarray], **options: float):
    if kind == "gated_fused":
        arrays["gate"], arrays["up"] = np.split(arrays.pop("gate_up"), 2, axis=1)
    if kind == "linear":
        return reference.linear(arrays["w"])
    return getattr(reference, kind.removesuffix("_fused"))(**arrays, **options)


def computed(case: Case, tokens: np.ndarray | None = None, **options: str) -> np.ndarray:
    """The layer's float32 sums, before they are rounded to the tokens' dtype."""
    experts = case.experts.with_precision(**options) if options else case.experts
    tokens = case.tokens if tokens is None else tokens
    routing, weights = case.routing, case.topk_weights
    return dispatch(tokens, routing, weights, experts.load(), 0, 1, dtype=np.dtype("f4"))


def exact(case: Case) -> np.ndarray:
    return reference.expert_parallel_dispatch(
        case.tokens.astype("f8"),
        case.routing,
        case.functions,
        0,
        1,
        case.topk_weights.astype("f8"),
        d_out=case.experts.d_out,
    )


@pytest.mark.parametrize("massive", [False, True])
@pytest.mark.parametrize("kind", ["linear", "mlp", "gated", "gated_fused"])
def test_layers_have_the_accuracy_of_float32(kind, massive, library, monkeypatch):
    """On average over layers: no more than 1.2 times the error of float32 products."""
    errors = []
    for seed in range(12):
        case = a_layer(kind, seed, massive)
        want, split = exact(case), computed(case)
        with monkeypatch.context() as patch:
            patch.setattr(blas, "bfloat16_library", lambda: None)
            errors.append((error(split, want), error(computed(case), want)))
    split, wide = np.array(errors).mean(axis=0)
    assert split <= 1.2 * wide
    assert max(max(pair) for pair in errors) < 1e-6


@pytest.mark.parametrize("kind", ["mlp", "gated", "gated_fused"])
def test_rounded_layers_are_those_of_a_model_in_bfloat16(kind, library):
    case = a_layer(kind, seed=2)
    assert 1e-4 < error(computed(case, precision="bfloat16"), exact(case)) < 1e-2


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_tokens_that_are_not_bfloat16_are_split(dtype, library):
    case = a_layer("gated", seed=4)
    tokens = some(*case.tokens.shape, seed=5).astype(dtype)
    case = case._replace(tokens=tokens)
    assert error(computed(case), exact(case)) < 1e-6


def test_float64_tokens_are_computed_in_float64(library):
    case = a_layer("gated", seed=4)
    tokens = some(*case.tokens.shape, seed=5).astype("f8")
    local = case.experts.load(dtype=np.float64)
    y = expert_parallel_dispatch(tokens, case.routing, local, 0, 1, topk_weights=case.topk_weights)
    assert error(y, exact(case._replace(tokens=tokens))) < 1e-14


def test_weights_on_rows_before_experts_are_float32_products(library):
    """As in Llama 4: the row times its weight is no bfloat16 number."""
    arrays = [some(4, 16, 24, dtype=bf16), some(4, 16, 24, seed=1, dtype=bf16)]
    experts = Experts.gated(
        *arrays, some(4, 24, 16, seed=2, dtype=bf16), apply_router_weight_on_input=True
    )
    tokens, routing = some(40, 16, seed=3, dtype=bf16), np.arange(40) % 4
    weights = np.random.default_rng(4).random(40, np.float32)
    y = expert_parallel_dispatch(tokens, routing, experts.load(), 0, 1, topk_weights=weights)
    weighed = (tokens.astype("f4") * weights[:, None]).astype("f8")
    gate, up, down = (experts.weights[name].parts.array for name in ("gate", "up", "down"))
    for row in range(40):
        e = routing[row]
        one = reference.gated(*(a[e].astype("f8") for a in (gate, up, down)))(weighed[row])
        np.testing.assert_allclose(y[row].astype("f8"), one, rtol=2**-7, atol=1e-3)


WIDE = (4, 64, 128)
"""Experts whose matrices can be laid out anew."""


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "options",
    [{}, {"limit": 1.0}, {"up_offset": 1.0, "alpha": 1.7}, {"alpha": 1.7}, {"activation": "gelu"}],
    ids=str,
)
def test_gated_experts_give_the_same_in_one_go_and_in_steps(
    options, precision, library, monkeypatch
):
    gate, up = (some(*WIDE, seed=seed, dtype=bf16) for seed in (1, 2))
    experts = Experts.gated(gate, up, some(4, 128, 64, seed=3, dtype=bf16), **options)
    (expert,) = experts.with_precision(precision).load([0])
    rows = some(100, 64, dtype=bf16)
    rows[3], rows[5, 1], rows[7] = 0, np.inf, 1e-30
    ways = []
    for some_rows in (rows, rows[10:]):
        with np.errstate(all="ignore"):
            y = expert(some_rows)
            monkeypatch.setattr(expert, "_in_one_go", lambda rows: None)
            ways.append((y, expert(some_rows)))
            monkeypatch.undo()
            monkeypatch.setattr(blas, "bfloat16_library", lambda: library)
    (y, steps), (without, steps_without) = ways
    np.testing.assert_array_equal(y, steps, "rows that float32 multiplies go in steps")
    tolerance = 1e-6 if precision == "float32" else 1e-2
    assert error(without, steps_without.astype("f8")) < tolerance


def test_bare_matrices_are_multiplied_in_16_bits(library):
    tokens, W = some(40, 16, dtype=bf16), some(2, 16, 24, seed=1, dtype=bf16)
    y = expert_parallel_dispatch(tokens.astype("f4"), np.arange(40) % 2, list(W), 0, 1)
    for e in range(2):
        want = tokens[e::2].astype("f8") @ W[e].astype("f8")
        assert error(y[e::2], want) < 1e-6


def test_experts_stay_16_bits_in_memory(library):
    case = a_layer("gated", seed=2)
    local, numbers = case.experts.load(), case.experts.parameters * 4
    assert local.nbytes == 2 * numbers
    assert case.experts.load(dtype=np.float64).nbytes == 8 * numbers
    assert local[0]._first.W.dtype == bf16
    assert case.experts.loaded_bytes(np.dtype("f4"), on_device=True) == numbers / 2


def test_biases_are_float32_in_memory(library):
    experts = Experts.linear(some(2, 8, 8, dtype=bf16), bias=some(2, 8, dtype=bf16))
    assert experts.load().nbytes == 2 * (2 * 8 * 8 + 4 * 8)


def test_experts_are_float32_in_memory_without_the_library(float32_products):
    case = a_layer("gated", seed=2)
    assert case.experts.load().nbytes == 16 * case.experts.parameters
    assert case.experts.load()[0]._first.W.dtype == np.float32


def test_experts_held_as_stored_give_the_same_bits(library):
    case = a_layer("gated_fused", seed=1)
    stored = case._replace(experts=held_as_stored(case.experts))
    np.testing.assert_array_equal(computed(case), computed(stored))
    rounded = computed(stored, precision="bfloat16")
    np.testing.assert_array_equal(rounded, computed(case, precision="bfloat16"))


def test_a_graph_takes_the_precision(library):
    case = a_layer("gated", seed=2)
    tokens, routing, weights = map(
        da.from_array, (case.tokens.astype("f4"), case.routing, case.topk_weights)
    )
    errors, names = [], set()
    for precision in (None, "float32", "bfloat16"):
        y = expert_parallel(
            tokens, routing, case.experts, topk_weights=weights, precision=precision
        )
        errors.append(error(y.compute(scheduler="sync"), exact(case)))
        names.add(y.name)
    assert errors[0] == errors[1] < 1e-6
    assert 1e-4 < errors[2] < 1e-2
    assert len(names) == 2


def test_a_precision_that_is_unknown_is_refused():
    with pytest.raises(ValueError, match="precision must be one of float32, bfloat16, not 'half'"):
        a_layer("linear", 0).experts.with_precision("half")
    with pytest.raises(ValueError, match="experts that are functions, which do their own products"):
        Experts.callables([lambda x: x]).with_precision("bfloat16")


@pytest.mark.parametrize(("case", "itemsize"), [("gpt_oss_mxfp4", 2), ("deepseek_v3_fp8", 4)])
def test_what_is_decoded_to_bfloat16_exactly_stays_so(case, itemsize, library, monkeypatch):
    """Powers of two for scales; those of the other checkpoint are any float32 numbers."""
    experts = load_moe_layer(FIXTURES / case, LAYER).experts
    local, matrices = experts.load([1]), [w for w in experts.weights.values() if len(w.shape) == 3]
    small = sum(np.prod(w.shape[1:]) for w in experts.weights.values() if len(w.shape) == 2)
    numbers = sum(np.prod(w.shape[1:]) for w in matrices)
    assert local.nbytes == itemsize * numbers + 4 * small
    rows = some(9, experts.d, seed=3)
    narrow = local[0](rows)
    monkeypatch.setattr(blas, "bfloat16_library", lambda: None)
    assert error(narrow, experts.load([1])[0](rows).astype("f8")) < 1e-6


@pytest.mark.parametrize("scales", [np.float32, ml_dtypes.float8_e8m0fnu])
def test_8_bits_with_powers_of_two_become_bfloat16(scales, library):
    values = some(2, 8, 12, dtype=ml_dtypes.float8_e4m3fn)
    powers = np.array([[[2.0], [0.25]]] * 2).astype(scales)
    source = float8(open_source(values), open_source(powers), (4, 12))
    experts = Experts.linear(source)
    assert experts.load()[0].W.dtype == bf16
    known = scales != np.float32  # the plan reads no scales
    assert experts.loaded_bytes(np.dtype("f4")) == 8 * 12 * (2 if known else 4)


def test_they_are_not_decoded_to_float32_first(library, monkeypatch):
    values = some(2, 8, 12, dtype=ml_dtypes.float8_e4m3fn)
    powers = np.full((2, 2, 1), 0.25).astype(ml_dtypes.float8_e8m0fnu)
    experts = Experts.linear(float8(open_source(values), open_source(powers), (4, 12)))
    monkeypatch.setattr(QuantizedSource, "read", None)
    for e in range(2):
        want = values[e].astype("f4") * np.float32(0.25)
        np.testing.assert_array_equal(experts.load([e])[0].W.astype("f4"), want)


# --- jobs ----------------------------------------------------------------------------------------


@pytest.fixture
def job(tmp_path):
    """A job of float32 tokens and bfloat16 experts."""
    E, d, f = 4, 32, 48
    np.save(tmp_path / "x.npy", some(200, d))
    np.save(tmp_path / "routing.npy", np.arange(400).reshape(200, 2) % E)
    weights = {"gate": some(E, d, f), "up": some(E, d, f, seed=1), "down": some(E, f, d, seed=2)}
    save_file({n: (w * 0.2).astype(bf16) for n, w in weights.items()}, tmp_path / "w.safetensors")
    experts = {n: f"{tmp_path}/w.safetensors::{n}" for n in weights}
    return load_job(
        tokens=str(tmp_path / "x.npy"),
        routing=str(tmp_path / "routing.npy"),
        experts={"kind": "gated", **experts},
        out=str(tmp_path / "y.npy"),
    )


def test_a_job_tells_its_precision_and_is_verified_by_it(job, library):
    errors = {}
    for precision in ("float32", "bfloat16"):
        done = run_job(replace(job, precision=precision), Threads(1), overwrite=True)
        assert done.multiplied_by == multiplied_by(np.dtype("f4"), True, precision)
        found = verify_job(job)
        assert found.good
        errors[precision] = found.relative_error
        tolerated = {"float32": TOLERANCES["float32"], "bfloat16": ROUNDED_TOLERANCE}
        assert found.tolerance == tolerated[precision]
    assert errors["float32"] < 1e-6 < 1e-4 < errors["bfloat16"]


def test_a_job_in_float64_is_not_verified_as_if_it_were_rounded(job):
    np.save(job.tokens, np.load(job.tokens).astype("f8"))
    job = replace(job, precision="bfloat16")
    run_job(job, Threads(1))
    found = verify_job(job)
    assert (found.good, found.tolerance) == (True, TOLERANCES["float64"])


def test_a_job_says_what_multiplies(job, library, float32_products):
    assert run_job(job, Threads(1)).multiplied_by == blas.multiplies_by()


def test_a_rounded_run_is_not_resumed_without_rounding(job, library):
    run_job(replace(job, precision="bfloat16"), Threads(1))
    with pytest.raises(ValueError, match=r"options\.precision was bfloat16, is absent"):
        run_job(job, Threads(1), resume=True)


def test_a_job_with_an_unknown_precision_is_refused():
    with pytest.raises(JobError, match="precision must be one of float32, bfloat16, but is 'half'"):
        load_job(tokens="x", routing="r", experts="w", out="y.npy", precision="half")


@pytest.mark.parametrize(
    ("dtype", "is_bfloat16", "precision", "words"),
    [
        ("float32", True, "float32", " in 16 bits, as exact as float32"),
        ("float32", True, "bfloat16", " in 16 bits, rounded"),
        ("float32", False, "float32", ""),
        ("float64", True, "float32", ""),
    ],
)
def test_what_multiplies_is_named(dtype, is_bfloat16, precision, words, library):
    said = multiplied_by(np.dtype(dtype), is_bfloat16, precision)
    assert said == (f"{library}{words}" if words else blas.multiplies_by())


@pytest.mark.slow
def test_plan_and_inspect_say_what_multiplies(job, library, tmp_path):
    inputs = open_inputs(job)
    priced = plan(da.from_array(some(200, 32)), da.from_array(np.arange(200) % 4), inputs.experts)
    words = multiplied_by(np.dtype("f4"), True)
    assert dict(figures_of(priced))["operations"].endswith(f"FLOP, by {words} here")
    keys = ("tokens", "routing", "out")
    table = ", ".join(f'{name} = "{value}"' for name, value in job.experts.items())
    text = "".join(f'{key} = "{getattr(job, key)}"\n' for key in keys)
    (tmp_path / "job.toml").write_text(f"{text}experts = {{{table}}}\n")
    facts = dict(inspect_path(tmp_path / "job.toml")[0].facts)
    assert facts["products here"] == f"by {words}"
    assert facts["products on GPUs"] == "by cuBLAS in 16 bits, as exact as float32"


def test_a_layer_takes_the_precision(library):
    case = a_layer("gated", seed=2)
    d = case.experts.d
    shared = Experts.gated(*(w.parts.array[:1] for w in list(case.experts.weights.values())[:3]))
    layer = MoELayer(Router(4, k=2), case.experts, some(4, d), shared=shared)
    hidden = da.from_array(some(20, d, seed=9))
    exactly, rounded = (layer(hidden, precision=p).compute() for p in (None, "bfloat16"))
    assert 1e-4 < error(rounded, exactly.astype("f8")) < 2e-2
    assert layer.with_precision("bfloat16").shared.precision == "bfloat16"
    assert layer.shared.precision == "float32"


def test_the_law_counts_the_largest_matrix_that_a_thread_copies(library, splitting_pays):
    """Of the routed experts, or of those that all rows share: for a product, or to lay it out."""

    def gated(E, hidden):
        return Experts.gated(
            *(some(E, 16, hidden, dtype=bf16) for _ in range(2)), some(E, hidden, 16, dtype=bf16)
        )

    tokens = some(20, 16, dtype=bf16)
    for routed, shared in ((64, 32), (32, 64)):
        layer = MoELayer(Router(4, k=2), gated(4, routed), some(4, 16), shared=gated(1, shared))
        work = Work.of(tokens, layer.experts, layer, rows=20, slots=2)
        assert work.copied == (2 if splitting_pays else 4) * 16 * 64
        rounded = layer.with_precision("bfloat16")
        assert Work.of(tokens, rounded.experts, rounded, rows=20, slots=2).copied == 2 * 16 * 64
