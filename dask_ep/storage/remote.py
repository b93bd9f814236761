"""How are pieces of files on an object store read?

By ranged reads through ``fsspec``, which is imported only here and only for addresses such as
``s3://bucket/model`` or ``memory://model``: a local path never needs it. What is worth retrying,
such as a connection that is cut, is retried by the file system; what remains is a `ReadError`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from dask_ep.errors import ReadError
from dask_ep.storage.source import Region, Source

_HEADER_BLOCK = 1 << 16  # bytes that are fetched at a time to read a header

JOINED_BYTES = 16 << 20
"""Bytes that one request for several tensors brings: enough for a store of objects to answer at its
full speed, and so few that laws of memory have room for them in what a process is counted with."""


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
            "fsspec, or copy the files to a local directory"
        ) from error
    return fsspec.core.url_to_fs(address)


@contextmanager
def _named(place: str) -> Iterator[None]:
    """Make a `ReadError` of whatever file systems raise, which are many things."""
    try:
        yield
    except (ReadError, ImportError):
        raise
    except Exception as error:
        raise ReadError(f"{place}: {_words(error)}") from error


def _words(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return str(error) or "no such file"
    return f"{type(error).__name__}: {error}".rstrip(": ")


def read_object(address: str) -> bytes:
    """Read a whole file."""
    with _named(address):
        files, path = file_system(address)
        return files.cat_file(path)


def names_in(address: str) -> list[str]:
    """The names of the files in a directory, in order."""
    with _named(address):
        files, path = file_system(address)
        return sorted(p.rpartition("/")[2] for p in files.ls(path, detail=False))


def version_of(files: Any, path: str) -> str:
    """Ask what tells this content of a file from another: size, tag or time."""
    files.invalidate_cache(path)
    return _version(files.info(path))


def _version(info: Mapping[str, Any]) -> str:
    keys = ("ETag", "etag", "mtime", "LastModified", "created")
    return " ".join([str(info["size"]), *(str(info[key]) for key in keys if key in info)])


_joined = threading.local()


@dataclass
class _Span:
    """Neighbouring bytes of a file that are fetched together, until all of them are given out."""

    address: str
    version: str
    first: int
    last: int
    data: memoryview | None = None
    given_out: int = 0

    def holds(self, address: str, first: int, last: int) -> bool:
        there = self.first <= first <= last <= self.last and self.given_out < self.last - self.first
        return there and address == self.address

    def give_out(self, count: int) -> None:
        self.given_out += count
        if self.given_out >= self.last - self.first:
            self.data = None


@contextmanager
def joined(parts: Iterable[tuple[Source, int, int]]) -> Iterator[None]:
    """Fetch rows of remote files in one request where they lie side by side.

    Parameters
    ----------
    parts : (source, start, stop)
        What this thread is about to read, all of it and once; what is not remote is passed over.

    Notes
    -----
    A request is for at most `JOINED_BYTES`, or for one part. Its bytes are in memory until all of
    them were read.
    """
    spans: list[_Span] = []
    remote = ((s, *s.bytes_of(a, b)) for s, a, b in parts if isinstance(s, RemoteSource))
    regions = {(s.address, s.version, first, last) for s, first, last in remote if first < last}
    for address, version, first, last in sorted(regions):
        end = spans[-1] if spans else _Span("", "", 0, 0)
        follows = (end.address, end.version, end.last) == (address, version, first)
        if follows and last - end.first <= JOINED_BYTES:
            end.last = last
        else:
            spans.append(_Span(address, version, first, last))
    _joined.spans = spans
    try:
        yield
    finally:
        _joined.spans = []


class RemoteSource(Region):
    """A region of a remote file; its `version` tells this content from another.

    After each read the version is asked for, which is one small request more: of an object that
    was replaced in between, no row is given out.
    """

    def __init__(
        self, file: RemoteFile, offset: int, shape: tuple[int, ...], dtype: np.dtype, name: str
    ):
        super().__init__(file.path, file.size, offset, shape, dtype, name)
        self.address, self.version = file.path, file.version

    def _fill(self, out: np.ndarray, first: int, place: str) -> None:
        last = first + out.nbytes
        for span in getattr(_joined, "spans", ()):
            if span.version == self.version and span.holds(self.address, first, last):
                if span.data is None:
                    span.data = self._fetch(span.first, span.last, place)
                data = span.data[first - span.first : last - span.first]
                span.give_out(out.nbytes)
                break
        else:
            data = self._fetch(first, last, place)
        out.reshape(-1).view(np.uint8)[...] = np.frombuffer(data, np.uint8)

    def _fetch(self, first: int, last: int, place: str) -> memoryview:
        """Read the bytes [first, last) of the file as it was when it was opened."""
        with _named(place):
            files, path = file_system(self.address)
            data = files.cat_file(path, start=first, end=last)
            version = version_of(files, path)
        if len(data) != last - first:
            raise ReadError(
                f"{place}: expected {last - first} bytes from byte {first} of {self.address}, got "
                f"{len(data)}"
            )
        if version != self.version:
            raise ReadError(
                f"{place}: {self.address} was replaced since it was opened, when it was "
                f"{self.version}; now it is {version}. Open it again, or bring the old file back"
            )
        return memoryview(data)

    def fingerprint(self) -> dict[str, Any]:
        return self._describe() | {"offset": self.offset, "version": self.version}

    def __dask_tokenize__(self) -> object:
        return (type(self).__name__, self.address, sorted(self.fingerprint().items()))


class RemoteFile:
    """A file at an address, of which regions are read.

    Parameters
    ----------
    address : with its protocol
    name : for messages; the file's name without it

    Attributes
    ----------
    size : bytes
    version : what tells this content of the file from another: size, time or tag

    Raises
    ------
    ReadError
        If there is no such file.
    """

    def __init__(self, address: str, name: str | None = None):
        self._files, self._there = file_system(address)
        try:
            info = self._files.info(self._there)
        except Exception as error:
            raise ReadError(f"{address} cannot be opened: {_words(error)}") from error
        self.path, self.size = address, info["size"]
        self.name = self._there.rpartition("/")[2] if name is None else name
        self.version = _version(info)

    @contextmanager
    def open(self) -> Iterator[Any]:
        """Open the file to read its header; what is wrong with that is the reader's to say."""
        try:
            with self._files.open(self._there, "rb", block_size=_HEADER_BLOCK) as file:
                yield file
        except (ReadError, ValueError, TypeError):
            raise
        except Exception as error:
            raise ReadError(f"the header of {self.path}: {_words(error)}") from error

    def region(
        self, offset: int, shape: tuple[int, ...], dtype: np.dtype, name: str
    ) -> RemoteSource:
        return RemoteSource(self, offset, shape, dtype, name)
