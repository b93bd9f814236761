"""Convert routing records of SGLang and vLLM to files for `dask-ep`, and back.

    python workflows/engine_records.py read expert_distribution_recorder_1.pt --stats stats/
    python workflows/engine_records.py read routed_experts.npy --layer 3 --routing routing.zarr
    python workflows/engine_records.py write 3=layer3.zarr 4=layer4.zarr --out counts.json
    python workflows/engine_records.py write 0=layer3.zarr 1=layer4.zarr --out routed_experts.npy

`dask-ep plan`, `collect` and `run` take a routing; `place_for_serving.py` and `prune_experts.py
--score rows` take statistics (``usage.rows`` of each layer). SGLang reads counts.json with
--init-expert-location. `dask_ep.placement.engine_records` describes the formats.
"""

from __future__ import annotations

from pathlib import Path

import click
import dask.array as da
import numpy as np

from dask_ep.cli.command import debug_option
from dask_ep.cli.main import main
from dask_ep.placement.engine_records import (
    expert_load,
    read_engine_routing,
    read_sglang_counts,
    write_sglang_counts,
    write_vllm_routing,
)
from dask_ep.storage.safetensors_header import encode_header
from dask_ep.storage.sources import open_source
from dask_ep.storage.storage import store

ROWS = 1 << 16
"""Rows per block of a routing."""


@click.group()
def records() -> None:
    """Convert routing records of SGLang and vLLM to files for dask-ep, and back."""


@records.command()
@click.argument("record", type=click.Path(exists=True, dir_okay=False))
@click.option("--layer", type=click.IntRange(0), help="Index on the record's layer axis.")
@click.option("--routing", type=click.Path(), help="Write the layer's routing (n, k) here.")
@click.option("--stats", type=click.Path(path_type=Path), help="Write usage.rows by layer here.")
@debug_option
def read(record: str, layer: int | None, routing: str | None, stats: Path | None) -> None:
    """Read RECORD, written by SGLang (.pt, .json) or vLLM (.npy, .json)."""
    if (routing is None) == (stats is None):
        raise click.UsageError("give either --routing or --stats")
    if routing is not None:
        if layer is None:
            raise click.UsageError("--routing needs --layer")
        found = read_engine_routing(record, layer)
        store(da.from_array(found, chunks=(ROWS, -1)), routing)
        click.echo(f"{routing}: {found.shape[0]} rows, {found.shape[1]} experts each")
        return
    counts = read_sglang_counts(record).sum(axis=0)
    stats.mkdir(parents=True, exist_ok=True)
    layers = [number for number in np.flatnonzero(counts.any(axis=1)) if layer in (None, number)]
    for number in layers:
        rows = np.ascontiguousarray(counts[number])
        header = encode_header({"usage.rows": (rows.shape, rows.dtype)})
        (stats / f"stats_{number:03d}.safetensors").write_bytes(header + rows.tobytes())
    click.echo(f"{stats}: {len(layers)} layers of {counts.shape[1]} experts")


@records.command()
@click.argument("routings", nargs=-1, required=True, metavar="LAYER=PATH...")
@click.option("--experts", type=click.IntRange(1), help="Experts per layer, for counts.")
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help=".json: counts for SGLang; "
    ".npy: routed experts as vLLM's."
)  # fmt: skip
@debug_option
def write(routings: tuple[str, ...], experts: int | None, out: Path) -> None:
    """Write the routings (n, k) of some layers as an engine's record."""
    paths = {}
    for routing in routings:
        number, _, path = routing.partition("=")
        if not (number.isdecimal() and path) or int(number) in paths:
            raise click.UsageError(f"routing must be LAYER=PATH, each layer once, not {routing!r}")
        paths[int(number)] = path
    if out.suffix == ".npy":
        if sorted(paths) != list(range(len(paths))):
            raise click.UsageError(
                "a .npy file must have all layers from 0 on, but LAYER=PATH names only "
                f"{', '.join(map(str, sorted(paths)))}"
            )
        write_vllm_routing(out, [_Rows(paths[layer]) for layer in sorted(paths)])
    elif experts is None:
        raise click.UsageError("a .json file of counts needs --experts")
    else:
        loads = {layer: expert_load(path, layer, experts) for layer, path in paths.items()}
        write_sglang_counts(out, loads)
    click.echo(f"{out}: {len(paths)} layers")


class _Rows:
    """Reads ranges of rows of a routing, as arrays do."""

    def __init__(self, path: str):
        self._source = open_source(path)
        self.shape = self._source.shape

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self._source.read(rows.start, rows.stop)


if __name__ == "__main__":
    main(command=records, name="engine_records.py")
