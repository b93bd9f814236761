"""Which rank should get a further owner, without being asked?

Workers tell with each heartbeat how long their cores have computed and how many rows wait for each
of their ranks. A worker that is busy all the time while rows wait for it holds the others up, and
where one of these has time and room, it can take a share of the rank for which most rows wait:

    LOOKS looks in a row    busy share ≥ BUSY, rows wait     the rank with most of them is hot
                            busy share ≤ IDLE, not its       the least busy of these, if the experts
                            owner                            fit into MEMORY of its limit
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

BUSY, IDLE = 0.9, 0.6
"""Shares of the time that a worker's cores compute: of one that is asked for too much, and of one
that can take more."""

LOOKS = 3
"""How often in a row a rank must be hot: a queue that comes and goes is none."""

LOOK_SECONDS = 1.0
"""Seconds between two looks."""

MEMORY = 0.7
"""Of a worker's memory limit that is filled by choice."""

Rank = tuple[int, int]
"""World size and rank."""


class Sample(NamedTuple):
    """What a worker has told of itself."""

    time: float
    #: when; seconds
    core: float
    #: seconds that its cores have computed so far, all together
    threads: int
    waiting: Mapping[Rank, int]
    #: rows of packets that wait for a rank
    room: float
    #: bytes that are left of what may be filled; inf without a limit


class Replica(NamedTuple):
    """A rank that should get a further owner."""

    rank: Rank
    worker: str
    why: str


class HotRanks:
    """Looks now and then at what workers tell, and says when a rank should be served twice.

    Examples
    --------
    >>> hot, owners, nbytes = HotRanks(), {(2, 0): {"a"}, (2, 1): {"b"}}, {(2, 0): 100}
    >>> for t in range(5):
    ...     told = {
    ...         "a": Sample(t, 1.0 * t, 1, {(2, 0): 512}, 1e9),
    ...         "b": Sample(t, 0.1 * t, 1, {}, 1e9),
    ...     }
    ...     if replica := hot.look(told, owners, nbytes):
    ...         print(t, replica.rank, replica.worker)
    3 (2, 0) b
    """

    def __init__(self) -> None:
        self._before: dict[str, Sample] = {}
        self._seen: dict[Rank, int] = {}

    def look(
        self,
        told: Mapping[str, Sample],
        owners: Mapping[Rank, set[str]],
        nbytes: Mapping[Rank, int],
    ) -> Replica | None:
        """Say which rank should get a further owner now, if one should.

        Parameters
        ----------
        told : what each worker told last
        owners : of all ranks
        nbytes : of the experts of ranks, as far as known
        """
        shares = self._shares(told)
        hot: dict[Rank, str] = {}
        for worker, share in shares.items():
            waiting = told[worker].waiting
            if share >= BUSY and waiting:
                hot[max(sorted(waiting), key=waiting.__getitem__)] = worker
        self._seen = {rank: self._seen.get(rank, 0) + 1 for rank in hot}
        for rank, busy in sorted(hot.items(), key=lambda item: -shares[item[1]]):
            if self._seen[rank] < LOOKS:
                continue
            free = [
                worker
                for worker, share in shares.items()
                if share <= IDLE
                and worker not in owners.get(rank, ())
                and told[worker].room >= nbytes.get(rank, 0)
            ]
            if free:
                worker = min(sorted(free), key=shares.__getitem__)
                self._seen.clear()
                rows = told[busy].waiting[rank]
                return Replica(
                    rank,
                    worker,
                    f"hot: {rows} rows waited at {busy}, which was busy {shares[busy]:.0%} of the "
                    f"time, {worker} {shares[worker]:.0%}",
                )
        return None

    def _shares(self, told: Mapping[str, Sample]) -> dict[str, float]:
        """The part of the time since the last look that each worker's cores have computed."""
        shares = {}
        for worker, now in told.items():
            before = self._before.get(worker)
            if before is None:
                self._before[worker] = now
            elif now.time > before.time:
                passed = (now.time - before.time) * now.threads
                shares[worker] = (now.core - before.core) / passed
                self._before[worker] = now
        self._before = {worker: self._before[worker] for worker in told}
        return shares
