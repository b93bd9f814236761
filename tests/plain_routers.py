"""What must each router give, said in plain loops over one row's logits in Python floats?

Nothing of the package is used; the tests compare `dask_ep.layers.routing` and
`dask_ep.layers.capacity` with it.
"""

from __future__ import annotations

import math


def softmax(logits):
    largest = max(logits)
    e = [math.exp(z - largest) for z in logits]
    return [v / sum(e) for v in e]


def sigmoid(z):
    return 1 / (1 + math.exp(-z)) if z > -700 else 0.0


def best(values, k):
    """Positions of the k largest, the lower one first among equals."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]


def route_row(logits, router, selection_bias=None, per_expert_scale=None):
    """Give [(expert, weight), ...], the best first."""
    pairs = choose_row([bounded(z, router) for z in logits], router, selection_bias)
    return pairs if per_expert_scale is None else [(e, w * per_expert_scale[e]) for e, w in pairs]


def bounded(logit, router):
    logit *= router.logit_scale
    cap = router.logit_softcap
    return logit if cap is None else cap * math.tanh(logit / cap)


def choose_row(logits, router, selection_bias):
    if router.score == "sparsemixer":
        return scaled(sparsemixer(logits, router.k, router.jitter), router)
    if router.score in ("softmax_chosen", "sigmoid_chosen"):
        chosen = best(add(logits, selection_bias), router.k)
        kept = [logits[e] for e in chosen]
        weights = softmax(kept) if router.score == "softmax_chosen" else [sigmoid(z) for z in kept]
        return scaled(list(zip(chosen, weights, strict=True)), router)
    scores = {
        "softmax": softmax,
        "sigmoid": lambda row: [sigmoid(z) for z in row],
        "sqrtsoftplus": lambda row: [math.sqrt(math.log1p(math.exp(z))) for z in row],
    }[router.score](logits)
    choice = add(scores, selection_bias)
    if router.topk_groups < router.groups:
        choice = only_best_groups(choice, router)
    return scaled([(e, scores[e]) for e in best(choice, router.k)], router)


def add(values, bias):
    return values if bias is None else [v + b for v, b in zip(values, bias, strict=True)]


def only_best_groups(choice, router):
    size = len(choice) // router.groups
    groups = [choice[g * size : (g + 1) * size] for g in range(router.groups)]
    how_many = {"max": 1, "top2": 2}[router.group_score]
    group_score = [sum(sorted(group)[-how_many:]) for group in groups]
    kept = best(group_score, router.topk_groups)
    masked = -math.inf if router.masked_score is None else router.masked_score
    return [c if e // size in kept else masked for e, c in enumerate(choice)]


def sparsemixer(logits, k, eps):
    taken, pairs = [], []
    for _ in range(k):
        left = [e for e in range(len(logits)) if e not in taken]
        first = max(left, key=lambda e: (logits[e], -e))
        m = logits[first]
        near = [logits[e] for e in left if m - logits[e] <= 2 * eps * max(abs(logits[e]), m)]
        pairs.append((first, 1 / sum(math.exp(z - m) for z in near)))
        taken.append(first)
    return pairs


def scaled(pairs, router):
    weights = [w for _, w in pairs]
    if router.norm_topk_prob:
        divisor = max(sum(weights) + router.norm_eps, router.norm_min)
        weights = [w / divisor for w in weights]
    return [(e, w * router.scale) for (e, _), w in zip(pairs, weights, strict=True)]


def drop_over_capacity(indices, weights, capacity, by):
    """Give `indices` (a list of rows) with -1 in the slots that their experts have no room for."""
    kept = [list(row) for row in indices]
    for expert in {e for row in indices for e in row if e >= 0}:
        slots = [(i, j) for i, row in enumerate(indices) for j, e in enumerate(row) if e == expert]
        if by == "score":
            slots.sort(key=lambda s: -weights[s[0]][s[1]])  # stable: the earlier row stays first
        for i, j in slots[capacity:]:
            kept[i][j] = -1
    return kept


def expert_choice(scores, capacity):
    """Give (row, expert) pairs: each expert's `capacity` best rows, the earlier among equals."""
    pairs = set()
    for expert in range(len(scores[0])):
        column = [row[expert] for row in scores]
        pairs |= {(row, expert) for row in best(column, capacity)}
    return pairs
