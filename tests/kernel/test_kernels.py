"""The kernels and products for a GPU do what array functions do, compiled for this machine."""

from __future__ import annotations

import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dask_ep import Experts, expert_parallel_dispatch
from dask_ep.arrays import device, gemms
from dask_ep.arrays.checks import computing_dtype
from dask_ep.arrays.device_streams import Lanes, pinned_empty
from dask_ep.kernel import cuda_kernels, device_kernel, reference
from dask_ep.kernel.expert import Linear
from dask_ep.kernel.pack import Combining, Packing
from dask_ep.pricing import device_probe
from tests.compare import assert_close
from tests.device_double import DeviceArray, Event, Stream, on_device, watch
from tests.device_double import namespace as xp
from tests.device_kernels import COMPILER, Cublas, kernels
from tests.strategies import Case, cases

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler"),
    pytest.mark.slow,  # a compiler is a process
]

DTYPES = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16]


@pytest.fixture
def cublas() -> Iterator[Cublas]:
    with kernels() as cublas:
        yield cublas


def normal(*shape: int, seed: int = 0, dtype: object = np.float32) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def test_numbers_of_16_bits_are_turned_into_others_as_numpy_does(cublas):
    """Every one of them, and float32 that lie between: ties, overflow, subnormal, NaN."""
    for dtype in (np.float16, ml_dtypes.bfloat16):
        every = np.arange(1 << 16, dtype=np.uint16).view(dtype)
        some = normal(1000) * 10.0 ** np.random.default_rng(0).uniform(-45, 38, 1000)
        with np.errstate(all="ignore"):
            upper = every.astype(np.float32)
            between = (upper[1:] + upper[:-1]) / 2
            wide = np.concatenate([upper, between, some.astype("f4")])
        kernel = cuda_kernels.kernels(xp)
        total = on_device(np.zeros((len(every), 1), np.float32))
        kernel.add_rows(total, xp.arange(len(every)), on_device(every[:, None]))
        np.testing.assert_array_equal(total.get()[:, 0], upper)

        ones = on_device(np.ones((len(wide), 1), dtype))
        out = xp.empty((len(wide), 1), dtype=dtype)
        kernel.weigh(ones, None, 1, on_device(wide), out)
        with np.errstate(all="ignore"):
            want = wide.astype(dtype)
        good = ~np.isnan(want.astype("f4"))
        assert out.get()[good, 0].tobytes() == want[good].tobytes()
        assert np.isnan(out.get()[~good, 0].astype("f4")).all()


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("dtype", [np.float64, ml_dtypes.bfloat16])
def test_activations(cublas, activation, dtype):
    up, gate, down = normal(2, 6, 4, dtype=dtype), normal(2, 6, 4, seed=1), normal(2, 4, 6)
    for experts in (
        Experts.gated(gate, up, down, activation=activation, limit=0.7, alpha=1.3, up_offset=1.0),
        Experts.gated(gate, up, down, activation=activation),
        Experts.mlp(up, down, activation=activation),
    ):
        rows = normal(9, 6, dtype=dtype)
        got = experts.load(xp=xp, dtype=dtype)[1](on_device(rows))
        wide = experts.load(dtype=np.float64)[1](rows.astype(np.float64))
        assert_close(got.get(), wide, 1e-14 if dtype == np.float64 else 2e-2)


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(
    case=cases(),
    form=st.sampled_from(["linear", "gated", "weights on input"]),
    padded=st.sampled_from([(0, 0), (64, 1024)]),
)
def test_the_kernel_by_kernels_is_the_kernel_by_array_functions(
    case: Case, form: str, padded: tuple[int, int]
):
    """The same numbers, and the same copies; with experts of equal rows, and as they come."""
    W, transposed = case.local_Ws(0), np.swapaxes(case.local_Ws(0), 1, 2)
    experts = Experts.linear(W)
    if form != "linear":
        on_input = form == "weights on input"
        experts = Experts.gated(
            W, W, transposed, activation="relu", apply_router_weight_on_input=on_input
        )
    tokens, routing, weights = map(on_device, (case.tokens, case.routing, case.topk_weights))
    dtype = computing_dtype(case.tokens.dtype)

    def run() -> tuple[np.ndarray, list[int]]:
        local = experts.load(xp=xp, dtype=dtype)
        with watch() as traffic:
            y = expert_parallel_dispatch(
                tokens, routing, local, 0, case.world_size, topk_weights=weights
            )
        assert type(y) is DeviceArray
        assert traffic.to_device == []
        return y.get().astype(np.float64) + 0.0, traffic.to_host

    with mock.patch.object(device_kernel, "PADDED_ROWS", (0, 0)):
        plain, copies = run()
    with kernels(), mock.patch.object(device_kernel, "PADDED_ROWS", padded):
        compiled, copies_compiled = run()
    assert copies == copies_compiled
    # Products of other shapes round in other places; all else is the same to the bit.
    tolerance = {8: 1e-13, 4: 1e-5, 2: case.tolerance}[case.tokens.dtype.itemsize]
    assert_close(compiled, plain, tolerance)


@given(case=cases(dtypes=[np.float32, np.float16]))
def test_packets_and_their_sums(case: Case):
    tokens, routing, weights = map(on_device, (case.tokens, case.routing, case.topk_weights))
    each = case.num_experts // case.world_size

    def run() -> bytes:
        packing = Packing(tokens, routing, weights, each, case.world_size)
        total = Combining(packing, tokens.shape[1], tokens.dtype)
        for rank in packing.ranks:
            total.add(rank, packing.packet([rank]).rows)
        return total.output().get().tobytes()

    plain = run()
    with kernels():
        assert run() == plain


@pytest.mark.parametrize("value", [4, -2, 2**63, 2**64 - 1])
def test_an_index_that_does_not_exist(cublas, value):
    dtype = np.int64 if abs(value) < 2**63 else np.uint64
    routing = on_device(np.array([0, value, 1], dtype))
    W = on_device(np.ones((2, 2, 2)))
    with pytest.raises(ValueError, match=rf"routing\[1\] is {value}"):
        expert_parallel_dispatch(on_device(np.ones((3, 2))), routing, W, 0, 2)


def test_a_weight_that_is_nan(cublas):
    weights = np.ones((3, 2), np.float32)
    weights[2, 1] = np.nan
    arrays = [on_device(a) for a in (np.ones((3, 2)), np.zeros((3, 2), int), np.ones((1, 2, 2)))]
    with pytest.raises(ValueError, match=r"not be NaN, but topk_weights\[2, 1\] is"):
        expert_parallel_dispatch(*arrays, 0, 1, topk_weights=on_device(weights))


# --- products ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("wider", [0, 3])
@pytest.mark.parametrize("wide", [False, True])
def test_products_of_cublas(cublas, dtype, transposed, wider, wide):
    """Rows may be part of wider ones; matrices may lie either way; 16 bits may give float32."""
    bounds = [(0, 4), (4, 4), (4, 11), (11, 12), (12, 14), (14, 20)]
    rows = on_device(normal(20, 5 + wider, dtype=dtype))[:, :5]
    matrices = [normal(5, 3, seed=e, dtype=dtype) for e in range(len(bounds))]
    there = [
        on_device(np.ascontiguousarray(m.T)).T if transposed else on_device(m) for m in matrices
    ]
    sums = computing_dtype(dtype)
    out = xp.empty((20, 3), dtype=sums if wide else dtype)
    device_kernel.products(rows, there, bounds, out)
    for matrix, (start, stop) in zip(matrices, bounds, strict=True):
        want = (rows.get()[start:stop].astype(sums) @ matrix.astype(sums)).astype(out.dtype)
        np.testing.assert_allclose(
            out.get()[start:stop].astype("f8"),
            want.astype("f8"),
            rtol=1e-2 if sums != out.dtype else 1e-5,
        )
    assert len(cublas.calls) == 5, "none for an expert without rows"


def test_a_bias_is_added_before_16_bits_are_rounded(cublas):
    """Also where rows come sorted by expert, and answers go straight to the output."""
    rng = np.random.default_rng(0)
    rows, w, bias = (  # whose sums are exact in float32
        (rng.integers(-99, 99, shape) / 8).astype("f2") for shape in ((8, 4), (2, 4, 3), (2, 3))
    )
    routing = np.repeat([0, 1], 4)
    local = Experts.linear(w, bias=bias).load(xp=xp, dtype=np.float16)
    got = expert_parallel_dispatch(on_device(rows), on_device(routing), local, 0, 1)
    want = np.einsum("nd,ndo->no", rows.astype("f4"), w[routing].astype("f4"))
    want += bias[routing].astype("f4")
    assert got.get().tobytes() == want.astype("f2").tobytes()


def test_a_card_without_bfloat16_multiplies_it_in_float32(monkeypatch):
    monkeypatch.setattr(xp.cuda.Device, "compute_capability", "75")
    rows, W = normal(9, 5, dtype=ml_dtypes.bfloat16), normal(1, 5, 3, dtype=ml_dtypes.bfloat16)
    for dtype in (ml_dtypes.bfloat16, np.float32):
        with kernels() as cublas:
            local = Experts.linear(W).load(xp=xp)
            there = on_device(rows.astype(dtype)), on_device(np.zeros(9, int))
            got = expert_parallel_dispatch(*there, local, 0, 1)
        assert not cublas.calls
        np.testing.assert_array_equal(
            got.get(), (rows.astype("f4") @ W[0].astype("f4")).astype(dtype)
        )


def test_no_sum_of_cublas_is_kept_in_16_bits(cublas):
    one = on_device(np.ones((1, 1), np.float16))
    device_kernel.products(one, [one], [(0, 1)], xp.empty((1, 1), dtype=np.float16))
    assert set(cublas.modes.values()) == {16}
    assert {call.handle for call in cublas.calls} <= set(cublas.modes)


def test_each_stream_of_cublas_has_a_separate_handle(cublas):
    bounds = [(2 * e, 2 * e + 2) for e in range(10)]
    rows, W = on_device(normal(20, 4)), [on_device(normal(4, 4))] * 10
    device_kernel.products(rows, W, bounds, xp.empty((20, 4), dtype="f4"))
    pairs = {(call.handle, id(call.stream)) for call in cublas.calls}
    assert len(pairs) == len({handle for handle, _ in pairs}) == len({s for _, s in pairs}) == 4
    assert xp.cuda.get_current_stream() is xp.cuda.Stream.null


@pytest.fixture
def waits(monkeypatch) -> list[tuple[Stream, Stream]]:
    """Which stream waited for which, in their order."""
    pairs, wait_event = [], Stream.wait_event

    def note(self: Stream, event: Event) -> None:
        pairs.append((self, event._stream))
        wait_event(self, event)

    monkeypatch.setattr(Stream, "wait_event", note)
    return pairs


def test_products_begin_when_their_rows_are_there_and_are_waited_for(cublas, waits):
    bounds = [(0, 5), (5, 6), (6, 20)]
    rows, W = on_device(normal(20, 4)), [on_device(normal(4, 4)) for _ in bounds]
    device_kernel.products(rows, W, bounds, xp.empty((20, 4), dtype="f4"))
    streams = {call.stream for call in cublas.calls}
    assert len(streams) == 3
    assert set(waits[:3]) == {(stream, Stream.null) for stream in streams}
    assert set(waits[3:]) == {(Stream.null, stream) for stream in streams}


def test_copies_wait_for_the_compute_where_they_must_and_only_there(waits):
    lanes, host = Lanes(xp), pinned_empty(xp, (3,), np.float32)
    host[...] = 1
    up, down, compute = lanes._up, lanes._down, Stream.null
    there = lanes.upload(host)
    assert waits == [(compute, up)], "it goes to memory of its own"
    waits.clear()
    lanes.fill(there, host)
    assert waits == [(up, compute), (compute, up)], "what was there may still be read"
    waits.clear()
    lanes.download(there)
    assert waits == [(down, compute)]


@pytest.mark.parametrize("asked", ["0", "1"])
def test_tf32_is_for_float32_and_by_option(cublas, monkeypatch, asked):
    monkeypatch.setenv(gemms.TF32_SWITCH, asked)
    wanted = [77 if asked == "1" else 68, 70, 68, 68]
    one = {dtype: on_device(np.ones((1, 1), dtype)) for dtype in DTYPES}
    for multiply in (
        lambda x: device_kernel.products(x, [x], [(0, 1)], xp.empty((1, 1), dtype=x.dtype)),
        lambda x: Linear(x)(x),
        lambda x: Linear(x)(x, xp.empty((1, 1), dtype=x.dtype)),
    ):
        for x in one.values():
            multiply(x)
        assert [call.mode for call in cublas.calls] == wanted
        cublas.calls.clear()


def test_a_matrix_of_another_dtype_lives_until_it_is_used(cublas):
    """What is converted for a product must not make room for the next one too early."""
    W = [on_device(normal(8, 8, seed=e, dtype=np.float16)) for e in range(6)]
    rows, out = on_device(normal(12, 8)), xp.empty((12, 8), dtype="f4")
    bounds = [(2 * e, 2 * e + 2) for e in range(6)]
    Linear.together(list(map(Linear, W)), rows, bounds, out)
    for matrix, (start, stop) in zip(W, bounds, strict=True):
        want = rows.get()[start:stop] @ matrix.get().astype("f4")
        np.testing.assert_allclose(out.get()[start:stop], want, rtol=1e-5, atol=1e-5)


def test_experts_of_one_kind_compute_together(cublas, monkeypatch):
    experts = Experts.gated(normal(6, 4, 5), normal(6, 4, 5, seed=1), normal(6, 5, 4))
    tokens, routing = on_device(normal(40, 4)), on_device(np.arange(80).reshape(40, 2) % 6)
    expert_parallel_dispatch(tokens, routing, experts.load(xp=xp), 0, 1)
    assert [len(batch) for batch in cublas.batches] == [6, 6], "gate and up in one product"
    assert not cublas.calls
    monkeypatch.setattr(device_kernel, "PADDED_ROWS", (0, 0))
    expert_parallel_dispatch(tokens, routing, experts.load(xp=xp), 0, 1)
    assert len(cublas.calls) == 2 * 6


def test_rows_are_padded_where_that_is_little(monkeypatch):
    experts = [Linear(np.ones((4, 4), np.float32))] * 4

    def padded(*counts: int) -> int | None:
        ends = np.cumsum(counts).tolist()
        bounds = list(zip([0, *ends[:-1]], ends, strict=True))
        slots = device_kernel.Slots(2, None, bounds, in_order=False, bad=0, nan=0)
        return device_kernel._padded_rows(slots, experts, 4)

    assert padded(1, 64, 0, 0) == 64, "few rows"
    assert padded(1, 65, 0, 0) is None, "few of many"
    assert padded(400, 500, 400, 380) == 500, "nearly even"
    assert padded(4000, 5000, 4000, 3800) is None, "a product of so many hides its call"
    assert padded(0, 0, 0, 0) is None
    monkeypatch.setattr(device_kernel, "TOGETHER_BYTES", 4 * 64 * 4 * 4 - 1)
    assert padded(1, 64, 0, 0) is None, "too much at a time"


def test_experts_that_would_make_too_much_at_a_time_compute_by_themselves(cublas, monkeypatch):
    monkeypatch.setattr(device_kernel, "TOGETHER_BYTES", 30 * 10 * 4)
    made = []
    gate = cuda_kernels.FusedKernels.gate
    monkeypatch.setattr(
        cuda_kernels.FusedKernels,
        "gate",
        lambda self, hidden, *rest: [made.append(len(hidden)), gate(self, hidden, *rest)],
    )
    experts = Experts.gated(normal(6, 4, 5), normal(6, 4, 5, seed=1), normal(6, 5, 4))
    routing = np.repeat(np.arange(6), [10, 15, 40, 5, 25, 5])
    tokens = on_device(normal(100, 4))
    expert_parallel_dispatch(tokens, on_device(routing), experts.load(xp=xp), 0, 1)
    assert made == [25, 40, 30, 5]


@pytest.mark.parametrize(("rows", "calls", "batches"), [(512, 4, []), (32, 0, [4])])
def test_a_device_is_probed_by_the_calls_of_a_run(cublas, monkeypatch, rows, calls, batches):
    """About 128 rows an expert; and 8, which a run pads."""
    measured = []
    monkeypatch.setattr(device_probe, "rate", lambda work, seconds: measured.append(work()) or 1.0)
    monkeypatch.setattr(device_probe, "probe_files", lambda seconds: {})
    device_probe._measure(xp, 16, 24, rows, 2, 8, np.dtype("f4"), True, 1.0)
    assert (len(cublas.calls), [len(batch) for batch in cublas.batches]) == (calls, batches)
    multiplied = [*cublas.calls, *(call for batch in cublas.batches for call in batch)]
    assert measured[0] == sum(2 * call.n * 16 * 24 for call in multiplied)


def test_the_benchmark_measures_what_it_says(cublas, monkeypatch, capsys):
    """Its numbers mean nothing here; that it comes to its end does, and that results agree."""
    monkeypatch.setattr(device, "NAMESPACE", "device_double")
    workflows = Path(__file__).parents[2] / "workflows"
    monkeypatch.syspath_prepend(workflows)
    workflow = runpy.run_path(str(workflows / "benchmark_gpu.py"))
    card = [device.Device(0, "double", 8 << 30)]
    monkeypatch.setitem(workflow["main"].__globals__, "find_devices", lambda: card)
    workflow["main"](
        ["--shrink", "64", "--rows", "32", "--chunks", "2", "--repeat", "1", "mixtral", "deepseek"]
    )
    told = capsys.readouterr().out
    assert "double, 8 GiB, bfloat16" in told
    line = r"\| (?:mixtral|deepseek) \| (\w+) \| (\S+) \| \d+\.\d\d \(.* \| 0.8 \| \d\.\d\d \|"
    found = re.findall(line, told)
    assert [precision for precision, _ in found] == ["float32", "bfloat16"] * 2
    assert [float(error) < 1e-6 for _, error in found] == [True, False] * 2
