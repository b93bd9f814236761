"""The law of device memory bounds what runs hold there, and plans and runs have the same one.

The memory is that of the double, which counts every array as CuPy's pool does.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import dask
import ml_dtypes
import numpy as np
import pytest

from dask_ep import Experts, Machine, expert_parallel, open_tokens, plan, store
from dask_ep.errors import DoesNotFit
from dask_ep.jobs.build import open_inputs
from dask_ep.jobs.decide import decide
from dask_ep.jobs.example import Example, write_example
from dask_ep.jobs.job import load_job
from dask_ep.laws.costs import FEWEST_ROWS, Rates, Spread
from dask_ep.laws.device_memory import (
    DEVICE_PROCESS_BYTES,
    THREADS_PER_GPU,
    OnDevice,
    held_dtype,
)
from dask_ep.laws.memory_law import Layout, host_need, need
from tests.checkpoints import FIXTURES, LAYER
from tests.device_double import namespace as xp
from tests.device_kernels import COMPILER, kernels

bf16 = ml_dtypes.bfloat16

N, D, F, E, K, ROWS = 3000, 64, 96, 8, 3, 300

RATES = Rates(flops=6e14, copy=2e12)


@pytest.fixture
def pool() -> Iterator[object]:
    pool = xp.get_default_memory_pool()
    pool.set_limit(size=1 << 40)  # only to count
    yield pool
    pool.set_limit(size=0)


def write_tokens(folder: Path, dtype: object) -> tuple[Path, Path, Path]:
    rng = np.random.default_rng(0)
    arrays = {
        "tokens": rng.standard_normal((N, D)).astype(dtype),
        "routing": rng.integers(0, E, (N, K)),
        "weights": rng.random((N, K), dtype="f4"),
    }
    for name, array in arrays.items():
        store(dask.array.from_array(array, chunks=(ROWS, -1)), folder / f"{name}.zarr")
    return tuple(folder / f"{name}.zarr" for name in arrays)


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).standard_normal(shape, dtype=np.float32)


SHAPES = {
    "linear": {"w": (D, D)},
    "mlp": {"up": (D, F), "down": (F, D)},
    "gated": {"gate": (D, F), "up": (D, F), "down": (F, D)},
}


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")
@pytest.mark.parametrize(
    ("dtype", "stored", "precision"),
    [
        (np.float32, np.float32, "float32"),
        (np.float32, bf16, "float32"),
        (bf16, bf16, "float32"),
        (bf16, bf16, "bfloat16"),
        (bf16, np.float32, "float32"),
        (bf16, np.float32, "bfloat16"),
    ],
)
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kind", SHAPES)
def test_a_run_holds_no_more_than_the_law_says_nor_much_less(
    tmp_path, pool, kind, ranks, dtype, stored, precision
):
    paths, dtype = write_tokens(tmp_path, dtype), np.dtype(dtype)
    matrices = {name: normal(E, *shape).astype(stored) for name, shape in SHAPES[kind].items()}
    experts = getattr(Experts, kind)(**matrices).with_precision(precision)
    with kernels():
        tokens = open_tokens(paths[0], chunks=ROWS, xp="device_double")
        routing, weights = (open_tokens(p, like=tokens, xp="device_double") for p in paths[1:])
        y = expert_parallel(tokens, routing, experts, topk_weights=weights, world_size=ranks)
        store(y, tmp_path / "y.zarr", scheduler="threads", num_workers=THREADS_PER_GPU)
    held = experts.held_bytes(held_dtype(experts, dtype), on_device=True)
    assert held == E * experts.parameters * (2 if bf16 == stored or precision == "bfloat16" else 4)
    spread = Spread.at_worst(K, ranks, workers=0)
    law = OnDevice.of(experts, None, K, dtype).need(held, THREADS_PER_GPU, ranks, spread)
    most = law.at(ROWS) - DEVICE_PROCESS_BYTES
    assert 0.1 * most < pool.peak <= most


# --- plans and runs ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def job_file(tmp_path_factory) -> Path:
    sizes = {"rows": 2000, "d": 512, "num_experts": 16, "k": 2, "chunk_rows": 500, "kind": "gated"}
    return write_example(tmp_path_factory.mktemp("job"), Example(**sizes, format="npy"))


def planned(inputs, ranks: int, *, chunk_rows: int | None = None, rates=RATES, **machine: object):
    tokens = open_tokens(inputs.tokens, chunks=500)
    routing = open_tokens(inputs.routing, like=tokens)
    return plan(
        tokens,
        routing,
        inputs.experts,
        world_size=ranks,
        chunk_rows=chunk_rows,
        rates=rates,
        machine=Machine(gpu=True, **machine),
    )


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_plan_has_the_law_of_a_run(job_file, ranks):
    inputs = open_inputs(load_job(job_file))
    layout = Layout(ranks, ranks, THREADS_PER_GPU, on_devices=True)
    one = planned(inputs, ranks)
    assert (one.threads, one.workers) == (THREADS_PER_GPU, ranks)
    most, on_host = need(inputs.work(True), layout), host_need(inputs.work(True), layout)
    assert one.memory_bytes <= most.at(500)
    assert one.process_bytes <= on_host.at(500)
    if ranks == 1:
        assert (one.need, one.host_need) == (most, on_host)
    assert one.expert_bytes == most.expert_bytes == 16 // ranks * inputs.experts.parameters * 4


def test_a_plan_refuses_what_does_not_fit_and_proposes_what_does(job_file):
    inputs = open_inputs(load_job(job_file))
    fits = planned(inputs, 1)
    limits = {"device_memory_limit": fits.memory_bytes, "memory_limit": fits.process_bytes}
    assert planned(inputs, 1, **limits).fits
    with pytest.raises(DoesNotFit, match="of a GPU of .* it runs with --chunk-rows") as error:
        planned(
            inputs, 1, chunk_rows=500, **limits | {"device_memory_limit": fits.memory_bytes - 1}
        )
    assert error.value.proposal["chunk_rows"] < 500
    with pytest.raises(DoesNotFit, match="memory limit of a GPU's worker on the host of"):
        planned(inputs, 1, chunk_rows=500, **limits | {"memory_limit": fits.process_bytes - 1})
    with pytest.raises(DoesNotFit, match=r"use more GPUs, or none \(--threads or --processes"):
        planned(inputs, 1, device_memory_limit=DEVICE_PROCESS_BYTES, workers=1)


def test_time_is_that_of_the_slowest_of_concurrent_steps(job_file):
    inputs = open_inputs(load_job(job_file))
    chunk = 2000 * 512 * 4
    slow = {"lane": 1e6, "write": 1e5, "flops": 1e9}
    for name, seconds in {
        "lane": chunk / 1e6,
        "write": (chunk / 1e9 + chunk / 1e5) / THREADS_PER_GPU,
        "flops": 2000 * 2 * 2 * inputs.experts.parameters / 1e9,
    }.items():
        rates = {"flops": 1e18, "copy": 1e15, "lane": 1e15, "read": 1e9, "write": 1e15}
        one = planned(inputs, 1, rates=Rates(**rates | {name: slow[name]}))
        assert one.busy_seconds == pytest.approx(seconds, rel=1e-2), name


def test_a_run_is_refused_by_the_memory_of_either_side(job_file):
    inputs = open_inputs(load_job(job_file))
    gpu = Layout(1, 1, THREADS_PER_GPU, on_devices=True)
    enough, on_host = (law(inputs.work(True), gpu).at(FEWEST_ROWS) for law in (need, host_need))
    just = Layout(1, 1, THREADS_PER_GPU, enough, on_devices=True, host_limit=on_host)
    assert decide(inputs.work(True), just).chunk_rows >= FEWEST_ROWS
    for limits, words in (
        ((enough - 1, on_host), r"of a GPU of .* for CUDA, .* use more GPUs, or none \(--threads"),
        ((enough, on_host - 1), "of a GPU's worker on the host of .*; allow more memory"),
    ):
        small = Layout(1, 1, THREADS_PER_GPU, limits[0], on_devices=True, host_limit=limits[1])
        with pytest.raises(DoesNotFit, match=words):
            decide(inputs.work(True), small)


def test_experts_stay_as_they_are_stored_on_a_gpu_where_they_fit_only_in_that_form(tmp_path):
    case = FIXTURES / "deepseek_v3_fp8"
    with np.load(case / "expected.npz") as found:
        np.save(tmp_path / "x.npy", found["hidden"].reshape(24, -1))
    places = {"tokens": str(tmp_path / "x.npy"), "out": str(tmp_path / "y.npy")}
    inputs = open_inputs(load_job(layer=str(case), layer_index=LAYER, **places))
    layout = Layout(1, 1, 1, on_devices=True)
    enough = need(inputs.work(True), layout).at(FEWEST_ROWS)
    for limit, as_stored in ((enough, False), (enough - 1, True)):
        decision = decide(inputs.work(True), Layout(1, 1, 1, limit, on_devices=True))
        assert decision.as_stored == as_stored
