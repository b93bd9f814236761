"""Is an output what its inputs say, row by row?

A sample of the rows is computed again from the inputs in float64, by the plain loops of
`reference`, and compared with what lies in the output file:

    both ends of every block │ a row of every expert │ rows at random
                             v
          tokens, routing, weights, output: only these rows are read, and one expert at a time
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import dask
import dask.array as da
import numpy as np

from dask_ep import journal, reference
from dask_ep.build import Inputs, open_inputs
from dask_ep.experts import Experts
from dask_ep.job import Job
from dask_ep.layer import MoELayer
from dask_ep.output import progress_directory
from dask_ep.sources import Source, ZarrSource, open_source

TOLERANCES = {"float64": 1e-12, "float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}
"""Largest error over largest value, by the output's dtype: sums of thousands of products in
float32 (float64) differ in their last few digits; the others are rounded once more at the end, to
2**-11 and 2**-8 of their value."""

TF32_TOLERANCE = 5e-3
"""The same where float32 was multiplied as TF32, whose numbers are rounded to 2**-11 before."""

_ROUTING_BLOCK = 1 << 16  # rows of the routing looked at together


class RowError(NamedTuple):
    """A row that is wrong, or the least right."""

    row: int
    block: int
    #: of the output, -1 if its blocks are not known
    error: float
    #: largest absolute difference in the row
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
    experts_seen: int
    num_experts: int
    largest_error: float
    #: absolute
    largest_value: float
    #: of the recomputed rows, absolute
    tolerance: float
    #: of error over value
    worst: tuple[RowError, ...]
    #: rows beyond the tolerance, the worst first; if there is none, the worst row

    @property
    def relative_error(self) -> float:
        """The largest error over the largest value."""
        if self.largest_error == 0:
            return 0.0
        return self.largest_error / self.largest_value if self.largest_value else float("inf")

    @property
    def good(self) -> bool:
        """Whether no row is beyond the tolerance, and not all values are no numbers."""
        compared = self.not_finite < self.values or not self.values
        return compared and self.relative_error <= self.tolerance


def verify_job(
    job: Job, *, rows: int = 1000, seed: int = 0, tolerance: float | None = None
) -> Verification:
    """Compare a sample of an output's rows with the same computed from the inputs.

    Parameters
    ----------
    job : whose output is complete
    rows : how many to compare, about; all if there are fewer
    seed : of the choice of rows
    tolerance : of the largest error over the largest value; by default by dtype, see `TOLERANCES`,
        and `TF32_TOLERANCE` for a run that was asked for it

    Raises
    ------
    FileNotFoundError
        If there is no output, or it is not complete.
    ValueError
        If the output's shape is not that of the job, or it holds no floats; if `tolerance` is no
        finite number of at least 0.

    Notes
    -----
    Cost: rows * k experts on single rows, in float64; and the routing is read until every expert
    was met. Memory: the sample, and one expert in float64. A checkpoint's layer routes the sample
    by its own router, whose choice for a row does not depend on other rows; experts are those of
    `reference`.
    """
    if tolerance is not None and not 0 <= tolerance < np.inf:
        raise ValueError(f"tolerance must be a finite number of at least 0; got {tolerance}")
    output = open_output(job.out)
    inputs = open_inputs(job)
    n = inputs.tokens.shape[0]
    if output.shape != (n, inputs.experts.d_out):
        raise ValueError(
            f"the output {job.out} must be ({n}, {inputs.experts.d_out}) to be that of {job.name}, "
            f"but has shape {output.shape}; run the job again"
        )
    if output.dtype.name not in TOLERANCES:
        raise ValueError(
            f"the output {job.out} must be of {', '.join(TOLERANCES)}, but is of {output.dtype}; "
            "run the job again"
        )
    starts = _block_starts(job.out, output)
    sample = choose_rows(inputs, starts, rows, seed)
    routing, expected = _recompute(inputs, sample)
    got = read_rows(output, sample).astype(np.float64)
    errors = _errors(got, expected)
    if tolerance is None:
        tolerance = TOLERANCES[output.dtype.name]
        if output.dtype == np.float32 and _was_tf32(job.out):
            tolerance = TF32_TOLERANCE
    largest = float(np.abs(expected[np.isfinite(expected)]).max(initial=0.0))
    return Verification(
        rows=len(sample),
        rows_in_all=n,
        values=expected.size,
        not_finite=int((~np.isfinite(got) | ~np.isfinite(expected)).sum()),
        experts_seen=int((np.unique(routing) >= 0).sum()),
        num_experts=inputs.experts.num_experts,
        largest_error=float(errors.max(initial=0.0)),
        largest_value=largest,
        tolerance=tolerance,
        worst=_worst(sample, errors, routing, starts, tolerance * largest),
    )


def _was_tf32(path: str) -> bool:
    """Whether the run that wrote an output says that it multiplied float32 as TF32."""
    manifest = journal.read_manifest(progress_directory(path)) or {"settings": {}}
    return manifest["settings"].get("computed_by", {}).get("tf32", False)


def open_output(path: str) -> Source:
    """Open an output that is complete.

    Raises
    ------
    FileNotFoundError
        If there is none, or only a part of one: it says how much.
    """
    manifest = journal.read_manifest(progress_directory(path))
    if not os.path.exists(path):
        if manifest is None:
            raise FileNotFoundError(errno.ENOENT, "there is no output yet; run the job", path)
        if manifest["complete"]:
            raise FileNotFoundError(
                errno.ENOENT,
                "the output is gone, though it was complete; run again with --resume",
                path,
            )
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
            f"{len(missing)} chunks of the output are missing, {missing[0]} the first; "
            "run the job with --overwrite",
            path,
        )
    return source


# --- which rows ------------------------------------------------------------------------------


def choose_rows(inputs: Inputs, starts: np.ndarray, rows: int, seed: int) -> np.ndarray:
    """Choose about `rows` rows: at block ends, of every expert, and at random.

    Parameters
    ----------
    inputs : of the job
    starts : (blocks + 1,) the first row of each block, and n
    rows, seed : see `verify_job`

    Returns
    -------
    (m,) int64, ascending, without repeats
    """
    n = inputs.tokens.shape[0]
    if rows >= n:
        return np.arange(n)
    random = np.random.default_rng(seed)
    ends = np.concatenate([starts[:-1], starts[1:] - 1])
    if len(ends) > rows // 2:
        ends = random.choice(ends, rows // 2, replace=False)
    of_experts = np.empty(0, np.int64)
    if inputs.routing is not None:
        of_experts = find_rows_of_experts(inputs.routing, inputs.experts.num_experts)
    special = np.union1d(ends, of_experts)
    more = max(0, rows - len(special))
    return np.union1d(special, random.choice(n, more, replace=False)).astype(np.int64)


def find_rows_of_experts(routing: Source, num_experts: int) -> np.ndarray:
    """Find one row of each expert that has any; reads no further than it has to.

    Examples
    --------
    >>> routing = open_source(np.array([[0, 0], [2, 0], [2, -1], [1, 2]]))
    >>> find_rows_of_experts(routing, 4).tolist()
    [0, 3, 1]
    """
    found = np.full(num_experts, -1, np.int64)
    k = int(np.prod(routing.shape[1:]))
    for start in range(0, routing.shape[0], _ROUTING_BLOCK):
        block = routing.read(start, min(start + _ROUTING_BLOCK, routing.shape[0]))
        experts, at = np.unique(block, return_index=True)
        good = (experts >= 0) & (experts < num_experts)
        experts, at = experts[good], at[good]
        is_new = found[experts] < 0
        found[experts[is_new]] = start + at[is_new] // k
        if (found >= 0).all():
            break
    return found[found >= 0]


def read_rows(source: Source, rows: np.ndarray) -> np.ndarray:
    """Read single rows, ascending, one read for each run of neighbours or stored chunk.

    Examples
    --------
    >>> read_rows(open_source(np.arange(10) ** 2), np.array([2, 3, 7])).tolist()
    [4, 9, 49]
    """
    plain = not isinstance(source, ZarrSource) or source.files is not None
    together = rows - np.arange(len(rows)) if plain else rows // source.chunk_rows
    bounds = [0, *(np.flatnonzero(np.diff(together)) + 1), len(rows)]
    parts = [
        source.read(int(rows[first]), int(rows[last - 1]) + 1)[rows[first:last] - rows[first]]
        for first, last in pairwise(bounds)
        if last > first
    ]
    return np.concatenate(parts) if parts else source.read(0, 0)


def _block_starts(path: str, output: Source) -> np.ndarray:
    """First row of each block of the output, and the number of rows."""
    manifest = journal.read_manifest(progress_directory(path))
    n = output.shape[0]
    if manifest is not None and sum(manifest["rows"]) == n:
        return np.concatenate([[0], np.cumsum(manifest["rows"])]).astype(np.int64)
    return np.append(np.arange(0, n, output.chunk_rows or max(1, n)), n).astype(np.int64)


# --- computing them again --------------------------------------------------------------------


def _recompute(inputs: Inputs, sample: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Give the routing (m, k) of the sample's rows, and their output (m, d_out) in float64."""
    tokens = read_rows(inputs.tokens, sample)
    if inputs.layer is not None:
        both = inputs.layer.route(da.from_array(tokens, chunks=-1))
        routing, weights = dask.compute(*both, scheduler="sync")
        y = _apply_experts(inputs.experts, tokens, routing, weights)
        return routing, y + _apply_shared(inputs.layer, tokens)
    routing = read_rows(inputs.routing, sample)
    routing = routing[:, None] if routing.ndim == 1 else routing
    weights = None
    if inputs.topk_weights is not None:
        weights = read_rows(inputs.topk_weights, sample).reshape(routing.shape)
    return routing, _apply_experts(inputs.experts, tokens, routing, weights)


def _apply_experts(
    experts: Experts, tokens: np.ndarray, routing: np.ndarray, weights: np.ndarray | None
) -> np.ndarray:
    """Sum what each expert gives, one expert in memory at a time, as the only one of its rank."""
    y = np.zeros((len(tokens), experts.d_out))
    weigh = experts.options.get("weigh", "output")
    for e in np.unique(routing[routing >= 0]).tolist():
        rows = np.flatnonzero((routing == e).any(axis=1))
        y[rows] += reference.expert_parallel_dispatch(
            tokens[rows],
            routing[rows],
            [plain_expert(experts, e)],
            e,
            experts.num_experts,
            None if weights is None else weights[rows],
            d_out=experts.d_out,
            weigh=weigh,
        )
    return y


def _apply_shared(layer: MoELayer, tokens: np.ndarray) -> np.ndarray:
    """Sum what the experts give that all rows share, and the rows themselves if the layer does."""
    y = np.zeros((len(tokens), layer.experts.d_out))
    if layer.shared is not None:
        everyone = np.arange(layer.shared.num_experts)[None].repeat(len(tokens), axis=0)
        y += _apply_experts(layer.shared, tokens, everyone, None)
    if "shared_gate" in layer.arrays:
        gate = layer.arrays["shared_gate"].read().astype(np.float64)
        logits = tokens.astype(np.float64) @ gate.ravel()
        y *= 0.5 * (1 + np.tanh(0.5 * logits[:, None]))
    return y + tokens if layer.residual else y


def plain_expert(experts: Experts, e: int) -> Callable[[np.ndarray], np.ndarray]:
    """Make the function of one row, in float64, that expert `e` is."""
    options = dict(experts.options)
    transposed = options.pop("transposed")
    arrays = {
        name: weight.read(np.dtype(np.float64))[0]
        for name, weight in experts.subset([e]).weights.items()
    }
    arrays = {n: a.T if transposed and a.ndim == 2 else a for n, a in arrays.items()}
    options.pop("weigh", None)
    if experts.kind == "gated_fused":
        arrays = dict(_split_fused(arrays, interleaved=options.pop("interleaved")))
    kind = {"linear": reference.linear, "mlp": reference.mlp}.get(experts.kind, reference.gated)
    return kind(**{{"w": "W"}.get(name, name): a for name, a in arrays.items()}, **options)


def _split_fused(
    arrays: dict[str, np.ndarray], *, interleaved: bool
) -> Iterator[tuple[str, np.ndarray]]:
    """Give gate and up, each by itself, of what holds both in its columns."""
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


def _errors(got: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Largest absolute difference of each row; infinite where only one of the two is finite."""
    with np.errstate(invalid="ignore", over="ignore"):
        errors = np.abs(got - expected)
    same = (got == expected) | (np.isnan(got) & np.isnan(expected))
    errors[same] = 0.0
    errors[np.isnan(errors)] = np.inf
    return errors.max(axis=1, initial=0.0)


def _worst(
    sample: np.ndarray, errors: np.ndarray, routing: np.ndarray, starts: np.ndarray, limit: float
) -> tuple[RowError, ...]:
    order = np.argsort(-errors, kind="stable")
    beyond = order[errors[order] > limit]
    return tuple(
        RowError(
            row=int(sample[i]),
            block=int(np.searchsorted(starts, sample[i], side="right")) - 1,
            error=float(errors[i]),
            experts=tuple(routing[i].tolist()),
        )
        for i in (beyond if len(beyond) else order[:1])
    )
