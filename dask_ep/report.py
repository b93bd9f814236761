"""How does a plan, or a run beside its plan, look to the eye?

One HTML file that holds everything it shows, scripts included: it opens from a mail or a disk
without a network, on a phone and on paper. Figures are said in text and tables as well.

    plan     loads, imbalance of each placement, traffic, memory against the limit
    run      the same, planned against measured; tasks on a time line, rows over time, events
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from html import escape
from os import PathLike
from pathlib import Path

import numpy as np
from dask.utils import format_bytes

from dask_ep import figures
from dask_ep.placement import POLICIES, place
from dask_ep.planner import WhatIf
from dask_ep.price import Plan
from dask_ep.record import Record

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #111; background: #fff; margin: 0 auto;
  max-width: 60rem; padding: 1rem; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .5rem; border-bottom: 1px solid #ccc; }
td + td, th + th { text-align: right; } .wide { overflow-x: auto; }
figure { margin: 1rem 0; } figcaption { color: #444; font-size: .9rem; }
@media print { body { max-width: none; font-size: 11pt; } figure, table { break-inside: avoid; } }
"""


def write_plan_report(path: str | PathLike, compared: WhatIf) -> None:
    """Write what a plan says, and how the choices compare if there are several.

    Parameters
    ----------
    path : of the HTML file
    compared : WhatIf
        Of `what_if`; or of one plan, ``WhatIf((plan,), plan, "")``.

    Raises
    ------
    ImportError
        If bokeh is not installed.
    """
    best = compared.best
    sections = [_table("Figures", ("", ""), figures_of(best))]
    if len(compared.plans) > 1:
        sections.append(_heading("Choices", compared.why))
        sections.append(figures.draw_choices(compared.plans, best))
    sections += [_heading("Load", _said_of_load(best)), figures.draw_expert_load(best)]
    if best.has_ranks:
        sections += [
            figures.draw_rank_load(best),
            figures.draw_imbalance(_imbalances(best)),
            _heading("Between ranks", _said_of_traffic(best)),
            figures.draw_traffic(
                best.traffic_rows, row_bytes(best), "Rows from the chunks at each rank to each rank"
            ),
        ]
    sections += [_heading("Memory", _said_of_memory(best)), figures.draw_memory(best)]
    if best.advice:
        sections.append(_heading("Advice", ". ".join(best.advice)))
    _write(path, "Plan", _title(best), sections)


def write_run_report(
    path: str | PathLike,
    plan: Plan,
    record: Record,
    *,
    note: str = "",
    link: str | None = None,
) -> None:
    """Write what a run did beside what was planned.

    Parameters
    ----------
    path : of the HTML file
    plan : Plan, of the run's ranks, placement and chunks
    record : Record, its chunks numbered as those of the plan
    note : what else is to be said, such as that the run went on with another's output
    link : address of a further report, such as Dask's own

    Raises
    ------
    ImportError
        If bokeh is not installed.
    """
    rate = plan.rows / record.seconds if record.seconds else 0.0
    said = f"{plan.rows:,} rows in {record.seconds:.2f} s, {rate:,.0f} rows per second."
    sections = [
        *([_heading("", note)] if note else []),
        _table("Planned and measured", ("", "planned", "measured"), _both(plan, record)),
        *([f'<p><a href="{escape(link)}">Dask\'s own report of this run</a></p>'] if link else []),
        _heading("Load", _said_of_load(plan)),
        *(_of_ranks(plan, record) if plan.has_ranks else [figures.draw_expert_load(plan)]),
        _heading("Memory", _said_of_memory(plan)),
        figures.draw_memory(plan, record.peak_bytes),
        _heading("Time", said),
        figures.draw_time_line(record),
        figures.draw_progress(plan, record),
    ]
    if len(record.spans) > figures.MOST_SPANS:
        most, all_ = figures.MOST_SPANS, len(record.spans)
        sections.append(_heading("", f"The time line shows the longest {most} of {all_} tasks."))
    sections.append(_heading("Faults and moves", _said_of_events(record)))
    if record.events:
        rows = [(f"{event.time:.2f} s", event.what) for event in record.events]
        sections.append(_table("", ("at", "what"), rows))
    _write(path, "Run", _title(plan), sections)


def check_drawing() -> None:
    """Raise ImportError where bokeh is not installed; better before a run than after it."""
    try:
        import bokeh.embed  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "a report is drawn with bokeh, which is not installed; "
            'install it with: pip install "dask-ep[report]"'
        ) from error


def check_place(path: str | PathLike) -> None:
    """Make the folder of a file that is written at the end; raise OSError where it cannot be."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"{path} cannot be written: {error.strerror}; choose another place"
        ) from error
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        what = "is a directory" if path.is_dir() else "cannot be written"
        raise OSError(f"{path} {what}; choose another place")


def _write(path: str | PathLike, kind: str, title: str, sections: Sequence[object]) -> None:
    """Put sections, HTML text or bokeh figures, into one page."""
    check_drawing()
    from bokeh.embed import components
    from bokeh.resources import INLINE

    drawings = [part for part in sections if not isinstance(part, str)]
    script, holders = components(drawings)
    waiting = iter(holders)
    body = "\n".join(
        part if isinstance(part, str) else f"<figure>{next(waiting)}</figure>" for part in sections
    )
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{escape(kind)}: {escape(title)}</title>
<style>{STYLE}</style>
{INLINE.render()}
</head>
<body>
<h1>{escape(kind)}</h1>
<p>{escape(title)}</p>
{body}
{script}
</body>
</html>
"""
    Path(path).write_text(page, encoding="utf-8")


def _title(plan: Plan) -> str:
    how = f"{plan.world_size} ranks ({plan.policy})" if plan.has_ranks else "which go by in passes"
    return (
        f"{plan.rows:,} token rows of width {plan.work.d}, {plan.slots_per_row} of "
        f"{plan.expert_rows.size} experts a row, {how}"
    )


def _heading(title: str, said: str) -> str:
    heading = f"<h2>{escape(title)}</h2>" if title else ""
    return f"{heading}<p>{escape(said)}</p>"


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    top = f"<thead><tr>{cells}</tr></thead>" if any(head) else ""
    heading = f"<h2>{escape(title)}</h2>" if title else ""
    return f'{heading}<div class="wide"><table>{top}<tbody>{lines}</tbody></table></div>'


def figures_of(plan: Plan) -> list[tuple[str, str]]:
    """The figures of a plan as text, each with its name."""
    copies = []
    if plan.copies_beside:
        read = format_bytes(plan.copies_beside * plan.work.expert_stored)
        copies.append(("copies of experts among them", f"{plan.copies_beside}, {read}"))
    parts = ", ".join(f"{name} {format_bytes(n)}" for name, n in plan.memory_parts.items())
    tasks = plan.tasks + plan.other_tasks
    library = f", by {plan.work.multiplied_by} here" if plan.work.multiplied_by else ""
    ranks = [("runs on", plan.places)]
    between = []
    if plan.has_ranks:
        ranks = [("ranks", f"{plan.world_size} ({plan.policy}) on {plan.places}")]
        between = [
            ("imbalance (max/mean rank)", f"{plan.imbalance:.3f}"),
            ("exchanged between ranks", format_bytes(plan.exchanged_bytes)),
            ("moved between workers", format_bytes(plan.moved_bytes)),
        ]
    return [
        ("token rows", f"{plan.rows:,}"),
        ("experts", f"{plan.expert_rows.size}, {plan.slots_per_row} a row"),
        *ranks,
        ("chunks", f"{len(plan.chunks):,} of up to {plan.chunk_rows:,} rows"),
        *between,
        ("experts to read", format_bytes(plan.stored_bytes)),
        *copies,
        *((what, of_limit(*figures)) for what, figures in plan.memory_figures.items()),
        ("what it is for", parts),
        ("tasks", f"{tasks:,}, {plan.scheduler_seconds:.2f} s of the scheduler"),
        ("operations", f"{plan.flops.sum() + plan.flops_beside:.3g} FLOP{library}"),
        ("time", f"{plan.seconds:.2f} s"),
    ]


def of_limit(nbytes: int, limit: int | None) -> str:
    """What is used, and what may be, for the eye.

    Examples
    --------
    >>> of_limit(3 << 20, None), of_limit(3 << 20, 5 << 20)
    ('3.00 MiB', '3.00 MiB of 5.00 MiB')
    """
    used = format_bytes(nbytes)
    return used if limit is None else f"{used} of {format_bytes(limit)}"


def _both(plan: Plan, record: Record) -> list[tuple[str, str, str]]:
    """Planned and measured, side by side."""
    peak = "" if record.peak_bytes is None else format_bytes(record.peak_bytes)
    return [
        ("tasks", f"{plan.tasks:,}", f"{record.tasks:,}"),
        *(_both_between(plan, record) if plan.has_ranks else []),
        ("memory of a worker, at most", format_bytes(plan.process_bytes), peak),
        ("time", f"{plan.seconds:.2f} s", f"{record.seconds:.2f} s"),
    ]


def _both_between(plan: Plan, record: Record) -> list[tuple[str, str, str]]:
    """What goes between ranks, planned and measured."""
    of_ranks = record.received_rows(plan.reply_row_bytes) if plan.exchanged_bytes else {}
    received = sum(of_ranks.values())
    return [
        ("rows received by ranks", f"{plan.packet_rows.sum():,}", f"{received:,}" * (received > 0)),
        ("exchanged", format_bytes(plan.exchanged_bytes), format_bytes(record.exchanged_bytes)),
        (
            "imbalance of what ranks receive",
            _imbalance(plan.packet_rows.sum(axis=0)),
            _imbalance(list(of_ranks.values())),
        ),
        (
            "moved between workers",
            format_bytes(plan.moved_bytes),
            format_bytes(record.moved_bytes),
        ),
    ]


def _of_ranks(plan: Plan, record: Record) -> list[object]:
    """Load of ranks and traffic between them, planned and measured."""
    received = record.received_rows(plan.reply_row_bytes)
    measured = received if plan.exchanged_bytes and any(received.values()) else None
    return [
        figures.draw_rank_load(plan, measured),
        _table("", ("rank", "planned rows", "measured rows"), _ranks(plan, measured)),
        figures.draw_imbalance(_imbalances(plan)),
        _heading("Between ranks", _said_of_traffic(plan)),
        *_traffic(plan, record),
    ]


def _imbalance(rows: Sequence[float]) -> str:
    """Largest over mean, as text."""
    rows = np.asarray(rows)
    return f"{rows.max() / rows.mean():.3f}" if rows.any() else ""


def _ranks(plan: Plan, measured: dict[int, int] | None) -> list[tuple[str, str, str]]:
    """Rows that each rank receives, planned and measured."""
    planned = plan.packet_rows.sum(axis=0).tolist()
    return [
        (str(rank), f"{rows:,}", "" if measured is None else f"{measured.get(rank, 0):,}")
        for rank, rows in enumerate(planned)
    ]


def _traffic(plan: Plan, record: Record) -> list[object]:
    """Heat maps of the rows from workers to ranks, planned and measured."""
    if not plan.exchanged_bytes:
        return []
    nbytes = row_bytes(plan)
    planned = plan.worker_traffic_rows
    names = [str(worker) for worker in range(len(planned))]
    drawn = [figures.draw_traffic(planned, nbytes, "Planned: rows to each rank", names)]
    workers, measured = record.traffic_rows(plan.reply_row_bytes, plan.world_size)
    if plan.workers == 1:  # threads are no workers: what lies in memory lies with all of them
        workers, measured = ["0"], measured.sum(axis=0, keepdims=True)
    if measured.any():
        names = [f"{number}: {figures.short(who)}" for number, who in enumerate(workers)]
        names = names if plan.workers > 1 else ["0"]
        drawn.append(figures.draw_traffic(measured, nbytes, "Measured: rows to each rank", names))
    return drawn


def row_bytes(plan: Plan) -> int:
    """Bytes of a row there and back."""
    return plan.packet_row_bytes + plan.reply_row_bytes


def _imbalances(plan: Plan) -> dict[str, float]:
    """Imbalance of the plan's placement and of each policy, for the plan's load."""
    load = plan.expert_rows
    found = {p: place(p, load, plan.world_size).imbalance(load) for p in POLICIES}
    return found if plan.policy in found else {"this placement": plan.imbalance, **found}


def _said_of_load(plan: Plan) -> str:
    hottest = int(plan.expert_rows.argmax())
    pairs = max(int(plan.expert_rows.sum()), 1)
    said = (
        f"The hottest expert, {hottest}, gets {plan.expert_rows[hottest] / pairs:.1%} of all rows"
    )
    if not plan.has_ranks:
        return f"{said}."
    busiest = int(plan.rank_rows.argmax())
    return f"{said}; the busiest rank, {busiest}, serves {plan.imbalance:.2f} times the mean."


def _said_of_traffic(plan: Plan) -> str:
    if not plan.exchanged_bytes:
        return "No row travels: one rank owns all experts, or they are read where the rows are."
    rows = int(plan.packet_rows.sum())
    return (
        f"{rows:,} rows go to ranks and as many come back, {format_bytes(plan.exchanged_bytes)} "
        f"in all: {rows / max(plan.rows, 1):.2f} for each token row, which goes to a rank once, "
        f"however many of its {plan.slots_per_row} experts are there. "
        f"{format_bytes(plan.moved_bytes)} leave their worker if neighbouring chunks lie together."
    )


def _said_of_events(record: Record) -> str:
    if not record.events and not record.repeated:
        return "No worker came or went, no rank moved, and no task ran twice."
    again = f"{record.repeated:,} tasks ran again, lost with a worker or moved with a rank"
    return f"{again}; {len(record.events)} events, dotted lines in the time line."


def _said_of_memory(plan: Plan) -> str:
    said = []
    for what, (nbytes, limit) in plan.memory_figures.items():
        of = "no limit was given" if limit is None else f"the limit is {format_bytes(limit)}"
        said.append(f"{what}: {format_bytes(nbytes)}; {of}")
    text = ". ".join(said)
    return f"{text[:1].upper()}{text[1:]}."
