"""How is one block of a model built, filled and freed?

    config.json ──> transformers' own classes, on the meta device: shapes, no memory
    tensor names ──> names in the model, by transformers' own conversions
    `with hold(block)` ──> that block's tensors are read, all but those of its MoE module

No code here depends on the family: ``config.json`` names the class, the names of the tensors that
`dask_ep` reads show where the MoE module is, and tensors are renamed, split and joined as in
``from_pretrained``.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property, lru_cache

import numpy as np
import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from dask_ep.layers.checkpoint_layers import Checkpoint
from dask_ep.layers.formats import ACTIVATION_SCALES, find_parts
from dask_ep.storage.sources import Source
from walk.documents import AT_ONCE
from walk.flow import find_flow
from walk.tensors import as_tensor

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


LISTS = ("layers", "blocks")
"""Names of a model's list of decoder blocks, in classes of transformers and in files."""


_OPENING = threading.Lock()


def open_model(directory: str, dtype: str, version: str = "") -> Model:
    """Return this process's model of a checkpoint; two are cached, as two may be compared.

    `version` is the fingerprint of its files, as a worker may live longer than they do.
    """
    with _OPENING:  # otherwise the first tasks of a worker would open one each
        return _opened(directory, dtype, version)


@lru_cache(maxsize=2)
def _opened(directory: str, dtype: str, version: str) -> Model:
    return Model(directory, dtype, version)


class Model:
    """A model on the meta device; one decoder block at a time has its weights in memory.

    Parameters
    ----------
    directory : of the checkpoint
    dtype : "auto" for the checkpoint's, "float32" or "bfloat16"
    version : see `open_model`

    Attributes
    ----------
    whole : the model class that the config names
    decoder, list_name, embedding_name : the submodule with the blocks, and the names in it of their
        list and of the embedding
    blocks : the decoder blocks
    dtype : torch.dtype of the weights and of the hidden states
    moe_blocks : numbers of the blocks with MoE modules that `dask_ep` computes
    flow : what each block takes, and from which
    """

    def __init__(self, directory: str, dtype: str = "auto", version: str = ""):
        self.directory, self.version = directory, version
        self.checkpoint = Checkpoint(directory)
        self.files = self.checkpoint.files
        config = AutoConfig.from_pretrained(directory)
        for part in (config, config.get_text_config()):
            part.output_router_logits = False
            if getattr(part, "quantization_config", None) is not None:
                del part.quantization_config  # tensors are decoded when they are read
        self.dtype = self._find_dtype(dtype, config)
        self.whole = _build(config, self.dtype)
        self.decoder, self.list_name = _find_decoder(self.whole)
        self.blocks: list[nn.Module] = list(getattr(self.decoder, self.list_name))
        self.config_width: int = config.get_text_config().hidden_size
        self.moe_blocks = frozenset(self.checkpoint.moe_layers)
        self.path = path_of(self.whole, self.decoder)
        embedding = self.decoder.get_input_embeddings()
        self.embedding_name = path_of(self.decoder, embedding).removesuffix(".")
        self.held: int | None = None
        self._moe_parts: dict[int, tuple[str, ...]] = {}
        self._beside_moe: dict[int, frozenset[str]] = {}
        self._users, self._changed = 0, threading.Condition()
        self.head_part, self.head_lock = None, threading.Lock()
        conversions = get_model_conversion_mapping(self.whole)
        self._renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
        self._converters = [one for one in conversions if isinstance(one, WeightConverter)]
        self._load_config = LoadStateDictConfig(
            weight_mapping=conversions,
            dtype=self.dtype,
            dtype_plan=self.whole._get_dtype_plan(self.dtype),
        )
        self._meta = self.whole.state_dict()
        self._fill_frame()
        self.flow = find_flow(self)

    # --- which tensors ---

    def target(self, name: str) -> str:
        """Return the name in the model of a tensor in the files."""
        return rename_source_key(
            name, self._renamings, self._converters, self.whole.base_model_prefix, self._meta
        )[0]

    def prefix(self, block: int) -> str:
        """Return the path of a block in the model, with a trailing dot."""
        return f"{self.path}{self.list_name}.{block}."

    def names_of_block(self, block: int) -> list[str]:
        """Return the names in the files of a block's tensors, except those of its MoE module."""
        candidates = [name for name in self.files.file_of if f".{block}." in name]
        moe = self._moe_names(block)
        prefix = self.prefix(block)
        return [n for n in candidates if n not in moe and self.target(n).startswith(prefix)]

    def moe_parts(self, block: int) -> tuple[str, ...]:
        """Return the paths, relative to a block, of its MoE modules, the one with experts first.

        It is one module in most families; in others router, norms and experts are the block's own.

        Raises
        ------
        ValueError
            If the tensors that `dask_ep` reads are not those of one module within the block.
        """
        if block in self._moe_parts or block not in self.moe_blocks:
            return self._moe_parts.get(block, ())
        prefix, name = self.prefix(block), self._moe_place(block)[1]
        targets = [self.target(tensor) for tensor in self._moe_names(block)]
        depth = name.count(".") + 1
        paths = {".".join(t.removeprefix(prefix).split(".")[:depth]) for t in targets}
        if (name and len(paths) != 1) or not all(t.startswith(prefix) for t in targets):
            raise ValueError(
                f"the MoE tensors of block {block} of {self.directory} must belong to one module "
                f"of {prefix[:-1]} in transformers, but belong to {sorted(paths)}"
            )
        parts = sorted(paths, key=lambda path: (-_size(self.blocks[block], path), path))
        return self._moe_parts.setdefault(block, tuple(parts))

    def beside_moe(self, block: int) -> frozenset[str]:
        """Return the submodules of a block, next to its MoE modules, that `dask_ep` computes too.

        Raises
        ------
        ValueError
            If `dask_ep` reads tensors outside the module that are not those of a shared expert.
        """
        if block in self._beside_moe:
            return self._beside_moe[block]
        within = self._prefixes_of_moe(block)
        read, _ = self.checkpoint.open_block(block)
        outside = {read.prefix + name for name in read.taken} - self._moe_names(block)
        targets = [name for name in map(self.target, outside) if not name.startswith(within)]
        found = frozenset(t.removeprefix(self.prefix(block)).split(".")[0] for t in targets)
        layouts = read.family.shared.layouts if read.family.shared is not None else []
        shared = {name.split(".")[0] for layout in layouts for name in layout.names.values()}
        if others := sorted(name for name in found if f"/{name}" not in shared):
            raise ValueError(
                f"what is computed with the MoE module of block {block} of {self.directory} must "
                "be in it, or a shared expert next to it, but "
                f"{', '.join(others)} is neither"
            )
        return self._beside_moe.setdefault(block, found)

    def _prefixes_of_moe(self, block: int) -> tuple[str, ...]:
        return tuple(f"{self.prefix(block)}{part}." for part in self.moe_parts(block))

    def _moe_names(self, block: int) -> set[str]:
        if block not in self.moe_blocks:
            return set()
        prefix, name = self._moe_place(block)
        if name:
            return set(self.files.names_under(f"{prefix}{name}."))
        read, _ = self.checkpoint.open_block(block)
        return {read.prefix + tensor for tensor in read.taken}

    def _moe_place(self, block: int) -> tuple[str, str]:
        places = self.checkpoint.places(block)
        if len(places) != 1:
            raise ValueError(
                f"the MoE tensors of block {block} of {self.directory} must share one prefix that "
                f"no other tensor has, but are under {places or 'none'}"
            )
        return places[0]

    @cached_property
    def names_outside(self) -> dict[str, str]:
        """Names in the files of the tensors outside all blocks, by their names in the model."""
        found = {}
        for name in self.files.file_of:
            if not re.search(rf"\b({'|'.join(LISTS)})\.\d+\.", name):
                found[self.target(name)] = name
        return found

    def source(self, name: str) -> Source:
        """Return a tensor of the files as it is stored."""
        return self.files.header(self.files.file_of[name])[name]

    def sources(self, names: Iterable[str]) -> dict[str, Source]:
        """Return tensors by the names they would have unquantized; they are decoded when read."""
        stored = {name: self.source(name) for name in names}
        quantization = self.checkpoint.model.quantization
        if not quantization:
            return stored
        found, parts_of = {}, set()
        modules = {name.rpartition(".")[0] for name in stored}
        for name in sorted(stored.keys() | {f"{module}.weight" for module in modules}):
            parts = find_parts(name, stored, quantization)
            if parts is not None:
                found[name] = parts.open(tuple(self._meta[self.target(name)].shape))
                parts_of |= set(parts.names.values())
        return found | {
            name: source
            for name, source in stored.items()
            if name not in parts_of and not name.endswith(ACTIVATION_SCALES)
        }

    def sources_of(self, module: nn.Module) -> dict[str, Source]:
        """Return the tensors of a module outside all blocks, by their names in the module."""
        path = path_of(self.whole, module)
        names = [name for target, name in self.names_outside.items() if target.startswith(path)]
        found = self.sources(names)
        return {self.target(name).removeprefix(path): found[name] for name in found}

    def stored_bytes(self, names: Iterable[str]) -> int:
        return sum(self.source(name).nbytes for name in names)

    def block_bytes(self, block: int) -> int:
        """Return the bytes that a block takes in memory, without its MoE module."""
        prefix, moe = self.prefix(block), self._prefixes_of_moe(block)
        return sum(
            tensor.numel() * tensor.element_size()
            for name, tensor in self._meta.items()
            if name.startswith(prefix) and not name.startswith(moe)
        )

    # --- filling ---

    @contextmanager
    def hold(self, block: int) -> Iterator[nn.Module]:
        """Load the weights of a block, and free those of the block that had them before.

        At most `AT_ONCE` threads hold a block at a time, and all of them the same one.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._users < (AT_ONCE if self.held == block else 1))
            if self.held != block:
                self._fill(block)
            self._users += 1
        try:
            yield self.blocks[block]
        finally:
            with self._changed:
                self._users -= 1
                self._changed.notify_all()

    def _fill(self, block: int) -> None:
        self.free()
        try:
            self._load(self.names_of_block(block))
            self._fill_buffers(self.blocks[block])
            skip = tuple(f"{part}." for part in self.moe_parts(block))
            self._check_filled(self.blocks[block], f"block {block}", skip)
        except BaseException:
            self.blocks[block].to("meta")
            raise
        self.held = block

    def free(self) -> None:
        """Put the held block back onto the meta device, once no thread uses it."""
        with self._changed:
            self._changed.wait_for(lambda: not self._users)
            if self.held is not None:
                self.blocks[self.held].to("meta")
                self.held = None

    def _fill_frame(self) -> None:
        """Fill the decoder outside its blocks and the embedding's matrix: norms, and buffers."""
        embedding = self.decoder.get_input_embeddings()
        path = self.path + self.embedding_name
        self._load(
            name
            for target, name in self.names_outside.items()
            if target.startswith(self.path) and target.rpartition(".")[0] != path
        )
        for name, child in self.decoder.named_children():
            if name != self.list_name:
                self._fill_buffers(child)
                self._check_filled(child, name, ("weight",) if child is embedding else ())

    def _load(self, names: Iterable[str]) -> None:
        tensors = {name: _read(source) for name, source in self.sources(names).items()}
        info, _ = convert_and_load_state_dict_in_model(self.whole, tensors, self._load_config)
        self.whole._adjust_missing_and_unexpected_keys(info)
        wrong = sorted(map(str, {*info.unexpected_keys, *info.mismatched_keys}))
        if wrong or info.error_msgs or info.conversion_errors:
            raise ValueError(
                f"transformers cannot fill {type(self.whole).__name__} from {self.directory}: "
                f"{wrong or info.error_msgs or info.conversion_errors}"
            )

    def _fill_buffers(self, part: nn.Module) -> None:
        """Compute the buffers that are not stored in checkpoints, as transformers does."""
        for module in part.modules():
            own = module._non_persistent_buffers_set & module._buffers.keys()
            on_meta = [name for name in own if getattr(module._buffers[name], "is_meta", False)]
            for name in on_meta:
                module._buffers[name] = torch.empty_like(module._buffers[name], device="cpu")
            if on_meta:
                self.decoder._init_weights(module)

    def _check_filled(self, part: nn.Module, what: str, skip: tuple[str, ...]) -> None:
        tensors = [*part.named_parameters(), *part.named_buffers()]
        left = [n for n, t in tensors if t.is_meta and not n.startswith(skip)]
        if left:
            raise ValueError(
                f"{self.directory} must have all tensors of {what} of {type(self.whole).__name__}, "
                f"but lacks {', '.join(left[:8])}"
            )

    def _find_dtype(self, dtype: str, config) -> torch.dtype:
        if dtype != "auto":
            return getattr(torch, dtype)
        stated = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
        return getattr(torch, stated) if isinstance(stated, str) else stated or torch.float32


def _read(source: Source) -> torch.Tensor:
    rows = source.read(0, source.shape[0] if source.shape else 1)
    return as_tensor(np.ascontiguousarray(rows))


def _build(config, dtype: torch.dtype) -> nn.Module:
    """Build the model of a config without weights."""
    named = (config.architectures or [None])[0]
    kind = getattr(transformers, named or "", AutoModelForCausalLM)
    build = getattr(kind, "_from_config", None) or kind.from_config
    with torch.device("meta"):
        return build(config, dtype=dtype).eval()


def _find_decoder(whole: nn.Module) -> tuple[nn.Module, str]:
    """Find the submodule that has the blocks, and the name of their list in it."""
    for module in whole.get_decoder().modules():
        for name in LISTS:
            if isinstance(getattr(module, name, None), nn.ModuleList):
                return module, name
    raise ValueError(
        f"{type(whole).__name__} must have decoder blocks called {' or '.join(LISTS)}, but has none"
    )


def _size(block: nn.Module, part: str) -> int:
    return sum(parameter.numel() for parameter in block.get_submodule(part).parameters())


def path_of(whole: nn.Module, part: nn.Module) -> str:
    """Return the path of a submodule in the model, with a trailing dot unless it is empty."""
    path = next(name for name, module in whole.named_modules() if module is part)
    return path + "." if path else ""
