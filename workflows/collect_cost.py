"""What do statistics of experts cost, compared with the layer's output alone?

    python workflows/collect_cost.py                    top-2 gated, d = 512, f = 1792, 8 experts
    python workflows/collect_cost.py --rows 4096 --repeat 1
    python workflows/collect_cost.py --memory           peak memory of `gram`, 64 experts, d = 2048

Each line is a ratio of CPU seconds of one thread, the median over rounds in which both sides take
turns: the layer with its statistics to the layer alone; and, for `gram`, the dense products that it
needs, made by the same BLAS, to its total time. Files are read and written only with --memory, by
`dask-ep collect`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import dask
import dask.array as da
import numpy as np
from measured import Layer, cpu_timed, peak_of_tree, write_inputs

from dask_ep import Experts, MoELayer, Router, collect
from dask_ep.arrays.blas import one_blas_thread, product

MEMORY_LIMIT = 600_000_000
"""Memory limit in bytes of a process that collects `gram`."""

LIMITS = {
    "usage, coactivation, router": (("usage", "coactivation", "router"), 1.03),
    "amax, sumsq, reap, mean_output": (("amax", "sumsq", "reap", "mean_output"), 1.25),
}
"""Statistics that are collected together, and the allowed ratio of their time to the layer's."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=16_384)
    parser.add_argument("--chunk-rows", type=int, default=8192)
    parser.add_argument("--d", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=1792)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--slots", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--gram-d", type=int, default=2048, help="Width, with --memory.")
    parser.add_argument("--memory", action="store_true", help="Peak memory of gram, and no times.")
    options = parser.parse_args()
    if options.memory:
        print_memory(Layer(options.gram_d, 64, 2, rows=options.rows, chunk_rows=1024))
        return
    layer, hidden = make_layer(options)
    with one_blas_thread():
        for name, (what, limit) in LIMITS.items():
            ratio = median(_rounds(layer, hidden, what, options.repeat))
            print(f"{name}: {ratio:.3f} times the layer alone (limit: {limit})")
        share = median(gram_share(layer, hidden, options) for _ in range(options.repeat))
        print(f"gram: {share:.3f} of its time is spent in dense products (goal: at least 0.8)")


def _rounds(
    layer: MoELayer, hidden: da.Array, what: tuple[str, ...], repeat: int
) -> Iterator[float]:
    """Yield the ratio of the time with statistics to that of the layer alone, before and after."""

    def alone() -> float:
        return cpu_timed(lambda: layer(hidden).compute(scheduler="sync"))

    before = alone()
    for _ in range(repeat):
        both = cpu_timed(lambda: together(layer, hidden, what))
        after = alone()
        yield 2 * both / (before + after)
        before = after


def make_layer(options: argparse.Namespace) -> tuple[MoELayer, da.Array]:
    rng = np.random.default_rng(0)
    E, d, f = options.experts, options.d, options.hidden
    shapes = ((E, d, f), (E, d, f), (E, f, d))
    experts = Experts.gated(
        *(rng.standard_normal(shape, dtype="f4") / np.float32(shape[1] ** 0.5) for shape in shapes)
    )
    router = Router(E, options.slots, norm_topk_prob=True)
    layer = MoELayer(router, experts, rng.standard_normal((E, d), dtype="f4"))
    rows = rng.standard_normal((options.rows, d), dtype="f4")
    return layer, da.from_array(rows, chunks=(options.chunk_rows, -1))


def together(layer: MoELayer, hidden: da.Array, what: tuple[str, ...]) -> None:
    """Compute the layer's output and some statistics in one pass."""
    dask.compute(collect(hidden, layer, what=what, with_output=True), scheduler="sync")


def gram_share(layer: MoELayer, hidden: da.Array, options: argparse.Namespace) -> float:
    """Return the ratio of the time of the products that `gram` needs to that of collecting it."""
    routed, rows = layer.tokens_per_expert(hidden).compute(scheduler="sync"), hidden.compute()
    weights = layer.experts.weights
    gate, up = (np.concatenate(weights[name].read(np.float32)) for name in ("gate", "up"))
    d = options.d

    def products() -> None:
        for e, count in enumerate(routed):
            x = np.resize(rows, (int(count), d))
            h = product(x, gate[e * d : (e + 1) * d])
            product(x, up[e * d : (e + 1) * d])
            np.matmul(x.T, x)
            np.matmul(h.T, h)

    def collected() -> None:  # expert by expert, as when written to a file
        dask.persist(collect(hidden, layer, what=["gram"]), scheduler="sync")

    return cpu_timed(products) / cpu_timed(collected)


def print_memory(layer: Layer) -> None:
    """Collect `gram` of linear experts in a process with a memory limit, and print its peak."""
    with TemporaryDirectory() as place:
        folder = Path(place)
        write_inputs(layer, folder)
        np.save(folder / "w.npy", np.zeros((layer.num_experts, layer.d, 8), "f4"))
        files = {"tokens": "tokens.zarr", "routing": "routing.zarr", "experts": "w.npy"}
        named = [f"--{key}={folder / file}" for key, file in files.items()]
        what = ["--what=gram", f"--out={folder / 'gram.safetensors'}"]
        where = ["--threads=1", f"--memory-limit={MEMORY_LIMIT}"]
        command = [sys.executable, "-m", "dask_ep", "collect", *named, *what, *where]
        process = subprocess.Popen(command)
        peak = peak_of_tree(process)
        assert process.returncode == 0
        results = (folder / "gram.safetensors").stat().st_size
    print(
        f"gram of {layer.num_experts} experts, d = {layer.d}: {results / 1e6:.0f} MB of results, "
        f"peak memory {peak / 1e6:.0f} MB (limit: {MEMORY_LIMIT / 1e6:.0f} MB)"
    )


if __name__ == "__main__":
    main()
