"""Which library multiplies matrices on the host, and with how many threads?

NumPy's own; or, on a CPU of Intel's, its MKL, where the package ``mkl`` is installed
(``pip install mkl``). With AVX-512 its products of few rows, as each expert has, are 10 to 20 %
faster there than those of the OpenBLAS in NumPy's wheels (312 and 625 rows). On AMD's Zen 5 it has
half their speed (104 against 231 GFLOP/s a core at 625 rows), and is left alone.

A run has one Dask task per core, so each product gets one thread: with more they fight for the
cores. The number belongs to the whole process and cannot be nested between threads (two overlapping
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

import ml_dtypes
import numpy as np
from threadpoolctl import ThreadpoolController, threadpool_limits

from dask_ep.arrays import memory

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

_CACHE_LINE = 64  # bytes
_PADDED = 1024  # columns

SMALLEST_PRODUCT = 1 << 18
"""Multiplications below which a product takes less time than the way to another library."""


def product(x: np.ndarray, w: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Multiply x (m, d) by w (d, f), on the host; into `out` (m, f) where that is given.

    Notes
    -----
    float32 and float64 go to MKL where that is faster; all else is ``numpy.matmul``.

    Examples
    --------
    >>> import numpy as np
    >>> from dask_ep.arrays.blas import product
    >>> product(np.ones((2, 3)), np.ones((3, 1)))
    array([[3.],
           [3.]])
    """
    mkl = None if x.size * w.shape[1] < SMALLEST_PRODUCT else mkl_where_faster()
    if mkl is not None:
        to = np.empty((len(x), w.shape[1]), x.dtype) if out is None else out
        if mkl.multiply(x, w, to):
            return to
    return np.matmul(x, w, out=out)


class Cblas:
    """The products of a library with the C interface of BLAS.

    Parameters
    ----------
    library : a loaded library
    names : {dtype: name} of its functions for 64-bit lengths
        That for bfloat16 sums in float32, and so writes it.
    """

    _ROW_MAJOR, _AS_IS, _TRANSPOSED, _PACKED, _SECOND = 101, 111, 112, 151, 162

    def __init__(self, library: ctypes.CDLL, names: dict[Any, str]):
        self._gemm = {}
        self._packing: Any = _packing_of(library)
        for dtype, name in names.items():
            sums = _sums(np.dtype(dtype))
            number = np.ctypeslib.as_ctypes_type(sums)
            flag, length, matrix = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
            gemm = getattr(library, name)
            gemm.argtypes = [
                *(flag, flag, flag, length, length, length),
                *(number, matrix, length, matrix, length, number, matrix, length),
            ]
            gemm.restype = None
            self._gemm[np.dtype(dtype)] = gemm, sums

    def multiply(
        self,
        x: np.ndarray,
        w: np.ndarray,
        out: np.ndarray,
        *,
        add: bool = False,
        packed: np.ndarray | None = None,
    ) -> bool:
        """Write x @ w to `out`, or add it, and say so; False if the library cannot with this memory
        layout. `packed` is what `pack` has made of `w`."""
        gemm, sums = self._gemm.get(x.dtype, (None, None))
        if gemm is None or x.dtype != w.dtype or out.dtype != sums:
            return False
        x_lies, w_lies, out_lies = self._lie(x), self._lie(w), self._lie(out)
        if x_lies is None or w_lies is None or out_lies is None or out_lies[0] != self._AS_IS:
            return False
        if packed is not None:
            gemm, w, w_lies = self._packing[2], packed, (self._PACKED, out.shape[1])
        sizes = (*out.shape, x.shape[1])
        places = (_address(x), x_lies[1], _address(w), w_lies[1])
        flags = (self._ROW_MAJOR, x_lies[0], w_lies[0])
        gemm(*flags, *sizes, 1.0, *places, float(add), _address(out), out_lies[1])
        return True

    def packable(self, w: np.ndarray, m: int, nbytes: int) -> int:
        """How many columns of a matrix can be packed within so many bytes; 0 where none can.

        MKL pads both sides of a matrix to about 1024.
        """
        if w.dtype != BFLOAT16 or self._packing is None or self._lie(w) is None:
            return 0
        k, columns = w.shape

        def fits() -> bool:
            return self._packing[0](self._SECOND, m, columns, k) + _CACHE_LINE <= nbytes

        while not fits() and columns > _PADDED:
            columns = (columns - 1) // _PADDED * _PADDED
        return columns if fits() else 0

    def pack(self, w: np.ndarray, m: int) -> np.ndarray:
        """Lay a matrix (k, n) out as products of m rows read it, where it is `packable`.

        That saves a fifth to a third of each product, and costs as much as one of 200 to 300 rows.
        The products have the same bits.
        """
        (size, pack, _), lies = self._packing, self._lie(w)
        assert lies is not None  # `packable` has looked
        k, n = w.shape
        packed = memory.empty((size(self._SECOND, m, n, k) + _CACHE_LINE,), np.uint8)
        packed = packed[-packed.ctypes.data % _CACHE_LINE :]
        place, length = _address(w), lies[1]
        pack(self._ROW_MAJOR, self._SECOND, lies[0], m, n, k, place, length, _address(packed))
        return packed

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


def _packing_of(library: ctypes.CDLL) -> tuple[Any, Any, Any] | None:
    """What makes packed matrices of bfloat16, and multiplies with them, if the library has it."""
    name = "cblas_gemm_bf16bf16f32_"
    try:
        size, pack, compute = (
            getattr(library, f"{name}{what}_64") for what in ("pack_get_size", "pack", "compute")
        )
    except AttributeError:
        return None
    flag, length, matrix, one = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p, ctypes.c_float
    size.argtypes, size.restype = [flag, length, length, length], ctypes.c_size_t
    pack.argtypes = [flag, flag, flag, length, length, length, matrix, length, matrix]
    compute.argtypes = [
        *(flag, flag, flag, length, length, length),
        *(one, matrix, length, matrix, length, one, matrix, length),
    ]
    pack.restype = compute.restype = None
    return size, pack, compute


def _address(a: Any) -> int:
    """Address of an array; the buffer tells it three times faster than NumPy."""
    try:
        return ctypes.addressof(ctypes.c_char.from_buffer(a))
    except (TypeError, ValueError):  # read-only, with gaps, empty, or of a dtype not Python's
        return a.ctypes.data


def multiplies_by() -> str:
    """Name the library that multiplies float32 and float64 on the host.

    Examples
    --------
    >>> from dask_ep.arrays.blas import multiplies_by, numpys_blas
    >>> multiplies_by() in (numpys_blas(), f"MKL {mkl_version()}")
    True
    """
    return numpys_blas() if mkl_where_faster() is None else f"MKL {mkl_version()}"


def mkl_version() -> str | None:
    """Version of the package ``mkl``; None where it is not installed."""
    with suppress(PackageNotFoundError):
        return version("mkl")
    return None


def numpys_blas() -> str:
    """Name the BLAS that NumPy is linked with, and the CPU that its kernels are made for."""
    found = [lib.info() for lib in ThreadpoolController().lib_controllers if lib.user_api == "blas"]
    found.sort(key=lambda lib: "numpy" not in lib["filepath"])  # SciPy may bring one of its own
    if not found:
        return "NumPy's own loops"
    names = {"openblas": "OpenBLAS", "mkl": "MKL", "blis": "BLIS"}
    words = [names.get(found[0]["internal_api"], found[0]["internal_api"]), found[0]["version"]]
    kernels = found[0].get("architecture")
    return " ".join(filter(None, [*words, f"({kernels})" if kernels else None]))


def cpu_name() -> str:
    """Name this machine's CPU as the system does."""
    named = re.search(r"model name\s*: (.*)", _cpuinfo())
    return named[1] if named else platform.processor() or platform.machine()


def _sums(dtype: np.dtype) -> np.dtype:
    """The dtype that products of a dtype are summed in."""
    return np.dtype(np.float32) if dtype == BFLOAT16 else dtype


@cache
def bfloat16_library() -> Cblas | None:
    """MKL, on a CPU of Intel's with AMX, where it multiplies bfloat16 four to six times as fast as
    float32; with AVX512-BF16 alone it takes longer than for float32 (85 to 146 GFLOP/s).
    """
    return mkl_where_faster() if "amx_bf16" in _cpuinfo().split() else None


@cache
def mkl_where_faster() -> Cblas | None:
    """MKL, on a CPU of Intel's: by its maker, not by a timing, so that runs repeat their bits."""
    return installed_mkl() if "GenuineIntel" in _cpuinfo() else None


def faster_blas() -> str | None:
    """Say what would multiply faster on this machine, and how to install it; None if nothing."""
    cpu = _cpuinfo()
    if "GenuineIntel" not in cpu or "avx512f" not in cpu:
        return None
    if installed_mkl() is not None or numpys_blas().startswith("MKL"):
        return None
    narrow = ", and would multiply bfloat16 experts in 16 bits" if "amx_bf16" in cpu else ""
    return (
        f"Intel's MKL multiplies about 10 % faster on this CPU than {numpys_blas()}{narrow}; "
        "install it with: pip install mkl"
    )


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""  # not Linux


@cache
def installed_mkl() -> Cblas | None:
    """MKL from its package, loaded into this process; None where it is not installed."""
    try:
        found = [f for f in files("mkl") or () if f.name.startswith(("libmkl_rt.so", "mkl_rt."))]
    except PackageNotFoundError:
        return None
    if not found:
        return None
    library = ctypes.CDLL(str(found[0].locate()))
    names = {"float32": "cblas_sgemm_64", "float64": "cblas_dgemm_64"}
    return Cblas(library, names | {BFLOAT16: "cblas_gemm_bf16bf16f32_64"})


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Give BLAS one thread while the block runs, and the previous number afterwards.

    Notes
    -----
    For the whole process: enter it from one thread, when no other is inside. It reaches the
    libraries that are loaded already, so NumPy has to be imported before.

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
    try:
        with threadpool_limits(limits=1):
            for library in libraries:
                library.MKL_Set_Num_Threads(1)
            yield
    finally:
        for library, threads in zip(libraries, former, strict=True):
            library.MKL_Set_Num_Threads(threads)


def limit_blas_for_good() -> None:
    """Give BLAS one thread for the rest of this process: for a worker with a thread per core."""
    for library in _loaded_mkls():
        library.MKL_Set_Num_Threads(1)
    threadpool_limits(limits=1)


def _loaded_mkls() -> list[ctypes.CDLL]:
    """Every MKL in the process, NumPy's own included: threadpoolctl sets only the number of the
    calling thread there, and tasks run in others.
    """
    mkl_where_faster()
    loaded = ThreadpoolController().lib_controllers
    return [library.dynlib for library in loaded if library.internal_api == "mkl"]
