"""The README's examples run, word for word, in the order in which they stand."""

from __future__ import annotations

import doctest
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import dask_ep
from dask_ep.jobs.job import EXPERT_KEYS, Job

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
    assert ran["console"] >= 1


def test_it_is_short():
    assert len(README.read_text().splitlines()) <= 250


def test_it_names_all_that_is_public():
    text = section("Names")
    assert set(re.findall(r"`(\w+)`", text[: text.index("`dask_ep.errors`")])) == {
        *dask_ep.__all__,
        "dask_ep",
    }


def test_its_table_of_keys_is_whole():
    """The keys of a job, and those of its experts."""
    lines = re.findall(r"^\| (`.*?) \| ", section("Jobs on files"), re.MULTILINE)
    named = {key for line in lines for key in re.findall(r"`([a-z_]+)`", line)}
    of_experts = {key for keys in EXPERT_KEYS.values() for key in keys}
    keys = {field.name for field in fields(Job)} - {"name"} | {"kind"} | of_experts
    assert named == keys


def test_its_links_lead_somewhere():
    text = README.read_text()
    titles = re.findall("^## (.*)", text, re.MULTILINE)
    headings = {title.lower().replace(" ", "-").replace(",", "") for title in titles}
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in headings
        else:
            assert (README.parent / target).is_file(), target


def section(title: str) -> str:
    text = README.read_text()
    start = text.index(f"## {title}\n")
    return text[start : text.find("\n## ", start)]


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
