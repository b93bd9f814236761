"""How do the second moments of each expert's rows come together, expert by expert?

    routing c ──> ep_sort (c): the slots of chunk c by expert
                      v
    tokens c ──> ep_pick (c, p): the rows of some neighbouring experts
                      │   of some chunks at a time
                      v
    ep_gram (g, e): XᵀX so far, plus that of these rows ──> ep_gram (g + 1, e) ──> ...
         ^
    ep_gram_expert (e): loads the expert, where its hidden activations are wanted

Results of (E, d, d) do not fit into memory, nor into a chunk's answer. So each expert is a separate
block: computing some of them reads the tokens once for these, and holds only their results.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import dask.array as da
import numpy as np
from dask.base import tokenize
from dask.task_spec import List, Task, TaskRef

from dask_ep.arrays import memory
from dask_ep.arrays.checks import check_routing, check_tokens, computing_dtype
from dask_ep.experts.experts import CallableExperts, Experts
from dask_ep.graph.keys import step_name
from dask_ep.graph.pipeline import Ready, Unfused
from dask_ep.graph.rows import array_of, first_rows, keys_of
from dask_ep.kernel.error_context import error_context, slots_of
from dask_ep.kernel.expert import as_local_experts
from dask_ep.kernel.host_kernel import gather
from dask_ep.kernel.segments import Segments, sort_slots
from dask_ep.laws.costs import PICKED_TOGETHER

ROWS_TOGETHER = 1024
"""About how many rows of an expert are collected before they are multiplied: the results are read
and written once for each such product."""


class Picked(NamedTuple):
    """Rows of some neighbouring experts."""

    rows: np.ndarray
    #: (m, d), one expert after the other
    ends: list[int]
    #: where each expert's rows end

    def of(self, number: int) -> np.ndarray:
        """Return the rows of one of these experts, numbered from 0."""
        return self.rows[self.ends[number - 1] if number else 0 : self.ends[number]]


class Gram(NamedTuple):
    """Sums over some rows of an expert, in the computing dtype."""

    input: np.ndarray
    #: (d, d)
    hidden: np.ndarray | None
    #: (f, f), if requested


def grams(
    ready: Ready, *, hidden: bool, picked_together: int = PICKED_TOGETHER
) -> dict[str, da.Array]:
    """Second moments of what each expert's matrices multiply.

    Parameters
    ----------
    ready : the layer, its placement aside
    hidden : whether to compute those of hidden activations as well
    picked_together : experts whose rows are picked from a chunk by one task; computing only some of
        these experts still holds the picked rows of all of them in memory

    Returns
    -------
    ``gram.input`` (E, d, d) and ``gram.hidden`` (E, f, f), lazy, with one expert in each chunk

    Notes
    -----
    For C chunks, E experts and G groups of chunks: C sorts, E C / `picked_together` picks, E G
    products and some tasks for each expert. The products of a group of rows are made in the
    computing dtype, and added to those before; experts without rows have zeros.
    """
    tokens, experts = ready.tokens, ready.experts
    E, C, d = experts.num_experts, tokens.numblocks[0], tokens.shape[1]
    token = tokenize(tokens, ready.routing, ready.topk_weights, experts, hidden, picked_together)
    tasks = _picks(ready, token, picked_together)
    step = group_of(tokens.shape[0], C, slots_of(ready.routing), E)
    dtype = computing_dtype(tokens.dtype)
    gram, pick = step_name("gram", token), step_name("pick", token)
    last: list[Any] = []
    for e in range(E):
        state: TaskRef | None = None
        expert: TaskRef | None = None
        if hidden:
            expert = TaskRef((step_name("gram_expert", token), e))
            tasks[expert.key] = Task(expert.key, _load, experts.subset([e]), d, dtype, e)
        part, number = divmod(e, picked_together)
        for g, first in enumerate(range(0, C, step)):
            chunks = range(first, min(first + step, C))
            rows = List([TaskRef((pick, c, part)) for c in chunks])
            key = (gram, g, e)
            tasks[key] = Unfused(key, _add_rows, state, rows, number, expert, d, dtype, e)
            state = TaskRef(key)
        last.append(state)
    inputs = [a for a in (tokens, ready.routing, ready.topk_weights) if a is not None]
    groups = ((1,) * -(-C // step), (1,) * E)
    moments = array_of(gram, tasks, inputs, groups, np.empty((0, 0), object))
    sides: dict[str, Any] = {"input": d} | ({"hidden": experts.hidden} if hidden else {})
    found = {}
    for side, width in sides.items():
        name = step_name(f"moments_{side}", token)
        picked = {
            (name, e, 0, 0): Task((name, e, 0, 0), _side_of, one, side, width, dtype)
            for e, one in enumerate(last)
        }
        chunks_of_side, meta = ((1,) * E, (width,), (width,)), np.empty((0, 0, 0), dtype)
        found[f"gram.{side}"] = array_of(name, picked, [moments], chunks_of_side, meta)
    return found


def _picks(ready: Ready, token: str, together: int) -> dict[Any, Task]:
    """Return the tasks that sort the slots of each chunk, and pick the rows of experts from it."""
    E, weights = ready.experts.num_experts, ready.topk_weights
    options = getattr(ready.experts, "options", {})
    on_input = options.get("apply_router_weight_on_input", False)
    of_weights = [None] * ready.tokens.numblocks[0] if weights is None else keys_of(weights)
    keys = zip(keys_of(ready.tokens), keys_of(ready.routing), of_weights, strict=True)
    firsts = first_rows(ready.tokens.chunks[0])
    tasks: dict[Any, Task] = {}
    for c, (rows, routing, weight) in enumerate(keys):
        key, given = (step_name("sort", token), c), weight and TaskRef(weight)
        tasks[key] = Task(key, _sort, TaskRef(routing), given, E, c, firsts[c])
        for part, first in enumerate(range(0, E, together)):
            of = range(first, min(first + together, E))
            pick, times = (step_name("pick", token), c, part), given if on_input else None
            tasks[pick] = Task(pick, _pick_rows, TaskRef(rows), TaskRef(key), times, of, c)
    return tasks


def group_of(rows: float, chunks: int, slots: int, experts: int) -> int:
    """Return how many chunks have about `ROWS_TOGETHER` rows of an expert.

    Examples
    --------
    >>> group_of(80_000, 10, slots=2, experts=64), group_of(80_000, 10, slots=8, experts=8)
    (4, 1)
    """
    of_expert = rows * slots / max(experts * chunks, 1)
    if not of_expert > 0:  # unknown lengths
        return 1
    return int(min(max(ROWS_TOGETHER / of_expert, 1), max(chunks, 1)))


def _load(
    experts: Experts | CallableExperts, d: int, dtype: np.dtype, number: int
) -> Sequence[Any]:
    """Load an expert, in a form that is loaded again where Dask moves it."""
    with error_context(f"loading expert {number}"):
        loaded = experts.load(dtype=dtype)
        as_local_experts(loaded, d=d, like=np.empty((0, d), dtype), dtype=dtype)  # checks it
        return loaded


def _sort(
    routing: np.ndarray,
    topk_weights: np.ndarray | None,
    num_experts: int,
    chunk: int,
    first_row: int | None,
) -> Segments:
    with error_context(f"routing of token chunk {chunk}", first_row):
        check_routing(routing, topk_weights, n=len(routing))
        return sort_slots(routing, topk_weights, num_experts, 0, 1)


def _pick_rows(
    tokens: np.ndarray,
    segments: Segments,
    topk_weights: np.ndarray | None,
    experts: range,
    chunk: int,
) -> Picked:
    """Return the rows routed to some experts, times their weights if these apply to the input."""
    with error_context(f"rows of experts {experts[0]} to {experts[-1]} in token chunk {chunk}"):
        check_tokens(tokens)
        bounds = segments.bounds[experts.start : experts.stop]
        start = bounds[0][0]
        slots = segments.slots(slice(start, bounds[-1][1]))
        numbers = segments.rows(slots)
        ends = [stop - start for _, stop in bounds]
        if isinstance(numbers, slice):
            rows = tokens[numbers].copy()  # not the whole chunk
        else:
            rows = gather(tokens, numbers, tokens.dtype)
        if topk_weights is not None:
            compute = computing_dtype(tokens.dtype)
            weights = topk_weights.reshape(-1)[slots].astype(compute)
            rows = rows.astype(compute) * weights[:, None]
        return Picked(rows, ends)


def _add_rows(
    before: Gram | None,
    picked: Sequence[Picked],
    place: int,
    expert: Sequence[Any] | None,
    d: int,
    dtype: np.dtype,
    number: int,
) -> Gram | None:
    """Return the new sum, None without rows. The old one is not changed: the task may run again.

    `place` is the expert's place among those that are picked together.
    """
    parts = [some.of(place) for some in picked]
    count = sum(map(len, parts))
    if count == 0:
        return before
    with error_context(f"second moments of expert {number}"):
        rows = memory.empty((count, d), dtype)
        np.concatenate(parts, out=rows, casting="unsafe")
        for first in range(0, count, 4 * ROWS_TOGETHER):
            before = _plus(before, rows[first : first + 4 * ROWS_TOGETHER], expert)
        return before


def _plus(before: Gram | None, rows: np.ndarray, expert: Sequence[Any] | None) -> Gram:
    moments = _moments(rows, None if before is None else before.input)
    if expert is None:
        return Gram(moments, None)
    run_expert: Any = expert[0]  # one that has hidden activations, so not a function
    hidden = memory.empty((len(rows), run_expert.hidden), rows.dtype)
    for first in range(0, len(rows), ROWS_TOGETHER):
        tile = slice(first, first + ROWS_TOGETHER)
        taken = rows[tile].astype(run_expert.takes(rows.dtype), copy=False)
        run_expert.activate(taken, hidden[tile])
    return Gram(moments, _moments(hidden, None if before is None else before.hidden))


def _moments(rows: np.ndarray, before: np.ndarray | None) -> np.ndarray:
    """``rows.T @ rows + before``; NumPy computes half of a product with itself, and mirrors it."""
    product = memory.empty((rows.shape[1], rows.shape[1]), rows.dtype)
    np.matmul(rows.T, rows, out=product)
    if before is not None:
        product += before
    return product


def _side_of(gram: Gram | None, side: str, width: int, dtype: np.dtype) -> np.ndarray:
    return np.zeros((1, width, width), dtype) if gram is None else getattr(gram, side)[None]
