"""Chunks that live on a device: same results, nothing implicit, few and small copies to the host.

No card is needed: the arrays are `device_double.DeviceArray`, which keeps CuPy's rules and counts
what is copied. `test_gpu.py` makes the same comparisons with CuPy itself.
"""

from __future__ import annotations

import pickle
import weakref
from collections.abc import Callable
from typing import Any

import dask
import dask.array as da
import ml_dtypes
import numpy as np
import pytest
from dask.base import tokenize
from hypothesis import given, settings
from hypothesis import strategies as st

from dask_ep import (
    Experts,
    MoELayer,
    Router,
    expert_parallel,
    expert_parallel_dispatch,
    open_tokens,
    plan,
    store,
)
from dask_ep.arrays.namespaces import is_array, namespace, one_namespace, to_host
from dask_ep.experts.quantized import QuantizedSource, float8, mxfp4
from dask_ep.experts.scales import ScaleSource, ZeroPoints
from dask_ep.experts.stored_experts import held_as_stored
from dask_ep.kernel import reference
from dask_ep.kernel.pack import Combining, Packing
from dask_ep.layers.capacity import Capacity, ExpertChoice
from dask_ep.layers.checkpoint import load_moe_layer
from dask_ep.layers.routing import look_up, route, weigh_chosen
from dask_ep.placement.placement import Placement
from dask_ep.placement.policies import balanced, contiguous
from dask_ep.placement.replica_choice import STRIDE, TICKETS
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
from tests.device_double import DeviceArray, on_device, register_with_dask, watch
from tests.device_double import namespace as xp
from tests.strategies import Case, cases

register_with_dask()

SCHEDULERS = ["sync", "threads"]


def device_chunks(array: da.Array | None) -> da.Array | None:
    """The same Dask array with chunks on the device, put there uncounted."""
    if array is None:
        return None
    meta = xp.empty((0,) * array.ndim, dtype=array.dtype)
    return array.map_blocks(on_device, dtype=array.dtype, meta=meta)


def blocks_of(y: da.Array, scheduler: str) -> list[DeviceArray]:
    """All chunks computed; each must be on the device, and so must the meta."""
    assert type(y._meta) is DeviceArray
    assert y._meta.dtype == y.dtype
    blocks = dask.compute(*y.to_delayed().ravel(), scheduler=scheduler)
    assert {type(block) for block in blocks} == {DeviceArray}
    assert {block.dtype for block in blocks} == {y.dtype}
    return blocks


def to_numpy(blocks: list[DeviceArray]) -> np.ndarray:
    return np.concatenate([block.get() for block in blocks])


def plain_dispatch(case: Case, rank: int) -> np.ndarray:
    return reference.expert_parallel_dispatch(
        case.tokens,
        case.routing,
        [reference.linear(W.astype(np.float64)) for W in case.local_Ws(rank)],
        rank,
        case.world_size,
        case.topk_weights,
        d_out=case.W.shape[2],
    )


def on_device_all(case: Case) -> list[DeviceArray | None]:
    return [on_device(a) for a in (case.tokens, case.routing, case.topk_weights)]


def times(W: DeviceArray) -> Callable[[DeviceArray], DeviceArray]:
    return lambda x: x @ W


# --- the kernel ---------------------------------------------------------------------------------


@given(cases(), st.sampled_from(["stack", "list", "callables", "loaded"]))
def test_the_kernel_in_every_form_brings_a_few_integers_to_the_host_and_nothing_else(
    case: Case, form: str
):
    tokens, routing, topk_weights = on_device_all(case)
    compute = np.float64 if case.tokens.dtype == np.float64 else np.float32
    each = case.num_experts // case.world_size
    for rank in range(case.world_size):
        Ws = case.local_Ws(rank)
        forms = {
            "stack": on_device(Ws),
            "list": [on_device(W) for W in Ws],
            "callables": [times(on_device(W.astype(compute))) for W in Ws],
            "loaded": Experts.linear(Ws).load(xp=xp, dtype=compute),
        }
        with watch() as traffic:
            y = expert_parallel_dispatch(
                tokens, routing, forms[form], rank, case.world_size, topk_weights=topk_weights
            )
        assert type(y) is DeviceArray
        assert y.dtype == case.tokens.dtype
        assert_close(y.get(), plain_dispatch(case, rank), case.tolerance)
        facts = each + 3 + (routing.size == len(tokens))
        assert traffic.to_host == ([8 * facts] if case.routing.size else [])
        assert traffic.to_device == []


@given(cases(repeats=True, max_k=4, dtypes=[np.float32, np.float64]))
def test_the_kernel_gives_the_bits_that_it_gives_on_the_host_each_time(case: Case):
    """Rows with one expert twice too, which a device would add in any order."""
    on_host = expert_parallel_dispatch(
        case.tokens, case.routing, case.local_Ws(0), 0, case.world_size,
        topk_weights=case.topk_weights,
    )  # fmt: skip
    tokens, routing, topk_weights = on_device_all(case)
    for _ in range(2):
        y = expert_parallel_dispatch(
            tokens, routing, on_device(case.local_Ws(0)), 0, case.world_size,
            topk_weights=topk_weights,
        )  # fmt: skip
        assert y.get().tobytes() == on_host.tobytes()


def test_slots_of_a_row_at_one_expert_are_added_in_their_order():
    """In any other order the sums have other bits."""
    rng = np.random.default_rng(0)
    rows, W = rng.standard_normal((50, 4)), rng.standard_normal((2, 4, 4))
    arrays = [rows, rng.integers(0, 2, (50, 7)), W]
    weights = 10 ** rng.uniform(-4, 4, (50, 7))
    want = expert_parallel_dispatch(*arrays, 0, 1, topk_weights=weights)
    there = [on_device(a) for a in arrays]
    with watch() as traffic:
        got = expert_parallel_dispatch(*there, 0, 1, topk_weights=on_device(weights))
    assert got.get().tobytes() == want.tobytes()
    assert len(traffic.to_host) == 1


@given(cases(max_k=2, dtypes=[np.float32, np.float64]), st.booleans())
def test_weights_on_the_input_and_rows_that_are_sorted(case: Case, by_expert: bool):
    order = np.argsort(case.routing, kind="stable") if by_expert else None
    if order is not None and case.routing.ndim == 1:
        case = case.with_(
            tokens=case.tokens[order],
            routing=case.routing[order],
            topk_weights=None if case.topk_weights is None else case.topk_weights[order],
        )
    tokens, routing, topk_weights = on_device_all(case)
    experts = Experts.gated(
        case.W, case.W, np.swapaxes(case.W, 1, 2), apply_router_weight_on_input=True
    )
    local = experts.load(xp=xp, dtype=case.tokens.dtype)
    with watch() as traffic:
        y = expert_parallel_dispatch(tokens, routing, local, 0, 1, topk_weights=topk_weights)
    want = reference.moe(
        case.tokens,
        case.routing,
        [reference.gated(W, W, W.T) for W in case.W],
        case.topk_weights,
        d_out=case.W.shape[1],
        apply_router_weight_on_input=True,
    )
    assert_close(y.get(), want, 10 * case.tolerance)
    assert len(traffic.to_host) <= 1
    np.testing.assert_array_equal(tokens.get(), case.tokens)


@pytest.mark.parametrize("value", [4, -2])
def test_an_index_out_of_range_is_found_on_a_device_too(value):
    tokens, routing = on_device(np.ones((3, 2))), on_device(np.array([0, value, 1]))
    W = on_device(np.ones((2, 2, 2)))
    with pytest.raises(ValueError, match=rf"routing\[1\] is {value}"):
        expert_parallel_dispatch(tokens, routing, W, 0, 2)
    with pytest.raises(ValueError, match=rf"routing\[1\] is {value}"):
        Packing(tokens, routing, None, 2, 2)
    with pytest.raises(ValueError, match=rf"row 8 of the whole array\): .* is {value}"):
        contiguous(4, 2).rewrite(routing, row_offset=7)


def test_arrays_of_two_namespaces_are_refused_by_name():
    tokens, routing = on_device(np.ones((3, 2))), np.array([0, 1, 1])
    with pytest.raises(TypeError, match="tokens from device_double, routing from numpy"):
        expert_parallel_dispatch(tokens, routing, [np.ones((2, 2))] * 2, 0, 1)


def test_a_nan_weight_is_named():
    weights = np.ones((3, 2))
    weights[2, 1] = np.nan
    arrays = [on_device(a) for a in (np.ones((3, 2)), np.zeros((3, 2), int), np.ones((1, 2, 2)))]
    with pytest.raises(ValueError, match=r"must not be NaN, but topk_weights\[2, 1\] is"):
        expert_parallel_dispatch(*arrays, 0, 1, topk_weights=on_device(weights))
    with pytest.raises(ValueError, match=r"must not be NaN, but topk_weights\[2, 1\] is"):
        Packing(*arrays[:2], on_device(weights), 1, 1)


# --- the exchange -------------------------------------------------------------------------------


@given(cases(), st.booleans())
def test_packets_and_sums_are_those_of_the_host_for_one_small_copy(case: Case, together: bool):
    tokens, routing, topk_weights = on_device_all(case)
    each, ranks = case.num_experts // case.world_size, range(case.world_size)
    on_host = Packing(case.tokens, case.routing, case.topk_weights, each, case.world_size)
    with watch() as traffic:
        packing = Packing(tokens, routing, topk_weights, each, case.world_size)
    numbers = 2 + case.world_size + (topk_weights is not None)
    assert traffic.to_host == ([numbers * 8] if case.routing.size else [])
    assert packing.ranks == on_host.ranks
    for owned in [list(ranks)] if together else [[rank] for rank in ranks]:
        owned = [rank for rank in owned if rank in packing.ranks]
        if not owned:
            continue
        with watch() as traffic:
            packet = packing.packet(owned)
        assert len(traffic.to_host) <= (len(owned) > 1)
        assert traffic.to_device == []
        for got, want in zip(packet, on_host.packet(owned), strict=True):
            assert type(got) is (type(None) if want is None else DeviceArray)
            if want is not None:
                assert got.dtype == want.dtype
                assert got.get().tobytes() == want.tobytes()
    with watch() as traffic:
        sums = [Combining(p, case.tokens.shape[1], case.tokens.dtype) for p in (packing, on_host)]
        for rank in packing.ranks:
            sums[0].add(rank, packing.packet([rank]).rows)
    assert traffic.to_host == traffic.to_device == []
    for rank in on_host.ranks:
        sums[1].add(rank, on_host.packet([rank]).rows)
    assert sums[0].output().get().tobytes() == sums[1].output().tobytes()


PLACEMENTS = {
    "in order": Placement([[0, 1], [2, 3]]),
    "uneven": contiguous(3, 2),
    "permuted": Placement([[3, 0], [1, 2]]),
    "copies": balanced([80, 10, 10, 20], 2, num_physical=6),
    "many copies": Placement([[0, 1, 2], [0, 1, 3], [0, 2, 3]]),
    "copies at home": Placement([[0, 1, 2], [0, 1, 3], [0, 2, 3]], local=True),
    "cut at a row's ticket": Placement([[0], [0]], [[1003 * STRIDE % TICKETS], [TICKETS]]),
}


@pytest.mark.parametrize("placement", PLACEMENTS.values(), ids=PLACEMENTS)
@pytest.mark.parametrize("shape", [(0, 2), (50,), (50, 2)])
def test_a_placement_rewrites_on_the_device(placement, shape):
    rng = np.random.default_rng(0)
    routing = rng.integers(-1, placement.num_experts, shape)
    routing[3:4] = 0
    with watch() as traffic:
        got = placement.rewrite(on_device(routing), 1000, home=placement.home(1))
    assert type(got) is DeviceArray
    want = placement.rewrite(routing, 1000, home=placement.home(1))
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(got.get(), want)
    assert traffic.to_host == ([2 * 8] if routing.size else [])
    held = int((placement.physical >= 0).sum())
    no_copies = held == placement.num_experts
    at_home = 4 * (placement.num_experts + 1) if placement.local else 0
    assert sum(traffic.to_device) == at_home + (4 * (held + 1) if no_copies else 12 * held)


# --- the pipeline -------------------------------------------------------------------------------


def copies_to_host(case: Case, world_size: int, *, placed: bool) -> int:
    """How many small copies a run makes, at most: as the docstrings of its steps say."""
    if world_size == 1:
        return len(case.chunks)
    return len(case.chunks) * (1 + world_size + placed)


@settings(max_examples=30)
@given(cases(even=False), st.sampled_from(SCHEDULERS), st.sampled_from(["none", "even", "copies"]))
def test_a_pipeline_keeps_chunks_on_the_device(case: Case, scheduler: str, placed: str):
    tokens, routing, topk_weights = map(device_chunks, case.dask())
    load = np.bincount(case.routing[case.routing >= 0], minlength=case.num_experts)
    ranks = min(case.world_size, case.num_experts)
    placement = {
        "none": None, "even": contiguous(len(load), ranks), "copies": balanced(load, ranks)
    }[placed]  # fmt: skip
    with watch() as traffic:
        y = expert_parallel(
            tokens, routing, case.W, topk_weights=topk_weights, world_size=ranks,
            placement=placement,
        )  # fmt: skip
        assert (traffic.to_host, traffic.to_device) == ([], [])
        assert y.chunks[0] == tokens.chunks[0]
        blocks = blocks_of(y, scheduler)
    assert_close(to_numpy(blocks), whole_layer(case), case.tolerance)
    rewritten = placement is not None or case.num_experts % ranks
    assert len(traffic.to_host) <= copies_to_host(case, ranks, placed=bool(rewritten))
    assert max(traffic.to_host, default=0) <= 8 * (y.numblocks[0] + 8 + case.num_experts)
    if not rewritten:
        assert sum(traffic.to_device) == case.W.nbytes  # the experts, each once
    with watch() as traffic:
        whole = y.compute(scheduler=scheduler)  # Dask joins the chunks
    assert type(whole) is DeviceArray


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("world_size", [1, 2])
def test_chunks_of_unknown_length(world_size, scheduler):
    rng = np.random.default_rng(0)
    arrays = {
        "tokens": rng.standard_normal((30, 4)), "routing": rng.integers(0, 4, (30, 2)),
        "topk_weights": rng.random((30, 2)),
    }  # fmt: skip
    keep, W = arrays["tokens"][:, 0] > 0, rng.standard_normal((4, 4, 4))
    chunked = {n: da.from_array(a, chunks=(10, -1)) for n, a in arrays.items()}
    some = {n: device_chunks(a[chunked["tokens"][:, 0] > 0]) for n, a in chunked.items()}
    y = expert_parallel(**some, experts=W, world_size=world_size)
    assert np.isnan(y.chunks[0]).all()
    kept = {n: a[keep] for n, a in arrays.items()}
    want = reference.moe(
        kept["tokens"], kept["routing"], list(map(reference.linear, W)), kept["topk_weights"],
        d_out=4,
    )  # fmt: skip
    assert_close(to_numpy(blocks_of(y, scheduler)), want, 1e-12)


def test_a_rank_takes_its_own_experts_of_a_device_array_alone():
    W = on_device(np.arange(8 * 50 * 30, dtype="f4").reshape(8, 50, 30))
    experts = Experts.linear(W)
    part = experts.subset([6, -1, 1])
    assert len(pickle.dumps(part)) < len(pickle.dumps(experts)) / 2
    assert tokenize(part) == tokenize(experts.subset([6, -1, 1])) != tokenize(experts)
    assert tokenize(part) != tokenize(experts.subset([6, -1, 2]))
    local, eye = part.load(xp=xp), on_device(np.eye(50, dtype="f4"))
    for place, e in ((0, 6), (2, 1)):
        np.testing.assert_array_equal(local[place](eye).get(), W[e].get())


def test_weights_that_are_on_the_device_stay_there():
    rng = np.random.default_rng(0)
    W = rng.standard_normal((4, 3, 3)).astype("f4")
    tokens = device_chunks(da.from_array(rng.standard_normal((8, 3)).astype("f4"), chunks=(4, -1)))
    routing = device_chunks(da.from_array(rng.integers(0, 4, 8), chunks=4))
    chunked = device_chunks(da.from_array(W, chunks=(2, -1, -1)))
    for given_ in (on_device(W), list(map(on_device, W)), chunked):
        with watch() as traffic:
            y = expert_parallel(tokens, routing, given_, world_size=2)
            blocks = blocks_of(y, "sync")
        assert max(traffic.to_host) <= 8 * 6
        assert sum(traffic.to_device) <= (8 * 4 if given_ is chunked else 0)  # Dask's own index
        want = expert_parallel_dispatch(
            to_numpy([tokens.compute()]), to_numpy([routing.compute()]), W, 0, 1
        )
        assert_close(to_numpy(blocks), want, 1e-5)


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_gate_and_up_that_are_on_the_device_apart_make_the_activation_in_float32(activation):
    weights = [normal(2, 4, 6), normal(2, 4, 6, seed=1), normal(2, 6, 4)]
    narrow = [w.astype(ml_dtypes.bfloat16) for w in weights]
    rows = normal(9, 4, dtype=ml_dtypes.bfloat16)
    experts = Experts.gated(*map(on_device, narrow), activation=activation)
    got = experts.load(xp=xp, dtype=ml_dtypes.bfloat16)[1](on_device(rows))
    wide = Experts.gated(*(w.astype("f8") for w in narrow), activation=activation)
    assert_close(got.get(), wide.load(dtype=np.float64)[1](rows.astype("f8")), 1e-2)


@pytest.mark.parametrize("name", ["y.zarr", "y.npy"])
def test_a_stored_output_comes_to_the_host_once(tmp_path, name):
    rng = np.random.default_rng(0)
    chunked = [
        da.from_array(a, chunks=(10, -1)) for a in (rng.random((30, 4)), np.zeros((30, 1), int))
    ]
    W = rng.standard_normal((2, 4, 4))
    y = expert_parallel(*map(device_chunks, chunked), W, world_size=1)
    with watch() as traffic, dask.config.set(scheduler="sync"):
        store(y, tmp_path / name)
    assert sorted(traffic.to_host) == [8 * (2 + 4)] * 3 + [10 * 4 * 8] * 3
    want = expert_parallel(*chunked, W, world_size=1).compute(scheduler="sync")
    assert_close(open_tokens(tmp_path / name).compute(scheduler="sync"), want, 1e-12)


@pytest.mark.slow
def test_a_plan_takes_routing_from_a_device():
    rng = np.random.default_rng(0)
    chunked = [da.from_array(a, chunks=10) for a in (rng.random((30, 4)), rng.integers(0, 4, 30))]
    experts = Experts.linear(rng.standard_normal((4, 4, 4)))
    with dask.config.set(scheduler="sync"):
        got = plan(*map(device_chunks, chunked), experts, world_size=2)
        want = plan(*chunked, experts, world_size=2)
    np.testing.assert_array_equal(got.expert_rows, want.expert_rows)


# --- experts ------------------------------------------------------------------------------------

E, D, F, O = 3, 4, 6, 5  # noqa: E741


def normal(*shape: int, seed: int = 0, dtype: object = np.float32) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def kinds_of_experts(dtype: object) -> dict[str, Experts]:
    up, gate, down = normal(E, D, F, dtype=dtype), normal(E, D, F, seed=1), normal(E, F, O)
    bias = {"gate_bias": normal(E, F), "up_bias": normal(E, F, seed=2), "down_bias": normal(E, O)}
    fused = np.concatenate([gate, up], axis=2)
    mlp_bias = {"up_bias": bias["up_bias"], "down_bias": bias["down_bias"]}
    return {
        "linear": Experts.linear(normal(E, D, O, dtype=dtype)),
        "affine": Experts.linear(normal(E, D, O), bias=normal(E, O)),
        "transposed": Experts.linear(normal(E, O, D, dtype=dtype), transposed=True),
        **{a: Experts.mlp(up, down, activation=a) for a in ("relu", "relu2", "gelu", "gelu_tanh")},
        "mlp with biases": Experts.mlp(up, down, **mlp_bias),
        "gated": Experts.gated(gate, up, down),
        "clamped": Experts.gated(gate, up, down, **bias, limit=0.5, alpha=1.7, up_offset=1.0),
        "normed": Experts.gated(gate, up, down, output_scale=normal(E, O), output_norm_eps=0.1),
        "fused": Experts.gated_fused(fused, down),
        "interleaved": Experts.gated_fused(fused, down, interleaved=True),
    }


@pytest.mark.parametrize("kind", kinds_of_experts(np.float32))
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_each_weight_goes_to_the_device_once_and_none_comes_back(kind, dtype):
    experts = kinds_of_experts(dtype)[kind]
    with watch() as traffic:
        local = experts.load([2, -1, 0], xp=xp)
    assert sum(traffic.to_device) == experts.subset([2, 0]).nbytes, "as they are stored"
    assert traffic.to_host == []
    rows = normal(7, D)
    with watch() as traffic:
        got = local[0](on_device(rows))
    assert type(got) is DeviceArray
    assert (traffic.to_host, traffic.to_device) == ([], [])
    assert_close(got.get(), experts.load()[2](rows), 1e-6)
    assert local.nbytes == 2 * 4 * experts.parameters
    assert local.__sizeof__() >= local.nbytes


@pytest.mark.parametrize("kind", ["float16", "fp8", "fp8, one by one", "mxfp4", "int4", "nvfp4"])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_experts_that_are_held_as_stored_are_held_so_on_the_device(kind, dtype):
    whole = Experts.linear(normal(3, 5, 64, dtype=np.float16), transposed=True)
    if kind != "float16":
        whole = Experts.linear(quantized_sources()[kind], transposed=True)
    with watch() as traffic:
        local = held_as_stored(whole).load([2, 0], xp=xp, dtype=dtype)
    stored = whole.subset([2, 0]).nbytes
    assert 0.8 * stored < sum(traffic.to_device) <= stored, "their scales may wait"
    assert local.on_device
    rows = on_device(normal(7, whole.d, dtype=dtype))
    with watch() as traffic:
        got = local[0](rows)
    assert sum(traffic.to_device) <= 0.2 * stored + 4 * 256 * 3, "scales and tables"
    assert traffic.to_host == []
    want = whole.load([2, 0], xp=xp, dtype=dtype)[0](rows)
    assert got.get().tobytes() == want.get().tobytes()


@pytest.mark.parametrize("kind", ["linear", "gated", "interleaved"])
def test_the_memory_of_experts_is_free_when_their_handle_is_gone(monkeypatch, kind):
    allocated = []

    def empty(shape, dtype=float, order="C"):
        array = xp_empty(shape, dtype, order)
        allocated.append(weakref.ref(array._a))
        return array

    xp_empty = xp.empty
    monkeypatch.setattr(xp, "empty", empty)
    local = kinds_of_experts(np.float32)[kind].load(xp=xp)
    held = sum(a().nbytes for a in allocated if a() is not None and a().dtype != np.uint8)
    assert held == local.nbytes, "the size reported to Dask"
    del local
    assert not [a for a in allocated if a() is not None and a().dtype != np.uint8]


def quantized_sources() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    codes = rng.standard_normal((3, 5, 70)).astype(ml_dtypes.float8_e4m3fn)
    scales = rng.random((3, 2, 3)).astype(np.float32)
    blocks = rng.integers(0, 256, (3, 5, 2, 16), np.uint8)
    exponents = rng.integers(100, 140, (3, 5, 2), np.uint8)
    wide = float8(open_source(codes), open_source(scales), (4, 32))
    flat = [
        float8(open_source(c), open_source(s), (4, 32)) for c, s in zip(codes, scales, strict=True)
    ]
    return {
        "fp8": wide,
        "fp8, one by one": flat,
        "mxfp4": mxfp4(open_source(blocks), open_source(exponents)),
        "int4": [int4_with_zeros(seed) for seed in range(3)],
        "nvfp4": [nvfp4(seed) for seed in range(3)],
    }


def int4_with_zeros(seed: int) -> QuantizedSource:
    """(5, 64) of groups of 32, with zero points, rounded to bfloat16."""
    rng = np.random.default_rng(seed)
    codes, zeros = (
        open_source(rng.integers(-(2**31), 2**31, shape, np.int32)) for shape in ((5, 8), (1, 2))
    )
    scales = open_source(rng.uniform(0.1, 1, (5, 2)).astype(ml_dtypes.bfloat16))
    return QuantizedSource(
        codes,
        "uint4",
        scales,
        (1, 32),
        zeros=ZeroPoints(zeros, "column4", (5, 2)),
        rounded=np.dtype(ml_dtypes.bfloat16),
    )


def nvfp4(seed: int) -> QuantizedSource:
    """(5, 64), with scales of 8 bits and one for all."""
    rng = np.random.default_rng(seed)
    codes = open_source(rng.integers(0, 256, (5, 32), np.uint8))
    scales = open_source(rng.uniform(1, 100, (5, 4)).astype(ml_dtypes.float8_e4m3fn))
    factor = open_source(np.array([0.01], np.float32))
    return QuantizedSource(codes, "fp4", ScaleSource(scales, (5, 4), factor), (1, 16))


@pytest.mark.parametrize("kind", quantized_sources())
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_few_bits_are_decoded_on_the_device_to_what_they_are_on_the_host(kind, dtype):
    experts = Experts.linear(quantized_sources()[kind], transposed=True)
    with watch() as traffic:
        local = experts.load([2, 0], xp=xp, dtype=dtype)
    assert sum(traffic.to_device) <= experts.subset([2, 0]).nbytes + 2 * 4 * (3 * 256)
    assert traffic.to_host == []
    for got, want in zip(local, experts.load([2, 0]), strict=True):
        exactly = kind in ("mxfp4", "int4")  # scales that are powers of two, values in bfloat16
        assert got.W.dtype == (ml_dtypes.bfloat16 if exactly else dtype)
        assert got.W.get().astype(dtype).tobytes() == want.W.astype(dtype).tobytes()


# --- routers: of small whole numbers, whose sums are exact in float32 and in any order ---------

ROUTERS = {
    "softmax": Router(8, 2),
    "normalised": Router(8, 3, norm_topk_prob=True, norm_eps=1e-20, scale=2.5),
    "sigmoid": Router(8, 2, "sigmoid"),
    "sqrtsoftplus": Router(8, 2, "sqrtsoftplus"),
    "softmax_chosen": Router(8, 2, "softmax_chosen"),
    "sigmoid_chosen": Router(8, 2, "sigmoid_chosen"),
    "sparsemixer": Router(8, 2, "sparsemixer"),
    "groups": Router(8, 2, "sigmoid", groups=4, topk_groups=2, norm_topk_prob=True),
    "top2 groups": Router(8, 2, "sigmoid", groups=4, topk_groups=2, group_score="top2"),
}


@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
@pytest.mark.parametrize("n", [0, 1, 40])
@pytest.mark.parametrize("biases", [(), ("bias",), ("bias", "selection_bias")])
def test_every_router_routes_as_on_the_host(router, n, biases):
    if router.score == "sparsemixer" and "selection_bias" in biases:
        biases = ("bias",)
    rng = np.random.default_rng(n)
    hidden, weight = (rng.integers(-2, 3, shape).astype("f4") for shape in ((n, 4), (8, 4)))
    given_ = {name: rng.integers(-2, 3, 8).astype("f4") for name in biases}
    want = route(hidden, router, weight, **given_)
    there = {name: on_device(bias) for name, bias in given_.items()}
    with watch() as traffic:
        got = route(on_device(hidden), router, on_device(weight), **there)
    for ours, theirs in zip(got, want, strict=True):
        assert type(ours) is DeviceArray
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours.get(), theirs)
    assert traffic.to_host == [8 * (1 + len(biases))]
    assert traffic.to_device == []


def test_a_table_and_weights_of_chosen_experts_on_the_device():
    rng = np.random.default_rng(0)
    ids, table = rng.integers(0, 9, 20), rng.integers(0, 8, (9, 2))
    hidden, weight = (rng.integers(-2, 3, shape).astype("f4") for shape in ((20, 4), (8, 4)))
    router = Router(8, 2, "sqrtsoftplus")
    want = look_up(ids, table)
    got = look_up(on_device(ids), on_device(table))
    np.testing.assert_array_equal(got.get(), want)
    weights = weigh_chosen(on_device(hidden), got, router, on_device(weight))
    assert type(weights) is DeviceArray
    np.testing.assert_array_equal(weights.get(), weigh_chosen(hidden, want, router, weight))


# --- layers -------------------------------------------------------------------------------------


def a_layer(kind: str) -> MoELayer:
    experts = Experts.gated(normal(8, D, F), normal(8, D, F, seed=1), normal(8, F, D))
    weight = np.random.default_rng(5).integers(-2, 3, (8, D)).astype("f4")
    shared = Experts.gated(normal(2, D, F, seed=3), normal(2, D, F, seed=4), normal(2, F, D))
    router = Router(8, 2, norm_topk_prob=True)
    return {
        "plain": lambda: MoELayer(router, experts, weight),
        "shared": lambda: MoELayer(router, experts, weight, shared=shared),
        "gated shared": lambda: MoELayer(
            router, experts, weight, shared=shared, shared_gate=normal(D), residual=True
        ),
        "residual": lambda: MoELayer(router, experts, weight, residual=True),
        "biases": lambda: MoELayer(
            router, experts, weight, router_bias=normal(8), selection_bias=normal(8, seed=1)
        ),
        "best of a capacity": lambda: MoELayer(router, experts, weight, capacity=Capacity(0.7)),
        "first of a capacity": lambda: MoELayer(
            router, experts, weight, capacity=Capacity(0.7, drop="position")
        ),
        "experts choose": lambda: MoELayer(ExpertChoice(8, 2.0), experts, weight),
    }[kind]()


LAYERS = [
    *("plain", "shared", "gated shared", "residual", "biases"),
    *("best of a capacity", "first of a capacity", "experts choose"),
]


def small_numbers(*shape: int) -> np.ndarray:
    """Hidden states whose logits are exact; every row another."""
    return np.random.default_rng(shape).integers(-3, 4, shape).astype("f4")


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("kind", LAYERS)
def test_layers_stay_on_the_device(kind, world_size, scheduler):
    layer, hidden = a_layer(kind), da.from_array(small_numbers(3, 7, D), chunks=(1, 4, -1))
    want = layer(hidden, world_size=world_size).compute(scheduler="sync")
    y = layer(device_chunks(hidden), world_size=world_size)
    assert y.chunks == layer(hidden, world_size=world_size).chunks
    blocks_of(y, scheduler)
    assert_close(y.compute(scheduler=scheduler).get(), want, 1e-5)


def test_no_layer_brings_hidden_states_or_weights_to_the_host():
    hidden = device_chunks(da.from_array(small_numbers(64, D), chunks=(16, -1)))
    for kind in ("plain", "shared", "gated shared", "residual", "biases"):
        y = a_layer(kind)(hidden, world_size=2)
        with watch() as traffic:
            blocks_of(y, "sync")
        assert max(traffic.to_host) <= 8 * (8 + 4), kind


@pytest.mark.parametrize("kind", ["plain", "best of a capacity", "experts choose"])
def test_layers_on_chunks_of_unknown_length(kind):
    hidden = da.from_array(small_numbers(30, D), chunks=(10, -1))
    some, layer = hidden[hidden[:, 0] > 0], a_layer(kind)
    want = layer(some).compute(scheduler="sync")
    assert_close(to_numpy(blocks_of(layer(device_chunks(some)), "sync")), want, 1e-5)


def test_routing_and_loads_of_a_layer_stay_on_the_device():
    layer, hidden = a_layer("plain"), da.from_array(small_numbers(30, D), chunks=(10, -1))
    there = device_chunks(hidden)
    for got, want in zip(layer.route(there), layer.route(hidden), strict=True):
        np.testing.assert_array_equal(to_numpy(blocks_of(got, "sync")), want.compute())
    load = layer.tokens_per_expert(there)
    np.testing.assert_array_equal(
        to_numpy(blocks_of(load, "sync")), layer.tokens_per_expert(hidden).compute()
    )


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_layers_of_every_family_on_a_device(case):
    """Against transformers in float32; in bfloat16 against the same weights and rows in float64."""
    layer, want = load_moe_layer(FIXTURES / case, LAYER), expected(case)
    hidden = da.from_array(want["hidden"], chunks=(2, 3, -1))
    with dask.config.set(scheduler="sync"):
        got = layer(device_chunks(hidden)).compute().get()
        scale = np.abs(want["output"]).max()
        assert_close(got / scale, want["output"] / scale, 1e-5)
        narrow = hidden.astype(ml_dtypes.bfloat16)
        layer = with_rounded_experts(layer, ml_dtypes.bfloat16)
        same, there = layer(narrow.astype("f8")).compute(), device_chunks(narrow)
        for precision, tolerance in tolerances_in_bfloat16(case, layer).items():
            got = layer(there, precision=precision).compute().get()
            assert_close_before_rounding(got, same, tolerance)


# --- the double keeps CuPy's rules --------------------------------------------------------------


def test_namespaces_are_found_as_cupys_is():
    a = on_device(np.ones(3))
    assert not hasattr(a, "__array_namespace__")
    assert namespace(a) is xp
    assert is_array(a)
    assert not is_array([1.0])
    assert one_namespace(x=a, y=None) is xp
    with pytest.raises(TypeError, match="x from device_double, y from numpy; convert"):
        one_namespace(x=a, y=np.ones(3))
    with pytest.raises(TypeError, match="routing must be a NumPy or CuPy array, but is a list"):
        namespace([1], "routing")
    big = on_device(np.array([2**64 - 1], np.uint64))
    with watch() as traffic:
        assert to_host(big, on_device(np.array(True)), xp.arange(2)) == [2**63 - 1, 1, 0, 1]
    assert traffic.to_host == [4 * 8]


REFUSED = {
    "asarray": lambda a, h: np.asarray(a),
    "plus": lambda a, h: a + h,
    "plus, the other way": lambda a, h: h + a,
    "in place": lambda a, h: a.__iadd__(h),
    "in place on the host": lambda a, h: h.__iadd__(a),
    "a comparison": lambda a, h: a < h,
    "a ufunc": lambda a, h: np.multiply(a, h),
    "out": lambda a, h: np.exp(a, out=h),
    "concatenate": lambda a, h: np.concatenate([a, h]),
    "matmul": lambda a, h: a @ h,
    "where": lambda a, h: xp.where(a > 0, a, h),
    "assignment": lambda a, h: a.__setitem__(slice(None), h),
    "into the host": lambda a, h: h.__setitem__(slice(None), a),
    "range": lambda a, h: range(a[0]),
}


@pytest.mark.parametrize("do", REFUSED.values(), ids=REFUSED)
def test_what_cupy_refuses_is_refused(do):
    with pytest.raises((TypeError, ValueError)):
        do(on_device(np.array([1, 2])), np.array([1, 2]))


COUNTED = {
    "int": (lambda a: int(a[0]), [8], []),
    "bool": (lambda a: bool((a > 0).any()), [1], []),
    "float": (lambda a: float(a.sum()), [8], []),
    "item": (lambda a: a[:1].item(), [8], []),
    "tolist": (lambda a: a.tolist(), [24], []),
    "repr": (lambda a: f"{a}", [24], []),
    "pickle": (lambda a: pickle.dumps(a), [24], []),
    "a mask": (lambda a: a[a > 1], [4], []),
    "assignment by a mask": (lambda a: a.__setitem__(a > 1, 0), [4], []),
    "nonzero": (lambda a: xp.flatnonzero(a), [4], []),
    "bincount": (lambda a: xp.bincount(a), [1, 8], []),
    "asarray": (lambda a: xp.asarray(np.ones(4, "f4")), [], [16]),
    "an index from the host": (lambda a: a[np.array([0, 2])], [], [16]),
    "scalars and views": (lambda a: (a * 2 + np.float32(1))[::2].reshape(-1, 1).T[0], [], []),
    "sorting": (lambda a: xp.searchsorted(a[xp.argsort(a)], a), [], []),
    "one number": (lambda a: a.__setitem__(xp.asarray(0), 5), [], []),
}


@pytest.mark.parametrize(("do", "to_host_", "to_device"), COUNTED.values(), ids=COUNTED)
def test_what_waits_for_the_device_is_counted(do, to_host_, to_device):
    a = on_device(np.array([1, 2, 3]))
    with watch() as traffic:
        do(a)
    assert (traffic.to_host, traffic.to_device) == (to_host_, to_device)


def test_what_is_undefined_on_a_device_is_found_out():
    a, twice = on_device(np.zeros((3, 2))), on_device(np.array([1, 1]))
    a[twice] = 7.0
    with pytest.raises(AssertionError, match="assigned two values"):
        a[twice] = on_device(np.array([[1.0, 1.0], [2.0, 2.0]]))
    with pytest.raises(AssertionError, match="not sorted"):
        xp.searchsorted(on_device(np.array([2, 1])), twice)
    assert np.isnan(xp.empty(2, dtype="f4").get()).all()
