"""Expert-parallel Mixture-of-Experts layers on Dask arrays, for more tokens than memory holds."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # editors and type checkers read this, and import the names at once
    from dask_ep.cluster.ownership import own_experts
    from dask_ep.experts.experts import Experts
    from dask_ep.graph.pipeline import expert_parallel
    from dask_ep.jobs.plan import plan
    from dask_ep.kernel.dispatch import expert_parallel_dispatch
    from dask_ep.layers.checkpoint import load_moe_layer
    from dask_ep.layers.collect import collect
    from dask_ep.layers.layer import MoELayer
    from dask_ep.layers.routing import Router
    from dask_ep.placement.policies import Placement
    from dask_ep.storage.storage import open_tokens, store

_HOME = {
    "expert_parallel_dispatch": "kernel.dispatch",
    "Experts": "experts.experts",
    "expert_parallel": "graph.pipeline",
    "MoELayer": "layers.layer",
    "collect": "layers.collect",
    "Router": "layers.routing",
    "Placement": "placement.policies",
    "load_moe_layer": "layers.checkpoint",
    "own_experts": "cluster.ownership",
    "open_tokens": "storage.storage",
    "plan": "jobs.plan",
    "store": "storage.storage",
}
"""Where each public name lives; a module is imported when one of its names is first used."""

__all__ = [
    "Experts", "MoELayer", "Placement", "Router", "collect", "expert_parallel",
    "expert_parallel_dispatch", "load_moe_layer", "open_tokens", "own_experts", "plan", "store",
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
