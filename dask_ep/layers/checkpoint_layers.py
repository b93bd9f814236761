"""Which layers of a checkpoint are MoE, and which tensors make up their blocks?

Only headers are read here. A task reads the tensors of its own experts when it runs.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from numbers import Integral
from typing import Any

from dask_ep.layers.block import Block, Model
from dask_ep.layers.checkpoint_files import CheckpointFiles, GgufFiles
from dask_ep.layers.families import FAMILIES, PREFIXES, TEXT_CONFIGS, find_family
from dask_ep.layers.family import ARCHITECTURE, Config, Family, config_place
from dask_ep.layers.formats import check_method
from dask_ep.layers.gguf_families import GGUF_FAMILIES
from dask_ep.storage.sources import Source


class Checkpoint:
    """A checkpoint of a known family: which of its layers are MoE, and where they are."""

    def __init__(self, directory: str | os.PathLike, families: Iterable[Family] = ()):
        is_gguf = os.fspath(directory).endswith(".gguf")
        self.files = GgufFiles(directory) if is_gguf else CheckpointFiles(directory)
        outer = self.files.config
        config = next(filter(None, (self._part(outer, *names) for names in TEXT_CONFIGS)), outer)
        name = "quantization_config"
        quantization = self._part(outer, name) or self._part(config, name)
        quantization = quantization or self.files.modelopt_config
        model_type = config.get("model_type") or outer.get("model_type")
        if not isinstance(model_type, str):
            wanted = ARCHITECTURE if is_gguf else "model_type"
            place = "the metadata" if is_gguf else "config.json"
            came = "" if model_type is None else f", a string, but it is {model_type!r}"
            raise ValueError(f"{self.files.directory}: {place} must have a {wanted!r}{came}")
        check_method(quantization, self.files.directory)
        known, key = (FAMILIES, "config.json says model_type")
        if is_gguf:
            known, key = GGUF_FAMILIES, f"{directory} says general.architecture"
        family = find_family(model_type, (*families, *known), key)
        self.model = Model(self.files.directory, model_type, config, family, quantization)
        self.num_layers = self.model.find_size("num_hidden_layers", family.num_layers, 0)

    def _part(self, config: Config, *names: str) -> Config:
        for name in names:
            config = config.get(name) or {}
            if not isinstance(config, Mapping):
                raise ValueError(
                    f"{self.files.directory}/config.json: {name} must be an object, but is "
                    f"{config!r}"
                )
        return config

    def is_moe(self, layer: int) -> bool:
        try:
            return self.model.family.is_moe(self.model.config, layer)
        except (ValueError, TypeError, LookupError, ZeroDivisionError) as error:
            raise ValueError(
                f"{self.files.directory}: cannot tell which layers are MoE from "
                f"{config_place(self.model.config)}: {error}"
            ) from error

    @property
    def moe_layers(self) -> list[int]:
        return [layer for layer in range(self.num_layers) if self.is_moe(layer)]

    def places(self, layer: int) -> list[tuple[str, str]]:
        """Find the layer's block in the files: the layer's prefix, and the block's name."""
        return [
            (prefix.format(layer=layer), block)
            for block in self.model.family.blocks
            for prefix in PREFIXES
            if self._has_block(prefix.format(layer=layer), block)
        ]

    def _has_block(self, prefix: str, block: str) -> bool:
        if block:
            return bool(self.files.names_under(f"{prefix}{block}."))
        return any(prefix + name in self.files.file_of for name in self.model.family.router_weight)

    def block_tensors(self, layer: int) -> list[tuple[str, Source]]:
        """The tensors of the layer's block, a dense one's too, with their names in the block."""
        return [
            named
            for prefix, block in self.places(layer)
            for named in self.files.under(f"{prefix}{block}." if block else prefix).items()
        ]

    def open_block(self, layer: int, *, residual: bool = False) -> tuple[Block, dict[str, Any]]:
        """Return a layer's tensors, and the arguments of `MoELayer` made of them."""
        self._check_layer(layer)
        if residual and self.model.family.pre_norm:
            raise ValueError(
                f"residual=True adds the block's input rows, but {self.model.model_type} models "
                "add the block's output to the rows before their norm: open the layer without "
                "residual and compute x + layer(norm(x))"
            )
        found = self.places(layer)
        if len(found) != 1:
            wanted = [PREFIXES[0].format(layer=layer) + block for block in self.model.family.blocks]
            there = " and ".join(prefix + block for prefix, block in found)
            raise ValueError(
                f"{self.files.directory} must have the MoE block of layer {layer} under one "
                f"prefix, such as {' or '.join(wanted)}; it has "
                f"{there or 'no tensor under any known one'}"
            )
        prefix, name = found[0]
        block = Block(self.model, layer, prefix, name, self.files.under(prefix))
        arguments = block.arguments(residual=residual)
        block.check_all_taken()
        return block, arguments

    def _check_layer(self, layer: int) -> None:
        if not isinstance(layer, Integral):
            raise TypeError(
                f"layer must be the number of a MoE layer of {self.files.directory}, "
                f"{ranges(self.moe_layers)}; got {layer!r}"
            )
        if not 0 <= layer < self.num_layers:
            raise ValueError(
                f"layer must be in [0, {self.num_layers}), the layers of {self.files.directory}, "
                f"but is {layer}"
            )
        if not self.is_moe(layer):
            raise ValueError(
                f"layer {layer} of {self.files.directory} is dense in this model; MoE layers are "
                f"{ranges(self.moe_layers)}"
            )


def ranges(numbers: list[int]) -> str:
    """Write [1, 2, 3, 7] as "1-3, 7"."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], n]
        else:
            runs.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) or "none"
