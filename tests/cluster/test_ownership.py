"""Owners of ranks on a cluster of real processes: who serves what, what travels, what is left."""

import asyncio
import logging
import signal
import time
from collections import defaultdict
from contextlib import suppress
from math import inf

import dask
import dask.array as da
import numpy as np
import pytest
from distributed import Client
from distributed.core import Status

from dask_ep import Experts, OwnerRules, expert_parallel, own_experts
from dask_ep.cluster.checks import WorkerSettings
from dask_ep.cluster.exchange import Services
from dask_ep.cluster.owner_plugin import METADATA, OWNERS_PLUGIN
from dask_ep.errors import LostOwnerError
from dask_ep.graph.pipeline import count_tasks
from dask_ep.storage.sources import open_source
from tests.cluster_processes import DEADLINE, Cluster, addresses, wait_until
from tests.observed import (
    NotedSource,
    Recorder,
    Waits,
    bytes_read,
    chunks_held,
    computed,
    counted,
    forget_chunks,
    received,
    record_services,
    servers,
    servings,
    slices_kept,
    slots_taken,
    written_slowly,
)

pytestmark = pytest.mark.slow

WORKERS = ("w0", "w1", "w2")
CONFIG = {
    "distributed.admin.low-level-log-length": 100_000,  # or transfers would be forgotten
    "distributed.worker.memory.pause": False,  # the tests pause
}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    directory = tmp_path_factory.mktemp("cluster")
    with Cluster(
        directory, WORKERS, config=CONFIG, environment={"OMP_NUM_THREADS": "1"}
    ) as running:
        yield running


@pytest.fixture(scope="module")
def client(cluster):
    with cluster.client() as connected:
        yield connected


@pytest.fixture(autouse=True)
def nothing_left(request):
    """After every test: no plugin, metadata or restriction, no experts, no chunk in flight."""
    yield
    if "client" in request.fixturenames:
        client = request.getfixturevalue("client")
        left = {}

        def is_clean():
            left["on the scheduler"] = client.run_on_scheduler(_what_is_left)
            left["chunks in flight"] = sum(slots_taken(client).values())
            left["ranks kept"] = sum(slices_kept(client).values())
            return not any(left.values())

        with suppress(TimeoutError):
            wait_until(is_clean, "nothing is left")
        assert not any(left.values()), left


@pytest.fixture
def recorded(client):
    """Write down from now on which worker computes and serves what."""
    client.register_plugin(Recorder())
    record_services(client)
    yield
    client.unregister_scheduler_plugin(Recorder.name)


def workers_of(client, step):
    """The workers that computed tasks of this step, by what their keys end with."""
    where = defaultdict(set)
    for key, worker in computed(client):
        if isinstance(key, tuple) and key[0].startswith(step):
            where[key[-1]].add(worker)
    return where


def _alone(y):
    """Compute without the cluster; experts that sleep do so side by side."""
    return y.compute(scheduler="threads", num_workers=16)


def layer(
    chunks=8,
    rows=64,
    width=32,
    ranks=6,
    slots=2,
    num_experts=None,
    experts=None,
    seed=0,
    count=False,
):
    """Build a layer whose tokens and routing each chunk reads itself; and the routing."""
    num_experts = num_experts or ranks
    tokens = da.map_blocks(
        _tokens_of_chunk, seed, rows, width,
        chunks=((rows,) * chunks, (width,)), dtype="f4", meta=np.empty((0, 0), "f4"),
    )  # fmt: skip
    lazy_routing = da.map_blocks(
        _routing_of_chunk, seed, rows, slots, num_experts,
        chunks=((rows,) * chunks, (slots,)), dtype="i8", meta=np.empty((0, 0), "i8"),
    )  # fmt: skip
    if experts is None:
        experts = np.random.default_rng(seed).standard_normal((num_experts, width, width))

    def of(tokens):
        return expert_parallel(tokens, lazy_routing, experts, world_size=ranks)

    routing = lazy_routing.compute(scheduler="sync")
    return counted(of, tokens) if count else of(tokens), routing


def _tokens_of_chunk(seed, rows, width, block_id=(0, 0)):
    rng = np.random.default_rng((seed, block_id[0]))
    return rng.standard_normal((rows, width), np.float32)


def _routing_of_chunk(seed, rows, slots, num_experts, block_id=(0, 0)):
    return np.random.default_rng((seed, block_id[0])).integers(num_experts, size=(rows, slots))


# --- where -----------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [6, 3, 2], ids=["more ranks", "as many", "fewer ranks"])
def test_a_rank_is_loaded_and_served_by_its_owner(client, recorded, ranks):
    y, _ = layer(ranks=ranks)
    with own_experts(client, ranks) as owners:
        assert np.array_equal(client.compute(y).result(DEADLINE), _alone(y))
        served, loaded = servers(servings(client)), workers_of(client, "ep_experts")
        assert len(served) == len(loaded) == ranks
        for rank, of_rank in enumerate(owners.owners):
            assert served[rank] == loaded[rank] == set(of_rank)
        assert len({owner for of_rank in owners.owners for owner in of_rank}) == min(ranks, 3)


@pytest.mark.parametrize("scheduler", ["sync", "threads"])
def test_a_task_that_computes_the_layer_by_itself_asks_no_service(client, scheduler):
    """The tasks of its own graph have the names of those that workers serve."""
    y, _ = layer()
    with own_experts(client, 6):
        kept = client.compute(y)
        expected = kept.result(DEADLINE)
        alone = client.submit(lambda: y.compute(scheduler=scheduler))
        assert np.array_equal(alone.result(DEADLINE), expected)
        del kept


def test_every_row_of_every_chunk_is_served_once_by_each_of_its_ranks(client, recorded):
    chunks, rows, ranks = 8, 64, 6
    y, routing = layer(chunks, rows, ranks=ranks)
    with own_experts(client, ranks):
        client.compute(y).result(DEADLINE)
    served = sorted((s.chunk, s.rank, s.rows) for s in servings(client))
    expected = [
        (chunk, rank, int(np.any(of_chunk == rank, axis=1).sum()))
        for chunk, of_chunk in enumerate(np.split(routing, chunks))
        for rank in range(ranks)
    ]
    assert served == expected


def test_owners_outlive_optimisation_and_what_is_built_upon(client, recorded):
    y, _ = layer()
    with own_experts(client, 6) as owners:
        total = (y.astype("f8") * 2).sum()
        future = client.compute(client.persist(total))
        assert future.result(DEADLINE) == pytest.approx(_alone(total))
        where = servers(servings(client))
        assert {rank: tuple(workers) for rank, workers in where.items()} == dict(
            enumerate(owners.owners)
        )


@pytest.fixture
def noted(tmp_path):
    """Give a layer of 12 linear experts on 6 ranks, and what tells {worker: bytes read}."""
    weights = np.random.default_rng(1).standard_normal((12, 32, 32)).astype(np.float32)
    np.save(tmp_path / "w.npy", weights)
    source = NotedSource(open_source(tmp_path / "w.npy"), str(tmp_path / "read"))

    def read():
        return bytes_read(tmp_path / "read")

    return layer(experts=Experts.linear(source), num_experts=12)[0], weights[:2].nbytes, read


def test_each_worker_reads_the_weights_of_its_own_ranks_and_no_more(client, noted):
    y, slice_bytes, read = noted
    with own_experts(client, 6) as owners:
        client.compute(y).result(DEADLINE)
        own = {row.address: slice_bytes * len(row.ranks) for row in owners.table()}
        assert read() == own


@pytest.mark.parametrize("chunks", [(1, -1, -1), (4, -1, -1), (5, 16, -1)])
def test_weights_in_dask_arrays_are_loaded_by_the_owner_alone(client, recorded, chunks):
    weights = da.random.default_rng(0).standard_normal((6, 32, 32), chunks=chunks, dtype="f4")
    y, _ = layer(experts=weights)
    with own_experts(client, 6) as owners:
        assert np.array_equal(client.compute(y).result(DEADLINE), _alone(y))
        loaded = workers_of(client, "ep_experts-")
        assert loaded == {rank: set(of_rank) for rank, of_rank in enumerate(owners.owners)}


def test_each_owner_of_a_replicated_rank_reads_its_weights_once(client, recorded, noted):
    y, slice_bytes, read = noted
    with own_experts(client, 6, replicas=dict.fromkeys(range(6), 3)):
        client.compute(y).result(DEADLINE)
        served = servers(servings(client))
        assert set(served) == set(range(6))
        # A layer that is done before a replica was loaded does not load it any more.
        for worker, nbytes in read().items():
            its_ranks = sum(worker in of_rank for of_rank in served.values())
            assert its_ranks * slice_bytes <= nbytes <= 6 * slice_bytes


# --- what travels ----------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [1, 2, 8])
def test_no_more_travels_than_the_rows_that_must(client, recorded, slots):
    """To each other worker a row once, whatever its slots there, and from each rank a row back."""
    chunks, rows, width, ranks = 12, 512, 256, 6
    y, routing = layer(chunks, rows, width, ranks, slots, num_experts=12, seed=slots)
    with own_experts(client, ranks) as owners:
        before = received(client)
        client.compute(y.sum()).result(DEADLINE)
        arrived = received(client) - before
        owner_of = np.array([addresses(client)[name] for name in WORKERS])
        ranks_of = [
            [r for r, (owner,) in enumerate(owners.owners) if owner == worker]
            for worker in owner_of
        ]
    served = servings(client)
    homes = {s.chunk: s.asked_by for s in served}
    sent = back = 0
    for chunk, of_chunk in enumerate(np.split(routing, chunks)):
        for worker, its_ranks in zip(owner_of, ranks_of, strict=True):
            if worker != homes[chunk]:
                sent += np.isin(of_chunk // 2, its_ranks).any(axis=1).sum()
                back += sum(np.any(of_chunk // 2 == rank, axis=1).sum() for rank in its_ranks)
    index = 2 if slots == 1 else slots  # bytes of a row's experts, small integers
    assert sent
    assert sum(s.bytes_in for s in served) <= sent * (width * 4 + index)
    assert sum(s.bytes_out for s in served) == back * width * 4
    assert sum(nbytes for *_, nbytes in arrived) < rows * width * 4  # results of tasks: no rows


# --- how many chunks are in flight ------------------------------------------------------------


@pytest.fixture
def stalled(client, tmp_path):
    """Give a layer of 40 chunks of whose three ranks one waits, and what lets it go on."""
    file = tmp_path / "wait"
    file.touch()
    experts = Experts.callables([_at_once, Waits(file), _at_once])
    forget_chunks(client)
    yield layer(chunks=40, ranks=3, experts=experts, count=True)[0], file.unlink
    file.unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("given", "most"),
    [({}, 1 + 2), ({"chunks_in_flight": 5}, 5), ({"chunks_in_flight": 1}, 1)],
    ids=["by threads", "five", "one"],
)
def test_a_slow_rank_does_not_let_chunks_pile_up(client, stalled, given, most):
    y, go_on = stalled
    with own_experts(client, 3, rules=OwnerRules(**given)) as owners:
        future = client.compute(y)
        # One more is read by the thread that waits until it may begin.
        wait_until(
            lambda: {now for now, _ in chunks_held(client).values()} == {most + 1}, "some wait"
        )
        time.sleep(0.3)
        assert set(slots_taken(client).values()) == {most}
        go_on()
        assert np.array_equal(future.result(DEADLINE), _alone(y))
        assert owners.failures == []
    assert {most_held for _, most_held in chunks_held(client).values()} == {most + 1}
    assert {now for now, _ in chunks_held(client).values()} == {0}


def test_without_a_bound_chunks_pile_up(client, stalled):
    y, go_on = stalled
    with own_experts(client, 3, rules=OwnerRules(chunks_in_flight=inf)):
        future = client.compute(y)
        wait_until(lambda: sum(now for now, _ in chunks_held(client).values()) == 40, "all wait")
        go_on()
        assert np.array_equal(future.result(DEADLINE), _alone(y))


def test_outputs_that_are_being_written_count_as_under_way(client):
    """Dask fuses what follows into a chunk's task; on slow storage outputs must not pile up."""
    y, _ = layer(chunks=24)
    forget_chunks(client)
    with own_experts(client, 3, rules=OwnerRules(chunks_in_flight=2)):
        client.compute(written_slowly(y).sum()).result(DEADLINE)
        wait_until(lambda: not any(slots_taken(client).values()), "all slots are free again")
    assert max(most for _, most in chunks_held(client).values()) in (1, 2)


def test_two_layers_in_one_task_take_one_slot(client):
    y, _ = layer(chunks=12)
    routing = da.zeros((len(y), 1), chunks=(y.chunks[0], 1), dtype=int)
    with own_experts(client, 3, rules=OwnerRules(chunks_in_flight=1)):
        twice = expert_parallel(y, routing, np.ones((6, y.shape[1], 2)), world_size=3)
        want = y.compute(scheduler="sync").sum(axis=1)
        got = client.compute(twice).result(DEADLINE)
        np.testing.assert_allclose(got[:, 0], want, rtol=1e-4, atol=1e-4)
        wait_until(lambda: not any(slots_taken(client).values()), "all slots are free again")


def test_a_bound_does_not_outlive_the_owners(client, stalled):
    y, go_on = stalled
    own_experts(client, 3, rules=OwnerRules(chunks_in_flight=1)).close()
    with own_experts(client, 3):
        future = client.compute(y)
        wait_until(lambda: set(slots_taken(client).values()) == {1 + 2}, "some wait")
        go_on()
        future.result(DEADLINE)


def test_chunks_that_wait_begin_when_the_owners_are_closed(client):
    y, _ = layer(chunks=24, experts=Experts.callables([_slowly] * 6))
    owners = own_experts(client, 6, rules=OwnerRules(chunks_in_flight=1))
    future = client.compute(y)
    wait_until(lambda: client.run_on_scheduler(_has_begun), "the job has begun")
    owners.close()
    assert np.array_equal(future.result(DEADLINE), _alone(y))


# --- how it is installed, changed and removed ------------------------------------------------


def test_calling_again_installs_nothing_more(client):
    with own_experts(client, 6) as owners:
        again = own_experts(client)
        assert again.world_size == 6
        assert again.owners == owners.owners
        assert client.run_on_scheduler(_plugins).count(OWNERS_PLUGIN) == 1
        with own_experts(client, 6):
            pass
        assert owners.owners == again.owners  # an inner block leaves things as it found them


def test_one_rank_per_worker_by_default(client):
    with own_experts(client) as owners:
        assert owners.world_size == 3
        assert sorted(owners.owners) == sorted((address,) for address in addresses(client).values())


def test_one_rank_per_gpu_where_workers_declare_some(cluster, client):
    cluster.start_worker("gpus", "--resources", "GPU=2")
    wait_until(lambda: "gpus" in addresses(client), "the worker with GPUs has come")
    with own_experts(client) as owners:
        assert owners.owners == [(addresses(client)["gpus"],)] * 2
    cluster.stop_worker("gpus")
    wait_until(lambda: "gpus" not in addresses(client), "the worker with GPUs has gone")


def test_the_same_workers_get_the_same_ranks(client):
    with own_experts(client, 7) as owners:
        first = owners.owners
    with own_experts(client, 7) as owners:
        assert owners.owners == first


def test_two_clients_with_jobs_at_once_do_not_disturb_each_other(cluster, client):
    with cluster.client() as other:
        mine, theirs = layer(seed=1)[0], layer(ranks=4, seed=2)[0]
        with own_experts(client, 6) as owners:
            their_owners = own_experts(other, 4)
            futures = client.compute(mine), other.compute(theirs)
            their_owners.close()
            their_owners.close()
            assert [len(of_rank) for of_rank in owners.owners] == [1] * 6
            results = [future.result(DEADLINE) for future in futures]
            assert np.array_equal(results[0], _alone(mine))
            assert np.array_equal(results[1], _alone(theirs))
            own_experts(other, 4)  # is dropped when the client goes


def test_a_graph_of_another_world_size_gets_owners_too(client, recorded):
    y, _ = layer(ranks=4)
    with own_experts(client, 6):
        client.compute(y).result(DEADLINE)
        assert all(len(workers) == 1 for workers in servers(servings(client)).values())
        assert set(client.get_metadata(list(METADATA))) == {"4", "6"}


def test_a_graph_of_one_rank_runs_on_all_workers(client, recorded):
    slow = Experts.callables([_slowly])
    y, _ = layer(chunks=12, ranks=1, experts=slow)
    with own_experts(client, 3):
        client.compute(y).result(DEADLINE)
        ran = set().union(*workers_of(client, "ep_chunk").values())
        assert ran == set(addresses(client).values())


# --- what the user restricts -------------------------------------------------------------------


def _chunks_ran_on(client):
    """Names of the workers on which chunks ran, by their tasks and by who asked the services."""
    names = {address: name for name, address in addresses(client).items()}
    ran = set().union(*workers_of(client, "ep_chunk").values())
    assert {s.asked_by for s in servings(client)} == ran
    return {names[address] for address in ran}


def test_chunks_run_on_the_workers_that_the_user_names(client, recorded):
    y, _ = layer()
    with own_experts(client, 6):
        got = client.compute(y, workers=["w1"], allow_other_workers=False).result(DEADLINE)
        assert np.array_equal(got, _alone(y))
        assert _chunks_ran_on(client) == {"w1"}


def test_chunks_run_on_the_workers_that_an_annotation_names(client, recorded):
    with dask.annotate(workers=["w2"], allow_other_workers=False):
        y, _ = layer()
    with own_experts(client, 6), dask.config.set({"optimization.fuse.active": False}):
        got = client.compute(y, optimize_graph=False).result(DEADLINE)
        assert np.array_equal(got, _alone(y))
        assert _chunks_ran_on(client) == {"w2"}


@pytest.fixture
def another_host(cluster, client):
    """A further worker, on a host of its own as far as Dask knows, with a resource."""
    cluster.start_worker("far", "--host", "127.0.0.2", "--resources", "fast=1")
    wait_until(lambda: "far" in addresses(client), "the worker has come")
    record_services(client)
    yield
    cluster.stop_worker("far")
    wait_until(lambda: "far" not in addresses(client), "the worker has gone")


@pytest.mark.parametrize(
    ("host", "names"), [("127.0.0.1", set(WORKERS)), ("127.0.0.2", {"far"})], ids=["near", "far"]
)
def test_chunks_run_on_the_host_that_the_user_names(client, recorded, another_host, host, names):
    y, _ = layer(chunks=24)
    with own_experts(client, 6) as owners:
        got = client.compute(y, workers=host).result(DEADLINE)
        assert np.array_equal(got, _alone(y))
        assert _chunks_ran_on(client) <= names
        assert owners.failures == []


@pytest.mark.parametrize("how", ["compute", "annotate"])
def test_chunks_run_where_there_are_the_resources_that_the_user_asks_for(
    client, recorded, another_host, how
):
    if how == "compute":
        y, asked = layer()[0], {"resources": {"fast": 1}}
    else:
        with dask.annotate(resources={"fast": 1}):
            y, asked = layer()[0], {"optimize_graph": False}
    with own_experts(client, 6) as owners:
        got = client.compute(y, **asked).result(DEADLINE)
        assert np.array_equal(got, _alone(y))
        assert _chunks_ran_on(client) == {"far"}
        assert len(set(servers(servings(client)))) == 0 or owners.failures == []


def test_a_lost_owner_is_replaced_though_chunks_hold_the_resource_that_its_experts_need(
    cluster, client, tmp_path
):
    """The weights are Dask arrays, whose tasks ask for it too, and each chunk holds all of it."""
    for name in ("fast", "owner"):
        cluster.start_worker(name, "--resources", "fast=1")
    wait_until(lambda: {"fast", "owner"} <= set(addresses(client)), "the workers have come")
    weights = da.random.default_rng(0).standard_normal((6, 32, 32), chunks=(1, -1, -1), dtype="f4")
    y, _ = layer(chunks=40, experts=weights)
    with own_experts(client, 6) as owners:
        for rank in range(6):
            owners.move(rank, "owner")
        future = client.compute(y, resources={"fast": 1})
        wait_until(lambda: any(slots_taken(client).values()), "a chunk is in flight")
        cluster.stop_worker("owner")
        assert np.array_equal(future.result(DEADLINE), _alone(y))
        assert owners.failures == []
    cluster.stop_worker("fast")
    wait_until(lambda: "fast" not in addresses(client), "the worker has gone")


# --- what changes in the midst -----------------------------------------------------------------


def test_closing_in_the_midst_of_a_job_frees_its_tasks(client):
    y, _ = layer(chunks=12, experts=Experts.callables([_slowly] * 6))
    owners = own_experts(client, 6)
    future = client.compute(y)
    owners.close()
    assert np.array_equal(future.result(DEADLINE), _alone(y))


def test_a_moved_rank_is_served_where_it_was_moved(client, recorded):
    y, _ = layer()
    target = addresses(client)["w2"]
    with own_experts(client, 6) as owners:
        owners.move(0, "w2")
        assert owners.owners[0] == (target,)
        client.compute(y).result(DEADLINE)
        assert servers(servings(client))[0] == {target}
        assert [change.why for change in owners.changes][-1] == "moved by hand"


def test_a_rank_moved_off_a_busy_worker_in_the_midst_of_a_job(client, recorded):
    y, _ = layer(chunks=60, experts=Experts.callables([_slowly] * 6))
    with own_experts(client, 6) as owners:
        future = client.compute(y)
        wait_until(lambda: any(slots_taken(client).values()), "chunks are in flight")
        left = addresses(client)["w2"]
        for rank in range(6):
            owners.move(rank, WORKERS[rank % 2])
        wait_until(lambda: slices_kept(client)[left] == 0, "the ranks are served elsewhere")
        assert not future.done()
        assert np.array_equal(future.result(DEADLINE), _alone(y))
    of_left = {(s.chunk, s.rank) for s in servings(client) if s.served_by == left}
    assert 0 < len(of_left) < 60


def test_a_replica_takes_its_part(client, recorded):
    y, _ = layer(chunks=60, ranks=2, experts=Experts.callables([_slowly, _at_once]))
    with own_experts(client, 2, replicas={1: 2}) as owners:
        assert [len(of_rank) for of_rank in owners.owners] == [1, 2]
        owners.replicate(0, "w2" if owners.owners[0] != (addresses(client)["w2"],) else "w1")
        client.compute(y).result(DEADLINE)
        assert servers(servings(client))[0] == set(owners.owners[0])
        assert len(owners.owners[0]) == 2
        owners.replicate(0)
        assert len(owners.owners[0]) == 3


def test_loads_decide_who_owns_what(client):
    with own_experts(client, 5, loads=[1, 1, 1, 1, 4]) as owners:
        alone = owners.owners[4]
        assert owners.owners.count(alone) == 1
        assert sorted(row.load for row in owners.table()) == [0.25, 0.25, 0.5]


def test_the_handle_shows_workers_and_ranks(client):
    with own_experts(client, 6) as owners:
        assert "<td>0, 3</td>" in owners._repr_html_()
        assert "w0: 0, 3; w1: 1, 4; w2: 2, 5" in repr(owners)
        owners.close()
        assert repr(owners) == "<Owners of 6 ranks: closed>"
        assert owners._repr_html_() == "&lt;Owners of 6 ranks: closed&gt;"
        with pytest.raises(RuntimeError, match="these owners are closed"):
            owners.move(0, "w1")


def test_to_show_a_closed_handle_is_no_error_on_the_scheduler(monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("distributed"), "propagate", True)
    with Client(n_workers=1, processes=False, dashboard_address="127.0.0.1:0") as client:
        owners = own_experts(client, 6)
        owners.close()
        assert repr(owners) == "<Owners of 6 ranks: closed>"
        assert owners._repr_html_() == "&lt;Owners of 6 ranks: closed&gt;"
    assert "Traceback" not in caplog.text
    assert "owners are closed" not in caplog.text


def test_the_handle_of_a_closed_client_can_be_shown(cluster, client):
    with cluster.client(loop=client.loop) as other:
        owners = own_experts(other, 6)
    assert repr(owners) == "<Owners of 6 ranks: closed>"


def test_a_second_call_changes_only_what_it_names(cluster, client):
    given = {"settle": 50.0, "pause_limit": 99.0, "chunks_in_flight": 1.0}
    with own_experts(client, 6, rules=OwnerRules(**given)), cluster.client() as other:
        with own_experts(other):
            assert client.run_on_scheduler(_limits) == given
        with own_experts(other, rules=OwnerRules(settle=3.0)):
            assert client.run_on_scheduler(_limits) == given | {"settle": 3.0}


def test_what_fails_in_the_plugin_can_be_read(client):
    with own_experts(client, 6) as owners:
        assert owners.failures == []
        client.run_on_scheduler(_break_the_plugin)
        y, _ = layer()
        assert np.array_equal(client.compute(y).result(DEADLINE), _alone(y))
        assert "update_graph" in owners.failures[0]
        client.run_on_scheduler(_mend_the_plugin)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"world_size": -1}, "world_size must be at least 1, but is -1"),
        ({"world_size": 0}, "world_size must be at least 1, but is 0"),
        ({"world_size": 2.5}, "world_size must be a whole number, but is 2.5"),
        ({"world_size": 4.0}, "world_size must be a whole number, but is 4.0"),
        ({"world_size": 3, "loads": [1, 2]}, "one number per rank, 3, but has 2"),
        ({"world_size": 2, "loads": [0, 0]}, "not all zero"),
        ({"world_size": 2, "loads": [1, float("nan")]}, "must be finite"),
        ({"world_size": 2, "replicas": {2: 2}}, "ranks 0 to 1, but gives 2 to rank 2"),
        ({"world_size": 2, "replicas": {0: 0}}, "1 or more owners"),
    ],
)
def test_claims_that_make_no_sense_are_refused_and_install_nothing(client, keywords, message):
    with pytest.raises((ValueError, TypeError), match=message):
        own_experts(client, **keywords)


def test_rules_and_clients_that_cannot_be():
    with pytest.raises(ValueError, match="chunks_in_flight must be 1 or more, but is 0"):
        OwnerRules(chunks_in_flight=0)
    with pytest.raises(ValueError, match="pause_limit must be 0 seconds or more, but is -1"):
        OwnerRules(pause_limit=-1)
    with pytest.raises(TypeError, match=r"needs a distributed.Client, but got a NoneType"):
        own_experts(None)


def test_rules_may_be_left_out_by_name_and_must_be_rules(client):
    with own_experts(client, 2, rules=None) as owners:
        assert len(owners.owners) == 2
    with pytest.raises(TypeError, match=r"rules must be OwnerRules\(\.\.\.\), but got a dict"):
        own_experts(client, 2, rules={"settle": 1})


def test_ranks_and_workers_that_are_not_there_are_refused(client):
    with own_experts(client, 3) as owners:
        with pytest.raises(ValueError, match="rank must be 0 to 2, but is 3"):
            owners.move(3, "w0")
        with pytest.raises(ValueError, match="'w9' is none of"):
            owners.move(0, "w9")
        with pytest.raises(ValueError, match="rank 0 needs a worker that does not own it yet"):
            owners.replicate(0, owners.owners[0][0])


# --- workers that pause, retire, scale -------------------------------------------------------


def test_a_worker_paused_for_long_loses_its_ranks_and_gets_some_back(client):
    y, _ = layer(chunks=24, experts=Experts.callables([_slowly] * 6))
    paused = addresses(client)["w1"]
    with own_experts(client, 6, rules=OwnerRules(settle=0.2, pause_limit=0.3)) as owners:
        future = client.compute(y)
        client.run(_set_status, Status.paused, workers=[paused])
        wait_until(lambda: (paused,) not in owners.owners, "the ranks of the paused worker moved")
        assert np.array_equal(future.result(DEADLINE), _alone(y))
        client.run(_set_status, Status.running, workers=[paused])
        wait_until(lambda: owners.owners.count((paused,)) == 2, "it has its share again")
        assert owners.failures == []


def test_a_worker_paused_for_short_keeps_its_ranks(client):
    paused = addresses(client)["w1"]
    with own_experts(client, 6, rules=OwnerRules(settle=0.1, pause_limit=0.5)) as owners:
        client.run(_pause_for_a_moment, workers=[paused])
        time.sleep(0.7)
        assert owners.owners.count((paused,)) == 2
        assert {change.why for change in owners.changes} == {"first owner"}


KEPT: list = []


@pytest.mark.parametrize("plugin", [Services, WorkerSettings])
def test_a_worker_that_paused_gives_free_memory_back_and_goes_on(tmp_path, plugin):
    limited = ["--memory-limit", "400MiB"]
    with (
        Cluster(tmp_path, ["w0"], worker_options=limited) as cluster,
        cluster.client() as client,
    ):
        client.register_plugin(plugin())
        client.run(_fill_and_free)
        assert client.submit(abs, -1).result(DEADLINE) == 1, "the worker goes on"
        assert "Pausing worker" in cluster.log("w0")


async def _fill_and_free(dask_worker):
    """Pause with memory that is then freed between small blocks which are kept."""
    large = []
    while dask_worker.status != Status.paused:
        large.append(np.ones(500_000, np.uint8))
        KEPT.append(np.ones(20_000, np.uint8))
        await asyncio.sleep(0.001)


def test_downscaling_spares_owners_while_work_is_pending(client):
    y, _ = layer(chunks=24, ranks=2, experts=Experts.callables([_slowly] * 2))
    with own_experts(client, 2) as owners:
        future = client.compute(y)
        wait_until(lambda: client.run_on_scheduler(_has_begun), "the job has begun")
        spared = {owner for (owner,) in owners.owners}
        may_go = client.run_on_scheduler(_valid_workers)
        assert set(may_go) == set(addresses(client).values()) - spared
        # Dask also spares a worker while chunks are in flight on it.
        assert not spared & set(client.run_on_scheduler(_workers_to_close, 3))
        future.result(DEADLINE)
        assert len(client.run_on_scheduler(_workers_to_close, 3)) == 3


def test_a_worker_that_comes_and_goes_moves_a_rank_once_in_ten_settle_times(cluster, client):
    settle = 0.3
    with own_experts(client, 8, rules=OwnerRules(settle=settle)) as owners:
        for _ in range(2):
            cluster.start_worker("guest")
            wait_until(lambda: "guest" in addresses(client), "the guest has come")
            wait_until(lambda: _moved(owners), "it has been given a rank, once")
            time.sleep(3 * settle)
            cluster.stop_worker("guest")
            wait_until(lambda: "guest" not in addresses(client), "the guest has gone")
            time.sleep(2 * settle)
        assert all(
            np.diff(times).min(initial=10 * settle) > 9.9 * settle
            for times in _moved(owners).values()
        )


def test_a_worker_that_closes_in_good_order_hands_its_ranks_on(cluster, client):
    y, _ = layer(chunks=24, experts=Experts.callables([_slowly] * 6))
    cluster.start_worker("leaving")
    wait_until(lambda: "leaving" in addresses(client), "the worker has come")
    leaving = addresses(client)["leaving"]
    with own_experts(client, 6, rules=OwnerRules(settle=0.2)) as owners:
        assert (leaving,) in owners.owners
        future = client.compute(y)
        wait_until(lambda: client.run_on_scheduler(_has_begun), "the job has begun")
        cluster.signal(client, "leaving", signal.SIGTERM)
        assert np.array_equal(future.result(DEADLINE), _alone(y))
        wait_until(lambda: "leaving" not in addresses(client), "the worker has gone")
        assert (leaving,) not in owners.owners
        assert owners.failures == []
    cluster.stop_worker("leaving")


def test_a_plugin_that_fails_when_a_worker_dies_ends_the_job_with_an_error(
    cluster, client, tmp_path
):
    (gate := tmp_path / "wait").touch()
    y, _ = layer(chunks=60, experts=Experts.callables([Waits(gate)] * 6))
    cluster.start_worker("victim")
    wait_until(lambda: "victim" in addresses(client), "the victim has come")
    with own_experts(client, 6, rules=OwnerRules(settle=0.2, chunks_in_flight=2)) as owners:
        future = client.compute(y)
        wait_until(lambda: client.run_on_scheduler(_has_begun), "the job has begun")
        client.run_on_scheduler(_break_assignment)
        cluster.stop_worker("victim")
        wait_until(lambda: "victim" not in addresses(client), "the victim is lost")
        gate.unlink()
        with pytest.raises(LostOwnerError, match="owners of ranks are unknown after an error"):
            future.result(DEADLINE)
        assert any("remove_worker" in failure for failure in owners.failures)
        client.run_on_scheduler(_mend_assignment)
        future.release()  # which its error would keep
        wait_until(lambda: not client.run_on_scheduler(_has_begun), "the failed job is gone")
        future = client.compute(y + 1)
        assert np.array_equal(future.result(DEADLINE), _alone(y + 1))
        assert all(owners.owners)
        future.release()  # the first error keeps this frame


def test_ranks_wait_for_workers_and_are_spread_when_they_come(tmp_path):
    y, _ = layer()
    with Cluster(tmp_path) as cluster, cluster.client(0) as client:
        with pytest.raises(ValueError, match="there are none; start workers first"):
            own_experts(client)
        with own_experts(client, 6, rules=OwnerRules(settle=0.3)) as owners:
            assert owners.owners == [()] * 6
            future = client.compute(y)
            cluster.start_worker("w0")
            cluster.start_worker("w1")
            assert np.array_equal(future.result(DEADLINE), _alone(y))
            wait_until(
                lambda: sorted(len(row.ranks) for row in owners.table()) == [3, 3],
                "each has three",
            )
            slow, _ = layer(chunks=8, experts=Experts.callables([_slowly] * 6))
            future = client.compute(slow)
            wait_until(lambda: client.run_on_scheduler(_has_begun), "the job has begun")
            for name in ("w0", "w1"):
                cluster.stop_worker(name)
            wait_until(lambda: owners.owners == [()] * 6, "all workers are gone")
            cluster.start_worker("w2")
            assert np.array_equal(future.result(DEADLINE), _alone(slow))


def _moved(owners):
    """By rank: when it was moved for balance."""
    moved = defaultdict(list)
    for change in owners.changes:
        if change.why == "rebalanced":
            moved[change.rank].append(change.time)
    return moved


# --- what it costs ---------------------------------------------------------------------------


def test_a_layer_makes_as_many_tasks_as_the_formula_says(client, recorded):
    y, _ = layer(chunks=12, rows=2, width=2, ranks=16)
    with own_experts(client, 16):
        client.compute(y.sum()).result(DEADLINE)
    steps = [key[0] for key, _ in computed(client) if isinstance(key, tuple)]
    ours = [step for step in steps if step.startswith(("ep_experts", "ep_ranks"))]
    later = ("sum-partial", "sum-aggregate")
    fused = [step for step in steps if step.startswith("sum-") and not step.startswith(later)]
    assert len(ours) == 16 + 1
    assert len(fused) == 12
    assert len(ours) + len(fused) == count_tasks(12, 16)


# --- what runs on the cluster ----------------------------------------------------------------


def _slowly(rows):
    time.sleep(0.02)
    return rows * 2


def _at_once(rows):
    return rows * 3


def _plugins(dask_scheduler):
    return list(dask_scheduler.plugins)


def _limits(dask_scheduler):
    plugin = dask_scheduler.plugins[OWNERS_PLUGIN]
    return {name: getattr(plugin, name) for name in ("settle", "pause_limit", "chunks_in_flight")}


def _what_is_left(dask_scheduler):
    left = [name for name in dask_scheduler.plugins if name == OWNERS_PLUGIN]
    left += [key for key in dask_scheduler.task_metadata if key == METADATA[0]]
    return left + [
        ts.key for ts in dask_scheduler.tasks.values() if ts.worker_restrictions is not None
    ]


def _break_the_plugin(dask_scheduler):
    plugin = dask_scheduler.plugins[OWNERS_PLUGIN]
    plugin.hidden, plugin.ranks = plugin.ranks, None


def _mend_the_plugin(dask_scheduler):
    plugin = dask_scheduler.plugins[OWNERS_PLUGIN]
    plugin.ranks = plugin.hidden


def _break_assignment(dask_scheduler):
    dask_scheduler.plugins[OWNERS_PLUGIN].assign = None


def _mend_assignment(dask_scheduler):
    plugin = dask_scheduler.plugins[OWNERS_PLUGIN]
    del plugin.assign
    plugin.assign("mended")


def _valid_workers(dask_scheduler):
    plugin, workers = dask_scheduler.plugins[OWNERS_PLUGIN], list(dask_scheduler.workers.values())
    return [w.address for w in plugin.valid_workers_downscaling(dask_scheduler, workers)]


def _workers_to_close(count, dask_scheduler):
    return dask_scheduler.workers_to_close(n=count)


def _has_begun(dask_scheduler):
    return any(layer.is_open for layer in dask_scheduler.plugins[OWNERS_PLUGIN].layers)


def _set_status(status, dask_worker):
    dask_worker.status = status


def _pause_for_a_moment(dask_worker):
    _set_status(Status.paused, dask_worker)
    _set_status(Status.running, dask_worker)
