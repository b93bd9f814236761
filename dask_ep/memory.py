"""Where do large temporaries and results get their memory?

A batch job makes the same few large arrays for every chunk: the chunk read, the rows gathered, the
products, the result. Fresh memory for each of them costs a page fault per page, a fifth to a half
of the CPU time of a straightforward version. `empty` hands out memory that an earlier array has
died in: its pages are there already.

    empty(...) ──> array ──(last reference gone)──> free blocks ──> the next empty(...)
                                                        │ unused for KEEP_SECONDS
                                                        v
                                                  given back to the system

An array from `empty` is an ordinary array, and can be kept, viewed, sliced and returned: its
memory returns to the pool only when neither it nor any view of it is alive.
"""

from __future__ import annotations

import bisect
import os
import threading
import time
from collections import deque
from math import prod

import numpy as np

SMALLEST = 1 << 20
"""Bytes below which an array is left to the C library, which recycles small blocks well itself."""

KEEP_SECONDS = 2.0
"""Seconds for which an unused block waits for its next user."""

_ALIGNMENT = 64  # bytes: a cache line, and the widest vector load
_GRANULE = 64 << 10  # bytes: sizes are rounded up to this, so that ragged sizes share blocks


class _Lease:
    """The owner of one array's memory; when the array and all its views are gone, so is this."""

    __slots__ = ("__array_interface__", "_block", "_pool")

    def __init__(self, pool: Pool, block: np.ndarray, nbytes: int):
        offset = -block.ctypes.data % _ALIGNMENT
        self.__array_interface__ = {
            "version": 3,
            "typestr": "|u1",
            "shape": (nbytes,),
            "data": (block.ctypes.data + offset, False),
        }
        self._block, self._pool = block, pool

    def __del__(self) -> None:
        self._pool.give_back(self._block)


class Pool:
    """Blocks of memory that outlive the arrays in them.

    Notes
    -----
    A request is served by the smallest free block that holds it and is at most twice as large, else
    by a new one. Free blocks older than `KEEP_SECONDS` go back to the system at the next request,
    or by a thread that lives only while blocks exist. Peak memory is therefore at most that of the
    same program without a pool plus what it freed in the last `KEEP_SECONDS`.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: list[tuple[int, float, np.ndarray]] = []  # by size, then by age
        # Leases die wherever the garbage collector runs, also inside `lease`: they may not lock.
        self._returned: deque[tuple[int, float, np.ndarray]] = deque()
        self._blocks = 0
        self._janitor: threading.Thread | None = None

    def lease(self, nbytes: int) -> np.ndarray:
        """Give `nbytes` uninitialised bytes as a (nbytes,) uint8 array."""
        size = -(-nbytes // _GRANULE) * _GRANULE + _ALIGNMENT
        with self._lock:
            self._sort_in_returned()
            self._drop_unused()
            block = self._pop_fitting(size)
            if block is None:
                block = np.empty(size, np.uint8)
                self._blocks += 1
                self._start_janitor()
        return np.asarray(_Lease(self, block, nbytes))

    def give_back(self, block: np.ndarray) -> None:
        """Take a block whose array has died."""
        self._returned.append((block.nbytes, time.monotonic(), block))

    def free_bytes(self) -> int:
        """Bytes that wait for a user."""
        with self._lock:
            self._sort_in_returned()
            return sum(size for size, _, _ in self._free)

    def clear(self) -> None:
        """Give all free blocks back to the system now."""
        with self._lock:
            self._sort_in_returned()
            self._blocks -= len(self._free)
            self._free.clear()

    def _sort_in_returned(self) -> None:
        while self._returned:
            entry = self._returned.popleft()
            bisect.insort(self._free, entry, key=lambda e: e[:2])

    def _drop_unused(self) -> None:
        deadline = time.monotonic() - KEEP_SECONDS
        young = [entry for entry in self._free if entry[1] >= deadline]
        self._blocks -= len(self._free) - len(young)
        self._free = young

    def _pop_fitting(self, size: int) -> np.ndarray | None:
        at = bisect.bisect_left(self._free, size, key=lambda e: e[0])
        if at < len(self._free) and self._free[at][0] <= 2 * size:
            return self._free.pop(at)[2]
        return None

    def _start_janitor(self) -> None:
        if self._janitor is None:
            self._janitor = threading.Thread(target=self._sweep, name="dask-ep-memory", daemon=True)
            self._janitor.start()

    def _sweep(self) -> None:
        while True:
            time.sleep(KEEP_SECONDS)
            with self._lock:
                self._sort_in_returned()
                self._drop_unused()
                if self._blocks == 0:
                    self._janitor = None
                    return


_pool = Pool()


def _renew_pool() -> None:
    """After a fork the child has the parent's lock and none of its threads: start afresh."""
    global _pool
    _pool = Pool()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_pool)


def empty(shape: tuple[int, ...], dtype: object, like: object = None) -> np.ndarray:
    """Give an uninitialised C-contiguous array, in recycled memory where that pays.

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
    >>> from dask_ep.memory import empty
    >>> empty((3, 4), "float32").shape
    (3, 4)
    """
    xp = np if like is None else like.__array_namespace__()
    dtype = np.dtype(dtype)
    nbytes = prod(shape) * dtype.itemsize
    if xp is not np or nbytes < SMALLEST or dtype.hasobject:
        return xp.empty(shape, dtype=dtype)
    return _pool.lease(nbytes).view(dtype).reshape(shape)


def release() -> None:
    """Give all memory that waits for a user back to the system now."""
    _pool.clear()
