"""How is a run started and reported on the command line?"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from dask.utils import format_time
from distributed import Client

from dask_ep.cli.command import FAILED, complain, debug_option, echo_note
from dask_ep.cli.options import (
    choose_local,
    chunks_options,
    grouped,
    job_options,
    local_options,
    parse_travel,
    read_job,
    refuse,
)
from dask_ep.cli.terminal import hint_at_faster_blas, progress_bar
from dask_ep.cluster.checks import Certificates, dashboard_link
from dask_ep.cluster.gpus import PROTOCOLS
from dask_ep.cluster.interrupts import Interrupts, Wait
from dask_ep.cluster.workers import Workers
from dask_ep.errors import JobError
from dask_ep.jobs.backends import Cluster, Processes, Threads, Where
from dask_ep.jobs.inspect import describe_output, words_of_usage
from dask_ep.jobs.job import Job, load_job
from dask_ep.jobs.result import Progress, RunResult
from dask_ep.jobs.run import run_job
from dask_ep.jobs.save_routing import path_of_weights
from dask_ep.storage.files import write_text

report_option = click.option(
    "--report",
    type=click.Path(dir_okay=False),
    help="Write an HTML report that compares plan and run; with workers, also Dask's own report.",
)

resume_options = grouped(
    click.option("--resume", is_flag=True, help="Continue a stopped run."),
    click.option("--overwrite", is_flag=True, help="Replace an existing output."),
)


how_options = grouped(
    report_option,
    click.option(
        "--save-routing",
        metavar="PATH",
        help="Also write the layer's routing here, and its top-k weights next to it.",
    ),
    chunks_options,
    click.option(
        "--save-job",
        type=click.Path(dir_okay=False),
        help="Write the job to this file first, for `plan`, `verify` and --resume.",
    ),
    resume_options,
    debug_option,
)
"""The options for how a job is run, on any backend."""


tls_options = grouped(
    click.option(
        "--tls-ca-file", type=click.Path(), help="CA certificate of a cluster with TLS (PEM)."
    ),
    click.option("--tls-cert", type=click.Path(), help="Client certificate (PEM)."),
    click.option(
        "--tls-key",
        type=click.Path(),
        help="Key of the client certificate, if in another file.",
    ),
)
"""The certificates of a cluster with TLS, which `read_certificates` reads."""


where_options = grouped(
    local_options,
    click.option(
        "--protocol",
        type=click.Choice(PROTOCOLS),
        help="Protocol between GPUs; default: ucx if installed.",
    ),
    click.option("--tf32", is_flag=True, help="Multiply float32 as TF32 in experts (with --gpu)."),
    click.option(
        "--scheduler", metavar="ADDRESS", help="Address of a Dask scheduler, tcp://host:8786."
    ),
    click.option(
        "--scheduler-file",
        type=click.Path(),
        help="File written by dask scheduler --scheduler-file.",
    ),
    click.option(
        "--workers",
        type=click.IntRange(1),
        help="Wait for this many workers of the cluster; default: those running now.",
    ),
    tls_options,
    click.option(
        "--dashboard",
        type=click.IntRange(1, 65535),
        metavar="PORT",
        help="Serve Dask's dashboard on this port (with --processes or --gpu).",
    ),
)
"""The options for where a job is run, which `choose_where` reads."""


@click.command("run")
@job_options
@where_options
@how_options
def run_command(**options: Any) -> None:
    """Compute the output of JOB, a TOML file, and write it.

    Every job key is an option too, and overrides the file; without a file, options define the job.
    Where it runs is not part of the job; the default is all cores of this machine. --resume
    continues a run that was stopped, even by kill -9, and computes only the missing blocks; inputs
    must have the same sizes, times of change and samples of their bytes as then.

    \b
    Examples:
      dask-ep run demo/job.toml
      dask-ep run demo/job.toml --processes 4 --memory-limit 2GiB --overwrite
      dask-ep run demo/job.toml --gpu --protocol ucx
      dask-ep run demo/job.toml --scheduler tcp://10.0.0.1:8786 --workers 8
      dask-ep run --tokens x.npy --routing r.npy --experts w.npy --out y.npy
      dask-ep run --layer checkpoint/ --layer-index 3 --tokens hidden.zarr --out out.zarr \\
          --save-job job.toml
    """
    where = choose_where(options)
    carry_out(where, **options)


def carry_out(where: Where, job: str | None, save_job: str | None, **options: Any) -> None:
    """Run a job according to `job_options` and `how_options`, and report its progress.

    Parameters
    ----------
    where : the backend; another command may start one, as a `dask_ep.jobs.backends.Deployed`
    job : path of the job file; None if options define the job
    save_job : path to write the job to, with its options, before it runs
    **options : values of the other options

    Raises
    ------
    click.exceptions.Exit
        If Ctrl-C or SIGTERM stopped it; a message has been printed.
    Exception
        As in `dask_ep.jobs.run.run_job`; `dask_ep.cli.main.main` prints it in one line.
    """
    if options["resume"] and options["overwrite"]:
        raise click.UsageError("--resume and --overwrite are mutually exclusive")
    parsed = read_job(job, options)
    options["travel"] = parse_travel(
        options["travel"], options.pop("link_rate"), options.pop("read_rate")
    )
    if save_job is not None:
        write_job(parsed, save_job, options["overwrite"])
    if isinstance(where, Threads | Processes):
        hint_at_faster_blas()
    with stoppable(parsed.out, options["overwrite"]) as wait, progress_bar("rows") as tell:

        def on_progress(how: Progress) -> None:
            tell(how.rows_done + how.rows_before, how.rows_in_all, "", how)

        done = run_job(
            parsed,
            where,
            on_note=echo_note,
            on_progress=on_progress,
            on_client=show_dashboard,
            on_workers=show_workers,
            wait=wait,
            **options,
        )
    _show_result(done)
    if done.rows_done and (routing := options["save_routing"] or parsed.routing):
        click.echo(f"experts: {words_of_usage(routing, done.decision.work.experts)}")
    if routing := options["save_routing"]:
        click.echo(f"routing: {routing}; top-k weights: {path_of_weights(routing)}")
    if options["report"]:
        show_reports(done.reports)


def write_job(job: Job, path: str, overwrite: bool) -> None:
    """Write a job to a file, which must not exist, unless it has this job.

    Another job is replaced with `overwrite`, a file that is no job never.
    """
    if os.path.exists(path):
        try:
            there = load_job(path)
        except JobError as error:
            raise click.UsageError(f"--save-job replaces only jobs, but {error}") from error
        if replace(there, name=job.name) != job and not overwrite:
            raise click.UsageError(
                f"--save-job {path} exists, and has another job; --overwrite replaces it, or "
                "choose another file"
            )
    write_text(path, job.to_toml(Path(path).parent))
    click.echo(f"job: {path}", err=True)


def show_reports(reports: Sequence[Path]) -> None:
    """Print which of the requested reports were written."""
    if reports:
        click.echo(f"report: {'; by Dask: '.join(map(str, reports))}")
    else:
        click.echo(
            "report: not written, since nothing was left to compute; "
            "use --overwrite to run the job again"
        )


def _show_result(done: RunResult) -> None:
    if done.not_finite:
        click.echo(
            f"{done.not_finite} of the {done.rows_done} rows computed hold NaN or infinity, the "
            f"first is row {done.first_not_finite}"
        )
    if done.rows_before and not done.rows_done:
        click.echo(f"{done.out}: complete, nothing was left to compute")
        return
    before = f", {done.rows_before} were done before" if done.rows_before else ""
    passes = f"; {done.passes}" if done.passes is not None else ""
    library = f"; products by {done.multiplied_by}" if done.multiplied_by else ""
    click.echo(
        f"{done.out}: {done.rows_done} rows in {format_time(done.seconds)}, "
        f"{done.rows_per_second:.0f} rows/s{before}{passes}{library}"
    )


def show_dashboard(client: Client) -> None:
    if link := dashboard_link(client):
        click.echo(f"dashboard: {link}", err=True)


def show_workers(count: Workers) -> None:
    click.echo(f"workers: {count}", err=True)


TLS = ("tls_ca_file", "tls_cert", "tls_key")
OF_CLUSTER = ("scheduler", "scheduler_file", "workers")
OF_MACHINE = ("threads", "processes", "memory_limit", "dashboard")
OF_GPUS = ("protocol", "tf32", "device_memory_limit")


def choose_where(options: dict[str, Any]) -> Where:
    """Remove the values of `where_options` from the options, and choose where a job runs."""
    certificates = read_certificates(*(options.pop(key) for key in TLS))
    scheduler, scheduler_file, workers = (options.pop(key) for key in OF_CLUSTER)
    local, of_gpus = ({key: options.pop(key) for key in keys} for keys in (OF_MACHINE, OF_GPUS))
    gpu = options.pop("gpu")
    if scheduler is None and scheduler_file is None:
        refuse({"workers": workers}, "needs --scheduler or --scheduler-file")
        if certificates is not None:
            raise click.UsageError("TLS needs --scheduler or --scheduler-file")
        if local["dashboard"] is not None and local["processes"] is None and not gpu:
            raise click.UsageError("--dashboard needs --processes or --gpu")
        return choose_local(gpu=gpu, **local, **of_gpus)
    if scheduler is not None and scheduler_file is not None:
        raise click.UsageError("--scheduler and --scheduler-file are mutually exclusive")
    refuse(local | of_gpus, "has no effect on a cluster: set it where the workers start")
    return Cluster(scheduler, scheduler_file, certificates, gpu, workers)


def read_certificates(
    ca_file: str | None, cert: str | None, key: str | None
) -> Certificates | None:
    """Read the values of `tls_options`; None if none was given."""
    if ca_file is None and cert is None and key is None:
        return None
    if ca_file is None or cert is None:
        raise click.UsageError("TLS needs --tls-ca-file and --tls-cert")
    return Certificates(ca_file, cert, key)


@contextlib.contextmanager
def stoppable(out: str, overwrite: bool, record: str | None = None) -> Iterator[Wait]:
    """Yield a function that waits until SIGINT or SIGTERM; a second one ends the process at once.

    `record` is the output whose record has the progress of the one at `out`, if that has none.
    """
    try:
        with Interrupts(FAILED) as interrupts:
            yield interrupts.wait
    except KeyboardInterrupt:
        state = describe_output(record or out)
        how = "--resume instead of --overwrite" if overwrite else "--resume"
        complain(f"stopped; {out} is {state}. To continue: the same command with {how}")
        raise click.exceptions.Exit(FAILED) from None
