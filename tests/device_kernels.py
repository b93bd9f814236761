"""What do the kernels of `cuda_kernels` and the calls of cuBLAS do, without a card?

The CUDA source is C++ but for a few words, so a C++ compiler makes functions of it that run here on
the double's memory, thread by thread. `gemmEx` is done by NumPy at the addresses, leading
dimensions and transpositions that it is called with, and on the stream in use, which runs as late
as it may.

    with kernels():
        ...        # the double has RawKernel and cuBLAS, as CuPy has
"""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np

from dask_ep.arrays import gemms
from dask_ep.kernel import cuda_kernels
from tests.device_double import (
    DeviceArray,
    MemoryPointer,
    UnownedMemory,
    get_current_stream,
    namespace,
)

COMPILER = shutil.which("g++")

HERE = r"""
#define __device__ static
#define __global__
struct place_t { unsigned int x; };
static place_t blockIdx, blockDim, gridDim, threadIdx;
extern "C" void stand(unsigned b, unsigned blocks, unsigned t, unsigned threads) {
    blockIdx.x = b; gridDim.x = blocks; threadIdx.x = t; blockDim.x = threads;
}
static inline float exp(float x) { return __builtin_expf(x); }
static inline double exp(double x) { return __builtin_exp(x); }
static inline float erfc(float x) { return __builtin_erfcf(x); }
static inline double erfc(double x) { return __builtin_erfc(x); }
"""

GRID = (3, 2)
"""Blocks and threads of each launch: a kernel must be right with any number of them."""

_libraries: dict[str, ctypes.CDLL] = {}
_compiling = threading.Lock()
_folder = tempfile.TemporaryDirectory(prefix="kernels-")


def _compile(code: str) -> ctypes.CDLL:
    with _compiling:
        return _compiled(code)


def _compiled(code: str) -> ctypes.CDLL:
    if code not in _libraries:
        path = Path(_folder.name) / hashlib.sha256(code.encode()).hexdigest()[:16]
        path.with_suffix(".cpp").write_text(HERE + code)
        flags = ["-shared", "-fPIC", "-O1", "-ffp-contract=off", "-std=c++17", "-fno-builtin"]
        files = [path.with_suffix(".cpp"), "-o", path.with_suffix(".so")]
        subprocess.run([COMPILER, *flags, *files, "-lm"], check=True, capture_output=True)
        _libraries[code] = ctypes.CDLL(path.with_suffix(".so"))
    return _libraries[code]


class RawKernel:
    """CuPy's: compiles at its first call, and passes pointers whatever the strides are."""

    def __init__(self, code: str, name: str, options: tuple[str, ...] = (), backend: str = "nvrtc"):
        self._code, self._name = code, name

    def __call__(self, grid: tuple, block: tuple, args: tuple) -> None:
        library = _compile(self._code)
        arguments = [_argument(argument) for argument in args]
        for b, t in itertools.product(*map(range, GRID)):
            library.stand(b, GRID[0], t, GRID[1])
            getattr(library, self._name)(*arguments)


def _argument(argument: Any) -> Any:
    if isinstance(argument, DeviceArray):
        if not argument.flags.c_contiguous:
            raise AssertionError("a kernel takes a pointer: the strides would be lost")
        return ctypes.c_void_p(argument.data.ptr)
    return {np.int64: ctypes.c_longlong, np.float32: ctypes.c_float, np.float64: ctypes.c_double}[
        type(argument)
    ](argument)


# --- cuBLAS --------------------------------------------------------------------------------------

TYPES = {0: np.float32, 1: np.float64, 2: np.float16, 14: ml_dtypes.bfloat16}
"""What cudaDataType says, by its number."""

SUPPORTED = {(0, 0, 68), (0, 0, 77), (1, 1, 70), (2, 2, 68), (2, 0, 68), (14, 14, 68), (14, 0, 68)}
"""What goes in, what comes out, and how it is computed, of what cuBLAS has for `gemmEx`."""


class Cublas:
    """The part of it that is called; notes each product.

    Sums of 16-bit numbers are rounded towards zero, as tensor cores do, or to nearest.
    """

    to_nearest = False

    CUBLAS_OP_N, CUBLAS_OP_T, CUBLAS_GEMM_DEFAULT = 0, 1, -1
    CUBLAS_COMPUTE_32F, CUBLAS_COMPUTE_64F, CUBLAS_COMPUTE_32F_FAST_TF32 = 68, 70, 77

    def __init__(self) -> None:
        self.calls: list[SimpleNamespace] = []
        self.batches: list[list[SimpleNamespace]] = []
        self.modes: dict[int, int] = {}
        self._handles = itertools.count(1)

    def create(self) -> int:
        return next(self._handles)

    def setMathMode(self, handle: int, mode: int) -> None:
        self.modes[handle] = mode

    def gemmEx(
        self, handle, transa, transb, m, n, k, alpha, A, Atype, lda, B, Btype, ldb, beta, C, Ctype,
        ldc, computeType, algo,
    ):  # fmt: skip
        sums = np.float64 if computeType == self.CUBLAS_COMPUTE_64F else np.float32
        one, add = (ctypes.cast(p, ctypes.POINTER(_C[sums]))[0] for p in (alpha, beta))
        assert one == 1
        assert add in (0, 1)
        assert Atype == Btype
        assert (Atype, Ctype, computeType) in SUPPORTED
        left = _columns(A, Atype, (m, k), lda, transposed=transa)
        right = _columns(B, Btype, (k, n), ldb, transposed=transb)
        out = _columns(C, Ctype, (m, n), ldc, transposed=False)
        stream = get_current_stream()
        self.calls.append(
            SimpleNamespace(
                handle=handle, stream=stream, mode=computeType, m=m, n=n, add=add, kind=TYPES[Atype]
            )
        )

        def multiply() -> None:
            with np.errstate(all="ignore"):
                narrow = left.dtype.itemsize == 2 and not self.to_nearest
                left_, right_ = left.astype(sums), right.astype(sums)
                product = _summed_towards_zero(left_, right_) if narrow else left_ @ right_
                out[...] = product + out if add else product

        stream._start(multiply)

    def gemmStridedBatchedEx(
        self, handle, transa, transb, m, n, k, alpha, A, Atype, lda, strideA, B, Btype, ldb,
        strideB, beta, C, Ctype, ldc, strideC, batchCount, computeType, algo,
    ):  # fmt: skip
        sizes = [np.dtype(TYPES[kind]).itemsize for kind in (Atype, Btype, Ctype)]
        for e in range(batchCount):
            a, b, c = (
                at + e * stride * size
                for at, stride, size in zip(
                    (A, B, C), (strideA, strideB, strideC), sizes, strict=True
                )
            )
            self.gemmEx(
                handle, transa, transb, m, n, k, alpha, a, Atype, lda, b, Btype, ldb, beta, c,
                Ctype, ldc, computeType, algo,
            )  # fmt: skip
        self.batches.append(self.calls[-batchCount:])
        del self.calls[-batchCount:]


TERMS_AT_ONCE = 16
"""That a tensor core multiplies and adds up before it rounds."""


def _summed_towards_zero(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The product of matrices as tensor cores sum it up."""
    total = np.zeros((len(left), right.shape[1]), np.float32)
    for first in range(0, len(right), TERMS_AT_ONCE):
        some = slice(first, first + TERMS_AT_ONCE)
        exact = left[:, some].astype("f8") @ right[some].astype("f8") + total
        total = exact.astype(np.float32)
        beyond = np.abs(total.astype("f8")) > np.abs(exact)
        total[beyond] = np.nextafter(total[beyond], np.float32(0))
    return total


_C = {np.float32: ctypes.c_float, np.float64: ctypes.c_double}


def _columns(
    address: int, kind: int, shape: tuple[int, int], leading: int, *, transposed: bool
) -> np.ndarray:
    """The matrix of this shape that cuBLAS sees at an address: column after column."""
    lines, length = (shape[0], shape[1]) if transposed else (shape[1], shape[0])
    assert leading >= max(length, 1)
    dtype = np.dtype(TYPES[kind])
    size = ((lines - 1) * leading + length) * dtype.itemsize
    memory = DeviceArray(size, np.uint8, MemoryPointer(UnownedMemory(address, size, None), 0))._a
    steps = (leading * dtype.itemsize, dtype.itemsize)
    stored = np.lib.stride_tricks.as_strided(memory.view(dtype), (lines, length), steps)
    return stored if transposed else stored.T


@contextmanager
def kernels() -> Iterator[Cublas]:
    """Give the double RawKernel and cuBLAS."""
    cublas = Cublas()
    namespace.RawKernel, namespace.cuda.cublas = RawKernel, cublas
    namespace.cuda.runtime.CUDA_R_16F, namespace.cuda.runtime.CUDA_R_16BF = 2, 14
    namespace.cuda.runtime.CUDA_R_32F, namespace.cuda.runtime.CUDA_R_64F = 0, 1
    try:
        yield cublas
    finally:
        del namespace.RawKernel, namespace.cuda.cublas
        cuda_kernels._fused.pop("device_double", None)
        for key in [key for key in gemms._every_gemms if key[0] == "device_double"]:
            del gemms._every_gemms[key]
