"""How are a user's own functions used as experts?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import dask.array as da
import numpy as np
from dask.base import normalize_token

from dask_ep.arrays.namespaces import Array, namespace
from dask_ep.experts.local_experts import refuse_rows
from dask_ep.kernel.expert import Expert, Function


class CallableExperts:
    """Experts that are a user's functions; see `Experts.callables`."""

    kind, precision, is_bfloat16 = "callables", "float32", False
    d = hidden = dtype = None
    nbytes = parameters = widest = 0

    def __init__(self, functions: tuple[Callable[[Array], Array] | None, ...], d_out: int | None):
        for e, function in enumerate(functions):
            if isinstance(function, Expert):
                raise TypeError(
                    f"expert {e} must be a function, but is a loaded Expert; "
                    "pass the Experts that it was loaded from"
                )
            if function is not None and not callable(function):
                raise TypeError(f"expert {e} must be callable, but is a {type(function).__name__}")
        self.functions, self.d_out = functions, d_out

    @property
    def num_experts(self) -> int:
        return len(self.functions)

    def with_precision(self, precision: str) -> CallableExperts:
        if precision != self.precision:
            raise ValueError(
                f"precision must be {self.precision} for experts that are functions, which do "
                f"their own products, not {precision!r}"
            )
        return self

    def loaded_bytes(self, dtype: np.dtype, *, on_device: bool = False) -> int:
        return 0

    def __dask_tokenize__(self) -> object:
        return normalize_token(("CallableExperts", self.functions, self.d_out))

    def subset(self, ids: Sequence[int]) -> CallableExperts:
        return CallableExperts(
            tuple(self.functions[e] if e >= 0 else None for e in ids), self.d_out
        )

    def collections(self) -> dict[str, da.Array]:
        return {}

    def detached(self) -> CallableExperts:
        return self

    def load(
        self,
        experts: Sequence[int] | None = None,
        xp: Any = np,
        dtype: Any = np.float32,
        given: dict[str, Sequence[np.ndarray]] | None = None,
    ) -> list[Expert]:
        chosen = self if experts is None else self.subset(experts)
        return [
            Function(EmptyFunction(self.d_out) if function is None else function, f"expert_Ws[{e}]")
            for e, function in enumerate(chosen.functions)
        ]


class EmptyFunction:
    """A place that holds no function."""

    def __init__(self, d_out: int | None):
        self.d_out = d_out

    def __call__(self, rows: Array) -> Array:
        if len(rows):
            refuse_rows(rows)
        return namespace(rows).empty((0, self.d_out or rows.shape[1]), dtype=rows.dtype)
