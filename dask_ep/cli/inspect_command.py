"""How is a path inspected on the command line?"""

from __future__ import annotations

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dask_ep.cli.command import debug_option
from dask_ep.jobs.inspect import Finding, inspect_path


@click.command("inspect")
@click.argument("path")
@debug_option
def inspect_command(path: str) -> None:
    """Show what PATH is: an array, a checkpoint, a job, or an output and its progress.

    For a routing, show how many rows each expert gets, and how uneven that is.

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
