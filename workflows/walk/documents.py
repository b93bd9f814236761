"""Which tokens go through the model together?

    text, ids or requests ──> documents of at most `length` tokens ──> rows, back to back (N,)
                                                                       │
    token chunks: whole documents, about `rows` rows each  <───────────┘
    batches of a chunk: documents of about one length, padded at the end to the longest

Stored rows are packed without padding. Attention runs on a batch in which each document is a
separate sequence, so no document attends to another one, whatever the kind of attention. No mask is
needed either: a causal model never attends to the padding that follows a token.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dask_ep.storage.sources import Source, open_safetensors, open_source

AT_ONCE = 2
"""Token chunks in a block at a time: while one is being read or written, or runs code that takes
only one thread, the other one computes."""

MAX_PADDING = 1 / 32
"""Fraction of a batch that may be padding."""


class Documents(NamedTuple):
    """Token ids of all documents, back to back, and the length of each."""

    ids: np.ndarray
    #: (N,) int64
    lengths: np.ndarray
    #: (D,) int64, of each document; they add up to N


# --- reading ---------------------------------------------------------------------------------


def read_documents(text: str, length: int, tokenize: Callable[[list[str]], list]) -> Documents:
    """Read the documents that go through the model.

    Parameters
    ----------
    text : a directory with vLLM's files of hidden states, one per request; or token ids as ``.npy``
        or ``.zarr``, (sequences, length), where negative ids at the end of a sequence are padding;
        or a text file with one document per line
    length : maximum tokens of a document; longer ones are cut into several documents, but requests
        are refused, since the hidden states of a token depend on all before it
    tokenize : function from a list of lines to the token ids of each

    Raises
    ------
    ValueError, OSError
        If there is nothing to read, or it is not valid; the message says where.
    """
    if os.path.splitext(text)[1] in (".npy", ".zarr"):
        sequences = _sequences_of_ids(text)
    elif os.path.isdir(text):
        sequences = _sequences_of_requests(text, length)
    else:
        sequences = _sequences_of_text(text, tokenize)
    pieces = [piece for ids in sequences for piece in _cut(ids, length)]
    if not pieces:
        raise ValueError(f"{text} must hold at least one token")
    return Documents(np.concatenate(pieces), np.array([len(piece) for piece in pieces]))


def _cut(ids: np.ndarray, length: int) -> Iterator[np.ndarray]:
    for start in range(0, len(ids), length):
        yield ids[start : start + length]


def _sequences_of_requests(directory: str, length: int) -> list[np.ndarray]:
    sequences = [read_ids(path) for path in request_files(directory)]
    longest = max(map(len, sequences))
    if longest > length:
        raise ValueError(
            f"requests are not cut, and the longest of {directory} has {longest} tokens: set "
            f"--length to at least that, not {length}"
        )
    return sequences


def _sequences_of_text(path: str, tokenize: Callable[[list[str]], list]) -> Iterator[np.ndarray]:
    with open(path, encoding="utf-8") as file:
        lines = [line.strip() for line in file if line.strip()]
    for first in range(0, len(lines), 1000):
        for ids in tokenize(lines[first : first + 1000]):
            yield np.asarray(ids, dtype=np.int64)


def _sequences_of_ids(path: str) -> Iterator[np.ndarray]:
    source = open_source(path)
    if source.ndim != 2 or source.dtype.kind not in "iu":
        raise ValueError(
            f"{path} must hold token ids, (sequences, length) integers, but has shape "
            f"{source.shape} and dtype {source.dtype}"
        )
    for s in range(source.shape[0]):
        ids = source.read(s, s + 1)[0].astype(np.int64)
        real = int(np.count_nonzero(ids >= 0))
        if (ids[:real] < 0).any():
            raise ValueError(
                f"sequence {s} of {path} must have its padding (negative ids) at the end, but has "
                f"a negative id at position {int(np.argmax(ids < 0))}, before a token"
            )
        yield ids[:real]


# --- hidden states from vLLM -----------------------------------------------------------------


def request_files(directory: str) -> list[str]:
    """Return the files of vLLM's ``extract_hidden_states``, one per request, sorted by name."""
    found = sorted(str(path) for path in Path(directory).glob("*.safetensors"))
    if not found:
        raise ValueError(
            f"{directory} must hold a .safetensors file for each request, as vLLM's "
            "extract_hidden_states writes them, but has none"
        )
    return found


def read_ids(path: str) -> np.ndarray:
    """Read the token ids of a request."""
    source = _tensor(path, "token_ids")
    return source.read(0, source.shape[0]).astype(np.int64).reshape(-1)


def hidden_sources(directory: str) -> list[Source]:
    """Return the hidden states of each request, with all their layers, from headers alone."""
    return [_tensor(path, "hidden_states") for path in request_files(directory)]


def hidden_shape(path: str, column: int) -> tuple[int, int]:
    """Return the shape (n, d) of what `read_hidden` returns, from headers alone.

    Raises
    ------
    ValueError
        If the layer is not in the file, or its hidden states and token ids differ in number.
    """
    source, ids = _tensor(path, "hidden_states"), _tensor(path, "token_ids")
    if source.ndim != 3 or not 0 <= column < source.shape[1]:
        raise ValueError(
            f"{source.name} must be (tokens, layers, d) with layer number {column}, counted from 0,"
            f" but has shape {source.shape}"
        )
    if source.shape[0] != prod(ids.shape):
        raise ValueError(
            f"{path} must hold the hidden states of each token, but has {prod(ids.shape)} "
            f"token_ids and hidden states of {source.shape[0]} tokens"
        )
    return source.shape[0], source.shape[2]


def read_hidden(path: str, column: int, dtype: np.dtype) -> np.ndarray:
    """Read the hidden states (n, d) of a request's tokens, from one of the layers in the file."""
    source = _tensor(path, "hidden_states")
    return source.read(0, source.shape[0])[:, column].astype(dtype)


def _tensor(path: str, name: str) -> Source:
    tensors = open_safetensors(path)
    if name not in tensors:
        raise ValueError(
            f"{path} must hold token_ids and hidden_states, as vLLM's extract_hidden_states writes "
            f"them, but has {', '.join(sorted(tensors)) or 'nothing'}"
        )
    return tensors[name]


# --- chunks and batches ----------------------------------------------------------------------


def chunk_documents(lengths: Sequence[int], rows: int) -> list[int]:
    """Put whole documents, in order, into token chunks of at most `rows` rows.

    Returns
    -------
    list of int, the number of documents in each chunk; a longer document gets its own chunk.
    There are as few chunks as possible, rounded up to a multiple of `AT_ONCE`, of about equal
    size: no chunk is computed alone at the end.

    Examples
    --------
    >>> chunk_documents([3, 3, 5, 9, 1, 1], 12)
    [3, 3]
    >>> chunk_documents([1] * 9, 8)
    [5, 4]
    """
    ends = np.cumsum(lengths)
    fewest = len(_fill(ends, rows))
    most = -(-fewest // AT_ONCE) * AT_ONCE
    limits = range(1, rows + 1)
    enough = bisect_left(limits, True, key=lambda limit: len(_fill(ends, limit)) <= most)
    return _fill(ends, limits[enough])


def _fill(ends: np.ndarray, rows: int) -> list[int]:
    """Return the number of documents in each chunk, with as many as fit into `rows` rows."""
    counts, first, start = [], 0, 0
    while first < len(ends):
        last = max(int(np.searchsorted(ends, start + rows, "right")), first + 1)
        counts.append(last - first)
        first, start = last, int(ends[last - 1])
    return counts


def batch_documents(
    lengths: Sequence[int], tokens: int, padding: float = MAX_PADDING
) -> list[np.ndarray]:
    """Group a chunk's documents into batches for attention.

    Parameters
    ----------
    lengths : of the documents
    tokens : maximum of a batch, padding included; a longer document gets its own batch
    padding : the fraction of a batch that may be padding

    Returns
    -------
    list of arrays of document numbers, longest first

    Examples
    --------
    >>> batch_documents([5, 16, 15, 5], 64)
    [array([1, 2]), array([0, 3])]
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    batches: list[list[int]] = []
    longest = real = 0
    for d in order:
        length = int(lengths[d])
        count = len(batches[-1]) + 1 if batches else 1
        full = count * longest > tokens or real + length < (1 - padding) * count * longest
        if not batches or full:
            batches.append([])
            longest, real = length, 0
        batches[-1].append(int(d))
        real += length
    return [np.array(batch) for batch in batches]


def next_tokens(documents: Documents) -> np.ndarray:
    """Return the id of the token after each one, (N,); -1 at the end of a document."""
    targets = np.full(len(documents.ids), -1, dtype=np.int64)
    targets[:-1] = documents.ids[1:]
    targets[np.cumsum(documents.lengths) - 1] = -1
    return targets


def spans(counts: Iterable[int]) -> list[tuple[int, int]]:
    """Turn counts into consecutive ranges (start, stop).

    Examples
    --------
    >>> spans([2, 1])
    [(0, 2), (2, 3)]
    """
    ends = np.cumsum(list(counts)).tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))
