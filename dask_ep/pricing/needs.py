"""What memory, tasks and time does one way to run a job need?

Every figure follows from the rows that were counted (`traffic`) by the laws of `costs`: tasks are
exact, memory is an upper bound, time is an estimate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from dask_ep.graph.pipeline import count_tasks
from dask_ep.laws import costs
from dask_ep.laws.costs import Rates
from dask_ep.laws.memory_law import need
from dask_ep.pricing.traffic import Traffic

TIME_RANGE = (0.5, 2.5)
"""Of the time that is estimated, what runs take: of 10 jobs of many kinds on threads of a busy
machine the fastest took 0.50 and the slowest 2.49 of it (`workflows/plan_accuracy.py`)."""

FIRST_SECONDS = (0.2, 0.5)
"""That threads of this process and worker processes may take longer at first, for imports and new
memory: with it 10 jobs on worker processes of that machine ended in the range, the slowest after
3.1 times the estimate alone, and jobs of a tenth of a second on threads."""

START_SECONDS = (1.0, 3.0)
"""Of starting worker processes on this machine, before a run."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Needs(Traffic):
    """What one way to run a job takes of its workers."""

    rates: Rates

    # --- memory ----------------------------------------------------------------------------

    @property
    def rank_experts(self) -> np.ndarray:
        """(R,) experts that each rank holds."""
        return (self.placement.physical >= 0).sum(axis=1)

    @property
    def replicas(self) -> int:
        """Slots that hold an expert which another slot holds too."""
        held = int(self.rank_experts.sum())
        return held - self.placement.num_experts if self.has_ranks else 0

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
        """Memory that is used at most, and its limit, by what it is."""
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
        """Time that the scheduler needs for them, in addition to the workers' work."""
        local = self.workers == 1
        seconds = costs.LOCAL_TASK_SECONDS if local else costs.CLUSTER_TASK_SECONDS
        return self.handled_tasks * seconds

    @property
    def flops(self) -> np.ndarray:
        """(R,) floating-point operations of each rank's experts."""
        return self.rank_rows * self.work.expert_flops

    @property
    def layer_flops(self) -> int:
        """Floating-point operations of the router and of shared experts, where the chunks are."""
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
        seconds, rounds = max(float(busy.max()) / self.threads, shared), 0.0
        if self.workers == 1:  # threads wait for the last chunks; workers share them
            rounds = len(self.chunks) / self.threads
        return seconds * math.ceil(rounds) / rounds if rounds else seconds

    @property
    def _seconds_anywhere(self) -> float:
        """Work of one thread that all workers share evenly: all that is done where chunks are."""
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
    def seconds(self) -> float:
        """Time of the run, from its first task on: experts read, then the slower of workers and
        scheduler. The start of worker processes, `START_SECONDS`, comes before.
        """
        return self.load_seconds + max(self.busy_seconds, self.scheduler_seconds)

    @property
    def seconds_range(self) -> tuple[float, float]:
        """Between which times the run should end: rates differ from second to second."""
        low, high = TIME_RANGE
        first = FIRST_SECONDS[not self.layout.in_process]
        return low * self.seconds, high * self.seconds + first
