"""Verify judges a row by its own terms: it finds every lost row, and rejects no right one."""

from __future__ import annotations

from pathlib import Path

import dask.array as da
import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from dask_ep import expert_parallel
from dask_ep.cli.main import cli
from dask_ep.jobs.build import open_inputs
from dask_ep.jobs.job import Job, load_job
from dask_ep.jobs.verify import verify_job

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def write(path: str | Path, array: np.ndarray) -> str:
    save_file({"x": np.ascontiguousarray(array)}, path)
    return str(path)


def run(job: Job) -> np.ndarray:
    """Compute a job's output as its chunks' tasks do, and write it."""
    inputs = open_inputs(job)
    sources = (inputs.tokens, inputs.routing, inputs.topk_weights)
    tokens, routing, weights = (None if source is None else lazy(source) for source in sources)
    y = expert_parallel(tokens, routing, inputs.experts, topk_weights=weights, world_size=1)
    with np.errstate(over="ignore", invalid="ignore"):
        y = y.compute(scheduler="sync")
    write(job.out, y)
    return y.copy()


def job_of(folder: Path, tokens, routing, weights=None, kind="linear", **experts) -> Job:
    folder.mkdir(exist_ok=True)
    options = {name: x for name, x in experts.items() if not isinstance(x, np.ndarray)}
    arrays = {name: x for name, x in experts.items() if isinstance(x, np.ndarray)}
    arrays |= {"tokens": tokens, "routing": routing}
    arrays |= {} if weights is None else {"topk_weights": weights}
    paths = {name: write(folder / f"{name}.safetensors", x) for name, x in arrays.items()}
    keys = {name: paths.pop(name) for name in list(paths) if name not in experts}
    table = {"kind": kind, **paths, **options}
    return load_job(**keys, experts=table, out=str(folder / "out.safetensors"))


def lazy(source) -> da.Array:
    return da.from_array(source.read(0, source.shape[0]), chunks=-1)


def normal(shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


# --- massive rows ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def massive(tmp_path_factory):
    """Jobs whose first token is much larger than the others, run."""
    jobs = {}
    for dtype, factor in ((BFLOAT16, 300), (np.dtype(np.float16), 300), (np.dtype("f4"), 3e5)):
        tokens = normal((64, 16))
        tokens[0] *= factor
        folder = tmp_path_factory.mktemp(dtype.name)
        routing = np.arange(128, dtype="i4").reshape(64, 2) % 4
        job = job_of(folder, tokens.astype(dtype), routing, w=normal((4, 16, 16), dtype))
        jobs[dtype] = job, run(job)
    return jobs


@pytest.mark.parametrize("dtype", [BFLOAT16, np.dtype(np.float16), np.dtype("f4")], ids=str)
def test_a_massive_token_hides_no_other_row(massive, dtype):
    job, right = massive[dtype]
    write(job.out, right)
    assert verify_job(job).good
    wrong = right.copy()
    wrong[1:] = 0
    write(job.out, wrong)
    found = verify_job(job)
    assert not found.good
    assert {row.row for row in found.worst} == set(range(1, 64))


# --- any undisturbed run, and any disturbed row ----------------------------------------------


@st.composite
def layers(draw: st.DrawFn, *, cancelling: bool) -> dict:
    """Layers of all kinds and dtypes with rows of any size; with terms that cancel or without."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from([np.dtype(np.float32), np.dtype(np.float64), BFLOAT16]))
    n, E, k = draw(st.integers(1, 12)), 2 * draw(st.integers(1, 2)), draw(st.integers(1, 3))
    d, f = 24, 40  # so many values of a row are never all small by chance
    if cancelling:
        d, f = draw(st.sampled_from([1, 3, 24])), draw(st.sampled_from([1, 5, 40]))
    tokens = rng.standard_normal((n, d)) * 10.0 ** rng.integers(-6, 6, (n, 1))
    if draw(st.booleans()):  # massive activations: one channel of each row
        tokens[:, 0] *= 1e3
    shapes = {
        "linear": {"w": (E, d, d)},
        "mlp": {"up": (E, d, f), "down": (E, f, d)},
        "gated": {"gate": (E, d, f), "up": (E, d, f), "down": (E, f, d)},
    }
    kind = draw(st.sampled_from(list(shapes)))
    experts = {name: rng.standard_normal(shape) for name, shape in shapes[kind].items()}
    *_, last = experts
    if cancelling and draw(st.booleans()):  # every other expert is nearly the last one's negative
        for name, w in experts.items():
            w[1::2] = w[0::2] if name != last else -w[0::2] * (1 + 1e-6)
    elif cancelling:  # the terms of a product cancel
        experts[last] -= experts[last].mean(axis=1, keepdims=True)
        tokens[:, 1:] = tokens[:, :1]
    if kind != "linear":
        names = ["relu", "relu2", "silu", "gelu", "gelu_tanh"]
        experts["activation"] = draw(st.sampled_from(names))
    if kind == "gated" and draw(st.booleans()):
        experts["output_scale"] = 1 + rng.standard_normal((E, d))
        experts["output_norm_eps"] = draw(st.sampled_from([1e-8, 1.0]))
    return {
        "tokens": tokens.astype(dtype),
        "routing": np.stack([rng.integers(-1, E, n) for _ in range(k)], axis=1),
        "weights": draw(st.sampled_from([None, rng.random((n, k)).astype("f4")])),
        "kind": kind,
        **{n: w.astype(dtype) if isinstance(w, np.ndarray) else w for n, w in experts.items()},
    }


@settings(max_examples=60, deadline=None)
@given(layers(cancelling=True))
def test_a_run_whose_terms_cancel_is_good(tmp_path_factory, layer):
    job = job_of(tmp_path_factory.mktemp("cancelling"), **layer)
    run(job)
    assert verify_job(job).good


@settings(max_examples=40, deadline=None)
@given(layers(cancelling=False), st.data())
def test_a_run_is_good_and_a_lost_row_is_found(tmp_path_factory, layer, data):
    job = job_of(tmp_path_factory.mktemp("any"), **layer)
    y = run(job)
    assert verify_job(job).good
    row = data.draw(st.integers(0, len(y) - 1))
    was_zero, y[row] = not y[row].any(), 0
    write(job.out, y)
    found = verify_job(job)
    assert [wrong.row for wrong in found.worst] == [row] or was_zero
    assert found.good == was_zero


@pytest.mark.parametrize("size", [1e-250, 1e-160, 1e160, 1e250])
@pytest.mark.parametrize("kind", ["linear", "mlp", "gated"])
def test_values_whose_squares_are_no_floats_are_judged_like_others(tmp_path, size, kind):
    rng = np.random.default_rng(0)
    tokens = rng.standard_normal((50, 24)) * size
    tokens[:, 1:] = tokens[:, :1]
    first, last = rng.standard_normal((2, 2, 24, 24))
    last -= last.mean(axis=1, keepdims=True)  # the terms cancel
    experts = {"w": last} if kind == "linear" else {"up": np.abs(first), "down": last}
    experts |= {"gate": np.abs(first), "up": first / size} if kind == "gated" else {}
    options = {} if kind == "linear" else {"activation": "relu"}
    job = job_of(tmp_path, tokens, np.arange(50) % 2, kind=kind, **experts, **options)
    y = run(job)
    assert verify_job(job).good
    y[7, 3] += 1e-9 * np.abs(tokens[7]).max()
    write(job.out, y)
    assert [row.row for row in verify_job(job).worst] == [7]


# --- 16 bits ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [BFLOAT16, np.dtype(np.float16)], ids=str)
def test_what_is_rounded_once_to_16_bits_is_good(tmp_path, dtype):
    """Experts W and -W + a little: their sum in float32, rounded once, and nothing else."""
    tokens, W = normal((40, 8), dtype), normal((1, 8, 8), dtype, seed=1)
    experts = np.concatenate([W, -W + W * dtype.type(0.01)])
    job = job_of(tmp_path, tokens, np.tile(np.array([[0, 1]], "i4"), (40, 1)), w=experts)
    run(job)
    once = tokens.astype("f4") @ experts.astype("f4").sum(axis=0)
    write(job.out, once.astype(dtype))
    assert verify_job(job).good
    write(job.out, (2 * once).astype(dtype))
    assert not verify_job(job, tolerance=1e-3).good


# --- what is infinite or NaN -----------------------------------------------------------------


def strange(tmp_path) -> Job:
    tokens = normal((20, 4))
    tokens[3, 1], tokens[5, 2], tokens[9] = np.nan, np.inf, 3e38  # the last overflows on the way
    routing = np.zeros((20, 1), "i4")
    return job_of(tmp_path, tokens, routing, w=np.full((1, 4, 4), 2.0, "f4"))


def test_rows_that_are_not_finite_are_compared_and_named(tmp_path):
    job = strange(tmp_path)
    right = run(job)
    found = verify_job(job)
    assert (found.good, found.not_finite_rows, found.overflowed) == (True, (3, 5, 9), 0)
    for row, value in ((3, np.inf), (3, 0.0), (5, np.nan), (5, -np.inf), (9, 0.0), (0, np.nan)):
        wrong = right.copy()
        wrong[row, 0] = value
        write(job.out, wrong)
        assert [bad.row for bad in verify_job(job).worst] == [row], (row, value)


def test_a_value_whose_terms_overflow_is_counted(tmp_path):
    tokens = np.full((3, 2), 1.0, "f4")
    tokens[1] = [3e38, -3e38]  # 0 in exact arithmetic, and infinity less infinity in float32
    job = job_of(tmp_path, tokens, np.zeros((3, 1), "i4"), w=np.full((1, 2, 2), 8.0, "f4"))
    run(job)
    found = verify_job(job)
    assert (found.good, found.not_finite_rows, found.overflowed) == (True, (1,), 2)


def test_the_command_tells_what_is_not_finite(tmp_path):
    job = strange(tmp_path)
    run(job)
    path = tmp_path / "job.toml"
    path.write_text(
        f'tokens = "{job.tokens}"\nrouting = "{job.routing}"\nout = "{job.out}"\n'
        f'[experts]\nkind = "linear"\nw = "{job.experts["w"]}"\ntransposed = false\n'
    )
    done = CliRunner().invoke(cli, ["verify", str(path)], standalone_mode=False)
    assert (
        "12 of 80 values are infinite or NaN (3 rows, the first is row 3), both in the output "
        "and in the recomputed rows\ngood"
    ) in done.output
