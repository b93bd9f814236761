"""Which blocks of an output are done, from which inputs, and which process writes it?

This is recorded in a directory next to the output:

    y.zarr.progress/
      manifest.json          shape, dtype, row blocks, inputs, settings; replaced as a whole
      done-<host>-<pid>      one line per finished block, with a hash of its rows, appended by the
                             process that wrote it
      lock                   the process that writes the output; empty if none does
      partial-<run>.zarr     the output itself until it is complete (see `storage`)

Every process appends to its own file, with one write per line, so that nothing is ever overwritten,
not even on network file systems. A line counts if it is complete, has the right checksum, and
belongs to this manifest's run; if a line is torn, its block is computed again.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from dask_ep.errors import OutputInUse
from dask_ep.storage.files import descriptor, named, replacing, sync_path

FORMAT = 2
"""Version of the manifest and the lines; other versions are refused."""


MANIFEST: dict[str, type | tuple[type, ...]] = {
    "format": int,
    **dict.fromkeys(("shape", "rows"), list),
    **dict.fromkeys(("dtype", "run"), str),
    **dict.fromkeys(("inputs", "settings"), dict),
    **dict.fromkeys(("overwrite", "complete"), bool),
    "output": (dict, type(None)),
}
"""Keys of a manifest, and their types. "output" is the fingerprint of a complete output."""

HOLDER = frozenset(("pid", "host", "born", "since"))
"""What a lock records about the process that holds it."""


def write_manifest(directory: str, manifest: Mapping[str, Any]) -> None:
    """Replace the manifest atomically: readers see the old one or the new one."""
    path = os.path.join(directory, "manifest.json")
    with replacing(path) as new, open(new, "w") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    sync_path(directory)


def write_complete(directory: str, manifest: dict[str, Any], output: Mapping[str, Any]) -> None:
    """Record in the manifest that the output is complete, and its fingerprint."""
    manifest |= {"complete": True, "output": json.loads(json.dumps(output))}
    write_manifest(directory, manifest)


def has_manifest(directory: str) -> bool:
    """Return whether there is a manifest, readable or not."""
    return os.path.lexists(os.path.join(directory, "manifest.json"))


def read_manifest(directory: str) -> dict[str, Any] | None:
    """Read the manifest, None if there is none.

    Raises
    ------
    ValueError
        If it has another format version or is not a manifest.
    """
    path = os.path.join(directory, "manifest.json")
    try:
        with open(path) as file:
            manifest = json.load(file)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(
            f"{path} is not a manifest: {error}; start again with overwrite"
        ) from error
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise ValueError(
            f"{path} must have format {FORMAT}, not {found!r}: it was written by another version. "
            "Finish the run with that version, or start again with overwrite"
        )
    if wrong := _find_wrong(manifest):
        raise ValueError(f"{path} is not a manifest: {wrong}; start again with overwrite")
    return manifest


def _find_wrong(manifest: Mapping[str, Any]) -> str | None:
    """Say which entry is missing, or is not what is written there; None if all are good."""
    if missing := MANIFEST.keys() - manifest.keys():
        return f"it lacks {', '.join(sorted(missing))}"
    for key, kind in MANIFEST.items():
        value = manifest[key]
        numbers = value if isinstance(value, list) else []
        if not isinstance(value, kind) or not all(type(n) is int and n >= 0 for n in numbers):
            return f"{key} is {_shorten(repr(value))}"
    if sum(manifest["rows"]) != (manifest["shape"] or [-1])[0]:
        return f"its blocks have {sum(manifest['rows'])} rows, and its shape is {manifest['shape']}"
    return None


def record_done(
    directory: str,
    run: str,
    block: int,
    digest: str = "",
    *,
    sync: bool = False,
    what: str = "done",
) -> None:
    """Record that a block is done, with a hash of its rows; its data must have been written.

    With a word other than "done", the line is written to files of that name.
    """
    name = f"{what}-{socket.gethostname()}-{os.getpid()}"
    # The leading line break ends a torn line of an earlier process with the same number.
    line = b"\n" + _line(run, block, digest)
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    with descriptor(os.path.join(directory, name), flags, sync) as file:
        if os.write(file, line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)


def read_done(directory: str, run: str) -> set[int]:
    """Return the blocks that are done according to the lines of this run."""
    return set(read_digests(directory, run))


def read_digests(directory: str, run: str) -> dict[int, str]:
    """Return the hash of the rows of each block that is done according to this run's lines."""
    return dict(_read_lines(directory, run, "done"))


def keep_done(directory: str, run: str, digests: Mapping[int, str]) -> None:
    """Mark exactly these blocks as done; only while nothing writes."""
    kept = os.path.join(directory, "kept")
    with open(kept, "wb") as file:
        file.writelines(_line(run, block, digest) for block, digest in digests.items())
        file.flush()
        os.fsync(file.fileno())
    for name in os.listdir(directory):
        if name.startswith("done-"):
            os.unlink(os.path.join(directory, name))
    os.replace(kept, os.path.join(directory, "done-kept"))


def count_done(directory: str, run: str, what: str = "done") -> Counter[int]:
    """Count the lines of this run for each block."""
    return Counter(block for block, _ in _read_lines(directory, run, what))


def describe_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Describe what differs between two manifests, in the part that a resumed run must keep.

    Examples
    --------
    >>> old = {"inputs": {"tokens": {"size": 80, "shape": [10, 2]}}, "settings": {"world_size": 4}}
    >>> new = {"inputs": {"tokens": {"size": 96, "shape": [12, 2]}}, "settings": {"world_size": 4}}
    >>> describe_differences(old, new)
    ['input tokens: size was 80, is 96', 'input tokens: shape was [10, 2], is [12, 2]']
    >>> old, new = ({"inputs": {"layer": {"router": {"k": k}}}} for k in (2, 1))
    >>> describe_differences(old, new)
    ['input layer: router.k was 2, is 1']
    """
    words = []
    for key in ("shape", "dtype", "rows"):
        words += _compare(f"output {key}", old.get(key), new.get(key))
    before, now = old.get("inputs", {}), new.get("inputs", {})
    for name in [*before, *(name for name in now if name not in before)]:
        if name not in now:
            words.append(f"input {name} is missing now")
        elif name not in before:
            words.append(f"input {name} is new")
        else:
            found = _compare(f"input {name}: ", before[name], now[name])
            # Keys of a config explain other differences; the layer is the same if only they differ.
            by_config = f"input {name}: config."
            words += [] if all(word.startswith(by_config) for word in found) else found
    return words + _compare("setting ", old.get("settings", {}), new.get("settings", {}))


def acquire_lock(directory: str) -> None:
    """Become the only process that writes this output.

    Raises
    ------
    OutputInUse
        If another process holds the lock: a live one on this host, or any on another host, where
        it cannot be seen whether it is alive. The lock of a dead process of this host is replaced.
    """
    path = os.path.join(directory, "lock")
    with _open_lock(directory) as file:
        try:
            holder = _read_holder(file)
        except ValueError as error:
            raise OutputInUse(
                f"{path} is damaged and does not say which process writes this output. Check that "
                "none does, on any machine that can write here; then remove this one file, and run "
                "the command again with --resume"
            ) from error
        if holder is not None and _may_be_alive(holder):
            raise OutputInUse(
                f"process {holder['pid']} on {holder['host']} has been writing this output since "
                f"{holder['since']}; wait for it or stop it. If that process is gone, remove {path}"
            )
        file.seek(0)
        file.truncate()
        file.write(json.dumps(_this_process()))


def release_lock(directory: str) -> None:
    """Release the lock, if this process holds it."""
    with contextlib.suppress(FileNotFoundError), _open_lock(directory, create=False) as file:
        holder, mine = None, _this_process()
        with contextlib.suppress(ValueError):  # the owner of a damaged lock is unknown
            holder = _read_holder(file)
        if holder is not None and all(holder[k] == mine[k] for k in ("pid", "host", "born")):
            file.seek(0)
            file.truncate()


def _line(run: str, block: int, digest: str) -> bytes:
    text = f"{run} {block} {digest}".encode()
    return b"%s %08x\n" % (text, zlib.crc32(text))


def _read_lines(directory: str, run: str, what: str) -> Iterator[tuple[int, str]]:
    """Return the block and the hash of each whole line of this run."""
    for name in os.listdir(directory):
        if not name.startswith(f"{what}-"):
            continue
        with open(os.path.join(directory, name), "rb") as file:
            lines = file.read().split(b"\n")
        for line in lines:
            content, _, checksum = line.rpartition(b" ")
            if content and checksum == b"%08x" % zlib.crc32(content):
                owner, block, digest = content.decode().split(" ")
                if owner == run:
                    yield int(block), digest


def _compare(what: str, old: Any, new: Any) -> list[str]:
    """Say how two values differ; for mappings, each entry by its dotted name."""
    if old == new:
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        dot = "" if what.endswith(" ") else "."
        pairs = [_compare(f"{what}{dot}{key}", old.get(key), new.get(key)) for key in keys]
        return [words for found in pairs for words in found]
    if what.endswith("mtime_ns") and isinstance(old, int) and isinstance(new, int):
        old, new = _clock(old), _clock(new)
    old, new = ("absent" if value is None else _shorten(value) for value in (old, new))
    return [f"{what} was {old}, is {new}"]


def _shorten(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 100 else f"{text[:60]} ... {text[-30:]}"


def _clock(ns: int) -> str:
    seconds, rest = divmod(ns, 10**9)
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds)) + f".{rest:09d}"


@contextlib.contextmanager
def _open_lock(directory: str, create: bool = True) -> Iterator[Any]:
    """Open the lock file so that no other process reads or changes it.

    The file is never removed, only emptied, so that two processes cannot hold two different files.
    """
    path = os.path.join(directory, "lock")
    file = os.fdopen(os.open(path, os.O_RDWR | (os.O_CREAT if create else 0), 0o666), "r+")
    with named(path), file:
        with contextlib.suppress(OSError):  # without file locks the content still counts
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file
        file.flush()


def _read_holder(file: Any) -> dict[str, Any] | None:
    """Return who holds the lock, None if no process does; ValueError if that is unclear."""
    holder = json.loads(file.read() or "null")
    if holder is not None and not (isinstance(holder, dict) and holder.keys() >= HOLDER):
        raise ValueError(f"a lock says {sorted(HOLDER)}, not {holder!r}")
    return holder


def _this_process() -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "born": _birth(os.getpid()),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _may_be_alive(holder: Mapping[str, Any]) -> bool:
    if holder["host"] != socket.gethostname():
        return True
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's process
    return _birth(holder["pid"]) == holder["born"]  # otherwise a newer process has its number


def _birth(pid: int) -> str | None:
    """Return when a process started, in the system's units; None if the system does not tell."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[19].decode()
    except OSError:
        return None
