"""How much time does a better balanced placement save?

    python workflows/skewed.py                  # three settings, three rounds each: four minutes
    python workflows/skewed.py --rows 2048 --rounds 1 products-2

64 experts whose popularity follows Zipf's law (1.2), the hottest ones first: contiguous placement
gives most rows to the first rank. Each placement runs in turn on the same warm worker processes,
one thread each; medians of the rounds are shown.

    time-4       four workers; an expert takes time for each row but no core, as if each worker's
                 experts computed on a device
    products-2   two workers, matrix products
    products-4   four workers, matrix products

Workers share cores: if there are more workers than cores, the busiest worker slows a run down only
if its share of the work is larger than that of a core. The possible gain is therefore computed from
the larger of the busiest rank's share h of all rows and 1 / cores: a perfect placement takes
max(1/R, 1/cores) / max(h, 1/cores) of the time. The actual gain is smaller, because no placement
balances reading, packing, adding up and Dask's own work.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import dask.array as da
import numpy as np
from dask.system import CPU_COUNT
from distributed import Client, LocalCluster
from measured import timed

from dask_ep import Experts, expert_parallel, own_experts
from dask_ep.placement.placement import Placement
from dask_ep.placement.policies import place
from dask_ep.placement.routing_stats import survey

EXPERTS, SLOTS, EXPONENT = 64, 2, 1.2
POLICIES = ("contiguous", "balanced", "exact")


@dataclass(frozen=True)
class Setting:
    """A job and the workers that it runs on, one rank each."""

    workers: int
    d: int
    hidden: int
    #: hidden width of gated experts; 0 means experts that take time but no core
    rows: int = 131_072

    @property
    def cores(self) -> int:
        """Cores that experts compute on."""
        return min(CPU_COUNT, self.workers) if self.hidden else self.workers


SETTINGS = {
    "time-4": Setting(workers=4, d=16, hidden=0, rows=32_768),
    "products-2": Setting(workers=2, d=256, hidden=1024),
    "products-4": Setting(workers=4, d=256, hidden=1024),
}

SECONDS_PER_ROW = 2e-4
"""Seconds that an expert takes per row in the setting time-4."""


class TimeTaker:
    """The identity, after a delay for each row."""

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        time.sleep(SECONDS_PER_ROW * len(rows))
        return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("settings", nargs="*", default=list(SETTINGS), help=", ".join(SETTINGS))
    parser.add_argument("--rows", type=int, help="token rows, instead of each setting's own")
    parser.add_argument("--chunks", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print("| setting | placement | largest / mean | seconds | gain | of the possible gain |")
    print("|---|---|---|---|---|---|")
    for name in options.settings:
        setting = SETTINGS[name]
        rows = setting.rows if options.rows is None else options.rows
        with tempfile.TemporaryDirectory() as folder:
            job = Job(setting, rows, options.chunks, Path(folder))
            for line in measure(job, options.rounds):
                print(f"| {name} | {line} |", flush=True)


class Job:
    """Tokens, a skewed routing and experts."""

    def __init__(self, setting: Setting, rows: int, chunks: int, folder: Path):
        self.setting = setting
        self.tokens = da.ones((rows, setting.d), chunks=(-(-rows // chunks), -1), dtype="f4")
        self.routing = skewed_routing(rows).rechunk({0: self.tokens.chunks[0]})
        self.experts = make_experts(setting, folder)
        self.load = survey(self.routing, EXPERTS).by_ticket

    def place(self, policy: str) -> Placement:
        return place(policy, self.load, self.setting.workers)

    def output(self, placement: Placement) -> da.Array:
        """Return one number per row, to keep the result small."""
        y = expert_parallel(self.tokens, self.routing, self.experts, placement=placement)
        return y.mean(axis=1)


def skewed_routing(rows: int) -> da.Array:
    """Return (rows, SLOTS) different experts for each row; the first experts are the hottest."""
    rng = np.random.default_rng(0)
    popularity = np.log(np.arange(1, EXPERTS + 1) ** -EXPONENT)
    scores = popularity + rng.gumbel(size=(rows, EXPERTS))
    chosen = np.argpartition(-scores, SLOTS - 1, axis=1)[:, :SLOTS]
    return da.from_array(chosen.astype(np.int32), chunks=(-1, -1))


def make_experts(setting: Setting, folder: Path) -> Experts:
    if not setting.hidden:
        return Experts.callables([TimeTaker()] * EXPERTS)
    rng = np.random.default_rng(1)
    paths = {}
    d, hidden = setting.d, setting.hidden
    for name, shape in {"gate": (d, hidden), "up": (d, hidden), "down": (hidden, d)}.items():
        paths[name] = str(folder / f"{name}.npy")
        np.save(paths[name], rng.standard_normal((EXPERTS, *shape), "f4") / shape[0] ** 0.5)
    return Experts.gated(**paths)


def measure(job: Job, rounds: int) -> list[str]:
    """Run all placements in turn on one cluster; return a line for each."""
    workers, cores = job.setting.workers, job.setting.cores
    placements = {policy: job.place(policy) for policy in POLICIES}
    load = job.load.sum(axis=1)
    seconds: dict[str, list[float]] = {policy: [] for policy in POLICIES}
    with (
        LocalCluster(
            n_workers=workers, threads_per_worker=1, host="127.0.0.1", dashboard_address=":0"
        ) as cluster,
        Client(cluster) as client,
        own_experts(client, workers),
    ):
        results = {p: job.output(placement).compute() for p, placement in placements.items()}
        for _ in range(rounds):
            for policy, placement in placements.items():
                seconds[policy].append(timed(lambda placed=placement: job.output(placed).compute()))
    for result in results.values():
        np.testing.assert_allclose(result, results["contiguous"], rtol=1e-4, atol=1e-5)
    return lines(placements, load, seconds, cores)


def lines(
    placements: dict[str, Placement],
    load: np.ndarray,
    seconds: dict[str, list[float]],
    cores: int,
) -> list[str]:
    """Format the time of each placement, and how much of the possible gain it reached."""
    before = statistics.median(seconds["contiguous"])
    ranks = placements["contiguous"].world_size
    busiest = placements["contiguous"].rank_load(load).max() / load.sum()
    possible = 1 - max(1 / ranks, 1 / cores) / max(busiest, 1 / cores)
    rows = []
    for policy, placement in placements.items():
        took = statistics.median(seconds[policy])
        gain = 1 - took / before
        share = "" if policy == "contiguous" else f"{gain / possible:.0%} of {possible:.0%}"
        rows.append(
            f"{policy} | {placement.imbalance(load):.2f} | {took:.2f} | {gain:.0%} | {share}"
        )
    return rows


if __name__ == "__main__":
    main()
