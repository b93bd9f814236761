"""Which rows of a chunk go to which rank, and how do they come back?

    chunk c                         rank 0           rank 1
    row  routing       send         experts 0, 1     experts 2, 3
     0   [0 3]    ───────────────>  rows 0, 2        rows 1, 0     each row once, however many of
     1   [3 2]                          │                │         its experts are there
     2   [1 0]                          v dispatch       v
              sum_ranks             (2, d_out)       (2, d_out)    one summed row comes back
     out (3, d_out)  <──────────────────┴────────────────┘

Where the rows of a packet belong is not sent along: both ends find it from the routing, which stays
where the chunk is.

Axis letters: `n` rows of a chunk, `m` rows of a packet, `k` slots per row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dask_ep import memory
from dask_ep.arrays import Array, namespace, to_host
from dask_ep.checks import computing_dtype
from dask_ep.segments import raise_bad_index, raise_nan
from dask_ep.served import add_rows, assign_rows, gather


class Packet(NamedTuple):
    """The rows that one chunk sends to one rank, each once."""

    rows: Array
    #: [m, d], by the first of their experts there, then in the order of the chunk
    routing: Array
    #: [m, k] global expert of each slot, -1 where another rank serves it; small integers
    topk_weights: Array | None
    #: [m, k], as they came


def send(
    tokens: Array,
    routing: Array,
    topk_weights: Array | None,
    rank: int,
    num_local: int,
    num_experts: int,
) -> Packet:
    """Pick the rows of a chunk that have a slot at a rank.

    Parameters
    ----------
    tokens : (n, d)
    routing : (n,) or (n, k) integers in [-1, num_experts)
    topk_weights : of the shape of routing, or None
    rank : the rank, which owns experts [rank * num_local, (rank + 1) * num_local)
    num_local, num_experts : experts per rank, and in all

    Returns
    -------
    Packet

    Raises
    ------
    ValueError
        If an expert index is out of range: such a row would belong to no packet, and be lost. If a
        top-k weight is NaN, be its row in the packet or not.

    Notes
    -----
    On a device, three or four integers come to the host, in one copy: the smallest and largest
    index, the number of rows, and whether a weight is NaN.
    """
    small = _small(routing, num_experts)
    order, count = packet_order(small, rank, num_local)
    index = order[: _checked_count(routing, topk_weights, count, num_experts)]
    served = small[index]
    xp, elsewhere = namespace(served), served.dtype.type(-1)
    return Packet(
        gather(tokens, index, tokens.dtype),
        xp.where(slots_at(served, rank, num_local), served, elsewhere),
        None if topk_weights is None else topk_weights[index],
    )


def sum_ranks(routing: Array, outputs: Sequence[Array], num_local: int, dtype: np.dtype) -> Array:
    """Give each row of a chunk the sum of what the ranks answered.

    Parameters
    ----------
    routing : (n,) or (n, k), that of `send`
    outputs : one (m_r, d_out) per rank, in the order of ranks, its rows in the order of the packet
    num_local : experts per rank
    dtype : of the result

    Returns
    -------
    (n, d_out), in the order of the chunk; 0 where a row has no expert

    Raises
    ------
    ValueError
        If a rank answered more or fewer rows than it was sent.

    Notes
    -----
    Added in the order of ranks, in the computing dtype: the same bits whichever answered first.
    On a device, one integer per rank comes to the host, in one copy.
    """
    routing = _small(routing, num_local * len(outputs))
    orders, counts = zip(
        *(packet_order(routing, rank, num_local) for rank in range(len(outputs))), strict=True
    )
    index = []
    for rank, (order, sent) in enumerate(zip(orders, to_host(*counts), strict=True)):
        if sent != len(outputs[rank]):
            raise ValueError(
                f"rank {rank} must answer each row of its packet once: {sent} rows were sent "
                f"and {len(outputs[rank])} came back"
            )
        index.append(order[:sent])
    like, shape = outputs[0], (routing.shape[0], outputs[0].shape[1])
    if routing.ndim == 1 or routing.shape[1] == 1:
        out = memory.empty(shape, dtype, like=like)
        out[_rows_without_expert(routing, sum(map(len, index)))] = 0
        for rows, output in zip(index, outputs, strict=True):
            assign_rows(out, rows, output)
        return out
    total = memory.empty(shape, computing_dtype(dtype), like=like)
    total.fill(0)
    for rows, output in zip(index, outputs, strict=True):
        add_rows(total, rows, output)
    return total.astype(dtype, copy=False)


def slots_at(routing: Array, rank: int, num_local: int) -> Array:
    """Which slots are served by a rank: booleans in the shape of routing."""
    return (routing >= rank * num_local) & (routing < (rank + 1) * num_local)


def packet_order(routing: Array, rank: int, num_local: int) -> tuple[Array, Array]:
    """Row numbers (n,), those of a packet first and in its order, and how many these are.

    A packet is ordered by the first expert at the rank, then by row. The number stays where the
    routing is; no expert may be the largest number of its dtype, as `_small` sees to.
    """
    xp = namespace(routing)
    beyond = routing.dtype.type(np.iinfo(routing.dtype).max)
    first = xp.where(slots_at(routing, rank, num_local), routing, beyond)
    if first.ndim == 2:
        first = first.min(axis=1)
    return xp.argsort(first, kind="stable"), (first != beyond).sum()


def _rows_without_expert(routing: Array, num_served: int) -> Array:
    """Row numbers of a routing with one slot a row, `num_served` of which have an expert."""
    order = namespace(routing).argsort(routing.reshape(-1), kind="stable")  # -1 comes first
    return order[: len(order) - num_served]


def _small(routing: Array, num_experts: int) -> Array:
    """Expert indices in few bytes: they travel with the rows, and 16 bits sort in linear time."""
    return routing.astype(np.min_scalar_type(-num_experts - 1))


def _checked_count(
    routing: Array, topk_weights: Array | None, count: Array, num_experts: int
) -> int:
    """Bring a packet's number of rows to the host; refuse an index outside [-1, E), and NaN."""
    if routing.size == 0:
        return 0
    numbers = [routing.min(), routing.max(), count]
    if topk_weights is not None:
        weights = topk_weights.astype(computing_dtype(topk_weights.dtype), copy=False)
        numbers.append(namespace(weights).isnan(weights).any())
    low, high, count, *nan = to_host(*numbers)
    if any(nan):
        raise_nan(topk_weights)
    if low < -1 or high >= num_experts:
        raise_bad_index(routing, num_experts)
    return count
