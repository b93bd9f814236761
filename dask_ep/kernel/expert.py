"""What is an expert?

A function from rows (m, d) to rows (m, d_out): a matrix, a user's own function, or one of those in
`kinds`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

from dask_ep.arrays import blas, memory
from dask_ep.arrays.blas import product
from dask_ep.arrays.checks import computing_dtype, is_float, refuse_masked
from dask_ep.arrays.memory import aligned
from dask_ep.arrays.namespaces import Array, is_array, namespace
from dask_ep.arrays.onednn import OneDnn
from dask_ep.arrays.onednn_kernels import Matrix, Packed
from dask_ep.kernel import bfloat16, device_kernel
from dask_ep.kernel.bfloat16 import BFLOAT16
from dask_ep.kernel.operands import Factors, factors


class Expert(ABC):
    """A function from rows (m, d) to rows (m, d_out) that can write into a given array.

    Attributes
    ----------
    d, d_out : int
        Widths of input and output rows.
    widest : int
        Width of its widest intermediate row; decides how many rows stay in cache.
    hidden : int or None
        Width of its hidden activations, if it has any.
    apply_router_weight_on_input : bool
        Whether the top-k weight multiplies the row that the expert reads (as in Llama 4) instead
        of its output.
    """

    d: int
    d_out: int
    apply_router_weight_on_input: bool = False

    @property
    def widest(self) -> int:
        return max(self.d, self.d_out)

    @property
    def hidden(self) -> int | None:
        """Width of the hidden activations, which the last matrix multiplies; None without any.

        On the host, experts that have them also take ``hidden=``, an array (m, hidden) of the
        computing dtype to write them to, and have ``activate(rows, hidden)``, which computes only
        them.
        """
        return None

    @property
    def batch_key(self) -> Hashable:
        """Equal for experts that can be computed in one batch; by default each is alone."""
        return id(self)

    def takes(self, dtype: np.dtype) -> np.dtype:
        """The dtype of its input rows, for tokens of a dtype."""
        return computing_dtype(dtype)

    def factors(self, dtype: np.dtype) -> Factors:
        """The `Factors` of rows of a dtype for `together`, on a device."""
        return Factors(self.takes(dtype))

    @abstractmethod
    def __call__(self, rows: Array, out: Array | None = None) -> Array:
        """Compute the expert on rows (m, d); into `out` (m, d_out), of the computing dtype, when it
        is given."""

    @staticmethod
    def together(
        experts: Sequence[Any], rows: Array, bounds: device_kernel.Bounds, out: Array
    ) -> None:
        """On a device: compute experts of one batch key, each on its own contiguous rows.

        All are of this class, as their key is equal. Rows are as `factors` returns; `out` has the
        computing dtype.
        """
        for expert, (start, stop) in zip(experts, bounds, strict=True):
            expert(rows[start:stop], out=out[start:stop])


class Linear(Expert):
    """The expert `rows @ W`; a `W` of another dtype is converted at each use, and not kept.

    A bfloat16 `W` is not converted on a host that multiplies bfloat16 faster (`bfloat16`), nor is
    a `W` of 16 bits on a device (`operands`).
    """

    def __init__(self, W: Matrix, precision: str = "float32"):
        self.W, self._precision = aligned(W), precision
        self.d, self.d_out = W.shape
        self._on_device = not isinstance(W, (np.ndarray, Packed))
        self._in_16_bits = not self._on_device and bfloat16.serves(W)

    @property
    def is_rounded(self) -> bool:
        """Whether float32 rows are rounded for a product of 16 bits."""
        return self._in_16_bits and bfloat16.PARTS[self._precision] == 1

    @property
    def batch_key(self) -> Hashable:
        return Linear, self.W.shape, self.W.dtype, self._precision

    @staticmethod
    def together(
        experts: Sequence[Linear], rows: Array, bounds: device_kernel.Bounds, out: Array
    ) -> None:
        one, matrices = experts[0], [expert.W for expert in experts]
        exact = bfloat16.PARTS[one._precision] > 1 and out.dtype.itemsize > 2
        rows = device_kernel.as_factors(rows, one.factors(rows.dtype))
        device_kernel.products(rows, matrices, bounds, out, exact)

    def takes(self, dtype: np.dtype) -> np.dtype:
        as_it_is = self.W.dtype == dtype if self._on_device else dtype == BFLOAT16
        taken = self._on_device or self._in_16_bits
        return dtype if taken and as_it_is else computing_dtype(dtype)

    def factors(self, dtype: np.dtype) -> Factors:
        return factors(dtype, self.W.dtype, self._precision)

    def __call__(self, rows: Array, out: Array | None = None) -> Array:
        if self._on_device:
            if out is None:
                dtype = computing_dtype(rows.dtype)
                out = namespace(rows).empty((len(rows), self.d_out), dtype=dtype)
            self.together([self], rows, [(0, len(rows))], out)
            return out
        if self._in_16_bits and rows.dtype in (BFLOAT16, np.float32):
            return bfloat16.multiply(rows, self.W, out, self._precision)
        W = self.W
        if isinstance(W, Packed) and rows.dtype != W.dtype:
            W = W.library.widened(W)
        if not isinstance(W, Packed):
            W = W.astype(rows.dtype, copy=False)
        return product(rows, W, out)


def lays_out(dtype: np.dtype, is_bfloat16: bool, transposed: bool) -> bool:
    """Whether `laid_out` copies matrices on this machine, by dtype and orientation.

    Parameters
    ----------
    dtype : that is computed in
    is_bfloat16 : whether the matrices are
    transposed : whether they are stored as (d_out, d)
    """
    if is_bfloat16 and dtype == np.float32:
        return blas.bfloat16_library() is not None
    return dtype == np.float32 and transposed and isinstance(blas.faster_than_numpy(), OneDnn)


def laid_out(W: Array) -> Matrix:
    """Pack a matrix in the layout that this host's products read, if there is one that takes no
    more bytes; else return it unchanged."""
    library, W = None, aligned(W)
    if isinstance(W, np.ndarray) and W.dtype == np.float32:
        library = blas.packing_library(W)
    elif bfloat16.serves(W):
        library = blas.bfloat16_library()
    packed = None if library is None else library.pack(W)
    return W if packed is None else packed


def gated_in_one_go(
    rows: np.ndarray, gate: Linear, up: Linear, alpha: float, *, rounded: bool
) -> np.ndarray | None:
    """Compute silu(rows @ gate) * (rows @ up) (m, f) in one step; None if that is not supported.

    Parameters
    ----------
    rows : (m, d)
    gate, up : experts whose matrices are `laid_out`
    alpha : of silu
    rounded : whether to return bfloat16, for a product that would round it; else float32
    """
    W, V = gate.W, up.W
    if not (isinstance(W, Packed) and isinstance(V, Packed)) or len(rows) == 0:
        return None
    if rows.dtype != W.dtype or rows.dtype != V.dtype:
        return None
    if rows.dtype == BFLOAT16 and bfloat16.has_rows_apart(rows):
        return None
    out = memory.empty((len(rows), up.d_out), BFLOAT16 if rounded else np.float32)
    return out if W.library.gated(rows, W, V, out, alpha) else None


class Function(Expert):
    """A user's own function (m, d) -> (m, d_out); the rows that it gets are read-only.

    `place` is its name in errors.
    """

    def __init__(self, function: Callable[[Array], Array], place: str):
        self._function, self._place = function, place
        self.d = self.d_out = 0  # until it is probed
        self._probed: tuple[Any, ...] | None = None

    def probe(self, d: int, like: Array, dtype: np.dtype) -> None:
        """Learn d_out from rows (0, d) of this kind, unless it is known already."""
        wanted = d, type(like), dtype
        if self._probed != wanted:
            self.d = d
            none = namespace(like).empty((0, d), dtype=dtype)
            self.d_out = self._checked(self._function(none), m=0, d_out=None).shape[1]
            self._probed = wanted

    def _checked(self, y: Array, *, m: int, d_out: int | None) -> Array:
        shape = getattr(y, "shape", None)
        if shape is None or len(shape) != 2 or shape[0] != m or d_out not in (None, shape[1]):
            came = f"shape {shape}" if shape is not None else f"a {type(y).__name__}"
            raise ValueError(
                f"{self._place} must map rows (m, d) to rows (m, d_out) for any m, 0 included: "
                f"rows ({m}, {self.d}) must give ({m}, {'d_out' if d_out is None else d_out}), "
                f"but gave {came}"
            )
        refuse_masked(y, f"rows that {self._place} gives")
        if y.dtype.kind not in "iub" and not is_float(y.dtype):
            raise TypeError(
                f"{self._place} must give rows of real numbers, but gave {y.dtype}; of complex "
                "ones return the real part, or both parts side by side"
            )
        return y

    def __call__(self, rows: Array, out: Array | None = None) -> Array:
        if isinstance(rows, np.ndarray):
            rows = rows.view()
            rows.flags.writeable = False
        y = self._checked(self._function(rows), m=len(rows), d_out=self.d_out or None)
        if out is None:
            return y
        out[...] = y.astype(out.dtype, copy=False)
        return out


def as_local_experts(
    expert_Ws: Array, *, d: int, like: Array, dtype: np.dtype, d_out: int | None = None
) -> Sequence[Expert]:
    """Make `Expert`s of matrices, a stacked array, callables, or experts; check their widths.

    `d_out` is the width of their outputs, if known.
    """
    refuse_masked(expert_Ws, "expert_Ws")
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
    if d_out is not None:
        check_width(experts[0].d_out, d_out)
    return experts


def check_width(width: int, d_out: int) -> None:
    """Refuse experts whose output width is not the one that the graph was built with."""
    if width != d_out:
        raise ValueError(
            f"the experts must give rows of width {d_out}, but gave {width}; use "
            f"Experts.callables(functions, d_out={width})"
        )


def _as_expert(W: Any, place: str, *, d: int, like: Array, dtype: np.dtype) -> Expert:
    if callable(W) and not isinstance(W, Expert):
        W = Function(W, place)
    if isinstance(W, Function):
        W.probe(d, like, dtype)
    if isinstance(W, Expert):
        return W
    if is_array(W):
        refuse_masked(W, place)
        if W.ndim != 2:
            raise ValueError(f"{place} must be a (d, d_out) matrix, but has shape {W.shape}")
        if not is_float(W.dtype):
            raise TypeError(f"{place} must hold floats, but has dtype {W.dtype}")
        return Linear(W)
    raise TypeError(
        f"{place} must be a (d, d_out) matrix, an Expert, or a callable (m, d) -> (m, d_out), "
        f"but is a {type(W).__name__}"
    )
