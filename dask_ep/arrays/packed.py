"""How are codes of few bits unpacked, and groups of numbers scaled, in few passes of NumPy?

A pass over numbers that stay in a core's cache costs as much as its bytes: a tenth of a nanosecond
for a float32, a quarter of that for a byte. So what can be done to bytes is done before they become
floats, and what numbers of a group share reaches them in long rows.
"""

from __future__ import annotations

import numpy as np

IN_CACHE = 1 << 16
"""Numbers that go through all steps together."""

LONG = 512
"""Numbers of a row from which a shared value is not copied to NumPy's buffers first."""

FEW = 64
"""Numbers of a group up to which it is faster to repeat their shared value first."""


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
    """Change rows (r, columns) in place by what their numbers share.

    Parameters
    ----------
    ufunc : such as ``np.multiply``
    rows : float32, C-contiguous
    values : (r or 1, columns / wide, rounded up), or (r or 1, 1)
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
    columns, blocks = rows.shape[1], values.shape[1]
    if blocks == 1 or wide == 1:
        _in_long_rows(ufunc, rows, values)
    elif wide <= FEW and wide % 4 == 0 and columns == blocks * wide:
        fours = np.repeat(np.ascontiguousarray(values).reshape(-1), 4).view(np.complex128)
        ufunc(rows, np.repeat(fours, wide // 4).view(np.float32).reshape(-1, columns), out=rows)
    elif columns == blocks * wide:
        split = rows.reshape(len(rows), blocks, wide)
        _in_long_rows(ufunc, split, values[:, :, None])
    else:
        ufunc(rows, np.repeat(values, wide, axis=1)[:, :columns], out=rows)


def _in_long_rows(ufunc: np.ufunc, rows: np.ndarray, values: np.ndarray) -> None:
    """The same on rows that values are broadcast to.

    NumPy fills its buffers with broadcast values, which takes longer than the product; rows that
    are longer than the buffers it leaves alone.
    """
    if rows.shape[-1] < LONG:
        ufunc(rows, values, out=rows)
        return
    usual = np.setbufsize(16)
    try:
        ufunc(rows, values, out=rows)
    finally:
        np.setbufsize(usual)
