"""Who answers a packet?

A plugin on every worker serves the ranks that the scheduler has given it, and sends the packets of
its own chunks to the services of others:

    task of chunk c, a thread          event loops          service of the owner
    admission, secede                      :                      :
    pack ────────────── packet ───────────>: ───── message ──────>: a thread of its own computes
    ranks that are served here, in place   :                      :
    combine <───────────────────────────── : <───── answers ──────:

Packing, serving and combining share as many cores as the worker has threads. A chunk in flight
holds none of Dask's threads, so that the next one packs while it waits; `Admission` bounds how many
there are.

The scheduler tells whom to ask (`layer_map`). Where an owner is lost or does not serve a rank any
more, the chunk waits for news from the scheduler and asks again: experts hold no state, so a packet
may be answered twice.
"""

from __future__ import annotations

import asyncio
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

from dask.typing import Key
from distributed import Reschedule, WorkerPlugin
from distributed.protocol import to_serialize

from dask_ep.arrays.namespaces import Array
from dask_ep.cluster import dask_internals
from dask_ep.cluster.admission import Admission
from dask_ep.graph import tally
from dask_ep.graph.chunk import Exchange, Where, combine, cut, pack, serve_in_place, serve_packet
from dask_ep.graph.tally import Serving, Tally
from dask_ep.kernel.pack import Packet, Packing
from dask_ep.laws.costs import CHUNKS_WAITING

PLUGIN = "dask-ep-services"
"""The plugin's name on the workers."""

NEWS_SECONDS = 3.0
"""How long news of an owner that did not answer may take before it is asked again."""

ATTEMPTS = 20
"""How often an owner is asked that does not answer but that the scheduler still names."""

Answers = dict[int, Array]
"""By rank."""


class LostOwnerError(RuntimeError):
    """Nobody could be found who serves a rank."""


class Route:
    """Who serves the ranks of a layer, as the scheduler has told this worker."""

    def __init__(
        self, version: int, owners: Sequence[Sequence[str]], is_open: bool, error: str | None
    ):
        self.version, self.owners, self.is_open, self.error = version, owners, is_open, error
        self.is_old = asyncio.Event()


class Job(NamedTuple):
    """A chunk that is in flight."""

    packing: Packing
    where: Where
    exchange: Exchange


class Services(WorkerPlugin):
    """Serves the ranks of a worker, and exchanges the rows of its chunks.

    Notes
    -----
    `own_experts` installs it on every worker, where it stays; it is idle while no layer is
    computed.
    """

    name = PLUGIN
    idempotent = True

    def setup(self, worker: Any) -> None:
        threads = dask_internals.threads_of(worker)
        self._worker, self._loop = worker, dask_internals.loop_of(worker)
        self._threads, self._cores = threads, threading.Semaphore(threads)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="dask-ep-serve")
        self._admission = Admission(threads + CHUNKS_WAITING)
        self._under_way: set[Key] = set()  # chunks that were admitted
        self._routes: dict[str, Route] = {}
        self._slices: dict[tuple[str, int], Any] = {}
        self._loading: defaultdict[tuple[str, int], threading.Lock] = defaultdict(threading.Lock)
        self._asked: defaultdict[str, set[asyncio.Task]] = defaultdict(set)
        self._queues: defaultdict[str, int] = defaultdict(int)
        self._lost: set[str] = set()
        self._is_closing = False
        self.tally = Tally()
        dask_internals.install(
            worker,
            requests={"ep_serve": self._serve},
            messages={
                "ep-route": self._hear_route,
                "ep-lost": self._hear_lost,
                "ep-drop": self._hear_drop,
                "ep-close": self._hear_close,
                "ep-limit": self._hear_limit,
            },
            metrics={"dask_ep": lambda worker: self._metric()},
        )

    def teardown(self, worker: Any) -> None:
        """Let chunks in flight go to other workers, and whoever asks look for another owner."""
        self._is_closing = True
        self._admission.close()
        self._pool.shutdown(wait=False, cancel_futures=True)
        for route in self._routes.values():
            route.error = "the worker closes"
            route.is_old.set()

    def transition(self, key: Key, start: str, finish: str, **kwargs: Any) -> None:
        """Let the next chunk begin when the task of one has ended, however it has."""
        ended = dask_internals.is_running(start) and not dask_internals.is_running(finish)
        if ended and key in self._under_way:
            self._under_way.discard(key)
            self._admission.leave()

    # --- what the scheduler tells; on the event loop ---

    def _hear_route(
        self, token: str, version: int, owners: list[list[str]], is_open: bool, error: str | None
    ) -> None:
        before = self._routes.get(token)
        self._routes[token] = Route(version, owners, is_open, error)
        for of_rank in owners:
            self._lost.difference_update(of_rank)
        if before is not None:
            before.is_old.set()

    def _hear_lost(self, worker: str) -> None:
        self._lost.add(worker)
        for request in self._asked.pop(worker, ()):
            request.cancel()

    def _hear_drop(self, token: str, rank: int) -> None:
        self._slices.pop((token, rank), None)

    def _hear_close(self, token: str) -> None:
        route = self._routes.pop(token, None)
        if route is not None:
            route.is_old.set()
        for kept in (self._slices, self._loading):
            for key in [key for key in list(kept) if key[0] == token]:
                kept.pop(key, None)

    def _metric(self) -> dict[str, Any]:
        slices = [[*key, getattr(experts, "nbytes", 0)] for key, experts in self._slices.items()]
        return {**self.tally.metric(), "threads": self._threads, "slices": slices}

    def _hear_limit(self, chunks: float | None) -> None:
        self._admission.set_limit(self._threads + CHUNKS_WAITING if chunks is None else chunks)

    # --- what tasks ask; in their threads ---

    def serves(self, token: str) -> bool:
        """Whether workers serve the ranks of a layer."""
        return token in self._routes

    def open(self, token: str, rank: int, load: Callable[[], Any]) -> None:
        """Load the experts of a rank, unless they are here, and serve it from now on."""
        with self._loading[token, rank]:
            if (token, rank) not in self._slices:
                self._slices[token, rank] = load()
            if token not in self._routes:  # closed meanwhile: nobody would drop them
                self._slices.pop((token, rank), None)

    def compute(
        self,
        tokens: Array,
        routing: Array,
        topk_weights: Array | None,
        where: Where,
        exchange: Exchange,
    ) -> Array:
        """Exchange the rows of a chunk whose ranks workers serve, and give its output.

        Raises
        ------
        Reschedule
            If this worker closes meanwhile: another one computes the chunk.
        """
        try:
            return self._compute(tokens, routing, topk_weights, where, exchange)
        except Exception:
            if self._is_closing:
                raise Reschedule from None
            raise

    def _compute(
        self,
        tokens: Array,
        routing: Array,
        topk_weights: Array | None,
        where: Where,
        exchange: Exchange,
    ) -> Array:
        self._admit()
        with self._core():
            packing = pack(tokens, routing, topk_weights, where, exchange)
        answers = self._exchange(Job(packing, where, exchange))
        self.tally.count_chunk()
        in_order = ((rank, answers.pop(rank)) for rank in packing.ranks)
        with self._core():
            return combine(packing, in_order, where, exchange)

    @contextmanager
    def _core(self) -> Iterator[None]:
        """Hold one of the cores that packing, serving and combining share."""
        with self._cores:
            start = tally.now()
            try:
                yield
            finally:
                self.tally.count_core(tally.now() - start)

    def _admit(self) -> None:
        """Wait until this chunk may begin; its task is in flight until it ends (`transition`).

        What Dask has fused behind the exchange counts as well, above all the writing of its output,
        and a second layer, which waits for nothing then.
        """
        key, priority = dask_internals.key_here(), dask_internals.priority_here()
        if key in self._under_way:
            return

        def earlier_is_ready() -> bool:
            return self._on_loop(dask_internals.earlier_is_ready(self._worker, priority)).result()

        self._admission.enter(priority, earlier_is_ready, dask_internals.leave_pool)
        self._under_way.add(key)

    def _exchange(self, job: Job) -> Answers:
        """Ask all owners at once, serve what is served here meanwhile, and wait for the rest."""
        asked: list[Future] = []
        answers: Answers = {}
        try:
            route = self._on_loop(self._news(job, job.packing.ranks, -1)).result()
            groups = self._by_owner(route, job)
            here = groups.pop(self._worker.address, [])
            for owner, ranks in groups.items():
                with self._core():
                    packet = [cut(job.packing, ranks, job.where.chunk)]
                asked.append(self._on_loop(self._ask(job, owner, ranks, packet, route.version, 0)))
            served = self._serve_here(job, here)
            if served is None:
                asked.append(self._on_loop(self._ask_anew(job, here, route.version, 1)))
            else:
                answers |= served
            for future in asked:
                answers |= future.result()
        except BaseException:
            for future in asked:
                future.cancel()
            raise
        return answers

    def _on_loop(self, coroutine: Any) -> Future:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def _serve_here(self, job: Job, ranks: Sequence[int]) -> Answers | None:
        """Serve ranks in place, without a packet; None if one of them has moved away."""
        token, me, answers = job.exchange.token, self._worker.address, {}
        for rank in ranks:
            try:
                experts = self._slices[token, rank]
            except KeyError:
                return None
            with self._core():
                start = tally.now()
                answer = serve_in_place(
                    job.packing, rank, experts, job.where.chunk, job.exchange.d_out
                )
                stop = tally.now()
            answers[rank] = answer
            serving = Serving(job.where.chunk, rank, len(answer), me, me, start, stop)
            self.tally.count(stop - start, [serving])
        return answers

    # --- asking owners; on the event loop ---

    def _by_owner(
        self, route: Route, job: Job, ranks: Sequence[int] | None = None
    ) -> dict[str, list[int]]:
        """Choose an owner for each rank: the one with the fewest rows waiting, so far as known."""
        groups: dict[str, list[int]] = {}
        for rank in job.packing.ranks if ranks is None else ranks:
            owners = route.owners[rank]
            owner = owners[0] if len(owners) == 1 else min(owners, key=self._queue_of)
            groups.setdefault(owner, []).append(rank)
        return groups

    def _queue_of(self, owner: str) -> tuple[int, bool, str]:
        is_me = owner == self._worker.address
        return (self.tally.waiting if is_me else self._queues.get(owner, 0)), not is_me, owner

    async def _news(self, job: Job, ranks: Sequence[int], version: int) -> Route:
        """Wait for a route that is newer and names an owner for each of these ranks.

        Where that takes long, the same one is given again: a connection may have failed by itself.
        """
        until = self._loop.time() + NEWS_SECONDS
        while True:
            route = self._routes.get(job.exchange.token)
            if route is not None and route.error is not None:
                raise LostOwnerError(f"token chunk {job.where.chunk}: {route.error}")
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

    async def _ask(
        self,
        job: Job,
        owner: str,
        ranks: list[int],
        packet: list[Packet],
        version: int,
        attempt: int,
    ) -> Answers:
        """Ask an owner for some ranks, and whoever serves them then if it does not answer.

        The packet comes in a list, out of which it is taken when it is sent.
        """
        answers = await self._request(job, owner, ranks, packet)
        if answers is None:
            return await self._ask_anew(job, ranks, version, attempt + 1)
        return answers

    async def _ask_anew(
        self, job: Job, ranks: Sequence[int], version: int, attempt: int
    ) -> Answers:
        if attempt > ATTEMPTS:
            raise LostOwnerError(
                f"token chunk {job.where.chunk}: no owner of the ranks {list(ranks)} has answered "
                f"in {attempt} attempts, though the scheduler names them; check that workers reach "
                "each other (firewall, --interface)"
            )
        route = await self._news(job, ranks, version)
        groups = self._by_owner(route, job, ranks)
        found = await asyncio.gather(
            *(
                self._ask_group(job, owner, some, route.version, attempt)
                for owner, some in groups.items()
            )
        )
        return {rank: answer for answers in found for rank, answer in answers.items()}

    async def _ask_group(
        self, job: Job, owner: str, ranks: list[int], version: int, attempt: int
    ) -> Answers:
        aside = self._loop.run_in_executor
        if owner == self._worker.address:
            answers = await aside(self._pool, self._serve_here, job, ranks)
            if answers is None:
                return await self._ask_anew(job, ranks, version, attempt + 1)
            return answers
        packet = [await aside(self._pool, self._pack_under_core, job, ranks)]
        return await self._ask(job, owner, ranks, packet, version, attempt)

    def _pack_under_core(self, job: Job, ranks: list[int]) -> Packet:
        with self._core():
            return cut(job.packing, ranks, job.where.chunk)

    async def _request(
        self, job: Job, owner: str, ranks: list[int], packet: list[Packet]
    ) -> Answers | None:
        """What an owner answers; None if it is lost or out of reach, or does not serve a rank."""
        if owner in self._lost:
            packet.clear()
            return None
        rows = len(packet[0].rows)
        asking = dask_internals.call(
            self._worker, owner, "ep_serve", self._message(job, ranks, packet.pop())
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

    def _message(self, job: Job, ranks: list[int], packet: Packet) -> dict[str, Any]:
        exchange = job.exchange
        return {
            "token": exchange.token,
            "ranks": ranks,
            "chunk": job.where.chunk,
            "sizes": [exchange.world_size, exchange.num_local, exchange.d_out],
            "sender": self._worker.address,
            "arrays": [None if array is None else to_serialize(array) for array in packet],
        }

    # --- answering ---

    async def _serve(
        self,
        comm: Any = None,
        *,
        token: str,
        ranks: list[int],
        chunk: int,
        sizes: list[int],
        sender: str,
        arrays: list[Array | None],
    ) -> dict[str, Any]:
        """Answer a packet: one array for each rank, or None if one of them is not served here."""
        slices = [self._slices.get((token, rank)) for rank in ranks]
        if self._is_closing or any(experts is None for experts in slices):
            return {"status": "OK", "answers": None}
        exchange, packet = Exchange(token, *sizes, None), [Packet(*arrays)]
        del arrays
        serve = partial(self._serve_packet, packet, ranks, slices, chunk, exchange, sender)
        with self.tally.queued(token, ranks, len(packet[0].rows)):
            answers = await self._loop.run_in_executor(self._pool, serve, tally.now())
        return {"status": "OK", "answers": [to_serialize(answer) for answer in answers]}

    def _serve_packet(
        self,
        packet: list[Packet],
        ranks: list[int],
        slices: list[Any],
        chunk: int,
        exchange: Exchange,
        sender: str,
        came: float,
    ) -> list[Array]:
        with self._core():
            start = tally.now()
            nbytes = sum(array.nbytes for array in packet[0] if array is not None)
            answers = serve_packet(packet.pop(), ranks, slices, chunk, exchange)
            stop = tally.now()
        step, me = (stop - start) / len(ranks), self._worker.address
        self.tally.count(
            stop - start,
            [
                Serving(
                    chunk, rank, len(answer), sender, me, start + i * step, start + (i + 1) * step,
                    nbytes if i == 0 else 0, answer.nbytes, start - came,
                )
                for i, (rank, answer) in enumerate(zip(ranks, answers, strict=True))
            ],
        )  # fmt: skip
        return answers


def find(token: str) -> Services | None:
    """The services of the worker whose task runs in this thread, if they serve this layer.

    Raises
    ------
    Reschedule
        If the worker closes: another one computes the task.
    """
    worker = dask_internals.current_worker()
    if worker is None:
        return None
    if dask_internals.is_closing(worker):
        raise Reschedule
    services = dask_internals.plugin_of(worker, PLUGIN)
    return services if services is not None and services.serves(token) else None
