"""Placements keep their invariants, give the published answers, and are as good as they claim."""

import importlib
import itertools
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from dask_ep.kernel.dispatch import expert_parallel_dispatch
from dask_ep.placement import rebalance
from dask_ep.placement.placement import Placement, verify_placement
from dask_ep.placement.placement_files import (
    from_file,
    read_sglang,
    read_vllm_ascend,
    write_sglang,
    write_vllm_ascend,
)
from dask_ep.placement.policies import (
    POLICIES,
    balance_layers,
    balanced,
    contiguous,
    exact,
    packed,
    place,
)
from dask_ep.placement.rebalance import incremental, moves
from dask_ep.placement.replica_choice import STRIDE, TICKETS, ticket_load
from tests.plain_placement import published_balance, zipf_load

# The example that EPLB prints: 2 layers of 12 experts, 16 replicas, 4 groups, 2 nodes, 8 ranks.
EPLB_LOADS = np.array(
    [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ]
)
EPLB_PHYSICAL = np.array(
    [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]
)

loads = st.lists(st.integers(0, 1000), min_size=1, max_size=24).map(np.array)
world_sizes = st.integers(1, 9)


@st.composite
def placements(draw) -> Placement:
    """Any legal placement: every expert somewhere, further replicas and empty places anywhere."""
    experts, ranks = draw(st.integers(1, 12)), draw(world_sizes)
    first = draw(st.lists(st.integers(0, ranks - 1), min_size=experts, max_size=experts))
    holds = [{e for e in range(experts) if first[e] == r} for r in range(ranks)]
    for rank, expert in draw(
        st.lists(st.tuples(st.integers(0, ranks - 1), st.integers(0, experts - 1)), max_size=20)
    ):
        holds[rank].add(expert)
    width = max(map(len, holds)) + draw(st.integers(0, 2))
    rows = [draw(st.permutations([*sorted(h), *[-1] * (width - len(h))])) for h in holds]
    return Placement(rows)


# --- the published algorithm ------------------------------------------------------------------


def test_the_printed_example_gets_its_printed_answer():
    physical = balance_layers(EPLB_LOADS, 8, num_physical=16, num_groups=4, num_nodes=2)
    np.testing.assert_array_equal(physical.reshape(2, 16), EPLB_PHYSICAL)
    by_layer = [
        published_balance(load.tolist(), 16, groups=4, nodes=2, ranks=8) for load in EPLB_LOADS
    ]
    np.testing.assert_array_equal(np.reshape(by_layer, (2, 16)), EPLB_PHYSICAL)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_balanced_is_the_published_answer_wherever_that_has_no_two_replicas_on_a_rank(data):
    nodes = data.draw(st.sampled_from([1, 2, 3]))
    ranks = nodes * data.draw(st.integers(1, 3))
    groups = data.draw(st.integers(1, 4)) * data.draw(st.sampled_from([1, nodes]))
    experts = groups * data.draw(st.integers(1, 4))
    per_rank = data.draw(st.integers(-(-experts // ranks), -(-experts // ranks) + 2))
    num_physical = ranks * per_rank
    if num_physical > experts * ranks // (nodes if groups % nodes == 0 else 1):
        return
    layers = data.draw(st.integers(1, 3))
    load = np.array(
        data.draw(
            st.lists(
                st.lists(st.integers(0, 50), min_size=experts, max_size=experts),
                min_size=layers,
                max_size=layers,
            )
        )
    )
    physical = balance_layers(
        load, ranks, num_physical=num_physical, num_groups=groups, num_nodes=nodes
    )
    for layer, table in enumerate(physical):
        verify_placement(Placement(table), num_experts=experts, max_physical=per_rank)
        published = published_balance(load[layer].tolist(), num_physical, groups, nodes, ranks)
        if all(len(set(rank)) == len(rank) for rank in published):
            np.testing.assert_array_equal(table, published)


def test_two_replicas_of_an_expert_never_share_a_rank_where_the_published_ones_do():
    differing = 0
    for seed in range(30):
        load = zipf_load(8, 1.2, seed=seed)
        published = published_balance(load.tolist(), 12, 1, 1, 4)
        differing += any(len(set(rank)) < len(rank) for rank in published)
        placement = balanced(load, 4, num_physical=12)
        verify_placement(placement, num_experts=8, max_physical=3)
        assert placement.replica_counts.sum() == 12
    assert differing > 0, "the case that this test is about did not come up"


def lines_run(work):
    """How many lines of Python a call runs, in all that it calls."""
    count = 0

    def trace(frame, event, argument):
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


def test_many_layers_take_as_many_steps_as_one():
    load = np.stack([zipf_load(256, 1.0, seed=seed) for seed in range(58)])
    one, many = (
        lines_run(lambda some=some: balance_layers(some, 32, num_physical=288))
        for some in (load[:1], load)
    )
    assert one > 288  # a few for each replica
    assert many < 1.1 * one
    assert 58 * lines_run(lambda: published_balance(load[0].tolist(), 288, 1, 1, 32)) > 100 * many


# --- how good -------------------------------------------------------------------------------


@cache
def equal_parts(items: int, size: int) -> np.ndarray:
    """(P, items / size, size): every way to divide items into parts of this size, each once."""

    def divide(left: tuple[int, ...]):
        if not left:
            yield []
            return
        for others in itertools.combinations(left[1:], size - 1):  # the first item's part
            part = (left[0], *others)
            for parts in divide(tuple(item for item in left[1:] if item not in others)):
                yield [part, *parts]

    return np.array(list(divide(tuple(range(items)))))


def test_equal_parts_are_as_many_as_combinatorics_says():
    for items, size in [(8, 2), (9, 3), (12, 3), (8, 8), (4, 1)]:
        parts = items // size
        count = math.factorial(items) // (math.factorial(size) ** parts * math.factorial(parts))
        divided = equal_parts(items, size)
        assert divided.shape == (count, parts, size)
        assert len(np.unique(divided.reshape(count, -1), axis=0)) == count


def best_max_load(load, replica_of, ranks: int, capacity: int) -> float:
    """Try all assignments of replicas to ranks for the smallest largest rank load."""
    empty = ranks * capacity - len(replica_of)
    load = np.append(load, np.zeros(empty))
    replica_of = np.append(replica_of, -1 - np.arange(empty))  # empty places may lie together
    assign = equal_parts(ranks * capacity, capacity)
    held = np.sort(replica_of[assign], axis=2)
    legal = (held[..., 1:] != held[..., :-1]).all(axis=(1, 2))
    return load[assign[legal]].sum(axis=2).max(axis=1).min()


@settings(max_examples=60, deadline=None)
@given(
    load=st.lists(st.integers(0, 60), min_size=2, max_size=8),
    ranks=st.integers(2, 4),
    spare=st.integers(0, 4),
)
@example(load=[60, 33, 21, 15, 12, 10, 8, 7], ranks=4, spare=4)
@example(load=[20, 1, 0, 20, 30], ranks=4, spare=4)  # the worst of 17 000: 1.5
def test_balanced_is_within_a_half_of_brute_force(load, ranks, spare):
    load = np.array(load)
    num_physical = min(load.size + spare, load.size * ranks)
    placement = balanced(load, ranks, num_physical=num_physical)
    replica_of = np.repeat(np.arange(load.size), placement.replica_counts)
    best = best_max_load(
        (load / placement.replica_counts)[replica_of],
        replica_of,
        ranks,
        placement.physical_per_rank,
    )
    assert best - 1e-9 <= placement.rank_load(load).max() <= 3 / 2 * best + 1e-6


@pytest.mark.parametrize("exponent", [0.3, 1.0, 1.5])
@pytest.mark.parametrize("spare", [0, 4])
def test_balanced_is_as_good_as_brute_force_where_popularity_falls_as_in_life(exponent, spare):
    for seed in range(10):
        load = zipf_load(8, exponent, seed=seed)
        placement = balanced(load, 4, num_physical=8 + spare)
        replica_of = np.repeat(np.arange(8), placement.replica_counts)
        replica_load = (load / placement.replica_counts)[replica_of]
        best = best_max_load(replica_load, replica_of, 4, placement.physical_per_rank)
        assert placement.rank_load(load).max() == pytest.approx(best)


@settings(max_examples=40, deadline=None)
@given(load=st.lists(st.integers(0, 60), min_size=2, max_size=8), ranks=st.integers(2, 4))
@example(load=[60, 33, 21, 15, 12, 10, 8, 7], ranks=4)
def test_exact_is_never_worse_than_brute_force_without_replicas(load, ranks):
    load = np.array(load)
    whole = best_max_load(load, np.arange(load.size), ranks, -(-load.size // ranks))
    assert exact(load, ranks).rank_load(load).max() <= whole + 1


@settings(max_examples=50, deadline=None)
@given(
    load=st.lists(st.integers(0, 60), min_size=1, max_size=5),
    spare=st.integers(0, 3),
)
def test_no_other_choice_of_replicas_has_a_smaller_hottest_replica(load, spare):
    ranks = 4
    num_physical = min(len(load) + spare, len(load) * ranks)
    replicas = balanced(load, ranks, num_physical=num_physical).replica_counts
    choices = (
        c
        for c in itertools.product(range(1, ranks + 1), repeat=len(load))
        if sum(c) == num_physical
    )
    best = min(max(np.divide(load, c)) for c in choices)
    assert max(load / replicas) == pytest.approx(best)


@settings(max_examples=300, deadline=None)
@given(load=loads, ranks=world_sizes)
def test_exact_gives_every_rank_the_same_rows_with_one_expert_to_spare(load, ranks):
    placement = exact(load, ranks)
    verify_placement(placement, load.size, max_physical=-(-(load.size - 1) // ranks) + 1)
    assert placement.replica_counts.sum() <= load.size + ranks - 1
    served = placement.rank_load(load)
    assert served.max() <= math.ceil(load.sum() / ranks) + 1e-3
    assert served.min() >= load.sum() // ranks - 1e-3


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), ranks=st.integers(1, 6), experts=st.integers(1, 10))
def test_exact_by_ticket_is_exact_for_the_very_rows(seed, ranks, experts):
    rng = np.random.default_rng(seed)
    share = rng.dirichlet(np.full(experts, 0.3))
    routing = rng.choice(experts, p=share, size=(600, 2))
    routing[rng.random(routing.shape) < 0.1] = -1
    placement = exact(ticket_load(routing, experts, bins=4096), ranks)
    physical = placement.rewrite(routing)
    rows = np.bincount(
        physical[physical >= 0] // placement.physical_per_rank, minlength=placement.world_size
    )
    assert rows.sum() == (routing >= 0).sum()
    # A cut falls inside one range of tickets, which holds at most a few rows of one expert.
    assert rows.max() - rows.min() <= 1 + 2 * ranks


@pytest.mark.parametrize("exponent", [0.3, 1.0, 1.5])
@pytest.mark.parametrize(
    ("experts", "ranks", "spare"), [(64, 8, 8), (128, 8, 16), (256, 32, 32), (256, 64, 64)]
)
def test_each_policy_balances_better_than_the_one_before(experts, ranks, spare, exponent):
    load = zipf_load(experts, exponent)
    imbalance = [
        contiguous(experts, ranks).imbalance(load),
        packed(load, ranks).imbalance(load),
        balanced(load, ranks, num_physical=experts + spare).imbalance(load),
        exact(load, ranks).imbalance(load),
    ]
    assert imbalance == sorted(imbalance, reverse=True)
    assert imbalance[-1] == pytest.approx(1.0, abs=1e-3)
    assert exact(load, ranks).physical_per_rank <= (experts + spare) // ranks


# --- the invariants, for every policy -----------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(load=loads, ranks=world_sizes, policy=st.sampled_from(POLICIES))
def test_every_policy_keeps_the_invariants(load, ranks, policy):
    placement = place(policy, load, ranks)
    verify_placement(placement, num_experts=load.size)
    assert placement.world_size == ranks
    assert placement.rank_load(load).sum() == pytest.approx(load.sum())
    assert len(placement.order()) == ranks * placement.physical_per_rank
    if policy in ("contiguous", "packed"):
        assert (placement.replica_counts == 1).all()


CASES = [
    # experts, ranks, physical, remark
    (6, 3, [[0, 1], [2, 3], [4, 5]], "even"),
    (5, 3, [[0, 1], [2, 3], [4, -1]], "uneven: the last slot is empty"),
    (2, 4, [[0], [1], [-1], [-1]], "more ranks than experts: ranks without any"),
    (3, 1, [[0, 1, 2]], "one rank holds everything"),
]


@pytest.mark.parametrize(
    ("experts", "ranks", "physical", "remark"), CASES, ids=lambda v: str(v)[:30]
)
def test_contiguous(experts, ranks, physical, remark):
    placement = contiguous(experts, ranks)
    assert placement.physical.tolist() == physical, remark
    verify_placement(placement, experts)


# --- rewriting --------------------------------------------------------------------------------


def rewrite_in_loops(placement: Placement, routing: np.ndarray, offset: int) -> np.ndarray:
    physical = np.full(routing.shape, -1)
    for row, slot in np.ndindex(*routing.shape):
        ticket = (offset + row) * STRIDE % TICKETS
        for place_, expert in enumerate(placement.physical.ravel()):
            stop = placement.stops.ravel()[place_]
            if expert == routing[row, slot] >= 0 and ticket < stop:
                physical[row, slot] = place_
                break
    return physical


@settings(max_examples=100, deadline=None)
@given(
    placement=placements(),
    seed=st.integers(0, 10**6),
    dtype=st.sampled_from([np.int8, np.int16, np.int32, np.int64]),
    offset=st.sampled_from([0, 1, 12345, 2**40 + 3, 10**15]),
    cut=st.integers(0, 30),
)
def test_rewrite_is_the_plain_loop_whatever_the_chunks(placement, seed, dtype, offset, cut):
    routing = np.random.default_rng(seed).integers(-1, placement.num_experts, (30, 3)).astype(dtype)
    physical = placement.rewrite(routing, offset)
    np.testing.assert_array_equal(physical, rewrite_in_loops(placement, routing, offset))
    parts = [
        placement.rewrite(routing[:cut], offset),
        placement.rewrite(routing[cut:], offset + cut),
    ]
    np.testing.assert_array_equal(np.concatenate(parts), physical)
    np.testing.assert_array_equal(placement.rewrite(routing[:, 0], offset), physical[:, 0])
    back = np.append(placement.physical.ravel(), -1)[physical]
    np.testing.assert_array_equal(back, routing)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.uint64])
def test_unsigned_routing_is_rewritten_too(dtype):
    placement = balanced(np.arange(200), 8)
    routing = np.arange(200, dtype=dtype).reshape(100, 2)
    expected = placement.rewrite(routing.astype(np.int64))
    np.testing.assert_array_equal(placement.rewrite(routing), expected)
    assert placement.rewrite(routing).dtype == np.int32


@pytest.mark.slow
@pytest.mark.parametrize("stride", [1, 2, 3, 64, 89, 377, 1000, 4096])
@pytest.mark.parametrize("replicas", [2, 3, 8])
def test_replicas_share_rows_evenly_also_when_an_expert_takes_every_nth_row(stride, replicas):
    placement = Placement([[0]] * replicas)
    rows = np.zeros((min(4096 * stride, 1 << 22), 1), np.int8)
    rows[np.arange(rows.shape[0]) % stride > 0] = -1
    physical = placement.rewrite(rows, row_offset=777)
    served = np.bincount(physical[physical >= 0], minlength=replicas)
    assert served.sum() >= 1000
    # Worst where the stride is a Fibonacci number (89, 377), and 1.01 elsewhere.
    assert served.max() / served.mean() < 1.05


@settings(max_examples=60, deadline=None)
@given(
    load=st.lists(st.integers(1, 60), min_size=2, max_size=8),
    ranks=st.integers(1, 4),
    policy=st.sampled_from(POLICIES),
    seed=st.integers(0, 10**6),
)
def test_a_placed_layer_gives_the_unplaced_answer(load, ranks, policy, seed):
    experts = len(load)
    rng = np.random.default_rng(seed)
    tokens = rng.normal(size=(40, 5)).astype(np.float32)
    matrices = rng.normal(size=(experts, 5, 4)).astype(np.float32)
    placement = place(policy, np.array(load), ranks)

    def placed(routing):
        physical = placement.rewrite(routing, row_offset=1000)
        total = np.zeros((40, 4), np.float32)
        for rank, held in enumerate(placement.physical):
            own = [matrices[e] if e >= 0 else np.zeros((5, 4), np.float32) for e in held]
            total += expert_parallel_dispatch(tokens, physical, own, rank, ranks)
        return total

    routing = rng.integers(-1, experts, (40, 3))
    unplaced = expert_parallel_dispatch(tokens, routing, matrices, 0, 1)
    np.testing.assert_allclose(placed(routing), unplaced, atol=1e-5)


# --- incremental ------------------------------------------------------------------------------


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@example(before=[28, 8, 8], ranks=3, tolerance=0.0, seed=0)  # less overload, larger largest load
@given(
    before=st.lists(st.integers(1, 100), min_size=2, max_size=12),
    ranks=st.integers(2, 4),
    tolerance=st.sampled_from([0.0, 0.05, 0.3]),
    seed=st.integers(0, 10**6),
)
def test_incremental_is_legal_and_never_worse_than_both(before, ranks, tolerance, seed):
    previous = balanced(before, ranks)
    load = np.random.default_rng(seed).permutation(before)
    after = incremental(previous, load, tolerance=tolerance)
    assert incremental(replace(previous, local=True), load, tolerance=tolerance).local
    verify_placement(after, len(before), max_physical=previous.physical_per_rank)
    fresh = balanced(load, ranks, num_physical=int(previous.replica_counts.sum()))
    bound = max(1 + tolerance, min(previous.imbalance(load), fresh.imbalance(load)))
    assert after.imbalance(load) <= bound + 1e-9
    if previous.imbalance(load) <= 1 + tolerance:
        assert after == previous
        assert moves(previous, after) == 0


@settings(max_examples=100, deadline=None)
@given(placement=placements(), seed=st.integers(0, 10**6))
def test_a_change_takes_away_the_overload_that_it_was_chosen_for(placement, seed):
    load = np.random.default_rng(seed).integers(1, 100, placement.num_experts).astype(float)
    limit = 1.02 * load.sum() / placement.world_size
    physical = placement.physical.astype(np.int64)
    state = rebalance._State.of(physical, load, limit)
    for choose in (rebalance._best_exchange, rebalance._best_replica, rebalance._best_drop):
        gain, change = choose(state)
        if gain <= 0:
            continue
        changed = physical.copy()
        for at, expert in change.items():
            changed[at] = expert
        verify_placement(Placement(changed), placement.num_experts)
        loads = max(moves(placement, Placement(changed)), 1)
        taken = state.overload - rebalance._State.of(changed, load, limit).overload
        assert gain * loads == pytest.approx(taken)


def test_a_small_change_of_load_moves_few_experts():
    load = zipf_load(128, 1.0)
    previous = balanced(load, 8)
    drifted = load * np.random.default_rng(1).uniform(0.8, 1.25, load.size)
    after = incremental(previous, drifted, tolerance=0.02)
    assert previous.imbalance(drifted) > 1.02 >= after.imbalance(drifted)
    fresh = balanced(drifted, 8)
    assert moves(previous, after) * 5 <= moves(previous, fresh)


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(load=st.lists(st.integers(1, 30), min_size=6, max_size=6))
def test_moves_are_at_most_one_more_than_brute_force_needs(load):
    previous, load = contiguous(6, 3), np.array(load)
    after = incremental(previous, load, tolerance=0.2)
    if after.imbalance(load) > 1.2:
        return
    needed = min(
        (
            moves(previous, choice)
            for order in itertools.permutations(range(6))
            if (choice := Placement(np.reshape(order, (3, 2)))).imbalance(load) <= 1.2
        ),
        default=None,
    )
    assert needed is None or moves(previous, after) <= needed + 1


# --- files ------------------------------------------------------------------------------------


@given(placement=placements())
def test_json_round_trips(placement):
    assert Placement.from_json(placement.to_json()) == placement


def test_uneven_shares_round_trip():
    placement = exact([80, 10, 10, 20], 3)
    assert not placement.even
    assert Placement.from_json(placement.to_json()) == placement
    assert hash(Placement.from_json(placement.to_json())) == hash(placement)


def test_engine_files_round_trip(tmp_path):
    layers = [Placement(t) for t in EPLB_PHYSICAL.reshape(2, 8, 2)]
    write_sglang(tmp_path / "sglang.json", {1: layers[0], 3: layers[1]}, num_layers=5)
    content = json.loads((tmp_path / "sglang.json").read_text())
    assert list(content) == ["physical_to_logical_map"]
    assert content["physical_to_logical_map"][1] == EPLB_PHYSICAL[0].tolist()
    assert content["physical_to_logical_map"][0] == [*range(12), 0, 1, 2, 3]
    assert [read_sglang(tmp_path / "sglang.json", 8)[n] for n in (1, 3)] == layers
    assert from_file(tmp_path / "sglang.json", layer=3, world_size=8) == layers[1]

    write_vllm_ascend(tmp_path / "ascend.json", layers)
    content = json.loads((tmp_path / "ascend.json").read_text())
    assert content["moe_layer_count"] == 2
    assert content["layer_list"][1]["device_list"][0] == {"device_id": 0, "device_expert": [7, 10]}
    assert read_vllm_ascend(tmp_path / "ascend.json") == layers
    assert from_file(tmp_path / "ascend.json", layer=0) == layers[0]

    (tmp_path / "ours.json").write_text(layers[0].to_json())
    np.save(tmp_path / "ours.npy", layers[0].physical)
    assert from_file(tmp_path / "ours.json", world_size=8) == layers[0]
    assert from_file(tmp_path / "ours.npy") == layers[0]


def test_a_layer_that_an_engine_file_does_not_hold_is_named(tmp_path):
    path = tmp_path / "ascend.json"
    write_vllm_ascend(path, [Placement([[0, 1], [2, 3]]), Placement([[3, 2], [1, 0]])])
    assert from_file(path, layer=5, moe_layers=[3, 5]).physical.tolist() == [[3, 2], [1, 0]]
    with pytest.raises(ValueError, match=r"layer 9 of the model is not MoE; .* are 3, 5$"):
        from_file(path, layer=9, moe_layers=[3, 5])
    message = r"layer 5 of the model is MoE layer 2, counted from 0, but .*ascend.json holds 2;"
    with pytest.raises(ValueError, match=message):
        from_file(path, layer=5, moe_layers=[3, 4, 5])


@pytest.mark.parametrize(
    ("numbers", "devices", "words"),
    [
        ((0, 2), (0, 1), r'each "layer_id" from 0 on must be there once, but there are \[0, 2\]'),
        ((0, 0), (0, 1), r'each "layer_id" .*, but there are \[0, 0\]'),
        ((1, 0), (0, 2), r'each "device_id" .*, but there are \[0, 2\]'),
    ],
)
def test_an_engine_file_that_lacks_a_layer_or_device_is_refused(tmp_path, numbers, devices, words):
    """The next one would take its place."""
    path = tmp_path / "ascend.json"
    write_vllm_ascend(path, [Placement([[0, 1], [2, 3]]), Placement([[3, 2], [1, 0]])])
    content = json.loads(path.read_text())
    for layer, number in zip(content["layer_list"], numbers, strict=True):
        layer["layer_id"] = number
        for device, rank in zip(layer["device_list"], devices, strict=True):
            device["device_id"] = rank
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=words):
        read_vllm_ascend(path)


def test_an_engine_file_of_floats_is_refused(tmp_path):
    path = tmp_path / "sglang.json"
    path.write_text('{"physical_to_logical_map": [[0.0, 1.0]]}')
    with pytest.raises(ValueError, match=r"integers .*; it holds \(1, 2\) of float64"):
        read_sglang(path, 2)


@pytest.mark.slow
def test_the_workflow_places_a_deployment_by_measured_loads(tmp_path):
    """Loads of two layers, a file for the engine, then a drifted corpus and few moves."""
    script = Path(__file__).parents[2] / "workflows" / "place_for_serving.py"
    rng = np.random.default_rng(0)

    def routing(name: str, seed: int) -> Path:
        share = zipf_load(32, 1.2, seed=seed) * rng.uniform(0.9, 1.1, 32)
        path = tmp_path / name
        np.save(path, rng.choice(32, p=share / share.sum(), size=(5000, 2)))
        return path

    def place_for_serving(*more: object) -> str:
        layers = [f"{n}={routing(f'layer{n}.npy', seed=n)}" for n in (1, 2)]
        sizes = ["--experts", 32, "--ranks", 4, "--physical-experts", 40, "--model-layers", 4]
        command = [sys.executable, script, *layers, *sizes, *more]
        run = subprocess.run(
            [str(word) for word in command],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONPATH": str(script.parents[1]), "COLUMNS": "100"},
        )
        return run.stdout

    first, second = tmp_path / "first.json", tmp_path / "second.json"
    assert "10,000" in place_for_serving("--out", first)
    placements = read_sglang(first, 4)
    assert len(placements) == 4
    for n in (1, 2):
        rows = np.bincount(np.load(tmp_path / f"layer{n}.npy").ravel(), minlength=32)
        assert placements[n].imbalance(rows) < 1.02 < contiguous(32, 4).imbalance(rows)
    place_for_serving("--out", second, "--previous", first, "--tolerance", 0.1)
    after = read_sglang(second, 4)
    assert sum(moves(placements[n], after[n]) for n in (1, 2)) <= 6


def serve(monkeypatch, folder: Path, *arguments: object) -> Result:
    """Run the workflow in this process, for 4 experts on 2 ranks."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "workflows")
    place_for_serving = importlib.import_module("place_for_serving")
    monkeypatch.chdir(folder)
    sizes = ("--experts", 4, "--ranks", 2, "--out", "location.json")
    return CliRunner().invoke(place_for_serving.main, [str(a) for a in (*arguments, *sizes)])


def hot(folder: Path, *experts: int) -> None:
    """Write a routing for each layer: some rows to all four experts, most to one and the next."""
    for layer, expert in enumerate(experts):
        np.save(folder / f"{layer}.npy", np.array([0, 1, 2, 3] * 50 + [expert, expert + 1] * 400))


@pytest.mark.parametrize("engine", ["sglang", "vllm-ascend"])
def test_the_workflow_keeps_layers_in_order_and_those_of_before(tmp_path, monkeypatch, engine):
    def read() -> list[Placement]:
        path = tmp_path / "location.json"
        return read_sglang(path, 2) if engine == "sglang" else read_vllm_ascend(path)

    hot(tmp_path, 0, 1, 2)
    asked = ("--engine", engine, "--physical-experts", 6)
    named = ("2=2.npy", "0=0.npy", "1=1.npy")
    first = serve(monkeypatch, tmp_path, *named, *asked)
    assert first.exit_code == 0, first.output
    before = read()
    replicas = [placement.replica_counts.tolist() for placement in before]
    assert replicas == [[2, 2, 1, 1], [1, 2, 2, 1], [1, 1, 2, 2]]
    hot(tmp_path, 2, 2, 2)
    again = serve(monkeypatch, tmp_path, "1=1.npy", "--previous", "location.json", *asked)
    assert again.exit_code == 0, again.output
    after = read()
    assert (after[0], after[2]) == (before[0], before[2])
    assert after[1].replica_counts.tolist() == [1, 1, 2, 2]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["0.npy"], "routing must be LAYER=PATH"),
        (["x=0.npy"], "routing must be LAYER=PATH"),
        (["1=0.npy", "1=1.npy"], "layer 1 is given twice"),
        (["0=0.npy"], "give --physical-experts or --previous"),
        (
            ["0=0.npy", "--physical-experts", 5],
            "engines have no empty physical experts, but layer 0 has 1",
        ),
        (["0=0.npy", "--physical-experts", 3], "got num_physical=3"),
        (["0=none.npy", "--physical-experts", 6], "none.npy"),
        (
            ["2=0.npy", "--physical-experts", 6, "--model-layers", 2],
            "layers must be 0 to 1, not 2",
        ),
        (["1=0.npy", "--physical-experts", 6, "--engine", "vllm-ascend"], "layer 0 is missing"),
        (["1=0.npy", "--previous", "old.json"], "layers must be 0 to 0, not 1"),
        (["0=0.npy", "--previous", "old.json", "--physical-experts", 6], "4 physical ones and 2"),
        (["0=0.npy", "--previous", "old.json", "--nodes", 2], "--groups and --nodes"),
        (["0=0.npy", "--previous", "old.json", "--engine", "vllm-ascend"], '"layer_list"'),
    ],
)
def test_what_the_workflow_refuses(tmp_path, monkeypatch, arguments, words):
    hot(tmp_path, 0, 1)
    write_sglang(tmp_path / "old.json", {0: contiguous(4, 2)})
    result = serve(monkeypatch, tmp_path, *arguments)
    assert (result.exit_code, words in result.output) == (2, True), result.output
    assert not (tmp_path / "location.json").exists()


def test_statistics_are_placed_as_the_layer_that_they_name(tmp_path, monkeypatch):
    for layer in (3, 4):
        tensors, named = {"usage.rows": np.array([5, 1, 1, 1])}, {"layer_index": str(layer)}
        save_file(tensors, tmp_path / f"stats_{layer:03}.safetensors", named)

    def served(engine: str, *layers: str) -> str:
        asked = ("--physical-experts", 4, "--engine", engine)
        return serve(monkeypatch, tmp_path, *layers, *asked).output

    wrong = served("sglang", "3=stats_003.safetensors", "5=stats_004.safetensors")
    assert "stats_004.safetensors is given for layer 5, but has the statistics of layer 4" in wrong
    wrong = served("vllm-ascend", "0=stats_004.safetensors", "1=stats_003.safetensors")
    assert "MoE layer 1, counted from 0, but has the statistics of layer 3 of the model" in wrong
    assert not (tmp_path / "location.json").exists()
    for engine, numbers in (("sglang", (3, 4)), ("vllm-ascend", (0, 1))):
        named = [
            f"{n}=stats_00{layer}.safetensors" for n, layer in zip(numbers, (3, 4), strict=True)
        ]
        assert "Error" not in served(engine, *named)
        (tmp_path / "location.json").unlink()


# --- messages ---------------------------------------------------------------------------------

UNEVEN = exact([80, 10, 10, 20], 3)

MESSAGES = [
    (lambda: Placement([[0.5]]), "table \\(ranks, experts\\) of integers"),
    (lambda: Placement([[0, 2], [3, -1]]), "expert 1 of 4 has none"),
    (lambda: Placement([[0, 1, 1]]), "rank 0 holds expert 1 twice"),
    (lambda: Placement([[0, -2]]), "one is -2"),
    (lambda: Placement([[0]], [[5]]), f"must stop at {TICKETS}, but that of expert 0 stops at 5"),
    (lambda: Placement([[0], [0]], [[TICKETS], [5]]), "must not decrease, but that of expert 0"),
    (lambda: Placement([[0], [0]], [[TICKETS]]), "must have the shape of physical"),
    (lambda: Placement.from_json("[1]"), 'object with "physical"'),
    (lambda: contiguous(0, 2), "got num_experts=0, world_size=2"),
    (lambda: packed([1, -1], 2), "one finite number >= 0"),
    (lambda: balanced([1, 2], 2, num_physical=5), "got num_physical=5"),
    (lambda: balanced([1] * 6, 4, num_physical=8, num_groups=4, num_nodes=2), "divide the experts"),
    (lambda: balanced([1] * 6, 3, num_physical=6, num_groups=2, num_nodes=2), "divide world_size"),
    (lambda: exact([1] * 8, 4, max_physical=2), "need 3 experts a rank, but the limit is 2"),
    (lambda: place("best", [1], 1), "must be one of contiguous, packed, balanced, exact"),
    (
        lambda: place("packed", [1] * 8, 2, max_physical=3),
        "may have at most 3 experts, but the placement gives",
    ),
    (lambda: verify_placement(contiguous(4, 2), 5), "must place 5 experts, but places 4"),
    (lambda: incremental(contiguous(4, 2), [1, 2]), "must place 2 experts, but places 4"),
    (
        lambda: contiguous(4, 2).rewrite(np.array([[0, 1], [3, 4]]), 100),
        r"row 101 of the whole array\): routing must hold .* \[-1, 4\), but routing\[1, 1\] is 4",
    ),
    (lambda: ticket_load(np.array([0, -2]), 3), r"\[-1, 3\), but routing\[1\] is -2"),
    (lambda: write_sglang("x.txt", {0: contiguous(2, 1)}), "ending .json"),
    (
        lambda: write_sglang("x.json", {0: contiguous(3, 2)}),
        "no empty physical experts, but layer 0 has 1",
    ),
    (lambda: write_vllm_ascend("x", [contiguous(2, 1), contiguous(4, 2)]), "2 different sizes"),
]


@pytest.mark.parametrize(("act", "message"), MESSAGES, ids=[m for _, m in MESSAGES])
def test_messages(act, message):
    with pytest.raises(ValueError, match=message):
        act()


def test_engines_refuse_uneven_shares():
    load = [40, 40, 40, 40, 60]
    placement = exact(load, 2)
    full = Placement([[0, 1, 2], [2, 3, 4]], [[TICKETS, TICKETS, 5], [TICKETS] * 3])
    assert not placement.even
    with pytest.raises(ValueError, match="spread rows evenly over replicas, but layer 0 does not"):
        write_vllm_ascend("x.json", [full])


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        ({"a": 1}, {}, "holds none of"),
        ([1], {}, "must hold a JSON object"),
        ({"physical_to_logical_map": [[0, 1]]}, {}, "pass world_size"),
        ({"physical_to_logical_map": [[0, 1]]}, {"world_size": 3}, "multiple of world_size=3"),
        ({"physical_to_logical_map": [[0, 1]] * 2}, {"world_size": 2}, "holds 2 layers"),
        ({"physical_to_logical_map": [[0, 1], [0]]}, {"world_size": 2}, "differ in length"),
        ({"physical_to_logical_map": 3}, {"world_size": 2}, "layers, physical experts"),
        ({"layer_list": 3}, {}, 'must hold "layer_list", with'),
        ({"physical": [[0], [1]]}, {"world_size": 3}, "on 2 ranks, but world_size=3"),
    ],
)
def test_file_messages(tmp_path, content, arguments, message):
    (tmp_path / "p.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        from_file(tmp_path / "p.json", **arguments)
