# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.6", "transformers>=5", "dask-ep[mkl]"]
# ///
"""Time a MoE layer on local threads against transformers' own block: same weights, same rows.

    python workflows/compare_with_transformers.py qwen3-like mixtral-like

Prints the ratio of transformers' best time (its eager and its grouped experts) to dask_ep's, both
taken in this run in turn, float32, on the same number of cores; and how far the outputs differ.
torch brings MKL along for its products; dask_ep uses it too, if the package ``mkl`` is installed.
"""

import argparse
import os
import time
from typing import NamedTuple

import dask
import dask.array as da
import numpy as np
import torch
from transformers import MixtralConfig, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from dask_ep import Experts, MoELayer, Router
from dask_ep.blas import one_blas_thread


class Size(NamedTuple):
    """A layer to be timed."""

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
    parser.add_argument("--chunks", type=int, default=None, help="of the rows; default: 1 a thread")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.sizes:
        compare(name, SIZES[name], options)


def compare(name: str, size: Size, options) -> None:
    hidden = np.random.default_rng(0).standard_normal((options.rows, size.d), dtype=np.float32)
    blocks = {kind: make_block(size, kind) for kind in ("eager", "grouped_mm")}
    layer = same_layer(blocks["eager"], size)
    rows = -(-options.rows // (options.chunks or options.threads))
    y = layer(da.from_array(hidden, chunks=(rows, size.d), name=False), world_size=1)
    routing = layer.route(da.from_array(hidden, chunks=(rows, size.d), name=False))
    contestants = {kind: lambda b=block: run_block(b, hidden) for kind, block in blocks.items()}
    contestants["dask_ep"] = lambda: compute(options.threads, y)[0]
    contestants["routing"] = lambda: compute(options.threads, *routing)

    times, outputs = {kind: [] for kind in contestants}, {}
    for _ in range(options.repeat):
        for kind, contestant in contestants.items():
            start = time.perf_counter()
            outputs[kind] = contestant()
            times[kind].append(time.perf_counter() - start)
    best = {kind: min(all_) for kind, all_ in times.items()}
    fastest = min(("eager", "grouped_mm"), key=best.get)
    difference = (
        np.abs(outputs["dask_ep"] - outputs[fastest]).max() / np.abs(outputs[fastest]).max()
    )
    print(
        f"{name}: transformers ({fastest}) / dask_ep = {best[fastest] / best['dask_ep']:.2f}; "
        f"routing / layer = {best['routing'] / best['dask_ep']:.3f}; "
        f"largest difference over largest value = {difference:.1e}"
    )


def make_block(size: Size, implementation: str) -> torch.nn.Module:
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
    return block


def same_layer(block: torch.nn.Module, size: Size) -> MoELayer:
    """The block's own memory as a layer: nothing is copied."""
    weights = {name: tensor.detach().numpy() for name, tensor in block.named_parameters()}
    experts = Experts.gated_fused(
        weights["experts.gate_up_proj"], weights["experts.down_proj"], transposed=True
    )
    return MoELayer(Router(size.E, size.k, normalise=True), experts, weights["gate.weight"])


def run_block(block: torch.nn.Module, hidden: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return block(torch.from_numpy(hidden)[None])[0].numpy()


def compute(threads: int, *arrays: da.Array) -> tuple[np.ndarray, ...]:
    with one_blas_thread():
        return dask.compute(*arrays, scheduler="threads", num_workers=threads)


if __name__ == "__main__":
    main()
