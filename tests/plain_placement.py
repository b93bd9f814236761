"""EPLB as its README and source describe it, in plain loops, and loads to try it on."""

from __future__ import annotations

import numpy as np


def zipf_load(experts: int, exponent: float, rows: int = 1_000_000, seed: int = 0) -> np.ndarray:
    """Rows of each expert when their popularity falls as rank ** -exponent, in shuffled order."""
    rng = np.random.default_rng(seed)
    share = np.arange(1, experts + 1) ** -exponent
    return rng.permutation(rng.multinomial(rows, share / share.sum()))


def published_pack(load: list, packs: int) -> list[list[int]]:
    """EPLB's packing, for one problem, as its README and source describe it."""
    if len(load) == packs:
        return [[item] for item in range(packs)]
    packed_items = [[] for _ in range(packs)]
    weight = [0.0] * packs
    for item in sorted(range(len(load)), key=lambda i: -load[i]):
        room = [p for p in range(packs) if len(packed_items[p]) < len(load) // packs]
        lightest = min(room, key=weight.__getitem__)
        packed_items[lightest].append(item)
        weight[lightest] += load[item]
    return packed_items


def published_balance(load, num_physical: int, groups: int, nodes: int, ranks: int) -> list:
    """EPLB for one layer, in loops: the experts of each rank."""
    if groups % nodes:
        groups = nodes = 1
    size = len(load) // groups
    group_load = [sum(load[g * size : (g + 1) * size]) for g in range(groups)]
    result = []
    for node in published_pack(group_load, nodes):
        experts = [g * size + i for g in node for i in range(size)]
        replica_of, replicas = list(range(len(experts))), [1] * len(experts)
        while len(replica_of) < num_physical // nodes:
            per_replica = [load[e] / c for e, c in zip(experts, replicas, strict=True)]
            hottest = per_replica.index(max(per_replica))
            replica_of.append(hottest)
            replicas[hottest] += 1
        replica_load = [load[experts[i]] / replicas[i] for i in replica_of]
        result += [
            [experts[replica_of[c]] for c in pack]
            for pack in published_pack(replica_load, ranks // nodes)
        ]
    return result
