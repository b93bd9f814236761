"""Which options do commands share, and what do they mean?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import click

from dask_ep.arrays.checks import size_in_bytes
from dask_ep.cluster.gpus import Gpus
from dask_ep.jobs.backends import Processes, Threads
from dask_ep.jobs.job import (
    JOB_KEYS,
    MISSING,
    PRECISIONS,
    Job,
    load_job,
    parse_experts,
)
from dask_ep.laws.travel import TRAVELS, Travel
from dask_ep.layers.collect import WHAT, Wanted
from dask_ep.placement.policies import POLICIES


def grouped(*options: Callable) -> Callable[[Callable], Callable]:
    """Combine options into one decorator; a command's help shows them in this order."""

    def add(command: Callable) -> Callable:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def parse_size(context: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    """Read an option that is a number of bytes."""
    try:
        return size_in_bytes(value)
    except ValueError as error:
        raise click.BadParameter(str(error).removeprefix("size: ")) from None


SIZE: dict[str, Any] = {"callback": parse_size, "metavar": "SIZE"}


input_options = grouped(
    click.argument("job", type=click.Path(), required=False),
    click.option(
        "--tokens", metavar="PATH", help="Token rows (n, d): .zarr, .npy, .safetensors::name."
    ),
    click.option(
        "--routing",
        metavar="PATH",
        help="Expert indices (n,) or (n, k); with --layer, instead of its router's.",
    ),
    click.option("--topk-weights", metavar="PATH", help="Weights of the slots (n, k)."),
    click.option(
        "--experts",
        metavar="PATH|TABLE",
        help="Linear experts (E, d, d_out), or "
        """'{kind = "gated", gate = "g.zarr", ...}'.""",
    ),
    click.option(
        "--layer", metavar="DIR", help="A checkpoint directory, instead of experts and routing."
    ),
    click.option("--layer-index", type=click.IntRange(0), help="Layer of the checkpoint."),
    click.option(
        "--token-ids",
        metavar="PATH",
        help="Token ids (n,), for a layer that looks experts up by token.",
    ),
    click.option(
        "--world-size", type=click.IntRange(1), help="Number of ranks; default: one per worker."
    ),
    click.option(
        "--placement",
        metavar="NAME|FILE",
        help=f"{', '.join(POLICIES)}, or a file written by `plan --save`.",
    ),
    click.option(
        "--precision",
        type=click.Choice(PRECISIONS),
        help="For bfloat16 experts on CPUs with fast 16-bit products: as accurate as float32 "
        "(default), or faster, rounded to bfloat16 between products.",
    ),
    click.option(
        "--missing",
        type=click.Choice(MISSING),
        help="Zarr chunks that were never written are an error (default) or hold the fill value.",
    ),
)
"""The job file, and an option for every key of a job except its `out`."""

job_options = grouped(
    input_options,
    click.option("--out", metavar="PATH", help="Output: .zarr, .npy or .safetensors."),
)
"""The job file, and an option for every key of a job, which `read_job` reads."""


def parse_what(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> tuple[str, ...]:
    """Read an option that names statistics; empty if it is not given."""
    names = tuple((value or "").replace(",", " ").split())
    for name in names:
        if name not in WHAT:
            raise click.BadParameter(f"{name!r} is not one of {', '.join(WHAT)}")
    if not names and value is not None:
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


wanted_options = grouped(
    click.option(
        "--rows",
        default="routed",
        show_default=True,
        callback=_parse_rows,
        metavar="ROWS",
        help="Rows that go through each expert for statistics: routed, all, or a share of "
        "those not routed, such as 0.1.",
    ),
    click.option(
        "--seed",
        type=click.IntRange(0),
        default=0,
        show_default=True,
        help="Seed of that share.",
    ),
    click.option(
        "--with-output",
        is_flag=True,
        help="Write the job's output in the same pass as its statistics.",
    ),
)
"""The options for how statistics are collected, which `read_wanted` reads."""


def read_wanted(options: dict[str, Any]) -> Wanted:
    """Remove the values of ``--what`` and `wanted_options` from the options, and parse them."""
    return Wanted(*(options.pop(field.name) for field in fields(Wanted)))


def read_job(path: str | None, options: dict[str, Any]) -> Job:
    """Remove the values of `job_options` from the options, and make a job from them."""
    given = {key: options.pop(key) for key in JOB_KEYS}
    experts = given.pop("experts")
    return load_job(path, experts=None if experts is None else parse_experts(experts), **given)


local_options = grouped(
    click.option(
        "--threads", type=click.IntRange(1), help="Threads of this process; default: all cores."
    ),
    click.option("--processes", type=click.IntRange(1), help="Worker processes on this machine."),
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
)
"""The options for running on this machine, which `choose_local` reads."""


chunks_options = grouped(
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
    click.option("--link-rate", help="Bytes per second between workers; default: 500 MB.", **SIZE),
    click.option(
        "--read-rate", help="Bytes per second that a worker reads; default: 1 GB.", **SIZE
    ),
)
"""The options for the rows of a chunk and for what travels, which `parse_travel` reads."""


def choose_local(
    *,
    threads: int | None,
    processes: int | None,
    gpu: bool,
    memory_limit: int | None,
    dashboard: int | None = None,
    **of_gpus: Any,
) -> Threads | Processes | Gpus:
    """Read `local_options`, for where on this machine a job runs."""
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
    """Raise a usage error if any of these options was given."""
    for name, value in options.items():
        if value:
            raise click.UsageError(f"--{name.replace('_', '-')} {why}")


def parse_travel(how: str | None, link_rate: int | None, read_rate: int | None) -> Travel:
    """Read the travel options of `chunks_options`."""
    rates = {"link": link_rate, "read": read_rate}
    return Travel(how, **{name: rate for name, rate in rates.items() if rate is not None})
