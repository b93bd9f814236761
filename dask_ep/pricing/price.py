"""What does one way to run a job cost?

`Plan` holds what a pass over the routing counted, for one placement and one chunking (`traffic`);
all figures (`needs`) and all advice follow from that. Rows, bytes and tasks are exact, memory is an
upper bound, time is an estimate.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from dask.utils import format_bytes

from dask_ep.arrays.html import html_table
from dask_ep.laws import costs
from dask_ep.placement.policies import place
from dask_ep.pricing.needs import Needs
from dask_ep.pricing.plan_text import figures_of

LARGEST_CHUNK = 128 << 20
"""Maximum useful bytes of a token chunk: larger ones only cost memory."""

USUAL_CHUNK = 16 << 20
"""Bytes of a token chunk that are worth a task, if experts get enough rows anyway."""

SMALLEST_CHUNK = 1 << 20
"""Bytes of a token chunk below which the overhead of a task exceeds its work."""

SECONDS_THAT_COUNT = 0.1
"""Time of the scheduler below which fewer tasks would gain nothing."""

ROWS_PER_PRODUCT = 256
"""Rows of a chunk that an expert should get for its matrix products to run at full speed."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Plan(Needs):
    """What one way to run a job costs; rows, bytes and tasks are exact."""

    own_chunk_rows: int | None = None
    #: rows of the tokens' own chunks, if these are used when they fit; None otherwise
    on_threads: tuple[int, float] | None = None
    #: number of threads of one process that could do the same, and the time they would take

    # --- advice ------------------------------------------------------------------------------

    @property
    def advised_chunk_rows(self) -> int:
        """Rows of a chunk that is large enough for fast products and small enough for memory."""
        row_bytes = self.work.row_bytes
        fast = max(
            ROWS_PER_PRODUCT * self.expert_rows.size // self.slots_per_row, USUAL_CHUNK // row_bytes
        )
        parallel = self.rows // (costs.CHUNKS_PER_THREAD * self.workers * self.threads)
        advised = min(fast, parallel, LARGEST_CHUNK // row_bytes)
        advised = max(advised, SMALLEST_CHUNK // row_bytes)
        if self.memory_limit is not None:
            law = self.decision.need  # the law by which a run refuses chunks
            advised = min(advised, law.rows_within(self.memory_limit))
        return max(advised, 1)

    @property
    def advice(self) -> list[str]:
        """What to change, and why; empty if nothing should be."""
        advice = []
        if self.decision.as_stored and not self.work.as_stored:
            advice.append("experts are held in memory as stored: otherwise they would not fit")
        if self.own_chunk_rows is not None and self.own_chunk_rows > self.decision.chunk_rows:
            advice.append(
                f"rechunk the tokens to {self.decision.chunk_rows} rows: their own chunks, of "
                f"{self.own_chunk_rows} rows, do not fit into the memory limit"
            )
        advised = self.advised_chunk_rows
        far = not advised / 2 <= self.chunk_rows <= advised * 2 and self.rows > advised
        if far and (self.decision.chunks_asked or self.own_chunk_rows is not None):
            advice.append(
                f"use chunks of about {advised} rows instead of {self.chunk_rows}: large enough "
                "for fast products and few tasks, small enough for memory and all threads"
            )
        could_grow = len(self.chunks) > 1 and self.chunk_rows < advised
        if could_grow and self.scheduler_seconds > max(self.busy_seconds, SECONDS_THAT_COUNT):
            advice.append(
                f"use larger chunks: the scheduler needs {self.scheduler_seconds:.1f} s for "
                f"{self.tasks} tasks, the workers {self.busy_seconds:.1f} s"
            )
        if self.imbalance > 1.1 and self.workers > 1:
            exact = place("exact", self.expert_rows, self.world_size).imbalance(self.expert_rows)
            if self.imbalance > 1.1 * exact:
                advice.append(
                    f'use placement="exact": the busiest rank serves {self.imbalance:.2f} times '
                    f"the mean rows, and would then serve {exact:.2f} times"
                )
        if self.on_threads is not None and self.on_threads[1] < self.seconds:
            threads, seconds = self.on_threads
            advice.append(
                f"use threads of one process (--threads {threads}): they take about "
                f"{seconds:.2g} s, exchange nothing, and need no workers to be started"
            )
        return advice

    # --- forms -------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Return all figures as plain numbers, lists and text."""
        figures = [
            *("rows", "slots_per_row", "world_size", "workers", "threads", "policy", "cores"),
            *("chunk_rows", "imbalance", "exchanged_bytes", "stored_bytes"),
            *("expert_bytes", "chunk_bytes", "chunks_held", "memory_bytes", "memory_limit", "fits"),
            "memory_parts",
            *("tasks", "other_tasks", "handled_tasks", "layer_flops", "replicas"),
            *("scheduler_seconds", "load_seconds", "busy_seconds", "seconds", "seconds_range"),
            *("advised_chunk_rows", "advice"),
        ]
        arrays = ["expert_rows", "rank_rows", "rank_experts", "flops", "traffic_rows"]
        return {
            **{name: getattr(self, name) for name in figures},
            **{name: getattr(self, name).tolist() for name in arrays},
            "experts": self.expert_rows.size,
            "chunks": len(self.chunks),
            "d": self.work.d,
            "d_out": self.work.d_out,
            "dtype": str(self.work.dtype),
            "rates": dataclasses.asdict(self.rates),
            "physical": self.placement.physical.tolist(),
        }

    def to_json(self) -> str:
        """Return `to_dict` as JSON text."""
        return json.dumps(self.to_dict())

    def _repr_html_(self) -> str:
        advice = [("advice", line) for line in self.advice]
        return html_table("Plan", [*figures_of(self), *advice])

    def __repr__(self) -> str:
        return (
            f"<Plan: {self.rows} rows, {self.world_size} ranks, {self.policy}: {self.tasks} tasks, "
            f"{format_bytes(self.memory_bytes)} per worker, imbalance {self.imbalance:.2f}, "
            f"{self.seconds:.1f} s>"
        )


@dataclass(frozen=True)
class WhatIf:
    """Several plans of one job side by side."""

    plans: tuple[Plan, ...]
    best: Plan
    #: the fastest that fits; among equals the one that moves fewer bytes, then with fewer tasks
    why: str
