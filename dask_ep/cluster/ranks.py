"""Who owns the ranks of one world size now, and what was asked for?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf

NOBODY = "no worker: the rank waits for one"
"""Stands in the set of a rank without owner, for an empty set would free its tasks."""


class OwnersOfRank(set):
    """Addresses of the workers that own a rank: the worker restrictions of all its tasks."""


class Able(OwnersOfRank):
    """Addresses of the workers that have certain resources."""

    def __init__(self, needs: Mapping[str, float]):
        super().__init__({NOBODY})
        self.needs = dict(needs)

    def hear(self, worker: str, resources: Mapping[str, float]) -> None:
        """Take a worker in if it has what is needed."""
        if all(resources.get(name, 0) >= amount for name, amount in self.needs.items()):
            self.add(worker)


@dataclass
class Ranks:
    """The ranks of one world size: who owns them now, and what was asked for."""

    owners: list[OwnersOfRank]
    """Per rank."""
    loads: list[float]
    """Work per rank, any unit."""
    replicas: list[int]
    """Owners wanted per rank."""
    by_hand: set[int] = field(default_factory=set)
    """Ranks that somebody moved: no rebalancing."""
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
        """The owners without the stand-in."""
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
