"""Chunks with a home on a cluster of real processes: where they lie, what travels, what is read."""

import dask.array as da
import numpy as np
import pytest
from distributed import futures_of

from dask_ep import Experts, expert_parallel, own_experts, plan
from dask_ep.arrays.blas import one_blas_thread
from dask_ep.kernel import reference
from dask_ep.laws.costs import Rates
from dask_ep.laws.travel import TRAVELS, Travel, choose_travel
from dask_ep.placement.placement import Placement
from dask_ep.placement.policies import contiguous
from dask_ep.placement.routing_stats import survey
from dask_ep.storage.sources import open_source
from tests.cluster_processes import DEADLINE, Cluster, addresses, wait_until
from tests.observed import (
    NotedSource,
    Recorder,
    bytes_read,
    computed,
    received,
    record_services,
    servings,
)

pytestmark = pytest.mark.slow

CHUNKS, ROWS, WIDTH, RANKS, EXPERTS = 15, 512, 64, 3, 6
ROW_BYTES, EXPERT_BYTES = 2 * WIDTH * 4, WIDTH * WIDTH * 4
LOG = {"distributed.admin.low-level-log-length": 100_000}  # or transfers would be forgotten


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    directory = tmp_path_factory.mktemp("cluster")
    threads = {"OMP_NUM_THREADS": "1"}
    with Cluster(directory, ["w0", "w1", "w2"], config=LOG, environment=threads) as running:
        yield running


@pytest.fixture(scope="module")
def client(cluster):
    with cluster.client() as connected:
        yield connected


@pytest.fixture
def recorder(client):
    client.register_plugin(Recorder())
    record_services(client)
    yield
    client.unregister_scheduler_plugin(Recorder.name)


def on_threads(y):
    """Compute here, with products on one thread as on the workers: two can round differently."""
    with one_blas_thread():
        return y.compute(scheduler="threads")


class Layer:
    """Linear experts in a file whose readers are noted; expert 0 is hot, expert 5 cold."""

    def __init__(self, directory, slots=1):
        rng = np.random.default_rng(slots)
        share = np.array([64, 8, 8, 8, 8, 1.0])
        noise = rng.gumbel(size=(CHUNKS * ROWS, EXPERTS))
        self.routing = np.argsort(-(np.log(share) + noise), axis=1)[:, :slots]
        self.W = rng.standard_normal((EXPERTS, WIDTH, WIDTH)).astype("f4")
        np.save(directory / "w.npy", self.W)
        self.log = directory / "read"
        source = NotedSource(open_source(directory / "w.npy"), str(self.log))
        self.experts = Experts.linear(source)
        self.tokens = da.map_blocks(  # as files are: each chunk reads its own rows
            _tokens_of_chunk, chunks=((ROWS,) * CHUNKS, (WIDTH,)), meta=np.empty((0, 0), "f4")
        )
        self.lazy_routing = da.from_array(self.routing, chunks=(ROWS, slots))

    def placement(self, how, expert_bytes=EXPERT_BYTES):
        found = survey(self.routing, EXPERTS)
        sizes = {"expert_bytes": expert_bytes, "row_bytes": ROW_BYTES}
        sizes |= {"chunks": (ROWS,) * CHUNKS}
        travel = Travel(how, link=1, read=1)
        return choose_travel(travel, found, contiguous(EXPERTS, RANKS), **sizes)

    def build(self, placement, experts=None):
        experts = self.experts if experts is None else experts
        return expert_parallel(self.tokens, self.lazy_routing, experts, placement=placement)

    def alone(self, placement):
        """Compute without the cluster."""
        return on_threads(self.build(placement, self.W))

    def reference(self):
        tokens = self.tokens.compute(scheduler="sync")
        rows = [reference.linear(w) for w in self.W]
        return reference.moe(tokens, self.routing, rows, d_out=WIDTH)

    def leaving(self, placement):
        """Rows that leave their home, each once for a rank, in loops over chunks and ranks."""
        rows = 0
        for chunk in range(CHUNKS):
            of_chunk = self.routing[chunk * ROWS : (chunk + 1) * ROWS]
            physical = placement.rewrite(of_chunk, chunk * ROWS, placement.home(chunk))
            for rank in set(range(RANKS)) - {placement.home(chunk)}:
                rows += np.any(physical // placement.physical_per_rank == rank, axis=1).sum()
        return int(rows)


def _tokens_of_chunk(block_id=(0, 0)):
    return np.random.default_rng(block_id[0]).standard_normal((ROWS, WIDTH), np.float32)


# --- what travels ----------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [1, 2])
def test_a_hot_expert_is_read_where_its_rows_lie_and_the_rows_of_a_cold_one_travel(
    client, recorder, tmp_path, slots
):
    layer = Layer(tmp_path, slots)
    placement = layer.placement("auto", expert_bytes=ROW_BYTES * CHUNKS * ROWS * slots // 20)
    assert all(0 in held and 5 not in held for held in placement.physical[:-1].tolist())
    assert placement.replica_counts.tolist() == [3, 1, 1, 1, 1, 1]
    with own_experts(client, RANKS) as owners:
        before = received(client)
        got = client.persist(layer.build(placement))
        futures = futures_of(got)
        wait_until(lambda: all(future.done() for future in futures), "all is computed")
        results = sum(nbytes for *_, nbytes in received(client) - before)
        (owner_of,) = zip(*owners.owners, strict=True)
        chunks = [(key[1], worker) for key, worker in computed(client) if "ep_chunk" in str(key[0])]
        assert sorted(chunks) == [(c, owner_of[c % RANKS]) for c in range(CHUNKS)]
        served = servings(client)
    travelled = sum(s.bytes_in + s.bytes_out for s in served)
    assert all(s.served_by == owner_of[s.rank] for s in served)
    # Rows: there and back what leaves its home, and nothing else.
    assert results < CHUNKS * ROWS * 16, "small integers of the routing alone"
    leaving = layer.leaving(placement)
    alone = layer.leaving(Placement(contiguous(EXPERTS, RANKS).physical, local=True))
    assert 0 < leaving < (0.5 if slots == 1 else 0.7) * alone
    assert 0.99 * leaving * ROW_BYTES <= travelled <= 1.05 * leaving * ROW_BYTES
    # Experts: each owner reads its own, and expert 0 is read by all.
    held = (placement.physical >= 0).sum(axis=1)
    assert bytes_read(layer.log) == {
        owner: held[rank] * EXPERT_BYTES for rank, owner in enumerate(owner_of)
    }
    # The plan knew.
    rates = Rates(flops=1, copy=1)
    priced = plan(layer.tokens, layer.lazy_routing, layer.W, placement=placement, rates=rates)
    assert travelled == pytest.approx(priced.exchanged_bytes, rel=0.02)
    assert priced.stored_bytes == sum(bytes_read(layer.log).values())
    np.testing.assert_allclose(
        client.compute(got).result(DEADLINE), layer.reference(), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("how", TRAVELS)
def test_each_end_moves_one_thing_only(client, tmp_path, how):
    layer = Layer(tmp_path)
    placement = layer.placement(how)
    with own_experts(client, RANKS):
        record_services(client)
        got = client.compute(layer.build(placement)).result(DEADLINE)
    np.testing.assert_allclose(got, layer.reference(), rtol=0, atol=1e-4)
    rows = sum(s.bytes_in + s.bytes_out for s in servings(client))
    read = sum(bytes_read(layer.log).values())
    if how == "rows":
        assert read == EXPERTS * EXPERT_BYTES
        assert rows >= CHUNKS * ROWS * ROW_BYTES / 2
    if how == "experts":
        assert read == RANKS * EXPERTS * EXPERT_BYTES
        assert rows == 0


# --- homes -----------------------------------------------------------------------------------


def test_layers_upon_layers_and_what_joins_all_chunks_in_one_graph(client, tmp_path):
    layer = Layer(tmp_path)
    placement = layer.placement("experts")
    first = layer.build(placement, layer.W)
    second = expert_parallel(first, layer.lazy_routing, layer.W, placement=placement)
    centred = second - second.mean(axis=0)  # every row waits for all of the layers below
    third = expert_parallel(centred, layer.lazy_routing, layer.W, placement=placement)
    with own_experts(client, RANKS):
        got = client.compute(third).result(DEADLINE)
    np.testing.assert_array_equal(got, on_threads(third))


def test_closing_in_the_midst_frees_what_waits(client, tmp_path):
    layer = Layer(tmp_path)
    placement = layer.placement("auto")
    y = layer.build(placement)
    owners = own_experts(client, RANKS)
    future = client.compute(y)
    owners.close()
    np.testing.assert_array_equal(future.result(DEADLINE), layer.alone(placement))


def test_a_lost_owner_in_the_midst_changes_nothing(cluster, client, tmp_path):
    layer = Layer(tmp_path)
    placement = layer.placement("auto")
    y = layer.build(placement)
    cluster.start_worker("w3")
    wait_until(lambda: "w3" in addresses(client), "the fourth worker has come")
    with own_experts(client, RANKS) as owners:
        owners.move(0, "w3")
        future = client.compute(y)
        wait_until(lambda: layer.log.exists(), "experts are read")
        cluster.stop_worker("w3")
        got = future.result(DEADLINE)
        assert owners.failures == []
    np.testing.assert_array_equal(got, layer.alone(placement))
