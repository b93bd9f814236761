"""Every script in workflows/ runs, at a size that takes seconds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent


class Toy(NamedTuple):
    """A script at a size that takes seconds."""

    arguments: list[str]
    says: str
    #: what its output must contain


TOYS = {
    "benchmark.py": Toy(
        ["--rows", "512", "--chunk-rows", "256", "--repeat", "1", "top1-linear"], "kernel"
    ),
    "faults.py": Toy(["--moments", "1", "--fault", "retired"], "1 of 1"),
    "place_for_serving.py": Toy(
        [
            *("3=routing.npy", "--experts", "8", "--ranks", "2", "--slots", "10"),
            *("--model-layers", "4", "--out", "location.json"),
        ],
        "largest over mean rows of a rank",
    ),
    "quickstart.py": Toy(["--rows", "600", "--d", "16", "--experts", "4"], "good"),
    "slurm.py": Toy(["--print"], "distributed.cli.dask_worker tcp://"),
}


def test_every_script_is_in_the_table():
    assert {path.name for path in (ROOT / "workflows").glob("*.py")} == set(TOYS)


@pytest.mark.parametrize("name", list(TOYS))
def test_script(name, tmp_path):
    np.save(tmp_path / "routing.npy", np.random.default_rng(0).integers(0, 8, (100, 2)))
    ran = subprocess.run(
        [sys.executable, "-W", "error", ROOT / "workflows" / name, *TOYS[name].arguments],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert TOYS[name].says in ran.stdout
