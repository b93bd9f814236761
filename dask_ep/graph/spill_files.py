"""Where on disk are the rows that wait for their experts, and which tasks are done?

    spill-<run>-<group>/
      rows       expert 0: chunk 0, chunk 1, ... │ expert 1: chunk 0, ...     inputs
      answers    chunk 0: expert 0, expert 1, ... │ chunk 1: expert 0, ...    outputs
      done       a byte for each task, 1 once its rows are written

A row is stored once for each of its slots. The routing fixes all places beforehand (`SpillLayout`):
files have their full size before the first row is written, any number of tasks write at once, an
expert's rows are read from front to back, and so are a chunk's answers. Bytes are read and written
by position, not mapped, so only arrays take memory.

The files survive the death of a process, but not a power loss: then start again.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from io import FileIO

import numpy as np

from dask_ep.arrays import memory
from dask_ep.storage.files import fill_from_file
from dask_ep.storage.output import free_bytes
from dask_ep.storage.writers import write_all


@dataclass(frozen=True, eq=False)
class Run:
    """Some of the rows of one expert, contiguous in `rows`."""

    expert: int
    #: the expert's index in its block
    first: int
    #: place of the first row in `rows`
    count: int
    starts: np.ndarray
    #: (c,) the first of these rows from each of the chunks that they come from
    places: np.ndarray
    #: (c,) place of that row's answer in `answers`


class SpillLayout:
    """The places of all slots of a group of chunks.

    Parameters
    ----------
    counts : (C, E) integers, slots of each chunk at each expert

    Examples
    --------
    >>> layout = SpillLayout(np.array([[2, 1], [3, 0]]))
    >>> layout.rows_at.tolist(), layout.answers_at.tolist()
    ([[0, 5], [2, 6]], [[0, 2], [3, 6]])
    >>> run = layout.run(0, 1, 4)
    >>> run.first, run.count, run.starts.tolist(), run.places.tolist()
    (1, 3, [0, 1], [1, 3])
    """

    def __init__(self, counts: np.ndarray):
        self.counts = np.asarray(counts, np.int64)

    @property
    def slots(self) -> int:
        """Number of all slots."""
        return int(self.counts.sum())

    @cached_property
    def rows_at(self) -> np.ndarray:
        """(C, E) place in `rows` of the first row of each chunk for each expert."""
        return _running_total(self.counts.T).T

    @cached_property
    def answers_at(self) -> np.ndarray:
        """(C, E) place in `answers` of the first answer of each expert to each chunk."""
        return _running_total(self.counts)

    def run(self, expert: int, start: int, stop: int, number: int | None = None) -> Run:
        """Return rows [start, stop) of an expert, with its index in its block."""
        first_of_chunk = self.rows_at[:, expert] - self.rows_at[0, expert]
        last_of_chunk = first_of_chunk + self.counts[:, expert]
        chunks = np.flatnonzero((last_of_chunk > start) & (first_of_chunk < stop))
        begun = np.maximum(first_of_chunk[chunks], start)
        return Run(
            expert=expert if number is None else number,
            first=int(self.rows_at[0, expert]) + start,
            count=stop - start,
            starts=begun - start,
            places=self.answers_at[chunks, expert] + begun - first_of_chunk[chunks],
        )


@dataclass(frozen=True)
class SpillFiles:
    """The files of one group: a small object that any task can carry."""

    directory: str
    d: int
    d_out: int
    row_dtype: np.dtype
    answer_dtype: np.dtype

    def create(self, slots: int, tasks: int, whose: str, reserve: int = 0) -> None:
        """Create all files in their full size, unless they exist.

        Parameters
        ----------
        slots : number of rows, and of answers, in the files
        tasks : number of tasks in `done`
        whose : the output that the rows are for, for the message
        reserve : bytes that must stay free

        Raises
        ------
        OSError
            If they do not fit on the disk; the message has the bytes needed and the free ones.
        """
        sizes = {
            "rows": slots * self.d * self.row_dtype.itemsize,
            "answers": slots * self.d_out * self.answer_dtype.itemsize,
            "done": tasks,
        }
        if self._has(sizes):
            return
        self.remove()
        os.makedirs(self.directory)
        try:
            for name, size in sizes.items():  # `done` is created last: if it exists, all do
                _allocate(os.path.join(self.directory, name), size)
            if free_bytes(self.directory) < reserve:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self.remove()
            free = free_bytes(os.path.dirname(self.directory))
            raise OSError(
                error.errno,
                f"not enough disk space for spilled rows: those of {whose} need "
                f"{sum(sizes.values())} bytes in {self.directory}, and the output {reserve}, but "
                f"{free} are free ({error.strerror}). Free some space, write the output elsewhere, "
                "or allow more memory to spill fewer rows",
            ) from error

    def remove(self) -> None:
        """Remove all files, if they exist."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def write_rows(self, place: int, rows: np.ndarray) -> None:
        """Write rows (m, d) at a place."""
        self._write("rows", [(place, rows)], self.d * self.row_dtype.itemsize)

    def read_rows(self, first: int, count: int) -> np.ndarray:
        """Return `count` rows (count, d), starting at a place."""
        return self._read("rows", first, (count, self.d), self.row_dtype)

    def write_answers(self, answers: np.ndarray, run: Run, start: int) -> None:
        """Write the answers (m, d_out) to rows [start, start + m) of a run at their places."""
        stop = start + len(answers)
        after = np.append(run.starts[1:], run.count)
        parts = np.flatnonzero((after > start) & (run.starts < stop))
        pieces = []
        for part in parts.tolist():
            first, last = max(int(run.starts[part]), start), min(int(after[part]), stop)
            place = int(run.places[part]) + first - int(run.starts[part])
            pieces.append((place, answers[first - start : last - start]))
        self._write("answers", pieces, self.d_out * self.answer_dtype.itemsize)

    def read_answers(self, first: int, count: int) -> np.ndarray:
        """Return `count` answers (count, d_out), starting at a place."""
        return self._read("answers", first, (count, self.d_out), self.answer_dtype)

    def record(self, task: int) -> None:
        """Record that a task has written its rows."""
        with _opened(os.path.join(self.directory, "done")) as file:
            os.pwrite(file.fileno(), b"\1", task)

    def is_done(self, task: int) -> bool:
        done = np.empty(1, np.uint8)
        fill_from_file(done, os.path.join(self.directory, "done"), task, "spilled rows")
        return bool(done[0])

    def find_done(self, tasks: int) -> frozenset[int]:
        """Return the numbers of the tasks that are done."""
        done = np.empty(tasks, np.uint8)
        fill_from_file(done, os.path.join(self.directory, "done"), 0, "spilled rows")
        return frozenset(np.flatnonzero(done).tolist())

    def _has(self, sizes: dict[str, int]) -> bool:
        paths = {name: os.path.join(self.directory, name) for name in sizes}
        return all(
            os.path.exists(path) and os.stat(path).st_size == sizes[name]
            for name, path in paths.items()
        )

    def _write(self, name: str, parts: Sequence[tuple[int, np.ndarray]], row_bytes: int) -> None:
        with _opened(os.path.join(self.directory, name)) as file:
            for place, rows in parts:
                write_all(file.fileno(), rows, place * row_bytes)

    def _read(self, name: str, first: int, shape: tuple[int, int], dtype: np.dtype) -> np.ndarray:
        out = memory.empty(shape, dtype)
        offset = first * shape[1] * dtype.itemsize
        fill_from_file(out, os.path.join(self.directory, name), offset, f"spilled {name}")
        return out


def _running_total(counts: np.ndarray) -> np.ndarray:
    """Return the sum of all numbers before each, in C order, in the shape of `counts`."""
    flat = np.cumsum(counts.ravel()) - counts.ravel()
    return flat.reshape(counts.shape)


def _allocate(path: str, size: int) -> None:
    with open(path, "wb") as file:
        if size == 0:
            return
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
            return
        if size > free_bytes(os.path.dirname(path)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        file.truncate(size)


def _opened(path: str) -> FileIO:
    return open(path, "r+b", buffering=0)
