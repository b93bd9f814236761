"""How does a rank hold more experts than fit into memory in float32?

As they are stored: bfloat16, FP8 with its scales, MXFP4. An expert is converted to float32 when
rows come, and each thread keeps only the last one.

    file ──.load()──> bytes as stored, in memory ──rows come──> one expert in float32, for a while

Half the memory of float32 for 16 bits, a quarter for FP8, an eighth for MXFP4, and the time of one
conversion per chunk and expert; none for bfloat16 where products support it (`bfloat16`). On a GPU
they are held in device memory, and decoded there.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from dask.base import normalize_token

from dask_ep.arrays.checks import computing_dtype
from dask_ep.arrays.namespaces import Array
from dask_ep.experts.experts import Experts
from dask_ep.experts.quantized import in_memory
from dask_ep.experts.together import Together
from dask_ep.experts.weights import Weight
from dask_ep.kernel.expert import Expert
from dask_ep.kernel.operands import Factors


def held_as_stored(experts: Experts) -> StoredExperts:
    """Return the same experts, which a rank then holds in memory as they are stored.

    Parameters
    ----------
    experts : Experts
        Not of Dask arrays, which have no stored form.

    Returns
    -------
    StoredExperts, which can be used wherever `Experts` can

    Notes
    -----
    Outputs are the same to the last bit. Each (chunk, expert) pair converts the expert once, which
    pays if an expert gets some hundred rows of a chunk: choose large chunks.

    Examples
    --------
    >>> import numpy as np
    >>> from dask_ep import Experts
    >>> experts = Experts.linear(np.ones((4, 8, 8), np.float16))
    >>> experts.load().nbytes, held_as_stored(experts).load().nbytes
    (1024, 512)
    """
    lazy = list(experts.collections())
    if lazy:
        raise ValueError(
            f"experts held as stored must be in files or NumPy arrays, but {', '.join(lazy)} is a "
            "Dask array"
        )
    return StoredExperts(experts.kind, experts.weights, experts.options)


class StoredExperts(Experts):
    """Experts that are loaded as they are stored; made by `held_as_stored`."""

    def held_bytes(self, dtype: np.dtype, *, on_device: bool = False) -> int:
        return self.nbytes

    def build(
        self, xp: Any, dtype: np.dtype, given: dict[str, Sequence[np.ndarray]]
    ) -> list[Expert]:
        lately = threading.local()
        reading = Together(partial(held_in_memory, self, e, xp) for e in range(self.num_experts))
        with self.joined() as is_remote:
            if xp is np and not is_remote:
                reading.invite()
            return [_StoredExpert(one, xp, dtype, lately) for one in reading.results()]

    def __dask_tokenize__(self) -> object:
        return normalize_token((type(self).__name__, super().__dask_tokenize__()))


class _StoredExpert(Expert):
    """One expert as stored. Converted when used, and kept until its thread uses another."""

    def __init__(self, one: Experts, xp: Any, dtype: np.dtype, lately: threading.local):
        self._one, self._xp, self._dtype, self._lately = one, xp, dtype, lately
        self.d, self.d_out = one.d, one.d_out
        self.apply_router_weight_on_input = one.options.get("apply_router_weight_on_input", False)

    @property
    def widest(self) -> int:
        return self._one.widest

    def takes(self, dtype: np.dtype) -> np.dtype:
        return self._loaded().takes(dtype)

    def factors(self, dtype: np.dtype) -> Factors:
        first = next(iter(self._one.weights.values()))  # on a device by dtypes: nothing is loaded
        held = first.loaded_dtype(self._dtype, on_device=True)
        return Factors(dtype if held == dtype else computing_dtype(dtype))

    @property
    def hidden(self) -> int | None:
        return self._one.hidden

    def __call__(self, rows: Array, out: Array | None = None, hidden: Array | None = None) -> Array:
        return self._loaded()(rows, out, **({} if hidden is None else {"hidden": hidden}))

    def activate(self, rows: Array, hidden: Array | None = None) -> Array:
        """The hidden activations of rows, written to `hidden` if given."""
        return self._loaded().activate(rows, hidden)

    def _loaded(self) -> Any:
        who, expert = getattr(self._lately, "expert", (None, None))
        if expert is None or who is not self:
            self._lately.expert = (None, None)  # free the memory of the previous one first
            expert = self._one.load(xp=self._xp, dtype=self._dtype)[0]
            self._lately.expert = (self, expert)
        return expert


def held_in_memory(experts: Experts, e: int, xp: Any = np) -> Experts:
    """Read one expert as it is stored, as `Experts` of that one only."""
    weights = {name: _hold_weight(weight, e, xp) for name, weight in experts.weights.items()}
    return Experts(experts.kind, weights, experts.options)


def _hold_weight(weight: Weight, e: int, xp: Any) -> Weight:
    number = weight.ids[e]
    if number < 0:  # an empty place, which no row may reach
        return Weight(weight.parts, (-1,))
    held = in_memory(*weight.place(number), xp)
    return Weight((held,) if isinstance(weight.parts, tuple) else held, (0,))
