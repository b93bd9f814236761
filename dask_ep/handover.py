"""How do tasks that wait go to where they belong, when owners or homes have changed?

    stuck for want of an owner or a home      no-worker   ──> processing      begin, go_on, free
    sent to a worker that shall not do it     processing  ──> released ──> placed again
                                                          call_back, spread

What a worker has begun it finishes. Only the scheduler's own transitions are used, the first task
first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from distributed.scheduler import Scheduler, TaskState

from dask_ep.homes import Home
from dask_ep.ranks import NOBODY, OwnersOfRank
from dask_ep.window import Held

STIMULUS = "dask-ep-owners"
"""What the scheduler's log says of the cause."""


def is_ours(task: TaskState) -> bool:
    """Whether the task is pinned to owners or to a home, or held."""
    return isinstance(task.worker_restrictions, (OwnersOfRank, Home, Held))


def begin(scheduler: Scheduler, tasks: Iterable[TaskState]) -> None:
    """Give those of the tasks to workers that wait for nothing else."""
    _transition(scheduler, (task for task in tasks if task.state == "no-worker"), "processing")


def go_on(scheduler: Scheduler) -> None:
    """Begin the tasks that were stuck for want of an owner or of their home."""
    begin(
        scheduler,
        (
            task
            for task in scheduler.unrunnable
            if is_ours(task) and NOBODY not in task.worker_restrictions
        ),
    )


def free(scheduler: Scheduler) -> None:
    """Let all tasks run anywhere, and begin those that were stuck."""
    freed = [task for task in scheduler.tasks.values() if is_ours(task)]
    for task in freed:
        task.worker_restrictions = None
    begin(scheduler, freed)


def call_back(scheduler: Scheduler, worker: str, which: Callable[[TaskState], bool]) -> None:
    """Take tasks that wait on this worker, and are not running, to where they belong now.

    A worker that is paused for long would keep others' tasks too, such as the reading of a chunk,
    and ours would wait for them.
    """
    state = scheduler.workers[worker]
    _release(
        scheduler,
        (
            task
            for task in state.processing
            if which(task)
            and task not in state.executing
            and worker not in (task.worker_restrictions or ())
        ),
    )


def spread(scheduler: Scheduler, ranks: Sequence[OwnersOfRank]) -> None:
    """Give tasks of these ranks that are queued on some owner to all that own them now.

    A worker keeps the next of them, as many as it has threads: it may have begun them since its
    last heartbeat.
    """
    ours = {id(of_rank) for of_rank in ranks}
    for state in scheduler.workers.values():
        queued = [task for task in state.processing if task not in state.executing]
        queued.sort(key=lambda task: task.priority)
        behind = queued[state.nthreads :]
        _release(scheduler, (task for task in behind if id(task.worker_restrictions) in ours))
    go_on(scheduler)


def _release(scheduler: Scheduler, tasks: Iterable[TaskState]) -> None:
    """Take tasks from their workers, for the scheduler to place them again."""
    _transition(scheduler, tasks, "released")


def _transition(scheduler: Scheduler, tasks: Iterable[TaskState], state: str) -> None:
    # The scheduler takes the last of them first.
    last_first = sorted(tasks, key=lambda task: task.priority, reverse=True)
    scheduler.transitions({task.key: state for task in last_first}, STIMULUS)
