"""A chunk in flight gives its thread back to Dask, unless it is probably short."""

from concurrent.futures import Future

import dask.array as da
import numpy as np
import pytest
from distributed import Client, WorkerPlugin

from dask_ep import expert_parallel, own_experts
from dask_ep.cluster import exchange
from dask_ep.laws.costs import CHUNKS_WAITING

CHUNKS = 24


class Seceded(WorkerPlugin):
    """Counts tasks of chunks that gave their threads back."""

    name = "seceded"

    def setup(self, worker):
        self.count = 0

    def transition(self, key, start, finish, **kwargs):
        self.count += finish == "long-running" and "ep_chunk" in str(key)


@pytest.mark.parametrize("are_short", [True, False])
def test_short_chunks_keep_their_threads(monkeypatch, are_short):
    monkeypatch.setattr(exchange, "SHORT_SECONDS", 600.0 if are_short else 0.0)
    monkeypatch.setattr(exchange, "PATIENCE_SECONDS", 600.0)
    rng = np.random.default_rng(0)
    x, W = rng.standard_normal((120, 4)), rng.standard_normal((4, 4, 4))
    routing = rng.integers(0, 4, 120)
    y = expert_parallel(
        da.from_array(x, chunks=(5, 4)), da.from_array(routing, chunks=5), W, world_size=4
    )
    with (
        Client(
            n_workers=2, threads_per_worker=1, processes=False, dashboard_address="127.0.0.1:0"
        ) as client,
        own_experts(client, 4),
    ):
        client.register_plugin(Seceded())
        np.testing.assert_allclose(y.compute(), np.einsum("nd,ndf->nf", x, W[routing]))
        counts = client.run(lambda dask_worker: dask_worker.plugins["seceded"].count)
    if are_short:  # but of the first ones it is not known
        assert all(count <= 1 + CHUNKS_WAITING for count in counts.values())
    else:
        assert sum(counts.values()) == CHUNKS


def test_who_waits_gives_the_thread_back_first(monkeypatch):
    """What it waits for may need the thread."""
    asked = Future()
    monkeypatch.setattr(exchange, "PATIENCE_SECONDS", 0.01)
    monkeypatch.setattr(exchange.dask_internals, "leave_pool", lambda: asked.set_result("came"))
    assert exchange._wait(asked) == "came"
