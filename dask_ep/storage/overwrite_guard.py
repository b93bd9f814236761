"""Would an output replace a file that its array is read from?

What an output replaces is removed when the output is complete; the array's inputs must not be.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from functools import partial
from types import FunctionType
from typing import Any

import dask.array as da
import numpy as np
from dask.blockwise import Blockwise, BlockwiseDepDict
from dask.task_spec import DataNode, Task, TaskRef

from dask_ep.storage.fingerprint import find_sources
from dask_ep.storage.memmaps import mapped_file
from dask_ep.storage.output import progress_directory
from dask_ep.storage.zarr_layout import local_directory

IN_TASKS = (int, float, complex, slice, TaskRef, np.generic, np.dtype, type(None))
"""Types of most arguments of tasks; none of them is read from a file when the task runs."""


def refuse_to_replace_inputs(path: str, y: da.Array | None, inputs: Iterable[Any]) -> None:
    """Raise if an output would replace one of its inputs, or contain one, or be inside one.

    Parameters
    ----------
    path : of the output
    y : array to write; None if `inputs` are all that it is read from
    inputs : declared inputs, as in `dask_ep.storage.storage.store`

    Raises
    ------
    ValueError
        The message names the file.

    Notes
    -----
    Inputs are sources, experts and layers, memory maps and their views, Zarr arrays, and paths,
    among the arguments of tasks and the attributes of their functions; files that a function opens
    by a name that it knows itself are not found. The tasks of `y` are searched only if something
    would be replaced.
    """
    places = {source.path for given in inputs for source in find_sources(given)}
    taken = [path, progress_directory(path)]
    if y is not None and any(map(os.path.lexists, taken)):
        places |= _places_read(y)
    for place in filter(None, places):
        source = os.path.realpath(place)
        for one in map(os.path.realpath, taken):
            if os.path.commonpath([source, one]) in (source, one):
                raise ValueError(f"the output {path} would replace its own input {source}")


def _places_read(y: da.Array) -> set[str | None]:
    """Return the local files and directories that the tasks of an array read."""
    zarr_arrays = sys.modules["zarr"].Array if "zarr" in sys.modules else ()
    places: set[str | None] = set()
    seen: set[int] = set()
    left: list[Any] = []
    for layer in y.dask.layers.values():
        if layer.is_materialized():
            left.extend(layer.values())
        elif isinstance(layer, Blockwise):
            left += [layer.task, layer.indices, layer.io_deps]
    while left:
        value = left.pop()
        if isinstance(value, IN_TASKS) or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Task):
            left += [value.func, value.args, value.kwargs]
        elif isinstance(value, (list, tuple, set, frozenset)):
            left.extend(value)
        elif isinstance(value, Mapping):
            left.extend(value.values())
        elif isinstance(value, partial):
            left += [value.func, value.args, value.keywords]
        elif isinstance(value, FunctionType):
            left += [cell.cell_contents for cell in value.__closure__ or ()]
        elif isinstance(value, DataNode):
            left.append(value.value)
        elif isinstance(value, BlockwiseDepDict):
            left.append(value.mapping)
        elif isinstance(value, (str, os.PathLike)):
            path = os.fspath(value)
            if isinstance(path, str) and path.endswith((".npy", ".zarr", ".safetensors")):
                places |= {path} if os.path.lexists(path) else set()
        elif isinstance(value, np.ndarray):
            places.add(mapped_file(value))
        elif isinstance(value, zarr_arrays):
            places.add(local_directory(value))
        else:
            places |= {source.path for source in find_sources(value)}
    return places
