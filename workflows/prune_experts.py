"""Write a checkpoint that has only the best experts of each MoE layer.

    python workflows/prune_experts.py DIR STATS --keep 0.5 --score reap --out PRUNED

STATS is the output of `dask-ep collect` for each MoE layer: a directory with
``stats_003.safetensors`` for layer 3 and so on, or the file of the only MoE layer. If the router
chooses groups of experts first, the same number is kept in each group, so that it still works.

Nothing is computed and no tensor is loaded: the bytes of the experts that are kept are copied, file
by file, with their rows of the router and its biases. ``config.json`` gets the new number of
experts; layers for multi-token prediction that have experts are left out, as no statistics are
collected of them; all other files (tokenizer, generation settings) are copied unchanged. At the end
each MoE layer of the new checkpoint is opened, which compares all shapes with the config; only then
is the directory renamed to PRUNED. The pruned layer computes what the old one does with the other
experts masked out: their logits are minus infinity.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import reduce
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import click
import numpy as np

from dask_ep import load_moe_layer
from dask_ep.cli.command import debug_option
from dask_ep.cli.main import main
from dask_ep.layers.block import Block
from dask_ep.layers.checkpoint_files import INDEX
from dask_ep.layers.checkpoint_layers import Checkpoint
from dask_ep.layers.families import PREFIXES, TEXT_CONFIGS
from dask_ep.layers.family import Family, Key
from dask_ep.storage.bundle import read_metadata
from dask_ep.storage.safetensors_header import encode_entries
from dask_ep.storage.sources import open_safetensors

SCORES = {
    "reap": "reap.score",
    "norm": "reap.norm",
    "rows": "usage.rows",
    "weight": "usage.weight",
}
"""Short names of the usual statistics to choose experts by."""

CONFIGS = (*TEXT_CONFIGS, ())
"""Paths of the text model's config in ``config.json``; empty for a plain model."""

PIECE = 16 << 20
"""Bytes copied at a time."""

PREDICTION_LAYERS = {"num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers"}
"""Names in configs of the number of layers beyond the last, for multi-token prediction."""

OF_EXPERT = re.compile(r"((?:.*\.)?experts\.)(\d+)(\..+)")
OF_EXPERTS = re.compile(r"(^|\.)experts\.")
NAMED_EXPERT = re.compile(r"\bexperts\\*\.\d+")
"""The name of an expert in JSON, or the same in a pattern, where backslashes precede the dot."""


# --- which experts are kept ----------------------------------------------------------------------


def choose(scores: np.ndarray, keep: float, groups: int = 1) -> np.ndarray:
    """Choose the experts with the highest scores, the same number in each group.

    Parameters
    ----------
    scores : (E,) floats; ties go to the lower index
    keep : fraction of the experts, rounded down, at least one of each group
    groups : int, a divisor of E

    Returns
    -------
    (kept,) int64, ascending

    Examples
    --------
    >>> choose(np.array([0.1, 0.4, 0.3, 0.2]), 0.5).tolist()
    [1, 2]
    >>> choose(np.array([0.1, 0.4, 0.3, 0.2]), 0.5, groups=2).tolist()
    [1, 2]
    >>> choose(np.array([0.5, 0.4, 0.3, 0.2]), 0.5, groups=2).tolist()
    [0, 2]
    """
    size = len(scores) // groups
    count = max(int(keep * size + 1e-9), 1)
    best = np.argsort(-scores.reshape(groups, size), axis=1, kind="stable")[:, :count]
    return np.sort(best + size * np.arange(groups)[:, None], axis=None)


def check_router(router: Any, kept: int, layer: int) -> None:
    """Raise if too few experts are kept for the router to choose from."""
    in_group = kept // router.groups
    reach = in_group * router.topk_groups
    if reach < router.k:
        among = f", {in_group} in each of {router.topk_groups} groups" * (router.groups > 1)
        raise click.UsageError(
            f"a row of layer {layer} chooses {router.k} experts, but only {reach} would be left to "
            f"choose from{among}; raise --keep"
        )
    if router.group_score == "top2" and in_group < 2:  # transformers scores a single group too
        raise click.UsageError(
            f"the router of layer {layer} scores a group by its two best experts, but only "
            f"{in_group} would be left in each; raise --keep"
        )


def read_scores(stats: Path, layers: list[int], score: str, E: int) -> dict[int, np.ndarray]:
    """Read the (E,) scores of each layer."""
    if not stats.is_dir() and len(layers) > 1:
        raise click.UsageError(
            f"{stats} is one file, but {len(layers)} layers are pruned: give the directory with "
            f"stats_{layers[0]:03d}.safetensors and so on"
        )
    found = {}
    for layer in layers:
        path = stats / f"stats_{layer:03d}.safetensors" if stats.is_dir() else stats
        if not path.exists():
            raise click.UsageError(
                f"each MoE layer needs a statistics file, but layer {layer} has none: {path}"
            )
        found_layer = read_metadata(str(path)).get("layer_index", str(layer))
        if found_layer != str(layer):
            raise click.UsageError(
                f"{path} must have the statistics of layer {layer}, but has those of layer "
                f"{found_layer}"
            )
        tensors, name = open_safetensors(path), SCORES.get(score, score)
        if name not in tensors:
            raise click.UsageError(
                f"{path} must have {name!r} for --score {score}, but has only "
                f"{', '.join(sorted(tensors))}"
            )
        values = tensors[name].read(0, tensors[name].shape[0]).astype(np.float64)
        if values.shape != (E,) or not np.isfinite(values).all():
            raise click.UsageError(
                f"{name} of {path} must be ({E},) finite numbers, one for each expert of layer "
                f"{layer}, but is {values.shape} with {(~np.isfinite(values)).sum()} others"
            )
        found[layer] = values
    return found


# --- new tensors ---------------------------------------------------------------------------------


class Entry(NamedTuple):
    """A tensor of the new checkpoint."""

    name: str
    dtype: str
    #: name of the dtype in the format
    shape: list[int]
    spans: list[tuple[int, int]]
    #: byte ranges of the old file's data that make up the tensor, in order


@dataclass
class Pruning:
    """Which experts of a checkpoint are kept, and the new form of its tensors."""

    checkpoint: Checkpoint
    kept: Mapping[int, np.ndarray]
    #: experts by layer
    num_experts: int
    #: the old number
    blocks: Mapping[int, Block]
    #: blocks by layer, each with the names of its tensors
    left_out: frozenset[str] = field(init=False)
    #: names of the tensors beyond the last layer, if experts are among them

    def __post_init__(self) -> None:
        self.layer_of = {
            block.prefix + name: layer
            for layer, block in self.blocks.items()
            for name in block.taken - of_every_row(block)
        }
        last = self.checkpoint.num_layers
        numbered = (
            prefix.format(layer=layer) for prefix in PREFIXES for layer in range(last, last + 16)
        )
        beyond = ("mtp", "model.mtp", *numbered)
        names = [name for name in self.checkpoint.files.file_of if name.startswith(beyond)]
        self.left_out = frozenset(names if any(".experts." in name for name in names) else ())

    def entry(self, name: str, dtype: str, shape: list[int], span: tuple[int, int]) -> Entry | None:
        """Return the new form of a tensor; None if it is dropped."""
        if name in self.left_out:
            return None
        layer = self.layer_of.get(name)
        if layer is None:
            return Entry(name, dtype, shape, [span])
        if match := OF_EXPERT.fullmatch(name):
            stem, expert, ending = match.groups()
            at = np.flatnonzero(self.kept[layer] == int(expert))
            return Entry(f"{stem}{at[0]}{ending}", dtype, shape, [span]) if len(at) else None
        axis = self.axis_of_experts(name, shape)
        whole, kept = shape[axis], self.kept[layer]
        begin, end = span
        runs = math.prod(shape[:axis])  # contiguous runs of bytes, each with all experts
        size = (end - begin) // (runs * self.num_experts)
        starts = begin + size * (self.num_experts * np.arange(runs)[:, None] + kept).reshape(-1)
        rows = [*shape[:axis], whole // self.num_experts * len(kept), *shape[axis + 1 :]]
        return Entry(name, dtype, rows, [(first, first + size) for first in starts.tolist()])

    def axis_of_experts(self, name: str, shape: list[int]) -> int:
        """Return the expert axis of a tensor that holds parts of all experts."""
        block = self.blocks[self.layer_of[name]]
        family, E = block.family, self.num_experts
        in_out = [block.full(each) for each in family.router_weight_in_out]
        axis = 1 if shape[:1] == [1] or name in in_out else 0
        flat = any(layout.flat for layout in family.experts)
        if len(shape) > axis and (shape[axis] == E or (flat and shape[axis] % E == 0)):
            return axis
        raise click.UsageError(
            f"{name} {tuple(shape)} belongs to a MoE layer, but has no axis of its {E} experts: "
            "a checkpoint stored in this way cannot be pruned"
        )

    # --- files ---

    def write_file(self, file_name: str, out: Path) -> list[str]:
        """Write one file without the dropped tensors; return the names of those it has."""
        self.checkpoint.files.header(file_name)  # raises for damaged files
        with open(Path(self.checkpoint.files.directory, file_name), "rb") as old:
            length = int.from_bytes(old.read(8), "little")
            header = json.loads(old.read(length))
            metadata, data = header.pop("__metadata__", None), 8 + length
            entries = [
                made
                for name, it in sorted(header.items(), key=lambda item: item[1]["data_offsets"])
                if (made := self.entry(name, it["dtype"], it["shape"], tuple(it["data_offsets"])))
            ]
            if entries:
                with open(out / file_name, "wb") as new:
                    new.write(encoded(entries, metadata))
                    for span in (span for entry in entries for span in entry.spans):
                        copy_bytes(old, new, data + span[0], span[1] - span[0])
        return [entry.name for entry in entries]

    def write(self, out: Path) -> None:
        """Write all files of the new checkpoint."""
        files = self.checkpoint.files
        old = Path(files.directory)
        weight_map = {}
        for file_name in sorted(set(files.file_of.values())):
            names = self.write_file(file_name, out)
            weight_map |= dict.fromkeys(names, file_name)
        if files.first_file.endswith(".index.json"):
            total = sum((out / name).stat().st_size for name in set(weight_map.values()))
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (out / files.first_file).write_text(json.dumps(index, indent=2))
        (out / "config.json").write_text(json.dumps(self.config(), indent=2) + "\n")
        done = {"config.json", files.first_file, INDEX, *files.file_of.values()}
        for path in old.iterdir():
            weights = path.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf")
            if path.is_file() and path.name not in done and not weights:
                shutil.copy2(path, out / path.name)

    def config(self) -> dict[str, Any]:
        """Return the config with the new number of experts."""
        config = json.loads(json.dumps(self.checkpoint.files.config))
        parts = (reduce(lambda part, name: part.get(name) or {}, path, config) for path in CONFIGS)
        text = next(filter(None, parts))
        number = len(next(iter(self.kept.values())))
        for name in self.checkpoint.model.family.num_experts.names:
            *path, last = name.split(".")
            part = reduce(lambda part, name: part.get(name) or {}, path, text)
            if last in part:
                old = part[last]
                part[last] = [number] * len(old) if isinstance(old, list) else number
        if self.left_out:
            text |= dict.fromkeys(text.keys() & PREDICTION_LAYERS, 0)
        if named := NAMED_EXPERT.search(json.dumps(self.checkpoint.model.quantization)):
            raise click.UsageError(
                f"the settings of the quantization must not name individual experts ({named[0]}), "
                "whose indices change; prune the checkpoint before it is quantized"
            )
        return config


def encoded(entries: list[Entry], metadata: dict[str, str] | None) -> bytes:
    """Return the header of a safetensors file."""
    sizes = [sum(end - begin for begin, end in entry.spans) for entry in entries]
    ends = np.cumsum([0, *sizes]).tolist()
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    for entry, offsets in zip(entries, pairwise(ends), strict=True):
        header[entry.name] = {
            "dtype": entry.dtype, "shape": entry.shape, "data_offsets": list(offsets),
        }  # fmt: skip
    return encode_entries(header)


def copy_bytes(old: BinaryIO, new: BinaryIO, begin: int, count: int) -> None:
    old.seek(begin)
    while count:
        piece = old.read(min(count, PIECE))
        if not piece:
            raise OSError(f"{old.name} is truncated: {count} bytes are missing")
        new.write(piece)
        count -= len(piece)


# --- the command ---------------------------------------------------------------------------------


@click.command()
@click.argument("directory", metavar="DIR", type=click.Path(exists=True, file_okay=False))
@click.argument("stats", metavar="STATS", type=click.Path(exists=True, path_type=Path))
@click.option(
    "--keep",
    type=click.FloatRange(0, 1, min_open=True),
    required=True,
    help="Fraction of the experts to keep.",
)
@click.option(
    "--score",
    default="reap",
    show_default=True,
    metavar="NAME",
    help=f"{', '.join(SCORES)}, or the name of an (E,) tensor in STATS.",
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The new directory.")
@debug_option
def prune(directory: str, stats: Path, keep: float, score: str, out: Path) -> None:
    """Write checkpoint DIR with only the best experts of each MoE layer, according to STATS.

    \b
    Example:
      python workflows/prune_experts.py DIR stats/ --keep 0.5 --score reap --out PRUNED
    """
    if out.exists():
        raise click.UsageError(f"{out} exists already; choose another --out")
    checkpoint = Checkpoint(directory)
    layers = [layer for layer in checkpoint.moe_layers if checkpoint.places(layer)]
    opened = {layer: load_moe_layer(directory, layer) for layer in layers}
    sizes = {layer.experts.num_experts for layer in opened.values()}
    if len(sizes) != 1:
        raise click.UsageError(
            f"all MoE layers must have the same number of experts, but those of {directory} have "
            f"{', '.join(map(str, sorted(sizes))) or 'none'}"
        )
    (num_experts,) = sizes
    blocks = {layer: block_of(checkpoint, layer) for layer in layers}
    check_family(checkpoint.model.family, blocks)
    scores = read_scores(stats, layers, score, num_experts)
    kept = {i: choose(scores[i], keep, layer.router.groups) for i, layer in opened.items()}
    for i, layer in opened.items():
        check_router(layer.router, len(kept[i]), i)
    pruning = Pruning(checkpoint, kept, num_experts, blocks)
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    pruning.write(partial)
    for i in kept:
        load_moe_layer(partial, i)
    os.rename(partial, out)
    for line in described(pruning, scores):
        click.echo(line)
    click.echo(f"{out}: {len(next(iter(kept.values())))} of {num_experts} experts in each layer")


def block_of(checkpoint: Checkpoint, layer: int) -> Block:
    """Return the block of a layer, which has taken its tensors."""
    ((prefix, name),) = checkpoint.places(layer)
    block = Block(checkpoint.model, layer, prefix, name, checkpoint.files.under(prefix))
    block.arguments(residual=False)
    return block


def of_every_row(block: Block) -> set[str]:
    """Return the tensors that belong to no expert: those of shared experts, steps and norms."""
    again = Block(block.model, block.layer, block.prefix, block.name.rstrip("."), block.tensors)
    again.shared()
    again.around()
    again.take_any(again.family.input_scale, (again.H,))
    again.take_any(again.family.output_scale, (again.D,))
    return again.taken


def check_family(family: Family, blocks: Mapping[int, Block]) -> None:
    """Raise for layers whose experts depend on tensors other than their own and the router's."""
    for block in blocks.values():
        others = [n for n in set(block.tensors) - block.taken if OF_EXPERTS.search(n)]
        if others:
            raise click.UsageError(
                f"{block.where} has tensors of experts that dask_ep does not read, such as "
                f"{block.prefix}{min(others)}: this checkpoint cannot be pruned"
            )
        if table := block.first_here(family.table):
            raise click.UsageError(
                f"{block.where} looks up the experts of each token in {block.full(table)}, so some "
                "rows would have no experts left: this checkpoint cannot be pruned"
            )
    if not isinstance(family.num_experts, Key):
        raise click.UsageError(
            f"the number of experts of {', '.join(family.model_types)} is not a single key of "
            "config.json: this checkpoint cannot be pruned"
        )


def described(pruning: Pruning, scores: Mapping[int, np.ndarray]) -> Iterator[str]:
    for layer, kept in pruning.kept.items():
        total = scores[layer].sum()
        share = f", {scores[layer][kept].sum() / total:.1%} of the score" if total > 0 else ""
        yield f"layer {layer}: experts {', '.join(map(str, kept.tolist()))}{share}"
    if pruning.left_out:
        yield (
            f"note: {len(pruning.left_out)} tensors beyond the last layer (multi-token prediction) "
            f"are left out, such as {min(pruning.left_out)}"
        )


if __name__ == "__main__":
    main(command=prune, name="prune_experts.py")
