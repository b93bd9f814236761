"""How does a job process experts that do not fit into its memory?

In one of two ways, both in groups of token chunks; every group is one pass over the experts:

    hold    the rows of a group and their outputs stay in memory, one large chunk per thread; each
            expert is read once per pass, and serves all chunks of the group
    spill   the rows of a group go to a file, laid out by expert, and the experts' outputs come
            back in another, laid out by chunk; usually the group is the whole job, and every expert
            is read once

Holding costs repeated reads of the experts, spilling costs writing and reading the rows. The
cheaper way that fits is chosen. All of this is arithmetic on a few numbers: no data is read here,
and the same numbers give the same choice in `plan` and in `run`.

**On Dask workers rows are always spilled.** Rows in memory are changed in place, by one task after
another, for hundreds of blocks: a lost worker would lose a whole pass, and one that is retired
meanwhile could pass on rows to which a block is then added twice. Also, each worker would read all
experts. The price is that rows which would fit into the workers' memory together are written and
read once for each of their slots. With many slots per row this can cost more: 400 000 rows of a
layer like DeepSeek-V3's (d = 7168, 8 slots, float32) are 180 GB written and read, while its experts
in bfloat16, read by each of two workers, are 44 GB. Threads of one process can hold them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dask_ep.laws.costs import FEWEST_ROWS, SORT_BYTES, Rates
from dask_ep.laws.memory_law import Layout
from dask_ep.laws.pass_blocks import (
    PIECE_ROWS,
    block_experts_of,
    blocks_bytes,
    choose_blocks,
    fixed_bytes,
    held_output_bytes,
    round_up,
    spilled_bytes,
    spilled_chunk_rows,
    spilled_row_bytes,
    written_together,
)
from dask_ep.laws.work import Work

RATES = Rates(flops=1.0, copy=5e9)
"""Rates for comparing the two ways: typical ones, not measured ones, so that a plan and a run make
the same choice. Products take the same time either way, and are left out."""

FREE_PART = 0.9
"""Maximum fraction of the free disk space that is used for spilled rows."""


@dataclass(frozen=True)
class Passes:
    """How the experts of a job are processed in passes, and what that takes."""

    way: str
    #: "hold" or "spill"
    passes: int
    #: groups of chunks: how often an expert with rows in all of them is read
    chunk_rows: int
    #: rows of a token chunk
    group_chunks: int
    #: chunks of a group
    block_experts: int
    #: experts that are loaded together, as a block
    decoded: int
    #: blocks that compute at a time
    ahead: int
    #: blocks that are read ahead at a time, and held as stored
    threads: int
    #: threads that share a block
    piece_rows: int
    #: maximum rows that one task computes, if rows are spilled
    stored_rows: int
    #: rows of a chunk of a Zarr output, a divisor of `chunk_rows`
    memory_bytes: int
    #: of a process, at most
    spill_bytes: int
    #: on disk at a time, at most
    read_bytes: int
    #: bytes of experts read in total
    moved_bytes: int
    #: bytes of rows spilled in total: each is written once and read once
    seconds: float
    #: estimated time to read and move these bytes

    def groups(self, chunks: int) -> Iterator[range]:
        """Yield groups of `chunks` chunks, one for each pass.

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
    work, layout : what is computed, and where, with a memory limit
    free : bytes of disk for spilled rows; unlimited by default
    chunk_rows : rows of a token chunk, if given
    ways : "hold", "spill" or both: what may be chosen; by default `ways_to_wait`
    rates : at which bytes are read, written and copied

    Returns
    -------
    Passes

    Raises
    ------
    MemoryError
        If one expert and `FEWEST_ROWS` rows of a chunk per thread do not fit; the message has the
        numbers.

    Notes
    -----
    Memory of a process, at most, with T threads::

        all      300 MB + shared experts + T * what reading a chunk takes in addition to its rows
        blocks   decoded * block in the computing dtype, or as stored if that is larger
                   + ahead * block as stored + T * matrix as stored, if it is decoded
        hold     + blocks + T * (scratch + chunk rows * (token + output + sort));
                   no output if it overwrites the tokens: one slot, same width and dtype
        spill    + the larger of blocks + T * scratch
                   and (3 T + 2) * chunk rows * (the wider of token and output + sort)

    T blocks compute at a time and two are read ahead, if there is room next to the rows held, or if
    they take no more than a quarter of it; otherwise fewer, down to one, with none ahead. On
    workers a fraction of the limit is left to Dask (`costs.PART_OF_A_WORKER`). There the bound
    holds as long as no worker is lost: one that takes over another's experts holds the blocks of
    both.

    The ways are compared by their time: each pass reads the experts as stored at `rates.read`, and
    streams them to each thread that uses them at `rates.copy`; a spilled byte is written and read
    once. Workers share all of this.

    Examples
    --------
    12 GB of bfloat16 experts and 2 GB of tokens, 2 slots per row, in 3 GB:

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
    limit = layout.usable_bytes
    assert limit is not None  # without one, all experts are held
    found = [
        passes
        for way in ways or ways_to_wait(work, layout)
        if (passes := _WAYS[way](work, layout, limit, free, chunk_rows, rates)) is not None
    ]
    if not found:
        raise MemoryError(_refusal(work, layout, limit, free, chunk_rows))
    return min(found, key=lambda passes: (passes.seconds, passes.memory_bytes))


def ways_to_wait(work: Work, layout: Layout) -> tuple[str, ...]:
    """Return where rows can wait for their experts: in memory or on disk, or only on disk.

    Dask workers do not share memory. The rows of a whole layer are routed and go through shared
    experts chunk by chunk, which needs small chunks.
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
    """Hold as many rows as fit, in chunks of equal size, one per thread."""
    row = work.token_bytes + work.slots * SORT_BYTES + held_output_bytes(work)
    fixed = fixed_bytes(work, layout) + layout.threads * work.scratch
    blocks = choose_blocks(work, layout, limit - fixed - FEWEST_ROWS * row * layout.threads, 1 / 4)
    if blocks is None:
        return None
    most = (limit - fixed - blocks_bytes(work, layout, *blocks)) // (layout.threads * row)
    if most < (chunk_rows or FEWEST_ROWS):
        return None
    if chunk_rows is not None:
        stored_rows = chunk_rows
    else:
        stored_rows = unit = written_together(work, most)
        passes = -(-work.rows // (layout.threads * (most // unit * unit))) or 1
        chunk_rows = round_up(-(-work.rows // (passes * layout.threads)), unit) or unit
    chunks = -(-work.rows // chunk_rows)
    passes = -(-chunks // layout.threads) or 1
    rows_and_fixed = fixed + layout.threads * chunk_rows * row
    blocks = choose_blocks(work, layout, limit - rows_and_fixed, 1.0)
    assert blocks is not None  # the rows leave room for those chosen above
    decoded, ahead = blocks
    return Passes(
        way="hold",
        passes=passes,
        chunk_rows=chunk_rows,
        group_chunks=layout.threads,
        block_experts=block_experts_of(work),
        decoded=decoded,
        ahead=ahead,
        threads=layout.threads,
        piece_rows=0,
        stored_rows=stored_rows,
        memory_bytes=rows_and_fixed + blocks_bytes(work, layout, decoded, ahead),
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
    """Spill chunks of the usual size, or of what fits, in as few groups as the disk allows."""
    row, chunks_held = spilled_row_bytes(work), 3 * layout.threads + 2
    room = limit - fixed_bytes(work, layout)
    blocks = choose_blocks(work, layout, room - layout.threads * work.scratch, 1.0)
    most = room // (chunks_held * row)
    if blocks is None or most < (chunk_rows or FEWEST_ROWS):
        return None
    if chunk_rows is None:
        chunk_rows = spilled_chunk_rows(work, layout, most)
    chunks = -(-work.rows // chunk_rows)
    group_chunks = max(chunks, 1)
    if free is not None:
        group_chunks = min(
            group_chunks, int(free * FREE_PART) // (chunk_rows * spilled_bytes(work))
        )
        if group_chunks == 0:
            return None
    passes = -(-chunks // group_chunks) or 1
    computing = blocks_bytes(work, layout, *blocks) + layout.threads * work.scratch
    moved = work.rows * spilled_bytes(work)
    mean_rows = work.rows * work.slots // max(work.experts * passes, 1)
    return Passes(
        way="spill",
        passes=passes,
        chunk_rows=chunk_rows,
        group_chunks=group_chunks,
        block_experts=block_experts_of(work),
        decoded=blocks[0],
        ahead=blocks[1],
        threads=layout.threads,
        piece_rows=PIECE_ROWS[1],
        stored_rows=chunk_rows,
        memory_bytes=fixed_bytes(work, layout) + max(computing, chunks_held * chunk_rows * row),
        spill_bytes=min(group_chunks * chunk_rows, work.rows) * spilled_bytes(work),
        read_bytes=passes * work.experts * work.expert_stored,
        moved_bytes=moved,
        seconds=_weights_seconds(work, layout, passes, -(-mean_rows // PIECE_ROWS[1]), rates)
        + (moved / rates.write + moved / rates.read) / (layout.dask_workers or 1),
    )


_WAYS = {"hold": _hold, "spill": _spill}


def _weights_seconds(work: Work, layout: Layout, passes: int, uses: int, rates: Rates) -> float:
    """Return the time to read the experts and stream each to its products; workers share them."""
    one = work.expert_stored / rates.read + max(uses, 1) * work.expert_loaded / rates.copy
    return passes * work.experts * one / (layout.dask_workers or 1)


def _refusal(
    work: Work, layout: Layout, limit: int, free: int | None, chunk_rows: int | None
) -> str:
    rows = chunk_rows or FEWEST_ROWS
    fixed, computing, chunks = _least(work, layout, rows)
    needed = fixed + max(computing, chunks)
    words = (
        f"a process may use {limit / 1e6:.0f} MB, but needs at least {needed / 1e6:.0f} MB: "
        f"{fixed / 1e6:.0f} MB for itself, and either {computing / 1e6:.0f} MB to compute "
        f"(experts: {block_experts_of(work)} of {work.expert_loaded / 1e6:.3g} MB, threads: "
        f"{layout.threads}) or {chunks / 1e6:.0f} MB for {3 * layout.threads + 2} chunks of {rows} "
        "rows"
    )
    if needed <= limit and free is not None:
        return (
            f"{words}; that would fit, with rows spilled to disk, but {free / 1e6:.0f} MB are free "
            f"there and a chunk needs {rows * spilled_bytes(work) / 1e6:.0f} MB: free some space, "
            "or allow more memory"
        )
    alone = _least(work, dataclasses.replace(layout, threads=1), rows)
    fewer = " or use fewer threads" * (alone[0] + max(alone[1:]) <= limit)
    return f"{words}; allow more memory{fewer}"


def _least(work: Work, layout: Layout, rows: int) -> tuple[int, int, int]:
    """Return the least bytes of a process: fixed, to compute one block, and for its chunks."""
    computing = blocks_bytes(work, layout, 1, 0) + layout.threads * work.scratch
    chunks = (3 * layout.threads + 2) * rows * spilled_row_bytes(work)
    return fixed_bytes(work, layout), computing, chunks
