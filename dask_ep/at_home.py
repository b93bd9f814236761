"""How does a token chunk come to lie at the home that its placement gives it?

Where a placement is local, the keys of a chunk's packets tell its home. What leads to the chunk's
sum alone, the reading of its rows above all, is pinned to the owners of that rank:

    ("ep_read-<tok>", c, 0) ──> ("ep_send-<tok>", c, r, home) ──> ... ──> ("ep_sum-<tok>", c, 0)
     worker_restrictions = the owners of rank `home`: the ONE set of all tasks of that rank

What leads to several sums stays free, and what is in memory already stays where it is. Packets and
sum are then made where the chunk lies, by the rules of `homes`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from distributed.scheduler import TaskState

from dask_ep.homes import SEND
from dask_ep.ranks import OwnersOfRank
from dask_ep.window import find_ends

OwnersByToken = Callable[[str], Sequence[OwnersOfRank] | None]
"""The owners of the ranks of a layer, from the token in the names of its tasks; None if free."""


def pin_at_home(tasks: Collection[TaskState], owners: OwnersByToken) -> None:
    """Pin what is made for one chunk alone to the owners of its home; before homes are given."""
    if not any(map(_tells_home, tasks)):
        return
    ends, homes = find_ends(tasks), {}
    for task, end in ends.items():
        if end is not None and _tells_home(task):
            ranks = owners(task.key[0].rpartition("-")[2])
            if ranks is not None:
                homes[end] = ranks[task.key[3]]
    for task, end in ends.items():
        is_free = task.state == "released" and not task.worker_restrictions
        if end in homes and is_free and task is not end and not _tells_home(task):
            task.worker_restrictions = homes[end]


def _tells_home(task: TaskState) -> bool:
    """Whether this is a packet of a chunk with a home."""
    key = task.key
    is_packet = isinstance(key, tuple) and isinstance(key[0], str) and key[0].startswith(SEND)
    return is_packet and len(key) == 4
