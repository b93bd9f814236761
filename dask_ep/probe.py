"""How fast is this machine at what a run does?

About a second of the two things that a run spends its time on, with as many rows, slots and experts
as a task of the job has: the matrix products, and what the kernel does around them (sorting,
gathering and adding up rows), which experts that do nothing show. All threads of the run work at
once, since they share caches, memory and whatever else the machine is doing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from dask_ep.blas import one_blas_thread
from dask_ep.costs import Rates
from dask_ep.dispatch import expert_parallel_dispatch

MOST_BYTES = 32 << 20
"""Of the rows, and of the matrices, that one thread measures with."""


def probe(
    d: int,
    d_out: int,
    *,
    rows: int = 4096,
    slots: int = 2,
    experts: int = 8,
    dtype: np.dtype = np.float32,
    threads: int = 1,
    seconds: float = 1.0,
) -> Rates:
    """Measure this machine.

    Parameters
    ----------
    d, d_out : width of the tokens and of the outputs
    rows : of a token chunk
    slots : of a row
    experts : that the slots of a chunk are spread over
    dtype : what the experts compute in
    threads : how many work at once
    seconds : how long to measure, about

    Returns
    -------
    rates : Rates
        Of one of the threads; links and storage at their defaults.

    Examples
    --------
    >>> from dask_ep.probe import probe
    >>> probe(64, 64, seconds=0.01).flops > 1e6
    True
    """
    itemsize = np.dtype(dtype).itemsize
    rows = max(min(rows, MOST_BYTES // (d * itemsize)), 1)
    products = _Products(d, d_out, max(rows * slots // experts, 1), experts, dtype)
    kernel = _Kernel(d, rows, slots, experts, dtype)
    with one_blas_thread(), ThreadPoolExecutor(threads) as pool:

        def mean_rate(work: Callable[[], int]) -> float:
            runs = [pool.submit(_rate, work, seconds / 2) for _ in range(threads)]
            return sum(run.result() for run in runs) / threads

        return Rates(flops=mean_rate(products), copy=mean_rate(kernel))


class _Products:
    """One product of every expert; called, it gives the operations done."""

    def __init__(self, d: int, d_out: int, rows: int, experts: int, dtype: np.dtype):
        matrix_bytes = d * d_out * np.dtype(dtype).itemsize
        self.x = np.ones((rows, d), dtype)
        self.w = np.ones((max(min(experts, MOST_BYTES // matrix_bytes), 1), d, d_out), dtype)

    def __call__(self) -> int:
        for w in self.w:
            self.x @ w
        return 2 * self.x.size * self.w[0, 0].size * len(self.w)


class _Kernel:
    """The kernel with experts that give their rows back; called, it gives the bytes handled."""

    def __init__(self, d: int, rows: int, slots: int, experts: int, dtype: np.dtype):
        self.tokens = np.ones((rows, d), dtype)
        first = np.random.default_rng(0).integers(0, experts, (rows, 1))
        self.routing = (first + np.arange(slots)) % experts  # as of a router: no expert twice
        self.experts = [_same] * experts

    def __call__(self) -> int:
        expert_parallel_dispatch(self.tokens, self.routing, self.experts, 0, 1)
        return 2 * self.tokens.nbytes * self.routing.shape[1]


def _same(rows: np.ndarray) -> np.ndarray:
    return rows


def _rate(work: Callable[[], int], seconds: float) -> float:
    """What `work` does per second, after a call that warms up."""
    work()
    done, passed, start = 0, 0.0, time.perf_counter()
    while passed < seconds or done == 0:
        done += work()
        passed = time.perf_counter() - start
    return done / passed
