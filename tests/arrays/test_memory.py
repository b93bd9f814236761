"""Memory is recycled when nobody can see it any more, and never before."""

from __future__ import annotations

import gc
import threading
import time

import ml_dtypes
import numpy as np
import pytest

from dask_ep.arrays import memory
from dask_ep.arrays.memory import Pool, empty
from tests.cluster_processes import wait_until

MIB = 1 << 20


@pytest.fixture
def pool(monkeypatch) -> Pool:
    fresh = Pool()
    monkeypatch.setattr(memory, "_pool", fresh)
    return fresh


def address(array: np.ndarray) -> int:
    return array.ctypes.data


def free_bytes(pool: Pool) -> int:
    """Bytes of unused blocks."""
    return sum(size * len(blocks) for size, blocks in list(pool._free.items()))


def test_a_dead_array_leaves_its_memory_to_the_next(pool):
    first = empty((MIB,), "f4")
    place = address(first)
    del first
    assert address(empty((512, 1024), "f8")) == place


def test_any_live_view_keeps_the_memory(pool):
    view = empty((MIB,), "f4")[10:20].reshape(2, 5)
    view[...] = 7
    others = [empty((MIB,), "f4") for _ in range(3)]
    for other in others:
        other.fill(0)
    assert (view == 7).all()
    assert free_bytes(pool) == 0


def test_a_block_serves_requests_down_to_half_its_size(pool):
    big = empty((4 * MIB,), "u1")
    place = address(big)
    del big
    small = empty((MIB,), "u1")
    assert address(small) != place
    assert address(empty((3 * MIB,), "u1")) == place


@pytest.mark.parametrize("dtype", ["f4", "i8", "?", ml_dtypes.bfloat16])
def test_arrays_are_ordinary(pool, dtype):
    array = empty((3, MIB), dtype)
    assert array.shape == (3, MIB)
    assert array.dtype == np.dtype(dtype)
    assert array.flags.c_contiguous
    assert array.flags.writeable
    assert address(array) % 64 == 0
    array[...] = 1
    assert (array == 1).all()


@pytest.mark.parametrize("shape", [(0, 5), (3, 4), ()])
def test_small_and_empty_arrays(shape):
    assert empty(shape, "f4").shape == shape


def test_unused_memory_goes_back_to_the_system(pool, monkeypatch):
    monkeypatch.setattr(memory, "KEEP_SECONDS", 0.5)
    del_me = empty((MIB,), "f4")
    del del_me
    assert free_bytes(pool) > 0
    wait_until(lambda: not free_bytes(pool) and pool._janitor is None, "it is given back")


def test_a_new_block_replaces_those_that_nobody_has_wanted_for_a_while(pool, monkeypatch):
    monkeypatch.setattr(memory, "REPLACE_SECONDS", 60.0)
    smaller, kept = empty((MIB,), "u1"), empty((2 * MIB,), "u1")
    del smaller
    larger = empty((4 * MIB,), "u1")
    assert free_bytes(pool) == MIB, "it was wanted a moment ago"
    monkeypatch.setattr(memory, "REPLACE_SECONDS", 0.0)
    place = address(larger)
    del larger
    assert address(empty((4 * MIB,), "u1")) == place, "nothing is dropped where a block serves"
    largest = empty((16 * MIB,), "u1")
    assert free_bytes(pool) == 0
    for array in (kept, largest):
        array.fill(1)
        assert (array == 1).all()


def test_release_gives_everything_back_now(pool):
    kept, dead = empty((MIB,), "f4"), empty((MIB,), "f8")
    del dead
    memory.release()
    assert free_bytes(pool) == 0
    kept.fill(1)
    assert kept.sum() == MIB


def test_no_two_threads_ever_share_memory(pool):
    clashes = []

    def work(number: int) -> None:
        rng = np.random.default_rng(number)
        for _ in range(100):
            array = empty((int(rng.integers(MIB, 2 * MIB)),), "u1")
            array.fill(number)
            time.sleep(0)
            if not (array == number).all():
                clashes.append(number)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not clashes


def test_arrays_in_reference_cycles_are_returned_too(pool):
    cycle: list = []
    cycle.extend([empty((MIB,), "f4"), cycle])
    del cycle
    gc.collect()
    assert free_bytes(pool) > 0
