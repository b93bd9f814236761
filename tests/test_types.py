"""The types that the package declares hold: its users' editors and checkers rely on them.

mypy, not pyright: it comes with pip alone, and checks again in two seconds what has not changed.
"""

from __future__ import annotations

import subprocess
import sys

from tests.test_layout import ROOT


def test_mypy_finds_nothing():
    done = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
