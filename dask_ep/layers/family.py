"""How is a family of models described?

By a `Family`: how the tensors of its MoE blocks are called, which keys of ``config.json`` hold the
sizes, which `Router` it has, what is shared, and which layers are MoE. Values are constants, or
looked up in the config by `Key`, `Product` or `By`. The known families are in `families.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Config = Mapping[str, Any]


class MissingKey(ValueError):
    """A config has none of the keys that hold a value."""


# --- values that a config holds ----------------------------------------------------------------


class Key:
    """The value of the first of some config keys that exists, else the default.

    `null` is what a null in the config stands for; one that is None counts as missing.
    """

    def __init__(self, *names: str, null: Any = None, **default: Any):
        self.names, self.null, self.default = names, null, default

    def find(self, config: Config, layer: int) -> Any:
        for name in self.names:
            value = config.get(name)
            if value is None and name in config:
                value = self.null
            if value is not None:
                if isinstance(value, list) and layer >= len(value):
                    raise ValueError(
                        f"config.json key {name!r} must have one entry per layer, but has "
                        f"{len(value)} and layer {layer} is asked for"
                    )
                return value[layer] if isinstance(value, list) else value
        if "default" in self.default:
            return self.default["default"]
        raise MissingKey(
            f"config.json must have {' or '.join(map(repr, self.names))} (null counts as missing), "
            f"but has only {', '.join(sorted(k for k, v in config.items() if v is not None))}"
        )


@dataclass(frozen=True)
class Product:
    """The product of some values."""

    factors: tuple[Any, ...]

    def find(self, config: Config, layer: int) -> int:
        product = 1
        for factor in self.factors:
            product *= find(factor, config, layer)
        return product


@dataclass(frozen=True)
class By:
    """The value that belongs to what a config key says."""

    key: Key
    values: Mapping[Any, Any]

    def find(self, config: Config, layer: int) -> Any:
        case = self.key.find(config, layer)
        if case not in self.values:
            raise ValueError(
                f"config.json key {self.key.names[0]!r} must be one of "
                f"{', '.join(map(repr, self.values))}, but is {case!r}"
            )
        return find(self.values[case], config, layer)


def find(value: Any, config: Config, layer: int) -> Any:
    """Look a value up in a config, if that is where it is; a list there has one entry a layer."""
    return value.find(config, layer) if isinstance(value, (Key, Product, By)) else value


# --- how experts are stored -----------------------------------------------------------------


@dataclass(frozen=True)
class PerExpert:
    """Three matrices (out, in) per expert, ``{e}`` being its number."""

    gate: str
    up: str
    down: str


@dataclass(frozen=True)
class Fused:
    """All experts in one array (E, ...) per weight, gate and up in one matrix.

    `transposed` is (E, out, in). `biases`: each name with ``_bias`` behind it is there too.
    `packed`: MXFP4, so each name has ``_blocks`` and ``_scales`` behind it, and is not there.
    """

    gate_up: str
    down: str
    transposed: bool
    interleaved: bool = False
    biases: bool = False
    packed: bool = False


TensorLayout = PerExpert | Fused

# --- families -----------------------------------------------------------------------------------


def every_layer(config: Config, layer: int) -> bool:
    """Whether a layer is MoE, where all are."""
    return True


@dataclass(frozen=True)
class Shared:
    """An expert that every row goes through.

    Attributes
    ----------
    block : str
        Its matrices are ``{block}.gate_proj.weight``, ``up_proj`` and ``down_proj``.
    width : int, Key or Product
        Its hidden width; 0 means that there is none in this model.
    gate : str or None
        A tensor (1, d): the expert counts sigmoid(row · gate) instead of 1.
    biases : bool or Key
        Whether each of its matrices has a ``.bias`` as well as a ``.weight``.
    """

    block: str
    width: Any
    gate: str | None = None
    biases: Any = False


@dataclass(frozen=True)
class Family:
    """How the MoE blocks of some models are written down.

    Attributes
    ----------
    model_types : of ``config.json``, or of its ``text_config``
    blocks : names that the block may have, after ``...layers.{layer}.``
    num_experts, k, width : E, the experts of a row, and their hidden width
    router : arguments of `Router` besides E and k
    router_weight, router_bias, selection_bias : names that these tensors may have; none, if () is
    experts : layouts that the experts may have
    options : arguments of `Experts.gated` or `Experts.gated_fused`
    shared : Shared or None
    is_moe : whether a layer is MoE, from config and layer number
    pre_norm : whether the rows that the block gets were normalised just before, while the model
        adds the block's output to the rows as they were before that: so nearly all models do

    Examples
    --------
    A private family like Mixtral, with the router's weight called otherwise:

    >>> from dataclasses import replace
    >>> from dask_ep.layers.families import FAMILIES, find_family
    >>> mine = replace(find_family("mixtral", FAMILIES), model_types=("mine",),
    ...                router_weight=("my_gate.weight",))

    ``load_moe_layer(directory, layer, families=[mine])`` then reads its checkpoints.
    """

    model_types: tuple[str, ...]
    blocks: tuple[str, ...]
    num_experts: Any
    k: Any
    width: Any
    router: Mapping[str, Any]
    router_weight: tuple[str, ...]
    experts: tuple[TensorLayout, ...]
    router_bias: tuple[str, ...] = ()
    selection_bias: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(
        default_factory=lambda: {"activation": Key("hidden_act", default="silu")}
    )
    shared: Shared | None = None
    is_moe: Callable[[Config, int], bool] = every_layer
    pre_norm: bool = True
