"""How does a test get a cluster of real processes, and break it?

A `Cluster` is one `dask scheduler` and some `dask worker` processes on the loopback interface, all
on free ports, found through a scheduler file. Every process is in a session of its own, and only
those are signalled; nothing survives the `with` block.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from distributed import Client

REPOSITORY = Path(__file__).parents[1]

DEADLINE = 120.0
"""Seconds that anything may take before a test fails: several times what it takes on a slow day."""


def wait_until(holds: Callable[[], object], what: str, seconds: float = DEADLINE) -> object:
    """Ask again and again until the answer is true, and give it; TimeoutError says what was not.

    The longer it takes, the less often it is asked: an answer takes the time of several processes.
    """
    deadline, pause = time.monotonic() + seconds, 0.02
    while not (answer := holds()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:g} s in vain until {what}")
        time.sleep(pause)
        pause = min(1.1 * pause, 0.15)
    return answer


class Cluster:
    """A scheduler and named workers, each a process.

    Parameters
    ----------
    directory : Path
        For the scheduler file, the logs and the workers' scratch space.
    workers : names of the workers to start with
    nanny : bool
        Whether a nanny starts each worker, and starts it again when it dies.
    config : mapping of dask configuration keys to values, for all processes
    options : further arguments for all `dask scheduler` and `dask worker` commands, and for workers
    environment : further variables for all processes
    """

    def __init__(
        self,
        directory: Path,
        workers: Sequence[str] = (),
        *,
        nanny: bool = False,
        config: Mapping[str, object] | None = None,
        options: Sequence[str] = (),
        worker_options: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ):
        self.directory = directory
        self.scheduler_file = directory / "scheduler.json"
        self.nanny = nanny
        self.options = list(options)
        self.worker_options = list(worker_options)
        self.processes: dict[str, subprocess.Popen] = {}
        self._first_workers = list(workers)
        self._environment = {
            **os.environ,
            "PYTHONPATH": str(REPOSITORY),
            **{_variable(key): str(value) for key, value in (config or {}).items()},
            **(environment or {}),
        }

    def __enter__(self) -> Cluster:
        try:
            self._start(
                "scheduler",
                *("distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0"),
                *("--no-dashboard", "--scheduler-file", str(self.scheduler_file), *self.options),
            )
            for name in self._first_workers:
                self.start_worker(name)
            self.address = wait_until(self._read_address, f"the scheduler runs: {self.log()}")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            _signal_session(process, signal.SIGCONT)
            _signal_session(process, signal.SIGKILL)
            process.wait()

    def start_worker(self, name: str, *options: str, **environment: str) -> None:
        """Start a further worker; it joins when it is up."""
        self._start(
            name,
            *("distributed.cli.dask_worker", "--host", "127.0.0.1", "--name", name),
            *("--scheduler-file", str(self.scheduler_file), "--no-dashboard", "--nthreads", "1"),
            *("--local-directory", str(self.directory), *self.options, *self.worker_options),
            *(() if self.nanny else ("--no-nanny",)),
            *options,
            environment=environment,
        )

    def client(self, n_workers: int | None = None, **keywords: object) -> Client:
        """Connect, and wait for as many workers as were started (or for `n_workers`)."""
        client = Client(self.address, timeout=DEADLINE, set_as_default=False, **keywords)
        expected = len(self.processes) - 1 if n_workers is None else n_workers
        if expected:
            client.wait_for_workers(expected, timeout=DEADLINE)
        return client

    def signal(self, client: Client, name: str, number: signal.Signals) -> None:
        """Send a signal to the worker of this name (not to its nanny), once it is known.

        On a busy machine the scheduler may have lost it for want of heartbeats: it comes back.
        """
        wait_until(lambda: name in worker_pids(client), f"worker {name} is known")
        os.kill(worker_pids(client)[name], number)

    def continue_process(self, pid: int) -> None:
        """SIGCONT a process that was stopped, if it is still there."""
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)

    def stop_worker(self, name: str) -> None:
        """End a worker and its nanny for good."""
        process = self.processes.pop(name)
        _signal_session(process, signal.SIGKILL)
        process.wait()

    def log(self, name: str = "scheduler") -> str:
        """What a process has printed."""
        path = self.directory / f"{name}.log"
        return path.read_text() if path.exists() else ""

    def _start(self, name: str, *arguments: str, environment: Mapping[str, str] | None = None):
        with open(self.directory / f"{name}.log", "ab") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                env={**self._environment, **(environment or {})},
                cwd=self.directory,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _read_address(self) -> str | None:
        if self.processes["scheduler"].poll() is not None:
            raise RuntimeError(f"the scheduler did not start: {self.log()}")
        try:
            return json.loads(self.scheduler_file.read_text())["address"]
        except (FileNotFoundError, json.JSONDecodeError):
            return None


def worker_pids(client: Client) -> dict[str, int]:
    """Name -> process id of each worker that the scheduler knows."""
    return client.run_on_scheduler(_pids)


def addresses(client: Client) -> dict[str, str]:
    """Name -> address of each worker that the scheduler knows."""
    workers = client.scheduler_info(n_workers=-1)["workers"]
    return {str(worker["name"]): address for address, worker in workers.items()}


def _pids(dask_scheduler: object) -> dict[str, int]:
    return {str(worker.name): worker.pid for worker in dask_scheduler.workers.values()}


def _variable(key: str) -> str:
    """Spell a configuration key as the environment variable that sets it."""
    return "DASK_" + key.replace(".", "__").replace("-", "_").upper()


def _signal_session(process: subprocess.Popen, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)
