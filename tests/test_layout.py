"""The package keeps its shape: what lies at the top, who imports whom, and what an import costs."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dask_ep"

GROUND = (
    "arrays bfloat16 blas checks command corpus costs device errors files fingerprint fused "
    "grouped interrupts journal mapped memory npy_header reference replace safetensors_header "
    "source zarr_layout"
)
KERNEL_AND_DATA = (
    "device_memory dispatch expert kinds local output quantized remote segments served sources "
    "spill weights writers writing"
)
MIDDLE = (
    "ahead capacity exchange experts held lazy_routing packing placement placement_files "
    "rebalance routing rows scores slots survey travel wire"
)
TOP = (
    "at_home block checkpoint checkpoint_files cluster decide device_probe expert_major families "
    "family figures gpus guard handover held_rows homes memory_law owner_map owner_plugin "
    "ownership passes price price_gpus price_passes probe ranks record resume rounding "
    "spilled_rows storage window work"
)
JOBS = (
    "begun build example in_passes inspect_ job notes options places planner report run run_report "
    "sample terminal verify workers"
)

COMMANDS = "example_command inspect_command plan_command run_command verify_command"

LAYERS = [
    set(layer.split())
    for layer in (
        GROUND,
        KERNEL_AND_DATA,
        MIDDLE,
        "pipeline",
        "layer",
        TOP,
        JOBS,
        COMMANDS,
        "cli",
    )
]
"""From the bottom up. A module may import those below it, and others of its own layer."""

ONLY = {
    "distributed": {
        *(
            "at_home",
            "cluster",
            "gpus",
            "handover",
            "homes",
            "owner_plugin",
            "ownership",
            "places",
            "run",
            "run_command",
        ),
        "run_report",
        "window",
        "wire",
        "workers",
    },
    "torch": set(),
    "cupy": {"device"},
}
"""Who may import what, anywhere in the module."""


def modules() -> dict[str, Path]:
    return {path.stem: path for path in PACKAGE.glob("*.py") if not path.stem.startswith("__")}


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
    return {
        name.split(".")[1]
        for name in imports(path, **kwargs)
        if name.startswith("dask_ep.") and name.split(".")[1] in modules()
    }


def test_the_visible_top_level_is_what_it_should_be():
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    visible = {path.split("/")[0] for path in tracked if not path.startswith(".")}
    assert visible == {"pyproject.toml", "README.md", "dask_ep", "workflows", "tests"}


def test_every_module_has_its_layer():
    listed = [name for layer in LAYERS for name in layer]
    assert sorted(listed) == sorted(modules())


def test_arrows_point_down_only():
    height = {name: level for level, layer in enumerate(LAYERS) for name in layer}
    upward = [
        f"{name} imports {other}"
        for name, path in modules().items()
        for other in own_imports(path)
        if height[other] > height[name]
    ]
    assert not upward


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


@pytest.mark.parametrize(("code", "absent"), LIGHT.items(), ids=LIGHT)
def test_an_import_costs_only_what_it_uses(code, absent):
    script = f"{code}\nimport sys\nprint(*sorted({absent!r} & sys.modules.keys()))"
    loaded = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert not loaded


HELP = """
import sys
from dask_ep import cli
try:
    cli.main(["--help"])
except SystemExit:
    print("imported", *{name.partition(".")[0] for name in sys.modules})
"""


def test_help_imports_nothing_heavy():
    said, _, loaded = subprocess.run(
        [sys.executable, "-c", HELP], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.partition("imported")
    assert "verify  " in said
    heavy = {"dask", "numpy", "distributed", "zarr", "scipy", "safetensors", "rich", "bokeh"}
    assert not heavy & set(loaded.split())


def test_ruff_finds_nothing():
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_version_is_said_once():
    import dask_ep

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "version" in project.get("dynamic", ()) or project["version"] == dask_ep.__version__


def test_ci_runs_the_test_command_of_the_readme():
    command = (ROOT / ".ci" / "run").read_text().splitlines()[-1]
    assert command in (ROOT / "README.md").read_text()
