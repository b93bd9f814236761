"""Which ranks are served on this worker, and how is a packet for them answered?

Packing, serving and combining share as many cores as the worker has threads (`core`).
"""

from __future__ import annotations

import asyncio
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

from distributed.protocol import to_serialize

from dask_ep.arrays.namespaces import Array
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
    #: what was seen of the rows that have been served, where they are observed

    @property
    def number(self) -> int:
        return self.where.chunk


class Slices:
    """The experts of the ranks that a worker serves, by layer and rank."""

    def __init__(self, address: str, threads: int):
        self.address, self.threads = address, threads
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="dask-ep-serve")
        self.tally = Tally()
        self._cores = threading.Semaphore(threads)
        self._held: dict[tuple[str, int], Any] = {}
        self._loading: defaultdict[tuple[str, int], threading.Lock] = defaultdict(threading.Lock)
        self._is_closing = False

    def __len__(self) -> int:
        return len(self._held)

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
        """Serve a rank no more."""
        self._held.pop((token, rank), None)

    def drop_layer(self, token: str) -> None:
        """Serve no rank of a layer any more."""
        for kept in (self._held, self._loading):
            for key in [key for key in list(kept) if key[0] == token]:
                kept.pop(key, None)

    def close(self) -> None:
        """Answer nobody any more."""
        self._is_closing = True
        self.pool.shutdown(wait=False, cancel_futures=True)

    def metric(self) -> dict[str, Any]:
        """What the scheduler hears with each heartbeat."""
        held = [[*key, getattr(experts, "nbytes", 0)] for key, experts in self._held.items()]
        return {**self.tally.metric(), "threads": self.threads, "slices": held}

    @contextmanager
    def core(self) -> Iterator[None]:
        """Hold one of the cores that packing, serving and combining share."""
        with self._cores:
            start = tally.now()
            try:
                yield
            finally:
                self.tally.count_core(tally.now() - start)

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
            with self.core():
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

    async def answer(
        self,
        comm: Any = None,
        *,
        token: str,
        ranks: list[int],
        chunk: int,
        sizes: list[int],
        observe: list[Any] | None,
        sender: str,
        arrays: list[Array | None],
    ) -> dict[str, Any]:
        """Answer a packet, or None if one of the ranks is not served here.

        With the rows of each rank: all in one array on the host, an array for each on a device.
        Where rows are observed, what was seen of them comes with the answers.
        """
        slices = [self._held.get((token, rank)) for rank in ranks]
        if self._is_closing or any(experts is None for experts in slices):
            return {"status": "OK", "answers": None}
        world_size, num_local, d_out = sizes
        watched = None if observe is None else Observe(tuple(observe[0]), *observe[1:])
        exchange = Exchange(token, world_size, num_local, d_out, None, watched)
        packet = [Packet(*arrays)]
        del arrays
        serve = partial(self._serve_packet, packet, ranks, slices, chunk, exchange, sender)
        with self.tally.queued(token, ranks, len(packet[0].rows)):
            whole, parts, tables = await asyncio.get_running_loop().run_in_executor(
                self.pool, serve, tally.now()
            )
        answers = parts if whole is None else [whole]
        return {
            "status": "OK",
            "answers": [to_serialize(answer) for answer in answers],
            "rows": [len(part) for part in parts],
            "seen": [to_serialize(table) for table in tables],
        }

    def _serve_packet(
        self,
        packet: list[Packet],
        ranks: list[int],
        slices: list[Any],
        chunk: int,
        exchange: Exchange,
        sender: str,
        came: float,
    ) -> tuple[Array | None, list[Array], list[Array]]:
        seen = [begin_seen(exchange.observe, rank, exchange.num_local) for rank in ranks]
        with self.core():
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
