"""Which file does an array in memory show?

A memory map is the file that it was made of, not the one that has its name now: after a rename over
that name, or a removal, reading by name gives other numbers than the map.
"""

from __future__ import annotations

import os
import re

import numpy as np

_ESCAPED = re.compile(r"\\([0-7]{3})")


def mapped_file(array: np.ndarray) -> str | None:
    """Return the file of which an array, or what it is a view of, is a memory map, if it is one."""
    base: np.ndarray | None = array
    while isinstance(base, np.ndarray):
        if isinstance(base, np.memmap) and base.filename is not None:
            return os.fspath(base.filename)
        base = base.base
    return None


def is_of_its_file(array: np.memmap) -> bool:
    """Whether the file that a memory map was made of still has its name.

    As far as the system says (Linux does, in ``/proc``); elsewhere True.
    """
    shown = _shown_at(array.ctypes.data)
    if shown is None:
        return True
    assert array.filename is not None  # a map of a file knows it
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
