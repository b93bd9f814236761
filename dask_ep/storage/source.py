"""What can be read by ranges of rows?

A `Source` knows the place, shape and dtype of an array and reads rows [start, stop) of it when
asked; it never holds a file's data, and pickles to a few hundred bytes. A `File` is what regions
are read from: a local one (`plain_sources`) or one in an object store (`remote`).
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager
from math import prod
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike

from dask_ep.arrays.checks import check_byte_order
from dask_ep.arrays.memory import empty
from dask_ep.errors import ReadError


class Source(ABC):
    """An array that is read by ranges of rows.

    Attributes
    ----------
    shape : tuple of int
    dtype : numpy.dtype, in native byte order
    name : str, for messages
    path : str or None, the local file or directory of the data
    chunk_rows : int or None, the rows that are stored together, None where any range is as good
    read_bytes : int, of memory that a read needs in addition to the rows that it returns
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    name: str
    path: str | None = None
    chunk_rows: int | None = None
    read_bytes: int = 0

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array as its dtype says, uncompressed."""
        return prod(self.shape) * self.dtype.itemsize

    @abstractmethod
    def read(self, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        """Read rows [start, stop) of the first axis, with all of the other axes.

        Parameters
        ----------
        start, stop : int, 0 <= start <= stop <= shape[0]; an array of no axes is one row
        out : (stop - start, *shape[1:]) array of `dtype`, C-contiguous, to be filled; without it
            memory from `dask_ep.arrays.memory.empty`

        Returns
        -------
        `out`, or a C-contiguous array like it

        Raises
        ------
        ReadError
            If the data is not there whole, naming the file, the rows, the bytes expected and got.
        """

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """Identify this data, as a JSON-able mapping that changes when the data does.

        It has `name`, `shape`, `dtype`, and the size, time of change and samples of the files, or
        a hash of the content for arrays in memory; not where the files are: they may be moved.
        """

    def __dask_tokenize__(self) -> object:
        return self._as_text(self.path)

    def _as_text(self, place: str | None) -> str:
        """One string, which Dask hashes ten times faster than the mappings that it is made of."""
        return f"{type(self).__name__} {place} {json.dumps(self.fingerprint(), sort_keys=True)}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, shape={self.shape}, dtype={self.dtype})"

    def blocks(self, rows: int = 1 << 16) -> Iterator[tuple[int, np.ndarray]]:
        """Read all rows in blocks: yield the number of a block's first row, and its rows."""
        for start in range(0, self.shape[0], rows):
            yield start, self.read(start, min(start + rows, self.shape[0]))

    def ranges(self, start: int, stop: int) -> Iterator[tuple[Source, int, int]]:
        """The rows [start, stop), and those of the sources that they are made of, if known."""
        yield self, start, stop
        whole = (start, stop) == (0, self.shape[0] if self.shape else 1)
        for part in vars(self).values():
            if isinstance(part, Source) and whole:
                yield from part.ranges(0, part.shape[0] if part.shape else 1)
            elif isinstance(part, Source) and part.shape[:1] == self.shape[:1]:
                yield from part.ranges(start, stop)

    def _shape_of(self, start: int, stop: int) -> tuple[int, ...]:
        """Check a request to `read`; give the shape of its answer."""
        length = self.shape[0] if self.shape else 1
        if not 0 <= start <= stop <= length:
            raise ValueError(
                f"rows of {self.name} must be within [0, {length}), not [{start}, {stop})"
            )
        return (stop - start, *self.shape[1:]) if self.shape else ()

    def _destination(self, start: int, stop: int, out: np.ndarray | None) -> np.ndarray:
        """Return the array to fill: `out`, if it fits the request, or a new one."""
        shape = self._shape_of(start, stop)
        if out is None:
            return empty(shape, self.dtype)
        good = out.shape == shape and out.dtype == self.dtype
        if not (good and out.flags.c_contiguous and out.flags.writeable):
            raise ValueError(
                f"out for rows [{start}, {stop}) of {self.name} must be a writeable C-contiguous "
                f"{shape} array of {self.dtype}, not {out.shape} of {out.dtype}"
            )
        return out

    def _describe(self) -> dict[str, Any]:
        return {"name": self.name, "shape": list(self.shape), "dtype": self.dtype.name}


class Derived(Source):
    """Numbers that are made of those of another source, and have its name and place."""

    def __init__(self, stored: Source, shape: tuple[int, ...], dtype: DTypeLike = np.float32):
        self.stored, self.shape, self.dtype = stored, tuple(shape), np.dtype(dtype)
        self.name, self.path = stored.name, stored.path

    @property
    def nbytes(self) -> int:
        """Bytes as stored."""
        return self.stored.nbytes

    def fingerprint(self) -> dict[str, Any]:
        return self._describe() | {"stored": self.stored.fingerprint()}


class File(ABC):
    """A file that holds arrays behind a header.

    Attributes
    ----------
    path : absolute path or address
    name : for messages
    size : bytes
    """

    path: str
    name: str
    size: int
    is_local: bool

    @abstractmethod
    def open(self) -> AbstractContextManager[BinaryIO]:
        """Open the file to read its header."""

    @abstractmethod
    def fill(self, out: np.ndarray, first: int, place: str) -> None:
        """Fill an array with the bytes from `first` on; `place` is for messages."""

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """Identify this content of the file."""


class Region(Source):
    """A contiguous region of a file that holds the array's bytes in C order.

    Parameters
    ----------
    file : File
    offset : bytes before the array's first element
    shape, dtype : of the array
    name : for messages

    Raises
    ------
    ReadError
        If the file ends before the array does.
    """

    def __init__(self, file: File, offset: int, shape: tuple[int, ...], dtype: np.dtype, name: str):
        self.file, self.offset, self.name = file, offset, name
        self.shape, self.dtype = tuple(shape), checked_dtype(np.dtype(dtype), name)
        self.path = file.path if file.is_local else None
        if offset + self.nbytes > file.size:
            raise ReadError(
                f"{file.path} is too short for {name}: {self.shape} of {self.dtype} from byte "
                f"{offset} on ends at byte {offset + self.nbytes}, the file at {file.size}"
            )

    def read(self, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        out = self._destination(start, stop, out)
        self.file.fill(out, self.bytes_of(start, stop)[0], f"rows [{start}, {stop}) of {self.name}")
        return out

    def bytes_of(self, start: int, stop: int) -> tuple[int, int]:
        """Where rows [start, stop) begin and end in the file."""
        row_bytes = prod(self.shape[1:]) * self.dtype.itemsize
        return self.offset + start * row_bytes, self.offset + stop * row_bytes

    def fingerprint(self) -> dict[str, Any]:
        return self._describe() | {"offset": self.offset} | self.file.fingerprint()

    def __dask_tokenize__(self) -> object:
        return self._as_text(self.file.path)


def checked_dtype(dtype: np.dtype, name: str) -> np.dtype:
    """Return a dtype of numbers in native byte order; refuse any other.

    Raises
    ------
    TypeError
        For objects, strings, records and raw bytes, and for the other byte order.
    """
    numbers = dtype.kind in "biufc" or hasattr(ml_dtypes, dtype.name)
    if dtype.kind == "V" and not numbers and dtype.names is None:
        raise TypeError(
            f"{name} holds raw bytes ({dtype.str}), which could be any type: np.save stores "
            "bfloat16 and float8 that way. Pass the type as dtype=, or store it as safetensors or "
            "Zarr"
        )
    if not numbers:
        raise TypeError(f"{name} must hold numbers, not {dtype}; convert it with astype")
    check_byte_order(dtype, name)
    return np.dtype(dtype.type)
