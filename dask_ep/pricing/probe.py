"""How fast does this machine do what a run does?

This takes about a second, for work with as many rows, slots and experts as a task of the job has:
experts like the job's; what the kernel does around them (sorting, gathering and adding up rows),
measured with experts that do nothing; packing rows and adding up answers; writing and reading a
file in the page cache. All threads of the run work at once, since they share caches, memory and the
machine's other load.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from dask_ep.arrays import memory
from dask_ep.arrays.blas import one_blas_thread, product
from dask_ep.kernel.dispatch import expert_parallel_dispatch
from dask_ep.kernel.expert import Expert
from dask_ep.kernel.host_kernel import TILE_ROWS
from dask_ep.kernel.pack import Combining, Packing
from dask_ep.laws.costs import Rates

MOST_BYTES = 32 << 20
"""Maximum bytes of the rows, and of the matrices, that one thread measures with."""

FILE_PIECES = 4
"""Number of pieces, of half as many bytes, that make a file."""


def probe(
    d: int,
    d_out: int,
    *,
    rows: int = 4096,
    slots: int = 2,
    experts: int = 8,
    dtype: np.dtype = np.dtype(np.float32),  # noqa: B008 - it does not change
    threads: int = 1,
    seconds: float = 1.0,
    sample: Sequence[Expert] = (),
    flops: float = 0.0,
) -> Rates:
    """Measure this machine.

    Parameters
    ----------
    d, d_out : width of the tokens and of the outputs
    rows : rows of a token chunk
    slots : slots of a row
    experts : number of experts that the slots of a chunk are spread over
    dtype : computing dtype of the experts
    threads : number of threads that work at once
    seconds : approximate time to measure
    sample : some experts of the job's kind and sizes, with any weights
        The rate of products then includes the experts' other steps; without a sample, bare products
        of (d, d_out) matrices are measured.
    flops : floating-point operations of one row at one of these experts

    Returns
    -------
    rates : Rates
        Of one of the threads; `link` has its default. Files are small new ones in the directory for
        temporary files: a run that reads from a slow disk, or more than the page cache holds, is
        slower.

    Examples
    --------
    >>> from dask_ep.pricing.probe import probe
    >>> probe(64, 64, seconds=0.01).flops > 1e6
    True
    """
    itemsize = np.dtype(dtype).itemsize
    rows = max(min(rows, MOST_BYTES // (d * itemsize)), 1)
    of_expert = max(rows * slots // experts, 1)
    products: Callable[[], float] = _Products(d, d_out, of_expert, experts, dtype)
    if sample:
        products = _Sample(sample, flops, min(of_expert, TILE_ROWS[1]), dtype)
    kernel = _Kernel(d, rows, slots, experts, dtype)
    exchange, file = _Exchange(kernel), _File()
    with one_blas_thread(), ThreadPoolExecutor(threads) as pool, file.file:

        def mean_rate(work: Callable[[], float], share: float) -> float:
            runs = [pool.submit(rate, work, share * seconds) for _ in range(threads)]
            return sum(run.result() for run in runs) / threads

        return Rates(
            flops=mean_rate(products, 0.4),
            copy=mean_rate(kernel, 0.2),
            pack=mean_rate(exchange, 0.2),
            read=mean_rate(file.read, 0.1),
            write=mean_rate(file.write, 0.1),
        )


def probe_files(seconds: float) -> dict[str, float]:
    """Measure how fast one thread reads and writes a file: `read` and `write` of `Rates`."""
    file = _File()
    with file.file:
        return {"read": rate(file.read, seconds / 2), "write": rate(file.write, seconds / 2)}


class _Products:
    """Makes one product per expert; a call returns the number of operations."""

    def __init__(self, d: int, d_out: int, rows: int, experts: int, dtype: np.dtype):
        matrix_bytes = d * d_out * np.dtype(dtype).itemsize
        self.x = np.ones((rows, d), dtype)
        self.w = np.ones((max(min(experts, MOST_BYTES // matrix_bytes), 1), d, d_out), dtype)

    def __call__(self) -> int:
        for w in self.w:
            product(self.x, w)
        return 2 * self.x.size * self.w[0, 0].size * len(self.w)


class _Sample:
    """Sends a tile of rows through each expert of a sample; a call returns the operations."""

    def __init__(self, sample: Sequence[Expert], flops: float, rows: int, dtype: np.dtype):
        self.sample, self.flops = sample, flops
        self.x = np.ones((rows, sample[0].d), dtype)

    def __call__(self) -> float:
        y = memory.empty((len(self.x), self.sample[0].d_out), self.x.dtype)
        for expert in self.sample:
            expert(self.x, out=y)
        return self.flops * len(self.x) * len(self.sample)


class _Kernel:
    """Runs the kernel with experts that return their rows; a call returns the bytes processed."""

    def __init__(self, d: int, rows: int, slots: int, experts: int, dtype: np.dtype):
        self.tokens = np.ones((rows, d), dtype)
        first = np.random.default_rng(0).integers(0, experts, (rows, 1))
        self.routing = (first + np.arange(slots)) % experts  # no expert twice, as from a router
        self.experts = [_same] * experts

    def __call__(self) -> int:
        expert_parallel_dispatch(self.tokens, self.routing, self.experts, 0, 1)
        return 2 * self.tokens.nbytes * self.routing.shape[1]


class _Exchange:
    """Packs a chunk for two ranks, makes one packet, and adds up the rows as answers; a call
    returns the bytes of that packet and of the answers.
    """

    def __init__(self, kernel: _Kernel):
        self.tokens, self.routing = kernel.tokens, kernel.routing
        self.num_local = -(-len(kernel.experts) // 2)
        packing = self._pack()
        self.answers = [packing.packet([rank]).rows for rank in packing.ranks]

    def __call__(self) -> int:
        packing = self._pack()
        packet = packing.packet(packing.ranks[-1:])
        total = Combining(packing, self.tokens.shape[1], self.tokens.dtype)
        for rank, answer in zip(packing.ranks, self.answers, strict=True):
            total.add(rank, answer)
        return sum(rows.nbytes for rows in (packet.rows, *self.answers))

    def _pack(self) -> Packing:
        return Packing(self.tokens, self.routing, None, self.num_local, 2)


class _File:
    """A temporary file to write and to read; both return the number of bytes."""

    def __init__(self) -> None:
        self.content = np.ones(MOST_BYTES // 2, np.uint8)
        self.file = tempfile.TemporaryFile(prefix="dask-ep-probe-", buffering=0)  # noqa: SIM115
        self.file.write(self.content.data)

    def write(self) -> int:
        """Write another file, of several pieces, as the system has memory ready for the first."""
        with tempfile.TemporaryFile(prefix="dask-ep-probe-", buffering=0) as file:
            return sum(file.write(self.content.data) or 0 for _ in range(FILE_PIECES))

    def read(self) -> int:
        """Read from the page cache, into memory from the pool, as a run does."""
        target = memory.empty((len(self.content),), np.uint8)
        return os.preadv(self.file.fileno(), [target], 0)


def _same(rows: np.ndarray) -> np.ndarray:
    return rows


def rate(work: Callable[[], float], seconds: float) -> float:
    """Return the amount that `work` returns per second, after one call to warm up."""
    work()
    done, passed, start = 0.0, 0.0, time.perf_counter()
    while passed < seconds or done == 0:
        done += work()
        passed = time.perf_counter() - start
    return done / passed
