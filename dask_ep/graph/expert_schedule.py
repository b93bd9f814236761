"""In which order are experts that do not fit loaded and used, block after block?

    block 0 ──> block 1 ──> block 2 ──> ...        each read once, in the order of the experts
       │           │           │
       v           v           v
    the rows routed to it, all those in a group of token chunks

A *block* is a set of experts that are loaded together. At most `decoded` blocks compute at a time,
and `ahead` more are being read, or wait as they are stored. Dependencies alone ensure this:

    a block is begun to be read     when all is done that needed the block `decoded + ahead` before
    what needs a block is computed  when the block `ahead` after is begun to be read; so all is done
                                    that needed the block `decoded` before

Meanwhile rows wait in memory (`passes_memory`) or on disk (`passes_disk`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import dask.array as da
import numpy as np
from dask.task_spec import List, Task, TaskRef

from dask_ep.arrays.checks import computing_dtype
from dask_ep.arrays.namespaces import Array
from dask_ep.experts.experts import Experts
from dask_ep.experts.prefetch import ExpertsAhead
from dask_ep.graph.rows import array_of
from dask_ep.graph.spill_files import SpillFiles
from dask_ep.laws.passes import Passes
from dask_ep.storage import journal

READS = "reads"
"""Word of the journal's lines that say that experts were read."""


@dataclass(frozen=True)
class Rows:
    """The input of the experts: arrays of the same row chunks, each one chunk wide."""

    tokens: da.Array
    routing: da.Array
    topk_weights: da.Array | None

    def keys(self, c: int) -> list[TaskRef | None]:
        """Return chunk `c` of each array, as arguments of a task."""
        arrays = (self.tokens, self.routing, self.topk_weights)
        return [None if a is None else TaskRef((a.name, c, *[0] * (a.ndim - 1))) for a in arrays]

    @property
    def arrays(self) -> list[da.Array]:
        return [a for a in (self.tokens, self.routing, self.topk_weights) if a is not None]

    def output(self, name: str, tasks: dict[Any, Task], d_out: int) -> da.Array:
        chunks = (self.tokens.chunks[0], (d_out,))
        return array_of(name, tasks, self.arrays, chunks, self.tokens._meta)


class Turn(NamedTuple):
    """What a block waits for."""

    read_after: list[TaskRef]
    #: it is not read before these are done
    serve_after: list[TaskRef]
    #: tasks that need it are not run before these are done


@dataclass(frozen=True)
class Walk:
    """How experts are loaded in passes in one job."""

    experts: Experts
    passes: Passes
    directory: str
    #: directory of the output's journal, which counts the experts that are read

    @property
    def apply_router_weight_on_input(self) -> bool:
        return self.experts.options.get("apply_router_weight_on_input", False)

    def blocks(self, rows: np.ndarray) -> list[list[int]]:
        """Cut the experts that have rows into blocks, given the rows of each (E,)."""
        used = np.flatnonzero(rows).tolist()
        step = self.passes.block_experts
        return [used[first : first + step] for first in range(0, len(used), step)]

    def turns(self, blocks: Sequence[list[Any]], reads: Sequence[TaskRef]) -> Iterator[Turn]:
        """Yield what each of a sequence of blocks waits for.

        Parameters
        ----------
        blocks : for each, the tasks that need it
        reads : for each, the task that begins to read it
        """
        decoded, ahead = self.passes.decoded, self.passes.ahead

        def needed(b: int) -> list[TaskRef]:
            return [TaskRef(key) for key in blocks[b]] if b >= 0 else []

        for b in range(len(blocks)):
            at_the_end = b + ahead >= len(blocks)
            before = needed(b - decoded) if at_the_end else [reads[b + ahead]]
            yield Turn(needed(b - decoded - ahead), before)

    def read_task(
        self, key: Any, block: Sequence[int], like: Array, after: Sequence[TaskRef], **more: Any
    ) -> Task:
        """Return a task that begins to read a block once other tasks are done."""
        return Task(
            key,
            _read_ahead,
            self.experts.subset(block),
            computing_dtype(like.dtype),
            tuple(block),
            self.directory,
            List(list(after)),
            **more,
        )


def _read_ahead(
    experts: Experts,
    dtype: np.dtype,
    numbers: tuple[int, ...],
    directory: str,
    after: Sequence[Any],
    *,
    unless: tuple[SpillFiles, tuple[int, ...]] | None = None,
) -> ExpertsAhead | None:
    """Begin to read experts, unless all tasks that need them are done."""
    if unless is not None and all(map(unless[0].is_done, unless[1])):
        return None
    return ExpertsAhead(experts, dtype, partial(_count_read, directory, numbers))


def _count_read(directory: str, numbers: Sequence[int]) -> None:
    for expert in numbers:
        journal.record_done(directory, READS, expert, what=READS)
