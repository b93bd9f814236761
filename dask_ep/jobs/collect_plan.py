"""What will collecting statistics of a job cost?

    Wanted, Inputs ── decide_course ──> Course ── begin_all ──> collections, one for each pass
                                          └────── price_course ──> PlanOfStatistics

A pass over the rows is priced like a run; further passes and `gram` are added.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from dask_ep.cluster.gpus import Gpus
from dask_ep.errors import JobError
from dask_ep.graph.keys import read_key
from dask_ep.jobs.backends import ALL_THREADS, Where, lay_out
from dask_ep.jobs.build import Inputs, open_inputs, open_rows
from dask_ep.jobs.collect_decide import decide_course
from dask_ep.jobs.job import Job, as_job
from dask_ep.jobs.notes import tell_notes
from dask_ep.jobs.price_job import Pricing
from dask_ep.laws.costs import Rates
from dask_ep.laws.decision import Course
from dask_ep.layers.collect import Collection, Wanted, begin_collection, choose_statistics
from dask_ep.placement.placement import Placement
from dask_ep.placement.routing_stats import survey
from dask_ep.pricing.price_statistics import PlanOfStatistics


def plan_collection(
    job: Job | str | os.PathLike,
    wanted: Wanted,
    where: Where = ALL_THREADS,
    *,
    chunk_rows: int | None = None,
    rates: Rates | None = None,
    on_note: Callable[[str], Any] | None = None,
) -> PlanOfStatistics:
    """Plan a collection: how `collect_job` will carry it out, and what that costs.

    Parameters
    ----------
    wanted : what to collect
    job, where, chunk_rows, rates, on_note : as in `dask_ep.jobs.plan.plan_job`

    Raises
    ------
    DoesNotFit, JobError, ValueError, OSError
        As `collect_job` does, in the same words.
    """
    job = as_job(job)
    if isinstance(where, Gpus):
        raise JobError("statistics are collected on the host: plan without --gpu")
    inputs = open_inputs(job)
    tell_notes(inputs, on_note)
    course = decide_course(inputs, lay_out(job, where), wanted, chunk_rows)
    pricing = Pricing.of_job(inputs, course.decision, rates)
    placement = course.decision.place(lambda: pricing.survey)
    collections = begin_all(inputs, course, wanted, placement)
    return price_course(pricing, course, collections, placement)


def course_inputs(inputs: Inputs, course: Course) -> Inputs:
    """Return the inputs, with experts as the decision holds them."""
    return inputs.held_as_stored() if course.decision.as_stored else inputs


def place_experts(inputs: Inputs, course: Course) -> Placement | None:
    """Place the experts, as for a run; a placement by load reads the routing."""
    decision = course.decision
    _, routing, _ = open_rows(inputs, decision.chunk_rows)
    return decision.place(partial(survey, routing, inputs.experts.num_experts))


def begin_all(
    inputs: Inputs, course: Course, wanted: Wanted, placement: Placement | None
) -> list[Collection]:
    """Begin the collection of each pass over the rows; nothing is read."""
    inputs, decision = course_inputs(inputs, course), course.decision
    tokens, routing, topk = open_rows(inputs, decision.chunk_rows)
    layer = inputs.experts if inputs.layer is None else inputs.layer
    of_tiles = choose_statistics(wanted.what, inputs.experts).of_tiles
    seen = tuple(name for name in wanted.what if any(t.startswith(name) for t in of_tiles))
    return [
        begin_collection(  # statistics that are not of tiles are collected with the first block
            tokens, layer, wanted if block.start == 0 else replace(wanted, what=seen),
            routing=(routing, topk), world_size=decision.layout.world_size,
            placement=placement, block=block, picked_together=course.picked_together,
        )
        for block in course.blocks
    ]  # fmt: skip


def price_course(
    pricing: Pricing,
    course: Course,
    collections: Sequence[Collection],
    placement: Placement | None,
    *,
    left: Sequence[Sequence[int]] | None = None,
    grams_left: int | None = None,
) -> PlanOfStatistics:
    """Price a collection, or what is left of one.

    Parameters
    ----------
    pricing : of the job
    course, collections, placement : as decided and begun
    left : number of token chunks that each pass over the rows has left; default: all
    grams_left : number of experts whose second moments are left; default: all
    """
    arrays = [array for one in collections for array in one.parts()]
    keys = {key: read_key(key) for array in arrays for key in array.__dask_graph__()}
    ours = [key for key, parts in keys.items() if parts is not None and parts.step != "read"]
    experts = sum(map(len, course.gram_blocks))
    made = partial(
        PlanOfStatistics,
        course=course,
        left=tuple(map(len, left)) if left else (collections[0].chunks,) * len(course.blocks),
        grams_left=experts if grams_left is None else grams_left,
        graph_tasks=len(ours),
        statistics_bytes=sum(one.nbytes for one in collections),
    )
    only = None if left is None else sorted(set().union(*left))
    planned = pricing.price(course.decision, placement=placement, only=only, made=made)
    assert isinstance(planned, PlanOfStatistics)
    return planned
