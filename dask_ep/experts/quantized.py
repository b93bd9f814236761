"""How do weights that are stored in 8 or 4 bits become float32 when they are read?

    number  =  (code - zero of its block) * scale of its block

A `QuantizedSource` is a Source over Sources: only the requested part of a file is decoded. Codes
are decoded by `codings`, scales and zero points by `scales`; `dask_ep.layers.formats` knows which
tensors of a checkpoint belong together.

    FP8     values [(e,) o, i] float8     scales [(e,) o / b0, i / b1]
    MXFP4   blocks [e, o, i / 32, 16]     scales [e, o, i / 32] uint8, each 2^(s-127)

Axis letters: `o` out, `i` in, `b` sides of a block, `e` experts.
"""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np

from dask_ep.arrays import memory
from dask_ep.arrays.device_streams import pinned_empty
from dask_ep.arrays.namespaces import Array, namespace
from dask_ep.arrays.unpack import (
    BFLOAT16,
    IN_CACHE,
    Rounding,
    scale_into,
    split_factor,
    subtract_zeros,
)
from dask_ep.errors import ReadError
from dask_ep.experts.codings import FLOAT8, coding
from dask_ep.experts.device_sources import DeviceSource, bytes_on, held_on_device, put
from dask_ep.experts.scales import E8M0, ScaleSource, ZeroPoints
from dask_ep.storage.gguf_files import GgufSource
from dask_ep.storage.sources import ArraySource, Source

MXFP4_GROUP = 32
"""Numbers that share a scale, in the format's specification (OCP Microscaling 1.0, section 5.2)."""


class QuantizedSource(Source):
    """A matrix, or one per expert, of codes with scales.

    Parameters
    ----------
    codes : Source ((e,) r, w), as `coding` stores them; of four axes the last two make a row
    coding : str, see `dask_ep.experts.codings.coding`
    scales : Source ((e,) ceil(rows / b0), ceil(columns / b1)), see `ScaleSource`
    block : (b0, b1)
        Which numbers share a scale. The last blocks of a row or column may be cut short.
    shape : of the numbers; without it, all that `codes` holds
    zeros : Source of float32, shaped like the scales, or a number
        Subtracted from each code before it is scaled.
    groups : Source (columns,) or, with blocks (b0, 1), (rows,)
        Index of the scale of each, if they are not in order; all -1 means in order.
    extent : Source (2,), the value of `shape` in the file
    rounded : dtype to which the products are rounded, as the format's own library does
    label : what the format is called

    Raises
    ------
    ValueError
        If there is not one scale per block, or the codes are more or fewer than `shape` says.

    Notes
    -----
    All steps are taken on some rows at a time, which stay in cache. `workflows/README.md` has what
    they cost.
    """

    PARTS = ("codes", "scales", "zeros", "groups", "extent")

    def __init__(
        self,
        codes: Source,
        coding: str,
        scales: Source,
        block: tuple[int, int],
        shape: tuple[int, ...] | None = None,
        *,
        zeros: Source | float = 0.0,
        groups: Source | None = None,
        extent: Source | None = None,
        rounded: np.dtype | None = None,
        label: str = "",
    ):
        self.codes, self.coding, self.block = codes, coding, tuple(block)
        self.zeros, self.groups, self.rounded, self.label = zeros, groups, rounded, label
        self.extent = extent
        self.shape = self._numbers_held() if shape is None else tuple(shape)
        self.dtype, self.name, self.path = np.dtype(np.float32), codes.name, codes.path
        self._check_codes()
        *experts, rows, columns = self.shape
        blocks = (*experts, -(-rows // block[0]), -(-columns // block[1]))
        if not isinstance(scales, ScaleSource):
            of = f"{block[0]} x {block[1]} of {codes.name} {self.shape}"
            scales = ScaleSource(scales, blocks, of=of)
        self.scales = scales

    def _numbers_held(self) -> tuple[int, ...]:
        """Shape of the decoded codes, padding included."""
        stored, codes = self.codes.shape, coding(self.coding)
        *experts, rows, width = stored if len(stored) < 4 else (*stored[:2], stored[2] * stored[3])
        return (*experts, rows * codes.rows, codes.width(width, self.codes.dtype))

    def _check_codes(self) -> None:
        held = self._numbers_held()
        spare = coding(self.coding).width(1, self.codes.dtype)
        if held[:-1] != self.shape[:-1] or not 0 <= held[-1] - self.shape[-1] < spare:
            raise ValueError(
                f"{self.name} must hold {self.shape} numbers, but {self.codes.shape} of "
                f"{self.codes.dtype} are {held} ({self.coding}, {self.path})"
            )

    @property
    def _parts(self) -> dict[str, Source]:
        """The sources that it consists of, by the names of its attributes."""
        found = {name: getattr(self, name) for name in self.PARTS}
        return {name: part for name, part in found.items() if isinstance(part, Source)}

    @property
    def nbytes(self) -> int:
        """Bytes as stored, scales included."""
        return sum(part.nbytes for part in self._parts.values())

    @property
    def is_bfloat16(self) -> bool:
        """Whether bfloat16 represents all of its numbers exactly, judged by dtypes."""
        return self.scales.are_powers or self.rounded == BFLOAT16

    # --- on the host ---

    def read(self, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        out = self._destination(start, stop, out)
        self._fill(start, stop, out)
        return out

    def read_bfloat16(self, start: int, stop: int) -> np.ndarray | None:
        """The same numbers in bfloat16; None unless scales and codes show that these are exact."""
        if not self.is_bfloat16:
            return None
        out = memory.empty((stop - start, *self.shape[1:]), BFLOAT16)
        return out if self._fill(start, stop, out) else None

    def _fill(self, start: int, stop: int, out: np.ndarray) -> bool:
        """Decode to float32, or to bfloat16 if that is exact; otherwise stop and return False."""
        if start == stop:
            return True
        if len(self.shape) == 2 and coding(self.coding).rows > 1 and len(out) < self.shape[0]:
            out[...] = self.read(0, self.shape[0])[start:stop]  # rows share their words
            return out.dtype == self.dtype
        self._check_extent()
        groups = self._read_groups()
        if len(self.shape) == 3:
            stored = self.codes.read(start, stop)
            scales, zeros = self.scales.read(start, stop), _read_zeros(self.zeros, start, stop)
            for e, one in enumerate(out):
                zero = zeros if isinstance(zeros, float) else zeros[e]
                if not self._decode(stored[e], scales[e], zero, groups, one, 0):
                    return False
            return True
        first, last = start // self.block[0], -(-stop // self.block[0])
        if groups is not None:
            first, last = 0, self.scales.shape[0]
        scales, zeros = self.scales.read(first, last), _read_zeros(self.zeros, first, last)
        stored = self.codes.read(start // coding(self.coding).rows, self._stored_rows(stop))
        return self._decode(stored, scales, zeros, groups, out, start - first * self.block[0])

    def _stored_rows(self, rows: int) -> int:
        return -(-rows // coding(self.coding).rows)

    def _decode(
        self,
        stored: np.ndarray,
        scales: np.ndarray,
        zeros: np.ndarray | float,
        groups: np.ndarray | None,
        out: np.ndarray,
        first: int,
    ) -> bool:
        """Decode one matrix (rows, columns); its first row is at a given offset in its block.

        As `_fill`: bfloat16 is exact unless products are tiny or huge.
        """
        if out.dtype == BFLOAT16 and split_factor(scales, BFLOAT16) is None:
            return False
        codes, rounding = coding(self.coding), None
        step = _rows_in_cache(out.shape[1], self.block[0]) // codes.rows * codes.rows or codes.rows
        width, wide = self._numbers_held()[-1], self.block[1]
        scratch = memory.empty((min(step, len(out)) * width,), np.float32)
        if self.rounded is not None:
            rounding = Rounding(self.rounded, split_factor(scales, self.rounded), scratch)
        decode, scales = codes.with_scales(scales)
        picked, wide = (None, wide) if groups is None or wide == 1 else (groups, 1)
        for start in range(0, len(out), step):
            rows = out[start : start + step]
            stored_rows = stored[start // codes.rows : self._stored_rows(start + step)]
            bands = _bands(self.block, first + start, len(rows), groups)
            alone = width == rows.shape[1] and rows.dtype == np.float32
            room = rows if alone else scratch[: len(rows) * width]
            spare = scratch.view(np.uint16)[: len(rows) * width]
            numbers = decode(stored_rows, room, spare).reshape(len(rows), width)
            numbers = numbers[:, : rows.shape[1]]
            zero = _of_rows(zeros, bands, picked)
            numbers = subtract_zeros(numbers, zero, wide, spare, few_bits=codes.table.shape[1] == 2)
            if room is rows and numbers.dtype == rows.dtype:
                numbers = rows
            scale_into(rows, numbers, _of_rows(scales, bands, picked), wide, rounding)
        return True

    # --- on a device ---

    def fill(self, start: int, stop: int, out: Array) -> None:
        """Read whole matrices to a device array ((stop - start,) rows, columns); decode there."""
        self._check_extent()
        xp, codes, groups = namespace(out), coding(self.coding), self._read_groups()
        bands = (start, stop) if len(self.shape) == 3 else (0, self.scales.shape[0])
        if len(self.shape) == 2:
            start, stop = 0, self.codes.shape[0]
        stored = bytes_on(xp, self.codes, start, stop)
        values = codes.arranged(stored.reshape(stored.shape[0], -1), xp)
        values = values.reshape(*out.shape[:-1], -1)[..., : self.shape[-1]]
        zeros = _read_zeros(self.zeros, *bands)
        if isinstance(zeros, np.ndarray):
            values = values - _widened(xp, xp.asarray(zeros), self, groups)
        elif zeros:
            values = values - np.float32(zeros)
        values = values * _widened(xp, self.scales.on_device(xp, *bands), self, groups)
        if self.rounded is not None:
            values = values.astype(self.rounded)
        out[...] = values.astype(out.dtype, copy=False)

    # --- its parts ---

    def _check_extent(self) -> None:
        if self.extent is None:
            return
        extent = tuple(self.extent.read(0, self.extent.shape[0]).tolist())
        if extent != self.shape:
            raise ReadError(
                f"{self.extent.name} must hold the shape of {self.name}, {self.shape}, but holds "
                f"{extent} ({self.extent.path})"
            )

    def _read_groups(self) -> np.ndarray | None:
        """Index of the scale of each column or row; None if they are in order."""
        if self.groups is None:
            return None
        groups = self.groups.read(0, self.groups.shape[0])
        if (groups == -1).all():
            return None
        there = self.scales.shape[-2] if self.block[1] == 1 else self.scales.shape[-1]
        if groups.min() < 0 or groups.max() >= there:
            raise ReadError(
                f"{self.groups.name} must hold indices of groups in [0, {there}), but holds "
                f"{groups.min()} to {groups.max()} ({self.groups.path})"
            )
        return groups

    def held(self, start: int, stop: int, xp: Any) -> QuantizedSource:
        """The same matrices [start, stop) in memory, as stored: codes in that of `xp`, scales on
        the host. For a matrix (rows, columns), all rows.
        """
        held, whole = copy.copy(self), len(self.shape) == 2
        if not whole:
            held.shape = (stop - start, *self.shape[1:])
        for name, part in self._parts.items():
            rows = (0, part.shape[0]) if whole or name in ("groups", "extent") else (start, stop)
            if isinstance(part, (ScaleSource, ZeroPoints)):
                setattr(held, name, part.held(*rows))
            else:
                setattr(held, name, in_memory(part, *rows, xp if name == "codes" else np))
        return held

    def fingerprint(self) -> dict[str, Any]:
        parts = {name: part.fingerprint() for name, part in self._parts.items()}
        how = {"coding": self.coding, "block": list(self.block), "rounded": str(self.rounded)}
        zeros = {} if isinstance(self.zeros, Source) else {"zeros": float(self.zeros)}
        return self._describe() | how | zeros | parts

    def __dask_tokenize__(self) -> object:
        """The token as one string: Dask would walk nested mappings of thousands of tensors."""
        return f"{type(self).__name__} {self.path} {json.dumps(self.fingerprint())}"


def _read_zeros(zeros: Source | float, start: int, stop: int) -> np.ndarray | float:
    """Whole numbers."""
    if not isinstance(zeros, Source):
        return float(zeros)
    read = zeros.read(start, stop)
    whole = read.astype(np.int16)
    if (whole != read).any() or (np.abs(whole) > 255).any():
        raise ReadError(f"{zeros.name} must hold whole numbers of 8 bits ({zeros.path})")
    return whole


def _widened(xp: Any, values: Array, source: QuantizedSource, groups: np.ndarray | None) -> Array:
    """Repeat values of blocks for each number of a source, on a device."""
    rows, columns = source.shape[-2:]
    for axis in (-2, -1):
        if groups is not None and (source.block[1] == 1) == (axis == -2):
            values = xp.take(values, xp.asarray(groups), axis=axis)
        elif source.block[axis] > 1:
            values = xp.repeat(values, min(source.block[axis], source.shape[axis]), axis=axis)
    return values[..., :rows, :columns]


def _rows_in_cache(columns: int, tall: int) -> int:
    """How many rows to decode together: whole blocks of `tall` rows, or a part of one."""
    rows = max(IN_CACHE // max(columns, 1), 1)
    return rows // tall * tall or -(-tall // -(-tall // rows))


def _bands(
    block: tuple[int, ...], top: int, count: int, groups: np.ndarray | None
) -> slice | np.ndarray:
    """The rows of blocks that some rows are in: of each row, or one for the rows of each block."""
    if groups is not None and block[1] == 1:
        return groups[top : top + count]
    if block[0] == 1:
        return slice(top, top + count)
    first, last = top // block[0], (top + count - 1) // block[0]
    if first == last or not (top % block[0] or count % block[0]):
        return slice(first, last + 1)
    return np.arange(top, top + count) // block[0]


def _of_rows(values: Any, bands: slice | np.ndarray, picked: np.ndarray | None) -> Any:
    if np.ndim(values) == 0:
        return values
    return values[bands] if picked is None else np.take(values[bands], picked, axis=1)


def float8(values: Source, scales: Source, block: tuple[int, int]) -> QuantizedSource:
    """Matrices of 8-bit floats with one scale per block.

    Parameters
    ----------
    values : Source (o, i) or (e, o, i) of a float8 dtype
    scales : Source (ceil(o / b0), ceil(i / b1)), with the same e before it, of floats
        Each multiplies its block, although published files call it ``weight_scale_inv``.
    block : (b0, b1)

    Raises
    ------
    TypeError
        If the values are not 8-bit floats.
    ValueError
        If there is not one scale per block.

    Examples
    --------
    >>> import ml_dtypes, numpy as np
    >>> from dask_ep.storage.sources import open_source
    >>> values = np.ones((2, 3), ml_dtypes.float8_e4m3fn)
    >>> scales = np.array([[10, 20]], np.float32)
    >>> float8(open_source(values), open_source(scales), (2, 2)).read(0, 2)
    array([[10., 10., 20.],
           [10., 10., 20.]], dtype=float32)
    """
    if values.dtype not in FLOAT8:
        raise TypeError(f"{values.name} must hold 8-bit floats, but has dtype {values.dtype}")
    return QuantizedSource(values, values.dtype.name, scales, block, label="FP8")


def mxfp4(blocks: Source, scales: Source) -> QuantizedSource:
    """Matrices of 4-bit floats, each 32 of a row with one power of two.

    Parameters
    ----------
    blocks : Source (e, o, i / 32, 16) of uint8
    scales : Source (e, o, i / 32) of uint8
        Exponents, 127 for 1.

    Raises
    ------
    TypeError
        If either does not hold uint8.
    ValueError
        If there is not one scale for each 16 bytes.

    Examples
    --------
    The byte 0x71 holds 0.5 (1) and 6 (7); the scale 128 doubles them.

    >>> import numpy as np
    >>> from dask_ep.storage.sources import open_source
    >>> blocks, scales = np.full((1, 1, 1, 16), 0x71, "u1"), np.full((1, 1, 1), 128, "u1")
    >>> mxfp4(open_source(blocks), open_source(scales)).read(0, 1)[0, 0, :4]
    array([ 1., 12.,  1., 12.], dtype=float32)
    """
    for source in (blocks, scales):
        if source.dtype not in (np.uint8, E8M0):
            raise TypeError(f"{source.name} must hold uint8, but has dtype {source.dtype}")
    if blocks.ndim != 4 or blocks.shape[3] != MXFP4_GROUP // 2:
        raise ValueError(
            f"{blocks.name} must be (experts, out, in / 32, 16), but has shape {blocks.shape}"
        )
    if scales.shape != blocks.shape[:3]:
        raise ValueError(
            f"{scales.name} must have one scale for each 16 bytes of {blocks.name}, so "
            f"{blocks.shape[:3]}, but has shape {scales.shape}"
        )
    return QuantizedSource(blocks, "fp4", scales, (1, MXFP4_GROUP), label="MXFP4")


def in_memory(source: Source, start: int, stop: int, xp: Any = np) -> Source:
    """Read rows as they are stored, into memory: returns a source of the same values.

    Parameters
    ----------
    source : Source
        Any; for a quantized matrix (o, i), all rows. GGUF stays in the host's memory.
    start, stop : int
        Rows of the first axis, the experts of (e, o, i).
    xp : namespace whose memory to read to; scales, which are few, stay on the host
    """
    if isinstance(source, (QuantizedSource, GgufSource)):
        return source.held(start, stop, xp)
    if xp is not np:
        return held_on_device(source, start, stop, xp)
    return ArraySource(source.read(start, stop), source.name)


def fill_on_device(source: Source, start: int, stop: int, out: Array) -> None:
    """Read rows of a source into a device array, by one copy of the stored bytes.

    Parameters
    ----------
    source : Source
        Of floats; quantized numbers and dtypes other than `out`'s are converted on the device.
    start, stop : rows; of quantized sources whole matrices
    out : (stop - start, *source.shape[1:]) device array
    """
    if isinstance(source, QuantizedSource):
        source.fill(start, stop, out)
        return
    if isinstance(source, DeviceSource):
        out[...] = source.read(start, stop).astype(out.dtype, copy=False)
        return
    host = pinned_empty(namespace(out), (stop - start, *source.shape[1:]), source.dtype)
    source.read(start, stop, out=host)
    put(out, host)
