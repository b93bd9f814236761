"""Token files larger than the memory that a run may use go through it.

The bound is what `dask_ep.laws.memory_law.need` says, for the whole process tree, however many rows
there are.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dask_ep.jobs.build import open_inputs
from dask_ep.jobs.job import load_job
from dask_ep.laws.memory_law import Layout, need

D, D_OUT, EXPERTS, CHUNK_ROWS, THREADS = 512, 64, 8, 4096, 2
CHUNK_BYTES = CHUNK_ROWS * D * 4


def peak_of(command: list[str]) -> int:
    """Run a command of one process; give its largest resident bytes, which the kernel keeps."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        status, peak = Path(f"/proc/{process.pid}/status"), 0
        while process.poll() is None:
            if most := re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE):
                peak = int(most[1]) << 10
            time.sleep(0.02)
        assert process.returncode == 0, process.stderr.read().decode()
    return peak


def write_job(folder: Path, rows: int, **keys: object) -> Path:
    """A job over a sparse token file: as many bytes to read as said, few on the disk."""
    folder.mkdir()
    tokens = np.lib.format.open_memmap(folder / "tokens.npy", "w+", np.float32, (rows, D))
    tokens[-1] = 1
    del tokens
    np.save(folder / "routing.npy", np.arange(rows, dtype=np.int32)[:, None] % EXPERTS)
    np.save(folder / "w.npy", np.ones((EXPERTS, D, D_OUT), np.float32))
    paths = {"tokens": "tokens.npy", "routing": "routing.npy", "out": "out.zarr"}
    lines = [f"{key} = {value!r}" for key, value in (paths | keys).items()]
    lines.append('experts = {kind = "linear", w = "w.npy"}')
    (folder / "job.toml").write_text("\n".join(lines))
    return folder / "job.toml"


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 4])
def test_peak_memory_is_bounded_and_does_not_grow_with_the_rows(tmp_path, world_size):
    peaks = {}
    for chunks in (40, 160):
        job = write_job(tmp_path / str(chunks), chunks * CHUNK_ROWS, world_size=world_size)
        command = [sys.executable, "-m", "dask_ep", "run", str(job), "--threads", str(THREADS)]
        peaks[chunks] = peak_of([*command, "--chunk-rows", str(CHUNK_ROWS)])
        out = np.asarray(_last_row(job.parent / "out.zarr"))
        np.testing.assert_array_equal(out, np.full(D_OUT, D))
    inputs = open_inputs(load_job(job))
    bound = need(inputs.work(), Layout(world_size, 1, THREADS)).at(CHUNK_ROWS)
    assert 3 * bound < 160 * CHUNK_BYTES
    assert max(peaks.values()) <= bound
    assert peaks[160] <= peaks[40] + 4 * CHUNK_BYTES


def _last_row(path: Path) -> np.ndarray:
    import zarr

    return zarr.open_array(path, mode="r")[-1]
