"""Which statistics are collected of the rows that experts serve?

    tile of rows ── expert ──> hidden, output
         └──────────┬────────────────┘
                    v
    a row of numbers for each expert: columns of `amax.input`, `sumsq.hidden`, ...

Each statistic is one entry of `TILE_STATISTICS`. Two results are joined by a sum or a maximum, so
that chunks, ranks and replicas can be joined in any fixed order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from dask_ep.arrays import memory
from dask_ep.arrays.checks import computing_dtype
from dask_ep.arrays.namespaces import Array


class Tile(NamedTuple):
    """Some rows of one expert, and its outputs for them."""

    input: np.ndarray
    #: (m, d) as the expert reads them: times their top-k weights where these apply to the input
    hidden: np.ndarray | None
    #: (m, f) what the down projection multiplies; None if there is none, or it is not wanted
    output: np.ndarray
    #: (m, d_out) before top-k weights
    weights: np.ndarray | None
    #: (m,) top-k weights that will multiply the output; None if they are 1
    routed: np.ndarray | None
    #: (m,) which rows the router sent; None if it sent all


Take = Callable[[Tile, np.ndarray], None]
"""Joins a tile to the (w,) float64 numbers of its expert, in place."""


class TileStatistic(NamedTuple):
    """One statistic of an expert's rows."""

    of: str
    #: the rows whose channels it covers: "input", "hidden" or "output"; "" if it has no channels
    take: Take
    join: np.ufunc
    #: joins two results: np.add or np.maximum, for which zeros are neutral
    width: int = 1
    #: numbers per expert, if it has no channels


def _channels(
    of: str, reduce: Callable[[np.ndarray, np.ndarray], np.ndarray], join: np.ufunc
) -> TileStatistic:
    """A statistic of each channel, in runs of rows that stay in cache."""

    def take(tile: Tile, totals: np.ndarray) -> None:
        rows = getattr(tile, of)
        runs = memory.runs_in_cache(rows)
        scratch = np.empty((runs[0].stop if runs else 0, rows.shape[1]), rows.dtype)
        for run in runs:
            part = rows[run]
            join(totals, reduce(part, scratch[: len(part)]), out=totals)

    return TileStatistic(of, take, join)


def _amax(rows: np.ndarray, scratch: np.ndarray) -> np.ndarray:
    return np.abs(rows, out=scratch).max(axis=0)


def _sumsq(rows: np.ndarray, scratch: np.ndarray) -> np.ndarray:
    return np.square(rows, out=scratch).sum(axis=0)


def _sum(rows: np.ndarray, scratch: np.ndarray) -> np.ndarray:
    return rows.sum(axis=0)


def _take_reap(tile: Tile, totals: np.ndarray) -> None:
    """Sums of weight times norm, of norm, and of 1, over the rows that the router sent."""
    norms = np.sqrt(np.einsum("ij,ij->i", tile.output, tile.output))
    weighted = norms if tile.weights is None else norms * tile.weights
    if tile.routed is not None:
        norms, weighted = norms[tile.routed], weighted[tile.routed]
    totals += (weighted.sum(dtype=np.float64), norms.sum(dtype=np.float64), len(norms))


def _take_rows(tile: Tile, totals: np.ndarray) -> None:
    totals += len(tile.output)


TILE_STATISTICS: dict[str, TileStatistic] = {
    "coverage": TileStatistic("", _take_rows, np.add),
    "reap": TileStatistic("", _take_reap, np.add, width=3),
    "mean_output": _channels("output", _sum, np.add),
    **{f"sumsq.{of}": _channels(of, _sumsq, np.add) for of in ("input", "hidden", "output")},
    **{f"amax.{of}": _channels(of, _amax, np.maximum) for of in ("input", "hidden", "output")},
}
"""All statistics of tiles, by name. float32 sums of some ten rows are added in float64."""


class Observe(NamedTuple):
    """The statistics to collect of the rows of a layer's experts."""

    names: tuple[str, ...]
    #: names in `TILE_STATISTICS`
    d: int
    f: int | None
    #: width of hidden activations; None if experts have none
    d_out: int
    output: bool = False
    #: whether the experts' output is wanted as well
    slots: int = 1
    #: slots of a row
    k: int | None = None
    #: slots that its router chose, if others follow them; None: all

    def columns(self) -> dict[str, slice]:
        """The columns of each statistic in a row of a table."""
        widths = {"input": self.d, "hidden": self.f or 0, "output": self.d_out}
        found, start = {}, 0
        for name in self.names:
            entry = TILE_STATISTICS[name]
            stop = start + (widths[entry.of] if entry.of else entry.width)
            found[name], start = slice(start, stop), stop
        return found

    @property
    def width(self) -> int:
        """Numbers per expert."""
        return max((columns.stop for columns in self.columns().values()), default=0)

    def join(self, table: np.ndarray, others: np.ndarray, at: np.ndarray) -> None:
        """Join the rows of a table to rows `at` of another, one after the other, in place."""
        for name, columns in self.columns().items():
            TILE_STATISTICS[name].join.at(table[:, columns], at, others[:, columns])


class Seen:
    """Statistics of the rows of some neighbouring experts, collected as they are served.

    Parameters
    ----------
    observe : which statistics
    count : number of experts
    first : number of the first expert

    Attributes
    ----------
    table : (count, observe.width) float64; zeros for an expert that got no row
    """

    def __init__(self, observe: Observe, count: int, first: int = 0):
        self.observe, self._first = observe, first
        self.table = np.zeros((count, observe.width))
        self._columns = observe.columns()
        self._keeps_hidden = any(TILE_STATISTICS[name].of == "hidden" for name in observe.names)

    def through(
        self,
        e: int,
        expert: Any,
        rows: Array,
        weights: Array | None,
        slots: Array,
        out: Array,
    ) -> None:
        """Send rows (m, d) through expert `e`, to `out` (m, d_out), and collect the statistics."""
        hidden = None
        if self._keeps_hidden:
            hidden = memory.empty((len(rows), expert.hidden), computing_dtype(rows.dtype))
            expert(rows, out=out, hidden=hidden)
        else:
            expert(rows, out=out)
        k, routed = self.observe.k, None
        if k is not None:
            routed = slots % self.observe.slots < k
        rows = rows.astype(computing_dtype(rows.dtype), copy=False)
        tile = Tile(rows, hidden, out, weights, routed)
        totals = self.table[e - self._first]
        with np.errstate(over="ignore", invalid="ignore"):
            for name, columns in self._columns.items():
                TILE_STATISTICS[name].take(tile, totals[columns])
