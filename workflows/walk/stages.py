"""Which files does a walk write, one block at a time?

    tokens.npy ──> embedding.zarr
    block 0:  embedding.zarr ── attend ──> work/moe_input.zarr, and what comes after it in work/kept
              work/moe_input.zarr ── dask_ep ──> work/moe_output.zarr
    block 1:  both ── finish ──> hidden states ── attend ──> ...
    the end:  hidden states ── last norm ──> final.zarr ── head ──> work/scores_*.zarr

The hidden states after a block are computed by the task that reads them; they are written to
block_000.zarr only if they were asked for, if several later blocks need them, or if the model is
compared with another one. What else a block hands on to later ones lies in work/handed_on.
Each stage writes an output with `dask_ep.store`, chunk by chunk, and renames it when it is
complete. So a walk can be stopped at any point and continues there, and it runs wherever Dask does.
Files of a block that were not asked for are removed once its output is complete.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import dask.array as da
import numpy as np
from distributed import Client, as_completed, futures_of

from dask_ep import load_moe_layer, open_tokens, store
from dask_ep.jobs.backends import ALL_THREADS, Cluster, Threads
from dask_ep.jobs.collect_job import collect_job
from dask_ep.jobs.job import Job
from dask_ep.jobs.run import run_job
from dask_ep.jobs.save_routing import path_of_weights
from dask_ep.laws.decision import Course
from dask_ep.layers.collect import Wanted
from dask_ep.layers.layer import MoELayer
from dask_ep.storage.output import Output, progress_directory
from walk import head
from walk.block import handed_on_by
from walk.documents import AT_ONCE, chunk_documents, spans
from walk.flow import EMBEDDING, Flow
from walk.memory import give_back
from walk.model import Model
from walk.tasks import Scoring, Task
from walk.tensors import numpy_dtype


@dataclass(frozen=True)
class Where:
    """Where a walk runs: in this process, or on a client's workers."""

    client: Client | None = None
    moe: Threads | Cluster = ALL_THREADS
    #: where the jobs of MoE layers run

    def compute(self, output: Output, tell: Callable[[int], Any]) -> None:
        """Write an output; call `tell` with the number of rows each time some are done."""
        tell(sum(output.rows[b] for b in output.done_before))
        if self.client is None:
            output.compute(
                lambda receipt: tell(receipt.rows), scheduler="threads",
                num_workers=min(AT_ONCE, self.moe.count or AT_ONCE),
            )  # fmt: skip
            return
        if output.missing:
            futures = futures_of(self.client.persist(output))
            try:
                for future in as_completed(futures):
                    tell(future.result().rows)
            finally:
                self.client.cancel(futures)
        output.finish()


@dataclass(frozen=True)
class Asked:
    """Which results of a walk are kept."""

    blocks: range
    #: blocks whose results are kept
    save: frozenset[str]
    #: any of "hidden", "routing" and "moe_input"
    collect: frozenset[str] = frozenset()
    #: statistics of experts, see `dask_ep.collect`
    compared: bool = False
    #: whether the hidden states after each block are compared with those of another model


class Walk:
    """A walk through one model, with its files in one directory.

    Parameters
    ----------
    task : which model, and in which chunks and batches
    out : the directory
    asked : which results are kept
    where : where it runs
    tell : called with a stage's name and the fraction of its rows that are done
    """

    def __init__(
        self,
        task: Task,
        out: str,
        asked: Asked,
        where: Where,
        tell: Callable[[str, float], Any] = lambda *_: None,
    ):
        self.out, self.asked, self.where, self.tell = out, asked, where, tell
        self.work = os.path.join(out, "work")
        self.task = replace(task, handed_on=os.path.join(self.work, "handed_on"))
        os.makedirs(self.work, exist_ok=True)
        lengths = np.load(task.lengths)
        counts = chunk_documents(lengths, task.chunk_rows)
        self.chunks = tuple(int(lengths[a:b].sum()) for a, b in spans(counts))

    @property
    def model(self) -> Model:
        return self.task.model

    @property
    def flow(self) -> Flow:
        return self.model.flow

    def hidden(self, block: int) -> str:
        """Return the path of the hidden states after a block; -1 is the embedding."""
        return os.path.join(self.out, "embedding.zarr" if block < 0 else f"block_{block:03d}.zarr")

    @property
    def final(self) -> str:
        return os.path.join(self.out, "final.zarr")

    @property
    def last_done(self) -> int | None:
        """The last complete block; -1 is the embedding."""
        last = len(self.model.blocks) - 1
        if os.path.exists(self.final):
            return last
        return next((b for b in range(last, -2, -1) if self._is_done(b)), None)

    def _is_done(self, block: int) -> bool:
        files = (self.hidden(block), self._done(block), self._work(block + 1, "moe_input.zarr"))
        return any(map(os.path.exists, files))

    # --- the stages ---

    def embed(self) -> None:
        tokens = self.task.tokens
        y = self._mapped(self.task.embed, self._rows(tokens), block=EMBEDDING)
        self._store("embedding", y, self.hidden(EMBEDDING), {"ids": tokens})

    def start_from(self, rows: da.Array, inputs: dict[str, Any], block: int) -> None:
        """Use existing hidden states as the output of a block."""
        self._store("hidden states", rows, self.hidden(block), inputs)

    def step(self, block: int) -> dict[str, Any]:
        """Send the hidden states through a block; return the seconds it took and bytes it read."""
        started = time.monotonic()
        took: dict[str, Any] = {"block": block}
        if block in self.model.moe_blocks:
            took |= self._moe_step(block)
        else:
            rows, inputs = self._taken(block)
            y = self._mapped(replace(self.task, block=block).whole, *rows, block=block)
            self._store("block", y, self.hidden(block), inputs)
        took["bytes_read"] = took.get("expert_bytes_read", 0) + self.model.stored_bytes(
            self.model.names_of_block(block)
        )
        if self.where.client is None:
            self.model.free()
            give_back()
        self.tidy(block)
        return took | {"seconds": round(time.monotonic() - started, 3)}

    def last_norm(self) -> str:
        """Write ``final.zarr``, the final hidden states."""
        if not os.path.exists(self.final):
            rows, inputs = self._taken(len(self.model.blocks))
            self._store("last norm", self._mapped(self.task.last_norm, *rows), self.final, inputs)
        shutil.rmtree(progress_directory(self.final), ignore_errors=True)
        return self.final

    def _moe_step(self, block: int) -> dict[str, Any]:
        moe_input = self._work(block, "moe_input.zarr")
        marks = [time.monotonic()]
        self._attend(block, moe_input)
        marks.append(time.monotonic())
        layer = load_moe_layer(self.task.directory, block)
        job, experts = self._job(block, moe_input, layer), layer.experts
        reads = self._moe(job)
        reads = experts.num_experts if reads is None else reads
        marks.append(time.monotonic())
        reads += experts.num_experts * self._collect(job)
        marks.append(time.monotonic())
        lasts = self.flow.last_use(block, hidden=True) > block + 1
        if self.asked.compared or self._kept_path("hidden", block) or lasts:
            rows, inputs = self._sum(self._work(block), block)
            self._store("sum", rows, self.hidden(block), inputs)
        marks.append(time.monotonic())
        names = ("attention_seconds", "experts_seconds", "collect_seconds", "sum_seconds")
        took = {
            "expert_reads": reads,
            "expert_bytes_read": reads * (experts.nbytes // experts.num_experts),
        }
        return took | {
            name: round(b - a, 3) for name, a, b in zip(names, marks[:-1], marks[1:], strict=True)
        }

    def _attend(self, block: int, moe_input: str) -> None:
        """Write the input of the block's MoE module, and remove what it was computed from."""
        if os.path.exists(moe_input):
            return
        os.makedirs(self._work(block, "kept"), exist_ok=True)
        task = replace(self.task, block=block, kept=self._work(block, "kept"))
        rows, inputs = self._taken(block)
        self._store("attention", self._mapped(task.attend, *rows), moe_input, inputs)
        shutil.rmtree(self._done(block - 1), ignore_errors=True)

    def _taken(self, block: int) -> tuple[list[da.Array], dict[str, Any]]:
        """Return the hidden states that a block takes, and the files they come from."""
        rows, inputs = [], {}
        for before in self.flow.hidden(block):
            array, file = self._hidden_rows(before)
            rows.append(array)
            inputs |= file
        return rows, inputs

    def _hidden_rows(self, block: int) -> tuple[da.Array, dict[str, Any]]:
        """Return the hidden states after a complete block, and the file they come from."""
        hidden = self.hidden(block)
        if os.path.exists(hidden):
            return self._rows(hidden), {f"hidden {block}": hidden}
        return self._sum(self._done(block), block)

    def _sum(self, directory: str, block: int) -> tuple[da.Array, dict[str, Any]]:
        """Return the output of a block whose MoE modules are done, and the file it comes from."""
        moe_output = os.path.join(directory, "moe_output.zarr")
        task = replace(self.task, kept=os.path.join(directory, "kept"))
        y = self._mapped(task.finish, self._rows(moe_output), block=block)
        return y, {"moe": moe_output}

    def _moe(self, job: Job) -> int | None:
        """Compute the MoE modules with `dask_ep`; return how many experts passes read, if any."""
        routing = self._kept_path("routing", job.layer_index)
        give_back()
        passes = None
        if not os.path.exists(job.out) or not (
            routing is None or os.path.exists(path_of_weights(routing))
        ):
            passes = run_job(
                job, self.where.moe, resume=True, save_routing=routing,
                on_progress=lambda p: self.tell(
                    "experts", (p.rows_done + p.rows_before) / max(p.rows_in_all, 1)
                ),
            ).passes  # fmt: skip
        give_back()
        return None if passes is None else sum(passes.reads.values())

    def _job(self, block: int, moe_input: str, layer: MoELayer) -> Job:
        """Return the job that computes the block's MoE modules."""
        looked_up = "table" in layer.arrays
        return Job(
            moe_input, self._work(block, "moe_output.zarr"), layer=self.task.directory,
            layer_index=block, token_ids=self.task.tokens if looked_up else None,
            precision=self.task.precision, name="the walk",
        )  # fmt: skip

    def _collect(self, job: Job) -> int:
        """Collect statistics of the block's experts if they were asked for and are not there yet.

        Returns how often all experts were read for them.
        """
        block = job.layer_index
        path = self._stats(block)
        if not self.asked.collect or block not in self.asked.blocks or os.path.exists(path):
            return 0
        courses: list[Course] = []
        collect_job(
            job, Wanted(tuple(sorted(self.asked.collect))), path,
            self.where.moe, resume=True, chunk_rows=self.task.chunk_rows,
            on_progress=lambda done, total: self.tell("collect", done / max(total, 1)),
            on_course=courses.append,
        )  # fmt: skip
        give_back()
        return sum(bool(course.walks) + bool(course.hidden) for course in courses)

    def _stats(self, block: int) -> str:
        return os.path.join(self.out, f"stats_{block:03d}.safetensors")

    def _kept_path(self, what: str, block: int) -> str | None:
        wanted = what in self.asked.save and block in self.asked.blocks
        return os.path.join(self.out, f"{what}_{block:03d}.zarr") if wanted else None

    # --- files ---

    def _rows(self, path: str) -> da.Array:
        return open_tokens(path, chunks=self.chunks)

    def _mapped(
        self, function: Callable[..., np.ndarray], *arrays: da.Array, block: int | None = None
    ) -> da.Array:
        """Apply a task to token chunks; what it returns is as wide as a block's hidden states.

        Without a block it is as wide as the input of MoE modules and of the head.
        """
        width = self.model.config_width if block is None else self.flow.width(block)
        dtype = numpy_dtype(self.model.dtype)
        return da.map_blocks(
            function, *arrays, dtype=dtype, chunks=(arrays[0].chunks[0], (width,)),
            new_axis=1 if arrays[0].ndim == 1 else None, meta=np.empty((0, width), dtype),
        )  # fmt: skip

    def _store(self, stage: str, y: da.Array, path: str, inputs: dict[str, Any]) -> None:
        if os.path.exists(path):
            return
        total, done = max(y.shape[0], 1), 0

        def tell(rows: int) -> None:
            nonlocal done
            done += rows
            self.tell(stage, done / total)

        rows = min(self.task.chunk_rows, total)
        with store(
            y.rechunk({0: rows}), path, inputs=inputs, settings={"stage": stage}, resume=True,
            compute=False,
        ) as output:  # fmt: skip
            self.where.compute(output, tell)
        give_back()

    def tidy(self, block: int) -> None:
        """Keep the results of a complete block that were asked for, and remove its other files."""
        done, moe_input = self._done(block), self._kept_path("moe_input", block)
        if os.path.exists(self._work(block)):
            os.replace(self._work(block), done)
        if moe_input is not None and os.path.exists(os.path.join(done, "moe_input.zarr")):
            os.replace(os.path.join(done, "moe_input.zarr"), moe_input)
        needed = not os.path.exists(self.hidden(block))
        shutil.rmtree(os.path.join(done, "moe_input.zarr") if needed else done, ignore_errors=True)
        if (routing := self._kept_path("routing", block)) is not None:
            for path in (routing, path_of_weights(routing)):
                shutil.rmtree(progress_directory(path), ignore_errors=True)
            if os.path.exists(path_of_weights(routing)):
                weights = os.path.join(self.out, f"topk_weights_{block:03d}.zarr")
                os.replace(path_of_weights(routing), weights)

    def _work(self, block: int, *name: str) -> str:
        """Return the path of a file that exists only until its block is complete."""
        return os.path.join(self.work, f"block_{block:03d}", *name)

    def _done(self, block: int) -> str:
        """Return the directory of a complete block's MoE output and of the steps after it."""
        return os.path.join(self.work, f"done_{block:03d}")

    def drop(self, block: int) -> None:
        """Remove what no later block needs: hidden states that were not asked for, and what blocks
        handed on besides. The last norm counts as one more block.
        """
        for at in range(EMBEDDING, len(self.model.blocks)):
            if self.flow.last_use(at, hidden=False) <= block:
                handed_on = handed_on_by(at, self.task.handed_on)
                shutil.rmtree(handed_on, ignore_errors=True)
            if self.flow.last_use(at, hidden=True) > block:
                continue
            for path in (self.hidden(at), self._stats(at)):
                shutil.rmtree(progress_directory(path), ignore_errors=True)
            shutil.rmtree(self._done(at), ignore_errors=True)
            if "hidden" not in self.asked.save or at not in self.asked.blocks:
                shutil.rmtree(self.hidden(at), ignore_errors=True)


# --- the end ---------------------------------------------------------------------------------


def score_all(walks: list[Walk], finals: list[str], targets: str, head_bytes: int) -> head.Scores:
    """Score the final hidden states of one model, or of two.

    Parameters
    ----------
    walks, finals : the walk of each model, and the path of its final hidden states
    targets : file with the token that follows each one, (N,); -1 where none does
    head_bytes : bytes of the heads that may be in memory at a time

    Notes
    -----
    The heads are read in parts of the vocabulary, one after the other; each scores all rows.
    """
    first = walks[0]
    sources = [head.head_sources(walk.model)[0] for walk in walks]
    if len({source.shape[0] for source in sources}) > 1:
        raise ValueError(
            "models that are compared must have the same vocabulary, but they have "
            f"{' and '.join(str(source.shape[0]) for source in sources)} tokens"
        )
    size = walks[0].model.dtype.itemsize
    per_token = sum(source.shape[1] * size for source in sources)
    parts = []
    for part in vocabulary_parts(sources[0].shape[0], per_token, head_bytes):
        path = os.path.join(first.work, f"scores_{part[0]:06d}.zarr")
        scoring = Scoring(tuple(walk.task for walk in walks), part)
        rows = [open_tokens(path, chunks=first.task.chunk_rows) for path in finals]
        wanted = open_tokens(targets, chunks=rows[0].chunks[0])
        columns = head.COLUMNS if len(walks) == 1 else head.COLUMNS_OF_TWO
        y = da.map_blocks(
            scoring, *rows, wanted[:, None], dtype=np.float64, meta=np.empty((0, columns)),
            chunks=(rows[0].chunks[0], (columns,)),
        )  # fmt: skip
        first._store("head", y, path, {"final": finals[0], "other": finals[-1]})
        parts.append(path)
    scores = (open_tokens(part).compute(scheduler="sync") for part in parts)
    return head.combine(scores, np.load(targets))


def vocabulary_parts(tokens: int, token_bytes: int, most: int) -> Iterator[tuple[int, int]]:
    """Split a vocabulary into parts whose heads take at most `most` bytes.

    Examples
    --------
    >>> list(vocabulary_parts(10, 8, 32))
    [(0, 4), (4, 8), (8, 10)]
    """
    size = max(1, most // token_bytes)
    for start in range(0, tokens, size):
        yield start, min(start + size, tokens)


def hidden_error(path: str, other: str) -> dict[str, float]:
    """Return the difference of two models' hidden states, relative to the first."""
    a, b = (open_tokens(each).astype(np.float64) for each in (path, other))
    squares, gaps, largest, gap = da.compute(
        (a**2).sum(), ((a - b) ** 2).sum(), abs(a).max(), abs(a - b).max(), scheduler="sync"
    )
    return {
        "relative_error": float(np.sqrt(gaps / squares)),
        "largest_error": float(gap / largest),
    }
