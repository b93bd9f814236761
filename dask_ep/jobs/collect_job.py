"""How are statistics of a job's experts collected, so that a stopped run can resume?

    <out>.progress/
      begun.json                    chunks, ranks and blocks of experts, which a resumed run keeps
      groups-0.zarr, ...            joined partial results of some chunks, for a block of experts
      gram.input.zarr, ...          one expert after the other
    <out>                           at the end, and the directory goes

Each is an output as `dask_ep.storage.storage.store` writes them: what is done is not done again,
and whatever a lost worker had is computed again from the rows.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import Any

import dask.array as da
import numpy as np
import xxhash
from distributed import Client

from dask_ep import __version__
from dask_ep.arrays import memory
from dask_ep.cluster.interrupts import Wait
from dask_ep.cluster.workers import Workers
from dask_ep.errors import JobError, ReadError
from dask_ep.graph.statistics import Numbers, finish_groups
from dask_ep.jobs.backends import (
    ALL_THREADS,
    Deployed,
    Where,
    deployed,
    files_of_job,
    lay_out,
    on_gpus,
    started,
)
from dask_ep.jobs.build import Inputs, name_inputs, open_inputs, open_rows
from dask_ep.jobs.collect_decide import Course, decide_course
from dask_ep.jobs.job import Job
from dask_ep.jobs.run import compute_step, owned_ranks
from dask_ep.layers.collect import Chosen, Collection, begin_collection, choose_statistics, name_all
from dask_ep.storage import bundle
from dask_ep.storage.fingerprint import describe
from dask_ep.storage.output import Output, Receipt, Step, progress_directory, together
from dask_ep.storage.replace import remove
from dask_ep.storage.sources import open_source
from dask_ep.storage.storage import store

FEW_ROWS = 128
"""Rows below which an expert is named in the coverage table, unless another number is given."""


@dataclass(frozen=True)
class Wanted:
    """What is to be collected of a job.

    Attributes
    ----------
    what : names of statistics, see `dask_ep.collect`
    out : path of the statistics, ``.safetensors`` or ``.zarr``
    rows, seed : as in `dask_ep.collect`
    with_output : whether the job's output is written in the same pass
    few_rows : number of rows below which the coverage table names an expert
    """

    what: tuple[str, ...]
    out: str
    rows: str | float = "routed"
    seed: int = 0
    with_output: bool = False
    few_rows: int = FEW_ROWS


@dataclass(frozen=True)
class Collected:
    """What a run has collected."""

    metadata: Mapping[str, str]
    #: of the file
    coverage: Mapping[int, int]
    #: rows of the experts that have fewer than were asked for
    num_experts: int
    rows: int
    #: token rows

    @property
    def missing(self) -> list[str]:
        """What was asked for and does not exist for these experts."""
        return json.loads(self.metadata["missing"])


def collect_job(
    job: Job,
    asked: Wanted,
    where: Where | Deployed = ALL_THREADS,
    *,
    resume: bool = False,
    overwrite: bool = False,
    chunk_rows: int | None = None,
    on_progress: Callable[[int, int], Any] | None = None,
    on_course: Callable[[Course], Any] | None = None,
    on_client: Callable[[Client], Any] | None = None,
    on_workers: Callable[[Workers], Any] | None = None,
    wait: Wait = SimpleQueue.get,
) -> Collected:
    """Collect statistics of a job's experts, and write them to one file.

    Parameters
    ----------
    job : whose `out` is written only with `asked.with_output`
    asked : what to collect, and where to write it
    where, resume, overwrite, chunk_rows, on_client, on_workers, wait : as in
        `dask_ep.jobs.run.run_job`
    on_progress : called with the token rows that are done and those in all; each pass counts
    on_course : called at the start with how it will run

    Returns
    -------
    Collected

    Raises
    ------
    JobError
        A ValueError: what is asked for cannot be collected of this job, or not so.
    DoesNotFit
        A MemoryError: not even one expert at a time fits, with the numbers.
    FileExistsError, ValueError, OSError
        As `run_job`.

    Notes
    -----
    Each block of experts takes one pass over the rows: one for all, where they fit into the memory
    limit. `gram` takes passes of its own, as many experts in each as fit. The file's metadata say
    job, fingerprint of the inputs, rows, and which experts saw few.
    """
    out = os.path.realpath(asked.out)
    bundle.check_bundle(out, resume, overwrite)
    directory = progress_directory(out)
    if overwrite:
        remove(directory)
    begun = _read_begun(directory)
    inputs = open_inputs(job)
    chosen = choose_statistics(asked.what, inputs.experts)
    made_of = _fingerprint(inputs, asked)
    if resume and not begun and os.path.lexists(out):
        return _complete(inputs, asked, out, made_of)
    with (
        deployed(where) as where,
        started(where, _files(job, asked, out), wait, on_workers) as (threads, client),
    ):
        if on_gpus(where):
            raise JobError("statistics are collected on the host: run without --gpu")
        layout = lay_out(job, where, client, begun_ranks=begun.get("world_size"))
        course = decide_course(
            inputs, layout, chosen, asked.rows, asked.with_output, chunk_rows, begun
        )
        if asked.with_output and len(course.blocks) > 1:
            raise JobError(
                f"{job.name}: the experts do not fit, and are observed in {len(course.blocks)} "
                "passes, so the output cannot be written in one of them; write it with run"
            )
        if on_client is not None and client is not None:
            on_client(client)
        if on_course is not None:
            on_course(course)
        os.makedirs(directory, exist_ok=True)
        _write_begun(directory, course)
        with owned_ranks(client, layout.world_size), ExitStack() as stack:
            run = _Run(inputs, asked, course, directory, resume, overwrite, stack)
            watch = _Watch(run, on_progress)
            for step in run.steps():
                compute_step(step, client, threads, watch.tell, wait)
                memory.release()
            for output in run.outputs:
                output.finish()
    return _write(inputs, asked, chosen, run, made_of, out)


def _files(job: Job, asked: Wanted, out: str) -> dict[str, str]:
    """The files that all workers must see."""
    files = files_of_job(replace(job, out=out))
    if asked.with_output:
        files["the directory of the job's out"] = os.path.dirname(job.out)
    return files


class _Run:
    """The outputs of one collection: partial results, grams, and the job's own."""

    def __init__(
        self,
        inputs: Inputs,
        asked: Wanted,
        course: Course,
        directory: str,
        resume: bool,
        overwrite: bool,
        stack: ExitStack,
    ):
        self._course = course
        inputs = inputs.held_as_stored() if course.as_stored else inputs
        self.inputs, named = inputs, name_inputs(inputs)
        settings = _settings(inputs, asked) | {"chunk_rows": course.chunk_rows}

        def begin(array: da.Array, path: str, **more: Any) -> Output:
            output = store(
                array, path, inputs=named, settings=settings | more, resume=resume,
                overwrite=overwrite, compute=False,
            )  # fmt: skip
            return stack.enter_context(output)

        self.collections = [self._collect(asked, block) for block in course.blocks]
        self.groups = [
            begin(one.groups, os.path.join(directory, f"groups-{b}.zarr"), block=str(block))
            for b, (one, block) in enumerate(zip(self.collections, course.blocks, strict=True))
        ]
        self.grams = {
            name: begin(array, os.path.join(directory, f"{name}.zarr"))
            for name, array in self.collections[0].grams.items()
        }
        y = self.collections[0].output
        self.output = None if y is None else begin(y, inputs.job.out)

    @property
    def outputs(self) -> list[Output]:
        """All of them."""
        return [*self.groups, *self.grams.values(), *([self.output] if self.output else [])]

    def steps(self) -> Iterator[Output | Step]:
        """Yield what is to be computed, each step before the next."""
        first, *others = self.groups
        yield first if self.output is None else together([first, self.output])
        yield from others
        for block in self._course.gram_blocks:
            parts = [output.step(block) for output in self.grams.values()]
            if any(part.missing for part in parts):
                yield together(parts)

    def _collect(self, asked: Wanted, block: range) -> Collection:
        inputs, course = self.inputs, self._course
        if block.start == 0:
            what: Iterable[str] = asked.what
        else:  # all that is not of tiles came with the first
            what = {name for name in asked.what if name in course.of_tiles}
        tokens, routing, topk = open_rows(inputs, course.chunk_rows)
        layer = inputs.experts if inputs.layer is None else inputs.layer
        return begin_collection(
            tokens, layer, what=what, routing=(routing, topk), rows=asked.rows, seed=asked.seed,
            with_output=asked.with_output, world_size=course.layout.world_size,
            placement=course.layout.placement, block=block,
        )  # fmt: skip


class _Watch:
    """Counts the rows of finished groups; an expert of a gram counts as its share of all rows."""

    def __init__(self, run: _Run, tell: Callable[[int, int], Any] | None):
        self._tell = tell
        outputs = [*run.groups, *run.grams.values()]
        self._of = {
            output.path: run.inputs.tokens.shape[0] / max(len(output.rows), 1) for output in outputs
        }
        self._done = sum(self._of[one.path] * len(one.done_before) for one in outputs)
        self._total = run.inputs.tokens.shape[0] * len(outputs)
        self._show()

    def tell(self, receipt: Receipt) -> None:
        self._done += self._of.get(receipt.path, 0.0)
        self._show()

    def _show(self) -> None:
        if self._tell is not None:
            self._tell(round(self._done), round(self._total))


# --- the file --------------------------------------------------------------------------------


def _settings(inputs: Inputs, asked: Wanted) -> dict[str, Any]:
    """What the statistics depend on besides the inputs."""
    return {
        "layer_index": inputs.job.layer_index,
        "what": sorted(asked.what),
        "rows": asked.rows,
        "seed": asked.seed,
        "placement": inputs.job.placement,
    }


def _fingerprint(inputs: Inputs, asked: Wanted) -> str:
    """What tells these statistics from others."""
    made_of = {"inputs": describe(name_inputs(inputs)), "settings": _settings(inputs, asked)}
    return xxhash.xxh3_64_hexdigest(json.dumps(made_of, sort_keys=True).encode())


def _complete(inputs: Inputs, asked: Wanted, out: str, fingerprint: str) -> Collected:
    """Tell of statistics that are complete already."""
    metadata = bundle.read_metadata(out)
    if metadata.get("fingerprint") != fingerprint:
        raise ValueError(
            f"{asked.out} cannot be resumed: it holds statistics of other inputs, or others of "
            "them; overwrite it, or write elsewhere"
        )
    if asked.with_output and not os.path.lexists(inputs.job.out):
        raise ValueError(
            f"{asked.out} is complete, but the output {inputs.job.out} is not there; write it with "
            "run, or overwrite both"
        )
    try:
        bundle.check_content(out)
    except ReadError as error:
        raise ReadError(f"{error}; overwrite it to collect the statistics again") from error
    few = json.loads(metadata["coverage"])["rows_of_experts"]
    coverage = {int(e): rows for e, rows in few.items()}
    return Collected(metadata, coverage, inputs.experts.num_experts, inputs.tokens.shape[0])


def _write(
    inputs: Inputs, asked: Wanted, chosen: Chosen, run: _Run, fingerprint: str, out: str
) -> Collected:
    """Join what was kept, and write all statistics with words about them."""
    found: Numbers = {}
    for output, collection in zip(run.groups, run.collections, strict=True):
        kept = open_source(output.path)
        rows = (kept.read(g, g + 1) for g in range(kept.shape[0]))
        for name, array in finish_groups(collection.layout, name_all, rows).items():
            found[name] = np.concatenate([found[name], array]) if name in found else array
    few = {
        e: int(count)
        for e, count in enumerate(found.get("coverage.rows", ()))
        if count < asked.few_rows
    }
    job = {key: value for key, value in vars(inputs.job).items() if value is not None}
    metadata = {
        "format": f"dask_ep {__version__} statistics",
        "job": json.dumps(job),
        "fingerprint": fingerprint,
        "rows": str(inputs.tokens.shape[0]),
        "what": json.dumps(list(asked.what)),
        "rows_through_experts": str(asked.rows),
        "missing": json.dumps(list(chosen.missing)),
        "coverage": json.dumps({"fewer_than": asked.few_rows, "rows_of_experts": few}),
    }
    if inputs.job.layer_index is not None:
        metadata["layer_index"] = str(inputs.job.layer_index)
    arrays = found | {name: open_source(output.path) for name, output in run.grams.items()}
    bundle.write_bundle(out, arrays, metadata)
    shutil.rmtree(progress_directory(out))
    return Collected(metadata, few, inputs.experts.num_experts, inputs.tokens.shape[0])


def _read_begun(directory: str) -> dict[str, Any]:
    """How the run was begun that is to be resumed; nothing if there is none."""
    try:
        with open(os.path.join(directory, "begun.json"), encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError:
        return {}


def _write_begun(directory: str, course: Course) -> None:
    path = os.path.join(directory, "begun.json")
    with open(f"{path}.new", "w", encoding="utf-8") as file:
        json.dump(course.to_json(), file)
    os.replace(f"{path}.new", path)
