"""Which real text is on every machine, and how does it become token rows?

It is the words of the sources of Python's standard library, file after file, sorted by name. Their
frequencies follow Zipf's law, as in any text, so that a router sends more rows to some experts than
to others, which uniform noise would not show.

    word of the text ──hash──> row of a table        what the word is
    its file, and how often the text was begun       what the text is about
    its place                                        where it stands

A token row is the sum of the three vectors. When the text ends it begins again, with other file
vectors: rows of two passes are alike, not equal.
"""

from __future__ import annotations

import os
import re
import sysconfig
import zlib
from collections.abc import Iterator

import numpy as np

TABLE_BYTES = 32 << 20
"""Bytes of the table of word vectors, which has between 4096 and 32768 rows."""

PLACES = 1024
"""Rows after which the place vectors repeat."""

_WORD = re.compile(rb"[A-Za-z_]\w*")
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_FILE_SHARE, _PLACE_SHARE = 0.5, 0.1  # lengths of those vectors; a word's vector has length 1


class WordIds(dict):
    """Map words to rows of the table by checksum: the same on every machine and in any order.

    Examples
    --------
    >>> ids = WordIds(4096)
    >>> ids[b"self"] == ids[b"self"], 0 <= ids[b"yield"] < 4096
    (True, True)
    """

    def __init__(self, table_rows: int):
        super().__init__()
        self._table_rows = table_rows

    def __missing__(self, word: bytes) -> int:
        self[word] = zlib.crc32(word) % self._table_rows
        return self[word]


def find_files() -> list[str]:
    """Return the standard library's sources in a fixed order, without tests and installed packages.

    Raises
    ------
    FileNotFoundError
        If the standard library is installed without its sources.
    """
    root = sysconfig.get_path("stdlib")
    files = []
    for directory, below, names in os.walk(root):
        below[:] = sorted(set(below) - _LEFT_OUT)
        files += [os.path.join(directory, name) for name in sorted(names) if name.endswith(".py")]
    if not files:
        raise FileNotFoundError(
            f"the words of the example come from the Python sources in {root}, but there is no "
            ".py file; use a Python that is installed with its sources"
        )
    return files


class TokenRows:
    """An endless text as token rows, read from front to back in bounded memory.

    Parameters
    ----------
    d : int, width of the rows
    seed : int, of the vectors; the text is always the same

    Examples
    --------
    >>> rows = np.empty((100, 8), np.float32)
    >>> TokenRows(8, seed=0).fill(rows)
    >>> bool(np.abs(rows).max() < 10)
    True
    """

    def __init__(self, d: int, seed: int):
        self._d, self._seed = d, seed
        table_rows = min(max(TABLE_BYTES // (4 * d), 4096), 32768)
        self._words = self._vectors(0, table_rows, 1.0)
        self._places = self._vectors(1, PLACES, _PLACE_SHARE)
        self._row = 0
        self._pieces = self._read(WordIds(table_rows))
        self._ids, self._file = np.empty(0, np.int64), np.empty(d, np.float32)

    def fill(self, out: np.ndarray) -> None:
        """Write the next len(out) rows into the float32 array `out` (m, d)."""
        done = 0
        while done < len(out):
            if len(self._ids) == 0:
                self._ids, self._file = next(self._pieces)
            place = self._row % PLACES
            m = min(len(out) - done, len(self._ids), PLACES - place)
            rows = out[done : done + m]
            np.take(self._words, self._ids[:m], axis=0, out=rows, mode="clip")
            rows += self._file
            rows += self._places[place : place + m]
            self._ids = self._ids[m:]
            self._row += m
            done += m

    def _read(self, word_ids: WordIds) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield the word ids and the vector of each file, without end."""
        files = find_files()
        number = 0
        while True:
            for path in files:
                with open(path, "rb") as file:
                    words = _WORD.findall(file.read())
                ids = np.fromiter(map(word_ids.__getitem__, words), np.int64, len(words))
                yield ids, self._vectors(2 + number, 1, _FILE_SHARE)[0]
                number += 1

    def _vectors(self, stream: int, count: int, length: float) -> np.ndarray:
        """Draw (count, d) float32 vectors, of this length times sqrt(d) like hidden states."""
        random = np.random.Generator(np.random.Philox(key=[self._seed, stream]))
        vectors = random.standard_normal((count, self._d), dtype=np.float32)
        vectors *= np.float32(length)
        return vectors
