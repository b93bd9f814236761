"""Statistics are those of an undisturbed run when an owner is killed in the midst of it."""

from __future__ import annotations

import signal

import dask.array as da
import numpy as np
import pytest

from dask_ep import Experts, collect, own_experts
from tests.cluster_processes import Cluster, wait_until
from tests.fault_scenarios import CHUNKS, CONFIG, RANKS, ROWS, SLOTS, WIDTH, WORKERS, SlowExpert

pytestmark = pytest.mark.slow

WHAT = ["usage", "coactivation", "amax", "sumsq", "mean_output", "reap", "gram"]


def collected(seconds: float) -> dict[str, da.Array]:
    tokens = da.random.default_rng(7).standard_normal(
        (CHUNKS * ROWS, WIDTH), chunks=(ROWS, WIDTH), dtype=np.float32
    )
    routing = np.random.default_rng(8).integers(RANKS, size=(CHUNKS * ROWS, SLOTS))
    experts = Experts.callables([SlowExpert(e, seconds) for e in range(RANKS)])
    routing = da.from_array(routing, chunks=(ROWS, SLOTS))
    return collect(tokens, experts, what=WHAT, routing=routing, world_size=RANKS, with_output=True)


def done(client) -> int:
    return sum(client.run(_chunks_done).values())


def _chunks_done(dask_worker) -> int:
    return dask_worker.plugins["dask-ep-services"]._slices.tally.chunks


@pytest.mark.parametrize("victims", [("w1",), ("w0", "w2")], ids=["one", "two of three"])
def test_a_killed_owner_changes_no_bit(tmp_path, victims):
    running = Cluster(tmp_path, WORKERS, config=CONFIG)
    with running, running.client() as client, own_experts(client, RANKS) as owners:
        want = client.compute(collected(0.0), sync=True)
        futures = client.compute(collected(0.02))
        wait_until(lambda: done(client) > CHUNKS + 3, "some chunks are done")
        for name in victims:
            running.signal(client, name, signal.SIGKILL)
        got = client.gather(futures)
        assert owners.failures == []
    assert got.keys() == want.keys()
    assert want["usage.rows"].sum() == CHUNKS * ROWS * SLOTS
    for name, array in want.items():
        np.testing.assert_array_equal(got[name], array, err_msg=name)
