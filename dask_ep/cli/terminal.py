"""How does a user at a terminal, or reading a log, see progress and errors?

On a terminal progress is a bar; elsewhere it is plain lines, every few seconds and at the end. Both
go to stderr, so that stdout holds only results. An error is one line, with its causes.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

import click
from dask.utils import format_bytes, format_time
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from dask_ep.arrays.blas import faster_blas
from dask_ep.jobs import result as results

SECONDS_BETWEEN_LINES = 3.0
"""Seconds between progress lines without a terminal."""


@contextlib.contextmanager
def progress_bar(unit: str) -> Iterator[Callable[..., None]]:
    """Yield a function that shows progress: a bar on a terminal, lines otherwise, on stderr."""
    if not sys.stderr.isatty():
        yield _Lines(unit).tell
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[words]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=None, words="")

        def tell(done: int, total: int, name: str, how: results.Progress | None = None) -> None:
            words = f"{_amount(done, total, unit)}{_speed(how)}"
            progress.update(task, completed=done, total=total, description=name, words=words)

        yield tell


class _Lines:
    """Progress as plain lines, every few seconds and at the end."""

    def __init__(self, unit: str):
        self._unit, self._last = unit, time.monotonic()

    def tell(self, done: int, total: int, name: str, how: results.Progress | None = None) -> None:
        now = time.monotonic()
        if done < total and now < self._last + SECONDS_BETWEEN_LINES:
            return
        self._last = now
        share = f"{100 * done / total:.0f} %" if total else "100 %"
        words = f"{share}, {_amount(done, total, self._unit)}{_speed(how)}"
        click.echo(f"{name}: {words}" if name else words, err=True)


def hint_at_faster_blas() -> None:
    """Print which library would multiply faster on this machine, if any would."""
    if hint := faster_blas():
        click.echo(f"hint: {hint}", err=True)


def _amount(done: int, total: int, unit: str) -> str:
    if unit == "bytes":
        return f"{format_bytes(done)} of {format_bytes(total)}"
    return f"{done} of {total} {unit}"


def _speed(how: results.Progress | None) -> str:
    if how is None or not how.rows_done:
        return ""
    seconds = how.seconds_left
    left = f", {format_time(seconds)} left" if seconds is not None and how.rows_left else ""
    return f", {how.rows_per_second:.0f} rows/s{left}"
