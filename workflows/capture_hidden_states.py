# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.6", "transformers>=5", "zarr>=3.0.8", "numpy>=2.1"]
# ///
"""Write what goes into a model's MoE block, for every token of a text, to a Zarr array.

    python workflows/capture_hidden_states.py MODEL TEXT --layer 7 --out hidden.zarr
    dask-ep run --layer MODEL --layer-index 7 --tokens hidden.zarr --out out.zarr

MODEL is a checkpoint directory (or a name that transformers knows), TEXT a file with one document
a line. The model runs in transformers, batch by batch, up to the layer and no further; the rows of
padding are left out. Rows come in the order of the text: (n, d), one per token.
"""

import argparse
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import zarr
from transformers import AutoModelForCausalLM, AutoTokenizer

BLOCKS = ("block_sparse_moe", "mlp", "feed_forward")


class Reached(Exception):
    """The layer has its input: the rest of the model need not run."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--layer", type=int, required=True, help="number of the decoder layer")
    parser.add_argument("--out", type=Path, required=True, help="a new Zarr array")
    parser.add_argument("--batch", type=int, default=8, help="documents per batch")
    parser.add_argument("--length", type=int, default=512, help="tokens of a document, at most")
    parser.add_argument("--chunk-rows", type=int, default=4096)
    parser.add_argument(
        "--dtype", default="auto", help="dtype of the model: auto, float32, bfloat16"
    )
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    if options.out.exists():
        parser.error(f"{options.out} exists already; remove it or choose another --out")

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=options.dtype)
    model = model.to(options.device).eval()

    parts = hidden_states(model, tokenizer, options)
    rows = write(parts, options.out, options.chunk_rows)
    print(f"{rows} rows of layer {options.layer}'s input in {options.out}")


def hidden_states(model, tokenizer, options) -> Iterator[np.ndarray]:
    """Return the block's input rows (tokens, d) of each batch, in float32."""
    caught: list[torch.Tensor] = []

    def catch(_module, args, kwargs):
        caught.append(args[0] if args else kwargs["hidden_states"])
        raise Reached

    block = find_block(model, options.layer)
    hook = block.register_forward_pre_hook(catch, with_kwargs=True)
    with options.text.open() as lines, torch.no_grad():
        documents = (line.strip() for line in lines if line.strip())
        while batch := list(islice(documents, options.batch)):
            inputs = tokenizer(batch, return_tensors="pt", padding=True, truncation=True,
                               max_length=options.length).to(model.device)  # fmt: skip
            try:
                model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
            except Reached:
                hidden = caught.pop().reshape(*inputs["input_ids"].shape, -1)
                yield hidden[inputs["attention_mask"].bool()].float().cpu().numpy()
    hook.remove()


def find_block(model, layer: int) -> torch.nn.Module:
    """Find the decoder layer's MLP or MoE block: that of the text model, if there are others."""
    for name, module in model.named_modules():
        path = name.split(".")
        if path[-3:-1] == ["layers", str(layer)] and path[-1] in BLOCKS and "vision" not in name:
            return module
    raise SystemExit(f"the model has no layer {layer} with one of {', '.join(BLOCKS)}")


def write(parts: Iterator[np.ndarray], path: Path, chunk_rows: int) -> int:
    """Append rows to a new Zarr array in whole chunks; give their number."""
    array, waiting = None, []
    for part in parts:
        if array is None:
            array = zarr.create_array(
                path, shape=(0, part.shape[1]), chunks=(chunk_rows, part.shape[1]), dtype="float32",
                compressors=None, fill_value=0,
            )  # fmt: skip
        waiting.append(part)
        if sum(map(len, waiting)) >= chunk_rows:
            rows = np.concatenate(waiting)
            whole = len(rows) // chunk_rows * chunk_rows
            array.append(rows[:whole])
            waiting = [rows[whole:]]
    if array is None:
        raise SystemExit("the text has no document")
    array.append(np.concatenate(waiting))
    return array.shape[0]


if __name__ == "__main__":
    main()
