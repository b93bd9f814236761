"""How does a token chunk go through one decoder block, when its MoE module is elsewhere?

    rows ──> attend: the block runs up to its MoE module, whose input rows are the answer;
             what attention gave is kept
    MoE input ──> dask_ep ──> MoE output
    rows, MoE output ──> finish: the block runs again, with attention and MoE module answering what
                         is known; only norms and sums are computed twice

The model's own forward calls the block, so that masks, rotary embeddings and all else that a block
is given are the model's: stand-ins take the places of all other blocks, and one hands the stored
rows to the block instead of what comes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from walk.documents import batch_documents
from walk.model import Model, path_of
from walk.tensors import as_numpy, as_tensor, numpy_dtype


class Reached(Exception):
    """What was wanted is there: the rest of the model need not run."""

    def __init__(self, value: torch.Tensor):
        self.value = value


class StandIn(nn.Module):
    """In the place of a block: does `act`, and otherwise looks like the block."""

    def __init__(self, block: nn.Module, act: Callable[..., torch.Tensor]):
        super().__init__()
        self.__dict__.update(block=block, act=act)  # not a child: the block is not part of this

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"], name)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.act(hidden_states, *args, **kwargs)


class Answer(torch.Tensor):
    """A module's output where some models expect it alone, and others in a pair with scores."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __iter__(self) -> Iterator[Any]:
        return iter((self.as_subclass(torch.Tensor), None))


# --- the model's parts -----------------------------------------------------------------------


def embed(model: Model, ids: np.ndarray, lengths: Sequence[int], tokens: int) -> np.ndarray:
    """Return what the first block is given, (n, d), for the ids of whole documents."""

    def first(hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        raise Reached(hidden_states)

    embedding = model.decoder.get_input_embeddings()
    name = model.names_outside[path_of(model.whole, embedding) + "weight"]
    used, places = np.unique(ids, return_inverse=True)
    before, source = embedding.weight, model.source(name)
    if used[-1] >= source.shape[0] or used[0] < 0:
        raise ValueError(
            f"token ids must be in [0, {source.shape[0]}), the vocabulary of {model.directory}, "
            f"but there is {used[-1] if used[0] >= 0 else used[0]}"
        )
    rows = np.concatenate([source.read(first, last) for first, last in _runs(used)])
    embedding.weight = nn.Parameter(as_tensor(rows).to(model.dtype), requires_grad=False)
    try:
        with blocks_replaced(model, {0: first}):
            return _in_batches(
                places[:, None], lengths, tokens, model,
                lambda batch, _: _until_reached(model, input_ids=batch[..., 0]),
            )  # fmt: skip
    finally:
        embedding.weight = before


def whole(
    model: Model, block: int, rows: np.ndarray, lengths: Sequence[int], tokens: int
) -> np.ndarray:
    """Send rows (n, d) of whole documents through a block without a MoE module."""
    with model.lock:
        held = model.hold(block)
        return _in_batches(
            rows, lengths, tokens, model, lambda batch, _: _run_block(model, block, held, batch)
        )


def attend(
    model: Model, block: int, rows: np.ndarray, lengths: Sequence[int], tokens: int, kept: str
) -> np.ndarray:
    """Return the rows (n, d) that the block's MoE module is given; keep what attention gave.

    Parameters
    ----------
    rows : (n, d), of whole documents
    lengths : of the documents
    tokens : of a batch at most, padding included
    kept : the file that `finish` reads again
    """

    def moe(hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        raise Reached(hidden_states)

    results: list[dict[str, list]] = []

    def run(batch: torch.Tensor, _: np.ndarray) -> torch.Tensor:
        results.append({})
        with child_replaced(held, child, moe), _results_kept(held, results[-1]):
            return _run_block(model, block, held, batch)

    with model.lock:
        held, child = model.hold(block), model.moe_child(block)
        out = _in_batches(rows, lengths, tokens, model, run)
    torch.save(results, kept + ".new")
    os.replace(kept + ".new", kept)
    return out


def finish(
    model: Model,
    block: int,
    rows: np.ndarray,
    moe_rows: np.ndarray,
    lengths: Sequence[int],
    tokens: int,
    kept: str,
) -> np.ndarray:
    """Return the block's output (n, d), from its input and what its MoE module gave."""
    results = iter(torch.load(kept, weights_only=True))

    def run(batch: torch.Tensor, places: np.ndarray) -> torch.Tensor:
        moe_batch = as_tensor(_padded(moe_rows, places)).as_subclass(Answer)
        with (
            child_replaced(held, child, lambda *_, **__: moe_batch),
            _results_given(held, next(results)),
        ):
            return _run_block(model, block, held, batch)

    with model.lock:
        held, child = model.hold(block), model.moe_child(block)
        return _in_batches(rows, lengths, tokens, model, run)


def last_norm(model: Model, rows: np.ndarray, lengths: Sequence[int], tokens: int) -> np.ndarray:
    """Return the model's last hidden states (n, d), from the output of the last block."""

    def run(batch: torch.Tensor, _: np.ndarray) -> torch.Tensor:
        with blocks_replaced(model, {len(model.blocks) - 1: lambda *_, **__: batch}):
            return model.decoder(inputs_embeds=batch, use_cache=False).last_hidden_state

    with model.lock:
        return _in_batches(rows, lengths, tokens, model, run)


# --- running a block -------------------------------------------------------------------------


def _run_block(model: Model, block: int, held: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Run the model's forward, in which the block alone computes, from the stored rows."""

    def real(_: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        out = held(batch, *args, **kwargs)
        raise Reached(out[0] if isinstance(out, tuple) else out)

    with blocks_replaced(model, {block: real}):
        return _until_reached(model, inputs_embeds=batch)


def _until_reached(model: Model, **inputs: torch.Tensor) -> torch.Tensor:
    try:
        model.decoder(**inputs, use_cache=False)
    except Reached as reached:
        return reached.value
    raise RuntimeError(f"{type(model.decoder).__name__} did not call the block")


def _in_batches(
    rows: np.ndarray,
    lengths: Sequence[int],
    tokens: int,
    model: Model,
    run: Callable[[torch.Tensor, np.ndarray], torch.Tensor],
) -> np.ndarray:
    """Run rows in batches of documents; `run` gets a batch, and the row of each of its places."""
    ends = np.cumsum(lengths)
    out: np.ndarray | None = None
    with torch.inference_mode():
        for documents in batch_documents(lengths, tokens):
            longest = max(lengths[d] for d in documents)
            places = np.full((len(documents), longest), -1)
            for row, d in zip(places, documents, strict=True):
                row[: lengths[d]] = np.arange(ends[d] - lengths[d], ends[d])
            answer = as_numpy(run(as_tensor(_padded(rows, places)), places))
            answer = answer.reshape(*places.shape, -1)
            if out is None:
                out = np.empty((len(rows), answer.shape[-1]), numpy_dtype(model.dtype))
            out[places[places >= 0]] = answer[places >= 0]
    return out


def _padded(rows: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Put rows at their places (documents, length); zeros where a place is -1."""
    batch = rows[places]
    batch[places < 0] = 0
    return batch


# --- stand-ins -------------------------------------------------------------------------------


@contextmanager
def blocks_replaced(model: Model, acts: dict[int, Callable[..., torch.Tensor]]) -> Iterator[None]:
    """Let stand-ins take the places of all blocks; those without an act pass on what comes."""
    before = model.decoder.layers
    model.decoder.layers = nn.ModuleList(
        StandIn(block, acts.get(number, lambda hidden_states, *_, **__: hidden_states))
        for number, block in enumerate(model.blocks)
    )
    try:
        yield
    finally:
        model.decoder.layers = before


@contextmanager
def child_replaced(block: nn.Module, name: str, act: Callable[..., torch.Tensor]) -> Iterator[None]:
    path, _, last = name.rpartition(".")
    parent, before = block.get_submodule(path), block.get_submodule(name)
    setattr(parent, last, StandIn(before, act))
    try:
        yield
    finally:
        setattr(parent, last, before)


@contextmanager
def _results_kept(block: nn.Module, results: dict[str, list]) -> Iterator[None]:
    """Keep what the children with modules of their own give: the costly ones, unlike norms."""

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            parts = output if isinstance(output, tuple) else (output,)
            results.setdefault(name, []).append((len(parts), isinstance(output, tuple), parts[0]))

        return hook

    hooks = [
        child.register_forward_hook(keep(name))
        for name, child in block.named_children()
        if any(True for _ in child.children()) and not isinstance(child, StandIn)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _results_given(block: nn.Module, results: dict[str, list]) -> Iterator[None]:
    """Let children answer what they gave before; of a tuple, the first part."""
    before = {name: getattr(block, name) for name in results}
    for name, given in results.items():
        answers = iter(
            (first, *(None,) * (count - 1)) if in_tuple else first
            for count, in_tuple, first in given
        )
        setattr(block, name, StandIn(before[name], lambda *_, _next=answers, **__: next(_next)))
    try:
        yield
    finally:
        for name, child in before.items():
            setattr(block, name, child)


# --- small things ----------------------------------------------------------------------------


def _runs(numbers: np.ndarray) -> list[tuple[int, int]]:
    """Cut sorted numbers into ranges without gaps."""
    breaks = np.flatnonzero(np.diff(numbers) != 1) + 1
    return [(int(run[0]), int(run[-1]) + 1) for run in np.split(numbers, breaks)]
