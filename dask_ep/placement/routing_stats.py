"""What follows from the routing, before any expert runs?

One streaming pass reads the routing block by block, counts the rows of every expert, and keeps the
routing itself as the smallest integers in an unnamed temporary file: 1 or 2 bytes for each of the
n * k slots, while a token row has thousands. Any placement and any chunk size can then be evaluated
without reading the routing again, or running the router on the tokens.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import dask
import dask.array as da
import numpy as np
from dask.system import CPU_COUNT

from dask_ep.arrays.checks import refuse_masked
from dask_ep.placement.placement import Placement
from dask_ep.placement.replica_choice import ticket_load

BLOCK_ROWS = 1 << 16
"""Rows that are counted at a time."""


class Visits(NamedTuple):
    """Which rows go where, for one placement and one chunking."""

    packet_rows: np.ndarray
    #: (C, R) int64: the rows of chunk c with a slot at rank r, each row once
    worker_rows: np.ndarray
    #: (C, W) int64: those with a slot at any rank of worker w, each row once
    physical_rows: np.ndarray
    #: (R, P) int64: the (row, slot) pairs that each physical expert serves

    def expert_rows(self, placement: Placement) -> np.ndarray:
        """(E,) int64: the (row, slot) pairs of each expert."""
        rows, held = np.zeros(placement.num_experts, np.int64), placement.physical >= 0
        np.add.at(rows, placement.physical[held], self.physical_rows[held])
        return rows


@dataclass(frozen=True)
class Survey:
    """The result of one pass over the routing; made by `survey`."""

    num_experts: int
    slots_per_row: int
    chunks: tuple[int, ...]
    #: rows of each chunk of the routing
    known_rows: bool
    #: whether global row numbers are known; if not, each chunk counts its rows from 0
    by_ticket: np.ndarray
    #: (E, bins) int64: rows of each expert by ticket
    _spool: _Spool

    @property
    def rows(self) -> int:
        """N."""
        return sum(self.chunks)

    @property
    def expert_rows(self) -> np.ndarray:
        """(E,) int64: the (row, slot) pairs of each expert."""
        return self.by_ticket.sum(axis=1)

    def visits(
        self,
        placement: Placement,
        chunks: Sequence[int] | None = None,
        only: Collection[int] | None = None,
        workers: int | None = None,
    ) -> Visits:
        """Count the rows of each chunk that each rank, and each worker, serves.

        Parameters
        ----------
        placement : Placement of these experts
        chunks : rows of each token chunk, which add up to N; default: those of the routing
        only : indices of the chunks to count; default: all
        workers : W, with rank r on worker r % W; default: one for each rank
        """
        chunks = self.chunks if chunks is None else tuple(chunks)
        ranks, per_rank = placement.physical.shape
        packet_rows = np.zeros((len(chunks), ranks), np.int64)
        workers = ranks if workers is None else workers
        worker_rows = np.zeros((len(chunks), workers), np.int64)
        physical_rows = np.zeros(ranks * per_rank + 1, np.int64)
        counted = range(len(chunks)) if only is None else frozenset(only)
        for chunk, row_offset, routing in self.blocks(chunks):
            if chunk not in counted:
                continue
            physical = placement.rewrite(routing, row_offset, placement.home(chunk))
            physical_rows += np.bincount(physical.ravel() + 1, minlength=physical_rows.size)
            rank = np.where(physical < 0, -1, physical // per_rank)
            packet_rows[chunk] += _rows_by_place(rank, ranks)
            worker_rows[chunk] += _rows_by_place(np.where(rank < 0, -1, rank % workers), workers)
        return Visits(packet_rows, worker_rows, physical_rows[1:].reshape(ranks, per_rank))

    def blocks(self, chunks: Sequence[int]) -> Iterator[tuple[int, int, np.ndarray]]:
        """Read the routing again: yield the chunk, the row offset for `Placement.rewrite`, and up
        to `BLOCK_ROWS` rows, (m, k).
        """
        bounds = np.concatenate([[0], np.cumsum(chunks, dtype=np.int64)])
        for chunk, (start, stop) in enumerate(pairwise(bounds.tolist())):
            for first in range(start, stop, BLOCK_ROWS):
                rows = self._spool.read(first, min(first + BLOCK_ROWS, stop))
                yield chunk, first if self.known_rows else first - start, rows

    def rows_by_chunk(self, chunks: Sequence[int]) -> np.ndarray:
        """Return (C, E) int64 the (row, slot) pairs of each expert in each chunk of these rows.

        Examples
        --------
        >>> import numpy as np
        >>> from dask_ep.placement.routing_stats import survey
        >>> survey(np.array([[0, 1], [1, 1], [2, -1]]), num_experts=4).rows_by_chunk((2, 1))
        array([[1, 3, 0, 0],
               [0, 0, 1, 0]])
        """
        rows = np.zeros((len(chunks), self.num_experts + 1), np.int64)
        for chunk, _, routing in self.blocks(chunks):
            experts = routing.ravel().astype(np.int64) + 1
            rows[chunk] += np.bincount(experts, minlength=rows.shape[1])
        return rows[:, 1:]


def survey(routing: da.Array | np.ndarray, num_experts: int, *, known_rows: bool = True) -> Survey:
    """Read the routing once.

    Parameters
    ----------
    routing : (N,) or (N, k) integers, a Dask array or in memory; -1 means no expert
        Unknown (nan) row chunks are fine.
    num_experts : int, E
    known_rows : bool
        Whether the lengths of the token chunks are known while the graph is built. If not, a
        placement counts the rows of each chunk from 0.

    Raises
    ------
    ValueError
        If an index is outside [-1, E); the message names the row.

    Examples
    --------
    >>> import numpy as np
    >>> from dask_ep.placement.policies import contiguous
    >>> from dask_ep.placement.routing_stats import survey
    >>> found = survey(np.array([[0, 1], [1, 3], [2, -1]]), num_experts=4)
    >>> found.expert_rows
    array([1, 2, 1, 1])
    >>> found.visits(contiguous(4, 2)).packet_rows  # row 1 goes to both ranks
    array([[2, 2]])
    """
    refuse_masked(routing, "routing")
    dtype = np.result_type(np.min_scalar_type(-1), np.min_scalar_type(-num_experts - 1))
    spool = _Spool(dtype, 1 if routing.ndim == 1 else routing.shape[1])
    by_ticket = ticket_load(np.empty((0, spool.width), dtype), num_experts)
    chunks: list[int] = []
    for block in _blocks(routing):
        rows = block.reshape(len(block), spool.width)
        by_ticket += ticket_load(rows, num_experts, sum(chunks) if known_rows else 0)
        spool.append(rows)
        chunks.append(len(block))
    return Survey(num_experts, spool.width, tuple(chunks), known_rows, by_ticket, spool)


class _Spool:
    """Rows of integers in a temporary file that is removed with this object."""

    def __init__(self, dtype: np.dtype, width: int):
        self.dtype, self.width = np.dtype(dtype), width
        self._file = tempfile.TemporaryFile(prefix="dask-ep-routing-")  # noqa: SIM115 (lives on)
        weakref.finalize(self, self._file.close)

    def append(self, rows: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(rows, self.dtype).tobytes())
        self._file.flush()

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return rows [start, stop), (stop - start, width)."""
        size = self.width * self.dtype.itemsize
        content = os.pread(self._file.fileno(), (stop - start) * size, start * size)
        return np.frombuffer(content, self.dtype).reshape(stop - start, self.width)


def _blocks(routing: da.Array | np.ndarray) -> Iterator[np.ndarray]:
    """Yield the routing's blocks in order, computing some at a time with the scheduler in use."""
    if not isinstance(routing, da.Array):
        yield np.asarray(routing)
        return
    whole = routing.rechunk({1: -1}) if routing.ndim == 2 else routing
    blocks = whole.to_delayed().ravel()
    some = 2 * CPU_COUNT
    for first in range(0, len(blocks), some):
        for block in dask.compute(*blocks[first : first + some]):
            yield np.asarray(block.get() if hasattr(block, "get") else block)  # CuPy's way to NumPy


def _rows_by_place(place: np.ndarray, places: int) -> np.ndarray:
    """Return (places,) how many rows have a slot at each place, each row once; -1 is none."""
    visited = np.zeros((len(place), places + 1), bool)
    visited[np.arange(len(place))[:, None], place] = True
    return np.count_nonzero(visited[:, :places], axis=0)
