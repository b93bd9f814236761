"""Where in its files are the rows of a Zarr array?

A Zarr 3 array in a local directory, with only the little-endian `bytes` codec, is a set of files
with plain rows. Such files are read and written directly, without a copy; this module finds them
from the array's metadata. All other arrays go through Zarr.

    shape (7, d), chunks (3, d)      c/0/0: rows 0-2      c/1/0: rows 3-5      c/2/0: row 6, padding

Zarr names data types by string, and its registry of extensions has ``bfloat16`` and the float8
types, but zarr-python knows none of them. Here they are read and written under these names, the
bits passing through zarr-python as unsigned integers of the same width. zarr-python by itself
refuses such an array, with an error; TensorStore and other implementations read it. They are not
added to zarr-python's registry of data types, where all code of the process would see them, and
where a type of two bytes needs a base class that `zarr.dtype` does not have.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import ml_dtypes
import numpy as np

from dask_ep.errors import ReadError
from dask_ep.storage.files import is_written
from dask_ep.storage.remote import is_remote, read_object

if TYPE_CHECKING:
    import zarr

EXTENSION_DTYPES = {
    name: np.dtype(getattr(ml_dtypes, name))
    for name in (
        "bfloat16",
        "float8_e3m4",
        "float8_e4m3",
        "float8_e4m3b11fnuz",
        "float8_e4m3fn",
        "float8_e4m3fnuz",
        "float8_e5m2",
        "float8_e5m2fnuz",
        "float8_e8m0fnu",
    )
}
"""Names of Zarr data types that NumPy lacks, with the type that `ml_dtypes` gives it."""

NEVER_WRITTEN = np.uint64(2**64 - 1)
"""What the index of a shard has in place of the offset of a chunk that is not in it."""

UNREADABLE = (ValueError, FileNotFoundError, KeyError, TypeError, AttributeError)
"""What zarr-python raises at metadata that is missing, not JSON, or not that of an array."""


@dataclass(frozen=True)
class ChunkFiles:
    """The files of an array whose chunks are plain rows."""

    root: str
    """the array's directory"""
    rows: int
    """rows in a chunk; the last chunk is padded to this number"""
    row_bytes: int
    ndim: int
    encoding: Any
    """Zarr's own object that turns chunk coordinates into keys"""

    @property
    def chunk_bytes(self) -> int:
        return self.rows * self.row_bytes

    def path(self, chunk: int) -> str:
        """The file of row chunk `chunk`."""
        key = self.encoding.encode_chunk_key((chunk, *(0,) * (self.ndim - 1)))
        return os.path.join(self.root, key)

    def spans(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Cut rows [start, stop) at the chunks: (chunk, first row, last row + 1) each.

        Examples
        --------
        >>> list(ChunkFiles("x.zarr", 3, 8, 2, None).spans(2, 7))
        [(0, 2, 3), (1, 3, 6), (2, 6, 7)]
        """
        while start < stop:
            chunk = start // self.rows
            end = min(stop, (chunk + 1) * self.rows)
            yield chunk, start, end
            start = end


def open_array(path: str, mode: Literal["r", "r+"] = "r") -> tuple[zarr.Array, np.dtype]:
    """Open the array at a path or URL, to read ("r") or write ("r+"); return it and its dtype.

    The dtype differs from ``array.dtype`` for types that zarr-python does not know: then the array
    has unsigned integers, whose bits must be viewed as that type.
    """
    import zarr

    try:
        array = zarr.open_array(path, mode=mode)
    except UNREADABLE as error:
        found = None
        with suppress(*UNREADABLE, OSError):  # the first error is more helpful
            found = _open_extension_dtype(path, mode)
        if found is None:
            lacks = "its metadata lacks " if isinstance(error, KeyError) else ""
            raise ValueError(
                f"{path} cannot be opened as a Zarr array: {lacks}{str(error).strip()}"
                f"{_members(path)}"
            ) from error
        return found
    return array, array.dtype.newbyteorder("=")


def create_array(
    path: str, shape: tuple[int, ...], chunk_rows: int, dtype: np.dtype, compressors: Any = None
) -> zarr.Array:
    """Make an empty local Zarr 3 array with chunks of `chunk_rows` whole rows.

    Notes
    -----
    The chunk files are in the array's own directory (``c.0.0``, ...): one inode per chunk, while
    the default keys would make a directory for each. A chunk of zeros is written like any other, so
    that a missing file always means missing rows.
    """
    import zarr

    name = next((name for name, known in EXTENSION_DTYPES.items() if known == dtype), None)
    array = zarr.create_array(
        path,
        shape=shape,
        chunks=(chunk_rows, *(max(1, length) for length in shape[1:])),
        dtype=dtype if name is None else _bits(dtype),
        fill_value=0,
        compressors=compressors,
        chunk_key_encoding={"name": "default", "separator": "."},
        config={"write_empty_chunks": True},
    )
    if name is not None:
        # As bits, since a type may have no zero (float8_e8m0fnu).
        fill = f"0x{0:0{2 * dtype.itemsize}x}"
        metadata = zarr_metadata(path) | {"data_type": name, "fill_value": fill}
        Path(path, "zarr.json").write_text(json.dumps(metadata, indent=2))
    return array


def zarr_metadata(path: str) -> dict[str, Any]:
    """Read the metadata of the Zarr 3 array or group at a path or URL, as they are written."""
    if is_remote(path):
        return json.loads(read_object(f"{path.rstrip('/')}/zarr.json"))
    return json.loads(Path(path, "zarr.json").read_bytes())


def local_directory(array: zarr.Array) -> str | None:
    """Return the directory of an array in a store of local files; None for others."""
    from zarr.storage import FsspecStore, LocalStore

    store = array.store
    if isinstance(store, LocalStore):
        root = str(store.root)
    elif isinstance(store, FsspecStore) and "file" in np.atleast_1d(store.fs.protocol):
        root = store.path
    else:
        return None
    return os.path.join(root, array.path) if array.path else root


def anchored(array: zarr.Array) -> zarr.Array:
    """Return the array with an absolute path, so that it works in any working directory."""
    import zarr
    from zarr.storage import LocalStore, StorePath

    store = array.store
    if not isinstance(store, LocalStore) or store.root.is_absolute():
        return array
    place = StorePath(LocalStore(store.root.absolute(), read_only=store.read_only), array.path)
    return zarr.Array(zarr.AsyncArray(array.metadata, place))


def chunk_files(array: zarr.Array) -> ChunkFiles | None:
    """Return the files with plain rows of this array; None if its chunks are anything else."""
    from zarr.codecs import BytesCodec

    root, metadata, little = local_directory(array), array.metadata, sys.byteorder == "little"
    if root is None or metadata.zarr_format != 3 or not little or array.shards is not None:
        return None
    codec = metadata.codecs[0]
    plain = (
        len(metadata.codecs) == 1
        and type(codec) is BytesCodec
        and getattr(codec.endian, "value", codec.endian) in (None, "little")  # zarr 3.4: a str
        and not metadata.storage_transformers
        and array.dtype.kind in "biufc"
        and array.ndim > 0
        and array.chunks[1:] == array.shape[1:]
    )
    if not plain:
        return None
    row_bytes = prod(array.shape[1:]) * array.dtype.itemsize
    encoding = metadata.chunk_key_encoding
    return ChunkFiles(root, array.chunks[0], row_bytes, array.ndim, encoding)


def chunk_keys(array: zarr.Array, start: int, stop: int) -> Iterator[str]:
    """Return the keys under which the chunks (shards) of rows [start, stop) are stored."""
    yield from map(array.metadata.encode_chunk_key, _places(array, start, stop))


def missing_chunks(array: zarr.Array, start: int, stop: int) -> Iterator[str]:
    """Return the keys of the stored chunks (shards) of rows [start, stop) that the store lacks.

    Chunks that a shard lacks are named too: a shard whose writer was stopped has only some of them.

    Raises
    ------
    ReadError
        If shards are inside other shards, or before or after another codec; or see `is_written`.
    """
    from zarr.core.sync import sync  # Zarr's public names have nothing that looks for one key

    if _has_hidden_shards(array):
        raise ReadError(
            f"{array.store_path} has shards together with other codecs, or inside other shards, "
            'where missing chunks are not found: write it again without, or set missing="fill" to '
            "take these as the fill value"
        )
    directory = local_directory(array)
    for place in _places(array, start, stop):
        key = array.metadata.encode_chunk_key(place)
        if directory is not None and not is_written(os.path.join(directory, key)):
            yield key
        elif array.shards is not None:
            yield from _missing_in_shard(array, place, key, start, stop)
        elif directory is None and not sync((array.store_path / key).exists()):
            yield key


def check_local_chunks(array: zarr.Array, start: int, stop: int) -> None:
    """Raise if a local chunk of rows [start, stop) is there, but cannot be read as a file.

    Zarr takes a directory, and a link to nothing, for chunks that were never written.
    """
    if (directory := local_directory(array)) is not None:
        for place in _places(array, start, stop):
            is_written(os.path.join(directory, array.metadata.encode_chunk_key(place)))


def _has_hidden_shards(array: zarr.Array) -> bool:
    """Return whether an array has shards whose index is not at an end of what is stored."""
    from zarr.codecs import ShardingCodec

    metadata: Any = array.metadata
    codecs: tuple[Any, ...] = metadata.codecs if metadata.zarr_format == 3 else ()
    if array.shards is not None:
        codecs = codecs[0].codecs
    return any(isinstance(codec, ShardingCodec) for codec in codecs)


def _places(array: zarr.Array, start: int, stop: int) -> Iterator[tuple[int, ...]]:
    """Return the places in the grid of the chunks (shards) of rows [start, stop)."""
    lengths = array.shards or array.chunks
    grid = [range(start // lengths[0], -(-stop // lengths[0]))]
    grid += [range(-(-n // c)) for n, c in zip(array.shape[1:], lengths[1:], strict=True)]
    return product(*grid)


def _missing_in_shard(
    array: zarr.Array, place: tuple[int, ...], key: str, start: int, stop: int
) -> Iterator[str]:
    """Return the key of a shard if the store lacks it, or names of the chunks that it lacks.

    Its index has, for each chunk, two integers of 8 bytes, all ones if the chunk was never written,
    and then a checksum of 4 bytes unless that is switched off.
    """
    from zarr.abc.store import RangeByteRequest, SuffixByteRequest
    from zarr.core.sync import sync

    assert array.shards is not None
    metadata: Any = array.metadata
    codec = metadata.codecs[0]
    grid = tuple(n // c for n, c in zip(array.shards, array.chunks, strict=True))
    checksums = 4 * (len(codec.index_codecs) - 1)
    size = 16 * prod(grid)
    at_start = getattr(codec.index_location, "value", codec.index_location) == "start"
    part = RangeByteRequest(0, size) if at_start else SuffixByteRequest(size + checksums)
    index = sync((array.store_path / key).get(byte_range=part))
    if index is None:
        yield key
        return
    if len(index) < size:
        return  # it is truncated, which a read shows
    offsets = np.frombuffer(index.to_bytes()[:size], "<u8").reshape(*grid, 2)[..., 0]
    firsts = [p * n for p, n in zip(place, array.shards, strict=True)]
    spans = [(start, stop), *((0, n) for n in array.shape[1:])]
    wanted = tuple(
        slice(max(low - first, 0) // c, -(-(high - first) // c))
        for (low, high), first, c in zip(spans, firsts, array.chunks, strict=True)
    )
    for inner in np.argwhere(offsets[wanted] == NEVER_WRITTEN).tolist():
        at = [i + cut.start for i, cut in zip(inner, wanted, strict=True)]
        yield f"{'.'.join(map(str, at))} of shard {key}"


def _members(path: str) -> str:
    """Say which arrays of a group may have been meant; empty if it is not a group."""
    import zarr

    try:
        names = sorted(zarr.open_group(path, mode="r").array_keys())
    except UNREADABLE:
        return ""
    some = ", ".join(f"{path}/{name}" for name in names[:3])
    return f". It is a group; name an array in it{f', such as {some}' if some else ''}"


def _bits(dtype: np.dtype) -> np.dtype:
    """Return the dtype of unsigned integers of the same width."""
    return np.dtype(f"u{dtype.itemsize}")


def _open_extension_dtype(
    path: str, mode: Literal["r", "r+"]
) -> tuple[zarr.Array, np.dtype] | None:
    """Open an array of a type in `EXTENSION_DTYPES` as its bits; None for other types."""
    import zarr
    from zarr.storage import FsspecStore, LocalStore, StorePath

    metadata = zarr_metadata(path)
    name = metadata.get("data_type")
    dtype = EXTENSION_DTYPES.get(name) if isinstance(name, str) else None
    if dtype is None:
        return None
    fill = metadata["fill_value"]
    is_hex = isinstance(fill, str) and fill.startswith("0x")
    bits = int(fill, 16) if is_hex else int(np.array(float(fill), dtype).view(_bits(dtype)))
    metadata |= {"data_type": _bits(dtype).name, "fill_value": bits}
    open_store: Any = FsspecStore.from_url if is_remote(path) else LocalStore
    place = StorePath(open_store(path, read_only=mode == "r"))
    return zarr.Array.from_dict(place, metadata), dtype
