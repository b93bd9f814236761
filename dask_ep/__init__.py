"""Expert-parallel Mixture-of-Experts layers on Dask arrays, for more tokens than memory holds."""

from __future__ import annotations

from importlib import import_module

_HOME = {
    "expert_parallel_dispatch": "dispatch",
    "Experts": "experts",
    "expert_parallel": "pipeline",
    "MoELayer": "layer",
    "Router": "routing",
    "Placement": "placement",
    "load_moe_layer": "checkpoint",
    "own_experts": "ownership",
    "open_tokens": "storage",
    "plan": "planner",
    "store": "storage",
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
