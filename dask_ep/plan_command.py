"""How is a plan asked for and shown on the command line?

dask-ep plan job.toml
dask-ep plan job.toml --processes 4 --placement exact --save placement.json
dask-ep plan job.toml --processes 8 --what-if world_size=2,4,8 placement=contiguous,balanced
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
from dask.system import CPU_COUNT
from dask.utils import format_bytes, parse_bytes
from rich.console import Console
from rich.table import Table

from dask_ep import device
from dask_ep.build import open_inputs, read_placement
from dask_ep.costs import Rates
from dask_ep.device import Device
from dask_ep.errors import NoDeviceError
from dask_ep.fit import at_most_all, choose_chunk_rows, hold_what_fits
from dask_ep.gpus import Gpus, device_limit
from dask_ep.in_passes import find_passes
from dask_ep.job import PLACEMENTS, Job, load_job
from dask_ep.places import Processes, Threads, count_workers, lay_out
from dask_ep.planner import Plan, PlanError, WhatIf, plan, what_if
from dask_ep.price_passes import price_passes
from dask_ep.report import check_drawing, check_place, figures_of, write_plan_report
from dask_ep.run import check_travel
from dask_ep.slots import Placement
from dask_ep.storage import open_tokens
from dask_ep.travel import ALL_ROWS, TRAVELS, Travel

RATES = tuple(field.name for field in fields(Rates))
"""What is measured, or given by --rates."""

BAR = 30
"""Characters of the bar of the busiest rank."""

WIDTH = 120
"""Characters of a line where there is no terminal."""


def parse_size(context: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    """Read an option that is a number of bytes."""
    if value is None:
        return None
    with suppress(ValueError):
        if (size := parse_bytes(value)) > 0:
            return size
    raise click.BadParameter(f'{value!r} is no size; give one such as "8 GiB"')


def travel_options(command: Callable) -> Callable:
    """Add the options of `dask_ep.travel`."""
    size = {"callback": parse_size, "metavar": "SIZE"}
    for option in (
        click.option("--read-rate", help="Bytes that a worker reads in a second; 1 GB.", **size),
        click.option("--link-rate", help="Bytes between workers in a second; 500 MB.", **size),
        click.option(
            "--travel",
            type=click.Choice(TRAVELS),
            help="What goes to what: rows to experts, experts to rows, or the cheaper of the two. "
            "By default rows; where experts do not fit, the cheaper.",
        ),
    ):
        command = option(command)
    return command


@click.command("plan")
@click.argument("job", type=click.Path(exists=True, dir_okay=False))
@click.argument("choices", nargs=-1, metavar="[NAME=VALUE,VALUE...]...")
@click.option("--world-size", type=click.IntRange(1), help="Ranks; default: processes.")
@click.option("--placement", metavar="NAME|FILE", help=f"{', '.join(PLACEMENTS)}, or a file.")
@click.option("--chunk-rows", type=click.IntRange(1), help="Rows of a token chunk.")
@click.option("--threads", type=click.IntRange(1), help="Threads of this process; default: cores.")
@click.option("--processes", type=click.IntRange(1), help="Worker processes on this machine.")
@click.option("--gpu", is_flag=True, help="One worker per GPU; with none here, one GPU per rank.")
@click.option(
    "--device-memory-limit",
    callback=parse_size,
    metavar="SIZE",
    help="Of each GPU; default: 90 % of it.",
)
@click.option(
    "--memory-limit", callback=parse_size, metavar="SIZE", help='Of a process, such as "4 GiB".'
)
@click.option(
    "--rates",
    metavar="NAME=NUMBER,...",
    help=f"Instead of measuring, what is done in a second: {', '.join(RATES)}.",
)
@travel_options
@click.option("--what-if", "side_by_side", is_flag=True, help="Compare the choices that follow.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.option("--html", type=click.Path(dir_okay=False), help="Write a report to this file.")
@click.option("--save", type=click.Path(dir_okay=False), help="Write the placement to this file.")
def plan_command(
    job: str,
    choices: tuple[str, ...],
    side_by_side: bool,
    as_json: bool,
    html: str | None,
    save: str | None,
    **options: Any,
) -> None:
    """Say what a job will cost: rows, bytes, memory, tasks and time.

    Reads the routing, and neither tokens nor experts; for a layer of a checkpoint it reads the
    tokens and runs the router. With --what-if, values of world_size, placement, chunk_rows and
    travel are compared.

    \b
    Examples:
      dask-ep plan demo/job.toml
      dask-ep plan demo/job.toml --processes 4 --placement exact --save placement.json
      dask-ep plan demo/job.toml --what-if world_size=2,4,8 placement=contiguous,balanced
      dask-ep plan demo/job.toml --processes 4 --what-if travel=rows,auto,experts
      dask-ep plan demo/job.toml --gpu
      dask-ep plan demo/job.toml --gpu --world-size 8 --device-memory-limit 70GiB \
        --rates flops=6e14,copy=2e12,lane=2.5e10
    """
    if choices and not side_by_side:
        raise click.UsageError(f"{choices[0]!r} is a choice to compare; put --what-if before it")
    if html is not None:
        check_drawing()
    for path in (html, save):
        if path is not None:
            check_place(path)
    compared = priced_job(job, parse_choices(choices), **options)
    if save is not None:
        Path(save).write_text(compared.best.placement.to_json())
    if html is not None:
        write_plan_report(html, compared)
    if as_json:
        click.echo(json_text(compared, side_by_side))
    else:
        console = Console(width=None if sys.stdout.isatty() else WIDTH)
        if side_by_side:
            console.print(choices_table(compared))
            console.print(f"best: {compared.why}")
        for part in plan_tables(compared.best):
            console.print(part)


def priced_job(
    path: str,
    choices: dict[str, list[Any]],
    *,
    world_size: int | None = None,
    placement: str | None = None,
    chunk_rows: int | None = None,
    processes: int | None = None,
    threads: int | None = None,
    memory_limit: int | None = None,
    travel: str | None = None,
    link_rate: int | None = None,
    read_rate: int | None = None,
    gpu: bool = False,
    device_memory_limit: int | None = None,
    rates: str | None = None,
) -> WhatIf:
    """Price a job file, in each combination of the choices; a single way if there are none."""
    job = load_job(path, world_size=world_size, placement=placement)
    inputs = open_inputs(job)
    chunk_rows = at_most_all(inputs, chunk_rows)
    limit = None if choices else memory_limit
    if gpu:
        where, devices = _gpus(processes, threads, limit, device_memory_limit)
    else:
        _refuse(device_memory_limit, "--device-memory-limit needs --gpu")
        if processes:
            _refuse(threads, "a job runs in one place; give one of --threads and --processes")
        where = Processes(processes, limit) if processes else Threads(threads, limit)
        devices = []
    size = job.world_size or processes or len(devices) or 1
    layout = lay_out(job, where, size, devices)
    if choices and gpu:
        layout = replace(layout, memory_limit=None)  # plans tell which fit
    inputs = hold_what_fits(inputs, layout, chunk_rows)
    moves = parse_travel(travel, link_rate, read_rate)
    asked = chunk_rows is not None
    passes = find_passes(inputs, layout, count_workers(where), chunk_rows, moves)
    if passes is not None:
        chunk_rows, memory_limit, moves = passes.chunk_rows, None, ALL_ROWS
    elif chunk_rows is None:  # those that a run takes; what is compared may need others
        chunk_rows = choose_chunk_rows(inputs, layout)
    for how in {travel, *choices.get("travel", ())}:
        try:
            check_travel(parse_travel(how, link_rate, read_rate), where, passes)
        except ValueError as error:
            raise click.UsageError(str(error)) from error
    tokens = open_tokens(inputs.tokens, chunks=chunk_rows, name="tokens")
    routing, experts, topk = None, inputs.layer, None
    if inputs.layer is None:
        routing = open_tokens(inputs.routing, like=tokens, name="routing")
        experts, topk = inputs.experts, inputs.topk_weights
    common = {
        "topk_weights": topk,
        "memory_limit": memory_limit,
        "workers": processes or 1,
        "threads": 1 if processes else threads,
        "cores": CPU_COUNT,
        "read_bytes": inputs.read_bytes,
        "rates": None if rates is None else parse_rates(rates, link=link_rate, read=read_rate),
    }
    if gpu:
        of_gpus = {"gpu": True, "device_memory_limit": device_limit(where, devices)}
        common |= of_gpus | {"workers": len(devices) or None, "threads": None, "cores": None}
    if choices:
        combined = {"world_size": [size], "placement": [job.placement], "travel": [travel]}
        combined |= choices
        combined["placement"] = [_placement(named, job) for named in combined["placement"]]
        combined["travel"] = [parse_travel(how, link_rate, read_rate) for how in combined["travel"]]
        try:
            compared = what_if(tokens, routing, experts, **combined, **common)
        except PlanError as error:
            if not gpu:
                error.add_note(
                    "experts that do not fit can go by in passes: plan without --what-if prices it"
                )
            raise
        return compared if asked or "chunk_rows" in choices else _with_own_chunks(compared)
    common |= {"placement": _placement(job.placement, job), "travel": moves}
    one = plan(tokens, routing, experts, world_size=size, **common)
    if passes is not None:
        one = price_passes(one, passes, limit)
    compared = WhatIf((one,), one, "")
    return compared if asked else _with_own_chunks(compared)


def _placement(named: str | None, job: Job) -> str | Callable[[int], Placement] | None:
    """Give the name of a placement, or what reads its file for the job's layer."""
    if named is None or named in PLACEMENTS:
        return named
    return partial(read_placement, named, job)


def _with_own_chunks(compared: WhatIf) -> WhatIf:
    """The same plans, of chunks that a run chooses by itself."""
    plans = tuple(replace(one, chunks_asked=False) for one in compared.plans)
    return replace(compared, plans=plans, best=plans[compared.plans.index(compared.best)])


def _gpus(
    processes: int | None, threads: int | None, limit: int | None, device_limit: int | None
) -> tuple[Gpus, list[Device]]:
    """Where a run with --gpu runs, and the GPUs that are here; a plan needs none."""
    _refuse(
        processes or threads, "--gpu has one worker per GPU; --processes and --threads say nothing"
    )
    where = Gpus(device_limit, memory_limit=limit)
    try:
        return where, device.find_devices()
    except NoDeviceError:
        return where, []


def _refuse(given: Any, why: str) -> None:
    if given is not None:
        raise click.UsageError(why)


def parse_rates(text: str, **others: float | None) -> Rates:
    """Read ``--rates``; `others` go before what it says.

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
    unknown = [name for name in given if name not in RATES]
    if unknown or not {"flops", "copy"} <= given.keys():
        raise click.UsageError(
            f"--rates needs flops and copy, and takes {', '.join(RATES)}; got {text!r}"
        )
    if not all(0 < rate < math.inf for rate in given.values()):
        raise click.UsageError(f"rates must be finite numbers above 0; got {text!r}")
    return Rates(**given)


def parse_travel(how: str | None, link_rate: int | None, read_rate: int | None) -> Travel:
    """Read `travel_options`."""
    rates = {"link": link_rate, "read": read_rate}
    return Travel(how, **{name: rate for name, rate in rates.items() if rate is not None})


def parse_choices(choices: Sequence[str]) -> dict[str, list[Any]]:
    """Read ``name=value,value`` arguments.

    Examples
    --------
    >>> parse_choices(["world_size=2,4", "placement=contiguous,exact"])
    {'world_size': [2, 4], 'placement': ['contiguous', 'exact']}
    """
    readers = {
        "world_size": _whole_number,
        "chunk_rows": _whole_number,
        "placement": _placement_name,
        "travel": _travel_name,
    }
    parsed: dict[str, list[Any]] = {}
    for choice in choices:
        name, _, values = choice.partition("=")
        if name not in readers or not values:
            raise click.UsageError(
                f"a choice is one of {', '.join(readers)} with =value,...; got {choice!r}"
            )
        if name in parsed:
            raise click.UsageError(f"{name} is given twice; say {name}=value,value,...")
        try:
            parsed[name] = [readers[name](value) for value in values.split(",")]
        except ValueError as error:
            raise click.UsageError(f"{name} takes {error}; got {values!r}") from None
    return parsed


def _whole_number(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError("whole numbers of at least 1")
    return int(text)


def _placement_name(text: str) -> str:
    if text not in PLACEMENTS and not Path(text).is_file():
        raise ValueError(f"{', '.join(PLACEMENTS)}, or files of placements")
    return text


def _travel_name(text: str) -> str:
    if text not in TRAVELS:
        raise ValueError(", ".join(TRAVELS))
    return text


def json_text(compared: WhatIf, side_by_side: bool) -> str:
    """One plan, or all plans with the number of the best one."""
    if not side_by_side:
        return compared.best.to_json()
    content = {
        "best": compared.plans.index(compared.best),
        "why": compared.why,
        "plans": [p.to_dict() for p in compared.plans],
    }
    return json.dumps(content)


def choices_table(compared: WhatIf) -> Table:
    """Show plans side by side, the best one marked."""
    table = Table(title="what if")
    for name in ("", "ranks", "placement", "chunk rows", "imbalance", "memory", "moved", "tasks"):
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
            format_bytes(one.moved_bytes),
            str(one.tasks),
            f"{one.seconds:.2f} s",
            style="bold" if one is compared.best else "" if one.fits else "dim",
        )
    return table


def plan_tables(one: Plan) -> list[Any]:
    """Show one plan: its figures, its ranks, and what to change."""
    figures = Table(title="plan", show_header=False)
    figures.add_column()
    figures.add_column(justify="right")
    for name, value in figures_of(one):
        figures.add_row(name, value)
    advice = [f"advice: {said}" for said in one.advice]
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
