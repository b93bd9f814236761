"""How are kernels of oneDNN made, cached and run?

By the library's C interface: the matrices' layouts and an operation make a description, from which
it generates a kernel for this CPU. That takes 3 ms, so kernels are cached.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Iterable
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np

BFLOAT16, FLOAT32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)

KERNELS_KEPT = 1024
"""Products, by shapes and memory layouts, that each thread that multiplies keeps for reuse; 9 KB
each."""

SOME_ROWS = 256
"""Rows of the product that asks for its matrix's layout, which is the same for any number."""

CACHE_LINE = 64
"""Bytes."""

_CPU, _IN_ORDER, _GIVEN_SCRATCH = 1, 1, 1  # engine kind, stream flag, scratchpad mode
_NUMBERS = {BFLOAT16: 2, FLOAT32: 3}  # dnnl_data_type_t
_TYPES = _NUMBERS | {np.dtype(np.int8): 5, np.dtype(np.uint8): 6}  # these are only copied
_SOURCE, _DESTINATION, _WEIGHTS, _SCRATCH = 1, 17, 33, 80  # DNNL_ARG_*
_OTHER = 32768 | 2  # DNNL_ARG_ATTR_MULTIPLE_POST_OP(0) | DNNL_ARG_SRC_1
_SCALES = 4096 | _SOURCE  # DNNL_ARG_ATTR_SCALES
_PRODUCT_ROLES = (_SOURCE, _WEIGHTS, _DESTINATION, _OTHER)
_COPY_ROLES = (_SOURCE, _DESTINATION, _SCALES)
_ELTWISE_SWISH, _BINARY_MUL = 0x2C, 0x1FFF1  # dnnl_alg_kind_t
ADD, SILU, TIMES = "add", "silu", "times"  # what follows a product
_ANY_LENGTH = -(1 << 63)  # DNNL_RUNTIME_DIM_VAL
_ANY_FORMAT, _BY_ROWS = 1, 3  # dnnl_format_tag_t
_ITS_NAME, _ITS_WEIGHTS, _ITS_SCRATCH = 8, 131, 136  # dnnl_query_t
_ITS_STEPS, _ITS_BLOCKS, _ITS_BLOCK_LENGTHS = 14, 263, 264
_UNIMPLEMENTED = 3  # dnnl_status_t
_PAIRS = (16, 64, 2)
"""Blocks of a packed bfloat16 matrix (k, n): of k, of n, and of k again."""


class _Handle:
    """An object of the library, destroyed when nothing refers to it any more."""

    def __init__(self, pointer: ctypes.c_void_p, destroy: Any, keeps: Any = None):
        self.pointer = self._as_parameter_ = pointer
        self._destroy, self._keeps = destroy, keeps

    def __del__(self) -> None:
        if self._destroy is not None:
            self._destroy(self.pointer)


class Packed:
    """A matrix (k, n) in the kernels' layout, of the same size in bytes; made by `OneDnn.pack`.

    Attributes
    ----------
    shape, dtype, nbytes : those of the matrix
    library : the library that packed it
    """

    def __init__(self, library: Any, shape: tuple[int, ...], dtype: np.dtype, data: np.ndarray):
        self.library, self.shape, self.dtype, self._data = library, shape, dtype, data
        self.kind, self.address = (shape, dtype), data.ctypes.data

    @property
    def nbytes(self) -> int:
        return self._data.nbytes

    def columns(self, start: int, stop: int) -> Packed:
        """Columns [start, stop) alone, in the same memory, if they lie one after the other."""
        column = self.shape[0] * self.dtype.itemsize
        data = self._data[start * column : stop * column]
        return Packed(self.library, (self.shape[0], stop - start), self.dtype, data)


Matrix = np.ndarray | Packed

PRODUCT, COPY, SCALE = "product", "copy", "scale"
"""What a kernel does: write x @ w to `out`; copy one matrix to another; or copy it times a scale
for each row, or one for all."""


class Kernels:
    """The library's operations on matrices on this machine.

    Parameters
    ----------
    library : ``libdnnl.so.3``, loaded
    openmp : the OpenMP library that it is linked with, loaded

    Attributes
    ----------
    version : str
    """

    def __init__(self, library: ctypes.CDLL, openmp: ctypes.CDLL):
        self._library = library
        self._set_threads = openmp.omp_set_num_threads
        self._all_threads = int(openmp.omp_get_max_threads())
        library.dnnl_version.restype = ctypes.POINTER(ctypes.c_int)
        self.version = ".".join(map(str, library.dnnl_version()[:3]))
        library.dnnl_primitive_desc_query_md.restype = ctypes.c_void_p
        library.dnnl_memory_desc_get_size.restype = ctypes.c_size_t
        library.dnnl_memory_set_data_handle.argtypes = [ctypes.c_void_p] * 2
        self._engine = self._new("engine", _CPU, ctypes.c_size_t(0))
        self._stream = self._new("stream", self._engine, _IN_ORDER)
        self._idle: deque[_Bench] = deque()
        self._packed_layout = cache(self._new_packed_layout)

    def __str__(self) -> str:
        return f"oneDNN {self.version}"

    # --- kernels ---------------------------------------------------------------------------------

    def run(self, what: str, arrays: tuple[Matrix, ...], then: Any = None) -> bool:
        """Run the kernel for such arrays; False if there is none.

        Overhead must be small: products of few rows take some 20 us.
        """
        # Codes are scaled by many threads at a time: a thread each is enough.
        threads = 1 if what == SCALE else _limit or self._all_threads
        self._set_threads(threads)  # OpenMP's number of threads is a setting of each calling thread
        key = (what, then, threads, *map(_kind, arrays))
        try:
            bench = self._idle.pop()
        except IndexError:
            bench = _Bench()
        try:
            kernel = bench.kernels[key]
        except KeyError:
            kernel = bench.keep(key, self._new_kernel(bench, what, arrays, then))
        try:
            if kernel is not None:
                kernel.run(self._stream.pointer, *map(_address, arrays))
        finally:
            self._idle.append(bench)
        return kernel is not None

    def _new_kernel(
        self, bench: _Bench, what: str, arrays: tuple[Matrix, ...], then: Any
    ) -> _Kernel | None:
        """None if the library has no kernel, or only one of plain loops, slower than NumPy."""
        if not all(map(_lies_well, arrays)):
            return None
        layouts = self._in_pairs(*arrays) if what == COPY else None
        layouts = layouts or [self._layout(array) for array in arrays]
        if what == PRODUCT:
            described = self._product(arrays, then)
        else:
            scales = arrays[2].shape[0] if what == SCALE else 0
            described = self._copy(layouts[0], layouts[1], scales)
        if described is None:
            return None
        name = ctypes.c_char_p()
        self._do("primitive_desc_query", described, _ITS_NAME, 0, ctypes.byref(name))
        slow = (b"ref", b"simple") if what == SCALE else (b"ref",)
        if any(kind in (name.value or b"") for kind in slow):
            return None
        scratch = self._part(described, _ITS_SCRATCH)
        memories = [self._new("memory", each, self._engine, None) for each in (*layouts, scratch)]
        room = bench.scratch(self._library.dnnl_memory_desc_get_size(scratch))
        roles = _PRODUCT_ROLES if what == PRODUCT else _COPY_ROLES
        return _Kernel(self._library, self._new("primitive", described), roles, memories, room)

    def _product(self, arrays: tuple[Matrix, ...], then: Any) -> _Handle | None:
        x, w, out, *others = arrays
        if x.dtype not in _NUMBERS or x.dtype != w.dtype:
            return None
        if then in (None, ADD) and out.dtype != FLOAT32:
            return None
        # Kernels with post-operations, or of packed matrices, have a fixed number of rows.
        rows = x.shape[0] if then is not None or isinstance(w, Packed) else _ANY_LENGTH
        options = self._new("primitive_attr")
        self._do("primitive_attr_set_scratchpad_mode", options, _GIVEN_SCRATCH)
        if then is not None:
            steps = self._new("post_ops")
            if then == ADD:
                self._do("post_ops_append_sum", steps, ctypes.c_float(1), 0, _NUMBERS[FLOAT32])
            elif then == TIMES:
                self._do("post_ops_append_binary", steps, _BINARY_MUL, self._layout(others[0]))
            else:
                numbers = ctypes.c_float(then[1]), ctypes.c_float(0)
                self._do("post_ops_append_eltwise", steps, _ELTWISE_SWISH, *numbers)
            self._do("primitive_attr_set_post_ops", options, steps)
        layouts = self._layout(x, rows), self._layout(w), None, self._layout(out, rows)
        return self._described("matmul", self._engine, *layouts, options)

    def _copy(self, source: _Handle | None, to: _Handle | None, scales: int = 0) -> _Handle | None:
        """`scales` is their number: one for each row, one for all, or none."""
        options = None
        if scales:
            options = self._new("primitive_attr")
            self._do("primitive_attr_set_scales_mask", options, _SOURCE, int(scales > 1))
        return self._described("reorder", source, self._engine, to, self._engine, options)

    def packed_bytes(self, w: np.ndarray) -> int | None:
        """Bytes of a matrix in the kernels' layout; None if they do not support it."""
        layout = None if w.dtype not in _NUMBERS else self._packed_layout(w.shape, w.dtype)
        return None if layout is None else self._library.dnnl_memory_desc_get_size(layout)

    def _in_pairs(self, source: Matrix, to: Matrix) -> list[_Handle | None] | None:
        """Layouts by which a column-major bfloat16 matrix is packed three times faster.

        Neighbours in a column stay together: pairs are transposed in blocks, as numbers of 4
        bytes. None for other matrices, and other packed layouts.
        """
        if not isinstance(to, Packed) or isinstance(source, Packed) or to.dtype != BFLOAT16:
            return None
        (k, n), (along, down) = source.shape, source.strides
        if along != source.itemsize or down % 4 or self._blocks(to) != _PAIRS:
            return None
        wide, columns, pairs = _PAIRS[1], down // 4, k // 2
        lengths, every = (n // wide, wide, pairs // 16, 16), wide * pairs
        return [
            self._strided(lengths, FLOAT32, steps)
            for steps in ((wide * columns, columns, 16, 1), (every, 1, 16 * wide, wide))
        ]

    def _blocks(self, packed: Packed) -> tuple[int, ...]:
        """Lengths of the innermost blocks of a matrix's layout, the outermost first."""
        layout = self._layout(packed)
        count, lengths = ctypes.c_int(), ctypes.POINTER(ctypes.c_int64)()
        self._do("memory_desc_query", layout, _ITS_BLOCKS, ctypes.byref(count))
        self._do("memory_desc_query", layout, _ITS_BLOCK_LENGTHS, ctypes.byref(lengths))
        return tuple(lengths[: count.value])

    def _steps(self, packed: Packed) -> tuple[int, ...]:
        """Numbers from one block of a matrix's layout to the next, down and across."""
        steps = ctypes.POINTER(ctypes.c_int64)()
        self._do("memory_desc_query", self._layout(packed), _ITS_STEPS, ctypes.byref(steps))
        return tuple(steps[:2])

    # --- objects of the library ------------------------------------------------------------------

    def _layout(self, array: Matrix, rows: int | None = None) -> _Handle | None:
        if isinstance(array, Packed):
            return self._packed_layout(array.shape, array.dtype)
        if array.ndim == 1:
            return self._strided(array.shape, array.dtype, (1,))
        shape = (array.shape[0] if rows is None else rows, array.shape[1])
        steps = [step // array.itemsize for step in array.strides]
        if array.flags.c_contiguous:  # also if the stride of a single row or column is another
            steps = [shape[1], 1]
        return self._strided(shape, array.dtype, steps)

    def _strided(self, shape: tuple[int, ...], dtype: np.dtype, steps: Iterable[int]) -> _Handle:
        arguments = len(shape), _lengths(shape), _TYPES[dtype], _lengths(steps)
        return self._new("memory_desc", *arguments, by="memory_desc_create_with_strides")

    def _new_packed_layout(self, shape: tuple[int, int], dtype: np.dtype) -> _Handle | None:
        """The layout of a matrix that the library's kernels prefer, for any number of rows."""
        k, n = shape
        x, w, out = (
            self._new(
                "memory_desc", 2, _lengths(lengths), number, tag, by="memory_desc_create_with_tag"
            )
            for lengths, number, tag in (
                ((SOME_ROWS, k), _NUMBERS[dtype], _BY_ROWS),
                ((k, n), _NUMBERS[dtype], _ANY_FORMAT),
                ((SOME_ROWS, n), _NUMBERS[FLOAT32], _BY_ROWS),
            )
        )
        described = self._described("matmul", self._engine, x, w, None, out, None)
        return None if described is None else self._part(described, _ITS_WEIGHTS)

    def _described(self, kind: str, *arguments: Any) -> _Handle | None:
        """A description of a kernel; None if the library has none."""
        pointer, what = ctypes.c_void_p(), f"{kind}_primitive_desc_create"
        status = getattr(self._library, f"dnnl_{what}")(ctypes.byref(pointer), *arguments)
        if status == _UNIMPLEMENTED:
            return None
        _check(status, what)
        return _Handle(pointer, self._library.dnnl_primitive_desc_destroy)

    def _part(self, described: _Handle, which: int) -> _Handle:
        """A layout that belongs to a description."""
        pointer = self._library.dnnl_primitive_desc_query_md(described, which, 0)
        return _Handle(ctypes.c_void_p(pointer), None, keeps=described)

    def _new(self, kind: str, *arguments: Any, by: str | None = None) -> _Handle:
        pointer = ctypes.c_void_p()
        self._do(by or f"{kind}_create", ctypes.byref(pointer), *arguments)
        return _Handle(pointer, getattr(self._library, f"dnnl_{kind}_destroy"))

    def _do(self, what: str, *arguments: Any) -> None:
        _check(getattr(self._library, f"dnnl_{what}")(*arguments), what)


class _Bench:
    """Kernels and their scratch memory, for one thread at a time: Dask's threads come and go, and
    a new one takes over those of one that ended."""

    def __init__(self) -> None:
        self.kernels: dict[tuple[Any, ...], _Kernel | None] = {}
        self._room = np.empty(0, np.uint8)

    def keep(self, key: tuple[Any, ...], kernel: _Kernel | None) -> _Kernel | None:
        if len(self.kernels) >= KERNELS_KEPT:
            self.kernels.clear()
        self.kernels[key] = kernel
        return kernel

    def scratch(self, nbytes: int) -> np.ndarray:
        if len(self._room) < nbytes:
            self._room = np.empty(max(nbytes + CACHE_LINE, 1 << 16), np.uint8)
            self._room = self._room[-self._room.ctypes.data % CACHE_LINE :]
        return self._room


class _Kernel:
    """A kernel, with the memory objects that point to its arrays."""

    def __init__(
        self,
        library: ctypes.CDLL,
        primitive: _Handle,
        roles: tuple[int, ...],
        memories: list[_Handle],
        scratch: np.ndarray,
    ):
        self._execute, self._wait = library.dnnl_primitive_execute, library.dnnl_stream_wait
        self._put = library.dnnl_memory_set_data_handle
        self._keeps, self._primitive = (primitive, memories, scratch), primitive.pointer
        *arrays, room = (one.pointer for one in memories)
        self._arrays = arrays
        self._put(room, scratch.ctypes.data)
        of_each = zip((*roles[: len(arrays)], _SCRATCH), memories, strict=True)
        self._arguments = (_Argument * len(memories))(
            *(_Argument(role, one.pointer) for role, one in of_each)
        )

    def run(self, stream: ctypes.c_void_p, *addresses: int) -> None:
        for one, address in zip(self._arrays, addresses, strict=True):
            self._put(one, address)
        status = self._execute(self._primitive, stream, len(self._arguments), self._arguments)
        _check(status or self._wait(stream), "primitive_execute")


class _Argument(ctypes.Structure):
    _fields_ = (("role", ctypes.c_int), ("memory", ctypes.c_void_p))


def _check(status: int, what: str) -> None:
    if status:
        raise RuntimeError(f"oneDNN's {what} failed with status {status}")


def _lengths(numbers: Iterable[int]) -> Any:
    return (ctypes.c_int64 * 12)(*numbers)


def _kind(array: Matrix) -> tuple[Any, ...]:
    """The properties of an array that its kernel depends on."""
    if isinstance(array, Packed):
        return array.kind
    return array.shape, array.strides, array.dtype, array.flags.aligned


def _address(array: Matrix) -> int:
    if isinstance(array, Packed):
        return array.address
    return array.__array_interface__["data"][0]


def _lies_well(array: Matrix) -> bool:
    """Whether a matrix has a dtype of the library and contiguous rows or columns; or is packed.
    One of a single axis is contiguous."""
    if isinstance(array, Packed):
        return True
    if array.dtype not in _TYPES or array.size == 0:
        return False
    if array.ndim == 1:
        return array.flags.c_contiguous and array.flags.aligned
    size, (rows, columns), (down, along) = array.itemsize, array.shape, array.strides
    return array.flags.aligned and (
        (along == size and down >= columns * size and down % size == 0)
        or (down == size and along >= rows * size and along % size == 0)
    )


_limit: int | None = None


def limit_threads(threads: int | None) -> int | None:
    """Set how many threads each product of oneDNN gets in this process from now on, in any calling
    thread; None leaves the number to OpenMP. Returns the previous number."""
    global _limit
    former, _limit = _limit, threads
    return former


def openmp() -> ctypes.CDLL:
    """The OpenMP library that oneDNN uses."""
    return ctypes.CDLL("libgomp.so.1")
