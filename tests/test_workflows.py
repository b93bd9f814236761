"""Every script in workflows/ runs, at a size that takes seconds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

TOY_SIZES = {
    "benchmark.py": ["--rows", "512", "--chunk-rows", "256", "--repeat", "1", "top1-linear"],
    "quickstart.py": ["--rows", "600", "--d", "16", "--experts", "4"],
}
"""The arguments with which each script is small."""

SAYS = {
    "benchmark.py": "kernel",
    "quickstart.py": "good",
}
"""What its output must contain."""


def test_every_script_is_in_the_table():
    assert {path.name for path in (ROOT / "workflows").glob("*.py")} == set(TOY_SIZES) == set(SAYS)


@pytest.mark.parametrize("name", list(TOY_SIZES))
def test_script(name, tmp_path):
    ran = subprocess.run(
        [sys.executable, "-W", "error", ROOT / "workflows" / name, *TOY_SIZES[name]],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert SAYS[name] in ran.stdout
