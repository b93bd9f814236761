"""Expert-parallel Mixture-of-Experts layers on Dask arrays, for more tokens than memory holds."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # editors and type checkers read this, and import the names at once
    from dask_ep.cluster.gpus import Gpus
    from dask_ep.cluster.owner_rules import OwnerRules
    from dask_ep.cluster.ownership import own_experts
    from dask_ep.errors import DoesNotFit, JobError
    from dask_ep.experts.experts import Experts
    from dask_ep.graph.pipeline import expert_parallel
    from dask_ep.jobs.backends import Cluster, Processes, Threads
    from dask_ep.jobs.job import Job, load_job
    from dask_ep.jobs.plan import Machine, plan, plan_job, what_if, what_if_job
    from dask_ep.jobs.result import RunResult
    from dask_ep.jobs.run import run_job
    from dask_ep.jobs.verify import Verification, verify_job
    from dask_ep.kernel.dispatch import expert_parallel_dispatch
    from dask_ep.laws.costs import Rates
    from dask_ep.laws.travel import Travel
    from dask_ep.layers.checkpoint import load_moe_layer
    from dask_ep.layers.collect import collect
    from dask_ep.layers.layer import MoELayer
    from dask_ep.layers.router import Router
    from dask_ep.placement.placement import Placement
    from dask_ep.storage.storage import open_tokens, store

_HOME = {
    "Cluster": "jobs.backends",
    "DoesNotFit": "errors",
    "Experts": "experts.experts",
    "Gpus": "cluster.gpus",
    "Job": "jobs.job",
    "JobError": "errors",
    "Machine": "jobs.plan",
    "MoELayer": "layers.layer",
    "OwnerRules": "cluster.owner_rules",
    "Placement": "placement.placement",
    "Processes": "jobs.backends",
    "Rates": "laws.costs",
    "Router": "layers.router",
    "RunResult": "jobs.result",
    "Threads": "jobs.backends",
    "Travel": "laws.travel",
    "Verification": "jobs.verify",
    "collect": "layers.collect",
    "expert_parallel": "graph.pipeline",
    "expert_parallel_dispatch": "kernel.dispatch",
    "load_job": "jobs.job",
    "load_moe_layer": "layers.checkpoint",
    "open_tokens": "storage.storage",
    "own_experts": "cluster.ownership",
    "plan": "jobs.plan",
    "plan_job": "jobs.plan",
    "run_job": "jobs.run",
    "store": "storage.storage",
    "verify_job": "jobs.verify",
    "what_if": "jobs.plan",
    "what_if_job": "jobs.plan",
}
"""Where each public name lives; a module is imported when one of its names is first used."""

__all__ = [
    "Cluster", "DoesNotFit", "Experts", "Gpus", "Job", "JobError", "Machine", "MoELayer",
    "OwnerRules", "Placement", "Processes", "Rates", "Router", "RunResult", "Threads", "Travel",
    "Verification", "collect", "expert_parallel", "expert_parallel_dispatch", "load_job",
    "load_moe_layer", "open_tokens", "own_experts", "plan", "plan_job", "run_job", "store",
    "verify_job", "what_if", "what_if_job",
]  # fmt: skip
__version__ = "0.1.0"

if not TYPE_CHECKING:  # to a type checker, a name that is not above is an error

    def __getattr__(name: str) -> object:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
