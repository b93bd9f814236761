"""Does an output follow from its inputs, row by row?

A sample of the rows (`verify_sample`) is computed again from the inputs in float64, in plain loops
and one expert at a time (`recompute`), and compared with the output file. The error of each value
is judged relative to the sum of its own terms' sizes (see `rounding`), independently of other rows.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from typing import NamedTuple

import ml_dtypes
import numpy as np

from dask_ep.arrays.checks import computing_dtype
from dask_ep.arrays.html import shows
from dask_ep.jobs.build import Inputs, open_inputs
from dask_ep.jobs.job import Job, as_job
from dask_ep.jobs.recompute import recompute
from dask_ep.jobs.verify_sample import block_starts, read_rows, sample_rows
from dask_ep.kernel.rounding import QUIET, Arithmetic, Scaled
from dask_ep.storage import journal
from dask_ep.storage.files import exists
from dask_ep.storage.output import progress_directory
from dask_ep.storage.sources import Source, ZarrSource, open_source

TOLERANCES = {"float64": 1e-12, "float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}
"""Largest allowed error of a value relative to its terms, by the output's dtype: sums of thousands
of products in float32 (float64) differ in their last few digits; other dtypes are rounded once more
at the end, to 2**-11 and 2**-8 of their value."""

SUMS = {"float64": 2e-13, "float32": 2e-6}
"""Error of long sums relative to the sum of their terms' absolute values, by the computing dtype:
up to 3e-6 was seen with 16 384 terms of one sign followed by as many of the other."""

TF32_TOLERANCE = 5e-3
"""The tolerance if float32 was multiplied as TF32, which rounds factors to 2**-11."""

ROUNDED_TOLERANCE = 2e-2
"""The tolerance if float32 was multiplied as bfloat16, which rounds factors to 2**-9."""


class RowError(NamedTuple):
    """A row with its largest errors."""

    row: int
    block: int
    #: block of the output; -1 if its blocks are not known
    error: float
    #: largest absolute difference in the row
    relative: float
    #: largest error of one of its values relative to the value's terms
    experts: tuple[int, ...]


@dataclass(frozen=True)
class Verification:
    """The result of a verification."""

    rows: int
    #: number of rows compared
    rows_in_all: int
    values: int
    #: number of values in these rows
    not_finite: int
    #: number of values that are not finite, in the output or as recomputed
    not_finite_rows: tuple[int, ...]
    #: rows with such values, ascending
    overflowed: int
    #: number of such values that are finite as recomputed, but not in the output, because
    #: intermediate values are too large for the dtype in which the output was computed
    experts_seen: int
    num_experts: int
    largest_error: float
    #: absolute
    relative_error: float
    #: largest error of a value relative to its terms
    tolerance: float
    #: maximum of the relative error
    worst: tuple[RowError, ...]
    #: rows beyond the tolerance, the worst first; if there are none, the worst row

    @property
    def good(self) -> bool:
        """Whether no row is beyond the tolerance, and some values could be compared."""
        compared = self.not_finite < self.values or not self.values
        return compared and self.relative_error <= self.tolerance

    _repr_html_ = shows(
        "good", "rows", "rows_in_all", "experts_seen", "relative_error", "tolerance"
    )


def verify_job(
    job: Job | str | os.PathLike, *, rows: int = 1000, seed: int = 0, tolerance: float | None = None
) -> Verification:
    """Compare a sample of an output's rows with the same rows computed from the inputs.

    Parameters
    ----------
    job : a `Job` whose output is complete, or the path of its job file
    rows : approximate number of rows to compare; all if there are fewer
    seed : seed of the choice of rows
    tolerance : maximum error of a value relative to its terms; by default it depends on the dtype,
        see `TOLERANCES`, and on the run's precision: `TF32_TOLERANCE`, `ROUNDED_TOLERANCE`

    Raises
    ------
    FileNotFoundError
        If there is no output, or it is incomplete.
    ValueError
        If the output's shape is not that of the job, or it does not hold floats; if `tolerance` is
        not a finite number of at least 0.

    Notes
    -----
    Cost: rows * k experts on single rows, in float64, and four times that in products of all rows
    of an expert; and the routing is read until every expert has been found. Memory: the sample, and
    one expert in float64, with its largest matrix twice. If the job has no routing, the layer's own
    router routes the sample, as its choice for a row does not depend on other rows. Experts are
    those of `reference`.
    A value that is infinite or NaN must be the same on both sides, unless intermediate values
    overflow the dtype in which the output was computed.
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
            f"the output {job.out} must have dtype {', '.join(TOLERANCES)}, but has "
            f"{output.dtype}; run the job again"
        )
    starts = block_starts(job.out, output)
    sample = sample_rows(inputs, starts, rows, seed)
    arithmetic = _arithmetic(job, inputs, output, tolerance)
    routing, expected = recompute(inputs, sample, arithmetic)
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
    """Return how the output was computed, as far as its record has that."""
    manifest = journal.read_manifest(progress_directory(job.out)) or {"settings": {}}
    computed_by = manifest["settings"].get("computed_by", {})
    if not isinstance(computed_by, dict):
        raise ValueError(
            f"{progress_directory(job.out)}/manifest.json must say what computed the output, but "
            f"its computed_by is {computed_by!r}; run the job again with --overwrite"
        )
    usual = TOLERANCES[output.dtype.name]
    if output.dtype == np.float32 and computed_by.get("tf32", False):
        usual = TF32_TOLERANCE
    is_rounded = computed_by.get("rounded_by") is not None
    if is_rounded:
        usual = max(usual, ROUNDED_TOLERANCE)
    on_device = computed_by.get("arrays", "numpy") != "numpy"
    sums = computing_dtype(inputs.tokens.dtype)
    to_float16 = is_rounded and on_device and inputs.tokens.dtype == np.float16
    between = np.float16 if to_float16 else sums
    tolerance = usual if tolerance is None else tolerance
    return Arithmetic(tolerance, SUMS[sums.name] / usual, np.dtype(between))


def open_output(path: str) -> Source:
    """Open a complete output, or another array file.

    Raises
    ------
    FileNotFoundError
        If there is none, or it is incomplete; the message says how much is done.
    """
    file = path.partition("::")[0]
    there, directory = exists(file), progress_directory(file)
    manifest = journal.read_manifest(directory)
    if not there and manifest is None:
        raise FileNotFoundError(errno.ENOENT, "no output yet; run the job", path)
    if manifest is not None and manifest["complete"] and not there:
        raise FileNotFoundError(
            errno.ENOENT,
            "the output is missing, although it was complete; run the job again with --resume",
            path,
        )
    if manifest is not None and not manifest["complete"]:
        done = len(journal.read_done(directory, manifest["run"]))
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


# --- comparing -------------------------------------------------------------------------------


class _Compared(NamedTuple):
    """Output and expectation of the sample, value by value."""

    got: np.ndarray
    #: (m, d_out) in float64
    errors: np.ndarray
    #: (m, d_out), absolute; infinite where only one of the two is finite
    relative: np.ndarray
    #: (m, d_out), relative to the terms
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
