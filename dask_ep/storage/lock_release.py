"""When is a cluster done with an output whose `Output` was dropped?

The tasks that write an output stay on a scheduler as long as any client has their futures, even if
the `Output` was dropped. Its lock is held for as long.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from typing import Any

from dask_ep.storage import journal

POLL_SECONDS = 0.2
ANSWER_SECONDS = 10.0

WRITING = frozenset(("waiting", "no-worker", "queued", "processing"))
"""States of a scheduler's unfinished tasks; "released" is that of tasks whose result was used."""


def release_when_written(directory: str, keys: Sequence[Any]) -> None:
    """Release an output's lock when no client of this process waits for its tasks any more.

    Returns at once: the schedulers are queried in a thread, since the garbage collector calls this.
    """
    clients = _clients() if threading.main_thread().is_alive() else []  # or the process is ending
    if not clients:
        journal.release_lock(directory)
        return
    watch = _Watch(clients, directory, keys)
    try:
        watch.start()
    except RuntimeError:  # the interpreter ends, and its clients with it
        journal.release_lock(directory)


def wait_until_asked(directory: str) -> None:
    """Wait for a lock that is about to be released, as its tasks may all be done."""
    for thread in threading.enumerate():
        if isinstance(thread, _Watch) and thread.directory == directory:
            for _ in range(2):  # the first result may be from a query made before this call
                thread.asked.clear()
                while thread.is_alive() and not thread.asked.wait(POLL_SECONDS):
                    pass


def _clients() -> list[weakref.ref]:
    """Return the clients of this process; none if distributed was never imported."""
    if "distributed.client" not in sys.modules:
        return []
    clients = list(sys.modules["distributed.client"].Client._instances)
    return [weakref.ref(client) for client in clients if client.status == "running"]


class _Watch(threading.Thread):
    """Checks periodically whether tasks are left, and releases the lock when none are."""

    def __init__(self, clients: Sequence[weakref.ref], directory: str, keys: Sequence[Any]):
        super().__init__(name=f"dask-ep-lock {directory}", daemon=True)
        self.clients, self.directory, self.keys = clients, directory, keys
        self.asked = threading.Event()

    def run(self) -> None:
        while any(_waits(client(), self.keys) for client in self.clients):
            self.asked.set()
            time.sleep(POLL_SECONDS)
        journal.release_lock(self.directory)
        self.asked.set()


def _waits(client: Any, keys: Sequence[Any]) -> bool:
    """Return whether a client's scheduler has unfinished tasks, or is about to get some."""
    if client is None or client.status != "running":
        return False
    try:
        asked = asyncio.run_coroutine_threadsafe(_ask(client, keys), client.loop.asyncio_loop)
        return asked.result(ANSWER_SECONDS)
    except TimeoutError:
        return True  # it is busy
    except (OSError, RuntimeError, AttributeError):
        return False  # it is gone, and its tasks with it


async def _ask(client: Any, keys: Sequence[Any]) -> bool:
    pending = [key for key, state in client.futures.items() if state.status == "pending"]
    states = await client.scheduler.get_task_status(keys=[*keys, *pending])
    on_the_way = any(states[key] is None for key in pending)  # a graph that it has not read yet
    return on_the_way or any(states[key] in WRITING for key in keys)
