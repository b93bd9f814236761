"""What is the peak memory of a walk?

    the process, with torch and the model without weights   measured at the start, plus its growth
  + the largest block without its MoE module                from its shapes
  + the largest of: a batch in attention, token chunks      from a run on the meta device
                    experts                                 `dask_ep` plans with what is left
                    one part of the head, and logits

What a batch takes in attention is found without computing anything, if the block runs on tensors
that have shapes but no memory: every tensor counts from its creation until it is freed.
"""

from __future__ import annotations

import ctypes
import gc
import os
import weakref
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from dask_ep.arrays import memory as pool
from dask_ep.laws.pass_blocks import PASSES_PROCESS_BYTES
from walk.documents import AT_ONCE
from walk.flow import arguments, kinds, on_meta, trial
from walk.head import LOGIT_BYTES
from walk.model import Model

CHUNKS = 7 * AT_ONCE
"""Token chunks in memory at once, in all tasks: read, their sums and what those were made of, being
written, waiting to be joined into stored chunks, and what the MoE module's output is added to."""

LOGITS = 4 * AT_ONCE
"""Arrays of logits at a time."""

GROWTH = 256 << 20
"""What a process grows by once its libraries have computed: code that they generate for the shapes
they meet, and memory that the C library keeps."""

MMAP_THRESHOLD, TRIM_THRESHOLD, ARENA_MAX = -3, -1, -8
"""Parameters of glibc's ``mallopt``."""


@dataclass(frozen=True)
class Need:
    """Bytes that a walk takes in one process."""

    process: int
    block: int
    #: the largest one, without its MoE module
    attention: int
    #: of the batches that are computed at a time
    chunks: int
    head: int
    #: one part of it, with logits
    limit: int

    @property
    def experts(self) -> int:
        """The memory limit for the `dask_ep` jobs of the MoE layers."""
        return self.limit - self.process - self.block + PASSES_PROCESS_BYTES

    @property
    def least(self) -> int:
        """What the walk takes without experts."""
        return self.process + max(self.block + self.attention + self.chunks, self.head)

    def __str__(self) -> str:
        parts = {
            "process": self.process, "largest block without experts": self.block,
            "attention": self.attention, "token chunks": self.chunks, "head": self.head,
            "experts within": self.limit - self.process - self.block,
        }  # fmt: skip
        named = ", ".join(f"{what} {size / 1e6:,.0f} MB" for what, size in parts.items())
        return f"memory: at most {self.limit / 1e6:,.0f} MB ({named})"


def find_need(
    models: list[Model], limit: int, chunk_rows: int, documents: int, length: int, head_bytes: int
) -> Need:
    """Compute the memory that a walk needs.

    Parameters
    ----------
    models : one, or two that are walked through together
    limit : bytes that the process may take
    chunk_rows : rows of a token chunk
    documents, length : of the batch that takes the most memory
    head_bytes : bytes of the heads that are in memory at a time

    Raises
    ------
    MemoryError
        If the limit is too low even without experts; the message has the numbers.
    """
    rows = chunk_rows * max(map(_row_bytes, models))
    each = [(model, block) for model in models for block in sorted(set(kinds(model)))]
    tried = [batch_bytes(*kind, documents, length) for kind in each]
    handed_on = chunk_rows * max(batch.handed_on for batch in tried) // (documents * length)
    need = Need(
        process=resident_bytes() + GROWTH,
        block=max(m.block_bytes(b) for m in models for b in range(len(m.blocks))),
        attention=AT_ONCE * max(batch.peak for batch in tried),
        chunks=CHUNKS * rows + AT_ONCE * handed_on,
        head=head_bytes + LOGITS * LOGIT_BYTES + 2 * len(models) * rows,
        limit=limit,
    )
    if need.least > limit:
        raise MemoryError(
            f"the memory limit must be at least {need.least / 1e6:,.0f} MB, not counting experts, "
            f"but is {limit / 1e6:,.0f} MB ({need}); allow more memory, or choose a smaller "
            "--chunk-rows, --batch-tokens or --length"
        )
    return need


def resident_bytes() -> int:
    """Return the bytes of physical memory that this process uses."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def keep_freed() -> None:
    """Let the C library keep freed memory until `give_back`, for all threads together.

    Otherwise it returns each large array to the system at once, and each new one comes as fresh
    pages: millions of page faults.
    """
    with suppress(OSError, AttributeError):  # another C library
        library = ctypes.CDLL(None)
        for name, size in ((ARENA_MAX, 1), (MMAP_THRESHOLD, 32 << 20), (TRIM_THRESHOLD, 1 << 30)):
            library.mallopt(name, size)


def give_back() -> None:
    """Return unused memory to the system, between two stages.

    The C library keeps what each thread has freed; without this, a process grows from block to
    block. The walk calls `gc.freeze` at its start, so that permanent objects are not scanned here.
    """
    gc.collect()
    pool.release()


# --- attention -------------------------------------------------------------------------------


class BatchBytes(NamedTuple):
    """Bytes that a batch takes in a block, without the block's MoE modules."""

    peak: int
    handed_on: int
    #: what is kept for later blocks, besides hidden states


def batch_bytes(model: Model, number: int, documents: int, length: int) -> BatchBytes:
    """Find what a batch takes in a block: on shapes alone, or with its weights if it must."""
    flow, ids = model.flow, torch.zeros(documents, length, dtype=torch.int64)
    with torch.inference_mode():
        given = arguments(model, flow, number, ids, {})
        if number in flow.by_value:
            with model.hold(number) as block:
                returned, peak = _run(model, number, block, given)
            model.free()
        else:
            shapes = tree_map(on_meta, given)
            returned, peak = _run(model, number, model.blocks[number], shapes)
    kept = _bytes_of([returned[leaf] for leaf in flow.kept(number)])
    return BatchBytes(_bytes_of(given) + peak + _bytes_of(returned[0]), kept)


def _run(model: Model, number: int, block: Any, given: Any) -> tuple[list[Any], int]:
    """Run a block; return all that it returns, and the peak of the bytes of what it made."""
    run = trial(model, number, block)
    with _Live() as live, nullcontext() if number in model.flow.by_value else _AsOnCpu():
        return tree_leaves(run(*given)), live.peak


def _bytes_of(tree: Any) -> int:
    tensors = {id(leaf): leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _row_bytes(model: Model) -> int:
    """Return the bytes of the hidden states that a token has between blocks, at most."""
    flow = model.flow
    most = max(sum(map(flow.width, flow.hidden(block))) for block in range(len(model.blocks) + 1))
    return max(most, model.config_width) * model.dtype.itemsize


class _Live(TorchDispatchMode):
    """Counts the bytes of all live tensors, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.users: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor)
        return out

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, nbytes = storage._cdata, storage.nbytes()
        if key not in self.users:
            self.now += nbytes
            self.peak = max(self.peak, self.now)
        self.users[key] = self.users.get(key, 0) + 1
        weakref.finalize(tensor, self._drop, key, nbytes)

    def _drop(self, key: int, nbytes: int) -> None:
        self.users[key] -= 1
        if not self.users[key]:
            del self.users[key]
            self.now -= nbytes


class _AsOnCpu(TorchFunctionMode):
    """Makes attention on the meta device allocate what it does on the CPU: no scores if fused."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention and _is_fused(*args, **kwargs):
            query, value = args[0], args[2]
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        return func(*args, **kwargs)


def _is_fused(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **kwargs) -> bool:
    """Return whether the CPU computes this attention without storing all scores."""
    on_cpu = [
        None if tensor is None else torch.empty((1, *tensor.shape[1:]), dtype=tensor.dtype)
        for tensor in (query, key, value, attn_mask)
    ]
    return torch._fused_sdp_choice(*on_cpu, dropout_p, is_causal, **kwargs) != 0
