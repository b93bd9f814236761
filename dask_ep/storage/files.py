"""How do bytes get from local files and to them, and how are changed files recognised?

`fill_from_file` reads from the file directly into the array's memory; missing or truncated data is
a `ReadError`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from dask_ep.errors import ReadError


@contextmanager
def descriptor(path: str, flags: int, sync: bool = False) -> Iterator[int]:
    """Open a file for system calls; with `sync`, its data is then on disk after a power loss."""
    file = os.open(path, flags, 0o666)
    try:
        yield file
        if sync:
            os.fsync(file)
    finally:
        os.close(file)


def sync_path(path: str) -> None:
    """Make a file's data, or the names in a directory, outlive a power loss."""
    with descriptor(path, os.O_RDONLY, sync=True):
        pass


def fill_from_file(
    out: np.ndarray, path: str, offset: int, place: str, size: int | None = None
) -> None:
    """Read `out.nbytes` bytes at `offset` of the file into `out`, without an intermediate copy.

    Parameters
    ----------
    out : C-contiguous array
    path, offset : where its bytes are
    place : what they are, for messages
    size : the size that the file must have, if known

    Raises
    ------
    ReadError
        If the file is missing, has another size, ends too early or cannot be read.
    """
    view = out.reshape(-1).view(np.uint8).data
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise ReadError(f"{place}: {path} cannot be opened: {error.strerror}") from error
    try:
        got = os.fstat(file).st_size
        if size is not None and got != size:
            raise ReadError(f"{place}: {path} must have {size} bytes, but has {got}")
        done = 0
        while done < len(view):
            try:
                step = os.preadv(file, [view[done:]], offset + done)
            except OSError as error:
                raise ReadError(f"{place}: {path} cannot be read: {error.strerror}") from error
            if step == 0:
                raise ReadError(
                    f"{place}: expected {len(view)} bytes from byte {offset} of {path}, got {done}"
                )
            done += step
    finally:
        os.close(file)


def file_size(path: str, name: str) -> int:
    """Bytes of a file that must be there, for what is called `name`."""
    try:
        return os.stat(path).st_size
    except OSError as error:
        raise ReadError(f"{name}: {os.path.abspath(path)}: {error.strerror}") from error


def fingerprint_files(directory: str) -> dict[str, Any]:
    """Count, sum and hash the sizes and times of change of all files below a directory."""
    count, size, newest, entries = 0, 0, 0, hashlib.sha256()
    for relative, stat in sorted(_walk(directory, "")):
        count, size, newest = count + 1, size + stat.st_size, max(newest, stat.st_mtime_ns)
        entries.update(f"{relative} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    digest = entries.hexdigest()[:32]
    return {"files": count, "size": size, "mtime_ns": newest, "digest": digest}


def _walk(directory: str, prefix: str) -> Iterator[tuple[str, os.stat_result]]:
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from _walk(entry.path, f"{prefix}{entry.name}/")
            else:
                yield prefix + entry.name, entry.stat()


def bytes_below(path: str) -> int:
    """Bytes on the disk of a file, or of all files in a directory; 0 if there is nothing."""
    found = [os.path.join(place, name) for place, _, names in os.walk(path) for name in names]
    if os.path.isfile(path):
        found.append(path)
    return sum(os.lstat(file).st_blocks * 512 for file in found)
