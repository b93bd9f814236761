"""In how many passes are statistics collected, and what does each hold in memory?

all experts fit        one pass over the rows
they do not            a pass for each block of experts that do
gram                   passes of their own: d * d numbers for each of the experts of one
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import inf
from typing import Any

import numpy as np

from dask_ep.arrays.checks import computing_dtype
from dask_ep.errors import DoesNotFit
from dask_ep.graph.gram import ROWS_TOGETHER
from dask_ep.jobs.build import Inputs
from dask_ep.jobs.decide import attempt
from dask_ep.kernel.statistics import Observe
from dask_ep.laws.costs import FEWEST_ROWS, PROCESS_BYTES, usable
from dask_ep.laws.decision import Decision
from dask_ep.laws.memory_law import Layout
from dask_ep.layers.collect import Chosen, share_of_others

PARTIALS_HELD = 4
"""Partial results that a thread holds at a time: its chunk's, by rank, joined, packed and added."""


CHUNKS_PART = 16
"""Part of the memory limit that token chunks may take while `gram` is collected."""


@dataclass(frozen=True)
class Course:
    """How statistics are collected."""

    layout: Layout
    chunk_rows: int
    #: of a token chunk
    blocks: tuple[range, ...]
    #: experts that are observed in one pass each
    gram_blocks: tuple[range, ...]
    #: experts whose second moments are summed in one pass each
    as_stored: bool
    #: whether experts are held as they are stored
    of_tiles: frozenset[str]
    #: statistics for which rows go through experts
    memory_bytes: int
    #: of a process, at most

    @property
    def passes(self) -> int:
        """How often the rows are read."""
        return len(self.blocks) + len(self.gram_blocks)

    def to_json(self) -> dict[str, Any]:
        """What a resumed run keeps."""
        return {
            "world_size": self.layout.world_size,
            "chunk_rows": self.chunk_rows,
            "block": len(self.blocks[0]),
        }


def decide_course(
    inputs: Inputs,
    layout: Layout,
    chosen: Chosen,
    rows: str | float,
    with_output: bool,
    chunk_rows: int | None,
    begun: Mapping[str, Any],
) -> Course:
    """Decide how statistics of a job are collected.

    Parameters
    ----------
    inputs, layout : what is computed, and on what
    chosen : what is collected
    rows, with_output : as in `dask_ep.collect`
    chunk_rows : rows of a token chunk, if they are asked for
    begun : what `Course.to_json` said of the run that is resumed

    Raises
    ------
    DoesNotFit
        If one expert at a time does not fit within the memory limit, with the numbers.
    """
    E = inputs.experts.num_experts
    asked = begun.get("chunk_rows", chunk_rows)
    if chunk_rows not in (None, asked):
        raise ValueError(
            f"the run to resume has chunks of {asked} rows, not {chunk_rows}: resume with those, "
            "or overwrite it"
        )
    slots = inputs.slots_per_row + (E if share_of_others(rows) else 0)
    through_experts = bool(chosen.of_tiles) or with_output
    size = begun.get("block", E)
    while True:
        found, partial_bytes = _try_block(
            inputs, layout, chosen, slots, asked, size, through_experts
        )
        if isinstance(found, Decision) and found.passes is None:
            break
        if size == 1 or begun:
            raise _refusal(found, layout, partial_bytes)
        size = -(-size // 2)
    gram_blocks: tuple[range, ...] = ()
    gram_bytes = 0
    if chosen.of_gram:
        if asked is None:
            found = replace(found, chunk_rows=_small_chunk_rows(layout, found))
        gram_blocks, gram_bytes = _gram_blocks(inputs, layout, found)
    return Course(
        layout,
        found.chunk_rows,
        tuple(range(first, min(first + size, E)) for first in range(0, E, size)),
        gram_blocks,
        found.as_stored,
        frozenset(name.partition(".")[0] for name in chosen.of_tiles),
        max(found.need.at(found.chunk_rows) + partial_bytes, gram_bytes),
    )


def _try_block(
    inputs: Inputs,
    layout: Layout,
    chosen: Chosen,
    slots: int,
    asked: int | None,
    size: int,
    through_experts: bool,
) -> tuple[Decision | DoesNotFit, int]:
    """Decide on so many experts, with room for their partial results."""
    work = replace(inputs, experts=inputs.experts.subset(range(size))).work()
    work = replace(work, slots=slots)
    if not through_experts:
        work = replace(work, expert_stored=0, expert_loaded=0)
    held = PARTIALS_HELD * layout.threads * partial_size(inputs, chosen, size)
    limit = layout.memory_limit
    if limit is not None:
        layout = replace(layout, memory_limit=max(limit - held, 1))
    return attempt(work, layout, chunk_rows=asked), held


def partial_size(inputs: Inputs, chosen: Chosen, experts: int) -> int:
    """Bytes of the partial results of one chunk."""
    d, d_out = inputs.tokens.shape[1], inputs.experts.d_out or inputs.tokens.shape[1]
    width = Observe(tuple(chosen.of_tiles), d, inputs.experts.hidden, d_out).width
    E = inputs.experts.num_experts
    others = E if "coactivation" in chosen.of_routing else 0
    return 8 * (experts * width + E * (others + inputs.slots_per_row + 4))


def _gram_blocks(
    inputs: Inputs, layout: Layout, decision: Decision
) -> tuple[tuple[range, ...], int]:
    """As many experts at a time as fit; all without a limit."""
    work, E, d = decision.work, inputs.experts.num_experts, inputs.tokens.shape[1]
    f = inputs.experts.hidden or 0
    itemsize = computing_dtype(inputs.tokens.dtype).itemsize
    result = (d * d + f * f) * itemsize
    rows = 2 * ROWS_TOGETHER * d * np.dtype(inputs.tokens.dtype).itemsize
    expert = work.expert_loaded if f else 0
    tile = 4 * ROWS_TOGETHER * (d + f) * itemsize + (work.scratch if f else 0)
    chunks = (layout.threads + 2) * decision.chunk_rows * work.row_bytes
    fixed = PROCESS_BYTES + work.layer.loaded + chunks
    fixed += layout.threads * (2 * result + tile + work.read_bytes + expert)
    one = result + rows + expert
    limit = _limit(layout)
    room = limit - fixed
    if room < one:
        raise DoesNotFit(
            f"gram needs {(fixed + one) / 1e6:.0f} MB to sum the second moments of one expert: "
            f"{fixed / 1e6:.0f} MB for the process, {layout.threads} threads and token chunks of "
            f"{decision.chunk_rows} rows, and {one / 1e6:.0f} MB for the expert "
            f"({result / 1e6:.0f} MB of results), but {limit / 1e6:.0f} MB may be used; allow that "
            "much, or use fewer threads or smaller chunks (--chunk-rows)",
            {},
            decision,
        )
    step = E if room == inf else min(int(room // one) * layout.workers, E)
    blocks = tuple(range(first, min(first + step, E)) for first in range(0, E, step))
    return blocks, int(fixed + -(-step // layout.workers) * one)


def _small_chunk_rows(layout: Layout, decision: Decision) -> int:
    """Rows of a chunk that leave nearly all of the memory to the results of `gram`."""
    chunks = (layout.threads + 2) * max(decision.work.row_bytes, 1)
    most = _limit(layout) / CHUNKS_PART / chunks
    return int(min(decision.chunk_rows, max(most, FEWEST_ROWS)))


def _limit(layout: Layout) -> float:
    """Bytes that may be filled: Dask watches its workers', but not this process."""
    if layout.memory_limit is None:
        return inf
    return layout.memory_limit if layout.in_process else usable(layout.memory_limit)


def _refusal(found: Decision | DoesNotFit, layout: Layout, partial_bytes: int) -> DoesNotFit:
    extra = f"; besides, {partial_bytes / 1e6:.0f} MB of partial results must fit"
    if isinstance(found, DoesNotFit):
        return DoesNotFit(f"{found}{extra}", found.proposal, found.decision)
    return DoesNotFit(
        f"not even one expert at a time fits into {(layout.memory_limit or 0) / 1e6:.0f} MB with "
        f"its rows{extra}; allow more memory, or use fewer threads",
        {},
        found,
    )
