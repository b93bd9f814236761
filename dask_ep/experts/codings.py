"""How do a few bits become a number?

A `Coding` turns rows of stored bytes or words into rows of float32. Scales and zero points are not
its matter; see `quantized`.

    float8      one byte a number                      int8, uint8   the same
    fp4, uint4  two in a byte, the low half first      awq           eight in a word, in this order:
    column4, column8                                                 0 4 1 5 2 6 3 7
                a word has 8 or 4 numbers of a column, the first one lowest
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from dask_ep.arrays.namespaces import Array

FLOAT8 = tuple(
    np.dtype(t) for t in (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.float8_e4m3)
)

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
E2M1 = np.concatenate([E2M1, -E2M1])
"""Values of the 16 four-bit numbers: a sign bit and three more."""

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Which number of a word, counted from the lowest bits, is the first, second, ... of a row."""

DECODE_STEP = 1 << 14
"""Codes that are looked up at once: their indices, 8 bytes each, stay in cache."""


class Coding(NamedTuple):
    """How numbers are stored.

    Attributes
    ----------
    decode : rows as stored (r, w), out float32 (r * rows, numbers of w) -> None
    table : [256, n] float32, the numbers of each byte
    rows : how many rows of numbers are in one row as stored
    order : of the numbers in a word of 4 bytes, where that is not theirs in the row
    """

    decode: Callable[[np.ndarray, np.ndarray], None]
    table: np.ndarray
    rows: int = 1
    order: tuple[int, ...] | None = None

    def width(self, stored: int, dtype: np.dtype) -> int:
        """Numbers in a row that is stored as `stored` elements of a dtype."""
        return stored * dtype.itemsize * self.table.shape[1] // self.rows

    def arranged(self, codes: Array, xp: Any) -> Array:
        """Decode bytes (r, w, 4 or 1) anywhere, without a host's fast ways: (r * rows, ...)."""
        numbers = xp.take(xp.asarray(self.table), codes.reshape(-1), axis=0)
        if self.order is not None:
            numbers = numbers.reshape(-1, 8)[:, list(self.order)]
        if self.rows > 1:
            numbers = numbers.reshape(codes.shape[0], -1, self.rows).transpose(0, 2, 1)
        return numbers.reshape(codes.shape[0] * self.rows, -1)


@cache
def coding(name: str) -> Coding:
    """Return a coding by the name of a dtype, or "fp4", "uint4", "awq", "column4" or "column8"."""
    if name in ("int8", "uint8"):
        values = np.arange(256, dtype=np.uint8).view(name).astype(np.float32)[:, None]
        return Coding(partial(_copy, name), values)
    if name == "column8":
        return Coding(partial(_decode_rows, 8), coding("uint8").table, 4)
    halves = np.arange(16, dtype=np.float32)
    if name in ("uint4", "awq", "column4"):
        table = _both_halves(halves)
        if name == "uint4":
            return Coding(_decode_uint4, table)
        if name == "awq":
            return Coding(_decode_awq, table, order=AWQ_ORDER)
        return Coding(partial(_decode_rows, 4), table, 8)
    if name == "fp4":
        table = _both_halves(E2M1)
        return Coding(partial(_look_up, table.reshape(-1).view(np.uint64)), table)
    dtype = np.dtype(getattr(ml_dtypes, name))
    values = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)[:, None]
    return Coding(partial(_decode_float8, dtype), values)


def _both_halves(values: np.ndarray) -> np.ndarray:
    """[256, 2] the numbers in a byte, the low half first."""
    byte = np.arange(256)
    return np.stack([values[byte & 15], values[byte >> 4]], axis=1)


# --- on the host --------------------------------------------------------------------------------


def look_up_codes(table: np.ndarray, codes: np.ndarray, out: np.ndarray) -> None:
    """Write ``table[codes]`` to `out`; all are one-dimensional.

    Notes
    -----
    In steps, because NumPy widens all indices to 8 bytes first. With two values a look-up, a matrix
    of 15 million FP8 numbers takes 15 ms on one core, and 171 ms by ``astype`` and the scales.
    """
    indices = np.empty(min(DECODE_STEP, len(codes)), np.intp)
    for start in range(0, len(codes), DECODE_STEP):
        part = indices[: len(codes) - start]
        part[...] = codes[start : start + DECODE_STEP]
        np.take(table, part, out=out[start : start + DECODE_STEP], mode="clip")


@cache
def float8_pairs(dtype: np.dtype) -> np.ndarray:
    """[65536] the values of two bytes that lie side by side, as the 8 bytes of two float32."""
    values = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)
    codes = np.arange(1 << 16, dtype=np.uint16).view(np.uint8)
    return values[codes].view(np.uint64)


def _decode_float8(dtype: np.dtype, stored: np.ndarray, out: np.ndarray) -> None:
    """Two bytes at a time, and the last by itself if they are odd in number."""
    codes, flat = stored.reshape(-1), out.reshape(-1)
    even = len(codes) // 2 * 2
    pairs = codes[:even].view(np.uint8).view(np.uint16)
    look_up_codes(float8_pairs(dtype), pairs, flat[:even].view(np.uint64))
    flat[even:] = codes[even:].view(dtype)


def _look_up(table: np.ndarray, stored: np.ndarray, out: np.ndarray) -> None:
    look_up_codes(table, stored.reshape(-1).view(np.uint8), out.reshape(-1).view(np.uint64))


def _copy(dtype: str, stored: np.ndarray, out: np.ndarray) -> None:
    out.reshape(-1)[...] = stored.reshape(-1).view(dtype)


def _decode_uint4(stored: np.ndarray, out: np.ndarray) -> None:
    """Spread each byte to two, all of them at once; bytes are as numbers of 16 bits."""
    codes, numbers = stored.reshape(-1).view(np.uint8), out.reshape(-1, 2)
    halves, shifted = np.empty((2, min(DECODE_STEP, len(codes))), np.uint16)
    for start in range(0, len(codes), DECODE_STEP):
        part = codes[start : start + DECODE_STEP]
        pairs, high = halves[: len(part)], shifted[: len(part)]
        pairs[...] = part
        np.left_shift(pairs, 4, out=high)
        np.bitwise_or(pairs, high, out=pairs)
        np.bitwise_and(pairs, 0x0F0F, out=pairs)
        numbers[start : start + len(part)].reshape(-1)[...] = pairs.view(np.uint8)


def _decode_awq(stored: np.ndarray, out: np.ndarray) -> None:
    """Shuffle the halves of each word together, and go on as with numbers in their order.

    H. S. Warren, Hacker's Delight, section 7-2, of four bits at a time.
    """
    words = stored.reshape(-1).view(np.uint32)
    for shift, mask in ((8, 0x0000FF00), (4, 0x00F000F0)):
        swapped = words >> np.uint32(shift)
        swapped ^= words
        swapped &= np.uint32(mask)
        words = words ^ swapped
        swapped <<= np.uint32(shift)
        words ^= swapped
    _decode_uint4(words, out)


def _decode_rows(bits: int, stored: np.ndarray, out: np.ndarray) -> None:
    words, rows = np.ascontiguousarray(stored).view(np.uint32), 32 // bits
    numbers, part = out.reshape(len(words), rows, -1), np.empty(words.shape, np.uint32)
    for place in range(rows):
        np.right_shift(words, np.uint32(bits * place), out=part)
        np.bitwise_and(part, np.uint32((1 << bits) - 1), out=part)
        numbers[:, place] = part.view(np.int32)  # which becomes a float faster
