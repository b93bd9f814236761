"""Which parts of distributed do we use beyond its documented API?

All of them are here, to show at a glance what a new release may break; tests check each against the
lowest and the newest supported version. Dask's own P2P shuffle uses the same: handlers and streams
of workers, the scheduler's transitions and the restrictions of its tasks.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from dask.typing import Key
from distributed import Client, Future
from distributed.comm import Comm, CommClosedError, connect
from distributed.comm.tcp import TCP
from distributed.core import clean_exception, error_message
from distributed.protocol import dumps, loads
from distributed.scheduler import Scheduler, TaskState
from distributed.threadpoolexecutor import thread_state as pool_state
from distributed.worker import WORKER_ANY_RUNNING, Worker, get_worker, secede, thread_state

FIRST = -(2**40)
"""A priority before any that users set; Dask takes the smallest number first."""

STIMULUS = "dask-ep"
"""Stimulus id in the scheduler's log."""

RESULT_SECONDS = 5.0
"""First timeout after which a result is requested again."""

AGAIN_SECONDS = 0.1
"""How long to wait for a cancelled fetch to end before others are cancelled."""


# --- at the client -------------------------------------------------------------------------------


def scheduler_address(client: Client) -> str:
    assert client.scheduler is not None  # it is connected
    return str(client.scheduler.address)


def result_of(future: Future) -> Any:
    """The result of a task, requested again if it takes long.

    The scheduler fetches it from a worker. If that worker is lost just then, the scheduler tries
    to reach it for half a minute, although others may have recomputed the task meanwhile.
    """
    seconds = RESULT_SECONDS
    while True:
        try:
            return future.result(seconds)
        except TimeoutError:
            if future.status == "error":  # the task's own error
                raise
        seconds *= 2  # the scheduler may be slow


# --- on a worker ---------------------------------------------------------------------------------


def current_worker() -> Worker | None:
    """The worker whose task runs in this thread, if any."""
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
    loop: Any = worker.loop  # Tornado's types allow a loop without it
    return loop.asyncio_loop


def install(
    worker: Worker,
    requests: Mapping[str, Callable],
    messages: Mapping[str, Callable],
    metrics: Mapping[str, Callable],
) -> None:
    """Register a worker's handlers of workers' requests and of the scheduler's messages.

    `metrics` go to the scheduler with each heartbeat. A message without a handler would end the
    worker's connection to the scheduler.
    """
    worker.handlers.update(requests)
    worker.stream_handlers.update(messages)
    worker.metrics.update(metrics)


def when_memory_is_short(worker: Worker, act: Callable[[], object]) -> None:
    """Call a function with each heartbeat while Dask would spill, or pause this worker.

    Dask judges by the memory of the process, with what is free there and was not given back. A
    worker that has paused frees nothing else, so it would never go on.
    """

    def look(worker: Worker) -> None:
        manager = worker.memory_manager
        share = manager.memory_spill_fraction or manager.memory_pause_fraction
        most = share * (manager.memory_limit or 0)
        if most and worker.monitor.get_process_memory() > most:
            act()

    worker.metrics["dask_ep_memory"] = look


async def open_stream(worker: Worker, address: str, op: str) -> Comm:
    """Open a connection to another worker, and pass it to that worker's handler of requests `op`.

    The handler is called with the connection, which it must close, and with this worker's address
    as `sender`.

    Raises
    ------
    OSError
        If the connection fails.
    """
    comm = await connect(address, **worker.connection_args)
    try:
        await comm.write({"op": op, "sender": worker.address, "reply": False})
    except BaseException:
        comm.abort()
        raise
    return comm


def keep_on_loop(comm: Comm) -> None:
    """Let a connection write and read messages of any size on the event loop.

    Otherwise Dask estimates the size of each, and serializes large ones in another thread, which
    is useless for arrays, as they are sent without copying.
    """
    comm.allow_offload = False


def take_socket(comm: Comm) -> tuple[socket.socket, dict[str, Any]] | None:
    """Take the socket of a plain TCP connection, and the context of messages for its other end.

    None for other connections. Nothing may be on its way to this end, as it might be lost.

    Raises
    ------
    OSError
        If the connection is closed, or has not sent all yet.
    """
    if type(comm) is not TCP:
        return None
    stream: Any = comm.stream
    if stream is None or stream.closed() or stream.writing():
        comm.abort()
        raise CommClosedError(f"the connection with {comm.peer_address} was lost as it began")
    infos = {"sender": comm.local_info, "recipient": comm.remote_info}
    taken = stream.socket.dup()  # the connection lives until the last of its sockets is closed
    comm.abort()
    return taken, {**infos, **comm.handshake_options}


def to_frames(message: Any, context: Mapping[str, Any]) -> list[Any]:
    """Serialize a message into buffers, an array into one whatever its size; from any thread."""
    return dumps(message, on_error="raise", context=context, frame_split_size=2**62)


def from_frames(frames: list[memoryview]) -> Any:
    """The message of these buffers; its arrays are in them."""
    return loads(frames)


def give_up(worker: Worker, address: str) -> None:
    """Cancel this worker's fetches from another one that is lost.

    Dask would try for half a minute to connect (``distributed.comm.timeouts.connect``), and
    recompute nothing of what it fetches before that.
    """
    try:
        worker.rpc.remove(address)
    except RuntimeError:  # one that was cancelled before has not ended yet
        loop_of(worker).call_later(AGAIN_SECONDS, give_up, worker, address)


def remote_error(error: BaseException) -> dict[str, Any]:
    """The reply to another worker for an error: see `raise_remote`."""
    try:
        if not isinstance(error, Exception):  # it would end the event loop there
            error = RuntimeError(f"{type(error).__name__}: {error}")
        return dict(error_message(error, status="uncaught-error"))
    except Exception:  # its own text cannot be made
        return remote_error(RuntimeError(f"{type(error).__name__}, an error without a text"))


def raise_remote(answer: dict[str, Any]) -> None:
    """Raise the error that another worker sent instead of an answer."""
    _, error, trace = clean_exception(**answer)
    assert error is not None
    raise error.with_traceback(trace)


def leave_pool() -> None:
    """Give this task's thread back to Dask, once: several steps may be fused in a task."""
    if pool_state.proceed:
        secede()


def key_here() -> Key | None:
    """The key of the task that runs in this thread; None in a thread that a task has started."""
    return getattr(thread_state, "key", None)


def begun_here() -> float:
    """When the task of this thread began, by `time.time`."""
    return float(thread_state.start_time)


def priority_here() -> tuple:
    """The priority in Dask's order of the task that runs in this thread: smaller comes first."""
    worker = get_worker()
    task = worker.state.tasks.get(thread_state.key)
    return (task.priority or ()) if task is not None else ()


def is_running(worker: Worker, key: Key) -> bool:
    """Whether a task runs in a thread of this worker, even if its result is not wanted any more."""
    task = worker.state.tasks.get(key)
    return task in worker.state.executing or task in worker.state.long_running


def first_ready(worker: Worker) -> tuple | None:
    """The priority in Dask's order of the first ready task that lacks a thread here, if any."""
    ready = worker.state.ready
    return tuple(ready.peek().priority or ()) if ready else None


# --- on the scheduler ----------------------------------------------------------------------------


def tell(scheduler: Scheduler, workers: Iterable[str], message: dict[str, Any]) -> None:
    """Send a message to workers; it arrives before what is sent to them later."""
    for address in workers:
        if address in scheduler.stream_comms:
            scheduler.worker_send(address, dict(message))


def pin(task: TaskState, workers: set[str]) -> None:
    """Let a task run only on these workers, whatever else restricted it. The set is kept."""
    task.worker_restrictions = workers
    task.host_restrictions = None
    task.resource_restrictions = None
    task.loose_restrictions = False


def restrict(task: TaskState, workers: set[str]) -> bool:
    """Let a task run only on these workers, unless a user restricts it; the set is kept."""
    if task.worker_restrictions or task.host_restrictions or task.resource_restrictions:
        return False
    task.worker_restrictions = workers
    return True


def hasten(
    scheduler: Scheduler, task: TaskState, able: Callable[[Mapping[str, float]], set[str]]
) -> list[TaskState]:
    """Let a task and its dependencies come before all others if they have to be computed again.

    A task must not wait for one that waits for it. So it goes to the front of each queue, also of
    the worker that it was sent to, holds no resources, and is not queued on the scheduler, as it
    would be without a restriction, or is already: unless a user restricts it, it may run on the
    workers that are `able` to provide its resources. Returns the tasks, for `release_hastened`.
    """
    seen, todo, restricted, again = {task}, [task], [], []
    while todo:
        for made_of in todo.pop().dependencies - seen:
            seen.add(made_of)
            todo.append(made_of)
            if made_of.state == "processing" and (_has_begun(made_of) or _is_first(made_of)):
                continue
            if not (made_of.worker_restrictions or made_of.host_restrictions):
                made_of.worker_restrictions = able(made_of.resource_restrictions or {})
                made_of.resource_restrictions = None
                restricted.append(made_of)
            if made_of.state in ("queued", "processing"):
                again.append(made_of)
    for each in seen:
        each.priority = (FIRST, *(each.priority or ())[1:])
    _transition(scheduler, again, "released")
    return restricted


def release_hastened(
    scheduler: Scheduler, tasks: Iterable[TaskState], kind: type[Any]
) -> list[TaskState]:
    """Restrict tasks as before `hasten`, except running ones, which are returned.

    `kind` is the class of the sets of workers, which keep the resources that a task `needs`.
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


def forget_error(scheduler: Scheduler, task: TaskState) -> None:
    """Release a task that has failed but that nothing waits for.

    Otherwise later graphs with tasks that depend on it would end with its error.
    """
    _transition(scheduler, [task], "released")


def place_again(scheduler: Scheduler, task: TaskState) -> None:
    """Reassign a task that no worker has started to one where it may run now."""
    if task.state == "no-worker":
        _transition(scheduler, [task], "processing")
    elif task.processing_on is not None and not _has_begun(task):
        _transition(scheduler, [task], "released")


def _has_begun(task: TaskState) -> bool:
    """Whether a task runs on its worker, as far as the scheduler has heard."""
    worker = task.processing_on
    return worker is not None and (task in worker.executing or task in worker.long_running)


def _is_first(task: TaskState) -> bool:
    return (task.priority or ())[:1] == (FIRST,)


def begin_stuck(scheduler: Scheduler, kind: type[set]) -> None:
    """Assign the tasks that wait for a worker and are restricted to sets of this kind."""
    stuck = [t for t in scheduler.unrunnable if isinstance(t.worker_restrictions, kind)]
    _transition(scheduler, stuck, "processing")


def free_stuck(scheduler: Scheduler, kind: type[set]) -> None:
    """Let all tasks that are restricted to sets of this kind run anywhere."""
    freed = [t for t in scheduler.tasks.values() if isinstance(t.worker_restrictions, kind)]
    for task in freed:
        task.worker_restrictions = None
    _transition(scheduler, (task for task in freed if task.state == "no-worker"), "processing")


def call_back(scheduler: Scheduler, worker: str, kind: type[set]) -> None:
    """Reassign tasks that this worker may not run any more and has not started."""
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
    # The scheduler processes the last of them first.
    last_first = sorted(tasks, key=lambda task: task.priority or (), reverse=True)
    scheduler.transitions({task.key: state for task in last_first}, STIMULUS)
