"""What is sent arrives in whatever pieces the system makes of it, or is an error."""

import asyncio
import gc
import os
import socket
import weakref
from contextlib import suppress
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from distributed.comm import CommClosedError, connect, listen
from distributed.protocol import to_serialize
from hypothesis import given
from hypothesis import strategies as st
from msgpack.exceptions import FormatError

from dask_ep.cluster import connections
from dask_ep.cluster.connections import AHEAD, READY, DaskConnection, Socket
from tests.cluster_processes import DEADLINE


class Heard:
    """What has come over a connection, to be awaited."""

    def __init__(self):
        self._came, self._ending = asyncio.Queue(), None

    def __call__(self, *message):
        self._came.put_nowait(message)

    def begin(self, connection):
        """Run a connection that calls this."""
        self._ending = asyncio.ensure_future(connection.run())
        return connection

    async def next(self):
        """The only part of the next message, or the error of the end."""
        coming = asyncio.ensure_future(self._came.get())
        await asyncio.wait([coming, self._ending], return_when=asyncio.FIRST_COMPLETED)
        if coming.done():
            (message,) = coming.result()
            return message
        coming.cancel()
        return await self._ending

    async def end(self):
        return await self._ending


def socket_of(connected):
    """A connection over a socket, and what it hears."""
    heard = Heard()
    return heard.begin(Socket(connected, {}, heard)), heard


def run(act, size=None):
    """Call a coroutine function with a connection, what it hears, and the other end's socket."""

    async def ours():
        one, other = socket.socketpair()
        for each in (one, other):
            each.setblocking(False)
            for option in (socket.SO_SNDBUF, socket.SO_RCVBUF) if size else ():
                each.setsockopt(socket.SOL_SOCKET, option, size)
        here, heard = socket_of(one)
        try:
            await asyncio.wait_for(act(here, heard, other), DEADLINE)
        finally:
            here.abort()
            other.close()
            with suppress(Exception):
                await heard.end()

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


@given(messages=MESSAGES, size=st.sampled_from([None, 4608]), threads=st.booleans())
def test_messages_arrive_as_they_were_sent(messages, size, threads):
    async def act(here, heard, other):
        there, heard_there = socket_of(other)
        both = [asyncio.ensure_future(send(end)) for end in (here, there)]
        for message in messages:
            assert_arrived(await heard.next(), message)
            assert_arrived(await heard_there.next(), message)
        await asyncio.gather(*both)
        there.abort()
        with pytest.raises(ConnectionAbortedError):
            await heard_there.end()

    async def send(end):
        for message in messages:
            if threads:
                await asyncio.to_thread(end.send, with_arrays(message))
            else:
                end.send(with_arrays(message))

    run(act, size)


def test_messages_of_several_threads_arrive_whole():
    many = 200

    async def act(here, heard, other):
        there, heard_there = socket_of(other)
        send = [asyncio.to_thread(send_all, here, n) for n in range(4)]
        sending = asyncio.gather(*send)
        came = [await heard_there.next() for _ in range(4 * many)]
        await sending
        for n in range(4):
            of_thread = [(i, len(array)) for thread, i, array in came if thread == n]
            assert of_thread == [(i, 97 * i) for i in range(many)]
        there.abort()
        with suppress(OSError):
            await heard_there.end()

    def send_all(here, n):
        for i in range(many):
            here.send([n, i, to_serialize(np.full(97 * i, n))])

    run(act, 4608)


@given(messages=MESSAGES, pieces=st.lists(st.integers(1, 2 * AHEAD), min_size=1))
def test_messages_arrive_in_pieces_of_any_size(messages, pieces):
    sent = written(messages)

    async def act(here, heard, other):
        loop, sizes, start = asyncio.get_running_loop(), iter(pieces), 0
        while start < len(sent):
            stop = start + next(sizes, len(sent))
            await loop.sock_sendall(other, sent[start:stop])
            await asyncio.sleep(0)
            start = stop
        for message in messages:
            assert_arrived(await heard.next(), message)

    run(act)


def written(messages):
    """The bytes that are sent for some messages."""
    sent = bytearray()

    async def act(here, heard, other):
        read = partial(asyncio.get_running_loop().sock_recv, other, 1 << 20)
        for message in messages:
            here.send(with_arrays(message))
        while here._todo:
            sent.extend(await read())
        here.abort()
        while piece := await read():
            sent.extend(piece)

    run(act)
    return bytes(sent)


def test_a_message_of_more_frames_than_the_system_takes_at_once_arrives():
    many = [to_serialize(np.full(2, n)) for n in range(connections.PIECES)]

    async def act(here, heard, other):
        there, heard_there = socket_of(other)
        here.send(many)
        for n, came in enumerate(await heard_there.next()):
            np.testing.assert_array_equal(came, [n, n])
        there.abort()
        with suppress(OSError):
            await heard_there.end()

    run(act)


def test_what_came_before_the_end_is_heard_and_then_the_end_is_an_error():
    sent = written([1, 2])[:-1]

    async def act(here, heard, other):
        await asyncio.get_running_loop().sock_sendall(other, sent)
        other.close()
        assert await heard.next() == 1
        with pytest.raises(ConnectionResetError, match="other end closed"):
            await heard.next()
        here.send(3)  # it is lost, as everything on its way is

    run(act)


def test_a_connection_ends_if_nobody_reads_what_it_sends():
    async def act(here, heard, other):
        here.send(to_serialize(np.zeros(1 << 20)))
        other.close()
        with pytest.raises(OSError, match="reset|Broken pipe|closed"):
            await heard.end()

    run(act, 4608)


def test_who_waits_when_the_connection_is_given_up_gets_an_error():
    async def act(here, heard, other):
        rows = np.zeros(1 << 20)
        sent = weakref.ref(rows)
        here.send(to_serialize(rows))
        del rows
        await asyncio.sleep(0.01)
        assert sent() is not None
        here.abort()
        with pytest.raises(ConnectionAbortedError, match="closed here"):
            await heard.end()
        gc.collect()
        assert sent() is None

    run(act)


def test_bytes_that_are_no_message_end_the_connection():
    sent = written([1])

    async def act(here, heard, other):
        await asyncio.get_running_loop().sock_sendall(other, sent[:16] + b"\xc1" * len(sent[16:]))
        with pytest.raises(FormatError):
            await heard.end()

    run(act)


def test_a_connection_keeps_no_message_that_it_has_handed_over():
    async def act(here, heard, other):
        there, heard_there = socket_of(other)
        rows = np.zeros(AHEAD)
        sent = weakref.ref(rows)
        here.send(to_serialize(rows))
        came = await heard_there.next()
        arrived = weakref.ref(came.base if came.base is not None else came)
        del rows, came
        gc.collect()
        assert sent() is arrived() is None
        there.abort()
        with suppress(OSError):
            await heard_there.end()

    run(act)


def test_large_messages_arrive_in_memory_that_is_used_again():
    """New memory costs as much as sending it."""

    async def act(here, heard, other):
        there, heard_there = socket_of(other)
        places = set()
        for n in range(4):
            here.send(to_serialize(np.full(4 << 20, n, np.uint8)))
            came = await heard_there.next()
            assert (came == n).all()
            places.add(came.ctypes.data)
            del came
        assert len(places) == 1
        there.abort()
        with suppress(OSError):
            await heard_there.end()

    run(act)


class Comm:
    """Keeps what is written, and can be read once it is."""

    def __init__(self):
        self.written, self.go_on = [], asyncio.Event()

    async def write(self, message, **options):
        await self.go_on.wait()
        self.written.append(list(message))

    async def read(self):
        while len(self.written) < 2:
            await asyncio.sleep(0)
        raise OSError("it ends here")

    def abort(self):
        pass


def test_what_waits_while_a_message_is_written_goes_in_the_next_one():
    async def act():
        comm = Comm()
        connection = DaskConnection(comm, lambda *message: None)
        connection.send(1)
        await asyncio.sleep(0.01)
        connection.send(2)
        await asyncio.to_thread(connection.send, 3)
        comm.go_on.set()
        with pytest.raises(OSError, match="it ends here"):
            await connection.run()
        return comm.written

    assert asyncio.run(act()) == [[[1]], [[2], [3]]]


def test_what_cannot_be_written_ends_a_connection_of_dask():
    class Full(Comm):
        is_over = False

        async def write(self, message, **options):
            raise TypeError("it cannot be serialized")

        async def read(self):
            while not self.is_over:
                await asyncio.sleep(0)
            raise OSError("it was closed")

        def abort(self):
            self.is_over = True

    async def act():
        connection = DaskConnection(Full(), lambda *message: None)
        connection.send(1)
        with pytest.raises(TypeError, match="cannot be serialized"):
            await asyncio.wait_for(connection.run(), DEADLINE)

    asyncio.run(act())


@pytest.mark.parametrize(
    ("scheme", "is_taken"), [("tcp://127.0.0.1:0", True), ("inproc://", False)]
)
def test_the_socket_of_a_plain_tcp_connection_is_taken_and_that_of_no_other(scheme, is_taken):
    async def answer(comm):
        await comm.read()  # until then, nothing may be sent to the other end
        heard = Heard()
        kept = heard.begin(connections.accept(comm, heard))
        assert isinstance(kept, Socket) is is_taken
        kept.send(2 * await heard.next())
        kept.send("last")
        await asyncio.sleep(0.1)
        kept.abort()
        with suppress(OSError):
            await heard.end()

    async def ask():
        listener, heard = await listen(scheme, answer), Heard()
        asking = SimpleNamespace(address="", connection_args={})
        kept = await connections.ask(asking, listener.contact_address, "op", heard)
        heard.begin(kept)
        assert isinstance(kept, Socket) is is_taken
        assert await heard.next() == READY
        kept.send(21)
        assert [await heard.next(), await heard.next()] == [42, "last"]
        with pytest.raises((ConnectionResetError, CommClosedError)):
            await heard.next()
        listener.stop()

    asyncio.run(asyncio.wait_for(ask(), DEADLINE))


def test_a_connection_that_ends_as_it_begins_leaves_no_socket_open():
    async def answer(comm):
        heard = Heard()
        connection = heard.begin(connections.accept(comm, heard))
        connection.abort()
        with pytest.raises(ConnectionAbortedError):
            await heard.end()

    async def ask():
        listener = await listen("tcp://127.0.0.1:0", answer)
        before, heard = open_sockets(), Heard()
        asking = SimpleNamespace(address="", connection_args={})
        heard.begin(await connections.ask(asking, listener.contact_address, "op", heard))
        with pytest.raises(OSError, match="closed"):
            await heard.end()
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
            connections.keep(comm, print)
        listener.stop()

    asyncio.run(asyncio.wait_for(ask(), DEADLINE))
