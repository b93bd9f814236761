"""Owner maps: complete, stable, balanced, and moved no more than it pays."""

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dask_ep.cluster.owner_rules import GAIN, assign, balance, burdens, capacities, natural_order

NAMES = [f"w{number}" for number in range(12)]


@st.composite
def clusters(draw):
    """Workers with capacities, R loads, R numbers of replicas, and what was owned before."""
    names = draw(st.lists(st.sampled_from(NAMES), unique=True, min_size=1, max_size=8))
    workers = {name: draw(st.sampled_from([1.0, 2.0, 3.5])) for name in names}
    ranks = draw(st.integers(1, 12))
    loads = [draw(st.sampled_from([0.0, 1.0, 1.0, 2.0, 7.0])) for _ in range(ranks)]
    replicas = [draw(st.sampled_from([1, 1, 1, 2, 9])) for _ in range(ranks)]
    before = [draw(st.frozensets(st.sampled_from(NAMES), max_size=3)) for _ in range(ranks)]
    return workers, loads, replicas, before


@given(clusters())
def test_every_rank_gets_as_many_owners_as_it_shall_have(cluster):
    workers, loads, replicas, before = cluster
    for rank, owners in enumerate(assign(before, workers, loads, replicas)):
        kept = before[rank] & workers.keys()
        assert owners <= workers.keys()
        assert len(owners) == max(len(kept), min(replicas[rank], len(workers)))


@given(clusters())
def test_assign_takes_no_rank_from_a_worker_that_is_there(cluster):
    workers, loads, replicas, before = cluster
    for rank, owners in enumerate(assign(before, workers, loads, replicas)):
        assert before[rank] & workers.keys() <= owners


@given(clusters())
def test_assigning_twice_changes_nothing(cluster):
    workers, loads, replicas, before = cluster
    owners = assign(before, workers, loads, replicas)
    assert assign(owners, workers, loads, replicas) == owners


@given(clusters())
def test_no_worker_finishes_later_than_the_bound_of_greedy_lists(cluster):
    workers, loads, _, _ = cluster
    owners = assign([()] * len(loads), workers, loads)
    bound = (sum(loads) + len(workers) * max(loads)) / sum(workers.values())
    burden = burdens(owners, workers, loads)
    assert all(burden[name] / workers[name] <= bound + 1e-9 for name in workers)


@given(st.integers(1, 20), st.integers(1, 8))
def test_equal_ranks_on_equal_workers_differ_by_one(ranks, n_workers):
    workers = dict.fromkeys(NAMES[:n_workers], 1.0)
    owned = burdens(assign([()] * ranks, workers, [1.0] * ranks), workers, [1.0] * ranks)
    assert max(owned.values()) - min(owned.values()) <= 1


@given(clusters(), st.floats(0, 3))
def test_below_a_limit_a_worker_takes_at_most_one_rank_over_it(cluster, limit):
    workers, loads, _, before = cluster
    kept = burdens([of_rank & workers.keys() for of_rank in before], workers, loads)
    owners = assign(before, workers, loads, limit=limit)
    now = burdens(owners, workers, loads)
    for name, capacity in workers.items():
        assert now[name] <= max(kept[name], limit * capacity) + max(loads) + 1e-9


@given(clusters())
def test_balance_never_makes_the_last_worker_later_and_rests_when_done(cluster):
    workers, loads, replicas, before = cluster
    owners = assign(before, workers, loads, replicas)
    balanced = balance(owners, workers, loads)
    assert [len(of_rank) for of_rank in balanced] == [len(of_rank) for of_rank in owners]
    assert _latest(balanced, workers, loads) <= _latest(owners, workers, loads) + 1e-9
    assert balance(balanced, workers, loads) == balanced


@given(clusters(), st.sets(st.integers(0, 11)))
def test_balance_leaves_fixed_ranks_alone(cluster, fixed):
    workers, loads, replicas, before = cluster
    owners = assign(before, workers, loads, replicas)
    balanced = balance(owners, workers, loads, fixed)
    assert all(balanced[rank] == owners[rank] for rank in fixed if rank < len(owners))


@given(st.integers(1, 30), st.integers(1, 7))
def test_a_newcomer_takes_its_share_and_nobody_else_gets_a_rank(ranks, n_workers):
    loads = [1.0] * ranks
    old = dict.fromkeys(NAMES[:n_workers], 1.0)
    owners = assign([()] * ranks, old, loads)
    balanced = balance(owners, old | {"new": 1.0}, loads)
    moved = [rank for rank in range(ranks) if balanced[rank] != owners[rank]]
    assert all(balanced[rank] == {"new"} for rank in moved)
    assert len(moved) <= ranks // (n_workers + 1)
    owned = burdens(balanced, old | {"new": 1.0}, loads)
    latest = max(owned.values())
    assert owned["new"] + 1 >= min(latest, (1 - GAIN) * latest)


def test_what_leaves_and_comes_back_costs_two_moves():
    workers = dict.fromkeys("abc", 1.0)
    start = assign([()] * 6, workers, [1.0] * 6)
    without = assign(start, {"a": 1.0, "b": 1.0}, [1.0] * 6)
    assert sum(before != now for before, now in zip(start, without, strict=True)) == 2
    again = balance(without, workers, [1.0] * 6)
    assert sum(before != now for before, now in zip(without, again, strict=True)) == 2


def test_a_difference_below_the_gain_moves_nothing():
    workers = {"a": 1.0, "b": 1.0}
    owners = [frozenset("a")] * 12 + [frozenset("b")] * 10
    assert balance(owners, workers, [1.0] * 22) == owners


def test_more_memory_gets_more_ranks():
    owners = assign([()] * 6, capacities({"small": 4e9, "large": 8e9}), [1.0] * 6)
    assert burdens(owners, {"small": 1, "large": 1}, [1.0] * 6) == {"small": 2, "large": 4}


def test_a_heavy_rank_has_a_worker_to_itself():
    owners = assign([()] * 4, dict.fromkeys("ab", 1.0), [1.0, 1.0, 1.0, 3.0])
    assert owners == [{"b"}, {"b"}, {"b"}, {"a"}]


@pytest.mark.parametrize(
    ("memory", "expected"),
    [
        ({}, {}),
        ({"a": 0, "b": 0}, {"a": 1.0, "b": 1.0}),  # no limit stated: equal
        ({"a": 0, "b": 6.0}, {"a": 6.0, "b": 6.0}),
    ],
)
def test_capacities_of_workers_without_limit(memory, expected):
    assert capacities(memory) == expected


def test_without_workers_nobody_owns_anything():
    assert assign([("a",), ()], {}, [1.0, 1.0]) == [frozenset(), frozenset()]
    assert balance([(), ()], {}, [1.0, 1.0]) == [frozenset(), frozenset()]


@given(st.lists(st.text(max_size=6), max_size=6, unique=True), st.randoms())
def test_the_order_of_names_does_not_depend_on_the_order_in_which_they_came(names, random):
    shuffled = random.sample(names, len(names))
    keys = [natural_order(name) for name in sorted(names, key=natural_order)]
    assert [natural_order(name) for name in sorted(shuffled, key=natural_order)] == keys


def _latest(owners, workers, loads):
    burden = burdens(owners, workers, loads)
    return max((burden[name] / workers[name] for name in workers), default=-inf)
