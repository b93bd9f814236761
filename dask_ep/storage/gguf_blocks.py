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
from dask_ep.arrays.unpack import IN_CACHE, apply_shared, scale_into

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
        part, some = out[first : first + step], codes[first : first + step]
        scales, *minima = (values[first : first + step] for values in shared)
        scale_into(part, some, scales, out.shape[1] // scales.shape[1])
        for values in minima:
            wide = out.shape[1] // values.shape[1]
            apply_shared(np.subtract, part.reshape(1, -1), values.reshape(1, -1), wide)
    return all(bool(np.abs(values).max() < LARGE) for values in shared)


def _spread(codes: np.ndarray, wide: int, shifts: Sequence[int], mask: int) -> np.ndarray:
    """(n, g * w) bytes -> (n, g * shifts * w): w bytes moved right by the first shift, the next, ..

    Eight bytes are moved at a time, and what comes over from their neighbours is masked; a group is
    copied in one go.
    """
    n, width = codes.shape
    words = empty((n, 1), _together(width))
    words[...] = codes.view(words.dtype)
    bits, moved = words.view(np.uint64), empty((n, width // 8), np.uint64)
    out = empty((n, width // wide, len(shifts)), _together(wide))
    for i, shift in enumerate(shifts):
        move = np.left_shift if shift < 0 else np.right_shift
        source = move(bits, np.uint64(abs(shift)), out=moved) if shift else bits
        out[:, :, i] = source.view(out.dtype)
    spread = out.reshape(-1).view(np.uint64)
    np.bitwise_and(spread, np.uint64(mask * 0x0101010101010101), out=spread)
    return spread.view(np.uint8).reshape(n, -1)


def _together(wide: int) -> np.dtype:
    """A dtype of so many bytes, which are copied in one go."""
    return np.dtype(np.complex128 if wide == 16 else f"V{wide}")


def _halves(blocks: np.ndarray, first: int, groups: int, wide: int) -> np.ndarray:
    """Write the low halves of each `wide` bytes, then the high ones."""
    return _spread(blocks[:, first : first + groups * wide], wide, (0, 4), 15)


def _float16(blocks: np.ndarray, first: int, count: int = 1) -> np.ndarray:
    """Return (n, count) numbers of each block as float32."""
    return blocks[:, first : first + 2 * count].view(np.float16).astype(np.float32)


def _q8_0(blocks: np.ndarray) -> np.ndarray:
    return blocks[:, 2:].view(np.int8)


def _q4_0(blocks: np.ndarray) -> np.ndarray:
    codes = _halves(blocks, 2, 1, 16)
    return np.subtract(codes, np.uint8(8), out=codes).view(np.int8)


def _mxfp4(blocks: np.ndarray) -> np.ndarray:
    """Look up two bytes at a time: the numbers of their low halves, then those of the high ones."""
    codes, out = np.empty((len(blocks), 1), _together(16)), empty((len(blocks), 2), _together(16))
    codes[...] = blocks[:, 1:].view(codes.dtype)
    numbers = np.take(_doubled(), codes.view(np.uint16).astype(np.intp), mode="clip")
    for half in (0, 1):
        pairs = (numbers >> np.uint32(16 * half)).astype(np.uint16)
        out[:, half] = pairs.view(out.dtype)[:, 0]
    return out.view(np.int8)


@cache
def _doubled() -> np.ndarray:
    """[65536] the four numbers of two bytes, of one byte each."""
    codes = np.arange(1 << 16, dtype=np.uint16).view(np.uint8).reshape(-1, 2)
    return DOUBLED_E2M1[np.hstack([codes & 15, codes >> 4])].view(np.uint32)[:, 0]


def _q4_k(blocks: np.ndarray) -> np.ndarray:
    return _halves(blocks, 16, 4, 32)


def _q5_k(blocks: np.ndarray) -> np.ndarray:
    codes = _halves(blocks, 48, 4, 32)
    high = _spread(blocks[:, 16:48], 32, range(-4, 4), 16)
    return np.bitwise_or(codes, high, out=codes)


def _q6_k(blocks: np.ndarray) -> np.ndarray:
    codes = _halves(blocks, 0, 2, 64)
    high = _spread(blocks[:, 128:192], 32, (-4, -2, 0, 2), 48)
    np.bitwise_or(codes, high, out=codes)
    return np.subtract(codes, np.uint8(32), out=codes).view(np.int8)


def _plain(quants: Any, blocks: np.ndarray) -> tuple[np.ndarray]:
    return (_float16(blocks, 0),)


def _of_mxfp4(quants: Any, blocks: np.ndarray) -> tuple[np.ndarray]:
    return (quants.MXFP4.e8m0_to_fp32_half(np.arange(256, dtype=np.uint8))[blocks[:, :1]],)


def _of_q4_k(quants: Any, blocks: np.ndarray) -> tuple[np.ndarray, ...]:
    """Of groups of 32, six bits each: of the first four in a byte, of the others in two parts."""
    scales, minima, both = blocks[:, 4:16].view(np.uint32).T
    bits = np.empty((2, len(blocks), 2), np.uint32)
    for i, first, last in ((0, scales, both), (1, minima, both >> np.uint32(4))):
        bits[i, :, 0] = first & np.uint32(0x3F3F3F3F)
        top = first >> np.uint32(2) & np.uint32(0x30303030)
        bits[i, :, 1] = last & np.uint32(0x0F0F0F0F) | top
    return tuple(bits.view(np.uint8) * _float16(blocks, 0, 2).T.repeat(8).reshape(2, -1, 8))


def _of_q6_k(quants: Any, blocks: np.ndarray) -> tuple[np.ndarray]:
    return (_float16(blocks, 208).repeat(16).reshape(-1, 16) * blocks[:, 192:208].view(np.int8),)


FORMS = {
    "Q8_0": Form(_q8_0, _plain),
    "Q4_0": Form(_q4_0, _plain),
    "MXFP4": Form(_mxfp4, _of_mxfp4),
    "Q4_K": Form(_q4_k, _of_q4_k),
    "Q5_K": Form(_q5_k, _of_q4_k),
    "Q6_K": Form(_q6_k, _of_q6_k),
}
