"""How is an output checked on the command line?"""

from __future__ import annotations

import math
from typing import Any

import click

from dask_ep.cli.command import DIFFERENT, debug_option
from dask_ep.cli.options import job_options, read_job
from dask_ep.jobs.verify import Verification, verify_job

_MOST_WORST = 10  # rows that are listed


def _check_tolerance(
    context: click.Context, parameter: click.Parameter, value: float | None
) -> float | None:
    if value is not None and not 0 <= value < math.inf:
        raise click.BadParameter(f"{value} must be a finite number of at least 0")
    return value


@click.command("verify")
@job_options
@click.option(
    "--rows", type=click.IntRange(1), default=1000, show_default=True, help="Rows to compare."
)
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of the sample."
)
@click.option(
    "--tolerance",
    type=float,
    callback=_check_tolerance,
    help="Largest error of a value, relative to the sum of its terms' sizes; the default depends "
    "on the dtype.",
)
@debug_option
def verify_command(
    job: str | None, rows: int, seed: int, tolerance: float | None, **options: Any
) -> int:
    """Recompute a sample of JOB's output in plain loops, and compare.

    The sample, computed in float64, consists of the first and last rows of blocks (at most half of
    it), of random rows and, if the routing is given, of a row of every expert. Only these rows of
    tokens and output are read. Exit code 3 if any row is beyond the tolerance.

    \b
    Examples:
      dask-ep verify demo/job.toml --rows 5000
      dask-ep verify --layer checkpoint/ --layer-index 3 --tokens hidden.zarr --out out.zarr
    """
    found = verify_job(read_job(job, options), rows=rows, seed=seed, tolerance=tolerance)
    _print_verification(found)
    return 0 if found.good else DIFFERENT


def _print_verification(found: Verification) -> None:
    click.echo(
        f"{found.rows} of {found.rows_in_all} rows compared, "
        f"with {found.experts_seen} of {found.num_experts} experts"
    )
    click.echo(
        f"largest error {found.relative_error:.3g}, relative to the terms of a value; "
        f"the tolerance is {found.tolerance:.3g}"
    )
    if found.not_finite:
        rows = found.not_finite_rows
        words = (
            f"{found.not_finite} of {found.values} values are infinite or NaN ({len(rows)} rows, "
            f"the first is row {rows[0]})"
        )
        if found.overflowed:
            words += f"; {found.overflowed} of them because intermediate values are too large"
        elif found.good:
            words += ", both in the output and in the recomputed rows"
        click.echo(words)
    if found.good:
        click.echo("good")
        return
    if found.relative_error <= found.tolerance:
        click.echo("not good: no value could be compared")
        return
    click.echo(f"{len(found.worst)} rows differ, the worst first:")
    for row in found.worst[:_MOST_WORST]:
        experts = ", ".join(map(str, row.experts))
        click.echo(
            f"  row {row.row} (block {row.block}, experts {experts}): off by {row.error:.3g}, "
            f"{row.relative:.3g} of its terms"
        )
