"""What must tokens, routing and ranks be, and in what numbers are they computed?"""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import NoReturn

import numpy as np
from dask.utils import parse_bytes

from dask_ep.arrays.namespaces import Array, namespace


def size_in_bytes(size: float | str | None, name: str = "size") -> int | None:
    """Read a number of bytes, as a number or as text; None stays None.

    Examples
    --------
    >>> size_in_bytes("4 GiB"), size_in_bytes(1000)
    (4294967296, 1000)
    """
    if size is None:
        return None
    try:
        found = parse_bytes(size)
    except (ValueError, TypeError, AttributeError, OverflowError):
        found = 0
    if found <= 0:
        raise ValueError(f'{name}: invalid size: {size!r} (try "8 GiB")')
    return found


def is_number(value: object) -> bool:
    """Say if a value is a finite number, which True and False are not."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def is_float(dtype: np.dtype) -> bool:
    """Whether a dtype holds real floats, those of ``ml_dtypes`` included."""
    dtype = np.dtype(dtype)
    # ml_dtypes registers its floats as kind "V" (and "f" for some), so names decide.
    return dtype.kind == "f" or "float" in dtype.name


def computing_dtype(dtype: np.dtype, is_rounded: bool = False) -> np.dtype:
    """The dtype in which tokens of a dtype are computed, and in which their experts are held.

    float64 stays, everything else becomes float32, also in all sums. Where products on a device
    round to 16 bits (`Experts.with_precision`), experts are held in 16 bits like the tokens, and
    inputs of a float16 product become infinite beyond 65504.
    """
    if is_rounded and np.dtype(dtype).itemsize == 2:
        return np.dtype(dtype)
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def check_tokens(tokens: Array) -> None:
    refuse_masked(tokens, "tokens")
    if tokens.ndim != 2:
        raise ValueError(f"tokens must be (n, d), but have shape {tokens.shape}")
    if not is_float(tokens.dtype):
        raise TypeError(
            f"tokens must hold floats, but have dtype {tokens.dtype}; convert them with .astype"
        )
    check_byte_order(tokens.dtype, "tokens")


def kind_of(obj: object) -> str:
    """Name the type of an object that is not a Dask array; array expressions by their package."""
    kind = type(obj)
    if kind.__module__.partition(".")[0] == "dask_array":
        return f"dask_array.{kind.__name__} (an array expression, not a dask.array.Array)"
    return kind.__name__


def check_byte_order(dtype: np.dtype, name: str) -> None:
    if not dtype.isnative:
        raise TypeError(
            f"{name} must have the byte order of this machine, but dtype is {dtype.str}; convert "
            f"with astype({dtype.name!r})"
        )


def check_routing(routing: Array, topk_weights: Array | None, *, n: float) -> None:
    """Check kinds and shapes; `n` is the number of token rows, NaN where it is not known."""
    refuse_masked(routing, "routing")
    refuse_masked(topk_weights, "topk_weights")
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
    """Whether two lengths are known to differ: an unknown one (NaN) fits any."""
    return a != b and not (math.isnan(a) or math.isnan(b))


def refuse_masked(array: Array | None, name: str) -> None:
    """Refuse masked arrays, whose masks would be lost silently."""
    if isinstance(getattr(array, "_meta", array), np.ma.MaskedArray):
        raise TypeError(
            f"{name} must not be a masked array; fill it with np.ma.filled, or da.ma.filled for a "
            "Dask array (in routing, -1 means no expert)"
        )


class BadRow(ValueError):
    """A row holds an invalid value.

    `row` is its number in the array that was checked, usually a chunk; code that knows where the
    chunk begins in the whole array adds that with `place_of_row`.
    """

    row: int

    @classmethod
    def at(cls, row: int, message: str) -> BadRow:
        error = cls(message)
        error.row = row
        return error


def place_of_row(place: str, error: Exception, first_row: int | None) -> str:
    """Add the error's row in the whole array, if known, to the name of a step.

    `first_row` is the chunk's first row in the whole array; None if an earlier chunk has an
    unknown length.

    Examples
    --------
    >>> place_of_row("dispatch of token chunk 2", BadRow.at(3, "routing must ..."), first_row=200)
    'dispatch of token chunk 2 (row 3 of the chunk is row 203 of the whole array)'
    """
    if first_row is None or not isinstance(error, BadRow):
        return place
    whole = first_row + error.row
    return f"{place} (row {error.row} of the chunk is row {whole} of the whole array)"


def raise_bad_index(routing: Array, num_experts: int, why_so_many: str = "") -> NoReturn:
    """Raise for a routing that holds an index outside [-1, E), naming the first.

    `why_so_many` explains where E comes from.
    """
    bad = (routing >= num_experts) | (routing < -1)
    where = tuple(int(i[0]) for i in bad.nonzero())
    from_one = not (routing == 0).any() and int(routing.max()) == num_experts
    hint = "; no index here is 0: they count from 0, not from 1" if from_one else ""
    raise BadRow.at(
        where[0],
        f"routing must hold expert indices in [-1, {num_experts}), but "
        f"routing[{', '.join(map(str, where))}] is {int(routing[where])}, and {int(bad.sum())} of "
        f"{routing.size} values are out of range{hint}{why_so_many}",
    )


def check_indices(routing: np.ndarray, num_experts: int, why_so_many: str = "") -> None:
    """Call `raise_bad_index` if an index of a NumPy array is outside [-1, E)."""
    if routing.size and (routing.min() < -1 or routing.max() >= num_experts):
        raise_bad_index(routing, num_experts, why_so_many)


def raise_nan(topk_weights: Array) -> NoReturn:
    """Raise for top-k weights that hold NaN, naming the first."""
    bad = namespace(topk_weights).isnan(topk_weights)
    where = tuple(int(i[0]) for i in bad.nonzero())
    raise BadRow.at(
        where[0],
        f"topk_weights must not be NaN, but topk_weights[{', '.join(map(str, where))}] is "
        f"({int(bad.sum())} of {topk_weights.size} are); a slot without an expert has routing -1 "
        "and any finite weight",
    )


def check_world_size(world_size: int) -> None:
    if isinstance(world_size, bool) or not isinstance(world_size, Integral):
        raise TypeError(f"world_size must be a whole number, but is {world_size!r}")
    if world_size < 1:
        raise ValueError(f"world_size must be at least 1, but is {world_size}")


def check_rank(rank: int, world_size: int) -> None:
    check_world_size(world_size)
    if isinstance(rank, bool) or not isinstance(rank, Integral):
        raise TypeError(f"rank must be a whole number, but is {rank!r}")
    if not 0 <= rank < world_size:
        raise ValueError(
            f"rank must be in [0, {world_size}) for world_size={world_size}, but is {rank}"
        )


def count_not_finite(rows: np.ndarray) -> tuple[int, int]:
    """Count the rows that hold NaN or infinity, and find the first; (0, -1) if there is none.

    Notes
    -----
    One pass over memory, or two for 16-bit floats, if all are finite and their squares do not
    overflow. Needs memory for some rows only.

    Examples
    --------
    >>> import numpy as np
    >>> count_not_finite(np.array([[1, 2], [np.inf, 0], [0, np.nan]]))
    (2, 1)
    """
    if not is_float(rows.dtype) or not rows.size:
        return 0, -1
    rows = rows.reshape(len(rows), -1)
    if rows.dtype.itemsize > 1 and rows.flags.c_contiguous and _all_finite(rows.reshape(-1)):
        return 0, -1
    count, first, step = 0, -1, max(1, (1 << 18) // rows.shape[1])
    for start in range(0, len(rows), step):
        bad = _not_finite(rows[start : start + step])
        if here := int(bad.sum()):
            first = start + int(bad.argmax()) if count == 0 else first
            count += here
    return count, first


def _all_finite(flat: np.ndarray) -> bool:
    """Whether all numbers are certainly finite.

    The bits of 16-bit floats with the same sign are in the order of the numbers, and those of
    others show in their product with themselves, unless it overflows.
    """
    if flat.dtype.itemsize == 2:
        infinity = np.array([np.inf, -np.inf], flat.dtype)
        return all(
            flat.view(bits).max() < infinity[sign].view(bits)
            for sign, bits in enumerate((np.int16, np.uint16))
        )
    with np.errstate(all="ignore"):
        return bool(np.isfinite(np.dot(flat, flat)))


def _not_finite(rows: np.ndarray) -> np.ndarray:
    """Which rows hold NaN or infinity."""
    if rows.dtype.itemsize == 2:
        exponent = np.array(np.inf, rows.dtype).view(np.uint16)
        bits = np.ascontiguousarray(rows).view(np.uint16)
        return ((bits & exponent) == exponent).any(axis=1)
    return ~np.isfinite(rows).all(axis=1)
