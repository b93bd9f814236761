"""What must hold for the parts of a layer, and for its inputs?"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import dask.array as da

from dask_ep.arrays.checks import check_byte_order, is_float, kind_of, refuse_masked
from dask_ep.experts.experts import CallableExperts, Experts
from dask_ep.layers.capacity import Capacity, ExpertChoice
from dask_ep.layers.lazy_routing import SmallArray
from dask_ep.layers.routing import Router
from dask_ep.layers.row_steps import Around
from dask_ep.storage.sources import Source, open_source, refuse_missing


def small_array(name: str, value: Any, router: Router | ExpertChoice, d: int | None) -> SmallArray:
    """Check one of the small arrays; a single row may have an extra axis of length 1."""
    source = open_source(value, None if isinstance(value, Source) else name)
    refuse_missing(source)
    if name == "table":
        if len(source.shape) != 2 or source.dtype.kind not in "iu":
            raise ValueError(
                f"{source.name} must be a (vocabulary, k) table of integers, but has shape "
                f"{source.shape} and dtype {source.dtype}"
            )
        if isinstance(router, ExpertChoice) or source.shape[1] != router.slots:
            raise ValueError(
                f"{source.name} must have k columns for the slots of a Router, but has shape "
                f"{source.shape} and the router is {router}"
            )
        return SmallArray(source, source.shape)
    if not is_float(source.dtype):
        raise TypeError(f"{source.name} must hold floats, but has dtype {source.dtype}")
    E = router.num_experts
    d = source.shape[-1] if d is None else d  # None: callables
    shape = {"weight": (E, d), "shared_gate": (d,), "input_scale": (d,)}.get(name, (E,))
    if name == "selection_bias" and isinstance(router, Router):
        shape = (E - router.always,)
    if name == "per_expert_scale" and source.shape == (1,):
        return SmallArray(source, (1,))
    if source.shape not in (shape, (1, *shape)):
        raise ValueError(
            f"{source.name} must be {shape} for E={E} and d={d}, but has shape {source.shape}"
        )
    return SmallArray(source, shape)


def check_parts(
    router: Router | ExpertChoice,
    experts: Experts | CallableExperts,
    shared: Experts | CallableExperts | None,
    around: Around,
    arrays: Collection[str],
    capacity: Capacity | None,
    residual: bool,
) -> None:
    """Raise unless the parts of a layer fit together."""
    E, d, d_out = router.num_experts, around.d(experts), around.d_out(experts)
    beyond = E - experts.num_experts
    if around.beyond == "shared" and (shared is None or shared.num_experts != beyond):
        raise ValueError(
            f"with beyond='shared' the router must have each shared expert: it has {E} experts, "
            f"{beyond} more than the {experts.num_experts} routed ones, but there are "
            f"{0 if shared is None else shared.num_experts} shared experts"
        )
    if beyond if around.beyond is None else beyond < 1:
        raise ValueError(
            f"router and experts must agree on E, but the router chooses among num_experts={E} "
            f"and there are {experts.num_experts} experts"
        )
    on_input = getattr(experts, "options", {}).get("apply_router_weight_on_input", False)
    if on_input != router.apply_router_weight_on_input:
        raise ValueError(
            "router and experts must agree on apply_router_weight_on_input, but the router "
            f"has {router.apply_router_weight_on_input!r} and the experts {on_input!r}"
        )
    if capacity is not None and isinstance(router, ExpertChoice):
        raise ValueError("expert choice has its own capacity, so capacity must be None with it")
    if (
        shared is not None
        and None not in (shared.d, d)
        and ((shared.d, shared.d_out) != (d, d_out))
    ):
        raise ValueError(
            f"shared experts must be as wide as the others, {d} to {d_out}, but "
            f"are {shared.d} to {shared.d_out}"
        )
    if "selection_bias" in arrays and ("table" in arrays or isinstance(router, ExpertChoice)):
        raise ValueError(
            "a selection_bias changes which experts a row chooses, so it must be None where a "
            "table or the experts choose"
        )
    if shared is None and "shared_gate" in arrays:
        raise ValueError("shared_gate weights shared experts, so it must be None without them")
    if residual and None not in (d, d_out) and d != d_out:
        raise ValueError(
            f"a residual needs outputs as wide as the rows, but experts go from {d} to {d_out}"
        )


def check_hidden(hidden: da.Array, d: int | None) -> None:
    """Raise unless these are hidden states of a layer of width `d`; None: of any."""
    if not isinstance(hidden, da.Array):
        raise TypeError(
            f"hidden must be a Dask array, but is a {kind_of(hidden)}; wrap it with "
            "dask.array.from_array(hidden, chunks=...)"
        )
    refuse_masked(hidden, "hidden")
    if hidden.ndim < 2 or not is_float(hidden.dtype):
        raise ValueError(
            "hidden must be (..., d) floats with at least one axis before d, but has shape "
            f"{hidden.shape} and dtype {hidden.dtype}"
        )
    check_byte_order(hidden.dtype, "hidden")
    if d is not None and hidden.shape[-1] != d:
        raise ValueError(f"hidden must have the layer's width d={d}, but has shape {hidden.shape}")


def check_routes(arrays: Collection[str]) -> None:
    """Raise unless a layer with these small arrays can route."""
    if "weight" not in arrays and "table" not in arrays:
        raise ValueError(
            "this layer has no router_weight and no table; pass routing=(indices, topk_weights)"
        )


def check_token_ids(token_ids: Any, arrays: Collection[str]) -> None:
    """Raise unless token ids are given where they are needed, and only there."""
    if ("table" in arrays) != (token_ids is not None):
        raise ValueError(
            "token_ids must be given to a layer with a table, and to no other; this layer has "
            f"{'a' if 'table' in arrays else 'no'} table"
        )
