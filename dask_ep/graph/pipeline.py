"""How does a layer become a Dask graph?

    tokens (c)   routing (c)             experts, wherever they are
       │              │                             │
       │              │                             v
       │              │                      ep_experts (r)      on the worker that serves rank r
       │              │                             │
       │              │                         ep_ranks         all ranks are loaded
       v              v                             │
    ep_chunk (c) <──────────────────────────────────┘            where the chunk is read

C chunks and R ranks make C + R + 1 tasks; with one rank, which exchanges nothing, C + 1. `ep_chunk`
is a Blockwise layer, which Dask fuses with the reading before and the writing after. `chunk` has
what it computes; `exchange` and `ownership` have who serves a rank.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import dask
import dask.array as da
import numpy as np
from dask.base import tokenize
from dask.blockwise import BlockwiseDepDict, blockwise
from dask.core import flatten
from dask.highlevelgraph import HighLevelGraph
from dask.task_spec import List, Task, TaskRef

from dask_ep.arrays.checks import (
    check_routing,
    check_tokens,
    check_world_size,
    computing_dtype,
    kind_of,
)
from dask_ep.arrays.namespaces import namespace
from dask_ep.experts.experts import CallableExperts, Experts, as_experts
from dask_ep.graph.chunk import (
    ChunkPlace,
    Exchange,
    compute_chunk,
    compute_chunk_of_one_rank,
    join_ranks,
    load_rank,
)
from dask_ep.graph.keys import chunk_name, experts_key, ranks_key
from dask_ep.graph.rows import array_of, first_rows, one_chunk_wide
from dask_ep.kernel.statistics import Observe
from dask_ep.placement.placement import Placement
from dask_ep.placement.placement_files import Asked, find_placement
from dask_ep.placement.policies import contiguous
from dask_ep.placement.routing_stats import survey

TASKS_ADVISED = 100_000
"""Tasks above which building warns: 50 s of the scheduler."""


class UnpinnedWarning(UserWarning):
    """Warns that ranks have no owners: every worker may have to load every rank's experts."""


def expert_parallel(
    tokens: da.Array,
    routing: da.Array,
    experts: Any,
    *,
    topk_weights: da.Array | None = None,
    world_size: int | None = None,
    placement: Asked = None,
    precision: str | None = None,
) -> da.Array:
    """Apply a layer's experts to chunked token rows, each row to the experts it is routed to.

    Parameters
    ----------
    tokens : (N, d) Dask array of floats, NumPy- or CuPy-backed
        Chunked along the rows, of known or unknown lengths.
    routing : (N,) or (N, k) Dask array of integers
        Expert indices; -1 means no expert. Rechunked to the rows of `tokens`; if lengths are
        unknown, it must have as many chunks.
    experts : Experts, (E, d, d_out) array, list of matrices, or list of callables
        See `Experts`; bare matrices are linear experts.
    topk_weights : Dask array of floats of the shape of routing, optional
        Multiplies the output of each slot's expert.
    world_size : int, optional
        R, the number of ranks that share the experts. Default: the number of workers of the Dask
        client in use; 1 without a client, since threads share memory.
    placement : Placement, name of a policy, or path of a placement file, optional
        Which rank holds which expert; default: "contiguous", rank r owns the next E/R experts. The
        other policies ("packed", "balanced", "exact") place experts by their load: with more than
        one rank they read the routing while the graph is built, once and chunk by chunk. With a
        local placement (`dask_ep.laws.travel`), an owner of a chunk's home reads the chunk.
    precision : "float32" or "bfloat16", optional
        Precision of 16-bit products, see `Experts.with_precision`; default: that of the experts.

    Returns
    -------
    (N, d_out) Dask array of the tokens' dtype, lazy, in the order and chunks of the tokens

    Raises
    ------
    ValueError, TypeError
        If shapes, dtypes, chunks or sizes do not fit, before anything is computed. Bad values (an
        index out of range, a NaN weight) are errors of the task, which name chunk and rank.

    Warns
    -----
    UnpinnedWarning
        If there are several ranks on a cluster without `own_experts`: correct, but slower.
    dask.array.PerformanceWarning
        With more than `TASKS_ADVISED` tasks.

    Notes
    -----
    C + R + 1 tasks for C chunks; with R = 1, C + 1. A row travels to the owner of its ranks once,
    however many of its slots are served there, and one summed row comes back from each rank.
    In memory at once: a few chunks per thread and the experts. The same chunks, ranks and
    placement give the same bits on every scheduler, after any failure. Building the graph computes
    nothing, except the load for a placement by name; tokens are never read.
    Chunks on a device stay there: packing one and serving a rank bring one copy of a few integers
    to the host each, a placement another; only experts and a placement's tables go to the device.

    Examples
    --------
    >>> import dask.array as da, numpy as np
    >>> from dask_ep import expert_parallel
    >>> tokens = da.ones((6, 2), chunks=(4, 2))
    >>> routing = da.from_array(np.array([0, 1, 2, 3, 0, -1]), chunks=4)
    >>> experts = np.arange(4.0)[:, None, None] * np.eye(2)  # expert e multiplies by e
    >>> y = expert_parallel(tokens, routing, experts, world_size=2)
    >>> y.compute(scheduler="sync")[:, 0]
    array([0., 1., 2., 3., 0., 0.])
    """
    ready = prepare(tokens, routing, experts, topk_weights, world_size, placement, precision)
    return build_chunks(ready)


class Ready(NamedTuple):
    """The inputs of a layer's chunks: checked, and in the row chunks of the tokens."""

    tokens: da.Array
    routing: da.Array
    topk_weights: da.Array | None
    experts: Experts | CallableExperts
    world_size: int
    placement: Placement | None


def prepare(
    tokens: da.Array,
    routing: da.Array,
    experts: Any,
    topk_weights: da.Array | None,
    world_size: int | None,
    placement: Asked,
    precision: str | None = None,
) -> Ready:
    """Check the arguments of `expert_parallel`, and decide on ranks and placement."""
    _refuse_array_expressions()
    experts = as_experts(experts)
    if precision is not None:
        experts = experts.with_precision(precision)
    tokens, routing, topk_weights = _aligned(tokens, routing, topk_weights)
    _check_widths(tokens, experts)
    world_size, placement = _ranks(experts, world_size, placement, tokens, routing)
    _warn_of_many_tasks(len(tokens.chunks[0]), world_size)
    if world_size > 1:
        _warn_if_unpinned(world_size)
    return Ready(tokens, routing, topk_weights, experts, world_size, placement)


def count_tasks(num_chunks: int, world_size: int) -> int:
    """Return how many tasks `expert_parallel` makes, without those of its inputs."""
    return num_chunks + (1 if world_size == 1 else world_size + 1)


# --- the graph ---------------------------------------------------------------------------------


class Unfused(Task):
    """A task that Dask does not fuse with others, since its key is looked up."""

    __slots__ = ()

    @property
    def block_fusion(self) -> bool:
        return True


def build_chunks(ready: Ready, observe: Observe | None = None) -> da.Array:
    """Return the output of a layer; its blocks are `Observed` if its rows are observed."""
    tokens, routing, topk_weights, experts, world_size, placement = ready
    watched = () if observe is None else (observe,)
    token = tokenize(tokens, routing, topk_weights, experts, world_size, placement, *watched)
    order = list(range(experts.num_experts)) if placement is None else placement.order()
    num_local, d_out = len(order) // world_size, width_of_output(experts, tokens)
    of_ranks = [order[r * num_local : (r + 1) * num_local] for r in range(world_size)]
    at_home = placement is not None and placement.local
    layer = _layer(token, experts, of_ranks, tokens, at_home=at_home)

    chunks, name = tokens.chunks[0], chunk_name(token)
    places = {
        (c,): ChunkPlace(c, first_row, None if placement is None else placement.home(c))
        for c, first_row in enumerate(first_rows(chunks))
    }
    arrays: list[Any] = [a for a in (tokens, routing, topk_weights, layer) if a is not None]
    inputs = [
        pair
        for array in (tokens, routing, topk_weights)
        for pair in ((None, None) if array is None else (array.name, "nd"[: array.ndim]))
    ]
    exchange = Exchange(token, world_size, num_local, d_out, placement, observe)
    graph = HighLevelGraph.from_collections(
        name,
        blockwise(
            partial(compute_chunk_of_one_rank if world_size == 1 else compute_chunk, exchange),
            name,
            "nd",
            *inputs,
            layer.name,
            "",
            BlockwiseDepDict(places, numblocks=(len(chunks),)),
            "n",
            numblocks={array.name: array.numblocks for array in arrays},
        ),
        dependencies=arrays,
    )
    return da.Array(graph, name, (chunks, (d_out,)), meta=tokens._meta, dtype=tokens.dtype)


def _layer(
    token: str,
    experts: Experts | CallableExperts,
    of_ranks: Sequence[Sequence[int]],
    tokens: da.Array,
    at_home: bool,
) -> da.Array:
    """Return the experts of all ranks as an array without axes, on which every chunk depends."""
    tasks: dict[Any, Task] = {}
    dependencies: list[da.Array] = []
    xp = namespace(tokens._meta).__name__
    dtype = computing_dtype(tokens.dtype, xp != "numpy" and experts.precision == "bfloat16")
    several = len(of_ranks) > 1
    for r, ids in enumerate(of_ranks):
        local = experts.subset(ids)
        lazy = local.collections()
        dependencies.extend(lazy.values())
        key = experts_key(token, r if several else None)
        given: dict[str, Any] = {
            n: TaskRef(next(iter(flatten(a.__dask_keys__())))) for n, a in lazy.items()
        }
        served_as = token if several else None
        tasks[key] = Unfused(key, load_rank, local.detached(), xp, dtype, r, served_as, **given)
    if several:
        key = ranks_key(token, at_home=at_home)
        tasks[key] = Unfused(key, join_ranks, List([TaskRef(rank) for rank in list(tasks)]))
    return array_of(key[0], tasks, dependencies, (), np.empty((), object))


# --- checks ----------------------------------------------------------------------------------


def _aligned(
    tokens: da.Array, routing: da.Array, topk_weights: da.Array | None
) -> tuple[da.Array, da.Array, da.Array | None]:
    """Check the inputs and give them the row chunks of the tokens, one chunk wide."""
    _check_dask(tokens, "tokens")
    check_tokens(tokens)
    _check_dask(routing, "routing")
    if topk_weights is not None:
        _check_dask(topk_weights, "topk_weights")
    check_routing(routing, topk_weights, n=tokens.shape[0])
    tokens = one_chunk_wide(tokens)
    routing = one_chunk_wide(_with_rows_of(tokens, routing, "routing"))
    if topk_weights is not None:
        topk_weights = one_chunk_wide(_with_rows_of(tokens, topk_weights, "topk_weights"))
    return tokens, routing, topk_weights


def _check_dask(array: Any, name: str) -> None:
    if not isinstance(array, da.Array):
        raise TypeError(
            f"{name} must be a Dask array, but is a {kind_of(array)}; "
            "use da.from_array, dask_ep.open_tokens, or expert_parallel_dispatch on one chunk"
        )


def _with_rows_of(tokens: da.Array, array: da.Array, name: str) -> da.Array:
    ours, theirs = tokens.chunks[0], array.chunks[0]
    unknown = any(map(math.isnan, ours + theirs))
    if ours == theirs or (unknown and len(ours) == len(theirs)):
        return array
    if tokens.shape[0] == 0:  # rechunk would leave no rows in one chunk
        return da.zeros_like(array, chunks=(ours, *array.chunks[1:]))
    if unknown:
        raise ValueError(
            f"with row chunks of unknown length, tokens and {name} must come in the same chunks, "
            f"but tokens have {len(ours)} and {name} {len(theirs)}; "
            "rechunk them where their lengths are known, or call compute_chunk_sizes() on both"
        )
    return array.rechunk({0: ours})


def _check_widths(tokens: da.Array, experts: Experts | CallableExperts) -> None:
    d = tokens.shape[1]
    if experts.d is not None and experts.d != d:
        raise ValueError(
            f"experts take rows of width d={experts.d}, but tokens have width {d} "
            f"(shape {tokens.shape}); pass tokens of the experts' width"
        )


def _ranks(
    experts: Experts | CallableExperts,
    world_size: int | None,
    placement: Asked,
    tokens: da.Array,
    routing: da.Array,
) -> tuple[int, Placement | None]:
    """Return the number of ranks, and the placement unless it is E/R experts each in order."""
    if world_size is None:
        world_size = placement.world_size if isinstance(placement, Placement) else workers_in_use()
    check_world_size(world_size)
    world_size = int(world_size)
    known_rows = not any(map(math.isnan, tokens.chunks[0]))
    found = find_placement(
        placement,
        experts.num_experts,
        world_size,
        lambda: survey(routing, experts.num_experts, known_rows=known_rows).by_ticket,
    )
    if world_size == 1:
        return 1, None
    if found is None and experts.num_experts % world_size:
        found = contiguous(experts.num_experts, world_size)
    return world_size, found


def _refuse_array_expressions() -> None:
    if da.array_expr_enabled():
        raise RuntimeError(
            "dask_ep builds classic Dask arrays, but array expressions are switched on; set "
            'dask.config "array.query-planning" to False (or DASK_ARRAY__QUERY_PLANNING=False) '
            "before dask.array is first imported"
        )


def _warn_of_many_tasks(num_chunks: int, world_size: int) -> None:
    tasks = count_tasks(num_chunks, world_size)
    if tasks > TASKS_ADVISED:
        warnings.warn(
            f"{num_chunks} chunks and {world_size} ranks make {tasks} tasks (C + R + 1), about "
            f"{tasks * 0.5e-3:.0f} s of the scheduler; use larger token chunks",
            da.PerformanceWarning,
            stacklevel=4,
        )


def _warn_if_unpinned(world_size: int) -> None:
    client = _client_in_use()
    if client is None or _knows_owners(client):
        return
    warnings.warn(
        f"the {world_size} ranks have no owners, so that every worker may load the experts of "
        "every rank; call dask_ep.own_experts(client) once to pin each rank to a worker",
        UnpinnedWarning,
        stacklevel=4,
    )


# --- small things ----------------------------------------------------------------------------


def workers_in_use() -> int:
    client = _client_in_use()
    if client is None:
        return 1
    if client.asynchronous:  # it cannot be queried here, but the scheduler updates it periodically
        return max(client.scheduler_info().get("n_workers", 0), 1)
    return max(len(client.nthreads()), 1)


def _knows_owners(client: Any) -> bool:
    """Whether ranks have owners; False for a client that cannot be queried here."""
    if client.asynchronous:
        return False
    return client.get_metadata(["dask-ep", "owners"], default=None) is not None


def _client_in_use() -> Any:
    """Return the client that would compute, if any; `distributed` is not imported to find out."""
    distributed = sys.modules.get("distributed")
    if distributed is None or dask.config.get("scheduler", None) not in (None, "dask.distributed"):
        return None  # a default client sets "dask.distributed"; any other setting takes precedence
    try:
        return distributed.default_client()
    except ValueError:
        return None


def width_of_output(experts: Experts | CallableExperts, tokens: da.Array) -> int:
    return tokens.shape[1] if experts.d_out is None else experts.d_out
