"""Which worker should own which rank?

Plain arithmetic on plain data: ranks have loads, workers have capacities, and every rank needs as
many owners as it has replicas. Two functions, which do not depend on a scheduler:

    assign    gives owners to the ranks that lack them, and moves nothing
    balance   moves as few ranks as bring the workers close to their shares

    loads       3  1  1  1  1  1             share of a worker: load × its part of all capacity
    ranks       0  1  2  3  4  5
    assign  ->  a  b  c  b  c  b             a: 3/1   b: 3/1   c: 2/1
    c leaves    a  b  .  b  .  b             assign again: only ranks 2 and 4 get a new owner
    c returns   a  b  a  b  b  b             balance: one rank of a and one of b go back to it

A worker finishes when its load divided by its capacity is done; only proportions matter.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import inf


@dataclass(frozen=True)
class OwnerRules:
    """When owners change, and how many chunks are in flight; None leaves a rule as it is.

    Raises
    ------
    ValueError
        If `chunks_in_flight` is less than 1, or a time is negative.

    Examples
    --------
    >>> from dask_ep import OwnerRules
    >>> OwnerRules(chunks_in_flight=2)
    OwnerRules(settle=None, pause_limit=None, chunks_in_flight=2, replicate_hot=None)
    """

    settle: float | None = None
    #: seconds without a change of workers before ranks are rebalanced; default: 2
    pause_limit: float | None = None
    #: seconds after which a worker that paused (memory) loses its ranks; default: 30
    chunks_in_flight: float | None = None
    #: most token chunks in flight on a worker at once, of all graphs, so that chunks that wait for
    #: a slow rank do not fill its memory; default: two more than it has threads, `inf`: no bound.
    #: Each layer may have one
    replicate_hot: bool | None = None
    #: whether a rank gets another owner automatically while layers are computed: if its worker is
    #: always busy while rows wait for it, and another has time and room for its experts
    #: (`hot_ranks`); default: True

    def __post_init__(self) -> None:
        if self.chunks_in_flight is not None and not self.chunks_in_flight >= 1:
            raise ValueError(f"chunks_in_flight must be 1 or more, but is {self.chunks_in_flight}")
        for name in ("settle", "pause_limit"):
            seconds = getattr(self, name)
            if seconds is not None and not seconds >= 0:
                raise ValueError(f"{name} must be 0 seconds or more, but is {seconds}")


GAIN = 0.1
"""Relative gain in finish time, of taker over giver, that is worth reading a slice again."""


def natural_order(name: str) -> tuple[tuple[str, int], ...]:
    """Return a sort key under which `w2` comes before `w10`.

    Examples
    --------
    >>> sorted(["w10", "w2", "tcp://10.0.0.9:1", "tcp://10.0.0.10:1"], key=natural_order)
    ['tcp://10.0.0.9:1', 'tcp://10.0.0.10:1', 'w2', 'w10']
    """
    return tuple((text, int(number or -1)) for text, number in re.findall(r"(\D*)(\d*)", name))


def capacities(memory: Mapping[str, float]) -> dict[str, float]:
    """Turn memory limits (bytes; 0 for a worker without one) into capacities, all above zero.

    A worker without a limit counts as the mean of those with one, or as 1 if none states any.

    Examples
    --------
    >>> capacities({"a": 4e9, "b": 0, "c": 8e9})
    {'a': 4000000000.0, 'b': 6000000000.0, 'c': 8000000000.0}
    """
    stated = [amount for amount in memory.values() if amount > 0]
    mean = sum(stated) / len(stated) if stated else 1.0
    return {worker: amount if amount > 0 else mean for worker, amount in memory.items()}


def burdens(
    owners: Sequence[Collection[str]], workers: Mapping[str, float], loads: Sequence[float]
) -> dict[str, float]:
    """Sum the load of each worker; a rank with several owners burdens them equally.

    Examples
    --------
    >>> burdens([{"a"}, {"a", "b"}], {"a": 1.0, "b": 1.0}, [1.0, 1.0])
    {'a': 1.5, 'b': 0.5}
    """
    sums = dict.fromkeys(workers, 0.0)
    for of_rank, load in zip(owners, loads, strict=True):
        present = [worker for worker in of_rank if worker in sums]
        for worker in present:
            sums[worker] += load / len(present)
    return sums


def assign(
    previous: Sequence[Collection[str]],
    workers: Mapping[str, float],
    loads: Sequence[float],
    replicas: Sequence[int] | None = None,
    limit: float = inf,
) -> list[frozenset[str]]:
    """Give an owner to every rank that lacks one, and take none from a present worker.

    Parameters
    ----------
    previous : who owned each of the R ranks before; workers that are not in `workers` are dropped
    workers : mapping of worker to capacity, in the order in which equals are preferred
    loads : R numbers
    replicas : R numbers of owners, at most one per worker; default: 1
    limit : float
        A worker takes another rank only while its load per capacity is below this; where none is
        left below it, a rank has no owner.

    Notes
    -----
    The heaviest rank first, each to the worker that would finish first with it; ties go to the
    lower rank and to the earlier worker. So the same input gives the same map, and a complete map
    is returned unchanged. Starting from no owners, no worker finishes later than
    (all load + W × the heaviest rank) / (all capacity) (Graham 1969, for unequal workers).

    Examples
    --------
    >>> assign([(), (), ()], {"a": 1.0, "b": 1.0}, [1.0, 1.0, 1.0])
    [frozenset({'a'}), frozenset({'b'}), frozenset({'a'})]
    """
    owners = [frozenset(worker for worker in of_rank if worker in workers) for of_rank in previous]
    wanted = [min(n, len(workers)) for n in (replicas or [1] * len(owners))]
    burden = burdens(owners, workers, loads)
    share = [load / max(n, 1) for load, n in zip(loads, wanted, strict=True)]
    for rank in sorted(range(len(owners)), key=lambda rank: -share[rank]):
        while len(owners[rank]) < wanted[rank]:
            free = [
                worker
                for worker, capacity in workers.items()
                if worker not in owners[rank] and burden[worker] < limit * capacity
            ]
            if not free:
                break
            chosen = min(free, key=lambda w: (burden[w] + share[rank]) / workers[w])
            owners[rank] |= {chosen}
            burden[chosen] += share[rank]
    return owners


def balance(
    owners: Sequence[Collection[str]],
    workers: Mapping[str, float],
    loads: Sequence[float],
    fixed: Collection[int] = (),
) -> list[frozenset[str]]:
    """Move ranks from workers that finish late to workers that finish early, while that pays.

    Arguments are those of `assign`, with every owner in `workers`; ranks in `fixed` stay where they
    are. Each rank keeps its number of owners. A move pays if the taker then finishes at least by
    `GAIN` earlier than the giver did. No worker finishes later than the latest one before, and
    balancing a second time moves nothing. Equal ranks on equal workers end within one rank or
    `GAIN` of each other.

    Examples
    --------
    >>> balance([{"a"}, {"a"}, {"a"}, {"a"}], {"a": 1.0, "b": 1.0}, [1.0, 1.0, 1.0, 1.0])
    [frozenset({'b'}), frozenset({'b'}), frozenset({'a'}), frozenset({'a'})]
    """
    balanced = [frozenset(of_rank) for of_rank in owners]
    burden = burdens(balanced, workers, loads)
    while move := _best_move(balanced, workers, loads, fixed, burden):
        rank, giver, taker = move
        balanced[rank] = balanced[rank] - {giver} | {taker}
        burden[giver] -= loads[rank] / len(balanced[rank])
        burden[taker] += loads[rank] / len(balanced[rank])
    return balanced


def _best_move(
    owners: Sequence[frozenset[str]],
    workers: Mapping[str, float],
    loads: Sequence[float],
    fixed: Collection[int],
    burden: Mapping[str, float],
) -> tuple[int, str, str] | None:
    """Find the move that helps the latest worker most: (rank, giver, taker), if one pays."""
    finish = {worker: burden[worker] / capacity for worker, capacity in workers.items()}
    for giver in sorted(workers, key=lambda worker: -finish[worker]):
        best, move = inf, None
        for rank, of_rank in enumerate(owners):
            others = [worker for worker in workers if worker not in of_rank]
            if giver not in of_rank or rank in fixed or not others:
                continue
            share = loads[rank] / len(of_rank)
            after = {worker: (burden[worker] + share) / workers[worker] for worker in others}
            taker = min(others, key=after.__getitem__)
            later = max(after[taker], (burden[giver] - share) / workers[giver])
            if share > 0 and after[taker] < (1 - GAIN) * finish[giver] and later < best:
                best, move = later, (rank, giver, taker)
        if move:
            return move
    return None
