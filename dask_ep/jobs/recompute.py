"""What does a job compute for some rows, in float64 and in plain loops?

    rows of the sample ── the layer's own router ──> steps before ──> one expert after the other
                                                                                │
         value, and what its terms add up to  <── shared experts, steps after ──┘

Experts are those of `reference`. Each value comes with the scale of its allowed error (see
`rounding`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import dask
import dask.array as da
import numpy as np

from dask_ep.experts.experts import Experts
from dask_ep.jobs.build import Inputs
from dask_ep.jobs.verify_sample import read_rows
from dask_ep.kernel import reference
from dask_ep.kernel.rounding import QUIET, Arithmetic, Scaled, exact_rows
from dask_ep.layers.layer import MoELayer
from dask_ep.layers.row_steps import RowStep


def recompute(
    inputs: Inputs, sample: np.ndarray, arithmetic: Arithmetic
) -> tuple[np.ndarray, Scaled]:
    """Return the routing (m, k) of the sample's rows, and their output (m, d_out) in float64."""
    tokens, routing, weights = read_rows(inputs.tokens, sample), None, None
    if inputs.routing is not None:
        routing = read_rows(inputs.routing, sample)
        routing = routing[:, None] if routing.ndim == 1 else routing
    if inputs.topk_weights is not None and routing is not None:
        weights = read_rows(inputs.topk_weights, sample).reshape(routing.shape)
    if inputs.layer is not None:
        if routing is None or weights is None:
            routing, weights = _route(inputs, tokens, sample)
        return _recompute_layer(inputs, tokens, routing, weights, arithmetic)
    assert routing is not None  # a job has either a layer or a routing
    return routing, _apply_experts(inputs.experts, tokens, routing, weights, arithmetic)


def _route(inputs: Inputs, tokens: np.ndarray, sample: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Let the layer's router route the sample's rows."""
    assert inputs.layer is not None
    ids = None
    if inputs.token_ids is not None:
        ids = da.from_array(read_rows(inputs.token_ids, sample), chunks=-1)
    routed = inputs.layer.route(da.from_array(tokens, chunks=-1), token_ids=ids)
    return dask.compute(*routed, scheduler="sync")


@QUIET
def _recompute_layer(
    inputs: Inputs,
    tokens: np.ndarray,
    routing: np.ndarray,
    weights: np.ndarray,
    arithmetic: Arithmetic,
) -> tuple[np.ndarray, Scaled]:
    """Like `recompute`, for a layer whose rows are routed."""
    layer, E = inputs.layer, inputs.experts.num_experts
    assert layer is not None
    sent = np.where(routing < E, routing, -1)
    rows = _through_steps(layer.around.before, exact_rows(tokens), arithmetic)
    y = _apply_experts(inputs.experts, rows, sent, weights, arithmetic)
    y = _through_steps(layer.around.between, y, arithmetic)
    return sent, _with_the_rest(layer, tokens, y, np.maximum(routing - E, -1), weights, arithmetic)


def _through_steps(steps: Sequence[RowStep], x: Scaled, arithmetic: Arithmetic) -> Scaled:
    """Apply the steps before or after a layer's experts to rows."""
    array: Any
    for step in steps:
        array, bias = (None if a is None else a.read() for a in (step.array, step.bias))
        if step.kind == "linear":
            x = arithmetic.product(x, array.T, bias)
        elif step.kind == "rms_norm":
            x = arithmetic.rms_norm(x, step.offset + array.astype(np.float64), step.eps)
        else:
            by: Any = (np.multiply, step.factor) if step.kind == "scale" else (np.add, array)
            x = arithmetic.through(partial(*by), x)
    return x


@QUIET
def _apply_experts(
    experts: Experts,
    rows_in: np.ndarray | Scaled,
    routing: np.ndarray,
    weights: np.ndarray | None,
    arithmetic: Arithmetic,
) -> Scaled:
    """Sum the experts' outputs, one expert in memory at a time, as the only one of its rank."""
    given = rows_in if isinstance(rows_in, Scaled) else exact_rows(rows_in)
    tokens = given.value
    y, scale = np.zeros((2, len(tokens), experts.d_out))
    peak = np.zeros(len(tokens))
    on_input = experts.options.get("apply_router_weight_on_input", False)
    weighed = np.ones(routing.shape) if weights is None else weights.astype(np.float64)
    for e in np.unique(routing[routing >= 0]).tolist():
        rows = np.flatnonzero((routing == e).any(axis=1))
        kind, arrays, options = plain_parts(experts, e)
        y[rows] += reference.expert_parallel_dispatch(
            tokens[rows],
            routing[rows],
            [plain(kind, arrays, options)],
            e,
            experts.num_experts,
            None if weights is None else weights[rows],
            d_out=experts.d_out,
            apply_router_weight_on_input=on_input,
        )
        for slot in range(routing.shape[1]):
            rows = np.flatnonzero(routing[:, slot] == e)
            weight = weighed[rows, slot, None]
            by, w = (weight, 1.0) if on_input else (1.0, np.abs(weight))
            x = Scaled(given.value[rows] * by, given.scale[rows] * np.abs(by), given.peak[rows])
            found = arithmetic.expert(kind, arrays, options, x)
            scale[rows] += w * found.scale
            peak[rows] = np.maximum.reduce(
                [peak[rows], found.peak, (w * np.abs(found.value)).max(axis=1, initial=0.0)]
            )
    return Scaled(y, scale, peak)


@QUIET
def _with_the_rest(
    layer: MoELayer,
    tokens: np.ndarray,
    y: Scaled,
    beyond: np.ndarray,
    weights: np.ndarray,
    arithmetic: Arithmetic,
) -> Scaled:
    """Add identity and shared experts, and the rows themselves if the layer has a residual."""
    more = [y]
    if layer.around.beyond == "identity":
        of_row = np.where(beyond >= 0, weights, 0.0).sum(axis=1, keepdims=True)
        more.append(arithmetic.through(lambda v: v * of_row, exact_rows(tokens)))
    if layer.around.beyond == "shared":
        more.append(_apply_experts(layer.shared, tokens, beyond, weights, arithmetic))
    elif layer.shared is not None:
        everyone = np.arange(layer.shared.num_experts)[None].repeat(len(tokens), axis=0)
        shared = _apply_experts(layer.shared, tokens, everyone, None, arithmetic)
        if "shared_gate" in layer.arrays:
            column = layer.arrays["shared_gate"].read().reshape(-1, 1)
            logits = arithmetic.product(exact_rows(tokens), column)
            gate = arithmetic.through(lambda v: 0.5 * (1 + np.tanh(0.5 * v)), logits)
            shared = arithmetic.times(shared, gate)
        more.append(shared)
    total = _through_steps(layer.around.after, _summed(more), arithmetic)
    rows = exact_rows(tokens)
    rows = rows._replace(scale=np.abs(rows.value))
    return _summed([total, rows]) if layer.residual else total


def _summed(parts: Sequence[Scaled]) -> Scaled:
    value, scale = (np.sum([part[i] for part in parts], axis=0) for i in (0, 1))
    return Scaled(value, scale, np.max([part.peak for part in parts], axis=0))


def plain(
    kind: str, arrays: dict[str, np.ndarray], options: dict[str, Any]
) -> Callable[[np.ndarray], np.ndarray]:
    """Return the expert that some `plain_parts` define, as a function of one row in float64."""
    return getattr(reference, kind)(**arrays, **options)


def plain_parts(experts: Experts, e: int) -> tuple[str, dict[str, np.ndarray], dict[str, Any]]:
    """Read expert `e` in the form of `reference`: the kind, matrices (in, out) and options."""
    options = dict(experts.options)
    transposed = options.pop("transposed")
    arrays: dict[str, Any] = {
        name: weight.read(np.dtype(np.float64))[0]
        for name, weight in experts.subset([e]).weights.items()
    }
    arrays = {n: a.T if transposed and a.ndim == 2 else a for n, a in arrays.items()}
    for other in ("apply_router_weight_on_input", "precision"):
        options.pop(other, None)
    kind = experts.kind
    if kind == "gated_fused":
        kind = "gated"
        arrays = dict(_split_fused(arrays, interleaved=options.pop("interleaved")))
    return kind, {{"w": "W"}.get(name, name): a for name, a in arrays.items()}, options


def _split_fused(
    arrays: dict[str, np.ndarray], *, interleaved: bool
) -> Iterator[tuple[str, np.ndarray]]:
    """Split an array whose columns are those of gate and up into the two."""
    for name, array in arrays.items():
        if not name.startswith("gate_up"):
            yield name, array
            continue
        f = array.shape[-1] // 2
        suffix = name.removeprefix("gate_up")
        gate = array[..., 0::2] if interleaved else array[..., :f]
        up = array[..., 1::2] if interleaved else array[..., f:]
        yield f"gate{suffix}", np.ascontiguousarray(gate)
        yield f"up{suffix}", np.ascontiguousarray(up)
