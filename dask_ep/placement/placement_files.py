"""How are files of placements read and written, ours and those of serving engines?

Loads measured on a large corpus can be used to place the experts of a serving deployment. The files
that engines read at their start hold the placement of every MoE layer:

    dask_ep      {"physical": [[0, 1], [2, 0]], ...}                one layer, Placement.to_json
    SGLang       {"physical_to_logical_map": [[0, 1, 2, 0], ...]}   --init-expert-location FILE
    vLLM Ascend  {"moe_layer_count": 1, "layer_list": [             expert_map_path
                   {"layer_id": 0, "device_count": 2, "device_list": [
                     {"device_id": 0, "device_expert": [0, 1]}, ...]}]}

SGLang's list has one row for every layer of the model, including dense ones, which are ignored;
vLLM Ascend's has only the MoE layers. vLLM itself reads no such file as of 0.32. Engines choose
evenly among the replicas of an expert and have no empty physical experts: a placement of `exact`,
or one with empty physical experts, cannot be exported.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import itemgetter
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from dask_ep.placement.placement import Placement
from dask_ep.placement.policies import POLICIES, place
from dask_ep.storage.files import write_text

Asked = Placement | str | PathLike | None
"""A placement, the name of a policy, the path of a file, or None for contiguous."""


def resolve(
    asked: Asked,
    world_size: int,
    *,
    layer: int | None = None,
    moe_layers: Sequence[int] | None = None,
) -> Placement | str | None:
    """Read a placement that is given as a file; return anything else unchanged.

    Parameters
    ----------
    asked : Placement, name of a policy, path of a placement file, or None for "contiguous"
    world_size : R
    layer, moe_layers : as in `from_file`

    Raises
    ------
    ValueError
        If it is none of these, or for other ranks.
    """
    if asked is None or isinstance(asked, Placement):
        return asked
    if isinstance(asked, str) and asked in POLICIES:
        return asked
    if not isinstance(asked, str | PathLike) or not Path(asked).exists():
        raise ValueError(
            f"placement must be a Placement, one of {', '.join(POLICIES)}, or the path of a file, "
            f"but is {asked!r}"
        )
    return from_file(asked, layer=layer, moe_layers=moe_layers, world_size=world_size)


def find_placement(
    asked: Asked, num_experts: int, world_size: int, load: Callable[[], np.ndarray]
) -> Placement | None:
    """Make the placement that was asked for; None if each rank has the next E/R experts in order.

    Parameters
    ----------
    asked : as in `resolve`
    num_experts, world_size : E, R
    load : function that counts the rows of each expert, for `place`
        Called only if a policy needs it: not for "contiguous", nor for a single rank.

    Raises
    ------
    ValueError
        If it is for other experts or ranks, or `resolve` does not accept it.
    """
    found = resolve(asked, world_size)
    if not isinstance(found, Placement):
        if found is None or found == "contiguous" or world_size == 1:
            return None
        return place(found, load(), world_size)
    if (found.num_experts, found.world_size) != (num_experts, world_size):
        raise ValueError(
            f"the placement is for {found.num_experts} experts on {found.world_size} ranks, but "
            f"there are {num_experts} experts and world_size={world_size}"
        )
    return found


def from_file(
    path: str | PathLike,
    *,
    layer: int | None = None,
    world_size: int | None = None,
    moe_layers: Sequence[int] | None = None,
) -> Placement:
    """Read the placement of one layer from any of the files that this module knows.

    Parameters
    ----------
    path : path of a JSON file, or of a (ranks, physical experts) .npy file
    layer : int, optional
        Index of the layer in the model (SGLang) or among its MoE layers (vLLM Ascend); optional if
        the file has only one layer.
    moe_layers : indices of the model's MoE layers, optional
        With them, `layer` is the index in the model for both engines.
    world_size : int, optional
        Number of ranks; required for SGLang's file, which does not have it.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is none of these, the layer is not in it, or `world_size` is missing or does not
        fit.
    """
    if not Path(path).exists():
        raise FileNotFoundError(
            errno.ENOENT, f"a placement is one of {', '.join(POLICIES)}, or a file", str(path)
        )
    content = {"physical": np.load(path)} if Path(path).suffix == ".npy" else read_json(path)
    if "physical" in content:
        placement = Placement(
            content["physical"], content.get("stops"), bool(content.get("local", False))
        )
    elif "physical_to_logical_map" in content:
        if world_size is None:
            raise ValueError(
                f"{path} (SGLang) does not say how many ranks it is for: pass world_size"
            )
        placement = _one_of(_from_sglang(content, path, world_size), layer, path)
    elif "layer_list" in content:
        placements = _from_vllm_ascend(content, path)
        if layer is not None and moe_layers is not None:
            layer = _moe_layer(layer, moe_layers, len(placements), path)
        placement = _one_of(placements, layer, path)
    else:
        raise ValueError(
            f'{path} holds none of "physical" (dask_ep), "physical_to_logical_map" (SGLang) and '
            f'"layer_list" (vLLM Ascend), but {sorted(content)[:5]}'
        )
    if world_size is not None and placement.world_size != world_size:
        raise ValueError(
            f"{path} places experts on {placement.world_size} ranks, but world_size={world_size}; "
            "make a placement for that"
        )
    return placement


def read_sglang(path: str | PathLike, world_size: int) -> list[Placement]:
    """Read SGLang's initial expert location, one placement for each layer of the model."""
    return _from_sglang(read_json(path), path, world_size)


def write_sglang(
    path: str | PathLike, placements: Mapping[int, Placement], num_layers: int | None = None
) -> None:
    """Write SGLang's initial expert location.

    Parameters
    ----------
    path : path with the suffix .json, which SGLang requires
    placements : placement of each MoE layer of the model, by its index; all of one size
    num_layers : int, optional
        Number of layers of the model; those that are not in `placements` get the experts in order.
        Default: up to the largest index in `placements`.

    Raises
    ------
    ValueError
        If the placements differ in size, have empty physical experts, or share rows unevenly.

    Notes
    -----
    Start the server with ``--init-expert-location path`` and ``--ep-num-redundant-experts`` of
    physical minus logical experts. Format: SGLang, python/sglang/srt/eplb/expert_location.py.
    """
    if Path(path).suffix != ".json":
        raise ValueError(f"SGLang recognises this format by the ending .json; got {path}")
    first = _check_engine(placements.values())
    in_order = np.arange(first.physical.size) % first.num_experts
    layers = [
        placements[layer].order() if layer in placements else in_order.tolist()
        for layer in range(num_layers or max(placements) + 1)
    ]
    write_text(path, json.dumps({"physical_to_logical_map": layers}))


def read_vllm_ascend(path: str | PathLike) -> list[Placement]:
    """Read vLLM Ascend's expert map, one placement for each MoE layer."""
    return _from_vllm_ascend(read_json(path), path)


def write_vllm_ascend(path: str | PathLike, placements: Sequence[Placement]) -> None:
    """Write vLLM Ascend's expert map (`expert_map_path`) for its MoE layers, in order.

    Raises
    ------
    ValueError
        If the placements differ in size, have empty physical experts, or share rows unevenly.
    """
    _check_engine(placements)
    layers = [
        {
            "layer_id": layer,
            "device_count": placement.world_size,
            "device_list": [
                {"device_id": rank, "device_expert": experts}
                for rank, experts in enumerate(placement.physical.tolist())
            ],
        }
        for layer, placement in enumerate(placements)
    ]
    content = {"moe_layer_count": len(layers), "layer_list": layers}
    write_text(path, json.dumps(content))


def read_json(path: str | PathLike) -> dict[str, Any]:
    """Read a JSON object."""
    try:
        content = json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"{path} must hold JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, but holds a {type(content).__name__}")
    return content


def _from_sglang(content: dict, path: str | PathLike, world_size: int) -> list[Placement]:
    try:
        layers = np.array(content.get("physical_to_logical_map"))
        shape = layers.shape
    except ValueError:  # rows differ in length
        shape = None
    if shape is None or len(shape) != 2 or shape[1] % world_size or layers.dtype.kind != "i":
        raise ValueError(
            f'{path} must hold "physical_to_logical_map", integers (layers, physical '
            f"experts), with a multiple of world_size={world_size} physical experts; it holds "
            f"{'lists that differ in length' if shape is None else f'{shape} of {layers.dtype}'}"
        )
    return [Placement(layer.reshape(world_size, -1)) for layer in layers]


def _from_vllm_ascend(content: dict, path: str | PathLike) -> list[Placement]:
    try:
        tables = [
            [device["device_expert"] for device in _in_order(layer["device_list"], "device_id")]
            for layer in _in_order(content["layer_list"], "layer_id")
        ]
    except (KeyError, TypeError) as error:
        raise ValueError(
            f'{path} must hold "layer_list", with "layer_id" and "device_list" in each layer, and '
            f'"device_id" and "device_expert" in each device (vLLM Ascend): {error!r}'
        ) from error
    except ValueError as error:
        raise ValueError(f"{path} (vLLM Ascend) is not complete: {error}") from error
    return [Placement(table) for table in tables]


def _in_order(entries: Sequence[Mapping[str, Any]], key: str) -> list[Mapping[str, Any]]:
    """Sort entries by their number, which must count from 0: each is found by its place."""
    found = sorted(entries, key=itemgetter(key))
    numbers = [entry[key] for entry in found]
    if numbers != list(range(len(found))):
        raise ValueError(f'each "{key}" from 0 on must be there once, but there are {numbers}')
    return found


def _moe_layer(layer: int, moe_layers: Sequence[int], num_layers: int, path: str | PathLike) -> int:
    """Return the index of a layer of the model among its MoE layers."""
    if layer not in moe_layers:
        listed = ", ".join(map(str, moe_layers))
        raise ValueError(f"layer {layer} of the model is not MoE; its MoE layers are {listed}")
    number = list(moe_layers).index(layer)
    if number >= num_layers:
        raise ValueError(
            f"layer {layer} of the model is MoE layer {number}, counted from 0, but {path} holds "
            f"{num_layers}; name a file that was written for this model"
        )
    return number


def _one_of(placements: list[Placement], layer: int | None, path: str | PathLike) -> Placement:
    if layer is None and len(placements) == 1:
        return placements[0]
    if layer is None or not 0 <= layer < len(placements):
        raise ValueError(
            f"{path} holds {len(placements)} layers; pass one of them as layer, not {layer}"
        )
    return placements[layer]


def _check_engine(placements: Iterable[Placement]) -> Placement:
    """Raise for placements that an engine's file cannot hold; return the first one."""
    placements = list(placements)
    sizes = {(p.physical.shape, p.num_experts) for p in placements}
    if len(sizes) != 1:
        raise ValueError(
            f"an engine has the same logical and physical experts in every layer; got {len(sizes)} "
            f"different sizes in {len(placements)} layers"
        )
    for layer, placement in enumerate(placements):
        if (placement.physical < 0).any():
            raise ValueError(
                f"engines have no empty physical experts, but layer {layer} has "
                f"{int((placement.physical < 0).sum())}; give balanced a num_physical that is "
                "a multiple of the ranks"
            )
        if not placement.even:
            raise ValueError(
                f"engines spread rows evenly over replicas, but layer {layer} does not (exact); "
                "use balanced"
            )
        if placement.local:
            raise ValueError(
                f"engines spread rows evenly over replicas, but layer {layer} chooses them by the "
                "home of a token chunk; use balanced"
            )
    return placements[0]
