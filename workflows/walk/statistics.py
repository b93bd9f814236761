"""How are the statistics of a layer's experts collected within memory?

    usage, router, ...    of the routing alone
    amax, reap, ...       of rows on their way through experts: as many experts at a time as fit

`dask_ep.collect` computes them; what an expert sees does not depend on the experts beside it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import dask
import dask.array as da
import numpy as np
from distributed import Client
from safetensors.numpy import save_file

from dask_ep import MoELayer, collect, own_experts
from dask_ep.arrays.blas import one_blas_thread
from dask_ep.graph.statistics import ROUTING_STATISTICS

Arrays = dict[str, np.ndarray]

OF_ROUTING = frozenset({*ROUTING_STATISTICS, "router"})
"""Statistics for which no expert is computed."""


def collect_layer(
    rows: da.Array,
    layer: MoELayer,
    what: frozenset[str],
    *,
    client: Client | None,
    most: int | None,
    tell: Callable[[float], object],
) -> Arrays:
    """Collect the statistics of a layer.

    Parameters
    ----------
    rows : (N, d) what the layer is given
    layer : whose experts are watched
    what : names, as `dask_ep.collect` takes them
    client : of workers, each of which loads its share of the experts; None for this process
    most : bytes of experts in this process at a time
    tell : called with the part that is done

    Returns
    -------
    Arrays by name, as `dask_ep.collect` gives them
    """
    of_routing, of_experts = what & OF_ROUTING, what - OF_ROUTING
    found: Arrays = {}
    with _computing(client) as compute:
        if of_routing:
            found = compute(collect(rows, layer, what=of_routing))
        groups = list(expert_groups(layer, None if client else most)) if of_experts else []
        indices, weights = layer.route(rows)
        parts = []
        for number, (first, last) in enumerate(groups):
            tell(number / len(groups))
            experts = layer.experts.subset(range(first, last))
            local = _of_group(indices, first, last), weights
            parts.append(compute(collect(rows, experts, what=of_experts, routing=local)))
    joined = (
        {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}
    )
    return found | joined


def expert_groups(layer: MoELayer, most: int | None) -> Iterator[tuple[int, int]]:
    """Cut a layer's experts into groups whose weights take at most so many bytes in float32."""
    E, size = layer.experts.num_experts, layer.experts.num_experts
    if most is not None:
        size = max(1, min(E, most // layer.experts.loaded_bytes(np.dtype(np.float32))))
    for first in range(0, E, size):
        yield first, min(first + size, E)


def write(path: str, arrays: Arrays) -> None:
    """Write a safetensors file, whole or not at all."""
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path + ".new")
    os.replace(path + ".new", path)


def _of_group(indices: da.Array, first: int, last: int) -> da.Array:
    """Number the experts of a group from 0; -1 for all others."""
    return da.where((indices >= first) & (indices < last), indices - first, -1)


@contextmanager
def _computing(client: Client | None) -> Iterator[Callable[[dict[str, da.Array]], Arrays]]:
    """A function that computes arrays here, or on workers that own the experts."""
    if client is None:
        with one_blas_thread():
            yield lambda arrays: dask.compute(arrays, scheduler="threads")[0]
        return
    with own_experts(client, max(len(client.nthreads()), 1)):
        yield lambda arrays: dask.compute(arrays)[0]
