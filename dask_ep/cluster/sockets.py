"""How do messages travel over a plain TCP connection between two workers?

Dask's own connections read and write through Tornado's streams, which costs each end some 80 us per
small message. So once Dask has connected two workers, each keeps only the socket:

    asks                                 answers
    request `op`  ──────── Dask ───────>
                  <─────── socket ────── READY
    messages      <─────── socket ─────> messages

A message is serialized by Dask, into frames. They are sent after their number and the size of each,
in eight bytes every one. Each received frame has memory of its own.

Connections of other kinds (TLS, UCX, in the same process) remain Dask's.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import deque
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
from distributed import Worker
from distributed.comm import Comm

from dask_ep.cluster import dask_internals

READY = "ready"

AHEAD = 16384
"""Bytes read at once beyond the part of a message that is being read."""

PIECES = 1000
"""Frames written at once; Linux takes 1024."""


class Socket:
    """A connected TCP socket that nothing else reads, with what we use of Dask's `Comm`.

    Parameters
    ----------
    connected : must not block
    context : of Dask's serialization for the other end
    """

    def __init__(self, connected: socket.socket, context: Mapping[str, Any]):
        self._socket, self._context = connected, context
        self._loop = asyncio.get_running_loop()
        self._came: deque[Any] = deque()
        self._assembling = self._assemble()
        self._ahead = memoryview(bytearray(AHEAD))
        self._rest = self._part = memory(next(self._assembling))
        self._reader: asyncio.Future | None = None
        self._writer: asyncio.Future | None = None
        self._error: Exception | None = None
        self._loop.add_reader(connected, self._receive)

    async def read(self) -> Any:
        """Wait for the next message.

        Raises
        ------
        OSError
            If the connection has ended.
        """
        while not self._came:
            if self._error is not None:
                raise self._error
            self._reader = self._loop.create_future()
            await self._reader
        return self._came.popleft()

    async def write(self, message: Any, on_error: str = "raise") -> None:
        """Send a message, and return when the system has taken all of it; one call at a time."""
        frames = [memoryview(f) for f in dask_internals.to_frames(message, self._context, on_error)]
        sizes = [frame.nbytes for frame in frames]
        frames.insert(0, memoryview(struct.pack(f"={len(sizes) + 1}Q", len(sizes), *sizes)))
        todo = deque(frame.cast("B") for frame in frames if frame.nbytes)
        del message, frames
        while todo:
            if self._error is not None:
                raise self._error
            try:
                sent = self._socket.sendmsg(islice(todo, PIECES))
            except BlockingIOError:
                await self._until_writable()
                continue
            while todo and sent >= len(todo[0]):
                sent -= len(todo.popleft())
            if sent:
                todo[0] = todo[0][sent:]

    def abort(self) -> None:
        """End the connection: who reads or writes gets an error."""
        self._end(ConnectionAbortedError("the connection was closed here"))

    async def _until_writable(self) -> None:
        self._writer = self._loop.create_future()
        self._loop.add_writer(self._socket, self._write_on)
        await self._writer

    def _write_on(self) -> None:
        self._loop.remove_writer(self._socket)
        wake(self._writer)

    def _receive(self) -> None:
        """Take what has come: the rest of a part, and what is ahead of it."""
        try:
            count, *_ = self._socket.recvmsg_into([self._rest, self._ahead])
            if not count:
                raise ConnectionResetError("the other end closed the connection")
            taken = min(count, len(self._rest))
            self._rest, ahead = self._rest[taken:], self._ahead[: count - taken]
            while not self._rest:
                self._rest = self._part = memory(self._assembling.send(self._part))
                taken = min(len(ahead), len(self._rest))
                self._rest[:taken] = ahead[:taken]
                self._rest, ahead = self._rest[taken:], ahead[taken:]
        except BlockingIOError:
            return
        except Exception as error:  # a message that cannot be read is the end of all
            self._end(error)
        if self._came:
            wake(self._reader)

    def _assemble(self) -> Generator[int, memoryview, None]:
        """Make messages of parts: yields the size of each part, and receives it."""
        while True:
            (count,) = struct.unpack("=Q", (yield 8))
            sizes = struct.unpack(f"={count}Q", (yield 8 * count))
            frames = []
            for size in sizes:
                frames.append((yield size))  # noqa: PERF401 - no comprehension may yield
            self._came.append(dask_internals.from_frames(frames))
            del frames  # of arrays that others free

    def _end(self, error: Exception) -> None:
        if self._error is None:
            self._error = error
            self._loop.remove_reader(self._socket)
            self._loop.remove_writer(self._socket)
            self._socket.close()
        wake(self._reader)
        wake(self._writer)


def memory(size: int) -> memoryview:
    """Memory for a part of a message, aligned and not cleared."""
    return np.empty(size, np.uint8).data


def wake(waits: asyncio.Future | None) -> None:
    if waits is not None and not waits.done():
        waits.set_result(None)


def keep(comm: Comm) -> Comm | Socket:
    """The socket of a connection, if it has one that nothing else has to read."""
    taken = dask_internals.take_socket(comm)
    if taken is None:
        dask_internals.keep_on_loop(comm)
        return comm
    return Socket(*taken)


@contextmanager
def taken_over(opened: Comm) -> Iterator[Comm | Socket]:
    """The same connection as `keep` returns, which is closed if its beginning fails."""
    comm: Comm | Socket = opened
    try:
        comm = keep(opened)
        yield comm
    except BaseException:
        comm.abort()
        raise


async def ask(worker: Worker, address: str, op: str) -> Comm | Socket:
    """Open a connection to another worker, and pass it to that worker's handler of requests `op`.

    Raises
    ------
    OSError
        If the connection fails.
    """
    with taken_over(await dask_internals.open_stream(worker, address, op)) as comm:
        await comm.read()
    return comm


async def accept(opened: Comm) -> Comm | Socket:
    """Take a connection that another worker has opened with `ask`.

    Raises
    ------
    OSError
        If the connection fails.
    """
    with taken_over(opened) as comm:
        await comm.write(READY)
    return comm
