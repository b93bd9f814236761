"""Where do large temporaries and results get their memory?

A batch job makes the same few large arrays for every chunk: the chunk read, the rows gathered, the
products, the result. Fresh memory for each of them costs a page fault per page, a fifth to a half
of the CPU time of a straightforward version. `empty` reuses the memory of an array that has died:
its pages are mapped already.

    empty(...) ──> array ──(last reference gone)──> free blocks ──> the next empty(...)
                                                        │ unused for KEEP_SECONDS, or for
                                                        v REPLACE_SECONDS when others are made
                                                  given back to the system

An array from `empty` is an ordinary array, and can be kept, viewed, sliced and returned: its
memory returns to the pool only when neither it nor any view of it is alive.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections import deque
from contextlib import suppress
from math import prod

import numpy as np
from numpy.typing import DTypeLike

from dask_ep.arrays.namespaces import Array, namespace

SMALLEST_BLOCK = 1 << 20
"""Bytes below which an array is left to the C library, which recycles small blocks well itself."""

KEEP_SECONDS = 2.0
"""Seconds for which an unused block waits for its next use, at least, unless it is replaced."""

REPLACE_SECONDS = 0.1
"""Seconds after which an unused block is replaced, when a block of another size must be made: long
enough for fresh memory to cost little, short enough for the pool not to keep every size."""

RUN_BYTES = 128 << 10
"""Bytes of rows that go through several steps together: with the other operands they fit a core's
own cache. Halves the time of silu, and of adding up outputs, compared to steps over whole tiles."""

C_KEEPS_BLOCKS, C_KEEPS_FREE = 4 << 20, 32 << 20
"""Bytes of the largest block that the C library recycles in a worker, and of the freed memory that
it keeps at the end of each of its heaps: see `keep_freed_memory`."""

_MALLOPT = {-3: C_KEEPS_BLOCKS, -1: C_KEEPS_FREE}  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD

_ALIGNMENT = 64  # bytes: a cache line, and the widest vector load


class _Block:
    """A block of memory for one array after the other."""

    __slots__ = ("address", "free_since", "memory", "size")

    def __init__(self, size: int):
        self.memory = np.empty(size + _ALIGNMENT, np.uint8)
        address = self.memory.ctypes.data
        self.address = address + -address % _ALIGNMENT
        self.size = size
        self.free_since = 0.0


class _Lease:
    """The owner of one array's memory; when the array and all its views are gone, so is this."""

    __slots__ = ("__array_interface__", "_block", "_pool")

    def __init__(self, pool: Pool, block: _Block, nbytes: int):
        self.__array_interface__ = {
            "version": 3,
            "typestr": "|u1",
            "shape": (nbytes,),
            "data": (block.address, False),
        }
        self._block, self._pool = block, pool

    def __del__(self) -> None:
        self._pool.give_back(self._block)


class Pool:
    """Blocks of memory that outlive the arrays in them.

    Notes
    -----
    Sizes are rounded up to one of eight steps between powers of two; a request takes a free block
    of its size or the next larger one below twice that, else a new block, which replaces those that
    were unused for `REPLACE_SECONDS`. A thread, which lives only while blocks exist, gives blocks
    back to the system that were unused for `KEEP_SECONDS`. Peak memory is at most that of the same
    program without a pool plus what it freed in the last `REPLACE_SECONDS`.
    """

    def __init__(self) -> None:
        # Leases die wherever the garbage collector runs, so returning takes no lock: appending
        # to and popping from a deque are atomic. In each deque the oldest are on the left.
        self._free: dict[int, deque[_Block]] = {}
        self._lock = threading.Lock()  # for the two below
        self._blocks = 0
        self._janitor: threading.Thread | None = None

    def lease(self, nbytes: int) -> np.ndarray:
        """Return `nbytes` uninitialised bytes as a (nbytes,) uint8 array."""
        step = 1 << max(nbytes.bit_length() - 4, 0)
        smallest = -(-nbytes // step) * step
        for size in range(smallest, 2 * smallest, step):
            try:
                block = self._free[size].pop()
                break
            except (KeyError, IndexError):
                continue
        else:
            self.drop(time.monotonic() - REPLACE_SECONDS)
            block = self._new_block(smallest)
        return np.asarray(_Lease(self, block, nbytes))

    def give_back(self, block: _Block) -> None:
        """Take a block whose array has died."""
        block.free_since = time.monotonic()
        try:
            self._free[block.size].append(block)
        except KeyError:
            self._free.setdefault(block.size, deque()).append(block)

    def drop(self, older_than: float) -> None:
        """Give blocks back to the system that have been unused since before `older_than`."""
        dropped = 0
        for blocks in list(self._free.values()):
            while blocks and blocks[0].free_since < older_than:
                try:
                    blocks.popleft()
                    dropped += 1
                except IndexError:  # another thread took the last one
                    break
        with self._lock:
            self._blocks -= dropped

    def _new_block(self, size: int) -> _Block:
        block = _Block(size)
        with self._lock:
            self._blocks += 1
            if self._janitor is None:
                self._janitor = threading.Thread(
                    target=self._sweep, name="dask-ep-memory", daemon=True
                )
                self._janitor.start()
        return block

    def _sweep(self) -> None:
        while True:
            time.sleep(KEEP_SECONDS)
            self.drop(time.monotonic() - KEEP_SECONDS)
            with self._lock:
                if self._blocks == 0:
                    self._janitor = None
                    return


_pool = Pool()


def _renew_pool() -> None:
    """After a fork the child has the parent's lock but none of its threads: start afresh."""
    global _pool
    _pool = Pool()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_pool)


def aligned(array: Array) -> Array:
    """The array, or an aligned copy of it that is stored in the same order.

    NumPy copies an unaligned array whole each time that rows are taken from it, and multiplies it
    in another way, with other last bits. Arrays that Dask received over a network are often
    unaligned: their frames follow one another.
    """
    if not isinstance(array, np.ndarray) or array.flags.aligned:
        return array
    by_columns = array.flags.f_contiguous and not array.flags.c_contiguous
    copy = empty(array.T.shape, array.dtype).T if by_columns else empty(array.shape, array.dtype)
    copy[...] = array
    return copy


def empty(shape: tuple[int, ...], dtype: DTypeLike, like: Array | None = None) -> Array:
    """Return an uninitialised C-contiguous array, in recycled memory where that pays.

    Parameters
    ----------
    shape : tuple of int
    dtype : dtype
    like : array, optional
        An array whose namespace (NumPy, CuPy, ...) the result belongs to; NumPy without it.
        Only NumPy memory is recycled here: CuPy recycles its own.

    Returns
    -------
    array of `shape` and `dtype`, contents arbitrary

    Examples
    --------
    >>> from dask_ep.arrays.memory import empty
    >>> empty((3, 4), "float32").shape
    (3, 4)
    """
    xp = np if like is None else namespace(like)
    dtype = np.dtype(dtype)
    nbytes = prod(shape) * dtype.itemsize
    if xp is not np or nbytes < SMALLEST_BLOCK or dtype.hasobject:
        return xp.empty(shape, dtype=dtype)
    return _pool.lease(nbytes).view(dtype).reshape(shape)


def runs_in_cache(x: Array) -> list[slice]:
    """Cut rows into runs that stay in a core's cache between steps; on a device, into one run.

    Examples
    --------
    >>> import numpy as np
    >>> from dask_ep.arrays.memory import runs_in_cache
    >>> runs_in_cache(np.zeros((100, 1024), "float32"))[-2:]
    [slice(64, 96, None), slice(96, 128, None)]
    """
    step = len(x)
    if namespace(x) is np and x.nbytes > RUN_BYTES:
        step = max(RUN_BYTES // x[0].nbytes, 1)
    return [slice(first, first + step) for first in range(0, len(x), max(step, 1))]


def keep_freed_memory() -> bool:
    """Let the C library of this process recycle the blocks that are too small for the pool.

    Dask starts workers with `MALLOC_TRIM_THRESHOLD_=65536`, by which glibc gives back every block
    of 128 KiB or more as soon as it is freed. Then each packet, tile and answer costs page faults,
    a sixth to a third of the time of jobs with many small packets. What is kept counts as used to
    Dask, which may pause a worker for it: `release` gives it back.

    Returns
    -------
    bool
        Whether the C library could be configured: only glibc can.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return all(mallopt(option, value) == 1 for option, value in _MALLOPT.items())


def release() -> None:
    """Give all unused memory back to the system now: the pool's, and the C library's if it can."""
    _pool.drop(time.monotonic())
    with suppress(AttributeError, OSError, TypeError):  # only glibc can
        ctypes.CDLL(None).malloc_trim(0)
