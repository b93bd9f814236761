"""How does a checkpoint directory become a layer, and what is in it?

    config.json ── model_type ──> a row of `families.FAMILIES` ──> names, shapes, router
    headers of the files ───────> tensors under the block's prefix
                                       │ each is taken once, by its name, and its shape compared
                                       v
                                  MoELayer over Sources; an unused tensor is an error

Only headers are read here. A task reads the tensors of its own experts when it runs.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import numpy as np

from dask_ep.experts.experts import Experts
from dask_ep.layers.block import Block
from dask_ep.layers.checkpoint_layers import Checkpoint, ranges
from dask_ep.layers.families import PREFIXES
from dask_ep.layers.family import Family
from dask_ep.layers.layer import MoELayer
from dask_ep.layers.routing import Router
from dask_ep.storage.sources import Source
from dask_ep.storage.views import View


def load_moe_layer(
    directory: str | os.PathLike,
    layer: int,
    *,
    families: Iterable[Family] = (),
    residual: bool = False,
    as_stored: bool = False,
) -> MoELayer:
    """Open one MoE layer of a Hugging Face checkpoint.

    Parameters
    ----------
    directory : str or path-like
        With ``config.json`` and safetensors files; local, or an address such as ``s3://bucket/x``
        (needs fsspec). Or a ``.gguf`` file, the first if there are several (needs gguf).
    layer : int
        Number of the decoder layer, from 0.
    families : your own families, which are tried before the known ones; see `Family`
    residual : bool
        Add the block's input rows to its output, see `MoELayer`. An error if the model adds other
        rows (`Family.pre_norm`), as in all known families.
    as_stored : bool
        Hold the routed experts of a rank in memory as stored, and convert each when its rows come:
        less memory, more time; see `held_as_stored`.

    Returns
    -------
    MoELayer
        Routed and shared experts as the model computes them, in float32.

    Raises
    ------
    ReadError
        If a file is missing or cut short.
    ValueError
        If the family is not known, the layer is dense or out of range, a config key or tensor is
        missing, a tensor has the wrong shape, or a tensor of the block would not be used; if
        `residual` is True and the model adds other rows.
    TypeError
        If a tensor has a wrong dtype.

    Notes
    -----
    Reads config, index and the headers of the files that hold the block: the time depends on the
    number of tensors, not on their bytes. F32, F16 and BF16 are supported, and the quantized
    formats of `dask_ep.layers.formats`, which are decoded expert by expert when a rank loads its
    own.

    Examples
    --------
    >>> import json, pathlib, tempfile
    >>> import numpy as np
    >>> from safetensors.numpy import save_file
    >>> config = {"model_type": "mixtral", "num_hidden_layers": 1, "hidden_size": 8,
    ...           "intermediate_size": 6, "num_local_experts": 4, "num_experts_per_tok": 2}
    >>> shapes = {"gate": (4, 8)}
    >>> for e in range(4):
    ...     shapes |= {f"experts.{e}.w{i}": (8, 6) if i == 2 else (6, 8) for i in (1, 2, 3)}
    >>> tensors = {f"model.layers.0.block_sparse_moe.{name}.weight": np.ones(shape, "f4")
    ...            for name, shape in shapes.items()}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = pathlib.Path(folder, "config.json").write_text(json.dumps(config))
    ...     save_file(tensors, pathlib.Path(folder, "model.safetensors"))
    ...     load_moe_layer(folder, 0).experts
    Experts(gated, num_experts=4, d=8, hidden=6, d_out=8, dtype=float32, nbytes=2304)
    """
    return MoELayer.from_pretrained(
        directory, layer, families=families, residual=residual, as_stored=as_stored
    )


def moe_layers(directory: str | os.PathLike, *, families: Iterable[Family] = ()) -> list[int]:
    """Return which layers of a checkpoint are MoE layers, by its config."""
    return Checkpoint(directory, families).moe_layers


# --- a checkpoint at a glance ----------------------------------------------------------------


@dataclass(frozen=True)
class LayerDescription:
    """The block of one decoder layer."""

    layer: int
    kind: str
    #: "moe" or "dense", by the config
    num_experts: int
    #: 0 in a dense layer, and if the block is not in these files
    bytes_on_disk: int
    #: bytes of the block's tensors, 0 if they are not in these files
    bytes_in_memory: int
    #: bytes of the same in float32


class StoredPart(NamedTuple):
    """Some tensors of the MoE layers."""

    name: str
    #: "experts", "shared experts", "router and steps", or "not read"
    format: str
    #: dtype or quantized format; of tensors that are not read, the reason
    tensors: int
    stored: int
    #: bytes in the files
    computed: int
    #: bytes in float32


@dataclass(frozen=True)
class Description:
    """A summary of a checkpoint, as data to show."""

    model_type: str
    d: int
    width: int
    #: hidden width of a routed expert
    router: Router
    #: number of the first MoE layer
    router_biases: tuple[str, ...]
    #: those of "bias" and "selection_bias" that it has
    shared_width: int
    #: hidden width of the shared expert, 0 without one
    shared_gate: bool
    #: whether a sigmoid gate weights the shared expert
    dtypes: tuple[str, ...]
    #: dtypes of the tensors in MoE blocks, as stored
    parts: tuple[StoredPart, ...]
    #: tensors of the MoE layers that are read, by part and format
    not_read: tuple[StoredPart, ...]
    #: tensors that are not, with the reason in the place of the format
    layers: tuple[LayerDescription, ...]

    @property
    def moe_layers(self) -> list[int]:
        return [layer.layer for layer in self.layers if layer.kind == "moe"]

    @property
    def moe_ranges(self) -> str:
        """The MoE layers as text, such as "3-60"."""
        return ranges(self.moe_layers)


def describe_checkpoint(
    directory: str | os.PathLike, *, families: Iterable[Family] = ()
) -> Description:
    """Summarise a checkpoint by its config and the headers of its files only.

    Parameters
    ----------
    directory, families : as in `load_moe_layer`

    Returns
    -------
    Description
        Sizes in bytes, on disk as the tensors are stored, and in memory as float32.

    Raises
    ------
    ReadError, ValueError, TypeError
        As `load_moe_layer`: each MoE layer in these files is opened.
    """
    checkpoint = Checkpoint(directory, families)
    dtypes: set[str] = set()
    layers, opened, blocks = [], [], []
    for layer in range(checkpoint.num_layers):
        tensors = [tensor for _, tensor in checkpoint.block_tensors(layer)]
        kind = "moe" if checkpoint.is_moe(layer) else "dense"
        num_experts, in_memory = 0, 4 * sum(prod(tensor.shape) for tensor in tensors)
        if kind == "moe" and tensors:
            block, arguments = checkpoint.open_block(layer)
            opened.append(MoELayer(**arguments))
            blocks.append(block)
            num_experts = opened[-1].experts.num_experts
            in_memory = _bytes_in_memory(opened[-1])
            dtypes |= {tensor.dtype.name for tensor in tensors}
        on_disk = sum(tensor.nbytes for tensor in tensors)
        layers.append(LayerDescription(layer, kind, num_experts, on_disk, in_memory))
    if not opened and checkpoint.moe_layers:
        first_prefix = PREFIXES[0].format(layer=checkpoint.moe_layers[0])
        raise ValueError(
            f"{checkpoint.files.directory} has MoE layers {ranges(checkpoint.moe_layers)} "
            "according to config.json, but none of their tensors has a known prefix, such as "
            f"{first_prefix}{checkpoint.model.family.blocks[0]}"
        )
    if not opened:
        raise ValueError(
            f"{checkpoint.files.directory} has no MoE layer among its {checkpoint.num_layers}"
        )
    first = opened[0]
    experts, width, router = _routed(first)
    return Description(
        model_type=checkpoint.model.model_type,
        d=first.d or experts.d,
        width=width,
        router=router,
        router_biases=tuple(n for n in ("bias", "selection_bias") if n in first.arrays),
        shared_width=(first.shared.hidden or 0) if first.shared is not None else 0,
        shared_gate="shared_gate" in first.arrays,
        dtypes=tuple(sorted(dtypes)),
        parts=_parts_read(opened),
        not_read=_parts_not_read(blocks),
        layers=tuple(layers),
    )


def _parts_read(layers: Iterable[MoELayer]) -> tuple[StoredPart, ...]:
    """Tensors of some layers that are read, by part and format."""
    read: list[tuple[str, Source]] = []
    for layer in layers:
        shared = [] if layer.shared is None else layer.shared.sources()
        read += [("experts", source) for source in layer.experts.sources()]
        read += [("shared experts", source) for source in shared]
        read += [("router and steps", array.source) for array in layer.small_arrays]
    return _added_up((name, format_of(source), source) for name, source in read)


def _parts_not_read(blocks: Iterable[Block]) -> tuple[StoredPart, ...]:
    """Tensors of the same layers that are not read, by the reason."""
    left = [
        ("not read", block.why_not_read(name) or "", block.tensors[name])
        for block in blocks
        for name in sorted((block.tensors.keys() - block.taken) | block.ignored)
    ]
    return _added_up(left)


def _added_up(tensors: Iterable[tuple[str, str, Source]]) -> tuple[StoredPart, ...]:
    found: dict[tuple[str, str], StoredPart] = {}
    for name, form, source in tensors:
        old = found.get((name, form), StoredPart(name, form, 0, 0, 0))
        numbers = (1, source.nbytes, 4 * prod(source.shape))
        added = (a + b for a, b in zip(old[2:], numbers, strict=True))
        found[name, form] = StoredPart(name, form, *added)
    return tuple(found.values())


def format_of(source: Source) -> str:
    """How a tensor's numbers are stored: in a quantized format, or in a dtype."""
    source = source.stored if isinstance(source, View) else source
    return getattr(source, "label", source.dtype.name)


def _routed(layer: MoELayer) -> tuple[Experts, int, Router]:
    """The routed experts of a checkpoint's layer, their hidden width, and their router."""
    experts, router = layer.experts, layer.router
    assert isinstance(experts, Experts)
    assert isinstance(router, Router)
    assert experts.hidden is not None
    return experts, experts.hidden, router


def _bytes_in_memory(layer: MoELayer) -> int:
    float32 = np.dtype(np.float32)
    experts = layer.experts.num_experts * layer.experts.loaded_bytes(float32)
    return experts + layer.resident_bytes(float32)
