"""Is an output what its inputs say, row by row?

A sample of the rows is computed again from the inputs in float64, by the plain loops of
`reference`, and compared with the output file:

    both ends of every block │ a row of every expert │ rows at random
                             v
          tokens, routing, weights, output: only these rows are read, and one expert at a time

Each value is judged by what its own terms add up to (see `rounding`), never by other rows.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import dask
import dask.array as da
import ml_dtypes
import numpy as np

from dask_ep.arrays.checks import computing_dtype
from dask_ep.arrays.html import shows
from dask_ep.experts.experts import Experts
from dask_ep.jobs.build import Inputs, open_inputs
from dask_ep.jobs.job import Job, as_job
from dask_ep.jobs.sample import block_starts, read_rows, sample_rows
from dask_ep.kernel import reference
from dask_ep.kernel.rounding import QUIET, Arithmetic, Scaled, exact_rows
from dask_ep.layers.around import RowStep
from dask_ep.layers.layer import MoELayer
from dask_ep.storage import journal
from dask_ep.storage.output import progress_directory
from dask_ep.storage.sources import Source, ZarrSource, open_source

TOLERANCES = {"float64": 1e-12, "float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}
"""Largest error of a value over what its terms add up to, by the output's dtype: sums of thousands
of products in float32 (float64) differ in their last few digits; the others are rounded once more
at the end, to 2**-11 and 2**-8 of their value, and on a device between steps too."""

SUMS = {"float64": 2e-13, "float32": 2e-6}
"""What long sums lose, as a part of the sum of the absolute values of their terms, by the computing
dtype: up to 3e-6 of it was seen with 16 384 terms of one sign followed by as many of the other."""

TF32_TOLERANCE = 5e-3
"""The same where float32 was multiplied as TF32, whose numbers are rounded to 2**-11 before."""

ROUNDED_TOLERANCE = 2e-2
"""The same where float32 was multiplied as bfloat16, rounded to 2**-9 before."""


class RowError(NamedTuple):
    """A row that is wrong, or the least right."""

    row: int
    block: int
    #: of the output, -1 if its blocks are not known
    error: float
    #: largest absolute difference in the row
    relative: float
    #: largest error of one of its values over what the value's terms add up to
    experts: tuple[int, ...]


@dataclass(frozen=True)
class Verification:
    """What a comparison found."""

    rows: int
    #: compared
    rows_in_all: int
    values: int
    #: in these
    not_finite: int
    #: of the values, those that are not finite in the output or as recomputed
    not_finite_rows: tuple[int, ...]
    #: that hold them, ascending
    overflowed: int
    #: of these values, those that are finite as recomputed, but not in the output, because numbers
    #: on the way are too large for the dtype in which the output was computed
    experts_seen: int
    num_experts: int
    largest_error: float
    #: absolute
    relative_error: float
    #: largest error of a value over what its terms add up to
    tolerance: float
    #: of the relative error
    worst: tuple[RowError, ...]
    #: rows beyond the tolerance, the worst first; if there is none, the worst row

    @property
    def good(self) -> bool:
        """Whether no row is beyond the tolerance, and some values are numbers."""
        compared = self.not_finite < self.values or not self.values
        return compared and self.relative_error <= self.tolerance

    _repr_html_ = shows(
        "good", "rows", "rows_in_all", "experts_seen", "relative_error", "tolerance"
    )


def verify_job(
    job: Job | str | os.PathLike, *, rows: int = 1000, seed: int = 0, tolerance: float | None = None
) -> Verification:
    """Compare a sample of an output's rows with the same computed from the inputs.

    Parameters
    ----------
    job : a `Job` whose output is complete, or the path of its job file
    rows : how many to compare, about; all if there are fewer
    seed : of the choice of rows
    tolerance : of the error of a value over what its terms add up to; by default by dtype, see
        `TOLERANCES`, and `TF32_TOLERANCE` or `ROUNDED_TOLERANCE` for a run that was asked for it

    Raises
    ------
    FileNotFoundError
        If there is no output, or it is not complete.
    ValueError
        If the output's shape is not that of the job, or it holds no floats; if `tolerance` is no
        finite number of at least 0.

    Notes
    -----
    Cost: rows * k experts on single rows, in float64, and four times that in products of all rows
    of an expert; and the routing is read until every expert was met. Memory: the sample, and one
    expert in float64, its largest matrix twice. A checkpoint's layer routes the sample by its own
    router, whose choice for a row does not depend on other rows; experts are those of `reference`.
    A value that is infinite or NaN must be so in the same way on both sides, unless numbers on the
    way to it overflow the dtype in which it was computed.
    """
    if tolerance is not None and not 0 <= tolerance < np.inf:
        raise ValueError(f"tolerance must be a finite number of at least 0; got {tolerance}")
    job = as_job(job)
    output = open_output(job.out)
    inputs = open_inputs(job)
    n = inputs.tokens.shape[0]
    if output.shape != (n, inputs.d_out):
        raise ValueError(
            f"the output {job.out} must be ({n}, {inputs.d_out}) for {job.name}, but has "
            f"shape {output.shape}; run the job again"
        )
    if output.dtype.name not in TOLERANCES:
        raise ValueError(
            f"the output {job.out} must be of {', '.join(TOLERANCES)}, but is of {output.dtype}; "
            "run the job again"
        )
    starts = block_starts(job.out, output)
    sample = sample_rows(inputs, starts, rows, seed)
    arithmetic = _arithmetic(job, inputs, output, tolerance)
    routing, expected = _recompute(inputs, sample, arithmetic)
    got = read_rows(output, sample)
    found = _compare(got, expected, arithmetic)
    not_finite = ~(np.isfinite(found.got) & np.isfinite(expected.value))
    return Verification(
        rows=len(sample),
        rows_in_all=n,
        values=expected.value.size,
        not_finite=int(not_finite.sum()),
        not_finite_rows=tuple(sample[not_finite.any(axis=1)].tolist()),
        overflowed=int(found.overflowed.sum()),
        experts_seen=int((np.unique(routing) >= 0).sum()),
        num_experts=inputs.experts.num_experts,
        largest_error=float(found.errors.max(initial=0.0)),
        relative_error=float(found.relative.max(initial=0.0)),
        tolerance=arithmetic.tolerance,
        worst=_worst(sample, found, routing, starts, arithmetic.tolerance),
    )


def _arithmetic(job: Job, inputs: Inputs, output: Source, tolerance: float | None) -> Arithmetic:
    """How the output was computed, as far as the record of its run tells."""
    manifest = journal.read_manifest(progress_directory(job.out)) or {"settings": {}}
    computed_by = manifest["settings"].get("computed_by", {})
    usual = TOLERANCES[output.dtype.name]
    if output.dtype == np.float32 and computed_by.get("tf32", False):
        usual = TF32_TOLERANCE
    elif computed_by.get("rounded_by") is not None:
        usual = max(usual, ROUNDED_TOLERANCE)
    on_device = computed_by.get("arrays", "numpy") != "numpy"
    sums = computing_dtype(inputs.tokens.dtype)
    between = np.float16 if on_device and inputs.tokens.dtype == np.float16 else sums
    tolerance = usual if tolerance is None else tolerance
    return Arithmetic(tolerance, SUMS[sums.name] / usual, np.dtype(between))


def open_output(path: str) -> Source:
    """Open an output that is complete.

    Raises
    ------
    FileNotFoundError
        If there is none, or only a part of one: it says how much.
    """
    manifest = journal.read_manifest(progress_directory(path))
    there = os.path.exists(path)
    if not there and manifest is None:
        raise FileNotFoundError(errno.ENOENT, "no output yet; run the job", path)
    if manifest is not None and manifest["complete"] and not there:
        raise FileNotFoundError(
            errno.ENOENT,
            "the output is missing, though it was complete; run again with --resume",
            path,
        )
    if manifest is not None and not manifest["complete"]:
        done = len(journal.read_done(progress_directory(path), manifest["run"]))
        raise FileNotFoundError(
            errno.ENOENT,
            f"the output is incomplete: {done} of {len(manifest['rows'])} blocks are done; "
            "run the job with --resume",
            path,
        )
    source = open_source(path)
    if isinstance(source, ZarrSource) and (missing := source.find_missing()):
        raise FileNotFoundError(
            errno.ENOENT,
            f"{len(missing)} chunks of the output are missing, the first is {missing[0]}; run the "
            "job with --resume",
            path,
        )
    return source


# --- computing them again --------------------------------------------------------------------


def _recompute(
    inputs: Inputs, sample: np.ndarray, arithmetic: Arithmetic
) -> tuple[np.ndarray, Scaled]:
    """Return the routing (m, k) of the sample's rows, and their output (m, d_out) in float64."""
    tokens = read_rows(inputs.tokens, sample)
    if inputs.layer is not None:
        return _recompute_layer(inputs, tokens, arithmetic)
    assert inputs.routing is not None
    routing = read_rows(inputs.routing, sample)
    routing = routing[:, None] if routing.ndim == 1 else routing
    weights = None
    if inputs.topk_weights is not None:
        weights = read_rows(inputs.topk_weights, sample).reshape(routing.shape)
    return routing, _apply_experts(inputs.experts, tokens, routing, weights, arithmetic)


@QUIET
def _recompute_layer(
    inputs: Inputs, tokens: np.ndarray, arithmetic: Arithmetic
) -> tuple[np.ndarray, Scaled]:
    """As `_recompute`, of a layer, which routes the rows itself."""
    layer, E = inputs.layer, inputs.experts.num_experts
    assert layer is not None
    routed = layer.route(da.from_array(tokens, chunks=-1))
    routing, weights = dask.compute(*routed, scheduler="sync")
    sent = np.where(routing < E, routing, -1)
    rows = _through_steps(layer.around.before, exact_rows(tokens), arithmetic)
    y = _apply_experts(inputs.experts, rows, sent, weights, arithmetic)
    y = _through_steps(layer.around.between, y, arithmetic)
    return sent, _with_the_rest(layer, tokens, y, np.maximum(routing - E, -1), weights, arithmetic)


def _through_steps(steps: Sequence[RowStep], x: Scaled, arithmetic: Arithmetic) -> Scaled:
    """Do the steps of a layer around its experts with rows."""
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
    """Sum what each expert gives, one expert in memory at a time, as the only one of its rank."""
    given = rows_in if isinstance(rows_in, Scaled) else exact_rows(rows_in)
    tokens = given.value
    y, scale = np.zeros((2, len(tokens), experts.d_out))
    peak = np.zeros(len(tokens))
    on_input = experts.options.get("apply_router_weight_on_input", False)
    weighed = np.ones(routing.shape) if weights is None else weights.astype(np.float64)
    for e in np.unique(routing[routing >= 0]).tolist():
        rows = np.flatnonzero((routing == e).any(axis=1))
        kind, arrays, options = _plain_parts(experts, e)
        y[rows] += reference.expert_parallel_dispatch(
            tokens[rows],
            routing[rows],
            [_plain(kind, arrays, options)],
            e,
            experts.num_experts,
            None if weights is None else weights[rows],
            d_out=experts.d_out,
            apply_router_weight_on_input=on_input,
        )
        for slot in range(routing.shape[1]):
            rows = np.flatnonzero(routing[:, slot] == e)
            weight = np.abs(weighed[rows, slot, None])
            by, w = (weight, 1.0) if on_input else (1.0, weight)
            x = Scaled(given.value[rows] * by, given.scale[rows] * by, given.peak[rows])
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
    """Add what experts give that are not sent to, and the rows themselves if the layer does."""
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


def plain_expert(experts: Experts, e: int) -> Callable[[np.ndarray], np.ndarray]:
    """Make the function of one row, in float64, that expert `e` is."""
    return _plain(*_plain_parts(experts, e))


def _plain(
    kind: str, arrays: dict[str, np.ndarray], options: dict[str, Any]
) -> Callable[[np.ndarray], np.ndarray]:
    return getattr(reference, kind)(**arrays, **options)


def _plain_parts(experts: Experts, e: int) -> tuple[str, dict[str, np.ndarray], dict[str, Any]]:
    """Read expert `e` as `reference` takes it: the kind, matrices (in, out) and its options."""
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
    """Return gate and up, each by itself, of what holds both in its columns."""
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


# --- comparing -------------------------------------------------------------------------------


class _Compared(NamedTuple):
    """Output and expectation of the sample, value by value."""

    got: np.ndarray
    #: (m, d_out) in float64
    errors: np.ndarray
    #: (m, d_out), absolute; infinite where only one of the two is finite
    relative: np.ndarray
    #: (m, d_out), over what the terms add up to
    overflowed: np.ndarray
    #: (m, d_out) bool, see `Verification`


@QUIET
def _compare(rows: np.ndarray, expected: Scaled, arithmetic: Arithmetic) -> _Compared:
    info = ml_dtypes.finfo(rows.dtype)
    got, want = rows.astype(np.float64), expected.value
    errors = np.abs(got - want)
    same = (got == want) | (np.isnan(got) & np.isnan(want))
    # Near the largest number of the dtype and beyond it, infinity may be right.
    reach = np.abs(want) + arithmetic.tolerance * expected.scale >= float(info.max)
    same |= reach & np.isinf(got) & (np.sign(got) == np.sign(want))
    overflowed = arithmetic.overflows(expected.peak)[:, None] & np.isfinite(want)
    overflowed &= ~np.isfinite(got) & ~same
    errors[same | overflowed] = 0.0
    errors[np.isnan(errors)] = np.inf
    beyond = np.maximum(errors - float(info.smallest_subnormal), 0.0)
    relative = np.where(beyond > 0, beyond / (expected.scale + arithmetic.least), 0.0)
    return _Compared(got, errors, relative, overflowed)


def _worst(
    sample: np.ndarray,
    found: _Compared,
    routing: np.ndarray,
    starts: np.ndarray,
    tolerance: float,
) -> tuple[RowError, ...]:
    errors, relative = (a.max(axis=1, initial=0.0) for a in (found.errors, found.relative))
    order = np.argsort(-relative, kind="stable")
    beyond = order[relative[order] > tolerance]
    return tuple(
        RowError(
            row=int(sample[i]),
            block=int(np.searchsorted(starts, sample[i], side="right")) - 1,
            error=float(errors[i]),
            relative=float(relative[i]),
            experts=tuple(routing[i].tolist()),
        )
        for i in (beyond if len(beyond) else order[:1])
    )
