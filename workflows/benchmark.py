"""How close do the kernel and the pipeline come to the limits of the machine?

    python workflows/benchmark.py                      # the three layers at full size, minutes
    python workflows/benchmark.py --rows 4096 --repeat 1 top1-linear

Prints ratios, never bare seconds: each is a limit divided by a measured time, both taken in the
same run on the same threads with one BLAS thread each; median and range over the rounds. Limits are
timed at both ends of each round, and the shortest time of all is the limit. The order of
measurements is reversed in each round.

    kernel     the dense products of the same FLOPs / expert_parallel_dispatch
    pipeline   (the same products + a plain copy of the same files) / Zarr to Zarr

The products are those of the fastest library in this environment, NumPy's own, MKL or oneDNN, in
blocks of the best number of rows for it. Before each measurement, inputs are read and previous
outputs are flushed to disk, so that both sides read and write through the page cache. A ratio above
1 means that the limit was measured wrongly: that line shows "failed" instead of a median.

Below each table stands how one thread's time in the kernel divides into steps, for one chunk.

The pipeline runs on threads, on worker processes, and through Dask's own `from_zarr` and `store`.
They are compared with what a user would write instead: a careful NumPy loop over experts that
reuses its buffers, one `map_blocks` with all experts inside, and R zero-filled outputs summed,
which read and write through `zarr` and Dask.
"""

from __future__ import annotations

import cProfile
import pstats
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from math import inf
from pathlib import Path

import dask
import dask.array as da
import numpy as np
import zarr
from distributed import Client
from measured import Job, Layer, matrix_shapes, parse_options, table, timed

import dask_ep
from dask_ep.arrays.blas import cpu_name, installed_mkl, multiplies_by, numpys_blas, one_blas_thread
from dask_ep.arrays.onednn import installed_onednn
from dask_ep.kernel.expert import Linear
from dask_ep.kernel.host_kernel import add_rows, assign_rows, gather
from dask_ep.kernel.kinds import Gated

RANKS_OF_THE_LITERAL_PIPELINE = 4

BLOCKS = (1024, 4096, 16_384)
"""Numbers of rows that are tried for the limit's products; the fastest is used."""

PART = 8
"""The search for the fastest products uses 1 / PART of the job's rows."""

LIMITS = ("products", "copy")

STEPS = {
    "products": (Linear.__call__,),
    "activation, gate times up": (Gated._apply_gate,),
    "gathering rows": (gather,),
    "adding or writing rows": (add_rows, assign_rows),
}
"""The functions that do each step of the kernel; none is called within another one."""

COPIES = 3
"""Repetitions of a plain copy per measurement, of which the fastest counts: a copy takes several
times as long if the page cache has to grow."""

Multiply = Callable[[np.ndarray, np.ndarray, np.ndarray], object]
"""(x, w, out): writes the product of two matrices to a third."""


def main() -> None:
    options, layers = parse_options(__doc__, "--threads")
    print(f"{cpu_name()}; {options.threads} threads or processes, one BLAS thread each")
    print(f"dask_ep multiplies by {multiplies_by()}; medians of {options.repeat} rounds")
    for name, layer in layers.items():
        with tempfile.TemporaryDirectory(dir=options.directory) as folder:
            measure(name, layer, Path(folder), options.threads, options.repeat)


def measure(name: str, layer: Layer, folder: Path, threads: int, repeat: int) -> None:
    """Print the ratios of all rounds, and the steps of the kernel."""
    workers = {"n_workers": threads, "threads_per_worker": 1, "dashboard_address": ":0"}
    with (
        one_blas_thread(),
        Client(**workers) as client,
        dask_ep.own_experts(client, world_size=threads),
        dask.config.set(scheduler="threads", num_workers=threads),
    ):
        bench = Bench(layer, folder, threads, client)
        print(f"\n{name}: {layer}\nlimit: products by {bench.fastest}", flush=True)
        print(table(bench.rounds(repeat)))
        steps = ", ".join(f"{step} {part:.1%}" for step, part in bench.steps().items())
        print(f"\nof the kernel's time on one thread: {steps}", flush=True)


class Bench(Job):
    """All measurements on a job."""

    def __init__(self, layer: Layer, folder: Path, threads: int, client: Client):
        super().__init__(layer, folder, client, threads)
        self.local = self.experts.load()
        self.fastest, self.multiply, self.block = self.find_fastest()

    def rounds(self, repeat: int) -> list[dict[str, float]]:
        """Return the ratios of each round, to the best limits of all rounds."""
        self.check_results_agree(self.pipelines(), "pipeline, threads", self.layer.chunk_rows)
        rounds = [self.round(backwards=n % 2 == 1) for n in range(repeat + 1)][1:]
        products, copy = (min(times.pop(what) for times in rounds) for what in LIMITS)
        limits = {name: products if name == "kernel" else products + copy for name in rounds[0]}
        return [{name: limits[name] / seconds for name, seconds in r.items()} for r in rounds]

    def round(self, backwards: bool) -> dict[str, float]:
        """Return the seconds of all measurements, made once, with the limits at both ends."""
        seconds = (
            lambda: timed(self.products),
            lambda: min(self.timed_output(self.copy) for _ in range(COPIES)),
        )
        limits = dict(zip(LIMITS, seconds, strict=True))
        runs = {"kernel": lambda: timed(self.kernel)} | {
            name: lambda run=run: self.timed_output(run) for name, run in self.pipelines().items()
        }
        ordered = list(runs.items())[:: -1 if backwards else 1]
        times: dict[str, float] = {}
        for name, time_it in [*limits.items(), *ordered, *limits.items()]:
            times[name] = min(time_it(), times.get(name, inf))
        return times

    def pipelines(self) -> dict[str, Callable[[Path], None]]:
        """Return the programs that go from files to files."""
        return {
            "pipeline, threads": self.by_threads,
            "pipeline, threads, from_zarr and store": self.by_dask,
            "pipeline, processes": self.by_processes,
            "instead: NumPy loop over experts": self.numpy_loop,
            "instead: one map_blocks": self.one_map_blocks,
            "instead: R outputs summed": self.outputs_summed,
        }

    # --- limits ---

    def find_fastest(self) -> tuple[str, Multiply, int]:
        """Return the library that multiplies fastest here, and its best rows per block."""
        libraries: dict[str, Multiply] = {numpys_blas(): lambda x, w, out: np.matmul(x, w, out=out)}
        if (mkl := installed_mkl()) is not None:
            libraries["MKL"] = mkl.multiply
        if (onednn := installed_onednn()) is not None:
            libraries[str(onednn)] = onednn.multiply
        ways = [(name, by, rows) for name, by in libraries.items() for rows in BLOCKS]
        best = [inf] * len(ways)
        for _ in range(3):
            for n, (_, multiply, block) in enumerate(ways):
                seconds = timed(lambda m=multiply, b=block: self.multiply_all(m, b, PART))
                best[n] = min(best[n], seconds)
        name, multiply, block = ways[int(np.argmin(best))]
        return f"{name}, {block} rows each", multiply, block

    def products(self) -> None:
        self.multiply_all(self.multiply, self.block)

    def multiply_all(self, multiply: Multiply, block: int, part: int = 1) -> None:
        """Multiply dense blocks with the job's FLOPs, or a part of them, on all threads."""
        layer, rng = self.layer, np.random.default_rng(0)
        W = [rng.standard_normal(shape, "f4") for shape in matrix_shapes(layer)]
        x = rng.standard_normal((block, layer.d), "f4")

        def work(share: float) -> None:
            out = [np.empty((block, w.shape[1]), "f4") for w in W]
            hidden = np.full_like(out[0], 0.1)
            done = 0
            while done < share:
                m = int(min(block, share - done))
                for w, y in zip(W, out, strict=True):
                    multiply((x if w.shape[0] == layer.d else hidden)[:m], w, y[:m])
                done += m

        self.on_threads(lambda thread: work(layer.rows * layer.k / self.threads / part))

    def copy(self, out: Path) -> None:
        """Copy the token files to output files, through one buffer per thread."""
        out.mkdir()
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
            list(pool.map(copy_one, self.token_files()))

    # --- ours ---

    def kernel(self) -> None:
        """Run the kernel on every chunk, from memory to memory."""
        chunks = list(self.chunks())

        def work(thread: int) -> None:
            for x, routing, weights in chunks[thread :: self.threads]:
                dask_ep.expert_parallel_dispatch(x, routing, self.local, 0, 1, topk_weights=weights)

        self.on_threads(work)

    def steps(self) -> dict[str, float]:
        """Return the part of the kernel's processor time that each of its steps takes."""
        x, routing, weights = next(iter(self.chunks()))
        profile = cProfile.Profile(time.thread_time)
        with profile:
            dask_ep.expert_parallel_dispatch(x, routing, self.local, 0, 1, topk_weights=weights)
        stats = pstats.Stats(profile)
        taken = {(file, line): times[3] for (file, line, _), times in stats.stats.items()}
        codes = {step: [f.__code__ for f in functions] for step, functions in STEPS.items()}
        parts = {
            step: sum(taken.get((c.co_filename, c.co_firstlineno), 0.0) for c in code)
            / stats.total_tt
            for step, code in codes.items()
        }
        parts = {step: part for step, part in parts.items() if part}
        return parts | {"everything else": 1 - sum(parts.values())}

    # --- what a user would write instead ---

    def numpy_loop(self, out: Path) -> None:
        """Batches on a thread pool; per expert a gather, products, a scatter; reused buffers."""
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
        da.store(y, self.create_output(out), lock=False)

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
        da.store(sum(ranks[1:], ranks[0]), self.create_output(out), lock=False)

    # --- helpers ---

    def on_threads(self, work: Callable[[int], None]) -> None:
        with ThreadPoolExecutor(self.threads) as pool:
            list(pool.map(work, range(self.threads)))


def plain_moe(x, routing, weights, W, first):
    """The obvious loop: for each expert, its rows through it, into a zero-filled output."""
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


if __name__ == "__main__":
    main()
