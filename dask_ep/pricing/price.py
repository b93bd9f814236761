"""What does one way to run a job cost?

`Plan` holds what a pass over the routing found under one placement and one chunking; every figure
follows from it by the laws of `costs`. Rows, bytes and tasks are exact, memory is an upper bound,
time is an estimate.

Axis letters: `N` rows, `k` slots per row, `E` experts, `R` ranks, `S` slots per rank, `C` chunks.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from dask.utils import format_bytes

from dask_ep.graph.pipeline import count_tasks
from dask_ep.laws import costs
from dask_ep.laws.costs import Rates, Spread
from dask_ep.laws.decision import Decision
from dask_ep.laws.memory_law import Layout, need
from dask_ep.laws.work import Work
from dask_ep.placement.policies import Placement, place

LARGEST_CHUNK = 128 << 20
"""Bytes of a token chunk above which larger ones gain nothing and cost memory."""

USUAL_CHUNK = 16 << 20
"""Bytes of a token chunk that are worth a task where experts get enough rows anyway."""

SMALLEST_CHUNK = 1 << 20
"""Bytes of a token chunk below which a task costs more than its work."""

SECONDS_THAT_COUNT = 0.1
"""Time of the scheduler below which nothing is to be gained by fewer tasks."""

ROWS_PER_PRODUCT = 256
"""Rows that an expert should get of a chunk, for its matrix product to run at full speed."""


@dataclass(frozen=True, eq=False)
class Plan:
    """What one way to run a job costs; rows, bytes and tasks are exact.

    Notes
    -----
    `traffic_rows` and `exchanged_bytes` assume that neighbouring chunks are on one worker, as Dask
    assigns them, or each at its home, where the placement is local. What each rank receives is
    exact wherever they lie, and so is `exchanged_at`.
    """

    work: Work
    decision: Decision
    #: how it will run
    placement: Placement
    chunks: tuple[int, ...]
    #: rows of each token chunk
    expert_rows: np.ndarray
    #: (E,) (row, slot) pairs of each expert
    rank_rows: np.ndarray
    #: (R,) (row, slot) pairs that each rank serves
    packet_rows: np.ndarray
    #: (C, R) rows of each chunk that each rank serves, each row once
    worker_rows: np.ndarray
    #: (C, W) those that some rank of each worker serves, rank r being on worker r % W
    rates: Rates
    numbers: Sequence[int] | None = None
    #: of the chunks; None if these are all
    own_chunk_rows: int | None = None
    #: of the tokens, where they are planned if they fit; None where chunks are not theirs

    # --- how it runs -------------------------------------------------------------------------

    @property
    def layout(self) -> Layout:
        """On what the job runs."""
        return self.decision.layout

    @property
    def workers(self) -> int:
        """Processes that serve the ranks."""
        return self.layout.serving

    @property
    def threads(self) -> int:
        """Tasks that run in each at a time."""
        return self.layout.threads

    @property
    def cores(self) -> int | None:
        """Cores that all workers share; None if each thread has its own."""
        return self.layout.cores

    @property
    def memory_limit(self) -> int | None:
        """Bytes that a worker may use."""
        return self.layout.memory_limit

    @property
    def policy(self) -> str:
        """Name of the policy, or "given"; and what travels, if not rows alone."""
        asked, travel = self.layout.placement, self.decision.travel
        name = asked if isinstance(asked, str) else "contiguous" if asked is None else "given"
        moved = travel.moves_experts and self.workers > 1
        return f"{name}, travel {travel.how}" if moved else name

    @property
    def slots_per_row(self) -> int:
        """k."""
        return self.work.slots

    # --- sizes ---------------------------------------------------------------------------

    @property
    def rows(self) -> int:
        """N."""
        return sum(self.chunks)

    @property
    def world_size(self) -> int:
        """R."""
        return self.placement.world_size

    @property
    def chunk_rows(self) -> int:
        """Rows of the largest chunk."""
        return max(self.chunks, default=0)

    @property
    def imbalance(self) -> float:
        """The largest over the mean rank_rows."""
        return float(self.rank_rows.max() / self.rank_rows.mean()) if self.rank_rows.any() else 1.0

    # --- bytes between workers -------------------------------------------------------------

    @cached_property
    def traffic_rows(self) -> np.ndarray:
        """(W, R) rows from the chunks of each worker to each rank."""
        rows = np.zeros((self.workers, self.world_size), self.packet_rows.dtype)
        np.add.at(rows, self._homes, self.packet_rows)
        return rows

    @property
    def packet_row_bytes(self) -> int:
        """Bytes of one row on its way to a worker."""
        return self.work.packet_row_bytes(self.placement.slots.size)

    @property
    def reply_row_bytes(self) -> int:
        """Bytes of one row on its way back from a rank."""
        return self.work.reply_bytes

    @property
    def exchanged_bytes(self) -> int:
        """Bytes of all packets and answers between workers."""
        return self.exchanged_at(self._homes)

    def exchanged_at(self, homes: Sequence[int]) -> int:
        """Bytes of all packets and answers with each chunk on the worker of that number, (C,).

        A row goes once to each other worker that serves it, and comes back once from each rank
        there; between a chunk and the ranks on its own worker nothing goes.
        """
        there, back = self._rows_exchanged(np.asarray(homes, int))
        return there * self.packet_row_bytes + back * self.reply_row_bytes

    def _rows_exchanged(self, homes: np.ndarray) -> tuple[int, int]:
        """Rows that go to other workers, and rows that come back."""
        there = self.worker_rows[homes[:, None] != np.arange(self.workers)]
        back = self.packet_rows[homes[:, None] != np.arange(self.world_size) % self.workers]
        return int(there.sum()), int(back.sum())

    @cached_property
    def _homes(self) -> np.ndarray:
        """(C,) the number of the worker where each chunk lies."""
        if self.placement.local:
            numbers = range(len(self.chunks)) if self.numbers is None else self.numbers
            return np.array([self.placement.home(c) for c in numbers], int) % self.workers
        return costs.homes(len(self.chunks), self.workers)

    # --- memory ----------------------------------------------------------------------------

    @property
    def rank_experts(self) -> np.ndarray:
        """(R,) experts that each rank holds."""
        return (self.placement.slots >= 0).sum(axis=1)

    @property
    def has_ranks(self) -> bool:
        """Whether ranks hold experts, to which rows go."""
        return True

    @property
    def replicas(self) -> int:
        """Slots that hold an expert which another slot holds too."""
        return int(self.rank_experts.sum()) - self.placement.num_experts

    @property
    def stored_bytes(self) -> int:
        """Bytes of experts that all ranks read from their files, and workers of what all share."""
        of_ranks = int(self.rank_experts.sum()) * self.work.expert_stored
        return of_ranks + self.workers * self.work.layer.stored

    @property
    def experts_of_a_worker(self) -> int:
        """Experts in the worker that holds most."""
        return int(self._per_worker(self.rank_experts).max())

    @property
    def expert_bytes(self) -> int:
        """Bytes of experts, of shared ones and the router too, in the worker that holds most."""
        return self.need.expert_bytes

    @property
    def chunk_bytes(self) -> int:
        """Bytes of the largest token chunk, or of its output if that is larger."""
        return self.chunk_rows * self.work.row_bytes

    @property
    def spread(self) -> Spread:
        """Rows of packets and answers over those of a chunk."""
        return Spread.of(
            self.packet_rows,
            self.worker_rows,
            self.chunk_rows,
            self.slots_per_row,
            self.layout.in_process,
        )

    @property
    def chunks_held(self) -> float:
        """Token chunks that a worker holds at most."""
        return self.need.chunks

    @cached_property
    def need(self) -> costs.Need:
        """What a worker needs of memory, by the rows of a chunk, as the routing is."""
        held, as_stored = self.experts_of_a_worker, self.decision.as_stored
        return need(self.work, self.layout, as_stored, held, self.spread)

    @property
    def memory_parts(self) -> dict[str, int]:
        """Bytes that a worker uses at most, by what they are for."""
        return self.need.parts(self.chunk_rows)

    @property
    def memory_bytes(self) -> int:
        """Bytes that a worker uses at most."""
        return sum(self.memory_parts.values())

    @property
    def process_parts(self) -> dict[str, int]:
        """Bytes that its process uses at most: the same, unless it computes on a GPU."""
        return self.memory_parts

    @property
    def process_bytes(self) -> int:
        """Bytes that its process uses at most."""
        return sum(self.process_parts.values())

    @property
    def process_limit(self) -> int | None:
        """Bytes that its process may use."""
        return self.memory_limit

    @property
    def memory_figures(self) -> dict[str, tuple[int, int | None]]:
        """What is used at most, and what may be."""
        return {"memory of a worker, at most": (self.memory_bytes, self.memory_limit)}

    @property
    def places(self) -> str:
        """What serves the ranks."""
        return f"{self.workers} x {self.threads} threads"

    @property
    def fits(self) -> bool:
        """Whether it is within the limit, whatever the routing says."""
        return self.decision.fits

    # --- tasks and time ----------------------------------------------------------------------

    @property
    def tasks(self) -> int:
        """Tasks of `expert_parallel`: C + R + 1; C + 1 for one rank."""
        return count_tasks(len(self.chunks), self.world_size)

    @property
    def other_tasks(self) -> int:
        """Tasks of a layer's router, shared experts and residual."""
        return len(self.chunks) * self.work.layer.chunk_tasks + self.work.layer.tasks

    @property
    def handled_tasks(self) -> int:
        """All tasks that Dask handles. To read is part of a chunk's first task, unless several need
        what is read, as in a whole layer; to write is part of its last.
        """
        return self.tasks + self.other_tasks + len(self.chunks) * (self.other_tasks > 0)

    @property
    def scheduler_seconds(self) -> float:
        """Time that the scheduler needs for them, besides the workers' work."""
        local = self.workers == 1
        seconds = costs.LOCAL_TASK_SECONDS if local else costs.CLUSTER_TASK_SECONDS
        return self.handled_tasks * seconds

    @property
    def flops(self) -> np.ndarray:
        """(R,) floating-point operations of each rank's experts."""
        return self.rank_rows * self.work.expert_flops

    @property
    def layer_flops(self) -> int:
        """Floating-point operations of the router and of shared experts, where the chunks lie."""
        return self.rows * (self.work.layer.router_flops + self.work.layer.shared_flops)

    @property
    def load_seconds(self) -> float:
        """Time to read the experts, for the worker that reads most."""
        stored = self.experts_of_a_worker * self.work.expert_stored + self.work.layer.stored
        return stored / self.rates.read

    @property
    def busy_seconds(self) -> float:
        """Time that workers compute and copy: of the busiest one, or of all on shared cores."""
        row_bytes = (self.work.d + self.work.d_out) * self.work.dtype.itemsize
        busy = (
            self._per_worker(self.flops) / self.rates.flops
            + self._per_worker(self.rank_rows) * row_bytes / self.rates.copy
            + self._seconds_anywhere / self.workers
        )
        shared = 0.0
        if self.cores:
            scheduler = self.scheduler_seconds if self.workers > 1 else 0.0  # a process more
            shared = (float(busy.sum()) + scheduler) / self.cores
        return max(float(busy.max()) / self.threads, shared) * self._idle_at_the_end

    @property
    def _seconds_anywhere(self) -> float:
        """Work of one thread that all workers share evenly: whatever is done where chunks lie."""
        work, rates, layer = self.work, self.rates, self.work.layer
        seconds = (
            self.rows * work.d * work.dtype.itemsize / rates.read
            + self.rows * work.d_out * work.dtype.itemsize / rates.write
            # Matrix products in float64, as those of a router, take twice the time.
            + self.rows * (2 * layer.router_flops + layer.shared_flops) / rates.flops
            + self.rows * layer.row_bytes / rates.copy
        )
        if self.workers > 1 or (self.world_size > 1 and self.slots_per_row > 1):
            sent, _ = self._rows_exchanged(self._homes)
            answers = int(self.packet_rows.sum()) * self.reply_row_bytes
            seconds += (sent * self.packet_row_bytes + answers) / rates.pack
        if self.workers > 1:
            seconds += self.exchanged_bytes / rates.link
            seconds += self.handled_tasks * costs.WORKER_TASK_SECONDS
        return seconds

    @property
    def _idle_at_the_end(self) -> float:
        """Time over that without threads waiting for the last chunks; workers share those."""
        rounds = len(self.chunks) / self.threads
        return math.ceil(rounds) / rounds if self.workers == 1 and self.chunks else 1.0

    @property
    def seconds(self) -> float:
        """Time of the run, from its first task on: experts read, then the slower of workers and
        scheduler. The start of worker processes, one to three seconds, comes before.
        """
        return self.load_seconds + max(self.busy_seconds, self.scheduler_seconds)

    # --- advice ------------------------------------------------------------------------------

    @property
    def advised_chunk_rows(self) -> int:
        """Rows of a chunk that is large enough for fast products and small enough for memory."""
        row_bytes = max(self.work.d, self.work.d_out) * self.work.dtype.itemsize
        fast = max(
            ROWS_PER_PRODUCT * self.expert_rows.size // self.slots_per_row, USUAL_CHUNK // row_bytes
        )
        parallel = self.rows // (costs.CHUNKS_PER_THREAD * self.workers * self.threads)
        advised = min(fast, parallel, LARGEST_CHUNK // row_bytes)
        advised = max(advised, SMALLEST_CHUNK // row_bytes)
        if self.memory_limit is not None:
            law = self.decision.need  # by which chunks are refused
            advised = min(advised, law.rows_within(self.memory_limit))
        return max(advised, 1)

    @property
    def advice(self) -> list[str]:
        """What to change, and why; empty if nothing."""
        said = []
        if self.decision.as_stored and not self.work.as_stored:
            said.append("only so all experts fit: they are held in memory as they are stored")
        if self.own_chunk_rows is not None and self.own_chunk_rows > self.decision.chunk_rows:
            said.append(
                f"chunks of {self.decision.chunk_rows} rows, since those of the tokens, of "
                f"{self.own_chunk_rows} rows, do not fit into the memory limit: rechunk them"
            )
        advised = self.advised_chunk_rows
        far = not advised / 2 <= self.chunk_rows <= advised * 2 and self.rows > advised
        if far and (self.decision.chunks_asked or self.own_chunk_rows is not None):
            said.append(
                f"chunks of about {advised} rows instead of {self.chunk_rows}: "
                "enough rows for fast products and few tasks, within the memory and for all threads"
            )
        could_grow = len(self.chunks) > 1 and self.chunk_rows < advised
        if could_grow and self.scheduler_seconds > max(self.busy_seconds, SECONDS_THAT_COUNT):
            said.append(
                f"fewer tasks: the scheduler needs {self.scheduler_seconds:.1f} s for "
                f"{self.tasks}, the workers {self.busy_seconds:.1f} s; larger chunks"
            )
        if self.imbalance > 1.1 and self.workers > 1:
            exact = place("exact", self.expert_rows, self.world_size).imbalance(self.expert_rows)
            if self.imbalance > 1.1 * exact:
                said.append(
                    f'placement="exact": the busiest rank serves {self.imbalance:.2f} times the '
                    f"mean rows, and with it {exact:.2f}"
                )
        return said

    # --- forms -------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Return all figures as plain numbers, lists and text."""
        figures = [
            *("rows", "slots_per_row", "world_size", "workers", "threads", "policy", "cores"),
            *("chunk_rows", "imbalance", "exchanged_bytes", "stored_bytes"),
            *("expert_bytes", "chunk_bytes", "chunks_held", "memory_bytes", "memory_limit", "fits"),
            "memory_parts",
            *("tasks", "other_tasks", "handled_tasks", "layer_flops", "replicas"),
            *("scheduler_seconds", "load_seconds", "busy_seconds", "seconds"),
            *("advised_chunk_rows", "advice"),
        ]
        arrays = ["expert_rows", "rank_rows", "rank_experts", "flops", "traffic_rows"]
        return {
            **{name: getattr(self, name) for name in figures},
            **{name: getattr(self, name).tolist() for name in arrays},
            "experts": self.expert_rows.size,
            "chunks": len(self.chunks),
            "d": self.work.d,
            "d_out": self.work.d_out,
            "dtype": str(self.work.dtype),
            "rates": dataclasses.asdict(self.rates),
            "slots": self.placement.slots.tolist(),
        }

    def to_json(self) -> str:
        """Return `to_dict` as JSON text."""
        return json.dumps(self.to_dict())

    def __repr__(self) -> str:
        return (
            f"<Plan: {self.rows} rows, {self.world_size} ranks, {self.policy}: {self.tasks} tasks, "
            f"{format_bytes(self.memory_bytes)} a worker, imbalance {self.imbalance:.2f}, "
            f"{self.seconds:.1f} s>"
        )

    def _per_worker(self, per_rank: np.ndarray) -> np.ndarray:
        """(W,) sums over the ranks of each worker, rank r on worker r % workers."""
        return np.bincount(
            np.arange(self.world_size) % self.workers, per_rank, minlength=self.workers
        )


@dataclass(frozen=True)
class WhatIf:
    """Several plans of one job side by side."""

    plans: tuple[Plan, ...]
    best: Plan
    #: the fastest that fits; of equals the one that moves fewer bytes, then with fewer tasks
    why: str
