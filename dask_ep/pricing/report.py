"""How is a plan, or a run compared with its plan, shown?

The report is one HTML file with everything it needs, scripts included: it opens from an email or a
disk without a network, on a phone, and can be printed. What figures show is also in text or tables.

    plan     loads, imbalance of each placement, traffic, memory against the limit
    run      the same, planned against measured; tasks on a time line, rows over time, events
"""

from __future__ import annotations

import os
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from html import escape
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from dask.system import CPU_COUNT
from dask.utils import format_bytes

from dask_ep import __version__
from dask_ep.placement.policies import POLICIES, place
from dask_ep.pricing import figures
from dask_ep.pricing.plan_text import figures_of
from dask_ep.pricing.price import Plan, WhatIf
from dask_ep.pricing.trace import Record
from dask_ep.storage.files import write_text

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #111; background: #fff; margin: 0 auto;
  max-width: 60rem; padding: 1rem; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .5rem; border-bottom: 1px solid #ccc; }
td + td, th + th { text-align: right; } thead + tbody td + td { white-space: nowrap; }
.wide { overflow-x: auto; }
figure { margin: 1rem 0; } figcaption { color: #444; font-size: .9rem; }
@media print { body { max-width: none; font-size: 11pt; } figure, table { break-inside: avoid; } }
"""


LINK = '<p><a href="{}">Dask\'s own report of this run</a> (a separate file)</p>'


def write_plan_report(path: str | PathLike, compared: WhatIf, *, job: str = "") -> None:
    """Write a report of a plan, or of several that are compared.

    Parameters
    ----------
    path : of the HTML file
    compared : WhatIf
        From `what_if`; for a single plan, ``WhatIf((plan,), plan, "")``.
    job : name of the job

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
    sections += [_heading("Load", _text_on_load(best)), figures.draw_expert_load(best)]
    if best.has_ranks:
        sections += [
            figures.draw_rank_load(best),
            figures.draw_imbalance(_imbalances(best)),
            _heading("Between chunks and ranks", _text_on_traffic(best)),
            _planned_traffic(best),
        ]
    sections += [_heading("Memory", _text_on_memory(best)), figures.draw_memory(best)]
    if best.advice:
        sections.append(_heading("Advice", ". ".join(best.advice)))
    sections.append(_table("Made by", ("", ""), _origin(job)))
    _write(path, "Plan", _title(best), sections)


def write_run_report(
    path: str | PathLike,
    plan: Plan,
    record: Record,
    *,
    job: str = "",
    note: str = "",
    link: str | None = None,
    more: Sequence[tuple[str, str, str]] = (),
) -> None:
    """Write a report of a run, compared with its plan.

    Parameters
    ----------
    path : of the HTML file
    plan : Plan, for the run's ranks, placement and chunks
    record : Record, with chunks numbered as in the plan
    job : name of the job
    note : a further remark, for example that the run resumed another
    link : address of another report, such as Dask's own
    more : further figures: name, planned and measured

    Raises
    ------
    ImportError
        If bokeh is not installed.
    """
    rate = plan.rows / record.seconds if record.seconds else 0.0
    time = f"{plan.rows:,} rows in {record.seconds:.2f} s, {rate:,.0f} rows per second."
    sections = [
        *([_heading("", note)] if note else []),
        _table("Planned and measured", ("", "planned", "measured"), [*_both(plan, record), *more]),
        *([LINK.format(escape(link))] if link else []),
        _heading("Load", _text_on_load(plan)),
        *(_of_ranks(plan, record) if plan.has_ranks else [figures.draw_expert_load(plan)]),
        _heading("Memory", _text_on_memory(plan)),
        figures.draw_memory(plan, record.peak_bytes),
        _heading("Time", time),
        figures.draw_time_line(record),
        figures.draw_progress(plan, record),
    ]
    most, bars = figures.MOST_SPANS, len(record.spans) + len(record.servings)
    if bars > most:
        text = f"The time line shows the longest {most:,} of {bars:,} tasks and servings."
        sections.append(_heading("", text))
    sections.append(_heading("Faults and moves", _text_on_events(record)))
    if record.events:
        rows = [(f"{event.time:.2f} s", event.what) for event in record.events]
        sections.append(_table("", ("at", "what"), rows))
    sections.append(_table("Made by", ("", ""), _origin(job)))
    _write(path, "Run", _title(plan), sections)


def check_drawing() -> None:
    """Raise ImportError if bokeh is not installed, before a run instead of after it."""
    try:
        import bokeh.embed  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "a report is drawn with bokeh, which is not installed; "
            "install it with: pip install bokeh"
        ) from error


def check_place(path: str | PathLike) -> None:
    """Make the directory of a file that is written later; raise OSError if that is impossible."""
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


def _write(path: str | PathLike, kind: str, title: str, sections: Sequence[Any]) -> None:
    """Write sections, which are HTML text or bokeh figures, to one page."""
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
    write_text(path, page)


def _origin(job: str) -> list[tuple[str, str]]:
    """Return the job of a report, the command, when and where it ran, and versions."""
    program, *arguments = sys.argv
    name = os.path.basename(program)
    command = shlex.join(["dask-ep" if name == "__main__.py" else name, *arguments])
    packages = ", ".join(f"{name} {version(name)}" for name in ("dask", "distributed", "numpy"))
    return [
        *([("job", job)] if job else []),
        ("command", command),
        ("date", time.strftime("%Y-%m-%d %H:%M %z")),
        ("host", f"{platform.node()}, {platform.machine()}, {CPU_COUNT} cores"),
        ("versions", f"dask_ep {__version__}, Python {platform.python_version()}, {packages}"),
    ]


def _title(plan: Plan) -> str:
    how = f"{plan.world_size} ranks ({plan.policy})" if plan.has_ranks else "in passes"
    return (
        f"{plan.rows:,} token rows of width {plan.work.d}, {plan.slots_per_row} of "
        f"{plan.expert_rows.size} experts per row, {how}"
    )


def _heading(title: str, text: str) -> str:
    heading = f"<h2>{escape(title)}</h2>" if title else ""
    return f"{heading}<p>{escape(text)}</p>"


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    top = f"<thead><tr>{cells}</tr></thead>" if any(head) else ""
    heading = f"<h2>{escape(title)}</h2>" if title else ""
    return f'{heading}<div class="wide"><table>{top}<tbody>{lines}</tbody></table></div>'


def _both(plan: Plan, record: Record) -> list[tuple[str, str, str]]:
    """Return the figures as planned and as measured."""
    both = [("tasks", f"{plan.tasks:,}", f"{record.tasks:,}")]
    if plan.has_ranks:
        planned, received = plan.packet_rows.sum(axis=0), list(record.received_rows().values())
        exchanged = format_bytes(plan.exchanged_bytes), format_bytes(record.exchanged_bytes)
        both += [
            ("rows that ranks receive", f"{planned.sum():,}", f"{sum(received):,}"),
            ("imbalance of these rows", _imbalance(planned), _imbalance(received)),
            ("exchanged between workers", *exchanged),
        ]
    peak = "" if record.peak_bytes is None else format_bytes(record.peak_bytes)
    return [
        *both,
        ("peak memory of a worker", format_bytes(plan.process_bytes), peak),
        ("time", "{:.2g} to {:.2g} s".format(*plan.seconds_range), f"{record.seconds:.2f} s"),
    ]


def _of_ranks(plan: Plan, record: Record) -> list[Any]:
    """Return the sections on ranks: load and traffic, planned and measured; services; chunks."""
    received, chunks = record.received_rows(), record.chunks_of_workers()
    ranks = [
        (str(rank), f"{rows:,}", f"{received.get(rank, 0):,}")
        for rank, rows in enumerate(plan.packet_rows.sum(axis=0).tolist())
    ]
    finished = [(figures.short(w), f"{chunks.get(w, 0):,}") for w in record.workers()]
    return [
        figures.draw_rank_load(plan, received),
        _table("", ("rank", "planned rows", "measured rows"), ranks),
        figures.draw_imbalance(_imbalances(plan)),
        _heading("Between chunks and ranks", _text_on_traffic(plan)),
        _planned_traffic(plan),
        *_measured_traffic(plan, record),
        _table("Services", SERVICE_COLUMNS, _services(record)),
        _heading("", TEXT_ON_SERVICES),
        _table("Chunks", ("worker", "chunks"), finished),
    ]


SERVICE_COLUMNS = ("rank", "worker", "rows", "bytes in", "bytes out", "busy", "queue")

TEXT_ON_SERVICES = (
    "Busy is the fraction of the time in which a service computed; queue is the average number of "
    "rows that waited for it. Rows of chunks on its own worker send no bytes and do not queue."
)


def _services(record: Record) -> list[tuple[str, ...]]:
    return [
        (
            str(service.rank),
            figures.short(service.worker),
            f"{service.rows:,}",
            format_bytes(service.bytes_in),
            format_bytes(service.bytes_out),
            f"{service.busy:.0%}",
            f"{service.queue:,.0f}",
        )
        for service in record.services()
    ]


def _imbalance(rows: Sequence[float]) -> str:
    """Return the largest over the mean, as text."""
    counts = np.asarray(rows)
    return f"{counts.max() / counts.mean():.3f}" if counts.any() else ""


def _planned_traffic(plan: Plan) -> Any:
    names = [f"worker {number}" for number in range(plan.workers)]
    return figures.draw_traffic(plan.traffic_rows, "Planned: rows to each rank", names)


def _measured_traffic(plan: Plan, record: Record) -> list[Any]:
    workers, rows = record.workers(), record.traffic_rows(plan.world_size)
    if plan.workers == 1:  # threads are one worker
        rows = rows.sum(axis=0, keepdims=True)
        names = ["worker 0"]
    else:
        names = [figures.short(worker) for worker in workers]
    if not rows.any():
        return []
    return [figures.draw_traffic(rows, "Measured: rows to each rank", names)]


def _imbalances(plan: Plan) -> dict[str, float]:
    """Return the imbalance of the plan's placement and of each policy, for the plan's load."""
    load = plan.expert_rows
    found = {p: place(p, load, plan.world_size).imbalance(load) for p in POLICIES}
    if plan.policy in found:
        return found | {plan.policy: plan.imbalance}
    return {"this placement": plan.imbalance, **found}


def _text_on_load(plan: Plan) -> str:
    hottest = int(plan.expert_rows.argmax())
    pairs = max(int(plan.expert_rows.sum()), 1)
    text = (
        f"The hottest expert, {hottest}, gets {plan.expert_rows[hottest] / pairs:.1%} of all rows"
    )
    if not plan.has_ranks:
        return f"{text}."
    busiest = int(plan.rank_rows.argmax())
    return (
        f"{text}; the busiest rank, {busiest}, has {plan.imbalance:.3f} times the mean work. A row "
        "that needs several experts of a rank is received once, but is work for each of them."
    )


def _text_on_traffic(plan: Plan) -> str:
    rows = int(plan.packet_rows.sum())
    text = (
        f"Ranks receive {rows:,} rows, {rows / max(plan.rows, 1):.2f} per token row: a row goes to "
        f"a rank once, however many of its {plan.slots_per_row} experts are there. "
    )
    if not plan.exchanged_bytes:
        return f"{text}None of them leaves its worker."
    return (
        f"{text}A row is sent to another worker once, and each of its ranks there sends one back: "
        f"{format_bytes(plan.exchanged_bytes)}. The plan assumes that neighbouring chunks are on "
        "one worker; in a run Dask decides which worker reads which chunk."
    )


def _text_on_events(record: Record) -> str:
    again = record.repeated + record.served_again
    if not record.events and not again:
        return "No worker joined or left, no rank moved, and nothing was computed twice."
    return (
        f"{record.repeated:,} tasks ran again and {record.served_again:,} packets were served "
        "again, because they were lost with a worker or moved with a rank; what a lost worker had "
        f"served is not counted. {len(record.events)} events are dotted lines in the time line."
    )


def _text_on_memory(plan: Plan) -> str:
    parts = []
    for what, (nbytes, limit) in plan.memory_figures.items():
        of = "no limit was given" if limit is None else f"the limit is {format_bytes(limit)}"
        parts.append(f"{what}: {format_bytes(nbytes)}; {of}")
    text = ". ".join(parts)
    return f"{text[:1].upper()}{text[1:]}."
