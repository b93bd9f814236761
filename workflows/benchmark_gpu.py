"""How close do the kernel and a whole job come to the limits of a GPU?

    python workflows/benchmark_gpu.py                           # all layers, bfloat16
    python workflows/benchmark_gpu.py --dtype float16 mixtral
    python workflows/benchmark_gpu.py --dtype float32 --tf32
    python workflows/benchmark_gpu.py --directory /dev/shm      # files in memory

Prints ratios, never bare seconds: each is a limit divided by a measured time, both taken in the
same round on the same card, and each is the median over the rounds.

    error    of some rows of the kernel against float64, relative to their largest value, before
             rounding
    kernel   one dense product of the same FLOPs / expert_parallel_dispatch, chunks on the device;
             bfloat16 as exact as float32 takes 5/3 as many products
    job      the slowest of that product, the upload and the download / Zarr to Zarr, experts loaded
    memory   GPU memory that the job uses / the most that its plan allows

Without a GPU or CuPy it prints an error and exits with 1.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import dask.array as da
import ml_dtypes
import numpy as np
from measured import timed

import dask_ep
from dask_ep.arrays import device
from dask_ep.arrays.device import find_devices
from dask_ep.arrays.device_streams import download, pinned_empty, upload
from dask_ep.arrays.gemms import TF32_SWITCH, gemms
from dask_ep.errors import NoDeviceError
from dask_ep.kernel import reference
from dask_ep.kernel.dispatch import dispatch
from dask_ep.laws.costs import Spread
from dask_ep.laws.device_memory import (
    DEVICE_PROCESS_BYTES,
    THREADS_PER_GPU,
    OnDevice,
    held_dtype,
)


@dataclass(frozen=True)
class Layer:
    """A layer of gated experts that fits on one GPU, and the rows of a chunk."""

    d: int
    hidden: int
    num_experts: int
    k: int
    rows: int
    to_reach: float
    #: ratio that the kernel should reach

    @property
    def slots(self) -> int:
        return self.rows * self.k


LAYERS = {
    "mixtral": Layer(d=4096, hidden=14336, num_experts=8, k=2, rows=16_384, to_reach=0.85),
    "qwen3": Layer(d=2048, hidden=768, num_experts=128, k=8, rows=16_384, to_reach=0.70),
    "deepseek": Layer(d=7168, hidden=2048, num_experts=32, k=8, rows=8_192, to_reach=0.75),
}
"""Sizes of Mixtral 8x7B, of Qwen3 30B-A3B, and of one of eight ranks of DeepSeek-V3."""

JOB_TO_REACH = 0.8

DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("layers", nargs="*", default=list(LAYERS), help=", ".join(LAYERS))
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--tf32", action="store_true", help="multiply float32 as TF32")
    parser.add_argument("--rows", type=int, help="rows of a chunk, instead of each layer's own")
    parser.add_argument(
        "--shrink", type=int, default=1, help="divide all widths by this, for a quick test"
    )
    parser.add_argument("--chunks", type=int, default=16, help="chunks of the job")
    parser.add_argument("--repeat", type=int, default=5, help="number of rounds; medians are shown")
    parser.add_argument("--directory", help="directory for temporary files")
    options = parser.parse_args(arguments)
    try:
        card = find_devices()[0]
    except NoDeviceError as error:
        sys.exit(f"nothing was measured: {error}")
    if options.tf32:
        os.environ[TF32_SWITCH] = "1"
    arithmetic = f"{options.dtype}{' as TF32' if options.tf32 else ''}"
    print(f"{card.name}, {card.memory / 2**30:.0f} GiB, {arithmetic}; medians of {options.repeat}")
    print("| layer | precision | error | kernel | to reach | job | to reach | memory |")
    print("|---|---|---|---|---|---|---|---|")
    for name in options.layers:
        layer = shrunk(LAYERS[name], options.shrink, options.rows)
        for precision in ("float32",) if options.dtype == "float32" else ("float32", "bfloat16"):
            with tempfile.TemporaryDirectory(dir=options.directory) as folder:
                bench = Bench(layer, DTYPES[options.dtype], precision, Path(folder), options.chunks)
                error = bench.error()
                bench.round()
                kernel, job = zip(*(bench.round() for _ in range(options.repeat)), strict=True)
                memory = bench.memory()
            ratios = f"{spread_of(kernel)} | {layer.to_reach} | {spread_of(job)} | {JOB_TO_REACH}"
            print(f"| {name} | {precision} | {error:.1e} | {ratios} | {memory:.2f} |", flush=True)


def shrunk(layer: Layer, by: int, rows: int | None) -> Layer:
    return Layer(
        layer.d // by, layer.hidden // by, layer.num_experts, layer.k, rows or layer.rows,
        layer.to_reach,
    )  # fmt: skip


def spread_of(ratios: tuple[float, ...]) -> str:
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


class Bench:
    """One layer's data, on the device and on disk, and all measurements on it."""

    def __init__(self, layer: Layer, dtype: Any, precision: str, folder: Path, chunks: int):
        self.xp = import_module(device.NAMESPACE)
        self.layer, self.dtype, self.folder, self.chunks = layer, np.dtype(dtype), folder, chunks
        rng = np.random.default_rng(0)
        E, d, f = layer.num_experts, layer.d, layer.hidden
        self.gate_up, self.down = self.numbers(d, (E, d, 2 * f)), self.numbers(f, (E, f, d))
        experts = dask_ep.Experts.gated_fused(self.gate_up, self.down)
        self.experts = experts.with_precision(precision)
        self.held = held_dtype(self.experts, self.dtype)
        self.local = self.experts.load(xp=self.xp, dtype=self.held)
        routing = np.argsort(rng.random((layer.rows, E)), axis=1)[:, : layer.k].astype(np.int32)
        weights = rng.random(routing.shape, dtype=np.float32)
        self.routing, self.weights = map(self.xp.asarray, (routing, weights))
        self.tokens, self.slots = (
            self.numbers(1, (layer.rows, d)),
            self.numbers(1, (layer.slots, d)),
        )
        self.wide = self.numbers(d, (d, 3 * f))
        self.product = self.xp.empty((layer.slots, 3 * f), dtype=self.dtype)
        self.write_files(routing, weights)

    def numbers(self, terms: int, shape: tuple[int, ...]) -> Any:
        """Return normal numbers on the device, with a variance of 1 / terms."""
        some = np.random.default_rng(len(shape)).standard_normal((1 << 16) - 1)
        some = (some / math.sqrt(terms)).astype(self.dtype)
        flat = self.xp.tile(self.xp.asarray(some), -(-math.prod(shape) // some.size))
        return flat[: math.prod(shape)].reshape(shape)

    def write_files(self, routing: np.ndarray, weights: np.ndarray) -> None:
        chunks = {"tokens": download(self.tokens), "routing": routing, "weights": weights}
        for name, chunk in chunks.items():
            whole = da.concatenate([da.from_array(chunk, chunks=-1)] * self.chunks)
            dask_ep.store(whole, self.folder / f"{name}.zarr", scheduler="sync")

    def error(self) -> float:
        """Return the largest difference between a few rows and plain loops in float64."""
        f, last, errors = self.layer.hidden, self.layer.rows - 1, []
        y = self.kernel(np.dtype(np.float32))
        for row in (0, last // 2, last):
            token, got = (a[row].get().astype(np.float64) for a in (self.tokens, y))
            want = np.zeros_like(got)
            for e, weight in zip(self.routing[row].tolist(), self.weights[row].get(), strict=True):
                gate_up, down = (w[e].get().astype(np.float64) for w in (self.gate_up, self.down))
                want += weight * reference.gated(gate_up[:, :f], gate_up[:, f:], down)(token)
            errors.append(np.abs(got - want).max() / np.abs(want).max())
            if not errors[-1] < 2e-2:
                sys.exit(
                    f"row {row} differs from plain loops by {errors[-1]:.2g} of its largest value"
                )
        return max(errors)

    def round(self) -> tuple[float, float]:
        """Return the two ratios; the kernel's limit is timed before and after it."""
        products = [self.on_device(self.dense)]
        kernel = self.on_device(self.kernel)
        products.append(self.on_device(self.dense))
        product = statistics.mean(products)
        limit = max(product * self.chunks, *self.copies())
        return product / kernel, limit / timed(self.job)

    def on_device(self, work: Callable[[], Any]) -> float:
        """Return the seconds that some work takes on the host and until the device is done."""
        stream = self.xp.cuda.get_current_stream()
        stream.synchronize()
        return timed(lambda: (work(), stream.synchronize()))

    def dense(self) -> None:
        """Make one product with the kernel's FLOPs, by the same call of cuBLAS."""
        bounds = [(0, self.layer.slots)]
        gemms(self.xp)(self.slots, [self.wide], bounds, self.product)

    def kernel(self, dtype: np.dtype | None = None) -> Any:
        """Run `expert_parallel_dispatch`; a dtype keeps its result from being rounded."""
        return dispatch(self.tokens, self.routing, self.weights, self.local, 0, 1, dtype)

    def copies(self) -> tuple[float, float]:
        """Return the seconds to upload the job's tokens, and to download as many."""
        host = pinned_empty(self.xp, self.tokens.shape, self.dtype)
        host.fill(0)
        up = self.on_device(lambda: [upload(self.xp, host) for _ in range(self.chunks)])
        down = self.on_device(lambda: [download(self.tokens) for _ in range(self.chunks)])
        return up, down

    def job(self) -> None:
        """Run the job from Zarr to Zarr, on as many threads as a worker has."""
        tokens = dask_ep.open_tokens(
            self.folder / "tokens.zarr", chunks=self.layer.rows, xp=self.xp.__name__
        )
        routing, weights = (
            dask_ep.open_tokens(self.folder / f"{name}.zarr", like=tokens, xp=self.xp.__name__)
            for name in ("routing", "weights")
        )
        y = dask_ep.expert_parallel(
            tokens, routing, self.experts, topk_weights=weights, world_size=1
        )
        with ThreadPoolExecutor(THREADS_PER_GPU) as pool:
            out = self.folder / "out.zarr"
            dask_ep.store(y, out, overwrite=True, scheduler="threads", pool=pool)

    def memory(self) -> float:
        """Return the memory that a job adds to what was in use, divided by what its plan says."""
        pool = self.xp.get_default_memory_pool()
        pool.free_all_blocks()
        before = pool.total_bytes()
        self.job()
        layer = self.layer
        law = OnDevice.of(self.experts, None, layer.k, self.dtype)
        loaded = self.experts.held_bytes(self.held, on_device=True)
        stays = loaded == self.experts.nbytes  # in place
        law = law.need(0 if stays else loaded, THREADS_PER_GPU, 1, Spread.at_worst(layer.k, 1, 0))
        planned = law.at(layer.rows) - DEVICE_PROCESS_BYTES
        return (pool.total_bytes() - before) / planned


if __name__ == "__main__":
    main()
