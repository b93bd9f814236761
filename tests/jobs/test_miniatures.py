"""Directories like those of the models that are used most are inspected, run and verified.

Each has a block of a fixture, whose tensors transformers named, in the midst of what is around it
on the hub: attention, norms, embeddings, the other half of a composite model, layers for the
prediction of further tokens; in shards with an index, under the hub's prefix, and quantized as the
published model is. The values of what is around are of no account: none of it may be read.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from dask_ep.jobs.backends import Threads
from dask_ep.jobs.inspect import inspect_path
from dask_ep.jobs.job import load_job
from dask_ep.jobs.run import run_job
from dask_ep.jobs.verify import verify_job
from tests.checkpoints import FIXTURES, LAYER, expected, read_tensors, write_tensors

MLA = ("kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "q_a_proj", "q_b_proj", "q_a_layernorm")
GQA = ("q_proj", "k_proj", "v_proj", "o_proj")
NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")


@dataclass(frozen=True)
class Miniature:
    """What a model's directory has besides the block of a fixture.

    `prefix` is that of the hub, `around` what else is in a layer, `outside` what is in no layer,
    `stored` the quantization of its matrices, and `wrapped` what a composite config calls itself.
    """

    fixture: str
    prefix: str
    around: tuple[str, ...] = ()
    outside: tuple[str, ...] = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
    stored: str = "bfloat16"
    wrapped: tuple[str, str] | None = None


def attention(names: tuple[str, ...], under: str = "self_attn") -> tuple[str, ...]:
    return (*(f"{under}.{name}.weight" for name in names), *NORMS)


TEXT = "model.language_model.layers."
VISION = ("model.visual.blocks.1.mlp.fc1.weight", "model.language_model.embed_tokens.weight")
MINIATURES = {
    "Mixtral-8x7B": Miniature("mixtral", "model.layers.", attention(GQA)),
    "Qwen3-30B-A3B": Miniature("qwen3_moe", "model.layers.", attention((*GQA, "q_norm"))),
    "Qwen3-235B-A22B-FP8": Miniature("qwen3_moe", "model.layers.", attention(GQA), stored="fp8"),
    "Qwen3-Next-80B": Miniature("qwen3_next", "model.layers.", (
        *attention(()), "linear_attn.A_log", "linear_attn.in_proj_qkvz.weight")),
    "Qwen3.5-35B-A3B": Miniature("qwen3_5_moe", TEXT, attention(GQA), VISION),
    "Qwen3-VL-30B": Miniature("qwen3_vl_moe_hub", TEXT, attention(GQA), VISION),
    "DeepSeek-V3": Miniature("deepseek_v3", "model.layers.", attention(MLA), (
        "model.embed_tokens.weight", "model.layers.2.eh_proj.weight", "model.layers.2.enorm.weight",
        "model.layers.2.mlp.experts.0.up_proj.weight"), stored="fp8"),
    "DeepSeek-V3.2": Miniature("deepseek_v32", "model.layers.", (
        *attention(MLA), "self_attn.indexer.wq_b.weight", "self_attn.indexer.k_norm.bias"),
        stored="fp8"),
    "Kimi-K2.5": Miniature("kimi_k25", "language_model.model.layers.", attention(MLA), (
        "vision_tower.encoder.blocks.1.mlp.fc0.weight", "language_model.lm_head.weight")),
    "gpt-oss-120b": Miniature("gpt_oss_mxfp4", "model.layers.", (
        *attention(GQA), "self_attn.sinks"), stored="as it is"),
    "GLM-4.6": Miniature("glm4_moe", "model.layers.", attention((*GQA, "q_norm"))),
    "GLM-5": Miniature("glm_moe_dsa", "model.layers.", (
        *attention(MLA), "self_attn.indexer.wk.weight"), stored="fp8"),
    "Llama-4-Scout": Miniature("llama4", "language_model.model.layers.", attention(GQA), (
        "vision_model.model.layers.1.mlp.fc1.weight", "language_model.lm_head.weight")),
    "MiniMax-M2": Miniature("minimax_m2", "model.layers.", attention(GQA), stored="fp8"),
    "Nemotron-3-Nano": Miniature("nemotron_h_without_latent", "backbone.layers.",
                                 ("norm.weight",), ("backbone.embeddings.weight",)),
    "Gemma-4-26B-A4B": Miniature("gemma4_text", TEXT, (
        *attention(GQA), "mlp.gate_proj.weight", "pre_feedforward_layernorm.weight",
        "layer_scalar"), VISION, wrapped=("gemma4", "text_config")),
    "DeepSeek-V4": Miniature("deepseek_v4", "layers.", (
        "attn.wq_a.weight", "attn.attn_sink", "attn_norm.weight", "ffn_norm.weight", "hc_attn_fn",
        "hc_ffn_base"), ("embed.weight", "head.weight", "hc_head_fn")),
}  # fmt: skip


def float8(matrix: np.ndarray, block: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """A matrix in FP8, with one scale per block."""
    grid = tuple(-(-size // block) for size in matrix.shape)
    scale = np.full(grid, np.abs(matrix).max() / 448, np.float32)
    wide = np.kron(scale, np.ones((block, block)))[: matrix.shape[0], : matrix.shape[1]]
    return (matrix / wide).astype(ml_dtypes.float8_e4m3fn), scale


def stored_as(kind: str, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors as a published model stores them; routers and biases stay wide."""
    out = {}
    for name, array in tensors.items():
        wide = array.ndim < 2 or "gate.weight" in name or "router" in name or kind == "as it is"
        if kind == "fp8" and not wide and array.ndim == 2:
            out[name], out[f"{name}_scale_inv"] = float8(array)
        else:
            out[name] = array if wide else array.astype(ml_dtypes.bfloat16)
    return out


def write_miniature(model: Miniature, folder: Path) -> Path:
    """Write config, index and shards; one shard's end cuts through the block."""
    case = FIXTURES / model.fixture
    block = {}
    for name, array in read_tensors(case / "model.safetensors").items():
        rest = name.partition(f".{LAYER}.")[2]
        block[f"{model.prefix}{LAYER}.{rest}"] = array
    noise = np.full((2, 2), np.nan, np.float32)
    others = [f"{model.prefix}{layer}.{name}" for layer in (0, LAYER) for name in model.around]
    tensors = stored_as(model.stored, block)
    tensors |= {name: noise.astype(ml_dtypes.bfloat16) for name in (*others, *model.outside)}

    config: dict[str, Any] = json.loads((case / "config.json").read_text())
    if model.stored == "fp8":
        config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    if model.wrapped is not None:
        config = {"model_type": model.wrapped[0], model.wrapped[1]: config}
    (folder / "config.json").write_text(json.dumps(config))
    names, weight_map = sorted(tensors), {}
    for number in range(3):
        here = names[number * len(names) // 3 : (number + 1) * len(names) // 3]
        shard = f"model-{number + 1:05d}-of-00003.safetensors"
        write_tensors(folder / shard, {name: tensors[name] for name in here})
        weight_map |= dict.fromkeys(here, shard)
    whole = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}}
    index = json.dumps(whole | {"weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index)
    return folder


@pytest.mark.parametrize("name", MINIATURES)
def test_a_directory_as_on_the_hub_is_inspected_run_and_verified(name, tmp_path):
    model = MINIATURES[name]
    folder = write_miniature(model, tmp_path)
    (finding,) = inspect_path(folder)
    told = dict(finding.facts)
    assert told["MoE layers"].split("-")[-1] == str(LAYER)
    form = {"fp8": "FP8", "as it is": "MXFP4"}.get(model.stored, "bfloat16")
    forms = [what.split(",")[0] for name, what in finding.facts if name == "experts, stored"]
    assert form in forms
    if model.around:
        assert "not read" in told

    hidden, want = (expected(model.fixture)[key].reshape(24, -1) for key in ("hidden", "output"))
    np.save(tmp_path / "hidden.npy", hidden)
    job = load_job(
        tokens=str(tmp_path / "hidden.npy"), layer=str(folder), layer_index=LAYER,
        out=str(tmp_path / "out.npy"), world_size=2,
    )  # fmt: skip
    run_job(job, Threads(2), chunk_rows=10)
    assert verify_job(job).good
    error = np.abs(np.load(job.out) - want).max() / np.abs(want).max()
    assert error <= {"FP8": 0.2, "MXFP4": 1e-6}.get(form, 0.02)


def test_what_is_around_must_be_known(tmp_path):
    model = Miniature("mixtral", "model.layers.", ("moe_adapter.weight",))
    with pytest.raises(ValueError, match=r"1 would not be: model\.layers\.1\.moe_adapter\.weight"):
        inspect_path(write_miniature(model, tmp_path))
