"""A run's report says what was planned and what was done, on threads and on workers."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from distributed import LocalCluster

from dask_ep.arrays.blas import product
from dask_ep.arrays.memory import release
from dask_ep.cli import main
from dask_ep.jobs import price_job, run_report
from dask_ep.jobs.backends import Cluster, Processes, Threads
from dask_ep.jobs.example import Example, write_example
from dask_ep.jobs.job import load_job
from dask_ep.jobs.run import run_job
from dask_ep.laws.costs import PROCESS_BYTES, Rates
from dask_ep.pricing.price import Plan
from dask_ep.pricing.trace import Record
from tests.checkpoints import FIXTURES

pytestmark = pytest.mark.usefixtures("bokeh")


@pytest.fixture(autouse=True)
def known_rates(monkeypatch):
    """Measure this machine in no time."""
    monkeypatch.setattr(price_job, "probe", lambda *_, **__: Rates(flops=1e10, copy=1e9))


@pytest.fixture(scope="module")
def job_file(tmp_path_factory) -> Path:
    sizes = {"rows": 1000, "d": 32, "num_experts": 8, "k": 2, "chunk_rows": 100}
    return write_example(tmp_path_factory.mktemp("job"), Example(**sizes, format="npy"))


def run_recorded(job, where, **options) -> tuple[Plan, Record]:
    told = []
    other_bytes = memory_of_other_tests() if isinstance(where, Threads) else 0
    run_job(job, where, on_record=lambda *both: told.append(both), **options)
    planned, record = told[0]
    return planned, replace(record, peak_bytes=record.peak_bytes - other_bytes)


def memory_of_other_tests() -> int:
    """Bytes that this process holds beyond those that a plan counts for the process itself."""
    product(np.ones((512, 512), "f4"), np.ones((512, 512), "f4"))  # loads the library for the run
    release()  # as the recording of a run does first
    return max(psutil.Process().memory_info().rss - PROCESS_BYTES, 0)


def cells(path: Path) -> list[str]:
    return re.findall(r"<td>(.*?)</td>", path.read_text())


def check_counts(planned: Plan, record: Record) -> None:
    """Tasks, rows and bytes are exactly those planned, and memory is not more."""
    assert (record.tasks, record.repeated) == (planned.tasks, 0)
    received = dict(enumerate(planned.packet_rows.sum(axis=0).tolist()))
    assert record.received_rows() == received
    assert record.traffic_rows(planned.world_size).sum() == sum(received.values())
    homes = record.homes()
    workers = [homes[chunk] if planned.workers > 1 else 0 for chunk in range(len(planned.chunks))]
    assert record.exchanged_bytes == planned.exchanged_at(workers)
    assert 0 < record.peak_bytes <= planned.memory_bytes


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["contiguous", "balanced", "exact"])
def test_on_threads(job_file, tmp_path, placement):
    job = load_job(job_file, out=str(tmp_path / "y.npy"), world_size=4, placement=placement)
    report = tmp_path / "run.html"
    planned, record = run_recorded(job, Threads(2), chunk_rows=100, report=report)
    check_counts(planned, record)
    assert record.exchanged_bytes == planned.exchanged_bytes == 0
    assert planned.policy == placement
    found = cells(report)
    assert found[:3] == ["tasks", str(planned.tasks), str(record.tasks)]
    assert "No worker joined or left" in report.read_text()
    assert [p.name for p in tmp_path.glob("*.html")] == ["run.html"]
    for rank, rows in enumerate(planned.packet_rows.sum(axis=0).tolist()):
        at = found.index(f"{rank}", 15)
        assert found[at : at + 3] == [str(rank), f"{rows:,}", f"{rows:,}"]


@pytest.mark.slow
def test_on_workers(job_file, tmp_path):
    job = load_job(job_file, out=str(tmp_path / "y.npy"), world_size=4, placement="balanced")
    report = tmp_path / "run.html"
    where = Processes(2, memory_limit=2 << 30)
    planned, record = run_recorded(job, where, chunk_rows=100, report=report)
    check_counts(planned, record)
    assert record.traffic_rows(4).shape == (2, 4)
    assert record.exchanged_bytes > 0
    assert {(s.rank, record.workers().index(s.worker)) for s in record.services()} == {
        (rank, rank % 2) for rank in range(4)
    }
    assert (planned.workers, planned.threads, planned.memory_limit) == (2, 1, 2 << 30)
    text = report.read_text()
    assert '<a href="run-dask.html">' in text
    assert "ep_experts" in (tmp_path / "run-dask.html").read_text()
    assert "the limit is 2.00 GiB" in text


@pytest.mark.slow
def test_the_workers_of_a_cluster_share_its_ranks(job_file, tmp_path):
    job = load_job(job_file, out=str(tmp_path / "y.npy"), world_size=4)
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster:
        planned, record = run_recorded(job, Cluster(cluster.scheduler_address), chunk_rows=100)
    check_counts(planned, record)
    assert planned.workers == len(record.workers()) == 2
    assert planned.experts_of_a_worker == 4, "two for each of two ranks"


def test_a_resumed_run_is_compared_with_the_plan_of_what_was_left(job_file, tmp_path, stop_after):
    job = load_job(job_file, out=str(tmp_path / "y.npy"), world_size=2, placement="exact")
    with pytest.raises(KeyboardInterrupt):
        run_job(job, Threads(1), chunk_rows=100, on_progress=stop_after(rows=300, blocks=3))
    report = tmp_path / "run.html"
    planned, record = run_recorded(job, Threads(1), resume=True, report=report)
    left = len(planned.chunks)
    assert 0 < left <= 7
    check_counts(planned, record)
    assert planned.rows == 100 * left
    assert planned.expert_rows.sum() == planned.rank_rows.sum() == 200 * left
    assert f"it computed {left} of 10 chunks, and all figures are of these" in report.read_text()
    report.unlink()
    run_job(job, Threads(1), resume=True, report=report)
    assert not report.exists(), "nothing was run"


@pytest.mark.parametrize("chunk_rows", [50, 500])
def test_a_run_that_is_resumed_in_other_chunks_has_no_report(
    job_file, tmp_path, chunk_rows, stop_after
):
    job = load_job(job_file, out=str(tmp_path / "y.npy"), world_size=2)
    with pytest.raises(KeyboardInterrupt):
        run_job(job, Threads(1), chunk_rows=100, on_progress=stop_after(rows=300, blocks=3))
    report = tmp_path / "run.html"
    told = f"began with chunks of 100 rows, not {chunk_rows}: resume with those, or without"
    with pytest.raises(ValueError, match=told):
        run_job(job, Threads(1), resume=True, chunk_rows=chunk_rows, report=report)
    assert not report.exists()
    assert run_job(job, Threads(1), resume=True, chunk_rows=chunk_rows).rows == 1000
    run_job(job, Threads(1), resume=True, chunk_rows=chunk_rows, report=report)


def test_a_layer_with_router_and_shared_experts(tmp_path):
    hidden = np.random.default_rng(0).standard_normal((200, 32)).astype("f4")
    np.save(tmp_path / "x.npy", hidden)
    job = load_job(
        tokens=str(tmp_path / "x.npy"),
        out=str(tmp_path / "y.npy"),
        layer=str(FIXTURES / "qwen2_moe"),
        layer_index=1,
        world_size=3,
        placement="packed",
    )
    planned, record = run_recorded(job, Threads(1), chunk_rows=50, report=tmp_path / "run.html")
    check_counts(planned, record)
    assert planned.layer_flops > 0
    assert {"route", "layer", "experts", "ranks", "chunk"} <= {s.step for s in record.spans}
    assert record.finished()[-1][0] <= record.seconds


def test_the_command_tells_where_its_report_is(job_file, tmp_path, capsys):
    report, out = tmp_path / "run.html", tmp_path / "y.npy"
    with pytest.raises(SystemExit) as end:
        main.main(["run", str(job_file), "--out", str(out), "--report", str(report)])
    assert not end.value.code
    assert capsys.readouterr().out.endswith(f"report: {report}\n")
    assert report.exists()


def test_without_bokeh_nothing_is_begun(job_file, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bokeh.embed", None)
    job = load_job(job_file, out=str(tmp_path / "y.npy"))
    with pytest.raises(ImportError, match="pip install bokeh"):
        run_job(job, Threads(1), report=tmp_path / "run.html")
    assert not list(tmp_path.iterdir())


def test_a_report_that_cannot_be_written_is_refused_before_anything_is_read(job_file, tmp_path):
    job = load_job(job_file, out=str(tmp_path / "y.npy"))
    (tmp_path / "file").touch()
    for place, words in (("file/run.html", "cannot be written"), ("", "is a directory")):
        with pytest.raises(OSError, match=f"{words}.*choose another place"):
            run_job(job, Threads(1), report=tmp_path / place)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    run_job(job, Threads(1), report=tmp_path / "new" / "run.html")
    assert (tmp_path / "new" / "run.html").exists()


def test_the_output_has_its_name_before_the_report_is_written(job_file, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("no space")

    monkeypatch.setattr(run_report, "write_reports", fail)
    job = load_job(job_file, out=str(tmp_path / "y.npy"))
    with pytest.raises(OSError, match="no space"):
        run_job(job, Threads(1), report=tmp_path / "run.html")
    assert Path(job.out).exists()


@pytest.mark.slow
def test_a_report_of_experts_in_passes(tmp_path):
    """201 MB of experts within 50 MB besides the process."""
    sizes = {"rows": 300, "d": 256, "num_experts": 768, "k": 2}
    job = load_job(write_example(tmp_path, Example(**sizes, format="npy")))
    report = tmp_path / "run.html"
    planned, record = run_recorded(job, Threads(1, 348 << 20), report=report)
    assert planned.passes is not None
    assert record.peak_bytes <= planned.memory_bytes <= 348 << 20
    assert sum(s.step == "experts" for s in record.spans) > 1
    text = report.read_text()
    assert "experts per row, in passes" in text
    assert not any(word in text for word in ("ranks serve", "exchanged", "Between chunks"))
