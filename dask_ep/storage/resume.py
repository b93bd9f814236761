"""How is an output started, and which blocks of an earlier run count?

    no output, or overwrite ──> begin: space checked, an output without rows in ``.progress/``
    resume ──> find_good, wherever the output is ──> compute the missing blocks

A finished output of an earlier run stays in place until the new one is complete. If files of a
finished output are missing or truncated, it goes back to ``.progress/``, and its missing blocks are
computed again; if it has other rows than were written, that is an error.
"""

from __future__ import annotations

import errno
import json
import os
import uuid
import warnings
from collections.abc import Mapping
from contextlib import suppress
from itertools import accumulate, pairwise
from math import prod
from typing import Any

import dask.array as da
import numpy as np

from dask_ep.errors import ReadError
from dask_ep.storage import journal
from dask_ep.storage.files import bytes_below
from dask_ep.storage.fingerprint import fingerprint_of
from dask_ep.storage.output import fingerprint_output, free_bytes, hash_rows, progress_directory
from dask_ep.storage.replace import is_replaceable, remove
from dask_ep.storage.sources import open_source
from dask_ep.storage.writers import Writer, make_writer


def make_manifest(
    y: da.Array, inputs: Mapping[str, Any], settings: Mapping[str, Any], overwrite: bool
) -> dict[str, Any]:
    """Make the manifest that a new run of this output would have.

    Parameters
    ----------
    y, inputs, settings, overwrite : as in `store`; inputs by name, or a single one without a name,
        each a mapping or an object with a ``fingerprint()``

    Raises
    ------
    TypeError
        If settings cannot be written as JSON, or an input has no fingerprint.
    """
    manifest = {
        "format": journal.FORMAT,
        "shape": [int(length) for length in y.shape],
        "dtype": y.dtype.name,
        "rows": [int(count) for count in y.chunks[0]],
        "array": y.name,
        "inputs": {name: fingerprint_of(given) for name, given in inputs.items()},
        "settings": dict(settings),
        "overwrite": overwrite,
        "complete": False,
        "output": None,
    }
    try:
        return json.loads(json.dumps(manifest))
    except TypeError as error:
        raise TypeError(
            f"settings and fingerprints must be serializable as JSON: {error}"
        ) from error


def check_existing(path: str, resume: bool, overwrite: bool) -> None:
    """Raise if an output exists, unless it is to be resumed or overwritten."""
    if resume and overwrite:
        raise ValueError("resume and overwrite are mutually exclusive")
    began = journal.has_manifest(progress_directory(path))
    there = os.path.lexists(path)
    if there and resume and not began:
        raise FileExistsError(
            f"{path} exists, but {progress_directory(path)} does not say what it was made of, so "
            "it cannot be resumed; overwrite it, or write elsewhere"
        )
    if (there or began) and not (resume or overwrite):
        what = "exists" if there else "was begun by an earlier run"
        raise FileExistsError(
            f"{path} {what}; --resume continues it, --overwrite starts again (in Python: "
            "resume=True, overwrite=True), or write elsewhere"
        )
    if there and overwrite and not is_replaceable(path):
        raise FileExistsError(
            f"{path} is a directory but not a Zarr array, so it is not overwritten; write elsewhere"
        )
    if there and overwrite and not began and not _holds_an_array(path):
        raise FileExistsError(
            f"{path} does not hold one array, as an output does, so it is not overwritten; remove "
            "it first, or write elsewhere"
        )


def _holds_an_array(path: str) -> bool:
    try:
        open_source(path)
    except (OSError, ValueError, TypeError, ImportError):
        return False
    return True


def begin(
    y: da.Array, path: str, wanted: dict[str, Any], compressors: Any = None
) -> tuple[Writer, dict[str, Any]]:
    """Create an output without rows, and remove the files of an unfinished run.

    An output at `path` is kept.
    """
    directory = progress_directory(path)
    manifest = wanted | {"run": uuid.uuid4().hex[:12]}
    writer = _open_writer(manifest, _partial(path, manifest), compressors)
    if compressors is None:
        check_space(path, y, set(), bytes_below(directory))
    try:
        writer.create()  # may raise: nothing has been removed yet
    except BaseException:
        remove(writer.path)
        raise
    for name in os.listdir(directory):
        if name not in ("lock", "manifest.json", os.path.basename(writer.path)):
            remove(os.path.join(directory, name))
    journal.write_manifest(directory, manifest)
    return writer, manifest


def continue_output(
    y: da.Array, path: str, manifest: dict[str, Any], wanted: dict[str, Any], compressors: Any
) -> tuple[Writer, dict[str, Any]]:
    """Continue the output of an earlier run, if that had the same inputs and settings.

    Raises
    ------
    ValueError
        If it had others; the message says what differs.
    FileExistsError
        If what is at `path` is not what that run wrote.
    """
    differences = journal.describe_differences(manifest, wanted)
    if differences:
        more = f"; and {len(differences) - 8} more" if len(differences) > 8 else ""
        raise ValueError(
            f"{path} cannot be resumed, since inputs or settings have changed: "
            f"{'; '.join(differences[:8])}{more}. Overwrite it, or write elsewhere"
        )
    directory, partial = progress_directory(path), _partial(path, manifest)
    for name in os.listdir(directory):  # files of a run that was stopped when it began to overwrite
        if name.startswith("partial-") and name != os.path.basename(partial):
            remove(os.path.join(directory, name))
    done = find_good(path, manifest)
    if not (done or os.path.exists(partial)):
        overwrite = manifest["overwrite"] or os.path.lexists(path)  # none of its blocks are left
        return begin(y, path, wanted | {"overwrite": overwrite}, compressors)
    writer = _open_writer(manifest, partial, compressors)
    if os.path.exists(partial):
        writer.tidy()
        if manifest["complete"] or not done:
            manifest |= {"complete": False, "output": None} | ({} if done else {"array": y.name})
            journal.write_manifest(directory, manifest)
        if compressors is None:
            check_space(path, y, set(done))
    elif len(done) < len(manifest["rows"]):  # what was complete is unfinished again
        journal.keep_done(directory, manifest["run"], done)
        os.rename(path, partial)
        manifest |= {"complete": False, "output": None}
        journal.write_manifest(directory, manifest)
    else:  # complete; or stopped between the rename and the manifest, or copied since
        found = fingerprint_output(path)
        if not manifest["complete"] or manifest["output"] != found:
            journal.write_complete(directory, manifest, found)
    _warn_of_another_array(path, y, manifest, wanted)
    return writer, manifest


def find_good(path: str, manifest: Mapping[str, Any]) -> dict[int, str]:
    """Find the existing blocks of an output, finished or not.

    Parameters
    ----------
    path : of the output
    manifest : of the run that wrote it

    Returns
    -------
    dict : block -> hash of its rows

    Raises
    ------
    FileExistsError
        If what is at `path` is not what that run wrote.

    Notes
    -----
    For an unfinished output, the journal and the sizes of its files decide; for a finished one, the
    sizes and modification times of its files. If these have changed, its rows are read.
    """
    digests = journal.read_digests(progress_directory(path), manifest["run"])
    partial = _open_writer(manifest, _partial(path, manifest))
    spans = list(pairwise(accumulate(manifest["rows"], initial=0)))
    if os.path.exists(partial.path):
        return {b: digests[b] for b in sorted(digests) if partial.holds(*spans[b])}
    if not os.path.lexists(path):
        return {}
    if manifest["complete"]:
        with suppress(OSError, ValueError, TypeError):  # it may not be an array any more
            if json.loads(json.dumps(fingerprint_output(path))) == manifest["output"]:
                return digests
    return _compare_rows(path, _open_writer(manifest, path), spans, digests)


def _compare_rows(
    path: str, writer: Writer, spans: list[tuple[int, int]], digests: Mapping[int, str]
) -> dict[int, str]:
    """Return the existing blocks of a finished output; raise if one has other rows."""
    other = f"{path} is not what its run wrote, and cannot be resumed: "
    instead = "Overwrite it, or write elsewhere"
    if not writer.fits():
        raise FileExistsError(f"{other}it is of another format, shape or dtype. {instead}")
    good = {}
    for block in sorted(digests):
        start, stop = spans[block]
        if not writer.holds(start, stop):
            continue
        try:
            rows = writer.read(start, stop)
        except ReadError:
            continue  # damaged, and computed again
        if hash_rows(rows) != digests[block]:
            raise FileExistsError(f"{other}rows [{start}, {stop}) have other values. {instead}")
        good[block] = digests[block]
    return good


def _warn_of_another_array(
    path: str, y: da.Array, manifest: Mapping[str, Any], wanted: Mapping[str, Any]
) -> None:
    told_by_name = not (wanted["inputs"] or wanted["settings"])
    if told_by_name and manifest.get("array", y.name) != y.name:
        warnings.warn(
            f"{path} was begun from an array of another name, and without inputs or settings "
            "nothing shows whether this is the same: finished blocks are kept. Pass inputs or "
            "settings to store, or overwrite it",
            stacklevel=4,
        )


def _partial(path: str, manifest: Mapping[str, Any]) -> str:
    """Return the path of an output while it is incomplete."""
    kind = os.path.splitext(path)[1]
    return os.path.join(progress_directory(path), f"partial-{manifest['run']}{kind}")


def _open_writer(manifest: Mapping[str, Any], place: str, compressors: Any = None) -> Writer:
    return make_writer(
        place,
        tuple(manifest["shape"]),
        np.dtype(manifest["dtype"]),
        manifest["rows"],
        compressors,
        manifest.get("stored_rows"),
    )


def check_space(path: str, y: da.Array, done: set[int], freed: int = 0) -> None:
    """Raise if the disk has too little space; not for compressed outputs, which may need less."""
    rows = [count for block, count in enumerate(y.chunks[0]) if block not in done]
    needed = sum(rows) * prod(y.shape[1:]) * y.dtype.itemsize
    free = free_bytes(progress_directory(path)) + freed
    if needed > free:
        old = bytes_below(path)
        stays = f"; the old output, {old} bytes, stays until the new one is complete" if old else ""
        raise OSError(
            errno.ENOSPC,
            f"not enough space for the {len(rows)} missing blocks of {path}: they need {needed} "
            f"bytes, {free} are free{stays}. Free some space, or write elsewhere",
        )
