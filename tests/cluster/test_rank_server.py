"""Cores are given out in turn, and no more than there are; every packet gets an answer."""

import asyncio
import sys
import threading

import numpy as np
import pytest
from distributed import protocol

from dask_ep import Experts
from dask_ep.cluster import dask_internals
from dask_ep.cluster.rank_server import Cores, Slices
from dask_ep.cluster.streams import to_message
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
        self.came = asyncio.Event()

    def send(self, number, answer):
        self.number, self.answer = number, answer
        self.came.set()


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

    async def ask():
        answers = Answers()
        slices._take(
            answers, 7, "tcp://there:1", "layer", [0], 4, [1, 1, 3], None, map(to_message, packet)
        )
        await asyncio.wait_for(answers.came.wait(), DEADLINE)
        return answers

    answers = asyncio.run(ask())
    slices.close()
    assert answers.number == 7
    kind, words = error
    (arrived,) = protocol.loads(protocol.dumps([answers.answer]))
    with pytest.raises(kind, match=words):
        dask_internals.raise_remote(arrived)
    assert slices.tally.waiting == 0
