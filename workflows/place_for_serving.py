"""Place the experts of a serving deployment by their load over a large corpus.

A serving engine sees the load of the last few minutes; a batch job over a corpus sees all of it.
This script reads the routing of each MoE layer (the expert indices saved by a batch run, of any
length), balances each layer over the deployment's ranks, and writes the file that the engine reads
at its start:

    python workflows/place_for_serving.py 3=layer3.zarr 4=layer4.zarr --experts 256 --ranks 32 \\
        --physical-experts 288 --groups 8 --nodes 4 --model-layers 61 --engine sglang \
        --out location.json

    python -m sglang.launch_server ... --init-expert-location location.json \\
        --ep-num-redundant-experts 32

A path may also be statistics of `dask-ep collect` (stats_003.safetensors), or an engine's record of
all its layers: SGLang's expert distribution (.pt) or vLLM's routed experts (.npy).

For SGLang, LAYER is the index of the layer in the model; for vLLM Ascend, whose file has only MoE
layers, it counts these from 0.

With --previous, an earlier file, layers that are not given stay unchanged. In the others only as
many experts move as it takes to come within --tolerance of perfect balance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from dask_ep.placement.engine_records import expert_load
from dask_ep.placement.placement import Placement
from dask_ep.placement.placement_files import (
    read_sglang,
    read_vllm_ascend,
    write_sglang,
    write_vllm_ascend,
)
from dask_ep.placement.policies import balance_layers, contiguous
from dask_ep.placement.rebalance import incremental, moves
from dask_ep.storage.bundle import read_metadata


@click.command()
@click.argument("routings", nargs=-1, required=True, metavar="LAYER=PATH...")
@click.option("--experts", type=click.IntRange(1), required=True, help="Experts per layer.")
@click.option("--ranks", type=click.IntRange(1), required=True, help="GPUs of the deployment.")
@click.option("--physical-experts", type=click.IntRange(1), help="Total over all ranks.")
@click.option(
    "--groups", type=click.IntRange(1), default=1, help="Expert groups of a group-limited router."
)
@click.option("--nodes", type=click.IntRange(1), default=1, help="Machines of the deployment.")
@click.option("--engine", type=click.Choice(["sglang", "vllm-ascend"]), default="sglang")
@click.option("--model-layers", type=click.IntRange(1), help="Layers of the model, for SGLang.")
@click.option(
    "--previous", type=click.Path(exists=True, dir_okay=False), help="The engine's previous file."
)
@click.option("--tolerance", type=click.FloatRange(0), default=0.05, show_default=True)
@click.option("--out", type=click.Path(dir_okay=False), required=True)
def main(
    routings: tuple[str, ...],
    experts: int,
    ranks: int,
    physical_experts: int | None,
    groups: int,
    nodes: int,
    engine: str,
    model_layers: int | None,
    previous: str | None,
    tolerance: float,
    out: str,
) -> None:
    """Write the placement of all experts, balanced by the routing of each layer in LAYER=PATH."""
    paths = paths_of_layers(routings)
    if engine == "vllm-ascend" and model_layers is not None:
        raise click.UsageError("--model-layers is for SGLang: vLLM Ascend counts only MoE layers")
    try:
        before = {}
        if previous is not None:
            before = previous_layers(previous, engine, ranks, experts, physical_experts)
            if (groups, nodes) != (1, 1):
                raise click.UsageError(
                    "--groups and --nodes place all experts anew: give either these or --previous"
                )
        elif physical_experts is None:
            raise click.UsageError("give --physical-experts or --previous")
        check_layers(list(paths), list(before), engine, model_layers)
        check_statistics(paths, engine)
        loads = np.stack([expert_load(path, layer, experts) for layer, path in paths.items()])
        if before:
            after = [
                incremental(before[layer], load, tolerance=tolerance)
                for layer, load in zip(paths, loads, strict=True)
            ]
        else:
            tables = balance_layers(
                loads,
                ranks,
                num_physical=physical_experts,
                num_groups=groups,
                num_nodes=nodes,
            )
            after = [Placement(table) for table in tables]
        placements = before | dict(zip(paths, after, strict=True))
        if engine == "sglang":
            write_sglang(out, placements, num_layers=model_layers)
        else:
            write_vllm_ascend(out, [placements[layer] for layer in sorted(placements)])
    except (OSError, ValueError) as error:
        raise click.UsageError(str(error)) from error
    in_order = contiguous(experts, ranks)
    old = [before.get(layer, in_order) for layer in paths]
    Console().print(_table(list(paths), loads, old, after))


def paths_of_layers(routings: Sequence[str]) -> dict[int, str]:
    """Read LAYER=PATH arguments, and return them by layer."""
    paths: dict[int, str] = {}
    for routing in routings:
        number, _, path = routing.partition("=")
        if not (number.isdecimal() and path):
            raise click.UsageError(f"routing must be LAYER=PATH (3=layer3.zarr), not {routing!r}")
        if int(number) in paths:
            raise click.UsageError(f"layer {int(number)} is given twice")
        paths[int(number)] = path
    return dict(sorted(paths.items()))


def previous_layers(
    path: str, engine: str, ranks: int, experts: int, physical: int | None
) -> dict[int, Placement]:
    """Read all layers of the engine's previous file, and check that it fits this deployment."""
    read = read_sglang(path, ranks) if engine == "sglang" else read_vllm_ascend(path)
    for layer, placement in enumerate(read):
        found = (placement.world_size, placement.num_experts, placement.physical.size)
        if found != (ranks, experts, physical or found[-1]):
            raise click.UsageError(
                f"--experts, --physical-experts (if given) and --ranks must be those of {path}, "
                f"whose layer {layer} has {found[1]} experts, {found[2]} physical ones and "
                f"{found[0]} ranks"
            )
    return dict(enumerate(read))


def check_layers(
    named: Sequence[int], before: Sequence[int], engine: str, model_layers: int | None
) -> None:
    """Raise for layers that are not in the engine's file, or are missing from it."""
    if before and model_layers not in (None, len(before)):
        raise click.UsageError(
            f"--model-layers must be {len(before)}, as in --previous, not {model_layers}"
        )
    layers = len(before) or model_layers
    if layers is not None and named[-1] >= layers:
        raise click.UsageError(f"layers must be 0 to {layers - 1}, not {named[-1]}")
    if engine == "vllm-ascend" and not before and len(named) <= named[-1]:
        missing = sorted(set(range(named[-1])) - set(named))
        raise click.UsageError(
            f"vLLM Ascend's file needs every MoE layer, counted from 0, but layer {missing[0]} is "
            "missing"
        )


def check_statistics(paths: Mapping[int, str], engine: str) -> None:
    """Raise for statistics of another layer than theirs, as far as the engine's numbers tell."""
    before = -1
    for layer, path in paths.items():
        found = layer_of_statistics(path)
        if found is None:
            continue
        if engine == "sglang" and found != layer:
            raise click.UsageError(
                f"{path} is given for layer {layer}, but has the statistics of layer {found}"
            )
        if found < layer or found <= before:
            raise click.UsageError(
                f"{path} is given for MoE layer {layer}, counted from 0, but has the statistics of "
                f"layer {found} of the model: give the layers in the order of the model"
            )
        before = found


def layer_of_statistics(path: str) -> int | None:
    """Return the layer of the model that a file of statistics names; None for other files."""
    if not path.endswith(".safetensors"):
        return None
    named = read_metadata(path).get("layer_index")
    return None if named is None else int(named)


def _table(
    layers: list[int], loads: np.ndarray, before: list[Placement], after: list[Placement]
) -> Table:
    table = Table(title="largest over mean rows of a rank")
    for name in ("layer", "rows", "before", "after", "experts to load"):
        table.add_column(name, justify="right")
    for layer, load, old, new in zip(layers, loads, before, after, strict=True):
        table.add_row(
            str(layer),
            f"{load.sum():,}",
            f"{old.imbalance(load):.3f}",
            f"{new.imbalance(load):.3f}",
            str(moves(old, new)),
        )
    return table


if __name__ == "__main__":
    main()
