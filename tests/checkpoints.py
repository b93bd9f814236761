"""Where the checkpoints of `fixtures` lie, and how the tests make damaged and changed ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dask_ep.experts.experts import Experts
from dask_ep.experts.weights import Weight
from dask_ep.layers.layer import MoELayer
from dask_ep.storage.safetensors_header import DTYPES
from dask_ep.storage.sources import open_safetensors

FIXTURES = Path(__file__).parent / "fixtures"
CASES = sorted(path.parent.name for path in FIXTURES.glob("*/config.json"))
LAYER = 1
"""The layer that each of them holds."""


BEYOND_BFLOAT16 = {
    "deepseek_v2": 2.4e-3,
    "deepseek_v3_fp8_cut": 2.5e-3,
    "deepseek_v32": 2.1e-3,
    "axk1": 2.7e-3,
    "diffusion_gemma": 3.3e-3,
    "gemma4_text": 4.8e-3,
    "inkling_text": 2.5e-3,
    "jetmoe": 2.6e-3,
    "muse_spark_text": 3.6e-3,
    "nemotron_h": 2.2e-3,
    "deepseek_v4": 2.1e-3,
    "ernie4_5_vl_moe": 2.8e-3,
    "glm5_next": 2.9e-3,
    "granitemoeshared": 2.6e-3,
    "lara_mini": 2.1e-3,
    "lfm2_moe": 2.6e-3,
    "minimax_m3_vl": 3.3e-3,
    "openai_privacy_filter": 2.2e-3,
    "qwen4_exp_text": 2.9e-3,
    "sarvam_mla": 3e-3,
    "ernie4_5_moe": 2.4e-3,
    "gpt_oss_mxfp4": 2.3e-3,
    "llama4_text": 2.7e-3,
    "llama4_top2": 3.3e-3,
    "mixtral": 3.3e-3,
}
"""Where outputs on a device are further than 2e-3 from float64: few of the numbers that go into the
second product make the output, each with the rounding of bfloat16; shared experts are added to a
sum that was rounded; in Llama 4 a row is weighed, and in others normalised or projected, before its
expert sees it."""


def tolerances_in_bfloat16(case: str, layer: MoELayer) -> dict[str, float]:
    """How far outputs in bfloat16 may be from float64 on a device, of the largest value, by
    precision.

    That is before they are rounded, which takes up to 3.9e-3 more. In float32 nothing is rounded
    before, but for what a layer puts between its experts and their rows or its output.
    """
    rounded, around = BEYOND_BFLOAT16.get(case, 2e-3), layer.around
    steps = around.before or around.between or around.after or around.beyond
    is_alone = not (steps or layer.shared or layer.residual)
    return {"float32": 1e-6 if is_alone else rounded, "bfloat16": rounded}


def expected(case: str) -> dict[str, np.ndarray]:
    """What transformers gave: hidden (3, 8, H), output, indices and weights (24, k)."""
    with np.load(FIXTURES / case / "expected.npz") as found:
        return dict(found)


def with_rounded_experts(layer: MoELayer, dtype: Any) -> MoELayer:
    """The same layer, whose experts have weights that `dtype` can say."""

    def rounded(experts: Experts | None) -> Experts | None:
        if experts is None:
            return None
        weights = {
            name: Weight.of(np.stack(weight.read(np.dtype(dtype))), name)
            for name, weight in experts.weights.items()
        }
        return Experts(experts.kind, weights, experts.options)

    names = {"weight": "router_weight", "bias": "router_bias"}
    arrays = {names.get(name, name): array.source for name, array in layer.arrays.items()}
    parts = {"shared": rounded(layer.shared), "around": layer.around}
    return MoELayer(layer.router, rounded(layer.experts), **parts, **arrays)


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    return {
        name: source.read(0, source.shape[0]) for name, source in open_safetensors(path).items()
    }


def write_tensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Write a safetensors file of arrays of any dtype that the format has."""
    labels = {dtype: label for label, dtype in DTYPES.items()}
    header, end = {}, 0
    for name, array in tensors.items():
        begin, end = end, end + array.nbytes
        header[name] = {
            "dtype": labels[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    data = b"".join(np.ascontiguousarray(array).tobytes() for array in tensors.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def altered(
    folder: Path,
    case: str,
    *,
    tensors: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] | None = None,
    text_config: bool = False,
    **config: Any,
) -> Path:
    """Copy a fixture of one file with its tensors or config changed; a None takes a key out."""
    copy = folder / case
    shutil.copytree(FIXTURES / case, copy)
    if tensors is not None:
        path = copy / "model.safetensors"
        write_tensors(path, tensors(read_tensors(path)))
    path = copy / "config.json"
    whole = json.loads(path.read_text())
    part = whole["text_config"] if text_config else whole
    part.update(config)
    for key in [key for key, value in part.items() if value is None and key in config]:
        del part[key]
    path.write_text(json.dumps(whole))
    return copy
