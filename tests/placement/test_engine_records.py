"""What engines record becomes routing and load; see ``fixtures/make_engine_records.py``."""

from __future__ import annotations

import base64
import io
import json
import pickle
import zipfile

import numpy as np
import pytest

from dask_ep.placement import engine_records
from dask_ep.placement.engine_records import (
    expert_load,
    read_engine_routing,
    read_sglang_counts,
    read_vllm_routing,
    write_sglang_counts,
    write_vllm_routing,
)
from tests.checkpoints import FIXTURES, write_tensors

RECORDS = FIXTURES / "engine_records"
EXPERTS = 6


@pytest.fixture(scope="module")
def expected():
    with np.load(RECORDS / "expected.npz") as found:
        return dict(found)


def test_counts_that_torch_saved_are_read_without_it(expected):
    found = read_sglang_counts(RECORDS / "stat.pt")
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, expected["logical"])
    assert found[:, 1].sum() == 2 * 11
    np.testing.assert_array_equal(
        read_sglang_counts(RECORDS / "per_token.pt"), expected["logical"][:2]
    )


def test_a_routing_per_token_is_that_of_logical_experts_in_the_order_of_passes(expected):
    found = read_engine_routing(RECORDS / "per_token.pt", 1)
    np.testing.assert_array_equal(found, expected["routing"])
    load = np.bincount(expected["routing"].ravel(), minlength=EXPERTS)
    for record in ("per_token.pt", "stat.pt"):
        np.testing.assert_array_equal(expert_load(RECORDS / record, 1, EXPERTS), load)
    assert (read_engine_routing(RECORDS / "per_token.pt", 0) == -1).all(), "a dense layer"


@pytest.mark.parametrize("shape", [(3, 4, 5), (4, 5)])
def test_counts_for_sglang_are_read_again(tmp_path, shape):
    counts = np.random.default_rng(0).integers(0, 100, shape)
    write_sglang_counts(tmp_path / "c.json", counts)
    np.testing.assert_array_equal(read_sglang_counts(tmp_path / "c.json").reshape(shape), counts)
    assert json.loads((tmp_path / "c.json").read_text()) == {"logical_count": counts.tolist()}


def test_counts_by_layer_leave_zeros_to_the_other_layers(tmp_path):
    write_sglang_counts(tmp_path / "c.json", {1: [1, 2], 3: np.array([3, 4])})
    found = read_sglang_counts(tmp_path / "c.json")
    assert found.tolist() == [[[0, 0], [1, 2], [0, 0], [3, 4]]]


def test_routed_experts_of_vllm_are_written_and_read(tmp_path):
    layers = [np.random.default_rng(n).integers(0, 40, (20_000, 3)) for n in range(2)]
    write_vllm_routing(tmp_path / "routed.npy", layers)
    found = read_vllm_routing(tmp_path / "routed.npy")
    assert isinstance(found, np.memmap)
    assert (found.shape, found.dtype) == ((20_000, 2, 3), np.int16)
    for number, layer in enumerate(layers):
        np.testing.assert_array_equal(read_engine_routing(tmp_path / "routed.npy", number), layer)
        np.testing.assert_array_equal(
            expert_load(tmp_path / "routed.npy", number, 40), np.bincount(layer.ravel())
        )
    with pytest.raises(ValueError, match="layers 0 to 1 of .*, not 2"):
        read_engine_routing(tmp_path / "routed.npy", 2)


def test_an_answer_of_vllms_server(tmp_path):
    """Of the prompt as lists, of the tokens that were generated as a .npy in base64."""
    routed = np.random.default_rng(0).integers(0, 9, (8, 2, 2)).astype(np.int16)
    content = io.BytesIO()
    np.save(content, routed[5:])
    answer = {
        "prompt_routed_experts": routed[:5].tolist(),
        "choices": [{"routed_experts": base64.b64encode(content.getvalue()).decode()}],
    }
    (tmp_path / "a.json").write_text(json.dumps(answer))
    np.testing.assert_array_equal(read_vllm_routing(tmp_path / "a.json"), routed)
    np.testing.assert_array_equal(
        expert_load(tmp_path / "a.json", 1, 9), np.bincount(routed[:, 1].ravel(), minlength=9)
    )
    (tmp_path / "b.json").write_text(json.dumps({"choices": [{"routed_experts": None}]}))
    with pytest.raises(ValueError, match="--enable-return-routed-experts"):
        read_vllm_routing(tmp_path / "b.json")
    (tmp_path / "c.json").write_text(json.dumps({"choices": [{"routed_experts": "%"}]}))
    with pytest.raises(ValueError, match="must be a .npy in base64, or lists"):
        read_vllm_routing(tmp_path / "c.json")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"choices": {"routed_experts": []}}, "choices of .* must be a list of mappings"),
        ({"choices": [None]}, "choices of .* must be a list of mappings"),
        ({"choices": [{"routed_experts": [[[1], [2, 3]]]}]}, "routed_experts of .* or lists"),
        ({"choices": [{"routed_experts": "AAAA"}]}, "routed_experts of .* must be a .npy"),
        ({"choices": [{"routed_experts": [1, 2]}]}, r"must be integers \(tokens, layers, k\)"),
    ],
)
def test_an_answer_that_is_not_of_vllm_is_refused_by_name(answer, message, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(answer))
    with pytest.raises(ValueError, match=message):
        read_vllm_routing(tmp_path / "a.json")


def test_loads_of_statistics_and_of_routings(tmp_path):
    rows = np.arange(4)
    write_tensors(tmp_path / "s.safetensors", {"usage.rows": rows})
    np.testing.assert_array_equal(expert_load(tmp_path / "s.safetensors", 0, 4), rows)
    np.save(tmp_path / "r.npy", np.array([[0, 1], [1, -1]]))
    assert expert_load(tmp_path / "r.npy", 7, 4).tolist() == [1, 2, 0, 0]
    with pytest.raises(ValueError, match="counts 4 experts of a layer, not 5"):
        expert_load(tmp_path / "s.safetensors", 0, 5)


class Harmful:
    def __reduce__(self):
        return print, ("run",)


def test_nothing_in_a_pickle_is_run(tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / "h.pt", "w") as file:
        file.writestr("h/data.pkl", pickle.dumps({"logical_count": Harmful()}))
    with pytest.raises(ValueError, match="holds a builtins.print, which is not read here"):
        read_sglang_counts(tmp_path / "h.pt")
    assert capsys.readouterr().out == ""
    with pytest.raises(ValueError, match="which is not read here"):
        read_sglang_counts(RECORDS / "no_record.pt")


def test_counts_per_pass_have_no_routing(monkeypatch):
    content = {
        "records": [{"global_physical_count": [[1, 2, 3]]}],
        "last_physical_to_logical_map": np.array([[0, 1, 0]]),
    }
    monkeypatch.setattr(engine_records, "_read_sglang", lambda path: content)
    assert read_sglang_counts("x.pt").tolist() == [[[4, 2]]]
    with pytest.raises(ValueError, match=r"only dumps of .* per_token have a routing"):
        read_engine_routing("x.pt", 0)


def test_what_is_no_record_is_refused(tmp_path):
    (tmp_path / "x.pt").write_bytes(b"not a zip")
    with pytest.raises(ValueError, match=r"x\.pt must be a file that torch\.save wrote"):
        read_sglang_counts(tmp_path / "x.pt")
    (tmp_path / "x.json").write_text('{"other": 1}')
    with pytest.raises(ValueError, match=r"must hold logical_count, or records .*\['other'\]"):
        read_sglang_counts(tmp_path / "x.json")
    (tmp_path / "y.json").write_text('{"logical_count": [[[1, -1]]]}')
    with pytest.raises(ValueError, match="integers of at least 0 with 3 axes"):
        read_sglang_counts(tmp_path / "y.json")
    with pytest.raises(ValueError, match="by the ending .json"):
        write_sglang_counts(tmp_path / "x.txt", np.zeros((1, 1), int))
    with pytest.raises(ValueError, match="does not fit into int16"):
        write_vllm_routing(tmp_path / "r.npy", [np.full((2, 1), 40_000)])
    assert not (tmp_path / "r.npy").exists()
    with pytest.raises(FileNotFoundError):
        read_sglang_counts(tmp_path / "none.pt")
