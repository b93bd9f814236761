"""Which families have routers whose scores are sigmoids, or square roots of softplus?"""

from __future__ import annotations

from dataclasses import replace

from dask_ep.layers.family import (
    MOE_WIDTH,
    NAMED,
    OUT_IN,
    UNGATED,
    By,
    Family,
    Key,
    Length,
    MlpTypes,
    Product,
    Shared,
    StepRow,
    TensorLayout,
    below,
)
from dask_ep.layers.family_parts import (
    BY_NUMBER,
    CLAMPED,
    DEEPSEEK_BIAS,
    IN_OUT,
    INTERMEDIATE_SIZE,
    MIXTRAL_BLOCKS,
    MLP_BIAS,
    NAMED_OR_NUMBERED,
    RMS_NORM_EPS,
    SWIGLU_OAI,
    after_the_dense_ones,
    all_but_mlp_only,
    by_block_type,
    by_enum,
    changed_shared,
    deepseek_v3_router,
    listed_or_by_step,
    shared_experts,
    sigmoid_router,
)

CLAMPED_SILU = {**CLAMPED, "activation": "silu"}
SHARED_WIDTH = Key("shared_expert_intermediate_size")

DEEPSEEK_V3 = Family(
    model_types=("deepseek_v3", "kimi_k2"),
    num_experts=Key("n_routed_experts"),
    router=deepseek_v3_router(Key("n_group"), Key("topk_group")),
    selection_bias=DEEPSEEK_BIAS,
    shared=shared_experts(Key("n_shared_experts", null=0, default=1)),
    is_moe=after_the_dense_ones,
)
GLM4 = replace(
    DEEPSEEK_V3,
    model_types=("glm4_moe", "glm4v_moe", "glm4v_moe_text"),
    router=deepseek_v3_router(Key("n_group", default=1), Key("topk_group", default=1)),
)
BAILING = replace(
    GLM4,
    model_types=("bailing_hybrid",),
    num_experts=Key("num_experts", "num_local_experts"),
    k=Key("num_experts_per_token", "num_experts_per_tok"),
    router={
        **deepseek_v3_router(
            Key("num_expert_group", "n_group", default=1), Key("topk_group", null=1, default=1)
        ),
        "norm_topk_prob": Key("moe_renormalize", "norm_topk_prob"),
    },
    selection_bias=("gate.expert_bias", *DEEPSEEK_BIAS),
    shared=shared_experts(Key("num_shared_experts", "n_shared_experts", null=0, default=1)),
    is_moe=MlpTypes(dense=2),
)
MINIMAX_M2 = Family(
    model_types=("minimax_m2",),
    blocks=MIXTRAL_BLOCKS,
    num_experts=Key("num_local_experts"),
    width=INTERMEDIATE_SIZE,
    router=sigmoid_router(),
    selection_bias=("e_score_correction_bias", *DEEPSEEK_BIAS),
    experts=(BY_NUMBER, OUT_IN),
)
HY_V3 = Family(
    model_types=("hy_v3",),
    num_experts=Key("num_experts", "num_local_experts"),
    router=sigmoid_router(scale=Key("router_scaling_factor"), eps=1e-20),
    router_weight=("router.gate.weight", "gate.weight"),
    selection_bias=("expert_bias", "e_score_correction_bias"),
    shared=Shared(
        ("shared_mlp", "shared_experts"),
        Product((MOE_WIDTH, Key("num_shared_experts"))),
        biases=MLP_BIAS,
    ),
    is_moe=MlpTypes(dense=1),
)
LAGUNA = Family(
    model_types=("laguna",),
    num_experts=Key("num_experts", "num_local_experts"),
    router={
        **sigmoid_router(scale=Key("moe_routed_scaling_factor", default=1.0)),
        "logit_softcap": Key("moe_router_logit_softcapping", off=None, default=None),
        "apply_router_weight_on_input": By(
            Key("moe_apply_router_weight_on_input", default=False), {False: False}
        ),
    },
    selection_bias=("experts.e_score_correction_bias", *DEEPSEEK_BIAS),
    shared=Shared(("shared_expert", "shared_experts"), SHARED_WIDTH),
    is_moe=MlpTypes(dense=1),
)

ALTERNATING_W13 = TensorLayout(
    {"gate_up": "experts.w13_weight", "down": "experts.w2_weight"}, interleaved=True
)
AROUND = "what the layer reads from other layers"

SIGMOID_FAMILIES: tuple[Family, ...] = (
    DEEPSEEK_V3,
    GLM4,
    replace(GLM4, model_types=("dots1",), shared=shared_experts(Key("n_shared_experts", null=0))),
    replace(DEEPSEEK_V3, model_types=("deepseek_v32",), is_moe=MlpTypes(dense=3)),
    replace(GLM4, model_types=("glm_moe_dsa",), is_moe=MlpTypes(dense=3)),
    replace(GLM4, model_types=("glm4_moe_lite",), is_moe=MlpTypes(dense=1)),
    replace(
        GLM4,
        model_types=("glm5_next", "glm5_next_text"),
        options=CLAMPED_SILU,
        shared=changed_shared(GLM4, options=CLAMPED),
        is_moe=MlpTypes(dense=3),
    ),
    replace(GLM4, model_types=("solar_open",), is_moe=MlpTypes()),
    replace(
        GLM4,
        model_types=("sarvam_moe", "sarvam_mla"),
        num_experts=Key("n_routed_experts", "num_experts"),
        selection_bias=BAILING.selection_bias,
        shared=BAILING.shared,
        is_moe=MlpTypes(dense=1),
    ),
    replace(
        GLM4,
        model_types=("exaone_moe",),
        num_experts=Key("num_experts"),
        selection_bias=("e_score_correction_bias", *DEEPSEEK_BIAS),
        shared=shared_experts(Key("num_shared_experts", null=0, default=1)),
        is_moe=MlpTypes(dense=1),
    ),
    replace(
        GLM4,
        model_types=("mimo_v2_flash",),
        router={**GLM4.router, "scale": Key("routed_scaling_factor", null=1.0, default=1.0)},
        shared=None,
        is_moe=MlpTypes(dense=1),
    ),
    replace(
        GLM4,
        model_types=("beam",),
        num_experts=Key("num_experts"),
        shared=None,
        is_moe=MlpTypes(dense=3),
    ),
    replace(
        GLM4,
        model_types=("dots3_note", "dots3_note_text"),
        shared=Shared(
            "shared_experts",
            Product(
                (
                    Key("moe_shared_expert_intermediate_size", "shared_experts_intermediate_size"),
                    Key("n_shared_experts"),
                )
            ),
        ),
        is_moe=MlpTypes(dense=1),
    ),
    replace(
        GLM4,
        model_types=("hy_v4", "hy_v4_vl", "hy_v4_vl_text"),
        options=CLAMPED_SILU,
        shared=changed_shared(
            GLM4,
            names=({**NAMED, "gate": "linear_gate.weight"}, NAMED),
            options={"activation": Key("hidden_act", default="silu")},
        ),
        is_moe=MlpTypes(dense=1),
    ),
    replace(
        GLM4,
        model_types=("axk2",),
        # Experts in groups that are not chosen get a score of 0, not minus infinity.
        router={
            **deepseek_v3_router(
                Key("n_group", null=1, default=1), Key("topk_group", null=1, default=1)
            ),
            "masked_score": 0.0,
        },
        is_moe=MlpTypes(dense=1),
    ),
    replace(
        DEEPSEEK_V3,
        model_types=("axk1",),
        after=(
            StepRow(
                "rms_norm",
                ("/post_mlp_layernorm.weight", "post_mlp_layernorm.weight"),
                eps=RMS_NORM_EPS,
            ),
        ),
        is_moe=MlpTypes(dense=1),
    ),
    replace(
        GLM4,
        model_types=("nemotron_h",),
        blocks=("mixer",),
        experts=(
            TensorLayout(below("experts.{e}.", UNGATED)),
            TensorLayout({"up": "experts.up_proj", "down": "experts.down_proj"}),
        ),
        options={"activation": Key("mlp_hidden_act", default="relu2")},
        shared=Shared(
            "shared_experts",
            Key("moe_shared_expert_intermediate_size"),
            biases=MLP_BIAS,
            names=(UNGATED,),
        ),
        expert_size=Key("moe_latent_size", default=None),
        before=(
            StepRow(
                "linear",
                ("fc1_latent_proj.weight",),
                to=Key("moe_latent_size", default=None),
                bias=MLP_BIAS,
                there=Key("moe_latent_size", default=False),
            ),
        ),
        between=(
            StepRow(
                "linear",
                ("fc2_latent_proj.weight",),
                to=Key("hidden_size"),
                bias=MLP_BIAS,
                there=Key("moe_latent_size", default=False),
            ),
        ),
        is_moe=by_block_type,
        num_layers=Length(("layers_block_type", "hybrid_override_pattern")),
    ),
    Family(
        model_types=("inkling_mm_model", "inkling_text"),
        num_experts=Key("n_routed_experts"),
        width=Key("moe_intermediate_size", "intermediate_size"),
        router={
            **sigmoid_router(scale=Key("route_scale", default=8.0)),
            "always": Key("n_shared_experts"),
        },
        selection_bias=(*DEEPSEEK_BIAS, "gate.bias"),
        per_expert_scale=("gate.global_scale",),
        experts=(ALTERNATING_W13, OUT_IN),
        shared=Shared(
            "shared_experts",
            Key("moe_intermediate_size", "intermediate_size"),
            names=(
                {weight: name.removesuffix(".weight") for weight, name in NAMED.items()},
                {"gate_up": "shared_w13_weight", "down": "shared_w2_weight"},
            ),
            count=Key("n_shared_experts"),
            interleaved=True,
        ),
        beyond="shared",
        beyond_experts=Key("n_shared_experts"),
        is_moe=MlpTypes(),
    ),
    Family(
        model_types=("inkling2", "inkling2_text", "inkling2_loop", "inkling2_loop_text"),
        num_experts=Key("n_routed_experts"),
        router=sigmoid_router(scale=Key("route_scale", default=8.0), eps=1e-20),
        selection_bias=(*DEEPSEEK_BIAS, "gate.bias"),
        experts=(ALTERNATING_W13, OUT_IN),
        options={
            "activation": "silu",
            "soft_caps": (
                Key("mlp_gate_softcap", default=4.0),
                Key("mlp_up_softcap", default=25.0),
            ),
        },
        not_read={r"(mlp_input|[qkv]_message_gate|mlp_message_gate|controllers)\.": AROUND},
    ),
    Family(
        model_types=("muse_spark", "muse_spark_text"),
        num_experts=Key("num_local_experts"),
        router={
            **sigmoid_router(scale=Key("routed_scaling_factor", default=1.0), eps=1e-15),
            "logit_scale": Key("output_multiplier", default=32**-0.5),
        },
        selection_bias=DEEPSEEK_BIAS,
        expert_size=Key("moe_hidden_size", default=4096),
        before=(
            StepRow("linear", ("pre_expert_proj.weight",), to=Key("moe_hidden_size", default=4096)),
            StepRow(
                "rms_norm",
                ("pre_expert_norm.weight",),
                eps=Key("rms_norm_eps", default=1e-5),
                offset=1.0,
            ),
        ),
        between=(StepRow("linear", ("post_expert_proj.weight",), to=Key("hidden_size")),),
        options={
            "activation": Key("hidden_act", default="silu"),
            "output_norm_eps": Key("post_norm_eps", default=1e-8),
        },
        output_scale=("experts.post_expert_norm.weight",),
        is_moe=MlpTypes(),
    ),
    BAILING,
    replace(
        BAILING,
        # Ling and Ring, which are not in transformers: scores are softmax in 1.5, sigmoid in 2.0.
        model_types=("bailing_moe", "bailing_moe_v2"),
        router={
            **BAILING.router,
            "score": Key("score_function", default="softmax"),
            "scale": Key("routed_scaling_factor", default=1.0),
        },
        biased=Key("moe_router_enable_expert_bias", default=False),
        is_moe=MlpTypes(),
    ),
    replace(
        BAILING,
        model_types=("kimi_linear",),
        blocks=MIXTRAL_BLOCKS,
        experts=(BY_NUMBER, OUT_IN),
        is_moe=MlpTypes(dense=1),
    ),
    MINIMAX_M2,
    replace(
        MINIMAX_M2,
        model_types=("minimax_m3_vl", "minimax_m3_vl_text"),
        router=sigmoid_router(scale=Key("routed_scaling_factor")),
        options=SWIGLU_OAI,
        shared=Shared(
            "shared_experts",
            Key("shared_intermediate_size"),
            names=(NAMED, {"gate_up": "gate_up_proj.weight", "down": "down_proj.weight"}),
        ),
        is_moe=MlpTypes(),
    ),
    HY_V3,
    replace(
        HY_V3,
        model_types=("afmoe",),
        router=sigmoid_router(scale=Key("route_scale", default=1.0), eps=1e-20),
        shared=shared_experts(Key("num_shared_experts", default=2)),
    ),
    Family(
        model_types=("lfm2_moe",),
        blocks=("feed_forward",),
        num_experts=Key("num_experts"),
        router=sigmoid_router(
            scale=Key("routed_scaling_factor", default=1.0),
            norm=Key("norm_topk_prob", default=True),
            eps=1e-6,
        ),
        selection_bias=("expert_bias",),
        biased=Key("use_expert_bias", default=True),
        experts=(BY_NUMBER, OUT_IN),
        options={"activation": "silu"},
        is_moe=MlpTypes(dense=2),
    ),
    Family(
        model_types=("step3p7", "step3p5"),
        blocks=("moe", "mlp"),
        num_experts=Key("n_routed_experts", "moe_num_experts"),
        k=Key("num_experts_per_tok", "moe_top_k"),
        router=sigmoid_router(scale=Key("moe_router_scaling_factor", default=1.0)),
        selection_bias=("router_bias", *DEEPSEEK_BIAS),
        experts=(TensorLayout(NAMED), OUT_IN),
        options={
            "activation": "silu",
            "limit": Key("swiglu_limits", off=None, default=None),
            "clamp_after": True,
        },
        shared=Shared(
            ("/share_expert", "shared_experts"),
            Key("share_expert_dim", "share_expert_dims"),
            biases=MLP_BIAS,
            options={
                "activation": "silu",
                "limit": Key("swiglu_limits_shared", off=None, default=None),
                "clamp_after": True,
            },
        ),
        is_moe=by_enum,
    ),
    LAGUNA,
    replace(
        LAGUNA,
        model_types=("kolibri1",),
        num_experts=Key("num_local_experts", "num_experts"),
        router={"score": "sigmoid_chosen", "norm_topk_prob": Key("norm_topk_prob", default=False)},
        selection_bias=("/moe.router.expert_bias", *DEEPSEEK_BIAS),
        shared=Shared("shared_experts", SHARED_WIDTH),
        is_moe=MlpTypes(),
    ),
    replace(
        LAGUNA,
        model_types=("flint",),
        router=sigmoid_router(norm=Key("norm_topk_prob", default=True)),
        selection_bias=(),
        shared=Shared("shared_expert", SHARED_WIDTH),
        is_moe=all_but_mlp_only,
    ),
    Family(
        model_types=("deepseek_v4",),
        blocks=("ffn", "mlp"),
        num_experts=Key("n_routed_experts", "num_local_experts"),
        router={
            **sigmoid_router(scale=Key("routed_scaling_factor"), eps=1e-20),
            "score": Key("scoring_func", default="sqrtsoftplus"),
        },
        selection_bias=("gate.bias", *DEEPSEEK_BIAS),
        table=("gate.tid2eid",),
        experts=(BY_NUMBER, OUT_IN),
        options=CLAMPED,
        shared=Shared("shared_experts", MOE_WIDTH, biases=MLP_BIAS, names=NAMED_OR_NUMBERED),
    ),
    Family(
        model_types=("llama4", "llama4_text"),
        blocks=("feed_forward",),
        num_experts=Key("num_local_experts"),
        width=INTERMEDIATE_SIZE,
        router={"score": "sigmoid_chosen", "apply_router_weight_on_input": True},
        router_weight=("router.weight",),
        experts=(IN_OUT,),
        shared=Shared("shared_expert", INTERMEDIATE_SIZE),
        is_moe=listed_or_by_step,
    ),
)
