"""Comparisons that the tests share."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from dask_ep.kernel import reference
from tests.strategies import Case


def assert_close(got: np.ndarray, want: np.ndarray, tolerance: float) -> None:
    """Assert shape, and that the largest error is within `tolerance` of the largest value."""
    assert got.shape == want.shape
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    scale = max(np.abs(want).max(initial=0.0), 1.0)
    error = np.abs(got - want).max(initial=0.0) / scale
    assert error <= tolerance, f"error {error:.3g} is beyond {tolerance:.3g}"


def assert_close_before_rounding(got: np.ndarray, want: np.ndarray, tolerance: float) -> None:
    """Assert that bfloat16 was rounded from numbers within `tolerance` of the largest value."""
    assert got.dtype == ml_dtypes.bfloat16
    half_a_unit = np.ldexp(0.5, np.frexp(got.astype(np.float64))[1] - 8)
    error = np.maximum(np.abs(got - want) - half_a_unit, 0).max() / np.abs(want).max()
    assert error <= tolerance, f"error {error:.3g} is beyond {tolerance:.3g}"


def whole_layer(case: Case) -> np.ndarray:
    """What the layer of linear experts gives, in plain loops."""
    rows = [reference.linear(W.astype(np.float64)) for W in case.W]
    return reference.moe(case.tokens, case.routing, rows, case.topk_weights, d_out=case.W.shape[2])
