"""How does a rank hold its experts in memory?"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from dask_ep.arrays import memory
from dask_ep.arrays.namespaces import Array, namespace
from dask_ep.experts.expert_kinds import GATE_OPTIONS
from dask_ep.experts.together import Together
from dask_ep.experts.weights import Weight
from dask_ep.kernel.expert import Expert, Linear, laid_out
from dask_ep.kernel.kinds import Affine, Gated, Mlp, Normed, Summed

if TYPE_CHECKING:
    from dask_ep.experts.experts import Experts


Builder = Callable[[dict[str, Any], dict[str, Any]], Expert]
"""(arrays of an expert by the names of its weights, options) -> the expert."""

HIDDEN_COLUMNS = 2048
"""Hidden columns that are computed together on the CPU: 1024 rows of them stay in the last-level
cache; with fewer rows per product, packing the matrices would cost a tenth of its speed."""


COPIED_BYTES = 64 << 20
"""Bytes of experts that reading threads may have in memory both as read and as they compute: as
much as a thread's tiles take later."""


def numbers_at_once(experts: Any) -> int:
    """Numbers in the largest matrix of one product on the CPU, at most."""
    inner = experts.hidden
    return experts.d * (experts.d_out if inner is None else min(inner, HIDDEN_COLUMNS))


class LocalExperts(Sequence[Expert]):
    """A rank's experts in memory, in the order of its places.

    Dask is told its true size in memory. A copy in another process does not contain the weights
    of files: they are read again there when the first is used.
    """

    def __init__(
        self, experts: Experts, xp: str, dtype: np.dtype, given: dict[str, Sequence[np.ndarray]]
    ):
        self._origin = (experts, xp, dtype, given)
        self.nbytes = experts.held_bytes(dtype, on_device=xp != "numpy")
        self._lock = Lock()
        self._experts: list[Expert] | None = None

    def _loaded(self) -> list[Expert]:
        with self._lock:
            if self._experts is None:
                experts, name, dtype, given = self._origin
                self._experts = experts.build(import_module(name), dtype, dict(given))
        return self._experts

    @property
    def on_device(self) -> bool:
        """Whether the weights are on a device, once they are loaded."""
        return self._origin[1] != "numpy"

    def __len__(self) -> int:
        return self._origin[0].num_experts

    def __getitem__(self, e: Any) -> Any:
        return (self._experts or self._loaded())[e]

    def __sizeof__(self) -> int:
        return object.__sizeof__(self) + self.nbytes

    def __reduce__(self) -> tuple[Any, ...]:
        return LocalExperts, self._origin


def load_experts(
    experts: Experts, xp: Any, dtype: np.dtype, given: dict[str, Sequence[np.ndarray]]
) -> list[Expert]:
    """Load the experts of all places, in their order.

    `given` holds, by the name of a weight, what has been read of it: an array for each expert that
    a place holds, in their order. What is not in it is read here. Arrays are removed from `given`
    when they are used, so that at most one expert per thread is in memory both as it was read and
    as it computes, where these differ.
    """
    if xp is np:
        stacks = _read_each(experts, dtype, given)
        build = BUILDERS[experts.kind]
    else:
        stacks = _read_to_device(experts, xp, dtype, given)
        build = BUILDERS["gated" if "gate_up" in stacks else experts.kind]
    built = Together(_steps(experts, stacks, build))
    if xp is np:
        built.invite(COPIED_BYTES // max(experts.loaded_bytes(dtype), 1))
    return built.results()


def _steps(
    experts: Experts, stacks: dict[str, list[Array | None]], build: Builder
) -> Iterator[Callable[[], Expert]]:
    """How to build each expert from its arrays, which are moved from the stacks to the step."""
    for _ in range(experts.num_experts):
        arrays = {name: stack.pop(0) for name, stack in stacks.items()}
        if all(a is None for a in arrays.values()):
            yield partial(_EmptyPlace, experts)
        else:
            yield partial(build, arrays, experts.options)


def _read_each(
    experts: Experts, dtype: np.dtype, given: dict[str, Sequence[np.ndarray]]
) -> dict[str, list[Array | None]]:
    """Read the experts in order, which is their order in most files, matrix by matrix."""
    values = {name: deque(given.pop(name)) for name in experts.weights if name in given}

    def steps() -> Iterator[Callable[[], list[Array | None]]]:
        for place in range(experts.num_experts):
            for name, weight in experts.weights.items():
                one = weight.subset([place])
                held = name in values and one.ids[0] >= 0
                yield partial(one.read, dtype, [values[name].popleft()] if held else None)

    reading = Together(steps())
    with experts.joined() as is_remote:
        if not is_remote and experts.num_experts > 1:  # one alone is decoded where it is needed
            reading.invite()
        read = [one for (one,) in reading.results()]
    count = len(experts.weights)
    return {name: read[i::count] for i, name in enumerate(experts.weights)}


def _read_to_device(
    experts: Experts, xp: Any, dtype: np.dtype, given: dict[str, Sequence[np.ndarray]]
) -> dict[str, list[Array | None]]:
    """Read the experts to a device, gate and up into one matrix; arrays on the device stay there.

    All experts of one weight are one allocation, which is freed with the last of them.
    """
    weights = experts.weights
    if any(weight.on_device for weight in weights.values()):
        read = {name: weight.read(dtype, given.get(name)) for name, weight in weights.items()}
        stacks = {n: [None if a is None else xp.asarray(a) for a in s] for n, s in read.items()}
        return stacks if "gate_up" not in stacks else _side_by_side(stacks, experts.options)
    axis = 0 if experts.options.get("transposed", False) else 1
    stacks, targets = {}, {}
    one = partial(Weight.loaded_dtype, dtype=dtype, on_device=True)
    for name, weight in weights.items():
        shape = weight.shape[1:]
        if name in ("gate", "gate_bias"):
            along = 0 if len(shape) == 1 else axis
            whole = (*shape[:along], 2 * shape[along], *shape[along + 1 :])
            partner = weights[name.replace("gate", "up")]
            pair = stacks[name.replace("gate", "gate_up")] = _allocate(
                xp, weight, whole, max(one(weight), one(partner), key=lambda kind: kind.itemsize)
            )
            halves = [(None, None) if a is None else _halves(a, along) for a in pair]
            targets[name] = [gate for gate, _ in halves]
            targets[name.replace("gate", "up")] = [up for _, up in halves]
        elif name not in targets:
            targets[name] = stacks[name] = _allocate(xp, weight, shape, one(weight))
    for name, weight in weights.items():
        weight.fill(targets[name], given.get(name))
    return _side_by_side(stacks, experts.options) if "gate_up" in stacks else stacks


def _allocate(
    xp: Any, weight: Weight, shape: tuple[int, ...], dtype: np.dtype
) -> list[Array | None]:
    """One block of device memory for one weight of all experts that are held."""
    held = sum(e >= 0 for e in weight.ids)
    stack = iter(xp.empty((held, *shape), dtype=dtype))
    return [next(stack) if e >= 0 else None for e in weight.ids]


def _side_by_side(
    stacks: dict[str, list[Array | None]], options: dict[str, Any]
) -> dict[str, list[Array | None]]:
    """Put gate and up side by side if they are interleaved."""
    if not options.get("interleaved", False):
        return stacks
    axis = 0 if options["transposed"] else 1
    stacks["gate_up"] = [None if a is None else _sorted_out(a, axis) for a in stacks["gate_up"]]
    if "gate_up_bias" in stacks:
        biases = stacks["gate_up_bias"]
        stacks["gate_up_bias"] = [None if a is None else _sorted_out(a, 0) for a in biases]
    return stacks


def _sorted_out(w: Array, axis: int) -> Array:
    whole = memory.empty(w.shape, w.dtype, like=w)
    for half, first in zip(_halves(whole, axis), (0, 1), strict=True):
        half[...] = w[first::2] if axis == 0 else w[:, first::2]
    return whole


class _EmptyPlace(Expert):
    """A place that holds no expert."""

    def __init__(self, experts: Experts):
        self.d, self.d_out = experts.d, experts.d_out

    def __call__(self, rows: Array, out: Array | None = None) -> Array:
        refuse_rows(rows)


def refuse_rows(rows: Array) -> None:
    raise ValueError(
        f"{len(rows)} rows are routed to an empty place, which holds no expert; "
        "the routing must be rewritten by the placement that made the place"
    )


# --- from arrays to experts that compute -------------------------------------------------------


def _product(w: Array, bias: Array | None, options: dict[str, Any]) -> Expert:
    w, precision = laid_out(w), options.get("precision", "float32")
    return Linear(w, precision) if bias is None else Affine(w, bias, precision)


def _linear(arrays: dict[str, Array], options: dict[str, Any]) -> Expert:
    return _product(_oriented(arrays.pop("w"), options), arrays.get("bias"), options)


def _mlp(arrays: dict[str, Array], options: dict[str, Any]) -> Expert:
    activation = options["activation"]
    return _by_hidden_columns(
        arrays, options, lambda part: Mlp(part["up"], part["down"], activation)
    )


def _gated(arrays: dict[str, Array], options: dict[str, Any]) -> Expert:
    chosen = {name: options[name] for name in GATE_OPTIONS}

    def build(part: dict[str, Expert]) -> Expert:
        gate = part["gate_up" if "gate_up" in part else "gate"]
        return Gated(gate, part.get("up"), part["down"], **chosen)

    expert = _by_hidden_columns(arrays, options, build)
    scale, eps = arrays.get("output_scale"), options["output_norm_eps"]
    return expert if scale is None and eps is None else Normed(expert, scale, eps)


def _by_hidden_columns(
    arrays: dict[str, Array],
    options: dict[str, Any],
    build: Callable[[dict[str, Expert]], Expert],
) -> Expert:
    """Build an expert of at most `HIDDEN_COLUMNS`, or a sum of several with a part of them each.

    Takes the matrices out of `arrays`, so that each is freed once it is laid out.
    """
    down = _oriented(arrays["down"], options)
    hidden, on_host = down.shape[0], namespace(down) is np
    del down
    step = HIDDEN_COLUMNS if on_host else max(hidden, 1)
    parts: list[dict[str, Expert]] = [{} for _ in range(0, max(hidden, 1), step)]
    for name in [name for name, w in arrays.items() if w.ndim == 2]:
        w, bias = _oriented(arrays.pop(name), options), arrays.get(f"{name}_bias")
        for n, part in enumerate(parts):
            columns = slice(n * step, (n + 1) * step) if len(parts) > 1 else slice(None)
            if name == "down":
                part[name] = _product(w[columns], bias if n == 0 else None, options)
            else:
                some = None if bias is None else bias[columns]
                part[name] = _product(w[:, columns], some, options)
        del w
    return build(parts[0]) if len(parts) == 1 else Summed([build(part) for part in parts])


def _gated_fused(arrays: dict[str, Array], options: dict[str, Any]) -> Expert:
    arrays = dict(arrays)
    axis = 0 if options["transposed"] else 1
    split = _deinterleave if options["interleaved"] else _halves
    arrays["gate"], arrays["up"] = split(arrays.pop("gate_up"), axis)
    if "gate_up_bias" in arrays:
        arrays["gate_bias"], arrays["up_bias"] = split(arrays.pop("gate_up_bias"), 0)
    return _gated(arrays, options)


def _oriented(w: Array, options: dict[str, Any]) -> Array:
    return w.T if options["transposed"] else w


def _halves(w: Array, axis: int) -> tuple[Array, Array]:
    f = w.shape[axis] // 2
    return (w[:f], w[f:]) if axis == 0 else (w[:, :f], w[:, f:])


def _deinterleave(w: Array, axis: int) -> tuple[Array, Array]:
    """Split into contiguous matrices: products with every other column would copy at each use."""
    pair = []
    for first in (0, 1):
        alternate = w[first::2] if axis == 0 else w[:, first::2]
        half = memory.empty(alternate.shape, w.dtype, like=w)
        half[...] = alternate
        pair.append(half)
    return pair[0], pair[1]


BUILDERS: dict[str, Builder] = {
    "linear": _linear,
    "mlp": _mlp,
    "gated": _gated,
    "gated_fused": _gated_fused,
}
