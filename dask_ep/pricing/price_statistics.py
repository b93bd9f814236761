"""What does it cost to collect statistics?

The figures are those of a run's plan, except where passes and second moments change them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from dask.utils import format_bytes

from dask_ep.graph.pipeline import count_tasks
from dask_ep.laws.decision import Course
from dask_ep.pricing.price import Plan


@dataclass(frozen=True, eq=False, kw_only=True)
class PlanOfStatistics(Plan):
    """What one way to collect statistics of a job costs."""

    course: Course
    left: tuple[int, ...]
    #: number of token chunks in each pass over the rows
    grams_left: int
    #: number of experts whose second moments are summed
    graph_tasks: int
    #: number of tasks of all passes
    statistics_bytes: int
    #: bytes of the file of statistics

    @property
    def memory_parts(self) -> dict[str, int]:
        """Bytes that a worker uses at most, by use."""
        return dict(self.course.memory_parts)

    @property
    def fits(self) -> bool:
        """Always true: a course that does not fit raises an error."""
        return True

    @property
    def stored_bytes(self) -> int:
        """Bytes of experts that are read: once, and again for `gram` of hidden activations."""
        walked = super().stored_bytes if self.course.walks else 0
        return walked + (self.grams_left * self.work.expert_stored if self._hides else 0)

    @property
    def exchanged_bytes(self) -> int:
        """Bytes of all packets and answers between workers."""
        return self.course.walks * super().exchanged_bytes

    @property
    def tasks(self) -> int:
        """Number of tasks of token chunks and ranks, and of those that sum second moments."""
        walks, ranks = self.course.walks, self.world_size
        chunks = sum(walks * count_tasks(n, ranks) if walks else n for n in self.left if n)
        return chunks + self.course.gram_groups * self.grams_left

    @property
    def other_tasks(self) -> int:
        """Number of all other tasks: those of the router, and those that join results."""
        return max(self.graph_tasks - self.tasks, 0)

    @property
    def flops(self) -> np.ndarray:
        """(R,) floating-point operations of each rank's experts and their second moments."""
        work, hidden = self.work, self.course.hidden
        of_row = self.course.walks * work.expert_flops
        if self.grams_left:  # half of a product of the rows with themselves, by symmetry
            of_row += work.d**2 + hidden**2
        if self._hides:  # all products of an expert except the last
            of_row += work.expert_flops - 2 * hidden * work.d_out
        return self.rank_rows * of_row

    @property
    def load_seconds(self) -> float:
        """Time to read the experts, for the worker that reads the most."""
        return super().load_seconds if self.course.walks or self._hides else 0.0

    @property
    def busy_seconds(self) -> float:
        """Time that workers compute and copy, in all passes."""
        more = len(self.left) + len(self.course.gram_blocks) - 1
        again = more * self._seconds_anywhere / (self.workers * self.threads)
        return super().busy_seconds + again

    @property
    def _hides(self) -> bool:
        """Whether experts compute for second moments of their hidden activations."""
        return bool(self.grams_left and self.course.hidden)

    @property
    def advice(self) -> list[str]:
        """A description of the passes."""
        blocks, size = self.course.gram_blocks, format_bytes(self.statistics_bytes)
        experts = f", {len(blocks[0])} experts in each" if blocks else ""
        return [f"{self.course}{experts}; the statistics are {size}"]

    def to_dict(self) -> dict[str, Any]:
        """Return all figures as plain numbers, lists and text."""
        return super().to_dict() | {
            "passes_over_rows": len(self.left),
            "passes_for_gram": len(self.course.gram_blocks),
            "statistics_bytes": self.statistics_bytes,
        }
