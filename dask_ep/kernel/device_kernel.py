"""How does a device take a chunk through many experts at once?

    slots, sorted by expert ──one gather──> rows (m, d) ──together──> answers (m, d_out)
                                                                            │
    out (n, d_out) <──one pass: each row sums its answers, weighted─────────┘

Every launch costs time on a device, so the steps are few: experts of one kind compute together, one
matrix product for each and one pass for the activation of all of them. The host must know only
where each expert's rows end: one copy of E/R + 3 integers.

Matrices of bfloat16 are multiplied in 16 bits, with sums in float32 (`operands`). For bfloat16
tokens that is exact. An expert's intermediate results, which are float32, are written by the kernel
that computes them as three bfloat16 numbers each, which add up to them, as `bfloat16` does on the
host; their products are accumulated in place, so that only the output is rounded. float32 tokens
are split by the kernel that gathers them. With ``precision="bfloat16"`` numbers are rounded
instead, and experts are held in 16 bits if tokens have 16, whatever their dtype was. Other
matrices, including float16, are multiplied in float32.

A run of E experts with n parts takes n products for each (n for all, if they have equal numbers of
rows), one pass to gather, one to activate and split, two to add up; and, for sums as exact as
float32's, a product for each `gemms.TERMS` numbers of the largest part.

Largest differences of a layer's output from float64, relative to its largest value: over two
hundred random layers 2e-7 on average, as in float32; if sums are rounded towards zero, as by tensor
cores, up to 1.5 times that. With ``"bfloat16"``, over the thirty-three checkpoints of `tests` and
without the output's own rounding, median 1.6e-3, largest 3.2e-3. Numbers below 2**-133, the
smallest bfloat16, are lost; infinity and NaN in a row give the same as in float32, but infinite
weights give NaN.

So a gated expert needs 5/3 times as many products in 16 bits as in float32, and 3 times as many for
float32 tokens. By the vendors' figures, 990 and 67 TFLOP/s in bfloat16 and float32 (H100), 312 and
19.5 (A100), 165 and 83 (RTX 4090), that is 9, 10 and 1.2 times as fast as products in float32; for
float32 tokens 5, 5 and 0.7 times, with half the memory for experts. In return, sums are read and
written again for each `TERMS` numbers, which takes up to as long as their product. Of memory
traffic, a slot of bfloat16 takes 2 d to gather, 14 f to activate, and 4 d to add up. None of this
is measured. To be tried on a card: larger `TERMS`, runs of experts so short (`TOGETHER_BYTES`) that
their intermediate results stay in its L2 cache, and answers in 16 bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from dask_ep.arrays.checks import computing_dtype
from dask_ep.arrays.gemms import gemms
from dask_ep.arrays.namespaces import Array, namespace, to_host
from dask_ep.kernel import cuda_kernels
from dask_ep.kernel.bfloat16 import PARTS
from dask_ep.kernel.operands import Factors, write

TOGETHER_BYTES = 2 << 30
"""Bytes of the widest rows of experts that compute together: bounds the memory of their
intermediate results. An expert with more rows computes alone."""

PADDED_ROWS = (64, 1024)
"""Experts are padded to the rows of the busiest one, so that one call multiplies for all, if it has
at most this many rows (a product of fewer takes as long), or if padding is at most `PADDED_PART` of
the rows and the mean is at most this many (with more, a product hides its call)."""

PADDED_PART = 1.25

Bounds = Sequence[tuple[int, int]]
"""First and last + 1 row of each expert."""


class Slots(NamedTuple):
    """The slots of a chunk, sorted by local expert, on a device."""

    k: int
    #: slots per row
    order: Array
    #: [n * k] slot numbers (row * k + slot), local ones first, by local expert, then by number
    bounds: list[tuple[int, int]]
    #: segment of each local expert, in `order`
    in_order: bool
    #: whether slots came sorted, one per row
    bad: int
    #: how many hold an invalid index
    nan: int
    #: how many others have a NaN weight
    keys: Array = None
    #: [n * k] sort keys: the local expert, or a larger number; None if there are no slots
    ends: Array = None
    #: where the slots of each key end, on the device; None if there are no slots


INDEX_BYTES = 48
"""Bytes of a slot while slots are sorted by expert and back: keys, orders and positions."""


def slot_bytes(taken: int, made: int, given: int) -> int:
    """Bytes that a slot takes on a device while experts compute, at most: those of the expert's
    input row, of its intermediate results and of its output.
    """
    return taken + made + given + INDEX_BYTES


def row_bytes(d: int, d_out: int, made: int, k: int, dtype: np.dtype, taken: Factors) -> int:
    """Bytes that a token row takes on a device in the kernel, at most: its slots, the row and its
    output, and copies of those two.

    `made` is the width of an expert's intermediate results, which exist a second time as factors
    of 16-bit products; `taken` are the factors for rows of `dtype`.
    """
    sums = computing_dtype(dtype).itemsize
    again = max(PARTS.values()) * taken.dtype.itemsize if taken.dtype.itemsize == 2 else 0
    slot = slot_bytes(d * taken.nbytes, made * (sums + again), d_out * sums)
    return 2 * (d + d_out) * dtype.itemsize + k * slot


def sort_slots(
    routing: Array, weights: Array | None, num_local: int, rank: int, world_size: int
) -> Slots:
    """Sort the slots of a chunk by local expert; one copy of integers to the host.

    Parameters
    ----------
    routing : (n,) or (n, k) integers
    weights : (n * k,) of the computing dtype of sums, or None
    num_local, rank, world_size : E/R, r and R

    Notes
    -----
    The sort is stable. Slots of other ranks come last, and invalid ones after them: so one copy of
    the ends of all segments replaces two more reductions.
    """
    xp = namespace(routing)
    k = 1 if routing.ndim == 1 else routing.shape[1]
    flat = xp.ascontiguousarray(routing).reshape(-1)
    if flat.size == 0:
        order = xp.empty(0, dtype=np.int64)
        return Slots(k, order, [(0, 0)] * num_local, in_order=True, bad=0, nan=0)
    keys = xp.empty(flat.shape, dtype=np.int16 if num_local < 2**15 - 3 else np.int64)
    _sort_keys(xp, flat, weights, keys, rank * num_local, num_local, num_local * world_size)
    order = xp.argsort(keys, kind="stable")
    kinds = xp.arange(num_local + 3, dtype=keys.dtype)
    facts = [xp.searchsorted(keys[order], kinds, side="right")]
    if k == 1:
        facts.append((keys[1:] >= keys[:-1]).all())
    ends = to_host(*facts)
    in_order = k == 1 and bool(ends.pop())
    ours, (others, bad, _) = ends[:num_local], ends[num_local:]
    bounds = list(zip([0, *ours[:-1]], ours, strict=True))
    return Slots(k, order, bounds, in_order, bad - others, flat.size - bad, keys, facts[0])


def through_experts(
    tokens: Array,
    slots: Slots,
    weights: Array | None,
    experts: Sequence[Any],
    sums: np.dtype,
    dtype: np.dtype,
) -> Array:
    """Return for each row the sum of its experts' outputs.

    Parameters
    ----------
    tokens : (n, d)
    slots : from `sort_slots`, all valid
    weights : (n * k,) of dtype `sums`, or None
    experts : Expert per segment
    sums : dtype in which answers are weighted and added, in the order of the experts
    dtype : of the result

    Returns
    -------
    (n, d_out)
    """
    xp, tokens = namespace(tokens), namespace(tokens).ascontiguousarray(tokens)
    rows = _padded_rows(slots, experts, sums.itemsize)
    if rows is not None and gemms(xp) is not None:
        return _through_padded(tokens, slots, weights, experts, sums, dtype, rows)
    m, d_out = slots.bounds[-1][1], experts[0].d_out
    out = xp.empty((len(tokens), d_out), dtype=dtype)
    answers = out[:m] if slots.in_order else xp.empty((m, d_out), dtype=sums)
    late = not slots.in_order and not any(expert.apply_router_weight_on_input for expert in experts)
    for some, bounds in _runs(experts, slots.bounds, sums.itemsize):
        part, one = slice(bounds[0][0], bounds[-1][1]), some[0]
        own = part if slots.in_order else slots.order[part]
        before = weights if one.apply_router_weight_on_input else None
        after = None if weights is None or late or before is not None else weights[own]
        if slots.in_order:
            rows = _enter(one, tokens[part], None, 1, None if before is None else before[part])
        else:
            rows = _enter(one, tokens, own, slots.k, before)
        here = [(start - part.start, stop - part.start) for start, stop in bounds]
        to = answers[part]
        given = to if to.dtype == sums else xp.empty(to.shape, dtype=sums)
        type(one).together(some, rows, here, given)
        if after is not None or given is not to:
            _weigh(given, None, 1, after, to)
    if slots.in_order:
        out[m:] = 0
    else:
        at = xp.arange(slots.order.size, dtype=np.int64)
        _combine(answers, slots, at, slots.order, weights if late else None, out)
    return out


def _padded_rows(slots: Slots, experts: Sequence[Any], itemsize: int) -> int | None:
    """Number of rows of every expert if padded to the same; None if they are not."""
    counts = [stop - start for start, stop in slots.bounds]
    most, m, (few, many) = max(counts), sum(counts), PADDED_ROWS
    padded = most * len(experts)
    if slots.in_order or not m or len({expert.batch_key for expert in experts}) > 1:
        return None
    if padded * experts[0].widest * itemsize > TOGETHER_BYTES:
        return None
    worth = most <= few or (m <= many * len(experts) and padded <= PADDED_PART * m)
    return most if worth else None


def _through_padded(
    tokens: Array,
    slots: Slots,
    weights: Array | None,
    experts: Sequence[Any],
    sums: np.dtype,
    dtype: np.dtype,
    rows: int,
) -> Array:
    """The same, with `rows` rows for each expert, of which the last ones may be padding."""
    xp, E = namespace(tokens), len(experts)
    starts = xp.concatenate([xp.zeros(1, dtype=np.int64), slots.ends[: E - 1].astype(np.int64)])
    last = slots.order.size - 1
    wanted = xp.minimum(starts[:, None] + xp.arange(rows, dtype=np.int64), last).reshape(-1)
    order = slots.order[wanted]
    early = weights if experts[0].apply_router_weight_on_input else None
    given = _enter(experts[0], tokens, order, slots.k, early)
    answers = xp.empty((E * rows, experts[0].d_out), dtype=sums)
    bounds = [(e * rows, (e + 1) * rows) for e in range(E)]
    type(experts[0]).together(experts, given, bounds, answers)
    shifts = xp.arange(E, dtype=np.int64) * rows - starts
    shifts = xp.concatenate([shifts, xp.full(3, E * rows, dtype=np.int64)])
    at = xp.arange(last + 1, dtype=np.int64) + shifts[slots.keys[slots.order]]
    out = xp.empty((len(tokens), experts[0].d_out), dtype=dtype)
    _combine(answers, slots, at, order, weights if early is None else None, out)
    return out


def _enter(expert: Any, tokens: Array, order: Array | None, k: int, weights: Array | None) -> Array:
    """The rows of slots, or rows as they come, as the input of an expert."""
    taken = expert.factors(tokens.dtype if weights is None else weights.dtype)
    return as_factors(tokens, taken, order, k, weights)


def as_factors(
    rows: Array,
    taken: Factors,
    order: Array | None = None,
    k: int = 1,
    weights: Array | None = None,
) -> Array:
    """Rows, or those of slots, weighted or not, as factors of a product: in at most one pass."""
    if weights is None and (rows.ndim == 3 or taken == Factors(rows.dtype)):
        return rows if order is None else gather(rows, order, k)
    out = taken.empty(len(rows if order is None else order), rows.shape[1], rows)
    _weigh(rows, order, k, weights, out)
    return out


def products(
    rows: Array, matrices: Sequence[Array], bounds: Bounds, out: Array, exact: bool = False
) -> None:
    """``out[start:stop] = rows[start:stop] @ matrix`` of each expert.

    Rows, or their parts, and matrices have one dtype; `out` has the same, or float32 if they have
    16 bits, as is required for parts and for sums as `exact` as those of float32.

    Notes
    -----
    With cuBLAS one product per expert and part, on several streams; one call for all experts if
    they have equal numbers of rows (`gemms.Gemms`). Without cuBLAS, or if it does not multiply
    bfloat16, one product per expert in the dtype of `out`.
    """
    xp = namespace(rows)
    multiply = gemms(xp)
    if multiply is not None and multiply.multiplies(rows.dtype):
        multiply(rows, matrices, bounds, out, exact)
        return
    for matrix, (start, stop) in zip(matrices, bounds, strict=True):
        one = rows[..., start:stop, :].astype(out.dtype, copy=False)
        one = one if one.ndim == 2 else one.sum(axis=0)  # exact, in any order
        xp.matmul(one, matrix.astype(out.dtype, copy=False), out=out[start:stop])


def gather(rows: Array, order: Array, k: int = 1) -> Array:
    """``rows[order // k]``: rows (n, d) and order (m,) give (m, d)."""
    xp = namespace(rows)
    out = xp.empty((len(order), rows.shape[1]), dtype=rows.dtype)
    if (kernels := cuda_kernels.kernels(xp)) is not None:
        kernels.gather(xp.ascontiguousarray(rows), order, k, out)
    else:
        xp.take(rows, order // k, axis=0, out=out)
    return out


def add_rows(total: Array, rows: Array, answers: Array) -> None:
    """``total[rows] += answers``; the rows are all different."""
    xp = namespace(total)
    if (kernels := cuda_kernels.kernels(xp)) is not None:
        kernels.add_rows(total, rows, xp.ascontiguousarray(answers))
    else:
        total[rows] = xp.take(total, rows, axis=0) + answers.astype(total.dtype, copy=False)


# --- steps, each as one kernel or as array functions --------------------------------------------


def _runs(
    experts: Sequence[Any], bounds: Bounds, itemsize: int
) -> Iterator[tuple[list[Any], list[tuple[int, int]]]]:
    """Neighbours that compute together: of one kind, with rows, and within `TOGETHER_BYTES`."""
    busy = [(e, b) for e, b in zip(experts, bounds, strict=True) if b[1] > b[0]]
    for _, of_one_kind in groupby(busy, key=lambda one: one[0].batch_key):
        run: list[Any] = []
        for expert, bound in of_one_kind:
            rows = bound[1] - (run[0][1][0] if run else bound[0])
            if run and rows * expert.widest * itemsize > TOGETHER_BYTES:
                yield [e for e, _ in run], [b for _, b in run]
                run = []
            run.append((expert, bound))
        yield [e for e, _ in run], [b for _, b in run]


def _sort_keys(
    xp: Any,
    routing: Array,
    weights: Array | None,
    keys: Array,
    first: int,
    num_local: int,
    num_experts: int,
) -> None:
    """Sort keys of slots: the local experts, then other ranks, bad indices, and NaN weights."""
    if (kernels := cuda_kernels.kernels(xp)) is not None:
        kernels.sort_keys(routing, weights, keys, first, num_local, num_experts)
        return
    if routing.dtype == np.uint64:  # which would wrap around to -1
        routing = xp.minimum(routing, np.uint64(2**63 - 1))
    expert = routing.astype(np.int64)
    local = expert - first
    found = xp.where((local < 0) | (local >= num_local), num_local, local)
    found = xp.where((expert < -1) | (expert >= num_experts), num_local + 1, found)
    if weights is not None:
        found = xp.where(xp.isnan(weights), num_local + 2, found)
    keys[...] = found


def _weigh(rows: Array, order: Array | None, k: int, weights: Array | None, out: Array) -> None:
    """Write rows of the slots `order`, or of slot r for row r, times the weights of the slots if
    given, to `out`: of another dtype, in parts, or `rows` itself.
    """
    xp = namespace(rows)
    if (kernels := cuda_kernels.kernels(xp)) is not None:
        kernels.weigh(rows, order, k, weights, out)
        return
    if order is not None:
        rows = xp.take(rows, order // k, axis=0)
        weights = None if weights is None else weights[order]
    values = rows.astype(computing_dtype(rows.dtype), copy=False)
    write(values if weights is None else values * weights[:, None], out)


def _combine(
    answers: Array,
    slots: Slots,
    at: Array,
    order: Array,
    weights: Array | None,
    out: Array,
) -> None:
    """``out[i]`` = the sum over row i's slots of weight * answer, in the order of the experts.

    `at` (n * k,) is the position of each slot's answer, m or more if it has none; `order` (m,) is
    the slot of each answer.
    """
    xp, n, m = namespace(out), len(out), len(answers)
    positions = xp.empty(n * slots.k, dtype=np.int64)
    positions[slots.order] = at
    positions = positions.reshape(n, slots.k)
    if (kernels := cuda_kernels.kernels(xp)) is not None:
        kernels.combine(answers, positions, order, weights, out)
        return
    total = xp.zeros(out.shape, dtype=answers.dtype)
    if m:
        positions = xp.sort(positions, axis=1)
        for nth in range(slots.k):
            here = xp.minimum(positions[:, nth], m - 1)
            answer = xp.take(answers, here, axis=0)
            if weights is not None:
                answer = answer * weights[order[here]][:, None]
            total += xp.where((positions[:, nth] < m)[:, None], answer, answer.dtype.type(0))
    out[...] = total.astype(out.dtype, copy=False)
