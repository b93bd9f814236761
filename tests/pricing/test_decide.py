"""A job gets chunks that fit its memory limit, or is refused unread, with what would fit."""

from __future__ import annotations

import math
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr

from dask_ep.errors import DoesNotFit
from dask_ep.experts.experts import Experts
from dask_ep.experts.stored_experts import StoredExperts
from dask_ep.jobs import decide as decisions
from dask_ep.jobs.backends import Processes, Threads, lay_out
from dask_ep.jobs.build import Inputs, open_inputs
from dask_ep.jobs.decide import decide
from dask_ep.jobs.example import Example, write_example
from dask_ep.jobs.job import load_job
from dask_ep.jobs.plan import Machine, plan
from dask_ep.jobs.run import run_job
from dask_ep.laws.costs import (
    FEWEST_ROWS,
    PART_OF_A_WORKER,
    PROCESS_BYTES,
    SORT_BYTES,
    Need,
    Rates,
)
from dask_ep.laws.decision import Decision
from dask_ep.laws.memory_law import Layout, need
from dask_ep.laws.passes import choose_passes
from dask_ep.laws.work import Work
from dask_ep.placement.policies import POLICIES, contiguous
from dask_ep.storage import sources
from dask_ep.storage.storage import open_tokens
from tests.checkpoints import FIXTURES

TILE_BYTES = 8 * 1024 * 512 * 4
"""Of the tiles of one thread: eight of 1024 rows of 512 numbers."""

RATES = Rates(flops=1e10, copy=1e9)
ROOT = Path(__file__).parents[1].parent

MEASURED = """
import sys
from dask_ep.cli.main import main
from dask_ep.pricing.trace import peak_memory
try:
    main(sys.argv[1:])
finally:
    print("peak", peak_memory())
"""


@pytest.fixture(scope="module")
def job_file(tmp_path_factory) -> Path:
    """4 MB of tokens, stored in chunks of 500 rows, through 16 experts of 1 MB."""
    sizes = {"rows": 2000, "d": 512, "num_experts": 16, "k": 2, "chunk_rows": 500}
    return write_example(tmp_path_factory.mktemp("fit"), Example(**sizes, format="npy"))


@pytest.fixture
def inputs(job_file) -> Inputs:
    return open_inputs(load_job(job_file))


@pytest.mark.parametrize(
    ("layout", "chunks", "experts", "remark"),
    [
        (Layout(1, 1, 2), 8, 16, "one rank: a chunk, its output, one before each; two read ahead"),
        (Layout(2, 2, 1), 20, 8, "a row may go to both ranks"),
        (Layout(4, 2, 1), 23, 8, "two ranks a worker; a row has two slots, so goes to two ranks"),
        (Layout(4, 4, 1, placement="balanced"), 29, 5, "a spare slot on every rank"),
        (Layout(4, 4, 1, placement="exact"), 29, 5, "at most one spare slot"),
        (Layout(4, 4, 1, placement="packed"), 29, 4, "no replicas"),
    ],
)
def test_what_a_worker_needs(inputs, layout, chunks, experts, remark):
    law = need(inputs.work(), layout)
    assert (law.chunks, law.expert_bytes) == (chunks, experts << 20), remark
    scratch = layout.threads * (TILE_BYTES + 100 * 2 * 48)
    assert law.at(100) == PROCESS_BYTES + (experts << 20) + scratch + chunks * 100 * 512 * 4


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("policy", POLICIES)
def test_it_is_the_law_of_plans_and_never_below_what_the_routing_says(inputs, ranks, policy):
    layout = Layout(ranks, ranks, 1, placement=policy)
    tokens = open_tokens(inputs.tokens, chunks=500)
    routing = open_tokens(inputs.routing, like=tokens)
    priced = plan(
        tokens,
        routing,
        inputs.experts,
        world_size=ranks,
        placement=policy,
        rates=RATES,
        machine=Machine(threads=1),
    )
    at_most = need(inputs.work(), layout).at(500)
    assert priced.memory_bytes <= at_most
    if ranks == 1:
        assert priced.memory_bytes == at_most


def test_stored_chunks_that_are_decoded_whole_are_counted_where_they_are_read(tmp_path):
    N, d, MB = 8000, 512, 10**6
    tokens = zarr.create_array(tmp_path / "x.zarr", shape=(N, d), chunks=(N, d), dtype="f4")
    tokens[:] = 1.0  # compressed, as Zarr does by itself
    np.save(tmp_path / "r.npy", np.arange(N, dtype="i4") % 4)
    np.save(tmp_path / "w.npy", np.ones((4, d, d), "f4"))
    names = {"tokens": "x.zarr", "routing": "r.npy", "experts": "w.npy", "out": "y.npy"}
    compressed = open_inputs(load_job(**{k: str(tmp_path / name) for k, name in names.items()}))
    np.save(tmp_path / "x.npy", np.ones((N, d), "f4"))
    names["tokens"] = "x.npy"
    plain = open_inputs(load_job(**{k: str(tmp_path / name) for k, name in names.items()}))
    assert (plain.read_bytes, compressed.read_bytes) == (0, 2 * N * d * 4)
    layout = Layout(1, 1, 2)
    law, more = need(compressed.work(), layout), 2 * 2 * N * d * 4
    assert law.at(100) == need(plain.work(), layout).at(100) + more
    priced = plan(
        open_tokens(compressed.tokens, chunks=100), open_tokens(compressed.routing, chunks=100),
        compressed.experts, rates=RATES, machine=Machine(workers=1, threads=2),
        files=[compressed.tokens, compressed.routing],
    )  # fmt: skip
    assert priced.memory_bytes == law.at(100)
    limited = replace(layout, memory_limit=230 * MB)
    assert decide(plain.work(), limited).chunk_rows > FEWEST_ROWS
    with pytest.raises(DoesNotFit, match="of which 66 MB to decode stored token chunks whole"):
        decide(compressed.work(), limited)
    in_passes = [
        choose_passes(
            inputs.work(),
            replace(layout, memory_limit=500 * MB, in_process=True),
            chunk_rows=100,
            ways=["hold"],
        )
        for inputs in (compressed, plain)
    ]
    assert in_passes[0].memory_bytes == in_passes[1].memory_bytes + more


def test_shared_experts_and_routers_are_held_by_every_worker(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((10, 32), "f4"))
    job = load_job(
        tokens=str(tmp_path / "x.npy"),
        out=str(tmp_path / "y.npy"),
        layer=str(FIXTURES / "qwen2_moe"),
        layer_index=1,
    )
    inputs = open_inputs(job)
    layer = inputs.layer
    resident = layer.shared.num_experts * layer.shared.parameters + 9 * 32 + 32
    assert layer.resident_bytes(np.dtype("f4")) == 4 * resident
    assert need(inputs.work(), Layout(1, 1, 1)).expert_bytes == 4 * (
        9 * layer.experts.parameters + resident
    )
    assert need(inputs.work(), Layout(3, 3, 1)).expert_bytes == 4 * (
        3 * layer.experts.parameters + resident
    )


@pytest.mark.parametrize("case", ["gpt_oss_mxfp4", "deepseek_v3_fp8", "deepseek_v3_bfloat16"])
def test_experts_are_held_as_they_are_stored_where_they_fit_only_in_that_form(
    tmp_path, monkeypatch, case, float32_products
):
    with np.load(FIXTURES / case / "expected.npz") as found:
        np.save(tmp_path / "x.npy", found["hidden"].reshape(24, -1))
    layer = {"layer": str(FIXTURES / case), "layer_index": 1}
    job = load_job(tokens=str(tmp_path / "x.npy"), out=str(tmp_path / "y.npy"), **layer)
    inputs, layout = open_inputs(job), Layout(1, 1, 1)
    enough, just = (
        need(inputs.work(), layout, as_stored).at(FEWEST_ROWS) for as_stored in (False, True)
    )
    assert just < enough
    just_so = replace(layout, memory_limit=just)
    with pytest.raises(DoesNotFit):  # a chunk brings each expert a few rows alone
        decide(inputs.work(), just_so)
    monkeypatch.setattr(decisions, "ROWS_THAT_PAY", 1)
    for limit, as_stored in ((None, False), (enough, False), (just, True)):
        decision = decide(inputs.work(), replace(layout, memory_limit=limit))
        assert (decision.as_stored, decision.passes) == (as_stored, None)
        assert limit is None or decision.need.at(decision.chunk_rows) <= limit
    with pytest.raises(DoesNotFit):
        decide(inputs.work(), replace(layout, memory_limit=just - 10_000))
    held = inputs.held_as_stored()
    assert type(inputs.experts) is Experts
    assert held.layer.experts is held.experts

    wide = run_job(replace(job, out=str(tmp_path / "wide.npy")), Threads(1, enough))
    loads, load = [], StoredExperts.load
    monkeypatch.setattr(
        StoredExperts, "load", lambda *args, **kwargs: loads.append(1) or load(*args, **kwargs)
    )
    stored = run_job(job, Threads(1, just))
    assert (wide.passes, stored.passes, loads) == (None, None, [1])
    np.testing.assert_array_equal(np.load(job.out), np.load(tmp_path / "wide.npy"))


def test_experts_of_16_bits_are_held_so_where_each_has_rows_enough(tmp_path):
    E, d = 8, 1024
    rng = np.random.default_rng(0)
    np.save(tmp_path / "w.npy", rng.standard_normal((E, d, d)).astype("f2"))
    np.save(tmp_path / "x.npy", rng.standard_normal((1500, d), "f4"))
    np.save(tmp_path / "r.npy", np.argsort(rng.random((1500, E)), axis=1))
    names = {"tokens": "x", "routing": "r", "experts": "w", "out": "y"}
    job = load_job(**{key: str(tmp_path / f"{name}.npy") for key, name in names.items()})
    inputs = open_inputs(job)
    limit = (
        need(inputs.work(), Layout(1, 1, 1)).at(FEWEST_ROWS) - 1
    )  # a byte too little for float32
    assert decide(inputs.work(), Layout(1, 1, 1, limit)).as_stored
    with pytest.raises(DoesNotFit):
        decide(inputs.work(), Layout(1, 1, 1, limit), chunk_rows=1500)
    assert run_job(job, Threads(1, limit)).passes is None


def test_on_a_gpu_spare_experts_take_16_bits_where_products_round_to_them(tmp_path):
    names = {"tokens": "x", "routing": "r", "experts": "w", "out": "y"}
    arrays = (np.ones((8, 4), "f2"), np.zeros(8, int), np.ones((4, 4, 4), "f2"))
    for name, array in zip("xrw", arrays, strict=True):
        np.save(tmp_path / f"{name}.npy", array)
    paths = {key: str(tmp_path / f"{name}.npy") for key, name in names.items()}
    for on_devices, precision, itemsize in (
        (False, None, 4), (True, None, 4), (True, "bfloat16", 2)
    ):  # fmt: skip
        inputs = open_inputs(load_job(**paths, precision=precision))
        layout, work = Layout(2, 2, 1, on_devices=on_devices), inputs.work(on_devices)
        enough = need(work, layout).at(8) + 3 * 4 * 4 * itemsize
        limit = enough if on_devices else math.ceil(enough / PART_OF_A_WORKER)
        assert Decision(work, replace(layout, memory_limit=limit), 8).spare_experts == 3


@pytest.mark.parametrize("threads", [1, 2, 8])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_limit_decides_the_chunks(inputs, threads, ranks):
    free = decide(inputs.work(), Layout(ranks, 1, threads)).chunk_rows
    assert free <= 2000 / threads / 4 + 1 or free == FEWEST_ROWS, "some for every thread"
    law = need(inputs.work(), Layout(ranks, 1, threads))
    limit = law.at(FEWEST_ROWS)
    rows = decide(inputs.work(), Layout(ranks, 1, threads, limit)).chunk_rows
    assert law.at(rows) <= limit
    with pytest.raises(DoesNotFit):
        decide(inputs.work(), Layout(ranks, 1, threads, limit - 1))


def make_need(work: Work, experts: int, chunks: int, threads: int = 1) -> Need:
    """What so many experts of 1 MB and chunks need."""
    return Need(
        experts << 20, chunks, work.row_bytes, threads * TILE_BYTES, threads * 2 * SORT_BYTES
    )


@pytest.mark.parametrize(
    ("layout", "asked", "experts", "chunks", "rows", "proposal"),
    [
        (Layout(1, 1, 1), 2000, 16, 5, 500, {"chunk_rows": 500}),
        (Layout(1, 1, 8), None, 16, 10, FEWEST_ROWS, {"threads": 2}),
        (Layout(1, 1, 8), 2000, 16, 10, FEWEST_ROWS, {"threads": 2, "chunk_rows": 79}),
        (Layout(1, 1, 1), None, 8, 20, FEWEST_ROWS, {"processes": 2}),
        (Layout(4, 4, 1, placement="exact"), None, 4, 29, FEWEST_ROWS, {"placement": "packed"}),
        (Layout(2, 2, 1), None, 4, 29, FEWEST_ROWS, {"processes": 4}),
    ],
)
def test_what_does_not_fit_comes_with_what_does(
    inputs, layout, asked, experts, chunks, rows, proposal
):
    """The limit holds the process, so many experts of 1 MB, and chunks of so many rows."""
    limit = make_need(inputs.work(), experts, chunks, proposal.get("threads", 1)).at(rows)
    with pytest.raises(DoesNotFit, match=r"must hold .* in total; within the same limit") as no:
        decide(inputs.work(), replace(layout, memory_limit=limit), chunk_rows=asked)
    assert no.value.proposal == proposal


def test_a_limit_that_a_few_bytes_exceed_is_written_with_their_digits(inputs):
    work, layout = inputs.work(), Layout(1, 1, 1)
    limit = need(work, layout).at(100) - 1
    with pytest.raises(DoesNotFit) as no:
        decide(work, replace(layout, memory_limit=limit), chunk_rows=100)
    allowed, total = re.findall(r"limit of ([0-9.]+) MB .* ([0-9.]+) MB in total", str(no.value))[0]
    assert float(allowed) < float(total)


def test_ranks_of_the_job_stay_and_get_more_workers(job_file):
    job = load_job(job_file, world_size=8)
    inputs = open_inputs(job)
    limit = make_need(inputs.work(), experts=4, chunks=38).at(FEWEST_ROWS)
    with pytest.raises(DoesNotFit) as no:
        decide(inputs.work(), lay_out(job, Processes(2, limit)))
    assert no.value.proposal == {"processes": 4}


def test_ranks_of_a_placement_file_stay(job_file, tmp_path):
    placement = tmp_path / "placement.json"
    placement.write_text(contiguous(16, 2).to_json())
    job = load_job(job_file, placement=str(placement))
    with pytest.raises(DoesNotFit, match="allow more memory") as no:
        decide(open_inputs(job).work(), lay_out(job, Processes(2, 185_000_000)))
    assert no.value.proposal == {}
    assert "ranks" not in str(no.value), "they are the file's"


@pytest.mark.parametrize(("limit", "advice"), [(150, "memory$"), (450, "memory or use fewer")])
def test_what_is_advised_helps(inputs, limit, advice):
    """Neither more ranks nor fewer threads make the process itself smaller."""
    work = replace(inputs.work(), expert_loaded=100_000_000)
    layout = Layout(1, 1, 8, memory_limit=limit * 1_000_000, in_process=True)
    with pytest.raises(DoesNotFit, match=rf"in passes either: .*; allow more {advice}"):
        decide(work, layout)


def test_more_rows_than_there_are_mean_all_of_them(inputs):
    asked = [500, 10**6]
    decided = [decide(inputs.work(), Layout(1, 1, 1), chunk_rows=rows).chunk_rows for rows in asked]
    assert decided == [500, 2000]


def test_a_job_without_rows_is_run_and_resumed(job_file, tmp_path):
    arrays = {"tokens": np.zeros((0, 8), "f4"), "routing": np.zeros((0, 2), "i4")}
    arrays["experts"] = np.ones((4, 8, 8), "f4")
    for key, array in arrays.items():
        np.save(tmp_path / f"{key}.npy", array)
    job = load_job(**{key: str(tmp_path / f"{key}.npy") for key in (*arrays, "out")})
    for resume in (False, True):
        assert run_job(job, Threads(1), resume=resume).rows == 0
    assert np.load(job.out).shape == (0, 8)


def test_it_is_an_error_if_nothing_fits(inputs):
    with pytest.raises(DoesNotFit, match=r"a memory limit of 179 MB .* in total; allow more") as no:
        decide(inputs.work(), Layout(1, 1, 2, 179_000_000))
    assert no.value.proposal == {}


def test_nothing_is_read_or_begun_before_a_refusal(job_file, tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("something was read")

    monkeypatch.setattr(sources.Region, "read", refuse)
    job = load_job(job_file, out=str(tmp_path / "out.npy"))
    with pytest.raises(DoesNotFit):
        run_job(job, Threads(1, 220_000_000), chunk_rows=1_000_000)
    assert not list(tmp_path.iterdir())


def run_measured(*arguments: object) -> tuple[int, str, int]:
    """Run the real command: exit code, what it says, and its peak memory in bytes."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, "run", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"},
        check=False,
    )
    told, _, peak = done.stdout.rpartition("peak ")
    assert peak, done.stderr
    return done.returncode, told + done.stderr, int(peak)


@pytest.mark.slow
def test_a_refused_run_runs_as_it_was_told_within_the_limit(tmp_path):
    sizes = {"rows": 16_000, "d": 1024, "num_experts": 4, "k": 1}
    job = write_example(tmp_path, Example(**sizes, format="npy"))
    limit = ("--memory-limit", "380 MiB", "--threads", 2)
    code, told, _ = run_measured(job, *limit, "--chunk-rows", 16_000)
    assert code == 1
    assert "a memory limit of 398 MB must hold 17 MB of experts" in told
    proposal = shlex.split(told.strip().rpartition("it runs with ")[2])
    assert proposal[0] == "--chunk-rows"
    code, told, peak = run_measured(job, *limit, *proposal)
    assert (code, "16000 rows in" in told) == (0, True), told
    assert peak <= 380 << 20
