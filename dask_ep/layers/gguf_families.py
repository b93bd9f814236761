"""Which architectures of GGUF files are known?

All architectures use the same names of tensors, and the same keys for sizes, prefixed by the name
of the architecture: ``qwen3moe.expert_count``. Definitions differ in what the files do not state.
"""

from __future__ import annotations

from dataclasses import replace

from dask_ep.layers.family import By, Family, Key, Product, Shared, TensorLayout
from dask_ep.layers.family_parts import (
    SOFTMAX,
    SOFTMAX_SUM_1,
    SWIGLU_OAI,
    changed_shared,
    listed_or_by_step,
)

OF_ALL = {weight: f"ffn_{weight}_exps.weight" for weight in ("gate", "up", "down")}
OF_EACH = {weight: f"ffn_{weight}.{{e}}.weight" for weight in OF_ALL}
OF_BOTH = {"gate_up": "ffn_gate_up_exps.weight", "down": OF_ALL["down"]}
OF_SHARED = {weight: f"ffn_{weight}_shexp.weight" for weight in OF_ALL}
FEED_FORWARD = Key("expert_feed_forward_length", "feed_forward_length")
SCALE = Key("expert_weights_scale", off=1.0, default=1.0)
CHOSEN_OF_ALL = {**SOFTMAX, "scale": SCALE}

LLAMA = Family(
    model_types=("llama", "qwen3moe", "qwen3vlmoe"),
    blocks=("",),
    num_experts=Key("expert_count"),
    k=Key("expert_used_count"),
    width=FEED_FORWARD,
    router={**SOFTMAX_SUM_1, "scale": SCALE},
    router_weight=("ffn_gate_inp.weight",),
    experts=tuple(map(TensorLayout, (OF_ALL, OF_BOTH, OF_EACH))),
    options={"activation": "silu"},
    is_moe=listed_or_by_step,
    num_layers=Key("block_count"),
    hidden_size=Key("embedding_length"),
    not_read={r"ssm_": "what replaces attention"},
)
QWEN2_GGUF = replace(
    LLAMA,
    model_types=("qwen2moe",),
    router=CHOSEN_OF_ALL,
    shared=Shared(
        "",
        Key("expert_shared_feed_forward_length"),
        gate="ffn_gate_inp_shexp.weight",
        names=(OF_SHARED,),
    ),
)


def deepseek_like(*model_types: str, score: Key) -> Family:
    """Return a family with a router like DeepSeek's; `score` is 1 for softmax, 2 for sigmoid."""
    return replace(
        LLAMA,
        model_types=model_types,
        router={
            "score": By(score, {1: "softmax", 2: "sigmoid"}),
            "norm_topk_prob": Key("expert_weights_norm", default=False),
            "norm_eps": 1e-20,
            "scale": SCALE,
            "groups": Key("expert_group_count", off=1, default=1),
            "topk_groups": Key("expert_group_used_count", off=1, default=1),
            "group_score": By(score, {1: "max", 2: "top2"}),
        },
        selection_bias=("exp_probs_b.bias",),
        biased=By(score, {1: False, 2: True}),
        shared=Shared(
            "", Product((FEED_FORWARD, Key("expert_shared_count", default=0))), names=(OF_SHARED,)
        ),
    )


GATING = "expert_gating_func"
MINIMAX_GGUF = deepseek_like("minimax-m2", score=Key(GATING))

GGUF_FAMILIES: tuple[Family, ...] = (
    LLAMA,
    replace(LLAMA, model_types=("olmoe",), router=CHOSEN_OF_ALL),
    QWEN2_GGUF,
    replace(QWEN2_GGUF, model_types=("qwen3next", "qwen35moe"), router=LLAMA.router),
    replace(
        QWEN2_GGUF,
        model_types=("hunyuan-moe",),
        router=LLAMA.router,
        shared=changed_shared(QWEN2_GGUF, gate=None),
    ),
    deepseek_like("deepseek2", score=Key(GATING, off=1, default=1)),
    deepseek_like("glm4moe", score=Key(GATING, off=2, default=2)),
    deepseek_like("dots1", "glm-dsa", score=Key(GATING)),
    replace(MINIMAX_GGUF, router={**MINIMAX_GGUF.router, "norm_topk_prob": True}),
    replace(
        LLAMA,
        model_types=("gpt-oss",),
        router={"score": "softmax_chosen", "scale": SCALE},
        router_bias=("ffn_gate_inp.bias",),
        experts=(TensorLayout(OF_ALL, biases=True),),
        options=SWIGLU_OAI,
    ),
)
