"""Which tensors of a checkpoint make up one quantized matrix?

One row of `WEIGHT_FORMATS` per format: the name of the codes that replace a weight, their dtype,
and the tensors that belong to them. Names are templates: ``{name}`` is the matrix's own, such as
``experts.0.up_proj.weight``, and ``{stem}`` is that without ``weight``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

from dask_ep.experts.codings import FLOAT8
from dask_ep.experts.quantized import MXFP4_GROUP, QuantizedSource, float8, mxfp4
from dask_ep.experts.scales import E8M0, ScaleSource, ZeroPoints
from dask_ep.storage.sources import Source
from dask_ep.storage.views import Transposed

METHODS = ("fp8", "mxfp4", "compressed-tensors", "modelopt", "gptq", "awq")
"""Supported values of ``quant_method``."""

MODELOPT_METHODS = ("FP8", "NVFP4", "MIXED_PRECISION")
"""Supported values of ModelOpt's ``quant_algo``."""

NVFP4_GROUP = 16
"""Numbers that share a scale, which is an 8-bit float."""

OF_FLOAT8 = ("{name}_scale_inv", "{name}_scale", "{stem}scale")
"""Names of the scales of 8-bit floats: in DeepSeek, in most others, and in DeepSeek-V4."""

IN_GROUPS = ("group", "dynamic", True)
"""Values of ``actorder`` of compressed-tensors with which columns have the groups of ``g_idx``."""

HALVES = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))

ACTIVATION_SCALES = (
    "input_scale",
    "input_zero_point",
    "input_global_scale",
    "activation_scale",
    "act_scale",
    "output_scale",
)
"""Names, after the stem, of tensors that quantize the rows that a matrix multiplies. Rows are not
quantized here, nor in transformers when it dequantizes."""


@dataclass(frozen=True)
class Format:
    """How a matrix is stored.

    Attributes
    ----------
    label : name of the format, for messages
    codes : name of the tensor with the codes
    dtypes : dtypes of the codes
    scales : possible names of the scales
    build : makes the matrix of a shape from its parts
    others : further parts: role -> name
    scale_dtypes : dtypes of the scales; any, if ()
    method : the ``quant_method`` of the format, if tensors alone do not identify it
    in_out : whether the matrix is stored (in, out), although its name means (out, in)
    """

    label: str
    codes: str
    dtypes: tuple[np.dtype, ...]
    scales: tuple[str, ...]
    build: Callable[[Parts, tuple[int, ...]], QuantizedSource]
    others: Mapping[str, str] = field(default_factory=dict)
    scale_dtypes: tuple[np.dtype, ...] = ()
    method: str | None = None
    in_out: bool = False


class Parts:
    """The tensors of one quantized matrix.

    Parameters
    ----------
    row : Format
    name : of the matrix
    names : tensor name by role: "codes", "scales", and those of the format's others that exist
    tensors : Source by tensor name
    config : ``quantization_config`` of the checkpoint
    prefix : what stands before the names in the files
    """

    def __init__(
        self,
        row: Format,
        name: str,
        names: Mapping[str, str],
        tensors: Mapping[str, Source],
        config: Mapping[str, Any],
        prefix: str,
    ):
        self.label, self._build, self.in_out = row.label, row.build, row.in_out
        self.names, self.config, self._prefix = names, config, prefix
        self.module = prefix + name.removesuffix(".weight")
        self._others = {role: filled(other, name) for role, other in row.others.items()}
        self._tensors = {role: tensors[name] for role, name in names.items()}

    def __getitem__(self, role: str) -> Source:
        if role not in self._tensors:
            raise ValueError(
                f"{self['codes'].name} is {self.label}, so the block must have the tensor "
                f"{self._prefix}{self._others[role]}"
            )
        return self._tensors[role]

    def get(self, role: str, is_needed: bool = False) -> Source | None:
        return self[role] if is_needed else self._tensors.get(role)

    def open(self, shape: tuple[int, ...]) -> QuantizedSource | Transposed:
        """Make the matrix, which must have a shape; a transposing view if stored as (in, out)."""
        codes = self["codes"]
        if codes.ndim < 2:
            raise ValueError(
                f"{codes.name} is {self.label}, so it must be a matrix, but has shape {codes.shape}"
            )
        if not self.in_out:
            return self._build(self, shape)
        return Transposed(self._build(self, shape[::-1]))

    @property
    def scheme(self) -> Mapping[str, Any]:
        """The settings of the config group that names this matrix; {} without groups."""
        if "config_groups" not in self.config:
            return {}
        groups = self.config["config_groups"].values()
        for matches in (self._is_named, lambda target: target == "Linear"):
            for group in groups:
                if any(map(matches, group.get("targets") or ())):
                    return group.get("weights") or {}
        raise ValueError(
            f"{self['codes'].name} is quantized, so a group of config_groups in config.json must "
            f"have {self.module} among its targets; they are "
            f"{', '.join(t for group in groups for t in group.get('targets') or ())}"
        )

    def _is_named(self, target: str) -> bool:
        """Whether a target is the name of this module, or a pattern that matches its beginning."""
        if target.startswith("re:"):
            return re.match(target.removeprefix("re:"), self.module) is not None
        return target == self.module


def find_parts(
    name: str, tensors: Mapping[str, Source], config: Mapping[str, Any], prefix: str = ""
) -> Parts | None:
    """Find the parts of a matrix, if it is quantized.

    Parameters
    ----------
    name : of the matrix, as if it were not quantized
    tensors : the tensors of the block, by name
    config : ``quantization_config``; {} without
    prefix : what stands before the names in the files

    Returns
    -------
    Parts, or None if the matrix is not quantized
    """
    for row in WEIGHT_FORMATS:
        codes = filled(row.codes, name)
        if codes not in tensors or tensors[codes].dtype not in row.dtypes:
            continue
        if row.method not in (None, config.get("quant_method")):
            continue
        scales = [filled(scale, name) for scale in row.scales]
        found = next((scale for scale in scales if scale in tensors), None)
        if found is None and row.label != "FP8":
            continue
        if found is None:
            raise ValueError(
                f"{tensors[codes].name} is FP8, so the block must have the tensor "
                f"{' or '.join(prefix + scale for scale in scales)}"
            )
        if row.scale_dtypes and tensors[found].dtype not in row.scale_dtypes:
            continue
        others = {role: filled(other, name) for role, other in row.others.items()}
        names = {"codes": codes, "scales": found, **others}
        names = {role: part for role, part in names.items() if part in tensors}
        return Parts(row, name, names, tensors, config, prefix)
    return None


def check_method(config: Mapping[str, Any], directory: str) -> None:
    """Raise if a checkpoint is quantized in a way that is not supported."""
    for key, known in (("quant_method", METHODS), ("quant_algo", MODELOPT_METHODS)):
        if config.get(key) not in (None, *known):
            raise ValueError(
                f"{directory} is quantized by {config[key]!r}; supported are {', '.join(known)}. "
                "Use the unquantized checkpoint"
            )
    groups = config.get("config_groups", {})
    if not (isinstance(groups, Mapping) and all(map(_is_group, groups.values()))):
        raise ValueError(
            f"{directory}: config_groups of its quantization must be an object of objects, each "
            f"with a list of names, targets, and an object, weights, but is {groups!r}"
        )


def _is_group(group: Any) -> bool:
    """Whether a group of compressed-tensors has targets and weights of the right types."""
    if not isinstance(group, Mapping):
        return False
    targets, weights = group.get("targets") or [], group.get("weights") or {}
    named = isinstance(targets, list) and all(isinstance(target, str) for target in targets)
    return named and isinstance(weights, Mapping)


def filled(template: str, name: str) -> str:
    """Name a part of a matrix."""
    return template.format(name=name, stem=name.removesuffix("weight"))


def activation_scales(name: str, tensors: Mapping[str, Source]) -> Iterator[str]:
    """The tensors that quantize the rows that a matrix multiplies."""
    stem = name.removesuffix("weight")
    return (stem + ending for ending in ACTIVATION_SCALES if stem + ending in tensors)


# --- how each is put together ---------------------------------------------------------------------


def _build_float8(parts: Parts, shape: tuple[int, ...]) -> QuantizedSource:
    return float8(parts["codes"], parts["scales"], _float8_block(parts, parts["codes"].shape))


def _float8_block(parts: Parts, shape: tuple[int, ...]) -> tuple[int, int]:
    """The block that fits the scales: the config's, the whole matrix, a row, or 32 of a row."""
    scales = parts["scales"]
    stated = parts.config.get("weight_block_size") or parts.scheme.get("block_structure")
    *experts, rows, columns = shape
    fitting: list[tuple[int, int]] = []
    good = isinstance(stated, list) and [type(size) for size in stated] == [int, int]
    if isinstance(stated, list) and good:
        fitting.append((stated[0], stated[1]))
    fitting += [(rows, columns), (1, columns)]
    if scales.dtype in (np.uint8, E8M0):
        fitting.append((1, MXFP4_GROUP))
    for block in fitting:
        grid = (*experts, -(-rows // block[0]), -(-columns // block[1]))
        if [n for n in grid if n != 1] == [n for n in scales.shape if n != 1]:
            return block
    if good:
        return fitting[0]
    raise ValueError(
        f"{parts['codes'].name} is FP8 with scales {scales.shape}, so config.json must have "
        f"weight_block_size [rows, columns] in quantization_config, but it says {stated!r}"
    )


def _build_mxfp4_blocks(parts: Parts, shape: tuple[int, ...]) -> QuantizedSource:
    return mxfp4(parts["codes"], parts["scales"])


def _build_packed(parts: Parts, shape: tuple[int, ...]) -> QuantizedSource:
    """Integers of 4 or 8 bits in words of 32, with half their range as offset."""
    codes, scales, zeros = parts["codes"], parts["scales"], _zero_point(parts)
    bits = _bits(parts, codes.shape[-1], shape[-1])
    block = (1, _group(parts, shape))
    if zeros is None:
        half: Source | float = float(1 << (bits - 1))
    else:
        if shape[:-2]:
            raise ValueError(f"zero points of stacked experts are not supported: {zeros.name}")
        half = ZeroPoints(zeros, f"column{bits}", (shape[0], shape[1] // block[1]))
    return QuantizedSource(
        codes,
        f"uint{bits}",
        scales,
        block,
        shape,
        zeros=half,
        groups=parts.get("g_idx", parts.scheme.get("actorder") in IN_GROUPS),
        extent=parts.get("shape"),
        rounded=scales.dtype if scales.dtype in HALVES else None,
        label=f"int{bits}",
    )


def _zero_point(parts: Parts) -> Source | None:
    """The zero points of compressed-tensors, which are required if the config declares them."""
    return parts.get("zero_point", parts.scheme.get("symmetric") is False)


def _bits(parts: Parts, words: int, numbers: int) -> int:
    """Bits of a number, from the number of 32-bit words that hold a known count of them."""
    fitting = [bits for bits in (4, 8) if words == -(-numbers * bits // 32)]
    stated = parts.scheme.get("num_bits", parts.config.get("bits"))
    if not fitting or stated not in (None, *fitting):
        raise ValueError(
            f"{parts['codes'].name} must hold {numbers} numbers of 4 or 8 bits side by side, but "
            f"has {words} words of 32 bits, and config.json says {stated} bits"
        )
    return fitting[0] if stated is None else stated


def _group(parts: Parts, shape: tuple[int, ...]) -> int:
    """How many numbers of a row share a scale."""
    scales = parts["scales"]
    if scales.shape[:-1] != shape[:-1] or shape[-1] % max(scales.shape[-1], 1):
        raise ValueError(
            f"{scales.name} must have {shape[:-1]} rows of scales, each for the same number of "
            f"the {shape[-1]} numbers of a row of {parts['codes'].name}, but has shape "
            f"{scales.shape}"
        )
    group, stated = shape[-1] // scales.shape[-1], parts.scheme.get("group_size")
    if stated not in (None, -1, group):
        raise ValueError(
            f"{scales.name} {scales.shape} has one scale for {group} numbers of a row, but "
            f"config.json says group_size {stated}"
        )
    return group


def _build_whole(parts: Parts, shape: tuple[int, ...]) -> QuantizedSource:
    """A byte for each integer, from which a zero point may be subtracted."""
    scales, zeros = parts["scales"], _zero_point(parts)
    return QuantizedSource(
        parts["codes"],
        "int8",
        scales,
        (1, _group(parts, shape)),
        shape,
        zeros=0.0 if zeros is None else zeros,
        rounded=scales.dtype if scales.dtype in HALVES else None,
        label="int8",
    )


def _build_fp4(
    group: int, of_all: str | None, parts: Parts, shape: tuple[int, ...]
) -> QuantizedSource:
    """Floats of 4 bits, with one scale for a group in a row, and perhaps one factor for all."""
    if shape[-1] % group:
        raise ValueError(
            f"{parts['codes'].name} is {parts.label}, which has a scale for each {group} numbers "
            f"of a row, so rows must be multiples of {group}, but have {shape[-1]}"
        )
    factor = None if of_all is None else parts[of_all]
    divides = of_all == "global_scale"
    of = f"1 x {group} of {parts['codes'].name} {shape}"
    grid = (*shape[:-1], shape[-1] // group)
    scales = ScaleSource(parts["scales"], grid, factor, divides, of=of)
    return QuantizedSource(parts["codes"], "fp4", scales, (1, group), shape, label=parts.label)


def _build_gptq(parts: Parts, shape: tuple[int, ...]) -> QuantizedSource:
    """Words hold the numbers of a column; in format 1, zero points are stored minus one.

    As in AutoGPTQ, which adds 1 and keeps the bits of a number.
    """
    bits = _bits(parts, parts["codes"].shape[0], shape[0])
    more = 0 if parts.config.get("checkpoint_format") == "gptq_v2" else 1
    return _build_in_out(
        parts, shape, f"column{bits}", f"uint{bits}", more, (1 << bits) - 1, f"GPTQ int{bits}"
    )


def _build_awq(parts: Parts, shape: tuple[int, ...]) -> QuantizedSource:
    if (version := parts.config.get("version", "gemm")) != "gemm":
        raise ValueError(f"AWQ must be of version gemm, but config.json says {version!r}")
    return _build_in_out(parts, shape, "awq", "awq", 0, 15, "AWQ int4")


def _build_in_out(
    parts: Parts,
    shape: tuple[int, ...],
    coding: str,
    zeros_coding: str,
    more: int,
    mask: int,
    label: str,
) -> QuantizedSource:
    """Rows (in,) share their scales by groups of neighbouring rows."""
    group = parts.config.get("group_size", -1)
    group = shape[0] if group == -1 else group
    if type(group) is not int or group < 1:
        raise ValueError(f"group_size in config.json must be -1 or at least 1, but is {group!r}")
    scales = parts["scales"]
    grid = (-(-shape[0] // group), shape[1])
    return QuantizedSource(
        parts["codes"],
        coding,
        scales,
        (group, 1),
        shape,
        zeros=ZeroPoints(parts["zeros"], zeros_coding, grid, more, mask),
        groups=parts.get("g_idx", bool(parts.config.get("desc_act"))),
        rounded=scales.dtype if scales.dtype in HALVES else None,
        label=label,
    )


UINT8, INT8, INT32 = (np.dtype(t) for t in (np.uint8, np.int8, np.int32))
EXPONENTS = (UINT8, E8M0)
MXFP4 = partial(_build_fp4, MXFP4_GROUP, None)
NVFP4, NVFP4_MODELOPT = (partial(_build_fp4, NVFP4_GROUP, n) for n in ("global_scale", "scale_2"))
PACKED, SCALE = "{name}_packed", ("{name}_scale",)
ZERO = {"zero_point": "{name}_zero_point"}

WEIGHT_FORMATS = (
    Format("MXFP4", "{name}_blocks", EXPONENTS, ("{name}_scales",), _build_mxfp4_blocks),
    Format(
        "int4 or int8",
        PACKED,
        (INT32,),
        SCALE,
        _build_packed,
        ZERO | {"shape": "{name}_shape", "g_idx": "{name}_g_idx"},
    ),
    Format("MXFP4", PACKED, (UINT8,), SCALE, MXFP4, scale_dtypes=EXPONENTS),
    Format(
        "NVFP4", PACKED, (UINT8,), SCALE, NVFP4, {"global_scale": "{name}_global_scale"}, FLOAT8
    ),
    Format(
        "NVFP4", "{name}", (UINT8,), SCALE, NVFP4_MODELOPT, {"scale_2": "{name}_scale_2"}, FLOAT8
    ),
    Format("MXFP4", "{name}", (INT8, UINT8), OF_FLOAT8, MXFP4, scale_dtypes=EXPONENTS),
    Format("int8", "{name}", (INT8,), SCALE, _build_whole, ZERO),
    Format("FP8", "{name}", FLOAT8, OF_FLOAT8, _build_float8),
    Format(
        "GPTQ",
        "{stem}qweight",
        (INT32,),
        ("{stem}scales",),
        _build_gptq,
        {"zeros": "{stem}qzeros", "g_idx": "{stem}g_idx"},
        method="gptq",
        in_out=True,
    ),
    Format(
        "AWQ",
        "{stem}qweight",
        (INT32,),
        ("{stem}scales",),
        _build_awq,
        {"zeros": "{stem}qzeros"},
        method="awq",
        in_out=True,
    ),
)
