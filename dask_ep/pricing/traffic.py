"""Which rows go where, for one placement and one chunking?

They are counted exactly, in a pass over the routing.

Axis letters: `N` rows, `k` slots per row, `E` experts, `R` ranks, `S` slots per rank, `C` chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from dask_ep.laws import costs
from dask_ep.laws.costs import Spread
from dask_ep.laws.decision import Decision
from dask_ep.laws.memory_law import Layout
from dask_ep.laws.work import Work
from dask_ep.placement.placement import Placement


@dataclass(frozen=True, eq=False, kw_only=True)
class Traffic:
    """The rows of one way to run a job, by chunk, expert, rank and worker.

    Notes
    -----
    `traffic_rows` and `exchanged_bytes` assume that neighbouring chunks are on one worker, as Dask
    assigns them, or each at its home if the placement is local. What each rank receives is exact
    wherever chunks are, and so is `exchanged_at`.
    """

    work: Work
    decision: Decision
    #: how the job will run
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
    #: (C, W) rows of each chunk that any rank of each worker serves, rank r on worker r % W
    numbers: Sequence[int] | None = None
    #: indices of these chunks; None for all chunks of the job

    # --- how it runs -------------------------------------------------------------------------

    @property
    def layout(self) -> Layout:
        """Where the job runs."""
        return self.decision.layout

    @property
    def has_ranks(self) -> bool:
        """Whether rows go to ranks that hold experts; otherwise experts are processed in passes."""
        return self.decision.passes is None

    @property
    def workers(self) -> int:
        """Number of processes that serve the ranks."""
        return self.layout.serving

    @property
    def threads(self) -> int:
        """Number of tasks that run in each process at a time."""
        return self.layout.threads

    @property
    def cores(self) -> int | None:
        """Number of cores that all workers share; None if each thread has its own."""
        return self.layout.cores

    @property
    def memory_limit(self) -> int | None:
        """Bytes that a worker may use."""
        return self.layout.memory_limit

    @property
    def policy(self) -> str:
        """Name of the policy, or "given"; and what travels, unless only rows do."""
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
        """Bytes of a row that is sent to a worker."""
        return self.work.packet_row_bytes(self.placement.physical.size)

    @property
    def reply_row_bytes(self) -> int:
        """Bytes of a row that a rank sends back."""
        return self.work.reply_bytes

    @property
    def exchanged_bytes(self) -> int:
        """Bytes of all packets and answers between workers."""
        return self.exchanged_at(self._homes.tolist()) if self.has_ranks else 0

    def exchanged_at(self, homes: Sequence[int]) -> int:
        """Return the bytes of all packets and answers, given the worker of each chunk, (C,).

        A row goes once to each other worker that serves it, and comes back once from each rank
        there; nothing is sent between a chunk and the ranks on its own worker.
        """
        there, back = self._rows_exchanged(np.asarray(homes, int))
        return there * self.packet_row_bytes + back * self.reply_row_bytes

    def _rows_exchanged(self, homes: np.ndarray) -> tuple[int, int]:
        """Return how many rows go to other workers, and how many come back."""
        there = self.worker_rows[homes[:, None] != np.arange(self.workers)]
        back = self.packet_rows[homes[:, None] != np.arange(self.world_size) % self.workers]
        return int(there.sum()), int(back.sum())

    @cached_property
    def _homes(self) -> np.ndarray:
        """(C,) index of the worker where each chunk is."""
        if self.placement.local:
            numbers = range(len(self.chunks)) if self.numbers is None else self.numbers
            return np.array([self.placement.home(c) for c in numbers], int) % self.workers
        return costs.homes(len(self.chunks), self.workers)

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

    def _per_worker(self, per_rank: np.ndarray) -> np.ndarray:
        """Return (W,) sums over the ranks of each worker, rank r on worker r % workers."""
        return np.bincount(
            np.arange(self.world_size) % self.workers, per_rank, minlength=self.workers
        )
