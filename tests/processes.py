"""Which tests may start processes, and what ends them?

Those marked `slow` may: that is what the mark means, whatever the machine, and it is held here.
What tests start ends with the process that runs them, though that be killed: a shell waits for the
end of a pipe that nobody else holds, and kills whatever has inherited a mark in its environment.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from multiprocessing.process import BaseProcess

import numpy.testing  # noqa: F401 - some versions run `lscpu` when they are imported
from threadpoolctl import threadpool_info

MARK = "DASK_EP_TESTS"

END_MARKED = """
cat
for again in 1 2 3; do  # what is started while others are killed is found the next time
    for file in $(grep --files-with-matches --no-messages --fixed-strings "$0" /proc/*/environ); do
        process=${file#/proc/}
        kill -KILL "${process%/environ}"
    done
done 2> /dev/null
"""

STARTS = {"subprocess.Popen", "os.fork", "os.posix_spawn", "os.system"}
"""Events by which Python tells that a process is started; multiprocessing has none of its own."""

_quick_test = ""
"""The test that runs now, if it is not marked `slow`."""


def end_with_this_process() -> subprocess.Popen:
    """Let whatever is started from now on end with this process, or when the answer is closed."""
    environment = {name: value for name, value in os.environ.items() if name != MARK}
    mark = f"{os.getpid()}-{os.urandom(16).hex()}"
    os.environ[MARK] = mark
    return subprocess.Popen(
        ["sh", "-c", END_MARKED, f"{MARK}={mark}"],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )


def refuse_to(quick_test: str) -> None:
    """Refuse processes to this test; to none if it is empty."""
    global _quick_test
    _quick_test = quick_test


def _hold_to_the_mark(event: str, _: object = None) -> None:
    if _quick_test and event in STARTS:
        raise RuntimeError(f"{_quick_test} starts a process: mark it slow")


def watch_starts() -> None:
    """Let tests that start processes and are not marked `slow` fail."""
    threadpool_info()  # some versions of it ask `ldconfig`, the first time
    platform.processor()  # asks `uname` the first time, for Dask's workers
    sys.addaudithook(_hold_to_the_mark)
    plainly = BaseProcess.start

    def start(process: BaseProcess) -> None:
        _hold_to_the_mark("os.fork")
        plainly(process)

    BaseProcess.start = start
