"""How do rows wait on disk for experts that are loaded in passes?

    tokens c ──> ep_send (c, 0): rows to the file, by expert                      first all of these
    ep_experts (g, b, r) ──> ep_dispatch (-1, g, p, r): the pieces of block b     then these
    answers of c ──> ep_sum (c, 0)                                                then these

A *piece* is some rows of a block's experts, read from front to back; they come from many chunks, so
its key names none. In each group g, every rank r has different blocks. What a task has written is
recorded; a task that runs again, because its worker was lost or the run stopped, finds the record
and does nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import dask.array as da
import numpy as np
from dask.base import tokenize
from dask.highlevelgraph import HighLevelGraph
from dask.task_spec import List, Task, TaskRef

from dask_ep.arrays import memory
from dask_ep.arrays.checks import check_routing, computing_dtype
from dask_ep.arrays.namespaces import Array
from dask_ep.experts.prefetch import ExpertsAhead
from dask_ep.graph.expert_schedule import Rows, Walk
from dask_ep.graph.keys import step_name
from dask_ep.graph.spill_files import Run, SpillFiles, SpillLayout
from dask_ep.kernel.error_context import error_context
from dask_ep.kernel.expert import Expert
from dask_ep.kernel.host_kernel import TILE_BYTES, begin_output, gather, tiles
from dask_ep.kernel.segments import sort_slots
from dask_ep.laws.pass_blocks import cut_pieces
from dask_ep.storage.output import SERVED, SPILLED, Receipt, Step


class Piece(NamedTuple):
    """Some rows of a block's experts, which one task computes."""

    number: int
    #: number of the task in the group's `done`
    block: int
    rank: int
    #: the rank that computes it
    runs: tuple[Run, ...]
    worked: float
    #: token rows that this work is equivalent to


class Spilled:
    """A group of chunks whose rows are spilled: its files, and the tasks that fill and empty them.

    Parameters
    ----------
    rows : those of all chunks of the job
    walk : how experts are loaded
    counts : (C, E) slots of each chunk at each expert
    group : numbers of the group's chunks
    directory : where the files are
    ranks : number of ranks among which the experts are divided
    """

    def __init__(
        self,
        rows: Rows,
        walk: Walk,
        counts: np.ndarray,
        group: range,
        directory: str,
        ranks: int = 1,
    ):
        self._rows, self._walk, self.group = rows, walk, group
        dtype, wide = rows.tokens.dtype, computing_dtype(rows.tokens.dtype)
        weighted = walk.apply_router_weight_on_input and rows.topk_weights is not None
        self.files = SpillFiles(
            directory,
            rows.tokens.shape[1],
            walk.experts.d_out,
            wide if weighted else np.dtype(dtype),
            wide,
        )
        self._layout = SpillLayout(counts[group.start : group.stop])
        self._blocks = walk.blocks(self._layout.counts.sum(axis=0))
        self._pieces = self._cut(ranks)
        self._token = tokenize(directory, rows, walk)

    @property
    def tasks(self) -> int:
        """Number of tasks in `done`: first those of the chunks, then those of the pieces."""
        return len(self.group) + len(self._pieces)

    def create(self, whose: str, reserve: int) -> None:
        """Create the files, or find those of a stopped run; see `SpillFiles.create`."""
        self.files.create(self._layout.slots, self.tasks, whose, reserve)

    def write_step(self, chunks: Sequence[int]) -> Step:
        """Return the tasks, not done yet, that write the rows of some of the group's chunks."""
        done, name = self.files.find_done(self.tasks), step_name("send", self._token)
        tasks: dict[Any, Task] = {}
        for c in chunks:
            i = c - self.group.start
            if i not in done:
                key = (name, c, 0)
                tasks[key] = Task(
                    key, _spill_chunk, *self._rows.keys(c), self._layout.counts[i],
                    self._layout.rows_at[i], self._walk.apply_router_weight_on_input, self.files,
                    c, i,
                )  # fmt: skip
        inputs: Sequence[Any] = self._rows.arrays
        graph = HighLevelGraph.from_collections(name, tasks, dependencies=inputs)
        return Step(graph, list(tasks))

    def serve_step(self) -> Step:
        """Return the tasks that apply experts to the spilled rows and are not done yet."""
        done = self.files.find_done(self.tasks)
        ep_experts, ep_dispatch, ep_receipt = (
            step_name(step, self._token) for step in ("experts", "dispatch", "receipt")
        )
        of_rank: dict[int, dict[int, list[Piece]]] = {}
        for piece in self._pieces:
            if piece.number not in done:
                of_rank.setdefault(piece.rank, {}).setdefault(piece.block, []).append(piece)
        tasks: dict[Any, Task] = {}
        keys, g = [], self.group.start
        for r, (_, waiting) in enumerate(sorted(of_rank.items())):
            served = [
                [(ep_dispatch, -1, g, piece.number, r) for piece in pieces]
                for pieces in waiting.values()
            ]
            reads = [TaskRef((ep_experts, g, b, r)) for b in waiting]
            turns = self._walk.turns(served, reads)
            for (b, pieces), read, turn in zip(waiting.items(), reads, turns, strict=True):
                tasks[read.key] = self._walk.read_task(
                    read.key,
                    self._blocks[b],
                    self._rows.tokens._meta,
                    turn.read_after,
                    unless=(self.files, tuple(piece.number for piece in pieces)),
                )
                for piece in pieces:
                    key = (ep_dispatch, -1, g, piece.number, r)
                    tasks[key] = Task(
                        key,
                        _serve_piece,
                        read,
                        List(turn.serve_after),
                        piece,
                        self._rows.tokens.dtype,
                        self.files,
                        tuple(self._blocks[b]),
                    )
                    # A client may wait for, and cancel, the tasks on which no other task depends.
                    keys.append((ep_receipt, -1, g, piece.number, r))
                    tasks[keys[-1]] = Task(keys[-1], _receipt_of, TaskRef(key))
        return Step(HighLevelGraph.from_collections(ep_dispatch, tasks), keys)

    def sum_tasks(self, name: str) -> dict[Any, Task]:
        """Return the output of the group's chunks, made from the files."""
        tasks = {}
        for i, c in enumerate(self.group):
            _, routing, weights = self._rows.keys(c)
            if self._walk.apply_router_weight_on_input:
                weights = None
            tasks[name, c, 0] = Task(
                (name, c, 0), _sum_chunk, routing, weights,
                self._layout.counts[i], int(self._layout.answers_at[i, 0]), self.files,
                self._rows.tokens.dtype, c,
            )  # fmt: skip
        return tasks

    def _cut(self, ranks: int) -> list[Piece]:
        """Cut the blocks into pieces, and divide them so that ranks get about equally many rows.

        A block belongs to one rank, unless it has more rows than a rank's share.
        """
        total, slots = self._layout.counts.sum(axis=0), max(self._layout.slots, 1)
        worth = SERVED * sum(self._rows.tokens.chunks[0][c] for c in self.group) / slots
        passes, before = self._walk.passes, 0
        pieces: list[Piece] = []
        for b, block in enumerate(self._blocks):
            rows = total[block].tolist()
            hot, middle = sum(rows) * ranks > slots, before + sum(rows) / 2
            for parts in cut_pieces(rows, passes.piece_rows, passes.threads):
                runs = tuple(self._layout.run(block[e], start, stop, e) for e, start, stop in parts)
                count = sum(run.count for run in runs)
                at = before + count / 2 if hot else middle
                rank = min(int(at * ranks / slots), ranks - 1)
                number = len(self.group) + len(pieces)
                pieces.append(Piece(number, b, rank, runs, worth * count))
                before += count
        return pieces


def sum_answers(rows: Rows, walk: Walk, groups: Sequence[Spilled]) -> da.Array:
    """Return the output of all groups, from their files; compute it once these are written."""
    name = step_name("sum", tokenize(rows, walk, [group.files for group in groups]))
    tasks = {key: task for group in groups for key, task in group.sum_tasks(name).items()}
    return rows.output(name, tasks, walk.experts.d_out)


def _spill_chunk(
    tokens: Array,
    routing: Array,
    topk_weights: Array | None,
    counts: np.ndarray,
    places: np.ndarray,
    apply_router_weight_on_input: bool,
    files: SpillFiles,
    chunk: int,
    number: int,
) -> Receipt:
    with error_context(f"token chunk {chunk}, to be spilled"):
        if files.is_done(number):
            return Receipt(chunk, 0, 0)
        check_routing(routing, topk_weights, n=tokens.shape[0])
        segments = sort_slots(routing, topk_weights, len(counts), 0, 1)
        _check_counts(segments.bounds, counts)
        weights = None
        if topk_weights is not None and apply_router_weight_on_input:
            weights = topk_weights.reshape(-1)
        nbytes = 0
        for e, (start, stop) in enumerate(segments.bounds):
            if stop > start:
                slots = segments.slots(slice(start, stop))
                x = _pick(tokens, segments.rows(slots), files.row_dtype)
                if weights is not None:
                    x = x * weights[slots].astype(x.dtype, copy=False)[:, None]
                files.write_rows(int(places[e]), x)
                nbytes += x.nbytes
        files.record(number)
        return Receipt(chunk, 0, nbytes, SPILLED * len(tokens))


def _serve_piece(
    experts: ExpertsAhead | None,
    after: Any,
    piece: Piece,
    dtype: np.dtype,
    files: SpillFiles,
    block: tuple[int, ...],
) -> Receipt:
    with error_context(f"dispatch of spilled rows to experts {block[0]} to {block[-1]}"):
        nbytes = 0
        if not files.is_done(piece.number):
            assert experts is not None  # they are read as long as one of their pieces is not done
            for run in piece.runs:
                nbytes += _serve_run(experts[run.expert], run, computing_dtype(dtype), files)
            files.record(piece.number)
        return Receipt(piece.number, 0, nbytes, piece.worked)


def _receipt_of(receipt: Receipt) -> Receipt:
    return receipt


def _serve_run(expert: Expert, run: Run, compute: np.dtype, files: SpillFiles) -> int:
    nbytes = 0
    for tile in tiles(0, run.count, expert, compute):
        x = files.read_rows(run.first + tile.start, tile.stop - tile.start)
        if x.dtype != compute:
            stored, x = x, memory.empty(x.shape, compute)
            x[...] = stored
        y = memory.empty((len(x), files.d_out), compute)
        expert(x, out=y)
        files.write_answers(y, run, tile.start)
        nbytes += y.nbytes
    return nbytes


def _sum_chunk(
    routing: Array,
    topk_weights: Array | None,
    counts: np.ndarray,
    first: int,
    files: SpillFiles,
    dtype: np.dtype,
    chunk: int,
) -> Array:
    with error_context(f"sum of token chunk {chunk}"):
        segments = sort_slots(routing, topk_weights, len(counts), 0, 1)
        _check_counts(segments.bounds, counts)
        weights = None if topk_weights is None else topk_weights.reshape(-1)
        out, write = begin_output(len(routing), segments, files.d_out, dtype, routing)
        for start, stop in segments.bounds:
            for tile in _tiles_of_answers(start, stop, files):
                slots = segments.slots(tile)
                y = files.read_answers(first + tile.start, tile.stop - tile.start)
                w = None if weights is None else weights[slots].astype(y.dtype, copy=False)
                write(out, segments.rows(slots), y, w)
        return out.astype(dtype, copy=False)


def _pick(tokens: Array, rows: Array | slice, dtype: np.dtype) -> Array:
    """Return rows of a chunk in a dtype, as a view if possible."""
    if isinstance(rows, slice):
        return tokens[rows].astype(dtype, copy=False)
    return gather(tokens, rows, dtype)


def _tiles_of_answers(start: int, stop: int, files: SpillFiles) -> list[slice]:
    step = max(TILE_BYTES // max(files.d_out * files.answer_dtype.itemsize, 1), 1)
    return [slice(s, min(s + step, stop)) for s in range(start, stop, step)]


def _check_counts(bounds: Sequence[tuple[int, int]], counts: np.ndarray) -> None:
    if [stop - start for start, stop in bounds] != counts.tolist():
        raise ValueError(
            "the routing has changed since the run began: experts get other rows now; start the "
            "run again with overwrite"
        )
