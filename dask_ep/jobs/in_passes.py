"""How is a job carried out whose experts do not fit into memory?

    InPasses ──> y, for `build`; then the steps of one group of chunks after another, for `run`

        hold     output blocks of the group
        spill    rows to disk │ experts │ output blocks of the group │ files removed

A finished step is not done again: the files of spilled rows are next to the output's journal, and a
resumed run continues with them.

    any worker           reads a chunk, writes its rows, by expert     ┐
    the worker of rank r reads blocks that only r needs, their rows,   │ files that all workers see
                         and writes their outputs, by chunk            │
    any worker           reads that, adds it up, writes the output     ┘

So workers exchange rows only through these files, and each expert is read by one worker, or by
several if its rows exceed one worker's share.
"""

from __future__ import annotations

import glob
import os
import shutil
import uuid
from collections.abc import Collection, Iterator
from math import prod
from typing import Any, NamedTuple

import dask.array as da
from dask.utils import format_bytes

from dask_ep.arrays import memory
from dask_ep.experts.experts import Experts
from dask_ep.graph.expert_schedule import READS, Rows, Walk
from dask_ep.graph.passes_disk import Spilled, sum_answers
from dask_ep.graph.passes_memory import apart, hold
from dask_ep.jobs.build import Inputs, routed_by_layer
from dask_ep.jobs.resumed_run import Begun
from dask_ep.laws.passes import Passes
from dask_ep.placement.routing_stats import survey
from dask_ep.storage import journal
from dask_ep.storage.files import bytes_below
from dask_ep.storage.output import Output, Step, free_bytes, progress_directory
from dask_ep.storage.storage import CHUNK_BYTES, open_tokens

SPILL = "spill-"
"""Prefix of the directories with spilled rows, next to the output's journal."""


class PassesDone(NamedTuple):
    """What processing the experts in passes took, including reads of the runs that were resumed."""

    passes: Passes
    reads: dict[int, int]
    #: how often each expert was read, for those that were
    spilled_bytes: int
    #: bytes that this run spilled to disk: rows, and their experts' outputs

    def __str__(self) -> str:
        waited = ""
        if self.passes.way == "spill":
            waited = f", {format_bytes(self.spilled_bytes)} of rows waited on disk"
        return f"{sum(self.reads.values())} experts were read in passes{waited}"


class InPasses:
    """A job whose experts are processed in passes.

    Parameters
    ----------
    inputs : of the job
    passes : as decided
    ranks : number of ranks that share the experts, if rows are spilled
    begun : the run that is resumed
    """

    def __init__(self, inputs: Inputs, passes: Passes, ranks: int = 1, begun: Begun | None = None):
        self.passes, self._inputs, self._ranks = passes, inputs, ranks
        self._directory = progress_directory(inputs.job.out)
        # A new name for each run: tasks left over from an overwritten run must not find its files.
        self._place = (begun and begun.place) or f"{SPILL}{uuid.uuid4().hex[:12]}"
        self._done: Collection[int] = begun.done if begun else ()
        self._spilled: list[Spilled] = []

    def __call__(
        self,
        tokens: da.Array,
        routing: da.Array,
        experts: Experts,
        *,
        topk_weights: da.Array | None = None,
    ) -> da.Array:
        """Return the lazy output (N, d_out), as `expert_parallel` does, to be computed by `steps`.

        Reads the routing once.
        """
        found = survey(self._small_routing(routing), experts.num_experts)
        counts = found.rows_by_chunk(tokens.chunks[0])
        rows = Rows(tokens, routing, topk_weights)
        walk = Walk(experts, self.passes, self._directory)
        if self.passes.way == "hold":
            # Chunks are newly read, and may be overwritten unless a layer's other parts need them.
            alone = self._inputs.layer is None
            return hold(rows, walk, counts, done=self._done, in_place=alone)
        place = os.path.join(self._directory, self._place)
        self._spilled = [
            Spilled(rows, walk, counts, group, f"{place}-{g}", self._ranks)
            for g, group in enumerate(self.passes.groups(len(counts)))
        ]
        return sum_answers(rows, walk, self._spilled)

    @property
    def settings(self) -> dict[str, Any]:
        """Return what a resumed run must know, serializable as JSON."""
        return {"passes": {**vars(self.passes)}, "spill": self._place}

    def steps(self, output: Output) -> Iterator[Step]:
        """Yield what is to be computed; each must be done before the next."""
        missing = set(output.missing)
        for g, group in enumerate(self.passes.groups(len(output.rows))):
            blocks = [c for c in group if c in missing]
            if blocks and self.passes.way == "spill":
                spilled = self._spilled[g]
                row_bytes = prod(output.shape[1:]) * output.dtype.itemsize
                spilled.create(output.path, sum(output.rows[c] for c in blocks) * row_bytes)
                yield spilled.write_step(blocks)
                memory.release()
                yield spilled.serve_step()
                memory.release()
            done = self._done if self.passes.way == "hold" else ()
            for together in apart([blocks], done):  # experts are loaded again for each
                yield output.step(together)
                memory.release()
            if self._spilled:
                self._spilled[g].files.remove()
        for left in glob.glob(os.path.join(glob.escape(self._directory), f"{SPILL}*")):
            shutil.rmtree(left, ignore_errors=True)

    def done(self, spilled_bytes: int) -> PassesDone:
        """Summarise what the passes took, from the journal and the receipts of the steps."""
        counted = journal.count_done(self._directory, READS, what=READS)
        return PassesDone(self.passes, dict(sorted(counted.items())), spilled_bytes)

    def _small_routing(self, routing: da.Array) -> da.Array:
        """Return the routing; if it must be computed, in chunks of which several fit at a time."""
        layer = self._inputs.layer
        if layer is None or not self._inputs.routes:
            return routing
        rows = max(CHUNK_BYTES // (4 * self._inputs.work().row_bytes), 1)
        tokens = open_tokens(self._inputs.tokens, chunks=min(rows, self.passes.chunk_rows))
        return layer.sent(routed_by_layer(self._inputs, tokens)[0])


def free_for_rows(inputs: Inputs) -> int:
    """Return the bytes of disk that are free for spilled rows, next to the output.

    Files of an unfinished run are removed before, a finished output only when this one is complete.
    """
    directory = progress_directory(inputs.job.out)
    written = inputs.tokens.shape[0] * inputs.d_out * inputs.tokens.dtype.itemsize
    return max(free_bytes(directory) + bytes_below(directory) - written, 0)
