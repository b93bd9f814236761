"""Chunks begin in Dask's order, and who waits keeps no thread that an earlier task needs."""

import threading

import pytest

from dask_ep.cluster.admission import Admission
from tests.cluster_processes import wait_until


class Entering(threading.Thread):
    """A chunk that wants to begin, in a thread of its own, once it is known to wait or to begin."""

    def __init__(self, admission, priority, begun, look=lambda: None, layer=""):
        super().__init__()
        self.layer = layer
        self.admission, self.priority, self.begun, self.look = admission, priority, begun, look
        self.seceded, self.error, before = 0, None, (admission.under_way, len(admission._waiting))
        self.start()
        wait_until(
            lambda: (admission.under_way, len(admission._waiting)) != before, "it has entered"
        )

    def run(self):
        try:
            self.admission.enter(self.priority, self.look, self.secede, self.layer)
            self.begun.append(self.priority)
        except RuntimeError as error:
            self.error = error

    def secede(self):
        self.seceded += 1


def test_as_many_begin_as_may_and_the_others_in_their_order():
    admission, begun = Admission(limit=2), []
    entering = [Entering(admission, (p,), begun) for p in (5, 4, 9, 3, 7)]
    wait_until(lambda: len(begun) == 2, "two have begun")
    for _ in range(3):
        before = len(begun)
        admission.leave()
        wait_until(lambda before=before: len(begun) > before, "the next one has begun")
    for chunk in entering:
        chunk.join()
    assert begun[2:] == [(3,), (7,), (9,)]
    assert [chunk.seceded for chunk in entering] == [0] * 5


def test_each_layer_may_have_one_in_flight():
    """Those of a layer may wait for experts that are made of the output of another one."""
    admission, begun = Admission(limit=1), []
    first = Entering(admission, (5,), begun, layer="second")
    waiting = Entering(admission, (6,), begun, layer="second")
    earlier = [Entering(admission, (p,), begun, layer="first") for p in (7, 8)]
    wait_until(lambda: (7,) in begun, "one of the other layer has begun")
    assert begun == [(5,), (7,)]
    admission.leave("second")  # the next one of this layer, though an earlier one is in flight
    wait_until(lambda: (6,) in begun, "the next one has begun")
    admission.leave("first")
    wait_until(lambda: (8,) in begun, "the next one has begun")
    for chunk in (first, waiting, *earlier):
        chunk.join()
    assert admission.under_way == 2


def test_a_thread_is_lent_to_an_earlier_task_and_to_no_other():
    admission, begun, looked = Admission(limit=1), [], threading.Event()
    first = Entering(admission, (0,), begun)
    waiting = Entering(admission, (5,), begun, looked.set)
    assert looked.wait(60)
    admission.lend((6,))
    assert not admission._waiting[0].is_wanted
    admission.lend((4,))
    wait_until(lambda: waiting.seceded, "the thread is lent")
    assert begun == [(0,)]
    admission.leave()
    for chunk in (first, waiting):
        chunk.join()
    assert begun == [(0,), (5,)]
    assert waiting.seceded == 1


def test_a_task_that_was_ready_before_gets_the_thread_too():
    """What is looked at when a chunk has to wait may be found before it waits."""
    admission, begun = Admission(limit=1), []
    first = Entering(admission, (0,), begun)
    waiting = Entering(admission, (5,), begun, lambda: admission.lend((4,)))
    wait_until(lambda: waiting.seceded, "the thread is lent")
    admission.leave()
    for chunk in (first, waiting):
        chunk.join()


def test_who_is_overtaken_as_it_enters_lends_its_thread_too():
    class Overtaken(Admission):
        def _begin(self, me, *rest):
            if me.priority == (5,) and not begun:
                Entering(self, (0,), begun).join()
            return super()._begin(me, *rest)

    admission, begun = Overtaken(limit=1), []
    waiting = Entering(admission, (5,), begun, lambda: admission.lend((4,)))
    wait_until(lambda: waiting.seceded, "the thread is lent")
    admission.leave()
    waiting.join()
    assert begun == [(0,), (5,)]


def test_when_the_worker_closes_nobody_waits():
    admission, begun = Admission(limit=1), []
    Entering(admission, (0,), begun).join()
    waiting = Entering(admission, (1,), begun)
    admission.close()
    waiting.join()
    assert str(waiting.error) == "the worker is closing"
    assert admission.under_way == 1
    assert not admission.has_waiting


def test_a_thread_that_cannot_secede_takes_no_place():
    admission = Admission(limit=1)
    admission.enter((0,), lambda: None, lambda: None)

    def fails():
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        admission.enter((5,), lambda: admission.lend((4,)), fails)
    assert admission.under_way == 1
    assert not admission.has_waiting
