"""How near do the kernel and the pipeline come to what the machine can do?

    python workflows/benchmark.py                      # the three layers at full size, minutes
    python workflows/benchmark.py --rows 4096 --repeat 1 top1-linear

Prints ratios, never bare seconds: each is a limit divided by a measured time, both taken in the
same round on the same threads with one BLAS thread each, and each is the median over the rounds.

    kernel     the dense products of the same FLOPs / expert_parallel_dispatch
    pipeline   (the same products + a plain copy of the same files) / Zarr to Zarr

Beside the pipeline stands what a user would write instead: a careful NumPy loop over experts with
its buffers kept, one `map_blocks` with all experts inside, and R zero-filled outputs summed. They
read and write through `zarr` and Dask as their users do.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import dask
import dask.array as da
import numpy as np
import zarr

import dask_ep
from dask_ep.blas import one_blas_thread, product


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

    @property
    def flops(self) -> int:
        """Of the whole job."""
        width = self.d * self.d if self.hidden is None else 3 * self.d * self.hidden
        return 2 * width * self.rows * self.k


LAYERS = {
    "top1-linear": Layer(d=1024, num_experts=8, k=1, rows=262_144),
    "top2-gated": Layer(d=512, num_experts=8, k=2, hidden=2048, chunk_rows=16_384),
    "top8-small": Layer(d=512, num_experts=128, k=8, hidden=256, zipf=1.0, chunk_rows=16_384),
}
RANKS_OF_THE_LITERAL_PIPELINE = 4


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("layers", nargs="*", default=list(LAYERS), help=", ".join(LAYERS))
    parser.add_argument("--rows", type=int, help="token rows, instead of each layer's own")
    parser.add_argument("--chunk-rows", type=int, help="rows of a token chunk")
    parser.add_argument("--threads", type=int, default=dask.system.CPU_COUNT)
    parser.add_argument("--repeat", type=int, default=5, help="rounds, of which the median counts")
    parser.add_argument("--directory", help="where the files lie while this runs")
    options = parser.parse_args()
    print(f"{options.threads} threads, one BLAS thread each; medians of {options.repeat} rounds")
    for name in options.layers:
        sizes = {n: v for n in ("rows", "chunk_rows") if (v := getattr(options, n)) is not None}
        layer = Layer(**(vars(LAYERS[name]) | sizes))
        with (
            tempfile.TemporaryDirectory(dir=options.directory) as folder,
            one_blas_thread(),
            dask.config.set(scheduler="threads", num_workers=options.threads),
        ):
            bench = Bench(layer, Path(folder), options.threads)
            print(f"\n{name}: {layer}", flush=True)
            print(table(bench.rounds(options.repeat)), flush=True)


def table(rounds: list[dict[str, float]]) -> str:
    """Median, and range over the rounds, of each ratio."""
    lines = ["| what | ratio to its limit | range |", "|---|---|---|"]
    for what in rounds[0]:
        values = sorted(r[what] for r in rounds)
        lines.append(
            f"| {what} | {statistics.median(values):.2f} | {values[0]:.2f} to {values[-1]:.2f} |"
        )
    return "\n".join(lines)


class Bench:
    """One layer's data, and everything that is timed on it."""

    def __init__(self, layer: Layer, folder: Path, threads: int):
        self.layer, self.folder, self.threads = layer, folder, threads
        self.tokens, self.routing, self.topk_weights = write_inputs(layer, folder)
        self.experts = make_experts(layer)
        self.local = self.experts.load()

    def rounds(self, repeat: int) -> list[dict[str, float]]:
        self.check_results_agree()
        self.round()
        return [self.round() for _ in range(repeat)]

    def round(self) -> dict[str, float]:
        """Time everything once, limits between the others, and give the ratios."""
        products = timed(self.products)
        kernel = timed(self.kernel)
        limits = [products + self.timed_output(self.copy)]
        times = {"pipeline": self.timed_output(self.pipeline)} | {
            f"instead: {name}": self.timed_output(run) for name, run in self.alternatives().items()
        }
        limits.append(timed(self.products) + self.timed_output(self.copy))
        limit = statistics.mean(limits)  # before and after, since the machine's speed drifts
        return {"kernel": products / kernel} | {name: limit / t for name, t in times.items()}

    def alternatives(self) -> dict[str, Callable[[Path], None]]:
        return {
            "NumPy loop over experts": self.numpy_loop,
            "one map_blocks": self.one_map_blocks,
            "R outputs summed": self.outputs_summed,
        }

    # --- limits ---

    def products(self) -> None:
        """Dense products of the job's FLOPs, on all threads, each product a chunk's size."""
        layer, rng = self.layer, np.random.default_rng(0)
        rows = min(layer.chunk_rows * layer.k, 16_384)
        W = [rng.standard_normal(shape, "f4") for shape in matrix_shapes(layer)]
        x = rng.standard_normal((rows, layer.d), "f4")

        def work(share: float) -> None:
            out = [np.empty((rows, w.shape[1]), "f4") for w in W]
            hidden = np.full_like(out[0], 0.1)
            done = 0
            while done < share:
                m = int(min(rows, share - done))
                for w, y in zip(W, out, strict=True):
                    rows_in = x if w.shape[0] == layer.d else hidden
                    product(rows_in[:m], w, out=y[:m])
                done += m

        self.on_threads(lambda thread: work(layer.rows * layer.k / self.threads))

    def copy(self, out: Path) -> None:
        """Copy the token files to output files, through one buffer per thread."""
        out.mkdir()
        files = [f for f in (self.folder / "tokens.zarr").rglob("*") if f.is_file()]
        buffers = threading.local()

        def copy_one(file: Path) -> None:
            size = file.stat().st_size
            if len(getattr(buffers, "buffer", b"")) < size:
                buffers.buffer = bytearray(size)
            view = memoryview(buffers.buffer)[:size]
            with file.open("rb", buffering=0) as source:
                source.readinto(view)
            name = "-".join(file.relative_to(self.folder).parts)
            with (out / name).open("wb", buffering=0) as target:
                target.write(view)

        with ThreadPoolExecutor(self.threads) as pool:
            list(pool.map(copy_one, files))

    # --- ours ---

    def kernel(self) -> None:
        """The kernel on every chunk, from memory to memory."""
        chunks = list(self.chunks())

        def work(thread: int) -> None:
            for x, routing, weights in chunks[thread :: self.threads]:
                dask_ep.expert_parallel_dispatch(x, routing, self.local, 0, 1, topk_weights=weights)

        self.on_threads(work)

    def pipeline(self, out: Path) -> None:
        tokens = dask_ep.open_tokens(self.folder / "tokens.zarr")
        routing = dask_ep.open_tokens(self.folder / "routing.zarr", like=tokens)
        weights = dask_ep.open_tokens(self.folder / "topk_weights.zarr", like=tokens)
        y = dask_ep.expert_parallel(
            tokens, routing, self.experts, topk_weights=weights, world_size=1
        )
        dask_ep.store(y, out)

    # --- what a user would write instead ---

    def numpy_loop(self, out: Path) -> None:
        """Batches on a thread pool; per expert a gather, products, a scatter; buffers kept."""
        layer, W = self.layer, self.arrays()
        source = zarr.open_array(self.folder / "tokens.zarr")
        buffers = threading.local()
        target = self.create_output(out)

        def batch(start: int) -> None:
            stop = min(start + layer.chunk_rows, layer.rows)
            x = source[start:stop]
            if not hasattr(buffers, "out"):
                buffers.out = np.empty((layer.chunk_rows, layer.d), "f4")
                buffers.rows = np.empty((layer.chunk_rows, layer.d), "f4")
                buffers.y = np.empty((layer.chunk_rows, layer.d), "f4")
                buffers.hidden = [
                    np.empty((layer.chunk_rows, layer.hidden or 0), "f4") for _ in range(2)
                ]
            y = buffers.out[: len(x)]
            y.fill(0)
            for e in range(layer.num_experts):
                rows, slot = np.nonzero(self.routing[start:stop] == e)
                if len(rows) == 0:
                    continue
                taken, part = buffers.rows[: len(rows)], buffers.y[: len(rows)]
                np.take(x, rows, axis=0, out=taken, mode="clip")
                if layer.hidden is None:
                    np.matmul(taken, W[0][e], out=part)
                else:
                    gate, up = (h[: len(rows)] for h in buffers.hidden)
                    np.matmul(taken, W[0][e], out=gate)
                    np.matmul(taken, W[1][e], out=up)
                    up *= gate
                    np.negative(gate, out=gate)
                    np.exp(gate, out=gate)
                    gate += 1
                    up /= gate
                    np.matmul(up, W[2][e], out=part)
                part *= self.topk_weights[start:stop][rows, slot][:, None]
                y[rows] += part
            target[start:stop] = y

        with ThreadPoolExecutor(self.threads) as pool:
            list(pool.map(batch, range(0, layer.rows, layer.chunk_rows)))

    def one_map_blocks(self, out: Path) -> None:
        """All experts inside one function of a block, with NumPy's temporaries."""
        x, routing, weights = self.dask_inputs()
        y = da.map_blocks(
            plain_moe, x, routing, weights, W=self.arrays(), first=0, dtype="f4", meta=x._meta
        )
        y.to_zarr(self.create_output(out))

    def outputs_summed(self, out: Path) -> None:
        """One zero-filled output per rank, summed."""
        x, routing, weights = self.dask_inputs()
        each = self.layer.num_experts // RANKS_OF_THE_LITERAL_PIPELINE
        ranks = [
            da.map_blocks(
                plain_moe,
                x,
                routing,
                weights,
                W=[w[first : first + each] for w in self.arrays()],
                first=first,
                dtype="f4",
                meta=x._meta,
            )
            for first in range(0, self.layer.num_experts, each)
        ]
        sum(ranks[1:], ranks[0]).to_zarr(self.create_output(out))

    # --- helpers ---

    def check_results_agree(self) -> None:
        """Every way of running the job gives the same output."""
        results = {}
        for name, run in {"pipeline": self.pipeline, **self.alternatives()}.items():
            with self.output() as out:
                run(out)
                results[name] = zarr.open_array(out)[: self.layer.chunk_rows]
        scale = np.abs(results["pipeline"]).max()
        for name, result in results.items():
            error = np.abs(result - results["pipeline"]).max() / scale
            if not error < 1e-4:
                raise SystemExit(f"{name} differs from the pipeline by {error:.2g} of the largest")

    def timed_output(self, run: Callable[[Path], None]) -> float:
        with self.output() as out:
            return timed(lambda: run(out))

    @contextmanager
    def output(self) -> Iterator[Path]:
        """A fresh place for an output, removed afterwards."""
        place = self.folder / "out"
        place.mkdir()
        try:
            yield place / "out.zarr"
        finally:
            shutil.rmtree(place)

    def create_output(self, out: Path) -> zarr.Array:
        """An array like the one that our own pipeline writes."""
        layer = self.layer
        return zarr.create_array(
            out,
            shape=(layer.rows, layer.d),
            chunks=(layer.chunk_rows, layer.d),
            dtype="f4",
            compressors=None,
        )

    def arrays(self) -> list[np.ndarray]:
        return [weight.parts.array for weight in self.experts.weights.values()]

    def chunks(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        for start in range(0, self.layer.rows, self.layer.chunk_rows):
            rows = slice(start, start + self.layer.chunk_rows)
            yield self.tokens[rows], self.routing[rows], self.topk_weights[rows]

    def dask_inputs(self) -> list[da.Array]:
        names = ("tokens", "routing", "topk_weights")
        return [da.from_zarr(str(self.folder / f"{name}.zarr")) for name in names]

    def on_threads(self, work: Callable[[int], None]) -> None:
        with ThreadPoolExecutor(self.threads) as pool:
            list(pool.map(work, range(self.threads)))


def plain_moe(x, routing, weights, W, first):
    """What one writes first: for each expert, its rows through it, into a zero-filled output."""
    out = np.zeros((len(x), W[-1].shape[2]), "f4")
    for e in range(len(W[0])):
        rows, slot = np.nonzero(routing == first + e)
        taken = x[rows]
        if len(W) == 1:
            y = taken @ W[0][e]
        else:
            gate = taken @ W[0][e]
            y = (gate / (1 + np.exp(-gate)) * (taken @ W[1][e])) @ W[2][e]
        out[rows] += weights[rows, slot][:, None] * y
    return out


def matrix_shapes(layer: Layer) -> list[tuple[int, int]]:
    if layer.hidden is None:
        return [(layer.d, layer.d)]
    return [(layer.d, layer.hidden), (layer.d, layer.hidden), (layer.hidden, layer.d)]


def make_experts(layer: Layer) -> dask_ep.Experts:
    rng = np.random.default_rng(1)
    W = [
        rng.standard_normal((layer.num_experts, *shape), "f4") / np.float32(shape[0] ** 0.5)
        for shape in matrix_shapes(layer)
    ]
    return dask_ep.Experts.linear(*W) if layer.hidden is None else dask_ep.Experts.gated(*W)


def write_inputs(layer: Layer, folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, routing with Zipf-skewed popularity, and weights: as Zarr files, and in memory."""
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


def timed(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
