"""`dask-ep run` on a cluster: certificates, reports, lost workers and schedulers, Ctrl-C."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import dask.array as da
import numpy as np
import pytest

from dask_ep import load_moe_layer
from dask_ep.cluster.owner_plugin import OWNERS_PLUGIN
from dask_ep.jobs.backends import Threads
from dask_ep.jobs.example import Example, write_example
from dask_ep.jobs.job import load_job
from dask_ep.jobs.run import run_job
from dask_ep.storage import journal
from tests.certificates import make_certificates, options
from tests.checkpoints import FIXTURES, LAYER
from tests.cluster_processes import DEADLINE, REPOSITORY, Cluster, addresses, wait_until

WORKERS = ("w0", "w1")


def on(cluster):
    """Say that a command shall run on this cluster, in chunks of 64 rows."""
    return ("--scheduler-file", cluster.scheduler_file, "--chunk-rows", 64)


def start(*arguments):
    """Start the real command."""
    return subprocess.Popen(
        [sys.executable, "-m", "dask_ep", "run", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )


def end(process):
    """Give exit code, stdout and stderr."""
    with process:
        try:
            out, err = process.communicate(timeout=DEADLINE)
        finally:
            process.kill()
    return process.returncode, out, err


def wait_for_blocks(out, count, process):
    def blocks():
        assert process.poll() is None, end(process)
        record = (
            journal.read_manifest(f"{out}.progress") if Path(f"{out}.progress").is_dir() else None
        )
        return record and len(journal.read_done(f"{out}.progress", record["run"])) >= count

    wait_until(blocks, f"{count} blocks are done")


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A job of 100 blocks, some ten milliseconds each."""
    sizes = {"rows": 6400, "d": 256, "num_experts": 2, "k": 1, "kind": "gated", "hidden": 4096}
    return write_example(tmp_path_factory.mktemp("job"), Example(**sizes, format="npy"))


@pytest.fixture(scope="module")
def expected(job, tmp_path_factory):
    """The output with two ranks and the same chunks, on threads."""
    out = tmp_path_factory.mktemp("expected") / "out.npy"
    run_job(load_job(job, out=str(out), world_size=2), Threads(2), chunk_rows=64)
    return np.load(out)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    with Cluster(tmp_path_factory.mktemp("cluster"), WORKERS) as running:
        yield running


@pytest.fixture
def cluster(shared):
    """A cluster of two workers; those that a test takes away are brought back for the next one."""
    for name in {*WORKERS} - {*shared.processes}:
        shared.start_worker(name)
    for name in {*shared.processes} - {"scheduler", *WORKERS}:
        shared.stop_worker(name)
    with shared.client() as client:
        wait_until(lambda: {*addresses(client)} == {*WORKERS}, "two workers are there")
    return shared


@pytest.mark.slow
def test_a_lost_worker_changes_nothing(cluster, job, tmp_path, expected):
    out = tmp_path / "out.npy"
    process = start(job, "--out", out, *on(cluster), "--report", tmp_path / "run.html")
    wait_for_blocks(out, 5, process)
    cluster.stop_worker("w1")
    code, printed, told = end(process)
    assert code == 0, told
    assert "6400 rows in" in printed
    np.testing.assert_array_equal(np.load(out), expected)
    assert f"report: {tmp_path}/run.html; by Dask: {tmp_path}/run-dask.html" in printed
    assert "ep_chunk" in (tmp_path / "run-dask.html").read_text()
    report = (tmp_path / "run.html").read_text()
    assert '<a href="run-dask.html">' in report
    assert re.search(r"<td>worker tcp://[\d.:]+ left</td>", report)
    assert re.search(r"<td>rank [01] moved from tcp://[\d.:]+ to tcp://[\d.:]+: ", report)
    assert re.search(r"[1-9]\d* tasks ran again", report)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["qwen2_moe", "gpt_oss_mxfp4"])
def test_a_checkpoints_layer_outlives_a_worker(cluster, tmp_path, case):
    """Router, shared experts and all, from a directory that every worker opens for itself."""
    layer = load_moe_layer(FIXTURES / case, layer=LAYER)
    hidden = np.random.default_rng(0).standard_normal((6400, layer.experts.d), np.float32)
    np.save(tmp_path / "hidden.npy", hidden)
    out = tmp_path / "out.npy"
    layer_options = ("--layer", FIXTURES / case, "--layer-index", LAYER)
    tokens = ("--tokens", tmp_path / "hidden.npy")
    process = start(*layer_options, *tokens, "--out", out, *on(cluster))
    wait_for_blocks(out, 5, process)
    cluster.stop_worker("w1")
    code, printed, told = end(process)
    assert code == 0, told
    assert "6400 rows in" in printed
    assert "dashboard" not in told, "this scheduler shows none"
    one = layer(da.from_array(hidden, chunks=(640, -1)), world_size=1).compute()
    np.testing.assert_allclose(np.load(out), one, rtol=1e-5, atol=1e-6 * np.abs(one).max())


@pytest.mark.slow
def test_ctrl_c_leaves_nothing_on_the_cluster(cluster, job, tmp_path):
    out = tmp_path / "out.npy"
    process = start(job, "--out", out, *on(cluster))
    wait_for_blocks(out, 5, process)
    process.send_signal(signal.SIGINT)
    code, _, told = end(process)
    assert code == 1
    assert "stopped;" in told
    with cluster.client() as client:
        wait_until(lambda: client.run_on_scheduler(_count_tasks) == 0, "no task is left")
        assert OWNERS_PLUGIN not in client.run_on_scheduler(_plugins)
        assert set(addresses(client)) == set(WORKERS)


@pytest.mark.slow
def test_a_run_continues_after_its_scheduler_was_lost(cluster, job, tmp_path, expected):
    out = tmp_path / "out.npy"
    with Cluster(tmp_path, WORKERS) as another:
        another.client().close()
        process = start(job, "--out", out, *on(another))
        wait_for_blocks(out, 5, process)
        another.processes["scheduler"].kill()
        code, _, told = end(process)
    assert code == 1
    assert "has stopped or has dropped the job; finished blocks are kept" in told
    code, printed, told = end(start(job, "--out", out, *on(cluster), "--resume"))
    assert code == 0, told
    assert "were done before" in printed
    np.testing.assert_array_equal(np.load(out), expected)


@pytest.mark.slow
def test_a_cluster_with_certificates(tmp_path, job, expected):
    certificates = make_certificates(tmp_path)
    out = tmp_path / "out.npy"
    with Cluster(tmp_path, WORKERS, options=options(certificates)) as cluster:
        cluster.client(security=certificates.security()).close()
        code, _, told = end(start(job, "--out", out, *on(cluster)))
        assert code == 1
        assert "uses TLS, but no certificates were given; pass --tls-ca-file" in told
        assert not out.exists()
        code, _, told = end(start(job, "--out", out, *on(cluster), *options(certificates)))
    assert code == 0, told
    np.testing.assert_array_equal(np.load(out), expected)


@pytest.mark.slow
def test_a_worker_that_does_not_see_the_files_is_named_before_anything_runs(cluster, job, tmp_path):
    far_machine = tmp_path / "far_machine.py"
    far_machine.write_text(
        "from dask_ep.cluster import checks\n"
        "def dask_setup(worker):\n"
        "    checks._look_at = lambda path: None\n"
    )
    cluster.start_worker("far", "--preload", str(far_machine))
    with cluster.client() as client:
        far = addresses(client)["far"]
    code, _, told = end(start(job, "--out", tmp_path / "out.npy", *on(cluster)))
    assert code == 1
    assert f"worker far ({far}) does not see tokens: " in told
    assert "does not exist there" in told
    assert not (tmp_path / "out.npy").exists()


@pytest.mark.slow
def test_the_address_of_the_dashboard_is_shown(job, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    out = tmp_path / "out.npy"
    code, _, told = end(start(job, "--out", out, "--processes", 1, "--dashboard", port))
    assert code == 0, told
    assert f"dashboard: http://127.0.0.1:{port}/status" in told


def _count_tasks(dask_scheduler):
    return len(dask_scheduler.tasks)


def _plugins(dask_scheduler):
    return list(dask_scheduler.plugins)
