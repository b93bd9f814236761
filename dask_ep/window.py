"""How many token chunks may be under way at once?

Ranks that are quick would run ahead of a slow one, and all that waits for it would pile up: chunks,
packets, answers. So the chunks of a graph begin in their order, and the next one only when fewer
than so many are between their first task and their end:

    tokens c ──> ep_send (c, r) ──> ep_dispatch (c, r) ──> ep_sum (c, 0)
    │                                                      └ the end: another chunk may begin
    └ an entry: held by restrictions to no worker

Entries are the first of the tasks that lead to the end of one chunk alone. What leads to more than
that (a router's weights, experts, a sum over all tokens, another graph) is never held. So a chunk
that is under way waits for none that is held, and comes to its end. In a graph of several layers a
chunk ends with the last of them.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Collection, Iterable

from distributed.scheduler import TaskState

from dask_ep.homes import SUM, Home
from dask_ep.ranks import NOBODY, OwnersOfRank

CHUNKS_PER_THREAD, CHUNKS_BESIDE = 4, 4
"""Chunks under way: so many per thread of the workers, and so many more."""

UNFINISHED = ("waiting", "queued", "no-worker", "processing")
"""States of a sum that somebody waits for."""


class Held(set):
    """Restrictions of an entry whose chunk may not begin yet."""


class Window:
    """The chunks of one graph: those under way, and those that are held, in their order."""

    def __init__(self, tasks: Collection[TaskState], limit: float):
        chunks = sorted(find_entries(tasks).items(), key=lambda chunk: chunk[0].priority)
        begun = len(chunks) if limit >= len(chunks) else int(limit)
        self.under_way = {end for end, _ in chunks[:begun]}
        self.held = deque(chunks[begun:])
        self.restrictions: dict[TaskState, set[str] | None] = {}
        for _, entries in self.held:
            for entry in entries:
                self.restrictions[entry] = entry.worker_restrictions
                entry.worker_restrictions = Held({NOBODY})

    def recount(self) -> None:
        """Forget the chunks that have ended. They may be needed again, but not in this order."""
        self.under_way = {end for end in self.under_way if end.state in UNFINISHED}

    def admit(self, limit: float) -> list[TaskState]:
        """Let chunks begin while fewer than `limit` are under way, and give their entries."""
        self.recount()
        admitted = []
        while self.held and len(self.under_way) < limit:
            end, entries = self.held.popleft()
            if end.state in UNFINISHED:
                self.under_way.add(end)
            for entry in entries:
                entry.worker_restrictions = self.restrictions.pop(entry)
            admitted += entries
        return admitted


def is_sum(key: object) -> bool:
    return isinstance(key, tuple) and isinstance(key[0], str) and key[0].startswith(SUM)


def find_entries(tasks: Collection[TaskState]) -> dict[TaskState, list[TaskState]]:
    """Give the entries of each chunk of a new graph, by the chunk's end."""
    ends = find_ends(tasks)
    entries = defaultdict(list)
    for task, end in ends.items():
        if end is None or task.state != "released" or not _is_free(task):
            continue
        if not any(ends.get(needed) is end for needed in task.dependencies):
            entries[end].append(task)
    return entries


def find_ends(tasks: Iterable[TaskState]) -> dict[TaskState, TaskState | None]:
    """Tell of tasks which sum, the last on the way, they lead to; None if not to that alone."""
    ends: dict[TaskState, TaskState | None] = {}
    seen = set()
    for task in _dependents_first(tasks):
        of_dependents = {ends[dependent] for dependent in task.dependents if dependent in ends}
        if len(of_dependents) > 1 or not task.dependents <= seen:
            ends[task] = None
        elif of_dependents:
            ends[task] = of_dependents.pop()
        elif is_sum(task.key):
            ends[task] = task
        seen.add(task)
    return ends


def _dependents_first(tasks: Iterable[TaskState]) -> list[TaskState]:
    """Sort by generation and Dask's order in it, the last first; what users prefer is left out."""
    return sorted(tasks, key=lambda task: (task.priority or ())[1:], reverse=True)


def _is_free(task: TaskState) -> bool:
    """Whether no user restricts it."""
    return not task.worker_restrictions or isinstance(task.worker_restrictions, Home | OwnersOfRank)
