"""How are statistics of a job's experts collected, so that a stopped run can resume?

    <out>.progress/
      begun.json                    chunks, ranks and blocks of experts, which a resumed run keeps
      groups-0.zarr, ...            joined partial results of some chunks, for a block of experts
      gram.input.zarr, ...          one expert after the other
    <out>                           at the end, when the directory is removed

Each of these is an output of `dask_ep.storage.storage.store`: finished work is not done again, and
what was lost with a worker is computed again from the rows.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

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
    computed_by,
    deployed,
    files_of_job,
    lay_out,
    on_gpus,
    started,
)
from dask_ep.jobs.build import ComputedBy, Inputs, name_inputs, open_inputs, settings_of
from dask_ep.jobs.collect_decide import decide_course
from dask_ep.jobs.collect_plan import begin_all, course_inputs, place_experts, price_course
from dask_ep.jobs.job import Job, as_job
from dask_ep.jobs.price_job import Pricing
from dask_ep.jobs.run import compute_step, owned_ranks, run_job
from dask_ep.jobs.run_report import OnRecord, check_report, reports_of, watched
from dask_ep.laws.decision import Course
from dask_ep.layers.collect import Wanted, name_all
from dask_ep.pricing.price_statistics import PlanOfStatistics
from dask_ep.storage import bundle
from dask_ep.storage.files import write_text
from dask_ep.storage.fingerprint import describe
from dask_ep.storage.journal import acquire_lock, release_lock
from dask_ep.storage.output import Output, Receipt, Step, progress_directory, together
from dask_ep.storage.overwrite_guard import refuse_to_replace_inputs
from dask_ep.storage.replace import remove
from dask_ep.storage.resume import check_existing
from dask_ep.storage.sources import open_source
from dask_ep.storage.storage import store

FEW_ROWS = 128
"""Default number of rows below which the coverage table names an expert."""


@dataclass(frozen=True)
class Collected:
    """What a run collected."""

    metadata: Mapping[str, str]
    #: metadata of the file
    coverage: Mapping[int, int] | None
    #: rows of each expert that saw fewer than `few_rows`; None if its rows were not counted
    num_experts: int
    rows: int
    #: number of token rows
    reports: tuple[Path, ...] = ()
    #: reports that were written

    @property
    def missing(self) -> list[str]:
        """Statistics that were requested but do not exist for these experts."""
        return json.loads(self.metadata["missing"])


def collect_job(
    job: Job | str | os.PathLike,
    wanted: Wanted,
    out: str | os.PathLike,
    where: Where | Deployed = ALL_THREADS,
    *,
    few_rows: int = FEW_ROWS,
    resume: bool = False,
    overwrite: bool = False,
    chunk_rows: int | None = None,
    report: str | os.PathLike | None = None,
    on_record: OnRecord | None = None,
    on_progress: Callable[[int, int], Any] | None = None,
    on_course: Callable[[Course], Any] | None = None,
    on_client: Callable[[Client], Any] | None = None,
    on_workers: Callable[[Workers], Any] | None = None,
    wait: Wait = SimpleQueue.get,
) -> Collected:
    """Collect statistics of a job's experts, and write them to one file.

    Parameters
    ----------
    job : a `Job`, or the path of a job file; its `out` is written only on request
    wanted : what to collect
    out : path of the statistics, ``.safetensors`` or ``.zarr``
    few_rows : number of rows below which the coverage table names an expert
    where, resume, overwrite, chunk_rows, report, on_record, on_client, on_workers, wait : as in
        `dask_ep.jobs.run.run_job`
    on_progress : called with the number of token rows done and in total, over all passes
    on_course : called at the start with how the collection will run

    Returns
    -------
    Collected

    Raises
    ------
    JobError
        A ValueError: these statistics cannot be collected for this job, or not in this way.
    DoesNotFit
        A MemoryError: not even one expert at a time fits; the message has the numbers.
    FileExistsError, ValueError, OSError
        As in `run_job`.

    Notes
    -----
    Each block of experts takes one pass over the rows; if all fit into the memory limit, they are
    one block. `gram` takes separate passes, with as many experts in each as fit. The file's
    metadata have the job, a fingerprint of the inputs, the number of rows, and which experts saw
    few. The job's output, if requested, is what `run_job` would have written, and `run_job` can
    resume it.
    """
    job, out = as_job(job), os.path.realpath(out)
    bundle.check_bundle(out, resume, overwrite)
    check_report(report)
    directory, inputs = progress_directory(out), open_inputs(job)
    _check_out(out, inputs, wanted, resume, overwrite)
    begun = {} if overwrite else _read_begun(directory)
    file = _File(inputs, wanted, out, few_rows)
    asked: dict[str, Any] = {"resume": resume, "overwrite": overwrite}
    if resume and not begun and os.path.lexists(out):
        found = file.complete()
        if wanted.with_output:
            run_job(job, where, resume=True, chunk_rows=chunk_rows, wait=wait)
        _remove_rest(directory)
        return found
    with (
        deployed(where) as where,
        started(where, _files(job, wanted, out), wait, on_workers) as (threads, client),
    ):
        if on_gpus(where):
            raise JobError("statistics are collected on the host: run without --gpu")
        layout = lay_out(job, where, client, begun_ranks=begun.get("world_size"))
        course = decide_course(inputs, layout, wanted, chunk_rows, begun)
        if on_client is not None and client is not None:
            on_client(client)
        if on_course is not None:
            on_course(course)
        with (
            _alone(directory, anew=not begun),
            owned_ranks(client, layout.world_size) as owners,
            ExitStack() as stack,
        ):
            _write_begun(directory, course)
            by = computed_by(where, client, inputs)
            run = _Run(file, course, directory, asked, by, stack)
            wants_record = run.missing and (report or on_record)
            planned = run.plan() if wants_record else None
            watch = _Watch(run, on_progress)
            with watched(
                planned, client, owners, report, on_record, run.finish, run.report_details
            ):
                for step in run.steps():
                    compute_step(step, client, threads, watch.tell, wait)
                    memory.release()
            found = file.write(run)
    return replace(found, reports=reports_of(report, client) if planned else ())


@contextmanager
def _alone(directory: str, anew: bool) -> Iterator[None]:
    """Keep other processes away; with `anew`, remove what earlier ones left."""
    os.makedirs(directory, exist_ok=True)
    acquire_lock(directory)
    try:
        if anew:
            _discard(directory)
        yield
    finally:
        release_lock(directory)


def _discard(directory: str) -> None:
    """Remove all but the lock; begun.json first, without which nothing that is left counts."""
    for name in sorted(os.listdir(directory), key=lambda name: name != "begun.json"):
        if name != "lock":
            remove(os.path.join(directory, name))


def _remove_rest(directory: str) -> None:
    """Remove what is left of a finished collection, if a kill has stopped that."""
    if os.path.isdir(directory):
        with _alone(directory, anew=True):
            remove(directory)


def _check_out(out: str, inputs: Inputs, wanted: Wanted, resume: bool, overwrite: bool) -> None:
    """Raise if the statistics would replace an input or the output, or that one may not begin."""
    refuse_to_replace_inputs(out, None, name_inputs(inputs).values())
    if wanted.with_output and os.path.realpath(inputs.job.out) == out:
        raise JobError(
            f"{inputs.job.name}: the statistics would be written to {out}, which is the job's "
            "output; choose another path for them"
        )
    if wanted.with_output:
        check_existing(inputs.job.out, resume, overwrite)


def _files(job: Job, wanted: Wanted, out: str) -> dict[str, str]:
    """Return the files that all workers must see, by description."""
    files = files_of_job(replace(job, out=out))
    if wanted.with_output:
        files["the directory of the job's out"] = os.path.dirname(job.out)
    return files


class _Run:
    """The outputs of one collection: partial results, grams, and the job's own."""

    def __init__(
        self,
        file: _File,
        course: Course,
        directory: str,
        asked: Mapping[str, Any],
        by: ComputedBy,
        stack: ExitStack,
    ):
        self.inputs, self.course = file.inputs, course
        settings = file.settings | {"chunk_rows": course.decision.chunk_rows}
        named = name_inputs(course_inputs(self.inputs, course))

        def begin(array: da.Array, path: str, settings: Mapping[str, Any]) -> Output:
            output = store(
                array, path, inputs=named, settings=settings, compute=False, **asked
            )  # fmt: skip
            return stack.enter_context(output)

        self.placement = place_experts(self.inputs, course)
        self.collections = begin_all(self.inputs, course, file.wanted, self.placement)
        self.groups = [
            begin(one.groups, os.path.join(directory, f"groups-{b}.zarr"),
                  settings | {"block": str(block)})
            for b, (one, block) in enumerate(zip(self.collections, course.blocks, strict=True))
        ]  # fmt: skip
        self.grams = {
            name: begin(array, os.path.join(directory, f"{name}.zarr"), settings)
            for name, array in self.collections[0].grams.items()
        }
        y, ranks = self.collections[0].output, course.decision.layout.world_size
        self.output = None
        if y is not None:
            of_run = settings_of(self.inputs, ranks, self.placement, by)
            self.output = begin(y, self.inputs.job.out, of_run)

    @property
    def outputs(self) -> list[Output]:
        """Return all of these outputs."""
        return [*self.groups, *self.grams.values(), *([self.output] if self.output else [])]

    @property
    def missing(self) -> bool:
        """Whether anything is left to compute."""
        return any(output.missing for output in self.outputs)

    def steps(self) -> Iterator[Step]:
        """Yield what is to be computed, step by step; each must be done before the next."""
        first, *others = self.groups
        yield first if self.output is None else together([first, self.output])
        yield from others
        for block in self.course.gram_blocks:
            parts = [output.step(block) for output in self.grams.values()]
            if any(part.missing for part in parts):
                yield together(parts)

    def finish(self) -> None:
        """Finish all outputs, which gives them their final names."""
        for output in self.outputs:
            output.finish()

    def plan(self) -> PlanOfStatistics:
        """Return a plan of what is left to do."""
        experts = set().union(*(output.missing for output in self.grams.values()))
        return price_course(
            Pricing.of_job(self.inputs, self.course.decision), self.course, self.collections,
            self.placement, left=self._left(), grams_left=len(experts),
        )  # fmt: skip

    def report_details(self) -> dict[str, Any]:
        """Return arguments of `write_reports` that describe the run."""
        chunks, job = self.collections[0].chunks, self.inputs.job.name
        return {"missing": sorted(set().union(*self._left())), "blocks": chunks, "job": job}

    def _left(self) -> list[list[int]]:
        """Return how many token chunks each pass over the rows has left."""
        return [
            [chunk for group in output.missing for chunk in one.chunks_of(group)]
            for output, one in zip(self.groups, self.collections, strict=True)
        ]


class _Watch:
    """Counts the rows of finished groups; for `gram`, an expert counts as its share of all rows."""

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


class _File(NamedTuple):
    """The file of the statistics."""

    inputs: Inputs
    wanted: Wanted
    path: str
    few_rows: int

    @property
    def settings(self) -> dict[str, Any]:
        """Return what the statistics depend on apart from the inputs."""
        return {
            "layer_index": self.inputs.job.layer_index,
            "what": sorted(self.wanted.what),
            "rows": self.wanted.rows,
            "seed": self.wanted.seed,
            "placement": self.inputs.job.placement,
        }

    @property
    def fingerprint(self) -> str:
        """A fingerprint of inputs and settings."""
        made_of = {"inputs": describe(name_inputs(self.inputs)), "settings": self.settings}
        return xxhash.xxh3_64_hexdigest(json.dumps(made_of, sort_keys=True).encode())

    def complete(self) -> Collected:
        """Describe statistics that are complete already."""
        metadata = bundle.read_metadata(self.path)
        if metadata.get("fingerprint") != self.fingerprint:
            raise ValueError(
                f"{self.path} cannot be resumed: it holds statistics of other inputs, or other "
                "statistics; overwrite it, or write elsewhere"
            )
        try:
            bundle.check_content(self.path)
        except ReadError as error:
            raise ReadError(f"{error}; overwrite it to collect the statistics again") from error
        counts = bundle.open_arrays(self.path).get("coverage.rows")
        few = self._few(None if counts is None else counts.read(0, counts.shape[0]))
        return self._collected(metadata, few)

    def write(self, run: _Run) -> Collected:
        """Join the partial results, and write all statistics with their metadata."""
        found: Numbers = {}
        for output, collection in zip(run.groups, run.collections, strict=True):
            kept = open_source(output.path)
            rows = (kept.read(g, g + 1) for g in range(kept.shape[0]))
            for name, array in finish_groups(collection.layout, name_all, rows).items():
                found[name] = np.concatenate([found[name], array]) if name in found else array
        few = self._few(found.get("coverage.rows"))
        metadata = self._words(few, run.collections[0].missing)
        arrays = found | {name: open_source(output.path) for name, output in run.grams.items()}
        bundle.write_bundle(self.path, arrays, metadata)
        _discard(progress_directory(self.path))
        remove(progress_directory(self.path))
        return self._collected(metadata, few)

    def _few(self, counts: np.ndarray | None) -> dict[int, int] | None:
        """Return the rows of each expert that saw few; None if no rows were counted."""
        if counts is None:
            return None
        return {e: rows for e, rows in enumerate(counts.tolist()) if rows < self.few_rows}

    def _words(self, few: Mapping[int, int] | None, missing: Sequence[str]) -> dict[str, str]:
        """Return the metadata of the file."""
        job, wanted = self.inputs.job, self.wanted
        keys = {key: value for key, value in vars(job).items() if value is not None}
        metadata = {
            "format": f"dask_ep {__version__} statistics",
            "job": json.dumps(keys),
            "fingerprint": self.fingerprint,
            "rows": str(self.inputs.tokens.shape[0]),
            "what": json.dumps(list(wanted.what)),
            "rows_through_experts": str(wanted.rows),
            "missing": json.dumps(list(missing)),
            "coverage": json.dumps({"fewer_than": self.few_rows, "rows_of_experts": few}),
        }
        if job.layer_index is not None:
            metadata["layer_index"] = str(job.layer_index)
        return metadata

    def _collected(self, metadata: Mapping[str, str], few: Mapping[int, int] | None) -> Collected:
        rows = self.inputs.tokens.shape[0]
        return Collected(metadata, few, self.inputs.experts.num_experts, rows)


def _read_begun(directory: str) -> dict[str, Any]:
    """Read how the run to resume was started; empty if there is none."""
    path = os.path.join(directory, "begun.json")
    try:
        with open(path, encoding="utf-8") as file:
            begun = json.load(file)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; overwrite the statistics") from error
    keys = ("world_size", "chunk_rows", "block")
    if not isinstance(begun, dict) or not all(
        type(begun.get(key)) is int and begun[key] > 0 for key in keys
    ):
        raise ValueError(
            f"{path} must have whole numbers for {', '.join(keys)}, but holds {begun!r}; overwrite "
            "the statistics"
        )
    return begun


def _write_begun(directory: str, course: Course) -> None:
    write_text(os.path.join(directory, "begun.json"), json.dumps(course.to_json()))
