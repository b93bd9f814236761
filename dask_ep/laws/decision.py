"""How will a job run, or its statistics be collected, once that is decided?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dask_ep.laws.costs import PICKED_TOGETHER, Need
from dask_ep.laws.memory_law import Layout, need, rows_within
from dask_ep.laws.passes import Passes
from dask_ep.laws.travel import ALL_ROWS, Travel, choose_travel
from dask_ep.laws.work import Work
from dask_ep.placement.placement import Placement
from dask_ep.placement.placement_files import find_placement
from dask_ep.placement.policies import contiguous
from dask_ep.placement.routing_stats import Survey


@dataclass(frozen=True)
class Decision:
    """How a job will run; made by `decide`."""

    work: Work
    layout: Layout
    chunk_rows: int
    #: rows of a token chunk
    as_stored: bool = False
    #: whether experts are held in memory as they are stored
    passes: Passes | None = None
    #: how experts that do not fit are processed; None if all fit
    travel: Travel = ALL_ROWS
    #: whether rows travel to experts, or experts to rows
    chunks_asked: bool = False
    #: whether the user chose `chunk_rows`

    @property
    def need(self) -> Need:
        """The memory that a worker needs at most without passes."""
        return need(self.work, self.layout, self.as_stored)

    @property
    def fits(self) -> bool:
        """Whether the job fits into all memory limits."""
        most = rows_within(self.work, self.layout, self.as_stored)
        return self.passes is not None or self.chunk_rows <= most

    @property
    def spare_experts(self) -> int | None:
        """How many experts each rank can hold in addition to its own; None without a limit."""
        usable = self.layout.usable_bytes
        if usable is None:
            return None
        spare = max(usable - self.need.at(self.chunk_rows), 0)
        held = self.layout.ranks_of_a_worker * self.work.held_bytes(self.as_stored)
        return spare // max(held, 1)

    def place(
        self, count: Callable[[], Survey], chunks: Sequence[int] | None = None
    ) -> Placement | None:
        """Make the placement; None if each rank owns the next E/R experts and no others.

        Parameters
        ----------
        count : function that counts the routing
            Called only if the placement depends on the load, or experts travel.
        chunks : rows of each token chunk; default: those of the routing
        """
        work, layout = self.work, self.layout
        ranks = layout.world_size
        owners = find_placement(layout.placement, work.experts, ranks, lambda: count().by_ticket)
        if not self.travel.moves_experts or ranks == 1 or self.passes is not None:
            return owners
        owners = owners or contiguous(work.experts, ranks)
        spare = self.spare_experts
        return choose_travel(
            self.travel,
            count(),
            owners,
            expert_bytes=work.expert_stored,
            row_bytes=work.packet_row_bytes(owners.physical.size) + work.reply_bytes,
            chunks=chunks,
            workers=layout.serving,
            max_physical=None if spare is None else owners.physical_per_rank + spare,
        )


@dataclass(frozen=True)
class Course:
    """How statistics of a job will be collected; made by `dask_ep.jobs.collect_decide`."""

    decision: Decision
    #: how each pass over the rows runs: where, in which chunks, and how experts are held
    walks: int
    #: number of passes in which rows go through experts
    blocks: tuple[range, ...]
    #: experts observed in each of these passes
    gram_blocks: tuple[range, ...]
    #: experts whose second moments are summed in each pass for `gram`
    gram_groups: int
    #: number of groups of token chunks, each summed together
    hidden: int
    #: width of the hidden activations whose second moments are summed; 0 if they are not
    memory_parts: Mapping[str, int]
    #: bytes of a process at most, by what they are used for, in the pass that takes most

    @property
    def memory_bytes(self) -> int:
        """Bytes of a process, at most."""
        return sum(self.memory_parts.values())

    @property
    def picked_together(self) -> int:
        """Number of experts whose rows one task picks from a chunk, for their second moments."""
        return min([PICKED_TOGETHER, *map(len, self.gram_blocks)])

    def to_json(self) -> dict[str, Any]:
        """Return what a resumed run must keep."""
        return {
            "world_size": self.decision.layout.world_size,
            "chunk_rows": self.decision.chunk_rows,
            "block": len(self.blocks[0]),
        }

    def __str__(self) -> str:
        passes = f"{len(self.blocks)} pass{'es' * (len(self.blocks) > 1)} over the rows"
        more = f", {len(self.gram_blocks)} more for gram" if self.gram_blocks else ""
        return f"{passes}{more}"
