"""What does one rank do with its tokens?

Axis letters: `n` rows, `d` width, `k` slots per row, `E` experts, `R` ranks.

    routing [n, k]      sort the slots by local expert; the slots of other ranks go last
         │
         v
    slots of expert 0 │ slots of expert 1 │ ... │ not ours
         │
         ├─ gather the rows of one tile ─> expert ─> times the top-k weight ─> add to the rows
         v            (the tile stays in cache from one step to the next)
    output [n, d_out]

There is no loop over rows: one stable sort, then one matrix product per expert that has rows.
On a device (CuPy) the experts compute together instead of tile by tile, see `grouped`; the only
thing that comes to the host is one small array of integers, the ends of the experts' segments and
what must be known of the values.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from dask_ep import grouped, memory
from dask_ep.arrays import Array, is_array, namespace, one_namespace, to_host
from dask_ep.blas import product

TILE_BYTES = 8 << 20
"""Bytes of the widest rows of one matrix product on the CPU: a share of the last-level cache."""

TILES_HELD = 8
"""Tiles that a thread has in memory while it computes: rows, hidden columns, outputs; and those of
other sizes that wait in the pool for their next user."""

Write = Callable[[Array, Array | slice, Array], None]
"""Adds rows (m, d_out) to rows (m,) of an output, or writes them there."""

TILE_ROWS = (192, 1024)
"""Fewest and most rows of one product on the CPU, however wide or narrow: with fewer, packing the
matrix costs more than a tenth of the product; with more, nothing is gained and cache is lost."""


class Expert(ABC):
    """A function from rows (m, d) to rows (m, d_out) that can write where it is told.

    Attributes
    ----------
    d, d_out : int
        Widths of the rows that come and go.
    widest : int
        Width of the widest row that it makes on the way; tells how many rows stay in cache.
    weigh : {"output", "input"}
        What the top-k weight multiplies: the expert's output, or the row before the expert
        sees it (as in Llama 4).
    """

    d: int
    d_out: int
    weigh: str = "output"

    @property
    def widest(self) -> int:
        return max(self.d, self.d_out)

    @property
    def kin(self) -> Hashable:
        """Equal for experts that can compute together; by default each is alone."""
        return id(self)

    @abstractmethod
    def __call__(self, rows: Array, out: Array | None = None) -> Array:
        """Compute the expert on rows (m, d); into `out` (m, d_out) when it is given.

        On a device `out` is float32 where rows have 16 bits and answers are still to be added up.
        """

    @staticmethod
    def together(
        experts: Sequence[Expert], rows: Array, bounds: grouped.Bounds, out: Array
    ) -> None:
        """On a device: compute experts that are kin, each on its rows, all of them contiguous."""
        for expert, (start, stop) in zip(experts, bounds, strict=True):
            expert(rows[start:stop], out=out[start:stop])


class Linear(Expert):
    """The expert `rows @ W`; a `W` of another dtype is converted at each use, not held."""

    def __init__(self, W: Array):
        self.W = W
        self.d, self.d_out = W.shape

    @property
    def kin(self) -> Hashable:
        return Linear, self.W.shape

    @staticmethod
    def together(
        experts: Sequence[Linear], rows: Array, bounds: grouped.Bounds, out: Array
    ) -> None:
        matrices = [expert.W.astype(rows.dtype, copy=False) for expert in experts]
        grouped.products(rows, matrices, bounds, out)

    def __call__(self, rows: Array, out: Array | None = None) -> Array:
        xp, W = namespace(rows), self.W.astype(rows.dtype, copy=False)
        if xp is np:
            return product(rows, W, out)
        if out is None or out.dtype == rows.dtype:
            return xp.matmul(rows, W, out=out)
        grouped.products(rows, [W], [(0, len(rows))], out)
        return out


class _Function(Expert):
    """A user's own function (m, d) -> (m, d_out)."""

    def __init__(self, function: Callable[[Array], Array], place: str, probe: Array):
        self._function, self._place = function, place
        self.d = probe.shape[1]
        self.d_out = self._checked(function(probe), m=0, d_out=None).shape[1]

    def _checked(self, y: Array, *, m: int, d_out: int | None) -> Array:
        shape = getattr(y, "shape", None)
        if shape is None or len(shape) != 2 or shape[0] != m or d_out not in (None, shape[1]):
            came = f"shape {shape}" if shape is not None else f"a {type(y).__name__}"
            raise ValueError(
                f"{self._place} must map rows (m, d) to rows (m, d_out) for any m, 0 included: "
                f"rows ({m}, {self.d}) must give ({m}, {'d_out' if d_out is None else d_out}), "
                f"but gave {came}"
            )
        return y

    def __call__(self, rows: Array, out: Array | None = None) -> Array:
        y = self._checked(self._function(rows), m=len(rows), d_out=self.d_out)
        if out is None:
            return y
        out[...] = y.astype(out.dtype, copy=False)
        return out


def expert_parallel_dispatch(
    tokens: Array,
    routing: Array,
    expert_Ws: Array | Sequence[Array | Callable[[Array], Array]],
    rank: int,
    world_size: int,
    *,
    topk_weights: Array | None = None,
) -> Array:
    """Apply the experts of one rank to the rows that are routed to them.

    Parameters
    ----------
    tokens : (n, d) array of floats
        float16, bfloat16 (``ml_dtypes``), float32 or float64; NumPy or CuPy.
    routing : (n,) or (n, k) array of integers
        Global expert indices, 0 to E - 1; -1 means "no expert", and adds nothing.
    expert_Ws : list of E/R experts, or (E/R, d, d_out) array
        The experts that this rank owns, and only these: each a (d, d_out) matrix, an `Expert`, or
        a callable (m, d) -> (m, d_out). A callable gets rows in the computing dtype, and is asked
        once with no rows for its width. Rank r owns the global experts [r * E/R, (r+1) * E/R).
    rank, world_size : int
        r and R; 0 <= r < R. E is ``len(expert_Ws) * world_size``.
    topk_weights : (n, k) array of floats, or (n,) where routing is (n,); optional
        Multiplies the output of each slot's expert; absent means 1.

    Returns
    -------
    (n, d_out) array of the tokens' dtype
        Row i is the sum over its slots owned here of weight * expert(row i); all other rows are 0.
        The sum of the outputs of all ranks is the output of the layer.

    Raises
    ------
    TypeError
        If tokens or top-k weights are not floats, routing is not integers, something is no array,
        or arrays of two namespaces (NumPy, CuPy) are mixed.
    ValueError
        If shapes do not fit, rank or an expert index is out of range, or a top-k weight is NaN.

    Notes
    -----
    float64 tokens are computed in float64, all others in float32, whatever the weights' dtype; on a
    device products of float16 and bfloat16 take 16 bits and give float32 (see `grouped`).
    One stable sort of the n * k slots and one matrix product per expert with rows (per tile of
    `TILE_BYTES` on the CPU); additions go in the order of the experts, so that the same input
    gives the same bits. Rows that come sorted by expert with one slot each are neither gathered nor
    scattered. NaN or infinity in a row stays in that row. On a device, E/R + 3 or 4 int64 come to
    the host in one copy, and nothing goes there. The layer is that of Shazeer et al.,
    "Outrageously Large Neural Networks" (2017), section 2.

    Examples
    --------
    Rank 1 of 2 owns experts 2 and 3; row 1 is the only one routed to them.

    >>> import numpy as np
    >>> from dask_ep import expert_parallel_dispatch
    >>> tokens = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    >>> routing = np.array([0, 3, 1])
    >>> double, triple = 2 * np.eye(2), 3 * np.eye(2)
    >>> expert_parallel_dispatch(tokens, routing, [double, triple], rank=1, world_size=2)
    array([[ 0.,  0.],
           [ 9., 12.],
           [ 0.,  0.]])
    """
    return dispatch(tokens, routing, topk_weights, expert_Ws, rank, world_size)


def dispatch(
    tokens: Array,
    routing: Array,
    topk_weights: Array | None,
    expert_Ws: Array | Sequence[Any],
    rank: int,
    world_size: int,
    dtype: np.dtype | None = None,
) -> Array:
    """As `expert_parallel_dispatch`, with an output of another dtype, such as that of its sums."""
    xp = one_namespace(tokens=tokens, routing=routing, topk_weights=topk_weights)
    check_tokens(tokens)
    check_routing(routing, topk_weights, n=tokens.shape[0])
    check_rank(rank, world_size)
    compute = computing_dtype(tokens.dtype, on_device=xp is not np)
    experts = as_experts(expert_Ws, d=tokens.shape[1], like=tokens, dtype=compute)
    dtype = tokens.dtype if dtype is None else dtype
    if xp is not np:
        return _on_device(tokens, routing, topk_weights, experts, rank, world_size, dtype)

    segments = sort_slots(routing, topk_weights, len(experts), rank, world_size)
    served = Served(tokens, segments, topk_weights, experts[0].d_out)
    for e, expert in enumerate(experts):
        served.add(e, expert)
    return served.out.astype(dtype, copy=False)


def _on_device(
    tokens: Array,
    routing: Array,
    topk_weights: Array | None,
    experts: Sequence[Expert],
    rank: int,
    world_size: int,
    dtype: np.dtype,
) -> Array:
    sums, weights = computing_dtype(tokens.dtype), None
    if topk_weights is not None:
        flat = namespace(tokens).ascontiguousarray(topk_weights).reshape(-1)
        weights = flat.astype(sums, copy=False)
    slots = grouped.sort_slots(routing, weights, len(experts), rank, world_size)
    if slots.bad:
        _raise_bad_index(routing, len(experts) * world_size, len(experts), world_size)
    if slots.nan:
        _raise_nan(topk_weights)
    return grouped.through_experts(tokens, slots, weights, experts, sums, dtype)


# --- what is an expert here? -----------------------------------------------------------------


def as_experts(
    expert_Ws: Array | Sequence[Any], *, d: int, like: Array, dtype: np.dtype
) -> Sequence[Expert]:
    """Make `Expert`s of matrices, a stacked array, callables, or experts; check their widths."""
    if hasattr(expert_Ws, "ndim") and expert_Ws.ndim != 3:
        raise ValueError(
            f"expert_Ws as one array must be (E/R, d, d_out), but has shape {expert_Ws.shape}; "
            "a single expert is a list of one matrix"
        )
    if len(expert_Ws) == 0:
        raise ValueError(
            "expert_Ws is empty, but a rank must own at least one expert; "
            "use a world_size that divides the number of experts"
        )
    experts = [
        _as_expert(W, f"expert_Ws[{e}]", d=d, like=like, dtype=dtype)
        for e, W in enumerate(expert_Ws)
    ]
    for e, expert in enumerate(experts):
        if expert.d != d:
            raise ValueError(
                f"expert_Ws[{e}] takes rows of width {expert.d}, but tokens have width d={d}; "
                "each expert must be (d, d_out) with the width of the tokens"
            )
        if expert.d_out != experts[0].d_out:
            raise ValueError(
                f"all experts must have the same output width, but expert_Ws[{e}] has "
                f"d_out={expert.d_out} and expert_Ws[0] has d_out={experts[0].d_out}"
            )
    return experts


def _as_expert(W: Any, place: str, *, d: int, like: Array, dtype: np.dtype) -> Expert:
    if isinstance(W, Expert):
        return W
    if is_array(W):
        if W.ndim != 2:
            raise ValueError(f"{place} must be a (d, d_out) matrix, but has shape {W.shape}")
        if not is_float(W.dtype):
            raise TypeError(f"{place} must hold floats, but has dtype {W.dtype}")
        return Linear(W)
    if callable(W):
        return _Function(W, place, namespace(like).empty((0, d), dtype=dtype))
    raise TypeError(
        f"{place} must be a (d, d_out) matrix, an Expert, or a callable (m, d) -> (m, d_out), "
        f"but is a {type(W).__name__}"
    )


# --- which slots are ours? -------------------------------------------------------------------


class Segments(NamedTuple):
    """The slots of a chunk, sorted by local expert."""

    k: int
    #: slots per row
    order: Array | None
    #: [n * k] slot numbers (row * k + slot), ours first, by local expert; None if 0, 1, 2, ...
    bounds: list[tuple[int, int]]
    #: first and last + 1 position in `order`, one pair per local expert
    repeats: bool
    #: whether some row has two slots at one local expert

    def slots(self, tile: slice) -> Array | slice:
        """Slot numbers of a run of positions."""
        return tile if self.order is None else self.order[tile]

    def rows(self, slots: Array | slice) -> Array | slice:
        """Row numbers of slots."""
        return slots if self.k == 1 else slots // self.k

    def not_ours(self) -> Array | slice:
        """Slot numbers that no local expert serves."""
        return self.slots(slice(self.bounds[-1][1], None))


def sort_slots(
    routing: Array, topk_weights: Array | None, num_local: int, rank: int, world_size: int
) -> Segments:
    """Sort the slots by local expert, in one pass over small integers, and check their values.

    Notes
    -----
    The sort is stable: the slots of an expert are in the order of the rows. Local expert numbers
    below 2**15 are sorted as 16-bit integers, which NumPy does in linear time (radix sort).
    """
    xp = namespace(routing)
    k = 1 if routing.ndim == 1 else routing.shape[1]
    flat = routing.reshape(-1)
    if flat.size == 0:
        return Segments(k, None, [(0, 0)] * num_local, repeats=False)

    local = _local_numbers(xp, flat, num_local, rank)
    order = xp.argsort(local, kind="stable")
    ordered = local[order]
    ends = xp.searchsorted(ordered, xp.arange(num_local, dtype=local.dtype), side="right")
    asked = [flat.min(), flat.max()]
    asked.append(_in_order(local) if k == 1 else _repeated(ordered, order, k, num_local))
    if topk_weights is not None:
        asked.append(xp.isnan(topk_weights).any())
    facts = to_host(ends, *asked)
    ends, (low, high, fact, *has_nan) = facts[:num_local], facts[num_local:]

    num_experts = num_local * world_size
    if low < -1 or high >= num_experts:
        _raise_bad_index(routing, num_experts, num_local, world_size)
    if any(has_nan):
        _raise_nan(topk_weights)
    bounds = list(zip([0, *ends[:-1]], ends, strict=True))
    in_order, repeats = (bool(fact), False) if k == 1 else (False, bool(fact))
    return Segments(k, None if in_order else order, bounds, repeats)


def _local_numbers(xp: Any, flat: Array, num_local: int, rank: int) -> Array:
    """Local expert number of each slot, and `num_local` for the slots that are not ours."""
    local = flat.astype(np.int64)
    local -= rank * num_local
    local = xp.where((local < 0) | (local >= num_local), num_local, local)
    return local.astype(np.int16 if num_local < 2**15 else np.int64)


def _in_order(local: Array) -> Array:
    return (local[1:] >= local[:-1]).all()


def _repeated(ordered: Array, order: Array, k: int, num_local: int) -> Array:
    """Whether a row comes twice at one local expert; `ordered` are those of the slots `order`."""
    rows = order // k
    same = (ordered[1:] == ordered[:-1]) & (rows[1:] == rows[:-1])
    return (same & (ordered[1:] < num_local)).any()


def _raise_bad_index(routing: Array, num_experts: int, num_local: int, world_size: int) -> None:
    bad = (routing >= num_experts) | (routing < -1)
    where = tuple(int(i[0]) for i in bad.nonzero())
    raise ValueError(
        f"routing must hold expert indices in [-1, {num_experts}): {num_local} experts a rank "
        f"(expert_Ws) times world_size={world_size}; but routing[{', '.join(map(str, where))}] is "
        f"{int(routing[where])}, and {int(bad.sum())} of {routing.size} values are out of range; "
        "each rank has E/R experts, so world_size must divide their number"
    )


def _raise_nan(topk_weights: Array) -> None:
    bad = namespace(topk_weights).isnan(topk_weights)
    where = ", ".join(str(int(i[0])) for i in bad.nonzero())
    raise ValueError(
        f"topk_weights must be numbers, but topk_weights[{where}] is NaN, as are {int(bad.sum())} "
        f"of {topk_weights.size}; a slot without an expert has routing -1 and any finite weight"
    )


# --- the work --------------------------------------------------------------------------------


def begin_output(
    n: int, segments: Segments, d_out: int, dtype: np.dtype, like: Array
) -> tuple[Array, Write]:
    """Make an output (n, d_out) to which experts come to add, and say how they add to it.

    With one slot a row it is of the tokens' dtype, and each row is written once; with more, of the
    computing dtype, from zero. Expert after expert, in the order of their numbers, gives the same
    bits each time.
    """
    if segments.k > 1:
        out = memory.empty((n, d_out), computing_dtype(dtype), like=like)
        out.fill(0)
        return out, partial(_add_repeated_rows, segments.k) if segments.repeats else add_rows
    out = memory.empty((n, d_out), dtype, like=like)
    out[segments.not_ours()] = 0
    return out, assign_rows


def can_be_in_place(k: int, d: int, d_out: int, dtype: np.dtype) -> bool:
    """Whether outputs fit where the tokens were: one slot a row, of the same width and dtype."""
    return k == 1 and d == d_out and computing_dtype(dtype) == dtype


class Served:
    """The rows of a chunk, and the sum of what the experts that have served them so far gave.

    Parameters
    ----------
    tokens : (n, d)
    segments : from `sort_slots` of their routing
    topk_weights : of the shape of the routing, or None
    d_out : int
    in_place : bool
        Whether the tokens may be overwritten by the output: possible where `can_be_in_place`, for a
        row with one slot is not needed any more when its expert has served it.

    Attributes
    ----------
    out : (n, d_out) array, see `begin_output`; the output when all experts were added
    """

    def __init__(
        self,
        tokens: Array,
        segments: Segments,
        topk_weights: Array | None,
        d_out: int,
        *,
        in_place: bool = False,
    ):
        self._tokens, self._segments = tokens, segments
        self._weights = None if topk_weights is None else topk_weights.reshape(-1)
        if in_place and can_be_in_place(segments.k, *tokens.shape[1:], d_out, tokens.dtype):
            tokens[segments.not_ours()] = 0
            self.out, self._write = tokens, assign_rows
        else:
            self.out, self._write = begin_output(len(tokens), segments, d_out, tokens.dtype, tokens)

    def add(self, e: int, expert: Expert) -> None:
        """Send the rows of local expert `e` through it, and add what it gives."""
        compute = computing_dtype(self._tokens.dtype)
        xp, k = namespace(self._tokens), self._segments.k
        for tile in tiles(*self._segments.bounds[e], expert, compute, xp):
            slots = self._segments.slots(tile)
            _apply(expert, self._tokens, slots, k, self._weights, compute, self.out, self._write)


def tiles(start: int, stop: int, expert: Expert, compute: np.dtype, xp: Any = np) -> list[slice]:
    """Cut an expert's segment into equal runs that stay in cache; a device takes it whole."""
    m = stop - start
    if m == 0:
        return []
    if xp is not np:
        return [slice(start, stop)]
    rows = tile_rows(expert.widest * compute.itemsize)
    rows = math.ceil(m / math.ceil(m / rows))
    return [slice(s, min(s + rows, stop)) for s in range(start, stop, rows)]


def tile_rows(row_bytes: int) -> int:
    """Rows of a tile on the CPU, at most, whose widest rows take so many bytes."""
    fewest, most = TILE_ROWS
    return min(max(TILE_BYTES // max(row_bytes, 1), fewest), most)


def tile_bytes(row_bytes: int) -> int:
    """Bytes of the tiles that a thread has in memory while it computes such rows, at most.

    Examples
    --------
    >>> tile_bytes(4096 * 4) >> 20, tile_bytes(64 * 4) >> 20
    (64, 2)
    """
    return TILES_HELD * tile_rows(row_bytes) * row_bytes


def _apply(
    expert: Expert,
    tokens: Array,
    slots: Array | slice,
    k: int,
    weights: Array | None,
    compute: np.dtype,
    out: Array,
    write: Write,
) -> None:
    """One tile: gather, expert, weight, write."""
    contiguous = isinstance(slots, slice)
    rows = slots if contiguous or k == 1 else slots // k
    x = tokens[rows].astype(compute, copy=False) if contiguous else gather(tokens, rows, compute)
    if contiguous and out is tokens:
        x = x.copy()  # experts read their rows again while they write
    if weights is not None:
        w = weights[slots].astype(compute, copy=False)[:, None]
        if expert.weigh == "input":
            x = namespace(x).multiply(x, w, out=None if contiguous else x)
    in_place = contiguous and write is assign_rows and out.dtype == compute
    y = out[rows] if in_place else memory.empty((len(x), expert.d_out), compute, like=x)
    expert(x, out=y)
    weighed = weights is not None and expert.weigh == "output"
    for run in memory.runs_in_cache(y):
        if weighed:
            y[run] *= w[run]
        if not contiguous:
            write(out, rows[run], y[run])
    if contiguous and not in_place:
        write(out, rows, y)


def assign_rows(out: Array, rows: Array | slice, y: Array) -> None:
    """Write y (m, d) over rows (m,) of out (n, d)."""
    out[rows] = y


def add_rows(out: Array, rows: Array, y: Array) -> None:
    """Add y (m, d) to rows (m,) of out (n, d); the rows must all be different."""
    if namespace(out) is not np:
        grouped.add_rows(out, rows, y)
        return
    for run in memory.runs_in_cache(y):
        total = gather(out, rows[run], out.dtype)
        total += y[run]
        out[rows[run]] = total


def _add_repeated_rows(k: int, out: Array, rows: Array, y: Array) -> None:
    """Add y (m, d) to rows (m,) of out (n, d), ascending, of which up to k may be the same.

    ``add.at`` is slow on the host, and adds in any order on a device, and so to other bits each
    time. Every one of the same rows therefore adds up all of them, in their order, and they write
    the same.
    """
    xp, m = namespace(out), len(rows)
    first, total = xp.searchsorted(rows, rows, side="left"), gather(out, rows, out.dtype)
    for nth in range(k):
        other = xp.minimum(first + nth, m - 1)
        same = (rows[other] == rows) & (first + nth < m)
        total += xp.where(same[:, None], y[other], y.dtype.type(0))
    out[rows] = total


def gather(tokens: Array, rows: Array, dtype: np.dtype) -> Array:
    """Copy rows (m,) of tokens (n, d) to a new (m, d) array of another dtype or the same."""
    if namespace(tokens) is not np:
        return grouped.gather(tokens, rows).astype(dtype, copy=False)
    taken = memory.empty((len(rows), tokens.shape[1]), tokens.dtype)
    np.take(tokens, rows, axis=0, out=taken, mode="clip")  # "raise" would buffer `out`
    if taken.dtype == dtype:
        return taken
    converted = memory.empty(taken.shape, dtype)
    converted[...] = taken
    return converted


# --- what must hold --------------------------------------------------------------------------


def is_float(dtype: np.dtype) -> bool:
    """Whether a dtype holds real floats, those of ``ml_dtypes`` included."""
    dtype = np.dtype(dtype)
    # ml_dtypes registers its floats as kind "V" (and "f" for some); their names tell.
    return dtype.kind == "f" or "float" in dtype.name


def computing_dtype(dtype: np.dtype, on_device: bool = False) -> np.dtype:
    """The dtype in which tokens of a dtype are computed, and of which their experts are held.

    float64 stays, all else is float32, in which sums are taken everywhere. On a device products
    take 16 bits as they are, so that what goes into one is infinite there if it is a float16 beyond
    65504.
    """
    if on_device and np.dtype(dtype).itemsize == 2:
        return np.dtype(dtype)
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def check_tokens(tokens: Array) -> None:
    if tokens.ndim != 2:
        raise ValueError(f"tokens must be (n, d), but have shape {tokens.shape}")
    if not is_float(tokens.dtype):
        raise TypeError(
            f"tokens must hold floats, but have dtype {tokens.dtype}; convert them with .astype"
        )


def check_routing(routing: Array, topk_weights: Array | None, *, n: float) -> None:
    """Check kinds and shapes; `n` is the number of token rows, NaN where it is not known."""
    if routing.dtype.kind not in "iu":
        raise TypeError(
            f"routing must hold integer expert indices, but has dtype {routing.dtype}; "
            "convert it with .astype('int64') if its values are whole numbers"
        )
    if routing.ndim not in (1, 2):
        raise ValueError(f"routing must be (n,) or (n, k), but has shape {routing.shape}")
    if routing.ndim == 2 and routing.shape[1] == 0:
        raise ValueError(f"routing must have at least one slot, but has shape {routing.shape}")
    if _differ(routing.shape[0], n):
        raise ValueError(
            f"routing must have one row per token row, but has {routing.shape[0]} rows "
            f"(shape {routing.shape}) and tokens have {n}"
        )
    if topk_weights is None:
        return
    if not is_float(topk_weights.dtype):
        raise TypeError(f"topk_weights must hold floats, but have dtype {topk_weights.dtype}")
    if topk_weights.ndim != routing.ndim or any(map(_differ, topk_weights.shape, routing.shape)):
        raise ValueError(
            "topk_weights must have the shape of routing, one weight per slot, but "
            f"topk_weights have {topk_weights.shape} and routing has {routing.shape}"
        )


def _differ(a: float, b: float) -> bool:
    """Whether two lengths differ for certain: an unknown one (NaN) fits any."""
    return a != b and not (math.isnan(a) or math.isnan(b))


def check_rank(rank: int, world_size: int) -> None:
    if world_size < 1:
        raise ValueError(f"world_size must be at least 1, but is {world_size}")
    if not 0 <= rank < world_size:
        raise ValueError(
            f"rank must be in [0, {world_size}) for world_size={world_size}, but is {rank}"
        )
