"""How does a job get one worker for each GPU, here or on a cluster?

    find_devices ──> one worker process per device ──> `OnGpu` in each ──> chunks, packets, experts
                     dask-cuda's, if installed;                            on the device
                     else a process with CUDA_VISIBLE_DEVICES

A worker has a few threads: while one computes, the next reads and uploads its chunk, and another
downloads and writes. Between workers chunks go over UCX if it is installed, over TCP if not.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import dask
from distributed import Client, Nanny, Scheduler, SpecCluster, Worker, WorkerPlugin
from distributed.system import MEMORY_LIMIT

from dask_ep.arrays import device, gemms
from dask_ep.arrays.blas import limit_blas_for_good
from dask_ep.arrays.checks import size_in_bytes
from dask_ep.arrays.device import Device
from dask_ep.cluster import device_serialize
from dask_ep.cluster.interrupts import children_ignore_sigint
from dask_ep.errors import NoDeviceError
from dask_ep.experts.local_experts import LocalExperts
from dask_ep.laws.device_memory import THREADS_PER_GPU

PROTOCOLS = ("tcp", "ucx")

UCX_PACKAGES = ("distributed_ucxx", "rmm")
"""UCX, and the allocator of device memory that it requires to receive into."""

UCX_ON_GPUS = {"distributed-ucxx.create-cuda-context": True}
"""Dask's configuration wherever UCX may start: it supports device memory only if a CUDA context
exists before it starts. Workers inherit the configuration of the process that starts them."""

STREAM_PER_THREAD = "CUPY_CUDA_PER_THREAD_DEFAULT_STREAM"
"""Environment variable that makes CuPy use a stream per thread; read when CuPy is imported."""

MEMORY_SHARE = 0.9
"""Part of a device's memory that CuPy's pool may hold if the user sets no limit: the rest is for
CUDA itself, cuBLAS's workspaces and other processes."""

SPILL_SHARE = 0.8
"""Part of that which chunks between tasks may fill before dask-cuda moves some to the host. Experts
are never moved and do not count: chunks are chosen to fit next to them (`fit`)."""


@dataclass(frozen=True)
class Gpus:
    """Run on this machine, in one worker process for each GPU that is visible."""

    device_memory_limit: int | str | None = None
    #: of each device: bytes, or text such as "60 GiB"; None means `MEMORY_SHARE` of its memory
    protocol: str | None = None
    #: "ucx" or "tcp"; None means UCX if it is installed
    tf32: bool = False
    #: experts multiply float32 as TF32: ten bits of mantissa, several times as fast
    memory_limit: int | str | None = None
    #: memory of the host, for each worker: bytes, or text
    dashboard_port: int | None = None
    #: port of Dask's dashboard on this machine; None means no dashboard


def choose_protocol(asked: str | None) -> str:
    """Return the protocol between workers: the requested one, or the best one available.

    Raises
    ------
    NoDeviceError
        If UCX is requested but not installed.
    """
    has_ucx = all(find_spec(package) is not None for package in UCX_PACKAGES)
    if asked == "ucx" and not has_ucx:
        raise NoDeviceError(
            "the protocol ucx needs the packages distributed-ucxx and rmm, which are not both "
            "installed here; pip install distributed-ucxx-cu12 rmm-cu12 (or -cu13), or use "
            "--protocol tcp"
        )
    return asked or ("ucx" if has_ucx else "tcp")


def _host_limit(where: Gpus) -> int | None:
    return size_in_bytes(where.memory_limit, "memory_limit")


@contextmanager
def start_gpus(where: Gpus) -> Iterator[Client]:
    """Start a scheduler and a worker for each GPU on this machine, and end them afterwards.

    Raises
    ------
    NoDeviceError
        If CuPy is missing, there is no device, or the protocol is not installed.
    """
    devices = device.find_devices()
    protocol = choose_protocol(where.protocol)
    # dask-cuda spills from a device's own memory to the host's, and takes no limit without it.
    spills = find_spec("dask_cuda") is not None and not any(one.of_host for one in devices)
    make = _dask_cuda_cluster if spills else _plain_cluster
    with dask.config.set(UCX_ON_GPUS):
        with children_ignore_sigint():
            started = make(where, devices, protocol)
        with started as cluster, Client(cluster) as client:
            _prepare(client, OnGpu(device_limit(where, devices), where.tf32))
            yield client


def check_gpus(client: Client) -> None:
    """Prepare the workers of a cluster for chunks on their GPUs.

    Raises
    ------
    NoDeviceError
        If this process or a worker, which is named, lacks CuPy or a GPU: the client needs them
        too, since Dask inspects the arrays of a graph.
    """
    device.find_devices()
    answers = client.run(device.find_devices, on_error="return")
    lacking = [f"worker {who}: {why}" for who, why in answers.items() if isinstance(why, Exception)]
    if lacking:
        raise NoDeviceError("; ".join(lacking))
    _prepare(client, OnGpu())


def _prepare(client: Client, plugin: OnGpu) -> None:
    """Let the workers, and this process, which receives counts from there, use device arrays."""
    device_serialize.register(import_module(device.NAMESPACE))
    client.register_plugin(plugin)


def device_limit(where: Gpus, devices: Sequence[Device]) -> int | None:
    """Bytes that a job may hold on each device; None without a limit and without a device."""
    if where.device_memory_limit is not None or not devices:
        return size_in_bytes(where.device_memory_limit, "device_memory_limit")
    return int(MEMORY_SHARE * min(one.memory for one in devices))


def limit_of_cluster(client: Client) -> int | None:
    """Bytes that a job may hold on each worker's first device."""
    firsts = [devices[0].memory for devices in client.run(device.find_devices).values()]
    return int(MEMORY_SHARE * min(firsts)) if firsts else None


def _plain_cluster(where: Gpus, devices: list[Device], protocol: str) -> SpecCluster:
    """A process for each device, which sees only that one."""
    options = {
        "nthreads": THREADS_PER_GPU,
        "host": "127.0.0.1",
        "protocol": protocol,
        "memory_limit": _host_limit(where) or MEMORY_LIMIT // len(devices),
        "resources": {"GPU": 1},
        "silence_logs": logging.CRITICAL,
        # Dask counts device memory as the host's: it must not spill because of that.
        "config": {
            "distributed.worker.memory.target": False,
            "distributed.worker.memory.spill": False,
        },
    }
    workers = {
        index: {"cls": Nanny, "options": options | {"env": {"CUDA_VISIBLE_DEVICES": visible}}}
        for index, visible in enumerate(_visible(devices))
    }
    scheduler = {
        "cls": Scheduler,
        "options": {"host": "127.0.0.1", "port": 0, "protocol": protocol, **_dashboard(where)},
    }
    return SpecCluster(
        workers=workers,
        scheduler=scheduler,
        name="dask-ep GPUs",
        silence_logs=logging.CRITICAL,  # failures are reported by the futures
    )


def _dask_cuda_cluster(where: Gpus, devices: list[Device], protocol: str) -> Any:
    """The same with dask-cuda, which also spills chunks, and binds to the nearest cores."""
    from dask_cuda import LocalCUDACluster

    limit = device_limit(where, devices)
    assert limit is not None  # there are devices
    return LocalCUDACluster(
        CUDA_VISIBLE_DEVICES=_visible(devices),
        threads_per_worker=THREADS_PER_GPU,
        memory_limit=_host_limit(where) or "auto",
        device_memory_limit=int(SPILL_SHARE * limit),
        protocol=protocol,
        host="127.0.0.1",
        scheduler_kwargs=_dashboard(where),
        resources={"GPU": 1},
        silence_logs=logging.CRITICAL,
    )


def _dashboard(where: Gpus) -> dict[str, Any]:
    return {
        "dashboard": where.dashboard_port is not None,
        "dashboard_address": f"127.0.0.1:{where.dashboard_port or 0}",
    }


def _visible(devices: list[Device]) -> list[str]:
    """The value of CUDA_VISIBLE_DEVICES in the worker of each device."""
    outer = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = outer.split(",") if outer else None
    return [str(one.index) if names is None else names[one.index] for one in devices]


class OnGpu(WorkerPlugin):
    """Prepares a worker for chunks on its GPU: memory limit, TF32, serialization of chunks.

    Parameters
    ----------
    memory_limit : bytes that CuPy's pool may hold; None leaves it alone
    tf32 : whether experts' float32 products are TF32; routers' are never
    namespace : whose arrays the chunks are
    """

    name = "dask-ep-on-gpu"
    idempotent = True

    def __init__(
        self, memory_limit: int | None = None, tf32: bool = False, namespace: str | None = None
    ):
        self.memory_limit, self.tf32 = memory_limit, tf32
        self.namespace = namespace or device.NAMESPACE

    def setup(self, worker: Worker) -> None:
        limit_blas_for_good()
        os.environ[STREAM_PER_THREAD] = "0"
        if self.tf32:
            os.environ[gemms.TF32_SWITCH] = "1"
        xp = import_module(self.namespace)
        if xp.cuda.get_current_stream() == xp.cuda.Stream.ptds:  # already imported
            raise NoDeviceError(
                "arrays pass from thread to thread of a worker, so all must launch their work on "
                f"one stream, but CuPy was imported with {STREAM_PER_THREAD} set; unset it where "
                "workers start"
            )
        if self.memory_limit is not None:
            xp.get_default_memory_pool().set_limit(size=self.memory_limit)
        device_serialize.register(xp)
        if "dask_cuda" in sys.modules:
            _keep_experts_on_the_device()


def _keep_experts_on_the_device() -> None:
    """Keep dask-cuda from spilling a rank's experts.

    Once spilled, they would be read from their files again by every task; dask-cuda does not spill
    classes that declare their own spilling.
    """
    from dask_cuda.is_spillable_object import is_spillable_object

    is_spillable_object.register(LocalExperts, lambda experts: experts.on_device)
