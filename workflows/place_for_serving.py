"""Place the experts of a serving deployment by the loads of a large corpus.

A serving engine sees the load of the last minutes; a batch job over a corpus sees all of it. This
reads the routing of each MoE layer (the expert indices that a batch run kept, of any length),
balances every layer over the deployment's ranks, and writes the file that the engine reads at its
start:

    python workflows/place_for_serving.py 3=layer3.zarr 4=layer4.zarr --experts 256 --ranks 32 \\
        --slots 288 --groups 8 --nodes 4 --model-layers 61 --engine sglang --out location.json

    python -m sglang.launch_server ... --init-expert-location location.json \\
        --ep-num-redundant-experts 32

With --previous, a file of before, no more experts move than are needed to come within --tolerance
of perfect balance.
"""

from __future__ import annotations

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from dask_ep.placement import Placement, balance_layers, contiguous
from dask_ep.placement_files import from_file, write_sglang, write_vllm_ascend
from dask_ep.rebalance import incremental, moves
from dask_ep.storage import open_tokens
from dask_ep.survey import survey


@click.command()
@click.argument("routings", nargs=-1, required=True, metavar="LAYER=PATH...")
@click.option("--experts", type=click.IntRange(1), required=True, help="Of a layer.")
@click.option("--ranks", type=click.IntRange(1), required=True, help="GPUs of the deployment.")
@click.option("--slots", type=click.IntRange(1), required=True, help="On all ranks together.")
@click.option("--groups", type=click.IntRange(1), default=1, help="Of a group-limited router.")
@click.option("--nodes", type=click.IntRange(1), default=1, help="Machines of the deployment.")
@click.option("--engine", type=click.Choice(["sglang", "vllm-ascend"]), default="sglang")
@click.option("--model-layers", type=click.IntRange(1), help="Layers of the model, for SGLang.")
@click.option("--previous", type=click.Path(exists=True), help="The engine's file of before.")
@click.option("--tolerance", type=float, default=0.05, show_default=True)
@click.option("--out", type=click.Path(dir_okay=False), required=True)
def main(
    routings: tuple[str, ...],
    experts: int,
    ranks: int,
    slots: int,
    groups: int,
    nodes: int,
    engine: str,
    model_layers: int | None,
    previous: str | None,
    tolerance: float,
    out: str,
) -> None:
    """Write where each expert goes, by the loads in LAYER=PATH: the routing of each layer."""
    layers = [int(routing.partition("=")[0]) for routing in routings]
    paths = [routing.partition("=")[2] for routing in routings]
    loads = np.stack([survey(open_tokens(path), experts).expert_rows for path in paths])
    if previous is None:
        tables = balance_layers(loads, ranks, num_slots=slots, num_groups=groups, num_nodes=nodes)
        placements = [Placement(table) for table in tables]
        before = [contiguous(experts, ranks)] * len(layers)
    else:
        numbers = layers if engine == "sglang" else range(len(layers))
        before = [from_file(previous, layer=n, world_size=ranks) for n in numbers]
        placements = [
            incremental(old, load, tolerance=tolerance)
            for old, load in zip(before, loads, strict=True)
        ]
    if engine == "sglang":
        write_sglang(out, dict(zip(layers, placements, strict=True)), num_layers=model_layers)
    else:
        write_vllm_ascend(out, placements)
    Console().print(_table(layers, loads, before, placements))


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
