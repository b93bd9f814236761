"""How are scores computed from logits, and which are the largest?

Axis letters: `n` rows, `E` experts, `k` slots per row, `G` groups of neighbours. Functions take the
array namespace first, and are float32 throughout. Callers silence NumPy's warnings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from dask_ep.arrays.namespaces import Array

SMALLEST = float(np.finfo(np.float32).min)
"""Score of an expert that must not be chosen before all others are."""


def largest(xp: Any, choice: Array, k: int) -> Array:
    """The k largest of each row, largest first, lowest index among equals; overwrites `choice`.

    Notes
    -----
    One pass per slot: argmax returns the first of equals, and a chosen score becomes -inf, below
    all others.
    """
    xp.maximum(choice, xp.float32(SMALLEST), out=choice)
    rows = xp.arange(len(choice))
    indices = xp.empty((len(choice), k), dtype=xp.int32)
    for slot in range(k):
        best = choice.argmax(axis=1)
        indices[:, slot] = best
        choice[rows, best] = -xp.inf
    return indices


def softmax(xp: Any, logits: Array) -> Array:
    logits -= logits.max(axis=1, keepdims=True)
    xp.exp(logits, out=logits)
    logits /= logits.sum(axis=1, keepdims=True)
    return logits


def sigmoid(xp: Any, logits: Array) -> Array:
    xp.negative(logits, out=logits)
    xp.exp(logits, out=logits)
    logits += xp.float32(1)
    return xp.reciprocal(logits, out=logits)


def sqrtsoftplus(xp: Any, logits: Array) -> Array:
    xp.logaddexp(logits, xp.float32(0), out=logits)
    return xp.sqrt(logits, out=logits)


def two_largest(xp: Any, grouped: Array) -> Array:
    return xp.partition(grouped, -2, axis=2)[:, :, -2:].sum(axis=2)


SCORES: dict[str, Callable[[Any, Array], Array]] = {
    "softmax": softmax,
    "sigmoid": sigmoid,
    "sqrtsoftplus": sqrtsoftplus,
}
"""Scores of all experts, [n, E] from [n, E], in place."""

CHOSEN_SCORES: dict[str, Callable[[Any, Array], Array]] = {
    "softmax_chosen": softmax,
    "sigmoid_chosen": sigmoid,
}
"""Scores of the chosen experts only, [n, k] from [n, k]."""

GROUP_SCORES: dict[str, Callable[[Any, Array], Array]] = {
    "max": lambda xp, grouped: grouped.max(axis=2),
    "top2": two_largest,
}
"""Scores of groups, [n, G] from [n, G, E / G]."""
