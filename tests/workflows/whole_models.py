"""Small whole models of several families with random weights, made by transformers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

VOCABULARY = 61

SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "intermediate_size": 24,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT = {
    "num_key_value_heads": 4, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 8, "head_dim": 8, "n_routed_experts": 12,
    "num_experts_per_tok": 3, "n_group": 3, "topk_group": 2, "moe_intermediate_size": 20,
    "n_shared_experts": 2, "first_k_dense_replace": 1, "norm_topk_prob": True,
}  # fmt: skip
QWEN = {"num_experts": 9, "num_experts_per_tok": 3, "moe_intermediate_size": 20, "head_dim": 16}
LINEAR = {
    "shared_expert_intermediate_size": 24, "linear_num_key_heads": 1, "linear_num_value_heads": 2,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "full_attention_interval": 2,
}  # fmt: skip
INDEXER = {"index_topk": 4, "index_head_dim": 16, "index_n_heads": 16, "index_kpool": 2}
MIXED = {"indexer_types": ["full", "shared", "full", "shared"]}
LLAMA4 = {
    "num_local_experts": 7, "num_experts_per_tok": 1, "head_dim": 16, "intermediate_size_mlp": 28,
    "interleave_moe_layer_step": 2, "attention_chunk_size": 8,
}  # fmt: skip

COMPUTED = ("inv_freq", "slope_rate", "query_decay", "key_decay", "diagonal_decay")
"""Buffers that follow from the config."""

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": 5}),
    "qwen3_moe": ("Qwen3Moe", QWEN | {"decoder_sparse_step": 2, "norm_topk_prob": True}),
    "qwen3_next": ("Qwen3Next", QWEN | LINEAR | {"norm_topk_prob": True}),
    "olmoe": ("Olmoe", {"num_experts": 12, "num_experts_per_tok": 5}),
    "deepseek_v2": (
        "DeepseekV2",
        LATENT | {"topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0},
    ),
    "deepseek_v3": ("DeepseekV3", LATENT | {"routed_scaling_factor": 2.5}),
    "gpt_oss": (
        "GptOss",
        {"num_local_experts": 7, "num_experts_per_tok": 3, "head_dim": 16, "sliding_window": 5},
    ),
    "glm4_moe": (
        "Glm4Moe",
        {"n_routed_experts": 10, "num_experts_per_tok": 4, "moe_intermediate_size": 20,
         "n_shared_experts": 1, "first_k_dense_replace": 1, "head_dim": 16},
    ),
    "kolibri1": (
        "Kolibri1", QWEN | {"shared_expert_intermediate_size": 24, "sliding_window": 5}
    ),
    "granitemoe": (
        "GraniteMoe",
        {"num_local_experts": 9, "num_experts_per_tok": 4, "embedding_multiplier": 3.0,
         "residual_multiplier": 0.7, "logits_scaling": 2.0, "attention_multiplier": 0.3},
    ),
    "granitemoeshared": (
        "GraniteMoeShared",
        {"num_local_experts": 9, "num_experts_per_tok": 4, "shared_intermediate_size": 20,
         "residual_multiplier": 0.7},
    ),
    "granitemoehybrid": (
        "GraniteMoeHybrid",
        {"num_local_experts": 9, "num_experts_per_tok": 4, "shared_intermediate_size": 20,
         "layer_types": ["mamba", "full_attention"] * 2, "mamba_n_heads": 4, "mamba_d_head": 16,
         "mamba_d_state": 8},
    ),
    "phimoe": (
        "Phimoe",
        {"num_local_experts": 6, "num_experts_per_tok": 2, "lm_head_bias": True},
    ),
    "minimax": (
        "MiniMax",
        {"num_local_experts": 6, "num_experts_per_tok": 2, "head_dim": 8, "block_size": 8},
    ),
    "jamba": (
        "Jamba",
        {"num_experts": 9, "num_experts_per_tok": 2, "expert_layer_period": 2,
         "expert_layer_offset": 1, "attn_layer_period": 2, "attn_layer_offset": 0,
         "mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False},
    ),
    # several streams of hidden states, experts looked up by token in the first blocks
    "deepseek_v4": (
        "DeepseekV4",
        LATENT | INDEXER | {
            "head_dim": 16, "n_shared_experts": 1, "hc_mult": 3, "sliding_window": 5,
            "mlp_layer_types": ["hash_moe", "hash_moe", "moe", "moe"], "o_groups": 1,
            "o_lora_rank": 8, "num_nextn_predict_layers": 0, "index_topk": 2,
            "layer_types": ["sliding_attention", "compressed_sparse_attention",
                            "heavily_compressed_attention", "compressed_sparse_attention"],
            "compress_rates": {"compressed_sparse_attention": 2,
                               "heavily_compressed_attention": 4},
        },
    ),
    # tokens to attend to go from block to block, with one or several streams
    "glm_moe_dsa": ("GlmMoeDsa", LATENT | INDEXER | MIXED | {"head_dim": 16}),
    "hy_v4": ("HYV4", LATENT | INDEXER | MIXED | {"mlp_layer_types": ["dense"] + 3 * ["sparse"]}),
    "glm5_next": (
        "Glm5Next/ForConditionalGeneration",
        {"text_config": SMALL | LATENT | INDEXER | {
            "qk_rope_head_dim": 0, "linear_head_dim": 16, "linear_num_heads": 2,
            "linear_conv_kernel_dim": 4, "mlp_layer_types": ["dense"] + 3 * ["sparse"]},
         "vision_config": {
            "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2,
            "out_hidden_size": 32, "num_position_embeddings": 16, "deepstack_visual_indexes": [],
        }},
    ),
    "qwen4_exp": (
        "Qwen4Exp",
        QWEN | LINEAR | {
            "hc_count": 3, "hc_lowrank": 4,
            "layer_types": ["linear_attention", "indexed_attention"] * 2,
            "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16,
            "indexer_budget": 4, "indexer_compress_ratio": 2, "ple_layer_ids": [1, 3],
            "ple_embed_dim": 16, "ngram_vocab_size_base": 50, "heads_per_ngram": 2,
            "split_ngram_parts": 2, "make_ngram_vocab_size_divisible_by": 8,
        },
    ),
    # blocks take what several earlier ones gave
    "inkling2": (
        "Inkling2",
        {"n_routed_experts": 9, "num_experts_per_tok": 3, "moe_intermediate_size": 20,
         "head_dim": 16, "n_layers_per_attn_res_block": 2, "mlp_gate_softcap": 0.7,
         "mlp_up_softcap": 1.5, "unpadded_vocab_size": VOCABULARY},
    ),
    # router, norms and experts are the block's own modules
    "gemma4": (
        "Gemma4",
        {"num_experts": 9, "top_k_experts": 3, "moe_intermediate_size": 20, "head_dim": 16,
         "enable_moe_block": True, "hidden_size_per_layer_input": 0, "global_head_dim": 16,
         "vocab_size_per_layer_input": 16, "num_kv_shared_layers": 0, "sliding_window": 5},
    ),
    "llama4": ("Llama4", LLAMA4),
    "llama4_for_images": (
        "Llama4/ForConditionalGeneration",
        {"text_config": SMALL | LLAMA4, "vision_config": {
            "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "vision_output_dim": 32, "projector_input_dim": 32,
            "projector_output_dim": 32, "image_size": 28, "patch_size": 14,
        }},
    ),
    "qwen3_vl_moe": (
        "Qwen3VLMoe/ForConditionalGeneration",
        {"text_config": SMALL | QWEN | {"decoder_sparse_step": 1},
         "vision_config": {
            "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2,
            "out_hidden_size": 32, "num_position_embeddings": 16, "deepstack_visual_indexes": [],
        }},
    ),
}  # fmt: skip


def make_model(family: str, directory: Path, seed: int = 0, **changes: Any) -> torch.nn.Module:
    """Build a model with random weights and save it; give it back in float32."""
    name, config = FAMILIES[family]
    name, _, kind = name.partition("/")
    model_class = getattr(transformers, name + (kind or "ForCausalLM"))
    base = {} if kind else SMALL
    model = model_class(model_class.config_class(**base | config | changes)).eval()
    fill(model, seed)
    model.save_pretrained(directory)
    return model_class.from_pretrained(directory, dtype=torch.float32).eval()


def fill(model: torch.nn.Module, seed: int = 0) -> None:
    """Give all parameters random values, such that no two experts score alike."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("tid2eid"):
                for row in tensor:
                    row.copy_(torch.randperm(12, generator=generator)[: len(row)])
            if not tensor.is_floating_point() or any(name.endswith(one) for one in COMPUTED):
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            norm = ("norm" in name or "scalar" in name) and tensor.ndim == 1
            tensor.copy_(1 + 0.1 * noise if norm else 0.2 * noise)
