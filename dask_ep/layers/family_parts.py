"""Which parts do the definitions of several families share?

Layouts of experts, routers, and the rules for which layers are MoE.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dask_ep.layers.family import (
    FUSED,
    LINEAR_PAIR,
    MOE_WIDTH,
    NAMED,
    NUMBERED,
    Config,
    Family,
    Key,
    MlpTypes,
    Product,
    Shared,
    TensorLayout,
    below,
)

# --- how experts are stored -----------------------------------------------------------------

BY_NUMBER = TensorLayout(below("experts.{e}.", NUMBERED))
IN_OUT = TensorLayout(FUSED, transposed=False)
LINEAR = TensorLayout(LINEAR_PAIR)
ALTERNATING = TensorLayout(FUSED, transposed=False, interleaved=True, biases=True)
ALTERNATING_MXFP4 = TensorLayout(FUSED, interleaved=True, biases=True, packed=True)


# --- which layers are MoE ------------------------------------------------------------------------


def after_the_dense_ones(config: Config, layer: int) -> bool:
    return layer >= Key("first_k_dense_replace").find(config, layer)


def by_sparse_step(config: Config, layer: int) -> bool:
    if Key("num_local_experts", "num_experts", default=1).find(config, layer) == 0:
        return False
    dense = config.get("mlp_only_layers") or []
    return layer not in dense and (layer + 1) % (config.get("decoder_sparse_step") or 1) == 0


def by_period(config: Config, layer: int) -> bool:
    if Key("num_experts", default=16).find(config, layer) <= 1:
        return False
    period, offset = config.get("expert_layer_period", 2), config.get("expert_layer_offset", 1)
    return layer % period == offset


def between_start_and_end(config: Config, layer: int) -> bool:
    last = config.get("moe_layer_end_index", -1)
    last = config["num_hidden_layers"] - 1 if last == -1 else last
    interval = config.get("moe_layer_interval", 1)
    return (layer + 1) % interval == 0 and config.get("moe_layer_start_index", 1) <= layer <= last


def listed_or_by_step(config: Config, layer: int) -> bool:
    if config.get("moe_layers") is not None:
        return layer in config["moe_layers"]
    return (layer + 1) % config.get("interleave_moe_layer_step", 1) == 0


def where_enabled(config: Config, layer: int) -> bool:
    return bool(config.get("enable_moe_block"))


def with_experts(config: Config, layer: int) -> bool:
    return Key("num_local_experts").find(config, layer) > 0


def all_but_mlp_only(config: Config, layer: int) -> bool:
    dense = config.get("mlp_only_layers")
    return layer not in ((0, 1) if dense is None else dense)


def by_enum(config: Config, layer: int) -> bool:
    listed = config.get("moe_layers_enum")
    if config.get("mlp_layer_types") is not None or listed is None:
        return MlpTypes(dense=3)(config, layer)
    listed = listed.split(",") if isinstance(listed, str) else listed
    return layer in {int(number) for number in listed if str(number).strip()}


def by_block_type(config: Config, layer: int) -> bool:
    types = config.get("layers_block_type") or config["hybrid_override_pattern"]
    return types[layer] in ("moe", "E")


# --- sizes, routers and shared experts ------------------------------------------------------------

RMS_NORM_EPS = Key("rms_norm_eps", default=1e-6)
INTERMEDIATE_SIZE = Key("intermediate_size")
MIXTRAL_BLOCKS = ("block_sparse_moe", "mlp")
MLP_BIAS = Key("mlp_bias", default=False)
SOFTMAX = {"score": "softmax", "norm_topk_prob": False}
SOFTMAX_SUM_1 = {"score": "softmax", "norm_topk_prob": True}
QWEN_SHARED = Shared(
    "shared_expert", Key("shared_expert_intermediate_size"), gate="shared_expert_gate.weight"
)
NAMED_OR_NUMBERED = (NAMED, NUMBERED)
DEEPSEEK_BIAS = ("gate.e_score_correction_bias",)
SWIGLU_OAI = {
    "limit": Key("swiglu_limit", default=7.0),
    "alpha": Key("swiglu_alpha", default=1.702),
    "up_offset": 1.0,
}
CLAMPED = {"activation": Key("hidden_act", default="silu"), "limit": Key("swiglu_limit")}


def softmax_router(norm: bool) -> dict[str, Any]:
    return {"score": "softmax", "norm_topk_prob": Key("norm_topk_prob", default=norm)}


def sigmoid_router(scale: Any = 1.0, norm: Any = True, eps: float = 0.0) -> dict[str, Any]:
    return {"score": "sigmoid", "norm_topk_prob": norm, "norm_eps": eps, "scale": scale}


def shared_experts(number: Key, biases: Any = False) -> Shared:
    return Shared("shared_experts", Product((MOE_WIDTH, number)), biases=biases)


def deepseek_v3_router(groups: Any, topk_groups: Any) -> dict[str, Any]:
    return {
        "groups": groups,
        "topk_groups": topk_groups,
        "group_score": "top2",
        **sigmoid_router(Key("routed_scaling_factor"), Key("norm_topk_prob", null=False), 1e-20),
    }


def changed_shared(family: Family, **changes: Any) -> Shared:
    """Return the shared expert of a family with some fields replaced, for a similar family."""
    assert family.shared is not None
    return replace(family.shared, **changes)
