"""What must a Mixture-of-Experts layer compute, written as plainly as possible?

Loops over rows and slots, with NumPy alone and no other part of the package: slow, and what all
other results are compared with. An expert is a function of one row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import erfc

import numpy as np

RowExpert = Callable[[np.ndarray], np.ndarray]


def expert_parallel_dispatch(
    tokens: np.ndarray,
    routing: np.ndarray,
    experts: Sequence[RowExpert],
    rank: int,
    world_size: int,
    topk_weights: np.ndarray | None = None,
    *,
    d_out: int,
    apply_router_weight_on_input: bool = False,
) -> np.ndarray:
    """Return (n, d_out), the sum over those of each row's slots that `rank` owns, in float64.

    `experts` are only those of this rank.
    """
    n = len(tokens)
    routing = routing[:, None] if routing.ndim == 1 else routing
    weights = np.ones(routing.shape) if topk_weights is None else topk_weights
    weights = weights[:, None] if weights.ndim == 1 else weights
    first = rank * len(experts)
    out = np.zeros((n, d_out))
    for row in range(n):
        for slot in range(routing.shape[1]):
            expert = int(routing[row, slot]) - first
            if not 0 <= expert < len(experts):
                continue
            x, w = tokens[row].astype(np.float64), float(weights[row, slot])
            if apply_router_weight_on_input:
                out[row] += experts[expert](w * x)
            else:
                out[row] += w * experts[expert](x)
    return out


def moe(
    tokens: np.ndarray,
    routing: np.ndarray,
    experts: Sequence[RowExpert],
    topk_weights: np.ndarray | None = None,
    *,
    d_out: int,
    apply_router_weight_on_input: bool = False,
) -> np.ndarray:
    """Return (n, d_out), the output of the whole layer in float64: one rank owns all experts."""
    return expert_parallel_dispatch(
        tokens,
        routing,
        experts,
        0,
        1,
        topk_weights,
        d_out=d_out,
        apply_router_weight_on_input=apply_router_weight_on_input,
    )


# --- experts, one row at a time; matrices are (in, out) ---------------------------------------


def linear(W: np.ndarray, bias: np.ndarray | None = None) -> RowExpert:
    """``x @ W + bias``."""
    return lambda x: _affine(x, W, bias)


def mlp(
    up: np.ndarray,
    down: np.ndarray,
    *,
    activation: str = "relu",
    up_bias: np.ndarray | None = None,
    down_bias: np.ndarray | None = None,
) -> RowExpert:
    """``activation(x @ up) @ down``."""
    act = ACTIVATIONS[activation]
    return lambda x: _affine(act(_affine(x, up, up_bias), 1.0), down, down_bias)


def gated(
    gate: np.ndarray,
    up: np.ndarray,
    down: np.ndarray,
    *,
    activation: str = "silu",
    gate_bias: np.ndarray | None = None,
    up_bias: np.ndarray | None = None,
    down_bias: np.ndarray | None = None,
    limit: float | None = None,
    alpha: float = 1.0,
    up_offset: float = 0.0,
    clamp_after: bool = False,
    soft_caps: tuple[float, float] | None = None,
    output_scale: np.ndarray | None = None,
    output_norm_eps: float | None = None,
) -> RowExpert:
    """``(activation(x @ gate) * (x @ up + up_offset)) @ down``, gate and up clamped by `limit`.

    With `clamp_after`, the gate is clamped after the activation, not before. With `soft_caps`, soft
    caps bound up, and the factor of the gate in ``gate * sigmoid(alpha * gate)``. The output is
    multiplied by `output_scale`, and then normalised by its RMS, if these are given.
    """

    def act(g: np.ndarray) -> np.ndarray:
        if soft_caps is None:
            return ACTIVATIONS[activation](g, alpha)
        return capped_silu(g, alpha, soft_caps[0])

    def expert(x: np.ndarray) -> np.ndarray:
        g, u = _affine(x, gate, gate_bias), _affine(x, up, up_bias)
        if limit is not None:
            u = np.clip(u, -limit, limit)
            g = np.minimum(act(g), limit) if clamp_after else act(np.minimum(g, limit))
        else:
            g = act(g)
        if soft_caps is not None:
            u = soft_cap(u, soft_caps[1])
        y = _affine(g * (u + up_offset), down, down_bias)
        y = y if output_scale is None else y * output_scale
        return y if output_norm_eps is None else y / np.sqrt(np.mean(y**2) + output_norm_eps)

    return expert


def soft_cap(x: np.ndarray, cap: float) -> np.ndarray:
    return cap * np.tanh(x / cap)


def capped_silu(x: np.ndarray, alpha: float, cap: float) -> np.ndarray:
    return soft_cap(x, cap) * _sigmoid(alpha * x)


def _affine(x: np.ndarray, W: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    y = x @ W.astype(np.float64, copy=False)
    return y if bias is None else y + bias


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0.0, -x))  # exact to the last digits, however negative x is


ACTIVATIONS: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "silu": lambda x, alpha: x * _sigmoid(alpha * x),
    "gelu": lambda x, _: x * 0.5 * np.array([erfc(-v / 2**0.5) for v in x]),
    "gelu_tanh": lambda x, _: x * _sigmoid((8.0 / np.pi) ** 0.5 * (x + 0.044715 * x**3)),
    "relu": lambda x, _: np.maximum(x, 0.0),
    "relu2": lambda x, _: np.maximum(x, 0.0) ** 2,
}
"""Functions of a row and of alpha, which scales the argument of silu's sigmoid."""
