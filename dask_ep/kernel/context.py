"""Where did an error happen, and what memory was missing?"""

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
from dask_ep.kernel.factors import Factors


@contextmanager
def error_context(place: str, first_row: int | None = None) -> Iterator[None]:
    """Say in an error which step, chunk and rank it comes from, and which row if it is of one.

    `first_row` is that of the chunk in the whole array, as far as it is known.
    """
    try:
        yield
    except BadRow as error:
        raise ValueError(f"{place_of_row(place, error, first_row)}: {error}") from error
    except Exception as error:
        if type(error) in (ValueError, TypeError, DeviceMemoryError):  # others may need more words
            raise type(error)(f"{place}: {error}") from error
        error.add_note(f"dask_ep: {place}")
        raise


def explain_kernel_memory(
    tokens: Array, k: int, experts: Sequence[Any], d_out: int, extra_row_bytes: int = 0
) -> AbstractContextManager[None]:
    """Say what a chunk needs, if the device that computes it has not enough memory.

    `extra_row_bytes` are those that a row takes besides the kernel.
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
