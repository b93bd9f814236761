"""`dask-ep plan` prints figures, JSON and comparisons, and refuses with a sentence."""

import json
import math
import re
import sys

import numpy as np
import pytest
from click.testing import CliRunner

from dask_ep.arrays import device
from dask_ep.cli import plan_command as plan_command_module
from dask_ep.cli.plan_command import plan_command
from dask_ep.errors import NoDeviceError
from dask_ep.graph.pipeline import count_tasks
from dask_ep.jobs import price_job
from dask_ep.jobs.backends import Threads
from dask_ep.jobs.build import open_inputs
from dask_ep.jobs.job import load_job
from dask_ep.jobs.run import run_job
from dask_ep.laws.costs import PART_OF_A_WORKER, Rates
from dask_ep.laws.memory_law import Layout, need
from dask_ep.layers.checkpoint import load_moe_layer, moe_layers
from dask_ep.placement.placement import Placement
from dask_ep.placement.placement_files import write_sglang, write_vllm_ascend
from dask_ep.storage import journal
from tests.checkpoints import FIXTURES, LAYER


@pytest.fixture
def job_file(tmp_path):
    rng = np.random.default_rng(0)
    routing = rng.zipf(1.5, (1000, 2)) % 8
    experts = np.ones((8, 8, 8), "f4")
    np.save(tmp_path / "tokens.npy", np.ones((1000, 8), "f4"))
    np.save(tmp_path / "routing.npy", routing)
    np.save(tmp_path / "w.npy", experts)
    path = tmp_path / "job.toml"
    path.write_text(
        'tokens = "tokens.npy"\nrouting = "routing.npy"\nout = "out.npy"\n'
        '[experts]\nkind = "linear"\nw = "w.npy"\ntransposed = false\n'
    )
    return path


@pytest.fixture(autouse=True)
def known_rates(monkeypatch):
    """Measure this machine in no time."""
    monkeypatch.setattr(price_job, "probe", lambda *_, **__: Rates(flops=1e10, copy=1e9))


def invoke(*arguments) -> str:
    result = CliRunner().invoke(plan_command, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_command_prints_figures_and_ranks(job_file):
    output = invoke(job_file, "--processes", 4, "--chunk-rows", 250)
    assert "1,000" in output
    assert f"{count_tasks(4, 4)}," in output
    assert "4 (contiguous) on 4 x 1" in output


def test_the_command_prints_json_and_saves_the_placement(job_file, tmp_path):
    saved = tmp_path / "placement.json"
    output = invoke(job_file, "--processes", 4, "--placement", "exact", "--json", "--save", saved)
    content = json.loads(output)
    assert content["world_size"] == 4
    assert content["imbalance"] < 1.01
    placement = Placement.from_json(saved.read_text())
    assert placement.physical.tolist() == content["physical"]
    again = json.loads(invoke(job_file, "--processes", 4, "--placement", saved, "--json"))
    assert again["rank_rows"] == content["rank_rows"]


def test_the_command_writes_a_report(job_file, tmp_path, bokeh):
    invoke(job_file, "--processes", 2, "--memory-limit", "1 GiB", "--html", tmp_path / "plan.html")
    text = (tmp_path / "plan.html").read_text()
    assert "1,000 token rows of width 8, 2 of 8 experts per row, 2 ranks (contiguous)" in text


@pytest.mark.parametrize("placements", ["foo", ".", "contiguous,"])
def test_a_placement_to_compare_that_is_neither_name_nor_file(job_file, placements):
    asked = f"placement={placements}"
    result = CliRunner().invoke(plan_command, [str(job_file), "--what-if", asked])
    assert result.exit_code == 2
    assert "placement takes contiguous, packed, balanced, exact, or files" in result.output


def test_a_report_that_cannot_be_drawn_is_refused_before_anything_is_read(job_file, monkeypatch):
    monkeypatch.setitem(sys.modules, "bokeh.embed", None)  # as if it were not installed
    monkeypatch.setattr(plan_command_module, "priced_job", None)
    result = CliRunner().invoke(plan_command, [str(job_file), "--html", "plan.html"])
    assert re.search("pip install bokeh", str(result.exception))


def test_the_command_compares_choices(job_file):
    output = invoke(
        job_file, "--processes", 4, "--what-if", "world_size=2,4", "placement=contiguous,exact"
    )
    assert "best: least time of 4" in output
    content = json.loads(invoke(job_file, "--json", "--what-if", "chunk_rows=100,500"))
    assert [p["chunk_rows"] for p in content["plans"]] == [100, 500]
    assert content["best"] in (0, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["world_size=2"], "put --what-if before it"),
        (["--what-if", "ranks=2"], "a choice is one of world_size, placement, chunk_rows"),
        (["--what-if", "world_size=two"], "world_size takes whole numbers of at least 1; got 'two"),
        (["--what-if", "world_size=0"], "world_size takes whole numbers of at least 1; got '0'"),
        (["--what-if", "travel=foo"], "travel takes rows, auto, experts; got 'foo'"),
        (["--what-if", "chunk_rows=5", "chunk_rows=6"], "chunk_rows is given twice"),
        (["--threads", 2, "--processes", 2], "--threads and --processes are mutually exclusive"),
        (["--travel", "auto"], "threads share memory, so nothing travels between them"),
        (["--what-if", "travel=rows,auto"], "threads share memory, so nothing travels"),
        (["--html", "job.toml/plan.html"], "plan.html cannot be written: .*choose another place"),
        (
            ["--memory-limit", "1 MB", "--what-if", "world_size=1,2"],
            "It does not fit with experts in passes either",
        ),
        (["--memory-limit", "1 MB"], "a memory limit of 1 MB must hold .* in total; allow more"),
        (
            ["--chunk-rows", 900, "--memory-limit", "180.7 MB"],
            r"a memory limit of 180\.7 MB must hold .* 180\.\d+ MB in total; .* with --chunk-rows",
        ),
    ],
)
def test_what_the_command_refuses(job_file, arguments, message, monkeypatch, request):
    if "--html" in arguments:
        request.getfixturevalue("bokeh")
    monkeypatch.chdir(job_file.parent)
    result = CliRunner().invoke(plan_command, [str(job_file), *map(str, arguments)])
    assert result.exit_code != 0
    notes = getattr(result.exception, "__notes__", [])
    said = f"{result.output} {result.exception} {notes}"
    assert re.search(message, " ".join(said.split())), said


def test_chunks_are_advised_where_they_were_asked_for(job_file):
    np.save(job_file.parent / "tokens.npy", np.ones((70_000, 8), "f4"))
    np.save(job_file.parent / "routing.npy", np.zeros((70_000, 2), "i4"))
    common = (job_file, "--threads", 4, "--json")
    chosen = json.loads(invoke(*common))
    assert chosen["chunk_rows"] < chosen["advised_chunk_rows"] / 2, "so that all threads have some"
    assert chosen["advice"] == []
    asked = json.loads(invoke(*common, "--chunk-rows", chosen["chunk_rows"]))
    assert any("chunks of about" in said for said in asked["advice"])


def test_tasks_that_take_the_scheduler_no_time_are_not_advised_against(job_file):
    fast = ("--rates", "flops=1e15,copy=1e15,read=1e15,write=1e15")
    content = json.loads(invoke(job_file, "--chunk-rows", 250, *fast, "--json"))
    assert content["busy_seconds"] < content["scheduler_seconds"] < 0.01
    assert content["chunk_rows"] < content["advised_chunk_rows"]
    assert content["advice"] == []


def test_a_placement_file_of_many_layers_is_read_for_the_layer_of_the_job(tmp_path):
    """By SGLang's number, and by vLLM Ascend's, which counts MoE layers alone."""
    checkpoint = FIXTURES / "qwen3_moe"
    experts = load_moe_layer(checkpoint, LAYER).experts
    assert moe_layers(checkpoint) == [LAYER] == [1], "layer 0 is dense"
    placement = Placement(np.arange(experts.num_experts)[::-1].reshape(2, -1))
    write_sglang(tmp_path / "sglang.json", {1: placement})
    write_vllm_ascend(tmp_path / "ascend.json", [placement])
    np.save(tmp_path / "hidden.npy", np.ones((30, experts.d), "f4"))
    path = tmp_path / "job.toml"
    path.write_text(
        f'tokens = "hidden.npy"\nlayer = "{checkpoint}"\nlayer_index = 1\n'
        'out = "out.npy"\nworld_size = 2\n'
    )
    for file in (tmp_path / "sglang.json", tmp_path / "ascend.json"):
        content = json.loads(invoke(path, "--placement", file, "--json"))
        compared = json.loads(invoke(path, "--json", "--what-if", f"placement={file}"))
        for one in (content, *compared["plans"]):
            assert one["physical"] == placement.physical.tolist()
        job = load_job(path, placement=str(file))
        run_job(job, Threads(1), overwrite=True)
        settings = journal.read_manifest(f"{job.out}.progress")["settings"]
        assert Placement.from_json(settings["placement"]) == placement


def test_within_a_limit_the_plan_is_of_the_chunks_that_a_run_takes(job_file, tmp_path):
    limit = ("--memory-limit", "180.29 MB", "--threads", 1)
    content = json.loads(invoke(job_file, *limit, "--json"))
    assert content["memory_bytes"] <= content["memory_limit"]
    job = load_job(job_file, out=str(tmp_path / "other.npy"))
    run_job(job, Threads(1, content["memory_limit"]))
    manifest = journal.read_manifest(f"{job.out}.progress")
    assert max(manifest["rows"]) == content["chunk_rows"]
    assert len(manifest["rows"]) == content["chunks"]


def test_the_command_says_what_travels(job_file, tmp_path):
    saved = tmp_path / "placement.json"
    common = (job_file, "--processes", 4, "--chunk-rows", 100, "--json")
    rows, experts = (
        json.loads(invoke(*common, "--travel", how, "--save", saved)) for how in ("rows", "experts")
    )
    assert Placement.from_json(saved.read_text()).local
    assert (rows["replicas"], experts["exchanged_bytes"]) == (0, 0)
    assert experts["stored_bytes"] == (8 + experts["replicas"]) * 8 * 8 * 4
    # The slower of the two is not used.
    rates = {"slow link": ("--link-rate", "1 kB"), "slow disk": ("--read-rate", "1 kB")}
    slow_link, slow_disk = (
        json.loads(invoke(*common, "--travel", "auto", *rate)) for rate in rates.values()
    )
    assert slow_link["physical"] == experts["physical"]
    assert slow_disk["replicas"] == 0
    assert slow_link["policy"] == "contiguous, travel auto"
    said = invoke(job_file, "--processes", 4, "--travel", "experts", "--chunk-rows", 100)
    assert re.search(rf"of these, replicas\W+{experts['replicas']}, ", said)


def test_nothing_is_read_for_rows_that_do_not_leave_their_worker(job_file):
    common = (job_file, "--world-size", 4, "--chunk-rows", 100, "--json", "--travel", "experts")
    two, four = (json.loads(invoke(*common, "--processes", n)) for n in (2, 4))
    assert two["exchanged_bytes"] == four["exchanged_bytes"] == 0
    assert two["rank_experts"] == [6, 6, 6, 6]  # its own and those of two ranks elsewhere
    assert four["rank_experts"] == [8, 8, 8, 8]


def test_what_travels_is_a_choice_to_compare(job_file):
    content = json.loads(
        invoke(job_file, "--processes", 4, "--json", "--what-if", "travel=rows,auto,experts")
    )
    assert [p["policy"] for p in content["plans"]] == [
        *("contiguous", "contiguous, travel auto", "contiguous, travel experts")
    ]


def test_further_experts_of_a_worker_fit_into_memory(job_file):
    common = (job_file, "--processes", 4, "--json", "--chunk-rows", 100, "--link-rate", "1 kB")
    at_worst = need(open_inputs(load_job(job_file)).work(), Layout(4, 4, 1)).at(100)
    enough = at_worst + 2 * 8 * 8 * 4  # two experts for each rank
    limit = math.ceil(enough / PART_OF_A_WORKER)
    limited = json.loads(invoke(*common, "--travel", "auto", "--memory-limit", limit))
    assert limited["fits"]
    assert limited["rank_experts"] == [4, 4, 4, 4]
    free = json.loads(invoke(*common, "--travel", "auto"))
    assert free["rank_experts"] == [8, 8, 8, 8]


# --- on GPUs -------------------------------------------------------------------------------------

GPU = ("--gpu", "--rates", "flops=6e14,copy=2e12,lane=2.5e10")


@pytest.fixture
def no_gpu(monkeypatch):
    def find_devices():
        raise NoDeviceError("no GPU is here")

    monkeypatch.setattr(device, "find_devices", find_devices)


@pytest.mark.usefixtures("no_gpu")
def test_a_plan_on_gpus_that_are_not_here(job_file):
    output = invoke(job_file, *GPU, "--world-size", 4, "--device-memory-limit", "1 GiB")
    assert "4 (contiguous) on 4 GPUs" in output
    assert re.search(r"peak memory of a GPU .* of 1.00 GiB", output)
    assert "of its worker on the host" in output
    content = json.loads(invoke(job_file, *GPU, "--memory-limit", "2 GiB", "--json"))
    assert (content["gpu"], content["workers"], content["threads"]) == (True, 1, 3)
    assert (content["memory_limit"], content["host_limit"]) == (None, 2 << 30)
    assert content["rates"]["lane"] == 2.5e10
    compared = json.loads(invoke(job_file, *GPU, "--json", "--what-if", "world_size=1,2"))
    assert [one["workers"] for one in compared["plans"]] == [1, 2]


def test_a_plan_on_gpus_that_are_here(job_file, monkeypatch):
    cards = [device.Device(index, "card", 10 << 30) for index in range(2)]
    monkeypatch.setattr(device, "find_devices", lambda: cards)
    content = json.loads(invoke(job_file, *GPU, "--json"))
    assert (content["world_size"], content["workers"]) == (2, 2)
    assert content["memory_limit"] == 9 << 30


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--gpu"], "no GPU is here. Give the rates as rates=Rates.* or --rates flops="),
        ([*GPU, "--device-memory-limit", "300 MB"], "the memory limit of a GPU of 300 MB must"),
        ([*GPU, "--processes", 2], "--processes has no effect with --gpu"),
        (["--device-memory-limit", "1 GB"], "--device-memory-limit needs --gpu"),
        ([*GPU, "--device-memory-limit", "0.9"], "invalid size: '0.9'"),
        ([*GPU, "--device-memory-limit", "-5GB"], "invalid size: '-5GB'"),
        (["--rates", "flops=0,copy=1"], "rates must be finite numbers above 0"),
        (["--rates", "flops=1,copy=-1"], "rates must be finite numbers above 0"),
        (["--rates", "flops=1"], "--rates needs flops and copy, and takes flops, .*lane"),
        (["--rates", "flops=fast,copy=1"], "a rate is NAME=NUMBER, .* got 'flops=fast'"),
    ],
)
def test_what_a_plan_on_gpus_refuses(job_file, options, words):
    result = CliRunner().invoke(plan_command, [str(job_file), *map(str, options)])
    said = " ".join(f"{result.output} {result.exception}".split())
    assert result.exit_code != 0
    assert re.search(words, said), said


@pytest.mark.parametrize("processes", [2, 16])
def test_threads_are_proposed_where_they_are_faster(job_file, monkeypatch, processes):
    """Nothing is exchanged between threads: with the same rates a small job is faster there."""
    monkeypatch.setattr("dask_ep.jobs.plan.CPU_COUNT", 2)
    output = invoke(job_file, "--processes", processes, "--rates", "flops=1e10,copy=1e9")
    text = " ".join(output.split())
    assert "advice: use threads of one process (--threads 2): they take about" in text
    assert "and 1 to 3 s to start the workers" in text
    on_threads = invoke(job_file, "--threads", 2, "--rates", "flops=1e10,copy=1e9")
    assert "start the workers" not in on_threads
    assert "use threads" not in on_threads
