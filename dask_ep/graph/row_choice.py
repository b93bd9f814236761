"""Which further rows go through an expert, in addition to those routed to it?

    routing [n, k] ──> [n, k + B]    the slots of a router, then B experts that it did not choose

Statistics of cold experts need more rows than a router sends them. The slot distinguishes added
rows from routed ones.
"""

from __future__ import annotations

from typing import Any

import dask.array as da
import numpy as np
from dask.base import tokenize
from dask.task_spec import Task, TaskRef

from dask_ep.arrays.checks import check_indices
from dask_ep.graph.keys import step_name
from dask_ep.graph.rows import array_of, first_rows, keys_of
from dask_ep.kernel.error_context import error_context

_MIX = tuple(map(np.uint64, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)))
"""Constants of splitmix64 (Steele et al., "Fast Splittable Pseudorandom Number Generators")."""


def choose_slots(
    routing: da.Array, num_experts: int, block: range, others: float = 0.0, seed: int = 0
) -> da.Array:
    """Keep the slots of some experts, numbered from 0, and add slots that no router chose.

    Parameters
    ----------
    routing : (n, k) or (n,) lazy array
    num_experts : E
    block : the experts to keep; the slots of all others become -1
    others : share of the other rows that each of these experts gets as well; the choice depends
        on the index of the row, the expert and the seed alone
    seed : seed of that choice

    Returns
    -------
    (n, k) or, with others, (n, k + len(block)) lazy array

    Raises
    ------
    ValueError
        If the lengths of the chunks are not known, and only some others are to be chosen.
    """
    if block == range(num_experts) and not others:
        return routing
    starts = first_rows(routing.chunks[0])
    if None in starts and 0 < others < 1:
        raise ValueError(
            "to choose a share of the rows, the lengths of all row chunks must be known; call "
            "compute_chunk_sizes() first, or choose all rows"
        )
    name = step_name("choose", tokenize(routing, num_experts, block, others, seed))
    tasks: dict[Any, Task] = {}
    flat = routing.ndim == 1 and not others
    for c, routing_key in enumerate(keys_of(routing)):
        key = (name, c) if flat else (name, c, 0)
        tasks[key] = Task(
            key, _choose, TaskRef(routing_key), num_experts, block, others, seed, c, starts[c]
        )
    k = 1 if routing.ndim == 1 else routing.shape[1]
    chunks = (routing.chunks[0],) if flat else (routing.chunks[0], (k + len(block) * bool(others),))
    meta = np.empty((0,) * len(chunks), np.int32)
    return array_of(name, tasks, [routing], chunks, meta)


def with_weights_of_others(topk_weights: da.Array | None, added: int) -> da.Array | None:
    """Give the added slots the weight 1."""
    if topk_weights is None or not added:
        return topk_weights
    weights = topk_weights if topk_weights.ndim == 2 else topk_weights[:, None]
    return da.map_blocks(
        _add_ones, weights, added, chunks=(weights.chunks[0], (weights.shape[1] + added,)),
        dtype=weights.dtype, meta=weights._meta,
    )  # fmt: skip


def _choose(
    routing: np.ndarray,
    num_experts: int,
    block: range,
    others: float,
    seed: int,
    chunk: int,
    first_row: int | None,
) -> np.ndarray:
    with error_context(f"routing of token chunk {chunk}", first_row):
        check_indices(routing, num_experts)
    ours = (routing >= block.start) & (routing < block.stop)
    local = np.where(ours, routing.astype(np.int32) - np.int32(block.start), np.int32(-1))
    if not others:
        return local
    local = local if local.ndim == 2 else local[:, None]
    n, count = len(local), len(block)
    free = np.ones((n, count + 1), bool)  # the last column, [-1], is for experts not in the block
    np.put_along_axis(free, local.astype(np.intp), False, axis=1)
    free = free[:, :count]
    if others < 1:
        assert first_row is not None  # `choose_slots` has refused it
        free &= _uniform(first_row, n, block, seed) < others
    added = np.where(free, np.arange(count, dtype=np.int32), np.int32(-1))
    return np.concatenate([local, added], axis=1)


def _uniform(first_row: int, n: int, block: range, seed: int) -> np.ndarray:
    """(n, B) numbers in [0, 1), each a function of its row, its expert and the seed."""
    rows = np.arange(first_row, first_row + n, dtype=np.uint64)[:, None]
    experts = np.arange(block.start, block.stop, dtype=np.uint64)
    bits = _mixed(_mixed(_mixed(np.full(1, seed, np.uint64)) + rows) + experts)
    return (bits >> np.uint64(11)) * 2.0**-53


def _mixed(bits: np.ndarray) -> np.ndarray:
    """Return splitmix64's next number: each bit depends on all bits of `state`."""
    bits = bits + _MIX[0]
    bits = (bits ^ (bits >> np.uint64(30))) * _MIX[1]
    bits = (bits ^ (bits >> np.uint64(27))) * _MIX[2]
    return bits ^ (bits >> np.uint64(31))


def _add_ones(weights: np.ndarray, added: int) -> np.ndarray:
    return np.concatenate([weights, np.ones((len(weights), added), weights.dtype)], axis=1)
