"""Which experts does a row choose, and with which weights?

Axis letters: `n` rows, `d` width, `E` experts, `k` slots per row, `G` groups of neighbours.

    hidden [n, d] ── @ weight.T (+ bias) ──> logits [n, E] ── score ──> scores [n, E]
                                                                          │
              indices [n, k] <── k largest <── groups <── + selection bias ┘
                 │
    topk_weights [n, k] = scores there, without the selection bias: normalised, times the scale

A router is data, a `Router`; its weights are arrays. Rows are routed independently here; for rules
that depend on a whole batch (capacity, expert choice) see `capacity.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from dask_ep.arrays import memory
from dask_ep.arrays.checks import BadRow, check_tokens, is_float, refuse_masked
from dask_ep.arrays.namespaces import Array, namespace, one_namespace, to_host
from dask_ep.layers.router import Router, check_choice
from dask_ep.layers.scores import CHOSEN_SCORES, GROUP_SCORES, SCORES, SMALLEST, largest

LOGIT_TILE_BYTES = 4 << 20
"""Bytes of hidden states, in float64, whose logits are computed together on the CPU: few enough to
stay in cache from one step to the next, and rows enough to be worth packing the weights."""


WITHOUT_WARNINGS = np.errstate(all="ignore")
"""Overflow and underflow give the intended limits; NaN is refused at the end."""


@WITHOUT_WARNINGS
def route(
    hidden: Array,
    router: Router,
    weight: Array,
    *,
    bias: Array | None = None,
    selection_bias: Array | None = None,
    per_expert_scale: Array | None = None,
) -> tuple[Array, Array]:
    """Choose k experts for each row, and their weights.

    Parameters
    ----------
    hidden : (n, d) array of floats, NumPy or CuPy
    router : Router
    weight : (E, d) array of floats
    bias : (E,) array of floats, optional
        Added to the logits.
    selection_bias : (E,) array of floats, optional
        Added to the scores to choose experts (and groups), but not part of any weight.
    per_expert_scale : (E,) array of floats, optional
        Multiplies each weight by its expert's entry, at the end.

    Returns
    -------
    indices : (n, k) int32
        The chosen experts, the best first; all k of a row differ.
    topk_weights : (n, k) float32
        Their weights, in the order of `indices`.

    Raises
    ------
    TypeError
        If an array does not hold floats, or arrays of two namespaces are mixed.
    ValueError
        If shapes do not fit, or a row's weights are NaN, as with NaN or infinity in hidden states
        or router weights.

    Notes
    -----
    Values are float32, whatever the inputs' dtypes; on the CPU the sums of the logits are float64,
    rounded once, so that the routing of a row does not depend on the rows around it. Among
    equal scores the expert with the lower index is chosen, and so is the lower group among equal
    groups. The scores are those of softmax: Shazeer et al. 2017; sigmoid, selection bias and
    groups: DeepSeek-V3, section 2.1.2; sparsemixer: Phi-3.5-MoE (Liu et al., "GRIN", 2024). Costs
    one product of 2 n d E operations and about k + 5 passes over [n, E]. On a device one integer
    and one per bias come to the host in one copy, and nothing is copied to the device.

    Examples
    --------
    >>> import numpy as np
    >>> hidden = np.array([[1.0, 0.0], [0.0, 1.0]])
    >>> weight = np.log([[1.0, 4.0], [3.0, 4.0], [6.0, 2.0]])
    >>> indices, topk_weights = route(hidden, Router(num_experts=3, k=2), weight)
    >>> indices
    array([[2, 1],
           [0, 1]], dtype=int32)
    >>> topk_weights.round(3)
    array([[0.6, 0.3],
           [0.4, 0.4]], dtype=float32)
    """
    if router.score == "sparsemixer" and selection_bias is not None:
        raise ValueError("sparsemixer chooses by the logits alone; its selection_bias must be None")
    biases = _check(
        hidden, router.num_experts, weight, bias, selection_bias, per_expert_scale, router.always
    )
    xp, n = namespace(hidden), hidden.shape[0]
    indices = xp.empty((n, router.slots), dtype=xp.int32)
    topk_weights = xp.empty((n, router.slots), dtype=xp.float32)
    for rows, logits in tiled_logits(hidden, weight, biases["bias"], router):
        indices[rows], topk_weights[rows] = _route_logits(
            xp, logits, router, biases["selection_bias"]
        )
    if per_expert_scale is not None:
        topk_weights *= per_expert_scale[indices]
    return indices, _without_nan(topk_weights, biases)


@WITHOUT_WARNINGS
def all_scores(hidden: Array, score: str, weight: Array, *, bias: Array | None = None) -> Array:
    """Return each row's score for every expert, (n, E) float32: softmax or sigmoid of the logits.

    `score` is one of ``"softmax"``, ``"sigmoid"``, ``"sqrtsoftplus"``; the arrays and errors are
    those of `route`.
    """
    check_choice("score", score, SCORES)
    biases = _check(hidden, weight.shape[0], weight, bias, None)
    xp = namespace(hidden)
    scores = memory.empty((hidden.shape[0], weight.shape[0]), np.float32, like=hidden)
    for rows, logits in tiled_logits(hidden, weight, biases["bias"]):
        scores[rows] = SCORES[score](xp, logits)
    return _without_nan(scores, biases)


def look_up(token_ids: Array, table: Array) -> Array:
    """Give each token the experts that a table holds for its id.

    Parameters
    ----------
    token_ids : (n,) array of integers
    table : (vocabulary, k) array of integers
        The experts of each token id.

    Returns
    -------
    (n, k) int32

    Raises
    ------
    ValueError
        If a token id is outside [0, vocabulary).

    Notes
    -----
    The routing of hash layers (Roller et al., "Hash Layers For Large Sparse Models", 2021). Without
    weights each chosen expert counts 1; `weigh_chosen` gives those of a learned router.

    Examples
    --------
    >>> import numpy as np
    >>> look_up(np.array([2, 0, 2]), table=np.array([[5], [1], [7]]))
    array([[7],
           [5],
           [7]], dtype=int32)
    """
    xp = one_namespace(token_ids=token_ids, table=table)
    refuse_masked(token_ids, "token_ids")
    refuse_masked(table, "table")
    if table.ndim != 2 or table.dtype.kind not in "iu":
        raise ValueError(
            "table must be a (vocabulary, k) array of integers, but has shape "
            f"{table.shape} and dtype {table.dtype}"
        )
    if token_ids.ndim != 1 or token_ids.dtype.kind not in "iu":
        raise ValueError(
            "token_ids must be an (n,) array of integers, but have shape "
            f"{token_ids.shape} and dtype {token_ids.dtype}"
        )
    bad = (token_ids < 0) | (token_ids >= len(table))
    if bad.any():
        at = int(bad.argmax())
        raise BadRow.at(
            at,
            f"token ids must be in [0, {len(table)}), the rows of the table, but token_ids[{at}] "
            f"is {int(token_ids[at])}",
        )
    return xp.take(table, token_ids, axis=0).astype(xp.int32)


@WITHOUT_WARNINGS
def weigh_chosen(
    hidden: Array, indices: Array, router: Router, weight: Array, *, bias: Array | None = None
) -> Array:
    """Return the weights (n, k) that a router gives to experts that were chosen without it.

    `indices` (n, k) come from `look_up` or anywhere else; the other arrays and the errors are those
    of `route`. DeepSeek-V4's hash layers are ``look_up`` with a ``"sqrtsoftplus"`` router.

    Examples
    --------
    >>> import numpy as np
    >>> hidden, weight = np.array([[1.0]]), np.log([[1.0], [2.0], [1.0]])
    >>> weigh_chosen(hidden, np.array([[2, 1]]), Router(num_experts=3, k=2), weight)
    array([[0.25, 0.5 ]], dtype=float32)
    """
    if router.score == "sparsemixer":
        raise ValueError("sparsemixer weighs only what it chose itself; use another score")
    biases = _check(hidden, router.num_experts, weight, bias, None)
    xp = one_namespace(hidden=hidden, indices=indices)
    refuse_masked(indices, "indices")
    if indices.shape != (hidden.shape[0], router.slots):
        raise ValueError(
            f"indices must have one row per row of hidden and k={router.slots} columns, "
            f"{(hidden.shape[0], router.slots)}, but have shape {indices.shape}"
        )
    low, high = to_host(indices.min(), indices.max()) if indices.size else (0, 0)
    if low < 0 or high >= router.num_experts:
        raise ValueError(
            f"indices must be in [0, {router.num_experts}), but range from {low} to {high}"
        )
    topk_weights = xp.empty(indices.shape, dtype=xp.float32)
    for rows, logits in tiled_logits(hidden, weight, biases["bias"], router):
        scores = SCORES[router.score](xp, logits) if router.score in SCORES else logits
        topk_weights[rows] = _weigh(xp, scores, indices[rows], router)
    return _without_nan(topk_weights, biases)


# --- the steps, each on a tile of rows ---------------------------------------------------------


def tiled_logits(
    hidden: Array,
    weight: Array,
    bias: Array | None,
    router: Router | None = None,
    wide: Any = np.float64,
) -> Iterator[tuple[slice, Array]]:
    """Yield (rows, logits [rows, E]) tile by tile; the caller may overwrite the logits.

    Notes
    -----
    The last bit of a float32 sum depends on which rows a BLAS computes together, so that the order
    of experts with equal scores would depend on the chunking. Sums in float64, rounded once, do
    not. A device sums in float32, since many are slow in float64; and so does the host with a
    float32 `wide`, when nothing is chosen by the logits.
    """
    xp = namespace(hidden)
    n, E = hidden.shape[0], weight.shape[0]
    wide = wide if xp is np else np.float32
    step = max(LOGIT_TILE_BYTES // (8 * max(hidden.shape[1], E)), 1) if xp is np else max(n, 1)
    weight = memory.aligned(weight.astype(xp.float32, copy=False).astype(wide, copy=False)).T
    tile = memory.empty((min(step, n), hidden.shape[1]), wide, like=hidden)
    sums = memory.empty((min(step, n), E), wide, like=hidden)
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        here = slice(0, rows.stop - start)
        tile[here] = hidden[rows].astype(xp.float32, copy=False)
        xp.matmul(tile[here], weight, out=sums[here])
        if router is not None and router.input_norm_eps is not None:
            squares = (tile[here] * tile[here]).mean(axis=1, keepdims=True)
            sums[here] /= xp.sqrt(squares + router.input_norm_eps)
        logits = sums[here].astype(xp.float32)
        if bias is not None:
            logits += bias
        if router is not None and router.logit_scale != 1:
            logits *= xp.float32(router.logit_scale)
        if router is not None and router.logit_softcap is not None:
            logits /= xp.float32(router.logit_softcap)
            xp.tanh(logits, out=logits)
            logits *= xp.float32(router.logit_softcap)
        yield rows, logits


def _route_logits(
    xp: Any, logits: Array, router: Router, selection_bias: Array | None
) -> tuple[Array, Array]:
    if router.score == "sparsemixer":
        return _sparsemixer(xp, logits, router)
    scores = SCORES[router.score](xp, logits) if router.score in SCORES else logits
    others = scores[:, : scores.shape[1] - router.always]
    choice = others.copy() if selection_bias is None else others + selection_bias
    if router.grouped:
        mask_groups(xp, choice, router)
    indices = largest(xp, choice, router.k)
    if router.always:
        last = xp.arange(others.shape[1], scores.shape[1], dtype=xp.int32)
        last = xp.broadcast_to(last, (len(scores), router.always))
        indices = xp.concatenate([indices, last], axis=1)
    return indices, _weigh(xp, scores, indices, router)


def _weigh(xp: Any, scores: Array, indices: Array, router: Router) -> Array:
    weights = xp.take_along_axis(scores, indices.astype(xp.int64), axis=1)
    if router.score in CHOSEN_SCORES:
        weights = CHOSEN_SCORES[router.score](xp, weights)
    return _scaled(xp, weights, router)


def _scaled(xp: Any, weights: Array, router: Router) -> Array:
    """Normalise and scale weights (n, k), in place."""
    if router.norm_topk_prob:
        total = weights.sum(axis=1, keepdims=True) + xp.float32(router.norm_eps)
        weights /= xp.maximum(total, xp.float32(router.norm_min))
    weights *= xp.float32(router.scale)
    return weights


def mask_groups(xp: Any, choice: Array, router: Router) -> None:
    """Set the choice to the smallest number outside each row's best groups."""
    grouped = choice.reshape(len(choice), router.groups, -1)  # [n, G, E / G]
    best = largest(xp, GROUP_SCORES[router.group_score](xp, grouped), router.topk_groups)
    out_of_them = xp.ones((len(choice), router.groups), dtype=bool)
    out_of_them[xp.arange(len(choice))[:, None], best] = False
    masked = SMALLEST if router.masked_score is None else router.masked_score
    xp.copyto(grouped, xp.float32(masked), where=out_of_them[:, :, None])


def _sparsemixer(xp: Any, logits: Array, router: Router) -> tuple[Array, Array]:
    rows = xp.arange(len(logits))
    indices = xp.empty((len(logits), router.k), dtype=xp.int32)
    weights = xp.empty((len(logits), router.k), dtype=xp.float32)
    left = logits.copy()
    for slot in range(router.k):
        best = left.argmax(axis=1)
        most = left[rows, best][:, None]
        far = (most - logits) / xp.maximum(xp.abs(logits), most)  # 0 / 0 is NaN, and not far
        near = xp.where(far > xp.float32(2 * router.jitter), -xp.inf, left)
        indices[:, slot] = best
        weights[:, slot] = 1 / xp.exp(near - most).sum(axis=1)
        left[rows, best] = -xp.inf
    return indices, _scaled(xp, weights, router)


# --- what must hold ----------------------------------------------------------------------------


def _check(
    hidden: Array,
    num_experts: int,
    weight: Array,
    bias: Array | None,
    selection_bias: Array | None,
    per_expert_scale: Array | None = None,
    always: int = 0,
) -> dict[str, Array | None]:
    """Check all arrays, and return those of E numbers in float32."""
    biases = {"bias": bias, "selection_bias": selection_bias, "per_expert_scale": per_expert_scale}
    xp = one_namespace(hidden=hidden, weight=weight, **biases)
    check_tokens(hidden)
    arrays = {"weight": weight, **{name: b for name, b in biases.items() if b is not None}}
    for name, array in arrays.items():
        refuse_masked(array, name)
        if not is_float(array.dtype):
            raise TypeError(f"{name} must hold floats, but has dtype {array.dtype}")
        expected = (num_experts, hidden.shape[1]) if name == "weight" else (num_experts,)
        expected = (num_experts - always,) if name == "selection_bias" else expected
        if array.shape != expected:
            raise ValueError(
                f"{name} must be {expected} for num_experts={num_experts} and hidden states of "
                f"width d={hidden.shape[1]}, but has shape {array.shape}"
            )
    return {
        name: None if b is None else b.astype(xp.float32, copy=False) for name, b in biases.items()
    }


def _without_nan(topk_weights: Array, biases: dict[str, Array | None]) -> Array:
    """Refuse NaN in the weights or the biases; all are checked in one copy from a device."""
    xp = namespace(topk_weights)
    bad = xp.isnan(topk_weights).any(axis=1)
    nan = {name: xp.isnan(bias) for name, bias in biases.items() if bias is not None}
    if not any(to_host(bad.any(), *(found.any() for found in nan.values()))):
        return topk_weights
    for name, found in nan.items():
        if found.any():
            raise ValueError(f"{name} must not hold NaN, but {name}[{int(found.argmax())}] is")
    raise BadRow.at(
        int(bad.argmax()),
        f"the router's weights are NaN for row {int(bad.argmax())}, and for {int(bad.sum())} of "
        f"{len(bad)} rows in all: look for NaN or infinity in these rows of the hidden states, or "
        "in the router's weights",
    )
