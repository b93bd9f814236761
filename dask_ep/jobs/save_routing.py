"""How does a run save the routing of its layer for other jobs?

    routing.zarr                 (n, k) int32: experts of each row, -1 for a slot that was dropped
    routing.topk_weights.zarr    (n, k) float32

Both are outputs of the run, written block by block like the first, and resumed with it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from dask_ep.errors import JobError
from dask_ep.jobs.build import Built
from dask_ep.jobs.job import Job
from dask_ep.storage.output import Output
from dask_ep.storage.storage import check_existing, store


def path_of_weights(path: str | os.PathLike) -> str:
    """Return where the top-k weights of a routing are saved.

    Examples
    --------
    >>> path_of_weights("out/routing.zarr")
    'out/routing.topk_weights.zarr'
    """
    stem, ending = os.path.splitext(os.fspath(path))
    return f"{stem}.topk_weights{ending}"


def check_saved_routing(job: Job, path: str | os.PathLike, resume: bool, overwrite: bool) -> None:
    """Raise if the job reads its routing from a file, or if a path to write is in use."""
    if job.routing is not None:
        raise JobError(
            f"{job.name}: save_routing needs a layer that routes; the routing of this job is in "
            f"{job.routing} already"
        )
    for each in (path, path_of_weights(path)):
        if os.path.realpath(each) == os.path.realpath(job.out):
            raise JobError(
                f"{job.name}: save_routing would write {each}, which is the output; choose "
                "another path"
            )
        check_existing(os.path.realpath(each), resume, overwrite)


@contextmanager
def stored_routing(
    built: Built,
    path: str | os.PathLike | None,
    rows: Sequence[int],
    resume: bool,
    overwrite: bool,
) -> Iterator[list[Output]]:
    """Begin or resume the outputs of indices and top-k weights, and finish them at the end.

    Without a path nothing is saved.

    Parameters
    ----------
    built : the job's output, of a layer
    path : of the indices
    rows : of the blocks of the job's output
    resume, overwrite : as in `store`
    """
    if path is None:
        yield []
        return
    places = (path, path_of_weights(path))
    with ExitStack() as stack:
        outputs = []
        for array, place in zip(built.routing, places, strict=True):
            assert array is not None  # a layer's router returns both
            output = store(
                array.rechunk({0: tuple(rows)}),
                place,
                inputs=built.inputs,
                settings={"layer_index": built.settings["layer_index"]},
                resume=resume,
                overwrite=overwrite,
                compute=False,
            )
            outputs.append(stack.enter_context(output))
        yield outputs
        for output in outputs:
            output.finish()
