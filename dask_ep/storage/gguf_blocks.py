"""How do the blocks of GGUF files become numbers, in few passes of NumPy?

    number  =  scale of its group * code,  for Q4_K and Q5_K minus the group's minimum

The common forms are decoded here, to the same bits as by the format's own library but several times
as fast; all others by the library. Layouts are those of ``ggml-quants.c``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from dask_ep.arrays.memory import empty
from dask_ep.arrays.unpack import IN_CACHE, apply_shared

DOUBLED_E2M1 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)

LARGE = 1e30
"""Scales below this give finite numbers."""

STEP, LIBRARY_STEP = 1 << 20, 1 << 18
"""Numbers that are decoded together, here and by the library: both take some twenty calls of NumPy,
which are slow for few numbers. Ours are so many that their memory is recycled."""


class Form(NamedTuple):
    """How blocks (n, bytes) are read, given the library's classes of forms."""

    codes: Callable[[np.ndarray], np.ndarray]
    #: (n, numbers) whole numbers of a byte
    scales: Callable[[Any, np.ndarray], tuple[np.ndarray, ...]]
    #: scales, and minima if there are some: (n, groups) float32


def decode_blocks(quants: Any, label: str, blocks: np.ndarray, out: np.ndarray) -> bool:
    """Decode blocks (n, bytes) to float32 (n, numbers); return whether all are finite."""
    form = FORMS.get(label)
    step = (LIBRARY_STEP if form is None else STEP) // out.shape[1]
    finite = True
    for first in range(0, len(blocks), step):
        some, part = blocks[first : first + step], out[first : first + step]
        with np.errstate(all="ignore"):
            if form is None:
                part[...] = getattr(quants, label).dequantize_blocks(some)
            elif _decode(form, quants, some, part):
                continue
        finite = finite and bool(np.isfinite(part).all())
    return finite


def _decode(form: Form, quants: Any, blocks: np.ndarray, out: np.ndarray) -> bool:
    """Do this in steps that stay in cache; return whether scales show that all are finite."""
    codes, shared = form.codes(blocks), form.scales(quants, blocks)
    step = IN_CACHE // out.shape[1]
    for first in range(0, len(blocks), step):
        part = out[first : first + step]
        part[...] = codes[first : first + step]
        for ufunc, values in zip((np.multiply, np.subtract), shared, strict=False):
            some, wide = values[first : first + step], out.shape[1] // values.shape[1]
            apply_shared(ufunc, part.reshape(1, -1), some.reshape(1, -1), wide)  # as one row
    return all(bool(np.abs(values).max() < LARGE) for values in shared)


def _spread(codes: np.ndarray, shifts: Sequence[int], mask: int) -> np.ndarray:
    """(n, g, w) bytes -> (n, g * shifts * w): a group moved right by the first shift, the next, ..

    Eight bytes are moved at a time, and what comes over from their neighbours is masked; a group is
    copied in one go.
    """
    n, groups, wide = codes.shape
    group = np.dtype(np.complex128 if wide == 16 else f"V{wide}")
    words, moved = (empty((n, groups, wide // 8), np.uint64) for _ in range(2))
    words.view(np.uint8)[...] = codes
    out = empty((n, groups * len(shifts) * wide), np.uint8)
    places = out.view(group).reshape(n, groups, len(shifts))
    for i, shift in enumerate(shifts):
        move = np.left_shift if shift < 0 else np.right_shift
        source = move(words, np.uint64(abs(shift)), out=moved) if shift else words
        np.bitwise_and(source, np.uint64(mask * 0x0101010101010101), out=moved)
        places[:, :, i] = moved.view(group)[..., 0]
    return out


def _halves(blocks: np.ndarray, first: int, groups: int, wide: int) -> np.ndarray:
    """Write the low halves of each `wide` bytes, then the high ones."""
    codes = blocks[:, first : first + groups * wide].reshape(len(blocks), groups, wide)
    return _spread(codes, (0, 4), 15)


def _float16(blocks: np.ndarray, first: int, count: int = 1) -> np.ndarray:
    """Return (n, count) numbers of each block as float32."""
    return blocks[:, first : first + 2 * count].view(np.float16).astype(np.float32)


def _q8_0(blocks: np.ndarray) -> np.ndarray:
    codes = empty((len(blocks), 32), np.int8)
    codes[...] = blocks[:, 2:].view(np.int8)
    return codes


def _q4_0(blocks: np.ndarray) -> np.ndarray:
    codes = _halves(blocks, 2, 1, 16)
    return np.subtract(codes, np.uint8(8), out=codes).view(np.int8)


def _mxfp4(blocks: np.ndarray) -> np.ndarray:
    """Two codes at a time."""
    pairs = _halves(blocks, 1, 1, 16).view(np.uint16)
    return np.take(_doubled(), pairs.astype(np.intp), mode="clip").view(np.int8)


@cache
def _doubled() -> np.ndarray:
    """[16 * 256] the numbers of two codes of one byte each."""
    codes = np.arange(16 * 256, dtype=np.uint16).view(np.uint8) & 15
    return DOUBLED_E2M1[codes].view(np.uint16)


def _q4_k(blocks: np.ndarray) -> np.ndarray:
    return _halves(blocks, 16, 4, 32)


def _q5_k(blocks: np.ndarray) -> np.ndarray:
    codes = _halves(blocks, 48, 4, 32)
    high = _spread(blocks[:, 16:48].reshape(len(blocks), 1, 32), range(-4, 4), 16)
    return np.bitwise_or(codes, high, out=codes)


def _q6_k(blocks: np.ndarray) -> np.ndarray:
    codes = _halves(blocks, 0, 2, 64)
    high = _spread(blocks[:, 128:192].reshape(len(blocks), 2, 32), (-4, -2, 0, 2), 48)
    np.bitwise_or(codes, high, out=codes)
    return np.subtract(codes, np.uint8(32), out=codes).view(np.int8)


def _plain(quants: Any, blocks: np.ndarray) -> tuple[np.ndarray]:
    return (_float16(blocks, 0),)


def _of_mxfp4(quants: Any, blocks: np.ndarray) -> tuple[np.ndarray]:
    return (quants.MXFP4.e8m0_to_fp32_half(blocks[:, :1]),)


def _of_q4_k(quants: Any, blocks: np.ndarray) -> tuple[np.ndarray, ...]:
    """Of groups of 32, six bits each: of the first four in a byte, of the others in two parts."""
    scales, minima, both = np.ascontiguousarray(blocks[:, 4:16]).view(np.uint32).T
    bits = np.empty((len(blocks), 4), np.uint32)
    for i, first, last in ((0, scales, both), (2, minima, both >> np.uint32(4))):
        bits[:, i] = first & np.uint32(0x3F3F3F3F)
        top = first >> np.uint32(2) & np.uint32(0x30303030)
        bits[:, i + 1] = last & np.uint32(0x0F0F0F0F) | top
    shared = bits.view(np.uint8).reshape(-1, 2, 8) * _float16(blocks, 0, 2)[:, :, None]
    return shared[:, 0], shared[:, 1]


def _of_q6_k(quants: Any, blocks: np.ndarray) -> tuple[np.ndarray]:
    return (_float16(blocks, 208) * np.ascontiguousarray(blocks[:, 192:208]).view(np.int8),)


FORMS = {
    "Q8_0": Form(_q8_0, _plain),
    "Q4_0": Form(_q4_0, _plain),
    "MXFP4": Form(_mxfp4, _of_mxfp4),
    "Q4_K": Form(_q4_k, _of_q4_k),
    "Q5_K": Form(_q5_k, _of_q4_k),
    "Q6_K": Form(_q6_k, _of_q6_k),
}
