"""How are several named arrays written to one place, with metadata?

    statistics.safetensors    one file: a header, then the arrays
    statistics.zarr           a group, with an array for each name

Large arrays are given as sources, and are copied some rows at a time, each read once. The metadata
has a hash of all arrays, so that damage is detected.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

import numpy as np
import xxhash

from dask_ep.errors import ReadError
from dask_ep.storage.replace import remove, replace
from dask_ep.storage.safetensors_header import encode_header, read_entries
from dask_ep.storage.source import Source
from dask_ep.storage.sources import open_safetensors, open_source
from dask_ep.storage.storage import CHUNK_BYTES
from dask_ep.storage.zarr_layout import zarr_metadata

KINDS_OF_BUNDLES = (".safetensors", ".zarr")

NOT_KNOWN = "0" * 32
"""Stands for the hash until all arrays are written."""


def check_bundle(path: str, resume: bool, overwrite: bool) -> None:
    """Raise if a path cannot be written, before anything is read.

    Raises
    ------
    ValueError
        If the suffix is not that of a known format.
    FileExistsError
        If the path exists, or writing to it was begun, and neither `resume` nor `overwrite` is set;
        or if what exists was not written by `write_bundle`.
    """
    if os.path.splitext(path)[1] not in KINDS_OF_BUNDLES:
        raise ValueError(
            f"statistics are written to {' or '.join(KINDS_OF_BUNDLES)}, not to {path}"
        )
    if resume and overwrite:
        raise ValueError("resume and overwrite are mutually exclusive")
    there = os.path.lexists(path)
    if not (resume or overwrite) and (there or os.path.isdir(f"{path}.progress")):
        what = "exists" if there else "was begun by an earlier run"
        raise FileExistsError(
            f"{path} {what}; resume to continue it, overwrite to start again, or write elsewhere"
        )
    if there and not _is_bundle(path):
        raise FileExistsError(
            f"{path} does not hold statistics, so it is not overwritten; write elsewhere"
        )


def write_bundle(
    path: str, arrays: Mapping[str, np.ndarray | Source], metadata: Mapping[str, str]
) -> None:
    """Write arrays and metadata, and rename the result to its path when it is complete.

    Parameters
    ----------
    path : ``.safetensors`` or ``.zarr``, on the file system of ``<path>.progress/``, which exists
    arrays : by name
    metadata : strings by name, for the file's header or the group's attributes; "content" is added
    """
    metadata = {**metadata, "content": NOT_KNOWN}
    directory = f"{path}.progress"
    new = os.path.join(directory, f"new{os.path.splitext(path)[1]}")
    remove(new)
    write = _write_zarr if path.endswith(".zarr") else _write_safetensors
    write(new, arrays, metadata)
    replace(new, path, directory)


def check_content(path: str) -> None:
    """Read all arrays of a bundle, and check that they are those that were written.

    Raises
    ------
    ReadError
        If arrays are missing, truncated or changed.
    """
    try:
        whole = read_metadata(path).get("content") == _hash(open_arrays(path))
    except (OSError, ValueError, KeyError) as error:
        raise ReadError(f"{path} is damaged: {error}") from error
    if not whole:
        raise ReadError(f"{path} is damaged: its arrays are not those that were written")


def read_metadata(path: str) -> dict[str, str]:
    """Read the metadata of a bundle."""
    if path.endswith(".zarr"):
        return zarr_metadata(path).get("attributes", {})
    with open(path, "rb") as file:
        return read_entries(file, os.path.getsize(path), path).get("__metadata__", {})


def open_arrays(path: str) -> dict[str, Source]:
    """Open the arrays of a bundle, by name."""
    if not path.endswith(".zarr"):
        return open_safetensors(path)
    import zarr

    names = zarr.open_group(path, mode="r").array_keys()
    return {name: open_source(os.path.join(path, name)) for name in names}


def _hash(arrays: Mapping[str, np.ndarray | Source]) -> str:
    hashed = xxhash.xxh3_128()
    for _ in _hashed_parts(arrays, hashed):
        pass
    return hashed.hexdigest()


def _hashed_parts(
    arrays: Mapping[str, np.ndarray | Source], hashed: xxhash.xxh3_128
) -> Iterator[tuple[str, np.ndarray]]:
    """The rows of all arrays in the order of names, which are hashed on the way."""
    for name, array in sorted(arrays.items()):
        hashed.update(f"{name} {np.dtype(array.dtype).name} {array.shape};".encode())
        for part in _parts(array):
            hashed.update(_bytes_of(part))
            yield name, part


def _bytes_of(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _is_bundle(path: str) -> bool:
    try:
        return "content" in read_metadata(path)
    except (OSError, ValueError):
        return False


def _write_safetensors(
    path: str, arrays: Mapping[str, np.ndarray | Source], metadata: Mapping[str, str]
) -> None:
    tensors = {name: (array.shape, np.dtype(array.dtype)) for name, array in arrays.items()}
    # Wide numbers first, so that all are aligned.
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1][1].itemsize))
    header, hashed = encode_header(tensors, metadata), xxhash.xxh3_128()
    places, position = {}, len(header)
    for name, (shape, dtype) in tensors.items():
        places[name] = position
        position += prod(shape) * dtype.itemsize
    with open(path, "wb") as file:
        file.write(header)
        for name, part in _hashed_parts(arrays, hashed):
            file.seek(places[name])
            places[name] += file.write(_bytes_of(part))
        file.seek(0)
        file.write(encode_header(tensors, {**metadata, "content": hashed.hexdigest()}))


def _write_zarr(
    path: str, arrays: Mapping[str, np.ndarray | Source], metadata: Mapping[str, str]
) -> None:
    import zarr

    attributes: dict[str, Any] = dict(metadata)
    group = zarr.open_group(path, mode="w", zarr_format=3, attributes=attributes)
    made = {}
    for name, array in arrays.items():
        rows = _rows_of_a_part(array)
        chunks = tuple(max(n, 1) for n in (rows, *array.shape[1:])[: len(array.shape)])
        made[name] = group.create_array(
            name,
            shape=array.shape,
            chunks=chunks,
            dtype=array.dtype,
            compressors=None,
            config={"write_empty_chunks": True},  # so that a missing chunk is always a lost one
        )
    hashed, starts = xxhash.xxh3_128(), dict.fromkeys(arrays, 0)
    for name, part in _hashed_parts(arrays, hashed):
        if not arrays[name].shape:
            made[name][()] = part
        else:
            made[name][starts[name] : starts[name] + len(part)] = part
            starts[name] += len(part)
    group.update_attributes({"content": hashed.hexdigest()})


def _parts(array: np.ndarray | Source) -> Iterator[np.ndarray]:
    """The rows of an array, some at a time."""
    if not isinstance(array, Source) or not array.shape:
        yield array.read(0, 1) if isinstance(array, Source) else array
        return
    yield from (rows for _, rows in array.blocks(_rows_of_a_part(array)))


def _rows_of_a_part(array: np.ndarray | Source) -> int:
    if not isinstance(array, Source):
        return array.shape[0] if array.shape else 1
    row = prod(array.shape[1:]) * np.dtype(array.dtype).itemsize
    return max(CHUNK_BYTES // max(row, 1), 1)
