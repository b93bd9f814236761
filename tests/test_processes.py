"""Only slow tests start processes, and nothing that tests start outlives them."""

import multiprocessing
import os
import subprocess
import sys

import psutil
import pytest

from tests import processes
from tests.cluster_processes import REPOSITORY, wait_until


@pytest.mark.parametrize(
    "start",
    [
        lambda: subprocess.Popen(["true"]),
        lambda: os.system("true"),
        multiprocessing.get_context("spawn").Process(target=int).start,
        multiprocessing.get_context("forkserver").Process(target=int).start,
    ],
    ids=["Popen", "system", "spawn", "forkserver"],
)
def test_a_test_that_is_not_marked_slow_cannot_start_processes(start):
    with pytest.raises(RuntimeError, match=r"cannot_start_processes.* starts a process: mark it"):
        start()


OUTLIVED = """
import subprocess
from tests import processes
end = processes.end_with_this_process()
print(subprocess.Popen(["sleep", "600"], start_new_session=True).pid, end.pid, flush=True)
end.wait()
"""


@pytest.mark.slow
def test_what_tests_start_ends_when_they_are_killed():
    command = [sys.executable, "-c", OUTLIVED]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as tests:
        try:
            outlived, end = (psutil.Process(int(pid)) for pid in tests.stdout.readline().split())
            assert outlived.is_running()
            assert processes.MARK not in end.environ(), "what ends others is not ended with them"
        finally:
            tests.kill()
    wait_until(lambda: not outlived.is_running(), "it has ended")
