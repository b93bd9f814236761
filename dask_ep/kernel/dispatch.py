"""What does one rank do with its tokens?

Axis letters: `n` rows, `d` width, `k` slots per row, `E` experts, `R` ranks.

    routing [n, k] ── sort_slots ──> slots of expert 0 │ slots of expert 1 │ ... │ not ours
                                          │
    tokens [n, d] ── gather ──> rows of one expert ── expert ──> times the top-k weight
                                                                       │
    output [n, d_out] <── add to the rows ─────────────────────────────┘

There is no loop over rows: one stable sort (`segments`), then one matrix product per expert that
has rows (`host_kernel`). On a device (CuPy) the experts compute together instead of tile by tile
(`device_kernel`); only one small array of integers is copied to the host: the ends of the experts'
segments, and the numbers of invalid indices and weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dask_ep.arrays import memory
from dask_ep.arrays.checks import (
    check_rank,
    check_routing,
    check_tokens,
    computing_dtype,
    raise_bad_index,
    raise_nan,
)
from dask_ep.arrays.namespaces import UNDERFLOW_IS_ZERO, Array, namespace, one_namespace
from dask_ep.kernel import device_kernel
from dask_ep.kernel.expert import Expert, as_local_experts
from dask_ep.kernel.host_kernel import Served
from dask_ep.kernel.segments import kernel_hint, sort_slots


def expert_parallel_dispatch(
    tokens: Array,
    routing: Array,
    expert_Ws: Array | Sequence[Array | Callable[[Array], Array]],
    rank: int,
    world_size: int,
    *,
    topk_weights: Array | None = None,
) -> Array:
    """Apply the experts of one rank to the rows that are routed to them.

    Parameters
    ----------
    tokens : (n, d) array of floats
        float16, bfloat16 (``ml_dtypes``), float32 or float64; NumPy or CuPy.
    routing : (n,) or (n, k) array of integers
        Global expert indices, 0 to E - 1; -1 means "no expert", and adds nothing.
    expert_Ws : list of E/R experts, or (E/R, d, d_out) array
        The experts that this rank owns, and only these: each a (d, d_out) matrix, an `Expert`, or
        a callable (m, d) -> (m, d_out). A callable gets rows in the computing dtype, read-only if
        they are NumPy's, and is called once without rows to learn its width. Rank r owns the
        global experts [r * E/R, (r+1) * E/R).
    rank, world_size : int
        r and R; 0 <= r < R. E is ``len(expert_Ws) * world_size``.
    topk_weights : (n, k) array of floats, or (n,) where routing is (n,); optional
        Multiplies the output of each slot's expert; absent means 1.

    Returns
    -------
    (n, d_out) array of the tokens' dtype
        Row i is the sum over its slots owned here of weight * expert(row i); all other rows are 0.
        The sum of the outputs of all ranks is the output of the layer.

    Raises
    ------
    TypeError
        If tokens or top-k weights are not floats, routing is not integers, something is not an
        array, or arrays of two namespaces (NumPy, CuPy) are mixed.
    ValueError
        If shapes do not fit, rank or an expert index is out of range, or a top-k weight is NaN.

    Notes
    -----
    float64 tokens are computed in float64, all others with the accuracy of float32, whatever the
    weights' dtype: bfloat16 is multiplied in 16 bits with float32 sums where CPUs (`bfloat16`) or
    devices (`device_kernel`) support it.
    One stable sort of the n * k slots and one matrix product per expert with rows (per tile of
    `TILE_BYTES` on the CPU); additions go in the order of the experts, so that the same input
    gives the same bits. Rows that come sorted by expert with one slot each are neither gathered nor
    scattered. NaN or infinity in a row stays in that row. On a device, E/R + 3 or 4 int64 come to
    the host in one copy, and nothing is copied to the device. The layer is that of Shazeer et al.,
    "Outrageously Large Neural Networks" (2017), section 2.

    Examples
    --------
    Rank 1 of 2 owns experts 2 and 3; row 1 is the only one routed to them.

    >>> import numpy as np
    >>> from dask_ep import expert_parallel_dispatch
    >>> tokens = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    >>> routing = np.array([0, 3, 1])
    >>> double, triple = 2 * np.eye(2), 3 * np.eye(2)
    >>> expert_parallel_dispatch(tokens, routing, [double, triple], rank=1, world_size=2)
    array([[ 0.,  0.],
           [ 9., 12.],
           [ 0.,  0.]])
    """
    return dispatch(tokens, routing, topk_weights, expert_Ws, rank, world_size)


@UNDERFLOW_IS_ZERO
def dispatch(
    tokens: Array,
    routing: Array,
    topk_weights: Array | None,
    expert_Ws: Array | Sequence[Any],
    rank: int,
    world_size: int,
    dtype: np.dtype | None = None,
) -> Array:
    """As `expert_parallel_dispatch`, but return another dtype, such as that of its sums."""
    xp = one_namespace(tokens=tokens, routing=routing, topk_weights=topk_weights)
    check_tokens(tokens)
    check_routing(routing, topk_weights, n=tokens.shape[0])
    check_rank(rank, world_size)
    rank, world_size = int(rank), int(world_size)  # NumPy's small integers would overflow
    compute = computing_dtype(tokens.dtype)
    experts = as_local_experts(expert_Ws, d=tokens.shape[1], like=tokens, dtype=compute)
    dtype = tokens.dtype if dtype is None else dtype
    if xp is not np:
        return _on_device(tokens, routing, topk_weights, experts, rank, world_size, dtype)

    tokens = memory.aligned(tokens)
    segments = sort_slots(routing, topk_weights, len(experts), rank, world_size)
    served = Served(tokens, segments, topk_weights, experts[0].d_out)
    for e, expert in enumerate(experts):
        served.add(e, expert)
    return served.out.astype(dtype, copy=False)


def _on_device(
    tokens: Array,
    routing: Array,
    topk_weights: Array | None,
    experts: Sequence[Expert],
    rank: int,
    world_size: int,
    dtype: np.dtype,
) -> Array:
    sums, weights = computing_dtype(tokens.dtype), None
    if topk_weights is not None:
        flat = namespace(tokens).ascontiguousarray(topk_weights).reshape(-1)
        weights = flat.astype(sums, copy=False)
    slots = device_kernel.sort_slots(routing, weights, len(experts), rank, world_size)
    if slots.bad:
        raise_bad_index(routing, len(experts) * world_size, kernel_hint(len(experts), world_size))
    if slots.nan:
        raise_nan(topk_weights)
    return device_kernel.through_experts(tokens, slots, weights, experts, sums, dtype)
