"""What will a run cost?

The routing is known before any expert runs. One pass over it, which is cheap, counts the rows of
every expert, rank and packet; the rest is arithmetic (`costs`). How a job runs is decided as for a
run (`decide`); `plan` prices that for arrays and `plan_job` for a job, and `what_if` and
`what_if_job` price many ways side by side.

    tokens, routing, experts ──survey──> rows per chunk, expert, rank ──> Plan
                                                            Decision ──────^

Axis letters: `N` rows, `k` slots per row, `E` experts, `R` ranks, `S` slots per rank, `C` chunks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

from dask.system import CPU_COUNT

from dask_ep.arrays import device
from dask_ep.arrays.checks import size_in_bytes
from dask_ep.arrays.device import Device
from dask_ep.cluster.gpus import Gpus
from dask_ep.errors import DoesNotFit, NoDeviceError
from dask_ep.graph import pipeline
from dask_ep.jobs.backends import ALL_THREADS, Processes, Threads, Where, lay_out
from dask_ep.jobs.build import Inputs, open_inputs
from dask_ep.jobs.decide import attempt, decide
from dask_ep.jobs.in_passes import free_for_rows
from dask_ep.jobs.job import Job, as_job
from dask_ep.jobs.notes import tell_notes
from dask_ep.jobs.price_job import Pricing
from dask_ep.laws.costs import Rates
from dask_ep.laws.decision import Decision
from dask_ep.laws.device_memory import THREADS_PER_GPU
from dask_ep.laws.memory_law import Layout
from dask_ep.laws.travel import ALL_ROWS, Travel
from dask_ep.placement.placement import Placement
from dask_ep.placement.placement_files import Asked, resolve
from dask_ep.pricing.price import Plan, WhatIf
from dask_ep.storage.sources import Source


@dataclass(frozen=True)
class Machine:
    """The machine that a plan of arrays assumes; a job's plan takes a backend instead.

    Examples
    --------
    >>> from dask_ep import Machine
    >>> Machine(workers=4, threads=8, memory_limit="16 GiB").workers
    4
    """

    workers: int | None = None
    #: processes that share the ranks; default: one per rank. 1 means threads of this process
    threads: int | None = None
    #: tasks at a time in each; default: this machine's cores, shared by the workers
    memory_limit: int | str | None = None
    #: that each may use, in bytes or as a string such as "4 GiB"; on its host, if it uses a GPU
    cores: int | None = None
    #: cores that the workers share, if they are on one machine; by default each thread has one
    gpu: bool = False
    #: whether each worker computes on a GPU, as in ``run_job(job, Gpus())``
    device_memory_limit: int | str | None = None
    #: memory that may be used of each GPU

    def lay_out(self, world_size: int | None, placement: Asked) -> Layout:
        """Describe by numbers how ranks run on the machine."""
        host = size_in_bytes(self.memory_limit, "memory_limit")
        of_device = size_in_bytes(self.device_memory_limit, "device_memory_limit")
        if of_device is not None and not self.gpu:
            raise ValueError("device_memory_limit needs gpu=True")
        fixed = world_size is not None and self.workers is not None
        if world_size is None:
            of_placement = placement.world_size if isinstance(placement, Placement) else None
            world_size = of_placement or pipeline.workers_in_use()
        workers = self.workers or world_size
        of_cores = max(CPU_COUNT // min(workers, world_size), 1)
        return Layout(
            world_size,
            workers,
            self.threads or (THREADS_PER_GPU if self.gpu else of_cores),
            of_device if self.gpu else host,
            resolve(placement, world_size),
            self.gpu,
            host if self.gpu else None,
            in_process=workers == 1 and not self.gpu,
            ranks_given=fixed,
            cores=self.cores,
        )


ANY_MACHINE = Machine()
"""One worker per rank; they share the cores of this machine."""


def plan(
    tokens: Any,
    routing: Any,
    experts: Any,
    *,
    topk_weights: Any = None,
    token_ids: Any = None,
    world_size: int | None = None,
    placement: Asked = None,
    chunk_rows: int | None = None,
    only: Sequence[int] | None = None,
    travel: Travel = ALL_ROWS,
    machine: Machine = ANY_MACHINE,
    rates: Rates | None = None,
    files: Sequence[Source | None] = (),
) -> Plan:
    """Plan a run of these inputs: how it will run, and what it will cost.

    Parameters
    ----------
    tokens, routing, experts, topk_weights : as for `expert_parallel`
        Only shape, dtype and chunks of the tokens are used. `experts` may be a `MoELayer`, whose
        router and shared experts are priced too; without a `routing` its router computes it, which
        reads the tokens.
    token_ids : Dask array, optional
        As for `MoELayer`, for a layer with a table.
    world_size : int, R, optional
        Default: the placement's, else the workers of the Dask client in use, else 1.
    placement : Placement, name of a policy, path of a placement file, or None for contiguous
    chunk_rows : int, optional
        Rows of a token chunk. Default: the chunks of `tokens`; if these do not fit into the memory
        limit, or experts are processed in passes, those that a run would use (`Plan.chunks`).
    only : indices of token chunks, optional
        The chunks to compute, as in a resumed run; default: all.
    travel : Travel
        Whether rows travel to experts, or experts to rows.
    machine : Machine
        Workers, their threads and memory; by default this machine's cores, without a limit.
    rates : Rates, optional
        Speed of the machine; default: measured in a second, with `link` and `read` of `travel`.
    files : Sources, optional
        The files of the tokens (first), the routing and its weights, since decoding their stored
        chunks takes memory. `plan_job` passes them.

    Returns
    -------
    plan : Plan
        A `dask_ep.pricing.price_gpus.PlanOnGpus` on GPUs, a
        `dask_ep.pricing.price_passes.PlanInPasses` if experts do not fit into the memory limit and
        are processed in passes.

    Raises
    ------
    DoesNotFit
        If no run fits into the memory limit; the error names options that would fit, if there are
        any.
    ValueError
        If the arrays do not fit together, an expert index is out of range, or `travel` is not
        possible.
    NoDeviceError
        On GPUs, if `rates` are not given and there is no GPU to measure them.

    Notes
    -----
    Reads the routing once (or runs the router once), but no tokens and no experts. Operations and
    bytes of callables are unknown, and count as 0.

    How the job runs is decided as in `dask_ep.jobs.run.run_job` (`dask_ep.jobs.decide.decide`). If
    all experts fit, the plan is that of a graph of `expert_parallel`, which has no passes, and
    holds experts as stored only if they come from
    `dask_ep.experts.stored_experts.held_as_stored`.

    Examples
    --------
    >>> import numpy as np
    >>> from dask_ep import Rates, plan
    >>> tokens, experts = np.ones((6, 4), "f4"), np.ones((4, 4, 4), "f4")
    >>> routing = np.array([[0, 1], [0, 2], [0, 3], [0, 1], [0, 1], [2, 3]])
    >>> priced = plan(tokens, routing, experts, world_size=2, rates=Rates(flops=1e9, copy=1e9))
    >>> priced.expert_rows.tolist(), priced.rank_rows.tolist(), priced.traffic_rows.tolist()
    ([5, 3, 2, 2], [8, 4], [[5, 3], [0, 0]])
    >>> priced.tasks, round(priced.imbalance, 2)
    (4, 1.33)
    """
    pricing = Pricing(
        tokens, routing, experts, topk_weights, token_ids=token_ids, gpu=machine.gpu, rates=rates,
        **_stored(files),
    )  # fmt: skip
    layout = machine.lay_out(world_size, placement)
    decision = decide(pricing.work, layout, chunk_rows=chunk_rows, travel=travel)
    return pricing.price(decision, only=only, own_chunks=True)


def what_if(
    tokens: Any,
    routing: Any,
    experts: Any,
    *,
    topk_weights: Any = None,
    token_ids: Any = None,
    world_size: Sequence[int] = (1,),
    placement: Sequence[Asked] = ("contiguous",),
    chunk_rows: Sequence[int | None] = (None,),
    travel: Sequence[Travel] = (ALL_ROWS,),
    machine: Machine = ANY_MACHINE,
    rates: Rates | None = None,
    files: Sequence[Source | None] = (),
) -> WhatIf:
    """Plan a run for every combination of world sizes, placements, chunk sizes and travel.

    Parameters
    ----------
    world_size, placement, chunk_rows, travel : the values to combine
    others : as in `plan`

    Raises
    ------
    DoesNotFit
        If none of them fits into the memory limit.

    Notes
    -----
    Reads the routing once for all of them.
    """
    pricing = Pricing(
        tokens, routing, experts, topk_weights, token_ids=token_ids, gpu=machine.gpu, rates=rates,
        **_stored(files),
    )  # fmt: skip
    decided = []
    for ranks, asked, rows, moves in product(world_size, placement, chunk_rows, travel):
        layout = machine.lay_out(ranks, asked)
        decided.append(attempt(pricing.work, layout, chunk_rows=rows, travel=moves))
    return pricing.compare(decided, own_chunks=True)


def plan_job(
    job: Job | str | os.PathLike,
    where: Where = ALL_THREADS,
    *,
    chunk_rows: int | None = None,
    travel: Travel = ALL_ROWS,
    rates: Rates | None = None,
    on_note: Callable[[str], Any] | None = None,
) -> Plan:
    """Plan a run of a job: how `run_job` will carry it out, and what that costs.

    Parameters
    ----------
    job : a `Job`, or the path of a job file
    where : as in `run_job`; GPUs need not exist, and no cluster is contacted
    chunk_rows, travel, on_note : as in `run_job`
    rates : Rates, optional
        Speed of the machine; default: measured in a second.

    Returns
    -------
    Plan
        Rows, bytes and tasks are exact, memory is an upper bound, and time an estimate.

    Raises
    ------
    DoesNotFit, JobError, ValueError, OSError
        As in `run_job`, with the same messages.

    Notes
    -----
    Reads the routing once, and neither tokens nor experts; for a layer of a checkpoint it reads the
    tokens and runs the router.
    """
    inputs, (decided,) = _decide_job(
        job, where, on_note, world_size=[None], placement=[None], chunk_rows=[chunk_rows],
        travel=[travel],
    )  # fmt: skip
    if isinstance(decided, DoesNotFit):
        raise decided
    pricing = Pricing.of_job(inputs, decided, rates)
    planned = pricing.price(decided)
    if not isinstance(where, Processes):
        return planned
    return replace(planned, on_threads=_on_threads(pricing, inputs.job, where, chunk_rows))


def _on_threads(
    pricing: Pricing, job: Job, where: Processes, chunk_rows: int | None
) -> tuple[int, float] | None:
    """Return the time on threads with the memory of all processes; None if it does not fit."""
    limit = size_in_bytes(where.memory_limit, "memory_limit")
    count = min(where.count, CPU_COUNT)  # more threads than cores gain nothing
    threads = Threads(count, None if limit is None else limit * where.count)
    layout = lay_out(replace(job, placement=None), threads)  # threads need none
    decided = attempt(pricing.work, layout, chunk_rows=chunk_rows)
    return None if isinstance(decided, DoesNotFit) else (count, pricing.price(decided).seconds)


def what_if_job(
    job: Job | str | os.PathLike,
    where: Where = ALL_THREADS,
    *,
    world_size: Sequence[int | None] = (None,),
    placement: Sequence[str | None] = (None,),
    chunk_rows: Sequence[int | None] = (None,),
    travel: Sequence[Travel] = (ALL_ROWS,),
    rates: Rates | None = None,
    on_note: Callable[[str], Any] | None = None,
) -> WhatIf:
    """Plan a run of a job for every combination of world sizes, placements, chunk sizes and travel.

    Parameters
    ----------
    world_size, placement, chunk_rows, travel : the values to combine; None keeps the job's own
    others : as in `plan_job`

    Raises
    ------
    DoesNotFit
        If none of them fits into the memory limit.

    Notes
    -----
    Reads the routing once for all of them.
    """
    inputs, decided = _decide_job(
        job, where, on_note, world_size=world_size, placement=placement, chunk_rows=chunk_rows,
        travel=travel,
    )  # fmt: skip
    first = decided[0].decision if isinstance(decided[0], DoesNotFit) else decided[0]
    return Pricing.of_job(inputs, first, rates).compare(decided)


def _decide_job(
    job: Job | str | os.PathLike,
    where: Where,
    on_note: Callable[[str], Any] | None,
    **ways: Sequence[Any],
) -> tuple[Inputs, list[Decision | DoesNotFit]]:
    """Decide how a job will run, in every combination of `ways`."""
    job = as_job(job)
    inputs = open_inputs(job)
    tell_notes(inputs, on_note)
    devices: list[Device] = []
    if isinstance(where, Gpus):
        with suppress(NoDeviceError):  # a plan needs no GPU
            devices = device.find_devices()
    decided = []
    for combination in product(*ways.values()):
        asked = dict(zip(ways, combination, strict=True))
        given = {key: asked.pop(key) for key in ("world_size", "placement")}
        one = replace(job, **{key: value for key, value in given.items() if value is not None})
        layout = lay_out(one, where, devices=devices)
        free = partial(free_for_rows, inputs)
        decided.append(attempt(inputs.work(layout.on_devices), layout, **asked, free=free))
    return inputs, decided


def _stored(files: Sequence[Source | None]) -> dict[str, Any]:
    """Return how arrays are stored: rows of a stored token chunk, and bytes that decoding takes."""
    given = [source for source in files if source is not None]
    if not given:
        return {}
    read_bytes = max(source.read_bytes for source in given)
    return {"stored_rows": given[0].chunk_rows, "read_bytes": read_bytes}
