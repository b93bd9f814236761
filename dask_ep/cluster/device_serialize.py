"""How are arrays on a device sent between workers?

    UCX   device ─────────────────────────────> device       frames are device memory
    TCP   device ─> host ═══ socket ═══> host ─> device      one copy each way

Dask's own serialization of CuPy arrays needs RMM or Numba over TCP, and loses bfloat16: it sends
dtypes as type strings, and that of bfloat16 is "<V2", two raw bytes (distributed 2026.8). Here
dtypes are sent by name.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import ml_dtypes
import numpy as np
from distributed.protocol import dask_deserialize, dask_serialize
from distributed.protocol.cuda import cuda_deserialize, cuda_serialize

from dask_ep.arrays.device_streams import download
from dask_ep.arrays.namespaces import Array, namespace

Header = dict[str, Any]


def register(xp: Any) -> None:
    """Register the serialization of arrays of a device namespace; once in every worker."""
    cuda_serialize.register(xp.ndarray, _array_apart)
    cuda_deserialize.register(xp.ndarray, _array_together)
    dask_serialize.register(xp.ndarray, _array_to_host)
    dask_deserialize.register(xp.ndarray, _array_together)


def _array_apart(array: Array) -> tuple[Header, list[Array]]:
    """An array as bytes on the device."""
    xp = namespace(array)
    flat = xp.ascontiguousarray(array).reshape(-1).view(np.uint8)
    header = {"shape": array.shape, "dtype": array.dtype.name, "namespace": xp.__name__}
    return header, [flat]


def _array_together(header: Header, frames: list[Any]) -> Array:
    """The same array on this worker's device; frames are device or host memory."""
    xp = import_module(header["namespace"])
    (frame,) = frames
    if not hasattr(frame, "__cuda_array_interface__") and not isinstance(frame, xp.ndarray):
        frame = np.frombuffer(frame, np.uint8)
    return xp.asarray(frame).view(_dtype_called(header["dtype"])).reshape(header["shape"])


def _array_to_host(array: Array) -> tuple[Header, list[memoryview]]:
    """An array as bytes that were copied to the host."""
    header, frames = _array_apart(array)
    return header, [download(frame).data for frame in frames]


def _dtype_called(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, name))
