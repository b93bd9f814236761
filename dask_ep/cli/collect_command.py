"""How are statistics of experts collected on the command line?

dask-ep collect job.toml --what usage,reap --out stats.safetensors
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import click
from dask.utils import format_bytes

from dask_ep.cli.command import debug_option
from dask_ep.cli.options import add_options, input_options, read_job
from dask_ep.cli.run_command import (
    WHERE,
    choose_where,
    show_dashboard,
    show_workers,
    stoppable,
    where_options,
)
from dask_ep.cli.terminal import hint_at_faster_blas, progress_bar
from dask_ep.jobs.backends import Processes, Threads
from dask_ep.jobs.collect_decide import Course
from dask_ep.jobs.collect_job import FEW_ROWS, Collected, Wanted, collect_job
from dask_ep.layers.collect import WHAT

_MOST_FEW = 20  # experts named


def _parse_what(context: click.Context, parameter: click.Parameter, value: str) -> tuple[str, ...]:
    names = tuple(name for name in value.replace(",", " ").split() if name)
    for name in names:
        if name not in WHAT:
            raise click.BadParameter(f"{name!r} is not one of {', '.join(WHAT)}")
    if not names:
        raise click.BadParameter(f"name at least one of {', '.join(WHAT)}")
    return names


def _parse_rows(context: click.Context, parameter: click.Parameter, value: str) -> str | float:
    if value in ("routed", "all"):
        return value
    try:
        share = float(value)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise click.BadParameter(f"{value!r} is not routed, all, or a share such as 0.1")
    return share


def _collect_options(command: Callable) -> Callable:
    options = [
        click.option(
            "--what",
            required=True,
            metavar="NAMES",
            callback=_parse_what,
            help=f"What to collect, separated by commas: {', '.join(WHAT)}.",
        ),
        click.option(
            "--out", required=True, metavar="PATH", help="Statistics: .safetensors or .zarr."
        ),
        click.option(
            "--rows",
            default="routed",
            show_default=True,
            callback=_parse_rows,
            metavar="ROWS",
            help="Rows that go through each expert: routed, all, or a share of those not routed, "
            "such as 0.1.",
        ),
        click.option(
            "--seed", type=click.IntRange(0), default=0, show_default=True, help="Of that share."
        ),
        click.option(
            "--with-output", is_flag=True, help="Write the job's output in the same pass."
        ),
        click.option(
            "--few-rows",
            type=click.IntRange(0),
            default=FEW_ROWS,
            show_default=True,
            help="Name the experts that see fewer rows.",
        ),
        click.option(
            "--chunk-rows", type=click.IntRange(1), help="Rows per chunk; default: as for run."
        ),
        click.option("--resume", is_flag=True, help="Continue a stopped run."),
        click.option("--overwrite", is_flag=True, help="Replace existing statistics."),
        debug_option,
    ]
    return add_options(options, command)


@click.command("collect")
@input_options
@where_options
@_collect_options
def collect_command(**options: Any) -> None:
    """Collect statistics of JOB's experts over the rows routed to them.

    One pass over the rows for all that is asked for, and one more for each block of experts where
    not all fit into memory; gram takes passes of its own. --resume continues a run that was
    stopped. With --with-output the job's output is written too.

    \b
    Examples:
      dask-ep collect demo/job.toml --what usage,coactivation,reap --out stats.safetensors
      dask-ep collect demo/job.toml --what amax,sumsq --rows 0.1 --out stats.safetensors
      dask-ep collect demo/job.toml --what gram --memory-limit 2GiB --out gram.zarr
    """
    where = choose_where(**{key: options.pop(key) for key in WHERE})
    if options["resume"] and options["overwrite"]:
        raise click.UsageError("--resume and --overwrite are mutually exclusive")
    asked = Wanted(*(options.pop(name) for name in _WANTED))
    path = options.pop("job")
    if asked.with_output and path is None:
        raise click.UsageError("--with-output needs a job file, which says where its output goes")
    options["out"] = None if asked.with_output else asked.out
    job = read_job(path, options)
    if isinstance(where, Threads | Processes):
        hint_at_faster_blas()
    record = os.path.join(f"{os.path.realpath(asked.out)}.progress", "groups-0.zarr")
    with (
        stoppable(asked.out, options["overwrite"], record) as wait,
        progress_bar("rows") as tell,
    ):
        found = collect_job(
            job,
            asked,
            where,
            on_progress=lambda done, total: tell(done, total, ""),
            on_course=_show_course,
            on_client=show_dashboard,
            on_workers=show_workers,
            wait=wait,
            **options,
        )
    _show_collected(asked, found)


_WANTED = ("what", "out", "rows", "seed", "with_output", "few_rows")


def _show_course(course: Course) -> None:
    passes = f"{len(course.blocks)} pass{'es' * (len(course.blocks) > 1)} over the rows"
    if course.gram_blocks:
        passes += f", {len(course.gram_blocks)} more for gram"
    click.echo(
        f"{passes}, in chunks of {course.chunk_rows} rows; up to "
        f"{format_bytes(course.memory_bytes)} of memory",
        err=True,
    )


def _show_collected(asked: Wanted, found: Collected) -> None:
    click.echo(f"{asked.out}: {', '.join(asked.what)} of {found.rows} rows")
    if found.missing:
        click.echo(f"these experts have no hidden activations: without {', '.join(found.missing)}")
    few = sorted(found.coverage.items(), key=lambda item: (item[1], item[0]))
    seen = f"of {found.num_experts} experts saw"
    if not few:
        click.echo(f"coverage: {found.num_experts} {seen} {asked.few_rows} rows or more")
        return
    words = ", ".join(f"{e} ({rows})" for e, rows in few[:_MOST_FEW])
    more = f" and {len(few) - _MOST_FEW} more" if len(few) > _MOST_FEW else ""
    click.echo(f"coverage: {len(few)} {seen} fewer than {asked.few_rows} rows: {words}{more}")
