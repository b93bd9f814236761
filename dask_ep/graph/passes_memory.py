"""How do rows wait in memory for experts that are loaded in passes?

    tokens c ──> ep_send (c, 0): a chunk in memory, with its output so far
                     │
    ep_experts (g, 0, 0) ──> ep_dispatch (c, 0, 0)        of every chunk c of group g
    ep_experts (g, 1, 0) ──> ep_dispatch (c, 1, 0)        each after the one before
                     ...        │
                            ep_sum (c, 0)

Tasks add to a chunk's output in place, one after the other, so they must run in threads that share
memory. Each adds the outputs of a block of experts in their order, as the kernel does.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any

import dask.array as da
import numpy as np
from dask.base import tokenize
from dask.task_spec import List, Task, TaskRef

from dask_ep.arrays.checks import check_routing
from dask_ep.arrays.namespaces import Array
from dask_ep.experts.prefetch import ExpertsAhead
from dask_ep.graph.expert_schedule import Rows, Walk
from dask_ep.graph.keys import step_name
from dask_ep.kernel.error_context import error_context
from dask_ep.kernel.host_kernel import Served
from dask_ep.kernel.segments import sort_slots
from dask_ep.storage.output import SERVED, SPILLED, Receipt


class Held:
    """A chunk in memory, with the output of the experts so far."""

    def __init__(self, served: Served, chunk: int):
        self.served, self.chunk = served, chunk
        self.receipt: Receipt | None = None  # of the last block


def hold(
    rows: Rows,
    walk: Walk,
    counts: np.ndarray,
    *,
    done: Collection[int] = (),
    in_place: bool = False,
) -> da.Array:
    """Return the output of all groups of chunks; compute each group separately.

    Parameters
    ----------
    rows : in chunks of `walk.passes.chunk_rows`
    walk : how experts are loaded
    counts : (C, E) slots of each chunk at each expert
    done : chunks whose output exists; the others of their group do not wait for their tasks
    in_place : whether chunks of tokens may be overwritten: nothing else uses them, nor the memory
        that they are in

    Returns
    -------
    (N, d_out) lazy array

    Notes
    -----
    Each row's outputs are added in the order of the experts, as in the kernel. Tasks write to it in
    place, one after the other, so they must run in threads that share memory.
    """
    token = tokenize(rows.tokens, rows.routing, rows.topk_weights, walk.experts, walk.passes)
    ep_experts, ep_send, ep_dispatch, ep_sum = (
        step_name(step, token) for step in ("experts", "send", "dispatch", "sum")
    )
    tasks: dict[Any, Task] = {}
    d_out, num_experts = walk.experts.d_out, walk.experts.num_experts
    lengths = rows.tokens.chunks[0]
    for g, group in enumerate(apart(walk.passes.groups(len(counts)), done)):
        last = {c: TaskRef((ep_send, c, 0)) for c in group}
        for c in group:
            tasks[ep_send, c, 0] = Task(
                (ep_send, c, 0), _hold, *rows.keys(c), num_experts, d_out, c, in_place
            )
        blocks = walk.blocks(counts[group].sum(axis=0))
        served = [[(ep_dispatch, c, b, 0) for c in group] for b in range(len(blocks))]
        reads = [TaskRef((ep_experts, g, b, 0)) for b in range(len(blocks))]
        for b, turn in enumerate(walk.turns(served, reads)):
            block, read = blocks[b], reads[b].key
            tasks[read] = walk.read_task(read, block, rows.tokens._meta, turn.read_after)
            for c in group:
                key = (ep_dispatch, c, b, 0)
                share = counts[c, block].sum() / max(counts[c].sum(), 1)
                tasks[key] = Task(
                    key,
                    _serve_held,
                    last[c],
                    reads[b],
                    List(turn.serve_after),
                    tuple(block),
                    b,
                    float((SPILLED + SERVED) * lengths[c] * share),
                )
                last[c] = TaskRef(key)
        for c in group:
            tasks[ep_sum, c, 0] = Task((ep_sum, c, 0), _finish_held, last[c], rows.tokens.dtype)
    return rows.output(ep_sum, tasks, d_out)


def apart(groups: Iterable[Iterable[int]], done: Collection[int]) -> Iterator[list[int]]:
    """Return the chunks of each group that are not done, and those that are, separately."""
    for group in groups:
        for chunks in ([c for c in group if c not in done], [c for c in group if c in done]):
            if chunks:
                yield chunks


def _hold(
    tokens: Array,
    routing: Array,
    topk_weights: Array | None,
    num_experts: int,
    d_out: int,
    chunk: int,
    in_place: bool,
) -> Held:
    with error_context(f"token chunk {chunk}"):
        check_routing(routing, topk_weights, n=tokens.shape[0])
        segments = sort_slots(routing, topk_weights, num_experts, 0, 1)
        return Held(Served(tokens, segments, topk_weights, d_out, in_place=in_place), chunk)


def _serve_held(
    held: Held, experts: ExpertsAhead, after: Any, block: tuple[int, ...], b: int, worked: float
) -> Held:
    experts_of_block = f"experts {block[0]} to {block[-1]}"
    with error_context(f"dispatch of token chunk {held.chunk} to {experts_of_block}"):
        for local, e in enumerate(block):
            held.served.add(e, experts[local])
    held.receipt = Receipt(held.chunk, 0, 0, worked, b)
    return held


def _finish_held(held: Held, dtype: np.dtype) -> Array:
    return held.served.out.astype(dtype, copy=False)
