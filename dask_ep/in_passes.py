"""How is a job whose experts do not fit carried out?

    find_passes ──> Passes, or None where all experts fit           from shapes, before data is read
    InPasses    ──> y, for `build`; then the steps of one group of chunks after the other, for `run`

        hold     output blocks of the group
        spill    rows to disk │ experts │ output blocks of the group │ files removed

What a step has done stays done: the files of spilled rows lie beside the output's journal, and a
resumed run goes on with them.

    any worker           reads a chunk, writes its rows, by expert     ┐
    the worker of rank r reads blocks r alone wants, their rows,       │ files that all workers see
                         and writes what they gave, by chunk           │
    any worker           reads that, adds it up, writes the output     ┘

Between workers, so, nothing goes but by those files, and each expert is read by one of them; by
more only if its rows are more than one worker's share.
"""

from __future__ import annotations

import glob
import os
import shutil
import uuid
from collections.abc import Collection, Iterator
from dataclasses import replace
from math import prod
from typing import Any, NamedTuple

import dask.array as da
import numpy as np
from dask.utils import format_bytes

from dask_ep import journal, memory
from dask_ep.build import Inputs
from dask_ep.checks import computing_dtype
from dask_ep.expert_major import READS, Rows, Walk
from dask_ep.experts import Experts
from dask_ep.files import bytes_below
from dask_ep.fit import DoesNotFit, Layout, choose_chunk_rows, slots_per_row
from dask_ep.held_rows import apart, hold
from dask_ep.local import HIDDEN_COLUMNS
from dask_ep.output import Output, Step, free_bytes, progress_directory
from dask_ep.passes import RATES, Passes, Sizes, choose_passes
from dask_ep.spilled_rows import Spilled, collect
from dask_ep.storage import CHUNK_BYTES, open_tokens
from dask_ep.survey import survey
from dask_ep.travel import ALL_ROWS, Travel

SPILL = "spill-"
"""What the names of directories with rows that wait begin with, beside the output's journal."""


class PassesDone(NamedTuple):
    """What going through the experts in passes took; reads of resumed runs included."""

    passes: Passes
    reads: dict[int, int]
    #: how often each expert was read that was read at all
    spilled_bytes: int
    #: of rows that this run has written to disk to wait, and of what their experts gave

    def __str__(self) -> str:
        waited = ""
        if self.passes.way == "spill":
            waited = f", {format_bytes(self.spilled_bytes)} of rows waited on disk"
        return f"{sum(self.reads.values())} experts were read in passes{waited}"


WAYS_OF = {"rows": ("spill",), "experts": ("hold",)}
"""In what way what travels is asked for: rows are spilled to where their experts go by, experts go
by where rows are held."""


def find_passes(
    inputs: Inputs,
    layout: Layout,
    workers: int | None,
    chunk_rows: int | None = None,
    travel: Travel = ALL_ROWS,
    overwrite: bool = False,
) -> Passes | None:
    """Say how to go through the experts of a job that do not fit; None where they do.

    What travels by choice (`Travel.how`) is the way: rows to where their experts go by ("rows":
    they are spilled), experts to rows that stay ("experts": these are held), or the cheaper.

    Parameters
    ----------
    inputs : of the job
    layout : where it is to run
    workers : Dask workers that it runs on; None on threads
    chunk_rows : rows of a token chunk, if they are given
    travel : which way is asked for, if one is, and how fast experts are read
    overwrite : whether what an earlier run has written goes before

    Raises
    ------
    DoesNotFit
        If it can be done in no way within the memory limit.
    ValueError
        If experts are to travel to rows that cannot be held.

    Notes
    -----
    Reads nothing; looks at the free disk beside the output. On GPUs experts do not go by in passes.
    """
    if layout.memory_limit is None or layout.on_devices:
        return None
    try:
        choose_chunk_rows(inputs, layout)
        return None
    except DoesNotFit as refusal:
        ways = _ways_to_hold_rows(inputs, workers)
        asked = WAYS_OF.get(travel.how, ways)
        if not set(asked) <= set(ways):
            raise ValueError(
                "the experts do not fit, and travel by rows or auto is what there is: experts can "
                "only travel to rows that are held in memory, which is on threads, and for given "
                "routing"
            ) from refusal
        try:
            return choose_passes(
                sizes_of(inputs, layout.threads, workers),
                layout.memory_limit,
                free=_free_for_rows(inputs, overwrite),
                chunk_rows=chunk_rows,
                ways=asked,
                rates=replace(RATES, read=travel.read),
            )
        except MemoryError as error:
            message = f"{refusal}. Nor does it fit with experts that go by in passes: {error}"
            raise DoesNotFit(message, refusal.proposal) from error


def sizes_of(inputs: Inputs, threads: int, workers: int | None) -> Sizes:
    """Put a job, and where it is to run, into numbers."""
    experts, tokens = inputs.experts, inputs.tokens
    compute = computing_dtype(tokens.dtype)
    wide = compute.itemsize
    matrices = [
        weight.nbytes // experts.num_experts
        for weight in experts.weights.values()
        if weight.nbytes != experts.num_experts * weight.loaded_bytes(compute)
    ]
    beside = 0 if inputs.layer is None else inputs.layer.loaded_beside(compute)
    return Sizes(
        rows=tokens.shape[0],
        slots=slots_per_row(inputs),
        d=tokens.shape[1],
        d_out=experts.d_out,
        itemsize=tokens.dtype.itemsize,
        wide=wide,
        experts=experts.num_experts,
        expert_stored=experts.nbytes // experts.num_experts,
        expert_loaded=experts.loaded_bytes(compute),
        widest=max(experts.d, min(experts.hidden or 0, HIDDEN_COLUMNS), experts.d_out),
        matrix_stored=max(matrices, default=0) + _split_bytes(experts, compute),
        beside=beside,
        stored_rows=tokens.chunk_rows,
        read_bytes=inputs.read_bytes,
        weigh_input=experts.options.get("weigh", "output") == "input",
        threads=threads,
        workers=workers,
    )


class InPasses:
    """One job that goes through its experts in passes.

    Parameters
    ----------
    inputs : of the job
    passes : from `find_passes`
    ranks : that experts are shared out to, where rows are spilled
    place : of the rows that wait, by the name that `settings` of the run gone on with tell
    done : blocks of the output that it has finished
    """

    def __init__(
        self,
        inputs: Inputs,
        passes: Passes,
        ranks: int = 1,
        place: str | None = None,
        done: Collection[int] = (),
    ):
        self.passes, self._inputs, self._ranks = passes, inputs, ranks
        self._directory = progress_directory(os.path.abspath(inputs.job.out))
        # Of this run alone: a task that outlives a run that was overwritten must not reach them.
        self._done, self._place = done, place or f"{SPILL}{uuid.uuid4().hex[:12]}"
        self._spilled: list[Spilled] = []

    def __call__(
        self,
        tokens: da.Array,
        routing: da.Array,
        experts: Experts,
        *,
        topk_weights: da.Array | None = None,
    ) -> da.Array:
        """Give the lazy output (N, d_out), as `expert_parallel` does, to be computed by `steps`.

        Reads the routing once.
        """
        counts = survey(self._small_routing(routing), experts.num_experts).rows_by_chunk(
            tokens.chunks[0]
        )
        rows = Rows(tokens, routing, topk_weights)
        walk = Walk(experts, self.passes, self._directory)
        if self.passes.way == "hold":
            # Chunks come fresh from their files.
            return hold(rows, walk, counts, done=self._done, in_place=True)
        place = os.path.join(self._directory, self._place)
        self._spilled = [
            Spilled(rows, walk, counts, group, f"{place}-{g}", self._ranks)
            for g, group in enumerate(self.passes.groups(len(counts)))
        ]
        return collect(rows, walk, self._spilled)

    @property
    def settings(self) -> dict[str, Any]:
        """What a resumed run must know, JSON-able."""
        return {"passes": self.passes.to_dict(), "spill": self._place}

    def steps(self, output: Output) -> Iterator[Step]:
        """Give what is to be computed, one after the other; each must be done before the next."""
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
            for together in apart([blocks], done):  # experts go by for each
                yield output.step(together)
                memory.release()
            if self._spilled:
                self._spilled[g].files.remove()
        for left in glob.glob(os.path.join(glob.escape(self._directory), f"{SPILL}*")):
            shutil.rmtree(left, ignore_errors=True)

    def done(self, spilled_bytes: int) -> PassesDone:
        """Say what it took, by the journal and by the receipts of the steps."""
        counted = journal.count_done(self._directory, READS, what=READS)
        return PassesDone(self.passes, dict(sorted(counted.items())), spilled_bytes)

    def _small_routing(self, routing: da.Array) -> da.Array:
        """The routing in chunks that may be computed several at a time, if it must be computed."""
        layer = self._inputs.layer
        if layer is None:
            return routing
        rows = max(CHUNK_BYTES // (4 * self._inputs.row_bytes), 1)
        tokens = open_tokens(self._inputs.tokens, chunks=min(rows, self.passes.chunk_rows))
        return layer.route(tokens)[0]


def _ways_to_hold_rows(inputs: Inputs, workers: int | None) -> tuple[str, ...]:
    """In memory and on disk, or on disk alone.

    Workers share no memory. The rows of a layer are routed, and go through its shared experts,
    chunk by chunk: small ones.
    """
    return ("hold", "spill") if workers is None and inputs.layer is None else ("spill",)


def _free_for_rows(inputs: Inputs, overwrite: bool) -> int:
    """Bytes of disk that the output leaves free."""
    out = os.path.abspath(inputs.job.out)
    free = free_bytes(os.path.dirname(out))
    if overwrite:
        free += bytes_below(out) + bytes_below(progress_directory(out))
    written = inputs.tokens.shape[0] * inputs.experts.d_out * inputs.tokens.dtype.itemsize
    return max(free - written, 0)


def _split_bytes(experts: Experts, compute: np.dtype) -> int:
    """Bytes of the matrix that is copied when gate and up are taken apart."""
    if not experts.options.get("interleaved", False):
        return 0
    return experts.weights["gate_up"].loaded_bytes(compute)
