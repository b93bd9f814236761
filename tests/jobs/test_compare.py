"""Two checkpoints, or two outputs, are compared as plain loops over their rows would do it."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from dataclasses import replace

import click
import dask.array as da
import numpy as np
import pytest
from click.testing import CliRunner
from distributed.scheduler import Scheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from dask_ep import load_moe_layer, store
from dask_ep.cli.main import cli
from dask_ep.errors import DoesNotFit
from dask_ep.jobs import compare
from dask_ep.jobs import run as jobs_run
from dask_ep.jobs.backends import Processes, Threads
from dask_ep.jobs.compare import (
    Comparison,
    compare_checkpoints,
    compare_outputs,
    compare_tensors,
)
from dask_ep.jobs.decide import decide
from dask_ep.jobs.difference import Difference, compare_rows, differences, join, row_errors
from tests.checkpoints import FIXTURES, LAYER, altered
from tests.graph.test_passes import passes_of

ORIGINAL, QUANTISED = FIXTURES / "deepseek_v3_bfloat16", FIXTURES / "deepseek_v3_fp8_cut"
ROWS = 500


def plain_error(a, b) -> float:
    pairs = list(zip(map(float, a), map(float, b), strict=True))
    if all(x == y or (math.isnan(x) and math.isnan(y)) for x, y in pairs):
        return 0.0
    if not all(math.isfinite(v) for pair in pairs for v in pair):
        return math.inf
    norm = math.hypot(*(x for x, _ in pairs))
    return math.hypot(*(x - y for x, y in pairs)) / norm if norm else math.inf


def plainly(a, b, routing, E, tolerance) -> dict:
    """What a `Difference` says, in loops."""
    found = {"errors": [], "rows": [0] * E, "sum": [0.0] * E, "largest": [0.0] * E,
             "lost": [0] * E, "gained": [0] * E, "slots": [0] * routing[0].shape[1],
             "pairs": Counter(), "moved": []}  # fmt: skip
    for row, (x, y) in enumerate(zip(a, b, strict=True)):
        error = plain_error(x, y)
        found["errors"].append(error)
        ours, theirs = (set(r[row].tolist()) - {-1} for r in routing)
        for e in ours:
            found["rows"][e] += 1
            found["sum"][e] += error if math.isfinite(error) else 0.0
            found["largest"][e] = max(found["largest"][e], error)
            found["lost"][e] += e not in theirs
        for e in theirs - ours:
            found["gained"][e] += 1
        if ours != theirs:
            found["moved"].append(row)
            if len(ours - theirs) == len(theirs - ours) == 1:
                found["pairs"][(ours - theirs).pop(), (theirs - ours).pop()] += 1
        for slot, e in enumerate(routing[0][row].tolist()):
            found["slots"][slot] += e != -1 and e not in theirs
    found["beyond"] = sum(error > tolerance for error in found["errors"])
    return found


VALUES = [0.0, 1.0, -1.0, 1e-30, 1e30, 1e200, math.nan, math.inf, -math.inf]


@st.composite
def cases(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    n, d, E = draw(st.integers(0, 30)), draw(st.integers(1, 5)), draw(st.integers(2, 6))
    k = draw(st.integers(1, E))
    a = rng.standard_normal((n, d))
    b = a + draw(st.sampled_from([0.0, 1e-6, 1e-2, 2.0])) * rng.standard_normal((n, d))
    strange = rng.random((n, d)) < draw(st.sampled_from([0.0, 0.1]))
    a[strange] = rng.choice(VALUES, strange.sum())
    b[strange & (rng.random((n, d)) < 0.5)] = 1.0
    first = np.argsort(rng.random((n, E)), axis=1)[:, :k]
    second = np.where(
        rng.random((n, 1)) < 0.5, np.argsort(rng.random((n, E)), axis=1)[:, :k], first
    )
    first = np.where(rng.random((n, k)) < 0.1, -1, first)
    cuts = sorted(draw(st.lists(st.integers(0, n), max_size=11)))
    chunks = tuple(np.diff([0, *cuts, n]).tolist())
    return a, b, [first.astype(np.int32), second], E, chunks


@settings(max_examples=25)
@given(cases(), st.sampled_from([0.0, 1e-3, 0.5]))
def test_chunks_together_are_what_loops_over_all_rows_give(case, tolerance):
    a, b, routing, E, chunks = case
    lazy = [da.from_array(x, chunks=(chunks, -1)) for x in (a, b, *routing)]
    found = join(differences(*lazy[:2], lazy[2:], num_experts=E, tolerance=tolerance))
    found = found.compute(scheduler="sync").item()
    right = plainly(a, b, routing, E, tolerance)
    errors = np.array(right["errors"])
    assert (found.rows, found.beyond, found.moved) == (
        len(a), right["beyond"], len(right["moved"])
    )  # fmt: skip
    np.testing.assert_allclose(row_errors(a, b), errors, rtol=1e-12)
    assert [row for _, row in found.worst] == np.argsort(-errors, kind="stable")[:10].tolist()
    assert list(found.first_moved) == right["moved"][:10]
    assert found.pairs == right["pairs"]
    for name, key in (("expert_rows", "rows"), ("lost", "lost"), ("gained", "gained"),
                      ("moved_slots", "slots"), ("expert_errors", "sum"),
                      ("expert_largest", "largest")):  # fmt: skip
        np.testing.assert_allclose(getattr(found, name), right[key], rtol=1e-12, err_msg=name)
    for part in (0.5, 0.99, 1.0):
        exact = sorted(right["errors"])[max(math.ceil(part * len(a)) - 1, 0)] if len(a) else 0.0
        said = found.quantile(part)
        assert said == exact or (exact <= said * (1 + 1e-7) and said <= exact * 1.008 + 1e-40) or (
            exact > 3e38 and math.isinf(said)
        )  # fmt: skip
    of_moved = [right["errors"][row] for row in right["moved"]]
    assert sum(found.bins_of_moved.values()) == len(of_moved)
    assert found.quantile(1.0, of_moved=True) >= max(of_moved, default=0.0) * (1 - 1e-7)


def test_an_output_without_rows():
    nothing = compare_rows(np.empty((0, 3)), np.empty((0, 3)))
    assert (nothing.rows, nothing.largest, nothing.quantile(0.5)) == (0, 0.0, 0.0)


def test_outputs_whose_rows_chose_no_expert_are_compared(tmp_path):
    np.save(tmp_path / "y.npy", np.zeros((5, 2)))
    np.save(tmp_path / "routing.npy", np.full((5, 2), -1))
    routing = [tmp_path / "routing.npy"] * 2
    found = compare_outputs(tmp_path / "y.npy", tmp_path / "y.npy", Threads(1), routing=routing)
    assert (found.difference.rows, found.difference.moved) == (5, 0)
    assert found.difference.expert_rows.tolist() == [0]


def test_outputs_without_rows_have_a_routing_too(tmp_path):
    np.save(tmp_path / "a.npy", np.empty((0, 3)))
    np.save(tmp_path / "r.npy", np.empty((0, 2), np.int32))
    paths, routing = [tmp_path / "a.npy"] * 2, [tmp_path / "r.npy"] * 2
    found = compare_outputs(*paths, Threads(1), routing=routing, tolerance=0.1)
    assert (found.difference.rows, found.difference.moved, found.good) == (0, 0, True)


def test_an_expert_with_a_row_of_nan_has_the_largest_mean_error():
    a = np.ones((3, 2))
    b = np.array([[1.5, 1.0], [np.nan, 1.0], [1.0, 1.0]])
    found = compare_rows(a, b, [np.array([[0], [1], [1]])], num_experts=3)
    np.testing.assert_allclose(found.expert_means, [0.5 / np.sqrt(2), np.inf, 0])


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    path = tmp_path_factory.mktemp("compare") / "x.npy"
    np.save(path, np.random.default_rng(0).standard_normal((ROWS, 32)).astype("f4"))
    return path


def layer_by_layer(tokens) -> Difference:
    """The same comparison of outputs and routings that are computed one by one."""
    hidden = da.from_array(np.load(tokens), chunks=(100, -1))
    layers = [load_moe_layer(each, LAYER) for each in (ORIGINAL, QUANTISED)]
    outputs = [layer(hidden).compute(scheduler="sync") for layer in layers]
    routings = [layer.route(hidden)[0].compute(scheduler="sync") for layer in layers]
    return compare_rows(*outputs, routings, num_experts=12, tolerance=0.1)


@pytest.mark.parametrize(
    "where",
    [Threads(2), pytest.param(Processes(2), marks=pytest.mark.slow)],
    ids=["threads", "processes"],
)
def test_a_checkpoint_and_its_quantized_copy(tokens, where):
    done = []
    found = compare_checkpoints(
        ORIGINAL, QUANTISED, tokens, LAYER, where,
        chunk_rows=100, tolerance=0.1, on_progress=lambda *both: done.append(both),
    )  # fmt: skip
    right, got = layer_by_layer(tokens), found.difference
    assert (got.rows, got.beyond, got.moved, got.first_moved) == (
        ROWS, right.beyond, right.moved, right.first_moved
    )  # fmt: skip
    assert 0 < got.moved < ROWS / 20
    assert got.pairs == right.pairs
    np.testing.assert_allclose(got.expert_errors, right.expert_errors, rtol=1e-4)
    assert [row for _, row in got.worst] == [row for _, row in right.worst]
    assert got.quantile(0.5) == pytest.approx(right.quantile(0.5), rel=0.01)
    assert not found.good
    assert done == [(100 * n, ROWS) for n in range(1, 6)]


@pytest.mark.parametrize("way", ["in memory", "hold", "spill"])
def test_layers_that_do_not_fit_together_are_run_one_after_the_other(
    tokens, tmp_path, monkeypatch, way
):
    limit, told, left = 300 * 10**6, [], []
    if way != "in memory":
        monkeypatch.setattr(
            jobs_run, "decide",
            lambda *args, **more: replace(
                decide(*args, **more), passes=passes_of(way, group_chunks=2, threads=1)
            ),
        )  # fmt: skip
    run_job = compare.run_job

    def running(job, *args, **more):
        left.append(sorted(path.name for path in tmp_path.glob("*/*.zarr")))
        return run_job(job, *args, **more)

    monkeypatch.setattr(compare, "run_job", running)
    found = compare_checkpoints(
        ORIGINAL, QUANTISED, tokens, LAYER, Threads(1, limit), chunk_rows=64, scratch=tmp_path,
        tolerance=0.1, on_progress=lambda *both: told.append(both),
    )  # fmt: skip
    assert left == [[], ["a.zarr", "routing-0.topk_weights.zarr", "routing-0.zarr"]]
    assert not list(tmp_path.iterdir()), "nothing is left"
    right, got = layer_by_layer(tokens), found.difference
    assert (got.rows, got.beyond, got.moved, got.first_moved, got.pairs) == (
        ROWS, right.beyond, right.moved, right.first_moved, right.pairs
    )  # fmt: skip
    np.testing.assert_array_equal(got.expert_rows, right.expert_rows)
    np.testing.assert_allclose(got.expert_errors, right.expert_errors, rtol=1e-4)
    assert (found.layer, found.routing_compared, found.tensors.same > 0) == (LAYER, True, True)
    assert told == sorted(told)
    assert told[-1] == (3 * ROWS, 3 * ROWS)


@pytest.mark.slow
def test_checkpoints_larger_than_memory_are_compared(tmp_path, monkeypatch):
    """Of each 252 MB of experts, and of memory 420 MB."""
    d, f, ways = 1024, 2048, []

    def wide(tensors, times):
        rng = np.random.default_rng(0)
        for name in sorted(tensors):
            if ".experts." in name:
                down = "down_proj" in name
                w = rng.standard_normal((d, f) if down else (f, d), dtype="f4") / np.float32(16)
                tensors[name] = w * np.float32(times if down else 1)
        gate = "model.layers.1.mlp.gate.weight"
        return tensors | {gate: rng.standard_normal((10, d), dtype="f4")}

    pair = []
    for name, times in (("a", 1.0), ("b", 1.01)):
        (tmp_path / name).mkdir()
        pair.append(
            altered(
                tmp_path / name, "qwen3_moe", tensors=lambda t, times=times: wide(t, times),
                moe_intermediate_size=f, hidden_size=d,
            )
        )  # fmt: skip
    np.save(tmp_path / "x.npy", np.random.default_rng(1).standard_normal((500, d), dtype="f4"))
    run_job = compare.run_job

    def running(*args, **more):
        ways.append(run_job(*args, **more).decision.passes)

    monkeypatch.setattr(compare, "run_job", running)
    found = compare_checkpoints(
        *pair, tmp_path / "x.npy", where=Threads(1, 420_000_000), scratch=tmp_path
    )
    for path in (tmp_path / "a", tmp_path / "b"):
        shutil.rmtree(path)
    assert len(ways) == 2
    assert None not in ways
    assert (found.difference.rows, found.difference.moved) == (500, 0)
    assert found.difference.quantile(0.5) == pytest.approx(0.01, rel=0.01)


def test_experts_that_rows_are_not_sent_to_are_compared_too(tokens):
    case = FIXTURES / "longcat_flash"
    layer = load_moe_layer(case, LAYER)
    found = compare_checkpoints(case, case, tokens, LAYER).difference
    assert (found.num_experts, found.moved) == (layer.known_experts, 0)
    hidden = da.from_array(np.load(tokens), chunks=-1)
    indices = layer.route(hidden)[0].compute(scheduler="sync")
    assert indices.max() > layer.experts.num_experts
    np.testing.assert_array_equal(found.expert_rows, np.bincount(indices.reshape(-1)))


def run(*arguments) -> tuple[int, str]:
    ran = CliRunner().invoke(
        cli, ["compare", *map(str, arguments)], obj={"debug": False}, standalone_mode=False
    )
    if isinstance(ran.exception, click.UsageError):
        return 2, str(ran.exception)
    if ran.exception is not None:
        raise ran.exception
    return ran.return_value, ran.output


def test_the_command_says_where_two_checkpoints_differ(tokens):
    common = (ORIGINAL, QUANTISED, "--tokens", tokens, "--layer-index", LAYER, "--threads", 1)
    code, said = run(*common, "--tolerance", "0.1")
    assert code == 3
    for line in (
        "layer 1: 500 rows compared",
        "go to other experts, the first are",
        "39 are bfloat16 in A and float8_e4m3fn in B",
        "only in B: experts.*.down_proj.weight_scale_inv (12)",
        "not good",
    ):
        assert line in said
    code, said = run(*common, "--tolerance", "0.1", "--share", "0.9")
    assert (code, said.splitlines()[-1]) == (0, "good")
    assert run(*common)[0] == 0, "without a tolerance nothing is judged"


def test_other_layouts_of_the_same_layer_are_equal(tokens):
    found = compare_checkpoints(FIXTURES / "qwen3_moe", FIXTURES / "qwen3_moe_fused", tokens)
    assert (found.layer, found.difference.largest, found.difference.moved) == (1, 0.0, 0)
    assert found.tensors.only_b == {"experts.down_proj": 1, "experts.gate_up_proj": 1}
    assert found.tensors.only_a["experts.*.up_proj.weight"] == 10


@pytest.mark.slow
def test_a_comparison_on_workers_leaves_no_error_at_the_scheduler(tmp_path, monkeypatch):
    cancel, failed = Scheduler.stimulus_cancel, []

    def watched(*arguments, **more):
        failed.append(True)
        cancel(*arguments, **more)
        failed.pop()

    monkeypatch.setattr(Scheduler, "stimulus_cancel", watched)
    np.save(tmp_path / "a.npy", np.ones((100, 2)))
    found = compare_outputs(*[tmp_path / "a.npy"] * 2, Processes(1), chunk_rows=5)
    assert (found.difference.rows, failed) == (100, [])


def test_tensors_of_a_file_are_outputs_and_routings(tmp_path):
    tensors = {"y": np.eye(4), "z": 2 * np.eye(4), "routing": np.arange(4)}
    save_file(tensors, tmp_path / "all.safetensors")
    y, z, routing = (f"{tmp_path}/all.safetensors::{name}" for name in tensors)
    found = compare_outputs(y, z, Threads(1), routing=[routing])
    assert (found.difference.largest, found.difference.num_experts) == (1, 4)
    with pytest.raises(FileNotFoundError, match="no output yet"):
        compare_outputs(y, f"{tmp_path}/none.safetensors::z", Threads(1))


def test_outputs_and_their_routings(tmp_path):
    rng = np.random.default_rng(1)
    a = rng.standard_normal((40, 4))
    b = a.copy()
    b[7] += 1e-3 * np.linalg.norm(a[7]) / 2
    routing = np.argsort(rng.random((40, 5)), axis=1)[:, :2]
    other = routing.copy()
    other[7, 1] = (set(range(5)) - set(routing[7])).pop()
    for name, array in (("a", a), ("b", b), ("r", routing), ("s", other)):
        store(da.from_array(array, chunks=(10, -1)), tmp_path / f"{name}.zarr", scheduler="sync")
    paths = [tmp_path / f"{name}.zarr" for name in "ab"]
    routings = ("--routing", tmp_path / "r.zarr", "--routing", tmp_path / "s.zarr")
    code, said = run(*paths, *routings, "--tolerance", "1e-4")
    assert code == 3
    assert "largest 0.001\nworst rows: 7 (0.001)" in said
    assert "routing: 1 rows (2.50%) go to other experts, the first are 7;" in said
    assert f"most often {routing[7, 1]} -> {other[7, 1]} (1)" in said
    assert run(*paths, "--tolerance", "2e-3")[0] == 0
    found = compare_outputs(*paths, Threads(1), chunk_rows=7, tolerance=1e-4)
    assert (found.difference.beyond, found.difference.num_experts) == (1, 0)


@pytest.mark.parametrize("rows", [0, 10, 40, 70])
def test_a_share_that_is_just_reached_is_good(rows):
    beyond = rows // 10
    for more, good in ((0, True), (1, rows == 0)):
        found = Difference(0, rows=rows, beyond=beyond + more * bool(rows))
        assert Comparison(found, 0.1, 0.9, False).good is good


def test_a_pruned_checkpoint_is_compared_without_its_routing(tokens, tmp_path):
    def without_the_last(tensors):
        kept = {n: a for n, a in tensors.items() if ".experts.7." not in n}
        gate = "model.layers.1.block_sparse_moe.gate.weight"
        gate = gate if gate in kept else "model.layers.1.mlp.gate.weight"
        return kept | {gate: kept[gate][:7]}

    pruned = altered(tmp_path, "mixtral", tensors=without_the_last, num_local_experts=7)
    found = compare_checkpoints(FIXTURES / "mixtral", pruned, tokens, LAYER, Threads(1))
    assert not found.routing_compared
    assert found.difference.expert_rows.sum() == 2 * ROWS
    assert found.difference.expert_means.argmax() == 7, "its rows go elsewhere"
    assert [f"{(8, 32)} and {(7, 32)}"] == list(found.tensors.shapes.values())


def test_tensors_that_are_missing_or_never_used_are_named(tokens, tmp_path):
    name = "model.layers.1.mlp.experts.3.up_proj.weight"

    def renamed(tensors):
        return {{name: f"{name}_old"}.get(n, n): a for n, a in tensors.items()}

    other = altered(tmp_path, "qwen3_moe", tensors=renamed)
    with pytest.raises(ValueError, match=rf"must have the tensor {name}"):
        compare_checkpoints(FIXTURES / "qwen3_moe", other, tokens, LAYER)
    found = compare_tensors(FIXTURES / "qwen3_moe", other, LAYER)
    assert found.only_a == {"experts.*.up_proj.weight": 1}
    assert found.only_b == {"experts.*.up_proj.weight_old": 1}
    (tmp_path / "more").mkdir()
    extra = altered(
        tmp_path / "more", "qwen3_moe", tensors=lambda t: t | {f"{name}_old": np.ones(3, "f4")}
    )
    with pytest.raises(ValueError, match=rf"1 would not be: {name}_old"):
        compare_checkpoints(FIXTURES / "qwen3_moe", extra, tokens, LAYER)


def test_what_cannot_be_compared_is_refused(tokens, tmp_path):
    with pytest.raises(DoesNotFit, match="limit of 140 MB must hold"):
        compare_checkpoints(ORIGINAL, QUANTISED, tokens, LAYER, Threads(1, 140 * 10**6))
    with pytest.raises(ValueError, match="have 2 MoE layers in common, 0 to 1"):
        compare_checkpoints(FIXTURES / "mixtral", FIXTURES / "mixtral_float16", tokens)
    np.save(tmp_path / "a.npy", np.ones((4, 2)))
    np.save(tmp_path / "b.npy", np.ones((4, 3)))
    with pytest.raises(ValueError, match=r"a.npy is \(4, 2\) and b.npy \(4, 3\)"):
        compare_outputs(tmp_path / "a.npy", tmp_path / "b.npy")
    with pytest.raises(ValueError, match=r"with n = 4 rows, but x.npy has shape \(500, 32\)"):
        compare_outputs(tmp_path / "a.npy", tmp_path / "a.npy", routing=[tokens])
    np.save(tmp_path / "r.npy", [[0, 1], [1, 0], [-2, 1], [0, -1]])
    with pytest.raises(ValueError, match=r"row 2 of the whole array.*routing\[2, 0\] is -2"):
        compare_outputs(tmp_path / "a.npy", tmp_path / "a.npy", routing=[tmp_path / "r.npy"])
    with pytest.raises(FileNotFoundError, match="no output yet"):
        compare_outputs(tmp_path / "a.npy", tmp_path / "none.npy")
    assert run(ORIGINAL, QUANTISED) == (
        2, "to compare checkpoints, give --tokens, and no --routing"
    )  # fmt: skip
    code, said = run(ORIGINAL, tokens, "--tokens", tokens)
    assert (code, said) == (2, f"{tokens} must be a checkpoint, as the other one is")
    assert run(tokens, tokens, "--layer-index", 1)[0] == 2
