"""What does a whole MoE layer compute?

    hidden [..., d] ── rows [n, d] ─┬─ route ──> indices, topk_weights [n, k]
                                    │                     │
                                    ├─ experts  <─────────┘      expert_parallel
                                    ├─ shared experts            every row, by sigmoid of a gate
                                    ├─ the row, if residual
                                    v
                                   sum ──> [..., d]

Everything is lazy and row-wise: a chunk of hidden states is routed, sent through its experts, and
added up by its own tasks. Only capacity limits and expert choice depend on the whole batch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from copy import copy
from functools import partial
from math import prod
from typing import Any, NamedTuple

import dask.array as da
import numpy as np
from dask.base import normalize_token

from dask_ep.arrays.html import shows
from dask_ep.experts.experts import Experts, as_experts
from dask_ep.experts.stored_experts import held_as_stored
from dask_ep.graph.pipeline import expert_parallel
from dask_ep.graph.rows import chunked_like, rows_of, unflatten
from dask_ep.layers.capacity import Capacity, ExpertChoice
from dask_ep.layers.checkpoint_layers import Checkpoint
from dask_ep.layers.family import Family
from dask_ep.layers.layer_checks import (
    check_hidden,
    check_parts,
    check_routes,
    check_token_ids,
    small_array,
)
from dask_ep.layers.lazy_routing import SmallArray, count_rows, route_rows
from dask_ep.layers.lazy_row_steps import enter_rows, experts_alone, finish_rows
from dask_ep.layers.routing import Router
from dask_ep.layers.row_steps import Around, Rest
from dask_ep.placement.placement import Placement
from dask_ep.storage.fingerprint import describe

Routing = tuple[da.Array, da.Array]
"""Indices and top-k weights, each (..., k)."""


class RoutedRows(NamedTuple):
    """Hidden states as rows, and their routing."""

    hidden: da.Array
    #: (..., d) in the chunks of the layer's output
    rows: da.Array
    #: (n, d)
    indices: da.Array
    #: (n, k)
    topk_weights: da.Array
    #: (n, k)


LAYER_PARTS = ("router", "experts", "arrays", "shared", "capacity", "around", "residual")
"""The parts of a layer."""


class _Parts:
    """The parts of a layer, the widths of its rows, and the sizes of its parts."""

    router: Any
    experts: Any
    shared: Any
    around: Around
    arrays: dict[str, SmallArray]
    residual: bool

    @property
    def d(self) -> int | None:
        """Width of input rows; None: any."""
        return self.around.d(self.experts)

    @property
    def d_out(self) -> int | None:
        """Width of output rows; None: that of input rows."""
        return self.around.d_out(self.experts)

    def resident_bytes(self, dtype: np.dtype, *, on_device: bool = False) -> int:
        """Bytes of the shared experts and the router, which every worker loads."""
        shared, small = self.shared, sum(prod(array.shape) for array in self.small_arrays)
        held = 0 if shared is None else shared.loaded_bytes(dtype, on_device=on_device)
        return small * dtype.itemsize + (0 if shared is None else shared.num_experts * held)

    @property
    def small_arrays(self) -> list[SmallArray]:
        """All arrays except the weights of experts."""
        return [*self.arrays.values(), *self.around.arrays]

    @property
    def known_experts(self) -> int:
        """How many experts a routing may name, including those that rows are not sent to."""
        if self.around.beyond == "shared":
            return self.experts.num_experts + self.shared.num_experts
        return self.router.num_experts

    @property
    def rest(self) -> Rest:
        """The parts that act after the experts' answers."""
        around, gate = self.around, self.arrays.get("shared_gate")
        return Rest(
            self.shared, gate, around.between, around.after, around.beyond,
            self.experts.num_experts, self.residual,
        )  # fmt: skip

    @property
    def resident_stored_bytes(self) -> int:
        """Bytes of the experts in their files."""
        arrays = [array.source for array in self.small_arrays]
        small = sum(prod(source.shape) * source.dtype.itemsize for source in arrays)
        return small + (0 if self.shared is None else self.shared.nbytes)

    def fingerprint(self) -> dict[str, Any]:
        """Identify this layer by everything that it computes with; for `store`."""
        return describe(vars(self))

    def __repr__(self) -> str:
        parts = [repr(self.router), repr(self.experts)]
        optional = {name: getattr(self, name) for name in ("shared", "capacity", "residual")}
        parts += [f"{name}={part!r}" for name, part in optional.items() if part]
        return f"MoELayer({', '.join(parts)})"

    _repr_html_ = shows("router", "experts", "shared", "capacity", "residual")

    def __dask_tokenize__(self) -> object:
        return normalize_token((type(self).__name__, *map(vars(self).get, LAYER_PARTS)))


class MoELayer(_Parts):
    """A Mixture-of-Experts layer: router, experts, and experts that all rows share.

    Parameters
    ----------
    router : Router or ExpertChoice
    experts : Experts, in any form that `expert_parallel` takes
    router_weight : (E, d), optional
        A NumPy array, a path, or a Source, like the other small arrays here. A layer without it
        takes its routing from `table`, or from the call.
    router_bias, selection_bias : (E,), optional
        As in `route`.
    shared : Experts, optional
        Each row goes through all of them.
    shared_gate : (d,) or (1, d), optional
        Weights the shared experts by sigmoid(row · shared_gate); by 1 without it.
    capacity : Capacity, optional
        How many slots of the whole batch an expert takes; all without it.
    table : (vocabulary, k) integers, optional
        Experts of each token id: the call then needs token ids, and `router_weight` gives only
        weights.
    per_expert_scale : (E,) or (1,), optional
        As in `route`.
    input_scale : (d,), optional
        Multiplies what the router reads.
    around : Around, optional
        Steps on rows before the experts and after them.
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
    batch matters (`capacity`, `ExpertChoice`). Tasks read the weights: a layer in files holds only
    their names, and pickles to a few kB.

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
        per_expert_scale: Any = None,
        input_scale: Any = None,
        around: Around | None = None,
        residual: bool = False,
    ):
        self.router, self.experts, self.shared = router, as_experts(experts), shared
        self.capacity, self.residual = capacity, residual
        self.around = around or Around()
        self.config: dict[str, Any] = {}  # of a checkpoint: the keys that were used
        given = {
            "weight": router_weight,
            "bias": router_bias,
            "selection_bias": selection_bias,
            "table": table,
            "per_expert_scale": per_expert_scale,
            "input_scale": input_scale,
            "shared_gate": shared_gate,
        }
        self.arrays = {
            name: small_array(name, value, self.router, self.d)
            for name, value in given.items()
            if value is not None
        }
        check_parts(
            self.router, self.experts, self.shared, self.around, self.arrays, capacity, residual
        )

    @classmethod
    def from_pretrained(
        cls,
        directory: str | os.PathLike,
        layer: int,
        *,
        families: Iterable[Family] = (),
        residual: bool = False,
        as_stored: bool = False,
    ) -> MoELayer:
        """Open one MoE layer of a Hugging Face checkpoint, as `load_moe_layer` explains."""
        block, arguments = Checkpoint(directory, families).open_block(layer, residual=residual)
        if as_stored:
            arguments["experts"] = held_as_stored(arguments["experts"])
        opened = cls(**arguments)
        opened.config = block.config.noted
        return opened

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
            In its chunks; if the whole batch matters, axes after the first come in one chunk.
        """
        if precision is not None:
            return self.with_precision(precision)(
                hidden, token_ids=token_ids, routing=routing, world_size=world_size,
                placement=placement,
            )  # fmt: skip
        hidden, rows, indices, weights = self.routed_rows(hidden, token_ids, routing)
        exchange = partial(expert_parallel, world_size=world_size, placement=placement)
        return unflatten(self.through(rows, indices, weights, exchange), hidden)

    def with_precision(self, precision: str) -> MoELayer:
        """The same layer with another `Experts.with_precision`, of shared experts too."""
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
        indices = self.sent(self.routed_rows(hidden, token_ids).indices)
        return count_rows(indices, self.experts.num_experts)

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
        names = ("weight", "bias", "selection_bias", "table", "per_expert_scale", "input_scale")
        arrays = {name: self.arrays[name] for name in names if name in self.arrays}
        check_token_ids(token_ids, self.arrays)
        ids = None
        if token_ids is not None:
            ids = rows_like(da.asarray(token_ids)[..., None], hidden, "token_ids")
        routed = route_rows(rows, self.router, arrays, token_ids=ids, capacity=self.capacity)
        return RoutedRows(hidden, rows, *routed)

    def through(
        self,
        rows: da.Array,
        indices: da.Array,
        weights: da.Array | None,
        exchange: Callable[..., da.Array],
    ) -> da.Array:
        """Send rows through the experts, with the steps before and after: (n, d_out), lazy.

        `exchange` is called like `expert_parallel`, with its first three arguments and
        `topk_weights`.
        """
        y = exchange(self.enter(rows), self.sent(indices), self.experts, topk_weights=weights)
        return self.add_the_rest(rows, y, indices, weights)

    def enter(self, rows: da.Array) -> da.Array:
        """Make the rows that the experts read; `rows` themselves if there are no steps before."""
        return enter_rows(rows, self.around.before, self.experts.d)

    def sent(self, indices: da.Array) -> da.Array:
        """The routing to the layer's own experts: -1 for those that only the router has."""
        if self.around.beyond is None:
            return indices
        return experts_alone(indices, self.experts.num_experts, self.known_experts)

    def add_the_rest(
        self,
        rows: da.Array,
        routed: da.Array,
        indices: da.Array | None = None,
        weights: da.Array | None = None,
    ) -> da.Array:
        """Finish rows after their routed experts: (n, d_out), lazy; `beyond` needs the routing."""
        rest = self.rest
        if not rest.finishes:
            return routed
        chosen = [a for a in (indices, weights) if rest.beyond is not None and a is not None]
        return finish_rows(rows, routed, rest, chosen, self.d_out)

    # --- what must hold ---

    def _checked(self, hidden: da.Array) -> da.Array:
        check_hidden(hidden, self.d)
        if self.capacity is not None or isinstance(self.router, ExpertChoice):
            return hidden.rechunk(dict.fromkeys(range(1, hidden.ndim), -1))
        return hidden


def rows_like(array: da.Array, hidden: da.Array, name: str = "routing") -> da.Array:
    """Make rows (n, k) of indices or weights (..., k), in the chunks of the hidden states."""
    return rows_of(chunked_like(array, hidden, name))
