"""What does a ``.npy`` file hold, and where do its bytes begin?

The format is NumPy's own (``numpy.lib.format``); files that cannot be read by ranges of rows are
errors.
"""

from __future__ import annotations

from math import prod
from tokenize import TokenError
from typing import Any, BinaryIO

import numpy as np

_READERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def parse_npy_header(
    file: BinaryIO, path: str, dtype: Any = None
) -> tuple[tuple[int, ...], np.dtype, int]:
    """Read the header, and nothing else, of a file that is open at its first byte.

    Parameters
    ----------
    file, path : `path` is for messages
    dtype : dtype of raw bytes, as which ``np.save`` stores bfloat16, for example

    Returns
    -------
    shape, dtype as stored, and the number of bytes before the first element

    Raises
    ------
    ValueError
        If it is not a ``.npy`` file, or its rows are not contiguous.
    TypeError
        If it does not hold `dtype`.

    Examples
    --------
    >>> import io
    >>> file = io.BytesIO()
    >>> np.save(file, np.zeros((3, 2), np.float32))
    >>> _ = file.seek(0)
    >>> parse_npy_header(file, "x.npy")
    ((3, 2), dtype('float32'), 128)
    """
    try:
        version = np.lib.format.read_magic(file)
        if version not in _READERS:
            raise ValueError("its format has version {}.{}, not 1.0 or 2.0".format(*version))
        shape, fortran_order, stored = _READERS[version](file)
    except (ValueError, TokenError) as error:
        raise ValueError(f"{path} is not a .npy file of numbers: {error}") from error
    if fortran_order and prod(shape) > max(shape, default=1):
        raise ValueError(
            f"{path} is in Fortran order, so its rows are not contiguous; save it in C order: "
            "np.save(path, np.ascontiguousarray(array))"
        )
    if dtype is not None:
        dtype = np.dtype(dtype)
        if stored.kind == "V" and stored.itemsize == dtype.itemsize:
            stored = dtype
        elif stored != dtype:
            raise TypeError(f"{path} holds {stored}, not {dtype}")
    return shape, stored, file.tell()
