"""Which GPUs are there, and how much of their memory is free?

This is the only module that names CuPy. All others use the namespace of the arrays they are given.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from traceback import clear_frames
from typing import Any

import numpy as np

from dask_ep.arrays.namespaces import Array, namespace
from dask_ep.errors import DeviceMemoryError, NoDeviceError

NAMESPACE = "cupy"
"""The namespace of device arrays; tests replace it by one that keeps CuPy's rules on a CPU."""


@dataclass(frozen=True)
class Device:
    """A GPU that this process sees."""

    index: int
    name: str
    memory: int
    #: total bytes
    of_host: bool = False
    #: whether it shares the host's memory, as on a system on a chip


def find_devices() -> list[Device]:
    """List the GPUs that CuPy finds; ``CUDA_VISIBLE_DEVICES`` narrows them down.

    Raises
    ------
    NoDeviceError
        If CuPy or a library of CUDA cannot be imported or there is no GPU; the message says what to
        install or check.

    Notes
    -----
    Reads counters and properties of the CUDA runtime; nothing is allocated on a device.
    """
    try:
        import cupy
    except ImportError as error:
        raise NoDeviceError(
            f"a GPU needs CuPy, which cannot be imported here ({error}); install it with "
            "pip install 'cupy-cuda12x>=14' (CUDA 12), or cupy-cuda13x (CUDA 13)"
        ) from error
    runtime = cupy.cuda.runtime
    try:
        count = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        raise NoDeviceError(_no_device(str(error))) from error
    if not count:
        raise NoDeviceError(_no_device("the driver lists none"))
    try:
        cupy.cuda.cublas  # noqa: B018 - imported on first access
        cupy.cuda.nvrtc.getVersion()
    except (ImportError, RuntimeError) as error:
        raise NoDeviceError(
            f"CuPy finds a GPU, but not CUDA's libraries ({error}); install them with "
            "pip install 'cupy-cuda12x[ctk]' (or 'cupy-cuda13x[ctk]'), or the CUDA toolkit"
        ) from error
    properties = [runtime.getDeviceProperties(index) for index in range(count)]
    return [
        Device(index, one["name"].decode(), one["totalGlobalMem"], bool(one["integrated"]))
        for index, one in enumerate(properties)
    ]


def _no_device(why: str) -> str:
    return (
        f"CuPy finds no GPU: {why}; check what nvidia-smi lists, and that CUDA_VISIBLE_DEVICES "
        "does not hide the device"
    )


# --- memory ------------------------------------------------------------------------------------


@contextmanager
def explain_memory(xp: Any, needed: int, rows: int | None = None, held: int = 0) -> Iterator[None]:
    """If the device runs out of memory inside, report what was needed, what is free, and what fits.

    Parameters
    ----------
    xp : namespace of the arrays inside; nothing is done for NumPy
    needed : bytes that the work inside needs at most
    rows : rows of the token chunk that the memory is for; None if it is for experts
    held : bytes of `needed` that are in use already, by the chunk

    Raises
    ------
    DeviceMemoryError
    """
    if xp is np:
        yield
        return
    try:
        yield
    except xp.cuda.memory.OutOfMemoryError as error:
        clear_frames(error.__traceback__)  # arrays of the failed work are free again
        free, total = free_memory(xp)
        numbers = f"it needs {needed} bytes, {free} of {total} are free ({error})"
        if rows is None:
            raise DeviceMemoryError(
                f"not enough device memory for the experts: {numbers}; use more GPUs and ranks, "
                "experts held_as_stored, or no GPU (--threads or --processes): there experts that "
                "do not fit are processed in passes"
            ) from error
        fits = max(min((free + held) * rows // max(needed, 1), rows // 2), 1)
        raise DeviceMemoryError(
            f"not enough device memory for a chunk of {rows} rows: {numbers}; {fits} rows would "
            "fit into this step, and other steps may take fewer. Finished blocks are kept: "
            f"continue with --resume --chunk-rows {fits}"
        ) from error


def explain_chunk_memory(chunk: Array, row_bytes: int) -> AbstractContextManager[None]:
    """As `explain_memory` for a step on a loaded chunk, by its most bytes per row."""
    return explain_memory(namespace(chunk), len(chunk) * row_bytes, len(chunk), chunk.nbytes)


def free_memory(xp: Any) -> tuple[int, int]:
    """Return the bytes that can still be allocated on the device in use, and the total.

    Memory that CuPy's pool holds but has not handed out counts as free; a limit of the pool counts
    as the device's size.
    """
    free, total = xp.cuda.runtime.memGetInfo()
    pool = xp.get_default_memory_pool()
    free += pool.free_bytes()
    limit = pool.get_limit()
    if limit:
        free, total = min(free, max(limit - pool.used_bytes(), 0)), min(total, limit)
    return free, total
