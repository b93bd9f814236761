"""How are the missing blocks of an output written, and when is it complete?

    block of y ──> ep_store (write, then record) ──> receipt     one task per missing block
    all blocks recorded ──> finish ──> the output is renamed to its path

While it is being written, an output is in ``<path>.progress/``, with the record of what is done
(see `journal`); when the last block is done it is renamed to `path`, replacing what was there. So
`path` never has an incomplete output that could be taken for a complete one: unwritten rows of a
``.npy`` file, and missing chunks of a Zarr array, would read as zeros. During a run the unfinished
array can be inspected in that directory.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import uuid
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import dask
import dask.array as da
import numpy as np
import xxhash
from dask.base import DaskMethodsMixin
from dask.blockwise import Blockwise, BlockwiseDepDict, blockwise
from dask.callbacks import Callback
from dask.highlevelgraph import HighLevelGraph

from dask_ep.arrays.checks import count_not_finite
from dask_ep.arrays.device_streams import download
from dask_ep.errors import ReadError
from dask_ep.storage import journal
from dask_ep.storage.files import sync_path
from dask_ep.storage.fingerprint import fingerprint_of
from dask_ep.storage.lock_release import release_when_written
from dask_ep.storage.replace import is_replaceable, replace
from dask_ep.storage.sources import open_source
from dask_ep.storage.writers import Writer

SPILLED, SERVED = 0.05, 0.9
"""Fractions of a row that count as done when it has been spilled, and when its experts have served
it; the rest counts when it is written."""


class Receipt(NamedTuple):
    """Result of a block's task, when the block is written and recorded."""

    block: int
    rows: int
    nbytes: int
    worked: float = 0.0
    #: work on blocks that are not written yet, in rows: `SPILLED` or `SERVED` of each
    part: int = 0
    #: number of the receipt, if there are several for the work on a block
    not_finite: int = 0
    #: rows of the block that hold NaN or infinity
    first_not_finite: int = -1
    #: the first of them in the whole output; -1 without one
    path: str = ""
    #: path of the output whose block was written; "" if none was


class Step(DaskMethodsMixin):
    """A Dask collection of tasks that return receipts.

    Parameters
    ----------
    graph : of the tasks and their dependencies
    keys : of the tasks
    """

    missing: Sequence[Any]
    #: what is left to do

    def __init__(self, graph: Mapping, keys: list, rename: Mapping | None = None):
        self._graph = graph
        self._keys = self.missing = [(rename or {}).get(key, key) for key in keys]

    def compute(
        self, on_block: Callable[[Receipt], Any] | None = None, **kwargs: Any
    ) -> list[Receipt]:
        """Do the tasks; the arguments are those of `Output.compute`."""
        if not self._keys:
            return []
        watch = None if on_block is None else _Watch(on_block)
        with watch or contextlib.nullcontext():
            (receipts,) = dask.compute(self, **kwargs)
        if watch is not None:
            for receipt in receipts:
                watch.tell(receipt)
        return receipts

    def __dask_graph__(self) -> Mapping:
        return self._graph

    def __dask_keys__(self) -> list:
        return self._keys

    def __dask_postcompute__(self) -> tuple[Callable, tuple]:
        return list, ()

    def __dask_postpersist__(self) -> tuple[Callable, tuple]:
        return Step, (self._keys,)

    __dask_optimize__ = staticmethod(da.optimize)
    __dask_scheduler__ = staticmethod(da.Array.__dask_scheduler__)


class Output(Step):
    """An output that is being written: a Dask collection whose tasks write the missing blocks.

    It comes from ``store(..., compute=False)``, and holds the output's lock until `finish` or
    `close`, or until the `with` block that it opens ends. If it is dropped before that, the lock is
    held until no task that writes the output is left on a cluster.

    Attributes
    ----------
    path : str, final path of the output
    shape : tuple of int
    dtype : numpy.dtype
    rows : tuple of int, rows of each block
    done_before : frozenset of int, blocks that earlier runs finished
    missing : tuple of int, blocks that this run writes, in order
    complete : bool, whether the output has its final name

    Notes
    -----
    On the local schedulers, ``output.compute(on_block=...)`` calls back for each block. On a
    cluster, ``output.persist()`` returns at once and ``distributed.futures_of`` of it are the
    futures of the receipts, in the order of `missing`; call `finish` when all of them are done.
    Any process can call `count_done`, which reads the progress from the files.
    """

    def __init__(
        self,
        y: da.Array,
        path: str,
        writer: Writer,
        manifest: dict[str, Any],
        inputs: Mapping[str, Any],
        sync: bool,
    ):
        self._inputs = inputs
        self.path, self.shape, self.dtype = path, y.shape, y.dtype
        self.rows: tuple[int, ...] = tuple(map(int, y.chunks[0]))
        self.directory, self._writer, self._manifest = progress_directory(path), writer, manifest
        self.complete, self._starts = manifest["complete"], list(accumulate(self.rows, initial=0))
        self.done_before = frozenset(range(len(self.rows)) if self.complete else self._find_done())
        # Writing has side effects, so each output has its own tasks, even for equal arrays.
        self._name = f"{_fused_with(y)}ep_store-{uuid.uuid4().hex}"
        self._rest = (0,) * (y.ndim - 1)  # of each key, after the block
        missing = tuple(b for b in range(len(self.rows)) if b not in self.done_before)
        super().__init__(
            self._build_graph(y, sync), [(self._name, b, *self._rest) for b in missing]
        )
        self.missing = missing
        self._dropped = weakref.finalize(self, release_when_written, self.directory, self._keys)

    def step(self, blocks: Iterable[int]) -> Step:
        """A step that writes some of the missing blocks, to be computed before `finish`."""
        missing = set(self.missing)
        return Step(self._graph, [(self._name, b, *self._rest) for b in blocks if b in missing])

    def compute(
        self, on_block: Callable[[Receipt], Any] | None = None, **kwargs: Any
    ) -> list[Receipt]:
        """Write all missing blocks, and rename the output to its path.

        Parameters
        ----------
        on_block : called with the receipt of each block, in the thread that called `compute`: as
            soon as the block is done with local schedulers, when all are done on a cluster
        **kwargs : for the scheduler, as in `dask.compute`

        Returns
        -------
        list of Receipt, in the order of `missing`; empty once the output is complete

        Raises
        ------
        OSError
            If a block cannot be written; the message names it, the file and, on a full disk, the
            bytes needed and free. Finished blocks are kept.
        """
        receipts = [] if self.complete else super().compute(on_block, **kwargs)
        self.finish()
        return receipts

    def finish(self) -> None:
        """Rename the complete output to its path, and release the lock.

        Raises
        ------
        ValueError
            If blocks are missing.
        ReadError
            If an input was changed during the run: rows may be made of either state.
        FileExistsError
            If something was created at `path` during the run, and must not be overwritten.
        """
        if not self.complete:
            left = len(self.rows) - len(self._find_done())
            if left:
                raise ValueError(
                    f"{left} of {len(self.rows)} blocks of {self.path} are missing; compute them "
                    "before finish()"
                )
            self._check_inputs()
            self._writer.tidy()
            there = os.path.lexists(self.path)
            if there and not (self._manifest["overwrite"] and is_replaceable(self.path)):
                raise FileExistsError(
                    f"the output is complete in {self._writer.path}, but {self.path} was created "
                    "by something else meanwhile: move that away and resume"
                )
            replace(self._writer.path, self.path, self.directory)
            sync_path(os.path.dirname(self.path))
            journal.write_complete(self.directory, self._manifest, fingerprint_output(self.path))
            self.complete = True
        self.close()

    def close(self) -> None:
        """Release the lock; finished blocks are kept."""
        if self._dropped.detach() is not None:
            journal.release_lock(self.directory)

    def count_done(self) -> int:
        """Count the blocks that any process has finished so far."""
        done = journal.read_done(self.directory, self._manifest["run"])
        return len(self.rows) if self.complete else len(done)

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        done = len(self.done_before)
        return f"Output({self.path!r}, shape={self.shape}, {done} of {len(self.rows)} blocks done)"

    def __dask_layers__(self) -> tuple[str, ...]:
        return (self._name,)

    def __dask_tokenize__(self) -> str:
        return self._name

    def _check_inputs(self) -> None:
        """Raise if an input has changed since the run began."""
        before = self._manifest["inputs"]
        now = dict(before)
        for name, given in self._inputs.items():
            with contextlib.suppress(FileNotFoundError):  # a file that is gone is not read silently
                now[name] = json.loads(json.dumps(fingerprint_of(given)))
        if changed := journal.describe_differences({"inputs": before}, {"inputs": now}):
            raise ReadError(
                f"{self.path} is not finished, since inputs were changed while they were read, so "
                f"its rows may be made of either: {'; '.join(changed[:8])}. Overwrite it"
            )

    def _build_graph(self, y: da.Array, sync: bool) -> HighLevelGraph:
        starts, run = self._starts, self._manifest["run"]
        job = _Job(self.path, self._writer, self.directory, run, self.shape, self.dtype, sync)
        axes = tuple(range(y.ndim))
        spans = {(b, *self._rest): (b, starts[b], starts[b + 1]) for b in range(len(self.rows))}
        layer = blockwise(
            partial(_store_block, job), self._name, axes, y.name, axes,
            BlockwiseDepDict(spans, numblocks=y.numblocks), axes,
            numblocks={y.name: y.numblocks},
        )  # fmt: skip
        inputs: list[Any] = [y]  # Dask's own arrays lack what its types ask of collections
        return HighLevelGraph.from_collections(self._name, layer, dependencies=inputs)

    def _find_done(self) -> set[int]:
        done = journal.read_done(self.directory, self._manifest["run"])
        return {b for b in done if self._writer.holds(*self._starts[b : b + 2])}


def progress_directory(path: str) -> str:
    """Return the directory of an output's record, and of the output while it is incomplete."""
    return path + ".progress"


def free_bytes(directory: str) -> int:
    """Return the bytes that can be written to the file system of a directory, made or not."""
    while not os.path.isdir(directory):
        directory = os.path.dirname(directory)
    stat = os.statvfs(directory)
    return stat.f_bavail * stat.f_frsize


def fingerprint_output(path: str) -> dict[str, Any]:
    """Return sizes and times of a complete output's files, which show whether it was changed."""
    return open_source(path).fingerprint()


def hash_rows(rows: np.ndarray) -> str:
    """Return a hash of the rows of a block."""
    return xxhash.xxh3_64_hexdigest(np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data)


class _Job(NamedTuple):
    """What all tasks of an output share."""

    path: str
    writer: Writer
    directory: str
    run: str
    shape: tuple[int, ...]
    dtype: np.dtype
    sync: bool


def together(outputs: Sequence[Step]) -> Step:
    """Return one step that writes the missing blocks of several outputs, sharing their tasks."""
    graph = HighLevelGraph.merge(*(output.__dask_graph__() for output in outputs))
    return Step(graph, [key for output in outputs for key in output.__dask_keys__()])


class _Watch(Callback):
    """Passes on each receipt once, as soon as a local scheduler has it."""

    def __init__(self, on_block: Callable[[Receipt], Any]):
        super().__init__(posttask=self._look)
        self._on_block = on_block
        self._seen: set[Receipt] = set()

    def tell(self, receipt: Receipt) -> None:
        if receipt not in self._seen:
            self._seen.add(receipt)
            self._on_block(receipt)

    def _look(self, key: Any, result: Any, *_: Any) -> None:
        receipt = getattr(result, "receipt", result)  # of a task that passes something on as well
        if isinstance(receipt, Receipt):
            self.tell(receipt)


def _fused_with(y: da.Array) -> str:
    """Return the prefix of the writing tasks' names if Dask fuses them with those of `y`."""
    made, _, token = y.name.rpartition("-")
    is_ours = made.startswith("ep_") and isinstance(y.dask.layers.get(y.name), Blockwise)
    return f"{made}-" if is_ours and token else ""


def _store_block(job: _Job, rows: np.ndarray, span: tuple[int, int, int]) -> Receipt:
    block, start, stop = span
    if not isinstance(rows, np.ndarray):
        rows = download(rows)
    place = f"block {block} (rows [{start}, {stop})) of {job.writer.path}"
    expected = (stop - start, *job.shape[1:])
    if rows.shape != expected or rows.dtype != job.dtype:
        raise ValueError(
            f"{place} must be {expected} of {job.dtype}, as the array says, but the task gave "
            f"{rows.shape} of {rows.dtype}; check the meta and chunks of the array"
        )
    try:
        rows = np.ascontiguousarray(rows)
        job.writer.write(rows, start, job.sync)
        journal.record_done(job.directory, job.run, block, hash_rows(rows), sync=job.sync)
    except OSError as error:
        message = f"{place} could not be written: {error}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = (
                f"no space left for {place}: it needs {rows.nbytes} bytes, "
                f"{free_bytes(job.directory)} are free. Finished blocks are kept: free some space "
                "and resume"
            )
        raise OSError(error.errno, message) from error
    count, first = count_not_finite(rows)
    first = start + first if count else -1
    return Receipt(
        block, len(rows), rows.nbytes, not_finite=count, first_not_finite=first, path=job.path
    )
