"""What does the task of one token chunk do, in any process?

A task gets only rows and paths; the model is opened once in each process.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from distributed import WorkerPlugin

from walk import block, head
from walk.documents import AT_ONCE, chunk_documents, spans
from walk.model import Model, open_model


class TorchThreads(WorkerPlugin):
    """Divides a worker's threads among the tasks that compute at a time."""

    name = "walk-torch-threads"
    idempotent = True

    def setup(self, worker: Any) -> None:
        torch.set_num_threads(-(-worker.state.nthreads // AT_ONCE))


@dataclass(frozen=True)
class Task:
    """What all tasks of one stage share.

    Attributes
    ----------
    directory, dtype : of the model
    out : directory with the documents' token ids and lengths
    chunk_rows : maximum of a token chunk, see `chunk_documents`
    batch_tokens : maximum of a batch, see `batch_documents`
    precision : of the products in MoE modules
    block : number of the decoder block
    kept : directory of the operations recorded by `attend`
    handed_on : directory of what blocks hand on besides hidden states
    version : of the model, see `open_model`
    """

    directory: str
    dtype: str
    out: str
    chunk_rows: int
    batch_tokens: int
    precision: str = "float32"
    block: int = 0
    kept: str = ""
    handed_on: str = ""
    version: str = ""

    def embed(self, ids: np.ndarray) -> np.ndarray:
        return block.embed(self.model, ids)

    def whole(self, *rows: np.ndarray, block_id: tuple[int, int]) -> np.ndarray:
        return block.whole(self.model, self.block, self._chunk(block_id), rows)

    def attend(self, *rows: np.ndarray, block_id: tuple[int, int]) -> np.ndarray:
        chunk, kept = self._chunk(block_id), self._kept(block_id)
        return block.attend(self.model, self.block, chunk, rows, kept)

    def finish(self, moe_rows: np.ndarray, block_id: tuple[int, int]) -> np.ndarray:
        return block.finish(self.model, self._chunk(block_id), moe_rows, self._kept(block_id))

    def last_norm(self, *rows: np.ndarray, block_id: tuple[int, int]) -> np.ndarray:
        return block.last_norm(self.model, self._chunk(block_id), rows)

    @property
    def model(self) -> Model:
        return open_model(self.directory, self.dtype, self.version)

    @property
    def lengths(self) -> str:
        """The path of the documents' lengths."""
        return os.path.join(self.out, "lengths.npy")

    @property
    def tokens(self) -> str:
        """The path of the documents' token ids, (n,)."""
        return os.path.join(self.out, "tokens.npy")

    def _chunk(self, block_id: tuple[int, int]) -> block.Chunk:
        changed = os.stat(self.lengths).st_mtime_ns
        lengths, chunks = _chunks(self.lengths, changed, self.chunk_rows)
        first, last = chunks[block_id[0]]
        start, stop = int(lengths[:first].sum()), int(lengths[:last].sum())
        return block.Chunk(
            number=block_id[0],
            ids=np.array(np.load(self.tokens, mmap_mode="r")[start:stop]),
            lengths=lengths[first:last].tolist(),
            batch_tokens=self.batch_tokens,
            handed_on=self.handed_on,
        )

    def _kept(self, block_id: tuple[int, int]) -> str:
        return os.path.join(self.kept, f"{block_id[0]:06d}.pt")


@dataclass(frozen=True)
class Scoring:
    """What all tasks that score rows share.

    Attributes
    ----------
    tasks : of the model, and of the one that it is compared with, if any
    vocabulary : first token id, and last + 1, of a part of the head
    """

    tasks: tuple[Task, ...]
    vocabulary: tuple[int, int]

    def __call__(self, *arrays: np.ndarray) -> np.ndarray:
        *rows, targets = arrays
        models = [task.model for task in self.tasks]
        return head.score(models, self.vocabulary, rows, targets[:, 0])


@lru_cache(maxsize=2)
def _chunks(path: str, _: int, chunk_rows: int) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Return the lengths of all documents, and which of them are in each token chunk.

    The second argument is the time of the file's change, as a worker may live longer than a walk.
    """
    lengths = np.load(path)
    return lengths, spans(chunk_documents(lengths, chunk_rows))
