"""The package keeps its shape: what lies at the top, who imports whom, and what an import costs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dask_ep"

ROOMS = (
    "arrays", "kernel", "storage", "experts", "placement", "laws", "graph", "layers", "pricing",
    "cluster", "jobs", "cli",
)  # fmt: skip
"""From the bottom up. A room may use those below it and itself; errors may be used everywhere."""

DISTRIBUTED = {"cluster", "jobs", "cli"}
"""Rooms that may import distributed; the others work without it."""

ONLY = {"torch": set(), "cupy": {"arrays.device"}}
"""Modules that may import what, anywhere in them."""


@cache
def modules() -> dict[str, Path]:
    """All modules of rooms, by room and name: ``kernel.dispatch``."""
    return {
        f"{path.parent.name}.{path.stem}": path
        for path in PACKAGE.glob("*/*.py")
        if not path.stem.startswith("__")
    }


def room_of(module: str) -> str:
    return module.partition(".")[0]


@cache
def imports(path: Path, *, top_level: bool = False) -> set[str]:
    """Dotted names that a module imports; everywhere in it, or when it is itself imported."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if (isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and top_level)
        or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        for inner in ast.walk(node)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def own_imports(path: Path, **kwargs: bool) -> set[str]:
    """Modules of the package that a module imports."""
    names = {name.removeprefix("dask_ep.") for name in imports(path, **kwargs)}
    return {".".join(name.split(".")[:2]) for name in names} & modules().keys()


@pytest.mark.slow
def test_the_visible_top_level_is_what_it_should_be():
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    visible = {path.split("/")[0] for path in tracked if not path.startswith(".")}
    assert visible == {"pyproject.toml", "README.md", "dask_ep", "workflows", "tests"}


def test_every_module_is_in_a_room():
    outside = {path.stem for path in PACKAGE.glob("*.py")}
    assert outside == {"__init__", "__main__", "errors"}
    assert {room_of(module) for module in modules()} == set(ROOMS)


def test_rooms_and_modules_say_their_question_and_no_two_the_same():
    asked = {}
    for path in PACKAGE.rglob("*.py"):
        said = ast.get_docstring(ast.parse(path.read_text()))
        assert said, path
        assert asked.setdefault(said.splitlines()[0], path) == path


def listed_files() -> list[str]:
    """The modules in the reading order of CONTRIBUTING."""
    text = (ROOT / ".github" / "CONTRIBUTING.md").read_text()
    listed = []
    start = text.index("## The files, in reading order")
    for line in text[start : text.index("\n## ", start)].splitlines():
        if line.startswith("| `"):
            room, _, files = line.strip("| ").split(" | ")
            listed += [room.strip("`/") + "." + name.strip("`") for name in files.split(", ")]
    return listed


def test_arrows_between_rooms_point_down_only():
    upward = [
        f"{name} imports {other}"
        for name, path in modules().items()
        for other in own_imports(path)
        if ROOMS.index(room_of(other)) > ROOMS.index(room_of(name))
    ]
    assert not upward


def test_only_rooms_that_know_a_cluster_import_distributed():
    users = {
        name
        for name, path in modules().items()
        if any(found.split(".")[0] == "distributed" for found in imports(path))
    }
    assert {room_of(name) for name in users} <= DISTRIBUTED


def test_tests_are_in_the_same_rooms():
    rooms = {path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")}
    assert rooms - {"workflows"} <= set(ROOMS)


def test_there_are_no_import_cycles():
    graph = {name: own_imports(path) for name, path in modules().items()}
    while leaves := {name for name, others in graph.items() if not others & graph.keys()}:
        graph = {name: others for name, others in graph.items() if name not in leaves}
    assert not graph


def test_own_modules_are_imported_at_the_top():
    hidden = {
        name: sorted(deep)
        for name, path in modules().items()
        if (deep := own_imports(path) - own_imports(path, top_level=True))
    }
    assert not hidden


@pytest.mark.parametrize("package", ONLY)
def test_heavy_packages_are_imported_in_few_places(package):
    users = {
        name
        for name, path in modules().items()
        if any(found.split(".")[0] == package for found in imports(path))
    }
    assert users <= ONLY[package]


LIGHT = {
    "import dask_ep": {"dask", "numpy", "distributed", "zarr", "cupy", "bokeh", "rich", "click"},
    "import dask_ep; dask_ep.expert_parallel": {"distributed", "zarr", "cupy", "bokeh", "rich"},
    "import dask_ep; dask_ep.expert_parallel_dispatch": {"dask.array", "distributed", "zarr"},
}


@pytest.mark.slow
@pytest.mark.parametrize(("code", "absent"), LIGHT.items(), ids=LIGHT)
def test_an_import_costs_only_what_it_uses(code, absent):
    script = f"{code}\nimport sys\nprint(*sorted({absent!r} & sys.modules.keys()))"
    loaded = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert not loaded


HELP = """
import sys
from dask_ep.cli import main
try:
    main.main(["--help"])
except SystemExit:
    print("imported", *{name.partition(".")[0] for name in sys.modules})
"""


@pytest.mark.slow
def test_help_imports_nothing_heavy():
    said, _, loaded = subprocess.run(
        [sys.executable, "-c", HELP], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.partition("imported")
    assert "verify  " in said
    heavy = {"dask", "numpy", "distributed", "zarr", "scipy", "safetensors", "rich", "bokeh"}
    assert not heavy & set(loaded.split())


@pytest.mark.slow
def test_ruff_finds_nothing():
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_version_is_stated_once():
    import dask_ep

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "version" in project.get("dynamic", ()) or project["version"] == dask_ep.__version__


@pytest.mark.slow
def test_no_text_says_to_install_from_an_index_that_lacks_the_package():
    """There is a copy of the repository, and no package of this name to download."""
    tracked = subprocess.run(
        ["git", "ls-files", "*.md", "*.py", "*.sh", "*.yaml", "*.toml"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    told = re.compile("install" + r"[^\n]*[\s'\"]dask[-_]ep(\[|['\"\s]|$)", re.MULTILINE)
    assert not [path for path in tracked if told.search((ROOT / path).read_text())]


def test_ci_runs_the_test_command_of_the_readme():
    readme = (ROOT / "README.md").read_text().splitlines()
    (command,) = [line for line in readme if "-m pytest" in line]
    assert command in (ROOT / ".ci" / "run").read_text().splitlines()


def test_contributing_names_files_that_exist():
    text = (ROOT / ".github" / "CONTRIBUTING.md").read_text()
    named = set(re.findall(r"[\w./]+/[\w]+\.py", text)) - {"tests/ROOM/test_FILE.py"}
    assert len(named) > 20
    missing = {n for n in named if not ((ROOT / n).exists() or (PACKAGE / n).exists())}
    assert missing <= {"cli/NAME_command.py"}


def test_names_of_tasks_are_made_in_one_place():
    """Not in `storage`, which lies below it; and ``ep_serve`` is what workers ask each other."""
    spelled = {
        name
        for name, path in modules().items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and str(node.value).startswith("ep_")
    }
    assert spelled == {"graph.keys", "storage.storage", "storage.output", "cluster.exchange"}
