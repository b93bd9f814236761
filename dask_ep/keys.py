"""What are a layer's tasks called?

    ("ep_experts-<token>", r)      loads the experts of rank r, where the rank is served
    ("ep_ranks-<token>",)          joins them: all ranks are there
    ("ep_chunk-<token>", c, 0)     one token chunk, from its rows to its output

Names are made here and recognised here, nowhere else. The token tells one layer over one input from
all others. `ep_ranks_at_home` says that each chunk has a home, the rank c mod R.
"""

from __future__ import annotations

from typing import NamedTuple

EXPERTS, RANKS, RANKS_AT_HOME, CHUNK = "ep_experts-", "ep_ranks-", "ep_ranks_at_home-", "ep_chunk-"

BY_RANK = (EXPERTS, "ep_dispatch-")
"""What the names of tasks begin with that run on a rank's owner; the rank is last in their keys."""


def experts_key(token: str, rank: int | None) -> tuple:
    """The key of the task that loads a rank's experts; None where there is one rank only."""
    return (f"{EXPERTS}{token}",) if rank is None else (f"{EXPERTS}{token}", rank)


def ranks_key(token: str, *, at_home: bool = False) -> tuple[str]:
    return (f"{RANKS_AT_HOME if at_home else RANKS}{token}",)


def chunk_name(token: str) -> str:
    return f"{CHUNK}{token}"


class RanksKey(NamedTuple):
    """What the key of an ``ep_ranks`` task says."""

    token: str
    at_home: bool


def read_ranks_key(key: object) -> RanksKey | None:
    """Give what a key says if it is that of the task which joins the ranks of a layer.

    Examples
    --------
    >>> read_ranks_key(ranks_key("0123")), read_ranks_key(("ep_chunk-0123", 4, 0))
    (RanksKey(token='0123', at_home=False), None)
    """
    if isinstance(key, tuple) and len(key) == 1 and isinstance(key[0], str):
        for start in (RANKS, RANKS_AT_HOME):
            if key[0].startswith(start):
                return RanksKey(key[0].removeprefix(start), start is RANKS_AT_HOME)
    return None


def read_rank(key: object) -> tuple[str, int] | None:
    """Give token and rank if the key is that of a task which runs on a rank's owner.

    Examples
    --------
    >>> read_rank(("ep_experts-0123", 5)), read_rank(("ep_dispatch-0123", -1, 0, 7, 2))
    (('0123', 5), ('0123', 2))
    """
    if not (isinstance(key, tuple) and isinstance(key[0], str) and isinstance(key[-1], int)):
        return None
    return (key[0].partition("-")[2], key[-1]) if key[0].startswith(BY_RANK) else None
