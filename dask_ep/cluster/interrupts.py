"""When may Ctrl-C stop a run?

Python raises an interrupt between any two steps of the main thread. One that comes just when a lock
has been taken leaves it taken, and what waits for it (Dask's event loop, a thread of the pool)
waits for ever. So a run computes aside, in other threads and processes, while the main thread waits
for what they tell, and only there are interrupts raised:

    other threads                compute ............ compute ......
    main thread   ── start ───── wait ──── tell ───── wait ──────────── close ──>
    signal           x: held ──> raised     x: held ─> raised            x: too late, all is done
    the second                   the process ends at once; what is written stays good
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
"""How to wait for what a queue gives next; what it raises, an interrupt say, stops the work."""


class Interrupts:
    """Holds SIGINT and SIGTERM back until the program waits; at the second, ends it at once.

    Parameters
    ----------
    exit_code : int
        Of the process that is ended by the second signal.

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
        # Not by sys.stderr, which the program may be writing to.
        os.write(2, b"stopping; press Ctrl-C again to stop now\n")
        if self._is_waiting:
            raise KeyboardInterrupt


class Aside:
    """Works in a thread of its own, and gives what is told there to the thread that waits.

    Parameters
    ----------
    work : function of a function
        What it calls the latter with comes out here, in that order; what it raises is raised here.
    wait : `Wait`

    Examples
    --------
    >>> from queue import SimpleQueue
    >>> list(Aside(lambda tell: [tell(block) for block in range(3)], SimpleQueue.get))
    [0, 1, 2]
    """

    def __init__(self, work: Callable[[Callable[[Any], None]], Any], wait: Wait):
        self._work, self._wait = work, wait
        self._told: SimpleQueue = SimpleQueue()  # (is it the end?, what is told or raised)
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
    """Let threads and processes that start meanwhile never hear SIGINT: they leave it to this one.

    Ctrl-C on a terminal reaches worker processes as well, which would end in the middle of a task.
    """
    # The thread that starts it gets SIGINT afterwards: not the thread of the first child.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # children inherit it
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
