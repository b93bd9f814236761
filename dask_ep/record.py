"""What did a run do, task by task?

    threads     with Recorder() as recorder: ...        ──> recorder.record()
    cluster     with get_task_stream(client) as s: ...  ──> Record.of_task_stream(s.data)

A `Record` holds when and where each task of a layer ran and how much it passed on, to be laid
beside the plan: `dask_ep.report`.
"""

from __future__ import annotations

import ast
import re
import resource
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from dask.callbacks import Callback

STEPS = ("experts", "send", "dispatch", "receipt", "sum")
"""What the tasks of a layer do: its keys in `pipeline`, without "ep_"."""

BESIDE = ("read", "route", "layer", "store")
"""What the tasks around it do: its keys in `storage`, `lazy_routing` and `layer`."""


class Span(NamedTuple):
    """One task, from its start to its stop."""

    step: str
    #: one of `STEPS` and `BESIDE`, or "transfer"
    chunk: int
    #: -1 for the experts of a rank, and for rows of several chunks
    rank: int
    #: -1 for what no rank does
    worker: str
    start: float
    #: seconds since the first task began
    stop: float
    nbytes: int
    #: of the result
    part: tuple[int, ...] = ()
    #: which of several tasks of this step, chunk and rank, where there are several

    @property
    def task(self) -> tuple[Any, ...]:
        """The same for all runs of a task."""
        return self.step, self.chunk, self.rank, self.part


class Event(NamedTuple):
    """Something that befell the run: a worker lost, a rank moved."""

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
    #: memory of the process that used most, if it was measured
    events: tuple[Event, ...] = ()

    @property
    def tasks(self) -> int:
        """Tasks of the layer that ran, each once however often it was run."""
        return len({s.task for s in self._of_layer})

    @property
    def repeated(self) -> int:
        """Runs of tasks beyond their first: work that was lost with a worker."""
        return len(self._of_layer) - self.tasks

    @property
    def _of_layer(self) -> list[Span]:
        counted = {*STEPS, self._last}
        return [s for s in self.spans if s.step in counted]

    @property
    def _last(self) -> str:
        """The step that chunks end with: most sums may be made by the tasks that store them."""
        steps = Counter(span.step for span in self.spans)
        if steps["sum"] and steps["sum"] >= steps["store"]:
            return "sum"
        return "store" if steps["send"] else "dispatch"  # one rank has neither send nor sum

    @property
    def exchanged_bytes(self) -> int:
        """Bytes of all packets and all answers, each counted once."""
        size = {
            (s.step, s.chunk, s.rank): s.nbytes
            for s in self.spans
            if s.step in ("send", "dispatch")
        }
        return sum(size.values()) if any(step == "send" for step, _, _ in size) else 0

    def received_rows(self, reply_row_bytes: int) -> dict[int, int]:
        """Rows that each rank answered, from the bytes of its answers."""
        size = {(s.chunk, s.rank): s.nbytes for s in self.spans if s.step == "dispatch"}
        rows: dict[int, int] = defaultdict(int)
        for (_, rank), nbytes in size.items():
            rows[rank] += nbytes // reply_row_bytes
        return dict(sorted(rows.items()))

    def traffic_rows(self, reply_row_bytes: int, world_size: int) -> tuple[list[str], np.ndarray]:
        """Rows from each worker to each rank.

        Returns
        -------
        workers : list of W addresses, by the lowest rank that they played; others last
        rows : (W, R) int64
        """
        made = {(s.chunk, s.rank): s.worker for s in self.spans if s.step == "send"}
        answers = {(s.chunk, s.rank): s for s in self.spans if s.step == "dispatch"}
        lowest: dict[str, int] = {}
        for (_, rank), span in answers.items():
            lowest[span.worker] = min(rank, lowest.get(span.worker, world_size))
        present = {*made.values(), *lowest}
        workers = sorted(present, key=lambda worker: (lowest.get(worker, world_size), worker))
        number = {worker: n for n, worker in enumerate(workers)}
        rows = np.zeros((len(workers), world_size), np.int64)
        for (chunk, rank), worker in made.items():
            if (chunk, rank) in answers:
                answered = answers[chunk, rank].nbytes // reply_row_bytes
                rows[number[worker], rank] += answered
        return workers, rows

    @property
    def moved_bytes(self) -> int:
        """Bytes of the packets and answers that were used on another worker than they were made."""
        at = {(s.step, s.chunk, s.rank): s for s in self.spans if s.step in STEPS}
        moved = 0
        for (step, chunk, rank), span in at.items():
            to = {"send": ("dispatch", chunk, rank), "dispatch": ("sum", chunk, -1)}.get(step)
            if to in at and at[to].worker != span.worker:
                moved += span.nbytes
        return moved

    def renumbered(self, chunks: Sequence[int]) -> Record:
        """Number chunks by their place in `chunks`: those that a resumed run has computed."""
        place = {chunk: n for n, chunk in enumerate(chunks)} | {-1: -1}
        spans = tuple(s._replace(chunk=place[s.chunk]) for s in self.spans if s.chunk in place)
        return replace(self, spans=spans)

    def finished(self) -> list[tuple[float, int]]:
        """When each chunk was done, first to last: (seconds, chunk)."""
        last, done = self._last, dict[int, float]()
        for span in self.spans:
            if span.step == last:
                done[span.chunk] = max(done.get(span.chunk, 0.0), span.stop)
        return sorted((when, chunk) for chunk, when in done.items())

    @classmethod
    def of_task_stream(
        cls,
        stream: Iterable[Mapping[str, Any]],
        *,
        peak_bytes: int | None = None,
        events: Sequence[tuple[float, str]] = (),
    ) -> Record:
        """Read what `distributed.get_task_stream` gives.

        Parameters
        ----------
        stream : records with "key", "worker", "nbytes" and "startstops"
        peak_bytes : see `Record`
        events : (time, text), times as the stream has them (seconds since 1970)
        """
        spans = []
        for task in stream:
            place = _place(task["key"])
            if place is None:
                continue
            for part in task["startstops"]:
                if part["action"] == "compute":
                    step, nbytes = place[0], int(task.get("nbytes") or 0)
                elif part["action"] == "transfer":
                    step, nbytes = "transfer", 0
                else:
                    continue
                when = part["start"], part["stop"]
                number = _part(task["key"])
                spans.append(Span(step, *place[1:], task["worker"], *when, nbytes, number))
        return _from_zero(spans, peak_bytes, events)


class Recorder(Callback):
    """Records the tasks of layers that Dask's local schedulers run inside its `with` block.

    Examples
    --------
    >>> import dask.array as da, numpy as np
    >>> from dask_ep import expert_parallel
    >>> from dask_ep.record import Recorder
    >>> tokens, routing = da.ones((4, 2), chunks=2), da.from_array(np.array([0, 1, 1, 1]), chunks=2)
    >>> y = expert_parallel(tokens, routing, np.ones((2, 2, 3)), world_size=2)
    >>> with Recorder() as recorder:
    ...     _ = y.compute(scheduler="sync")
    >>> record = recorder.record()
    >>> record.tasks, record.received_rows(reply_row_bytes=3 * 8)
    (12, {0: 1, 1: 3})
    """

    def __init__(self) -> None:
        super().__init__(pretask=self._begin, posttask=self._end)
        self._begun: dict[Any, float] = {}
        self._threads: dict[Any, str] = {}
        self._spans: list[Span] = []

    def record(self, peak_bytes: int | None = None) -> Record:
        """What has been recorded so far."""
        return _from_zero(self._spans, peak_bytes, ())

    def _begin(self, key: Any, graph: Any, state: Any) -> None:
        self._begun[key] = time.perf_counter()

    def _end(self, key: Any, result: Any, graph: Any, state: Any, worker: Any) -> None:
        place = _place(key)
        if place is not None:
            name = f"thread {self._threads.setdefault(worker, str(len(self._threads)))}"
            when = self._begun.pop(key), time.perf_counter()
            self._spans.append(Span(*place, name, *when, _nbytes(result), _part(key)))


def forget_peak_memory() -> None:
    """Let `peak_memory` begin anew, where the system can: on Linux."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Bytes of memory that this process has used at most so far."""
    try:  # the resource usage of a process begins with the peak of the one that started it
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)[1]) * 1024
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _place(key: Any) -> tuple[str, int, int] | None:
    """Step, chunk and rank of a task key; None for tasks that are not of a layer.

    Examples
    --------
    >>> _place(("ep_send-0123", 4, 1)), _place("('ep_experts-0123', 1)"), _place("sum-0123")
    (('send', 4, 1), ('experts', -1, 1), None)
    >>> _place(("ep_read-0123", 4, 0)), _place(("ep_dispatch-ep_store-0123", 4))
    (('read', 4, -1), ('dispatch', 4, 0))
    >>> _place("ep_store-ep_sum-finalize-hlgfinalizecompute-0123")  # of a single chunk
    ('sum', 0, -1)
    >>> _place(("ep_sum-ep_store-0123", 4)), _place(("ep_indices-0123", 4, 0))
    (('sum', 4, -1), ('route', 4, -1))
    >>> _place(("ep_send-0123", 4, 1, 0)), _place(("ep_dispatch-0123", 4, 7, 1))
    (('send', 4, 1), ('dispatch', 4, 1))
    """
    if isinstance(key, str) and key.startswith("ep_") and "-finalize-" in key:
        steps = {part.removeprefix("ep_") for part in key.split("-")}
        return ("sum", 0, -1) if "sum" in steps else ("dispatch", 0, 0)
    key = _parsed(key)
    if key is None:
        return None
    step = _step(key)
    if step == "send":  # a fourth number is the home of its chunk
        return step, key[1], key[2]
    if step in ("dispatch", "receipt"):
        # With one rank Dask has made one task of dispatch and store, which has no rank in its key.
        return step, key[1], key[-1] if len(key) > 2 else 0
    if step == "experts":
        return step, -1, key[-1]
    return (step, key[1], -1) if step in (*STEPS, *BESIDE) else None


def _part(key: Any) -> tuple[int, ...]:
    """Tell tasks of one step, chunk and rank apart: where experts go by, there are several.

    Examples
    --------
    >>> _part(("ep_dispatch-0123", 4, 7, 1)), _part("('ep_experts-0123', 2, 0)")
    ((7,), (2,))
    >>> _part(("ep_dispatch-0123", 4, 1)), _part(("ep_send-0123", 4, 1, 0)), _part("sum-0123")
    ((), (), ())
    """
    key = _parsed(key)
    first = {"experts": 1, "dispatch": 2, "receipt": 2}.get(_step(key)) if key else None
    return key[first:-1] if first else ()


def _parsed(key: Any) -> tuple[Any, ...] | None:
    """Read a key of a layer, as it is or as text; None if it is none."""
    if isinstance(key, str) and key.startswith("("):
        try:
            key = ast.literal_eval(key)
        except (ValueError, SyntaxError):
            return None
    is_key = isinstance(key, tuple) and isinstance(key[0], str) and key[0].startswith("ep_")
    return key if is_key else None


def _step(key: tuple[Any, ...]) -> str:
    step = key[0].split("-")[0].removeprefix("ep_")  # of several in one task, the first
    return {"indices": "route", "weights": "route", "scores": "route"}.get(step, step)


def _nbytes(result: Any) -> int:
    """Bytes of the arrays in a result."""
    if isinstance(result, tuple) and not hasattr(result, "nbytes"):
        return sum(map(_nbytes, result))
    return int(getattr(result, "nbytes", 0))


def _from_zero(
    spans: Iterable[Span], peak_bytes: int | None, events: Sequence[tuple[float, str]]
) -> Record:
    spans = sorted(spans, key=lambda span: span.start)
    zero = spans[0].start if spans else 0.0
    moved = tuple(s._replace(start=s.start - zero, stop=s.stop - zero) for s in spans)
    return Record(
        moved,
        max((s.stop for s in moved), default=0.0),
        peak_bytes,
        tuple(Event(when - zero, what) for when, what in events),
    )
