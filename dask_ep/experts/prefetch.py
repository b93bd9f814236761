"""How are the weights of the next experts read while the present ones compute?

    ep_experts task ──> ExpertsAhead ──> the readers' queue: one thread per process, or a few where
                             │           there are many cores; bytes in memory, as they are stored
                             v
    ep_dispatch tasks: the first that needs an expert decodes them, matrix by matrix, and others
                       that need them meanwhile take part

A task that reads would occupy a thread that could compute; and bfloat16, FP8 and MXFP4 wait in
memory as they are stored. The graph bounds memory: it begins to read a block, and to compute one,
when an earlier one is finished.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

import numpy as np

from dask_ep.experts import together
from dask_ep.experts.experts import Experts
from dask_ep.experts.local_experts import load_experts
from dask_ep.experts.stored_experts import held_in_memory
from dask_ep.experts.together import Together
from dask_ep.experts.weights import Weight
from dask_ep.kernel.expert import Expert


class ExpertsAhead(Sequence[Expert]):
    """Experts that are being read, or are queued to be.

    Parameters
    ----------
    experts : Experts
        All of them are read, for NumPy.
    dtype : the computing dtype
    tell : called when they have been read, optional

    Notes
    -----
    They are in memory as stored until one of them is used, and in the computing dtype from then
    on. A copy in another process reads the files again. Dask is not told their size: the graph
    bounds how many there are, and a worker that spilled them to make room would read them again
    and again. Experts that are dropped before their turn are not read.
    """

    def __init__(self, experts: Experts, dtype: np.dtype, tell: Callable[[], Any] | None = None):
        self._origin = (experts, dtype, tell)
        self._coming: Future[_Compressed] = together.readers.submit(_read, *self._origin)
        weakref.finalize(self, self._coming.cancel)

    def __len__(self) -> int:
        return self._origin[0].num_experts

    def __getitem__(self, e: Any) -> Any:
        return self._coming.result().experts()[e]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._origin


class _Compressed:
    """Experts in memory as they are stored, until the first is used."""

    def __init__(self, experts: Experts, dtype: np.dtype):
        self._origin, self._dtype = experts, dtype
        self._lock = threading.Lock()
        self._local: list[Expert] | None = None
        with experts.joined():
            held = [held_in_memory(experts, e).weights for e in range(experts.num_experts)]
        steps = [partial(_decode, weight, dtype) for each in held for weight in each.values()]
        self.decoding = Together[np.ndarray](steps)

    def experts(self) -> list[Expert]:
        """Return the decoded experts; the caller decodes those that no thread has started."""
        self.decoding.take_part()
        with self._lock:
            if self._local is None:
                given = self._by_name(self.decoding.results())
                self._local = load_experts(self._origin, np, self._dtype, given)
            return self._local

    def _by_name(self, decoded: list[np.ndarray]) -> dict[str, Sequence[np.ndarray]]:
        names = list(self._origin.weights)
        return {name: decoded[i :: len(names)] for i, name in enumerate(names)}


def _decode(weight: Weight, dtype: np.dtype) -> np.ndarray:
    (one,) = weight.read(dtype)
    assert one is not None  # `held_in_memory` takes experts that are there
    return one


def _read(experts: Experts, dtype: np.dtype, tell: Callable[[], Any] | None) -> _Compressed:
    read = _Compressed(experts, dtype)
    if tell is not None:
        tell()
    return read
