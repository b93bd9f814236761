"""How are the weights of the next experts read while the present ones compute?

    ep_experts task ──> ExpertsAhead ──> the readers' queue: one thread per process, or a few where
                             │           there are many cores; bytes in memory, as they are stored
                             v
    ep_dispatch tasks: the first that needs an expert decodes them, matrix by matrix, and others
                       that need them meanwhile take part

A task that reads would occupy a thread that could compute; and bfloat16, FP8 and MXFP4 wait in
memory as they are stored. The graph bounds memory: it begins to read a block, and to compute one,
when an earlier one is finished.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from dask.system import CPU_COUNT

from dask_ep.experts.experts import Experts
from dask_ep.experts.local_experts import load_experts
from dask_ep.experts.stored_experts import held_in_memory
from dask_ep.experts.weights import Weight
from dask_ep.kernel.expert import Expert

READERS = min(max(CPU_COUNT // 4, 1), 4)
"""Threads of a process that read: each reads about 1 GB per second."""


class _Readers:
    """The threads that read; started at their first use."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None

    def submit(self, *work: Any) -> Future:
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="dask-ep-reader")
            return self._pool.submit(*work)


_readers = _Readers()


def _renew_readers() -> None:
    """After a fork the child has the parent's lock but none of its threads: start afresh."""
    global _readers
    _readers = _Readers()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_readers)


class ExpertsAhead(Sequence[Expert]):
    """Experts that are being read, or are queued to be.

    Parameters
    ----------
    experts : Experts
        All of them are read, for NumPy.
    dtype : the computing dtype
    tell : called when they have been read, optional

    Notes
    -----
    They are in memory as stored until one of them is used, and in the computing dtype from then
    on. A copy in another process reads the files again. Dask is not told their size: the graph
    bounds how many there are, and a worker that spilled them to make room would read them again
    and again. Experts that are dropped before their turn are not read.
    """

    def __init__(self, experts: Experts, dtype: np.dtype, tell: Callable[[], Any] | None = None):
        self._origin = (experts, dtype, tell)
        self._coming: Future[_Compressed] = _readers.submit(_read, *self._origin)
        weakref.finalize(self, self._coming.cancel)

    def __len__(self) -> int:
        return self._origin[0].num_experts

    def __getitem__(self, e: Any) -> Any:
        return self._coming.result().experts()[e]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._origin


class _Compressed:
    """Experts in memory as they are stored, until the first is used."""

    def __init__(self, experts: Experts, dtype: np.dtype):
        self._origin, self._dtype = experts, dtype
        self._lock = threading.Lock()
        self._local: list[Expert] | None = None
        self._decoded: dict[str, list[Future[np.ndarray]]] = {}
        self._waiting: deque[tuple[Weight, Future[np.ndarray]]] = deque()
        with experts.joined():
            for e in range(experts.num_experts):
                for name, weight in held_in_memory(experts, e).weights.items():
                    self._waiting.append((weight, Future()))
                    self._decoded.setdefault(name, []).append(self._waiting[-1][1])

    def experts(self) -> list[Expert]:
        """Return the decoded experts; the caller decodes those that no thread has started."""
        while self._waiting:
            with contextlib.suppress(IndexError):  # another thread was faster
                _decode(*self._waiting.popleft(), self._dtype)
        with self._lock:
            if self._local is None:
                given: dict[str, Sequence[np.ndarray]] = {
                    n: [one.result() for one in stack] for n, stack in self._decoded.items()
                }
                self._decoded.clear()
                self._local = load_experts(self._origin, np, self._dtype, given)
            return self._local


def _decode(weight: Weight, to: Future[np.ndarray], dtype: np.dtype) -> None:
    try:
        (one,) = weight.read(dtype)
        assert one is not None  # `held_in_memory` takes experts that are there
        to.set_result(one)
    except BaseException as error:  # raised in all threads that wait
        to.set_exception(error)


def _read(experts: Experts, dtype: np.dtype, tell: Callable[[], Any] | None) -> _Compressed:
    read = _Compressed(experts, dtype)
    if tell is not None:
        tell()
    return read
