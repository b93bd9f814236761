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

What is served here is in `slices`, whom a chunk asks in `asking`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from dask.typing import Key
from distributed import Reschedule, WorkerPlugin

from dask_ep.arrays.namespaces import Array
from dask_ep.cluster import dask_internals
from dask_ep.cluster.admission import Admission
from dask_ep.cluster.asking import Asking
from dask_ep.cluster.slices import Answers, Chunk, Slices
from dask_ep.graph.chunk import Exchange, Where, combine, cut, pack
from dask_ep.laws.costs import CHUNKS_WAITING

PLUGIN = "dask-ep-services"
"""The plugin's name on the workers."""


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
        self._slices = Slices(worker.address, threads)
        self._asking = Asking(worker, self._slices)
        self._admission = Admission(threads + CHUNKS_WAITING)
        self._in_flight: set[Key] = set()  # chunks that were admitted
        self._is_closing = False
        dask_internals.install(
            worker,
            requests={"ep_serve": self._slices.answer},
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
        """Let chunks in flight move to other workers, and requests look for another owner."""
        self._is_closing = True
        self._admission.close()
        self._slices.close()
        self._asking.close()

    def transition(self, key: Key, start: str, finish: str, **kwargs: Any) -> None:
        """Let the next chunk begin when the task of one has ended, however it has."""
        ended = dask_internals.is_running(start) and not dask_internals.is_running(finish)
        if ended and key in self._in_flight:
            self._in_flight.discard(key)
            self._admission.leave()

    # --- what the scheduler tells; on the event loop ---

    def _hear_close(self, token: str) -> None:
        self._asking.forget(token)
        self._slices.drop_layer(token)

    def _hear_limit(self, chunks: float | None) -> None:
        usual = self._slices.threads + CHUNKS_WAITING
        self._admission.set_limit(usual if chunks is None else chunks)

    # --- what tasks ask; in their threads ---

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
        with self._slices.core():
            packing = pack(tokens, routing, topk_weights, where, exchange)
        answers = self._exchange(Chunk(packing, where, exchange))
        self._slices.tally.count_chunk()
        in_order = ((rank, answers.pop(rank)) for rank in packing.ranks)
        with self._slices.core():
            return combine(packing, in_order, where, exchange)

    def _admit(self) -> None:
        """Wait until this chunk may begin; its task is in flight until it ends (`transition`).

        What Dask has fused behind the exchange counts as well, above all the writing of its output,
        and a second layer, which waits for nothing then.
        """
        key, priority = dask_internals.key_here(), dask_internals.priority_here()
        if key in self._in_flight:
            return

        def earlier_is_ready() -> bool:
            return self._on_loop(dask_internals.earlier_is_ready(self._worker, priority)).result()

        self._admission.enter(priority, earlier_is_ready, dask_internals.leave_pool)
        self._in_flight.add(key)

    def _exchange(self, chunk: Chunk) -> Answers:
        """Ask all owners at once, serve what is served here meanwhile, and wait for the rest."""
        asking, packing, asked = self._asking, chunk.packing, list[Future]()
        answers: Answers = {}
        try:
            route = self._on_loop(asking.news(chunk, packing.ranks, -1)).result()
            groups = asking.by_owner(route, packing.ranks)
            here = groups.pop(self._worker.address, [])
            for owner, ranks in groups.items():
                with self._slices.core():
                    packet = [cut(packing, ranks, chunk.number)]
                request = asking.ask(chunk, owner, ranks, packet, route.version, 0)
                asked.append(self._on_loop(request))
            served = self._slices.serve_here(chunk, here)
            if served is None:
                asked.append(self._on_loop(asking.ask_anew(chunk, here, route.version, 1)))
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
