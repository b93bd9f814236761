"""How do weights that are stored in 8 or 4 bits become float32 when they are read?

Axis letters: `o` out, `i` in, `b` sides of a block, `e` experts.

    FP8     values [(e,) o, i] float8    scales [(e,) o / b0, i / b1]    weight = value * scale
    MXFP4   blocks [e, o, i / 32, 16]    scales [e, o, i / 32] uint8     weight = value * 2^(s-127)
            two values in a byte, the low half first

Both are Sources over Sources: the file keeps its few bits, and only the rows that are asked for
are decoded.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any
from uuid import uuid4

import ml_dtypes
import numpy as np

from dask_ep.arrays.lanes import fill, pinned_empty, upload
from dask_ep.arrays.namespaces import Array, namespace
from dask_ep.storage.files import ReadError
from dask_ep.storage.sources import ArraySource, Source

FLOAT8 = tuple(
    np.dtype(t) for t in (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.float8_e4m3)
)

MXFP4_GROUP = 32
"""Numbers that share a scale, in the format's specification (OCP Microscaling 1.0, section 5.2)."""

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
E2M1 = np.concatenate([E2M1, -E2M1])
"""Values of the 16 four-bit numbers: a sign bit and three more."""

DECODE_STEP = 1 << 14
"""Codes that are looked up at once: their indices, 8 bytes each, stay in cache."""


def pairs_of(values: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Make a table of two float32 numbers each, as the 8 bytes that they are in memory."""
    return np.stack([values[first], values[second]], axis=1).view(np.uint64)[:, 0]


MXFP4_PAIRS = pairs_of(E2M1, np.arange(256) & 15, np.arange(256) >> 4)
"""[256] both values of a byte."""


POWERS = np.ldexp(np.float32(1), np.arange(255, dtype=np.int32) - 127)
"""[255] what the exponent of a scale stands for; 255 would be NaN, and is refused."""


@cache
def float8_pairs(dtype: np.dtype) -> np.ndarray:
    """[65536] the values of two bytes that lie side by side, read as one number of 16 bits."""
    values = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)
    codes = np.arange(1 << 16, dtype=np.uint16).view(np.uint8)
    return pairs_of(values, codes[0::2], codes[1::2])


def look_up_codes(table: np.ndarray, codes: np.ndarray, out: np.ndarray) -> None:
    """Write ``table[codes]`` to `out`; all are one-dimensional.

    Notes
    -----
    In steps, because NumPy widens all indices to 8 bytes first. With two values a look-up, a matrix
    of 15 million FP8 numbers takes 15 ms on one core, and 171 ms by ``astype`` and the scales.
    """
    indices = np.empty(min(DECODE_STEP, len(codes)), np.intp)
    for start in range(0, len(codes), DECODE_STEP):
        part = indices[: len(codes) - start]
        part[...] = codes[start : start + DECODE_STEP]
        np.take(table, part, out=out[start : start + DECODE_STEP], mode="clip")


class Float8Source(Source):
    """Matrices of 8-bit floats with one scale per block.

    Parameters
    ----------
    values : Source (o, i) or (e, o, i) of a float8 dtype
    scales : Source (ceil(o / b0), ceil(i / b1)), with the same e before it, of floats
        Each multiplies its block, although published files call it ``weight_scale_inv``.
    block : (b0, b1)
        The last blocks of a row or column may be cut short.

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
    >>> Float8Source(open_source(values), open_source(scales), (2, 2)).read(0, 2)
    array([[10., 10., 20.],
           [10., 10., 20.]], dtype=float32)
    """

    def __init__(self, values: Source, scales: Source, block: tuple[int, int]):
        if values.dtype not in FLOAT8:
            raise TypeError(f"{values.name} must hold 8-bit floats, but has dtype {values.dtype}")
        rows, columns = values.shape[-2:]
        expected = (*values.shape[:-2], -(-rows // block[0]), -(-columns // block[1]))
        if scales.shape != expected:
            raise ValueError(
                f"{scales.name} must have one scale per block of {block[0]} x {block[1]} of "
                f"{values.name} {values.shape}, so {expected}, but has shape {scales.shape}"
            )
        self.values, self.scales, self.block = values, scales, (block[0], block[1])
        self.shape, self.dtype, self.name = values.shape, np.dtype(np.float32), values.name
        self.path = values.path

    @property
    def nbytes(self) -> int:
        """Bytes as stored, scales included."""
        return self.values.nbytes + self.scales.nbytes

    def read(self, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        out = self._destination(start, stop, out)
        if start == stop:
            return out
        if len(self.shape) == 3:
            scales = self._read_scales(start, stop)
            first_row = 0
        else:
            scales = self._read_scales(start // self.block[0], -(-stop // self.block[0]))
            first_row = start % self.block[0]
        _decode_float8(self.values.read(start, stop).reshape(-1), out.reshape(-1))
        wide = np.repeat(scales, self.block[1], axis=-1)[..., : self.shape[-1]]
        for band in range(scales.shape[-2]):
            rows = slice(
                max(band * self.block[0] - first_row, 0), (band + 1) * self.block[0] - first_row
            )
            out[..., rows, :] *= wide[..., band : band + 1, :]
        return out

    def fill(self, start: int, stop: int, out: Array) -> None:
        """Read whole matrices to a device array ((stop - start,) o, i), and decode them there."""
        xp = namespace(out)
        if len(self.shape) == 3:
            scales = self._read_scales(start, stop)
        else:
            scales = self._read_scales(0, self.scales.shape[0])
        codes = _codes_on(xp, self.values, start, stop)
        table = np.arange(256, dtype=np.uint8).view(self.values.dtype).astype(np.float32)
        decode_float8(codes, xp.asarray(scales), xp.asarray(table), self.block, out)

    def _read_scales(self, start: int, stop: int) -> np.ndarray:
        scales = self.scales.read(start, stop).astype(np.float32)
        if not np.isfinite(scales).all():
            raise ReadError(f"{self.scales.name} holds a scale that is NaN or infinite")
        return scales

    def fingerprint(self) -> dict[str, Any]:
        return _both(self, self.values, self.scales) | {"block": list(self.block)}

    def __dask_tokenize__(self) -> object:
        return _as_text(self)


class Mxfp4Source(Source):
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
    >>> Mxfp4Source(open_source(blocks), open_source(scales)).read(0, 1)[0, 0, :4]
    array([ 1., 12.,  1., 12.], dtype=float32)
    """

    def __init__(self, blocks: Source, scales: Source):
        for source in (blocks, scales):
            if source.dtype not in (np.uint8, ml_dtypes.float8_e8m0fnu):
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
        self.blocks, self.scales = blocks, scales
        self.shape = (*blocks.shape[:2], blocks.shape[2] * MXFP4_GROUP)
        self.dtype, self.name, self.path = np.dtype(np.float32), blocks.name, blocks.path

    @property
    def nbytes(self) -> int:
        """Bytes as stored, scales included."""
        return self.blocks.nbytes + self.scales.nbytes

    def read(self, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        out = self._destination(start, stop, out)
        packed = self.blocks.read(start, stop).reshape(-1)
        look_up_codes(MXFP4_PAIRS, packed.view(np.uint8), out.reshape(-1).view(np.uint64))
        exponents = self._read_exponents(start, stop)
        groups = out.reshape(*exponents.shape, MXFP4_GROUP)
        groups *= np.ldexp(np.float32(1), exponents.astype(np.int32) - 127)[..., None]
        return out

    def fill(self, start: int, stop: int, out: Array) -> None:
        """Read matrices to a device array (stop - start, o, i), and decode them there."""
        xp = namespace(out)
        exponents = self._read_exponents(start, stop)
        codes = _codes_on(xp, self.blocks, start, stop)
        tables = (xp.asarray(MXFP4_PAIRS.view(np.float32).reshape(256, 2)), xp.asarray(POWERS))
        decode_mxfp4(codes, xp.asarray(exponents), *tables, out)

    def _read_exponents(self, start: int, stop: int) -> np.ndarray:
        exponents = self.scales.read(start, stop).view(np.uint8)
        if (exponents == 255).any():
            raise ReadError(f"{self.scales.name} holds the scale 255, which stands for NaN")
        return exponents

    def fingerprint(self) -> dict[str, Any]:
        return _both(self, self.blocks, self.scales)

    def __dask_tokenize__(self) -> object:
        return _as_text(self)


def _decode_float8(codes: np.ndarray, out: np.ndarray) -> None:
    """Two bytes at a time, and the last by itself if they are odd in number."""
    even = len(codes) // 2 * 2
    table = float8_pairs(codes.dtype)
    look_up_codes(table, codes[:even].view(np.uint16), out[:even].view(np.uint64))
    out[even:] = codes[even:]


# --- on a device ---------------------------------------------------------------------------------


def fill_on_device(source: Source, start: int, stop: int, out: Array) -> None:
    """Read rows of a source into a device array, in one copy of the bytes as they are stored.

    Parameters
    ----------
    source : Source
        Of floats; what is quantized or of another dtype than `out` is converted on the device.
    start, stop : rows; whole matrices of what is quantized
    out : (stop - start, *source.shape[1:]) device array
    """
    if isinstance(source, (Float8Source, Mxfp4Source)):
        source.fill(start, stop, out)
        return
    if isinstance(source, DeviceSource):
        out[...] = source.read(start, stop).astype(out.dtype, copy=False)
        return
    host = pinned_empty(namespace(out), (stop - start, *source.shape[1:]), source.dtype)
    source.read(start, stop, out=host)
    put(out, host)


class DeviceSource(Source):
    """Numbers that are on a device already; float8, which devices' arrays do not know, as uint8."""

    def __init__(self, array: Array, name: str, dtype: np.dtype | None = None):
        self.shape, self.name, self.array = array.shape, name, array
        self.dtype = array.dtype if dtype is None else dtype
        self._uuid = uuid4().hex  # the content is not brought to the host to be hashed

    def read(self, start: int, stop: int, out: np.ndarray | None = None) -> Array:
        return self.array[start:stop]

    def part(self, e: int) -> DeviceSource:
        """The array at one place of the first axis, by itself; the same one whenever asked."""
        part = DeviceSource(self.array[e], self.name, self.dtype)
        part._uuid = f"{self._uuid}-{e}"
        return part

    def fingerprint(self) -> dict[str, Any]:
        return self._describe() | {"uuid": self._uuid}


def put(out: Array, host: np.ndarray) -> None:
    """Copy a pinned array into a device array of its shape, converted there if need be."""
    if out.dtype == host.dtype and out.flags.c_contiguous:
        fill(out, host)
    else:
        out[...] = upload(namespace(out), host).astype(out.dtype, copy=False)


def decode_float8(
    codes: Array, scales: Array, table: Array, block: tuple[int, int], out: Array
) -> None:
    """Write ``table[codes] * scale of the block`` to `out`, on whatever device they are.

    codes (..., o, i) uint8, scales (..., ceil(o / b0), ceil(i / b1)), table (256,) float32.
    """
    xp, (rows, columns) = namespace(out), codes.shape[-2:]
    wide = xp.repeat(xp.repeat(scales, block[0], axis=-2), block[1], axis=-1)
    values = xp.take(table, codes.reshape(-1)).reshape(codes.shape)
    values *= wide[..., :rows, :columns]
    out[...] = values.reshape(out.shape).astype(out.dtype, copy=False)


def decode_mxfp4(codes: Array, exponents: Array, pairs: Array, powers: Array, out: Array) -> None:
    """Write the values of MXFP4 to `out`, on whatever device they are.

    codes (..., i / 32, 16) and exponents (..., i / 32) uint8, pairs (256, 2) and powers (255,)
    float32.
    """
    xp = namespace(out)
    values = xp.take(pairs, codes.reshape(-1), axis=0).reshape(*exponents.shape, MXFP4_GROUP)
    values *= xp.take(powers, exponents.reshape(-1)).reshape(*exponents.shape, 1)
    out[...] = values.reshape(out.shape).astype(out.dtype, copy=False)


def _codes_on(xp: Any, source: Source, start: int, stop: int) -> Array:
    """Numbers of 8 bits as they are stored, as uint8 on a device, which knows no float8."""
    if isinstance(source, DeviceSource):
        return source.read(start, stop)
    host = pinned_empty(xp, (stop - start, *source.shape[1:]), source.dtype)
    source.read(start, stop, out=host)
    return upload(xp, host.view(np.uint8))


def _both(whole: Source, data: Source, scales: Source) -> dict[str, Any]:
    return {
        "name": whole.name,
        "shape": list(whole.shape),
        "dtype": whole.dtype.name,
        "data": data.fingerprint(),
        "scales": scales.fingerprint(),
    }


def _as_text(source: Source) -> str:
    """A token in one piece: Dask would take nested mappings of thousands of tensors apart."""
    return f"{type(source).__name__} {source.path} {json.dumps(source.fingerprint())}"


def stored_in_8_bits(source: Source) -> bool:
    """Whether a source holds 8-bit floats, which mean nothing without their scales."""
    return source.dtype in FLOAT8


def in_memory(source: Source, start: int, stop: int, xp: Any = np) -> Source:
    """Read rows as they are stored: a source of the same values whose few bits are in memory.

    Parameters
    ----------
    source : Source
        Any; of `Float8Source` matrices (o, i), all rows.
    start, stop : int
        Rows of the first axis, the experts of (e, o, i).
    xp : in whose memory; scales, which are few, stay on the host
    """
    if isinstance(source, Mxfp4Source):
        return Mxfp4Source(
            in_memory(source.blocks, start, stop, xp), in_memory(source.scales, start, stop)
        )
    if isinstance(source, Float8Source):
        values = in_memory(source.values, start, stop, xp)
        if len(source.shape) == 2:
            start, stop = 0, source.scales.shape[0]
        return Float8Source(values, in_memory(source.scales, start, stop), source.block)
    if xp is not np:
        return _held_on_device(source, start, stop, xp)
    return ArraySource(source.read(start, stop), source.name)


def _held_on_device(source: Source, start: int, stop: int, xp: Any) -> DeviceSource:
    if isinstance(source, DeviceSource):
        return DeviceSource(source.array[start:stop], source.name, source.dtype)
    host = pinned_empty(xp, (stop - start, *source.shape[1:]), source.dtype)
    source.read(start, stop, out=host)
    few_bits = host.dtype.itemsize == 1
    array = xp.empty(host.shape, dtype=np.uint8 if few_bits else host.dtype)
    fill(array, host.view(array.dtype))
    return DeviceSource(array, source.name, source.dtype)
