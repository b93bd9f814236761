"""How are many matrices multiplied on a GPU?

By cuBLAS, called directly: for bfloat16 because CuPy (since 14.0) multiplies two such matrices, but
not many; for all dtypes because an expert's product is short, and must not wait until its array is
allocated.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from dask_ep.arrays.namespaces import Array

STREAMS = 4
"""Concurrent products: enough to fill the gaps at the end of each."""

SUMS_IN_FLOAT32 = 16
"""cuBLAS's CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION, for which CuPy 14.2 has no name."""

TERMS = 512
"""Terms of 16 bits that tensor cores add up at a time where a sum must be as exact as in float32.
They round it towards zero each time they add some (Fasi et al., "Numerical behavior of NVIDIA
tensor cores", 2021), so that the errors add up; what is added to an output is rounded to nearest.
Largest errors of products of 768, 2048, 4096 and 14336 terms, of their largest value, with 16 terms
added at a time in NumPy: 8e-7, 8e-7, 7e-7, 6e-7; all terms at a time 1.2e-6, 3e-6, 6e-6, 2e-5; one
after the other in float32 6e-7, 9e-7, 1.3e-6, 4e-6."""

BFLOAT16_CAPABILITY = 80
"""The first compute capability that multiplies bfloat16: Ampere."""

TF32_SWITCH = "DASK_EP_TF32"
"""Environment variable that is 1 if float32 experts multiply as TF32. CuPy's own, CUPY_TF32, would
apply to routers too, and so send rows to other experts."""

CUDA_TYPES = {
    "float16": "CUDA_R_16F",
    "bfloat16": "CUDA_R_16BF",
    "float32": "CUDA_R_32F",
    "float64": "CUDA_R_64F",
}


class Gemms:
    """Products of many matrices on a device: cuBLAS through CuPy, on several streams.

    Notes
    -----
    - float16 and bfloat16: 16-bit numbers multiplied on tensor cores, added up in float32, and
      written as float32, or rounded once where `out` has 16 bits: sums of parts, which cuBLAS may
      otherwise keep in the dtype of the output, are float32 by its math mode. CuPy's own product of
      bfloat16 (14.0 on, with ml_dtypes) is the same call, ``gemmEx`` with ``CUDA_R_16BF`` and
      ``CUBLAS_COMPUTE_32F``, but gives 16 bits and no other, costs some microseconds more of the
      host for each product, and makes an array of each matrix.
    - Rows in parts, whose sum they are, are multiplied part by part, the smallest first, each added
      to what is there: by the same stream, and without room for another output.
    - float32: in float32, or as TF32 if the environment says so (`TF32_SWITCH`).
    - Matrices of another dtype than the rows are converted for the call, all of them at a time.
    - cuBLAS promises the same bits each time if a handle works on one stream, so that each stream
      here has its own handle (NVIDIA's documentation of cuBLAS, "Results reproducibility").
    - CuPy 14.2 wraps no grouped product of cuBLAS, and of the batched ones those with equal strides
      only: they serve where all experts have as many rows (`device_kernel.PADDED_ROWS`), and their
      matrices are at equal distances, as those of loaded experts do.
    """

    def __init__(self, xp: Any):
        self._xp, self._cublas = xp, xp.cuda.cublas
        self._capability = int(xp.cuda.Device().compute_capability)
        self._streams = [xp.cuda.Stream(non_blocking=True) for _ in range(STREAMS)]
        self._handles = [self._cublas.create() for _ in self._streams]
        self._own = self._cublas.create()  # for the compute stream
        for handle in (*self._handles, self._own):
            self._cublas.setMathMode(handle, SUMS_IN_FLOAT32)
        self._lock = threading.Lock()  # a handle serves one thread at a time
        wide = ("float32", "float64")
        self._ones = {name: np.ones(1, name) for name in wide}
        self._zeros = {name: np.zeros(1, name) for name in wide}

    def __call__(
        self,
        rows: Array,
        matrices: Sequence[Array],
        bounds: Sequence[tuple[int, int]],
        out: Array,
        exact: bool = False,
    ) -> None:
        """``out[start:stop] = rows[start:stop] @ matrix`` of each; rows and out row by row.

        Rows (m, d), or parts (p, m, d) that add up to them. With `exact`, sums of 16-bit numbers
        are as exact as those of float32; then `out` is float32.
        """
        compute, calls = self._xp.cuda.get_current_stream(), []
        parts = [rows] if rows.ndim == 2 else list(rows)[::-1]  # the smallest part first
        matrices = [self._as_read(matrix, rows.dtype) for matrix in matrices]
        terms = TERMS if exact and rows.dtype.itemsize == 2 else len(matrices[0]) or 1
        if (stride := _equal_stride(matrices, bounds)) is not None:
            self._multiply_all_at_once(parts, matrices, bounds, out, stride, terms)
            return
        for matrix, (start, stop) in zip(matrices, bounds, strict=True):
            if stop > start:
                calls.append((matrix, start, stop))
        calls.sort(key=lambda call: call[1] - call[2])  # the longest first: they end together
        used = self._streams[: len(calls)]
        with self._lock:
            ready = compute.record()
            for stream in used:
                stream.wait_event(ready)
            for nth, (matrix, start, stop) in enumerate(calls):
                with used[nth % len(used)]:  # cuBLAS takes the stream in use
                    for arguments in self._each(parts, matrix, out, start, stop, terms):
                        self._cublas.gemmEx(self._handles[nth % len(used)], *arguments)
            for stream in used:
                compute.wait_event(stream.record())

    def _multiply_all_at_once(
        self,
        parts: list[Array],
        matrices: Sequence[Array],
        bounds: Sequence[tuple[int, int]],
        out: Array,
        stride: int,
        terms: int,
    ) -> None:
        itemsize = parts[0].dtype.itemsize
        with self._lock:
            for arguments in self._each(parts, matrices[0], out, *bounds[0], terms):
                op, other, n, m, k, one, W, kind, ld, x, _, ldx, beta, y, made, ldy, *how = (
                    arguments
                )
                self._cublas.gemmStridedBatchedEx(
                    *(self._own, op, other, n, m, k, one, W, kind, ld, stride // itemsize),
                    *(x, kind, ldx, m * ldx, beta, y, made, ldy, m * ldy, len(matrices), *how),
                )

    def _as_read(self, matrix: Array, dtype: np.dtype) -> Array:
        """The matrix, or a copy of it, in a dtype and in a memory layout that cuBLAS can read."""
        matrix = matrix.astype(dtype, copy=False)
        return matrix if _lies(matrix)[1] is not None else self._xp.ascontiguousarray(matrix)

    def _each(
        self, parts: list[Array], matrix: Array, out: Array, start: int, stop: int, terms: int
    ) -> Iterator[tuple[Any, ...]]:
        """The arguments of gemmEx for each part; the last and largest is split into runs of a few
        terms. Each call adds to the one before."""
        width, add = len(matrix), False
        for part in parts:
            step = terms if part is parts[-1] else max(width, 1)
            for first in range(0, max(width, 1), step):
                some = slice(first, first + step)
                yield self._arguments(part[:, some], matrix[some], out, start, stop, add=add)
                add = True

    def _arguments(
        self, rows: Array, matrix: Array, out: Array, start: int, stop: int, *, add: bool
    ) -> tuple[Any, ...]:
        """The arguments of gemmEx for out = rows @ matrix, or out += rows @ matrix.

        cuBLAS is column-major: it sees a row-major matrix as its transpose, so it computes
        out.T = matrix.T @ rows.T.
        """
        transposed, leading = _lies(matrix)
        (width, d_out), itemsize = matrix.shape, rows.dtype.itemsize
        kind, made = (
            getattr(self._xp.cuda.runtime, CUDA_TYPES[array.dtype.name]) for array in (rows, out)
        )
        wide = "float64" if rows.dtype == np.float64 else "float32"
        cublas = self._cublas
        return (
            cublas.CUBLAS_OP_T if transposed else cublas.CUBLAS_OP_N,
            cublas.CUBLAS_OP_N,
            *(d_out, stop - start, width),
            self._ones[wide].ctypes.data,
            *(matrix.data.ptr, kind, leading),
            *(rows.data.ptr + start * rows.strides[0], kind, rows.strides[0] // itemsize),
            (self._ones if add else self._zeros)[wide].ctypes.data,
            *(out.data.ptr + start * out.strides[0], made, out.strides[0] // out.dtype.itemsize),
            self._accuracy(rows.dtype),
            cublas.CUBLAS_GEMM_DEFAULT,
        )

    def multiplies(self, dtype: np.dtype) -> bool:
        """Whether this device multiplies numbers of a dtype."""
        return dtype.name != "bfloat16" or self._capability >= BFLOAT16_CAPABILITY

    def _accuracy(self, dtype: np.dtype) -> int:
        if dtype == np.float64:
            return self._cublas.CUBLAS_COMPUTE_64F
        if dtype == np.float32 and os.environ.get(TF32_SWITCH) == "1":
            return self._cublas.CUBLAS_COMPUTE_32F_FAST_TF32
        return self._cublas.CUBLAS_COMPUTE_32F


def _equal_stride(matrices: Sequence[Array], bounds: Sequence[tuple[int, int]]) -> int | None:
    """Bytes from one matrix to the next, if they and their rows are evenly spaced; else None."""
    first, m = matrices[0], bounds[0][1]
    if len(matrices) < 2 or m == 0:
        return None
    stride = matrices[1].data.ptr - first.data.ptr
    even = all(
        matrix.data.ptr == first.data.ptr + e * stride
        and (matrix.shape, matrix.strides, matrix.dtype)
        == (first.shape, first.strides, first.dtype)
        and bound == (e * m, (e + 1) * m)
        for e, (matrix, bound) in enumerate(zip(matrices, bounds, strict=True))
    )
    return stride if even and stride > 0 else None


def _lies(matrix: Array) -> tuple[bool, int | None]:
    """Whether a matrix is stored column by column, and the stride of its lines."""
    (rows, columns), itemsize = matrix.shape, matrix.dtype.itemsize
    steps = [stride // itemsize for stride in matrix.strides]
    if steps[1] == 1 and steps[0] >= columns:
        return False, steps[0]
    if steps[0] == 1 and steps[1] >= rows:
        return True, steps[1]
    return False, None


def gemms(xp: Any) -> Gemms | None:
    """Return the products of the device in use, or None without cuBLAS."""
    if not hasattr(xp, "cuda") or not hasattr(xp.cuda, "cublas"):
        return None
    key = (xp.__name__, xp.cuda.get_device_id())
    with _lock:
        if key not in _every_gemms:
            _every_gemms[key] = Gemms(xp)
        return _every_gemms[key]


_every_gemms: dict[tuple[str, int], Gemms] = {}
_lock = threading.Lock()
