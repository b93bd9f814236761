"""What reads an array in memory, or from a local file?"""

from __future__ import annotations

import os
from typing import Any, BinaryIO

import numpy as np
import xxhash

from dask_ep.arrays.checks import refuse_masked
from dask_ep.storage.files import file_size, fill_from_file, fingerprint_file
from dask_ep.storage.source import File, Source, checked_dtype


class ArraySource(Source):
    """An array in memory. Without `out`, contiguous rows are a read-only view."""

    def __init__(self, array: np.ndarray, name: str = "array"):
        refuse_masked(array, name)
        self.shape, self.dtype, self.name = array.shape, checked_dtype(array.dtype, name), name
        self.array = array

    def read(self, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        self._shape_of(start, stop)
        rows = self.array[start:stop] if self.shape else self.array
        if out is None and rows.flags.c_contiguous:
            rows = rows.view()
            rows.flags.writeable = False
            return rows
        out = self._destination(start, stop, out)
        out[...] = rows
        return out

    def fingerprint(self) -> dict[str, Any]:
        data = np.ascontiguousarray(self.array).reshape(-1).view(np.uint8).data
        return self._describe() | {"xxh3_128": xxhash.xxh3_128_hexdigest(data)}


class LocalFile(File):
    """A local file; its name in messages is by default that of the file."""

    is_local = True

    def __init__(self, path: str, name: str | None = None):
        self.path = os.path.abspath(path)
        self.name = os.path.basename(path) if name is None else name
        self.size = file_size(path, path if name is None else name)

    def open(self) -> BinaryIO:
        return open(self.path, "rb")

    def fill(self, out: np.ndarray, first: int, place: str) -> None:
        fill_from_file(out, self.path, first, place)

    def fingerprint(self) -> dict[str, Any]:
        return fingerprint_file(self.path)
