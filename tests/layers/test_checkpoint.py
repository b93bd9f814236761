"""Checkpoints become the layers that transformers computes, and what is not right is refused."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import dask
import dask.array as da
import fsspec
import ml_dtypes
import numpy as np
import pytest
from dask.base import tokenize

from dask_ep.errors import ReadError
from dask_ep.experts.experts import Experts
from dask_ep.layers.checkpoint import describe_checkpoint, load_moe_layer, moe_layers
from dask_ep.layers.families import FAMILIES, find_family
from dask_ep.layers.family import Family, Key, Shared
from dask_ep.layers.layer import MoELayer
from dask_ep.storage import plain_sources
from dask_ep.storage.journal import describe_differences
from tests.checkpoints import (
    CASES,
    FIXTURES,
    LAYER,
    altered,
    expected,
    read_tensors,
    write_tensors,
)

TOLERANCE = 1e-6
"""Of the largest value, float32 against torch's float32."""


def errors(layer: MoELayer, case: str) -> dict[str, float]:
    """Largest difference over largest value: of each row's output, and of routing by expert."""
    want = expected(case)
    hidden = da.from_array(want["hidden"], chunks=(2, 3, -1))
    with dask.config.set(scheduler="sync"):
        got, (indices, weights) = dask.compute(layer(hidden), layer.route(hidden))
    n, E = len(want["indices"]), layer.router.num_experts
    dense = np.zeros((2, n, E))
    indices, weights = indices.reshape(n, -1), weights.reshape(n, -1)
    np.put_along_axis(dense[0], indices.astype(int), weights, axis=1)
    np.put_along_axis(dense[1], want["indices"].astype(int), want["weights"], axis=1)
    chosen = np.zeros((2, n, E), bool)
    np.put_along_axis(chosen[0], indices.astype(int), True, axis=1)
    np.put_along_axis(chosen[1], want["indices"].astype(int), True, axis=1)
    difference = np.abs(got - want["output"]).max(axis=2)
    return {
        "output": float(difference.max() / np.abs(want["output"]).max()),
        "rows": float((difference / np.abs(want["output"]).max(axis=2)).max()),
        "indices": float((chosen[0] != chosen[1]).any(axis=1).mean()),
        "weights": float(np.abs(dense[0] - dense[1]).max() / np.abs(dense[1]).max()),
    }


@pytest.mark.parametrize("case", CASES)
def test_the_layer_computes_what_transformers_computes(case):
    layer = load_moe_layer(FIXTURES / case, LAYER)
    found = errors(layer, case)
    assert found["indices"] == 0, "a row has other experts"
    assert max(found.values()) <= TOLERANCE, found


SAME_BLOCKS = {
    "kimi_k2": "deepseek_v3, and inside kimi_k25",
    "unlimited_ocr": "deepseek_ocr2",
    "unlimited_ocr_text": "deepseek_ocr2",
    "step3p5": "the text half of step3p7",
    "inkling2_loop": "inkling2_text",
    "bailing_moe": "bailing_hybrid",
    "bailing_moe_v2": "bailing_hybrid",
    "inkling2_loop_text": "inkling2_text",
    "qwen3_omni_moe_text": "the text half of qwen3_omni_moe_thinker",
}
"""Model types without a checkpoint, and whose block they have."""


def test_ling_is_read_by_what_its_config_says(tmp_path):
    """Version 2.0 as bailing_hybrid, version 1.5 without groups, bias and scale."""
    keys = {"model_type": "bailing_moe", "mlp_layer_types": None, "num_expert_group": None}
    second = altered(
        tmp_path / "2", "bailing_hybrid", **keys, n_group=4, score_function="sigmoid",
        moe_router_enable_expert_bias=True,
    )  # fmt: skip
    assert max(errors(load_moe_layer(second, LAYER), "bailing_hybrid").values()) <= TOLERANCE

    def without_bias(tensors):
        return {name: array for name, array in tensors.items() if "bias" not in name}

    first = altered(
        tmp_path / "1", "bailing_hybrid", tensors=without_bias, **keys, topk_group=None,
        routed_scaling_factor=None,
    )  # fmt: skip
    router = load_moe_layer(first, LAYER).router
    assert (router.score, router.groups, router.scale) == ("softmax", 1, 1.0)


def test_every_family_has_a_fixture():
    made = {
        json.loads((FIXTURES / case / "config.json").read_text())["model_type"] for case in CASES
    }
    known = {name for family in FAMILIES for name in family.model_types}
    parts = {f"{name}_{half}" for name in made for half in ("text", "thinker")}
    parts |= {"inkling_mm_model"}
    wholes = {name.removesuffix("_text").removesuffix("_thinker") for name in made}
    assert made <= known | {"kimi_k25"}
    assert known <= made | parts | wholes | SAME_BLOCKS.keys()


# --- mutations: each breaks one step, and the fixture must notice --------------------------------


def remade(layer: MoELayer, *, without: str = "", **changes) -> MoELayer:
    """The same layer with some arguments changed and some arrays left out."""
    arguments = {
        "router": layer.router,
        "experts": layer.experts,
        "shared": layer.shared,
        "around": layer.around,
        **{
            {"weight": "router_weight", "bias": "router_bias"}.get(name, name): array.source
            for name, array in layer.arrays.items()
            if name != without
        },
    }
    return MoELayer(**arguments | changes)


def router(**changes):
    return lambda layer: remade(layer, router=replace(layer.router, **changes))


def without(name):
    return lambda layer: remade(layer, without=name)


def experts(*, weights=lambda w: w, **options):
    def change(layer):
        old = layer.experts
        new = Experts(old.kind, weights(dict(old.weights)), {**old.options, **options})
        return remade(layer, experts=new)

    return change


def shared_experts(**options):
    def change(layer):
        old = layer.shared
        return remade(layer, shared=Experts(old.kind, old.weights, {**old.options, **options}))

    return change


def no_shared(layer):
    return remade(layer, shared=None, without="shared_gate")


def weight_on_the_other_side(layer):
    side = not layer.router.apply_router_weight_on_input
    options = {**layer.experts.options, "apply_router_weight_on_input": side}
    return remade(
        layer,
        router=replace(layer.router, apply_router_weight_on_input=side),
        experts=Experts(layer.experts.kind, layer.experts.weights, options),
    )


def drop(name):
    return experts(weights=lambda w: {n: v for n, v in w.items() if n != name})


def swap(w):
    return w | {"gate": w["up"], "up": w["gate"]}


NO_SUM, SUM = router(norm_topk_prob=False), router(norm_topk_prob=True)
SWAPPED = experts(weights=swap)
ALTERNATING, HALVES = experts(interleaved=True), experts(interleaved=False)
GELU = experts(activation="gelu")
NO_BIAS = without("selection_bias")
WEIGHT_SIDE = weight_on_the_other_side


def around(**changes):
    return lambda layer: remade(layer, around=replace(layer.around, **changes))


RELU = experts(activation="relu")
GEMMA = [
    NO_SUM, ALTERNATING, GELU, without("per_expert_scale"), without("input_scale"),
    router(input_norm_eps=None), router(logit_scale=1.0),
]  # fmt: skip
GROUPS = [router(groups=1, topk_groups=1), router(group_score="max")]
DEEPSEEK_V3 = [NO_SUM, NO_BIAS, router(scale=1.0), router(score="softmax"), *GROUPS]
MUTATIONS = {
    "mixtral": [NO_SUM, SWAPPED, GELU, WEIGHT_SIDE, router(k=1), router(score="sigmoid")],
    "mixtral_sharded": [SWAPPED],
    "mixtral_float16": [SWAPPED],
    "minimax": [NO_SUM, SWAPPED, WEIGHT_SIDE],
    "minimax_m2": [NO_SUM, SWAPPED, NO_BIAS, router(score="softmax")],
    "qwen2_moe": [SUM, SWAPPED, no_shared, without("shared_gate")],
    "qwen3_next": [NO_SUM, SWAPPED, no_shared, without("shared_gate")],
    "qwen3_5_moe": [NO_SUM, ALTERNATING, no_shared, without("shared_gate")],
    "qwen3_5_moe_text": [NO_SUM, SWAPPED, no_shared, without("shared_gate")],
    "qwen3_moe": [NO_SUM, SWAPPED],
    "qwen3_moe_fused": [NO_SUM, ALTERNATING],
    "qwen3_vl_moe": [NO_SUM, ALTERNATING],
    "qwen3_vl_moe_hub": [NO_SUM, ALTERNATING],
    "qwen3_vl_moe_square": [NO_SUM, ALTERNATING],
    "olmoe": [SUM, SWAPPED, router(k=4)],
    "jamba": [SUM, SWAPPED],
    "deepseek_v2": [
        SUM, SWAPPED, no_shared, router(scale=1.0), router(group_score="top2"),
        router(groups=1, topk_groups=1), router(score="sigmoid"),
    ],
    "deepseek_v2_greedy": [SUM, SWAPPED, no_shared, router(scale=2.0),
                           router(groups=3, topk_groups=2)],
    "deepseek_v3": [
        NO_SUM, SWAPPED, no_shared, NO_BIAS, router(scale=1.0), router(group_score="max"),
        router(groups=1, topk_groups=1), router(score="softmax"),
    ],
    "deepseek_v3_bfloat16": [NO_BIAS, SWAPPED],
    "deepseek_v3_fp8": [NO_BIAS, SWAPPED],
    "deepseek_v3_fp8_cut": [NO_BIAS, SWAPPED],
    "deepseek_v3_int4": [NO_BIAS, SWAPPED],
    "qwen3_moe_nvfp4": [NO_SUM, SWAPPED],
    "qwen3_moe_gptq": [NO_SUM, SWAPPED],
    "qwen3_moe_awq": [NO_SUM, SWAPPED],
    "glm4_moe": [NO_SUM, SWAPPED, no_shared, NO_BIAS, router(scale=1.0)],
    "dots1": [SUM, SWAPPED, no_shared, NO_BIAS, router(scale=1.0)],
    "ernie4_5_moe": [NO_SUM, SWAPPED, no_shared, NO_BIAS, router(norm_min=2.0)],
    "hunyuan_v1_moe": [NO_SUM, SWAPPED, no_shared, router(k=2)],
    "granitemoe": [ALTERNATING, router(score="softmax"), router(score="sigmoid_chosen")],
    "phimoe": [SWAPPED, SUM, router(jitter=0.02), router(jitter=0.005),
               router(score="softmax_chosen")],
    "gpt_oss": [
        HALVES, without("bias"), drop("gate_up_bias"), drop("down_bias"), experts(limit=None),
        experts(alpha=1.0), experts(up_offset=0.0), router(score="softmax"), WEIGHT_SIDE,
    ],
    "gpt_oss_mxfp4": [HALVES, without("bias"), drop("gate_up_bias"), drop("down_bias")],
    "llama4_text": [WEIGHT_SIDE, ALTERNATING, no_shared, router(score="softmax_chosen")],
    "llama4_top2": [WEIGHT_SIDE, no_shared, router(score="softmax_chosen"), SUM],
    "llama4": [WEIGHT_SIDE, ALTERNATING, no_shared],
    **{case: [*DEEPSEEK_V3, SWAPPED, no_shared] for case in
        ("deepseek_v32", "glm_moe_dsa", "glm4_moe_lite", "glm4v_moe", "solar_open", "exaone_moe",
         "bailing_hybrid", "sarvam_moe", "sarvam_mla", "kimi_linear", "dots3_note_text",
         "kimi_k25")},
    "mimo_v2_flash": [*DEEPSEEK_V3, SWAPPED],
    "beam": [*DEEPSEEK_V3, SWAPPED],
    "axk2": [*DEEPSEEK_V3, SWAPPED, no_shared],
    "glm5_next": [*DEEPSEEK_V3, no_shared, experts(limit=None), shared_experts(limit=None)],
    "hy_v4": [*DEEPSEEK_V3, ALTERNATING, experts(limit=None), shared_experts(limit=0.5)],
    "hy_v4_vl": [*DEEPSEEK_V3, ALTERNATING, experts(limit=None), shared_experts(limit=0.5)],
    "mistral4": [NO_SUM, ALTERNATING, no_shared, router(scale=1.0), GROUPS[0]],
    "mistral_large4": [NO_SUM, SWAPPED, no_shared, router(scale=1.0), *GROUPS],
    "deepseek_ocr2": [SUM, SWAPPED, no_shared, router(scale=1.0)],
    "qwen3_omni_moe_thinker": [NO_SUM, SWAPPED],
    "qwen4_exp_text": [NO_SUM, SWAPPED, no_shared, without("shared_gate")],
    "mellum": [NO_SUM, SWAPPED],
    "lara_mini": [NO_SUM, ALTERNATING, no_shared],
    "flex_olmo": [SUM, SWAPPED],
    "hy_v3": [NO_SUM, SWAPPED, no_shared, NO_BIAS, router(scale=1.0)],
    "afmoe": [NO_SUM, SWAPPED, no_shared, NO_BIAS, router(scale=1.0)],
    "lfm2_moe": [NO_SUM, SWAPPED, NO_BIAS, router(scale=1.0), router(score="softmax")],
    "minimax_m3_vl": [
        NO_SUM, SWAPPED, no_shared, NO_BIAS, router(scale=1.0), experts(limit=None),
        experts(alpha=1.0), experts(up_offset=0.0), shared_experts(limit=None),
    ],
    "step3p7": [
        NO_SUM, SWAPPED, no_shared, NO_BIAS, router(scale=1.0), experts(clamp_after=False),
        experts(limit=None), shared_experts(limit=0.5), shared_experts(clamp_after=False),
    ],
    "granitemoeshared": [ALTERNATING, no_shared, router(score="softmax")],
    "granitemoehybrid": [ALTERNATING, no_shared, router(score="softmax")],
    "granitemoe_swa": [ALTERNATING, no_shared, router(score="softmax")],
    "flint": [NO_SUM, SWAPPED, no_shared, router(score="softmax")],
    "kolibri1": [SUM, SWAPPED, no_shared, NO_BIAS, router(score="sigmoid")],
    "laguna": [NO_SUM, SWAPPED, no_shared, NO_BIAS, router(scale=1.0), router(logit_softcap=None),
               router(logit_softcap=0.5)],
    "openai_privacy_filter": [ALTERNATING, without("bias"), drop("gate_up_bias"),
                              experts(limit=None), experts(up_offset=0.0)],
    "aria": [ALTERNATING, no_shared, router(score="softmax")],
    "deepseek_v4": [NO_SUM, SWAPPED, no_shared, NO_BIAS, router(scale=1.0),
                    router(score="sigmoid"), experts(limit=None), shared_experts(limit=None)],
    "dbrx": [NO_SUM, SWAPPED, router(score="sigmoid")],
    "ernie4_5_vl_moe": [NO_SUM, SWAPPED, no_shared, NO_BIAS],
    "axk1": [*DEEPSEEK_V3, SWAPPED, no_shared, around(after=())],
    "cohere2_moe": [NO_SUM, SWAPPED, around(after=()), router(score="softmax_chosen")],
    "cohere2_moe_sum": [SWAPPED, no_shared, router(score="sigmoid_chosen")],
    "jetmoe": [ALTERNATING, around(after=()), router(score="softmax")],
    "nemotron_h": [*DEEPSEEK_V3, no_shared, RELU, shared_experts(activation="relu")],
    "nemotron_h_without_latent": [NO_SUM, NO_BIAS, no_shared, RELU],
    "longcat_flash": [SUM, SWAPPED, NO_BIAS, router(scale=1.0)],
    "gemma4_text": [*GEMMA, around(before=()), around(after=())],
    "diffusion_gemma": GEMMA,
    "inkling2_text": [NO_SUM, HALVES, NO_BIAS, router(scale=1.0), experts(soft_caps=None),
                      experts(soft_caps=(1.5, 0.7))],
    "muse_spark_text": [NO_SUM, ALTERNATING, NO_BIAS, router(scale=1.0), router(logit_scale=1.0),
                        GELU, drop("output_scale"), experts(output_norm_eps=None),
                        experts(output_norm_eps=1e-8)],
    "inkling_text": [ALTERNATING, NO_BIAS, NO_SUM, router(scale=1.0), without("per_expert_scale"),
                     shared_experts(activation="gelu")],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "number"), [(case, i) for case, all_ in MUTATIONS.items() for i in range(len(all_))]
)
def test_a_fixture_notices_when_one_step_is_broken(case, number):
    layer = load_moe_layer(FIXTURES / case, LAYER)
    broken = errors(MUTATIONS[case][number](layer), case)
    assert broken["output"] > 100 * TOLERANCE, broken


def test_every_fixture_has_mutations():
    assert sorted(MUTATIONS) == CASES


def halves(axis):
    return lambda array: np.roll(array, array.shape[axis] // 2, axis)


def neighbours(array):
    return array.reshape(*array.shape[:-1], -1, 2)[..., ::-1].reshape(array.shape)


def next_along_the_row(scales):
    return np.roll(scales, 1, axis=-1)


def halves_of_bytes(blocks):
    codes = np.ascontiguousarray(blocks).view(np.uint8)
    return (codes << 4 | codes >> 4).view(blocks.dtype)


SCALES = "_proj.weight_scale_inv"
STORED_OTHERWISE = [
    ("granitemoe", "input_linear.weight", halves(1)),
    ("qwen3_moe_fused", "experts.gate_up_proj", halves(1)),
    ("qwen3_5_moe", "experts.gate_up_proj", halves(1)),
    ("qwen3_vl_moe", "experts.gate_up_proj", halves(1)),
    ("qwen3_vl_moe_hub", "experts.gate_up_proj", halves(2)),
    ("llama4", "experts.gate_up_proj", halves(2)),
    ("llama4_text", "experts.gate_up_proj", halves(2)),
    ("gpt_oss", "experts.gate_up_proj", neighbours),
    ("gpt_oss", "experts.gate_up_proj_bias", neighbours),
    ("gpt_oss_mxfp4", "experts.gate_up_proj_blocks", halves_of_bytes),
    ("gpt_oss_mxfp4", "experts.gate_up_proj_scales", next_along_the_row),
    ("deepseek_v3_int4", "_proj.weight_packed", halves_of_bytes),
    ("deepseek_v3_int4", "_proj.weight_scale", next_along_the_row),
    ("qwen3_moe_nvfp4", "_proj.weight_packed", halves_of_bytes),
    ("qwen3_moe_nvfp4", "_proj.weight_scale", next_along_the_row),
    ("qwen3_moe_nvfp4", "_proj.weight_global_scale", np.reciprocal),
    ("qwen3_moe_gptq", "_proj.qweight", halves_of_bytes),
    ("qwen3_moe_gptq", "_proj.qzeros", halves_of_bytes),
    ("qwen3_moe_gptq", "_proj.g_idx", np.sort),
    ("qwen3_moe_awq", "_proj.qweight", halves_of_bytes),
    ("qwen3_moe_awq", "_proj.qzeros", halves_of_bytes),
    ("deepseek_v3_fp8", SCALES, np.ones_like),
    ("deepseek_v3_fp8", SCALES, next_along_the_row),
    ("deepseek_v3_fp8_cut", SCALES, np.ones_like),
    ("deepseek_v3_fp8_cut", SCALES, next_along_the_row),
]
"""What a tensor would be if its halves, its bytes or its scales were taken the other way."""


@pytest.mark.parametrize(
    ("case", "ending", "change"),
    STORED_OTHERWISE,
    ids=[f"{case}-{i}" for i, (case, *_) in enumerate(STORED_OTHERWISE)],
)
def test_a_fixture_notices_when_stored_numbers_are_taken_the_other_way(
    tmp_path, case, ending, change
):
    def other(tensors):
        assert any(name.endswith(ending) for name in tensors)
        return {n: change(t) if n.endswith(ending) else t for n, t in tensors.items()}

    folder = altered(tmp_path, case, tensors=other)
    assert errors(load_moe_layer(folder, LAYER), case)["output"] > 100 * TOLERANCE


# --- chunks, ranks and schedulers ---------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_no_family_depends_on_chunks_ranks_or_schedulers(case):
    layer, rows = load_moe_layer(FIXTURES / case, LAYER), expected(case)["hidden"].reshape(24, -1)
    whole = layer(da.from_array(rows, chunks=-1), world_size=1).compute(scheduler="sync")
    for chunks, world_size, scheduler in [(7, 1, "threads"), (5, 3, "sync"), (24, 2, "threads")]:
        y = layer(da.from_array(rows, chunks=(chunks, 9)), world_size=world_size)
        difference = np.abs(y.compute(scheduler=scheduler) - whole).max()
        assert difference <= 1e-6 * np.abs(whole).max(), (chunks, world_size)


# --- formats -------------------------------------------------------------------------------------


def test_a_shard_boundary_may_cut_an_expert():
    index = json.loads((FIXTURES / "mixtral_sharded/model.safetensors.index.json").read_text())
    prefix = f"model.layers.{LAYER}.block_sparse_moe.experts.0."
    files = {file for name, file in index["weight_map"].items() if name.startswith(prefix)}
    assert len(files) == 3  # and test_the_layer_computes_what_transformers_computes reads it


def test_a_checkpoint_may_mix_dtypes():
    tensors = read_tensors(FIXTURES / "deepseek_v3_bfloat16/model.safetensors")
    assert {name.rpartition(".")[2]: t.dtype.name for name, t in tensors.items()} == {
        "weight": "bfloat16",
        "e_score_correction_bias": "float32",
    }


def test_fused_experts_are_distinguished_by_all_their_shapes(tmp_path):
    """With H = 2 I, gate_up_proj looks the same in both layouts, and down_proj does not."""
    case = "qwen3_vl_moe_square"

    def turned(tensors):
        return {n: np.swapaxes(t, 1, 2) if ".experts." in n else t for n, t in tensors.items()}

    folder = altered(tmp_path, case, tensors=turned)
    shapes = {
        t.shape for n, t in read_tensors(folder / "model.safetensors").items() if "gate_up" in n
    }
    assert shapes == {(10, 32, 32)}
    for where in (folder, FIXTURES / case):
        assert max(errors(load_moe_layer(where, LAYER), case).values()) <= TOLERANCE


def test_configs_of_other_versions_are_read(tmp_path):
    folder = altered(tmp_path, "qwen3_moe", num_local_experts=None, num_experts=10)
    assert max(errors(load_moe_layer(folder, LAYER), "qwen3_moe").values()) <= TOLERANCE
    folder = altered(tmp_path, "hunyuan_v1_moe", moe_topk=3)
    assert max(errors(load_moe_layer(folder, LAYER), "hunyuan_v1_moe").values()) <= TOLERANCE


def test_the_block_may_be_saved_under_the_names_of_memory(tmp_path):
    """As `save_original_format=False` writes it: other block, other names, fused experts."""

    def fused(tensors):
        stem = f"model.layers.{LAYER}."
        old = stem + "block_sparse_moe.experts."
        matrices = {
            w: np.stack([tensors[f"{old}{e}.{w}.weight"] for e in range(12)])
            for w in ("w1", "w2", "w3")
        }
        return {
            f"{stem}mlp.router.weight": tensors[f"{stem}block_sparse_moe.gate.weight"],
            f"{stem}mlp.experts.gate_up_proj": np.concatenate(
                [matrices["w1"], matrices["w3"]], axis=1
            ),
            f"{stem}mlp.experts.down_proj": matrices["w2"],
        }

    folder = altered(tmp_path, "phimoe", tensors=fused)
    assert max(errors(load_moe_layer(folder, LAYER), "phimoe").values()) <= TOLERANCE


# --- what is read --------------------------------------------------------------------------------


@pytest.fixture
def bytes_read(monkeypatch):
    """Count the bytes that tasks read from local files, by file."""
    read: list[int] = []
    original = plain_sources.fill_from_file

    def counting(out, *args, **kwargs):
        read.append(out.nbytes)
        return original(out, *args, **kwargs)

    monkeypatch.setattr(plain_sources, "fill_from_file", counting)
    return read


@pytest.mark.parametrize("case", ["deepseek_v3", "deepseek_v3_fp8_cut", "gpt_oss_mxfp4", "llama4"])
def test_a_rank_reads_its_own_experts_and_nothing_else(case, bytes_read):
    layer = load_moe_layer(FIXTURES / case, LAYER)
    assert bytes_read == []
    E = layer.experts.num_experts
    ids = list(range(E // 2, E // 2 + 2))
    layer.experts.load(ids)
    assert sum(bytes_read) == layer.experts.nbytes * len(ids) // E


@pytest.mark.parametrize("case", ["deepseek_v3", "gpt_oss", "qwen2_moe"])
def test_all_ranks_together_read_each_tensor_of_the_block_once(case, bytes_read):
    layer = load_moe_layer(FIXTURES / case, LAYER)
    hidden = da.from_array(expected(case)["hidden"], chunks=(1, 4, -1))
    layer(hidden, world_size=3).compute(scheduler="sync")
    tensors = read_tensors(FIXTURES / case / "model.safetensors")
    stored = sum(tensor.nbytes for tensor in tensors.values())
    assert sum(bytes_read[: -len(tensors)]) == stored  # the last ones are `read_tensors`' own


def write_sparse(folder, config, tensors):
    """A checkpoint of float32 zeros: its bytes can be read, and are not on the disk."""
    header, end = {}, 0
    for name, shape in tensors.items():
        begin, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    path = folder / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + end)
    (folder / "config.json").write_text(json.dumps(config))


def test_opening_a_terabyte_reads_headers_alone(tmp_path, bytes_read):
    E, H, width = 64, 16384, 81920
    tensors = {"model.layers.0.block_sparse_moe.gate.weight": (E, H)}
    for e in range(E):
        stem = f"model.layers.0.block_sparse_moe.experts.{e}."
        tensors |= {f"{stem}w1.weight": (width, H), f"{stem}w2.weight": (H, width)}
        tensors |= {f"{stem}w3.weight": (width, H)}
    config = {"model_type": "mixtral", "num_local_experts": E, "num_experts_per_tok": 2,
              "hidden_size": H, "intermediate_size": width, "num_hidden_layers": 1}  # fmt: skip
    write_sparse(tmp_path, config, tensors)

    layer = load_moe_layer(tmp_path, 0)
    hidden = da.zeros((10, H), chunks=(5, -1), dtype=np.float32)
    y = layer(hidden, world_size=8)

    assert layer.experts.nbytes > 1e12
    assert bytes_read == []
    assert len(pickle.dumps(layer)) < 100_000
    assert y.shape == (10, H)


def bytes_read_by_this_process() -> int:
    """What the system says: of all files, by any way of reading but memory maps."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["rchar"])


@pytest.mark.skipif(not os.path.exists("/proc/self/io"), reason="the system does not count")
def test_a_rank_reads_its_experts_router_shared_and_headers_within_1_percent(tmp_path):
    E, d, width = 48, 256, 384
    config = json.loads((FIXTURES / "deepseek_v3" / "config.json").read_text())
    sizes = {"n_routed_experts": E, "hidden_size": d, "moe_intermediate_size": width}
    stem = f"model.layers.{LAYER}.mlp."
    shared = width * config["n_shared_experts"]
    tensors = {f"{stem}gate.weight": (E, d), f"{stem}gate.e_score_correction_bias": (E,)}
    for name, f in {"shared_experts": shared, **{f"experts.{e}": width for e in range(E)}}.items():
        tensors |= {f"{stem}{name}.{m}_proj.weight": (f, d) for m in ("gate", "up")}
        tensors[f"{stem}{name}.down_proj.weight"] = (d, f)
    write_sparse(tmp_path, config | sizes, tensors)

    def read_rank_1_of_4(folder, d) -> int:
        before = bytes_read_by_this_process()
        y = load_moe_layer(folder, LAYER)(da.zeros((4, d), chunks=-1, dtype="f4"), world_size=4)
        graph = y.__dask_graph__()
        mine = ("ep_experts", "ep_router", "ep_shared")
        keys = [key for key in graph if str(key).strip("('").startswith(mine)]
        held = [key for key in keys if not isinstance(key, tuple) or key[1] == 1]
        assert len(held) == 3
        dask.get(dict(graph), held)
        return bytes_read_by_this_process() - before

    read_rank_1_of_4(FIXTURES / "deepseek_v3", 32)  # whatever is imported on the way
    layer = load_moe_layer(tmp_path, LAYER)
    least = layer.experts.nbytes // 4 + layer.resident_stored_bytes
    assert least <= read_rank_1_of_4(tmp_path, d) <= 1.01 * least


@pytest.mark.slow
def test_loading_needs_no_torch_nor_fsspec():
    program = (
        "import sys\n"
        "sys.modules.update(torch=None, transformers=None, safetensors=None, fsspec=None)\n"
        "from dask_ep.layers.checkpoint import load_moe_layer\n"
        f"print(load_moe_layer({str(FIXTURES / 'olmoe')!r}, 1).router.k)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert (run.stdout, run.returncode) == ("5\n", 0), run.stderr


# --- addresses -----------------------------------------------------------------------------------


@pytest.fixture
def memory_folder():
    files = fsspec.filesystem("memory")

    def put(case):
        for path in (FIXTURES / case).iterdir():
            files.pipe_file(f"/models/{case}/{path.name}", path.read_bytes())
        return f"memory://models/{case}"

    yield put
    files.rm("/models", recursive=True)


@pytest.mark.parametrize("case", ["mixtral_sharded", "deepseek_v3_fp8", "gpt_oss_mxfp4"])
def test_a_checkpoint_may_lie_at_an_address(case, memory_folder):
    layer = load_moe_layer(memory_folder(case), LAYER)
    assert max(errors(layer, case).values()) <= TOLERANCE
    again = load_moe_layer(memory_folder(case), LAYER)
    assert len(pickle.dumps(again)) < 20_000


@pytest.mark.slow
def test_an_address_without_fsspec_is_refused():
    program = (
        "import sys; sys.modules['fsspec'] = None\n"
        "from dask_ep.layers.checkpoint import load_moe_layer\n"
        "try: load_moe_layer('s3://bucket/model', 0)\n"
        "except ImportError as error: print(error)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert (
        "s3://bucket/model/config.json" in run.stdout or "s3://bucket/model is read" in run.stdout
    )
    assert "pip install fsspec" in run.stdout


def test_a_remote_file_cut_short_after_it_was_opened_is_refused(memory_folder):
    layer = load_moe_layer(memory_folder("olmoe"), LAYER)
    files, path = fsspec.filesystem("memory"), "/models/olmoe/model.safetensors"
    files.pipe_file(path, files.cat_file(path)[:5000])
    with pytest.raises(
        ReadError, match=r"expected \d+ bytes from byte \d+ of memory://models/olmoe"
    ):
        layer.experts.load([11])
    files.rm(path)
    with pytest.raises(ReadError, match="of model.safetensors:model.layers.1"):
        layer.experts.load([11])


# --- a user's own family -------------------------------------------------------------------------


def test_a_private_family_is_one_row_of_data(tmp_path):
    def renamed(tensors):
        return {
            name.replace("block_sparse_moe.gate", "moe.my_router").replace(
                "block_sparse_moe", "moe"
            ): t
            for name, t in tensors.items()
        }

    folder = altered(tmp_path, "mixtral", tensors=renamed, model_type="mine")
    mine = replace(
        find_family("mixtral", FAMILIES),
        model_types=("mine",),
        blocks=("moe",),
        router_weight=("my_router.weight",),
    )
    layer = load_moe_layer(folder, LAYER, families=[mine])
    assert max(errors(layer, "mixtral").values()) <= TOLERANCE
    assert describe_checkpoint(folder, families=[mine]).model_type == "mine"


# --- the residual of a decoder layer -------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_rows_that_were_normalised_before_the_block_are_not_added_as_its_residual(case):
    message = "residual=True adds the block's input rows, but .* to the rows before their norm"
    with pytest.raises(ValueError, match=message):
        load_moe_layer(FIXTURES / case, LAYER, residual=True)


def test_a_family_whose_model_adds_what_the_block_gets_may_have_it_added():
    mine = replace(find_family("mixtral", FAMILIES), pre_norm=False)
    both = load_moe_layer(FIXTURES / "mixtral", LAYER, families=[mine], residual=True)
    want = expected("mixtral")
    got = both(da.from_array(want["hidden"], chunks=(2, 3, -1))).compute(scheduler="sync")
    np.testing.assert_allclose(got, want["output"] + want["hidden"], rtol=1e-5, atol=1e-5)


# --- what is refused -----------------------------------------------------------------------------

STEM = f"model.layers.{LAYER}.mlp."


def changed(name, change):
    """Change one tensor of the block; None takes it out."""

    def apply(tensors):
        value = change(tensors[STEM + name]) if change else None
        rest = {n: t for n, t in tensors.items() if n != STEM + name}
        return rest if value is None else rest | {STEM + name: value}

    return apply


def added(name, value):
    return lambda tensors: tensors | {STEM + name: value}


@pytest.mark.parametrize(
    ("case", "layer", "changes", "error", "message"),
    [
        ("qwen3_moe", 0, {}, ValueError, "layer 0 of .*qwen3_moe is dense .*; MoE layers are 1"),
        ("qwen3_moe", 1, {"num_local_experts": 0}, ValueError,
         "is dense in .*; MoE layers are none"),
        ("qwen3_next", 1, {"num_experts": 0}, ValueError, "is dense in .*; MoE layers are none"),
        ("jamba", 1, {"num_experts": 1}, ValueError, "is dense in .*; MoE layers are none"),
        ("qwen3_moe", None, {}, TypeError, "layer must be the number of .*qwen3_moe, 1; got None"),
        ("qwen3_moe", 2, {}, ValueError, r"layer must be in \[0, 2\), .* but is 2"),
        ("qwen3_moe", 1, {"model_type": "palm"}, ValueError,
         r"'palm', which is not one of the \d+ known model types\. .*; to add a fam"),
        ("qwen3_moe", 1, {"model_type": "qwen3_mo"}, ValueError,
         r"'qwen3_mo', which is not one of .* \(did you mean qwen3_moe or "),
        ("qwen3_moe", 1, {"model_type": "zaya"}, ValueError,
         "zaya models cannot be read .* the previous layer.s router"),
        ("qwen3_moe", 1, {"model_type": None}, ValueError, "config.json must have a 'model_type'"),
        ("qwen3_moe", 1, {"num_experts_per_tok": None}, ValueError,
         r"qwen3_moe: config.json must have 'num_experts_per_tok' \(null .*, but has only archi"),
        ("qwen3_moe", 1, {"transformers_weights": "a.bin"}, ValueError,
         "transformers_weights must name a .safetensors file or .*, but is 'a.bin'"),
        ("qwen3_moe", 1, {"transformers_weights": "a.safetensors"}, ReadError,
         "config.json says that the tensors are in a.safetensors, but .* no such file"),
        ("qwen3_moe", 1, {"num_hidden_layers": None}, ValueError, "must have 'num_hidden_layers'"),
        ("qwen3_moe", 1, {"num_hidden_layers": 2.5}, ValueError,
         "num_hidden_layers of layer 0 must be a whole number of at least 1, but is 2.5"),
        ("qwen3_moe", 1, {"num_local_experts": None}, ValueError,
         "must have 'num_local_experts' or 'num_experts'"),
        ("qwen3_moe", 1, {"moe_intermediate_size": "20"}, ValueError,
         "width of layer 1 must be a whole number of at least 1, but is '20'"),
        ("qwen3_moe", 1, {"num_experts_per_tok": 11}, ValueError, r"k must be in \[1, 10\]"),
        ("qwen3_moe", 1, {"hidden_act": "tanh"}, ValueError, "hidden_act .* silu, .* 'tanh'"),
        ("qwen3_moe", 1, {"hidden_size": 48}, ValueError,
         r"gate.weight must have shape \(10, 48\) according to .* \(E=10, .* has \(10, 32\)"),
        ("qwen3_moe", 1, {"quantization_config": {"quant_method": "hqq"}}, ValueError,
         "is quantized by 'hqq'; supported are fp8"),
        ("deepseek_v2", 1, {"topk_method": "noaux"}, ValueError,
         "key 'topk_method' must be one of 'greedy', 'group_limited_greedy', but is 'noaux'"),
        ("deepseek_v3", 1, {"topk_group": 4}, ValueError, r"topk_groups must be in \[1, 3\]"),
        ("deepseek_v3", 1, {"first_k_dense_replace": None}, ValueError,
         "must have 'first_k_dense_replace'"),
        ("deepseek_v3", 1, {"first_k_dense_replace": "two"}, ValueError,
         "deepseek_v3: cannot tell which layers are MoE from config.json"),
        ("ernie4_5_moe", 1, {"moe_layer_interval": 0}, ValueError, "cannot tell which layers are"),
        ("deepseek_v3", 1, {"routed_scaling_factor": "2"}, ValueError,
         "deepseek_v3/config.json: scale must be a finite number, but is '2'"),
        ("deepseek_v3", 1, {"n_shared_experts": {}}, ValueError,
         "config.json has a value of a wrong type: a size must be a whole number, but is {}"),
        ("deepseek_v3", 1, {"n_shared_experts": "2"}, ValueError, "whole number, but is '2'"),
        ("inkling_text", 1, {"n_shared_experts": "2"}, ValueError,
         "beyond_experts of layer 1 must be a whole number of at least 0, but is '2'"),
        ("nemotron_h", 1, {"moe_shared_expert_intermediate_size": {}}, ValueError,
         "width of the shared expert of layer 1 must be a whole number of at least 0, but is {}"),
        ("deepseek_v2", 1, {"topk_method": {}}, ValueError,
         "key 'topk_method' must be one of 'greedy', .*, but is {}"),
        ("ernie4_5_moe", 1, {"use_bias": "false"}, ValueError,
         "config.json: biases of layer 1 must be true or false, but is 'false'"),
        ("ernie4_5_moe", 1, {"moe_norm_min": True}, ValueError,
         "norm_min must be a finite number, but is True"),
        ("ernie4_5_vl_moe", 1, {"text_config": True, "moe_num_experts": []}, ValueError,
         r"key 'moe_num_experts' must have more than 0 entries, but is \[\]"),
        ("axk1", 1, {"rms_norm_eps": "1e-6"}, ValueError,
         "config.json: eps of layer 1 must be a finite number, but is '1e-6'"),
        ("hy_v4", 1, {"swiglu_limit": "7"}, ValueError,
         "config.json: limit must be a finite number, not '7'"),
        ("muse_spark_text", 1, {"post_norm_eps": {}}, ValueError,
         "config.json: output_norm_eps must be a finite number, not {}"),
        ("qwen3_moe", 1, {"model_type": ["qwen3_moe"]}, ValueError,
         r"must have a 'model_type', a string, but it is \['qwen3_moe'\]"),
        ("qwen3_moe", 1, {"num_hidden_layers": 10**18}, ValueError,
         "num_hidden_layers .* of at least 1 and at most 1048576, but is 10000000"),
        ("deepseek_v3_int4", 1, {"quantization_config": {"config_groups": []}}, ValueError,
         r"config_groups of its quantization must be an object of objects, .* but is \[\]"),
        ("deepseek_v3_int4", 1, {"quantization_config": {"config_groups": {"a": 4}}}, ValueError,
         "config_groups of its quantization must be an object of objects, .* but is {'a': 4}"),
        ("deepseek_v3_int4", 1,
         {"quantization_config": {"config_groups": {"a": {"targets": "Linear"}}}}, ValueError,
         "each with a list of names, targets, and an object, weights, but is"),
        ("deepseek_v3_fp8", 1, {"quantization_config": "fp8"}, ValueError,
         "deepseek_v3_fp8/config.json: quantization_config must be an object, but is 'fp8'"),
        ("deepseek_v3_fp8", 1, {"quantization_config": None}, ValueError,
         r"is FP8 with scales \(3, 2\), so config.json must have weight_block_size"),
        ("hunyuan_v1_moe", 1, {"moe_topk": [2]}, ValueError, "but has 1, and none for layer 1"),
        ("qwen3_moe", 1, {"tensors": changed("gate.weight", None)}, ValueError,
         "layer 1 of .*qwen3_moe must have the tensor model.layers.1.mlp.gate.weight, but the"),
        ("qwen3_moe", 1, {"tensors": changed("experts.3.up_proj.weight", None)}, ValueError,
         "must have the tensor model.layers.1.mlp.experts.3.up_proj.weight"),
        ("qwen3_moe", 1, {"tensors": changed("experts.3.up_proj.weight", np.transpose)}, ValueError,
         r"experts.3.up_proj.weight must have shape \(20, 32\) .* but has \(32, 20\)"),
        ("qwen3_moe", 1,
         {"tensors": changed("experts.3.up_proj.weight", lambda t: t.astype(int))},
         TypeError, "experts.3.up_proj.weight must hold floats, but has dtype int64"),
        ("qwen3_moe", 1,
         {"tensors": added("experts.10.up_proj.weight", np.ones(2, np.float32))},
         ValueError, r"every tensor .* used, but 1 would not be: .*experts.10.up_proj.weight"),
        ("qwen3_moe", 1, {"tensors": added("gate.bias", np.ones(10, np.float32))}, ValueError,
         "1 would not be: model.layers.1.mlp.gate.bias"),
        ("dots1", 1, {"tensors": added("gate.bias", np.ones(10, np.float32))}, ValueError,
         "differs from the family 'dots1'"),
        ("qwen3_moe", 1, {"tensors": lambda t: {STEM + "gate.weight": t[STEM + "gate.weight"]}},
         ValueError, "has no experts: it should have experts.0.gate_proj.weight or experts"),
        ("qwen3_moe", 1, {"tensors": lambda t: {"x": np.ones(1, np.float32)}}, ValueError,
         "under one prefix, such as model.layers.1.mlp; it has no tensor under any known one"),
        ("deepseek_v3", 1, {"tensors": changed("shared_experts.up_proj.weight", None)}, ValueError,
         "must have the tensor model.layers.1.mlp.shared_experts.up_proj.weight"),
        ("deepseek_v3", 1,
         {"tensors": added("shared_experts.up_proj.bias", np.ones(40, np.float32))}, ValueError,
         "1 would not be: model.layers.1.mlp.shared_experts.up_proj.bias"),
        ("ernie4_5_moe", 1, {"use_bias": True}, ValueError,
         "must have the tensor model.layers.1.mlp.shared_experts.gate_proj.bias"),
        ("deepseek_v2", 1, {"mlp_bias": True}, ValueError,
         "must have the tensor model.layers.1.mlp.shared_experts.gate_proj.bias"),
        ("deepseek_v3", 1, {"n_shared_experts": None}, ValueError,
         r"shared_experts.gate_proj.weight must have shape \(20, 32\) .* but has \(40, 32\)"),
        ("dots1", 1, {"n_shared_experts": None}, ValueError, "must have 'n_shared_experts'"),
        ("deepseek_v3_fp8", 1, {"tensors": changed("experts.0.up_proj.weight_scale_inv", None)},
         ValueError, "must have the tensor .*experts.0.up_proj.weight_scale_inv"),
        ("deepseek_v3_fp8", 1,
         {"tensors": changed("experts.0.up_proj.weight_scale_inv", lambda t: t[:1])},
         ValueError, r"weight_scale_inv must have one scale per block of 16 x 16 .* \(1, 2\)"),
        ("gpt_oss_mxfp4", 1, {"tensors": changed("experts.down_proj_scales", lambda t: t[:1])},
         ValueError, "down_proj_scales must have one scale for each 16 bytes"),
        ("gpt_oss", 1, {"tensors": changed("experts.down_proj_bias", None)}, ValueError,
         "must have the tensor .*experts.down_proj_bias"),
        ("qwen3_vl_moe", 1, {"tensors": lambda t: {
            n.replace("model.language_model", "vision"): v for n, v in t.items()}}, ValueError,
         "it has no tensor under any known one"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(tmp_path, case, layer, changes, error, message):
    folder = altered(tmp_path, case, **changes)
    with pytest.raises(error, match=message):
        load_moe_layer(folder, layer)


@pytest.mark.parametrize("case", ["deepseek_v3_int4", "inkling_text", "nemotron_h", "step3p7"])
def test_any_value_of_a_wrong_type_is_read_or_refused_as_a_value(tmp_path, case):
    folder = altered(tmp_path, case)
    config = json.loads((folder / "config.json").read_text())

    def is_refused(changed):
        (folder / "config.json").write_text(json.dumps(changed))
        try:
            load_moe_layer(folder, next(iter(moe_layers(folder)), 0))
        except (ValueError, ReadError):
            return True
        return False

    refused = 0
    for path in list(paths_of(config)):
        for value in ("x", 1.5, [], {}, ["x"]):
            refused += is_refused(with_value(config, path, value))
    assert refused > 20


def paths_of(config, above=()):
    """The keys of a config and of the objects in it."""
    for key, value in config.items():
        yield (*above, key)
        if isinstance(value, dict):
            yield from paths_of(value, (*above, key))


def with_value(config, path, value):
    key, *rest = path
    return config | {key: with_value(config[key], rest, value) if rest else value}


def test_a_layer_is_opened_by_its_class_too():
    layer = MoELayer.from_pretrained(FIXTURES / "qwen2_moe", 1, as_stored=True)
    opened = load_moe_layer(FIXTURES / "qwen2_moe", 1, as_stored=True)
    assert isinstance(layer, MoELayer)
    assert tokenize(layer) == tokenize(opened)


def test_a_name_of_a_hub_must_be_downloaded_first():
    with pytest.raises(ReadError, match=r"mistralai/Mixtral is not .* exist. Models of .* `hf d"):
        load_moe_layer("mistralai/Mixtral", 1)


def break_file(name, change):
    def apply(folder):
        path = folder / name
        path.write_bytes(change(path.read_bytes()))

    return apply


def remove(name):
    return lambda folder: (folder / name).unlink()


def as_directory(name):
    def apply(folder):
        (folder / name).unlink()
        (folder / name).mkdir()

    return apply


def edit_index(change):
    def apply(folder):
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(index)
        path.write_text(json.dumps(index))

    return apply


GATE = f"model.layers.{LAYER}.block_sparse_moe.gate.weight"
SHARD = "model-00008-of-00009.safetensors"


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (break_file(SHARD, lambda b: b[:-100]), ValueError, f"{SHARD}.*Was the copy cut short"),
        (break_file(SHARD, lambda b: b[:4]), ValueError, f"{SHARD} is not a safetensors file"),
        (break_file(SHARD, lambda b: b[:8] + b"[" + b[9:]), ValueError,
         f"{SHARD}: the safetensors header is not valid JSON"),
        (remove(SHARD), ReadError, f"says that tensors are in {SHARD}, but .* no such file"),
        (remove("model.safetensors.index.json"), ReadError,
         "must have model.safetensors or model.safetensors.index.json; it has model-00006"),
        (remove("config.json"), ReadError, "_sharded must have config.json, but has expected.npz"),
        (break_file("config.json", lambda b: b[1:]), ValueError, "config.json is not valid JSON"),
        (as_directory("config.json"), ReadError, "config.json cannot be read: Is a directory"),
        (as_directory(SHARD), ReadError, f"{SHARD} must be a file, but is a directory"),
        (break_file("config.json", lambda b: b"[]"), ValueError, "must hold a JSON object"),
        (edit_index(lambda index: index.pop("weight_map")), ValueError, "must have a weight_map"),
        (edit_index(lambda index: index["weight_map"].update({GATE: None})), ValueError,
         "must have a weight_map: tensor -> file"),
        (edit_index(lambda index: index["weight_map"].pop(GATE)), ValueError,
         f"disagree: only the file has {GATE}"),
        (edit_index(lambda index: index["weight_map"].update({GATE + "2": SHARD})), ValueError,
         f"disagree: only the index has {GATE}2"),
    ],
)  # fmt: skip
def test_damaged_files_are_refused_by_name(tmp_path, damage, error, message):
    folder = tmp_path / "mixtral_sharded"
    shutil.copytree(FIXTURES / "mixtral_sharded", folder)
    damage(folder)
    with pytest.raises(error, match=message):
        load_moe_layer(folder, LAYER)


def write_shard(folder, index, *, sign):
    """Write the tensors of a folder once more, all times `sign`, in a shard with an index."""
    tensors = read_tensors(folder / "model.safetensors")
    shard = index.replace(".safetensors.index.json", "-00001-of-00001.safetensors")
    write_tensors(folder / shard, {name: sign * array for name, array in tensors.items()})
    (folder / index).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, shard)}))


def test_a_single_file_comes_before_an_index(tmp_path):
    folder = altered(tmp_path, "mixtral")
    write_shard(folder, "model.safetensors.index.json", sign=-1)
    assert errors(load_moe_layer(folder, LAYER), "mixtral")["output"] <= TOLERANCE


@pytest.mark.parametrize("by_index", [False, True])
def test_the_file_that_the_config_names_comes_first(tmp_path, by_index):
    index = "mine.safetensors.index.json"
    named = index if by_index else "mine-00001-of-00001.safetensors"
    folder = altered(
        tmp_path,
        "mixtral",
        tensors=lambda tensors: {name: -array for name, array in tensors.items()},
        transformers_weights=named,
    )
    write_shard(folder, index, sign=-1)
    assert errors(load_moe_layer(folder, LAYER), "mixtral")["output"] <= TOLERANCE


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ReadError, match="nowhere is not a checkpoint directory"):
        load_moe_layer(tmp_path / "nowhere", 0)


def nan_at_the_end(array):
    array = array.copy()
    array[..., -1] = np.nan
    return array


def test_numbers_that_are_no_numbers_are_refused_by_name_when_read(tmp_path):
    hidden = da.from_array(expected("deepseek_v3_fp8")["hidden"], chunks=-1)
    name = "experts.1.up_proj.weight_scale_inv"
    folder = altered(tmp_path, "deepseek_v3_fp8", tensors=changed(name, nan_at_the_end))
    with pytest.raises(ReadError, match="mlp.experts.1.up_proj.weight_scale_inv holds a scale"):
        load_moe_layer(folder, LAYER)(hidden).compute(scheduler="sync")
    name = "gate.e_score_correction_bias"
    folder = altered(tmp_path / "b", "deepseek_v3_fp8", tensors=changed(name, nan_at_the_end))
    with pytest.raises(ReadError, match="mlp.gate.e_score_correction_bias holds NaN"):
        load_moe_layer(folder, LAYER)(hidden).compute(scheduler="sync")


# --- at a glance ---------------------------------------------------------------------------------


def test_a_checkpoint_is_described_from_its_headers(bytes_read):
    found = describe_checkpoint(FIXTURES / "deepseek_v3_fp8")
    assert bytes_read == []
    assert (found.model_type, found.d, found.width, found.shared_width) == (
        "deepseek_v3",
        32,
        48,
        96,
    )
    assert (found.router.k, found.router.num_experts, found.shared_gate) == (3, 12, False)
    assert found.dtypes == ("float32", "float8_e4m3fn")
    assert [(layer.layer, layer.kind, layer.num_experts) for layer in found.layers] == [
        (0, "dense", 0),
        (1, "moe", 12),
    ]
    moe = found.layers[1]
    tensors = read_tensors(FIXTURES / "deepseek_v3_fp8/model.safetensors")
    assert moe.bytes_on_disk == sum(tensor.nbytes for tensor in tensors.values())
    numbers = sum(t.size for name, t in tensors.items() if not name.endswith("scale_inv"))
    assert moe.bytes_in_memory == 4 * numbers
    assert found.layers[0].bytes_on_disk == 0


@pytest.mark.parametrize("case", CASES)
def test_every_checkpoint_can_be_described(case):
    found = describe_checkpoint(FIXTURES / case)
    layer = load_moe_layer(FIXTURES / case, LAYER)
    assert LAYER in found.moe_layers
    assert found.layers[LAYER].num_experts == layer.experts.num_experts
    assert (found.shared_width > 0) == (layer.shared is not None)


def renamed(old, new):
    return lambda tensors: {name.replace(old, new): array for name, array in tensors.items()}


def test_why_no_moe_layer_can_be_described(tmp_path):
    dense = altered(tmp_path / "a", "jamba", num_experts=1)
    with pytest.raises(ValueError, match="jamba has no MoE layer among its 2"):
        describe_checkpoint(dense)
    elsewhere = altered(tmp_path / "b", "jamba", tensors=renamed("model.", "strange."))
    with pytest.raises(
        ValueError,
        match="MoE layers 1 according to config.json, .* such as model.layers.1.feed_forward",
    ):
        describe_checkpoint(elsewhere)


def test_a_model_that_answers_questions_is_read(tmp_path):
    folder = altered(tmp_path, "qwen3_moe", tensors=renamed("model.", "transformer."))
    assert errors(load_moe_layer(folder, LAYER), "qwen3_moe")["output"] <= TOLERANCE


def test_shared_experts_of_deepseek_v4_may_have_biases(tmp_path):
    names = {"w1": 12, "w3": 12, "w2": 32}
    biases = {
        f"model.layers.{LAYER}.ffn.shared_experts.{name}.bias": np.full(width, 0.5, np.float32)
        for name, width in names.items()
    }
    folder = altered(tmp_path, "deepseek_v4", tensors=lambda t: t | biases, mlp_bias=True)
    shared = load_moe_layer(folder, LAYER).shared
    assert {"gate_bias", "up_bias", "down_bias"} <= shared.weights.keys()


def test_a_shared_expert_may_have_biases_and_none_is_none(tmp_path):
    case = "ernie4_5_moe"
    rng = np.random.default_rng(0)
    sizes = {"gate": 40, "up": 40, "down": 32}
    biases = {
        f"{STEM}shared_experts.{name}_proj.bias": rng.standard_normal(n).astype(np.float32)
        for name, n in sizes.items()
    }
    biased = altered(tmp_path, case, tensors=lambda t: t | biases, use_bias=True)
    want = expected(case)
    hidden = da.from_array(want["hidden"].reshape(24, 32), chunks=7)
    got = load_moe_layer(biased, LAYER)(hidden).compute()
    tensors = read_tensors(biased / "model.safetensors")
    shared = {
        name: (tensors[f"{STEM}shared_experts.{name}_proj.weight"].astype(float),
               tensors[f"{STEM}shared_experts.{name}_proj.bias"]) for name in sizes
    }  # fmt: skip

    def expert(x, *, biased):
        g, u = (x @ shared[n][0].T + biased * shared[n][1] for n in ("gate", "up"))
        return (g / (1 + np.exp(-g)) * u) @ shared["down"][0].T + biased * shared["down"][1]

    x = want["hidden"].reshape(24, 32).astype(float)
    plain = want["output"].reshape(24, 32) - expert(x, biased=0)
    np.testing.assert_allclose(got, plain + expert(x, biased=1), atol=1e-4)

    none = altered(
        tmp_path / "b",
        case,
        moe_num_shared_experts=0,
        tensors=lambda t: {n: v for n, v in t.items() if "shared" not in n},
    )
    np.testing.assert_allclose(load_moe_layer(none, LAYER)(hidden).compute(), plain, atol=1e-4)


def emptied(tensors):
    """What transformers saves of a shared expert of width 0."""
    axis = {"gate_proj": 0, "linear_gate": 0, "up_proj": 0, "down_proj": 1}
    return {
        name: np.delete(array, slice(None), axis[name.split(".")[-2]])
        if "shared_expert" in name and name.split(".")[-2] in axis
        else array
        for name, array in tensors.items()
    }


@pytest.mark.parametrize(
    ("case", "key"),
    [
        ("deepseek_v3", "n_shared_experts"),
        ("hy_v4", "n_shared_experts"),
        ("qwen2_moe", "shared_expert_intermediate_size"),
    ],
)
def test_a_shared_expert_of_width_0_is_none(tmp_path, case, key):
    folder = altered(tmp_path, case, tensors=emptied, **{key: 0})
    hidden = da.from_array(expected(case)["hidden"], chunks=-1)
    got = load_moe_layer(folder, LAYER)(hidden).compute(scheduler="sync")
    without_it = no_shared(load_moe_layer(FIXTURES / case, LAYER))
    np.testing.assert_array_equal(got, without_it(hidden).compute(scheduler="sync"))


@pytest.mark.parametrize(
    ("case", "key"),
    [
        ("deepseek_v2", "n_shared_experts"),
        ("glm4_moe", "n_shared_experts"),
        ("ernie4_5_moe", "moe_num_shared_experts"),
    ],
)
def test_a_missing_number_of_shared_experts_is_that_of_transformers(tmp_path, case, key):
    layer = load_moe_layer(altered(tmp_path, case, **{key: None}), LAYER)
    assert errors(layer, case)["output"] <= TOLERANCE


@pytest.mark.parametrize("case", ["deepseek_v3", "glm4_moe", "dots1"])
def test_norm_topk_prob_of_null_is_false(tmp_path, case):
    folder = altered(tmp_path, case)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"norm_topk_prob": None}))
    assert load_moe_layer(folder, LAYER).router.norm_topk_prob is False


@pytest.mark.parametrize("case", ["deepseek_v2", "deepseek_v3", "glm4_moe", "dots1"])
def test_a_number_of_shared_experts_of_null_is_none(tmp_path, case):
    def without_shared(tensors):
        return {name: tensor for name, tensor in tensors.items() if "shared" not in name}

    folder = altered(tmp_path, case, tensors=without_shared)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"n_shared_experts": None}))
    assert load_moe_layer(folder, LAYER).shared is None


def test_a_null_inside_an_object_is_found(tmp_path):
    """Dbrx: weights are not divided by their norm if its order is null, and are without the key."""
    for value, is_divided in ((None, False), (1.0, True)):
        folder = altered(tmp_path / str(value), "dbrx")
        path = folder / "config.json"
        config = json.loads(path.read_text())
        config["ffn_config"]["moe_normalize_expert_weights"] = value
        path.write_text(json.dumps(config))
        assert load_moe_layer(folder, LAYER).router.norm_topk_prob is is_divided
    del config["ffn_config"]["moe_normalize_expert_weights"]
    path.write_text(json.dumps(config))
    assert load_moe_layer(folder, LAYER).router.norm_topk_prob is True


@pytest.mark.parametrize(("case", "is_text"), [("glm5_next", True), ("hy_v4", False)])
def test_hidden_act_is_that_of_shared_experts_where_the_routed_ones_are_always_silu(
    tmp_path, case, is_text
):
    folder = altered(tmp_path, case, text_config=is_text, hidden_act="relu")
    layer = load_moe_layer(folder, LAYER)
    assert layer.experts.options["activation"] == "silu"
    assert layer.shared.options["activation"] == "relu"


def test_a_key_of_null_is_missing_and_is_not_listed():
    with pytest.raises(ValueError, match=r"have 'a' \(null counts as missing\), but has only b$"):
        Key("a").find({"a": None, "b": 1}, 0)


def test_the_bias_of_a_shared_expert_of_width_0_is_refused(tmp_path):
    bias = STEM + "shared_experts.down_proj.bias"
    folder = altered(
        tmp_path,
        "deepseek_v2",
        tensors=lambda t: emptied(t) | {bias: np.ones(32, np.float32)},
        n_shared_experts=0,
    )
    with pytest.raises(ValueError, match=f"1 would not be: {bias}"):
        load_moe_layer(folder, LAYER)


@pytest.mark.parametrize(
    ("case", "key"), [("ernie4_5_moe", "moe_k"), ("hunyuan_v1_moe", "moe_topk")]
)
def test_num_experts_per_tok_comes_before_the_familys_own_key(tmp_path, case, key):
    folder = altered(tmp_path, case, num_experts_per_tok=1)
    assert key in json.loads((folder / "config.json").read_text())
    assert load_moe_layer(folder, LAYER).router.k == 1


def test_float8_experts_in_one_array_are_read(tmp_path):
    """Layout C in FP8: one scale per block of each expert."""
    case = "qwen3_moe_fused"
    original = read_tensors(FIXTURES / case / "model.safetensors")
    tensors, plain = {}, {}
    for name, array in original.items():
        if ".experts." not in name:
            tensors[name] = plain[name] = array
            continue
        scales = np.full((array.shape[0], -(-array.shape[1] // 12), -(-array.shape[2] // 8)), 0.01)
        scales = (scales * (1 + np.arange(scales.size).reshape(scales.shape))).astype(np.float32)
        wide = np.repeat(np.repeat(scales, 12, 1), 8, 2)[:, : array.shape[1], : array.shape[2]]
        tensors[name] = (array / wide).astype(ml_dtypes.float8_e4m3fn)
        tensors[name + "_scale_inv"] = scales
        plain[name] = tensors[name].astype(np.float32) * wide
    quantization = {"quant_method": "fp8", "weight_block_size": [12, 8]}
    small = altered(
        tmp_path / "a", case, tensors=lambda _: tensors, quantization_config=quantization
    )
    large = altered(tmp_path / "b", case, tensors=lambda _: plain)
    hidden = da.from_array(expected(case)["hidden"], chunks=-1)
    got, want = (load_moe_layer(folder, LAYER)(hidden).compute() for folder in (small, large))
    np.testing.assert_array_equal(got, want)


def test_a_family_says_what_a_row_must_say():
    row = Family(
        model_types=("mine",),
        blocks=("moe",),
        num_experts=Key("experts"),
        k=2,
        width=Key("width"),
        router={},
        router_weight=("w",),
        experts=find_family("mixtral", FAMILIES).experts,
        shared=Shared("shared", 0),
    )
    assert row.is_moe({}, 5)


# --- names and layers of other families ----------------------------------------------------------


def test_what_is_next_to_the_block_is_read_or_known_or_refused(tmp_path):
    """A shared expert that its family does not know would be lost without a word."""
    for case, family in (("granitemoeshared", "granitemoe"), ("granitemoehybrid", "granitemoe")):
        folder = altered(tmp_path, case, model_type=family)
        with pytest.raises(ValueError, match=r"2 would not be: .*shared_mlp.input_linear.weight"):
            load_moe_layer(folder, LAYER)

    around = {
        f"model.layers.{LAYER}.{name}": np.ones(2, np.float32)
        for name in ("self_attn.q_proj.weight", "input_layernorm.weight", "mamba.A_log",
                     "hc_attn_fn", "attn_hc.fn", "linear_attn.conv1d.weight", "layer_scalar",
                     "mlp_hyper_connection.hc_norm.weight")
    }  # fmt: skip
    folder = altered(tmp_path / "around", "granitemoeshared", tensors=lambda t: t | around)
    assert errors(load_moe_layer(folder, LAYER), "granitemoeshared")["output"] <= TOLERANCE


def stacked(tensors, stem, block, old, count, into):
    """As `save_original_format=False` writes experts: all of them in one array."""
    gate, up, down = (
        np.stack([tensors[f"{stem}{block}.experts.{e}.{name}.weight"] for e in range(count)])
        for name in old
    )
    pair = np.concatenate([gate, up], axis=1)
    return {f"{stem}{into}.experts.gate_up_proj": pair, f"{stem}{into}.experts.down_proj": down}


NAMED = ("gate_proj", "up_proj", "down_proj")
NUMBERED = ("w1", "w3", "w2")
IN_MEMORY = {
    "hy_v3": ("mlp", NAMED, 8, "mlp", {
        "router.gate": "gate", "expert_bias": "e_score_correction_bias",
        "shared_mlp": "shared_experts"}),
    "laguna": ("mlp", NAMED, 8, "mlp", {
        "experts.e_score_correction_bias": "gate.e_score_correction_bias",
        "shared_expert": "shared_experts"}),
    "exaone_moe": ("mlp", NAMED, 8, "mlp", {
        "e_score_correction_bias": "gate.e_score_correction_bias"}),
    "bailing_hybrid": ("mlp", NAMED, 8, "mlp", {
        "gate.expert_bias": "gate.e_score_correction_bias"}),
    "kimi_linear": ("block_sparse_moe", NUMBERED, 8, "mlp", {}),
    "deepseek_v4": ("ffn", NUMBERED, 8, "mlp", {
        "gate.bias": "gate.e_score_correction_bias",
        "shared_experts.w1": "shared_experts.gate_proj",
        "shared_experts.w3": "shared_experts.up_proj",
        "shared_experts.w2": "shared_experts.down_proj"}),
    "lfm2_moe": ("feed_forward", NUMBERED, 8, "feed_forward", {}),
}  # fmt: skip
"""The block on the hub, its experts' names and number; the block in memory, what else differs."""


@pytest.mark.parametrize("case", IN_MEMORY)
def test_names_of_memory_are_read_as_those_of_the_hub(tmp_path, case):
    block, names, count, into, others = IN_MEMORY[case]
    stem = f"model.layers.{LAYER}."

    def renamed(tensors):
        new = stacked(tensors, stem, block, names, count, into)
        for name, array in tensors.items():
            if ".experts." in name and name.endswith(".weight"):
                continue
            rest = name.removeprefix(f"{stem}{block}.")
            old = next((o for o in others if rest.startswith(o)), "")
            rest = others.get(old, "") + rest.removeprefix(old)
            new[f"{stem}{into}.{rest}"] = array
        return new

    folder = altered(tmp_path, case, tensors=renamed)
    assert max(errors(load_moe_layer(folder, LAYER), case).values()) <= TOLERANCE


@pytest.mark.parametrize(
    ("config", "moe"),
    [
        ({"mlp_layer_types": ["dense", "sparse", "dense"]}, [1]),
        ({"first_k_dense_replace": 2}, [2]),
        ({"first_k_dense_replace": 0, "moe_layer_freq": 2}, [0, 2]),
        ({"moe_layer_freq": [0, 1, 0], "first_k_dense_replace": 0}, [1]),
        ({}, [1, 2]),
    ],
)
def test_which_layers_are_moe_is_listed_or_follows_from_the_dense_ones(config, moe):
    row = find_family("glm4_moe_lite", FAMILIES)
    assert [layer for layer in range(3) if row.is_moe(config, layer)] == moe


def test_a_limit_of_zero_is_none_and_a_list_has_one_for_each_layer():
    limit = Key("limits", off=None, default=None)
    assert [limit.find({"limits": [0, 0.5, None]}, layer) for layer in range(3)] == [
        None,
        0.5,
        None,
    ]
    assert limit.find({}, 0) is limit.find({"limits": None}, 0) is None


# --- what a resumed run says of a config that was changed ----------------------------------------


def manifest(layer: MoELayer) -> dict:
    return {"inputs": {"layer": json.loads(json.dumps(layer.fingerprint()))}}


def test_a_changed_config_is_named_by_its_key_and_a_renamed_one_is_the_same(tmp_path):
    before = manifest(load_moe_layer(FIXTURES / "qwen3_moe", LAYER))
    other = altered(tmp_path, "qwen3_moe", num_experts_per_tok=3)
    assert describe_differences(before, manifest(load_moe_layer(other, LAYER))) == [
        "input layer: router.k was 4, is 3",
        "input layer: config.num_experts_per_tok was 4, is 3",
    ]
    same = altered(tmp_path / "same", "qwen3_moe", num_local_experts=None, num_experts=10)
    assert describe_differences(before, manifest(load_moe_layer(same, LAYER))) == []


def test_a_layer_may_choose_by_token_id(tmp_path):
    """As the first layers of DeepSeek-V4 do: a table in the place of the selection bias."""
    rng, stem = np.random.default_rng(0), f"model.layers.{LAYER}.ffn.gate."
    table = np.stack([rng.permutation(8)[:3] for _ in range(16)])

    def hashed(tensors):
        rest = {name: array for name, array in tensors.items() if name != f"{stem}bias"}
        return rest | {f"{stem}tid2eid": table}

    layer = load_moe_layer(altered(tmp_path, "deepseek_v4", tensors=hashed), LAYER)
    hidden = expected("deepseek_v4")["hidden"]
    ids = rng.integers(16, size=hidden.shape[:2])
    routed = layer.route(da.from_array(hidden), token_ids=da.from_array(ids))
    indices, weights = dask.compute(*routed, scheduler="sync")
    np.testing.assert_array_equal(indices, table[ids])
    logits = hidden.astype(float) @ layer.arrays["weight"].read().T.astype(float)
    scores = np.sqrt(np.log1p(np.exp(np.take_along_axis(logits, table[ids], axis=2))))
    want = 1.5 * scores / scores.sum(axis=2, keepdims=True)
    np.testing.assert_allclose(weights, want, rtol=1e-5)
    with pytest.raises(ValueError, match="token_ids must be given to a layer with a table"):
        layer(da.from_array(hidden))
