"""The state of the house, in figures: ``pytest -s tests/test_house.py`` prints them.

A function's length is that of its body without its docstring; a class's is all of it, docstrings
too. Names are public where they do not begin with ``_``.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from statistics import median

import pytest

from tests.test_layout import PACKAGE, ROOT, listed_files, modules, own_imports, room_of

LINES_BEFORE_THE_ROOMS = 23_432

LAZY = {
    "cupy": "optional",
    "dask_cuda": "optional",
    "fsspec": "only for addresses",
    "gguf": "only for GGUF files",
    "zarr": "a third of a second; no part of `import dask_ep`",
    "scipy": "slow, and for one activation alone",
    "bokeh": "slow, and for reports alone",
}
"""Packages that are imported inside functions, and why."""

TWO_FORMS = {
    "ACTIVATIONS": "in place, in plain loops, with their rounding",
    "add_rows": "host, device",
    "expert_parallel_dispatch": "fast, in plain loops",
    "gather": "host, device",
    "sort_slots": "host, device",
}
"""Names that mean the same in two modules."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


@pytest.fixture(scope="module")
def trees() -> dict[str, ast.Module]:
    return {name: ast.parse(path.read_text()) for name, path in modules().items()}


def largest_cycle(graph: dict[str, set[str]]) -> int:
    """Nodes of the largest set that all reach each other; 0 without a cycle."""

    def reached(start: str) -> set[str]:
        found: set[str] = set()
        ahead = set(graph[start])
        while ahead:
            found |= ahead
            ahead = set().union(*(graph[node] for node in ahead)) - found
        return found

    reach = {node: reached(node) for node in graph}
    return max(sum(node in reach[o] for o in reach[node]) for node in graph)


def test_a_cycle_is_found():
    assert largest_cycle({"a": {"b"}, "b": {"c"}, "c": set()}) == 0
    assert largest_cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == 2


def test_neither_files_nor_rooms_import_in_a_circle():
    files = {name: own_imports(path) for name, path in modules().items()}
    rooms: dict[str, set[str]] = defaultdict(set)
    for name, others in files.items():
        rooms[room_of(name)] |= {room_of(other) for other in others} - {room_of(name)}
    print(f"\nlargest import cycle: {largest_cycle(files)} files, {largest_cycle(rooms)} rooms")
    assert largest_cycle(files) == largest_cycle(rooms) == 0


def test_the_reading_order_has_every_file():
    files = listed_files()
    print(f"\n{len(files)} files in the reading order, of {len(modules())}")
    assert sorted(files) == sorted(modules())


def test_a_row_is_followed_in_at_most_seven_files():
    text = (ROOT / ".github" / "CONTRIBUTING.md").read_text()
    walk = text[text.index("One row, from file to file") : text.index("The answer goes back")]
    walk = re.sub(r"\[[^]]*\]", "", walk)  # what need not be opened
    files = dict.fromkeys(re.findall(r"`(\w+)/(\w+)\.py`", walk))
    print(f"\nfrom file to file, a row takes {len(files)}:", *(".".join(file) for file in files))
    assert len(files) <= 7
    assert {".".join(file) for file in files} <= modules().keys()


def inner_imports(tree: ast.Module) -> Iterator[str]:
    for function in ast.walk(tree):
        if isinstance(function, Function):
            for node in ast.walk(function):
                if isinstance(node, ast.Import):
                    yield from (alias.name for alias in node.names)
                elif isinstance(node, ast.ImportFrom):
                    yield node.module


def test_imports_inside_functions_are_where_laziness_is_the_point(trees):
    found = {(name, what) for name, tree in trees.items() for what in inner_imports(tree)}
    print("\nimports inside functions:")
    for name, what in sorted(found):
        print(f"  {name}: {what} ({LAZY.get(what.partition('.')[0], 'why?')})")
    assert {what.partition(".")[0] for _, what in found} == LAZY.keys()


def test_files_functions_and_classes_are_short(trees):
    files = {name: len(path.read_text().splitlines()) for name, path in modules().items()}
    functions, classes = {}, {}
    for module, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, Function):
                body = node.body[ast.get_docstring(node) is not None :]
                lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
                functions[f"{module}.{node.name}:{node.lineno}"] = lines
            elif isinstance(node, ast.ClassDef):
                classes[f"{module}.{node.name}"] = node.end_lineno - node.lineno + 1
    total = sum(len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py"))
    print(f"\n{total} lines in {len(files)} files; before the rooms {LINES_BEFORE_THE_ROOMS}")
    print(f"{len(functions)} functions, of {int(median(functions.values()))} lines (median)")
    limits = (("file", files, 455), ("function", functions, 45), ("class", classes, 250))
    for what, sizes, _ in limits:
        longest = sorted(sizes, key=sizes.get, reverse=True)[:5]
        print(f"longest {what}:", ", ".join(f"{name} {sizes[name]}" for name in longest))
    for what, sizes, limit in limits:
        over = {name: size for name, size in sizes.items() if size > limit}
        assert not over, f"a {what} has more than {limit} lines"


def public_names(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, (Function, ast.ClassDef)):
            yield node.name
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (target.id for target in targets if isinstance(target, ast.Name))


def test_public_names_mean_one_thing(trees):
    places = defaultdict(set)
    for module, tree in trees.items():
        for name in public_names(tree):
            if not name.startswith("_"):
                places[name].add(module)
    shared = {name: where for name, where in sorted(places.items()) if len(where) > 1}
    assert shared.keys() >= TWO_FORMS.keys()
    shared = {name: where for name, where in shared.items() if name not in TWO_FORMS}
    assert not shared, "these public names mean two things"
