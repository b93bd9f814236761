"""The real command does what it says, stops on request, and resumes where it stopped."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import zarr
from distributed.scheduler import KilledWorker
from safetensors.numpy import save_file

from dask_ep.cli import main, terminal
from dask_ep.cli.command import one_line
from dask_ep.jobs import backends, run
from dask_ep.jobs.backends import Threads
from dask_ep.jobs.example import FORMATS, Example, write_example
from dask_ep.jobs.job import load_job
from dask_ep.jobs.result import Progress
from dask_ep.jobs.run import run_job
from dask_ep.placement.placement import Placement
from dask_ep.storage import files, plain_sources
from dask_ep.storage.journal import read_done, read_manifest
from dask_ep.storage.sources import open_source
from tests.cluster_processes import DEADLINE, wait_until
from tests.cluster_processes import Cluster as RealCluster

ROOT = Path(__file__).parents[1].parent


def command(*arguments: object, **keywords) -> subprocess.CompletedProcess:
    """Run the real command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "dask_ep", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
        **keywords,
    )


def here(capsys, *arguments: object) -> tuple[int, str, str]:
    """Run the command in this process: exit code, stdout and stderr."""
    with pytest.raises(SystemExit) as end:
        main.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return end.value.code or 0, captured.out, captured.err


@pytest.fixture
def small_job(tmp_path) -> Path:
    sizes = {"rows": 700, "d": 16, "num_experts": 6, "chunk_rows": 100}
    return write_example(tmp_path / "small", Example(**sizes, format="npy"))


# --- from nothing to a checked output --------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_example_run_verify_inspect(tmp_path, capsys, format):
    sizes = ("--rows", 600, "--d", 16, "--experts", 4, "--chunk-rows", 100, "--format", format)
    code, out, err = here(capsys, "example", tmp_path / "demo", *sizes, "--kind", "gated")
    assert code == 0, err
    job = tmp_path / "demo" / "job.toml"
    assert f"dask-ep run {job}" in out

    if format == "zarr":  # once by the real command
        ran = command("run", job)
        code, out, err = ran.returncode, ran.stdout, ran.stderr
    else:
        code, out, err = here(capsys, "run", job)
    assert code == 0, err
    assert f"out.{format}: 600 rows in" in out
    assert "100 %, 600 of 600 rows" in err, "without a terminal, plain lines"
    assert "\x1b" not in err + out

    code, out, _ = here(capsys, "verify", job, "--rows", 100)
    assert (code, out.splitlines()[-1]) == (0, "good")
    code, out, _ = here(capsys, "inspect", load_job(job).out)
    assert code == 0
    assert "complete" in out
    assert f"tokens.{format}" in out


@pytest.mark.slow
def test_the_wheel_names_the_command_and_the_module_is_it_too():
    assert "dask-ep, version" in command("--version").stdout
    text = (ROOT / "pyproject.toml").read_text()
    assert 'dask-ep = "dask_ep.__main__:main"' in text


@pytest.mark.parametrize("name", list(main.COMMANDS))
def test_help_teaches_by_example(capsys, name):
    code, out, _ = here(capsys, name, "--help")
    assert code == 0
    assert f"dask-ep {name}" in out.split("Options:")[0].split("\n", 1)[1], "an example"
    words, first = out.split(), main.COMMANDS[name].split()
    assert first in [words[i : i + len(first)] for i in range(len(words))], "as the list says"


def test_a_job_of_options_alone(tmp_path, capsys):
    random = np.random.default_rng(0)
    tokens, w = random.standard_normal((50, 8)), random.standard_normal((4, 6, 8))
    routing = random.integers(0, 4, 50)
    for name, array in {"x": tokens, "r": routing, "w": w}.items():
        np.save(tmp_path / f"{name}.npy", array)
    code, out, _ = here(
        capsys, "run", "--tokens", tmp_path / "x.npy", "--routing", tmp_path / "r.npy",
        "--experts", f'{{kind = "linear", w = "{tmp_path}/w.npy", transposed = true}}',
        "--out", tmp_path / "y.npy", "--world-size", 2,
    )  # fmt: skip
    assert code == 0
    assert "50 rows in" in out
    expected = np.stack([x @ w[e].T for x, e in zip(tokens, routing, strict=True)])
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), expected, rtol=1e-12)


def test_a_layer_of_options_alone_and_as_a_job(tmp_path, capsys):
    case = ROOT / "tests" / "fixtures" / "qwen3_moe"
    with np.load(case / "expected.npz") as want:
        hidden, output = (want[name].reshape(24, -1) for name in ("hidden", "output"))
    zarr.create_array(tmp_path / "hidden.zarr", data=hidden, chunks=(10, hidden.shape[1]))
    keys = {"tokens": tmp_path / "hidden.zarr", "layer": case, "out": tmp_path / "out.zarr"}
    options = [word for key, path in keys.items() for word in (f"--{key}", path)]
    assert here(capsys, "run", *options, "--layer-index", 1)[0] == 0
    got = open_source(tmp_path / "out.zarr").read(0, 24)
    np.testing.assert_allclose(got, output, rtol=0, atol=1e-5 * np.abs(output).max())
    lines = [f"{key} = {str(path)!r}" for key, path in keys.items()]
    (tmp_path / "job.toml").write_text("\n".join([*lines, "layer_index = 1"]))
    assert here(capsys, "verify", tmp_path / "job.toml")[0] == 0
    code, out, _ = here(capsys, "inspect", case)
    assert code == 0
    assert all(word in out for word in ("qwen3_moe", "softmax scores, normalised", "dense", "moe"))


def test_layers_that_a_cut_checkpoint_lacks_are_named(tmp_path, capsys):
    case = shutil.copytree(ROOT / "tests" / "fixtures" / "qwen3_moe", tmp_path / "cut")
    config = json.loads((case / "config.json").read_text())
    (case / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    code, out, _ = here(capsys, "inspect", case)
    assert code == 0
    assert "4, 2 of them MoE, 1 of these not in the files here" in out
    assert out.count("moe, not in the files here") == 1


def test_no_more_rows_are_advised_than_there_are(small_job, capsys):
    _, out, _ = here(capsys, "inspect", load_job(small_job).tokens)
    assert re.search(r"advised chunk rows +700\b", out)


# --- exit codes and messages -----------------------------------------------------------------


def test_wrong_use_is_2(tmp_path, capsys, small_job):
    (tmp_path / "bad.toml").write_text('token = "x.npy"')
    for arguments, words in [
        (["run", tmp_path / "bad.toml"], "did you mean 'tokens'?"),
        (["run"], "'tokens' is missing"),
        (
            ["run", small_job, "--threads", 2, "--processes", 2],
            "--threads and --processes are mutually exclusive",
        ),
        (["run", small_job, "--dashboard", 8787], "--dashboard needs --processes"),
        (["run", small_job, "--overwrite", "--resume"], "mutually exclusive"),
        (["example", tmp_path / "new", "--seed", 1 << 64], "seed must be in [0, 2**64)"),
        (
            ["run", small_job, "--travel", "auto"],
            "use travel with workers, or with experts that do not fit",
        ),
        (["run", small_job, "--memory-limit", "much"], "invalid size: 'much'"),
        (["run", small_job, "--memory-limit", "0"], "invalid size: '0'"),
        (["plan", small_job, "--memory-limit", "-1GB"], "invalid size: '-1GB'"),
        (
            ["run", small_job, "--scheduler", "tcp://x:1", "--memory-limit", "1GB"],
            "has no effect on a cluster",
        ),
        (["run", small_job, "--tls-cert", "c.pem"], "TLS needs --tls-ca-file and --tls-cert"),
        (["example", tmp_path / "new", "--k", 20], "k=20 slots cannot go to different ones"),
        (["verify", small_job, "--seed", -1], "-1 is not in the range x>=0"),
        (["verify", small_job, "--tolerance", "nan"], "nan must be a finite number"),
        (["frobnicate"], "No such command"),
        (["plan"], "'tokens' is missing"),
        (["verify", "--routing", "r.npy"], "'tokens' is missing"),
    ]:
        code, _, err = here(capsys, *arguments)
        assert (code, words in err) == (2, True), (arguments, err)
    assert not Path(load_job(small_job).out).exists()
    assert not (tmp_path / "new").exists()


def test_what_fails_is_1_and_one_line(tmp_path, capsys, monkeypatch, small_job):
    monkeypatch.setattr(backends, "CONNECT_SECONDS", 0.3)
    assert here(capsys, "run", small_job)[0] == 0
    for arguments, words in [
        (["run", small_job], "--resume continues it, --overwrite starts again"),
        (["run", tmp_path / "none.toml"], "none.toml"),
        (
            ["run", small_job, "--out", tmp_path / "z.npy", *("--scheduler-file", "s.json")],
            "must hold a scheduler's address",
        ),
        (["inspect", tmp_path / "none.npy"], "does not exist"),
        (["verify", small_job, "--out", tmp_path / "z.npy"], "no output yet"),
    ]:
        code, _, err = here(capsys, *arguments)
        assert (code, words in err) == (1, True), (arguments, err)
        assert len([line for line in err.splitlines() if not line.startswith("hint: ")]) == 1
    assert here(capsys, "run", small_job, "--overwrite")[0] == 0


@pytest.mark.slow
def test_workers_that_die_are_explained(capsys, monkeypatch, small_job):
    worker = SimpleNamespace(address="tcp://10.0.0.1:1")

    def fail(future):
        raise KilledWorker("ep_chunk-1", worker, 3)

    monkeypatch.setattr(run, "result_of", fail)
    code, _, err = here(capsys, "run", small_job, "--processes", 1)
    assert code == 1
    assert "died while running it" in err
    assert "(perhaps for lack of memory: fewer --chunk-rows, or a --memory-limit" in err


@pytest.mark.slow
def test_a_bad_index_names_chunk_and_row_and_debug_shows_all(capsys, small_job):
    path = load_job(small_job).routing
    routing = np.load(path)
    routing[250, 1] = 99
    np.save(path, routing)
    code, _, err = here(capsys, "run", small_job, "--chunk-rows", 100)
    assert code == 1
    assert "chunk 2" in err
    assert "99" in err
    assert "Traceback" not in err
    full = command("run", small_job, "--chunk-rows", 100, "--overwrite", "--debug")
    assert full.returncode == 1
    assert "Traceback" in full.stderr


def test_verify_compares_no_numbers_and_says_so(tmp_path, capsys, small_job):
    job = load_job(small_job)
    tokens = np.load(job.tokens)
    tokens[5] = np.nan
    np.save(job.tokens, tokens)
    assert here(capsys, "run", small_job)[0] == 0
    code, out, _ = here(capsys, "verify", small_job)
    assert code == 0
    assert "16 of 11200 values are infinite or NaN (1 rows, the first is row 5)" in out
    np.save(job.tokens, np.full_like(tokens, np.nan))
    np.save(job.out, np.full((700, 16), np.nan, "f4"))
    code, out, _ = here(capsys, "verify", small_job)
    assert (code, out.splitlines()[-1]) == (3, "not good: no value could be compared")


def test_a_missing_output_is_reported_and_made_again(capsys, small_job):
    out = load_job(small_job).out
    assert here(capsys, "run", small_job)[0] == 0
    os.remove(out)
    words = "missing, although it was complete; run the job again with --resume"
    for path in (out, small_job):
        assert words in " ".join(here(capsys, "inspect", path)[1].split())
    code, _, err = here(capsys, "verify", small_job)
    assert (code, words in err) == (1, True)
    assert here(capsys, "run", small_job, "--resume")[0] == 0
    assert here(capsys, "verify", small_job)[0] == 0


def test_names_are_no_markup(tmp_path, capsys):
    path = tmp_path / "t.safetensors"
    save_file({"[bold]a": np.zeros(2, "f4"), "[/b]": np.zeros(2, "f4")}, path)
    code, out, err = here(capsys, "inspect", path)
    assert code == 0, err
    assert "[bold]a" in out
    assert "[/b]" in out


def test_verify_finds_flipped_bytes_and_says_3(capsys, small_job):
    assert here(capsys, "run", small_job, "--chunk-rows", 100)[0] == 0
    path = load_job(small_job).out
    offset = os.path.getsize(path) - 16 * 4  # the last row
    with open(path, "r+b") as file:
        file.seek(offset)
        bytes_there = file.read(64)
        file.seek(offset)
        file.write(bytes(b ^ 0x18 for b in bytes_there))
    code, out, _ = here(capsys, "verify", small_job, "--rows", 50)
    assert code == 3
    assert "1 rows differ, the worst first:" in out
    assert "row 699 (block 6, experts" in out


# --- stop and resume ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def slow_job(tmp_path_factory) -> Path:
    """A job of 100 or 200 blocks, some ten milliseconds each."""
    sizes = {"rows": 6400, "d": 256, "num_experts": 2, "k": 1, "kind": "gated", "hidden": 4096}
    return write_example(tmp_path_factory.mktemp("slow"), Example(**sizes, format="npy"))


def start(*arguments: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "dask_ep", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )


def count_blocks(out: Path) -> int:
    record = read_manifest(f"{out}.progress") if Path(f"{out}.progress").exists() else None
    return 0 if record is None else len(read_done(f"{out}.progress", record["run"]))


def wait_for_blocks(out: Path, blocks: int, process: subprocess.Popen) -> None:
    def enough() -> bool:
        assert process.poll() is None, process.communicate()
        return count_blocks(out) >= blocks

    wait_until(enough, f"{blocks} blocks are done")


def stop(process: subprocess.Popen, number: int) -> tuple[int, str, str]:
    process.send_signal(number)
    out, err = process.communicate(timeout=DEADLINE)
    return process.returncode, out, err


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_run_is_resumed(tmp_path, capsys, slow_job, number):
    out = tmp_path / "out.npy"
    where = ("--out", out, "--threads", 1, "--chunk-rows", 32)
    process = start("run", slow_job, *where)
    try:
        wait_for_blocks(out, 5, process)
        code, _, err = stop(process, number)
    finally:
        process.kill()
    if number == signal.SIGKILL:
        assert code == -signal.SIGKILL
    else:
        assert code == 1
        assert "stopped;" in err
        assert "To continue: the same command with --resume" in err
        assert "Traceback" not in err
    done = count_blocks(out)
    assert 5 <= done < 200
    assert not out.exists(), "half an output has no name"

    refused = here(capsys, "run", slow_job, *where)[0]
    assert refused == 1, "not without --resume"
    code, told, _ = here(capsys, "run", slow_job, *where, "--resume")
    assert code == 0
    assert f"{6400 - 32 * done} rows in" in told
    assert f"{32 * done} were done before" in told
    assert here(capsys, "verify", slow_job, "--out", out, "--rows", 60)[0] == 0


def test_after_a_chunk_that_cannot_be_read_the_finished_ones_are_good(
    capsys, monkeypatch, small_job
):
    """When the disk gives the fourth block after all, only what was left is computed."""
    job, where = load_job(small_job), ("run", small_job, "--threads", 1, "--chunk-rows", 100)
    read, fill = [], plain_sources.fill_from_file

    def fail(file, buffers, offset):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def count(out, path, *place):
        if path == job.tokens:
            read.append(place)
            if len(read) == 4:
                monkeypatch.setattr(files.os, "preadv", fail)
        return fill(out, path, *place)

    monkeypatch.setattr(plain_sources, "fill_from_file", count)
    code, _, err = here(capsys, *where)
    assert code == 1
    assert re.search(r"block \d of tokens.npy could not be read", err)
    assert f"{job.tokens} cannot be read: Input/output error" in err
    done = count_blocks(Path(job.out))
    assert 0 < done < 7
    monkeypatch.undo()
    code, out, _ = here(capsys, *where, "--resume")
    assert code == 0
    assert f"{100 * done} were done before" in out
    straight = load_job(small_job, out=f"{job.out}.straight.npy")
    run_job(straight, Threads(1), chunk_rows=100)
    np.testing.assert_array_equal(np.load(job.out), np.load(straight.out))


@pytest.mark.slow
def test_what_processes_began_threads_finish_to_the_same_bits(tmp_path, slow_job):
    out = tmp_path / "out.npy"
    where = ("--out", out, "--processes", 2, "--chunk-rows", 64, "--memory-limit", "1GiB")
    process = start("run", slow_job, *where)
    workers = []
    try:
        wait_for_blocks(out, 3, process)
        workers = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C on a terminal does
        _, err = process.communicate(timeout=DEADLINE)
    finally:
        process.kill()
    assert process.returncode == 1
    assert "stopped;" in err
    assert "Traceback" not in err, err
    gone, alive = psutil.wait_procs(workers, timeout=DEADLINE)
    assert len(gone) >= 2
    assert not alive, "no process is left behind"
    record = json.loads(Path(f"{out}.progress/manifest.json").read_text())
    assert record["settings"]["world_size"] == 2, "one rank per process"

    done = run_job(load_job(slow_job, out=str(out)), Threads(2), resume=True)
    assert done.rows_before >= 3 * 64
    straight = load_job(slow_job, out=str(tmp_path / "straight.npy"), world_size=2)
    run_job(straight, Threads(2), chunk_rows=64)
    np.testing.assert_array_equal(np.load(out), np.load(straight.out))


@pytest.mark.slow
def test_options_alone_make_a_job_for_every_command(tmp_path, small_job, capsys):
    job, out = load_job(small_job), tmp_path / "out.npy"
    table = f'{{kind = "linear", w = "{job.experts["w"]}", transposed = false}}'
    options = ("--tokens", job.tokens, "--routing", job.routing, "--experts", table, "--out", out)
    saved = tmp_path / "saved.toml"
    assert here(capsys, "plan", *options, "--threads", 1)[0] == 0
    code, _, err = here(capsys, "plan", *options, "--what-if", "chunk_rows=100,200")
    assert code == 0, err
    assert here(capsys, "run", *options, "--save-job", saved)[0] == 0
    assert here(capsys, "verify", *options)[0] == here(capsys, "verify", saved)[0] == 0
    assert 'out = "out.npy"' in saved.read_text(), "relative to the file, where it can be"
    assert here(capsys, "run", saved, "--resume")[0] == 0
    assert here(capsys, "run", *options, "--save-job", saved, "--resume")[0] == 0, "the same job"


def test_a_saved_job_replaces_no_other_file_unasked(tmp_path, small_job, capsys):
    job, saved = load_job(small_job), tmp_path / "saved.toml"
    saved.write_text(job.to_toml())
    before = saved.read_text()
    options = ("run", small_job, "--out", tmp_path / "other.npy", "--save-job")
    code, _, err = here(capsys, *options, saved)
    assert (code, "saved.toml exists, and has another job; --overwrite" in err) == (2, True), err
    code, _, err = here(capsys, *options, job.tokens, "--overwrite")
    assert (code, "--save-job replaces only jobs, but" in err) == (2, True), err
    assert saved.read_text() == before
    assert len(np.load(job.tokens))
    assert here(capsys, *options, saved, "--overwrite")[0] == 0
    assert load_job(saved).out == str(tmp_path / "other.npy")


def test_a_run_says_which_experts_were_used(small_job, tmp_path, capsys):
    routing = np.load(load_job(small_job).routing)
    count = np.bincount(routing.ravel())
    _, out, _ = here(capsys, "run", small_job)
    hottest = f"expert {count.argmax()} most, by {count.max():,} of {routing.size:,} slots"
    assert f"of 6 were used; {hottest}" in out
    _, out, _ = here(capsys, "run", small_job, "--resume")
    assert "experts:" not in out, "nothing was computed"


def test_choices_are_needed_to_compare(small_job, capsys):
    code, _, err = here(capsys, "plan", small_job, "--what-if")
    assert (code, "--what-if needs choices to compare, NAME=VALUE" in err) == (2, True)


def test_a_report_of_nothing_is_announced(small_job, tmp_path, capsys, bokeh):
    report = tmp_path / "run.html"
    assert here(capsys, "run", small_job)[0] == 0
    code, out, _ = here(capsys, "run", small_job, "--resume", "--report", report)
    assert (code, report.exists()) == (0, False)
    assert "report: not written, since nothing was left to compute; use --overwrite" in out


# --- from Python -----------------------------------------------------------------------------


def test_progress_from_python(small_job):
    told = []
    done = run_job(load_job(small_job), Threads(1), chunk_rows=100, on_progress=told.append)
    assert [p.rows_done for p in told] == [0, 100, 200, 300, 400, 500, 600, 700]
    assert told[0].seconds_left is None
    assert (told[-1].rows_left, told[-1].rows_in_all) == (0, 700)
    assert (done.rows, done.rows_done, done.out) == (700, 700, load_job(small_job).out)
    assert done.decision.layout.threads == 1
    assert open_source(load_job(small_job).out).shape == (700, 16)
    again = run_job(load_job(small_job), Threads(1), resume=True)
    assert (again.rows_done, again.rows_before) == (0, 700)


# --- a cluster -------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_cluster_finishes_what_was_stopped_on_it(tmp_path, capsys, slow_job):
    out = tmp_path / "out.npy"
    with RealCluster(tmp_path, ["alice", "bob"]) as cluster:
        where = ("--out", out, "--scheduler-file", cluster.scheduler_file, "--chunk-rows", 64)
        process = start("run", slow_job, *where, "--travel", "experts")
        try:
            wait_for_blocks(out, 3, process)
            code, _, err = stop(process, signal.SIGINT)
        finally:
            process.kill()
        assert (code, "stopped;" in err) == (1, True)
        resumed = command("run", slow_job, *where, "--resume")
        assert resumed.returncode == 0, resumed.stderr
        assert "were done before" in resumed.stdout
    assert here(capsys, "verify", slow_job, "--out", out, "--rows", 60)[0] == 0
    record = json.loads(Path(f"{out}.progress/manifest.json").read_text())
    assert record["settings"]["world_size"] == 2, "one rank per worker"
    placement = Placement.from_json(record["settings"]["placement"])
    assert placement.local, "what travelled at first did so to the end"
    assert placement.physical_per_rank == placement.num_experts


def test_a_scheduler_that_does_not_answer(monkeypatch, capsys, small_job):
    monkeypatch.setattr(backends, "CONNECT_SECONDS", 0.5)
    code, _, err = here(capsys, "run", small_job, "--scheduler", "tcp://127.0.0.1:1")
    assert code == 1
    assert "could not connect to the scheduler at tcp://127.0.0.1:1" in err


# --- on a terminal ---------------------------------------------------------------------------


@pytest.mark.slow
def test_a_terminal_gets_a_bar(tmp_path, small_job):
    master, slave = os.openpty()
    try:
        ran = subprocess.run(
            [sys.executable, "-m", "dask_ep", "run", small_job],
            stdout=subprocess.PIPE,
            stderr=slave,
            timeout=DEADLINE,
            env=os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "120"},
            check=True,
        )
        shown = os.read(master, 1 << 16).decode()
    finally:
        os.close(slave)
        os.close(master)
    assert "700 of 700 rows" in shown
    assert "rows/s" in shown
    assert "━" in shown
    assert b"700 rows in" in ran.stdout


def test_without_a_terminal_lines_are_printed_every_few_seconds(monkeypatch, capsys):
    monkeypatch.setattr(terminal, "SECONDS_BETWEEN_LINES", 10.0)
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr(terminal.time, "monotonic", lambda: next(clock))
    with terminal.progress_bar("rows") as tell:
        for done in range(0, 101, 10):
            tell(done, 100, "", Progress(done, 100 - done, 0, done / 5))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "20 %, 20 of 100 rows, 5 rows/s, 16.00 s left"
    assert lines[-1] == "100 %, 100 of 100 rows, 5 rows/s"
    assert len(lines) == 4


@pytest.mark.parametrize(
    ("done", "seconds", "left"),
    [
        (0, 60.0, None),
        (50, 0.4, None),
        (10, 2.0, None),
        (10, 30.0, 270.0),
        (50, 2.0, 2.0),
        (100, 4.0, 0.0),
    ],
    ids=["nothing done", "begun just now", "too few rows", "a long run", "known", "at the end"],
)
def test_the_time_left_is_shown_once_the_speed_is_known(done, seconds, left):
    assert Progress(done, 100 - done, 0, seconds).seconds_left == left


def test_an_error_and_its_causes_are_one_line():
    error = RuntimeError("chunk 2 failed")
    error.__cause__ = ValueError("index 9")
    assert one_line(error) == "chunk 2 failed; because index 9"
    error.__cause__ = ValueError("failed ")  # said already
    error.add_note("dask_ep: rank 3")
    assert one_line(error) == "chunk 2 failed (dask_ep: rank 3)"
    del error.__notes__
    assert one_line(error) == "chunk 2 failed"
    full = os.strerror(errno.ENOSPC)
    assert one_line(OSError(errno.ENOSPC, full)) == f"{full}; free some space, or write elsewhere"
    assert one_line(OSError(errno.ENOSPC, full, "y")).startswith(f"{full}: y; free some space")
    assert one_line(OSError(errno.EIO, "block 3 of y is lost")) == "block 3 of y is lost"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plan", "run"])
def test_what_would_multiply_faster_is_named_once(name, small_job, capsys, monkeypatch):
    monkeypatch.setattr(terminal, "faster_blas", lambda: "another library")
    code, out, said = here(capsys, name, small_job)
    assert code == 0
    assert said.splitlines().count("hint: another library") == 1
    assert "another library" not in out
    monkeypatch.setattr(terminal, "faster_blas", lambda: None)
    assert "hint" not in here(capsys, name, small_job)[2]
