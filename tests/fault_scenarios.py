"""What can happen to the workers of a running job, and what does it cost? What do owners cost?

    undisturbed   ────────────────────────────> same bits
    disturbed     ─────x──── recovery ─────────────> same bits, so many seconds later
                       └ a fault of FAULTS, at a moment drawn from a seed

Every fault is done to real processes. It ends with as many workers as it began with, so that one
cluster serves many faults. Used by the tests at a few moments, and by `workflows/faults.py` at ten.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import dask.array as da
import numpy as np
from distributed import Client

from dask_ep import Experts, OwnerRules, expert_parallel, own_experts
from dask_ep.cluster.owner_plugin import METADATA
from tests.cluster_processes import DEADLINE, Cluster, wait_until, worker_pids

RANKS, WORKERS = 6, ("w0", "w1", "w2")
CHUNKS, ROWS, WIDTH, SLOTS = 24, 64, 16, 2
FATAL = "fatal"
"""Name of the file that makes an expert kill its process."""

CONFIG = {
    "distributed.scheduler.worker-ttl": "2s",  # Dask waits for ten heartbeats, 5 s, at least
    "distributed.scheduler.allowed-failures": 20,
    "distributed.nanny.pre-spawn-environ.OPENBLAS_NUM_THREADS": 1,
}
"""Of the clusters on which faults are tried."""


class SlowExpert:
    """A linear expert that takes its time, so that a fault finds it at work.

    It kills its process in the midst of that if a file is there, which it takes away.
    """

    def __init__(self, expert: int, seconds: float, fatal: Path | None = None):
        self.expert, self.seconds, self.fatal = expert, seconds, fatal

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        if len(rows):
            time.sleep(self.seconds)
            if self.fatal is not None and self.fatal.exists():
                self.fatal.unlink()
                os.kill(os.getpid(), signal.SIGKILL)
        generator = np.random.default_rng(self.expert)
        return rows @ generator.standard_normal((WIDTH, WIDTH)).astype(rows.dtype)


def job(
    seconds_per_product: float = 0.02, salt: int = 0, directory: Path | None = None
) -> da.Array:
    """Build the layer's output: 24 chunks through 6 ranks, one expert each; `salt` renames it."""
    tokens = da.random.default_rng(7).standard_normal(
        (CHUNKS * ROWS, WIDTH), chunks=(ROWS, WIDTH), dtype=np.float32
    )
    routing = np.random.default_rng(8).integers(RANKS, size=(CHUNKS * ROWS, SLOTS))
    fatal = None if directory is None else directory / FATAL
    experts = [SlowExpert(e, seconds_per_product + 1e-9 * salt, fatal) for e in range(RANKS)]
    return expert_parallel(
        tokens,
        da.from_array(routing, chunks=(ROWS, SLOTS)),
        Experts.callables(experts),
        world_size=RANKS,
    )


UNEVEN_RANKS, UNEVEN_WORKERS = 4, ("w0", "w1", "w2", "w3", "idle")
"""A worker more than ranks: it owns none."""


class ExpertPaidByRow:
    """The identity, and so many seconds for each row, once a file is gone, if one is given."""

    def __init__(self, seconds: float, gate: Path | None = None):
        self.seconds, self.gate = seconds, gate

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        while self.gate is not None and self.gate.exists():
            time.sleep(0.01)
        time.sleep(self.seconds * len(rows))
        return rows


def uneven_job(seconds_per_row: float, chunks: int = CHUNKS, gate: Path | None = None) -> da.Array:
    """Build a job whose 64 experts get rows by Zipf's law (1.2): the first of 4 ranks, most."""
    chance = 1 / np.arange(1, 65) ** 1.2
    routing = np.random.default_rng(9).choice(64, size=chunks * ROWS, p=chance / chance.sum())
    experts = [ExpertPaidByRow(seconds_per_row, gate)] * 64
    tokens = da.random.default_rng(7).standard_normal(
        (chunks * ROWS, WIDTH), chunks=(ROWS, WIDTH), dtype=np.float32
    )
    return expert_parallel(
        tokens,
        da.from_array(routing, chunks=ROWS),
        Experts.callables(experts),
        world_size=UNEVEN_RANKS,
    )


def run_uneven(
    client: Client,
    replicate_after: float | None,
    seconds_per_row: float = 4e-3,
    chunks: int = CHUNKS,
    rules: OwnerRules = OwnerRules(),  # noqa: B008 (frozen)
) -> Outcome:
    """Run the uneven job; after some seconds, if given, the hot rank gets a further owner."""
    with own_experts(client, UNEVEN_RANKS, rules=rules) as owners:
        begun = time.monotonic()
        future = client.compute(uneven_job(seconds_per_row, chunks))
        if replicate_after is not None:
            time.sleep(replicate_after)
            owners.replicate(0)
        value = future.result(timeout=DEADLINE)
        return Outcome(value, time.monotonic() - begun, owners.failures)


COST_CHUNKS, COST_RANKS = 200, 16


def scheduler_seconds_per_chunk(client: Client, salt: int) -> float:
    """Run many chunks that do next to nothing, and give the scheduler's CPU time for each."""
    rows = da.random.default_rng(salt).standard_normal((2 * COST_CHUNKS, 2), chunks=(2, 2))
    routing = np.random.default_rng(salt).integers(COST_RANKS, size=(2 * COST_CHUNKS, 2))
    y = expert_parallel(
        rows,
        da.from_array(routing, chunks=(2, 2)),
        np.ones((COST_RANKS, 2, 2)),
        world_size=COST_RANKS,
    )
    before = client.run_on_scheduler(_cpu_seconds)
    client.compute(y.sum()).result(timeout=DEADLINE)
    spent = client.run_on_scheduler(_cpu_seconds) - before
    return spent / COST_CHUNKS


def free_and_pinned(client: Client, rounds: int) -> tuple[list[float], list[float]]:
    """Give the scheduler's seconds per chunk without and with owners, taken in turns."""
    scheduler_seconds_per_chunk(client, 0)  # what the first run pays for nobody shall pay
    free, pinned = [], []
    for salt in range(1, rounds + 1):  # in turns, for other processes take their part
        free.append(scheduler_seconds_per_chunk(client, 2 * salt))
        with own_experts(client, COST_RANKS):
            pinned.append(scheduler_seconds_per_chunk(client, 2 * salt + 1))
    return free, pinned


def kill_one(cluster: Cluster, client: Client, victim: str) -> None:
    """`kill -9` the process of one owner."""
    _kill(cluster, client, [victim])


def kill_answering(cluster: Cluster, client: Client, victim: str) -> None:
    """`kill -9` an owner while it answers: its expert does it."""
    before = worker_pids(client)
    (cluster.directory / FATAL).touch()
    wait_until(lambda: set(worker_pids(client)) != set(before), "an owner died")


def kill_two(cluster: Cluster, client: Client, victim: str) -> None:
    """`kill -9` two of three owners at once."""
    other = WORKERS[WORKERS.index(victim) - 1]
    _kill(cluster, client, [victim, other])


def kill_all(cluster: Cluster, client: Client, victim: str) -> None:
    """`kill -9` every worker; their nannies start them again."""
    _kill(cluster, client, list(WORKERS))


def stop_one(cluster: Cluster, client: Client, victim: str) -> None:
    """SIGSTOP one owner until the scheduler has given it up, then SIGCONT."""
    pid = worker_pids(client)[victim]
    cluster.signal(client, victim, signal.SIGSTOP)
    wait_until(lambda: worker_pids(client).get(victim) != pid, f"{victim} is given up")
    cluster.continue_process(pid)
    _bring_back(cluster, client, [victim])


def stop_for_good(cluster: Cluster, client: Client, victim: str) -> None:
    """SIGSTOP one owner; the others end the job."""
    cluster.signal(client, victim, signal.SIGSTOP)


def move_all(cluster: Cluster, client: Client, victim: str) -> None:
    """Move all ranks to one worker, while packets wait at the others, and then to another one."""
    owners = own_experts(client)
    for name in (victim, WORKERS[WORKERS.index(victim) - 1]):
        for rank in range(RANKS):
            owners.move(rank, name)


def retire_one(cluster: Cluster, client: Client, victim: str) -> None:
    """Retire one owner in an orderly way."""
    client.retire_workers(names=[victim])
    _bring_back(cluster, client, [victim])


def add_one(cluster: Cluster, client: Client, victim: str) -> None:
    """Start a fourth worker; it stays until the job is done."""
    cluster.start_worker("added")
    wait_until(lambda: "added" in worker_pids(client), "the added worker has come")


def restart(cluster: Cluster, client: Client, victim: str) -> None:
    """`client.restart()`: the scheduler forgets the job, which is submitted again."""
    client.restart(timeout=DEADLINE)


FAULTS: dict[str, tuple[Callable[[Cluster, Client, str], None], bool]] = {
    "one owner killed": (kill_one, False),
    "one owner killed while it answers": (kill_answering, False),
    "two of three owners killed": (kill_two, False),
    "all workers killed, nannies restart them": (kill_all, True),
    "one owner stopped for 5 s, then continued": (stop_one, True),
    "one owner stopped for good": (stop_for_good, False),
    "one owner retired": (retire_one, False),
    "all ranks moved, twice": (move_all, False),
    "one worker added": (add_one, False),
    "client.restart() and submitted again": (restart, True),
}
"""By name: what is done, and whether the workers have nannies."""


@dataclass(frozen=True)
class Outcome:
    """What a disturbed run gave."""

    value: np.ndarray
    seconds: float
    failures: list[str]


def run_undisturbed(client: Client, salt: int = 0) -> Outcome:
    """Run the job while nothing happens."""
    with own_experts(client, RANKS) as owners:
        begun = time.monotonic()
        value = client.compute(job(salt=salt)).result(timeout=DEADLINE)
        return Outcome(value, time.monotonic() - begun, owners.failures)


def run_disturbed(
    cluster: Cluster, client: Client, fault: str, moment: float, victim: str, salt: int
) -> Outcome:
    """Run the job, and do `fault` to it `moment` seconds after it began."""
    disturb, _ = FAULTS[fault]
    with own_experts(client, RANKS, rules=OwnerRules(settle=0.5)) as owners:
        begun = time.monotonic()
        y = job(salt=salt, directory=cluster.directory)
        future = client.compute(y)
        time.sleep(moment)
        disturb(cluster, client, victim)
        if disturb is restart:
            future = client.compute(y)
        value = future.result(timeout=DEADLINE)
        seconds, failures = time.monotonic() - begun, owners.failures
        if client.get_metadata(list(METADATA), default=None) is None:
            failures.append("the owners are not published")
        outcome = Outcome(value, seconds, failures)
        del future
    _restore(cluster, client)
    return outcome


def moments(fault: str, count: int, length: float) -> list[tuple[float, str]]:
    """Draw moments within a run of `length` seconds, and victims, from a seed of the fault."""
    draw = random.Random(fault)
    return [(draw.uniform(0, length), draw.choice(WORKERS)) for _ in range(count)]


def _cpu_seconds(dask_scheduler: object) -> float:
    return time.process_time()


def _kill(cluster: Cluster, client: Client, names: list[str]) -> None:
    before = worker_pids(client)
    for name in names:
        cluster.signal(client, name, signal.SIGKILL)
    wait_until(
        lambda: all(worker_pids(client).get(name) != before[name] for name in names),
        f"the scheduler has noticed that {names} died",
    )
    _bring_back(cluster, client, names)


def _bring_back(cluster: Cluster, client: Client, names: list[str]) -> None:
    """Start workers again where no nanny does."""
    if not cluster.nanny:
        for name in names:
            cluster.stop_worker(name)
            cluster.start_worker(name)


def _restore(cluster: Cluster, client: Client) -> None:
    """Bring the cluster back to the workers that it began with."""
    if "added" in cluster.processes:
        cluster.stop_worker("added")
    (cluster.directory / FATAL).unlink(missing_ok=True)
    if not cluster.nanny:
        _bring_back(cluster, client, [name for name in WORKERS if not _answers(client, name)])

    def are_back() -> bool:
        for name in WORKERS:  # a nanny goes with a worker that the scheduler has told to go
            if cluster.processes[name].poll() is not None:
                cluster.stop_worker(name)
                cluster.start_worker(name)
        # Dask needs half a minute to give up a worker that is stopped while it starts.
        workers = client.scheduler_info(n_workers=-1)["workers"].values()
        is_running = {worker["name"]: worker["status"] == "running" for worker in workers}
        return is_running == dict.fromkeys(WORKERS, True)

    wait_until(are_back, "all workers are back")


def _answers(client: Client, name: str) -> bool:
    """Whether the process of a worker runs: neither ended nor stopped."""
    pid = worker_pids(client).get(name)
    if pid is None:
        return False
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in "TZ"
