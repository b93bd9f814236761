"""How is a plan made and shown on the command line?"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
from dask.utils import format_bytes
from rich.console import Console
from rich.table import Table

from dask_ep.cli.command import echo_note
from dask_ep.cli.options import (
    choose_local,
    chunks_options,
    job_options,
    local_options,
    parse_travel,
    parse_what,
    read_job,
    read_wanted,
    refuse,
    wanted_options,
)
from dask_ep.cli.terminal import hint_at_faster_blas
from dask_ep.jobs.collect_plan import plan_collection
from dask_ep.jobs.job import Job
from dask_ep.jobs.plan import plan_job, what_if_job
from dask_ep.laws.costs import Rates
from dask_ep.laws.travel import TRAVELS, Travel
from dask_ep.layers.collect import WHAT, Wanted
from dask_ep.placement.policies import POLICIES
from dask_ep.pricing.plan_text import figures_of
from dask_ep.pricing.price import Plan, WhatIf
from dask_ep.pricing.report import check_drawing, check_place, write_plan_report
from dask_ep.storage.files import write_text

RATE_NAMES = tuple(field.name for field in fields(Rates))
"""The rates that are measured, or given by --rates."""

BAR = 30
"""Length of the bar of the busiest rank, in characters."""

WIDTH = 120
"""Characters of a line without a terminal."""


@click.command("plan")
@job_options
@click.argument("choices", nargs=-1, metavar="[NAME=VALUE,VALUE...]...")
@local_options
@chunks_options
@click.option(
    "--what",
    metavar="NAMES",
    callback=parse_what,
    help=f"Plan `collect` of these instead of `run`: {', '.join(WHAT)}.",
)
@wanted_options
@click.option(
    "--rates",
    metavar="NAME=NUMBER,...",
    help=f"Rates per second to use instead of measuring: {', '.join(RATE_NAMES)}.",
)
@click.option("--what-if", "side_by_side", is_flag=True, help="Compare the choices that follow.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.option("--html", type=click.Path(dir_okay=False), help="Write a report to this file.")
@click.option("--save", type=click.Path(dir_okay=False), help="Write the placement to this file.")
def plan_command(
    job: str | None,
    choices: tuple[str, ...],
    side_by_side: bool,
    as_json: bool,
    html: str | None,
    save: str | None,
    **options: Any,
) -> None:
    """Show what a job will cost: rows, bytes, memory, tasks and time.

    Reads the routing, but neither tokens nor experts; for a layer of a checkpoint it reads the
    tokens and runs the router. With --what-if, values of world_size, placement, chunk_rows and
    travel are compared.

    \b
    Examples:
      dask-ep plan demo/job.toml
      dask-ep plan demo/job.toml --processes 4 --placement exact --save placement.json
      dask-ep plan demo/job.toml --what-if world_size=2,4,8 placement=contiguous,balanced
      dask-ep plan demo/job.toml --processes 4 --what-if travel=rows,auto,experts
      dask-ep plan --layer checkpoint/ --layer-index 3 --tokens hidden.zarr --out out.zarr
      dask-ep plan demo/job.toml --what usage,gram --memory-limit 2GiB
      dask-ep plan demo/job.toml --gpu
      dask-ep plan demo/job.toml --gpu --world-size 8 --rates flops=6e14,copy=2e12,lane=2.5e10
    """
    if job is not None and "=" in job and not Path(job).exists():
        choices, job = (job, *choices), None
    if side_by_side and not choices:
        raise click.UsageError(
            f"--what-if needs choices to compare, NAME=VALUE,...: {', '.join(CHOICES)}"
        )
    if choices and not side_by_side:
        raise click.UsageError(f"{choices[0]!r} is a choice to compare; put --what-if before it")
    if html is not None:
        check_drawing()
    for path in (html, save):
        if path is not None:
            check_place(path)
    parsed, wanted = read_job(job, options), read_wanted(options)
    compared = priced_job(parsed, parse_choices(choices), wanted, **options)
    if save is not None:
        write_text(save, compared.best.placement.to_json())
        click.echo(f"placement: {save}", err=True)
    if html is not None:
        write_plan_report(html, compared, job=parsed.name)
        click.echo(f"report: {html}", err=True)
    if not options["gpu"]:
        hint_at_faster_blas()
    if as_json and side_by_side:
        best, plans = compared.plans.index(compared.best), [p.to_dict() for p in compared.plans]
        click.echo(json.dumps({"best": best, "why": compared.why, "plans": plans}))
    elif as_json:
        click.echo(compared.best.to_json())
    else:
        console = Console(width=None if sys.stdout.isatty() else WIDTH)
        if side_by_side:
            console.print(choices_table(compared))
            console.print(f"best: {compared.why}")
        for part in plan_tables(compared.best):
            console.print(part)


def priced_job(
    job: Job,
    choices: dict[str, list[Any]],
    wanted: Wanted,
    *,
    chunk_rows: int | None = None,
    travel: str | None = None,
    link_rate: int | None = None,
    read_rate: int | None = None,
    rates: str | None = None,
    **local: Any,
) -> WhatIf:
    """Price a job in each combination of the choices, or as it is if there are none.

    If statistics are wanted, price their collection instead of a run.
    """

    def moves(how: str | None) -> Travel:
        return parse_travel(how, link_rate, read_rate)

    common: dict[str, Any] = {
        "rates": None if rates is None else parse_rates(rates, link=link_rate, read=read_rate),
        "on_note": echo_note,
    }
    where = choose_local(**local)
    if wanted.what:
        refuse({"what-if": choices, "travel": travel}, "is for runs: give it without --what")
        one: Plan = plan_collection(job, wanted, where, chunk_rows=chunk_rows, **common)
        return WhatIf((one,), one, "")
    if not choices:
        one = plan_job(job, where, chunk_rows=chunk_rows, travel=moves(travel), **common)
        return WhatIf((one,), one, "")
    values: dict[str, Any] = {"chunk_rows": [chunk_rows], "travel": [travel]} | choices
    values["travel"] = [moves(how) for how in values["travel"]]
    return what_if_job(job, where, **values, **common)


def parse_rates(text: str, **others: float | None) -> Rates:
    """Read ``--rates``; `others` override it.

    Examples
    --------
    >>> parse_rates("flops=6e14,copy=2e12", read=None, link=1e9).link
    1000000000.0
    """
    given = {}
    for part in text.split(","):
        name, _, number = part.partition("=")
        try:
            given[name.strip()] = float(number)
        except ValueError:
            raise click.UsageError(
                f"a rate is NAME=NUMBER, such as flops=6e14; got {part!r}"
            ) from None
    given |= {name: number for name, number in others.items() if number is not None}
    unknown = [name for name in given if name not in RATE_NAMES]
    if unknown or not {"flops", "copy"} <= given.keys():
        raise click.UsageError(
            f"--rates needs flops and copy, and takes {', '.join(RATE_NAMES)}; got {text!r}"
        )
    if not all(0 < rate < math.inf for rate in given.values()):
        raise click.UsageError(f"rates must be finite numbers above 0; got {text!r}")
    return Rates(**given)


def parse_choices(choices: Sequence[str]) -> dict[str, list[Any]]:
    """Read ``name=value,value`` arguments.

    Examples
    --------
    >>> parse_choices(["world_size=2,4", "placement=contiguous,exact"])
    {'world_size': [2, 4], 'placement': ['contiguous', 'exact']}
    """
    parsed: dict[str, list[Any]] = {}
    for choice in choices:
        name, _, values = choice.partition("=")
        if name not in CHOICES or not values:
            raise click.UsageError(
                f"a choice is one of {', '.join(CHOICES)} with =value,...; got {choice!r}"
            )
        if name in parsed:
            raise click.UsageError(f"{name} is given twice; use {name}=value,value,...")
        try:
            parsed[name] = [CHOICES[name](value) for value in values.split(",")]
        except ValueError as error:
            raise click.UsageError(f"{name} takes {error}; got {values!r}") from None
    return parsed


def _whole_number(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError("whole numbers of at least 1")
    return int(text)


def _placement_name(text: str) -> str:
    if text not in POLICIES and not Path(text).is_file():
        raise ValueError(f"{', '.join(POLICIES)}, or files of placements")
    return text


def _travel_name(text: str) -> str:
    if text not in TRAVELS:
        raise ValueError(", ".join(TRAVELS))
    return text


CHOICES = {
    "world_size": _whole_number,
    "placement": _placement_name,
    "chunk_rows": _whole_number,
    "travel": _travel_name,
}
"""The choices that can be compared, and how their values are parsed."""


def choices_table(compared: WhatIf) -> Table:
    """Show plans side by side, the best one marked."""
    table = Table(title="what if")
    for name in ("", "ranks", "placement", "chunk rows", "imbalance", "memory", "sent", "tasks"):
        table.add_column(name, justify="left" if name in ("", "placement") else "right")
    table.add_column("time", justify="right")
    for one in compared.plans:
        table.add_row(
            "best" if one is compared.best else "" if one.fits else "too large",
            str(one.world_size),
            one.policy,
            str(one.chunk_rows),
            f"{one.imbalance:.3f}",
            format_bytes(one.memory_bytes),
            format_bytes(one.exchanged_bytes),
            str(one.tasks),
            f"{one.seconds:.2f} s",
            style="bold" if one is compared.best else "" if one.fits else "dim",
        )
    return table


def plan_tables(one: Plan) -> list[Any]:
    """Show one plan: its figures, its ranks, and its advice."""
    figures = Table(title="plan", show_header=False)
    figures.add_column()
    figures.add_column(justify="right")
    for name, value in figures_of(one):
        figures.add_row(name, value)
    advice = [f"advice: {line}" for line in one.advice]
    if not one.has_ranks:
        return [figures, *advice]
    ranks = Table(title="ranks")
    for name in ("rank", "experts", "rows served", "rows received"):
        ranks.add_column(name, justify="right")
    ranks.add_column("load")
    most = max(int(one.rank_rows.max()), 1)
    received = one.packet_rows.sum(axis=0)
    for rank, rows in enumerate(one.rank_rows.tolist()):
        bar = "█" * round(BAR * rows / most)
        held = int(one.rank_experts[rank])
        ranks.add_row(str(rank), str(held), f"{rows:,}", f"{received[rank]:,}", bar)
    return [figures, ranks, *advice]
