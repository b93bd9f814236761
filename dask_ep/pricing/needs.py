"""What memory, tasks and time does one way to run a job need?

Every figure follows from the counted rows (`traffic`) by the laws of `costs`: tasks are exact,
memory is an upper bound, time is an estimate.
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
"""Range of a run's time over its estimate: of 10 jobs of many kinds on threads of a busy machine
the fastest took 0.50 and the slowest 2.49 times the estimate (`workflows/plan_accuracy.py`)."""

FIRST_SECONDS = (0.2, 0.5)
"""Added to the end of that range for threads of this process, and for worker processes, since
imports and new memory take time at first. With it, 10 jobs on worker processes of that machine
ended within the range, the slowest after 3.1 times the estimate, as did jobs of a tenth of a second
on threads."""

START_SECONDS = (1.0, 3.0)
"""Range of the time to start worker processes on this machine, before a run."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Needs(Traffic):
    """What one way to run a job requires of its workers."""

    rates: Rates

    # --- memory ----------------------------------------------------------------------------

    @property
    def rank_experts(self) -> np.ndarray:
        """(R,) number of experts that each rank holds."""
        return (self.placement.physical >= 0).sum(axis=1)

    @property
    def replicas(self) -> int:
        """Number of physical experts in addition to one copy of each expert."""
        held = int(self.rank_experts.sum())
        return held - self.placement.num_experts if self.has_ranks else 0

    @property
    def stored_bytes(self) -> int:
        """Bytes that are read from files: experts by all ranks, and shared ones by all workers."""
        of_ranks = int(self.rank_experts.sum()) * self.work.expert_stored
        return of_ranks + self.workers * self.work.layer.stored

    @property
    def experts_of_a_worker(self) -> int:
        """Number of experts in the worker that holds the most."""
        return int(self._per_worker(self.rank_experts).max())

    @property
    def expert_bytes(self) -> int:
        """Bytes of experts, shared experts and router in the worker that holds the most."""
        return self.need.expert_bytes

    @property
    def chunk_bytes(self) -> int:
        """Bytes of the largest token chunk, or of its output if that is larger."""
        return self.chunk_rows * self.work.row_bytes

    @property
    def chunks_held(self) -> float:
        """Number of token chunks that a worker holds at most."""
        return self.need.chunks

    @cached_property
    def need(self) -> costs.Need:
        """Memory of a worker as a function of a chunk's rows, for the routing as counted."""
        held, as_stored = self.experts_of_a_worker, self.decision.as_stored
        return need(self.work, self.layout, as_stored, held, self.spread)

    @property
    def memory_parts(self) -> dict[str, int]:
        """Bytes that a worker uses at most, by use."""
        return self.need.parts(self.chunk_rows)

    @property
    def memory_bytes(self) -> int:
        """Bytes that a worker uses at most."""
        return sum(self.memory_parts.values())

    @property
    def process_parts(self) -> dict[str, int]:
        """Bytes that its process uses at most, by use: others only if it computes on a GPU."""
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
        """Peak memory and its limit, by a description of the memory."""
        return {"peak memory of a worker": (self.memory_bytes, self.memory_limit)}

    @property
    def places(self) -> str:
        """Description of the workers."""
        return f"{self.workers} x {self.threads} threads"

    @property
    def fits(self) -> bool:
        """Whether memory stays within its limit, for any routing."""
        return self.decision.fits

    # --- tasks and time ----------------------------------------------------------------------

    @property
    def tasks(self) -> int:
        """Number of tasks of `expert_parallel`: C + R + 1; C + 1 for one rank."""
        return count_tasks(len(self.chunks), self.world_size)

    @property
    def other_tasks(self) -> int:
        """Number of tasks of a layer's router, shared experts and residual."""
        return len(self.chunks) * self.work.layer.chunk_tasks + self.work.layer.tasks

    @property
    def handled_tasks(self) -> int:
        """Number of tasks that Dask handles. Reading is part of a chunk's first task, unless
        several tasks need what is read, as in a whole layer; writing is part of its last.
        """
        return self.tasks + self.other_tasks + len(self.chunks) * (self.other_tasks > 0)

    @property
    def scheduler_seconds(self) -> float:
        """Time that the scheduler needs for these tasks, in addition to the workers' time."""
        local = self.workers == 1
        seconds = costs.LOCAL_TASK_SECONDS if local else costs.CLUSTER_TASK_SECONDS
        return self.handled_tasks * seconds

    @property
    def flops(self) -> np.ndarray:
        """(R,) floating-point operations of each rank's experts."""
        return self.rank_rows * self.work.expert_flops

    @property
    def layer_flops(self) -> int:
        """Floating-point operations of the router and of shared experts."""
        return self.rows * (self.work.layer.router_flops + self.work.layer.shared_flops)

    @property
    def load_seconds(self) -> float:
        """Time to read the experts, for the worker that reads the most."""
        stored = self.experts_of_a_worker * self.work.expert_stored + self.work.layer.stored
        return stored / self.rates.read

    @property
    def busy_seconds(self) -> float:
        """Time that workers compute and copy: that of the busiest, or of all on shared cores."""
        row_bytes = (self.work.d + self.work.d_out) * self.work.dtype.itemsize
        busy = (
            self._per_worker(self.flops) / self.rates.flops
            + self._per_worker(self.rank_rows) * row_bytes / self.rates.copy
            + self._seconds_anywhere / self.workers
        )
        shared = 0.0
        if self.cores:
            scheduler = self.scheduler_seconds if self.workers > 1 else 0.0  # a separate process
            shared = (float(busy.sum()) + scheduler) / self.cores
        seconds, rounds = max(float(busy.max()) / self.threads, shared), 0.0
        if self.workers == 1:  # threads are idle in the last round; workers share its chunks
            rounds = len(self.chunks) / self.threads
        return seconds * math.ceil(rounds) / rounds if rounds else seconds

    @property
    def _seconds_anywhere(self) -> float:
        """Thread time of all that is done where the chunks are, shared evenly by all workers."""
        work, rates, layer = self.work, self.rates, self.work.layer
        seconds = (
            self.rows * work.d * work.dtype.itemsize / rates.read
            + self.rows * work.d_out * work.dtype.itemsize / rates.write
            # The router's matrix products are in float64, and take twice the time.
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
        """Time of the run, from its first task on: reading the experts, then the slower of workers
        and scheduler. The time to start worker processes, `START_SECONDS`, is not included.
        """
        return self.load_seconds + max(self.busy_seconds, self.scheduler_seconds)

    @property
    def seconds_range(self) -> tuple[float, float]:
        """Expected range of the run's time, as rates vary from second to second."""
        low, high = TIME_RANGE
        first = FIRST_SECONDS[not self.layout.in_process]
        return low * self.seconds, high * self.seconds + first
