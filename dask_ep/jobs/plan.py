"""What will a run cost?

The routing is known before any expert runs, and is cheap to know. One pass over it says how many
rows every expert, rank and packet will have; the rest is arithmetic (`costs`). How a job runs is
decided as for a run (`decide`); `plan` prices that, and `what_if` prices many ways side by side.

    tokens, routing, experts ──survey──> rows per chunk, expert, rank ──> Plan
                                                            Decision ──────^

Axis letters: `N` rows, `k` slots per row, `E` experts, `R` ranks, `S` slots per rank, `C` chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

from dask.system import CPU_COUNT
from dask.utils import parse_bytes

from dask_ep.graph import pipeline
from dask_ep.jobs.decide import attempt, decide
from dask_ep.jobs.price_job import Pricing
from dask_ep.laws.costs import Rates
from dask_ep.laws.device_memory import THREADS_PER_GPU
from dask_ep.laws.memory_law import Layout
from dask_ep.laws.travel import ALL_ROWS, Travel
from dask_ep.placement.placement_files import Asked, resolve
from dask_ep.placement.policies import Placement
from dask_ep.pricing.price import Plan, WhatIf


def plan(
    tokens: Any,
    routing: Any,
    experts: Any,
    *,
    topk_weights: Any = None,
    world_size: int | None = None,
    placement: Asked = None,
    chunk_rows: int | None = None,
    only: Sequence[int] | None = None,
    memory_limit: int | str | None = None,
    workers: int | None = None,
    threads: int | None = None,
    cores: int | None = None,
    rates: Rates | None = None,
    travel: Travel = ALL_ROWS,
    read_bytes: int = 0,
    stored_rows: int | None = None,
    gpu: bool = False,
    device_memory_limit: int | str | None = None,
) -> Plan:
    """Plan a run of these inputs: how it will go, and what it will cost.

    Parameters
    ----------
    tokens, routing, experts, topk_weights : as for `expert_parallel`
        Only shape, dtype and chunks of the tokens are used. `experts` may be a `MoELayer`, whose
        router and shared experts are priced too; without a `routing` its router computes it, which
        reads the tokens.
    world_size : int, R, optional
        Default: the placement's, else the workers of the Dask client in use, else 1.
    placement : Placement, name of a policy, path of a placement file, or None for contiguous
    chunk_rows : int, optional
        Rows of a token chunk. Default: the chunks of `tokens`; where these do not fit into the
        memory limit, or experts are processed in passes, those that a run takes (`Plan.chunks`).
    only : numbers of token chunks, optional
        Those that are to be computed, as in a resumed run.
    memory_limit : bytes that one worker may use, as int or text ("4 GiB"), optional
    workers : int, optional
        Processes that share the ranks; default one per rank. 1 means threads of this process.
    threads : int, optional
        Tasks at a time in each worker; default: the cores of this machine shared by the workers.
    cores : int, optional
        Cores that the workers share, if they are processes of one machine; by default each thread
        has a core of its own.
    rates : Rates, optional
        How fast the machine is; default: measured in a second, with `link` and `read` of `travel`.
    travel : Travel
        Whether rows travel to experts, or experts to rows.
    read_bytes : int
        Bytes that a thread needs to read a chunk, besides its rows; see `Source.read_bytes`.
    stored_rows : int, optional
        Rows of the tokens that are stored together; see `Source.chunk_rows`.
    gpu : bool
        Whether each worker computes on a GPU, as in ``run_job(job, Gpus())``; `memory_limit` is
        then that of its host.
    device_memory_limit : bytes that a run may use of each GPU, as int or text, optional

    Returns
    -------
    plan : Plan
        A `dask_ep.pricing.price_gpus.PlanOnGpus` with `gpu`, a
        `dask_ep.pricing.price_passes.PlanInPasses` where experts do not fit into the memory limit
        and are processed in passes.

    Raises
    ------
    DoesNotFit
        If no run fits into the memory limit; the error names options that would fit, if there are
        any.
    ValueError
        If the arrays do not fit together, or an expert index is out of range; if nothing can travel
        as it is asked to.
    NoDeviceError
        With `gpu`, if `rates` are not given and there is no GPU to measure them.

    Notes
    -----
    Reads the routing once (or runs the router once), but no tokens and no experts. Operations and
    bytes of callables are not known, and count as none.

    How the run goes is decided as for `dask_ep.jobs.run.run_job` (`dask_ep.jobs.decide.decide`). A
    graph of `expert_parallel` is what is planned where all experts fit: it has no passes, and holds
    experts as they are stored only if they come from
    `dask_ep.experts.stored_experts.held_as_stored`.

    Examples
    --------
    >>> import numpy as np
    >>> from dask_ep.jobs.plan import Rates, plan
    >>> tokens, experts = np.ones((6, 4), "f4"), np.ones((4, 4, 4), "f4")
    >>> routing = np.array([[0, 1], [0, 2], [0, 3], [0, 1], [0, 1], [2, 3]])
    >>> priced = plan(tokens, routing, experts, world_size=2, rates=Rates(flops=1e9, copy=1e9))
    >>> priced.expert_rows.tolist(), priced.rank_rows.tolist(), priced.traffic_rows.tolist()
    ([5, 3, 2, 2], [8, 4], [[5, 3], [0, 0]])
    >>> priced.tasks, round(priced.imbalance, 2)
    (4, 1.33)
    """
    pricing = Pricing(
        tokens,
        routing,
        experts,
        topk_weights,
        gpu=gpu,
        read_bytes=read_bytes,
        stored_rows=stored_rows,
        rates=rates,
    )
    layout = _lay_out(
        world_size, placement, memory_limit, workers, threads, cores, gpu, device_memory_limit
    )
    decision = decide(pricing.work, layout, chunk_rows=chunk_rows, travel=travel)
    return pricing.price(decision, only=only, own_chunks=True)


def what_if(
    tokens: Any,
    routing: Any,
    experts: Any,
    *,
    topk_weights: Any = None,
    world_size: Sequence[int] = (1,),
    placement: Sequence[Asked] = ("contiguous",),
    chunk_rows: Sequence[int | None] = (None,),
    memory_limit: int | str | None = None,
    workers: int | None = None,
    threads: int | None = None,
    cores: int | None = None,
    rates: Rates | None = None,
    travel: Sequence[Travel] = (ALL_ROWS,),
    read_bytes: int = 0,
    stored_rows: int | None = None,
    gpu: bool = False,
    device_memory_limit: int | str | None = None,
) -> WhatIf:
    """Say what every combination of world sizes, placements and chunk sizes will cost.

    Parameters
    ----------
    world_size, placement, chunk_rows, travel : the values to combine
    others : as for `plan`

    Raises
    ------
    DoesNotFit
        If none of them fits into the memory limit.

    Notes
    -----
    Reads the routing once for all of them.
    """
    pricing = Pricing(
        tokens,
        routing,
        experts,
        topk_weights,
        gpu=gpu,
        read_bytes=read_bytes,
        stored_rows=stored_rows,
        rates=rates,
    )
    decided = []
    for ranks, asked, rows, moves in product(world_size, placement, chunk_rows, travel):
        layout = _lay_out(
            ranks, asked, memory_limit, workers, threads, cores, gpu, device_memory_limit
        )
        decided.append(attempt(pricing.work, layout, chunk_rows=rows, travel=moves))
    return pricing.compare(decided, own_chunks=True)


def _lay_out(
    world_size: int | None,
    placement: Asked,
    memory_limit: int | str | None,
    workers: int | None,
    threads: int | None,
    cores: int | None,
    gpu: bool,
    device_memory_limit: int | str | None,
) -> Layout:
    """Put what a plan is asked to run on into numbers."""
    if device_memory_limit is not None and not gpu:
        raise ValueError("device_memory_limit needs gpu=True")
    host, of_device = (
        None if limit is None else parse_bytes(limit)
        for limit in (memory_limit, device_memory_limit)
    )
    fixed = world_size is not None and workers is not None
    if world_size is None:
        of_placement = placement.world_size if isinstance(placement, Placement) else None
        world_size = of_placement or pipeline.workers_in_use()
    workers = workers or world_size
    of_cores = max(CPU_COUNT // min(workers, world_size), 1)
    return Layout(
        world_size,
        workers,
        threads or (THREADS_PER_GPU if gpu else of_cores),
        of_device if gpu else host,
        resolve(placement, world_size),
        gpu,
        host if gpu else None,
        in_process=workers == 1 and not gpu,
        ranks_given=fixed,
        cores=cores,
    )
