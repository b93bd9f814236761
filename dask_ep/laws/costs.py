"""How fast is a machine, and what does a worker hold for each row of a chunk?

The laws that a plan adds up, each a small function of plain numbers. Rows, bytes and tasks are
exact; memory is an upper bound; time is an estimate from rates.

Axis letters: `C` token chunks, `R` ranks, `W` workers that serve them, `d` width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dask_ep.arrays.checks import computing_dtype

CHUNKS_WAITING = 2
"""Chunks in flight on a worker in addition to one for each thread: those that wait for answers."""

FEWEST_ROWS = 64
"""Rows of a chunk below which the cost of a task outweighs its work many times over."""

CHUNKS_PER_THREAD = 4
"""Chunks that each thread should get at least, so that all are busy to the end."""

PICKED_TOGETHER = 8
"""Experts whose rows are picked from a chunk by one task, to sum their second moments: few tasks,
and little that goes to a worker which has only some of them."""

PROCESS_BYTES = 180_000_000
"""What a process takes of its own: Python, NumPy, Dask and Zarr (measured 100 to 110 MB), the
library that multiplies (40 MB), and what the C library keeps of small arrays."""

SORT_BYTES = 48
"""Of memory for each slot while a chunk is sorted by expert: its routing and weight, index arrays
and keys."""

CLUSTER_TASK_SECONDS = 0.5e-3
"""Scheduler time of one task on a cluster (measured 0.42 to 0.48 ms, 900 to 13000 tasks; of a
chunk's task a little more, since its thread is given back)."""

WORKER_TASK_SECONDS = 1.2e-3
"""Overhead of a worker for each task of a cluster (measured 1.2 ms over all
workers: messages, tasks unpacked, results fetched and dropped)."""

LOCAL_TASK_SECONDS = 0.1e-3
"""Scheduler time of one task on threads of one process (measured 0.05 to 0.18 ms)."""


@dataclass(frozen=True)
class Rates:
    """How fast the machine is: one thread of it, or one GPU, and one link between two workers."""

    flops: float
    #: floating-point operations per second of one thread in matrix products of the job's width
    copy: float
    #: bytes per second that one thread gathers rows at
    pack: float = 4e9
    #: bytes per second of packets and answers that one thread makes and adds up, sorts included
    link: float = 0.5e9
    #: bytes per second that a thread sends and receives: messages packed, copied into the system
    #: and out of it, into fresh memory (measured 2.1 s for 1 GB on loopback, both ends together)
    read: float = 1e9
    #: bytes per second that one thread reads from storage
    write: float = 0.5e9
    #: bytes per second that one thread writes there
    lane: float = 20e9
    #: bytes per second between host and GPU, each way (PCIe 4.0 x 16: nominally 25e9)


PART_OF_A_WORKER = 0.7
"""Of its memory limit that a Dask worker may fill: with more it moves data to disk, then pauses,
and at last is ended."""


def usable(limit: int) -> int:
    """Bytes that are filled by choice in a worker with a memory limit."""
    return int(limit * PART_OF_A_WORKER)


class Spread(NamedTuple):
    """How many rows of packets and answers a chunk makes, at most, over its own rows."""

    workers: int
    #: W; 0 where chunks serve their ranks in place
    answered: float
    #: rows of answers that a chunk has at once
    sent: float = 0.0
    #: rows in its packets: each once for each other worker that serves it
    received: float = 0.0
    #: rows in the one of its packets that has most
    replied: float = 0.0
    #: rows in the answers to that one

    @classmethod
    def at_worst(cls, slots: int, ranks: int, workers: int) -> Spread:
        """Of any routing of k slots a row to R ranks on W workers; 0 workers serve in place."""
        if not workers:
            return cls(0, 2 * (slots > 1))
        of_a_worker = -(-ranks // workers)
        return cls(
            workers,
            min(slots, ranks),
            min(slots, workers - 1),
            min(1, workers - 1),
            min(slots, of_a_worker) if workers > 1 else 0,
        )

    @classmethod
    def of(
        cls,
        packet_rows: np.ndarray,
        worker_rows: np.ndarray,
        chunk_rows: int,
        slots: int,
        in_place: bool,
    ) -> Spread:
        """Of rows that are known.

        Parameters
        ----------
        packet_rows : (C, R) rows of each chunk that each rank serves
        worker_rows : (C, W) rows of each chunk that some rank of each worker serves
        chunk_rows : of the largest chunk
        slots : k
        in_place : whether chunks serve their ranks themselves
        """
        workers, chunk_rows = worker_rows.shape[1], max(chunk_rows, 1)
        if in_place:
            return cls(0, 2 * (slots > 1) * packet_rows.max(initial=0) / chunk_rows)
        if workers == 1:
            return cls(1, packet_rows.sum(axis=1).max(initial=0) / chunk_rows)
        replies = np.stack([packet_rows[:, w::workers].sum(axis=1) for w in range(workers)])
        sent = worker_rows.sum(axis=1) - worker_rows.min(axis=1)
        at_most = (packet_rows.sum(axis=1), sent, worker_rows, replies)
        return cls(workers, *(float(rows.max(initial=0)) / chunk_rows for rows in at_most))


def chunks_held(threads: int, ranks: int, spread: Spread, widening: int) -> float:
    """How many token chunks a worker holds at most: the memory law, without experts and scratch.

    Parameters
    ----------
    threads : T, of it
    ranks : R
    spread : rows of packets and answers
    widening : bytes of a number that is computed with over one of a token; 1 with one slot a row,
        whose answers are of the tokens' dtype

    Notes
    -----
    Where each task serves its chunk in place, a thread holds its chunk, its output and what the one
    before has left, and two more are read ahead; sums are kept wide. With several ranks and slots,
    there is the answer being made and the one being added.

    On workers T + `CHUNKS_WAITING` chunks are in flight, each of them itself, its packets,
    whose memory is kept for the next ones, and its answers. Each thread adds up one of them, to a
    sum and an output, and another waits in it to begin. As many are in flight on each other worker,
    of each of which the packet or its answers can be here; a thread has those that it serves at
    once, and the packet twice, as it came and aligned.
    """
    if ranks == 1 or not spread.workers:
        answers = 0.0 if ranks == 1 else spread.answered * widening
        return 3 * threads + 2 + threads * (widening - 1 + answers)
    served = spread.received + min(spread.received, widening * spread.replied)
    chunks = threads + CHUNKS_WAITING + threads * (2 + widening + served)
    return chunks + exchanged_held(threads, spread, widening)


def exchanged_held(threads: int, spread: Spread, widening: int) -> float:
    """How many token chunks packets and answers that travel take at most: see `chunks_held`."""
    own = spread.sent + widening * spread.answered
    of_others = max(spread.received, widening * spread.replied)
    return (threads + CHUNKS_WAITING) * (own + (spread.workers - 1) * of_others)


class Need(NamedTuple):
    """What a worker needs of memory, by the rows of a token chunk: the law of plans and of runs.

    Examples
    --------
    >>> need = Need(expert_bytes=100 << 20, chunks=8, row_bytes=4096, tile_bytes=64 << 20)
    >>> need.at(8192) >> 20, need.rows_within(need.at(8192))
    (591, 8192)
    """

    expert_bytes: int
    #: of experts and routers
    chunks: float
    #: token chunks at a time, `chunks_held`
    row_bytes: int
    #: of a token row or an output row, whichever is more
    tile_bytes: int = 0
    #: that the threads compute in, and decode stored chunks in, together
    slot_bytes: int = 0
    #: that all threads sort the slots of a row in, together
    process_bytes: int = PROCESS_BYTES

    def at(self, chunk_rows: int) -> int:
        """Bytes at most, with chunks of `chunk_rows` rows."""
        return sum(self.parts(chunk_rows).values())

    def parts(self, chunk_rows: int) -> dict[str, int]:
        """Bytes by what they are for."""
        return {
            "process": self.process_bytes,
            "experts": self.expert_bytes,
            "scratch": self.tile_bytes + chunk_rows * self.slot_bytes,
            "chunks": math.ceil(self.chunks * chunk_rows * self.row_bytes),
        }

    def rows_within(self, limit: int) -> int:
        """The most rows of a chunk with which that is not above `limit`; negative if none."""
        room = limit - self.at(0)
        return math.floor(room / (self.chunks * self.row_bytes + self.slot_bytes))


def packet_row_bytes(d: int, itemsize: int, slots: int, weight_bytes: int, places: int) -> int:
    """Bytes of one row on its way to a worker: its numbers, and the k experts and weights of it.

    `places` are all that an expert's number may name.
    """
    index_bytes = np.min_scalar_type(-places - 1).itemsize
    return d * itemsize + slots * (index_bytes + weight_bytes)


def reply_row_bytes(d_out: int, dtype: np.dtype, slots: int) -> int:
    """Bytes of one row on its way back from a rank: a sum over its slots there, if there are more.

    Examples
    --------
    >>> reply_row_bytes(8, np.dtype("f2"), slots=1), reply_row_bytes(8, np.dtype("f2"), slots=2)
    (16, 32)
    """
    return d_out * (dtype if slots == 1 else computing_dtype(dtype)).itemsize


def homes(chunks: int, workers: int) -> np.ndarray:
    """(C,) the worker of each chunk: neighbours together, as Dask assigns them.

    Examples
    --------
    >>> homes(5, 2)
    array([0, 0, 0, 1, 1])
    """
    return np.arange(chunks) * workers // max(chunks, 1)
