"""How did the run start that is now resumed?

This is read from the record next to the output, before anything is decided: a resumed run keeps its
ranks, its chunks unless others are given, the placement of experts that travelled, and its passes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dask_ep.laws.passes import Passes
from dask_ep.placement.placement import Placement
from dask_ep.storage import journal
from dask_ep.storage.output import progress_directory
from dask_ep.storage.resume import find_good


@dataclass(frozen=True)
class Begun:
    """A run that was started before."""

    world_size: int | None
    #: None if the record does not say
    rows: tuple[int, ...]
    #: rows of each of its blocks
    placement: Placement | None
    #: None if rank r owns the next E/R experts
    passes: Passes | None
    #: None unless its experts are processed in passes
    place: str | None
    #: name of the directory of its spilled rows
    done: frozenset[int]
    #: finished blocks
    complete: bool
    #: whether all blocks are finished, and the output has its final name

    @property
    def chunk_rows(self) -> int | None:
        """Rows of its chunks; None if it has no rows."""
        return max(self.rows, default=0) or None

    @property
    def moves_experts(self) -> bool:
        """Whether experts travelled to rows."""
        return self.placement is not None and self.placement.local


def read_begun(out: str) -> Begun | None:
    """Read how the run that writes an output was started; None if there is none."""
    directory = progress_directory(out)
    manifest = journal.read_manifest(directory)
    if manifest is None:
        return None
    try:
        return _begun(out, manifest)
    except (TypeError, ValueError, LookupError) as error:
        raise ValueError(
            f"{directory}/manifest.json must say how the run began, but cannot be read: {error}; "
            "start again with overwrite"
        ) from error


def _begun(out: str, manifest: Mapping[str, Any]) -> Begun:
    done = frozenset(find_good(out, manifest))
    settings = manifest["settings"]
    placement, passes = settings.get("placement"), settings.get("passes")
    world_size = settings.get("world_size")
    if world_size is not None and (type(world_size) is not int or world_size < 1):
        raise ValueError(f"world_size is {world_size!r}")
    return Begun(
        world_size=world_size,
        rows=tuple(manifest["rows"]),
        placement=None if placement is None else Placement.from_json(placement),
        passes=None if passes is None else Passes(**passes),
        place=settings.get("spill"),
        done=done,
        complete=len(done) == len(manifest["rows"]) and os.path.exists(out),
    )
