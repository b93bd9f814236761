"""Who shall serve which rank, while workers come and go?

A plugin in the scheduler keeps, for each world size, the owners of every rank; one map serves all
graphs of that world size. `layer_map` lets the owners load what they serve. Tasks of experts that
are processed in passes run on the owners of their rank as well: all tasks of a rank share one set
of addresses, so that moving the rank is a change of that set. (Annotations would be lost when Dask
optimises an array graph, and names of workers would hang after a restart.) Nothing else is
restricted.

- A worker dies, leaves, retires, or is paused for longer than `pause_limit`: its ranks go to the
  others at once. A survivor takes at once up to twice its fair share; what is over waits for
  `settle`, lest the last one left reads everything.
- A worker comes: it adopts ranks without an owner at once, up to its fair share.
- No worker came or left for `settle` seconds (or 5 × `settle` since the first change): ranks that
  still lack an owner get one, then as few ranks move as bring the workers within 10 % or one rank
  of their shares. This stops no task: until a new owner has loaded its experts, the old one serves.
  A rank that moved so stays for 10 × `settle`, unless its owner is lost, so that a worker that
  comes and goes does not have slices read again and again.

The fair share is that of the workers that were there when all was last settled. What decides
(`owner_rules`) is apart from what hears and acts (this file), and from what the user holds
(`ownership`).
"""

from __future__ import annotations

import logging
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
from dask_ep.cluster.hot_ranks import LOOK_SECONDS, MEMORY, HotRanks, Rank, Sample
from dask_ep.cluster.layer_map import LayerMap
from dask_ep.cluster.owner_rules import assign, balance, capacities, natural_order
from dask_ep.cluster.ranks import NOBODY, Change, OwnersOfRank, Ranks
from dask_ep.graph.keys import read_rank

logger = logging.getLogger(__name__)

PLUGIN = "dask-ep-owners"
"""The plugin's name on the scheduler."""

METADATA = ("dask-ep", "owners")
"""Where the scheduler's metadata says who owns what: {world size: [[owner, ...] of each rank]}."""

SETTLE = 2.0
"""Seconds without a change of workers before ranks are rebalanced, unless the user says otherwise:
a nanny needs about one to two seconds to bring a killed worker back."""

PAUSE_LIMIT = 30.0
"""Seconds after which a paused worker loses its ranks, unless the user says otherwise: spilling a
few gigabytes takes less."""


def _seen_by_the_user(hook: Callable) -> Callable:
    """The scheduler logs what a plugin raises, and goes on: keep it for `Owners.failures`.

    Chunks may wait for what has not been done, so they end with an error; and tasks may be pinned
    to a worker that is lost, so they may run anywhere.
    """

    @wraps(hook)
    def guarded(self: Ownership, *args: Any, **kwargs: Any) -> Any:
        try:
            return hook(self, *args, **kwargs)
        except Exception as error:
            failure = f"{time.strftime('%X')} {hook.__name__}: {error!r}"
            self.failures.append(failure)
            self.layers.fail(f"the owners of ranks are not known any more: {failure}")
            # The scheduler may be making a change: act when it is done.
            free = dask_internals.free_stuck
            self.scheduler.loop.add_callback(free, self.scheduler, OwnersOfRank)
            raise

    return guarded


class Ownership(SchedulerPlugin):
    """The plugin: lives in the scheduler from the first claim of a client to the last's end."""

    name = PLUGIN
    idempotent = True

    def __init__(self, scheduler: Scheduler):
        self.scheduler = scheduler
        self.settle, self.pause_limit = SETTLE, PAUSE_LIMIT
        self.claims: dict[str, int] = {}  # by client: the world size that it last asked for
        self.ranks: dict[int, Ranks] = {}  # by world size
        self.away: set[str] = set()  # workers that have been paused for too long
        self.settled_capacity = 0.0  # of all workers, when all was last settled
        self.layers = LayerMap(scheduler, lambda size, rank: self.ranks[size].owners[rank])
        self.chunks_in_flight: float | None = None  # on each worker; None: by its threads
        self.is_leaving = False
        self.replicate_hot = True  # whether hot ranks get further owners
        self.hot = HotRanks()
        self.grown: dict[Rank, str] = {}  # ranks that have got one, and which
        self.timers: dict[str, object] = {}  # by what they wait for
        self.unsettled_since = inf  # monotonic seconds
        self.failures: deque[str] = deque(maxlen=100)
        self.changes: deque[Change] = deque(maxlen=10_000)

    # What the scheduler tells

    @_seen_by_the_user
    def update_graph(self, scheduler: Scheduler, *, tasks: Collection, **kwargs: Any) -> None:
        """Give owners to the ranks of new graphs, before a worker gets the first task."""
        if self.is_leaving:
            return
        for world_size in self.layers.world_sizes(tasks):
            self.add_ranks(world_size)
        self.layers.add(tasks)
        self._pin_passes(tasks)

    def _pin_passes(self, tasks: Collection) -> None:
        """Let the tasks of experts that are processed in passes run on the owners of their rank."""
        found = [(key, read_rank(key)) for key in tasks if isinstance(key, tuple) and len(key) > 2]
        found = [(key, of_rank) for key, of_rank in found if of_rank is not None]
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
        if not len(self.layers) and (self.is_leaving or self.grown):
            self.scheduler.loop.add_callback(self._leave if self.is_leaving else self._shrink)

    @_seen_by_the_user
    def add_worker(self, scheduler: Scheduler, worker: str) -> None:
        self._arrived(worker)

    @_seen_by_the_user
    def remove_worker(self, scheduler: Scheduler, worker: str, **kwargs: Any) -> None:
        self._gone(worker, "left")

    @_seen_by_the_user
    def log_event(self, topic: str, msg: Any) -> None:
        """React to workers that pause, resume or retire: no other hook tells."""
        if isinstance(msg, dict) and msg.get("action") == "worker-status-change":
            # The scheduler is making the change: act when it is done.
            self.scheduler.loop.add_callback(self._status_changed, topic, msg["status"])

    @_seen_by_the_user
    def restart(self, scheduler: Scheduler) -> None:
        self.layers.clear()
        self._publish()  # the restart has cleared all metadata

    @_seen_by_the_user
    def valid_workers_downscaling(self, scheduler: Scheduler, workers: list) -> list:
        """Spare the only owner of a rank while work is pending; afterwards all may go."""
        passes = (g for g in scheduler.task_groups.values() if g.name.startswith("ep_dispatch-"))
        if not any(layer.is_open for layer in self.layers) and all(g.done for g in passes):
            return workers
        needed = {
            owner
            for ranks in self.ranks.values()
            for of_rank in ranks.living()
            if len(of_rank) == 1
            for owner in of_rank
        }
        return [worker for worker in workers if worker.address not in needed]

    @_seen_by_the_user
    def remove_client(self, scheduler: Scheduler, client: str) -> None:
        self.release(client)

    # What clients ask

    def add_ranks(self, world_size: int) -> None:
        """Give owners to the ranks of this world size, if it is new."""
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
        """Let a client need owners, of ranks with these loads and numbers of owners."""
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
        """Drop the claim of a client; with the last one, go when what has begun is done."""
        if self.claims.pop(client, None) is None or self.claims:
            return
        self.is_leaving = True
        self._publish()
        if not len(self.layers):
            self._leave()

    def _leave(self) -> None:
        if not self.is_leaving or self.scheduler.plugins.get(PLUGIN) is not self:
            return
        for timer in self.timers.values():
            self.scheduler.loop.remove_timeout(timer)
        self.timers.clear()
        self.scheduler.plugins.pop(PLUGIN)
        dask_internals.free_stuck(self.scheduler, OwnersOfRank)

    def place(self, world_size: int, rank: int, workers: Collection[str], why: str) -> None:
        """Make exactly these workers the owners of a rank, until all of them are lost."""
        ranks = self.ranks[world_size]
        ranks.by_hand.add(rank)
        ranks.replicas[rank] = len(workers)
        self._change(world_size, rank, workers, why)
        self._publish()

    def workers(self) -> dict[str, float]:
        """Who can own a rank, and their capacities: GPUs where workers declare some, else memory.

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

    def places(self) -> int:
        """Count the ranks that the workers can own one at a time: GPUs if any, else workers."""
        workers = self.workers()
        has_gpus = any(self.scheduler.workers[w].resources.get("GPU") for w in workers)
        return int(sum(workers.values())) if has_gpus else len(workers)

    # What happens

    def _arrived(self, worker: str) -> None:
        self._settle_later()
        self.away.discard(worker)
        self.layers.welcome(worker)
        self._limit([worker])
        self.assign(f"{worker} came", shares=1)

    def _gone(self, worker: str, how: str) -> None:
        self._settle_later()
        self._cancel(worker)
        if worker not in self.scheduler.workers:
            self.away.discard(worker)
            self.layers.lose(worker)
        self.assign(f"{worker} {how}", shares=2)
        if worker in self.scheduler.workers:
            dask_internals.call_back(self.scheduler, worker, OwnersOfRank)

    @_seen_by_the_user
    def _status_changed(self, worker: str, status: str) -> None:
        self._cancel(worker)
        if worker not in self.scheduler.workers or PLUGIN not in self.scheduler.plugins:
            return
        if status == "running":
            self._arrived(worker)
        elif status == "paused":
            self._start(worker, self.pause_limit, self._paused_for_long, worker)
        else:
            self._gone(worker, "retires")

    @_seen_by_the_user
    def _paused_for_long(self, worker: str) -> None:
        self.away.add(worker)
        self._gone(worker, f"is paused for {self.pause_limit:g} s")

    @_seen_by_the_user
    def _settle(self) -> None:
        """Once no worker comes or goes any more: owners for all, then balance."""
        self.timers.pop("settle", None)
        self.unsettled_since = inf
        workers = self.workers()
        if not workers:
            return
        self.settled_capacity = sum(workers.values())
        self.assign("settled")
        now = time.monotonic()
        for world_size, ranks in self.ranks.items():
            fixed = ranks.by_hand | {
                rank
                for rank, balanced_at in enumerate(ranks.balanced_at)
                if now - balanced_at < 10 * self.settle
            }
            before = ranks.living()
            for rank, owners in enumerate(balance(before, workers, ranks.loads, fixed)):
                if owners != before[rank]:
                    ranks.balanced_at[rank] = now
                    self._change(world_size, rank, owners, "rebalanced")
        self._publish()

    # How it is done

    def assign(self, why: str, shares: float = inf) -> None:
        """Give owners to the ranks that lack one, to each worker up to so many fair shares."""
        workers = self.workers()
        if not self.settled_capacity:
            self.settled_capacity = sum(workers.values())
        for world_size, ranks in self.ranks.items():
            before = ranks.living()
            limit = shares * sum(ranks.loads) / (self.settled_capacity or 1.0)
            chosen = assign(before, workers, ranks.loads, ranks.replicas, limit)
            for rank, owners in enumerate(chosen):
                self._change(world_size, rank, owners, why)
                if not before[rank] & owners:
                    ranks.by_hand.discard(rank)
        self._publish()

    def _change(self, world_size: int, rank: int, owners: Collection[str], why: str) -> None:
        of_rank = self.ranks[world_size].owners[rank]
        before, after = of_rank - {NOBODY}, set(owners)
        if before == after:
            return
        of_rank.clear()
        of_rank.update(after or {NOBODY})
        change = Change(time.time(), world_size, rank, _sorted(before), _sorted(after), why)
        self.changes.append(change)
        logger.info("rank %d of %d: %s -> %s (%s)", rank, world_size, before, after, why)
        self.layers.serve(world_size, rank)

    def limit(self, chunks: float | None) -> None:
        """Bound the chunks in flight on each worker; None: by its threads."""
        self.chunks_in_flight = chunks
        self._limit(self.scheduler.workers)

    def _limit(self, workers: Collection[str]) -> None:
        message = {"op": "ep-limit", "chunks": self.chunks_in_flight}
        dask_internals.tell(self.scheduler, list(workers), message)

    @_seen_by_the_user
    def _look(self) -> None:
        """Give a further owner to a rank that is hot, if there is one."""
        self._start("look", LOOK_SECONDS, self._look)
        if not self.replicate_hot or not len(self.layers):
            return
        sizes = {layer.token: layer.world_size for layer in self.layers}
        told, nbytes = {}, dict[Rank, int]()
        for address in self.workers():
            sample = self._sample(address, sizes, nbytes)
            if sample is not None:
                told[address] = sample
        owners = {
            (size, rank): set(of_rank)
            for size, ranks in self.ranks.items()
            for rank, of_rank in enumerate(ranks.living())
        }
        replica = self.hot.look(told, owners, nbytes)
        if replica is not None:
            size, rank = replica.rank
            self.grown[replica.rank] = replica.worker
            self.ranks[size].replicas[rank] = len(owners[replica.rank]) + 1
            self._change(size, rank, owners[replica.rank] | {replica.worker}, replica.why)
            self._publish()

    def _sample(
        self, address: str, sizes: Mapping[str, int], nbytes: dict[Rank, int]
    ) -> Sample | None:
        """What a worker told of its services last; `nbytes` learns the sizes of its ranks."""
        worker = self.scheduler.workers[address]
        told = worker.metrics.get("dask_ep")
        if told is None or worker.status != Status.running:
            return None
        waiting: defaultdict[Rank, int] = defaultdict(int)
        for token, rank, rows in told["queues"]:
            if token in sizes:
                waiting[sizes[token], rank] += rows
        for token, rank, held in told["slices"]:
            if token in sizes:
                nbytes[sizes[token], rank] = max(held, nbytes.get((sizes[token], rank), 0))
        used, limit = worker.metrics.get("memory", 0), worker.memory_limit
        room = MEMORY * limit - used if limit else inf
        return Sample(told["time"], told["core"], told["threads"], waiting, room)

    def _shrink(self) -> None:
        """Take the further owners of hot ranks back when no layer is computed any more."""
        if len(self.layers):
            return
        for (size, rank), worker in self.grown.items():
            of_rank = self.ranks[size].living()[rank]
            if len(of_rank) > 1:
                self.ranks[size].replicas[rank] -= 1
                self._change(size, rank, of_rank - {worker}, "hot no more")
        self.grown.clear()
        self._publish()

    def _settle_later(self) -> None:
        now = time.monotonic()
        self.unsettled_since = min(self.unsettled_since, now)
        latest = self.unsettled_since + 5 * self.settle
        self._cancel("settle")
        self._start("settle", max(0.0, min(self.settle, latest - now)), self._settle)

    def _start(self, what: str, seconds: float, then: Callable, *args: Any) -> None:
        self.timers[what] = self.scheduler.loop.call_later(seconds, then, *args)

    def _cancel(self, what: str) -> None:
        if timer := self.timers.pop(what, None):
            self.scheduler.loop.remove_timeout(timer)

    def _publish(self) -> None:
        """Let clients read who owns what, and start tasks that waited for an owner."""
        owners = {
            str(world_size): [_sorted(of_rank) for of_rank in ranks.living()]
            for world_size, ranks in self.ranks.items()
        }
        if self.is_leaving:
            self.scheduler.task_metadata.pop(METADATA[0], None)
        else:
            self.scheduler.set_metadata(list(METADATA), owners)
        dask_internals.begin_stuck(self.scheduler, OwnersOfRank)


def _sorted(owners: Collection[str]) -> tuple[str, ...]:
    return tuple(sorted(owners, key=natural_order))
