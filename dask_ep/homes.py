"""Where is the home of a token chunk?

The worker that holds the chunk when its packets are made: they are made there, and their sum comes
back there, so that only rows travel. Left to itself, the scheduler sends whole chunks to workers
that seem less busy, for it does not know that R packets are made of one chunk.

    tokens c ──> memory of w            all in memory: home of c = {w}
    ep_send (c, r)  of every r  ──┐
    ep_sum (c, 0)               ──┴──> worker_restrictions = ONE set, empty until home is known

A home is found when everything that a chunk's packets are made of is there, and forgotten when its
worker leaves: an empty set restricts nothing, and the chunk's tasks find a new one. Where the
placement has chosen the home beforehand, `at_home` sees to it that the chunk comes to lie there.
"""

from __future__ import annotations

from collections.abc import Iterable

from distributed.core import Status
from distributed.scheduler import Scheduler, TaskState

SEND, SUM = "ep_send-", "ep_sum-"
"""What the names of the tasks at home begin with; the chunk is the first number of their keys.
Dask fuses what follows into the sum, and keeps the beginning of its name."""


class Home(set):
    """The address of the worker where a chunk lies, or nothing yet: restrictions of its tasks."""


def give_homes(tasks: Iterable[TaskState]) -> None:
    """Let new tasks of one chunk share a home, and find it where all is in memory already."""
    sums, homes = [], {}
    for task in tasks:
        if not isinstance(task.key, tuple) or not isinstance(task.key[0], str):
            continue
        if task.key[0].startswith(SUM):
            sums.append(task)
        elif task.key[0].startswith(SEND) and not task.worker_restrictions:
            task.worker_restrictions = homes.setdefault(task.key[:2], Home())
            find_home(task)
    for task in sums:
        if not task.worker_restrictions:
            task.worker_restrictions = _home_of_packets(task)


def find_home(task: TaskState) -> None:
    """Set the home of a task's chunk, if it has none and all that it needs is in memory."""
    home = task.worker_restrictions
    if not isinstance(home, Home) or home or task.waiting_on:
        return
    held: dict[str, int] = {}
    for needed in task.dependencies:
        for worker in needed.who_has or ():
            if worker.status == Status.running:
                held[worker.address] = held.get(worker.address, 0) + needed.get_nbytes()
    if held and all(needed.who_has for needed in task.dependencies):
        home.add(max(sorted(held), key=held.__getitem__))


def leave_homes(scheduler: Scheduler, worker: str) -> None:
    """Forget the homes on a worker that is not there any more."""
    for task in scheduler.tasks.values():
        if isinstance(task.worker_restrictions, Home):
            task.worker_restrictions.discard(worker)


def _home_of_packets(task: TaskState) -> Home | None:
    """Give the home of a sum's chunk, by way of one of its answers and the packet behind it."""
    packets = (packet for answer in task.dependencies for packet in answer.dependencies)
    homes = (packet.worker_restrictions for packet in packets)
    return next((home for home in homes if isinstance(home, Home)), None)
