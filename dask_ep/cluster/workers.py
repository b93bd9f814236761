"""How many workers of a cluster run, are waited for, and were lost?

A thread asks the scheduler once a second while the job runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from threading import Event
from typing import Any, NamedTuple

from distributed import Client

from dask_ep.cluster.dask_internals import scheduler_address
from dask_ep.cluster.interrupts import Aside, Wait

SECONDS_BETWEEN_COUNTS = 1.0


class Workers(NamedTuple):
    """The workers of a cluster at one moment."""

    running: int
    waited_for: int
    #: wanted, but not running
    lost: int
    #: left since the first count, whether or not others replaced them

    def __str__(self) -> str:
        others = {"waited for": self.waited_for, "lost": self.lost}
        return ", ".join(
            [
                f"{self.running} running",
                *(f"{count} {what}" for what, count in others.items() if count),
            ]
        )


@contextlib.contextmanager
def counted_workers(
    client: Client,
    wanted: int | None,
    wait: Wait = SimpleQueue.get,
    tell: Callable[[Workers], Any] | None = None,
) -> Iterator[None]:
    """Wait until the wanted number of workers runs, and count them while the body runs.

    Parameters
    ----------
    client : of the cluster
    wanted : workers to wait for, without a timeout; None: those that run now
    wait : as `dask_ep.cluster.interrupts.Interrupts.wait`; what it raises ends the waiting
    tell : called with each count that differs from the previous one, in another thread

    Raises
    ------
    ConnectionError
        If the scheduler is lost while waiting for workers.
    """
    counts = _Counts(client, wanted, tell)
    aside = Aside(counts.go_on, wait)
    try:
        next(iter(aside))
        yield
    finally:
        counts.stopped.set()
        aside.join()


class _Counts:
    def __init__(self, client: Client, wanted: int | None, tell: Callable[[Workers], Any] | None):
        self._client, self._tell = client, tell
        self._address = scheduler_address(client)  # unknown to a client that has lost it
        self._running = set(client.nthreads())
        self._wanted, self._lost = len(self._running) if wanted is None else wanted, 0
        # Those present from the start are not reported, unless they were waited for.
        self._told = self._now() if wanted is None else None
        self.stopped = Event()

    def go_on(self, tell_all_run: Callable[[None], None]) -> None:
        """Count until stopped, and signal the first time that all run."""
        all_ran = False
        try:
            while not self.stopped.is_set():
                if self._count().waited_for == 0 and not all_ran:
                    all_ran = True
                    tell_all_run(None)
                self.stopped.wait(SECONDS_BETWEEN_COUNTS)
        except OSError as error:
            raise ConnectionError(
                f"the scheduler at {self._address} was lost while waiting for {self._wanted} "
                f"workers, of which {len(self._running)} ran"
            ) from error

    def _count(self) -> Workers:
        running = set(self._client.nthreads())
        self._lost += len(self._running - running)
        self._running = running
        now = self._now()
        if now != self._told and self._tell is not None:
            self._told = now
            self._tell(now)
        return now

    def _now(self) -> Workers:
        running = len(self._running)
        return Workers(running, max(self._wanted - running, 0), self._lost)
