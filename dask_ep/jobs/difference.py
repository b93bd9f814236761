"""How far are two outputs apart, and which rows did their routers send elsewhere?

    outputs a, b, routing of both (c) ── one task per chunk ──> Difference (c)
    Difference (0), Difference (1), ... ── joined in the order of chunks ──> Difference

The error of a row is ``|a - b| / |a|``, with Euclidean norms. It is infinite if only a is zero, or
if one of the two holds NaN or infinity where the other differs. A `Difference` holds counts and
sums, not the error of each row: errors are counted in bins whose width is 0.8 % of their size, so
that quantiles of any number of rows fit into a few kilobytes. The largest errors are exact.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any, NamedTuple

import dask.array as da
import numpy as np
from dask.base import tokenize

from dask_ep.arrays.checks import check_indices
from dask_ep.graph.keys import step_name
from dask_ep.graph.rows import block_by_block, first_rows
from dask_ep.kernel.error_context import error_context

MOST_ROWS = 10
"""Number of rows that are listed: the worst ones, and the first whose routing differs."""

TILE = 1 << 12
"""Rows that are compared at a time."""


class WorstRow(NamedTuple):
    """A row and its error."""

    error: float
    row: int


@dataclass(frozen=True)
class Difference:
    """The result of comparing rows of two outputs."""

    num_experts: int
    #: of the routing; 0 without a routing
    rows: int = 0
    beyond: int = 0
    #: number of rows whose error is beyond the tolerance
    moved: int = 0
    #: number of rows whose sets of experts differ
    bins: Counter[int] = field(default_factory=Counter)
    #: rows by the size of their error, see `quantile`
    bins_of_moved: Counter[int] = field(default_factory=Counter)
    #: the same for the rows whose experts differ
    worst: tuple[WorstRow, ...] = ()
    #: the worst first; among equals the lower row
    first_moved: tuple[int, ...] = ()
    #: the first of the rows whose experts differ
    expert_rows: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    #: (E,) rows that chose each expert in a
    expert_errors: np.ndarray = field(default_factory=lambda: np.zeros(0))
    #: (E,) sum of the finite errors of these rows
    expert_largest: np.ndarray = field(default_factory=lambda: np.zeros(0))
    #: (E,) largest error of these rows
    lost: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    #: (E,) rows that chose each expert in a, but not in b
    gained: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    #: (E,) rows that chose each expert in b, but not in a
    moved_slots: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    #: (k,) how often b did not choose the expert in each slot of a, the best slot first
    pairs: Counter[tuple[int, int]] = field(default_factory=Counter)
    #: (expert of a, expert of b) in the rows that differ in one expert

    @classmethod
    def none(cls, num_experts: int, slots: int) -> Difference:
        """The difference of no rows."""
        counts: dict[str, Any] = {name: np.zeros(num_experts, np.int64) for name in _OF_EXPERTS}
        counts |= {name: np.zeros(num_experts) for name in ("expert_errors", "expert_largest")}
        return cls(num_experts, moved_slots=np.zeros(slots, np.int64), **counts)

    def join(self, other: Difference) -> Difference:
        """Join with the difference of later rows."""
        added = {name: getattr(self, name) + getattr(other, name) for name in _ADDED}
        worst = sorted(self.worst + other.worst, key=lambda row: (-row.error, row.row))
        return Difference(
            self.num_experts,
            worst=tuple(worst[:MOST_ROWS]),
            first_moved=(self.first_moved + other.first_moved)[:MOST_ROWS],
            expert_largest=np.maximum(self.expert_largest, other.expert_largest),
            **added,
        )

    @property
    def largest(self) -> float:
        """The largest error; 0 without rows."""
        return self.worst[0].error if self.worst else 0.0

    def quantile(self, part: float, *, of_moved: bool = False) -> float:
        """Return the error that a fraction of the rows does not exceed, at most 0.8 % too large.

        Parameters
        ----------
        part : the fraction, 0.5 for the median
        of_moved : whether to count only rows whose experts differ

        Examples
        --------
        >>> found = compare_rows(np.ones((3, 1)), np.array([[1.0], [1.7], [4.0]]))
        >>> [round(found.quantile(part), 2) for part in (0.1, 0.5, 1.0)]
        [0.0, 0.7, 3.0]
        """
        bins = self.bins_of_moved if of_moved else self.bins
        wanted, seen = part * sum(bins.values()), 0
        for number in sorted(bins):
            seen += bins[number]
            if seen >= wanted:  # the upper end of the bin
                return float(np.array(number << 16, np.uint32).view(np.float32))
        return 0.0

    @property
    def expert_means(self) -> np.ndarray:
        """Return (E,) the mean error of the rows of each expert; 0 without rows."""
        finite = self.expert_errors / np.maximum(self.expert_rows, 1)
        return np.where(np.isinf(self.expert_largest), np.inf, finite)


_OF_EXPERTS = ("expert_rows", "lost", "gained")
_ADDED = (
    *("rows", "beyond", "moved", "bins", "bins_of_moved", "pairs", "moved_slots"),
    *(*_OF_EXPERTS, "expert_errors"),
)


# --- of arrays in memory -------------------------------------------------------------------------


def compare_rows(
    a: np.ndarray,
    b: np.ndarray,
    routing: Sequence[np.ndarray] = (),
    *,
    num_experts: int = 0,
    tolerance: float = np.inf,
    first_row: int = 0,
) -> Difference:
    """Compare two outputs of the same rows.

    Parameters
    ----------
    a, b : (n, d) floats
    routing : (n, k) indices of a, and (n, k') of b if its routing is compared too
    num_experts : E, if there is a routing
    tolerance : errors above it are counted
    first_row : index of the first of these rows
    """
    slots = routing[0].shape[1] if routing else 0
    found = Difference.none(num_experts, slots)
    for start in range(0, len(a), TILE):
        part = slice(start, start + TILE)
        errors = row_errors(a[part], b[part])
        tile = _of_errors(errors, first_row + start, tolerance, num_experts, slots)
        if routing:
            tile = _with_routing(tile, errors, [r[part] for r in routing], first_row + start)
        found = found.join(tile)
    return found


def row_errors(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the errors (n,) of the rows of b, float64."""
    with np.errstate(all="ignore"):
        x, y = a.astype(np.float64), b.astype(np.float64)
        same = (x == y) | (np.isnan(x) & np.isnan(y))
        error = _norm(np.where(same, 0.0, x - y)) / _norm(x)
    finite = np.isfinite(x).all(axis=1) & np.isfinite(y).all(axis=1)
    return np.where(same.all(axis=1), 0.0, np.where(finite, error, np.inf))


def _norm(rows: np.ndarray) -> np.ndarray:
    """Return Euclidean norms, scaled so that squares neither overflow nor underflow."""
    largest = np.abs(rows).max(axis=1, keepdims=True, initial=0.0)
    scale = np.where((largest > 0) & np.isfinite(largest), largest, 1.0)
    return np.sqrt(np.square(rows / scale).sum(axis=1)) * scale[:, 0]


def _of_errors(
    errors: np.ndarray, first_row: int, tolerance: float, num_experts: int, slots: int
) -> Difference:
    order = np.argsort(-errors, kind="stable")[:MOST_ROWS]
    worst = tuple(WorstRow(float(errors[i]), first_row + int(i)) for i in order)
    beyond = int((errors > tolerance).sum())
    nothing = Difference.none(num_experts, slots)
    return replace(nothing, rows=len(errors), beyond=beyond, bins=_bins(errors), worst=worst)


def _with_routing(
    found: Difference, errors: np.ndarray, routing: Sequence[np.ndarray], first_row: int
) -> Difference:
    E, a = found.num_experts, routing[0]
    chose = _chosen(a, E)
    finite = np.where(np.isfinite(errors), errors, 0.0)
    changes: dict[str, Any] = {
        "expert_rows": chose.sum(axis=0),
        "expert_errors": finite @ chose,
        "expert_largest": np.where(chose, errors[:, None], 0.0).max(axis=0, initial=0.0),
    }
    if len(routing) == 2:
        other = _chosen(routing[1], E)
        lost, gained = chose & ~other, other & ~chose
        moved = np.flatnonzero(lost.any(axis=1) | gained.any(axis=1))
        single = moved[(lost[moved].sum(axis=1) == 1) & (gained[moved].sum(axis=1) == 1)]
        pairs = zip(lost[single].argmax(axis=1), gained[single].argmax(axis=1), strict=True)
        slots = np.take_along_axis(lost, np.maximum(a, 0), axis=1) & (a >= 0)
        changes |= {
            "lost": lost.sum(axis=0),
            "gained": gained.sum(axis=0),
            "moved": len(moved),
            "bins_of_moved": _bins(errors[moved]),
            "first_moved": tuple((first_row + moved[:MOST_ROWS]).tolist()),
            "moved_slots": slots.sum(axis=0),
            "pairs": Counter((int(x), int(y)) for x, y in pairs),
        }
    return replace(found, **changes)


def _chosen(routing: np.ndarray, num_experts: int) -> np.ndarray:
    """Return (n, E) bool: which experts each row chose."""
    chose = np.zeros((len(routing), num_experts + 1), bool)
    np.put_along_axis(chose, routing.astype(np.int64) % (num_experts + 1), True, axis=1)
    return chose[:, :num_experts]  # -1 is the last column


def _bins(errors: np.ndarray) -> Counter[int]:
    """Count rows by the first 16 bits of their error in float32, rounded up."""
    small = np.minimum(errors, float(np.finfo(np.float32).max)).astype(np.float32)
    small[np.isinf(errors)] = np.inf
    numbers, counts = np.unique((small.view(np.uint32) + 0xFFFF) >> 16, return_counts=True)
    return Counter(dict(zip(numbers.tolist(), counts.tolist(), strict=True)))


# --- of Dask arrays ------------------------------------------------------------------------------


def differences(
    a: da.Array,
    b: da.Array,
    routing: Sequence[da.Array] = (),
    *,
    num_experts: int = 0,
    tolerance: float = np.inf,
) -> da.Array:
    """Compare two outputs lazily, chunk by chunk; `join` combines the results.

    Parameters
    ----------
    a, b, routing : in the same row chunks, one chunk wide; otherwise as in `compare_rows`

    Returns
    -------
    (C,) Dask array of objects, a `Difference` for each of the C chunks. C + C / 7 tasks with those
    of `join`, the same for any scheduler.
    """
    firsts = da.from_array(np.array(first_rows(a.chunks[0]), np.int64), chunks=1)
    firsts = da.Array(
        firsts.dask, firsts.name, chunks=(a.chunks[0],), meta=np.empty(0, np.int64)
    )  # one number per chunk, even if chunks have unknown lengths
    args: list[Any] = [a, "cd", b, "ce", firsts, "c"]
    for number, each in enumerate(routing):
        args += [each if each.ndim == 2 else each[:, None], f"c{'kl'[number]}"]
    name = step_name("compare", tokenize(*args[::2], num_experts, tolerance))
    return block_by_block(
        _compare_chunk, "c", *args, name=name, num_experts=num_experts, tolerance=tolerance,
        adjust_chunks={"c": 1}, dtype=object, meta=np.empty(0, object),
    )  # fmt: skip


def join(found: da.Array) -> da.Array:
    """Join the differences of all chunks, in order, to an array () of one."""
    return da.reduction(
        found, _as_it_is, _joined, combine=_joined, dtype=object, concatenate=False, split_every=8,
        meta=np.empty((), object),
    )  # fmt: skip


def _compare_chunk(
    a: Any, b: Any, first: np.ndarray, *routing: Any, num_experts: int, tolerance: float
) -> np.ndarray:
    a, b, *chosen = (x.get() if hasattr(x, "get") else x for x in (a, b, *routing))
    one, row = np.empty(1, object), int(first[0])
    with error_context("comparing a routing", row):
        for routed in chosen:
            check_indices(routed, num_experts)
    one[0] = compare_rows(a, b, chosen, num_experts=num_experts, tolerance=tolerance, first_row=row)
    return one


def _as_it_is(found: np.ndarray, axis: Any, keepdims: bool) -> np.ndarray:
    return found


def _joined(found: Any, axis: Any, keepdims: bool) -> np.ndarray:
    parts = found if isinstance(found, list) else [found]
    joined = np.empty((1,) if keepdims else (), object)
    joined[...] = reduce(Difference.join, (part.reshape(-1)[0] for part in parts))
    return joined
