"""What did a run do, task by task, and who served what?

    threads     with Recorder() as recorder: ...        ──> recorder.record()
    cluster     Dask's task stream, and what services record (`run_report`)
                                                        ──> Record.of_task_stream(stream, servings)

A `Record` holds when and where each task of a layer ran, and each rank served its part of each
chunk (`tally`). `dask_ep.pricing.report` compares it with the plan.
"""

from __future__ import annotations

import re
import resource
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from dask.callbacks import Callback

from dask_ep.graph import tally
from dask_ep.graph.keys import TaskKey, read_key
from dask_ep.graph.tally import HERE, Serving

STEPS = ("experts", "ranks", "chunk", "send", "dispatch", "receipt", "sum", "gram")
"""Steps of the tasks of a layer; those from "send" on are for experts in passes, the last one for
statistics."""

LAST = ("chunk", "sum", "usage", "see_router")
"""Last step of a chunk, unless it is stored: the first of these that occurs. With the last two no
row goes through an expert."""

LAYER_STEPS = ("read", "route", "layer", "store")
"""Steps of the tasks around them."""


class Span(NamedTuple):
    """One task, from its start to its stop."""

    key: TaskKey
    step: str
    #: one of `STEPS` and `LAYER_STEPS`, or "transfer"
    worker: str
    start: float
    #: seconds since the first task began
    stop: float

    @property
    def chunk(self) -> int:
        """The chunk; -1 for the experts of a rank, and for rows of several chunks."""
        return self.key.chunk

    @property
    def rank(self) -> int:
        """The rank; -1 for steps that belong to none."""
        return self.key.rank


class Service(NamedTuple):
    """What one rank has served at one worker."""

    rank: int
    worker: str
    rows: int
    bytes_in: int
    bytes_out: int
    busy: float
    #: fraction of the run's time in which it computed
    queue: float
    #: rows that waited, on average over the run


class Event(NamedTuple):
    """Something that happened in the run: a worker lost, a rank moved."""

    time: float
    #: seconds since the first task began
    what: str


@dataclass(frozen=True)
class Record:
    """What a run did."""

    spans: tuple[Span, ...]
    seconds: float
    #: from the first start to the last stop
    peak_bytes: int | None = None
    #: memory of the process that used the most, if measured
    events: tuple[Event, ...] = ()
    servings: tuple[Serving, ...] = ()
    #: each rank's part of each chunk; times are like those of the spans

    # --- tasks ---

    @property
    def tasks(self) -> int:
        """Number of the layer's tasks that ran, each counted once."""
        return len({s.key for s in self._of_layer})

    @property
    def repeated(self) -> int:
        """Number of times that tasks ran again: work that was lost with a worker."""
        return len(self._of_layer) - self.tasks

    @property
    def _of_layer(self) -> list[Span]:
        counted = {*STEPS, self._last}
        return [s for s in self.spans if s.step in counted]

    @property
    def _last(self) -> str:
        """The last step of chunks; on workers, tasks that end with storing have its name."""
        steps = Counter(span.step for span in self.spans)
        if steps["gram"]:  # second moments are stored by expert
            return next((s for s in LAST if steps[s]), "gram")
        return next((s for s in LAST if steps[s] and steps[s] >= steps["store"]), "store")

    def finished(self) -> list[tuple[float, int]]:
        """Return when each chunk was done, first to last: (seconds, chunk)."""
        done = {chunk: span.stop for chunk, span in self._last_runs().items()}
        return sorted((when, chunk) for chunk, when in done.items())

    def chunks_of_workers(self) -> dict[str, int]:
        """Return how many chunks each worker has finished."""
        counted = Counter(span.worker for span in self._last_runs().values())
        return dict(sorted(counted.items()))

    def _last_runs(self) -> dict[int, Span]:
        """Return the last run of each chunk's last task."""
        last = self._last
        spans = sorted((s for s in self.spans if s.step == last), key=lambda s: s.stop)
        return {span.chunk: span for span in spans if span.chunk >= 0}

    # --- what ranks have served ---

    @property
    def served_again(self) -> int:
        """How often a rank served its part of a chunk again."""
        return len(self.servings) - len(self._once())

    @property
    def exchanged_bytes(self) -> int:
        """Bytes of all packets and answers between workers."""
        return sum(s.bytes_in + s.bytes_out for s in self.servings)

    def received_rows(self) -> dict[int, int]:
        """Return how many rows each rank has served, counting each chunk once."""
        rows: Counter[int] = Counter()
        for serving in self._once():
            rows[serving.rank] += serving.rows
        return dict(sorted(rows.items()))

    def workers(self) -> list[str]:
        """Return all workers with chunks or ranks, by the lowest rank they served; others last."""
        lowest: dict[str, int] = {}
        for serving in self._once():
            lowest[serving.served_by] = min(
                serving.rank, lowest.get(serving.served_by, serving.rank)
            )
        present = {*lowest, *self.chunks_of_workers()}
        return sorted(present, key=lambda worker: (lowest.get(worker, sys.maxsize), worker))

    def homes(self) -> dict[int, int]:
        """Return the index of each chunk's worker in `workers`."""
        number = {worker: n for n, worker in enumerate(self.workers())}
        return {chunk: number[span.worker] for chunk, span in sorted(self._last_runs().items())}

    def traffic_rows(self, world_size: int) -> np.ndarray:
        """Return (W, R) rows from the chunks of each of the `workers` to each rank."""
        workers = self.workers()
        rows = np.zeros((len(workers), world_size), np.int64)
        number = {worker: n for n, worker in enumerate(workers)}
        for serving in self._once():
            if serving.asked_by in number:
                rows[number[serving.asked_by], serving.rank] += serving.rows
        return rows

    def services(self) -> list[Service]:
        """Return what each rank has served at each worker, in the order of ranks."""
        parts: dict[tuple[int, str], list[Serving]] = defaultdict(list)
        for serving in self.servings:
            parts[serving.rank, serving.served_by].append(serving)
        seconds = self.seconds or 1.0
        return [
            Service(
                rank,
                worker,
                sum(s.rows for s in of),
                sum(s.bytes_in for s in of),
                sum(s.bytes_out for s in of),
                sum(s.stop - s.start for s in of) / seconds,
                sum(s.waited * s.rows for s in of) / seconds,
            )
            for (rank, worker), of in sorted(parts.items())
        ]

    def _once(self) -> list[Serving]:
        """Return the last serving of each rank's part of each chunk."""
        return list({(s.chunk, s.rank): s for s in self.servings}.values())

    # --- forms ---

    def renumbered(self, chunks: Sequence[int]) -> Record:
        """Renumber chunks by their position in `chunks`, those that a resumed run computed."""
        place = {chunk: n for n, chunk in enumerate(chunks)} | {-1: -1}
        spans = tuple(
            s._replace(key=s.key._replace(chunk=place[s.chunk]))
            for s in self.spans
            if s.chunk in place
        )
        servings = tuple(
            s._replace(chunk=place[s.chunk]) for s in self.servings if s.chunk in place
        )
        return replace(self, spans=spans, servings=servings)

    @classmethod
    def of_task_stream(
        cls,
        stream: Iterable[Mapping[str, Any]],
        servings: Iterable[Serving] = (),
        *,
        peak_bytes: int | None = None,
        events: Sequence[tuple[float, str]] = (),
    ) -> Record:
        """Make a record from the output of `distributed.get_task_stream`.

        Parameters
        ----------
        stream : records with "key", "worker" and "startstops"
        servings : what the workers have recorded during the run
        peak_bytes : see `Record`
        events : (time, text), with times like those of the stream (seconds since 1970)
        """
        spans = []
        for task in stream:
            key = _layer_key(task["key"])
            if key is None:
                continue
            for part in task["startstops"]:
                if part["action"] in ("compute", "transfer"):
                    step = key.step if part["action"] == "compute" else "transfer"
                    spans.append(Span(key, step, task["worker"], part["start"], part["stop"]))
        return _from_zero(spans, servings, peak_bytes, events)


class Recorder(Callback):
    """Records the tasks of layers that Dask's local schedulers run inside its `with` block.

    Examples
    --------
    >>> import dask.array as da, numpy as np
    >>> from dask_ep import expert_parallel
    >>> from dask_ep.pricing.trace import Recorder
    >>> tokens, routing = da.ones((4, 2), chunks=2), da.from_array(np.array([0, 1, 1, 1]), chunks=2)
    >>> y = expert_parallel(tokens, routing, np.ones((2, 2, 3)), world_size=2)
    >>> with Recorder() as recorder:
    ...     _ = y.compute(scheduler="sync")
    >>> record = recorder.record()
    >>> record.tasks, record.received_rows()
    (5, {0: 1, 1: 3})
    """

    def __init__(self) -> None:
        super().__init__(pretask=self._begin, posttask=self._end)
        self._begun: dict[Any, float] = {}
        self._threads: dict[Any, str] = {}
        self._spans: list[Span] = []
        self._servings: list[Serving] = []

    def __enter__(self) -> Recorder:
        tally.record()
        return super().__enter__()

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        self._servings += tally.take()

    def record(self, peak_bytes: int | None = None) -> Record:
        """Return what was recorded in the block."""
        thread = {span.chunk: span.worker for span in self._spans if span.step == "chunk"}
        servings = [
            s._replace(asked_by=where, served_by=where)
            for s in self._servings
            for where in [thread.get(s.chunk, HERE)]
        ]
        return _from_zero(self._spans, servings, peak_bytes, ())

    def _begin(self, key: Any, graph: Any, state: Any) -> None:
        self._begun[key] = tally.now()

    def _end(self, key: Any, result: Any, graph: Any, state: Any, worker: Any) -> None:
        start, of_layer = self._begun.pop(key), _layer_key(key)
        if of_layer is not None:
            name = f"thread {self._threads.setdefault(worker, str(len(self._threads)))}"
            self._spans.append(Span(of_layer, of_layer.step, name, start, tally.now()))


def forget_peak_memory() -> None:
    """Reset `peak_memory`, if the system can: only Linux does."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Return the peak memory of this process so far, in bytes."""
    try:  # the resource usage of a process starts with the peak of its parent
        status = Path("/proc/self/status").read_text()
        if found := re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE):
            return int(found[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _layer_key(key: Any) -> TaskKey | None:
    """Parse a key; None if a record does not keep its step."""
    found = read_key(key)
    return found if found is not None and found.step in (*STEPS, *LAYER_STEPS, *LAST) else None


def _from_zero(
    spans: Iterable[Span],
    servings: Iterable[Serving],
    peak_bytes: int | None,
    events: Sequence[tuple[float, str]],
) -> Record:
    """Make a record whose times begin with its first task."""
    tasks = sorted(spans, key=lambda one: one.start)
    zero = tasks[0].start if tasks else 0.0
    return Record(
        tuple(s._replace(start=s.start - zero, stop=s.stop - zero) for s in tasks),
        max((s.stop - zero for s in tasks), default=0.0),
        peak_bytes,
        tuple(Event(when - zero, what) for when, what in events),
        tuple(
            s._replace(start=s.start - zero, stop=s.stop - zero)
            for s in sorted(servings, key=lambda one: one.start)
        ),
    )
