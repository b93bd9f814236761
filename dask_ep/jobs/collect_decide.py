"""In how many passes are statistics collected, and what does each hold in memory?

all experts fit        one pass over the rows
they do not fit        one pass for each block of experts that fits
gram                   separate passes, with d * d numbers for each expert of a pass
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import inf
from types import MappingProxyType
from typing import Any

import numpy as np

from dask_ep.arrays.checks import computing_dtype
from dask_ep.errors import DoesNotFit, JobError
from dask_ep.graph.gram import PICKED_TOGETHER, ROWS_TOGETHER, group_of
from dask_ep.jobs.build import Inputs
from dask_ep.jobs.decide import attempt
from dask_ep.kernel.statistics import Observe
from dask_ep.laws.costs import FEWEST_ROWS, PROCESS_BYTES
from dask_ep.laws.decision import Course, Decision
from dask_ep.laws.memory_law import Layout
from dask_ep.layers.collect import Chosen, Wanted, choose_statistics, share_of_others

PARTIALS_HELD = 4
"""Partial results of a chunk that a thread holds at a time: by rank, joined, packed and added."""


CHUNKS_PART = 16
"""Fraction of the memory limit that token chunks may take while `gram` is collected."""


def decide_course(
    inputs: Inputs,
    layout: Layout,
    wanted: Wanted,
    chunk_rows: int | None = None,
    begun: Mapping[str, Any] = MappingProxyType({}),
) -> Course:
    """Decide how statistics of a job are collected.

    Parameters
    ----------
    inputs, layout : what is computed, and where
    wanted : what is collected
    chunk_rows : rows of a token chunk, if given
    begun : `Course.to_json` of the run that is resumed

    Raises
    ------
    DoesNotFit
        If not even one expert at a time fits into the memory limit; the message has the numbers.
    JobError
        A ValueError: the output is wanted, but cannot be computed in one pass.
    """
    E, chosen = inputs.experts.num_experts, choose_statistics(wanted.what, inputs.experts)
    given = chunk_rows and min(chunk_rows, max(inputs.tokens.shape[0], 1))  # as in `decide`
    asked = begun.get("chunk_rows", given)
    if given not in (None, asked):
        raise ValueError(
            f"the run to resume has chunks of {asked} rows, not {given}: resume with those, "
            "or overwrite it"
        )
    others = share_of_others(wanted.rows) > 0
    walks = bool(chosen.of_tiles) + (wanted.with_output and (others or not chosen.of_tiles))
    slots = inputs.slots_per_row + E * others
    size = min(begun.get("block", E), E)
    while True:
        found, partial_bytes = _try_block(inputs, layout, chosen, slots, asked, size, walks)
        if isinstance(found, Decision) and found.passes is None:
            break
        if size == 1 or begun:
            raise _refusal(found, layout, partial_bytes)
        size = -(-size // 2)
    blocks = tuple(range(first, min(first + size, E)) for first in range(0, E, size))
    if wanted.with_output and len(blocks) > 1:
        raise JobError(
            f"{inputs.job.name}: the experts do not fit and are observed in {len(blocks)} passes, "
            "so the output cannot be written in the same pass; compute it with run"
        )
    if chosen.of_gram and asked is None:  # keep nearly all memory for results
        chunks = (layout.threads + 2) * max(found.work.row_bytes, 1)
        most = max(_limit(layout) / CHUNKS_PART / chunks, FEWEST_ROWS)
        found = replace(found, chunk_rows=int(min(found.chunk_rows, most)))
    parts = found.need.parts(found.chunk_rows) | {"partial results": partial_bytes}
    decision = replace(found, work=inputs.work(), layout=layout)
    course = Course(decision, walks, blocks, (), 0, 0, parts)
    return _with_gram(inputs, course, slots) if chosen.of_gram else course


def _try_block(
    inputs: Inputs,
    layout: Layout,
    chosen: Chosen,
    slots: int,
    asked: int | None,
    size: int,
    walks: int,
) -> tuple[Decision | DoesNotFit, int]:
    """Decide for `size` experts, with room for their partial results."""
    work = replace(inputs, experts=inputs.experts.subset(range(size))).work()
    work = replace(work, slots=slots)
    if not walks:
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


def _with_gram(inputs: Inputs, course: Course, slots: int) -> Course:
    """Add passes for `gram`, with as many experts in each as fit; all without a limit."""
    decision, E, d = course.decision, inputs.experts.num_experts, inputs.tokens.shape[1]
    work, layout, f = decision.work, decision.layout, inputs.experts.hidden or 0
    itemsize = computing_dtype(inputs.tokens.dtype).itemsize
    result = (d * d + f * f) * itemsize
    rows = 2 * ROWS_TOGETHER * d * np.dtype(inputs.tokens.dtype).itemsize
    expert = work.expert_loaded if f else 0
    tile = 4 * ROWS_TOGETHER * (d + f) * itemsize + (work.scratch if f else 0)
    chunks = (layout.threads + 2) * decision.chunk_rows * work.row_bytes
    parts = {
        "process": PROCESS_BYTES + work.layer.loaded,
        "chunks": int(chunks),
        "scratch": layout.threads * (2 * result + tile + work.read_bytes + expert),
    }
    fixed, one, limit = sum(parts.values()), result + rows + expert, _limit(layout)
    if limit - fixed < one:
        raise DoesNotFit(
            f"gram needs {(fixed + one) / 1e6:.0f} MB to sum the second moments of one expert: "
            f"{fixed / 1e6:.0f} MB for the process, {layout.threads} threads and token chunks of "
            f"{decision.chunk_rows} rows, and {one / 1e6:.0f} MB for the expert "
            f"({result / 1e6:.0f} MB of results), but {limit / 1e6:.0f} MB may be used; allow that "
            "much, or use fewer threads or smaller chunks (--chunk-rows)",
            {},
            decision,
        )
    step = E if limit == inf else min(int((limit - fixed) // one) * layout.workers, E)
    step -= step % min(step, PICKED_TOGETHER)  # whole groups whose rows are picked together
    parts["second moments"] = int(-(-step // layout.workers) * one)
    total = inputs.tokens.shape[0]
    counted = -(-total // max(decision.chunk_rows, 1))
    return replace(
        course,
        gram_blocks=tuple(range(first, min(first + step, E)) for first in range(0, E, step)),
        gram_groups=-(-counted // group_of(total, counted, slots, E)),
        hidden=f,
        memory_parts=max(parts, course.memory_parts, key=lambda p: sum(p.values())),
    )


def _limit(layout: Layout) -> float:
    """Return the bytes that may be used: on Dask workers only a part of the limit."""
    return inf if layout.usable_bytes is None else layout.usable_bytes


def _refusal(found: Decision | DoesNotFit, layout: Layout, partial_bytes: int) -> DoesNotFit:
    extra = f" and {partial_bytes / 1e6:.0f} MB of partial results"
    if isinstance(found, DoesNotFit):
        return DoesNotFit(f"{found}{extra}", found.proposal, found.decision)
    return DoesNotFit(
        f"not even one expert at a time fits into {(layout.memory_limit or 0) / 1e6:.0f} MB with "
        f"its rows{extra}; allow more memory, or use fewer threads",
        {},
        found,
    )
