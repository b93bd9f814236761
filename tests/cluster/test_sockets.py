"""What is sent over a socket arrives in whatever pieces the system makes of it, or is an error."""

import asyncio
import gc
import os
import socket
import weakref
from contextlib import suppress
from types import SimpleNamespace

import numpy as np
import pytest
from distributed.comm import CommClosedError, connect, listen
from distributed.protocol import to_serialize
from hypothesis import given
from hypothesis import strategies as st
from msgpack.exceptions import FormatError

from dask_ep.cluster import sockets
from dask_ep.cluster.sockets import AHEAD, Socket
from tests.cluster_processes import DEADLINE


def run(act, size=None):
    """Call a coroutine function with two ends of a connection, the second one a plain socket."""

    async def ours():
        one, other = socket.socketpair()
        for each in (one, other):
            each.setblocking(False)
            for option in (socket.SO_SNDBUF, socket.SO_RCVBUF) if size else ():
                each.setsockopt(socket.SOL_SOCKET, option, size)
        here = Socket(one, {})
        try:
            await asyncio.wait_for(act(here, other), DEADLINE)
        finally:
            here.abort()
            other.close()

    asyncio.run(ours())


MESSAGES = st.lists(
    st.recursive(
        st.integers(0, 255) | st.text(max_size=5) | st.none() | st.integers(0, 3 * AHEAD),
        lambda inner: st.lists(inner, max_size=4),
    ),
    min_size=1,
    max_size=5,
)


def with_arrays(message):
    """The same with an array, of this size, for each large number."""
    if isinstance(message, list):
        return [with_arrays(each) for each in message]
    is_size = isinstance(message, int) and message > 255
    return to_serialize(np.arange(message) % 251) if is_size else message


def assert_arrived(came, sent):
    if isinstance(sent, list):
        assert len(came) == len(sent)
        for pair in zip(came, sent, strict=True):
            assert_arrived(*pair)
    elif isinstance(sent, int) and sent > 255:
        assert came.flags.aligned
        np.testing.assert_array_equal(came, np.arange(sent) % 251)
    else:
        assert came == sent


@given(messages=MESSAGES, size=st.sampled_from([None, 4608]))
def test_messages_arrive_as_they_were_sent(messages, size):
    async def act(here, other):
        there = Socket(other, {})
        both = asyncio.ensure_future(send(here)), asyncio.ensure_future(send(there))
        for message in messages:
            assert_arrived(await here.read(), message)
            assert_arrived(await there.read(), message)
        await asyncio.gather(*both)
        there.abort()

    async def send(end):
        for message in messages:
            await end.write(with_arrays(message))

    run(act, size)


@given(messages=MESSAGES, pieces=st.lists(st.integers(1, 2 * AHEAD), min_size=1))
def test_messages_arrive_in_pieces_of_any_size(messages, pieces):
    sent = written(messages)

    async def act(here, other):
        loop, sizes, start = asyncio.get_running_loop(), iter(pieces), 0
        reading = asyncio.ensure_future(read_all(here))
        while start < len(sent):
            stop = start + next(sizes, len(sent))
            await loop.sock_sendall(other, sent[start:stop])
            await asyncio.sleep(0)
            start = stop
        for came, message in zip(await reading, messages, strict=True):
            assert_arrived(came, message)

    async def read_all(here):
        return [await here.read() for _ in messages]

    run(act)


def written(messages):
    """The bytes that are sent for some messages."""
    sent = bytearray()

    async def act(here, other):
        async def listen_to():
            while piece := await asyncio.get_running_loop().sock_recv(other, 1 << 20):
                sent.extend(piece)

        listening = asyncio.ensure_future(listen_to())
        for message in messages:
            await here.write(with_arrays(message))
        here.abort()
        await listening

    run(act)
    return bytes(sent)


def test_a_message_of_more_frames_than_the_system_takes_at_once_arrives():
    many = [to_serialize(np.full(2, n)) for n in range(sockets.PIECES)]

    async def act(here, other):
        there = Socket(other, {})
        writing = asyncio.ensure_future(here.write(many))
        for n, came in enumerate(await there.read()):
            np.testing.assert_array_equal(came, [n, n])
        await writing
        there.abort()

    run(act)


def test_what_came_before_the_end_is_read_and_then_the_end_is_an_error():
    sent = written([1, 2])[:-1]

    async def act(here, other):
        await asyncio.get_running_loop().sock_sendall(other, sent)
        other.close()
        assert await here.read() == 1
        for _ in range(2):
            with pytest.raises(ConnectionResetError, match="other end closed"):
                await here.read()
        with pytest.raises(OSError, match="other end closed"):
            await here.write(3)

    run(act)


def test_who_reads_or_writes_when_the_connection_is_given_up_gets_an_error():
    async def act(here, other):
        waiting = [
            asyncio.ensure_future(here.read()),
            asyncio.ensure_future(here.write(to_serialize(np.zeros(1 << 20)))),
        ]
        await asyncio.sleep(0.01)
        assert not any(each.done() for each in waiting)
        here.abort()
        for each in waiting:
            with pytest.raises(ConnectionAbortedError, match="closed here"):
                await each

    run(act)


def test_bytes_that_are_no_message_end_the_connection():
    sent = written([1])

    async def act(here, other):
        await asyncio.get_running_loop().sock_sendall(other, sent[:16] + b"\xc1" * len(sent[16:]))
        for _ in range(2):
            with pytest.raises(FormatError):
                await here.read()

    run(act)


def test_a_connection_keeps_no_message_that_it_has_handed_over():
    async def act(here, other):
        there = Socket(other, {})
        rows = np.zeros(AHEAD)
        sent = weakref.ref(rows)
        writing = asyncio.ensure_future(here.write(to_serialize(rows)))
        came = await there.read()
        arrived = weakref.ref(came.base if came.base is not None else came)
        await writing
        del rows, came, writing
        gc.collect()
        assert sent() is arrived() is None
        there.abort()

    run(act)


@pytest.mark.parametrize(
    ("scheme", "is_taken"), [("tcp://127.0.0.1:0", True), ("inproc://", False)]
)
def test_the_socket_of_a_plain_tcp_connection_is_taken_and_that_of_no_other(scheme, is_taken):
    async def answer(comm):
        await comm.read()  # until then, nothing may be sent to the other end
        kept = await sockets.accept(comm)
        assert isinstance(kept, Socket) is is_taken
        await kept.write(2 * await kept.read())
        await kept.write("last")
        await asyncio.sleep(0.1)
        kept.abort()

    async def ask():
        listener = await listen(scheme, answer)
        comm = await connect(listener.contact_address)
        await comm.write("op")
        kept = sockets.keep(comm)
        assert isinstance(kept, Socket) is is_taken
        assert comm.closed() is is_taken
        assert await kept.read() == sockets.READY
        await kept.write(21)
        assert [await kept.read(), await kept.read()] == [42, "last"]
        with pytest.raises((ConnectionResetError, CommClosedError)):
            await kept.read()
        kept.abort()
        listener.stop()

    asyncio.run(asyncio.wait_for(ask(), DEADLINE))


@pytest.mark.parametrize("end", ["asks", "accepts"])
def test_a_connection_that_fails_as_it_begins_leaves_no_socket_open(end, monkeypatch):
    async def fail(*_):
        raise ConnectionResetError("it fails here")

    async def answer(comm):
        with suppress(OSError):
            await sockets.accept(comm)

    async def ask():
        listener = await listen("tcp://127.0.0.1:0", answer)
        before = open_sockets()
        if end == "asks":
            monkeypatch.setattr(Socket, "read", fail)
            asking = SimpleNamespace(address="", connection_args={})
            with pytest.raises(ConnectionResetError, match="fails here"):
                await sockets.ask(asking, listener.contact_address, "op")
        else:
            monkeypatch.setattr(Socket, "write", fail)
            comm = await connect(listener.contact_address)
            with pytest.raises(OSError, match="closed"):
                await comm.read()
        while len(open_sockets()) > len(before):
            await asyncio.sleep(0.01)
        listener.stop()

    asyncio.run(asyncio.wait_for(ask(), DEADLINE))


def open_sockets():
    """The sockets of this process, of which others may be closed meanwhile."""
    found = []
    for number in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/self/fd/{number}"))
    return [name for name in found if name.startswith("socket:")]


def test_a_connection_that_is_closed_already_has_no_socket_to_take():
    async def ask():
        listener = await listen("tcp://127.0.0.1:0", lambda comm: comm.close())
        comm = await connect(listener.contact_address)
        comm.abort()
        with pytest.raises(CommClosedError, match="was lost as it began"):
            sockets.keep(comm)
        listener.stop()

    asyncio.run(asyncio.wait_for(ask(), DEADLINE))
