"""What do tasks, bytes, memory and time of a run follow from?

The laws that a plan adds up, each a small function of plain numbers. Rows, bytes and tasks are
exact; memory is an upper bound; time is an estimate from rates.

Axis letters: `C` token chunks, `R` ranks, `d` width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

PROCESS_BYTES = 300 << 20
"""What a worker process takes before it holds any data: Python, NumPy, Dask, Zarr."""

CLUSTER_TASK_SECONDS = 0.45e-3
"""Scheduler time of one task on a cluster (measured 0.42 to 0.48 ms, 900 to 13000 tasks)."""

LOCAL_TASK_SECONDS = 0.1e-3
"""Scheduler time of one task on threads of one process (measured 0.05 to 0.18 ms)."""


@dataclass(frozen=True)
class Rates:
    """How fast the machine is: one thread of it, and one link between two workers."""

    flops: float
    #: floating-point operations per second of one thread in matrix products of the job's width
    copy: float
    #: bytes per second that one thread gathers rows at
    link: float = 1e9
    #: bytes per second that come into one worker from the others
    read: float = 1e9
    #: bytes per second that one worker reads from storage


def peak_memory(expert_bytes: int, chunk_bytes: int, threads: int) -> int:
    """Bytes that one worker process holds at most.

    Parameters
    ----------
    expert_bytes : experts of the ranks that it plays
    chunk_bytes : the largest token chunk, or output chunk if that is larger
    threads : tasks that run in it at a time

    Notes
    -----
    Each running task holds its chunk, the packets or partial sums made of it, their result and
    scratch: 4 chunks; 4 more lie between tasks.
    """
    return PROCESS_BYTES + expert_bytes + (4 * threads + 4) * chunk_bytes


def homes(chunks: int, ranks: int) -> np.ndarray:
    """(C,) the rank on whose worker each chunk lies: neighbours together, as Dask assigns them.

    Examples
    --------
    >>> homes(5, 2)
    array([0, 0, 0, 1, 1])
    """
    return np.arange(chunks) * ranks // max(chunks, 1)


def traffic(packet_rows: np.ndarray) -> np.ndarray:
    """Add up packet_rows (C, R) to (R, R): rows from the worker of each rank to each rank."""
    chunks, ranks = packet_rows.shape
    rows = np.zeros((ranks, ranks), packet_rows.dtype)
    np.add.at(rows, homes(chunks, ranks), packet_rows)
    return rows
