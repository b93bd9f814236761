"""The types that the package declares hold: its users' editors and checkers rely on them.

mypy, not pyright: it comes with pip alone, and checks again in two seconds what has not changed.
"""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import dask_ep
from tests.test_layout import PACKAGE, ROOT

USE = """
import numpy as np
from dask_ep import Placement, expert_parallel_dispatch

placement = Placement([[0, 1], [1, 0]])
ranks: int = placement.world_size
wrong: str = placement.world_size
expert_parallel_dispatch(np.ones((3, 2)), np.zeros(3, int), [np.eye(2)], 0, world_sizes=1)
from dask_ep import no_such_name
"""


def mypy(*args: str, cwd: Path = ROOT) -> list[str]:
    command = [sys.executable, "-m", "mypy", *args]
    environment = os.environ | {"MYPYPATH": str(ROOT)}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    return (done.stdout + done.stderr).splitlines()


@pytest.mark.slow
def test_the_package_has_no_wrong_types():
    assert mypy()[-1].startswith("Success: no issues found in ")


@pytest.mark.slow
def test_users_see_the_types_of_public_names(tmp_path):
    (tmp_path / "use.py").write_text(USE)
    shared = [
        "--config-file",
        str(ROOT / "pyproject.toml"),
        "--cache-dir",
        str(ROOT / ".mypy_cache"),
    ]
    *said, summary = mypy(*shared, "use.py", cwd=tmp_path)
    found = [line.partition(" error: ")[::2] for line in said if " error: " in line]
    assert [place for place, _ in found] == ["use.py:7:", "use.py:8:", "use.py:9:"], said
    assert "expected" in found[0][1] or "type" in found[0][1]
    assert "world_sizes" in found[1][1]
    assert "no_such_name" in found[2][1]
    assert summary.startswith("Found 3 errors")


def test_editors_see_the_names_that_are_imported_when_they_are_used():
    (seen,) = (
        node
        for node in ast.parse((PACKAGE / "__init__.py").read_text()).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    homes = {name.name: node.module for node in seen.body for name in node.names}
    assert sorted(homes) == sorted(dask_ep.__all__)
    for name, module in homes.items():
        assert getattr(importlib.import_module(module), name) is getattr(dask_ep, name)


def test_the_package_says_that_it_has_types():
    assert (PACKAGE / "py.typed").exists()
