"""How does a token chunk go through one decoder block, when its MoE module is elsewhere?

    rows ──> attend: the block runs once, from end to end; its MoE module is a stand-in, which hands
             its input over and gives back something of the same shape
             what the block does with that is written down, with the numbers that it needs
    MoE input ──> dask_ep ──> MoE output
    MoE output ──> finish: what was written down is done with it: a sum with the residual, mostly

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
from walk.tape import Tape, play
from walk.tensors import as_numpy, as_tensor


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
        return iter((self, None))


# --- the model's parts -----------------------------------------------------------------------


def embed(model: Model, ids: np.ndarray, lengths: Sequence[int], tokens: int) -> np.ndarray:
    """Return what the first block is given, (n, d), for the ids of whole documents."""

    def first(hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        raise Reached(hidden_states)

    embedding = model.decoder.get_input_embeddings()
    name = model.names_outside[path_of(model.whole, embedding) + "weight"]
    used, places = np.unique(ids, return_inverse=True)
    source = model.source(name)
    if used[-1] >= source.shape[0] or used[0] < 0:
        raise ValueError(
            f"token ids must be in [0, {source.shape[0]}), the vocabulary of {model.directory}, "
            f"but there is {used[-1] if used[0] >= 0 else used[0]}"
        )
    rows = np.concatenate([source.read(first, last) for first, last in _runs(used)])
    with model.lock:
        before = embedding.weight
        embedding.weight = nn.Parameter(as_tensor(rows).to(model.dtype), requires_grad=False)
        try:
            with blocks_replaced(model, {0: first}):
                return _in_batches(
                    places[:, None], lengths, tokens, model,
                    lambda batch: _until_reached(model, input_ids=batch[..., 0]),
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
            rows, lengths, tokens, model, lambda batch: _run_block(model, block, held, batch)
        )


def attend(
    model: Model, block: int, rows: np.ndarray, lengths: Sequence[int], tokens: int, kept: str
) -> np.ndarray:
    """Return the rows (n, d) that the block's MoE module is given; keep what is to be done then.

    Parameters
    ----------
    rows : (n, d), of whole documents
    lengths : of the documents
    tokens : of a batch at most, padding included
    kept : the file that `finish` reads
    """
    tapes: list[dict[str, Any]] = []

    def run(batch: torch.Tensor) -> torch.Tensor:
        tape = Tape()
        with child_replaced(held, child, lambda hidden, *_, **__: tape.begin(hidden, Answer)):
            out = _run_block(model, block, held, batch, tape.stop)
        tapes.append(tape.written(out))
        return tape.given

    with model.lock:
        held, child = model.hold(block), model.moe_child(block)
        out = _in_batches(rows, lengths, tokens, model, run)
    torch.save(tapes, kept + ".new")
    os.replace(kept + ".new", kept)
    return out


def finish(
    model: Model, moe_rows: np.ndarray, lengths: Sequence[int], tokens: int, kept: str
) -> np.ndarray:
    """Return a block's output (n, d), from what its MoE module gave."""
    tapes = iter(torch.load(kept, weights_only=True))
    return _in_batches(moe_rows, lengths, tokens, model, lambda batch: play(next(tapes), batch))


def last_norm(model: Model, rows: np.ndarray, lengths: Sequence[int], tokens: int) -> np.ndarray:
    """Return the model's last hidden states (n, d), from the output of the last block."""

    def run(batch: torch.Tensor) -> torch.Tensor:
        with blocks_replaced(model, {len(model.blocks) - 1: lambda *_, **__: batch}):
            return model.decoder(inputs_embeds=batch, use_cache=False).last_hidden_state

    with model.lock:
        return _in_batches(rows, lengths, tokens, model, run)


# --- running a block -------------------------------------------------------------------------


def _run_block(
    model: Model,
    block: int,
    held: nn.Module,
    batch: torch.Tensor,
    ran: Callable[[], None] = lambda: None,
) -> torch.Tensor:
    """Run the model's forward, in which the block alone computes, from the stored rows.

    `ran` is called when the block has run, whether it failed or not.
    """

    def real(_: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        try:
            out = held(batch, *args, **kwargs)
        finally:
            ran()
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
    run: Callable[[torch.Tensor], torch.Tensor],
) -> np.ndarray:
    """Run rows in batches of documents, (documents, length, ...), zeros behind the ends."""
    ends = np.cumsum(lengths).tolist()
    spans = [slice(end - int(length), end) for end, length in zip(ends, lengths, strict=True)]
    given, out = as_tensor(rows), torch.empty(0)
    with torch.inference_mode():
        for documents in batch_documents(lengths, tokens):
            places = [(place, spans[d], int(lengths[d])) for place, d in enumerate(documents)]
            longest = max(length for _, _, length in places)
            batch = given.new_empty(len(places), longest, *given.shape[1:])
            for place, span, length in places:
                batch[place, :length] = given[span]
                batch[place, length:] = 0
            answer = run(batch).view(len(places), longest, -1)
            if not len(out):
                out = torch.empty(len(given), answer.shape[-1], dtype=model.dtype)
            for place, span, length in places:
                out[span] = answer[place, :length]
    return as_numpy(out)


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


# --- small things ----------------------------------------------------------------------------


def _runs(numbers: np.ndarray) -> list[tuple[int, int]]:
    """Cut sorted numbers into ranges without gaps."""
    breaks = np.flatnonzero(np.diff(numbers) != 1) + 1
    return [(int(run[0]), int(run[-1]) + 1) for run in np.split(numbers, breaks)]
