"""Where are the weights of experts, and how are they read?

A `Weight` is one array per expert, left where it is (a file, an array, a Dask array) until some of
them are read, one by one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from math import prod
from typing import Any

import dask.array as da
import numpy as np
from dask.base import normalize_token

from dask_ep.arrays import blas, memory
from dask_ep.arrays.checks import refuse_masked
from dask_ep.arrays.device_streams import pinned_empty
from dask_ep.arrays.namespaces import UNDERFLOW_IS_ZERO, Array, is_array, namespace
from dask_ep.experts.device_sources import DeviceSource, put
from dask_ep.experts.quantized import QuantizedSource, fill_on_device
from dask_ep.kernel.bfloat16 import BFLOAT16, narrowed, serves
from dask_ep.storage.fingerprint import describe
from dask_ep.storage.remote import joined
from dask_ep.storage.sources import ArraySource, Source, open_source, refuse_missing

WIDEN_STEP = 1 << 16
"""Numbers that are widened at a time: they stay in cache between the two steps."""


class Weight:
    """One weight of every expert.

    `parts` is a Source or Dask array (E, ...), or a tuple of Sources, one per expert.
    """

    def __init__(self, parts: Source | da.Array | tuple[Source, ...], ids: range | tuple[int, ...]):
        self.parts, self.ids = parts, ids

    @classmethod
    def of(cls, obj: Any, name: str) -> Weight:
        """Make a `Weight` of any supported form; lists have one entry per expert."""
        if isinstance(obj, Weight):
            return obj
        if isinstance(obj, (list, tuple)):
            if not obj:
                raise ValueError(f"{name} must have one entry per expert, but has none")
            if any(isinstance(part, da.Array) for part in obj):
                each = [_as_dask(part, f"{name}[{e}]") for e, part in enumerate(obj)]
                return cls.of(da.stack(each), name)
            parts = tuple(_source(part, f"{name}[{e}]") for e, part in enumerate(obj))
            if len({part.shape for part in parts}) > 1:
                odd = next(e for e, part in enumerate(parts) if part.shape != parts[0].shape)
                raise ValueError(
                    f"all experts must have weights of one shape, but {name}[{odd}] is "
                    f"{parts[odd].shape} and {name}[0] is {parts[0].shape}"
                )
            return cls(parts, range(len(parts)))
        if isinstance(obj, da.Array):
            refuse_masked(obj, name)
        whole = obj if isinstance(obj, da.Array) else _source(obj, name)
        if whole.ndim == 0:
            raise ValueError(f"{name} must have the experts along its first axis, but is a number")
        return cls(whole, range(whole.shape[0]))

    @property
    def _one(self) -> Source | da.Array:
        """What stands for all: the source of the first expert, or the only one."""
        return self.parts[0] if isinstance(self.parts, tuple) else self.parts

    @property
    def shape(self) -> tuple[int, ...]:
        """(E, ...) of the experts held here."""
        one = self._one.shape if isinstance(self.parts, tuple) else self._one.shape[1:]
        return (len(self.ids), *one)

    @property
    def dtype(self) -> np.dtype:
        return self._one.dtype

    @property
    def nbytes(self) -> int:
        """Bytes as stored, of the experts held here."""
        if isinstance(self.parts, tuple):
            return sum(self.parts[e].nbytes for e in self.ids if e >= 0)
        held = sum(e >= 0 for e in self.ids)
        return held * int(self.parts.nbytes) // max(self.parts.shape[0], 1)

    def sources(self) -> tuple[Source, ...]:
        """The source of these experts, unless it is a Dask array."""
        if isinstance(self.parts, da.Array):
            return ()
        return self.parts if isinstance(self.parts, tuple) else (self.parts,)

    def ranges(self) -> Iterator[tuple[Source, int, int]]:
        """The sources and rows that hold these experts; see `Source.ranges`."""
        for e in self.ids:
            if e >= 0 and not isinstance(self.parts, da.Array):
                source, start, stop = self.place(e)
                yield from source.ranges(start, stop)

    def place(self, e: int) -> tuple[Source, int, int]:
        """The source that holds expert `e` of `ids`, and its rows there."""
        if isinstance(self.parts, tuple):
            return self.parts[e], 0, self.parts[e].shape[0]
        assert isinstance(self.parts, Source)  # a Dask array is a task's argument, see `detached`
        return self.parts, e, e + 1

    def subset(self, ids: Sequence[int]) -> Weight:
        """Keep the experts `ids` (positions here; -1 stays an empty place)."""
        ids = tuple(self.ids[e] if e >= 0 else -1 for e in ids)
        if not isinstance(self.parts, (tuple, ArraySource, DeviceSource)):
            return Weight(self.parts, ids)
        held = [e for e in ids if e >= 0] or [0]  # one, so that empty places have a shape
        renumbered = iter(range(len(held)))
        ids = tuple(next(renumbered) if e >= 0 else -1 for e in ids)
        return Weight(tuple(map(self._part, held)), ids)

    def _part(self, e: int) -> Source:
        """One expert alone, so that a task carries only its rank's part."""
        if isinstance(self.parts, tuple):
            return self.parts[e]
        if isinstance(self.parts, DeviceSource):
            return self.parts.part(e)
        assert isinstance(self.parts, ArraySource)
        return ArraySource(self.parts.array[e], self.parts.name)

    def collection(self) -> da.Array | None:
        """The Dask array that holds these experts in one chunk, if there is one."""
        if not isinstance(self.parts, da.Array):
            return None
        return self.parts[[e for e in self.ids if e >= 0]].rechunk(-1)

    def detached(self) -> Weight:
        """The same without its Dask array, for a task that gets the array as an argument."""
        if not isinstance(self.parts, da.Array):
            return self
        return Weight(_Detached(self.parts.shape, self.parts.dtype), self.ids)

    @UNDERFLOW_IS_ZERO
    def read(
        self, dtype: np.dtype, given: Sequence[np.ndarray] | None = None
    ) -> list[Array | None]:
        """Read one array per expert, None for an empty place; each converted separately.

        Matrices that are bfloat16, or are decoded to it exactly, stay bfloat16 instead of float32
        where products with them use 16 bits (`dask_ep.kernel.bfloat16`).
        """
        read = iter(() if given is None else given)
        arrays: list[Array | None] = []
        for e in self.ids:
            if e < 0:
                arrays.append(None)
            elif given is not None:
                arrays.append(_checked(next(read)))
            else:
                arrays.append(self._read_one(e, dtype).reshape(self.shape[1:]))
        return [None if a is None else self._as_computed(a, dtype) for a in arrays]

    def _read_one(self, e: int, dtype: np.dtype) -> Array:
        source, start, stop = self.place(e)
        if isinstance(source, QuantizedSource) and self.loaded_dtype(dtype) == BFLOAT16:
            narrow = source.read_bfloat16(start, stop)
            if narrow is not None:
                return narrow
        return source.read(start, stop)

    def loaded_dtype(self, dtype: np.dtype, *, on_device: bool = False) -> np.dtype:
        """The dtype in which one is held to compute in a dtype, judged by dtypes."""
        narrow = dtype == np.float32 and self.is_bfloat16
        if narrow and (on_device or blas.bfloat16_library() is not None):
            return BFLOAT16
        return np.dtype(dtype)

    def loaded_bytes(self, dtype: np.dtype, *, on_device: bool = False) -> int:
        """Bytes of one expert's weight, held to compute in a dtype, at most."""
        return prod(self.shape[1:]) * self.loaded_dtype(dtype, on_device=on_device).itemsize

    @property
    def is_bfloat16(self) -> bool:
        """Whether these are matrices of bfloat16, or decoded to it, judged by dtypes."""
        if len(self.shape) != 3:
            return False
        one = self._one
        return one.dtype == BFLOAT16 or (isinstance(one, QuantizedSource) and one.is_bfloat16)

    def _as_computed(self, array: Array, dtype: np.dtype) -> Array:
        on_host = isinstance(array, np.ndarray)
        stays = serves(array) if on_host else array.dtype == BFLOAT16
        if array.ndim == 2 and dtype == np.float32 and stays:
            return array
        wide = _converted(array, dtype)
        is_quantized = isinstance(self._one, QuantizedSource)
        return narrowed(wide) if on_host and wide.ndim == 2 and is_quantized else wide

    @property
    def on_device(self) -> bool:
        """Whether these weights are on a device already, and stay where they are."""
        return isinstance(self._one, DeviceSource)

    def fill(
        self, targets: Sequence[Array | None], given: Sequence[np.ndarray] | None = None
    ) -> None:
        """Read each expert held here into a device array; one per place, None if empty.

        Notes
        -----
        Bytes are copied as stored, through pinned memory: the next expert is read while the last
        is copied.
        """
        read = iter(() if given is None else given)
        for e, target in zip(self.ids, targets, strict=True):
            if e < 0:
                continue
            assert target is not None
            if given is not None:
                _put(target, _checked(next(read)))
            else:
                one = target if isinstance(self.parts, tuple) else target[None]
                fill_on_device(*self.place(e), one)

    def fingerprint(self) -> dict[str, Any]:
        """Identify these weights, by source and state; see `Source.fingerprint`."""
        ids = self.ids if isinstance(self.ids, range) else list(self.ids)
        parts = describe(self.parts)  # of files of several formats, a hash
        return (parts if isinstance(parts, dict) else {"parts": parts}) | describe({"ids": ids})

    def __dask_tokenize__(self) -> object:
        return normalize_token((self.parts, tuple(self.ids)))


def _converted(array: Array, dtype: np.dtype) -> Array:
    """The array in another dtype, in recycled memory, whose pages are mapped already."""
    if array.dtype == dtype:
        return array
    out = memory.empty(array.shape, dtype, like=array)
    on_host = isinstance(array, np.ndarray) and array.flags.c_contiguous
    if on_host and array.dtype == BFLOAT16 and dtype == np.float32:
        _widen(array.reshape(-1).view(np.uint16), out.reshape(-1).view(np.uint32))
    else:
        out[...] = array
    return out


def _widen(bits: np.ndarray, out: np.ndarray) -> None:
    """Widen bfloat16 to float32 by shifting bits: twice as fast as ``astype``."""
    for start in range(0, len(bits), WIDEN_STEP):
        wide = out[start : start + WIDEN_STEP]
        wide[...] = bits[start : start + WIDEN_STEP]
        np.left_shift(wide, 16, out=wide)


class _Detached(Source):
    """Placeholder for a Dask array whose value comes as a task's argument."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype):
        self.shape, self.dtype, self.name = shape, dtype, "Dask array"

    def read(self, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        raise TypeError("a Dask array of weights is read by the graph: pass its value to load")

    def fingerprint(self) -> dict[str, Any]:
        return self._describe()


def _checked(value: Array) -> Array:
    """A value of a Dask array; its blocks can be masked even if the array's `_meta` is not."""
    refuse_masked(value, "a Dask array of weights")
    return value


def _put(target: Array, value: Array) -> None:
    """Copy a value that is in memory, here or on the device already."""
    if not isinstance(value, np.ndarray):
        target[...] = value.astype(target.dtype, copy=False)
        return
    host = pinned_empty(namespace(target), value.shape, value.dtype)
    host[...] = value
    put(target, host)


def _source(obj: Any, name: str) -> Source:
    """A Source of a weight, without missing chunks; device arrays are used as they are."""
    if not isinstance(obj, np.ndarray) and is_array(obj):
        return DeviceSource(obj, name)
    is_path = isinstance(obj, str) or hasattr(obj, "__fspath__")
    source = open_source(obj) if is_path else open_source(obj, name)
    refuse_missing(source)
    return source


def _as_dask(part: Any, name: str) -> da.Array:
    if isinstance(part, da.Array):
        refuse_masked(part, name)
        return part
    source = _source(part, name)
    return da.from_array(source.read(0, source.shape[0]), chunks=-1)


class Weights:
    """The weights of some experts, by name: their sizes and locations."""

    weights: dict[str, Weight]
    d: int
    hidden: int | None
    d_out: int

    @property
    def widest(self) -> int:
        """Width of the widest row on the way through an expert."""
        return max(self.d, self.hidden or 0, self.d_out)

    @property
    def is_bfloat16(self) -> bool:
        """Whether matrices are bfloat16, or are decoded to it, judged by dtypes."""
        return any(weight.is_bfloat16 for weight in self.weights.values())

    def loaded_bytes(self, dtype: np.dtype, *, on_device: bool = False) -> int:
        """Bytes of one expert, loaded to compute in a dtype."""
        return sum(w.loaded_bytes(dtype, on_device=on_device) for w in self.weights.values())

    def held_bytes(self, dtype: np.dtype, *, on_device: bool = False) -> int:
        """Bytes of all experts that are held, loaded to compute in a dtype."""
        return self.num_held * self.loaded_bytes(dtype, on_device=on_device)

    @property
    def dtype(self) -> np.dtype:
        return next(iter(self.weights.values())).dtype

    @property
    def nbytes(self) -> int:
        return sum(weight.nbytes for weight in self.weights.values())

    @property
    def num_held(self) -> int:
        """Experts without the empty places."""
        return sum(e >= 0 for e in next(iter(self.weights.values())).ids)

    @property
    def parameters(self) -> int:
        """Numbers in one expert: each row takes twice as many FLOPs."""
        return sum(int(np.prod(weight.shape[1:])) for weight in self.weights.values())

    @property
    def is_square(self) -> bool:
        """Whether all matrices are square, so that shapes do not distinguish in from out."""
        shapes = [weight.shape for weight in self.weights.values()]
        return all(shape[1] == shape[2] for shape in shapes if len(shape) == 3)

    def sources(self) -> list[Source]:
        """The sources of the weights that are not Dask arrays."""
        return [source for weight in self.weights.values() for source in weight.sources()]

    def joined(self) -> AbstractContextManager[bool]:
        """While this is open, this thread reads neighbouring ranges of remote files at once; gives
        whether there are any."""
        return joined(part for weight in self.weights.values() for part in weight.ranges())

    def collections(self) -> dict[str, da.Array]:
        """The weights that are Dask arrays, each the experts held here in one chunk."""
        found = {name: weight.collection() for name, weight in self.weights.items()}
        return {name: array for name, array in found.items() if array is not None}
