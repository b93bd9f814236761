"""GGUF files, written by the format's own library from the checkpoints of `fixtures`.

Tensors get the names that the library gives them; keys are those of its writer, with what the
converter of llama.cpp takes from ``config.json``.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.checkpoints import FIXTURES, read_tensors

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
Form = gguf.GGMLQuantizationType

KEYS = {
    "embedding_length": ("hidden_size",),
    "block_count": ("num_hidden_layers",),
    "feed_forward_length": ("intermediate_size",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    "expert_count": ("num_local_experts", "num_experts", "n_routed_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_shared_count": ("n_shared_experts",),
    "expert_group_count": ("n_group",),
    "expert_group_used_count": ("topk_group",),
    "expert_weights_scale": ("routed_scaling_factor",),
    "expert_weights_norm": ("norm_topk_prob",),
}

SIGMOID = {"expert_gating_func": gguf.ExpertGatingFuncType.SIGMOID}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("llama", {}),
    "qwen2_moe": ("qwen2moe", {}),
    "qwen3_moe": ("qwen3moe", {}),
    "qwen3_next": ("qwen3next", {}),
    "qwen3_5_moe": ("qwen35moe", {}),
    "qwen3_vl_moe": ("qwen3vlmoe", {}),
    "olmoe": ("olmoe", {}),
    # What its config says of norms is not heeded by transformers, and false in published files.
    "deepseek_v2": ("deepseek2", {"expert_weights_norm": False}),
    "deepseek_v2_greedy": ("deepseek2", {"expert_weights_norm": False}),
    "deepseek_v3": ("deepseek2", SIGMOID),
    "glm4_moe": ("glm4moe", SIGMOID),
    "glm_moe_dsa": ("glm-dsa", SIGMOID),
    "dots1": ("dots1", SIGMOID),
    "minimax_m2": (
        "minimax-m2", {**SIGMOID, "expert_feed_forward_length": 20, "feed_forward_length": 20}
    ),
    "gpt_oss": ("gpt-oss", {"expert_feed_forward_length": 20}),
    "hunyuan_v1_moe": (
        "hunyuan-moe", {"expert_used_count": 3, "expert_shared_feed_forward_length": 20}
    ),
}  # fmt: skip
"""Architecture and further settings by checkpoint."""


def write_gguf(
    path: Path,
    arch: str,
    settings: dict[str, Any],
    tensors: dict[str, tuple[np.ndarray, Form]],
    split_count: int = 1,
) -> Path:
    """Write a file; each tensor is of floats, or the bytes of a form, and its form."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_uint16("split.count", split_count)
    for name, value in settings.items():
        if name == "nextn_predict_layers":
            writer.add_uint32(f"{arch}.{name}", value)
        else:
            getattr(writer, f"add_{name}")(value)
    for name, (array, form) in tensors.items():
        writer.add_tensor(name, array, raw_dtype=form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def settings_of(case: str) -> dict[str, Any]:
    config = json.loads((FIXTURES / case / "config.json").read_text())
    config = config.get("text_config", config)
    found = {
        key: config[name]
        for key, names in KEYS.items()
        for name in names
        if config.get(name) is not None
    }
    return found | CASES[case][1]


def tensors_of(case: str) -> dict[str, np.ndarray]:
    """The tensors of the layer as the converter makes them, in float32."""
    named: dict[str, np.ndarray] = {}
    stacks: dict[str, dict[int, np.ndarray]] = {}
    for file in sorted((FIXTURES / case).glob("*.safetensors")):
        for name, array in read_tensors(file).items():
            name = name.replace("model.language_model.", "model.")
            name = name.replace("e_score_correction_bias", "e_score_correction.bias")
            if found := re.fullmatch(r"(.*experts\.)(\d+)\.(.*)", name):
                stacks.setdefault(found[1] + found[3], {})[int(found[2])] = array
            elif name.endswith("shared_expert_gate.weight"):
                named[name] = array[0]
            elif case == "gpt_oss" and ".experts." in name:
                named |= of_gpt_oss(name, array)
            elif case == "qwen3_vl_moe" and name.endswith("gate_up_proj"):
                for half, part in zip(("gate", "up"), np.split(array, 2, axis=1), strict=True):
                    named[name.replace("gate_up", half)] = part
            else:
                named[name] = array
    named |= {name: np.stack([one[e] for e in range(len(one))]) for name, one in stacks.items()}
    arch = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == CASES[case][0])
    names, renamed = gguf.get_tensor_name_map(arch, 2), {}
    for name, array in named.items():
        new = names.get_name(name, (".weight", ".bias"))
        assert new is not None, name
        ending = "" if new.endswith((".weight", ".bias")) else ".weight"
        renamed[new + ending] = np.ascontiguousarray(array, np.float32)
    return renamed


def of_gpt_oss(name: str, array: np.ndarray) -> dict[str, np.ndarray]:
    """Its experts, whose gate and up alternate, and which are (E, in, out)."""
    bias = name.endswith("_bias")
    array, ending = (array, ".bias") if bias else (array.swapaxes(1, 2), ".weight")
    stem = name.removesuffix("_bias")
    if not stem.endswith("gate_up_proj"):
        return {stem + ending: array}
    halves = {"gate_proj": array[:, ::2], "up_proj": array[:, 1::2]}
    return {stem.replace("gate_up_proj", half) + ending: part for half, part in halves.items()}


def converted(case: str, path: Path, forms: dict[str, Form] | None = None, **settings: Any) -> Path:
    """A checkpoint of `fixtures` as a GGUF file; `forms` by parts of names, F32 without."""
    tensors = {}
    for name, array in tensors_of(case).items():
        form = next((f for part, f in (forms or {}).items() if part in name), Form.F32)
        tensors[name] = (gguf.quantize(array, form), form)
    return write_gguf(path, CASES[case][0], settings_of(case) | settings, tensors)
