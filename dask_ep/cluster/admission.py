"""How many chunks may be in flight on a worker at once?

Each chunk that is in flight holds its rows, packets and answers, so there is a limit, and the
others wait in their threads, in Dask's order:

    enter   waits while as many are in flight as may be, then gives its thread to Dask (`secede`)
    leave   lets the next one begin

A thread that waits would keep the worker from other tasks, and one of these may be what the chunks
in flight are waiting for: the experts of a rank that has lost its owner, say. So it is lent to any
task that is ready here and comes before its own in Dask's order.
"""

from __future__ import annotations

import heapq
import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(order=True)
class Waiting:
    """A chunk that waits to begin; who comes first in Dask's order begins first."""

    priority: tuple
    number: int
    is_wanted: bool = field(default=False, compare=False)
    """Whether a task that comes before it lacks its thread."""


class Admission:
    """Bounds the chunks that are in flight, of all layers of a worker.

    Parameters
    ----------
    limit : chunks in flight at once; inf for no bound

    Examples
    --------
    >>> admission = Admission(limit=1)
    >>> admission.enter((0,), lambda: None, lambda: None)
    >>> admission.under_way
    1
    >>> admission.leave()
    """

    def __init__(self, limit: float):
        self._limit, self._changed = limit, threading.Condition()
        self._waiting: list[Waiting] = []
        self._number = itertools.count()
        self._is_closed = False
        self.under_way = 0

    @property
    def has_waiting(self) -> bool:
        return bool(self._waiting)

    def set_limit(self, limit: float) -> None:
        with self._changed:
            self._limit = limit
            self._changed.notify_all()

    def enter(
        self, priority: tuple, look: Callable[[], object], secede: Callable[[], None]
    ) -> None:
        """Wait until a chunk may begin.

        Parameters
        ----------
        priority : place of its task in Dask's order, smallest first
        look : lets `lend` be called if a task is ready that lacks a thread; called if this one
            has to wait, and not waited for
        secede : gives this thread back; called once, when the chunk begins or the thread is lent

        Raises
        ------
        RuntimeError
            If the worker closes meanwhile.
        """
        me = Waiting(priority, next(self._number))
        with self._changed:
            heapq.heappush(self._waiting, me)
            must_wait = not self._is_next(me)
        try:
            if must_wait:
                look()
            has_begun = self._begin(me, or_lend=True)
            secede()
            if not has_begun:
                self._begin(me)
        except BaseException:
            self._give_up(me)
            raise

    def lend(self, priority: tuple) -> None:
        """Let chunks give their threads back that wait and come after a task of this priority."""
        with self._changed:
            for waiting in self._waiting:
                waiting.is_wanted |= priority < waiting.priority
            self._changed.notify_all()

    def leave(self) -> None:
        with self._changed:
            self.under_way -= 1
            self._changed.notify_all()

    def close(self) -> None:
        """Let those that wait end with an error."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _begin(self, me: Waiting, or_lend: bool = False) -> bool:
        """Wait until a chunk begins, or until its thread is wanted; give whether it has begun."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._is_next(me) or self._is_closed or (or_lend and me.is_wanted)
            )
            if self._is_closed:
                raise RuntimeError("the worker is closing")
            if not self._is_next(me):
                return False
            heapq.heappop(self._waiting)
            self.under_way += 1
            self._changed.notify_all()
            return True

    def _give_up(self, me: Waiting) -> None:
        with self._changed:
            if me in self._waiting:
                self._waiting.remove(me)
                heapq.heapify(self._waiting)
            else:
                self.under_way -= 1
            self._changed.notify_all()

    def _is_next(self, me: Waiting) -> bool:
        return self.under_way < self._limit and self._waiting[0] is me
