"""How are statistics of experts collected on the command line?"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import click
from dask.utils import format_bytes

from dask_ep.cli.command import debug_option
from dask_ep.cli.options import (
    grouped,
    input_options,
    parse_what,
    read_job,
    read_wanted,
    wanted_options,
)
from dask_ep.cli.run_command import (
    choose_where,
    report_option,
    resume_options,
    show_dashboard,
    show_reports,
    show_workers,
    stoppable,
    where_options,
)
from dask_ep.cli.terminal import hint_at_faster_blas, progress_bar
from dask_ep.jobs.backends import Processes, Threads
from dask_ep.jobs.collect_job import FEW_ROWS, Collected, collect_job
from dask_ep.laws.decision import Course
from dask_ep.layers.collect import WHAT

_MOST_FEW = 20  # experts that are named


_collect_options = grouped(
    click.option(
        "--what",
        required=True,
        metavar="NAMES",
        callback=parse_what,
        help=f"What to collect, separated by commas: {', '.join(WHAT)}.",
    ),
    click.option("--out", required=True, metavar="PATH", help="Statistics: .safetensors or .zarr."),
    wanted_options,
    click.option(
        "--few-rows",
        type=click.IntRange(0),
        default=FEW_ROWS,
        show_default=True,
        help="List the experts that see fewer rows than this.",
    ),
    click.option(
        "--chunk-rows", type=click.IntRange(1), help="Rows per chunk; default: as in run."
    ),
    report_option,
    resume_options,
    debug_option,
)


@click.command("collect")
@input_options
@where_options
@_collect_options
def collect_command(**options: Any) -> None:
    """Collect statistics of JOB's experts over the rows routed to them.

    This takes one pass over the rows, or one for each block of experts if they do not all fit into
    memory; gram takes separate passes. --resume continues a run that was stopped. With
    --with-output the job's output is written too.

    \b
    Examples:
      dask-ep collect demo/job.toml --what usage,coactivation,reap --out stats.safetensors
      dask-ep collect demo/job.toml --what amax,sumsq --rows 0.1 --out stats.safetensors
      dask-ep collect demo/job.toml --what gram --memory-limit 2GiB --out gram.zarr
    """
    where = choose_where(options)
    if options["resume"] and options["overwrite"]:
        raise click.UsageError("--resume and --overwrite are mutually exclusive")
    wanted, path, out = read_wanted(options), options.pop("job"), options["out"]
    if wanted.with_output and path is None:
        raise click.UsageError("--with-output needs a job file, which has the path of its output")
    options["out"] = None if wanted.with_output else out
    job = read_job(path, options)
    if isinstance(where, Threads | Processes):
        hint_at_faster_blas()
    record = os.path.join(f"{os.path.realpath(out)}.progress", "groups-0.zarr")
    with (
        stoppable(out, options["overwrite"], record) as wait,
        progress_bar("rows") as tell,
    ):
        found = collect_job(
            job,
            wanted,
            out,
            where,
            on_progress=lambda done, total: tell(done, total, ""),
            on_course=_show_course,
            on_client=show_dashboard,
            on_workers=show_workers,
            wait=wait,
            **options,
        )
    _show_collected(out, wanted.what, options["few_rows"], found)
    if options["report"]:
        show_reports(found.reports)


def _show_course(course: Course) -> None:
    rows, most = course.decision.chunk_rows, format_bytes(course.memory_bytes)
    click.echo(f"{course}, in chunks of {rows} rows; up to {most} of memory", err=True)


def _show_collected(out: str, what: Sequence[str], least: int, found: Collected) -> None:
    click.echo(f"{out}: {', '.join(what)} of {found.rows} rows")
    if found.missing:
        click.echo(
            f"left out: {', '.join(found.missing)}; these experts have no hidden activations"
        )
    if found.coverage is None:
        return
    few = sorted(found.coverage.items(), key=lambda item: (item[1], item[0]))
    seen = f"of {found.num_experts} experts saw"
    if not few:
        click.echo(f"coverage: {found.num_experts} {seen} {least} rows or more")
        return
    words = ", ".join(f"{e} ({rows})" for e, rows in few[:_MOST_FEW])
    more = f" and {len(few) - _MOST_FEW} more" if len(few) > _MOST_FEW else ""
    click.echo(f"coverage: {len(few)} {seen} fewer than {least} rows: {words}{more}")
