"""What loss does a model have, and how do two models' predictions differ?

    final hidden states (n, d) ──> logits of a part of the vocabulary ──> a few sums for each row
    the sums of all parts ──> loss of each token, and the KL divergence from another model's logits

Logits come from the model's own forward, so whatever it does to logits is included. Its decoder is
replaced by one that returns the stored rows, and its head by a part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from dask_ep.storage.sources import Source
from walk.model import Model, path_of
from walk.stand_ins import replaced, with_parameters
from walk.tensors import as_tensor

LOGIT_BYTES = 8 << 20
"""Memory for the logits that are computed at a time: about the size of a cache."""

COLUMNS, COLUMNS_OF_TWO = 3, 7
"""Columns of what `score` returns, for one model and for two."""


class Scores(NamedTuple):
    """Losses and KL divergences of all rows."""

    loss: np.ndarray
    #: (n,) float64, of each token that is followed by another; NaN for the others
    other_loss: np.ndarray | None
    #: of the other model
    kl: np.ndarray | None
    #: (n,) float64, KL divergence of the other model's distribution from this one's


class _Hidden:
    """What a decoder returns, reduced to what heads read."""

    def __init__(self, rows: torch.Tensor):
        self.last_hidden_state = rows

    def __getitem__(self, index: int) -> torch.Tensor | None:
        return self.last_hidden_state if index == 0 else None

    def __getattr__(self, name: str) -> None:
        return None


class _Decoder(nn.Module):
    """Replaces a model's decoder: returns the rows to score."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: torch.Tensor | None = None

    def forward(self, *_: Any, **__: Any) -> _Hidden:
        return _Hidden(self.rows)


def head_sources(model: Model) -> tuple[Source, Source | None]:
    """Return the head's matrix (vocabulary, d), the embedding's if they are tied, and its bias."""
    linear = model.whole.get_output_embeddings()
    found = model.sources_of(linear)
    weight, bias = found.get("weight"), found.get("bias")
    if (
        weight is None
        and path_of(model.whole, linear) + "weight" in model.whole.all_tied_weights_keys
    ):
        weight = model.sources_of(model.decoder.get_input_embeddings()).get("weight")
    if weight is None or (bias is None and getattr(linear, "bias", None) is not None):
        raise ValueError(
            f"{model.directory} must have the head of {type(model.whole).__name__}, but lacks its "
            f"{'weight' if weight is None else 'bias'}"
        )
    return weight, bias


def score(
    models: Sequence[Model],
    vocabulary: tuple[int, int],
    rows: Sequence[np.ndarray],
    targets: np.ndarray,
) -> np.ndarray:
    """Score rows against a part of the vocabulary.

    Parameters
    ----------
    models : one, or two whose logits are compared
    vocabulary : the part's first token id, and its last + 1
    rows : final hidden states (n, d) of each model
    targets : (n,) the token that follows each one; -1 where none does

    Returns
    -------
    (n, 3) float64: the largest logit, the sum of exp(logit - largest), and the logit of the target
    (0 if it is in another part). With two models there follow the same three of the second, and the
    sum of exp(logit - largest) * (logit - other logit)
    """
    first, last = vocabulary
    n, columns = len(targets), COLUMNS if len(models) == 1 else COLUMNS_OF_TWO
    out = np.empty((n, columns))
    at_a_time = max(1, LOGIT_BYTES // (4 * (last - first)))
    runs = heads(models, vocabulary)
    with torch.inference_mode():
        for start in range(0, n, at_a_time):
            part = slice(start, min(start + at_a_time, n))
            logits = [run(each[part]) for run, each in zip(runs, rows, strict=True)]
            out[part] = np.concatenate(_sums(logits, targets[part] - first), axis=1)
    return out


def _sums(logits: list[torch.Tensor], targets: np.ndarray) -> list[np.ndarray]:
    sums = []
    here = (targets >= 0) & (targets < logits[0].shape[1])
    places = torch.from_numpy(np.where(here, targets, 0))[:, None]
    for each in logits:
        largest = each.amax(dim=1)
        weights = (each - largest[:, None]).exp()
        target = each.gather(1, places)[:, 0].double().numpy() * here
        total = weights.sum(dim=1, dtype=torch.float64)
        sums += [largest.double().numpy()[:, None], total.numpy()[:, None], target[:, None]]
    if len(logits) == 2:
        weights = (logits[0] - logits[0].amax(dim=1, keepdim=True)).exp()
        gap = (weights * (logits[0] - logits[1])).sum(dim=1, dtype=torch.float64)
        sums.append(gap.numpy()[:, None])
    return sums


def combine(parts: Iterable[np.ndarray], targets: np.ndarray) -> Scores:
    """Join what `score` returned for all parts of the vocabulary."""
    parts = np.stack(list(parts))
    followed = np.where(targets >= 0, 0.0, np.nan)

    def of_model(column: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        largest = parts[:, :, column].max(axis=0)
        total = (parts[:, :, column + 1] * np.exp(parts[:, :, column] - largest)).sum(axis=0)
        normaliser = largest + np.log(total)
        return largest, normaliser, normaliser - parts[:, :, column + 2].sum(axis=0) + followed

    largest, normaliser, loss = of_model(0)
    if parts.shape[2] == COLUMNS:
        return Scores(loss, None, None)
    _, other_normaliser, other_loss = of_model(COLUMNS)
    gap = (parts[:, :, 6] * np.exp(parts[:, :, 0] - largest)).sum(axis=0)
    kl = gap / np.exp(normaliser - largest) - (normaliser - other_normaliser)
    return Scores(loss, other_loss, kl)


def heads(
    models: Sequence[Model], vocabulary: tuple[int, int]
) -> list[Callable[[np.ndarray], torch.Tensor]]:
    """Return, for each model, a function from rows (n, d) to float32 logits of a part of the
    vocabulary."""
    return [_head(model, vocabulary) for model in models]


def _head(model: Model, vocabulary: tuple[int, int]) -> Callable[[np.ndarray], torch.Tensor]:
    whole, linear = model.whole, model.whole.get_output_embeddings()
    weight, bias = _part_of_head(model, vocabulary)
    part = with_parameters(linear, weight=weight, bias=bias)
    outer, dot, name = path_of(whole, linear).removesuffix(".").rpartition(".")
    decoder, inner = _Decoder(), model.path.removeprefix(outer + dot).split(".")[0]
    whole = replaced(whole.get_submodule(outer), {inner: decoder, name: part})

    def run(rows: np.ndarray) -> torch.Tensor:
        decoder.rows = as_tensor(np.ascontiguousarray(rows))[None]
        logits = whole(inputs_embeds=decoder.rows, use_cache=False).logits[0].float()
        if logits.shape != (len(rows), len(weight)):
            raise ValueError(
                f"{type(whole).__name__} must return {(len(rows), len(weight))} logits, one for "
                f"each row and token, but returns {tuple(logits.shape)}"
            )
        return logits

    return run


def _part_of_head(
    model: Model, vocabulary: tuple[int, int]
) -> tuple[nn.Parameter, nn.Parameter | None]:
    """Read a part of the head; the model caches the last one that was read."""
    with model.head_lock:
        if model.head_part is None or model.head_part[0] != vocabulary:
            model.head_part = None  # free it before the next one is read
            read = [
                None if source is None else as_tensor(source.read(*vocabulary)).to(model.dtype)
                for source in head_sources(model)
            ]
            model.head_part = (
                vocabulary,
                *(
                    None if part is None else nn.Parameter(part, requires_grad=False)
                    for part in read
                ),
            )
        return model.head_part[1:]
