"""How is the report made that compares a run with its plan?

    before    plan_run: a plan of the missing blocks, for which the routing is read once
    during    on threads    Recorder
              on workers    Dask's task stream, what services record, events, changes of owners,
                            memory of the processes
    after     report.html, and on workers report-dask.html, which Dask writes

Workers are queried before the first task and after the last. Dask keeps the last 100,000 tasks, so
the record of a longer run has only these. What a worker recorded is lost if it dies.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from dask.utils import format_bytes
from distributed import Client, WorkerPlugin, performance_report

from dask_ep.arrays.memory import release
from dask_ep.cluster.ownership import Owners
from dask_ep.graph import tally
from dask_ep.graph.tally import HERE, Serving
from dask_ep.jobs.build import Inputs
from dask_ep.jobs.in_passes import PassesDone
from dask_ep.jobs.price_job import Pricing
from dask_ep.laws.decision import Decision
from dask_ep.placement.placement import Placement
from dask_ep.pricing.price import Plan
from dask_ep.pricing.report import check_drawing, check_place, write_run_report
from dask_ep.pricing.trace import Record, Recorder, forget_peak_memory, peak_memory

OnRecord = Callable[[Plan, Record], Any]


def plan_run(
    inputs: Inputs, decision: Decision, placement: Placement | None, missing: Sequence[int]
) -> Plan:
    """Price what is left of a job; this runs the router of a layer.

    Parameters
    ----------
    inputs, decision, placement : of the run
    missing : indices of the chunks that it will compute
    """
    pricing = Pricing.of_job(inputs, decision)
    return pricing.price(decision, placement=placement, only=missing)


def check_report(path: str | os.PathLike | None) -> None:
    """Raise if a report cannot be drawn or written, before anything is read."""
    if path is not None:
        check_drawing()
        check_place(path)


@contextmanager
def watched(
    planned: Plan | None,
    client: Client | None,
    owners: Owners | None,
    report: str | os.PathLike | None,
    on_record: OnRecord | None,
    finish: Callable[[], Any],
    report_details: Callable[[], dict[str, Any]],
) -> Iterator[None]:
    """Record what runs in the `with` block, and write its reports, if there is a plan.

    `report_details` is called at the end, and returns further arguments for `write_reports`.
    """
    if planned is None:
        yield
        finish()
        return
    whole = nullcontext() if report is None or client is None else dask_reported(report)
    with whole:
        with _on_threads() if client is None else _on_workers(client, owners) as records:
            yield
        finish()
    if report is not None:
        write_reports(report, planned, records[0], **report_details())
    if on_record is not None:
        on_record(planned, records[0])


def write_reports(
    path: str | os.PathLike,
    planned: Plan,
    record: Record,
    *,
    missing: Sequence[int],
    blocks: int,
    job: str,
    passes: PassesDone | None = None,
) -> None:
    """Write a run's report, with a link to Dask's if there is one."""
    note = ""
    if len(missing) < blocks:
        note = (
            f"This run resumed an earlier one: it computed {len(missing)} of {blocks} chunks, and "
            "all figures are of these."
        )
        record = record.renumbered(missing)
    other = dask_report(path)
    write_run_report(
        path,
        planned,
        record,
        job=job,
        note=note,
        more=() if passes is None else _of_passes(planned, passes),
        link=other.name if other.exists() else None,
    )


def reports_of(path: str | os.PathLike | None, client: Client | None) -> tuple[Path, ...]:
    """Return the paths of a run's reports: ours, and with workers Dask's."""
    if path is None:
        return ()
    return (Path(path),) if client is None else (Path(path), dask_report(path))


def dask_report(path: str | os.PathLike) -> Path:
    """Return the path of Dask's report, next to ours.

    Examples
    --------
    >>> dask_report("out/run.html").as_posix()
    'out/run-dask.html'
    """
    path = Path(path)
    return path.with_name(f"{path.stem}-dask{path.suffix}")


def _of_passes(planned: Plan, passes: PassesDone) -> list[tuple[str, str, str]]:
    """Return what the passes took, planned and measured."""
    used = int((planned.expert_rows > 0).sum()) * passes.passes.passes
    rows = [("experts read", f"{used:,}", f"{sum(passes.reads.values()):,}")]
    if passes.passes.spill_bytes:
        moved = format_bytes(passes.passes.moved_bytes)
        rows.append(("rows written to disk", moved, format_bytes(passes.spilled_bytes)))
    return rows


@contextmanager
def dask_reported(path: str | os.PathLike) -> Iterator[None]:
    """Write Dask's own report of what runs in the `with` block, unless it raises."""
    report = performance_report(filename=os.fspath(dask_report(path)), mode="inline")
    report.__enter__()
    yield
    report.__exit__(None, None, None)


@contextmanager
def _on_threads() -> Iterator[list[Record]]:
    made: list[Record] = []
    release()
    forget_peak_memory()
    begun = time.perf_counter()
    with Recorder() as recorder:
        yield made
    seconds = time.perf_counter() - begun
    made.append(replace(recorder.record(peak_memory()), seconds=seconds))


@contextmanager
def _on_workers(client: Client, owners: Owners | None) -> Iterator[list[Record]]:
    made: list[Record] = []
    client.run(forget_peak_memory)
    clock = client.run_on_scheduler(time.time)
    client.get_task_stream(start=0, stop=0)  # starts recording
    begun = time.perf_counter()
    with servings_of(client) as servings:
        yield made
        seconds = time.perf_counter() - begun
    peaks = client.run(peak_memory, on_error="ignore").values()
    record = Record.of_task_stream(
        client.get_task_stream(start=clock),
        servings,
        peak_bytes=max(peaks, default=None),
        events=[event for event in _events(client, owners) if event[0] >= clock],
    )
    made.append(replace(record, seconds=seconds))


class _Keep(WorkerPlugin):
    """Makes workers record what they serve, including workers that join later."""

    name = "dask-ep-record"

    def setup(self, worker: Any) -> None:
        tally.record()

    def teardown(self, worker: Any) -> None:
        tally.take()


@contextmanager
def servings_of(client: Client) -> Iterator[list[Serving]]:
    """Record what workers serve in the `with` block; the list has it at the end, if possible."""
    kept: list[Serving] = []
    client.register_plugin(_Keep())
    try:
        yield kept
    except BaseException:
        with suppress(Exception):  # the cluster may have failed
            client.unregister_worker_plugin(_Keep.name)
        raise
    for of_worker in client.run(_take, on_error="ignore").values():
        kept += of_worker
    client.unregister_worker_plugin(_Keep.name)


def _take(dask_worker: Any) -> list[Serving]:
    """Return what a worker has recorded, with times of the scheduler's clock."""
    late, place = dask_worker.scheduler_delay, {HERE: dask_worker.address}
    return [
        s._replace(
            asked_by=place.get(s.asked_by, s.asked_by),
            served_by=place.get(s.served_by, s.served_by),
            start=s.start + late,
            stop=s.stop + late,
        )
        for s in tally.take()
    ]


def _events(client: Client, owners: Owners | None) -> list[tuple[float, str]]:
    """Return workers that joined or left, and ranks that moved: (time, text), in order."""
    words = {"add-worker": "came", "remove-worker": "left"}
    events = [
        (when, f"worker {event['worker']} {words[event['action']]}")
        for when, event in client.get_events("all")
        if isinstance(event, dict) and event.get("action") in words
    ]
    for change in [] if owners is None else owners.changes:
        before, after = (
            ", ".join(of_rank) or "no worker" for of_rank in (change.before, change.after)
        )
        events.append(
            (change.time, f"rank {change.rank} moved from {before} to {after}: {change.why}")
        )
    return sorted(events)
