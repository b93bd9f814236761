"""`workflows/walk_model.py` against transformers, where torch is installed."""

# ruff: noqa: E402 (importorskip has to come before the other imports)

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs an environment with torch and transformers")
pytest.importorskip("transformers", reason="needs an environment with torch and transformers")

from walk import head
from walk.documents import batch_documents, chunk_documents, spans
from walk.drive import run
from walk.memory import batch_bytes
from walk.model import Model, open_model
from walk.options import Options
from walk.stages import Walk
from walk.stand_ins import Answer, replaced
from walk.tape import Tape, play

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))

from make_checkpoints import (
    CASES,
    build,
    class_of,
    edit_config,
    float8_blocks,
    float8_values,
    moe_block,
    rewrite,
    routing_of,
)
from safetensors.numpy import load_file
from safetensors.numpy import save_file as save_arrays

from dask_ep import open_tokens
from dask_ep.jobs.backends import Threads
from dask_ep.jobs.collect_job import collect_job
from tests.cluster_processes import DEADLINE, Cluster, wait_until
from tests.workflows.whole_models import FAMILIES, VOCABULARY, make_model

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow

LENGTHS = (7, 24, 3, 17, 24, 1)

SIMILAR = (40, 7, 39, 24, 3, 17, 24, 1)
"""Lengths of documents of which two are run in one batch with padding."""

LEAK_WHEN_PACKED = {
    "qwen3_next", "gpt_oss", "minimax", "jamba", "granitemoehybrid", "deepseek_v4", "glm5_next",
    "qwen4_exp", "inkling2",
}  # fmt: skip
"""Families in which transformers lets documents packed into one sequence attend to each other:
linear attention, or a mask that ignores the positions."""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return a function that gives a family's model and its directory, made once."""
    made = {}

    def get(family, **changes):
        key = (family, *changes.items())
        if key not in made:
            directory = tmp_path_factory.mktemp(family)
            made[key] = make_model(family, directory, **changes), directory
        return made[key]

    return get


@pytest.fixture(scope="module")
def ids(tmp_path_factory):
    """Sequences of different lengths, padded to the longest with -1."""
    return save_ids(LENGTHS, tmp_path_factory.mktemp("ids") / "ids.npy")


def save_ids(lengths, path):
    rng, padded = np.random.default_rng(0), np.full((len(lengths), max(lengths)), -1)
    for row, length in zip(padded, lengths, strict=True):
        row[:length] = rng.integers(3, VOCABULARY, length)
    np.save(path, padded)
    return path


def read(path):
    return open_tokens(path).compute(scheduler="sync")


def close(ours, theirs, tolerance=1e-5):
    theirs = np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


class Theirs:
    """What transformers' own forward returns for the tokens of a batch that are not padding."""

    def __init__(self, model, ids, packed):
        model = getattr(model, "language_model", model)
        self.routing, real = {}, ids >= 0
        inputs = {"input_ids": torch.tensor(np.where(real, ids, 0))}
        inputs["attention_mask"] = torch.tensor(real).long()
        labels = torch.tensor(np.where(real, ids, -100))
        if packed:
            lengths = real.sum(axis=1)
            inputs = {"input_ids": torch.tensor(ids[real])[None]}
            inputs["position_ids"] = torch.tensor(np.concatenate([*map(np.arange, lengths)]))[None]
            labels = torch.tensor(ids[real])[None]
            labels[0, np.cumsum(lengths)[:-1]] = -100  # the first token of another document
            real = np.ones((1, int(real.sum())), bool)
        hooks = [self._listen(model, block, real) for block in self._moe_blocks(model)]
        with torch.no_grad():
            hidden = model.model(**inputs, use_cache=False).last_hidden_state
            out = model(**inputs, labels=labels, use_cache=False)
        for hook in hooks:
            hook.remove()
        self.hidden, self.logits = hidden.numpy()[real], out.logits.numpy()[real]
        self.loss = float(out.loss)

    def _moe_blocks(self, model):
        config = getattr(model.config, "text_config", model.config)
        for block in range(config.num_hidden_layers):
            moe = moe_block(model, block)
            if getattr(moe, "gate", None) is not None or hasattr(moe, "router"):
                yield block

    def _listen(self, model, block, real):
        moe = moe_block(model, block)

        def hook(_module, _args, output):
            indices, weights = routing_of(output, moe)
            self.routing[block] = (
                indices.numpy()[real.reshape(-1)],
                weights.numpy()[real.reshape(-1)],
            )

        return (getattr(moe, "gate", None) or moe.router).register_forward_hook(hook)


def in_order(indices, weights):
    order = np.argsort(indices, axis=1)
    return np.take_along_axis(indices, order, 1), np.take_along_axis(weights, order, 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_walk_gives_what_transformers_gives(family, models, tmp_path):
    """Final hidden states, logits, loss and routing; padded, and packed where transformers keeps
    documents apart."""
    model, directory = models(family)
    ids = save_ids(SIMILAR, tmp_path / "ids.npy")
    chunks = [SIMILAR[first:last] for first, last in spans(chunk_documents(SIMILAR, 90))]
    assert any(len({c[d] for d in one}) > 1 for c in chunks for one in batch_documents(c, 1024))
    summary = run(
        Options(str(directory), str(ids), str(tmp_path / "acts"), save=frozenset({"routing"}),
                chunk_rows=90)
    )  # fmt: skip
    assert not (tmp_path / "acts" / "work").exists()
    assert not (tmp_path / "acts" / "embedding.zarr").exists()
    final = read(tmp_path / "acts" / "final.zarr")
    (logits,) = head.heads([open_model(str(directory), "auto")], (0, VOCABULARY))
    ours = logits(final).detach().numpy()
    for packed in (False, True):
        if packed and family in LEAK_WHEN_PACKED:
            continue
        theirs = Theirs(model, np.load(ids), packed)
        close(final, theirs.hidden)
        close(ours, theirs.logits)
        assert summary["loss"] == pytest.approx(theirs.loss, abs=1e-6, rel=1e-6)
        assert summary["perplexity"] == pytest.approx(np.exp(theirs.loss), rel=1e-5)
        assert theirs.routing
        for block, expected in theirs.routing.items():
            indices = read(tmp_path / "acts" / f"routing_{block:03d}.zarr")
            weights = read(tmp_path / "acts" / f"topk_weights_{block:03d}.zarr")
            for got, wanted in zip(in_order(indices, weights), in_order(*expected), strict=True):
                np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-6)


def test_each_token_has_the_loss_of_the_next(models, ids, tmp_path):
    model, directory = models("mixtral")
    run(Options(str(directory), str(ids), str(tmp_path / "acts"), chunk_rows=40))
    loss, padded = np.load(tmp_path / "acts" / "loss.npy"), np.load(ids)
    logits = torch.tensor(Theirs(model, padded, packed=False).logits)
    flat, start = padded[padded >= 0], 0
    for length in LENGTHS:
        rows = slice(start, start + length - 1)
        expected = torch.nn.functional.cross_entropy(
            logits[rows], torch.tensor(flat[start + 1 : start + length]), reduction="none"
        )
        np.testing.assert_allclose(loss[rows], expected.numpy(), rtol=1e-5)
        assert np.isnan(loss[start + length - 1])
        start += length


def test_the_head_in_parts_of_the_vocabulary(models, ids, tmp_path, monkeypatch):
    _, directory = models("granitemoe")
    whole = run(Options(str(directory), str(ids), str(tmp_path / "whole"), chunk_rows=40))
    monkeypatch.setattr("walk.drive.HEAD_BYTES", 9 * 32 * 4)
    parts = run(Options(str(directory), str(ids), str(tmp_path / "parts"), chunk_rows=40))
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-9)


@pytest.mark.parametrize(
    ("family", "longest", "rope"),
    [
        ("mixtral", 20, {"rope_type": "dynamic", "factor": 2.0}),
        ("phimoe", 64, {"rope_type": "longrope", "short_factor": [1.0] * 4,
                        "long_factor": [3.0] * 4, "short_mscale": 1.1, "long_mscale": 1.3,
                        "original_max_position_embeddings": 20}),
    ],
)  # fmt: skip
def test_positions_depend_on_a_document_but_not_on_others_in_its_batch(
    family, longest, rope, tmp_path
):
    model = make_model(
        family, tmp_path / "model", head_dim=8, max_position_embeddings=longest,
        original_max_position_embeddings=20, rope_parameters=rope | {"rope_theta": 1e4},
    )  # fmt: skip
    padded = np.full((5, 24), -1)
    for row, length in zip(padded, (24, 20, 5, 22, 19), strict=True):
        row[:length] = np.random.default_rng(length).integers(3, VOCABULARY, length)
    np.save(tmp_path / "ids.npy", padded)
    run(Options(str(tmp_path / "model"), str(tmp_path / "ids.npy"), str(tmp_path / "acts")))
    alone = []
    for row in padded:
        fresh = type(model).from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
        alone.append(Theirs(fresh, row[None, row >= 0], packed=False).hidden)
    close(read(tmp_path / "acts" / "final.zarr"), np.concatenate(alone))


def test_a_tied_head_keeps_its_own_bias(ids, tmp_path):
    model = make_model("phimoe", tmp_path / "model", tie_word_embeddings=True)
    summary = run(Options(str(tmp_path / "model"), str(ids), str(tmp_path / "acts")))
    theirs = Theirs(model, np.load(ids), packed=False)
    assert summary["loss"] == pytest.approx(theirs.loss, abs=1e-6)


@pytest.mark.parametrize("lost", ["weight", "bias"])
def test_a_head_that_lacks_a_tensor_is_refused(lost, ids, tmp_path):
    make_model("phimoe", tmp_path / "model")
    name = f"lm_head.{lost}"
    rewrite(tmp_path / "model", lambda tensors: {n: t for n, t in tensors.items() if n != name})
    with pytest.raises(ValueError, match=f"the head of Phimoe.*, but lacks its {lost}"):
        run(Options(str(tmp_path / "model"), str(ids), str(tmp_path / "acts")))


def test_a_process_that_walked_before_reads_files_that_have_changed(tmp_path):
    """Another checkpoint, and as many tokens in other documents, in the same places."""
    for seed, shape in ((0, (4, 6)), (1, (6, 4))):
        model = make_model("olmoe", tmp_path / "model", seed=seed)
        np.save(tmp_path / "ids.npy", np.random.default_rng(seed).integers(3, VOCABULARY, shape))
        shutil.rmtree(tmp_path / "acts", ignore_errors=True)
        summary = run(
            Options(str(tmp_path / "model"), str(tmp_path / "ids.npy"), str(tmp_path / "acts"))
        )
        theirs = Theirs(model, np.load(tmp_path / "ids.npy"), packed=False)
        close(read(tmp_path / "acts" / "final.zarr"), theirs.hidden)
        assert summary["loss"] == pytest.approx(theirs.loss, abs=1e-6)


@pytest.mark.parametrize("fails", [(Tape, "written"), (Model, "_check_filled")])
def test_a_process_whose_walk_failed_in_a_block_can_walk_again(
    fails, models, ids, tmp_path, monkeypatch
):
    """While a block runs, or before all its tensors are read."""
    model, directory = models("mixtral")
    options = Options(str(directory), str(ids), str(tmp_path / "acts"), resume=True, chunk_rows=40)

    def fail(self, *given):
        if fails[0] is Tape or given[1] == "block 0":
            raise OSError("a disk is lost")
        check(self, *given)

    check = getattr(*fails)
    with monkeypatch.context() as patch:
        patch.setattr(*fails, fail)
        with pytest.raises(OSError, match="a disk is lost"):
            run(options)
    theirs = Theirs(model, np.load(ids), packed=False)
    assert run(options)["loss"] == pytest.approx(theirs.loss, abs=1e-6)


def test_documents_longer_than_the_length_are_cut(models, tmp_path):
    _, directory = models("qwen3_moe")
    whole, cut = np.random.default_rng(1).integers(3, VOCABULARY, (1, 30)), tmp_path / "cut.npy"
    np.save(tmp_path / "whole.npy", whole)
    np.save(
        cut,
        np.concatenate(
            [whole[:, :12], whole[:, 12:24], np.c_[whole[:, 24:], -np.ones((1, 6), int)]]
        ),
    )
    first = run(
        Options(str(directory), str(tmp_path / "whole.npy"), str(tmp_path / "a"), length=12)
    )
    second = run(Options(str(directory), str(cut), str(tmp_path / "b")))
    assert first["documents"] == second["documents"] == 3
    np.testing.assert_array_equal(
        read(tmp_path / "a" / "final.zarr"), read(tmp_path / "b" / "final.zarr")
    )


def test_some_blocks_and_what_is_kept_of_them(models, ids, tmp_path):
    model, directory = models("deepseek_v3")
    out = tmp_path / "acts"
    saved = frozenset({"hidden", "moe_input"})
    summary = run(Options(str(directory), str(ids), str(out), layers=range(1, 3), save=saved,
                          chunk_rows=30))  # fmt: skip
    zarrs = {path.name for path in out.glob("*.zarr")}
    assert zarrs == {f"{what}_00{b}.zarr" for what in ("block", "moe_input") for b in (1, 2)}
    assert not (out / "work").exists()
    assert [took["block"] for took in summary["blocks"]] == [0, 1, 2]
    assert "loss" not in summary
    padded = np.load(ids)
    with torch.no_grad():
        hidden = model.model(
            input_ids=torch.tensor(np.maximum(padded, 0)), output_hidden_states=True,
            attention_mask=torch.tensor(padded >= 0).long(),
        ).hidden_states  # fmt: skip
    for block in (1, 2):
        close(read(out / f"block_00{block}.zarr"), hidden[block + 1].numpy()[padded >= 0])


def test_a_bfloat16_checkpoint_stays_bfloat16(ids, tmp_path):
    """Rounding sends some rows to other experts, which changes them much; most rows are close."""
    model = make_model("mixtral", tmp_path / "model", dtype=torch.bfloat16)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    for dtype in ("auto", "float32"):
        run(Options(str(tmp_path / "model"), str(ids), str(tmp_path / dtype), dtype=dtype))
    low, high = (read(tmp_path / dtype / "final.zarr") for dtype in ("auto", "float32"))
    assert (low.dtype.name, high.dtype.name) == ("bfloat16", "float32")
    errors = np.abs(low.astype("f4") - high).max(axis=1)
    assert np.median(errors) < 0.02 * np.abs(high).max()


def test_quantized_attention_embedding_and_head_are_decoded_as_they_are_read(ids, tmp_path):
    model = make_model("deepseek_v3", tmp_path / "model")
    state, small = model.state_dict(), {}
    for name, value in state.items():
        attention = name.endswith("_proj.weight") and "self_attn" in name
        if attention or name in ("model.embed_tokens.weight", "lm_head.weight"):
            small[name], scale = float8_blocks(value, 16)
            small[name + "_scale_inv"] = scale
            value.copy_(float8_values(small[name], scale, 16))
    rewrite(tmp_path / "model", lambda tensors: tensors | small)
    quantization = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    edit_config(tmp_path / "model", quantization_config=quantization)
    summary = run(Options(str(tmp_path / "model"), str(ids), str(tmp_path / "acts")))
    theirs = Theirs(model, np.load(ids), packed=False)
    assert small
    close(read(tmp_path / "acts" / "final.zarr"), theirs.hidden)
    assert summary["loss"] == pytest.approx(theirs.loss, abs=1e-6)


def test_a_walk_starts_from_hidden_states_of_vllm(models, ids, tmp_path):
    """Files as its ExampleHiddenStatesConnector writes them: one per request, named after its id,
    with a lock file next to it; int64 token ids (tokens,), and hidden states (tokens, layers, d) in
    the dtype that the model was served in."""
    from safetensors.torch import save_file

    model, directory = models("olmoe")
    requests, padded = tmp_path / "requests", np.load(ids)
    requests.mkdir()
    with torch.no_grad():
        hidden = model.model(
            input_ids=torch.tensor(np.maximum(padded, 0)), output_hidden_states=True,
            attention_mask=torch.tensor(padded >= 0).long(),
        ).hidden_states  # fmt: skip
    for number, length in enumerate(LENGTHS):
        kept = torch.stack([hidden[block][number, :length] for block in (1, 2)], dim=1)
        path = requests / f"cmpl-{number}-0.safetensors"
        tensors = {"hidden_states": kept, "token_ids": torch.tensor(padded[number, :length])}
        if number % 2:
            tensors["hidden_states"] = kept.bfloat16()
        save_file(tensors, path)
        Path(f"{path}.lock").touch()
    options = Options(str(directory), str(requests), str(tmp_path / "rest"), chunk_rows=40,
                      start=2, column=1, save=frozenset({"hidden"}))  # fmt: skip
    rest = run(options)
    assert [took["block"] for took in rest["blocks"]] == [2, 3]
    with torch.no_grad():
        given = hidden[2].clone()
        given[1::2] = given[1::2].bfloat16().float()
        norm = model.model.norm(after(model, 2, given))
    final, ends = read(tmp_path / "rest" / "final.zarr"), np.cumsum(LENGTHS)
    assert final.dtype == np.float32
    for number, (length, end_of) in enumerate(zip(LENGTHS, ends, strict=True)):
        close(final[end_of - length : end_of], norm[number, :length].numpy())
    save_file({**tensors, "hidden_states": 2 * tensors["hidden_states"]}, path)
    with pytest.raises(ValueError, match="hidden_states was"):
        run(replace(options, resume=True))


@pytest.mark.parametrize(
    ("family", "start", "width", "message"),
    [
        ("hy_v4", 1, 32, "hidden states before block 1 of HYV4.* must have 128 columns, but .* 32"),
        ("hy_v4", 2, 128, "cannot start with .* before block 2: block 2 needs what block 1 ret"),
        ("inkling2", 2, 32, "cannot start with .* before block 2: block 2 needs what the embedd"),
        ("granitemoe", 0, 32, "cannot start .* before block 0: block 0 needs what the embedding"),
        ("mixtral", 0, 32, None),
        ("qwen4_exp", 2, 96, None),
    ],
)
def test_a_walk_starts_only_where_hidden_states_are_all_it_needs(
    family, start, width, message, models, tmp_path
):
    _, directory = models(family)
    requests = tmp_path / "requests"
    requests.mkdir()
    rows = np.random.default_rng(0).standard_normal((9, 1, width), "f4")
    tensors = {"hidden_states": rows, "token_ids": np.arange(3, 12)}
    save_arrays(tensors, requests / "cmpl-0.safetensors")
    options = Options(str(directory), str(requests), str(tmp_path / "acts"), start=start)
    if message is None:
        assert [took["block"] for took in run(options)["blocks"]] == [*range(start, 4)]
        return
    with pytest.raises(ValueError, match=message):
        run(options)
    assert not (tmp_path / "acts").exists()


def after(model, block, hidden):
    """Run transformers' own blocks, from this one on, on hidden states (batch, tokens, d)."""
    before = model.model.layers
    model.model.layers = torch.nn.ModuleList(before[block:])
    last = {}
    hook = before[-1].register_forward_hook(lambda _m, _a, out: last.update(out=out))
    try:
        model.model(inputs_embeds=hidden, use_cache=False)
    finally:
        hook.remove()
        model.model.layers = before
    return last["out"][0] if isinstance(last["out"], tuple) else last["out"]


def test_two_models_are_compared(models, ids, tmp_path):
    first, directory = models("mixtral")
    second, other = models("mixtral", num_experts_per_tok=1)
    summary = run(Options(str(directory), str(ids), str(tmp_path / "acts"), compare=str(other),
                          chunk_rows=40))  # fmt: skip
    padded = np.load(ids)
    ours, theirs = (Theirs(model, padded, packed=False) for model in (first, second))
    p, q = (torch.tensor(t.logits).double().log_softmax(1) for t in (ours, theirs))
    kl = (p.exp() * (p - q)).sum(1).mean()
    compared = summary["compare"]
    assert summary["loss"] == pytest.approx(ours.loss, abs=1e-6)
    assert compared["loss"] == pytest.approx(theirs.loss, abs=1e-6)
    assert compared["kl"] == pytest.approx(float(kl), rel=1e-4)
    errors = compared["hidden_error"]
    assert errors.keys() == {0, 1, 2, 3}
    assert 0 < errors[0]["relative_error"] < errors[3]["relative_error"]


def test_a_model_compared_with_itself_does_not_differ(models, ids, tmp_path):
    _, directory = models("qwen3_moe")
    shutil.copytree(directory, tmp_path / "same")
    compared = run(Options(str(directory), str(ids), str(tmp_path / "acts"),
                           compare=str(tmp_path / "same")))["compare"]  # fmt: skip
    assert compared["kl"] == pytest.approx(0, abs=1e-12)
    assert all(error["largest_error"] == 0 for error in compared["hidden_error"].values())


# --- the cut at the MoE module ---------------------------------------------------------------


def scaled_sum(moe, residual):
    scored, _ = moe(2 * residual)
    return residual + 0.5 * scored


def norm_and_shortcut(moe, residual):
    """More than one sublayer: what does not depend on the MoE module is computed at once."""
    out = moe(residual.view(-1, 4))
    first, second = torch.nn.functional.rms_norm(out, (4,)).view(residual.shape).chunk(2, dim=1)
    return residual.tanh() @ torch.eye(4) + torch.cat([second, first], dim=1)


def sum_in_place(moe, residual):
    kept = residual.clone()
    kept += moe(residual)
    return kept.mul_(2)


@pytest.mark.parametrize("block", [scaled_sum, norm_and_shortcut, sum_in_place])
def test_what_a_block_does_with_its_moe_output_is_replayed_later(block, tmp_path):
    torch.manual_seed(0)
    residual, output = torch.randn(2, 6, 4), torch.randn(2, 6, 4)
    tape = Tape()
    out = block(lambda given: tape.begin(given, Answer), residual)
    tape.stop()
    torch.save(tape.written(out), tmp_path / "kept")
    later = play(torch.load(tmp_path / "kept", weights_only=True), output)
    shaped = output.view(-1, 4) if block is norm_and_shortcut else output
    expected = block(lambda _: shaped.as_subclass(Answer), residual)
    np.testing.assert_array_equal(later.numpy(), expected.as_subclass(torch.Tensor).numpy())


def test_a_block_that_cannot_be_cut_is_refused():
    def run(block):
        tape = Tape()
        try:
            return tape.written(block(lambda given: tape.begin(given, Answer), torch.ones(2, 4)))
        finally:
            tape.stop()

    def through_a_view(moe, residual):
        sums = torch.zeros(2, 4)
        sums.view(-1)[:8] += moe(residual).view(-1)
        return sums + moe_free

    moe_free = torch.ones(2, 4)
    with pytest.raises(RuntimeError, match="must not read memory through another tensor"):
        run(through_a_view)

    def changes(how):
        def block(moe, residual):
            kept = residual.clone()
            out = moe(residual) + kept
            how(kept)
            return out

        return block

    for how in (
        lambda kept: kept.mul_(2),
        lambda kept: kept.view(-1)[:2].zero_(),
        lambda kept: torch.add(torch.ones(2, 4), 1, out=kept),
    ):
        with pytest.raises(RuntimeError, match="must not change a tensor after it has combined it"):
            run(changes(how))
    with pytest.raises(RuntimeError, match="the module was not called"):
        run(lambda moe, residual: residual)
    with pytest.raises(RuntimeError, match="it was not used"):
        run(lambda moe, residual: [moe(residual), residual][1])
    with pytest.raises(RuntimeError, match="must call its MoE module once"):
        run(lambda moe, residual: moe(moe(residual)))


@pytest.mark.parametrize(
    "look",
    [
        lambda out: bool((out > 1).any()),
        lambda out: out.max().item(),
        lambda out: torch.equal(out, torch.ones(2, 4)),
        lambda out: len(torch.nonzero(out)),
    ],
    ids=["branch", "number", "equal", "count"],
)
def test_a_block_that_reads_values_which_are_not_known_yet_is_refused(look):
    tape = Tape()
    out = tape.begin(torch.ones(2, 4), Answer)
    try:
        with pytest.raises(RuntimeError, match="must not depend on the values"):
            look(out)
    finally:
        tape.stop()


def test_a_value_that_is_read_past_the_dispatcher_makes_the_result_nan():
    tape = Tape()
    out = tape.begin(torch.ones(2, 4), Answer)
    out = out * float(out.numpy().max())
    tape.stop()
    assert play(tape.written(out), torch.ones(2, 4)).isnan().all()


# --- several threads in a block --------------------------------------------------------------


class Counting(torch.nn.Module):
    """Changes a buffer in place, as rotary embeddings for long texts do."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))
        self.inner = torch.nn.Linear(2, 2)

    def forward(self, rows):
        self.seen += len(rows)
        return self.inner(rows) * self.seen


def test_a_copy_shares_weights_but_nothing_that_a_forward_changes():
    whole = torch.nn.Sequential(Counting(), torch.nn.Tanh())
    part = replaced(whole, {"1": torch.nn.Identity()})
    rows = torch.ones(3, 2)
    np.testing.assert_array_equal(part(rows).detach(), 3 * whole[0].inner(rows).detach())
    assert part[0].inner.weight is whole[0].inner.weight
    assert whole[0].seen.item() == 0
    assert isinstance(whole[1], torch.nn.Tanh)
    inner = replaced(whole, {"0.inner": torch.nn.Identity()})
    np.testing.assert_array_equal(inner(rows), torch.full((3, 2), 3.0).tanh())


def test_a_block_keeps_its_weights_while_any_thread_holds_it(models):
    _, directory = models("mixtral")
    model, left = open_model(str(directory), "auto"), threading.Event()

    def next_block():
        with model.hold(1) as block:
            return left.is_set(), next(block.parameters()).is_meta

    with ThreadPoolExecutor(1) as pool:
        with model.hold(0) as first:
            with model.hold(0) as second:
                assert second is first
            waiting = pool.submit(next_block)
            assert not next(first.parameters()).is_meta
            left.set()
        assert waiting.result(DEADLINE) == (True, False)
    assert next(first.parameters()).is_meta


# --- stopped, resumed, elsewhere -------------------------------------------------------------


def script(*arguments):
    """Start the script as a user would."""
    return subprocess.Popen(
        [sys.executable, ROOT / "workflows" / "walk_model.py", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def done_in(record):
    """Return the files that record which blocks of an output are done."""
    return list(record.glob("done*"))


def end(process):
    out, told = process.communicate(timeout=200)
    assert process.returncode == 0, told
    return out, told


@pytest.mark.parametrize(
    ("family", "save"),
    [
        ("deepseek_v2", "hidden,routing"),
        ("deepseek_v2", "routing"),
        ("deepseek_v4", "hidden,routing"),
        ("glm_moe_dsa", "routing"),
        ("inkling2", "routing"),
    ],
)
def test_a_walk_that_was_killed_continues_with_the_same_bits(family, save, models, tmp_path):
    """kill -9 in the first, second and third block, then to the end."""
    _, directory = models(family)
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(3, VOCABULARY, (200, 40)))
    arguments = [directory, tmp_path / "ids.npy", "--save", save, "--chunk-rows", 80]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    end(script(*arguments, "--out", whole))
    killed = []
    for block in (0, 1, 2):
        process = script(*arguments, "--out", stopped, *(["--resume"] if block else []))
        while process.poll() is None:
            later = f"[{block}-3]"
            if any(
                list(stopped.glob(begun.replace("N", later)))
                for begun in ("work/*_00N/*", "block_00N.zarr*/*.zarr", "block_00N.zarr")
            ):
                time.sleep(0.05)
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.005)
        process.communicate()
        killed.append(process.returncode)
    assert killed == [-signal.SIGKILL] * 3
    end(script(*arguments, "--out", stopped, "--resume"))
    names = {path.name for path in whole.glob("*.zarr")}
    assert (
        names
        == {path.name for path in stopped.glob("*.zarr")}
        >= {"final.zarr", "routing_003.zarr"} | ({"block_003.zarr"} if "hidden" in save else set())
    )
    for name in names:
        np.testing.assert_array_equal(read(stopped / name), read(whole / name))
    losses = [json.loads((out / "summary.json").read_text())["loss"] for out in (whole, stopped)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("save", [{"hidden", "moe_input", "routing"}, {"moe_input"}])
@pytest.mark.parametrize("stop", ["sum", "before tidying", "after tidying"])
def test_a_walk_stopped_at_the_end_of_a_block_keeps_all_that_was_asked_for(
    stop, save, models, ids, tmp_path, monkeypatch
):
    _, directory = models("olmoe")

    def walk(out, **more):
        return run(Options(str(directory), str(ids), str(tmp_path / out), chunk_rows=30,
                           save=frozenset(save), **more))  # fmt: skip

    walk("whole")
    store, tidy = Walk._store, Walk.tidy

    def stopped_store(self, stage, y, path, inputs):
        if stop == stage and "block_001" in path:
            raise KeyboardInterrupt
        store(self, stage, y, path, inputs)

    def stopped_tidy(self, block):
        if stop == "after tidying" or block != 1:
            tidy(self, block)
        if "tidying" in stop and block == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Walk, "_store", stopped_store)
        patch.setattr(Walk, "tidy", stopped_tidy)
        if "hidden" in save or stop != "sum":
            with pytest.raises(KeyboardInterrupt):
                walk("stopped")
    summary = walk("stopped", resume=True)
    assert [took["block"] for took in summary["blocks"]] == [0, 1, 2, 3]
    names = {path.name for path in (tmp_path / "whole").glob("*.zarr")}
    assert names == {path.name for path in (tmp_path / "stopped").glob("*.zarr")}
    assert names >= {f"{'block' if 'hidden' in save else 'moe_input'}_00{b}.zarr" for b in range(4)}
    for name in names:
        np.testing.assert_array_equal(
            read(tmp_path / "stopped" / name), read(tmp_path / "whole" / name)
        )


@pytest.mark.parametrize(
    "name", ["embedding.zarr", "block_001.zarr", "stats_001.safetensors", "final.zarr"]
)
def test_a_walk_stopped_when_an_output_has_its_name_leaves_no_record_of_its_progress(
    name, models, ids, tmp_path, monkeypatch
):
    _, directory = models("olmoe")
    options = Options(str(directory), str(ids), str(tmp_path / "acts"), resume=True,
                      save=frozenset({"hidden"}), collect=frozenset({"usage"}))  # fmt: skip
    progress = tmp_path / "acts" / f"{name}.progress"

    def stopped(write):
        def run_and_stop(*args, **more):
            found = write(*args, **more)
            if (tmp_path / "acts" / name).exists():
                progress.mkdir(exist_ok=True)
                raise KeyboardInterrupt
            return found

        return run_and_stop

    with monkeypatch.context() as patch:
        patch.setattr(Walk, "_store", stopped(Walk._store))
        patch.setattr("walk.stages.collect_job", stopped(collect_job))
        with pytest.raises(KeyboardInterrupt):
            run(options)
    assert progress.exists()
    run(options)
    assert not list((tmp_path / "acts").glob("**/*.progress"))


@pytest.mark.parametrize("save", [{"routing"}, {"hidden"}])
def test_a_walk_stopped_before_its_summary_or_complete_can_be_resumed(
    save, models, ids, tmp_path, monkeypatch
):
    _, directory = models("olmoe")
    options = Options(str(directory), str(ids), str(tmp_path / "acts"), layers=range(2),
                      save=frozenset(save), resume=True)  # fmt: skip

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("walk.drive.write_json", stop)
        with pytest.raises(KeyboardInterrupt):
            run(options)
    summary = run(options)
    names = {path.name for path in (tmp_path / "acts").iterdir()}
    assert "work" not in names
    assert run(options) == summary
    assert names == {path.name for path in (tmp_path / "acts").iterdir()}


def test_a_walk_that_was_killed_while_collecting_continues_with_the_same_bits(models, tmp_path):
    """Killed between two groups of token chunks: the sums of the first are not computed again."""
    _, directory = models("olmoe")
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(3, VOCABULARY, (100, 40)))
    what = ["--collect", "usage,amax,reap", "--chunk-rows", 40, "--layers", 0]
    arguments = [directory, tmp_path / "ids.npy", *what]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    end(script(*arguments, "--out", whole))
    record = stopped / "stats_000.safetensors.progress" / "groups-0.zarr.progress"
    with script(*arguments, "--out", stopped) as process:
        wait_until(
            lambda: process.poll() is not None or any(p.stat().st_size for p in done_in(record)),
            "a group is done",
        )
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not (stopped / "stats_000.safetensors").exists()
    end(script(*arguments, "--out", stopped, "--resume"))
    first, second = (load_file(out / "stats_000.safetensors") for out in (whole, stopped))
    assert first.keys() == second.keys() > {"usage.rows", "reap.score"}
    for name, array in first.items():
        np.testing.assert_array_equal(second[name], array, err_msg=name)


def same_values(ours, theirs, blocks):
    """Compare two walks, one of which ran on workers, with other numbers of threads and rows."""
    close(read(ours / "final.zarr"), read(theirs / "final.zarr"), 1e-6)
    for block in blocks:
        name = f"routing_{block:03d}.zarr"
        np.testing.assert_array_equal(read(ours / name), read(theirs / name))
        first, second = (
            load_file(out / f"stats_{block:03d}.safetensors") for out in (ours, theirs)
        )
        assert first.keys() == second.keys()
        for name, array in first.items():
            np.testing.assert_allclose(array, second[name], rtol=1e-4, err_msg=name)
    losses = [json.loads((out / "summary.json").read_text())["loss"] for out in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


@pytest.mark.parametrize("family", ["deepseek_v4", "hy_v4", "inkling2"])
def test_what_blocks_hand_on_reaches_other_processes(family, models, ids, tmp_path):
    _, directory = models(family)
    arguments = [directory, ids, "--save", "routing", "--collect", "usage", "--chunk-rows", 30]
    end(script(*arguments, "--out", tmp_path / "here"))
    end(script(*arguments, "--out", tmp_path / "processes", "--processes", 2))
    same_values(tmp_path / "processes", tmp_path / "here", (1, 2, 3))


def test_a_walk_on_worker_processes_and_on_a_cluster(models, ids, tmp_path):
    """Two processes that it starts, and two workers of a scheduler, give what this process does."""
    _, directory = models("glm4_moe")
    arguments = [directory, ids, "--save", "routing", "--collect", "usage,reap", "--chunk-rows", 30]
    end(script(*arguments, "--out", tmp_path / "here"))
    end(script(*arguments, "--out", tmp_path / "processes", "--processes", 2))
    same_values(tmp_path / "processes", tmp_path / "here", (1, 2, 3))
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "workflows")))
    with Cluster(tmp_path, ["a", "b"], environment={"PYTHONPATH": paths}) as cluster:
        cluster.client().close()
        where = ["--scheduler", cluster.address, "--workers", 2]
        end(script(*arguments, "--out", tmp_path / "cluster", *where))
        with cluster.client() as client:
            threads = client.run(torch.get_num_threads)
            assert set(threads.values()) == {1}, "as many as a worker has"
    same_values(tmp_path / "cluster", tmp_path / "here", (1, 2, 3))


def test_workers_that_lack_the_walk_are_refused(models, ids, tmp_path):
    _, directory = models("mixtral")
    with Cluster(tmp_path, ["a"], environment={"PYTHONPATH": str(ROOT)}) as cluster:
        cluster.client().close()
        process = script(directory, ids, "--out", tmp_path / "out", "--scheduler", cluster.address)
        _, told = process.communicate(timeout=DEADLINE)
    assert process.returncode == 1
    assert "must have torch and transformers, and workflows/ on their PYTHONPATH" in told
    assert "No module named 'walk'" in told


def test_a_walk_is_not_overwritten_or_resumed_with_other_options(models, ids, tmp_path):
    _, directory = models("mixtral")
    options = Options(str(directory), str(ids), str(tmp_path / "acts"))
    run(options)
    with pytest.raises(FileExistsError, match="acts exists; use --resume to continue it"):
        run(options)
    with pytest.raises(ValueError, match="chunk_rows was 4096 and is 8"):
        run(replace(options, chunk_rows=8, resume=True))


def test_a_text_is_read_with_the_tokenizer_of_the_checkpoint(models, tmp_path):
    _, directory = models("olmoe")
    give_tokenizer(directory)
    (tmp_path / "text.txt").write_text("the cat sat on a mat\n\nthe dog ran\n")
    summary = run(Options(str(directory), str(tmp_path / "text.txt"), str(tmp_path / "acts")))
    assert (summary["tokens"], summary["documents"]) == (9, 2)
    np.testing.assert_array_equal(
        np.load(tmp_path / "acts" / "tokens.npy"), [1, 3, 5, 7, 2, 8, 1, 4, 6]
    )


# --- memory ----------------------------------------------------------------------------------


def test_memory_of_attention_is_found_without_computing(models):
    """Memory grows in proportion to the documents of a batch, and, as attention is fused, to their
    length."""
    _, directory = models("mixtral", sliding_window=None)
    model = open_model(str(directory), "auto")
    small, wide, long = (batch_bytes(model, 0, *size).peak for size in ((2, 16), (4, 16), (2, 32)))
    assert wide == pytest.approx(2 * small, rel=0.1)
    assert long == pytest.approx(2 * small, rel=0.1)
    assert small > 4 * 2 * 16 * 32 * 4, "more than the batch, its norm, queries and keys"


def test_a_memory_limit_below_what_a_walk_takes_is_refused(models, ids, tmp_path):
    _, directory = models("mixtral")
    with pytest.raises(MemoryError, match=r"memory limit must be at least .* but is 100 MB"):
        run(
            Options(
                str(directory),
                str(ids),
                str(tmp_path / "acts"),
                where=Threads(memory_limit=100_000_000),
            )
        )


def test_token_ids_beyond_the_vocabulary_are_refused(models, tmp_path):
    _, directory = models("mixtral")
    np.save(tmp_path / "ids.npy", np.array([[3, VOCABULARY]]))
    with pytest.raises(ValueError, match=rf"token ids must be in \[0, {VOCABULARY}\)"):
        run(Options(str(directory), str(tmp_path / "ids.npy"), str(tmp_path / "acts")))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("diffusion_gemma", "DiffusionGemma.* must call each block once, .*decoder_input_ids"),
    ],
)
def test_models_that_cannot_be_cut_into_blocks_are_refused(name, message, tmp_path):
    build(CASES[name]).save_pretrained(tmp_path / "model")
    np.save(tmp_path / "ids.npy", np.full((1, 4), 3))
    with pytest.raises(ValueError, match=message + ".*; if transformers can run this model"):
        run(Options(str(tmp_path / "model"), str(tmp_path / "ids.npy"), str(tmp_path / "acts")))
    assert not list(tmp_path.glob("acts/*.zarr*"))


def test_statistics_that_are_not_collected_are_refused_before_anything_is_written(tmp_path):
    build(CASES["longcat_flash"]).save_pretrained(tmp_path / "model")
    np.save(tmp_path / "ids.npy", np.full((1, 4), 3))
    options = Options(str(tmp_path / "model"), str(tmp_path / "ids.npy"), str(tmp_path / "acts"))
    with pytest.raises(ValueError, match="not collected for .* identity experts"):
        run(replace(options, collect=frozenset({"usage"})))
    run(options)


def test_an_embedding_with_a_norm_is_filled(tmp_path):
    walk_case("inkling_text", tmp_path)


def test_a_block_that_runs_only_with_its_weights_is_measured_with_them(tmp_path):
    """Experts in the attention, which are transformers' own: it reads how many rows each gets."""
    walk_case("jetmoe", tmp_path)
    model = open_model(str(tmp_path / "model"), "auto")
    assert model.flow.by_value == {0}
    small, wide = (batch_bytes(model, 0, documents, 16).peak for documents in (2, 4))
    assert wide == pytest.approx(2 * small, rel=0.1)
    assert next(model.blocks[0].parameters()).is_meta


@pytest.mark.parametrize("name", ["dbrx", "kimi_k25"])
def test_blocks_may_be_called_blocks_in_transformers_or_in_files(name, tmp_path):
    walk_case(name, tmp_path)


@pytest.mark.parametrize("name", ["muse_spark_text", "openai_privacy_filter"])
def test_a_model_without_a_head_has_hidden_states_but_no_loss(name, tmp_path):
    summary = walk_case(name, tmp_path)
    assert "loss" not in summary
    assert not (tmp_path / "acts" / "loss.npy").exists()
    both = walk_case(name, tmp_path / "both", compare=str(tmp_path / "model"))
    assert both["compare"].keys() == {"hidden_error"}
    assert all(error["largest_error"] == 0 for error in both["compare"]["hidden_error"].values())


def walk_case(name, tmp_path, **more):
    """Walk a checkpoint of the fixtures, compare its hidden states, and return the summary."""
    tmp_path.mkdir(exist_ok=True)
    build(CASES[name]).save_pretrained(tmp_path / "model")
    ids = np.random.default_rng(0).integers(3, 16, (4, 9))
    np.save(tmp_path / "ids.npy", ids)
    model = class_of(CASES[name]).from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    decoder = model.get_decoder()
    with torch.no_grad():
        hidden = decoder(input_ids=torch.tensor(ids), use_cache=False).last_hidden_state
    summary = run(
        Options(str(tmp_path / "model"), str(tmp_path / "ids.npy"), str(tmp_path / "acts"), **more)
    )
    close(read(tmp_path / "acts" / "final.zarr"), hidden.flatten(0, 1))
    return summary


def test_the_cost_of_a_walk_is_measured():
    """The script makes a checkpoint, walks it within memory, and reads each expert once."""
    done = subprocess.run(
        [sys.executable, ROOT / "workflows" / "walk_cost.py", "--tokens", "600", "--length", "32",
         "--blocks", "2", "--d", "64", "--hidden", "32", "--experts", "8", "--k", "2",
         "--vocabulary", "64", "--memory-limit", "2GB", "--sample", "64"],
        text=True, capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    peak = re.search(r"memory: peak (\S+) GB, limit 2.00 GB", done.stdout)
    assert 0.1 < float(peak[1]) < 2
    assert "16 experts read of 16" in done.stdout
    assert re.search(r"\| experts \| \S+ \| \S+ \| \S+ \|", done.stdout)


# --- the example of workflows/README.md ------------------------------------------------------


def give_tokenizer(directory):
    """Save a tokenizer of eight words with a model."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "the", "a", "cat", "dog", "sat", "ran", "on", "mat"]
    tokenizer = Tokenizer(WordLevel({word: n for n, word in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    made.save_pretrained(directory)


def test_the_example_of_the_readme(tmp_path):
    """Collect, prune, compare: each line as printed there."""
    text = (ROOT / "workflows" / "README.md").read_text()
    example = text.split("## A whole model")[1].split("```sh\n")[1].split("```")[0]
    make_model("qwen3_moe", tmp_path / "MODEL", num_experts=8)
    give_tokenizer(tmp_path / "MODEL")
    (tmp_path / "calibration.txt").write_text("the cat sat on a mat\nthe dog ran\n" * 20)
    (tmp_path / "test.txt").write_text("a dog sat on the cat\n" * 10)
    printed = []
    for line in example.splitlines():
        program, name, *arguments = line.split()
        assert program == "python"
        done = subprocess.run(
            [sys.executable, ROOT / name, *arguments], cwd=tmp_path, text=True,
            capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout)
    assert "PRUNED: 4 of 8 experts in each layer" in printed[1]
    assert "KL divergence" in printed[2]
    compared = json.loads((tmp_path / "compared" / "summary.json").read_text())["compare"]
    assert compared["kl"] > 0
    assert compared["hidden_error"].keys() == {"0", "1", "2", "3"}


def test_statistics_are_those_of_the_layer_alone(models, ids, tmp_path):
    from dask_ep import collect, load_moe_layer

    _, directory = models("deepseek_v2")
    what = frozenset({"usage", "reap", "amax", "coactivation", "router"})
    run(Options(str(directory), str(ids), str(tmp_path / "acts"), collect=what, chunk_rows=40,
                save=frozenset({"moe_input"})))  # fmt: skip
    assert not (tmp_path / "acts" / "stats_000.safetensors").exists()
    for block in (1, 2, 3):
        rows = open_tokens(tmp_path / "acts" / f"moe_input_00{block}.zarr")
        expected = collect(rows, load_moe_layer(directory, block), what=what)
        found = load_file(tmp_path / "acts" / f"stats_00{block}.safetensors")
        assert found.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_allclose(found[name], array.compute(), rtol=1e-5, err_msg=name)
