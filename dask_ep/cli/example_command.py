"""How is an example made on the command line?"""

from __future__ import annotations

import os
import shlex
from typing import Any

import click
from dask.utils import format_bytes

from dask_ep.cli.command import debug_option
from dask_ep.cli.terminal import progress_bar
from dask_ep.jobs import example as examples


@click.command("example")
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
    help="Experts per row.",
)
@click.option(
    "--kind", type=click.Choice(examples.EXAMPLE_KINDS), default="linear", show_default=True
)
@click.option(
    "--hidden", type=click.IntRange(1), help="Hidden width of gated experts; default: 2 d."
)
@click.option("--chunk-rows", type=click.IntRange(1), help="Token rows per stored chunk.")
@click.option("--format", type=click.Choice(examples.FORMATS), default="zarr", show_default=True)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--overwrite", is_flag=True, help="Replace an existing example.")
@debug_option
def example_command(directory: str, overwrite: bool, **sizes: Any) -> None:
    """Write a job and its data into DIRECTORY, to try things out.

    Token rows are words of real text (the sources of Python's standard library), so that some
    experts are far more popular than others, as in real models. Any size works: data is written
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
    click.echo(f"wrote {job} and its data, {format_bytes(wanted.nbytes())}. Next:")
    for command in ("plan", "run", "verify"):
        click.echo(f"  dask-ep {command} {shlex.quote(os.fspath(job))}")
