"""What is this file, checkpoint, job or output?

Only headers and records are read, and the indices of a routing. A `Finding` is data, which the
command line prints.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from dask.utils import format_bytes

from dask_ep.errors import ReadError
from dask_ep.graph.expert_schedule import READS
from dask_ep.jobs.build import open_inputs
from dask_ep.jobs.job import load_job
from dask_ep.jobs.notes import find_notes
from dask_ep.kernel.bfloat16 import multiplied_by
from dask_ep.kernel.operands import multiplied_on_gpus
from dask_ep.layers.checkpoint import (
    Description,
    LayerDescription,
    StoredPart,
    describe_checkpoint,
    format_of,
)
from dask_ep.layers.checkpoint_files import CheckpointFiles
from dask_ep.storage import journal
from dask_ep.storage.files import exists
from dask_ep.storage.gguf_files import open_gguf
from dask_ep.storage.output import progress_directory
from dask_ep.storage.remote import is_remote
from dask_ep.storage.sources import Source, ZarrSource, open_safetensors, open_source
from dask_ep.storage.storage import whole_chunks

MOST_SLOTS = 64
"""An integer array up to this width is assumed to be a routing."""

_MOST_LINES = 40  # of a table


@dataclass(frozen=True)
class Finding:
    """What was found at a path."""

    kind: str
    #: a word or two: "Zarr array", "job", ...
    facts: tuple[tuple[str, str], ...]
    #: (name, value)
    header: tuple[str, ...] = ()
    lines: tuple[tuple[str, ...], ...] = ()
    #: rows of a table, if there is one


def inspect_path(path: str | os.PathLike) -> tuple[Finding, ...]:
    """Describe what is at a path.

    Parameters
    ----------
    path : a ``.npy``, ``.safetensors`` or Zarr array, ``file.safetensors::tensor``, the directory
        of a checkpoint (or the address of any of these), a ``.gguf`` file, a job (``.toml``), or an
        output, complete or not

    Returns
    -------
    one or more findings; for an output, the second is what it was made from

    Raises
    ------
    OSError
        If the path does not exist, or cannot be read.
    ValueError
        If it is none of these.

    Examples
    --------
    >>> import tempfile, os
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "x.npy")
    ...     np.save(path, np.zeros((1000, 8), np.float32))
    ...     dict(inspect_path(path)[0].facts)["shape"]
    '1000 x 8'
    """
    path = os.fspath(path)
    there = is_remote(path) or exists(path.partition("::")[0])
    record = journal.read_manifest(progress_directory(path.rstrip("/")))
    found = [_inspect_record(path.rstrip("/"), record)] if record is not None else []
    if record is None and not there:
        raise FileNotFoundError(
            f"{path} does not exist; inspect takes an array (.zarr, .npy, .safetensors), a "
            "checkpoint directory, a job (.toml) or an output"
        )
    if there:
        found.insert(0, _choose(path)(path))
    return tuple(found)


def _choose(path: str) -> Callable[[str], Finding]:
    """Find out what a path is from its suffix and content."""
    if path.endswith(".toml"):
        return _inspect_job
    if path.endswith((".safetensors", ".gguf")):
        return _inspect_gguf if path.endswith(".gguf") else _inspect_safetensors
    if path.endswith(".npy") or "::" in path:
        return _inspect_array
    if is_remote(path) or os.path.isdir(path):
        inside = set(CheckpointFiles(path).file_names)
        if "config.json" in inside:
            return _inspect_checkpoint
        if not inside & {"zarr.json", ".zarray"}:
            hint = f"; the job is {os.path.join(path, 'job.toml')}" if "job.toml" in inside else ""
            raise ValueError(
                f"{path} is neither a Zarr array (no zarr.json) nor a checkpoint (no "
                f"config.json){hint}"
            )
    return _inspect_array


# --- arrays ----------------------------------------------------------------------------------


def _inspect_array(path: str) -> Finding:
    source = open_source(path, missing="fill")
    kind = "Zarr array" if isinstance(source, ZarrSource) else "array"
    facts = _array_facts(source)
    if isinstance(source, ZarrSource) and source.path is not None:
        facts.append(("chunks never written", _count_missing(source)))
    return _with_routing(kind, facts, source)


def _count_missing(source: ZarrSource) -> str:
    try:
        return f"{len(source.find_missing()) or 'none'}"
    except ReadError as error:
        return f"not known: {error}"


def _inspect_safetensors(path: str) -> Finding:
    tensors = open_safetensors(path)
    if len(tensors) == 1:
        (source,) = tensors.values()
        return _with_routing("safetensors, one tensor", _array_facts(source), source)
    return _with_tensors("safetensors", tensors)


def _inspect_gguf(path: str) -> Finding:
    """Describe a GGUF file as a checkpoint if its layers can be read, otherwise as tensors."""
    try:
        return _inspect_checkpoint(path)
    except ValueError as error:
        return _with_tensors("GGUF", open_gguf(path).tensors, ("layers", f"not read: {error}"))


def _with_tensors(kind: str, tensors: Mapping[str, Source], *facts: tuple[str, str]) -> Finding:
    lines = [
        (name, _shape(t.shape), format_of(t), format_bytes(t.nbytes)) for name, t in tensors.items()
    ]
    size = format_bytes(sum(t.nbytes for t in tensors.values()))
    facts = (*facts, ("tensors", str(len(tensors))), ("size", size))
    return Finding(kind, facts, ("tensor", "shape", "dtype", "size"), _shorten(lines))


def _array_facts(source: Source) -> list[tuple[str, str]]:
    facts = [
        ("shape", _shape(source.shape)),
        ("dtype", source.dtype.name),
        ("size", format_bytes(source.nbytes)),
    ]
    if source.chunk_rows:
        facts.append(("rows per stored chunk", str(source.chunk_rows)))
    if source.ndim == 2 and not _is_routing(source):
        facts.append(("advised chunk rows", str(advise_chunk_rows(source))))
    return facts


def advise_chunk_rows(source: Source) -> int:
    """Return the rows of a token chunk of about 32 MiB, in whole stored chunks.

    Examples
    --------
    >>> advise_chunk_rows(open_source(np.zeros((100_000, 1024), np.float32)))
    8192
    """
    return min(whole_chunks(source), max(source.shape[0], 1))


def _is_routing(source: Source) -> bool:
    narrow = source.ndim == 1 or (source.ndim == 2 and source.shape[1] <= MOST_SLOTS)
    return source.dtype.kind in "iu" and narrow and source.shape[0] > 0


def _with_routing(kind: str, facts: list[tuple[str, str]], source: Source) -> Finding:
    if not _is_routing(source):
        return Finding(kind, tuple(facts))
    count, empty = count_routing(source)
    if not count.size:
        return Finding(kind, tuple(facts))
    mean = count.mean()
    facts += [
        ("experts, as routing", f"{count.size} (the largest index is {count.size - 1})"),
        ("slots without an expert (-1)", str(empty)),
        *([] if count[0] else [("note", "expert 0 has no row; indices count from 0, not from 1")]),
        ("rows per expert", f"{count.min()} to {count.max()}, {mean:.1f} on average"),
        ("imbalance (largest / mean)", f"{count.max() / mean if mean else 1.0:.3f}"),
    ]
    order = np.argsort(-count, kind="stable")
    lines = [(str(e), str(count[e]), f"{count[e] / mean:.2f}") for e in order.tolist()]
    return Finding(kind, tuple(facts), ("expert", "rows", "of the mean"), _shorten(lines))


def count_routing(source: Source) -> tuple[np.ndarray, int]:
    """Count the (row, slot) pairs of each expert, and those without one, block by block.

    Returns
    -------
    (E,) int64, E being the largest index + 1; empty if this cannot be a routing, since an index is
    below -1 or absurdly large
    int, the number of slots that are -1

    Examples
    --------
    >>> count_routing(open_source(np.array([[0, 2], [2, -1]])))
    (array([1, 0, 2]), 1)
    """
    count, empty = np.zeros(0, np.int64), 0
    for _, rows in source.blocks():
        block = rows.ravel().astype(np.int64)
        if block.size == 0:
            continue
        if block.min() < -1 or block.max() >= 1 << 20:
            return np.zeros(0, np.int64), 0
        here = np.bincount(block + 1)
        empty += int(here[0])
        longer = max(len(count), len(here) - 1)
        count = np.pad(count, (0, longer - len(count)))
        count[: len(here) - 1] += here[1:]
    return count, empty


def words_of_usage(path: str, num_experts: int) -> str:
    """Say how many experts a routing uses, and which one most; reads it once.

    Examples
    --------
    >>> import os, tempfile
    >>> path = os.path.join(tempfile.mkdtemp(), "routing.npy")
    >>> np.save(path, np.array([[0, 2], [2, -1], [2, 0]]))
    >>> words_of_usage(path, 4)
    '2 of 4 were used; expert 2 most, by 3 of 5 slots, 2.4 times the mean'
    """
    count, _ = count_routing(open_source(path, missing="fill"))
    if not count.any():
        return f"none of {num_experts} was used"
    hottest, slots = int(count.argmax()), int(count.sum())
    return (
        f"{np.count_nonzero(count)} of {num_experts} were used; expert {hottest} most, by "
        f"{count[hottest]:,} of {slots:,} slots, {count[hottest] * num_experts / slots:.2g} times "
        "the mean"
    )


# --- jobs, outputs, checkpoints --------------------------------------------------------------


def _inspect_job(path: str) -> Finding:
    job = load_job(path)
    inputs = open_inputs(job)
    experts = inputs.experts
    n, d = inputs.tokens.shape
    facts = [
        ("tokens", f"{n} rows of {d}, {inputs.tokens.dtype}, {format_bytes(inputs.tokens.nbytes)}"),
        ("experts", f"{experts.num_experts} {experts.kind}, {format_bytes(experts.nbytes)}"),
        ("output", f"{job.out}, {n} x {inputs.d_out}: {describe_output(job.out)}"),
    ]
    if inputs.routing is not None:
        k = int(np.prod(inputs.routing.shape[1:]))
        weighted = "with" if inputs.topk_weights is not None else "without"
        facts.insert(1, ("routing", f"{k} slots per row, {weighted} top-k weights"))
    if inputs.layer is not None:
        facts.insert(1, ("layer", f"{job.layer_index} of {job.layer}"))
    asked = (inputs.tokens.dtype, experts.is_bfloat16, experts.precision)
    facts.append(("products here", f"by {multiplied_by(*asked)}"))
    facts.append(("products on GPUs", f"by {multiplied_on_gpus(*asked)}"))
    facts += [("note", note) for note in find_notes(inputs)]
    for name, value in (("ranks", job.world_size), ("placement", job.placement)):
        if value is not None:
            facts.append((name, str(value)))
    return Finding("job", tuple(facts))


def describe_output(path: str) -> str:
    """Say whether an output exists and is complete."""
    record = journal.read_manifest(progress_directory(path))
    there = os.path.exists(path)
    if there and (record is None or record["complete"]):
        return "complete"
    if record is None:
        return "not begun"
    if record["complete"]:
        return "missing, although it was complete; run the job again with --resume"
    done = len(journal.read_done(progress_directory(path), record["run"]))
    old = "; an older output is still there" if there else ""
    return f"incomplete, {done} of {len(record['rows'])} blocks are done{_in_passes(path)}{old}"


def _in_passes(path: str) -> str:
    """Say how many experts were processed in passes, which is known long before blocks are done."""
    reads = journal.count_done(progress_directory(path), READS, what=READS)
    return f", {len(reads)} experts were processed in passes so far" if reads else ""


def _inspect_record(path: str, record: dict[str, Any]) -> Finding:
    settings = [
        (f"setting {name}", _words(value))
        for name, value in record["settings"].items()
        if value is not None
    ]
    facts = (
        ("state", describe_output(path)),
        ("shape", _shape(record["shape"])),
        ("dtype", record["dtype"]),
        ("blocks", f"{len(record['rows'])} of up to {max(record['rows'], default=0)} rows"),
        *settings,
    )
    lines = [
        (name, str(array["name"]), _shape(array["shape"]), array["dtype"])
        for name, array in _recorded_arrays(record["inputs"])
    ]
    return Finding("output", facts, ("made from", "file", "shape", "dtype"), _shorten(lines))


def _recorded_arrays(inputs: Mapping[str, Any], under: str = "") -> Iterator[tuple[str, Any]]:
    """Return the arrays that an output's record names, by their dotted names there."""
    for name, value in inputs.items():
        is_array = isinstance(value, dict) and {"name", "shape", "dtype"} <= value.keys()
        if is_array and isinstance(value["shape"], list):
            yield under + name, value
        elif isinstance(value, dict):
            yield from _recorded_arrays(value, f"{under}{name}.")


def _inspect_checkpoint(path: str) -> Finding:
    found = describe_checkpoint(path)
    router = found.router
    E = max(layer.num_experts for layer in found.layers)
    more = f", and {router.num_experts - E} that only its router knows"
    beyond = more if router.num_experts > E else ""
    facts = [
        ("model type", found.model_type),
        ("layers", f"{len(found.layers)}, {len(found.moe_layers)} of them MoE{_absent(found)}"),
        ("MoE layers", found.moe_ranges),
        ("experts", f"{E} of width {found.width}, {router.k} for each row{beyond}"),
        ("token rows", f"of width {found.d}"),
        ("router", _words_of_router(found)),
        ("dtypes", ", ".join(found.dtypes)),
        ("MoE blocks on disk", format_bytes(sum(layer.bytes_on_disk for layer in found.layers))),
    ]
    facts += [(f"{part.name}, stored", _words_of_part(part)) for part in found.parts]
    facts += [(part.name, _words_of_part(part)) for part in found.not_read]
    if found.shared_width:
        gate = ", by a gate" if found.shared_gate else ""
        facts.insert(3, ("shared experts", f"of width {found.shared_width}{gate}"))
    lines = [
        (
            str(layer.layer),
            f"{layer.kind}, not in the files here" if _is_absent(layer) else layer.kind,
            str(layer.num_experts or ""),
            format_bytes(layer.bytes_on_disk),
            format_bytes(layer.bytes_in_memory),
        )
        for layer in found.layers
    ]
    header = ("layer", "kind", "experts", "on disk", "in memory")
    return Finding("checkpoint", tuple(facts), header, _shorten(lines))


# --- words -----------------------------------------------------------------------------------


def _absent(found: Description) -> str:
    """Say how many MoE layers the files lack, if only some shards of a checkpoint are present."""
    absent = sum(map(_is_absent, found.layers))
    return f", {absent} of these not in the files here" if absent else ""


def _is_absent(layer: LayerDescription) -> bool:
    return layer.kind == "moe" and not layer.bytes_on_disk


def _words_of_part(part: StoredPart) -> str:
    size = f"{part.tensors} tensors, {format_bytes(part.stored)}"
    if part.name == "not read":
        return f"{part.format} ({size})"
    return f"{part.format}, {size}; {format_bytes(part.computed)} in float32"


def _words_of_router(found: Description) -> str:
    router = found.router
    words = [" and ".join([f"{router.score} scores", *found.router_biases]).replace("_", " ")]
    if router.topk_groups < router.groups:
        groups = f"{router.topk_groups} of {router.groups} groups"
        words.append(f"from the best {groups} by {router.group_score}")
    if router.norm_topk_prob:
        words.append("normalised")
    if router.scale != 1:
        words.append(f"times {router.scale:g}")
    side = "input" if router.apply_router_weight_on_input else "output"
    return ", ".join([*words, f"weights on the experts' {side}"])


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _words(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _shorten(lines: Sequence[tuple[str, ...]]) -> tuple[tuple[str, ...], ...]:
    if len(lines) <= _MOST_LINES:
        return tuple(lines)
    rest = len(lines) - _MOST_LINES + 1
    more = (f"... {rest} more", *("" for _ in lines[0][1:]))
    return (*lines[: _MOST_LINES - 1], more)
