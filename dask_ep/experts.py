"""What is an expert, and where do its weights lie?

`Experts` is data: a kind, and one array per weight with the experts along its first axis, each left
where it lies (a file, an array, a Dask array) until a rank asks for its own.

    Experts (all E)  ──.subset(ids)──>  Experts (a rank's)  ──.load()──>  LocalExperts
     handles of files                    still handles                    arrays, ready to compute
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from threading import Lock
from typing import Any
from uuid import uuid4

import dask.array as da
import numpy as np
from dask.base import normalize_token

from dask_ep import memory
from dask_ep.arrays import is_array
from dask_ep.dispatch import Array, Expert, Linear, is_float, namespace
from dask_ep.kinds import ACTIVATIONS, Affine, Gated, Mlp
from dask_ep.sources import ArraySource, Source, open_source

WEIGHTS = {
    "linear": {"w": "d o", "bias": "o"},
    "mlp": {"up": "d f", "up_bias": "f", "down": "f o", "down_bias": "o"},
    "gated": {
        "gate": "d f",
        "gate_bias": "f",
        "up": "d f",
        "up_bias": "f",
        "down": "f o",
        "down_bias": "o",
    },
    "gated_fused": {"gate_up": "d 2f", "gate_up_bias": "2f", "down": "f o", "down_bias": "o"},
}
"""The weights of each kind and their axes after the first: d in, f hidden, o out."""


class Weight:
    """One weight of every expert.

    `parts` is a Source or Dask array (E, ...), or a tuple of Sources, one per expert.
    """

    def __init__(self, parts: Source | da.Array | tuple[Source, ...], ids: range | tuple[int, ...]):
        self.parts, self.ids = parts, ids

    @classmethod
    def of(cls, obj: Any, name: str) -> Weight:
        """Take whatever weights come in; lists have one entry per expert."""
        if isinstance(obj, Weight):
            return obj
        if isinstance(obj, (list, tuple)):
            if any(isinstance(part, da.Array) for part in obj):
                return cls.of(da.stack([_as_dask(part) for part in obj]), name)
            parts = tuple(_source(part, f"{name}[{e}]") for e, part in enumerate(obj))
            if len({part.shape for part in parts}) > 1:
                odd = next(e for e, part in enumerate(parts) if part.shape != parts[0].shape)
                raise ValueError(
                    f"all experts must have weights of one shape, but {name}[{odd}] is "
                    f"{parts[odd].shape} and {name}[0] is {parts[0].shape}"
                )
            return cls(parts, range(len(parts)))
        parts = obj if isinstance(obj, da.Array) else _source(obj, name)
        if parts.ndim == 0:
            raise ValueError(f"{name} must have the experts along its first axis, but is a number")
        return cls(parts, range(parts.shape[0]))

    @property
    def shape(self) -> tuple[int, ...]:
        """(E, ...) of the experts held here."""
        one = self.parts[0].shape if isinstance(self.parts, tuple) else self.parts.shape[1:]
        return (len(self.ids), *one)

    @property
    def dtype(self) -> np.dtype:
        return (self.parts[0] if isinstance(self.parts, tuple) else self.parts).dtype

    @property
    def nbytes(self) -> int:
        """Bytes as stored, of the experts held here."""
        if isinstance(self.parts, tuple):
            return sum(self.parts[e].nbytes for e in self.ids if e >= 0)
        held = sum(e >= 0 for e in self.ids)
        return held * self.parts.nbytes // max(self.parts.shape[0], 1)

    def subset(self, ids: Sequence[int]) -> Weight:
        """Keep the experts `ids` (positions here; -1 stays an empty slot)."""
        ids = tuple(self.ids[e] if e >= 0 else -1 for e in ids)
        if isinstance(self.parts, ArraySource) and ids and min(ids) >= 0:
            low, high = min(ids), max(ids) + 1  # so that a task carries this rank's part alone
            part = ArraySource(self.parts.array[low:high], self.parts.name)
            return Weight(part, tuple(e - low for e in ids))
        if isinstance(self.parts, tuple):
            parts = tuple(self.parts[e] for e in ids if e >= 0) or self.parts[:1]
            renumbered = iter(range(len(parts)))
            return Weight(parts, tuple(next(renumbered) if e >= 0 else -1 for e in ids))
        return Weight(self.parts, ids)

    def collection(self) -> da.Array | None:
        """The Dask array that holds these experts in one chunk, if that is where they lie."""
        if not isinstance(self.parts, da.Array):
            return None
        return self.parts[[e for e in self.ids if e >= 0]].rechunk(-1)

    def detached(self) -> Weight:
        """The same without its Dask array, for a task that gets it as an argument."""
        if not isinstance(self.parts, da.Array):
            return self
        return Weight(_Detached(self.parts.shape, self.parts.dtype), self.ids)

    def read(self, dtype: np.dtype, given: np.ndarray | None = None) -> list[np.ndarray | None]:
        """Read one array per expert, None for an empty slot; each converted by itself."""
        read, arrays = iter(() if given is None else given), []
        for e in self.ids:
            if e < 0:
                arrays.append(None)
            elif given is not None:
                arrays.append(next(read))
            elif isinstance(self.parts, tuple):
                part = self.parts[e]
                arrays.append(part.read(0, part.shape[0]))
            else:
                arrays.append(self.parts.read(e, e + 1)[0])
        return [None if a is None else a.astype(dtype, copy=False) for a in arrays]

    def __dask_tokenize__(self) -> object:
        return normalize_token((self.parts, tuple(self.ids)))


class _Detached(Source):
    """Stands for a Dask array whose value comes as a task's argument."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype):
        self.shape, self.dtype, self.name = shape, dtype, "Dask array"

    def read(self, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        raise TypeError("a Dask array of weights is read by the graph: pass its value to load")

    def fingerprint(self) -> dict[str, Any]:
        return self._describe()


class Experts:
    """The experts of a layer: their kind, and where the weights of each lie.

    Made by `Experts.linear`, `Experts.mlp`, `Experts.gated`, `Experts.gated_fused` and
    `Experts.callables`. Each weight is (E, in, out), or (E, out, in) with ``transposed=True``:
    a NumPy array, a memory map, a path (``.npy``, a Zarr array, ``file.safetensors::tensor``),
    a Zarr array, a Source, a Dask array, or a list with one of these per expert. Biases are
    (E, out). Building one reads headers alone.

    Attributes
    ----------
    kind : "linear", "mlp", "gated", "gated_fused" or "callables"
    num_experts : E
    d, d_out : widths of the rows that come and go; None for callables of unknown width
    hidden : f, None where there is no hidden layer
    dtype : of the weights as stored
    nbytes : bytes of all weights as stored

    Notes
    -----
    Weights are held in the computing dtype (float32, or float64 for float64 tokens) once they are
    loaded, in the orientation in which they are stored: products take either.

    Examples
    --------
    >>> import numpy as np
    >>> from dask_ep import Experts
    >>> experts = Experts.mlp(up=np.ones((4, 8, 16), "f4"), down=np.ones((4, 16, 8), "f4"))
    >>> experts.num_experts, experts.d, experts.hidden, experts.nbytes
    (4, 8, 16, 4096)
    >>> local = experts.load([2, 3])
    >>> local[0](np.ones((1, 8), "f4"))[0, :3]
    array([128., 128., 128.], dtype=float32)
    """

    def __init__(self, kind: str, weights: dict[str, Weight], options: dict[str, Any]):
        self.kind, self.weights, self.options = kind, weights, options
        axes = {
            name: reversed_axes(WEIGHTS[kind][name], options.get("transposed", False))
            for name in weights
        }
        sizes = _bind_axes(kind, weights, axes)
        self.num_experts, self.d, self.d_out = sizes["E"], sizes["d"], sizes["o"]
        self.hidden = sizes.get("f")

    # --- one constructor per kind ---

    @classmethod
    def linear(cls, w: Any, *, transposed: bool = False, bias: Any = None) -> Experts:
        """``rows @ w + bias``; w (E, d, d_out)."""
        return cls._of("linear", {"w": w, "bias": bias}, transposed=transposed)

    @classmethod
    def mlp(
        cls,
        up: Any,
        down: Any,
        *,
        activation: str = "relu",
        up_bias: Any = None,
        down_bias: Any = None,
        transposed: bool = False,
    ) -> Experts:
        """``activation(rows @ up) @ down``; up (E, d, f), down (E, f, d_out)."""
        weights = {"up": up, "down": down, "up_bias": up_bias, "down_bias": down_bias}
        return cls._of("mlp", weights, transposed=transposed, activation=activation)

    @classmethod
    def gated(
        cls,
        gate: Any,
        up: Any,
        down: Any,
        *,
        activation: str = "silu",
        gate_bias: Any = None,
        up_bias: Any = None,
        down_bias: Any = None,
        transposed: bool = False,
        limit: float | None = None,
        alpha: float = 1.0,
        up_offset: float = 0.0,
        weigh: str = "output",
    ) -> Experts:
        """``(activation(rows @ gate) * (rows @ up)) @ down``: SwiGLU and its relatives.

        Parameters
        ----------
        gate, up : (E, d, f)
        down : (E, f, d_out)
        activation : "silu", "gelu", "gelu_tanh", "relu" or "relu2"
        gate_bias, up_bias, down_bias : (E, f), (E, f), (E, d_out), optional
        transposed : the matrices are (E, out, in)
        limit : before the activation, gate = min(gate, limit), up = clip(up, -limit, limit)
        alpha : silu is gate * sigmoid(alpha * gate)
        up_offset : added to up after it is clamped
        weigh : what the top-k weight multiplies, "output" or "input" of the expert
        """
        weights = {
            "gate": gate,
            "up": up,
            "down": down,
            "gate_bias": gate_bias,
            "up_bias": up_bias,
            "down_bias": down_bias,
        }
        return cls._of(
            "gated",
            weights,
            transposed=transposed,
            activation=activation,
            limit=limit,
            alpha=alpha,
            up_offset=up_offset,
            weigh=weigh,
        )

    @classmethod
    def gated_fused(
        cls,
        gate_up: Any,
        down: Any,
        *,
        interleaved: bool = False,
        gate_up_bias: Any = None,
        down_bias: Any = None,
        activation: str = "silu",
        transposed: bool = False,
        limit: float | None = None,
        alpha: float = 1.0,
        up_offset: float = 0.0,
        weigh: str = "output",
    ) -> Experts:
        """As `gated`, with gate and up in one (E, d, 2 f) matrix.

        Their halves follow each other, or alternate (gate in the even columns) if `interleaved`;
        a bias is split in the same way.
        """
        weights = {
            "gate_up": gate_up,
            "down": down,
            "gate_up_bias": gate_up_bias,
            "down_bias": down_bias,
        }
        return cls._of(
            "gated_fused",
            weights,
            transposed=transposed,
            interleaved=interleaved,
            activation=activation,
            limit=limit,
            alpha=alpha,
            up_offset=up_offset,
            weigh=weigh,
        )

    @staticmethod
    def callables(
        functions: Sequence[Callable[[Array], Array]], d_out: int | None = None
    ) -> CallableExperts:
        """A user's own functions (m, d) -> (m, d_out), one per expert; m may be 0.

        Without `d_out` they give rows as wide as those that they get.
        """
        return CallableExperts(tuple(functions), d_out)

    @classmethod
    def _of(cls, kind: str, weights: dict[str, Any], **options: Any) -> Experts:
        activation, weigh = options.get("activation", "silu"), options.get("weigh", "output")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {list(ACTIVATIONS)}, not {activation!r}")
        if weigh not in ("output", "input"):
            raise ValueError(f'weigh must be "output" or "input", not {weigh!r}')
        given = {name: Weight.of(w, name) for name, w in weights.items() if w is not None}
        for name, weight in given.items():
            if not is_float(weight.dtype):
                raise TypeError(f"{name} must hold floats, but has dtype {weight.dtype}")
        return cls(kind, given, options)

    # --- what they are ---

    @property
    def dtype(self) -> np.dtype:
        return next(iter(self.weights.values())).dtype

    @property
    def nbytes(self) -> int:
        return sum(weight.nbytes for weight in self.weights.values())

    @property
    def parameters(self) -> int:
        """Numbers in one expert: twice as many FLOPs go into each row."""
        return sum(int(np.prod(weight.shape[1:])) for weight in self.weights.values())

    def __repr__(self) -> str:
        hidden = "" if self.hidden is None else f", hidden={self.hidden}"
        return (
            f"Experts({self.kind}, num_experts={self.num_experts}, d={self.d}{hidden}, "
            f"d_out={self.d_out}, dtype={self.dtype}, nbytes={self.nbytes})"
        )

    def __dask_tokenize__(self) -> object:
        return normalize_token(("Experts", self.kind, self.weights, self.options))

    # --- a rank's part ---

    def subset(self, ids: Sequence[int]) -> Experts:
        """Keep some experts, in the order of `ids`; -1 is an empty slot, which no row may reach."""
        weights = {name: weight.subset(ids) for name, weight in self.weights.items()}
        return Experts(self.kind, weights, self.options)

    def collections(self) -> dict[str, da.Array]:
        """The weights that are Dask arrays, each the experts held here in one chunk."""
        found = {name: weight.collection() for name, weight in self.weights.items()}
        return {name: array for name, array in found.items() if array is not None}

    def detached(self) -> Experts:
        """The same without its Dask arrays, whose values `load` then gets as `given`."""
        weights = {name: weight.detached() for name, weight in self.weights.items()}
        return Experts(self.kind, weights, self.options)

    def load(
        self,
        experts: Sequence[int] | None = None,
        xp: Any = np,
        dtype: Any = np.float32,
        given: dict[str, np.ndarray] | None = None,
    ) -> LocalExperts:
        """Read experts, and nothing else, to where they will compute.

        Parameters
        ----------
        experts : their indices, in the order wanted, -1 for an empty slot; all without it
        xp : the array namespace of the tokens, NumPy or CuPy
        dtype : the computing dtype
        given : values of the weights that are Dask arrays

        Returns
        -------
        LocalExperts, a sequence: the `expert_Ws` of the kernel
        """
        chosen = self if experts is None else self.subset(experts)
        given = given or {
            name: array.compute(scheduler="sync") for name, array in chosen.collections().items()
        }
        local = LocalExperts(chosen, xp, np.dtype(dtype), given)
        local[0]
        return local


class CallableExperts:
    """Experts that are a user's functions; see `Experts.callables`."""

    kind = "callables"
    d = hidden = dtype = None
    nbytes = parameters = 0

    def __init__(self, functions: tuple[Callable[[Array], Array] | None, ...], d_out: int | None):
        for e, function in enumerate(functions):
            if function is not None and not callable(function):
                raise TypeError(f"expert {e} must be callable, but is a {type(function).__name__}")
        self.functions, self.d_out = functions, d_out

    @property
    def num_experts(self) -> int:
        return len(self.functions)

    def __dask_tokenize__(self) -> object:
        return normalize_token(("CallableExperts", self.functions, self.d_out))

    def subset(self, ids: Sequence[int]) -> CallableExperts:
        return CallableExperts(
            tuple(self.functions[e] if e >= 0 else None for e in ids), self.d_out
        )

    def collections(self) -> dict[str, da.Array]:
        return {}

    def detached(self) -> CallableExperts:
        return self

    def load(
        self,
        experts: Sequence[int] | None = None,
        xp: Any = np,
        dtype: Any = np.float32,
        given: dict[str, np.ndarray] | None = None,
    ) -> list[Callable[[Array], Array]]:
        chosen = self if experts is None else self.subset(experts)
        return [
            _EmptyFunction(self.d_out) if function is None else function
            for function in chosen.functions
        ]


class _EmptyFunction:
    """A slot that holds no function."""

    def __init__(self, d_out: int | None):
        self.d_out = d_out

    def __call__(self, rows: Array) -> Array:
        if len(rows):
            _refuse_rows(rows)
        return namespace(rows).empty((0, self.d_out or rows.shape[1]), dtype=rows.dtype)


class LocalExperts(Sequence):
    """A rank's experts in memory, in the order of its slots.

    Its size in memory is told honestly to Dask. Copied to another process it does not carry the
    weights of files along: they are read again from where they lie, when the first is asked for.
    """

    def __init__(self, experts: Experts, xp: Any, dtype: np.dtype, given: dict[str, np.ndarray]):
        self._origin = (experts, xp.__name__, dtype, given)
        self.nbytes = experts.parameters * experts.num_experts * dtype.itemsize
        self._lock = Lock()
        self._experts: list[Expert] | None = None

    def _loaded(self) -> list[Expert]:
        with self._lock:
            if self._experts is None:
                self._experts = _load(*self._origin)
        return self._experts

    def __len__(self) -> int:
        return self._origin[0].num_experts

    def __getitem__(self, e: int) -> Expert:
        return (self._experts or self._loaded())[e]

    def __sizeof__(self) -> int:
        return object.__sizeof__(self) + self.nbytes

    def __reduce__(self) -> tuple[Any, ...]:
        return _unloaded, self._origin


def _unloaded(
    experts: Experts, namespace_name: str, dtype: np.dtype, given: dict[str, np.ndarray]
) -> LocalExperts:
    return LocalExperts(experts, import_module(namespace_name), dtype, given)


def _load(
    experts: Experts, namespace_name: str, dtype: np.dtype, given: dict[str, np.ndarray]
) -> list[Expert]:
    xp = import_module(namespace_name)
    stacks = {name: weight.read(dtype, given.get(name)) for name, weight in experts.weights.items()}
    if xp is not np:
        stacks = {
            name: [None if a is None else xp.asarray(a) for a in stack]
            for name, stack in stacks.items()
        }
    build = BUILDERS[experts.kind]
    local = []
    for e in range(experts.num_experts):
        arrays = {name: stack[e] for name, stack in stacks.items()}
        empty = all(a is None for a in arrays.values())
        local.append(_EmptySlot(experts) if empty else build(arrays, experts.options))
    return local


class _EmptySlot(Expert):
    """A slot that holds no expert."""

    def __init__(self, experts: Experts):
        self.d, self.d_out = experts.d, experts.d_out

    def __call__(self, rows: Array, out: Array | None = None) -> Array:
        _refuse_rows(rows)


def _refuse_rows(rows: Array) -> None:
    raise ValueError(
        f"{len(rows)} rows are routed to an empty slot, which holds no expert; "
        "the routing must be rewritten by the placement that made the slot"
    )


# --- from arrays to experts that compute -------------------------------------------------------


def _product(w: Array, bias: Array | None) -> Expert:
    return Linear(w) if bias is None else Affine(w, bias)


def _linear(arrays: dict[str, Array], options: dict[str, Any]) -> Expert:
    return _product(_oriented(arrays["w"], options), arrays.get("bias"))


def _mlp(arrays: dict[str, Array], options: dict[str, Any]) -> Expert:
    up = _product(_oriented(arrays["up"], options), arrays.get("up_bias"))
    down = _product(_oriented(arrays["down"], options), arrays.get("down_bias"))
    return Mlp(up, down, options["activation"])


def _gated(arrays: dict[str, Array], options: dict[str, Any]) -> Expert:
    gate = _product(_oriented(arrays["gate"], options), arrays.get("gate_bias"))
    up = _product(_oriented(arrays["up"], options), arrays.get("up_bias"))
    down = _product(_oriented(arrays["down"], options), arrays.get("down_bias"))
    names = ("activation", "limit", "alpha", "up_offset", "weigh")
    return Gated(gate, up, down, **{name: options[name] for name in names})


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
    """Split into contiguous matrices: products of every other column would copy at each use."""
    pair = []
    for first in (0, 1):
        alternate = w[first::2] if axis == 0 else w[:, first::2]
        half = memory.empty(alternate.shape, w.dtype, like=w)
        half[...] = alternate
        pair.append(half)
    return pair[0], pair[1]


BUILDERS: dict[str, Callable[[dict[str, Array], dict[str, Any]], Expert]] = {
    "linear": _linear,
    "mlp": _mlp,
    "gated": _gated,
    "gated_fused": _gated_fused,
}


# --- what must hold ------------------------------------------------------------------------------


def as_experts(experts: Any) -> Experts | CallableExperts:
    """Take experts as users give them: a bare (E, d, d_out) array or list of matrices is linear.

    Raises
    ------
    TypeError
        If it is neither, saying what serves.
    """
    if isinstance(experts, (Experts, CallableExperts)):
        return experts
    if isinstance(experts, (list, tuple)) and experts and all(map(callable, experts)):
        return Experts.callables(experts)
    try:
        return Experts.linear(experts)
    except TypeError as error:
        raise TypeError(
            "experts must be an Experts (Experts.linear, .mlp, .gated, .gated_fused, .callables), "
            "an (E, d, d_out) array, a list of (d, d_out) matrices, or a list of callables, not "
            f"a {type(experts).__name__} ({error})"
        ) from error


def reversed_axes(axes: str, transposed: bool) -> tuple[str, ...]:
    """Axis letters of a weight after the first, last two swapped if it is (E, out, in)."""
    letters = tuple(axes.split())
    return letters[::-1] if transposed else letters


def _bind_axes(
    kind: str, weights: dict[str, Weight], axes: dict[str, tuple[str, ...]]
) -> dict[str, int]:
    """Give every axis letter its one size; an error shows all bindings."""
    sizes: dict[str, int] = {}
    for name, weight in weights.items():
        letters = ("E", *axes[name])
        if len(weight.shape) != len(letters):
            raise ValueError(
                f"{name} of {kind} experts must be ({', '.join(letters)}), "
                f"but has shape {weight.shape}"
            )
        for letter, size in zip(letters, weight.shape, strict=True):
            if letter == "2f":
                if size % 2:
                    raise ValueError(f"{name} holds gate and up, so {size} must be even")
                letter, size = "f", size // 2
            if sizes.setdefault(letter, size) != size:
                shapes = "; ".join(
                    f"{n} ({', '.join(('E', *axes[n]))}) = {w.shape}" for n, w in weights.items()
                )
                raise ValueError(
                    f"the weights of {kind} experts do not fit: axis {letter} is "
                    f"{sizes[letter]} and {size}. They are {shapes}"
                )
    if sizes["E"] == 0:
        raise ValueError(f"{kind} experts must be at least one, but there are none")
    return sizes


def _source(obj: Any, name: str) -> Source:
    """A Source of a weight; device arrays serve as they are."""
    if not isinstance(obj, np.ndarray) and is_array(obj):
        return _DeviceSource(obj, name)
    is_path = isinstance(obj, str) or hasattr(obj, "__fspath__")
    return open_source(obj) if is_path else open_source(obj, name)


def _as_dask(part: Any) -> da.Array:
    if isinstance(part, da.Array):
        return part
    source = open_source(part)
    return da.from_array(source.read(0, source.shape[0]), chunks=-1)


class _DeviceSource(Source):
    """Weights that are on a device already."""

    def __init__(self, array: Array, name: str):
        self.shape, self.dtype, self.name, self.array = array.shape, array.dtype, name, array
        self._uuid = uuid4().hex  # the content is not brought to the host to be hashed

    def read(self, start: int, stop: int, out: np.ndarray | None = None) -> Array:
        return self.array[start:stop]

    def fingerprint(self) -> dict[str, Any]:
        return self._describe() | {"uuid": self._uuid}
