"""How are weighted items distributed evenly over packs of equal size?

These are the two greedy steps of load balancing, for `X` independent problems at once: the only
loops are over items, and each iteration places one item of every problem.
"""

from __future__ import annotations

import numpy as np


def replicate_hottest(
    loads: np.ndarray, num_replicas: int, max_replicas: int
) -> tuple[np.ndarray, np.ndarray]:
    """Give every expert one replica, and each further one to the expert with the most rows each.

    loads (X, E) -> replica_of (X, num_replicas), the expert of each replica; replicas (X, E).
    """
    problems, experts = loads.shape
    every = np.arange(problems)
    replica_of = np.empty((problems, num_replicas), np.int64)
    replica_of[:, :experts] = np.arange(experts)
    replicas = np.ones((problems, experts), np.int64)
    for nth in range(experts, num_replicas):
        hottest = np.where(replicas < max_replicas, loads / replicas, -1.0).argmax(axis=1)
        replica_of[:, nth] = hottest
        replicas[every, hottest] += 1
    return replica_of, replicas


def balanced_packing(
    loads: np.ndarray, expert_of: np.ndarray, packs: int, capacity: int
) -> np.ndarray:
    """Put items, heaviest first, each into the lightest pack with room and without its expert.

    loads, expert_of (X, items) -> packed (X, packs, capacity), item numbers, -1 for empty places.
    With one item per pack the order is kept, as in EPLB.
    """
    problems, items = loads.shape
    packed = np.full((problems, packs, capacity), -1)
    if capacity == 1:
        packed[:, :items, 0] = np.arange(items)
        return packed
    every = np.arange(problems)
    weight = np.zeros((problems, packs))
    filled = np.zeros((problems, packs), np.int64)
    holds = np.zeros((problems, packs, int(expert_of.max()) + 1), bool)
    for item in np.argsort(-loads, axis=1, kind="stable").T:  # (X,)
        expert = expert_of[every, item]
        closed = (filled == capacity) | holds[every, :, expert]
        chosen = np.where(closed, np.inf, weight).argmin(axis=1)
        for x in np.flatnonzero(closed.all(axis=1)):
            chosen[x] = _make_room(
                packed[x], filled[x], weight[x], holds[x], loads[x], expert_of[x], item[x]
            )
        packed[every, chosen, filled[every, chosen]] = item
        filled[every, chosen] += 1
        weight[every, chosen] += loads[every, item]
        holds[every, chosen, expert] = True
    return packed


def _make_room(
    packed: np.ndarray,  # (packs, capacity)
    filled: np.ndarray,  # (packs,)
    weight: np.ndarray,  # (packs,)
    holds: np.ndarray,  # (packs, E)
    loads: np.ndarray,  # (items,)
    expert_of: np.ndarray,  # (items,)
    item: int,
) -> int:
    """If every pack with room holds the item's expert, move another item there; return its pack.

    A full pack without the expert holds more different experts than a pack with room, so that one
    of them can always move there.
    """
    capacity = packed.shape[1]
    room = min(np.flatnonzero(filled < capacity), key=weight.__getitem__)
    choices = [
        (max(weight[pack] - loads[other] + loads[item], weight[room] + loads[other]), pack, at)
        for pack in np.flatnonzero(~holds[:, expert_of[item]])
        for at, other in enumerate(packed[pack])
        if not holds[room, expert_of[other]]
    ]
    _, pack, at = min(choices)
    other = packed[pack, at]
    packed[room, filled[room]] = other
    filled[room] += 1
    weight[room] += loads[other]
    holds[room, expert_of[other]] = True
    packed[pack, at] = packed[pack, -1]
    filled[pack] -= 1
    weight[pack] -= loads[other]
    holds[pack, expert_of[other]] = False
    return int(pack)


def look_up_each(table: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Return `table[index]` row by row, with -1 for -1."""
    return np.where(index < 0, -1, np.take_along_axis(table, np.maximum(index, 0), axis=1))
