"""Example data is what it says it is, behaves like real data, and costs bounded memory."""

from __future__ import annotations

import numpy as np
import pytest

from dask_ep.jobs.example import EXAMPLE_KINDS, FORMATS, Example, choose_experts, write_example
from dask_ep.jobs.example_text import PLACES, TokenRows, find_files
from dask_ep.jobs.job import load_job
from dask_ep.storage.sources import open_source

SMALL = {"rows": 700, "d": 16, "num_experts": 6, "k": 2, "chunk_rows": 256}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", EXAMPLE_KINDS)
def test_files_have_the_shapes_of_the_example(tmp_path, kind, format):
    example = Example(**SMALL, kind=kind, format=format, hidden=24)
    told = []
    path = write_example(tmp_path / "new", example, on_progress=lambda *p: told.append(p))
    job = load_job(path)
    assert open_source(job.tokens).shape == (700, 16)
    assert open_source(job.routing).shape == open_source(job.topk_weights).shape == (700, 2)
    shapes = {key: open_source(job.experts[key]).shape for key in example.matrices()}
    assert shapes == example.matrices()
    assert job.experts["kind"] == kind
    assert told[-1][0] == told[-1][1] == example.nbytes()


def test_the_same_example_gives_the_same_bytes_in_any_chunks(tmp_path):
    jobs = [
        load_job(write_example(tmp_path / str(rows), Example(**SMALL | {"chunk_rows": rows})))
        for rows in (64, 700)
    ]
    for key in ("tokens", "routing", "topk_weights"):
        one, other = (open_source(getattr(job, key)).read(0, 700) for job in jobs)
        close = np.testing.assert_array_equal if key == "tokens" else np.testing.assert_allclose
        close(one, other)


def test_routing_is_the_best_of_a_router_and_weights_sum_to_one(tmp_path):
    random = np.random.default_rng(0)
    logits = random.standard_normal((50, 9)).astype(np.float32)
    routing, weights = choose_experts(logits, 3)
    np.testing.assert_array_equal(routing, np.argsort(-logits, axis=1)[:, :3])
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-6)
    assert (np.diff(weights, axis=1) <= 0).all()


def test_some_experts_are_far_more_popular_than_others(tmp_path):
    job = load_job(write_example(tmp_path, Example(rows=5000, d=32, num_experts=16)))
    count = np.bincount(open_source(job.routing).read(0, 5000).ravel(), minlength=16)
    assert count.max() > 1.3 * count.mean(), "words are not equally frequent"
    assert np.count_nonzero(count) > 8


def test_rows_of_one_word_are_alike_but_not_equal():
    rows = np.empty((3 * PLACES, 64), np.float32)
    TokenRows(64, seed=1).fill(rows)
    assert len(np.unique(rows, axis=0)) > 0.95 * len(rows)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    alike = (unit @ unit.T > 0.97).sum(axis=1) - 1
    assert alike.max() > 20, "frequent words come again"


def test_the_text_begins_again_with_a_difference(monkeypatch, tmp_path):
    (tmp_path / "one.py").write_text("alpha beta gamma delta")
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    rows = np.empty((8, 256), np.float32)
    TokenRows(256, seed=0).fill(rows)
    first, second = rows[:4], rows[4:]
    assert not (first == second).all(axis=1).any()
    assert (np.corrcoef(np.vstack([first, second]))[:4, 4:].argmax(axis=1) == np.arange(4)).all()


def test_no_sources_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    with pytest.raises(FileNotFoundError, match="use a Python that is installed with its sources"):
        find_files()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"rows": 0}, "rows must be at least 1, but is 0"),
        ({"k": 17}, "k=17 slots cannot go to different ones of 16 experts"),
        ({"kind": "dense"}, "kind must be one of linear, gated, not 'dense'"),
        ({"format": "csv"}, "format must be one of zarr, npy, safetensors, not 'csv'"),
    ],
)
def test_sizes_that_make_no_sense(sizes, message):
    with pytest.raises(ValueError, match=message):
        Example(**sizes)


def test_nothing_is_overwritten_by_accident(tmp_path):
    write_example(tmp_path, Example(**SMALL))
    with pytest.raises(FileExistsError, match=r"already holds job\.toml, tokens\.zarr"):
        write_example(tmp_path, Example(**SMALL))
    path = write_example(tmp_path, Example(**SMALL | {"rows": 300}), overwrite=True)
    assert open_source(load_job(path).tokens).shape == (300, 16)


def test_what_is_no_example_is_not_overwritten(tmp_path):
    path = write_example(tmp_path, Example(**SMALL))
    path.write_text(path.read_text().partition("\n")[2])  # as somebody's own job
    with pytest.raises(FileExistsError, match=r"holds job\.toml of something else than an example"):
        write_example(tmp_path, Example(**SMALL), overwrite=True)
    path.unlink()  # as if the example was stopped
    (tmp_path / "tokens.zarr" / "zarr.json").unlink()
    with pytest.raises(FileExistsError, match=r"holds tokens\.zarr of something else than an ex"):
        write_example(tmp_path, Example(**SMALL), overwrite=True)
    assert (tmp_path / "w.zarr").exists()


def test_a_full_disk_is_found_first(tmp_path):
    with pytest.raises(OSError, match=r"the example needs [0-9.]+ PiB, but .* has .*iB free"):
        write_example(tmp_path / "a" / "b", Example(rows=10**13))
    assert not (tmp_path / "a").exists()
    path = write_example(tmp_path / "old", Example(**SMALL))
    with pytest.raises(OSError, match="ask for fewer rows"):
        write_example(tmp_path / "old", Example(rows=10**13), overwrite=True)
    assert open_source(load_job(path).tokens).shape == (SMALL["rows"], SMALL["d"])


def test_chunks_are_bounded_whatever_the_rows():
    assert Example(rows=10**9, d=4096).rows_per_chunk * 4096 * 4 <= 16 << 20
    assert 4 <= 50_000 / Example().rows_per_chunk <= 16
