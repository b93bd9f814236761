"""What does a job cost, for any number of ways to run it?

`Pricing` goes through the routing of the job once, and prices each way from its counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from operator import itemgetter
from typing import Any

import dask.array as da
import numpy as np
from dask.array.core import normalize_chunks
from dask.system import CPU_COUNT

from dask_ep.arrays.checks import check_routing, check_tokens, computing_dtype
from dask_ep.errors import DoesNotFit
from dask_ep.experts.experts import CallableExperts, Experts, as_experts
from dask_ep.experts.weights import Weight
from dask_ep.graph.rows import rows_of
from dask_ep.jobs.build import Inputs
from dask_ep.kernel.bfloat16 import BFLOAT16
from dask_ep.kernel.expert import Expert
from dask_ep.laws.costs import Rates
from dask_ep.laws.decision import Decision
from dask_ep.laws.memory_law import Layout
from dask_ep.laws.work import Work
from dask_ep.layers.layer import MoELayer
from dask_ep.placement.placement import Placement
from dask_ep.placement.policies import contiguous
from dask_ep.placement.routing_stats import Survey, survey
from dask_ep.pricing.device_probe import probe_device
from dask_ep.pricing.price import Plan, WhatIf
from dask_ep.pricing.price_gpus import PlanOnGpus
from dask_ep.pricing.price_passes import PlanInPasses
from dask_ep.pricing.probe import probe
from dask_ep.storage.storage import open_tokens

SAMPLE_BYTES = 48 << 20
"""Maximum bytes of the experts in memory that are used to measure their speed."""


class Pricing:
    """One job, surveyed once, priced in any number of ways.

    Parameters
    ----------
    tokens, routing, experts, topk_weights, token_ids, gpu, rates : as in `plan`
    read_bytes, stored_rows : of the files, as `Inputs.read_bytes` and `Source.chunk_rows`
    """

    def __init__(
        self,
        tokens: Any,
        routing: Any,
        experts: Any,
        topk_weights: Any = None,
        *,
        token_ids: Any = None,
        gpu: bool = False,
        read_bytes: int = 0,
        stored_rows: int | None = None,
        rates: Rates | None = None,
    ):
        layer, routes, router_tasks = None, False, 0
        if isinstance(experts, MoELayer):
            layer, experts, tokens = experts, experts.experts, rows_of(tokens)
            if routes := routing is None:
                ids = None if token_ids is None else rows_of(token_ids[..., None])[:, 0]
                routing, topk_weights = layer.route(tokens, token_ids=ids)
                made = layer.sent(routing), topk_weights
                all_tasks = set().union(*(a.__dask_graph__().keys() for a in made))
                router_tasks = len(all_tasks - set(tokens.__dask_graph__()))
            routing, topk_weights = (
                None if a is None else rows_of(a) for a in (routing, topk_weights)
            )
            routing = layer.sent(routing)
        self._experts, self._rates = as_experts(experts), rates
        self._probed: Rates | None = None
        check_tokens(tokens)
        check_routing(routing, topk_weights, n=tokens.shape[0])
        d = self._experts.d if layer is None else layer.d
        if d not in (None, tokens.shape[1]):
            raise ValueError(
                f"tokens must be (N, d={d}) for these experts; tokens.shape={tokens.shape}"
            )
        known_rows = tokens.shape[0] == tokens.shape[0]
        self.survey = survey(routing, self._experts.num_experts, known_rows=known_rows)
        self.chunks = _chunks(tokens, self.survey)
        work = Work.of(
            tokens,
            self._experts,
            layer,
            rows=self.survey.rows,
            slots=self.survey.slots_per_row,
            topk_dtype=getattr(topk_weights, "dtype", None),
            routes=routes,
            read_bytes=read_bytes,
            stored_rows=stored_rows,
            on_devices=gpu,
        )
        self.work = work if layer is None else _with_tasks(work, layer, tokens, router_tasks)

    @classmethod
    def of_job(cls, inputs: Inputs, decision: Decision, rates: Rates | None = None) -> Pricing:
        """Count the routing of a job in the chunks of a run; for a layer, run its router."""
        tokens = open_tokens(inputs.tokens, chunks=decision.chunk_rows, name="tokens")
        experts = inputs.layer or inputs.experts
        routing, topk, ids = (
            None if given is None else open_tokens(given, like=tokens, name="routing")
            for given in (inputs.routing, inputs.topk_weights, inputs.token_ids)
        )
        return cls(
            tokens,
            routing,
            experts,
            topk,
            token_ids=ids,
            gpu=decision.layout.on_devices,
            read_bytes=inputs.read_bytes,
            stored_rows=inputs.tokens.chunk_rows,
            rates=rates,
        )

    def price(
        self,
        decision: Decision,
        *,
        placement: Placement | None = None,
        only: Sequence[int] | None = None,
        own_chunks: bool = False,
        made: Callable[..., Plan] | None = None,
    ) -> Plan:
        """Price one way to run the job.

        Parameters
        ----------
        decision : how it will run
        placement : of its experts, if it has been made
        only : indices of the chunks to compute; default: all
        own_chunks : whether to use the chunks of the tokens if they fit and no others were given
        made : function that makes the plan, with the arguments of `Plan`; default: the class for
            the decision
        """
        own = max([*self.chunks, 1])
        own_chunks = own_chunks and not decision.chunks_asked
        if own_chunks and decision.passes is None:
            with_own = replace(decision, chunk_rows=own)
            decision = with_own if with_own.fits or not decision.fits else decision
        kept = own_chunks and decision.chunk_rows == own
        rows, most = self.survey.rows, decision.chunk_rows
        chunks = self.chunks if kept else normalize_chunks(most, (rows,))[0]
        if placement is None:
            placement = decision.place(lambda: self.survey, chunks) or contiguous(
                self.work.experts, decision.layout.world_size
            )
        visits = self.survey.visits(placement, chunks, only, decision.layout.serving)
        of_these = list(range(len(chunks)) if only is None else only)
        if made is None:
            made = PlanOnGpus if decision.layout.on_devices else Plan
        if decision.passes is not None:
            made = PlanInPasses
        return made(
            work=self.work,
            decision=decision,
            placement=placement,
            chunks=tuple(chunks[chunk] for chunk in of_these),
            expert_rows=visits.expert_rows(placement),
            rank_rows=visits.physical_rows.sum(axis=1),
            packet_rows=visits.packet_rows[of_these],
            worker_rows=visits.worker_rows[of_these],
            rates=self._rates or decision.travel.rates(self._measured(decision.layout)),
            numbers=only,
            own_chunk_rows=own if own_chunks else None,
        )

    def compare(
        self, decided: Sequence[Decision | DoesNotFit], *, own_chunks: bool = False
    ) -> WhatIf:
        """Price many ways to run the job, some of which may have been refused.

        Raises
        ------
        DoesNotFit
            If all were refused.
        """
        plans = tuple(
            self.price(one.decision if isinstance(one, DoesNotFit) else one, own_chunks=own_chunks)
            for one in decided
        )
        fitting = [p for p in plans if p.fits]
        refused = [
            (p.memory_bytes, one)
            for p, one in zip(plans, decided, strict=True)
            if isinstance(one, DoesNotFit)
        ]
        if refused and not fitting:
            raise min(refused, key=itemgetter(0))[1]
        best = min(fitting or plans, key=lambda p: (p.seconds, p.exchanged_bytes, p.tasks))
        return WhatIf(plans, best, _why(best, plans))

    def _measured(self, layout: Layout) -> Rates:
        """Measure this machine once, with as many rows and experts as a task of this job has."""
        if self._probed is not None:
            return self._probed
        work = self.work
        sizes = {
            "rows": max(self.chunks, default=1),
            "slots": work.slots,
            "experts": work.experts,
        }
        if layout.on_devices:
            assert work.on_device is not None
            exact = self._experts.precision == "float32"
            self._probed = probe_device(
                work.d, work.d_out, dtype=work.on_device.factor, exact=exact, **sizes
            )
        else:
            dtype = computing_dtype(work.dtype)
            self._probed = probe(
                work.d,
                work.d_out,
                dtype=dtype,
                threads=min(layout.workers * layout.threads, CPU_COUNT),
                sample=_sample(self._experts, dtype),
                flops=work.expert_flops,
                **sizes,
            )
        return self._probed


def _with_tasks(work: Work, layer: MoELayer, tokens: da.Array, router_tasks: int) -> Work:
    """Count the tasks of a layer's router, shared experts and residual."""
    steps, chunks = layer.rest.finishes + bool(layer.around.before), tokens.numblocks[0]
    per_chunk = max(router_tasks - 1, 0) // max(chunks, 1)  # one task reads the router's arrays
    tasks = {
        "chunk_tasks": per_chunk + steps,
        "tasks": router_tasks - per_chunk * chunks + steps,
    }
    return replace(work, layer=replace(work.layer, **tasks))


def _sample(experts: Experts | CallableExperts, dtype: np.dtype) -> Sequence[Expert]:
    """Make some experts of the same kind and sizes in memory, or none if they are too large."""
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


def _chunks(tokens: Any, found: Survey) -> tuple[int, ...]:
    """Return the rows of the chunks that the graph will have: those of the tokens."""
    if tokens.shape[0] == tokens.shape[0] and tokens.shape[0] != found.rows:  # nan is unknown
        raise ValueError(
            f"tokens and routing must have the same rows; tokens.shape={tokens.shape}, "
            f"routing has {found.rows}"
        )
    if not isinstance(tokens, da.Array) or np.isnan(tokens.chunks[0]).any():
        return found.chunks
    return tokens.chunks[0]


def _why(best: Plan, plans: Sequence[Plan]) -> str:
    """Say why one plan is better than the others."""
    others = [p for p in plans if p is not best]
    reasons = [f"least time of {len(plans)}: {best.seconds:.3g} s"]
    if others:
        last = max(others, key=lambda p: p.seconds)
        reasons.append(f"the slowest takes {last.seconds / best.seconds:.2f} times as long")
        if last.imbalance > 1.05 * best.imbalance:
            reasons.append(f"imbalance {best.imbalance:.2f} against {last.imbalance:.2f}")
        unfit = sum(not p.fits for p in plans)
        if unfit:
            reasons.append(f"{unfit} do not fit into the memory limit")
    return "; ".join(reasons)
