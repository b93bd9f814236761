"""How do messages travel between two workers?

Dask connects them, and what encrypts or needs no sockets remains Dask's (TLS, UCX, in the same
process). But Dask's plain TCP connections read and write through Tornado's streams, which costs
each end some 80 us per small message, and on the event loop alone. So of these each end keeps only
the socket, and any thread writes to it:

    asks                                 answers
    request `op`  ──────── Dask ───────>
                  <───── connection ──── READY
    messages      <───── connection ───> messages

A message is serialized by Dask, into frames. On a socket they are sent after their number and the
size of each, in eight bytes every one. Each received frame has memory of its own.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import deque
from collections.abc import Callable, Generator, Mapping
from contextlib import suppress
from itertools import islice
from threading import Lock
from typing import Any

import numpy as np
from distributed import Worker
from distributed.comm import Comm

from dask_ep.arrays import memory
from dask_ep.cluster import dask_internals

READY = "ready"
"""The first message: what is sent to the other end before it has this socket might be lost."""

AHEAD = 16384
"""Bytes read at once beyond the part of a message that is being read."""

PIECES = 1000
"""Frames written at once; Linux takes 1024."""

Hear = Callable[..., None]
"""Called on the event loop with the parts of each message that has come."""


class Socket:
    """A connected TCP socket that nothing else reads.

    Parameters
    ----------
    connected : must not block
    context : of Dask's serialization for the other end
    hear : called with the parts of each received message
    """

    def __init__(self, connected: socket.socket, context: Mapping[str, Any], hear: Hear):
        self._socket, self._context, self._hear = connected, context, hear
        self._loop = asyncio.get_running_loop()
        self._assembling = self._assemble()
        self._ahead = memoryview(bytearray(AHEAD))
        self._rest = self._part = buffer(next(self._assembling))
        self._lock = Lock()  # of what is sent, and of closing
        self._todo: deque[memoryview] = deque()
        self._is_blocked = False
        self._error: Exception | None = None
        self._has_ended = asyncio.Event()
        self._loop.add_reader(connected, self._receive)

    async def run(self) -> None:
        """Wait for the end of the connection, which raises OSError."""
        try:
            await self._has_ended.wait()
        finally:
            self.abort()
        assert self._error is not None
        raise self._error

    def send(self, *message: Any) -> None:
        """Send a message; from any thread. It is lost if the connection has ended."""
        frames = [memoryview(f) for f in dask_internals.to_frames(message, self._context)]
        sizes = [frame.nbytes for frame in frames]
        frames.insert(0, memoryview(struct.pack(f"={len(sizes) + 1}Q", len(sizes), *sizes)))
        del message
        with self._lock:
            if self._error is None:
                self._todo += [frame.cast("B") for frame in frames if frame.nbytes]
                del frames  # arrays of others are free once they are sent
                if not self._is_blocked:
                    self._write()

    def abort(self) -> None:
        """End the connection."""
        self._end(ConnectionAbortedError("the connection was closed here"))

    def _write(self) -> None:
        """Send what the system takes now, and the rest when it takes more; `_lock` is held."""
        todo = self._todo
        try:
            while todo:
                sent = self._socket.sendmsg(islice(todo, PIECES))
                while todo and sent >= len(todo[0]):
                    sent -= len(todo.popleft())
                if sent:
                    todo[0] = todo[0][sent:]
        except BlockingIOError:
            if not self._is_blocked:
                self._is_blocked = True
                call_on(self._loop, self._watch)
        except OSError as error:
            call_on(self._loop, self._end, error)

    def _watch(self) -> None:
        if self._error is None:
            self._loop.add_writer(self._socket, self._write_on)

    def _write_on(self) -> None:
        with self._lock:
            self._write()
            if not self._todo:
                self._is_blocked = False
                self._loop.remove_writer(self._socket)

    def _receive(self) -> None:
        """Take what has come: the rest of a part, and what is ahead of it."""
        try:
            count, *_ = self._socket.recvmsg_into([self._rest, self._ahead])
            if not count:
                raise ConnectionResetError("the other end closed the connection")
            taken = min(count, len(self._rest))
            self._rest, ahead = self._rest[taken:], self._ahead[: count - taken]
            while not self._rest:
                self._rest = self._part = buffer(self._assembling.send(self._part))
                taken = min(len(ahead), len(self._rest))
                self._rest[:taken] = ahead[:taken]
                self._rest, ahead = self._rest[taken:], ahead[taken:]
        except BlockingIOError:
            return
        except Exception as error:  # a message that cannot be read is the end of all
            self._end(error)

    def _assemble(self) -> Generator[int, memoryview, None]:
        """Make messages of parts: yields the size of each part, and receives it."""
        while True:
            (count,) = struct.unpack("=Q", (yield 8))
            sizes = struct.unpack(f"={count}Q", (yield 8 * count))
            frames = []
            for size in sizes:
                frames.append((yield size))  # noqa: PERF401 - no comprehension may yield
            message = dask_internals.from_frames(frames)
            del frames  # of arrays that others free
            self._hear(*message)
            del message

    def _end(self, error: Exception) -> None:
        with self._lock:
            if self._error is None:
                self._error = error
                self._todo.clear()
                self._loop.remove_reader(self._socket)
                self._loop.remove_writer(self._socket)
                self._socket.close()
        self._has_ended.set()


class DaskConnection:
    """A connection of Dask, with the interface of `Socket`.

    Messages that wait while others are written go with the next ones.
    """

    def __init__(self, comm: Comm, hear: Hear):
        dask_internals.keep_on_loop(comm)
        self._comm, self._hear = comm, hear
        self._loop = asyncio.get_running_loop()
        self._waiting: list[list] = []
        self._writing: asyncio.Task | None = None
        self._error: Exception | None = None

    async def run(self) -> None:
        """Receive messages until the connection ends, which raises OSError."""
        try:
            while True:
                came = deque(await self._comm.read())
                while came:
                    self._hear(*came.popleft())
        except OSError as error:
            raise self._error or error from None
        finally:
            self.abort()

    def send(self, *message: Any) -> None:
        """Send a message; from any thread. It is lost if the connection has ended."""
        call_on(self._loop, self._queue, list(message))  # Dask looks into lists alone

    def abort(self) -> None:
        """End the connection."""
        self._comm.abort()

    def _queue(self, message: list) -> None:
        self._waiting.append(message)
        if self._writing is None:
            self._writing = self._loop.create_task(self._write())

    async def _write(self) -> None:
        try:
            while self._waiting:
                going, self._waiting = self._waiting, []
                await self._comm.write(going, on_error="raise")
                del going
        except Exception as error:  # `run` raises it
            self._error = error
            self.abort()
        finally:
            self._writing = None


Connection = Socket | DaskConnection


def buffer(size: int) -> memoryview:
    """Aligned memory for a part of a message: that of arrays which have died, if it is large."""
    return memory.empty((size,), np.uint8).data


def call_on(loop: asyncio.AbstractEventLoop, act: Callable[..., None], *arguments: Any) -> None:
    with suppress(RuntimeError):  # it is closed
        loop.call_soon_threadsafe(act, *arguments)


def keep(comm: Comm, hear: Hear) -> Connection:
    """Keep the socket of a connection, if it has one that nothing else has to read.

    Raises
    ------
    OSError
        If the connection fails.
    """
    taken = dask_internals.take_socket(comm)
    return DaskConnection(comm, hear) if taken is None else Socket(*taken, hear)


async def ask(worker: Worker, address: str, op: str, hear: Hear) -> Connection:
    """Open a connection to another worker, and pass it to that worker's handler of requests `op`.

    Nothing may be sent before READY has come.

    Raises
    ------
    OSError
        If the connection fails.
    """
    return keep(await dask_internals.open_stream(worker, address, op), hear)


def accept(comm: Comm, hear: Hear) -> Connection:
    """Take a connection that another worker has opened with `ask`.

    Raises
    ------
    OSError
        If the connection fails.
    """
    connection = keep(comm, hear)
    connection.send(READY)
    return connection
