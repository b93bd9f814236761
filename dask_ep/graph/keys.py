"""What are a layer's tasks called?

    ("ep_experts-<token>", r)      loads the experts of rank r, on the worker that serves the rank
    ("ep_ranks-<token>",)          joins them: all ranks are loaded
    ("ep_chunk-<token>", c, 0)     one token chunk, from its rows to its output

Names are built and parsed here; only `storage`, a lower room, builds ``ep_read`` itself.
The token identifies one layer over one input. `ep_ranks_at_home` says that each chunk
has a home, the rank c mod R.

Tasks around a layer, and of experts in passes, have other names, which are parsed here too:
``("ep_<step>-<token>", c, ...)``, and those of the steps in `OF_BLOCKS`, which end with a rank.
"""

from __future__ import annotations

import ast
from typing import NamedTuple

EXPERTS, RANKS, RANKS_AT_HOME, CHUNK = "ep_experts-", "ep_ranks-", "ep_ranks_at_home-", "ep_chunk-"
DISPATCH = "ep_dispatch-"

BY_RANK = (EXPERTS, DISPATCH)
"""Prefixes of the names of tasks that run on a rank's owner; the rank is last in their keys."""

OF_BLOCKS = {"experts": 1, "dispatch": 2, "receipt": 2}
"""Steps whose keys end with a rank, and the index of the first number that distinguishes several
tasks of one step, chunk and rank."""

ROUTING = {"indices": "route", "weights": "route", "scores": "route"}
"""Steps that are shown as one."""


def experts_key(token: str, rank: int | None) -> tuple:
    """Return the key of the task that loads a rank's experts; None stands for the only rank."""
    return (f"{EXPERTS}{token}",) if rank is None else (f"{EXPERTS}{token}", rank)


def ranks_key(token: str, *, at_home: bool = False) -> tuple[str]:
    return (f"{RANKS_AT_HOME if at_home else RANKS}{token}",)


def chunk_name(token: str) -> str:
    return f"{CHUNK}{token}"


def step_name(step: str, token: str) -> str:
    """Return the name of the tasks of any other step."""
    return f"ep_{step}-{token}"


class RanksKey(NamedTuple):
    """The parts of the key of an ``ep_ranks`` task."""

    token: str
    at_home: bool


def read_ranks_key(key: object) -> RanksKey | None:
    """Parse a key if it is that of the task which joins the ranks of a layer; else return None.

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
    """The parts of the key of any task of a layer."""

    step: str
    #: from the name; if Dask has fused several tasks, of the first of them
    chunk: int = -1
    #: -1 for tasks of no chunk, or of several
    rank: int = -1
    #: -1 for tasks of no rank
    part: tuple[int, ...] = ()
    #: which of several tasks of this step, chunk and rank, with experts in passes


def read_key(key: object) -> TaskKey | None:
    """Parse a key, given as it is or as text; None if it is not of a layer.

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
