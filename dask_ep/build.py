"""What does a job give, as a lazy array?

    job ── open ──> Inputs: tokens, and routing and experts, or a layer      no data is read
    Inputs ── build ──> Built: the output (n, d_out), and what it depends on

What the output depends on goes into its record (`dask_ep.storage`), so that a stopped run is only
resumed with the same inputs, ranks and placement.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import dask.array as da

from dask_ep.checkpoint import load_moe_layer, moe_layers
from dask_ep.costs import packet_row_bytes
from dask_ep.errors import JobError
from dask_ep.experts import Experts
from dask_ep.job import EXPERT_KEYS, PLACEMENTS, Job, nearest
from dask_ep.layer import MoELayer
from dask_ep.pipeline import expert_parallel
from dask_ep.placement import Placement, place
from dask_ep.placement_files import from_file
from dask_ep.sources import ReadError, Source, open_source, refuse_missing
from dask_ep.storage import open_tokens
from dask_ep.survey import survey
from dask_ep.travel import ALL_ROWS, Travel, choose_travel


@dataclass(frozen=True)
class Inputs:
    """The opened inputs of a job: shapes are known, data is not read."""

    job: Job
    tokens: Source
    routing: Source | None
    topk_weights: Source | None
    experts: Experts
    layer: MoELayer | None
    weights: Mapping[str, Source | list[Source]]
    #: of the experts, by their key; a list has one for each expert

    @property
    def row_bytes(self) -> int:
        """Bytes of a token row or of an output row, whichever is more, in the tokens' dtype."""
        return max(prod(self.tokens.shape[1:]), self.experts.d_out) * self.tokens.dtype.itemsize

    @property
    def read_bytes(self) -> int:
        """Bytes that a thread needs to read a chunk, beside its rows: a stored one is decoded
        whole, unless its rows are as they are in memory.
        """
        read = (self.tokens, self.routing, self.topk_weights)
        return max(source.read_bytes for source in read if source is not None)


@dataclass(frozen=True)
class Built:
    """The output of a job, and what it depends on."""

    y: da.Array
    #: (n, d_out), lazy
    inputs: Mapping[str, Any]
    #: by name, for `store`
    settings: Mapping[str, Any]
    #: JSON-able, for `store`
    placement: Placement | None
    #: of the experts; None for contiguous


def open_inputs(job: Job) -> Inputs:
    """Open what a job names, and check that it belongs together.

    Raises
    ------
    OSError
        If a file is not there or is damaged.
    ValueError, TypeError
        If shapes or dtypes do not fit; the message names the key of the job.
    """
    _check_placement(job)
    tokens = _open(job, "tokens", job.tokens)
    if tokens.ndim != 2:
        raise ValueError(
            f"{job.name}: tokens must be (n, d), but {tokens.name} has shape {tokens.shape}"
        )
    precision = job.precision or "float32"
    if job.layer is not None:
        layer = load_moe_layer(job.layer, job.layer_index).with_precision(precision)
        opened = Inputs(job, tokens, None, None, layer.experts, layer, {})
    else:
        routing = _open(job, "routing", job.routing)
        topk = None if job.topk_weights is None else _open(job, "topk_weights", job.topk_weights)
        weights = _open_weights(job)
        experts = _make_experts(job, weights).with_precision(precision)
        opened = Inputs(job, tokens, routing, topk, experts, None, weights)
        _check_rows(opened)
    if opened.experts.d != tokens.shape[1]:
        raise ValueError(
            f"{job.name}: the experts take rows of width {opened.experts.d}, but tokens "
            f"({tokens.name}) have width {tokens.shape[1]}; transposed = true in [experts] is for "
            "weights stored (E, out, in)"
        )
    return opened


def build(
    inputs: Inputs,
    *,
    world_size: int,
    chunk_rows: int | None = None,
    xp: str = "numpy",
    tf32: bool = False,
    multiplied_by: str | None = None,
    exchange: Callable[..., da.Array] | None = None,
    travel: Travel = ALL_ROWS,
    workers: int | None = None,
    slots_beside: int | None = None,
    begun: Placement | None = None,
) -> Built:
    """Build the output of a job.

    Parameters
    ----------
    inputs : of the job
    world_size : ranks
    chunk_rows : rows of a token chunk; None leaves it to `open_tokens`
    xp : whose arrays the chunks are while they are computed, "numpy" or "cupy"
    tf32 : whether experts multiply float32 as TF32
    multiplied_by : what multiplies on the host, see `dask_ep.bfloat16.multiplied_by`
    exchange : what sends rows through experts, with the first three arguments of `expert_parallel`
        and its `topk_weights`, instead of it; then ranks and placement say nothing
    travel : whether rows travel to experts, or experts to rows
    workers : processes that play the ranks; None means one for each
    slots_beside : how many experts a rank can hold beside its own; None means all
    begun : the placement of a run that is gone on with

    Notes
    -----
    Only a placement by load, and any travel but that of all rows, reads anything: the routing.
    """
    job, layer, placement = inputs.job, inputs.layer, None
    tokens = open_tokens(inputs.tokens, chunks=chunk_rows, name="tokens", xp=xp)

    def find_placement(routing: Any, topk: Any) -> Placement | None:
        if begun is not None and begun.local and begun.world_size == world_size:
            return begun  # as it was chosen then, whatever would be now
        if not travel.moves_experts or world_size == 1:
            return _find_placement(job, world_size, routing, inputs)
        weight_bytes = 0 if topk is None else topk.dtype.itemsize
        return _find_travel(
            inputs, world_size, routing(), weight_bytes, travel, workers, slots_beside
        )

    if layer is not None and exchange is not None:
        routing, topk = layer.route(tokens)
        routed = exchange(tokens, routing, layer.experts, topk_weights=topk)
        y = layer.add_the_rest(tokens, routed)
    elif layer is not None:
        routing, topk = layer.route(tokens)
        placement = find_placement(lambda: routing, topk)
        y = layer(tokens, world_size=world_size, placement=placement)
    else:
        routing = open_tokens(inputs.routing, name="routing", like=tokens, xp=xp)
        topk = inputs.topk_weights
        if exchange is None:
            placement = find_placement(lambda: routing, topk)
            exchange = partial(expert_parallel, world_size=world_size, placement=placement)
        topk_weights = None if topk is None else open_tokens(topk, like=tokens, xp=xp)
        y = exchange(tokens, routing, inputs.experts, topk_weights=topk_weights)
    settings = {
        "layer_index": job.layer_index,
        "world_size": world_size,
        "placement": None if placement is None else placement.to_json(),
        # Each rounds in another way: one output has one of them.
        "computed_by": {"arrays": xp, "tf32": tf32},
    }
    if inputs.experts.precision == "bfloat16":
        settings["computed_by"]["rounded_by"] = multiplied_by
    return Built(y, _name_inputs(inputs), settings, placement)


def _check_placement(job: Job) -> None:
    if job.placement not in (None, *PLACEMENTS) and not os.path.isfile(job.placement):
        name = os.path.basename(job.placement)
        raise JobError(
            f"{job.name}: placement must be one of {', '.join(PLACEMENTS)}, or the path of a file, "
            f"but there is no file {job.placement}{nearest(name, PLACEMENTS)}"
        )


def _open(job: Job, key: str, path: str) -> Source:
    try:
        source = open_source(path, missing=job.missing or "error")
        refuse_missing(source)
    except (ReadError, ImportError, TypeError, ValueError) as error:
        kinds = (ReadError, ImportError, TypeError, ValueError)
        kind = next(kind for kind in kinds if isinstance(error, kind))
        raise kind(f"{job.name}: {key}: {error}") from error
    return source


def _open_weights(job: Job) -> dict[str, Source | list[Source]]:
    weights = {}
    for key in [key for key in job.experts if key in WEIGHT_KEYS]:
        value, place = job.experts[key], f"experts.{key}"
        if isinstance(value, list):
            weights[key] = [_open(job, f"{place}[{e}]", one) for e, one in enumerate(value)]
        else:
            weights[key] = _open(job, place, value)
    return weights


def _name_inputs(inputs: Inputs) -> dict[str, Any]:
    """Give all that decides the values of the output, by the keys of the job."""
    named = {"tokens": inputs.tokens}
    if inputs.layer is not None:
        return named | {"layer": inputs.layer}
    named |= {"routing": inputs.routing, "experts": inputs.experts}
    return named if inputs.topk_weights is None else named | {"topk_weights": inputs.topk_weights}


WEIGHT_KEYS = frozenset(
    key for keys in EXPERT_KEYS.values() for key, kind in keys.items() if kind.is_weight
)
"""The keys of an [experts] table that name arrays."""


def _make_experts(job: Job, weights: Mapping[str, Source | list[Source]]) -> Experts:
    options = {key: value for key, value in job.experts.items() if key not in WEIGHT_KEYS}
    return getattr(Experts, options.pop("kind"))(**weights, **options)


def _check_rows(inputs: Inputs) -> None:
    n = inputs.tokens.shape[0]
    for key, source in (("routing", inputs.routing), ("topk_weights", inputs.topk_weights)):
        if source is not None and source.shape[:1] != (n,):
            raise ValueError(
                f"{inputs.job.name}: {key} must have a row for each of the {n} token rows, but "
                f"{source.name} has shape {source.shape}"
            )


def _find_placement(job: Job, world_size: int, routing: Any, inputs: Inputs) -> Placement | None:
    """Make the placement that the job names; one by load counts the routing first."""
    if job.placement is None or job.placement == "contiguous":
        return None
    if job.placement in PLACEMENTS:
        load = survey(routing(), inputs.experts.num_experts).by_ticket
        return place(job.placement, load, world_size)
    return read_placement(job.placement, job, world_size)


def read_placement(path: str, job: Job, world_size: int) -> Placement:
    """Read a placement file, which may be of many layers, for the layer of a job."""
    moe = None if job.layer is None else moe_layers(job.layer)
    return from_file(path, layer=job.layer_index, moe_layers=moe, world_size=world_size)


def _find_travel(
    inputs: Inputs,
    world_size: int,
    routing: da.Array,
    weight_bytes: int,
    travel: Travel,
    workers: int | None,
    slots_beside: int | None,
) -> Placement:
    """Read the routing, and add to the job's placement what is read where its rows lie."""
    job, experts = inputs.job, inputs.experts
    found = survey(routing, experts.num_experts)
    if job.placement is None or job.placement in PLACEMENTS:
        owners = place(job.placement or "contiguous", found.by_ticket, world_size)
    else:
        owners = read_placement(job.placement, job, world_size)
    itemsize = inputs.tokens.dtype.itemsize
    there = packet_row_bytes(
        experts.d, itemsize, found.slots_per_row, weight_bytes, owners.slots.size
    )
    return choose_travel(
        travel,
        found,
        owners,
        expert_bytes=experts.nbytes // experts.num_experts,
        row_bytes=there + experts.d_out * itemsize,
        workers=workers,
        max_slots=None if slots_beside is None else owners.slots_per_rank + slots_beside,
    )
