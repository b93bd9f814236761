"""How is a job carried out: on threads, local processes, GPUs, or a cluster?

    job ── build ──> y ── store ──> one task per missing block ──> `Progress`, again and again
                          on `backends.Threads` | `Processes` | `Gpus` | `Cluster`

The same job gives the same file everywhere. A run that was stopped, by Ctrl-C or worse, is resumed
by `resume`.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from queue import SimpleQueue
from typing import Any

from dask.system import CPU_COUNT
from distributed import Client, as_completed, futures_of
from distributed.client import FutureCancelledError
from distributed.comm import CommClosedError
from distributed.scheduler import KilledWorker

from dask_ep.cluster.dask_internals import result_of, scheduler_address
from dask_ep.cluster.interrupts import Aside, Wait
from dask_ep.cluster.ownership import own_experts
from dask_ep.cluster.workers import Workers
from dask_ep.jobs.backends import (
    ALL_THREADS,
    Deployed,
    Threads,
    Where,
    computed_by,
    deployed,
    files_of_job,
    lay_out,
    started,
)
from dask_ep.jobs.build import Built, build, open_inputs
from dask_ep.jobs.decide import decide
from dask_ep.jobs.in_passes import InPasses, PassesDone, free_for_rows
from dask_ep.jobs.job import Job, as_job
from dask_ep.jobs.notes import tell_notes
from dask_ep.jobs.result import Progress, RunResult
from dask_ep.jobs.resumed_run import Begun, read_begun
from dask_ep.jobs.run_report import OnRecord, check_report, plan_run, reports_of, watched
from dask_ep.jobs.save_routing import check_saved_routing, stored_routing
from dask_ep.laws.travel import ALL_ROWS, Travel
from dask_ep.storage.output import SERVED, SPILLED, Output, Receipt, Step, together
from dask_ep.storage.storage import check_existing, store


def run_job(
    job: Job | str | os.PathLike,
    where: Where | Deployed = ALL_THREADS,
    *,
    resume: bool = False,
    overwrite: bool = False,
    chunk_rows: int | None = None,
    travel: Travel = ALL_ROWS,
    on_note: Callable[[str], Any] | None = None,
    on_progress: Callable[[Progress], Any] | None = None,
    on_client: Callable[[Client], Any] | None = None,
    on_workers: Callable[[Workers], Any] | None = None,
    report: str | os.PathLike | None = None,
    on_record: OnRecord | None = None,
    save_routing: str | os.PathLike | None = None,
    wait: Wait = SimpleQueue.get,
) -> RunResult:
    """Compute a job's output and write it.

    Parameters
    ----------
    job : a `Job`, or the path of a job file
    where : `Threads`, `Processes`, `Gpus`, `Cluster`, or `Deployed`, a cluster that is started for
        the job and shut down after it
    resume : continue a stopped run, with its ranks, and with its chunks unless `chunk_rows`
        differs: then smaller chunks are computed, and joined to its blocks. A run in passes
        continues as it began
    overwrite : start again, even if the output exists
    chunk_rows : rows of a token chunk; by default about 32 MiB of rows, or what fits the memory
        limit
    travel : whether rows travel to experts, or experts to rows; see `laws.travel.Travel`. Unless
        only rows travel, the routing is read once beforehand. A resumed run keeps what was chosen
    on_note : called at the start with a sentence for everything that looks like a mistake in the
        job; see `dask_ep.jobs.notes`
    on_progress : called at the start, and when blocks are done
    on_client : called when the workers are ready, if there are any, for example to show the
        dashboard
    on_workers : called with the `Workers` of a cluster while the run waits for them, and when one
        joins or is lost; from another thread
    report : HTML file that compares the run with its plan, written at the end unless nothing was
        left to run; with workers, Dask's own report is written next to it, as ``NAME-dask.html``
    on_record : called with the `Plan` and the `Record` of the run, at the end unless nothing was
        left to run; as with `report`, a resumed run keeps its chunks
    save_routing : where to write the indices from the layer's router, (n, k) int32, in the same
        run; the top-k weights, (n, k) float32, are written next to them, see
        `dask_ep.jobs.save_routing.path_of_weights`
    wait : function that waits for the next item of a queue; an exception from it stops the run, as
        Ctrl-C does with `dask_ep.cluster.interrupts.Interrupts.wait`

    Returns
    -------
    RunResult
        What was done, and how.

    Raises
    ------
    FileExistsError
        If the output exists, and neither `resume` nor `overwrite` is set.
    ValueError
        If the inputs do not fit together, or are not those of the run to resume.
    DoesNotFit
        A MemoryError: the job does not fit into `where.memory_limit` in this way. Its `proposal`
        has options that do fit. It is raised before anything is read.
    ConnectionError
        If there is no scheduler, or if it is lost during the run.
    UnfitClusterError
        If workers lack the job's files, or versions differ; it is raised before anything runs.
    NoDeviceError
        If a GPU is requested and CuPy or the GPU is missing; it is raised before anything runs.

    Notes
    -----
    Each product uses one BLAS thread: this is set for the whole process while the job runs on
    threads, and permanently on workers. Peak memory is at most `laws.memory_law.need`: on threads,
    with one rank, experts + (threads * 3 + 2) token chunks + scratch memory of the threads, also
    for decoding stored chunks, + 180 MB.
    How the job runs is decided by `dask_ep.jobs.decide.decide`: if the experts do not all fit into
    `where.memory_limit`, or into that of a cluster's workers, they are held as stored, or else
    processed in passes (`dask_ep.laws.passes`). In passes, results equal the ordinary ones to 1e-6,
    and are the same bits each time for the same passes. After an exception, including
    KeyboardInterrupt, `resume` continues the output; on threads, the blocks being computed are
    finished before the exception is raised.
    """
    job = as_job(job)
    check_report(report)
    check_existing(job.out, resume, overwrite)
    if save_routing is not None:
        check_saved_routing(job, save_routing, resume, overwrite)
    begun = read_begun(job.out) if resume else None
    where = _as_begun(where, begun)
    inputs = open_inputs(job)
    tell_notes(inputs, on_note)
    with (
        deployed(where) as where,
        started(where, files_of_job(job), wait, on_workers) as (threads, client),
    ):
        by = computed_by(where, client, inputs)
        layout = lay_out(job, where, client, begun_ranks=begun.world_size if begun else None)
        work, free = inputs.work(layout.on_devices), partial(free_for_rows, inputs)
        asked: dict[str, Any] = {"chunk_rows": chunk_rows, "travel": travel}
        decision = decide(work, layout, **asked, free=free, begun=begun)
        passes = decision.passes
        walk = InPasses(inputs, passes, layout.workers, begun) if passes else None
        with owned_ranks(client, layout.workers if passes else layout.world_size) as owners:
            built = build(inputs, decision, by, exchange=walk)
            with (
                _stored(built, walk, job, begun, resume, overwrite) as output,
                stored_routing(built, save_routing, output.rows, resume, overwrite) as routing,
            ):
                planned = None
                if output.missing and (report or on_record):
                    _check_recorded(built.y.chunks[0], output.rows)
                    planned = plan_run(inputs, decision, built.placement, output.missing)
                if client is not None and on_client is not None:
                    on_client(client)
                watch = _Watch(output, on_progress, job.name, walk)
                with watched(
                    planned, client, owners, report, on_record, output.finish, watch.report_details
                ):
                    for step in _steps(output, walk, routing):
                        compute_step(step, client, threads, watch.tell, wait)
                    done = watch.progress()
    return RunResult.of(
        done, job.out, decision=decision, multiplied_by=by.library, passes=watch.passes_done(),
        reports=reports_of(report, client) if planned else (),
    )  # fmt: skip


def _as_begun(where: Where | Deployed, begun: Begun | None) -> Where | Deployed:
    """Limit threads, if their number is not given, to that of a resumed run in passes."""
    passes = None if begun is None else begun.passes
    if passes is not None and isinstance(where, Threads) and where.count is None:
        return replace(where, count=min(CPU_COUNT, passes.threads))
    return where


def _stored(
    built: Built,
    walk: InPasses | None,
    job: Job,
    begun: Begun | None,
    resume: bool,
    overwrite: bool,
) -> Output:
    """Begin the output, or resume it in the blocks in which it was begun."""
    y, rows = built.y, begun.rows if begun else None
    return store(
        y if rows is None or y.chunks[0] == rows else y.rechunk({0: rows}),
        job.out,
        inputs=built.inputs,
        settings={**built.settings, **(walk.settings if walk else {})},
        resume=resume,
        overwrite=overwrite,
        stored_rows=walk.passes.stored_rows if walk else None,
        compute=False,
    )


def _steps(output: Output, walk: InPasses | None, routing: Sequence[Output]) -> Iterable[Step]:
    """Yield what is to be computed, step by step; each must be done before the next.

    The routing is saved by the tasks that need it. In passes these run group by group, so the
    tokens are read and routed once more beforehand.
    """
    if walk is None:
        yield together([output, *routing]) if routing else output
        return
    if routing:
        yield together(routing)
    yield from walk.steps(output)


def _check_recorded(chunks: Sequence[int], rows: Sequence[int]) -> None:
    """Raise if a run is to be recorded whose chunks differ from those it began with."""
    if tuple(chunks) != tuple(rows):
        raise ValueError(
            "a report compares run and plan chunk by chunk, but this run began with chunks of "
            f"{max(rows)} rows, not {max(chunks)}: resume with those, or without a report"
        )


def owned_ranks(client: Client | None, world_size: int) -> contextlib.AbstractContextManager:
    """Give the ranks owners inside a `with` block, assuming equal loads of all ranks.

    Loads are known only if the routing was read for a placement by load, which makes them equal.
    Otherwise the routing is not read in advance, and reading it just for the loads would cost as
    much as ``placement = "balanced"``, which gains more.
    """
    if client is None or world_size == 1:
        return contextlib.nullcontext()
    return own_experts(client, world_size)


def compute_step(
    step: Step,
    client: Client | None,
    threads: int,
    tell: Callable[[Receipt], Any],
    wait: Wait,
) -> None:
    """Run the tasks of a step, on threads or a client's workers, and pass on each receipt."""
    if client is not None:
        _compute_on_client(step, client, tell, wait)
        return
    pool = ThreadPoolExecutor(threads, thread_name_prefix="dask-ep")
    aside = Aside(lambda give: step.compute(give, scheduler="threads", pool=pool), wait)
    try:
        for receipt in aside:
            tell(receipt)
    finally:
        pool.shutdown(cancel_futures=True)  # running tasks finish, and no others start
        aside.join()


def _compute_on_client(
    step: Step, client: Client, tell: Callable[[Receipt], Any], wait: Wait
) -> None:
    if not step.missing:
        return
    address = scheduler_address(client)  # not known any more once the connection is lost
    futures = futures_of(client.persist(step))

    def gather(give: Callable[[Receipt], Any]) -> None:
        for future in as_completed(futures, loop=client.loop):
            give(result_of(future))

    try:
        for receipt in Aside(gather, wait):
            tell(receipt)
    except (FutureCancelledError, CommClosedError) as error:
        raise ConnectionError(
            f"the scheduler at {address} has stopped or has dropped the job; "
            "finished blocks are kept, and --resume computes the others"
        ) from error
    except KilledWorker as error:
        error.add_note(
            "perhaps for lack of memory: fewer --chunk-rows, or a --memory-limit below what is "
            "free, take less; finished blocks are kept, and --resume computes the others"
        )
        raise
    finally:
        client.cancel(futures)


# --- progress --------------------------------------------------------------------------------


class _Watch:
    """Counts rows, and reports progress."""

    def __init__(
        self,
        output: Output,
        tell: Callable[[Progress], Any] | None,
        job: str,
        walk: InPasses | None,
    ):
        self._job, self._walk, self._output = job, walk, output
        self._tell, self._start = tell, time.monotonic()
        self._before = sum(output.rows[block] for block in output.done_before)
        self._left, self._done = sum(output.rows) - self._before, 0
        self._worked = 0.0  # work on unfinished blocks, in rows
        self.spilled_bytes = 0
        self._not_finite, self._first_not_finite = 0, -1
        if tell is not None:
            tell(self.progress())

    def tell(self, receipt: Receipt) -> None:
        if receipt.path not in ("", self._output.path):
            return
        self._done += receipt.rows
        self._left -= receipt.rows
        self.spilled_bytes += 0 if receipt.rows else receipt.nbytes
        if receipt.not_finite:
            self._not_finite += receipt.not_finite
            firsts = {self._first_not_finite, receipt.first_not_finite} - {-1}
            self._first_not_finite = min(firsts)
        before = (SPILLED + SERVED) * receipt.rows
        self._worked = max(self._worked + receipt.worked - before, 0.0)
        if self._tell is not None:
            self._tell(self.progress())

    def passes_done(self) -> PassesDone | None:
        """Return what the passes took; None unless experts are processed in passes."""
        return None if self._walk is None else self._walk.done(self.spilled_bytes)

    def report_details(self) -> dict[str, Any]:
        """Return arguments of `write_reports` that describe the run."""
        return {
            "missing": self._output.missing,
            "blocks": len(self._output.rows),
            "job": self._job,
            "passes": self.passes_done(),
        }

    def progress(self) -> Progress:
        worked = min(int(self._worked), self._left)
        seconds = time.monotonic() - self._start
        return Progress(
            self._done + worked,
            self._left - worked,
            self._before,
            seconds,
            not_finite=self._not_finite,
            first_not_finite=self._first_not_finite,
        )
