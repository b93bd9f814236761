"""Which tasks run the steps before and after the experts?

    rows (c) ──> ep_enter (c) ──> the experts' own tasks ──> ep_layer (c)
                     ^                                           ^
                 ep_before   read once on each worker        ep_shared

The steps themselves are in `row_steps`.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import dask.array as da
import numpy as np
from dask.base import tokenize
from dask.task_spec import Task, TaskRef

from dask_ep.arrays.checks import computing_dtype, raise_bad_index
from dask_ep.arrays.namespaces import Array, namespace
from dask_ep.graph.keys import step_name
from dask_ep.graph.rows import array_of, keys_of, xp_name
from dask_ep.layers.row_steps import Loaded, Rest, Steps, enter, finish, load_rest, load_steps


def enter_rows(rows: da.Array, before: Steps, width: int | None) -> da.Array:
    """Apply steps to rows (n, d): (n, width), lazy; `rows` themselves without steps."""
    if not before:
        return rows
    token = tokenize(rows, before)
    name, loaded = step_name("enter", token), step_name("before", token)
    dtype = computing_dtype(rows.dtype)
    tasks: dict[Any, Task] = {loaded: Task(loaded, _load_before, before, xp_name(rows), dtype)}
    for c, key in enumerate(keys_of(rows)):
        tasks[name, c, 0] = Task((name, c, 0), enter, TaskRef(key), TaskRef(loaded))
    return array_of(name, tasks, [rows], (rows.chunks[0], (width,)), rows._meta)


def finish_rows(
    rows: da.Array,
    routed: da.Array,
    rest: Rest,
    chosen: list[da.Array],
    d_out: int | None,
) -> da.Array:
    """Apply the steps after the experts' answers: (n, d_out), lazy.

    `chosen` are indices and weights, if `rest` needs them.
    """
    arrays = [rows, routed, *chosen]
    token = tokenize(*arrays, rest)
    name, loaded = step_name("layer", token), step_name("shared", token)
    rounds = rest.shared is not None and rest.shared.precision == "bfloat16"
    dtype = computing_dtype(rows.dtype, xp_name(rows) != "numpy" and rounds)
    tasks: dict[Any, Task] = {loaded: Task(loaded, load_rest, rest, xp_name(rows), dtype)}
    for c, keys in enumerate(zip(*map(keys_of, arrays), strict=True)):
        row, y, *of_row = map(TaskRef, keys)
        tasks[name, c, 0] = Task((name, c, 0), finish, row, y, TaskRef(loaded), c, *of_row)
    width = routed.shape[1] if d_out is None else d_out
    return array_of(name, tasks, arrays, (rows.chunks[0], (width,)), rows._meta)


def experts_alone(indices: da.Array, num_experts: int, known: int) -> da.Array:
    """Indices (n, k) with -1 for those from `num_experts` on; from `known` on they are errors."""
    return da.map_blocks(
        _below, indices, num_experts=num_experts, known=known, dtype=indices.dtype,
        meta=indices._meta,
    )  # fmt: skip


# --- the tasks -----------------------------------------------------------------------------------


def _load_before(before: Steps, xp_name: str, dtype: np.dtype) -> Loaded:
    return load_steps(before, import_module(xp_name), dtype)


def _below(indices: Array, *, num_experts: int, known: int) -> Array:
    if indices.size and int(indices.max()) >= known:
        raise_bad_index(indices, known)
    return namespace(indices).where(indices >= num_experts, indices.dtype.type(-1), indices)
