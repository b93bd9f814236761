"""How does a token chunk go through one decoder block whose MoE module is computed elsewhere?

    rows ──> attend: the block runs once, from start to end, with a stand-in for its MoE module;
             the stand-in keeps its input and returns a placeholder of the same shape;
             the operations on the placeholder are recorded, with the other tensors they take
    MoE input ──> dask_ep ──> MoE output
    MoE output ──> finish: the recorded operations are replayed on it, mostly a residual sum

If a family has no such module, but calls router, norms and experts in the block, the first of them
keeps its input, and the last one returns the placeholder.

All arguments of a block, masks and rotary embeddings among them, come from the model's own forward
(`walk.flow`). Rows of hidden states come and go as arrays; what else a block hands on to later ones
lies in a file for each token chunk.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from dask_ep.storage.files import replacing
from walk.documents import MAX_PADDING, batch_documents
from walk.flow import Place, arguments, last_hidden, placeholder
from walk.model import Model
from walk.stand_ins import Answer, StandIn, first_of, nothing, replaced, with_parameters
from walk.tape import Tape, play
from walk.tensors import as_numpy, as_tensor


@dataclass(frozen=True)
class Chunk:
    """A token chunk.

    Attributes
    ----------
    number : of the chunk
    ids : (n,) token ids
    lengths : of its documents
    batch_tokens : maximum of a batch, padding included
    handed_on : directory of what blocks hand on besides hidden states
    """

    number: int
    ids: np.ndarray
    lengths: Sequence[int]
    batch_tokens: int
    handed_on: str

    def file(self, block: int) -> str:
        """Return the path of what a block handed on for the chunk."""
        return os.path.join(handed_on_by(block, self.handed_on), f"{self.number:06d}.pt")


def handed_on_by(block: int, directory: str) -> str:
    """Return the directory of what a block hands on."""
    return os.path.join(directory, f"block_{block:03d}")


Run = Callable[..., torch.Tensor]
"""From the number of a batch, its token ids (documents, tokens) and rows (documents, tokens, d)."""


def embed(model: Model, ids: np.ndarray) -> np.ndarray:
    """Return the embedding (n, d) of tokens."""
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
    part = with_parameters(replaced(embedding), weight=weight)
    with torch.inference_mode():
        return as_numpy(part(torch.from_numpy(places.reshape(1, -1)))[0].to(model.dtype))


def whole(model: Model, block: int, chunk: Chunk, rows: Sequence[np.ndarray]) -> np.ndarray:
    """Send a chunk through a block without MoE modules.

    Parameters
    ----------
    rows : hidden states (n, width) after the blocks `model.flow.hidden(block)`
    """
    with model.hold(block) as held, _handing_on(model, block, chunk) as hand_on:
        run_block = _runner(model, block, chunk, replaced(held))

        def run(number: int, ids: torch.Tensor, *batch: torch.Tensor) -> torch.Tensor:
            return hand_on(run_block(number, ids, *batch))

        return _in_batches(model, chunk, rows, run)


def attend(
    model: Model, block: int, chunk: Chunk, rows: Sequence[np.ndarray], kept: str
) -> np.ndarray:
    """Return the input (n, d) of the block's MoE modules; save the operations that come after them.

    Parameters
    ----------
    rows : as in `whole`
    kept : file for the recorded operations, which `finish` reads
    """
    tapes: list[dict[str, Any]] = []

    def run(number: int, ids: torch.Tensor, *batch: torch.Tensor) -> torch.Tensor:
        nonlocal tape
        tape = Tape()
        try:
            leaves = run_block(number, ids, *batch)
        finally:
            tape.stop()
        tapes.append(tape.written(leaves[0]))
        tape.check_known(leaves[1:])
        hand_on(leaves)
        return tape.given

    def act(name: str, *args: Any, **kwargs: Any) -> Any:
        nonlocal moe_input
        given = first_of(args, kwargs)
        if name == calls[0]:
            moe_input = given
        if name == calls[-1]:
            return tape.begin(moe_input, Answer, given.shape)
        return placeholder(held, name, model.moe_parts(block), args, kwargs)

    tape, calls, moe_input = Tape(), model.flow.calls[block], torch.empty(0)
    with model.hold(block) as held, _handing_on(model, block, chunk) as hand_on:
        acts = {name: partial(act, name) for name in calls}
        acts |= dict.fromkeys(model.beside_moe(block), nothing)
        parts = {name: StandIn(held.get_submodule(name), acts[name]) for name in acts}
        run_block = _runner(model, block, chunk, replaced(held, parts))
        out = _in_batches(model, chunk, rows, run)
    with replacing(kept) as new:
        torch.save(tapes, new)
    return out


def finish(model: Model, chunk: Chunk, moe_rows: np.ndarray, kept: str) -> np.ndarray:
    """Return a block's hidden states (n, width), computed from the output of its MoE modules."""
    tapes = torch.load(kept, weights_only=True)

    def run(number: int, _: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        tape, tapes[number] = tapes[number], None  # free what it took
        return play(tape, batch)

    return _in_batches(model, chunk, [moe_rows], run)


def last_norm(model: Model, chunk: Chunk, rows: Sequence[np.ndarray]) -> np.ndarray:
    """Return the model's final hidden states (n, d).

    Parameters
    ----------
    rows : as in `whole`, of the blocks that the last norm needs
    """
    values = _values(model, len(model.blocks), chunk)

    def run(number: int, ids: torch.Tensor, *batch: torch.Tensor) -> torch.Tensor:
        return last_hidden(model, model.flow, ids, values(number, batch))

    return _in_batches(model, chunk, rows, run)


# --- running a block -------------------------------------------------------------------------


def _runner(model: Model, number: int, chunk: Chunk, block: nn.Module) -> Callable[..., list[Any]]:
    """Return a function that runs a block on a batch and returns all that the block does."""
    values = _values(model, number, chunk)

    def run(batch: int, ids: torch.Tensor, *rows: torch.Tensor) -> list[Any]:
        args, kwargs = arguments(model, model.flow, number, ids, values(batch, rows))
        return tree_leaves(block(*args, **kwargs))

    return run


def _values(
    model: Model, block: int, chunk: Chunk
) -> Callable[[int, Sequence[torch.Tensor]], dict[Place, torch.Tensor]]:
    """Return a function that gives what a block needs of earlier ones, for a batch."""
    flow = model.flow
    files = {
        at: torch.load(chunk.file(at), weights_only=True, mmap=True) for at in flow.more(block)
    }

    def values(batch: int, rows: Sequence[torch.Tensor]) -> dict[Place, torch.Tensor]:
        found: dict[Place, torch.Tensor] = {}
        for at, array in zip(flow.hidden(block), rows, strict=True):
            leaf = flow.returned[at].leaves[0]
            found[at, 0] = array.view(*array.shape[:2], *leaf.shape[2:])
        for at, batches in files.items():
            found |= {(at, leaf): value for leaf, value in batches[batch].items()}
        return found

    return values


@contextmanager
def _handing_on(
    model: Model, block: int, chunk: Chunk
) -> Iterator[Callable[[list[Any]], torch.Tensor]]:
    """Yield a function that keeps what later blocks need of a block; save that at the end.

    The function takes all that the block returns for a batch, and returns its hidden states.
    """
    kept, batches = model.flow.kept(block), []

    def hand_on(leaves: list[Any]) -> torch.Tensor:
        batches.append({leaf: leaves[leaf].clone() for leaf in kept})
        return leaves[0]

    yield hand_on
    if kept:
        file = chunk.file(block)
        os.makedirs(os.path.dirname(file), exist_ok=True)
        with replacing(file) as new:
            torch.save(batches, new)


def _in_batches(model: Model, chunk: Chunk, rows: Sequence[np.ndarray], run: Run) -> np.ndarray:
    """Run rows in batches of documents, (documents, length, ...), padded with zeros at the end."""
    ends = np.cumsum(chunk.lengths).tolist()
    spans = [slice(end - int(n), end) for end, n in zip(ends, chunk.lengths, strict=True)]
    given, out = [as_tensor(each) for each in (chunk.ids, *rows)], torch.empty(0)
    batches = batch_documents(chunk.lengths, chunk.batch_tokens, _padding(model))
    with torch.inference_mode():
        for number, documents in enumerate(batches):
            places = [(place, spans[d], int(chunk.lengths[d])) for place, d in enumerate(documents)]
            longest = max(length for _, _, length in places)
            padded = [each.new_empty(len(places), longest, *each.shape[1:]) for each in given]
            for batch, each in zip(padded, given, strict=True):
                for place, span, length in places:
                    batch[place, :length] = each[span]
                    batch[place, length:] = 0
            answer = run(number, *padded).reshape(len(places), longest, -1)
            if not len(out):
                out = torch.empty(len(chunk.ids), answer.shape[-1], dtype=model.dtype)
            for place, span, length in places:
                out[span] = answer[place, :length]
    return as_numpy(out)


def _padding(model: Model) -> float:
    """Return which fraction of a batch may be padding: none if its length decides the rotation."""
    rope = getattr(model.decoder.config, "rope_parameters", None) or {}
    kinds = {one.get("rope_type") for one in (rope, *rope.values()) if isinstance(one, Mapping)}
    return 0.0 if kinds & {"dynamic", "longrope"} else MAX_PADDING


# --- helpers ---------------------------------------------------------------------------------


def _runs(numbers: np.ndarray) -> Iterator[tuple[int, int]]:
    """Split sorted numbers into ranges without gaps."""
    breaks = np.flatnonzero(np.diff(numbers) != 1) + 1
    for run in np.split(numbers, breaks):
        yield int(run[0]), int(run[-1]) + 1
