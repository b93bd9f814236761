"""The table of model families says what the package does, and misses none that transformers has."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from dask_ep.layers.families import FAMILIES, REFUSED, find_family

ROOT = Path(__file__).parents[2]
HAS_EXPERTS = re.compile(
    r"^class \w*(Experts|MoE|Moe|MoeBlock|MoEBlock|SparseMLP|MoEMLP|MoeMLP)\(", re.MULTILINE
)
"""A class of an MoE block, as transformers calls them."""


def rows_of_table() -> dict[str, tuple[list[str], str]]:
    """Model types and what is done with them, by directory of transformers."""
    text = (ROOT / "workflows" / "README.md").read_text()
    section = text[text.index("## Model families") :].split("\n## ")[0]
    cells = [line.strip("| ").split(" | ") for line in section.splitlines() if "`" in line]
    return {row[0]: (re.findall(r"`([^`]+)`", row[1]), row[2]) for row in cells if len(row) == 3}


TABLE = rows_of_table()
READ_OTHERWISE = {"kimi_k2", "sarvam_moe", "sarvam_mla", "bailing_moe", "bailing_moe_v2"}
"""Read, and without a directory that has a block; the text above the table names them."""


def test_the_table_says_which_types_are_read_and_which_are_refused_and_why():
    read = {name for names, what in TABLE.values() if what == "read" for name in names}
    assert read | READ_OTHERWISE == {name for row in FAMILIES for name in row.model_types}
    refused = {name: what for names, what in TABLE.values() if what != "read" for name in names}
    assert refused == {name: f"refused: {why}" for name, why in REFUSED.items()}
    for name in refused:
        with pytest.raises(ValueError, match=f"{name} models cannot be read .*: "):
            find_family(name, FAMILIES)
    for name in READ_OTHERWISE:
        assert f"`{name}`" in (ROOT / "workflows" / "README.md").read_text()


def test_no_type_belongs_to_two_families():
    names = [name for row in FAMILIES for name in row.model_types]
    assert len(set(names)) == len(names)
    assert not set(names) & REFUSED.keys()


@pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)
def test_the_table_has_every_directory_of_transformers_with_an_moe_block():
    (place,) = importlib.util.find_spec("transformers").submodule_search_locations
    found = {}
    for path in sorted(Path(place, "models").glob("*/modeling_*.py")):
        if HAS_EXPERTS.search(path.read_text()):
            found.setdefault(path.parent.name, set()).update(
                name
                for config in path.parent.glob("configuration_*.py")
                for name in re.findall(r'^    model_type = "([^"]+)"', config.read_text(), re.M)
            )
    assert found.keys() - TABLE.keys() == set(), "not in the table of workflows/README.md"
    assert TABLE.keys() - found.keys() == set(), "no longer in transformers"
    unknown = {name: set(types) - found[name] for name, (types, _) in TABLE.items()}
    assert not any(unknown.values()), unknown
