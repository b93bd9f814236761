"""How are the bytes of a source copied to a device?

As stored, through pinned memory; quantized numbers and other dtypes are converted on the device.
"""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import numpy as np

from dask_ep.arrays.device_streams import fill, pinned_empty, upload
from dask_ep.arrays.namespaces import Array, namespace
from dask_ep.storage.sources import Source


class DeviceSource(Source):
    """Numbers that are on a device already; float8, for which CuPy has no dtype, as uint8."""

    def __init__(self, array: Array, name: str, dtype: np.dtype | None = None):
        self.shape, self.name, self.array = array.shape, name, array
        self.dtype = array.dtype if dtype is None else dtype
        self._uuid = uuid4().hex  # the content is not brought to the host to be hashed

    def read(self, start: int, stop: int, out: np.ndarray | None = None) -> Array:
        return self.array[start:stop]

    def part(self, e: int) -> DeviceSource:
        """The array at one index of the first axis; the same object on each call."""
        part = DeviceSource(self.array[e], self.name, self.dtype)
        part._uuid = f"{self._uuid}-{e}"
        return part

    def fingerprint(self) -> dict[str, Any]:
        return self._describe() | {"uuid": self._uuid}


def put(out: Array, host: np.ndarray) -> None:
    """Copy a pinned array into a device array of its shape, converted there if necessary."""
    if out.dtype == host.dtype and out.flags.c_contiguous:
        fill(out, host)
    else:
        out[...] = upload(namespace(out), host).astype(out.dtype, copy=False)


def bytes_on(xp: Any, source: Source, start: int, stop: int) -> Array:
    """Codes as stored; float8 as uint8, since CuPy has no dtype for it."""
    if isinstance(source, DeviceSource):
        return source.read(start, stop).view(np.uint8)
    host = pinned_empty(xp, (stop - start, *source.shape[1:]), source.dtype)
    source.read(start, stop, out=host)
    return upload(xp, host.view(np.uint8))


def held_on_device(source: Source, start: int, stop: int, xp: Any) -> DeviceSource:
    """Read rows as they are stored into a device's memory."""
    if isinstance(source, DeviceSource):
        return DeviceSource(source.array[start:stop], source.name, source.dtype)
    host = pinned_empty(xp, (stop - start, *source.shape[1:]), source.dtype)
    source.read(start, stop, out=host)
    few_bits = host.dtype.itemsize == 1
    array = xp.empty(host.shape, dtype=np.uint8 if few_bits else host.dtype)
    fill(array, host.view(array.dtype))
    return DeviceSource(array, source.name, source.dtype)
