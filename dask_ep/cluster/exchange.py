"""How do the rows of a chunk reach the owners of their ranks, and come back?

A plugin on every worker serves the ranks that the scheduler has given it, and sends the packets of
its own chunks to the services of others:

    task of chunk c, a thread          event loops          service of the owner
    admission                              :                      :
    pack ────────────── packet ───────────>: ───── message ──────>: a thread of its own computes
    ranks that are served here, in place   :                      :
    combine <───────────────────────────── : <───── answers ──────:

Packing, serving and combining share as many cores as the worker has threads. A chunk in flight
gives its thread back to Dask (`secede`), so that the next one packs while it waits; `Admission`
bounds how many there are. Short chunks keep their threads: to give one back takes one more message
to the scheduler.

The scheduler announces which workers serve which rank (`layer_map`). If an owner is lost or does
not serve a rank any more, the chunk waits for an update by the scheduler and asks again: experts
have no state, so a packet may be answered twice. What answers it there is in `rank_server`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from math import inf
from typing import Any

from dask.typing import Key
from distributed import Reschedule, WorkerPlugin

from dask_ep.arrays.memory import keep_freed_memory, release
from dask_ep.arrays.namespaces import Array
from dask_ep.cluster import dask_internals
from dask_ep.cluster.admission import Admission
from dask_ep.cluster.rank_server import Answers, Chunk, Slices
from dask_ep.cluster.streams import Line, from_message, to_message
from dask_ep.errors import LostOwnerError
from dask_ep.graph.chunk import ChunkPlace, Exchange, Observed, combine, cut, join_tables, pack
from dask_ep.kernel.host_kernel import parts_of
from dask_ep.kernel.pack import Packet
from dask_ep.laws.costs import CHUNKS_WAITING

SERVICES_PLUGIN = "dask-ep-services"
"""The plugin's name on the workers."""

OP = "ep_serve"
"""The name of requests between workers."""

SHORT_SECONDS = 0.04
"""A chunk keeps Dask's thread if the task of the last one of its layer took no longer, with reading
and writing. Fewer such chunks can be in flight at once, but a scheduler has enough to do with some
forty threads of them."""

PATIENCE_SECONDS = 0.02
"""How long a chunk that has kept its thread waits before it gives it back."""

NEWS_SECONDS = 3.0
"""How long to wait for an update about an owner that did not answer before asking it again."""

LOST_SECONDS = 1.0
"""When fetches from a lost worker are cancelled once more: one may be about to begin when we learn
of the loss."""

ATTEMPTS = 20
"""How often to ask an owner that does not answer but that the scheduler still names."""


class Services(WorkerPlugin):
    """Serves the ranks of a worker, and exchanges the rows of its chunks.

    Notes
    -----
    `own_experts` installs it on every worker, where it stays; it is idle while no layer is
    computed.
    """

    name = SERVICES_PLUGIN
    idempotent = True

    def setup(self, worker: Any) -> None:
        keep_freed_memory()  # also if `WorkerSettings` is not installed
        dask_internals.when_memory_is_short(worker, release)
        threads = dask_internals.threads_of(worker)
        self._worker, self._loop = worker, dask_internals.loop_of(worker)
        self._slices = Slices(worker.address, threads)
        self._asking = Asking(worker, self._slices)
        self._admission = Admission(threads + CHUNKS_WAITING)
        # Chunks that were admitted: their layers, and when their tasks began
        self._in_flight: dict[Key | None, tuple[str, float]] = {}
        self._seconds: dict[str, float] = {}  # of the last task of each layer
        self._is_closing = False
        dask_internals.install(
            worker,
            requests={OP: self._slices.listen},
            messages={
                "ep-route": self._asking.hear_route,
                "ep-lost": self._asking.hear_lost,
                "ep-drop": self._slices.drop,
                "ep-close": self._hear_close,
                "ep-limit": self._hear_limit,
            },
            metrics={"dask_ep": lambda worker: self._slices.metric()},
        )

    def teardown(self, worker: Any) -> None:
        """Let chunks in flight move to other workers, and requests find another owner."""
        self._is_closing = True
        self._admission.close()
        self._slices.close()
        self._asking.close()

    def transition(self, key: Key, start: str, finish: str, **kwargs: Any) -> None:
        """Let the next chunk begin when the task of one has ended in any way.

        Also let waiting chunks give a thread to a task that has become ready.
        """
        if key in self._in_flight and not dask_internals.is_running(self._worker, key):
            layer, begun = self._in_flight.pop(key)
            if self.serves(layer):  # else nothing would remove them
                self._seconds[layer] = time.time() - begun
            self._admission.leave(layer)
        if finish == "ready" and self._admission.has_waiting:
            self._loop.call_soon(self._look)  # it may get a thread at once

    def _look(self) -> None:
        """Let waiting chunks give their threads to a ready task that comes before them."""
        priority = dask_internals.first_ready(self._worker)
        if priority is not None:
            self._admission.lend(priority)

    # --- messages of the scheduler; on the event loop ---

    def _hear_close(self, token: str) -> None:
        self._seconds.pop(token, None)
        self._asking.forget(token)
        self._slices.drop_layer(token)

    def _hear_limit(self, chunks: float | None) -> None:
        usual = self._slices.threads + CHUNKS_WAITING
        self._admission.set_limit(usual if chunks is None else chunks)

    # --- calls of tasks; in their threads ---

    def serves(self, token: str) -> bool:
        """Whether workers serve the ranks of a layer."""
        return self._asking.knows(token)

    def open(self, token: str, rank: int, load: Callable[[], Any]) -> None:
        """Load the experts of a rank, unless they are here, and serve it from now on."""
        self._slices.open(token, rank, load, self.serves)

    def compute(
        self,
        tokens: Array,
        routing: Array,
        topk_weights: Array | None,
        where: ChunkPlace,
        exchange: Exchange,
    ) -> Array | Observed:
        """Exchange the rows of a chunk with the owners of its ranks, and return its output.

        Raises
        ------
        Reschedule
            If this worker closes meanwhile: another one computes the chunk.
        """
        try:
            self._admit(exchange.token)
            with self._slices.core:
                packing = pack(tokens, routing, topk_weights, where, exchange)
            chunk, observe = Chunk(packing, where, exchange, {}), exchange.observe
            answers = self._exchange(chunk)
            self._slices.tally.count_chunk()
            in_order = ((rank, answers.pop(rank)) for rank in packing.ranks)
            with self._slices.core:
                out = None
                if observe is None or observe.output:
                    out = combine(packing, in_order, where, exchange)
                return out if observe is None else (out, join_tables(chunk.tables, exchange))
        except Exception:
            if self._is_closing:
                raise Reschedule from None
            raise

    def _admit(self, layer: str) -> None:
        """Wait until this chunk may begin; its task is in flight until it ends (`transition`).

        That includes what Dask has fused after the exchange: usually writing the output, or a
        second layer, which then does not wait. Unless the task is probably short, give its thread
        back to Dask.
        """
        key, priority = dask_internals.key_here(), dask_internals.priority_here()
        if key in self._in_flight:
            return
        look = partial(self._loop.call_soon_threadsafe, self._look)
        self._admission.enter(priority, look, dask_internals.leave_pool, layer)
        self._in_flight[key] = layer, dask_internals.begun_here()
        if self._seconds.get(layer, inf) > SHORT_SECONDS:
            dask_internals.leave_pool()

    def _exchange(self, chunk: Chunk) -> Answers:
        """Ask all owners at once, serve what is served here meanwhile, and wait for the rest."""
        asking, ranks = self._asking, chunk.packing.ranks
        route = asking.route(chunk, ranks)
        if route is None:
            route = _wait(self._on_loop(asking.news(chunk, ranks, -1)))
        here, packets = asking.pack(chunk, ranks, route)
        asked = self._on_loop(asking.ask_all(chunk, packets, route.version))
        try:
            served = self._slices.serve_here(chunk, here)
            if served is None:
                served = _wait(self._on_loop(asking.ask_anew(chunk, here, route.version, 1)))
            return served | _wait(asked)
        except BaseException:
            asked.cancel()
            raise

    def _on_loop(self, coroutine: Any) -> Future:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)


def _wait(asked: Future) -> Any:
    """Wait for a result; after a while, without Dask's thread."""
    try:
        return asked.result(timeout=PATIENCE_SECONDS)
    except TimeoutError:
        dask_internals.leave_pool()
        return asked.result()


class Route:
    """The workers that serve the ranks of a layer, as announced by the scheduler."""

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
        self._lines: dict[str, Line] = {}
        self._lost: set[str] = set()

    # --- messages of the scheduler ---

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
        if worker in self._lines:
            self._lines.pop(worker).close()
        for later in (0.0, LOST_SECONDS):
            self._loop.call_later(later, dask_internals.give_up, self._worker, worker)

    def knows(self, token: str) -> bool:
        """Whether workers serve the ranks of a layer."""
        return token in self._routes

    def forget(self, token: str) -> None:
        """Forget a layer that is not computed any more."""
        route = self._routes.pop(token, None)
        if route is not None:
            route.is_old.set()

    def close(self) -> None:
        """Let every request find another worker."""
        for route in self._routes.values():
            route.error = "the worker is closing"
            route.is_old.set()
        for line in self._lines.values():
            line.close()

    # --- the route of a chunk ---

    def route(self, chunk: Chunk, ranks: Sequence[int]) -> Route | None:
        """The route as it is now, if it names an owner for each of these ranks; from any thread."""
        route = self._route_of(chunk)
        return route if all(route.owners[rank] for rank in ranks) else None

    def _route_of(self, chunk: Chunk) -> Route:
        route = self._routes.get(chunk.exchange.token)
        if route is not None and route.error is not None:
            raise LostOwnerError(f"token chunk {chunk.number}: {route.error}")
        if route is None or not route.is_open:  # Dask waits for no chunk of it
            raise Reschedule
        return route

    async def news(self, chunk: Chunk, ranks: Sequence[int], version: int) -> Route:
        """Wait for a newer route that names an owner for each of these ranks.

        If that takes long, the same one is returned: only the connection may have failed.
        """
        until = self._loop.time() + NEWS_SECONDS
        while True:
            route = self._route_of(chunk)
            is_new = route.version > version or self._loop.time() > until
            if is_new and all(route.owners[rank] for rank in ranks):
                return route
            try:
                async with asyncio.timeout(NEWS_SECONDS):
                    await route.is_old.wait()
            except TimeoutError:
                pass

    # --- asking ---

    def pack(
        self, chunk: Chunk, ranks: Sequence[int], route: Route
    ) -> tuple[list[int], dict[str, tuple[list[int], Packet]]]:
        """The ranks to serve here, and a packet for each other owner; from any thread.

        Of a rank's owners it chooses the one with the fewest rows waiting, so far as known.
        """
        groups: dict[str, list[int]] = {}
        for rank in ranks:
            owners = route.owners[rank]
            owner = owners[0] if len(owners) == 1 else min(owners, key=self._queue_of)
            groups.setdefault(owner, []).append(rank)
        here = groups.pop(self._slices.address, [])
        with self._slices.core:
            return here, {
                owner: (some, cut(chunk.packing, some, chunk.number))
                for owner, some in groups.items()
            }

    def _queue_of(self, owner: str) -> tuple[int, bool, str]:
        is_me = owner == self._slices.address
        asked = self._slices.tally if is_me else self._lines.get(owner)
        return asked.waiting if asked else 0, not is_me, owner

    async def ask_all(
        self,
        chunk: Chunk,
        packets: dict[str, tuple[list[int], Packet]],
        version: int,
        attempt: int = 0,
    ) -> Answers:
        """Ask several owners at once, and then other ones for what they did not answer.

        The packets are removed as they are sent.
        """
        asked, again, answers = [], [], {}
        while packets:
            owner, (ranks, packet) = packets.popitem()
            if owner in self._lost:
                again += ranks
            else:
                request = self._request(chunk, ranks, packet)
                asked.append((ranks, self._line_to(owner).ask(len(packet.rows), *request)))
                del request
            del packet
        try:
            for ranks, answer in asked:
                try:
                    came = await answer
                except OSError:  # the owner is lost, or out of reach
                    came = None
                if came is None:  # it does not serve a rank
                    again += ranks
                else:
                    answers.update(_unpack(chunk, ranks, came))
        finally:
            for _, answer in asked:
                answer.cancel()
        if again:
            answers |= await self.ask_anew(chunk, sorted(again), version, attempt + 1)
        return answers

    async def ask_anew(
        self, chunk: Chunk, ranks: Sequence[int], version: int, attempt: int
    ) -> Answers:
        """Ask the owners of a newer route."""
        if attempt > ATTEMPTS:
            raise LostOwnerError(
                f"token chunk {chunk.number}: no owner of the ranks {list(ranks)} has answered "
                f"in {attempt} attempts, though the scheduler names them; check that workers reach "
                "each other (firewall, --interface)"
            )
        route = await self.news(chunk, ranks, version)
        here, packets = await asyncio.to_thread(self.pack, chunk, ranks, route)
        served = await asyncio.to_thread(self._slices.serve_here, chunk, here)
        if served is None:
            served = await self.ask_anew(chunk, here, route.version, attempt + 1)
        return served | await self.ask_all(chunk, packets, route.version, attempt)

    def _line_to(self, owner: str) -> Line:
        line = self._lines.get(owner)
        if line is None or line.is_over:
            self._lines[owner] = line = Line(self._worker, owner, OP)
        return line

    def _request(self, chunk: Chunk, ranks: list[int], packet: Packet) -> list[Any]:
        exchange = chunk.exchange
        return [
            exchange.token,
            ranks,
            chunk.number,
            [exchange.world_size, exchange.num_local, exchange.d_out],
            None if exchange.observe is None else list(exchange.observe),
            [to_message(array) for array in packet],
        ]


def _unpack(chunk: Chunk, ranks: list[int], came: Any) -> Answers:
    """The answers in an owner's message."""
    if isinstance(came, dict):
        dask_internals.raise_remote(came)
    parts, counts, seen = came
    chunk.tables.update(zip(ranks, map(from_message, seen), strict=False))
    arrays = [from_message(part) for part in parts]
    if len(arrays) < len(ranks):
        (whole,) = arrays
        arrays = parts_of(whole, counts)
    return dict(zip(ranks, arrays, strict=True))


def services_of(token: str, key: Key | None = None) -> Services | None:
    """The services of the worker whose task runs in this thread, if they serve this layer.

    With a key: if it is the task of this key.

    Raises
    ------
    Reschedule
        If the worker closes: another one computes the task.
    """
    worker = dask_internals.current_worker()
    if worker is None or key not in (None, dask_internals.key_here()):
        return None
    if dask_internals.is_closing(worker):
        raise Reschedule
    services = dask_internals.plugin_of(worker, SERVICES_PLUGIN)
    return services if services is not None and services.serves(token) else None
