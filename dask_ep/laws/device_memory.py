"""How much memory does a run need on a GPU, and on its host?

    GPU     CUDA ─ experts ─ intermediate results of a chunk in each thread ─ chunks between tasks
    host    Python and CUDA ─ pinned: chunks being uploaded or downloaded, matrices of experts

One law for runs and plans, like that of `costs` for hosts without GPUs: an upper bound, from what
the code allocates. It has not been checked on a GPU yet.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from math import prod
from typing import Any, NamedTuple

import numpy as np

from dask_ep.arrays.checks import computing_dtype
from dask_ep.kernel.device_kernel import PADDED_PART, PADDED_ROWS, slot_bytes
from dask_ep.kernel.operands import Factors, factors
from dask_ep.laws.costs import Need, Spread, chunks_held, exchanged_held

THREADS_PER_GPU = 3
"""Threads of a GPU's worker: one computes, one reads and uploads, one downloads and writes."""

DEVICE_CHUNK_BYTES = 128 << 20
"""Bytes of a token chunk on a GPU, which needs more rows at a time than a core to be busy."""

DEVICE_PROCESS_BYTES = 300_000_000
"""GPU memory of a process without experts and chunks: CUDA, its libraries and their workspaces."""

HOST_PROCESS_BYTES = 1_000_000_000
"""Host memory of a process with a GPU, without buffers: Python, Dask, CuPy and CUDA."""

ROUNDED_UP = 2
"""Upper bound on the rounding of pinned memory, which comes in powers of two and is kept for reuse
in the same size."""

DECODING_BYTES = 12
"""Bytes per number while FP8 and MXFP4 are decoded: codes, scales, values."""


class OnDevice(NamedTuple):
    """What a layer takes on a device, in plain numbers."""

    row_bytes: int
    #: bytes of a token row or an output row, whichever is larger
    made_bytes: int
    #: bytes of all intermediate results of a token row in the experts
    few_bytes: int
    #: bytes of an expert's rows if experts with few rows are padded to those of the busiest
    experts: int
    #: E
    widening: int
    #: itemsize of sums over that of tokens
    matrix_bytes: int
    #: bytes of the largest matrix of an expert, as stored
    decoding_bytes: int
    #: bytes that this matrix takes while it is decoded
    factor: np.dtype
    #: dtype of the factors of products
    products: float
    #: products per number of the matrices; more than 1 if some rows are split into parts

    @classmethod
    def of(cls, experts: Any, shared: Any, k: int, dtype: np.dtype) -> OnDevice:
        """Describe experts, shared experts (or None), k and the tokens' dtype by numbers.

        Examples
        --------
        >>> import numpy as np
        >>> from dask_ep import Experts
        >>> experts = Experts.gated(*np.ones((2, 8, 64, 256), "f4"), np.ones((8, 256, 64), "f4"))
        >>> one = OnDevice.of(experts, None, k=2, dtype=np.dtype("f4"))
        >>> one.row_bytes, one.made_bytes, one.matrix_bytes, one.decoding_bytes
        (256, 6520, 65536, 131072)
        >>> one.factor, one.products
        (dtype('float32'), 1.0)
        """
        itemsize = dtype.itemsize
        d, d_out = experts.d or 0, experts.d_out or experts.d or 0
        slot = _slot_bytes(experts, dtype)
        made = math.ceil(PADDED_PART * k * slot)
        if shared is not None:
            made = max(made, shared.num_experts * _slot_bytes(shared, dtype))
        matrices = list(_matrices(experts, dtype))
        return cls(
            max(d, d_out) * itemsize,
            made,
            PADDED_ROWS[0] * slot,
            experts.num_experts,
            max(computing_dtype(dtype).itemsize // itemsize, 1),
            max(stored for stored, _ in matrices),
            max(decoding for _, decoding in matrices),
            *_multiplied(experts, dtype),
        )

    def need(self, expert_bytes: int, threads: int, ranks: int, spread: Spread) -> Need:
        """Return the memory that a GPU needs, as a function of the rows of a chunk.

        Parameters
        ----------
        expert_bytes : bytes of the experts that stay there
        threads : tasks of its worker at a time
        ranks : R
        spread : rows of packets and answers
        """
        at_a_rank = min(2 * -(-self.experts // ranks), self.experts)  # with replicas
        # Ranks here are also served from packets: one per thread, and in place with two answers.
        packets = 0 if ranks == 1 else 1 if spread.workers else 3
        return Need(
            expert_bytes,
            chunks_held(threads, ranks, spread, self.widening) + threads * packets,
            self.row_bytes,
            self.decoding_bytes + threads * at_a_rank * self.few_bytes,
            threads * self.made_bytes,
            DEVICE_PROCESS_BYTES,
        )

    def host_need(self, threads: int, spread: Spread, read_bytes: int) -> Need:
        """Return the host memory of its worker, as a function of a chunk's rows; packets use TCP.

        `read_bytes` is what a thread needs to read a chunk in addition to its rows.
        """
        between = exchanged_held(threads, spread, self.widening) if spread.workers > 1 else 0.0
        return Need(
            0,
            ROUNDED_UP * ((threads + 1) * 2 + between),
            self.row_bytes,
            # One matrix is read while the last one is uploaded.
            2 * ROUNDED_UP * self.matrix_bytes + threads * read_bytes,
            process_bytes=HOST_PROCESS_BYTES,
        )


def held_dtype(experts: Any, dtype: np.dtype) -> np.dtype:
    """Return the dtype in which a GPU loads experts for tokens of a dtype; `Weight.loaded_dtype`
    has that of each matrix."""
    return computing_dtype(dtype, is_rounded=experts.precision == "bfloat16")


def _slot_bytes(experts: Any, dtype: np.dtype) -> int:
    """Return the bytes of a slot in the kernel, at most."""
    d, d_out, hidden = experts.d or 0, experts.d_out or experts.d or 0, experts.hidden or 0
    sums, taken = computing_dtype(dtype).itemsize, _factors(experts, dtype)
    entering = [of.nbytes for name, (_, of) in taken.items() if name != "down"]
    # Gate and up lie side by side; the input of the last matrix lies there, or in separate parts.
    made = hidden * sums * (2 if experts.kind.startswith("gated") else 1)
    if "down" in taken and taken["down"][1] != Factors(computing_dtype(dtype)):
        made += hidden * taken["down"][1].nbytes
    return slot_bytes(d * max(entering, default=sums), made, d_out * sums)


def _factors(experts: Any, dtype: np.dtype) -> dict[str, tuple[int, Factors]]:
    """Return the size of each matrix, and the factors that rows become for its product."""
    held, sums, found = held_dtype(experts, dtype), computing_dtype(dtype), {}
    are_weighed = getattr(experts, "options", {}).get("apply_router_weight_on_input", False)
    for name, weight in getattr(experts, "weights", {}).items():
        if len(weight.shape) == 3:
            matrix = weight.loaded_dtype(held, on_device=True)
            rows = sums if name == "down" or are_weighed else dtype
            found[name] = prod(weight.shape[1:]), factors(rows, matrix, experts.precision)
    return found


def _multiplied(experts: Any, dtype: np.dtype) -> tuple[np.dtype, float]:
    """Return the dtype of most products, and the products per number of the matrices."""
    found = list(_factors(experts, dtype).values())
    numbers = sum(count for count, _ in found)
    if not numbers:
        return computing_dtype(dtype), 1.0
    _, most = max(found, key=lambda one: one[0])
    return most.dtype, sum(count * taken.parts for count, taken in found) / numbers


def _matrices(experts: Any, dtype: np.dtype) -> Iterator[tuple[int, int]]:
    """Yield, for each matrix of an expert, its bytes as stored, and those while it is decoded."""
    held = held_dtype(experts, dtype)
    yield 0, 0
    for weight in getattr(experts, "weights", {}).values():
        numbers, stored = prod(weight.shape[1:]), weight.nbytes // max(weight.shape[0], 1)
        quantized = stored < numbers * weight.dtype.itemsize
        loaded = weight.loaded_dtype(held, on_device=True).itemsize
        yield stored, stored + numbers * (DECODING_BYTES if quantized else loaded)
