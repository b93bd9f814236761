"""How are packets and answers sent between two workers?

One connection for each pair of an asking and an answering worker, opened with the first packet and
kept:

    asks       Line ──── number, request ────>     answers
                    <──── number, answer ────

Answers come in any order. When a connection ends, every request without an answer gets an error.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from typing import Any

import numpy as np
from distributed import Worker
from distributed.protocol import to_serialize

from dask_ep.arrays.namespaces import Array
from dask_ep.cluster import connections
from dask_ep.cluster.connections import READY, Connection

SMALL = 16384
"""Bytes up to which an array is sent inside its message: a separate frame costs Dask some 100 us at
each end."""


class Line:
    """The asking end of a connection with one owner.

    Parameters
    ----------
    worker, owner : the worker that asks, and the address of the one that answers
    op : name of the owner's handler
    """

    def __init__(self, worker: Worker, owner: str, op: str):
        self._asked: dict[int | str, tuple[int, asyncio.Future]] = {}
        self._numbers = itertools.count()
        self._connection: Connection | None = None
        self._is_ready = False
        self._early: deque[tuple] = deque()  # requests that wait until it is
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
        if self._is_ready:
            self._send(number, *request)
        else:
            self._early.append((number, *request))
        return answer

    def close(self) -> None:
        """Fail every request."""
        self._running.cancel()
        self._give_up(ConnectionError("the connection was given up"))  # it may not have started

    def _send(self, number: int, *request: Any) -> None:
        assert self._connection is not None
        try:
            self._connection.send(number, *request)
        except Exception as error:  # it cannot be serialized
            self._asked.pop(number)[1].set_exception(error)

    def _hear(self, number: int | str, answer: Any = None) -> None:
        if number == READY:
            self._is_ready = True
            while self._early:
                self._send(*self._early.popleft())
            return
        _, asked = self._asked.pop(number)
        if not asked.done():  # nobody waits for it if its chunk has failed
            asked.set_result(answer)

    async def _run(self, worker: Worker, owner: str, op: str) -> None:
        try:
            self._connection = await connections.ask(worker, owner, op, self._hear)
            await self._connection.run()
        except Exception as error:
            self._give_up(error)
        finally:
            self._give_up(ConnectionError(f"the connection to {owner} has ended"))

    def _give_up(self, error: Exception) -> None:
        while self._asked:
            _, (_, asked) = self._asked.popitem()
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
