"""How does a hot rank get another owner, and when is that one removed?

`hot_ranks` decides which rank is hot, by the workers' reports with each heartbeat. The added owner
stays until no layer is computed any more.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from math import inf

from distributed.core import Status
from distributed.scheduler import WorkerState

from dask_ep.cluster.hot_ranks import MEMORY, HotRanks, Rank, Sample
from dask_ep.cluster.ranks import RankMap


class Replicas:
    """The added owners of hot ranks."""

    def __init__(self, ranks: RankMap):
        self._ranks, self._hot = ranks, HotRanks()
        self._grown: dict[Rank, str] = {}

    def __len__(self) -> int:
        return len(self._grown)

    def grow(self, workers: Iterable[WorkerState], sizes: Mapping[str, int]) -> bool:
        """Give another owner to a hot rank, if there is one.

        Parameters
        ----------
        workers : those that can own ranks
        sizes : world sizes of the layers that are computed, by their tokens
        """
        told, nbytes = {}, dict[Rank, int]()
        for worker in workers:
            sample = _sample(worker, sizes, nbytes)
            if sample is not None:
                told[worker.address] = sample
        owners = {
            (size, rank): set(of_rank)
            for size, ranks in self._ranks.items()
            for rank, of_rank in enumerate(ranks.living())
        }
        replica = self._hot.look(told, owners, nbytes)
        if replica is None:
            return False
        size, rank = replica.rank
        self._grown[replica.rank] = replica.worker
        self._ranks[size].replicas[rank] = len(owners[replica.rank]) + 1
        self._ranks.change(size, rank, owners[replica.rank] | {replica.worker}, replica.why)
        return True

    def shrink(self) -> None:
        """Remove all of them."""
        for (size, rank), worker in self._grown.items():
            of_rank = self._ranks[size].living()[rank]
            if len(of_rank) > 1:
                self._ranks[size].replicas[rank] -= 1
                self._ranks.change(size, rank, of_rank - {worker}, "hot no more")
        self._grown.clear()


def _sample(
    worker: WorkerState, sizes: Mapping[str, int], nbytes: dict[Rank, int]
) -> Sample | None:
    """A worker's last report on its services; adds the sizes of its ranks to `nbytes`."""
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
