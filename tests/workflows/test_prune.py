"""A pruned checkpoint is the old one, with the other experts masked out."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
from copy import copy
from pathlib import Path

import click
import dask.array as da
import numpy as np
import pytest
from safetensors.numpy import save_file

from dask_ep import MoELayer, load_moe_layer
from dask_ep.layers.checkpoint_layers import Checkpoint
from dask_ep.layers.layer_checks import small_array
from dask_ep.storage.sources import open_safetensors
from tests.checkpoints import (
    CASES,
    FIXTURES,
    LAYER,
    altered,
    expected,
    read_tensors,
    write_tensors,
)  # fmt: skip

ROOT = Path(__file__).parents[2]
SCRIPT = runpy.run_path(str(ROOT / "workflows" / "prune_experts.py"))
MASKED = np.float32(-1e30)


def prune(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-W", "error", ROOT / "workflows" / "prune_experts.py", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def run_here(*arguments: object) -> None:
    SCRIPT["prune"].main(list(map(str, arguments)), standalone_mode=False, obj={"debug": False})


def write_stats(folder: Path, scores: np.ndarray, name: str = "reap.score") -> Path:
    folder.mkdir(exist_ok=True)
    write_tensors(folder / f"stats_{LAYER:03d}.safetensors", {name: scores})
    return folder


def scores_of(case: str) -> np.ndarray:
    E = load_moe_layer(FIXTURES / case, LAYER).experts.num_experts
    return np.random.default_rng(len(case)).random(E, "f4")


def masked(layer: MoELayer, kept: np.ndarray) -> MoELayer:
    """The layer whose router can choose no other expert."""
    arrays = {name: array.read() for name, array in layer.arrays.items()}
    out = np.setdiff1d(np.arange(layer.experts.num_experts), kept)
    bias = arrays.get("bias", np.zeros(layer.experts.num_experts, np.float32)).copy()
    bias[out] = MASKED
    selection = arrays.get("selection_bias")
    if selection is not None:
        selection = selection.copy()
        selection[out] = MASKED
    new = copy(layer)
    changed = {"bias": bias} | ({} if selection is None else {"selection_bias": selection})
    new.arrays = layer.arrays | {
        name: small_array(name, array, layer.router, layer.experts)
        for name, array in changed.items()
    }
    return new


REFUSED = {
    "inkling_text": "has no axis of its 8 experts",
    "longcat_flash": "does not read, such as model.layers.1.mlp.experts.10",
    "ernie4_5_vl_moe": "does not read, such as model.layers.1.mlp.experts.10",
}
"""Checkpoints that cannot be pruned, and why."""


def of_small_groups(router) -> bool:
    """Whether no expert can be dropped, since each group has only the two that its score needs."""
    return router.groups > 1 and router.num_experts == 2 * router.groups


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_pruned_layer_is_the_masked_one(tmp_path, case):
    scores = scores_of(case)
    old = load_moe_layer(FIXTURES / case, LAYER)
    stats, out = write_stats(tmp_path / "stats", scores), tmp_path / "out"
    if refusal := REFUSED.get(case, "raise --keep" if of_small_groups(old.router) else None):
        with pytest.raises(click.UsageError, match=refusal):
            run_here(FIXTURES / case, stats, "--keep", "0.75", "--out", out)
        assert not out.exists()
        return
    run_here(FIXTURES / case, stats, "--keep", "0.75", "--out", out)
    kept = SCRIPT["choose"](scores, 0.75, old.router.groups)
    new = load_moe_layer(out, LAYER)
    assert new.experts.num_experts == len(kept) < old.experts.num_experts
    hidden = da.from_array(expected(case)["hidden"].reshape(-1, old.d), chunks=(9, -1))
    indices, weights = da.compute(*new.route(hidden), scheduler="sync")
    of_masked, weights_of_masked = da.compute(*masked(old, kept).route(hidden), scheduler="sync")
    np.testing.assert_array_equal(kept[indices], of_masked)
    np.testing.assert_allclose(weights, weights_of_masked, rtol=2e-6)
    y, right = da.compute(new(hidden), masked(old, kept)(hidden), scheduler="sync")
    np.testing.assert_allclose(y, right, rtol=0, atol=2e-6 * np.abs(right).max())
    assert np.abs(right - old(hidden).compute(scheduler="sync")).max() > 1e-3 * np.abs(right).max()


@pytest.mark.parametrize("case", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_the_pruned_layer_equals_transformers_with_experts_masked_out(tmp_path, case):
    """See ``fixtures/make_pruned.py``, which compares the logits of whole models as well."""
    with np.load(FIXTURES / "pruned.npz") as found:
        scores, output = found[f"{case}.scores"], found[f"{case}.output"]
    out = tmp_path / "out"
    run_here(FIXTURES / case, write_stats(tmp_path / "s", scores), "--keep", "0.75", "--out", out)
    hidden = da.from_array(expected(case)["hidden"], chunks=(1, -1, -1))
    y = load_moe_layer(out, LAYER)(hidden).compute(scheduler="sync")
    np.testing.assert_allclose(y, output, rtol=0, atol=2e-6 * np.abs(output).max())


@pytest.mark.slow
def test_everything_else_is_copied_byte_for_byte(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(FIXTURES / "mixtral_sharded", source)
    (source / "tokenizer.json").write_text("{}")
    (source / "pytorch_model.bin").write_bytes(b"old weights")
    more = {
        "model.norm.weight": np.arange(32, dtype="f4"),
        "lm_head.weight": np.ones((4, 32), "f2"),
    }
    write_tensors(source / "model-00009-of-00009.safetensors", more)
    index = json.loads((source / "model.safetensors.index.json").read_text())
    index["weight_map"] |= dict.fromkeys(more, "model-00009-of-00009.safetensors")
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    scores = scores_of("mixtral_sharded")
    done = prune(
        source, write_stats(tmp_path / "stats", scores), "--keep", "0.6", "--out", tmp_path / "out"
    )
    assert done.returncode == 0, done.stderr
    assert "3 of 5 experts in each layer" in done.stdout
    out = tmp_path / "out"
    names = {path.name for path in out.iterdir()}
    assert "tokenizer.json" in names
    assert not names & {"pytorch_model.bin"}
    assert not list(tmp_path.glob("*.partial"))
    found = read_tensors(out / "model-00009-of-00009.safetensors")
    assert found.keys() == more.keys()
    for name, array in more.items():
        np.testing.assert_array_equal(found[name], array)
    old, new = Checkpoint(source), Checkpoint(out)
    kept = SCRIPT["choose"](scores, 0.6)
    for to, e in enumerate(kept):
        for matrix in ("w1", "w2", "w3"):
            name = f"model.layers.1.block_sparse_moe.experts.{{}}.{matrix}.weight"
            was, now = (
                checkpoint.files.under(name.format(number))[""]
                for checkpoint, number in ((old, e), (new, to))
            )
            np.testing.assert_array_equal(was.read(0, was.shape[0]), now.read(0, now.shape[0]))
    config = json.loads((out / "config.json").read_text())
    was = json.loads((source / "config.json").read_text())
    assert config == was | {"num_local_experts": 3}


@pytest.mark.slow
def test_multi_token_prediction_layers_are_left_out(tmp_path):
    def more(tensors):
        name = "model.layers.2.mlp.experts.0.up_proj.weight"
        return tensors | {
            name: np.ones((20, 32), "f4"),
            "model.layers.3.mlp.experts.down_proj": np.ones((12, 32, 20), "f4"),
            "mtp.layers.0.mlp.experts.11.up_proj.weight": np.ones((20, 32), "f4"),
            "model.layers.2.mlp.gate.weight": np.ones((12, 32), "f4"),
            "model.layers.2.eh_proj.weight": np.ones(2),
        }

    source = altered(tmp_path, "deepseek_v3", tensors=more, num_nextn_predict_layers=1)
    stats = write_stats(tmp_path / "stats", scores_of("deepseek_v3"))
    done = prune(source, stats, "--keep", "0.7", "--out", tmp_path / "out")
    assert "note: 5 tensors beyond the last layer" in done.stdout, done.stderr
    assert json.loads((tmp_path / "out/config.json").read_text())["num_nextn_predict_layers"] == 0
    left = open_safetensors(tmp_path / "out/model.safetensors")
    before = open_safetensors(FIXTURES / "deepseek_v3/model.safetensors")
    kept = [name for name in before if ".experts." not in name]
    assert {name for name in left if ".experts." not in name} == set(kept)


def test_a_prediction_layer_without_experts_stays(tmp_path):
    """Its rows and the number of such layers do not depend on the experts of others."""
    name = "model.layers.2.eh_proj.weight"
    source = altered(
        tmp_path,
        "deepseek_v3",
        tensors=lambda tensors: tensors | {name: np.ones(2)},
        num_nextn_predict_layers=1,
    )
    stats = write_stats(tmp_path / "stats", scores_of("deepseek_v3"))
    run_here(source, stats, "--keep", "0.7", "--out", tmp_path / "out")
    assert name in open_safetensors(tmp_path / "out/model.safetensors")
    assert json.loads((tmp_path / "out/config.json").read_text())["num_nextn_predict_layers"] == 1


def refused(message: str, *arguments: object) -> None:
    with pytest.raises(click.UsageError) as refusal:
        run_here(*arguments)
    assert message in refusal.value.format_message()


def test_what_cannot_be_pruned_is_refused(tmp_path):
    directory, out = FIXTURES / "deepseek_v3", tmp_path / "out"
    scores = scores_of("deepseek_v3")
    stats = write_stats(tmp_path / "stats", scores)
    for keep, message in (
        ("0.1", "only 2 would be left to choose from, 1 in each of 2 groups; raise --keep"),
        ("0.3", "a row of layer 1 chooses 3 experts, but only 2 would be left"),
    ):
        refused(message, directory, stats, "--keep", keep, "--out", out)
    refused("must have 'usage.rows' for --score rows, but has only reap.score",
            directory, stats, "--keep", "0.6", "--score", "rows", "--out", out)  # fmt: skip
    write_stats(stats, scores[:5])
    refused("must be (12,) finite numbers", directory, stats, "--keep", "0.6", "--out", out)
    scores[3] = np.nan
    write_stats(stats, scores)
    refused("but is (12,) with 1 others", directory, stats, "--keep", "0.6", "--out", out)
    other = {"layer_index": str(LAYER + 1)}
    save_file({"reap.score": scores}, stats / f"stats_{LAYER:03d}.safetensors", other)
    refused(f"must have the statistics of layer {LAYER}, but has those of layer {LAYER + 1}",
            directory, stats, "--keep", "0.6", "--out", out)  # fmt: skip
    (tmp_path / "none").mkdir()
    refused("needs a statistics file, but layer 1 has none",
            directory, tmp_path / "none", "--keep", "0.6", "--out", out)  # fmt: skip
    assert not out.exists()


@pytest.mark.parametrize("place", ["config", "text_config", "hf_quant_config.json"])
@pytest.mark.parametrize("name", ["layers.1.mlp.experts.3.up_proj", r"re:.*experts\.3\.up_proj"])
def test_settings_of_a_quantization_that_name_an_expert_are_refused(tmp_path, place, name):
    scores = scores_of("qwen3_vl_moe")
    stats, out = write_stats(tmp_path / "stats", scores), tmp_path / "out"
    all_of_them = r"re:.*experts\.\d+\.up_proj"

    def with_names(folder: Path, *names: str) -> Path:
        folder.mkdir()
        said = {"ignore": list(names)}
        inside, given = place == "text_config", {"quantization_config": said}
        given = {} if place.endswith(".json") else given
        source = altered(folder, "qwen3_vl_moe", text_config=inside, **given)
        if not given:
            (source / place).write_text(json.dumps({"quantization": said}))
        return source

    run_here(with_names(tmp_path / "a", all_of_them), stats, "--keep", "0.75", "--out", out)
    refused("must not name individual experts (experts", with_names(tmp_path / "b", name), stats,
            "--keep", "0.75", "--out", tmp_path / "none")  # fmt: skip
    assert not (tmp_path / "none").exists()


def test_experts_in_the_attention_are_refused(tmp_path):
    """JetMoE has as many in both, by one key of its config."""
    name = f"model.layers.{LAYER}.self_attention.experts.input_linear.weight"
    source = altered(tmp_path, "jetmoe", tensors=lambda t: t | {name: np.ones((8, 2, 2), "f4")})
    stats = write_stats(tmp_path / "stats", scores_of("jetmoe"))
    refused(f"does not read, such as {name}", source, stats, "--keep", "0.75", "--out",
            tmp_path / "out")  # fmt: skip


def test_one_group_scored_by_two_experts_keeps_two(tmp_path):
    """transformers takes the two best of a group even if there is only one group."""
    source = altered(tmp_path, "glm4_moe", num_experts_per_tok=1)
    stats = write_stats(tmp_path / "stats", scores_of("glm4_moe"))
    refused("by its two best experts, but only 1 would be left",
            source, stats, "--keep", "0.1", "--out", tmp_path / "out")  # fmt: skip


def test_a_group_scored_by_two_experts_keeps_two(tmp_path):
    source = altered(tmp_path, "deepseek_v3", num_experts_per_tok=2)
    stats = write_stats(tmp_path / "stats", scores_of("deepseek_v3"))
    refused("by its two best experts, but only 1 would be left in each",
            source, stats, "--keep", "0.3", "--out", tmp_path / "out")  # fmt: skip
