"""Which workers own the ranks of each world size now, and which owners were requested?"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
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


@dataclass
class Ranks:
    """The ranks of one world size: their owners now, and the requested ones."""

    owners: list[OwnersOfRank]
    """Per rank."""
    loads: list[float]
    """Work per rank, any unit."""
    replicas: list[int]
    """Owners wanted per rank."""
    by_hand: set[int] = field(default_factory=set)
    """Ranks that were moved by hand: no rebalancing."""
    balanced_at: list[float] = field(default_factory=list)
    """When rebalancing last moved the rank; monotonic seconds."""

    @classmethod
    def unowned(cls, world_size: int) -> Ranks:
        return cls(
            owners=[OwnersOfRank({NOBODY}) for _ in range(world_size)],
            loads=[1.0] * world_size,
            replicas=[1] * world_size,
            balanced_at=[-inf] * world_size,
        )

    def living(self) -> list[frozenset[str]]:
        """The owners without the placeholder."""
        return [frozenset(of_rank - {NOBODY}) for of_rank in self.owners]


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
    """The ranks of all world sizes; records and reports changes of owners.

    Parameters
    ----------
    changed : called with (world size, rank) when a rank has other owners
    """

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

    def assign(self, workers: Mapping[str, float], why: str, shares: float = inf) -> None:
        """Give owners to ranks without one, each worker up to `shares` times its fair share."""
        if not self.settled_capacity:
            self.settled_capacity = sum(workers.values())
        for world_size, ranks in self.items():
            before = ranks.living()
            limit = shares * sum(ranks.loads) / (self.settled_capacity or 1.0)
            chosen = assign(before, workers, ranks.loads, ranks.replicas, limit)
            for rank, owners in enumerate(chosen):
                self.change(world_size, rank, owners, why)
                if not before[rank] & owners:
                    ranks.by_hand.discard(rank)

    def balance(self, workers: Mapping[str, float], keep: float) -> None:
        """Move ranks to less loaded workers; a moved one stays there for `keep` s."""
        now = time.monotonic()
        for world_size, ranks in self.items():
            fixed = ranks.by_hand | {
                rank
                for rank, balanced_at in enumerate(ranks.balanced_at)
                if now - balanced_at < keep
            }
            before = ranks.living()
            for rank, owners in enumerate(balance(before, workers, ranks.loads, fixed)):
                if owners != before[rank]:
                    ranks.balanced_at[rank] = now
                    self.change(world_size, rank, owners, "rebalanced")

    def only_owners(self) -> set[str]:
        """Workers without which some rank has no owner."""
        of_ranks = (of_rank for ranks in self.values() for of_rank in ranks.living())
        return {owner for of_rank in of_ranks if len(of_rank) == 1 for owner in of_rank}

    def published(self) -> dict[str, list[tuple[str, ...]]]:
        """The owners by world size, for the scheduler's metadata."""
        return {
            str(world_size): [_sorted(of_rank) for of_rank in ranks.living()]
            for world_size, ranks in self.items()
        }


def _sorted(owners: Collection[str]) -> tuple[str, ...]:
    return tuple(sorted(owners, key=natural_order))
