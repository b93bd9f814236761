"""What do the benchmarks measure: which layers, on which files, and how are they timed?

Imported by the scripts in this folder.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import dask
import dask.array as da
import numpy as np
import psutil
import zarr
from dask.system import CPU_COUNT
from distributed import Client

import dask_ep


@dataclass(frozen=True)
class Layer:
    """A layer to measure, and the sizes of its job."""

    d: int
    num_experts: int
    k: int
    hidden: int | None = None
    zipf: float = 0.0
    rows: int = 131_072
    chunk_rows: int = 8192


LAYERS = {
    "top1-linear": Layer(d=1024, num_experts=8, k=1, rows=262_144),
    "top2-gated": Layer(d=512, num_experts=8, k=2, hidden=1792, chunk_rows=16_384),
    "top8-small": Layer(d=512, num_experts=128, k=8, hidden=256, zipf=1.0, chunk_rows=16_384),
}


def parse_options(
    description: str | None, cores: str
) -> tuple[argparse.Namespace, dict[str, Layer]]:
    """Read the options of a benchmark; return them, and the chosen layers by name.

    `cores` is the name of the option for the number of threads or processes.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("layers", nargs="*", default=list(LAYERS), help=", ".join(LAYERS))
    parser.add_argument("--rows", type=int, help="token rows, instead of each layer's own")
    parser.add_argument("--chunk-rows", type=int, help="rows of a token chunk")
    parser.add_argument(cores, type=int, default=CPU_COUNT)
    parser.add_argument("--repeat", type=int, default=5, help="number of rounds; medians are shown")
    parser.add_argument("--directory", help="directory for temporary files")
    options = parser.parse_args()
    if unknown := set(options.layers) - set(LAYERS):
        parser.error(f"layers are {', '.join(LAYERS)}, not {', '.join(sorted(unknown))}")
    sizes = {n: v for n in ("rows", "chunk_rows") if (v := getattr(options, n)) is not None}
    return options, {name: replace(LAYERS[name], **sizes) for name in options.layers}


class Job:
    """One layer's data, in files and in memory, and the directory of its outputs.

    `client` is that of `threads` workers, which own the experts.
    """

    def __init__(self, layer: Layer, folder: Path, client: Client, threads: int):
        self.layer, self.folder, self.client, self.threads = layer, folder, client, threads
        self.tokens, self.routing, self.topk_weights = write_inputs(layer, folder)
        self.experts = write_experts(layer, folder)

    def timed_output(self, run: Callable[[Path], None]) -> float:
        """Time a function that writes an output, with its inputs in the page cache."""
        for file in self.token_files():
            file.read_bytes()
        with self.output() as out:
            os.sync()  # otherwise it may have to wait for earlier writes
            return timed(lambda: run(out))

    def by_threads(self, out: Path) -> None:
        dask_ep.store(self.layer_output(world_size=1), out)

    def by_dask(self, out: Path) -> None:
        """Do the same through Dask's own functions for Zarr."""
        tokens, routing, weights = self.dask_inputs()
        y = dask_ep.expert_parallel(
            tokens, routing, self.experts, topk_weights=weights, world_size=1
        )
        da.store(y, self.create_output(out), lock=False)

    def by_processes(self, out: Path) -> None:
        """Do the same on running worker processes, each of which owns a share of the experts."""
        with dask.config.set(scheduler=self.client):
            dask_ep.store(self.layer_output(world_size=self.threads), out)

    def check_results_agree(
        self, programs: dict[str, Callable[[Path], None]], ours: str, rows: int
    ) -> None:
        """Check that every program writes the same first rows as one of them."""
        results = {}
        for name, run in programs.items():
            with self.output() as out:
                run(out)
                results[name] = zarr.open_array(out)[:rows]
        for name, result in results.items():
            error = np.abs(result - results[ours]).max() / np.abs(results[ours]).max()
            if not error < 1e-4:
                raise SystemExit(f"{name} differs from {ours} by {error:.2g} of the largest")

    def token_files(self) -> list[Path]:
        return [f for f in (self.folder / "tokens.zarr").rglob("*") if f.is_file()]

    @contextmanager
    def output(self) -> Iterator[Path]:
        """Yield the path of an output in a new directory, removed afterwards."""
        place = self.folder / "out"
        place.mkdir()
        try:
            yield place / "out.zarr"
        finally:
            shutil.rmtree(place)

    def create_output(self, out: Path) -> zarr.Array:
        """Create an array like the one that the pipeline writes."""
        layer = self.layer
        return zarr.create_array(
            out,
            shape=(layer.rows, layer.d),
            chunks=(layer.chunk_rows, layer.d),
            dtype="f4",
            compressors=None,
        )

    def arrays(self) -> list[np.ndarray]:
        """Load the matrices of the experts."""
        return [np.load(file) for file in sorted(self.folder.glob("w*.npy"))]

    def chunks(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        for start in range(0, self.layer.rows, self.layer.chunk_rows):
            rows = slice(start, start + self.layer.chunk_rows)
            yield self.tokens[rows], self.routing[rows], self.topk_weights[rows]

    def dask_inputs(self) -> list[da.Array]:
        names = ("tokens", "routing", "topk_weights")
        return [da.from_zarr(str(self.folder / f"{name}.zarr")) for name in names]

    def layer_output(self, world_size: int) -> da.Array:
        """Return the lazy output, with inputs opened by `dask_ep`."""
        tokens = dask_ep.open_tokens(self.folder / "tokens.zarr")
        routing = dask_ep.open_tokens(self.folder / "routing.zarr", like=tokens)
        weights = dask_ep.open_tokens(self.folder / "topk_weights.zarr", like=tokens)
        return dask_ep.expert_parallel(
            tokens, routing, self.experts, topk_weights=weights, world_size=world_size
        )


def matrix_shapes(layer: Layer) -> list[tuple[int, int]]:
    if layer.hidden is None:
        return [(layer.d, layer.d)]
    return [(layer.d, layer.hidden), (layer.d, layer.hidden), (layer.hidden, layer.d)]


def write_experts(layer: Layer, folder: Path) -> dask_ep.Experts:
    """Write the experts, one file for each kind of matrix."""
    rng = np.random.default_rng(1)
    files = [folder / f"w{n}.npy" for n in range(len(matrix_shapes(layer)))]
    for file, shape in zip(files, matrix_shapes(layer), strict=True):
        W = rng.standard_normal((layer.num_experts, *shape), "f4") / np.float32(shape[0] ** 0.5)
        np.save(file, W)
    return dask_ep.Experts.linear(*files) if len(files) == 1 else dask_ep.Experts.gated(*files)


def write_inputs(layer: Layer, folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Write tokens, routing with Zipf-skewed popularity, and weights as Zarr; return the arrays."""
    rng = np.random.default_rng(0)
    tokens = rng.standard_normal((layer.rows, layer.d), "f4")
    popularity = np.log((1.0 + np.arange(layer.num_experts)) ** -layer.zipf).astype("f4")
    scores = popularity + rng.gumbel(size=(layer.rows, layer.num_experts)).astype("f4")
    routing = np.argpartition(-scores, layer.k - 1, axis=1)[:, : layer.k].astype("i4")
    weights = rng.random((layer.rows, layer.k), "f4")
    for name, array in {"tokens": tokens, "routing": routing, "topk_weights": weights}.items():
        zarr.create_array(
            folder / f"{name}.zarr",
            data=array,
            chunks=(layer.chunk_rows, array.shape[1]),
            compressors=None,
        )
    return tokens, routing, weights


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def cpu_timed(run: Callable[[], object]) -> float:
    """Return the CPU seconds of this thread that a function takes."""
    start = time.thread_time()
    run()
    return time.thread_time() - start


def peak_of_tree(
    process: subprocess.Popen, look: Callable[[list[psutil.Process]], None] = lambda _: None
) -> int:
    """Wait for a process; return the peak memory in bytes of it and its descendants together.

    Parameters
    ----------
    process : just started
    look : called repeatedly with all these processes
    """
    root, peak = psutil.Process(process.pid), 0
    while process.poll() is None:
        with suppress(psutil.NoSuchProcess, FileNotFoundError):
            tree = [root, *root.children(recursive=True)]
            peak = max(peak, highest(root.pid), sum(one.memory_info().rss for one in tree))
            look(tree)
        time.sleep(0.1)  # more often, it would slow the processes down
    return peak


def highest(process: int) -> int:
    """Return the most bytes that a running process has had so far."""
    words = Path(f"/proc/{process}/status").read_text().split()
    return 1024 * int(words[words.index("VmHWM:") + 1]) if "VmHWM:" in words else 0


def table(rounds: list[dict[str, float]]) -> str:
    """Format the median and range of each ratio over the rounds; a ratio above 1 is a failure."""
    lines = ["| what | ratio to its limit | range |", "|---|---|---|"]
    for what in sorted(rounds[0]):
        values = sorted(r[what] for r in rounds)
        above = sum(value > 1 for value in values)
        median = f"{statistics.median(values):.2f}"
        result = f"failed, {above} of {len(values)} are above 1" if above else median
        lines.append(f"| {what} | {result} | {values[0]:.2f} to {values[-1]:.2f} |")
    return "\n".join(lines)
