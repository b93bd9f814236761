"""What looks like a mistake is noted before a run, and what came of it afterwards."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dask_ep.arrays.checks import count_not_finite
from dask_ep.cli import main
from dask_ep.jobs.backends import Processes, Threads
from dask_ep.jobs.build import open_inputs
from dask_ep.jobs.job import load_job
from dask_ep.jobs.notes import note_indices_from_1, note_square_weights
from dask_ep.jobs.run import run_job

E, N = 4, 20


def here(capsys, *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return end.value.code or 0, captured.out, captured.err


def write_job(folder, *, routing=None, tokens=None, options="", kind="linear", **weights):
    """A job file of arrays; linear experts with square weights unless others are given."""
    arrays = weights or {"w": np.ones((E, 3, 3), "f4")}
    tokens = np.ones((N, next(iter(arrays.values())).shape[1]), "f4") if tokens is None else tokens
    routing = np.arange(len(tokens)) % E if routing is None else routing
    for name, array in {"tokens": tokens, "routing": routing, **arrays}.items():
        np.save(folder / f"{name}.npy", array)
    lines = ['tokens = "tokens.npy"', 'routing = "routing.npy"', 'out = "out.npy"']
    lines += ["[experts]", f'kind = "{kind}"', *(f'{name} = "{name}.npy"' for name in arrays)]
    path = folder / "job.toml"
    path.write_text("\n".join([*lines, options]))
    return path


def said(capsys, path) -> dict[str, str]:
    """What each command says of a job."""
    commands = {"inspect": [], "plan": ["--rates", "flops=1e9,copy=1e9"], "run": ["--overwrite"]}
    words = {}
    for command, options in commands.items():
        _, out, err = here(capsys, command, path, *options)
        words[command] = " ".join((out + err).split())
    return words


# --- square weights ----------------------------------------------------------------------------


SQUARE = "weights are square, 3 x 3, and are read as (E, in, out)"


def test_square_weights_are_noted_until_the_job_says_whether_they_are_transposed(tmp_path, capsys):
    for words in said(capsys, write_job(tmp_path)).values():
        assert words.count(SQUARE) == 1
    for value in ("true", "false"):
        path = write_job(tmp_path, options=f"transposed = {value}")
        for words in said(capsys, path).values():
            assert "weights are square" not in words


SIDE = st.sampled_from([2, 3])


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(["linear", "mlp", "gated", "gated_fused"]), SIDE, SIDE, SIDE, st.booleans())
def test_weights_are_square_where_their_shapes_fit_both_ways(
    tmp_path_factory, kind, d, f, d_out, biased
):
    shapes = {
        "linear": {"w": (E, d, d_out)},
        "mlp": {"up": (E, d, f), "down": (E, f, d_out)},
        "gated": {"gate": (E, d, f), "up": (E, d, f), "down": (E, f, d_out)},
        "gated_fused": {"gate_up": (E, d, 2 * f), "down": (E, f, d_out)},
    }[kind]
    either_way = all(shape[1] == shape[2] for shape in shapes.values())
    if biased:
        shapes["bias" if kind == "linear" else "down_bias"] = (E, d_out)
    arrays = {name: np.ones(shape, "f4") for name, shape in shapes.items()}
    path = write_job(tmp_path_factory.mktemp("square"), kind=kind, **arrays)
    note = note_square_weights(open_inputs(load_job(path)))
    assert (note is not None) == either_way


# --- indices from 1 ----------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-1, E), min_size=1, max_size=12))
@example([1, 2, 3])
@example([1, 4])
@example([-1, -1])
def test_indices_are_doubted_where_expert_0_is_empty_and_the_last_is_not(tmp_path_factory, indices):
    path = write_job(
        tmp_path_factory.mktemp("indices"),
        routing=np.array(indices),
        tokens=np.ones((len(indices), 3), "f4"),
    )
    note = note_indices_from_1(open_inputs(load_job(path)))
    assert (note is not None) == (0 not in indices and max(indices) in (E - 1, E))


def test_every_command_doubts_indices_from_1(tmp_path, capsys):
    path = write_job(tmp_path, routing=np.arange(N) % (E - 1) + 1, options="transposed = false")
    for words in said(capsys, path).values():
        assert words.count("no row goes to expert 0, and the largest index") == 1
    assert "expert 0 has no row" in here(capsys, "inspect", tmp_path / "routing.npy")[1]


# --- rows that are not finite ------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_rows_that_are_not_finite_are_counted(data):
    n, d = data.draw(st.integers(0, 40)), data.draw(st.integers(0, 5))
    dtype = data.draw(st.sampled_from(["f4", "f8", "f2", ml_dtypes.bfloat16, "i4"]))
    rows = np.full((n, d), 3, dtype)
    bad = set()
    if rows.size and dtype != "i4":
        bad = data.draw(st.sets(st.integers(0, n - 1)))
        for row in bad:
            value = data.draw(st.sampled_from([np.nan, np.inf, -np.inf]))
            rows[row, data.draw(st.integers(0, d - 1))] = value
        rows[data.draw(st.integers(0, n - 1)), 0] += np.finfo("f2").max / 2  # large, and finite
    if data.draw(st.booleans()):
        rows = np.asfortranarray(rows)
    assert count_not_finite(rows) == (len(bad), min(bad, default=-1))


def test_large_numbers_are_finite():
    rows = np.full((3, 2), 1e38, "f4")  # whose squares are not
    assert count_not_finite(rows) == (0, -1)
    assert count_not_finite(np.vstack([rows] * 200_000)) == (0, -1)
    rows[2, 1] = np.inf
    assert count_not_finite(np.vstack([rows] * 200_000)) == (200_000, 2)


@pytest.mark.slow
@pytest.mark.parametrize("where", [Threads(2), Processes(2)], ids=["threads", "processes"])
def test_a_run_tells_which_rows_are_not_finite(tmp_path, where):
    tokens = np.ones((N, 3), "f4")
    tokens[[7, 8, 15], [0, 1, 2]] = np.nan
    job = load_job(write_job(tmp_path, tokens=tokens))
    done = run_job(job, where, chunk_rows=5)
    assert (done.rows_done, done.not_finite, done.first_not_finite) == (N, 3, 7)


def test_the_command_says_so_at_the_end_and_not_without_cause(tmp_path, capsys):
    tokens = np.ones((N, 3), "f4")
    path = write_job(tmp_path, tokens=tokens)
    assert "NaN or infinity" not in here(capsys, "run", path)[1]
    tokens[7] = np.nan
    path = write_job(tmp_path, tokens=tokens)
    _, out, _ = here(capsys, "run", path, "--overwrite")
    assert "1 of the 20 rows computed hold NaN or infinity, the first is row 7" in out
