"""What travels: the rows to their expert, or the expert to its rows?

A row on one worker that needs an expert on another one goes there and comes back. Or the row's own
worker reads the expert's weights too, and the row stays. For each expert and each rank, the cheaper
of the two is chosen:

    rows travel      rows at home here that must leave × row_bytes (both ways) / link
    expert travels   expert_bytes / read

                     expert 0 (hot)      expert 1 (hot)      expert 2 (cold)
    rank 0, owner    has it              <── rows            <── rows
    rank 1           reads it too        owner, has it       <── rows
    rank 2           reads it too        reads it too        owner, has it

The result is a `Placement` with replicas at the ranks that read, which are chosen by the home of a
row's chunk (`Placement.local`). Nothing else changes: graph, kernel and sums are those of any
placement.

**Rows that need several experts.** A row goes to a rank once, however many of its experts are
served there, so it stays only if all of these are read. The experts that one rank reads from
another are therefore chosen together: starting with all that are needed, the expert whose loss
makes the fewest rows leave is dropped, again and again, and the cheapest of all these sets is
taken. With one slot per row this is optimal, expert by expert; with more it is near the optimum,
which a minimum cut would find.

Axis letters: `n` rows, `k` slots per row, `E` experts, `R` ranks, `P` physical experts per rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from dask_ep.arrays.checks import size_in_bytes
from dask_ep.laws.costs import Rates
from dask_ep.placement.placement import Placement, verify_placement
from dask_ep.placement.routing_stats import Survey

TRAVELS = ("rows", "auto", "experts")
"""All rows go to owners; the cheaper for each expert and rank; every expert goes to its rows."""

SAMPLED_ROWS = 1 << 14
"""If more rows than this are at home at a rank, a sample of this size is used."""


@dataclass(frozen=True)
class Travel:
    """What travels, and the rates by which that is chosen.

    Raises
    ------
    ValueError
        If `how` is not one of `TRAVELS`, or a rate is not a size above 0.

    Notes
    -----
    If experts do not fit and are processed in passes (`dask_ep.laws.passes`), rows travel to
    experts by being spilled, and experts travel to rows that are held in memory.

    If they fit, "auto" is not the default, although by its model it never costs more: it must read
    the routing beforehand, and with a layer's router all tokens; replicas of experts take all the
    memory that is left; and the model uses rates that were not measured, for example that all
    workers together read a shared disk as fast as each one alone.
    """

    how: str | None = None
    #: one of `TRAVELS`; None is "auto" for experts in passes, whose rows are counted anyway, and
    #: otherwise "rows"
    link: float | str = Rates.link
    #: bytes per second between two workers, as a number or a string ("1 GB")
    read: float | str = Rates.read
    #: bytes per second that one worker reads from storage

    def __post_init__(self) -> None:
        if self.how not in (None, *TRAVELS):
            raise ValueError(f"travel must be one of {', '.join(TRAVELS)}; got {self.how!r}")
        for name in ("link", "read"):
            object.__setattr__(self, name, size_in_bytes(getattr(self, name), name))

    @property
    def moves_experts(self) -> bool:
        """Whether experts may travel if they fit into memory."""
        return self.how in ("auto", "experts")

    def rates(self, others: Rates) -> Rates:
        """Return `others` with these two rates."""
        return replace(others, link=float(self.link), read=float(self.read))


ALL_ROWS = Travel()
"""The default, which needs no counts of the routing."""


def choose_travel(
    travel: Travel,
    found: Survey,
    owners: Placement,
    *,
    expert_bytes: float,
    row_bytes: float,
    chunks: Sequence[int] | None = None,
    workers: int | None = None,
    max_physical: int | None = None,
) -> Placement:
    """Give each rank the experts of others that are cheaper to read than to send rows to.

    Parameters
    ----------
    travel : Travel
        "rows" returns `owners`; with "experts" no row travels; "auto" takes the cheaper way.
    found : Survey of the routing
    owners : Placement
        The experts that each rank holds in any case. A row without a replica at home goes to its
        rank in this placement.
    expert_bytes : bytes of one expert in its file
    row_bytes : bytes of a row, sent and returned
    chunks : rows of each token chunk; default: those of the routing
    workers : int, optional
        Processes that serve the ranks, rank r on worker r % workers; default: one for each. Nothing
        travels between ranks of one worker.
    max_physical : int, optional
        Maximum number of experts that a rank can hold (its memory over the bytes of one expert).

    Returns
    -------
    placement : Placement, local unless all rows travel

    Raises
    ------
    ValueError
        If `owners` are for other experts, or if they, or the experts that must be read, do not fit
        into `max_physical`.

    Notes
    -----
    With "auto", if the limit is too small for all experts that are worth reading, experts are
    dropped as above until the others fit. Up to `SAMPLED_ROWS` rows at a home are counted exactly.
    The cost is that of all workers together; balancing the load among them is left to `owners`.
    Results equal those of any other placement up to rounding: the same experts, added up in another
    order of ranks.

    Examples
    --------
    >>> import numpy as np
    >>> from dask_ep.placement.policies import contiguous
    >>> from dask_ep.placement.routing_stats import survey
    >>> routing = np.array([0, 0, 0, 1, 0, 0, 0, 0])  # chunk 0 is at home at rank 0, 1 at rank 1
    >>> placement = choose_travel(
    ...     Travel("auto", link=1, read=1), survey(routing, 2), contiguous(2, 2), chunks=(4, 4),
    ...     expert_bytes=300, row_bytes=100,
    ... )
    >>> placement.physical.tolist()  # 4 rows of rank 1 for expert 0, 1 row of rank 0 for expert 1
    [[0, -1], [1, 0]]
    """
    verify_placement(owners, num_experts=found.num_experts, max_physical=max_physical)
    if not travel.moves_experts or owners.world_size == 1:
        return owners
    owners = replace(owners, local=True)
    chunks = found.chunks if chunks is None else chunks
    worker = np.arange(owners.world_size) % (workers or owners.world_size)
    extra: list[np.ndarray] = []
    if travel.how == "experts":
        extra += list(_all_wanted(found, owners, chunks, worker))
    else:
        prices = _Prices(row_bytes / float(travel.link), expert_bytes / float(travel.read))
        for rank, needs in enumerate(_needs(found, owners, chunks, worker)):
            chosen = _worth_reading(needs, prices, found.num_experts)
            held = int((owners.physical[rank] >= 0).sum())
            room = None if max_physical is None else max_physical - held
            extra.append(_fitting(chosen, needs, room))
    placement = _reading(owners, [np.flatnonzero(read) for read in extra])
    verify_placement(placement, num_experts=found.num_experts, max_physical=max_physical)
    return placement


class _Prices(NamedTuple):
    """Costs of one row and of one expert, in seconds."""

    row: float
    #: sent and returned
    expert: float


class _Needs(NamedTuple):
    """The experts of other ranks that the rows at home at one rank need."""

    leaving: list[np.ndarray]
    #: for each rank, (m, k): experts that each row needs there, each once, -1 for none
    weight: float
    #: number of rows that each of these represents


def _rows_at_home(
    found: Survey, owners: Placement, chunks: Sequence[int]
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the home of some rows, and their physical experts (m, k), until all rows are done."""
    for chunk, row_offset, routing in found.blocks(chunks):
        home = owners.home(chunk)
        assert home is not None  # `choose_travel` has made the owners local
        yield home, owners.rewrite(routing, row_offset, home)


def _all_wanted(
    found: Survey, owners: Placement, chunks: Sequence[int], worker: np.ndarray
) -> np.ndarray:
    """Return (R, E) which experts on other workers the rows at home at each rank need."""
    ranks, per_rank = owners.physical.shape
    experts = np.append(owners.physical.ravel(), -1)
    wanted = np.zeros((ranks, found.num_experts + 1), bool)  # [:, -1] takes slots without expert
    for home, physical in _rows_at_home(found, owners, chunks):
        elsewhere = worker[physical // per_rank] != worker[home]
        wanted[home, experts[physical[elsewhere]]] = True
    return wanted[:, :-1]


def _needs(
    found: Survey, owners: Placement, chunks: Sequence[int], worker: np.ndarray
) -> Iterator[_Needs]:
    """Yield, for each rank, the experts on other workers that the rows at home there need."""
    ranks, per_rank = owners.physical.shape
    homes = np.array([owners.home(c) for c in range(len(chunks))], np.int64)
    at_home = np.bincount(homes, weights=chunks, minlength=ranks)
    taken = np.minimum(1.0, SAMPLED_ROWS / np.maximum(at_home, 1))
    parts: list[list[np.ndarray]] = [[] for _ in range(ranks)]
    draw = np.random.default_rng(0)
    for home, physical in _rows_at_home(found, owners, chunks):
        if taken[home] < 1:
            physical = physical[draw.random(len(physical)) < taken[home]]
        parts[home].append(physical)
    experts = np.append(owners.physical.ravel(), -1)
    none = np.empty((0, found.slots_per_row), np.int32)
    for home in range(ranks):
        physical = _once_per_row(np.concatenate([none, *parts[home]]))
        leaving = []
        for rank in range(ranks):
            leave = (physical // per_rank == rank) & (worker[rank] != worker[home])
            there = np.where(leave, experts[physical], -1)
            leaving.append(there[leave.any(axis=1)])
        yield _Needs(leaving, at_home[home] / max(len(physical), 1))


def _once_per_row(physical: np.ndarray) -> np.ndarray:
    """Replace repeated physical experts of a row by -1; rows are sorted."""
    physical = np.sort(physical, axis=1)
    again = physical[:, 1:] == physical[:, :-1]
    physical[:, 1:][again] = -1
    return physical


def _worth_reading(needs: _Needs, prices: _Prices, num_experts: int) -> np.ndarray:
    """Return (E,) which experts of other ranks are worth reading."""
    chosen = np.zeros(num_experts, bool)
    for together in _without_common_experts(needs.leaving, num_experts):
        best, best_gain = np.zeros(num_experts, bool), 0.0
        wanted = np.isin(np.arange(num_experts), together)
        for held, staying in _dropping(wanted, together):
            gain = staying * needs.weight * prices.row - held.sum() * prices.expert
            if gain > best_gain:
                best, best_gain = held, gain
        chosen |= best
    return chosen


def _without_common_experts(leaving: Sequence[np.ndarray], num_experts: int) -> list[np.ndarray]:
    """Join the rows of ranks that hold replicas of one expert: reading it once serves both."""
    groups: list[tuple[np.ndarray, list[np.ndarray]]] = []
    for of_rank in leaving:
        wanted, members = np.isin(np.arange(num_experts), of_rank), [of_rank]
        apart = [group for group in groups if not (group[0] & wanted).any()]
        for others, their_members in groups:
            if (others & wanted).any():
                wanted, members = wanted | others, members + their_members
        groups = [*apart, (wanted, members)]
    return [np.concatenate(members) for _, members in groups]


def _fitting(chosen: np.ndarray, needs: _Needs, room: int | None) -> np.ndarray:
    """Drop some of the chosen experts, (E,), if there are more than fit."""
    if room is None or chosen.sum() <= room:
        return chosen
    way = _dropping(chosen, np.concatenate(needs.leaving))
    return next(held for held, _ in way if held.sum() <= room)


def _dropping(held: np.ndarray, needs: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
    """Drop experts one by one, each time the one whose loss makes the fewest rows leave.

    Parameters
    ----------
    held : (E,) bool, the experts to begin with
    needs : (m, k) experts that each row needs, each once, -1 for none

    Yields
    ------
    held : (E,) bool
    staying : number of rows all of whose experts are held
    """
    held = held.copy()
    is_held = np.append(held, True)  # [-1]: a row does not leave for an empty slot
    needs = needs[is_held[needs].all(axis=1)]
    by_expert = np.argsort(needs, axis=None, kind="stable")
    ends = np.searchsorted(needs.ravel()[by_expert], np.arange(held.size + 1))
    stays, staying = np.ones(len(needs), bool), len(needs)
    leave = _count(needs, held.size)
    while True:
        yield held.copy(), staying
        if not held.any():
            return
        dropped = int(np.argmin(np.where(held, leave, staying + 1)))
        rows = by_expert[ends[dropped] : ends[dropped + 1]] // needs.shape[1]
        rows = rows[stays[rows]]
        held[dropped], stays[rows] = False, False
        staying -= len(rows)
        leave -= _count(needs[rows], held.size)


def _count(needs: np.ndarray, num_experts: int) -> np.ndarray:
    """Return (E,) how many rows need each expert."""
    return np.bincount(needs.ravel() + 1, minlength=num_experts + 1)[1:]


def _reading(owners: Placement, extra: Sequence[np.ndarray]) -> Placement:
    """Add the experts that each rank reads in addition; these serve only rows at home."""
    held = [[*row[row >= 0], *more] for row, more in zip(owners.physical, extra, strict=True)]
    width = max(map(len, held))
    physical = np.full((owners.world_size, width), -1)
    stops = np.zeros(physical.shape, np.int64)
    for rank, experts in enumerate(held):
        physical[rank, : len(experts)] = experts
        owned = len(experts) - len(extra[rank])
        stops[rank, :owned] = owners.stops[rank][owners.physical[rank] >= 0]
        for column, expert in enumerate(extra[rank], start=owned):
            before = owners.stops[:rank][owners.physical[:rank] == expert]
            stops[rank, column] = before.max(initial=0)  # the stop before it: no tickets
    return Placement(physical, stops, local=True)
