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
    is_open: bool = False
    #: whether chunks may send packets
    error: str | None = None
    loading: dict[int, str] = field(default_factory=dict)
    #: ranks that are loaded once more, and where
    hastened: list[TaskState] = field(default_factory=list)
    #: their dependencies: tasks that nothing may delay meanwhile

    @property
    def world_size(self) -> int:
        return len(self.tasks)


class LayerMap:
    """The layers that are computed now, and the workers that serve them.

    Parameters
    ----------
    scheduler : Scheduler
    owners : function of a world size and a rank
        Returns the set of addresses that should serve the rank; the same set object each time.
    """

    def __init__(self, scheduler: Scheduler, owners: Callable[[int, int], set[str]]):
        self._scheduler, self._owners = scheduler, owners
        self._layers: dict[str, Layer] = {}
        self._able: dict[frozenset, Able] = {}
        self._version = 0

    def __iter__(self) -> Iterator[Layer]:
        return iter(self._layers.values())

    def __len__(self) -> int:
        return len(self._layers)

    def world_sizes(self, keys: Iterable[object]) -> set[int]:
        """World sizes of the layers among the keys of a new graph."""
        sizes = {len(self._ranks(key)) for key in keys if read_ranks_key(key) is not None}
        return sizes - {0}

    def add(self, keys: Iterable[Any]) -> None:
        """Let owners load the layers of a new graph, before the first of its tasks is assigned."""
        for key in keys:
            ranks_key = read_ranks_key(key)
            if ranks_key is None or ranks_key.token in self._layers:
                continue
            tasks = self._ranks(key)
            if not tasks:
                continue
            layer = Layer(ranks_key.token, tasks, [set() for _ in tasks])
            self._layers[layer.token] = layer
            for rank, task in enumerate(tasks):
                dask_internals.pin(task, self._owners(layer.world_size, rank))
            if ranks_key.at_home:
                self._keep_at_home(layer, self._scheduler.tasks[key])
            self._tell(layer, self._scheduler.workers)

    def heard(self, key: object, start: str, finish: str) -> None:
        """Follow the state of the layers' tasks; other tasks are ignored."""
        if not isinstance(key, tuple):
            return
        if len(key) == 1:
            self._heard_of_layer(key, start, finish)
        elif len(key) == 2 and (found := read_rank(key)) is not None:
            self._heard_of_rank(*found, finish)

    def serve(self, world_size: int, rank: int) -> None:
        """Update the services of a rank after its owners have changed."""
        for layer in self:
            if layer.world_size == world_size:
                self._serve(layer, rank)

    def lose(self, worker: str) -> None:
        """Forget a worker, and let nothing wait for it."""
        for able in self._able.values():
            able.discard(worker)
        dask_internals.tell(
            self._scheduler, self._scheduler.workers, {"op": "ep-lost", "worker": worker}
        )
        for layer in self:
            changed = False
            for rank, serving in enumerate(layer.serving):
                if worker in serving:
                    serving.discard(worker)
                    changed = True
                if layer.loading.get(rank) == worker:
                    del layer.loading[rank]
            if changed:
                self._tell(layer, self._scheduler.workers)

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
            self._tell(layer, self._scheduler.workers)

    def clear(self) -> None:
        for token in list(self._layers):
            self._close(token)

    # --- how it is done ---

    def _ranks(self, key: Any) -> list[TaskState]:
        """The tasks that load the ranks of a layer, in order."""
        ranks = {}
        for task in self._scheduler.tasks[key].dependencies:
            if (found := read_rank(task.key)) is not None:
                ranks[found[1]] = task
        return [ranks[rank] for rank in sorted(ranks)]

    def _keep_at_home(self, layer: Layer, task: TaskState) -> None:
        """Let each chunk of a layer with a local placement be read by an owner of its home."""
        for chunk in task.dependents:
            number: Any = chunk.key[1] if isinstance(chunk.key, tuple) and len(chunk.key) > 1 else 0
            home = number % layer.world_size
            dask_internals.restrict(chunk, self._owners(layer.world_size, home))

    def _heard_of_layer(self, key: tuple, start: str, finish: str) -> None:
        ranks_key = read_ranks_key(key)
        layer = self._layers.get(ranks_key.token) if ranks_key is not None else None
        if layer is None:
            return
        if finish == "memory":
            layer.is_open = True
            self._tell(layer, self._scheduler.workers)
            self._scheduler.loop.add_callback(self._serve_all, layer)
        elif start == "memory":
            layer.is_open = False
            self._drop_all(layer)
        if finish == "forgotten":
            self._close(layer.token)

    def _heard_of_rank(self, token: str, rank: int, finish: str) -> None:
        layer = self._layers.get(token)
        if layer is None:
            return
        task = layer.tasks[rank]
        if finish == "memory":
            self._loaded(layer, rank)
            layer.serving[rank] |= {worker.address for worker in task.who_has or ()}
            if layer.is_open:
                self._tell(layer, self._scheduler.workers)
        elif finish == "erred" and layer.is_open:
            self._loaded(layer, rank)
            layer.error = (
                f"rank {rank}: its experts could not be loaded again: {task.exception_text}"
            )
            self._tell(layer, self._scheduler.workers)
        if finish in ("memory", "released"):
            # The scheduler is making the change: act when it is done.
            self._scheduler.loop.add_callback(self._serve, layer, rank)

    def _serve_all(self, layer: Layer) -> None:
        for rank in range(layer.world_size):
            self._serve(layer, rank)

    def _serve(self, layer: Layer, rank: int) -> None:
        """Load a rank on owners that do not serve it yet; drop it on workers that do not own it."""
        if self._layers.get(layer.token) is not layer or not layer.is_open:
            return
        owners = self._owners(layer.world_size, rank)
        present = {owner for owner in owners if owner in self._scheduler.workers}
        missing = present - layer.serving[rank]
        task = layer.tasks[rank]
        if not missing:
            if present and (extra := layer.serving[rank] - present):
                layer.serving[rank] -= extra
                self._tell(layer, self._scheduler.workers)
                drop = {"op": "ep-drop", "token": layer.token, "rank": rank}
                dask_internals.tell(self._scheduler, extra, drop)
            return
        if task.state == "released":
            self._load_on(layer, rank, min(missing, key=natural_order))
            dask_internals.run_again(self._scheduler, task)
        elif task.state != "erred" and layer.loading.get(rank) not in missing:
            self._load_on(layer, rank, min(missing, key=natural_order))
            dask_internals.place_again(self._scheduler, task)

    def _load_on(self, layer: Layer, rank: int, worker: str) -> None:
        """Load the experts of a rank there, before all other tasks: chunks wait for them."""
        layer.loading[rank] = worker
        dask_internals.pin(layer.tasks[rank], {worker})
        layer.hastened += dask_internals.hasten(layer.tasks[rank], self._workers_with)

    def _loaded(self, layer: Layer, *ranks: int) -> None:
        """Note that these ranks are not being loaded any more."""
        for rank in ranks:
            layer.loading.pop(rank, None)
        if layer.hastened:
            # The scheduler is making the change: act when it is done.
            self._scheduler.loop.add_callback(self._release_hastened, layer)

    def _release_hastened(self, layer: Layer) -> None:
        if not layer.loading:
            layer.hastened = dask_internals.release_hastened(self._scheduler, layer.hastened, Able)

    def _workers_with(self, needs: Mapping[str, float]) -> Able:
        """The workers that have these resources, now and later."""
        kind = frozenset(needs.items())
        if kind not in self._able:
            self._able[kind] = Able(needs)
            for address, worker in self._scheduler.workers.items():
                self._able[kind].hear(address, worker.resources)
        return self._able[kind]

    def _tell(self, layer: Layer, workers: Iterable[str]) -> None:
        self._version += 1
        message = {
            "op": "ep-route",
            "token": layer.token,
            "version": self._version,
            "owners": [sorted(of_rank, key=natural_order) for of_rank in self._routes(layer)],
            "is_open": layer.is_open,
            "error": layer.error,
        }
        dask_internals.tell(self._scheduler, list(workers), message)

    def _routes(self, layer: Layer) -> list[Collection[str]]:
        """The workers that chunks send packets to, for each rank: owners that have loaded it, else
        others that have."""
        routes: list[Collection[str]] = []
        for rank, serving in enumerate(layer.serving):
            owners = self._owners(layer.world_size, rank)
            routes.append((serving & owners) or serving if layer.is_open else ())
        return routes

    def _drop_all(self, layer: Layer) -> None:
        """Let services drop the experts of a layer, which may be needed again."""
        dask_internals.tell(
            self._scheduler, self._scheduler.workers, {"op": "ep-close", "token": layer.token}
        )
        layer.serving, layer.error = [set() for _ in layer.tasks], None
        self._loaded(layer, *range(layer.world_size))
        for rank, task in enumerate(layer.tasks):
            dask_internals.pin(task, self._owners(layer.world_size, rank))
        self._tell(layer, self._scheduler.workers)

    def _close(self, token: str) -> None:
        layer = self._layers.pop(token)
        self._loaded(layer, *range(layer.world_size))
        dask_internals.tell(
            self._scheduler, self._scheduler.workers, {"op": "ep-close", "token": token}
        )
