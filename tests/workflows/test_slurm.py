"""`workflows/slurm.py` on a real SLURM: it runs, is broken, is stopped, and leaves no jobs."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from dask_ep.cluster.checks import connect
from dask_ep.jobs.backends import Threads
from dask_ep.jobs.example import Example, write_example
from dask_ep.jobs.job import load_job
from dask_ep.jobs.run import run_job
from tests.certificates import make_certificates, options
from tests.cli.test_cluster_command import end, wait_for_blocks
from tests.cluster_processes import DEADLINE, REPOSITORY, wait_until
from tests.slurm_processes import Slurm, missing_programs

SCRIPT = REPOSITORY / "workflows" / "slurm.py"

needs_slurm = pytest.mark.skipif(
    bool(missing_programs()),
    reason=f"needs SLURM (apt-get install slurm-wlm munge); missing: {missing_programs()}",
)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    with Slurm(tmp_path_factory.mktemp("slurm")) as running:
        yield running
        assert not running.jobs("PENDING,RUNNING"), "a test has left jobs behind"


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Path:
    """A job of 100 blocks, some ten milliseconds each."""
    sizes = {"rows": 6400, "d": 256, "num_experts": 2, "k": 1, "kind": "gated", "hidden": 4096}
    return write_example(tmp_path_factory.mktemp("job"), Example(**sizes, format="npy"))


@pytest.fixture(scope="module")
def expected(job, tmp_path_factory):
    """The output with two ranks and the same chunks, on threads."""
    out = tmp_path_factory.mktemp("expected") / "out.npy"
    run_job(load_job(job, out=str(out), world_size=2), Threads(2), chunk_rows=64)
    return np.load(out)


@pytest.fixture
def start(slurm, tmp_path) -> Iterator[Callable[..., subprocess.Popen]]:
    """Start the script; what a test that fails has left of it is killed."""
    own = ("--interface", "lo", "--memory", "700MiB", "--log-directory", tmp_path / "logs")
    with contextlib.ExitStack() as started:

        def start(*arguments: object) -> subprocess.Popen:
            process = subprocess.Popen(
                [sys.executable, SCRIPT, *map(str, (*own, "--chunk-rows", 64, *arguments))],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=slurm.environment | {"PYTHONPATH": str(REPOSITORY)},
                start_new_session=True,
            )
            started.enter_context(process)
            started.callback(process.kill)
            return process

        yield start


def wait_for_no_jobs(slurm: Slurm) -> None:
    wait_until(lambda: not slurm.jobs(), "the jobs have ended")


@pytest.mark.slow
@needs_slurm
def test_a_run(slurm, start, job, tmp_path, expected):
    out = tmp_path / "out.npy"
    code, printed, told = end(start(job, "--out", out, "--workers", 2))
    assert code == 0, told
    assert f"{out}: 6400 rows in" in printed
    np.testing.assert_array_equal(np.load(out), expected)
    lines = told.splitlines()
    assert re.fullmatch(r"SLURM: 2 jobs, dask-ep-\w+, submitted", lines[0])
    assert "workers: 2 running" in lines
    assert all(
        line.startswith(("SLURM: ", "workers: ", "dashboard: ")) or "%" in line for line in lines
    )
    wait_for_no_jobs(slurm)


@pytest.mark.slow
@needs_slurm
def test_a_worker_that_is_cancelled_is_replaced(slurm, start, job, tmp_path, expected):
    """The only one of two ranks: without another one the run would not end."""
    out = tmp_path / "out.npy"
    process = start(job, "--out", out, "--workers", 1, "--world-size", 2)
    wait_for_blocks(out, 5, process)
    (cancelled,) = slurm.jobs()
    slurm.ask("scancel", cancelled)
    code, _, told = end(process)
    assert code == 0, told
    assert "workers: 0 running, 1 waited for, 1 lost" in told
    assert f"SLURM: {cancelled} ended and will be replaced" in told
    assert "workers: 1 running, 1 lost" in told
    np.testing.assert_array_equal(np.load(out), expected)


@pytest.mark.slow
@needs_slurm
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_leaves_no_jobs_and_is_resumed(slurm, start, job, tmp_path, expected, number):
    """Sent to the whole group, as a terminal does with Ctrl-C; resumed on other workers."""
    out = tmp_path / "out.npy"
    process = start(job, "--out", out, "--workers", 2)
    wait_for_blocks(out, 5, process)
    os.killpg(process.pid, number)
    code, _, told = end(process)
    assert code == 1
    assert f"stopped; {out} is" in told
    assert "To continue: the same command with --resume" in told
    assert "Traceback" not in told
    wait_for_no_jobs(slurm)
    assert not out.exists()
    if number == signal.SIGTERM:  # what is left is the same
        return
    code, printed, told = end(start(job, "--out", out, "--resume"))
    assert code == 0, told
    assert "were done before" in printed
    assert "workers: 4 running" in told, "by default, and not as many as there are ranks"
    np.testing.assert_array_equal(np.load(out), expected)


@pytest.mark.slow
@needs_slurm
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_pending_jobs_end_with_a_run_that_waits_for_them(slurm, start, job, tmp_path, number):
    process = start(job, "--out", tmp_path / "out.npy", "--workers", 9)
    wait_until(lambda: len(slurm.jobs("PENDING")) == 5, "four of nine jobs run")
    said = ""
    while not ("4 running, 5 waited for" in said and "jobs wait: Resources" in said):
        line = process.stderr.readline()
        assert line, said
        said += line
    os.kill(process.pid, number)
    code, _, told = end(process)
    assert code == (1 if number == signal.SIGTERM else -signal.SIGKILL)
    assert "Traceback" not in told
    wait_for_no_jobs(slurm)


@pytest.mark.slow
@needs_slurm
def test_what_slurm_refuses_is_an_error(slurm, start, job, tmp_path):
    out = tmp_path / "out.npy"
    code, printed, told = end(start(job, "--out", out, "--partition", "nowhere"))
    assert (code, printed) == (1, "")
    assert told == (
        "dask-ep: SLURM rejected the workers: invalid partition specified: nowhere; Batch job "
        "submission failed: Invalid partition name specified\n"
    )
    assert not slurm.jobs()


@pytest.mark.slow
@needs_slurm
def test_workers_that_do_not_start_end_the_run(slurm, start, job, tmp_path):
    out = tmp_path / "out.npy"
    prologue = ("--prologue", "echo no such environment; exit 1")
    code, _, told = end(start(job, "--out", out, "--workers", 2, *prologue))
    assert code == 1
    assert "SLURM jobs ended before their worker had reached the scheduler; the end of" in told
    assert told.endswith(".log:\nno such environment\n")
    assert "Traceback" not in told
    wait_for_no_jobs(slurm)


@pytest.mark.slow
@needs_slurm
def test_an_output_that_is_there_is_refused_as_by_run_and_asks_for_no_workers(
    slurm, start, job, tmp_path
):
    out = tmp_path / "out.npy"
    np.save(out, np.zeros(3))
    code, printed, told = end(start(job, "--out", out))
    assert (code, printed) == (1, "")
    by_run = subprocess.run(
        [sys.executable, "-m", "dask_ep", "run", job, "--out", out],
        capture_output=True, text=True, cwd=REPOSITORY, check=False,
    )  # fmt: skip
    assert [told] == by_run.stderr.splitlines(keepends=True)[-1:]  # run may hint at BLAS before
    assert "--overwrite starts again" in told
    assert (by_run.returncode, "SLURM" in told) == (1, False)
    code, _, told = end(start(job, "--out", out, "--overwrite", "--workers", 1))
    assert code == 0, told


@pytest.mark.slow
@needs_slurm
def test_a_replacement_that_slurm_refuses_is_asked_for_again(slurm, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    script = importlib.import_module("slurm")
    monkeypatch.setattr(script, "POLL_SECONDS", 0.2)
    monkeypatch.setenv("SLURM_CONF", slurm.environment["SLURM_CONF"])
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    request = script.Request(
        *("dask-ep-refused", None, None, 1, 700 << 20, "01:00:00", "lo", (), tmp_path, (), None)
    )
    told = []

    def is_told(words: str) -> bool:
        told.append(capsys.readouterr().err)
        return words in "".join(told)

    with script.slurm_workers(request, 2) as where, connect(where.address) as client:
        client.wait_for_workers(2, timeout=DEADLINE)
        slurm.ask("scontrol", "update", "PartitionName=all", "State=INACTIVE")
        try:
            slurm.ask("scancel", slurm.jobs()[0])
            wait_until(lambda: is_told("SLURM rejected the workers: "), "the refusal is told")
        finally:
            slurm.ask("scontrol", "update", "PartitionName=all", "State=UP")
        wait_until(lambda: len(client.nthreads()) == 2, "another worker has come")
    wait_for_no_jobs(slurm)


@pytest.mark.slow
@needs_slurm
def test_with_certificates(slurm, start, job, tmp_path, expected):
    own = options(make_certificates(tmp_path))
    out = tmp_path / "out.npy"
    code, _, told = end(start(job, "--out", out, "--workers", 2, *own))
    assert code == 0, told
    np.testing.assert_array_equal(np.load(out), expected)
    (log, *_) = (tmp_path / "logs").iterdir()
    assert "tls://" in log.read_text()
    assert "tcp://" not in log.read_text()
    wait_for_no_jobs(slurm)


def show(*arguments: str) -> tuple[list[str], str]:
    """What SLURM would get: the command and the script."""
    ran = subprocess.run(
        [sys.executable, SCRIPT, "--print", *arguments],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=True,
    )
    command, _, script = ran.stdout.partition(" <<'EOF'\n")
    return shlex.split(command), script.removesuffix("EOF\n")


@pytest.mark.slow
def test_slurm_gets_the_settings_of_the_site():
    command, script = show(
        *("--workers", "8", "--partition", "short", "--account", "us", "--memory", "3 GiB"),
        *("--walltime", "01:00:00", "--cores", "2", "--interface", "ib0", "--sbatch=--qos=low"),
        *("--prologue", "module load gcc", "--log-directory", "/shared/my logs"),
        *("--tls-ca-file", "ca.pem", "--tls-cert", "own.pem"),
    )
    name = command.pop(2)
    assert re.fullmatch(r"--job-name=dask-ep-\w{8}", name)
    assert command == [
        *("sbatch", "--parsable", "--array=0-7", "--nodes=1", "--ntasks=1", "--cpus-per-task=2"),
        *("--mem=3072M", "--time=01:00:00", "--output=/shared/my logs/%x-%A_%a.log"),
        *("--partition=short", "--account=us", "--qos=low"),
    ]
    lines = script.splitlines()
    assert lines[:2] == ["#!/usr/bin/env bash", "module load gcc"]
    assert "--nthreads 2" in lines[-1]
    assert "--interface ib0" in lines[-1]
    assert "--tls-ca-file ca.pem --tls-cert own.pem --tls-key own.pem" in lines[-1]
    limit = int(re.search(r"--memory-limit (\d+)", lines[-1]).group(1))
    assert limit == int(0.9 * 3 * 2**30), "the nanny is in the same allocation"
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


@pytest.mark.slow
def test_without_slurm_the_command_that_is_missing_is_named(job, tmp_path):
    ran = subprocess.run(
        [sys.executable, SCRIPT, job, "--out", tmp_path / "out.npy"],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    said = "dask-ep: sbatch: command not found; start this where SLURM's commands are installed\n"
    assert (ran.returncode, ran.stderr) == (1, said)
