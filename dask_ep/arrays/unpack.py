"""How are codes of few bits unpacked, scaled by groups and rounded, in few passes?

A pass of NumPy over numbers in cache takes time in proportion to their bytes: a tenth of a
nanosecond for a float32, a quarter of that for a byte. So as much as possible is done to bytes
before they become floats, and values shared by a group are applied to long rows. A call of NumPy
takes a microsecond or more, so each processes many numbers.

Where oneDNN is installed, it converts, scales and rounds in one pass, to the same bits.
"""

from __future__ import annotations

from typing import NamedTuple

import ml_dtypes
import numpy as np

from dask_ep.arrays.onednn import installed_onednn

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

SCALED = frozenset((np.dtype(np.int8), np.dtype(np.uint8), BFLOAT16))
"""Numbers that are scaled in one pass."""

IN_CACHE = 1 << 19
"""Numbers that go through all steps together; their codes stay in a core's own cache."""

LONG = 512
"""Length of a row from which NumPy does not copy a shared value to its buffers first."""

FEW = 128
"""Size of a group up to which it is faster to repeat the shared value first."""

SMALLEST_PASS = 1 << 14
"""Numbers below which another library's pass takes less time than calling it."""


def spread_halves(codes: np.ndarray, out: np.ndarray) -> None:
    """Write the halves of bytes (n,) to bytes (2 n,), the low half first.

    Examples
    --------
    >>> import numpy as np
    >>> out = np.empty(4, np.uint8)
    >>> spread_halves(np.array([0x21, 0x43], np.uint8), out)
    >>> out
    array([1, 2, 3, 4], dtype=uint8)
    """
    pairs = out.view(np.uint16)
    pairs[...] = codes
    shifted = pairs * np.uint16(16)
    np.bitwise_or(pairs, shifted, out=pairs)
    np.bitwise_and(pairs, np.uint16(0x0F0F), out=pairs)


def apply_shared(ufunc: np.ufunc, rows: np.ndarray, values: np.ndarray, wide: int = 1) -> None:
    """Apply a ufunc to rows (r, columns) in place, with values that neighbouring numbers share.

    Parameters
    ----------
    ufunc : such as ``np.multiply``
    rows : C-contiguous, of the dtype of `values`
    values : (bands, columns / wide, rounded up), or (bands, 1)
        Each for r / bands neighbouring rows.
    wide : how many numbers of a row share a value

    Examples
    --------
    >>> import numpy as np
    >>> rows = np.ones((2, 4), np.float32)
    >>> apply_shared(np.multiply, rows, np.float32([[2, 3]]), wide=2)
    >>> rows
    array([[2., 2., 3., 3.],
           [2., 2., 3., 3.]], dtype=float32)
    """
    columns, (bands, blocks) = rows.shape[1], values.shape
    if 1 < bands < len(rows) and blocks > 1 and wide > 1:
        values, wide = np.repeat(values, wide, axis=1)[:, :columns], 1
    if values.size == 1:
        ufunc(rows, values.reshape(()), out=rows)
    elif blocks == 1 or wide == 1:
        _in_long_rows(ufunc, rows.reshape(bands, -1, columns), values[:, None])
    elif wide <= FEW and columns == blocks * wide:
        ufunc(rows, np.repeat(values, wide).reshape(-1, columns), out=rows)
    elif columns == blocks * wide:
        split = rows.reshape(len(rows), blocks, wide)
        _in_long_rows(ufunc, split, values[:, :, None])
    else:
        ufunc(rows, np.repeat(values, wide, axis=1)[:, :columns], out=rows)


def subtract_zeros(
    numbers: np.ndarray,
    zeros: np.ndarray | float,
    wide: int,
    spare: np.ndarray,
    *,
    few_bits: bool,
) -> np.ndarray:
    """Subtract zero points from whole numbers (r, columns), in spare memory, where they may be
    already.

    Parameters
    ----------
    zeros, wide : as `values` of `apply_shared`, or one for all
    spare : uint16 of as many numbers
    few_bits : whether numbers and zeros have four bits, not eight
    """
    if np.ndim(zeros) == 0 and not zeros:
        return numbers
    fits = few_bits or np.all(zeros == 128)
    kind = np.dtype(np.int8 if numbers.itemsize == 1 and fits else np.int16)
    same = numbers.itemsize == kind.itemsize
    if np.may_share_memory(numbers, spare):
        numbers = numbers.view(kind) if same else numbers.astype(kind)
    else:
        room = spare.view(kind)[: numbers.size].reshape(numbers.shape)
        room[...] = numbers.view(kind) if same else numbers
        numbers = room
    values = np.asarray(zeros, np.int16).astype(kind)
    if values.ndim == 0:
        return np.subtract(numbers, values, out=numbers)
    apply_shared(np.subtract, numbers, values, wide)
    return numbers


class Rounding(NamedTuple):
    """How products of numbers and scales are rounded to 16 bits."""

    dtype: np.dtype
    split: np.float32 | None
    #: `split_factor` of all scales
    scratch: np.ndarray
    #: float32, at least as many as there are products; the numbers may be in its first half


def scale_into(
    rows: np.ndarray,
    numbers: np.ndarray,
    values: np.ndarray,
    wide: int = 1,
    rounding: Rounding | None = None,
) -> None:
    """Write numbers of few bits, times values that neighbouring ones share.

    Parameters
    ----------
    rows : (r, columns), C-contiguous, of float32; or of bfloat16 if that holds all products, or
        they are rounded to it
    numbers : (r, columns), or `rows` itself; if products are rounded, whole numbers
    values, wide : as for `apply_shared`
    rounding : how the products are rounded, if they are

    Examples
    --------
    >>> import numpy as np
    >>> rows = np.empty((1, 4), np.float32)
    >>> scale_into(rows, np.int8([[1, 2, 3, 4]]), np.float32([[1, 10]]), wide=2)
    >>> rows
    array([[ 1.,  2., 30., 40.]], dtype=float32)
    """
    if rows.dtype == BFLOAT16:
        if not _scale_in_one_pass(rows, numbers, values, wide):
            full = np.empty(rows.shape, np.float32)
            scale_into(full, numbers, values, wide, rounding)
            rows[...] = full
        return
    if rounding is None:
        _scale(rows, numbers, values, wide)
        return
    dtype, split, scratch = rounding
    if split is not None and dtype == BFLOAT16:
        narrow = scratch.view(BFLOAT16)[scratch.size :][: rows.size].reshape(rows.shape)
        if _scale_in_one_pass(narrow, numbers, values, wide):
            _scale(rows, narrow, np.ones((1, 1), np.float32), 1)
            return
    _scale(rows, numbers, values if split is None else values * split, wide)
    round_to(rows, dtype, split, scratch[: rows.size].reshape(rows.shape))


def _scale(rows: np.ndarray, numbers: np.ndarray, values: np.ndarray, wide: int) -> None:
    if not _scale_in_one_pass(rows, numbers, values, wide):
        if numbers is not rows:
            rows[...] = numbers
        apply_shared(np.multiply, rows, values, wide)


def _scale_in_one_pass(
    rows: np.ndarray, numbers: np.ndarray, values: np.ndarray, wide: int
) -> bool:
    """Do this, to float32 or rounded to bfloat16; return False if no library here can."""
    library, (r, columns) = installed_onednn(), rows.shape
    if library is None or rows.size < SMALLEST_PASS or numbers.dtype not in SCALED:
        return False
    bands, blocks = values.shape
    if values.size > 1:
        wide = columns if blocks == 1 else wide
        if wide == 1 or columns != blocks * wide or r % bands:
            return False  # a scale for each column is as fast with NumPy
        if blocks > 1:
            numbers, rows = numbers.reshape(-1, wide), rows.reshape(-1, wide)
        values = values if bands == r else np.repeat(values, r // bands, axis=0)
    return library.scale(numbers, np.ascontiguousarray(values).reshape(-1), rows)


def _in_long_rows(ufunc: np.ufunc, rows: np.ndarray, values: np.ndarray) -> None:
    """As `apply_shared`, with values that are broadcast to the rows.

    NumPy fills its buffers with broadcast values, which takes longer than the product; it does not
    for rows that are longer than the buffers.
    """
    if rows.shape[-1] < LONG:
        ufunc(rows, values, out=rows)
        return
    usual = np.setbufsize(16)
    try:
        ufunc(rows, values, out=rows)
    finally:
        np.setbufsize(usual)


def split_factor(scales: np.ndarray, dtype: np.dtype | None) -> np.float32 | None:
    """The factor that `round_to` needs for these scales; None if it rounds in another way."""
    if dtype is None:
        return None
    least, most = (2.0**-14, 255.0) if dtype == np.float16 else (2.0**-100, 2.0**100)
    if not (scales.size and least <= scales.min() <= scales.max() <= most):
        return None
    return np.float32(1 << (13 if dtype == np.float16 else 16))


def round_to(
    rows: np.ndarray, dtype: np.dtype, split: np.float32 | None, scratch: np.ndarray
) -> None:
    """Round float32 in place to what a 16-bit dtype holds, half to even.

    Rows that come multiplied by `split` are split as by T. J. Dekker (1971): y * split + y keeps as
    many bits of y as the dtype has. If y are products of 8 and 11 bits, that is y rounded; the
    tests try all of them.
    """
    if split is None:
        with np.errstate(over="ignore"):
            rows[...] = rows.astype(dtype)
        return
    np.multiply(rows, 1 + 1 / split, out=scratch)
    np.subtract(scratch, rows, out=rows)
