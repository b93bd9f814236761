"""How many chunks may be in flight on a worker at once?

Each chunk in flight holds its rows, packets and answers, so their number is limited, and the others
wait in their threads, in Dask's order:

    enter   waits while the limit is reached
    leave   lets the next one begin

A chunk in flight may wait for experts that are loaded again and are made of the output of another
layer: so each layer may have one chunk in flight, whatever the limit.

A waiting thread would keep the worker from other tasks, and the chunks in flight may be waiting for
one of these, such as the experts of a rank that has lost its owner. So the thread is lent to any
task that is ready here and comes before its own in Dask's order.
"""

from __future__ import annotations

import threading
from bisect import insort
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(eq=False)
class Waiting:
    """A chunk that waits to begin; the first in Dask's order begins first."""

    priority: tuple
    layer: str
    is_wanted: bool = False
    """Whether an earlier task needs its thread."""


class Admission:
    """Bounds the chunks in flight on a worker, of all layers, by `limit`, which may be inf.

    A layer that has none may always begin one.

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
        self._waiting: list[Waiting] = []  # in Dask's order
        self._is_closed = False
        self._begun: Counter[str] = Counter()  # chunks in flight of each layer

    @property
    def under_way(self) -> int:
        return self._begun.total()

    @property
    def has_waiting(self) -> bool:
        return bool(self._waiting)

    def set_limit(self, limit: float) -> None:
        with self._changed:
            self._limit = limit
            self._changed.notify_all()

    def enter(
        self,
        priority: tuple,
        look: Callable[[], object],
        secede: Callable[[], None],
        layer: str = "",
    ) -> None:
        """Wait until a chunk may begin; a RuntimeError tells that the worker closes meanwhile.

        Parameters
        ----------
        priority : place of its task in Dask's order, smallest first
        look : arranges that `lend` is called if a ready task lacks a thread; called without
            waiting for it if this chunk has to wait
        secede : gives this thread back; called if the thread is lent
        layer : its token
        """
        me = Waiting(priority, layer)
        with self._changed:
            insort(self._waiting, me, key=lambda waiting: waiting.priority)
        try:
            if not self._begin(me, look):
                secede()
                self._begin(me)
        except BaseException:
            with self._changed:
                if me in self._waiting:
                    self._waiting.remove(me)
                else:
                    self._begun -= Counter([me.layer])
                self._changed.notify_all()
            raise

    def lend(self, priority: tuple) -> None:
        """Let waiting chunks that come after a task of this priority give their threads back."""
        with self._changed:
            for waiting in self._waiting:
                waiting.is_wanted |= priority < waiting.priority
            self._changed.notify_all()

    def leave(self, layer: str = "") -> None:
        with self._changed:
            self._begun -= Counter([layer])
            self._changed.notify_all()

    def close(self) -> None:
        """End the waiting ones with an error."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _begin(self, me: Waiting, look: Callable[[], object] | None = None) -> bool:
        """Wait until a chunk begins, or its thread is wanted; return whether it has begun.

        Without `look` it has no thread to lend.
        """
        with self._changed:
            if look is not None and not self._is_next(me):
                look()
            self._changed.wait_for(
                lambda: self._is_next(me) or self._is_closed or (look is not None and me.is_wanted)
            )
            if self._is_closed:
                raise RuntimeError("the worker is closing")
            if not self._is_next(me):
                return False
            self._waiting.remove(me)
            self._begun[me.layer] += 1
            self._changed.notify_all()
            return True

    def _is_next(self, me: Waiting) -> bool:
        if not self._begun[me.layer]:
            return me is next(each for each in self._waiting if each.layer == me.layer)
        return self.under_way + 1 <= self._limit and self._waiting[0] is me
