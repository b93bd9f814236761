"""Cores are given out in turn, and no more than there are; every packet gets an answer."""

import sys
import threading

import numpy as np
import pytest
from distributed import protocol

from dask_ep import Experts
from dask_ep.cluster import dask_internals
from dask_ep.cluster.rank_server import Cores, Slices
from dask_ep.cluster.streams import to_message
from dask_ep.graph import tally
from tests.cluster_processes import DEADLINE, wait_until


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


class Answers:
    """Stands for the connection to the worker that asks."""

    def __init__(self):
        self.came = threading.Event()

    def send(self, number, answer):
        self.number, self.answer = number, answer
        self.came.set()

    def raise_error(self):
        (arrived,) = protocol.loads(protocol.dumps([self.answer]))
        dask_internals.raise_remote(arrived)


class Wordless(Exception):
    """An error whose text is an error."""

    def __str__(self):
        raise ValueError("no text")

    __repr__ = __str__


def fail_without_words(rows):
    if len(rows):
        raise Wordless
    return rows


@pytest.mark.parametrize(
    ("expert", "error"),
    [
        (fail_without_words, (RuntimeError, "Wordless, an error without a text")),
        (lambda rows: sys.exit("I stop here"), (RuntimeError, "SystemExit: I stop here")),
        (lambda rows: rows[:, :1], (ValueError, "rank 0")),
    ],
    ids=["has no text", "ends its thread", "fails"],
)
def test_who_sent_a_packet_is_told_what_went_wrong(expert, error):
    """Also of what is no `Exception`: it would be waited for without end."""
    slices = Slices("tcp://here:1", threads=1)
    experts = Experts.callables([expert]).load(xp=np, dtype=np.dtype("f4"))
    slices.open("layer", 0, lambda: experts, lambda token: True)
    packet = [np.ones((2, 3), np.float32), np.zeros(2, np.int64), None]

    answers = Answers()
    slices._take(
        answers, "tcp://there:1", 7, "layer", [0], 4, [1, 1, 3], None, map(to_message, packet)
    )
    assert answers.came.wait(DEADLINE)
    slices.close()
    assert answers.number == 7
    kind, words = error
    with pytest.raises(kind, match=words):
        answers.raise_error()
    assert slices.tally.waiting == 0


def test_an_answer_that_cannot_be_sent_is_an_error_of_who_asks():
    class Narrow(Answers):
        def send(self, number, answer):
            if not isinstance(answer, dict):
                raise TypeError("this cannot be serialized")
            super().send(number, answer)

    slices, answers = Slices("tcp://here:1", threads=1), Narrow()
    slices.open("layer", 0, lambda: [np.eye(3, dtype=np.float32)], lambda token: True)
    packet = map(to_message, [np.ones((2, 3), np.float32), np.zeros(2, np.int64), None])
    slices._take(answers, "tcp://there:1", 7, "layer", [0], 4, [1, 1, 3], None, packet)
    assert answers.came.wait(DEADLINE)
    slices.close()
    with pytest.raises(TypeError, match="cannot be serialized"):
        answers.raise_error()


def test_a_core_counts_the_time_for_which_it_is_held(monkeypatch):
    clock = iter([0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    monkeypatch.setattr(tally, "now", lambda: next(clock))
    cores = Cores(2)  # at 0
    with cores:  # 1
        with cores:  # 2
            assert cores.seconds() == 1 + 2 * 2  # at 4
        # 8
        assert cores.seconds() == 1 + 2 * 6 + 8
