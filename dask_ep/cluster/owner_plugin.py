"""Which worker should serve which rank, while workers come and go?

A plugin in the scheduler keeps, for each world size, the owners of every rank; one map serves all
graphs of that world size. All tasks of a rank are restricted to one set of addresses, so that
moving the rank is a change of that set. (Annotations would be lost when Dask optimises an array
graph, and tasks restricted by worker name would hang after a restart.)

- A worker dies, leaves, retires, or is paused for longer than `pause_limit`: its ranks go to the
  others at once. A survivor takes up to twice its fair share at once; the other ranks wait for
  `settle`, so that the last worker left does not read everything.
- A worker joins: it takes ranks without an owner at once, up to its fair share, which is that among
  the workers present when all was last settled.
- No worker joined or left for `settle` seconds (or 5 × `settle` since the first change): ranks that
  still lack an owner get one, then as few ranks as possible move to bring the workers within 10 %
  or one rank of their shares. Until a new owner has loaded its experts, the old one serves. A rank
  that moved in this way stays for 10 × `settle`, unless its owner is lost, so that a worker that
  comes and goes does not cause slices to be read again and again.
- A rank is hot (`hot_ranks`): it gets another owner, until no layer is computed any more.

`owner_rules` decides, this file listens and acts, `layer_map` lets the owners load what they serve,
and `ownership` is the user's handle.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection
from functools import wraps
from math import inf
from typing import Any

from distributed import SchedulerPlugin
from distributed.core import Status
from distributed.scheduler import Scheduler

from dask_ep.cluster import dask_internals
from dask_ep.cluster.hot_ranks import LOOK_SECONDS, HotRanks, read_reports
from dask_ep.cluster.layer_map import LayerMap
from dask_ep.cluster.owner_rules import OwnerRules, capacities, natural_order
from dask_ep.cluster.ranks import OwnersOfRank, RankMap, Ranks
from dask_ep.graph.keys import DISPATCH

OWNERS_PLUGIN = "dask-ep-owners"
"""The plugin's name on the scheduler."""

METADATA = ("dask-ep", "owners")
"""Key in the scheduler's metadata of all owners: {world size: [[owner, ...] of each rank]}."""


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
            free = dask_internals.free_stuck
            self.scheduler.loop.add_callback(free, self.scheduler, OwnersOfRank)
            raise

    return guarded


class Ownership(SchedulerPlugin):
    """The plugin: on the scheduler from the first claim of a client until the last one ends.

    While the scheduler calls a hook, it is making a change: what would make another one is put off.
    """

    name = OWNERS_PLUGIN
    idempotent = True

    # The rules, as in `OwnerRules`
    settle = 2.0  # a nanny needs about one to two seconds to restart a killed worker
    pause_limit = 30.0  # spilling a few GB takes less
    chunks_in_flight: float | None = None  # by the worker's threads
    replicate_hot = True

    def __init__(self, scheduler: Scheduler):
        self.scheduler = scheduler
        self.claims: dict[str, int] = {}  # by client: the world size of its last call
        self.ranks = RankMap(lambda size, rank: self.layers.serve(size, rank))
        self.layers = LayerMap(scheduler, self.owners_of, self._rest)
        self.hot = HotRanks()
        self.away: set[str] = set()  # workers that have been paused for too long
        self.timers: dict[str, object] = {}  # "settle", "look", and of paused workers
        self.unsettled_since = inf  # monotonic seconds
        self.failures: deque[str] = deque(maxlen=100)

    @property
    def is_installed(self) -> bool:
        return self.scheduler.plugins.get(OWNERS_PLUGIN) is self

    # Hooks that the scheduler calls

    @_seen_by_the_user
    def update_graph(self, scheduler: Scheduler, *, tasks: Collection, **kwargs: Any) -> None:
        """Assign owners to the ranks of new graphs, before a worker gets the first task."""
        if self.claims:
            self.layers.add(tasks)

    @_seen_by_the_user
    def transition(self, key: object, start: str, finish: str, *args: Any, **kwargs: Any) -> None:
        self.layers.heard(key, start, finish)

    @_seen_by_the_user
    def add_worker(self, scheduler: Scheduler, worker: str) -> None:
        """Let a worker that joins, or resumes, take ranks without an owner."""
        self.settle_later()
        self.away.discard(worker)
        self.layers.welcome(worker)
        self._limit([worker])
        self.assign(f"{worker} came", shares=1)

    @_seen_by_the_user
    def remove_worker(
        self, scheduler: Scheduler, worker: str, how: str = "left", **kwargs: Any
    ) -> None:
        """Give the ranks of a worker that is lost, retires, or is paused for long to others."""
        self.settle_later()
        self._cancel(worker)
        if worker not in scheduler.workers:
            self.away.discard(worker)
            self.layers.lose(worker)
        self.assign(f"{worker} {how}", shares=2)
        if worker in scheduler.workers:
            dask_internals.call_back(scheduler, worker, OwnersOfRank)

    @_seen_by_the_user
    def log_event(self, topic: str, msg: Any) -> None:
        """React to workers that pause, resume or retire: there is no other hook for that."""
        if isinstance(msg, dict) and msg.get("action") == "worker-status-change":
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
        owners = [of_rank for ranks in self.ranks.values() for of_rank in ranks.living()]
        return [worker for worker in workers if {worker.address} not in owners]

    @_seen_by_the_user
    def remove_client(self, scheduler: Scheduler, client: str) -> None:
        """Drop the claim of a client; after the last one, remove the plugin once work is done."""
        if self.claims.pop(client, None) is not None and not self.claims:
            self._publish()
            self._rest()

    # Calls of clients

    def claim(self, client: str, world_size: int, rules: OwnerRules) -> None:
        """Register a client's claim to owners; None leaves a rule as it is."""
        self.claims[client] = world_size
        vars(self).update({rule: to for rule, to in vars(rules).items() if to is not None})
        self._limit(self.scheduler.workers)
        self.assign("first owner")
        if "look" not in self.timers:
            self._look()
        if client not in self.scheduler.clients:  # it has gone, and nobody would release it
            self.remove_client(self.scheduler, client)

    def place(self, world_size: int, rank: int, workers: Collection[str], why: str) -> None:
        """Make exactly these workers the owners of a rank, until all of them are lost."""
        ranks = self.ranks[world_size]
        ranks.kept_until[rank] = inf
        ranks.added.pop(rank, None)
        ranks.replicas[rank] = len(workers)
        self.ranks.change(world_size, rank, workers, why)
        self._publish()

    def owners_of(self, world_size: int, rank: int) -> OwnersOfRank:
        """The set of owners of a rank; assign the ranks of this world size, if it is new."""
        if world_size not in self.ranks:
            self.ranks[world_size] = Ranks(world_size)
            self.assign("first owner")
        return self.ranks[world_size].owners[rank]

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

    def _status_changed(self, worker: str, status: str) -> None:
        self._cancel(worker)
        if worker not in self.scheduler.workers or not self.is_installed:
            return
        if status == "running":
            self.add_worker(self.scheduler, worker)
        elif status == "paused":
            self._later(worker, self.pause_limit, self._paused_for_long, worker)
        else:
            self.remove_worker(self.scheduler, worker, "retires")

    def _paused_for_long(self, worker: str) -> None:
        self.away.add(worker)
        self.remove_worker(self.scheduler, worker, f"is paused for {self.pause_limit:g} s")

    def settle_later(self) -> None:
        now = time.monotonic()
        self.unsettled_since = min(self.unsettled_since, now)
        latest = self.unsettled_since + 5 * self.settle
        self._later("settle", max(0.0, min(self.settle, latest - now)), self._settle)

    @_seen_by_the_user
    def _settle(self) -> None:
        """Once no worker joins or leaves any more: owners for all ranks, then balance."""
        self.unsettled_since = inf
        if workers := self.workers():
            self.assign("settled")
            self.ranks.balance(workers, keep=10 * self.settle)
            self._publish()

    @_seen_by_the_user
    def _look(self) -> None:
        """Give another owner to a hot rank, if there is one."""
        self._later("look", LOOK_SECONDS, self._look)
        if not self.replicate_hot or not len(self.layers):
            return
        sizes = {layer.token: layer.world_size for layer in self.layers}
        workers = (self.scheduler.workers[address] for address in self.workers())
        told, nbytes = read_reports(workers, sizes)
        owners = {
            (size, rank): of_rank
            for size, ranks in self.ranks.items()
            for rank, of_rank in enumerate(ranks.living())
        }
        if replica := self.hot.look(told, owners, nbytes):
            size, rank = replica.rank
            self.ranks[size].added[rank].append(owners[size, rank])
            self.ranks.change(size, rank, owners[size, rank] | {replica.worker}, replica.why)
            self._publish()

    @_seen_by_the_user
    def _rest(self) -> None:
        """Once no layer is computed any more: remove added owners, and the plugin if unclaimed."""
        if len(self.layers) or not self.is_installed:
            return
        self.ranks.remove_added()
        self._publish()
        if not self.claims:
            for timer in list(self.timers):
                self._cancel(timer)
            self.scheduler.plugins.pop(OWNERS_PLUGIN)
            dask_internals.free_stuck(self.scheduler, OwnersOfRank)

    # Actions

    def assign(self, why: str, shares: float = inf) -> None:
        """Give owners to ranks without one, each worker up to `shares` times its fair share."""
        self.ranks.assign(self.workers(), why, shares)
        self._publish()

    def _limit(self, workers: Collection[str]) -> None:
        """Bound the chunks in flight on these workers."""
        chunks = None if self.chunks_in_flight is None else float(self.chunks_in_flight)
        message = {"op": "ep-limit", "chunks": chunks}
        dask_internals.tell(self.scheduler, list(workers), message)

    def _publish(self) -> None:
        """Publish the owners to clients, and start tasks that waited for an owner."""
        if self.claims:
            owners = {str(size): ranks.listed() for size, ranks in self.ranks.items()}
            self.scheduler.set_metadata(list(METADATA), owners)
        else:
            self.scheduler.task_metadata.pop(METADATA[0], None)
        dask_internals.begin_stuck(self.scheduler, OwnersOfRank)

    def _later(self, timer: str, seconds: float, act: Callable, *args: Any) -> None:
        """Act later, once, instead of what this timer was to do."""
        self._cancel(timer)
        self.timers[timer] = self.scheduler.loop.call_later(seconds, act, *args)

    def _cancel(self, timer: str) -> None:
        if timer in self.timers:
            self.scheduler.loop.remove_timeout(self.timers.pop(timer))
