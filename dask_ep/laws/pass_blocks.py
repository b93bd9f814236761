"""How is a pass divided into blocks of experts, chunks and pieces, and what memory do they take?

All of this is arithmetic on a few numbers, which `passes` uses to choose.
"""

from __future__ import annotations

from collections.abc import Sequence

from dask_ep.laws.costs import CHUNKS_PER_THREAD, FEWEST_ROWS, SORT_BYTES
from dask_ep.laws.memory_law import Layout
from dask_ep.laws.work import Work

SPILLED_CHUNK_BYTES = 32 << 20
"""Maximum bytes of a token chunk if rows are spilled."""

BLOCK_BYTES = 32 << 20
"""Bytes of experts that make a task worthwhile: several smaller experts are loaded together."""

PIECE_ROWS = (256, 1024)
"""Fewest and most rows that a task computes if rows are spilled and an expert has that many: enough
for fast products, few enough for all threads to share an expert."""

PASSES_PROCESS_BYTES = 300_000_000
"""Memory of a process without experts, rows and tiles: more than in an ordinary run, since the C
library and the pool keep some memory of earlier blocks."""


def cut_pieces(
    rows: Sequence[int], piece_rows: int, threads: int
) -> list[list[tuple[int, int, int]]]:
    """Cut the rows of a block's experts into pieces of about equal size, one task each.

    Parameters
    ----------
    rows : number of rows of each expert of the block
    piece_rows : maximum rows of one piece
    threads : number of threads that share the block

    Returns
    -------
    list of pieces, each a list of (expert, start, stop): rows [start, stop) of an expert of the
    block. An expert is cut only if it has more rows than a piece, and then evenly.

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


def fixed_bytes(work: Work, layout: Layout) -> int:
    return PASSES_PROCESS_BYTES + work.layer.loaded + layout.threads * work.read_bytes


def spilled_chunk_rows(work: Work, layout: Layout, most: int) -> int:
    """Return the rows of a chunk to spill: the usual number, or fewer to keep all threads busy."""
    fair = -(-work.rows // (CHUNKS_PER_THREAD * layout.threads * (layout.dask_workers or 1)))
    usual = SPILLED_CHUNK_BYTES // max(work.token_bytes, work.d_out * work.dtype.itemsize)
    chunk_rows = min(max(usual, 1), max(fair, FEWEST_ROWS), most)
    return chunk_rows // (unit := read_together(work, chunk_rows)) * unit


def spilled_row_bytes(work: Work) -> int:
    """Bytes in memory of a row that is spilled or read back, whichever is wider; for a layer, with
    the output of its shared experts."""
    row = max(work.token_bytes, work.answer_bytes) + work.slots * SORT_BYTES
    return row + (work.answer_bytes if work.layer.loaded else 0)


def spilled_bytes(work: Work) -> int:
    """Return the bytes that one row takes on disk: its token rows and its answers."""
    itemsize = work.wide if work.apply_router_weight_on_input else work.dtype.itemsize
    return work.slots * (work.d * itemsize + work.answer_bytes)


def block_experts_of(work: Work) -> int:
    """Return how many experts are loaded together."""
    return min(max(BLOCK_BYTES // max(work.expert_loaded, 1), 1), max(work.experts, 1))


def blocks_bytes(work: Work, layout: Layout, decoded: int, ahead: int) -> int:
    """Return the bytes of `decoded` blocks in the computing dtype and `ahead` blocks as stored."""
    stored, loaded = (
        block_experts_of(work) * one for one in (work.expert_stored, work.expert_loaded)
    )
    decoding = min(layout.threads * work.matrix_stored, decoded * stored)
    return decoded * max(loaded, stored) + decoding + ahead * stored


def held_output_bytes(work: Work) -> int:
    """Return the bytes of an output row in memory: its sum, and its value if that is narrower.

    0 if the output overwrites the token row, which the other parts of a layer may still need.
    """
    alone = not work.layer.stored
    if alone and work.slots == 1 and work.d == work.d_out and work.wide == work.dtype.itemsize:
        return 0
    narrow = 0 if work.wide == work.dtype.itemsize else work.d_out * work.dtype.itemsize
    return work.answer_bytes + narrow


def choose_blocks(work: Work, layout: Layout, room: int, part: float) -> tuple[int, int] | None:
    """Choose how many blocks to have decoded and read ahead in `room` bytes; None if none fits.

    More than one of each only if they fit into a fraction `part` of the room.
    """
    chosen = (1, 0) if blocks_bytes(work, layout, 1, 0) <= room else None
    more = [
        (1, 1),
        *((decoded, 1) for decoded in range(2, layout.threads + 1)),
        (layout.threads, 2),
    ]
    for decoded, ahead in more:
        share = 1.0 if decoded + ahead <= 2 else part
        if blocks_bytes(work, layout, decoded, ahead) <= share * room:
            chosen = decoded, ahead
    return chosen


def read_together(work: Work, most: int) -> int:
    """Return the unit of rows for chunks of up to `most` rows that read stored chunks once."""
    stored = work.stored_rows
    return stored if stored is not None and stored <= most // 2 else 1


def written_together(work: Work, most: int) -> int:
    """Return the rows of a stored output chunk; chunks of up to `most` rows are multiples of it."""
    rows = read_together(work, most)
    usual = SPILLED_CHUNK_BYTES // max(work.d_out * work.dtype.itemsize, 1)
    while 2 * rows <= min(usual, most // 8):
        rows *= 2
    return rows


def round_up(rows: int, unit: int) -> int:
    return -(-rows // unit) * unit
