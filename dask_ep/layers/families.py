"""What do the model families call things, and how do they differ?

One row of `FAMILIES` per family, and no code that belongs to one of them alone. Read from
transformers 5.24; `tests/fixtures` holds a checkpoint of each, made with it.
"""

from __future__ import annotations

from typing import Any

from dask_ep.layers.family import By, Config, Family, Fused, Key, PerExpert, Product, Shared

# --- how experts are stored -----------------------------------------------------------------

BY_NAME = PerExpert(
    "experts.{e}.gate_proj.weight", "experts.{e}.up_proj.weight", "experts.{e}.down_proj.weight"
)
BY_NUMBER = PerExpert("experts.{e}.w1.weight", "experts.{e}.w3.weight", "experts.{e}.w2.weight")
OUT_IN = Fused("experts.gate_up_proj", "experts.down_proj", transposed=True)
IN_OUT = Fused("experts.gate_up_proj", "experts.down_proj", transposed=False)
LINEAR = Fused("input_linear.weight", "output_linear.weight", transposed=True)
ALTERNATING = Fused(
    "experts.gate_up_proj", "experts.down_proj", transposed=False, interleaved=True, biases=True
)
ALTERNATING_MXFP4 = Fused(
    "experts.gate_up_proj",
    "experts.down_proj",
    transposed=True,
    interleaved=True,
    biases=True,
    packed=True,
)


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


# --- the table -----------------------------------------------------------------------------------

PER_TOKEN = Key("num_experts_per_tok")
MIXTRAL_BLOCKS = ("block_sparse_moe", "mlp")
SOFTMAX = {"score": "softmax", "norm_topk_prob": False}
SOFTMAX_SUM_1 = {"score": "softmax", "norm_topk_prob": True}
QWEN_SHARED = Shared(
    "shared_expert", Key("shared_expert_intermediate_size"), gate="shared_expert_gate.weight"
)


def _shared_experts(number: Key, biases: Any = False) -> Shared:
    width = Product((Key("moe_intermediate_size"), number))
    return Shared("shared_experts", width, biases=biases)


def _deepseek_v3_router(groups: Key, topk_groups: Key) -> dict[str, Any]:
    return {
        "score": "sigmoid",
        "groups": groups,
        "topk_groups": topk_groups,
        "group_score": "top2",
        "norm_topk_prob": Key("norm_topk_prob", null=False),
        "norm_eps": 1e-20,
        "scale": Key("routed_scaling_factor"),
    }


FAMILIES: tuple[Family, ...] = (
    Family(
        model_types=("mixtral", "minimax"),
        blocks=MIXTRAL_BLOCKS,
        num_experts=Key("num_local_experts"),
        k=PER_TOKEN,
        width=Key("intermediate_size"),
        router=SOFTMAX_SUM_1,
        router_weight=("gate.weight",),
        experts=(BY_NUMBER, OUT_IN),
    ),
    Family(
        model_types=("minimax_m2",),
        blocks=MIXTRAL_BLOCKS,
        num_experts=Key("num_local_experts"),
        k=PER_TOKEN,
        width=Key("intermediate_size"),
        router={"score": "sigmoid", "norm_topk_prob": True},
        router_weight=("gate.weight",),
        selection_bias=("e_score_correction_bias",),
        experts=(BY_NUMBER, OUT_IN),
    ),
    Family(
        model_types=("phimoe",),
        blocks=MIXTRAL_BLOCKS,
        num_experts=Key("num_local_experts"),
        k=2,  # whatever the config says
        width=Key("intermediate_size"),
        router={"score": "sparsemixer", "jitter": Key("router_jitter_noise", default=0.01)},
        router_weight=("gate.weight", "router.weight"),
        experts=(BY_NUMBER, OUT_IN),
    ),
    Family(
        model_types=("qwen2_moe",),
        blocks=("mlp",),
        num_experts=Key("num_experts"),
        k=PER_TOKEN,
        width=Key("moe_intermediate_size"),
        router={"score": "softmax", "norm_topk_prob": Key("norm_topk_prob", default=False)},
        router_weight=("gate.weight",),
        experts=(BY_NAME, OUT_IN),
        shared=QWEN_SHARED,
        is_moe=by_sparse_step,
    ),
    Family(
        model_types=("qwen3_next",),
        blocks=("mlp",),
        num_experts=Key("num_experts"),
        k=PER_TOKEN,
        width=Key("moe_intermediate_size"),
        router={"score": "softmax", "norm_topk_prob": Key("norm_topk_prob", default=True)},
        router_weight=("gate.weight",),
        experts=(BY_NAME, OUT_IN),
        shared=QWEN_SHARED,
        is_moe=by_sparse_step,
    ),
    Family(
        model_types=("qwen3_5_moe", "qwen3_5_moe_text"),
        blocks=("mlp",),
        num_experts=Key("num_experts"),
        k=PER_TOKEN,
        width=Key("moe_intermediate_size"),
        router=SOFTMAX_SUM_1,
        router_weight=("gate.weight",),
        experts=(BY_NAME, OUT_IN),
        shared=QWEN_SHARED,
    ),
    Family(
        model_types=("qwen3_moe",),
        blocks=("mlp",),
        num_experts=Key("num_local_experts", "num_experts"),
        k=PER_TOKEN,
        width=Key("moe_intermediate_size"),
        router={"score": "softmax", "norm_topk_prob": Key("norm_topk_prob", default=False)},
        router_weight=("gate.weight",),
        experts=(BY_NAME, OUT_IN),
        is_moe=by_sparse_step,
    ),
    Family(
        model_types=("qwen3_vl_moe", "qwen3_vl_moe_text"),
        blocks=("mlp",),
        num_experts=Key("num_local_experts", "num_experts"),
        k=PER_TOKEN,
        width=Key("moe_intermediate_size"),
        router=SOFTMAX_SUM_1,
        router_weight=("gate.weight",),
        experts=(OUT_IN, IN_OUT),
        is_moe=by_sparse_step,
    ),
    Family(
        model_types=("olmoe",),
        blocks=("mlp",),
        num_experts=Key("num_experts"),
        k=PER_TOKEN,
        width=Key("intermediate_size"),
        router={"score": "softmax", "norm_topk_prob": Key("norm_topk_prob", default=False)},
        router_weight=("gate.weight",),
        experts=(BY_NAME, OUT_IN),
    ),
    Family(
        model_types=("jamba",),
        blocks=("feed_forward",),
        num_experts=Key("num_experts"),
        k=PER_TOKEN,
        width=Key("intermediate_size"),
        router=SOFTMAX,
        router_weight=("router.weight",),
        experts=(BY_NAME, OUT_IN),
        is_moe=by_period,
    ),
    Family(
        model_types=("deepseek_v2",),
        blocks=("mlp",),
        num_experts=Key("n_routed_experts"),
        k=PER_TOKEN,
        width=Key("moe_intermediate_size"),
        router={
            "score": "softmax",
            "groups": By(Key("topk_method"), {"greedy": 1, "group_limited_greedy": Key("n_group")}),
            "topk_groups": By(
                Key("topk_method"), {"greedy": 1, "group_limited_greedy": Key("topk_group")}
            ),
            "group_score": "max",
            "scale": Key("routed_scaling_factor"),
        },
        router_weight=("gate.weight",),
        experts=(BY_NAME, OUT_IN),
        shared=_shared_experts(
            Key("n_shared_experts", null=0, default=2), biases=Key("mlp_bias", default=False)
        ),
        is_moe=after_the_dense_ones,
    ),
    Family(
        model_types=("deepseek_v3",),
        blocks=("mlp",),
        num_experts=Key("n_routed_experts"),
        k=PER_TOKEN,
        width=Key("moe_intermediate_size"),
        router=_deepseek_v3_router(Key("n_group"), Key("topk_group")),
        router_weight=("gate.weight",),
        selection_bias=("gate.e_score_correction_bias",),
        experts=(BY_NAME, OUT_IN),
        shared=_shared_experts(Key("n_shared_experts", null=0, default=1)),
        is_moe=after_the_dense_ones,
    ),
    Family(
        model_types=("glm4_moe",),
        blocks=("mlp",),
        num_experts=Key("n_routed_experts"),
        k=PER_TOKEN,
        width=Key("moe_intermediate_size"),
        router=_deepseek_v3_router(Key("n_group", default=1), Key("topk_group", default=1)),
        router_weight=("gate.weight",),
        selection_bias=("gate.e_score_correction_bias",),
        experts=(BY_NAME, OUT_IN),
        shared=_shared_experts(Key("n_shared_experts", null=0, default=1)),
        is_moe=after_the_dense_ones,
    ),
    Family(
        model_types=("dots1",),
        blocks=("mlp",),
        num_experts=Key("n_routed_experts"),
        k=PER_TOKEN,
        width=Key("moe_intermediate_size"),
        router=_deepseek_v3_router(Key("n_group", default=1), Key("topk_group", default=1)),
        router_weight=("gate.weight",),
        selection_bias=("gate.e_score_correction_bias",),
        experts=(BY_NAME, OUT_IN),
        shared=_shared_experts(Key("n_shared_experts", null=0)),
        is_moe=after_the_dense_ones,
    ),
    Family(
        model_types=("ernie4_5_moe",),
        blocks=("mlp",),
        num_experts=Key("moe_num_experts"),
        k=Key("num_experts_per_tok", "moe_k"),
        width=Key("moe_intermediate_size"),
        router={
            "score": "softmax",
            "norm_topk_prob": True,
            "norm_min": Key("moe_norm_min", default=1e-12),
        },
        router_weight=("gate.weight",),
        selection_bias=(
            "moe_statics.e_score_correction_bias",
            "gate.moe_statics.e_score_correction_bias",
        ),
        experts=(BY_NAME, OUT_IN),
        shared=_shared_experts(
            Key("moe_num_shared_experts", default=2), biases=Key("use_bias", default=False)
        ),
        is_moe=between_start_and_end,
    ),
    Family(
        model_types=("hunyuan_v1_moe",),
        blocks=("mlp",),
        num_experts=Key("num_experts"),
        k=Key("num_experts_per_tok", "moe_topk"),
        width=Key("intermediate_size"),
        router=SOFTMAX_SUM_1,
        router_weight=("gate.wg.weight",),
        experts=(BY_NAME, OUT_IN),
        shared=Shared("shared_mlp", Key("intermediate_size")),
    ),
    Family(
        model_types=("granitemoe",),
        blocks=("block_sparse_moe",),
        num_experts=Key("num_local_experts"),
        k=PER_TOKEN,
        width=Key("intermediate_size"),
        router={"score": "softmax_chosen"},
        router_weight=("router.layer.weight", "router.weight"),
        experts=(LINEAR, OUT_IN),
    ),
    Family(
        model_types=("gpt_oss",),
        blocks=("mlp",),
        num_experts=Key("num_local_experts"),
        k=PER_TOKEN,
        width=Key("intermediate_size"),
        router={"score": "softmax_chosen"},
        router_weight=("router.weight",),
        router_bias=("router.bias",),
        experts=(ALTERNATING_MXFP4, ALTERNATING),
        options={
            "limit": Key("swiglu_limit", default=7.0),
            "alpha": Key("swiglu_alpha", default=1.702),
            "up_offset": 1.0,
        },
    ),
    Family(
        model_types=("llama4", "llama4_text"),
        blocks=("feed_forward",),
        num_experts=Key("num_local_experts"),
        k=PER_TOKEN,
        width=Key("intermediate_size"),
        router={"score": "sigmoid_chosen", "apply_router_weight_on_input": True},
        router_weight=("router.weight",),
        experts=(IN_OUT,),
        shared=Shared("shared_expert", Key("intermediate_size")),
        is_moe=listed_or_by_step,
    ),
)

PREFIXES = (
    "model.layers.{layer}.",
    "model.language_model.layers.{layer}.",
    "language_model.model.layers.{layer}.",
    "language_model.layers.{layer}.",
    "layers.{layer}.",
    "transformer.layers.{layer}.",
)
"""What stands before the block's name: plain models, the text half of composite ones, and models
that answer questions."""

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}
"""Our name of each ``hidden_act``."""


def find_family(model_type: str, families: tuple[Family, ...]) -> Family:
    """Return the first family that a model type belongs to."""
    for family in families:
        if model_type in family.model_types:
            return family
    known = sorted({name for family in families for name in family.model_types})
    raise ValueError(
        f"the model type must be one of {', '.join(known)}; config.json says {model_type!r}. To "
        "add a family, see dask_ep.layers.families.Family"
    )
