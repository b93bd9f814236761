"""Which file is an array in memory a map of?

A memory map belongs to the file that it was made from, not to the one that has its name now: after
that name was replaced or removed, reading by name gives other numbers than the map.
"""

from __future__ import annotations

import os
import re

import numpy as np

_ESCAPED = re.compile(r"\\([0-7]{3})")


def mapped_file(array: np.ndarray) -> str | None:
    """Return the file of which an array, or the base of a view, is a memory map, if any."""
    base: np.ndarray | None = array
    while isinstance(base, np.ndarray):
        if isinstance(base, np.memmap) and base.filename is not None:
            return os.fspath(base.filename)
        base = base.base
    return None


def is_of_its_file(array: np.memmap) -> bool:
    """Return whether the file of a memory map still has its name.

    Linux tells this, in ``/proc``; on other systems it is always True.
    """
    shown = _shown_at(array.ctypes.data)
    if shown is None:
        return True
    assert array.filename is not None  # as it is the map of a file
    name = os.path.realpath(os.fspath(array.filename))
    try:
        return shown == name or os.path.samefile(shown, name)
    except OSError:
        return False


def _shown_at(address: int) -> str | None:
    """Return the path of the file that is mapped at an address."""
    try:
        with open("/proc/self/maps") as file:
            for line in file:
                span, _, _, _, inode, *path = line.rstrip("\n").split(maxsplit=5)
                first, last = (int(end, 16) for end in span.split("-"))
                if first <= address < last:
                    if inode == "0" or not path:
                        return None
                    return _ESCAPED.sub(lambda found: chr(int(found[1], 8)), path[0])
    except OSError:
        pass
    return None
