"""What does a run with experts in passes cost?

The figures are those of the ordinary plan, except where passes change them: memory, bytes of
experts, and time. Nothing is exchanged between ranks, since rows wait in memory or in files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dask.utils import format_bytes

from dask_ep.laws.pass_blocks import PASSES_PROCESS_BYTES, cut_pieces
from dask_ep.laws.passes import Passes
from dask_ep.pricing.price import Plan

WAYS = {
    "hold": "rows of {chunks} chunks at a time are held in memory, and all experts are loaded",
    "spill": "rows of {chunks} chunks at a time are spilled to disk, and all experts are loaded",
}


@dataclass(frozen=True, eq=False, kw_only=True)
class PlanInPasses(Plan):
    """What one way to run a job with experts in passes costs."""

    @property
    def passes(self) -> Passes:
        """How the experts are processed."""
        assert self.decision.passes is not None
        return self.decision.passes

    @property
    def memory_parts(self) -> dict[str, int]:
        """Bytes that a process uses at most, by use; rows include their scratch memory."""
        known = {"process": PASSES_PROCESS_BYTES, "experts": self.expert_bytes}
        return known | {"rows": self.passes.memory_bytes - sum(known.values())}

    @property
    def expert_bytes(self) -> int:
        """Bytes of experts that a process has at a time."""
        passes, work = self.passes, self.work
        a_block = passes.decoded * work.expert_loaded + passes.ahead * work.expert_stored
        return passes.block_experts * a_block

    @property
    def stored_bytes(self) -> int:
        """Bytes of experts that are read in all passes."""
        return self.passes.passes * int((self.expert_rows > 0).sum()) * self.work.expert_stored

    @property
    def tasks(self) -> int:
        """Number of tasks of the layer, if every group of chunks has rows for all experts."""
        used = self.expert_rows[self.expert_rows > 0]
        step, passes = self.passes.block_experts, self.passes
        blocks = [used[first : first + step] for first in range(0, used.size, step)]
        if passes.way == "hold":
            return len(self.chunks) * (2 + len(blocks)) + passes.passes * len(blocks)
        rows = [(block // passes.passes).tolist() for block in blocks]
        pieces = sum(len(cut_pieces(r, passes.piece_rows, passes.threads)) for r in rows)
        return 2 * len(self.chunks) + passes.passes * (len(blocks) + 2 * pieces)

    @property
    def seconds(self) -> float:
        """Time of the run: products and tokens, and what passes add."""
        return self.passes.seconds + max(self.busy_seconds, self.scheduler_seconds)

    @property
    def advice(self) -> list[str]:
        """A description of the passes."""
        passes = self.passes
        way = WAYS[passes.way].format(chunks=passes.group_chunks)
        blocks = (
            f"in blocks of {passes.block_experts}: {passes.decoded} that compute, and "
            f"{passes.ahead} read ahead, as stored"
        )
        times = "once" if passes.passes == 1 else f"{passes.passes} times in all"
        advice = [f"the experts do not fit, so {way} {times}, {blocks}"]
        if passes.spill_bytes:
            advice.append(
                f"{format_bytes(passes.spill_bytes)} of disk next to the output while it runs; "
                f"{format_bytes(passes.moved_bytes)} are written there and read back"
            )
        return advice

    def to_dict(self) -> dict[str, Any]:
        """Return all figures as plain numbers, lists and text."""
        return super().to_dict() | {"passes": {**vars(self.passes)}}
