"""When may Ctrl-C stop a run?

Python raises an interrupt between any two steps of the main thread. If that happens just after a
lock was acquired, the lock is never released, and whatever waits for it (Dask's event loop, a
thread of the pool) waits forever. So a run computes in other threads and processes, while the main
thread waits for their messages, and interrupts are raised only there:

    other threads                compute ............ compute ......
    main thread   ── start ───── wait ──── tell ───── wait ──────────── close ──>
    signal           x: held ──> raised     x: held ─> raised            x: too late, it is finished
    the second                   the process ends at once; finished blocks stay valid
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from queue import SimpleQueue
from threading import Thread
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)

Wait = Callable[[SimpleQueue], Any]
"""Waits for the next item of a queue; an exception, such as an interrupt, stops the work."""


class Interrupts:
    """Holds SIGINT and SIGTERM back until the program waits; the second ends it at once.

    Parameters
    ----------
    exit_code : int
        Exit code of the process if the second signal ends it.

    Notes
    -----
    A context manager, for the main thread.

    Examples
    --------
    >>> from queue import SimpleQueue
    >>> queue = SimpleQueue()
    >>> queue.put("a block")
    >>> with Interrupts(exit_code=1) as interrupts:
    ...     interrupts.wait(queue)
    'a block'
    """

    def __init__(self, exit_code: int):
        self._exit_code, self._heard, self._is_waiting = exit_code, False, False
        self._before: dict[int, Any] = {}

    def wait(self, queue: SimpleQueue) -> Any:
        """Return the next item of the queue, or raise KeyboardInterrupt if a signal has come."""
        self._is_waiting = True
        try:
            if self._heard:
                raise KeyboardInterrupt
            return queue.get()
        finally:
            self._is_waiting = False

    def __enter__(self) -> Interrupts:
        self._before = {number: signal.signal(number, self._hear) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, _: Any) -> None:
        if self._heard:
            os._exit(self._exit_code)
        self._heard = True
        # Not through sys.stderr, which the program may be writing to.
        os.write(2, b"stopping; press Ctrl-C again to stop now\n")
        if self._is_waiting:
            raise KeyboardInterrupt


class Aside:
    """Runs work in its own thread, and iterates over its messages in the waiting thread.

    Parameters
    ----------
    work : function that takes a function
        The iterator yields what it calls that function with, in order, and raises what it raises.
    wait : `Wait`

    Examples
    --------
    >>> from queue import SimpleQueue
    >>> list(Aside(lambda tell: [tell(block) for block in range(3)], SimpleQueue.get))
    [0, 1, 2]
    """

    def __init__(self, work: Callable[[Callable[[Any], None]], Any], wait: Wait):
        self._work, self._wait = work, wait
        self._told: SimpleQueue = SimpleQueue()  # (whether it is the end, message or exception)
        self._thread = Thread(target=self._run, name="dask-ep-aside", daemon=True)

    def __iter__(self) -> Iterator[Any]:
        self._thread.start()
        while True:
            is_end, told = self._wait(self._told)
            if not is_end:
                yield told
            elif told is None:
                return
            else:
                raise told

    def join(self) -> None:
        """Wait until the work has ended."""
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        try:
            self._work(lambda told: self._told.put((False, told)))
            self._told.put((True, None))
        except BaseException as error:
            self._told.put((True, error))


@contextmanager
def children_ignore_sigint() -> Iterator[None]:
    """Block SIGINT in threads and processes that start meanwhile: only this thread receives it.

    Ctrl-C on a terminal reaches worker processes as well, which would end in the middle of a task.
    """
    # The thread that starts it gets SIGINT afterwards: not the thread of the first child.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # children inherit it
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
