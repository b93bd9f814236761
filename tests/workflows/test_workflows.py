"""Every script in workflows/ runs, at a size that takes seconds."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import dask
import numpy as np
import pytest

from tests.checkpoints import FIXTURES, write_tensors

ROOT = Path(__file__).parents[1].parent


class Toy(NamedTuple):
    """A script at a size that takes seconds."""

    arguments: list[str]
    says: str
    #: what its output must contain
    exit_code: int = 0


TOYS = {
    "benchmark.py": Toy(
        ["--rows", "512", "--chunk-rows", "256", "--repeat", "1", "top1-linear"],
        "on one thread: products ",
    ),
    "benchmark_gpu.py": Toy(["qwen3"], "nothing was measured: ", exit_code=1),
    "faults.py": Toy(
        ["--moments", "1", "--fault", "retired", "scheduler"], "us per chunk without owners"
    ),
    "chaos.py": Toy(["--seeds", "1"], "1 of 1 seeds are right"),
    "collect_cost.py": Toy(
        ["--rows", "512", "--chunk-rows", "256", "--d", "32", "--hidden", "64", "--repeat", "1"],
        "times the layer alone",
    ),
    "decode_cost.py": Toy(["--rows", "256", "--columns", "256", "--repeat", "1"], "GGUF Q6_K"),
    "engine_records.py": Toy(
        ["write", "1=routing.npy", "--experts", "8", "--out", "counts.json"],
        "counts.json: 1 layers",
    ),
    "exchange_cost.py": Toy(["bytes", "--scale", "0.1"], "received / law"),
    "gpu_cluster.py": Toy(
        ["--nodes", "gpu01", "gpu02", "--print"],
        "ssh gpu02 '",
    ),
    "imbalance.py": Toy(["--seeds", "1", "--layers", "2"], "2 layers of 256 experts"),
    "larger_experts.py": Toy(
        [
            *("--rows", "1000", "--d", "256", "--hidden", "2048", "--experts", "96"),
            *("--memory-limit", "450MB", "--threads", "1"),
        ],
        "dask_ep (hold, passes: 1)",
    ),
    "place_for_serving.py": Toy(
        [
            *("3=routing.npy", "--experts", "8", "--ranks", "2", "--physical-experts", "10"),
            *("--model-layers", "4", "--out", "location.json"),
        ],
        "largest over mean rows of a rank",
    ),
    "plan_accuracy.py": Toy(
        ["--scale", "0.03", "--only", "threads-many-chunks", "processes-many-chunks"],
        "tasks, rows and bytes are equal in 2 of 2 jobs",
    ),
    "prune_experts.py": Toy(
        [
            *(str(FIXTURES / "mixtral"), "stats.safetensors"),
            *("--keep", "0.5", "--score", "reap", "--out", "pruned"),
        ],
        "4 of 8 experts in each layer",
    ),
    "quickstart.py": Toy(["--rows", "600", "--d", "16", "--experts", "4"], "good"),
    "skewed.py": Toy(
        ["--rows", "1024", "--chunks", "4", "--rounds", "1", "time-4"], "| time-4 | exact | 1.0"
    ),
    "slurm.py": Toy(["--print"], "distributed.cli.dask_worker SCHEDULER"),
}


NEED_TORCH = {
    "compare_with_torch.py": {"torch"},
    "compare_with_transformers.py": {"torch", "transformers"},
    "walk_cost.py": {"torch", "transformers"},
    "walk_model.py": {"torch", "transformers"},
}
"""Scripts with requirements that the tests do not have: their headers state them."""


SHARED = {"measured.py"}
"""What scripts import from their own folder."""


def test_every_script_is_in_the_table():
    scripts = {path.name for path in (ROOT / "workflows").glob("*.py")}
    assert scripts == {*TOYS, *NEED_TORCH, *SHARED}


@pytest.mark.parametrize("name", sorted(NEED_TORCH))
def test_script_that_needs_torch_says_so(name):
    text = (ROOT / "workflows" / name).read_text()
    compile(text, name, "exec")
    header = re.search(r"# /// script\n(.*?)# ///\n", text, re.DOTALL).group(1)
    stated = tomllib.loads(re.sub(r"^# ?", "", header, flags=re.MULTILINE))["dependencies"]
    assert NEED_TORCH[name] <= {re.match(r"[\w-]+", one).group() for one in stated}


def test_only_a_process_can_be_killed(monkeypatch, capsys):
    workflow = runpy.run_path(str(ROOT / "workflows" / "larger_experts.py"))
    monkeypatch.setattr(sys, "argv", ["larger_experts.py", "--kill"])
    with pytest.raises(SystemExit):
        workflow["main"]()
    assert "--kill kills a worker process, so it needs --processes" in capsys.readouterr().err


def test_the_scheduler_of_gpu_nodes_makes_a_cuda_context_before_ucx_starts():
    workflow = runpy.run_path(str(ROOT / "workflows" / "gpu_cluster.py"))
    options = {"nodes": ["localhost"], "interface": None, "port": 1, "device_memory_limit": "0.9"}
    for protocol in ("ucx", "tcp"):
        asked = SimpleNamespace(protocol=protocol, **options)
        scheduler, _ = workflow["commands_of"](asked, f"{protocol}://127.0.0.1:1")
        given = [part for part in scheduler[: scheduler.index(sys.executable)] if "=" in part]
        said = dask.config.collect_env(dict(part.split("=") for part in given))
        with dask.config.set(said):
            made = dask.config.get("distributed-ucxx.create-cuda-context", False)
        assert made is (protocol == "ucx")


@pytest.mark.slow
@pytest.mark.parametrize("name", list(TOYS))
def test_script(name, tmp_path):
    np.save(tmp_path / "routing.npy", np.random.default_rng(0).integers(0, 8, (100, 2)))
    scores = {"reap.score": np.random.default_rng(0).random(8, "f4")}
    write_tensors(tmp_path / "stats.safetensors", scores)
    ran = subprocess.run(
        [sys.executable, "-W", "error", ROOT / "workflows" / name, *TOYS[name].arguments],
        capture_output=True,
        text=True,
        timeout=220,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        check=False,
    )
    assert ran.returncode == TOYS[name].exit_code, ran.stderr
    assert TOYS[name].says in (ran.stderr if ran.returncode else ran.stdout)


def test_a_ratio_above_its_limit_is_a_failed_measurement():
    table = runpy.run_path(str(ROOT / "workflows" / "measured.py"))["table"]
    said = table([{"kernel": 0.9, "copy": 0.9}, {"kernel": 0.8, "copy": 1.1}]).splitlines()
    assert said[2:] == [
        "| copy | failed, 1 of 2 are above 1 | 0.90 to 1.10 |",
        "| kernel | 0.85 | 0.80 to 0.90 |",
    ]
