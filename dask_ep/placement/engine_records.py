"""What do serving engines record of their routing, and how is it read and written?

    SGLang  dump of the expert distribution recorder, ``expert_distribution_recorder_*.pt``
              stat, stat_approx   {"logical_count": (steps, layers, E)}
              per_pass            {"records": [{"global_physical_count": (layers, P)}, ...],
                                   "last_physical_to_logical_map": (layers, P)}
              per_token           the same, and "topk_ids_of_layer": (layers, tokens, k) in each
            ``{"logical_count": ...}`` as .json, which ``--init-expert-location`` takes as well
    vLLM    routed experts (tokens, layers, k) of a request: saved as .npy, or the .json response
            of the server, with ``routed_experts`` in its choices

SGLang's axis of layers has all layers of the model; counts of dense ones are zeros. vLLM's has all
layers, with expert 0 in every slot of dense ones, or, depending on the version, only the MoE
layers. A .pt file is a ZIP of a pickle and of plain arrays: it is read without torch, and no code
in it is run.

Read from SGLang, python/sglang/srt/eplb/expert_distribution.py and expert_location.py, and from
vLLM, docs/training/routed_experts and vllm/outputs.py.
"""

from __future__ import annotations

import base64
import io
import json
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from dask_ep.placement.placement_files import read_json
from dask_ep.placement.routing_stats import survey
from dask_ep.storage.files import replacing, write_text
from dask_ep.storage.sources import open_safetensors, open_source
from dask_ep.storage.storage import open_tokens

STORAGES = {
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
}
"""NumPy dtypes of the arrays that a .pt file may hold."""


# --- counts --------------------------------------------------------------------------------------


def read_sglang_counts(path: str | PathLike) -> np.ndarray:
    """Read how often each expert was chosen, from a dump of SGLang.

    Parameters
    ----------
    path : a .pt of any mode of the recorder, or a .json with ``logical_count``

    Returns
    -------
    (steps, layers, E) int64: number of tokens by step, layer of the model, and expert

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it holds neither ``logical_count`` nor ``records``, or these are not valid.
    """
    content = _read_sglang(path)
    if "logical_count" in content:
        counts = np.asarray(content["logical_count"])
        counts = counts[None] if counts.ndim == 2 else counts
        return _checked_counts(counts, 3, f"logical_count of {path}")
    records, places = _records(content, path)
    counts = np.zeros((len(records), len(places), int(places.max()) + 1), np.int64)
    layers = np.arange(len(places))[:, None]
    for step, record in enumerate(records):
        name = f"global_physical_count of record {step} of {path}"
        physical = _checked_counts(np.asarray(record.get("global_physical_count")), 2, name)
        if physical.shape != places.shape:
            raise ValueError(
                f"{name} must be {places.shape}, as last_physical_to_logical_map, but is "
                f"{physical.shape}"
            )
        np.add.at(counts[step], (layers, places), physical)
    return counts


def write_sglang_counts(path: str | PathLike, counts: np.ndarray | Mapping[int, Any]) -> None:
    """Write counts of experts for SGLang, which places experts according to them at its start.

    Parameters
    ----------
    path : with the suffix .json, which SGLang requires
    counts : (steps, layers, E) or (layers, E), or a mapping from MoE layers of the model to the
        rows of each expert (E,); its other layers are then zeros

    Notes
    -----
    Start the server with ``--init-expert-location path`` and ``--ep-num-redundant-experts``.
    """
    if Path(path).suffix != ".json":
        raise ValueError(f"SGLang recognises this format by the ending .json; got {path}")
    if isinstance(counts, Mapping):
        rows = {layer: np.asarray(each) for layer, each in counts.items()}
        sizes = {each.shape for each in rows.values()}
        if len(sizes) != 1:
            raise ValueError(
                f"all layers must have the same number of experts, but have {sorted(sizes)}"
            )
        counts = np.zeros((max(rows) + 1, *sizes.pop()), np.int64)
        for layer, each in rows.items():
            counts[layer] = each
    counts = np.asarray(counts)
    counts = _checked_counts(counts, 3 if counts.ndim == 3 else 2, "counts")
    write_text(path, json.dumps({"logical_count": counts.tolist()}))


def _checked_counts(counts: np.ndarray, ndim: int, name: str) -> np.ndarray:
    if counts.ndim != ndim or counts.dtype.kind not in "iu" or (counts < 0).any():
        raise ValueError(
            f"{name} must be integers of at least 0 with {ndim} axes, the last two layers and "
            f"experts, but has shape {counts.shape} and dtype {counts.dtype}"
        )
    return counts.astype(np.int64)


def expert_load(path: str | PathLike, layer: int, num_experts: int) -> np.ndarray:
    """Count the rows of each expert of a layer, from any of several kinds of files.

    Parameters
    ----------
    path : SGLang's or vLLM's records, as above; statistics of `dask-ep collect` (.safetensors, with
        ``usage.rows``); or a routing (n,) or (n, k) that `open_tokens` reads
    layer : index on the axis of layers of an engine's record; other files have one layer
    num_experts : E

    Returns
    -------
    (E,) int64

    Raises
    ------
    ValueError
        If it has no such layer, or another number of experts.
    """
    ending = Path(path).suffix
    if ending == ".safetensors" and "usage.rows" in (tensors := open_safetensors(path)):
        found = tensors["usage.rows"].read(0, tensors["usage.rows"].shape[0])
    elif ending == ".pt" or (ending == ".json" and "choices" not in read_json(path)):
        counts = read_sglang_counts(path)
        _check_layer(layer, counts.shape[1], path)
        found = counts[:, layer].sum(axis=0)
    elif ending == ".json" or (ending == ".npy" and open_source(path).ndim == 3):
        found = survey(read_engine_routing(path, layer), num_experts).expert_rows
    else:
        found = survey(open_tokens(path), num_experts).expert_rows
    if found.shape != (num_experts,):
        raise ValueError(f"{path} counts {len(found)} experts of a layer, not {num_experts}")
    return found.astype(np.int64)


# --- routing -------------------------------------------------------------------------------------


def read_engine_routing(path: str | PathLike, layer: int) -> np.ndarray:
    """Read the routing of one layer from an engine's record.

    Parameters
    ----------
    path : vLLM's routed experts (.npy, memory-mapped, or .json), or SGLang's dump per token (.pt)
    layer : index on the file's axis of layers

    Returns
    -------
    (n, k) integers: the experts of each token, in the order of the file; -1 for none

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it has no routing, or none of that layer.

    Notes
    -----
    Engines keep only indices, no weights. vLLM's tokens are in the order of a sequence, SGLang's in
    that of its forward passes.
    """
    if Path(path).suffix == ".pt":
        return _routing_of_sglang(path, layer)
    routed = read_vllm_routing(path)
    _check_layer(layer, routed.shape[1], path)
    return routed[:, layer]


def read_vllm_routing(path: str | PathLike) -> np.ndarray:
    """Read vLLM's routed experts: (tokens, layers, k), a .npy as a memory map."""
    if Path(path).suffix == ".npy":
        return _checked_routing(np.load(path, mmap_mode="r"), str(path))
    parts = _routed_in(read_json(path), str(path))
    if not parts:
        raise ValueError(
            f"{path} must be a response of vLLM with routed_experts in its choices; start the "
            "server with --enable-return-routed-experts"
        )
    if len({part.shape[1:] for part in parts}) != 1:
        raise ValueError(
            f"all routed_experts of {path} must have the same layers and slots, but have shapes "
            f"{[part.shape for part in parts]}"
        )
    return np.concatenate(parts)


def write_vllm_routing(path: str | PathLike, layers: Sequence[Any]) -> None:
    """Write the routing of some layers as vLLM returns it: (tokens, layers, k) int16 in a .npy.

    Parameters
    ----------
    path : with the suffix .npy
    layers : routing (n, k) of each layer, in order: arrays, or array-likes with a shape that can be
        sliced, such as Zarr arrays

    Notes
    -----
    Only some thousand rows of a layer are in memory at a time.
    """
    shapes = {tuple(layer.shape) for layer in layers}
    if Path(path).suffix != ".npy" or len(shapes) != 1 or len(next(iter(shapes))) != 2:
        raise ValueError(
            f"routed experts are written as .npy, from layers of one shape (n, k); got {path} and "
            f"{sorted(shapes)}"
        )
    rows, slots = shapes.pop()
    with replacing(path) as new:
        out = np.lib.format.open_memmap(new, "w+", np.int16, (rows, len(layers), slots))
        for start in range(0, rows, 1 << 14):
            part = slice(start, min(start + (1 << 14), rows))
            for number, layer in enumerate(layers):
                indices = np.asarray(layer[part])
                if indices.size and not -1 <= indices.min() <= indices.max() <= np.iinfo("i2").max:
                    raise ValueError(f"layer {number} has an index that does not fit into int16")
                out[part, number] = indices
        out.flush()


def _routed_in(content: Mapping[str, Any], path: str) -> list[np.ndarray]:
    """Return the routing of a server's response: that of the prompt, then that of each choice."""
    parts, choices = [content.get("prompt_routed_experts")], content.get("choices") or []
    if not isinstance(choices, list) or not all(isinstance(one, dict) for one in choices):
        raise ValueError(f"choices of {path} must be a list of mappings, as in vLLM's responses")
    for choice in choices:
        parts += [choice.get("prompt_routed_experts"), choice.get("routed_experts")]
    return [_decoded(part, path) for part in parts if part is not None]


def _decoded(part: Any, path: str) -> np.ndarray:
    try:
        if isinstance(part, str):
            part = np.load(io.BytesIO(base64.b64decode(part, validate=True)), allow_pickle=False)
        routed = np.asarray(part)
    except (EOFError, ValueError) as error:
        raise ValueError(
            f"routed_experts of {path} must be a .npy in base64, or lists: {error}"
        ) from error
    return _checked_routing(routed, f"routed_experts of {path}")


def _checked_routing(routed: np.ndarray, name: str) -> np.ndarray:
    if routed.ndim != 3 or routed.dtype.kind not in "iu":
        raise ValueError(
            f"{name} must be integers (tokens, layers, k), but has shape {routed.shape} and dtype "
            f"{routed.dtype}"
        )
    return routed


def _routing_of_sglang(path: str | PathLike, layer: int) -> np.ndarray:
    records, places = _records(_read_sglang(path), path)
    _check_layer(layer, len(places), path)
    parts = []
    for number, record in enumerate(records):
        if "topk_ids_of_layer" not in record:
            raise ValueError(
                f"record {number} of {path} has no topk_ids_of_layer: only dumps of "
                "--expert-distribution-recorder-mode per_token have a routing"
            )
        parts.append(_checked_routing(record["topk_ids_of_layer"], f"record {number}")[layer])
    physical = np.concatenate(parts) if parts else np.empty((0, 1), np.int32)
    used = np.flatnonzero((physical >= 0).any(axis=0))
    physical = physical[:, : used[-1] + 1 if len(used) else 1]  # SGLang keeps 8, whatever k is
    return np.where(physical >= 0, places[layer][physical], -1).astype(np.int32)


def _check_layer(layer: int, layers: int, path: str | PathLike) -> None:
    if not 0 <= layer < layers:
        raise ValueError(f"layer must be one of layers 0 to {layers - 1} of {path}, not {layer}")


def _records(content: Mapping[str, Any], path: Any) -> tuple[list[Mapping], np.ndarray]:
    """Return a detailed dump's records, and the logical expert (layers, slots) of each slot."""
    records, places = content.get("records"), content.get("last_physical_to_logical_map")
    if not isinstance(records, list) or not isinstance(places, np.ndarray) or places.ndim != 2:
        raise ValueError(
            f"{path} must hold logical_count, or records and last_physical_to_logical_map, as "
            f"SGLang's expert distribution recorder dumps them; it holds {sorted(content)[:5]}"
        )
    return sorted(records, key=lambda record: record.get("forward_pass_id", 0)), places


# --- files ---------------------------------------------------------------------------------------


def _read_sglang(path: str | PathLike) -> dict[str, Any]:
    if Path(path).suffix != ".pt":
        return read_json(path)
    content = _read_pt(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a mapping, but holds a {type(content).__name__}")
    return content


def _read_pt(path: str | PathLike) -> Any:
    """Read a file of ``torch.save`` that holds only plain values and dense tensors."""
    try:
        with zipfile.ZipFile(path) as file:
            (name,) = [name for name in file.namelist() if name.endswith("/data.pkl")]
            return _Tensors(file, name.removesuffix("data.pkl")).load()
    except (zipfile.BadZipFile, ValueError, pickle.UnpicklingError, KeyError, EOFError) as error:
        raise ValueError(f"{path} must be a file that torch.save wrote: {error}") from error


class _Tensors(pickle.Unpickler):
    """Unpickles plain values, and tensors as arrays; raises for anything else."""

    def __init__(self, file: zipfile.ZipFile, folder: str):
        super().__init__(io.BytesIO(file.read(f"{folder}data.pkl")))
        self._file, self._folder = file, folder

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuilt
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in STORAGES:
            return np.dtype(STORAGES[name])
        raise pickle.UnpicklingError(f"it holds a {module}.{name}, which is not read here")

    def persistent_load(self, pid: Any) -> np.ndarray:
        _, dtype, key, _, length = pid
        data = np.frombuffer(self._file.read(f"{self._folder}data/{key}"), dtype)
        if len(data) != length:
            raise pickle.UnpicklingError(f"storage {key} has {len(data)} of {length} elements")
        return data


def _rebuilt(
    storage: np.ndarray, offset: int, shape: Sequence[int], stride: Sequence[int], *_: Any
) -> np.ndarray:
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    if 0 not in shape and not 0 <= offset <= last < len(storage):
        raise pickle.UnpicklingError(f"a tensor {tuple(shape)} lies outside of its storage")
    strides = [step * storage.itemsize for step in stride]
    return as_strided(storage[offset:], shape, strides).copy()
