"""How are the weights of the next experts read while the present ones compute?

    ep_experts task ──> ExpertsAhead ──> the readers' queue: one thread per process, or a few where
                             │           there are many cores; straight to what is computed with
                             v
    ep_dispatch tasks: the experts, waiting for them where they have not come yet

A task that reads would keep a thread that could compute from doing so. What bounds memory is the
graph: it begins to read a block when an earlier one is done with.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import import_module
from typing import Any

import numpy as np
from dask.system import CPU_COUNT

from dask_ep.dispatch import Expert
from dask_ep.experts import Experts
from dask_ep.local import LocalExperts

READERS = min(max(CPU_COUNT // 4, 1), 4)
"""Threads of a process that read: one decodes about 1 GB of 16-bit weights in a second."""


class _Readers:
    """The threads that read, from their first use on."""

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
    """After a fork the child has the parent's lock and none of its threads: start afresh."""
    global _readers
    _readers = _Readers()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_readers)


class ExpertsAhead(Sequence):
    """Experts that are being read, or will be when it is their turn.

    Parameters
    ----------
    experts : Experts
        All of them are read.
    xp : name of the array namespace that they compute in
    dtype : the computing dtype
    tell : called when they have been read, optional

    Notes
    -----
    Its size is told to Dask as if the experts were there. Copied to another process it reads its
    files again.
    """

    def __init__(
        self, experts: Experts, xp: str, dtype: np.dtype, tell: Callable[[], Any] | None = None
    ):
        self._origin = (experts, xp, dtype, tell)
        self.nbytes = experts.parameters * experts.num_experts * np.dtype(dtype).itemsize
        self._coming: Future[LocalExperts] = _readers.submit(_load, *self._origin)

    def __len__(self) -> int:
        return self._origin[0].num_experts

    def __getitem__(self, e: int) -> Expert:
        return self._coming.result()[e]

    def __sizeof__(self) -> int:
        return object.__sizeof__(self) + self.nbytes

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._origin


def _load(
    experts: Experts, xp: str, dtype: np.dtype, tell: Callable[[], Any] | None
) -> LocalExperts:
    loaded = experts.load(xp=import_module(xp), dtype=dtype)
    if tell is not None:
        tell()
    return loaded
