"""A GGUF file is a checkpoint: the same layers as the model it was made from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import dask.array as da
import numpy as np
import pytest
from click.testing import CliRunner

from dask_ep.cli.main import cli
from dask_ep.experts.experts import Experts
from dask_ep.jobs.backends import Threads
from dask_ep.jobs.inspect import inspect_path
from dask_ep.jobs.job import load_job
from dask_ep.jobs.run import run_job
from dask_ep.jobs.verify import verify_job
from dask_ep.layers.checkpoint import load_moe_layer, moe_layers
from dask_ep.layers.families import find_family
from dask_ep.layers.gguf_families import GGUF_FAMILIES
from tests.checkpoints import FIXTURES, LAYER, expected
from tests.gguf_files import (
    CASES,
    Form,
    converted,
    gguf,
    settings_of,
    tensors_of,
    write_gguf,
)
from tests.layers.test_checkpoint import TOLERANCE, errors


@pytest.mark.parametrize("case", CASES)
def test_the_layer_computes_what_transformers_computes(case, tmp_path):
    families = []
    if case == "gpt_oss":  # the limit of published models is none of the file's keys
        row = find_family("gpt-oss", GGUF_FAMILIES)
        families = [replace(row, options={**row.options, "limit": 0.5})]
    path = converted(case, tmp_path / "m.gguf")
    found = errors(load_moe_layer(path, LAYER, families=families), case)
    assert found["indices"] == 0, "a row has other experts"
    assert max(found.values()) <= TOLERANCE, found


def test_each_architecture_has_a_case():
    known = {name for family in GGUF_FAMILIES for name in family.model_types}
    assert known == {arch for arch, _ in CASES.values()}
    assert known <= set(gguf.MODEL_ARCH_NAMES.values())


def test_only_layers_with_a_router_are_moe(tmp_path):
    path = converted("glm4_moe", tmp_path / "m.gguf", block_count=4, nextn_predict_layers=1)
    assert moe_layers(path) == [LAYER]
    with pytest.raises(ValueError, match=r"layer 2 of .*m.gguf is dense in this model"):
        load_moe_layer(path, 2)
    with pytest.raises(ValueError, match=r"layer must be in \[0, 3\)"):
        load_moe_layer(path, 3)


def test_files_that_were_split_are_one(tmp_path):
    tensors = {name: (array, Form.F32) for name, array in tensors_of("mixtral").items()}
    parts = [dict(list(tensors.items())[half]) for half in (slice(2), slice(2, None))]
    paths = [tmp_path / f"m-0000{n}-of-00002.gguf" for n in (1, 2)]
    for path, settings, part in zip(paths, (settings_of("mixtral"), {}), parts, strict=True):
        write_gguf(path, "llama", settings, part, split_count=2)
    assert max(errors(load_moe_layer(paths[0], LAYER), "mixtral").values()) <= TOLERANCE
    for path in (paths[1], paths[0].rename(tmp_path / "m.gguf")):
        with pytest.raises(ValueError, match=r"is one of 2 files: open the first, which must be"):
            load_moe_layer(path, LAYER)


def quantized(folder: Path) -> Path:
    forms = {"gate_exps": Form.Q8_0, "up_exps": Form.MXFP4, "down_exps": Form.BF16}
    return converted("qwen2_moe", folder / "m.gguf", forms | {"shexp.weight": Form.F16})


def test_quantized_experts_count_as_their_numbers_held_as_stored_or_not(tmp_path):
    hidden = da.from_array(expected("qwen2_moe")["hidden"], chunks=-1)
    path, plain = quantized(tmp_path), tmp_path / "plain.gguf"
    tensors = {}
    for tensor in gguf.GGUFReader(path).tensors:
        array = gguf.dequantize(tensor.data, tensor.tensor_type)
        tensors[tensor.name] = (np.ascontiguousarray(array), Form.F32)
    write_gguf(plain, "qwen2moe", settings_of("qwen2_moe"), tensors)
    layers = [load_moe_layer(path, LAYER, as_stored=held) for held in (False, True)]
    found = [layer(hidden).compute(scheduler="sync") for layer in layers]
    assert found[0].tobytes() == found[1].tobytes()
    want = load_moe_layer(plain, LAYER)(hidden).compute(scheduler="sync")
    np.testing.assert_allclose(found[0], want, rtol=1e-4, atol=1e-5)
    loaded = [layer.experts.load().nbytes for layer in layers]
    assert 2 * loaded[1] < loaded[0]


def test_a_job_takes_the_layer_or_the_experts_of_a_file(tmp_path):
    path = quantized(tmp_path)
    rows = expected("qwen2_moe")["hidden"].reshape(24, -1)
    routing = np.random.default_rng(0).integers(0, 9, (24, 2))
    np.save(tmp_path / "rows.npy", rows)
    np.save(tmp_path / "routing.npy", routing)
    names = {w: f"{path}::blk.1.ffn_{w}_exps.weight" for w in ("gate", "up", "down")}
    lines = "".join(f'{weight} = "{name}"\n' for weight, name in names.items())
    jobs = {
        "layer": f'layer = "{path}"\nlayer_index = 1\n',
        "experts": 'routing = "routing.npy"\n[experts]\nkind = "gated"\ntransposed = true\n'
        + lines,
    }
    for name, keys in jobs.items():
        job = tmp_path / f"{name}.toml"
        job.write_text(f'tokens = "rows.npy"\nout = "{name}.npy"\n{keys}')
        assert run_job(load_job(job), Threads(1)).rows_done == 24
        assert verify_job(job).good
    e = Experts.gated(**names, transposed=True).load([routing[0, 0], routing[0, 1]])
    want = e[0](rows[:1]) + e[1](rows[:1])
    np.testing.assert_allclose(np.load(tmp_path / "experts.npy")[:1], want, rtol=1e-4, atol=1e-5)


def test_a_file_is_compared_with_the_checkpoint_that_it_was_made_of(tmp_path):
    np.save(tmp_path / "rows.npy", expected("qwen2_moe")["hidden"].reshape(24, -1))
    plain = converted("qwen2_moe", tmp_path / "plain.gguf")
    options = ["--tokens", str(tmp_path / "rows.npy"), "--layer-index", str(LAYER)]
    for path, largest, code in ((plain, 1e-5, 0), (quantized(tmp_path), 1e-5, 3)):
        pair = [str(FIXTURES / "qwen2_moe"), str(path), "--tolerance", str(largest)]
        ran = CliRunner().invoke(
            cli, ["compare", *pair, *options], obj={"debug": False}, standalone_mode=False
        )
        assert (ran.exception, ran.return_value) == (None, code)
        assert "routing: every row goes to the same experts" in ran.output


def test_inspect_says_what_a_file_holds(tmp_path):
    (found,) = inspect_path(quantized(tmp_path))
    facts = dict(found.facts)
    assert facts["model type"] == "qwen2moe"
    assert facts["MoE layers"] == "1"
    kinds = [value for name, value in found.facts if name == "experts, stored"]
    assert [kind.partition(",")[0] for kind in kinds] == ["Q8_0", "MXFP4", "bfloat16"]


def test_a_file_of_another_architecture_is_named_and_listed(tmp_path):
    block = np.ones((2, 32), np.float32)
    experts = (gguf.quantize(np.ones((3, 4, 32), np.float32), Form.Q4_0), Form.Q4_0)
    tensors = {"blk.0.ffn_gate_inp.weight": (block, Form.F32), "blk.0.ffn_up_exps.weight": experts}
    path = write_gguf(tmp_path / "m.gguf", "grok", {"block_count": 1}, tensors)
    with pytest.raises(ValueError, match=r"m.gguf says general.architecture 'grok', which is not"):
        load_moe_layer(path, 0)
    (found,) = inspect_path(path)
    assert found.kind == "GGUF"
    assert "'grok', which is not" in dict(found.facts)["layers"]
    assert [line[:3] for line in found.lines] == [
        ("blk.0.ffn_gate_inp.weight", "2 x 32", "float32"),
        ("blk.0.ffn_up_exps.weight", "3 x 4 x 32", "Q4_0"),
    ]


def test_what_the_file_does_not_account_for_is_named(tmp_path):
    tensors = {name: (array, Form.F32) for name, array in tensors_of("mixtral").items()}
    more = {"blk.1.ffn_up_exps.scale": (np.ones(8, np.float32), Form.F32)}
    path = write_gguf(tmp_path / "m.gguf", "llama", settings_of("mixtral"), tensors | more)
    with pytest.raises(ValueError, match=r"1 would not be: blk.1.ffn_up_exps.scale"):
        load_moe_layer(path, LAYER)
    path = converted("dots1", tmp_path / "m.gguf", expert_gating_func=gguf.ExpertGatingFuncType(1))
    with pytest.raises(ValueError, match=r"1 would not be: blk.1.exp_probs_b.bias"):
        load_moe_layer(path, LAYER)


def test_errors_name_the_files_own_keys(tmp_path, monkeypatch):
    tensors = {name: (array, Form.F32) for name, array in tensors_of("qwen2_moe").items()}
    settings = settings_of("qwen2_moe")

    def add_two_counts(writer, count):
        writer.add_array("qwen2moe.block_count", [count, count])

    def opened(**changes):
        changed = {name: value for name, value in (settings | changes).items() if value is not None}
        load_moe_layer(write_gguf(tmp_path / "m.gguf", "qwen2moe", changed, tensors), LAYER)

    opened()
    monkeypatch.setattr(gguf.GGUFWriter, "add_block_count", add_two_counts)
    with pytest.raises(ValueError, match=r"m.gguf: .* whole numbers for 'qwen2moe.block_count'"):
        opened()
    monkeypatch.undo()
    for key in ("expert_count", "expert_used_count", "embedding_length"):
        message = (
            rf"m.gguf: the metadata must have 'qwen2moe.{key}', but has only qwen2moe\.(?!mod)"
        )
        with pytest.raises(ValueError, match=message) as raised:
            opened(**{key: None})
        assert "config.json" not in str(raised.value)
        assert "moe_layers" not in str(raised.value)
    with pytest.raises(ValueError, match=r"the metadata of .*m.gguf: num_experts of layer 1 must"):
        opened(expert_count=0)
    with pytest.raises(ValueError, match=r"have shape \(8, 32\) according to the metadata \(E=8"):
        opened(expert_count=8)
