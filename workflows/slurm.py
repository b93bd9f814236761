"""How does a job run on a SLURM cluster?

    python workflows/slurm.py job.toml --workers 8          run it, each worker a SLURM job
    python workflows/slurm.py job.toml --resume             go on with what is left
    python workflows/slurm.py --print                       show the script that SLURM gets

This process is the scheduler and the client: start it on a node that stays, such as a login node or
within an allocation of its own. Workers may come late and be preempted, others are asked for in
their place, and ranks move to those that are there. All nodes see the files of the job.

Needs dask-jobqueue. Change the five lines of SITE for your own site.
"""

from __future__ import annotations

import argparse
import os

from dask_jobqueue import SLURMCluster

from dask_ep.job import load_job
from dask_ep.places import Cluster
from dask_ep.run import Progress, run_job

SITE = {
    "queue": os.environ.get("SLURM_PARTITION"),  # the partition; None is the site's default
    "account": os.environ.get("SLURM_ACCOUNT"),  # whom it is charged to
    "memory": os.environ.get("WORKER_MEMORY", "8 GiB"),  # a worker's: its experts, a few chunks
    "walltime": "04:00:00",  # after which SLURM ends a worker; --resume goes on
    "job_script_prologue": [],  # what makes dask_ep importable: "source ~/venv/bin/activate"
}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("job", nargs="?", help="a TOML file")
    options.add_argument(
        "--workers", type=int, default=4, help="SLURM jobs of one core each; ranks"
    )
    options.add_argument("--resume", action="store_true")
    options.add_argument("--print", action="store_true", dest="only_print")
    asked = options.parse_args()
    if asked.job is None and not asked.only_print:
        options.error("give a job, or --print")
    with SLURMCluster(
        cores=1,
        processes=1,
        scheduler_options={"dashboard_address": ":0"},
        **SITE,
    ) as cluster:
        print(cluster.job_script())
        if not asked.only_print:
            cluster.adapt(minimum_jobs=asked.workers, maximum_jobs=asked.workers)
            cluster.wait_for_workers(1)  # the others find their ranks when they come
            job = load_job(asked.job, world_size=asked.workers)
            where = Cluster(cluster.scheduler_address)
            print(run_job(job, where, resume=asked.resume, on_progress=tell))


def tell(progress: Progress) -> None:
    print(f"{progress.rows_done} rows done, {progress.rows_left} left", flush=True)


if __name__ == "__main__":
    main()
