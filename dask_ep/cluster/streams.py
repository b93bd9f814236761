"""How are packets and answers sent between two workers?

One connection for each pair of an asking and an answering worker, opened with the first packet and
kept:

    asks       Line ──── [number, request], ... ────> Stream    answers
                    <──── [number, answer], ...  ────

Requests and answers that queue while a message is written go with the next one, and answers come in
any order. When a connection ends, every request without an answer gets an error.
"""

from __future__ import annotations

import asyncio
import itertools
import types
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from typing import Any

import numpy as np
from distributed import Worker
from distributed.comm import Comm
from distributed.protocol import to_serialize

from dask_ep.arrays.namespaces import Array
from dask_ep.cluster import sockets
from dask_ep.cluster.sockets import Socket

SMALL = 16384
"""Bytes up to which an array is sent inside its message: a separate frame costs Dask some 100 us at
each end."""


class Stream:
    """One end of a connection: `send` queues parts, and `hear` is called with received ones.

    Parameters
    ----------
    hear : called with the parts of each received message, on the event loop
    """

    def __init__(self, hear: Callable[..., None]):
        self._hear = hear
        self._comm: Comm | Socket | None = None
        self._waiting: list[list] = []
        self._is_writing = False
        self._rest: asyncio.Task | None = None  # event loops keep no task alive
        self._error: Exception | None = None

    def send(self, *message: Any) -> None:
        """Send a message, once there is a connection. It is not kept after that."""
        self._waiting.append(list(message))
        self._write_soon()

    async def run(self, comm: Comm | Socket) -> None:
        """Receive messages until the connection ends, which raises OSError."""
        self._comm = comm
        self._write_soon()
        try:
            while True:
                came = deque(await comm.read())
                while came:
                    self._hear(*came.popleft())
        except OSError as error:
            raise self._error or error from None
        finally:
            comm.abort()

    def _write_soon(self) -> None:
        if self._comm is not None and not self._is_writing and self._waiting:
            self._is_writing = True
            self._rest = run_eagerly(self._write(self._comm))

    async def _write(self, comm: Comm | Socket) -> None:
        try:
            while self._waiting:
                going, self._waiting = self._waiting, []
                await comm.write(going, on_error="raise")
                del going
        except Exception as error:  # `run` raises it
            self._error = error
            comm.abort()
        finally:
            self._is_writing = False


class Line:
    """The asking end of a connection with one owner.

    Parameters
    ----------
    worker, owner : the worker that asks, and the address of the one that answers
    op : name of the owner's handler
    """

    def __init__(self, worker: Worker, owner: str, op: str):
        self._asked: dict[int, tuple[int, asyncio.Future]] = {}
        self._numbers = itertools.count()
        self._stream = Stream(self._hear)
        self._running = asyncio.ensure_future(self._run(worker, owner, op))

    @property
    def is_over(self) -> bool:
        return self._running.done()

    @property
    def waiting(self) -> int:
        """Rows of the packets without an answer; from any thread."""
        return sum(rows for rows, _ in list(self._asked.values()))

    def ask(self, rows: int, *request: Any) -> asyncio.Future:
        """Send a request with a packet of so many rows, and return the answer to come.

        Raises
        ------
        OSError
            If the connection has ended, or later, from the answer, if it fails.
        """
        if self.is_over:  # nobody would raise it
            raise ConnectionError("the connection has ended")
        number, answer = next(self._numbers), asyncio.get_running_loop().create_future()
        self._asked[number] = rows, answer
        self._stream.send(number, *request)
        return answer

    def close(self) -> None:
        """Fail every request."""
        self._running.cancel()
        self._give_up(ConnectionError("the connection was given up"))  # it may not have started

    def _hear(self, number: int, answer: Any) -> None:
        _, asked = self._asked.pop(number)
        if not asked.done():  # nobody waits for it if its chunk has failed
            asked.set_result(answer)

    async def _run(self, worker: Worker, owner: str, op: str) -> None:
        try:
            await self._stream.run(await sockets.ask(worker, owner, op))
        except Exception as error:
            self._give_up(error)
        finally:
            self._give_up(ConnectionError(f"the connection to {owner} has ended"))

    def _give_up(self, error: Exception) -> None:
        while self._asked:
            _, (_, asked) = self._asked.popitem()
            if not asked.done():
                asked.set_exception(error)


def run_eagerly(coroutine: Coroutine[Any, Any, None]) -> asyncio.Task | None:
    """Run a coroutine until it waits for something, and the rest of it, if any, as a task.

    Writing to a TCP connection waits for nothing; a task for each message costs more than that.
    """
    try:
        waits_for = coroutine.send(None)
    except StopIteration:
        return None
    return asyncio.get_running_loop().create_task(_finish(coroutine, waits_for))


async def _finish(coroutine: Coroutine[Any, Any, None], waits_for: Any) -> None:
    await _rest_of(coroutine, waits_for)


@types.coroutine
def _rest_of(coroutine: Coroutine[Any, Any, None], waits_for: Any) -> Generator[Any, Any, None]:
    yield waits_for
    yield from coroutine


def to_message(array: Array | None) -> Any:
    """An array in the form that messages contain."""
    if not isinstance(array, np.ndarray) or array.nbytes > SMALL:
        return None if array is None else to_serialize(array)
    if np.dtype(array.dtype.str) != array.dtype:  # such as bfloat16, "<V2"
        return to_serialize(array)
    return [array.dtype.str, list(array.shape), array.tobytes()]


def from_message(came: Any) -> Any:
    """The array that `to_message` was given; small ones are read-only."""
    if not isinstance(came, list | tuple):
        return came
    dtype, shape, data = came
    return np.frombuffer(data, dtype).reshape(shape)
