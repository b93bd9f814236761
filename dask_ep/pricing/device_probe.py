"""How fast does a GPU do what a run does?

This takes about a second, on the first visible GPU: products of as many rows as an expert gets of a
chunk, by the calls that a run mostly uses (one for all experts if rows are few, otherwise one for
each); gathering rows; uploads and downloads; and, on the host, files.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np

from dask_ep.arrays import device
from dask_ep.arrays.checks import computing_dtype
from dask_ep.arrays.device_streams import download, pinned_empty, upload
from dask_ep.errors import NoDeviceError
from dask_ep.kernel.device_kernel import PADDED_ROWS, gather, products
from dask_ep.laws.costs import Rates
from dask_ep.pricing.probe import probe_files, rate

MOST_DEVICE_BYTES = 256 << 20
"""Maximum bytes of the rows, and of the matrices, that are used to measure."""


def probe_device(
    d: int,
    width: int,
    *,
    rows: int = 16_384,
    slots: int = 2,
    experts: int = 8,
    dtype: np.dtype = np.dtype(np.float32),  # noqa: B008 - it does not change
    exact: bool = True,
    seconds: float = 1.0,
) -> Rates:
    """Measure the first GPU here.

    Parameters
    ----------
    d, width : width of a token row, and of an expert's intermediate rows
    rows : rows of a token chunk
    slots : slots of a row
    experts : number of experts that the slots of a chunk are spread over
    dtype : dtype of the factors of products
    exact : whether sums are as exact as float32's, see `device_kernel.products`
    seconds : approximate time to measure

    Returns
    -------
    rates : Rates
        `flops` and `copy` of the GPU, `lane` of its uploads and downloads; others as in `probe`.

    Raises
    ------
    NoDeviceError
        If there is no GPU; the message says what a plan needs instead.
    """
    try:
        device.find_devices()
    except NoDeviceError as error:
        raise NoDeviceError(
            "a plan for GPUs needs their rates, but there is no GPU to measure: "
            f"{error}. Give the rates as rates=Rates(flops=..., copy=..., lane=...) or --rates "
            "flops=...,copy=...,lane=...: operations of a GPU, bytes copied in its memory, and "
            "bytes copied from or to the host, per second"
        ) from error
    xp = import_module(device.NAMESPACE)
    try:
        return _measure(xp, d, width, rows, slots, experts, np.dtype(dtype), exact, seconds)
    finally:
        xp.get_default_memory_pool().free_all_blocks()  # a worker may have the same GPU


def _measure(
    xp: Any,
    d: int,
    width: int,
    rows: int,
    slots: int,
    experts: int,
    dtype: np.dtype,
    exact: bool,
    seconds: float,
) -> Rates:
    rows = max(min(rows, MOST_DEVICE_BYTES // (d * dtype.itemsize)), 1)
    of_expert = max(rows * slots // experts, 1)
    count = max(
        min(experts, MOST_DEVICE_BYTES // (d * width * dtype.itemsize), rows // of_expert), 1
    )
    of_expert = min(of_expert, rows)
    host = pinned_empty(xp, (rows, d), dtype)
    host.fill(1)
    tokens, order = upload(xp, host), xp.arange(rows, dtype=np.int64)[::-1].copy()
    matrices = list(xp.zeros((count, d, width), dtype=dtype))
    less = int(of_expert > PADDED_ROWS[0])  # equal numbers of rows would go into one call
    starts = range(0, count * of_expert, of_expert)
    bounds = [(start, start + of_expert - less * (e % 2)) for e, start in enumerate(starts)]
    out = xp.empty((count * of_expert, width), dtype=computing_dtype(dtype))

    def waiting(work: Callable[[], object], amount: float) -> Callable[[], float]:
        def run() -> float:
            work()
            xp.cuda.get_current_stream().synchronize()
            return amount

        return run

    flops = 2.0 * sum(stop - start for start, stop in bounds) * d * width
    some = tokens[: count * of_expert]
    through = waiting(lambda: products(some, matrices, bounds, out, exact), flops)
    gathered = waiting(lambda: gather(tokens, order), 2.0 * tokens.nbytes)
    copied = waiting(lambda: (upload(xp, host), download(tokens)), 2.0 * tokens.nbytes)
    return Rates(
        flops=rate(through, 0.4 * seconds),
        copy=rate(gathered, 0.2 * seconds),
        lane=rate(copied, 0.2 * seconds),
        **probe_files(0.1 * seconds),
    )
