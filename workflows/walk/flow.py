"""What does each decoder block take, and which blocks made it?

    token ids ──> embedding ──> block 0 ──> block 1 ──> ... ──> last norm
                      └────────────┴───────────┴── a few models: into later blocks too

Between blocks, a model's own forward does what the family needs: it adds streams of hidden states,
hands top-k indices on, joins the outputs of several blocks. The forward itself runs here, with
stand-ins for embedding and blocks that return what is known, until it reaches a block: so it gives
the block's arguments. Which of the known values matter is found at the start with random ones: of
each, it is seen whose arguments change with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any, Protocol

import torch
import torch.fx.experimental._config
from torch import nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map, tree_unflatten

from walk.stand_ins import Answer, Reached, StandIn, first_of, replaced

OTHERWISE = (
    "if transformers can run this model, run it there as a whole, or single MoE layers of it with "
    "dask_ep.load_moe_layer"
)
"""What to do with a model that cannot be walked."""

EMBEDDING = -1
"""Number of the embedding, which comes before block 0."""

PROBE = (5, 3)
"""Shape of the batch with which blocks are tried: documents, tokens."""

Place = tuple[int, int]
"""A tensor that a block returns: the block's number, and the tensor's place in what it returns; 0
is the hidden states."""

Values = Mapping[Place, torch.Tensor]


class Frame(Protocol):
    """What is needed of a model: see `walk.model.Model`."""

    whole: nn.Module
    decoder: nn.Module
    list_name: str
    embedding_name: str
    blocks: list[nn.Module]
    config_width: int
    dtype: torch.dtype

    def moe_parts(self, block: int) -> tuple[str, ...]: ...

    def hold(self, block: int) -> AbstractContextManager[nn.Module]: ...

    def free(self) -> None: ...


@dataclass(frozen=True)
class Returned:
    """What a block returns.

    Attributes
    ----------
    leaves : tensors on the meta device, `PROBE` and further axes, or other values
    spec : how they are put together
    """

    leaves: tuple[Any, ...]
    spec: TreeSpec

    def filled(self, shape: Sequence[int], values: Mapping[int, torch.Tensor]) -> Any:
        """Return the same for a batch of other shape; values that are not given are zeros."""
        return tree_unflatten(
            [
                values[place] if place in values else _blank(leaf, shape)
                for place, leaf in enumerate(self.leaves)
            ],
            self.spec,
        )


def _blank(leaf: Any, shape: Sequence[int]) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    return torch.zeros((), dtype=leaf.dtype).expand(*shape, *leaf.shape[2:])  # takes no memory


@dataclass
class Flow:
    """What flows through a model.

    Attributes
    ----------
    returned : by the embedding and each block
    needs : what each block needs of those before it; at the end, what the last norm needs
    calls : by each block with MoE modules, of these modules, in order
    by_value : blocks whose kind cannot run without values, only with its weights
    """

    returned: dict[int, Returned] = field(default_factory=dict)
    needs: list[frozenset[Place]] = field(default_factory=list)
    calls: dict[int, list[str]] = field(default_factory=dict)
    by_value: set[int] = field(default_factory=set)

    def width(self, block: int) -> int:
        """Return the columns of a block's hidden states."""
        return prod(self.returned[block].leaves[0].shape[2:])

    def hidden(self, block: int) -> list[int]:
        """Return the blocks whose hidden states a block needs, the latest one last."""
        return sorted(before for before, leaf in self.needs[block] if leaf == 0)

    def more(self, block: int) -> list[int]:
        """Return the blocks of whose other tensors a block needs some."""
        return sorted({before for before, leaf in self.needs[block] if leaf})

    def kept(self, block: int) -> list[int]:
        """Return which tensors besides the hidden states later blocks need of this one."""
        return sorted({leaf for need in self.needs for at, leaf in need if at == block and leaf})

    def last_use(self, block: int, *, hidden: bool) -> int:
        """Return the last block that needs a block's hidden states, or other tensors of it."""
        users = [
            user
            for user, need in enumerate(self.needs)
            if any(at == block and (leaf == 0) == hidden for at, leaf in need)
        ]
        return max(users, default=block)


def find_flow(model: Frame) -> Flow:
    """Find out what flows through a model, by running its forward with random values.

    Raises
    ------
    ValueError
        If the forward does not call each block once, in order; if a block cannot run on its own,
        or returns tensors that do not have one row for each token; if it does not call each of its
        MoE modules once.
    """
    flow = Flow()
    try:
        with torch.inference_mode():
            flow.returned[EMBEDDING] = Returned(*_flat(_rows(model.config_width, model.dtype)))
            for block, first in enumerate(kinds(model)):
                if first == block:
                    _run_block(model, flow, block)
                flow.returned[block], flow.calls[block] = flow.returned[first], flow.calls[first]
            flow.needs += _needs(model, flow)
    except Exception as error:
        raise ValueError(
            f"the forward of {type(model.whole).__name__} must call each block once, in order, and "
            "a block must run on its own and return one row for each token, but it stops with "
            f"{type(error).__name__}: {error}; {OTHERWISE}"
        ) from error
    return flow


def arguments(
    model: Frame, flow: Flow, block: int, ids: torch.Tensor, values: Values
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments that a model's forward gives a block.

    Parameters
    ----------
    ids : (documents, tokens), of a batch
    values : what earlier blocks returned, (documents, tokens, ...); what is not given is zeros
    """

    def reached(*args: Any, **kwargs: Any) -> None:
        raise Reached((args, kwargs))

    try:
        _forward(model, flow, ids, values, {block: reached})
    except Reached as reached_it:
        return reached_it.value
    raise RuntimeError(f"it did not call block {block}")


def last_hidden(model: Frame, flow: Flow, ids: torch.Tensor, values: Values) -> torch.Tensor:
    """Return a model's final hidden states; arguments are as in `arguments`."""
    return _forward(model, flow, ids, values, {})


def check_start(model: Frame, flow: Flow, start: int, blocks: Sequence[int]) -> None:
    """Raise unless blocks need nothing but the hidden states that block `start` is given.

    Parameters
    ----------
    blocks : those that are walked through, from `start` on
    """
    given = (start - 1, 0)
    needs = [(user, need) for user in (*blocks, blocks[-1] + 1) for need in flow.needs[user]]
    before = [(user, at) for user, (at, leaf) in needs if at < start and (at, leaf) != given]
    if not before and start == 0:
        values = {given: _random(flow, given, 0)}
        args, kwargs = arguments(model, flow, 0, torch.zeros(PROBE, dtype=torch.int64), values)
        if not torch.equal(first_of(args, kwargs), values[given]):
            before = [(0, EMBEDDING)]
    if before:
        user, at = before[0]
        what = f"block {at}" if at >= 0 else "the embedding"
        raise ValueError(
            f"a walk of {type(model.whole).__name__} cannot start with the hidden states before "
            f"block {start}: block {user} needs what {what} returned; walk from the text"
        )


def _forward(
    model: Frame,
    flow: Flow,
    ids: torch.Tensor,
    values: Values,
    acts: Mapping[int, Callable[..., Any]],
) -> torch.Tensor:
    """Run a model's forward with stand-ins for its embedding and blocks."""

    def returned(block: int, *_: Any, **__: Any) -> Any:
        given = {leaf: value for (at, leaf), value in values.items() if at == block}
        return flow.returned[block].filled(ids.shape, given)

    embedding = model.decoder.get_input_embeddings()
    stand_ins = [
        StandIn(block, acts.get(number, partial(returned, number)))
        for number, block in enumerate(model.blocks)
    ]
    decoder = replaced(
        model.decoder,
        {
            model.list_name: nn.ModuleList(stand_ins),
            model.embedding_name: StandIn(embedding, partial(returned, EMBEDDING)),
        },
    )
    return decoder(input_ids=ids, use_cache=False).last_hidden_state


# --- how it is found -------------------------------------------------------------------------


def trial(
    model: Frame, number: int, block: nn.Module, called: Callable[[str], Any] = lambda _: None
) -> Callable[[tuple[Any, ...], dict[str, Any]], Any]:
    """Return a function that runs a block, on its device, without computing its MoE modules.

    On the meta device, where shapes depend on values, they are the largest that they can be.

    Parameters
    ----------
    block : the model's block of this number
    called : is told which MoE module is called
    """

    def act(name: str, *args: Any, **kwargs: Any) -> Any:
        called(name)
        return placeholder(block, name, model.moe_parts(number), args, kwargs)

    parts = {
        name: StandIn(block.get_submodule(name), partial(act, name))
        for name in model.moe_parts(number)
    }
    part = replaced(block, parts)

    def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with torch.fx.experimental._config.patch(meta_nonzero_assume_all_nonzero=True):
            return part(*args, **kwargs)

    return run


def placeholder(
    block: nn.Module,
    name: str,
    parts: Sequence[str],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """Return what one of a block's MoE modules returns, without values.

    Experts return zeros in the shape that they are given; others (router, norms) run on the meta
    device.
    """
    if name == parts[0]:
        return torch.zeros_like(first_of(args, kwargs)).as_subclass(Answer)
    args, kwargs = tree_map(on_meta, (args, dict(kwargs)))
    return replaced(block.get_submodule(name)).to("meta")(*args, **kwargs)


def on_meta(value: Any) -> Any:
    """Return a tensor's shape and dtype without values, and other values as they are."""
    return value.to("meta") if isinstance(value, torch.Tensor) else value


def kinds(model: Frame) -> list[int]:
    """Return for each block the first one of its kind, with the same shapes and `layer_types`."""
    types = getattr(model.decoder.config, "layer_types", None) or [None] * len(model.blocks)
    found: dict[Any, int] = {}
    return [
        found.setdefault(
            (kind, model.moe_parts(number), *((n, p.shape) for n, p in block.named_parameters())),
            number,
        )
        for number, (kind, block) in enumerate(zip(types, model.blocks, strict=True))
    ]


def _run_block(model: Frame, flow: Flow, number: int) -> None:
    """Run a block on its own, and note what it returns and calls."""
    given = arguments(model, flow, number, torch.zeros(PROBE, dtype=torch.int64), {})
    calls: list[str] = []
    try:
        run = trial(model, number, model.blocks[number], calls.append)
        leaves, spec = _flat(run(*tree_map(on_meta, given)))
    except RuntimeError:  # it reads values
        flow.by_value.add(number)
        calls.clear()
        with model.hold(number) as block:
            leaves, spec = _flat(trial(model, number, block, calls.append)(*given))
        model.free()
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    if not tensors or tensors[0] is not leaves[0] or any(t.shape[:2] != PROBE for t in tensors):
        shapes = [tuple(tensor.shape) for tensor in tensors]
        raise ValueError(f"block {number} returns shapes {shapes} for {PROBE} tokens")
    if sorted(calls) != sorted(model.moe_parts(number)):
        wanted = ", ".join(sorted(model.moe_parts(number)))
        raise ValueError(f"block {number} calls {', '.join(calls) or 'none'} of {wanted}")
    flow.returned[number] = Returned(tuple(map(on_meta, leaves)), spec)
    flow.calls[number] = calls


def _flat(tree: Any) -> tuple[tuple[Any, ...], TreeSpec]:
    leaves, spec = tree_flatten(tree)
    return tuple(leaves), spec


def _rows(width: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(*PROBE, width, dtype=dtype, device="meta")


def _needs(model: Frame, flow: Flow) -> list[frozenset[Place]]:
    """Find what each block, and the last norm, needs: change one value at a time."""
    places = [
        (block, place)
        for block, returned in flow.returned.items()
        for place, leaf in enumerate(returned.leaves)
        if isinstance(leaf, torch.Tensor)
    ]
    values = {place: _random(flow, place, 0) for place in places}
    needs: list[set[Place]] = [set() for _ in range(len(model.blocks) + 1)]
    usual = _given(model, flow, values)
    for place in places:
        changed = _given(model, flow, values | {place: _random(flow, place, 1)})
        for block, (before, after) in enumerate(zip(usual, changed, strict=True)):
            if _differ(before, after):
                needs[block].add(place)
    return [frozenset(need) for need in needs]


def _random(flow: Flow, place: Place, seed: int) -> torch.Tensor:
    leaf = flow.returned[place[0]].leaves[place[1]]
    if not leaf.is_floating_point():
        return torch.full(leaf.shape, seed, dtype=leaf.dtype)
    generator = torch.Generator().manual_seed(1000 * seed + place[0] + 1)
    return torch.randn(leaf.shape, generator=generator).to(leaf.dtype)


def _given(model: Frame, flow: Flow, values: Values) -> list[list[Any]]:
    """Return all that each block, and the caller of the model, is given."""
    given: list[tuple[int, list[Any]]] = []
    ids = torch.zeros(PROBE, dtype=torch.int64)

    def act(number: int, *args: Any, **kwargs: Any) -> Any:
        given.append((number, tree_leaves((args, kwargs))))
        own = {leaf: value for (at, leaf), value in values.items() if at == number}
        return flow.returned[number].filled(PROBE, own)

    acts = {number: partial(act, number) for number in range(len(model.blocks))}
    out = _forward(model, flow, ids, values, acts)
    if (calls := [number for number, _ in given]) != [*acts]:
        raise ValueError(f"it calls blocks {calls}")
    return [leaves for _, leaves in given] + [[out]]


def _differ(first: Iterable[Any], second: Iterable[Any]) -> bool:
    return any(
        isinstance(a, torch.Tensor) and not torch.equal(a, b)
        for a, b in zip(first, second, strict=True)
    )
