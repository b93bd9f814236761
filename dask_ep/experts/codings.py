"""How are numbers of a few bits decoded?

A `Coding` turns rows of stored bytes or words into rows of numbers. Scales and zero points are
applied elsewhere, see `quantized`.

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
from dask_ep.arrays.unpack import spread_halves

FLOAT8 = tuple(
    np.dtype(t) for t in (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.float8_e4m3)
)

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
E2M1 = np.concatenate([E2M1, -E2M1])
"""Values of the 16 four-bit numbers: a sign bit and three more."""

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Positions in a word, from the lowest bits, of the first, second, ... number of a row."""

SMALLEST, ONE = np.float32(2.0**-149), np.float32(1)

DECODE_STEP = 1 << 16
"""Codes that are looked up at a time: their indices, 8 bytes each, stay in cache."""


Decode = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""(stored rows (r, w), float32 array (r * rows, numbers of w) to fill, uint16 scratch of as many
numbers) -> the array, or the same numbers in fewer bytes, possibly in the scratch, in any shape."""


class Coding(NamedTuple):
    """How numbers are stored.

    Attributes
    ----------
    decode : see `Decode`
    table : [256, n] float32, the numbers of each byte
    rows : how many rows of numbers are in one row as stored
    order : of the numbers in a word of 4 bytes, if it is not their order in the row
    small : a faster `decode`, whose numbers still have to be multiplied by a power of two
    """

    decode: Decode
    table: np.ndarray
    rows: int = 1
    order: tuple[int, ...] | None = None
    small: tuple[Decode, np.float32] | None = None

    def with_scales(self, scales: np.ndarray) -> tuple[Decode, np.ndarray]:
        """How to decode numbers that are scaled afterwards, and the scales to use.

        `small` is not used on a thread that flushes numbers below 2**-126 to 0, nor if the factor
        would make scales overflow.
        """
        if self.small is None or SMALLEST * ONE == 0:
            return self.decode, scales
        decode, factor = self.small
        with np.errstate(over="ignore"):
            more = scales * factor
        return (decode, more) if np.isfinite(more).all() else (self.decode, scales)

    def width(self, stored: int, dtype: np.dtype) -> int:
        """Numbers in a row that is stored as `stored` elements of a dtype."""
        return stored * dtype.itemsize * self.table.shape[1] // self.rows

    def arranged(self, codes: Array, xp: Any) -> Array:
        """Decode bytes (r, w, 4 or 1) to (r * rows, ...) in any namespace, by table lookup."""
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
        return Coding(lambda stored, out, spare: stored.reshape(-1).view(name), values)
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
        small = _decode_float4, np.float32(2.0**126)
        return Coding(partial(_look_up, two_bytes(table)), table, small=small)
    dtype = np.dtype(getattr(ml_dtypes, name))
    values = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)[:, None]
    form = Float8.of(dtype, values)
    decode = partial(_look_up, form.table)
    return Coding(decode, values, small=(partial(_decode_float8, form), form.factor))


def _both_halves(values: np.ndarray) -> np.ndarray:
    """[256, 2] the numbers in a byte, the low half first."""
    byte = np.arange(256)
    return np.stack([values[byte & 15], values[byte >> 4]], axis=1)


# --- on the host --------------------------------------------------------------------------------


def two_bytes(table: np.ndarray) -> np.ndarray:
    """[65536, 2 n] the numbers of two neighbouring bytes, from the table of one byte [256, n]."""
    codes = np.arange(1 << 16, dtype=np.uint16).view(np.uint8)
    return table[codes].reshape(1 << 16, -1)


def _look_up(
    table: np.ndarray, stored: np.ndarray, out: np.ndarray, spare: np.ndarray
) -> np.ndarray:
    """Look up two bytes at a time, and the last one alone if their number is odd.

    In runs, because NumPy first widens all indices to 8 bytes.
    """
    codes, numbers = stored.reshape(-1).view(np.uint8), out.reshape(-1, table.shape[1] // 2)
    even = len(codes) // 2 * 2
    pairs, flat = codes[:even].view(np.uint16), numbers[:even].reshape(-1, table.shape[1])
    for start in range(0, len(pairs), DECODE_STEP):
        part = slice(start, start + DECODE_STEP)
        np.take(table, pairs[part].astype(np.intp), axis=0, out=flat[part], mode="clip")
    numbers[even:] = table[codes[even:], : table.shape[1] // 2]
    return out


class Float8(NamedTuple):
    """Parameters to convert 8-bit floats: their bits, shifted, are a bfloat16, times a factor."""

    shift: int
    #: bits to shift to the left
    mask: int
    #: sign, exponent and fraction of the bfloat16
    factor: np.float32
    special: int
    #: the first code that is infinite or NaN
    table: np.ndarray
    #: lookup table of two bytes

    @classmethod
    def of(cls, dtype: np.dtype, values: np.ndarray) -> Float8:
        info = ml_dtypes.finfo(dtype)
        shift = 7 - info.nmant
        special = int(np.flatnonzero(~np.isfinite(values[:128, 0]))[0])
        factor = np.float32(2.0 ** (126 + info.minexp))
        return cls(shift, 0x8000 | 0x7F << shift, factor, special, two_bytes(values))


def _decode_float8(
    form: Float8, stored: np.ndarray, out: np.ndarray, spare: np.ndarray
) -> np.ndarray:
    """Shift the bits; if there are infinities or NaN, look all numbers up instead."""
    codes = stored.reshape(-1).view(np.int8)
    largest = codes.max(initial=0), codes.view(np.uint8).max(initial=0)
    if largest[0] >= form.special or largest[1] >= 128 + form.special:
        return np.divide(_look_up(form.table, stored, out, spare), form.factor, out=out)
    np.copyto(spare.view(np.int16), codes)
    np.multiply(spare, np.uint16(1 << form.shift), out=spare)
    np.bitwise_and(spare, np.uint16(form.mask), out=spare)
    return spare.view(ml_dtypes.bfloat16)


def _decode_float4(stored: np.ndarray, out: np.ndarray, spare: np.ndarray) -> np.ndarray:
    """Shift the bits of both halves of each byte to those of two bfloat16, times 2**-126."""
    codes = stored.reshape(-1).view(np.uint8)
    words = spare.view(np.uint32)
    words[...] = codes
    np.multiply(words, np.uint32(1 | 1 << 12), out=words)
    np.bitwise_and(words, np.uint32(0x000F000F), out=words)
    np.multiply(words, np.uint32(1 << 6 | 1 << 12), out=words)  # exponent and fraction, and sign
    np.bitwise_and(words, np.uint32(0x81C081C0), out=words)
    return spare.view(ml_dtypes.bfloat16)


def _decode_uint4(stored: np.ndarray, out: np.ndarray, spare: np.ndarray) -> np.ndarray:
    numbers = spare.view(np.uint8)[: out.size]
    spread_halves(stored.reshape(-1).view(np.uint8), numbers)
    return numbers


def _decode_awq(stored: np.ndarray, out: np.ndarray, spare: np.ndarray) -> np.ndarray:
    """Interleave the halves of each word, then decode as numbers in order.

    H. S. Warren, Hacker's Delight, section 7-2, of four bits at a time.
    """
    words, swapped = _two_of(stored, out)
    for shift, mask in ((8, 0x0000FF00), (4, 0x00F000F0)):
        np.right_shift(words, np.uint32(shift), out=swapped)
        swapped ^= words
        swapped &= np.uint32(mask)
        words ^= swapped
        swapped <<= np.uint32(shift)
        words ^= swapped
    return _decode_uint4(words, out, spare)


def _two_of(stored: np.ndarray, out: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A copy of words, and room for as many, at the end of memory that numbers are written to."""
    words = stored.reshape(-1).view(np.uint32)
    copied, more = out.reshape(-1).view(np.uint32)[-2 * len(words) :].reshape(2, -1)
    copied[...] = words
    return copied, more


def _decode_rows(bits: int, stored: np.ndarray, out: np.ndarray, spare: np.ndarray) -> np.ndarray:
    """Decode all rows of each byte of the words together: bytes are shifted faster than words."""
    words, rows = _two_of(stored, out)[0].reshape(len(stored), -1), 8 // bits
    numbers = spare.view(np.uint8)[: out.size].reshape(len(words), 4, rows, words.shape[1])
    for i in range(4):
        numbers[:, i, -1] = words  # the lowest byte
        words >>= np.uint32(8)
    if bits == 4:
        np.bitwise_and(numbers[:, :, 1], np.uint8(15), out=numbers[:, :, 0])
        np.right_shift(numbers[:, :, 1], np.uint8(4), out=numbers[:, :, 1])
    return numbers
