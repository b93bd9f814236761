"""How fast is this machine at what a run does?

About a second of the two things that a run spends its time on, at the job's own width: matrix
products of one expert's rows, and gathering rows into a packet.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from dask_ep import memory
from dask_ep.blas import one_blas_thread
from dask_ep.costs import Rates

ROWS = 512
"""Rows of a product: what an expert gets of a chunk when chunks are as large as advised."""


def probe(d: int, d_out: int, dtype: np.dtype = np.float32, seconds: float = 1.0) -> Rates:
    """Measure one thread of this machine.

    Parameters
    ----------
    d, d_out : width of the tokens and of the outputs
    dtype : what the experts compute in
    seconds : how long to measure, about

    Returns
    -------
    rates : Rates, with the rates of links and storage at their defaults

    Examples
    --------
    >>> from dask_ep.probe import probe
    >>> probe(64, 64, seconds=0.01).flops > 1e6
    True
    """
    rng = np.random.default_rng(0)
    x, w = rng.random((ROWS, d), dtype), rng.random((d, d_out), dtype)
    out = np.empty((ROWS, d_out), dtype)
    with one_blas_thread():
        products = _calls_per_second(lambda: np.matmul(x, w, out=out), seconds / 2)
    source = rng.random((max(2 * ROWS, (32 << 20) // (d * x.itemsize)), d), dtype)
    rows = rng.integers(0, len(source), len(source) // 2)
    packet = memory.empty((len(rows), d), dtype)
    gathers = _calls_per_second(
        lambda: np.take(source, rows, axis=0, out=packet, mode="clip"), seconds / 2
    )
    return Rates(flops=products * 2 * ROWS * d * d_out, copy=gathers * packet.nbytes)


def _calls_per_second(call: Callable[[], object], seconds: float) -> float:
    """The rate of the median call, after one that warms up."""
    call()
    times = []
    stop = time.perf_counter() + seconds
    while not times or time.perf_counter() < stop:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1 / float(np.median(times))
