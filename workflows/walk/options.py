"""What are the options of a walk, and which of them decide its values?"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
from dask.system import CPU_COUNT

from dask_ep.jobs.backends import ALL_THREADS, Threads, Where
from dask_ep.storage.fingerprint import describe
from walk.documents import MAX_PADDING, Documents, chunk_documents, hidden_sources
from walk.record import fingerprint, hash_arrays


@dataclass(frozen=True)
class Options:
    """The options of ``walk_model.py``, under the same names."""

    model: str
    text: str
    out: str
    layers: range | None = None
    save: frozenset[str] = frozenset()
    collect: frozenset[str] = frozenset()
    compare: str | None = None
    length: int = 2048
    chunk_rows: int = 4096
    batch_tokens: int = 1024
    dtype: str = "auto"
    precision: str = "auto"
    start: int | None = None
    column: int = 0
    where: Where = ALL_THREADS
    resume: bool = False

    @property
    def models(self) -> list[str]:
        return [os.path.realpath(m) for m in (self.model, self.compare) if m is not None]

    @property
    def threads(self) -> int:
        """The number of threads of this process."""
        return (isinstance(self.where, Threads) and self.where.count) or CPU_COUNT

    def precision_for(self, dtype: Any) -> str:
        """Return the precision of products in MoE modules, for hidden states of a torch dtype."""
        if self.precision != "auto":
            return self.precision
        return "bfloat16" if str(dtype) == "torch.bfloat16" else "float32"

    def decisive(self, read: Documents) -> dict:
        """Return everything that decides the walk's values and which of them are kept."""
        return {
            "models": [fingerprint(model) for model in self.models],
            "documents": hash_arrays(*read),
            "layers": self.layers and [self.layers[0], self.layers[-1]],
            "save": sorted(self.save),
            "collect": sorted(self.collect),
            "chunk_rows": self.chunk_rows,
            "token_chunks": hash_arrays(np.array(chunk_documents(read.lengths, self.chunk_rows))),
            "batch_tokens": self.batch_tokens,
            "padding": MAX_PADDING,
            "dtype": self.dtype,
            "precision": self.precision,
            "start": self.start,
            "hidden_states": self.start is not None and describe(hidden_sources(self.text)),
            "column": self.column,
            "threads": self.threads,
            "on_workers": not isinstance(self.where, Threads),
        }

    def blocks(self, counts: list[int]) -> range:
        """Return the blocks to walk through.

        Parameters
        ----------
        counts : number of blocks of each model

        Raises
        ------
        ValueError
            If the models differ in their number of blocks, or lack some that were asked for.
        """
        if len(set(counts)) > 1:
            raise ValueError(
                "models that are compared must have the same number of blocks, but they have "
                f"{counts[0]} and {counts[1]}"
            )
        first, last = self.start or 0, self.layers[-1] if self.layers else counts[0] - 1
        if last >= counts[0] or first > last or (self.layers and self.layers[0] < first):
            raise ValueError(
                f"the blocks of a walk must be in [{first}, {counts[0]}), those of {self.model}"
                f"{' from --start on' if first else ''}, but are "
                f"{self.layers[0] if self.layers else first} to {last}; change --layers or --start"
            )
        return range(first, last + 1)
