"""How do experts process the rows of a chunk, one expert after the other, on the host?

In tiles, each of which stays in cache from one step to the next:

    slots of an expert
         ├─ gather their rows ─> expert ─> times the top-k weight ─> add to the rows
         v
    output [n, d_out]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np
from scipy.sparse._sparsetools import csc_matvecs  # public `csc_array @ y` allocates

from dask_ep.arrays import memory
from dask_ep.arrays.checks import computing_dtype
from dask_ep.arrays.namespaces import UNDERFLOW_IS_ZERO, Array, namespace
from dask_ep.kernel import device_kernel
from dask_ep.kernel.expert import Expert, as_local_experts
from dask_ep.kernel.segments import Segments
from dask_ep.kernel.statistics import Seen

TILE_BYTES = 8 << 20
"""Bytes of the widest rows of one matrix product on the CPU: a share of the last-level cache."""

TILES_HELD = 8
"""Tiles that a thread has in memory while it computes: rows, hidden columns, outputs; and unused
ones of other sizes in the pool."""

TILE_ROWS = (192, 1024)
"""Fewest and most rows of one product on the CPU, of any width: with fewer, packing the matrix
costs more than a tenth of the product; with more, nothing is gained and cache is lost."""

Write = Callable[..., None]
"""Adds rows (m, d_out) to rows (m,) of an output, or writes them: `add_rows`, `assign_rows`."""


class Served:
    """The rows of a chunk, and the sum of the outputs of the experts that have served them so far.

    Parameters
    ----------
    tokens : (n, d)
    segments : from `sort_slots` of their routing
    topk_weights : of the shape of the routing, or None
    d_out : int
    in_place : bool
        Whether the tokens may be overwritten by the output: possible where `can_be_in_place`, as a
        row with one slot is not needed any more when its expert has served it.
    seen : Seen, optional
        Collects the statistics wanted of the rows as they are served.

    Attributes
    ----------
    out : (n, d_out) array, see `begin_output`; the output once all experts have been added
    """

    def __init__(
        self,
        tokens: Array,
        segments: Segments,
        topk_weights: Array | None,
        d_out: int,
        *,
        in_place: bool = False,
        seen: Seen | None = None,
    ):
        self._begin(tokens, segments, topk_weights, seen)
        if in_place and can_be_in_place(segments.k, tokens.shape[1], d_out, tokens.dtype):
            tokens[segments.not_ours()] = 0
            self.out, self._write = tokens, assign_rows
        else:
            self.out, self._write = begin_output(len(tokens), segments, d_out, tokens.dtype, tokens)

    def _begin(
        self, tokens: Array, segments: Segments, topk_weights: Array | None, seen: Seen | None
    ) -> None:
        self._tokens, self._segments, self._seen = tokens, segments, seen
        self._weights = None if topk_weights is None else topk_weights.reshape(-1)

    def _target(self, tile: slice, rows: Array | slice) -> Array | slice:
        """Numbers of the output rows of a tile."""
        return rows

    @UNDERFLOW_IS_ZERO
    def add(self, e: int, expert: Expert) -> None:
        """Send the rows of local expert `e` through it, and add its outputs."""
        compute = computing_dtype(self._tokens.dtype)
        see = None if self._seen is None else partial(self._seen.through, e)
        for tile in tiles(*self._segments.bounds[e], expert, compute):
            slots = self._segments.slots(tile)
            rows = self._segments.rows(slots)
            to = self._target(tile, rows)
            _apply(
                expert, self._tokens, rows, slots, self._weights, compute, self.out, to,
                self._write, see,
            )  # fmt: skip


class Answer(Served):
    """The answer of one rank: the sums over its own experts, for its own rows of a chunk only.

    Parameters
    ----------
    tokens, segments, topk_weights, d_out, seen : see `Served`; segments of all physical experts
    rank, num_local : r, which owns the experts [r * num_local, (r + 1) * num_local)
    out : where to write it, see `begin_answers`; default: a new array

    Attributes
    ----------
    out : (m, d_out), of the tokens' dtype with one slot per row, else of the computing dtype; its
        rows are those of `Segments.rows_of`, in that order
    """

    def __init__(
        self,
        tokens: Array,
        segments: Segments,
        topk_weights: Array | None,
        d_out: int,
        rank: int,
        num_local: int,
        seen: Seen | None = None,
        out: Array | None = None,
    ):
        self._begin(tokens, segments, topk_weights, seen)
        self._first, last = segments.of_rank(rank, num_local)
        if out is None:
            (out,) = begin_answers(tokens, segments, [rank], num_local, d_out)[1]
        self.out = out
        rows, self._place = segments.rows_of(rank, num_local, len(tokens)), None
        if segments.k == 1 or (num_local == 1 and last - self._first == len(out)):
            self._write = assign_rows  # in the order of the slots: nothing is summed
            return
        out.fill(0)
        self._write = add_rows
        self._place = np.empty(len(tokens), np.intp)
        self._place[rows] = np.arange(len(out))

    def _target(self, tile: slice, rows: Array | slice) -> Array | slice:
        if self._place is None:
            return slice(tile.start - self._first, tile.stop - self._first)
        return self._place[rows]


class Watched(Served):
    """The rows of a chunk that experts serve for their statistics only: no output is made.

    Attributes
    ----------
    out : (0, d_out) array
    """

    def __init__(
        self, tokens: Array, segments: Segments, topk_weights: Array | None, d_out: int, seen: Seen
    ):
        self._begin(tokens, segments, topk_weights, seen)
        self.out, self._write = np.empty((0, d_out), tokens.dtype), _drop_rows


def answer_of_rank(
    tokens: Array,
    segments: Segments,
    topk_weights: Array | None,
    expert_Ws: Array | Sequence[Any],
    rank: int,
    d_out: int | None = None,
    seen: Seen | None = None,
    out: Array | None = None,
) -> Array:
    """As `expert_parallel_dispatch` on the host, with the rank's own rows alone, already sorted.

    Parameters
    ----------
    tokens, topk_weights : of a chunk or packet, checked
    segments : of its slots at all physical experts
    expert_Ws : the experts of the rank
    rank : r
    d_out : width of the experts' outputs, if known
    seen : collects the statistics of the rank's experts
    out : where to write the answer, see `begin_answers`

    Returns
    -------
    (m, d_out), see `Answer`; (0, d_out) if only statistics are wanted
    """
    compute = computing_dtype(tokens.dtype)
    experts = as_local_experts(
        expert_Ws, d=tokens.shape[1], like=tokens, dtype=compute, d_out=d_out
    )
    d_out = experts[0].d_out
    if seen is not None and not seen.observe.output:
        answer: Served = Watched(tokens, segments, topk_weights, d_out, seen)
    else:
        answer = Answer(tokens, segments, topk_weights, d_out, rank, len(experts), seen, out)
    for e, expert in enumerate(experts, rank * len(experts)):
        answer.add(e, expert)
    return answer.out


def begin_answers(
    tokens: Array,
    segments: Segments,
    ranks: Sequence[int],
    num_local: int,
    d_out: int,
    is_wanted: bool = True,
) -> tuple[Array, list[Array]]:
    """Make one array for the answers of some ranks, to be sent as one; and the part of each.

    They have no rows if no output is wanted.
    """
    counts = [segments.count_rows(rank, num_local, len(tokens)) * is_wanted for rank in ranks]
    dtype = tokens.dtype if segments.k == 1 else computing_dtype(tokens.dtype)
    whole = memory.empty((sum(counts), d_out), dtype, like=tokens)
    return whole, parts_of(whole, counts)


def parts_of(whole: Array, counts: Sequence[int]) -> list[Array]:
    """Cut an array into runs of the given numbers of rows.

    Examples
    --------
    >>> import numpy as np
    >>> [len(part) for part in parts_of(np.zeros((5, 2)), [3, 0, 2])]
    [3, 0, 2]
    """
    return [whole[end - count : end] for end, count in zip(accumulate(counts), counts, strict=True)]


def begin_output(
    n: int, segments: Segments, d_out: int, dtype: np.dtype, like: Array
) -> tuple[Array, Write]:
    """Make an output (n, d_out), and return it with the function that adds an expert's rows.

    With one slot per row it has the tokens' dtype, and each row is written once; with more, the
    computing dtype, starting from zero. Adding experts in the order of their numbers gives the
    same bits each time.
    """
    if segments.k > 1:
        out = memory.empty((n, d_out), computing_dtype(dtype), like=like)
        out.fill(0)
        return out, add_rows
    out = memory.empty((n, d_out), dtype, like=like)
    out[segments.not_ours()] = 0
    return out, assign_rows


def can_be_in_place(k: int, d: int, d_out: int, dtype: np.dtype) -> bool:
    """Whether outputs fit in the tokens' memory: one slot per row, the same width and dtype."""
    return k == 1 and d == d_out and computing_dtype(dtype) == dtype


def tiles(start: int, stop: int, expert: Expert, compute: np.dtype) -> list[slice]:
    """Cut an expert's segment into equal runs that stay in cache."""
    m = stop - start
    if m == 0:
        return []
    rows = tile_rows(expert.widest * compute.itemsize)
    rows = math.ceil(m / math.ceil(m / rows))
    return [slice(s, min(s + rows, stop)) for s in range(start, stop, rows)]


def tile_rows(row_bytes: int) -> int:
    """Rows of a tile on the CPU, at most, by the bytes of the widest row."""
    fewest, most = TILE_ROWS
    return min(max(TILE_BYTES // max(row_bytes, 1), fewest), most)


def tile_bytes(row_bytes: int) -> int:
    """Bytes of the tiles that a thread has in memory at most, by the bytes of the widest row.

    Examples
    --------
    >>> tile_bytes(4096 * 4) >> 20, tile_bytes(64 * 4) >> 20
    (64, 2)
    """
    return TILES_HELD * tile_rows(row_bytes) * row_bytes


def _apply(
    expert: Expert,
    tokens: Array,
    rows: Array | slice,
    slots: Array | slice,
    weights: Array | None,
    compute: np.dtype,
    out: Array,
    to: Array | slice,
    write: Write,
    see: Callable[..., None] | None,
) -> None:
    """One tile: gather its rows, expert, weight, write to rows `to` of the output.

    `see` is `Seen.through` of the expert, if statistics are collected.
    """
    contiguous = isinstance(rows, slice)
    weighed_before = weights is not None and expert.apply_router_weight_on_input
    dtype = compute if weighed_before else expert.takes(tokens.dtype)
    x = tokens[rows].astype(dtype, copy=False) if contiguous else gather(tokens, rows, dtype)
    if contiguous and out is tokens:
        x = x.copy()  # experts read their rows again while they write
    w = None if weights is None else weights[slots].astype(compute, copy=False)
    if w is not None and weighed_before:
        x = np.multiply(x, w[:, None], out=None if contiguous else x)
        w = None
    in_place = isinstance(to, slice) and write is assign_rows and out.dtype == compute
    y = out[to] if in_place else memory.empty((len(x), expert.d_out), compute, like=x)
    if see is None:
        expert(x, out=y)
    else:
        see(expert, x, w, slots, y)
    if not in_place:
        write(out, to, y, w)
    elif w is not None:
        y *= w[:, None]


def _drop_rows(out: Array, rows: Array | slice, y: Array, weights: Array | None = None) -> None:
    """Write nothing: the output is not wanted."""


def assign_rows(out: Array, rows: Array | slice, y: Array, weights: Array | None = None) -> None:
    """Write y (m, d), times weights (m,), over rows (m,) of out (n, d); `y` is lost."""
    for run in memory.runs_in_cache(y):
        if weights is not None:
            y[run] *= weights[run, None]
        if not isinstance(rows, slice):
            out[rows[run]] = y[run]
    if isinstance(rows, slice):
        out[rows] = y


def add_rows(out: Array, rows: Array, y: Array, weights: Array | None = None) -> None:
    """Add y (m, d), times weights (m,), to rows (m,) of out (n, d), one after the other.

    Notes
    -----
    Rows may repeat. One pass over `y` and `out` adds all: a matrix (n, m) with one weight in each
    column, times `y`. SciPy does that without the GIL and in order, so the bits are the same each
    time.
    """
    m, (n, d) = len(rows), out.shape
    one_each = np.arange(m + 1, dtype=rows.dtype)
    weights = np.ones(m, out.dtype) if weights is None else weights
    y = np.ascontiguousarray(y, out.dtype).reshape(-1)
    csc_matvecs(n, m, d, one_each, rows, weights, y, out.reshape(-1, copy=False))


def gather(tokens: Array, rows: Array, dtype: np.dtype) -> Array:
    """Copy rows (m,) of tokens (n, d) to a new (m, d) array of any dtype."""
    if namespace(tokens) is not np:
        return device_kernel.gather(tokens, rows).astype(dtype, copy=False)
    taken = memory.empty((len(rows), tokens.shape[1]), tokens.dtype)
    np.take(tokens, rows, axis=0, out=taken, mode="clip")  # "raise" would buffer `out`
    if taken.dtype == dtype:
        return taken
    converted = memory.empty(taken.shape, dtype)
    converted[...] = taken
    return converted
