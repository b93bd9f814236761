"""How are pieces of files on an object store read?

By ranged reads through ``fsspec``, which is imported only here and only for addresses such as
``s3://bucket/model`` or ``memory://model``: local paths never need it. The file system retries what
is worth retrying, such as a lost connection; other errors become a `ReadError`.
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
from dask_ep.storage.source import File, Region, Source

_HEADER_BLOCK = 1 << 16  # bytes to fetch at a time when reading a header

PIECE_BYTES = 8 << 20
"""Bytes of a request at most."""

AT_ONCE = 4 * PIECE_BYTES
"""Bytes that are requested at the same time, where the file system can: an object store answers
each request with some tens of MB per second."""

JOINED_BYTES = AT_ONCE
"""Maximum bytes that are fetched for several tensors together: few enough to be covered by the
memory that laws count for a process itself."""


def is_remote(address: str | os.PathLike) -> bool:
    """Return whether an address names a file system, as in ``s3://bucket/model``."""
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
    """Turn whatever a file system raises into a `ReadError`."""
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
    """Return the sorted names of the files in a directory."""
    with _named(address):
        files, path = file_system(address)
        return sorted(p.rpartition("/")[2] for p in files.ls(path, detail=False))


def _version(info: Mapping[str, Any]) -> str:
    """Return what identifies this content of a file: size, tag or time."""
    keys = ("ETag", "etag", "mtime", "LastModified", "created")
    return " ".join([str(info["size"]), *(str(info[key]) for key in keys if key in info)])


_joined = threading.local()


@dataclass
class _Span:
    """Neighbouring bytes of a file, fetched together and kept until all have been read."""

    address: str
    version: str
    first: int
    last: int
    data: np.ndarray | None = None
    given_out: int = 0

    def holds(self, address: str, first: int, last: int) -> bool:
        there = self.first <= first <= last <= self.last and self.given_out < self.last - self.first
        return there and address == self.address

    def give_out(self, count: int) -> None:
        self.given_out += count
        if self.given_out >= self.last - self.first:
            self.data = None


@contextmanager
def joined(parts: Iterable[tuple[Source, int, int]]) -> Iterator[bool]:
    """Fetch rows of remote files together where they are stored side by side.

    Yields whether any of them are remote.

    Parameters
    ----------
    parts : (source, start, stop)
        All that this thread is about to read, once; sources that are not remote are skipped.

    Notes
    -----
    At most `JOINED_BYTES`, or one part, are fetched together. They stay in memory until all of them
    have been read.
    """
    spans: list[_Span] = []
    regions = {
        (source.file.path, source.file.version, *source.bytes_of(start, stop))
        for source, start, stop in parts
        if isinstance(source, Region) and isinstance(source.file, RemoteFile)
    }
    for address, version, first, last in sorted(regions):
        if first == last:
            continue
        end = spans[-1] if spans else _Span("", "", 0, 0)
        follows = (end.address, end.version, end.last) == (address, version, first)
        if follows and last - end.first <= JOINED_BYTES:
            end.last = last
        else:
            spans.append(_Span(address, version, first, last))
    _joined.spans = spans
    try:
        yield bool(spans)
    finally:
        _joined.spans = []


class RemoteFile(File):
    """A file at an address, read by regions.

    Parameters
    ----------
    address : with its protocol
    name : for messages; the file's name without it

    Attributes
    ----------
    version : identifies this content of the file: size, time or tag
        It is checked after each read, by one more small request, so that no rows are returned from
        an object that was replaced in between.

    Raises
    ------
    ReadError
        If there is no such file.
    """

    is_local = False

    def __init__(self, address: str, name: str | None = None):
        files, path = file_system(address)
        try:
            info = files.info(path)
        except Exception as error:
            raise ReadError(f"{address} cannot be opened: {_words(error)}") from error
        self.path, self.size, self.version = address, info["size"], _version(info)
        self.name = path.rpartition("/")[2] if name is None else name

    @contextmanager
    def open(self) -> Iterator[Any]:
        """Open the file to read its header; the reader reports problems with that."""
        files, path = file_system(self.path)
        try:
            with files.open(path, "rb", block_size=_HEADER_BLOCK) as file:
                yield file
        except (ReadError, ValueError, TypeError):
            raise
        except Exception as error:
            raise ReadError(f"the header of {self.path}: {_words(error)}") from error

    def fill(self, out: np.ndarray, first: int, place: str) -> None:
        last, to = first + out.nbytes, out.reshape(-1).view(np.uint8)
        for span in getattr(_joined, "spans", ()):
            if span.version == self.version and span.holds(self.path, first, last):
                if span.data is None:
                    data = np.empty(span.last - span.first, np.uint8)
                    self._fetch(data, span.first, place)
                    span.data = data
                to[...] = span.data[first - span.first : last - span.first]
                span.give_out(out.nbytes)
                return
        self._fetch(to, first, place)

    def _fetch(self, out: np.ndarray, first: int, place: str) -> None:
        """Read bytes (n,) from byte `first` of the file as it was when it was opened."""
        files, path = file_system(self.path)
        with _named(place):
            for start in range(0, len(out), AT_ONCE):
                self._fetch_pieces(files, path, out[start:][:AT_ONCE], first + start, place)
            files.invalidate_cache(path)
            version = _version(files.info(path))
        if version != self.version:
            raise ReadError(
                f"{place}: {self.path} was replaced since it was opened, when it was "
                f"{self.version}; now it is {version}. Open it again, or bring the old file back"
            )

    def _fetch_pieces(self, files: Any, path: str, out: np.ndarray, first: int, place: str) -> None:
        """Read bytes (n,) by requests that are made at the same time."""
        pieces = [out[start : start + PIECE_BYTES] for start in range(0, len(out), PIECE_BYTES)]
        starts = [first + n * PIECE_BYTES for n in range(len(pieces))]
        stops = [start + len(piece) for start, piece in zip(starts, pieces, strict=True)]
        answers = files.cat_ranges([path] * len(pieces), starts, stops)
        for piece, start, data in zip(pieces, starts, answers, strict=True):
            if isinstance(data, BaseException):
                raise data
            if len(data) != len(piece):
                raise ReadError(
                    f"{place}: expected {len(piece)} bytes from byte {start} of {self.path}, got "
                    f"{len(data)}"
                )
            piece[...] = np.frombuffer(data, np.uint8)

    def fingerprint(self) -> dict[str, Any]:
        return {"version": self.version}
