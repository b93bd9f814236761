"""What have services done?

    of a process    rows, bytes in and out, seconds busy, rows that wait    always, as metrics
    of a run        which rank of which chunk was served where and when     while it is recorded

Ranks that a chunk serves itself count the same.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple


class Serving(NamedTuple):
    """One rank's part of one chunk, served once."""

    chunk: int
    rank: int
    rows: int
    asked_by: str
    #: worker of the chunk; HERE if that is the process that records it
    served_by: str
    start: float
    #: seconds since the epoch
    stop: float
    bytes_in: int = 0
    #: bytes of the packet that brought it, at the packet's first rank; 0 without a packet
    bytes_out: int = 0
    #: bytes of the answer; 0 without a packet
    waited: float = 0.0
    #: seconds from the arrival of its packet to the start


HERE = ""
"""Stands for the process itself, when a chunk serves its ranks without a service."""


class Tally:
    """Counts what one worker's services do."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: defaultdict[tuple[str, int], int] = defaultdict(int)
        self.rows = self.bytes_in = self.bytes_out = self.packets = self.chunks = 0
        self.busy = 0.0

    def count_waiting(self, token: str, ranks: Sequence[int], rows: int) -> None:
        """Count rows that arrived for some ranks of a layer; negative numbers are rows answered."""
        with self._lock:
            for rank in ranks:
                self._waiting[token, rank] += rows
                if not self._waiting[token, rank]:
                    del self._waiting[token, rank]

    @property
    def waiting(self) -> int:
        """Rows of packets that wait or are being computed."""
        return sum(list(self._waiting.values()))

    def count(self, seconds: float, servings: list[Serving]) -> None:
        """Count packets that were served."""
        with self._lock:
            self.busy += seconds
            for serving in servings:
                self.rows += serving.rows
                self.bytes_in += serving.bytes_in
                self.bytes_out += serving.bytes_out
                self.packets += bool(serving.bytes_in)
        note(servings)

    def count_chunk(self) -> None:
        with self._lock:
            self.chunks += 1

    def metric(self) -> dict[str, Any]:
        """What each heartbeat reports to the scheduler."""
        with self._lock:
            queues = [[token, rank, rows] for (token, rank), rows in self._waiting.items()]
        return {
            "rows": self.rows,
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "packets": self.packets,
            "chunks": self.chunks,
            "busy": self.busy,
            "time": now(),
            "queues": queues,
        }


_record: list[Serving] | None = None


def record() -> None:
    """Start recording what this process serves."""
    global _record
    _record = [] if _record is None else _record


def take() -> list[Serving]:
    """Return what has been recorded, and stop recording."""
    global _record
    taken, _record = _record or [], None
    return taken


def note(servings: list[Serving]) -> None:
    """Record what was served, if recording is on."""
    kept = _record
    if kept is not None:
        kept.extend(servings)


def note_in_place(chunk: int, rank: int, rows: int, start: float) -> None:
    """Record that a chunk has served a rank itself, since `start`, if recording is on."""
    if is_recorded():
        note([Serving(chunk, rank, rows, HERE, HERE, start, now())])


def is_recorded() -> bool:
    return _record is not None


now = time.time
