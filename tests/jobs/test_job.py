"""A job file says what it says, and its mistakes are named where they are."""

from __future__ import annotations

import inspect
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from dask_ep.errors import JobError, ReadError
from dask_ep.experts.expert_kinds import EXPERT_KINDS
from dask_ep.experts.experts import Experts
from dask_ep.jobs.backends import Processes, Threads, lay_out
from dask_ep.jobs.build import Built, build, open_inputs
from dask_ep.jobs.decide import decide
from dask_ep.jobs.job import EXPERT_KEYS, Job, load_job, parse_experts
from dask_ep.jobs.run import run_job
from dask_ep.placement.policies import balanced

EXPERT_WEIGHTS = [f"{kind}.{key}" for kind in EXPERT_KINDS for key in EXPERT_KINDS[kind].weights]

GOOD = """
tokens = "tokens.npy"
routing = "routing.npy"
out = "out.npy"

[experts]
kind = "linear"
w = "w.npy"
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "job.toml"
    path.write_text(text)
    return path


def build_of(job: Job, ranks: int = 2, **asked: int) -> Built:
    """Build the output of a job on so many workers."""
    inputs, layout = open_inputs(job), lay_out(job, Processes(ranks))
    return build(inputs, decide(inputs.work(), layout, **asked))


def write_arrays(tmp_path: Path, **arrays: np.ndarray) -> None:
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array)


def small_arrays() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        "tokens": random.standard_normal((40, 8)).astype(np.float32),
        "routing": random.integers(0, 4, (40, 2)),
        "w": random.standard_normal((4, 8, 8)).astype(np.float32),
    }


# --- what is right ---------------------------------------------------------------------------


def test_paths_are_relative_to_the_job_file(tmp_path, monkeypatch):
    (tmp_path / "jobs").mkdir()
    path = write(tmp_path / "jobs", GOOD.replace("tokens.npy", "../tokens.npy"))
    monkeypatch.chdir(tmp_path)
    for named in (path, Path("jobs/job.toml")):
        job = load_job(named)
        assert job.tokens == str(tmp_path / "tokens.npy")
        assert job.routing == str(tmp_path / "jobs" / "routing.npy")
        assert job.experts == {"kind": "linear", "w": str(tmp_path / "jobs" / "w.npy")}


def test_options_go_before_the_file_and_are_relative_to_here(tmp_path, monkeypatch):
    path = write(tmp_path, GOOD)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    job = load_job(path, out="other.zarr", world_size=3, placement=None)
    assert job.out == str(tmp_path / "here" / "other.zarr")
    assert (job.world_size, job.placement) == (3, None)
    assert job.tokens == str(tmp_path / "tokens.npy")


def test_tensors_lists_addresses_and_layers(tmp_path):
    text = """
    tokens = "s3://bucket/x.zarr"
    layer = "model"
    layer_index = 3
    out = "y.zarr"
    placement = "balanced"
    """
    job = load_job(write(tmp_path, text))
    assert (job.tokens, job.layer) == ("s3://bucket/x.zarr", str(tmp_path / "model"))
    assert (job.layer_index, job.placement) == (3, "balanced")
    several = GOOD.replace('w = "w.npy"', 'w = ["a.safetensors::w.0", "b.safetensors::w.1"]')
    assert load_job(write(tmp_path, several)).experts["w"] == [
        f"{tmp_path}/a.safetensors::w.0",
        f"{tmp_path}/b.safetensors::w.1",
    ]


@pytest.mark.parametrize("kind", list(EXPERT_KEYS))
def test_the_keys_of_experts_are_the_keywords_of_their_classmethods(kind):
    parameters = inspect.signature(getattr(Experts, kind)).parameters
    assert set(EXPERT_KEYS[kind]) == set(parameters)
    required = {n for n, p in parameters.items() if p.default is inspect.Parameter.empty}
    assert set(EXPERT_KINDS[kind].matrices) == required


# --- what is wrong ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("tokens =", "token =", r"job\.toml: unknown key 'token' \(did you mean 'tokens'\?\)"),
        (
            "w =",
            "W1 =",
            r"job\.toml \[experts\]: unknown key 'W1'; the keys .* w, bias, transposed",
        ),
        ('out = "out.npy"', "", r"job\.toml: 'out' is missing; a job needs tokens and out"),
        ('w = "w.npy"', "", r"\[experts\]: 'w' is missing; linear experts need w"),
        ('"tokens.npy"', "7", r"tokens must be a path, but is 7 \(int\)"),
        ('"tokens.npy"', '""', r"tokens must be a path, but is ''"),
        ('"tokens.npy"', '"t\\u0000.npy"', r"tokens must be a path, but is 't"),
        ("[experts]", 'missing = "fil"\n[experts]', r"missing must be one of error, fill, but is"),
        (
            '"out.npy"',
            '"s3://b/y.npy"',
            r"out must be a local path .* not written\), but is 's3://",
        ),
        ('"out.npy"', '"we::ird.zarr"', r"out must be a local path without '::' .* 'we::ird.zarr'"),
        ('"linear"', '"gatde"', r"kind must be one of .*, but is 'gatde' \(did you mean 'gated'"),
        ('kind = "linear"', 'kind = ["linear"]', r"kind must be one of .*, but is \['linear'\]"),
        ('kind = "linear"', "", r"\[experts\]: kind must be one of .*, but is missing"),
        ('"w.npy"', '["w.npy", 3]', r"w must be a path, or a list of paths with one per expert"),
        ('w = "w.npy"', 'w = "w.npy"\ntransposed = 1', r"transposed must be true or false, but is"),
        ("[experts]", 'layer = "m"\n[experts]', r"experts and layer contradict each other"),
        (
            '[experts]\nkind = "linear"\nw = "w.npy"',
            'layer = "m"\nlayer_index = 1',
            r"layer takes routing and topk_weights together, .* only routing is",
        ),
        ("[experts]", "world_size = 0\n[experts]", r"world_size must be an integer of at least 1"),
        ("[experts]", "world_size = true\n[experts]", r"at least 1, but is True \(bool\)"),
        ("[experts]", "chunk_rows = 5\n[experts]", r"unknown key 'chunk_rows'"),
        ("tokens =", "tokens", r"job\.toml must be a TOML file, but cannot be read as one"),
    ],
)
def test_mistakes_are_named(tmp_path, old, new, message):
    assert old in GOOD
    with pytest.raises(JobError, match=message):
        load_job(write(tmp_path, GOOD.replace(old, new, 1)))


@pytest.mark.parametrize(
    "key", [*("tokens", "routing", "topk_weights", "layer", "out", "placement"), *EXPERT_WEIGHTS]
)
def test_a_home_that_is_nobodys_is_named_with_its_key(key):
    """Every path of a job, be it a key of its own or of its experts."""
    kind, _, weight = key.partition(".")
    value = "~nobody-of-this-name/x.npy"
    keys = {key: value}
    if weight:
        table = dict.fromkeys(EXPERT_KINDS[kind].matrices, "w.npy") | {weight: ["w.npy", value]}
        keys = {"experts": {"kind": kind} | table}
    message = rf"{weight or key}: .*'~nobody-of-this-name/x.npy'.* cannot be found"
    with pytest.raises(JobError, match=message):
        load_job(**keys)


def test_links_in_a_circle_are_named(tmp_path):
    os.symlink(tmp_path / "a", tmp_path / "b")
    os.symlink(tmp_path / "b", tmp_path / "a")
    with pytest.raises(JobError, match=r"options: tokens: .*a/x.npy' cannot be found"):
        load_job(tokens=str(tmp_path / "a" / "x.npy"))


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("limit = nan", r"limit must be a finite number above 0, but is nan \(float\)"),
        ("limit = -7.0", r"limit must be a finite number above 0, but is -7\.0"),
        ("alpha = inf", r"alpha must be a finite number, but is inf"),
    ],
)
def test_a_gate_is_of_numbers(said, message):
    with pytest.raises(JobError, match=message):
        load_job(
            tokens="x.npy",
            routing="r.npy",
            out="y.npy",
            experts=parse_experts(f'{{kind = "gated", gate = "g", up = "u", down = "d", {said}}}'),
        )


@pytest.mark.parametrize(
    ("kind", "key", "meant"),
    [
        ("gated", "w1", "gate"), ("gated", "w3", "up"), ("gated", "w2", "down"),
        ("gated", "gate_proj", "gate"), ("mlp", "fc1", "up"), ("mlp", "w1", "up"),
        ("gated_fused", "gate_up_proj", "gate_up"), ("linear", "weight", "w"),
    ],
)  # fmt: skip
def test_names_that_models_give_to_matrices_are_understood(kind, key, meant):
    table = {"kind": kind, key: "w.npy"}
    with pytest.raises(JobError, match=f"unknown key '{key}' .did you mean '{meant}'"):
        load_job(tokens="x.npy", routing="r.npy", out="y.npy", experts=table)


PATHS = st.text(min_size=1, max_size=12).filter(lambda text: "\0" not in text and "~" not in text)


@settings(max_examples=25, deadline=None)
@given(
    paths=st.tuples(PATHS, PATHS, PATHS),
    limit=st.floats(1e-9, 1e9),
    gates=st.lists(PATHS, min_size=1, max_size=3),
    ranks=st.none() | st.integers(1, 9),
)
def test_a_job_that_is_written_is_read_again(tmp_path_factory, paths, limit, gates, ranks):
    folder = tmp_path_factory.mktemp("job")
    paths = [str(folder / f"{first}{path}") for first, path in zip("x~~", paths, strict=True)]
    table = {"kind": "gated", "gate": gates, "up": paths[0], "down": paths[1], "limit": limit}
    job = Job("/x.npy", "/y.npy", routing=paths[2], experts=table, world_size=ranks)
    for base in (None, folder):
        path = folder / "job.toml"
        path.write_text(job.to_toml(base), encoding="utf-8")
        assert replace(load_job(path), name="job") == job


def test_a_job_file_may_begin_with_a_byte_order_mark(tmp_path):
    text = 'tokens = "x.npy"\nrouting = "r.npy"\nexperts = "w.npy"\nout = "y.npy"\n'
    (tmp_path / "job.toml").write_text(text, encoding="utf-8-sig")
    assert load_job(tmp_path / "job.toml").tokens == str(tmp_path / "x.npy")


def test_a_job_of_values_is_checked_too():
    with pytest.raises(JobError, match="job: world_size must be an integer of at least 1, but is"):
        Job("x.npy", "y.npy", routing="r.npy", experts="w.npy", world_size=0)
    job = Job("x.npy", "y.npy", routing="r.npy", experts="w.npy")
    assert job.tokens == str(Path.cwd() / "x.npy")
    assert job.experts == {"kind": "linear", "w": str(Path.cwd() / "w.npy")}


def test_layer_needs_its_number(tmp_path):
    with pytest.raises(JobError, match="'layer_index' is missing"):
        load_job(tokens="x.npy", layer="model", out="y.npy")


def test_what_is_no_file(tmp_path):
    with pytest.raises(JobError, match="is a directory; give the job file in it"):
        load_job(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"none\.toml"):
        load_job(tmp_path / "none.toml")


def test_a_table_of_experts_as_an_option():
    assert parse_experts(" w.npy") == " w.npy"
    with pytest.raises(JobError, match=r"experts must be a path or an inline table such as"):
        parse_experts("{kind = linear}")


# --- what belongs together -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"routing": np.zeros((39, 2), int)}, r"routing must have a row for each of the 40 token"),
        ({"tokens": np.zeros((40, 6), "f4")}, r"rows of width 8, but tokens .* have width 6"),
        ({"tokens": np.zeros(40, "f4")}, r"tokens must be \(n, d\), but tokens.npy has shape"),
        ({"tokens": np.array(["a"] * 40)}, r"job\.toml: tokens: .* must hold numbers"),
        ({"routing": None}, r"job\.toml: routing: .*routing\.npy: No such file"),
        ({"w": None}, r"job\.toml: experts\.w: .*w\.npy: No such file"),
    ],
)
def test_inputs_that_do_not_fit(tmp_path, change, message):
    arrays = small_arrays() | change
    write_arrays(tmp_path, **{name: array for name, array in arrays.items() if array is not None})
    with pytest.raises((ValueError, TypeError, ReadError), match=message):
        open_inputs(load_job(write(tmp_path, GOOD)))


def test_a_file_that_cannot_be_opened_is_named_by_its_key(tmp_path):
    write_arrays(tmp_path, **small_arrays())
    (tmp_path / "loop.zarr").mkdir()
    (tmp_path / "loop.zarr" / "zarr.json").symlink_to("zarr.json")
    job = load_job(write(tmp_path, GOOD), routing=str(tmp_path / "loop.zarr"))
    with pytest.raises(ReadError, match=r"routing: /.*/zarr.json: Too many levels of symb"):
        open_inputs(job)


def test_weights_have_the_shape_of_the_routing(tmp_path):
    write_arrays(tmp_path, **small_arrays(), topk=np.ones((40, 1), "f4"))
    job = load_job(write(tmp_path, GOOD), topk_weights=str(tmp_path / "topk.npy"))
    with pytest.raises(ValueError, match=r"job.toml: topk_weights must .* \(40, 1\) and routing.n"):
        open_inputs(job)


SWAPPED = {
    "tokens and routing": (
        {"tokens": "routing", "routing": "tokens"},
        r"tokens \(routing.npy\) hold int64 and routing \(tokens.npy\) float32: .* swapped",
    ),
    "routing and weights": (
        {"routing": "topk", "topk_weights": "routing"},
        r"routing \(topk.npy\) holds float32 and topk_weights \(routing.npy\) int64: .* swapped",
    ),
}


@pytest.mark.parametrize(("paths", "message"), SWAPPED.values(), ids=SWAPPED)
def test_swapped_files_are_named(tmp_path, paths, message):
    arrays = small_arrays()
    write_arrays(tmp_path, **arrays, topk=np.ones((40, 2), np.float32))
    paths = {"tokens": "tokens", "routing": "routing", "experts": "w"} | paths
    job = load_job(
        **{key: str(tmp_path / f"{name}.npy") for key, name in paths.items()},
        out=str(tmp_path / "out.npy"),
    )
    with pytest.raises(TypeError, match=message):
        open_inputs(job)


@pytest.mark.parametrize(
    ("width", "hint"),
    [(6, "set transposed = true"), (8, None), (5, r"are these the experts of this job\?")],
)
def test_transposed_is_proposed_only_where_it_would_fit(tmp_path, width, hint):
    arrays = small_arrays() | {
        "tokens": np.ones((40, width), np.float32),
        "gate": np.ones((4, 8, 6), np.float32),
        "down": np.ones((4, 6, 8), np.float32),
    }
    write_arrays(tmp_path, **arrays)
    table = {"kind": "gated"} | {
        key: str(tmp_path / f"{name}.npy")
        for key, name in {"gate": "gate", "up": "gate", "down": "down"}.items()
    }
    paths = {key: str(tmp_path / f"{key}.npy") for key in ("tokens", "routing", "out")}
    job = load_job(**paths, experts=table)
    if hint is None:
        assert open_inputs(job).experts.d == 8
        return
    with pytest.raises(ValueError, match=f"take rows of width 8, but tokens .* {width}; .*{hint}"):
        open_inputs(job)


def test_what_is_no_job_and_no_backend(tmp_path):
    with pytest.raises(TypeError, match="job must be a Job or the path of a job file; got None"):
        run_job(None)
    write_arrays(tmp_path, **small_arrays())
    with pytest.raises(TypeError, match="where must be Threads, Processes, Gpus or Cluster"):
        run_job(write(tmp_path, GOOD), "threads")
    with pytest.raises(ValueError, match="Processes must be 1 or more, but are 0"):
        Processes(0)
    with pytest.raises(ValueError, match=r'memory_limit: invalid size: \'lots\' .try "8 GiB"'):
        Threads(1, "lots")
    job = load_job(write(tmp_path, GOOD))
    limits = [lay_out(job, Threads(1, limit)).memory_limit for limit in ("4 GiB", "4GiB", 4 << 30)]
    assert limits == [4 << 30] * 3


def test_chunks_that_were_never_written_are_zeros_only_where_the_job_says_so(tmp_path):
    arrays = small_arrays()
    arrays["w"][2] = 0
    write_arrays(tmp_path, **arrays)
    zarr.create_array(tmp_path / "w.zarr", data=arrays["w"], chunks=(1, *arrays["w"].shape[1:]))
    path = write(tmp_path, GOOD.replace("w.npy", "w.zarr"))
    with pytest.raises(ReadError, match=r"job\.toml: experts\.w: .* set missing=\"fill\""):
        open_inputs(load_job(path))
    y = build_of(load_job(path, missing="fill")).y
    same = build_of(load_job(write(tmp_path, GOOD))).y
    np.testing.assert_array_equal(y.compute(scheduler="sync"), same.compute(scheduler="sync"))


def test_a_placement_that_is_a_directory(tmp_path):
    write_arrays(tmp_path, **small_arrays())
    with pytest.raises(JobError, match="or the path of a file, but there is no such file"):
        open_inputs(load_job(write(tmp_path, GOOD), placement=str(tmp_path)))


def test_a_placement_that_is_no_file_is_perhaps_a_name(tmp_path):
    write_arrays(tmp_path, **small_arrays())
    job = load_job(write(tmp_path, GOOD), placement="balancd")
    with pytest.raises(
        JobError, match=r"but there is no such file: .*/balancd \(did you mean 'balanced'\?\)"
    ):
        open_inputs(job)


def test_building_reads_nothing_but_what_a_placement_needs(tmp_path):
    arrays = small_arrays()
    write_arrays(tmp_path, **arrays)
    built = build_of(load_job(write(tmp_path, GOOD)), chunk_rows=16)
    assert built.y.chunks[0] == (16, 16, 8)
    assert built.settings["world_size"] == 2
    assert sorted(built.inputs) == ["experts", "routing", "tokens"]


def test_a_placement_for_other_ranks(tmp_path):
    write_arrays(tmp_path, **small_arrays())
    (tmp_path / "p.json").write_text(balanced([4, 4, 4, 4], 3, num_physical=6).to_json())
    job = load_job(write(tmp_path, GOOD), placement=str(tmp_path / "p.json"))
    with pytest.raises(ValueError, match="on 3 ranks, but world_size=2; make"):
        build_of(job)


@pytest.mark.parametrize("placement", ["packed", "balanced", "exact", "p.json"])
def test_a_placement_does_not_change_the_output(tmp_path, placement):
    arrays = small_arrays()
    write_arrays(tmp_path, **arrays)
    (tmp_path / "p.json").write_text(balanced([9, 1, 1, 1], 3, num_physical=6).to_json())
    path = write(tmp_path, GOOD)
    job = load_job(path, placement=placement if "." not in placement else str(tmp_path / "p.json"))
    y = build_of(job, 3, chunk_rows=16).y.compute(scheduler="sync")
    straight = build_of(load_job(path), 1).y.compute(scheduler="sync")
    np.testing.assert_allclose(y, straight, rtol=1e-5, atol=1e-5)
