"""Which rows of an output are verified?

    both ends of every block │ a row of every expert │ rows at random

Only these rows of the output and of the inputs are read.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from dask_ep.jobs.build import Inputs
from dask_ep.storage import journal
from dask_ep.storage.output import progress_directory
from dask_ep.storage.sources import Source, ZarrSource


def sample_rows(inputs: Inputs, starts: np.ndarray, rows: int, seed: int) -> np.ndarray:
    """Choose about `rows` rows: at block ends, of every expert, and at random.

    Parameters
    ----------
    inputs : of the job
    starts : (blocks + 1,) the first row of each block, and n
    rows, seed : see `verify_job`

    Returns
    -------
    (m,) int64, ascending, without repeats
    """
    n = inputs.tokens.shape[0]
    if rows >= n:
        return np.arange(n)
    random = np.random.default_rng(seed)
    ends = np.concatenate([starts[:-1], starts[1:] - 1])
    if len(ends) > rows // 2:
        ends = random.choice(ends, rows // 2, replace=False)
    of_experts = np.empty(0, np.int64)
    if inputs.routing is not None:
        of_experts = find_rows_of_experts(inputs.routing, inputs.experts.num_experts)
    special = np.union1d(ends, of_experts)
    more = max(0, rows - len(special))
    return np.union1d(special, random.choice(n, more, replace=False)).astype(np.int64)


def find_rows_of_experts(routing: Source, num_experts: int) -> np.ndarray:
    """Find a row of each expert that has any; reads only as much of the routing as necessary.

    Examples
    --------
    >>> from dask_ep.storage.sources import open_source
    >>> routing = open_source(np.array([[0, 0], [2, 0], [2, -1], [1, 2]]))
    >>> find_rows_of_experts(routing, 4).tolist()
    [0, 3, 1]
    """
    found = np.full(num_experts, -1, np.int64)
    k = int(np.prod(routing.shape[1:]))
    for start, block in routing.blocks():
        experts, at = np.unique(block, return_index=True)
        good = (experts >= 0) & (experts < num_experts)
        experts, at = experts[good], at[good]
        is_new = found[experts] < 0
        found[experts[is_new]] = start + at[is_new] // k
        if (found >= 0).all():
            break
    return found[found >= 0]


def read_rows(source: Source, rows: np.ndarray) -> np.ndarray:
    """Read single rows, ascending, with one read for each run of neighbours or stored chunk.

    Examples
    --------
    >>> from dask_ep.storage.sources import open_source
    >>> read_rows(open_source(np.arange(10) ** 2), np.array([2, 3, 7])).tolist()
    [4, 9, 49]
    """
    plain = not isinstance(source, ZarrSource) or source.files is not None
    together = rows - np.arange(len(rows)) if plain else rows // source.chunk_rows
    bounds = [0, *(np.flatnonzero(np.diff(together)) + 1), len(rows)]
    parts = [
        source.read(int(rows[first]), int(rows[last - 1]) + 1)[rows[first:last] - rows[first]]
        for first, last in pairwise(bounds)
        if last > first
    ]
    return np.concatenate(parts) if parts else source.read(0, 0)


def block_starts(path: str, output: Source) -> np.ndarray:
    """Return the first row of each block of the output, and the number of rows."""
    manifest = journal.read_manifest(progress_directory(path))
    n = output.shape[0]
    if manifest is not None and sum(manifest["rows"]) == n:
        return np.concatenate([[0], np.cumsum(manifest["rows"])]).astype(np.int64)
    return np.append(np.arange(0, n, output.chunk_rows or max(1, n)), n).astype(np.int64)
