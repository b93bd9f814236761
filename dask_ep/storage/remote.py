"""How are pieces of files on an object store read?

By ranged reads through ``fsspec``, which is imported only here and only for addresses such as
``s3://bucket/model`` or ``memory://model``: a local path never needs it.
"""

from __future__ import annotations

import os
from math import prod
from typing import Any

import numpy as np

from dask_ep.storage.files import ReadError
from dask_ep.storage.npy_header import parse_npy_header
from dask_ep.storage.safetensors_header import parse_header
from dask_ep.storage.source import Source, checked_dtype

_HEADER_BLOCK = 1 << 16  # bytes that are fetched at a time to read a header


def is_remote(address: str | os.PathLike) -> bool:
    """Whether an address names a file system, as in ``s3://bucket/model``."""
    return "://" in os.fspath(address)


def file_system(address: str) -> tuple[Any, str]:
    """Return the fsspec file system of an address, and the path there.

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
    """Open all tensors of a remote safetensors file, reading only its header.

    Raises
    ------
    ReadError
        If there is no such file.
    ValueError
        If the header breaks the format's rules.
    """
    files, path, size, version = _find(address)
    file_name = path.rpartition("/")[2]
    with files.open(path, "rb", block_size=_HEADER_BLOCK) as file:
        header = parse_header(file, size, address)
    return {
        name: RemoteSource(
            address, tensor.offset, tensor.shape, tensor.dtype, f"{file_name}:{name}", version
        )
        for name, tensor in header.items()
    }


def open_remote_npy(address: str, name: str | None = None, dtype: Any = None) -> RemoteSource:
    """Open a remote ``.npy`` file, reading only its header.

    Parameters
    ----------
    address : of the file
    name : for messages; the file's name without it
    dtype : see `parse_npy_header`

    Raises
    ------
    ReadError
        If there is no such file, or it is cut short.
    ValueError, TypeError
        If it holds no rows of numbers.
    """
    files, path, size, version = _find(address)
    with files.open(path, "rb", block_size=_HEADER_BLOCK) as file:
        shape, stored, offset = parse_npy_header(file, address, dtype)
    name = path.rpartition("/")[2] if name is None else name
    source = RemoteSource(address, offset, shape, stored, name, version)
    if offset + source.nbytes > size:
        raise ReadError(
            f"{address} is too short for {shape} of {stored}: they end at byte "
            f"{offset + source.nbytes}, the file at {size}"
        )
    return source


def _find(address: str) -> tuple[Any, str, int, str]:
    """Return the file system, the path there, the bytes of the file, and what tells its content."""
    files, path = file_system(address)
    try:
        info = files.info(path)
    except OSError as error:
        raise ReadError(f"{address} cannot be opened: {error or 'no such file'}") from error
    keys = ("ETag", "etag", "mtime", "LastModified", "created")
    version = [str(info["size"]), *(str(info[key]) for key in keys if key in info)]
    return files, path, info["size"], " ".join(version)
