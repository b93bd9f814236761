"""How are the rows of a block written to a file?

By one writer per format, chosen by the output's suffix. A block is written by one system call from
the array's own memory (several if Zarr chunks are smaller than blocks), from any number of threads
and processes at once, since no two blocks share a byte or a chunk file.

    y.zarr          a file per chunk, which is renamed to its name when it is complete
    y.npy           one file, header first; every block at its offset
    y.safetensors   the same; the tensor's name is "output"
"""

from __future__ import annotations

import io
import math
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from itertools import accumulate
from typing import Any

import ml_dtypes
import numpy as np

from dask_ep.storage.files import descriptor, fill_from_file, sync_path
from dask_ep.storage.safetensors_header import encode_header
from dask_ep.storage.sources import Source, open_source
from dask_ep.storage.zarr_layout import (
    ChunkFiles,
    chunk_files,
    chunk_keys,
    create_array,
    missing_chunks,
    open_array,
)

MOST_CHUNKS_PER_BLOCK = 64
"""Maximum number of Zarr chunks, which have one length, in a block, if blocks differ in length."""

_WRITING = ".writing"


class Writer(ABC):
    """Writes row blocks of one array; picklable, so that any worker can.

    Attributes
    ----------
    path : str, where the array is written
    """

    path: str

    @abstractmethod
    def create(self) -> None:
        """Create the files that exist before rows are written."""

    @abstractmethod
    def write(self, rows: np.ndarray, start: int, sync: bool) -> None:
        """Write C-contiguous `rows` at row `start`; with `sync`, they survive a power loss."""

    @abstractmethod
    def fits(self) -> bool:
        """Return whether the path holds this array, according to its header or metadata."""

    @abstractmethod
    def holds(self, start: int, stop: int) -> bool:
        """Return whether the files of rows [start, stop) exist with the right sizes."""

    @abstractmethod
    def read(self, start: int, stop: int) -> np.ndarray:
        """Read the bytes of rows that `holds` says are there; `ReadError` if they are damaged."""

    @abstractmethod
    def tidy(self) -> None:
        """Remove leftovers of interrupted writes; only while nothing writes."""


class FileWriter(Writer):
    """A header, and then the rows.

    Parameters
    ----------
    path : of the file
    header : bytes before the rows
    rows, row_bytes : number of rows, and the bytes of one
    """

    def __init__(self, path: str, header: bytes, rows: int, row_bytes: int):
        self.path, self.header = path, header
        self.rows, self.row_bytes = rows, row_bytes

    def create(self) -> None:
        with open(self.path, "wb") as file:
            file.write(self.header)
            file.truncate(len(self.header) + self.rows * self.row_bytes)

    def write(self, rows: np.ndarray, start: int, sync: bool) -> None:
        with descriptor(self.path, os.O_WRONLY, sync) as file:
            write_all(file, rows, len(self.header) + start * self.row_bytes)

    def fits(self) -> bool:
        try:
            with open(self.path, "rb") as file:
                found = file.read(len(self.header))
        except OSError:
            return False
        whole = len(self.header) + self.rows * self.row_bytes
        return self.header.startswith(found) and _size(self.path) <= whole  # may be truncated

    def holds(self, start: int, stop: int) -> bool:
        return _size(self.path) >= len(self.header) + stop * self.row_bytes

    def read(self, start: int, stop: int) -> np.ndarray:
        rows = np.empty((stop - start, self.row_bytes), np.uint8)
        offset = len(self.header) + start * self.row_bytes
        fill_from_file(rows, self.path, offset, f"rows [{start}, {stop})")
        return rows

    def tidy(self) -> None:
        """Do nothing: an interrupted write leaves only rows that will be written again."""


class ZarrWriter(Writer):
    """Zarr 3 chunks of whole rows, as plain rows unless there are `compressors`.

    Parameters
    ----------
    path : of the array's directory
    shape, dtype : of the array
    chunk_rows : rows in a chunk; every block starts at a multiple of it
    compressors : as in `zarr.create_array`
    """

    def __init__(
        self,
        path: str,
        shape: tuple[int, ...],
        dtype: np.dtype,
        chunk_rows: int,
        compressors: Any = None,
    ):
        self.path, self.shape, self.dtype = path, shape, dtype
        self.chunk_rows, self.compressors = chunk_rows, compressors

    def create(self) -> None:
        create_array(self.path, self.shape, self.chunk_rows, self.dtype, self.compressors)
        sync_path(os.path.join(self.path, "zarr.json"))

    def write(self, rows: np.ndarray, start: int, sync: bool) -> None:
        if self._files is None:
            self._array[start : start + len(rows)] = rows.view(self._array.dtype)
            for key in chunk_keys(self._array, start, start + len(rows)) if sync else ():
                sync_path(os.path.join(self.path, key))
        else:
            for chunk, first, last in self._files.spans(start, start + len(rows)):
                _write_chunk(self._files, chunk, rows[first - start : last - start], sync)
        if sync:
            sync_path(self.path)

    def fits(self) -> bool:
        try:
            array, dtype = open_array(self.path)
        except (OSError, ValueError):
            return False
        chunks = (self.chunk_rows, *(max(1, length) for length in self.shape[1:]))
        return (array.shape, array.chunks, dtype) == (self.shape, chunks, self.dtype)

    def holds(self, start: int, stop: int) -> bool:
        if not os.path.isdir(self.path):
            return False
        if self._files is None:
            return not any(missing_chunks(self._array, start, stop))
        paths = [self._files.path(chunk) for chunk, _, _ in self._files.spans(start, stop)]
        return all(_size(path) == self._files.chunk_bytes for path in paths)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self._source.read(start, stop)

    def tidy(self) -> None:
        for entry in os.scandir(self.path):
            if entry.name.endswith(_WRITING):
                os.unlink(entry.path)

    @cached_property
    def _array(self) -> Any:
        import zarr

        os.stat(self.path)  # raises OSError if it is missing, as for the other formats
        array = open_array(self.path, mode="r+")[0]
        config: Any = {"write_empty_chunks": True}  # is not stored in the array
        return zarr.Array(zarr.AsyncArray(array.metadata, array.store_path, config=config))

    @cached_property
    def _source(self) -> Source:
        return open_source(self.path)

    @cached_property
    def _files(self) -> ChunkFiles | None:
        return chunk_files(self._array)


def make_writer(
    path: str,
    shape: tuple[int, ...],
    dtype: np.dtype,
    blocks: Sequence[int],
    compressors: Any = None,
    stored_rows: int | None = None,
) -> Writer:
    """Choose the writer for a kind of file.

    Parameters
    ----------
    path : where to write; it ends with .zarr, .npy or .safetensors
    shape, dtype : of the array
    blocks : rows of each block
    compressors : for Zarr, as in `zarr.create_array`
    stored_rows : rows of a Zarr chunk, of which every block has a multiple; by default as many as
        the blocks allow

    Raises
    ------
    ValueError
        If the format cannot hold this array or these blocks.
    """
    kind = os.path.splitext(path)[1]
    if kind == ".zarr":
        return ZarrWriter(path, shape, dtype, stored_rows or chunk_rows(blocks), compressors)
    if compressors is not None:
        raise ValueError(f"compressors need a .zarr output, not {kind}")
    one = {"output": (shape, dtype)}
    header = _npy_header(shape, dtype) if kind == ".npy" else encode_header(one)
    return FileWriter(path, header, shape[0], math.prod(shape[1:]) * dtype.itemsize)


def chunk_rows(blocks: Sequence[int]) -> int:
    """Return the longest Zarr chunk, in rows, such that no two blocks share one.

    Examples
    --------
    >>> chunk_rows([4096, 4096, 100])
    4096
    >>> chunk_rows([6, 4, 6, 5])
    2
    """
    starts = list(accumulate(blocks))[:-1]
    rows = math.gcd(*starts) or max(blocks, default=0) or 1
    if rows * MOST_CHUNKS_PER_BLOCK < max(blocks, default=0):
        raise ValueError(
            f"blocks of {shorten(blocks)} rows have only chunks of {rows} rows in common, which "
            "would make too many files: Zarr chunks are of one length. Give the array even chunks "
            f"with y.rechunk({{0: {max(blocks)}}}), or write .npy or .safetensors"
        )
    return rows


def write_all(file: int, rows: np.ndarray, offset: int) -> None:
    """Write the bytes of a C-contiguous array at `offset` of an open file."""
    view = rows.reshape(-1).view(np.uint8).data
    done = 0
    while done < len(view):
        done += os.pwrite(file, view[done:], offset + done)


def shorten(blocks: Sequence[int]) -> str:
    """Show the first few of many numbers."""
    return ", ".join(map(str, blocks[:6])) + (", ..." if len(blocks) > 6 else "")


def _write_chunk(files: ChunkFiles, chunk: int, rows: np.ndarray, sync: bool) -> None:
    """Write one chunk file under another name, and rename it when it is complete."""
    path = files.path(chunk)
    draft = f"{path}.{os.getpid()}-{threading.get_ident()}{_WRITING}"
    try:
        with descriptor(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, sync) as file:
            write_all(file, rows, 0)
            if rows.nbytes < files.chunk_bytes:
                os.ftruncate(file, files.chunk_bytes)  # pads the last chunk with zeros
        os.replace(draft, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(draft)
        raise


def _npy_header(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    if hasattr(ml_dtypes, dtype.name):
        raise ValueError(
            f".npy cannot store {dtype}: NumPy would read it as raw bytes. Write .zarr or "
            ".safetensors, or convert with astype('float32')"
        )
    descr = np.lib.format.dtype_to_descr(dtype)
    header = io.BytesIO()
    content = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, content)
    return header.getvalue()


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return -1
