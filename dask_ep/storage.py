"""How do token rows come in, and outputs go out so that a stopped run can go on?

    open_tokens(path)     a lazy array: one task per row chunk reads it from its place
    store(y, path)        one task per row block writes it to its place (see `output`)

Rows are never joined: what is in memory at once is what Dask computes at once.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import uuid
import warnings
from collections.abc import Iterable, Mapping
from importlib import import_module
from math import prod
from numbers import Integral
from operator import index
from typing import Any

import dask.array as da
import numpy as np
from dask.base import tokenize
from dask.blockwise import Blockwise, BlockwiseDepDict, blockwise
from dask.highlevelgraph import HighLevelGraph
from dask.task_spec import DataNode, Task, TaskRef

from dask_ep import journal
from dask_ep.arrays import Array
from dask_ep.checks import check_byte_order, refuse_masked
from dask_ep.device import pinned_empty, telling_memory, upload
from dask_ep.experts import Experts
from dask_ep.output import Output, free_bytes, progress_directory
from dask_ep.remote import is_remote
from dask_ep.sources import ReadError, Source, ZarrSource, open_source, refuse_missing
from dask_ep.writers import Writer, make_writer, shorten
from dask_ep.zarr_layout import local_directory

CHUNK_BYTES = 32 << 20
"""Bytes of a token chunk unless the user says otherwise: stored chunks are merged up to this."""

KINDS = (".zarr", ".npy", ".safetensors")

IN_TASKS = (str, int, float, slice, TaskRef, np.ndarray, type(None))
"""What most arguments of tasks are, none of which is read from a file when the task runs."""


def open_tokens(
    path: Any,
    chunks: int | tuple[int, ...] | None = None,
    name: str | None = None,
    *,
    like: da.Array | None = None,
    dtype: Any = None,
    missing: str | None = None,
    xp: str = "numpy",
) -> da.Array:
    """Open token rows, routing or top-k weights as a lazy array, chunked along the rows.

    Parameters
    ----------
    path : whatever `open_source` takes
    chunks : rows per chunk, or the rows of every chunk. By default whole stored chunks, as many as
        make about 32 MiB
    name : for messages; the file's name without it
    like : array whose row chunks to take, so that routing is cut as its tokens are
    dtype : see `open_source`
    missing : {"error", "fill"}, optional
        Zarr chunks that were never written are an error, found here already where the array is
        local: they look just like lost ones. "fill" takes Zarr's fill value for their rows. Without
        it, as a `ZarrSource` that is given says.
    xp : {"numpy", "cupy"}
        Whose arrays the chunks are. "cupy": read into pinned memory, and on their way to the device
        in the same task.

    Returns
    -------
    array of (N, ...), one chunk wide. The name follows from the place, size and time of change of
    the files, so that the same data has the same name.

    Raises
    ------
    ReadError
        If there is nothing there or chunks are missing; when computed, if a chunk cannot be read
        whole, naming the block.
    ValueError
        If the chunks do not add up to the rows.

    Notes
    -----
    One task per chunk, with one read per stored chunk, straight into the array. Tasks are marked as
    data producers: the distributed scheduler starts no more of them than workers keep up with.

    Examples
    --------
    >>> import numpy as np
    >>> open_tokens(np.ones((10, 4)), chunks=4).chunks
    ((4, 4, 2), (4,))
    """
    source = open_source(path, name, dtype=dtype, missing=missing or "error")
    if missing is not None and isinstance(source, ZarrSource) and source.missing != missing:
        source = ZarrSource(source.array, source.name, source.dtype, missing)
    if source.ndim == 0:
        raise ValueError(f"{source.name} is a single number and has no rows")
    refuse_missing(source)
    rows = _row_chunks(source, chunks, like)
    key = f"ep_read-{tokenize(source, rows, xp)}"
    rest, spans, start = (0,) * (source.ndim - 1), {}, 0
    for block, count in enumerate(rows):
        spans[block, *rest] = (block, start, start + count)
        start += count
    axes = tuple(range(source.ndim))
    layer = blockwise(
        _read_block, key, axes, source, None,
        BlockwiseDepDict(spans, numblocks=(len(rows), *(1 for _ in rest))), axes, xp, None,
        numblocks={}, _data_producer=True,
    )  # fmt: skip
    graph = HighLevelGraph.from_collections(key, layer)
    meta = import_module(xp).empty((0,) * source.ndim, dtype=source.dtype)
    return da.Array(graph, key, (rows, *((n,) for n in source.shape[1:])), meta=meta)


def store(
    y: da.Array,
    path: str | os.PathLike,
    *,
    inputs: Mapping[str, Any] | Iterable[Any] = (),
    settings: Mapping[str, Any] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    compute: bool = True,
    compressors: Any = None,
    stored_rows: int | None = None,
    sync: bool = False,
    **kwargs: Any,
) -> Output:
    """Write an array to a file, block by block, such that a stopped run can go on.

    Parameters
    ----------
    y : (N, ...) array, chunked along the rows only, with known chunks
    path : ``.zarr`` (Zarr 3, a chunk per block), ``.npy`` or ``.safetensors`` (one tensor,
        "output"); on a file system that all workers share
    inputs : what `y` is made of, by name or in a row: whatever `open_source` takes, anything with a
        ``fingerprint()``, or a fingerprint itself (a mapping)
    settings : JSON-able mapping of what else the result depends on
    resume : go on with what an earlier run has left, from the start if there is nothing. Whether
        the values are the same is told by `inputs` and `settings` alone
    overwrite : remove what an earlier run has left, finished or not
    compute : whether to write now; if not, see `Output`
    compressors : for Zarr, as `zarr.create_array` takes them; by default none
    stored_rows : rows of a Zarr chunk, of which every block but the last must have a multiple; by
        default a block is a chunk
    sync : make each block outlive a power loss before it counts as done
    **kwargs : for the scheduler, as `dask.compute` takes them

    Returns
    -------
    Output

    Raises
    ------
    FileExistsError
        If there is an output, or part of one, and neither `resume` nor `overwrite` is set.
    ValueError
        If the array cannot be written so, or would replace what it is read from; or if, on
        resuming, the inputs, the settings, or the shape, dtype or row blocks of the array are not
        those of the run that began it: the message says which, and how they differ.
    OutputInUse
        If another run is writing this output.
    OSError
        If a block cannot be written. A full disk is found at the start where possible.

    Warns
    -----
    UserWarning
        If an array of another name is to resume, without inputs and settings that tell whether it
        is the same.

    Notes
    -----
    A block counts as done when its data was written and, after that, its line in the journal.
    Resuming computes exactly the blocks that do not count, and nothing that only the others need.

    - After the process was killed (``kill -9`` too), every block that counts is good.
    - After a power loss or a crash of the system, that holds with ``sync=True``. Without it the
      system may have kept lines and lost data that it had not put on the disk yet: overwrite then.
    - The rename to `path` comes last, so what is at `path` is complete.

    Examples
    --------
    >>> import os, tempfile
    >>> import dask.array as da
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "y.npy")
    ...     output = store(da.ones((6, 2), chunks=(4, 2)), path, scheduler="sync")
    ...     output.rows, open_tokens(path).sum().compute(scheduler="sync").item()
    ((4, 2), 12.0)
    """
    if is_remote(path):
        raise ValueError(
            f"an output is written to a file system that is mounted, and {path} is an address; "
            "write elsewhere, and copy it"
        )
    path = os.path.abspath(os.fspath(path))
    _check(y, path, os.path.splitext(path)[1], compressors)
    wanted = _make_manifest(y, path, inputs, settings)
    if stored_rows is not None:
        wanted["stored_rows"] = index(stored_rows)
        _check_stored_rows(y, wanted["stored_rows"])
    if os.path.lexists(path):
        for place in _places_read(y):
            _refuse_to_replace(path, place)
    directory = progress_directory(path)
    check_existing(path, resume, overwrite)
    _make_directory(directory, path)
    journal.acquire(directory)
    try:
        check_existing(path, resume, overwrite)  # again, now that nobody else can begin
        manifest = None if overwrite else journal.read_manifest(directory)
        if manifest is None:
            writer, manifest = _begin(y, path, wanted, compressors)
        else:
            writer, manifest = _continue(y, path, manifest, wanted, compressors)
        output = Output(y, path, writer, manifest, sync)
    except BaseException:
        journal.release(directory)
        raise
    if compute:
        with output:
            output.compute(**kwargs)
    return output


def _read_block(source: Source, span: tuple[int, int, int], xp: str) -> Array:
    block, start, stop = span
    try:
        if xp == "numpy":
            return source.read(start, stop)
        return _read_to_device(source, start, stop, import_module(xp))
    except ReadError as error:
        raise ReadError(f"block {block} of {source.name} could not be read: {error}") from error


def _read_to_device(source: Source, start: int, stop: int, xp: Any) -> Array:
    pinned = pinned_empty(xp, (stop - start, *source.shape[1:]), source.dtype)
    with telling_memory(xp, pinned.nbytes, stop - start):
        return upload(xp, source.read(start, stop, out=pinned))


def _row_chunks(
    source: Source, chunks: int | tuple[int, ...] | None, like: da.Array | None
) -> tuple[int, ...]:
    """Decide how many rows each chunk has."""
    length = source.shape[0]
    if like is not None:
        if chunks is not None:
            raise ValueError("chunks and like both say how the rows are cut; give one of them")
        if len(like) != length:
            raise ValueError(
                f"{source.name} must have as many rows as the array that it is cut like: "
                f"{len(like)}, not {length}"
            )
        return like.chunks[0]
    if chunks is None:
        stored = source.chunk_rows or 1
        row_bytes = max(1, prod(source.shape[1:]) * source.dtype.itemsize)
        chunks = max(1, CHUNK_BYTES // (stored * row_bytes)) * stored
    if isinstance(chunks, str):
        raise TypeError(
            f"chunks of {source.name} must be a number of rows or one for each chunk, not "
            f"{chunks!r}; without it they are of about {CHUNK_BYTES >> 20} MiB"
        )
    if isinstance(chunks, Integral):
        chunks = int(chunks)
        if chunks < 1:
            raise ValueError(f"a chunk of {source.name} must have 1 row or more, not {chunks}")
        whole, rest = divmod(length, chunks)
        return (chunks,) * whole + ((rest,) if rest or not whole else ())
    if sum(chunks) != length or min(chunks, default=0) < 0:
        raise ValueError(
            f"the row chunks of {source.name} must add up to its {length} rows, not {sum(chunks)}"
        )
    return tuple(chunks)


def _check(y: da.Array, path: str, kind: str, compressors: Any) -> None:
    """Refuse what cannot be written, before anything is touched."""
    if kind not in KINDS:
        raise ValueError(f"an output ends in {', '.join(KINDS)}, which {path} does not")
    if y.ndim == 0:
        raise ValueError("an output has rows; a single number has none")
    if any(np.isnan(n) for n in y.chunks[0]):
        raise ValueError(
            "an output is written to known places, but the row chunks are unknown (nan): call "
            "y.compute_chunk_sizes() first"
        )
    if any(len(chunks) != 1 for chunks in y.chunks[1:]):
        raise ValueError(
            f"an output is written in whole rows, but its chunks are {y.numblocks} along the axes; "
            f"use y.rechunk({dict.fromkeys(range(1, y.ndim), -1)})"
        )
    refuse_masked(y, "an output")
    check_byte_order(y.dtype, "an output")
    make_writer(kind, path, y.shape, y.dtype, y.chunks[0], compressors)


def _make_manifest(
    y: da.Array, path: str, inputs: Any, settings: Mapping[str, Any] | None
) -> dict[str, Any]:
    named = inputs.items() if isinstance(inputs, Mapping) else ((None, obj) for obj in inputs)
    fingerprints: dict[str, Any] = {}
    for name, obj in named:
        if not isinstance(obj, Mapping):
            obj = obj if hasattr(obj, "fingerprint") else open_source(obj)
            _refuse_to_replace(path, getattr(obj, "path", None))
            obj = obj.fingerprint()
        name = obj.get("name", "input") if name is None else name
        if name in fingerprints:
            raise ValueError(f"two inputs have the name {name!r}; give them as a mapping by name")
        fingerprints[name] = obj
    manifest = {
        "format": journal.FORMAT,
        "shape": [int(length) for length in y.shape],
        "dtype": y.dtype.name,
        "rows": [int(count) for count in y.chunks[0]],
        "array": y.name,
        "inputs": fingerprints,
        "settings": dict(settings or {}),
    }
    try:
        return json.loads(json.dumps(manifest))
    except TypeError as error:
        raise TypeError(f"settings and fingerprints must be JSON-able: {error}") from error


def _places_read(y: da.Array) -> set[str]:
    """Local files and directories that the tasks of an array read: token rows, experts, Zarr."""
    zarr_arrays = sys.modules["zarr"].Array if "zarr" in sys.modules else ()
    places: set[str | None] = set()
    seen: set[int] = set()
    left: list[Any] = []
    for layer in y.dask.layers.values():
        if layer.is_materialized():
            left.extend(layer.values())
        elif isinstance(layer, Blockwise):
            left += [layer.task, layer.indices]
    while left:
        value = left.pop()
        if isinstance(value, IN_TASKS) or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Task):
            left += [value.args, value.kwargs]
        elif isinstance(value, (list, tuple)):
            left.extend(value)
        elif isinstance(value, Mapping):
            left.extend(value.values())
        elif isinstance(value, DataNode):
            left.append(value.value)
        elif isinstance(value, Source):
            places.add(value.path)
        elif isinstance(value, Experts):
            places |= {source.path for source in value.sources()}
        elif isinstance(value, zarr_arrays):
            places.add(local_directory(value))
    return places - {None}


def _refuse_to_replace(path: str, source: str | None) -> None:
    if source is not None:
        source, path = os.path.realpath(source), os.path.realpath(path)
        if os.path.commonpath([source, path]) in (source, path):
            raise ValueError(f"the output {path} would replace its own input {source}")


def check_existing(path: str, resume: bool, overwrite: bool) -> None:
    """Refuse an output that is there, unless it is to be resumed or overwritten."""
    if resume and overwrite:
        raise ValueError("resume goes on and overwrite starts again; give one of them")
    began = journal.has_manifest(progress_directory(path))
    there = os.path.lexists(path)
    if there and resume and not began:
        raise FileExistsError(
            f"{path} exists, but {progress_directory(path)} does not say what it was made of, so "
            "it cannot be resumed; overwrite it, or write elsewhere"
        )
    if (there or began) and not (resume or overwrite):
        what = "exists" if there else "was begun by an earlier run"
        raise FileExistsError(
            f"{path} {what}; resume to go on with it, overwrite to start again, or write elsewhere"
        )
    if there and overwrite and not _is_replaceable(path):
        raise FileExistsError(
            f"{path} is a directory but no Zarr array, and is not removed; write elsewhere"
        )


def _is_replaceable(path: str) -> bool:
    if not os.path.isdir(path):
        return True
    try:
        with open(os.path.join(path, "zarr.json")) as file:
            return json.load(file)["node_type"] == "array"
    except (OSError, ValueError, KeyError):
        return os.path.exists(os.path.join(path, ".zarray"))


def _make_directory(directory: str, path: str) -> None:
    try:
        os.makedirs(directory, exist_ok=True)
        if os.access(directory, os.W_OK | os.X_OK):
            return
        why = "cannot be written to"
    except OSError as error:
        why = f"cannot be made a directory ({error.strerror})"
    raise OSError(
        f"{directory} {why}, and the output {path} is written there first; write elsewhere"
    )


def _begin(
    y: da.Array, path: str, wanted: dict[str, Any], compressors: Any
) -> tuple[Writer, dict[str, Any]]:
    """Remove what is there, and make an output without rows."""
    directory = progress_directory(path)
    manifest = wanted | {"run": uuid.uuid4().hex[:12], "complete": False}
    writer = _open_writer(y, path, manifest, compressors)
    try:
        writer.create()  # which may refuse what it is given, when nothing is lost yet
    except BaseException:
        _remove(writer.path)
        raise
    _remove(path)
    # The manifest goes first: without it, whatever else is left counts for nothing.
    for name in sorted(os.listdir(directory), key=lambda name: name != "manifest.json"):
        if name not in ("lock", os.path.basename(writer.path)):
            _remove(os.path.join(directory, name))
    if compressors is None:
        _check_space(path, y, set())
    journal.write_manifest(directory, manifest)
    return writer, manifest


def _continue(
    y: da.Array, path: str, manifest: dict[str, Any], wanted: dict[str, Any], compressors: Any
) -> tuple[Writer, dict[str, Any]]:
    """Take up what an earlier run has left, if it was the same run."""
    differences = journal.describe_differences(manifest, wanted)
    if differences:
        raise ValueError(
            f"{path} was begun from something else, and cannot be resumed: "
            f"{'; '.join(differences)}. Overwrite it, or write elsewhere"
        )
    directory = progress_directory(path)
    writer = _open_writer(y, path, manifest, compressors)
    for name in os.listdir(directory):  # of a run that was stopped as it began to overwrite
        if name.startswith("partial-") and name != os.path.basename(writer.path):
            _remove(os.path.join(directory, name))
    done = journal.read_done(directory, manifest["run"])
    if os.path.exists(writer.path):
        writer.tidy()
        if not done:
            manifest["array"] = y.name
            journal.write_manifest(directory, manifest)
        if compressors is None:
            _check_space(path, y, done)
    elif os.path.exists(path) and len(done) == len(y.chunks[0]):
        if not manifest["complete"]:  # it was stopped between the rename and the manifest
            manifest["complete"] = True
            journal.write_manifest(directory, manifest)
    else:
        return _begin(y, path, wanted, compressors)  # its files were removed
    told_by_name = not (wanted["inputs"] or wanted["settings"])
    if told_by_name and manifest.get("array", y.name) != y.name:
        warnings.warn(
            f"{path} was begun from an array of another name, and there are neither inputs nor "
            "settings that tell whether this is the same: what is done is kept. Give store inputs "
            "or settings, or overwrite it",
            stacklevel=3,
        )
    return writer, manifest


def _open_writer(y: da.Array, path: str, manifest: Mapping[str, Any], compressors: Any) -> Writer:
    kind = os.path.splitext(path)[1]
    partial = os.path.join(progress_directory(path), f"partial-{manifest['run']}{kind}")
    stored_rows = manifest.get("stored_rows")
    return make_writer(kind, partial, y.shape, y.dtype, y.chunks[0], compressors, stored_rows)


def _check_stored_rows(y: da.Array, stored_rows: int) -> None:
    odd = [rows for rows in y.chunks[0][:-1] if rows % stored_rows]
    if odd or stored_rows < 1:
        raise ValueError(
            f"every block but the last must have a multiple of stored_rows={stored_rows} rows, but "
            f"there are blocks of {shorten(odd)}"
        )


def _check_space(path: str, y: da.Array, done: set[int]) -> None:
    """Find a full disk before the work; a compressed output may need less, and is not judged."""
    rows = [count for block, count in enumerate(y.chunks[0]) if block not in done]
    needed = sum(rows) * prod(y.shape[1:]) * y.dtype.itemsize
    free = free_bytes(progress_directory(path))
    if needed > free:
        raise OSError(
            errno.ENOSPC,
            f"no space for the {len(rows)} missing blocks of {path}: they need {needed} bytes, "
            f"{free} are free. Make room, or write elsewhere",
        )


def _remove(path: str) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    elif os.path.lexists(path):
        os.unlink(path)
