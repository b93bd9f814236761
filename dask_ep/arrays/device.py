"""What GPUs are there, and how do rows get onto one and back while it computes?

    file ──> pinned ══ upload ══> device ══ compute ══> device ══ download ══> pinned ──> file

Three streams: while chunk c computes, chunk c + 1 goes up and chunk c - 1 comes down. A task waits
for none of them but for its own download.

The compute stream is the one in use, CuPy's default stream unless somebody chose another: what all
threads of a worker start on it runs in the order in which they started it, so that arrays pass from
task to task, and from thread to thread, without a wait.

Products are cuBLAS's, called directly (`Gemms`): of bfloat16 because CuPy has a product of two such
matrices since 14.0, and none of many; of all dtypes because an expert's product is short, and must
not wait for its array to be made.

This is the one module that knows CuPy by name. Everything else works by the namespace of the arrays
at hand.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from math import prod
from traceback import clear_frames
from typing import Any, NamedTuple

import numpy as np

from dask_ep.arrays.namespaces import Array, namespace
from dask_ep.errors import NoDeviceError

NAMESPACE = "cupy"
"""The namespace of device arrays; the tests put another here that keeps CuPy's rules on a CPU."""


class Device(NamedTuple):
    """A GPU that this process sees."""

    index: int
    name: str
    memory: int
    #: bytes in all
    of_host: bool = False
    #: whether that is the host's memory, as on a system on a chip


def find_devices() -> list[Device]:
    """List the GPUs that CuPy finds; ``CUDA_VISIBLE_DEVICES`` narrows them down.

    Raises
    ------
    NoDeviceError
        If CuPy or a library of CUDA cannot be imported or there is no GPU, saying what to install
        or to look at.

    Notes
    -----
    Asks the CUDA runtime for its counters and properties; nothing is allocated on a device.
    """
    try:
        import cupy
    except ImportError as error:
        raise NoDeviceError(
            f"a GPU needs CuPy, which cannot be imported here ({error}); install it with "
            "pip install 'dask-ep[gpu]' (CUDA 12), or pip install cupy-cuda13x (CUDA 13)"
        ) from error
    runtime = cupy.cuda.runtime
    try:
        count = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        raise NoDeviceError(_no_device(str(error))) from error
    if not count:
        raise NoDeviceError(_no_device("the driver lists none"))
    try:
        cupy.cuda.cublas  # noqa: B018 - imported when it is first asked for
        cupy.cuda.nvrtc.getVersion()
    except (ImportError, RuntimeError) as error:
        raise NoDeviceError(
            f"CuPy finds a GPU, but not CUDA's libraries ({error}); install them with "
            "pip install 'cupy-cuda12x[ctk]' (or 'cupy-cuda13x[ctk]'), or the CUDA toolkit"
        ) from error
    properties = [runtime.getDeviceProperties(index) for index in range(count)]
    return [
        Device(index, one["name"].decode(), one["totalGlobalMem"], bool(one["integrated"]))
        for index, one in enumerate(properties)
    ]


def _no_device(why: str) -> str:
    return (
        f"CuPy finds no GPU: {why}; see what nvidia-smi lists, and that CUDA_VISIBLE_DEVICES hides "
        "no device that is meant to be used"
    )


# --- up and down -------------------------------------------------------------------------------


def pinned_empty(xp: Any, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Give an uninitialised NumPy array in page-locked memory, which copies run from and to alone.

    Its memory comes from CuPy's pool of such memory, and goes back there with the array.

    Raises
    ------
    MemoryError
        If the host has no more of it.
    """
    dtype = np.dtype(dtype)
    nbytes = prod(shape) * dtype.itemsize
    if nbytes == 0:
        return np.empty(shape, dtype)
    try:
        return np.ndarray(shape, dtype, buffer=xp.cuda.alloc_pinned_memory(nbytes))
    except xp.cuda.runtime.CUDARuntimeError as error:
        raise MemoryError(
            f"the host gives no {nbytes} bytes of page-locked memory for rows on their way to or "
            f"from a GPU ({error}); use smaller chunks (--resume --chunk-rows), or free memory"
        ) from error


def upload(xp: Any, host: np.ndarray) -> Array:
    """Start the copy of a pinned array to the device, and give the device array at once.

    Parameters
    ----------
    xp : namespace of the device array
    host : C-contiguous array in pinned memory, which nobody writes to any more

    Returns
    -------
    device array of the shape and dtype of `host`; what is started on the compute stream from now on
    finds the rows there
    """
    return _lanes(xp).upload(host)


def download(array: Array) -> np.ndarray:
    """Copy a device array to pinned memory beside what the device computes, and wait for that copy.

    Returns
    -------
    NumPy array of the shape and dtype of `array`, C-contiguous
    """
    return _lanes(namespace(array)).download(array)


def fill(target: Array, host: np.ndarray) -> None:
    """Start the copy of a pinned array into a contiguous device array of its shape and dtype."""
    _lanes(namespace(target)).fill(target, host)


class Lanes:
    """The streams up to one device and down from it.

    Notes
    -----
    CuPy's pool hands freed memory out again in the order of one stream, so a block that was filled
    on the upload stream and read on the compute stream must not go back there while it is being
    read. Such blocks are therefore kept here: when the last array in one has died, the compute
    stream marks the place (an event), and the next upload into the block waits for that mark. Those
    of other sizes that nobody reads any more go to the pool when a new one must be made.
    """

    def __init__(self, xp: Any):
        self._xp = xp
        self._up = xp.cuda.Stream(non_blocking=True)
        self._down = xp.cuda.Stream(non_blocking=True)
        self._free: dict[int, deque[_Block]] = {}
        self._on_the_way: deque[tuple[Any, np.ndarray]] = deque()
        self._lock = threading.Lock()  # for the one above

    def upload(self, host: np.ndarray) -> Array:
        xp, compute = self._xp, self._xp.cuda.get_current_stream()
        if host.nbytes == 0:
            return xp.empty(host.shape, dtype=host.dtype)
        block = self._take(host.nbytes)
        memory = xp.cuda.UnownedMemory(
            block.memory.data.ptr, host.nbytes, _Lease(self, block, compute), block.device
        )
        array = xp.ndarray(host.shape, host.dtype, xp.cuda.MemoryPointer(memory, 0))
        self._start(array, host, compute)
        return array

    def fill(self, target: Array, host: np.ndarray) -> None:
        if host.nbytes:
            compute = self._xp.cuda.get_current_stream()
            self._up.wait_event(compute.record())  # the target may be memory still in use there
            self._start(target, host, compute)

    def _start(self, target: Array, host: np.ndarray, compute: Any) -> None:
        target.set(host, stream=self._up)
        arrived = self._up.record()
        compute.wait_event(arrived)
        with self._lock:
            self._on_the_way.append((arrived, host))  # the copy reads it until then
            while self._on_the_way[0][0].done and len(self._on_the_way) > 1:
                self._on_the_way.popleft()

    def download(self, array: Array) -> np.ndarray:
        self._down.wait_event(self._xp.cuda.get_current_stream().record())
        host = pinned_empty(self._xp, array.shape, array.dtype)
        if host.nbytes:
            array.get(stream=self._down, out=host)
        return host

    def give_back(self, block: _Block) -> None:
        """Take a block whose last array has died; its `read` says when the device is done too."""
        self._free.setdefault(block.size, deque()).append(block)

    def release(self) -> None:
        """Give the blocks that wait for a user back to CuPy's pool."""
        for blocks in list(self._free.values()):
            while blocks:
                block = blocks.popleft()
                if block.read is not None:
                    block.read.synchronize()

    def _drop_the_unread(self, size: int) -> None:
        """Give the blocks of other sizes back to CuPy's pool that the device is done with."""
        for other, blocks in list(self._free.items()):
            for _ in range(len(blocks) if other != size else 0):
                try:
                    block = blocks.popleft()
                except IndexError:  # somebody took the last one
                    break
                if block.read is not None and not block.read.done:
                    blocks.append(block)

    def _take(self, nbytes: int) -> _Block:
        step = 1 << max(nbytes.bit_length() - 4, 9)
        size = -(-nbytes // step) * step
        try:
            block = self._free[size].popleft()  # the oldest: the likeliest to have been read
        except (KeyError, IndexError):
            block = self._allocate(size)
        if block.read is not None:
            self._up.wait_event(block.read)
        return block

    def _allocate(self, size: int) -> _Block:
        self._drop_the_unread(size)
        with self._up:  # so that CuPy hands it out in the order of this stream
            try:
                return _Block(self._xp, size)
            except self._xp.cuda.memory.OutOfMemoryError:
                self.release()
                return _Block(self._xp, size)


class _Block:
    """A run of device memory that uploads go to, one after the other."""

    __slots__ = ("device", "memory", "read", "size")

    def __init__(self, xp: Any, size: int):
        self.memory, self.size = xp.empty(size, dtype=np.uint8), size
        self.device = xp.cuda.get_device_id()
        self.read: Any = None
        #: event behind the last use of what was here before


class _Lease:
    """The owner of an uploaded array's memory; it dies with the array and all its views."""

    __slots__ = ("_block", "_compute", "_lanes")

    def __init__(self, lanes: Lanes, block: _Block, compute: Any):
        self._lanes, self._block, self._compute = lanes, block, compute

    def __del__(self) -> None:
        if not sys.is_finalizing():
            self._block.read = self._compute.record()
            self._lanes.give_back(self._block)


_every_lane: dict[tuple[str, int], Lanes] = {}
_lock = threading.Lock()


def _lanes(xp: Any) -> Lanes:
    """The lanes of the device in use."""
    key = (xp.__name__, xp.cuda.get_device_id())
    with _lock:
        if key not in _every_lane:
            _every_lane[key] = Lanes(xp)
        return _every_lane[key]


# --- memory ------------------------------------------------------------------------------------


class DeviceMemoryError(MemoryError):
    """A device has not enough memory for a chunk or for a rank's experts."""


@contextmanager
def telling_memory(xp: Any, needed: int, rows: int | None = None, held: int = 0) -> Iterator[None]:
    """Say, if the device runs out of memory inside, what was needed, what is free, and what fits.

    Parameters
    ----------
    xp : namespace of the arrays inside; nothing is done for NumPy
    needed : bytes that the work inside needs at most
    rows : rows of the token chunk that this is for; None if it is for experts
    held : bytes of these that are there already, with the chunk

    Raises
    ------
    DeviceMemoryError
    """
    if xp is np:
        yield
        return
    try:
        yield
    except xp.cuda.memory.OutOfMemoryError as error:
        clear_frames(error.__traceback__)  # what the failed work had made is free again
        free, total = free_memory(xp)
        numbers = f"it needs {needed} bytes, {free} of {total} are free ({error})"
        if rows is None:
            raise DeviceMemoryError(
                f"the device has not enough memory for the experts: {numbers}; use more GPUs and "
                "ranks, experts held_as_stored, or none (--threads or --processes): there experts "
                "that do not fit go by in passes"
            ) from error
        fits = max(min((free + held) * rows // max(needed, 1), rows // 2), 1)
        raise DeviceMemoryError(
            f"the device has not enough memory for a chunk of {rows} rows: {numbers}; {fits} rows "
            "would fit into this step, and other steps may take fewer. Finished blocks stay good: "
            f"go on with --resume --chunk-rows {fits}"
        ) from error


def telling_chunk(chunk: Array, row_bytes: int) -> AbstractContextManager[None]:
    """The same for a step on a chunk that is there: bytes that it takes of each row, at most."""
    return telling_memory(namespace(chunk), len(chunk) * row_bytes, len(chunk), chunk.nbytes)


def free_memory(xp: Any) -> tuple[int, int]:
    """Give the bytes that can still be allocated on the device in use, and those in all.

    What CuPy's pool has set aside and not given out counts as free; a limit of the pool counts as
    the device's size.
    """
    free, total = xp.cuda.runtime.memGetInfo()
    pool = xp.get_default_memory_pool()
    free += pool.free_bytes()
    limit = pool.get_limit()
    if limit:
        free, total = min(free, max(limit - pool.used_bytes(), 0)), min(total, limit)
    return free, total


# --- products ----------------------------------------------------------------------------------

STREAMS = 4
"""Products at a time: enough to fill the gaps that one leaves at its end."""

SUMS_IN_FLOAT32 = 16
"""cuBLAS's CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION, for which CuPy 14.2 has no name."""

BFLOAT16_CAPABILITY = 80

TF32_SWITCH = "DASK_EP_TF32"
"""Environment variable that is 1 where float32 experts multiply as TF32. CuPy's own, CUPY_TF32,
would have routers multiply so too, and send rows to other experts."""

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
    - float32: in float32, or as TF32 if the environment says so (`TF32_SWITCH`).
    - cuBLAS promises the same bits each time if a handle works on one stream, so that each stream
      here has its own handle (NVIDIA's documentation of cuBLAS, "Results reproducibility").
    - CuPy 14.2 wraps no grouped product of cuBLAS, and of the batched ones those with equal strides
      only: they serve where all experts have as many rows (`device_kernel.PADDED_ROWS`), and their
      matrices lie at equal distances, as those of loaded experts do.
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
        self._ones = {np.float32: np.ones(1, np.float32), np.float64: np.ones(1, np.float64)}
        self._zeros = {np.float32: np.zeros(1, np.float32), np.float64: np.zeros(1, np.float64)}

    def __call__(
        self,
        rows: Array,
        matrices: Sequence[Array],
        bounds: Sequence[tuple[int, int]],
        out: Array,
    ) -> None:
        """``out[start:stop] = rows[start:stop] @ matrix`` of each; rows and out row by row."""
        compute, calls = self._xp.cuda.get_current_stream(), []
        if rows.dtype.name == "bfloat16" and self._capability < BFLOAT16_CAPABILITY:
            raise TypeError(
                "products of bfloat16 need a GPU of compute capability 8.0 (Ampere) or more, and "
                f"this one has {self._capability / 10}: make the tokens float16 or float32"
            )
        if (stride := _equal_stride(matrices, bounds, rows.dtype)) is not None:
            self._multiply_all_at_once(rows, matrices, bounds, out, stride)
            return
        for matrix, (start, stop) in zip(matrices, bounds, strict=True):
            if stop > start:
                calls.append((stop - start, *self._arguments(rows, matrix, out, start, stop)))
        calls.sort(key=lambda call: -call[0])  # the longest first: they end together
        used = self._streams[: len(calls)]
        with self._lock:
            ready = compute.record()
            for stream in used:
                stream.wait_event(ready)
            for nth, (_, _, arguments) in enumerate(calls):
                with used[nth % len(used)]:  # cuBLAS takes the stream in use
                    self._cublas.gemmEx(self._handles[nth % len(used)], *arguments)
            for stream in used:
                compute.wait_event(stream.record())

    def _multiply_all_at_once(
        self,
        rows: Array,
        matrices: Sequence[Array],
        bounds: Sequence[tuple[int, int]],
        out: Array,
        stride: int,
    ) -> None:
        itemsize = rows.dtype.itemsize
        _, arguments = self._arguments(rows, matrices[0], out, 0, bounds[0][1])
        op, other, n, m, k, one, W, kind, ld, x, _, ldx, zero, y, made, ldy, sums, algo = arguments
        steps = (m * rows.strides[0] // itemsize, m * out.strides[0] // out.dtype.itemsize)
        with self._lock:
            self._cublas.gemmStridedBatchedEx(
                *(self._own, op, other, n, m, k, one, W, kind, ld, stride // itemsize),
                *(x, kind, ldx, steps[0], zero, y, made, ldy, steps[1]),
                *(len(matrices), sums, algo),
            )

    def _arguments(
        self, rows: Array, matrix: Array, out: Array, start: int, stop: int
    ) -> tuple[Array, tuple[int, ...]]:
        """The matrix as it is read, and the arguments of gemmEx for out = rows @ matrix.

        cuBLAS counts along columns first: what lies row by row is for it the transposed matrix, and
        so it computes out.T = matrix.T @ rows.T.
        """
        matrix = matrix.astype(rows.dtype, copy=False)
        transposed, leading = _lies(matrix)
        if leading is None:
            matrix = self._xp.ascontiguousarray(matrix)
            transposed, leading = _lies(matrix)
        (width, d_out), itemsize = matrix.shape, rows.dtype.itemsize
        kind, made = (
            getattr(self._xp.cuda.runtime, CUDA_TYPES[array.dtype.name]) for array in (rows, out)
        )
        wide = np.float64 if rows.dtype == np.float64 else np.float32
        cublas = self._cublas
        return matrix, (
            cublas.CUBLAS_OP_T if transposed else cublas.CUBLAS_OP_N,
            cublas.CUBLAS_OP_N,
            *(d_out, stop - start, width),
            self._ones[wide].ctypes.data,
            *(matrix.data.ptr, kind, leading),
            *(rows.data.ptr + start * rows.strides[0], kind, rows.strides[0] // itemsize),
            self._zeros[wide].ctypes.data,
            *(out.data.ptr + start * out.strides[0], made, out.strides[0] // out.dtype.itemsize),
            self._accuracy(rows.dtype),
            cublas.CUBLAS_GEMM_DEFAULT,
        )

    def _accuracy(self, dtype: np.dtype) -> int:
        if dtype == np.float64:
            return self._cublas.CUBLAS_COMPUTE_64F
        if dtype == np.float32 and os.environ.get(TF32_SWITCH) == "1":
            return self._cublas.CUBLAS_COMPUTE_32F_FAST_TF32
        return self._cublas.CUBLAS_COMPUTE_32F


def _equal_stride(
    matrices: Sequence[Array], bounds: Sequence[tuple[int, int]], dtype: np.dtype
) -> int | None:
    """Bytes from one matrix to the next, if they are as far apart as their rows are; else None."""
    first, m = matrices[0], bounds[0][1]
    if len(matrices) < 2 or m == 0 or first.dtype != dtype or _lies(first)[1] is None:
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
    """Whether a matrix lies column by column, and from where to where its lines go."""
    (rows, columns), itemsize = matrix.shape, matrix.dtype.itemsize
    steps = [stride // itemsize for stride in matrix.strides]
    if steps[1] == 1 and steps[0] >= columns:
        return False, steps[0]
    if steps[0] == 1 and steps[1] >= rows:
        return True, steps[1]
    return False, None


def gemms(xp: Any) -> Gemms | None:
    """Give the products of the device in use, or None where there is no cuBLAS."""
    if not hasattr(xp, "cuda") or not hasattr(xp.cuda, "cublas"):
        return None
    key = (xp.__name__, xp.cuda.get_device_id())
    with _lock:
        if key not in _every_gemms:
            _every_gemms[key] = Gemms(xp)
        return _every_gemms[key]


_every_gemms: dict[tuple[str, int], Gemms] = {}
