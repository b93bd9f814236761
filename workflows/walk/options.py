"""What is asked of a walk, and what of it decides the values?"""

from __future__ import annotations

import os
from dataclasses import dataclass

from dask.system import CPU_COUNT

from dask_ep.jobs.backends import ALL_THREADS, Threads, Where
from walk.documents import Documents
from walk.record import fingerprint, hash_documents


@dataclass(frozen=True)
class Options:
    """What was asked for, by the names of the options of ``walk_model.py``."""

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
    precision: str = "float32"
    start: int | None = None
    column: int = 0
    where: Where = ALL_THREADS
    resume: bool = False

    @property
    def models(self) -> list[str]:
        return [os.path.realpath(m) for m in (self.model, self.compare) if m is not None]

    @property
    def threads(self) -> int:
        """Of this process."""
        return (isinstance(self.where, Threads) and self.where.count) or CPU_COUNT

    def decisive(self, read: Documents) -> dict:
        """All that decides the values of the walk, and what is kept of it."""
        return {
            "models": [fingerprint(model) for model in self.models],
            "documents": hash_documents(read),
            "layers": self.layers and [self.layers[0], self.layers[-1]],
            "save": sorted(self.save),
            "collect": sorted(self.collect),
            "chunk_rows": self.chunk_rows,
            "batch_tokens": self.batch_tokens,
            "dtype": self.dtype,
            "precision": self.precision,
            "start": self.start,
            "column": self.column,
            "threads": self.threads,
            "on_workers": not isinstance(self.where, Threads),
        }

    def blocks(self, counts: list[int]) -> range:
        """The blocks that are walked.

        Parameters
        ----------
        counts : how many blocks each model has

        Raises
        ------
        ValueError
            If the models differ, or have not the blocks that are asked for.
        """
        if len(set(counts)) > 1:
            raise ValueError(
                f"models can be compared block by block, but they have {counts[0]} and {counts[1]}"
            )
        first, last = self.start or 0, self.layers[-1] if self.layers else counts[0] - 1
        if last >= counts[0] or first > last or (self.layers and self.layers[0] < first):
            raise ValueError(
                f"blocks must be in [{first}, {counts[0]}), those of {self.model}"
                f"{' from --start' if first else ''}, but --layers asks for "
                f"{self.layers[0] if self.layers else first} to {last}"
            )
        return range(first, last + 1)
