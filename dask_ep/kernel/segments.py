"""Which slots of a chunk belong to which expert of a rank, on the host?

Sorted by local expert they form runs, those of other ranks last:

    routing [n, k] ──> slots of expert 0 │ slots of expert 1 │ ... │ not ours
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dask_ep.arrays.checks import check_indices, raise_nan


class Segments(NamedTuple):
    """The slots of a chunk, sorted by local expert."""

    k: int
    #: slots per row
    order: np.ndarray | None
    #: [n * k] slot numbers (row * k + slot), ours first, by local expert; None if 0, 1, 2, ...
    bounds: list[tuple[int, int]]
    #: first and last + 1 position in `order`, one pair per local expert

    def slots(self, tile: slice) -> np.ndarray | slice:
        """Slot numbers of a run of positions."""
        return tile if self.order is None else self.order[tile]

    def rows(self, slots: np.ndarray | slice) -> np.ndarray | slice:
        """Row numbers of slots."""
        return slots if self.k == 1 or isinstance(slots, slice) else slots // self.k

    def of_rank(self, rank: int, num_local: int) -> tuple[int, int]:
        """First and last + 1 position of the slots of a rank's experts."""
        if not self.bounds:
            return 0, 0
        return self.bounds[rank * num_local][0], self.bounds[(rank + 1) * num_local - 1][1]

    def rows_of_slots(self, rank: int, num_local: int) -> np.ndarray | slice:
        """Row number of each of a rank's slots, by expert, then by row."""
        return self.rows(self.slots(slice(*self.of_rank(rank, num_local))))

    def rows_of(self, rank: int, num_local: int, n: int) -> np.ndarray | slice:
        """Row numbers of a rank's rows, of `n`, each once.

        With one slot per row they are sorted by expert, then by row; else by row.
        """
        rows = self.rows_of_slots(rank, num_local)
        if self.k == 1 or isinstance(rows, slice):
            return rows
        here = np.zeros(n, bool)
        here[rows] = True
        return np.flatnonzero(here)

    def count_rows(self, rank: int, num_local: int, n: int) -> int:
        """How many rows a rank has, of `n`."""
        rows = self.rows_of(rank, num_local, n)
        return rows.stop - rows.start if isinstance(rows, slice) else len(rows)

    def not_ours(self) -> np.ndarray | slice:
        """Slot numbers that no local expert serves."""
        return self.slots(slice(self.bounds[-1][1], None))


def sort_slots(
    routing: np.ndarray, topk_weights: np.ndarray | None, num_local: int, rank: int, world_size: int
) -> Segments:
    """Sort the slots by local expert, in one pass over small integers, and check their values.

    Notes
    -----
    The sort is stable: the slots of an expert are in the order of the rows. Local expert numbers
    below 2**15 are sorted as 16-bit integers, which NumPy does in linear time (radix sort).
    """
    k = 1 if routing.ndim == 1 else routing.shape[1]
    flat = routing.reshape(-1)
    if flat.size == 0:
        return Segments(k, None, [(0, 0)] * num_local)

    num_experts = num_local * world_size
    check_indices(routing, num_experts, kernel_hint(num_local, world_size))
    if topk_weights is not None and np.isnan(topk_weights).any():
        raise_nan(topk_weights)
    local = _local_numbers(flat, num_local, rank)
    order = np.argsort(local, kind="stable")
    numbers = np.arange(num_local, dtype=local.dtype)
    ends = np.searchsorted(local[order], numbers, side="right").tolist()
    bounds = list(zip([0, *ends[:-1]], ends, strict=True))
    in_order = k == 1 and (local[1:] >= local[:-1]).all()
    return Segments(k, None if in_order else order, bounds)


def _local_numbers(flat: np.ndarray, num_local: int, rank: int) -> np.ndarray:
    """Local expert number of each slot, and `num_local` for the slots that are not ours."""
    local = flat.astype(np.int64)
    local -= rank * num_local
    local[(local < 0) | (local >= num_local)] = num_local
    return local.astype(np.int16 if num_local < 2**15 else np.int64)


def kernel_hint(num_local: int, world_size: int) -> str:
    """Explain the kernel's number of experts, for an error about an index."""
    return (
        f"; there are {num_local} experts a rank (expert_Ws) times world_size={world_size}: in "
        "direct calls of the kernel, world_size must divide the number of experts"
    )
