"""What does a job compute, in plain numbers?

Its rows, widths and bytes, from the shapes of its arrays or files; no data is read. Memory, tasks,
bytes and time follow from them (`memory_law`, `passes`, `price`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from dask_ep.arrays.checks import computing_dtype
from dask_ep.experts.experts import CallableExperts, Experts
from dask_ep.experts.local_experts import numbers_at_once
from dask_ep.experts.stored_experts import StoredExperts
from dask_ep.kernel.bfloat16 import copies, multiplied_by
from dask_ep.kernel.expert import lays_out
from dask_ep.kernel.host_kernel import tile_bytes
from dask_ep.kernel.operands import multiplied_on_gpus
from dask_ep.laws.costs import packet_row_bytes, reply_row_bytes
from dask_ep.laws.device_memory import OnDevice, held_dtype


@dataclass(frozen=True)
class LayerWork:
    """What a whole layer does in addition to its routed experts; all 0 for experts alone."""

    router_flops: int = 0
    #: floating-point operations of one row in the router, in float64
    shared_flops: int = 0
    #: floating-point operations of one row in the shared experts
    row_bytes: int = 0
    #: bytes read and written for one row by router, shared experts and steps around them
    stored: int = 0
    #: bytes of router and shared experts in their files
    loaded: int = 0
    #: their bytes in the memory of every worker
    chunk_tasks: int = 0
    #: tasks for each chunk
    tasks: int = 0
    #: tasks for the whole layer


@dataclass(frozen=True)
class Work:
    """A job in plain numbers."""

    rows: int
    #: number of token rows
    slots: int
    #: slots per row, k; E if experts choose their rows
    d: int
    #: width of a token row
    d_out: int
    #: width of an output row
    dtype: np.dtype
    #: of tokens and outputs
    experts: int
    #: E
    expert_stored: int
    #: bytes of one expert in its file
    expert_loaded: int
    #: bytes of one expert in the computing dtype
    widest: int
    #: width of the widest intermediate row of an expert, routed or shared
    wide: int = 4
    #: itemsize of the computing dtype
    matrix_stored: int = 0
    #: bytes as stored of an expert's largest matrix, which a thread keeps while it decodes the
    #: matrix; 0 if none is decoded
    expert_flops: float = 0.0
    #: floating-point operations of one row at one expert
    multiplied_by: str | None = None
    #: which library multiplies, on this machine or on GPUs, and how: see `kernel.bfloat16`
    copied: int = 0
    #: bytes of the largest matrix that a thread copies: a bfloat16 one to float32, for a product
    #: (`kernel.bfloat16`), or any while it is laid out (`kernel.expert`); 0 without either
    weight_bytes: int = 0
    #: bytes of one top-k weight; 0 without them
    stored_rows: int | None = None
    #: token rows that are stored together
    read_bytes: int = 0
    #: bytes that a thread needs to read a chunk, in addition to its rows
    apply_router_weight_on_input: bool = False
    #: whether rows are multiplied by their top-k weight before they go to their expert
    as_stored: bool = False
    #: whether experts are always held as they are stored
    in_files: bool = True
    #: whether all experts are files or NumPy arrays, so that they can be held as stored, or used in
    #: passes
    routes: bool = False
    #: whether the layer's router makes the routing
    layer: LayerWork = LayerWork()
    #: router and shared experts
    on_device: OnDevice | None = None
    #: what the layer takes on a GPU, if it is computed there

    @property
    def row_bytes(self) -> int:
        """Bytes of a token row or of an output row, whichever is larger."""
        return max(self.d, self.d_out) * self.dtype.itemsize

    @property
    def token_bytes(self) -> int:
        """Bytes of a token row."""
        return self.d * self.dtype.itemsize

    @property
    def reply_bytes(self) -> int:
        """Bytes of a row that a rank sends back."""
        return reply_row_bytes(self.d_out, self.dtype, self.slots)

    @property
    def answer_bytes(self) -> int:
        """Bytes of an output row in the computing dtype."""
        return self.d_out * self.wide

    @property
    def widening(self) -> int:
        """Itemsize of sums over that of tokens; 1 with one slot per row, which has no sums."""
        return max(self.wide // self.dtype.itemsize, 1) if self.slots > 1 else 1

    @property
    def scratch(self) -> int:
        """Bytes of a thread's tiles and of the matrix that it copies."""
        return tile_bytes(max(self.widest, self.d, self.d_out) * self.wide) + self.copied

    def packet_row_bytes(self, places: int) -> int:
        """Return the bytes of a row sent to a rank, with `places` physical experts in all."""
        return packet_row_bytes(self.d, self.dtype.itemsize, self.slots, self.weight_bytes, places)

    def held_bytes(self, as_stored: bool) -> int:
        """Return the bytes of one expert in memory."""
        return self.expert_stored if as_stored else self.expert_loaded

    @classmethod
    def of(
        cls,
        tokens: Any,
        experts: Experts | CallableExperts,
        layer: Any = None,
        *,
        rows: int,
        slots: int,
        topk_dtype: Any = None,
        routes: bool = False,
        stored_rows: int | None = None,
        read_bytes: int = 0,
        on_devices: bool = False,
    ) -> Work:
        """Describe a job by numbers.

        Parameters
        ----------
        tokens : array or source, of which only shape and dtype are used
        experts : those of `layer`, if there is one
        layer : MoELayer or None
        rows, slots : N, k
        topk_dtype : dtype of the top-k weights, if there are any
        routes : whether the layer's router makes the routing
        stored_rows, read_bytes : see the fields
        on_devices : whether the job is computed on GPUs
        """
        dtype, E = np.dtype(tokens.dtype), experts.num_experts
        compute = held_dtype(experts, dtype) if on_devices else computing_dtype(dtype)
        wide = compute.itemsize
        d = int(tokens.shape[1])
        weights = getattr(experts, "weights", {})
        options = getattr(experts, "options", {})
        decoded = [
            weight.nbytes // E
            for weight in weights.values()
            if weight.nbytes != E * weight.loaded_bytes(compute, on_device=on_devices)
        ]
        library = multiplied_on_gpus if on_devices else multiplied_by
        apart = 0  # the copy of gate and up
        if options.get("interleaved", False):
            apart = weights["gate_up"].loaded_bytes(compute, on_device=on_devices)
        shared, layer_work = None, LayerWork()
        if layer is not None:
            shared, layer_work = layer.shared, _layer_work(layer, d, compute, routes, on_devices)
        return cls(
            rows=rows,
            slots=slots,
            d=d,
            d_out=(experts.d_out if layer is None else layer.d_out) or d,
            dtype=dtype,
            experts=E,
            expert_stored=experts.nbytes // E,
            expert_loaded=experts.loaded_bytes(compute, on_device=on_devices),
            widest=max(experts.widest, 0 if shared is None else shared.widest),
            wide=wide,
            matrix_stored=max(decoded, default=0) + apart,
            expert_flops=2 * experts.parameters,
            multiplied_by=library(dtype, experts.is_bfloat16, experts.precision),
            copied=0 if on_devices else max(_copied(each, dtype) for each in (experts, shared)),
            weight_bytes=0 if topk_dtype is None else np.dtype(topk_dtype).itemsize,
            stored_rows=stored_rows,
            read_bytes=read_bytes,
            apply_router_weight_on_input=options.get("apply_router_weight_on_input", False),
            as_stored=isinstance(experts, StoredExperts),
            in_files=isinstance(experts, Experts) and not experts.collections(),
            routes=routes,
            layer=layer_work,
            on_device=OnDevice.of(experts, shared, slots, dtype) if on_devices else None,
        )


def _copied(experts: Experts | CallableExperts | None, dtype: np.dtype) -> int:
    """Return the bytes of the largest matrix that a thread copies; see `Work.copied`."""
    if not isinstance(experts, Experts):
        return 0
    compute, copied = computing_dtype(dtype), 0
    if copies(dtype, experts.is_bfloat16, experts.precision):
        copied = numbers_at_once(experts) * np.dtype(np.float32).itemsize
    if lays_out(compute, experts.is_bfloat16, experts.options.get("transposed", False)):
        copied = max(copied, *(weight.loaded_bytes(compute) for weight in experts.weights.values()))
    return copied


def _layer_work(layer: Any, d: int, compute: np.dtype, routes: bool, on_devices: bool) -> LayerWork:
    """Describe a layer's router, unless the routing is given, and its shared experts by numbers.

    Tasks are not counted here, but in the graph.
    """
    E, shared = layer.experts.num_experts, layer.shared
    there_and_back = (d + (layer.d_out or d)) * compute.itemsize
    around = layer.around
    finishes = bool(shared is not None or layer.residual or around.between or around.after)
    row_bytes = (getattr(layer.router, "slots", E) + 5) * E * 4 if routes else 0  # as in `route`
    if shared is not None:
        row_bytes += shared.num_experts * there_and_back
    return LayerWork(
        router_flops=2 * d * E if routes and "weight" in layer.arrays else 0,
        shared_flops=0 if shared is None else 2 * shared.num_experts * shared.parameters,
        row_bytes=row_bytes + finishes * 2 * there_and_back,
        stored=layer.resident_stored_bytes,
        loaded=layer.resident_bytes(compute, on_device=on_devices),
    )
