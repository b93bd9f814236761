"""How does a job go through experts that do not fit into its memory?

Two ways, each in groups of token chunks; every group is one pass over the experts:

    hold    the rows of a group and their outputs stay in memory, one large chunk for each thread;
            the experts are loaded: each is read once a pass, and serves all chunks of the group
    spill   the rows of a group go to a file, laid out by expert, and what the experts gave comes
            back in another, laid out by chunk; mostly the group is the whole job, and every expert
            is read once

Holding pays with weights that are read again and again, spilling with rows that are written and
read. What fits and costs less is taken. All of it is arithmetic on a few numbers: nothing is read
here, and the same numbers give the same choice in `plan` and in `run`.

**On Dask workers rows are spilled.** Held rows are changed in place, by one task after the
other, for hundreds of blocks: a worker that is lost would lose all of a pass, and one that is
retired meanwhile could hand on rows to which a block is added twice. And each worker would read
all experts. What that costs: rows that would fit into the workers' memory together are written and
read once for each of their slots. With many slots a row it can be the more: 400 000 rows of a layer
as DeepSeek-V3's (d = 7168, 8 slots, float32) are 180 GB written and read, its experts in bfloat16,
read by each of two workers, 44 GB. On one machine, threads hold them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dask_ep.laws.costs import CHUNKS_PER_THREAD, FEWEST_ROWS, SORT_BYTES, Rates, usable
from dask_ep.laws.memory_law import Layout
from dask_ep.laws.work import Work

RATES = Rates(flops=1.0, copy=5e9)
"""By which the ways are compared: the usual ones of a disk and of memory, so that a plan and a run
choose alike. Products are the same either way, and are left out."""

SPILLED_CHUNK_BYTES = 32 << 20
"""Bytes of a token chunk where rows are spilled, at most."""

BLOCK_BYTES = 32 << 20
"""Bytes of loaded experts that are worth a task: smaller experts are loaded several at a time."""

PIECE_ROWS = (256, 1024)
"""Fewest and most rows that a task computes where rows are spilled, if an expert has as many:
enough for fast products, few enough for all threads to share an expert."""

PASSES_PROCESS_BYTES = 300_000_000
"""What a process takes besides experts, rows and tiles: more than in an ordinary run, since the C
library and the pool keep some memory of earlier blocks."""

FREE_PART = 0.9
"""Of the free disk that is spilled to, at most."""


@dataclass(frozen=True)
class Passes:
    """One way to go through the experts of a job, and what it takes."""

    way: str
    #: "hold" or "spill"
    passes: int
    #: groups of chunks: how often an expert that has rows in all of them is read
    chunk_rows: int
    #: of a token chunk
    group_chunks: int
    #: chunks of a group
    block_experts: int
    #: experts that are loaded together
    decoded: int
    #: such blocks at a time that are computed with
    ahead: int
    #: such blocks at a time that are read meanwhile, and wait as they are stored
    threads: int
    #: that share a block
    piece_rows: int
    #: rows that one task computes, where rows are spilled
    stored_rows: int
    #: rows of a chunk of a Zarr output: a part of `chunk_rows`
    memory_bytes: int
    #: of a process, at most
    spill_bytes: int
    #: on the disk at a time, at most
    read_bytes: int
    #: of experts, in all
    moved_bytes: int
    #: of rows to spill files and back, in all: each is written once and read once
    seconds: float
    #: for those bytes, about

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Passes:
        return cls(**content)

    def groups(self, chunks: int) -> Iterator[range]:
        """Cut so many chunks into the groups of one pass each.

        Examples
        --------
        >>> import numpy as np
        >>> work = Work(100, 1, 8, 8, np.dtype("f4"), 4, expert_stored=1, expert_loaded=1, widest=8)
        >>> layout = Layout(1, 1, 1, memory_limit=1 << 30, in_process=True)
        >>> list(choose_passes(work, layout, chunk_rows=64, ways=["spill"]).groups(2))
        [range(0, 2)]
        """
        for first in range(0, chunks, self.group_chunks):
            yield range(first, min(first + self.group_chunks, chunks))


def choose_passes(
    work: Work,
    layout: Layout,
    *,
    free: int | None = None,
    chunk_rows: int | None = None,
    ways: Sequence[str] | None = None,
    rates: Rates = RATES,
) -> Passes:
    """Choose the cheaper way that fits.

    Parameters
    ----------
    work, layout : what is computed, and on what, with a memory limit
    free : bytes of disk for spilled rows; as many as wanted without it
    chunk_rows : rows of a token chunk, if that is given
    ways : "hold", "spill" or both: what may be chosen; by default `ways_to_wait`
    rates : at which bytes are read, written and copied

    Returns
    -------
    Passes

    Raises
    ------
    MemoryError
        If neither one expert and `FEWEST_ROWS` rows of a chunk for each thread fit, with the
        numbers.

    Notes
    -----
    Memory of a process, at most, T threads::

        all      300 MB + shared experts + T * what reading a chunk takes besides its rows
        blocks   decoded * block in the computing dtype, or as stored if that is more
                   + ahead * block as stored + T * matrix as stored, where it is decoded
        hold     + blocks + T * (scratch + chunk rows * (token + output + sort));
                   no output where it takes the place of the tokens: one slot, same width and dtype
        spill    + the larger of blocks + T * scratch
                   and (3 T + 2) * chunk rows * (the wider of token and output + sort)

    T blocks are computed with at a time and two read ahead, where rows that are held leave room for
    them, or they take no more than a quarter of it; else fewer, down to one, and nothing ahead. On
    workers a part of the limit is left to Dask (`costs.PART_OF_A_WORKER`). There it holds while no
    worker is lost: one that takes over another's experts holds the blocks of both.

    Seconds that are compared: each pass reads the experts as stored at `rates.read`, and streams
    them to each thread that uses them at `rates.copy`; a spilled byte is written and read once.
    Workers share all of that.

    Examples
    --------
    12 GB of bfloat16 experts and 2 GB of tokens, 2 slots a row, in 3 GB:

    >>> import numpy as np
    >>> work = Work(
    ...     rows=250_000, slots=2, d=2048, d_out=2048, dtype=np.dtype("f4"), experts=256,
    ...     expert_stored=50 << 20, expert_loaded=100 << 20, widest=4096,
    ... )
    >>> layout = Layout(1, 1, threads=2, memory_limit=3_000_000_000, in_process=True)
    >>> chosen = choose_passes(work, layout)
    >>> chosen.way, chosen.passes, chosen.decoded, chosen.memory_bytes <= 3_000_000_000
    ('hold', 2, 2, True)
    >>> choose_passes(work, dataclasses.replace(layout, memory_limit=1_000_000_000)).way
    'spill'
    """
    assert layout.memory_limit is not None  # without one, all experts are held
    limit = layout.memory_limit if layout.in_process else usable(layout.memory_limit)
    found = [
        passes
        for way in ways or ways_to_wait(work, layout)
        if (passes := _WAYS[way](work, layout, limit, free, chunk_rows, rates)) is not None
    ]
    if not found:
        raise MemoryError(_refusal(work, layout, limit, free, chunk_rows))
    return min(found, key=lambda passes: (passes.seconds, passes.memory_bytes))


def ways_to_wait(work: Work, layout: Layout) -> tuple[str, ...]:
    """Where rows can wait for their experts: in memory and on disk, or on disk alone.

    Dask workers share no memory. The rows of a layer are routed, and go through its shared experts,
    chunk by chunk: small ones.
    """
    return ("hold", "spill") if layout.in_process and not work.routes else ("spill",)


def _hold(
    work: Work,
    layout: Layout,
    limit: int,
    free: int | None,
    chunk_rows: int | None,
    rates: Rates,
) -> Passes | None:
    """As many rows as fit, in chunks of equal size, one for each thread."""
    row = work.token_bytes + work.slots * SORT_BYTES + _output_bytes(work)
    fixed = _fixed(work, layout) + layout.threads * work.scratch
    blocks = _choose_blocks(work, layout, limit - fixed - FEWEST_ROWS * row * layout.threads, 1 / 4)
    if blocks is None:
        return None
    most = (limit - fixed - _blocks_bytes(work, layout, *blocks)) // (layout.threads * row)
    if most < (chunk_rows or FEWEST_ROWS):
        return None
    if chunk_rows is not None:
        stored_rows = chunk_rows
    else:
        stored_rows = unit = _written_together(work, most)
        passes = -(-work.rows // (layout.threads * (most // unit * unit))) or 1
        chunk_rows = _round_up(-(-work.rows // (passes * layout.threads)), unit) or unit
    chunks = -(-work.rows // chunk_rows)
    passes = -(-chunks // layout.threads) or 1
    rows_and_fixed = fixed + layout.threads * chunk_rows * row
    blocks = _choose_blocks(work, layout, limit - rows_and_fixed, 1.0)
    assert blocks is not None  # the rows leave room for those chosen above
    decoded, ahead = blocks
    return Passes(
        way="hold",
        passes=passes,
        chunk_rows=chunk_rows,
        group_chunks=layout.threads,
        block_experts=_block_experts(work),
        decoded=decoded,
        ahead=ahead,
        threads=layout.threads,
        piece_rows=0,
        stored_rows=stored_rows,
        memory_bytes=rows_and_fixed + _blocks_bytes(work, layout, decoded, ahead),
        spill_bytes=0,
        read_bytes=passes * work.experts * work.expert_stored,
        moved_bytes=0,
        seconds=_weights_seconds(work, layout, passes, layout.threads, rates),
    )


def _spill(
    work: Work,
    layout: Layout,
    limit: int,
    free: int | None,
    chunk_rows: int | None,
    rates: Rates,
) -> Passes | None:
    """Chunks of the usual size, or what fits; as few groups as the disk allows."""
    row = max(work.token_bytes, work.answer_bytes) + work.slots * SORT_BYTES
    if work.layer.loaded:
        row += work.answer_bytes
    chunks_held = 3 * layout.threads + 2
    room = limit - _fixed(work, layout)
    blocks = _choose_blocks(work, layout, room - layout.threads * work.scratch, 1.0)
    most = room // (chunks_held * row)
    if blocks is None or most < (chunk_rows or FEWEST_ROWS):
        return None
    if chunk_rows is None:
        chunk_rows = _spilled_chunk_rows(work, layout, most)
    chunks = -(-work.rows // chunk_rows)
    group_chunks = max(chunks, 1)
    if free is not None:
        group_chunks = min(
            group_chunks, int(free * FREE_PART) // (chunk_rows * _spilled_bytes(work))
        )
        if group_chunks == 0:
            return None
    passes = -(-chunks // group_chunks) or 1
    computing = _blocks_bytes(work, layout, *blocks) + layout.threads * work.scratch
    moved = work.rows * _spilled_bytes(work)
    mean_rows = work.rows * work.slots // max(work.experts * passes, 1)
    return Passes(
        way="spill",
        passes=passes,
        chunk_rows=chunk_rows,
        group_chunks=group_chunks,
        block_experts=_block_experts(work),
        decoded=blocks[0],
        ahead=blocks[1],
        threads=layout.threads,
        piece_rows=PIECE_ROWS[1],
        stored_rows=chunk_rows,
        memory_bytes=_fixed(work, layout) + max(computing, chunks_held * chunk_rows * row),
        spill_bytes=min(group_chunks * chunk_rows, work.rows) * _spilled_bytes(work),
        read_bytes=passes * work.experts * work.expert_stored,
        moved_bytes=moved,
        seconds=_weights_seconds(work, layout, passes, -(-mean_rows // PIECE_ROWS[1]), rates)
        + (moved / rates.write + moved / rates.read) / (layout.dask_workers or 1),
    )


_WAYS = {"hold": _hold, "spill": _spill}


def cut_pieces(
    rows: Sequence[int], piece_rows: int, threads: int
) -> list[list[tuple[int, int, int]]]:
    """Cut the rows of a block's experts into pieces of about equal size, one task each.

    Parameters
    ----------
    rows : of each expert of the block
    piece_rows : most rows of one piece
    threads : that share the block

    Returns
    -------
    list of pieces, each a list of (expert, start, stop): rows [start, stop) of an expert of the
    block. An expert is cut only where it has more rows than a piece, and then evenly.

    Examples
    --------
    >>> cut_pieces([700, 0, 10, 20], 512, 2)
    [[(0, 0, 350)], [(0, 350, 700), (2, 0, 10)], [(3, 0, 20)]]
    """
    fewest = min(PIECE_ROWS[0], piece_rows)
    most = min(max(-(-sum(rows) // max(threads, 1)), fewest), piece_rows)
    pieces: list[list[tuple[int, int, int]]] = []
    room = 0
    for expert, count in enumerate(rows):
        parts = -(-count // most)
        for part in range(parts):
            start, stop = count * part // parts, count * (part + 1) // parts
            if stop - start > room:
                pieces.append([])
                room = most
            pieces[-1].append((expert, start, stop))
            room -= stop - start
    return pieces


# --- small laws ------------------------------------------------------------------------------


def _fixed(work: Work, layout: Layout) -> int:
    return PASSES_PROCESS_BYTES + work.layer.loaded + layout.threads * work.read_bytes


def _spilled_chunk_rows(work: Work, layout: Layout, most: int) -> int:
    """Rows of a chunk that is spilled: the usual, or fewer so that all threads get some."""
    fair = -(-work.rows // (CHUNKS_PER_THREAD * layout.threads * (layout.dask_workers or 1)))
    usual = SPILLED_CHUNK_BYTES // max(work.token_bytes, work.d_out * work.dtype.itemsize)
    chunk_rows = min(max(usual, 1), max(fair, FEWEST_ROWS), most)
    return chunk_rows // (unit := _read_together(work, chunk_rows)) * unit


def _spilled_bytes(work: Work) -> int:
    """Bytes that one row takes on the disk, out and back."""
    itemsize = work.wide if work.apply_router_weight_on_input else work.dtype.itemsize
    return work.slots * (work.d * itemsize + work.answer_bytes)


def _block_experts(work: Work) -> int:
    """Experts that are loaded together."""
    return min(max(BLOCK_BYTES // max(work.expert_loaded, 1), 1), max(work.experts, 1))


def _blocks_bytes(work: Work, layout: Layout, decoded: int, ahead: int) -> int:
    """Bytes of so many blocks in the computing dtype, and so many as they are stored."""
    stored, loaded = (
        _block_experts(work) * one for one in (work.expert_stored, work.expert_loaded)
    )
    decoding = min(layout.threads * work.matrix_stored, decoded * stored)
    return decoded * max(loaded, stored) + decoding + ahead * stored


def _output_bytes(work: Work) -> int:
    """Bytes of an output row that is held: its sum, and what is written where that is another.

    None where it takes the place of the token row.
    """
    if work.slots == 1 and work.d == work.d_out and work.wide == work.dtype.itemsize:
        return 0
    narrow = 0 if work.wide == work.dtype.itemsize else work.d_out * work.dtype.itemsize
    return work.answer_bytes + narrow


def _choose_blocks(work: Work, layout: Layout, room: int, part: float) -> tuple[int, int] | None:
    """Blocks at a time in so many bytes, decoded and ahead; None if there is no room for one.

    More than one of either only within a part of the room.
    """
    chosen = (1, 0) if _blocks_bytes(work, layout, 1, 0) <= room else None
    more = [
        (1, 1),
        *((decoded, 1) for decoded in range(2, layout.threads + 1)),
        (layout.threads, 2),
    ]
    for decoded, ahead in more:
        share = 1.0 if decoded + ahead <= 2 else part
        if _blocks_bytes(work, layout, decoded, ahead) <= share * room:
            chosen = decoded, ahead
    return chosen


def _weights_seconds(work: Work, layout: Layout, passes: int, uses: int, rates: Rates) -> float:
    """Time to read the experts and to stream each to its products; workers share them."""
    one = work.expert_stored / rates.read + max(uses, 1) * work.expert_loaded / rates.copy
    return passes * work.experts * one / (layout.dask_workers or 1)


def _read_together(work: Work, most: int) -> int:
    """Rows of which a chunk of up to `most` has a multiple, so that stored rows are read once."""
    stored = work.stored_rows
    return stored if stored is not None and stored <= most // 2 else 1


def _written_together(work: Work, most: int) -> int:
    """Rows of a stored output chunk, of which a chunk of up to `most` rows has a multiple."""
    rows = _read_together(work, most)
    usual = SPILLED_CHUNK_BYTES // max(work.d_out * work.dtype.itemsize, 1)
    while 2 * rows <= min(usual, most // 8):
        rows *= 2
    return rows


def _round_up(rows: int, unit: int) -> int:
    return -(-rows // unit) * unit


def _refusal(
    work: Work, layout: Layout, limit: int, free: int | None, chunk_rows: int | None
) -> str:
    rows = chunk_rows or FEWEST_ROWS
    row = max(work.token_bytes, work.answer_bytes) + work.slots * SORT_BYTES
    computing = _blocks_bytes(work, layout, 1, 0) + layout.threads * work.scratch
    chunks = (3 * layout.threads + 2) * rows * row
    fixed = _fixed(work, layout)
    needed = fixed + max(computing, chunks)
    words = (
        f"a process may use {limit / 1e6:.0f} MB and must hold {fixed / 1e6:.0f} MB of its own "
        f"and either {computing / 1e6:.0f} MB to compute ({_block_experts(work)} experts of "
        f"{work.expert_loaded / 1e6:.3g} MB, {layout.threads} threads) or {chunks / 1e6:.0f} MB of "
        f"{3 * layout.threads + 2} chunks of {rows} rows, {needed / 1e6:.0f} MB in all"
    )
    if needed <= limit and free is not None:
        return (
            f"{words}; that would fit, with rows spilled to disk, but {free / 1e6:.0f} MB are free "
            f"there and a chunk needs {rows * _spilled_bytes(work) / 1e6:.0f} MB: free some space, "
            "or allow more memory"
        )
    return f"{words}; allow more memory or use fewer threads"
