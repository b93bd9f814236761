"""What does a job look like, with data that behaves like real data?

`write_example` writes a job file and all files that it names: token rows made of real text (see
`example_text`), their routing by a random router, and experts. Everything is written block by
block, so that 100 GB take no more memory than 100 MB.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
from dask.utils import format_bytes

from dask_ep.jobs.example_text import TokenRows
from dask_ep.layers.scores import largest, softmax
from dask_ep.storage.files import bytes_below
from dask_ep.storage.replace import is_replaceable, remove
from dask_ep.storage.writers import Writer, make_writer

FORMATS = ("zarr", "npy", "safetensors")
EXAMPLE_KINDS = ("linear", "gated")
JOB_NAME = "job.toml"

_CHUNK_BYTES = 16 << 20  # of tokens; a chunk and its temporaries stay within a few hundred MB
_FEWEST_CHUNKS = 8  # so that even a small example runs on several threads, and can be stopped
_ROUTER_STREAM, _EXPERT_STREAM = 1 << 40, 1 << 41  # beyond the streams that `TokenRows` uses

OnProgress = Callable[[int, int, str], None]
"""Called with (bytes written, bytes in total, name of the file)."""


@dataclass(frozen=True)
class Example:
    """The sizes of an example. Axis letters: n rows, d width, E experts, k slots, f hidden."""

    rows: int = 50_000
    d: int = 256
    num_experts: int = 16
    k: int = 2
    kind: str = "linear"
    hidden: int | None = None
    #: width between gate and down of gated experts; None means 2 * d
    chunk_rows: int | None = None
    #: token rows stored together; None means 16 MiB of them, less for small examples
    format: str = "zarr"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rows", "d", "num_experts", "k", "hidden", "chunk_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, but is {value}")
        if not 0 <= self.seed < 1 << 64:
            raise ValueError(f"seed must be in [0, 2**64), but is {self.seed}")
        if self.k > self.num_experts:
            raise ValueError(
                f"k must be at most the number of experts, but k={self.k} slots cannot go to "
                f"different ones of {self.num_experts} experts"
            )
        for name, allowed in (("kind", EXAMPLE_KINDS), ("format", FORMATS)):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}"
                )

    @property
    def rows_per_chunk(self) -> int:
        """`chunk_rows`, or its default."""
        if self.chunk_rows is not None:
            return self.chunk_rows
        large = max(1, _CHUNK_BYTES // (4 * self.d))
        small = -(-self.rows // _FEWEST_CHUNKS)
        return min(large, max(256, -(-small // 256) * 256))

    def matrices(self) -> dict[str, tuple[int, int, int]]:
        """Return the shapes of the expert weights, by their key in the job."""
        E, d, f = self.num_experts, self.d, 2 * self.d if self.hidden is None else self.hidden
        if self.kind == "linear":
            return {"w": (E, d, d)}
        return {"gate": (E, d, f), "up": (E, d, f), "down": (E, f, d)}

    def nbytes(self) -> int:
        """Return the bytes that the example's data takes on disk."""
        weights = 4 * sum(map(prod, self.matrices().values()))
        return weights + self.rows * (4 * self.d + (4 + 4) * self.k)


def write_example(
    directory: str | os.PathLike,
    example: Example,
    *,
    overwrite: bool = False,
    on_progress: OnProgress | None = None,
) -> Path:
    """Write a job and its data into a directory.

    Parameters
    ----------
    directory : created if it does not exist
    example : the sizes
    overwrite : whether to replace an existing example
    on_progress : called after each block with (bytes written, bytes in total, file name)

    Returns
    -------
    path of the job file, which is written last: if it exists, the data is complete

    Raises
    ------
    FileExistsError
        If the job file, or one of the data files, exists and must not be overwritten, or is not of
        an example.
    OSError
        If the disk has too little free space.

    Notes
    -----
    The same `Example` gives the same bytes on every machine with the same Python and NumPy. Memory:
    the table of word vectors (32 MiB to 64 MiB for d up to 4096) and two token chunks.

    Examples
    --------
    >>> import tempfile
    >>> from dask_ep.jobs.example import Example, write_example
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     write_example(directory, Example(rows=100, d=8, num_experts=4)).name
    'job.toml'
    """
    directory = Path(directory)
    keys = ("tokens", "routing", "topk_weights", *example.matrices())
    names = {key: f"{key}.{example.format}" for key in keys}
    nbytes = example.nbytes()
    _make_room(directory, [JOB_NAME, *names.values()], nbytes, overwrite)
    progress = _Progress(nbytes, on_progress)

    for key, shape in example.matrices().items():
        writer = _create(directory / names[key], shape, np.float32, 1)
        for expert, weights in enumerate(_expert_weights(example, key)):
            writer.write(weights[None], expert, sync=False)
            progress.add(weights.nbytes, names[key])

    k, n = example.k, example.rows
    arrays = {
        "tokens": ((n, example.d), np.float32),
        "routing": ((n, k), np.int32),
        "topk_weights": ((n, k), np.float32),
    }
    files = {
        key: _create(directory / names[key], shape, dtype, example.rows_per_chunk)
        for key, (shape, dtype) in arrays.items()
    }
    for start, blocks in _token_blocks(example):
        for key, block in blocks.items():
            files[key].write(block, start, sync=False)
            progress.add(block.nbytes, names[key])

    job = directory / JOB_NAME
    job.write_text(_job_text(example, names), encoding="utf-8")
    return job


# --- the numbers -----------------------------------------------------------------------------


def _token_blocks(example: Example) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Yield the first row and the arrays of each block, in order."""
    text = TokenRows(example.d, example.seed)
    random = np.random.Generator(np.random.Philox(key=[example.seed, _ROUTER_STREAM]))
    router = random.standard_normal((example.d, example.num_experts), dtype=np.float32)
    router /= np.sqrt(np.float32(example.d))
    tokens = np.empty((min(example.rows_per_chunk, example.rows), example.d), np.float32)
    for start in range(0, example.rows, example.rows_per_chunk):
        block = tokens[: example.rows - start]
        text.fill(block)
        routing, weights = choose_experts(block @ router, example.k)
        yield start, {"tokens": block, "routing": routing, "topk_weights": weights}


def choose_experts(logits: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Choose the k largest logits of each row, largest first, and their softmax.

    Parameters
    ----------
    logits : (n, E) float32
    k : int, at most E

    Returns
    -------
    routing : (n, k) int32
    topk_weights : (n, k) float32, which add up to 1 in each row

    Examples
    --------
    >>> routing, weights = choose_experts(np.float32([[0.0, 3.0, 3.0], [9.0, 0.0, -1.0]]), 2)
    >>> sorted(routing[0].tolist()), routing[1].tolist(), weights[0].tolist()
    ([1, 2], [0, 1], [0.5, 0.5])
    """
    routing = largest(np, logits.copy(), k)
    return routing, softmax(np, np.take_along_axis(logits, routing, axis=1))


def _expert_weights(example: Example, key: str) -> Iterator[np.ndarray]:
    """Return one matrix (in, out) per expert, scaled so that outputs are as large as inputs."""
    _, width, d_out = example.matrices()[key]
    matrix = list(example.matrices()).index(key)
    for expert in range(example.num_experts):
        stream = _EXPERT_STREAM + matrix * example.num_experts + expert
        random = np.random.Generator(np.random.Philox(key=[example.seed, stream]))
        weights = random.standard_normal((width, d_out), dtype=np.float32)
        weights /= np.sqrt(np.float32(width))
        yield weights


# --- the files -------------------------------------------------------------------------------


def _create(path: Path, shape: tuple[int, ...], dtype: type, chunk_rows: int) -> Writer:
    n = shape[0]
    blocks = [min(chunk_rows, n - start) for start in range(0, n, chunk_rows)]
    writer = make_writer(os.fspath(path), shape, np.dtype(dtype), blocks)
    writer.create()
    return writer


def _make_room(directory: Path, names: list[str], nbytes: int, overwrite: bool) -> None:
    """Make the directory; remove files to be overwritten, the job file first."""
    there = [name for name in names if (directory / name).exists()]
    if there and not overwrite:
        raise FileExistsError(
            f"{directory} already holds {', '.join(there)}; choose another directory, or use "
            "overwrite (--overwrite)"
        )
    if foreign := [name for name in there if not _is_of_example(directory / name)]:
        raise FileExistsError(
            f"{directory} holds {', '.join(foreign)} of something else than an example, so nothing "
            "is overwritten; choose another directory"
        )
    disk = next(place for place in (directory, *directory.resolve().parents) if place.exists())
    free = shutil.disk_usage(disk).free
    free += sum(bytes_below(os.fspath(directory / name)) for name in there)
    if nbytes > free:
        raise OSError(
            f"the example needs {format_bytes(nbytes)}, but {directory} has {format_bytes(free)} "
            "free; ask for fewer rows, or use another disk"
        )
    directory.mkdir(parents=True, exist_ok=True)
    for name in there:
        remove(os.fspath(directory / name))


def _is_of_example(path: Path) -> bool:
    """Return whether a file or directory of an example's name may belong to one."""
    if path.name != JOB_NAME:
        return is_replaceable(os.fspath(path))
    try:
        return re.match(r"# \d+ token rows of width \d+\n", path.read_text()) is not None
    except (OSError, ValueError):
        return False


class _Progress:
    def __init__(self, total: int, tell: OnProgress | None):
        self._done, self._total, self._tell = 0, total, tell

    def add(self, nbytes: int, name: str) -> None:
        self._done += nbytes
        if self._tell is not None:
            self._tell(self._done, self._total, name)


def _job_text(example: Example, names: dict[str, str]) -> str:
    quoted = {key: json.dumps(name) for key, name in names.items()}
    lines = [
        f"# {example.rows} token rows of width {example.d}",
        f"# through {example.k} of {example.num_experts} {example.kind} experts each.",
        "# Paths are relative to this file. Every key is an option of `dask-ep run` as well.",
        "",
        f"tokens = {quoted['tokens']}",
        f"routing = {quoted['routing']}",
        f"topk_weights = {quoted['topk_weights']}",
        f'out = "out.{example.format}"',
        "",
        "[experts]",
        f'kind = "{example.kind}"',
        *(f"{key} = {quoted[key]}" for key in example.matrices()),
        "transposed = false",
    ]
    return "\n".join(lines) + "\n"
