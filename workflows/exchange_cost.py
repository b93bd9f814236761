"""What does the exchange cost, by ranks, workers and bytes?

    python workflows/exchange_cost.py                        # all four parts: a quarter of an hour
    python workflows/exchange_cost.py scheduler bytes        # some of them
    python workflows/exchange_cost.py --scale 0.1            # with fewer rows and chunks

scheduler   CPU time of the scheduler per chunk, from Zarr to Zarr, for several numbers of ranks;
            chunks are small, so that little but their tasks takes time. The cost of one more chunk
            is computed from runs with two numbers of chunks, without what an idle scheduler takes
            (ticks and heartbeats), and compared with that of a `da.map_blocks` that does nothing,
            between the same files. Medians of three rounds, and their ranges.
ranks       one job on two worker processes, for several numbers of ranks: 100 000 rows of 512, top
            8 of 128 small gated experts, chunks of 1 024 rows; time over that of two ranks.
workers     experts that take time but no core (20 ms per packet), one rank on each of 32 workers
            with one thread, 4 000 chunks, whose outputs stay on their workers: the time of one
            rank's packets divided by the time taken, and the workers' CPU time per packet.
            `--quiet` turns Dask's profiler off and lets it tick only once a second: with many
            workers on few cores, these take half of the cores' time.
bytes       bytes that services received and sent, divided by the expected ones: each row once to
            each other worker that serves it, one row back from each rank; top 1, 2 and 8, one and
            three ranks per worker.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import dask.array as da
import numpy as np
import zarr
from distributed import Client, SubprocessCluster, wait

from dask_ep import Experts, expert_parallel, open_tokens, own_experts, store
from dask_ep.arrays.blas import limit_blas_for_good
from dask_ep.graph import tally


@contextmanager
def cluster(workers: int) -> Iterator[Client]:
    """Start a scheduler and single-thread workers, each in its own process."""
    with (
        SubprocessCluster(
            n_workers=workers,
            threads_per_worker=1,
            host="127.0.0.1",
            worker_kwargs={"memory_limit": 0},
            scheduler_kwargs={"dashboard": False},
        ) as started,
        Client(started) as client,
    ):
        client.wait_for_workers(workers)
        client.run(limit_blas_for_good)
        yield client


def write(folder: Path, rows: int, d: int, chunk_rows: int, E: int, k: int) -> dict[str, da.Array]:
    """Write token rows, and a routing to k different experts each, as Zarr."""
    rng = np.random.default_rng(0)
    arrays = {
        "tokens": rng.standard_normal((rows, d), dtype=np.float32),
        "routing": np.argsort(rng.random((rows, E), dtype=np.float32), axis=1)[:, :k].astype("i4"),
        "weights": rng.random((rows, k), dtype=np.float32),
    }
    for name, array in arrays.items():
        path = str(folder / f"{name}.zarr")
        stored = zarr.create_array(
            path, shape=array.shape, chunks=(chunk_rows, array.shape[1]), dtype=array.dtype,
            compressors=None, overwrite=True,
        )  # fmt: skip
        stored[:] = array
    return {name: open_tokens(folder / f"{name}.zarr", chunks=chunk_rows) for name in arrays}


def scheduler_seconds(dask_scheduler: object) -> float:
    return time.process_time()


IDLE_SECONDS = 3.0


def spent_by(client: Client, act: Callable[[], object]) -> float:
    """Return the scheduler's CPU seconds while a function runs."""
    before = client.run_on_scheduler(scheduler_seconds)
    act()
    return client.run_on_scheduler(scheduler_seconds) - before


def identity(rows: np.ndarray) -> np.ndarray:
    return rows


def of_scheduler(folder: Path, scale: float) -> None:
    few, many = max(int(500 * scale), 20), max(int(2500 * scale), 60)
    print(f"\nscheduler: {few} and {many} chunks of 64 rows, two workers")
    print("\n| R | scheduler, ms per further chunk | in three rounds |\n|---|---|---|")
    rounds: dict[int | str, list[float]] = {name: [] for name in ("map_blocks", 2, 16, 64, 256)}
    for _ in range(3):
        for name, taken in rounds.items():
            ranks = None if name == "map_blocks" else int(name)
            taken.append(of_further_chunk(folder, ranks, few, many))
            print(f"{name}: {taken[-1]:.2f} ms", file=sys.stderr, flush=True)
    for name, (least, median, most) in zip(rounds, map(sorted, rounds.values()), strict=True):
        print(f"| {name} | {median:.2f} | {least:.2f} to {most:.2f} |", flush=True)


def of_further_chunk(folder: Path, ranks: int | None, few: int, many: int) -> float:
    """Return the scheduler's CPU time per chunk in ms; without ranks, that of `da.map_blocks`."""
    experts = Experts.linear(np.ones((256, 8, 8), np.float32))
    spent = {}
    for chunks in (few, many):
        x, routing, weights = write(folder, 64 * chunks, 8, 64, 256, 2).values()
        with cluster(2) as client, own_experts(client, ranks or 1):
            if ranks is None:
                y = da.map_blocks(identity, x, dtype=x.dtype)
            else:
                y = expert_parallel(x, routing, experts, topk_weights=weights, world_size=ranks)
            idle = spent_by(client, partial(time.sleep, IDLE_SECONDS)) / IDLE_SECONDS
            begun = time.perf_counter()
            run = partial(store, y, folder / "y.zarr", overwrite=True)
            spent[chunks] = spent_by(client, run) - idle * (time.perf_counter() - begun)
    return 1e3 * (spent[many] - spent[few]) / (many - few)


def of_ranks(folder: Path, scale: float) -> None:
    rows, d, E, f = int(100_000 * scale), 512, 128, 64
    inputs, rng = write(folder, rows, d, 1024, E, 8), np.random.default_rng(1)
    for name, shape in (("gate", (E, d, f)), ("up", (E, d, f)), ("down", (E, f, d))):
        np.save(folder / f"{name}.npy", 0.05 * rng.standard_normal(shape, dtype=np.float32))
    experts = Experts.gated(*(folder / f"{name}.npy" for name in ("gate", "up", "down")))
    print(f"\nranks: {rows} rows, two workers, the better of two runs")
    print("\n| R | seconds | over R = 2 |\n|---|---|---|")
    taken: dict[int, float] = {}
    with cluster(2) as client:
        for ranks in (2, 16, 64, 2, 16, 64):
            with own_experts(client, ranks):
                y = expert_parallel(
                    inputs["tokens"], inputs["routing"], experts, topk_weights=inputs["weights"],
                    world_size=ranks,
                )  # fmt: skip
                begun = time.perf_counter()
                store(y, folder / "y.zarr", overwrite=True)
                seconds = time.perf_counter() - begun
            taken[ranks] = min(seconds, taken.get(ranks, seconds))
    for ranks, seconds in taken.items():
        print(f"| {ranks} | {seconds:.2f} | {seconds / taken[2]:.2f} |", flush=True)


def slow(rows: np.ndarray) -> np.ndarray:
    """An expert that takes 20 ms but no core."""
    if len(rows):
        time.sleep(0.02)
    return rows


def of_workers(folder: Path, scale: float, workers: int) -> None:
    chunks = max(int(4000 * scale), 4 * workers)
    rows = np.arange(workers)
    tokens = da.ones((workers * chunks, 8), chunks=(workers, 8), dtype=np.float32)
    routing = da.from_array(np.tile(rows, chunks), chunks=workers)
    with cluster(workers) as client, own_experts(client, workers):
        y = expert_parallel(
            tokens, routing, Experts.callables([slow] * workers), world_size=workers
        )
        before, begun = sum(client.run(time.process_time).values()), time.perf_counter()
        wait(y.persist())
        seconds = time.perf_counter() - begun
        spent = sum(client.run(time.process_time).values()) - before
    print(
        f"\nworkers: {workers} with one thread, {chunks} chunks, each with a packet for every "
        f"worker: {seconds:.1f} s, {0.02 * chunks / seconds:.2f} of the ideal speed "
        f"({0.02 * chunks:.1f} s), {1e3 * spent / chunks / workers:.2f} ms of the workers' CPU "
        "time per packet",
        flush=True,
    )


def of_bytes(folder: Path, scale: float) -> None:
    rows, d, E, workers = max(int(20_000 * scale), 2000), 512, 12, 4
    print("\nbytes: four workers\n\n| k | ranks a worker | received / law | sent / law |")
    print("|---|---|---|---|")
    np.save(folder / "w.npy", np.ones((E, d, d), np.float32))
    experts = Experts.linear(folder / "w.npy")
    with cluster(workers) as client:
        for k in (1, 2, 8):
            inputs = write(folder, rows, d, 1000, E, k)
            routing = inputs["routing"].compute()
            for each in (1, 3):
                ranks = workers * each
                with own_experts(client, ranks) as owners:
                    y = expert_parallel(
                        inputs["tokens"], inputs["routing"],
                        experts,
                        topk_weights=inputs["weights"], world_size=ranks,
                    )  # fmt: skip
                    client.run(tally.record)
                    y.sum().compute()
                    served = [s for taken in client.run(tally.take).values() for s in taken]
                    owner = [of_rank[0] for of_rank in owners.owners]
                home = {s.chunk: s.asked_by for s in served}
                received = sum(s.bytes_in for s in served)
                sent = sum(s.bytes_out for s in served)
                law_in = law_out = 0
                for chunk, at in home.items():
                    there = routing[1000 * chunk : 1000 * (chunk + 1)] // (E // ranks)
                    names = np.array(owner)[there]
                    for worker in set(owner) - {at}:
                        law_in += (names == worker).any(axis=1).sum() * d * 4
                    for rank in range(ranks):
                        if owner[rank] != at:
                            law_out += (there == rank).any(axis=1).sum() * d * 4
                shares = f"{received / law_in:.3f} | {sent / law_out:.3f}"
                print(f"| {k} | {each} | {shares} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = ("scheduler", "ranks", "workers", "bytes")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"any of {', '.join(parts)}")
    parser.add_argument("--scale", type=float, default=1.0, help="factor for rows and chunks")
    parser.add_argument("--quiet", action="store_true", help="no profiler, one tick per second")
    parser.add_argument("--workers", type=int, default=32, help="workers of the part `workers`")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(parts):
        parser.error(f"parts are {', '.join(parts)}, not {', '.join(sorted(unknown))}")
    wanted = arguments.parts or parts
    if arguments.quiet:  # workers read it when they start
        os.environ["DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED"] = "False"
        os.environ["DASK_DISTRIBUTED__ADMIN__TICK__INTERVAL"] = "1s"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "scheduler" in wanted:
            of_scheduler(folder, arguments.scale)
        if "ranks" in wanted:
            of_ranks(folder, arguments.scale)
        if "workers" in wanted:
            of_workers(folder, arguments.scale, arguments.workers)
        if "bytes" in wanted:
            of_bytes(folder, arguments.scale)


if __name__ == "__main__":
    main()
