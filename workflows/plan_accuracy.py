"""How accurate are plans, compared with their runs?

    python workflows/plan_accuracy.py               # twenty-one jobs: five minutes
    python workflows/plan_accuracy.py --scale 0.02 --only threads-linear

Jobs of many sizes, half on threads and half on worker processes, are each planned and run in their
own process; in the last one a rank, and therefore the run, is ten times slower than planned. Prints
a table in Markdown: tasks, rows of each rank and bytes between workers are counted and must equal
the plan (bytes are planned for the workers that had the chunks); peak memory and time are divided
by the planned ones. Exit code 1 if anything that must be equal is not, or if a process took more
memory than planned, or less than half of it, since a plan that is far too high refuses jobs that
would fit. With --scale below 1, chunks are not full, and that lower bound is not checked.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from distributed import Client

from dask_ep.graph import chunk
from dask_ep.jobs.backends import Processes, Threads
from dask_ep.jobs.example import JOB_NAME, Example, write_example
from dask_ep.jobs.job import load_job
from dask_ep.jobs.run import run_job
from dask_ep.pricing.price import Plan
from dask_ep.pricing.trace import Record


@dataclass(frozen=True)
class Case:
    """A job, and where it runs."""

    rows: int
    d: int
    experts: int
    k: int
    chunk_rows: int
    kind: str = "linear"
    hidden: int | None = None
    threads: int | None = None
    processes: int | None = None
    ranks: int | None = None
    #: None: one on threads, one per process
    placement: str = "contiguous"
    format: str = "npy"
    slower: float = 1.0
    #: how much longer rank 0 takes than its experts

    def example(self) -> Example:
        return Example(
            rows=self.rows,
            d=self.d,
            num_experts=self.experts,
            k=self.k,
            kind=self.kind,
            hidden=self.hidden,
            chunk_rows=self.chunk_rows,
            format=self.format,
        )


CASES = {
    "threads-linear": Case(160_000, 1024, 8, 1, 8192, threads=2),
    "threads-one": Case(80_000, 1024, 8, 1, 8192, threads=1),
    "threads-zarr": Case(160_000, 1024, 16, 2, 8192, threads=2, format="zarr"),
    "threads-gated": Case(48_000, 512, 8, 2, 8192, "gated", 2048, threads=2),
    "threads-small-experts": Case(32_000, 512, 128, 8, 8192, "gated", 256, threads=2),
    "threads-wide": Case(40_000, 4096, 4, 1, 2048, threads=2),
    "threads-narrow": Case(600_000, 128, 16, 2, 32_768, "gated", 256, threads=2),
    "threads-4-ranks": Case(120_000, 1024, 16, 2, 8192, threads=2, ranks=4),
    "threads-8-ranks": Case(
        40_000, 512, 64, 4, 4096, "gated", 512, threads=2, ranks=8, placement="exact"
    ),
    "threads-many-chunks": Case(120_000, 512, 16, 2, 1024, threads=2, ranks=2),
    "processes-linear": Case(120_000, 1024, 8, 1, 8192, processes=2),
    "processes-k2": Case(100_000, 1024, 16, 2, 8192, processes=2),
    "processes-gated": Case(40_000, 512, 8, 2, 8192, "gated", 2048, processes=2),
    "processes-small-experts": Case(24_000, 512, 128, 8, 8192, "gated", 256, processes=2),
    "processes-balanced": Case(
        48_000, 512, 64, 2, 4096, "gated", 1024, processes=2, placement="balanced"
    ),
    "processes-exact": Case(
        48_000, 512, 64, 2, 4096, "gated", 1024, processes=4, placement="exact"
    ),
    "processes-3": Case(100_000, 768, 12, 2, 4096, processes=3, format="zarr"),
    "processes-8-ranks": Case(80_000, 1024, 16, 2, 4096, processes=2, ranks=8),
    "processes-one": Case(80_000, 1024, 8, 1, 4096, processes=1),
    "processes-many-chunks": Case(60_000, 512, 16, 2, 1024, processes=2),
    "processes-slow-rank": Case(48_000, 512, 16, 2, 4096, processes=3, slower=10.0),
}


LEAST_PART = 0.5
"""Smallest fraction of the planned memory that peak memory may be: below it a plan is too high."""


class Outcome(NamedTuple):
    """The results of one job, as plain data, since they come from another process."""

    tasks: tuple[int, int]
    #: planned, counted
    rows_equal: bool
    #: whether the rows of every rank are as planned
    exchanged: tuple[int, int]
    memory: tuple[int, int]
    #: bytes: planned, measured
    seconds: tuple[float, float]
    moved: int
    #: ranks that got other owners during the run, whose traffic no plan predicts

    @property
    def equal(self) -> bool:
        """Whether tasks, rows and, if owners stayed, bytes are as planned."""
        as_planned = self.exchanged[0] == self.exchanged[1] or self.moved
        return bool(self.tasks[0] == self.tasks[1] and self.rows_equal and as_planned)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", default=list(CASES), help=", ".join(CASES))
    parser.add_argument("--scale", type=float, default=1.0, help="factor for the rows of each job")
    parser.add_argument("--directory", help="directory for temporary files")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a case as JSON, in its own process
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(plan_and_run(Case(**json.loads(options.one)), Path(options.directory))))
        return 0
    print("| job | tasks | rows of ranks | exchanged | peak / planned | time / planned |")
    print("|---|---|---|---|---|---|")
    outcomes = []
    for name in options.only:
        case = CASES[name]
        case = replace(case, rows=max(int(case.rows * options.scale), 64))
        with tempfile.TemporaryDirectory(dir=options.directory) as folder:
            write_example(folder, case.example())
            outcomes.append(in_a_process(case, folder))
        print(f"| {name} | {spell(outcomes[-1])} |", flush=True)
    return tell(outcomes, least=LEAST_PART if options.scale >= 1 else 0.0)


def in_a_process(case: Case, folder: str) -> Outcome:
    arguments = ["--one", json.dumps(asdict(case)), "--directory", folder]
    done = subprocess.run(
        [sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True, check=True
    )
    return Outcome(*json.loads(done.stdout))


def plan_and_run(case: Case, folder: Path) -> Outcome:
    """Plan a job, run it, and compare."""
    job = load_job(folder / JOB_NAME, world_size=case.ranks, placement=case.placement)
    where = Threads(case.threads) if case.processes is None else Processes(case.processes)
    records: list[tuple[Plan, Record]] = []
    done = run_job(
        job,
        where,
        chunk_rows=case.chunk_rows,
        on_record=lambda *both: records.append(both),
        on_client=partial(slow_down, factor=case.slower) if case.slower > 1 else None,
    )
    ((planned, record),) = records
    received = planned.packet_rows.sum(axis=0)
    homes = record.homes() if planned.workers > 1 else dict.fromkeys(range(len(planned.chunks)), 0)
    return Outcome(
        (planned.tasks, record.tasks),
        record.received_rows() == dict(enumerate(received.tolist())),
        (
            planned.exchanged_at([homes[chunk] for chunk in range(len(planned.chunks))]),
            record.exchanged_bytes,
        ),
        (planned.memory_bytes, record.peak_bytes),
        (planned.seconds, done.seconds),
        sum(event.time > 0 and event.what.startswith("rank ") for event in record.events),
    )


def slow_down(client: Client, factor: float) -> None:
    """Make rank 0 take that many times as long, on every worker."""
    client.run(take_longer, factor)


def take_longer(factor: float) -> None:
    answer_of_rank = chunk.answer_of_rank

    def slow(*arguments: Any) -> np.ndarray:
        start = time.perf_counter()
        answer = answer_of_rank(*arguments)
        if arguments[4] == 0:
            time.sleep((factor - 1) * (time.perf_counter() - start))
        return answer

    chunk.answer_of_rank = slow


def spell(outcome: Outcome) -> str:
    planned, counted = outcome.tasks
    tasks = f"{counted:,}" if planned == counted else f"{counted:,}, planned {planned:,}"
    there, measured = outcome.exchanged
    exchanged = (
        f"{there / 1e6:,.0f} MB" if there == measured else f"{measured:,}, planned {there:,}"
    )
    if not there:
        exchanged = "none"
    if outcome.moved:
        exchanged += f" ({outcome.moved} changes of owners)"
    rows = "equal" if outcome.rows_equal else "DIFFERENT"
    memory = f"{outcome.memory[1] / 1e6:,.0f} / {outcome.memory[0] / 1e6:,.0f} MB"
    memory += f" = {outcome.memory[1] / outcome.memory[0]:.2f}"
    seconds = f"{outcome.seconds[1]:.2f} / {outcome.seconds[0]:.2f} s"
    seconds += f" = {outcome.seconds[1] / outcome.seconds[0]:.2f}"
    return f"{tasks} | {rows} | {exchanged} | {memory} | {seconds}"


def tell(outcomes: list[Outcome], least: float) -> int:
    """Print a summary; return 1 if counts differ, or peak over planned memory is not in
    [least, 1]."""
    equal = sum(outcome.equal for outcome in outcomes)
    memory = [o.memory[1] / o.memory[0] for o in outcomes]
    time = [o.seconds[1] / o.seconds[0] for o in outcomes]
    near = sum(1 / 1.5 <= ratio <= 1.5 for ratio in time)
    print(
        f"\ntasks, rows and bytes are equal in {equal} of {len(outcomes)} jobs; peak memory is "
        f"{min(memory):.2f} to {max(memory):.2f} of what was planned, time {min(time):.2f} to "
        f"{max(time):.2f}, within a factor of 1.5 in {near} of {len(outcomes)}"
    )
    within = min(memory) >= least and max(memory) <= 1
    return 0 if equal == len(outcomes) and within else 1


if __name__ == "__main__":
    sys.exit(main())
