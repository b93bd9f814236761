"""What does the task of a token chunk do?

    tokens, routing ── pack ──> a packet for each owner ──> services ──> answers ── combine ──> out
                         └────> ranks that are served here: no packet   ──┘

This is the same for all schedulers: where workers do not serve ranks (local threads, or a cluster
without `own_experts`), the chunk serves them itself, with the same sort and in the same order.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np

from dask_ep.arrays.checks import check_routing, check_tokens, computing_dtype
from dask_ep.arrays.device import explain_chunk_memory, explain_memory
from dask_ep.arrays.memory import aligned
from dask_ep.arrays.namespaces import Array, namespace, to_host
from dask_ep.experts.experts import CallableExperts, Experts
from dask_ep.experts.local_experts import LocalExperts
from dask_ep.graph import tally
from dask_ep.graph.keys import experts_key
from dask_ep.kernel.device_kernel import INDEX_BYTES
from dask_ep.kernel.dispatch import dispatch, expert_parallel_dispatch
from dask_ep.kernel.error_context import error_context, explain_kernel_memory, slots_of
from dask_ep.kernel.expert import as_local_experts, check_width
from dask_ep.kernel.host_kernel import Served, answer_of_rank, begin_answers, gather
from dask_ep.kernel.pack import Combining, Packet, Packing, packet_order, slots_at
from dask_ep.kernel.segments import sort_slots
from dask_ep.kernel.statistics import Observe, Seen
from dask_ep.placement.placement import Placement

Observed = tuple[Array | None, np.ndarray]
"""Result of a chunk whose rows are observed: its output (n, d_out), None if it is not needed, and
what was observed of each expert's rows, (E, observe.width) float64."""


class Exchange(NamedTuple):
    """What all chunks of a layer have in common."""

    token: str
    #: identifies the layer in the names of its tasks
    world_size: int
    num_local: int
    #: physical experts per rank
    d_out: int
    placement: Placement | None
    #: None if physical experts are the experts themselves
    observe: Observe | None = None
    #: which statistics of the rows of each expert to collect


class ChunkPlace(NamedTuple):
    """Which chunk this is."""

    chunk: int
    first_row: int | None
    #: its index in the whole array; None if the lengths of earlier chunks are unknown
    home: int | None
    #: rank at which the chunk is at home, if the placement is local


def load_rank(
    experts: Experts | CallableExperts,
    xp: str,
    dtype: np.dtype,
    rank: int,
    token: str | None,
    **given: Sequence[np.ndarray],
) -> LocalExperts | list | None:
    """Load the experts of a rank: for the service of this worker if it has one, else as the result.

    `given` are the weights that are Dask arrays.
    """

    def load() -> LocalExperts | list:
        namespace, needed = (
            import_module(xp),
            experts.num_experts * experts.loaded_bytes(dtype, on_device=xp != "numpy"),
        )
        with (
            error_context(f"loading the experts of rank {rank}"),
            explain_memory(namespace, needed),
        ):
            return experts.load(xp=namespace, dtype=dtype, given=given or None)

    services = find_services(token, rank)
    if services is None:
        return load()
    services.open(token, rank, load)
    return None


def join_ranks(ranks: Sequence[LocalExperts | list | None]) -> list | None:
    """Return the experts of all ranks for chunks that serve them in place, None if services do.

    Raises
    ------
    RuntimeError
        If some ranks are served by workers and others are not.
    """
    served = sum(rank is None for rank in ranks)
    if served == len(ranks):
        return None
    if served:
        raise RuntimeError(
            f"{served} of {len(ranks)} ranks were loaded by services and the others not, because "
            "owners were closed or requested while experts were loaded; compute it again"
        )
    return list(ranks)


def compute_chunk_of_one_rank(
    exchange: Exchange,
    tokens: Array,
    routing: Array,
    topk_weights: Array | None,
    experts: LocalExperts,
    where: ChunkPlace,
) -> Array | Observed:
    """Return the output of a chunk if one rank has all experts: nothing is exchanged."""
    if exchange.observe is not None:
        return compute_chunk(exchange, tokens, routing, topk_weights, [experts], where)
    place = f"dispatch of token chunk {where.chunk} at rank 0 of 1"
    with (
        error_context(place, where.first_row),
        explain_kernel_memory(tokens, slots_of(routing), experts, exchange.d_out),
    ):
        start = tally.now()
        out = expert_parallel_dispatch(
            tokens, routing, experts, rank=0, world_size=1, topk_weights=topk_weights
        )
        if tally.is_recorded():
            tally.note_in_place(where.chunk, 0, _rows_with_expert(routing), start)
        check_width(out.shape[1], exchange.d_out)
        return out


def compute_chunk(
    exchange: Exchange,
    tokens: Array,
    routing: Array,
    topk_weights: Array | None,
    ranks: list | None,
    where: ChunkPlace,
) -> Array | Observed:
    """Return the output of a chunk; `ranks` has the experts of all ranks if it serves them."""
    if ranks is None:
        services = find_services(exchange.token)
        if services is None:
            raise RuntimeError(
                f"token chunk {where.chunk}: its ranks are served by workers, but this worker does "
                "not know their owners; has it been restarted with another version of dask_ep?"
            )
        return services.compute(tokens, routing, topk_weights, where, exchange)
    packing = pack(tokens, routing, topk_weights, where, exchange)
    tables: Tables = {}
    if exchange.observe is not None and not exchange.observe.output:
        for _ in _serve_in_turn(packing, ranks, where, exchange, tables):
            pass
        return None, join_tables(tables, exchange)
    if packing.k == 1 and not packing.on_device:
        out = _serve_one_slot(packing, ranks, where, exchange, tables)
    else:
        in_turn = _serve_in_turn(packing, ranks, where, exchange, tables)
        out = combine(packing, in_turn, where, exchange)
    return out if exchange.observe is None else (out, join_tables(tables, exchange))


def pack(
    tokens: Array, routing: Array, topk_weights: Array | None, where: ChunkPlace, exchange: Exchange
) -> Packing:
    """Check a chunk and sort its slots by physical expert."""
    with error_context(_pack_of(where.chunk), where.first_row):
        check_tokens(tokens)
        check_routing(routing, topk_weights, n=tokens.shape[0])
        with explain_chunk_memory(tokens, _packed_row_bytes(tokens, slots_of(routing))):
            if exchange.placement is not None:
                routing = exchange.placement.rewrite(routing, where.first_row or 0, where.home)
            return Packing(
                aligned(tokens), routing, topk_weights, exchange.num_local, exchange.world_size
            )


def cut(packing: Packing, ranks: Sequence[int], chunk: int) -> Packet:
    """Gather the part of a chunk that the owner of some ranks needs."""
    tokens = packing.tokens
    with (
        error_context(_pack_of(chunk)),
        explain_chunk_memory(tokens, _packed_row_bytes(tokens, packing.k)),
    ):
        return packing.packet(ranks)


def combine(
    packing: Packing, answers: Iterable[tuple[int, Array]], where: ChunkPlace, exchange: Exchange
) -> Array:
    """Add up (rank, answer) pairs, which come in the order of ranks, to the output of a chunk."""
    tokens = packing.tokens
    sums = computing_dtype(tokens.dtype).itemsize + tokens.dtype.itemsize
    one = exchange.d_out * sums + (exchange.world_size + packing.k) * INDEX_BYTES
    place = f"combine of token chunk {where.chunk}"
    with error_context(place), explain_chunk_memory(tokens, one):
        total = Combining(packing, exchange.d_out, tokens.dtype)
    for rank, answer in answers:
        with error_context(place), explain_chunk_memory(tokens, one):
            total.add(rank, answer)
    return total.output()


Tables = dict[int, np.ndarray]
"""What was observed of the rows of each rank's experts, (num_local, observe.width), by rank."""


def begin_seen(observe: Observe | None, rank: int, num_local: int) -> Seen | None:
    """Return a collector of statistics of the rows of a rank's experts, if any are collected."""
    return None if observe is None else Seen(observe, num_local, rank * num_local)


def join_tables(tables: Tables, exchange: Exchange) -> np.ndarray:
    """Join what was observed of each expert's rows, replicas in the order of the ranks."""
    observe, placement = exchange.observe, exchange.placement
    assert observe is not None
    in_order = list(range(exchange.world_size * exchange.num_local))
    order = in_order if placement is None else placement.order()
    joined = np.zeros((max(order) + 1, observe.width))
    for rank in sorted(tables):
        first = rank * exchange.num_local
        physical = np.array(order[first : first + exchange.num_local])
        held = physical >= 0
        observe.join(joined, tables[rank][held], physical[held])
    return joined


# --- serving: a rank's experts compute a packet, or the chunk itself ----------------------------


def serve_in_place(
    packing: Packing,
    rank: int,
    experts: Sequence[Any],
    chunk: int,
    d_out: int,
    seen: Seen | None = None,
    out: Array | None = None,
) -> Array:
    """Return the answer of a rank that is served here, without a packet; on the host, in `out`."""
    if packing.on_device:
        packet = cut(packing, [rank], chunk)
        return _serve_on_device(packet, rank, experts, packing, chunk, d_out)
    with error_context(_place(chunk, rank, packing.world_size)):
        return answer_of_rank(
            packing.tokens, packing.segments, packing.topk_weights, experts, rank, d_out, seen, out
        )


def serve_packet(
    packet: Packet,
    ranks: Sequence[int],
    experts: Sequence[Sequence[Any]],
    chunk: int,
    exchange: Exchange,
    seen: Sequence[Seen | None],
) -> tuple[Array | None, list[Array]]:
    """Return the answers of some ranks to the packet that they share; one sort serves all of them.

    On the host they are parts of one array, which is returned first, so that it is sent as one.
    """
    packet = Packet(*(None if a is None else aligned(a) for a in packet))
    rows, routing, weights = packet
    if namespace(rows) is not np:
        return None, [
            _serve_on_device(
                packet if len(ranks) == 1 else _part_of(packet, rank, exchange.num_local),
                rank, local, exchange, chunk, exchange.d_out,
            )
            for rank, local in zip(ranks, experts, strict=True)
        ]  # fmt: skip
    places = exchange.num_local * exchange.world_size
    segments = sort_slots(routing, weights, places, 0, 1)
    whole, parts = begin_answers(
        rows, segments, ranks, exchange.num_local, exchange.d_out, wants_output(exchange.observe)
    )
    for rank, local, keeper, out in zip(ranks, experts, seen, parts, strict=True):
        with error_context(_place(chunk, rank, exchange.world_size)):
            answer_of_rank(rows, segments, weights, local, rank, exchange.d_out, keeper, out)
    return whole, parts


def wants_output(observe: Observe | None) -> bool:
    """Whether the output of rows is needed, not only what is observed of them."""
    return observe is None or observe.output


def _serve_in_turn(
    packing: Packing,
    ranks: Sequence[Sequence[Any]],
    where: ChunkPlace,
    exchange: Exchange,
    tables: Tables,
) -> Iterator[tuple[int, Array]]:
    """Yield ranks with their answers, one after the other, if the chunk serves them itself."""
    for rank in packing.ranks:
        start = tally.now()
        seen = begin_seen(exchange.observe, rank, exchange.num_local)
        answer = serve_in_place(packing, rank, ranks[rank], where.chunk, exchange.d_out, seen)
        if seen is not None:
            tables[rank] = seen.table
        tally.note_in_place(where.chunk, rank, len(answer) or packing.count(rank), start)
        yield rank, answer


def _serve_one_slot(
    packing: Packing,
    ranks: Sequence[Sequence[Any]],
    where: ChunkPlace,
    exchange: Exchange,
    tables: Tables,
) -> Array:
    """With one slot per row nothing is added up: experts write to the output directly."""
    tokens, weights = packing.tokens, packing.topk_weights
    compute = computing_dtype(tokens.dtype)
    seen = begin_seen(exchange.observe, 0, exchange.num_local * exchange.world_size)
    served = Served(tokens, packing.segments, weights, exchange.d_out, seen=seen)
    for rank in packing.ranks:
        with error_context(_place(where.chunk, rank, exchange.world_size)):
            start, first = tally.now(), rank * exchange.num_local
            local = as_local_experts(
                ranks[rank], d=packing.d, like=tokens, dtype=compute, d_out=exchange.d_out
            )
            for e, expert in enumerate(local, first):
                served.add(e, expert)
        tally.note_in_place(where.chunk, rank, packing.count(rank), start)
        if seen is not None:
            tables[rank] = seen.table[first : first + exchange.num_local]
    return served.out.astype(tokens.dtype, copy=False)


def _serve_on_device(
    packet: Packet,
    rank: int,
    experts: Sequence[Any],
    layer: Packing | Exchange,
    chunk: int,
    d_out: int,
) -> Array:
    """Return the answer of one rank to its own rows, on a device."""
    rows, routing, weights = packet
    k = slots_of(routing)
    sums = rows.dtype if k == 1 else computing_dtype(rows.dtype)
    with (
        error_context(_place(chunk, rank, layer.world_size)),
        explain_kernel_memory(rows, k, experts, d_out),
    ):
        out = dispatch(rows, routing, weights, experts, rank, layer.world_size, dtype=sums)
        check_width(out.shape[1], d_out)
        return out


def _part_of(packet: Packet, rank: int, num_local: int) -> Packet:
    """Return the rows of a packet that one of its ranks serves, on a device."""
    order, count = packet_order(packet.routing, rank, num_local)
    index = order[: to_host(count)[0]]
    xp, served = namespace(order), packet.routing[index]
    here = xp.where(slots_at(served, rank, num_local), served, served.dtype.type(-1))
    weights = None if packet.topk_weights is None else packet.topk_weights[index]
    return Packet(gather(packet.rows, index, packet.rows.dtype), here, weights)


def _packed_row_bytes(tokens: Array, k: int) -> int:
    """Bytes that a row takes on a device while it is packed."""
    return tokens.shape[1] * tokens.dtype.itemsize + k * INDEX_BYTES


def _pack_of(chunk: int) -> str:
    return f"pack of token chunk {chunk}"


def _rows_with_expert(routing: Array) -> int:
    """Rows of a chunk that have an expert."""
    served = routing >= 0
    (count,) = to_host((served if served.ndim == 1 else served.any(axis=1)).sum())
    return count


def _place(chunk: int, rank: int, world_size: int) -> str:
    return f"dispatch of token chunk {chunk} at rank {rank} of {world_size}"


def find_services(token: str | None, rank: int | None = None) -> Any:
    """The services of the worker that runs this task, if they serve the ranks of this layer.

    With a rank: if this is the worker's task that loads it. A graph that some other task computes
    by itself has tasks of the same names.
    """
    module = sys.modules.get("dask_ep.cluster.exchange")
    if module is None or token is None:
        return None
    return module.services_of(token, None if rank is None else experts_key(token, rank))
