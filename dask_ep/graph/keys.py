"""What are a layer's tasks called?

    ("ep_experts-<token>", r)      loads the experts of rank r, where the rank is served
    ("ep_ranks-<token>",)          joins them: all ranks are there
    ("ep_chunk-<token>", c, 0)     one token chunk, from its rows to its output

Names are made and recognised here; only `storage`, a lower room, makes ``ep_read`` itself.
The token identifies one layer over one input. `ep_ranks_at_home` says that each chunk
has a home, the rank c mod R.

Around a layer, and where its experts are processed in passes, there are others, which are read here
too: ``("ep_<step>-<token>", c, ...)``, and those of the steps in `OF_BLOCKS`, which end with a
rank.
"""

from __future__ import annotations

import ast
from typing import NamedTuple

EXPERTS, RANKS, RANKS_AT_HOME, CHUNK = "ep_experts-", "ep_ranks-", "ep_ranks_at_home-", "ep_chunk-"
DISPATCH = "ep_dispatch-"

BY_RANK = (EXPERTS, DISPATCH)
"""What the names of tasks begin with that run on a rank's owner; the rank is last in their keys."""

OF_BLOCKS = {"experts": 1, "dispatch": 2, "receipt": 2}
"""Steps whose keys end with a rank, and where what stands before it begins: which of several tasks
of one step, chunk and rank this is."""

ROUTING = {"indices": "route", "weights": "route", "scores": "route"}
"""Steps that a run shows as one."""


def experts_key(token: str, rank: int | None) -> tuple:
    """The key of the task that loads a rank's experts; None where there is one rank only."""
    return (f"{EXPERTS}{token}",) if rank is None else (f"{EXPERTS}{token}", rank)


def ranks_key(token: str, *, at_home: bool = False) -> tuple[str]:
    return (f"{RANKS_AT_HOME if at_home else RANKS}{token}",)


def chunk_name(token: str) -> str:
    return f"{CHUNK}{token}"


def step_name(step: str, token: str) -> str:
    """What the names of the tasks of any other step begin with."""
    return f"ep_{step}-{token}"


class RanksKey(NamedTuple):
    """What the key of an ``ep_ranks`` task says."""

    token: str
    at_home: bool


def read_ranks_key(key: object) -> RanksKey | None:
    """Return what a key says if it is that of the task which joins the ranks of a layer.

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
    """Return token and rank if the key is that of a task which runs on a rank's owner.

    Examples
    --------
    >>> read_rank(("ep_experts-0123", 5)), read_rank(("ep_dispatch-0123", -1, 0, 7, 2))
    (('0123', 5), ('0123', 2))
    """
    if not (isinstance(key, tuple) and isinstance(key[0], str) and isinstance(key[-1], int)):
        return None
    return (key[0].partition("-")[2], key[-1]) if key[0].startswith(BY_RANK) else None


class TaskKey(NamedTuple):
    """What the key of any task of a layer says."""

    step: str
    #: what the name says; where Dask has made one task of several, the first of them
    chunk: int = -1
    #: -1 for what is done for no chunk, or for several
    rank: int = -1
    #: -1 for what no rank does
    part: tuple[int, ...] = ()
    #: which of several tasks of this step, chunk and rank, with experts in passes


def read_key(key: object) -> TaskKey | None:
    """Return what a key says, as it is or as text; None if it is not of a layer.

    Examples
    --------
    >>> read_key(("ep_chunk-ep_store-0123", 4))
    TaskKey(step='chunk', chunk=4, rank=-1, part=())
    >>> read_key("('ep_experts-0123', 1)"), read_key("sum-0123")
    (TaskKey(step='experts', chunk=-1, rank=1, part=()), None)
    >>> read_key(("ep_dispatch-0123", 4, 7, 1))
    TaskKey(step='dispatch', chunk=4, rank=1, part=(7,))
    >>> read_key(("ep_gram-0123", 2, 5))  # of a group of chunks, and an expert
    TaskKey(step='gram', chunk=-1, rank=-1, part=(2, 5))
    >>> read_key("ep_chunk-finalize-hlgfinalizecompute-0123")  # of a single chunk
    TaskKey(step='chunk', chunk=0, rank=-1, part=(-1,))
    """
    if isinstance(key, str) and key.startswith("ep_") and "-finalize-" in key:
        only = read_key((key.partition("-finalize-")[0], 0))
        return None if only is None else only._replace(part=(-1,))  # its number is not in the key
    if isinstance(key, str):
        key = _parse(key)
    if not (isinstance(key, tuple) and isinstance(key[0], str) and key[0].startswith("ep_")):
        return None
    step = key[0].removeprefix("ep_").partition("-")[0]
    step, numbers = ROUTING.get(step, step), key[1:]
    if step == "gram":
        return TaskKey(step, part=numbers)
    if step not in OF_BLOCKS:
        return TaskKey(step, *numbers[:1])
    chunk = -1 if step == "experts" else numbers[0]
    return TaskKey(step, chunk, numbers[-1] if numbers else 0, key[OF_BLOCKS[step] : -1])


def _parse(key: str) -> object:
    if not key.startswith("("):
        return None
    try:
        return ast.literal_eval(key)
    except (ValueError, SyntaxError):
        return None
