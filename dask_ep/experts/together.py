"""How do several threads load experts together?

steps, one per matrix or expert ──> a queue ──┬─> the thread that needs the results
                                              ├─> others that need them too
                                              └─> the process's reading threads, if invited
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from contextvars import copy_context
from typing import Any, Generic, TypeVar

from dask.system import CPU_COUNT

READERS = min(max(CPU_COUNT // 4, 1), 4)
"""Threads of a process that read: each reads about 1 GB per second."""

Result = TypeVar("Result")


class Together(Generic[Result]):
    """Steps that are taken once, each by the first thread that is free.

    Parameters
    ----------
    steps : functions without arguments, each dropped when it has been called

    Notes
    -----
    Steps begin in order. After an error no further step begins: all that have not raise it too.
    """

    def __init__(self, steps: Iterable[Callable[[], Result]]):
        self.waiting = deque((step, Future[Result]()) for step in steps)
        self._taken = [future for _, future in self.waiting]
        self._error: BaseException | None = None

    def invite(self, most: int | None = None) -> None:
        """Let the process's reading threads take part as soon as they are free; at most `most`.

        They do so in this thread's context, in which a source finds the worker that reads it.
        """
        helpers = min(READERS, len(self.waiting) - 1, READERS if most is None else most)
        for _ in range(helpers):
            readers.submit(copy_context().run, self.take_part)

    def take_part(self) -> None:
        """Take steps until none is left that no thread has begun."""
        while self.waiting:
            with suppress(IndexError):  # another thread was faster
                self._take(*self.waiting.popleft())

    def _take(self, step: Callable[[], Result], future: Future[Result]) -> None:
        try:
            if self._error is not None:
                raise self._error
            future.set_result(step())
        except BaseException as error:  # raised in all threads that need the results
            self._error = error
            future.set_exception(error)

    def results(self) -> list[Result]:
        """Take part, wait for the steps of others, and return the results; to one caller only."""
        try:
            self.take_part()
            results = [future.result() for future in self._taken]
        except BaseException as error:  # Ctrl-C may come between two steps
            self._error = self._error or error
            self.take_part()  # no further step begins
            raise
        self._taken.clear()
        return results


class Readers:
    """The threads that read; started at their first use."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None

    def submit(self, *work: Any) -> Future:
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="dask-ep-reader")
            return self._pool.submit(*work)


readers = Readers()


def _renew_readers() -> None:
    """After a fork the child has the parent's lock but none of its threads: start afresh."""
    global readers
    readers = Readers()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_readers)
