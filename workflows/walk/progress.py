"""How far is a walk, and how long will it take?"""

from __future__ import annotations

import sys
import time
from itertools import accumulate
from typing import TextIO

STAGES = {"attention": 0.3, "experts": 0.65, "collect": 0.0, "sum": 0.05, "block": 1.0}
"""Fraction of a block's time that each stage takes, until the first block has been timed."""

SECONDS = 10.0
"""Interval between lines in a log; on a terminal one line is updated all the time."""


class Progress:
    """Shows the progress of a walk on one line.

    Parameters
    ----------
    blocks : number of blocks to do
    file : where to write; standard error by default
    """

    def __init__(self, blocks: int, file: TextIO = sys.stderr):
        self.blocks, self.file = max(blocks, 1), file
        self.started, self.shown, self.done, self.bytes_read = time.monotonic(), 0.0, 0, 0
        self.block, self.stage, self.chunk, self.skipped = 0, "", 0.0, 0
        self.before = dict.fromkeys(STAGES, 0.0) | {"experts": 0.3, "collect": 0.95, "sum": 0.95}
        self.parts = dict(STAGES)

    def begin(self, block: int) -> None:
        self.block = block

    def tell(self, stage: str, part: float) -> None:
        """Report that a fraction of a stage is done."""
        self.stage, self.chunk = stage, part
        now = time.monotonic()
        if self.file.isatty():
            self.file.write(f"\r\x1b[2K{self}")
            self.file.flush()
        elif now - self.shown >= SECONDS:
            self.shown = now
            print(self, file=self.file, flush=True)

    def end(self, took: dict) -> None:
        """Report that a block is done, and estimate from it what each stage takes."""
        self.done += 1
        self.bytes_read += took["bytes_read"]
        self.stage, self.chunk = "", 0.0
        names = ("attention", "experts", "collect", "sum")
        seconds = [took.get(f"{name}_seconds", 0.0) for name in names]
        if (whole := sum(seconds)) > 0:
            seconds = [s / whole for s in seconds]
            self.parts |= dict(zip(names, seconds, strict=True))
            self.before |= dict(zip(names, accumulate(seconds, initial=0.0), strict=False))

    def skip(self) -> None:
        """Report that a block was done before this run."""
        self.skipped += 1

    def close(self) -> None:
        if self.file.isatty():
            self.file.write("\r\x1b[2K")

    @property
    def blocks_done(self) -> float:
        """Blocks done by this run, with the fraction of the current one."""
        within = 0.0
        if self.stage in self.parts:
            within = self.before[self.stage] + self.chunk * self.parts[self.stage]
        return min(self.done + within, self.blocks - self.skipped)

    def __str__(self) -> str:
        seconds, done = time.monotonic() - self.started, self.blocks_done
        left = ""
        if done > 0:
            left = f", {_clock(seconds / done * (self.blocks - self.skipped - done))} left"
        part = (self.skipped + done) / self.blocks
        return (
            f"block {self.block}, {self.stage} {self.chunk:.0%}; {part:.0%} of all, "
            f"{_clock(seconds)}{left}, {self.bytes_read / 1e9:.2f} GB read"
        )


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
