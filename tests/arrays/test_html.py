"""What a notebook shows of layers, experts, placements, plans and runs is well-formed and true."""

from __future__ import annotations

from xml.etree import ElementTree

import numpy as np
import pytest

from dask_ep import (
    Experts,
    Machine,
    Placement,
    Rates,
    Threads,
    load_moe_layer,
    plan,
    plan_job,
    run_job,
    verify_job,
)
from dask_ep.jobs.example import Example, write_example
from tests.checkpoints import FIXTURES

RATES = Rates(flops=1e9, copy=1e9)


def cells(shown: object) -> dict[str, str]:
    """The table of an object by its rows, read by a parser that forgives nothing."""
    table = ElementTree.fromstring(shown._repr_html_())
    assert table.tag == "table"
    return {row.find("th").text: row.find("td").text for row in table.iter("tr")}


def test_experts_and_layers():
    gate, down = np.ones((2, 3, 4), np.float32), np.ones((2, 4, 3), np.float32)
    shown = cells(Experts.gated(gate, gate, down))
    assert (shown["kind"], shown["num experts"], shown["hidden"]) == ("gated", "2", "4")
    assert shown["nbytes"] == "288 B"
    layer = cells(load_moe_layer(FIXTURES / "qwen2_moe", 1))
    assert layer.keys() == {"router", "experts", "shared"}
    assert "num_experts=9" in layer["experts"]


def test_placements():
    shown = cells(Placement([[0, 2], [1, -1]]))
    assert shown == {"rank 0": "0, 2", "rank 1": "1, empty"}


def test_plans():
    tokens, routing = np.ones((6, 4), np.float32), np.array([0, 1, 0, 1, 0, 1])
    experts = np.ones((2, 4, 4), np.float32)
    machine = Machine(workers=1, threads=1, memory_limit="1 GiB")
    shown = cells(plan(tokens, routing, experts, machine=machine, rates=RATES))
    assert shown["token rows"] == "6"
    assert shown["peak memory of a worker"].endswith("of 1.00 GiB")


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> str:
    sizes = {"rows": 200, "d": 8, "num_experts": 4, "chunk_rows": 50}
    return str(write_example(tmp_path_factory.mktemp("<job>"), Example(**sizes, format="npy")))


def test_what_was_planned_run_and_verified(job):
    assert cells(plan_job(job, Threads(1), rates=RATES))["token rows"] == "200"
    done = run_job(job, Threads(1))
    shown = cells(done)
    assert (shown["output"], shown["rows computed"]) == (done.out, "200")
    assert "<job>" in shown["output"], "as it is, and not as a tag"
    assert done.open().shape == (200, 8)
    assert done.out in repr(done)
    assert cells(verify_job(job))["good"] == "True"
