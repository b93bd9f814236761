"""Do random jobs give the right result, whatever happens to their workers and to the command?

    PYTHONPATH=. python workflows/chaos.py                  # a hundred seeds: about an hour
    PYTHONPATH=. python workflows/chaos.py --seeds 5
    PYTHONPATH=. python workflows/chaos.py --seed 17        # one of them again

Each seed draws a job (kind of experts, sizes, ranks, placement, dtype, format, chunks, what
travels; one in ten has experts that do not fit into the workers' memory) and a fault. `dask-ep run`
computes the job on three worker processes; once the drawn number of blocks is done, the fault
happens: a worker is killed, stopped or retired, or joins; the disk is full; the command or the
scheduler is killed. Then the run is resumed until it is done. The output must equal, bit for bit,
that of an undisturbed run (on threads, unless experts travel), and must agree with `reference.py`,
as checked by `dask-ep verify`. Prints a table in Markdown; exit code 1 if any seed fails.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import ml_dtypes
import numpy as np
from distributed import Client

from dask_ep import open_tokens
from dask_ep.jobs.backends import Cluster as AtScheduler
from dask_ep.jobs.backends import Threads
from dask_ep.jobs.job import Job, load_job
from dask_ep.jobs.run import run_job
from dask_ep.jobs.verify import verify_job
from dask_ep.laws.travel import ALL_ROWS, Travel
from dask_ep.storage import journal
from dask_ep.storage.writers import Writer, make_writer
from tests.cluster_processes import Cluster, wait_until, worker_pids

WORKERS = ("w0", "w1", "w2")
RUN_SECONDS = 180.0
"""Timeout of a run, many times its usual duration; a run that takes longer counts as hung."""

RESUMES = 5
"""How often a run may be resumed before its seed counts as failed."""

CONFIG = {
    "distributed.scheduler.worker-ttl": "2s",  # Dask waits for ten heartbeats, 5 s, at least
    "distributed.scheduler.allowed-failures": 20,
    **{
        f"distributed.worker.memory.{what}": False
        for what in ("target", "spill", "pause", "terminate")
    },
}

MEMORY_LIMIT = "620MB"
"""Memory limit of each worker; too low for the experts of some jobs."""


@dataclass(frozen=True)
class Drawn:
    """A job, and the fault that happens to it."""

    seed: int
    kind: str
    dtype: str
    format: str
    experts: int
    k: int
    d: int
    hidden: int
    chunk_rows: int
    chunks: int
    ranks: int
    placement: str
    travel: str
    fault: str
    after: int
    #: blocks done when the fault happens
    delay: float
    #: seconds to wait after that
    victim: str
    out_of_core: bool = False
    #: whether the experts exceed the workers' memory

    @property
    def rows(self) -> int:
        return self.chunk_rows * self.chunks - self.chunk_rows // 3

    def __str__(self) -> str:
        return (
            f"{self.kind} {self.k} of {self.experts}, d {self.d}, {self.dtype} {self.format}, "
            f"{self.chunks} chunks of {self.chunk_rows}, R {self.ranks}, {self.placement}, "
            f"travel {self.travel}{', out of core' if self.out_of_core else ''}"
        )


def draw(seed: int) -> Drawn:
    """Draw a job and a fault; the same seed gives the same ones."""
    rng = random.Random(seed)
    dtype = rng.choice(("float32", "float32", "float16", "bfloat16"))
    formats = ("safetensors",) if dtype == "bfloat16" else ("npy", "zarr", "safetensors")
    experts, chunks, ranks = rng.randint(3, 12), rng.randint(30, 60), rng.randint(1, 8)
    drawn = Drawn(
        seed=seed,
        kind=rng.choice(("linear", "gated")),
        dtype=dtype,
        format=rng.choice(formats),
        experts=experts,
        k=rng.randint(1, min(4, experts)),
        d=rng.choice((32, 64, 128)),
        hidden=rng.choice((256, 512)),
        chunk_rows=rng.randint(100, 400),
        chunks=chunks,
        ranks=ranks,
        placement=rng.choice(("contiguous", "packed", "balanced", "exact")),
        travel="rows" if ranks == 1 else rng.choice(("rows", "rows", "auto", "experts")),
        fault=rng.choice(list(FAULTS)),
        after=rng.randint(0, chunks * 3 // 4),
        delay=rng.uniform(0, 0.2),
        victim=rng.choice(WORKERS),
    )
    if rng.random() > 0.1:
        return drawn
    large = {"kind": "gated", "dtype": "float32", "experts": 64, "d": 512, "hidden": 3072}
    small = {"k": rng.randint(1, 2), "chunk_rows": 64, "chunks": 25, "travel": "rows"}
    when = {"after": 0, "delay": rng.uniform(0, 10)}
    return replace(drawn, **large, **small, **when, format="npy", out_of_core=True)


def write_job(directory: Path, drawn: Drawn) -> Job:
    """Write a job's files."""
    rng = np.random.default_rng(drawn.seed)
    dtype = np.dtype(getattr(ml_dtypes, drawn.dtype, drawn.dtype))
    n, d, E, f = drawn.rows, drawn.d, drawn.experts, drawn.hidden
    popular = np.log(1 / np.arange(1, E + 1))
    routing = np.argsort(-(popular + rng.gumbel(size=(n, E))), axis=1)[:, : drawn.k]
    routing[rng.random(routing.shape) < 0.01] = -1
    arrays = {
        "tokens": rng.standard_normal((n, d), np.float32).astype(dtype),
        "routing": routing.astype(np.int32),
        "topk_weights": rng.random((n, drawn.k), np.float32),
    }
    shapes = {"w": (E, d, d)}
    if drawn.kind == "gated":
        shapes = {"gate": (E, d, f), "up": (E, d, f), "down": (E, f, d)}
    for name, array in arrays.items():
        writer = _writer(directory / f"{name}.{drawn.format}", n, array, drawn.chunk_rows)
        writer.write(array, 0, sync=False)
    for name, shape in shapes.items():
        first = rng.standard_normal(shape[1:], np.float32) / np.float32(np.sqrt(shape[1]))
        writer = _writer(directory / f"{name}.{drawn.format}", E, first[None].astype(dtype), 1)
        for expert in range(E):
            rolled = np.roll(first, (expert, 5 * expert), axis=(0, 1)).astype(dtype)
            writer.write(rolled[None], expert, sync=False)
    path = {name: str(directory / f"{name}.{drawn.format}") for name in [*arrays, *shapes]}
    return load_job(
        **{name: path[name] for name in ("tokens", "routing", "topk_weights")},
        experts={"kind": drawn.kind, "transposed": False} | {name: path[name] for name in shapes},
        out=str(directory / f"out.{drawn.format}"),
        world_size=drawn.ranks,
        placement=drawn.placement,
    )


def _writer(path: Path, n: int, like: np.ndarray, rows: int) -> Writer:
    """Create a file for `n` rows like these, in blocks of the given size."""
    blocks = [min(rows, n - start) for start in range(0, n, rows)]
    writer = make_writer(str(path), (n, *like.shape[1:]), like.dtype, blocks)
    writer.create()
    return writer


# --- faults ------------------------------------------------------------------------------------


@dataclass
class Scene:
    """The processes that a fault may hit."""

    cluster: Cluster
    client: Client
    command: subprocess.Popen
    victim: str


def kill(scene: Scene) -> None:
    scene.cluster.signal(scene.client, scene.victim, signal.SIGKILL)


def kill_two(scene: Scene) -> None:
    for name in (scene.victim, WORKERS[WORKERS.index(scene.victim) - 1]):
        scene.cluster.signal(scene.client, name, signal.SIGKILL)


def kill_all(scene: Scene) -> None:
    for name in WORKERS:
        scene.cluster.signal(scene.client, name, signal.SIGKILL)
    for name in WORKERS:
        scene.cluster.stop_worker(name)
        scene.cluster.start_worker(name)


def end(scene: Scene) -> None:
    scene.cluster.signal(scene.client, scene.victim, signal.SIGTERM)


def stop(scene: Scene) -> None:
    scene.cluster.signal(scene.client, scene.victim, signal.SIGSTOP)


def stop_for_a_while(scene: Scene) -> None:
    pid = worker_pids(scene.client)[scene.victim]
    os.kill(pid, signal.SIGSTOP)
    time.sleep(2)
    scene.cluster.continue_process(pid)


def retire(scene: Scene) -> None:
    scene.client.retire_workers(names=[scene.victim])


def join(scene: Scene) -> None:
    scene.cluster.start_worker("added")


def fill_disk(scene: Scene) -> None:
    """Make every write of the workers fail from now on."""
    for pid in worker_pids(scene.client).values():
        _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, hard))


def kill_command(scene: Scene) -> None:
    scene.command.kill()


def interrupt_command(scene: Scene) -> None:
    scene.command.send_signal(signal.SIGINT)


def kill_scheduler(scene: Scene) -> None:
    scene.cluster.processes["scheduler"].kill()


def nothing(scene: Scene) -> None:
    pass


FAULTS: dict[str, Callable[[Scene], None]] = {
    "nothing": nothing,
    "worker killed": kill,
    "two workers killed": kill_two,
    "all workers killed": kill_all,
    "worker ended": end,
    "worker stopped for good": stop,
    "worker stopped for 2 s": stop_for_a_while,
    "worker retired": retire,
    "worker joins": join,
    "disk full": fill_disk,
    "command killed": kill_command,
    "command interrupted": interrupt_command,
    "scheduler killed": kill_scheduler,
}


# --- one seed ----------------------------------------------------------------------------------


class Ground:
    """A cluster for many seeds, repaired or restarted after each."""

    def __init__(self, directory: Path):
        self._directory, self._number = directory, 0
        self.cluster: Cluster | None = None
        self.client: Client | None = None

    def ready(self) -> None:
        """Make sure that three healthy workers are running."""
        if self.client is not None:
            try:
                self._mend()
            except (OSError, TimeoutError):
                self.close()
        if self.client is None:
            self._number += 1
            place = self._directory / f"cluster{self._number}"
            place.mkdir()
            limit = ("--memory-limit", MEMORY_LIMIT)
            self.cluster = Cluster(place, WORKERS, config=CONFIG, worker_options=limit)
            self.cluster.__enter__()
            self.client = self.cluster.client()

    def file(self) -> str:
        """The file with the scheduler's address."""
        return str(self.cluster.scheduler_file)

    def close(self) -> None:
        if self.client is not None:
            self.client.close(timeout=5)
            self.cluster.__exit__()
            self.cluster = self.client = None

    def _mend(self) -> None:
        if self.cluster.processes["scheduler"].poll() is not None or not self.is_clean():
            raise OSError("the scheduler has ended, or still has tasks")
        for name in list(self.cluster.processes):
            if name != "scheduler":
                self.cluster.stop_worker(name)
        wait_until(lambda: not worker_pids(self.client), "the previous workers have left", 20)
        for name in WORKERS:
            self.cluster.start_worker(name)
        wait_until(lambda: len(worker_pids(self.client)) == len(WORKERS), "workers have joined")

    def is_clean(self) -> bool:
        """Whether the scheduler has no tasks left."""
        try:
            wait_until(lambda: self.client.run_on_scheduler(_tasks) == 0, "no tasks are left", 20)
        except (OSError, TimeoutError):
            return False
        return True


def _tasks(dask_scheduler: object) -> int:
    return len(dask_scheduler.tasks)


@dataclass(frozen=True)
class Outcome:
    """The result of a seed."""

    drawn: Drawn
    problem: str
    #: what went wrong; empty if nothing did
    runs: int
    done_before: int
    #: blocks done when the fault happened
    seconds: float


def try_seed(drawn: Drawn, ground: Ground, directory: Path) -> Outcome:
    """Run a job, disturb it, resume it until it is done, and compare."""
    job = write_job(directory, drawn)
    undisturbed = replace(job, out=str(directory / f"undisturbed.{drawn.format}"))
    ground.ready()
    # Threads share memory, so nothing travels between them; and this run has no memory limit.
    on_threads = drawn.travel == "rows" and not drawn.out_of_core
    where = Threads(2) if on_threads else AtScheduler(scheduler_file=ground.file())
    travel = ALL_ROWS if drawn.travel == "rows" else Travel(drawn.travel)
    run_job(undisturbed, where, chunk_rows=drawn.chunk_rows, travel=travel)
    begun, runs, done_before = time.monotonic(), 1, 0
    command = start(job, drawn, ground, directory, resume=False)
    try:
        done_before = wait_for_blocks(job.out, drawn.after, command)
        time.sleep(drawn.delay)
        FAULTS[drawn.fault](Scene(ground.cluster, ground.client, command, drawn.victim))
        code = command.wait(RUN_SECONDS)
        while code != 0:
            if runs > RESUMES:
                return Outcome(drawn, _last_line(directory), runs, done_before, 0)
            ground.ready()
            runs += 1
            code = start(job, drawn, ground, directory, resume=True).wait(RUN_SECONDS)
    except subprocess.TimeoutExpired:
        return Outcome(drawn, f"hangs: {_last_line(directory)}", runs, done_before, 0)
    finally:
        command.kill()
        command.wait()
    seconds = time.monotonic() - begun
    return Outcome(drawn, compare(job, undisturbed), runs, done_before, seconds)


def start(
    job: Job, drawn: Drawn, ground: Ground, directory: Path, *, resume: bool
) -> subprocess.Popen:
    """Start `dask-ep run` on the job."""
    keys = ("tokens", "routing", "topk_weights", "out", "placement", "world_size")
    options = [f"--{key.replace('_', '-')}={getattr(job, key)}" for key in keys]
    experts = ", ".join(
        f"{key} = {str(value).lower() if isinstance(value, bool) else repr(value)}"
        for key, value in job.experts.items()
    )
    options += [f"--experts={{{experts}}}", f"--scheduler-file={ground.file()}"]
    options.append(f"--chunk-rows={drawn.chunk_rows}")
    if drawn.travel != "rows":
        options.append(f"--travel={drawn.travel}")
    if resume and (Path(f"{job.out}.progress").is_dir() or Path(job.out).exists()):
        options.append("--resume")
    with open(directory / "log", "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "dask_ep", "run", *options], stdout=log, stderr=log
        )


def wait_for_blocks(out: str, count: int, command: subprocess.Popen) -> int:
    """Wait until this many blocks are done, or the command has ended; return their number."""
    deadline = time.monotonic() + RUN_SECONDS
    while command.poll() is None and time.monotonic() < deadline:
        done = blocks_done(out)
        if done is not None and done >= count:
            return done
        time.sleep(0.01)
    return blocks_done(out) or 0


def blocks_done(out: str) -> int | None:
    """Return how many blocks of an output are done; None if it is complete or not yet started."""
    progress = f"{out}.progress"
    try:
        record = journal.read_manifest(progress) if Path(progress).is_dir() else None
        return None if record is None else len(journal.read_done(progress, record["run"]))
    except (FileNotFoundError, KeyError):
        return None


def compare(job: Job, undisturbed: Job) -> str:
    """Describe what is wrong with an output; empty if nothing is."""
    got, expected = (open_tokens(j.out).compute(scheduler="sync") for j in (job, undisturbed))
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return f"{got.dtype} {got.shape} instead of {expected.dtype} {expected.shape}"
    if differing := int((got.view("u1") != expected.view("u1")).any(axis=1).sum()):
        return f"{differing} of {len(got)} rows differ from the undisturbed run"
    verified = verify_job(job, rows=100)
    if not verified.good:
        return f"differs from the reference by {verified.relative_error:.2g} of its terms"
    return ""


def _last_line(directory: Path) -> str:
    lines = (directory / "log").read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "no message"


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--seeds", type=int, default=100, help="number of seeds, from --first")
    options.add_argument("--first", type=int, default=0, help="first seed")
    options.add_argument("--seed", type=int, help="only this seed")
    options.add_argument("--keep", type=Path, help="keep all files in this directory")
    args = options.parse_args()
    seeds = range(args.first, args.first + args.seeds) if args.seed is None else [args.seed]
    print("| seed | job | fault | blocks before | runs | seconds | result |")
    print("|--:|---|---|--:|--:|--:|---|")
    wrong = 0
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit(1))  # exit through `finally`: end the cluster
    with tempfile.TemporaryDirectory() as scratch:
        place = args.keep or Path(scratch)
        place.mkdir(parents=True, exist_ok=True)
        ground = Ground(place)
        try:
            for seed in seeds:
                directory = place / f"seed{seed}"
                directory.mkdir()
                outcome = try_seed(draw(seed), ground, directory)
                wrong += bool(outcome.problem)
                print_line(outcome)
        finally:
            ground.close()
    print(f"\n{len(seeds) - wrong} of {len(seeds)} seeds are right")
    return 1 if wrong else 0


def print_line(outcome: Outcome) -> None:
    """Print a line of the table."""
    drawn = outcome.drawn
    cells = (
        *(drawn.seed, drawn, drawn.fault, f"{outcome.done_before} of {drawn.chunks}"),
        *(outcome.runs, f"{outcome.seconds:.1f}", outcome.problem or "same bits"),
    )
    print("|", " | ".join(map(str, cells)), "|", flush=True)


if __name__ == "__main__":
    sys.exit(main())
