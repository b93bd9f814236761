"""How is all of this used from a shell?

    dask-ep example DIR   ->   plan JOB   ->   run JOB   ->   verify JOB        inspect PATH

Each command reads its options, calls the library and prints. Exit codes: 0 done, 1 failed or
stopped, 2 wrong use, 3 `verify` found a difference.
"""

from __future__ import annotations

import contextlib
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from typing import Any

import click
from dask.utils import format_bytes, format_time
from distributed import Client
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dask_ep import __version__
from dask_ep import example as examples
from dask_ep import run as runs
from dask_ep.cluster import Certificates, dashboard_link
from dask_ep.device import NoDeviceError
from dask_ep.gpus import PROTOCOLS, Gpus
from dask_ep.inspect_ import Finding, describe_output, inspect_path
from dask_ep.interrupts import Interrupts, Wait
from dask_ep.job import MISSING, PLACEMENTS, Job, JobError, load_job, parse_experts
from dask_ep.places import Cluster, Processes, Threads, Where
from dask_ep.plan_command import parse_size, parse_travel, plan_command, travel_options
from dask_ep.run_report import dask_report
from dask_ep.terminal import complain, one_line, progress_bar
from dask_ep.verify import Verification, verify_job

FAILED, WRONG_USE, DIFFERENT = 1, 2, 3

_MOST_WORST = 10  # rows named by verify


def main(arguments: list[str] | None = None) -> None:
    """Run the command; whatever goes wrong becomes one line and an exit code.

    Parameters
    ----------
    arguments : without the program's name; by default those of this process
    """
    settings: dict[str, Any] = {"debug": False}
    try:
        sys.exit(cli.main(arguments, "dask-ep", standalone_mode=False, obj=settings))
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        complain("stopped")
        sys.exit(FAILED)
    except (JobError, NoDeviceError) as error:
        complain(str(error))
        sys.exit(WRONG_USE)
    except Exception as error:
        if settings["debug"]:
            raise
        complain(one_line(error))
        sys.exit(FAILED)


class _Examples(click.Group):
    """A group whose help keeps the commands in the order of their use."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(self.commands)


@click.group(
    cls=_Examples,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 96},
)
@click.version_option(__version__, prog_name="dask-ep")
def cli() -> None:
    """Mixture-of-Experts layers over more token rows than memory holds.

    \b
    Example, from nothing to a checked output:
      dask-ep example demo
      dask-ep run demo/job.toml
      dask-ep verify demo/job.toml
    """


def _set_debug(context: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        context.find_root().obj["debug"] = True


debug_option = click.option(
    "--debug",
    is_flag=True,
    expose_value=False,
    callback=_set_debug,
    help="Show the whole traceback of an error.",
)


# --- example ---------------------------------------------------------------------------------


@click.command()
@click.argument("directory", type=click.Path(file_okay=False))
@click.option("--rows", type=click.IntRange(1), default=50_000, show_default=True, metavar="N")
@click.option(
    "--d", type=click.IntRange(1), default=256, show_default=True, help="Width of a token row."
)
@click.option(
    "--experts", "num_experts", type=click.IntRange(1), default=16, show_default=True, metavar="E"
)
@click.option(
    "--k",
    type=click.IntRange(1),
    default=2,
    show_default=True,
    help="Experts that each row goes to.",
)
@click.option("--kind", type=click.Choice(examples.KINDS), default="linear", show_default=True)
@click.option("--hidden", type=click.IntRange(1), help="Hidden width of gated experts; 2 d.")
@click.option("--chunk-rows", type=click.IntRange(1), help="Token rows stored together.")
@click.option("--format", type=click.Choice(examples.FORMATS), default="zarr", show_default=True)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--overwrite", is_flag=True, help="Replace an example that is there already.")
@debug_option
def example(directory: str, overwrite: bool, **sizes: Any) -> None:
    """Write a job and its data into DIRECTORY, to try things out.

    Token rows are words of real text (the sources of Python's standard library), so that some
    experts are far more popular than others, as they are in life. Any size works: data is written
    chunk by chunk.

    \b
    Example, 2 GB of tokens through SwiGLU experts:
      dask-ep example demo --rows 500000 --d 1024 --experts 64 --k 4 --kind gated
    """
    try:
        wanted = examples.Example(**sizes)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    with progress_bar("bytes") as tell:
        job = examples.write_example(
            directory,
            wanted,
            overwrite=overwrite,
            on_progress=lambda done, total, name: tell(done, total, f"writing {name}"),
        )
    click.echo(f"{job} and its data, {format_bytes(wanted.nbytes())}, are written. Now:")
    for command in ("plan", "run", "verify"):
        click.echo(f"  dask-ep {command} {shlex.quote(os.fspath(job))}")


# --- run -------------------------------------------------------------------------------------


def job_options(command: Callable) -> Callable:
    """Add an option for every key of a job."""
    options = [
        click.option(
            "--tokens", metavar="PATH", help="Token rows (n, d): .zarr, .npy, .safetensors::name."
        ),
        click.option("--routing", metavar="PATH", help="Expert indices (n,) or (n, k)."),
        click.option("--topk-weights", metavar="PATH", help="Weights of the slots (n, k)."),
        click.option(
            "--experts",
            metavar="PATH|TABLE",
            help="Linear experts (E, d, d_out), or "
            """'{kind = "gated", gate = "g.zarr", ...}'.""",
        ),
        click.option("--layer", metavar="DIR", help="A checkpoint, instead of routing, experts."),
        click.option("--layer-index", type=click.IntRange(0), help="Which layer of it."),
        click.option("--out", metavar="PATH", help="Output: .zarr, .npy or .safetensors."),
        click.option("--world-size", type=click.IntRange(1), help="Ranks; default: workers."),
        click.option(
            "--placement",
            metavar="NAME|FILE",
            help=f"{', '.join(PLACEMENTS)}, or a file of `plan --save`.",
        ),
        click.option(
            "--missing",
            type=click.Choice(MISSING),
            help="Zarr chunks that were never written: an error, or the fill value.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@click.command()
@click.argument("job", type=click.Path(dir_okay=False), required=False)
@job_options
@click.option("--threads", type=click.IntRange(1), help="Threads of this process; default: cores.")
@click.option("--processes", type=click.IntRange(1), help="Worker processes on this machine.")
@click.option("--gpu", is_flag=True, help="One worker per GPU, here or of the cluster.")
@click.option(
    "--protocol", type=click.Choice(PROTOCOLS), help="Between GPUs; default: ucx if there."
)
@click.option("--tf32", is_flag=True, help="Experts multiply float32 as TF32, with --gpu.")
@click.option(
    "--device-memory-limit",
    callback=parse_size,
    metavar="SIZE",
    help="Of each GPU; default: 90 % of it.",
)
@click.option("--scheduler", metavar="ADDRESS", help="Of a Dask cluster, tcp://host:8786.")
@click.option("--scheduler-file", type=click.Path(), help="That a Dask scheduler has written.")
@click.option("--tls-ca-file", type=click.Path(), help="Of a cluster with TLS: its authority, PEM.")
@click.option("--tls-cert", type=click.Path(), help="One's own certificate, PEM.")
@click.option("--tls-key", type=click.Path(), help="Its key, if not in the same file.")
@click.option(
    "--memory-limit",
    callback=parse_size,
    metavar="SIZE",
    help="For threads: of all in all. For processes: of each. Experts that do not fit go by in "
    "passes.",
)
@click.option(
    "--dashboard",
    type=click.IntRange(1, 65535),
    metavar="PORT",
    help="Serve Dask's dashboard there, with --processes.",
)
@click.option(
    "--report",
    type=click.Path(dir_okay=False),
    help="Write planned and measured side by side, HTML; with workers Dask's own report too.",
)
@click.option(
    "--chunk-rows",
    type=click.IntRange(1),
    help="Rows of a chunk; default: 32 MiB of them or fewer.",
)
@travel_options
@click.option("--resume", is_flag=True, help="Go on with what a stopped run has left.")
@click.option("--overwrite", is_flag=True, help="Start again, whatever is there.")
@debug_option
def run(job: str | None, experts: str | None, **options: Any) -> None:
    """Compute the output of JOB, a TOML file, and write it.

    Every key of a job is an option as well, which goes before what the file says; without a file,
    options make the job. Where it runs is no part of it: by default on all cores of this machine.
    --resume goes on with a run that was stopped, even by kill -9: it computes missing blocks alone.

    \b
    Examples:
      dask-ep run demo/job.toml
      dask-ep run demo/job.toml --processes 4 --memory-limit 2GiB --overwrite
      dask-ep run demo/job.toml --gpu --protocol ucx
      dask-ep run demo/job.toml --scheduler tcp://10.0.0.1:8786 --resume
      dask-ep run --tokens x.npy --routing r.npy --experts w.npy --out y.npy
      dask-ep run --layer checkpoint/ --layer-index 3 --tokens hidden.zarr --out out.zarr
    """
    keys = ("tokens", "routing", "topk_weights", "layer", "layer_index", "out")
    keys += ("world_size", "placement", "missing")
    if options["resume"] and options["overwrite"]:
        raise click.UsageError("--resume goes on and --overwrite starts again; give one of them")
    given = {key: options.pop(key) for key in keys}
    parsed = load_job(job, experts=None if experts is None else parse_experts(experts), **given)
    where = _choose_where(**{key: options.pop(key) for key in WHERE})
    options["travel"] = parse_travel(
        options["travel"], options.pop("link_rate"), options.pop("read_rate")
    )
    only_threads = isinstance(where, Threads) and where.memory_limit is None
    if options["travel"].how is not None and only_threads:
        raise click.UsageError(
            "threads share memory, and nothing travels; --travel needs workers or --memory-limit"
        )
    with _stoppable(parsed, options["overwrite"]) as wait, progress_bar("rows") as tell:

        def on_progress(how: runs.Progress) -> None:
            tell(how.rows_done + how.rows_before, how.rows_in_all, "", how)

        done = runs.run_job(
            parsed, where, on_progress=on_progress, on_client=_show_dashboard, wait=wait, **options
        )
    report = options["report"]
    before = f", {done.rows_before} were there" if done.rows_before else ""
    passes = f"; {done.passes}" if done.passes is not None else ""
    click.echo(
        f"{parsed.out}: {done.rows_done} rows in {format_time(done.seconds)}, "
        f"{done.rows_per_second:.0f} rows/s{before}{passes}"
    )
    if report and done.rows_done:
        beside = "" if isinstance(where, Threads) else f"; Dask's: {dask_report(report)}"
        click.echo(f"report: {report}{beside}")


def _show_dashboard(client: Client) -> None:
    if link := dashboard_link(client):
        click.echo(f"dashboard: {link}", err=True)


WHERE = ("threads", "processes", "scheduler", "scheduler_file", "memory_limit", "dashboard")
WHERE += ("tls_ca_file", "tls_cert", "tls_key", "gpu", "protocol", "tf32", "device_memory_limit")
"""The options of `run` that say where."""


def _choose_where(
    *,
    threads: int | None,
    processes: int | None,
    scheduler: str | None,
    scheduler_file: str | None,
    memory_limit: int | None,
    dashboard: int | None,
    tls_ca_file: str | None,
    tls_cert: str | None,
    tls_key: str | None,
    gpu: bool,
    **of_gpus: Any,
) -> Where:
    places = {
        "--threads": threads,
        "--processes": processes,
        "--scheduler": scheduler,
        "--scheduler-file": scheduler_file,
    }
    chosen = [name for name, value in places.items() if value is not None]
    if len(chosen) > 1:
        raise click.UsageError(f"a job runs in one place; give one of {' and '.join(chosen)}")
    if dashboard is not None and processes is None and not (gpu and not chosen):
        raise click.UsageError("--dashboard needs --processes or --gpu")
    on_cluster = scheduler is not None or scheduler_file is not None
    certificates = _read_certificates(on_cluster, tls_ca_file, tls_cert, tls_key)
    if on_cluster:
        if memory_limit is not None:
            raise click.UsageError("the memory of a cluster's workers is set where they start")
        _refuse(of_gpus, "is of the cluster's workers, and is set where they start")
        return Cluster(scheduler, scheduler_file, certificates, gpu)
    if gpu:
        if chosen:
            raise click.UsageError(f"--gpu has one worker per GPU, so {chosen[0]} says nothing")
        return Gpus(memory_limit=memory_limit, dashboard_port=dashboard, **of_gpus)
    _refuse(of_gpus, "needs --gpu")
    if processes is not None:
        return Processes(processes, memory_limit, dashboard)
    return Threads(threads, memory_limit)


def _refuse(options: dict[str, Any], why: str) -> None:
    for name, value in options.items():
        if value:
            raise click.UsageError(f"--{name.replace('_', '-')} {why}")


def _read_certificates(
    on_cluster: bool, ca_file: str | None, cert: str | None, key: str | None
) -> Certificates | None:
    if ca_file is None and cert is None and key is None:
        return None
    if not on_cluster or ca_file is None or cert is None:
        raise click.UsageError(
            "TLS needs --tls-ca-file and --tls-cert, and --scheduler or --scheduler-file"
        )
    return Certificates(ca_file, cert, key)


@contextlib.contextmanager
def _stoppable(job: Job, overwrite: bool) -> Iterator[Wait]:
    """Give a way to wait that the first SIGINT or SIGTERM ends; at the second all ends at once."""
    try:
        with Interrupts(FAILED) as interrupts:
            yield interrupts.wait
    except KeyboardInterrupt:
        state = describe_output(job.out)
        how = "--resume instead of --overwrite" if overwrite else "--resume"
        complain(f"stopped; {job.out} is {state}. Go on with the same command with {how}")
        raise click.exceptions.Exit(FAILED) from None


# --- verify and inspect ----------------------------------------------------------------------


def _check_tolerance(
    context: click.Context, parameter: click.Parameter, value: float | None
) -> float | None:
    if value is not None and not 0 <= value < math.inf:
        raise click.BadParameter(f"{value} must be a finite number of at least 0")
    return value


@click.command()
@click.argument("job", type=click.Path(dir_okay=False))
@click.option("--rows", type=click.IntRange(1), default=1000, show_default=True, help="To compare.")
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the choice of rows."
)
@click.option(
    "--tolerance",
    type=float,
    callback=_check_tolerance,
    help="Largest error over largest value; default: by dtype.",
)
@click.option("--out", metavar="PATH", help="The output to check, if not the job's.")
@debug_option
def verify(job: str, rows: int, seed: int, tolerance: float | None, out: str | None) -> int:
    """Compute a sample of rows of JOB's output again, in float64 and in plain loops, and compare.

    The sample has both ends of the blocks, as far as half of it goes, and rows at random; for given
    routing a row of every expert too. Of tokens and output only these rows are read. Exit code 3 if
    any is beyond the tolerance.

    \b
    Example:
      dask-ep verify demo/job.toml --rows 5000
    """
    found = verify_job(load_job(job, out=out), rows=rows, seed=seed, tolerance=tolerance)
    _print_verification(found)
    return 0 if found.good else DIFFERENT


def _print_verification(found: Verification) -> None:
    click.echo(
        f"{found.rows} of {found.rows_in_all} rows compared, "
        f"with {found.experts_seen} of {found.num_experts} experts"
    )
    click.echo(
        f"largest error {found.largest_error:.3g}, that is {found.relative_error:.3g} of the "
        f"largest value {found.largest_value:.3g}; {found.tolerance:.3g} is allowed"
    )
    if found.not_finite:
        click.echo(f"{found.not_finite} of {found.values} values are not finite")
    if found.good:
        click.echo("good")
        return
    if found.relative_error <= found.tolerance:
        click.echo("not good: nothing could be compared")
        return
    click.echo(f"{len(found.worst)} rows differ, the worst first:")
    for row in found.worst[:_MOST_WORST]:
        experts = ", ".join(map(str, row.experts))
        click.echo(f"  row {row.row} (block {row.block}, experts {experts}): {row.error:.3g}")


@click.command()
@click.argument("path")
@debug_option
def inspect(path: str) -> None:
    """Tell what PATH is: an array, a checkpoint, a job, or an output and how far it is.

    Of a routing: how many rows each expert gets, and how uneven that is.

    \b
    Examples:
      dask-ep inspect demo/job.toml
      dask-ep inspect demo/routing.zarr
      dask-ep inspect checkpoint/
      dask-ep inspect model-00001-of-00002.safetensors
    """
    for finding in inspect_path(path):
        _print_finding(path, finding)


def _print_finding(path: str, finding: Finding) -> None:
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"{path}: {finding.kind}", markup=False)
    facts = Table.grid(padding=(0, 2))
    for name, value in finding.facts:
        facts.add_row(escape(f"  {name}"), escape(value))
    console.print(facts)
    if finding.lines:
        table = Table(*finding.header)
        for line in finding.lines:
            table.add_row(*map(escape, line))
        console.print(table)


for command in (example, debug_option(plan_command), run, verify, inspect):
    cli.add_command(command)

if __name__ == "__main__":
    main()
