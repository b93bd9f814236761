# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.6", "transformers>=5.24", "psutil", "dask-ep[mkl,onednn]"]
# [tool.uv.sources]
# dask-ep = { path = ".." }
# ///
"""What does a walk through a model cost in memory, bytes and seconds?

    python workflows/walk_cost.py --directory /fast/disk                        # 12 GB in 3 GB
    python workflows/walk_cost.py --blocks 2 --experts 64 --memory-limit 12GB   # experts fit

Makes a random checkpoint like Qwen3-MoE in bfloat16, sends random tokens through it with
`walk_model.py` in its own process, and prints

    memory    the peak of its process tree, and the limit
    bytes     of the tensors read and of the checkpoint, and how often experts were read
    seconds   of the stages (attention, norms and sums; the MoE module), in the whole walk and in
              its median block, compared with transformers' own block on the same cores, with all
              weights in memory and the best of four kinds of batches, timed before and after
              the walk; and of reading all files once

Needs psutil, and disk for the checkpoint and some hidden states.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import torch
from dask.system import CPU_COUNT
from dask.utils import parse_bytes
from measured import peak_of_tree
from torch import nn
from transformers import Qwen3MoeConfig, Qwen3MoeModel
from walk.documents import MAX_PADDING, batch_documents, chunk_documents, spans
from walk.memory import keep_freed
from walk.options import Options

from dask_ep.jobs.job import PRECISIONS

HERE = Path(__file__).parent
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
PART_BYTES = 512 << 20
"""Approximate bytes of each file of the checkpoint."""

PADDINGS = (MAX_PADDING, 0.125)
"""Fractions of padding with which transformers' own block is timed: with more, its batches are
larger."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=50_000)
    parser.add_argument("--length", type=int, default=512, help="tokens of the longest document")
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--d", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=768, help="hidden width of an expert")
    parser.add_argument("--experts", type=int, default=512, help="experts per block")
    parser.add_argument("--k", type=int, default=4, help="experts per row")
    parser.add_argument("--vocabulary", type=int, default=16_384)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    precisions = ("auto", *PRECISIONS)
    parser.add_argument("--precision", choices=precisions, default="auto", help="of experts")
    parser.add_argument("--memory-limit", type=parse_bytes, default="3GB")
    parser.add_argument("--sample", type=int, default=16_384, help="tokens for transformers' block")
    parser.add_argument("--directory", help="directory for temporary files")
    args = parser.parse_args()
    torch.set_num_threads(CPU_COUNT)
    keep_freed()  # as in the walk
    config = make_config(args)
    with tempfile.TemporaryDirectory(dir=args.directory) as folder:
        stored = write_checkpoint(config, Path(folder) / "model")
        ids = random_documents(args)
        np.save(Path(folder) / "ids.npy", ids)
        os.sync()  # otherwise the walk waits until the checkpoint is on disk
        print(f"{args.blocks} blocks of {args.experts} experts, {stored / 1e9:.2f} GB as stored; "
              f"{np.count_nonzero(ids >= 0):,} tokens, {args.dtype}, experts {args.precision}",
              flush=True)  # fmt: skip
        lengths = np.count_nonzero(ids >= 0, axis=1)
        before = own_block(config, args, lengths)
        summary, peak = walk(args, Path(folder))
        after = own_block(config, args, lengths)
        print(f"memory: peak {peak / 1e9:.2f} GB, limit {args.memory_limit / 1e9:.2f} GB")
        print(describe_bytes(summary, stored, args), flush=True)
        alone = {part: (before[part] + after[part]) / 2 for part in before}
        alone["reading"] = read_all(Path(folder) / "model")
    print(table(summary, alone, args.blocks))


def make_config(args: argparse.Namespace) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        vocab_size=args.vocabulary, hidden_size=args.d, moe_intermediate_size=args.hidden,
        num_hidden_layers=args.blocks, num_experts=args.experts, num_experts_per_tok=args.k,
        num_attention_heads=max(args.d // 64, 1), num_key_value_heads=max(args.d // 256, 1),
        head_dim=64, norm_topk_prob=True, max_position_embeddings=args.length,
        architectures=["Qwen3MoeForCausalLM"], dtype="bfloat16",
    )  # fmt: skip


def random_documents(args: argparse.Namespace) -> np.ndarray:
    """Return token ids of documents at least half as long as the longest, padded with -1."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, args.vocabulary, (2 * args.tokens // args.length + 1, args.length))
    lengths = rng.integers(args.length // 2, args.length, len(ids), endpoint=True)
    ids[np.arange(args.length) >= lengths[:, None]] = -1
    return ids[: int(np.searchsorted(np.cumsum(lengths), args.tokens)) + 1]


# --- the checkpoint --------------------------------------------------------------------------


def write_checkpoint(config: Qwen3MoeConfig, directory: Path) -> int:
    """Write random tensors, slices of one random array; return their bytes."""
    config.save_pretrained(directory)
    shapes = shapes_of(config)
    largest = max(int(np.prod(shape)) for shape in shapes.values())
    numbers = np.random.default_rng(0).standard_normal(largest + 64 * len(shapes), "f4")
    numbers = (numbers / np.float32(config.hidden_size**0.5)).astype(BFLOAT16)
    ones = np.ones(largest, BFLOAT16)
    parts: list[dict[str, np.ndarray]] = [{}]
    for number, (name, shape) in enumerate(shapes.items()):
        if sum(array.nbytes for array in parts[-1].values()) > PART_BYTES:
            parts.append({})
        source = ones if len(shape) == 1 else numbers[64 * number :]
        parts[-1][name] = source[: int(np.prod(shape))].reshape(shape)
    files = {}
    for number, part in enumerate(parts):
        file = f"model-{number:05d}.safetensors"
        write_tensors(directory / file, part)
        files |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": files}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(array.nbytes for part in parts for array in part.values())


def shapes_of(config: Qwen3MoeConfig) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a published checkpoint of this family, by name."""
    d, f, D = config.hidden_size, config.moe_intermediate_size, config.head_dim
    q, kv = config.num_attention_heads * D, config.num_key_value_heads * D
    vocabulary = (config.vocab_size, d)
    shapes = {"model.embed_tokens": vocabulary, "model.norm": (d,), "lm_head": vocabulary}
    for block in range(config.num_hidden_layers):
        in_block = {
            "input_layernorm": (d,), "post_attention_layernorm": (d,), "mlp.gate":
            (config.num_experts, d), "self_attn.q_proj": (q, d), "self_attn.k_proj": (kv, d),
            "self_attn.v_proj": (kv, d), "self_attn.o_proj": (d, q),
            "self_attn.q_norm": (D,), "self_attn.k_norm": (D,),
        }  # fmt: skip
        for e in range(config.num_experts):
            in_block |= {f"mlp.experts.{e}.{name}_proj": (f, d) for name in ("gate", "up")}
            in_block[f"mlp.experts.{e}.down_proj"] = (d, f)
        shapes |= {f"model.layers.{block}.{name}": shape for name, shape in in_block.items()}
    return {f"{name}.weight": shape for name, shape in shapes.items()}


def write_tensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Write a safetensors file."""
    header, end = {}, 0
    for name, array in tensors.items():
        begin, end = end, end + array.nbytes
        header[name] = {"dtype": "BF16", "shape": array.shape, "data_offsets": [begin, end]}
    words = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(words).to_bytes(8, "little") + words)
        for array in tensors.values():
            file.write(array.view(np.uint16).data)


# --- the walk --------------------------------------------------------------------------------


def walk(args: argparse.Namespace, folder: Path) -> tuple[dict, int]:
    """Run the walk's command; return its summary, and the peak memory of its processes."""
    command = [
        *(sys.executable, HERE / "walk_model.py", folder / "model", folder / "ids.npy"),
        *("--out", folder / "acts", "--memory-limit", str(args.memory_limit)),
        *("--length", str(args.length), "--dtype", args.dtype, "--precision", args.precision),
    ]
    with subprocess.Popen(list(map(str, command))) as process:
        peak = peak_of_tree(process)
    if process.returncode:
        raise SystemExit(f"the walk failed with exit status {process.returncode}")
    return json.loads((folder / "acts" / "summary.json").read_text()), peak


def describe_bytes(summary: dict, stored: int, args: argparse.Namespace) -> str:
    reads = sum(took["expert_reads"] for took in summary["blocks"])
    return (
        f"bytes: {summary['bytes_read'] / 1e9:.3f} GB of blocks read, of {stored / 1e9:.3f} GB "
        f"with embedding and head; {reads} experts read of {args.blocks * args.experts}"
    )


# --- its parts, on their own -----------------------------------------------------------------


def own_block(
    config: Qwen3MoeConfig, args: argparse.Namespace, lengths: np.ndarray
) -> dict[str, float]:
    """Return the seconds of transformers' own block for all tokens and blocks.

    They are scaled up from a sample of the documents, and are the best of those with batches as
    large as the walk's and as large as a token chunk, with little padding and with more.
    """
    one = Qwen3MoeConfig(**config.to_dict() | {"num_hidden_layers": 1, "vocab_size": 8})
    one._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        model = Qwen3MoeModel._from_config(one, dtype=getattr(torch, args.dtype)).eval()
    model.to_empty(device="cpu")
    model.apply(model._init_weights)
    some = lengths[: int(np.searchsorted(np.cumsum(lengths), args.sample)) + 1]
    chunks = [some[slice(*span)] for span in spans(chunk_documents(some, Options.chunk_rows))]
    took = [
        seconds_of_batches(model, [
            torch.randn(len(documents), int(chunk[documents].max()), args.d, dtype=model.dtype)
            for chunk in chunks
            for documents in batch_documents(chunk, tokens, padding)
        ])
        for tokens in (Options.batch_tokens, Options.chunk_rows)
        for padding in PADDINGS
    ]  # fmt: skip
    scale = args.blocks * lengths.sum() / some.sum()
    attention, experts = (scale * min(parts) for parts in zip(*took, strict=True))
    return {"attention": attention, "experts": experts}


def seconds_of_batches(model: Qwen3MoeModel, batches: list[torch.Tensor]) -> tuple[float, float]:
    """Return a warm block's seconds in attention, norms and sums, and in the MoE module."""
    watch = Watch(model.layers[0].mlp)
    with torch.inference_mode():
        model(inputs_embeds=batches[0])
        start, watch.seconds = time.perf_counter(), 0.0
        for batch in batches:
            model(inputs_embeds=batch)
        whole = time.perf_counter() - start
    return whole - watch.seconds, watch.seconds


class Watch:
    """Counts the seconds that a module takes."""

    def __init__(self, module: nn.Module):
        self.seconds, self._began = 0.0, 0.0
        module.register_forward_pre_hook(lambda *_: self._begin())
        module.register_forward_hook(lambda *_: self._end())

    def _begin(self) -> None:
        self._began = time.perf_counter()

    def _end(self) -> None:
        self.seconds += time.perf_counter() - self._began


def read_all(directory: Path) -> float:
    """Return the seconds of reading all files once."""
    buffer, start = bytearray(16 << 20), time.perf_counter()
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - start


def table(summary: dict, alone: dict[str, float], blocks: int) -> str:
    def seconds(took: dict, *stages: str) -> float:
        return sum(took[f"{stage}_seconds"] for stage in stages)

    stages = {"attention": ("attention", "sum"), "experts": ("experts",)}
    walked = {
        part: [seconds(b, *names) for b in summary["blocks"]] for part, names in stages.items()
    }
    whole = summary["seconds"]
    rest = whole - sum(map(sum, walked.values()))
    lines = [
        "| part | walk, s | transformers' block, s | transformers / walk | in the median block |",
        "|---|---|---|---|---|",
    ]
    for part, took in walked.items():
        theirs, median = alone[part], blocks * statistics.median(took)
        ratios = f"{theirs / sum(took):.2f} | {theirs / median:.2f}"
        lines.append(f"| {part} | {sum(took):.1f} | {theirs:.1f} | {ratios} |")
    parts = sum(alone.values()) + rest
    return "\n".join([
        *lines,
        f"| reading all files once | | {alone['reading']:.1f} | | |",
        f"| start, embedding, last norm, head | {rest:.1f} | {rest:.1f} | | |",
        f"| all of it | {whole:.1f} | {parts:.1f} | {parts / whole:.2f} | |",
    ])  # fmt: skip


if __name__ == "__main__":
    main()
