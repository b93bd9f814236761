"""What of distributed do we use beyond its documented API?

All of it is here, so that one look tells what a new release may break; a test holds each line
against the lowest and the newest version that we allow. Dask's own P2P shuffle uses the same:
handlers and streams of workers, the scheduler's transitions and the restrictions of its tasks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from dask.typing import Key
from distributed import Client, Future
from distributed.comm import Comm, connect
from distributed.core import clean_exception, error_message
from distributed.scheduler import Scheduler, TaskState
from distributed.threadpoolexecutor import thread_state as pool_state
from distributed.worker import WORKER_ANY_RUNNING, Worker, get_worker, secede, thread_state

FIRST = -(2**40)
"""A priority before any that users give; Dask takes the smallest number first."""

STIMULUS = "dask-ep"
"""What the scheduler's log says of the cause."""

RESULT_SECONDS = 5.0
"""How long a result may take to come, at first, before it is asked for again."""


# --- at the client -------------------------------------------------------------------------------


def scheduler_address(client: Client) -> str:
    assert client.scheduler is not None  # it is connected
    return str(client.scheduler.address)


def result_of(future: Future) -> Any:
    """The result of a task, which is asked for again where that takes long.

    The scheduler fetches it from a worker. One that is lost just then the scheduler tries to reach
    for half a minute, though others may have computed the task again meanwhile.
    """
    seconds = RESULT_SECONDS
    while True:
        try:
            return future.result(seconds)
        except TimeoutError:
            if future.status == "error":  # the task's own
                raise
        seconds *= 2  # the scheduler may be slow


# --- on a worker ---------------------------------------------------------------------------------


def current_worker() -> Worker | None:
    """The worker whose task runs in this thread, if one does."""
    try:
        return get_worker()
    except ValueError:
        return None


def plugin_of(worker: Worker, name: str) -> Any:
    return worker.plugins.get(name)


def is_closing(worker: Worker) -> bool:
    return worker.status not in WORKER_ANY_RUNNING


def threads_of(worker: Worker) -> int:
    return worker.state.nthreads


def loop_of(worker: Worker) -> asyncio.AbstractEventLoop:
    loop: Any = worker.loop  # Tornado's types know a loop without it
    return loop.asyncio_loop


def install(
    worker: Worker,
    requests: Mapping[str, Callable],
    messages: Mapping[str, Callable],
    metrics: Mapping[str, Callable],
) -> None:
    """Let a worker answer requests of other workers and hear messages of the scheduler, for good.

    `metrics` go to the scheduler with each heartbeat. A message that nobody hears would end the
    worker's connection to the scheduler.
    """
    worker.handlers.update(requests)
    worker.stream_handlers.update(messages)
    worker.metrics.update(metrics)


async def open_stream(worker: Worker, address: str, op: str) -> Comm:
    """Open a connection with another worker, and hand it to the one's handler of requests `op`.

    The handler is called with the connection, which it ends itself, and with this worker's address
    as `sender`.

    Raises
    ------
    OSError
        If there is no connection.
    """
    comm = await connect(address, **worker.connection_args)
    try:
        await comm.write({"op": op, "sender": worker.address, "reply": False})
    except BaseException:
        comm.abort()
        raise
    return comm


def keep_on_loop(comm: Comm) -> None:
    """Let a connection write and read on the event loop whatever the size of a message.

    Else Dask estimates the size of each, and gives large ones to another thread: for arrays, which
    go as they lie, in vain.
    """
    comm.allow_offload = False


def give_up(worker: Worker, address: str) -> None:
    """End what this worker fetches from another one that is lost.

    Dask would try for half a minute to connect (``distributed.comm.timeouts.connect``), and compute
    nothing again of what it fetches before that.
    """
    worker.rpc.remove(address)


def remote_error(error: BaseException) -> dict[str, Any]:
    """What another worker gets instead of an answer: see `raise_remote`."""
    if not isinstance(error, Exception):  # it would end the event loop there
        error = RuntimeError(f"{type(error).__name__}: {error}")
    return dict(error_message(error, status="uncaught-error"))


def raise_remote(answer: dict[str, Any]) -> None:
    """Raise what another worker raised instead of answering."""
    _, error, trace = clean_exception(**answer)
    assert error is not None
    raise error.with_traceback(trace)


def leave_pool() -> None:
    """Give the thread of this task back to Dask, unless that has been done: tasks are fused."""
    if pool_state.proceed:
        secede()


def key_here() -> Key:
    """The key of the task that runs in this thread."""
    return thread_state.key


def priority_here() -> tuple:
    """The place in Dask's order of the task that runs in this thread: smaller comes first."""
    worker = get_worker()
    task = worker.state.tasks.get(thread_state.key)
    return (task.priority or ()) if task is not None else ()


def is_running(worker: Worker, key: Key) -> bool:
    """Whether a task runs in a thread of this worker, be it for nobody any more."""
    task = worker.state.tasks.get(key)
    return task in worker.state.executing or task in worker.state.long_running


def first_ready(worker: Worker) -> tuple | None:
    """The place in Dask's order of the first task that is ready here and lacks a thread, if any."""
    ready = worker.state.ready
    return tuple(ready.peek().priority or ()) if ready else None


# --- on the scheduler ----------------------------------------------------------------------------


def tell(scheduler: Scheduler, workers: Iterable[str], message: dict[str, Any]) -> None:
    """Send a message to workers; it arrives before what is sent to them later."""
    for address in workers:
        if address in scheduler.stream_comms:
            scheduler.worker_send(address, dict(message))


def pin(task: TaskState, workers: set[str]) -> None:
    """Let a task run on these workers alone, whatever else restricted it. The set is kept."""
    task.worker_restrictions = workers
    task.host_restrictions = None
    task.resource_restrictions = None
    task.loose_restrictions = False


def restrict(task: TaskState, workers: set[str]) -> bool:
    """Let a task run on these workers alone, unless somebody restricts it; the set is kept."""
    if task.worker_restrictions or task.host_restrictions or task.resource_restrictions:
        return False
    task.worker_restrictions = workers
    return True


def hasten(task: TaskState, able: Callable[[Mapping[str, float]], set[str]]) -> list[TaskState]:
    """Let a task, and what it is made of, come before all else if it has to be computed again.

    It must not wait for a task that waits for it. So it goes to the front of each queue, holds no
    resources, and is not kept back on the scheduler, as it would be without a restriction: unless
    somebody restricts it, it may run on the workers that are `able` to give the resources that it
    needs. Gives the tasks to `release_hastened`.
    """
    seen, todo, restricted = {task}, [task], []
    while todo:
        for made_of in todo.pop().dependencies - seen:
            seen.add(made_of)
            todo.append(made_of)
            free = not (made_of.worker_restrictions or made_of.host_restrictions)
            if free and made_of.state != "processing":
                made_of.worker_restrictions = able(made_of.resource_restrictions or {})
                made_of.resource_restrictions = None
                restricted.append(made_of)
    for each in seen:
        each.priority = (FIRST, *(each.priority or ())[1:])
    return restricted


def release_hastened(
    scheduler: Scheduler, tasks: Iterable[TaskState], kind: type[Any]
) -> list[TaskState]:
    """Restrict tasks as before `hasten`, but for those that run, which are given back.

    `kind` is that of the sets of workers, which keep the resources that a task `needs`.
    """
    running = []
    for task in tasks:
        restrictions = task.worker_restrictions
        if not isinstance(restrictions, kind) or task.state == "forgotten":
            continue
        if task.state == "processing":
            running.append(task)
            continue
        task.resource_restrictions = restrictions.needs or None
        task.worker_restrictions = None
        if task.state == "no-worker":
            _transition(scheduler, [task], "processing")
    return running


def run_again(scheduler: Scheduler, task: TaskState) -> None:
    """Compute a task whose result is not kept."""
    scheduler.transitions({task.key: "waiting"}, STIMULUS)


def place_again(scheduler: Scheduler, task: TaskState) -> None:
    """Take a task that no worker has begun to where it may run now."""
    if task.state == "no-worker":
        _transition(scheduler, [task], "processing")
    elif task.processing_on is not None and task not in task.processing_on.executing:
        _transition(scheduler, [task], "released")


def begin_stuck(scheduler: Scheduler, kind: type[set]) -> None:
    """Give workers the tasks that wait for one, restricted to sets of this kind."""
    stuck = [t for t in scheduler.unrunnable if isinstance(t.worker_restrictions, kind)]
    _transition(scheduler, stuck, "processing")


def free_stuck(scheduler: Scheduler, kind: type[set]) -> None:
    """Let all tasks run anywhere that are restricted to sets of this kind."""
    freed = [t for t in scheduler.tasks.values() if isinstance(t.worker_restrictions, kind)]
    for task in freed:
        task.worker_restrictions = None
    _transition(scheduler, (task for task in freed if task.state == "no-worker"), "processing")


def call_back(scheduler: Scheduler, worker: str, kind: type[set]) -> None:
    """Take tasks that this worker may not run any more, and has not begun, to those that may."""
    state = scheduler.workers[worker]
    waiting = [
        task
        for task in state.processing
        if task not in state.executing
        and isinstance(task.worker_restrictions, kind)
        and worker not in task.worker_restrictions
    ]
    _transition(scheduler, waiting, "released")


def _transition(
    scheduler: Scheduler, tasks: Iterable[TaskState], state: Literal["processing", "released"]
) -> None:
    # The scheduler takes the last of them first.
    last_first = sorted(tasks, key=lambda task: task.priority or (), reverse=True)
    scheduler.transitions({task.key: state for task in last_first}, STIMULUS)
