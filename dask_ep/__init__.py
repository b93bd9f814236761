"""Expert-parallel Mixture-of-Experts layers on Dask arrays, for more tokens than memory holds."""

from __future__ import annotations

from importlib import import_module

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

__all__ = sorted(_HOME)
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
