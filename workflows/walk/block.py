"""How does a token chunk go through one decoder block whose MoE module is computed elsewhere?

    rows ──> attend: the block runs once, from start to end, with a stand-in for its MoE module;
             the stand-in keeps its input and returns a placeholder of the same shape;
             the operations on the placeholder are recorded, with the other tensors they take
    MoE input ──> dask_ep ──> MoE output
    MoE output ──> finish: the recorded operations are replayed on it, mostly a residual sum

Masks, rotary embeddings and all other arguments of a block come from the model's own forward: it
runs with stand-ins for all blocks, one of which captures its arguments, and the block then runs
with these on the stored rows. Several threads do so at a time, each with copies of the modules that
share the weights but nothing that a forward may change.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from dask_ep.storage.files import replacing
from walk.documents import MAX_PADDING, batch_documents
from walk.model import Model, path_of
from walk.tape import Tape, play
from walk.tensors import as_numpy, as_tensor

OTHERWISE = (
    "if transformers can run this model, run it there as a whole, or single MoE layers of it with "
    "dask_ep.load_moe_layer"
)
"""What to do with a model that cannot be walked."""


class Reached(Exception):
    """Ends a forward early: the value is known, and the rest of the model need not run."""

    def __init__(self, value: Any):
        self.value = value


class StandIn(nn.Module):
    """Replaces a block: calls `act`, and otherwise looks like the block."""

    def __init__(self, block: nn.Module, act: Callable[..., torch.Tensor]):
        super().__init__()
        self.__dict__.update(block=block, act=act)  # the block must not become a child module

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"], name)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.act(hidden_states, *args, **kwargs)


class Answer(torch.Tensor):
    """A module's output: some models expect just the tensor, others unpack it with the scores."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __iter__(self) -> Iterator[Any]:
        return iter((self, None))


# --- the model's parts -----------------------------------------------------------------------


def check_blocks(model: Model) -> None:
    """Raise unless all that a block takes from the tokens is what the block before it returns.

    Raises
    ------
    ValueError
        If the model's forward calls a block twice or never, takes more than hidden states from it,
        or gives more to the blocks after it.
    """
    try:
        first, second = (_taken(model, seed) for seed in range(2))
        what = _dependence(first, second, len(model.blocks))
    except Exception as error:
        what = f"it stops with {type(error).__name__}: {error}"
    if what:
        raise ValueError(
            f"the forward of {type(model.whole).__name__} must call each block once, on the hidden "
            f"states of {model.config_width} columns that the block before it returned, and give "
            f"it nothing else that depends on tokens, but {what}; {OTHERWISE}"
        )


def _taken(model: Model, seed: int) -> list[tuple[int, list[Any]]]:
    """Return which blocks are called with which other arguments, and what the model returns.

    Random hidden states enter the model and come from all blocks; from the last, the same ones.
    """
    generators = torch.Generator().manual_seed(seed), torch.Generator()
    taken, last = [], len(model.blocks) - 1

    def rows(generator: torch.Generator) -> torch.Tensor:  # no block returns five values
        return torch.randn(5, 3, model.config_width, generator=generator).to(model.dtype)

    def act(number: int, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if (shape := tuple(hidden_states.shape)) != (5, 3, model.config_width):
            raise ValueError(f"block {number} takes {shape} for (5, 3) tokens")
        taken.append((number, tree_leaves((args, kwargs))))
        return rows(generators[number == last])

    with torch.inference_mode():
        decoder = decoder_of(model, {number: partial(act, number) for number in range(last + 1)})
        out = decoder(inputs_embeds=rows(generators[0]), use_cache=False).last_hidden_state
    return [*taken, (last + 1, [out])]


def _dependence(first: list[Any], second: list[Any], blocks: int) -> str | None:
    """Say what differs between two runs of a model, or in which order it calls its blocks."""
    if (calls := [number for number, _ in first]) != [*range(blocks + 1)]:
        return f"it calls blocks {calls[:-1]}"
    for (number, given), (_, other) in zip(first, second, strict=True):
        for a, b in zip(given, other, strict=True):
            if isinstance(a, torch.Tensor) and not torch.equal(a, b):
                where = f"block {number} is given" if number < blocks else "it returns"
                return f"{where} what depends on earlier hidden states too"
    return None


def embed(model: Model, ids: np.ndarray, lengths: Sequence[int], tokens: int) -> np.ndarray:
    """Return the first block's input, (n, d), for the token ids of whole documents."""

    def first(hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        raise Reached(hidden_states)

    embedding = model.decoder.get_input_embeddings()
    used, places = np.unique(ids, return_inverse=True)
    source = model.sources_of(embedding)["weight"]
    if used[-1] >= source.shape[0] or used[0] < 0:
        raise ValueError(
            f"token ids must be in [0, {source.shape[0]}), the vocabulary of {model.directory}, "
            f"but one is {used[-1] if used[0] >= 0 else used[0]}"
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
    """Return the input (n, d) of the block's MoE module; save the operations that come after it.

    Parameters
    ----------
    rows : (n, d), of whole documents
    lengths : of the documents
    tokens : maximum of a batch, padding included
    kept : file for the recorded operations, which `finish` reads
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
        stand_ins = {child: moe} | {
            name: StandIn(held.get_submodule(name), nothing) for name in model.beside_moe(block)
        }
        run_block = _runner(model, block, replaced(held, stand_ins))
        out = _in_batches(rows, lengths, tokens, model, run)
    with replacing(kept) as new:
        torch.save(tapes, new)
    return out


def finish(
    model: Model, moe_rows: np.ndarray, lengths: Sequence[int], tokens: int, kept: str
) -> np.ndarray:
    """Return a block's output (n, d), computed from the output of its MoE module."""
    tapes = iter(torch.load(kept, weights_only=True))
    return _in_batches(moe_rows, lengths, tokens, model, lambda batch: play(next(tapes), batch))


def last_norm(model: Model, rows: np.ndarray, lengths: Sequence[int], tokens: int) -> np.ndarray:
    """Return the model's final hidden states (n, d), from the output of its last block."""

    def run(batch: torch.Tensor) -> torch.Tensor:
        decoder = decoder_of(model, {len(model.blocks) - 1: lambda *_, **__: batch})
        return decoder(inputs_embeds=batch, use_cache=False).last_hidden_state

    return _in_batches(rows, lengths, tokens, model, run)


# --- running a block -------------------------------------------------------------------------


def _runner(model: Model, number: int, block: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function that runs a block on a batch of stored rows, with the model's arguments."""

    def reached(_: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        raise Reached((args, kwargs))

    def run(batch: torch.Tensor) -> torch.Tensor:
        decoder = decoder_of(model, {number: reached})  # its forward may change it
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
    """Run rows in batches of documents, (documents, length, ...), padded with zeros at the end."""
    ends = np.cumsum(lengths).tolist()
    spans = [slice(end - int(length), end) for end, length in zip(ends, lengths, strict=True)]
    given, out = as_tensor(rows), torch.empty(0)
    with torch.inference_mode():
        for documents in batch_documents(lengths, tokens, _padding(model)):
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


def _padding(model: Model) -> float:
    """Return which fraction of a batch may be padding: none if its length decides the rotation."""
    rope = getattr(model.decoder.config, "rope_parameters", None) or {}
    kinds = {one.get("rope_type") for one in (rope, *rope.values()) if isinstance(one, Mapping)}
    return 0.0 if kinds & {"dynamic", "longrope"} else MAX_PADDING


# --- stand-ins -------------------------------------------------------------------------------


def decoder_of(
    model: Model,
    acts: Mapping[int, Callable[..., torch.Tensor]],
    parts: Mapping[str, nn.Module] | None = None,
) -> nn.Module:
    """Return the model's decoder with stand-ins for all blocks; without an act they do nothing.

    `parts` maps paths of other modules to their replacements.
    """
    layers = nn.ModuleList(
        StandIn(block, acts.get(number, lambda hidden_states, *_, **__: hidden_states))
        for number, block in enumerate(model.blocks)
    )
    return replaced(model.decoder, {model.list_name: layers, **(parts or {})})


def replaced(
    module: nn.Module, parts: Mapping[str, nn.Module] | None = None, path: str = ""
) -> nn.Module:
    """Copy a module, with some of its submodules replaced.

    The copy shares the parameters but not buffers and attributes, which some forwards change.
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
    """Copy a module, with some of its parameters replaced."""
    new = copy.copy(module)
    new._parameters = module._parameters | parameters
    return new


def nothing(hidden_states: torch.Tensor) -> torch.Tensor:
    """Return zeros, for a shared expert whose output is in that of the MoE module already."""
    return hidden_states.new_zeros(()).expand_as(hidden_states)


# --- helpers ---------------------------------------------------------------------------------


def _runs(numbers: np.ndarray) -> list[tuple[int, int]]:
    """Split sorted numbers into ranges without gaps."""
    breaks = np.flatnonzero(np.diff(numbers) != 1) + 1
    return [(int(run[0]), int(run[-1]) + 1) for run in np.split(numbers, breaks)]
