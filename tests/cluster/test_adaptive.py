"""A cluster that grows and shrinks by itself, with real worker processes, during a job."""

from __future__ import annotations

import time

import dask.array as da
import numpy as np
import pytest
from distributed import Client, LocalCluster

from dask_ep import Experts, OwnerRules, expert_parallel, own_experts
from tests.cluster_processes import DEADLINE, wait_until
from tests.observed import Waits

RANKS, CHUNKS, ROWS, WIDTH = 2, 3, 8, 4


@pytest.fixture
def adaptive():
    """A client of a cluster of one worker, or of up to four while there is much to do."""
    with (
        LocalCluster(
            n_workers=1,
            threads_per_worker=1,
            processes=True,
            host="127.0.0.1",
            dashboard_address=":0",
            silence_logs=50,
        ) as cluster,
        Client(cluster) as client,
    ):
        cluster.adapt(minimum=1, maximum=4, interval="100ms", target_duration="2s")
        yield client


@pytest.mark.slow
def test_an_adaptive_cluster_grows_and_shrinks_in_the_midst_of_a_job(adaptive, tmp_path):
    gate = tmp_path / "wait"
    gate.touch()
    tokens = da.ones((CHUNKS * ROWS, WIDTH), chunks=(ROWS, WIDTH), dtype=np.float32)
    routing = np.random.default_rng(0).integers(RANKS, size=CHUNKS * ROWS)
    with own_experts(adaptive, RANKS, rules=OwnerRules(settle=0.2)) as owners:
        y = expert_parallel(
            tokens,
            da.from_array(routing, chunks=ROWS),
            Experts.callables([Waits(gate)] * RANKS),
            world_size=RANKS,
        )
        job = adaptive.compute(y)
        others = adaptive.map(time.sleep, [0.1] * 1000, pure=False)
        wait_until(lambda: len(_workers(adaptive)) == 4, "the cluster has grown")
        wait_until(lambda: len(set(owners.owners)) == RANKS, "each rank has a worker")
        adaptive.cancel(others)
        # Dask keeps a worker for the chunks that are in flight on it.
        wait_until(lambda: len(_workers(adaptive)) <= RANKS + 1, "workers without ranks have gone")
        assert set(_workers(adaptive)) >= {owner for (owner,) in owners.owners}
        assert job.status == "pending"
        gate.unlink()
        assert (job.result(DEADLINE) == 2).all()
        assert [change for change in owners.changes if not change.after] == []

        wait_until(lambda: len(_workers(adaptive)) == 1, "the job is done, one worker is enough")
        wait_until(lambda: owners.owners == [tuple(_workers(adaptive))] * RANKS, "it has all ranks")
        assert (adaptive.compute(y + 1).result(DEADLINE) == 3).all()
        assert owners.failures == []


def _workers(client: Client) -> list[str]:
    return list(client.scheduler_info(n_workers=-1)["workers"])
