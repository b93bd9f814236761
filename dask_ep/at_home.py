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
    if not any(_tells_home(task) for task in tasks):
        return
    homes: dict[TaskState, OwnersOfRank | None] = {}  # by the end of a chunk
    for task, end in find_ends(tasks).items():
        if end is None or task.worker_restrictions or task.state != "released":
            continue
        if end not in homes:
            homes[end] = _home_of(end, owners)
        if homes[end] is not None and not _is_packet_or_sum(task, end):
            task.worker_restrictions = homes[end]


def _home_of(end: TaskState, owners: OwnersByToken) -> OwnersOfRank | None:
    """Give the owners of a chunk's home, by way of one of its answers and the packet behind it."""
    packets = (packet for answer in end.dependencies for packet in answer.dependencies)
    key = next((packet.key for packet in packets if _tells_home(packet)), None)
    ranks = None if key is None else owners(key[0].rpartition("-")[2])
    return None if ranks is None else ranks[key[3]]


def _tells_home(task: TaskState) -> bool:
    key = task.key
    is_packet = isinstance(key, tuple) and isinstance(key[0], str) and key[0].startswith(SEND)
    return is_packet and len(key) == 4


def _is_packet_or_sum(task: TaskState, end: TaskState) -> bool:
    return task is end or _tells_home(task)
