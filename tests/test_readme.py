"""The README's examples run, word for word, in the order in which they stand."""

from __future__ import annotations

import doctest
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
BLOCK = re.compile(r"^```(python|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_examples_run_as_they_stand(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tests").symlink_to(README.parent / "tests")
    names: dict[str, object] = {}
    ran = {"python": 0, "console": 0}
    for kind, text in BLOCK.findall(README.read_text()):
        ran[kind] += 1
        if kind == "python":
            run_python(text, names)
        else:
            run_commands(text)
    assert ran["python"] >= 3
    assert ran["console"] >= 2


def run_python(text: str, names: dict[str, object]) -> None:
    example = doctest.DocTestParser().get_doctest(text, names, "README.md", str(README), 0)
    assert example.examples
    said: list[str] = []
    doctest.DocTestRunner(optionflags=FLAGS).run(example, out=said.append, clear_globs=False)
    names.update(example.globs)
    if said:
        pytest.fail("".join(said))


def run_commands(text: str) -> None:
    commands = [line.removeprefix("$ ") for line in text.splitlines() if line.startswith("$ ")]
    assert commands
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "dask-ep"
        installed = Path(sys.executable).with_name(program)
        done = subprocess.run([installed, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
