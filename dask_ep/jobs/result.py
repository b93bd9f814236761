"""What does a run report, while it runs and when it is done?"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import dask.array as da
from dask.utils import format_time

from dask_ep.arrays.html import html_table
from dask_ep.jobs.in_passes import PassesDone
from dask_ep.laws.decision import Decision
from dask_ep.storage.storage import open_tokens

KNOWN_AFTER = 1.0
"""Seconds after which the speed of a run may be used to estimate the time left."""

KNOWN_SHARE = 0.2
"""Fraction of the rows that must be done for that: the first blocks of workers are slow."""

LONG_AFTER = 30.0
"""Seconds after which the speed is used whatever the fraction of rows done."""


class Progress(NamedTuple):
    """The progress of a run."""

    rows_done: int
    #: by this run
    rows_left: int
    rows_before: int
    #: by the runs that it resumes
    seconds: float
    #: since this run began its first block
    not_finite: int = 0
    #: number of rows with NaN or infinity, of those done by this run
    first_not_finite: int = -1
    #: the first of these rows

    @property
    def rows_in_all(self) -> int:
        return self.rows_done + self.rows_left + self.rows_before

    @property
    def rows_per_second(self) -> float:
        return self.rows_done / self.seconds if self.seconds > 0 else 0.0

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the end at the speed so far; None until that is known well enough."""
        share = self.rows_done / max(self.rows_done + self.rows_left, 1)
        begun = self.seconds >= KNOWN_AFTER and share >= KNOWN_SHARE
        known = self.rows_done > 0 and (begun or self.seconds >= LONG_AFTER)
        return self.rows_left / self.rows_per_second if known else None


@dataclass(frozen=True)
class RunResult:
    """The result of a run, whose output is complete.

    Examples
    --------
    >>> import numpy as np, os, tempfile
    >>> from dask_ep import Job, Threads, run_job
    >>> folder = tempfile.mkdtemp()
    >>> paths = {name: os.path.join(folder, f"{name}.npy") for name in ("x", "r", "w", "y")}
    >>> np.save(paths["x"], np.ones((6, 2), "f4"))
    >>> np.save(paths["r"], np.array([0, 1, 1, 0, 1, -1]))
    >>> np.save(paths["w"], np.stack([np.eye(2, dtype="f4"), 2 * np.eye(2, dtype="f4")]))
    >>> job = Job(paths["x"], paths["y"], routing=paths["r"],
    ...           experts={"kind": "linear", "w": paths["w"]})
    >>> done = run_job(job, Threads(1))
    >>> done.rows_done, done.decision.layout.world_size
    (6, 1)
    >>> done.open().sum().compute()
    np.float32(16.0)
    """

    out: str
    #: path of the output
    rows_done: int
    #: computed by this run
    rows_before: int
    #: computed by the runs that it resumed
    seconds: float
    #: from the first block on
    decision: Decision
    #: how it ran: ranks, workers, threads, rows of a chunk, passes
    multiplied_by: str | None = None
    #: which library multiplied, and how
    passes: PassesDone | None = None
    #: what the passes took, if experts were processed in passes
    not_finite: int = 0
    #: number of rows with NaN or infinity, of those computed
    first_not_finite: int = -1
    #: the first of these rows
    reports: tuple[Path, ...] = ()
    #: the reports written: ours, and on workers Dask's

    @classmethod
    def of(cls, progress: Progress, out: str, **how: Any) -> RunResult:
        """Make the result from the final progress, and how the job ran."""
        counted = progress._asdict()
        del counted["rows_left"]
        return cls(out, **counted, **how)

    @property
    def rows(self) -> int:
        """Rows of the output."""
        return self.rows_done + self.rows_before

    @property
    def rows_per_second(self) -> float:
        return self.rows_done / self.seconds if self.seconds > 0 else 0.0

    def open(self) -> da.Array:
        """Open the output as a lazy array, in the chunks in which it is stored."""
        return open_tokens(self.out)

    @property
    def figures(self) -> dict[str, str]:
        """The figures of the run as text, by name."""
        layout, figures = self.decision.layout, {"output": os.fspath(self.out)}
        figures["rows computed"] = f"{self.rows_done:,}"
        if self.rows_before:
            figures["rows done before"] = f"{self.rows_before:,}"
        if self.rows_done:
            speed = f"{self.rows_per_second:,.0f} rows/s"
            figures["time"] = f"{format_time(self.seconds)}, {speed}"
        figures["ranks"] = f"{layout.world_size} on {layout.workers} x {layout.threads} threads"
        figures["chunks"] = f"of up to {self.decision.chunk_rows:,} rows"
        optional = {"passes": self.passes, "products by": self.multiplied_by}
        figures |= {name: str(value) for name, value in optional.items() if value is not None}
        if self.not_finite:
            first = f"the first is row {self.first_not_finite}"
            figures["rows with NaN or infinity"] = f"{self.not_finite:,}, {first}"
        if self.reports:
            figures["reports"] = ", ".join(map(os.fspath, self.reports))
        return figures

    def __repr__(self) -> str:
        return f"<RunResult: {'; '.join(f'{name} {text}' for name, text in self.figures.items())}>"

    def _repr_html_(self) -> str:
        return html_table("run", self.figures.items())
