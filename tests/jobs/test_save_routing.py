"""A run that saves its routing gives other jobs what they need to go the same way."""

from __future__ import annotations

from dataclasses import replace

import dask.array as da
import numpy as np
import pytest
from safetensors.numpy import load_file

from dask_ep import load_moe_layer, open_tokens
from dask_ep.errors import JobError
from dask_ep.jobs import run
from dask_ep.jobs.backends import Processes, Threads
from dask_ep.jobs.collect_job import collect_job
from dask_ep.jobs.decide import decide
from dask_ep.jobs.job import load_job
from dask_ep.jobs.plan import plan_job
from dask_ep.jobs.run import run_job
from dask_ep.jobs.save_routing import path_of_weights
from dask_ep.jobs.verify import verify_job
from dask_ep.laws.costs import Rates
from dask_ep.layers.collect import Wanted
from tests.checkpoints import FIXTURES, LAYER
from tests.compare import assert_close
from tests.graph.test_passes import passes_of

CHECKPOINT = FIXTURES / "qwen3_moe_fused"
ROWS = 300
RATES = Rates(flops=1e9, copy=1e9)


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


def test_a_stopped_run_resumes_its_routing_too(job, tmp_path, stop_after):
    saved, counted = str(tmp_path / "routing.npy"), []
    stop = stop_after(rows=100, blocks=7)
    with pytest.raises(KeyboardInterrupt):
        run_job(job, Threads(1), chunk_rows=50, save_routing=saved, on_progress=stop)
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


def with_routing(job, out, indices, weights=None):
    weights = weights or path_of_weights(indices)
    return replace(job, out=str(out), routing=str(indices), topk_weights=str(weights))


@pytest.mark.parametrize("case", ["qwen3_moe_fused", "deepseek_v3", "longcat_flash"])
def test_a_layer_goes_the_way_that_another_run_saved(tmp_path, case):
    layer = load_moe_layer(FIXTURES / case, LAYER)
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((ROWS, layer.d), "f4"))
    saved = tmp_path / "routing.npy"
    job = load_job(
        tokens=str(tmp_path / "x.npy"), out=str(tmp_path / "y.npy"), layer=str(FIXTURES / case),
        layer_index=LAYER,
    )  # fmt: skip
    run_job(job, Threads(1), chunk_rows=70, save_routing=saved)
    again = with_routing(job, tmp_path / "again.npy", saved)
    run_job(again, Threads(1), chunk_rows=70)
    np.testing.assert_array_equal(read(again.out), read(job.out))
    assert plan_job(again, chunk_rows=70, rates=RATES).tasks == 6
    turned = (np.load(saved) + 1) % layer.experts.num_experts  # where no router sends them
    weights = np.random.default_rng(1).random(turned.shape, dtype="f4")
    for name, array in {"turned": turned, "weights": weights}.items():
        np.save(tmp_path / f"{name}.npy", array)
    other = with_routing(
        job, tmp_path / "other.npy", tmp_path / "turned.npy", tmp_path / "weights.npy"
    )
    for where in (Threads(1), Threads(1, 10**9)):
        run_job(other, where, chunk_rows=70, overwrite=True)
        assert verify_job(other).good
    hidden, *given = (da.from_array(a, chunks=-1) for a in (read(job.tokens), turned, weights))
    want = layer(hidden, routing=tuple(given)).compute(scheduler="sync")
    assert_close(read(other.out), want, 1e-5)
    with pytest.raises(ValueError, match=r"inputs or settings have changed: .*routing"):
        run_job(replace(other, out=job.out), Threads(1), resume=True)


def test_statistics_of_a_layer_follow_a_saved_routing(job, tmp_path):
    saved, stats = tmp_path / "routing.npy", tmp_path / "stats.safetensors"
    run_job(job, Threads(1), save_routing=saved)
    np.save(saved, np.where(read(saved) == 0, -1, read(saved)))  # nobody goes to expert 0
    given = with_routing(job, tmp_path / "z.npy", saved)
    collect_job(given, Wanted(("usage", "amax")), stats, Threads(1))
    found = load_file(stats)
    want = np.bincount(read(saved)[read(saved) >= 0], minlength=len(found["usage.rows"]))
    np.testing.assert_array_equal(found["usage.rows"], want)
    assert (found["amax.input"][0] == 0).all()


@pytest.mark.parametrize("way", ["hold", "spill"])
@pytest.mark.parametrize("checkpoint", [CHECKPOINT, FIXTURES / "llama4"], ids=["qwen3", "llama4"])
def test_a_saved_routing_with_experts_in_passes(job, tmp_path, monkeypatch, way, checkpoint):
    job = replace(job, layer=str(checkpoint), layer_index=1)
    d = load_moe_layer(checkpoint, 1).d
    np.save(job.tokens, np.random.default_rng(0).standard_normal((ROWS, d)).astype("f4"))
    saved = tmp_path / "routing.npy"
    run_job(job, Threads(1), chunk_rows=64, save_routing=saved)
    passes = passes_of(way, group_chunks=2, threads=1)
    monkeypatch.setattr(
        run, "decide", lambda *args, **more: replace(decide(*args, **more), passes=passes)
    )
    again = with_routing(job, tmp_path / "again.npy", saved)
    run_job(again, Threads(1), chunk_rows=64)
    np.testing.assert_allclose(read(again.out), read(job.out), atol=1e-6)


def test_a_routing_that_a_layer_cannot_follow_is_refused(job, tmp_path):
    saved = tmp_path / "routing.npy"
    with pytest.raises(JobError, match="takes routing and topk_weights together.* only routing is"):
        replace(job, routing=str(saved))
    run_job(job, Threads(1), save_routing=saved)
    given = with_routing(job, tmp_path / "z.npy", saved)
    with pytest.raises(JobError, match=r"needs a layer that routes; .*routing\.npy already"):
        run_job(given, Threads(1), save_routing=tmp_path / "more.npy")
    np.save(tmp_path / "flat.npy", np.zeros(ROWS, int))
    with pytest.raises(ValueError, match=r"routing of a layer must be \(n, k\), but .* \(300,\)"):
        run_job(replace(given, routing=str(tmp_path / "flat.npy")), Threads(1))
    np.save(saved, np.load(saved)[:-1])
    with pytest.raises(ValueError, match="routing must have a row for each of the 300 token rows"):
        run_job(given, Threads(1))


def test_an_expert_that_no_router_knows_is_no_row_lost(tmp_path):
    layer = load_moe_layer(FIXTURES / "longcat_flash", LAYER)
    hidden = da.ones((4, layer.d), chunks=2, dtype="f4")
    indices = np.full((4, 2), layer.router.num_experts)
    indices[:3] = 0
    routing = (da.from_array(indices, chunks=2), da.ones((4, 2), chunks=2, dtype="f4"))
    with pytest.raises(ValueError, match=r"expert indices in \[-1, \d+\), but routing\[1, 0\] is"):
        layer(hidden, routing=routing).compute(scheduler="sync")


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
    with pytest.raises(JobError, match=r"needs a layer that routes.* is in .*r\.npy already"):
        run_job(given, Threads(1), save_routing=tmp_path / "s.npy")
    assert not list(tmp_path.glob("y.npy*"))
