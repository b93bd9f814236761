"""Faults of real workers during a job: it ends, and with the bits of an undisturbed run.

`workflows/faults.py` tries the same at ten moments each and prints what it costs.
"""

import signal
import time
from collections import Counter
from math import inf

import dask.array as da
import numpy as np
import pytest
from distributed import futures_of

from dask_ep import Experts, OwnerRules, expert_parallel, own_experts
from dask_ep.cluster.exchange import SERVICES_PLUGIN
from dask_ep.cluster.owner_plugin import OWNERS_PLUGIN
from dask_ep.errors import LostOwnerError
from dask_ep.storage.sources import Source
from tests.cluster_processes import DEADLINE, Cluster, addresses, wait_until
from tests.fault_scenarios import (
    CONFIG,
    FAULTS,
    RANKS,
    UNEVEN_RANKS,
    UNEVEN_WORKERS,
    WORKERS,
    job,
    moments,
    run_disturbed,
    run_undisturbed,
    uneven_job,
)
from tests.observed import Waits, record_services, servings, slices_kept, slots_taken

LENGTH = 2.0
"""Seconds of the undisturbed run, about: faults come within them."""

TRIED = {"one owner killed": 3}
"""Moments tried here, where not one."""


@pytest.fixture(scope="module")
def clusters(tmp_path_factory):
    """Clusters without and with nannies, started when first asked for, and the expected result."""
    running = {}

    def running_cluster(nanny):
        if nanny not in running:
            cluster = Cluster(tmp_path_factory.mktemp("c"), WORKERS, nanny=nanny, config=CONFIG)
            cluster.__enter__()
            client = cluster.client()
            running[nanny] = cluster, client, run_undisturbed(client).value
        return running[nanny]

    yield running_cluster
    for cluster, client, _ in running.values():
        client.close()
        cluster.__exit__()


CASES = [
    pytest.param(fault, number, id=f"{fault}-{number}")
    for fault in FAULTS
    for number in range(TRIED.get(fault, 1))
]


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "number"), CASES)
def test_the_result_is_that_of_the_undisturbed_run(clusters, fault, number):
    cluster, client, expected = clusters(nanny=FAULTS[fault][1])
    moment, victim = moments(fault, 10, LENGTH)[number]
    outcome = run_disturbed(cluster, client, fault, moment, victim, salt=number + 1)
    assert np.array_equal(outcome.value, expected)
    assert outcome.failures == []


@pytest.mark.slow
def test_an_idle_worker_takes_a_replica_of_the_hot_rank_in_the_midst_of_the_job(tmp_path, gate):
    y = uneven_job(1e-3, gate=gate)
    running = Cluster(tmp_path, UNEVEN_WORKERS, config=CONFIG)
    with running, running.client() as client:
        record_services(client)
        rules = OwnerRules(replicate_hot=False)
        with own_experts(client, UNEVEN_RANKS, rules=rules) as owners:
            future = client.compute(y)
            wait_until(lambda: any(slots_taken(client).values()), "chunks are in flight")
            idle = set(addresses(client).values()).difference(*owners.owners)
            both = idle.union(owners.owners[0])
            owners.replicate(0)
            assert set(owners.owners[0]) == both
            gate.unlink()
            assert np.array_equal(future.result(DEADLINE), alone(y))
            assert owners.failures == []
        rows = Counter()
        for served in servings(client):
            rows[served.served_by] += served.rows if served.rank == 0 else 0
    assert min(rows[address] for address in both) > 0.1 * rows.total()


# --- more that may happen at once --------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster(clusters):
    """Three workers of one thread each, those of the faults; tests bring back what they kill."""
    return clusters(nanny=False)[0]


@pytest.fixture
def client(cluster):
    with cluster.client() as connected:
        yield connected
        wait_until(lambda: nothing_is_left(connected), "nothing is left")


def nothing_is_left(client):
    return (
        OWNERS_PLUGIN not in client.run_on_scheduler(_plugins)
        and not client.run_on_scheduler(_restrictions)
        and not any(slots_taken(client).values())
        and not any(client.run(_layers_timed).values())
        and not any(slices_kept(client).values())
    )


def replace(cluster, client, name):
    """Kill a worker, and start another one of this name."""
    address = addresses(client)[name]
    cluster.stop_worker(name)
    wait_until(lambda: address not in addresses(client).values(), "the worker is lost")
    cluster.start_worker(name)


def alone(y):
    """Compute without the cluster; experts that sleep do so side by side."""
    return y.compute(scheduler="threads", num_workers=8)


def layer(experts, ranks, chunks=60, rows=16, width=8):
    rng = np.random.default_rng(0)
    routing = rng.integers(ranks, size=(chunks * rows, 2))
    tokens = rng.standard_normal((chunks * rows, width), np.float32)
    return expert_parallel(
        da.from_array(tokens, chunks=(rows, width)),
        da.from_array(routing, chunks=(rows, 2)),
        experts,
        world_size=ranks,
    )


@pytest.mark.slow
def test_a_rank_is_moved_while_hundreds_of_packets_wait_for_it(client, gate):
    y = layer(Experts.callables([Waits(gate), _triple, _triple]), 3, chunks=300)
    record_services(client)
    with own_experts(client, 3, rules=OwnerRules(chunks_in_flight=inf)) as owners:
        owners.move(0, "w0")
        future = client.compute(y)
        waiting = 270  # a third of the chunks is read at w0 itself, whose threads wait for a core
        wait_until(lambda: sum(slots_taken(client).values()) >= waiting, "packets wait")
        owners.move(0, "w1")
        kept = addresses(client)["w0"]
        wait_until(lambda: slices_kept(client)[kept] <= 1, "the rank is served elsewhere")
        gate.unlink()
        assert np.array_equal(future.result(DEADLINE), alone(y))
        assert owners.failures == []
    served = [(s.chunk, s.rank) for s in servings(client)]
    assert len(served) == len(set(served)), "what waited was served once, where it waited"


@pytest.fixture
def joining(cluster, client):
    """Let a fourth worker join, and give its address."""

    def join():
        cluster.start_worker("added")
        wait_until(lambda: "added" in addresses(client), "the worker has come")
        return addresses(client)["added"]

    yield join
    cluster.stop_worker("added")
    wait_until(lambda: "added" not in addresses(client), "the worker has gone")


@pytest.mark.slow
def test_a_worker_that_joins_takes_ranks_and_chunks_of_the_job(client, joining, gate):
    y = layer(Experts.callables([Waits(gate), *[_triple_slowly] * 5]), 6)
    with own_experts(client, 6, rules=OwnerRules(settle=0.2)) as owners:
        future = client.compute(y)
        wait_until(lambda: any(slots_taken(client).values()), "chunks are in flight")
        added = joining()
        record_services(client)
        wait_until(lambda: any(added in of_rank for of_rank in owners.owners), "it has a rank")
        gate.unlink()
        assert np.array_equal(future.result(DEADLINE), alone(y))
        assert owners.failures == []
        served = servings(client)
    assert any(s.served_by == added for s in served)
    assert any(s.asked_by == added for s in served)


@pytest.mark.slow
def test_a_client_that_goes_leaves_no_chunk_and_no_experts(cluster, client, gate):
    y = layer(Experts.callables([Waits(gate), *[_triple] * (RANKS - 1)]), RANKS)
    with cluster.client() as other:
        own_experts(other, RANKS)
        future = other.compute(y)
        wait_until(lambda: all(slots_taken(other).values()), "chunks are in flight everywhere")
        assert not future.done()
    gate.unlink()
    wait_until(lambda: nothing_is_left(client), "nothing is left")
    with own_experts(client, RANKS):
        assert np.array_equal(client.compute(y).result(DEADLINE), alone(y))


@pytest.mark.slow
def test_two_graphs_of_two_clients_outlive_an_owner(cluster, client):
    mine, theirs = job(salt=3), job(salt=4) * 2
    with (
        cluster.client() as other,
        own_experts(client, RANKS, rules=OwnerRules(settle=0.2)) as owners,
        own_experts(other, RANKS),
    ):
        futures = client.compute(mine), other.compute(theirs)
        wait_until(lambda: any(slots_taken(client).values()), "chunks are in flight")
        replace(cluster, client, "w1")
        results = [future.result(DEADLINE) for future in futures]
        assert owners.failures == []
    assert np.array_equal(results[0], alone(mine))
    assert np.array_equal(results[1], alone(theirs))


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["in the graph", "slow tasks", "tasks of another client"])
def test_a_lost_owner_is_replaced_while_all_chunks_that_may_be_under_way_wait_for_it(
    cluster, client, weights
):
    """Dask computes the weights again, on workers whose only thread has a chunk that waits.

    With more such tasks than twice the threads, Dask would hold them back on the scheduler.
    """
    ranks = 16
    given = np.random.default_rng(5).standard_normal((ranks, 8, 8)).astype("f4")
    if weights != "in the graph":
        given = da.from_array(given, chunks=(1, -1, -1)).map_blocks(_slowly, meta=given[:0])
    y = layer(given, ranks)
    expected = alone(y)
    with own_experts(client, ranks, rules=OwnerRules(settle=0.2, chunks_in_flight=1)) as owners:
        for rank in range(ranks):
            owners.move(rank, "w0")
        earlier = layer(Experts.callables([_triple_slowly] * 3), 3, chunks=200)
        if weights == "tasks of another client":  # Dask takes these chunks first
            others = client.compute(earlier)
        future = client.compute(y)
        wait_until(lambda: client.run_on_scheduler(_open_layers, ranks), "the job has begun")
        replace(cluster, client, "w0")
        assert np.array_equal(future.result(DEADLINE), expected)
        if weights == "tasks of another client":
            others.cancel()
        assert owners.failures == []


@pytest.mark.slow
def test_weights_of_a_lower_priority_are_computed_again_before_the_chunks_that_wait(
    cluster, client
):
    """Dask sends them to a worker, behind its chunks, before it is known that a rank is lost."""
    given = np.random.default_rng(5).standard_normal((3, 8, 8)).astype("f4")
    expected, lost = alone(layer(given, 3)), addresses(client)["w0"]
    with own_experts(client, 3, rules=OwnerRules(settle=0.2, chunks_in_flight=1)) as owners:
        for rank in range(3):
            owners.move(rank, "w0")
        slow = da.from_array(given, chunks=(1, -1, -1)).map_blocks(_slowly, meta=given[:0])
        there = {"workers": [lost], "allow_other_workers": True}
        weights = client.persist(slow, optimize_graph=False, **there)
        wait_until(lambda: futures_done(weights, client), "the weights are there")
        future = client.compute(layer(weights, 3), priority=1)
        wait_until(lambda: client.run_on_scheduler(_open_layers, 3), "the job has begun")
        cluster.signal(client, "w0", signal.SIGSTOP)
        others = list({*addresses(client).values()} - {lost})
        wait_until(
            lambda: future.done() or all(client.run(_has_waiting, workers=others).values()),
            "chunks wait on all other workers",
        )
        cluster.stop_worker("w0")
        assert np.array_equal(future.result(DEADLINE), expected)
        assert owners.failures == []
    cluster.start_worker("w0")


class Breakable(Source):
    """Weights that cannot be read while a file is there."""

    def __init__(self, weights, file):
        self.weights, self.file = weights, file
        self.shape, self.dtype, self.name = weights.shape, weights.dtype, "breakable"

    def read(self, start, stop, out=None):
        if self.file.exists():
            raise OSError("the disk is broken")
        return self.weights[start:stop].copy()

    def fingerprint(self):
        return "breakable"


@pytest.mark.slow
def test_experts_that_cannot_be_loaded_again_end_the_job_with_an_error(cluster, client, tmp_path):
    broken = tmp_path / "broken"
    weights = np.random.default_rng(6).standard_normal((6, 8, 8)).astype("f4")
    y = layer(Experts.linear(Breakable(weights, broken)), 6, chunks=3000)
    with own_experts(client, 6, rules=OwnerRules(settle=0.2)):
        future = client.compute(y)
        wait_until(lambda: any(slots_taken(client).values()), "chunks are in flight")
        broken.touch()
        replace(cluster, client, "w2")
        told = r"rank \d: its experts could not be loaded again: .*the disk is broken"
        with pytest.raises(LostOwnerError, match=told):
            future.result(DEADLINE)
        # Once it is mended, the same job can be asked for again.
        broken.unlink()
        client.cancel(future)
        small = layer(Experts.linear(Breakable(weights, broken)), 6, chunks=30)
        assert np.array_equal(client.compute(small).result(DEADLINE), alone(small))
    del future


def _triple(rows):
    return rows * 3


def _triple_slowly(rows):
    time.sleep(0.02)
    return rows * 3


def _slowly(block):
    time.sleep(0.1)
    return block


def futures_done(array, client):
    return all(future.done() for future in futures_of(array, client))


def _has_waiting(dask_worker):
    return dask_worker.plugins[SERVICES_PLUGIN]._admission.has_waiting


def _layers_timed(dask_worker):
    services = dask_worker.plugins.get(SERVICES_PLUGIN)
    return services is not None and len(services._seconds)


def _plugins(dask_scheduler):
    return list(dask_scheduler.plugins)


def _restrictions(dask_scheduler):
    return [t.key for t in dask_scheduler.tasks.values() if t.worker_restrictions]


def _open_layers(world_size, dask_scheduler):
    layers = dask_scheduler.plugins[OWNERS_PLUGIN].layers
    return [layer.token for layer in layers if layer.is_open and layer.world_size == world_size]
