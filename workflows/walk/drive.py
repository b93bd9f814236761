"""How does a walk run, from its options to its summary?"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import dask.array as da
import numpy as np
import torch
from dask import delayed
from distributed import Client
from distributed.system import MEMORY_LIMIT
from transformers import AutoTokenizer

from dask_ep.arrays.checks import size_in_bytes
from dask_ep.cluster.dask_internals import scheduler_address
from dask_ep.jobs.backends import Cluster, Threads, started
from dask_ep.layers.checkpoint import load_moe_layer
from dask_ep.layers.collect import check_layer
from walk.documents import (
    AT_ONCE,
    Documents,
    hidden_shape,
    read_documents,
    read_hidden,
    request_files,
)
from walk.flow import check_start
from walk.memory import Need, find_need, keep_freed
from walk.model import Model, open_model
from walk.options import Options
from walk.progress import Progress
from walk.record import Record, fingerprint, keep_documents, read_json, write_json
from walk.stages import Asked, Walk, Where, hidden_error, score_all
from walk.tasks import Task, TorchThreads
from walk.tensors import numpy_dtype

HEAD_BYTES = 256 << 20
"""Bytes of the heads that are in memory at a time."""

MEMORY_PART = 0.8
"""Fraction of the machine's memory that a walk may fill by default."""


def run(options: Options, say: Callable[[str], Any] = lambda _: None) -> dict[str, Any]:
    """Walk, and return the summary that was written.

    Raises
    ------
    FileExistsError, ValueError
        If the output cannot be created or resumed, the options do not suit the model, or a walk
        cannot cut it into blocks.
    MemoryError
        If the memory limit is too low.
    """
    began = time.monotonic()
    read = read_documents(options.text, options.length, _tokenizer(options.model))
    models = [open_model(model, options.dtype, fingerprint(model)) for model in options.models]
    for model in models:
        model.free()  # a walk that failed in a block left it in memory
    blocks = options.blocks([len(model.blocks) for model in models])
    if options.start is not None:
        _check_start(options, models, blocks)
    _check_moe(options, models, blocks)
    kept = Record(options.out, options.decisive(read), options.resume)
    path = os.path.join(options.out, "summary.json")
    if os.path.exists(path):  # stopped after that, or complete
        summary = read_json(path)
    else:
        keep_documents(options.out, read)
        summary = _walk(options, read, models, blocks, kept, say)
        summary["seconds"] = round(time.monotonic() - began, 3)
        write_json(path, summary)
    for walk in _walks(options, models, Where()):
        walk.drop(len(walk.model.blocks))
    shutil.rmtree(os.path.join(options.out, "work"), ignore_errors=True)
    return summary


def _check_start(options: Options, models: list[Model], blocks: range) -> None:
    """Raise if hidden states of files cannot be the input of the first block."""
    path = request_files(options.text)[0]
    width = hidden_shape(path, options.column)[1]
    for model in models:
        if width != (wanted := model.flow.width(blocks[0] - 1)):
            raise ValueError(
                f"hidden states before block {blocks[0]} of {type(model.whole).__name__} must have "
                f"{wanted} columns, but those of {path} have {width}"
            )
        check_start(model, model.flow, blocks[0], blocks)


def _check_moe(options: Options, models: list[Model], blocks: range) -> None:
    """Raise if the walk would have to stop at a MoE module."""
    for model in models:
        for block in sorted(model.moe_blocks.intersection(blocks)):
            model.beside_moe(block)
    collected = (options.layers or blocks) if options.collect else ()
    for block in sorted(models[0].moe_blocks.intersection(collected)):
        check_layer(load_moe_layer(models[0].directory, block))


def _walk(
    options: Options,
    read: Documents,
    models: list[Model],
    blocks: range,
    kept: Record,
    say: Callable[[str], Any],
) -> dict[str, Any]:
    """Walk through the blocks, and return the summary."""
    torch.set_num_threads(-(-options.threads // AT_ONCE))
    keep_freed()
    gc.freeze()  # torch and transformers: looking through them takes 0.2 s each time
    progress = Progress(len(blocks) * len(models))
    with _client(options) as client:
        need = _state_need(models, options, read, client)
        say(str(need))
        kept.keep("moe_memory", need.experts)
        moe = _place_of_moe(options, client, kept.begun["moe_memory"])
        walks = _walks(options, models, Where(client, moe), progress.tell)
        with contextlib.closing(progress):
            _through_blocks(options, walks, blocks, kept, progress)
        summary = {"tokens": len(read.ids), "documents": len(read.lengths)}
        if blocks[-1] == len(models[0].blocks) - 1:
            summary |= _finish(options, walks, kept, say)
    return summary | {
        "bytes_read": sum(took["bytes_read"] for took in kept.blocks),
        "memory": {
            "limit": need.limit,
            "largest": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        },
        "blocks": kept.blocks,
    }


def _walks(
    options: Options,
    models: list[Model],
    where: Where,
    tell: Callable[[str, float], Any] = lambda *_: None,
) -> list[Walk]:
    """Return one walk for each model; the second one writes to a subdirectory."""
    out = os.path.realpath(options.out)
    blocks = options.layers or range(len(models[0].blocks))
    compared = len(models) > 1
    asked = [
        Asked(blocks, options.save, options.collect, compared),
        Asked(blocks, frozenset(), compared=compared),
    ]
    outs = [out, os.path.join(out, "compare")]
    return [
        Walk(
            Task(
                model.directory,
                options.dtype,
                out,
                options.chunk_rows,
                options.batch_tokens,
                options.precision_for(model.dtype),
                version=model.version,
            ),
            *(outs[number], asked[number], where, tell),
        )
        for number, model in enumerate(models)
    ]


def _through_blocks(
    options: Options, walks: list[Walk], blocks: range, kept: Record, progress: Progress
) -> None:
    for walk in walks:
        if walk.last_done is None:
            _begin(options, walk, blocks[0])
        elif walk.last_done >= blocks[0]:
            walk.tidy(walk.last_done)
    for block in blocks:
        progress.begin(block)
        kept.add(block, {})  # it may be stopped when the block is done, before that is recorded
        for number, walk in enumerate(walks):
            if block <= walk.last_done:
                progress.skip()
                continue
            took = walk.step(block)
            kept.add(block, took, "compare" if number else None)
            progress.end(took)
        if len(walks) == 2 and not kept.has(block, "error"):
            kept.add(block, hidden_error(*(walk.hidden(block) for walk in walks)), "error")
        for walk in walks:
            walk.drop(block)


def _begin(options: Options, walk: Walk, first: int) -> None:
    if options.start is None:
        walk.embed()
        return
    files = request_files(options.text)
    shapes = [hidden_shape(path, options.column) for path in files]
    dtype = numpy_dtype(walk.model.dtype)
    rows = da.concatenate([
        da.from_delayed(delayed(read_hidden)(path, options.column, dtype), shape, dtype)
        for path, shape in zip(files, shapes, strict=True)
    ])  # fmt: skip
    walk.start_from(rows, {path: f"{path}::hidden_states" for path in files}, first - 1)


def _finish(
    options: Options, walks: list[Walk], kept: Record, say: Callable[[str], Any]
) -> dict[str, Any]:
    """Write the final hidden states, and score them if there are heads."""
    finals = [walk.last_norm() for walk in walks]
    errors = {took["block"]: took["error"] for took in kept.blocks if "error" in took}
    other: dict[str, Any] = {"compare": {"hidden_error": errors}} if len(walks) == 2 else {}
    wholes = [walk.model.whole for walk in walks]
    if without := [whole for whole in wholes if whole.get_output_embeddings() is None]:
        say(f"{type(without[0]).__name__} has no head that gives logits of tokens: no loss")
        return other
    targets = os.path.join(os.path.realpath(options.out), "targets.npy")
    scores = score_all(walks, finals, targets, HEAD_BYTES)
    np.save(os.path.join(options.out, "loss.npy"), scores.loss)
    if scores.kl is not None:
        other["compare"] |= _mean(scores.other_loss) | {"kl": float(scores.kl.mean())}
    return _mean(scores.loss) | other


def _mean(loss: np.ndarray) -> dict[str, float]:
    """Return the mean over tokens that are followed by another; {} if there are none."""
    followed = loss[~np.isnan(loss)]
    if not len(followed):
        return {}
    mean = float(followed.mean())
    return {"loss": mean, "perplexity": float(np.exp(mean))}


def _state_need(
    models: list[Model], options: Options, read: Documents, client: Client | None
) -> Need:
    length = int(read.lengths.max())
    head = sum(m.config_width * m.dtype.itemsize for m in models)
    tokens = models[0].decoder.get_input_embeddings().num_embeddings
    return find_need(
        models,
        _limit(options, client),
        options.chunk_rows,
        max(options.batch_tokens // length, 1),
        length,
        min(HEAD_BYTES, head * tokens),
    )


def _tokenizer(model: str) -> Callable[[list[str]], list]:
    """Return a function from lines to their token ids; it loads the tokenizer when called."""
    return lambda lines: AutoTokenizer.from_pretrained(model)(lines)["input_ids"]


def _place_of_moe(options: Options, client: Client | None, memory: int) -> Threads | Cluster:
    """Return where the jobs of MoE layers run: in this process, or on the walk's workers."""
    if client is None:
        return Threads(options.threads, memory)
    if isinstance(options.where, Cluster):
        return options.where
    return Cluster(scheduler_address(client))


def _limit(options: Options, client: Client | None) -> int:
    """Return the bytes that a process may fill: this one, or the worker with the lowest limit."""
    if client is None:
        limits = [size_in_bytes(options.where.memory_limit)]
    else:
        workers = client.scheduler_info(n_workers=-1)["workers"].values()
        limits = [worker["memory_limit"] for worker in workers]
    return min(filter(None, limits), default=int(MEMORY_PART * MEMORY_LIMIT))


@contextlib.contextmanager
def _client(options: Options) -> Iterator[Client | None]:
    """Yield a client of the workers that were asked for, or None if the walk runs here."""
    if isinstance(options.where, Threads):
        yield None
        return
    files = {"the directory of out": os.path.dirname(os.path.realpath(options.out))}
    files |= {f"model {number}": model for number, model in enumerate(options.models, 1)}
    with started(options.where, files) as (_, client):
        client.wait_for_workers(1)
        _check_imports(client)
        client.register_plugin(TorchThreads())
        yield client


def _check_imports(client: Client) -> None:
    """Raise unless all workers can import the tasks."""

    def import_tasks() -> None:  # a local function is pickled by value: workers need no module
        importlib.import_module("walk.tasks")

    results = client.run(import_tasks, on_error="return")
    failed = [(worker, error) for worker, error in results.items() if error is not None]
    if failed:
        worker, error = failed[0]
        raise ImportError(
            f"workers must have torch and transformers, and workflows/ on their PYTHONPATH, but "
            f"{len(failed)} cannot import the walk, for example {worker}: {error}"
        )
