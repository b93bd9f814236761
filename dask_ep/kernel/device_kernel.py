"""How does a device take a chunk through many experts at once?

    slots, sorted by expert ──one gather──> rows (m, d) ──together──> answers (m, d_out)
                                                                            │
    out (n, d_out) <──one pass: each row sums its answers, weighted─────────┘

A device pays for every step that it is told to take, so the steps are few: experts of one kind
compute together, one matrix product for each and one pass for the activation of all of them.
What the host must know is where each expert's rows end: one copy of E/R + 3 integers.

Of numbers of 16 bits products take 16 bits and give float32: so do the first products of experts,
their activations, answers and sums. What is rounded is what goes into a second product, and, once,
the output. Largest differences of a layer's output from float64, of its largest value, over the
thirty-three checkpoints of `tests`, in bfloat16 (the output's own rounding, 1.3e-3 to 3.7e-3, left
aside): median 1.6e-3, largest 3.2e-3. With 16 bits between all steps it is 3.3e-3 and 7.0e-3; with
float32 up to the second product alone, 1.8e-3 and 3.2e-3; with float32 answers alone, 2.6e-3 and
7.0e-3. What is left is the second product's: its rows as a sum of two bfloat16 would take that away
for a third more products, and ``float32`` rows with ``--tf32`` for about twice the time of all.

float32 costs memory traffic: 4 f + 2 d bytes a slot more to read, besides the 6 f + 6 d that are
gathered, activated and summed, and as many more that products write while they compute. By the
figures of an H100's makers, 3.35 TB/s and seven tenths of 990 TFLOP/s, the products' share of all
time is then at most 0.91, not 0.94, for d = 4096, f = 14336; 0.85, not 0.89, for d = 7168,
f = 2048; and 0.66, not 0.73, for d = 2048, f = 768. None of that is measured. To be tried on a card
where it shows: runs of experts so short (`TOGETHER_BYTES`) that what they make stays in its L2
cache, and answers in 16 bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from dask_ep.arrays.gemms import gemms
from dask_ep.arrays.namespaces import Array, namespace, to_host
from dask_ep.kernel import cuda_kernels

TOGETHER_BYTES = 2 << 30
"""Bytes of the widest rows of experts that compute together: it bounds the memory of what they make
on the way. An expert with more rows computes by itself."""

PADDED_ROWS = (64, 1024)
"""Experts get as many rows each as the busiest of them, so that one call multiplies for all, if
these are at most so many (a product of fewer takes as long), or if it makes no more than
`PADDED_PART` of the rows and the mean is at most so many (with more, a product hides its call)."""

PADDED_PART = 1.25

Bounds = Sequence[tuple[int, int]]
"""First and last + 1 row of each expert."""


class Slots(NamedTuple):
    """The slots of a chunk, sorted by local expert, on a device."""

    k: int
    #: slots per row
    order: Array
    #: [n * k] slot numbers (row * k + slot), ours first, by local expert, then by number
    bounds: list[tuple[int, int]]
    #: of each local expert, in `order`
    in_order: bool
    #: whether slots came sorted, one a row
    bad: int
    #: how many hold no index of an expert
    nan: int
    #: how many others have a weight that is NaN
    keys: Array = None
    #: [n * k] what slots were sorted by: the local expert, or more; None if there are no slots
    ends: Array = None
    #: where the slots of each key end, on the device; None if there are no slots


INDEX_BYTES = 48
"""Of a slot while it is sorted by expert and found again: keys, orders and positions."""


def slot_bytes(d: int, d_out: int, made: int, itemsize: int) -> int:
    """Bytes that a slot takes on a device while experts compute, at most.

    What the expert gets, makes and gives; `made` is the width of what it makes. Of 16 bits, what it
    makes and gives is float32, and what it makes is there once more as the next product takes it.

    Examples
    --------
    >>> slot_bytes(d=4096, d_out=4096, made=28672, itemsize=2)
    196656
    """
    sums = max(itemsize, 4)
    again = itemsize if itemsize < sums else 0
    return d * itemsize + made * (sums + again) + d_out * sums + INDEX_BYTES


def row_bytes(d: int, d_out: int, made: int, k: int, itemsize: int) -> int:
    """Bytes that a token row takes on a device in the kernel, at most: its slots, itself and its
    output, and copies of those two.
    """
    return 2 * (d + d_out) * itemsize + k * slot_bytes(d, d_out, made, itemsize)


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
    The sort is stable. Slots that nobody here serves come last, and bad ones behind those: so the
    ends of all segments tell, in one copy, what would be two more reductions.
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
    """Return for each row the sum of what the experts make of it.

    Parameters
    ----------
    tokens : (n, d)
    slots : from `sort_slots`, with nothing bad
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
        part = slice(bounds[0][0], bounds[-1][1])
        order = None if slots.in_order else slots.order[part]
        on_input = some[0].apply_router_weight_on_input
        before = weights if on_input else None
        after = None if on_input or late else weights
        if order is None:
            rows = tokens[part]
            if before is not None:
                rows = _weigh(rows, None, 1, before[part])
        elif before is not None:
            rows = _weigh(tokens, order, slots.k, before)
        else:
            rows = gather(tokens, order, slots.k)
        here = [(start - part.start, stop - part.start) for start, stop in bounds]
        to = answers[part]
        apart = after is not None and to.dtype != sums
        given = xp.empty(to.shape, dtype=sums) if apart else to
        type(some[0]).together(some, rows, here, given)
        if after is not None:
            own = after[part] if order is None else after[order]
            _weigh(given, None, 1, own, out=to)
    if slots.in_order:
        out[m:] = 0
    else:
        at = xp.arange(slots.order.size, dtype=np.int64)
        _combine(answers, slots, at, slots.order, weights if late else None, out)
    return out


def _padded_rows(slots: Slots, experts: Sequence[Any], itemsize: int) -> int | None:
    """How many rows each expert gets where all of them get the same; None where they do not."""
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
    """The same, with `rows` rows for each expert, of which the last ones may be for nothing."""
    xp, E = namespace(tokens), len(experts)
    starts = xp.concatenate([xp.zeros(1, dtype=np.int64), slots.ends[: E - 1].astype(np.int64)])
    last = slots.order.size - 1
    wanted = xp.minimum(starts[:, None] + xp.arange(rows, dtype=np.int64), last).reshape(-1)
    order = slots.order[wanted]
    early = weights is not None and experts[0].apply_router_weight_on_input
    given = _weigh(tokens, order, slots.k, weights) if early else gather(tokens, order, slots.k)
    answers = xp.empty((E * rows, experts[0].d_out), dtype=sums)
    bounds = [(e * rows, (e + 1) * rows) for e in range(E)]
    type(experts[0]).together(experts, given, bounds, answers)
    shifts = xp.arange(E, dtype=np.int64) * rows - starts
    shifts = xp.concatenate([shifts, xp.full(3, E * rows, dtype=np.int64)])
    at = xp.arange(last + 1, dtype=np.int64) + shifts[slots.keys[slots.order]]
    out = xp.empty((len(tokens), experts[0].d_out), dtype=dtype)
    _combine(answers, slots, at, order, None if early else weights, out)
    return out


def products(rows: Array, matrices: Sequence[Array], bounds: Bounds, out: Array) -> None:
    """``out[start:stop] = rows[start:stop] @ matrix`` of each expert.

    Rows and matrices are of one dtype; `out` is of the same, or float32 where they have 16 bits.

    Notes
    -----
    With cuBLAS one product per expert, on several streams; one call for all of them if they have as
    many rows (`gemms.Gemms`).
    """
    xp = namespace(rows)
    multiply = gemms(xp)
    if multiply is not None:
        multiply(rows, matrices, bounds, out)
        return
    rows = rows.astype(out.dtype, copy=False)
    for matrix, (start, stop) in zip(matrices, bounds, strict=True):
        xp.matmul(rows[start:stop], matrix.astype(out.dtype, copy=False), out=out[start:stop])


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
    """What slots are sorted by: the local expert, then others, bad indices, and NaN weights."""
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


def _weigh(
    rows: Array, order: Array | None, k: int, weights: Array, out: Array | None = None
) -> Array:
    """Rows of the slots `order`, or of slot r for row r, times the weights of the slots."""
    xp = namespace(rows)
    if out is None:
        m = len(rows) if order is None else len(order)
        out = xp.empty((m, rows.shape[1]), dtype=rows.dtype)
    if (kernels := cuda_kernels.kernels(xp)) is not None:
        kernels.weigh(rows, order, k, weights, out)
        return out
    if order is not None:
        rows, weights = xp.take(rows, order // k, axis=0), weights[order]
    out[...] = rows.astype(weights.dtype, copy=False) * weights[:, None]
    return out


def _combine(
    answers: Array,
    slots: Slots,
    at: Array,
    order: Array,
    weights: Array | None,
    out: Array,
) -> None:
    """``out[i]`` = the sum over row i's slots of weight * answer, in the order of the experts.

    `at` (n * k,) is where the answer of each sorted slot is, m or more if there is none; `order`
    (m,) is whose slot each answer is.
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
