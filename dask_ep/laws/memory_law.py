"""What does a worker need of memory, where its experts stay in it?

One law for every decision, plan and report, from a job and the workers that it runs on in plain
numbers. With experts in passes, `passes` has the law.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dask_ep.laws.costs import SORT_BYTES, Need, Spread, chunks_held, usable
from dask_ep.laws.work import Work
from dask_ep.placement.placement import Placement
from dask_ep.placement.policies import most_physical


@dataclass(frozen=True)
class Layout:
    """How a job runs on its backend, in numbers."""

    world_size: int
    #: R
    workers: int
    #: processes
    threads: int
    #: tasks at a time in each
    memory_limit: int | None = None
    #: bytes that each may use; of its GPU, if it computes on one
    placement: Placement | str | None = None
    #: or the name of a policy
    on_devices: bool = False
    #: whether each worker computes on a GPU
    host_limit: int | None = None
    #: bytes of the host that each may use besides that
    in_process: bool = False
    #: whether that is this process alone, whose threads share memory: there are no Dask workers
    ranks_given: bool = False
    #: whether there must be so many ranks, however many workers
    cores: int | None = None
    #: that all workers share, if they are processes of one machine
    starts_workers: bool = False
    #: whether workers are started for the run

    @property
    def dask_workers(self) -> int | None:
        """Dask workers that share the work; None in this process."""
        return None if self.in_process else self.workers

    @property
    def serving(self) -> int:
        """Workers that serve ranks: each as many as the others, or one more."""
        return min(self.workers, self.world_size)

    def slots_of_a_worker(self, num_experts: int) -> int:
        """The most experts that one worker holds, whatever the routing says."""
        if isinstance(self.placement, Placement):
            slots = self.placement.physical_per_rank
        else:
            slots = most_physical(self.placement or "contiguous", num_experts, self.world_size)
        return slots * self.ranks_of_a_worker

    @property
    def ranks_of_a_worker(self) -> int:
        """The most ranks that one worker serves."""
        return -(-self.world_size // self.serving)

    def spread_at_worst(self, slots: int) -> Spread:
        """Rows of packets and answers of any routing with `slots` slots a row."""
        workers = 0 if self.in_process else self.serving
        return Spread.at_worst(slots, self.world_size, workers)

    @property
    def usable_bytes(self) -> int | None:
        """Bytes within the memory limit that may be filled by choice: Dask watches its workers'."""
        if self.on_devices or self.memory_limit is None:
            return self.memory_limit
        return usable(self.memory_limit)


def need(
    work: Work,
    layout: Layout,
    as_stored: bool = False,
    experts: int | None = None,
    spread: Spread | None = None,
) -> Need:
    """Say what one worker needs at most, by the rows of a chunk; of its GPU, if it computes on one.

    Parameters
    ----------
    work, layout : what is computed, and on what
    as_stored : whether experts are held as they are stored, one wide in each thread
    experts : that the worker holds
    spread : rows of packets and answers

    Notes
    -----
    Experts and spread follow from the routing; where they are not given, they are at their worst.
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
    """Say what a worker that computes on a GPU needs of the host, at most."""
    spread = layout.spread_at_worst(work.slots) if spread is None else spread
    assert work.on_device is not None
    return work.on_device.host_need(layout.threads, layout.world_size, spread, work.read_bytes)


def rows_within(work: Work, layout: Layout, as_stored: bool = False) -> float:
    """The most rows of a chunk with which all limits are kept; infinite without any."""
    most = math.inf
    if layout.memory_limit is not None:
        most = need(work, layout, as_stored).rows_within(layout.memory_limit)
    if layout.on_devices and layout.host_limit is not None:
        most = min(most, host_need(work, layout).rows_within(layout.host_limit))
    return most
