"""How much memory does a run need on a GPU, and on its host?

    GPU     CUDA ─ experts ─ what is made of a chunk in each thread ─ chunks between tasks
    host    Python and CUDA ─ pinned: chunks on their way up and down, matrices of experts

One law for runs and plans, as `costs` has it for the host alone: an upper bound, by what the code
allocates. No card has confirmed it yet.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from math import prod
from typing import Any, NamedTuple

import numpy as np

from dask_ep.arrays.checks import computing_dtype
from dask_ep.kernel.device_kernel import PADDED_PART, PADDED_ROWS, slot_bytes
from dask_ep.laws.costs import Need, Spread, chunks_held, exchanged_held

THREADS_PER_GPU = 3
"""Of its worker: one that computes, one that reads and uploads, one that downloads and writes."""

DEVICE_CHUNK_BYTES = 128 << 20
"""Bytes of a token chunk on a GPU, which needs more rows at a time than a core to be busy."""

DEVICE_PROCESS_BYTES = 300_000_000
"""What a process takes of a GPU apart from experts and chunks: CUDA, its libraries and their
workspaces."""

HOST_PROCESS_BYTES = 1_000_000_000
"""What a process with a GPU takes of the host apart from buffers: Python, Dask, CuPy and CUDA."""

ROUNDED_UP = 2
"""Pinned memory comes in powers of two, and is kept for the next of its size."""

DECODING_BYTES = 12
"""Of a number while FP8 and MXFP4 are decoded: codes, scales, values."""


class OnDevice(NamedTuple):
    """What a layer takes on a device, in plain numbers."""

    row_bytes: int
    #: of a token row or an output row, whichever is more
    made_bytes: int
    #: of all that is made of a token row on its way through experts
    few_bytes: int
    #: that an expert's rows take where experts with few get as many as the busiest
    experts: int
    #: E
    widening: int
    #: bytes of a number in a sum over one of a token
    matrix_bytes: int
    #: of the largest matrix of an expert, as it is stored
    decoding_bytes: int
    #: that this matrix takes on its way to what is computed with

    @classmethod
    def of(cls, experts: Any, shared: Any, k: int, dtype: np.dtype) -> OnDevice:
        """Put experts, those that all rows share (or None), k and the tokens' dtype into numbers.

        Examples
        --------
        >>> import numpy as np
        >>> from dask_ep import Experts
        >>> experts = Experts.gated(*np.ones((2, 8, 64, 256), "f4"), np.ones((8, 256, 64), "f4"))
        >>> one = OnDevice.of(experts, None, k=2, dtype=np.dtype("f4"))
        >>> one.row_bytes, one.made_bytes, one.matrix_bytes, one.decoding_bytes
        (256, 6520, 65536, 131072)
        """
        itemsize = dtype.itemsize
        d, d_out = experts.d or 0, experts.d_out or experts.d or 0
        slot = slot_bytes(d, d_out, _made(experts), itemsize)
        made = math.ceil(PADDED_PART * k * slot)
        if shared is not None:
            of_shared = slot_bytes(d, d_out, _made(shared), itemsize)
            made = max(made, shared.num_experts * of_shared)
        matrices = list(_matrices(experts, dtype))
        return cls(
            max(d, d_out) * itemsize,
            made,
            PADDED_ROWS[0] * slot,
            experts.num_experts,
            max(computing_dtype(dtype).itemsize // itemsize, 1),
            *(max(sizes) for sizes in zip(*matrices, strict=True)),
        )

    def need(self, expert_bytes: int, threads: int, ranks: int, spread: Spread) -> Need:
        """What a GPU needs, by the rows of a chunk.

        Parameters
        ----------
        expert_bytes : of the experts that stay there
        threads : tasks of its worker at a time
        ranks : R
        spread : rows of packets and answers
        """
        at_a_rank = min(2 * -(-self.experts // ranks), self.experts)  # with replicas
        # Ranks here are served from packets as well: one a thread, in place with two answers.
        packets = 0 if ranks == 1 else 1 if spread.workers else 3
        return Need(
            expert_bytes,
            chunks_held(threads, ranks, spread, self.widening) + threads * packets,
            self.row_bytes,
            self.decoding_bytes + threads * at_a_rank * self.few_bytes,
            threads * self.made_bytes,
            DEVICE_PROCESS_BYTES,
        )

    def host_need(self, threads: int, ranks: int, spread: Spread, read_bytes: int = 0) -> Need:
        """What its worker needs of the host, by the rows of a chunk; packets as over TCP.

        `read_bytes` are those that a thread needs to read a chunk, besides its rows.
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


def _made(experts: Any) -> int:
    """Width of what an expert makes between its products; gate and up count together."""
    hidden = experts.hidden or 0
    return 2 * hidden if experts.kind.startswith("gated") else hidden


def _matrices(experts: Any, dtype: np.dtype) -> Iterator[tuple[int, int]]:
    """Of each matrix of an expert its bytes as stored, and those on the way to the device."""
    yield 0, 0
    for weight in getattr(experts, "weights", {}).values():
        numbers, stored = prod(weight.shape[1:]), weight.nbytes // max(weight.shape[0], 1)
        quantized = stored < numbers * weight.dtype.itemsize
        yield stored, stored + numbers * (DECODING_BYTES if quantized else dtype.itemsize)
