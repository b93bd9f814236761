"""Hypothesis strategies: any layer, any routing, any chunking."""

from __future__ import annotations

from dataclasses import dataclass, replace

import dask.array as da
import ml_dtypes
import numpy as np
from hypothesis import strategies as st

TOKEN_DTYPES = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16]
ROUTING_DTYPES = [np.int8, np.int16, np.int32, np.int64]


@dataclass(frozen=True)
class Case:
    """One layer's input."""

    tokens: np.ndarray
    routing: np.ndarray
    topk_weights: np.ndarray | None
    W: np.ndarray
    world_size: int
    chunks: tuple[int, ...]

    @property
    def num_experts(self) -> int:
        return len(self.W)

    def local_Ws(self, rank: int) -> np.ndarray:
        each = self.num_experts // self.world_size
        return self.W[rank * each : (rank + 1) * each]

    def dask(self) -> tuple[da.Array, da.Array, da.Array | None]:
        def chunked(array: np.ndarray | None) -> da.Array | None:
            return (
                None
                if array is None
                else da.from_array(array, chunks=(self.chunks, -1)[: array.ndim])
            )

        return tuple(map(chunked, (self.tokens, self.routing, self.topk_weights)))

    def with_(self, **changes: object) -> Case:
        return replace(self, **changes)

    @property
    def tolerance(self) -> float:
        """Largest error, relative to the largest value: a few roundings of the tokens' dtype."""
        digits = {np.dtype(np.float64): 1e-12, np.dtype(np.float32): 2e-5}
        digits |= {np.dtype(np.float16): 4e-3, np.dtype(ml_dtypes.bfloat16): 3e-2}
        return digits[self.tokens.dtype]


@st.composite
def row_chunks(draw: st.DrawFn, n: int) -> tuple[int, ...]:
    """Any chunking of n rows, empty chunks included."""
    cuts = sorted(draw(st.lists(st.integers(0, n), max_size=4)))
    return tuple(np.diff([0, *cuts, n]).tolist())


@st.composite
def cases(
    draw: st.DrawFn,
    *,
    dtypes: list = TOKEN_DTYPES,
    max_k: int = 4,
    repeats: bool = True,
    even: bool = True,
) -> Case:
    """Any shape, skew, dtype, k, E and R; -1 slots, and rows with one expert twice if `repeats`."""
    world_size = draw(st.integers(1, 4))
    num_experts = draw(st.integers(1, 4)) * world_size if even else draw(st.integers(1, 9))
    n, d, d_out = draw(st.integers(0, 40)), draw(st.integers(1, 9)), draw(st.integers(1, 9))
    k = draw(st.sampled_from([None, *range(1, max_k + 1)]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    skew = draw(st.sampled_from([0.0, 1.0, 5.0]))
    p = (1.0 + np.arange(num_experts)) ** -skew
    shape = (n,) if k is None else (n, k)
    if repeats or k is None or k > num_experts:
        routing = rng.choice(num_experts, size=shape, p=p / p.sum())
    else:
        routing = np.argsort(-(np.log(p) + rng.gumbel(size=(n, num_experts))), axis=1)[:, :k]
    routing = np.where(rng.random(shape) < draw(st.sampled_from([0.0, 0.3, 1.0])), -1, routing)
    weights = draw(st.sampled_from([None, np.float32, np.float64]))
    dtype = draw(st.sampled_from(dtypes))
    return Case(
        tokens=rng.standard_normal((n, d)).astype(dtype),
        routing=routing.astype(draw(st.sampled_from(ROUTING_DTYPES))),
        topk_weights=None if weights is None else rng.random(shape).astype(weights),
        W=rng.standard_normal((num_experts, d, d_out)).astype(dtype),
        world_size=world_size,
        chunks=draw(row_chunks(n)),
    )
