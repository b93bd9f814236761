"""How does a job run on several GPU nodes?

    python workflows/gpu_cluster.py job.toml --nodes gpu01 gpu02 --ranks 16    8 GPUs on each
    python workflows/gpu_cluster.py job.toml --nodes gpu01 --ranks 8 --resume  continue a run
    python workflows/gpu_cluster.py --nodes gpu01 gpu02 --print                show the commands

This process is the client, and starts the scheduler on the same machine; dask-cuda's workers are
started on the nodes by ssh, one process for each GPU, bound to the nearest cores and network card.
The job starts when it has a worker for each rank.

This process needs CuPy and a GPU too, since Dask inspects the arrays of a graph. All nodes must see
the files of the job, and need the packages: dask_ep itself, and cupy-cuda12x, dask-cuda,
distributed-ucxx-cu12 and rmm-cu12.

With --protocol ucx packets go from device to device, over NVLink within a node and InfiniBand or
RoCE between nodes, if UCX finds them; with tcp they go through the memory of both hosts.

A single machine needs none of this: dask-ep run job.toml --gpu
"""

from __future__ import annotations

import argparse
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import dask
from distributed import Client

from dask_ep.cluster.gpus import PROTOCOLS, THREADS_PER_GPU, UCX_ON_GPUS
from dask_ep.jobs.backends import Cluster
from dask_ep.jobs.job import load_job
from dask_ep.jobs.run import Progress, run_job

WORKERS_SECONDS = 120.0
"""Seconds that workers may take to join."""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("job", nargs="?", help="a TOML file")
    options.add_argument(
        "--nodes", nargs="+", required=True, help="host names; localhost needs no ssh"
    )
    options.add_argument("--protocol", choices=PROTOCOLS, default="ucx")
    options.add_argument("--interface", default=None, help="network card of the nodes, such as ib0")
    options.add_argument("--port", type=int, default=8786)
    options.add_argument("--ranks", type=int, help="number of ranks, and of GPUs to wait for")
    options.add_argument(
        "--device-memory-limit", default="0.9", help="memory limit of each GPU: fraction or size"
    )
    options.add_argument("--resume", action="store_true")
    options.add_argument("--print", action="store_true", dest="only_print")
    args = options.parse_args()
    if not args.only_print and (args.job is None or args.ranks is None):
        options.error("give a job and --ranks, or --print")
    address = f"{args.protocol}://{socket.gethostname()}:{args.port}"
    if args.nodes == ["localhost"]:
        address = f"{args.protocol}://127.0.0.1:{args.port}"
    commands = list(commands_of(args, address))
    for command in commands:
        print(shlex.join(command))
    if not args.only_print:
        with started(commands):
            wait_for_workers(address, args.ranks)
            job = load_job(args.job, world_size=args.ranks)
            where = Cluster(address, gpus=True)
            print(run_job(job, where, resume=args.resume, on_progress=tell))


def commands_of(args: argparse.Namespace, address: str) -> Iterator[list[str]]:
    """Yield the commands of the scheduler, and of the workers of each node."""
    card = [] if args.interface is None else ["--interface", args.interface]
    here = ["--host", "127.0.0.1"] if args.nodes == ["localhost"] else card
    dask = [sys.executable, "-m", "dask"]
    # UCX finds devices only if a CUDA context exists before it starts; workers create one.
    cuda = ["env", "DASK_DISTRIBUTED_UCXX__CREATE_CUDA_CONTEXT=True"]
    first = cuda if args.protocol == "ucx" else []
    yield [
        *first,
        *dask,
        "scheduler",
        "--protocol",
        args.protocol,
        "--port",
        str(args.port),
        *here,
    ]
    for node in args.nodes:
        worker = [
            *(*dask, "cuda", "worker", address, "--protocol", args.protocol, *card),
            *("--nthreads", str(THREADS_PER_GPU), "--resources", "GPU=1"),
            *("--device-memory-limit", args.device_memory_limit),
        ]
        yield worker if node == "localhost" else ["ssh", node, shlex.join(worker)]


@contextmanager
def started(commands: list[list[str]]) -> Iterator[None]:
    """Run commands in parallel, and end them afterwards."""
    processes = []
    try:
        for command in commands:
            processes.append(subprocess.Popen(command))
            time.sleep(5)  # start the scheduler first, then the nodes one by one
        yield
    finally:
        for process in reversed(processes):
            process.terminate()
        for process in processes:
            process.wait()


def wait_for_workers(address: str, count: int) -> None:
    """Wait until this many workers have joined; raise TimeoutError otherwise."""
    with dask.config.set(UCX_ON_GPUS), Client(address) as client:
        client.wait_for_workers(count, timeout=WORKERS_SECONDS)


def tell(progress: Progress) -> None:
    print(f"{progress.rows_done} rows done, {progress.rows_left} left", flush=True)


if __name__ == "__main__":
    main()
