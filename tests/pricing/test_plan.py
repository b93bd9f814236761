"""Plans count exactly what a run does, refuse what cannot fit, and propose what can."""

import json
import subprocess
import sys
from itertools import pairwise

import dask
import dask.array as da
import ml_dtypes
import numpy as np
import pytest
from dask.utils import parse_bytes
from hypothesis import given, settings
from hypothesis import strategies as st

from dask_ep.errors import DoesNotFit
from dask_ep.experts.experts import Experts
from dask_ep.experts.stored_experts import held_as_stored
from dask_ep.graph.chunk import serve_in_place
from dask_ep.graph.pipeline import count_tasks, expert_parallel
from dask_ep.graph.rows import rows_of
from dask_ep.jobs.plan import Machine, plan, what_if
from dask_ep.kernel.host_kernel import tile_bytes
from dask_ep.kernel.pack import Packing
from dask_ep.laws.costs import PROCESS_BYTES, SORT_BYTES, Need, Rates, Spread, chunks_held
from dask_ep.layers.capacity import Capacity
from dask_ep.layers.layer import MoELayer
from dask_ep.layers.routing import Router
from dask_ep.placement.placement import Placement
from dask_ep.placement.policies import POLICIES, contiguous, exact, place
from dask_ep.placement.routing_stats import survey
from dask_ep.pricing.price import Plan
from dask_ep.pricing.trace import Recorder

RATES = Rates(flops=1e10, copy=1e9)


@st.composite
def routings(draw) -> tuple[np.ndarray, int]:
    """Any routing with its number of experts: any k, dropped slots, repeated experts in a row."""
    experts, rows = draw(st.integers(1, 12)), draw(st.integers(0, 40))
    slots = draw(st.one_of(st.none(), st.integers(1, 4)))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    shape = (rows,) if slots is None else (rows, slots)
    dtype = draw(st.sampled_from([np.int8, np.int32, np.int64]))
    return rng.integers(-1, experts, shape).astype(dtype), experts


@st.composite
def chunkings(draw, rows: int) -> tuple[int, ...]:
    cuts = sorted({0, rows, *draw(st.lists(st.integers(0, rows), max_size=4))})
    return tuple(b - a for a, b in pairwise(cuts)) or (0,)


def _as_columns(routing: np.ndarray) -> np.ndarray:
    return routing[:, None] if routing.ndim == 1 else routing


def visits_in_loops(routing: np.ndarray, placement: Placement, chunks: tuple[int, ...]):
    """Rows of each packet, and pairs of each slot, row by row."""
    per_rank = placement.physical_per_rank
    packet_rows = np.zeros((len(chunks), placement.world_size), int)
    physical_rows = np.zeros(placement.physical.size, int)
    physical = placement.rewrite(_as_columns(routing))
    row = 0
    for chunk, size in enumerate(chunks):
        for _ in range(size):
            for rank in {p // per_rank for p in physical[row].tolist() if p >= 0}:
                packet_rows[chunk, rank] += 1
            for p in physical[row].tolist():
                if p >= 0:
                    physical_rows[p] += 1
            row += 1
    return packet_rows, physical_rows.reshape(placement.physical.shape)


# --- the survey --------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(data=st.data(), policy=st.sampled_from(POLICIES), ranks=st.integers(1, 5))
def test_a_survey_counts_what_loops_count(data, policy, ranks):
    routing, experts = data.draw(routings())
    stored = data.draw(chunkings(len(routing)))
    lazy = da.from_array(routing, chunks=(stored, *[-1] * (routing.ndim - 1)))
    found = survey(lazy, experts)
    expected = np.bincount(routing[routing >= 0].astype(int), minlength=experts)
    np.testing.assert_array_equal(found.expert_rows, expected)
    assert found.chunks == stored
    placement = place(policy, found.by_ticket, ranks)
    chunks = data.draw(chunkings(len(routing)))
    visits = found.visits(placement, chunks)
    packet_rows, physical_rows = visits_in_loops(routing, placement, chunks)
    np.testing.assert_array_equal(visits.packet_rows, packet_rows)
    np.testing.assert_array_equal(visits.physical_rows, physical_rows)


@settings(max_examples=50, deadline=None)
@given(data=st.data(), ranks=st.integers(1, 5), workers=st.integers(1, 5))
def test_a_row_counts_once_for_a_worker_with_several_of_its_ranks(data, ranks, workers):
    routing, experts = data.draw(routings())
    chunks, workers = data.draw(chunkings(len(routing))), min(workers, ranks)
    placement = place("contiguous", np.ones(experts), ranks)
    visits = survey(routing, experts).visits(placement, chunks, workers=workers)
    expected, row = np.zeros((len(chunks), workers), int), 0
    physical = placement.rewrite(_as_columns(routing))
    for chunk, size in enumerate(chunks):
        for of_row in physical[row : row + size].tolist():
            for w in {p // placement.physical_per_rank % workers for p in of_row if p >= 0}:
                expected[chunk, w] += 1
        row += size
    np.testing.assert_array_equal(visits.worker_rows, expected)


def test_chunks_of_unknown_size_count_their_rows_from_zero():
    rng = np.random.default_rng(0)
    routing = rng.integers(0, 3, (60, 2))
    keep = rng.random(60) < 0.5
    lazy = da.from_array(routing, chunks=(20, 2))[da.from_array(keep, chunks=20)]
    assert np.isnan(lazy.shape[0])
    placement = Placement([[0, 1], [0, 2], [0, -1]])
    found = survey(lazy, 3, known_rows=False)
    parts = [routing[s : s + 20][keep[s : s + 20]] for s in (0, 20, 40)]
    assert found.chunks == tuple(map(len, parts))
    expected = np.concatenate([visits_in_loops(p, placement, (len(p),))[0] for p in parts])
    np.testing.assert_array_equal(found.visits(placement).packet_rows, expected)


def test_an_index_out_of_range_is_named():
    routing = da.from_array(np.array([[0], [1], [7]]), chunks=(1, 1))
    with pytest.raises(ValueError, match=r"row 2 of the whole array\): .* \[-1, 4\), but"):
        survey(routing, 4)


@pytest.mark.slow
def test_the_package_offers_the_function_whatever_was_imported_before():
    code = (
        "import dask_ep.pricing.report, dask_ep; "
        "print(dask_ep.plan.__name__, callable(dask_ep.plan))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["plan", "True"]


# --- the figures -------------------------------------------------------------------------------


def job(rows=400, d=8, experts=8, k=2, exponent=1.0, chunk=50, seed=0):
    """Tokens whose data cannot be read, a skewed routing, and linear experts."""
    rng = np.random.default_rng(seed)
    share = np.arange(1, experts + 1) ** -exponent
    routing = rng.choice(experts, p=share / share.sum(), size=(rows, k))
    tokens = da.zeros((rows, d), chunks=(chunk, d), dtype="f4").map_blocks(_refuse, dtype="f4")
    return tokens, da.from_array(routing, chunks=(chunk, k)), np.ones((experts, d, d), "f4")


def _refuse(block):
    if block.size:
        raise AssertionError("a plan must not read tokens")
    return block


def test_every_figure_of_a_small_job():
    priced = plan(*job(), world_size=4, rates=RATES, machine=Machine(threads=1))
    routing = job()[1].compute()
    np.testing.assert_array_equal(priced.expert_rows, np.bincount(routing.ravel(), minlength=8))
    np.testing.assert_array_equal(priced.rank_rows, priced.expert_rows.reshape(4, 2).sum(axis=1))
    assert priced.imbalance == priced.rank_rows.max() / 200
    packet_rows, _ = visits_in_loops(routing, contiguous(8, 4), (50,) * 8)
    np.testing.assert_array_equal(priced.packet_rows, packet_rows)
    by_home = packet_rows.reshape(4, 2, 4).sum(axis=1)  # chunks 0 and 1 lie at rank 0, ...
    np.testing.assert_array_equal(priced.traffic_rows, by_home)
    row_bytes = priced.packet_row_bytes + priced.reply_row_bytes
    assert priced.exchanged_bytes == (by_home.sum() - np.trace(by_home)) * row_bytes
    assert priced.stored_bytes == 8 * 8 * 8 * 4
    most = packet_rows.max() / 50
    answers = packet_rows.sum(axis=1).max() / 50
    sent = (packet_rows.sum(axis=1) - packet_rows.min(axis=1)).max() / 50
    held = 3 * (1 + sent + answers) + (1 + 2 + 2 * most) + 3 * 3 * most
    held *= 50 * 8 * 4
    scratch = tile_bytes(8 * 4) + 50 * 2 * 48
    assert priced.memory_parts == {
        "process": PROCESS_BYTES,
        "experts": 2 * 8 * 8 * 4,
        "scratch": scratch,
        "chunks": pytest.approx(held, abs=1),
    }
    assert priced.memory_bytes == sum(priced.memory_parts.values())
    assert priced.tasks == count_tasks(8, 4) == 8 + 4 + 1
    assert priced.flops.sum() == 800 * 2 * 8 * 8
    assert json.loads(priced.to_json())["tasks"] == priced.tasks


def test_experts_held_as_stored_take_their_stored_bytes_and_one_wide_one_a_thread(float32_products):
    tokens, routing, _ = job()
    experts = Experts.linear(np.ones((8, 8, 8), ml_dtypes.bfloat16))
    wide, stored = (
        plan(tokens, routing, held, world_size=2, rates=RATES, machine=Machine(threads=3))
        for held in (experts, held_as_stored(experts))
    )
    assert wide.stored_bytes == stored.stored_bytes == 8 * 8 * 8 * 2
    assert wide.expert_bytes == 4 * 8 * 8 * 4
    assert stored.expert_bytes == 4 * 8 * 8 * 2 + 3 * 8 * 8 * 4


@pytest.mark.parametrize(
    ("threads", "ranks", "spread", "widening", "held", "remark"),
    [
        (1, 1, Spread(0, 0), 1, 5, "a chunk, its output, one before; two read ahead"),
        (2, 1, Spread(0, 0), 2, 10, "sums of bfloat16 rows are twice as wide"),
        (1, 4, Spread(0, 0), 1, 5, "one slot a row: experts write to the output"),
        (1, 4, Spread(0, 1.5), 1, 6.5, "two answers of three quarters"),
        (1, 4, Spread(1, 1.5), 1, 10.5, "one worker: as of several, but nothing travels"),
        (
            *(1, 2, Spread(2, 1.5, 0.75, 0.75, 0.75), 1),
            3 * (1 + 0.75 + 1.5) + 3 * 0.75 + 1 + 1 + 1 + 2 * 0.75,
            "under way; packets of others or answers; waiting, added up, given out, served",
        ),
        (
            *(2, 8, Spread(4, 2, 1.5, 0.5, 0.6), 2),
            4 * (1 + 1.5 + 2 * 2) + 3 * 4 * (2 * 0.6) + 2 * (1 + 2 + 1 + 2 * 0.5),
            "answers and sums are twice as wide, packets are not",
        ),
    ],
)
def test_chunks_held(threads, ranks, spread, widening, held, remark):
    assert chunks_held(threads, ranks, spread, widening) == held, remark


@settings(max_examples=50, deadline=None)
@given(data=st.data(), policy=st.sampled_from(POLICIES), ranks=st.integers(1, 5))
def test_no_routing_spreads_rows_further_than_the_worst(data, policy, ranks):
    routing, experts = data.draw(routings())
    chunks, workers = data.draw(chunkings(len(routing))), data.draw(st.integers(1, ranks))
    found = survey(routing, experts)
    placement = place(policy, found.by_ticket, ranks)
    visits = found.visits(placement, chunks, workers=workers)
    k = found.slots_per_row
    for in_place in (False, True):
        known = Spread.of(visits.packet_rows, visits.worker_rows, max(chunks), k, in_place)
        worst = Spread.at_worst(k, ranks, 0 if in_place else workers)
        assert all(one <= most for one, most in zip(known, worst, strict=True))


def test_workers_that_share_cores_take_turns():
    tokens, routing, experts = job(rows=4000, chunk=500, d=64)
    own = plan(tokens, routing, experts, world_size=4, rates=RATES, machine=Machine(threads=1))
    shared = plan(
        tokens, routing, experts, world_size=4, rates=RATES, machine=Machine(threads=1, cores=1)
    )
    assert own.busy_seconds < shared.busy_seconds
    assert shared.busy_seconds <= 4 * own.busy_seconds + shared.scheduler_seconds


def test_one_rank_exchanges_nothing():
    priced = plan(*job(), rates=RATES)
    assert (priced.exchanged_bytes, priced.tasks) == (0, 9)


def test_the_chunks_are_those_of_the_tokens():
    tokens, routing, experts = job()
    priced = plan(tokens, routing.rechunk((80, 2)), experts, world_size=2, rates=RATES)
    assert priced.chunks == (50,) * 8


# --- whole layers --------------------------------------------------------------------------------


def whole_layer(**options) -> MoELayer:
    normal = np.random.default_rng(0).standard_normal
    shared = Experts.mlp(normal((2, 8, 12), "f4"), normal((2, 12, 8), "f4"))
    return MoELayer(
        Router(6, 2), normal((6, 8, 8), "f4"), normal((6, 8), "f4"), shared=shared, **options
    )


@pytest.mark.parametrize("capacity", [None, Capacity(0.5)], ids=["all slots", "capacity"])
@pytest.mark.parametrize("replayed", [False, True], ids=["router", "replayed"])
@pytest.mark.parametrize("chunks", [(4, 8), (20, 8), (2, 5, 8)], ids=str)
def test_a_layer_is_priced_with_its_router_and_shared_experts(capacity, replayed, chunks):
    shape = (20, 8) if len(chunks) == 2 else (4, 5, 8)
    hidden = da.random.default_rng(0).standard_normal(shape, chunks=chunks, dtype="f4")
    layer = whole_layer(shared_gate=np.ones(8, "f4"), capacity=capacity)
    with dask.config.set(scheduler="sync"):
        routing = layer.route(hidden) if replayed else None
        if replayed:
            routing = tuple(da.from_array(a.compute(), chunks=a.chunks) for a in routing)
        given = routing or (None, None)
        priced = plan(hidden, given[0], layer, topk_weights=given[1], world_size=3, rates=RATES)
        indices = layer.route(hidden)[0].compute()
    load = np.bincount(indices[indices >= 0].ravel(), minlength=6)
    np.testing.assert_array_equal(priced.expert_rows, load)
    y = layer(hidden, routing=routing, world_size=3)
    ours = set(y.__dask_graph__()) - set(rows_of(hidden).__dask_graph__())
    if replayed:
        ours -= {key for a in routing for key in rows_of(a).__dask_graph__()}
    ours = [key for key in ours if "ep_unflatten" not in str(key)]
    assert priced.tasks == count_tasks(len(priced.chunks), 3)
    assert priced.tasks + priced.other_tasks == len(ours)
    assert priced.layer_flops == 20 * (2 * 2 * 2 * 8 * 12 + (0 if replayed else 2 * 8 * 6))
    resident = 4 * (2 * 2 * 8 * 12 + 6 * 8 + 8)
    assert priced.expert_bytes == 4 * 2 * 8 * 8 + resident
    assert priced.stored_bytes == 4 * 6 * 8 * 8 + 3 * resident


def test_router_and_shared_experts_take_time():
    hidden = da.ones((1000, 8), chunks=100, dtype="f4")
    slow = Rates(flops=1e6, copy=1e9)
    with dask.config.set(scheduler="sync"):
        layer = whole_layer()
        alone = plan(
            hidden, layer.route(hidden)[0], layer.experts, rates=slow, machine=Machine(threads=1)
        )
        whole = plan(hidden, None, layer, rates=slow, machine=Machine(threads=1))
    router = 1000 * (2 * 2 * 2 * 8 * 12 + 2 * 2 * 8 * 6) / 1e6  # the router's products in float64
    assert whole.seconds - alone.seconds == pytest.approx(router, rel=0.1)


# --- against runs ------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(data=st.data(), policy=st.sampled_from(POLICIES), ranks=st.integers(1, 4))
def test_rows_bytes_and_tasks_are_those_of_a_run(data, policy, ranks):
    routing, experts = data.draw(routings())
    rows, d, d_out = len(routing), 3, 5
    chunks = data.draw(chunkings(rows))
    dtype = data.draw(st.sampled_from(["f2", "f4", "f8"]))
    tokens = da.ones((rows, d), chunks=(chunks, d), dtype=dtype)
    lazy = da.from_array(routing, chunks=(chunks, *[-1] * (routing.ndim - 1)))
    topk = da.ones_like(lazy, dtype="f4") if data.draw(st.booleans()) else None
    weights = np.ones((experts, d, d_out), "f4")
    priced = plan(
        tokens,
        lazy,
        weights,
        topk_weights=topk,
        world_size=ranks,
        placement=policy,
        rates=RATES,
    )
    y = expert_parallel(
        tokens,
        lazy,
        weights,
        topk_weights=topk,
        world_size=ranks,
        placement=priced.placement,
    )
    with Recorder() as recorder:
        y.compute(scheduler="sync")
    record = recorder.record()
    assert (record.tasks, record.repeated) == (priced.tasks, 0)
    received = priced.packet_rows.sum(axis=0)
    assert {r: n for r, n in record.received_rows().items() if n} == {
        r: n for r, n in enumerate(received.tolist()) if n
    }
    assert record.exchanged_bytes == 0, "ranks are served in place"


@settings(max_examples=40, deadline=None)
@given(data=st.data(), ranks=st.integers(2, 5))
def test_bytes_are_those_of_packets_and_answers(data, ranks):
    routing, experts = data.draw(routings())
    workers, d, d_out = data.draw(st.integers(2, ranks)), 3, 5
    chunks = data.draw(chunkings(len(routing)))
    dtype = data.draw(st.sampled_from(["f2", "f4", "f8"]))
    topk = np.ones(routing.shape, "f4") if data.draw(st.booleans()) else None
    weights = np.ones((experts, d, d_out), "f4")
    tokens = da.ones((len(routing), d), chunks=(chunks, d), dtype=dtype)
    priced = plan(
        tokens,
        routing,
        weights,
        topk_weights=topk,
        world_size=ranks,
        rates=RATES,
        machine=Machine(workers=workers),
    )
    homes = [data.draw(st.integers(0, workers - 1)) for _ in chunks]
    physical, nbytes = priced.placement.rewrite(routing), 0
    num_local = priced.placement.physical_per_rank
    for c, (start, stop) in enumerate(pairwise(np.cumsum([0, *chunks]).tolist())):
        weights_here = None if topk is None else topk[start:stop]
        x = np.ones((stop - start, d), dtype)
        packing = Packing(x, physical[start:stop], weights_here, num_local, ranks)
        for worker in set(range(workers)) - {homes[c]}:
            of_worker = [rank for rank in packing.ranks if rank % workers == worker]
            if of_worker:
                packet = packing.packet(of_worker)
                nbytes += sum(a.nbytes for a in packet if a is not None)
            for rank in of_worker:
                local = list(weights[: packing.num_local])
                nbytes += serve_in_place(packing, rank, local, c, d_out).nbytes
    assert priced.exchanged_at(homes) == nbytes


@pytest.mark.parametrize("experts", [127, 128, 129])
def test_experts_are_named_in_as_many_bytes_as_they_need(experts):
    routing = np.arange(2 * experts).reshape(experts, 2) % experts
    tokens = np.ones((experts, 3), "f4")
    priced = plan(tokens, routing, np.ones((experts, 3, 3), "f4"), rates=RATES)
    packet = Packing(tokens, routing, None, experts, 1).packet([0])
    assert packet.rows.nbytes + packet.routing.nbytes == experts * priced.packet_row_bytes


def need_of_64(chunks: int) -> Need:
    """What 8 linear experts of 64 x 64 and so many chunks need on one thread, two slots a row."""
    return Need(8 * 64 * 64 * 4, chunks, 64 * 4, tile_bytes(64 * 4), 2 * SORT_BYTES)


def test_a_proposal_runs():
    tokens, routing, experts = job(rows=5000, d=64, chunk=2500)
    tokens = da.ones(tokens.shape, chunks=tokens.chunks, dtype="f4")
    limit = need_of_64(chunks=5).at(512)
    arguments = {"machine": Machine(threads=1, memory_limit=limit), "rates": RATES}
    with pytest.raises(DoesNotFit) as refused:
        plan(tokens, routing, experts, chunk_rows=2500, **arguments)
    assert refused.value.proposal == {"chunk_rows": 512}
    proposed = plan(tokens, routing, experts, **refused.value.proposal, **arguments)
    y = expert_parallel(tokens.rechunk({0: proposed.chunks}), routing, experts, world_size=1)
    assert y.chunks[0] == proposed.chunks
    np.testing.assert_array_equal(y.compute(scheduler="sync"), np.full((5000, 64), 128.0))


@pytest.mark.parametrize("policy", POLICIES)
def test_a_better_placement_takes_less_time(policy):
    tokens, routing, experts = job(rows=4000, chunk=500, exponent=1.3)
    plain = plan(tokens, routing, experts, world_size=4, rates=RATES, machine=Machine(threads=1))
    placed = plan(
        tokens,
        routing,
        experts,
        world_size=4,
        placement=policy,
        rates=RATES,
        machine=Machine(threads=1),
    )
    assert placed.imbalance <= plain.imbalance
    if policy == "exact":
        assert placed.imbalance < 1.02
        assert placed.rank_rows.sum() == plain.rank_rows.sum() == 8000


def test_what_if_marks_the_fastest_that_fits():
    tokens, routing, experts = job(rows=4000, chunk=500, d=64, exponent=1.3)
    compared = what_if(
        tokens,
        routing,
        experts,
        world_size=[2, 4],
        placement=["contiguous", "exact"],
        chunk_rows=[None, 1000],
        rates=Rates(flops=1e8, copy=1e9),
        machine=Machine(threads=1),
    )
    assert len(compared.plans) == 8
    assert compared.best in compared.plans
    assert compared.best.seconds == min(p.seconds for p in compared.plans)
    assert (compared.best.world_size, compared.best.policy) == (4, "exact")
    assert compared.why.startswith("least time of 8")
    assert "imbalance 1.0" in compared.why
    single = plan(
        tokens,
        routing,
        experts,
        world_size=4,
        placement="exact",
        rates=RATES,
        machine=Machine(threads=1),
    )
    same = next(p for p in compared.plans if p.policy == "exact" and p.world_size == 4)
    np.testing.assert_array_equal(same.packet_rows, single.packet_rows)


# --- refusing ----------------------------------------------------------------------------------


def test_chunks_that_do_not_fit_are_refused_where_they_are_asked_for_and_made_smaller_elsewhere():
    tokens, routing, experts = job(rows=100_000, d=64, chunk=50_000)
    limit = need_of_64(chunks=5).at(4096)
    arguments = {"machine": Machine(threads=1, memory_limit=limit), "rates": RATES}
    with pytest.raises(DoesNotFit, match=r"a memory limit of .* must hold .*--chunk-rows 4096"):
        plan(tokens, routing, experts, chunk_rows=50_000, **arguments)
    free = plan(tokens, routing, experts, **arguments)
    assert free.chunk_rows == 4096
    assert free.fits
    assert "their own chunks, of 50000 rows, do not fit" in free.advice[0]
    again = plan(tokens.rechunk({0: 4096}), routing, experts, **arguments)
    assert again.chunks == free.chunks
    assert not again.advice


def test_more_workers_are_proposed_when_the_experts_are_too_many():
    tokens, routing, experts = job(d=512, experts=16)
    limit = Need(4 * 512 * 512 * 4, 30, 512 * 4, tile_bytes(512 * 4), 2 * SORT_BYTES).at(64)
    arguments = {"machine": Machine(threads=1, memory_limit=limit), "world_size": 2, "rates": RATES}
    with pytest.raises(DoesNotFit, match="each worker's memory limit .* with --processes 4"):
        plan(tokens, routing, experts, **arguments)
    assert plan(tokens, routing, experts, **arguments | {"world_size": 4}).fits


def test_it_is_an_error_if_nothing_fits():
    tokens, routing, experts = job(d=512, experts=16)
    arguments = {"machine": Machine(workers=1, threads=1, memory_limit="180 MB"), "rates": RATES}
    with pytest.raises(DoesNotFit, match="must hold 17 MB of experts, .*; allow more") as refused:
        plan(tokens, routing, experts, **arguments)
    assert refused.value.proposal == {}
    with pytest.raises(DoesNotFit, match="must hold .* It does not fit with experts in passes"):
        what_if(tokens, routing, experts, **arguments)


@pytest.mark.slow
def test_experts_that_do_not_fit_are_processed_in_passes_or_stay_as_they_are_stored():
    """As in a run: 400 MB of experts within 450 MB, which are read from their files."""
    tokens, routing, _ = job(rows=20_000, d=1024, experts=100, k=1, chunk=10_000)
    wide, half = (np.broadcast_to(np.ones((), dtype), (100, 1024, 1024)) for dtype in ("f4", "f2"))

    def within(limit: str) -> dict:
        return {"machine": Machine(workers=1, threads=1, memory_limit=limit), "rates": RATES}

    priced = plan(tokens, routing, wide, **within("450 MB"))
    assert priced.passes.way in ("hold", "spill")
    assert priced.memory_bytes == priced.passes.memory_bytes <= 450e6
    assert priced.chunk_rows == priced.passes.chunk_rows
    few = plan(tokens, routing, half, **within("580 MB"))
    assert few.passes is not None, "each expert gets too few rows of a chunk to be converted for"
    tokens, routing, _ = job(rows=20_000, d=1024, experts=64, k=8, chunk=10_000)
    half = Experts.linear(half[:64])
    stored = plan(tokens, routing, half, **within("450 MB"))
    assert (type(stored), stored.decision.as_stored) == (Plan, True)
    assert "held in memory as stored" in stored.advice[0]


def test_advice_on_chunks_and_balance():
    tokens, routing, experts = job(rows=100_000, d=256, k=1, chunk=100, exponent=1.5)
    priced = plan(tokens, routing, experts, world_size=4, rates=RATES, machine=Machine(threads=1))
    assert any("instead of 100" in said for said in priced.advice)
    assert any('placement="exact"' in said for said in priced.advice)
    good = plan(
        tokens,
        routing,
        experts,
        world_size=4,
        placement="exact",
        chunk_rows=priced.advised_chunk_rows,
        rates=RATES,
        machine=Machine(threads=1),
    )
    assert good.advice == []
    one_row = plan(*job(rows=1, chunk=1), world_size=4, rates=RATES, machine=Machine(threads=1))
    assert one_row.imbalance >= 2
    assert one_row.advice == [], "no placement does better"


MESSAGES = [
    ({"placement": "best"}, "one of contiguous, .*, or the path of a file, but is 'best'"),
    ({"placement": contiguous(8, 2)}, "8 experts on 2 ranks, but .* and world_size=4"),
    ({"chunk_rows": 0}, "chunk_rows must be at least 1; got 0"),
]


@pytest.mark.parametrize(("arguments", "message"), MESSAGES)
def test_messages(arguments, message):
    with pytest.raises((ValueError, OSError), match=message):
        plan(*job(), world_size=4, rates=RATES, **arguments)


def test_arrays_that_do_not_fit_together():
    tokens, routing, experts = job()
    with pytest.raises(ValueError, match=r"tokens must be \(N, d=4\)"):
        plan(tokens, routing, np.ones((8, 4, 4), "f4"), rates=RATES)
    with pytest.raises(ValueError, match="one row per token row, but has 300 rows"):
        plan(tokens, routing[:300], experts, rates=RATES)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda x, r: (x, r + 0.5, None), "routing must hold integer expert indices.*float64"),
        (lambda x, r: (x, r > 0, None), "routing must hold integer expert indices.*bool"),
        (lambda x, r: (x, r[:, :, None], None), r"routing must be \(n,\) or \(n, k\)"),
        (lambda x, r: (x.astype(int), r, None), "tokens must hold floats"),
        (lambda x, r: (x, r, r[:10] * 0.5), "topk_weights must have the shape of routing"),
    ],
)
def test_what_cannot_run_has_no_price(changed, message):
    tokens, routing, experts = job()
    tokens, routing, weights = changed(tokens, routing)
    with pytest.raises((TypeError, ValueError), match=message):
        plan(tokens, routing, experts, topk_weights=weights, world_size=2, rates=RATES)


def test_memory_limits_are_read_as_text():
    priced = plan(*job(), rates=RATES, machine=Machine(memory_limit="4 GiB"))
    assert priced.memory_limit == parse_bytes("4 GiB")
    assert isinstance(priced, Plan)
    assert exact(priced.expert_rows, 2).imbalance(priced.expert_rows) == pytest.approx(1, abs=0.01)
