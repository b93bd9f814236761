"""Which statistics of a layer's routing, of its experts' inputs and outputs are collected?

    hidden [..., d] ── route ──> indices, topk_weights [n, k]
          │                            │
          └────────── experts <────────┘
                         │
                         v
    usage.rows (E,), amax.input (E, d), sumsq.hidden (E, f), reap.score (E,), ...

One pass over the rows collects all requested statistics, and also computes the layer's output if
wanted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple

import dask.array as da
import numpy as np

from dask_ep.arrays.checks import kind_of
from dask_ep.arrays.namespaces import namespace
from dask_ep.experts.experts import CallableExperts, Experts, as_experts
from dask_ep.graph.gram import grams
from dask_ep.graph.pipeline import Ready, build_chunks, prepare
from dask_ep.graph.row_choice import choose_slots, with_weights_of_others
from dask_ep.graph.rows import rows_of, unflatten
from dask_ep.graph.statistics import (
    ROUTING_STATISTICS,
    Numbers,
    PartialLayout,
    Partials,
    finished,
    join_groups,
    name_statistics,
    see_experts,
    see_routing,
)
from dask_ep.kernel.error_context import slots_of
from dask_ep.kernel.statistics import TILE_STATISTICS
from dask_ep.laws.costs import PICKED_TOGETHER
from dask_ep.layers.layer import MoELayer, rows_like
from dask_ep.layers.router_statistics import edges, see_router
from dask_ep.placement.placement_files import Asked

TILE_NAMES = tuple(dict.fromkeys(name.partition(".")[0] for name in TILE_STATISTICS))

_ALWAYS = "coverage"

WHAT = (*ROUTING_STATISTICS, "router", *TILE_NAMES, "gram")
WHAT = tuple(name for name in dict.fromkeys(WHAT) if name != _ALWAYS)
"""What can be collected, by name."""


GivenRouting = tuple[da.Array, da.Array | None]
"""Indices, and top-k weights if given."""


@dataclass(frozen=True)
class Wanted:
    """What to collect: as the arguments of `collect`."""

    what: tuple[str, ...]
    #: names of statistics
    rows: str | float = "routed"
    seed: int = 0
    with_output: bool = False


@dataclass(frozen=True)
class Collection:
    """Statistics of a layer, not computed yet.

    Attributes
    ----------
    groups : (G, size) lazy array of float64, one group of token chunks in each chunk
        Their joined partial results; rows that were stored need not be computed again;
        `finish_groups` joins them, and `name_all` makes the statistics.
    layout : of a row of `groups`
    chunks, group_chunks : token chunks in total, and per group
    grams : ``gram.input`` and ``gram.hidden``, if they are wanted: see `dask_ep.graph.gram`
    output : (..., d_out) lazy array, or None if it is not wanted
    missing : names of requested statistics that do not exist for these experts
    """

    groups: da.Array
    layout: PartialLayout
    chunks: int
    group_chunks: int
    grams: Mapping[str, da.Array]
    output: da.Array | None
    missing: tuple[str, ...]

    def arrays(self) -> dict[str, da.Array]:
        """The statistics by name, and the output as "output"."""
        output = {} if self.output is None else {"output": self.output}
        return finished(self.groups, self.layout, name_all) | dict(self.grams) | output

    def parts(self) -> list[da.Array]:
        """The arrays to compute: groups, grams and output."""
        return [self.groups, *self.grams.values(), *([] if self.output is None else [self.output])]

    def chunks_of(self, group: int) -> range:
        """Numbers of the chunks of a group."""
        first = group * self.group_chunks
        return range(first, min(first + self.group_chunks, self.chunks))

    @property
    def nbytes(self) -> int:
        """Bytes of all statistics."""
        return sum(int(array.nbytes) for name, array in self.arrays().items() if name != "output")


def collect(
    hidden: da.Array,
    layer: MoELayer | Experts | Any,
    *,
    what: Iterable[str],
    routing: da.Array | GivenRouting | None = None,
    token_ids: da.Array | None = None,
    rows: str | float = "routed",
    seed: int = 0,
    with_output: bool = False,
    world_size: int | None = None,
    placement: Asked = None,
) -> dict[str, da.Array]:
    """Collect statistics of each expert over the rows that are routed to it.

    Parameters
    ----------
    hidden : (n, d), or (..., d) with more axes; Dask array of floats on the host
    layer : MoELayer, or Experts (in any form that `expert_parallel` takes) with a `routing`
    what : names, see below; one name means all of its arrays
    routing : (..., k) expert indices, or (indices, topk_weights), optional
        Without it a layer's own router decides.
    token_ids : as in `MoELayer`
    rows : "routed", "all", or a share such as 0.1
        "all" sends every row through every expert; a share sends that part of the rows that are
        not routed to an expert through it too. Then `amax`, `sumsq` and `mean_output` are over
        all these rows; the other statistics are over the router's choices, and the output does
        not change.
    seed : of the choice of that share, which depends on nothing else
    with_output : also return the layer's output, as "output", from the same pass
    world_size, placement : as in `expert_parallel`

    Returns
    -------
    dict of lazy Dask arrays by name. Compute them together, with `dask.compute`, so that the rows
    go through the experts once.

        router        router.probability (E,) mean; router.entropy, router.z_loss and
                      router.margin, means; router.entropy_histogram (64,) int64 and
                      router.entropy_edges (65,), and so on; router.rows. Needs a layer
        usage         usage.rows (E,) int64, usage.weight (E,) sum of top-k weights,
                      usage.slots (E, k) int64 rows that chose the expert in each slot
        coactivation  coactivation (E, E) int64, rows that chose both; the diagonal, one
        amax          amax.input (E, d), amax.hidden (E, f), amax.output (E, d_out): largest
                      absolute value of each channel
        sumsq         sumsq.input, sumsq.hidden, sumsq.output: sum of squares, likewise
        mean_output   mean_output.sum, mean_output.mean (E, d_out) of the experts' output rows
        gram          gram.input (E, d, d), gram.hidden (E, f, f): the sum of the products of a row
                      with itself, one expert in each chunk
        reap          reap.score (E,) mean of weight * norm of the output row, reap.norm (E,) mean
                      norm, reap.rows (E,) int64

    Always: coverage.rows (E,) int64, the number of rows in an expert's other statistics.

    Raises
    ------
    ValueError
        For an unknown name, or a statistic that does not exist for these experts; and as
        `expert_parallel`.
    TypeError
        If the rows are on a GPU.

    Notes
    -----
    Hidden activations are what the last matrix of an expert multiplies; linear experts and
    callables have none, and no array of them. An expert's input is the row as its first matrices
    read it: times the top-k weight if a layer applies that to the input. Outputs are taken before
    the top-k weight is applied. A slot counts as a row: a row that names an expert twice counts
    twice, except in `coactivation`.

    If `gram` of all experts does not fit into memory, compute some at a time, such as
    ``found["gram.input"][:8]``: each time only the rows of these experts are gathered, and sent
    through them if they have hidden activations.

    The router's probabilities are its scores divided by their sum, entropy is in nats, the z-loss
    of a row is the square of the logarithm of the sum of the exponentials of its logits (Zoph et
    al., "ST-MoE", 2022), and its margin is the k-th largest score, as it chooses, minus the next.

    Values are computed as by `expert_parallel`, and added in float64, those of `gram` in the
    computing dtype; an expert without rows has zeros. Partial results come with each chunk, and are
    joined once, in the order of the chunks: the same chunks and placement give the same bits on
    every scheduler, after any failure. REAP: Lasby et al., "REAP the Experts" (2025), equation 9.

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
    names = (what,) if isinstance(what, str) else tuple(what)
    collection = begin_collection(
        hidden, layer, Wanted(names, rows, seed, with_output), routing=routing,
        token_ids=token_ids, world_size=world_size, placement=placement,
    )  # fmt: skip
    return collection.arrays()


def begin_collection(
    hidden: da.Array,
    layer: MoELayer | Experts | Any,
    wanted: Wanted,
    *,
    routing: da.Array | GivenRouting | None = None,
    token_ids: da.Array | None = None,
    world_size: int | None = None,
    placement: Asked = None,
    block: range | None = None,
    picked_together: int = PICKED_TOGETHER,
) -> Collection:
    """As `collect`, which returns the `arrays` of this result.

    With a `block` of experts only these are observed, if not all fit into memory; statistics of
    the routing come with the first block. `gram` is always of all, one by one; `picked_together` is
    as for `dask_ep.graph.gram.grams`.
    """
    _check_host(hidden)
    experts = layer.experts if isinstance(layer, MoELayer) else as_experts(layer)
    chosen, others = choose_statistics(wanted.what, experts), share_of_others(wanted.rows)
    weights: da.Array | None
    if isinstance(layer, MoELayer):
        check_layer(layer)
        both = _with_weights(routing)
        hidden, routed, indices, weights = layer.routed_rows(hidden, token_ids, both)
        entered = layer.enter(routed)
    else:
        entered, indices, weights = _given_rows(hidden, routing)
    ready = prepare(entered, indices, experts, weights, world_size, placement)
    entering = ready.tokens  # of the layer, if its experts read other rows
    if isinstance(layer, MoELayer) and layer.around.before:
        entering = routed
    pieces, y = [], None
    if block is None or block.start == 0:
        pieces = _see_choices(ready, entering, layer, chosen)
    whole = range(experts.num_experts)
    of_block = _of_block(ready, block or whole, others, wanted.seed)
    if chosen.of_tiles:
        k = slots_of(ready.routing) if others else None
        output = wanted.with_output and not others
        seen, y = see_experts(of_block, chosen.of_tiles, output=output, k=k)
        pieces.append(seen)
    elif chosen.of_gram:
        pieces.append(see_routing(of_block, [_ALWAYS]))
    found: Mapping[str, da.Array] = {}
    if chosen.of_gram:
        found = grams(
            _of_block(ready, whole, others, wanted.seed), hidden=experts.hidden is not None,
            picked_together=picked_together,
        )  # fmt: skip
    if wanted.with_output:
        y = build_chunks(ready) if y is None else y
        y = layer.add_the_rest(entering, y) if isinstance(layer, MoELayer) else y
        y = unflatten(y, hidden)
    chunk_bytes = ready.tokens.nbytes / max(ready.tokens.numblocks[0], 1)
    return Collection(*join_groups(pieces, chunk_bytes), found, y, chosen.missing)


class Chosen(NamedTuple):
    """What to collect, by where it is computed."""

    of_routing: list[str]
    of_router: bool
    of_tiles: list[str]
    of_gram: bool
    missing: tuple[str, ...]
    #: statistics of tiles that do not exist for these experts


def choose_statistics(asked: Sequence[str], experts: Experts | CallableExperts) -> Chosen:
    """Sort the requested statistics by what they are of."""
    for name in asked:
        if name not in WHAT:
            raise ValueError(f"what must be some of {', '.join(WHAT)}, but has {name!r}")
    if not asked:
        raise ValueError(f"what must name something to collect: {', '.join(WHAT)}")
    of_tiles = [name for name in TILE_STATISTICS if name.partition(".")[0] in asked]
    missing: list[str] = []
    if experts.hidden is None:
        missing = [name for name in of_tiles if TILE_STATISTICS[name].of == "hidden"]
        missing += ["gram.hidden"] if "gram" in asked else []
    of_tiles = [name for name in of_tiles if name not in missing]
    of_routing = [name for name in ROUTING_STATISTICS if name in asked]
    return Chosen(
        of_routing,
        "router" in asked,
        [_ALWAYS, *of_tiles] if of_tiles else [],
        "gram" in asked,
        tuple(missing),
    )


def share_of_others(rows: str | float) -> float:
    """Read `rows`: the share of rows that go through experts to which they are not routed."""
    if rows in ("routed", "all"):
        return float(rows == "all")
    if isinstance(rows, bool) or not isinstance(rows, Real) or not 0 < rows <= 1:
        raise ValueError(f"rows must be 'routed', 'all' or a share in (0, 1], but is {rows!r}")
    return float(rows)


def name_all(totals: Numbers) -> Numbers:
    """Make all statistics from joined partial results."""
    found = name_statistics(totals)
    if "router.probability" in found:
        for what in ("entropy", "z_loss", "margin"):
            found[f"router.{what}_edges"] = edges(what, len(found["router.probability"]))
    return found


def _see_choices(
    ready: Ready, rows: da.Array, layer: MoELayer | Any, chosen: Chosen
) -> list[Partials]:
    """Statistics of the routing, which need no expert."""
    pieces = [see_routing(ready, chosen.of_routing)] if chosen.of_routing else []
    if chosen.of_router and not isinstance(layer, MoELayer):
        raise ValueError("statistics of the router need a layer, but there are only experts")
    if chosen.of_router:
        pieces.append(see_router(rows, layer.router, layer.arrays))
    return pieces


def _of_block(ready: Ready, block: range, others: float, seed: int) -> Ready:
    """The same rows for a block of experts, with a share `others` of those not routed there."""
    E = ready.experts.num_experts
    routing = choose_slots(ready.routing, E, block, others, seed)
    weights = with_weights_of_others(ready.topk_weights, len(block) if others else 0)
    if block == range(E):
        return ready._replace(routing=routing, topk_weights=weights)
    experts = ready.experts.subset(block)
    return prepare(ready.tokens, routing, experts, weights, ready.world_size, None)


def _with_weights(
    routing: da.Array | GivenRouting | None,
) -> tuple[da.Array, da.Array] | None:
    """A routing as a layer takes it."""
    if routing is None:
        return None
    indices, weights = (routing, None) if isinstance(routing, da.Array) else routing
    if weights is None:
        raise TypeError("routing of a layer must be both (indices, topk_weights)")
    return indices, weights


def _given_rows(
    hidden: da.Array, routing: da.Array | GivenRouting | None
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


def check_layer(layer: MoELayer) -> None:
    """Raise a ValueError unless statistics are collected for this layer."""
    if layer.around.beyond is not None:
        raise ValueError(
            f"statistics are not collected for a layer whose router has {layer.around.beyond} "
            f"experts in addition to the {layer.experts.num_experts} that rows are sent to"
        )


def _check_host(hidden: da.Array) -> None:
    if not isinstance(hidden, da.Array):
        raise TypeError(
            f"hidden must be a Dask array, but is a {kind_of(hidden)}; use da.from_array or "
            "dask_ep.open_tokens"
        )
    if namespace(hidden._meta) is not np:
        raise TypeError(
            "statistics are collected on the host, but the rows are on a GPU: give NumPy chunks"
        )
