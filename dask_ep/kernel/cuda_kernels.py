"""Which steps does a GPU take in one pass over the rows?

CUDA kernels for what would be several passes as array functions: activation times up, gathering
with weights, splitting into bfloat16, summing the outputs of experts and ranks. All of them are
bound by memory, so each row is read once and written once; sums and activations are float32 for
numbers of 16 bits and for float32, float64 for float64, and round where NumPy rounds (no fused
multiply-add). But CuPy compiles with float32 flushed to zero below 1.2e-38, except where parts are
split off.

The source is plain C++ except for the qualifiers of a kernel, and needs no header: half and
bfloat16 are converted to float32 by hand. One kernel per dtype is compiled (by NVRTC, through
`cupy.RawKernel`) when it is first used. For namespaces that compile nothing `kernels` returns None,
and the same steps run as array functions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from dask_ep.arrays.namespaces import Array

THREADS = 256
"""Threads of a block; blocks are mapped to rows, threads to columns."""

MOST_BLOCKS = 65535

NUMBERS = r"""
struct half_t { unsigned short bits; };
struct bfloat_t { unsigned short bits; };
union bits_t { unsigned int u; float f; };

__device__ inline float wide(float x) { return x; }
__device__ inline double wide(double x) { return x; }
__device__ inline float wide(bfloat_t x) { bits_t b; b.u = (unsigned int)x.bits << 16; return b.f; }
__device__ inline void narrow(float x, float &to) { to = x; }
__device__ inline void narrow(double x, double &to) { to = x; }
__device__ inline void narrow(float x, bfloat_t &to) {
    bits_t b; b.f = x;
    if ((b.u & 0x7fffffffu) > 0x7f800000u) to.bits = (b.u >> 16) | 0x40;  // NaN stays NaN
    else to.bits = (b.u + 0x7fffu + ((b.u >> 16) & 1u)) >> 16;            // ties to even
}
#if defined(__CUDACC__) && !defined(__HIP__)
__device__ inline float minus(float x, float y) {  // the compiler's own takes 1e-39 for 0
    float f; asm("sub.rn.f32 %0, %1, %2;" : "=f"(f) : "f"(x), "f"(y)); return f;
}
__device__ inline float wide(half_t x) {
    float f; asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(x.bits)); return f;
}
__device__ inline void narrow(float x, half_t &to) {
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(x));
}
#else
__device__ inline float minus(float x, float y) { return x - y; }
union half_bits_t { unsigned short u; _Float16 f; };
__device__ inline float wide(half_t x) { half_bits_t b; b.u = x.bits; return (float)b.f; }
__device__ inline void narrow(float x, half_t &to) {
    half_bits_t b; b.f = (_Float16)x; to.bits = b.u;
}
#endif

"""

KERNELS = r"""
// Writes x as PARTS numbers, `apart` from each other: one that is rounded, or several bfloat16 of
// which it is the sum, each with the next 8 bits. Infinity and NaN are the first part; the others
// are 0 then.
__device__ inline void write(W x, T *to, long long apart) {
#if PARTS == 1
    narrow(x, *to);
#else
    for (int part = 0; part < PARTS; ++part) {
        bits_t all, high;
        all.f = x;
        unsigned int magnitude = all.u & 0x7fffffffu;
        high.u = all.u & 0xffff0000u;
        if (magnitude > 0x7f800000u) high.u |= 0x400000u;  // NaN stays NaN
        to[part * apart].bits = high.u >> 16;
        x = magnitude < 0x7f800000u ? minus(x, high.f) : 0.0f;
    }
#endif
}

__device__ inline W silu(W x, W alpha) { return x / (W(1) + exp(-alpha * x)); }
__device__ inline W gelu(W x, W) { return x * (W(0.5) * erfc(x * W(-0.70710678118654752))); }
__device__ inline W gelu_tanh(W x, W) {
    W inner = (x * x * W(0.044715) + W(1)) * x * W(0.79788456080286536);
    return x / (W(1) + exp(W(-2) * inner));
}
__device__ inline W relu(W x, W) { return x < W(0) ? W(0) : x; }  // NaN stays NaN
__device__ inline W relu2(W x, W) { W y = x < W(0) ? W(0) : x; return y * y; }

#define EACH(i, n) \
    (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < (n); \
     i += gridDim.x * (long long)blockDim.x)
#define EACH_ROW(r, n) (long long r = blockIdx.x; r < (n); r += gridDim.x)
#define EACH_COLUMN(c, n) (long long c = threadIdx.x; c < (n); c += blockDim.x)

// Where a slot goes when slots are sorted by expert: 0 ... num_local - 1 to the experts here, then
// those of other ranks and of none, then indices that do not exist, then weights that are NaN.
extern "C" __global__ void sort_keys(
    const I *routing, const W *weights, K *keys, long long n,
    long long first, long long num_local, long long num_experts)
{
    for EACH(i, n) {
        long long expert = (long long)routing[i];
        bool bad = expert < -1 || expert >= num_experts || (routing[i] > I(0) && expert < 0);
        long long local = expert - first;
        long long key = local < 0 || local >= num_local ? num_local : local;
        if (bad) key = num_local + 1;
        if (WEIGHTED && weights[i] != weights[i]) key = num_local + 2;
        keys[i] = (K)key;
    }
}

// Rows as bytes: out[r] = rows[order[r] / k].
extern "C" __global__ void gather(
    const V *rows, const long long *order, V *out, long long m, long long k, long long width)
{
    for EACH_ROW(r, m) {
        const V *from = rows + order[r] / k * width;
        for EACH_COLUMN(c, width) out[r * width + c] = from[c];
    }
}

// out[r] = rows[slot / k] * weights[slot], of slot = order[r]; of r itself if it is not ORDERED;
// without the weights if it is not WEIGHTED. Also where nothing but the dtype changes.
extern "C" __global__ void weigh(
    const S *rows, const long long *order, const W *weights, T *out,
    long long m, long long k, long long width)
{
    for EACH_ROW(r, m) {
        long long slot = ORDERED ? order[r] : r;
        const S *from = rows + slot / k * width;
        for EACH_COLUMN(c, width) {
            W value = wide(from[c]);
            if (WEIGHTED) value *= weights[slot];
            write(value, out + r * width + c, m * width);
        }
    }
}

// out[r, c] = ACTIVATION(gate) * (up + up_offset) of gate = hidden[r, c], up = hidden[r, f + c];
// rows of out are `step` apart, and it may be hidden itself.
extern "C" __global__ void gate(
    W *hidden, T *out, long long m, long long f, long long step, W limit, W alpha, W up_offset)
{
    for EACH_ROW(r, m) {
        W *row = hidden + r * 2 * f;
        for EACH_COLUMN(c, f) {
            W gate = row[c], up = row[f + c];
            if (LIMITED) {
                gate = gate > limit ? limit : gate;
                up = up > limit ? limit : (up < -limit ? -limit : up);
            }
            write(ACTIVATION(gate, alpha) * (up + up_offset), out + r * step + c, m * step);
        }
    }
}

extern "C" __global__ void activate(W *hidden, T *out, long long n)
{
    for EACH(i, n) write(ACTIVATION(hidden[i], W(1)), out + i, n);
}

// Each row's k numbers in ascending order.
extern "C" __global__ void sort_rows(long long *numbers, long long n, long long k)
{
    for EACH(r, n) {
        long long *row = numbers + r * k;
        for (long long i = 1; i < k; ++i) {
            long long number = row[i], j = i;
            for (; j > 0 && row[j - 1] > number; --j) row[j] = row[j - 1];
            row[j] = number;
        }
    }
}

// out[r] = sum of answers[p] * weights[order[p]] over the k positions p of row r that are below m.
extern "C" __global__ void combine(
    const W *answers, const long long *positions, const long long *order, const W *weights, T *out,
    long long n, long long k, long long m, long long width)
{
    for EACH_ROW(r, n) {
        const long long *of_row = positions + r * k;
        for EACH_COLUMN(c, width) {
            W total = 0;
            for (long long j = 0; j < k && of_row[j] < m; ++j) {
                W answer = answers[of_row[j] * width + c];
                if (WEIGHTED) answer *= weights[order[of_row[j]]];
                total += answer;
            }
            narrow(total, out[r * width + c]);
        }
    }
}

// total[rows[r]] += answers[r]; the rows are all different.
extern "C" __global__ void add_rows(
    W *total, const long long *rows, const T *answers, long long m, long long width)
{
    for EACH_ROW(r, m) {
        W *to = total + rows[r] * width;
        for EACH_COLUMN(c, width) to[c] += wide(answers[r * width + c]);
    }
}
"""

TYPES = {
    "float16": "half_t",
    "bfloat16": "bfloat_t",
    "float32": "float",
    "float64": "double",
    "int8": "signed char",
    "int16": "short",
    "int32": "int",
    "int64": "long long",
    "uint8": "unsigned char",
    "uint16": "unsigned short",
    "uint32": "unsigned int",
    "uint64": "unsigned long long",
}
"""C++ types of dtypes in the source."""

VECTORS = {
    16: "struct alignas(16) V { unsigned int part[4]; };",
    8: "typedef unsigned long long V;",
    4: "typedef unsigned int V;",
    2: "typedef unsigned short V;",
    1: "typedef unsigned char V;",
}
"""Types by the bytes that a thread moves at once; the widest that divides a row is used."""


def source_of(
    T: Any = np.float32,
    *,
    source: Any = None,
    index: Any = np.int64,
    key: Any = np.int16,
    vector: int = 1,
    activation: str = "silu",
    weighted: bool = False,
    ordered: bool = False,
    limited: bool = False,
    parts: int = 1,
) -> str:
    """Return the source with its types and switches filled in.

    Rows are read as `source`, or `T` if that is None, and written as `T` in `parts` parts;
    intermediate results have the dtype of sums.

    Examples
    --------
    >>> "typedef double T;" in source_of(np.float64)
    True
    """
    wide = "double" if np.dtype(T) == np.float64 else "float"
    return "\n".join(
        [
            NUMBERS,
            f"typedef {TYPES[np.dtype(T).name]} T;",
            f"typedef {TYPES[np.dtype(T if source is None else source).name]} S;",
            f"typedef {wide} W;",
            f"typedef {TYPES[np.dtype(index).name]} I;",
            f"typedef {TYPES[np.dtype(key).name]} K;",
            VECTORS[vector],
            f"#define ACTIVATION {activation}",
            f"#define WEIGHTED {int(weighted)}",
            f"#define ORDERED {int(ordered)}",
            f"#define LIMITED {int(limited)}",
            f"#define PARTS {parts}",
            KERNELS,
        ]
    )


class FusedKernels:
    """The kernels for arrays of one namespace, which must be contiguous and on one device.

    Launched on the compute stream. `weights` are float32, or float64 if the rows are; `order` and
    positions are int64. An `out` (p, m, width) of bfloat16 receives the parts of the values
    written, see `operands.Factors`.
    """

    def __init__(self, compile_: Callable[..., Callable]):
        self._compile = cache(compile_)

    def sort_keys(
        self,
        routing: Array,
        weights: Array | None,
        keys: Array,
        first: int,
        num_local: int,
        num_experts: int,
    ) -> None:
        """Write the sort keys of the slots of `routing` to `keys`; both are one-dimensional."""
        kernel = self._compile(
            "sort_keys",
            T=np.float32 if weights is None else weights.dtype,
            index=routing.dtype,
            key=keys.dtype,
            weighted=weights is not None,
        )
        weights = keys if weights is None else weights  # any pointer: it is not read
        sizes = map(np.int64, (keys.size, first, num_local, num_experts))
        kernel(_blocks(keys.size), (THREADS,), (routing, weights, keys, *sizes))

    def gather(self, rows: Array, order: Array, k: int, out: Array) -> None:
        """``out[r] = rows[order[r] // k]``; out (m, d) of the dtype of rows."""
        row_bytes = rows.shape[1] * rows.dtype.itemsize
        places = (rows.data.ptr, out.data.ptr)
        vector = next(v for v in VECTORS if row_bytes % v == 0 and not any(p % v for p in places))
        sizes = map(np.int64, (len(out), k, row_bytes // vector))
        kernel = self._compile("gather", vector=vector)
        _launch_rows(kernel, len(out), (rows, order, out, *sizes))

    def weigh(
        self, rows: Array, order: Array | None, k: int, weights: Array | None, out: Array
    ) -> None:
        """``out[r] = rows[s // k] * weights[s]`` of ``s = order[r]``, or r; `out` may be `rows`."""
        m, parts = out.shape[-2], _parts(out)
        switches = {"ordered": order is not None, "weighted": weights is not None, "parts": parts}
        kernel = self._compile("weigh", T=out.dtype, source=rows.dtype, **switches)
        sizes = map(np.int64, (m, k, rows.shape[1]))
        order, weights = (out if a is None else a for a in (order, weights))  # it is not read
        _launch_rows(kernel, m, (rows, order, weights, out, *sizes))

    def gate(
        self,
        hidden: Array,
        out: Array,
        activation: str,
        limit: float | None,
        alpha: float,
        up_offset: float,
    ) -> None:
        """``out[:, :f] = activation(gate) * (up + up_offset)`` of hidden (m, 2 f) in `wide`.

        `out` is (m, f), or `hidden` itself.
        """
        m, both = hidden.shape
        switches = {"activation": activation, "limited": limit is not None, "parts": _parts(out)}
        kernel = self._compile("gate", T=out.dtype, **switches)
        numbers = map(hidden.dtype.type, (0.0 if limit is None else limit, alpha, up_offset))
        sizes = map(np.int64, (m, both // 2, out.shape[-1]))
        _launch_rows(kernel, m, (hidden, out, *sizes, *numbers))

    def activate(self, hidden: Array, out: Array, activation: str) -> None:
        """``out = activation(hidden)``, which is `wide`; `out` may be `hidden`."""
        kernel = self._compile("activate", T=out.dtype, activation=activation, parts=_parts(out))
        kernel(_blocks(hidden.size), (THREADS,), (hidden, out, np.int64(hidden.size)))

    def combine(
        self,
        answers: Array,
        positions: Array,
        order: Array,
        weights: Array | None,
        out: Array,
    ) -> None:
        """Sum wide answers (m, d_out) into out (n, d_out), in ascending order of positions (n, k).

        Positions of m or more are ignored; `positions` is sorted row by row.
        """
        n, k = positions.shape
        sort = self._compile("sort_rows")
        sort(_blocks(n), (THREADS,), (positions, np.int64(n), np.int64(k)))
        kernel = self._compile("combine", T=out.dtype, weighted=weights is not None)
        weights = positions if weights is None else weights  # any pointer: it is not read
        sizes = map(np.int64, (n, k, len(answers), out.shape[1]))
        _launch_rows(kernel, n, (answers, positions, order, weights, out, *sizes))

    def add_rows(self, total: Array, rows: Array, answers: Array) -> None:
        """``total[rows[r]] += answers[r]``; the rows are all different."""
        kernel = self._compile("add_rows", T=answers.dtype)
        sizes = map(np.int64, answers.shape)
        _launch_rows(kernel, len(answers), (total, rows, answers, *sizes))


_fused: dict[str, FusedKernels] = {}


def kernels(xp: Any) -> FusedKernels | None:
    """Return the kernels of a namespace, or None if it cannot compile any."""
    if not hasattr(xp, "RawKernel"):
        return None
    if xp.__name__ not in _fused:

        def compile_(name: str, **switches: Any) -> Callable:
            return xp.RawKernel(source_of(**switches), name, options=("--fmad=false",))

        _fused[xp.__name__] = FusedKernels(compile_)
    return _fused[xp.__name__]


def _parts(out: Array) -> int:
    """The number of parts in which rows are written to `out`, (m, width) or (p, m, width)."""
    return 1 if out.ndim == 2 else len(out)


def _blocks(n: int) -> tuple[int]:
    return (max(1, min(-(-n // THREADS), MOST_BLOCKS)),)


def _launch_rows(kernel: Callable, rows: int, arguments: tuple[Any, ...]) -> None:
    if rows:
        kernel((min(rows, MOST_BLOCKS),), (THREADS,), arguments)
