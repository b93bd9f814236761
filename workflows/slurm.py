"""How does a job run on a SLURM cluster?

    python workflows/slurm.py job.toml --workers 8 --partition cpu    one SLURM job per worker
    python workflows/slurm.py job.toml --resume                       continue a run
    python workflows/slurm.py --print                                 show the SLURM script

Options, messages and exit codes are those of `dask-ep run`. This process is the scheduler and the
client: start it on a node that stays up, such as a login node, or in its own allocation. All nodes
must see the files of the job, and this Python.

The run starts when all workers have joined. A worker that is lost later, through `scancel`, a
broken node or the end of its walltime, is replaced; in the meantime its ranks move to the others.
However this process ends, its SLURM jobs end too.
"""

from __future__ import annotations

import logging
import secrets
import shlex
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event, Thread
from typing import Any

import click
import dask
from distributed import LocalCluster
from distributed.security import Security
from distributed.utils import get_ip

from dask_ep.cli.main import main
from dask_ep.cli.options import job_options, parse_size
from dask_ep.cli.run_command import (
    carry_out,
    how_options,
    read_certificates,
    tls_options,
)
from dask_ep.cluster.checks import Certificates
from dask_ep.jobs.backends import Cluster, Deployed

POLL_SECONDS = 5.0
"""Seconds between two queries of the queue."""

FAILED_STARTS = 3
"""The run fails after so many SLURM jobs in a row ended before their worker had joined."""

LOG_LINES = 5
"""Lines of a failed SLURM job's log that the error shows."""

PART_OF_A_WORKER = 0.9
"""Fraction of a SLURM job's memory for the worker; the rest is for its nanny."""


@dataclass(frozen=True)
class Request:
    """What is requested from SLURM for each worker."""

    name: str
    #: of the SLURM jobs of this run, and of no other jobs
    partition: str | None
    account: str | None
    cores: int
    memory: int
    #: bytes
    walltime: str
    interface: str | None
    prologue: tuple[str, ...]
    log_directory: Path
    sbatch: tuple[str, ...]
    #: further options
    certificates: Certificates | None

    def command(self, count: int) -> list[str]:
        """Return the command that submits this many workers as one array job."""
        command = ["sbatch", "--parsable", f"--job-name={self.name}", f"--array=0-{count - 1}"]
        command += ["--nodes=1", "--ntasks=1", f"--cpus-per-task={self.cores}"]
        command += [f"--mem={self.memory >> 20}M", f"--time={self.walltime}"]
        command += [f"--output={self.log_directory}/%x-%A_%a.log"]
        command += [f"--partition={self.partition}"] if self.partition else []
        command += [f"--account={self.account}"] if self.account else []
        return [*command, *self.sbatch]

    def log(self, job: str) -> Path:
        return self.log_directory / f"{self.name}-{job}.log"

    def script(self, address: str) -> str:
        """Return the script of each SLURM job: run a worker of the scheduler at this address."""
        worker = [sys.executable, "-m", "distributed.cli.dask_worker", address]
        worker += ["--nthreads", str(self.cores), "--no-dashboard", "--death-timeout", "60"]
        worker += ["--memory-limit", str(int(self.memory * PART_OF_A_WORKER))]
        worker += ["--interface", self.interface] if self.interface else []
        if (tls := self.certificates) is not None:
            worker += ["--tls-ca-file", tls.ca_file, "--tls-cert", tls.cert]
            worker += ["--tls-key", tls.key or tls.cert]
        lines = [
            "#!/usr/bin/env bash",
            *self.prologue,
            f"exec {shlex.join(worker)} --name ${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}",
        ]
        return "\n".join(lines) + "\n"


class Jobs:
    """The SLURM jobs of a run: submitted, watched, and replaced when they end.

    Parameters
    ----------
    request : Request
    cluster : LocalCluster
        It runs the scheduler of the workers.
    guard : file descriptor
        From `ended_with_this_process`.
    """

    def __init__(self, request: Request, cluster: LocalCluster, guard: int):
        self._request, self._cluster, self._guard = request, cluster, guard
        self._ids: set[str] = set()  # jobs not known to have ended
        self._joined: set[str] = set()  # jobs whose worker has joined the scheduler
        self._failed_starts = 0  # in a row
        self._missing = 0  # jobs still to be submitted
        self._printed: set[str] = set()  # messages, each printed once
        self.error: RuntimeError | None = None
        self.stopped = Event()

    def submit(self, count: int) -> None:
        script = self._request.script(self._cluster.scheduler_address)
        done = slurm(self._request.command(count), input=script, pass_fds=[self._guard])
        if done.returncode:
            raise RuntimeError(f"SLURM rejected the workers: {in_one_line(done.stderr)}")
        job = done.stdout.partition(";")[0].strip()
        self._ids |= {f"{job}_{index}" for index in range(count)}

    def watch(self) -> None:
        """Replace jobs that end, until stopped; close the cluster if too many fail to start."""
        while not self.stopped.wait(POLL_SECONDS):
            if (queue := self._queue()) is not None:
                self._print_why_jobs_wait(queue)
                try:
                    self._replace(self._ids - queue.keys())
                except RuntimeError as error:
                    self.error = error
                    self._cluster.close()
                    return

    def _queue(self) -> dict[str, tuple[str, str]] | None:
        """Return job -> (state, why it waits); None if SLURM does not respond at the moment."""
        select = [f"--name={self._request.name}", "--array", "--noheader"]
        done = slurm(["squeue", *select, "--format=%i %t %r"])
        if done.returncode:
            return None
        rows = (line.split(maxsplit=2) for line in done.stdout.splitlines())
        return {job: (state, why) for job, state, why in rows}

    def _print_why_jobs_wait(self, queue: dict[str, tuple[str, str]]) -> None:
        reasons = {why for state, why in queue.values() if state == "PD" and why != "None"}
        if reasons:
            self._print_once(f"jobs wait: {', '.join(sorted(reasons))}")

    def _print_once(self, message: str) -> None:
        if message not in self._printed:
            self._printed.add(message)
            click.echo(f"SLURM: {message}", err=True)

    def _replace(self, ended: set[str]) -> None:
        names = {worker.name for worker in list(self._cluster.scheduler.workers.values())}
        if not names <= self._joined:
            self._failed_starts = 0
        self._joined |= names
        failed = ended - self._joined
        self._failed_starts += len(failed)
        if self._failed_starts >= FAILED_STARTS:
            raise RuntimeError(
                f"{self._failed_starts} SLURM jobs ended before their worker had reached the "
                f"scheduler; {tail(self._request.log(min(failed)))}"
            )
        if ended:
            click.echo(f"SLURM: {', '.join(sorted(ended))} ended and will be replaced", err=True)
            self._ids -= ended
            self._missing += len(ended)
        try:
            if self._missing:
                self.submit(self._missing)
                self._missing = 0
        except RuntimeError as error:
            if not self._ids:
                raise
            self._print_once(f"{error}; trying again while others run")


def slurm(command: list[str], **keywords: Any) -> subprocess.CompletedProcess:
    """Run a SLURM command; Ctrl-C does not reach it."""
    keywords |= {"capture_output": True, "text": True, "start_new_session": True}
    return subprocess.run(command, check=False, **keywords)


def in_one_line(message: str) -> str:
    return "; ".join(line.removeprefix("sbatch: error: ") for line in message.splitlines())


def tail(log: Path) -> str:
    if not log.exists():
        return f"no log was written to {log}"
    with log.open(errors="replace") as lines:
        return f"the end of {log}:\n{''.join(deque(lines, LOG_LINES)).rstrip()}"


@contextmanager
def ended_with_this_process(name: str) -> Iterator[int]:
    """Cancel the SLURM jobs of this name when the body, or this process, ends.

    A shell waits for the end of its input, a pipe that only this process holds open, so that even
    `kill -9` closes it. The pipe's descriptor is yielded so that `sbatch` holds it open too, and no
    job is missed that is just being submitted.
    """
    cancel = f"scancel --quiet --name={name}"  # tried again if SLURM does not respond
    script = f"cat; for again in 1 2 3 4 5 6 7 8 9; do {cancel} && exit; sleep 10; done"
    shell = subprocess.Popen(["sh", "-c", script], stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield shell.stdin.fileno()
    finally:
        shell.stdin.close()
        shell.wait()


def start_scheduler(request: Request, count: int) -> LocalCluster:
    """Start a scheduler in this process, and no workers."""
    security = None
    if (tls := request.certificates) is not None:
        own = {"cert": tls.cert, "key": tls.key or tls.cert}
        roles = ("scheduler", "client")
        security = Security(
            tls_ca_file=tls.ca_file,
            require_encryption=True,
            **{f"tls_{role}_{what}": path for role in roles for what, path in own.items()},
        )
    # Dask fails a task once this many of its workers have died.
    with dask.config.set({"distributed.scheduler.allowed-failures": max(100, count)}):
        return LocalCluster(
            n_workers=0,
            threads_per_worker=1,
            host=None if request.interface else get_ip(),
            interface=request.interface,
            security=security,
            dashboard_address=":0",
        )


@contextmanager
def slurm_workers(request: Request, count: int) -> Iterator[Cluster]:
    """Yield a cluster of this many workers, which are SLURM jobs, and end them afterwards."""
    if shutil.which("sbatch") is None:
        raise FileNotFoundError(
            "sbatch: command not found; start this where SLURM's commands are installed"
        )
    request.log_directory.mkdir(parents=True, exist_ok=True)
    with (
        ended_with_this_process(request.name) as guard,
        start_scheduler(request, count) as cluster,
    ):
        jobs = Jobs(request, cluster, guard)
        jobs.submit(count)
        click.echo(f"SLURM: {count} jobs, {request.name}, submitted", err=True)
        watching = Thread(target=jobs.watch, daemon=True)
        watching.start()
        try:
            yield Cluster(
                cluster.scheduler_address, certificates=request.certificates, workers=count
            )
        except Exception:
            if jobs.error is not None:
                raise jobs.error from None
            raise
        finally:
            jobs.stopped.set()
            watching.join()


@click.command()
@job_options
@click.option("--workers", type=click.IntRange(1), default=4, show_default=True, help="SLURM jobs.")
@click.option("--partition", help="Partition to run in; default: the site's.")
@click.option("--account", help="Account to charge.")
@click.option(
    "--cores", type=click.IntRange(1), default=1, show_default=True, help="Threads of each worker."
)
@click.option(
    "--memory",
    callback=parse_size,
    default="8 GiB",
    show_default=True,
    metavar="SIZE",
    help="Memory of each worker, for its experts and a few token chunks.",
)
@click.option(
    "--walltime", default="04:00:00", show_default=True, help="Time limit of each SLURM job."
)
@click.option("--interface", help="Network interface of this node and the workers, such as ib0.")
@click.option(
    "--prologue",
    multiple=True,
    metavar="LINE",
    help="Line to run before the worker, such as 'module load gcc'.",
)
@click.option(
    "--log-directory",
    type=click.Path(file_okay=False, path_type=Path),
    default="slurm-logs",
    show_default=True,
    help="Directory for the workers' logs.",
)
@click.option(
    "--sbatch",
    multiple=True,
    metavar="OPTION",
    help="Further option for sbatch, such as --qos=low.",
)
@click.option("--print", "only_print", is_flag=True, help="Show the script for SLURM, and exit.")
@tls_options
@how_options
def on_slurm(workers: int, only_print: bool, **options: Any) -> None:
    """Compute the output of JOB, a TOML file, on workers that are SLURM jobs, and write it.

    Keys of the job are options, and --resume and --overwrite are those of `dask-ep run`. There are
    as many ranks as workers, unless --world-size is given; a resumed run keeps its ranks.

    \b
    Examples:
      python workflows/slurm.py job.toml --workers 8 --partition cpu --memory 16GiB
      python workflows/slurm.py job.toml --resume --workers 3
      python workflows/slurm.py --workers 8 --prologue "source /shared/venv/bin/activate" --print
    """
    certificates = read_certificates(
        *(options.pop(f"tls_{it}") for it in ("ca_file", "cert", "key"))
    )
    keys = ("partition", "account", "cores", "memory", "walltime", "interface", "prologue")
    request = Request(
        name=f"dask-ep-{secrets.token_hex(4)}",
        certificates=certificates,
        **{key: options.pop(key) for key in (*keys, "log_directory", "sbatch")},
    )
    if only_print:
        click.echo(f"{shlex.join(request.command(workers))} <<'EOF'")
        click.echo(f"{request.script('SCHEDULER')}EOF")
        return
    logging.disable(logging.ERROR)  # of Dask: the run itself reports which workers leave
    carry_out(Deployed(partial(slurm_workers, request, workers)), **options)


if __name__ == "__main__":
    main(command=on_slurm, name="slurm.py")
