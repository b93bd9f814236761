"""Which ranks are served on this worker, and how is a packet for them answered?

Packing, serving and combining share as many cores as the worker has threads (`core`).
"""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, NamedTuple

from distributed.comm import Comm

from dask_ep.arrays.namespaces import Array
from dask_ep.cluster import dask_internals
from dask_ep.cluster.connections import Connection, accept
from dask_ep.cluster.streams import from_message, to_message
from dask_ep.graph import tally
from dask_ep.graph.chunk import (
    ChunkPlace,
    Exchange,
    Tables,
    begin_seen,
    serve_in_place,
    serve_packet,
    wants_output,
)
from dask_ep.graph.tally import Serving, Tally
from dask_ep.kernel.host_kernel import begin_answers
from dask_ep.kernel.pack import Packet, Packing
from dask_ep.kernel.statistics import Observe

Answers = dict[int, Array]
"""By rank."""


class Chunk(NamedTuple):
    """A token chunk that is in flight."""

    packing: Packing
    where: ChunkPlace
    exchange: Exchange
    tables: Tables
    #: statistics of the rows that have been served, if they are collected

    @property
    def number(self) -> int:
        return self.where.chunk


class Request(NamedTuple):
    """Another worker's request with a packet."""

    ranks: Sequence[int]
    slices: list[Any]
    #: the experts of each rank
    chunk: int
    exchange: Exchange
    sender: str
    came: float
    #: time of arrival


class Cores:
    """Cores for threads that compute, held by `with`; the longest waiting thread goes first.

    Python's own semaphore lets newcomers overtake waiting threads, so that a packet could wait as
    long as there are chunks to pack.
    """

    def __init__(self, count: int):
        self._held, self._count, self._lock = 0, count, threading.Lock()
        self._waiting: deque[threading.Lock] = deque()
        self._seconds, self._since = 0.0, tally.now()

    def seconds(self) -> float:
        """How long cores have been held, all together."""
        with self._lock:
            return self._sum_up()

    def _sum_up(self) -> float:
        now = tally.now()
        self._seconds += self._held * (now - self._since)
        self._since = now
        return self._seconds

    def __enter__(self) -> None:
        with self._lock:
            if self._held < self._count:
                self._sum_up()
                self._held += 1
                return
            turn = threading.Lock()
            turn.acquire()
            self._waiting.append(turn)
        turn.acquire()  # released together with the core of a thread that leaves

    def __exit__(self, *error: object) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._sum_up()
                self._held -= 1


class Slices:
    """The experts of the ranks that a worker serves, by layer and rank."""

    def __init__(self, address: str, threads: int):
        self.address, self.threads = address, threads
        self.tally = Tally()
        self._todo: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self.core = Cores(threads)  # that packing, serving and combining share
        self._held: dict[tuple[str, int], Any] = {}
        self._loading: defaultdict[tuple[str, int], threading.Lock] = defaultdict(threading.Lock)
        self._connections: set[Connection] = set()
        self._is_closing = False
        for _ in range(threads):
            threading.Thread(target=self._work, name="dask-ep-serve", daemon=True).start()

    def open(
        self, token: str, rank: int, load: Callable[[], Any], is_wanted: Callable[[str], bool]
    ) -> None:
        """Load the experts of a rank, unless they are here, and serve it from now on."""
        with self._loading[token, rank]:
            if (token, rank) not in self._held:
                self._held[token, rank] = load()
            if not is_wanted(token):  # closed meanwhile: nothing would drop them
                self._held.pop((token, rank), None)

    def drop(self, token: str, rank: int) -> None:
        """Stop serving a rank."""
        self._held.pop((token, rank), None)

    def drop_layer(self, token: str) -> None:
        """Stop serving all ranks of a layer."""
        for kept in (self._held, self._loading):
            for key in [key for key in list(kept) if key[0] == token]:
                kept.pop(key, None)

    def close(self) -> None:
        """Stop answering."""
        self._is_closing = True
        for _ in range(self.threads):
            self._todo.put(None)
        for connection in list(self._connections):
            connection.abort()

    def metric(self) -> dict[str, Any]:
        """The report to the scheduler with each heartbeat."""
        held = [[*key, getattr(experts, "nbytes", 0)] for key, experts in self._held.items()]
        of_cores = {"core": self.core.seconds(), "threads": self.threads}
        return {**self.tally.metric(), **of_cores, "slices": held}

    def serve_here(self, chunk: Chunk, ranks: Sequence[int]) -> Answers | None:
        """Serve ranks in place, without a packet; None if one of them has moved away."""
        exchange, packing, me, answers = chunk.exchange, chunk.packing, self.address, {}
        parts = [None] * len(ranks)
        if not packing.on_device:
            _, parts = begin_answers(
                packing.tokens,
                packing.segments,
                ranks,
                packing.num_local,
                exchange.d_out,
                wants_output(exchange.observe),
            )
        for rank, part in zip(ranks, parts, strict=True):
            try:
                experts = self._held[exchange.token, rank]
            except KeyError:
                return None
            seen = begin_seen(chunk.exchange.observe, rank, chunk.exchange.num_local)
            with self.core:
                start = tally.now()
                answer = serve_in_place(
                    packing, rank, experts, chunk.number, exchange.d_out, seen, part
                )
                stop = tally.now()
            answers[rank] = answer
            if seen is not None:
                chunk.tables[rank] = seen.table
            rows = len(answer) or chunk.packing.count(rank)
            serving = Serving(chunk.number, rank, rows, me, me, start, stop)
            self.tally.count(stop - start, [serving])
        return answers

    async def listen(self, comm: Comm, sender: str) -> None:
        """Answer the packets that another worker sends over a connection, until it closes."""
        with suppress(OSError):
            connection = accept(comm, lambda *request: self._take(connection, sender, *request))
            self._connections.add(connection)
            try:
                await connection.run()
            finally:
                self._connections.discard(connection)

    def _take(
        self,
        connection: Connection,
        sender: str,
        number: int,
        token: str,
        ranks: Sequence[int],
        chunk: int,
        sizes: Sequence[int],
        observe: Sequence[Any] | None,
        arrays: Sequence[Any],
    ) -> None:
        """Answer a packet; with None if one of the ranks is not served here."""
        slices = [self._held.get((token, rank)) for rank in ranks]
        if self._is_closing or any(experts is None for experts in slices):
            connection.send(number, None)
            return
        world_size, num_local, d_out = sizes
        watched = None if observe is None else Observe(tuple(observe[0]), *observe[1:])
        exchange = Exchange(token, world_size, num_local, d_out, None, watched)
        packet = [Packet(*map(from_message, arrays))]
        request = Request(ranks, slices, chunk, exchange, sender, tally.now())
        rows = len(packet[0].rows)

        def serve() -> None:
            answer = None if self._is_closing else self._answer(packet, request)
            self.tally.count_waiting(token, ranks, -rows)
            try:
                connection.send(number, answer)
            except Exception as error:  # it cannot be serialized
                connection.send(number, dask_internals.remote_error(error))

        self.tally.count_waiting(token, ranks, rows)
        self._todo.put(serve)

    def _work(self) -> None:
        """Serve packets, in a thread of its own, until the worker closes."""
        while (serve := self._todo.get()) is not None:
            serve()
            del serve  # it holds the packet

    def _answer(self, packet: list[Packet], request: Request) -> Any:
        """The reply to a packet: answers, the number of rows of each, and statistics of the rows.

        All answers in one array on the host, an array for each on a device. The packet comes in a
        list, and is removed from it.
        """
        try:
            whole, parts, seen = self._serve_packet(packet, request)
            answers = parts if whole is None else [whole]
            return [
                [to_message(answer) for answer in answers],
                [len(part) for part in parts],
                [to_message(table) for table in seen],
            ]
        except BaseException as error:  # else the error would be lost
            return dask_internals.remote_error(error)

    def _serve_packet(
        self, packet: list[Packet], request: Request
    ) -> tuple[Array | None, list[Array], list[Array]]:
        ranks, slices, chunk, exchange, sender, came = request
        seen = [begin_seen(exchange.observe, rank, exchange.num_local) for rank in ranks]
        with self.core:
            start, count = tally.now(), len(packet[0].rows)
            nbytes = sum(array.nbytes for array in packet[0] if array is not None)
            whole, answers = serve_packet(packet.pop(), ranks, slices, chunk, exchange, seen)
            stop = tally.now()
        step, me = (stop - start) / len(ranks), self.address
        self.tally.count(
            stop - start,
            [
                Serving(
                    chunk, rank, len(answer) or count // len(ranks), sender, me,
                    start + i * step, start + (i + 1) * step,
                    nbytes if i == 0 else 0, answer.nbytes, start - came,
                )
                for i, (rank, answer) in enumerate(zip(ranks, answers, strict=True))
            ],
        )  # fmt: skip
        return whole, answers, [keeper.table for keeper in seen if keeper is not None]
