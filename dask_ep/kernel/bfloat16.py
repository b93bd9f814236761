"""How do 16-bit products give the accuracy of float32?

bfloat16 numbers are exact factors of a product that sums in float32. A float32 number is the sum of
three of them, each with 8 of its 24 significant bits:

    x (m, d) float32  =  high + middle + low          bfloat16, by cutting bits off: nothing is lost
    x @ w             =  low @ w + middle @ w + high @ w         w (d, f) bfloat16, sums in float32

So tokens and weights of bfloat16 are multiplied once, and an expert's intermediate results, which
are float32, three times. With matrix instructions (AMX) that is still several times faster than one
product in float32. With AVX512-BF16, which is twice as fast as float32, it pays only for few rows;
more are multiplied by a float32 copy of the matrix, made for this product. Parts that are all zero
are left out: float16 has two, and float32 that came from bfloat16 one.

Those instructions flush numbers below 2**-126 to 0. A row where that would show, because all its
values are tiny, or a row that holds an infinity or NaN, is multiplied in float32.
"""

from __future__ import annotations

import numpy as np

from dask_ep.arrays import blas, memory
from dask_ep.arrays.blas import product
from dask_ep.arrays.onednn_kernels import BFLOAT16, Matrix, Packed

PARTS = {"float32": 3, "bfloat16": 1}
"""By `precision`: how many bfloat16 numbers represent a float32 number in a product. One is rounded
to nearest, as in the model itself; three are exact."""

SMALLEST, LARGEST = 2.0**-40, 2.0**127
"""Bounds of the largest value of a row, and of a matrix. What is lost below 2**-126 is then at most
2**-46 of the largest product, and rounding to 8 bits does not overflow."""

SPLIT_ROWS = 32
"""Rows from which a float32 copy of a matrix costs less than two more products; see
`blas.splitting_pays`."""

STEP = 1 << 16
"""Numbers that are checked together: they stay in cache from one step to the next."""


def serves(w: Matrix) -> bool:
    """Whether products with a matrix use 16 bits: by its dtype, its values, library and CPU."""
    if isinstance(w, Packed):
        return w.dtype == BFLOAT16
    if not isinstance(w, np.ndarray) or w.dtype != BFLOAT16 or blas.bfloat16_library() is None:
        return False
    largest = _largest(w).max(initial=0)
    return bool(largest == 0 or SMALLEST <= largest <= LARGEST)


def narrowed(w: np.ndarray) -> np.ndarray:
    """Return float32 weights as bfloat16 if that is exact and products are faster; else unchanged.

    Examples
    --------
    >>> import numpy as np
    >>> narrowed(np.array([[1 / 3]], np.float32)).dtype
    dtype('float32')
    """
    if w.dtype != np.float32 or not w.flags.c_contiguous or blas.bfloat16_library() is None:
        return w
    bits = w.reshape(-1).view(np.uint32)
    set_somewhere = (
        np.bitwise_or.reduce(bits[start : start + STEP]) for start in range(0, len(bits), STEP)
    )
    if any(some & np.uint32(0xFFFF) for some in set_somewhere):
        return w
    out = memory.empty(w.shape, np.uint16)
    out.reshape(-1)[...] = bits.view(np.uint16)[1::2]
    return out.view(BFLOAT16)


def multiply(
    x: np.ndarray, w: Matrix, out: np.ndarray | None = None, precision: str = "float32"
) -> np.ndarray:
    """Multiply x (m, d) by w (d, f) in 16 bits, summing in float32.

    Parameters
    ----------
    x : bfloat16 or float32
    w : bfloat16, for which `serves` is true
    out : (m, f) float32, optional
    precision : "float32" or "bfloat16"
        With "bfloat16", a float32 `x` is rounded instead of split.

    Returns
    -------
    (m, f) float32; `out` if given

    Notes
    -----
    A row is multiplied in float32 if its values are infinite, NaN or all tiny, see `SMALLEST`.
    """
    if out is None:
        out = memory.empty((len(x), w.shape[1]), np.float32)
    if 0 in (*x.shape, w.shape[1]):
        out[...] = 0
        return out
    is_exact = x.dtype == BFLOAT16 or PARTS[precision] == 1
    if not is_exact and len(x) >= SPLIT_ROWS and not blas.splitting_pays():
        return product(x, wide(w), out)
    parts, largest = ([x], _largest(x)) if x.dtype == BFLOAT16 else _split(x, PARTS[precision])
    apart = _rows_apart(largest)
    if len(apart) < len(x):
        _add_products(parts, w, out)
    if len(apart):
        out[apart] = product(x[apart].astype(np.float32), wide(w))
    return out


def has_rows_apart(x: np.ndarray) -> bool:
    """Whether any rows of (m, d) bfloat16 are multiplied in float32, see `multiply`."""
    return len(_rows_apart(_largest(x))) > 0


def multiplied_by(dtype: np.dtype, is_bfloat16: bool, precision: str = "float32") -> str:
    """Describe what multiplies on this machine: the library, and the accuracy of 16-bit products.

    Parameters
    ----------
    dtype : of the tokens
    is_bfloat16 : whether the experts' matrices are
    precision : of the experts
    """
    library = blas.bfloat16_library()
    if not is_bfloat16 or dtype == np.float64 or library is None:
        return blas.multiplies_by()
    return f"{library} in 16 bits, {'rounded' if PARTS[precision] == 1 else 'as exact as float32'}"


def copies(dtype: np.dtype, is_bfloat16: bool, precision: str = "float32") -> bool:
    """Whether threads copy matrices to float32 for some products. See `multiplied_by`."""
    is_narrow = is_bfloat16 and dtype != np.float64 and blas.bfloat16_library() is not None
    return is_narrow and PARTS[precision] > 1 and not blas.splitting_pays()


def _rows_apart(largest: np.ndarray) -> np.ndarray:
    """Row numbers of the rows to multiply in float32, by the largest magnitude of each row."""
    return np.flatnonzero(~((largest == 0) | (largest >= SMALLEST) & (largest <= LARGEST)))


def _add_products(parts: list[np.ndarray], w: Matrix, out: np.ndarray) -> None:
    """Write the sum of the products to `out`, the smallest first."""
    library = blas.bfloat16_library()
    assert library is not None  # `serves` has checked
    for n, part in enumerate(reversed(parts)):
        if not library.multiply(part, w, out, add=n > 0):
            y = product(part.astype(np.float32), wide(w))
            out[...] = y + out if n > 0 else y


def wide(w: Matrix) -> np.ndarray:
    """A copy of a matrix of bfloat16 in float32."""
    library = blas.bfloat16_library()
    assert library is not None
    return library.widened(w)


def _split(x: np.ndarray, count: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Parts of float32 rows, the largest first, and the largest magnitude of each row.

    Parts that are all zero are left out, except the first.
    """
    parts, largest = memory.empty((count, *x.shape), np.uint16), np.empty(len(x), np.float32)
    runs = memory.runs_in_cache(x)
    scratch = np.empty((2, *x[runs[0]].shape), np.float32)
    # inf - inf is NaN, and large values overflow bfloat16: such rows are multiplied in float32.
    with np.errstate(invalid="ignore", over="ignore"):
        for run in runs:
            rows = x[run]
            largest[run] = _largest(rows)
            if count == 1:
                parts[0, run].view(BFLOAT16)[...] = rows
            else:
                _cut(rows, parts[:, run], scratch[:, : len(rows)])
    every = [part.view(BFLOAT16) for part in parts]
    return [every[0], *(part for part in every[1:] if part.view(np.uint16).any())], largest


def _cut(rows: np.ndarray, parts: np.ndarray, scratch: np.ndarray) -> None:
    """Write the high halves of numbers to a part, and split the remainder for the next one."""
    rest, high = scratch
    for n, part in enumerate(parts):
        bits = rows.view(np.uint32)
        np.right_shift(bits, 16, out=part, casting="unsafe")
        if n + 1 < len(parts):
            np.bitwise_and(bits, np.uint32(0xFFFF0000), out=high.view(np.uint32))
            rows = np.subtract(rows, high, out=rest)


def _largest(x: np.ndarray) -> np.ndarray:
    """The largest magnitude in each row (m, d), as float32; NaN if the row holds one.

    As integers, numbers of one sign are ordered by magnitude, NaN above all.
    """
    signed, unsigned = (np.int16, np.uint16) if x.dtype == BFLOAT16 else (np.int32, np.uint32)
    magnitude = np.iinfo(signed).max
    positive = x.view(signed).max(axis=-1, initial=0).astype(unsigned)
    # The sign bit is the highest, so that the largest is negative if any is.
    negative = x.view(unsigned).max(axis=-1, initial=0) & unsigned(magnitude)
    return np.maximum(positive, negative).view(x.dtype).astype(np.float32)
