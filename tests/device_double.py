"""What would CuPy do, and what would it copy between device and host?

`DeviceArray` keeps CuPy's rules without a card: its memory is a NumPy array that nobody else sees.
The rules are those of CuPy's sources (14.2): which functions there are and with which arguments,
what is refused, what waits for the device. Where CuPy's result is undefined (a position assigned
twice, an unsorted table), the double raises; where it is not the same each time (``add.at``),
neither is the double's.

    with watch() as traffic:
        ...
    traffic.to_host, traffic.to_device        bytes of each copy, in their order

The namespace is the module ``device_double``, importable under that name, as ``cupy`` is. What it
lacks may exist in CuPy: look it up there and add it with its signature.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import scipy.special
from dask.array.backends import _nannumel, _numel_arraylike
from dask.array.dispatch import (
    concatenate_lookup,
    empty_lookup,
    nannumel_lookup,
    numel_lookup,
    take_lookup,
    tensordot_lookup,
    to_numpy_dispatch,
)
from dask.sizeof import sizeof

# --- what was copied ---------------------------------------------------------------------------


class Traffic:
    """Bytes of each copy between device and host."""

    def __init__(self) -> None:
        self.to_host: list[int] = []
        self.to_device: list[int] = []


_watchers: list[Traffic] = []
_lock = threading.Lock()


@contextmanager
def watch() -> Iterator[Traffic]:
    """Note all copies while inside, those of other threads too."""
    traffic = Traffic()
    with _lock:
        _watchers.append(traffic)
    try:
        yield traffic
    finally:
        with _lock:
            _watchers.remove(traffic)


def _note_to_host(nbytes: int) -> None:
    with _lock:
        for traffic in _watchers:
            traffic.to_host.append(nbytes)


def _note_to_device(nbytes: int) -> None:
    with _lock:
        for traffic in _watchers:
            traffic.to_device.append(nbytes)


# --- the array ---------------------------------------------------------------------------------

namespace = ModuleType("device_double", "What ``cupy`` is to CuPy's arrays.")
sys.modules["device_double"] = namespace

SCALARS = (bool, int, float, complex, np.generic)


class DeviceArray:
    """An array with CuPy's rules."""

    __module__ = "device_double"
    __slots__ = ("_a",)
    __array_priority__ = 100
    __hash__ = None

    def __init__(
        self,
        shape: Any,
        dtype: Any = float,
        memptr: MemoryPointer | None = None,
        strides: None = None,
        order: str = "C",
    ):
        if memptr is None:
            self._a = _garbage(shape, dtype, order)
        else:
            self._a = np.asarray(_Bytes(memptr)).view(dtype).reshape(shape)

    # --- what it is ---

    shape = property(lambda self: self._a.shape)
    dtype = property(lambda self: self._a.dtype)
    ndim = property(lambda self: self._a.ndim)
    size = property(lambda self: self._a.size)
    nbytes = property(lambda self: self._a.nbytes)
    itemsize = property(lambda self: self._a.itemsize)
    strides = property(lambda self: self._a.strides)
    flags = property(lambda self: self._a.flags)
    T = property(lambda self: _wrap(self._a.T))
    data = property(lambda self: MemoryPointer(Memory(self._a), 0))

    def __len__(self) -> int:
        if self.ndim == 0:
            raise TypeError("len() of unsized object")
        return self.shape[0]

    def __iter__(self) -> Iterator[DeviceArray]:
        if self.ndim == 0:
            raise TypeError("iteration over a 0-d array")
        return (self[i] for i in range(len(self)))

    # --- to the host: explicit, and counted ---

    def get(
        self,
        stream: Stream | None = None,
        order: str = "C",
        out: np.ndarray | None = None,
        blocking: bool = True,
    ) -> np.ndarray:
        _note_to_host(self.nbytes)
        if out is None:
            return self._a.copy(order)
        if (out.dtype, out.shape) != (self.dtype, self.shape):
            raise TypeError(f"{self.dtype} {self.shape} cannot go to {out.dtype} {out.shape}")
        stream = Stream.null if stream is None else stream
        stream._start(lambda: np.copyto(out, self._a))
        if blocking:
            stream.synchronize()
        return out

    def set(self, arr: np.ndarray, stream: Stream | None = None) -> None:
        if not isinstance(arr, np.ndarray):
            raise TypeError("Only numpy.ndarray can be set to cupy.ndarray")
        if (arr.dtype, arr.shape) != (self.dtype, self.shape):
            raise TypeError(f"{arr.dtype} {arr.shape} cannot go to {self.dtype} {self.shape}")
        _note_to_device(arr.nbytes)
        into = _without_owner(self._a)
        (Stream.null if stream is None else stream)._start(lambda: np.copyto(into, arr))

    def item(self) -> Any:
        if self.size != 1:
            raise ValueError("can only convert an array of size 1 to a Python scalar")
        return self.get().item()

    def tolist(self) -> Any:
        return self.get().tolist()

    def __bool__(self) -> bool:
        if self.size != 1:
            raise ValueError("The truth value of an array of any other size than 1 is ambiguous")
        return bool(self.get())

    def __int__(self) -> int:
        return int(self.get())

    def __float__(self) -> float:
        return float(self.get())

    def __complex__(self) -> complex:
        return complex(self.get())

    def __repr__(self) -> str:
        return repr(self.get())

    def __str__(self) -> str:
        return str(self.get())

    def __format__(self, spec: str) -> str:
        return format(self.get(), spec)

    def __reduce__(self) -> tuple[Any, ...]:
        return array, (self.get(order="A"),)

    def __copy__(self) -> DeviceArray:
        return self.copy()

    def __deepcopy__(self, memo: dict) -> DeviceArray:
        return self.copy()

    # --- to the host: implicit, and refused ---

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        raise TypeError(
            "Implicit conversion to a NumPy array is not allowed. "
            "Please use `.get()` to construct a NumPy array explicitly."
        )

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        inout = inputs
        if "out" in kwargs:
            inout += kwargs["out"]
            (kwargs["out"],) = kwargs["out"]
        func = _UFUNCS.get(ufunc.__name__) or _SPECIAL.get(ufunc.__name__)
        if func is not None and method != "__call__":
            func = getattr(func, method, None)
        if func is None:
            return NotImplemented
        if not all(isinstance(x, (*SCALARS, DeviceArray, np.ndarray)) for x in inout):
            return NotImplemented
        return func(*inputs, **kwargs)

    def __array_function__(self, func: Any, types: Any, args: tuple, kwargs: dict) -> Any:
        if func.__module__ != "numpy":  # functions of numpy.linalg and others, which are not here
            return NotImplemented
        ours = vars(namespace).get(func.__name__)
        if ours is None or ours is func:
            return NotImplemented
        if not all(issubclass(t, (DeviceArray, np.ndarray)) for t in types):
            return NotImplemented
        return ours(*args, **kwargs)

    # --- indexing ---

    def __getitem__(self, key: Any) -> DeviceArray:
        return _wrap(self._a[_index(self._a, key)])

    def __setitem__(self, key: Any, value: Any) -> None:
        where = _index(self._a, key)
        fancy = any(isinstance(k, np.ndarray) for k in where)
        if isinstance(value, DeviceArray):
            value = value._a
        elif isinstance(value, SCALARS):
            pass
        elif fancy:
            value = array(value)._a
        elif np.ndim(value):
            raise ValueError("non-scalar numpy.ndarray cannot be used for fill")
        value = np.asarray(value).astype(self.dtype)
        while value.ndim and value.shape[0] == 1:
            value = value[0]
        self._a[where] = value
        if fancy and not _same(self._a[where], value):
            raise AssertionError("undefined on a device: one position was assigned two values")

    def fill(self, value: Any) -> None:
        value = value._a if isinstance(value, DeviceArray) else np.asarray(value)
        if value.shape != ():
            raise ValueError("non-scalar array cannot be used for fill")
        self._a.fill(value)

    def take(self, indices: Any, axis: int | None = None, out: Any = None) -> DeviceArray:
        if isinstance(indices, SCALARS):
            where = np.asarray(indices)
        else:
            where = array(indices)._a if not isinstance(indices, DeviceArray) else indices._a
        taken = np.take(self._a, where, axis, mode="wrap")
        if out is None:
            return _wrap(taken)
        if out.dtype != self.dtype:
            raise TypeError("Output dtype mismatch")
        if out.shape != taken.shape:
            raise ValueError("Output shape mismatch")
        out._a[...] = taken
        return out

    def nonzero(self) -> tuple[DeviceArray, ...]:
        if self.ndim == 0:
            raise ValueError("Calling nonzero on 0d arrays is not allowed.")
        if self.size:
            _note_to_host(4)  # how many there are
        return tuple(map(_wrap, self._a.nonzero()))

    # --- shapes and types ---

    def astype(
        self, dtype: Any, order: str = "K", casting: None = None, subok: None = None, copy: Any = 1
    ) -> DeviceArray:
        if casting is not None or subok is not None:
            raise TypeError("casting and subok are not supported yet")
        if not copy and np.dtype(dtype) == self.dtype:
            return self
        with np.errstate(all="ignore"):  # a device neither warns nor raises
            return _wrap(self._a.astype(dtype, order=order))

    def view(self, dtype: Any = None, type: Any = None) -> DeviceArray:
        return _wrap(self._a.view() if dtype is None else self._a.view(dtype))

    def copy(self, order: str = "C") -> DeviceArray:
        return _wrap(self._a.copy(order))

    def reshape(self, *shape: Any, order: str = "C", copy: bool | None = None) -> DeviceArray:
        return _wrap(self._a.reshape(*shape, order=order, copy=copy))

    def ravel(self, order: str = "C") -> DeviceArray:
        return _wrap(self._a.ravel(order))

    def transpose(self, *axes: Any) -> DeviceArray:
        return _wrap(self._a.transpose(*axes))

    def squeeze(self, axis: Any = None) -> DeviceArray:
        return _wrap(self._a.squeeze(axis))

    # --- reductions, and what goes along an axis ---

    def sum(self, axis=None, dtype=None, out=None, keepdims=False):
        return _into(out, np.sum(self._a, axis=axis, dtype=dtype, keepdims=keepdims))

    def mean(self, axis=None, dtype=None, out=None, keepdims=False):
        return _into(out, np.mean(self._a, axis=axis, dtype=dtype, keepdims=keepdims))

    def any(self, axis=None, out=None, keepdims=False):
        return _into(out, np.any(self._a, axis=axis, keepdims=keepdims))

    def all(self, axis=None, out=None, keepdims=False):
        return _into(out, np.all(self._a, axis=axis, keepdims=keepdims))

    def min(self, axis=None, out=None, keepdims=False):
        return _into(out, np.min(self._a, axis=axis, keepdims=keepdims))

    def max(self, axis=None, out=None, keepdims=False):
        return _into(out, np.max(self._a, axis=axis, keepdims=keepdims))

    def argmax(self, axis=None, out=None, dtype=None, keepdims=False):
        return _into(out, np.argmax(self._a, axis=axis, keepdims=keepdims))

    def cumsum(self, axis=None, dtype=None, out=None):
        return _into(out, np.cumsum(self._a, axis=axis, dtype=dtype))

    def clip(self, min=None, max=None, out=None):
        return clip(self, min, max, out)

    def argsort(self, axis=-1, kind=None):
        return argsort(self, axis, kind)

    def partition(self, kth, axis=-1):
        if not self.flags.c_contiguous:
            raise NotImplementedError("Sorting non-contiguous array is not supported.")
        self._a.partition(kth, axis)

    def searchsorted(self, v, side="left", sorter=None):
        return searchsorted(self, v, side, sorter)

    def repeat(self, repeats, axis=None):
        return repeat(self, repeats, axis)

    def dot(self, b, out=None):
        return dot(self, b, out)


def _wrap(a: Any) -> DeviceArray:
    wrapped = DeviceArray.__new__(DeviceArray)
    wrapped._a = np.asarray(a)
    if wrapped._a.base is None:
        _pool.take(wrapped._a)
    return wrapped


def _unwrap(x: Any) -> Any:
    if isinstance(x, DeviceArray):
        return x._a
    if isinstance(x, SCALARS):
        return x
    raise TypeError(f"Unsupported type {type(x)}")


def _into(out: DeviceArray | None, result: Any) -> DeviceArray:
    if out is None:
        return _wrap(result)
    out._a[...] = result
    return out


def _garbage(shape: Any, dtype: Any, order: str = "C") -> np.ndarray:
    """Uninitialised memory that is found out when it is used."""
    a = np.empty(shape, dtype, order)
    _pool.take(a)
    a.view(np.uint8 if a.itemsize == 1 else f"u{a.itemsize}").fill(2 ** (8 * a.itemsize) - 1)
    return a  # floats are NaN, integers -1 or their largest


def _same(read: np.ndarray, written: np.ndarray) -> bool:
    """Whether two arrays hold the same bits."""
    read, written = np.ascontiguousarray(read), np.broadcast_to(written, read.shape)
    return read.tobytes() == np.ascontiguousarray(written).tobytes()


def _index(a: np.ndarray, key: Any) -> tuple[Any, ...]:
    """The index for NumPy; counts what comes from the host, and masks, which are counted there."""
    parts, axis = [], 0
    for part in key if isinstance(key, tuple) else (key,):
        if isinstance(part, (list, np.ndarray)):
            part = array(part if np.size(part) else np.asarray(part, np.int32))
        if isinstance(part, DeviceArray):
            part = part._a
            if part.dtype.kind == "b":
                if part.size:
                    _note_to_host(4)  # how many there are: CuPy makes their positions
                axis += part.ndim - 1
            elif part.dtype.kind in "iu":
                if Ellipsis not in map(_kind, parts) and a.shape[axis]:
                    part = part.astype(np.int64) % a.shape[axis]  # beyond the end it wraps around
            else:
                raise IndexError("arrays used as indices must be of integer or boolean type")
        elif isinstance(part, (tuple, float)):
            raise IndexError("only integers, slices, ellipsis, None and arrays are valid indices")
        axis += part is not None and part is not Ellipsis
        parts.append(part)
    if not any(part is Ellipsis for part in parts):
        parts.append(Ellipsis)  # so that a single element is a view as well
    return tuple(parts)


def _kind(part: Any) -> Any:
    return part if part is Ellipsis else None


# --- elementwise functions -----------------------------------------------------------------------


class Ufunc:
    """A function of CuPy's that works on each element."""

    def __init__(self, ufunc: np.ufunc):
        self._ufunc, self.__name__ = ufunc, ufunc.__name__

    def __call__(
        self, *args: Any, out: Any = None, dtype: Any = None, casting: str = "same_kind"
    ) -> DeviceArray:
        if len(args) > self._ufunc.nin:
            *args, out = args
        if isinstance(out, tuple):
            (out,) = out
        if out is not None and not isinstance(out, DeviceArray):
            raise TypeError("Output arguments type must be cupy.ndarray")
        into = None if out is None else out._a
        with np.errstate(all="ignore"):  # a device neither warns nor raises
            result = self._ufunc(*map(_unwrap, args), out=into, dtype=dtype, casting=casting)
        return _wrap(result) if out is None else out

    def at(self, a: DeviceArray, indices: DeviceArray, b: Any = None) -> None:
        if self.__name__ not in ("add", "maximum", "minimum"):
            raise NotImplementedError(f"`{self.__name__}.at` is not supported yet")
        # Threads add when they come: in any order.
        order = np.random.default_rng().permutation(len(indices))
        values = np.broadcast_to(_unwrap(b), (len(indices), *a.shape[1:]))
        self._ufunc.at(a._a, indices._a[order], values[order])

    def reduce(
        self,
        array: DeviceArray,
        axis: Any = 0,
        dtype: Any = None,
        out: Any = None,
        keepdims: bool = False,
    ) -> DeviceArray:
        if self.__name__ != "add":
            raise NotImplementedError(f"`{self.__name__}.reduce` is not supported yet")
        return array.sum(axis, dtype, out, keepdims)


_ELEMENTWISE = """
    abs absolute add bitwise_and bitwise_or bitwise_xor divide equal exp floor_divide greater
    greater_equal invert isfinite isinf isnan left_shift less less_equal log logaddexp logical_and
    logical_not logical_or maximum minimum multiply negative not_equal power reciprocal remainder
    right_shift sqrt subtract tanh true_divide
"""
_UFUNCS = {name: Ufunc(getattr(np, name)) for name in _ELEMENTWISE.split()}

_SPECIAL = {"erfc": Ufunc(scipy.special.erfc)}
"""Functions of cupyx.scipy.special, to which a ufunc of SciPy's is handed as well."""


def _operator(name: str, *, swapped: bool = False) -> Any:
    def operate(self: DeviceArray, other: Any) -> Any:
        if isinstance(other, DeviceArray):
            return getattr(namespace, name)(self, other)
        if hasattr(other, "__array_ufunc__") and other.__array_ufunc__ is None:
            return NotImplemented
        ufunc = getattr(np, name)
        return ufunc(other, self) if swapped else ufunc(self, other)

    return operate


def _in_place(name: str) -> Any:
    return lambda self, other: getattr(namespace, name)(self, other, out=self)


for _dunder, _name in {
    "add": "add", "sub": "subtract", "mul": "multiply", "truediv": "true_divide",
    "floordiv": "floor_divide", "mod": "remainder", "pow": "power", "lshift": "left_shift",
    "rshift": "right_shift", "and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor",
}.items():  # fmt: skip
    setattr(DeviceArray, f"__{_dunder}__", _operator(_name))
    setattr(DeviceArray, f"__r{_dunder}__", _operator(_name, swapped=True))
    setattr(DeviceArray, f"__i{_dunder}__", _in_place(_name))
for _dunder, _name in {
    "lt": "less", "le": "less_equal", "eq": "equal", "ne": "not_equal", "gt": "greater",
    "ge": "greater_equal", "matmul": "matmul",
}.items():  # fmt: skip
    setattr(DeviceArray, f"__{_dunder}__", _operator(_name))
DeviceArray.__rmatmul__ = _operator("matmul", swapped=True)
DeviceArray.__neg__ = lambda self: _UFUNCS["negative"](self)
DeviceArray.__invert__ = lambda self: _UFUNCS["invert"](self)
DeviceArray.__abs__ = lambda self: _UFUNCS["absolute"](self)


# --- functions, each with CuPy's signature -----------------------------------------------------


def _offer(function):
    """Put a function into the namespace; a trailing underscore keeps Python's own names here."""
    setattr(namespace, function.__name__.rstrip("_"), function)
    return function


@_offer
def array(obj, dtype=None, copy=True, order="K", subok=False, ndmin=0, *, blocking=False):
    if isinstance(obj, DeviceArray):
        return obj.astype(obj.dtype if dtype is None else dtype, copy=copy)
    if isinstance(obj, (list, tuple)) and any(isinstance(part, DeviceArray) for part in obj):
        return stack([array(part, dtype) for part in obj])
    host = np.array(obj, dtype)
    if host.dtype.kind not in "biufc" and "float" not in host.dtype.name:
        raise ValueError(f"Unsupported dtype {host.dtype}")
    if host.ndim:  # a single number is an argument of a kernel
        _note_to_device(host.nbytes)
    return _wrap(host)


@_offer
def asarray(a, dtype=None, order=None, *, copy=None, blocking=False):
    return array(a, dtype, copy)


@_offer
def asnumpy(a, stream=None, order="C", out=None, *, blocking=True):
    return a.get(order=order) if isinstance(a, DeviceArray) else np.asarray(a)


@_offer
def ascontiguousarray(a, dtype=None):
    return _wrap(np.ascontiguousarray(asarray(a, dtype)._a))


@_offer
def empty(shape, dtype=float, order="C"):
    return _wrap(_garbage(shape, dtype, order))


@_offer
def zeros(shape, dtype=float, order="C"):
    return _wrap(np.zeros(shape, dtype, order))


@_offer
def ones(shape, dtype=float, order="C"):
    return _wrap(np.ones(shape, dtype, order))


@_offer
def full(shape, fill_value, dtype=None, order="C"):
    return _wrap(np.full(shape, _unwrap(fill_value), dtype, order))


@_offer
def empty_like(prototype, dtype=None, order="K", subok=None, shape=None):
    return empty(shape or prototype.shape, dtype or prototype.dtype)


@_offer
def zeros_like(a, dtype=None, order="K", subok=None, shape=None):
    return zeros(shape or a.shape, dtype or a.dtype)


@_offer
def ones_like(a, dtype=None, order="K", subok=None, shape=None):
    return ones(shape or a.shape, dtype or a.dtype)


@_offer
def arange(start, stop=None, step=1, dtype=None):
    start, stop = (0, start) if stop is None else (start, stop)
    return _wrap(np.arange(start, stop, step, dtype))


@_offer
def concatenate(tup, axis=0, out=None, *, dtype=None, casting="same_kind"):
    parts = [_only_device(part) for part in tup]
    return _into(out, np.concatenate(parts, axis, dtype=dtype, casting=casting))


@_offer
def stack(tup, axis=0, out=None, *, dtype=None, casting="same_kind"):
    parts = [_only_device(part) for part in tup]
    return _into(out, np.stack(parts, axis, dtype=dtype, casting=casting))


def _only_device(part):
    if not isinstance(part, DeviceArray):
        raise TypeError(f"Only cupy arrays can be concatenated, not {type(part)}")
    return part._a


@_offer
def broadcast_to(array, shape):
    return _wrap(np.broadcast_to(_only_device(array), shape))


@_offer
def where(condition, x=None, y=None):
    if x is None and y is None:
        return condition.nonzero()
    if x is None or y is None:
        raise ValueError("Must provide both 'x' and 'y' or neither.")
    return _wrap(np.where(_only_device(condition.astype("?", copy=False)), _unwrap(x), _unwrap(y)))


@_offer
def take(a, indices, axis=None, out=None):
    return a.take(indices, axis, out)


@_offer
def take_along_axis(a, indices, axis):
    return _wrap(np.take_along_axis(a._a, indices._a % a.shape[axis], axis))


@_offer
def argsort(a, axis=-1, kind=None):
    if kind not in (None, "stable"):
        raise ValueError("kind can only be None or 'stable'")
    return _wrap(np.argsort(a._a, axis, kind="stable"))


@_offer
def sort(a, axis=-1, kind=None):
    return _wrap(np.sort(a._a, axis, kind="stable"))


@_offer
def partition(a, kth, axis=-1):
    copied = a.copy("K")
    copied.partition(kth, axis)
    return copied


@_offer
def searchsorted(a, v, side="left", sorter=None):
    if not isinstance(a, DeviceArray) or not isinstance(v, (DeviceArray, int, float, complex)):
        raise NotImplementedError("Only python scalars or ndarrays are supported")
    if (a._a[1:] < a._a[:-1]).any():
        raise AssertionError("undefined on a device: the array is not sorted")
    return _wrap(np.searchsorted(a._a, _unwrap(v), side).astype(np.int64))


@_offer
def bincount(x, weights=None, minlength=None):
    if bool((x < 0).any()):
        raise ValueError("The first argument of bincount must be non-negative")
    if x.size:
        int(x.max())
    return _wrap(np.bincount(x._a, minlength=minlength or 0))


@_offer
def nonzero(a):
    return a.nonzero()


@_offer
def flatnonzero(a):
    return a.ravel().nonzero()[0]


@_offer
def copyto(dst, src, casting="same_kind", where=None):
    mask = True if where is None else _only_device(where)
    np.copyto(dst._a, _unwrap(src), casting=casting, where=mask)


@_offer
def clip(a, a_min, a_max, out=None):
    bounds = [None if bound is None else _unwrap(bound) for bound in (a_min, a_max)]
    return _into(out, np.clip(a._a, *bounds))


@_offer
def repeat(a, repeats, axis=None):
    if isinstance(repeats, (DeviceArray, np.ndarray)):
        raise ValueError("repeats must be int or sequence")
    return _wrap(np.repeat(a._a, repeats, axis))


@_offer
def tile(A, reps):
    return _wrap(np.tile(A._a, reps))


@_offer
def matmul(
    *args,
    axes=None,
    axis=None,
    keepdims=False,
    casting="same_kind",
    dtype=None,
    signature=None,
    order="K",
    out=None,
):
    a, b = map(_only_device, args[:2])
    dtype = np.result_type(a, b)
    if dtype.itemsize == 2:  # cuBLAS adds up in float32, and rounds what it writes
        a, b = a.astype(np.float32), b.astype(np.float32)
    with np.errstate(all="ignore"):
        product = np.matmul(a, b).astype(dtype)
    if out is not None and out.dtype != dtype:
        raise TypeError(f"{dtype} cannot be written to {out.dtype}")
    return _into(out, product)


@_offer
def dot(a, b, out=None):
    return _into(out, np.dot(_only_device(a), _only_device(b)))


@_offer
def tensordot(a, b, axes=2):
    return _wrap(np.tensordot(_only_device(a), _only_device(b), axes))


@_offer
def expand_dims(a, axis):
    return _wrap(np.expand_dims(_only_device(a), axis))


@_offer
def transpose(a, axes=None):
    return a.transpose(axes) if axes is not None else a.transpose()


@_offer
def squeeze(a, axis=None):
    return a.squeeze(axis)


@_offer
def reshape(a, newshape, order="C", *, copy=None):
    return a.reshape(newshape, order=order, copy=copy)


@_offer
def ravel(a, order="C"):
    return a.ravel(order)


@_offer
def sum_(a, axis=None, dtype=None, out=None, keepdims=False):
    return a.sum(axis, dtype, out, keepdims)


@_offer
def mean_(a, axis=None, dtype=None, out=None, keepdims=False):
    return a.mean(axis, dtype, out, keepdims)


@_offer
def any_(a, axis=None, out=None, keepdims=False):
    return a.any(axis, out, keepdims)


@_offer
def all_(a, axis=None, out=None, keepdims=False):
    return a.all(axis, out, keepdims)


@_offer
def min_(a, axis=None, out=None, keepdims=False):
    return a.min(axis, out, keepdims)


@_offer
def max_(a, axis=None, out=None, keepdims=False):
    return a.max(axis, out, keepdims)


@_offer
def argmax(a, axis=None, dtype=None, out=None, keepdims=False):
    return a.argmax(axis, out, dtype, keepdims)


@_offer
def cumsum(a, axis=None, dtype=None, out=None):
    return a.cumsum(axis, dtype, out)


# --- streams and memory ------------------------------------------------------------------------


class Stream:
    """What is started on it runs as late as it may: when somebody waits for it.

    The null stream runs everything at once, so that what it reads must have arrived.
    """

    null: Stream
    ptds: Stream

    def __init__(self, null=False, non_blocking=False, ptds=False, priority=None):
        self._waiting = [] if non_blocking else None
        self._before = []

    def _start(self, work):
        if self._waiting is None:
            work()
        else:
            self._waiting.append(work)

    def record(self, event=None):
        event = Event() if event is None else event
        event.record(self)
        return event

    def wait_event(self, event):
        self._start(event.synchronize)

    def synchronize(self):
        while self._waiting:
            self._waiting.pop(0)()

    def __enter__(self):
        self._before.append(_current.stream)
        _current.stream = self
        return self

    def __exit__(self, *args):
        _current.stream = self._before.pop()


class Event:
    """A place on a stream, reached when all that was started before it has run."""

    def __init__(self, block=False, disable_timing=False, interprocess=False):
        self.done = True
        self._stream = None

    def record(self, stream=None):
        self._stream = get_current_stream() if stream is None else stream
        self.done = False
        self._stream._start(self._reach)

    def _reach(self):
        self.done = True

    def synchronize(self):
        while not self.done:
            self._stream._waiting.pop(0)()


class _Current(threading.local):
    @property
    def stream(self):
        return self.__dict__.get("chosen", Stream.null)

    @stream.setter
    def stream(self, chosen):
        self.__dict__["chosen"] = chosen


_current = _Current()
Stream.null = Stream(null=True)
Stream.ptds = Stream(ptds=True)


def get_current_stream(device_id=-1):
    return _current.stream


class Memory:
    """The memory of an array."""

    def __init__(self, array):
        self.ptr, self.size, self._array = array.ctypes.data, array.nbytes, array


class UnownedMemory:
    """Memory at an address, which lives as long as its owner."""

    def __init__(self, ptr, size, owner, device_id=-1):
        self.ptr, self.size, self._owner = ptr, size, owner


class MemoryPointer:
    """A place in memory."""

    def __init__(self, mem, offset):
        self.mem, self.ptr = mem, mem.ptr + offset


class _Bytes:
    """The bytes at a pointer as NumPy sees them."""

    def __init__(self, pointer):
        self._pointer = pointer
        self.__array_interface__ = {
            "version": 3,
            "typestr": "|u1",
            "shape": (pointer.mem.size,),
            "data": (pointer.ptr, False),
        }


def _without_owner(a):
    """The same memory, whose owner may die, as on a device, before what was started has run."""
    owned = a
    while isinstance(owned.base, np.ndarray):
        owned = owned.base
    if not isinstance(owned.base, _Bytes):
        return a
    pointer = MemoryPointer(UnownedMemory(a.ctypes.data, a.nbytes, None), 0)
    return np.asarray(_Bytes(pointer)).view(a.dtype).reshape(a.shape)


def alloc_pinned_memory(size):
    memory = np.full(size, 0xFF, np.uint8)
    return memory.data


class OutOfMemoryError(MemoryError):
    """CuPy's, whose message has the numbers."""

    def __init__(self, size, total, limit=0):
        self._size, self._total, self._limit = size, total, limit
        super().__init__(f"Out of memory allocating {size:,} bytes")


class MemoryPool:
    """Counts the memory of all arrays, while there is a limit; `peak` is the most at a time."""

    def __init__(self):
        self._lock = threading.RLock()  # an array may die while another is counted
        self.set_limit(0)

    def take(self, a):
        if not self._limit or id(a) in self._known:
            return
        with self._lock:
            if self._used + a.nbytes > self._limit:
                raise OutOfMemoryError(a.nbytes, self._used, self._limit)
            self._used += a.nbytes
            self.peak = max(self.peak, self._used)
        self._known.add(id(a))
        weakref.finalize(a, self._give_back, id(a), a.nbytes, self._since)

    def _give_back(self, name, nbytes, since):
        if since is self._since:
            self._known.discard(name)
            with self._lock:
                self._used -= nbytes

    def set_limit(self, size=None, fraction=None):
        self._limit, self._used, self.peak, self._since = size, 0, 0, object()
        self._known = set()

    def get_limit(self):
        return self._limit

    def free_bytes(self):
        return 0

    def free_all_blocks(self, stream=None):
        pass

    def used_bytes(self):
        return self._used

    def total_bytes(self):
        return self._used


class CUDARuntimeError(RuntimeError):
    """CuPy's, of what CUDA itself refuses."""


class Device:
    """The card, as far as it is looked at."""

    compute_capability = "90"

    def __init__(self, device=None):
        pass


DEVICE_BYTES = 8 << 30
_pool = MemoryPool()

namespace.get_default_memory_pool = lambda: _pool
namespace.cuda = SimpleNamespace(
    Stream=Stream,
    Event=Event,
    get_current_stream=get_current_stream,
    get_device_id=lambda: 0,
    Device=Device,
    alloc_pinned_memory=alloc_pinned_memory,
    UnownedMemory=UnownedMemory,
    MemoryPointer=MemoryPointer,
    memory=SimpleNamespace(OutOfMemoryError=OutOfMemoryError),
    runtime=SimpleNamespace(
        memGetInfo=lambda: (DEVICE_BYTES, DEVICE_BYTES), CUDARuntimeError=CUDARuntimeError
    ),
)

namespace.ndarray = DeviceArray
namespace.DeviceArray = DeviceArray  # where pickle looks for it
vars(namespace).update(_UFUNCS)
for _name in [
    *("bool_", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "intp"),
    *("float16", "float32", "float64", "inf", "nan", "newaxis", "dtype", "iinfo", "finfo"),
]:
    setattr(namespace, _name, getattr(np, _name))


def on_device(host):
    """Put test data on the device, uncounted."""
    return None if host is None else _wrap(np.array(host))


def register_with_dask():
    """Tell Dask of the double what it knows of CuPy (``dask.array.backends.register_cupy``)."""
    for lookup, function in (
        (concatenate_lookup, namespace.concatenate),
        (take_lookup, namespace.take),
        (tensordot_lookup, namespace.tensordot),
        (empty_lookup, namespace.empty),
        (numel_lookup, _numel_arraylike),
        (nannumel_lookup, _nannumel),
        (to_numpy_dispatch, namespace.asnumpy),
        (sizeof, lambda x: x.nbytes),
    ):
        lookup.register(DeviceArray, function)
