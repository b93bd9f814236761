"""As what numbers are rows multiplied by a matrix, on a device?

    x (m, d)  ──>  x itself, x rounded, or (p, m, d) bfloat16 of which x is the sum

What `bfloat16` does on the host, but parts that are zero throughout are not left out: to know it
the device would have to be waited for.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dask_ep.arrays.checks import computing_dtype
from dask_ep.arrays.namespaces import Array, namespace
from dask_ep.kernel.bfloat16 import BFLOAT16, PARTS


class Factors(NamedTuple):
    """As what rows go into a product: (m, d) of a dtype, or (p, m, d) of which they are the sum."""

    dtype: np.dtype
    parts: int = 1

    @property
    def nbytes(self) -> int:
        """Bytes of a number."""
        return self.parts * self.dtype.itemsize

    def empty(self, m: int, width: int, like: Array) -> Array:
        """Room for m rows."""
        shape = (m, width) if self.parts == 1 else (self.parts, m, width)
        return namespace(like).empty(shape, dtype=self.dtype)


def factors(numbers: np.dtype, matrix: np.dtype, precision: str) -> Factors:
    """As what numbers of a dtype are multiplied by a matrix of a dtype on a device.

    As they are, where the matrix has their dtype; by a matrix of 16 bits otherwise rounded to it,
    or split, as `precision` says (`bfloat16.PARTS`). What cannot be split, because the matrix is
    float16, is multiplied in the computing dtype, for which the matrix is converted.

    Examples
    --------
    >>> import ml_dtypes
    >>> one = factors(np.dtype("f4"), np.dtype(ml_dtypes.bfloat16), "float32")
    >>> one.parts, one.nbytes
    (3, 6)
    """
    wide = computing_dtype(numbers)
    if numbers == matrix:
        return Factors(matrix)
    if matrix.itemsize > 2 or wide == np.float64:
        return Factors(wide)
    if PARTS[precision] == 1:
        return Factors(matrix)
    return Factors(matrix, PARTS[precision]) if matrix == BFLOAT16 else Factors(wide)


def multiplied_on_gpus(
    dtype: np.dtype, is_bfloat16: bool, precision: str = "float32", tf32: bool = False
) -> str:
    """Say what multiplies on GPUs, as `bfloat16.multiplied_by` does for the host.

    Parameters
    ----------
    dtype : of the tokens
    is_bfloat16 : whether the experts' matrices are
    precision : of the experts
    tf32 : whether experts multiply float32 as TF32
    """
    rounds = PARTS[precision] == 1
    if dtype != np.float64 and (is_bfloat16 or (rounds and dtype.itemsize == 2)):
        return f"cuBLAS in 16 bits, {'rounded' if rounds else 'as exact as float32'}"
    return "cuBLAS, as TF32" if tf32 and dtype != np.float64 else "cuBLAS"


def write(values: Array, out: Array) -> None:
    """Write values (m, width), as wide as sums are, to `out`: rounded, or in parts (p, m, width),
    each with the next 8 bits of what is left.

    Of infinity and NaN nothing is left after the first.
    """
    if out.ndim == values.ndim:
        out[...] = values.astype(out.dtype, copy=False)
        return
    xp = namespace(values)
    for part in out:
        high = (values.view(np.uint32) & np.uint32(0xFFFF0000)).view(values.dtype)
        finite = xp.isfinite(values)
        part[...] = xp.where(finite, high, values).astype(part.dtype)
        values = xp.where(finite, values - high, values.dtype.type(0))
