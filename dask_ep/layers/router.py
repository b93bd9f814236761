"""How is a router described?

A `Router` is data; `routing` computes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import Any

from dask_ep.arrays.checks import is_number
from dask_ep.layers.scores import CHOSEN_SCORES, GROUP_SCORES, SCORES


@dataclass(frozen=True)
class Router:
    """How logits become experts and weights.

    Attributes
    ----------
    num_experts, k : int
        E, and the number of experts that a row chooses.
    score : str
        ``"softmax"`` and ``"sigmoid"`` and ``"sqrtsoftplus"`` are functions of all E logits; the k
        largest scores choose. ``"softmax_chosen"`` and ``"sigmoid_chosen"`` choose by the logits,
        and then take the function of the k chosen logits only. ``"sparsemixer"`` chooses one expert
        after the other, and gives each its softmax among the logits that come near it.
    groups, topk_groups : int
        The experts are `groups` runs of E / groups neighbours, and a row chooses among those of its
        best `topk_groups` groups. Equal numbers mean no groups.
    group_score : {"max", "top2"}
        The score of a group for a row: its largest score, or the sum of its two largest.
    norm_topk_prob : bool
        Divide the k weights by their sum.
    norm_eps, norm_min : float
        The divisor is ``max(sum + norm_eps, norm_min)``.
    scale : float
        Multiplies the weights at the end.
    apply_router_weight_on_input : bool
        Whether the weight multiplies the row that the expert reads instead of its output. The
        experts apply it; it is here because families differ in it.
    always : int
        The last `always` experts are chosen by every row, after its k and whatever their scores;
        groups and selection bias are those of the others.
    jitter : float
        sparsemixer's epsilon: a logit s counts where ``(max - s) / max(|s|, max) <= 2 * jitter``.
    logit_scale : float
        Multiplies the logits.
    logit_softcap : float or None
        Then bounds them: ``cap * tanh(logit / cap)``.
    input_norm_eps : float or None
        The router reads ``row / sqrt(mean(row**2) + eps)`` instead of the row.
    masked_score : float or None
        Score of experts outside the chosen groups while experts are chosen; None means that they
        are not chosen.

    Examples
    --------
    DeepSeek-V3's router, with its published sizes:

    >>> from dask_ep import Router
    >>> router = Router(256, 8, "sigmoid", groups=8, topk_groups=4, group_score="top2",
    ...                 norm_topk_prob=True, norm_eps=1e-20, scale=2.5)
    """

    num_experts: int
    k: int
    score: str = "softmax"
    groups: int = 1
    topk_groups: int = 1
    group_score: str = "max"
    norm_topk_prob: bool = False
    norm_eps: float = 0.0
    norm_min: float = 0.0
    scale: float = 1.0
    apply_router_weight_on_input: bool = False
    jitter: float = 0.01
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    input_norm_eps: float | None = None
    masked_score: float | None = None
    always: int = 0

    def __post_init__(self) -> None:
        check_choice("score", self.score, [*SCORES, *CHOSEN_SCORES, "sparsemixer"])
        check_choice("group_score", self.group_score, GROUP_SCORES)
        for name in ("num_experts", "k", "groups", "topk_groups", "always"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Integral):
                raise ValueError(f"{name} must be a whole number, but is {value!r}")
        optional = ("logit_softcap", "input_norm_eps", "masked_score")
        for name in ("norm_eps", "norm_min", "scale", "jitter", "logit_scale", *optional):
            value = getattr(self, name)
            if value is None and name in optional:
                continue
            if not is_number(value):
                raise ValueError(f"{name} must be a finite number, but is {value!r}")
        if self.logit_softcap is not None and self.logit_softcap <= 0:
            raise ValueError(f"logit_softcap must be above 0, but is {self.logit_softcap}")
        for name in ("norm_topk_prob", "apply_router_weight_on_input"):
            if (value := getattr(self, name)) not in (True, False):
                raise ValueError(f"{name} must be True or False, but is {value!r}")
        chosen = self.num_experts - self.always
        if not 1 <= self.k <= chosen:
            raise ValueError(
                f"a row chooses k different experts of num_experts={chosen}, so k must "
                f"be in [1, {chosen}], but is {self.k}"
            )
        if self.always < 0 or (self.always and self.score == "sparsemixer"):
            raise ValueError(f"always must be at least 0, 0 with sparsemixer, but is {self.always}")
        self._check_groups()

    def _check_groups(self) -> None:
        E, G = self.num_experts - self.always, self.groups
        if G < 1 or E % G:
            raise ValueError(f"groups must divide num_experts={E}, but is {G}")
        if not 1 <= self.topk_groups <= G:
            raise ValueError(f"topk_groups must be in [1, {G}] (groups), but is {self.topk_groups}")
        if self.grouped and self.topk_groups * (E // G) < self.k:
            raise ValueError(
                f"the chosen groups must hold at least k={self.k} experts, but topk_groups="
                f"{self.topk_groups} groups of {E // G} hold {self.topk_groups * (E // G)}"
            )
        if self.grouped and self.group_score == "top2" and E // G < 2:
            raise ValueError(
                f"group_score='top2' needs groups of at least 2 experts, but {G} groups of "
                f"num_experts={E} hold {E // G}"
            )
        if self.grouped and self.score not in SCORES:
            raise ValueError(f"groups need a score of all experts, one of {list(SCORES)}, but "
                             f"score is {self.score!r}")  # fmt: skip

    @property
    def slots(self) -> int:
        """Experts per row: k, and those that every row chooses."""
        return self.k + self.always

    @property
    def grouped(self) -> bool:
        """Whether groups restrict the choice."""
        return self.topk_groups < self.groups


def check_choice(name: str, value: str, known: Any) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, but is {value!r}")
