"""How is a family of models described?

By a `Family`: the names of the tensors of its MoE blocks, the keys of ``config.json`` that hold the
sizes, its `Router`, its shared experts, and which layers are MoE. Values are constants, or looked
up in the config by `Key`, `By` and similar classes. The known families are in `families.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Config = Mapping[str, Any]


class MissingKey(ValueError):
    """A config has none of the keys that hold a value."""


ARCHITECTURE = "general.architecture"
"""GGUF's counterpart of ``model_type``; its value is the prefix of all keys of sizes."""


def config_place(config: Config) -> str:
    """Return what an error calls the place of a config's keys."""
    return "the metadata" if ARCHITECTURE in config else "config.json"


def key_of(config: Config, name: str) -> str:
    """Return a key as it is written there, in quotes."""
    return repr(f"{config[ARCHITECTURE]}.{name}" if ARCHITECTURE in config else name)


def missing(config: Config, names: tuple[str, ...]) -> MissingKey:
    """Return the error for a config that has none of some keys."""
    required = " or ".join(key_of(config, name) for name in names)
    if ARCHITECTURE in config:
        found = [key_of(config, name)[1:-1] for name in config if "." not in name]
        found = [name for name in found if not name.endswith((".model_type", ".moe_layers"))]
        return MissingKey(f"the metadata must have {required}, but has only {', '.join(found)}")
    found = sorted(name for name, value in config.items() if value is not None)
    return MissingKey(
        f"config.json must have {required} (null counts as missing), but has only "
        f"{', '.join(found)}"
    )


# --- values from the config --------------------------------------------------------------------


class Key:
    """The value of the first of some config keys that exists, or else the default.

    A list has one entry per layer. A null in the config becomes `null`, and counts as missing if
    that is None. With `off`, a value of 0, or a null in a list, becomes `off`: in a config these
    mean, for example, that a limit is switched off.
    """

    def __init__(self, *names: str, null: Any = None, **default: Any):
        self.names, self.null, self.default = names, null, default

    def find(self, config: Config, layer: int) -> Any:
        for name in self.names:
            value = look_up_key(config, name)
            value = self.null if value is None else value
            if value is not None and value is not ...:
                if isinstance(value, list) and layer >= len(value):
                    raise ValueError(
                        f"{config_place(config)} key {key_of(config, name)} must have one entry "
                        f"per layer, but has {len(value)}, and none for layer {layer}"
                    )
                value = value[layer] if isinstance(value, list) else value
                return self.default["off"] if "off" in self.default and not value else value
        if "default" in self.default:
            return self.default["default"]
        raise missing(config, self.names)


def look_up_key(config: Config, name: str) -> Any:
    """Return the value of a config key, `...` without one; ``outer.inner`` is that of an object."""
    value: Any = config
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return ...
        value = value.get(part)
    return value


@dataclass(frozen=True)
class Length:
    """The length of a config key's value: a list, or a string with one letter per layer."""

    names: tuple[str, ...]

    def find(self, config: Config, layer: int) -> int:
        found = [config[name] for name in self.names if isinstance(config.get(name), (list, str))]
        if not found:
            raise missing(config, self.names)
        return len(found[0])


@dataclass(frozen=True)
class Entry:
    """One entry of a list that has no entry per layer; a single value is returned as it is."""

    name: str
    index: int

    def find(self, config: Config, layer: int) -> Any:
        value = Key(self.name).find({self.name: [config.get(self.name)]}, 0)
        if isinstance(value, list) and self.index >= len(value):
            raise ValueError(
                f"{config_place(config)} key {key_of(config, self.name)} must have more than "
                f"{self.index} entries, but is {value!r}"
            )
        return value[self.index] if isinstance(value, list) else value


@dataclass(frozen=True)
class Power:
    """A power of a value."""

    base: Any
    exponent: float

    def find(self, config: Config, layer: int) -> float:
        return find(self.base, config, layer) ** self.exponent


@dataclass(frozen=True)
class Product:
    """The product of some values."""

    factors: tuple[Any, ...]

    def find(self, config: Config, layer: int) -> int:
        product = 1
        for factor in self.factors:
            number = find(factor, config, layer)
            if type(number) is not int:
                raise TypeError(f"a size must be a whole number, but is {number!r}")
            product *= number
        return product


@dataclass(frozen=True)
class By:
    """A value chosen by the value of a config key."""

    key: Key
    values: Mapping[Any, Any]

    def find(self, config: Config, layer: int) -> Any:
        case = self.key.find(config, layer)
        if case not in list(self.values):  # which compares; a list or an object has no hash
            raise ValueError(
                f"{config_place(config)} key {key_of(config, self.key.names[0])} must be one of "
                f"{', '.join(map(repr, self.values))}, but is {case!r}"
            )
        return find(self.values[case], config, layer)


LOOKED_UP = (Key, Length, Entry, Power, Product, By)


def find(value: Any, config: Config, layer: int) -> Any:
    """Return a constant, or look a value up in a config, where a list has one entry per layer."""
    if isinstance(value, tuple):
        return tuple(find(one, config, layer) for one in value)
    return value.find(config, layer) if isinstance(value, LOOKED_UP) else value


# --- how experts are stored -----------------------------------------------------------------

Names = Mapping[str, str]
"""Names of tensors, by the weights of `Experts` that they hold."""


@dataclass(frozen=True)
class TensorLayout:
    """How the weights of experts are stored.

    Attributes
    ----------
    names : tensor of each weight, ``{"gate": ..., "up": ..., "down": ...}``
        The weights determine the kind of experts, see `Experts`. A name with ``{e}`` is that of one
        expert; without it, the tensor has all of them, (E, ...).
    transposed : bool
        Each matrix is (out, in).
    interleaved : bool
        Gate and up alternate, if they are one matrix.
    biases : bool or Key
        Each weight has a bias, named with ``.bias`` instead of ``.weight``, or a final ``_bias``.
    packed : bool
        Weights are MXFP4: each is two tensors, named with a final ``_blocks`` and ``_scales``.
    flat : bool
        All experts are in one matrix (E * width, d) per weight, those of ``down`` not transposed.
    """

    names: Names
    transposed: bool = True
    interleaved: bool = False
    biases: Any = False
    packed: bool = False
    flat: bool = False

    @property
    def kind(self) -> str:
        """The kind of experts that have these weights."""
        if "gate_up" in self.names:
            return "gated_fused"
        return "gated" if "gate" in self.names else "mlp"


def below(prefix: str, names: Names) -> Names:
    """Add a prefix to some names."""
    return {weight: prefix + name for weight, name in names.items()}


NAMED = {"gate": "gate_proj.weight", "up": "up_proj.weight", "down": "down_proj.weight"}
NUMBERED = {"gate": "w1.weight", "up": "w3.weight", "down": "w2.weight"}
LINEAR_PAIR = {"gate_up": "input_linear.weight", "down": "output_linear.weight"}
UNGATED = {"up": "up_proj.weight", "down": "down_proj.weight"}
FUSED = {"gate_up": "experts.gate_up_proj", "down": "experts.down_proj"}
BY_NAME, OUT_IN = TensorLayout(below("experts.{e}.", NAMED)), TensorLayout(FUSED)

# --- families -----------------------------------------------------------------------------------


PER_TOKEN, MOE_WIDTH = Key("num_experts_per_tok"), Key("moe_intermediate_size")


def every_layer(config: Config, layer: int) -> bool:
    """Return True: all layers are MoE."""
    return True


@dataclass(frozen=True)
class MlpTypes:
    """Whether a layer is MoE according to ``mlp_layer_types``, if the config has that key.

    Otherwise layers are MoE from ``first_k_dense_replace`` on, by default `dense`, if
    ``moe_layer_freq`` agrees: every so many layers, or a list with one entry per layer.
    """

    dense: int = 0

    def __call__(self, config: Config, layer: int) -> bool:
        types = config.get("mlp_layer_types")
        if types is not None:
            return types[layer] != "dense"
        every = config.get("moe_layer_freq", 1)
        sparse = bool(every[layer]) if isinstance(every, list) else layer % every == 0
        names = ("first_k_dense_replace", "num_dense_layers", "dense_mlp_idx")
        first = Key(*names, default=self.dense)
        return sparse and layer >= first.find(config, layer)


@dataclass(frozen=True)
class Shared:
    """An expert that every row goes through.

    Attributes
    ----------
    block : str or tuple of str
        Prefix of the names of its tensors, or several that it may have.
    width : int, Key or Product
        Its hidden width; 0 means that the model has no shared expert.
    gate : str or None
        A tensor (1, d): the expert's output is multiplied by sigmoid(row · gate).
    biases : bool or Key
        Whether each of its matrices has a ``.bias`` as well as a ``.weight``.
    names : tuple of Names
        What its tensors may be called, after `block`.
    count : int or Key or None
        Number of shared experts, if each tensor is (count, ...); None for one expert, in matrices.
    interleaved : bool
        Gate and up alternate, if they are one matrix.
    options : Mapping or None
        Like those of `Family`, if they differ from the routed experts'.
    """

    block: str | tuple[str, ...]
    width: Any
    gate: str | None = None
    biases: Any = False
    names: tuple[Names, ...] = (NAMED,)
    count: Any = None
    interleaved: bool = False
    options: Mapping[str, Any] | None = None

    @property
    def layouts(self) -> list[TensorLayout]:
        """The layouts that its weights may have."""
        blocks = (self.block,) if isinstance(self.block, str) else self.block
        return [
            TensorLayout(
                below(f"{block}." * bool(block), names),
                interleaved=self.interleaved,
                biases=self.biases,
            )
            for block in blocks
            for names in self.names
        ]


@dataclass(frozen=True)
class StepRow:
    """A `RowStep` before or after the experts.

    Attributes
    ----------
    kind : as in `RowStep`
    names : names that its array may have
    to : of a linear step, the width of its output
    eps, offset, factor : as in `RowStep`
    bias : bool or Key, whether a linear step has a bias, named with ``.bias``, not ``.weight``
    there : bool or Key, whether the model has this step
    """

    kind: str
    names: tuple[str, ...] = ()
    to: Any = None
    eps: Any = 0.0
    offset: float = 0.0
    factor: Any = 1.0
    bias: Any = False
    there: Any = True


@dataclass(frozen=True)
class Family:
    """How the MoE blocks of some models are stored.

    Names of tensors are relative to the block; those that begin with ``/`` are relative to the
    layer. Defaults are what most models have.

    Attributes
    ----------
    model_types : of ``config.json``, or of its ``text_config``
    blocks : names that the block may have, after ``...layers.{layer}.``; ``""`` is the layer itself
    num_experts, k, width : E, experts per row, and their hidden width
    router : arguments of `Router` other than E and k
    router_weight, router_bias, selection_bias : names that these tensors may have; () for none
    router_weight_in_out : names of the router's weight if it is stored as (d, E)
    biased : bool or Key, whether there is a selection bias
    bias_rows : rows that the tensor of the selection bias may have, of which the first is used
    table : names of a table (vocabulary, k) of experts by token id, which a layer may have
    experts : layouts that the experts may have
    options : arguments of `Experts.gated` or `Experts.gated_fused`
    shared : Shared or None
    expert_size : width of the experts' input, if it is not d
    before, between, after, beyond : what happens around the experts, see `Around`
    beyond_experts : number of experts that the router has in addition to E
    per_expert_scale, input_scale : names of these tensors, see `MoELayer`
    output_scale : names of a row; the output_scale of each expert is 1 + row
    is_moe : whether a layer is MoE, from config and layer number
    num_layers, hidden_size : number of layers, and d
    not_read : tensors of the layer that are not read, as patterns of their names relative to the
        layer, and why; in addition to `families.NOT_READ`, for what many models have
    pre_norm : whether the block's input was normalised just before, while its output is added to
        the rows from before the norm, as in nearly all models

    Examples
    --------
    A private family like Mixtral, with another name for the router's weight:

    >>> from dataclasses import replace
    >>> from dask_ep.layers.families import FAMILIES, find_family
    >>> mine = replace(find_family("mixtral", FAMILIES), model_types=("mine",),
    ...                router_weight=("my_gate.weight",))

    ``load_moe_layer(directory, layer, families=[mine])`` then reads its checkpoints.
    """

    model_types: tuple[str, ...]
    num_experts: Any
    router: Mapping[str, Any]
    blocks: tuple[str, ...] = ("mlp",)
    k: Any = PER_TOKEN
    width: Any = MOE_WIDTH
    router_weight: tuple[str, ...] = ("gate.weight",)
    experts: tuple[TensorLayout, ...] = (BY_NAME, OUT_IN)
    router_weight_in_out: tuple[str, ...] = ()
    router_bias: tuple[str, ...] = ()
    selection_bias: tuple[str, ...] = ()
    biased: Any = True
    bias_rows: int = 1
    table: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(
        default_factory=lambda: {"activation": Key("hidden_act", default="silu")}
    )
    shared: Shared | None = None
    is_moe: Callable[[Config, int], bool] = every_layer
    expert_size: Any = None
    before: tuple[StepRow, ...] = ()
    between: tuple[StepRow, ...] = ()
    after: tuple[StepRow, ...] = ()
    beyond: str | None = None
    beyond_experts: Any = 0
    per_expert_scale: tuple[str, ...] = ()
    input_scale: tuple[str, ...] = ()
    output_scale: tuple[str, ...] = ()
    num_layers: Any = field(default_factory=lambda: Key("num_hidden_layers"))
    hidden_size: Any = field(default_factory=lambda: Key("hidden_size"))
    not_read: Mapping[str, str] = field(default_factory=dict)
    pre_norm: bool = True
