"""Jobs with experts in passes: the same output, each expert read once a pass, and stopped
runs resume where they stopped."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path

import dask
import numpy as np
import pytest
import zarr
from click.testing import CliRunner
from distributed import LocalCluster

from dask_ep.cli.plan_command import plan_command
from dask_ep.errors import DoesNotFit
from dask_ep.graph import passes_memory, spill_files
from dask_ep.graph.spill_files import SpillFiles
from dask_ep.jobs import decide as decisions
from dask_ep.jobs import in_passes, run
from dask_ep.jobs.backends import Cluster, Processes, Threads
from dask_ep.jobs.build import open_inputs
from dask_ep.jobs.decide import decide
from dask_ep.jobs.example import Example, write_example
from dask_ep.jobs.in_passes import free_for_rows
from dask_ep.jobs.inspect import describe_output
from dask_ep.jobs.job import Job, load_job
from dask_ep.jobs.resumed_run import Begun
from dask_ep.jobs.run import run_job
from dask_ep.jobs.verify import verify_job
from dask_ep.laws.decision import Decision
from dask_ep.laws.memory_law import Layout
from dask_ep.laws.pass_blocks import PASSES_PROCESS_BYTES
from dask_ep.laws.passes import Passes
from dask_ep.laws.travel import Travel
from dask_ep.storage import output, sources
from dask_ep.storage.journal import read_done, read_manifest
from dask_ep.storage.output import progress_directory
from tests.checkpoints import FIXTURES, LAYER, expected
from tests.cluster_processes import DEADLINE, wait_until, worker_pids
from tests.cluster_processes import Cluster as RealCluster
from tests.graph.test_passes import passes_of
from tests.jobs.test_out_of_core import peak_of

ROOT = Path(__file__).parents[2]

ROWS, CHUNK_ROWS, EXPERTS = 900, 100, 12
WAYS = {
    "hold": passes_of("hold", passes=5, chunk_rows=CHUNK_ROWS, group_chunks=2),
    "spill": passes_of("spill", chunk_rows=CHUNK_ROWS, group_chunks=9, block_experts=2),
    "spill in groups": passes_of("spill", passes=3, chunk_rows=CHUNK_ROWS, group_chunks=3),
}


def taking(passes: Passes) -> Callable[..., Decision]:
    """Decide as a run does, but in passes although the experts would fit."""

    def decide_so(*args: object, begun: Begun | None = None, **asked: object) -> Decision:
        decision = decide(*args, begun=begun, **asked)
        if begun is not None:
            return decision
        return replace(decision, passes=passes, chunk_rows=passes.chunk_rows)

    return decide_so


def on_threads(threads: int, memory_limit: int) -> Layout:
    """So many threads of this process, which may use so many bytes."""
    return Layout(1, 1, threads, memory_limit, in_process=True)


class Stopped(Exception):
    """What stops a run in these tests."""


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> tuple[Job, np.ndarray]:
    """A job, and its output where all experts fit."""
    example = Example(
        rows=ROWS, d=32, num_experts=EXPERTS, k=2, kind="gated", chunk_rows=CHUNK_ROWS, format="npy"
    )
    job = load_job(write_example(tmp_path_factory.mktemp("job"), example))
    run_job(job, Threads(2))
    return job, np.load(job.out)


@pytest.fixture
def job(plain, tmp_path) -> Job:
    return replace(plain[0], out=str(tmp_path / "out.npy"))


@pytest.fixture(params=WAYS)
def passes(request, monkeypatch) -> Passes:
    """A way to go through the experts, taken although they would fit."""
    monkeypatch.setattr(run, "decide", taking(WAYS[request.param]))
    return WAYS[request.param]


@pytest.fixture
def spilling(monkeypatch) -> None:
    monkeypatch.setattr(run, "decide", taking(WAYS["spill in groups"]))


def spill_directories(job: Job) -> list[str]:
    return sorted(p.name for p in Path(progress_directory(job.out)).glob("spill-*"))


def alive(passes: Passes) -> int:
    """Blocks in memory at a time."""
    return passes.decoded + passes.ahead


def done_in(job: Job, group: int) -> bytes:
    """A byte for each task on a group's spilled rows, 1 if it is done; empty before there are."""
    found = Path(progress_directory(job.out)).glob(f"spill-*-{group}/done")
    return b"".join(path.read_bytes() for path in found)


def stop_after(rows: int):
    """Raise when so many rows are done, or work that is worth as many."""

    def look(progress: run.Progress) -> None:
        if progress.rows_done >= rows:
            raise Stopped

    return look


def assert_to_rounding(got: np.ndarray, want: np.ndarray) -> None:
    """The same but for the order of sums: to 1e-6 of the largest value."""
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6 * np.abs(want).max())


@pytest.mark.slow
def test_a_job_in_passes_gives_the_ordinary_output(plain, job, passes):
    told = []
    records = []
    done = run_job(
        job,
        Threads(2),
        on_progress=told.append,
        on_record=lambda *planned_and_record: records.append(planned_and_record),
    )
    assert_to_rounding(np.load(job.out), plain[1])
    assert verify_job(job).good
    assert (done.rows_done, done.rows) == (ROWS, ROWS)
    spilled = 0 if passes.way == "hold" else ROWS * 2 * (32 + 32) * 4
    assert done.passes.spilled_bytes == spilled
    assert f"{passes.passes * EXPERTS} experts were read in passes" in str(done.passes)
    rows = [progress.rows_done for progress in told]
    assert rows == sorted(rows)
    assert len(set(rows)) > len(range(0, ROWS, CHUNK_ROWS)), (
        "progress between blocks is reported too"
    )
    assert spill_directories(job) == []
    ((planned, record),) = records
    assert planned.passes == passes
    assert record.repeated == 0
    # Dask gives the key of a collection to its only task, so that a group of one chunk has none.
    assert {chunk for _, chunk in record.finished()} >= set(range(ROWS // CHUNK_ROWS - 1))
    if passes.way == "hold":
        assert planned.tasks - 1 <= record.tasks <= planned.tasks
    assert {span.step for span in record.spans} >= {"send", "experts", "dispatch"}


@pytest.mark.slow
def test_a_report_of_a_run_in_passes_and_of_one_that_went_on(job, passes):
    report = Path(f"{job.out}.html")
    with pytest.raises(Stopped):
        run_job(job, Threads(2), on_progress=stop_after(400), report=report)
    run_job(job, Threads(2), resume=True, report=report)
    said = report.read_text()
    assert "No worker joined or left, no rank moved, and nothing was computed twice." in said
    went_on = passes is not WAYS["spill"]  # of which no block was done
    assert ("This run resumed an earlier one" in said) == went_on


def test_each_expert_is_read_once_a_pass(monkeypatch, job, passes):
    read = Counter()
    plain_read = sources.Region.read

    def counted(self, start, stop, out=None):
        if self.name == "gate.npy":
            read[start] += 1
        return plain_read(self, start, stop, out)

    monkeypatch.setattr(sources.Region, "read", counted)
    done = run_job(job, Threads(2))
    assert set(read) == set(range(EXPERTS))
    assert set(read.values()) == {passes.passes}
    assert done.passes.reads == dict.fromkeys(range(EXPERTS), passes.passes)
    assert done.passes.passes == passes


@pytest.mark.slow
@pytest.mark.parametrize("rows", range(0, ROWS, 300))
def test_a_stopped_run_is_resumed_to_the_same_bits(monkeypatch, job, passes, rows):
    undisturbed = replace(job, out=f"{job.out}.whole.npy")
    run_job(undisturbed, Threads(2))
    with pytest.raises(Stopped):
        run_job(job, Threads(2), on_progress=stop_after(rows))
    assert not os.path.exists(job.out)
    monkeypatch.setattr(decisions, "choose_passes", None)  # what was chosen is kept
    done = run_job(job, Threads(2), resume=True)
    np.testing.assert_array_equal(np.load(job.out), np.load(undisturbed.out))
    assert done.rows_before + done.rows_done == ROWS
    assert spill_directories(job) == []
    if passes.way == "spill":
        # A block of experts that was being read when the run stopped is read again, and no more.
        again = sum(done.passes.reads.values()) - passes.passes * EXPERTS
        assert 0 <= again <= alive(passes) * passes.block_experts


def test_what_waits_is_kept_where_no_output_is_done_yet(monkeypatch, job):
    monkeypatch.setattr(run, "decide", taking(WAYS["spill"]))  # all chunks in one group
    with pytest.raises(Stopped):
        run_job(job, Threads(2), on_progress=stop_after(ROWS // 2))
    directory = progress_directory(job.out)
    assert read_done(directory, read_manifest(directory)["run"]) == set()
    told = re.fullmatch(
        r"incomplete, 0 of \d+ blocks are done, (\d+) experts were processed in passes so far",
        describe_output(job.out),
    )
    assert told is not None
    assert 0 < int(told[1]) <= EXPERTS
    before, after = sum(done_in(job, 0)), []
    assert before > ROWS // CHUNK_ROWS, "experts have served rows"
    run_job(job, Threads(2), resume=True, on_progress=lambda _: after.append(sum(done_in(job, 0))))
    assert after[0] == before


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """Two workers of two threads in this process, as an existing scheduler."""
    with LocalCluster(
        n_workers=2,
        threads_per_worker=2,
        processes=False,
        protocol="tcp",
        dashboard_address=":0",
        memory_limit=10**9,
    ) as workers:
        yield Cluster(workers.scheduler_address)


def test_a_run_with_rows_in_memory_is_not_resumed_by_workers(monkeypatch, job, cluster):
    monkeypatch.setattr(run, "decide", taking(WAYS["hold"]))
    with pytest.raises(Stopped):
        run_job(job, Threads(1), on_progress=stop_after(300))
    with pytest.raises(ValueError, match="holds rows in memory, which only threads share: resume"):
        run_job(job, cluster, resume=True)
    assert run_job(job, Threads(1), resume=True).rows == ROWS


def test_a_run_in_passes_is_not_resumed_where_its_memory_would_be_exceeded(job, monkeypatch):
    passes = replace(WAYS["spill"], memory_bytes=500 * 10**6)
    monkeypatch.setattr(run, "decide", taking(passes))
    with pytest.raises(Stopped):
        run_job(job, Threads(2), on_progress=stop_after(100))
    for where, more, told in (
        (Threads(3), {}, "2 threads, but the process has 3: resume with --threads 2, or overwrite"),
        (Threads(2, 499 * 10**6), {}, "up to 500 MB, but the process may use 499 MB: resume with"),
        (Threads(2), {"chunk_rows": 20}, "has chunks of 100 rows, not 20: resume with those"),
    ):
        with pytest.raises(ValueError, match=told):
            run_job(job, where, resume=True, **more)
    done = run_job(job, Threads(2, 500 * 10**6), resume=True, chunk_rows=CHUNK_ROWS)
    assert done.rows == ROWS


def test_a_run_in_passes_is_resumed_with_its_threads_where_there_are_more(job, monkeypatch):
    monkeypatch.setattr(run, "decide", taking(WAYS["hold"]))
    with pytest.raises(Stopped):
        run_job(job, Threads(2), on_progress=stop_after(100))
    monkeypatch.setattr(run, "CPU_COUNT", 8)
    assert run_job(job, resume=True).rows == ROWS


def test_a_complete_run_in_passes_is_resumed_anywhere(job, monkeypatch, cluster):
    monkeypatch.setattr(run, "decide", taking(WAYS["hold"]))
    run_job(job, Threads(2))
    for where in (Threads(3), cluster):
        assert run_job(job, where, resume=True).rows_before == ROWS
    os.remove(job.out)  # so that it is made again
    with pytest.raises(ValueError, match="resume with --threads 2"):
        run_job(job, Threads(3), resume=True)


def test_workers_fill_the_part_of_their_memory_that_dask_leaves(job, monkeypatch, cluster):
    passes = replace(WAYS["spill"], memory_bytes=701 * 10**6)
    monkeypatch.setattr(run, "decide", taking(passes))
    with pytest.raises(Stopped):
        run_job(job, Threads(2), on_progress=stop_after(100))
    with pytest.raises(ValueError, match="up to 701 MB, but each worker may use 700 MB: resume"):
        run_job(job, cluster, resume=True)


def test_the_layout_of_a_cluster_is_that_of_its_workers(monkeypatch, job, cluster):
    layouts = []
    monkeypatch.setattr(
        run, "decide", lambda *args, **asked: layouts.append(args[1]) or decide(*args, **asked)
    )
    run_job(replace(job, world_size=4), cluster)
    assert layouts == [Layout(4, workers=2, threads=2, memory_limit=10**9, ranks_given=True)]


def test_a_run_whose_rows_travelled_is_resumed_in_the_same_way(job, cluster):
    job = replace(job, world_size=2)
    with pytest.raises(Stopped):
        run_job(job, Threads(1), chunk_rows=CHUNK_ROWS, on_progress=stop_after(100))
    run_job(job, cluster, resume=True, travel=Travel("experts"))
    assert read_manifest(progress_directory(job.out))["settings"]["placement"] is None


@pytest.mark.slow
def test_a_task_that_outlives_its_run_says_nothing_of_the_run_that_overwrites_it(
    monkeypatch, plain, job, cluster
):
    monkeypatch.setattr(run, "decide", taking(WAYS["spill"]))
    calls, late, begun_again = count(), threading.Event(), threading.Event()
    write, create = SpillFiles.write_rows, SpillFiles.create

    def write_late(files, place, rows):
        write(files, place, rows)
        if next(calls) == 30:  # in the midst of a chunk
            late.set()
            assert begun_again.wait(DEADLINE)

    def create_meanwhile(files, *sizes):
        create(files, *sizes)
        if late.is_set():
            begun_again.set()
            time.sleep(0.3)  # the late task continues

    monkeypatch.setattr(SpillFiles, "write_rows", write_late)
    monkeypatch.setattr(SpillFiles, "create", create_meanwhile)

    def stop(_: run.Progress) -> None:
        if late.is_set():
            raise Stopped

    with pytest.raises(Stopped):
        run_job(job, cluster, on_progress=stop)
    run_job(job, cluster, overwrite=True)
    assert_to_rounding(np.load(job.out), plain[1])


def test_what_is_spilled_survives_for_resume_and_goes_with_overwrite(job, spilling):
    with pytest.raises(Stopped):
        run_job(job, Threads(2), on_progress=stop_after(100))
    assert len(spill_directories(job)) == 1
    Path(progress_directory(job.out), "spill-of-another-place-0").mkdir()
    with pytest.raises(FileExistsError):
        run_job(job, Threads(2))
    with pytest.raises(Stopped):
        run_job(job, Threads(2), overwrite=True, on_progress=stop_after(0))
    assert spill_directories(job) == []
    Path(progress_directory(job.out), "spill-of-another-place-0").mkdir()
    run_job(job, Threads(2), resume=True)
    assert spill_directories(job) == []


def test_a_full_disk_is_an_error_before_any_work(monkeypatch, job, spilling):
    def full(file, offset, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(spill_files.os, "posix_fallocate", full)
    told = []
    needed = 3 * CHUNK_ROWS * 2 * (32 + 32) * 4  # and a byte for each task
    with pytest.raises(OSError, match=rf"of .*out.npy need {needed // 100}\d\d bytes .* are free"):
        run_job(job, Threads(2), on_progress=told.append)
    assert told[-1].rows_done == 0
    assert spill_directories(job) == []


FILLS_ITS_DISK = """
import errno, os, shutil, subprocess, sys
from dask_ep.jobs import backends, run
from dask_ep.jobs.job import load_job
from tests.graph.test_spill import WAYS, spill_directories, taking
disk, out = os.path.dirname(sys.argv[2]), sys.argv[2]
os.mkdir(disk)
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160k", "none", disk], check=True)
run.decide = taking(WAYS["spill in groups"])
job = load_job(sys.argv[1], out=out)
try:
    run.run_job(job, backends.Threads(2))
except OSError as error:
    assert error.errno == errno.ENOSPC
    print(error)
assert spill_directories(job) == [] and not os.path.exists(out)
subprocess.run(["mount", "-o", "remount,size=8m", disk], check=True)
print(run.run_job(job, backends.Threads(2), resume=True).rows_done)
shutil.move(out, sys.argv[3])
"""

MOUNTS = ["unshare", "--mount", "--map-root-user"]
"""A command in which a file system can be mounted that nobody else sees."""


def can_mount(folder: Path) -> bool:
    try:
        tried = ["mount", "-t", "tmpfs", "none", str(folder)]
        return subprocess.run([*MOUNTS, *tried], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_on_a_small_disk_the_error_says_what_is_missing_and_resume_continues(plain, job, tmp_path):
    if not can_mount(tmp_path):
        pytest.skip("a file system of its own may not be mounted here")
    job = replace(job, out=str(tmp_path / "disk" / "out.npy"))
    moved = tmp_path / "moved.npy"
    command = [*MOUNTS, sys.executable, "-c", FILLS_ITS_DISK, job.name, job.out, str(moved)]
    said = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert said.returncode == 0, said.stderr
    needed = 3 * CHUNK_ROWS * 2 * (32 + 32) * 4
    place = rf"{tmp_path}/disk/out.npy.progress/spill-\w+-0"
    told = re.search(rf"need (\d+) bytes in {place}, .* but (\d+) are free", said.stdout)
    assert needed < int(told[1]) < needed + 1000, "a byte for each task"
    assert 0 < int(told[2]) < 160 << 10
    assert said.stdout.endswith(f"\n{ROWS}\n")
    assert_to_rounding(np.load(moved), plain[1])


TOO_LARGE_FILES = """
import resource, sys
from dask_ep.jobs import backends, run
from dask_ep.jobs.job import load_job
from tests.graph.test_spill import WAYS, taking
resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, resource.RLIM_INFINITY))
run.decide = taking(WAYS["spill"])
run.run_job(load_job(sys.argv[1], out=sys.argv[2]), backends.Threads(2))
"""


@pytest.mark.slow
def test_files_beyond_the_size_limit_are_an_error_and_resume_continues(plain, job, monkeypatch):
    command = [sys.executable, "-c", TOO_LARGE_FILES, job.name, job.out]
    failed = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    needed = ROWS * 2 * (32 + 32) * 4
    told = re.search(r"need (\d+) bytes in .* \(File too large\)", failed.stderr)
    assert needed < int(told[1]) < needed + 1000, "a byte for each task"
    assert spill_directories(job) == []
    monkeypatch.setattr(decisions, "choose_passes", None)  # what was chosen is kept
    assert run_job(job, Threads(2), resume=True).rows_done == ROWS
    assert_to_rounding(np.load(job.out), plain[1])


def test_a_disk_without_room_for_the_output_as_well_is_full_too(monkeypatch, job, spilling):
    monkeypatch.setattr(spill_files, "free_bytes", lambda _: 1000)
    with pytest.raises(OSError, match=f"and the output {3 * CHUNK_ROWS * 32 * 4}, but 1000 are"):
        run_job(job, Threads(2))
    assert spill_directories(job) == []


def test_a_routing_that_changes_under_the_run_is_an_error(plain, job, spilling):
    with pytest.raises(Stopped):
        run_job(job, Threads(2), on_progress=stop_after(100))
    routing = np.load(plain[0].routing)
    changed = replace(job, routing=f"{job.out}.routing.npy")
    np.save(changed.routing, routing[::-1])
    with pytest.raises(ValueError, match="input routing"):
        run_job(changed, Threads(2), resume=True)


def test_experts_that_fit_go_the_ordinary_way(plain, job):
    done = run_job(job, Threads(2, memory_limit=10**9))
    assert done.passes is None
    np.testing.assert_array_equal(np.load(job.out), plain[1])


@pytest.mark.parametrize(
    "case", ["qwen2_moe", "llama4", "deepseek_v3_fp8", "gpt_oss_mxfp4", "granitemoe"]
)
def test_layers_of_checkpoints_go_in_passes_too(tmp_path, monkeypatch, case):
    hidden = expected(case)["hidden"]
    np.save(tmp_path / "x.npy", hidden.reshape(-1, hidden.shape[-1]))
    layer = {"layer": str(FIXTURES / case), "layer_index": LAYER}
    job = load_job(tokens=str(tmp_path / "x.npy"), out=str(tmp_path / "y.npy"), **layer)
    plain = replace(job, out=str(tmp_path / "plain.npy"))
    run_job(plain, Threads(2), chunk_rows=7)
    passes = passes_of("spill", passes=2, chunk_rows=7, group_chunks=2)
    monkeypatch.setattr(run, "decide", taking(passes))
    done = run_job(job, Threads(2))
    want = np.load(plain.out)
    assert_to_rounding(np.load(job.out), want)
    assert set(done.passes.reads.values()) <= {1, 2}


@pytest.mark.slow
def test_worker_processes_share_the_files(plain, job, spilling):
    done = run_job(job, Processes(2))
    assert_to_rounding(np.load(job.out), plain[1])
    assert done.passes.reads == dict.fromkeys(range(EXPERTS), 3)
    assert spill_directories(job) == []


@pytest.mark.slow
def test_a_worker_keeps_the_blocks_that_the_graph_lets_in(job, spilling):
    loaded = open_inputs(job).experts.parameters * 4
    target = 1.5 * loaded / 10**9  # of the memory: less than the two blocks that there are
    with (
        dask.config.set({"distributed.worker.memory.target": target}),
        LocalCluster(
            n_workers=1,
            threads_per_worker=1,
            processes=False,
            protocol="tcp",
            dashboard_address=":0",
            memory_limit=10**9,
        ) as workers,
    ):
        done = run_job(job, Cluster(workers.scheduler_address))
    assert done.passes.reads == dict.fromkeys(range(EXPERTS), 3)


def fill_disk_after(blocks: int, monkeypatch: pytest.MonkeyPatch, job: Job) -> list[int]:
    """Run a job on a disk that takes so many blocks, and give their numbers."""
    store_block, written = output._store_block, []

    def fail_later(rows, of, span):
        if len(written) == blocks:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(span[0])
        return store_block(rows, of, span)

    with monkeypatch.context() as patch:
        patch.setattr(output, "_store_block", fail_later)
        with pytest.raises(OSError, match="No space left"):
            run_job(job, Threads(1))
    return written


def lose_block(job: Job, block: int) -> None:
    (file,) = Path(progress_directory(job.out)).glob(f"partial-*.zarr/c.{block}.0")
    file.unlink()


@pytest.mark.parametrize("lost", [False, True])
def test_chunks_that_are_done_are_not_held_again(monkeypatch, job, lost):
    held = passes_of("hold", chunk_rows=CHUNK_ROWS, group_chunks=9, threads=1, stored_rows=100)
    monkeypatch.setattr(run, "decide", taking(held))
    job = replace(job, out=job.out.replace(".npy", ".zarr"))
    undisturbed = replace(job, out=f"{job.out}.whole.zarr")
    run_job(undisturbed, Threads(1))
    written, begun = fill_disk_after(4, monkeypatch, job), []
    if lost:
        lose_block(job, written[0])
    hold_chunk = passes_memory._hold
    monkeypatch.setattr(
        passes_memory, "_hold", lambda *args: begun.append(args[5]) or hold_chunk(*args)
    )
    run_job(job, Threads(1), resume=True)
    assert sorted(begun + written[lost:]) == list(range(9))
    np.testing.assert_array_equal(zarr.open_array(job.out)[:], zarr.open_array(undisturbed.out)[:])


def test_chunks_that_are_lost_are_served_after_the_others_and_take_no_more_experts(
    monkeypatch, job
):
    held = passes_of("hold", chunk_rows=CHUNK_ROWS, group_chunks=9, ahead=0, stored_rows=CHUNK_ROWS)
    monkeypatch.setattr(run, "decide", taking(held))
    job = replace(job, out=job.out.replace(".npy", ".zarr"))
    written = fill_disk_after(4, monkeypatch, job)
    lose_block(job, written[0])
    # Lost only after it was looked for; what is found to be lost counts as never done.
    monkeypatch.setattr(
        "dask_ep.jobs.resumed_run.find_good",
        lambda out, found: read_done(progress_directory(out), found["run"]),
    )
    serve, served = passes_memory._serve_held, []

    def noted(chunk, *args):
        served.append(chunk.chunk)
        time.sleep(0.002)  # so that the other thread begins what it may
        return serve(chunk, *args)

    monkeypatch.setattr(passes_memory, "_serve_held", noted)
    run_job(job, Threads(2), resume=True)
    again = [chunk in written for chunk in served]
    assert set(again) == {False, True}
    assert again == sorted(again)
    assert verify_job(job).good


def test_chunks_of_more_rows_than_there_are_mean_all_of_them_in_passes_too(tmp_path):
    path = write_large_job(tmp_path, 2000)
    arguments = [str(path), "--threads", "1", "--memory-limit", "380MB", "--json"]
    rates = ["--rates", "flops=1e10,copy=1e9"]
    planned = CliRunner().invoke(plan_command, [*arguments, *rates, "--chunk-rows", "1000000"])
    assert planned.exit_code == 0, planned.exception
    done = run_job(load_job(path), Threads(1, 380 * 10**6), chunk_rows=10**6)
    assert done.passes.passes.chunk_rows == json.loads(planned.stdout)["chunk_rows"] == 2000


def test_what_an_overwritten_run_left_unfinished_makes_room_for_rows_that_wait(
    monkeypatch, tmp_path
):
    job = load_job(write_large_job(tmp_path, 14_000))
    inputs, layout = open_inputs(job), on_threads(2, 410 * 10**6)

    def choose(**asked: object) -> Passes:
        return decide(inputs.work(), layout, travel=Travel("rows"), **asked).passes

    needed = choose().spill_bytes
    monkeypatch.setattr(in_passes, "free_bytes", lambda _: 14_000 * 512 * 4)
    with pytest.raises(DoesNotFit, match="0 MB are free there"):
        choose(free=partial(free_for_rows, inputs))
    Path(progress_directory(job.out), "spill-x-0").mkdir(parents=True)
    with open(f"{progress_directory(job.out)}/spill-x-0/rows", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, needed + needed // 4)
    np.save(job.out, np.ones(needed, np.uint8))  # which stays until the new output is complete
    assert choose(free=partial(free_for_rows, inputs)).passes == 1


def test_large_chunks_that_are_held_are_stored_in_small_ones(monkeypatch, plain, job):
    held = passes_of("hold", passes=2, chunk_rows=300, group_chunks=2, stored_rows=100)
    monkeypatch.setattr(run, "decide", taking(held))
    job = replace(job, out=job.out.replace(".npy", ".zarr"))
    with pytest.raises(Stopped):
        run_job(job, Threads(2), on_progress=stop_after(600))
    run_job(job, Threads(2), resume=True)
    out = zarr.open_array(job.out)
    assert out.chunks == (100, 32)
    assert_to_rounding(out[:], plain[1])


# --- killed --------------------------------------------------------------------------------------

SLOW_RUN = """
import sys, time
from dask_ep.jobs import backends, run
from dask_ep.graph import passes_disk
from dask_ep.jobs.job import load_job
from tests.graph.test_spill import WAYS, taking
plain = passes_disk._serve_run
passes_disk._serve_run = lambda *args: (time.sleep(0.02), plain(*args))[1]
run.decide = taking(WAYS["spill in groups"])
run.run_job(load_job(sys.argv[1], out=sys.argv[2]), backends.Threads(2))
"""


def reads_too_many(done: run.Progress) -> int:
    return sum(done.passes.reads.values()) - done.passes.passes.passes * EXPERTS


@pytest.mark.slow
def test_after_kill_9_a_resumed_run_computes_only_what_is_missing(plain, job, spilling):
    undisturbed = replace(job, out=f"{job.out}.whole.npy")
    run_job(undisturbed, Threads(2))
    command = [sys.executable, "-c", SLOW_RUN, job.name, job.out]
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}) as process:
        try:
            wait_until(lambda: sum(done_in(job, 1)) > 10, "pieces are done")
        finally:
            process.send_signal(signal.SIGKILL)
    served = sum(done_in(job, 1))
    done = run_job(job, Threads(2), resume=True)
    np.testing.assert_array_equal(np.load(job.out), np.load(undisturbed.out))
    assert done.rows_before == 3 * CHUNK_ROWS
    assert served > 10
    assert 0 <= reads_too_many(done) <= alive(WAYS["spill in groups"])
    assert spill_directories(job) == []


@pytest.mark.slow
def test_a_killed_worker_costs_only_what_it_had_in_memory(plain, job, spilling):
    undisturbed = replace(job, out=f"{job.out}.whole.npy")
    run_job(undisturbed, Threads(2))
    victims = []

    def kill(progress: run.Progress) -> None:
        if victims and progress.rows_done > 150:
            os.kill(victims.pop(), signal.SIGKILL)

    done = run_job(
        job,
        Processes(2),
        on_client=lambda client: victims.append(worker_pids(client)["1"]),
        on_progress=kill,
    )
    assert victims == []
    np.testing.assert_array_equal(np.load(job.out), np.load(undisturbed.out))
    # Blocks are lost with the worker, and move back when another one takes its place.
    assert 0 <= reads_too_many(done) <= 3 * alive(WAYS["spill in groups"])
    assert spill_directories(job) == []


# --- within the memory limit ---------------------------------------------------------------------


def write_large_job(folder: Path, rows: int, experts: int = 256) -> Path:
    """Linear experts of 1 MB in float32, half of that in their file; mostly empty tokens."""
    d = 512
    tokens = np.lib.format.open_memmap(folder / "tokens.npy", "w+", np.float32, (rows, d))
    tokens[-1] = 1
    routing = np.random.default_rng(0).integers(0, experts, rows, dtype=np.int32)
    w = np.lib.format.open_memmap(folder / "w.npy", "w+", np.float16, (experts, d, d))
    w[:] = np.arange(experts, dtype=np.float16)[:, None, None] / 256
    del tokens, w
    np.save(folder / "routing.npy", routing)
    (folder / "job.toml").write_text(
        'tokens = "tokens.npy"\nrouting = "routing.npy"\nout = "out.npy"\n'
        'experts = {kind = "linear", w = "w.npy"}\n'
    )
    return folder / "job.toml"


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "limit", "way"), [(60_000, 410, "spill"), (14_000, 480, "hold")])
def test_peak_memory_of_the_process_tree_is_within_the_limit(tmp_path, rows, limit, way):
    job = write_large_job(tmp_path, rows)
    command = [sys.executable, "-m", "dask_ep", "run", str(job), "--threads", "2"]
    peak = peak_of([*command, "--memory-limit", f"{limit}MB"])
    assert peak <= limit * 10**6 < PASSES_PROCESS_BYTES + 256 * 512 * 512 * 4, (
        "all experts do not fit"
    )
    manifest = read_manifest(progress_directory(load_job(job).out))
    assert manifest["settings"]["passes"]["way"] == way
    expert = int(np.load(tmp_path / "routing.npy")[-1])
    out = np.load(tmp_path / "out.npy", mmap_mode="r")
    np.testing.assert_allclose(out[-1], 512 * expert / 256, rtol=1e-6)
    assert not out[:100].any()


@pytest.mark.slow
def test_plan_shows_the_passes_and_refuses_only_what_does_not_fit_in_any(tmp_path):
    job = write_large_job(tmp_path, 60_000)

    def plan(limit: str, *options: str) -> str:
        arguments = [str(job), "--threads", "2", "--memory-limit", limit, *options]
        result = CliRunner().invoke(plan_command, arguments)
        said = result.stdout if "--json" in options else result.output
        return f"{said} {result.exception or ''}"

    content = json.loads(plan("410 MB", "--json"))
    said = " ".join(content["advice"])
    assert "the experts do not fit, so rows of 10 chunks at a time are spilled to disk" in said
    assert "234.38 MiB of disk next to the output while it runs" in said
    chosen = decide(open_inputs(load_job(job)).work(), on_threads(2, 410 * 10**6)).passes
    assert content["passes"] == vars(chosen)
    assert content["memory_bytes"] == chosen.memory_bytes <= content["memory_limit"]
    assert content["fits"]
    assert content["stored_bytes"] == 256 * 512 * 512 * 2
    shown = plan("410 MB", "--placement", "balanced", "--world-size", "4")
    assert "runs on" in shown
    assert not any(word in shown for word in ("replicas", "rank"))
    refused = plan("350 MB")
    assert "It does not fit with experts in passes either: a process may use 350 MB" in refused


@pytest.mark.parametrize(
    ("travel", "way"), [("rows", "spill"), ("experts", "hold"), ("auto", "hold"), (None, "hold")]
)
def test_what_travels_is_asked_for_in_passes_too(tmp_path, travel, way):
    inputs = open_inputs(load_job(write_large_job(tmp_path, 14_000)))
    rates = (Travel.read, Travel.read / 10)
    chosen, slower = (
        decide(inputs.work(), on_threads(2, 480 * 10**6), travel=Travel(travel, read=read)).passes
        for read in rates
    )
    assert (chosen.way, slower.way) == (way, way)
    assert chosen.seconds < slower.seconds


def test_experts_cannot_travel_to_rows_that_wait_on_disk(tmp_path):
    large = load_job(write_large_job(tmp_path, 14_000))
    tokens = tmp_path / "hidden.npy"
    hidden = expected("llama4")["hidden"]
    np.save(tokens, hidden.reshape(-1, hidden.shape[-1]))
    layer = load_job(
        tokens=str(tokens), out=large.out, layer=str(FIXTURES / "llama4"), layer_index=LAYER
    )
    told = "travel must be rows or auto, .* held in memory, which needs threads"
    with pytest.raises(ValueError, match=told):
        decide(open_inputs(large).work(), Layout(2, 2, 1, 320 * 10**6), travel=Travel("experts"))
    with pytest.raises(ValueError, match=told):
        decide(open_inputs(layer).work(), on_threads(2, 180_000_001), travel=Travel("experts"))


def test_on_threads_travel_is_for_experts_that_do_not_fit(job):
    with pytest.raises(ValueError, match="nothing travels between them"):
        run_job(job, Threads(2), travel=Travel("auto"))


@pytest.mark.slow
def test_on_a_cluster_the_memory_of_its_workers_decides(tmp_path):
    job = load_job(write_large_job(tmp_path, 5_000, experts=384))
    options = ("--memory-limit", "560MB")
    with RealCluster(tmp_path, ["w0"], worker_options=options) as cluster:
        cluster.client().close()  # the worker is there
        done = run_job(job, Cluster(cluster.address))
    assert done.passes.passes.way == "spill"
    assert set(done.passes.reads.values()) == {1}
    assert verify_job(job, rows=50).good
