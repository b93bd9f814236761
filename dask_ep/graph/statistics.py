"""How do the observations of each chunk's rows become statistics of all rows?

    pieces of chunk c ──> ep_partial (c): a vector ──┐
         routing, experts, router                    v
    ep_group (g): those of some chunks, joined one after the other in their order
                                                     v
    ep_total: those of all groups, likewise ──> statistics by name

A partial result is sent from its worker together with its chunk. Each is joined once, in a fixed
order: the bits do not depend on which worker was faster, or on what was lost on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from math import prod
from operator import itemgetter
from typing import Any, NamedTuple

import dask.array as da
import numpy as np
from dask.base import tokenize
from dask.task_spec import List, Task, TaskRef

from dask_ep.arrays.checks import check_indices, check_routing, raise_nan
from dask_ep.graph.chunk import Observed
from dask_ep.graph.keys import step_name
from dask_ep.graph.pipeline import Ready, Unfused, build_chunks, width_of_output
from dask_ep.graph.rows import array_of, block_by_block, first_rows, keys_of
from dask_ep.kernel.error_context import error_context, slots_of
from dask_ep.kernel.statistics import TILE_STATISTICS, Observe

GROUP_CHUNKS = 16
"""Maximum number of chunks whose partial results are joined to one of a group, which is kept for a
run that resumes: enough that it is small compared with their rows."""

Numbers = dict[str, np.ndarray]
"""Partial or whole results by name."""


class Part(NamedTuple):
    """One partial result."""

    shape: tuple[int, ...]
    join: np.ufunc
    #: np.add or np.maximum


class Partials(NamedTuple):
    """Partial results of one kind, of every chunk."""

    chunks: da.Array
    #: an array of objects, one for each chunk
    parts: Mapping[str, Part]
    take: Callable[[Any], Numbers]
    #: returns the partial results of an object


class PartialLayout:
    """The positions of partial results in one vector of float64.

    Counts are exact up to 2**53. Sums come first, so that two slices join all.
    """

    def __init__(self, parts: Mapping[str, Part]):
        self.parts = dict(sorted(parts.items(), key=lambda part: part[1].join is np.maximum))
        sizes = [prod(part.shape) for part in self.parts.values()]
        self.size, self._starts = sum(sizes), [0, *accumulate(sizes)]
        sums = sum(part.join is np.add for part in self.parts.values())
        self._maxima_from = self._starts[sums]

    def pack(self, numbers: Numbers) -> np.ndarray:
        """Concatenate partial results."""
        return np.concatenate([numbers[name].reshape(-1) for name in self.parts], dtype=np.float64)

    def unpack(self, vector: np.ndarray) -> Numbers:
        """Undo `pack`; returns views."""
        return {
            name: vector[start : start + prod(part.shape)].reshape(part.shape)
            for (name, part), start in zip(self.parts.items(), self._starts, strict=False)
        }

    def join(self, vectors: Iterable[np.ndarray]) -> np.ndarray:
        """Join vectors (..., size) one after the other, in their order."""
        vectors = iter(vectors)
        joined = np.array(next(vectors))
        sums, maxima = joined[..., : self._maxima_from], joined[..., self._maxima_from :]
        for vector in vectors:
            sums += vector[..., : self._maxima_from]
            np.maximum(maxima, vector[..., self._maxima_from :], out=maxima)
        return joined


# --- pieces ----------------------------------------------------------------------------------


def see_experts(
    ready: Ready, names: Sequence[str], *, output: bool, k: int | None = None
) -> tuple[Partials, da.Array | None]:
    """Observe the rows that experts serve.

    Parameters
    ----------
    ready : the layer
    names : names of `TILE_STATISTICS`
    output : whether to return the layer's output as well
    k : number of slots of a row that its router chose, if others follow

    Returns
    -------
    the observations, and the (N, d_out) output
    """
    experts, tokens = ready.experts, ready.tokens
    d, d_out = tokens.shape[1], width_of_output(experts, tokens)
    observe = Observe(tuple(names), d, experts.hidden, d_out, output, slots_of(ready.routing), k)
    both, columns = build_chunks(ready, observe), observe.columns()
    parts = {
        name: Part((experts.num_experts, at.stop - at.start), TILE_STATISTICS[name].join)
        for name, at in columns.items()
    }
    piece = Partials(both, parts, partial(_numbers_of_experts, columns))
    if not output:
        return piece, None
    name = step_name("output", tokenize(both.name))
    return piece, block_by_block(
        itemgetter(0), "nd", both, "nd", name=name, dtype=tokens.dtype, meta=tokens._meta
    )


def see_routing(ready: Ready, names: Sequence[str]) -> Partials:
    """Return the statistics of the routing: "usage", "coactivation"."""
    E, k = ready.experts.num_experts, slots_of(ready.routing)
    parts = {name: part for kind in names for name, part in ROUTING_STATISTICS[kind](E, k).items()}
    token = tokenize(ready.routing, ready.topk_weights, E, tuple(names))
    name, weights = step_name("usage", token), ready.topk_weights
    keys = (
        [None] * ready.routing.numblocks[0] if weights is None else map(TaskRef, keys_of(weights))
    )
    firsts = first_rows(ready.routing.chunks[0])
    tasks: dict[Any, Task] = {}
    for c, (key, weight) in enumerate(zip(keys_of(ready.routing), keys, strict=True)):
        tasks[name, c, 0] = Unfused(
            (name, c, 0), _see_routing, TaskRef(key), weight, E, frozenset(names), c, firsts[c]
        )
    inputs = [a for a in (ready.routing, weights) if a is not None]
    return Partials(objects(name, tasks, inputs, len(firsts)), parts, dict)


def objects(name: str, tasks: dict[Any, Task], inputs: Sequence[da.Array], chunks: int) -> da.Array:
    """Return an array with one object for each of `chunks` chunks, for `Partials`."""
    return array_of(name, tasks, inputs, ((1,) * chunks, (1,)), np.empty((0, 0), object))


ROUTING_STATISTICS: dict[str, Callable[[int, int], dict[str, Part]]] = {
    "usage": lambda E, k: {
        "usage.rows": Part((E,), np.add),
        "usage.weight": Part((E,), np.add),
        "usage.slots": Part((E, k), np.add),
    },
    "coactivation": lambda E, k: {"coactivation": Part((E, E), np.add)},
    "coverage": lambda E, k: {"coverage": Part((E, 1), np.add)},
}
"""Partial results of each statistic of the routing, by E and k."""


def _see_routing(
    routing: np.ndarray,
    topk_weights: np.ndarray | None,
    E: int,
    names: frozenset[str],
    chunk: int,
    first_row: int | None,
) -> Numbers:
    with error_context(f"statistics of the routing of token chunk {chunk}", first_row):
        check_routing(routing, topk_weights, n=len(routing))
        check_indices(routing, E)
        if topk_weights is not None and np.isnan(topk_weights).any():
            raise_nan(topk_weights)
        slots = (routing if routing.ndim == 2 else routing[:, None]).astype(np.intp)
        found: Numbers = {}
        if "usage" in names:
            found |= _count_usage(slots, topk_weights, E)
        if "coverage" in names:
            found["coverage"] = np.bincount(slots.reshape(-1) + 1, minlength=E + 1)[1:, None]
        if "coactivation" in names:
            chosen = np.zeros((len(slots), E + 1), np.float32)  # the last, [-1], is for no expert
            np.put_along_axis(chosen, slots, 1, axis=1)
            chosen = chosen[:, :E]
            found["coactivation"] = chosen.T @ chosen  # exact below 2**24 rows
        return found


def _count_usage(slots: np.ndarray, topk_weights: np.ndarray | None, E: int) -> Numbers:
    k = slots.shape[1]
    codes = (slots + 1) * k + np.arange(k)  # expert and slot in one number; those of -1 come first
    by_slot = np.bincount(codes.reshape(-1), minlength=(E + 1) * k).reshape(E + 1, k)[1:]
    rows = by_slot.sum(axis=1)
    if topk_weights is None:
        return {"usage.rows": rows, "usage.weight": rows, "usage.slots": by_slot}
    weights = topk_weights.reshape(-1).astype(np.float64)
    weight = np.bincount(slots.reshape(-1) + 1, weights, minlength=E + 1)[1:]
    return {"usage.rows": rows, "usage.weight": weight, "usage.slots": by_slot}


def _numbers_of_experts(columns: dict[str, slice], observed: Observed) -> Numbers:
    return {name: observed[1][:, at] for name, at in columns.items()}


# --- joining ---------------------------------------------------------------------------------


def join_groups(
    pieces: Sequence[Partials], chunk_bytes: float
) -> tuple[da.Array, PartialLayout, int, int]:
    """Join the partial results of some chunks at a time.

    Parameters
    ----------
    pieces : those of all chunks
    chunk_bytes : about how many bytes the rows of a chunk have

    Returns
    -------
    (G, size) float64 lazy array, one group per chunk; the layout of its rows; the number of chunks,
    and how many of them make a group
    """
    layout = PartialLayout({name: part for piece in pieces for name, part in piece.parts.items()})
    arrays: list[Any] = [piece.chunks for piece in pieces]
    chunks, takes = arrays[0].numblocks[0], [piece.take for piece in pieces]
    step = choose_group_chunks(8 * layout.size, chunk_bytes)
    token = tokenize(*(array.name for array in arrays), step)
    tasks: dict[Any, Task] = {}
    partial_name, group_name = step_name("partial", token), step_name("group", token)
    groups = -(-chunks // step)
    for g in range(groups):
        before = None
        for c in range(g * step, min((g + 1) * step, chunks)):
            of_chunk = List([TaskRef((array.name, c, 0)) for array in arrays])
            key = (partial_name, c)
            tasks[key] = Task(key, _join_chunk, before, layout, takes, of_chunk)
            before = TaskRef(key)
        tasks[group_name, g, 0] = Task((group_name, g, 0), np.atleast_2d, before)
    rows = ((1,) * groups, (layout.size,))
    joined = array_of(group_name, tasks, arrays, rows, np.empty((0, 0)))
    return joined, layout, chunks, step


def choose_group_chunks(partial_bytes: int, chunk_bytes: float) -> int:
    """Return how many chunks make a group whose partial results are small next to their bytes.

    Examples
    --------
    >>> choose_group_chunks(10_000, 32 << 20), choose_group_chunks(8 << 20, 32 << 20)
    (1, 4)
    >>> choose_group_chunks(10_000, 2 / 3) == GROUP_CHUNKS  # most chunks are empty
    True
    """
    if not chunk_bytes > 0:
        return GROUP_CHUNKS
    return int(min(max(-(-16 * partial_bytes // chunk_bytes), 1), GROUP_CHUNKS))


def finished(
    groups: da.Array, layout: PartialLayout, finish: Callable[[Numbers], Numbers]
) -> dict[str, da.Array]:
    """Apply `finish` to the joined groups; returns lazy arrays of one chunk each, by name."""
    token = tokenize(groups.name, finish)
    name = step_name("total", token)
    keys = List([TaskRef(key) for key in keys_of(groups)])
    tasks: dict[Any, Task] = {(name,): Task((name,), finish_groups, layout, finish, keys)}
    total = array_of(name, tasks, [groups], (), np.empty((), object))
    found = {}
    for what, example in finish(layout.unpack(np.zeros(layout.size))).items():
        one = step_name(f"statistic-{what}", token)
        key, shape = (one, *(0,) * example.ndim), tuple((n,) for n in example.shape)
        found[what] = array_of(
            one, {key: Task(key, itemgetter(what), TaskRef((name,)))}, [total], shape, example
        )
    return found


def finish_groups(
    layout: PartialLayout, finish: Callable[[Numbers], Numbers], rows: Iterable[np.ndarray]
) -> Numbers:
    """Finish the statistics of all groups, whose vectors (..., size) come in their order."""
    return finish(layout.unpack(layout.join(rows).reshape(-1)))


def name_statistics(totals: Numbers) -> Numbers:
    """Return statistics by name from joined results; an expert without rows has zeros."""
    found: Numbers = {}
    for name, total in totals.items():
        if name in _COUNTS:
            found[name] = np.asarray(total).astype(np.int64)
        elif name in _MEANS_OF_ROWS:
            found[name] = np.asarray(total / np.maximum(totals["router.rows"], 1))
        elif name == "coverage":
            found["coverage.rows"] = total[:, 0].astype(np.int64)
        elif name == "mean_output":
            found["mean_output.sum"] = total
            found["mean_output.mean"] = total / np.maximum(totals["coverage"], 1)
        elif name == "reap":
            weighted, norm, rows = total.T
            some = np.maximum(rows, 1)
            found |= {"reap.score": weighted / some, "reap.norm": norm / some}
            found["reap.rows"] = rows.astype(np.int64)
        else:
            found[name] = total
    if "coverage.rows" not in found and "usage.rows" in found:
        found["coverage.rows"] = found["usage.rows"]
    return found


_COUNTS = {
    *("usage.rows", "usage.slots", "coactivation", "router.rows"),
    *(f"router.{what}_histogram" for what in ("entropy", "z_loss", "margin")),
}
_MEANS_OF_ROWS = {f"router.{what}" for what in ("probability", "entropy", "z_loss", "margin")}


def _join_chunk(
    before: np.ndarray | None,
    layout: PartialLayout,
    takes: Sequence[Callable[[Any], Numbers]],
    pieces: Sequence[Any],
) -> np.ndarray:
    numbers: Numbers = {}
    for take, piece in zip(takes, pieces, strict=True):
        numbers |= take(piece)
    vector = layout.pack(numbers)
    return vector if before is None else layout.join([before, vector])
