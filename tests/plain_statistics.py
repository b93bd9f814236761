"""Statistics of experts in plain loops over rows and slots, in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from dask_ep import Experts
from dask_ep.kernel.reference import ACTIVATIONS


class PlainExpert(NamedTuple):
    """An expert as functions of one float64 row."""

    hidden: Callable[[np.ndarray], np.ndarray] | None
    output: Callable[[np.ndarray], np.ndarray]


class Layer(NamedTuple):
    """The same experts twice."""

    experts: Experts
    plain: list[PlainExpert]
    on_input: bool = False


def make_layer(kind: str, E: int, d: int, f: int, d_out: int, seed: int, on_input=False) -> Layer:
    """Experts of a kind, with biases where it has some."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal((E, *shape)).astype("f4")

    if kind in ("linear", "callables"):
        w = draw(d, d_out)
        plain = [PlainExpert(None, lambda x, e=e: x @ w[e].astype("f8")) for e in range(E)]
        if kind == "linear":
            return Layer(Experts.linear(w), plain)
        functions = [lambda rows, e=e: rows @ w[e].astype(rows.dtype) for e in range(E)]
        return Layer(Experts.callables(functions, d_out), plain)
    gate, up, down, bias = draw(d, f), draw(d, f), draw(f, d_out), draw(f)
    if kind == "mlp":
        experts = Experts.mlp(up, down, activation="gelu_tanh", up_bias=bias)
        act = ACTIVATIONS["gelu_tanh"]
        hidden = [lambda x, e=e: act(_affine(x, up[e], bias[e]), 1.0) for e in range(E)]
    elif kind == "gated":
        options = {"limit": 1.5, "alpha": 1.7, "up_offset": 1.0}
        experts = Experts.gated(
            gate, up, down, gate_bias=bias, apply_router_weight_on_input=on_input, **options
        )
        hidden = [
            lambda x, e=e: (
                ACTIVATIONS["silu"](np.minimum(_affine(x, gate[e], bias[e]), 1.5), 1.7)
                * (np.clip(_affine(x, up[e]), -1.5, 1.5) + 1)
            )
            for e in range(E)
        ]
    else:
        fused = np.stack([gate, up], axis=3).reshape(E, d, 2 * f)
        scale = draw(d_out)
        experts = Experts.gated_fused(
            fused, down, interleaved=True, output_scale=scale, output_norm_eps=0.1
        )
        hidden = [
            lambda x, e=e: ACTIVATIONS["silu"](_affine(x, gate[e]), 1.0) * _affine(x, up[e])
            for e in range(E)
        ]

    def output(x: np.ndarray, e: int) -> np.ndarray:
        y = hidden[e](x) @ down[e].astype("f8")
        if kind != "gated_fused":
            return y
        y *= scale[e]
        return y / np.sqrt(np.mean(y * y) + 0.1)

    plain = [PlainExpert(hidden[e], lambda x, e=e: output(x, e)) for e in range(E)]
    return Layer(experts, plain, on_input and kind == "gated")


def statistics(
    tokens: np.ndarray,
    routing: np.ndarray,
    topk_weights: np.ndarray | None,
    plain: Sequence[PlainExpert],
    *,
    on_input: bool = False,
    others: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """All statistics; `others` (n, E) are rows that go through experts besides those routed."""
    routing = (routing if routing.ndim == 2 else routing[:, None]).astype(int)
    n, k = routing.shape
    weights = np.ones((n, k)) if topk_weights is None else topk_weights.reshape(n, k)
    E, d = len(plain), tokens.shape[1]
    inputs: list[list] = [[] for _ in range(E)]
    norms: list[list] = [[] for _ in range(E)]
    usage = {"rows": np.zeros(E), "weight": np.zeros(E), "slots": np.zeros((E, k))}
    together = np.zeros((E, E))
    for row in range(n):
        x = tokens[row].astype(np.float64)
        for slot in range(k):
            e, w = routing[row, slot], float(weights[row, slot])
            if e < 0:
                continue
            usage["rows"][e] += 1
            usage["weight"][e] += w
            usage["slots"][e, slot] += 1
            inputs[e].append(w * x if on_input else x)
            norm = np.linalg.norm(plain[e].output(inputs[e][-1]))
            norms[e].append((norm if on_input else w * norm, norm))
        for a in set(routing[row]) - {-1}:
            for b in set(routing[row]) - {-1}:
                together[a, b] += 1
    if others is not None:
        for row, e in zip(*np.nonzero(others), strict=True):
            inputs[e].append(tokens[row].astype(np.float64))
    found = {f"usage.{name}": array for name, array in usage.items()}
    found |= {"coactivation": together, "coverage.rows": np.array([len(x) for x in inputs])}
    found["reap.rows"] = np.array([len(pairs) for pairs in norms])
    pairs = [np.array(one).reshape(-1, 2) for one in norms]
    found["reap.score"], found["reap.norm"] = (
        np.array([p[:, i].mean() if len(p) else 0.0 for p in pairs]) for i in (0, 1)
    )
    sides = {"input": lambda e, x: x, "output": lambda e, x: plain[e].output(x)}
    if plain[0].hidden is not None:
        sides["hidden"] = lambda e, x: plain[e].hidden(x)
    for side, function in sides.items():
        width = len(function(0, np.zeros(d)))
        rows = [np.array([function(e, x) for x in inputs[e]]).reshape(-1, width) for e in range(E)]
        found[f"amax.{side}"] = np.array([np.abs(r).max(axis=0, initial=0) for r in rows])
        found[f"sumsq.{side}"] = np.array([(r**2).sum(axis=0) for r in rows])
        found[f"gram.{side}"] = np.array([r.T @ r for r in rows])
        if side == "output":
            found["mean_output.sum"] = np.array([r.sum(axis=0) for r in rows])
            count = np.maximum(found["coverage.rows"], 1)[:, None]
            found["mean_output.mean"] = found["mean_output.sum"] / count
    return found


def _affine(x: np.ndarray, w: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    y = x @ w.astype(np.float64)
    return y if bias is None else y + bias.astype(np.float64)
