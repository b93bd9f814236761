"""Which rows of a chunk go where, and how do they come back?

    chunk c                  owner of ranks 0, 2     owner of rank 1
    row  routing     pack    experts 0 1, 4 5        experts 2 3
     0   [0 3]     ────────> rows 0, 2, 3            rows 0, 1     each row once to each owner,
     1   [3 2]                   │     │                 │         however many of its experts
     2   [1 0]                   v     v                 v         are there
     3   [5 4]    combine     rank 0  rank 2          rank 1
     out (4, d_out) <────────────┴─────┴─────────────────┘         one summed row from each rank

One sort of the chunk's slots makes all packets; each owner sorts its packet once more. The row
numbers of a packet are not sent: the chunk keeps them. What a rank computes does not depend on how
packets are made: an expert's rows always come in the order of the chunk, so the bits are the same
however ranks are spread over workers, and also without any packet.

Axis letters: `n` rows of a chunk, `m` rows of a packet, `k` slots per row, `P` physical experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np

from dask_ep.arrays import memory
from dask_ep.arrays.checks import computing_dtype, raise_bad_index, raise_nan
from dask_ep.arrays.namespaces import UNDERFLOW_IS_ZERO, Array, namespace, to_host
from dask_ep.kernel import device_kernel
from dask_ep.kernel.host_kernel import add_rows, assign_rows, gather
from dask_ep.kernel.segments import sort_slots


class Packet(NamedTuple):
    """The rows that one chunk sends to one owner, each once."""

    rows: Array
    #: [m, d]: with one slot per row by expert, then in the order of the chunk; else in that order
    routing: Array
    #: [m, k] physical expert of each slot, -1 where another owner serves it; small integers
    topk_weights: Array | None
    #: [m, k], as in the chunk


class Packing:
    """A chunk whose slots are sorted: which rows each rank and each owner gets.

    Parameters
    ----------
    tokens : (n, d)
    routing : (n,) or (n, k) physical experts in [-1, world_size * num_local)
    topk_weights : of the shape of routing, or None
    num_local : experts of a rank; rank r owns [r * num_local, (r + 1) * num_local)
    world_size : R

    Raises
    ------
    ValueError
        If an expert index is out of range: such a row would belong to no packet, and be lost. If a
        top-k weight is NaN.

    Notes
    -----
    One stable sort of n * k small integers on the host. On a device, R + 3 integers come to the
    host in one copy, and each rank's rows are sorted separately.
    """

    def __init__(
        self,
        tokens: Array,
        routing: Array,
        topk_weights: Array | None,
        num_local: int,
        world_size: int,
    ):
        self.tokens, self.topk_weights = tokens, topk_weights
        self.num_local, self.world_size = num_local, world_size
        self.on_device = namespace(tokens) is not np
        self.k = 1 if routing.ndim == 1 else routing.shape[1]
        places = num_local * world_size
        if self.on_device:
            self.routing = small(routing, places)
            self._counts = _checked_counts(routing, topk_weights, self.routing, self)
        else:
            self.segments = sort_slots(routing, topk_weights, places, 0, 1)
            self.routing = small(routing, places)

    @property
    def d(self) -> int:
        return self.tokens.shape[1]

    @cached_property
    def ranks(self) -> list[int]:
        """Ranks that have rows of this chunk, in order."""
        return [r for r in range(self.world_size) if self.count(r)]

    def count(self, rank: int) -> int:
        """Number of slots of a rank; on a device, of rows."""
        if self.on_device:
            return self._counts[rank]
        start, stop = self.segments.of_rank(rank, self.num_local)
        return stop - start

    def rows(self, rank: int) -> Array | slice:
        """Numbers of the chunk's rows that a rank serves, in the order of its answer."""
        if self.on_device:
            return packet_order(self.routing, rank, self.num_local)[0][: self._counts[rank]]
        return self.segments.rows_of(rank, self.num_local, len(self.tokens))

    def packet(self, ranks: Sequence[int]) -> Packet:
        """Gather the rows of the chunk that the owner of some ranks, in ascending order, needs."""
        index, routing = self._rows_of_all(ranks), self.routing
        xp = namespace(routing)
        served = routing[index]
        if len(ranks) < len(self.ranks):
            here = _slots_at_any(served, ranks, self.num_local)
            served = xp.where(here, served, served.dtype.type(-1))
        weights = None if self.topk_weights is None else self.topk_weights[index]
        if isinstance(index, slice):
            return Packet(self.tokens[index], served, weights)
        return Packet(gather(self.tokens, index, self.tokens.dtype), served, weights)

    def _rows_of_all(self, ranks: Sequence[int]) -> Array | slice:
        if len(ranks) == 1:
            return self.rows(ranks[0])
        xp = namespace(self.tokens)
        if self.k == 1:
            parts = [self.rows(rank) for rank in ranks]
            if all(isinstance(part, slice) for part in parts):
                parts = [np.arange(part.start, part.stop) for part in parts]
            return xp.concatenate(parts)
        if self.on_device:
            here = _slots_at_any(self.routing, ranks, self.num_local).any(axis=1)
            (count,) = to_host(here.sum())
            return xp.argsort(~here, kind="stable")[:count]
        here = np.zeros(len(self.tokens), bool)
        for rank in ranks:
            here[self.segments.rows_of_slots(rank, self.num_local)] = True
        return np.flatnonzero(here)


class Combining:
    """Adds up the answers of the ranks, in their order, to the output of a chunk.

    Parameters
    ----------
    packing : of the chunk
    d_out : width of an output row
    dtype : of the output

    Notes
    -----
    Sums are in the computing dtype, and rounded once. A row without an expert is 0.
    """

    def __init__(self, packing: Packing, d_out: int, dtype: np.dtype):
        self._packing, self._dtype, n = packing, np.dtype(dtype), len(packing.tokens)
        self._one_slot = packing.k == 1
        sums = self._dtype if self._one_slot else computing_dtype(dtype)
        self._total = memory.empty((n, d_out), sums, like=packing.tokens)
        if self._one_slot and not packing.on_device:
            self._total[packing.segments.not_ours()] = 0
        else:
            self._total.fill(0)

    @UNDERFLOW_IS_ZERO
    def add(self, rank: int, answer: Array) -> None:
        """Add the answer of the next rank, one row for each row that it was sent.

        Raises
        ------
        ValueError
            If it answered more or fewer rows than it was sent.
        """
        rows = self._packing.rows(rank)
        sent = rows.stop - rows.start if isinstance(rows, slice) else len(rows)
        if sent != len(answer):
            raise ValueError(
                f"rank {rank} must answer each row of its packet once, but {sent} rows were sent "
                f"and {len(answer)} came back"
            )
        if self._one_slot:
            assign_rows(self._total, rows, answer)
        else:
            add = device_kernel.add_rows if self._packing.on_device else add_rows
            add(self._total, rows, answer)

    @UNDERFLOW_IS_ZERO
    def output(self) -> Array:
        """(n, d_out), in the order of the chunk, once all ranks are added."""
        return self._total.astype(self._dtype, copy=False)


def slots_at(routing: Array, rank: int, num_local: int) -> Array:
    """Which slots a rank serves: booleans in the shape of routing."""
    return (routing >= rank * num_local) & (routing < (rank + 1) * num_local)


def packet_order(routing: Array, rank: int, num_local: int) -> tuple[Array, Array]:
    """Row numbers (n,), those with a slot at a rank first, and how many these are.

    With one slot per row they are sorted by expert, then by row; else by row. The count stays on
    the device of the routing; no expert may be the largest number of its dtype, which `small`
    ensures.
    """
    xp, here = namespace(routing), slots_at(routing, rank, num_local)
    if routing.ndim == 2 and routing.shape[1] > 1:
        here = here.any(axis=1)
        return xp.argsort(~here, kind="stable"), here.sum()
    beyond = routing.dtype.type(np.iinfo(routing.dtype).max)
    keys = xp.where(here, routing, beyond).reshape(-1)
    return xp.argsort(keys, kind="stable"), here.sum()


def small(routing: Array, places: int) -> Array:
    """Expert indices in few bytes: they travel with the rows, and 16 bits sort in linear time."""
    return routing.astype(np.min_scalar_type(-places - 1), copy=False)


def _slots_at_any(routing: Array, ranks: Sequence[int], num_local: int) -> Array:
    """Which slots any of some ranks serves."""
    xp = namespace(routing)
    here = slots_at(routing, ranks[0], num_local)
    if len(ranks) == 1:
        return here
    if xp is np:
        owned = np.zeros((routing.max(initial=-1) // num_local + 2), bool)  # [-1]: of no rank
        owned[[rank for rank in ranks if rank < len(owned) - 1]] = True
        return owned[np.where(routing < 0, -1, routing // num_local)]
    for rank in ranks[1:]:
        here |= slots_at(routing, rank, num_local)
    return here


def _checked_counts(
    routing: Array, topk_weights: Array | None, small_routing: Array, packing: Packing
) -> list[int]:
    """Count each rank's rows, on the host; refuse an index outside [-1, P), and NaN."""
    if routing.size == 0:
        return [0] * packing.world_size
    places = packing.num_local * packing.world_size
    numbers = [routing.min(), routing.max()]
    for rank in range(packing.world_size):
        here = slots_at(small_routing, rank, packing.num_local)
        numbers.append((here if here.ndim == 1 else here.any(axis=1)).sum())
    if topk_weights is not None:
        weights = topk_weights.astype(computing_dtype(topk_weights.dtype), copy=False)
        numbers.append(namespace(weights).isnan(weights).any())
    low, high, *rest = to_host(*numbers)
    counts, nan = rest[: packing.world_size], rest[packing.world_size :]
    if any(nan):
        raise_nan(topk_weights)
    if low < -1 or high >= places:
        raise_bad_index(routing, places)
    return counts
