# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.6", "psutil", "dask-ep[mkl,onednn]"]
# [tool.uv.sources]
# dask-ep = { path = ".." }
# ///
"""Compare the time of a layer, from files to files, with that of a torch program on the same cores.

    python workflows/compare_with_torch.py                       # the three layers, minutes
    python workflows/compare_with_torch.py --rows 20000 --repeat 1 top1-linear

Prints which of the two is faster, and by how much: median and range of the ratio of their times
over the rounds. The order is reversed in each round. Processor seconds are those of all processes
of a program together.

    data parallel     torch: a process per core, each with all experts and a share of the chunks
                      dask_ep: a thread per core, with its own files, or `from_zarr` and `store`
    expert parallel   torch: a process per core, each with a share of the experts and of the
                      chunks; rows are sent by gloo's `all_to_all_single`, once to each process that
                      serves them, and come back as one sum
                      dask_ep: a worker process per core

Processes are already running when timing starts; reading the experts from files is included. torch
includes MKL; dask_ep uses it too on Intel CPUs, if the package ``mkl`` is installed, and oneDNN on
AMD CPUs and for bfloat16, if ``onednn-cpu-gomp`` is.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from math import ceil
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import dask
import numpy as np
import psutil
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import zarr
from distributed import Client
from measured import Job, Layer, parse_options

import dask_ep
from dask_ep.arrays.blas import cpu_name, multiplies_by, one_blas_thread


def main() -> None:
    options, layers = parse_options(__doc__, "--cores")
    print(f"{cpu_name()}, {options.cores} cores; torch {torch.__version__}")
    print(f"dask_ep multiplies by {multiplies_by()}; medians of {options.repeat} rounds")
    for name, layer in layers.items():
        print(f"\n{name}: {layer}", flush=True)
        with tempfile.TemporaryDirectory(dir=options.directory) as folder:
            print(table(measure(layer, Path(folder), options.cores, options.repeat)), flush=True)


class Took(NamedTuple):
    """Seconds that a program took."""

    wall: float
    processor: float


def measure(layer: Layer, folder: Path, cores: int, repeat: int) -> list[dict[str, Took]]:
    """Return what each program took in each round."""
    workers = {"n_workers": cores, "threads_per_worker": 1, "dashboard_address": ":0"}
    with ExitStack() as stack:
        stack.enter_context(one_blas_thread())
        client = stack.enter_context(Client(**workers))
        stack.enter_context(dask_ep.own_experts(client, world_size=cores))
        stack.enter_context(dask.config.set(scheduler="threads", num_workers=cores))
        job = Compared(layer, folder, client, cores)
        stack.callback(job.end)
        job.check_results_agree(job.ways(), "dask_ep, threads", layer.rows)
        return [job.round(backwards=n % 2 == 1) for n in range(repeat + 1)][1:]


PAIRS = (
    ("data parallel", "torch, data parallel", "dask_ep, threads"),
    ("data parallel", "torch, data parallel", "dask_ep, threads, from_zarr and store"),
    ("expert parallel", "torch, expert parallel", "dask_ep, processes"),
)


def table(rounds: list[dict[str, Took]]) -> str:
    """Format which one is faster, and by how much."""
    lines = [
        "| what | seconds | processor seconds | torch / dask_ep | range | faster |",
        "|---|---|---|---|---|---|",
    ]
    for what, theirs, ours in PAIRS:
        ratios = sorted(one[theirs].wall / one[ours].wall for one in rounds)
        ratio = statistics.median(ratios)
        faster = f"dask_ep by {ratio - 1:.0%}" if ratio > 1 else f"torch by {1 / ratio - 1:.0%}"
        seconds, processor = (
            [statistics.median(one[way][n] for one in rounds) for way in (theirs, ours)]
            for n in range(2)
        )
        lines.append(
            f"| {what}: {theirs.split(',')[0]} against {ours} | {seconds[0]:.2f}, {seconds[1]:.2f} "
            f"| {processor[0]:.2f}, {processor[1]:.2f} "
            f"| {ratio:.2f} | {ratios[0]:.2f} to {ratios[-1]:.2f} | {faster} |"
        )
    return "\n".join(lines)


class Compared(Job):
    """A job for both programs, and torch's processes."""

    def __init__(self, layer: Layer, folder: Path, client: Client, cores: int):
        super().__init__(layer, folder, client, cores)
        context = mp.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(cores):
            pipe, theirs = context.Pipe()
            arguments = (theirs, layer, folder, rank, cores)
            self.processes.append(context.Process(target=torch_process, args=arguments))
            self.processes[-1].start()
            self.pipes.append(pipe)

    def end(self) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            pipe.send(None)
            process.join()

    def round(self, backwards: bool) -> dict[str, Took]:
        ways = list(self.ways().items())[:: -1 if backwards else 1]
        return {name: self.took(run) for name, run in ways}

    def took(self, run: Callable[[Path], None]) -> Took:
        processor = 0.0

        def watched(out: Path) -> None:
            nonlocal processor
            before = processor_seconds()
            run(out)
            processor = processor_seconds() - before

        wall = self.timed_output(watched)
        return Took(wall, processor)

    def ways(self) -> dict[str, Callable[[Path], None]]:
        return {
            "torch, data parallel": lambda out: self.by_torch(False, out),
            "dask_ep, threads": self.by_threads,
            "dask_ep, threads, from_zarr and store": self.by_dask,
            "torch, expert parallel": lambda out: self.by_torch(True, out),
            "dask_ep, processes": self.by_processes,
        }

    def by_torch(self, expert_parallel: bool, out: Path) -> None:
        self.create_output(out)
        for pipe in self.pipes:
            pipe.send((expert_parallel, out))
        for pipe in self.pipes:
            pipe.recv()


def processor_seconds() -> float:
    """Return what this process and those that it started have taken so far."""
    this = psutil.Process()
    times = [process.cpu_times() for process in (this, *this.children(recursive=True))]
    return sum(each.user + each.system for each in times)


# --- the torch program -----------------------------------------------------------------------


def torch_process(pipe: Connection, layer: Layer, folder: Path, rank: int, world_size: int) -> None:
    """Run jobs, in one of torch's processes, until None is received."""
    torch.set_num_threads(1)
    where = f"file://{folder / 'rendezvous'}"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=world_size)
    while (asked := pipe.recv()) is not None:
        with torch.inference_mode():
            (expert_parallel if asked[0] else data_parallel)(layer, folder, asked[1])
        pipe.send("done")
    dist.destroy_process_group()


def data_parallel(layer: Layer, folder: Path, out: Path) -> None:
    """Send this process's share of the chunks through all experts."""
    W = load_experts(folder, 0, layer.num_experts)
    source, target = Source(layer, folder), zarr.open_array(out)
    y = torch.empty((layer.chunk_rows, layer.d))
    for step in range(source.steps):
        x, routing, weights = source.chunk(step)
        target[source.rows(step)] = serve(x, routing, weights, W, y[: len(x)]).numpy()


def expert_parallel(layer: Layer, folder: Path, out: Path) -> None:
    """Send the rows of this process's chunks to the processes of their experts, and sum."""
    size, rank = dist.get_world_size(), dist.get_rank()
    each = layer.num_experts // size
    W = load_experts(folder, rank * each, each)
    source, target = Source(layer, folder), zarr.open_array(out)
    y = torch.empty((layer.chunk_rows, layer.d))
    for step in range(source.steps):
        x, routing, weights = source.chunk(step)
        owner = routing // each
        rows = [(owner == other).any(1).nonzero().squeeze(1) for other in range(size)]
        sent, order = torch.tensor([len(r) for r in rows]), torch.cat(rows)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent)
        there, back = received.tolist(), sent.tolist()
        x_there, routing_there, weights_there = (
            exchange(a.index_select(0, order), there, back) for a in (x, routing, weights)
        )
        local = routing_there - rank * each
        served = serve(x_there, local, weights_there, W, torch.empty((len(local), layer.d)))
        answers = exchange(served, back, there)
        total = y[: len(x)].zero_()
        for other, part in zip(rows, answers.split(back), strict=True):
            total.index_add_(0, other, part)
        if len(x):
            target[source.rows(step)] = total.numpy()


def exchange(sent: torch.Tensor, come: list[int], go: list[int]) -> torch.Tensor:
    received = sent.new_empty((sum(come), *sent.shape[1:]))
    dist.all_to_all_single(received, sent, come, go)
    return received


def serve(
    x: torch.Tensor,
    routing: torch.Tensor,
    weights: torch.Tensor,
    W: list[torch.Tensor],
    out: torch.Tensor,
) -> torch.Tensor:
    """Sum over the slots of this process's experts: one sort, then one expert after the other."""
    out.zero_()
    flat = routing.reshape(-1)
    order = flat.argsort(stable=True)
    here = (flat >= 0) & (flat < len(W[0]))
    order = order[int((flat < 0).sum()) :][: int(here.sum())]
    counts = torch.bincount(flat[here], minlength=len(W[0])).tolist()
    slots = order.split(counts)
    weights = weights.reshape(-1, 1)
    for e, mine in enumerate(slots):
        if len(mine) == 0:
            continue
        rows = mine // routing.shape[1]
        y = x.index_select(0, rows)
        if len(W) == 3:
            gate, up = torch.mm(y, W[0][e]), torch.mm(y, W[1][e])
            y = torch.mm(torch.nn.functional.silu(gate, inplace=True).mul_(up), W[2][e])
        else:
            y = torch.mm(y, W[0][e])
        out.index_add_(0, rows, y.mul_(weights[mine]))
    return out


def load_experts(folder: Path, first: int, count: int) -> list[torch.Tensor]:
    return [
        torch.from_numpy(np.load(file, mmap_mode="r")[first : first + count].copy())
        for file in sorted(folder.glob("w*.npy"))
    ]


class Source:
    """The chunks of this process; all processes take as many steps, and the last may be empty."""

    def __init__(self, layer: Layer, folder: Path):
        self.layer, self.rank, self.size = layer, dist.get_rank(), dist.get_world_size()
        self.steps = ceil(ceil(layer.rows / layer.chunk_rows) / self.size)
        names = ("tokens", "routing", "topk_weights")
        self.arrays = [zarr.open_array(folder / f"{name}.zarr", mode="r") for name in names]

    def rows(self, step: int) -> slice:
        start = min((step * self.size + self.rank) * self.layer.chunk_rows, self.layer.rows)
        return slice(start, min(start + self.layer.chunk_rows, self.layer.rows))

    def chunk(self, step: int) -> list[Any]:
        tokens, routing, weights = (
            torch.from_numpy(array[self.rows(step)]) for array in self.arrays
        )
        return [tokens, routing.long(), weights]


if __name__ == "__main__":
    main()
