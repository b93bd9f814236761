"""Owners of ranks when several things happen at once, on a cluster within this process."""

from __future__ import annotations

import dask.array as da
import numpy as np
import pytest
from distributed import Client

from dask_ep import Experts, OwnerRules, expert_parallel, own_experts
from dask_ep.cluster import ownership
from dask_ep.cluster.hot_ranks import LOOKS
from dask_ep.cluster.owner_plugin import OWNERS_PLUGIN
from dask_ep.errors import LostOwnerError
from dask_ep.placement.placement import Placement
from dask_ep.placement.policies import contiguous
from tests.cluster.test_faults import Breakable
from tests.cluster_processes import DEADLINE, wait_until
from tests.observed import Waits

pytestmark = pytest.mark.slow

CHUNKS, ROWS, WIDTH, RANKS = 6, 8, 4, 2


@pytest.fixture
def client():
    """Three workers, each with more threads than there are chunks."""
    with Client(
        n_workers=3,
        threads_per_worker=8,
        processes=False,
        dashboard_address="127.0.0.1:0",
        set_as_default=False,
    ) as connected:
        yield connected


def layer(gate, placement=None):
    """A layer that doubles rows of ones, if the gate is away."""
    tokens = da.ones((CHUNKS * ROWS, WIDTH), chunks=(ROWS, WIDTH))
    routing = da.from_array(np.arange(CHUNKS * ROWS) % RANKS, chunks=ROWS)
    where = {"world_size": RANKS} if placement is None else {"placement": placement}
    return expert_parallel(tokens, routing, Experts.callables([Waits(gate)] * RANKS), **where)


def has_begun(client):
    return client.run_on_scheduler(_has_begun)


def _has_begun(dask_scheduler):
    return any(layer.is_open for layer in dask_scheduler.plugins[OWNERS_PLUGIN].layers)


def test_chunks_of_a_later_graph_of_a_layer_have_their_home_too(client, gate):
    y = layer(gate, Placement(contiguous(RANKS, RANKS).physical, local=True))
    with own_experts(client, RANKS) as owners:
        first = client.compute(y[:ROWS])
        wait_until(lambda: has_begun(client), "the first graph is computed")
        later = client.persist(y)
        wait_until(lambda: len(client.run_on_scheduler(_homes)) >= CHUNKS, "the later one is known")
        for (_, chunk, *_), home in client.run_on_scheduler(_homes).items():
            assert home == set(owners.owners[chunk % RANKS])
        gate.unlink()
        assert (client.compute(later).result(DEADLINE) == 2).all()
        assert (first.result(DEADLINE) == 2).all()


def _homes(dask_scheduler):
    """Where each chunk may run, by its key."""
    return {
        key: set(task.worker_restrictions or ())
        for key, task in dask_scheduler.tasks.items()
        if isinstance(key, tuple) and key[0].startswith("ep_chunk")
    }


@pytest.mark.parametrize("lost", [False, True], ids=["all stay", "an added owner retires"])
def test_all_added_owners_of_a_hot_rank_are_removed_when_it_is_hot_no_more(client, gate, lost):
    y = layer(gate)
    with own_experts(client, RANKS, rules=OwnerRules(settle=DEADLINE)) as owners:
        before = owners.owners[0]
        future = client.compute(y)
        wait_until(lambda: has_begun(client), "the job has begun")
        client.run_on_scheduler(_overload, before[0], 1 if lost else 2)
        assert len(owners.owners[0]) == (2 if lost else 3)
        if lost:
            (added,) = set(owners.owners[0]) - set(before)
            client.run_on_scheduler(_pretend_to_retire, added)
            wait_until(lambda: added not in owners.owners[0], "its ranks are given to others")
            assert len(owners.owners[0]) == 2
        gate.unlink()
        assert (future.result(DEADLINE) == 2).all()
        del future
        wait_until(lambda: owners.owners[0] == before, "it has its first owner only")
        assert owners.failures == []


def _overload(worker, count, dask_scheduler):
    """Let a worker report that rows wait for rank 0, until it has so many more owners."""
    plugin = dask_scheduler.plugins[OWNERS_PLUGIN]
    (layer,) = plugin.layers
    for t in range(count * LOOKS + 1):
        for address, state in dask_scheduler.workers.items():
            queues = [[layer.token, 0, 1000]] if address == worker else []
            report = {"time": 1e12 + t, "core": float(t) if queues else 0.0, "threads": 1}
            state.metrics["dask_ep"] = {**report, "queues": queues, "slices": []}
        plugin._look()


def _pretend_to_retire(worker, dask_scheduler):
    dask_scheduler.handle_worker_status_change("closing_gracefully", worker, "test")


@pytest.mark.parametrize("lost", [False, True], ids=["the first stays", "the first is lost"])
def test_an_owner_that_cannot_load_its_experts_matters_only_if_no_other_worker_serves_them(
    client, gate, tmp_path, lost
):
    broken = tmp_path / "broken"
    y = breakable_layer(gate, broken)
    with own_experts(client, RANKS, rules=OwnerRules(settle=0.1)) as owners:
        future = client.compute(y)
        wait_until(lambda: has_begun(client), "the job has begun")
        broken.touch()
        (first,) = owners.owners[0]
        if lost:
            owners.move(0, next(row.address for row in owners.table() if 0 not in row.ranks))
        else:
            owners.replicate(0)
        wait_until(lambda: client.run_on_scheduler(_has_failed), "it cannot load the experts")
        if lost:
            (worker,) = [w for w in client.cluster.workers.values() if w.address == first]
            client.sync(worker.close, executor_wait=False)
        gate.unlink()
        if lost:
            with pytest.raises(LostOwnerError, match="rank 0: its experts could not be loaded"):
                future.result(DEADLINE)
        else:
            assert (future.result(DEADLINE) == WIDTH).all()
        assert owners.failures == []


def test_an_owner_that_could_not_load_its_experts_does_not_end_a_later_graph(
    client, gate, tmp_path
):
    broken = tmp_path / "broken"
    y = breakable_layer(gate, broken)
    with own_experts(client, RANKS, rules=OwnerRules(settle=0.1)) as owners:
        first = client.compute(y[:ROWS])
        wait_until(lambda: has_begun(client), "the first graph is computed")
        broken.touch()
        (owner,) = owners.owners[0]
        owners.replicate(0)
        wait_until(lambda: client.run_on_scheduler(_has_failed), "it cannot load the experts")
        later = client.persist(y)
        wait_until(lambda: len(client.run_on_scheduler(_homes)) >= CHUNKS, "the later one is known")
        gate.unlink()
        assert (client.compute(later).result(DEADLINE) == WIDTH).all()
        assert (first.result(DEADLINE) == WIDTH).all()
        broken.unlink()
        (worker,) = [w for w in client.cluster.workers.values() if w.address == owner]
        client.sync(worker.close, executor_wait=False)
        assert (client.compute(later).result(DEADLINE) == WIDTH).all(), "what was lost is there"
        assert owners.failures == []


def breakable_layer(gate, broken):
    """A layer that adds up rows of ones, whose weights cannot be read while a file is there."""
    weights = np.ones((RANKS, WIDTH, WIDTH), np.float32)
    tokens = da.map_blocks(
        _ones_after, gate, chunks=((ROWS,) * CHUNKS, (WIDTH,)), meta=np.empty((0, 0), "f4")
    )
    routing = da.from_array(np.arange(CHUNKS * ROWS) % RANKS, chunks=ROWS)
    experts = Experts.linear(Breakable(weights, broken))
    return expert_parallel(tokens, routing, experts, world_size=RANKS)


def _ones_after(gate):
    Waits(gate)(np.ones(1))
    return np.ones((ROWS, WIDTH), np.float32)


def _has_failed(dask_scheduler):
    (layer,) = dask_scheduler.plugins[OWNERS_PLUGIN].layers
    return layer.tasks[0].state == "erred" or any(layer.failed)


def test_the_claim_of_a_client_that_has_gone_holds_nothing(client):
    client.run_on_scheduler(ownership._claim, "gone", RANKS, {}, None, OwnerRules())
    assert not client.run_on_scheduler(_is_installed)
    with own_experts(client, RANKS):
        client.run_on_scheduler(ownership._claim, "gone", RANKS, {}, None, OwnerRules())
        assert client.run_on_scheduler(_is_installed)
    assert not client.run_on_scheduler(_is_installed)


def _is_installed(dask_scheduler):
    return OWNERS_PLUGIN in dask_scheduler.plugins


def test_a_plugin_that_another_one_has_replaced_acts_no_more(client):
    own_experts(client, RANKS)
    client.run_on_scheduler(_replace_while_a_worker_resumes, client.id)
    assert client.run_on_scheduler(_timers_of_the_replaced) == []
    client.run_on_scheduler(_forget_the_replaced, client.id)


def _replace_while_a_worker_resumes(client, dask_scheduler):
    worker, replaced = next(iter(dask_scheduler.workers)), dask_scheduler.plugins[OWNERS_PLUGIN]
    event = {"action": "worker-status-change", "status": "running"}
    dask_scheduler.log_event(worker, event)
    replaced.remove_client(dask_scheduler, client)
    ownership._claim(client, RANKS, {}, None, OwnerRules(), dask_scheduler)
    assert dask_scheduler.plugins[OWNERS_PLUGIN] is not replaced
    dask_scheduler.replaced_in_test = replaced


def _timers_of_the_replaced(dask_scheduler):
    return list(dask_scheduler.replaced_in_test.timers)


def _forget_the_replaced(client, dask_scheduler):
    del dask_scheduler.replaced_in_test
    dask_scheduler.plugins[OWNERS_PLUGIN].remove_client(dask_scheduler, client)
