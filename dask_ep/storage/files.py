"""How do bytes get from local files and to them, and how are changed files recognised?

`fill_from_file` reads from the file directly into the array's memory; missing or truncated data is
a `ReadError`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from stat import S_ISDIR, S_ISREG
from typing import Any

import numpy as np
import xxhash

from dask_ep.errors import ReadError

SAMPLES, SAMPLE_BYTES = 8, 4096
"""How many places of a file are compared, and the bytes of each."""


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


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[str]:
    """Yield a name for a new file, which gets the name `path` when it is complete.

    Until then, and if the block raises, what was there before stays. Devices, such as
    ``/dev/stdout``, and pipes are written to directly.
    """
    is_device = os.path.abspath(path).startswith(("/dev/", "/proc/"))
    if is_device or (os.path.exists(path) and not os.path.isfile(path)):
        yield os.fspath(path)
        return
    path = os.path.realpath(path)
    try:
        with named(path):
            yield f"{path}.new"
            os.replace(f"{path}.new", path)
    except BaseException:
        with suppress(OSError):
            os.unlink(f"{path}.new")
        raise


@contextmanager
def named(path: str) -> Iterator[None]:
    """Add the path to an error of the system that names no file, such as one of a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = path
        raise


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file, see `replacing`."""
    with replacing(path) as new, open(new, "w", encoding="utf-8") as file:
        file.write(text)


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
    """Bytes of a file that must be there and be readable, for what is called `name`."""
    place = os.path.abspath(path)
    place = place if name == path else f"{name}: {place}"
    try:
        found = os.stat(path)
        if S_ISREG(found.st_mode):  # opening a pipe would wait for its writer
            with descriptor(path, os.O_RDONLY):
                return found.st_size
    except OSError as error:
        raise ReadError(f"{place}: {error.strerror}") from None
    what = "a directory" if S_ISDIR(found.st_mode) else "a device or a pipe"
    raise ReadError(f"{place} must be a file, but is {what}")


def exists(path: str | os.PathLike) -> bool:
    """Return whether a file or directory exists; an OSError if that cannot be seen."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def is_written(path: str) -> bool:
    """Return whether there is a file; False only if nothing has its name.

    Raises
    ------
    ReadError
        If it is a directory, a link to nothing, or may not be seen: its bytes are somewhere.
    """
    try:
        if S_ISREG(os.stat(path).st_mode):
            return True
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not os.path.islink(path):
            return False
        raise ReadError(f"{path} cannot be opened: {error.strerror}") from error
    raise ReadError(f"{path} must be a file, but is a directory")


def fingerprint_file(path: str) -> dict[str, Any]:
    """Return the size and time of change of a file, and a hash of samples of its bytes.

    The samples tell files apart that were unpacked with one time of change for all.
    """
    stat = os.stat(path)
    samples = _hash_samples(path, *_state(stat))
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "samples": samples}


def fingerprint_files(directory: str) -> dict[str, Any]:
    """Count, sum and hash the sizes and times of change of all files below a directory.

    Some of the files are sampled, as in `fingerprint_file`.
    """
    count, size, newest, entries = 0, 0, 0, hashlib.sha256()
    found = sorted(_walk(directory, ""))
    sampled = range(0, len(found), max(len(found) // SAMPLES, 1))
    for relative, stat in found:
        file = os.path.join(directory, relative)
        samples = _hash_samples(file, *_state(stat)) if count in sampled else ""
        count, size, newest = count + 1, size + stat.st_size, max(newest, stat.st_mtime_ns)
        entries.update(f"{relative} {stat.st_size} {stat.st_mtime_ns} {samples}\n".encode())
    digest = entries.hexdigest()[:32]
    return {"files": count, "size": size, "mtime_ns": newest, "digest": digest}


def _state(stat: os.stat_result) -> tuple[int, ...]:
    """Return what changes here when a file does: a copy of the same bytes may have another."""
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


@lru_cache(maxsize=4096)
def _hash_samples(path: str, size: int, *_: int) -> str:
    """Hash the bytes at a few places of a file: both ends, and some evenly between them."""
    hashed = xxhash.xxh3_64()
    last = max(size - SAMPLE_BYTES, 0)
    with descriptor(path, os.O_RDONLY) as file:
        for start in sorted({last * n // (SAMPLES - 1) for n in range(SAMPLES)}):
            hashed.update(os.pread(file, SAMPLE_BYTES, start))
    return hashed.hexdigest()


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
