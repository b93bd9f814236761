"""How far may rounding move a value of the output from the exact one?

A value is a sum of terms, and is much smaller than they are if they cancel: rounding errors are
relative to the terms. So each step returns its exact values and their *scale*:

    x [m, d] ── products, activations ──> value [m, d_out]   in float64
                                          scale [m, d_out]   what the value's terms add up to

and a correct value, computed with a relative error of `tolerance` in each step, is within about
`tolerance` times its scale. The errors of terms are independent, so they add up as the root of the
sum of their squares; in a long sum errors also accumulate, by a small part, `sums`, of the sum of
the terms' absolute values (Higham, "Accuracy and Stability of Numerical Algorithms", 2002, sections
3.1 and 4.2).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from dask_ep.kernel import reference

QUIET = np.errstate(all="ignore")
"""Rows may hold any values; an overflow here shows in the result."""


class Scaled(NamedTuple):
    """Values and their scales."""

    value: np.ndarray
    #: (m, width) float64
    scale: np.ndarray
    #: (m, width) float64; 0 where a value is infinite or NaN
    peak: np.ndarray
    #: (m,) upper bound of the finite intermediate values of a row


@dataclass(frozen=True)
class Arithmetic:
    """How the values to check were computed.

    Attributes
    ----------
    tolerance : relative error of a step
    sums : part of the sum of the terms' absolute values that is added to a scale
    dtype : in which hidden values are held
    """

    tolerance: float
    sums: float
    dtype: np.dtype

    @property
    def least(self) -> float:
        """A scale that covers what underflows, such as silu far below zero."""
        return 1024 * float(np.finfo(self.dtype).tiny) / self.step

    @property
    def step(self) -> float:
        """How far a function's argument is moved, in scales, to see the effect of its error."""
        return max(self.tolerance, 1e-12)

    def expert(
        self, kind: str, arrays: Mapping[str, np.ndarray], options: Mapping[str, Any], x: Scaled
    ) -> Scaled:
        """Send rows through one expert; arrays and options are those of `reference`."""
        if kind == "linear":
            return self.product(x, arrays["W"], arrays.get("bias"))
        up = self.product(x, arrays["up"], arrays.get("up_bias"))
        act = ACTIVATIONS[options.get("activation", "silu")]
        if kind == "mlp":
            hidden = self.through(lambda u: act(u, 1.0), up)
        else:
            limit = options.get("limit")
            limit = np.inf if limit is None else limit
            gate = self.product(x, arrays["gate"], arrays.get("gate_bias"))
            alpha, offset = options.get("alpha", 1.0), options.get("up_offset", 0.0)
            first, last = (np.inf, limit) if options.get("clamp_after") else (limit, np.inf)
            caps = options.get("soft_caps")

            def through_gate(g: np.ndarray) -> np.ndarray:
                g = np.minimum(g, first)
                g = act(g, alpha) if caps is None else reference.capped_silu(g, alpha, caps[0])
                return np.minimum(g, last)

            def through_up(u: np.ndarray) -> np.ndarray:
                u = np.clip(u, -limit, limit)
                return (u if caps is None else reference.soft_cap(u, caps[1])) + offset

            hidden = self.times(self.through(through_gate, gate), self.through(through_up, up))
        y = self.product(hidden, arrays["down"], arrays.get("down_bias"))
        if (scale := arrays.get("output_scale")) is not None:
            y = self.times(y, exact_rows(scale[None]))
        eps = options.get("output_norm_eps")
        return y if eps is None else self.rms_norm(y, np.ones(1), eps)

    @QUIET
    def product(self, x: Scaled, w: np.ndarray, bias: np.ndarray | None = None) -> Scaled:
        """``x @ w + bias``."""
        w, b = w.astype(np.float64, copy=False), 0.0 if bias is None else bias
        value, magnitude = x.value @ w + b, np.abs(x.value) @ np.abs(w) + np.abs(b)
        squares = _squares(w, 0)
        size = np.hypot(_root(x.value, squares), b)
        scale = np.maximum(size, np.abs(value)) + self.sums * magnitude
        if x.scale.any():
            scale += _root(x.scale, squares)
        return _known(value, scale, x.peak, magnitude)

    @QUIET
    def through(self, function: Callable[[np.ndarray], np.ndarray], x: Scaled) -> Scaled:
        """Apply a function to each value."""
        value, moved = function(x.value), self.step * x.scale
        change = np.maximum(
            np.abs(function(x.value + moved) - value), np.abs(function(x.value - moved) - value)
        )
        scale = change / self.step + np.abs(value) + self.least
        return _known(value, scale, x.peak, np.abs(value))

    @QUIET
    def times(self, a: Scaled, b: Scaled) -> Scaled:
        """``a * b``."""
        value = a.value * b.value
        scale = np.abs(value) + a.scale * np.abs(b.value) + np.abs(a.value) * b.scale
        return _known(value, scale, np.maximum(a.peak, b.peak), np.abs(value))

    @QUIET
    def rms_norm(self, x: Scaled, weight: np.ndarray, eps: float) -> Scaled:
        """``weight * x / sqrt(mean(x**2) + eps)``."""
        root = np.sqrt(np.square(x.value).mean(axis=1, keepdims=True) + eps)
        value, carried = x.value * weight / root, np.abs(weight) / root * x.scale
        # An error common to all values of a row moves the root, and so each of them.
        moved = np.sqrt(np.square(x.scale).mean(axis=1, keepdims=True)) / root
        return _known(value, carried + np.abs(value) * (1 + moved), x.peak, np.abs(value))

    def overflows(self, peak: np.ndarray) -> np.ndarray:
        """Whether an intermediate value of a row may overflow the computing dtype: (m,)."""
        return peak > 0.5 * float(np.finfo(self.dtype).max)


@QUIET
def exact_rows(rows: np.ndarray) -> Scaled:
    """Input rows, without an error."""
    rows = rows.astype(np.float64)
    return _known(rows, np.zeros_like(rows), np.zeros(len(rows)), np.abs(rows))


def _squares(x: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the squares of x over its largest number along an axis, and these numbers.

    Squares of small numbers, such as 1e-200, would be zeros, and those of 1e200 infinite.
    """
    largest = np.abs(x).max(axis=axis, keepdims=True, initial=0.0)
    largest = np.where((largest > 0) & np.isfinite(largest), largest, 1.0)
    ratio = x / largest
    return np.square(ratio, out=ratio), largest


def _root(x: np.ndarray, squares: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """``sqrt(x**2 @ w**2)``, from the `_squares` of w."""
    mine, largest = _squares(x, 1)
    return np.sqrt(mine @ squares[0]) * largest * squares[1]


def _known(value: np.ndarray, scale: np.ndarray, peak: np.ndarray, magnitude: np.ndarray) -> Scaled:
    """Set the scale of infinity and NaN to 0: they are compared as such."""
    finite = np.isfinite(value)
    largest = np.where(np.isfinite(magnitude), magnitude, 0.0).max(axis=1, initial=0.0)
    return Scaled(value, np.where(finite, scale, 0.0), np.maximum(peak, largest))


def _gelu(x: np.ndarray, _: float) -> np.ndarray:
    from scipy.special import erfc  # slow to import; the one of `reference` takes one number

    return x * 0.5 * erfc(x * -(0.5**0.5))


ACTIVATIONS = {**reference.ACTIVATIONS, "gelu": _gelu}
