"""Packets and answers find each other over one connection, and none is waited for in vain."""

import asyncio
import weakref
from contextlib import suppress
from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest
from distributed.comm import listen
from distributed.protocol import Serialize, to_serialize

from dask_ep.cluster.connections import accept
from dask_ep.cluster.streams import SMALL, Line, from_message, to_message
from tests.cluster_processes import DEADLINE


class Asking(NamedTuple):
    """What a line needs of the worker that asks."""

    address: str = "tcp://127.0.0.1:1"
    connection_args: dict = {}  # noqa: RUF012


def with_line(answer, ask, scheme="tcp://127.0.0.1:0"):
    """Call a coroutine function with a line to one who answers as a function says."""

    async def listen_to(comm):
        try:
            message = await comm.read()
            assert message == {"op": "test_ask", "sender": Asking().address, "reply": False}
            connection = accept(comm, lambda *message: answer(connection, *message))
            with suppress(OSError):
                await connection.run()
        finally:
            comm.abort()

    async def run():
        listener = await listen(scheme, listen_to)
        line = Line(Asking(), listener.contact_address, "test_ask")
        try:
            return await asyncio.wait_for(ask(line), DEADLINE)
        finally:
            line.close()
            while not line.is_over:
                await asyncio.sleep(0)
            listener.stop()

    return asyncio.run(run())


@pytest.mark.parametrize("scheme", ["tcp://127.0.0.1:0", "inproc://"])
def test_answers_in_any_order_find_who_asked(scheme):
    held = []

    def answer(connection, number, what):
        held.append((number, 2 * what))
        if len(held) == 20:
            for each in reversed(held):
                connection.send(*each)

    async def ask(line):
        return await asyncio.gather(*(line.ask(1, n) for n in range(20)))

    assert with_line(answer, ask, scheme) == [2 * n for n in range(20)]


def test_what_was_sent_is_not_kept_until_the_answer_comes():
    """Small arrays are copied into the message; these are sent as they are."""
    rows, came = [np.zeros(SMALL)], []
    sent = weakref.ref(rows[0])

    async def ask(line):
        asked = asyncio.ensure_future(line.ask(1, to_serialize(rows.pop())))
        while sent() is not None or not came:
            await asyncio.sleep(0.01)
        assert not asked.done()
        connection, number = came.pop()
        connection.send(number, "came")
        return await asked

    def answer(connection, number, rows):
        came.append((connection, number))

    assert with_line(answer, ask) == "came"


def test_a_connection_that_ends_gives_every_request_an_error():
    def answer(connection, number, what):
        if number == 2:
            connection.abort()

    async def ask(line):
        answers = await asyncio.gather(*(line.ask(1, n) for n in range(3)), return_exceptions=True)
        while not line.is_over:
            await asyncio.sleep(0.01)
        return answers

    errors = with_line(answer, ask)
    assert len(errors) == 3
    assert all(isinstance(error, OSError) for error in errors)


def test_a_line_that_is_closed_gives_every_request_an_error():
    async def ask(line):
        assert await line.ask(1, "first") == "first"
        asked = asyncio.ensure_future(line.ask(1, "what"))
        await asyncio.sleep(0)
        line.close()
        with pytest.raises(ConnectionError, match="was given up"):
            await asked

    with_line(answer_first, ask)


def answer_first(connection, number, what):
    if what == "first":
        connection.send(number, what)


def test_a_request_that_nobody_waits_for_any_more_does_not_disturb_others():
    def answer(connection, number, what):
        connection.send(number, what)

    async def ask(line):
        given_up = asyncio.ensure_future(line.ask(1, "first"))
        await asyncio.sleep(0)
        given_up.cancel()
        return await line.ask(1, "second")

    assert with_line(answer, ask) == "second"


@pytest.mark.parametrize("is_early", [False, True])
def test_what_cannot_be_sent_is_an_error_of_who_asks(is_early):
    class Unsendable:
        def __reduce__(self):
            raise RuntimeError("this cannot be pickled")

    async def ask(line):
        if not is_early:
            assert await line.ask(1, "first") == "first"
        with pytest.raises(Exception, match="this cannot be pickled|erialize"):
            await line.ask(1, to_serialize(Unsendable()))
        return await line.ask(1, "first")

    assert with_line(answer_first, ask) == "first"


@pytest.mark.parametrize("dtype", ["f4", ">f8", "i1", ml_dtypes.bfloat16])
@pytest.mark.parametrize("rows", [0, 3, SMALL])
@pytest.mark.parametrize("scheme", ["tcp://127.0.0.1:0", "inproc://"])
def test_an_array_arrives_as_it_was(scheme, dtype, rows):
    array = np.arange(2 * rows).reshape(rows, 2).astype(dtype)

    def answer(connection, number, came):
        connection.send(number, to_message(from_message(came)))

    async def ask(line):
        return from_message(await line.ask(1, to_message(array)))

    arrived = with_line(answer, ask, scheme)
    assert arrived.dtype == array.dtype
    np.testing.assert_array_equal(arrived, array)


def test_small_arrays_travel_inside_their_message():
    assert isinstance(to_message(np.zeros(SMALL // 8)), list)
    assert isinstance(to_message(np.zeros(SMALL)), Serialize)
    assert isinstance(to_message(np.zeros(2, ml_dtypes.bfloat16)), Serialize)
    assert to_message(None) is from_message(None) is None


@pytest.mark.parametrize("steps", [0, 1, 5], ids="after {} steps".format)
def test_a_line_that_is_closed_before_it_is_open_gives_every_request_an_error(steps):
    async def run():
        line = Line(Asking(), "tcp://127.0.0.1:1", "test_ask")  # nobody listens
        asked = asyncio.ensure_future(line.ask(1, "first"))
        for _ in range(steps):
            await asyncio.sleep(0)
        line.close()
        with pytest.raises(ConnectionError):
            await asyncio.wait_for(asked, DEADLINE)
        while not line.is_over:
            await asyncio.sleep(0)
        with pytest.raises(ConnectionError, match="has ended"):
            await line.ask(1, "later")

    asyncio.run(run())
