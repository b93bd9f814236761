"""How will a job run?

On which workers, with how many ranks, in chunks of how many rows; with all experts in memory, held
as stored, or processed in passes; and what travels. This is decided once, from plain numbers,
before any data is read: `run`, `plan` and their reports call `decide`, and raise the same errors.

    Work, Layout, options ── decide ──> Decision
                                └─────> DoesNotFit, with options that do fit
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

from dask_ep.errors import DoesNotFit, JobError
from dask_ep.jobs.resumed_run import Begun
from dask_ep.laws.costs import CHUNKS_PER_THREAD, FEWEST_ROWS
from dask_ep.laws.decision import Decision
from dask_ep.laws.device_memory import DEVICE_CHUNK_BYTES
from dask_ep.laws.memory_law import Layout, host_need, need, rows_within
from dask_ep.laws.passes import RATES, Passes, choose_passes, ways_to_wait
from dask_ep.laws.travel import ALL_ROWS, Travel
from dask_ep.laws.work import Work
from dask_ep.placement.placement import Placement
from dask_ep.storage.storage import CHUNK_BYTES

ROWS_THAT_PAY = 256
"""Rows of a chunk at an expert for which its products take about ten times as long as decoding its
stored weights."""

WAYS_OF: dict[str | None, tuple[str, ...]] = {"rows": ("spill",), "experts": ("hold",)}
"""What `travel` means with experts in passes: rows are spilled to where their experts are loaded,
or experts are loaded where rows are held."""


def decide(
    work: Work,
    layout: Layout,
    *,
    chunk_rows: int | None = None,
    travel: Travel = ALL_ROWS,
    free: Callable[[], int] | None = None,
    begun: Begun | None = None,
) -> Decision:
    """Decide how a job will run.

    Parameters
    ----------
    work, layout : what is computed, and where
    chunk_rows : rows of a token chunk, if given; all rows if there are fewer
    travel : what should travel, and the rates by which that is chosen
    free : function that returns the bytes of disk that are free for spilled rows; default:
        unlimited
    begun : the run that is resumed, which keeps its placement and its passes

    Raises
    ------
    DoesNotFit
        If no way to run the job fits into the memory limit; the error has the numbers, and options
        that do fit.
    JobError
        A ValueError: `travel` is not possible for this job.
    ValueError
        If a resumed run cannot continue as it began.

    Notes
    -----
    If all experts fit, they stay in memory. If they fit only as stored, they are held as stored
    provided that chunks that fit bring each expert `ROWS_THAT_PAY` rows, so that it is not decoded
    for just a few. Otherwise they are processed in passes. On GPUs, which have no passes, experts
    that fit only as stored are always held as stored.
    """
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1; got {chunk_rows}")
    asked = chunk_rows and min(chunk_rows, max(work.rows, 1))
    if begun is not None and begun.passes is not None:
        if not (layout.on_devices or begun.complete):
            _check_resumed(begun.passes, layout, asked)
        return Decision(work, layout, begun.passes.chunk_rows, passes=begun.passes)
    if begun is not None:
        asked = asked or begun.chunk_rows
        if begun.moves_experts and begun.world_size == layout.world_size:
            layout = replace(layout, placement=begun.placement)  # not one that would be chosen now
    as_stored = work.as_stored or _pays_as_stored(work, layout, asked)
    passes = None
    if begun is None and not _fits(work, layout, as_stored):
        passes = _find_passes(work, layout, as_stored, asked, travel, free)
    if travel.how is not None and layout.in_process and passes is None:
        raise JobError(
            "threads share memory, so nothing travels between them; use travel with workers, or "
            "with experts that do not fit into the memory limit"
        )
    if begun is not None:
        travel = ALL_ROWS
    rows = passes.chunk_rows if passes else _choose_chunk_rows(work, layout, as_stored, asked)
    as_stored = as_stored and passes is None
    return Decision(work, layout, rows, as_stored, passes, travel, chunk_rows is not None)


def attempt(work: Work, layout: Layout, **asked: Any) -> Decision | DoesNotFit:
    """Like `decide`, but return a `DoesNotFit` instead of raising it."""
    try:
        return decide(work, layout, **asked)
    except DoesNotFit as refusal:
        return refusal


# --- in memory -------------------------------------------------------------------------------


def _fits(work: Work, layout: Layout, as_stored: bool, asked: int | None = None) -> bool:
    return rows_within(work, layout, as_stored) >= (asked or FEWEST_ROWS)


def _pays_as_stored(work: Work, layout: Layout, asked: int | None) -> bool:
    """Return whether experts fit only as stored, and holding them so pays."""
    if _fits(work, layout, False) or not work.in_files or not _fits(work, layout, True, asked):
        return False
    slots = _choose_chunk_rows(work, layout, True, asked) * work.slots
    return layout.on_devices or slots >= ROWS_THAT_PAY * work.experts


def _choose_chunk_rows(work: Work, layout: Layout, as_stored: bool, asked: int | None) -> int:
    """Choose the rows of a token chunk: large, but within memory, and with some for every thread.

    They are those given, or a multiple or divisor of the stored chunks' rows if possible.
    """
    most = rows_within(work, layout, as_stored)
    if most < (asked or FEWEST_ROWS):
        raise _refusal(work, layout, as_stored, asked)
    rows = fit_stored(int(min(_usual_rows(work, layout), most)), work.stored_rows)
    return asked or min(rows, max(work.rows, 1))


def _usual_rows(work: Work, layout: Layout) -> int:
    """Return the rows of a chunk if memory does not limit them."""
    chunk_bytes = DEVICE_CHUNK_BYTES if layout.on_devices else CHUNK_BYTES
    fair = -(-work.rows // (CHUNKS_PER_THREAD * layout.threads * layout.serving))
    return min(max(chunk_bytes // max(work.row_bytes, 1), 1), max(fair, FEWEST_ROWS))


def fit_stored(rows: int, stored: int | None) -> int:
    """Return at most about `rows` rows, so that stored chunks are read whole or in equal parts.

    Examples
    --------
    >>> fit_stored(1000, 300), fit_stored(100, 300), fit_stored(100, None)
    (900, 100, 100)
    """
    if stored is None:
        return rows
    return rows // stored * stored if rows >= stored else -(-stored // -(-stored // rows))


# --- in passes -------------------------------------------------------------------------------


def _find_passes(
    work: Work,
    layout: Layout,
    as_stored: bool,
    asked: int | None,
    travel: Travel,
    free: Callable[[], int] | None,
) -> Passes:
    """Choose how experts that do not fit are processed in passes.

    `Travel.how` determines the way: rows travel to where their experts are loaded ("rows": they are
    spilled), experts travel to rows in memory ("experts": these are held), or the cheaper of both.
    """
    refusal = _refusal(work, layout, as_stored, asked)
    if layout.on_devices or not work.in_files:
        raise refusal
    possible = ways_to_wait(work, layout)
    ways = WAYS_OF.get(travel.how, possible)
    if not set(ways) <= set(possible):
        raise JobError(
            "travel must be rows or auto, since the experts do not fit: they can travel only to "
            "rows that are held in memory, which needs threads and a given routing"
        ) from refusal
    choose = partial(
        choose_passes,
        work,
        layout,
        free=None if free is None else free(),
        ways=ways,
        rates=replace(RATES, read=float(travel.read)),
    )
    try:
        return choose(chunk_rows=asked)
    except MemoryError as error:
        message = f"{refusal}. It does not fit with experts in passes either: {error}"
        if asked is not None and not refusal.proposal:
            with suppress(MemoryError):
                refusal.proposal["chunk_rows"] = choose().chunk_rows
                message += f"; it runs with --chunk-rows {refusal.proposal['chunk_rows']}"
        raise DoesNotFit(message, refusal.proposal, refusal.decision) from error


def _check_resumed(passes: Passes, layout: Layout, asked: int | None) -> None:
    """Raise if a resumed run in passes cannot continue as it began."""
    wrong = ""
    process, fewer = "the process", f"--threads {passes.threads}"
    limit = math.inf if layout.usable_bytes is None else layout.usable_bytes
    if not layout.in_process:
        process, fewer = "each worker", f"workers of {passes.threads}"
    if passes.way == "hold" and not layout.in_process:
        wrong = "holds rows in memory, which only threads share: resume on threads"
    elif layout.threads > passes.threads:
        wrong = (
            f"is planned for {passes.threads} threads, but {process} has {layout.threads}: resume "
            f"with {fewer}"
        )
    elif passes.memory_bytes > limit:
        wrong = (
            f"takes up to {passes.memory_bytes / 1e6:.0f} MB, but {process} may use "
            f"{limit / 1e6:.0f} MB: resume with more memory"
        )
    elif asked not in (None, passes.chunk_rows):
        wrong = f"has chunks of {passes.chunk_rows} rows, not {asked}: resume with those"
    if wrong:
        raise ValueError(f"the run to resume, with experts in passes, {wrong}, or overwrite it")


# --- what does not fit -----------------------------------------------------------------------


def _refusal(work: Work, layout: Layout, as_stored: bool, asked: int | None) -> DoesNotFit:
    """Explain why the job does not fit, with the numbers, and what to change."""
    law, limit, rows = need(work, layout, as_stored), layout.memory_limit, asked or FEWEST_ROWS
    whose = "a memory limit" if layout.serving == 1 else "each worker's memory limit"
    whom, instead = "the process", "allow more memory"
    if layout.ranks_given and limit is not None and law.at(rows) - law.expert_bytes < limit:
        instead += ", or more and smaller ranks"
    if layout.on_devices and limit is not None and law.at(rows) > limit:
        whose, whom = "the memory limit of a GPU", "CUDA"
        instead = (
            "use more GPUs, or none (--threads or --processes): there experts that do not fit are "
            "processed in passes"
        )
    elif layout.on_devices:
        whose, instead = "the memory limit of a GPU's worker on the host", "allow more memory"
        law, limit = host_need(work, layout), layout.host_limit
    assert limit is not None  # without one everything fits
    parts = {name: f"{nbytes / 1e6:.0f} MB" for name, nbytes in law.parts(rows).items()}
    reading = layout.threads * work.read_bytes
    decoding = ""
    if reading and not layout.on_devices:
        decoding = (
            f" (of which {reading / 1e6:.0f} MB to decode stored token chunks whole: store smaller "
            "ones)"
        )
    allowed, total = _in_megabytes(limit, law.at(rows))
    message = (
        f"{whose} of {allowed} must hold "
        f"{parts['experts']} of experts, {parts['process']} for {whom}, {parts['scratch']} of "
        f"scratch{decoding} and "
        f"{law.chunks:.3g} chunks of {rows} rows ({law.row_bytes} bytes each), "
        f"{total} in total; "
    )
    proposal = _proposal(work, layout, as_stored, asked)
    if proposal:
        options = " ".join(f"--{key.replace('_', '-')} {value}" for key, value in proposal.items())
        instead = f"within the same limit it runs with {options}"
        if "processes" in proposal and limit is not None:
            of_all = proposal["processes"] * limit / 1e9
            instead += f", each of which may use as much: {of_all:.3g} GB in total"
    usual = asked or max(_usual_rows(work, layout), FEWEST_ROWS)
    refused = Decision(work, layout, usual, as_stored, chunks_asked=asked is not None)
    return DoesNotFit(message + instead, proposal, refused)


def _in_megabytes(limit: int, need: int) -> tuple[str, str]:
    """Write two sizes with as many digits as tell them apart; a limit of 181 MB stays that."""
    for digits in range(7):
        allowed, total = f"{limit / 1e6:.{digits}f}", f"{need / 1e6:.{digits}f}"
        if allowed != total:
            break
    return f"{allowed.removesuffix('.' + '0' * digits)} MB", f"{total} MB"


def _proposal(work: Work, layout: Layout, as_stored: bool, asked: int | None) -> dict[str, Any]:
    """Return options with which the job fits; empty if there are none."""
    for options, other in _alternatives(work, layout, asked):
        if _fits(work, other, as_stored):
            if asked is not None:
                options["chunk_rows"] = _choose_chunk_rows(work, other, as_stored, None)
            return options
    return {}


def _alternatives(
    work: Work, layout: Layout, asked: int | None
) -> Iterator[tuple[dict[str, Any], Layout]]:
    """Yield other layouts, those with the smallest changes first: smaller chunks, fewer threads, no
    replicas of experts, more processes.
    """
    if asked is not None:
        yield {}, layout
    if layout.on_devices:
        return
    for threads in range(layout.threads - 1, 0, -1):
        yield {"threads": threads}, replace(layout, threads=threads)
    if layout.placement in ("balanced", "exact"):
        yield {"placement": "packed"}, replace(layout, placement="packed")
    fixed = layout.ranks_given or isinstance(layout.placement, Placement)
    workers, most = layout.workers, layout.world_size if fixed else work.experts
    while workers < most:
        workers = min(2 * workers, most)
        ranks = layout.world_size if fixed else workers
        yield (
            {"processes": workers},
            replace(layout, workers=workers, world_size=ranks, threads=1, in_process=False),
        )
