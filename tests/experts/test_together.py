"""Steps that several threads take part in, and experts that are loaded so."""

from __future__ import annotations

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from dask_ep.arrays.namespaces import UNDERFLOW_IS_ZERO
from dask_ep.experts import local_experts, stored_experts, together
from dask_ep.experts.experts import Experts
from dask_ep.experts.stored_experts import held_as_stored
from dask_ep.experts.together import Together
from dask_ep.experts.weights import Weight


def test_each_step_is_taken_once_and_results_come_in_order():
    taken = []

    def step(i: int) -> int:
        taken.append(i)
        return i

    steps = Together(lambda i=i: step(i) for i in range(100))
    with ThreadPoolExecutor(4) as pool:
        others = [pool.submit(steps.take_part) for _ in range(4)]
        assert steps.results() == list(range(100))
        assert [other.result() for other in others] == [None] * 4
    assert sorted(taken) == list(range(100))


def test_after_an_error_no_step_begins():
    begun = []

    def fail() -> None:
        raise ValueError("the second")

    steps = Together([lambda: begun.append(0), fail, lambda: begun.append(2)])
    steps.invite(0)
    for _ in range(2):  # and whoever asks again gets it too
        with pytest.raises(ValueError, match="the second"):
            steps.results()
    assert begun == [0]


def test_an_interrupt_between_two_steps_ends_the_load_for_all_threads(monkeypatch):
    begun, others = [], threading.Event()
    steps = Together(lambda i=i: begun.append(i) or others.wait(20) for i in range(50))
    helper = threading.Thread(target=steps.take_part)
    helper.start()
    plain, came = Together.take_part, []

    def interrupted(self):
        if not came:
            came.append(True)
            raise KeyboardInterrupt
        plain(self)

    monkeypatch.setattr(Together, "take_part", interrupted)
    with pytest.raises(KeyboardInterrupt):
        steps.results()
    others.set()
    helper.join(20)
    assert not helper.is_alive()
    assert len(begun) <= 2
    with pytest.raises(KeyboardInterrupt):
        steps.results()


def test_steps_are_dropped_when_they_have_been_taken():
    class Large:
        pass

    alive: weakref.WeakSet[Large] = weakref.WeakSet()

    def step(large: Large) -> int:
        gc.collect()
        return len(alive)

    def steps():
        for _ in range(4):
            large = Large()
            alive.add(large)
            yield lambda large=large: step(large)

    assert Together(steps()).results() == [4, 3, 2, 1]


def test_reading_threads_help_to_read_and_to_build(monkeypatch):
    """Each barrier is passed only if two threads are there at a time."""
    names: dict[str, set[str]] = {"read": set(), "build": set()}

    def in_pairs(what, plain):
        both = threading.Barrier(2)

        def waiting(*args):
            both.wait(20)
            names[what].add(threading.current_thread().name.rpartition("_")[0])
            return plain(*args)

        return waiting

    monkeypatch.setattr(together, "READERS", 1)
    monkeypatch.setattr(together, "readers", together.Readers())
    monkeypatch.setattr(Weight, "read", in_pairs("read", Weight.read))
    monkeypatch.setitem(
        local_experts.BUILDERS, "linear", in_pairs("build", local_experts.BUILDERS["linear"])
    )
    w = np.random.default_rng(0).random((4, 3, 2))
    rows = np.eye(3, dtype=np.float32)
    for e, expert in enumerate(Experts.linear(w).load()):
        np.testing.assert_array_equal(expert(rows), w[e].astype(np.float32))
    assert all("dask-ep-reader" in which and len(which) == 2 for which in names.values())


def test_reading_threads_help_to_hold_experts_as_they_are_stored(monkeypatch):
    both, plain, seen = threading.Barrier(2), stored_experts.held_in_memory, set()
    monkeypatch.setattr(together, "READERS", 1)
    monkeypatch.setattr(together, "readers", together.Readers())

    def waiting(*args):
        both.wait(20)
        seen.add(threading.current_thread())
        return plain(*args)

    monkeypatch.setattr(stored_experts, "held_in_memory", waiting)
    w = np.random.default_rng(0).random((4, 3, 2)).astype(np.float16)
    local = held_as_stored(Experts.linear(w)).load()
    rows = np.eye(3, dtype=np.float32)
    for e, expert in enumerate(local):
        np.testing.assert_array_equal(expert(rows), w[e].astype(np.float32))
    assert len(seen) == 2


def test_large_experts_are_built_by_one_thread(monkeypatch):
    invited = []
    monkeypatch.setattr(Together, "invite", lambda self, most=None: invited.append(most))
    monkeypatch.setattr(local_experts, "COPIED_BYTES", 3 * 2 * 4)
    for d, most in ((3, 1), (4, 0)):
        invited.clear()
        Experts.linear(np.ones((2, d, 2), np.float16)).load()
        assert invited == [None, most]
    invited.clear()
    Experts.gated(*np.ones((3, 1, 2, 2))).load()
    assert invited == [0]  # its matrices are read by this thread alone


def test_what_a_thread_cannot_read_is_an_error_of_the_load(monkeypatch):
    def fail(self, dtype, given=None):
        raise OSError("the disk is gone")

    monkeypatch.setattr(Weight, "read", UNDERFLOW_IS_ZERO(fail))
    with pytest.raises(OSError, match="the disk is gone"):
        Experts.linear(np.ones((8, 2, 2), np.float16)).load()
