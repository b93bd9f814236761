"""Given the placement of before and the load of now, which few experts should move?

A placement that was made for yesterday's load is nearly right for today's, and every expert that
moves must be loaded again. Here only enough of them move.

A *change* is one of: two ranks swap an expert (2 loads), an expert moves to an empty slot (1), a
spare copy or an empty slot becomes a further copy of a hot expert (1).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from dask_ep.placement import balanced
from dask_ep.slots import Placement, verify_placement


def incremental(previous: Placement, load: np.ndarray, *, tolerance: float = 0.05) -> Placement:
    """Bring the placement of before within a tolerance of perfect balance, moving few experts.

    Parameters
    ----------
    previous : Placement
    load : (E,) rows of each expert now, or anything proportional to them
    tolerance : float
        The largest rank load may be up to 1 + tolerance times the mean.

    Returns
    -------
    placement : Placement
        With the ranks and slots of `previous`; what does not move keeps its slot, and copies share
        rows evenly. Where the tolerance is out of reach, the better balanced of what the changes
        reach and what `balanced` gives with as many copies.

    Raises
    ------
    ValueError
        If `load` has not one number for each expert of `previous`.

    Notes
    -----
    Steepest descent: always the change that takes away most overload (the sum over ranks of the
    squared rows above the tolerance) per expert loaded. Each lowers the overload, so it ends.

    Examples
    --------
    >>> from dask_ep.placement import contiguous
    >>> before = contiguous(4, 2)
    >>> after = incremental(before, [30, 30, 10, 10])
    >>> after.slots.tolist(), moves(before, after)
    ([[2, 1], [0, 3]], 2)
    """
    load = np.asarray(load, np.float64)
    verify_placement(previous, num_experts=load.size)
    limit = (1 + tolerance) * load.sum() / previous.world_size
    slots = previous.slots.astype(np.int64)
    overload = _overload(slots, load, limit)
    while overload > 0:
        gains = (
            ((overload - _overload(changed, load, limit)) / loads, changed)
            for loads, changed in _changes(slots, load)
        )
        gain, changed = max(gains, key=lambda choice: choice[0], default=(0.0, slots))
        if gain <= 1e-12 * overload:
            break
        slots, overload = changed, _overload(changed, load, limit)
    near = Placement(slots)
    if overload == 0:
        return near
    fresh = balanced(load, previous.world_size, num_slots=int(previous.copies.sum()))
    fresh = _aligned(fresh, previous)
    return min(near, fresh, key=lambda placement: placement.imbalance(load))


def moves(before: Placement, after: Placement) -> int:
    """Count the experts that some rank must load because it did not hold them before.

    Examples
    --------
    >>> moves(Placement([[0, 1], [2, 3]]), Placement([[1, 0], [2, 0], [3, -1]]))
    2
    """
    held, wanted = (
        {(rank, expert) for rank, row in enumerate(p.slots.tolist()) for expert in row}
        for p in (before, after)
    )
    return sum(expert >= 0 for _, expert in wanted - held)


def _rank_load(slots: np.ndarray, load: np.ndarray) -> np.ndarray:
    """(R,) rows of each rank when copies share evenly."""
    copies = np.bincount(slots[slots >= 0], minlength=load.size)
    return np.append(load / copies, 0.0)[slots].sum(axis=1)


def _overload(slots: np.ndarray, load: np.ndarray, limit: float) -> float:
    over = _rank_load(slots, load) - limit * (1 + 1e-12)
    return float((np.maximum(over, 0) ** 2).sum())


def _changes(slots: np.ndarray, load: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Give every change that relieves the heaviest rank: experts to load, and the new slots."""
    copies = np.bincount(slots[slots >= 0], minlength=load.size)
    heavy = int(_rank_load(slots, load).argmax())
    holds = [set(row) for row in slots.tolist()]
    for column, hot in enumerate(slots[heavy]):
        if hot < 0:
            continue
        for rank, other in np.ndindex(*slots.shape):
            cold = int(slots[rank, other])
            if rank == heavy or hot in holds[rank]:
                continue
            if cold < 0 or copies[cold] > 1:  # room for a further copy
                yield 1, _with(slots, {(rank, other): hot})
            if cold < 0:
                yield 1, _with(slots, {(rank, other): hot, (heavy, column): -1})
            elif cold not in holds[heavy]:
                yield 2, _with(slots, {(rank, other): hot, (heavy, column): cold})
    for column, spare in enumerate(slots[heavy]):
        if spare >= 0 and copies[spare] > 1:  # its other copies take its rows
            yield 1, _with(slots, {(heavy, column): -1})


def _with(slots: np.ndarray, new: dict[tuple[int, int], int]) -> np.ndarray:
    changed = slots.copy()
    for at, expert in new.items():
        changed[at] = expert
    return changed


def _aligned(placement: Placement, previous: Placement) -> Placement:
    """Number the ranks, and the slots in them, so that most experts stay where they were."""
    old = [set(row) - {-1} for row in previous.slots.tolist()]
    new = [set(row) - {-1} for row in placement.slots.tolist()]
    overlap = np.array([[len(a & b) for b in new] for a in old])
    slots = np.full(previous.slots.shape, -1)
    for _ in old:
        rank, source = np.unravel_index(overlap.argmax(), overlap.shape)
        stay = np.isin(previous.slots[rank], list(new[source]))
        slots[rank, stay] = previous.slots[rank, stay]
        slots[rank, np.flatnonzero(~stay)[: len(new[source] - old[rank])]] = sorted(
            new[source] - old[rank]
        )
        overlap[rank, :] = overlap[:, source] = -1
    return Placement(slots)
