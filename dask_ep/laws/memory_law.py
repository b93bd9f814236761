"""How much memory does a worker need if all its experts stay loaded?

One law for all decisions, plans and reports; its inputs are numbers that describe the job and the
workers. `passes` has the law for experts in passes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dask_ep.laws.costs import PART_OF_A_WORKER, SORT_BYTES, Need, Spread, chunks_held
from dask_ep.laws.work import Work
from dask_ep.placement.placement import Placement
from dask_ep.placement.policies import most_physical


@dataclass(frozen=True)
class Layout:
    """How a job runs on its backend, in numbers."""

    world_size: int
    #: R
    workers: int
    #: number of processes
    threads: int
    #: tasks at a time in each process
    memory_limit: int | None = None
    #: bytes that each process may use; of its GPU, if it computes on one
    placement: Placement | str | None = None
    #: a placement, or the name of a policy
    on_devices: bool = False
    #: whether each worker computes on a GPU
    host_limit: int | None = None
    #: bytes that each may use on the host, if `memory_limit` is that of a GPU
    in_process: bool = False
    #: whether the job runs on threads of this process, without Dask workers
    ranks_given: bool = False
    #: whether the number of ranks was given, whatever the number of workers
    cores: int | None = None
    #: cores that all workers share, if they are processes of one machine
    starts_workers: bool = False
    #: whether workers are started for the run

    @property
    def dask_workers(self) -> int | None:
        """Number of Dask workers; None if the job runs in this process."""
        return None if self.in_process else self.workers

    @property
    def serving(self) -> int:
        """Number of workers that serve ranks; their numbers of ranks differ by one at most."""
        return min(self.workers, self.world_size)

    def slots_of_a_worker(self, num_experts: int) -> int:
        """Return how many experts one worker holds at most, for any routing."""
        if isinstance(self.placement, Placement):
            slots = self.placement.physical_per_rank
        else:
            slots = most_physical(self.placement or "contiguous", num_experts, self.world_size)
        return slots * self.ranks_of_a_worker

    @property
    def ranks_of_a_worker(self) -> int:
        """Number of ranks that one worker serves, at most."""
        return -(-self.world_size // self.serving)

    def spread_at_worst(self, slots: int) -> Spread:
        """Return bounds on the rows of packets and answers for any routing with `slots` slots."""
        workers = 0 if self.in_process else self.serving
        return Spread.at_worst(slots, self.world_size, workers)

    @property
    def usable_bytes(self) -> int | None:
        """Bytes of the memory limit that the job may use: less on workers, which enforce it."""
        if self.memory_limit is None or self.on_devices or self.in_process:
            return self.memory_limit
        return int(self.memory_limit * PART_OF_A_WORKER)


def need(
    work: Work,
    layout: Layout,
    as_stored: bool = False,
    experts: int | None = None,
    spread: Spread | None = None,
) -> Need:
    """Return the memory one worker (or its GPU) needs at most, as a function of a chunk's rows.

    Parameters
    ----------
    work, layout : what is computed, and where
    as_stored : whether experts are held as they are stored, with one decoded in each thread
    experts : number of experts that the worker holds; default: the most it may hold
    spread : rows of packets and answers; default: the most for any routing
    """
    experts = layout.slots_of_a_worker(work.experts) if experts is None else experts
    spread = layout.spread_at_worst(work.slots) if spread is None else spread
    held = experts * work.held_bytes(as_stored) + work.layer.loaded
    if as_stored:
        held += layout.threads * work.expert_loaded
    if work.on_device is not None:
        return work.on_device.need(held, layout.threads, layout.world_size, spread)
    return Need(
        held,
        chunks_held(layout.threads, layout.world_size, spread, work.widening),
        max(work.row_bytes, 1),
        layout.threads * (work.scratch + work.read_bytes),
        layout.threads * work.slots * SORT_BYTES,
    )


def host_need(work: Work, layout: Layout, spread: Spread | None = None) -> Need:
    """Return the host memory that a worker with a GPU needs at most."""
    spread = layout.spread_at_worst(work.slots) if spread is None else spread
    assert work.on_device is not None
    return work.on_device.host_need(layout.threads, spread, work.read_bytes)


def rows_within(work: Work, layout: Layout, as_stored: bool = False) -> float:
    """Return the maximum rows of a chunk that fit into all limits; infinite without any."""
    most = math.inf
    if layout.memory_limit is not None:
        most = need(work, layout, as_stored).rows_within(layout.memory_limit)
    if layout.on_devices and layout.host_limit is not None:
        most = min(most, host_need(work, layout).rows_within(layout.host_limit))
    return most
