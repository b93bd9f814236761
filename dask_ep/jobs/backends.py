"""Where does a job run, and with which threads, workers and memory?

`Threads` | `Processes` | `Gpus` | `Cluster` ──> threads or a client, workers, memory
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import dask
from dask.system import CPU_COUNT
from distributed import Client, LocalCluster

from dask_ep.arrays import device, gemms
from dask_ep.arrays.blas import one_blas_thread
from dask_ep.arrays.checks import size_in_bytes
from dask_ep.arrays.device import Device
from dask_ep.cluster.checks import Certificates, WorkerSettings, check_cluster, connect
from dask_ep.cluster.dask_internals import scheduler_address
from dask_ep.cluster.gpus import (
    THREADS_PER_GPU,
    UCX_ON_GPUS,
    Gpus,
    check_gpus,
    device_limit,
    limit_of_cluster,
    start_gpus,
)
from dask_ep.cluster.interrupts import Wait, children_ignore_sigint
from dask_ep.cluster.workers import Workers, counted_workers
from dask_ep.errors import UnfitClusterError
from dask_ep.jobs.build import WEIGHT_KEYS, ComputedBy, Inputs, resolve_placement
from dask_ep.jobs.job import Job
from dask_ep.kernel import bfloat16
from dask_ep.kernel.operands import multiplied_on_gpus
from dask_ep.laws.memory_law import Layout

CONNECT_SECONDS = 10.0
"""Seconds that a scheduler may take to respond."""


@dataclass(frozen=True)
class Threads:
    """Run in this process, one task per thread."""

    count: int | None = None
    #: None means one per core that this process may use
    memory_limit: int | str | None = None
    #: in bytes, or a string such as "4 GiB"

    def __post_init__(self) -> None:
        _check_count("Threads", self.count)
        size_in_bytes(self.memory_limit, "memory_limit")


@dataclass(frozen=True)
class Processes:
    """Run in worker processes on this machine, one task each."""

    count: int
    memory_limit: int | str | None = None
    #: of each process, in bytes or as a string such as "4 GiB"
    dashboard_port: int | None = None
    #: port of Dask's dashboard on this machine; None means no dashboard

    def __post_init__(self) -> None:
        _check_count("Processes", self.count)
        size_in_bytes(self.memory_limit, "memory_limit")


@dataclass(frozen=True)
class Cluster:
    """Run on the workers of an existing scheduler; all of them see the files."""

    address: str | None = None
    scheduler_file: str | None = None
    certificates: Certificates | None = None
    #: certificates of a cluster that uses TLS
    gpus: bool = False
    #: whether each of its workers computes on a GPU
    workers: int | None = None
    #: number of workers to wait for, and of ranks unless that is given; None: those running now


@dataclass(frozen=True)
class Deployed:
    """Run on a cluster that is started for this job and shut down after it.

    It starts after inputs and output have been checked, so that a refused job costs nothing.
    """

    start: Callable[[], contextlib.AbstractContextManager[Cluster]]
    #: context manager that starts the cluster and always shuts it down; an error that it raises is
    #: that of the run


def _check_count(name: str, count: int | None) -> None:
    if count is not None and (isinstance(count, bool) or count != int(count) or count < 1):
        raise ValueError(f"{name} must be 1 or more, but are {count!r}")


Where = Threads | Processes | Gpus | Cluster

ALL_THREADS = Threads()
"""One thread per core, in this process."""


def lay_out(
    job: Job,
    where: Where,
    client: Client | None = None,
    *,
    devices: Sequence[Device] | None = None,
    begun_ranks: int | None = None,
) -> Layout:
    """Describe in numbers how a job runs on its backend.

    Parameters
    ----------
    job, where : what runs, and where
    client : of the workers; without one, a cluster is assumed to have one worker per rank
    devices : GPUs of `Gpus`; by default those found here. Without any, each rank is assumed to have
        one, of unknown memory.
    begun_ranks : number of ranks of the run that is resumed

    Raises
    ------
    ValueError
        If the number of ranks follows neither from the job nor from workers, or differs from that
        of its placement.
    """
    workers = 1
    cores: int | None = CPU_COUNT
    threads, host_limit = 1, None
    limit = size_in_bytes(getattr(where, "memory_limit", None), "memory_limit")
    if isinstance(where, Threads):
        threads = where.count or CPU_COUNT
    elif isinstance(where, Processes):
        workers = where.count
    elif isinstance(where, Gpus):
        found = device.find_devices() if devices is None else devices
        workers, threads, cores = len(found), THREADS_PER_GPU, None
        limit, host_limit = device_limit(where, found), limit
    else:
        workers, threads, limit, host_limit = _workers_of(where, client)
        cores = None
    awaited = getattr(where, "workers", None)
    ranks = job.world_size or begun_ranks or awaited or workers
    if client is not None and not ranks:
        raise ValueError(
            f"the scheduler at {scheduler_address(client)} has no workers yet, so the number of "
            "ranks is unknown; start workers, or give the number to wait for (--workers)"
        )
    ranks = ranks or 1
    return Layout(
        ranks,
        workers or ranks,
        threads,
        limit,
        resolve_placement(job, ranks),
        on_gpus(where),
        host_limit,
        in_process=isinstance(where, Threads),
        ranks_given=job.world_size is not None,
        cores=cores,
        starts_workers=isinstance(where, Processes | Gpus),
    )


def _workers_of(where: Cluster, client: Client | None) -> tuple[int, int, int | None, int | None]:
    """Return a cluster's reported workers, threads, and memory limits (of a GPU, of the host)."""
    if client is None:
        return 0, 1, None, None
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    limits = [worker["memory_limit"] for worker in workers if worker["memory_limit"]]
    threads, limit = max((w["nthreads"] for w in workers), default=1), min(limits, default=None)
    if where.gpus:
        return len(workers), threads, limit_of_cluster(client), limit
    return len(workers), threads, limit, None


def on_gpus(where: Where) -> bool:
    """Return whether chunks are computed on GPUs."""
    return isinstance(where, Gpus) or (isinstance(where, Cluster) and where.gpus)


def computed_by(where: Where, client: Client | None, inputs: Inputs) -> ComputedBy:
    """Find out what computes a job there: workers report which library multiplies, and if they
    differ, all libraries are named.

    Raises
    ------
    UnfitClusterError
        If only some GPU workers multiply float32 as TF32.
    """
    experts = inputs.experts
    asked = (inputs.tokens.dtype, experts.is_bfloat16, experts.precision)
    if on_gpus(where):
        tf32 = multiplies_as_tf32(where, client)
        return ComputedBy(device.NAMESPACE, tf32, multiplied_on_gpus(*asked, tf32))
    if client is None:
        return ComputedBy(library=bfloat16.multiplied_by(*asked))
    found = client.run(bfloat16.multiplied_by, *asked).values()
    return ComputedBy(library="; ".join(sorted(set(found))))


def multiplies_as_tf32(where: Where, client: Client | None) -> bool:
    """Return whether experts multiply float32 as TF32, as the GPU workers of a cluster report."""
    if isinstance(where, Cluster) and where.gpus:
        assert client is not None  # `started` connects to a cluster
        found = client.run(_tf32_by_environment)
        if len(set(found.values())) > 1:
            some = ", ".join(sorted(worker for worker, tf32 in found.items() if tf32))
            problem = (
                f"only some GPU workers have {gemms.TF32_SWITCH}=1 in their environment, {some}"
            )
            raise UnfitClusterError([f"{problem}; start all of them with it, or none"])
        return True in found.values()
    return isinstance(where, Gpus) and where.tf32


def _tf32_by_environment() -> bool:
    return os.environ.get(gemms.TF32_SWITCH) == "1"


def deployed(where: Where | Deployed) -> contextlib.AbstractContextManager[Where]:
    """Return the backend, started if necessary."""
    if not isinstance(where, Where | Deployed):
        raise TypeError(f"where must be Threads, Processes, Gpus or Cluster; got {where!r}")
    return where.start() if isinstance(where, Deployed) else contextlib.nullcontext(where)


@contextlib.contextmanager
def started(
    where: Where,
    files: Mapping[str, str],
    wait: Wait = SimpleQueue.get,
    on_workers: Callable[[Workers], Any] | None = None,
) -> Iterator[tuple[int, Client | None]]:
    """Yield the number of threads and no client, or a client of the workers.

    `files` are the local files that all workers must see, by description: see `files_of`.

    `wait` and `on_workers` are as in `dask_ep.jobs.run.run_job`, for a cluster.
    """
    if isinstance(where, Threads):
        with one_blas_thread():
            yield where.count or CPU_COUNT, None
    elif isinstance(where, Processes):
        with _local_cluster(where) as cluster, Client(cluster) as client:
            client.register_plugin(WorkerSettings())
            yield 1, client
    elif isinstance(where, Gpus):
        with start_gpus(where) as client:
            yield 1, client
    else:
        with (
            dask.config.set(UCX_ON_GPUS if where.gpus else {}),
            connect(
                where.address,
                scheduler_file=where.scheduler_file,
                certificates=where.certificates,
                timeout=CONNECT_SECONDS,
            ) as client,
            counted_workers(client, where.workers, wait, on_workers),
        ):
            check_cluster(client, files)
            client.register_plugin(WorkerSettings())
            if where.gpus:
                check_gpus(client)
            yield 1, client


def _local_cluster(where: Processes) -> LocalCluster:
    limit = size_in_bytes(where.memory_limit, "memory_limit")
    with children_ignore_sigint():
        return LocalCluster(
            n_workers=where.count,
            threads_per_worker=1,
            processes=True,
            host="127.0.0.1",
            scheduler_kwargs={
                "dashboard": where.dashboard_port is not None,
                "dashboard_address": f"127.0.0.1:{where.dashboard_port or 0}",
            },
            memory_limit="auto" if limit is None else limit,
            silence_logs=logging.CRITICAL,  # failures are reported by the futures
        )


def files_of_job(job: Job) -> dict[str, str]:
    """Return the local files and directories that all workers must see, by description."""
    return files_of(
        {
            "tokens": job.tokens,
            "routing": job.routing,
            "topk_weights": job.topk_weights,
            "token_ids": job.token_ids,
            "layer": job.layer,
            "the directory of out": os.path.dirname(job.out),
            **{
                f"experts.{key}": value
                for key, value in (job.experts or {}).items()
                if key in WEIGHT_KEYS and isinstance(value, str)
            },
        }
    )


def files_of(paths: Mapping[str, str | None]) -> dict[str, str]:
    """Return those of the given paths that are local, without names of tensors."""
    return {
        what: path.partition("::")[0]
        for what, path in paths.items()
        if path is not None and "://" not in path
    }
