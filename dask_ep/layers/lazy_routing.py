"""Which experts do the rows of a Dask array choose?

    rows (c)      the router's small arrays, in files or memory
      │               │
      v               v
    ep_route (c)   ep_router                 one task per chunk
      ├──> ep_indices (c)   [n, k]
      └──> ep_weights (c)   [n, k]           the result is two Dask arrays

The rules themselves are those of `routing.py` and `capacity.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from operator import itemgetter
from typing import Any, NamedTuple

import dask.array as da
import numpy as np
from dask.base import tokenize
from dask.task_spec import Task, TaskRef

from dask_ep.arrays.checks import is_float, place_of_row
from dask_ep.arrays.device import explain_chunk_memory
from dask_ep.arrays.namespaces import UNDERFLOW_IS_ZERO, Array, namespace
from dask_ep.errors import DeviceMemoryError, ReadError
from dask_ep.graph.keys import step_name
from dask_ep.graph.rows import array_of, block_by_block, first_rows, keys_of, xp_name
from dask_ep.kernel.device_kernel import INDEX_BYTES
from dask_ep.layers.capacity import Capacity, ExpertChoice, choose_rows, limit_capacity
from dask_ep.layers.routing import Router, all_scores, look_up, route, weigh_chosen
from dask_ep.storage.sources import Source

SCORE_BYTES = 32
"""Bytes of an expert while a row chooses: its logit, its score, and values derived of them."""


class SmallArray(NamedTuple):
    """A router's array, not read yet."""

    source: Source
    shape: tuple[int, ...]

    @UNDERFLOW_IS_ZERO
    def read(self) -> np.ndarray:
        """Read it: floats as float32, integers unchanged."""
        array = self.source.read(0, self.source.shape[0]).reshape(self.shape)
        if not is_float(array.dtype):
            return array
        array = array.astype(np.float32)
        if np.isnan(array).any():
            raise ReadError(f"{self.source.name} holds NaN")
        return array


def route_rows(
    rows: da.Array,
    router: Router | ExpertChoice,
    arrays: dict[str, SmallArray],
    *,
    token_ids: da.Array | None = None,
    capacity: Capacity | None = None,
) -> tuple[da.Array, da.Array]:
    """Route rows (n, d) lazily: return indices (n, k) int32 and top-k weights (n, k) float32.

    Parameters
    ----------
    rows : (n, d) Dask array, one chunk along d
    router : Router or ExpertChoice
    arrays : "weight", "bias", "selection_bias" and "table", those that exist
    token_ids : (n, 1) Dask array of integers in the row chunks of `rows`, with a table
    capacity : Capacity, optional

    Notes
    -----
    3 C + 1 tasks for C chunks; capacity and expert choice add some of their own.
    """
    token = tokenize(rows, token_ids, arrays, router)
    if isinstance(router, ExpertChoice):
        scores = _scores(token, rows, router, arrays)
        return choose_rows(scores, router.factor), scores
    indices, weights = _route_chunks(token, rows, router, arrays, token_ids)
    if capacity is not None:
        indices = limit_capacity(indices, weights, router.num_experts, capacity)
    return indices, weights


def count_rows(indices: da.Array, num_experts: int) -> da.Array:
    """Count the slots of each expert in a routing (n, k): a lazy (E,) Dask array of int64."""
    meta = namespace(indices._meta).empty((0, 0), dtype=np.int64)
    counts = block_by_block(
        _count_chunk, "ce", indices, "ck", num_experts=num_experts, new_axes={"e": num_experts},
        adjust_chunks={"c": 1}, dtype=np.int64, meta=meta,
    )  # fmt: skip
    return counts.sum(axis=0)


def _route_chunks(
    token: str,
    rows: da.Array,
    router: Router,
    arrays: dict[str, SmallArray],
    token_ids: da.Array | None,
) -> tuple[da.Array, da.Array]:
    both, loaded = step_name("route", token), step_name("router", token)
    tasks: dict[Any, Task] = {loaded: Task(loaded, read_all, arrays, xp_name(rows))}
    ids = None if token_ids is None else keys_of(token_ids)
    starts = first_rows(rows.chunks[0])
    for c, key in enumerate(keys_of(rows)):
        chunk_ids = None if ids is None else TaskRef(ids[c])
        tasks[both, c] = Task(
            (both, c), _route_chunk, TaskRef(key), TaskRef(loaded), router, c, starts[c], chunk_ids
        )
    inputs = [rows] if token_ids is None else [rows, token_ids]
    routed = array_of(both, tasks, inputs, ((1,) * len(starts),), np.empty(0, object))
    k = arrays["table"].shape[1] if "table" in arrays else router.slots
    parts = []
    for which, (word, dtype) in enumerate((("indices", np.int32), ("weights", np.float32))):
        name = step_name(word, token)
        taken = {
            (name, c, 0): Task((name, c, 0), itemgetter(which), TaskRef((both, c)))
            for c in range(len(starts))
        }
        meta = namespace(rows._meta).empty((0, 0), dtype=dtype)
        parts.append(array_of(name, taken, [routed], (rows.chunks[0], (k,)), meta))
    return parts[0], parts[1]


def _scores(
    token: str, rows: da.Array, router: ExpertChoice, arrays: dict[str, SmallArray]
) -> da.Array:
    name, loaded = step_name("scores", token), step_name("router", token)
    tasks: dict[Any, Task] = {loaded: Task(loaded, read_all, arrays, xp_name(rows))}
    starts = first_rows(rows.chunks[0])
    for c, key in enumerate(keys_of(rows)):
        tasks[name, c, 0] = Task(
            (name, c, 0), _score_chunk, TaskRef(key), TaskRef(loaded), router.score, c, starts[c]
        )
    meta = namespace(rows._meta).empty((0, 0), dtype=np.float32)
    return array_of(name, tasks, [rows], (rows.chunks[0], (router.num_experts,)), meta)


# --- the tasks -----------------------------------------------------------------------------------


def read_all(arrays: dict[str, SmallArray], xp_name: str) -> dict[str, Array]:
    xp = import_module(xp_name)
    read = {name: array.read() for name, array in arrays.items()}
    if (scale := read.pop("input_scale", None)) is not None:
        read["weight"] = read["weight"] * scale
    if (scale := read.get("per_expert_scale")) is not None:
        read["per_expert_scale"] = np.broadcast_to(scale, len(read["weight"]))
    return {name: xp.asarray(array) for name, array in read.items()}


def _route_chunk(
    hidden: Array,
    arrays: dict[str, Array],
    router: Router,
    chunk: int,
    first_row: int | None = None,
    token_ids: Array | None = None,
) -> tuple[Array, Array]:
    xp = namespace(hidden)
    with while_routing(hidden, router.num_experts, router.slots, chunk, first_row):
        if token_ids is None:
            names = ("bias", "selection_bias", "per_expert_scale")
            given = {name: arrays[name] for name in names if name in arrays}
            return route(hidden, router, arrays["weight"], **given)
        indices = look_up(token_ids.reshape(-1), arrays["table"])
        if "weight" not in arrays:
            return indices, xp.ones(indices.shape, dtype=np.float32)
        weight = arrays["weight"]
        return indices, weigh_chosen(hidden, indices, router, weight, bias=arrays.get("bias"))


def _score_chunk(
    hidden: Array, arrays: dict[str, Array], score: str, chunk: int, first_row: int | None
) -> Array:
    weight = arrays["weight"]
    with while_routing(hidden, weight.shape[0], 0, chunk, first_row):
        return all_scores(hidden, score, weight, bias=arrays.get("bias"))


@contextmanager
def while_routing(
    hidden: Array, num_experts: int, k: int, chunk: int, first_row: int | None
) -> Iterator[None]:
    """Add to an error which chunk was routed, and what it needs if the device ran out of memory."""
    row_bytes = 8 * hidden.shape[1] + SCORE_BYTES * num_experts + INDEX_BYTES * k
    try:
        with explain_chunk_memory(hidden, row_bytes):
            yield
    except DeviceMemoryError as error:
        raise DeviceMemoryError(f"routing of token chunk {chunk}: {error}") from error
    except ValueError as error:
        place = place_of_row(f"routing of token chunk {chunk}", error, first_row)
        raise ValueError(f"{place}: {error}") from error


def _count_chunk(indices: Array, *, num_experts: int) -> Array:
    xp = namespace(indices)
    return xp.bincount(indices[indices >= 0], minlength=num_experts)[None].astype(np.int64)
