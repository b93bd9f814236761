"""Cores are given out in turn, and no more than there are."""

import threading

from dask_ep.cluster.slices import Cores
from tests.cluster_processes import wait_until


def test_who_has_waited_longest_for_a_core_goes_on_first():
    """Also before the one who had it and wants it again, as a chunk between two of its steps."""
    cores, order, threads = Cores(1), [], []

    def take(me):
        with cores:
            order.append(me)

    with cores:
        for me in range(8):
            threads.append(threading.Thread(target=take, args=(me,)))
            threads[-1].start()
            wait_until(lambda: len(cores._waiting) == len(threads), "the next one waits")
    take("again")
    for thread in threads:
        thread.join()
    assert order == [*range(8), "again"]


def test_all_cores_are_in_use_and_never_more():
    cores, together, inside, seen = Cores(3), threading.Barrier(3), set(), []

    def take(me):
        with cores:
            inside.add(me)
            together.wait()  # for two others who hold a core
            seen.append(len(inside))
            together.wait()
            inside.discard(me)

    threads = [threading.Thread(target=take, args=(me,)) for me in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(seen) == {3}
