"""Is the cluster there, and is it fit for the job?

Checked before anything is read, since such problems show up late and far from their cause:

    every worker, and the scheduler      has the client's versions
    every worker                         sees the job's files, and the same ones as the client
    the scheduler                        lets a task survive the death of every worker
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from distributed import Client, WorkerPlugin
from distributed.core import connect as connect_to_server
from distributed.scheduler import Scheduler
from distributed.security import Security

import dask_ep
from dask_ep.arrays.blas import limit_blas_for_good
from dask_ep.arrays.memory import keep_freed_memory, release
from dask_ep.cluster.dask_internals import scheduler_address, when_memory_is_short
from dask_ep.errors import UnfitClusterError

PACKAGES = ("dask", "distributed", "numpy", "zarr")
"""Packages whose versions must agree, in addition to dask_ep and Python: graphs and chunks are
pickled."""


@dataclass(frozen=True)
class Certificates:
    """Credentials for a cluster with TLS: paths of PEM files."""

    ca_file: str
    #: certificate of the authority that signed the cluster's certificates
    cert: str
    #: the client's certificate, signed by that authority
    key: str | None = None
    #: key of the certificate, unless that file holds it too

    def security(self) -> Security:
        return Security(
            tls_ca_file=self.ca_file,
            tls_client_cert=self.cert,
            tls_client_key=self.key,
            require_encryption=True,
        )


def connect(
    address: str | None = None,
    *,
    scheduler_file: str | os.PathLike | None = None,
    certificates: Certificates | None = None,
    timeout: float = 30.0,
) -> Client:
    """Connect to a scheduler, or explain why that is not possible.

    Parameters
    ----------
    address : such as "tcp://host:8786", or "tls://host:8786" with certificates
    scheduler_file : file in which the scheduler wrote its address, instead of `address`
    certificates : Certificates, optional
    timeout : seconds

    Raises
    ------
    ConnectionError
        If no scheduler answers there, or it and the client do not accept each other.
    """
    if address is None:
        if scheduler_file is None:
            raise TypeError("an address or a scheduler_file must be given, but both are None")
        address = _read_address(scheduler_file, timeout)
    security = certificates.security() if certificates else Security()
    # A Client that fails to connect is closed by the garbage collector, which can lock up in Dask
    # (2026.8): make one only if a scheduler answers. In a thread, since a notebook has a loop.
    with ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, _knock(address, security, timeout)).result()
    return Client(address, security=security, timeout=timeout)


async def _knock(address: str, security: Security, timeout: float) -> None:
    try:
        arguments = security.get_connection_args("client")
        async with asyncio.timeout(timeout):
            comm = await connect_to_server(address, timeout=timeout, **arguments)
        comm.abort()
    except TypeError as error:
        if "ssl_context" not in str(error):
            raise
        raise ConnectionError(
            f"the scheduler at {address} uses TLS, but no certificates were given; pass "
            "--tls-ca-file, --tls-cert and --tls-key"
        ) from error
    except (OSError, RuntimeError) as error:
        if security.require_encryption:
            hint = "check that it speaks TLS and that the certificates are signed by its authority"
        else:
            hint = "check that it runs; if it speaks TLS, give certificates and a tls:// address"
        reason = str(error) or type(error).__name__
        raise ConnectionError(
            f"could not connect to the scheduler at {address}: {reason}; {hint}"
        ) from error


def _read_address(scheduler_file: str | os.PathLike, timeout: float) -> str:
    """Read where the scheduler is; wait for the file, since the scheduler may be starting."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            return json.loads(Path(scheduler_file).read_text())["address"]
        except (OSError, ValueError, KeyError) as error:
            if time.monotonic() > deadline:
                raise ConnectionError(
                    f"{scheduler_file} must hold a scheduler's address, but after {timeout:g} s "
                    f"does not: {error!r}; start dask scheduler --scheduler-file {scheduler_file}"
                ) from error
            time.sleep(0.1)


def check_cluster(client: Client, files: Mapping[str, str | os.PathLike] | None = None) -> None:
    """Check that scheduler and workers have the client's versions and see the job's files.

    Parameters
    ----------
    client : distributed.Client
    files : mapping of a description to a local path, optional
        Files or directories, such as `{"tokens": "/data/tokens.zarr"}`.

    Raises
    ------
    UnfitClusterError
        Lists every problem: the worker, and the package or the file.

    Warns
    -----
    UserWarning
        If the scheduler gives a task up before all workers have died: it counts each death of a
        worker in whose queue the task waited, even if the task never started there.

    Notes
    -----
    One round trip to all workers and one to the scheduler; no file is read. A worker sees a file
    if it finds one of the same kind and size at the same path.

    Examples
    --------
    >>> from distributed import Client
    >>> with Client(n_workers=1, processes=False, dashboard_address=":0") as client:
    ...     check_cluster(client, {"tokens": "/nowhere/tokens.npy"})
    Traceback (most recent call last):
        ...
    dask_ep.errors.UnfitClusterError: tokens: /nowhere/tokens.npy does not exist
    """
    paths = {what: os.path.abspath(path) for what, path in (files or {}).items()}
    here = probe_process(list(paths.values()))
    missing = [f"{what}: {path} does not exist" for what, path in paths.items() if not here[path]]
    if missing:
        raise UnfitClusterError(missing)
    names = {
        address: worker["name"]
        for address, worker in client.scheduler_info(n_workers=-1)["workers"].items()
    }
    problems = []
    try:
        scheduler, allowed_failures = client.run_on_scheduler(_probe_scheduler)
        problems += _compare_versions(
            f"the scheduler ({scheduler_address(client)})", scheduler, here
        )
    except ModuleNotFoundError as error:
        allowed_failures = None
        problems.append(_cannot_import(f"the scheduler ({scheduler_address(client)})", error))
    answers = client.run(probe_process, list(paths.values()), on_error="return")
    for address, there in answers.items():
        who = f"worker {names.get(address, '?')} ({address})"
        if isinstance(there, BaseException):
            problems.append(_cannot_import(who, there))
        else:
            problems += _compare_versions(who, there, here)
            problems += _compare_files(who, there, here, paths)
    if problems:
        raise UnfitClusterError(problems)
    if allowed_failures < len(answers):
        warnings.warn(
            f"the scheduler gives up a task when {allowed_failures + 1} workers have died "
            f"while they ran it, but there are {len(answers)} workers; to outlive each of them, "
            f"set distributed.scheduler.allowed-failures to {len(answers)} or more where the "
            "scheduler starts (DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES)",
            stacklevel=2,
        )


def probe_process(paths: list[str]) -> dict[str, Any]:
    """Report the versions in this process, and the kind and size of each path (None: missing).

    Examples
    --------
    >>> probe_process(["/"])["/"]
    ('directory', 0)
    """
    versions = {"python": f"{sys.version_info.major}.{sys.version_info.minor}"}
    versions["dask_ep"] = dask_ep.__version__
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "missing"
    return {"versions": versions, **{path: _look_at(path) for path in paths}}


class WorkerSettings(WorkerPlugin):
    """Prepares every worker of a cluster, including later ones, for fast chunks.

    One BLAS thread per task, and a C library that keeps the memory of freed packets while there is
    enough of it.
    """

    name = "dask-ep-worker-settings"
    idempotent = True

    def setup(self, worker: Any) -> None:
        limit_blas_for_good()
        keep_freed_memory()
        when_memory_is_short(worker, release)


def dashboard_link(client: Client) -> str | None:
    """Return the address of Dask's dashboard, None if the scheduler has none.

    Its web server runs in either case, for health checks and metrics.
    """
    return client.dashboard_link if client.run_on_scheduler(_shows_dashboard) else None


def _shows_dashboard(dask_scheduler: Scheduler) -> bool:
    return bool(dask_scheduler.http_application.applications)


def _look_at(path: str) -> tuple[str, int] | None:
    """A directory's own size differs between file systems, so it counts as 0."""
    try:
        return ("directory", 0) if os.path.isdir(path) else ("file", os.stat(path).st_size)
    except OSError:
        return None


def _probe_scheduler(dask_scheduler: Scheduler) -> tuple[dict[str, Any], int]:
    return probe_process([]), dask_scheduler.allowed_failures


def _compare_versions(who: str, there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    return [
        f"{who} has {package} {there['versions'][package]}, but the client has {version}; install "
        "the same version on both"
        for package, version in here["versions"].items()
        if there["versions"][package] != version
    ]


def _compare_files(
    who: str, there: dict[str, Any], here: dict[str, Any], paths: dict[str, str]
) -> list[str]:
    problems = []
    for what, path in paths.items():
        if there[path] is None:
            problems.append(
                f"{who} does not see {what}: {path} does not exist there; put it on a file system "
                "that all workers share, at the same path"
            )
        elif there[path] != here[path]:
            problems.append(
                f"{who} sees a different {what}: {path} is a {_spell(there[path])} there and a "
                f"{_spell(here[path])} at the client; make it the same file on both"
            )
    return problems


def _spell(seen: tuple[str, int]) -> str:
    kind, size = seen
    return f"file of {size} bytes" if kind == "file" else kind


def _cannot_import(who: str, error: BaseException) -> str:
    return f"{who} cannot run this check: {error}; install the same packages there as on the client"
