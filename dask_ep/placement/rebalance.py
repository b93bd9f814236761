"""Given the previous placement and the current load, which few experts should move?

A placement made for yesterday's load is nearly right for today's, and every expert that moves must
be loaded again. So only as many experts move as necessary.

A *change* is one of these: two ranks swap an expert (2 loads), an expert moves to an empty place
(1), a spare replica or an empty place becomes another replica of a hot expert (1).
"""

from __future__ import annotations

from operator import itemgetter
from typing import NamedTuple

import numpy as np

from dask_ep.placement.placement import Placement, verify_placement
from dask_ep.placement.policies import balanced


def incremental(previous: Placement, load: np.ndarray, *, tolerance: float = 0.05) -> Placement:
    """Bring a previous placement within a tolerance of perfect balance, moving few experts.

    Parameters
    ----------
    previous : Placement
    load : (E,) rows of each expert now, or anything proportional to them
    tolerance : float
        The largest rank load may be up to 1 + tolerance times the mean.

    Returns
    -------
    placement : Placement
        Of the size of `previous`, and local if that is; experts that do not move keep their places,
        and replicas share rows evenly. If the tolerance cannot be reached, it is the best balanced
        of the previous placement, the result of the changes, and that of `balanced` with as many
        replicas.

    Raises
    ------
    ValueError
        Unless `load` has one number for each expert of `previous`.

    Notes
    -----
    Steepest descent: each step is the change that reduces the overload most (the sum over ranks of
    the squared rows above the tolerance) per expert loaded. Every change reduces it, so this ends.

    Examples
    --------
    >>> from dask_ep.placement.policies import contiguous
    >>> before = contiguous(4, 2)
    >>> after = incremental(before, [30, 30, 10, 10])
    >>> after.physical.tolist(), moves(before, after)
    ([[2, 1], [0, 3]], 2)
    """
    load = np.asarray(load, np.float64)
    verify_placement(previous, num_experts=load.size)
    limit = (1 + tolerance) * load.sum() / previous.world_size
    physical = previous.physical.astype(np.int64)
    while (state := _State.of(physical, load, limit)).overload > 0:
        gain, change = max(
            (_best_exchange(state), _best_replica(state), _best_drop(state)), key=itemgetter(0)
        )
        if gain <= 1e-12 * state.overload:
            break
        for at, expert in change.items():
            physical[at] = expert
    near = Placement(physical, local=previous.local)
    if state.overload == 0:
        return near
    fresh = balanced(load, previous.world_size, num_physical=int(previous.replica_counts.sum()))
    fresh = _aligned(fresh, previous)
    # With less overload the largest load can still be larger.
    unmoved = Placement(previous.physical, local=previous.local)
    return min(unmoved, near, fresh, key=lambda placement: placement.imbalance(load))


def moves(before: Placement, after: Placement) -> int:
    """Count the experts that ranks must load because they did not hold them before.

    Examples
    --------
    >>> moves(Placement([[0, 1], [2, 3]]), Placement([[1, 0], [2, 0], [3, -1]]))
    2
    """
    held, wanted = (
        {(rank, expert) for rank, row in enumerate(p.physical.tolist()) for expert in row}
        for p in (before, after)
    )
    return sum(expert >= 0 for _, expert in wanted - held)


_Change = tuple[float, dict[tuple[int, int], int]]
"""Reduction of overload per expert loaded, and the new expert of each place that changes."""

NO_CHANGE: _Change = (0.0, {})


class _State(NamedTuple):
    """An intermediate placement, and the quantities by which changes are scored."""

    physical: np.ndarray
    #: (R, P)
    limit: float
    #: rows of a rank up to which it is not overloaded
    per_replica: np.ndarray
    #: (E + 1,) rows of one replica of each expert; [-1] is 0, for empty places
    replicas: np.ndarray
    #: (E + 1,) number of replicas; [-1] is 2, so that an empty place counts as spare
    holds: np.ndarray
    #: (R, E + 1) whether a rank holds an expert; [:, -1] is False
    rank_load: np.ndarray
    #: (R,)
    heavy: int
    #: the rank with the most rows

    @classmethod
    def of(cls, physical: np.ndarray, load: np.ndarray, limit: float) -> _State:
        replicas = np.append(np.bincount(physical[physical >= 0], minlength=load.size), 2)
        per_replica = np.append(load, 0.0) / replicas
        holds = np.zeros((len(physical), replicas.size), bool)
        np.put_along_axis(holds, physical, True, axis=1)  # -1 is the last column
        holds[:, -1] = False
        rank_load = per_replica[physical].sum(axis=1)
        heavy = int(rank_load.argmax())
        return cls(physical, limit * (1 + 1e-12), per_replica, replicas, holds, rank_load, heavy)

    def over(self, rank_load: np.ndarray) -> np.ndarray:
        """Return the overload of ranks with these rows."""
        return np.maximum(rank_load - self.limit, 0.0) ** 2

    @property
    def overload(self) -> float:
        return float(self.over(self.rank_load).sum())

    def split(self, expert: np.ndarray, further: int) -> np.ndarray:
        """Return (..., R) the change of rank loads if each expert had `further` more replicas."""
        rows = self.per_replica[expert] * self.replicas[expert]
        change = rows / np.maximum(self.replicas[expert] + further, 1) - self.per_replica[expert]
        return self.holds[:, expert].T * change[..., None]


def _best_exchange(state: _State) -> _Change:
    """Swap an expert of the heaviest rank with one of another, or move it to an empty place."""
    mine = state.physical[state.heavy][:, None, None]  # (P, 1, 1), against (R, P)
    gives, takes = state.per_replica[mine], state.per_replica[state.physical]
    before = state.over(state.rank_load)[:, None] + state.over(state.rank_load[state.heavy])
    after = state.over(state.rank_load[state.heavy] - gives + takes) + state.over(
        state.rank_load[:, None] + gives - takes
    )
    legal = ~state.holds[:, mine[:, 0, 0]].T[..., None] & ~state.holds[state.heavy, state.physical]
    legal = legal & (mine >= 0)
    legal[:, state.heavy] = False
    gain = np.where(legal, before - after, 0.0) / np.where(state.physical >= 0, 2, 1)
    column, rank, other = map(int, np.unravel_index(gain.argmax(), gain.shape))
    change = {
        (rank, other): state.physical[state.heavy, column],
        (state.heavy, column): state.physical[rank, other],
    }
    return float(gain[column, rank, other]), change


def _best_replica(state: _State) -> _Change:
    """Give an expert of the heaviest rank another replica, in a spare one's or an empty place."""
    hot = state.physical[state.heavy]
    hot = hot[hot >= 0]
    rank, other = np.nonzero(state.replicas[state.physical] > 1)
    if rank.size == 0:
        return NO_CHANGE
    spare = state.physical[rank, other]
    grown = state.split(hot, 1)  # (hot, R)
    shrunk = state.split(spare, -1)  # (spare, R)
    loads = state.rank_load + grown[:, None] + shrunk[None]  # (hot, spare, R)
    each = np.arange(rank.size)
    rows = state.per_replica * state.replicas
    loads[:, each, rank] += (rows[hot] / (state.replicas[hot] + 1))[:, None]
    loads[:, each, rank] -= np.where(spare < 0, 0.0, rows[spare] / (state.replicas[spare] - 1))
    legal = ~state.holds[rank][:, hot].T
    gain = np.where(legal, state.overload - state.over(loads).sum(axis=2), 0.0)
    which, at = np.unravel_index(gain.argmax(), gain.shape)
    return float(gain[which, at]), {(rank[at], other[at]): hot[which]}


def _best_drop(state: _State) -> _Change:
    """Remove a spare replica from the heaviest rank: the other replicas take its rows."""
    mine = state.physical[state.heavy]
    columns = np.flatnonzero((mine >= 0) & (state.replicas[mine] > 1))
    if columns.size == 0:
        return NO_CHANGE
    loads = state.rank_load + state.split(mine[columns], -1)  # (columns, R)
    rows = (state.per_replica * state.replicas)[mine[columns]]
    loads[:, state.heavy] -= rows / (state.replicas[mine[columns]] - 1)
    gain = state.overload - state.over(loads).sum(axis=1)
    best = int(gain.argmax())
    return float(gain[best]), {(state.heavy, columns[best]): -1}


def _aligned(placement: Placement, previous: Placement) -> Placement:
    """Number the ranks, and the places in them, so that most experts stay where they were."""
    old = [set(row) - {-1} for row in previous.physical.tolist()]
    new = [set(row) - {-1} for row in placement.physical.tolist()]
    overlap = np.array([[len(a & b) for b in new] for a in old])
    physical = np.full(previous.physical.shape, -1)
    for _ in old:
        rank, source = np.unravel_index(overlap.argmax(), overlap.shape)
        stay = np.isin(previous.physical[rank], list(new[source]))
        physical[rank, stay] = previous.physical[rank, stay]
        physical[rank, np.flatnonzero(~stay)[: len(new[source] - old[rank])]] = sorted(
            new[source] - old[rank]
        )
        overlap[rank, :] = overlap[:, source] = -1
    return Placement(physical, local=previous.local)
