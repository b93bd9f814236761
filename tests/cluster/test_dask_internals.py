"""What is used of distributed beyond its documented API does what its docstrings say.

`.ci/run` asks it of the lowest versions that `pyproject.toml` allows as well.
"""

import asyncio
import threading
import time
from collections.abc import Callable
from functools import partial

import dask
import pytest
from distributed import Client, SchedulerPlugin, WorkerPlugin, protocol
from distributed.comm import utils as comm_utils

from dask_ep.cluster import dask_internals, exchange
from dask_ep.cluster.rank_server import Slices
from dask_ep.cluster.ranks import Able
from tests.cluster_processes import DEADLINE, wait_until

LOST = "tcp://127.0.0.1:9"
"""Where no worker is."""


class Kind(set):
    """Sets of workers that the tests tell from others."""


@pytest.fixture(scope="module")
def client():
    """Two workers of one thread each, in this process, so that tests can look at all of it."""
    with Client(
        n_workers=2,
        threads_per_worker=1,
        processes=False,
        protocol="tcp://",
        host="127.0.0.1",
        dashboard_address="127.0.0.1:0",
        set_as_default=False,
    ) as connected:
        yield connected


@pytest.fixture
def workers(client):
    """The two workers."""
    return list(client.cluster.workers.values())


ASKED: list[Callable] = []


def on_scheduler(client, question):
    """Call a function with the scheduler, on its event loop."""
    answers = []
    ASKED.append(lambda scheduler: answers.append(question(scheduler)))
    client.run_on_scheduler(_ask_scheduler)
    return answers.pop()


def _ask_scheduler(dask_scheduler):
    ASKED.pop()(dask_scheduler)


def state_of(client, key):
    return on_scheduler(client, lambda s: s.tasks[key].state if key in s.tasks else "forgotten")


class Hook(SchedulerPlugin):
    """Calls a function with the tasks of each new graph, before the first is given out."""

    name = "hook-of-tests"

    def update_graph(self, scheduler, *, tasks, **kwargs):
        for act in HOOKED:
            act(scheduler, [scheduler.tasks[key] for key in tasks])


HOOKED: list[Callable] = []


@pytest.fixture
def hook(client):
    """Give a function that lets another one act on the tasks of each new graph."""
    client.register_plugin(Hook())
    yield HOOKED.append
    HOOKED.clear()
    client.unregister_scheduler_plugin(Hook.name)


@pytest.fixture
def busy(client, workers):
    """Keep the first worker's only thread until the test ends, or says so."""
    go_on = threading.Event()
    GATES["busy"] = go_on
    future = client.submit(_hold, "busy", workers=[workers[0].address], pure=False)
    wait_until(lambda: workers[0].state.executing_count == 1, "it is busy")
    yield go_on
    go_on.set()
    future.result(DEADLINE)


GATES: dict[str, threading.Event] = {}


def _hold(name):
    assert GATES[name].wait(DEADLINE)


# --- on a worker -------------------------------------------------------------------------------


class Named(WorkerPlugin):
    name = "named-of-tests"


def test_a_task_finds_its_worker_and_what_belongs_to_it(client, workers):
    assert dask_internals.current_worker() is None
    client.register_plugin(Named())

    async def where():
        return threading.get_ident()

    def look():
        worker = dask_internals.current_worker()
        loop = dask_internals.loop_of(worker)
        assert isinstance(dask_internals.plugin_of(worker, Named.name), Named)
        assert dask_internals.plugin_of(worker, "none of this name") is None
        assert dask_internals.threads_of(worker) == 1
        assert not dask_internals.is_closing(worker)
        thread = asyncio.run_coroutine_threadsafe(where(), loop).result(DEADLINE)
        assert thread != threading.get_ident()
        return worker.address

    for worker in workers:
        asked = client.submit(look, workers=[worker.address], pure=False)
        assert asked.result(DEADLINE) == worker.address
    client.unregister_worker_plugin(Named.name)


def test_a_worker_that_closes_says_so():
    with Client(
        n_workers=1, processes=False, dashboard_address="127.0.0.1:0", set_as_default=False
    ) as other:
        (worker,) = other.cluster.workers.values()
        seen = []
        worker.plugins["watch"] = watch = Named()
        watch.teardown = lambda worker: seen.append(dask_internals.is_closing(worker))
        assert not dask_internals.is_closing(worker)
    assert seen == [True]
    assert dask_internals.is_closing(worker)


HEARD: list = []


async def _double(comm, sender):
    while True:
        number = await comm.read()
        await comm.write([sender, 2 * number])
        if number == 0:
            await comm.close()
            return


def _hear(what):
    HEARD.append(what)


@pytest.fixture
def installed(client, workers):
    for worker in workers:
        dask_internals.install(
            worker,
            requests={"test_double": _double},
            messages={"test-hear": _hear},
            metrics={"of_tests": lambda worker: 7},
        )


def test_a_worker_answers_another_one_over_a_connection_of_their_own(client, workers, installed):
    here, there = workers

    async def ask():
        comm = await dask_internals.open_stream(here, there.address, "test_double")
        answers = []
        for number in (2, 3, 0):
            await comm.write(number)
            answers.append(await comm.read())
        with pytest.raises(OSError, match="closed"):
            await comm.read()
        return answers

    assert client.sync(ask) == [(here.address, n) for n in (4, 6, 0)]


def test_a_connection_does_without_another_thread_for_large_messages(
    client, workers, installed, monkeypatch
):
    """However small what Dask takes for large is."""
    here, there = workers
    monkeypatch.setattr(comm_utils, "OFFLOAD_THRESHOLD", 1)
    aside = []

    async def offload(function, *args):
        aside.append(function)
        return function(*args)

    monkeypatch.setattr(comm_utils, "offload", offload)

    async def ask(keep):
        comm = await dask_internals.open_stream(here, there.address, "test_double")
        if keep:
            dask_internals.keep_on_loop(comm)
        aside.clear()
        await comm.write(0)
        return len(aside)

    assert client.sync(ask, keep=False)
    assert not client.sync(ask, keep=True)


def test_what_another_worker_raises_is_raised_here():
    try:
        raise ValueError("this cannot be doubled")
    except ValueError as error:
        answer = dask_internals.remote_error(error)
    (arrived,) = protocol.loads(protocol.dumps([answer]))
    with pytest.raises(ValueError, match="this cannot be doubled"):
        dask_internals.raise_remote(arrived)


def test_a_worker_that_is_not_there_is_an_os_error(client, workers):
    with (
        dask.config.set({"distributed.comm.timeouts.connect": "0.2s"}),
        pytest.raises(OSError, match="Timed out|in connect"),
    ):
        client.sync(dask_internals.open_stream, workers[0], "tcp://127.0.0.1:9", "test_double")


@pytest.mark.parametrize("begun", ["before", "after"])
def test_what_is_fetched_from_a_lost_worker_is_given_up(client, workers, monkeypatch, begun):
    """Also where it begins just after we hear of the loss; Dask would go on calling."""
    monkeypatch.setattr(exchange, "LOST_SECONDS", 0.5)
    lost, asking = LOST, exchange.Asking(workers[0], Slices("", 1))

    async def fetch():
        if begun == "after":
            asking.hear_lost(lost)
            await asyncio.sleep(0.1)
        fetching = asyncio.ensure_future(workers[0].rpc.connect(lost, timeout=10 * DEADLINE))
        if begun == "before":
            await asyncio.sleep(0.1)
            assert not fetching.done()
            asking.hear_lost(lost)
        await asyncio.wait_for(fetching, DEADLINE)

    with pytest.raises(OSError, match="Address removed"):
        client.sync(fetch)


def test_fetches_are_given_up_while_an_earlier_one_is_about_to_end(client, workers):
    async def fetch():
        def begin():
            fetching.append(asyncio.ensure_future(workers[0].rpc.connect(LOST, 10 * DEADLINE)))

        fetching = []
        begin()
        await asyncio.sleep(0.1)
        begin()
        dask_internals.give_up(workers[0], LOST)
        await asyncio.sleep(0)  # the first one is cancelled and has not ended, the second has begun
        dask_internals.give_up(workers[0], LOST)
        return await asyncio.wait_for(asyncio.gather(*fetching, return_exceptions=True), DEADLINE)

    errors = client.sync(fetch)
    assert [str(error) for error in errors] == ["Address removed."] * 2


def test_the_scheduler_tells_workers_in_order_and_forgets_those_that_are_gone(
    client, workers, installed
):
    addresses = [workers[0].address, "tcp://127.0.0.1:9"]
    HEARD.clear()
    on_scheduler(
        client,
        lambda s: [
            dask_internals.tell(s, addresses, {"op": "test-hear", "what": n}) for n in range(20)
        ],
    )
    wait_until(lambda: len(HEARD) == 20, "all messages have come")
    assert list(range(20)) == HEARD


def test_metrics_reach_the_scheduler(client, workers, installed):
    def metrics(scheduler):
        return [worker.metrics.get("of_tests") for worker in scheduler.workers.values()]

    wait_until(lambda: on_scheduler(client, metrics) == [7, 7], "heartbeats came")


@pytest.mark.parametrize(("spill", "pause"), [(0.7, 0.8), (False, 0.8)])
def test_a_worker_is_short_of_memory_once_dask_would_spill_or_pause_it(
    workers, monkeypatch, spill, pause
):
    calls, used, (worker, _) = [], [0.0], workers
    manager = worker.memory_manager
    monkeypatch.setattr(worker.monitor, "get_process_memory", lambda: used[0])
    monkeypatch.setattr(manager, "memory_spill_fraction", spill)
    monkeypatch.setattr(manager, "memory_pause_fraction", pause)
    dask_internals.when_memory_is_short(worker, lambda: calls.append(used[0]))
    look = worker.metrics["dask_ep_memory"]
    try:
        look(worker)
        assert calls == []
        used[0] = 1.01 * (spill or pause) * manager.memory_limit
        wait_until(lambda: len(calls) > 1, "it is called again and again")
    finally:
        del worker.metrics["dask_ep_memory"]


def test_a_task_gives_its_thread_back_once(client, workers):
    GATES["aside"] = go_on = threading.Event()

    def leave():
        dask_internals.leave_pool()
        dask_internals.leave_pool()
        _hold("aside")

    LOOKS["leave"] = leave
    here = {"workers": [workers[0].address], "pure": False}
    aside = [client.submit(_look, "leave", **here) for _ in range(3)]
    assert client.submit(_address, **here).result(DEADLINE) == workers[0].address
    assert not any(future.done() for future in aside)
    go_on.set()
    client.gather(aside)


def test_a_task_that_nobody_wants_runs_on_until_it_ends(client, workers):
    """And a plugin hears when it does, whether it has given its thread back or not."""
    worker, running = workers[0], {}

    class Hears(WorkerPlugin):
        def transition(self, key, start, finish, **kwargs):
            running.setdefault(key, []).append(dask_internals.is_running(worker, key))

    worker.plugins["hears"] = Hears()
    LOOKS["leave and hold"] = lambda: (dask_internals.leave_pool(), _hold("long"))
    try:
        for look, gate in (("leave and hold", "long"), ("hold", "short")):
            GATES[gate] = threading.Event()
            LOOKS["hold"] = partial(_hold, gate)
            future = client.submit(_look, look, workers=[worker.address], pure=False)
            key = future.key
            wait_until(lambda key=key: running.get(key, [])[-1:] == [True], "it runs")
            future.cancel()
            wait_until(
                lambda key=key: worker.state.tasks[key].state == "cancelled", "nobody wants it"
            )
            assert running[key][-1]
            GATES[gate].set()
            wait_until(lambda key=key: not running[key][-1], "it has ended")
    finally:
        del worker.plugins["hears"]


def test_a_task_learns_whether_an_earlier_one_lacks_a_thread(client, workers):
    """From the first that is ready; and a plugin hears of each that becomes so."""
    worker, found, heard = workers[0], [], []
    GATES["later is there"], GATES["earlier is there"] = threading.Event(), threading.Event()

    class Hears(WorkerPlugin):
        def transition(self, key, start, finish, **kwargs):
            if finish == "ready":
                heard.append(key)

    def look():
        priority = dask_internals.priority_here()

        async def earlier():
            first = dask_internals.first_ready(worker)
            return first is not None and first < priority

        def ask():
            loop = dask_internals.loop_of(worker)
            return asyncio.run_coroutine_threadsafe(earlier(), loop).result(DEADLINE)

        found.append(ask())
        for gate in ("later is there", "earlier is there"):
            _hold(gate)
            found.append(ask())

    LOOKS["look"] = look
    worker.plugins["hears"] = Hears()
    try:
        here = {"workers": [worker.address], "pure": False}
        asked = client.submit(_look, "look", **here)
        wait_until(lambda: found, "it runs")
        others = []
        for priority, gate in ((-1, "later is there"), (1, "earlier is there")):
            others.append(client.submit(time.sleep, 0, priority=priority, **here))
            wait_until(lambda: len(worker.state.ready) == len(others), "it is ready")
            GATES[gate].set()
            wait_until(lambda: len(found) > len(others), "it has looked")
        asked.result(DEADLINE)
        client.gather(others)
    finally:
        del worker.plugins["hears"]
    assert found == [False, False, True]
    assert heard == [asked.key, *(other.key for other in others)]


def test_a_result_that_is_fetched_in_vain_is_asked_for_again(client, workers, monkeypatch):
    """As from a worker that is lost just then, which the scheduler goes on calling."""
    monkeypatch.setattr(dask_internals, "RESULT_SECONDS", 0.1)
    fetch = on_scheduler(client, lambda scheduler: scheduler.handlers["gather"])
    asked = []

    async def gather(**request):
        asked.extend(request["keys"])
        if len(asked) == 1:
            await asyncio.sleep(DEADLINE)
        return await fetch(**request)

    on_scheduler(client, lambda scheduler: scheduler.handlers.update(gather=gather))
    try:
        future = client.submit(pow, 2, 5, pure=False)
        assert dask_internals.result_of(future) == 32
    finally:
        on_scheduler(client, lambda scheduler: scheduler.handlers.update(gather=fetch))
    assert asked[:2] == [future.key] * 2


def test_a_task_that_ends_with_a_timeout_is_not_asked_for_again(client):
    future = client.submit(_too_late, pure=False)
    with pytest.raises(TimeoutError, match="too late"):
        dask_internals.result_of(future)


def _too_late():
    raise TimeoutError("too late")


LOOKS: dict[str, Callable] = {}


def _look(name):
    LOOKS[name]()


# --- on the scheduler --------------------------------------------------------------------------


def test_a_pinned_task_runs_there_whatever_restricted_it(client, workers, hook):
    there = workers[1].address
    hook(lambda scheduler, tasks: [dask_internals.pin(task, {there}) for task in tasks])
    for asked in ({"resources": {"nobody has": 1}}, {"workers": [workers[0].address]}):
        where = client.submit(_address, pure=False, **asked)
        assert where.result(DEADLINE) == there


def _address():
    return dask_internals.current_worker().address


def test_a_restriction_of_the_user_holds(client, workers, hook):
    here, there = (worker.address for worker in workers)
    given = []

    def act(scheduler, tasks):
        given.extend(dask_internals.restrict(task, {there}) for task in tasks)

    hook(act)
    assert client.submit(_address, pure=False).result(DEADLINE) == there
    assert client.submit(_address, workers=[here], pure=False).result(DEADLINE) == here
    stuck = client.submit(_address, resources={"nobody has": 1}, pure=False)
    wait_until(lambda: len(given) == 3, "it is known")
    assert given == [True, False, False]
    stuck.release()


RUNS: list[str] = []


def _run(name, *made_of):
    RUNS.append(name)
    return name


_count = dask.delayed(_run, pure=False)


def _chain(client, *names):
    """Compute tasks each of which is made of the one before, and give their keys and the last."""
    RUNS.clear()
    task, keys = None, []
    for name in names:
        task = _count(name, *([] if task is None else [task]))
        keys.append(task.key)
    future = client.compute(task, optimize_graph=False)
    return keys, future


def test_a_task_whose_result_is_not_kept_is_computed_again(client):
    (first, second), future = _chain(client, "first", "second")
    future.result(DEADLINE)
    wait_until(lambda: state_of(client, first) == "released", "the result is not kept")
    on_scheduler(client, lambda s: dask_internals.run_again(s, s.tasks[first]))
    wait_until(lambda: RUNS == ["first", "second", "first"], "it is computed again")
    wait_until(lambda: state_of(client, first) == "released", "the result is not kept")
    assert state_of(client, second) == "memory"


BROKEN: list = []


def _read():
    if BROKEN:
        raise OSError("the disk is broken")
    return 7


def test_a_task_whose_error_is_forgotten_can_be_computed_again(client):
    BROKEN.append(True)
    task = client.submit(_read, pure=False)
    wait_until(lambda: state_of(client, task.key) == "erred", "it has failed")
    BROKEN.clear()
    on_scheduler(client, lambda s: dask_internals.forget_error(s, s.tasks[task.key]))
    assert state_of(client, task.key) == "released"
    on_scheduler(client, lambda s: dask_internals.run_again(s, s.tasks[task.key]))
    assert task.result(DEADLINE) == 7


def test_a_task_that_waits_for_a_worker_is_placed_when_there_is_one(client, workers, hook):
    hook(lambda scheduler, tasks: [dask_internals.pin(task, {"nobody"}) for task in tasks])
    future = client.submit(_address, pure=False)
    wait_until(lambda: state_of(client, future.key) == "no-worker", "it waits")
    there = workers[1].address

    def place(scheduler):
        task = scheduler.tasks[future.key]
        dask_internals.pin(task, {there})
        dask_internals.place_again(scheduler, task)

    on_scheduler(client, place)
    assert future.result(DEADLINE) == there


def test_a_task_that_was_not_begun_is_placed_elsewhere(client, workers, busy):
    here, there = (worker.address for worker in workers)
    future = client.submit(_address, workers=[here], pure=False)
    wait_until(lambda: workers[0].state.ready, "it lies there")

    def place(scheduler):
        task = scheduler.tasks[future.key]
        dask_internals.pin(task, {there})
        dask_internals.place_again(scheduler, task)

    on_scheduler(client, place)
    assert future.result(DEADLINE) == there


def test_tasks_that_wait_for_a_worker_of_a_set_begin_when_it_has_one(client, workers, hook):
    owners = Kind({"nobody"})
    hook(lambda scheduler, tasks: [dask_internals.pin(task, owners) for task in tasks])
    futures = [client.submit(_address, pure=False) for _ in range(3)]
    wait_until(lambda: {state_of(client, f.key) for f in futures} == {"no-worker"}, "they wait")
    owners.add(workers[1].address)
    on_scheduler(client, lambda s: dask_internals.begin_stuck(s, Kind))
    assert set(client.gather(futures)) == {workers[1].address}


def test_tasks_of_sets_are_freed_and_others_are_not(client, workers, hook):
    sets = iter((Kind({"nobody"}), {"nobody"}))
    hook(lambda scheduler, tasks: [dask_internals.pin(task, next(sets)) for task in tasks])
    ours, other = (client.submit(_address, pure=False) for _ in range(2))
    wait_until(
        lambda: {state_of(client, f.key) for f in (ours, other)} == {"no-worker"}, "they wait"
    )
    on_scheduler(client, lambda s: dask_internals.free_stuck(s, Kind))
    ours.result(DEADLINE)
    assert on_scheduler(client, lambda s: s.tasks[ours.key].worker_restrictions) is None
    assert state_of(client, other.key) == "no-worker"
    other.release()


def test_tasks_that_a_worker_has_not_begun_are_called_back(client, workers, hook, busy):
    here, there = (worker.address for worker in workers)
    owners = Kind({here})
    hook(lambda scheduler, tasks: [dask_internals.pin(task, owners) for task in tasks])
    futures = [client.submit(_address, pure=False) for _ in range(3)]
    wait_until(lambda: len(workers[0].state.ready) == 3, "they lie there")
    owners.clear()
    owners.add(there)
    on_scheduler(client, lambda s: dask_internals.call_back(s, here, Kind))
    assert set(client.gather(futures)) == {there}


def test_what_a_hastened_task_is_made_of_comes_first_and_is_not_kept_back(client, busy, workers):
    """Many like it would wait on the scheduler, and it holds none of the resources it needs."""
    many = [_count(f"of {n}") for n in range(20)]
    with dask.annotate(resources={"fast": 1}):
        needy = _count("needy")
    last = _count("last", *many, needy)
    able = {frozenset(): Kind({worker.address for worker in workers})}

    def workers_with(needs):
        return able.setdefault(frozenset(needs.items()), Able(needs))

    future = client.compute(last, optimize_graph=False)
    wait_until(
        lambda: all(state_of(client, task.key) == "memory" for task in many), "all but one ran"
    )
    assert state_of(client, needy.key) == "no-worker"
    hastened = on_scheduler(
        client, lambda s: dask_internals.hasten(s, s.tasks[last.key], workers_with)
    )
    assert {task.key for task in hastened} == {task.key for task in (*many, needy)}
    first = on_scheduler(client, lambda s: [task.priority[0] for task in hastened])
    assert set(first) == {dask_internals.FIRST}
    assert not any(on_scheduler(client, lambda s: [s.is_rootish(task) for task in hastened]))
    of_needy = able[frozenset({("fast", 1)})]
    of_needy.hear("one without", {})
    assert "one without" not in of_needy
    of_needy.hear(workers[1].address, {"fast": 2})
    on_scheduler(client, lambda s: dask_internals.begin_stuck(s, Able))
    future.result(DEADLINE)
    left = on_scheduler(client, lambda s: dask_internals.release_hastened(s, hastened, Able))
    assert left == []
    restored = on_scheduler(
        client,
        lambda s: [
            (task.worker_restrictions, task.resource_restrictions)
            for task in hastened
            if task.key == needy.key
        ],
    )
    assert restored == [(None, {"fast": 1})]


def test_what_a_hastened_task_is_made_of_waits_on_the_scheduler_no_more(client, workers):
    """Its workers may be kept busy by what waits for the hastened task."""
    GATES["many"] = threading.Event()
    many = [dask.delayed(_hold, pure=False)("many") for n in range(20)]
    last = _count("last", *many)
    able = Able({})
    for worker in workers:
        able.hear(worker.address, {})
    future = client.compute(last, optimize_graph=False)

    def states():
        return {state_of(client, task.key) for task in many}

    wait_until(lambda: states() == {"processing", "queued"}, "the workers are busy")
    hastened = on_scheduler(
        client, lambda s: dask_internals.hasten(s, s.tasks[last.key], lambda needs: able)
    )
    assert states() == {"processing"}
    assert hastened
    GATES["many"].set()
    future.result(DEADLINE)


def test_what_a_hastened_task_is_made_of_overtakes_what_its_worker_has_not_begun(
    client, busy, workers
):
    """A chunk that waits lends its thread to earlier tasks alone."""
    made_of = client.submit(abs, -1, key="made of", workers=[workers[0].address], priority=-1)
    last = client.submit(abs, made_of, key="last")

    def priority():
        task = workers[0].state.tasks.get("made of")
        return task.priority[0] if task is not None and task.state == "ready" else None

    wait_until(lambda: priority() == 1, "it waits for the thread")
    on_scheduler(client, lambda s: dask_internals.hasten(s, s.tasks["last"], lambda needs: set()))
    wait_until(lambda: priority() == dask_internals.FIRST, "it waits there before all others")
    busy.set()
    assert last.result(DEADLINE) == 1
