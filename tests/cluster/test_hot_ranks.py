"""A rank that holds others up gets a further owner; nothing else does."""

from __future__ import annotations

from math import inf

from hypothesis import given
from hypothesis import strategies as st

from dask_ep.cluster.hot_ranks import BUSY, IDLE, LOOKS, HotRanks, Replica, Sample

HOT = (4, 2)
OWNERS = {HOT: {"a"}, (4, 0): {"b"}, (4, 1): {"c"}}


def looks(shares: dict[str, float], count: int, **changes: object) -> list[Replica]:
    """What is said in so many looks, the first of which knows no share yet."""
    hot, said = HotRanks(), []
    for t in range(count + 1):
        told = {
            worker: Sample(float(t), share * t, 1, {HOT: 1000} if worker == "a" else {}, inf)
            for worker, share in shares.items()
        }
        for worker, change in changes.items():
            told[worker] = told[worker]._replace(**change)
        if replica := hot.look(told, OWNERS, {HOT: 100}):
            said.append(replica)
    return said


def test_a_busy_rank_gets_the_least_busy_worker_after_some_looks():
    shares = {"a": 0.97, "b": 0.5, "c": 0.2}
    assert looks(shares, LOOKS - 1) == []
    (replica,) = looks(shares, LOOKS)
    assert (replica.rank, replica.worker) == (HOT, "c")
    assert replica.why == ("hot: 1000 rows waited at a, which was busy 97% of the time, c 20%")


def test_it_gets_another_one_only_after_as_many_looks_again():
    assert len(looks({"a": 1.0, "b": 0.1}, 2 * LOOKS)) == 2


def test_memory_comes_first():
    shares = {"a": 1.0, "b": 0.5, "c": 0.2}
    (replica,) = looks(shares, LOOKS, c={"room": 99})
    assert replica.worker == "b"
    assert looks(shares, LOOKS, c={"room": 99}, b={"room": 0}) == []


def test_an_owner_is_no_further_owner():
    assert looks({"a": 1.0}, LOOKS) == []


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.booleans())
def test_only_where_one_is_busy_rows_wait_and_another_has_time(a, b, c, rows_wait):
    waiting = {} if rows_wait else {"a": {"waiting": {}}}
    said = looks({"a": a, "b": b, "c": c}, LOOKS, **waiting)
    margin = 1e-9
    if a < BUSY - margin or min(b, c) > IDLE + margin or not rows_wait:
        assert said == []
    elif a > BUSY + margin and min(b, c) < IDLE - margin:
        assert len(said) == 1


def test_workers_that_come_and_go_are_not_mistaken():
    hot = HotRanks()
    for t in range(2 * LOOKS):
        told = {"a": Sample(float(t), 1.0 * t, 1, {HOT: 10}, inf)}
        if t % 2:
            told["b"] = Sample(float(t), 0.0, 1, {}, inf)  # never there twice in a row
        assert hot.look(told, OWNERS, {}) is None
