"""How do chunks and packets that live on a device travel between workers?

    UCX   device ─────────────────────────────> device       frames are device memory
    TCP   device ─> host ═══ socket ═══> host ─> device      one copy each way

Dask's own way for CuPy arrays needs RMM or Numba over TCP, does not know packets, which it would
pickle through the host even where UCX is there, and loses bfloat16: it passes dtypes on as type
strings, and that of bfloat16 is "<V2", two raw bytes (distributed 2026.8). Here every array tells
its dtype by name.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import ml_dtypes
import numpy as np
from distributed.protocol import dask_deserialize, dask_serialize
from distributed.protocol.cuda import cuda_deserialize, cuda_serialize

from dask_ep.arrays import Array, namespace
from dask_ep.device import download
from dask_ep.pack import Packet

Header = dict[str, Any]


def register(xp: Any) -> None:
    """Send arrays of a device namespace, and packets of them, in this way; in every worker once."""
    for cls, take_apart, put_together in (
        (xp.ndarray, _array_apart, _array_together),
        (Packet, _packet_apart, _packet_together),
    ):
        cuda_serialize.register(cls, take_apart)
        cuda_deserialize.register(cls, put_together)
        dask_serialize.register(cls, _from_host(take_apart))
        dask_deserialize.register(cls, put_together)


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


def _packet_apart(packet: Packet) -> tuple[Header, list[Array]]:
    if isinstance(packet.rows, np.ndarray):
        raise NotImplementedError("a packet on the host, which pickle moves without a copy")
    headers, frames = [], []
    for array in packet:
        if array is not None:
            header, flat = _array_apart(array)
            headers.append(header)
            frames += flat
    return {"arrays": headers}, frames


def _packet_together(header: Header, frames: list[Any]) -> Packet:
    arrays = [
        _array_together(one, [frame]) for one, frame in zip(header["arrays"], frames, strict=True)
    ]
    return Packet(*arrays, *[None] * (len(Packet._fields) - len(arrays)))


def _from_host(take_apart: Any) -> Any:
    """Frames copied to the host."""

    def apart(obj: Any) -> tuple[Header, list[memoryview]]:
        header, frames = take_apart(obj)
        return header, [memoryview(download(frame)) for frame in frames]

    return apart


def _dtype_called(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, name))
