"""What does a whole MoE layer compute?

    hidden [..., d] ── rows [n, d] ─┬─ route ──> indices, topk_weights [n, k]
                                    │                     │
                                    ├─ experts  <─────────┘      expert_parallel
                                    ├─ shared experts            every row, by sigmoid of a gate
                                    ├─ itself, if residual
                                    v
                                   sum ──> [..., d]

Everything is lazy and row-wise: a chunk of hidden states is routed, sent through its experts, and
added up by tasks of its own. Only capacity limits and expert choice look at the whole batch.
"""

from __future__ import annotations

from copy import copy
from importlib import import_module
from math import prod
from os import PathLike
from typing import Any, NamedTuple

import dask.array as da
import numpy as np
from dask.base import normalize_token, tokenize
from dask.task_spec import Task, TaskRef

from dask_ep.arrays import memory
from dask_ep.arrays.checks import computing_dtype
from dask_ep.arrays.device import explain_memory
from dask_ep.arrays.html import shows
from dask_ep.arrays.namespaces import UNDERFLOW_IS_ZERO, Array, namespace
from dask_ep.experts.experts import CallableExperts, Experts, as_experts
from dask_ep.graph.pipeline import expert_parallel
from dask_ep.graph.rows import array_of, chunked_like, keys_of, rows_of, unflatten, xp_name
from dask_ep.kernel.context import error_context, explain_kernel_memory
from dask_ep.kernel.dispatch import dispatch
from dask_ep.layers.capacity import Capacity, ExpertChoice
from dask_ep.layers.layer_checks import (
    check_hidden,
    check_parts,
    check_routes,
    check_token_ids,
    small_array,
)
from dask_ep.layers.lazy_routing import SmallArray, count_rows, route_rows
from dask_ep.layers.routing import Router
from dask_ep.placement.policies import Placement
from dask_ep.storage.fingerprint import describe

Routing = tuple[da.Array, da.Array]
"""Indices and top-k weights, each (..., k)."""


class RoutedRows(NamedTuple):
    """Hidden states as rows, and what these want."""

    hidden: da.Array
    #: (..., d) in the chunks of the layer's output
    rows: da.Array
    #: (n, d)
    indices: da.Array
    #: (n, k)
    topk_weights: da.Array
    #: (n, k)


LAYER_PARTS = ("router", "experts", "arrays", "shared", "capacity", "residual")
"""What a layer consists of."""


class MoELayer:
    """A Mixture-of-Experts layer: router, experts, and experts that all rows share.

    Parameters
    ----------
    router : Router or ExpertChoice
    experts : Experts, or anything that `expert_parallel` takes for them
    router_weight : (E, d), optional
        A NumPy array, a path, or a Source, as the other small arrays here. A layer without it
        takes its routing from `table`, or from the call.
    router_bias, selection_bias : (E,), optional
        As in `route`.
    shared : Experts, optional
        Each row goes through all of them.
    shared_gate : (d,) or (1, d), optional
        Weighs the shared experts by sigmoid(row · shared_gate); by 1 without it.
    capacity : Capacity, optional
        How many slots of the whole batch an expert takes; all without it.
    table : (vocabulary, k) integers, optional
        Experts of each token id: the call then needs token ids, and `router_weight` only weighs.
    residual : bool
        Add the layer's input rows to its output: a decoder's whole MoE step if the model adds the
        block's output to the block's own input. Nearly all models are pre-norm, and add it to the
        rows before the norm: leave it False there, and write ``x + layer(norm(x))``.

    Raises
    ------
    ValueError, TypeError
        If sizes do not fit, or router and experts do not agree on what a weight multiplies.

    Notes
    -----
    Routing is float32. Rows of a (batch, sequence, d) array are numbered in C order where the whole
    batch counts (`capacity`, `ExpertChoice`). Reading is left to the tasks: a layer that is in
    files holds their names, and pickles to a few kB.

    Examples
    --------
    >>> import dask.array as da, numpy as np
    >>> from dask_ep import Experts, MoELayer, Router
    >>> rng = np.random.default_rng(0)
    >>> experts = Experts.linear(rng.standard_normal((4, 8, 8), dtype="f4"))
    >>> router = Router(num_experts=4, k=2, norm_topk_prob=True)
    >>> layer = MoELayer(router, experts, rng.standard_normal((4, 8), dtype="f4"))
    >>> hidden = da.random.default_rng(1).standard_normal((2, 6, 8), chunks=(1, 3, 8))
    >>> layer(hidden)
    dask.array<..., shape=(2, 6, 8), dtype=float64, chunksize=(1, 3, 8), chunktype=numpy.ndarray>
    >>> int(layer.tokens_per_expert(hidden).sum())  # 12 rows, 2 experts each
    24
    """

    def __init__(
        self,
        router: Router | ExpertChoice,
        experts: Experts | Any,
        router_weight: Any = None,
        *,
        router_bias: Any = None,
        selection_bias: Any = None,
        shared: Experts | None = None,
        shared_gate: Any = None,
        capacity: Capacity | None = None,
        table: Any = None,
        residual: bool = False,
    ):
        self.router, self.experts, self.shared = router, as_experts(experts), shared
        self.capacity, self.residual = capacity, residual
        given = {
            "weight": router_weight,
            "bias": router_bias,
            "selection_bias": selection_bias,
            "table": table,
            "shared_gate": shared_gate,
        }
        self.arrays = {
            name: small_array(name, value, self.router, self.experts)
            for name, value in given.items()
            if value is not None
        }
        check_parts(self.router, self.experts, self.shared, self.arrays, capacity, residual)

    @classmethod
    def from_pretrained(cls, directory: str | PathLike, layer: int, **more: Any) -> MoELayer:
        """Open a layer of a checkpoint, as `dask_ep.load_moe_layer` does, which takes the same."""
        # By name: a layer of arrays needs nothing of checkpoints, whose files import this one.
        return import_module("dask_ep.layers.checkpoint").load_moe_layer(directory, layer, **more)

    def __call__(
        self,
        hidden: da.Array,
        *,
        token_ids: da.Array | None = None,
        routing: Routing | None = None,
        world_size: int | None = None,
        placement: Placement | str | None = None,
        precision: str | None = None,
    ) -> da.Array:
        """Compute the layer.

        Parameters
        ----------
        hidden : (n, d), (batch, sequence, d) or more axes: Dask array of floats
        token_ids : Dask array of integers of the shape of `hidden` without its last axis
            Needed by a layer with a `table`, and by no other.
        routing : (indices, topk_weights), optional
            Each (..., k): what `route` gave, here or in a run before, instead of routing again.
        world_size, placement : as in `expert_parallel`
            A placement by name counts the rows of each expert while the graph is built: it routes
            all hidden states once more than the run does, unless `routing` is given.
        precision : "float32" or "bfloat16", optional
            See `Experts.with_precision`. The router is float32 in any case.

        Returns
        -------
        Dask array of the shape and dtype of `hidden`, lazy
            In its chunks; where the whole batch counts, axes after the first come in one chunk.
        """
        if precision is not None:
            return self.with_precision(precision)(
                hidden, token_ids=token_ids, routing=routing, world_size=world_size,
                placement=placement,
            )  # fmt: skip
        hidden, rows, indices, weights = self.routed_rows(hidden, token_ids, routing)
        y = expert_parallel(
            rows,
            indices,
            self.experts,
            topk_weights=weights,
            world_size=world_size,
            placement=placement,
        )
        return unflatten(self.add_the_rest(rows, y), hidden)

    def with_precision(self, precision: str) -> MoELayer:
        """The same layer with experts, shared ones too, of another `Experts.with_precision`."""
        layer = copy(self)
        layer.experts = self.experts.with_precision(precision)
        layer.shared = None if self.shared is None else self.shared.with_precision(precision)
        return layer

    def route(
        self, hidden: da.Array, *, token_ids: da.Array | None = None
    ) -> tuple[da.Array, da.Array]:
        """Route without computing any expert.

        Returns
        -------
        indices : (..., k) Dask array of int32; -1 for a slot that a capacity limit dropped
        topk_weights : (..., k) Dask array of float32
            Both lazy. Store them to replay them with ``routing=``.
        """
        hidden, _, indices, weights = self.routed_rows(hidden, token_ids)
        return unflatten(indices, hidden), unflatten(weights, hidden)

    def tokens_per_expert(self, hidden: da.Array, *, token_ids: da.Array | None = None) -> da.Array:
        """Count the rows that choose each expert: a lazy (E,) Dask array of int64."""
        return count_rows(self.routed_rows(hidden, token_ids).indices, self.experts.num_experts)

    def resident_bytes(self, dtype: np.dtype, *, on_device: bool = False) -> int:
        """Bytes of the shared experts and the router, which every worker holds to compute."""
        shared, small = self.shared, sum(prod(array.shape) for array in self.arrays.values())
        held = 0 if shared is None else shared.loaded_bytes(dtype, on_device=on_device)
        return small * dtype.itemsize + (0 if shared is None else shared.num_experts * held)

    @property
    def widest(self) -> int:
        """Width of the widest row on the way through an expert, a shared one too."""
        return max(self.experts.widest, 0 if self.shared is None else self.shared.widest)

    @property
    def resident_stored_bytes(self) -> int:
        """Bytes of them in their files."""
        small = sum(array.source.nbytes for array in self.arrays.values())
        return small + (0 if self.shared is None else self.shared.nbytes)

    def fingerprint(self) -> dict[str, Any]:
        """Tell this layer from others: all that it computes with; for `store`."""
        return describe(vars(self))

    def __repr__(self) -> str:
        parts = [repr(self.router), repr(self.experts)]
        optional = {name: getattr(self, name) for name in ("shared", "capacity", "residual")}
        parts += [f"{name}={part!r}" for name, part in optional.items() if part]
        return f"MoELayer({', '.join(parts)})"

    _repr_html_ = shows("router", "experts", "shared", "capacity", "residual")

    def __dask_tokenize__(self) -> object:
        return normalize_token((type(self).__name__, *map(vars(self).get, LAYER_PARTS)))

    # --- steps on rows (n, d) ---

    def routed_rows(
        self, hidden: da.Array, token_ids: da.Array | None = None, routing: Routing | None = None
    ) -> RoutedRows:
        """Make rows of hidden states, and route them unless a `routing` is given."""
        hidden = self._checked(hidden)
        rows = rows_of(hidden)
        if routing is not None:
            return RoutedRows(hidden, rows, *(rows_like(array, hidden) for array in routing))
        check_routes(self.arrays)
        names = ("weight", "bias", "selection_bias", "table")
        arrays = {name: self.arrays[name] for name in names if name in self.arrays}
        ids = self._ids(token_ids, hidden)
        routed = route_rows(rows, self.router, arrays, token_ids=ids, capacity=self.capacity)
        return RoutedRows(hidden, rows, *routed)

    def add_the_rest(self, rows: da.Array, routed: da.Array) -> da.Array:
        """Add what does not depend on the routing: shared experts, and the rows themselves.

        Parameters
        ----------
        rows : (n, d) hidden states
        routed : (n, d_out) output of the routed experts, in the chunks of `rows`

        Returns
        -------
        (n, d_out) Dask array, lazy; `routed` itself where the layer has neither
        """
        if self.shared is None and not self.residual:
            return routed
        gate = {name: self.arrays[name] for name in ("shared_gate",) if name in self.arrays}
        token = tokenize(rows, routed, self.shared, gate, self.residual)
        name, shared = f"ep_layer-{token}", f"ep_shared-{token}"
        tasks: dict[Any, Task] = {}
        loaded = None
        if self.shared is not None:
            dtype = computing_dtype(rows.dtype, on_device=xp_name(rows) != "numpy")
            tasks[shared] = Task(shared, _load_shared, self.shared, gate, xp_name(rows), dtype)
            loaded = TaskRef(shared)
        for c, (row_key, y_key) in enumerate(zip(keys_of(rows), keys_of(routed), strict=True)):
            tasks[name, c, 0] = Task(
                (name, c, 0), _finish, TaskRef(row_key), TaskRef(y_key), loaded, self.residual, c
            )
        return array_of(name, tasks, [rows, routed], (rows.chunks[0], routed.chunks[1]), rows._meta)

    # --- what must hold ---

    def _checked(self, hidden: da.Array) -> da.Array:
        check_hidden(hidden, self.experts.d)
        if self.capacity is not None or isinstance(self.router, ExpertChoice):
            return hidden.rechunk(dict.fromkeys(range(1, hidden.ndim), -1))
        return hidden

    def _ids(self, token_ids: da.Array | None, hidden: da.Array) -> da.Array | None:
        """Token ids as rows (n, 1), where this layer needs them."""
        check_token_ids(token_ids, self.arrays)
        if token_ids is None:
            return None
        return rows_of(chunked_like(da.asarray(token_ids)[..., None], hidden, "token_ids"))


def rows_like(routing: da.Array, hidden: da.Array) -> da.Array:
    """Make rows (n, k) of indices or weights (..., k), in the chunks of the hidden states."""
    return rows_of(chunked_like(routing, hidden, "routing"))


# --- the tasks -----------------------------------------------------------------------------------


def _load_shared(
    shared: Experts | CallableExperts, gate: dict[str, SmallArray], xp_name: str, dtype: np.dtype
) -> tuple[Any, Array | None]:
    xp, needed = import_module(xp_name), shared.parameters * shared.num_experts * dtype.itemsize
    with error_context("loading the shared experts"), explain_memory(xp, needed):
        loaded = shared.load(xp=xp, dtype=dtype)
    if not gate:
        return loaded, None
    return loaded, xp.asarray(gate["shared_gate"].read().astype(computing_dtype(dtype)))


@UNDERFLOW_IS_ZERO
def _finish(
    rows: Array, routed: Array, shared: tuple[Any, Array | None] | None, residual: bool, chunk: int
) -> Array:
    """Add the shared experts and the rows themselves, as far as the layer has them."""
    experts, d_out = () if shared is None else shared[0], routed.shape[1]
    sums = 3 * d_out * computing_dtype(rows.dtype).itemsize
    with (
        error_context(f"shared experts and residual of token chunk {chunk}"),
        explain_kernel_memory(rows, len(experts), experts, d_out, extra_row_bytes=sums),
    ):
        return _added(rows, routed, shared, residual)


def _added(
    rows: Array, routed: Array, shared: tuple[Any, Array | None] | None, residual: bool
) -> Array:
    """Add to the routed output in float32, or float64 where rows are, rounding once."""
    compute = computing_dtype(rows.dtype)
    if namespace(rows) is np:
        rows = rows.astype(compute, copy=False)
    if shared is None:
        y = memory.empty(routed.shape, compute, like=routed)
        namespace(y).add(_wide(routed), _wide(rows), out=y)
        return y.astype(routed.dtype, copy=False)
    y = _apply_shared(rows, *shared, dtype=compute)
    y += _wide(routed)
    if residual:
        y += _wide(rows)
    return y.astype(routed.dtype, copy=False)


def _wide(rows: Array) -> Array:
    return rows.astype(computing_dtype(rows.dtype), copy=False)


def _apply_shared(rows: Array, experts: Any, gate: Array | None, dtype: np.dtype) -> Array:
    """Every row through every shared expert: the kernel with a routing that says so."""
    xp, count = namespace(rows), len(experts)
    everyone = xp.broadcast_to(xp.arange(count, dtype=np.int32), (len(rows), count))
    weights = None
    if gate is not None:
        with np.errstate(over="ignore"):
            weights = 1 / (1 + xp.exp(-(rows.astype(gate.dtype, copy=False) @ gate)))
        weights = xp.broadcast_to(weights[:, None], everyone.shape)
    return dispatch(rows, everyone, weights, experts, 0, 1, dtype=dtype)
