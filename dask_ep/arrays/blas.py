"""Which library multiplies matrices on the host, and with how many threads?

NumPy's own, or a faster one that is installed; by the CPU, never by a timing, so that bits repeat:

    float32    Intel          MKL (package ``mkl``): 10 to 20 % faster than the OpenBLAS of NumPy's
                              wheels for some hundred rows, as each expert has (AVX-512)
               AMD, AVX-512   oneDNN (``onednn-cpu-gomp``): on Zen 4 12 % faster, and twice as fast
                              for 16 rows; it packs matrices stored by columns, as in published
                              checkpoints, when they are loaded: 5 % faster again, and 40 % for 16
                              rows. MKL has half of OpenBLAS's speed there
    bfloat16   AMX or         oneDNN; see `dask_ep.kernel.bfloat16`
               AVX512-BF16

A run has one Dask task per core, so each product gets one thread; more threads would compete for
the cores. The number is global to the process and cannot be nested between threads (two overlapping
uses leave it at 1 for good), so it is set once, around a run or when a worker starts, and never in
a task.
"""

from __future__ import annotations

import ctypes
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, files, version
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import ThreadpoolController, threadpool_limits

from dask_ep.arrays import onednn, onednn_kernels
from dask_ep.arrays.memory import aligned
from dask_ep.arrays.onednn import ROWS, OneDnn, installed_onednn
from dask_ep.arrays.onednn_kernels import Matrix, Packed

NARROW_FLAGS = {"amx_bf16", "avx512_bf16"}
"""Names in /proc/cpuinfo of instructions that multiply bfloat16 and sum in float32."""

SMALLEST_PRODUCT = 1 << 18
"""Multiplications below which a product takes less time than calling another library."""


def product(x: np.ndarray, w: Matrix, out: np.ndarray | None = None) -> np.ndarray:
    """Multiply x (m, d) by w (d, f), on the host, into `out` (m, f) if given. A packed `w` has
    the dtype of `x`.

    Notes
    -----
    float32 and float64 go to a library that is faster than NumPy's, if one is installed and
    supports them; everything else is ``numpy.matmul``.

    Examples
    --------
    >>> import numpy as np
    >>> from dask_ep.arrays.blas import product
    >>> product(np.ones((2, 3)), np.ones((3, 1)))
    array([[3.],
           [3.]])
    """
    library: Cblas | OneDnn | None = None
    x, w = aligned(x), aligned(w)
    if isinstance(w, Packed):
        library = w.library
    elif x.size * w.shape[1] >= SMALLEST_PRODUCT:
        library = faster_than_numpy()
    if library is not None:
        to = np.empty((len(x), w.shape[1]), x.dtype) if out is None else out
        if library.multiply(x, w, to):
            return to
    with np.errstate(invalid="ignore"):  # OpenBLAS has raised it for numbers that are finite
        return np.matmul(x, w.library.widened(w) if isinstance(w, Packed) else w, out=out)


class Cblas:
    """The products of a library with the C interface of BLAS.

    Parameters
    ----------
    library : a loaded library
    names : {dtype: name} of its functions for 64-bit lengths
    """

    _ROW_MAJOR, _AS_IS, _TRANSPOSED = 101, 111, 112

    def __init__(self, library: ctypes.CDLL, names: dict[str, str]):
        self._gemm = {}
        for dtype, name in names.items():
            number = np.ctypeslib.as_ctypes_type(np.dtype(dtype))
            flag, length, matrix = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
            gemm = getattr(library, name)
            gemm.argtypes = [
                *(flag, flag, flag, length, length, length),
                *(number, matrix, length, matrix, length, number, matrix, length),
            ]
            gemm.restype = None
            self._gemm[np.dtype(dtype)] = gemm

    def multiply(self, x: np.ndarray, w: Matrix, out: np.ndarray) -> bool:
        """Write x @ w to `out` and return True; False if the library does not support these
        dtypes or this memory layout."""
        assert isinstance(w, np.ndarray)  # only oneDNN packs
        gemm = self._gemm.get(x.dtype)
        if gemm is None or x.dtype != w.dtype or x.dtype != out.dtype:
            return False
        x_lies, w_lies, out_lies = self._lie(x), self._lie(w), self._lie(out)
        if x_lies is None or w_lies is None or out_lies is None or out_lies[0] != self._AS_IS:
            return False
        places = (_address(x), x_lies[1], _address(w), w_lies[1])
        flags, sizes = (self._ROW_MAJOR, x_lies[0], w_lies[0]), (*out.shape, x.shape[1])
        gemm(*flags, *sizes, 1.0, *places, 0.0, _address(out), out_lies[1])
        return True

    @classmethod
    def _lie(cls, a: np.ndarray) -> tuple[int, int] | None:
        """Whether a matrix is stored by rows or by columns, and the numbers from one to the
        next."""
        size = a.itemsize
        (rows, columns), (down, along) = a.shape, a.strides
        if not a.flags.aligned:
            return None
        if along == size and down >= columns * size and down % size == 0:
            return cls._AS_IS, down // size
        if down == size and along >= rows * size and along % size == 0:
            return cls._TRANSPOSED, along // size
        return None


def _address(a: Any) -> int:
    """Address of an array; three times faster by the buffer protocol than by NumPy."""
    try:
        return ctypes.addressof(ctypes.c_char.from_buffer(a))
    except (TypeError, ValueError):  # read-only, with gaps, empty, or of a dtype not Python's
        return a.ctypes.data


def multiplies_by() -> str:
    """Name the library that multiplies float32 and float64 on the host.

    Examples
    --------
    >>> from dask_ep.arrays.blas import multiplies_by
    >>> multiplies_by().split()[0] in ("OpenBLAS", "MKL", "BLIS", "oneDNN", "NumPy's")
    True
    """
    library = faster_than_numpy()
    if library is None:
        return numpys_blas()
    return str(library) if isinstance(library, OneDnn) else f"MKL {mkl_version()}"


def mkl_version() -> str | None:
    """Version of the package ``mkl``; None if it is not installed."""
    with suppress(PackageNotFoundError):
        return version("mkl")
    return None


def numpys_blas() -> str:
    """Name the BLAS that NumPy is linked with, and the CPU that its kernels are for."""
    found = [lib.info() for lib in ThreadpoolController().lib_controllers if lib.user_api == "blas"]
    found.sort(key=lambda lib: "numpy" not in lib["filepath"])  # SciPy may come with another one
    if not found:
        return "NumPy's own loops"
    names = {"openblas": "OpenBLAS", "mkl": "MKL", "blis": "BLIS"}
    words = [names.get(found[0]["internal_api"], found[0]["internal_api"]), found[0]["version"]]
    kernels = found[0].get("architecture")
    return " ".join(filter(None, [*words, f"({kernels})" if kernels else None]))


def cpu_name() -> str:
    """The system's name of this machine's CPU."""
    named = re.search(r"model name\s*: (.*)", _cpuinfo())
    return named[1] if named else platform.processor() or platform.machine()


@cache
def faster_than_numpy() -> Cblas | OneDnn | None:
    """The library that multiplies float32 faster than NumPy's, if installed: MKL on Intel CPUs,
    oneDNN on others with AVX-512. Chosen by the CPU, not by a timing, so that runs repeat their
    bits.
    """
    cpu = _cpuinfo()
    if "GenuineIntel" in cpu:
        return installed_mkl()
    return installed_onednn() if "avx512f" in cpu.split() else None


def packing_library(w: np.ndarray) -> OneDnn | None:
    """The library that packs a float32 matrix once for all products with it, where that pays:
    oneDNN, if the matrix is stored by columns and not tiny. One stored by rows is multiplied as
    fast without packing, except for some tens of rows."""
    library, (down, along) = faster_than_numpy(), w.strides
    pays = along > down and ROWS[-1] * w.size >= SMALLEST_PRODUCT
    return library if isinstance(library, OneDnn) and pays else None


@cache
def bfloat16_library() -> OneDnn | None:
    """oneDNN, if it is installed and the CPU has 16-bit instructions."""
    return installed_onednn() if NARROW_FLAGS & set(_cpuinfo().split()) else None


@cache
def splitting_pays() -> bool:
    """Whether three products of bfloat16 take less time than one of float32: with AMX, which is
    four to eight times as fast. AVX512-BF16 is twice as fast."""
    return "amx_bf16" in _cpuinfo().split()


def faster_blas() -> str | None:
    """Say what would multiply faster on this machine, and how to install it; None if nothing."""
    cpu = _cpuinfo()
    flags, gains, of_onednn = set(cpu.split()), {}, list[str]()
    has_onednn, of_intel = installed_onednn() is not None, "GenuineIntel" in cpu
    numpys_is_slower = "avx512f" in flags and not numpys_blas().startswith("MKL")
    if of_intel and numpys_is_slower and installed_mkl() is None:
        gains["mkl"] = f"MKL multiplies float32 about 10 % faster than {numpys_blas()}"
    if not of_intel and numpys_is_slower and not has_onednn:
        of_onednn.append(f"float32 about 10 % faster than {numpys_blas()}")
    if flags & NARROW_FLAGS and not has_onednn:
        of_onednn.append("bfloat16 experts twice as fast or more")
    if of_onednn:
        gains[onednn.PACKAGE] = f"oneDNN multiplies {' and '.join(of_onednn)}"
    if not gains:
        return None
    return (
        f"on this CPU {', and '.join(gains.values())}; install with: pip install {' '.join(gains)}"
    )


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""  # not Linux


@cache
def installed_mkl() -> Cblas | None:
    """MKL from its package, loaded into this process; None if it is not installed."""
    try:
        found = [f for f in files("mkl") or () if f.name.startswith(("libmkl_rt.so", "mkl_rt."))]
    except PackageNotFoundError:
        return None
    if not found:
        return None
    library = ctypes.CDLL(str(found[0].locate()))
    return Cblas(library, {"float32": "cblas_sgemm_64", "float64": "cblas_dgemm_64"})


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Give BLAS one thread while the block runs, and the previous number afterwards.

    Notes
    -----
    It acts on the whole process: enter it from one thread at a time. It reaches only libraries
    that are loaded already, so import NumPy before.

    Examples
    --------
    >>> import numpy as np
    >>> from threadpoolctl import threadpool_info
    >>> from dask_ep.arrays.blas import one_blas_thread
    >>> with one_blas_thread():
    ...     threads = {lib["num_threads"] for lib in threadpool_info() if lib["user_api"] == "blas"}
    >>> threads <= {1}
    True
    """
    libraries = _loaded_mkls()
    former = [library.MKL_Get_Max_Threads() for library in libraries]
    onednns = onednn_kernels.limit_threads(1)
    try:
        with threadpool_limits(limits=1):
            for library in libraries:
                library.MKL_Set_Num_Threads(1)
            yield
    finally:
        onednn_kernels.limit_threads(onednns)
        for library, threads in zip(libraries, former, strict=True):
            library.MKL_Set_Num_Threads(threads)


def limit_blas_for_good() -> None:
    """Give BLAS one thread for the rest of this process: for a worker with a thread per core."""
    for library in _loaded_mkls():
        library.MKL_Set_Num_Threads(1)
    onednn_kernels.limit_threads(1)
    threadpool_limits(limits=1)


def _loaded_mkls() -> list[ctypes.CDLL]:
    """Every MKL in the process, NumPy's own included: threadpoolctl sets only the number of the
    calling thread there, and tasks run in others.
    """
    faster_than_numpy()
    loaded = ThreadpoolController().lib_controllers
    return [library.dynlib for library in loaded if library.internal_api == "mkl"]
