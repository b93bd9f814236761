"""How do rows get onto a GPU and back while it computes?

    file ──> pinned ══ upload ══> device ══ compute ══> device ══ download ══> pinned ──> file

Three streams: while chunk c computes, chunk c + 1 goes up and chunk c - 1 comes down. A task waits
for none of them but for its own download.

The compute stream is the current one, CuPy's default stream unless another was chosen. Work on it
runs in the order in which the threads of a worker launched it, so that arrays pass from task to
task, and from thread to thread, without a wait.
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from math import prod
from typing import Any

import numpy as np

from dask_ep.arrays.namespaces import Array, namespace


def pinned_empty(xp: Any, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Return an uninitialised NumPy array in page-locked memory, as asynchronous copies need.

    Its memory comes from CuPy's pool of such memory, and goes back there with the array.

    Raises
    ------
    MemoryError
        If the host has no more such memory.
    """
    dtype = np.dtype(dtype)
    nbytes = prod(shape) * dtype.itemsize
    if nbytes == 0:
        return np.empty(shape, dtype)
    try:
        return np.ndarray(shape, dtype, buffer=xp.cuda.alloc_pinned_memory(nbytes))
    except xp.cuda.runtime.CUDARuntimeError as error:
        raise MemoryError(
            f"could not allocate {nbytes} bytes of page-locked host memory for rows going to or "
            f"from a GPU ({error}); use smaller chunks (--resume --chunk-rows), or free memory"
        ) from error


def upload(xp: Any, host: np.ndarray) -> Array:
    """Start the copy of a pinned array to the device, and return the device array at once.

    Parameters
    ----------
    xp : namespace of the device array
    host : C-contiguous array in pinned memory, which must not be written to any more

    Returns
    -------
    device array of the shape and dtype of `host`; work launched on the compute stream from now on
    sees the rows
    """
    return _lanes(xp).upload(host)


def download(array: Array) -> np.ndarray:
    """Copy a device array to pinned memory while the device computes, and wait for the copy.

    Returns
    -------
    NumPy array of the shape and dtype of `array`, C-contiguous
    """
    return _lanes(namespace(array)).download(array)


def fill(target: Array, host: np.ndarray) -> None:
    """Start the copy of a pinned array into a contiguous device array of its shape and dtype."""
    _lanes(namespace(target)).fill(target, host)


class Lanes:
    """The upload and download streams of one device.

    Notes
    -----
    CuPy's pool hands freed memory out again in the order of one stream, so a block that was filled
    on the upload stream and read on the compute stream must not go back there while it is being
    read. Such blocks are therefore kept here: when the last array in one has died, the compute
    stream records an event, and the next upload into the block waits for it. Unused blocks of
    other sizes go back to the pool when a new one has to be made.
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
        """Take a block whose last array has died; its event `read` shows when it is read."""
        self._free.setdefault(block.size, deque()).append(block)

    def release(self) -> None:
        """Return the unused blocks to CuPy's pool."""
        for blocks in list(self._free.values()):
            while blocks:
                block = blocks.popleft()
                if block.read is not None:
                    block.read.synchronize()

    def _drop_the_unread(self, size: int) -> None:
        """Return to CuPy's pool the blocks of other sizes that the device has finished with."""
        for other, blocks in list(self._free.items()):
            for _ in range(len(blocks) if other != size else 0):
                try:
                    block = blocks.popleft()
                except IndexError:  # another thread took the last one
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
        with self._up:  # so that CuPy reuses it in the order of this stream
            try:
                return _Block(self._xp, size)
            except self._xp.cuda.memory.OutOfMemoryError:
                self.release()
                return _Block(self._xp, size)


class _Block:
    """A block of device memory for one upload after the other."""

    __slots__ = ("device", "memory", "read", "size")

    def __init__(self, xp: Any, size: int):
        self.memory, self.size = xp.empty(size, dtype=np.uint8), size
        self.device = xp.cuda.get_device_id()
        self.read: Any = None
        #: event after the last use of the previous contents


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
    """The `Lanes` of the current device."""
    key = (xp.__name__, xp.cuda.get_device_id())
    with _lock:
        if key not in _every_lane:
            _every_lane[key] = Lanes(xp)
        return _every_lane[key]
