"""How is an array read in another order than it is stored in?

A `Source` over a `Source`: only the wanted rows are read.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dask_ep.arrays.checks import computing_dtype
from dask_ep.storage.source import Derived, Source


class View(Derived):
    """A source whose numbers are those of another."""

    def fingerprint(self) -> dict[str, Any]:
        return self.stored.fingerprint() | {"shape": list(self.shape), "seen": type(self).__name__}


class Transposed(View):
    """A matrix (n, m) as (m, n); each read reads all of it.

    Examples
    --------
    >>> from dask_ep.storage.sources import open_source
    >>> Transposed(open_source(np.arange(6).reshape(2, 3))).read(1, 3)
    array([[1, 4],
           [2, 5]])
    """

    def __init__(self, source: Source):
        super().__init__(source, source.shape[::-1], source.dtype)

    def read(self, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        out = self._destination(start, stop, out)
        out[...] = self.stored.read(0, self.stored.shape[0])[:, start:stop].T
        return out


class FirstRow(View):
    """The first row of a matrix (n, m), as (1, m)."""

    def __init__(self, source: Source):
        super().__init__(source, (1, source.shape[1]), source.dtype)

    def read(self, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        self._shape_of(start, stop)
        return self.stored.read(start, stop, out)


class Repeated(View):
    """An array plus a number, as each of n along a first axis; in float32 if it has 16 bits.

    Examples
    --------
    >>> from dask_ep.storage.sources import open_source
    >>> Repeated(open_source(np.arange(3.0)), 4, plus=1).read(2, 4)
    array([[1., 2., 3.],
           [1., 2., 3.]])
    """

    def __init__(self, source: Source, n: int, *, plus: float):
        super().__init__(source, (n, *source.shape), computing_dtype(source.dtype))
        self.plus = plus

    def read(self, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        out = self._destination(start, stop, out)
        out[...] = self.stored.read(0, self.stored.shape[0])
        out += self.plus
        return out

    def fingerprint(self) -> dict[str, Any]:
        return super().fingerprint() | {"plus": self.plus}


class Regrouped(View):
    """A matrix (E * n, m) as (E, n, m); as (E, m, n) if `turned`.

    Examples
    --------
    >>> from dask_ep.storage.sources import open_source
    >>> rows = open_source(np.arange(12).reshape(4, 3))
    >>> Regrouped(rows, 2).read(1, 2)
    array([[[ 6,  7,  8],
            [ 9, 10, 11]]])
    >>> Regrouped(rows, 2, turned=True).read(1, 2)
    array([[[ 6,  9],
            [ 7, 10],
            [ 8, 11]]])
    """

    def __init__(self, source: Source, groups: int, *, turned: bool = False):
        self.rows, self.turned = source.shape[0] // groups, turned
        one = (self.rows, source.shape[1])
        super().__init__(source, (groups, *(one[::-1] if turned else one)), source.dtype)

    def read(self, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        out = self._destination(start, stop, out)
        read = self.stored.read(start * self.rows, stop * self.rows)
        read = read.reshape(stop - start, self.rows, self.stored.shape[1])
        out[...] = read.swapaxes(1, 2) if self.turned else read
        return out

    def fingerprint(self) -> dict[str, Any]:
        return super().fingerprint() | {"turned": self.turned}
