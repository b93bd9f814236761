"""How are pieces of files on an object store read?

By ranged reads through ``fsspec``, which is imported only here and only for addresses such as
``s3://bucket/model`` or ``memory://model``: a local path never needs it.
"""

from __future__ import annotations

import os
from math import prod
from typing import Any

import numpy as np

from dask_ep.files import ReadError
from dask_ep.safetensors_header import parse_header
from dask_ep.sources import Source, checked_dtype


def is_remote(address: str | os.PathLike) -> bool:
    """Whether an address names a file system, as in ``s3://bucket/model``."""
    return "://" in os.fspath(address)


def file_system(address: str) -> tuple[Any, str]:
    """Give the fsspec file system of an address, and the path there.

    Raises
    ------
    ImportError
        If fsspec, or what it needs for this kind of address, is not installed.
    """
    try:
        import fsspec
    except ImportError as error:
        raise ImportError(
            f"{address} is read through fsspec, which is not installed: pip install "
            "'dask-ep[remote]', or copy the files to a local directory"
        ) from error
    return fsspec.core.url_to_fs(address)


class RemoteSource(Source):
    """A contiguous region of a remote file that holds an array's bytes in C order.

    Parameters
    ----------
    address : of the file, with its protocol
    offset : bytes before the array's first element
    shape, dtype : of the array
    name : for messages
    version : what tells this content of the file from another: size, time or tag
    """

    def __init__(
        self,
        address: str,
        offset: int,
        shape: tuple[int, ...],
        dtype: np.dtype,
        name: str,
        version: str,
    ):
        self.address, self.offset, self.version = address, offset, version
        self.shape, self.dtype, self.name = tuple(shape), checked_dtype(dtype, name), name

    def read(self, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        out = self._destination(start, stop, out)
        row_bytes = prod(self.shape[1:]) * self.dtype.itemsize
        first = self.offset + start * row_bytes
        try:
            files, path = file_system(self.address)
            data = files.cat_file(path, start=first, end=first + out.nbytes)
        except OSError as error:
            raise ReadError(f"rows [{start}, {stop}) of {self.name}: {error}") from error
        if len(data) != out.nbytes:
            raise ReadError(
                f"rows [{start}, {stop}) of {self.name}: expected {out.nbytes} bytes from byte "
                f"{first} of {self.address}, got {len(data)}"
            )
        out.reshape(-1).view(np.uint8)[...] = np.frombuffer(data, np.uint8)
        return out

    def fingerprint(self) -> dict[str, Any]:
        return self._describe() | {"offset": self.offset, "version": self.version}

    def __dask_tokenize__(self) -> object:
        return (type(self).__name__, self.address, sorted(self.fingerprint().items()))


def open_remote_safetensors(address: str) -> dict[str, RemoteSource]:
    """Open all tensors of a remote safetensors file, reading only its header."""
    files, path = file_system(address)
    info = files.info(path)
    file_name = path.rpartition("/")[2]
    with files.open(path, "rb", block_size=1 << 16) as file:
        header = parse_header(file, info["size"], address)
    changed = [str(info[key]) for key in ("ETag", "etag", "mtime", "LastModified", "created")
               if key in info]  # fmt: skip
    version = " ".join([str(info["size"]), *changed])
    return {
        name: RemoteSource(
            address, tensor.offset, tensor.shape, tensor.dtype, f"{file_name}:{name}", version
        )
        for name, tensor in header.items()
    }
