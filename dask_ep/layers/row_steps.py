"""What does a row go through before its experts, and after them?

    rows [n, d] ─┬─ before ── experts ── between ──┐
                 ├─ shared experts ────────────────┤
                 ├─ experts beyond those of ranks ─┴─ sum ── after ──┐
                 └─ the rows, if residual ───────────────────────────┴─ sum

`before`, `between` and `after` are `RowStep`s, each on single rows: projections to the width of the
experts and back (latent experts), norms, a bias, a factor.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np

from dask_ep.arrays import memory
from dask_ep.arrays.checks import computing_dtype
from dask_ep.arrays.device import explain_memory
from dask_ep.arrays.namespaces import UNDERFLOW_IS_ZERO, Array, namespace
from dask_ep.experts.experts import CallableExperts, Experts
from dask_ep.kernel.dispatch import dispatch
from dask_ep.kernel.error_context import error_context, explain_kernel_memory
from dask_ep.layers.lazy_routing import SmallArray
from dask_ep.layers.router import check_choice

STEP_KINDS = ("linear", "rms_norm", "scale", "add")


@dataclass(frozen=True)
class RowStep:
    """A step that acts on each row separately.

    Attributes
    ----------
    kind : str
        ``"linear"``: ``row @ array.T + bias``; ``"rms_norm"``: ``(offset + array) * row /
        sqrt(mean(row**2) + eps)``; ``"scale"``: ``factor * row``; ``"add"``: ``row + array``.
    array : SmallArray or None
        (out, in) of a linear step, else (width,).
    bias : SmallArray or None
        (out,).
    eps, offset, factor : float
    """

    kind: str
    array: SmallArray | None = None
    bias: SmallArray | None = None
    eps: float = 0.0
    offset: float = 0.0
    factor: float = 1.0

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, STEP_KINDS)

    @property
    def arrays(self) -> tuple[SmallArray, ...]:
        return tuple(array for array in (self.array, self.bias) if array is not None)

    def width(self, d: int | None) -> int | None:
        """Width of the output for rows of width d."""
        return self.array.shape[0] if self.kind == "linear" and self.array is not None else d

    def width_before(self, d: int | None) -> int | None:
        """Width of the input for an output of width d."""
        return self.array.shape[1] if self.kind == "linear" and self.array is not None else d

    def __call__(self, x: Array, array: Array, bias: Array) -> Array:
        """Apply the step to rows in the computing dtype, with its arrays."""
        if self.kind == "linear":
            y = memory.aligned(x) @ memory.aligned(array).T
            return y if bias is None else y + bias
        if self.kind == "rms_norm":
            xp = namespace(x)
            root = xp.sqrt((x * x).mean(axis=1, keepdims=True) + x.dtype.type(self.eps))
            return x / root * (x.dtype.type(self.offset) + array)
        return x * x.dtype.type(self.factor) if self.kind == "scale" else x + array


Steps = tuple[RowStep, ...]
Loaded = list[tuple[RowStep, Any, Any]]


def load_steps(steps: Steps, xp: Any, dtype: np.dtype) -> Loaded:
    """Read the arrays of steps, in the computing dtype."""

    def read(array: SmallArray | None) -> Any:
        return None if array is None else xp.asarray(array.read().astype(dtype))

    return [(step, read(step.array), read(step.bias)) for step in steps]


def apply_steps(rows: Array, loaded: Loaded) -> Array:
    """Send rows through steps, one after the other."""
    for step, array, bias in loaded:
        rows = step(rows, array, bias)
    return rows


@dataclass(frozen=True)
class Around:
    """The steps of a row before its experts, and after them.

    Attributes
    ----------
    before, between, after : tuples of RowStep
        Applied to the rows before experts read them; to the experts' output; and to the sum of
        that and the shared experts.
    beyond : {"identity", "shared"} or None
        The kind of the router's experts beyond those of the layer: experts that return the row
        unchanged (LongCat), or the shared ones (Inkling). They are computed where the row is.
    """

    before: Steps = ()
    between: Steps = ()
    after: Steps = ()
    beyond: str | None = None

    def __post_init__(self) -> None:
        if self.beyond is not None:
            check_choice("beyond", self.beyond, ("identity", "shared"))

    @property
    def arrays(self) -> list[SmallArray]:
        """The arrays of all steps."""
        steps = (*self.before, *self.between, *self.after)
        return [array for step in steps for array in step.arrays]

    def d(self, experts: Experts | CallableExperts) -> int | None:
        """Width of input rows, for experts of some width."""
        width = experts.d
        for step in reversed(self.before):
            width = step.width_before(width)
        return width

    def d_out(self, experts: Experts | CallableExperts) -> int | None:
        """Width of output rows, for experts of some width."""
        width = experts.d_out
        for step in (*self.between, *self.after):
            width = step.width(width)
        return width


class Rest(NamedTuple):
    """All parts of a layer except its router and its experts, loaded or not."""

    shared: Any
    gate: Any
    between: Any
    after: Any
    beyond: str | None
    num_experts: int
    residual: bool

    @property
    def finishes(self) -> bool:
        """Whether any step follows the experts' answers."""
        more = (self.shared, self.between, self.after, self.beyond, self.residual)
        return any(part not in (None, (), False) for part in more)


# --- the tasks -----------------------------------------------------------------------------------


def load_rest(rest: Rest, xp_name: str, dtype: np.dtype) -> Rest:
    """Load the shared experts and the arrays of all steps."""
    xp, shared, gate = import_module(xp_name), rest.shared, rest.gate
    wide = computing_dtype(dtype)
    if shared is not None:
        shared = load_shared(shared, xp, dtype)
        gate = None if gate is None else xp.asarray(gate.read().astype(wide))
    between, after = (load_steps(some, xp, wide) for some in (rest.between, rest.after))
    return rest._replace(shared=shared, gate=gate, between=between, after=after)


def load_shared(shared: Experts | CallableExperts, xp: Any, dtype: np.dtype) -> Any:
    needed = shared.parameters * shared.num_experts * dtype.itemsize
    with error_context("loading the shared experts"), explain_memory(xp, needed):
        return shared.load(xp=xp, dtype=dtype)


@UNDERFLOW_IS_ZERO
def enter(rows: Array, loaded: Loaded) -> Array:
    """Make the rows that experts read."""
    return apply_steps(_wide(rows), loaded).astype(rows.dtype, copy=False)


@UNDERFLOW_IS_ZERO
def finish(
    rows: Array,
    routed: Array,
    rest: Rest,
    chunk: int,
    indices: Array | None = None,
    weights: Array | None = None,
) -> Array:
    """Apply the steps that follow the experts' answers."""
    experts, d_out = () if rest.shared is None else rest.shared, routed.shape[1]
    sums = 3 * max(d_out, rows.shape[1]) * computing_dtype(rows.dtype).itemsize
    with (
        error_context(f"shared experts and residual of token chunk {chunk}"),
        explain_kernel_memory(rows, len(experts), experts, d_out, extra_row_bytes=sums),
    ):
        return _finished(rows, routed, rest, indices, weights)


def _finished(rows: Array, routed: Array, rest: Rest, indices: Array, weights: Array) -> Array:
    """Add to the routed output in float32, or float64 where rows are, rounding once."""
    compute = computing_dtype(rows.dtype)
    if namespace(rows) is np:
        rows = rows.astype(compute, copy=False)
    given = apply_steps(_wide(routed), rest.between)
    if rest.beyond is not None:
        slots = indices - rest.num_experts  # below 0: a routed expert, or none
        weights = namespace(rows).where(slots >= 0, weights, np.float32(0))
        if rest.beyond == "identity":
            given = given + weights.sum(axis=1, keepdims=True).astype(compute) * _wide(rows)
    if rest.shared is not None:
        if rest.beyond == "shared":
            slots = namespace(rows).maximum(slots, -1)
            y = dispatch(rows, slots, weights, rest.shared, 0, 1, dtype=compute)
        else:
            y = _apply_shared(rows, rest.shared, rest.gate, dtype=compute)
        y += given
    elif given is routed:
        y = memory.empty(routed.shape, compute, like=routed)
        y[...] = given
    else:
        y = given
    y = apply_steps(y, rest.after)
    if rest.residual:
        y += _wide(rows)
    return y.astype(routed.dtype, copy=False)


def _wide(rows: Array) -> Array:
    return rows.astype(computing_dtype(rows.dtype), copy=False)


def _apply_shared(rows: Array, experts: Any, gate: Array | None, dtype: np.dtype) -> Array:
    """Every row through every shared expert: the kernel with a routing to all of them."""
    xp, count = namespace(rows), len(experts)
    everyone = xp.broadcast_to(xp.arange(count, dtype=np.int32), (len(rows), count))
    weights = None
    if gate is not None:
        with np.errstate(over="ignore"):
            taken = memory.aligned(rows.astype(gate.dtype, copy=False))
            weights = 1 / (1 + xp.exp(-(taken @ memory.aligned(gate))))
        weights = xp.broadcast_to(weights[:, None], everyone.shape)
    return dispatch(rows, everyone, weights, experts, 0, 1, dtype=dtype)
