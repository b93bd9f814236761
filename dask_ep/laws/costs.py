"""How fast is a machine, and what does a worker hold for each row of a chunk?

A plan adds up these laws, each a small function of plain numbers. Rows, bytes and tasks are exact;
memory is an upper bound; time is an estimate from rates.

Axis letters: `C` token chunks, `R` ranks, `W` workers that serve them, `d` width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dask_ep.arrays.checks import computing_dtype

CHUNKS_WAITING = 2
"""Chunks in flight on a worker in addition to one per thread: they wait for answers."""

FEWEST_ROWS = 64
"""Rows of a chunk below which the overhead of a task is many times its work."""

CHUNKS_PER_THREAD = 4
"""Minimum number of chunks per thread, to keep all threads busy to the end."""

PICKED_TOGETHER = 8
"""Number of experts whose rows one task picks from a chunk, to sum their second moments: a larger
number makes fewer tasks, but sends more to workers that need only some of the experts."""

PROCESS_BYTES = 180_000_000
"""Memory of a process without arrays: Python, NumPy, Dask and Zarr (measured 100 to 110 MB), the
library that multiplies (40 MB), and what the C library keeps of small arrays."""

SORT_BYTES = 48
"""Bytes of memory per slot while a chunk is sorted by expert: its routing and weight, index arrays
and keys."""

CLUSTER_TASK_SECONDS = 0.5e-3
"""Scheduler time of one task on a cluster (measured 0.42 to 0.48 ms, 900 to 13000 tasks; a little
more for the task of a chunk, which gives its thread back)."""

WORKER_TASK_SECONDS = 1.2e-3
"""Overhead of a worker for each task of a cluster: messages, unpacking of tasks, fetching and
dropping of results (measured 1.2 ms over all workers)."""

LOCAL_TASK_SECONDS = 0.1e-3
"""Scheduler time of one task on threads of one process (measured 0.05 to 0.18 ms)."""


@dataclass(frozen=True)
class Rates:
    """Speed of the machine: of one thread or one GPU, and of one link between two workers."""

    flops: float
    #: floating-point operations per second of one thread, in matrix products of the job's width
    copy: float
    #: bytes per second at which one thread gathers rows
    pack: float = 4e9
    #: bytes per second of packets and answers that one thread makes and adds up, sorting included
    link: float = 0.5e9
    #: bytes per second that a thread sends and receives: packing messages, and copying them to and
    #: from the system, into new memory (measured 2.1 s for 1 GB on loopback, both ends together)
    read: float = 1e9
    #: bytes per second that one thread reads from storage
    write: float = 0.5e9
    #: bytes per second that one thread writes to storage
    lane: float = 20e9
    #: bytes per second between host and GPU, each way (PCIe 4.0 x 16: nominally 25e9)


PART_OF_A_WORKER = 0.7
"""Fraction of its memory limit that a Dask worker may fill: beyond it, Dask moves data to disk,
then pauses the worker, and finally terminates it."""


class Spread(NamedTuple):
    """Upper bounds on a chunk's rows in packets and answers, as multiples of its own rows."""

    workers: int
    #: W; 0 if chunks serve their ranks in place
    answered: float
    #: rows of answers that a chunk has at once
    sent: float = 0.0
    #: rows in its packets: each once for each other worker that serves it
    received: float = 0.0
    #: rows in the largest of its packets
    replied: float = 0.0
    #: rows in the answers to that packet

    @classmethod
    def at_worst(cls, slots: int, ranks: int, workers: int) -> Spread:
        """Return bounds for any routing with k slots per row to R ranks on W workers.

        With 0 workers, chunks serve their ranks in place.
        """
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
        """Return the values for known rows.

        Parameters
        ----------
        packet_rows : (C, R) rows of each chunk that each rank serves
        worker_rows : (C, W) rows of each chunk that any rank of each worker serves
        chunk_rows : rows of the largest chunk
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
    """Return how many token chunks a worker holds at most, without experts and scratch memory.

    Parameters
    ----------
    threads : T, of the worker
    ranks : R
    spread : rows of packets and answers
    widening : itemsize of the computing dtype over that of the tokens; 1 with one slot per row,
        for which answers have the tokens' dtype

    Notes
    -----
    If each task serves its chunk in place, a thread holds its chunk, its output and the remains of
    the previous one, and two more chunks are read ahead; sums have the computing dtype. With
    several ranks and slots, there are also the answer being made and the one being added.

    On workers, T + `CHUNKS_WAITING` chunks are in flight, each with its rows, its packets, whose
    memory is kept for the next ones, and its answers. Each thread adds up the answers of one of
    them, to a sum and an output, and has another one waiting to begin. As many chunks are in flight
    on each other worker, and the packet of each or its answers can be here; a thread has both for
    the one that it serves, and the packet twice, as received and aligned.
    """
    if ranks == 1 or not spread.workers:
        answers = 0.0 if ranks == 1 else spread.answered * widening
        return 3 * threads + 2 + threads * (widening - 1 + answers)
    served = spread.received + min(spread.received, widening * spread.replied)
    chunks = threads + CHUNKS_WAITING + threads * (2 + widening + served)
    return chunks + exchanged_held(threads, spread, widening)


def exchanged_held(threads: int, spread: Spread, widening: int) -> float:
    """Return how many token chunks packets and answers in transit take: see `chunks_held`."""
    own = spread.sent + widening * spread.answered
    of_others = max(spread.received, widening * spread.replied)
    return (threads + CHUNKS_WAITING) * (own + (spread.workers - 1) * of_others)


class Need(NamedTuple):
    """Memory that a worker needs, as a function of the rows of a token chunk, in plans and runs.

    Examples
    --------
    >>> need = Need(expert_bytes=100 << 20, chunks=8, row_bytes=4096, tile_bytes=64 << 20)
    >>> need.at(8192) >> 20, need.rows_within(need.at(8192))
    (591, 8192)
    """

    expert_bytes: int
    #: bytes of experts and routers
    chunks: float
    #: token chunks at a time, `chunks_held`
    row_bytes: int
    #: bytes of a token row or an output row, whichever is larger
    tile_bytes: int = 0
    #: scratch bytes of all threads together, to compute and to decode stored chunks
    slot_bytes: int = 0
    #: bytes per row in which all threads together sort slots
    process_bytes: int = PROCESS_BYTES

    def at(self, chunk_rows: int) -> int:
        """Return the bytes needed at most with chunks of `chunk_rows` rows."""
        return sum(self.parts(chunk_rows).values())

    def parts(self, chunk_rows: int) -> dict[str, int]:
        """Return these bytes by what they are used for."""
        return {
            "process": self.process_bytes,
            "experts": self.expert_bytes,
            "scratch": self.tile_bytes + chunk_rows * self.slot_bytes,
            "chunks": math.ceil(self.chunks * chunk_rows * self.row_bytes),
        }

    def rows_within(self, limit: int) -> int:
        """Return the maximum rows of a chunk that fit into `limit`; negative if none do."""
        room = limit - self.at(0)
        return math.floor(room / (self.chunks * self.row_bytes + self.slot_bytes))


def packet_row_bytes(d: int, itemsize: int, slots: int, weight_bytes: int, places: int) -> int:
    """Return the bytes of a row sent to a worker: its numbers, and its k experts and weights.

    `places` is the number of physical experts, which determines the dtype of expert indices.
    """
    index_bytes = np.min_scalar_type(-places - 1).itemsize
    return d * itemsize + slots * (index_bytes + weight_bytes)


def reply_row_bytes(d_out: int, dtype: np.dtype, slots: int) -> int:
    """Return the bytes of a row sent back by a rank: a sum over its slots, if it has several.

    Examples
    --------
    >>> reply_row_bytes(8, np.dtype("f2"), slots=1), reply_row_bytes(8, np.dtype("f2"), slots=2)
    (16, 32)
    """
    return d_out * (dtype if slots == 1 else computing_dtype(dtype)).itemsize


def homes(chunks: int, workers: int) -> np.ndarray:
    """Return (C,) the worker of each chunk; neighbours share one, as Dask assigns them.

    Examples
    --------
    >>> homes(5, 2)
    array([0, 0, 0, 1, 1])
    """
    return np.arange(chunks) * workers // max(chunks, 1)
