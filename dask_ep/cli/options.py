"""Which options do `plan` and `run` share, and what do they mean?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import click
from dask.utils import parse_bytes

from dask_ep.cluster.gpus import Gpus
from dask_ep.jobs.backends import Processes, Threads
from dask_ep.jobs.job import PLACEMENTS
from dask_ep.laws.travel import TRAVELS, Travel


def add_options(options: Sequence[Callable], command: Callable) -> Callable:
    """Add options to a command, which its help shows in their order."""
    for option in reversed(options):
        command = option(command)
    return command


def parse_size(context: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    """Read an option that is a number of bytes."""
    if value is None:
        return None
    with suppress(ValueError):
        if (size := parse_bytes(value)) > 0:
            return size
    raise click.BadParameter(f'invalid size: {value!r} (try "8 GiB")')


SIZE: dict[str, Any] = {"callback": parse_size, "metavar": "SIZE"}


def ranks_options(command: Callable) -> Callable:
    """Add the number of ranks and the placement of experts, which are job keys too."""
    named = f"{', '.join(PLACEMENTS)}, or a file written by `plan --save`."
    options = [
        click.option(
            "--world-size", type=click.IntRange(1), help="Number of ranks; default: one per worker."
        ),
        click.option("--placement", metavar="NAME|FILE", help=named),
    ]
    return add_options(options, command)


def local_options(command: Callable) -> Callable:
    """Add the options for running on this machine, which `choose_local` reads."""
    options = [
        click.option(
            "--threads", type=click.IntRange(1), help="Threads of this process; default: all cores."
        ),
        click.option(
            "--processes", type=click.IntRange(1), help="Worker processes on this machine."
        ),
        click.option(
            "--gpu",
            is_flag=True,
            help="One worker per GPU, here or on the cluster; a plan without GPUs assumes one per "
            "rank.",
        ),
        click.option(
            "--device-memory-limit",
            help="Memory limit of each GPU; default: 90 % of its memory.",
            **SIZE,
        ),
        click.option(
            "--memory-limit",
            help="Memory limit of the process (threads) or of each worker process. Experts that "
            "do not fit are processed in passes.",
            **SIZE,
        ),
    ]
    return add_options(options, command)


def chunks_options(command: Callable) -> Callable:
    """Add the rows of a chunk and what travels, which `parse_travel` reads."""
    options = [
        click.option(
            "--chunk-rows",
            type=click.IntRange(1),
            help="Rows per chunk; default: at most 32 MiB of rows.",
        ),
        click.option(
            "--travel",
            type=click.Choice(TRAVELS),
            help="What is sent: rows to experts, experts to rows, or whichever is cheaper (auto). "
            "Default: rows; auto where experts do not fit.",
        ),
        click.option(
            "--link-rate", help="Bytes per second between workers; default: 500 MB.", **SIZE
        ),
        click.option(
            "--read-rate", help="Bytes per second that a worker reads; default: 1 GB.", **SIZE
        ),
    ]
    return add_options(options, command)


def choose_local(
    *,
    threads: int | None,
    processes: int | None,
    gpu: bool,
    memory_limit: int | None,
    dashboard: int | None = None,
    **of_gpus: Any,
) -> Threads | Processes | Gpus:
    """Read `local_options`: where on this machine a job runs."""
    given = {"--threads": threads, "--processes": processes}
    chosen = [name for name, value in given.items() if value is not None]
    if len(chosen) > 1:
        raise click.UsageError(f"{' and '.join(chosen)} are mutually exclusive")
    if gpu:
        if chosen:
            raise click.UsageError(f"{chosen[0]} has no effect with --gpu, one worker per GPU")
        return Gpus(memory_limit=memory_limit, dashboard_port=dashboard, **of_gpus)
    refuse(of_gpus, "needs --gpu")
    if processes is not None:
        return Processes(processes, memory_limit, dashboard)
    return Threads(threads, memory_limit)


def refuse(options: dict[str, Any], why: str) -> None:
    """Refuse options that were given."""
    for name, value in options.items():
        if value:
            raise click.UsageError(f"--{name.replace('_', '-')} {why}")


def parse_travel(how: str | None, link_rate: int | None, read_rate: int | None) -> Travel:
    """Read the travel options of `chunks_options`."""
    rates = {"link": link_rate, "read": read_rate}
    return Travel(how, **{name: rate for name, rate in rates.items() if rate is not None})
