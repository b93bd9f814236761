"""Which workers does a chunk ask for its ranks, and what if none answers?

The scheduler tells who serves which rank (`layer_map`). Where an owner is lost or does not serve a
rank any more, the chunk waits for news from the scheduler and asks again: experts hold no state, so
a packet may be answered twice.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from distributed import Reschedule
from distributed.protocol import to_serialize

from dask_ep.cluster import dask_internals
from dask_ep.cluster.slices import Answers, Chunk, Slices
from dask_ep.graph.chunk import cut
from dask_ep.kernel.pack import Packet

NEWS_SECONDS = 3.0
"""How long news of an owner that did not answer may take before it is asked again."""

ATTEMPTS = 20
"""How often an owner is asked that does not answer but that the scheduler still names."""


class LostOwnerError(RuntimeError):
    """Nobody could be found who serves a rank."""


class Route:
    """Who serves the ranks of a layer, as the scheduler has told this worker."""

    def __init__(
        self, version: int, owners: Sequence[Sequence[str]], is_open: bool, error: str | None
    ):
        self.version, self.owners, self.is_open, self.error = version, owners, is_open, error
        self.is_old = asyncio.Event()


class Asking:
    """Asks the owners of ranks, on the event loop of a worker."""

    def __init__(self, worker: Any, slices: Slices):
        self._worker, self._loop = worker, dask_internals.loop_of(worker)
        self._slices = slices  # of this worker
        self._routes: dict[str, Route] = {}
        self._asked: defaultdict[str, set[asyncio.Task]] = defaultdict(set)
        self._queues: defaultdict[str, int] = defaultdict(int)
        self._lost: set[str] = set()

    # --- what the scheduler tells ---

    def hear_route(
        self, token: str, version: int, owners: list[list[str]], is_open: bool, error: str | None
    ) -> None:
        before = self._routes.get(token)
        self._routes[token] = Route(version, owners, is_open, error)
        for of_rank in owners:
            self._lost.difference_update(of_rank)
        if before is not None:
            before.is_old.set()

    def hear_lost(self, worker: str) -> None:
        self._lost.add(worker)
        for request in self._asked.pop(worker, ()):
            request.cancel()

    def knows(self, token: str) -> bool:
        """Whether workers serve the ranks of a layer."""
        return token in self._routes

    def forget(self, token: str) -> None:
        """A layer is computed no more."""
        route = self._routes.pop(token, None)
        if route is not None:
            route.is_old.set()

    def close(self) -> None:
        """Make every request look for another worker."""
        for route in self._routes.values():
            route.error = "the worker closes"
            route.is_old.set()

    # --- whom to ask ---

    def by_owner(self, route: Route, ranks: Sequence[int]) -> dict[str, list[int]]:
        """Choose an owner for each rank: the one with the fewest rows waiting, so far as known."""
        groups: dict[str, list[int]] = {}
        for rank in ranks:
            owners = route.owners[rank]
            owner = owners[0] if len(owners) == 1 else min(owners, key=self._queue_of)
            groups.setdefault(owner, []).append(rank)
        return groups

    def _queue_of(self, owner: str) -> tuple[int, bool, str]:
        is_me = owner == self._slices.address
        waiting = self._slices.tally.waiting if is_me else self._queues.get(owner, 0)
        return waiting, not is_me, owner

    async def news(self, chunk: Chunk, ranks: Sequence[int], version: int) -> Route:
        """Wait for a route that is newer and names an owner for each of these ranks.

        Where that takes long, the same one is given again: a connection may have failed by itself.
        """
        until = self._loop.time() + NEWS_SECONDS
        while True:
            route = self._routes.get(chunk.exchange.token)
            if route is not None and route.error is not None:
                raise LostOwnerError(f"token chunk {chunk.number}: {route.error}")
            if route is None or not route.is_open:  # Dask waits for no chunk of this layer any more
                raise Reschedule
            is_new = route.version > version or self._loop.time() > until
            if is_new and all(route.owners[rank] for rank in ranks):
                return route
            try:
                async with asyncio.timeout(NEWS_SECONDS):
                    await route.is_old.wait()
            except TimeoutError:
                pass

    async def ask(
        self,
        chunk: Chunk,
        owner: str,
        ranks: list[int],
        packet: list[Packet],
        version: int,
        attempt: int,
    ) -> Answers:
        """Ask an owner for some ranks; if it does not answer, ask the next one.

        The packet comes in a list, out of which it is taken when it is sent.
        """
        answers = await self._request(chunk, owner, ranks, packet)
        if answers is None:
            return await self.ask_anew(chunk, ranks, version, attempt + 1)
        return answers

    async def ask_anew(
        self, chunk: Chunk, ranks: Sequence[int], version: int, attempt: int
    ) -> Answers:
        if attempt > ATTEMPTS:
            raise LostOwnerError(
                f"token chunk {chunk.number}: no owner of the ranks {list(ranks)} has answered "
                f"in {attempt} attempts, though the scheduler names them; check that workers reach "
                "each other (firewall, --interface)"
            )
        route = await self.news(chunk, ranks, version)
        groups = self.by_owner(route, ranks)
        found = await asyncio.gather(
            *(
                self._ask_group(chunk, owner, some, route.version, attempt)
                for owner, some in groups.items()
            )
        )
        return {rank: answer for answers in found for rank, answer in answers.items()}

    async def _ask_group(
        self, chunk: Chunk, owner: str, ranks: list[int], version: int, attempt: int
    ) -> Answers:
        aside = self._loop.run_in_executor
        if owner == self._slices.address:
            answers = await aside(self._slices.pool, self._slices.serve_here, chunk, ranks)
            if answers is None:
                return await self.ask_anew(chunk, ranks, version, attempt + 1)
            return answers
        packet = [await aside(self._slices.pool, self._pack_under_core, chunk, ranks)]
        return await self.ask(chunk, owner, ranks, packet, version, attempt)

    def _pack_under_core(self, chunk: Chunk, ranks: list[int]) -> Packet:
        with self._slices.core():
            return cut(chunk.packing, ranks, chunk.number)

    async def _request(
        self, chunk: Chunk, owner: str, ranks: list[int], packet: list[Packet]
    ) -> Answers | None:
        """What an owner answers; None if it is lost or out of reach, or does not serve a rank."""
        if owner in self._lost:
            packet.clear()
            return None
        rows = len(packet[0].rows)
        asking = dask_internals.call(
            self._worker, owner, "ep_serve", self._message(chunk, ranks, packet.pop())
        )
        request = asyncio.ensure_future(asking)
        self._asked[owner].add(request)
        self._queues[owner] += rows
        try:
            answer = await request
        except asyncio.CancelledError:
            if owner in self._lost and not asyncio.current_task().cancelling():
                return None
            raise
        except OSError:
            return None
        finally:
            self._queues[owner] -= rows
            if not self._queues[owner]:
                del self._queues[owner]
            if owner in self._asked:
                self._asked[owner].discard(request)
        dask_internals.raise_remote(answer)
        if answer["answers"] is None:
            return None
        return dict(zip(ranks, answer["answers"], strict=True))

    def _message(self, chunk: Chunk, ranks: list[int], packet: Packet) -> dict[str, Any]:
        exchange = chunk.exchange
        return {
            "token": exchange.token,
            "ranks": ranks,
            "chunk": chunk.number,
            "sizes": [exchange.world_size, exchange.num_local, exchange.d_out],
            "sender": self._slices.address,
            "arrays": [None if array is None else to_serialize(array) for array in packet],
        }
