"""How are the figures of a plan shown as text?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dask.utils import format_bytes

from dask_ep.pricing.needs import START_SECONDS

if TYPE_CHECKING:
    from dask_ep.pricing.price import Plan


def figures_of(plan: Plan) -> list[tuple[str, str]]:
    """Return the figures of a plan as text, each with its name."""
    replicas = []
    if plan.replicas:
        read = format_bytes(plan.replicas * plan.work.expert_stored)
        replicas.append(("of these, replicas", f"{plan.replicas}, {read}"))
    passes, disk = plan.decision.passes, []
    if passes is not None and passes.spill_bytes:
        disk.append(("disk for spilled rows", format_bytes(passes.spill_bytes)))
    time = "about {:.2g} s, {:.2g} to {:.2g} s".format(plan.seconds, *plan.seconds_range)
    if plan.layout.starts_workers:
        time += "; and {:.0f} to {:.0f} s to start the workers".format(*START_SECONDS)
    parts = ", ".join(f"{name} {format_bytes(n)}" for name, n in plan.memory_parts.items())
    tasks = plan.tasks + plan.other_tasks
    library = f", by {plan.work.multiplied_by}" if plan.work.multiplied_by else ""
    library += "" if plan.work.on_device else " here"
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
        ("experts", f"{plan.expert_rows.size}, {plan.slots_per_row} per row"),
        *ranks,
        ("chunks", f"{len(plan.chunks):,} of up to {plan.chunk_rows:,} rows"),
        *between,
        ("experts to read", format_bytes(plan.stored_bytes)),
        *disk,
        *replicas,
        *((what, of_limit(*figures)) for what, figures in plan.memory_figures.items()),
        ("memory by use", parts),
        ("tasks", f"{tasks:,}, {plan.scheduler_seconds:.2f} s of the scheduler"),
        ("operations", f"{plan.flops.sum() + plan.layer_flops:.3g} FLOP{library}"),
        ("time", time),
    ]


def of_limit(nbytes: int, limit: int | None) -> str:
    """Return used memory and its limit as text.

    Examples
    --------
    >>> of_limit(3 << 20, None), of_limit(3 << 20, 5 << 20)
    ('3.00 MiB', '3.00 MiB of 5.00 MiB')
    """
    used = format_bytes(nbytes)
    return used if limit is None else f"{used} of {format_bytes(limit)}"
