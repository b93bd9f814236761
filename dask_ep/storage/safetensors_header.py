"""Which tensors does a safetensors file hold, and where are their bytes?

    ┌────────────┬──────────────────────────────┬────────────────────────┐
    │ 8 bytes: H │ H bytes of JSON: the header  │ the tensors' bytes     │
    └────────────┴──────────────────────────────┴────────────────────────┘
                                                ^ data_offsets count from here

Only the header is read here, never a tensor. The layout is that of the format's own description
(the README of the safetensors project); what it forbids is an error that names the file and the
tensor, because a wrong offset would return another tensor's weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

LARGEST_HEADER = 100_000_000
"""Maximum bytes of a header, according to the format's description."""

DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "C64": np.dtype(np.complex64),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
"""The format's names of the element types that take whole bytes."""


class Tensor(NamedTuple):
    """One entry of a header."""

    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int
    """bytes from the start of the file"""


def parse_header(file: BinaryIO, size: int, path: str) -> dict[str, Tensor]:
    """Read the names, dtypes, shapes and places of all tensors, in the order of their bytes.

    Parameters
    ----------
    file : open, at its first byte; only the header is read
    size : bytes of the file
    path : for messages

    Raises
    ------
    ValueError
        If the header is not JSON of the format's form, or a tensor's bytes do not fit its shape,
        overlap another's, leave a gap, or lie outside the file.

    Examples
    --------
    >>> import io
    >>> content = encode_header({"output": ((2, 3), np.dtype("float32"))}) + bytes(24)
    >>> parse_header(io.BytesIO(content), len(content), "y.safetensors")["output"].shape
    (2, 3)
    """
    entries = read_entries(file, size, path)
    entries.pop("__metadata__", None)
    spans = {}
    for name, entry in entries.items():
        spans[name] = _parse_entry(f"{path}: tensor {name!r}", entry)
    data = file.tell()
    tensors, position = {}, 0
    for name, (dtype, shape, begin, end) in sorted(spans.items(), key=lambda item: item[1][2:]):
        if begin != position:
            what = "overlaps the one before it" if begin < position else "leaves a gap before it"
            raise ValueError(
                f"{path}: tensor {name!r} {what}: it starts at byte {begin} of the data, and the "
                f"tensors before it end at {position}. The file is damaged; download it again"
            )
        tensors[name] = Tensor(dtype, shape, data + begin)
        position = end
    if data + position != size:
        raise ValueError(
            f"{path}: the tensors must end with the file, at byte {data + position}, but the file "
            f"has {size} bytes. Was the copy cut short?"
        )
    return tensors


def read_entries(file: BinaryIO, size: int, path: str) -> dict[str, Any]:
    """Read the header as it is, with the metadata; the arguments are those of `parse_header`."""
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(LARGEST_HEADER, size - 8):
        raise ValueError(
            f"{path} is not a safetensors file: its header should have {length} bytes, but the "
            f"file has {size}, and a header at most {LARGEST_HEADER}. Was the copy cut short?"
        )
    text = file.read(length)
    try:
        entries = json.loads(text, object_pairs_hook=_without_duplicates)
    except ValueError as error:
        raise ValueError(f"{path}: the safetensors header is not valid JSON: {error}") from error
    if not isinstance(entries, dict):
        raise ValueError(f"{path}: the safetensors header must be a JSON object, not {entries!r}")
    return entries


def encode_header(
    tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    metadata: Mapping[str, str] | None = None,
) -> bytes:
    """Make the bytes that come before the data of tensors, given as (shape, dtype) by name.

    Notes
    -----
    Tensors are stored one after another, in this order.
    """
    labels = {known: label for label, known in DTYPES.items()}
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    begin = 0
    for name, (shape, dtype) in tensors.items():
        if dtype not in labels:
            raise ValueError(
                f"safetensors cannot store {dtype}; it supports {', '.join(map(str, labels))}. "
                "Convert with astype"
            )
        end = begin + prod(shape) * dtype.itemsize
        offsets = [begin, end]
        header[name] = {"dtype": labels[dtype], "shape": list(shape), "data_offsets": offsets}
        begin = end
    return encode_entries(header)


def encode_entries(entries: Mapping[str, Any]) -> bytes:
    """Write a header's entries, padded with spaces so that the data is aligned to 8 bytes."""
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _parse_entry(place: str, entry: Any) -> tuple[np.dtype, tuple[int, ...], int, int]:
    try:
        label, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(
            f"{place} must have dtype, shape and data_offsets [begin, end]; its header entry is "
            f"{entry!r}"
        ) from error
    numbers = [*shape, begin, end] if isinstance(shape, list) else [None]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(
            f"{place}: shape and data_offsets must be integers of at least 0, not {shape!r} and "
            f"{[begin, end]!r}"
        )
    if label not in DTYPES:
        raise ValueError(
            f"{place} has dtype {label!r}; supported are {', '.join(DTYPES)}. Convert the file to "
            "one of these"
        )
    dtype = DTYPES[label]
    if end - begin != prod(shape) * dtype.itemsize:
        raise ValueError(
            f"{place}: shape {shape} of {label} takes {prod(shape) * dtype.itemsize} bytes, but "
            f"data_offsets [{begin}, {end}] hold {end - begin}"
        )
    return dtype, tuple(shape), begin, end


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {twice!r} appears twice")
    return entries
