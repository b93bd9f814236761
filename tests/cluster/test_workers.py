"""Workers of a cluster are waited for and counted, and a refused job does not start any."""

from __future__ import annotations

import contextlib
import os
import signal
from queue import SimpleQueue

import numpy as np
import pytest

from dask_ep.cluster.checks import connect
from dask_ep.cluster.workers import Workers, counted_workers
from dask_ep.jobs.backends import Cluster, Deployed, Threads
from dask_ep.jobs.example import Example, write_example
from dask_ep.jobs.job import load_job
from dask_ep.jobs.run import run_job
from tests.cli.test_cluster_command import end, start
from tests.cluster_processes import Cluster as RealCluster
from tests.cluster_processes import wait_until

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def job_file(tmp_path_factory):
    sizes = {"rows": 600, "d": 16, "num_experts": 4, "chunk_rows": 100, "format": "npy"}
    return write_example(tmp_path_factory.mktemp("job"), Example(**sizes))


@pytest.fixture
def cluster(tmp_path):
    (tmp_path / "cluster").mkdir()
    with RealCluster(tmp_path / "cluster") as running:
        yield running


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (Workers(4, 0, 0), "4 running"),
        (Workers(3, 1, 0), "3 running, 1 waited for"),
        (Workers(0, 4, 2), "0 running, 4 waited for, 2 lost"),
    ],
)
def test_a_count_in_words(count, words):
    assert str(count) == words


def test_workers_are_waited_for_and_counted_until_the_end(cluster):
    cluster.start_worker("w0")
    counts: list[Workers] = []
    with cluster.client() as client:
        cluster.start_worker("w1")
        with counted_workers(client, 2, tell=counts.append):
            assert len(client.nthreads()) == 2
            cluster.stop_worker("w0")
            wait_until(lambda: counts[-1] == (1, 1, 1), "the loss is reported")
            cluster.start_worker("w2")
            wait_until(lambda: counts[-1] == (2, 0, 1), "the other worker is reported")
        cluster.stop_worker("w1")
        wait_until(lambda: len(client.nthreads()) == 1, "a worker leaves")
    assert counts[-1] == (2, 0, 1), "nothing is reported after the run has ended"


def test_workers_that_run_already_are_not_reported(cluster):
    cluster.start_worker("w0")
    counts: list[Workers] = []
    with cluster.client() as client, counted_workers(client, None, tell=counts.append):
        cluster.stop_worker("w0")
        wait_until(lambda: counts, "the loss is reported")
    assert counts == [(0, 1, 1)]


def test_what_interrupts_the_waiting_ends_it(cluster):
    def wait(queue: SimpleQueue):
        raise KeyboardInterrupt

    with (
        cluster.client() as client,
        pytest.raises(KeyboardInterrupt),
        counted_workers(client, 1, wait),
    ):
        pytest.fail("a worker is there")


def test_a_scheduler_that_is_lost_ends_the_waiting(cluster):
    def lose(count: Workers) -> None:
        cluster.processes["scheduler"].kill()

    with (
        connect(cluster.address, timeout=2) as client,
        pytest.raises(ConnectionError, match="lost while waiting for 3 workers, of which 0"),
        counted_workers(client, 3, tell=lose),
    ):
        pytest.fail("a worker is there")


def test_a_run_waits_for_its_workers_which_are_its_ranks(cluster, job_file, tmp_path):
    out = tmp_path / "out.npy"
    on = ("--scheduler-file", cluster.scheduler_file, "--workers", 2)
    process = start(job_file, "--out", out, "--chunk-rows", 100, *on)
    assert process.stderr.readline() == "workers: 0 running, 2 waited for\n"
    assert not out.exists()
    for name in ("w0", "w1"):
        cluster.start_worker(name)
    code, _, err = end(process)
    assert code == 0, err
    assert "workers: 2 running\n" in err
    expected = tmp_path / "expected.npy"
    run_job(load_job(job_file, out=str(expected), world_size=2), Threads(1), chunk_rows=100)
    np.testing.assert_array_equal(np.load(out), np.load(expected))


def test_ctrl_c_while_workers_are_waited_for(cluster, job_file, tmp_path):
    on = ("--scheduler-file", cluster.scheduler_file, "--workers", 2)
    process = start(job_file, "--out", tmp_path / "out.npy", *on)
    process.stderr.readline()
    os.kill(process.pid, signal.SIGINT)
    code, _, err = end(process)
    assert code == 1
    assert "stopped;" in err
    assert "Traceback" not in err


def test_a_refused_job_starts_no_cluster(job_file, tmp_path):
    out = tmp_path / "out.npy"
    out.touch()
    never = Deployed(lambda: pytest.fail("a cluster is started"))
    with pytest.raises(FileExistsError, match="out.npy exists"):
        run_job(load_job(job_file, out=str(out)), never)


def test_a_cluster_of_ones_own_ends_with_the_job_and_its_error_is_the_runs(
    cluster, job_file, tmp_path
):
    cluster.start_worker("w0")
    happened = []

    @contextlib.contextmanager
    def start():
        happened.append("started")
        try:
            yield Cluster(cluster.address, workers=1)
        finally:
            happened.append("ended")
            raise RuntimeError("no place in the queue")

    job = load_job(job_file, out=str(tmp_path / "out.npy"))
    with pytest.raises(RuntimeError, match="no place in the queue"):
        run_job(job, Deployed(start))
    assert happened == ["started", "ended"]
    assert (tmp_path / "out.npy").exists()


def test_a_resumed_run_keeps_its_ranks_whatever_the_number_of_workers(cluster, job_file, tmp_path):
    class Stopped(Exception):
        pass

    def stop(progress):
        if progress.rows_done:
            raise Stopped

    job = load_job(job_file, out=str(tmp_path / "out.npy"))
    cluster.start_worker("w0")
    with pytest.raises(Stopped):
        run_job(
            load_job(job_file, out=job.out, world_size=2),
            Threads(1),
            on_progress=stop,
            chunk_rows=100,
        )
    done = run_job(job, Cluster(cluster.address, workers=1), resume=True)
    assert done.rows_before >= 100
    expected = tmp_path / "expected.npy"
    run_job(load_job(job_file, out=str(expected), world_size=2), Threads(1), chunk_rows=100)
    np.testing.assert_array_equal(np.load(job.out), np.load(expected))
