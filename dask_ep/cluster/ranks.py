"""Which workers own the ranks of each world size now, and which owners were requested?"""

from __future__ import annotations

import logging
import time
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from math import inf

from dask_ep.cluster.owner_rules import assign, balance, natural_order

logger = logging.getLogger(__name__)

NOBODY = "no worker: the rank waits for one"
"""Placeholder in the set of a rank without owner, as an empty set would unpin its tasks."""


class OwnersOfRank(set):
    """Addresses of the workers that own a rank: the worker restrictions of all its tasks."""


class Able(OwnersOfRank):
    """Addresses of the workers that have certain resources."""

    def __init__(self, needs: Mapping[str, float]):
        super().__init__({NOBODY})
        self.needs = dict(needs)

    def hear(self, worker: str, resources: Mapping[str, float]) -> None:
        """Add a worker if it has the resources."""
        if all(resources.get(name, 0) >= amount for name, amount in self.needs.items()):
            self.add(worker)


class Ranks:
    """The ranks of one world size: their owners now, and the requested ones; lists by rank."""

    def __init__(self, world_size: int):
        self.owners = [OwnersOfRank({NOBODY}) for _ in range(world_size)]
        self.loads = [1.0] * world_size  # work, any unit
        self.replicas = [1] * world_size  # owners wanted
        # For each owner that a hot rank was given: the owners before
        self.added: defaultdict[int, list[frozenset[str]]] = defaultdict(list)
        self.kept_until = [-inf] * world_size  # monotonic seconds; inf: moved by hand

    def living(self) -> list[frozenset[str]]:
        """The owners without the placeholder."""
        return [frozenset(of_rank - {NOBODY}) for of_rank in self.owners]

    def listed(self) -> list[tuple[str, ...]]:
        """The owners of each rank in order, to be shown."""
        return list(map(_sorted, self.living()))


@dataclass(frozen=True)
class Change:
    """One rank that changed hands."""

    time: float
    """Seconds since the epoch."""
    world_size: int
    rank: int
    before: tuple[str, ...]
    after: tuple[str, ...]
    why: str


class RankMap(dict[int, Ranks]):
    """The ranks of all world sizes; a change of owners is recorded, and told to `changed`."""

    def __init__(self, changed: Callable[[int, int], None]):
        super().__init__()
        self.changes: deque[Change] = deque(maxlen=10_000)
        self.settled_capacity = 0.0  # of all workers, when all was last settled
        self._changed = changed

    def change(self, world_size: int, rank: int, owners: Collection[str], why: str) -> None:
        """Make these workers the owners of a rank."""
        of_rank = self[world_size].owners[rank]
        before, after = of_rank - {NOBODY}, set(owners)
        if before == after:
            return
        of_rank.clear()
        of_rank.update(after or {NOBODY})
        change = Change(time.time(), world_size, rank, _sorted(before), _sorted(after), why)
        self.changes.append(change)
        logger.info("rank %d of %d: %s -> %s (%s)", rank, world_size, before, after, why)
        self._changed(world_size, rank)

    def remove_added(self) -> None:
        """Remove as many owners of hot ranks as were added; others may have replaced these."""
        for world_size, ranks in self.items():
            for rank, added in ranks.added.items():
                owners = ranks.living()[rank]
                extra = max(0, min(len(added), len(owners) - ranks.replicas[rank]))
                leaving = sorted(owners, key=lambda w: (w in added[0], natural_order(w)))[:extra]
                self.change(world_size, rank, owners - set(leaving), "hot no more")
            ranks.added.clear()

    def assign(self, workers: Mapping[str, float], why: str, shares: float = inf) -> None:
        """Give owners to ranks without one, each worker up to `shares` times its fair share."""
        if not self.settled_capacity:
            self.settled_capacity = sum(workers.values())
        for world_size, ranks in self.items():
            before = ranks.living()
            limit = shares * sum(ranks.loads) / (self.settled_capacity or 1.0)
            wanted = [n + len(ranks.added.get(rank, ())) for rank, n in enumerate(ranks.replicas)]
            for rank, owners in enumerate(assign(before, workers, ranks.loads, wanted, limit)):
                self.change(world_size, rank, owners, why)
                if ranks.kept_until[rank] == inf and not before[rank] & owners:
                    ranks.kept_until[rank] = -inf

    def balance(self, workers: Mapping[str, float], keep: float) -> None:
        """Move ranks to less loaded workers; a moved one stays there for `keep` s."""
        now, self.settled_capacity = time.monotonic(), sum(workers.values())
        for world_size, ranks in self.items():
            kept = {rank for rank, until in enumerate(ranks.kept_until) if now < until}
            before = ranks.living()
            for rank, owners in enumerate(balance(before, workers, ranks.loads, kept)):
                if owners != before[rank]:
                    ranks.kept_until[rank] = now + keep
                    self.change(world_size, rank, owners, "rebalanced")


def _sorted(owners: Collection[str]) -> tuple[str, ...]:
    return tuple(sorted(owners, key=natural_order))
