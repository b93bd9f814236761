"""A collection is one file, whatever stopped it on the way, and keeps to its memory."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import ANY

import dask
import numpy as np
import pytest
import zarr
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from dask_ep import Experts, collect, open_tokens
from dask_ep.cli import main
from dask_ep.errors import DoesNotFit, JobError, OutputInUse, ReadError
from dask_ep.jobs import price_job
from dask_ep.jobs.backends import Processes, Threads
from dask_ep.jobs.collect_job import collect_job
from dask_ep.jobs.collect_plan import plan_collection
from dask_ep.jobs.job import load_job
from dask_ep.jobs.run import run_job
from dask_ep.jobs.verify import verify_job
from dask_ep.laws.costs import Rates
from dask_ep.layers.collect import Wanted
from dask_ep.storage import bundle
from dask_ep.storage.output import progress_directory
from tests.checkpoints import FIXTURES

E, D, F, N = 6, 8, 5, 200
ALL = ("usage", "coactivation", "amax", "sumsq", "mean_output", "reap", "gram")


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "tokens.npy", rng.standard_normal((N, D), dtype="f4"))
    routing = np.argsort(rng.random((N, E - 1)), axis=1)[:, :2]  # the last expert has no row
    np.save(tmp_path / "routing.npy", routing)
    np.save(tmp_path / "weights.npy", rng.random((N, 2), dtype="f4"))
    for name, shape in {"gate": (E, D, F), "up": (E, D, F), "down": (E, F, D)}.items():
        np.save(tmp_path / f"{name}.npy", rng.standard_normal(shape, dtype="f4"))
    (tmp_path / "job.toml").write_text(
        'tokens = "tokens.npy"\nrouting = "routing.npy"\ntopk_weights = "weights.npy"\n'
        'out = "out.npy"\n[experts]\nkind = "gated"\n'
        'gate = "gate.npy"\nup = "up.npy"\ndown = "down.npy"\n'
    )
    return tmp_path


def asked(
    folder: Path, name: str = "stats.safetensors", what: tuple[str, ...] = ALL, **more
) -> tuple[Wanted, Path]:
    return Wanted(what, **more), folder / name


def job(folder: Path):
    return load_job(folder / "job.toml")


def assert_same(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> None:
    assert got.keys() == want.keys()
    for name, array in want.items():
        np.testing.assert_array_equal(got[name], array, err_msg=name)


def test_the_file_holds_what_collect_gives_and_words_about_it(folder):
    found = collect_job(job(folder), *asked(folder), Threads(2), chunk_rows=30)
    tokens, routing, weights = (
        open_tokens(folder / f"{name}.npy", chunks=30) for name in ("tokens", "routing", "weights")
    )
    experts = Experts.gated(*(str(folder / f"{name}.npy") for name in ("gate", "up", "down")))
    want = collect(tokens, experts, what=ALL, routing=(routing, weights))
    assert_same(load_file(folder / "stats.safetensors"), dask.compute(want)[0])
    with safe_open(folder / "stats.safetensors", "np") as file:
        metadata = file.metadata()
    assert metadata["rows"] == "200"
    assert json.loads(metadata["job"])["tokens"] == str(folder / "tokens.npy")
    assert json.loads(metadata["coverage"])["rows_of_experts"]["5"] == 0
    assert found.coverage[5] == 0
    assert not os.path.exists(progress_directory(str(folder / "stats.safetensors")))


def test_zarr_holds_the_same_arrays_in_a_group(folder):
    collect_job(job(folder), *asked(folder), Threads(1), chunk_rows=30)
    collect_job(job(folder), *asked(folder, "stats.zarr"), Threads(1), chunk_rows=30)
    group = zarr.open_group(folder / "stats.zarr", mode="r")
    want = load_file(folder / "stats.safetensors")
    assert_same({name: np.asarray(array[...]) for name, array in group.arrays()}, want)
    assert group.attrs["rows"] == "200"


def test_the_output_is_written_in_the_same_pass(folder):
    collect_job(job(folder), *asked(folder, with_output=True), Threads(2), chunk_rows=30)
    got = np.load(folder / "out.npy")
    run_job(job(folder), Threads(2), chunk_rows=30, overwrite=True)
    np.testing.assert_array_equal(got, np.load(folder / "out.npy"))


def test_an_output_that_may_not_begin_is_refused_before_the_statistics_do(folder):
    np.save(folder / "out.npy", np.zeros(3))
    before = sorted(os.listdir(folder))
    with pytest.raises(FileExistsError, match=r"out.npy exists; --resume continues it"):
        collect_job(job(folder), *asked(folder, with_output=True), Threads(1))
    assert sorted(os.listdir(folder)) == before


def test_the_output_of_complete_statistics_is_checked_block_by_block(folder):
    both = asked(folder, what=("usage",), with_output=True)
    collect_job(job(folder), *both, Threads(1), chunk_rows=30)
    want = np.load(folder / "out.npy")
    collect_job(job(folder), *both, Threads(1), resume=True)
    os.truncate(folder / "out.npy", os.path.getsize(folder / "out.npy") - 70 * D * 4)
    collect_job(job(folder), *both, Threads(1), resume=True)
    np.testing.assert_array_equal(np.load(folder / "out.npy"), want)
    other = want.copy()
    other[50] += 1
    np.save(folder / "out.npy", other)
    with pytest.raises(FileExistsError, match=r"rows \[30, 60\) have other values"):
        collect_job(job(folder), *both, Threads(1), resume=True)
    (folder / "out.npy").unlink()
    done = run_job(job(folder), Threads(1), resume=True)
    assert (done.rows_done, verify_job(job(folder)).good) == (N, True)


@pytest.mark.slow
def test_worker_processes_give_the_same_bits(folder):
    collect_job(job(folder), *asked(folder), Threads(1), chunk_rows=30)
    want = load_file(folder / "stats.safetensors")
    other = asked(folder, "other.safetensors", with_output=True)
    collect_job(job(folder), *other, Processes(2), chunk_rows=30)
    assert_same(load_file(folder / "other.safetensors"), want)


class Stopped(Exception):
    pass


@pytest.mark.slow
def test_a_stopped_run_resumes_to_the_same_bits(folder):
    collect_job(job(folder), *asked(folder), Threads(1), chunk_rows=4)
    want = load_file(folder / "stats.safetensors")
    again = asked(folder, "again.safetensors")

    def stop_after(rows: int):
        def tell(done: int, total: int) -> None:
            if done > rows:
                raise Stopped

        return tell

    told: list[int] = []
    with pytest.raises(Stopped):
        collect_job(job(folder), *again, Threads(1), chunk_rows=4, on_progress=stop_after(20))
    with pytest.raises(FileExistsError, match="was begun by an earlier run; resume to continue"):
        collect_job(job(folder), *again, Threads(1))
    with pytest.raises(ValueError, match="has chunks of 4 rows, not 5: resume with those"):
        collect_job(job(folder), *again, Threads(1), chunk_rows=5, resume=True)
    record = folder / "again.safetensors.progress" / "begun.json"
    good = record.read_text()
    for bad, words in (
        (good[:20], "begun.json is damaged: .*; overwrite the statistics"),
        (
            good.replace('"block": 6', '"block": "6"'),
            "must have whole numbers for world_size, .*'6'",
        ),
        ("[1]", r"must have whole numbers for .*, but holds \[1\]; overwrite the statistics"),
    ):
        record.write_text(bad)
        with pytest.raises(ValueError, match=words):
            collect_job(job(folder), *again, Threads(1), resume=True)
    record.write_text(good)
    for rows in (250, 450):  # among the groups, and among the experts of the grams
        with pytest.raises(Stopped):
            collect_job(job(folder), *again, Threads(1), resume=True, on_progress=stop_after(rows))
    collect_job(
        job(folder), *again, Threads(1), resume=True, on_progress=lambda done, _: told.append(done)
    )
    assert 400 < told[0] <= told[-1] == 600  # all may be done before it is stopped
    assert_same(load_file(folder / "again.safetensors"), want)
    again_complete = collect_job(job(folder), *again, Threads(1), resume=True)
    assert again_complete.coverage[5] == 0
    with pytest.raises(ValueError, match="holds statistics of other inputs, or other statistics"):
        collect_job(
            job(folder), *asked(folder, "again.safetensors", rows="all"), Threads(1), resume=True
        )
    np.save(folder / "weights.npy", np.ones((N, 2), "f4"))
    with pytest.raises(ValueError, match="holds statistics of other inputs"):
        collect_job(job(folder), *again, Threads(1), resume=True)


def test_a_run_of_fewer_rows_than_a_chunk_resumes_with_the_same_options(folder):
    def stop(done: int, total: int) -> None:
        if done > 0:
            raise Stopped

    options = {"where": Threads(1), "chunk_rows": 10 * N, "resume": True}
    with pytest.raises(Stopped):
        collect_job(job(folder), *asked(folder), **options, on_progress=stop)
    collect_job(job(folder), *asked(folder), **options)
    assert (folder / "stats.safetensors").exists()


@pytest.fixture
def known_rates(monkeypatch):
    """Measure this machine in no time."""
    monkeypatch.setattr(price_job, "probe", lambda *_, **__: Rates(flops=1e10, copy=1e9))


ON_THREADS = [(Threads(2), what) for what in (ALL, ("usage",), ("gram",), ("reap",))]
ON_PROCESSES = [
    pytest.param(Processes(2), what, marks=pytest.mark.slow) for what in (ALL, ("gram",))
]


@pytest.mark.parametrize(("where", "what"), [*ON_THREADS, *ON_PROCESSES], ids=str)
def test_a_report_compares_with_the_plan(folder, known_rates, where, what, bokeh):
    told, report = [], folder / "run.html"
    collect_job(
        job(folder), *asked(folder, what=what), where, chunk_rows=30, report=report,
        on_record=lambda *both: told.append(both),
    )  # fmt: skip
    planned, record = told[0]
    assert (record.tasks, record.repeated) == (planned.tasks, 0)
    assert record.peak_bytes > 0
    ahead = plan_collection(job(folder), Wanted(what), where, chunk_rows=30)
    assert (ahead.tasks, ahead.memory_bytes) == (planned.tasks, planned.memory_bytes)
    assert ahead.statistics_bytes == os.path.getsize(folder / "stats.safetensors") - header(folder)
    cells = re.findall(r"<td>(.*?)</td>", report.read_text())
    assert cells[:3] == ["tasks", str(planned.tasks), str(record.tasks)]
    assert sum(planned.chunks[chunk] for _, chunk in record.finished()) == N


def header(folder: Path) -> int:
    with open(folder / "stats.safetensors", "rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


@pytest.mark.parametrize("rows", [20, 250], ids=["among the groups", "among the grams"])
def test_a_resumed_run_is_compared_with_the_plan_of_what_was_left(folder, known_rates, rows, bokeh):
    told = []

    def stop(done: int, total: int) -> None:
        if done > rows:
            raise Stopped

    with pytest.raises(Stopped):
        collect_job(job(folder), *asked(folder), Threads(1), chunk_rows=4, on_progress=stop)
    collect_job(
        job(folder), *asked(folder), Threads(1), resume=True, report=folder / "run.html",
        on_record=lambda *both: told.append(both),
    )  # fmt: skip
    planned, record = told[0]
    assert sum(planned.left) < 50  # on a busy machine all may be done before it is stopped
    assert (planned.grams_left, record.tasks) == (6 if rows == 20 else ANY, planned.tasks)
    assert "This run resumed an earlier one" in (folder / "run.html").read_text()


def test_the_plan_says_what_it_takes_and_whether_gram_fits(folder, capsys, known_rates):
    command = ["plan", folder / "job.toml", "--threads", "1", "--what", "usage,gram"]
    code, said, _ = run_main(capsys, *command, "--memory-limit", "400MiB")
    assert code == 0
    assert "second moments" in said
    assert "1 pass over the rows, 1 more for gram, 6 experts in each; the statistics are " in said
    code, said, _ = run_main(capsys, *command, "--json")
    plan = json.loads(said)
    assert (plan["passes_for_gram"], plan["stored_bytes"]) == (1, E * 3 * D * F * 4)
    pairs, hidden = 2 * N, 2 * 2 * D * F  # rows of experts; their gate and up
    assert sum(plan["flops"]) == pairs * (D * D + F * F + hidden)
    code, said, _ = run_main(capsys, *command[:-1], "usage", "--json")
    plan = json.loads(said)
    assert (sum(plan["flops"]), plan["stored_bytes"], plan["load_seconds"]) == (0, 0, 0)
    code, _, err = run_main(capsys, *command, "--memory-limit", "180500kB")
    assert code == 1
    assert re.search(r"gram needs \d+ MB to sum the second moments of one expert", err)
    code, _, err = run_main(capsys, *command, "--what-if", "world_size=1,2")
    assert (code, "--what-if is for runs: give it without --what" in err) == (2, True)
    code, _, err = run_main(capsys, *command[:2], "--gpu", "--what", "usage")
    assert "statistics are collected on the host: plan without --gpu" in err


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 8)


def _change(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "file", "damage"),
    [
        ("stats.safetensors", "", _cut),
        ("stats.safetensors", "", _change),
        ("stats.zarr", "usage.rows/c/0", Path.unlink),
        ("stats.zarr", "amax.input/c/0/0", _change),
        ("stats.zarr", "usage.rows", shutil.rmtree),
    ],
)
def test_damaged_statistics_are_not_taken_for_complete(folder, name, file, damage):
    usage = asked(folder, name, ("usage", "amax"))
    collect_job(job(folder), *usage, Threads(1))
    collect_job(job(folder), *usage, Threads(1), resume=True)
    damage(folder / name / file if file else folder / name)
    with pytest.raises(ReadError, match=f"{name} is damaged.*; overwrite it to collect"):
        collect_job(job(folder), *usage, Threads(1), resume=True)
    collect_job(job(folder), *usage, Threads(1), overwrite=True)
    collect_job(job(folder), *usage, Threads(1), resume=True)


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bits(folder):
    path, rows = folder / "killed.safetensors", ["--chunk-rows", "1", "--threads", "1"]
    what = ["--what", "usage,amax,reap"]
    command = [sys.executable, "-m", "dask_ep", "collect", str(folder / "job.toml"), *what, *rows]
    subprocess.run([*command, "--out", folder / "whole.safetensors"], check=True)
    record = Path(f"{path}.progress", "groups-0.zarr.progress")
    process = subprocess.Popen([*command, "--out", path], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not any(done.stat().st_size for done in record.glob("done*")):
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    assert not path.exists()
    subprocess.run([*command, "--out", path, "--resume"], check=True)
    assert_same(load_file(path), load_file(folder / "whole.safetensors"))


@pytest.mark.slow
def test_experts_that_do_not_fit_are_observed_in_several_passes(folder):
    rng = np.random.default_rng(1)
    for name in ("gate", "up", "down"):
        np.save(folder / f"{name}.npy", rng.standard_normal((E, 1024, 1024), dtype="f4"))
    np.save(folder / "tokens.npy", rng.standard_normal((N, 1024), dtype="f4"))
    what = ("usage", "coactivation", "sumsq", "reap")
    collect_job(job(folder), *asked(folder, what=what), Threads(1), chunk_rows=50)
    want = load_file(folder / "stats.safetensors")
    courses = []
    limit = 265_000_000
    collect_job(
        job(folder), *asked(folder, "small.safetensors", what=what), Threads(1, limit),
        chunk_rows=50, on_course=courses.append,
    )  # fmt: skip
    assert courses[0].blocks == (range(3), range(3, 6))
    assert courses[0].memory_bytes <= limit
    assert_same(load_file(folder / "small.safetensors"), want)
    with pytest.raises(JobError, match="passes, so the output cannot be written in the same pass"):
        collect_job(
            job(folder), *asked(folder, "o.safetensors", what=what, with_output=True),
            Threads(1, limit), chunk_rows=50,
        )  # fmt: skip


def test_grams_keep_to_the_memory_limit_or_are_refused(folder):
    limit, courses = 400 << 20, []
    collect_job(
        job(folder), *asked(folder), Threads(1, limit), chunk_rows=50, on_course=courses.append
    )
    assert courses[0].gram_blocks == (range(E),)
    wide = np.zeros((4, 6000), "f4")
    np.save(folder / "tokens.npy", np.repeat(wide, N // 4, axis=0))
    np.save(folder / "w.npy", np.zeros((E, 6000, 2), "f4"))
    linear = load_job(
        tokens=str(folder / "tokens.npy"), routing=str(folder / "routing.npy"),
        experts=str(folder / "w.npy"), out=str(folder / "out.npy"),
    )  # fmt: skip
    with pytest.raises(DoesNotFit, match=r"gram needs \d+ MB to sum the second moments of one exp"):
        collect_job(linear, *asked(folder, "g.zarr", what=("gram",)), Threads(1, limit))


def test_a_layer_of_a_checkpoint_is_collected_with_its_router(tmp_path):
    hidden = np.random.default_rng(0).standard_normal((50, 32), dtype="f4")
    np.save(tmp_path / "hidden.npy", hidden)
    out = tmp_path / "stats.safetensors"
    arguments = [
        "collect", "--layer", str(FIXTURES / "qwen2_moe"), "--layer-index", "1",
        "--tokens", str(tmp_path / "hidden.npy"), "--what", "usage,router,reap", "--out", str(out),
    ]  # fmt: skip
    with pytest.raises(SystemExit) as end:
        main.main(arguments)
    assert not end.value.code
    found = load_file(out)
    assert found["usage.rows"].sum() == 200
    assert found["router.rows"] == 50
    np.testing.assert_array_equal(found["usage.rows"], found["reap.rows"])


def run_main(capsys, *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return end.value.code or 0, out, err


def test_the_command_tells_what_it_found(folder, capsys):
    out = folder / "stats.safetensors"
    command = ["collect", folder / "job.toml", "--what", "usage amax", "--out", out]
    code, said, _ = run_main(capsys, *command, "--few-rows", "20")
    assert (code, said) == (
        0,
        f"{out}: usage, amax of 200 rows\ncoverage: 1 of 6 experts saw fewer than 20 rows: 5 (0)\n",
    )
    code, _, err = run_main(capsys, *command)
    assert code == 1
    assert "stats.safetensors exists; resume to continue it, overwrite" in err
    code, said, _ = run_main(capsys, *command, "--resume", "--few-rows", "0")
    assert "coverage: 6 of 6 experts saw 0 rows or more" in said
    code, said, _ = run_main(capsys, *command, "--resume", "--few-rows", "201")
    assert "coverage: 6 of 6 experts saw fewer than 201 rows: 5 (0), " in said
    code, said, _ = run_main(capsys, *command, "--overwrite", "--rows", "all", "--few-rows", "9")
    assert "coverage: 6 of 6 experts saw 9 rows or more" in said
    command[3] = "coactivation"
    for again in ("--overwrite", "--resume"):
        code, said, _ = run_main(capsys, *command, again)
        assert (code, said) == (0, f"{out}: coactivation of 200 rows\n"), "nothing counts rows"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--what", "usge"], "'usge' is not one of usage, coactivation"),
        (["--what", "usage", "--rows", "2"], "'2' is not routed, all, or a share such as 0.1"),
        (["--what", "usage", "--resume", "--overwrite"], "mutually exclusive"),
        (["--what", "router"], "statistics of the router need a layer"),
        (["--what", "usage", "--gpu"], "GPU"),
    ],
)
def test_wrong_use_is_an_error(folder, capsys, options, message):
    out = folder / "stats.safetensors"
    code, _, err = run_main(capsys, "collect", folder / "job.toml", "--out", out, *options)
    assert code in (1, 2)
    assert message in err
    assert not out.exists()


def test_statistics_replace_neither_inputs_nor_the_output(folder):
    gate = np.load(folder / "gate.npy")
    save_file({"gate": gate}, folder / "gate.safetensors", {"content": "as statistics have"})
    (folder / "link.safetensors").symlink_to("gate.safetensors")
    text = (folder / "job.toml").read_text()
    (folder / "job.toml").write_text(text.replace("gate.npy", "gate.safetensors::gate"))
    for name in ("gate.safetensors", "link.safetensors"):
        with pytest.raises(ValueError, match=r"would replace its own input .*gate\.safetensors"):
            collect_job(job(folder), *asked(folder, name), overwrite=True)
    np.testing.assert_array_equal(load_file(folder / "gate.safetensors")["gate"], gate)
    named = replace(job(folder), out=str(folder / "o.zarr"))
    with pytest.raises(JobError, match=r"written to .*o\.zarr, which is the job's output"):
        collect_job(named, *asked(folder, "o.zarr", with_output=True))
    assert not (folder / "o.zarr.progress").exists()


@pytest.fixture
def half_removed(monkeypatch):
    """Collect, and stop the first removal of a directory, as a kill does, when one file is gone."""

    def half(path, *_, **__):
        monkeypatch.undo()
        next(Path(path).rglob("zarr.json")).unlink()
        raise Stopped

    def collect_until_then(*arguments, **options):
        monkeypatch.setattr(shutil, "rmtree", half)
        with pytest.raises(Stopped):
            collect_job(*arguments, **options)

    return collect_until_then


def test_statistics_whose_record_is_half_removed_are_complete(folder, half_removed):
    half_removed(job(folder), *asked(folder), Threads(1), chunk_rows=30)
    want = load_file(folder / "stats.safetensors")
    collect_job(job(folder), *asked(folder), Threads(1), resume=True)
    assert_same(load_file(folder / "stats.safetensors"), want)
    assert not os.path.exists(progress_directory(str(folder / "stats.safetensors")))


def test_what_is_half_removed_by_overwriting_is_not_resumed(folder, half_removed):
    def stop(done: int, total: int) -> None:
        if done > 20:
            raise Stopped

    begun, again = (job(folder), *asked(folder), Threads(1)), {"chunk_rows": 30}
    with pytest.raises(Stopped):
        collect_job(*begun, chunk_rows=4, on_progress=stop)
    half_removed(*begun, **again, overwrite=True)
    collect_job(*begun, **again, resume=True)
    got = load_file(folder / "stats.safetensors")
    collect_job(*begun, **again, overwrite=True)
    assert_same(got, load_file(folder / "stats.safetensors"))


@pytest.mark.parametrize("option", ["resume", "overwrite"])
def test_statistics_are_collected_by_one_process_up_to_the_last_byte(folder, monkeypatch, option):
    whole = bundle.write_bundle

    def write(*arguments):
        monkeypatch.setattr(bundle, "write_bundle", whole)
        with pytest.raises(OutputInUse, match="has been writing this output since"):
            collect_job(job(folder), *asked(folder), Threads(1), chunk_rows=30, **{option: True})
        assert os.listdir(directory / "groups-0.zarr")
        whole(*arguments)

    directory = Path(progress_directory(str(folder / "stats.safetensors")))
    monkeypatch.setattr(bundle, "write_bundle", write)
    collect_job(job(folder), *asked(folder), Threads(1), chunk_rows=30)
    assert not directory.exists()


def test_statistics_go_to_bundles_alone(folder):
    with pytest.raises(ValueError, match=r"statistics are written to \.safetensors or \.zarr, not"):
        collect_job(job(folder), *asked(folder, "stats.npy"))
    (folder / "mine.zarr").mkdir()
    zarr.create_group(folder / "group.zarr").create_array("a", shape=(3,), dtype="f4")
    save_file({"w": np.ones(3)}, folder / "mine.safetensors")
    for mine in ("mine.zarr", "group.zarr", "mine.safetensors"):
        with pytest.raises(FileExistsError, match="does not hold statistics, so it is not overw"):
            collect_job(job(folder), *asked(folder, mine), overwrite=True)
