"""Which tensors make up a MoE block, and which layer do they make?

Each tensor under the block's prefix is taken once, by its name, and its shape and dtype are
compared with what ``config.json`` says. What is left over is an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dask_ep.arrays.checks import is_float
from dask_ep.experts.experts import Experts
from dask_ep.experts.quantized import Float8Source, Mxfp4Source, stored_in_8_bits
from dask_ep.layers.families import ACTIVATIONS
from dask_ep.layers.family import Family, Fused, Key, PerExpert, TensorLayout, find
from dask_ep.layers.layer import MoELayer
from dask_ep.layers.routing import Router
from dask_ep.storage.sources import Source


@dataclass(frozen=True)
class Model:
    """What a block must know about its checkpoint."""

    directory: str
    model_type: str
    config: Mapping[str, Any]
    family: Family
    quantization: Mapping[str, Any]

    def find(self, value: Any, layer: int) -> Any:
        """Look a value of the family up in the config."""
        try:
            return find(value, self.config, layer)
        except ValueError as error:
            raise ValueError(f"{self.directory}: {error}") from error
        except TypeError as error:
            raise ValueError(
                f"{self.directory}: config.json has a value of another type than it should: {error}"
            ) from error

    def find_size(self, name: str, value: Any, layer: int) -> int:
        """Look up a whole number from 1 up; `name` is for messages."""
        size = self.find(value, layer)
        if type(size) is not int or size < 1:
            raise ValueError(
                f"{self.directory}/config.json: {name} of layer {layer} must be a whole number "
                f"from 1 up, but is {size!r}"
            )
        return size


class Block:
    """The tensors of one MoE block; each must be taken once."""

    def __init__(self, model: Model, layer: int, prefix: str, tensors: Mapping[str, Source]):
        self.model, self.layer, self.prefix, self.tensors = model, layer, prefix, tensors
        self.family = model.family
        self.taken: set[str] = set()
        self.E = self.find_size("num_experts", self.family.num_experts)
        self.H = self.find_size("hidden_size", Key("hidden_size"))
        self.width = self.find_size("width", self.family.width)
        self.k = self.find_size("k", self.family.k)

    def find(self, value: Any) -> Any:
        return self.model.find(value, self.layer)

    def find_size(self, name: str, value: Any) -> int:
        return self.model.find_size(name, value, self.layer)

    # --- building ---

    def build(self, *, residual: bool) -> MoELayer:
        values = {name: self.find(value) for name, value in self.family.router.items()}
        try:
            router = Router(num_experts=self.E, k=self.k, **values)
        except ValueError as error:
            raise ValueError(f"{self.model.directory}/config.json: {error}") from error
        arrays: dict[str, Any] = {
            "router_weight": self.take_any(self.family.router_weight, (self.E, self.H)),
            "router_bias": self.take_any(self.family.router_bias, (self.E,)),
            "selection_bias": self.take_any(self.family.selection_bias, (self.E,)),
        }
        layout = self.find_layout()
        options = self.options()
        options["apply_router_weight_on_input"] = router.apply_router_weight_on_input
        if isinstance(layout, PerExpert):
            experts = self.per_expert(layout, options)
        else:
            experts = self.fused(layout, options)
        shared, gate = self.shared()
        return MoELayer(
            router, experts, **arrays, shared=shared, shared_gate=gate, residual=residual
        )

    def options(self) -> dict[str, Any]:
        """Arguments of `Experts.gated`, from the config."""
        options = {name: self.find(value) for name, value in self.family.options.items()}
        if "activation" in options:
            if options["activation"] not in list(ACTIVATIONS):
                raise ValueError(
                    f"{self.model.directory}/config.json: hidden_act must be one of "
                    f"{', '.join(ACTIVATIONS)}, but is {options['activation']!r}"
                )
            options["activation"] = ACTIVATIONS[options["activation"]]
        return options

    def find_layout(self) -> TensorLayout:
        """The first layout of the family whose names are here, and whose shapes fit."""
        named = [layout for layout in self.family.experts if self.has_names_of(layout)]
        if not named:
            first = [next(iter(self.shapes_of(layout))) for layout in self.family.experts]
            raise ValueError(
                f"{self.where} has no experts: it should have {' or '.join(dict.fromkeys(first))}, "
                f"but has {some_of(sorted(self.tensors))}"
            )
        return next(filter(self.has_shapes_of, named), named[0])

    def has_names_of(self, layout: TensorLayout) -> bool:
        if isinstance(layout, Fused):
            return layout.gate_up + ("_blocks" if layout.packed else "") in self.tensors
        return any(name in self.tensors for name in self.shapes_of(layout))

    def has_shapes_of(self, layout: TensorLayout) -> bool:
        return all(
            name in self.tensors and self.tensors[name].shape == shape
            for name, shape in self.shapes_of(layout).items()
        )

    def shapes_of(self, layout: TensorLayout) -> dict[str, tuple[int, ...]]:
        """Name and shape of the matrices of a layout."""
        E, H, F = self.E, self.H, self.width
        if isinstance(layout, PerExpert):
            shapes = {layout.gate: (F, H), layout.up: (F, H), layout.down: (H, F)}
            return {
                name.format(e=e): shape for e in range(self.E) for name, shape in shapes.items()
            }
        if layout.transposed:
            return {layout.gate_up: (E, 2 * F, H), layout.down: (E, H, F)}
        return {layout.gate_up: (E, H, 2 * F), layout.down: (E, F, H)}

    def per_expert(self, layout: PerExpert, options: dict[str, Any]) -> Experts:
        shapes = self.shapes_of(layout)
        gate, up, down = (
            [self.take(name.format(e=e), shapes[name.format(e=e)]) for e in range(self.E)]
            for name in (layout.gate, layout.up, layout.down)
        )
        return Experts.gated(gate, up, down, transposed=True, **options)

    def fused(self, layout: Fused, options: dict[str, Any]) -> Experts:
        take = self.take_packed if layout.packed else self.take
        gate_up, down = (take(name, shape) for name, shape in self.shapes_of(layout).items())
        biases: dict[str, Any] = {}
        if layout.biases:
            biases = {
                "gate_up_bias": self.take(layout.gate_up + "_bias", (self.E, 2 * self.width)),
                "down_bias": self.take(layout.down + "_bias", (self.E, self.H)),
            }
        return Experts.gated_fused(
            gate_up,
            down,
            transposed=layout.transposed,
            interleaved=layout.interleaved,
            **biases,
            **options,
        )

    def shared(self) -> tuple[Experts | None, Source | None]:
        if self.family.shared is None:
            return None, None
        row = self.family.shared
        width = self.find(row.width)
        shapes = {"gate": (width, self.H), "up": (width, self.H), "down": (self.H, width)}
        if width == 0:
            # Saved all the same: matrices without numbers, and the gate of nothing.
            empty = {f"{row.block}.{name}_proj.weight": shape for name, shape in shapes.items()}
            for name, shape in [*empty.items(), (row.gate, (1, self.H))]:
                if name is not None and name in self.tensors:
                    self.take(name, shape)
            return None, None
        weights: dict[str, Any] = {}
        has_biases = self.find(row.biases)
        for name, shape in shapes.items():
            stem = f"{row.block}.{name}_proj"
            weights[name] = [self.take(f"{stem}.weight", shape)]
            if has_biases:
                weights[f"{name}_bias"] = [self.take(f"{stem}.bias", shape[:1])]
        experts = Experts.gated(**weights, transposed=True, **self.options())
        return experts, None if row.gate is None else self.take(row.gate, (1, self.H))

    # --- taking tensors ---

    @property
    def where(self) -> str:
        return f"layer {self.layer} of {self.model.directory}"

    def take_any(self, names: tuple[str, ...], shape: tuple[int, ...]) -> Source | None:
        """Take the one of some names that is here."""
        if not names:
            return None
        return self.take(next((n for n in names if n in self.tensors), names[0]), shape)

    def take(self, name: str, shape: tuple[int, ...]) -> Source:
        """Take a tensor of floats, with its scales if it needs them."""
        source = self._take_raw(name)
        if stored_in_8_bits(source):
            source = Float8Source(
                source, self._take_raw(name + "_scale_inv"), self._float8_block(source)
            )
        if not is_float(source.dtype):
            raise TypeError(
                f"{self.prefix}{name} must hold floats, but has dtype {source.dtype} ({self.where})"
            )
        return self._of_shape(name, source, shape)

    def take_packed(self, name: str, shape: tuple[int, ...]) -> Source:
        """Take a matrix that is stored in MXFP4 blocks."""
        source = Mxfp4Source(self._take_raw(name + "_blocks"), self._take_raw(name + "_scales"))
        return self._of_shape(name + "_blocks", source, shape)

    def check_all_taken(self) -> None:
        left = sorted(set(self.tensors) - self.taken)
        if left:
            raise ValueError(
                f"every tensor of {self.where} must be used, but {len(left)} would not be: "
                f"{some_of(self.prefix + name for name in left)}. This model differs from the "
                f"family {self.model.model_type!r}"
            )

    def _take_raw(self, name: str) -> Source:
        if name not in self.tensors:
            raise ValueError(
                f"{self.where} must have the tensor {self.prefix}{name}, but the block has "
                f"{some_of(sorted(self.tensors))}"
            )
        self.taken.add(name)
        return self.tensors[name]

    def _of_shape(self, name: str, source: Source, shape: tuple[int, ...]) -> Source:
        # ernie4_5_moe's bias is (1, E), which is one row as much as (E,) is.
        if source.shape != shape and source.shape != (1, *shape):
            raise ValueError(
                f"{self.prefix}{name} must have shape {shape} by config.json (E={self.E}, "
                f"d={self.H}, width={self.width}), but has {source.shape} ({self.where})"
            )
        return source

    def _float8_block(self, source: Source) -> tuple[int, int]:
        block = self.model.quantization.get("weight_block_size")
        if not isinstance(block, list) or [type(size) for size in block] != [int, int]:
            raise ValueError(
                f"{source.name} is FP8, so config.json must have weight_block_size [rows, columns] "
                f"in quantization_config, but it says {block!r}"
            )
        return tuple(block)


def some_of(names: Iterable[str], most: int = 8) -> str:
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "nothing") + more
