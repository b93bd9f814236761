"""How does a new file or directory take the place of an old one?

The old one stays until the new one is whole, and comes back if the exchange fails or is cut short.
"""

from __future__ import annotations

import os
import shutil

from dask_ep.storage.zarr_layout import zarr_metadata

ASIDE = "replaced"
"""What an old directory is called for the moment between two renames."""


def replace(new: str, path: str, directory: str) -> None:
    """Rename `new` to `path`, and remove what was there.

    Parameters
    ----------
    new, path : files or directories on one file system
    directory : where the old one is for a moment, since directories are not replaced by one call
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
    """Undo a stopped `replace`: rename the old file back, if nothing else is there."""
    aside = os.path.join(directory, ASIDE)
    if os.path.lexists(aside) and not os.path.lexists(path):
        os.rename(aside, path)


def remove(path: str) -> None:
    """Remove a file, a link or a directory; nothing where there is none."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    elif os.path.lexists(path):
        os.unlink(path)


def is_replaceable(path: str) -> bool:
    """Whether an output may take the place of what is there: of files and Zarr arrays alone."""
    if not os.path.isdir(path):
        return True
    try:
        return zarr_metadata(path)["node_type"] == "array"
    except (OSError, ValueError, KeyError):
        return os.path.exists(os.path.join(path, ".zarray"))
