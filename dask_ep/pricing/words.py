"""How are the figures of a plan put into words?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dask.utils import format_bytes

from dask_ep.pricing.needs import START_SECONDS

if TYPE_CHECKING:
    from dask_ep.pricing.price import Plan


def figures_of(plan: Plan) -> list[tuple[str, str]]:
    """The figures of a plan as text, each with its name."""
    replicas = []
    if plan.replicas:
        read = format_bytes(plan.replicas * plan.work.expert_stored)
        replicas.append(("replicas among them", f"{plan.replicas}, {read}"))
    parts = ", ".join(f"{name} {format_bytes(n)}" for name, n in plan.memory_parts.items())
    tasks = plan.tasks + plan.other_tasks
    library = f", by {plan.work.multiplied_by} here" if plan.work.multiplied_by else ""
    ranks = [("runs on", plan.places)]
    between = []
    if plan.has_ranks:
        ranks = [("ranks", f"{plan.world_size} ({plan.policy}) on {plan.places}")]
        between = [
            ("imbalance of work (busiest rank / mean)", f"{plan.imbalance:.3f}"),
            ("exchanged between workers", format_bytes(plan.exchanged_bytes)),
        ]
    return [
        ("token rows", f"{plan.rows:,}"),
        ("experts", f"{plan.expert_rows.size}, {plan.slots_per_row} a row"),
        *ranks,
        ("chunks", f"{len(plan.chunks):,} of up to {plan.chunk_rows:,} rows"),
        *between,
        ("experts to read", format_bytes(plan.stored_bytes)),
        *([("disk for rows that wait", disk)] if (disk := _disk(plan)) else []),
        *replicas,
        *((what, of_limit(*figures)) for what, figures in plan.memory_figures.items()),
        ("what it is for", parts),
        ("tasks", f"{tasks:,}, {plan.scheduler_seconds:.2f} s of the scheduler"),
        ("operations", f"{plan.flops.sum() + plan.layer_flops:.3g} FLOP{library}"),
        ("time", _words_of_time(plan)),
    ]


def _words_of_time(plan: Plan) -> str:
    """About how long a run takes, in which range, and what the start of workers adds."""
    low, high = plan.seconds_range
    said = f"about {plan.seconds:.2g} s, {low:.2g} to {high:.2g} s"
    if plan.layout.starts_workers:
        said += "; and {:.0f} to {:.0f} s to start the workers".format(*START_SECONDS)
    return said


def _disk(plan: Plan) -> str:
    """What rows take on disk that wait for their experts, as text; empty if none do."""
    passes = plan.decision.passes
    return format_bytes(passes.spill_bytes) if passes is not None and passes.spill_bytes else ""


def of_limit(nbytes: int, limit: int | None) -> str:
    """What is used, and what may be, as text.

    Examples
    --------
    >>> of_limit(3 << 20, None), of_limit(3 << 20, 5 << 20)
    ('3.00 MiB', '3.00 MiB of 5.00 MiB')
    """
    used = format_bytes(nbytes)
    return used if limit is None else f"{used} of {format_bytes(limit)}"
