"""What travels is the cheaper of the two, counted row by row; and the result is the same."""

import itertools
import math
import pickle
from collections import defaultdict
from dataclasses import replace

import dask.array as da
import numpy as np
import pytest
from dask.base import tokenize
from hypothesis import given, settings
from hypothesis import strategies as st

from dask_ep import expert_parallel
from dask_ep.jobs.build import build, open_inputs
from dask_ep.jobs.decide import decide
from dask_ep.jobs.example import Example, write_example
from dask_ep.jobs.job import load_job
from dask_ep.jobs.plan import Machine, plan
from dask_ep.kernel import reference
from dask_ep.laws import travel
from dask_ep.laws.costs import PART_OF_A_WORKER, Rates
from dask_ep.laws.decision import Decision
from dask_ep.laws.memory_law import Layout, need
from dask_ep.laws.travel import TRAVELS, Travel, choose_travel
from dask_ep.placement.placement import Placement, verify_placement
from dask_ep.placement.placement_files import from_file, write_vllm_ascend
from dask_ep.placement.policies import POLICIES, contiguous, place
from dask_ep.placement.routing_stats import survey
from dask_ep.storage.storage import open_tokens
from tests.compare import assert_close, whole_layer
from tests.strategies import cases

LINK, READ = 2.0, 1.0


def choose(how, found, owners, **sizes):
    return choose_travel(Travel(how, LINK, READ), found, owners, **sizes)


def job(seed, *, experts=6, ranks=3, rows=60, slots=2, chunks=7):
    """Draw a routing that differs from chunk to chunk, and how it is chunked."""
    rng = np.random.default_rng(seed)
    sizes = np.diff([0, *np.sort(rng.integers(0, rows, chunks - 1)), rows])
    parts = []
    for size in sizes:
        share = rng.dirichlet(np.full(experts, 0.5)) + 1e-9
        noise = rng.gumbel(size=(size, experts))
        parts.append(np.argsort(-(np.log(share) + noise), axis=1)[:, :slots])
    routing = np.concatenate(parts)
    routing[rng.random(routing.shape) < 0.1] = -1
    return routing, tuple(sizes.tolist())


def sets_that_leave(routing, owners, chunks):
    """For each home, in loops: the experts that each row wants at each other rank."""
    wants = defaultdict(list)
    physical_of = Placement(owners.physical, owners.stops)  # by ticket alone
    by_ticket = physical_of.rewrite(routing) // owners.physical_per_rank
    row = 0
    for chunk, size in enumerate(chunks):
        home = chunk % owners.world_size
        for _ in range(size):
            there = defaultdict(set)
            for expert, rank in zip(routing[row].tolist(), by_ticket[row].tolist(), strict=True):
                if expert >= 0 and expert not in owners.physical[home]:
                    there[rank].add(expert)
            for wanted in there.values():
                wants[home].append(frozenset(wanted))
            row += 1
    return wants


def cost_of(found, placement, chunks, row_price, expert_price):
    """What a placement costs, from the rows that leave home and the experts held."""
    leaving = found.visits(placement, chunks).packet_rows.copy()
    for chunk in range(len(chunks)):
        leaving[chunk, chunk % placement.world_size] = 0
    return leaving.sum() * row_price + (placement.physical >= 0).sum() * expert_price


def least_cost(routing, owners, chunks, row_price, expert_price):
    """Try everything that each rank could read."""
    total = (owners.physical >= 0).sum() * expert_price
    for wants in sets_that_leave(routing, owners, chunks).values():
        experts = sorted(set().union(*wants))
        total += min(
            len(read) * expert_price + sum(not want <= set(read) for want in wants) * row_price
            for count in range(len(experts) + 1)
            for read in itertools.combinations(experts, count)
        )
    return total


def least_cost_by_cut(routing, owners, chunks, row_price, expert_price):
    """The same by a minimum cut (Picard 1976), for more experts than can be tried."""
    total = (owners.physical >= 0).sum() * expert_price
    for wants in sets_that_leave(routing, owners, chunks).values():
        rows = defaultdict(float)
        for want in wants:
            rows[want] += row_price
        total += maximum_flow(rows, dict.fromkeys(set().union(*wants), expert_price))
    return total


def maximum_flow(supply, capacity):
    """Send what each set has to its members, each of which takes so much; by augmenting paths."""
    sent = {want: defaultdict(float) for want in supply}
    senders = defaultdict(set)
    left, total = dict(capacity), 0.0
    for source in supply:
        while supply[source] > 1e-12:
            reached, queue = {source: None}, [source]
            for node in queue:
                near = (
                    node
                    if isinstance(node, frozenset)
                    else [want for want in senders[node] if sent[want][node] > 1e-12]
                )
                for other in near:
                    if other not in reached:
                        reached[other] = node
                        queue.append(other)
            end = next((n for n in queue if not isinstance(n, frozenset) and left[n] > 1e-12), None)
            if end is None:
                break
            path = [end]
            while reached[path[-1]] is not None:
                path.append(reached[path[-1]])
            steps = list(itertools.pairwise(reversed(path)))
            back = [sent[there][here] for here, there in steps if not isinstance(here, frozenset)]
            amount = min(supply[source], left[end], *back)
            for here, there in steps:
                if isinstance(here, frozenset):
                    sent[here][there] += amount
                    senders[there].add(here)
                else:
                    sent[there][here] -= amount
            supply[source] -= amount
            left[end] -= amount
            total += amount
    return total


# --- how good --------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [1, 2, 4])
@pytest.mark.parametrize("seed", range(20))
def test_no_more_than_a_twentieth_above_the_least_cost(seed, slots):
    routing, chunks = job(seed, slots=slots)
    found, ratios = survey(routing, 6), []
    owners = place(POLICIES[seed % 4], found.by_ticket, 3)
    for expert_bytes in (3, 8, 20):
        prices = (2 / LINK, expert_bytes / READ)
        placement = choose(
            "auto",
            found,
            owners,
            expert_bytes=expert_bytes,
            row_bytes=2,
            chunks=chunks,
        )
        least = least_cost(routing, owners, chunks, *prices)
        ratios.append(cost_of(found, placement, chunks, *prices) / least)
        assert least == pytest.approx(least_cost_by_cut(routing, owners, chunks, *prices))
    assert min(ratios) >= 1 - 1e-9
    assert max(ratios) <= (1.05 if slots > 1 else 1 + 1e-9)


@pytest.mark.parametrize("seed", range(20))
def test_nor_with_many_experts_and_slots(seed):
    experts, ranks, slots = [(32, 2, 6), (32, 4, 4), (24, 3, 4), (48, 4, 1)][seed % 4]
    routing, chunks = job(seed, experts=experts, ranks=ranks, rows=1500, slots=slots, chunks=9)
    owners, found = contiguous(experts, ranks), survey(routing, experts)
    expert_bytes = 1500 * slots / experts / ranks * (1 + seed % 3) / 2
    sizes = {
        "expert_bytes": expert_bytes,
        "row_bytes": 2,
        "chunks": chunks,
    }
    cost, rows_only, experts_only = (
        cost_of(found, choose(how, found, owners, **sizes), chunks, 1, expert_bytes)
        for how in ("auto", "rows", "experts")
    )
    assert cost <= 1.05 * least_cost_by_cut(routing, owners, chunks, 1, expert_bytes)
    assert cost <= min(rows_only, experts_only)


@pytest.mark.parametrize("seed", range(4))
def test_a_sample_of_the_rows_decides_nearly_as_well(seed, monkeypatch):
    routing, chunks = job(seed, experts=24, ranks=3, rows=6000, chunks=9)
    owners, found = contiguous(24, 3), survey(routing, 24)
    expert_bytes = 6000 * 2 / 24 / 3
    least = least_cost_by_cut(routing, owners, chunks, 1, expert_bytes)
    monkeypatch.setattr(travel, "SAMPLED_ROWS", 500)
    placement = choose("auto", found, owners, expert_bytes=expert_bytes, row_bytes=2, chunks=chunks)
    assert least <= cost_of(found, placement, chunks, 1, expert_bytes) <= 1.05 * least


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    policy=st.sampled_from(POLICIES),
    slots=st.integers(1, 4),
    ranks=st.integers(1, 4),
    room=st.integers(0, 4),
)
def test_what_fits_is_read_and_nothing_else_changes(seed, policy, slots, ranks, room):
    routing, chunks = job(seed, ranks=ranks, slots=slots)
    found = survey(routing, 6)
    owners = place(policy, found.by_ticket, ranks)
    limit = owners.physical_per_rank + room
    sizes = {"expert_bytes": 2, "row_bytes": 2, "chunks": chunks}
    placement = choose("auto", found, owners, max_physical=limit, **sizes)
    verify_placement(placement, num_experts=6, max_physical=limit)
    for owned, held in zip(owners.physical, placement.physical, strict=True):
        assert set(owned) - {-1} <= set(held)
    free = choose("auto", found, owners, **sizes)
    costs = [cost_of(found, p, chunks, 1, 2) for p in (free, placement)]
    assert costs[0] <= costs[1] + 1e-9
    if free.physical_per_rank <= limit:
        assert placement == free


def test_under_a_limit_the_experts_with_most_rows_are_read():
    found = survey(np.repeat([1, 2, 3], [3, 9, 6]), 4)
    owners = Placement([[0, 1], [2, 3]])  # all rows are at home at rank 0
    for limit, read in ((2, set()), (3, {2}), (4, {2, 3})):
        placement = choose(
            "auto",
            found,
            owners,
            expert_bytes=1,
            row_bytes=2,
            max_physical=limit,
        )
        assert set(placement.physical[0]) - {-1} == {0, 1} | read


def test_the_memory_limit_says_how_many_are_read(tmp_path):
    path = write_example(tmp_path / "example", Example(rows=400, d=16, num_experts=6, k=1))
    inputs = open_inputs(load_job(path))
    expert = 16 * 16 * 4
    layout = Layout(world_size=4, workers=2, threads=1)
    work = inputs.work()
    assert Decision(work, layout, 100).spare_experts is None
    enough = need(inputs.work(), layout).at(100)
    for more, slots in ((0, 0), (2 * expert - 1, 0), (2 * expert, 1), (7 * expert, 3)):
        limit = math.ceil((enough + more) / PART_OF_A_WORKER)
        limited = replace(layout, memory_limit=limit)  # a worker plays two ranks
        assert Decision(work, limited, 100).spare_experts == slots


@pytest.mark.slow
@pytest.mark.parametrize(("d", "k", "ranks", "policy"), [(16, 4, 2, None), (64, 3, 3, "exact")])
@pytest.mark.parametrize("spare", [None, 1, 3])
def test_a_run_reads_the_further_experts_that_its_plan_says(tmp_path, d, k, ranks, policy, spare):
    example = Example(rows=900, d=d, num_experts=20, k=k, chunk_rows=100, format="npy")
    path = write_example(tmp_path / "example", example)
    inputs = open_inputs(load_job(path, placement=policy))
    layout = Layout(ranks, ranks, 1, placement=policy)
    if spare is not None:
        expert = inputs.experts.parameters * 4
        limit = (need(inputs.work(), layout).at(100) + spare * expert) / PART_OF_A_WORKER
        layout = replace(layout, memory_limit=math.ceil(limit))
    tokens = open_tokens(inputs.tokens, chunks=100)
    routing, topk = (open_tokens(a, like=tokens) for a in (inputs.routing, inputs.topk_weights))
    even = 900 * k / 20 / ranks * 2 * d * 4  # bytes of an expert's rows at a rank
    replicas = set()
    for times in np.linspace(0.3, 1.3, 11):
        cheaper = Travel("auto", link=1e9, read=1e9 * d * d * 4 / (even * times))
        planned = plan(
            tokens, routing, inputs.experts, topk_weights=topk, world_size=ranks,
            placement=policy, rates=Rates(flops=1e11, copy=5e9),
            travel=cheaper,
            machine=Machine(workers=ranks, threads=1, memory_limit=layout.memory_limit),
        )  # fmt: skip
        built = build(inputs, decide(inputs.work(), layout, chunk_rows=100, travel=cheaper))
        np.testing.assert_array_equal(planned.placement.physical, built.placement.physical)
        replicas.add(planned.replicas)
    assert len(replicas) > 1


# --- the ends --------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_the_ends_can_be_forced(policy, monkeypatch):
    monkeypatch.setattr(travel, "SAMPLED_ROWS", 1)
    routing, chunks = job(3, slots=3)
    found = survey(routing, 6)
    owners = place(policy, found.by_ticket, 3)
    sizes = {"expert_bytes": 1e9, "row_bytes": 1, "chunks": chunks}
    assert choose("rows", found, owners, **sizes) is owners
    placement = choose("experts", found, owners, **sizes)
    leaving = found.visits(placement, chunks).packet_rows
    leaving[np.arange(len(chunks)), np.arange(len(chunks)) % 3] = 0
    assert not leaving.any()


def test_what_is_refused():
    found, owners = survey(np.arange(6), 6), contiguous(6, 3)
    sizes = {"expert_bytes": 1, "row_bytes": 1}
    with pytest.raises(ValueError, match="travel must be one of rows, auto, experts; got 'all'"):
        Travel("all")
    with pytest.raises(
        ValueError, match="a rank may have at most 2 experts, but the placement gives it 6"
    ):
        choose("experts", found, owners, max_physical=2, **sizes)
    with pytest.raises(ValueError, match="must place 6 experts, but places 4"):
        choose("auto", found, contiguous(4, 2), **sizes)


def test_rates_of_travel_are_numbers_or_text():
    assert Travel("auto", link="1 GB", read="2 MiB") == Travel("auto", link=1e9, read=2**21)
    with pytest.raises(ValueError, match=r"read: invalid size: 'fast' \(try \"8 GiB\"\)"):
        Travel("auto", read="fast")


# --- replicas at home --------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), policy=st.sampled_from(POLICIES), home=st.integers(0, 2))
def test_a_row_is_served_at_home_if_it_can_be_and_by_its_ticket_otherwise(seed, policy, home):
    routing, chunks = job(seed, slots=3)
    found = survey(routing, 6)
    owners = place(policy, found.by_ticket, 3)
    sizes = {"expert_bytes": 4, "row_bytes": 2, "chunks": chunks}
    placement = choose("auto", found, owners, **sizes)
    physical = placement.rewrite(routing, 1000, home)
    by_ticket = owners.rewrite(routing, 1000)
    for row, slot in np.ndindex(routing.shape):
        expert, rank = routing[row, slot], physical[row, slot] // placement.physical_per_rank
        assert np.append(placement.physical.ravel(), -1)[physical[row, slot]] == expert
        if expert in placement.physical[home]:
            assert rank == (home if expert >= 0 else -1)
        else:
            assert rank == by_ticket[row, slot] // owners.physical_per_rank
    halves = [
        placement.rewrite(routing[:20], 1000, home),
        placement.rewrite(routing[20:], 1020, home),
    ]
    np.testing.assert_array_equal(np.concatenate(halves), physical)


def test_the_shares_of_replicas_at_home_are_those_of_rows_that_are_spread_evenly():
    owners = Placement(
        [[0, 1, -1], [2, 3, -1], [4, 5, 0]], [[10**11, 2**40, 0]] + 2 * [[2**40] * 3]
    )
    found = survey(np.repeat(np.arange(6), [500, 9, 9, 300, 9, 9])[:, None], 6)
    sizes = {"expert_bytes": 90, "row_bytes": 2, "chunks": (4,) * 209}
    placement = choose("auto", found, owners, **sizes)
    assert placement.replica_counts.tolist() == [3, 1, 1, 3, 1, 1]
    expert_rows = found.expert_rows
    assert placement.rank_load(expert_rows).sum() == pytest.approx(expert_rows.sum())
    served = found.visits(placement, (4,) * 209).physical_rows.sum(axis=1)
    np.testing.assert_allclose(placement.rank_load(expert_rows), served, atol=10)


def test_a_local_placement_outlives_json_and_is_not_the_same_as_another(tmp_path):
    local = Placement([[0, 1], [1, -1]], local=True)
    again = Placement.from_json(local.to_json())
    assert again == local
    assert hash(again) == hash(local)
    assert pickle.loads(pickle.dumps(local)) == local
    other = Placement([[0, 1], [1, -1]])
    assert other != local
    assert tokenize(other) != tokenize(local) == tokenize(again)
    assert (local.home(5), other.home(5)) == (1, None)
    (tmp_path / "p.json").write_text(local.to_json())
    assert from_file(tmp_path / "p.json") == local
    with pytest.raises(ValueError, match=r"pass home=placement\.home\(c\)"):
        local.rewrite(np.array([0]))
    with pytest.raises(ValueError, match="layer 0 chooses them by the home of a token chunk"):
        write_vllm_ascend(tmp_path / "p.json", [Placement([[0, 1], [1, 0]], local=True)])


# --- the same result -------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    case=cases(dtypes=[np.float64], even=False),
    policy=st.sampled_from(POLICIES),
    how=st.sampled_from(TRAVELS),
    ranks=st.integers(1, 4),
    expert_bytes=st.sampled_from([0.5, 2, 10]),
)
def test_whatever_the_layer_what_travels_changes_nothing(case, policy, how, ranks, expert_bytes):
    tokens, routing, topk_weights = case.dask()
    found = survey(routing, case.num_experts)
    owners = place(policy, found.by_ticket, ranks)
    placement = choose(how, found, owners, expert_bytes=expert_bytes, row_bytes=2)
    verify_placement(placement, num_experts=case.num_experts)
    y = expert_parallel(tokens, routing, case.W, topk_weights=topk_weights, placement=placement)
    assert_close(y.compute(scheduler="sync"), whole_layer(case), case.tolerance)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("slots", [1, 3])
def test_the_result_is_that_of_plain_loops_whatever_travels(slots, known):
    routing, chunks = job(4, rows=90, slots=slots)
    rng = np.random.default_rng(0)
    tokens, W = rng.standard_normal((90, 5)), rng.standard_normal((6, 5, 4))
    weights = rng.random(routing.shape)
    rows = [reference.linear(w) for w in W]
    expected = reference.moe(tokens, routing, rows, weights, d_out=4)
    arrays = [da.from_array(a, chunks=(chunks, -1)) for a in (tokens, routing, weights)]
    if not known:
        for array in arrays:
            array._chunks = ((np.nan,) * len(chunks), array.chunks[1])
    found = survey(arrays[1], 6, known_rows=known)
    for how in TRAVELS:
        placement = choose(how, found, contiguous(6, 3), expert_bytes=5, row_bytes=2)
        y = expert_parallel(*arrays[:2], W, topk_weights=arrays[2], placement=placement)
        np.testing.assert_allclose(y.compute(scheduler="sync"), expected, atol=1e-12)
    assert how == "experts"
    assert placement.physical_per_rank > 2
