"""An interrupt may be raised between any two steps of the main thread: what does it find there?"""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from queue import SimpleQueue

import click
import psutil
import pytest

from dask_ep.cli import run_command
from dask_ep.cluster.interrupts import Interrupts
from dask_ep.jobs.backends import Processes, Threads
from dask_ep.jobs.example import Example, write_example
from dask_ep.jobs.job import Job, load_job
from dask_ep.jobs.run import run_job
from tests.cluster_processes import DEADLINE, REPOSITORY, wait_until

ROWS, CHUNK_ROWS = 600, 50


@pytest.fixture(scope="module")
def job_file(tmp_path_factory) -> Path:
    example = Example(rows=ROWS, d=16, num_experts=4, format="npy")
    return write_example(tmp_path_factory.mktemp("job"), example)


@pytest.fixture(scope="module")
def job(job_file) -> Job:
    return load_job(job_file)


@pytest.mark.slow
def test_before_the_command_has_begun_ctrl_c_ends_it_without_a_word(tmp_path):
    interrupting = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n"
    (tmp_path / "click.py").write_text(interrupting)  # is imported instead of the real one
    done = subprocess.run(
        [sys.executable, "-m", "dask_ep", "--version"],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{REPOSITORY}"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


@pytest.mark.slow
@pytest.mark.parametrize("where", [Threads(2), Processes(1)], ids=["threads", "processes"])
def test_while_blocks_are_computed_the_main_thread_shares_no_lock(job, where, monkeypatch):
    """Raised in `Condition.__enter__`, an interrupt leaves the lock taken: others wait for good."""
    enter, seen, shared = threading.Condition.__enter__, [], []

    def noted(condition):
        if seen and threading.current_thread() is threading.main_thread():
            shared.append(condition)
        return enter(condition)

    def on_progress(progress):
        if progress.rows_done:
            seen.append(progress)
        if not progress.rows_left:
            monkeypatch.undo()

    monkeypatch.setattr(threading.Condition, "__enter__", noted)
    run_job(job, where, chunk_rows=CHUNK_ROWS, overwrite=True, on_progress=on_progress)
    assert len(seen) == ROWS // CHUNK_ROWS
    assert not shared


class Interrupted(io.StringIO):
    """A stream that is interrupted while writing, and cannot be written to meanwhile."""

    is_writing = False

    def write(self, text):
        if self.is_writing:
            raise RuntimeError("reentrant call")
        self.is_writing = True
        try:
            signal.raise_signal(signal.SIGINT)
            return super().write(text)
        finally:
            self.is_writing = False


class Dying:
    """Is interrupted in its destructor, where Python drops what is raised."""

    def __del__(self):
        signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize(
    "interrupted",
    [lambda: Interrupted().write("half the rows"), Dying, lambda: signal.raise_signal(2)],
    ids=["in a message", "in a destructor", "anywhere"],
)
def test_an_interrupt_is_raised_where_the_run_waits_and_nowhere_else(job, capsys, interrupted):
    passed = []

    def run() -> None:
        with run_command.stoppable(job.out, overwrite=True) as wait:
            interrupted()
            passed.append("held back")
            wait(SimpleQueue())
            passed.append("never")

    with pytest.raises(click.exceptions.Exit) as end:
        run()
    assert passed == ["held back"]
    assert end.value.exit_code == 1
    assert "stopped;" in (told := capsys.readouterr().err)
    assert "the same command with --resume instead of --overwrite" in told
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_ends_a_wait():
    with Interrupts(1) as interrupts:
        timer = threading.Timer(0.1, signal.pthread_kill, (threading.main_thread().ident, 2))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            interrupts.wait(SimpleQueue())
        timer.join()


def test_what_comes_in_time_is_given():
    queue: SimpleQueue = SimpleQueue()
    queue.put(3)
    with Interrupts(1) as interrupts:
        assert interrupts.wait(queue) == 3


@pytest.mark.slow
def test_at_the_second_interrupt_the_process_ends(tmp_path):
    script = "\n".join(
        (
            "import signal",
            "from dask_ep.cluster.interrupts import Interrupts",
            "with Interrupts(7):",
            "    signal.raise_signal(signal.SIGINT)",
            "    print('held back', flush=True)",
            "    signal.raise_signal(signal.SIGINT)",
            "    print('never')",
        )
    )
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=REPOSITORY, check=False
    )
    assert (ran.returncode, ran.stdout) == (7, "held back\n")
    assert ran.stderr == "stopping; press Ctrl-C again to stop now\n"


@pytest.mark.slow
def test_ctrl_c_while_workers_start(job_file, tmp_path):
    """Sent to the whole group, as a terminal does, when the first process is there."""
    command = [sys.executable, "-m", "dask_ep", "run", job_file, "--processes", "2"]
    process = subprocess.Popen(
        [*command, "--out", tmp_path / "out.npy"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        start_new_session=True,
    )
    try:
        wait_until(lambda: psutil.Process(process.pid).children(), "a worker starts")
        workers = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGINT)
        _, told = process.communicate(timeout=DEADLINE)
    finally:
        process.kill()
    assert process.returncode == 1
    assert "stopped;" in told
    assert "Traceback" not in told, told
    assert not psutil.wait_procs(workers, timeout=DEADLINE)[1]
