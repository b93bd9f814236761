"""How much longer does a job take if its experts are several times larger than memory?

    python workflows/larger_experts.py --directory /fast/disk      # 12 GB in 3 GB
    python workflows/larger_experts.py --processes 2 --memory-limit 1300MB --kill
    python workflows/larger_experts.py --rows 1500 --d 256 --hidden 2048 --experts 32 \
        --memory-limit 450MB --threads 1

Makes a job of gated bfloat16 experts and skewed routing, runs it under a memory limit, and prints
ratios to a limit taken on the same files and threads, each with one BLAS thread:

    limit       the products of the same FLOPs on matrices in cache (a sample of them, scaled)
                + the bytes of all experts read once + the token file copied
    dask_ep     dask-ep run --memory-limit, the peak memory of its process tree, and how many
                experts it read; with --kill one worker is killed when half of them are read
    reread      a plain loop over experts, which reads the whole token file again for each; scaled
                from a few experts
    resident    fewer experts and rows: dask-ep run without a limit, all experts in memory

Files are dropped from the page cache before they are read, as far as the system allows it. Needs
psutil, and disk for experts, tokens, output, and waiting rows: about 21 GB by default.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import dask
import ml_dtypes
import numpy as np
import psutil
from dask.utils import format_bytes, parse_bytes
from measured import peak_of_tree, timed

from dask_ep.arrays.blas import one_blas_thread, product
from dask_ep.graph.expert_schedule import READS
from dask_ep.storage import journal
from dask_ep.storage.safetensors_header import encode_header
from dask_ep.storage.sources import open_source

CHUNK_BYTES = 32 << 20
MATRICES = ("gate", "up", "down")
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True)
class Layer:
    """The sizes of a job of gated experts."""

    rows: int
    d: int
    hidden: int
    experts: int
    k: int

    @property
    def expert_bytes(self) -> int:
        """Bytes of all experts, as stored."""
        return 3 * self.d * self.hidden * self.experts * BFLOAT16.itemsize

    @property
    def token_bytes(self) -> int:
        return self.rows * self.d * 4

    @property
    def chunk_rows(self) -> int:
        return max(CHUNK_BYTES // (4 * self.d), 1)

    def shape(self, matrix: str) -> tuple[int, int]:
        return (self.hidden, self.d) if matrix == "down" else (self.d, self.hidden)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=250_000)
    parser.add_argument("--d", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--k", type=int, default=1, help="experts per row")
    parser.add_argument("--memory-limit", type=parse_bytes, default="3GB")
    parser.add_argument("--threads", type=int, default=dask.system.CPU_COUNT)
    parser.add_argument("--processes", type=int, help="worker processes, each with the limit")
    parser.add_argument("--kill", action="store_true", help="kill one of them during the run")
    parser.add_argument(
        "--sample", type=float, default=0.1, help="fraction of the products to time"
    )
    parser.add_argument("--directory", help="directory for temporary files")
    args = parser.parse_args()
    if args.kill and not args.processes:
        parser.error("--kill kills a worker process, so it needs --processes")
    layer = Layer(args.rows, args.d, args.hidden, args.experts, args.k)
    limit = args.memory_limit
    where = ["--threads", str(args.threads)]
    if args.processes:
        where = ["--processes", str(args.processes)]
    with (
        tempfile.TemporaryDirectory(dir=args.directory) as folder,
        one_blas_thread(),
    ):
        bench = Bench(layer, Path(folder), args.threads, where, limit)
        print(f"{layer}: {format_bytes(layer.expert_bytes)} of experts as stored, "
              f"{format_bytes(layer.token_bytes)} of tokens, {' '.join(where)}, "
              f"limit {limit / 1e9:.3g} GB", flush=True)  # fmt: skip
        print(bench.table(args.sample, args.kill), flush=True)


class Bench:
    """One job's files, and all measurements on them."""

    def __init__(self, layer: Layer, folder: Path, threads: int, where: list[str], limit: int):
        self.layer, self.folder, self.threads = layer, folder, threads
        self.where, self.limit = where, limit
        write_experts(layer, folder)
        self.routing, self.topk_weights = write_rows(layer, folder)
        write_job(layer, folder, "job")

    def table(self, sample: float, kill: bool = False) -> str:
        """Measure once, with the limit timed before and after, and return the ratios."""
        layer = self.layer
        before = self.limit_parts(sample)
        seconds, peak = self.run("job", ["--memory-limit", str(self.limit)], kill)
        passes = json.loads((self.folder / "job.zarr.progress/manifest.json").read_text())
        passes, reads = passes["settings"].get("passes"), self.reads("job")
        self.verify("job")
        after = self.limit_parts(sample)
        parts = {name: (before[name] + after[name]) / 2 for name in before}
        whole = sum(parts.values())
        small = replace(
            layer, rows=max(layer.rows // 8, 1), experts=max(layer.experts // 4, layer.k)
        )
        write_job(small, self.folder, "small")
        resident, resident_peak = self.run("small", [])
        passing, passing_peak = self.run("small", ["--memory-limit", str(self.limit)])
        way = (
            "all experts fit" if passes is None else f"{passes['way']}, passes: {passes['passes']}"
        )
        shares = ", ".join(f"{name} {100 * part / whole:.0f} %" for name, part in parts.items())
        read = f"{sum(reads.values())}, each at most {max(reads.values(), default=0)} times"
        lines = [
            f"limit: {shares}; {whole:.1f} s",
            "| what | time / limit | peak memory | experts read |",
            "|---|---|---|---|",
            f"| dask_ep ({way}) | {seconds / whole:.2f} | {peak / 1e9:.2f} GB | {read} |",
            f"| tokens reread for each expert | {self.reread() / whole:.2f} | | |",
            "",
            f"{small.experts} experts, {small.rows} rows:",
            "| what | time / time with all experts in memory | peak memory |",
            "|---|---|---|",
            f"| all in memory | 1.00 | {resident_peak / 1e9:.2f} GB |",
            f"| within the limit | {passing / resident:.2f} | {passing_peak / 1e9:.2f} GB |",
        ]
        return "\n".join(lines)

    # --- the limit ---

    def limit_parts(self, sample: float) -> dict[str, float]:
        """Return the seconds of the unavoidable work."""
        self.drop_cache()
        return {
            "products": timed(lambda: self.products(sample)) / sample,
            "reading experts": timed(self.read_experts),
            "copying tokens": timed(self.copy_tokens),
        }

    def products(self, sample: float) -> None:
        """Multiply dense blocks with a fraction of the job's FLOPs, each of a good size."""
        layer, rows = self.layer, 1024
        rng = np.random.default_rng(0)
        share = sample * layer.rows * layer.k / self.threads

        def work(thread: int) -> None:
            x = rng.standard_normal((rows, layer.d), "f4")
            W = {name: np.full(layer.shape(name), 1e-2, "f4") for name in MATRICES}
            hidden = [np.full((rows, layer.hidden), 1e-2, "f4") for _ in range(2)]
            out, done = np.empty((rows, layer.d), "f4"), 0.0
            while done < share:
                m = max(int(min(rows, share - done)), 1)
                product(x[:m], W["gate"], out=hidden[0][:m])
                product(x[:m], W["up"], out=hidden[1][:m])
                product(hidden[0][:m], W["down"], out=out[:m])
                done += m

        self.on_threads(work, range(self.threads))

    def read_experts(self) -> None:
        buffers = threading.local()

        def read(path: Path) -> None:
            if not hasattr(buffers, "bytes"):
                buffers.bytes = bytearray(path.stat().st_size)
            with path.open("rb", buffering=0) as file:
                file.readinto(buffers.bytes)

        self.on_threads(read, sorted(self.folder.glob("expert-*.safetensors")))

    def copy_tokens(self) -> None:
        layer, target = self.layer, self.folder / "copy.npy"
        step = layer.chunk_rows * layer.d * 4
        buffers = threading.local()
        with (self.folder / "tokens.npy").open("rb") as source, target.open("wb") as copy:

            def copy_part(start: int) -> None:
                if not hasattr(buffers, "bytes"):
                    buffers.bytes = bytearray(step)
                got = os.preadv(source.fileno(), [buffers.bytes], start)
                os.pwrite(copy.fileno(), memoryview(buffers.bytes)[:got], start)

            self.on_threads(copy_part, range(0, layer.token_bytes, step))
        target.unlink()

    # --- what is measured ---

    def run(self, name: str, options: list[str], kill: bool = False) -> tuple[float, int]:
        """Return the seconds and peak bytes of the command; with `kill`, kill a worker halfway."""
        self.drop_cache()
        command = [sys.executable, "-m", "dask_ep", "run", str(self.folder / f"{name}.toml")]
        start = time.perf_counter()

        def look(tree: list[psutil.Process]) -> None:
            nonlocal kill
            if kill and sum(self.reads(name).values()) > self.layer.experts // 2:
                kill = max(tree[1:], key=lambda one: one.memory_info().rss).kill()

        with subprocess.Popen(
            [*command, *self.where, *options, "--overwrite"], stderr=subprocess.DEVNULL
        ) as process:
            peak = peak_of_tree(process, look)
        if process.returncode:
            raise SystemExit(f"{name} failed: run {' '.join(command)} to see why")
        return time.perf_counter() - start, peak

    def reads(self, name: str) -> Counter[int]:
        """Return how often a run in passes read each expert."""
        progress = self.folder / f"{name}.zarr.progress"
        if not progress.exists():
            return Counter()
        return journal.count_done(str(progress), READS, what=READS)

    def verify(self, name: str) -> None:
        job = str(self.folder / f"{name}.toml")
        subprocess.run(
            [sys.executable, "-m", "dask_ep", "verify", job, "--rows", "100"], check=True
        )

    def reread(self) -> float:
        """Return the seconds of a loop over experts that reads all tokens for each, scaled."""
        layer = self.layer
        some = np.linspace(0, layer.experts - 1, min(layer.experts, 4)).astype(int)
        tokens = open_source(str(self.folder / "tokens.npy"))
        out = np.lib.format.open_memmap(
            self.folder / "reread.npy", "w+", np.float32, (layer.rows, layer.d)
        )
        starts = range(0, layer.rows, layer.chunk_rows)

        def serve(part: tuple[int, dict[str, np.ndarray], int]) -> None:
            expert, W, start = part
            stop = min(start + layer.chunk_rows, layer.rows)
            x = tokens.read(start, stop)
            rows, slot = np.nonzero(self.routing[start:stop] == expert)
            taken = x[rows]
            gate = taken @ W["gate"]
            y = (gate / (1 + np.exp(-gate)) * (taken @ W["up"])) @ W["down"]
            out[start + rows] += self.topk_weights[start:stop][rows, slot][:, None] * y

        def loop() -> None:
            for expert in some.tolist():
                W = {
                    name: open_source(str(self.folder / f"expert-{expert:04d}-{name}.safetensors"))
                    .read(0, layer.shape(name)[0])
                    .astype("f4")
                    for name in MATRICES
                }
                self.on_threads(serve, [(expert, W, start) for start in starts])

        self.drop_cache()
        return timed(loop) * layer.experts / len(some)

    # --- helpers ---

    def drop_cache(self) -> None:
        """Ask the system to drop the files from the page cache."""
        os.sync()
        for path in self.folder.rglob("*"):
            if path.is_file() and hasattr(os, "posix_fadvise"):
                with path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def on_threads(self, work: Callable, parts: object) -> None:
        with ThreadPoolExecutor(self.threads) as pool:
            list(pool.map(work, parts))


# --- the job ---------------------------------------------------------------------------------


def write_experts(layer: Layer, folder: Path) -> None:
    """Write one file per matrix of each expert; experts are slices of one random array."""
    size = layer.d * layer.hidden
    rng = np.random.default_rng(0)
    numbers = rng.standard_normal(size + 64 * layer.experts, "f4")
    for name in MATRICES:
        scaled = (numbers / np.sqrt(layer.shape(name)[0], dtype="f4")).astype(BFLOAT16)
        for expert in range(layer.experts):
            with (folder / f"expert-{expert:04d}-{name}.safetensors").open("wb") as file:
                file.write(encode_header({name: (layer.shape(name), BFLOAT16)}))
                file.write(scaled[64 * expert : 64 * expert + size].view(np.uint16).data)


def write_rows(layer: Layer, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Write tokens, chunk by chunk, a realistically skewed routing, and weights."""
    rng = np.random.default_rng(1)
    popularity = np.log((1.0 + np.arange(layer.experts)) ** -0.7).astype("f4")
    popularity = rng.permutation(popularity)
    routing = np.empty((layer.rows, layer.k), np.int32)
    topk_weights = rng.random((layer.rows, layer.k), "f4")
    chunk = rng.standard_normal((layer.chunk_rows, layer.d), "f4")
    with (folder / "tokens.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "<f4", "fortran_order": False, "shape": (layer.rows, layer.d)}
        )
        for start, stop in spans(layer):
            scores = popularity + rng.gumbel(size=(stop - start, layer.experts)).astype("f4")
            routing[start:stop] = np.argsort(-scores, axis=1)[:, : layer.k]
            file.write(np.roll(chunk, start // layer.chunk_rows, axis=1)[: stop - start].data)
    np.save(folder / "routing.npy", routing)
    np.save(folder / "topk_weights.npy", topk_weights)
    return routing, topk_weights


def write_job(layer: Layer, folder: Path, name: str) -> None:
    """Write a job over the first rows and experts."""
    keys = {"tokens": "tokens", "routing": "routing", "topk_weights": "topk_weights"}
    whole = np.load(folder / "routing.npy", mmap_mode="r")
    if len(whole) > layer.rows:
        keys = {key: f"{name}-{key}" for key in keys}
        for key in keys:
            part = np.load(folder / f"{key}.npy", mmap_mode="r")[: layer.rows]
            np.save(
                folder / f"{name}-{key}.npy", part % layer.experts if key == "routing" else part
            )
    lines = [f'{key} = "{file}.npy"' for key, file in keys.items()]
    lines += [f'out = "{name}.zarr"', "[experts]", 'kind = "gated"']
    for matrix in MATRICES:
        files = [f"expert-{e:04d}-{matrix}.safetensors" for e in range(layer.experts)]
        lines.append(f"{matrix} = {json.dumps(files)}")
    (folder / f"{name}.toml").write_text("\n".join(lines))


def spans(layer: Layer) -> Iterator[tuple[int, int]]:
    for start in range(0, layer.rows, layer.chunk_rows):
        yield start, min(start + layer.chunk_rows, layer.rows)


if __name__ == "__main__":
    main()
