"""A run that saves its routing gives other jobs what they need to go the same way."""

from __future__ import annotations

from dataclasses import replace

import dask.array as da
import numpy as np
import pytest

from dask_ep import load_moe_layer, open_tokens
from dask_ep.errors import JobError
from dask_ep.jobs import run
from dask_ep.jobs.backends import Processes, Threads
from dask_ep.jobs.decide import decide
from dask_ep.jobs.job import load_job
from dask_ep.jobs.run import run_job
from dask_ep.jobs.save_routing import path_of_weights
from tests.checkpoints import FIXTURES, LAYER
from tests.graph.test_passes import passes_of

CHECKPOINT = FIXTURES / "qwen3_moe_fused"
ROWS = 300


@pytest.fixture
def job(tmp_path):
    hidden = np.random.default_rng(0).standard_normal((ROWS, 32)).astype("f4")
    np.save(tmp_path / "x.npy", hidden)
    return load_job(
        tokens=str(tmp_path / "x.npy"),
        out=str(tmp_path / "y.npy"),
        layer=str(CHECKPOINT),
        layer_index=LAYER,
    )


def read(path):
    return open_tokens(path).compute(scheduler="sync")


def check(job, path):
    """The saved routing is that of the layer, and the output that of a run which saves none."""
    layer, hidden = load_moe_layer(CHECKPOINT, LAYER), da.from_array(read(job.tokens), chunks=-1)
    indices, weights = layer.route(hidden)
    found = read(path)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, indices.compute(scheduler="sync"))
    np.testing.assert_allclose(read(path_of_weights(path)), weights.compute(scheduler="sync"), 1e-6)
    expected = layer(hidden).compute(scheduler="sync")
    np.testing.assert_allclose(read(job.out), expected, atol=1e-6 * np.abs(expected).max())


@pytest.mark.slow
@pytest.mark.parametrize("where", [Threads(2), Processes(2)], ids=["threads", "processes"])
def test_another_job_reads_the_saved_routing(job, tmp_path, where):
    saved = str(tmp_path / "routing.zarr")
    run_job(job, where, chunk_rows=70, save_routing=saved)
    check(job, saved)
    weights = f"{CHECKPOINT}/model.safetensors::model.layers.{LAYER}.mlp.experts"
    again = load_job(
        tokens=job.tokens,
        routing=saved,
        topk_weights=path_of_weights(saved),
        experts={
            "kind": "gated_fused",
            "gate_up": f"{weights}.gate_up_proj",
            "down": f"{weights}.down_proj",
            "transposed": True,
        },
        out=str(tmp_path / "again.npy"),
    )
    run_job(again, where, chunk_rows=70)
    np.testing.assert_array_equal(read(again.out), read(job.out))


def stop_after(rows):
    def stop(progress):
        if progress.rows_done >= rows:
            raise KeyboardInterrupt

    return stop


def test_a_stopped_run_resumes_its_routing_too(job, tmp_path):
    saved, counted = str(tmp_path / "routing.npy"), []
    with pytest.raises(KeyboardInterrupt):
        run_job(job, Threads(1), chunk_rows=50, save_routing=saved, on_progress=stop_after(100))
    run_job(
        job, Threads(1), resume=True, save_routing=saved,
        on_progress=lambda progress: counted.append(progress.rows_in_all),
    )  # fmt: skip
    check(job, saved)
    assert set(counted) == {ROWS}, "rows of the routing are no rows of the output"


def test_the_routing_can_be_saved_after_the_output(job, tmp_path):
    saved = str(tmp_path / "routing.npy")
    run_job(job, Threads(1), chunk_rows=50)
    done = run_job(job, Threads(1), resume=True, save_routing=saved)
    assert (done.rows_done, done.rows) == (0, ROWS)
    check(job, saved)


@pytest.mark.parametrize("way", ["hold", "spill"])
def test_experts_in_passes(job, tmp_path, monkeypatch, way):
    passes = passes_of(way, group_chunks=2, threads=1)
    monkeypatch.setattr(
        run, "decide", lambda *args, **more: replace(decide(*args, **more), passes=passes)
    )
    saved = str(tmp_path / "routing.npy")
    run_job(job, Threads(1), chunk_rows=64, save_routing=saved)
    check(job, saved)


def test_what_cannot_be_saved_is_refused_before_anything_is_written(job, tmp_path):
    with pytest.raises(JobError, match=r"would write .*y\.npy, which is the output"):
        run_job(job, Threads(1), save_routing=job.out)
    (tmp_path / "r.topk_weights.npy").write_bytes(b"")
    with pytest.raises(FileExistsError, match=r"r\.topk_weights\.npy exists"):
        run_job(job, Threads(1), save_routing=tmp_path / "r.npy")
    np.save(tmp_path / "r.npy", np.zeros((ROWS, 1), int))
    np.save(tmp_path / "w.npy", np.ones((1, 32, 32), "f4"))
    given = load_job(
        tokens=job.tokens, out=job.out, routing=str(tmp_path / "r.npy"),
        experts=str(tmp_path / "w.npy"),
    )  # fmt: skip
    with pytest.raises(JobError, match=r"needs a layer.* is in .*r\.npy already"):
        run_job(given, Threads(1), save_routing=tmp_path / "s.npy")
    assert not list(tmp_path.glob("y.npy*"))
