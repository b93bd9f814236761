"""How many threads may one matrix product use?

A run has one Dask task per core, so each product gets one thread: with more they fight for the
cores. The number belongs to the whole process and cannot be nested between threads (two overlapping
uses leave it at 1 for good), so it is set once, around a run or when a worker starts, and never in
a task.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from threadpoolctl import threadpool_limits


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Give BLAS one thread while the block runs, and the former number afterwards.

    Notes
    -----
    For the whole process: enter it from one thread, when no other is inside. It reaches the
    libraries that are loaded already, so NumPy has to be imported before.

    Examples
    --------
    >>> import numpy as np
    >>> from threadpoolctl import threadpool_info
    >>> from dask_ep.blas import one_blas_thread
    >>> with one_blas_thread():
    ...     threads = {lib["num_threads"] for lib in threadpool_info() if lib["user_api"] == "blas"}
    >>> threads <= {1}
    True
    """
    with threadpool_limits(limits=1):
        yield


def limit_blas_for_good() -> None:
    """Give BLAS one thread for the rest of this process: for a worker with a thread per core."""
    threadpool_limits(limits=1)
