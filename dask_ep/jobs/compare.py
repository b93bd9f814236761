"""Do two checkpoints, or two outputs, compute the same?

    tokens ──> layer of a ──┐
           └─> layer of b ──┴─ difference ──> Difference      both in one pass, chunk by chunk
    output a, output b ─────── difference ──> Difference

Nothing is written, and only the chunks being computed are in memory. If the experts of both layers
do not fit into memory together, each layer runs as a separate job, and their outputs are compared.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory
from typing import Any

import dask
import dask.array as da
import numpy as np
from dask.callbacks import Callback
from distributed import Client, as_completed, futures_of

from dask_ep.cluster.dask_internals import result_of
from dask_ep.cluster.interrupts import Aside, Wait
from dask_ep.graph.keys import read_key
from dask_ep.jobs.backends import (
    ALL_THREADS,
    Where,
    computed_by,
    files_of,
    lay_out,
    started,
)
from dask_ep.jobs.build import Inputs, build, open_inputs
from dask_ep.jobs.decide import attempt
from dask_ep.jobs.difference import Difference, differences, join
from dask_ep.jobs.job import Job, resolve_path
from dask_ep.jobs.result import Progress
from dask_ep.jobs.run import owned_ranks, run_job
from dask_ep.jobs.verify import open_output
from dask_ep.laws.decision import Decision
from dask_ep.laws.memory_law import Layout
from dask_ep.layers.checkpoint_layers import Checkpoint
from dask_ep.storage.sources import Source
from dask_ep.storage.storage import open_tokens

OnRows = Callable[[int, int], Any]
"""Called with the number of rows done and in total, from threads."""


@dataclass(frozen=True)
class TensorDifferences:
    """How the tensors of a layer differ in two checkpoints, by their names in the block.

    In the names, ``*`` replaces the index of an expert; with each comes the number of tensors.
    """

    same: int
    #: number of tensors of the same name, shape and dtype
    dtypes: Mapping[tuple[str, str], int]
    #: number of tensors of the same name and shape, by their dtypes in a and b
    shapes: Mapping[str, str]
    #: description of the shapes of tensors in which they differ, by name
    only_a: Mapping[str, int]
    only_b: Mapping[str, int]


@dataclass(frozen=True)
class Comparison:
    """What a comparison found."""

    difference: Difference
    tolerance: float | None
    #: maximum error of a row
    share: float
    #: fraction of the rows that must be within it
    routing_compared: bool
    tensors: TensorDifferences | None = None
    layer: int | None = None

    @property
    def good(self) -> bool:
        """Whether enough rows are within the tolerance; always true without one."""
        found = self.difference
        if self.tolerance is None or not found.beyond:
            return True
        return (found.rows - found.beyond) / found.rows >= self.share


def compare_checkpoints(
    a: str | os.PathLike,
    b: str | os.PathLike,
    tokens: str | os.PathLike,
    layer: int | None = None,
    where: Where = ALL_THREADS,
    *,
    token_ids: str | os.PathLike | None = None,
    scratch: str | os.PathLike | None = None,
    chunk_rows: int | None = None,
    tolerance: float | None = None,
    share: float = 1.0,
    on_progress: OnRows | None = None,
    wait: Wait = SimpleQueue.get,
) -> Comparison:
    """Compare what a layer of two checkpoints computes.

    Parameters
    ----------
    a, b : checkpoint directories, or GGUF files; errors are relative to the output of `a`
    tokens : (n, d) hidden states, the layer's input
    layer : index of the layer; optional if there is only one MoE layer
    where : as in `dask_ep.jobs.run.run_job`
    token_ids : (n,) integers, for layers that look experts up by token
    scratch : directory for both outputs, if the layers are computed one after the other; by default
        the system's directory for temporary files
    chunk_rows : rows of a token chunk; by default what fits both layers
    tolerance : maximum error of a row, see `dask_ep.jobs.difference`
    share : fraction of the rows that must be within it
    on_progress, wait : see `OnRows` and `run_job`

    Raises
    ------
    ValueError
        If the layer is ambiguous, the layers' widths differ, or a checkpoint has tensors of the
        layer that would not be used: the message names them.
    DoesNotFit
        If one of the layers cannot be run within the memory limit.

    Notes
    -----
    If the experts of each layer fit into half of the memory limit, possibly held as stored, the
    tokens are read once, in one pass. Otherwise each layer runs separately, as `run_job` decides,
    with experts in passes if necessary, and the outputs are compared. The routing is compared if
    both layers have the same number of experts.
    """
    layer = _layer_of(a, b) if layer is None else layer
    judged: dict[str, Any] = {"tolerance": tolerance, "share": share}
    callbacks: dict[str, Any] = {"on_progress": on_progress, "wait": wait}
    with TemporaryDirectory(prefix="dask-ep-compare-", dir=scratch) as place:
        jobs = [
            Job(
                tokens=_path(tokens), out=os.path.join(place, f"{name}.zarr"), layer=_path(path),
                layer_index=layer, token_ids=None if token_ids is None else _path(token_ids),
                name=_path(path),
            )
            for name, path in (("a", a), ("b", b))
        ]  # fmt: skip
        found = _compare_together(jobs, where, chunk_rows, judged, **callbacks)
        if found is None:
            found = _compare_apart(jobs, where, chunk_rows, judged, **callbacks)
    return replace(found, tensors=compare_tensors(a, b, layer), layer=layer)


def compare_outputs(
    a: str | os.PathLike,
    b: str | os.PathLike,
    where: Where = ALL_THREADS,
    *,
    routing: Sequence[str | os.PathLike] = (),
    chunk_rows: int | None = None,
    tolerance: float | None = None,
    share: float = 1.0,
    on_progress: OnRows | None = None,
    wait: Wait = SimpleQueue.get,
) -> Comparison:
    """Compare two outputs, row by row.

    Parameters
    ----------
    a, b : (n, d) array files; errors are relative to `a`
    routing : files (n, k) or (n,) with the routing of `a`, for errors by expert, and that of `b`,
        to compare both
    where, chunk_rows, tolerance, share, on_progress, wait : as in `compare_checkpoints`

    Raises
    ------
    FileNotFoundError
        If an output is missing or not complete.
    ValueError
        If shapes do not fit.
    """
    outputs = [open_output(_path(path)) for path in (a, b)]
    routings = [open_output(_path(path)) for path in routing]
    _check_shapes(outputs, routings)
    files = {source.name: _path(path) for source, path in zip(outputs, (a, b), strict=True)}
    with started(where, files_of(files), wait) as (threads, client):
        first = open_tokens(outputs[0], chunks=chunk_rows)
        second, *rest = (open_tokens(each, like=first) for each in (outputs[1], *routings))
        largest = [int(each.max().compute()) for each in rest if each.size]
        experts = 1 + max([0, *largest]) if rest else 0
        compute = partial(_computed, threads, client, on_progress, wait)
        return _compared([first, second], rest, experts, compute, tolerance, share)


def _compare_together(
    jobs: Sequence[Job],
    where: Where,
    chunk_rows: int | None,
    judged: Mapping[str, Any],
    on_progress: OnRows | None,
    wait: Wait,
) -> Comparison | None:
    """Compute both layers in one pass; None if their experts do not fit together."""
    inputs = [open_inputs(job) for job in jobs]
    experts = [_known_experts(each) for each in inputs]
    files = {"tokens": jobs[0].tokens, "a": jobs[0].layer, "b": jobs[1].layer}
    with started(where, files_of(files), wait) as (threads, client):
        layout = lay_out(jobs[0], where, client)
        decisions = _decide_both(inputs, layout, chunk_rows)
        if decisions is None:
            return None
        compute = partial(_computed, threads, client, on_progress, wait)
        with owned_ranks(client, layout.world_size):
            built = [
                build(one, decision, computed_by(where, client, one))
                for one, decision in zip(inputs, decisions, strict=True)
            ]
            routed = built if experts[0] == experts[1] else built[:1]
            return _compared(
                [each.y for each in built], [each.routing[0] for each in routed], experts[0],
                compute, **judged,
            )  # fmt: skip


def _compare_apart(
    jobs: Sequence[Job],
    where: Where,
    chunk_rows: int | None,
    judged: Mapping[str, Any],
    on_progress: OnRows | None,
    wait: Wait,
) -> Comparison:
    """Run one layer after the other, and compare their outputs."""

    def tell(part: int, how: Progress) -> None:
        if on_progress is not None:
            rows = how.rows_in_all
            on_progress(part * rows + how.rows_done + how.rows_before, 3 * rows)

    def tell_at_last(done: int, rows: int) -> None:
        if on_progress is not None:
            on_progress(2 * rows + done, 3 * rows)

    routings = []
    for part, job in enumerate(jobs):
        routings.append(os.path.join(os.path.dirname(job.out), f"routing-{part}.zarr"))
        run_job(
            job, where, chunk_rows=chunk_rows, save_routing=routings[-1],
            on_progress=partial(tell, part), wait=wait,
        )  # fmt: skip
    same = len({_known_experts(open_inputs(job)) for job in jobs}) == 1
    return compare_outputs(
        jobs[0].out, jobs[1].out, where, routing=routings if same else routings[:1],
        chunk_rows=chunk_rows, **judged, on_progress=tell_at_last, wait=wait,
    )  # fmt: skip


def _known_experts(inputs: Inputs) -> int:
    assert inputs.layer is not None
    return inputs.layer.known_experts


# --- what is compared ----------------------------------------------------------------------------


def _path(path: str | os.PathLike) -> str:
    return resolve_path(os.fspath(path), Path.cwd())


def _layer_of(a: str | os.PathLike, b: str | os.PathLike) -> int:
    both = [set(Checkpoint(each).moe_layers) for each in (a, b)]
    layers = sorted(both[0] & both[1])
    if len(layers) != 1:
        raise ValueError(
            f"say which layer to compare: {a} and {b} have {len(layers)} MoE layers in common"
            + (f", {layers[0]} to {layers[-1]}" if layers else "")
        )
    return layers[0]


def _decide_both(
    inputs: Sequence[Inputs], layout: Layout, chunk_rows: int | None
) -> list[Decision] | None:
    """Decide how both layers run, in the same chunks, with half of the memory each.

    None if they do not fit.
    """
    limit, rows = layout.memory_limit, chunk_rows
    half = layout if limit is None else replace(layout, memory_limit=limit // 2)
    works = [each.work(layout.on_devices) for each in inputs]
    for _ in range(2):  # the second time with the smaller of both chunk sizes
        found = [attempt(work, half, chunk_rows=rows) for work in works]
        fitting = [one for one in found if isinstance(one, Decision) and one.passes is None]
        if len(fitting) < len(found):
            return None
        rows = min(one.chunk_rows for one in fitting)
    return fitting


def _check_shapes(outputs: Sequence[Source], routings: Sequence[Source]) -> None:
    a, b = outputs
    if a.ndim != 2 or a.shape != b.shape:
        raise ValueError(
            f"both outputs must be (n, d) of the same shape, but {a.name} is {a.shape} and "
            f"{b.name} {b.shape}"
        )
    if len(routings) > 2:
        raise ValueError(f"give the routing of a, or of both; got {len(routings)}")
    for each in routings:
        if each.shape[:1] != a.shape[:1] or each.ndim > 2 or each.dtype.kind not in "iu":
            raise ValueError(
                f"a routing must hold integers, (n,) or (n, k) with n = {a.shape[0]} rows, but "
                f"{each.name} has shape {each.shape} and dtype {each.dtype}"
            )


# --- computing -----------------------------------------------------------------------------------


class _Chunks(Callback):
    """Reports the chunks that have been compared, with the local schedulers."""

    def __init__(self, tell: Callable[[int], Any]):
        super().__init__(posttask=self._look)
        self._tell = tell

    def _look(self, key: Any, *_: Any) -> None:
        found = read_key(key)
        if found is not None and found.step == "compare":
            self._tell(found.chunk)


def _compared(
    outputs: Sequence[da.Array],
    routing: Sequence[da.Array],
    num_experts: int,
    compute: Callable[[da.Array, Sequence[int]], Difference],
    tolerance: float | None,
    share: float,
) -> Comparison:
    """Compare lazy outputs, and apply the tolerance."""
    a, b = outputs
    lazy = differences(
        a, b, routing, num_experts=num_experts,
        tolerance=np.inf if tolerance is None else tolerance,
    )  # fmt: skip
    return Comparison(compute(lazy, a.chunks[0]), tolerance, share, len(routing) == 2)


def _computed(
    threads: int,
    client: Client | None,
    on_progress: OnRows | None,
    wait: Wait,
    lazy: da.Array,
    chunks: Sequence[int],
) -> Difference:
    """Compute and join differences on threads or workers, while this thread waits for signals."""
    futures, whole = [], None
    if client is not None:
        parts = client.persist(lazy)
        futures, whole = futures_of(parts), client.compute(join(parts))

    def work(tell: Callable[[Any], None]) -> None:
        if whole is None:
            with _Chunks(tell):
                (found,) = dask.compute(join(lazy), scheduler="threads", num_workers=threads)
            tell(found)
            return
        for future in as_completed(futures):
            if future.status != "finished":
                future.result()  # raises the error of the task
            tell(future.key[1])
        tell(result_of(whole))

    found, done = None, 0
    try:
        for message in Aside(work, wait):
            if not isinstance(message, int):
                found = message
            elif on_progress is not None:
                done += chunks[message]
                on_progress(done, sum(chunks))
    finally:
        if client is not None:  # only tasks on which no other depends may be cancelled
            client.cancel([whole])
            client.cancel(futures)
    assert found is not None  # set when all tasks are done
    return found.item()


# --- tensors -------------------------------------------------------------------------------------


def compare_tensors(a: str | os.PathLike, b: str | os.PathLike, layer: int) -> TensorDifferences:
    """Compare names, shapes and dtypes of a layer's tensors in two checkpoints; reads headers."""
    x, y = (dict(Checkpoint(each).block_tensors(layer)) for each in (a, b))
    dtypes: Counter[tuple[str, str]] = Counter()
    shapes, same = {}, 0
    for name in sorted(x.keys() & y.keys()):
        if x[name].shape != y[name].shape:
            shapes[name] = f"{x[name].shape} and {y[name].shape}"
        elif x[name].dtype != y[name].dtype:
            dtypes[x[name].dtype.name, y[name].dtype.name] += 1
        else:
            same += 1
    return TensorDifferences(
        same, dtypes, shapes, _patterns(x.keys() - y.keys()), _patterns(y.keys() - x.keys())
    )


def _patterns(names: set[str]) -> dict[str, int]:
    """Replace indices of experts in names by ``*``, and count the tensors of each name."""
    return dict(sorted(Counter(re.sub(r"\.\d+\.", ".*.", name) for name in names).items()))
