"""What are the scales and zero points of quantized matrices?

Both are Sources of float32, (block rows, block columns), over the form in a file: floats, powers of
two, or integers packed into words.
"""

from __future__ import annotations

from math import prod
from typing import Any

import ml_dtypes
import numpy as np

from dask_ep.arrays.checks import is_float
from dask_ep.arrays.namespaces import Array
from dask_ep.errors import ReadError
from dask_ep.experts.codings import FLOAT8, coding
from dask_ep.storage.source import Derived
from dask_ep.storage.sources import ArraySource, Source

E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)
"""Powers of two: the exponent plus 127. Files may declare it as uint8."""

POWERS = np.append(np.ldexp(np.float32(1), np.arange(255, dtype=np.int32) - 127), np.float32("nan"))
"""[256] the values of such scales."""


class ScaleSource(Derived):
    """Scales as float32.

    Parameters
    ----------
    stored : Source of floats, or of uint8 or float8_e8m0fnu, which are powers of two
    shape : ((e,) block rows, block columns)
        Axes of length one may be missing in `stored`: one scale for all has no axes, one per row
        has one.
    factor : Source of one number that multiplies every scale, or divides it if `divides`
    of : the matrix, for messages

    Raises
    ------
    ValueError
        If `stored` has another shape.
    TypeError
        If `stored` has another dtype.
    """

    def __init__(
        self,
        stored: Source,
        shape: tuple[int, ...],
        factor: Source | None = None,
        divides: bool = False,
        of: str = "the matrix",
    ):
        if not is_float(stored.dtype) and stored.dtype != np.uint8:
            raise TypeError(
                f"{stored.name} must hold scales, floats or exponents of 8 bits, but has dtype "
                f"{stored.dtype}"
            )
        long = [n for n in shape if n != 1] == [n for n in stored.shape if n != 1]
        if stored.shape != shape and not (long and stored.ndim < len(shape)):
            raise ValueError(
                f"{stored.name} must have one scale per block of {of}, so {shape}, but has shape "
                f"{stored.shape}"
            )
        if factor is not None and prod(factor.shape) != 1:
            raise ValueError(f"{factor.name} must be one number, but has shape {factor.shape}")
        super().__init__(stored, shape)
        self.factor, self.divides = factor, divides

    @property
    def are_powers(self) -> bool:
        """Whether all are powers of two."""
        return self.stored.dtype in (np.uint8, E8M0) and self.factor is None

    @property
    def nbytes(self) -> int:
        return self.stored.nbytes + (0 if self.factor is None else self.factor.nbytes)

    def read(self, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        out = self._destination(start, stop, out)
        scales = self._read_stored(start, stop)
        if self.stored.dtype in (np.uint8, E8M0):
            bits = np.left_shift(self._exponents(scales), 23, dtype=np.int32)
            out[...] = np.maximum(bits, 1 << 22, out=bits).view(np.float32)  # 2**-127 for 0
        elif self.stored.dtype in FLOAT8:
            coding(self.stored.dtype.name).decode(scales, out, np.empty(0, np.uint16))
        else:
            out[...] = scales
        if not np.isfinite(out).all():
            raise ReadError(f"{self.name} holds a scale that is NaN or infinite")
        if self.factor is not None:
            factor = self.factor.read(0, 1).astype(np.float32).reshape(())
            if not (np.isfinite(factor) and factor > 0):
                raise ReadError(f"{self.factor.name} must be a number above 0, but is {factor}")
            (np.divide if self.divides else np.multiply)(out, factor, out=out)
        return out

    def on_device(self, xp: Any, start: int, stop: int) -> Array:
        """The same on a device; powers of two are copied as they are stored."""
        if not self.are_powers:
            return xp.asarray(self.read(start, stop))
        exponents = xp.asarray(self._exponents(self._read_stored(start, stop)))
        return xp.take(xp.asarray(POWERS), exponents.reshape(-1)).reshape(exponents.shape)

    def held(self, start: int, stop: int) -> ScaleSource:
        """The same scales [start, stop) in memory, as they are stored."""
        stored = ArraySource(self._read_stored(start, stop), self.name)
        factor = None
        if self.factor is not None:
            factor = ArraySource(self.factor.read(0, 1), self.factor.name)
        return ScaleSource(stored, stored.shape, factor, self.divides)

    def _read_stored(self, start: int, stop: int) -> np.ndarray:
        if self.stored.shape == self.shape:
            return self.stored.read(start, stop)
        rows = self.stored.shape[0] if self.stored.shape else 1
        return self.stored.read(0, rows).reshape(self.shape)[start:stop]

    def _exponents(self, scales: np.ndarray) -> np.ndarray:
        exponents = scales.view(np.uint8)
        if (exponents == 255).any():
            raise ReadError(f"{self.name} holds the scale 255, which stands for NaN")
        return exponents

    def fingerprint(self) -> dict[str, Any]:
        factor = {} if self.factor is None else {"factor": self.factor.fingerprint()}
        return super().fingerprint() | {"divides": self.divides} | factor


class ZeroPoints(Derived):
    """Zero points that are packed into words like codes, as float32.

    Parameters
    ----------
    stored : Source (r, w)
    coding : str, how they are packed, see `dask_ep.experts.codings.coding`
    shape : of the zero points; anything after them is padding
    more, mask : a zero point is ``(code + more) & mask``

    Raises
    ------
    ValueError
        If `stored` does not hold that many.
    TypeError
        If `stored` does not hold integers of 32 bits.
    """

    def __init__(
        self, stored: Source, coding: str, shape: tuple[int, ...], more: int = 0, mask: int = 255
    ):
        super().__init__(stored, shape)
        self.coding, self.more, self.mask = coding, more, mask
        self._check()

    def _check(self) -> None:
        if self.stored.dtype not in (np.int32, np.uint32):
            raise TypeError(
                f"{self.name} must hold zero points in words of 32 bits, but has dtype "
                f"{self.stored.dtype}"
            )
        codes = coding(self.coding)
        in_a_word = codes.width(1, self.stored.dtype)
        words = (-(-self.shape[0] // codes.rows), -(-self.shape[1] // in_a_word))
        if self.stored.shape != words:
            raise ValueError(
                f"{self.name} must hold {self.shape} zero points, so {words} words, but has shape "
                f"{self.stored.shape}"
            )

    def read(self, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        out = self._destination(start, stop, out)
        codes = coding(self.coding)
        first, last = start // codes.rows, -(-stop // codes.rows)
        width = codes.width(self.stored.shape[1], self.stored.dtype)
        shape = ((last - first) * codes.rows, width)
        room = np.empty(shape, np.float32), np.empty(prod(shape), np.uint16)
        numbers = codes.decode(self.stored.read(first, last), *room).reshape(shape)
        if self.more:
            numbers = (numbers.astype(np.int32) + self.more) & self.mask
        out[...] = numbers[start - first * codes.rows :][: stop - start, : self.shape[1]]
        return out

    def held(self, start: int, stop: int) -> ZeroPoints:
        """All zero points in memory, as they are stored."""
        stored = ArraySource(self.stored.read(0, self.stored.shape[0]), self.name)
        return ZeroPoints(stored, self.coding, self.shape, self.more, self.mask)

    def fingerprint(self) -> dict[str, Any]:
        how = {"coding": self.coding, "more": self.more, "mask": self.mask}
        return super().fingerprint() | how
