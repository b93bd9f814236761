"""CuPy itself gives what the plain loops give, and waits for the device as seldom as is promised.

These need a card; `test_device.py` makes the same comparisons without one, on arrays that keep
CuPy's rules.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import dask
import dask.array as da
import ml_dtypes
import numpy as np
import pytest
from distributed.protocol import deserialize, serialize
from hypothesis import given, settings
from hypothesis import strategies as st

from dask_ep import (
    Experts,
    MoELayer,
    Router,
    expert_parallel,
    expert_parallel_dispatch,
    open_tokens,
    store,
)
from dask_ep.arrays.checks import computing_dtype
from dask_ep.arrays.device_streams import download, pinned_empty, upload
from dask_ep.cluster import device_serialize
from dask_ep.cluster.gpus import Gpus
from dask_ep.errors import DeviceMemoryError
from dask_ep.experts.quantized import float8, mxfp4
from dask_ep.jobs.example import Example, write_example
from dask_ep.jobs.job import load_job
from dask_ep.jobs.run import run_job
from dask_ep.jobs.verify import verify_job
from dask_ep.kernel import cuda_kernels, device_kernel, reference
from dask_ep.kernel.dispatch import dispatch
from dask_ep.kernel.expert import Linear
from dask_ep.kernel.kinds import ACTIVATIONS
from dask_ep.kernel.pack import Combining, Packing
from dask_ep.laws.costs import Spread
from dask_ep.laws.device_memory import (
    DEVICE_PROCESS_BYTES,
    THREADS_PER_GPU,
    OnDevice,
    held_dtype,
)
from dask_ep.layers.capacity import Capacity, ExpertChoice
from dask_ep.layers.checkpoint import load_moe_layer
from dask_ep.layers.routing import route
from dask_ep.placement.placement import Placement
from dask_ep.placement.policies import balanced, contiguous
from dask_ep.storage.sources import open_source
from tests.checkpoints import (
    CASES,
    FIXTURES,
    LAYER,
    expected,
    tolerances_in_bfloat16,
    with_rounded_experts,
)
from tests.compare import assert_close, assert_close_before_rounding, whole_layer
from tests.kernel.test_bfloat16 import Case as LayerCase
from tests.kernel.test_bfloat16 import a_layer, error, exact
from tests.strategies import Case, cases

pytestmark = pytest.mark.gpu

DTYPES = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16]


@pytest.fixture(scope="module")
def cupy() -> ModuleType:
    module = pytest.importorskip(
        "cupy", reason="CuPy is not installed: pip install cupy-cuda12x", exc_type=ImportError
    )
    if not module.cuda.is_available():
        pytest.skip("CuPy finds no device")
    return module


@pytest.fixture
def waits(cupy: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Grows by one whenever CuPy brings something to the host."""
    calls: list[None] = []
    monkeypatch.setattr(
        "cupy._core.syncdetect._declare_synchronize", lambda: calls.append(None), raising=True
    )
    return calls


def there(cupy: ModuleType, *arrays: np.ndarray | None) -> list[Any]:
    return [None if a is None else cupy.asarray(a) for a in arrays]


def device_chunks(cupy: ModuleType, array: da.Array | None) -> da.Array | None:
    if array is None:
        return None
    meta = cupy.empty((0,) * array.ndim, dtype=array.dtype)
    return array.map_blocks(cupy.asarray, dtype=array.dtype, meta=meta)


def blocks_of(cupy: ModuleType, y: da.Array, scheduler: str = "sync") -> np.ndarray:
    """All chunks computed, each on the device, joined on the host."""
    assert type(y._meta) is cupy.ndarray
    blocks = dask.compute(*y.to_delayed().ravel(), scheduler=scheduler)
    assert {type(block) for block in blocks} == {cupy.ndarray}
    assert {block.dtype for block in blocks} == {y.dtype}
    return np.concatenate([block.get() for block in blocks])


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape, dtype=np.float32)


def small_numbers(*shape: int) -> np.ndarray:
    """Whole numbers, whose sums are exact in float32, so that no choice hangs on rounding."""
    return np.random.default_rng(shape).integers(-3, 4, shape).astype("f4")


# --- the kernel --------------------------------------------------------------------------------


@settings(max_examples=40)
@given(case=cases(dtypes=DTYPES), form=st.sampled_from(["stack", "list", "loaded"]))
def test_the_kernel_equals_the_plain_loops_on_every_rank(cupy, case: Case, form: str):
    tokens, routing, topk_weights = there(cupy, case.tokens, case.routing, case.topk_weights)
    compute = computing_dtype(case.tokens.dtype)
    for rank in range(case.world_size):
        Ws = case.local_Ws(rank)
        experts = {
            "stack": cupy.asarray(Ws),
            "list": [cupy.asarray(W) for W in Ws],
            "loaded": Experts.linear(Ws).load(xp=cupy, dtype=compute),
        }[form]
        y = expert_parallel_dispatch(
            tokens, routing, experts, rank, case.world_size, topk_weights=topk_weights
        )
        assert type(y) is cupy.ndarray
        assert y.dtype == case.tokens.dtype
        want = reference.expert_parallel_dispatch(
            case.tokens,
            case.routing,
            [reference.linear(W.astype(np.float64)) for W in Ws],
            rank,
            case.world_size,
            case.topk_weights,
            d_out=case.W.shape[2],
        )
        assert_close(y.get(), want, case.tolerance)


def test_repeated_slots_give_the_same_bits_each_time(cupy):
    """A device adds in any order; here it must not."""
    rng = np.random.default_rng(0)
    arrays = there(cupy, rng.standard_normal((5000, 4)), rng.integers(0, 2, (5000, 7)))
    W, weights = there(cupy, rng.standard_normal((2, 4, 4)), 10 ** rng.uniform(-4, 4, (5000, 7)))
    first, *others = (
        expert_parallel_dispatch(*arrays, W, 0, 1, topk_weights=weights).get() for _ in range(5)
    )
    assert all(other.tobytes() == first.tobytes() for other in others)


@pytest.mark.parametrize("value", [4, -2])
def test_an_index_out_of_range_is_named(cupy, value):
    tokens, routing, W = there(cupy, np.ones((3, 2)), np.array([0, value, 1]), np.ones((2, 2, 2)))
    with pytest.raises(ValueError, match=rf"routing\[1\] is {value}"):
        expert_parallel_dispatch(tokens, routing, W, 0, 2)
    with pytest.raises(ValueError, match=rf"routing\[1\] is {value}"):
        Packing(tokens, routing, None, 2, 2)
    with pytest.raises(ValueError, match=rf"row 8 of the whole array\): .* is {value}"):
        contiguous(4, 2).rewrite(routing, row_offset=7)


@pytest.mark.parametrize("k", [1, 2])
def test_the_kernel_and_packing_wait_once_each_and_combining_never(cupy, waits, k):
    rng = np.random.default_rng(0)
    tokens, routing, W = there(cupy, normal(60, 4), rng.integers(-1, 4, (60, k)), normal(4, 4, 4))
    local = Experts.linear(normal(2, 4, 4)).load(xp=cupy)
    for step in (
        lambda: expert_parallel_dispatch(tokens, routing, W, 0, 1),
        lambda: expert_parallel_dispatch(tokens, routing, local, 1, 2),
        lambda: Packing(tokens, routing, None, 2, 2).packet([1]),
    ):
        waits.clear()
        step()
        assert len(waits) == 1
    packing = Packing(tokens, routing, None, 2, 2)
    answers = [packing.packet([rank]).rows for rank in packing.ranks]
    waits.clear()
    total = Combining(packing, 4, tokens.dtype)
    for rank, answer in zip(packing.ranks, answers, strict=True):
        total.add(rank, answer)
    assert len(waits) == 0


# --- exchange, placement, pipeline ---------------------------------------------------------------


@settings(max_examples=40)
@given(case=cases(dtypes=DTYPES))
def test_packets_and_sums_are_those_of_the_host(cupy, case: Case):
    tokens, routing, topk_weights = there(cupy, case.tokens, case.routing, case.topk_weights)
    each = case.num_experts // case.world_size
    packings = [
        Packing(*arrays, each, case.world_size)
        for arrays in (
            (tokens, routing, topk_weights),
            (case.tokens, case.routing, case.topk_weights),
        )
    ]
    assert packings[0].ranks == packings[1].ranks
    sums = [Combining(p, case.tokens.shape[1], case.tokens.dtype) for p in packings]
    for rank in packings[0].ranks:
        packet, on_host = (p.packet([rank]) for p in packings)
        for got, want in zip(packet, on_host, strict=True):
            if want is not None:
                np.testing.assert_array_equal(got.get(), want)
        for total, rows in zip(sums, (packet.rows, on_host.rows), strict=True):
            total.add(rank, rows)
    np.testing.assert_array_equal(sums[0].output().get(), sums[1].output())


@pytest.mark.parametrize("shape", [(0, 2), (50,), (50, 2)])
@pytest.mark.parametrize(
    "placement",
    [contiguous(3, 2), balanced([80, 10, 10, 20], 2, num_physical=6), Placement([[3, 0], [1, 2]])],
)
def test_a_placement_rewrites_as_on_the_host(cupy, placement, shape):
    routing = np.random.default_rng(0).integers(-1, placement.num_experts, shape)
    got = placement.rewrite(cupy.asarray(routing), row_offset=1000)
    np.testing.assert_array_equal(got.get(), placement.rewrite(routing, row_offset=1000))


@settings(max_examples=20)
@given(
    case=cases(dtypes=DTYPES, even=False),
    scheduler=st.sampled_from(["sync", "threads"]),
    copies=st.booleans(),
)
def test_the_pipeline_equals_the_plain_loops(cupy, case: Case, scheduler: str, copies: bool):
    tokens, routing, topk_weights = (device_chunks(cupy, array) for array in case.dask())
    load = np.bincount(case.routing[case.routing >= 0], minlength=case.num_experts)
    ranks = min(case.world_size, case.num_experts)
    placement = balanced(load, ranks) if copies else None
    y = expert_parallel(
        tokens, routing, case.W, topk_weights=topk_weights, world_size=ranks, placement=placement
    )
    assert_close(blocks_of(cupy, y, scheduler), whole_layer(case), case.tolerance)


# --- experts, routers, layers ---------------------------------------------------------------------

E, D, F = 4, 8, 16

GATED = {"gate": normal(E, D, F), "up": normal(E, D, F, seed=1), "down": normal(E, F, D)}
KINDS = {
    "linear": (Experts.linear(normal(E, D, D)), list(map(reference.linear, normal(E, D, D)))),
    **{
        activation: (
            Experts.gated(**GATED, activation=activation, limit=0.7, alpha=1.3, up_offset=1.0),
            [
                reference.gated(
                    **{name: w[e] for name, w in GATED.items()},
                    activation=activation,
                    limit=0.7,
                    alpha=1.3,
                    up_offset=1.0,
                )
                for e in range(E)
            ],
        )
        for activation in reference.ACTIVATIONS
    },
    "normed": (
        Experts.gated(**GATED, output_scale=normal(E, D, seed=2), output_norm_eps=0.1),
        [
            reference.gated(
                **{name: w[e] for name, w in GATED.items()},
                output_scale=normal(E, D, seed=2)[e],
                output_norm_eps=0.1,
            )
            for e in range(E)
        ],
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_expert_equals_the_plain_one(cupy, kind):
    experts, plain = KINDS[kind]
    rows = normal(20, D)
    for expert, want in zip(experts.load(xp=cupy), plain, strict=True):
        got = expert(cupy.asarray(rows))
        assert type(got) is cupy.ndarray
        assert_close(got.get(), np.stack([want(row) for row in rows]), 2e-5)


@pytest.mark.parametrize("router", [
    Router(8, 2, norm_topk_prob=True), Router(8, 2, "sigmoid"), Router(8, 2, "sqrtsoftplus"),
    Router(8, 2, "softmax_chosen"), Router(8, 2, "sigmoid_chosen"), Router(8, 2, "sparsemixer"),
    Router(8, 2, "sigmoid", groups=4, topk_groups=2),
    Router(8, 2, "sigmoid", groups=4, topk_groups=2, group_score="top2"),
], ids=lambda router: f"{router.score}-{router.groups}-{router.group_score}")  # fmt: skip
@pytest.mark.parametrize("n", [0, 40])
def test_routers_route_as_on_the_host(cupy, router, n):
    hidden, weight = small_numbers(n, 4), small_numbers(8, 4)
    want = route(hidden, router, weight)
    got = route(*there(cupy, hidden), router, *there(cupy, weight))
    np.testing.assert_array_equal(got[0].get(), want[0])
    np.testing.assert_allclose(got[1].get(), want[1], rtol=1e-5)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("changes", [
    {}, {"shared": Experts.gated(**GATED), "shared_gate": normal(D)}, {"residual": True},
    {"capacity": Capacity(0.7)}, {"capacity": Capacity(0.7, drop="position")},
    {"router": ExpertChoice(E, 2.0, "sigmoid")},
], ids=str)  # fmt: skip
def test_layers_give_what_they_give_on_the_host(cupy, changes, world_size):
    arguments = {"router": Router(E, 2, "sigmoid"), "experts": Experts.gated(**GATED)} | changes
    layer = MoELayer(router_weight=small_numbers(E, D) / 16, **arguments)
    hidden = da.from_array(small_numbers(3, 7, D), chunks=(1, 4, -1))
    want = layer(hidden, world_size=world_size).compute(scheduler="sync")
    y = layer(device_chunks(cupy, hidden), world_size=world_size)
    assert type(y._meta) is cupy.ndarray
    assert_close(y.compute(scheduler="sync").get(), want, 2e-5)


@pytest.mark.parametrize("case", CASES)
def test_layers_of_every_family(cupy, case):
    layer, want = load_moe_layer(FIXTURES / case, LAYER), expected(case)
    hidden = da.from_array(want["hidden"], chunks=(2, 3, -1))
    with dask.config.set(scheduler="sync"):
        got = layer(device_chunks(cupy, hidden)).compute().get()
        scale = np.abs(want["output"]).max()
        assert_close(got / scale, want["output"] / scale, 1e-5)
        narrow = hidden.astype(ml_dtypes.bfloat16)
        layer = with_rounded_experts(layer, ml_dtypes.bfloat16)
        same, there = layer(narrow.astype("f8")).compute(), device_chunks(cupy, narrow)
        for precision, tolerance in tolerances_in_bfloat16(case, layer).items():
            got = layer(there, precision=precision).compute().get()
            assert_close_before_rounding(got, same, tolerance)


# --- kernels, products, memory --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("limit", [None, 0.7])
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_fused_activations(cupy, activation, limit, dtype):
    hidden = normal(37, 2 * 19).astype(dtype)
    wide = cupy.asarray(hidden.astype(computing_dtype(dtype)))
    there = wide if wide.dtype == dtype else cupy.empty((37, 19), dtype=dtype)
    cuda_kernels.kernels(cupy).gate(wide, there, activation, limit, 1.3, 0.5)
    gate, up = hidden[:, :19].astype("f8"), hidden[:, 19:].astype("f8")
    if limit is not None:
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
    ACTIVATIONS[activation](gate, 1.3)
    tolerance = {8: 1e-14, 4: 1e-6, 2: 1e-2}[np.dtype(dtype).itemsize]
    assert_close(there[:, :19].get().astype("f8"), gate * (up + 0.5), tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("wide_out", [False, True])
def test_products_are_those_of_the_host_and_the_same_each_time(cupy, transposed, dtype, wide_out):
    bounds = [(0, 40), (40, 40), (40, 47), (47, 48), (48, 200)]
    rows = normal(200, 64 + 8).astype(dtype)[:, :64]
    matrices = [normal(64, 32, seed=e).astype(dtype) for e in range(len(bounds))]
    there = [cupy.asarray(m.T.copy()).T if transposed else cupy.asarray(m) for m in matrices]
    wide = cupy.asarray(np.ascontiguousarray(np.pad(rows, ((0, 0), (0, 8)))))
    outs, made = [], computing_dtype(dtype) if wide_out else np.dtype(dtype)
    for _ in range(3):
        out = cupy.empty((200, 32), dtype=made)
        device_kernel.products(wide[:, :64], there, bounds, out)
        outs.append(out.get())
    assert len({out.tobytes() for out in outs}) == 1
    tolerance = {8: 1e-14, 4: 1e-5, 2: 1e-2}[made.itemsize]
    for matrix, (start, stop) in zip(matrices, bounds, strict=True):
        want = rows[start:stop].astype("f8") @ matrix.astype("f8")
        assert_close(outs[0][start:stop].astype("f8"), want, tolerance)


def summed(cupy: ModuleType, case: LayerCase, *, widened: bool) -> np.ndarray:
    """The float32 sums of a layer whose matrices are bfloat16, or as much in float32."""
    experts = case.experts
    if widened:
        wide = {n: np.stack(w.read(np.dtype("f8"))) for n, w in experts.weights.items()}
        experts = getattr(Experts, experts.kind)(**{n: w.astype("f4") for n, w in wide.items()})
    rows = there(cupy, case.tokens, case.routing, case.topk_weights)
    return dispatch(*rows, experts.load(xp=cupy), 0, 1, dtype=np.dtype("f4")).get()


@pytest.mark.parametrize("massive", [False, True])
@pytest.mark.parametrize("kind", ["linear", "mlp", "gated", "gated_fused"])
def test_layers_of_bfloat16_have_the_accuracy_of_float32(cupy, kind, massive):
    errors = []
    for seed in range(25):
        case = a_layer(kind, seed, massive)
        want = exact(case)
        errors.append([error(summed(cupy, case, widened=w), want) for w in (False, True)])
    narrow, wide = np.array(errors).mean(axis=0)
    assert narrow <= 1.7 * wide
    assert np.max(errors) < 1e-6


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("terms", [700, 4096, 14336])
def test_long_sums_are_as_exact_as_those_of_float32(cupy, terms, dtype):
    """Although tensor cores round towards zero. Which `gemms.TERMS` that takes, a card says."""
    x, w = normal(64, terms).astype(dtype), normal(terms, 64, seed=1).astype(ml_dtypes.bfloat16)
    want = x.astype("f8") @ w.astype("f8")
    narrow, wide = (
        error(Linear(cupy.asarray(w.astype(held)))(cupy.asarray(x)).get(), want)
        for held in (w.dtype, np.float32)
    )
    assert narrow <= max(1.7 * wide, 1e-6)


def test_parts_add_up_to_every_number_on_a_card(cupy):
    """Subnormal ones too, although CuPy has its compiler take them for zero; infinity and NaN."""
    x = np.random.default_rng(0).integers(0, 2**32, (5000, 8), np.uint32).view(np.float32)
    out = cupy.empty((3, *x.shape), dtype=ml_dtypes.bfloat16)
    device_kernel._weigh(cupy.asarray(x), None, 1, None, out)
    parts, finite = out.get().astype("f8"), np.isfinite(x)
    left = np.abs(x[finite] - parts.sum(axis=0)[finite])
    assert (left[np.abs(x[finite]) >= 2.0**-109] == 0).all()
    assert left.max() < 2.0**-133
    np.testing.assert_array_equal(parts[0][~finite], x[~finite])
    assert (parts[1:, ~finite] == 0).all()


@pytest.mark.parametrize("values", [[np.inf, 1], [np.inf, -np.inf], [np.nan, 1], [1e-38, 0]])
def test_rows_that_bfloat16_cannot_say_are_what_they_are_in_float32(cupy, values):
    w = np.array([[1.0, 0.5], [0.25, -1.0]], ml_dtypes.bfloat16)
    x = np.array([[1.0, 2.0], values, [3.0, 4.0]], np.float32)
    with np.errstate(all="ignore"):
        want = x @ w.astype("f4")
    got = Linear(cupy.asarray(w))(cupy.asarray(x)).get()
    np.testing.assert_allclose(got, want, rtol=0, atol=2.0**-132)


def test_many_chunks_are_copied_to_the_device_and_back_while_it_computes(cupy):
    """Blocks of memory are used again and again, while kernels are still reading them."""
    chunks = [normal(1 << 16, 8, seed=c) for c in range(20)]
    there = []
    for chunk in chunks:
        host = pinned_empty(cupy, chunk.shape, chunk.dtype)
        host[...] = chunk
        rows = upload(cupy, host)
        del host
        for _ in range(20):
            rows = rows * np.float32(1.0)
        there.append(rows)
    for chunk, rows in zip(chunks, there, strict=True):
        np.testing.assert_array_equal(download(rows), chunk)


def test_the_memory_of_experts_is_free_when_their_handle_is_gone(cupy):
    pool = cupy.get_default_memory_pool()
    experts = Experts.gated(normal(4, 256, 512), normal(4, 256, 512), normal(4, 512, 256))
    experts.load(xp=cupy)
    before = pool.used_bytes()
    local = experts.load(xp=cupy, dtype=np.dtype(np.float16))
    assert local.nbytes <= pool.used_bytes() - before <= 1.1 * local.nbytes
    del local
    assert pool.used_bytes() == before


def test_few_bits_are_decoded_on_the_device(cupy):
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (3, 5, 2, 16), np.uint8)
    exponents = rng.integers(100, 140, (3, 5, 2), np.uint8)
    codes = rng.standard_normal((3, 5, 70)).astype(ml_dtypes.float8_e4m3fn)
    scales = open_source(rng.random((3, 2, 3)).astype("f4"))
    for source in (
        mxfp4(open_source(blocks), open_source(exponents)),
        float8(open_source(codes), scales, (4, 32)),
    ):
        experts = Experts.linear(source, transposed=True)
        for got, want in zip(experts.load(xp=cupy), experts.load(), strict=True):
            assert got.W.get().tobytes() == want.W.tobytes()


def test_the_error_of_a_chunk_that_is_too_large_says_what_fits(cupy):
    pool = cupy.get_default_memory_pool()
    pool.free_all_blocks()
    tokens = device_chunks(cupy, da.from_array(normal(1 << 18, 64), chunks=-1))
    routing = device_chunks(cupy, da.zeros((1 << 18, 4), dtype=int, chunks=-1))
    y = expert_parallel(tokens, routing, normal(2, 64, 64), world_size=1)
    pool.set_limit(size=pool.used_bytes() + (320 << 20))
    try:
        with pytest.raises(DeviceMemoryError, match=r"a chunk of 262144 rows: .* rows would fit"):
            y.compute(scheduler="sync")
    finally:
        pool.set_limit(size=0)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("stored", [np.float32, ml_dtypes.bfloat16])
def test_memory_on_the_device_is_within_the_plan(cupy, tmp_path, dtype, stored):
    N, E, rows, k = 1 << 15, 8, 1 << 12, 2
    rng, dtype = np.random.default_rng(0), np.dtype(dtype)
    arrays = [normal(N, 256).astype(dtype), rng.integers(0, E, (N, k))]
    for array, name in zip(arrays, ("tokens.zarr", "routing.zarr"), strict=True):
        store(da.from_array(array, chunks=(rows, -1)), tmp_path / name, scheduler="sync")
    shapes = [(E, 256, 512), (E, 256, 512), (E, 512, 256)]
    experts = Experts.gated(*(normal(*shape).astype(stored) for shape in shapes))
    pool = cupy.get_default_memory_pool()
    pool.free_all_blocks()
    before = pool.total_bytes()
    tokens = open_tokens(tmp_path / "tokens.zarr", chunks=rows, xp="cupy")
    routing = open_tokens(tmp_path / "routing.zarr", like=tokens, xp="cupy")
    y = expert_parallel(tokens, routing, experts, world_size=1)
    store(y, tmp_path / "y.zarr", scheduler="threads", num_workers=THREADS_PER_GPU)
    held = experts.held_bytes(held_dtype(experts, dtype), on_device=True)
    law = OnDevice.of(experts, None, k, dtype).need(
        held, THREADS_PER_GPU, 1, Spread.at_worst(k, 1, 0)
    )
    assert pool.total_bytes() - before <= law.at(rows) - DEVICE_PROCESS_BYTES


@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_travel_through_the_host(cupy, dtype):
    device_serialize.register(cupy)
    (rows,) = there(cupy, normal(20, 4).astype(dtype))
    got = deserialize(*serialize(rows, serializers=["dask"], on_error="raise"))
    assert got.dtype == dtype
    assert got.get().tobytes() == rows.get().tobytes()


@pytest.mark.parametrize("kind", ["gated", "linear"])
def test_a_job_on_all_devices(cupy, tmp_path, kind):
    sizes = {"rows": 4000, "d": 32, "num_experts": 8, "chunk_rows": 500, "kind": kind}
    path = write_example(tmp_path / "job", Example(**sizes))
    assert run_job(load_job(path), Gpus()).rows_done == 4000
    assert verify_job(load_job(path)).good
