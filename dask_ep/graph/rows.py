"""How do arrays of any number of axes become rows, and back?

    [batch, sequence, d]  ── rows_of ──>  [n, d]  ── unflatten ──>  [batch, sequence, d]

Each chunk is reshaped separately; nothing is joined or rechunked along the rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import dask.array as da
import numpy as np
from dask.base import tokenize
from dask.highlevelgraph import HighLevelGraph
from dask.task_spec import Task, TaskRef

from dask_ep.arrays.checks import refuse_masked
from dask_ep.arrays.namespaces import Array, namespace
from dask_ep.graph.keys import step_name


def rows_of(x: da.Array) -> da.Array:
    """Return (..., d) as rows (n, d), one row chunk per chunk of the leading axes, in C order.

    Notes
    -----
    Chunks are reshaped separately and never joined. If an axis after the first is chunked, rows are
    in the order of the chunks, which `unflatten` undoes.
    """
    if x.numblocks[-1] > 1:
        x = x.rechunk({x.ndim - 1: -1})
    if x.ndim == 2:
        return x
    name = step_name("rows", tokenize(x))
    tasks, lengths = {}, []
    for c, block in enumerate(np.ndindex(*x.numblocks)):
        lengths.append(math.prod(x.chunks[axis][i] for axis, i in enumerate(block[:-1])))
        tasks[name, c, 0] = Task(
            (name, c, 0), _reshape, TaskRef((x.name, *block)), (-1, x.shape[-1])
        )
    meta = namespace(x._meta).empty((0, 0), dtype=x.dtype)
    return array_of(name, tasks, [x], (tuple(lengths), (x.shape[-1],)), meta)


def unflatten(rows: da.Array, like: da.Array) -> da.Array:
    """Undo `rows_of`: give rows the leading axes and chunks of `like`."""
    if like.ndim == 2:
        return rows
    name = step_name("unflatten", tokenize(rows, like.chunks))
    leading, width, tasks = like.chunks[:-1], rows.shape[1], {}
    for c, block in enumerate(np.ndindex(*map(len, leading))):
        lengths = [leading[axis][i] for axis, i in enumerate(block)]
        shape = [-1 if np.isnan(length) else length for length in lengths]
        key = (name, *block, 0)
        tasks[key] = Task(key, _reshape, TaskRef((rows.name, c, 0)), (*shape, width))
    meta = namespace(rows._meta).empty((0,) * like.ndim, dtype=rows.dtype)
    return array_of(name, tasks, [rows], (*leading, (width,)), meta)


def chunked_like(x: da.Array, hidden: da.Array, name: str) -> da.Array:
    """Give (..., k) the leading chunks of `hidden`."""
    refuse_masked(x, name)
    known = not any(math.isnan(n) for n in (*x.shape, *hidden.shape))
    if x.ndim != hidden.ndim or (known and x.shape[:-1] != hidden.shape[:-1]):
        raise ValueError(
            f"{name} must have the leading axes of the hidden states, {hidden.shape[:-1]}, but has "
            f"{x.shape[:-1]}"
        )
    return x.rechunk((*hidden.chunks[:-1], -1)) if known else x


def one_chunk_wide(x: da.Array) -> da.Array:
    return x if x.ndim < 2 or x.numblocks[1] == 1 else x.rechunk({1: -1})


def block_by_block(function: Callable[..., Array], out: str, *args: Any, **kwargs: Any) -> da.Array:
    """Like `dask.array.blockwise`, on arrays whose chunks already match.

    Notes
    -----
    When Dask aligns chunks, it broadcasts an axis of length 1: the chunks (0, 1) of a single row
    after an empty chunk would become (1,), and the row would be in both blocks.
    """
    return da.blockwise(function, out, *args, concatenate=True, align_arrays=False, **kwargs)


def array_of(
    name: str, tasks: Mapping[Any, Task], inputs: Sequence[Any], chunks: Any, meta: Array
) -> da.Array:
    """Return an array made by tasks, whose keys are its name and the indices of its chunks."""
    graph = HighLevelGraph.from_collections(name, tasks, dependencies=inputs)
    return da.Array(graph, name, chunks=chunks, meta=meta)


def first_rows(chunks: Sequence[float]) -> list[int | None]:
    """Return the index of each chunk's first row; None if lengths of earlier chunks are unknown.

    Examples
    --------
    >>> first_rows((3, 4, float("nan"), 2))
    [0, 3, 7, None]
    """
    firsts = np.cumsum([0, *chunks[:-1]]).tolist()
    return [None if math.isnan(first) else int(first) for first in firsts[: len(chunks)]]


def keys_of(x: da.Array) -> list[Any]:
    """Return the keys of row chunks of an array (n, ...) with one chunk along its other axes."""
    return [(x.name, c, *[0] * (x.ndim - 1)) for c in range(x.numblocks[0])]


def xp_name(x: da.Array) -> str:
    return namespace(x._meta).__name__


def _reshape(x: Array, shape: tuple[int, ...]) -> Array:
    return x.reshape(shape)
