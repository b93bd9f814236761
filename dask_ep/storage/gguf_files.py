"""Which tensors does a GGUF file hold, and what does it say about its model?

    model.gguf, or model-00001-of-00003.gguf with the others next to it

The format's own library (``gguf``, of llama.cpp) reads the header through a memory map. Numbers
stay in the file, a few bits each, until they are read; `gguf_blocks` decodes them then.
"""

from __future__ import annotations

import os
from functools import lru_cache
from math import prod
from types import ModuleType
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from dask_ep.errors import ReadError
from dask_ep.storage.gguf_blocks import decode_blocks
from dask_ep.storage.plain_sources import ArraySource, LocalFile
from dask_ep.storage.remote import is_remote
from dask_ep.storage.source import Derived, Region, Source

PLAIN = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "I8": np.int8, "I16": np.int16, "I32": np.int32, "I64": np.int64,
}  # fmt: skip
"""Forms that are rows of a dtype."""


class GgufFile(NamedTuple):
    """What the header of a model says."""

    settings: dict[str, Any]
    #: by key, without those of the tokenizer
    tensors: dict[str, Source]
    #: float32 in shape and dtype, or the dtype that a plain tensor has


def gguf_library() -> ModuleType:
    """Return the library that reads the format.

    Raises
    ------
    ImportError
        If it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise ImportError(
            "GGUF files are read by the package gguf, which is not installed: pip install gguf"
        ) from error
    return gguf


class GgufSource(Derived):
    """Rows in blocks, each some bytes that hold a fixed number of neighbours, as float32.

    Parameters
    ----------
    stored : Source of uint8, (..., bytes of a row)
    label : what the form is called, such as "Q4_K"
    shape : of the numbers

    Notes
    -----
    The numbers are those of the library, bit for bit. On a device they are decoded by the host, and
    held in its memory.
    """

    def __init__(self, stored: Source, label: str, shape: tuple[int, ...]):
        super().__init__(stored, shape)
        self.label = label

    def read(self, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        out = self._destination(start, stop, out)
        quants = gguf_library().quants
        decoder = getattr(quants, self.label, None)
        if decoder is None:
            raise ReadError(f"{self.name} is {self.label}, which the package gguf does not decode")
        if len(self.shape) < 2:
            raise ReadError(
                f"{self.name} is a vector in blocks ({self.label}), not rows of numbers"
            )
        decoder.init_grid()
        blocks = self.stored.read(start, stop).reshape(-1, decoder.type_size)
        flat = out.reshape(-1, decoder.block_size)
        if not decode_blocks(quants, self.label, blocks, flat):
            raise ReadError(
                f"rows [{start}, {stop}) of {self.name} ({self.label}, {self.shape}) have a "
                f"scale that is NaN or infinite in {self.path}"
            )
        return out

    def held(self, start: int, stop: int, xp: Any) -> GgufSource:
        """The same rows [start, stop) with their blocks in the host's memory."""
        stored = ArraySource(self.stored.read(start, stop), self.name)
        return GgufSource(stored, self.label, (stop - start, *self.shape[1:]))

    def fingerprint(self) -> dict[str, Any]:
        return super().fingerprint() | {"form": self.label}


def open_gguf(path: str | os.PathLike) -> GgufFile:
    """Open all tensors of a model in GGUF files, reading only the headers.

    Parameters
    ----------
    path : of the file; of the first one, where there are several

    Raises
    ------
    ImportError
        If the package gguf is not installed.
    ReadError
        If there is no such file, or one of several is missing.
    ValueError
        If it is not a GGUF file, has tensors that cannot be decoded, or has one in two files.
    """
    path = os.fspath(path)
    if is_remote(path):
        raise ValueError(
            f"GGUF files are read from a local directory, so {path} must be copied to one first"
        )
    settings, tensors = _read_file(path)
    for other in _others(path, settings.get("split.count", 1)):
        more = _read_file(other)[1]
        if twice := sorted(tensors.keys() & more.keys()):
            raise ValueError(
                f"{other} has the tensor {twice[0]!r}, and an earlier file of {path} has it too: "
                "they are not of one model; download them again"
            )
        tensors = tensors | more
    return GgufFile(settings, tensors)


def _others(path: str, count: Any) -> list[str]:
    """The files that go with the first of several."""
    if type(count) is not int:
        raise ValueError(f"split.count of {path} must be a whole number, but is {count!r}")
    if count < 2:
        return []
    ending = f"-of-{count:05}.gguf"
    if not path.endswith(f"-00001{ending}"):
        raise ValueError(
            f"{path} is one of {count} files: open the first, which must be called "
            f"NAME-00001{ending}"
        )
    stem = path.removesuffix(f"00001{ending}")
    return [f"{stem}{n:05}{ending}" for n in range(2, count + 1)]


def _read_file(path: str) -> tuple[dict[str, Any], dict[str, Source]]:
    file = LocalFile(path)
    stat = os.stat(path)
    settings, header = _read_header(os.path.abspath(path), stat.st_size, stat.st_mtime_ns)
    return settings, {name: _open_tensor(file, name, *place) for name, place in header.items()}


@lru_cache(maxsize=64)
def _read_header(path: str, size: int, changed: int) -> tuple[dict[str, Any], dict[str, tuple]]:
    """Settings, and (form, shape, offset) of each tensor; kept, as a vocabulary takes seconds."""
    library = gguf_library()
    try:
        with np.errstate(over="ignore"):  # of damaged offsets
            reader = library.GGUFReader(path)
        fields = {n: f for n, f in reader.fields.items() if not n.startswith("tokenizer.")}
        settings = {name: field.contents() for name, field in fields.items()}
        tensors = {
            t.name: (t.tensor_type.name, tuple(t.shape[::-1].tolist()), int(t.data_offset))
            for t in reader.tensors
        }
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(
            f"{path} is not a GGUF file that the package gguf reads; was the copy cut "
            f"short? {type(error).__name__}: {error}"
        ) from error
    _check_header(path, size, reader, tensors)
    return settings, tensors


def _check_header(path: str, size: int, reader: Any, tensors: dict[str, tuple]) -> None:
    """Raise if the numbers are swapped, or the tensors do not follow on each other to the end."""
    if reader.byte_order == "S":
        raise ValueError(
            f"{path} has the byte order of other machines; convert a copy of it with "
            "gguf-convert-endian, which comes with the package gguf"
        )
    aligned = int(reader.data_offset)
    for name, (form, shape, offset) in tensors.items():
        if offset != aligned:
            raise ValueError(
                f"the tensor {name!r} must begin at byte {aligned} of {path}, where those before "
                f"it end, but begins at {offset}: the file is damaged; copy it again"
            )
        numbers, width = gguf_library().GGML_QUANT_SIZES[gguf_library().GGMLQuantizationType[form]]
        aligned = offset + prod(shape) // numbers * width
        aligned += -aligned % int(reader.alignment)
    if size > aligned:
        raise ValueError(
            f"{path} has {size - aligned} bytes after its last tensor, so it is damaged, or its "
            "writer was stopped; copy it again"
        )


def _open_tensor(
    file: LocalFile, tensor: str, form: str, shape: tuple[int, ...], offset: int
) -> Source:
    name = f"{file.name}:{tensor}"
    if len(shape) == 1 and tensor.endswith("ffn_gate_inp_shexp.weight"):
        shape = (1, *shape)  # one row, which the format stores like a vector
    if form in PLAIN:
        return Region(file, offset, shape, np.dtype(PLAIN[form]), name)
    numbers, width = gguf_library().GGML_QUANT_SIZES[gguf_library().GGMLQuantizationType[form]]
    stored = (*shape[:-1], shape[-1] // numbers * width)
    return GgufSource(Region(file, offset, stored, np.dtype(np.uint8), name), form, shape)
