"""What are the experts of a layer: their kind, weights and options?

`Experts` is data: a kind, and one array per weight with the experts along its first axis. Each
weight stays where it is (in a file, an array, a Dask array) until a rank loads its experts.

    Experts (all E)  ──.subset(ids)──>  Experts (a rank's)  ──.load()──>  LocalExperts
     handles of files                    still handles                    arrays, ready to compute
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from dask.base import normalize_token

from dask_ep.arrays.checks import is_float, is_number
from dask_ep.arrays.html import shows
from dask_ep.arrays.namespaces import Array
from dask_ep.experts.callables import CallableExperts
from dask_ep.experts.expert_kinds import EXPERT_KINDS
from dask_ep.experts.local_experts import LocalExperts, load_experts
from dask_ep.experts.weights import Weight, Weights
from dask_ep.kernel.bfloat16 import PARTS
from dask_ep.kernel.kinds import ACTIVATIONS
from dask_ep.storage.fingerprint import describe


class Experts(Weights):
    """The experts of a layer: their kind, and where the weights of each are.

    Made by `Experts.linear`, `Experts.mlp`, `Experts.gated`, `Experts.gated_fused` and
    `Experts.callables`. Each weight is (E, in, out), or (E, out, in) with ``transposed=True``:
    a NumPy array, a memory map, a path (``.npy``, a Zarr array, ``file.safetensors::tensor``),
    a Zarr array, a Source, a Dask array, or a list with one of these per expert. Biases are
    (E, out). Only headers are read when it is built.

    Attributes
    ----------
    kind : "linear", "mlp", "gated", "gated_fused" or "callables"
    num_experts : E
    d, d_out : widths of input and output rows; None for callables of unknown width
    hidden : f; None without a hidden layer
    dtype : of the weights as stored
    nbytes : bytes of all weights as stored

    Notes
    -----
    Weights are held in the computing dtype (float32, or float64 for float64 tokens) once they are
    loaded, in the orientation in which they are stored: products support both. Matrices of bfloat16
    stay bfloat16 where the CPU multiplies them faster (`dask_ep.kernel.bfloat16`).

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
        sizes = _bind_axes(kind, weights, options.get("transposed", False))
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
        output_scale: Any = None,
        transposed: bool = False,
        limit: float | None = None,
        alpha: float = 1.0,
        up_offset: float = 0.0,
        clamp_after: bool = False,
        soft_caps: tuple[float, float] | None = None,
        output_norm_eps: float | None = None,
        apply_router_weight_on_input: bool = False,
    ) -> Experts:
        """``(activation(rows @ gate) * (rows @ up)) @ down``: SwiGLU and its variants.

        Parameters
        ----------
        gate, up : (E, d, f)
        down : (E, f, d_out)
        activation : "silu", "gelu", "gelu_tanh", "relu" or "relu2"
        gate_bias, up_bias, down_bias : (E, f), (E, f), (E, d_out), optional
        transposed : whether the matrices are (E, out, in)
        limit : before the activation, gate = min(gate, limit), up = clip(up, -limit, limit)
        alpha : silu is gate * sigmoid(alpha * gate)
        up_offset : added to up after it is clamped
        clamp_after : whether the activation of the gate is clamped instead of the gate
        soft_caps : of the gate and of up, with silu: cap * tanh(gate / cap) * sigmoid(alpha * gate)
            times cap * tanh(up / cap)
        output_scale, output_norm_eps : (E, d_out) and a number, optional: the output is multiplied
            by the scale, and then divided by sqrt(mean(y**2) + output_norm_eps)
        apply_router_weight_on_input : whether the top-k weight multiplies the expert's input
            (as in Llama 4) instead of its output
        """
        weights = {"gate": gate, "up": up, "down": down, "output_scale": output_scale}
        weights |= {"gate_bias": gate_bias, "up_bias": up_bias, "down_bias": down_bias}
        return cls._of(
            "gated", weights, transposed=transposed, activation=activation, limit=limit,
            alpha=alpha, up_offset=up_offset, clamp_after=clamp_after, soft_caps=soft_caps,
            output_norm_eps=output_norm_eps,
            apply_router_weight_on_input=apply_router_weight_on_input,
        )  # fmt: skip

    @classmethod
    def gated_fused(
        cls,
        gate_up: Any,
        down: Any,
        *,
        interleaved: bool = False,
        gate_up_bias: Any = None,
        down_bias: Any = None,
        output_scale: Any = None,
        activation: str = "silu",
        transposed: bool = False,
        limit: float | None = None,
        alpha: float = 1.0,
        up_offset: float = 0.0,
        clamp_after: bool = False,
        soft_caps: tuple[float, float] | None = None,
        output_norm_eps: float | None = None,
        apply_router_weight_on_input: bool = False,
    ) -> Experts:
        """Like `gated`, with gate and up in one (E, d, 2 f) matrix.

        Gate is the first half of its columns, or the even ones if `interleaved`; a bias is split
        in the same way.
        """
        weights = {"gate_up": gate_up, "down": down, "output_scale": output_scale}
        weights |= {"gate_up_bias": gate_up_bias, "down_bias": down_bias}
        return cls._of(
            "gated_fused", weights, transposed=transposed, interleaved=interleaved,
            activation=activation, limit=limit, alpha=alpha, up_offset=up_offset,
            clamp_after=clamp_after, soft_caps=soft_caps, output_norm_eps=output_norm_eps,
            apply_router_weight_on_input=apply_router_weight_on_input,
        )  # fmt: skip

    @staticmethod
    def callables(
        functions: Sequence[Callable[[Array], Array]], d_out: int | None = None
    ) -> CallableExperts:
        """A user's own functions (m, d) -> (m, d_out), one per expert; m may be 0.

        Without `d_out`, output rows are as wide as input rows. NumPy rows are read-only: they may
        be those of the token chunk itself, so copy them before changing them.
        """
        return CallableExperts(tuple(functions), d_out)

    @classmethod
    def _of(cls, kind: str, weights: dict[str, Any], **options: Any) -> Experts:
        _check_options(options)
        return cls(kind, _opened(kind, weights), options)

    def with_precision(self, precision: str) -> Experts:
        """Return the same experts with another precision of products with bfloat16 matrices.

        Parameters
        ----------
        precision : "float32" or "bfloat16"
            How a GPU, or a CPU that multiplies bfloat16 faster, represents the float32 factors of
            bfloat16 matrices. "float32", the default: as three bfloat16 numbers each, for the
            accuracy of float32 products. "bfloat16": as one, rounded, as a model in bfloat16
            computes (errors of about 2e-3 of the largest value); on a GPU this also rounds all
            experts to the dtype of 16-bit tokens. Other hardware always multiplies in float32.
        """
        if precision not in PARTS:
            raise ValueError(f"precision must be one of {', '.join(PARTS)}, not {precision!r}")
        if precision == self.precision:
            return self
        return type(self)(self.kind, self.weights, {**self.options, "precision": precision})

    # --- properties ---

    @property
    def precision(self) -> str:
        """How exact products in 16 bits are, see `with_precision`."""
        return self.options.get("precision", "float32")

    def __repr__(self) -> str:
        hidden = "" if self.hidden is None else f", hidden={self.hidden}"
        return (
            f"Experts({self.kind}, num_experts={self.num_experts}, d={self.d}{hidden}, "
            f"d_out={self.d_out}, dtype={self.dtype}, nbytes={self.nbytes})"
        )

    _repr_html_ = shows("kind", "num_experts", "d", "hidden", "d_out", "dtype", "nbytes", "options")

    def __dask_tokenize__(self) -> object:
        return normalize_token(("Experts", self.kind, self.weights, self.options))

    def fingerprint(self) -> dict[str, Any]:
        """Identify these experts by kind, options and weights, not by how they are held."""
        return describe(vars(self))

    # --- a rank's part ---

    def subset(self, ids: Sequence[int]) -> Experts:
        """Select the experts `ids`, in order; -1 is an empty place, to which no row is routed."""
        weights = {name: weight.subset(ids) for name, weight in self.weights.items()}
        return type(self)(self.kind, weights, self.options)

    def detached(self) -> Experts:
        """The same without its Dask arrays, whose values are then passed to `load` as `given`."""
        weights = {name: weight.detached() for name, weight in self.weights.items()}
        return type(self)(self.kind, weights, self.options)

    build = load_experts

    def load(
        self,
        experts: Sequence[int] | None = None,
        xp: Any = np,
        dtype: Any = np.float32,
        given: dict[str, Sequence[np.ndarray]] | None = None,
    ) -> LocalExperts:
        """Read experts, and nothing else, into the memory in which they will compute.

        Parameters
        ----------
        experts : their indices, in order, -1 for an empty place; all experts by default
        xp : the array namespace of the tokens, NumPy or CuPy
        dtype : the computing dtype
        given : values of the weights that are Dask arrays

        Returns
        -------
        LocalExperts, a sequence: the `expert_Ws` of the kernel

        Notes
        -----
        Each weight is copied to a device once, as stored, converted there, and never copied back.
        """
        chosen = self if experts is None else self.subset(experts)
        given = given or {
            name: array.compute(scheduler="sync") for name, array in chosen.collections().items()
        }
        local = LocalExperts(chosen, xp.__name__, np.dtype(dtype), given)
        local[0]
        return local


# --- checks ---------------------------------------------------------------------------------------


def as_experts(experts: Any) -> Experts | CallableExperts:
    """Convert what users pass as experts: a bare (E, d, d_out) array or list of matrices is linear.

    Raises
    ------
    TypeError
        If it is none of these; the message lists what is accepted.
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


def _check_options(options: dict[str, Any]) -> None:
    activation = options.get("activation", "silu")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {list(ACTIVATIONS)}, not {activation!r}")
    for name in ("limit", "alpha", "up_offset", "output_norm_eps"):
        number = options.get(name)
        if number is not None and not is_number(number):
            raise ValueError(f"{name} must be a finite number, not {number!r}")
    caps = options.get("soft_caps")
    good = caps is None or all(is_number(cap) and cap > 0 for cap in caps)
    if caps is not None and not (good and activation == "silu" and len(caps) == 2):
        raise ValueError(
            "soft_caps must be two numbers above 0, of the gate and of up, and the activation "
            f"silu, but they are {caps!r} with {activation}"
        )
    eps = options.get("output_norm_eps")
    if eps is not None and not eps > 0:
        raise ValueError(f"output_norm_eps must be a number above 0, or None, not {eps!r}")
    on_input = options.get("apply_router_weight_on_input", False)
    if not isinstance(on_input, bool):
        raise ValueError(f"apply_router_weight_on_input must be True or False, not {on_input!r}")


def _opened(kind: str, weights: dict[str, Any]) -> dict[str, Weight]:
    """Open the weights that are given; raise if a matrix is missing."""
    if missing := [name for name in EXPERT_KINDS[kind].matrices if weights[name] is None]:
        raise TypeError(f"{', '.join(missing)} must be given, not None")
    given = {name: Weight.of(w, name) for name, w in weights.items() if w is not None}
    for name, weight in given.items():
        if not is_float(weight.dtype):
            raise TypeError(f"{name} must hold floats, but has dtype {weight.dtype}")
    return given


def _bind_axes(kind: str, weights: dict[str, Weight], transposed: bool) -> dict[str, int]:
    """Return the size of every axis letter; an error shows all shapes."""
    in_out = {name: tuple(EXPERT_KINDS[kind].weights[name].split()) for name in weights}
    axes = {name: of[::-1] if transposed else of for name, of in in_out.items()}
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
        raise ValueError(f"there must be at least one {kind} expert, but the weights hold none")
    return sizes
