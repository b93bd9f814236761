"""Which `Source` reads an array, wherever it is?

`open_source` chooses one for all forms of tokens and weights:

    x.npy  file.safetensors::name     -> Region        of a local file, or by ranged reads
    model.gguf::name                  -> GgufSource    the same, of blocks that are decoded
    x.zarr  s3://x.zarr  zarr.Array   -> ZarrSource    chunks; plain local ones read directly
    ndarray                           -> ArraySource   memory (a memory map counts as its file)

If the stored bytes are the rows themselves, a read is one system call per chunk, from the file
directly to its destination. Reads are not retried; incomplete data is a `ReadError`.
"""

from __future__ import annotations

import mmap
import os
import pickle
import re
import sys
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from dask_ep.errors import ReadError
from dask_ep.storage.files import fill_from_file, fingerprint_files, is_written
from dask_ep.storage.gguf_files import open_gguf
from dask_ep.storage.memmaps import is_of_its_file
from dask_ep.storage.npy_header import parse_npy_header
from dask_ep.storage.plain_sources import ArraySource, LocalFile
from dask_ep.storage.remote import RemoteFile, is_remote
from dask_ep.storage.safetensors_header import parse_header
from dask_ep.storage.source import File, Region, Source, checked_dtype
from dask_ep.storage.zarr_layout import (
    ChunkFiles,
    anchored,
    check_local_chunks,
    chunk_files,
    local_directory,
    missing_chunks,
    open_array,
)

if TYPE_CHECKING:
    import zarr


class ZarrSource(Source):
    """A Zarr array. Local chunks of plain rows are read directly, all others through Zarr.

    Parameters
    ----------
    array : zarr.Array
    name : for messages
    dtype : the array's type if `array` has its bits as unsigned integers; see `zarr_layout`
    missing : {"error", "fill"}
        What rows of a chunk that was never written are: a `ReadError`, or Zarr's fill value. By
        default Zarr does not write chunks that hold only the fill value; but a lost chunk file
        looks the same, and its rows would silently be zeros.
    """

    def __init__(
        self,
        array: zarr.Array,
        name: str,
        dtype: np.dtype | None = None,
        missing: str = "error",
    ):
        if missing not in ("error", "fill"):
            raise ValueError(f'missing must be "error" or "fill", not {missing!r}')
        if 0 in array.chunks:
            raise ValueError(f"chunks of {name} must have numbers, but are {array.chunks}")
        array = anchored(array)
        dtype = array.dtype.newbyteorder("=") if dtype is None else dtype
        self._pickled: bytes | None = None
        self.array, self.name, self.missing = array, name, missing
        self.shape, self.dtype = array.shape, checked_dtype(dtype, name)
        self.path = local_directory(array)
        self.files = chunk_files(array)
        self.chunk_rows = (array.shards or array.chunks)[0] if array.shape else None
        if array.shape and self.files is None:  # a stored chunk, of unknown size, and decoded
            rows = min(array.chunks[0], array.shape[0])
            self.read_bytes = 2 * rows * prod(array.shape[1:]) * self.dtype.itemsize

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle once, and unpickle once per process, as every task of every chunk has a source.

        Not if the store may hold the rows themselves, such as one in memory, as they may change.
        """
        if self.path is None:
            return _restored, (type(self), self.__dict__)
        if self._pickled is None:
            self._pickled = pickle.dumps((type(self), self.__dict__), pickle.HIGHEST_PROTOCOL)
        return _unpickled, (self._pickled,)

    def read(self, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        out = self._destination(start, stop, out)
        if self.files is None:
            self._read_through_zarr(start, stop, out)
        else:
            for chunk, first, last in self.files.spans(start, stop):
                rows = out[first - start : last - start]
                self._read_chunk(self.files, chunk, first, last, rows)
        return out

    def find_missing(self) -> list[str]:
        """Return the keys of all chunks (shards) that were never written, without reading any."""
        return list(missing_chunks(self.array, 0, self.shape[0])) if self.shape else []

    def fingerprint(self) -> dict[str, Any]:
        """See `Source.fingerprint`; the files of a local array are counted, summed and hashed.

        For an array that is not in a local directory only the metadata is checked, since anything
        else is expensive: changed chunks are not noticed.
        """
        metadata = repr(sorted(self.array.metadata.to_dict().items())).encode()
        mine = self._describe() | {"metadata": xxhash.xxh3_128_hexdigest(metadata)}
        return mine if self.path is None else mine | fingerprint_files(self.path)

    def __dask_tokenize__(self) -> object:
        place = str(self.array.store_path) if self.path is None else self.path
        return self._as_text(f"{place} {self.missing}")

    def _read_chunk(
        self, files: ChunkFiles, chunk: int, first: int, last: int, out: np.ndarray
    ) -> None:
        place = f"chunk {chunk} (rows [{first}, {last})) of {self.name}"
        path = files.path(chunk)
        offset = (first - chunk * files.rows) * files.row_bytes
        if self.missing == "fill" and not is_written(path):
            out.view(self.array.dtype)[...] = self.array.fill_value
        else:
            fill_from_file(out, path, offset, place, files.chunk_bytes)

    def _read_through_zarr(self, start: int, stop: int, out: np.ndarray) -> None:
        from zarr.buffer import default_buffer_prototype

        place = f"rows [{start}, {stop}) of {self.name}"
        if self.missing == "error":
            for key in missing_chunks(self.array, start, stop):
                raise ReadError(f"{place}: chunk {key} is missing in {self.array.store_path}")
        else:
            check_local_chunks(self.array, start, stop)
        buffer = default_buffer_prototype().nd_buffer
        selection = slice(start, stop) if self.shape else ()
        try:
            target = buffer.from_numpy_array(out.view(self.array.dtype.newbyteorder("=")))
            self.array.get_basic_selection(selection, out=target)
        except Exception as error:  # codecs and stores raise anything for damaged data
            raise ReadError(
                f"{place} could not be read from {self.array.store_path}: "
                f"{type(error).__name__}: {error}"
            ) from error


@lru_cache(maxsize=256)
def _unpickled(pickled: bytes) -> ZarrSource:
    return _restored(*pickle.loads(pickled))


def _restored(kind: type[ZarrSource], state: dict[str, Any]) -> ZarrSource:
    source = kind.__new__(kind)
    source.__dict__.update(state)
    return source


def open_source(
    obj: Any, name: str | None = None, *, dtype: Any = None, missing: str = "error"
) -> Source:
    """Return a `Source` for a path, an array or a Source.

    Parameters
    ----------
    obj : str or path-like, ndarray, memmap, zarr.Array or Source
        Paths: ``x.npy``; a Zarr array's directory; ``file.safetensors::tensor``, or just the file
        if it has one tensor; ``model.gguf::tensor`` (needs gguf). Each but the last may be an
        address such as ``s3://bucket/x.npy`` (needs fsspec).
    name : for messages; the file's name without it
    dtype : dtype of a ``.npy`` file of raw bytes, as which ``np.save`` stores bfloat16, for example
    missing : {"error", "fill"}
        What a Zarr chunk that was never written means; see `ZarrSource`.

    Raises
    ------
    ReadError
        If the path does not exist, or the file is truncated.
    ValueError, TypeError
        If it is not an array, or has a type or layout that is not supported.

    Examples
    --------
    >>> import numpy as np
    >>> open_source(np.arange(6.0).reshape(3, 2)).read(1, 3)
    array([[2., 3.], [4., 5.]])
    """
    if isinstance(obj, Source):
        return obj
    if isinstance(obj, np.memmap):
        return _source_of_memmap(obj, name)
    if isinstance(obj, np.ndarray):
        return ArraySource(obj, "array" if name is None else name)
    if "zarr" in sys.modules and isinstance(obj, sys.modules["zarr"].Array):
        return ZarrSource(
            obj, obj.basename or "Zarr array" if name is None else name, None, missing
        )
    if not isinstance(obj, (str, os.PathLike)):
        raise TypeError(
            "a source is a path, a NumPy or Zarr array or a Source, not "
            f"{type(obj).__module__}.{type(obj).__qualname__}"
        )
    path = os.fspath(obj)
    if named := re.fullmatch(r"(.*?\.(?:safetensors|gguf))(?:::(.*))?", path, re.DOTALL):
        return _source_of_tensor(named[1], named[2], name)
    if path.endswith(".npy"):
        file = _find(path, name)
        with file.open() as opened:
            shape, stored, offset = parse_npy_header(opened, path, dtype)
        source = Region(file, offset, shape, stored, file.name)
        if more := file.size - offset - source.nbytes:
            raise ReadError(
                f"{path} has {more} bytes after the array {shape} of {stored} that its header "
                "describes: it is damaged, or its writer was stopped; save it again"
            )
        return source
    return _source_of_zarr(path, name, missing)


def refuse_missing(source: Source) -> None:
    """Raise a `ReadError` if chunks were never written, unless they hold the fill value.

    A Zarr array that is not local is not checked here: its reads find missing chunks.
    """
    if not isinstance(source, ZarrSource) or source.missing == "fill" or source.path is None:
        return
    if keys := source.find_missing():
        some = ", ".join(keys[:5]) + (", ..." if len(keys) > 5 else "")
        raise ReadError(
            f"{source.name}: {len(keys)} chunks are missing in {source.path} ({some}). If they "
            'were left out because all of their values are the fill value, set missing="fill"'
        )


def open_safetensors(path: str | os.PathLike) -> dict[str, Source]:
    """Open all tensors of a safetensors file, local or at an address, reading only its header.

    Returns
    -------
    dict : tensor name -> Source, in the order of their bytes in the file

    Raises
    ------
    ReadError
        If there is no such file.
    ValueError
        If the header breaks the format's rules; see `dask_ep.storage.safetensors_header`.
    """
    file = _find(os.fspath(path))
    with file.open() as opened:
        header = parse_header(opened, file.size, file.path)
    return {
        name: Region(file, tensor.offset, tensor.shape, tensor.dtype, f"{file.name}:{name}")
        for name, tensor in header.items()
    }


def _find(path: str, name: str | None = None) -> File:
    return RemoteFile(path, name) if is_remote(path) else LocalFile(path, name)


def _source_of_tensor(path: str, tensor: str | None, name: str | None) -> Source:
    tensors = open_gguf(path).tensors if path.endswith(".gguf") else open_safetensors(path)
    if not tensor and len(tensors) == 1:
        (tensor,) = tensors
    if tensor not in tensors:
        some = ", ".join(list(tensors)[:5]) + (", ..." if len(tensors) > 5 else "")
        what = f"has no tensor {tensor!r}" if tensor else f"has {len(tensors)} tensors"
        raise ValueError(
            f"{path} {what}; name one as {os.path.basename(path)}::<tensor>. It has {some}"
        )
    source = tensors[tensor]
    if name is not None:
        source.name = name
    return source


def _source_of_zarr(path: str, name: str | None, missing: str) -> ZarrSource:
    if not is_remote(path):
        try:
            os.stat(path)
        except OSError as error:
            raise ReadError(f"{os.path.abspath(path)}: {error.strerror}") from None
        if not os.path.isdir(path):
            raise ValueError(
                f"{path} is not a supported array; supported are .npy, .safetensors and .gguf "
                "files and Zarr directories"
            )
        path = os.path.abspath(path)
    array, dtype = open_array(path)
    if name is None:
        parts = path.rstrip("/").split("/")
        roots = [i for i, part in enumerate(parts) if part.endswith(".zarr")]
        name = "/".join(parts[roots[0] if roots else -1 :])
    return ZarrSource(array, name, dtype, missing)


def _source_of_memmap(array: np.memmap, name: str | None) -> Source:
    """Return the file of a memory map as a Source, unless it is a private copy or not plain rows.

    Raises
    ------
    ReadError
        If its file has lost its name: the file with that name now has other data than the map.
    """
    if array.mode == "c" or array.filename is None or not array.flags.c_contiguous:
        return ArraySource(array, "array" if name is None else name)
    if not is_of_its_file(array):
        raise ReadError(
            f"{array.filename} was replaced or moved since it was mapped into memory, so workers "
            "would read other numbers than this map: map it again, or pass a copy of it, "
            "np.array(x)"
        )
    # A slice keeps the offset of the map it was cut from, so addresses give the place: the
    # map starts at the page that holds `offset`.
    first = array.offset - array.offset % mmap.ALLOCATIONGRANULARITY
    start = np.frombuffer(array._mmap, np.uint8).ctypes.data  # type: ignore[attr-defined]
    file = LocalFile(os.fspath(array.filename), name)
    return Region(file, first + array.ctypes.data - start, array.shape, array.dtype, file.name)
