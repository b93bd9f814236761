"""Faults of real workers in the midst of a job: it ends, and with the bits of an undisturbed run.

`workflows/faults.py` tries the same at ten moments each and prints what it costs.
"""

import numpy as np
import pytest

from tests.cluster_processes import Cluster
from tests.fault_scenarios import (
    CONFIG,
    FAULTS,
    UNEVEN_WORKERS,
    WORKERS,
    moments,
    run_disturbed,
    run_undisturbed,
    run_uneven,
)

LENGTH = 2.0
"""Seconds of the undisturbed run, about: faults come within them."""

TRIED = {"one owner killed": 3}
"""Moments tried here, where not one."""


@pytest.fixture(scope="module")
def clusters(tmp_path_factory):
    """Clusters without and with nannies, started when first asked for, and the expected result."""
    running = {}

    def running_cluster(nanny):
        if nanny not in running:
            cluster = Cluster(tmp_path_factory.mktemp("c"), WORKERS, nanny=nanny, config=CONFIG)
            cluster.__enter__()
            client = cluster.client()
            running[nanny] = cluster, client, run_undisturbed(client).value
        return running[nanny]

    yield running_cluster
    for cluster, client, _ in running.values():
        client.close()
        cluster.__exit__()


CASES = [
    pytest.param(fault, number, id=f"{fault}-{number}")
    for fault in FAULTS
    for number in range(TRIED.get(fault, 1))
]


@pytest.mark.parametrize(("fault", "number"), CASES)
def test_the_result_is_that_of_the_undisturbed_run(clusters, fault, number):
    cluster, client, expected = clusters(nanny=FAULTS[fault][1])
    moment, victim = moments(fault, 10, LENGTH)[number]
    outcome = run_disturbed(cluster, client, fault, moment, victim, salt=number + 1)
    assert np.array_equal(outcome.value, expected)
    assert outcome.failures == []


def test_an_idle_worker_takes_a_replica_of_the_hot_rank_in_the_midst_of_the_job(tmp_path):
    running = Cluster(tmp_path, UNEVEN_WORKERS, config=CONFIG)
    with running, running.client() as client:
        run_uneven(client, None, seconds_per_row=0)  # workers import what they need
        alone = run_uneven(client, None)
        helped = [run_uneven(client, alone.seconds / 4) for _ in range(2)]
    for outcome in helped:
        assert np.array_equal(outcome.value, alone.value)
        assert outcome.failures == []
    # At best 0.63; the better of two, for other processes take their part of the machine.
    assert 0.5 < min(outcome.seconds for outcome in helped) / alone.seconds < 0.85
