"""Which model families are known?

Each is one definition in `softmax_families` or `sigmoid_families`; no code is for a single family.
This file has what all of them share.
"""

from __future__ import annotations

from difflib import get_close_matches

from dask_ep.layers.family import Family
from dask_ep.layers.sigmoid_families import SIGMOID_FAMILIES
from dask_ep.layers.softmax_families import SOFTMAX_FAMILIES

FAMILIES: tuple[Family, ...] = (*SOFTMAX_FAMILIES, *SIGMOID_FAMILIES)

REFUSED = {
    "zaya": "its router reads the output of the previous layer's router",
    "switch_transformers": "a full expert drops rows by their position in the sequence",
    "nllb-moe": "a full expert drops rows by their position in the batch",
    "doge": "its experts are rows of an embedding, found by product keys",
    "vitpose_backbone": "experts are chosen by the data set of an image, not by a router",
}
"""Model types whose layers cannot be computed here, and why."""

PREFIXES = (
    "model.layers.{layer}.",
    "model.language_model.layers.{layer}.",
    "language_model.model.layers.{layer}.",
    "language_model.layers.{layer}.",
    "layers.{layer}.",
    "transformer.layers.{layer}.",
    "transformer.blocks.{layer}.",
    "backbone.layers.{layer}.",
    "language_model.backbone.layers.{layer}.",
    "language_model.model.blocks.{layer}.",
    "thinker.model.layers.{layer}.",
    "model.llm.layers.{layer}.",
    "model.decoder.layers.{layer}.",
    "decoder.layers.{layer}.",
    "blk.{layer}.",
)
"""Prefixes of the names of a layer's tensors: in plain models, in the text model of multimodal
ones, in models for question answering, and in GGUF files."""

TEXT_CONFIGS = (("text_config",), ("thinker_config", "text_config"), ("language_config",))
"""Keys of a multimodal model's config that may hold the config of its text model."""

NOT_READ = {
    r"[^.]*(attn|attention|mamba|conv)[^.]*\.": "attention, or what replaces it",
    r"[^.]*norm[^.]*\.": "norms around the block",
    r"(hc_|[^.]*(_hc|hyper_connection)\.)": "connections around the block",
    r"([^.]*residual|layer_scalar)": "connections around the block",
    r"(per_layer_|ple_|[^.]*ple\.)": "per-layer inputs",
}
"""Other tensors of many decoder layers, which are not read, as patterns of names after the layer's
prefix, and what they are for."""

HIDDEN_ACTS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}
"""The activation for each ``hidden_act``."""


def find_family(
    model_type: str, families: tuple[Family, ...], key: str = "config.json says model_type"
) -> Family:
    """Return the first family with a model type; `key` says in an error where it was read."""
    for family in families:
        if model_type in family.model_types:
            return family
    if model_type in REFUSED:
        raise ValueError(
            f"{model_type} models cannot be read because their layers do not compute row by row: "
            f"{REFUSED[model_type]}"
        )
    known = sorted({name for family in families for name in family.model_types})
    close = get_close_matches(model_type, known)
    raise ValueError(
        f"{key} {model_type!r}, which is not one of the {len(known)} known model types"
        f"{' (did you mean ' * bool(close)}{' or '.join(close)}{'?)' * bool(close)}. "
        "workflows/README.md lists them; to add a "
        "family, see dask_ep.layers.family.Family"
    )
