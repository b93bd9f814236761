"""The way from a checkpoint to a pruned one, line by line as workflows/README.md has it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import dask
import dask.array as da
import numpy as np
import pytest

from dask_ep import load_moe_layer, store
from dask_ep.jobs.recompute import plain, plain_parts
from tests.checkpoints import FIXTURES, LAYER, read_tensors

ROOT = Path(__file__).parents[2]
HEADING = "## From a checkpoint to a pruned one"
NEEDS_TORCH = "python workflows/walk_model.py "


def story() -> list[str]:
    text = (ROOT / "workflows" / "README.md").read_text()
    return re.search(rf"{HEADING}\n.*?```sh\n(.*?)```", text, re.DOTALL).group(1).splitlines()


def reap_by_hand(hidden: np.ndarray) -> np.ndarray:
    """Mean of weight times norm of the expert's output over the rows of each expert, in loops."""
    layer = load_moe_layer(FIXTURES / "mixtral", LAYER)
    indices, weights = dask.compute(
        *layer.route(da.from_array(hidden, chunks=-1)), scheduler="sync"
    )
    scores = []
    for e in range(layer.experts.num_experts):
        expert, rows = plain(*plain_parts(layer.experts, e)), np.argwhere(indices == e)
        terms = [weights[r, s] * np.linalg.norm(expert(hidden[r].astype(float))) for r, s in rows]
        scores.append(np.mean(terms) if terms else 0.0)
    return np.array(scores)


@pytest.mark.slow
def test_each_line_runs_and_the_best_experts_by_reap_stay(tmp_path):
    hidden = np.random.default_rng(0).standard_normal((400, 32)).astype("f4")
    rows = tmp_path / "acts" / "moe_input_001.zarr"
    rows.parent.mkdir()
    store(da.from_array(hidden, chunks=(100, -1)), rows, scheduler="sync")
    (tmp_path / "MODEL").symlink_to(FIXTURES / "mixtral")
    (tmp_path / "workflows").symlink_to(ROOT / "workflows")
    lines, bin_folder = story(), Path(sys.executable).parent
    assert len(lines) <= 10
    ran = [line for line in lines if not line.startswith(NEEDS_TORCH)]
    assert len(ran) == len(lines) - 1
    environment = os.environ | {
        "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    said = [
        subprocess.run(
            line, shell=True, cwd=tmp_path, env=environment, check=True, capture_output=True,
            text=True,
        ).stdout
        for line in ran
    ]  # fmt: skip
    scores = reap_by_hand(hidden)
    stats = read_tensors(tmp_path / "stats" / f"stats_{LAYER:03d}.safetensors")
    np.testing.assert_allclose(stats["reap.score"], scores, rtol=1e-5)
    kept = sorted(np.argsort(-scores)[:6].tolist())
    assert f"layer 1: experts {', '.join(map(str, kept))}," in "".join(said)
    assert load_moe_layer(tmp_path / "PRUNED", LAYER).experts.num_experts == 6
    assert "error of a row, |a - b| / |a|: median" in said[-1]


def test_the_scripts_that_the_lines_name_exist():
    for text in (ROOT / "README.md", ROOT / "workflows" / "README.md"):
        for script in re.findall(r"workflows/[a-z_]+\.(?:py|sh|yaml)", text.read_text()):
            assert (ROOT / script).is_file(), f"{text.name} names {script}"
