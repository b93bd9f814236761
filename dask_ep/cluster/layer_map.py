"""Which workers serve which rank of which layer now?

`owner_plugin` decides who should serve a rank. This file carries it out, and informs the workers:

    update_graph       ep_experts (r) of a new layer ──> pinned to the owners of r
    ep_ranks is done   every rank is served          ──> the map goes to all workers, with a version
    owners change      ep_experts (r) is computed once more, on the new owner; when it has loaded,
                       the map is updated, and the previous owner drops the rank
    ep_ranks is freed  no chunk needs it any more    ──> services drop the layer

So experts are loaded by tasks only: from files or memory, as in the graph, and Dask recomputes
their inputs. Until a new owner has loaded, the old one serves.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from distributed.scheduler import Scheduler, TaskState

from dask_ep.cluster import dask_internals
from dask_ep.cluster.owner_rules import natural_order
from dask_ep.cluster.ranks import Able
from dask_ep.graph.keys import read_rank, read_ranks_key


@dataclass
class Layer:
    """One layer over one input: its tasks, and the workers that have loaded its ranks."""

    token: str
    tasks: list[TaskState]
    #: ep_experts of each rank
    serving: list[set[str]]
    #: addresses of the workers that have loaded each rank
    failed: list[set[str]]
    #: and of those that could not, while others served it
    is_open: bool = False
    #: whether chunks may send packets
    error: str | None = None
    hastened: list[TaskState] = field(default_factory=list)
    #: tasks that nothing may delay, as ranks that are loaded once more depend on them

    @property
    def world_size(self) -> int:
        return len(self.tasks)


class LayerMap:
    """The layers that are computed now, and the workers that serve them.

    `owners` gives the set of addresses that should serve a rank, by world size and rank; the same
    set each time. `rest` is called when no layer is computed any more. While the scheduler changes
    the state of a task, what follows is put off.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        owners: Callable[[int, int], set[str]],
        rest: Callable[[], object],
    ):
        self._scheduler, self._owners, self._rest = scheduler, owners, rest
        self._layers: dict[str, Layer] = {}
        self._able: dict[frozenset, Able] = {}
        self._version = 0

    def __iter__(self) -> Iterator[Layer]:
        return iter(self._layers.values())

    def __len__(self) -> int:
        return len(self._layers)

    def add(self, keys: Collection[Any]) -> None:
        """Let owners load the layers of a new graph, before the first of its tasks is assigned."""
        for key in keys:
            ranks_key = read_ranks_key(key)
            if ranks_key is None:
                continue
            joining = self._scheduler.tasks[key]
            found = {of_rank[1]: t for t in joining.dependencies if (of_rank := read_rank(t.key))}
            owners = [self._owners(len(found), rank) for rank in range(len(found))]
            if found and ranks_key.token not in self._layers:
                tasks = [found[rank] for rank in range(len(found))]
                layer = Layer(ranks_key.token, tasks, *_of_ranks(tasks))
                self._layers[layer.token] = layer
                self._pin(layer)
                self._tell(layer)
            if found and ranks_key.at_home:
                _keep_at_home(joining.dependents, owners)
        self._pin_passes([key for key in keys if isinstance(key, tuple) and len(key) > 2])

    def _pin_passes(self, keys: Iterable[tuple]) -> None:
        """Let the tasks of experts that are processed in passes run on the owners of their rank."""
        found = {key: of_rank for key in keys if (of_rank := read_rank(key))}
        world_sizes: defaultdict[str, int] = defaultdict(int)
        for token, rank in found.values():
            world_sizes[token] = max(world_sizes[token], rank + 1)
        for key, (token, rank) in found.items():
            if world_sizes[token] > 1:
                owners = self._owners(world_sizes[token], rank)
                dask_internals.restrict(self._scheduler.tasks[key], owners)

    def heard(self, key: object, start: str, finish: str) -> None:
        """Follow the state of the layers' tasks; other tasks are ignored."""
        if not isinstance(key, tuple) or len(key) not in (1, 2):
            return
        ranks_key, of_rank = read_ranks_key(key), read_rank(key)
        if ranks_key and (layer := self._layers.get(ranks_key.token)):
            self._heard_of_layer(layer, start, finish)
        elif of_rank and (layer := self._layers.get(of_rank[0])):
            self._heard_of_rank(layer, of_rank[1], finish)

    def serve(self, world_size: int, rank: int) -> None:
        """Update the services of a rank after its owners have changed."""
        for layer in self:
            if layer.world_size == world_size:
                self._serve(layer, rank)

    def lose(self, worker: str) -> None:
        """Forget a worker, and let nothing wait for it."""
        for able in self._able.values():
            able.discard(worker)
        self._send({"op": "ep-lost", "worker": worker})
        for layer in self:
            if any(worker in serving for serving in layer.serving):
                layer.serving = [serving - {worker} for serving in layer.serving]
                self._tell(layer)
                self._serve_all(layer)

    def welcome(self, worker: str) -> None:
        """Inform a new worker of all layers."""
        for able in self._able.values():
            able.hear(worker, self._scheduler.workers[worker].resources)
        for layer in self:
            self._tell(layer, [worker])

    def fail(self, error: str) -> None:
        """Let every request for a rank fail: the map is no longer reliable."""
        for layer in self:
            layer.error = error
            self._tell(layer)

    def clear(self) -> None:
        for layer in list(self):
            self._close(layer)

    # --- how it is done ---

    def _heard_of_layer(self, layer: Layer, start: str, finish: str) -> None:
        if finish == "memory":
            layer.is_open = True
            self._tell(layer)
            self._serve_all(layer)
        elif start == "memory":  # services drop the experts, which may be needed again
            layer.is_open, layer.error = False, None
            layer.serving, layer.failed = _of_ranks(layer.tasks)
            self._scheduler.loop.add_callback(self._release_hastened, layer)
            self._pin(layer)
            self._send({"op": "ep-close", "token": layer.token})
            self._tell(layer)
        if finish == "forgotten":
            self._close(layer)

    def _heard_of_rank(self, layer: Layer, rank: int, finish: str) -> None:
        task = layer.tasks[rank]
        if finish == "memory":
            layer.serving[rank] |= {worker.address for worker in task.who_has or ()}
            if layer.is_open:
                self._tell(layer)
        if finish in ("memory", "erred", "released"):
            self._scheduler.loop.add_callback(self._serve, layer, rank)

    def _serve_all(self, layer: Layer) -> None:
        for rank in range(layer.world_size):
            self._scheduler.loop.add_callback(self._serve, layer, rank)

    def _serve(self, layer: Layer, rank: int) -> None:
        """Load a rank on owners that do not serve it yet; drop it on workers that do not own it."""
        self._release_hastened(layer)
        if not layer.is_open:
            return
        owners = self._owners(layer.world_size, rank).intersection(self._scheduler.workers)
        if missing := owners - layer.serving[rank]:
            task = layer.tasks[rank]
            pinned = task.worker_restrictions or set()
            if layer.serving[rank]:
                missing -= layer.failed[rank]
            if task.state == "erred" and layer.serving[rank]:
                layer.failed[rank] |= pinned
                dask_internals.forget_error(self._scheduler, task)
            elif task.state == "erred":
                why = f"its experts could not be loaded again: {task.exception_text}"
                layer.error = f"rank {rank}: {why}"
                self._tell(layer)
            elif missing and (
                task.state == "released" or (_is_under_way(task) and missing.isdisjoint(pinned))
            ):
                # Before all other tasks: chunks wait for it
                dask_internals.pin(task, {min(missing, key=natural_order)})
                hastened = dask_internals.hasten(self._scheduler, task, self._workers_with)
                layer.hastened += hastened
                is_done = task.state == "released"
                act = dask_internals.run_again if is_done else dask_internals.place_again
                act(self._scheduler, task)
        elif owners and (extra := layer.serving[rank] - owners):
            layer.serving[rank] -= extra
            self._tell(layer)
            self._send({"op": "ep-drop", "token": layer.token, "rank": rank}, extra)

    def _release_hastened(self, layer: Layer) -> None:
        if layer.hastened and not any(map(_is_under_way, layer.tasks)):
            layer.hastened = dask_internals.release_hastened(self._scheduler, layer.hastened, Able)

    def _workers_with(self, needs: Mapping[str, float]) -> Able:
        """The workers that have these resources, now and later."""
        kind = frozenset(needs.items())
        if kind not in self._able:
            self._able[kind] = Able(needs)
            for address, worker in self._scheduler.workers.items():
                self._able[kind].hear(address, worker.resources)
        return self._able[kind]

    def _pin(self, layer: Layer) -> None:
        """Let the experts of a layer be loaded by the owners of their ranks."""
        for rank, task in enumerate(layer.tasks):
            dask_internals.pin(task, self._owners(layer.world_size, rank))

    def _close(self, layer: Layer) -> None:
        layer.is_open = False
        del self._layers[layer.token]
        self._send({"op": "ep-close", "token": layer.token})
        if not self._layers:
            self._scheduler.loop.add_callback(self._rest)

    def _tell(self, layer: Layer, workers: Iterable[str] | None = None) -> None:
        """Announce whom chunks send packets to: owners that have loaded a rank, else who has."""
        self._version += 1
        routes = [
            sorted(serving & self._owners(layer.world_size, rank) or serving, key=natural_order)
            for rank, serving in enumerate(layer.serving)
        ]
        message = {"op": "ep-route", "token": layer.token, "version": self._version}
        state = {"owners": routes, "is_open": layer.is_open, "error": layer.error}
        self._send(message | state, workers)

    def _send(self, message: dict[str, Any], workers: Iterable[str] | None = None) -> None:
        """Send a message to workers; to all of them by default."""
        to = self._scheduler.workers if workers is None else workers
        dask_internals.tell(self._scheduler, list(to), message)


def _of_ranks(tasks: list[TaskState]) -> tuple[list[set[str]], list[set[str]]]:
    """The workers that serve each rank, and those that failed to, before any has loaded it."""
    return [set() for _ in tasks], [set() for _ in tasks]


def _is_under_way(task: TaskState) -> bool:
    return task.state in ("waiting", "no-worker", "processing")


def _keep_at_home(chunks: Iterable[TaskState], owners: list[set[str]]) -> None:
    """Let each chunk of a layer with a local placement be read by an owner of its home."""
    for chunk in chunks:
        number: Any = chunk.key[1] if isinstance(chunk.key, tuple) and len(chunk.key) > 1 else 0
        dask_internals.restrict(chunk, owners[number % len(owners)])
