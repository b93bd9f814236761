"""What will a run cost?

The routing is known before any expert runs, and is cheap to know. One pass over it says how many
rows every expert, rank and packet will have; the rest is arithmetic (`costs`). `plan` prices one
way to run a job and refuses what cannot fit; `what_if` prices many side by side.

    tokens, routing, experts ──survey──> rows per chunk, expert, rank ──> Plan
                                    world_size, placement, chunk_rows ─────^

Axis letters: `N` rows, `k` slots per row, `E` experts, `R` ranks, `S` slots per rank, `C` chunks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import dask.array as da
import numpy as np
from dask.system import CPU_COUNT
from dask.utils import format_bytes, parse_bytes

from dask_ep import pipeline
from dask_ep.bfloat16 import BFLOAT16, multiplied_by
from dask_ep.checks import check_routing, check_tokens, computing_dtype
from dask_ep.costs import FEWEST_ROWS, Rates
from dask_ep.device_memory import THREADS_PER_GPU, OnDevice
from dask_ep.device_probe import probe_device
from dask_ep.expert import Expert
from dask_ep.experts import CallableExperts, Experts, as_experts
from dask_ep.held import StoredExperts
from dask_ep.layer import MoELayer
from dask_ep.placement import POLICIES, Placement, contiguous
from dask_ep.placement_files import find_placement
from dask_ep.price import Beside, Plan, Work
from dask_ep.price_gpus import PlanOnGpus
from dask_ep.probe import probe
from dask_ep.rows import rows_of
from dask_ep.survey import Survey, survey
from dask_ep.travel import ALL_ROWS, Travel, choose_travel
from dask_ep.weights import Weight

Asked = Placement | str | os.PathLike | Callable[[int], Placement] | None
"""How a placement is asked for."""

SAMPLE_BYTES = 48 << 20
"""Of experts in memory, with which their speed is measured."""


class PlanError(MemoryError):
    """A job cannot run within its memory limit.

    Attributes
    ----------
    plan : Plan
        Of the job as it was asked for.
    proposal : Plan or None
        A way to run it that fits, if one was found.
    """

    def __init__(self, message: str, plan: Plan, proposal: Plan | None):
        super().__init__(message)
        self.plan, self.proposal = plan, proposal


@dataclass(frozen=True)
class WhatIf:
    """Several plans of one job side by side."""

    plans: tuple[Plan, ...]
    best: Plan
    #: the fastest that fits; of equals the one that moves fewer bytes, then with fewer tasks
    why: str


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
    gpu: bool = False,
    device_memory_limit: int | str | None = None,
) -> Plan:
    """Say what `expert_parallel` with these arguments will cost.

    Parameters
    ----------
    tokens, routing, experts, topk_weights : as for `expert_parallel`
        Of the tokens only shape, dtype and chunks are looked at. Or `experts` is a `MoELayer`,
        whose router and shared experts are priced as well; without a `routing`, its router says it,
        and reads the tokens for that.
    world_size : int, R, optional
        Default: the placement's, else the workers of the Dask client in use, else 1.
    placement : Placement, name of a policy, path of a placement file, or None for contiguous
        Or a function that makes a `Placement` for a number of ranks.
    chunk_rows : int, optional
        Rows of a token chunk; default: the chunks of `tokens`.
    only : numbers of token chunks, optional
        Those that are to be computed, as in a run that goes on with what another has left.
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
        Bytes that a thread needs to read a chunk, beside its rows; see `Source.read_bytes`.
    gpu : bool
        Whether each worker computes on a GPU, as in ``run_job(job, Gpus())``; `memory_limit` is
        then of the host beside it.
    device_memory_limit : bytes that a run may use of each GPU, as int or text, optional

    Returns
    -------
    plan : Plan
        A `dask_ep.price_gpus.PlanOnGpus` with `gpu`.

    Raises
    ------
    PlanError
        If the job does not fit into the memory limit; with a proposal that does, if there is one.
    ValueError
        If the arrays do not fit together, or an expert index is out of range.
    NoDeviceError
        With `gpu`, if neither `rates` are given nor a GPU is here to measure them.

    Notes
    -----
    Reads the routing once (or runs the router once), no token and no expert besides. Of callables
    neither operations nor bytes are known, and both count as none.

    Examples
    --------
    >>> import numpy as np
    >>> from dask_ep.planner import Rates, plan
    >>> tokens, experts = np.ones((6, 4), "f4"), np.ones((4, 4, 4), "f4")
    >>> routing = np.array([[0, 1], [0, 2], [0, 3], [0, 1], [0, 1], [2, 3]])
    >>> priced = plan(tokens, routing, experts, world_size=2, rates=Rates(flops=1e9, copy=1e9))
    >>> priced.expert_rows.tolist(), priced.rank_rows.tolist(), priced.traffic_rows.tolist()
    ([5, 3, 2, 2], [8, 4], [[5, 3], [0, 0]])
    >>> priced.tasks, round(priced.imbalance, 2)
    (7, 1.33)
    """
    limits = _Limits.of(memory_limit, device_memory_limit, gpu)
    pricing = _Pricing(
        tokens, routing, experts, topk_weights, limits, workers, threads, cores, rates, read_bytes
    )
    if world_size is None:
        given = isinstance(placement, Placement)
        world_size = placement.world_size if given else pipeline.workers_in_use()
    priced = pricing.plan(world_size, placement, chunk_rows, travel, only)
    if not priced.fits:
        proposal = pricing.fitting(priced)
        raise PlanError(_refusal(priced, proposal), priced, proposal)
    return priced


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
    PlanError
        If none of them fits into the memory limit.

    Notes
    -----
    Reads the routing once for all of them.
    """
    limits = _Limits.of(memory_limit, device_memory_limit, gpu)
    pricing = _Pricing(
        tokens, routing, experts, topk_weights, limits, workers, threads, cores, rates, read_bytes
    )
    choices = product(world_size, placement, chunk_rows, travel)
    plans = tuple(pricing.plan(*choice) for choice in choices)
    fitting = [p for p in plans if p.fits]
    if not fitting:
        smallest = min(plans, key=lambda p: p.memory_bytes)
        proposal = pricing.fitting(smallest)
        raise PlanError(_refusal(smallest, proposal), smallest, proposal)
    best = min(fitting, key=lambda p: (p.seconds, p.moved_bytes, p.tasks))
    return WhatIf(plans, best, _why(best, plans))


class _Limits(NamedTuple):
    """What a worker may use."""

    memory: int | None
    #: bytes of it, or of its GPU
    gpu: bool = False
    host: int | None = None
    #: bytes of the host, beside a GPU

    @classmethod
    def of(
        cls, memory_limit: int | str | None, device_memory_limit: int | str | None, gpu: bool
    ) -> _Limits:
        if device_memory_limit is not None and not gpu:
            raise ValueError("device_memory_limit is of GPUs, so gpu must be True with it")
        memory, device = (
            None if limit is None else parse_bytes(limit)
            for limit in (memory_limit, device_memory_limit)
        )
        return cls(device, gpu, memory) if gpu else cls(memory)


class _Pricing:
    """One job, surveyed once, priced in any number of ways."""

    def __init__(
        self,
        tokens: Any,
        routing: Any,
        experts: Any,
        topk_weights: Any,
        limits: _Limits,
        workers: int | None,
        threads: int | None,
        cores: int | None,
        rates: Rates | None,
        read_bytes: int,
    ):
        beside, shared = Beside(), None
        if isinstance(experts, MoELayer):
            layer, experts, tokens = experts, experts.experts, rows_of(tokens)
            router_tasks = 0
            if routing is None:
                routing, topk_weights = layer.route(tokens)
                router_tasks = _count_new_tasks([routing, topk_weights], tokens)
            routing, topk_weights = (
                None if a is None else rows_of(a) for a in (routing, topk_weights)
            )
            beside, shared = _beside(layer, tokens, router_tasks, limits.gpu), layer.shared
        experts = as_experts(experts)
        check_tokens(tokens)
        check_routing(routing, topk_weights, n=tokens.shape[0])
        self.work = _work(tokens, experts, topk_weights, beside, limits.gpu, read_bytes)
        known_rows = tokens.shape[0] == tokens.shape[0]
        self.survey: Survey = survey(routing, experts.num_experts, known_rows=known_rows)
        self.chunks = _chunks(tokens, self.survey)
        self.limits, self.on_device = limits, None
        if limits.gpu:
            threads = threads or THREADS_PER_GPU
            k = self.survey.slots_per_row
            self.on_device = OnDevice.of(experts, shared, k, self.work.dtype)
        self.workers, self.threads, self.cores = workers, threads, cores
        self.rates, self.are_given = rates or self._probe(experts), rates is not None

    def _probe(self, experts: Experts | CallableExperts) -> Rates:
        """Measure this machine with rows and experts as many as a task of this job has."""
        if self.limits.gpu:
            return probe_device(
                self.work.d,
                self.work.d_out,
                rows=max(self.chunks, default=1),
                slots=self.survey.slots_per_row,
                experts=self.survey.num_experts,
                dtype=self.work.dtype,
            )
        return probe(
            self.work.d,
            self.work.d_out,
            rows=max(self.chunks, default=1),
            slots=self.survey.slots_per_row,
            experts=self.survey.num_experts,
            dtype=computing_dtype(self.work.dtype),
            threads=min((self.workers or 1) * (self.threads or CPU_COUNT), CPU_COUNT),
            sample=_sample(experts, computing_dtype(self.work.dtype)),
            flops=self.work.expert_flops,
        )

    def plan(
        self,
        world_size: int,
        placement: Asked,
        chunk_rows: int | None,
        travel: Travel = ALL_ROWS,
        only: Sequence[int] | None = None,
    ) -> Plan:
        policy, placement = self._placement(placement, world_size)
        chunks = self.chunks if chunk_rows is None else _equal_chunks(self.survey.rows, chunk_rows)
        priced = self._priced(policy, placement, chunks, travel, only)
        if not travel.moves_experts or priced.workers == 1:
            return priced
        moved = choose_travel(
            travel,
            self.survey,
            placement,
            expert_bytes=self.work.expert_stored,
            row_bytes=priced.packet_row_bytes + priced.reply_row_bytes,
            chunks=chunks,
            workers=priced.workers,
            max_slots=priced.slots_within_limit,
        )
        return self._priced(f"{policy}, travel {travel.how}", moved, chunks, travel, only)

    def _priced(
        self,
        policy: str,
        placement: Placement,
        chunks: tuple[int, ...],
        travel: Travel,
        only: Sequence[int] | None,
    ) -> Plan:
        world_size = placement.world_size
        workers = min(self.workers or world_size, world_size)
        visits = self.survey.visits(placement, chunks, only)
        of_these = list(range(len(chunks)) if only is None else only)
        made = Plan
        if self.limits.gpu:
            made = partial(PlanOnGpus, on_device=self.on_device, host_limit=self.limits.host)
        return made(
            work=self.work,
            policy=policy,
            placement=placement,
            chunks=tuple(chunks[chunk] for chunk in of_these),
            workers=workers,
            threads=self.threads or max(CPU_COUNT // workers, 1),
            expert_rows=visits.expert_rows(placement),
            rank_rows=visits.slot_rows.sum(axis=1),
            packet_rows=visits.packet_rows[of_these],
            slots_per_row=self.survey.slots_per_row,
            rates=self.rates if self.are_given else travel.rates(self.rates),
            memory_limit=self.limits.memory,
            cores=self.cores,
            numbers=only,
        )

    def fitting(self, refused: Plan) -> Plan | None:
        """Find a way to run the refused plan's job within the limit, changing as little."""
        return next((p for p in self._alternatives(refused) if p.fits), None)

    def _alternatives(self, refused: Plan) -> Iterator[Plan]:
        """Smaller chunks, then no copies, then more workers, each with the ones before."""
        chunk_rows = None if refused.chunks == self.chunks else refused.chunk_rows
        asked = refused.policy if refused.policy in POLICIES else refused.placement
        ranks = refused.world_size
        while True:
            for placement in (asked, "packed"):
                if isinstance(placement, str) or ranks == refused.world_size:
                    same = self.plan(ranks, placement, chunk_rows)
                    yield same
                    if FEWEST_ROWS <= same.advised_chunk_rows < same.chunk_rows:
                        yield self.plan(ranks, placement, same.advised_chunk_rows)
            if self.workers is not None or ranks >= self.survey.num_experts:
                return
            ranks = min(2 * ranks, self.survey.num_experts)

    def _placement(self, placement: Asked, world_size: int) -> tuple[str, Placement]:
        named = placement is None or (isinstance(placement, str) and placement in POLICIES)
        policy = (placement or "contiguous") if named else "given"
        if callable(placement):
            placement = placement(world_size)
        experts, load = self.survey.num_experts, self.survey.by_ticket
        found = find_placement(placement, experts, world_size, lambda: load)
        return policy, found or contiguous(experts, world_size)


def _beside(layer: MoELayer, tokens: da.Array, router_tasks: int, on_device: bool) -> Beside:
    """Put a layer's router, unless that has no tasks, and its shared experts into numbers."""
    d, E, shared = tokens.shape[1], layer.experts.num_experts, layer.shared
    compute = computing_dtype(tokens.dtype, on_device)
    itemsize = compute.itemsize
    there_and_back = (d + (layer.experts.d_out or d)) * itemsize
    finishes = shared is not None or layer.residual
    k = getattr(layer.router, "k", E)
    chunks = tokens.numblocks[0]
    per_chunk = max(router_tasks - 1, 0) // max(chunks, 1)  # one reads the router's arrays
    row_bytes = (k + 5) * E * 4 if router_tasks else 0  # as `dask_ep.routing.route` says
    if shared is not None:
        row_bytes += shared.num_experts * there_and_back
    return Beside(
        router_flops=2 * d * E if router_tasks and "weight" in layer.arrays else 0,
        shared_flops=0 if shared is None else 2 * shared.num_experts * shared.parameters,
        row_bytes=row_bytes + finishes * 2 * there_and_back,
        stored=layer.bytes_beside,
        loaded=layer.loaded_beside(compute, on_device=on_device),
        widest=layer.widest,
        chunk_tasks=per_chunk + finishes,
        tasks=router_tasks - per_chunk * chunks + (shared is not None),
    )


def _sample(experts: Experts | CallableExperts, dtype: np.dtype) -> Sequence[Expert]:
    """Make some experts of the same kind and sizes as these, in memory; none of large ones."""
    if not isinstance(experts, Experts):
        return ()
    count = min(SAMPLE_BYTES // (experts.parameters * dtype.itemsize), experts.num_experts)
    if not count:
        return ()
    weights = {}
    for name, weight in experts.weights.items():
        stored = BFLOAT16 if weight.is_bfloat16 and dtype == np.float32 else dtype
        weights[name] = Weight.of(np.full((count, *weight.shape[1:]), 0.01, stored), name)
    return Experts(experts.kind, weights, experts.options).load(dtype=dtype)


def _count_new_tasks(made: Sequence[da.Array], of: da.Array) -> int:
    """How many tasks these arrays have that the array which they are made of has not."""
    return len(set().union(*(dict(a.__dask_graph__()) for a in made)) - set(of.__dask_graph__()))


def _work(
    tokens: Any,
    experts: Experts | CallableExperts,
    topk_weights: Any,
    beside: Beside,
    on_device: bool,
    read_bytes: int,
) -> Work:
    """Put the job into numbers."""
    if tokens.ndim != 2 or experts.d not in (None, tokens.shape[1]):
        raise ValueError(
            f"tokens must be (N, d={experts.d}) for these experts; tokens.shape={tokens.shape}"
        )
    dtype = np.dtype(tokens.dtype)
    d = int(tokens.shape[1])
    wide = experts.loaded_bytes(computing_dtype(dtype, on_device), on_device=on_device)
    as_stored = isinstance(experts, StoredExperts)
    return Work(
        d=d,
        d_out=experts.d_out or d,
        dtype=dtype,
        weight_bytes=0 if topk_weights is None else np.dtype(topk_weights.dtype).itemsize,
        inputs=0 if beside.router_flops else 1 + (topk_weights is not None),
        expert_flops=2 * experts.parameters,
        expert_stored=experts.nbytes // experts.num_experts,
        expert_loaded=experts.nbytes // experts.num_experts if as_stored else wide,
        expert_scratch=wide if as_stored else 0,
        widest=max(experts.widest, beside.widest),
        multiplied_by=None
        if on_device
        else multiplied_by(dtype, experts.is_bfloat16, experts.precision),
        read_bytes=read_bytes,
        beside=beside,
    )


def _chunks(tokens: Any, found: Survey) -> tuple[int, ...]:
    """Rows of the chunks that the graph will have: those of the tokens."""
    if tokens.shape[0] == tokens.shape[0] and tokens.shape[0] != found.rows:  # nan is unknown
        raise ValueError(
            f"tokens and routing must have the same rows; tokens.shape={tokens.shape}, "
            f"routing has {found.rows}"
        )
    if not isinstance(tokens, da.Array) or np.isnan(tokens.chunks[0]).any():
        return found.chunks
    return tokens.chunks[0]


def _equal_chunks(rows: int, chunk_rows: int) -> tuple[int, ...]:
    """`rows` in chunks of `chunk_rows`, the last one smaller."""
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1; got {chunk_rows}")
    whole, rest = divmod(rows, chunk_rows)
    return (chunk_rows,) * whole + (rest,) * (rest > 0)


def _refusal(refused: Plan, proposal: Plan | None) -> str:
    """Say why a job cannot run, with the numbers, and what to change."""
    need = refused.said_of_memory
    if proposal is None and isinstance(refused, PlanOnGpus):
        return (
            f"{need}. No chunk size fits beside the experts of one GPU, "
            f"up to {refused.experts_of_a_worker} of {format_bytes(refused.work.expert_loaded)}: "
            "use more GPUs, or none: on threads and processes experts that do not fit go by in "
            "passes"
        )
    if proposal is None:
        return (
            f"{need}. No chunk size fits beside the experts of one worker, "
            f"up to {refused.experts_of_a_worker} of {format_bytes(refused.work.expert_loaded)}: "
            "use more workers, or allow more memory"
        )
    changes = [
        f"{name}={new!r} (instead of {old!r})"
        for name, old, new in (
            ("world_size", refused.world_size, proposal.world_size),
            ("workers", refused.workers, proposal.workers),
            ("placement", refused.policy, proposal.policy),
            ("chunk_rows", refused.chunk_rows, proposal.chunk_rows),
        )
        if old != new
    ]
    return f"{need}. With {', '.join(changes)} it needs {format_bytes(proposal.memory_bytes)}"


def _why(best: Plan, plans: Sequence[Plan]) -> str:
    """Say what makes one plan better than the others."""
    others = [p for p in plans if p is not best]
    said = [f"least time of {len(plans)}: {best.seconds:.3g} s"]
    if others:
        last = max(others, key=lambda p: p.seconds)
        said.append(f"the slowest takes {last.seconds / best.seconds:.2f} times as long")
        if last.imbalance > 1.05 * best.imbalance:
            said.append(f"imbalance {best.imbalance:.2f} against {last.imbalance:.2f}")
        unfit = sum(not p.fits for p in plans)
        if unfit:
            said.append(f"{unfit} do not fit into the memory limit")
    return "; ".join(said)
