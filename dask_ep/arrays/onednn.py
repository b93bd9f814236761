"""How does oneDNN multiply matrices on the host?

oneDNN is Intel's library of kernels for neural networks, which PyTorch uses too. It generates its
kernels at run time for the CPU at hand, with the 16-bit instructions of Intel's and AMD's CPUs.

    rows (m, k) @ matrix (k, n)          not packed: one kernel for any m
    rows (m, k) @ Packed (k, n)          packed once, in the layout that kernels read, which pays
                                         most for few rows; in steps of a few sizes, one kernel
                                         each, of which the last is padded

From the wheel ``onednn-cpu-gomp``: later wheels of oneDNN need SYCL.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, files
from itertools import pairwise

import numpy as np

from dask_ep.arrays import memory
from dask_ep.arrays.onednn_kernels import (
    ADD,
    CACHE_LINE,
    COPY,
    FLOAT32,
    PRODUCT,
    SCALE,
    SILU,
    TIMES,
    Kernels,
    Matrix,
    Packed,
    openmp,
)

PACKAGE = "onednn-cpu-gomp"

ROWS_AT_ONCE = 256
"""The most rows of one product with a packed matrix, a multiple of `ROWS`: more is no faster."""

ROWS = (64, 16)
"""Remaining rows are processed as a multiple of the first of these, then of the second, padded with
zeros: one kernel for each number of rows would mean a new one, which takes 3 ms, for nearly each
chunk and expert."""

PANEL = 128
"""Columns that are packed at a time where columns collide: a multiple of the width of blocks."""

GATED_BYTES = 512 << 10
"""Bytes of gates that stay in a core's own cache until `up` is computed."""


class OneDnn(Kernels):
    """Products of float32, and of bfloat16 with sums in float32.

    Made from the loaded libraries, see `Kernels`.

    Notes
    -----
    The same arrays give the same bits with the same number of threads on the same kind of CPU.
    """

    def multiply(self, x: np.ndarray, w: Matrix, out: np.ndarray, *, add: bool = False) -> bool:
        """Write x @ w to `out`, or add it, and return True; False if the library does not support
        these dtypes or memory layouts on this CPU. Adding needs a contiguous `out`."""
        then = ADD if add else None
        if not isinstance(w, Packed):
            return self.run(PRODUCT, (np.ascontiguousarray(x) if add else x, w, out), then)
        return _in_steps(lambda x, out: self.run(PRODUCT, (x, w, out), then), x, out, ROWS_AT_ONCE)

    def gated(
        self, x: np.ndarray, gate: Packed, up: Packed, out: np.ndarray, alpha: float = 1.0
    ) -> bool:
        """Write silu(x @ gate) * (x @ up) to `out` (m, f), float32 or rounded to bfloat16, and
        return True; False if the library cannot. Runs of rows stay in cache between the two."""
        f = out.shape[1]
        fitting = max(GATED_BYTES // (f * FLOAT32.itemsize) // ROWS[0], 1) * ROWS[0]
        step = min(fitting, ROWS_AT_ONCE)
        gates = memory.empty((min(step, -(-len(x) // ROWS[1]) * ROWS[1]), f), FLOAT32)

        def some(x: np.ndarray, out: np.ndarray) -> bool:
            these = gates[: len(x)]
            return self.run(PRODUCT, (x, gate, these), (SILU, alpha)) and self.run(
                PRODUCT, (x, up, out, these), TIMES
            )

        return _in_steps(some, x, out, step)

    def pack(self, w: np.ndarray) -> Packed | None:
        """Pack a matrix in the layout that products read; None if it is not supported, or would
        take more bytes."""
        if self.packed_bytes(w) != w.nbytes:
            return None
        packed = Packed(self, w.shape, w.dtype, memory.empty((w.nbytes,), np.uint8))
        copy = self._pack_in_panels if _collides(w) and self._has_panels(packed) else self._pack
        return packed if copy(w, packed) else None

    def _pack(self, w: np.ndarray, packed: Packed) -> bool:
        return self.run(COPY, (w, packed))

    def _pack_in_panels(self, w: np.ndarray, packed: Packed) -> bool:
        """Pack some columns at a time, from a copy whose columns begin at different places in
        cache: twice as fast."""
        k, n = w.shape
        room = memory.empty((PANEL, k + CACHE_LINE // w.itemsize), w.dtype)
        for start in range(0, n, PANEL):
            columns = w[:, start : start + PANEL].T
            copied = room[: len(columns), :k]
            copied[...] = columns
            if not self._pack(copied.T, packed.columns(start, start + len(columns))):
                return False
        return True

    def _has_panels(self, packed: Packed) -> bool:
        """Whether each `PANEL` of columns lies on its own in a packed matrix, packed the same."""
        k, n = packed.shape
        if n <= PANEL:
            return False
        ways = [(self._blocks(one), self._steps(one)) for one in (packed, packed.columns(0, PANEL))]
        (_, wide, *_), (_, across) = ways[0]
        return ways[0] == ways[1] and PANEL % wide == 0 and across == k * wide

    def scale(self, numbers: np.ndarray, scales: np.ndarray, out: np.ndarray) -> bool:
        """Write numbers (n, w) of int8, uint8 or bfloat16, each times one of scales (n,) or (1,),
        to `out` (n, w), float32 or rounded to bfloat16, and return True; False if the library
        cannot."""
        return self.run(SCALE, (numbers, out, scales))

    def widened(self, w: Matrix) -> np.ndarray:
        """Copy a matrix of bfloat16, packed or not, to one of float32."""
        by_columns = isinstance(w, np.ndarray) and abs(w.strides[0]) < abs(w.strides[1])
        out = (
            memory.empty(w.shape[::-1], FLOAT32).T if by_columns else memory.empty(w.shape, FLOAT32)
        )
        if not self.run(COPY, (w, out)):
            if isinstance(w, Packed):
                raise RuntimeError(f"{self} cannot copy a matrix that it has packed")
            out[...] = w
        return out


def _collides(w: np.ndarray) -> bool:
    """Whether a matrix lies by columns, and neighbouring ones go to the same few places in cache:
    where they are a multiple of 2 KB apart, as in most models."""
    down, along = w.strides
    return down == w.itemsize and along >= 4096 and along % 2048 == 0


def _in_steps(
    run: Callable[[np.ndarray, np.ndarray], bool], x: np.ndarray, out: np.ndarray, most: int
) -> bool:
    """Call `run` with rows (m, k) and outputs (m, n) in steps of a few sizes; False if `run` does.

    The steps are contiguous arrays of `most` rows; of a multiple of the first of `ROWS`; and of a
    multiple of the second.
    """
    x, to = np.ascontiguousarray(x), np.ascontiguousarray(out)
    m, (many, few) = len(x), ROWS
    whole = m - m % many
    starts = [*range(0, whole - whole % most, most), whole - whole % most, whole]
    for start, stop in pairwise(starts):
        if start < stop and not run(x[start:stop], to[start:stop]):
            return False
    if rest := m - whole:
        padded = [np.zeros((-(-rest // few) * few, a.shape[1]), a.dtype) for a in (x, to)]
        for part, a in zip(padded, (x, to), strict=True):
            part[:rest] = a[whole:]
        if not run(*padded):
            return False
        to[whole:] = padded[1][:rest]
    if to is not out:
        out[...] = to
    return True


@cache
def installed_onednn() -> OneDnn | None:
    """oneDNN from its package, loaded into this process; None if it is not installed.

    Warns
    -----
    RuntimeWarning
        If it is installed, but a library that it needs is missing.
    """
    try:
        found = [file for file in files(PACKAGE) or () if file.name == "libdnnl.so.3"]
    except PackageNotFoundError:
        return None
    try:
        return OneDnn(ctypes.CDLL(str(found[0].locate())), openmp())
    except (IndexError, OSError) as error:
        warnings.warn(
            f"{PACKAGE} is installed, but cannot be loaded ({error}), so that products take "
            "longer; it needs libgomp.so.1, in Debian's and Ubuntu's package libgomp1",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
