"""Which module's functions work on an array, and how do a few of its numbers come to the host?

NumPy's arrays name their functions themselves (`__array_namespace__`). CuPy's do not, up to 14.2:
theirs are in the package that defines their type. Nothing here imports CuPy.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

Array = Any
"""A NumPy or CuPy array, or any other with `__array_namespace__` and NumPy's functions."""

UNDERFLOW_IS_ZERO = np.errstate(under="ignore")
"""For functions in which underflow is harmless, whatever ``np.seterr`` is set to."""


def namespace(array: Array, name: str = "array") -> Any:
    """Return the module whose functions work on an array: ``numpy``, ``cupy``, ...

    Raises
    ------
    TypeError
        If it is not an array; the message contains `name`.

    Examples
    --------
    >>> import numpy as np
    >>> namespace(np.ones(3)).__name__
    'numpy'
    """
    xp = _find(array)
    if xp is None:
        raise TypeError(
            f"{name} must be a NumPy or CuPy array, but is a {type(array).__name__}"
            + (
                "; for Dask arrays use dask_ep.expert_parallel"
                if hasattr(array, "__dask_graph__")
                else ""
            )
        )
    return xp


def one_namespace(**arrays: Array | None) -> Any:
    """Return the namespace that all arrays share; their names are used in the error."""
    found = {name: namespace(array, name) for name, array in arrays.items() if array is not None}
    if len({id(xp) for xp in found.values()}) > 1:
        came = ", ".join(f"{name} from {xp.__name__}" for name, xp in found.items())
        raise TypeError(f"all arrays must come from one library, but are {came}; convert them")
    return next(iter(found.values()))


def is_array(obj: Any) -> bool:
    """Whether an object is an array that has a namespace."""
    return _find(obj) is not None


def to_host(*numbers: Array) -> list[int]:
    """Bring a few integers and booleans, arrays of any small shape, to the host in one copy.

    Integers beyond int64 are clipped to its largest value.

    Examples
    --------
    >>> import numpy as np
    >>> to_host(np.array([3, 4]), np.array(True))
    [3, 4, 1]
    """
    xp = namespace(numbers[0])
    return xp.concatenate([_int64(xp, n).reshape(-1) for n in numbers]).tolist()


def _int64(xp: Any, n: Array) -> Array:
    if n.dtype == np.uint64:
        n = xp.minimum(n, np.uint64(2**63 - 1))
    return n.astype(np.int64)


def _find(array: Any) -> Any | None:
    if isinstance(array, np.ndarray):
        return np
    if hasattr(array, "__array_namespace__"):
        return array.__array_namespace__()
    for cls in type(array).__mro__:
        package = sys.modules.get(cls.__module__.partition(".")[0])
        if getattr(package, "ndarray", None) is cls:
            return package
    return None
