"""What does each kind of expert compute?

Rows (m, d) go through one, two or three matrices, each (in, out). Products and activations are
written into recycled memory, in place wherever that is possible.

    linear   x @ w + bias
    mlp      activation(x @ up + up_bias) @ down + down_bias
    gated    (activation(gate) * (up + up_offset)) @ down + down_bias,
             gate = min(x @ gate + gate_bias, limit), up = clip(x @ up + up_bias, -limit, limit);
             with clamp_after the activation of the gate is clamped, not the gate; with soft_caps
             silu is cap tanh(gate / cap) sigmoid(gate), and up is cap tanh(up / cap);
             then y * output_scale, and y / sqrt(mean(y ** 2) + output_norm_eps), where there are

Gated with silu is SwiGLU (Shazeer, "GLU Variants Improve Transformer", 2020); with `limit`, `alpha`
and `up_offset` it is gpt-oss's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

from dask_ep.arrays import memory
from dask_ep.arrays.checks import computing_dtype
from dask_ep.arrays.namespaces import Array, namespace
from dask_ep.kernel import cuda_kernels
from dask_ep.kernel.bfloat16 import BFLOAT16
from dask_ep.kernel.device_kernel import Bounds
from dask_ep.kernel.expert import Expert, Linear, gated_in_one_go
from dask_ep.kernel.operands import Factors, write

Activation = Callable[..., None]
"""Replaces an array by the activation of it. The number that follows is silu's alpha; then may come
an array of the same shape, which is lost."""


class Affine(Expert):
    """``x @ w + bias``."""

    def __init__(self, w: Array, bias: Array, precision: str = "float32"):
        self._product, self._bias = Linear(w, precision), bias
        self.d, self.d_out = w.shape

    def takes(self, dtype: np.dtype) -> np.dtype:
        return self._product.takes(dtype)

    def factors(self, dtype: np.dtype) -> Factors:
        return self._product.factors(dtype)

    @property
    def batch_key(self) -> Hashable:
        return Affine, self._product.batch_key

    @staticmethod
    def together(experts: Sequence[Affine], rows: Array, bounds: Bounds, out: Array) -> None:
        Linear.together([expert._product for expert in experts], rows, bounds, out)
        for expert, (start, stop) in zip(experts, bounds, strict=True):
            out[start:stop] += expert._bias.astype(out.dtype, copy=False)

    def __call__(self, rows: Array, out: Array | None = None) -> Array:
        out = self._product(rows, out)
        out += self._bias.astype(out.dtype, copy=False)
        return out


class Mlp(Expert):
    """``activation(x @ up) @ down``."""

    def __init__(self, up: Expert, down: Expert, activation: str):
        self._up, self._down, self._activate = up, down, ACTIVATIONS[activation]
        self.d, self.d_out, self._activation = up.d, down.d_out, activation

    @property
    def widest(self) -> int:
        return max(self.d, self._up.d_out, self.d_out)

    @property
    def hidden(self) -> int:
        return self._up.d_out

    def takes(self, dtype: np.dtype) -> np.dtype:
        return self._up.takes(dtype)

    def factors(self, dtype: np.dtype) -> Factors:
        return self._up.factors(dtype)

    @property
    def batch_key(self) -> Hashable:
        return Mlp, self._up.batch_key, self._down.batch_key, self._activation

    @staticmethod
    def together(experts: Sequence[Mlp], rows: Array, bounds: Bounds, out: Array) -> None:
        one = experts[0]
        hidden = memory.empty((len(out), one._up.d_out), out.dtype, like=out)
        one._up.together([expert._up for expert in experts], rows, bounds, hidden)
        active = _room_for(one._down, hidden, one._up.d_out)
        if (kernels := cuda_kernels.kernels(namespace(hidden))) is not None:
            kernels.activate(hidden, active, one._activation, 1.0)
        else:
            one._activate(hidden, 1.0)
            write(hidden, active)
        one._down.together([expert._down for expert in experts], active, bounds, out)

    def __call__(self, rows: Array, out: Array | None = None, hidden: Array | None = None) -> Array:
        return self._down(self.activate(rows, hidden), out)

    def activate(self, rows: Array, hidden: Array | None = None) -> Array:
        """The hidden activations of rows, in `hidden` when it is given."""
        hidden = self._up(rows, _hidden(rows, self._up) if hidden is None else hidden)
        runs = memory.runs_in_cache(hidden)
        scratch = memory.empty(hidden[runs[0]].shape, hidden.dtype, like=hidden) if runs else hidden
        for part in runs:
            self._activate(hidden[part], 1.0, scratch[: len(hidden[part])])
        return hidden


class _Gate(Expert):
    """What gated experts have in common: all between the products of gate and up, and down."""

    def __init__(
        self,
        down: Expert,
        d: int,
        hidden: int,
        activation: str,
        *,
        limit: float | None = None,
        alpha: float = 1.0,
        up_offset: float = 0.0,
        clamp_after: bool = False,
        soft_caps: tuple[float, float] | None = None,
        apply_router_weight_on_input: bool = False,
    ):
        self._clamp_after = clamp_after and limit is not None
        self._down, self._hidden_width, self._activation = down, hidden, activation
        self._limit, self._alpha, self._up_offset = limit, alpha, up_offset
        self._soft_caps = None if soft_caps is None else tuple(soft_caps)
        self.d, self.d_out = d, down.d_out
        self.apply_router_weight_on_input = apply_router_weight_on_input

    @property
    def widest(self) -> int:
        return max(self.d, self._hidden_width, self.d_out)

    @property
    def hidden(self) -> int:
        return self._hidden_width

    def _apply_gate(self, gate: Array, up: Array, scratch: Array | None = None) -> None:
        """Replace `gate` by activation(gate) * up; `up` and `scratch` are lost."""
        xp, caps = namespace(gate), self._soft_caps
        if self._limit is not None:
            xp.clip(up, -self._limit, self._limit, out=up)
        if self._limit is not None and not self._clamp_after:
            xp.minimum(gate, self._limit, out=gate)
        if caps is None:
            ACTIVATIONS[self._activation](gate, self._alpha, scratch)
        else:
            _silu(gate, self._alpha, scratch, caps[0])
            _soft_cap(up, caps[1])
        if self._clamp_after:
            xp.minimum(gate, self._limit, out=gate)
        if self._up_offset:
            up += self._up_offset
        gate *= up


class Gated(_Gate):
    """``(activation(x @ gate) * (x @ up)) @ down``; options are those of `Experts.gated`."""

    def __init__(self, gate: Expert, up: Expert, down: Expert, activation: str, **options: Any):
        super().__init__(down, up.d, up.d_out, activation, **options)
        self._gate, self._up = gate, up

    def takes(self, dtype: np.dtype) -> np.dtype:
        narrow, wide = self._gate.takes(dtype), self._up.takes(dtype)
        return narrow if narrow == wide else computing_dtype(dtype)

    def __call__(self, rows: Array, out: Array | None = None, hidden: Array | None = None) -> Array:
        active = self._in_one_go(rows) if hidden is None else None
        return self._down(self.activate(rows, hidden) if active is None else active, out)

    def _in_one_go(self, rows: Array) -> Array | None:
        """The hidden activations where the library of products makes them, else None."""
        gate, up = self._gate, self._up
        more = (self._limit, self._up_offset or None, self._clamp_after or None, self._soft_caps)
        if self._activation != "silu" or any(option is not None for option in more):
            return None
        if not isinstance(gate, Linear) or not isinstance(up, Linear):
            return None
        rounded = gate.is_rounded and self._down.takes(BFLOAT16) == BFLOAT16
        return gated_in_one_go(rows, gate, up, self._alpha, rounded=rounded)

    def activate(self, rows: Array, hidden: Array | None = None) -> Array:
        """The hidden activations of rows, in `hidden` when it is given."""
        gate = self._gate(rows, _hidden(rows, self._gate) if hidden is None else hidden)
        up = self._up(rows, _hidden(rows, self._up))
        runs = memory.runs_in_cache(gate)
        scratch = memory.empty(gate[runs[0]].shape, gate.dtype, like=gate) if runs else gate
        for part in runs:
            self._apply_gate(gate[part], up[part], scratch[: len(gate[part])])
        return gate


class GatedPair(_Gate):
    """`Gated` on a device: gate and up side by side in one matrix, so in one product.

    ``hidden = x @ gate_up`` has the gate in its first f columns, where it is replaced by
    activation(gate) * up; ``down`` reads it from there. Where ``down`` has 16 bits, what it reads,
    rounded or split, is an array of its own.
    """

    def __init__(self, gate_up: Expert, down: Expert, activation: str, **options: Any):
        super().__init__(down, gate_up.d, gate_up.d_out, activation, **options)
        self._gate_up = gate_up

    def takes(self, dtype: np.dtype) -> np.dtype:
        return self._gate_up.takes(dtype)

    def factors(self, dtype: np.dtype) -> Factors:
        return self._gate_up.factors(dtype)

    @property
    def batch_key(self) -> Hashable:
        numbers = (self._limit, self._alpha, self._up_offset, self._clamp_after, self._soft_caps)
        parts = (self._gate_up.batch_key, self._down.batch_key)
        return GatedPair, *parts, self._activation, *numbers, self.apply_router_weight_on_input

    def __call__(self, rows: Array, out: Array | None = None) -> Array:
        if out is None:
            dtype = computing_dtype(rows.dtype)
            out = memory.empty((len(rows), self.d_out), dtype, like=rows)
        self.together([self], rows, [(0, len(rows))], out)
        return out

    @staticmethod
    def together(experts: Sequence[GatedPair], rows: Array, bounds: Bounds, out: Array) -> None:
        one = experts[0]
        hidden = memory.empty((len(out), one._gate_up.d_out), out.dtype, like=out)
        one._gate_up.together([expert._gate_up for expert in experts], rows, bounds, hidden)
        gated = _room_for(one._down, hidden, one._down.d)
        one._combine(hidden, gated)
        gated = gated[..., : one._down.d]
        one._down.together([expert._down for expert in experts], gated, bounds, out)

    def _combine(self, hidden: Array, out: Array) -> None:
        """Write activation(gate) * up to the first f columns of `out`, which may be `hidden` or
        take parts."""
        kernels = cuda_kernels.kernels(namespace(hidden))
        if kernels is not None and not self._clamp_after and self._soft_caps is None:
            numbers = (self._limit, self._alpha, self._up_offset)
            kernels.gate(hidden, out, self._activation, *numbers)
            return
        f = self._down.d
        self._apply_gate(hidden[:, :f], hidden[:, f:])
        if out is not hidden:
            write(hidden[:, :f], out[..., :f])


class Summed(Expert):
    """The sum of experts that hold some hidden columns each: one expert with all of them."""

    def __init__(self, parts: list[Any]):
        self._parts = parts
        self.d, self.d_out = parts[0].d, parts[0].d_out
        self.apply_router_weight_on_input = parts[0].apply_router_weight_on_input

    @property
    def widest(self) -> int:
        return max(part.widest for part in self._parts)

    @property
    def hidden(self) -> int:
        return sum(part.hidden for part in self._parts)

    def takes(self, dtype: np.dtype) -> np.dtype:
        return self._parts[0].takes(dtype)

    def __call__(self, rows: Array, out: Array | None = None, hidden: Array | None = None) -> Array:
        out = self._through(0, rows, out, hidden)
        more = memory.empty(out.shape, out.dtype, like=out)
        for i in range(1, len(self._parts)):
            out += self._through(i, rows, more, hidden)
        return out

    def _through(self, i: int, rows: Array, out: Array | None, hidden: Array | None) -> Array:
        """One of the experts, whose hidden activations go to their columns of `hidden`."""
        part = self._parts[i]
        if hidden is None:
            return part(rows, out)
        activations = memory.empty((len(rows), part.hidden), hidden.dtype)
        out = part(rows, out, hidden=activations)
        hidden[:, self._columns(i)] = activations
        return out

    def activate(self, rows: Array, hidden: Array | None = None) -> Array:
        """The hidden activations of rows, in `hidden` when it is given."""
        if hidden is None:
            hidden = memory.empty((len(rows), self.hidden), computing_dtype(rows.dtype))
        for i, part in enumerate(self._parts):
            hidden[:, self._columns(i)] = part.activate(rows)
        return hidden

    def _columns(self, i: int) -> slice:
        first = sum(before.hidden for before in self._parts[:i])
        return slice(first, first + self._parts[i].hidden)


class Normed(Expert):
    """An expert whose output is multiplied by a row, and then divided by its root mean square."""

    def __init__(self, expert: Any, scale: Array | None, eps: float | None):
        self._expert, self._scale, self._eps = expert, scale, eps
        self.d, self.d_out = expert.d, expert.d_out
        self.apply_router_weight_on_input = expert.apply_router_weight_on_input

    @property
    def widest(self) -> int:
        return self._expert.widest

    @property
    def hidden(self) -> int | None:
        return self._expert.hidden

    def takes(self, dtype: np.dtype) -> np.dtype:
        return self._expert.takes(dtype)

    def factors(self, dtype: np.dtype) -> Factors:
        return self._expert.factors(dtype)

    @property
    def batch_key(self) -> Hashable:
        return Normed, self._expert.batch_key, self._eps

    @staticmethod
    def together(experts: Sequence[Normed], rows: Array, bounds: Bounds, out: Array) -> None:
        experts[0]._expert.together([expert._expert for expert in experts], rows, bounds, out)
        for expert, (start, stop) in zip(experts, bounds, strict=True):
            expert._apply(out[start:stop])

    def __call__(self, rows: Array, out: Array | None = None, hidden: Array | None = None) -> Array:
        out = self._expert(rows, out, **({} if hidden is None else {"hidden": hidden}))
        self._apply(out)
        return out

    def activate(self, rows: Array, hidden: Array | None = None) -> Array:
        """The hidden activations of rows, in `hidden` when it is given."""
        return self._expert.activate(rows, hidden)

    def _apply(self, y: Array) -> None:
        for run in memory.runs_in_cache(y):
            part = y[run]
            if self._scale is not None:
                part *= self._scale.astype(part.dtype, copy=False)
            if self._eps is not None:
                xp = namespace(part)
                # In float64, where the square of no float32 number is infinite.
                squares = xp.multiply(part, part, dtype=np.float64).mean(axis=1, keepdims=True)
                root = xp.sqrt(squares + self._eps)
                with np.errstate(invalid="ignore"):  # of rows that are infinite
                    part /= root.astype(part.dtype, copy=False)


def _hidden(rows: Array, expert: Expert) -> Array:
    """Room for what an expert's first product gives: as wide as sums are."""
    dtype = computing_dtype(rows.dtype)
    return memory.empty((len(rows), expert.d_out), dtype, like=rows)


def _room_for(expert: Expert, hidden: Array, width: int) -> Array:
    """Room on a device for hidden rows as an expert takes them: where they are, if that is it."""
    taken = expert.factors(hidden.dtype)
    return hidden if taken == Factors(hidden.dtype) else taken.empty(len(hidden), width, hidden)


# --- activations, in place -------------------------------------------------------------------


def _soft_cap(x: Array, cap: float) -> None:
    x /= cap
    namespace(x).tanh(x, out=x)
    x *= cap


def _silu(x: Array, alpha: float, scratch: Array | None = None, cap: float | None = None) -> None:
    """With a cap, what the sigmoid multiplies is bounded by it."""
    xp = namespace(x)
    scratch = _as_large(x) if scratch is None else scratch
    xp.multiply(x, -alpha, out=scratch)
    # exp overflows to infinity below -88 / alpha in float32, and x / infinity is the right 0.
    with np.errstate(over="ignore"):
        xp.exp(scratch, out=scratch)
    scratch += 1
    if cap is not None:
        _soft_cap(x, cap)
    x /= scratch


def _gelu(x: Array, _: float, scratch: Array | None = None) -> None:
    from scipy.special import erfc  # slow to import, and only here

    scratch = _as_large(x) if scratch is None else scratch
    namespace(x).multiply(x, -math.sqrt(0.5), out=scratch)
    erfc(scratch, out=scratch)  # CuPy's arrays hand this to their own erfc
    scratch *= 0.5
    x *= scratch


def _gelu_tanh(x: Array, _: float, scratch: Array | None = None) -> None:
    # 0.5 * (1 + tanh(z)) is 1 / (1 + exp(-2 z)), which keeps its digits far below zero.
    xp = namespace(x)
    scratch = _as_large(x) if scratch is None else scratch
    xp.multiply(x, x, out=scratch)
    scratch *= 0.044715
    scratch += 1
    scratch *= x
    scratch *= -math.sqrt(8 / math.pi)
    with np.errstate(over="ignore"):
        xp.exp(scratch, out=scratch)
    scratch += 1
    x /= scratch


def _relu(x: Array, _: float, scratch: Array | None = None) -> None:
    namespace(x).maximum(x, 0, out=x)


def _relu2(x: Array, _: float, scratch: Array | None = None) -> None:
    xp = namespace(x)
    xp.maximum(x, 0, out=x)
    xp.multiply(x, x, out=x)


def _as_large(x: Array) -> Array:
    return memory.empty(x.shape, x.dtype, like=x)


ACTIVATIONS: dict[str, Activation] = {
    "silu": _silu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": _relu,
    "relu2": _relu2,
}
"""silu is x * sigmoid(alpha * x), gelu the exact one (with erfc), relu2 the square of relu."""
