"""A layer that looks experts up by token takes the token ids as one more input of its job."""

from __future__ import annotations

from dataclasses import replace

import dask
import dask.array as da
import numpy as np
import pytest

from dask_ep import load_moe_layer, open_tokens
from dask_ep.jobs import run
from dask_ep.jobs.backends import Processes, Threads
from dask_ep.jobs.collect_job import collect_job
from dask_ep.jobs.compare import compare_checkpoints
from dask_ep.jobs.decide import decide
from dask_ep.jobs.job import load_job
from dask_ep.jobs.plan import plan_job
from dask_ep.jobs.run import run_job
from dask_ep.jobs.verify import verify_job
from dask_ep.laws.costs import Rates
from dask_ep.layers.collect import Wanted
from dask_ep.storage.sources import open_source
from tests.checkpoints import FIXTURES, LAYER, altered
from tests.graph.test_passes import passes_of

ROWS, VOCABULARY = 300, 16
RATES = Rates(flops=1e9, copy=1e9)


@pytest.fixture
def job(tmp_path):
    """A job of a layer with a table in the place of the router's selection bias."""
    rng, stem = np.random.default_rng(0), f"model.layers.{LAYER}.ffn.gate."
    table = np.stack([rng.permutation(8)[:3] for _ in range(VOCABULARY)])

    def hashed(tensors):
        rest = {name: array for name, array in tensors.items() if name != f"{stem}bias"}
        return rest | {f"{stem}tid2eid": table}

    directory = altered(tmp_path, "deepseek_v4", tensors=hashed)
    d = load_moe_layer(directory, LAYER).d
    np.save(tmp_path / "x.npy", rng.standard_normal((ROWS, d)).astype("f4"))
    np.save(tmp_path / "ids.npy", rng.integers(VOCABULARY, size=ROWS))
    return load_job(
        tokens=str(tmp_path / "x.npy"), token_ids=str(tmp_path / "ids.npy"),
        out=str(tmp_path / "y.npy"), layer=str(directory), layer_index=LAYER,
    )  # fmt: skip


def read(path):
    return open_tokens(path).compute(scheduler="sync")


def inputs(job):
    return tuple(da.from_array(np.load(path), chunks=-1) for path in (job.tokens, job.token_ids))


def routed(job):
    hidden, ids = inputs(job)
    return dask.compute(*load_moe_layer(job.layer, LAYER).route(hidden, token_ids=ids))


def check(job):
    hidden, ids = inputs(job)
    expected = load_moe_layer(job.layer, LAYER)(hidden, token_ids=ids).compute()
    np.testing.assert_allclose(read(job.out), expected, atol=1e-6 * np.abs(expected).max())


def test_rows_go_to_the_experts_of_their_tokens(job):
    run_job(job, Threads(2), chunk_rows=70)
    check(job)
    assert verify_job(job).good
    planned = plan_job(job, chunk_rows=70, rates=RATES)
    indices, _ = routed(job)
    assert planned.expert_rows.tolist() == np.bincount(indices.ravel(), minlength=8).tolist()


@pytest.mark.slow
def test_on_processes(job):
    run_job(job, Processes(2), chunk_rows=70)
    check(job)


@pytest.mark.parametrize("way", ["hold", "spill"])
def test_experts_in_passes_count_the_rows_of_the_same_routing(job, monkeypatch, way):
    passes = passes_of(way, group_chunks=2, threads=1)
    monkeypatch.setattr(
        run, "decide", lambda *args, **more: replace(decide(*args, **more), passes=passes)
    )
    run_job(job, Threads(1), chunk_rows=64)
    check(job)


def test_statistics_and_comparisons_take_them_too(job, tmp_path):
    collect_job(job, Wanted(("usage",)), str(tmp_path / "usage.safetensors"), Threads(1))
    usage = open_source(f"{tmp_path}/usage.safetensors::usage.rows").read(0, 8)
    assert usage.tolist() == np.bincount(routed(job)[0].ravel(), minlength=8).tolist()
    same = compare_checkpoints(job.layer, job.layer, job.tokens, LAYER, token_ids=job.token_ids)
    assert same.difference.largest == 0


def test_a_run_is_resumed_only_with_the_same_token_ids(job, stop_after):
    with pytest.raises(KeyboardInterrupt):
        run_job(job, Threads(1), chunk_rows=50, on_progress=stop_after(rows=100, blocks=6))
    np.save(job.token_ids, np.load(job.token_ids)[::-1].copy())
    with pytest.raises(ValueError, match="input token_ids"):
        run_job(job, Threads(1), resume=True)


def test_token_ids_that_are_missing_or_wrong_are_refused(job, tmp_path):
    def refused(message, **changes):
        with pytest.raises(ValueError, match=message):
            run_job(replace(job, **changes), Threads(1))

    refused("looks experts up by token: give token_ids", token_ids=None)
    refused("token_ids must be given only with .*; this job has no such layer",
            layer=str(FIXTURES / "deepseek_v4"))  # fmt: skip
    for name, array in {
        "short": np.zeros(3, int), "wide": np.zeros((ROWS, 1), int), "real": np.zeros(ROWS),
        "high": np.full(ROWS, VOCABULARY), "routing": np.zeros((ROWS, 3), int),
        "weights": np.ones((ROWS, 3), "f4"),
    }.items():  # fmt: skip
        np.save(tmp_path / f"{name}.npy", array)
    at = {name: str(tmp_path / f"{name}.npy") for name in ("short", "wide", "real", "high")}
    refused("token_ids must have a row for each of the 300 token rows", token_ids=at["short"])
    refused(r"token_ids must be \(n,\) integers, .* shape \(300, 1\)", token_ids=at["wide"])
    refused(r"token_ids must be \(n,\) integers, .* dtype float64", token_ids=at["real"])
    with pytest.raises(Exception, match=r"token ids must be in \[0, 16\)"):
        run_job(replace(job, token_ids=at["high"], out=f"{tmp_path}/z.npy"), Threads(1))
    given = {"routing": "routing", "topk_weights": "weights"}
    refused("this job has a routing",
            **{key: str(tmp_path / f"{name}.npy") for key, name in given.items()})  # fmt: skip
