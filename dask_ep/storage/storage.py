"""How are token rows read, and outputs written so that a stopped run can resume?

    open_tokens(path)     a lazy array: one task per row chunk reads it
    store(y, path)        one task per row block writes it (see `output`)

Rows are never joined: only what Dask is computing is in memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from functools import partial
from importlib import import_module
from math import prod
from numbers import Integral
from operator import index
from typing import Any

import dask.array as da
import numpy as np
from dask.base import tokenize
from dask.blockwise import BlockwiseDepDict, blockwise
from dask.highlevelgraph import HighLevelGraph

from dask_ep.arrays.checks import check_byte_order, kind_of, refuse_masked, size_in_bytes
from dask_ep.arrays.device import explain_memory
from dask_ep.arrays.device_streams import pinned_empty, upload
from dask_ep.arrays.namespaces import Array
from dask_ep.errors import ReadError
from dask_ep.storage import journal
from dask_ep.storage.lock_release import wait_until_asked
from dask_ep.storage.output import Output, progress_directory
from dask_ep.storage.overwrite_guard import refuse_to_replace_inputs
from dask_ep.storage.remote import is_remote
from dask_ep.storage.replace import restore
from dask_ep.storage.resume import (
    begin,
    check_existing,
    check_space,
    continue_output,
    make_manifest,
)
from dask_ep.storage.sources import Source, ZarrSource, open_source, refuse_missing
from dask_ep.storage.writers import make_writer, shorten

CHUNK_BYTES = 32 << 20
"""Default bytes of a token chunk: stored chunks are merged up to this."""

KINDS = (".zarr", ".npy", ".safetensors")


def open_tokens(
    path: Any,
    chunks: int | str | tuple[int, ...] | None = None,
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
    chunks : rows per chunk, its size as a string ("32 MiB"), or the rows of every chunk. A size
        means as many whole stored chunks as make about that size; default: "auto", 32 MiB
    name : for messages; the file's name without it
    like : array whose row chunks to use, so that routing is chunked like its tokens
    dtype : see `open_source`
    missing : {"error", "fill"}, optional
        Zarr chunks that were never written are an error, raised here if the array is local, since
        they look just like lost ones. "fill" uses Zarr's fill value for their rows. Default: that
        of a given `ZarrSource`, otherwise "error".
    xp : {"numpy", "cupy"}
        Library of the chunks' arrays. With "cupy", they are read into pinned memory and uploaded to
        the device in the same task.

    Returns
    -------
    array of (N, ...), one chunk wide. The name follows from the place, size and time of change of
    the files, so that the same data has the same name.

    Raises
    ------
    ReadError
        If the path does not exist or chunks are missing; when computed, if a chunk cannot be read
        completely, naming the block.
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
        partial(_read_block, source, xp), key, axes,  # a literal is one more object in each task
        BlockwiseDepDict(spans, numblocks=(len(rows), *(1 for _ in rest))), axes,
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
    """Write an array to a file, block by block, so that a stopped run can resume.

    Parameters
    ----------
    y : (N, ...) array, chunked along the rows only, with known chunks
    path : ``.zarr`` (Zarr 3, a chunk per block), ``.npy`` or ``.safetensors`` (one tensor,
        "output"); on a file system that all workers share. If it is a link, its target is written
    inputs : what `y` is made of, by name or in a list: whatever `open_source` accepts, `Experts`, a
        `MoELayer`, anything else with a ``fingerprint()``, or a fingerprint itself (a mapping)
    settings : mapping, serializable as JSON, of what else the result depends on
    resume : continue the output of an earlier run, or start if there is none. Whether the values
        are the same is decided by `inputs` and `settings` alone
    overwrite : start again. A finished output is kept until the new one is finished, so there must
        be space for both; an unfinished one is removed. What does not hold one array, such as a
        file of a checkpoint, is not overwritten
    compute : whether to write now; if not, see `Output`
    compressors : for Zarr, as in `zarr.create_array`; by default none
    stored_rows : rows of a Zarr chunk; every block except the last must have a multiple of them. By
        default a block is a chunk
    sync : make sure that each block survives a power loss before it counts as done
    **kwargs : for the scheduler, as in `dask.compute`

    Returns
    -------
    Output

    Raises
    ------
    FileExistsError
        If there is an output, or part of one, and neither `resume` nor `overwrite` is set; or if
        an output to resume is not what the earlier run wrote.
    ValueError
        If the array cannot be written in this form, or would replace a file that it is read from;
        or if the inputs, the settings, or the shape, dtype or row blocks of a resumed array are not
        those of the run that began it: the message says which, and how they differ.
    OutputInUse
        If another run is writing this output.
    OSError
        If a block cannot be written. A full disk is detected at the start if possible.

    Warns
    -----
    UserWarning
        If a resumed array has another name, and no inputs and settings tell whether it is the same.

    Notes
    -----
    A block counts as done when its data and then its line in the journal have been written.
    Resuming computes exactly the blocks that do not count, and nothing that only the others need.
    This also works for a finished output: blocks whose files were removed or truncated are computed
    again. The rows of the others are read if files have changed, and must be unchanged.

    - After the process was killed (even by ``kill -9``), every block that counts is good.
    - After a power loss or a crash of the system, that holds only with ``sync=True``. Without it,
      the system may have kept lines and lost data that was not yet on disk: overwrite then.
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
    if not isinstance(y, da.Array):
        raise TypeError(
            f"store writes a Dask array, but got a {kind_of(y)}; wrap it with dask.array.from_array"
        )
    if is_remote(path):
        raise ValueError(
            f"an output must be a local path, not a URL ({path}); write to a mounted file system, "
            "then copy it"
        )
    if "::" in os.fspath(path):
        raise ValueError(
            f"an output must be a whole file or directory, but '::' in {path} names an array "
            "within one; write elsewhere"
        )
    path = os.path.realpath(os.fspath(path))  # the target of a link is written, not the link
    _check(y, path, compressors)
    inputs = _name_inputs(inputs)
    wanted = make_manifest(y, inputs, settings or {}, overwrite)
    if stored_rows is not None:
        wanted["stored_rows"] = index(stored_rows)
        _check_stored_rows(y, wanted["stored_rows"])
    refuse_to_replace_inputs(path, y, inputs.values())
    directory = progress_directory(path)
    check_existing(path, resume, overwrite)
    if compressors is None and not os.path.isdir(directory):
        check_space(path, y, set())  # before anything is made
    _make_directory(directory, path)
    wait_until_asked(directory)
    journal.acquire_lock(directory)
    try:
        restore(path, directory)
        check_existing(path, resume, overwrite)  # again, now that no other run can begin
        manifest = None if overwrite else journal.read_manifest(directory)
        if manifest is None:
            writer, manifest = begin(y, path, wanted, compressors)
        else:
            writer, manifest = continue_output(y, path, manifest, wanted, compressors)
        output = Output(y, path, writer, manifest, inputs, sync)
    except BaseException:
        journal.release_lock(directory)
        raise
    if compute:
        with output:
            output.compute(**kwargs)
    return output


def _read_block(source: Source, xp: str, span: tuple[int, int, int]) -> Array:
    block, start, stop = span
    try:
        if xp == "numpy":
            return source.read(start, stop)
        device = import_module(xp)
        pinned = pinned_empty(device, (stop - start, *source.shape[1:]), source.dtype)
        with explain_memory(device, pinned.nbytes, stop - start):
            return upload(device, source.read(start, stop, out=pinned))
    except ReadError as error:
        raise ReadError(f"block {block} of {source.name} could not be read: {error}") from error


def whole_chunks(source: Source, nbytes: int = CHUNK_BYTES) -> int:
    """Return the rows of a chunk of about `nbytes` that consists of whole stored chunks."""
    stored = source.chunk_rows or 1
    row_bytes = max(1, prod(source.shape[1:]) * source.dtype.itemsize)
    return max(1, nbytes // (stored * row_bytes)) * stored


def _row_chunks(
    source: Source, chunks: int | str | tuple[int, ...] | None, like: da.Array | None
) -> tuple[int, ...]:
    """Decide how many rows each chunk has."""
    length = source.shape[0]
    if like is not None:
        if chunks is not None:
            raise ValueError("chunks and like are mutually exclusive")
        if len(like) != length:
            raise ValueError(
                f"{source.name} must have as many rows as `like`, {len(like)}, not {length}"
            )
        return like.chunks[0]
    if chunks is None or isinstance(chunks, str):
        given = None if chunks == "auto" else chunks
        nbytes = size_in_bytes(given, f"chunks of {source.name}") or CHUNK_BYTES
        chunks = whole_chunks(source, nbytes)
    if isinstance(chunks, (int, Integral)):
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


def _check(y: da.Array, path: str, compressors: Any) -> None:
    """Raise if the array cannot be written, before any file is changed."""
    if os.path.splitext(path)[1] not in KINDS:
        raise ValueError(f"unsupported output format: {path}; use one of {', '.join(KINDS)}")
    if y.ndim == 0:
        raise ValueError("an output must have rows, but this is a single number")
    if any(np.isnan(n) for n in y.chunks[0]):
        raise ValueError(
            "the row chunks of an output must be known, but are nan: call y.compute_chunk_sizes() "
            "first"
        )
    if any(len(chunks) != 1 for chunks in y.chunks[1:]):
        raise ValueError(
            f"an output must be chunked along its rows only, but its chunks are {y.numblocks} "
            f"along the axes; use y.rechunk({dict.fromkeys(range(1, y.ndim), -1)})"
        )
    refuse_masked(y, "an output")
    check_byte_order(y.dtype, "an output")
    make_writer(path, y.shape, y.dtype, y.chunks[0], compressors)


def _name_inputs(inputs: Mapping[str, Any] | Iterable[Any]) -> dict[str, Any]:
    """Open inputs that are paths or arrays, and name each."""
    named: dict[str, Any] = {}
    pairs = inputs.items() if isinstance(inputs, Mapping) else ((None, obj) for obj in inputs)
    for name, obj in pairs:
        if not (isinstance(obj, Mapping) or hasattr(obj, "fingerprint")):
            obj = open_source(obj)
        if name is None:
            found = obj if isinstance(obj, Mapping) else vars(obj)
            name = found.get("name", "input")
        if name in named:
            raise ValueError(f"two inputs have the name {name!r}; give them as a mapping by name")
        named[name] = obj
    return named


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


def _check_stored_rows(y: da.Array, stored_rows: int) -> None:
    odd = [rows for rows in y.chunks[0][:-1] if rows % stored_rows]
    if odd or stored_rows < 1:
        raise ValueError(
            f"every block but the last must have a multiple of stored_rows={stored_rows} rows, but "
            f"there are blocks of {shorten(odd)}"
        )
