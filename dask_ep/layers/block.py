"""Which tensors make up a MoE block, and which layer do they make?

Each tensor of the layer is either taken once, by its name, and its shape and dtype compared with
``config.json``; or it is known not to belong to the block, such as attention. Any other tensor is
an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dask_ep.arrays.checks import is_float, is_number
from dask_ep.experts.expert_kinds import EXPERT_KINDS
from dask_ep.experts.experts import Experts
from dask_ep.layers.families import HIDDEN_ACTS, NOT_READ
from dask_ep.layers.family import Family, StepRow, TensorLayout, config_place, find
from dask_ep.layers.formats import Parts, activation_scales, find_parts
from dask_ep.layers.lazy_routing import SmallArray
from dask_ep.layers.routing import Router
from dask_ep.layers.row_steps import Around, RowStep
from dask_ep.storage.sources import Source
from dask_ep.storage.views import FirstRow, Regrouped, Repeated, Transposed

LARGEST = 1 << 20
"""The largest size that a config may state, far above those of models: a mistyped number is refused
before anything is counted up to it."""


@dataclass(frozen=True)
class Model:
    """What a block needs to know about its checkpoint."""

    directory: str
    model_type: str
    config: Mapping[str, Any]
    family: Family
    quantization: Mapping[str, Any]

    @property
    def config_name(self) -> str:
        """What an error calls the config: its file, or the metadata."""
        place = config_place(self.config)
        return (
            f"{self.directory}/{place}"
            if place == "config.json"
            else f"{place} of {self.directory}"
        )

    def find(self, value: Any, layer: int) -> Any:
        """Look a value of the family up in the config."""
        try:
            return find(value, self.config, layer)
        except ValueError as error:
            raise ValueError(f"{self.directory}: {error}") from error
        except (TypeError, LookupError) as error:
            raise ValueError(f"{self.config_name} has a value of a wrong type: {error}") from error

    def find_size(self, name: str, value: Any, layer: int, least: int = 1) -> int:
        """Look up a whole number of at least `least`; `name` is for messages."""
        size = self.find(value, layer)
        if type(size) is not int or not least <= size <= LARGEST:
            most = f" and at most {LARGEST}" if type(size) is int and size > LARGEST else ""
            raise self.wrong(name, f"a whole number of at least {least}{most}", size, layer)
        return size

    def find_number(self, name: str, value: Any, layer: int) -> float:
        """Look up a finite number."""
        number = self.find(value, layer)
        if not is_number(number):
            raise self.wrong(name, "a finite number", number, layer)
        return number

    def find_flag(self, name: str, value: Any, layer: int) -> bool:
        """Look up whether something is there: true, false, or how many; null counts as false."""
        flag = self.find(value, layer)
        if not (flag is None or isinstance(flag, int)):
            raise self.wrong(name, "true or false", flag, layer)
        return bool(flag)

    def wrong(self, name: str, required: str, value: Any, layer: int) -> ValueError:
        """Return the error for a value that is not what it must be."""
        return ValueError(
            f"{self.config_name}: {name} of layer {layer} must be {required}, but is {value!r}"
        )


class Noted(dict[str, Any]):
    """A config that records which of its keys are looked up, and their values."""

    def __init__(self, config: Mapping[str, Any]):
        super().__init__(config)
        self.noted: dict[str, Any] = {}

    def get(self, key: str, default: Any = None) -> Any:
        if key in self and not isinstance(self[key], Mapping):
            self.noted[key] = self[key]
        return super().get(key, default)


class LayerTensors:
    """The tensors of one layer; those of its MoE block must each be taken once.

    `prefix` is the layer's, `name` the block's after it, and `tensors` are those of the layer by
    their names after the prefix.
    """

    def __init__(
        self, model: Model, layer: int, prefix: str, name: str, tensors: Mapping[str, Source]
    ):
        self.config = Noted(model.config)
        self.model = replace(model, config=self.config)
        self.layer, self.prefix, self.tensors = layer, prefix, tensors
        self.name = f"{name}." if name else ""
        self.family = model.family
        self.taken: set[str] = set()
        self.ignored: set[str] = set()
        self.E = self.find_size("num_experts", self.family.num_experts)
        self.H = self.find_size("hidden_size", self.family.hidden_size)
        self.width = self.find_size("width", self.family.width)
        self.k = self.find_size("k", self.family.k)
        size = self.find(self.family.expert_size)
        self.D = self.H if size is None else self.find_size("expert_size", size)
        #: width of the rows that experts read
        self.R = self.E + self.find_size("beyond_experts", self.family.beyond_experts, 0)
        #: number of the router's experts

    def find(self, value: Any) -> Any:
        return self.model.find(value, self.layer)

    def find_size(self, name: str, value: Any, least: int = 1) -> int:
        return self.model.find_size(name, value, self.layer, least)

    def find_number(self, name: str, value: Any) -> float:
        return self.model.find_number(name, value, self.layer)

    def find_flag(self, name: str, value: Any) -> bool:
        return self.model.find_flag(name, value, self.layer)

    @property
    def where(self) -> str:
        return f"layer {self.layer} of {self.model.directory}"

    def resolve(self, name: str) -> str:
        """A family's name of a tensor, as a name after the layer's prefix."""
        return name[1:] if name.startswith("/") else self.name + name

    def full(self, name: str) -> str:
        return self.prefix + self.resolve(name)

    def names_here(self) -> list[str]:
        """The tensors of the block, after its name."""
        return sorted(n.removeprefix(self.name) for n in self.tensors if n.startswith(self.name))

    def first_here(self, names: tuple[str, ...]) -> str | None:
        """The first of some names that is in the block."""
        return next((name for name in names if self.resolve(name) in self.tensors), None)

    def take_any(self, names: tuple[str, ...], shape: tuple[int, ...]) -> Source | None:
        """Take the tensor of the first of some names that is in the block."""
        if not names:
            return None
        return self.take(self.first_here(names) or names[0], shape)

    def take(self, name: str, shape: tuple[int, ...]) -> Source:
        """Take a tensor of floats, or all its parts if it is quantized."""
        parts = self.find_parts(name)
        if parts is None:
            source = self._take_raw(name)
        else:
            self.ignored |= set(activation_scales(self.resolve(name), self.tensors))
            self.taken |= {*parts.names.values(), *self.ignored}
            source = parts.open(shape)
        if not is_float(source.dtype):
            raise TypeError(
                f"{self.full(name)} must hold floats, but has dtype {source.dtype} ({self.where})"
            )
        return self._of_shape(name, source, shape)

    def find_parts(self, name: str) -> Parts | None:
        """The parts of a matrix, if it is quantized."""
        quantization = self.model.quantization
        return find_parts(self.resolve(name), self.tensors, quantization, self.prefix)

    def check_all_taken(self) -> None:
        """Raise if a tensor of the layer is neither used nor known not to belong to the block."""
        left = sorted(
            name for name in set(self.tensors) - self.taken if self.why_not_read(name) is None
        )
        if left:
            raise ValueError(
                f"every tensor of {self.where} must be used, but {len(left)} would not be: "
                f"{some_of(self.prefix + name for name in left)}. This model differs from the "
                f"family {self.model.model_type!r}"
            )

    def why_not_read(self, name: str) -> str | None:
        """Why a tensor of the layer is not read; None if it should have been."""
        if name in self.ignored:
            return "scales of activations, which are not quantized here"
        rows = [self.family.not_read]
        if not (self.name and name.startswith(self.name)):
            rows.append(NOT_READ)
        return next(
            (why for row in rows for form, why in row.items() if re.match(form, name)), None
        )

    def _take_raw(self, name: str) -> Source:
        resolved = self.resolve(name)
        if resolved not in self.tensors:
            raise ValueError(
                f"{self.where} must have the tensor {self.full(name)}, but the block has "
                f"{some_of(self.names_here())}"
            )
        self.taken.add(resolved)
        return self.tensors[resolved]

    def _of_shape(self, name: str, source: Source, shape: tuple[int, ...]) -> Source:
        # ernie4_5_moe's bias is (1, E), which is accepted for (E,).
        if source.shape != shape and source.shape != (1, *shape):
            raise ValueError(
                f"{self.full(name)} must have shape {shape} according to "
                f"{config_place(self.config)} (E={self.E}, d={self.H}, width={self.width}), but "
                f"has {source.shape} ({self.where})"
            )
        return source


class Block(LayerTensors):
    """The MoE block of one layer, as described by a `Family`."""

    def arguments(self, *, residual: bool) -> dict[str, Any]:
        """The arguments of `MoELayer`, by name."""
        router, arrays = self.router(), self.router_arrays()
        options = self.options(self.family.options)
        options["apply_router_weight_on_input"] = router.apply_router_weight_on_input
        if (scale := self.take_any(self.family.output_scale, (self.D,))) is not None:
            options["output_scale"] = Repeated(scale, self.E, plus=1.0)
        experts = self.experts(self.family.experts, self.D, self.width, options, count=self.E)
        shared, gate = self.shared()
        return {
            "router": router,
            "experts": experts,
            **arrays,
            "shared": shared,
            "shared_gate": gate,
            "around": self.around(),
            "residual": residual,
        }

    def router(self) -> Router:
        values = {name: self.find(value) for name, value in self.family.router.items()}
        try:
            return Router(num_experts=self.R, k=self.k, **values)
        except ValueError as error:
            raise ValueError(f"{self.model.config_name}: {error}") from error

    def router_arrays(self) -> dict[str, Any]:
        """The small arrays of a router, those that exist."""
        row = self.family
        arrays: dict[str, Any] = {}
        if in_out := self.first_here(row.router_weight_in_out):
            arrays["router_weight"] = Transposed(self.take(in_out, (self.H, self.R)))
        else:
            arrays["router_weight"] = self.take_any(row.router_weight, (self.R, self.H))
        arrays["router_bias"] = self.take_any(row.router_bias, (self.R,))
        arrays["input_scale"] = self.take_any(row.input_scale, (self.H,))
        if name := self.first_here(row.per_expert_scale):
            one = self.tensors[self.resolve(name)].shape == (1,)
            arrays["per_expert_scale"] = self.take(name, (1,) if one else (self.R,))
        if table := self.first_here(row.table):
            arrays["table"] = self._take_raw(table)
        elif self.find_flag("biased", row.biased):
            name = self.first_here(row.selection_bias)
            several = (row.bias_rows, self.E)
            if name and self.tensors[self.resolve(name)].shape == several:
                arrays["selection_bias"] = FirstRow(self.take(name, several))
            else:
                chosen = self.E if row.beyond == "shared" else self.R
                arrays["selection_bias"] = self.take_any(row.selection_bias, (chosen,))
        return arrays

    def around(self) -> Around:
        """The steps before and after the experts."""
        width = self.H
        steps: dict[str, list[RowStep]] = {"before": [], "between": [], "after": []}
        for when, rows in steps.items():
            for row in getattr(self.family, when):
                if self.find_flag("there", row.there):
                    rows.append(self.step(row, width))
                    width = width if row.to is None else self.find_size("to", row.to)
        beyond = self.family.beyond if self.R > self.E else None
        before, between, after = (tuple(rows) for rows in steps.values())
        return Around(before, between, after, beyond)

    def step(self, row: StepRow, width: int) -> RowStep:
        """One step of rows of a width."""
        name = self.first_here(row.names) or next(iter(row.names), None)
        array = bias = None
        if name is not None:
            to = () if row.to is None else (self.find_size("to", row.to),)
            shape = (*to, width)
            array = SmallArray(self.take(name, shape), shape)
            if self.find_flag("bias", row.bias):
                bias = SmallArray(self.take(bias_of(name), shape[:1]), shape[:1])
        numbers = {n: self.find_number(n, getattr(row, n)) for n in ("eps", "offset", "factor")}
        return RowStep(row.kind, array, bias, **numbers)

    def options(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of `Experts.gated`, from the config."""
        options = {name: self.find(value) for name, value in row.items()}
        if "activation" in options:
            if options["activation"] not in list(HIDDEN_ACTS):
                raise ValueError(
                    f"{self.model.config_name}: hidden_act must be one of "
                    f"{', '.join(HIDDEN_ACTS)}, but is {options['activation']!r}"
                )
            options["activation"] = HIDDEN_ACTS[options["activation"]]
        return options

    def experts(
        self,
        layouts: Sequence[TensorLayout],
        d: int,
        width: int,
        options: Mapping[str, Any],
        *,
        count: int | None,
    ) -> Experts:
        """Take experts of rows of width `d`; without a count, one whose tensors are matrices."""
        layout = self.find_layout(layouts, d, width, count)
        weights: dict[str, Any] = {}
        for weight, name in layout.names.items():
            shape = self.shape_of(layout, weight, d, width, count)
            weights[weight] = self.take_weight(layout, weight, name, shape, count)
            if self.find_flag("biases", layout.biases):
                axis = -1 if layout.transposed else -2  # of d or f; a bias has only one of them
                of_one = tuple(n for i, n in enumerate(shape, -len(shape)) if i != axis)
                name = bias_of(name)
                weights[f"{weight}_bias"] = self.take_weight(layout, "bias", name, of_one, count)
        kind = EXPERT_KINDS[layout.kind]
        known = {*kind.weights, *kind.options}
        transposed = layout.transposed
        if transposed and (turned := as_they_lie(weights)):
            weights, transposed = turned, False
        form = {"transposed": transposed, "interleaved": layout.interleaved}
        chosen = {name: value for name, value in {**form, **options}.items() if name in known}
        try:
            return getattr(Experts, layout.kind)(**weights, **chosen)
        except ValueError as error:
            raise ValueError(f"{self.model.config_name}: {error}") from error

    def take_weight(
        self,
        layout: TensorLayout,
        weight: str,
        name: str,
        shape: tuple[int, ...],
        count: int | None,
    ) -> Source | list[Source]:
        """Take one weight of all experts: one tensor, or a list with one for each."""
        if "{e}" in name:
            return [self.take(name.format(e=e), shape) for e in range(count or 1)]
        if layout.flat:
            turned = weight == "down"  # (E * f, d) in the file, for (E, d, f)
            E, rows, columns = shape
            stored = (E * columns, rows) if turned else (E * rows, columns)
            return Regrouped(self.take(name, stored), E, turned=turned)
        return [self.take(name, shape)] if count is None else self.take(name, shape)

    def find_layout(
        self, layouts: Sequence[TensorLayout], d: int, width: int, count: int | None
    ) -> TensorLayout:
        """The first layout whose names are in the block, and whose shapes fit."""
        named = [layout for layout in layouts if self.has_names_of(layout)]
        if not named:
            first = [next(iter(layout.names.values())).format(e=0) for layout in layouts]
            what = "experts" if count is not None else "shared expert"
            raise ValueError(
                f"{self.where} has no {what}: it should have "
                f"{' or '.join(dict.fromkeys(first))}, but has {some_of(self.names_here())}"
            )
        fits = (layout for layout in named if self.has_shapes_of(layout, d, width, count))
        return next(fits, named[0])

    def has_names_of(self, layout: TensorLayout) -> bool:
        ending = "_blocks" if layout.packed else ""
        return any(
            self.resolve(name.format(e=e) + ending) in self.tensors
            or (not ending and self.find_parts(name.format(e=e)) is not None)
            for name in layout.names.values()
            for e in range(self.E if "{e}" in name else 1)
        )

    def has_shapes_of(self, layout: TensorLayout, d: int, width: int, count: int | None) -> bool:
        tensors = {w: self.resolve(name.format(e=0)) for w, name in layout.names.items()}
        return all(
            name in self.tensors
            and self.tensors[name].shape == self.shape_of(layout, weight, d, width, count)
            for weight, name in tensors.items()
        )

    def shape_of(
        self, layout: TensorLayout, weight: str, d: int, width: int, count: int | None
    ) -> tuple[int, ...]:
        """Shape of one weight: of one expert if each has its own tensor, else of all."""
        sizes = {"d": d, "o": d, "f": width, "2f": 2 * width}
        shape = tuple(sizes[axis] for axis in EXPERT_KINDS[layout.kind].weights[weight].split())
        shape = shape[::-1] if layout.transposed else shape
        return shape if count is None or "{e}" in layout.names[weight] else (count, *shape)

    def shared(self) -> tuple[Experts | None, Source | None]:
        row = self.family.shared
        if row is None:
            return None, None
        width = self.find_size("width of the shared expert", row.width, 0)
        if width == 0:
            # Saved nevertheless: empty matrices, and their gate.
            for layout in filter(self.has_names_of, row.layouts):
                for weight, name in layout.names.items():
                    if self.resolve(name) in self.tensors:
                        self.take(name, self.shape_of(layout, weight, self.H, width, None))
            if row.gate is not None and self.resolve(row.gate) in self.tensors:
                self.take(row.gate, (1, self.H))
            return None, None
        options = self.options(self.family.options if row.options is None else row.options)
        count = None if row.count is None else self.find_size("shared experts", row.count)
        experts = self.experts(row.layouts, self.H, width, options, count=count)
        return experts, None if row.gate is None else self.take(row.gate, (1, self.H))


def some_of(names: Iterable[str], most: int = 8) -> str:
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "nothing") + more


def as_they_lie(weights: Mapping[str, Any]) -> dict[str, Any] | None:
    """The matrices without their transposing views, if all of them are such views."""
    matrices = {name: parts for name, parts in weights.items() if not name.endswith("bias")}
    if not all(
        isinstance(parts, list) and all(isinstance(part, Transposed) for part in parts)
        for parts in matrices.values()
    ):
        return None
    return {**weights} | {name: [part.stored for part in parts] for name, parts in matrices.items()}


def bias_of(name: str) -> str:
    """The name of the bias next to a weight."""
    stem = name.removesuffix(".weight")
    return f"{name}_bias" if stem == name else f"{stem}.bias"
