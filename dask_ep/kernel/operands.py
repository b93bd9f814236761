"""In which dtype, and in how many parts, are rows multiplied by a matrix on a device?

    x (m, d)  ──>  x itself, x rounded, or (p, m, d) bfloat16, whose sum is x

As `bfloat16` does on the host, but parts that are all zero are not left out: to know that, the host
would have to wait for the device.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dask_ep.arrays.checks import computing_dtype
from dask_ep.arrays.namespaces import Array, namespace
from dask_ep.kernel.bfloat16 import BFLOAT16, PARTS


class Factors(NamedTuple):
    """How rows enter a product: (m, d) of a dtype, or parts (p, m, d) that add up to them."""

    dtype: np.dtype
    parts: int = 1

    @property
    def nbytes(self) -> int:
        """Bytes of one number, all parts together."""
        return self.parts * self.dtype.itemsize

    def empty(self, m: int, width: int, like: Array) -> Array:
        """An uninitialised array for m rows."""
        shape = (m, width) if self.parts == 1 else (self.parts, m, width)
        return namespace(like).empty(shape, dtype=self.dtype)


def factors(numbers: np.dtype, matrix: np.dtype, precision: str) -> Factors:
    """The factors as which numbers of a dtype are multiplied by a matrix of a dtype on a device.

    Unchanged if the matrix has their dtype; for another matrix of 16 bits, rounded to it or split,
    by `precision` (`bfloat16.PARTS`). Numbers cannot be split for a float16 matrix, which is
    converted to the computing dtype instead.

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
    """Describe what multiplies on GPUs, as `bfloat16.multiplied_by` does for the host.

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
    """Write values (m, width), in the dtype of sums, to `out`: rounded, or in parts (p, m, width),
    each with the next 8 bits of the remainder.

    The remainder of infinity and NaN is 0.
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
