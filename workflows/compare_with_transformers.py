# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.6", "transformers>=5", "dask-ep[mkl,onednn]"]
# [tool.uv.sources]
# dask-ep = { path = ".." }
# ///
"""Compare the time of a MoE layer on threads with that of transformers' own block.

    python workflows/compare_with_transformers.py qwen3-like mixtral-like

Both have the same weights and rows. Prints the ratio of transformers' best time (with its eager or
its grouped experts) to dask_ep's, measured in turns on the same number of cores, and how far the
outputs differ. torch includes MKL; dask_ep uses it too on Intel CPUs, if the package ``mkl`` is
installed, and oneDNN on AMD CPUs and for bfloat16, if ``onednn-cpu-gomp`` is.

With ``--dtype bfloat16`` hidden states and weights are bfloat16. dask_ep is then timed three times:
with float32 products, as on CPUs without 16-bit products; and with the precisions "float32" and
"bfloat16". transformers' router is bfloat16 too, and chooses other experts for some rows.
"""

import argparse
import os
import time
from typing import NamedTuple

import dask
import dask.array as da
import ml_dtypes
import numpy as np
import torch
from transformers import MixtralConfig, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock
from walk.tensors import as_numpy, as_tensor

from dask_ep import Experts, MoELayer, Router
from dask_ep.arrays import blas
from dask_ep.arrays.blas import multiplies_by, one_blas_thread


class Size(NamedTuple):
    """A layer to time."""

    block: type
    config: type
    d: int
    f: int
    E: int
    k: int


SIZES = {
    "qwen3-like": Size(Qwen3MoeSparseMoeBlock, Qwen3MoeConfig, 2048, 768, 128, 8),
    "mixtral-like": Size(MixtralSparseMoeBlock, MixtralConfig, 1024, 3584, 8, 2),
    "toy": Size(Qwen3MoeSparseMoeBlock, Qwen3MoeConfig, 64, 32, 8, 2),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sizes", nargs="+", choices=SIZES)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--chunks", type=int, default=None, help="number of chunks; default: one per thread"
    )
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"dask_ep multiplies by {multiplies_by()}")
    for name in options.sizes:
        compare(name, SIZES[name], options)


def compare(name: str, size: Size, options) -> None:
    hidden = np.random.default_rng(0).standard_normal((options.rows, size.d), dtype=np.float32)
    hidden = hidden.astype(ml_dtypes.bfloat16 if options.dtype == "bfloat16" else np.float32)
    blocks = {kind: make_block(size, kind, options.dtype) for kind in ("eager", "grouped_mm")}
    layer = same_layer(blocks["eager"], size)
    rows = -(-options.rows // (options.chunks or options.threads))
    x = da.from_array(hidden, chunks=(rows, size.d), name=False)
    contestants = {kind: lambda b=block: run_block(b, hidden) for kind, block in blocks.items()}
    contestants["routing"] = lambda: compute(options.threads, *layer.route(x))
    for kind, (library, precision) in ways(options.dtype).items():
        contestants[kind] = ours(layer, x, options.threads, library, precision)

    times, outputs = {kind: [] for kind in contestants}, {}
    for _ in range(options.repeat):
        for kind, contestant in contestants.items():
            start = time.perf_counter()
            outputs[kind] = contestant()
            times[kind].append(time.perf_counter() - start)
    best = {kind: min(all_) for kind, all_ in times.items()}
    fastest = min(blocks, key=best.get)
    theirs = outputs[fastest].astype(np.float32)
    print(f"{name}: {', '.join(f'{kind} {seconds:.2f} s' for kind, seconds in best.items())}")
    for kind in ways(options.dtype):
        rest = np.abs(outputs[kind].astype(np.float32) - theirs).max(axis=1) / np.abs(theirs).max()
        print(
            f"  transformers ({fastest}) / {kind} = {best[fastest] / best[kind]:.2f}; "
            f"routing / layer = {best['routing'] / best[kind]:.3f}; largest difference over "
            f"largest value = {rest.max():.1e}, in the median row {np.median(rest):.1e}"
        )


def ways(dtype: str) -> dict[str, tuple[bool, str]]:
    """Return the variants of dask_ep: whether products may use 16 bits, and their precision."""
    if dtype == "float32":
        return {"dask_ep": (True, "float32")}
    return {
        "dask_ep, float32 products": (False, "float32"),
        "dask_ep": (True, "float32"),
        "dask_ep, rounded": (True, "bfloat16"),
    }


def ours(layer: MoELayer, x: da.Array, threads: int, in_16_bits: bool, precision: str):
    """Return a function that computes the layer in one of the variants."""
    library = blas.bfloat16_library if in_16_bits else lambda: None

    def run() -> np.ndarray:
        before, blas.bfloat16_library = blas.bfloat16_library, library
        try:
            return compute(threads, y)[0]
        finally:
            blas.bfloat16_library = before

    y = layer(x, world_size=1, precision=precision)
    return run


def make_block(size: Size, implementation: str, dtype: str) -> torch.nn.Module:
    config = size.config(
        hidden_size=size.d, moe_intermediate_size=size.f, intermediate_size=size.f,
        num_experts=size.E, num_local_experts=size.E, num_experts_per_tok=size.k,
        norm_topk_prob=True,
    )  # fmt: skip
    config._experts_implementation = implementation
    block = size.block(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in block.parameters():
            tensor.copy_(
                torch.empty_like(tensor).normal_(generator=generator) * tensor.shape[-1] ** -0.5
            )
    return block.to(getattr(torch, dtype))


def same_layer(block: torch.nn.Module, size: Size) -> MoELayer:
    """Return a layer that shares the block's weights; nothing is copied."""
    weights = {name: as_numpy(tensor) for name, tensor in block.named_parameters()}
    experts = Experts.gated_fused(
        weights["experts.gate_up_proj"], weights["experts.down_proj"], transposed=True
    )
    return MoELayer(Router(size.E, size.k, norm_topk_prob=True), experts, weights["gate.weight"])


def run_block(block: torch.nn.Module, hidden: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return as_numpy(block(as_tensor(hidden)[None])[0])


def compute(threads: int, *arrays: da.Array) -> tuple[np.ndarray, ...]:
    with one_blas_thread():
        return dask.compute(*arrays, scheduler="threads", num_workers=threads)


if __name__ == "__main__":
    main()
