"""Which physical expert should hold which expert, given how many rows each expert gets?

Pure functions on integers, from the load of each expert to a `Placement`. From the simplest to the
best balanced:

    contiguous   rank r owns the experts [r * E/R, (r+1) * E/R): needs no load
    packed       one replica each, heaviest first, each to the lightest rank with room
    balanced     replicas for the hottest experts first, then packed: EPLB's hierarchical and global
                 policies, but never two replicas of an expert on one rank
    exact        every rank serves the same number of rows, with about one spare physical expert per
                 rank; the replicas of an expert share its rows unevenly

Axis letters: `E` experts, `R` ranks, `P` physical experts per rank, `L` layers, `X` independent
problems that are solved together.
"""

from __future__ import annotations

import numpy as np

from dask_ep.arrays.checks import refuse_masked
from dask_ep.placement.balanced_packing import balanced_packing, look_up_each, replicate_hottest
from dask_ep.placement.placement import Placement, verify_placement
from dask_ep.placement.replica_choice import TICKETS


def contiguous(num_experts: int, world_size: int) -> Placement:
    """Give each rank the next E/R experts; if R does not divide E, the first ranks get one more.

    Examples
    --------
    >>> contiguous(5, 3).physical
    array([[ 0,  1],
           [ 2,  3],
           [ 4, -1]], dtype=int32)
    """
    _check_sizes(num_experts, world_size)
    ranks = np.array_split(np.arange(num_experts), world_size)
    return Placement(_table(ranks))


def packed(load: np.ndarray, world_size: int) -> Placement:
    """Place every expert once, heaviest first, each on the lightest rank with room.

    Parameters
    ----------
    load : (E,) rows of each expert, or anything proportional to them
    world_size : int, R

    Notes
    -----
    The longest-processing-time rule under the limit of ceil(E/R) experts per rank. The best that a
    placement without replicas can do is bounded by the hottest expert: max/mean >= R * its share.
    """
    return balanced(load, world_size, num_physical=np.size(load))


def balanced(
    load: np.ndarray,
    world_size: int,
    *,
    num_physical: int | None = None,
    num_groups: int = 1,
    num_nodes: int = 1,
) -> Placement:
    """Replicate the hottest experts while there is room, and spread all replicas over the ranks.

    Parameters
    ----------
    load : (E,) rows of each expert, or anything proportional to them
    world_size : int, R
    num_physical : int, optional
        Total number of replicas, E <= num_physical <= E * R. Default: one to spare on every rank.
    num_groups, num_nodes : int
        With more than one node, whole groups of E / num_groups experts are kept on one node.

    Raises
    ------
    ValueError
        If the numbers do not divide each other as required, or there are more physical than logical
        experts on every rank.

    Notes
    -----
    This is DeepSeek's EPLB: each spare physical expert becomes a replica of the expert with the
    most rows per replica; then each replica, heaviest first, goes to the lightest rank with room.
    It is hierarchical (groups to nodes first) if num_nodes divides num_groups, otherwise global.
    Unlike in EPLB, a rank never gets two replicas of an expert, which would cost memory and gain
    nothing. Ties go to the lowest index. Replicas share rows evenly.

    Examples
    --------
    >>> placement = balanced([80, 10, 10, 20], world_size=2, num_physical=6)
    >>> placement.physical.tolist(), placement.imbalance([80, 10, 10, 20])
    ([[0, 1, 3], [0, 2, 3]], 1.0)
    """
    physical = balance_layers(
        _loads(load)[None],
        world_size,
        num_physical=num_physical,
        num_groups=num_groups,
        num_nodes=num_nodes,
    )
    return Placement(physical[0])


def balance_layers(
    loads: np.ndarray,
    world_size: int,
    *,
    num_physical: int | None = None,
    num_groups: int = 1,
    num_nodes: int = 1,
) -> np.ndarray:
    """Do what `balanced` does for many layers at once.

    Parameters
    ----------
    loads : (L, E) rows of each expert of each layer
    world_size, num_physical, num_groups, num_nodes : as in `balanced`

    Returns
    -------
    physical : (L, R, P) int64, each a table for `Placement`
    """
    refuse_masked(loads, "loads")
    loads = np.asarray(loads, np.float64)
    layers, num_experts = loads.shape
    _check_sizes(num_experts, world_size)
    if num_physical is None:
        num_physical = min(-(-num_experts // world_size) + 1, num_experts) * world_size
    if num_groups % num_nodes:
        num_groups = num_nodes = 1  # the global policy
    _check_divides(num_experts, world_size, num_physical, num_groups, num_nodes)

    # 1. Whole groups of experts to nodes.
    group = num_experts // num_groups
    groups = np.broadcast_to(np.arange(num_groups), (layers, num_groups))
    group_loads = loads.reshape(layers, num_groups, group).sum(axis=2)
    groups_of_node = balanced_packing(group_loads, groups, num_nodes, num_groups // num_nodes)
    expert_of = groups_of_node[..., None] * group + np.arange(group)
    expert_of = expert_of.reshape(layers * num_nodes, -1)

    # 2. Replicas of the hottest experts of each node.
    ranks = world_size // num_nodes
    loads = np.take_along_axis(np.repeat(loads, num_nodes, axis=0), expert_of, axis=1)
    replica_of, replicas = replicate_hottest(loads, num_physical // num_nodes, max_replicas=ranks)

    # 3. The replicas of each node to its ranks.
    replica_loads = np.take_along_axis(loads / replicas, replica_of, axis=1)
    packs = balanced_packing(replica_loads, replica_of, ranks, -(-num_physical // world_size))
    local = look_up_each(replica_of, packs.reshape(len(packs), -1))
    return look_up_each(expert_of, local).reshape(layers, world_size, -1)


def exact(load: np.ndarray, world_size: int, *, max_physical: int | None = None) -> Placement:
    """Give every rank the same number of rows, up to one, with few experts per rank.

    Parameters
    ----------
    load : (E,) or (E, bins) integer array
        Rows of each expert; or the same by ticket (`ticket_load`), which makes the shares of the
        replicas exact for these rows, not just on average.
    world_size : int, R
    max_physical : int, optional
        Maximum number of experts that a rank can hold (its memory over the bytes of one expert).

    Raises
    ------
    ValueError
        If max_physical is below ceil((E - 1) / R) + 1, with which an exact placement always exists.

    Notes
    -----
    McNaughton's wrap-around rule (Management Science 6(1), 1959) cuts the list of all (row, expert)
    pairs, sorted by expert, into R equal runs; a rank with cold experts then holds many of them.
    Here the experts are taken in another order: sorted by load, each rank takes a window of w whole
    experts and a part of the next that add up to exactly its rows. With m = ceil((E - 1) / R), A
    ranks to fill and M <= A m + 1 experts left, such a window exists for some w <= m that leaves
    the other A - 1 ranks no more than (A - 1) m + 1: the lightest w weigh no more than a rank's
    rows for the least such w, the heaviest w + 1 no less for w = m, and moving the window up by one
    never skips both. So no rank holds more than m + 1 experts, about one more than E/R, and there
    are at most R - 1 additional replicas.

    Examples
    --------
    >>> placement = exact([80, 10, 10, 20], world_size=3)
    >>> placement.physical.tolist(), placement.rank_load([80, 10, 10, 20]).tolist()
    ([[0, 3], [0, 2], [0, 1]], [40.0, 40.0, 40.0])
    """
    by_ticket = np.asanyarray(load)
    by_ticket = by_ticket[:, None] if by_ticket.ndim == 1 else by_ticket
    rows = _integer_loads(by_ticket.sum(axis=1))
    _check_sizes(rows.size, world_size)
    needed = -(-(rows.size - 1) // world_size) + 1
    if max_physical is not None and max_physical < needed:
        raise ValueError(
            f"{rows.size} experts on {world_size} ranks with equal rows need {needed} experts a "
            f"rank, but the limit is {max_physical}; allow them, use more ranks, or use balanced"
        )
    pieces = _equal_windows(rows, world_size)
    physical = _table([sorted(rank) for rank in pieces])
    stops = np.zeros(physical.shape, np.int64)
    served = np.zeros(rows.size, np.int64)
    for rank, column in np.argwhere(physical >= 0):
        expert = physical[rank, column]
        served[expert] += pieces[rank][expert]
        stops[rank, column] = _ticket_at(by_ticket[expert], served[expert], rows[expert])
    last = {int(expert): at for at, expert in enumerate(physical.ravel()) if expert >= 0}
    stops.ravel()[list(last.values())] = TICKETS
    return Placement(physical, stops)


def place(
    policy: str, load: np.ndarray, world_size: int, *, max_physical: int | None = None
) -> Placement:
    """Make a placement by a policy of `POLICIES`, within the limit of what a rank may hold.

    Parameters
    ----------
    policy : "contiguous", "packed", "balanced" or "exact"
    load : (E,) or (E, bins) integer array, as in `exact`
    world_size : int, R
    max_physical : int, optional
        Maximum number of experts that a rank can hold.

    Raises
    ------
    ValueError
        If the policy is unknown, or its placement needs more physical experts per rank.

    Examples
    --------
    >>> place("packed", [9, 1, 1, 7], world_size=2).physical.tolist()
    [[0, 2], [3, 1]]
    """
    if policy not in POLICIES:
        raise ValueError(f"placement must be one of {', '.join(POLICIES)}; got {policy!r}")
    load = np.asanyarray(load)
    rows = load.sum(axis=1) if load.ndim == 2 else load
    if policy == "exact":
        return exact(load, world_size, max_physical=max_physical)
    if policy == "contiguous":
        placement = contiguous(rows.size, world_size)
    elif policy == "packed":
        placement = packed(rows, world_size)
    else:
        physical = min(most_physical(policy, rows.size, world_size), max_physical or rows.size)
        placement = balanced(rows, world_size, num_physical=max(physical * world_size, rows.size))
    verify_placement(placement, max_physical=max_physical)
    return placement


POLICIES = ("contiguous", "packed", "balanced", "exact")
"""The names that `place` accepts, from the simplest to the best balanced."""


def most_physical(policy: str, num_experts: int, world_size: int) -> int:
    """Return the maximum physical experts per rank that `place` uses for a policy, for any load.

    Examples
    --------
    >>> [most_physical(policy, 10, 4) for policy in POLICIES]
    [3, 3, 4, 4]
    """
    if policy == "exact":
        return min(-(-(num_experts - 1) // world_size) + 1, num_experts)
    spare = policy == "balanced"
    return min(-(-num_experts // world_size) + spare, num_experts)


def _equal_windows(rows: np.ndarray, world_size: int) -> list[dict[int, int]]:
    """Split the experts' rows equally: return, for each rank, how many rows of which expert."""
    left = rows.copy()
    waiting = np.argsort(rows, kind="stable")  # experts with rows left, lightest first
    most = -(-(rows.size - 1) // world_size)  # whole experts that a rank may take
    pieces = []
    for others in range(world_size - 1, -1, -1):
        piece: dict[int, int] = {}
        pieces.append(piece)
        if waiting.size == 0:
            continue
        total = np.concatenate([[0], np.cumsum(left[waiting])])
        quota = int(total[-1]) // (others + 1)
        # The fewest whole experts that leave no more than the other ranks can take ...
        whole = max(waiting.size - others * most - 1, 0)
        # ... and as many as fill the quota, together with a part of one more.
        while total[-1] - total[-whole - 2] < quota:
            whole += 1
        start = int(np.argmax(total[whole + 1 :] - total[: -whole - 1] >= quota))
        for expert in waiting[start : start + whole].tolist():
            piece[expert] = int(left[expert])
            left[expert] = 0
        cut = int(waiting[start + whole])
        part = quota - int(total[start + whole] - total[start])
        taken = start + whole
        if part == left[cut]:
            taken += 1
        if part > 0 or part == left[cut]:
            piece[cut] = part
            left[cut] -= part
        waiting = np.delete(waiting, np.arange(start, taken))
        waiting = waiting[np.argsort(left[waiting], kind="stable")]
    return pieces


def _ticket_at(by_ticket: np.ndarray, served: int, rows: int) -> int:
    """Return the ticket below which `served` of an expert's `rows` rows are."""
    below = np.concatenate([[0], np.cumsum(by_ticket, dtype=np.float64)])
    edges = np.linspace(0, TICKETS, below.size)
    return round(float(np.interp(served / max(rows, 1) * below[-1], below, edges)))


def _table(ranks: list) -> np.ndarray:
    """Return the experts of each rank as a table, in which shorter rows are padded with -1."""
    table = np.full((len(ranks), max(1, *map(len, ranks))), -1)
    for row, experts in zip(table, ranks, strict=True):
        row[: len(experts)] = experts
    return table


def _loads(load: np.ndarray) -> np.ndarray:
    """Check the load of each expert."""
    refuse_masked(load, "load")
    load = np.asarray(load, np.float64)
    if load.ndim != 1 or load.size == 0 or not (load >= 0).all() or not np.isfinite(load).all():
        raise ValueError(
            f"load must hold one finite number >= 0 for each expert; got shape {load.shape}, "
            f"least {load.min() if load.size else None}"
        )
    return load


def _integer_loads(load: np.ndarray) -> np.ndarray:
    """Return the load as int64; fractions are scaled up until rounding is harmless."""
    if load.dtype.kind in "iu":
        _loads(load)
        return load.astype(np.int64)
    load = _loads(load)
    return np.rint(load * (2**40 / max(load.sum(), 1.0))).astype(np.int64)


def _check_sizes(num_experts: int, world_size: int) -> None:
    if num_experts < 1 or world_size < 1:
        raise ValueError(
            f"a placement needs experts and ranks; got num_experts={num_experts}, "
            f"world_size={world_size}"
        )


def _check_divides(
    num_experts: int, world_size: int, num_physical: int, num_groups: int, num_nodes: int
) -> None:
    for whole, part, names in (
        (num_experts, num_groups, "num_groups must divide the experts"),
        (world_size, num_nodes, "num_nodes must divide world_size"),
        (num_physical, num_nodes, "num_nodes must divide num_physical"),
    ):
        if whole % part:
            raise ValueError(f"{names}; got {part} for {whole}")
    most = num_experts * world_size // num_nodes
    if not num_experts <= num_physical <= most:
        raise ValueError(
            f"{num_experts} experts take {num_experts} physical ones (one each) to {most} (one "
            f"on every rank of their node, {world_size} ranks on {num_nodes} nodes); "
            f"got num_physical={num_physical}"
        )
