"""Where did an error happen, and how much memory was missing?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np

from dask_ep.arrays.checks import BadRow, computing_dtype, place_of_row
from dask_ep.arrays.device import explain_chunk_memory
from dask_ep.arrays.namespaces import Array, namespace
from dask_ep.errors import DeviceMemoryError
from dask_ep.kernel.device_kernel import row_bytes
from dask_ep.kernel.operands import Factors


@contextmanager
def error_context(place: str, first_row: int | None = None) -> Iterator[None]:
    """Add the step, chunk and rank to an error, and the row if it is about one.

    `first_row` is the chunk's first row in the whole array, if known.
    """
    try:
        yield
    except BadRow as error:
        raise ValueError(f"{place_of_row(place, error, first_row)}: {error}") from error
    except Exception as error:
        if type(error) in (ValueError, TypeError, DeviceMemoryError):  # or take more arguments
            raise type(error)(f"{place}: {error}") from error
        error.add_note(f"dask_ep: {place}")
        raise


def explain_kernel_memory(
    tokens: Array, k: int, experts: Sequence[Any], d_out: int, extra_row_bytes: int = 0
) -> AbstractContextManager[None]:
    """If the device runs out of memory, report what the chunk needs.

    `extra_row_bytes` are the bytes that a row takes in addition to the kernel's.
    """
    if namespace(tokens) is np:
        return nullcontext()
    known = [expert for expert in experts if hasattr(expert, "widest")]
    widest = max((expert.widest for expert in known), default=d_out if len(experts) else 0)
    takes = (expert.factors(tokens.dtype) for expert in known)
    taken = max(takes, key=lambda one: one.nbytes, default=Factors(computing_dtype(tokens.dtype)))
    one = row_bytes(tokens.shape[1], d_out, widest, k, tokens.dtype, taken)
    return explain_chunk_memory(tokens, one + extra_row_bytes)


def slots_of(routing: Array) -> int:
    """k of a routing (n,) or (n, k)."""
    return 1 if routing.ndim == 1 else routing.shape[1]
