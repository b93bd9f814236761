"""How long does it take to decode a quantized matrix, compared with a copy of as many numbers?

    python workflows/decode_cost.py                     every format, a matrix of 2048 x 7168
    python workflows/decode_cost.py int4 Q4 --rows 512  formats whose name contains one of these

CPU time of one thread; the codes are in memory, and the float32 output in pages already mapped.
oneDNN scales and rounds the numbers if it is installed. The limit is the time in which NumPy
converts as many bfloat16 numbers to float32, as for experts that are not quantized, in the same
rounds. Numbers that bfloat16 holds are also decoded to that, as they are where products use 16
bits. Each figure is the best of all rounds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from math import inf

import ml_dtypes
import numpy as np
from measured import cpu_timed

from dask_ep.arrays.onednn import installed_onednn
from dask_ep.layers.formats import find_parts
from dask_ep.storage.gguf_files import GgufSource, gguf_library
from dask_ep.storage.sources import ArraySource, Source, open_source
from dask_ep.storage.views import Transposed

BFLOAT16, E4M3 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)
GGUF = ("Q8_0", "Q4_0", "Q4_K", "Q5_K", "Q6_K", "MXFP4")

Draw = Callable[..., np.ndarray]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="Parts of names of formats; default: all formats.")
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--columns", type=int, default=7168)
    parser.add_argument("--repeat", type=int, default=7)
    options = parser.parse_args()
    shape = (options.rows, options.columns)
    out = np.ones(shape, np.float32)
    plain = np.ones(shape, BFLOAT16)
    print(f"scaled by {installed_onednn() or 'NumPy'}")
    print(f"{'':32} ns per number   copy / decode   ns to bfloat16")
    for name, source in sources(shape).items():
        if options.names and not any(part in name for part in options.names):
            continue
        runs = {
            "copy": lambda: np.copyto(out, plain),
            "decode": lambda s=source: s.read(0, options.rows, out=out),
        }
        if getattr(source, "is_bfloat16", False):
            runs["narrow"] = lambda s=source: s.read_bfloat16(0, options.rows)
        best = dict.fromkeys(runs, inf)
        for _ in range(options.repeat):
            for what, run in runs.items():
                best[what] = min(best[what], cpu_timed(run))
        each = {what: 1e9 * seconds / out.size for what, seconds in best.items()}
        ratio = each["copy"] / each["decode"]
        narrow = f"{each['narrow']:17.2f}" if "narrow" in each else " " * 17
        print(
            f"{name:32} {each['decode']:13.2f}   {ratio:13.2f}{narrow}  (copy {each['copy']:.2f})"
        )


def sources(shape: tuple[int, int]) -> dict[str, Source]:
    """Return a matrix of random codes in each format."""
    return {
        **{f"FP8, {name}": float8(shape, block) for name, block in blocks_of(shape).items()},
        "compressed-tensors int4, 128": packed(shape, 4, 128),
        "compressed-tensors int4, 32": packed(shape, 4, 32),
        "compressed-tensors int4, zeros": packed(shape, 4, 128, zeros=True),
        "compressed-tensors int8": packed(shape, 8, shape[1]),
        "NVFP4": float4(shape, 16, floats((shape[0], shape[1] // 16), E4M3), NVFP4),
        "MXFP4": float4(shape, 32, powers((shape[0], shape[1] // 32)), {}),
        "GPTQ int4": in_out(shape, "gptq", np.float16),
        "AWQ int4": in_out(shape, "awq", np.float16),
        **{f"GGUF {form}": gguf_blocks(shape, form) for form in GGUF},
    }


def blocks_of(shape: tuple[int, int]) -> dict[str, tuple[int, int]]:
    return {
        "tensor": shape,
        "channel": (1, shape[1]),
        "block of 128 x 128": (128, 128),
        "powers of two for 32": (1, 32),
    }


RNG = np.random.default_rng(0)
NVFP4 = {"global_scale": np.ones(1, np.float32)}


def floats(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    return RNG.uniform(0.01, 0.02, shape).astype(dtype)


def powers(shape: tuple[int, ...]) -> np.ndarray:
    return RNG.integers(118, 124, shape).astype(np.uint8)


def words(shape: tuple[int, ...]) -> np.ndarray:
    return RNG.integers(-(2**31), 2**31, shape, np.int32)


def of_tensors(shape: tuple[int, int], tensors: dict[str, np.ndarray], **config: object) -> Source:
    named = {f"w.{name}": open_source(array, name) for name, array in tensors.items()}
    parts = find_parts("w.weight", named, config)
    assert parts is not None
    source = parts.open(shape)
    return source.stored if isinstance(source, Transposed) else source  # codes as they lie


def float8(shape: tuple[int, int], block: tuple[int, int]) -> Source:
    codes = RNG.standard_normal(shape, np.float32).astype(E4M3)
    grid = (-(-shape[0] // block[0]), -(-shape[1] // block[1]))
    scales = powers(grid) if block == (1, 32) else floats(grid, np.dtype(np.float32))
    return of_tensors(
        shape, {"weight": codes, "weight_scale": scales}, weight_block_size=list(block)
    )


def packed(shape: tuple[int, int], bits: int, group: int, zeros: bool = False) -> Source:
    tensors = {
        "weight_packed": words((shape[0], shape[1] * bits // 32)),
        "weight_scale": floats((shape[0], shape[1] // group), BFLOAT16),
    }
    if zeros:
        tensors["weight_zero_point"] = words((shape[0] * bits // 32, shape[1] // group))
    return of_tensors(shape, tensors)


def float4(
    shape: tuple[int, int], group: int, scales: np.ndarray, more: dict[str, np.ndarray]
) -> Source:
    codes = RNG.integers(0, 256, (shape[0], shape[1] // 2), np.uint8)
    named = {f"weight_{name}": array for name, array in more.items()}
    return of_tensors(shape, {"weight_packed": codes, "weight_scale": scales, **named})


def in_out(shape: tuple[int, int], method: str, dtype: type) -> Source:
    """GPTQ packs eight numbers of a column into a word, AWQ eight of a row."""
    rows, columns = shape
    lying = (rows // 8, columns) if method == "gptq" else (rows, columns // 8)
    tensors = {
        "qweight": words(lying),
        "qzeros": words((rows // 128, columns // 8)),
        "scales": floats((rows // 128, columns), np.dtype(dtype)),
    }
    return of_tensors(shape[::-1], tensors, quant_method=method, group_size=128, bits=4)


def gguf_blocks(shape: tuple[int, int], form: str) -> Source:
    """Return random blocks with small scales."""
    decoder = getattr(gguf_library().quants, form)
    blocks = RNG.integers(0, 256, (shape[0] * shape[1] // decoder.block_size, decoder.type_size))
    blocks = blocks.astype(np.uint8)
    if form == "MXFP4":
        blocks[:, 0] = powers((len(blocks),))
    else:
        first = 208 if form == "Q6_K" else 0  # offsets of float16 values
        count = 2 if form in ("Q4_K", "Q5_K") else 1
        scales = floats((len(blocks), count), np.dtype(np.float16)).view(np.uint8)
        blocks[:, first : first + 2 * count] = scales
    return GgufSource(ArraySource(blocks.reshape(shape[0], -1), form), form, shape)


if __name__ == "__main__":
    main()
