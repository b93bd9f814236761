"""Do two checkpoints, or two outputs, compute the same?

    tokens ──> layer of a ──┐
           └─> layer of b ──┴─ difference ──> Difference      both in one pass, chunk by chunk
    output a, output b ─────── difference ──> Difference

Nothing is written, and no more of the rows is in memory than the chunks at work.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import Any

import dask
import dask.array as da
import numpy as np
from dask.callbacks import Callback
from distributed import Client

from dask_ep.cluster.interrupts import Aside, Wait
from dask_ep.cluster.ownership import own_experts
from dask_ep.errors import DoesNotFit
from dask_ep.graph.keys import read_key
from dask_ep.jobs.backends import (
    ALL_THREADS,
    Where,
    array_namespace,
    blas_in_use,
    files_of,
    lay_out,
    multiplies_as_tf32,
    started,
)
from dask_ep.jobs.build import Built, Inputs, build, open_inputs
from dask_ep.jobs.decide import decide
from dask_ep.jobs.difference import Difference, difference
from dask_ep.jobs.job import Job
from dask_ep.jobs.verify import open_output
from dask_ep.laws.decision import Decision
from dask_ep.laws.memory_law import Layout
from dask_ep.layers.checkpoint import Checkpoint
from dask_ep.storage.sources import Source
from dask_ep.storage.storage import open_tokens

OnChunk = Callable[[int, int], Any]
"""Called with the chunks that are done, and the number of all, on threads."""


@dataclass(frozen=True)
class TensorDifferences:
    """How the tensors of a layer differ in two checkpoints, by their names in the block.

    Numbers of experts are ``*`` in the names, which come with how many they stand for.
    """

    same: int
    #: tensors of the same name, shape and dtype
    dtypes: Mapping[tuple[str, str], int]
    #: tensors of the same name and shape, by their dtypes in a and b
    shapes: Mapping[str, str]
    #: of other shapes, in words
    only_a: Mapping[str, int]
    only_b: Mapping[str, int]


@dataclass(frozen=True)
class Comparison:
    """What a comparison found."""

    difference: Difference
    tolerance: float | None
    #: of the error of a row
    share: float
    #: of the rows, which must be within it
    routing_compared: bool
    tensors: TensorDifferences | None = None
    layer: int | None = None

    @property
    def good(self) -> bool:
        """Whether enough rows are within the tolerance; always without one."""
        found = self.difference
        return self.tolerance is None or found.beyond <= (1 - self.share) * found.rows


def compare_checkpoints(
    a: str | os.PathLike,
    b: str | os.PathLike,
    tokens: str | os.PathLike,
    layer: int | None = None,
    where: Where = ALL_THREADS,
    *,
    tolerance: float | None = None,
    share: float = 1.0,
    chunk_rows: int | None = None,
    on_chunk: OnChunk | None = None,
    wait: Wait = SimpleQueue.get,
) -> Comparison:
    """Compare what a layer of two checkpoints computes.

    Parameters
    ----------
    a, b : checkpoint directories; errors are relative to the output of `a`
    tokens : (n, d) hidden states that the layer gets
    layer : number of the layer; may be left out where there is one MoE layer
    where : as for `dask_ep.jobs.run.run_job`
    tolerance : of the error of a row, see `dask_ep.jobs.difference`
    share : part of the rows that must be within it
    chunk_rows : rows of a token chunk; by default what fits both layers
    on_chunk, wait : see `OnChunk` and `run_job`

    Raises
    ------
    ValueError
        If the layers cannot be told, take rows of other widths, or a checkpoint has tensors of the
        layer that would not be used: the message names them.
    DoesNotFit
        If the experts of both do not fit into half of the memory limit each.

    Notes
    -----
    One pass over the tokens, which are read once. The routing is compared where both layers have as
    many experts.
    """
    layer = _layer_of(a, b) if layer is None else layer
    unwritten = os.path.abspath("comparison.npy")  # a job has an output, and this one writes none
    jobs = [
        Job(
            tokens=_path(tokens), out=unwritten, layer=_path(each), layer_index=layer,
            name=_path(each),
        )
        for each in (a, b)
    ]  # fmt: skip
    inputs = [open_inputs(job) for job in jobs]
    experts = [each.experts.num_experts for each in inputs]
    same = experts[0] == experts[1]
    files = {"tokens": jobs[0].tokens, "a": jobs[0].layer, "b": jobs[1].layer}
    with started(where, files_of(files), wait) as (threads, client):
        layout = lay_out(jobs[0], where, client)
        decisions = _decide_both(inputs, layout, chunk_rows)
        ranks = layout.world_size
        with nullcontext() if client is None or ranks == 1 else own_experts(client, ranks):
            built = [_built(*both, where, client) for both in zip(inputs, decisions, strict=True)]
            lazy = difference(
                built[0].y,
                built[1].y,
                [each.routing[0] for each in (built if same else built[:1])],
                num_experts=experts[0],
                tolerance=np.inf if tolerance is None else tolerance,
            )
            found = _computed(lazy, threads, client, len(built[0].y.chunks[0]), on_chunk, wait)
    return Comparison(found, tolerance, share, same, compare_tensors(a, b, layer), layer)


def compare_outputs(
    a: str | os.PathLike,
    b: str | os.PathLike,
    where: Where = ALL_THREADS,
    *,
    routing: Sequence[str | os.PathLike] = (),
    tolerance: float | None = None,
    share: float = 1.0,
    chunk_rows: int | None = None,
    on_chunk: OnChunk | None = None,
    wait: Wait = SimpleQueue.get,
) -> Comparison:
    """Compare two outputs, row by row.

    Parameters
    ----------
    a, b : (n, d) array files; errors are relative to `a`
    routing : of `a`, as (n, k) or (n,) file, for errors by expert; and of `b`, to compare them
    where, tolerance, share, chunk_rows, on_chunk, wait : as for `compare_checkpoints`

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
        experts = 1 + max((int(each.max().compute()) for each in rest), default=-1)
        lazy = difference(
            first,
            second,
            rest,
            num_experts=experts,
            tolerance=np.inf if tolerance is None else tolerance,
        )
        found = _computed(lazy, threads, client, len(first.chunks[0]), on_chunk, wait)
    return Comparison(found, tolerance, share, len(rest) == 2)


# --- what is compared ----------------------------------------------------------------------------


def _path(path: str | os.PathLike) -> str:
    text = os.fspath(path)
    if "://" in text:
        return text
    file, separator, tensor = text.partition("::")
    return f"{os.path.realpath(file)}{separator}{tensor}"


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
) -> list[Decision]:
    """Decide how both layers run, in the same chunks and half of the memory each."""
    limit = layout.memory_limit
    half = layout if limit is None else replace(layout, memory_limit=limit // 2)
    works = [each.work(layout.on_devices) for each in inputs]
    rows = min(decide(work, half, chunk_rows=chunk_rows).chunk_rows for work in works)
    decisions = [decide(work, half, chunk_rows=rows) for work in works]
    for each, decision in zip(inputs, decisions, strict=True):
        if decision.passes is not None:
            assert limit is not None  # without one all experts are held
            raise DoesNotFit(
                f"the experts of {each.job.layer} do not fit into half of the memory limit of "
                f"{limit / 1e6:.0f} MB, and both layers are in memory together: allow more, or run "
                "them one after the other (`dask-ep run`) and compare the outputs",
                {},
                decision,
            )
    return decisions


def _built(inputs: Inputs, decision: Decision, where: Where, client: Client | None) -> Built:
    return build(
        inputs,
        decision,
        xp=array_namespace(where),
        tf32=multiplies_as_tf32(where, client),
        multiplied_by=blas_in_use(where, client, inputs),
    )


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
                f"a routing must be whole numbers, (n,) or (n, k) with n = {a.shape[0]} rows, but "
                f"{each.name} is {each.shape} of {each.dtype}"
            )


# --- computing -----------------------------------------------------------------------------------


class _Chunks(Callback):
    """Tells of the chunks that are compared, on the local schedulers."""

    def __init__(self, tell: Callable[[int], Any]):
        super().__init__(posttask=self._look)
        self._tell, self._done = tell, 0

    def _look(self, key: Any, *_: Any) -> None:
        said = read_key(key)
        if said is not None and said.step == "compare":
            self._done += 1
            self._tell(self._done)


def _computed(
    lazy: da.Array,
    threads: int,
    client: Client | None,
    chunks: int,
    on_chunk: OnChunk | None,
    wait: Wait,
) -> Difference:
    """Compute a lazy difference where the work is done, while this thread waits for signals."""

    future = None if client is None else client.compute(lazy)

    def work(tell: Callable[[Any], None]) -> None:
        if future is not None:
            tell(future.result())
            return
        with _Chunks(tell):
            (found,) = dask.compute(lazy, scheduler="threads", num_workers=threads)
        tell(found)

    found: Any = None
    try:
        for told in Aside(work, wait):
            if not isinstance(told, int):
                found = told
            elif on_chunk is not None:
                on_chunk(told, chunks)
    finally:
        if client is not None:
            client.cancel(future)
    assert found is not None  # told at the end
    return found.item()


# --- tensors -------------------------------------------------------------------------------------


def compare_tensors(a: str | os.PathLike, b: str | os.PathLike, layer: int) -> TensorDifferences:
    """Compare names, shapes and dtypes of a layer's tensors in two checkpoints; reads headers."""
    x, y = (_tensors(Checkpoint(each), layer) for each in (a, b))
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


def _tensors(checkpoint: Checkpoint, layer: int) -> dict[str, Source]:
    return {
        name: source
        for prefix, block in checkpoint.places(layer)
        for name, source in checkpoint.files.under(f"{prefix}{block}." if block else prefix).items()
    }


def _patterns(names: set[str]) -> dict[str, int]:
    """Names with ``*`` for the numbers of experts, and how many tensors each stands for."""
    return dict(sorted(Counter(re.sub(r"\.\d+\.", ".*.", name) for name in names).items()))
