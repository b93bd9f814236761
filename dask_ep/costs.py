"""What do tasks, bytes, memory and time of a run follow from?

The laws that a plan adds up, each a small function of plain numbers. Rows, bytes and tasks are
exact; memory is an upper bound; time is an estimate from rates.

Axis letters: `C` token chunks, `R` ranks, `d` width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

FEWEST_ROWS = 64
"""Rows of a chunk below which the cost of a task outweighs its work many times over."""

CHUNKS_PER_THREAD = 4
"""Chunks that each thread should get at least, so that all are busy to the end."""

PROCESS_BYTES = 180_000_000
"""What a process takes of its own: Python, NumPy, Dask and Zarr (measured 100 to 110 MB), and what
the C library keeps of small arrays."""

SORT_BYTES = 48
"""Of memory for each slot while a chunk is sorted by expert: its routing and weight, index arrays
and keys."""

CLUSTER_TASK_SECONDS = 0.45e-3
"""Scheduler time of one task on a cluster (measured 0.42 to 0.48 ms, 900 to 13000 tasks)."""

WORKER_TASK_SECONDS = 1.2e-3
"""Time that a worker spends on each task of a cluster besides its work (measured 1.2 ms over all
workers: messages, tasks unpacked, results fetched and dropped)."""

LOCAL_TASK_SECONDS = 0.1e-3
"""Scheduler time of one task on threads of one process (measured 0.05 to 0.18 ms)."""


PACKED_RANKS = 2
"""Ranks for which `Rates.pack` holds; each further one has its rows found among all others."""


@dataclass(frozen=True)
class Rates:
    """How fast the machine is: one thread of it, or one GPU, and one link between two workers."""

    flops: float
    #: floating-point operations per second of one thread in matrix products of the job's width
    copy: float
    #: bytes per second that one thread gathers rows at
    pack: float = 4e9
    #: bytes per second of packets and answers that one thread makes and adds up
    sort: float = 3e7
    #: slots per second that one thread sorts by expert
    link: float = 0.5e9
    #: bytes per second that a thread sends and receives: messages packed, copied into the system
    #: and out of it, into fresh memory (measured 2.1 s for 1 GB on loopback, both ends together)
    read: float = 1e9
    #: bytes per second that one thread reads from storage
    write: float = 0.5e9
    #: bytes per second that one thread writes there
    lane: float = 20e9
    #: bytes per second between host and GPU, each way (PCIe 4.0 x 16 is said to give 25e9)


PART_OF_A_WORKER = 0.7
"""Of its memory limit that a Dask worker may fill: with more it moves data to disk, then pauses,
and at last is ended."""


def usable(limit: int) -> int:
    """Bytes that are filled by choice in a worker with a memory limit."""
    return int(limit * PART_OF_A_WORKER)


def chunks_held(threads: int, ranks: int, spread: float, widening: int) -> float:
    """How many token chunks a worker holds at most.

    Parameters
    ----------
    threads : tasks that run in it at a time
    ranks : R
    spread : rows of all packets over token rows: to how many ranks a row goes
    widening : bytes of a number that is computed with over one that is stored

    Notes
    -----
    With one rank each task holds its chunk, its output and what the one before has left, and two
    more are read ahead. With more, a chunk under way is itself, its packets, its answers and its
    sum; packets and answers are `spread` times as large. There is one for each thread, and one more
    between tasks. Sums are kept wide.
    """
    wide = threads * (widening - 1)
    if ranks == 1:
        return 3 * threads + 2 + wide
    return (threads + 1) * (2 + 2 * max(1.0, spread)) + wide


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
        """Bytes at most, with chunks of so many rows."""
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
    """Bytes of one row on its way to a rank: its numbers, and the k experts and weights of it.

    `places` are all that an expert's number may name.
    """
    index_bytes = np.min_scalar_type(-places - 1).itemsize
    return d * itemsize + slots * (index_bytes + weight_bytes)


def homes(chunks: int, ranks: int) -> np.ndarray:
    """(C,) the rank on whose worker each chunk lies: neighbours together, as Dask assigns them.

    Examples
    --------
    >>> homes(5, 2)
    array([0, 0, 0, 1, 1])
    """
    return np.arange(chunks) * ranks // max(chunks, 1)


def traffic(packet_rows: np.ndarray, home: np.ndarray) -> np.ndarray:
    """Add up packet_rows (C, R) to (R, R): rows from the worker of each rank to each rank.

    Parameters
    ----------
    packet_rows : (C, R) rows of each chunk that go to each rank
    home : (C,) rank on whose worker each chunk lies
    """
    ranks = packet_rows.shape[1]
    rows = np.zeros((ranks, ranks), packet_rows.dtype)
    np.add.at(rows, home, packet_rows)
    return rows
