"""What does a running job lose if its workers die, stop, retire, join or restart?

    PYTHONPATH=. python workflows/faults.py    # every fault at ten moments: 15 minutes
    PYTHONPATH=. python workflows/faults.py --moments 2 --fault killed
    PYTHONPATH=. python workflows/faults.py --fault replica      # time with and without a replica
    PYTHONPATH=. python workflows/faults.py --fault scheduler    # what owners cost the scheduler

Starts real scheduler and worker processes on this machine. Prints a table in Markdown; exit code 1
if any result differs in a bit from that of the undisturbed run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np

from dask_ep import OwnerRules
from tests.cluster_processes import Cluster
from tests.fault_scenarios import (
    CONFIG,
    FAULTS,
    UNEVEN_WORKERS,
    WORKERS,
    free_and_pinned,
    moments,
    run_disturbed,
    run_undisturbed,
    run_uneven,
)

UNEVEN_CHUNKS = 200
"""Chunks of the uneven job, which must take longer than detecting the hot rank."""


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--moments", type=int, default=10, help="moments for each fault")
    options.add_argument("--fault", nargs="*", help="only faults with one of these in their name")
    args = options.parse_args()

    def is_selected(name: str) -> bool:
        return not args.fault or any(word in name for word in args.fault)

    faults = list(filter(is_selected, FAULTS))
    wrong = 0
    if faults:
        print("| what happened | moments | same bits | seconds lost: least | median | most |")
        print("|---|---|---|---|---|---|")
    for nanny in (False, True):
        of_these = [fault for fault in faults if FAULTS[fault][1] == nanny]
        if of_these:
            wrong += measure(of_these, args.moments, nanny)
    if is_selected("replica"):
        wrong += measure_replica()
    if is_selected("scheduler"):
        measure_scheduler(rounds=min(args.moments, 5))
    return 1 if wrong else 0


def measure(faults: list[str], count: int, nanny: bool) -> int:
    """Cause faults on one cluster, print a line for each, and count wrong results."""
    wrong = 0
    with (
        tempfile.TemporaryDirectory() as directory,
        Cluster(Path(directory), WORKERS, nanny=nanny, config=CONFIG) as cluster,
        cluster.client() as client,
    ):
        undisturbed = [run_undisturbed(client, -salt) for salt in range(1, min(count, 3) + 1)]
        expected = undisturbed[0].value
        length = statistics.median(run.seconds for run in undisturbed)
        for number, fault in enumerate(faults):
            lost, right = [], 0
            for moment, victim in moments(fault, count, length):
                salt = number * count + len(lost)
                outcome = run_disturbed(cluster, client, fault, moment, victim, salt)
                lost.append(outcome.seconds - length)
                right += np.array_equal(outcome.value, expected) and not outcome.failures
            figures = (min(lost), statistics.median(lost), max(lost))
            spelled = " | ".join(f"{seconds:.1f}" for seconds in figures)
            print(f"| {fault} | {count} | {right} of {count} | {spelled} |", flush=True)
            wrong += count - right
    return wrong


def measure_replica() -> int:
    """Time an uneven job without a replica of its hot rank, with a requested one, and with an
    automatic one."""
    ways = {
        "none": (None, False),
        "requested at the start": (0.0, False),
        "automatic": (None, True),
    }
    print("\nZipf 1.2 over 64 experts on 4 ranks, five workers")
    print("\n| replica of the hot rank | seconds |\n|---|---|")
    values = []
    with (
        tempfile.TemporaryDirectory() as directory,
        Cluster(Path(directory), UNEVEN_WORKERS, config=CONFIG) as cluster,
        cluster.client() as client,
    ):
        run_uneven(client, None, seconds_per_row=0)  # workers import what they need
        for name, (replicate_after, replicate_hot) in ways.items():
            rules = OwnerRules(replicate_hot=replicate_hot)
            outcome = run_uneven(client, replicate_after, chunks=UNEVEN_CHUNKS, rules=rules)
            print(f"| {name} | {outcome.seconds:.1f} |", flush=True)
            values.append(outcome.value)
    return sum(not np.array_equal(values[0], value) for value in values[1:])


def measure_scheduler(rounds: int) -> None:
    """Measure the scheduler's CPU time per chunk, without and with owners."""
    with (
        tempfile.TemporaryDirectory() as directory,
        Cluster(Path(directory), WORKERS, config=CONFIG) as cluster,
        cluster.client() as client,
    ):
        free, pinned = map(min, free_and_pinned(client, rounds))
    print(
        f"\nscheduler: {1e6 * free:.0f} us per chunk without owners, {1e6 * pinned:.0f} us with, "
        f"{pinned / free:.2f} x; best of {rounds} runs in turns"
    )


if __name__ == "__main__":
    sys.exit(main())
