"""Which worker should serve which rank, while workers come and go?

A plugin in the scheduler keeps, for each world size, the owners of every rank; one map serves all
graphs of that world size. `layer_map` lets the owners load what they serve. Tasks of experts that
are processed in passes run on the owners of their rank as well: all tasks of a rank share one set
of addresses, so that moving the rank is a change of that set. (Annotations would be lost when Dask
optimises an array graph, and tasks restricted by worker name would hang after a restart.) Nothing
else is restricted.

- A worker dies, leaves, retires, or is paused for longer than `pause_limit`: its ranks go to the
  others at once. A survivor takes up to twice its fair share at once; the other ranks wait for
  `settle`, so that the last worker left does not read everything.
- A worker joins: it takes ranks without an owner at once, up to its fair share.
- No worker joined or left for `settle` seconds (or 5 × `settle` since the first change): ranks that
  still lack an owner get one, then as few ranks as possible move to bring the workers within 10 %
  or one rank of their shares. This stops no task: until a new owner has loaded its experts, the old
  one serves. A rank that moved in this way stays for 10 × `settle`, unless its owner is lost, so
  that a worker that comes and goes does not cause slices to be read again and again.

The fair share is that among the workers present when all was last settled. `owner_rules` decides,
this file listens and acts, and `ownership` is the user's handle.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import wraps
from math import inf
from typing import Any

from distributed import SchedulerPlugin
from distributed.core import Status
from distributed.scheduler import Scheduler

from dask_ep.cluster import dask_internals
from dask_ep.cluster.hot_ranks import LOOK_SECONDS
from dask_ep.cluster.layer_map import LayerMap
from dask_ep.cluster.owner_rules import capacities, natural_order
from dask_ep.cluster.ranks import OwnersOfRank, RankMap, Ranks
from dask_ep.cluster.replicas import Replicas
from dask_ep.graph.keys import DISPATCH, read_rank

OWNERS_PLUGIN = "dask-ep-owners"
"""The plugin's name on the scheduler."""

METADATA = ("dask-ep", "owners")
"""Key in the scheduler's metadata of all owners: {world size: [[owner, ...] of each rank]}."""

SETTLE = 2.0
"""Default seconds without a change of workers before ranks are rebalanced: a nanny needs about one
to two seconds to restart a killed worker."""

PAUSE_LIMIT = 30.0
"""Default seconds after which a paused worker loses its ranks: spilling a few GB takes less."""


def _seen_by_the_user(hook: Callable) -> Callable:
    """Keep an error of the plugin, which the scheduler would only log, for `Owners.failures`.

    Chunks may wait for something that was not done, so they end with an error; tasks may be pinned
    to a lost worker, so they may now run anywhere.
    """

    @wraps(hook)
    def guarded(self: Ownership, *args: Any, **kwargs: Any) -> Any:
        try:
            return hook(self, *args, **kwargs)
        except Exception as error:
            failure = f"{time.strftime('%X')} {hook.__name__}: {error!r}"
            self.failures.append(failure)
            self.layers.fail(f"the owners of ranks are unknown after an error: {failure}")
            # The scheduler may be making a change: act when it is done.
            free = dask_internals.free_stuck
            self.scheduler.loop.add_callback(free, self.scheduler, OwnersOfRank)
            raise

    return guarded


class Timers(dict[str, object]):
    """Actions to run later, once, by their name."""

    def __init__(self, loop: Any):
        super().__init__()
        self._loop = loop

    def start(self, what: str, seconds: float, then: Callable, *args: Any) -> None:
        self[what] = self._loop.call_later(seconds, then, *args)

    def cancel(self, what: str) -> None:
        if timer := self.pop(what, None):
            self._loop.remove_timeout(timer)

    def clear(self) -> None:
        for what in list(self):
            self.cancel(what)


class Ownership(SchedulerPlugin):
    """The plugin: on the scheduler from the first claim of a client until the last one ends."""

    name = OWNERS_PLUGIN
    idempotent = True

    def __init__(self, scheduler: Scheduler):
        self.scheduler = scheduler
        self.settle, self.pause_limit = SETTLE, PAUSE_LIMIT
        self.claims: dict[str, int] = {}  # by client: the world size of its last call
        self.ranks = RankMap(lambda size, rank: self.layers.serve(size, rank))
        self.away: set[str] = set()  # workers that have been paused for too long
        self.layers = LayerMap(scheduler, lambda size, rank: self.ranks[size].owners[rank])
        self.chunks_in_flight: float | None = None  # on each worker; None: by its threads
        self.is_leaving = False
        self.replicate_hot = True  # whether hot ranks get further owners
        self.replicas = Replicas(self.ranks)
        self.timers = Timers(scheduler.loop)
        self.unsettled_since = inf  # monotonic seconds
        self.failures: deque[str] = deque(maxlen=100)

    # Hooks that the scheduler calls

    @_seen_by_the_user
    def update_graph(self, scheduler: Scheduler, *, tasks: Collection, **kwargs: Any) -> None:
        """Assign owners to the ranks of new graphs, before a worker gets the first task."""
        if self.is_leaving:
            return
        for world_size in self.layers.world_sizes(tasks):
            self.add_ranks(world_size)
        self.layers.add(tasks)
        self._pin_passes(tasks)

    def _pin_passes(self, tasks: Collection) -> None:
        """Let the tasks of experts that are processed in passes run on the owners of their rank."""
        longer = (key for key in tasks if isinstance(key, tuple) and len(key) > 2)
        found = [(key, of_rank) for key in longer if (of_rank := read_rank(key)) is not None]
        world_sizes: defaultdict[str, int] = defaultdict(int)
        for _, (token, rank) in found:
            world_sizes[token] = max(world_sizes[token], rank + 1)
        for world_size in set(world_sizes.values()) - {1}:
            self.add_ranks(world_size)
        for key, (token, rank) in found:
            if world_sizes[token] > 1:
                owners = self.ranks[world_sizes[token]].owners[rank]
                dask_internals.restrict(self.scheduler.tasks[key], owners)

    @_seen_by_the_user
    def transition(self, key: object, start: str, finish: str, *args: Any, **kwargs: Any) -> None:
        self.layers.heard(key, start, finish)
        if not len(self.layers) and (self.is_leaving or self.replicas):
            self.scheduler.loop.add_callback(self._leave if self.is_leaving else self._shrink)

    @_seen_by_the_user
    def add_worker(self, scheduler: Scheduler, worker: str) -> None:
        self._arrived(worker)

    @_seen_by_the_user
    def remove_worker(self, scheduler: Scheduler, worker: str, **kwargs: Any) -> None:
        self._gone(worker, "left")

    @_seen_by_the_user
    def log_event(self, topic: str, msg: Any) -> None:
        """React to workers that pause, resume or retire: there is no other hook for that."""
        if isinstance(msg, dict) and msg.get("action") == "worker-status-change":
            # The scheduler is making the change: act when it is done.
            self.scheduler.loop.add_callback(self._status_changed, topic, msg["status"])

    @_seen_by_the_user
    def restart(self, scheduler: Scheduler) -> None:
        self.layers.clear()
        self._publish()  # the restart has cleared all metadata

    @_seen_by_the_user
    def valid_workers_downscaling(self, scheduler: Scheduler, workers: list) -> list:
        """Keep the only owner of a rank while work is pending; afterwards all may be retired."""
        passes = (g for g in scheduler.task_groups.values() if g.name.startswith(DISPATCH))
        if not any(layer.is_open for layer in self.layers) and all(g.done for g in passes):
            return workers
        needed = self.ranks.only_owners()
        return [worker for worker in workers if worker.address not in needed]

    @_seen_by_the_user
    def remove_client(self, scheduler: Scheduler, client: str) -> None:
        self.release(client)

    # Calls of clients

    def add_ranks(self, world_size: int) -> None:
        """Assign owners to the ranks of this world size, if it is new."""
        if world_size not in self.ranks:
            self.ranks[world_size] = Ranks.unowned(world_size)
            self.assign("first owner")

    def claim(
        self,
        client: str,
        world_size: int,
        loads: Sequence[float] | None,
        replicas: Mapping[int, int] | None,
    ) -> None:
        """Register a client's claim to owners, with these loads and numbers of owners of ranks."""
        ranks = self.ranks.setdefault(world_size, Ranks.unowned(world_size))
        self.claims[client] = world_size
        if loads is not None:
            ranks.loads = [float(load) for load in loads]
        for rank, owners in (replicas or {}).items():
            ranks.replicas[rank] = owners
        self.assign("first owner")
        if "look" not in self.timers:
            self._look()
        if loads is not None:
            self._settle_later()

    def release(self, client: str) -> None:
        """Drop the claim of a client; after the last one, remove the plugin once work is done."""
        if self.claims.pop(client, None) is None or self.claims:
            return
        self.is_leaving = True
        self._publish()
        if not len(self.layers):
            self._leave()

    def _leave(self) -> None:
        if not self.is_leaving or self.scheduler.plugins.get(OWNERS_PLUGIN) is not self:
            return
        self.timers.clear()
        self.scheduler.plugins.pop(OWNERS_PLUGIN)
        dask_internals.free_stuck(self.scheduler, OwnersOfRank)

    def place(self, world_size: int, rank: int, workers: Collection[str], why: str) -> None:
        """Make exactly these workers the owners of a rank, until all of them are lost."""
        ranks = self.ranks[world_size]
        ranks.by_hand.add(rank)
        ranks.replicas[rank] = len(workers)
        self.ranks.change(world_size, rank, workers, why)
        self._publish()

    def workers(self) -> dict[str, float]:
        """Workers that can own ranks, and their capacities: GPUs if any are declared, else memory.

        In an order that depends on names only, so that the same workers get the same ranks.
        """
        able = [
            worker
            for worker in self.scheduler.workers.values()
            if worker.status in (Status.running, Status.paused, Status.init)
            and worker.address not in self.away
        ]
        able.sort(key=lambda worker: natural_order(str(worker.name)))
        gpus = {w.address: w.resources["GPU"] for w in able if w.resources.get("GPU", 0) > 0}
        return gpus or capacities({w.address: w.memory_limit for w in able})

    # Events

    def _arrived(self, worker: str) -> None:
        self._settle_later()
        self.away.discard(worker)
        self.layers.welcome(worker)
        self._limit([worker])
        self.assign(f"{worker} came", shares=1)

    def _gone(self, worker: str, how: str) -> None:
        self._settle_later()
        self.timers.cancel(worker)
        if worker not in self.scheduler.workers:
            self.away.discard(worker)
            self.layers.lose(worker)
        self.assign(f"{worker} {how}", shares=2)
        if worker in self.scheduler.workers:
            dask_internals.call_back(self.scheduler, worker, OwnersOfRank)

    @_seen_by_the_user
    def _status_changed(self, worker: str, status: str) -> None:
        self.timers.cancel(worker)
        if worker not in self.scheduler.workers or OWNERS_PLUGIN not in self.scheduler.plugins:
            return
        if status == "running":
            self._arrived(worker)
        elif status == "paused":
            self.timers.start(worker, self.pause_limit, self._paused_for_long, worker)
        else:
            self._gone(worker, "retires")

    @_seen_by_the_user
    def _paused_for_long(self, worker: str) -> None:
        self.away.add(worker)
        self._gone(worker, f"is paused for {self.pause_limit:g} s")

    @_seen_by_the_user
    def _settle(self) -> None:
        """Once no worker joins or leaves any more: owners for all ranks, then balance."""
        self.timers.cancel("settle")
        self.unsettled_since = inf
        workers = self.workers()
        if not workers:
            return
        self.ranks.settled_capacity = sum(workers.values())
        self.assign("settled")
        self.ranks.balance(workers, keep=10 * self.settle)
        self._publish()

    # Actions

    def assign(self, why: str, shares: float = inf) -> None:
        """Give owners to ranks without one, each worker up to `shares` times its fair share."""
        self.ranks.assign(self.workers(), why, shares)
        self._publish()

    def limit(self, chunks: float | None) -> None:
        """Bound the chunks in flight on each worker; None: by its threads."""
        self.chunks_in_flight = chunks
        self._limit(self.scheduler.workers)

    def _limit(self, workers: Collection[str]) -> None:
        message = {"op": "ep-limit", "chunks": self.chunks_in_flight}
        dask_internals.tell(self.scheduler, list(workers), message)

    @_seen_by_the_user
    def _look(self) -> None:
        """Give another owner to a hot rank, if there is one."""
        self.timers.start("look", LOOK_SECONDS, self._look)
        if not self.replicate_hot or not len(self.layers):
            return
        sizes = {layer.token: layer.world_size for layer in self.layers}
        workers = [self.scheduler.workers[address] for address in self.workers()]
        if self.replicas.grow(workers, sizes):
            self._publish()

    def _shrink(self) -> None:
        """Remove the added owners of hot ranks once no layer is computed any more."""
        if not len(self.layers):
            self.replicas.shrink()
            self._publish()

    def _settle_later(self) -> None:
        now = time.monotonic()
        self.unsettled_since = min(self.unsettled_since, now)
        latest = self.unsettled_since + 5 * self.settle
        self.timers.cancel("settle")
        self.timers.start("settle", max(0.0, min(self.settle, latest - now)), self._settle)

    def _publish(self) -> None:
        """Publish the owners to clients, and start tasks that waited for an owner."""
        if self.is_leaving:
            self.scheduler.task_metadata.pop(METADATA[0], None)
        else:
            self.scheduler.set_metadata(list(METADATA), self.ranks.published())
        dask_internals.begin_stuck(self.scheduler, OwnersOfRank)
