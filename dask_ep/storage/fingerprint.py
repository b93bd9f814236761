"""What decides the values of an output, as data that can be stored and compared?

    MoELayer, Experts, Router, Source, ... ── describe ──> mappings, lists, numbers and strings

An object is described by all of its attributes, so that an option that is added to it later is
compared too. What cannot be described is an error.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any

import dask.array as da
import numpy as np

from dask_ep.storage.source import Source


def describe(obj: Any) -> Any:
    """Describe what decides the values of an output, as data that can be written as JSON.

    Parameters
    ----------
    obj : numbers, strings and dtypes; mappings and sequences; anything with a ``fingerprint()``,
        such as a `Source`; dataclasses and named tuples, by their fields; Dask arrays, by name

    Returns
    -------
    The same description for the same values, wherever the files are; a sequence of sources has one
    description, see `merge`

    Raises
    ------
    TypeError
        If it is or holds anything else, as a change of that could not be detected.

    Examples
    --------
    >>> from dask_ep import Router
    >>> describe({"router": Router(8, k=2)})["router"]["k"]
    2
    """
    if obj is None or isinstance(obj, (bool, int, float, str)):
        return obj
    if isinstance(obj, np.generic):
        return obj.item()
    if isinstance(obj, (np.dtype, range)):
        return str(obj)
    if hasattr(obj, "fingerprint"):
        return obj.fingerprint()
    if isinstance(obj, da.Array):
        return {"array": obj.name, "shape": list(obj.shape), "dtype": obj.dtype.name}
    if isinstance(obj, Mapping):
        return {str(key): describe(value) for key, value in obj.items()}
    if hasattr(obj, "_asdict"):
        return describe(obj._asdict())
    if isinstance(obj, (list, tuple)):
        described = [describe(value) for value in obj]
        return merge(described) if any(isinstance(value, Source) for value in obj) else described
    if is_dataclass(obj):
        return {"kind": type(obj).__name__} | describe(vars(obj))
    raise TypeError(
        f"cannot tell whether a {type(obj).__name__} has changed since a run was stopped: pass a "
        "version number or name in settings instead"
    )


def fingerprint_of(given: Any) -> Any:
    """Describe an input, unless it is a fingerprint itself."""
    return given if isinstance(given, Mapping) else describe(given)


def merge(values: Sequence[Any]) -> Any:
    """Join the descriptions of many objects of one kind, such as the weights of each expert.

    Returns
    -------
    What all of them share, unchanged, and a hash of what differs

    Examples
    --------
    >>> merge([{"dtype": "float32", "offset": 0}, {"dtype": "float32", "offset": 64}])
    {'dtype': 'float32', 'offset': '2 values, ed654f8f'}
    """
    first = values[0]
    if all(value == first for value in values):
        return first
    if all(isinstance(value, dict) and value.keys() == first.keys() for value in values):
        return {key: merge([value[key] for value in values]) for key in first}
    digest = hashlib.sha256(json.dumps(list(values), sort_keys=True).encode()).hexdigest()
    return f"{len(values)} values, {digest[:8]}"


def find_sources(obj: Any) -> Iterator[Source]:
    """Return all sources that an object is made of, including those that sources are made of."""
    if isinstance(obj, Source):
        yield obj
    if isinstance(obj, Mapping):
        parts = list(obj.values())
    elif isinstance(obj, (list, tuple)):
        parts = list(obj)
    else:
        parts = list(vars(obj).values()) if hasattr(obj, "fingerprint") else []
    for part in parts:
        yield from find_sources(part)
