"""Which families have routers with softmax scores?

All definitions follow transformers 5.24; `tests/fixtures` has a checkpoint of each family.
"""

from __future__ import annotations

from dataclasses import replace

from dask_ep.layers.family import (
    BY_NAME,
    FUSED,
    LINEAR_PAIR,
    OUT_IN,
    By,
    Entry,
    Family,
    Key,
    MlpTypes,
    Power,
    Product,
    Shared,
    StepRow,
    TensorLayout,
)
from dask_ep.layers.family_parts import (
    ALTERNATING,
    ALTERNATING_MXFP4,
    BY_NUMBER,
    IN_OUT,
    INTERMEDIATE_SIZE,
    LINEAR,
    MIXTRAL_BLOCKS,
    MLP_BIAS,
    NAMED_OR_NUMBERED,
    QWEN_SHARED,
    RMS_NORM_EPS,
    SOFTMAX,
    SOFTMAX_SUM_1,
    SWIGLU_OAI,
    after_the_dense_ones,
    between_start_and_end,
    by_period,
    by_sparse_step,
    changed_shared,
    shared_experts,
    softmax_router,
    where_enabled,
    with_experts,
)

MIXTRAL = Family(
    model_types=("mixtral", "minimax"),
    blocks=MIXTRAL_BLOCKS,
    num_experts=Key("num_local_experts"),
    width=INTERMEDIATE_SIZE,
    router=SOFTMAX_SUM_1,
    experts=(BY_NUMBER, OUT_IN),
)
QWEN2 = Family(
    model_types=("qwen2_moe",),
    num_experts=Key("num_experts"),
    router=softmax_router(norm=False),
    shared=QWEN_SHARED,
    is_moe=by_sparse_step,
)
QWEN3_NEXT = replace(QWEN2, model_types=("qwen3_next",), router=softmax_router(norm=True))
QWEN3 = replace(
    QWEN2,
    model_types=("qwen3_moe",),
    num_experts=Key("num_local_experts", "num_experts"),
    shared=None,
)
OLMOE = replace(
    QWEN2,
    model_types=("olmoe", "flex_olmo"),
    width=INTERMEDIATE_SIZE,
    shared=None,
    is_moe=MlpTypes(),
)
DEEPSEEK_V2 = Family(
    model_types=("deepseek_v2",),
    num_experts=Key("n_routed_experts"),
    router={
        "score": "softmax",
        "groups": By(Key("topk_method"), {"greedy": 1, "group_limited_greedy": Key("n_group")}),
        "topk_groups": By(
            Key("topk_method"), {"greedy": 1, "group_limited_greedy": Key("topk_group")}
        ),
        "group_score": "max",
        "scale": Key("routed_scaling_factor"),
    },
    shared=shared_experts(Key("n_shared_experts", null=0, default=2), biases=MLP_BIAS),
    is_moe=after_the_dense_ones,
)
MISTRAL4 = replace(
    DEEPSEEK_V2,
    model_types=("mistral4",),
    router={
        **softmax_router(norm=True),
        "norm_eps": 1e-20,
        "groups": Key("n_group", null=1, default=1),
        "topk_groups": Key("topk_group", null=1, default=1),
        "group_score": "top2",
        "scale": Key("routed_scaling_factor", default=1.0),
    },
    shared=shared_experts(Key("n_shared_experts", null=0, default=1)),
    is_moe=MlpTypes(),
)
ERNIE = Family(
    model_types=("ernie4_5_moe",),
    num_experts=Key("moe_num_experts"),
    k=Key("num_experts_per_tok", "moe_k"),
    router={
        "score": "softmax",
        "norm_topk_prob": True,
        "norm_min": Key("moe_norm_min", default=1e-12),
    },
    selection_bias=(
        "moe_statics.e_score_correction_bias",
        "gate.moe_statics.e_score_correction_bias",
    ),
    shared=shared_experts(
        Key("moe_num_shared_experts", default=2), biases=Key("use_bias", default=False)
    ),
    is_moe=between_start_and_end,
)
GRANITE = Family(
    model_types=("granitemoe",),
    blocks=("block_sparse_moe",),
    num_experts=Key("num_local_experts"),
    width=INTERMEDIATE_SIZE,
    router={"score": "softmax_chosen"},
    router_weight=("router.layer.weight", "router.weight"),
    experts=(LINEAR, OUT_IN),
)
GPT_OSS = Family(
    model_types=("gpt_oss",),
    num_experts=Key("num_local_experts"),
    width=INTERMEDIATE_SIZE,
    router={"score": "softmax_chosen"},
    router_weight=("router.weight",),
    router_bias=("router.bias",),
    experts=(ALTERNATING_MXFP4, ALTERNATING),
    options=SWIGLU_OAI,
)

SELECTION = Key("expert_selection_fn", default="softmax")
GEMMA4 = Family(
    model_types=("gemma4", "gemma4_text"),
    blocks=("",),
    num_experts=Key("num_experts"),
    k=Key("top_k_experts"),
    router={
        **SOFTMAX_SUM_1,
        "input_norm_eps": RMS_NORM_EPS,
        "logit_scale": Power(Key("hidden_size"), -0.5),
    },
    router_weight=("router.proj.weight",),
    input_scale=("router.scale",),
    per_expert_scale=("router.per_expert_scale",),
    experts=(OUT_IN,),
    options={"activation": Key("hidden_activation", default="gelu_pytorch_tanh")},
    before=(StepRow("rms_norm", ("pre_feedforward_layernorm_2.weight",), eps=RMS_NORM_EPS),),
    after=(StepRow("rms_norm", ("post_feedforward_layernorm_2.weight",), eps=RMS_NORM_EPS),),
    is_moe=where_enabled,
    not_read={r"mlp\.": "the dense MLP of the layer"},
)

SOFTMAX_FAMILIES: tuple[Family, ...] = (
    MIXTRAL,
    replace(
        MIXTRAL,
        model_types=("phimoe",),
        k=2,  # transformers ignores the config's value
        router={"score": "sparsemixer", "jitter": Key("router_jitter_noise", default=0.01)},
        router_weight=("gate.weight", "router.weight"),
    ),
    QWEN2,
    QWEN3_NEXT,
    replace(
        QWEN2,
        model_types=("qwen3_5_moe", "qwen3_5_moe_text"),
        router=SOFTMAX_SUM_1,
        is_moe=MlpTypes(),
    ),
    replace(QWEN3_NEXT, model_types=("qwen4_exp", "qwen4_exp_text"), is_moe=MlpTypes()),
    QWEN3,
    replace(
        QWEN3,
        model_types=("qwen3_vl_moe", "qwen3_vl_moe_text"),
        router=SOFTMAX_SUM_1,
        experts=(OUT_IN, IN_OUT),
    ),
    replace(
        QWEN3,
        model_types=("qwen3_omni_moe", "qwen3_omni_moe_thinker", "qwen3_omni_moe_text"),
        router=softmax_router(norm=True),
    ),
    replace(QWEN3, model_types=("mellum",), router=softmax_router(norm=True), is_moe=MlpTypes()),
    replace(
        QWEN3_NEXT,
        model_types=("lara_mini",),
        shared=replace(QWEN_SHARED, gate=None),
        is_moe=MlpTypes(),
    ),
    OLMOE,
    replace(
        OLMOE,
        model_types=("jamba",),
        blocks=("feed_forward",),
        router=SOFTMAX,
        router_weight=("router.weight",),
        is_moe=by_period,
    ),
    DEEPSEEK_V2,
    replace(
        DEEPSEEK_V2,
        model_types=("deepseek_ocr2", "deepseek_ocr2_text", "unlimited_ocr", "unlimited_ocr_text"),
        is_moe=MlpTypes(dense=1),
    ),
    MISTRAL4,
    replace(
        MISTRAL4,
        model_types=("mistral_large4", "mistral_large4_text"),
        blocks=("", "mlp"),
        router={**MISTRAL4.router, "norm_topk_prob": True},
        experts=(BY_NUMBER, BY_NAME, OUT_IN),
        shared=changed_shared(MISTRAL4, names=NAMED_OR_NUMBERED),
        is_moe=MlpTypes(dense=1),
    ),
    ERNIE,
    replace(
        ERNIE,
        model_types=("ernie4_5_vl_moe", "ernie4_5_vl_moe_text"),
        num_experts=Entry("moe_num_experts", 0),
        width=Entry("moe_intermediate_size", 0),
        router_weight=("text_moe.gate.weight",),
        router_weight_in_out=("gate.weight",),
        selection_bias=(
            "moe_statics.e_score_correction_bias",
            "text_moe.gate.moe_statics.e_score_correction_bias",
        ),
        bias_rows=2,
        experts=(
            BY_NAME,
            TensorLayout({weight: f"text_moe.{name}" for weight, name in FUSED.items()}),
        ),
        shared=changed_shared(
            ERNIE,
            width=Product(
                (Entry("moe_intermediate_size", 0), Key("moe_num_shared_experts", default=2))
            ),
        ),
        is_moe=MlpTypes(dense=1),
        not_read={
            r"mlp\.(gate\.weight_1$|vision_moe\.)": "router and experts of image tokens",
            r"mlp\.experts\.\d+\.(gate|up|down)_proj\.weight$": "experts of image tokens",
        },
    ),
    Family(
        model_types=("hunyuan_v1_moe",),
        num_experts=Key("num_experts"),
        k=Key("num_experts_per_tok", "moe_topk"),
        width=INTERMEDIATE_SIZE,
        router=SOFTMAX_SUM_1,
        router_weight=("gate.wg.weight",),
        shared=Shared("shared_mlp", INTERMEDIATE_SIZE),
    ),
    GRANITE,
    replace(
        GRANITE,
        model_types=("granitemoeshared", "granitemoehybrid", "granitemoe_swa"),
        shared=Shared("/shared_mlp", Key("shared_intermediate_size"), names=(LINEAR_PAIR,)),
        is_moe=with_experts,
    ),
    Family(
        model_types=("aria", "aria_text"),
        num_experts=Key("moe_num_experts"),
        k=Key("moe_topk"),
        width=INTERMEDIATE_SIZE,
        router={"score": "softmax_chosen"},
        router_weight=("router.weight",),
        experts=(
            TensorLayout(
                {"gate_up": "experts.fc1.weight", "down": "experts.fc2.weight"}, transposed=False
            ),
            IN_OUT,
        ),
        options={"activation": "silu"},
        shared=Shared(
            "shared_experts",
            Product((INTERMEDIATE_SIZE, Key("moe_num_shared_experts", default=2))),
            biases=MLP_BIAS,
            options={"activation": Key("hidden_act", default="silu")},
        ),
    ),
    replace(
        GRANITE,
        model_types=("jetmoe",),
        blocks=("mlp",),
        options={"activation": Key("activation_function", default="silu")},
        after=(StepRow("add", ("bias",)),),
    ),
    replace(
        OLMOE,
        model_types=("cohere2_moe",),
        router={
            "score": By(SELECTION, {"softmax": "softmax_chosen", "sigmoid": "sigmoid_chosen"}),
            "norm_topk_prob": By(
                SELECTION, {"softmax": False, "sigmoid": Key("norm_topk_prob", default=True)}
            ),
        },
        shared=Shared(
            "shared_experts", Product((INTERMEDIATE_SIZE, Key("num_shared_experts", default=0)))
        ),
        after=(
            StepRow(
                "scale",
                factor=By(
                    Key("shared_expert_combination_strategy", default="average"),
                    {"sum": 1.0, "average": 0.5},
                ),
                there=Key("num_shared_experts", default=0),
            ),
        ),
    ),
    Family(
        model_types=("longcat_flash",),
        num_experts=Key("n_routed_experts"),
        k=Key("moe_topk", "num_experts_per_tok"),
        width=Key("expert_ffn_hidden_size", "moe_intermediate_size"),
        router={**SOFTMAX, "scale": Key("routed_scaling_factor")},
        router_weight=("router.classifier.weight",),
        selection_bias=("router.e_score_correction_bias",),
        beyond="identity",
        beyond_experts=Key("zero_expert_num", null=0),
        num_layers=Key("num_layers"),
        not_read={
            r"mlps\.": "the dense MLPs of the layer",
            r"mlp\.experts\.\d+\.(gate|up)_proj\.weight$": "projections of identity experts",
        },
    ),
    GEMMA4,
    replace(GEMMA4, model_types=("diffusion_gemma", "diffusion_gemma_text"), is_moe=MlpTypes()),
    Family(
        model_types=("dbrx",),
        blocks=("ffn",),
        num_experts=Key("ffn_config.moe_num_experts"),
        k=Key("ffn_config.moe_top_k"),
        width=Key("ffn_config.ffn_hidden_size"),
        router={
            "score": "softmax",
            # The order p of the p-norm that the weights are divided by; null means no division.
            "norm_topk_prob": By(
                Key("ffn_config.moe_normalize_expert_weights", null="none", default=1.0),
                {1.0: True, "none": False},
            ),
        },
        router_weight=("router.layer.weight",),
        experts=(
            TensorLayout(
                {"gate": "experts.mlp.w1", "up": "experts.mlp.v1", "down": "experts.mlp.w2"},
                flat=True,
            ),
        ),
        options={"activation": Key("ffn_config.ffn_act_fn.name", default="silu")},
        num_layers=Key("n_layers"),
        hidden_size=Key("d_model"),
    ),
    GPT_OSS,
    replace(
        GPT_OSS,
        model_types=("openai_privacy_filter",),
        experts=(TensorLayout(FUSED, transposed=False, biases=True),),
    ),
)
