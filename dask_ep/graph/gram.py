"""How do the second moments of each expert's rows come together, expert by expert?

    tokens c, routing c ──> ep_pick (c, e): the rows of expert e
                                 │   of some chunks at a time
                                 v
    ep_gram (g, e): XᵀX so far, plus that of these rows ──> ep_gram (g + 1, e) ──> ...
         ^
    ep_gram_expert (e): loads the expert, where its hidden activations are asked for

(E, d, d) of results are more than there is memory for, and more than a chunk's answer could bring
along. So each expert is a block of its own; whoever computes some of them reads the tokens once for
these, and holds their results and no others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import dask.array as da
import numpy as np
from dask.base import tokenize
from dask.highlevelgraph import HighLevelGraph
from dask.task_spec import List, Task, TaskRef

from dask_ep.arrays import memory
from dask_ep.arrays.checks import check_routing, check_tokens, computing_dtype
from dask_ep.experts.experts import CallableExperts, Experts
from dask_ep.graph.keys import step_name
from dask_ep.graph.pipeline import Ready
from dask_ep.graph.rows import keys_of
from dask_ep.kernel.context import error_context, slots_of
from dask_ep.kernel.expert import Expert, as_local_experts
from dask_ep.kernel.host_kernel import gather

ROWS_TOGETHER = 1024
"""Rows of an expert, about, that are waited for before they are multiplied: the results are read
and written once for each such product."""


class Gram(NamedTuple):
    """Sums over some rows of an expert, in the computing dtype."""

    input: np.ndarray
    #: (d, d)
    hidden: np.ndarray | None
    #: (f, f), if it is asked for


def grams(ready: Ready, *, hidden: bool) -> dict[str, da.Array]:
    """Second moments of what each expert's matrices multiply.

    Parameters
    ----------
    ready : the layer, its placement aside
    hidden : whether those of hidden activations are wanted as well

    Returns
    -------
    ``gram.input`` (E, d, d) and ``gram.hidden`` (E, f, f), lazy, with one expert in each chunk

    Notes
    -----
    For C chunks, E experts and G groups of chunks: E (C + G) tasks and some for each expert. The
    products of a group of rows are made in the computing dtype, and added to those before; experts
    without rows have zeros.
    """
    tokens, experts = ready.tokens, ready.experts
    E, C, d = experts.num_experts, tokens.numblocks[0], tokens.shape[1]
    token = tokenize(tokens, ready.routing, ready.topk_weights, experts, hidden)
    on_input = getattr(experts, "options", {}).get("apply_router_weight_on_input", False)
    weights = ready.topk_weights if on_input else None
    keys: list[list[Any]] = [
        keys_of(a) if a is not None else [None] * C for a in (tokens, ready.routing, weights)
    ]
    step, dtype = group_of(ready), computing_dtype(tokens.dtype)
    pick, gram = step_name("pick", token), step_name("gram", token)
    tasks: dict[Any, Task] = {}
    last: list[Any] = []
    for e in range(E):
        state: TaskRef | None = None
        expert: TaskRef | None = None
        if hidden:
            expert = TaskRef((step_name("gram_expert", token), e))
            tasks[expert.key] = Task(expert.key, _load, experts.subset([e]), d, dtype, e)
        for c in range(C):
            of_chunk = [key and TaskRef(key[c]) for key in keys[:2]]
            weight = keys[2][c] and TaskRef(keys[2][c])
            tasks[pick, c, e] = Task((pick, c, e), _pick_rows, *of_chunk, weight, e, c)
        for g, first in enumerate(range(0, C, step)):
            rows = List([TaskRef((pick, c, e)) for c in range(first, min(first + step, C))])
            tasks[gram, g, e] = Task((gram, g, e), _add_rows, state, rows, expert, d, dtype, e)
            state = TaskRef((gram, g, e))
        last.append(state)
    inputs: list[Any] = [a for a in (tokens, ready.routing, weights) if a is not None]
    graph = HighLevelGraph.from_collections(gram, tasks, dependencies=inputs)
    sides: dict[str, Any] = {"input": d} | ({"hidden": experts.hidden} if hidden else {})
    return {
        f"gram.{side}": _side(graph, gram, last, side, width, dtype)
        for side, width in sides.items()
    }


def group_of(ready: Ready) -> int:
    """How many chunks bring an expert about `ROWS_TOGETHER` rows."""
    chunks, slots = ready.tokens.numblocks[0], slots_of(ready.routing)
    rows = ready.tokens.shape[0] * slots / max(ready.experts.num_experts * chunks, 1)
    if not rows > 0:  # unknown lengths
        return 1
    return int(min(max(ROWS_TOGETHER / rows, 1), max(chunks, 1)))


def _side(
    graph: HighLevelGraph,
    gram: str,
    last: Sequence[Any],
    side: str,
    width: int,
    dtype: np.dtype,
) -> da.Array:
    name = step_name(f"moments_{side}", gram.partition("-")[2])
    tasks = {
        (name, e, 0, 0): Task((name, e, 0, 0), _side_of, one, side, width, dtype)
        for e, one in enumerate(last)
    }
    layers: dict[str, Any] = {**graph.layers, name: tasks}
    whole = HighLevelGraph(layers, {**graph.dependencies, name: {gram}})
    return da.Array(whole, name, ((1,) * len(last), (width,), (width,)), dtype=dtype)


def _load(
    experts: Experts | CallableExperts, d: int, dtype: np.dtype, number: int
) -> Sequence[Expert]:
    with error_context(f"loading expert {number}"):
        like = np.empty((0, d), dtype)
        return as_local_experts(experts.load(dtype=dtype), d=d, like=like, dtype=dtype)


def _pick_rows(
    tokens: np.ndarray,
    routing: np.ndarray,
    topk_weights: np.ndarray | None,
    expert: int,
    chunk: int,
) -> np.ndarray:
    """The rows (m, d) that go to an expert, times their weights where these apply to the input."""
    with error_context(f"rows of expert {expert} in token chunk {chunk}"):
        check_tokens(tokens)
        check_routing(routing, topk_weights, n=len(tokens))
        slots = np.flatnonzero(routing.reshape(-1) == expert)
        rows = gather(tokens, slots // slots_of(routing), tokens.dtype)
        if topk_weights is None:
            return rows
        compute = computing_dtype(tokens.dtype)
        weights = topk_weights.reshape(-1)[slots].astype(compute)
        return rows.astype(compute) * weights[:, None]


def _add_rows(
    before: Gram | None,
    picked: Sequence[np.ndarray],
    expert: Sequence[Expert] | None,
    d: int,
    dtype: np.dtype,
    number: int,
) -> Gram | None:
    """A new sum, None of no rows: that of before is not changed, so that the task may run again."""
    count = sum(map(len, picked))
    if count == 0:
        return before
    with error_context(f"second moments of expert {number}"):
        rows = memory.empty((count, d), dtype)
        np.concatenate(picked, out=rows, casting="unsafe")
        for first in range(0, count, 4 * ROWS_TOGETHER):
            before = _plus(before, rows[first : first + 4 * ROWS_TOGETHER], expert)
        return before


def _plus(before: Gram | None, rows: np.ndarray, expert: Sequence[Expert] | None) -> Gram:
    moments = _moments(rows, None if before is None else before.input)
    if expert is None:
        return Gram(moments, None)
    run_expert: Any = expert[0]  # one that has hidden activations
    hidden = memory.empty((len(rows), run_expert.hidden), rows.dtype)
    for first in range(0, len(rows), ROWS_TOGETHER):
        tile = slice(first, first + ROWS_TOGETHER)
        out = memory.empty((len(rows[tile]), run_expert.d_out), rows.dtype)
        taken = rows[tile].astype(run_expert.takes(rows.dtype), copy=False)
        run_expert(taken, out=out, hidden=hidden[tile])
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
