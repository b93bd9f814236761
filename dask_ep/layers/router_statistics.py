"""How sure is a router of its choice?

logits [n, E] ──> probabilities [n, E]    their mean by expert, entropy of each row
      ├─────────> log of the sum of exp   its square is the z-loss of a row
      └─────────> k-th and next score     the margin of a row's last choice
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import dask.array as da
import numpy as np
from dask.base import tokenize
from dask.task_spec import Task, TaskRef

from dask_ep.graph.keys import step_name
from dask_ep.graph.pipeline import Unfused
from dask_ep.graph.rows import first_rows, keys_of, xp_name
from dask_ep.graph.statistics import Numbers, Part, Partials, objects
from dask_ep.layers.lazy_routing import SmallArray, read_all, while_routing
from dask_ep.layers.router import Router
from dask_ep.layers.routing import WITHOUT_WARNINGS, mask_groups, tiled_logits
from dask_ep.layers.scores import SCORES, softmax

BINS = 64
"""Bins of each histogram; the first and the last also count values beyond."""

_LOG2_RANGES = {"margin": (-24.0, 8.0), "z_loss": (-8.0, 24.0)}
"""Range of the histograms' edges, as powers of two."""


def see_router(rows: da.Array, router: Any, arrays: Mapping[str, SmallArray]) -> Partials:
    """Collect statistics of a router on rows (n, d).

    Raises
    ------
    ValueError
        If rows do not choose by logits: expert choice, or a table.
    """
    if not isinstance(router, Router) or "table" in arrays or "weight" not in arrays:
        raise ValueError(
            "statistics of the router need a layer whose router chooses the k best experts of each "
            "row by its own weights"
        )
    names = ("weight", "bias", "selection_bias", "input_scale")
    arrays = {n: arrays[n] for n in names if n in arrays}
    token = tokenize(rows, router, arrays)
    name, loaded = step_name("see_router", token), step_name("router-see", token)
    tasks: dict[Any, Task] = {loaded: Task(loaded, read_all, arrays, xp_name(rows))}
    starts, keys = first_rows(rows.chunks[0]), []
    for c, key in enumerate(keys_of(rows)):
        keys.append((name, c, 0))
        tasks[keys[-1]] = Unfused(
            keys[-1], _see_chunk, TaskRef(key), TaskRef(loaded), router, c, starts[c]
        )
    parts = {"router.probability": Part((router.num_experts,), np.add)}
    for what in ("entropy", "z_loss", "margin"):
        parts[f"router.{what}"] = Part((), np.add)
        parts[f"router.{what}_histogram"] = Part((BINS,), np.add)
    parts["router.rows"] = Part((), np.add)
    return Partials(objects(name, tasks, [rows], len(keys)), parts, dict)


def edges(what: str, num_experts: int) -> np.ndarray:
    """The (BINS + 1,) edges of a histogram: "entropy" in nats, "z_loss" or "margin"."""
    if what == "entropy":
        return np.linspace(0, np.log(num_experts), BINS + 1)
    return np.exp2(np.linspace(*_LOG2_RANGES[what], BINS + 1))


@WITHOUT_WARNINGS
def _see_chunk(
    hidden: np.ndarray,
    arrays: dict[str, np.ndarray],
    router: Router,
    chunk: int,
    first_row: int | None,
) -> Numbers:
    found = {"router.rows": np.array(float(len(hidden)))}
    with while_routing(hidden, router.num_experts, router.k, chunk, first_row):
        seen = [
            _see_logits(logits, router, arrays.get("selection_bias"))
            for _, logits in tiled_logits(
                hidden, arrays["weight"], arrays.get("bias"), router, np.float32
            )
        ]
    probability = np.zeros(router.num_experts)
    for tile in seen:
        probability += tile[0]
    found["router.probability"] = probability
    for i, what in enumerate(("entropy", "z_loss", "margin"), 1):
        values = np.concatenate([tile[i] for tile in seen] or [np.zeros(0)])
        bins = np.searchsorted(edges(what, router.num_experts)[1:-1], values, side="right")
        found[f"router.{what}_histogram"] = np.bincount(bins, minlength=BINS)
        found[f"router.{what}"] = values.sum(dtype=np.float64)
    return found


def _see_logits(
    logits: np.ndarray, router: Router, selection_bias: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of a tile: sums of probabilities (E,), and each row's entropy, z-loss and margin."""
    largest = logits.max(axis=1)
    z = largest + np.log(np.exp(logits - largest[:, None]).sum(axis=1, dtype=np.float64))
    score = SCORES.get(router.score.removesuffix("_chosen"), softmax)
    scores = score(np, logits.copy())
    choice = scores.copy() if router.score in SCORES else logits
    if selection_bias is not None:
        choice = choice + selection_bias
    if router.grouped:
        mask_groups(np, choice, router)
    probability = scores / scores.sum(axis=1, keepdims=True)
    entropy = -(probability * np.log(np.maximum(probability, 1e-38))).sum(axis=1)
    return probability.sum(axis=0, dtype=np.float64), entropy, z**2, _margin(choice, router)


def _margin(choice: np.ndarray, router: Router) -> np.ndarray:
    """The k-th largest minus the next; none if a row chooses all experts that it may."""
    E, k = choice.shape[1], router.k
    in_groups = router.grouped and router.masked_score is None
    if k == (E // router.groups * router.topk_groups if in_groups else E):
        return np.zeros(0)
    best = np.partition(choice, (E - k - 1, E - k), axis=1)
    return best[:, E - k] - best[:, E - k - 1]
