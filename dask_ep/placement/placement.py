"""Given a placement, to which physical expert does a row go?

A placement says which expert of the model each physical expert holds; some may be empty, and a hot
expert may have several replicas. To the rest of the package it is two things only: a rewriting of
the routing (logical -> physical expert) and an ordering of the experts (physical -> logical).

    physical experts   rank 0: [ 0 2 ]      rank 1: [ 0 1 ]      rank 2: [ 3 - ]
    their numbers               0 1                  2 3                  4 5

    routing of row 7: [ 0 3 -1 ]  ──rewrite──>  [ 0 or 2, by row 7's ticket;  4;  -1 ]

**Tickets.** Every replica of an expert serves a range of tickets, which rows draw by their
number (`replica_choice`).

**Homes.** In a local placement every token chunk has a home, the rank on whose worker it is: rank
c mod R for chunk c. A row is served by the replica at home if there is one, and otherwise by that
of its ticket. Its replicas then depend on its number, its chunk's number and R.

Axis letters: `n` rows, `k` slots per row, `E` experts, `R` ranks, `P` physical experts per rank.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from dask_ep.arrays.html import html_table
from dask_ep.arrays.namespaces import Array, namespace
from dask_ep.placement.replica_choice import TICKETS, Tickets, even_stops, share_sizes


@dataclass(frozen=True, eq=False)
class Placement:
    """Which expert each physical expert holds, and which rows each replica serves.

    Parameters
    ----------
    physical : (R, P) integer array
        The expert of the model that each holds; -1 if it is empty. Every expert from 0 to the
        largest one has at least one replica, and at most one on each rank.
    stops : (R, P) integer array, optional
        A replica serves the tickets from the stop of the expert's previous replica (0 for the
        first) up to, not including, its own stop; that of the last replica is `TICKETS`. Without
        `stops` the replicas of an expert share its rows evenly.
    local : bool
        Whether the rows of a chunk go to the replica at the chunk's home, if there is one. Other
        replicas are chosen by ticket.

    Raises
    ------
    ValueError
        If an invariant is broken; the message says where.

    Notes
    -----
    Physical expert p is number p % P of rank p // P, so that rank r owns the contiguous physical
    experts [r * P, (r + 1) * P): the kernel's layout.

    Examples
    --------
    >>> import numpy as np
    >>> from dask_ep.placement.placement import Placement
    >>> placement = Placement([[0, 2], [0, 1], [3, -1]])
    >>> placement.rewrite(np.array([[0, 3], [0, 1], [2, -1]]))
    array([[ 0,  4],
           [ 2,  3],
           [ 1, -1]], dtype=int32)
    >>> placement.order()
    [0, 2, 0, 1, 3, -1]
    """

    physical: Array
    stops: Array = None
    local: bool = False

    def __post_init__(self) -> None:
        physical = _integers(self.physical, "physical", np.int32)
        stops = None if self.stops is None else _integers(self.stops, "stops", np.int64)
        _check_physical(physical)
        stops = even_stops(physical) if stops is None else stops
        _check_stops(physical, stops)
        for array in (physical, stops):
            array.flags.writeable = False
        object.__setattr__(self, "physical", physical)
        object.__setattr__(self, "stops", stops)

    @property
    def world_size(self) -> int:
        """Number of ranks, R."""
        return self.physical.shape[0]

    @property
    def physical_per_rank(self) -> int:
        """Number of physical experts of each rank, P, including empty ones."""
        return self.physical.shape[1]

    @property
    def num_experts(self) -> int:
        """Number of logical experts, E."""
        return int(self.physical.max()) + 1

    @cached_property
    def replica_counts(self) -> np.ndarray:
        """(E,) int64: number of replicas of each expert."""
        return np.bincount(self.physical[self.physical >= 0], minlength=self.num_experts)

    @cached_property
    def shares(self) -> np.ndarray:
        """(R, P) float64: fraction of its expert's rows that each replica serves; 0 if it is empty.

        In a local placement this assumes that every rank is home to the same number of rows.
        """
        by_ticket = share_sizes(self.physical, self.stops) / TICKETS
        if not self.local:
            return by_ticket
        elsewhere = 1 - np.append(self.replica_counts, 0)[self.physical] / self.world_size
        return (self.physical >= 0) / self.world_size + elsewhere * by_ticket

    @property
    def even(self) -> bool:
        """Whether the replicas of every expert share its rows evenly."""
        return np.array_equal(self.stops, even_stops(self.physical))

    def home(self, chunk: int) -> int | None:
        """Return the home rank of a token chunk; None if replicas are chosen only by ticket.

        Neighbouring chunks have different homes, so that all ranks work on the chunks concurrently.
        """
        return chunk % self.world_size if self.local else None

    def order(self) -> list[int]:
        """Return the expert of each physical one, -1 for none, in the form of `Experts.load`."""
        return self.physical.ravel().tolist()

    def rewrite(
        self, routing: np.ndarray, row_offset: int = 0, home: int | None = None
    ) -> np.ndarray:
        """Turn logical experts into physical ones.

        Parameters
        ----------
        routing : (n, k) or (n,) array of any integer dtype, NumPy or CuPy
            Logical experts; -1 means no expert.
        row_offset : int
            The global index of the first row.
        home : int, optional
            The rank at which these rows are at home; required if the placement is local.

        Returns
        -------
        physical : int32 array of the same shape, -1 where `routing` is -1

        Raises
        ------
        ValueError
            If an index is outside [-1, E), or if the home is missing.

        Notes
        -----
        Depends only on the routing, the global row numbers and the home. Slots of one row at one
        expert go to one replica. Cost: one gather if every expert has one replica, otherwise a
        search among the replicas and three gathers; with a home, one gather more. On a device two
        integers are copied to the host, in one copy, and tables to the device: 4 (E + 1) bytes with
        one replica each, otherwise 12 per replica; with a home, 4 (E + 1) more.
        """
        if not self.local:
            return self._tickets.choose(routing, row_offset)
        if home is None:
            raise ValueError(
                "this placement chooses replicas by a chunk's home; pass home=placement.home(c)"
            )
        by_ticket = self._tickets.choose(routing, row_offset)
        xp = namespace(routing)
        at_home = xp.asarray(self._at_home[home])[routing]
        return xp.where(at_home < 0, by_ticket, at_home)

    def rank_load(self, load: np.ndarray) -> np.ndarray:
        """Return the rows that each rank serves, (R,) float64, given those of each expert, (E,)."""
        load = np.append(np.asarray(load, np.float64), 0.0)  # [-1] is for empty places
        return (load[self.physical] * self.shares).sum(axis=1)

    def imbalance(self, load: np.ndarray) -> float:
        """Return the largest over the mean rank load: 1.0 if perfect, or if there is no load."""
        ranks = self.rank_load(load)
        return float(ranks.max() / ranks.mean()) if ranks.any() else 1.0

    def to_json(self) -> str:
        """Write the placement as JSON text that `from_json` reads back, equal to the last bit."""
        content: dict[str, object] = {"physical": self.physical.tolist()}
        if not self.even:
            content["stops"] = self.stops.tolist()
        if self.local:
            content["local"] = True
        return json.dumps(content)

    @classmethod
    def from_json(cls, text: str) -> Placement:
        """Read what `to_json` wrote.

        Examples
        --------
        >>> Placement.from_json('{"physical": [[1], [0]]}').order()
        [1, 0]
        """
        content = json.loads(text)
        if not isinstance(content, dict) or "physical" not in content:
            raise ValueError(f'a placement must be an object with "physical"; got {text[:40]!r}')
        return cls(content["physical"], content.get("stops"), content.get("local", False))

    @cached_property
    def _tickets(self) -> Tickets:
        return Tickets(self.physical, self.stops)

    @cached_property
    def _at_home(self) -> np.ndarray:
        """(R, E + 1) int32: physical expert of each expert at each rank, -1 if it has none."""
        table = np.full((self.world_size, self.num_experts + 1), -1, np.int32)
        rank, column = np.nonzero(self.physical >= 0)
        table[rank, self.physical[rank, column]] = rank * self.physical_per_rank + column
        return table

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Placement):
            return NotImplemented
        same = np.array_equal(self.physical, other.physical) and np.array_equal(
            self.stops, other.stops
        )
        return same and self.local == other.local

    def __hash__(self) -> int:
        return hash(
            (self.physical.shape, self.physical.tobytes(), self.stops.tobytes(), self.local)
        )

    def __getstate__(self) -> dict[str, np.ndarray | bool]:
        # Cached lookup tables are not pickled.
        return {"physical": self.physical, "stops": self.stops, "local": self.local}

    def __dask_tokenize__(self) -> tuple[str, list, list, bool]:
        return ("dask_ep.Placement", self.physical.tolist(), self.stops.tolist(), self.local)

    def __repr__(self) -> str:
        return (
            f"<Placement: {self.num_experts} experts in {self.replica_counts.sum()} of "
            f"{self.world_size} x {self.physical_per_rank} physical ones>"
        )

    def _repr_html_(self) -> str:
        ranks = [
            (f"rank {rank}", ", ".join(str(e) if e >= 0 else "empty" for e in experts))
            for rank, experts in enumerate(self.physical.tolist())
        ]
        return html_table(f"Placement of {self.num_experts} experts", ranks)


def verify_placement(
    placement: Placement, num_experts: int | None = None, max_physical: int | None = None
) -> None:
    """Raise unless every invariant of a placement holds.

    Parameters
    ----------
    placement : Placement
    num_experts : int, optional
        Number of experts that it must place: all of them, and no others.
    max_physical : int, optional
        Maximum number of physical experts of a rank.

    Raises
    ------
    ValueError
        If an expert is missing, is twice on one rank or does not exist, if the replicas of an
        expert do not serve every ticket exactly once, or if a limit is exceeded.
    """
    _check_physical(placement.physical)
    _check_stops(placement.physical, placement.stops)
    if num_experts is not None and placement.num_experts != num_experts:
        raise ValueError(
            f"the placement must place {num_experts} experts, but places {placement.num_experts}; "
            "make it for these experts"
        )
    if max_physical is not None and placement.physical_per_rank > max_physical:
        raise ValueError(
            f"a rank may have at most {max_physical} experts, but the placement gives it "
            f"{placement.physical_per_rank}; raise the limit, or use more ranks or fewer replicas"
        )


def _integers(values: object, name: str, dtype: type) -> np.ndarray:
    """Copy a table of integers; raise for anything else."""
    array = np.array(values)
    if array.ndim != 2 or array.size == 0 or array.dtype.kind not in "iu":
        raise ValueError(
            f"{name} must be a table (ranks, experts) of integers with at least one of each; "
            f"got shape {array.shape}, dtype {array.dtype}"
        )
    return array.astype(dtype)


def _check_physical(physical: np.ndarray) -> None:
    """Raise unless every expert is placed, and none twice on a rank."""
    if physical.min() < -1:
        raise ValueError(f"a physical expert must be an expert or -1, but one is {physical.min()}")
    missing = np.flatnonzero(np.bincount(physical[physical >= 0], minlength=1) == 0)
    if missing.size:
        raise ValueError(
            f"every expert needs a place, but expert {missing[0]} of {physical.max() + 1} has "
            "none; place all experts from 0 to the largest one"
        )
    rows = np.sort(physical, axis=1)
    rank, at = np.nonzero((rows[:, 1:] == rows[:, :-1]) & (rows[:, 1:] >= 0))
    if rank.size:
        raise ValueError(
            f"a rank must hold an expert at most once, but rank {rank[0]} holds expert "
            f"{rows[rank[0], at[0]]} twice; give the second place to another expert or leave it "
            "empty (-1)"
        )


def _check_stops(physical: np.ndarray, stops: np.ndarray) -> None:
    """Raise unless the replicas of every expert serve every ticket exactly once."""
    if stops.shape != physical.shape:
        raise ValueError(f"stops {stops.shape} must have the shape of physical {physical.shape}")
    sizes = share_sizes(physical, stops)
    if (sizes < 0).any() or (stops < 0).any():
        rank, at = np.argwhere((sizes < 0) | (stops < 0))[0]
        raise ValueError(
            "the stops of an expert's replicas must not decrease, but that of expert "
            f"{physical[rank, at]} on rank {rank} does ({stops[rank, at]})"
        )
    served = np.zeros(physical.max() + 1, np.int64)
    np.add.at(served, physical[physical >= 0], sizes[physical >= 0])
    wrong = np.flatnonzero(served != TICKETS)
    if wrong.size:
        raise ValueError(
            f"the last replica of an expert must stop at {TICKETS}, but that of expert {wrong[0]} "
            f"stops at {served[wrong[0]]}"
        )
