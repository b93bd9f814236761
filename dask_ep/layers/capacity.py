"""Which slots does an expert take, if its capacity is too small for all of them?

Axis letters: `n` rows, `k` slots per row, `E` experts, `C` row chunks, `B` digits.

Every slot has an expert and a key, and each expert takes its `capacity` slots of largest key, the
earlier row among equals. The batch is never joined: the smallest key that an expert takes is found
digit by digit from the top, by counting, as in a radix sort,

    indices, keys [n, k] ── count the slots per expert and digit ──> [C, E, B] ── sum ──> [E, B]
       │  ^                                                                                 │
       │  └──────── three rounds: the digits so far, and the slots still free [2, E] <──────┘
       │
       └─── count the slots with exactly that key [C, E] ── cumulative sum ──> room for equals
                 └──> larger key: keep; equal key: keep while there is room; else -1

so that a task holds one chunk and a few small tables, whatever the number of rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import dask.array as da
import numpy as np

from dask_ep.arrays.checks import refuse_masked
from dask_ep.arrays.namespaces import UNDERFLOW_IS_ZERO, Array, namespace
from dask_ep.graph.rows import block_by_block, one_chunk_wide
from dask_ep.layers.scores import SCORES

DIGITS = (11, 11, 10)
"""Bits of each digit of a 32-bit key, from the top: a table of counts is E * 2048 * 8 bytes."""


@dataclass(frozen=True)
class Capacity:
    """How many slots of a whole batch an expert takes, and which ones are dropped.

    Attributes
    ----------
    factor : float
        Each expert takes at most ``ceil(factor * n * k / E)`` of the n * k slots of a batch.
    drop : {"score", "position"}
        Beyond that, the slots of smallest top-k weight are dropped (of the later row, among
        equals), or those of the last rows.

    Notes
    -----
    A dropped slot has index -1 and adds nothing; the weights of the row's other slots stay as they
    are. The rule of GShard (Lepikhin et al., 2020, section 2.2) and of Switch Transformers (Fedus
    et al., 2021, section 2.2) is drop by position; here the batch is all rows of the array.
    """

    factor: float
    drop: str = "score"

    def __post_init__(self) -> None:
        _check_factor(self.factor)
        if self.drop not in ("score", "position"):
            raise ValueError(f"drop must be 'score' or 'position', but is {self.drop!r}")


@dataclass(frozen=True)
class ExpertChoice:
    """A router in which each expert chooses its rows, and a row may have any number of experts.

    Attributes
    ----------
    num_experts : int
        E
    factor : float
        Each expert takes its ``ceil(factor * n / E)`` best rows: `factor` experts a row on average.
    score : {"softmax", "sigmoid", "sqrtsoftplus"}
        Of all E logits; the score is also the weight.
    apply_router_weight_on_input : bool
        What the weight multiplies, as in `Router`.

    Notes
    -----
    Zhou et al., "Mixture-of-Experts with Expert Choice Routing" (2022), section 3.2, over all rows
    of the array. `num_experts` is also the number of slots per row, -1 where it was not chosen.
    """

    num_experts: int
    factor: float
    score: str = "softmax"
    apply_router_weight_on_input: bool = False

    def __post_init__(self) -> None:
        _check_factor(self.factor)
        if self.num_experts < 1:
            raise ValueError(f"num_experts must be at least 1, but is {self.num_experts}")
        if self.score not in SCORES:
            raise ValueError(f"score must be one of {list(SCORES)}, but is {self.score!r}")
        if not isinstance(self.apply_router_weight_on_input, bool):
            raise ValueError(
                "apply_router_weight_on_input must be True or False, but is "
                f"{self.apply_router_weight_on_input!r}"
            )


def limit_capacity(
    indices: da.Array, topk_weights: da.Array, num_experts: int, capacity: Capacity
) -> da.Array:
    """Drop the slots that their experts have no room for.

    Parameters
    ----------
    indices : (n, k) Dask array of integers
        Experts; -1 stays -1.
    topk_weights : (n, k) Dask array of float32, row chunks as in `indices`
    num_experts : int
    capacity : Capacity

    Returns
    -------
    (n, k) Dask array of int32, row chunks as in `indices`
        `indices`, with -1 in the dropped slots.

    Notes
    -----
    Exact, and the same for any chunking of the rows. Lazy; row chunks may be unknown. Every chunk
    of the input is needed before the first chunk of the output is known. On a device, every step
    of a chunk waits for a few single numbers: the count of a mask, and the checks of `bincount`.

    Examples
    --------
    Three rows are routed to expert 0, which has room for ``ceil(1.0 * 4 * 1 / 2) = 2``:

    >>> import dask.array as da
    >>> from dask_ep.layers.capacity import Capacity, limit_capacity
    >>> indices = da.asarray([[0], [0], [1], [0]])
    >>> weights = da.asarray([[0.5], [0.9], [0.7], [0.8]], dtype="float32")
    >>> limit_capacity(indices, weights, 2, Capacity(1.0, drop="score")).compute().ravel()
    array([-1,  0,  1,  0], dtype=int32)
    >>> limit_capacity(indices, weights, 2, Capacity(1.0, drop="position")).compute().ravel()
    array([ 0,  0,  1, -1], dtype=int32)
    """
    refuse_masked(indices, "indices")
    refuse_masked(topk_weights, "topk_weights")
    indices, topk_weights = one_chunk_wide(indices), one_chunk_wide(topk_weights)
    room = _room(indices, num_experts, capacity.factor * indices.shape[1] / num_experts)
    if capacity.drop == "position":
        keys = da.map_blocks(_equal_keys, indices, dtype=np.uint32, meta=_meta(indices, 2, "u4"))
        return _keep(indices, keys, room)
    return _keep_best(indices, topk_weights, room)


def choose_rows(scores: da.Array, factor: float) -> da.Array:
    """Let each expert take its best rows.

    Parameters
    ----------
    scores : (n, E) Dask array of float32
    factor : float
        Each expert takes ``ceil(factor * n / E)`` rows.

    Returns
    -------
    (n, E) Dask array of int32, row chunks as in `scores`
        e in column e where expert e took the row, -1 elsewhere; `scores` are the top-k weights.

    Notes
    -----
    As for `limit_capacity`.

    Examples
    --------
    Each of two experts takes one of two rows, and both prefer the second:

    >>> import dask.array as da
    >>> choose_rows(da.asarray([[0.4, 0.6], [0.9, 0.7]], dtype="float32"), factor=1.0).compute()
    array([[-1, -1],
           [ 0,  1]], dtype=int32)
    """
    refuse_masked(scores, "scores")
    scores = one_chunk_wide(scores)
    E = scores.shape[1]
    indices = da.map_blocks(_every_expert, scores, dtype=np.int32, meta=_meta(scores, 2, "i4"))
    return _keep_best(indices, scores, _room(indices, E, factor / E))


# --- the steps as Dask arrays; s is 2: the digits found so far, and the slots still free ----------


def _keep_best(indices: da.Array, weights: da.Array, state: da.Array) -> da.Array:
    keys = da.map_blocks(_ordered_keys, weights, dtype=np.uint32, meta=_meta(weights, 2, "u4"))
    below = 32
    for bits in DIGITS:
        below -= bits
        counts = block_by_block(
            _count_digits, "ceb", indices, "ck", keys, "ck", state, "se",
            shift=below, bits=bits, new_axes={"b": 1 << bits}, adjust_chunks={"c": 1},
            dtype=np.int64, meta=_meta(indices, 3, "i8"),
        ).sum(axis=0)  # fmt: skip
        state = block_by_block(
            _next_digit, "se", counts, "eb", state, "se",
            dtype=np.int64, meta=_meta(indices, 2, "i8"),
        )  # fmt: skip
    return _keep(indices, keys, state)


def _keep(indices: da.Array, keys: da.Array, state: da.Array) -> da.Array:
    counts = block_by_block(
        _count_equals, "ce", indices, "ck", keys, "ck", state, "se",
        adjust_chunks={"c": 1}, dtype=np.int64, meta=_meta(indices, 2, "i8"),
    )  # fmt: skip
    before = counts.rechunk(-1).map_blocks(
        _sums_before, dtype=np.int64, meta=_meta(indices, 2, "i8")
    )
    return block_by_block(
        _keep_block, "ck", indices, "ck", keys, "ck", state, "se", before.rechunk((1, -1)), "ce",
        dtype=np.int32, meta=_meta(indices, 2, "i4"),
    )  # fmt: skip


def _room(indices: da.Array, num_experts: int, slots_per_row: float) -> da.Array:
    """The state (2, E) in which each expert has ceil(slots_per_row * n) free slots."""
    n = da.asarray(indices.shape[0])
    if math.isnan(indices.shape[0]):
        n = block_by_block(
            _count_rows, "c", indices, "ck", adjust_chunks={"c": 1},
            dtype=np.int64, meta=_meta(indices, 1, "i8"),
        ).sum()  # fmt: skip
    return block_by_block(
        _all_free, "se", n, "", num_experts=num_experts, slots_per_row=slots_per_row,
        xp_name=namespace(indices._meta).__name__,
        new_axes={"s": 2, "e": num_experts}, dtype=np.int64, meta=_meta(indices, 2, "i8"),
    )  # fmt: skip


def _meta(x: da.Array, ndim: int, dtype: str) -> Array:
    return namespace(x._meta).empty((0,) * ndim, dtype=dtype)


def _check_factor(factor: float) -> None:
    if not 0 < factor < math.inf:
        raise ValueError(f"factor must be a positive number, but is {factor}")


# --- the steps on one chunk ----------------------------------------------------------------------


def _all_free(n: Any, *, num_experts: int, slots_per_row: float, xp_name: str) -> Array:
    # A product n * k / E that is a whole number may be computed one bit too large.
    free = math.ceil(round(slots_per_row * int(n), 6))
    state = import_module(xp_name).zeros((2, num_experts), dtype=np.int64)
    state[1] = free
    return state


def _count_rows(indices: Array) -> Array:
    return namespace(indices).asarray([len(indices)])


def _equal_keys(indices: Array) -> Array:
    return namespace(indices).zeros(indices.shape, dtype=np.uint32)


def _every_expert(scores: Array) -> Array:
    xp = namespace(scores)
    return xp.broadcast_to(xp.arange(scores.shape[1], dtype=np.int32), scores.shape)


@UNDERFLOW_IS_ZERO
def _ordered_keys(weights: Array) -> Array:
    """Unsigned integers in the order of the floats; 0.0 and -0.0 are equal."""
    xp = namespace(weights)
    bits = (weights.astype(np.float32) + np.float32(0)).view(np.uint32)
    negative = bits >> 31 == 1
    return xp.where(negative, ~bits, bits | np.uint32(1 << 31))


def _count_digits(indices: Array, keys: Array, state: Array, *, shift: int, bits: int) -> Array:
    """Slots per expert and next digit, among those whose digits so far are the expert's."""
    xp = namespace(indices)
    found, E = state[0], state.shape[1]
    experts, keys = indices.reshape(-1), keys.reshape(-1).astype(np.int64)
    ours = (experts >= 0) & (keys >> (shift + bits) == found[experts])
    digits = keys[ours] >> shift & ((1 << bits) - 1)
    counts = xp.bincount((experts[ours].astype(np.int64) << bits) + digits, minlength=E << bits)
    return counts.reshape(1, E, 1 << bits)


def _next_digit(counts: Array, state: Array) -> Array:
    """Append to each expert's digits the one at which its free slots run out."""
    xp = namespace(counts)
    found, free = state
    base = counts.shape[1]
    from_here_up = xp.cumsum(counts[:, ::-1], axis=1)[:, ::-1]
    full = from_here_up >= free[:, None]
    # The largest digit at which it is full; 0 if all slots fit.
    digit = xp.where(full.any(axis=1), base - 1 - full[:, ::-1].argmax(axis=1), 0)
    experts = xp.arange(len(counts))
    above = from_here_up[experts, digit] - counts[experts, digit]
    return xp.stack([found * base + digit, free - above])


def _equals(indices: Array, keys: Array, state: Array) -> Array:
    """Whether a slot has exactly the smallest key that its expert takes."""
    return (indices >= 0) & (keys.astype(np.int64) == state[0][indices])


def _count_equals(indices: Array, keys: Array, state: Array) -> Array:
    xp = namespace(indices)
    experts = indices[_equals(indices, keys, state)]
    return xp.bincount(experts, minlength=state.shape[1])[None]


def _sums_before(counts: Array) -> Array:
    return namespace(counts).cumsum(counts, axis=0) - counts


def _keep_block(indices: Array, keys: Array, state: Array, before: Array) -> Array:
    xp = namespace(indices)
    found, free = state
    larger = (indices >= 0) & (keys.astype(np.int64) > found[indices])
    equal = _equals(indices, keys, state)
    experts = indices[equal]
    kept = larger
    kept[equal] = _place_in_expert(xp, experts, state.shape[1]) + before[0][experts] < free[experts]
    return xp.where(kept, indices, -1).astype(np.int32)


def _place_in_expert(xp: Any, experts: Array, num_experts: int) -> Array:
    """For each slot, how many slots before it have the same expert."""
    order = xp.argsort(experts, kind="stable")
    counts = xp.bincount(experts, minlength=num_experts)
    starts = xp.cumsum(counts) - counts
    place = xp.empty(len(experts), dtype=np.int64)
    place[order] = xp.arange(len(experts)) - starts[experts[order]]
    return place
