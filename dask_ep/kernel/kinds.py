"""What does each kind of expert compute?

Rows (m, d) are multiplied by one, two or three matrices, each (in, out). Products and activations
are written into recycled memory, in place where possible.

    linear   x @ w + bias
    mlp      activation(x @ up + up_bias) @ down + down_bias
    gated    (activation(gate) * (up + up_offset)) @ down + down_bias,
             gate = min(x @ gate + gate_bias, limit), up = clip(x @ up + up_bias, -limit, limit);
             with clamp_after the activation of the gate is clamped, not the gate; with soft_caps
             silu is cap tanh(gate / cap) sigmoid(gate), and up is cap tanh(up / cap);
             then y * output_scale, and y / sqrt(mean(y ** 2) + output_norm_eps), if given

Gated with silu is SwiGLU (Shazeer, "GLU Variants Improve Transformer", 2020); with `limit`, `alpha`
and `up_offset` it is the expert of gpt-oss.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Hashable, Iterator, Sequence
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
"""(array, silu's alpha, optional scratch of the same shape): replaces the array by its activation,
and may overwrite the scratch."""


class Composed(Expert):
    """An expert made of other experts, the first of which is given the rows."""

    def __init__(self, first: Any, d_out: int):
        self._first, self.d, self.d_out = first, first.d, d_out
        self.apply_router_weight_on_input = first.apply_router_weight_on_input

    @property
    def widest(self) -> int:
        return max(self._first.widest, self.d_out)

    @property
    def hidden(self) -> int | None:
        return self._first.hidden

    def takes(self, dtype: np.dtype) -> np.dtype:
        return self._first.takes(dtype)

    def factors(self, dtype: np.dtype) -> Factors:
        return self._first.factors(dtype)


class Affine(Composed):
    """``x @ w + bias``."""

    def __init__(self, w: Array, bias: Array, precision: str = "float32"):
        super().__init__(Linear(w, precision), w.shape[1])
        self._bias = bias

    @property
    def batch_key(self) -> Hashable:
        return Affine, self._first.batch_key

    @staticmethod
    def together(experts: Sequence[Affine], rows: Array, bounds: Bounds, out: Array) -> None:
        Linear.together([expert._first for expert in experts], rows, bounds, out)
        for expert, (start, stop) in zip(experts, bounds, strict=True):
            out[start:stop] += expert._bias.astype(out.dtype, copy=False)

    def __call__(self, rows: Array, out: Array | None = None) -> Array:
        out = self._first(rows, out)
        out += self._bias.astype(out.dtype, copy=False)
        return out


class Activated(Composed):
    """Base of experts with hidden activations, which are multiplied by `down`."""

    def __init__(self, first: Expert, down: Expert, activation: str):
        super().__init__(first, down.d_out)
        self._down, self._activation = down, activation

    @property
    def hidden(self) -> int:
        return self._down.d

    @staticmethod
    def together(experts: Sequence[Any], rows: Array, bounds: Bounds, out: Array) -> None:
        one = experts[0]
        hidden = memory.empty((len(out), one._first.d_out), out.dtype, like=out)
        one._first.together([expert._first for expert in experts], rows, bounds, hidden)
        taken = one._down.factors(hidden.dtype)
        as_it_is = taken == Factors(hidden.dtype)
        active = hidden if as_it_is else taken.empty(len(hidden), one.hidden, hidden)
        one._activate_on_device(hidden, active)
        active = active[..., : one.hidden]
        one._down.together([expert._down for expert in experts], active, bounds, out)

    @abstractmethod
    def _activate_on_device(self, hidden: Array, out: Array) -> None:
        """Write the activations to the first columns of `out`, which may be `hidden`, or may hold
        numbers in several parts (`Factors`)."""

    def __call__(self, rows: Array, out: Array | None = None, hidden: Array | None = None) -> Array:
        return self._down(self.activate(rows, hidden), out)

    @abstractmethod
    def activate(self, rows: Array, hidden: Array | None = None) -> Array:
        """The hidden activations of rows, in `hidden` when it is given."""


class Mlp(Activated):
    """``activation(x @ up) @ down``."""

    @property
    def batch_key(self) -> Hashable:
        return Mlp, self._first.batch_key, self._down.batch_key, self._activation

    def _activate_on_device(self, hidden: Array, out: Array) -> None:
        if (kernels := cuda_kernels.kernels(namespace(hidden))) is not None:
            kernels.activate(hidden, out, self._activation)
        else:
            ACTIVATIONS[self._activation](hidden, 1.0)
            write(hidden, out)

    def activate(self, rows: Array, hidden: Array | None = None) -> Array:
        hidden = self._first(rows, _room(rows, self._first) if hidden is None else hidden)
        for part, scratch in _runs(hidden):
            ACTIVATIONS[self._activation](hidden[part], 1.0, scratch)
        return hidden


class Gated(Activated):
    """``(activation(x @ gate) * (x @ up)) @ down``; options are those of `Experts.gated`.

    Without `up`, the matrix of `gate` holds both, side by side. On a device they are one product
    (m, 2 f) whose first f columns are the gate, which activation(gate) * up replaces.
    """

    def __init__(
        self,
        gate: Expert,
        up: Expert | None,
        down: Expert,
        activation: str,
        *,
        limit: float | None = None,
        alpha: float = 1.0,
        up_offset: float = 0.0,
        clamp_after: bool = False,
        soft_caps: tuple[float, float] | None = None,
        apply_router_weight_on_input: bool = False,
    ):
        super().__init__(gate, down, activation)
        self._up, self._clamp_after = up, clamp_after and limit is not None
        self._limit, self._alpha, self._up_offset = limit, alpha, up_offset
        self._soft_caps = None if soft_caps is None else tuple(soft_caps)
        self.apply_router_weight_on_input = apply_router_weight_on_input

    def takes(self, dtype: np.dtype) -> np.dtype:
        taken = super().takes(dtype)
        same = self._up is None or self._up.takes(dtype) == taken
        return taken if same else computing_dtype(dtype)

    def factors(self, dtype: np.dtype) -> Factors:
        return super().factors(dtype) if self._up is None else Factors(self.takes(dtype))

    @property
    def batch_key(self) -> Hashable:
        if self._up is not None:
            return id(self)
        numbers = (self._limit, self._alpha, self._up_offset, self._clamp_after, self._soft_caps)
        parts = (self._first.batch_key, self._down.batch_key)
        return Gated, *parts, self._activation, *numbers, self.apply_router_weight_on_input

    @staticmethod
    def together(experts: Sequence[Gated], rows: Array, bounds: Bounds, out: Array) -> None:
        kind = Activated if experts[0]._up is None else Expert
        kind.together(experts, rows, bounds, out)

    def _activate_on_device(self, hidden: Array, out: Array) -> None:
        kernels = cuda_kernels.kernels(namespace(hidden))
        if kernels is not None and not self._clamp_after and self._soft_caps is None:
            numbers = (self._limit, self._alpha, self._up_offset)
            kernels.gate(hidden, out, self._activation, *numbers)
            return
        f = self.hidden
        self._apply_gate(hidden[:, :f], hidden[:, f:])
        if out is not hidden:
            write(hidden[:, :f], out[..., :f])

    def __call__(self, rows: Array, out: Array | None = None, hidden: Array | None = None) -> Array:
        if self._up is None:
            out = _room(rows, self) if out is None else out
            self.together([self], rows, [(0, len(rows))], out)
            return out
        active = self._in_one_go(rows) if hidden is None else None
        return super().__call__(rows, out, hidden) if active is None else self._down(active, out)

    def _in_one_go(self, rows: Array) -> Array | None:
        """The hidden activations if the library of products can compute them, else None."""
        gate, up = self._first, self._up
        more = (self._limit, self._up_offset or None, self._clamp_after or None, self._soft_caps)
        if self._activation != "silu" or any(option is not None for option in more):
            return None
        if not isinstance(gate, Linear) or not isinstance(up, Linear):
            return None
        rounded = gate.is_rounded and self._down.takes(BFLOAT16) == BFLOAT16
        return gated_in_one_go(rows, gate, up, self._alpha, rounded=rounded)

    def activate(self, rows: Array, hidden: Array | None = None) -> Array:
        assert self._up is not None  # on the host
        gate = self._first(rows, _room(rows, self._first) if hidden is None else hidden)
        up = self._up(rows, _room(rows, self._up))
        for part, scratch in _runs(gate):
            self._apply_gate(gate[part], up[part], scratch)
        return gate

    def _apply_gate(self, gate: Array, up: Array, scratch: Array | None = None) -> None:
        """Replace `gate` by activation(gate) * up; `up` and `scratch` are overwritten."""
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


class Summed(Composed):
    """One expert as the sum of experts that have a part of its hidden columns each."""

    def __init__(self, parts: list[Any]):
        super().__init__(parts[0], parts[0].d_out)
        self._parts = parts

    @property
    def hidden(self) -> int:
        return sum(part.hidden for part in self._parts)

    def __call__(self, rows: Array, out: Array | None = None, hidden: Array | None = None) -> Array:
        out = self._through(0, rows, out, hidden)
        more = memory.empty(out.shape, out.dtype, like=out)
        for i in range(1, len(self._parts)):
            out += self._through(i, rows, more, hidden)
        return out

    def _through(self, i: int, rows: Array, out: Array | None, hidden: Array | None) -> Array:
        """Compute expert `i`, and write its hidden activations to their columns of `hidden`."""
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


class Normed(Composed):
    """An expert whose output is scaled by column, and then divided by its root mean square."""

    def __init__(self, expert: Expert, scale: Array | None, eps: float | None):
        super().__init__(expert, expert.d_out)
        self._scale, self._eps = scale, eps

    @property
    def batch_key(self) -> Hashable:
        return Normed, self._first.batch_key, self._eps

    @staticmethod
    def together(experts: Sequence[Normed], rows: Array, bounds: Bounds, out: Array) -> None:
        experts[0]._first.together([expert._first for expert in experts], rows, bounds, out)
        for expert, (start, stop) in zip(experts, bounds, strict=True):
            expert._apply(out[start:stop])

    def __call__(self, rows: Array, out: Array | None = None, hidden: Array | None = None) -> Array:
        out = self._first(rows, out, **({} if hidden is None else {"hidden": hidden}))
        self._apply(out)
        return out

    def activate(self, rows: Array, hidden: Array | None = None) -> Array:
        """The hidden activations of rows, in `hidden` when it is given."""
        return self._first.activate(rows, hidden)

    def _apply(self, y: Array) -> None:
        for run in memory.runs_in_cache(y):
            part = y[run]
            if self._scale is not None:
                part *= self._scale.astype(part.dtype, copy=False)
            if self._eps is not None:
                xp = namespace(part)
                # In float64, where squares of float32 numbers do not overflow.
                squares = xp.multiply(part, part, dtype=np.float64).mean(axis=1, keepdims=True)
                root = xp.sqrt(squares + self._eps)
                with np.errstate(invalid="ignore"):  # rows that are infinite
                    part /= root.astype(part.dtype, copy=False)


def _room(rows: Array, expert: Expert) -> Array:
    """Return an uninitialised array for the output of an expert, in the dtype of sums."""
    dtype = computing_dtype(rows.dtype)
    return memory.empty((len(rows), expert.d_out), dtype, like=rows)


def _runs(hidden: Array) -> Iterator[tuple[slice, Array]]:
    """Yield runs of rows that stay in cache, each with scratch of its size."""
    runs = memory.runs_in_cache(hidden)
    scratch = memory.empty(hidden[runs[0]].shape, hidden.dtype, like=hidden) if runs else hidden
    for part in runs:
        yield part, scratch[: len(hidden[part])]


# --- activations, in place -------------------------------------------------------------------


def _soft_cap(x: Array, cap: float) -> None:
    x /= cap
    namespace(x).tanh(x, out=x)
    x *= cap


def _silu(x: Array, alpha: float, scratch: Array | None = None, cap: float | None = None) -> None:
    """Apply x * sigmoid(alpha * x); a cap applies to the factor x, not inside the sigmoid."""
    xp = namespace(x)
    scratch = _as_large(x) if scratch is None else scratch
    xp.multiply(x, -alpha, out=scratch)
    # In float32, exp overflows to infinity below x = -88 / alpha, and x / infinity is 0, as needed.
    with np.errstate(over="ignore"):
        xp.exp(scratch, out=scratch)
    scratch += 1
    if cap is not None:
        _soft_cap(x, cap)
    x /= scratch


def _gelu(x: Array, _: float, scratch: Array | None = None) -> None:
    from scipy.special import erfc  # slow to import, and only needed here

    scratch = _as_large(x) if scratch is None else scratch
    namespace(x).multiply(x, -math.sqrt(0.5), out=scratch)
    erfc(scratch, out=scratch)  # CuPy arrays dispatch this to CuPy's erfc
    scratch *= 0.5
    x *= scratch


def _gelu_tanh(x: Array, _: float, scratch: Array | None = None) -> None:
    # 0.5 * (1 + tanh(z)) is 1 / (1 + exp(-2 z)), which stays accurate far below zero.
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
"""silu is x * sigmoid(alpha * x), gelu is exact (with erfc), relu2 is the square of relu."""
