"""How evenly does each placement policy spread the rows, and how long does it take to compute?

    PYTHONPATH=. python workflows/imbalance.py             # half a minute
    PYTHONPATH=. python workflows/imbalance.py --seeds 1 --layers 2

Prints the largest over the mean rows of a rank, for experts whose popularity follows Zipf's law,
each the mean over several orders of popularity. Then the time to balance all layers of a large
model at once, divided by that of plain loops of the published algorithm. Tables are in Markdown.
"""

from __future__ import annotations

import argparse

import numpy as np
from measured import timed

from dask_ep.placement.policies import balance_layers, balanced, contiguous, exact, packed
from tests.plain_placement import published_balance, zipf_load

SIZES = [(64, 8, 8), (128, 8, 16), (256, 32, 32), (256, 64, 64)]
"""Experts, ranks, spare physical experts."""

EXPONENTS = (0.3, 1.0, 1.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5, help="orders of popularity")
    parser.add_argument(
        "--layers", type=int, default=58, help="layers of 256 experts to balance at once"
    )
    options = parser.parse_args()
    print(
        "| experts, ranks, spare | Zipf | contiguous | packed | balanced | exact | its ranks hold |"
    )
    print("|---|---|---|---|---|---|---|")
    for experts, ranks, spare in SIZES:
        for exponent in EXPONENTS:
            loads = [zipf_load(experts, exponent, seed=seed) for seed in range(options.seeds)]
            print(f"| {experts}, {ranks}, {spare} | {exponent} | {line(loads, ranks, spare)} |")
    print(f"\n{speed(options.layers)}")


def line(loads: list[np.ndarray], ranks: int, spare: int) -> str:
    """Format the mean imbalance of each policy, and the physical experts per rank of `exact`."""
    experts = loads[0].size
    policies = {
        "contiguous": lambda load: contiguous(experts, ranks),
        "packed": lambda load: packed(load, ranks),
        "balanced": lambda load: balanced(load, ranks, num_physical=experts + spare),
        "exact": lambda load: exact(load, ranks),
    }
    means = (
        np.mean([place(load).imbalance(load) for load in loads]) for place in policies.values()
    )
    held = max(exact(load, ranks).physical_per_rank for load in loads)
    return " | ".join(f"{mean:.3f}" for mean in means) + f" | {held} for {experts // ranks}"


def speed(layers: int) -> str:
    """Time both ways to balance many layers over 32 ranks with 288 physical experts."""
    loads = np.stack([zipf_load(256, 1.0, seed=seed) for seed in range(layers)])
    ours = timed(lambda: balance_layers(loads, 32, num_physical=288))
    loops = timed(lambda: [published_balance(load.tolist(), 288, 1, 1, 32) for load in loads])
    return (
        f"{layers} layers of 256 experts, 288 physical ones on 32 ranks: {ours:.3f} s, "
        f"{ours / loops:.3f} of the time of plain loops"
    )


if __name__ == "__main__":
    main()
