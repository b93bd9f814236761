"""Which rank should get another owner automatically?

With each heartbeat, workers report how long their cores have computed and how many rows wait for
each of their ranks. A worker that is always busy while rows wait for it delays the others; if one
of them has time and room, it can take a share of the rank for which most rows wait:

    LOOKS looks in a row    busy share ≥ BUSY, rows wait     the rank with most of them is hot
                            busy share ≤ IDLE, not its       the least busy of these, if the experts
                            owner                            fit into MEMORY of its limit
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from math import inf
from typing import NamedTuple

from distributed.core import Status
from distributed.scheduler import WorkerState

BUSY, IDLE = 0.9, 0.6
"""Shares of the time that a worker's cores compute: of an overloaded worker, and of one that can
take more."""

LOOKS = 3
"""How often in a row a rank must be hot, so that short queues do not count."""

LOOK_SECONDS = 1.0
"""Seconds between two looks."""

MEMORY = 0.7
"""Share of a worker's memory limit up to which replicas are added."""

Rank = tuple[int, int]
"""World size and rank."""


class Sample(NamedTuple):
    """A worker's report."""

    time: float
    #: time of the report, in seconds
    core: float
    #: seconds that its cores have computed so far, summed
    threads: int
    waiting: Mapping[Rank, int]
    #: rows of packets that wait for each rank
    room: float
    #: bytes of memory left for replicas; inf without a limit


def read_reports(
    workers: Iterable[WorkerState], sizes: Mapping[str, int]
) -> tuple[dict[str, Sample], dict[Rank, int]]:
    """The last reports of running workers, and how many bytes the experts of each rank take.

    `sizes` has the world sizes of the layers that are computed, by their tokens.
    """
    told, nbytes = {}, Counter[Rank]()
    for worker in workers:
        report = worker.metrics.get("dask_ep")
        if report is None or worker.status != Status.running:
            continue
        waiting = Counter[Rank]()
        for token, rank, rows in report["queues"]:
            if token in sizes:
                waiting[sizes[token], rank] += rows
        for token, rank, held in report["slices"]:
            if token in sizes:
                nbytes[sizes[token], rank] = max(held, nbytes[sizes[token], rank])
        used, limit = worker.metrics.get("memory", 0), worker.memory_limit
        room = MEMORY * limit - used if limit else inf
        time, core, threads = report["time"], report["core"], report["threads"]
        told[worker.address] = Sample(time, core, threads, waiting, room)
    return told, nbytes


class Replica(NamedTuple):
    """A rank that should get another owner."""

    rank: Rank
    worker: str
    why: str


class HotRanks:
    """Checks the workers' reports now and then, and decides when a rank should get another owner.

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
        self._before: Mapping[str, Sample] = {}
        self._seen: dict[Rank, int] = {}

    def look(
        self,
        told: Mapping[str, Sample],
        owners: Mapping[Rank, Collection[str]],
        nbytes: Mapping[Rank, int],
    ) -> Replica | None:
        """Return the rank that should get another owner now, if any.

        From the last report of each worker, the owners of all ranks, and the sizes of the experts
        of ranks, as far as known.
        """
        shares = self._shares(told)
        hot: dict[Rank, str] = {}
        for worker, share in shares.items():
            waiting = told[worker].waiting
            if share >= BUSY and waiting:
                hot[max(sorted(waiting), key=waiting.__getitem__)] = worker
        self._seen = {rank: self._seen.get(rank, 0) + 1 for rank in hot}
        for rank, busy in sorted(hot.items(), key=lambda item: -shares[item[1]]):
            free = [
                worker
                for worker, share in shares.items()
                if share <= IDLE
                and worker not in owners.get(rank, ())
                and told[worker].room >= nbytes.get(rank, 0)
            ]
            if free and self._seen[rank] >= LOOKS:
                worker = min(sorted(free), key=shares.__getitem__)
                self._seen.clear()
                why = (
                    f"hot: {told[busy].waiting[rank]} rows waited at {busy}, which was busy "
                    f"{shares[busy]:.0%} of the time, {worker} {shares[worker]:.0%}"
                )
                return Replica(rank, worker, why)
        return None

    def _shares(self, told: Mapping[str, Sample]) -> dict[str, float]:
        """The share of the time since the last look in which each worker's cores computed."""
        shares = {}
        for worker, now in told.items():
            before = self._before.get(worker, now)
            if now.time > before.time:
                passed = (now.time - before.time) * now.threads
                shares[worker] = (now.core - before.core) / passed
        self._before = told
        return shares
