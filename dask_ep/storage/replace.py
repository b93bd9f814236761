"""How does a new file or directory take the place of an old one?

The old one is kept until the new one is complete, and is restored if the replacement fails or is
interrupted.
"""

from __future__ import annotations

import os
import shutil

from dask_ep.storage.zarr_layout import zarr_metadata

ASIDE = "replaced"
"""Name of the old directory between the two renames."""


def replace(new: str, path: str, directory: str) -> None:
    """Rename `new` to `path`, and remove what was there.

    Parameters
    ----------
    new, path : files or directories on one file system
    directory : where to keep the old one for a moment, since one call cannot replace a directory
    """
    if not os.path.isdir(path) and not (os.path.isdir(new) and os.path.lexists(path)):
        os.replace(new, path)
        return
    aside = os.path.join(directory, ASIDE)
    remove(aside)
    os.rename(path, aside)
    try:
        os.rename(new, path)
    except BaseException:
        os.rename(aside, path)
        raise
    remove(aside)


def restore(path: str, directory: str) -> None:
    """Undo an interrupted `replace`: rename the old file back, unless its name is in use."""
    aside = os.path.join(directory, ASIDE)
    if os.path.lexists(aside) and not os.path.lexists(path):
        os.rename(aside, path)


def remove(path: str) -> None:
    """Remove a file, a link or a directory, if it exists."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    elif os.path.lexists(path):
        os.unlink(path)


def is_replaceable(path: str) -> bool:
    """Return whether an output may replace what is there: only files and Zarr arrays."""
    if not os.path.isdir(path):
        return True
    try:
        return zarr_metadata(path)["node_type"] == "array"
    except (OSError, ValueError, KeyError):
        return os.path.exists(os.path.join(path, ".zarray"))
