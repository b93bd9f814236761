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
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
from distributed import Worker
from distributed.comm import Comm
from distributed.protocol import to_serialize

from dask_ep.arrays.namespaces import Array
from dask_ep.cluster import dask_internals

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
        self._comm: Comm | None = None
        self._waiting: list[list] = []
        self._writing: asyncio.Task | None = None
        self._error: Exception | None = None

    def send(self, *message: Any) -> None:
        """Send a message, once there is a connection. It is not kept after that."""
        self._waiting.append(list(message))
        self._write_soon()

    async def run(self, comm: Comm) -> None:
        """Receive messages until the connection ends, which raises OSError."""
        dask_internals.keep_on_loop(comm)
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
        if self._comm is not None and self._writing is None and self._waiting:
            self._writing = asyncio.get_running_loop().create_task(self._write(self._comm))

    async def _write(self, comm: Comm) -> None:
        try:
            while self._waiting:
                going, self._waiting = self._waiting, []
                await comm.write(going, on_error="raise")
                del going
        except Exception as error:  # `run` raises it
            self._error = error
            comm.abort()
        finally:
            self._writing = None


class Line:
    """The asking end of a connection with one owner.

    Parameters
    ----------
    worker, owner : the worker that asks, and the address of the one that answers
    op : name of the owner's handler
    """

    def __init__(self, worker: Worker, owner: str, op: str):
        self._asked: dict[int, asyncio.Future] = {}
        self._numbers = itertools.count()
        self._stream = Stream(self._hear)
        self._running = asyncio.ensure_future(self._run(worker, owner, op))

    @property
    def is_over(self) -> bool:
        return self._running.done()

    async def ask(self, *request: Any) -> Any:
        """Send a request, and wait for the answer.

        Raises
        ------
        OSError
            If the connection fails or has ended.
        """
        if self.is_over:  # nobody would raise it
            raise ConnectionError("the connection has ended")
        number = next(self._numbers)
        self._asked[number] = answer = asyncio.get_running_loop().create_future()
        self._stream.send(number, *request)
        del request
        try:
            return await answer
        finally:
            self._asked.pop(number, None)

    def close(self) -> None:
        """Fail every request."""
        self._running.cancel()
        self._give_up(ConnectionError("the connection was given up"))  # it may not have started

    def _hear(self, number: int, answer: Any) -> None:
        asked = self._asked.pop(number, None)  # none if the request was cancelled
        if asked is not None and not asked.done():
            asked.set_result(answer)

    async def _run(self, worker: Worker, owner: str, op: str) -> None:
        try:
            await self._stream.run(await dask_internals.open_stream(worker, owner, op))
        except Exception as error:
            self._give_up(error)
        finally:
            self._give_up(ConnectionError(f"the connection to {owner} has ended"))

    def _give_up(self, error: Exception) -> None:
        for asked in self._asked.values():
            if not asked.done():
                asked.set_exception(error)


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
