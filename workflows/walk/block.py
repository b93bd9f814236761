"""How does a token chunk go through one decoder block, when its MoE module is elsewhere?

    rows ──> attend: the block runs once, from end to end; its MoE module is a stand-in, which hands
             its input over and gives back something of the same shape
             what the block does with that is written down, with the numbers that it needs
    MoE input ──> dask_ep ──> MoE output
    MoE output ──> finish: what was written down is done with it: a sum with the residual, mostly

The model's own forward calls the block, so that masks, rotary embeddings and all else that a block
is given are the model's: stand-ins take the places of all blocks, one tells what it is given, and
the block computes with that from the stored rows. Several threads do so at a time, each with copies
of the modules, which share the weights and nothing that a forward may change.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
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

    def __init__(self, value: Any):
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
    weight = nn.Parameter(as_tensor(rows).to(model.dtype), requires_grad=False)
    path = path_of(model.decoder, embedding).removesuffix(".")
    decoder = decoder_of(model, {0: first}, {path: with_parameters(embedding, weight=weight)})
    return _in_batches(
        places[:, None], lengths, tokens, model,
        lambda batch: _until_reached(decoder, input_ids=batch[..., 0]),
    )  # fmt: skip


def whole(
    model: Model, block: int, rows: np.ndarray, lengths: Sequence[int], tokens: int
) -> np.ndarray:
    """Send rows (n, d) of whole documents through a block without a MoE module."""
    with model.hold(block) as held:
        run = _runner(model, block, replaced(held))
        return _in_batches(rows, lengths, tokens, model, run)


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
        nonlocal tape
        tape = Tape()
        try:
            out = run_block(batch)
        finally:
            tape.stop()
        tapes.append(tape.written(out))
        return tape.given

    tape = Tape()
    with model.hold(block) as held:
        child = model.moe_child(block)
        moe = StandIn(held.get_submodule(child), lambda given, *_, **__: tape.begin(given, Answer))
        run_block = _runner(model, block, replaced(held, {child: moe}))
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
        decoder = decoder_of(model, {len(model.blocks) - 1: lambda *_, **__: batch})
        return decoder(inputs_embeds=batch, use_cache=False).last_hidden_state

    return _in_batches(rows, lengths, tokens, model, run)


# --- running a block -------------------------------------------------------------------------


def _runner(model: Model, number: int, block: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """What sends a batch of stored rows through a block, with all else that the model gives it."""

    def reached(_: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        raise Reached((args, kwargs))

    decoder = decoder_of(model, {number: reached})

    def run(batch: torch.Tensor) -> torch.Tensor:
        args, kwargs = _until_reached(decoder, inputs_embeds=batch)
        out = block(batch, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    return run


def _until_reached(decoder: nn.Module, **inputs: torch.Tensor) -> Any:
    try:
        decoder(**inputs, use_cache=False)
    except Reached as reached:
        return reached.value
    raise RuntimeError(f"{type(decoder).__name__} did not call the block")


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


def decoder_of(
    model: Model,
    acts: Mapping[int, Callable[..., torch.Tensor]],
    parts: Mapping[str, nn.Module] | None = None,
) -> nn.Module:
    """The model's decoder with stand-ins for all blocks; those without an act pass on what comes.

    `parts` are modules that take the places of others, by their paths.
    """
    layers = nn.ModuleList(
        StandIn(block, acts.get(number, lambda hidden_states, *_, **__: hidden_states))
        for number, block in enumerate(model.blocks)
    )
    return replaced(model.decoder, {"layers": layers, **(parts or {})})


def replaced(
    module: nn.Module, parts: Mapping[str, nn.Module] | None = None, path: str = ""
) -> nn.Module:
    """A copy of a module, with others in the places of some of its parts.

    It shares the parameters. Buffers and attributes, which some forwards change, are its own.
    """
    parts, new = parts or {}, copy.copy(module)
    new._buffers = {n: b if b is None else b.clone() for n, b in module._buffers.items()}
    new._modules = dict(module._modules)
    for name, part in module._modules.items():
        where = path + name
        if where in parts:
            new._modules[name] = parts[where]
        elif part is not None:
            new._modules[name] = replaced(part, parts, where + ".")
    return new


def with_parameters(module: nn.Module, **parameters: nn.Parameter | None) -> nn.Module:
    """A copy of a module, with other parameters."""
    new = copy.copy(module)
    new._parameters = module._parameters | parameters
    return new


# --- small things ----------------------------------------------------------------------------


def _runs(numbers: np.ndarray) -> list[tuple[int, int]]:
    """Cut sorted numbers into ranges without gaps."""
    breaks = np.flatnonzero(np.diff(numbers) != 1) + 1
    return [(int(run[0]), int(run[-1]) + 1) for run in np.split(numbers, breaks)]
