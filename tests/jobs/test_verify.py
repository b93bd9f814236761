"""Verify says good of what is right and finds what is wrong, wherever it is."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import fsspec
import ml_dtypes
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from dask_ep.experts.experts import Experts
from dask_ep.jobs.backends import Processes, Threads
from dask_ep.jobs.build import open_inputs
from dask_ep.jobs.example import Example, write_example
from dask_ep.jobs.inspect import advise_chunk_rows, count_routing, inspect_path
from dask_ep.jobs.job import load_job
from dask_ep.jobs.recompute import plain, plain_parts
from dask_ep.jobs.run import run_job
from dask_ep.jobs.verify import verify_job
from dask_ep.jobs.verify_sample import find_rows_of_experts, read_rows, sample_rows
from dask_ep.layers.checkpoint import load_moe_layer
from dask_ep.storage.sources import open_source
from dask_ep.storage.storage import store

FIXTURES = Path(__file__).parents[1] / "fixtures"
SMALL = {"rows": 700, "d": 16, "num_experts": 6, "k": 2, "chunk_rows": 100}


@pytest.fixture(scope="module")
def done_job(tmp_path_factory):
    """A small job whose output is complete and right; tests change copies of it only."""
    path = write_example(tmp_path_factory.mktemp("done"), Example(**SMALL, format="npy"))
    job = load_job(path)
    run_job(job, Threads(2), chunk_rows=100)
    return path


def changed(done_job, tmp_path, change, dtype=None):
    """The same job with an output in which `change` has been at work."""
    job = load_job(done_job, out=str(tmp_path / "out.npy"))
    y = np.load(load_job(done_job).out)
    change(y)
    np.save(job.out, y if dtype is None else y.astype(dtype))
    return job


# --- good and bad ----------------------------------------------------------------------------


def test_a_right_output_is_good(done_job):
    found = verify_job(load_job(done_job), rows=200)
    assert found.good
    assert 0 < found.relative_error < 1e-5
    assert (found.rows_in_all, found.experts_seen, found.num_experts) == (700, 6, 6)
    assert len(found.worst) == 1
    assert 190 <= found.rows <= 200


def test_a_job_without_rows_is_run_and_good(tmp_path):
    np.save(tmp_path / "x.npy", np.empty((0, 8), "f4"))
    np.save(tmp_path / "r.npy", np.empty((0, 2), "i4"))
    np.save(tmp_path / "w.npy", np.ones((4, 8, 8), "f4"))
    names = {"tokens": "x", "routing": "r", "experts": "w", "out": "y"}
    job = load_job(**{key: str(tmp_path / f"{name}.npy") for key, name in names.items()})
    run_job(job, Threads(1))
    found = verify_job(job)
    assert (found.good, found.rows, found.experts_seen) == (True, 0, 0)


def test_negative_weights_of_the_input_turn_the_row_that_an_expert_reads(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "x": rng.standard_normal((60, 6)),
        "r": rng.integers(0, 4, (60, 2)),
        "t": rng.standard_normal((60, 2)),
        **{name: rng.standard_normal((4, 6, 1)) for name in ("gate", "up")},
        "down": rng.standard_normal((4, 1, 6)),
    }
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array.astype("i4" if name == "r" else "f4"))
    paths = {name: str(tmp_path / f"{name}.npy") for name in (*arrays, "y")}
    experts = {"kind": "gated", "activation": "relu", "apply_router_weight_on_input": True}
    experts |= {name: paths[name] for name in ("gate", "up", "down")}
    job = load_job(
        tokens=paths["x"],
        routing=paths["r"],
        topk_weights=paths["t"],
        experts=experts,
        out=paths["y"],
    )
    run_job(job, Threads(1))
    assert verify_job(job).relative_error < 1e-5  # with relu, most outputs of -x and x differ


def test_one_wrong_number_is_found_and_named(done_job, tmp_path):
    def change(y):
        y[456, 3] += 1e-3 * np.abs(y).max()

    found = verify_job(changed(done_job, tmp_path, change), rows=700)
    assert not found.good
    assert [row.row for row in found.worst] == [456]
    routing = open_source(load_job(done_job).routing).read(456, 457)[0]
    assert found.worst[0].experts == tuple(routing.tolist())


@pytest.mark.parametrize("row", [0, 99, 100, 699])
def test_the_ends_of_every_block_are_in_the_sample(done_job, tmp_path, row):
    def change(y):
        y[row] = 0

    job = changed(done_job, tmp_path, change)
    record = load_job(done_job).out + ".progress"  # tells the blocks
    os.symlink(record, job.out + ".progress")
    found = verify_job(job, rows=60, seed=row)
    assert [(wrong.row, wrong.block) for wrong in found.worst] == [(row, row // 100)]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_no_number_is_a_difference(done_job, tmp_path, bad):
    def change(y):
        y[7, 0] = bad

    found = verify_job(changed(done_job, tmp_path, change), rows=700)
    assert found.worst[0].row == 7
    assert found.largest_error == np.inf


def test_one_value_that_is_no_number_in_both_hides_no_difference(tmp_path):
    path = write_example(tmp_path / "example", Example(**SMALL, format="npy"))
    job = load_job(path)
    tokens = np.load(job.tokens)
    tokens[7] = np.nan
    np.save(job.tokens, tokens)
    run_job(job, Threads(1))
    found = verify_job(job, rows=700)
    assert (found.good, found.not_finite, found.values) == (True, 16, 700 * 16)
    y = np.load(job.out)
    y[7, 0], y[9, 0] = 0.0, np.nan
    np.save(job.out, y)
    found = verify_job(job, rows=700)
    assert not found.good
    assert ({row.row for row in found.worst}, found.not_finite) == ({7, 9}, 17)


@pytest.mark.parametrize("dtype", [np.float16])
def test_the_tolerance_follows_the_dtype(done_job, tmp_path, dtype):
    job = changed(done_job, tmp_path, lambda y: None, dtype)
    found = verify_job(job, rows=700)
    assert found.good
    assert not verify_job(job, rows=700, tolerance=1e-6).good


def test_what_is_not_an_output_or_a_tolerance_is_refused(done_job, tmp_path):
    job = changed(done_job, tmp_path, lambda y: None, np.int64)
    with pytest.raises(
        ValueError, match=r"must have dtype float64, .*, but has int64; run the job"
    ):
        verify_job(job)
    with pytest.raises(
        ValueError, match="tolerance must be a finite number of at least 0; got nan"
    ):
        verify_job(load_job(done_job), tolerance=np.nan)


def test_a_damaged_record_of_how_an_output_was_computed_is_named(tmp_path):
    job = write_example(tmp_path, Example(rows=20, d=4, num_experts=2))
    run_job(job)
    record = tmp_path / "out.zarr.progress" / "manifest.json"
    content = json.loads(record.read_text())
    content["settings"] |= {"computed_by": "numpy", "world_size": "1"}
    content["inputs"]["tokens"]["shape"] = 20
    record.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"manifest\.json must say what .* computed_by is 'numpy'"):
        verify_job(job)
    with pytest.raises(
        ValueError, match=r"manifest\.json must say how .*: world_size is '1'; start"
    ):
        run_job(job, resume=True)
    made_from = [line[0] for line in inspect_path(tmp_path / "out.zarr")[1].lines]
    assert made_from == ["experts.weights.w", "routing", "topk_weights"]


def test_what_may_not_be_seen_is_not_said_to_be_missing(tmp_path, monkeypatch, done_job):
    """As in a directory without the right to search it."""

    def stat(path, *rest, **more):
        if os.fspath(path).startswith(str(tmp_path)):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real(path, *rest, **more)

    real, away = os.stat, str(tmp_path / "x.zarr")
    monkeypatch.setattr(os, "stat", stat)
    job = load_job(done_job)
    for look in (
        lambda: inspect_path(away),
        lambda: open_source(away),
        lambda: verify_job(replace(job, out=away)),
        lambda: open_inputs(replace(job, placement=str(tmp_path / "p.json"))),
    ):
        with pytest.raises(OSError, match="Permission denied"):
            look()


# --- what cannot be compared -----------------------------------------------------------------


def test_no_output_and_half_an_output(done_job, tmp_path):
    job = load_job(done_job, out=str(tmp_path / "out.zarr"))
    with pytest.raises(FileNotFoundError, match="no output yet; run the job"):
        verify_job(job)
    inputs = open_inputs(job)
    y = np.zeros((700, 16), "f4")
    begin(y, job.out)
    with pytest.raises(FileNotFoundError, match=r"incomplete: 2 of 7 blocks are done; .*--resume"):
        verify_job(job)
    assert ("state", "incomplete, 2 of 7 blocks are done") in inspect_path(job.out)[0].facts
    assert inputs.experts.d_out == 16


def begin(y: np.ndarray, path: str) -> None:
    """Write two blocks of seven, and stop."""
    import dask
    import dask.array as da

    with store(da.from_array(y, chunks=(100, 16)), path, compute=False) as output:
        keys = output.__dask_keys__()[:2]
        dask.get(dict(output.__dask_graph__()), keys)


def test_a_lost_chunk_is_an_error(tmp_path):
    job = load_job(write_example(tmp_path, Example(**SMALL)))
    run_job(job, Threads(1))
    lost = sorted(name for name in os.listdir(job.out) if name.startswith("c"))[0]
    os.unlink(os.path.join(job.out, lost))
    with pytest.raises(FileNotFoundError, match=r"1 chunks of the output are missing, .*--resume"):
        verify_job(job)


def test_an_output_of_another_shape(done_job, tmp_path):
    job = load_job(done_job, out=str(tmp_path / "out.npy"))
    np.save(job.out, np.zeros((700, 15), "f4"))
    with pytest.raises(ValueError, match=r"must be \(700, 16\) for .*\(700, 15\)"):
        verify_job(job)


# --- the sample ------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.lists(st.integers(-1, 9), min_size=2, max_size=2), min_size=1, max_size=80),
)
def test_a_row_of_every_expert(rows):
    routing = np.array(rows)
    found = find_rows_of_experts(open_source(routing), 10)
    assert set(np.unique(routing[found])) >= set(np.unique(routing)) - {-1}


@settings(max_examples=30, deadline=None)
@given(st.sets(st.integers(0, 99), min_size=1), st.booleans())
def test_rows_are_read_one_by_one(tmp_path_factory, rows, compressed):
    import zarr

    data = np.arange(300).reshape(100, 3)
    path = tmp_path_factory.mktemp("rows") / "x.zarr"
    compressors = "auto" if compressed else None
    array = zarr.create_array(path, data=data, chunks=(8, 3), compressors=compressors)
    chosen = np.array(sorted(rows))
    np.testing.assert_array_equal(read_rows(open_source(array), chosen), data[chosen])


def test_all_rows_if_there_are_few(done_job):
    inputs = open_inputs(load_job(done_job))
    starts = np.array([0, 700])
    assert sample_rows(inputs, starts, 10_000, 0).tolist() == list(range(700))
    one, other = (sample_rows(inputs, starts, 50, seed) for seed in (0, 1))
    assert 45 <= len(one) <= 50
    assert one.tolist() != other.tolist()


# --- experts in plain float64 ----------------------------------------------------------------


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_plain_experts_agree_with_those_that_run(transposed, interleaved):
    random = np.random.default_rng(0)

    def weight(*shape):
        return random.standard_normal(shape)

    def turned(w):
        return w.swapaxes(1, 2) if transposed else w

    E, d, f = 3, 6, 8
    kinds = [
        Experts.linear(turned(weight(E, d, 5)), bias=weight(E, 5), transposed=transposed),
        Experts.mlp(
            turned(weight(E, d, f)),
            turned(weight(E, f, d)),
            up_bias=weight(E, f),
            activation="gelu",
            transposed=transposed,
        ),
        Experts.gated_fused(
            turned(weight(E, d, 2 * f)),
            turned(weight(E, f, d)),
            gate_up_bias=weight(E, 2 * f),
            down_bias=weight(E, d),
            interleaved=interleaved,
            transposed=transposed,
            limit=1.0,
            alpha=1.7,
            up_offset=1.0,
            output_scale=weight(E, d),
            output_norm_eps=0.1,
        ),
    ]
    rows = random.standard_normal((4, d))
    for experts in kinds:
        local = experts.load([2], dtype=np.float64)[0]
        plainly = plain(*plain_parts(experts, 2))
        np.testing.assert_allclose([plainly(row) for row in rows], local(rows), rtol=1e-12)


# --- inspect ---------------------------------------------------------------------------------


def facts(path, at=0):
    return dict(inspect_path(path)[at].facts)


def test_inspect_tells_a_job_its_arrays_and_its_output(done_job):
    job = load_job(done_job)
    told = facts(done_job)
    assert told["tokens"].startswith("700 rows of 16, float32")
    assert told["experts"].startswith("6 linear")
    assert told["output"].endswith("700 x 16: complete")
    routing = open_source(job.routing).read(0, 700)
    count = np.bincount(routing.ravel(), minlength=6)
    told = facts(job.routing)
    assert told["imbalance (largest / mean)"] == f"{count.max() / count.mean():.3f}"
    assert told["slots without an expert (-1)"] == "0"
    assert facts(job.out, 1)["blocks"] == "7 of up to 100 rows"
    made_from = [line[:2] for line in inspect_path(job.out)[1].lines]
    assert ("experts.weights.w", "w.npy") in made_from


def test_inspect_tells_tensors_and_checkpoints(tmp_path):
    from safetensors.numpy import save_file

    save_file({"a": np.zeros((2, 3), "f4"), "b": np.zeros(5, "i4")}, tmp_path / "m.safetensors")
    (finding,) = inspect_path(tmp_path / "m.safetensors")
    assert ("a", "2 x 3", "float32", "24 B") in finding.lines
    assert facts(f"{tmp_path}/m.safetensors::b")["shape"] == "5"
    told = facts(FIXTURES / "qwen2_moe")
    assert told["model type"] == "qwen2_moe"
    assert told["experts"] == "9 of width 20, 4 for each row"
    assert told["shared experts"] == "of width 24, by a gate"
    assert told["router"] == "softmax scores, weights on the experts' output"
    (finding,) = inspect_path(FIXTURES / "deepseek_v3")
    assert dict(finding.facts)["router"] == (
        "sigmoid scores and selection bias, from the best 2 of 3 groups by top2, normalised, "
        "times 2.5, weights on the experts' output"
    )
    told = dict(finding.facts)
    assert told["MoE layers"] == "1"
    assert told["experts, stored"] == "float32, 36 tensors, 90.00 kiB; 90.00 kiB in float32"
    assert told["shared experts, stored"].startswith("float32, 3 tensors, 15.00 kiB; ")
    assert "not read" not in told
    assert facts(FIXTURES / "deepseek_v3_fp8")["experts, stored"] == (
        "FP8, 36 tensors, 54.84 kiB; 216.00 kiB in float32"
    )
    told = facts(FIXTURES / "longcat_flash")
    assert told["experts"] == "8 of width 12, 5 for each row, and 4 that only its router knows"
    assert told["not read"] == "projections of identity experts (8 tensors, 12.00 kiB)"
    assert finding.header == ("layer", "kind", "experts", "on disk", "in memory")
    assert [line[:3] for line in finding.lines] == [("0", "dense", ""), ("1", "moe", "12")]
    assert all(size.endswith("kiB") for size in finding.lines[1][3:])


def to_address(folder: Path, address: str) -> str:
    files, place = fsspec.core.url_to_fs(address)
    for path in folder.iterdir():
        files.pipe_file(f"{place}/{path.name}", path.read_bytes())
    return address


def test_inspect_looks_at_addresses_too(tmp_path):
    np.save(tmp_path / "routing.npy", np.array([0, 2, 2]))
    there = to_address(tmp_path, "memory://inspected")
    assert facts(f"{there}/routing.npy") == facts(tmp_path / "routing.npy")
    case = FIXTURES / "gpt_oss_mxfp4"
    there = to_address(case, "memory://inspected/model")
    assert inspect_path(there) == inspect_path(case)
    name = "model.safetensors"
    assert inspect_path(f"{there}/{name}") == inspect_path(case / name)
    with pytest.raises(OSError, match="memory://inspected/none"):
        inspect_path("memory://inspected/none")


def test_inspect_of_what_is_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist; inspect takes an array"):
        inspect_path(tmp_path / "none.zarr")
    with pytest.raises(ValueError, match=r"neither a Zarr array .* nor a checkpoint"):
        inspect_path(tmp_path)
    (tmp_path / "job.toml").write_text("")
    with pytest.raises(ValueError, match=r"the job is .*job\.toml"):
        inspect_path(tmp_path)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-1, 30), min_size=1, max_size=50))
def test_counts_of_a_routing(values):
    count, empty = count_routing(open_source(np.array(values)))
    assert empty == values.count(-1)
    assert count.tolist() == [values.count(e) for e in range(max(values) + 1)]


def test_integers_that_are_no_routing_are_not_counted():
    assert count_routing(open_source(np.array([5, -7])))[0].size == 0
    assert count_routing(open_source(np.array([5, 1 << 40])))[0].size == 0


def test_advised_chunks_are_whole_stored_chunks(tmp_path):
    rows = open_source(np.zeros((20, 1 << 20), ml_dtypes.bfloat16))
    assert advise_chunk_rows(rows) == 16
    assert advise_chunk_rows(open_source(np.zeros((10, 4)))) == 10, "no more than there are"
    stored = zarr.create_array(tmp_path / "x.zarr", shape=(10, 4), chunks=(8, 4), dtype="f4")
    assert advise_chunk_rows(open_source(stored)) == 10, "the last stored chunk is not full"


# --- layers of checkpoints -------------------------------------------------------------------


@pytest.mark.parametrize(
    "family",
    ["mixtral_sharded", "qwen2_moe", "gpt_oss_mxfp4", "llama4", "nemotron_h", "gemma4_text",
     "longcat_flash", "inkling_text", "jetmoe", "cohere2_moe", "axk1", "step3p7", "dbrx"],
)  # fmt: skip
def test_a_layer_is_run_and_verified(tmp_path, family):
    layer = FIXTURES / family
    index = next(i for i in range(4) if is_moe(layer, i))
    d = load_moe_layer(layer, index).d
    tokens = np.random.default_rng(0).standard_normal((300, d)).astype(np.float32)
    np.save(tmp_path / "tokens.npy", tokens)
    job = load_job(
        tokens=str(tmp_path / "tokens.npy"),
        layer=str(layer),
        layer_index=index,
        out=str(tmp_path / "out.npy"),
        world_size=2,
        placement="packed",
    )
    run_job(job, Threads(2), chunk_rows=64)
    found = verify_job(job, rows=100)
    assert found.good, found

    y = np.load(job.out)
    y[128] *= 1.001
    np.save(job.out, y)
    assert [wrong.row for wrong in verify_job(job, rows=100).worst] == [128]


def layer_job(tmp_path, case, **keys):
    """A job of a fixture's own hidden states through its layer, and what transformers gave."""
    with np.load(FIXTURES / case / "expected.npz") as want:
        hidden, output = (want[name].reshape(24, -1) for name in ("hidden", "output"))
    np.save(tmp_path / "hidden.npy", hidden)
    keys = {"tokens": str(tmp_path / "hidden.npy"), "layer": str(FIXTURES / case)} | keys
    return load_job(**keys, layer_index=1, out=str(tmp_path / "out.npy")), output


def test_a_layer_and_its_tokens_may_lie_at_addresses(tmp_path):
    layer = to_address(FIXTURES / "qwen2_moe", "memory://jobs/model")
    job, want = layer_job(tmp_path, "qwen2_moe", layer=layer, tokens="memory://jobs/in/hidden.npy")
    to_address(tmp_path, "memory://jobs/in")
    run_job(job, Threads(2), chunk_rows=5)
    np.testing.assert_allclose(np.load(job.out), want, rtol=0, atol=1e-5 * np.abs(want).max())
    assert verify_job(job).good


@pytest.mark.slow
def test_a_layer_runs_on_worker_processes(tmp_path):
    job, want = layer_job(tmp_path, "deepseek_v3")
    run_job(job, Processes(2), chunk_rows=5)
    np.testing.assert_allclose(np.load(job.out), want, rtol=0, atol=1e-6 * np.abs(want).max())
    assert verify_job(job).good


def is_moe(directory, index):
    try:
        load_moe_layer(directory, index)
    except ValueError:
        return False
    return True
