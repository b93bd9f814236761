"""Which token chunks fit into the memory that a run may use, and what would fit instead?

Decided from shapes alone, before anything is read. The law is that of plans (`costs.Need`); what
only the routing knows, to how many ranks a row goes, is taken at its worst.

    Inputs, Layout ── need ──> Need ── choose_chunk_rows ──> rows of a chunk
                                 │                 └──────> DoesNotFit, with what would
                                 └──── hold_what_fits ─────> Inputs with experts as they are stored
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

from dask_ep.build import Inputs, read_placement
from dask_ep.checks import computing_dtype
from dask_ep.costs import CHUNKS_PER_THREAD, FEWEST_ROWS, SORT_BYTES, Need, chunks_held, usable
from dask_ep.device_memory import DEVICE_CHUNK_BYTES, OnDevice
from dask_ep.held import StoredExperts, held_as_stored
from dask_ep.placement import POLICIES, most_slots
from dask_ep.served import tile_bytes
from dask_ep.storage import CHUNK_BYTES

ROWS_THAT_PAY = 256
"""Rows of a chunk at an expert whose products take about ten times as long as its conversion from
what is stored."""


class DoesNotFit(MemoryError):
    """A job cannot be run so within its memory limit.

    Attributes
    ----------
    proposal : dict
        Options of ``dask-ep run`` with which it can, by name; empty if none were found.
    """

    def __init__(self, message: str, proposal: dict[str, Any]):
        super().__init__(message)
        self.proposal = proposal


@dataclass(frozen=True)
class Layout:
    """How a job is laid out over workers, in numbers."""

    world_size: int
    workers: int
    #: processes, of which each plays as many ranks as the others, or one more
    threads: int
    #: tasks at a time in each
    memory_limit: int | None = None
    #: bytes that each may use
    placement: str | None = None
    #: name of a policy, or path of a file
    on_devices: bool = False
    #: whether each worker computes on a GPU, whose memory the limit is
    host_limit: int | None = None
    #: bytes of the host that each may use beside that

    @property
    def ranks_per_worker(self) -> int:
        """The most ranks that one worker plays."""
        return -(-self.world_size // self.workers)


def need(inputs: Inputs, layout: Layout) -> Need:
    """Say what one worker needs of memory, at most, by the rows of a chunk; of its GPU's, if it
    computes on one.
    """
    experts, layer = inputs.experts, inputs.layer
    compute = computing_dtype(inputs.tokens.dtype, layout.on_devices)
    wide = experts.loaded_bytes(compute, on_device=layout.on_devices)
    itemsize, stored = compute.itemsize, _held_bytes(inputs, layout)
    held = layout.ranks_per_worker * _slots_per_rank(inputs, layout) * stored
    if stored < wide:
        held += layout.threads * wide  # the one that each thread has in use
    if layer is not None:
        held += layer.loaded_beside(compute, on_device=layout.on_devices)
    spread = min(slots_per_row(inputs), layout.world_size)
    if layout.on_devices:
        return _on_device(inputs).need(held, layout.threads, layout.world_size, spread)
    widening = max(itemsize // inputs.tokens.dtype.itemsize, 1)
    return Need(
        held,
        chunks_held(layout.threads, layout.world_size, spread, widening),
        max(inputs.row_bytes, 1),
        layout.threads * (tile_bytes((layer or experts).widest * itemsize) + inputs.read_bytes),
        layout.threads * slots_per_row(inputs) * SORT_BYTES,
    )


def host_need(inputs: Inputs, layout: Layout) -> Need:
    """Say what a worker that computes on a GPU needs of the host, at most."""
    spread = min(slots_per_row(inputs), layout.world_size)
    return _on_device(inputs).host_need(
        layout.threads, layout.world_size, spread, inputs.read_bytes
    )


def _on_device(inputs: Inputs) -> OnDevice:
    shared = None if inputs.layer is None else inputs.layer.shared
    return OnDevice.of(inputs.experts, shared, slots_per_row(inputs), inputs.tokens.dtype)


def rows_within(inputs: Inputs, layout: Layout) -> float:
    """The most rows of a chunk with which all limits are kept; infinite without any."""
    most = math.inf
    if layout.memory_limit is not None:
        most = need(inputs, layout).rows_within(layout.memory_limit)
    if layout.on_devices and layout.host_limit is not None:
        most = min(most, host_need(inputs, layout).rows_within(layout.host_limit))
    return most


def hold_what_fits(inputs: Inputs, layout: Layout, asked: int | None = None) -> Inputs:
    """Have experts held in memory as they are stored, where only so they fit, and where it pays.

    Parameters
    ----------
    inputs, layout : what is to be run, and how
    asked : rows of a chunk that the user wants

    Returns
    -------
    Inputs
        The same, or with `held_as_stored` experts, which give the same to the last bit. It pays
        where chunks that fit bring an expert `ROWS_THAT_PAY` rows; where not, each would be
        converted for a few rows, and to go by in passes is less work. On GPUs, where none go by in
        passes, it pays wherever only so they fit.
    """
    if layout.memory_limit is None or _fits(inputs, layout):
        return inputs
    experts, layer = held_as_stored(inputs.experts), copy(inputs.layer)
    if layer is not None:
        layer.experts = experts
    held = replace(inputs, experts=experts, layer=layer)
    if not _fits(held, layout, asked):
        return inputs
    slots = choose_chunk_rows(held, layout, asked) * slots_per_row(inputs)
    pays = layout.on_devices or slots >= ROWS_THAT_PAY * experts.num_experts
    return held if pays else inputs


def _fits(inputs: Inputs, layout: Layout, asked: int | None = None) -> bool:
    return rows_within(inputs, layout) >= (asked or FEWEST_ROWS)


def at_most_all(inputs: Inputs, asked: int | None) -> int | None:
    """Give the rows of a chunk that a user wants; more than there are mean all of them."""
    return asked and min(asked, max(inputs.tokens.shape[0], 1))


def choose_chunk_rows(inputs: Inputs, layout: Layout, asked: int | None = None) -> int:
    """Choose the rows of a token chunk: large, but some for every thread, and within memory.

    Parameters
    ----------
    inputs, layout : what is to be run, and how
    asked : rows that the user wants

    Returns
    -------
    int, a multiple or a whole part of the stored chunks where possible; `asked`, if that is given

    Raises
    ------
    DoesNotFit
        If `asked` is too many, or not even `FEWEST_ROWS` fit; with the numbers and a proposal.
    """
    if asked is None:
        chunk_bytes = DEVICE_CHUNK_BYTES if layout.on_devices else CHUNK_BYTES
        rows = max(1, chunk_bytes // max(1, inputs.row_bytes))
        fair = -(-inputs.tokens.shape[0] // (CHUNKS_PER_THREAD * layout.threads * layout.workers))
        rows = min(rows, max(fair, FEWEST_ROWS))
    else:
        rows = asked
    most = rows_within(inputs, layout)
    if most < (FEWEST_ROWS if asked is None else asked):
        raise _refusal(inputs, layout, asked)
    rows = int(min(rows, most))
    return rows if asked is not None else fit_stored(rows, inputs.tokens.chunk_rows)


def slots_beside(inputs: Inputs, layout: Layout, chunk_rows: int) -> int | None:
    """Say how many experts each rank can hold beside its own; None without a memory limit.

    They fill a worker by choice, and so no more of it than is `usable`.
    """
    if layout.memory_limit is None:
        return None
    limit = layout.memory_limit if layout.on_devices else usable(layout.memory_limit)
    spare = limit - need(inputs, layout).at(chunk_rows)
    return max(spare, 0) // (layout.ranks_per_worker * _held_bytes(inputs, layout))


def _held_bytes(inputs: Inputs, layout: Layout) -> int:
    """Bytes of one expert that is held."""
    experts = inputs.experts
    if isinstance(experts, StoredExperts):
        return experts.nbytes // experts.num_experts
    compute = computing_dtype(inputs.tokens.dtype, layout.on_devices)
    return experts.loaded_bytes(compute, on_device=layout.on_devices)


def fit_stored(rows: int, stored: int | None) -> int:
    """Give about `rows` rows, at most, such that chunks are read whole or in equal parts.

    Examples
    --------
    >>> fit_stored(1000, 300), fit_stored(100, 300), fit_stored(100, None)
    (900, 100, 100)
    """
    if stored is None:
        return rows
    return rows // stored * stored if rows >= stored else -(-stored // -(-stored // rows))


def _refusal(inputs: Inputs, layout: Layout, asked: int | None) -> DoesNotFit:
    """Say why the job cannot run so, with the numbers, and what to change."""
    law, limit, rows = need(inputs, layout), layout.memory_limit, asked or FEWEST_ROWS
    proposal = next(_proposals(inputs, layout, asked), {})
    whose = "a memory limit" if layout.workers == 1 else "each worker's memory limit"
    whom, instead = "the process", "give more memory, or more and smaller ranks"
    if layout.on_devices and limit is not None and law.at(rows) > limit:
        whose, whom = "the memory limit of a GPU", "CUDA"
        instead = (
            "use more GPUs, or none (--threads or --processes): there experts that do not fit go "
            "by in passes"
        )
    elif layout.on_devices:
        whose, instead = "the memory limit of a GPU's worker on the host", "give more memory"
        law, limit = host_need(inputs, layout), layout.host_limit
    parts = {name: f"{nbytes / 1e6:.0f} MB" for name, nbytes in law.parts(rows).items()}
    parts["scratch"] += " of scratch"
    reading = layout.threads * inputs.read_bytes
    if reading and not layout.on_devices:
        parts["scratch"] += (
            f" (of which {reading / 1e6:.0f} MB to decode stored token chunks whole: store smaller "
            "ones)"
        )
    message = (
        f"{whose} of {limit / 1e6:.0f} MB must hold "
        f"{parts['experts']} of experts, {parts['process']} for {whom}, {parts['scratch']} and "
        f"{law.chunks:.3g} chunks of {rows} rows ({law.row_bytes} bytes each), "
        f"{law.at(rows) / 1e6:.0f} MB in all; "
    )
    if not proposal:
        return DoesNotFit(message + instead, {})
    options = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in proposal.items())
    return DoesNotFit(f"{message}within the same limit it runs with {options}", proposal)


def _proposals(inputs: Inputs, layout: Layout, asked: int | None) -> Iterator[dict[str, Any]]:
    """Options with which the job fits, those first that change least."""
    for options, other in _alternatives(inputs, layout, asked):
        if _fits(inputs, other):
            rows = {} if asked is None else {"chunk_rows": choose_chunk_rows(inputs, other)}
            yield {**options, **rows}


def _alternatives(
    inputs: Inputs, layout: Layout, asked: int | None
) -> Iterator[tuple[dict[str, Any], Layout]]:
    """Other layouts: smaller chunks, fewer threads, no copies of experts, more processes."""
    if asked is not None:
        yield {}, layout
    for threads in range(layout.threads - 1, 0, -1) if not layout.on_devices else ():
        yield {"threads": threads}, replace(layout, threads=threads)
    if layout.placement in ("balanced", "exact"):
        yield {"placement": "packed"}, replace(layout, placement="packed")
    workers, ranks = layout.workers, inputs.job.world_size
    if _placed_by_file(layout):
        ranks = layout.world_size  # which the file is for
    most = ranks or inputs.experts.num_experts
    while workers < most and not layout.on_devices:
        workers = min(2 * workers, most)
        yield (
            {"processes": workers},
            replace(layout, workers=workers, world_size=ranks or workers, threads=1),
        )


def _slots_per_rank(inputs: Inputs, layout: Layout) -> int:
    """The most experts that one rank holds."""
    if _placed_by_file(layout):
        return read_placement(layout.placement, inputs.job, layout.world_size).slots_per_rank
    policy = layout.placement or "contiguous"
    return most_slots(policy, inputs.experts.num_experts, layout.world_size)


def _placed_by_file(layout: Layout) -> bool:
    return layout.placement is not None and layout.placement not in POLICIES


def slots_per_row(inputs: Inputs) -> int:
    """k; E where experts choose their rows."""
    if inputs.layer is not None:
        return getattr(inputs.layer.router, "k", inputs.experts.num_experts)
    return 1 if inputs.routing.ndim == 1 else inputs.routing.shape[1]
