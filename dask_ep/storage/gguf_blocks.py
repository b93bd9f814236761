"""How do the blocks of GGUF files become numbers, in few passes of NumPy?

    number  =  scale of its group * code,  of Q4_K and Q5_K less the group's minimum

Forms that most files have are decoded here with the bits of the format's own library, some times as
fast; all others by the library. Layouts are those of ``ggml-quants.c``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np

from dask_ep.arrays.packed import IN_CACHE, apply_shared

DOUBLED_E2M1 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)

LARGE = 1e30
"""Scales below it make finite numbers."""

SCALES_STEP, LIBRARY_STEP = 1 << 20, 1 << 18
"""Numbers whose scales are made at once, and that the library decodes at once: both take some
twenty calls of NumPy, which are slow for few numbers."""


class Form(NamedTuple):
    """How blocks (n, bytes) are read, given the library's classes of forms."""

    codes: Callable[[np.ndarray, np.ndarray], None]
    #: writes them to float32 (n, numbers)
    scales: Callable[[Any, np.ndarray], np.ndarray]
    #: (n, groups) float32
    minima: Callable[[Any, np.ndarray], np.ndarray] | None = None


def decode_blocks(quants: Any, label: str, blocks: np.ndarray, out: np.ndarray) -> bool:
    """Decode blocks (n, bytes) to float32 (n, numbers); tell whether all are finite."""
    form = FORMS.get(label)
    step = (LIBRARY_STEP if form is None else SCALES_STEP) // out.shape[1]
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
    """The same in steps that stay in cache; whether scales tell that all are finite."""
    changes: list[tuple[np.ufunc, np.ndarray]] = [(np.multiply, form.scales(quants, blocks))]
    if form.minima is not None:
        changes.append((np.subtract, form.minima(quants, blocks)))
    step = IN_CACHE // out.shape[1]
    for first in range(0, len(blocks), step):
        part = out[first : first + step]
        form.codes(blocks[first : first + step], part)
        for ufunc, values in changes:  # all blocks as one row
            some, wide = values[first : first + step], out.shape[1] // values.shape[1]
            apply_shared(ufunc, part.reshape(1, -1), some.reshape(1, -1), wide)
    return all(bool(np.abs(values).max() < LARGE) for _, values in changes)


def _spread(codes: np.ndarray, shifts: Sequence[int], mask: int) -> np.ndarray:
    """(n, g, w) bytes -> (n, g * shifts * w): all of a group moved by the first, by the next, ...

    Eight bytes are moved at a time, and what comes over from the next byte is masked; sixteen are
    copied at a time, as NumPy copies complex numbers.
    """
    words = np.ascontiguousarray(codes).view(np.uint64)
    moved = np.empty_like(words)
    sixteen = moved.view(np.complex128)
    n, groups, wide = sixteen.shape
    out = np.empty((n, groups, len(shifts), wide), np.complex128)
    for i, shift in enumerate(shifts):
        np.right_shift(words, np.uint64(shift), out=moved)
        np.bitwise_and(moved, np.uint64(mask * 0x0101010101010101), out=moved)
        for k in range(wide):
            out[:, :, i, k] = sixteen[..., k]
    return out.view(np.uint8).reshape(n, -1)


def _halves(blocks: np.ndarray, first: int, groups: int, wide: int) -> np.ndarray:
    """The low halves of each `wide` bytes from the first on, then the high ones."""
    codes = blocks[:, first : first + groups * wide].reshape(len(blocks), groups, wide)
    return _spread(codes, (0, 4), 15)


def _float16(blocks: np.ndarray, first: int) -> np.ndarray:
    """(n, 1) a number that each block has, as float32."""
    stored = np.ascontiguousarray(blocks[:, first : first + 2])
    return stored.view(np.float16).astype(np.float32)


def _q8_0(blocks: np.ndarray, out: np.ndarray) -> None:
    out[...] = np.ascontiguousarray(blocks[:, 2:]).view(np.int8)


def _q4_0(blocks: np.ndarray, out: np.ndarray) -> None:
    codes = _halves(blocks, 2, 1, 16)
    np.subtract(codes, np.uint8(8), out=codes)
    out[...] = codes.view(np.int8)


def _mxfp4(blocks: np.ndarray, out: np.ndarray) -> None:
    codes = _halves(blocks, 1, 1, 16).reshape(-1).view(np.uint16)
    np.take(_pairs(), codes.astype(np.intp), axis=0, out=out.reshape(-1, 2), mode="clip")


@cache
def _pairs() -> np.ndarray:
    """[16 * 256, 2] the numbers of two codes of a byte each."""
    codes = np.arange(16 * 256, dtype=np.uint16).view(np.uint8) & 15
    return DOUBLED_E2M1[codes].reshape(-1, 2)


def _q4_k(blocks: np.ndarray, out: np.ndarray) -> None:
    out[...] = _halves(blocks, 16, 4, 32)


def _q5_k(blocks: np.ndarray, out: np.ndarray) -> None:
    codes = _halves(blocks, 48, 4, 32)
    high = _spread(blocks[:, 16:48].reshape(len(blocks), 1, 32), range(8), 1)
    np.multiply(high, np.uint8(16), out=high)
    out[...] = np.bitwise_or(codes, high, out=codes)


def _q6_k(blocks: np.ndarray, out: np.ndarray) -> None:
    codes = _halves(blocks, 0, 2, 64)
    high = _spread(blocks[:, 128:192].reshape(len(blocks), 2, 32), (0, 2, 4, 6), 3)
    np.multiply(high, np.uint8(16), out=high)
    np.bitwise_or(codes, high, out=codes)
    np.subtract(codes, np.uint8(32), out=codes)
    out[...] = codes.view(np.int8)


def _plain(quants: Any, blocks: np.ndarray) -> np.ndarray:
    return _float16(blocks, 0)


def _of_mxfp4(quants: Any, blocks: np.ndarray) -> np.ndarray:
    return quants.MXFP4.e8m0_to_fp32_half(blocks[:, :1])


def _of_k(place: int, quants: Any, blocks: np.ndarray) -> np.ndarray:
    """The scales (0) or minima (1) of groups of 32, of six bits each."""
    both = quants.Q4_K.get_scale_min(np.ascontiguousarray(blocks[:, 4:16]))
    return _float16(blocks, 2 * place) * both[place].astype(np.float32)


def _of_q6_k(quants: Any, blocks: np.ndarray) -> np.ndarray:
    return _float16(blocks, 208) * np.ascontiguousarray(blocks[:, 192:208]).view(np.int8)


FORMS = {
    "Q8_0": Form(_q8_0, _plain),
    "Q4_0": Form(_q4_0, _plain),
    "MXFP4": Form(_mxfp4, _of_mxfp4),
    "Q4_K": Form(_q4_k, partial(_of_k, 0), partial(_of_k, 1)),
    "Q5_K": Form(_q5_k, partial(_of_k, 0), partial(_of_k, 1)),
    "Q6_K": Form(_q6_k, _of_q6_k),
}
