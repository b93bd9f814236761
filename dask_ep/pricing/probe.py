"""How fast is this machine at what a run does?

About a second of what a run spends its time on, with as many rows, slots and experts as a task of
the job has: experts like the job's; what the kernel does around them (sorting, gathering and adding
up rows), which experts that do nothing show; packing rows and adding them up again; writing and
reading a file, which the system keeps in memory. All threads of the run work at once, since they
share caches, memory and whatever else the machine is doing.
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
"""Of the rows, and of the matrices, that one thread measures with."""

FILE_PIECES = 4
"""Of half as many bytes, that make a file."""


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
    rows : of a token chunk
    slots : of a row
    experts : that the slots of a chunk are spread over
    dtype : what the experts compute in
    threads : how many work at once
    seconds : how long to measure, about
    sample : some experts of the job's kind and sizes, whatever their weights
        What they do between the products is then part of the rate of these; without a sample, bare
        products of (d, d_out) matrices are measured.
    flops : floating-point operations of one row at one of these

    Returns
    -------
    rates : Rates
        Of one of the threads; links at their default. Files are small new ones in the directory for
        temporary files: a run that reads from a slow disk, or more than memory keeps, is slower.

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
    """One product of every expert; called, it gives the operations done."""

    def __init__(self, d: int, d_out: int, rows: int, experts: int, dtype: np.dtype):
        matrix_bytes = d * d_out * np.dtype(dtype).itemsize
        self.x = np.ones((rows, d), dtype)
        self.w = np.ones((max(min(experts, MOST_BYTES // matrix_bytes), 1), d, d_out), dtype)

    def __call__(self) -> int:
        for w in self.w:
            product(self.x, w)
        return 2 * self.x.size * self.w[0, 0].size * len(self.w)


class _Sample:
    """A tile of rows through every expert of a sample; called, it gives the operations done."""

    def __init__(self, sample: Sequence[Expert], flops: float, rows: int, dtype: np.dtype):
        self.sample, self.flops = sample, flops
        self.x = np.ones((rows, sample[0].d), dtype)

    def __call__(self) -> float:
        y = memory.empty((len(self.x), self.sample[0].d_out), self.x.dtype)
        for expert in self.sample:
            expert(self.x, out=y)
        return self.flops * len(self.x) * len(self.sample)


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


class _Exchange:
    """A chunk of two ranks is packed, one packet made, and all rows added up as they went; called,
    it gives the bytes of that packet and of the answers.
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
    """A temporary file to write and to read; both give the bytes handled."""

    def __init__(self) -> None:
        self.content = np.ones(MOST_BYTES // 2, np.uint8)
        self.file = tempfile.TemporaryFile(prefix="dask-ep-probe-", buffering=0)  # noqa: SIM115
        self.file.write(self.content.data)

    def write(self) -> int:
        """Write another one, of some pieces: the system has memory at hand for the first."""
        with tempfile.TemporaryFile(prefix="dask-ep-probe-", buffering=0) as file:
            return sum(file.write(self.content.data) or 0 for _ in range(FILE_PIECES))

    def read(self) -> int:
        """Read what the system has in its cache, into memory as the run's reads do."""
        target = memory.empty((len(self.content),), np.uint8)
        return os.preadv(self.file.fileno(), [target], 0)


def _same(rows: np.ndarray) -> np.ndarray:
    return rows


def rate(work: Callable[[], float], seconds: float) -> float:
    """What `work` says that it does, per second, after a call that warms up."""
    work()
    done, passed, start = 0.0, 0.0, time.perf_counter()
    while passed < seconds or done == 0:
        done += work()
        passed = time.perf_counter() - start
    return done / passed
