"""What is the output of a job, as a lazy array?

    job ── open ──> Inputs: tokens, and routing and experts, or a layer      no data is read
    Inputs ── build ──> Built: the output (n, d_out), and what it depends on

What the output depends on is recorded next to it (`dask_ep.storage.storage`), so that a stopped run
is resumed only with the same inputs, ranks and placement.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import dask.array as da
import numpy as np

from dask_ep.arrays.checks import is_float
from dask_ep.arrays.namespaces import namespace
from dask_ep.errors import JobError, ReadError
from dask_ep.experts.expert_kinds import EXPERT_KINDS
from dask_ep.experts.experts import Experts
from dask_ep.experts.stored_experts import held_as_stored
from dask_ep.graph.pipeline import expert_parallel
from dask_ep.jobs.job import Job, nearest
from dask_ep.laws.decision import Decision
from dask_ep.laws.work import Work
from dask_ep.layers.checkpoint import load_moe_layer, moe_layers
from dask_ep.layers.layer import MoELayer
from dask_ep.placement.placement import Placement
from dask_ep.placement.placement_files import resolve
from dask_ep.placement.policies import POLICIES
from dask_ep.placement.routing_stats import survey
from dask_ep.storage.files import exists
from dask_ep.storage.sources import Source, open_source, refuse_missing
from dask_ep.storage.storage import open_tokens


@dataclass(frozen=True)
class Inputs:
    """The opened inputs of a job: shapes are known, data is not read."""

    job: Job
    tokens: Source
    routing: Source | None
    topk_weights: Source | None
    token_ids: Source | None
    experts: Experts
    layer: MoELayer | None

    @property
    def d_out(self) -> int:
        """Width of an output row."""
        d_out = self.experts.d_out if self.layer is None else self.layer.d_out
        assert d_out is not None  # only callables have an unknown width
        return d_out

    @property
    def read_bytes(self) -> int:
        """Bytes that a thread needs to read a chunk in addition to its rows: unless stored chunks
        are plain rows, they are decoded as a whole.
        """
        read = (self.tokens, self.routing, self.topk_weights, self.token_ids)
        return max(source.read_bytes for source in read if source is not None)

    @property
    def slots_per_row(self) -> int:
        """Slots per row, k; E if experts choose their rows."""
        if self.routing is not None:
            return 1 if self.routing.ndim == 1 else self.routing.shape[1]
        assert self.layer is not None  # a job has either a routing or a layer
        return getattr(self.layer.router, "slots", self.experts.num_experts)

    @property
    def routes(self) -> bool:
        """Whether the layer's router makes the routing."""
        return self.routing is None

    def work(self, on_devices: bool = False) -> Work:
        """Describe the job by numbers."""
        topk = np.float32 if self.routes else getattr(self.topk_weights, "dtype", None)
        return Work.of(
            self.tokens,
            self.experts,
            self.layer,
            rows=self.tokens.shape[0],
            slots=self.slots_per_row,
            topk_dtype=topk,
            routes=self.routes,
            stored_rows=self.tokens.chunk_rows,
            read_bytes=self.read_bytes,
            on_devices=on_devices,
        )

    def held_as_stored(self) -> Inputs:
        """Return the same inputs, with experts that are held in memory as they are stored."""
        experts, layer = held_as_stored(self.experts), copy(self.layer)
        if layer is not None:
            layer.experts = experts
        return replace(self, experts=experts, layer=layer)


class ComputedBy(NamedTuple):
    """What computes an output; results are rounded differently if any of these differ."""

    arrays: str = "numpy"
    #: namespace of the chunks while they are computed, "numpy" or "cupy"
    tf32: bool = False
    #: whether experts multiply float32 as TF32
    library: str | None = None
    #: which library multiplies, and how: `kernel.bfloat16.multiplied_by`, or `multiplied_on_gpus`


BY_NUMPY = ComputedBy()


@dataclass(frozen=True)
class Built:
    """The output of a job, and what it depends on."""

    y: da.Array
    #: (n, d_out), lazy
    inputs: Mapping[str, Any]
    #: inputs by name, for `store`
    settings: Mapping[str, Any]
    #: serializable as JSON, for `store`
    placement: Placement | None
    #: of the experts; None for a contiguous one
    routing: tuple[da.Array, da.Array | None]
    #: indices (n,) or (n, k) and top-k weights (n, k), lazy


def open_inputs(job: Job) -> Inputs:
    """Open the files of a job, and check that they fit together.

    Raises
    ------
    OSError
        If a file is missing or damaged.
    ValueError, TypeError
        If shapes or dtypes do not fit; the message names the key of the job.
    """
    _check_placement(job)
    tokens = _open(job, "tokens", job.tokens)
    routing = None if job.routing is None else _open(job, "routing", job.routing)
    topk = None if job.topk_weights is None else _open(job, "topk_weights", job.topk_weights)
    ids = None if job.token_ids is None else _open(job, "token_ids", job.token_ids)
    _check_swapped(job, tokens, routing, topk)
    if tokens.ndim != 2:
        raise ValueError(
            f"{job.name}: tokens must be (n, d), but {tokens.name} has shape {tokens.shape}"
        )
    precision, layer = job.precision or "float32", None
    if job.layer is not None:
        assert job.layer_index is not None  # `load_job` has checked
        layer = load_moe_layer(job.layer, job.layer_index).with_precision(precision)
        assert isinstance(layer.experts, Experts)
        experts = layer.experts
    else:
        assert job.experts is not None  # a job has either a layer or experts
        weights = _open_weights(job, job.experts)
        options = {k: v for k, v in job.experts.items() if k not in WEIGHT_KEYS}
        experts = getattr(Experts, options.pop("kind"))(**weights, **options)
        experts = experts.with_precision(precision)
    opened = Inputs(job, tokens, routing, topk, ids, experts, layer)
    _check_token_ids(opened)
    _check_rows(opened)
    d = opened.experts.d if opened.layer is None else opened.layer.d
    if d != tokens.shape[1]:
        raise ValueError(
            f"{job.name}: the experts take rows of width {d}, but tokens "
            f"({tokens.name}) have width {tokens.shape[1]}; {_other_width(opened)}"
        )
    return opened


def build(
    inputs: Inputs,
    decision: Decision,
    by: ComputedBy = BY_NUMPY,
    *,
    exchange: Callable[..., da.Array] | None = None,
) -> Built:
    """Build the output of a job.

    Parameters
    ----------
    inputs : of the job
    decision : how it will run
    by : what computes it
    exchange : function that replaces `expert_parallel`, with its first three arguments and its
        `topk_weights`; ranks and placement then have no effect

    Notes
    -----
    No data is read, except the routing if the placement depends on the load, or if experts may
    travel.
    """
    inputs = inputs.held_as_stored() if decision.as_stored else inputs
    layer, placement, world_size = inputs.layer, None, decision.layout.world_size
    tokens, routing, topk = open_rows(inputs, decision.chunk_rows, by.arrays)
    if exchange is None:
        sent = routing if layer is None else layer.sent(routing)
        placement = decision.place(partial(survey, sent, inputs.experts.num_experts))
        exchange = partial(expert_parallel, world_size=world_size, placement=placement)
    if layer is None:
        y = exchange(tokens, routing, inputs.experts, topk_weights=topk)
    else:
        y = layer.through(tokens, routing, topk, exchange)
    settings = settings_of(inputs, world_size, placement, by)
    return Built(y, name_inputs(inputs), settings, placement, (routing, topk))


def settings_of(
    inputs: Inputs, world_size: int, placement: Placement | None, by: ComputedBy
) -> dict[str, Any]:
    """Return what an output depends on apart from its inputs; arguments are as in `build`."""
    computed_by: dict[str, Any] = {"arrays": by.arrays, "tf32": by.tf32}
    in_float64 = inputs.tokens.dtype == np.float64  # which nothing rounds
    if inputs.experts.precision == "bfloat16" and not in_float64:
        computed_by["rounded_by"] = by.library
    return {
        "layer_index": inputs.job.layer_index,
        "world_size": world_size,
        "placement": None if placement is None else placement.to_json(),
        "computed_by": computed_by,
    }


def open_rows(
    inputs: Inputs, chunk_rows: int, xp: str = "numpy"
) -> tuple[da.Array, da.Array, da.Array | None]:
    """Open tokens in chunks of `chunk_rows` rows, with routing and weights, or route them."""
    tokens = open_tokens(inputs.tokens, chunks=chunk_rows, name="tokens", xp=xp)
    if inputs.routing is None:
        return tokens, *routed_by_layer(inputs, tokens)
    routing = open_tokens(inputs.routing, name="routing", like=tokens, xp=xp)
    topk = inputs.topk_weights
    return tokens, routing, None if topk is None else open_tokens(topk, like=tokens, xp=xp)


def routed_by_layer(inputs: Inputs, tokens: da.Array) -> tuple[da.Array, da.Array]:
    """Return the indices and top-k weights that the layer's router gives the token rows."""
    assert inputs.layer is not None  # a job has either a routing or a layer
    ids = None
    if inputs.token_ids is not None:
        xp = namespace(tokens._meta).__name__
        ids = open_tokens(inputs.token_ids, name="token_ids", like=tokens, xp=xp)
    return inputs.layer.route(tokens, token_ids=ids)


def _check_placement(job: Job) -> None:
    if job.placement in (None, *POLICIES):
        return
    if not exists(job.placement) or os.path.isdir(job.placement):
        name = os.path.basename(job.placement)
        raise JobError(
            f"{job.name}: placement must be one of {', '.join(POLICIES)}, or the path of a file, "
            f"but there is no such file: {job.placement}{nearest(name, POLICIES)}"
        )


def _open(job: Job, key: str, path: str) -> Source:
    try:
        source = open_source(path, missing=job.missing or "error")
        refuse_missing(source)
    except (OSError, ImportError, TypeError, ValueError) as error:
        kinds = (ImportError, TypeError, ValueError)
        kind = next((kind for kind in kinds if isinstance(error, kind)), ReadError)
        why = str(error)
        if isinstance(error, OSError) and error.filename is not None:
            why = f"{error.filename}: {error.strerror}"
        raise kind(f"{job.name}: {key}: {why}") from error
    return source


def _check_swapped(job: Job, tokens: Source, routing: Source | None, topk: Source | None) -> None:
    """Raise if integers come where floats belong or the reverse, as when two paths are swapped."""
    if routing is None:
        return
    if tokens.dtype.kind in "iu" and is_float(routing.dtype):
        raise TypeError(
            f"{job.name}: tokens ({tokens.name}) hold {tokens.dtype} and routing ({routing.name}) "
            f"{routing.dtype}: the two seem to be swapped"
        )
    if topk is not None and is_float(routing.dtype) and topk.dtype.kind in "iu":
        raise TypeError(
            f"{job.name}: routing ({routing.name}) holds {routing.dtype} and topk_weights "
            f"({topk.name}) {topk.dtype}: the two seem to be swapped"
        )


def _other_width(inputs: Inputs) -> str:
    """Return what to suggest if tokens do not have the experts' width."""
    width, experts, job = inputs.tokens.shape[1], inputs.experts, inputs.job
    if inputs.layer is not None:
        return f"are these hidden states of the model in {job.layer}?"
    turned = experts.d_out if experts.kind == "linear" else experts.hidden
    if width == turned and not (job.experts or {}).get("transposed", False):
        return "if the weights are stored (E, out, in), set transposed = true in [experts]"
    return "are these the experts of this job?"


def _open_weights(job: Job, table: Mapping[str, Any]) -> dict[str, Source | list[Source]]:
    weights: dict[str, Source | list[Source]] = {}
    for key, value in table.items():
        if key not in WEIGHT_KEYS:
            continue
        place = f"experts.{key}"
        if isinstance(value, list):
            weights[key] = [_open(job, f"{place}[{e}]", one) for e, one in enumerate(value)]
        else:
            weights[key] = _open(job, place, value)
    return weights


def name_inputs(inputs: Inputs) -> dict[str, Any]:
    """Return everything that decides the values of the output, by key of the job."""
    named: dict[str, Any] = {"tokens": inputs.tokens}
    what = {"experts": inputs.experts} if inputs.layer is None else {"layer": inputs.layer}
    more = {
        "routing": inputs.routing,
        "topk_weights": inputs.topk_weights,
        "token_ids": inputs.token_ids,
    }
    return named | what | {key: source for key, source in more.items() if source is not None}


WEIGHT_KEYS = frozenset(name for kind in EXPERT_KINDS.values() for name in kind.weights)
"""The keys of an [experts] table that name arrays."""


def _check_token_ids(inputs: Inputs) -> None:
    """Raise unless token ids are given where experts are looked up by them, and only there."""
    job, ids = inputs.job, inputs.token_ids
    needed = inputs.layer is not None and inputs.routes and "table" in inputs.layer.arrays
    if needed and ids is None:
        raise JobError(
            f"{job.name}: layer {job.layer_index} of {job.layer} looks experts up by token: give "
            "token_ids, an (n,) array file with the id of each token row's token"
        )
    if ids is None:
        return
    if not needed:
        raise JobError(
            f"{job.name}: token_ids must be given only with a layer that looks experts up by "
            "token, and without a routing; this job has "
            + ("no such layer" if inputs.routes or inputs.layer is None else "a routing")
        )
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise JobError(
            f"{job.name}: token_ids must be (n,) integers, but {ids.name} has shape {ids.shape} "
            f"and dtype {ids.dtype}"
        )


def _check_rows(inputs: Inputs) -> None:
    n, routing, topk = inputs.tokens.shape[0], inputs.routing, inputs.topk_weights
    slots = {"routing": routing, "topk_weights": topk}
    for key, source in {**slots, "token_ids": inputs.token_ids}.items():
        if source is not None and source.shape[:1] != (n,):
            raise ValueError(
                f"{inputs.job.name}: {key} must have a row for each of the {n} token rows, but "
                f"{source.name} has shape {source.shape}"
            )
    for key, source in slots.items():
        if source is not None and inputs.layer is not None and source.ndim != 2:
            raise ValueError(
                f"{inputs.job.name}: {key} of a layer must be (n, k), but {source.name} has shape "
                f"{source.shape}"
            )
    if routing is not None and topk is not None and topk.shape != routing.shape:
        raise ValueError(
            f"{inputs.job.name}: topk_weights must have the shape of routing, one weight per slot, "
            f"but {topk.name} has shape {topk.shape} and {routing.name} {routing.shape}"
        )


def resolve_placement(job: Job, world_size: int) -> Placement | str | None:
    """Return the placement that a job names: a policy, or what the file has for the layer."""
    moe = None if job.layer is None else moe_layers(job.layer)
    return resolve(job.placement, world_size, layer=job.layer_index, moe_layers=moe)
