"""What do the experts of a layer see of its rows, and what do they make of them?

    hidden [..., d] ── route ──> indices, topk_weights [n, k]
          │                            │
          └────────── experts <────────┘
                         │
                         v
    usage.rows (E,), amax.input (E, d), sumsq.hidden (E, f), reap.score (E,), ...

One pass over the rows collects all that is asked for, and computes the layer's output on the way
if that is wanted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import dask.array as da
import numpy as np

from dask_ep.arrays.namespaces import namespace
from dask_ep.experts.experts import CallableExperts, Experts, as_experts
from dask_ep.graph.pipeline import build_chunks, prepare
from dask_ep.graph.rows import rows_of, unflatten
from dask_ep.graph.statistics import (
    ROUTING_STATISTICS,
    PartialLayout,
    finished,
    join_groups,
    see_experts,
    see_routing,
)
from dask_ep.kernel.statistics import TILE_STATISTICS
from dask_ep.layers.layer import MoELayer, rows_like
from dask_ep.placement.placement_files import Asked

TILE_NAMES = tuple(dict.fromkeys(name.partition(".")[0] for name in TILE_STATISTICS))

WHAT = (*ROUTING_STATISTICS, *(name for name in TILE_NAMES if name != "coverage"))
"""What can be collected, by name."""


@dataclass(frozen=True)
class Collection:
    """What is collected of a layer, not computed yet.

    Attributes
    ----------
    groups : (G, size) lazy array of float64, one group of token chunks in each chunk
        Their joined partial results; whoever keeps the rows that are done need not compute them
        again. `statistics_of` makes statistics of all rows.
    layout : of a row of `groups`
    output : (..., d_out) lazy array, or None where it is not wanted
    missing : names of what was asked for and does not exist for these experts
    """

    groups: da.Array
    layout: PartialLayout
    output: da.Array | None
    missing: tuple[str, ...]

    def arrays(self) -> dict[str, da.Array]:
        """The statistics by name, and the output as "output"."""
        output = {} if self.output is None else {"output": self.output}
        return finished(self.groups, self.layout) | output


def collect(
    hidden: da.Array,
    layer: MoELayer | Experts | Any,
    *,
    what: Iterable[str],
    routing: da.Array | tuple[da.Array, da.Array] | None = None,
    token_ids: da.Array | None = None,
    with_output: bool = False,
    world_size: int | None = None,
    placement: Asked = None,
) -> dict[str, da.Array]:
    """Collect statistics of each expert over the rows that are routed to it.

    Parameters
    ----------
    hidden : (n, d), or (..., d) with more axes; Dask array of floats on the host
    layer : MoELayer, or Experts (or what `expert_parallel` takes for them) with a `routing`
    what : names, see below; one name stands for all of its arrays
    routing : (..., k) expert indices, or (indices, topk_weights), optional
        Without it a layer's own router decides.
    token_ids : as in `MoELayer`
    with_output : also give the layer's output, as "output", from the same pass
    world_size, placement : as in `expert_parallel`

    Returns
    -------
    dict of lazy Dask arrays by name. Compute them together, with `dask.compute`: then the rows go
    through the experts once.

        usage         usage.rows (E,) int64, usage.weight (E,) sum of top-k weights,
                      usage.slots (E, k) int64 rows that chose the expert in each slot
        coactivation  coactivation (E, E) int64, rows that chose both; the diagonal, one
        amax          amax.input (E, d), amax.hidden (E, f), amax.output (E, d_out): largest
                      absolute value of each channel
        sumsq         sumsq.input, sumsq.hidden, sumsq.output: sum of squares, likewise
        mean_output   mean_output.sum, mean_output.mean (E, d_out) of the experts' output rows
        reap          reap.score (E,) mean of weight * norm of the output row, reap.norm (E,) mean
                      norm, reap.rows (E,) int64

    Always: coverage.rows (E,) int64, the rows that the other numbers of an expert are of.

    Raises
    ------
    ValueError
        For a name that is not known, or what does not exist for these experts; and as
        `expert_parallel`.
    TypeError
        If the rows are on a GPU.

    Notes
    -----
    Hidden activations are what the last matrix of an expert multiplies; linear experts and
    callables have none, and no array of them. An expert's input is the row as its first matrices
    read it: times the top-k weight where a layer applies that to the input. Outputs are those
    before the top-k weight is applied. A slot counts as a row: a row that names an expert twice
    counts twice, but in `coactivation`. Values are computed as by `expert_parallel`, and added in
    float64; an expert without rows has zeros. Partial results come with each chunk, and are joined
    once, in the order of the chunks: the same chunks and placement give the same bits on every
    scheduler, after any failure. REAP: Lasby et al., "REAP the Experts" (2025), equation 9.

    Examples
    --------
    >>> import dask, dask.array as da, numpy as np
    >>> from dask_ep import collect
    >>> tokens = da.ones((6, 2), chunks=(4, 2))
    >>> routing = da.from_array(np.array([0, 1, 2, 3, 0, -1]), chunks=4)
    >>> experts = np.arange(4.0)[:, None, None] * np.eye(2)  # expert e multiplies by e
    >>> found = collect(tokens, experts, what=["usage", "amax"], routing=routing)
    >>> (found,) = dask.compute(found)
    >>> found["usage.rows"], found["amax.output"][:, 0]
    (array([2, 1, 1, 1]), array([0., 1., 2., 3.]))
    """
    collection = begin_collection(
        hidden, layer, what=what, routing=routing, token_ids=token_ids, with_output=with_output,
        world_size=world_size, placement=placement,
    )  # fmt: skip
    return collection.arrays()


def begin_collection(
    hidden: da.Array,
    layer: MoELayer | Experts | Any,
    *,
    what: Iterable[str],
    routing: da.Array | tuple[da.Array, da.Array] | None = None,
    token_ids: da.Array | None = None,
    with_output: bool = False,
    world_size: int | None = None,
    placement: Asked = None,
) -> Collection:
    """As `collect`, which gives the `arrays` of what this returns."""
    _check_host(hidden)
    experts = layer.experts if isinstance(layer, MoELayer) else as_experts(layer)
    of_routing, of_tiles, missing = choose_statistics(what, experts)
    weights: da.Array | None
    if isinstance(layer, MoELayer):
        if isinstance(routing, da.Array):
            raise TypeError("routing of a layer must be both (indices, topk_weights)")
        hidden, rows, indices, weights = layer.routed_rows(hidden, token_ids, routing)
    else:
        rows, indices, weights = _given_rows(hidden, routing)
    ready = prepare(rows, indices, experts, weights, world_size, placement)
    pieces = [see_routing(ready, of_routing)] if of_routing else []
    y = None
    if of_tiles:
        seen, y = see_experts(ready, of_tiles, output=with_output)
        pieces.append(seen)
    elif with_output:
        y = build_chunks(ready)
    groups, layout = join_groups(pieces)
    if y is not None:
        rest = layer.add_the_rest(ready.tokens, y) if isinstance(layer, MoELayer) else y
        y = unflatten(rest, hidden)
    return Collection(groups, layout, y, missing)


def choose_statistics(
    what: Iterable[str], experts: Experts | CallableExperts
) -> tuple[list[str], list[str], tuple[str, ...]]:
    """Tell which statistics of the routing and of tiles are asked for, and which do not exist."""
    asked = [what] if isinstance(what, str) else list(what)
    for name in asked:
        if name not in WHAT:
            raise ValueError(f"what must be some of {', '.join(WHAT)}, but has {name!r}")
    if not asked:
        raise ValueError(f"what must name something to collect: {', '.join(WHAT)}")
    of_tiles = [name for name in TILE_STATISTICS if name.partition(".")[0] in asked]
    missing = [name for name in of_tiles if TILE_STATISTICS[name].of == "hidden"]
    if experts.hidden is None:
        of_tiles = [name for name in of_tiles if name not in missing]
    of_tiles = ["coverage", *of_tiles] if of_tiles else []
    of_routing = [name for name in ROUTING_STATISTICS if name in asked]
    return of_routing, of_tiles, tuple(missing if experts.hidden is None else ())


def _given_rows(
    hidden: da.Array, routing: da.Array | tuple[da.Array, da.Array] | None
) -> tuple[da.Array, da.Array, da.Array | None]:
    """Rows (n, d), and their routing and weights."""
    if routing is None:
        raise ValueError("routing must be given for experts without a router: indices, or both "
                         "(indices, topk_weights)")  # fmt: skip
    indices, weights = routing if isinstance(routing, (tuple, list)) else (routing, None)
    if hidden.ndim == 2:
        return hidden, indices, weights
    weights = None if weights is None else rows_like(weights, hidden)
    return rows_of(hidden), rows_like(indices, hidden), weights


def _check_host(hidden: da.Array) -> None:
    if not isinstance(hidden, da.Array):
        raise TypeError(
            f"hidden must be a Dask array, but is a {type(hidden).__name__}; use da.from_array or "
            "dask_ep.open_tokens"
        )
    if namespace(hidden._meta) is not np:
        raise TypeError(
            "statistics are collected on the host, but the rows are on a GPU: give NumPy chunks"
        )
