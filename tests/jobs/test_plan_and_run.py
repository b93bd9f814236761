"""What a plan says is what a run does: the same way, ranks, chunks and memory, or the same refusal.

Random jobs and limits. Most runs end where they are decided, since their experts are gigabytes of
nothing; small ones are run to their end. ``DASK_EP_JOBS=200`` tries so many, and not a few.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from dask_ep.experts.expert_kinds import EXPERT_KINDS
from dask_ep.jobs import run
from dask_ep.jobs.backends import Processes, Threads, Where, lay_out
from dask_ep.jobs.build import Inputs, build, open_inputs
from dask_ep.jobs.decide import decide
from dask_ep.jobs.job import Job, load_job
from dask_ep.jobs.plan import Machine, plan, plan_job
from dask_ep.jobs.run import run_job
from dask_ep.laws.costs import Rates
from dask_ep.laws.decision import Decision
from dask_ep.laws.travel import TRAVELS, Travel
from dask_ep.placement.placement import Placement
from dask_ep.placement.policies import POLICIES, contiguous
from dask_ep.pricing.price import Plan
from dask_ep.storage.journal import read_manifest
from dask_ep.storage.output import progress_directory
from dask_ep.storage.storage import open_tokens
from tests.checkpoints import FIXTURES, LAYER

JOBS = int(os.environ.get("DASK_EP_JOBS", "40"))
RATES = Rates(flops=1e10, copy=1e9)
DTYPES = ["f2", "f4", "f8"]


@dataclass(frozen=True)
class Sizes:
    """A job in plain numbers."""

    kind: str
    rows: int
    k: int | None
    d: int
    hidden: int
    num_experts: int
    dtype: str
    weights: str
    stored_rows: int | None
    #: of tokens in Zarr; None for a .npy
    weighted: bool
    seed: int

    def write(self, folder: Path) -> Path:
        """Write the job; tokens and experts are holes in files, and the routing is random."""
        lines = ['out = "out.npy"', 'missing = "fill"', f'tokens = "{self._write_tokens(folder)}"']
        if self.kind == "layer":
            lines += [f'layer = "{FIXTURES / "qwen2_moe"}"', f"layer_index = {LAYER}"]
        else:
            rng = np.random.default_rng(self.seed)
            shape = (self.rows,) if self.k is None else (self.rows, self.k)
            np.save(folder / "r.npy", rng.integers(-1, self.num_experts, shape))
            np.save(folder / "t.npy", rng.random(shape, "f4"))
            lines += ['routing = "r.npy"'] + ['topk_weights = "t.npy"'] * self.weighted
            lines += ["[experts]", f'kind = "{self.kind}"', *self._write_experts(folder)]
        (folder / "job.toml").write_text("\n".join(lines))
        return folder / "job.toml"

    def _write_tokens(self, folder: Path) -> str:
        shape = (self.rows, 32 if self.kind == "layer" else self.d)
        if self.stored_rows is None:
            return write_hole(folder / "x.npy", shape, self.dtype)
        chunks = (min(self.stored_rows, max(self.rows, 1)), shape[1])
        zarr.create_array(folder / "x.zarr", shape=shape, chunks=chunks, dtype=self.dtype)
        return "x.zarr"

    def _write_experts(self, folder: Path) -> Iterator[str]:
        for name in EXPERT_KINDS[self.kind].matrices:
            columns = {"down": self.d, "w": self.d, "gate_up": 2 * self.hidden}
            rows = self.hidden if name == "down" else self.d
            shape = (self.num_experts, rows, columns.get(name, self.hidden))
            yield f'{name} = "{write_hole(folder / f"{name}.npy", shape, self.weights)}"'


def write_hole(path: Path, shape: tuple[int, ...], dtype: str) -> str:
    """Write an array of zeros that takes no room on the disk."""
    np.lib.format.open_memmap(path, "w+", dtype, shape)
    return path.name


@dataclass(frozen=True)
class Asked:
    """What a user asks of a run, and of its plan."""

    where: Where
    world_size: int | None = None
    placement: str | None = None
    chunk_rows: int | None = None
    travel: str | None = None

    def job(self, path: Path) -> Job:
        placement = self.placement
        if placement == "file":
            placement = str(path.with_name("placement.json"))
            experts = open_inputs(load_job(path)).experts.num_experts
            Path(placement).write_text(contiguous(experts, self.ranks).to_json())
        return load_job(path, world_size=self.world_size, placement=placement)

    @property
    def ranks(self) -> int:
        return self.world_size or getattr(self.where, "count", 1) ** self.on_processes

    @property
    def on_processes(self) -> bool:
        return isinstance(self.where, Processes)


sizes = st.builds(
    Sizes,
    kind=st.sampled_from([*EXPERT_KINDS, "layer"]),
    rows=st.integers(0, 3000),
    k=st.none() | st.integers(1, 8),
    d=st.sampled_from([8, 512, 1024, 2048]),
    hidden=st.sampled_from([8, 128, 1024, 3000]),
    num_experts=st.sampled_from([1, 7, 24, 64, 160, 256]),
    dtype=st.sampled_from(DTYPES),
    weights=st.sampled_from(DTYPES),
    stored_rows=st.none() | st.integers(1, 2000),
    weighted=st.booleans(),
    seed=st.integers(0, 1000),
)
limits = st.sampled_from([None, 10**10]) | st.integers(150, 1200).map(lambda mb: mb * 10**6)
asked = st.builds(
    Asked,
    st.builds(Threads, st.integers(1, 8), limits) | st.builds(Processes, st.integers(1, 6), limits),
    world_size=st.none() | st.integers(1, 8),
    placement=st.sampled_from([None, *POLICIES, "file"]),
    chunk_rows=st.none() | st.integers(1, 4000),
    travel=st.sampled_from([None, None, None, *TRAVELS]),
)

LARGE = Sizes("linear", 3000, 8, 1024, 8, 160, "f4", "f2", None, False, 0)
"""336 MB of experts as they are stored, twice that in float32."""

WAYS = {
    "in memory": (LARGE, Asked(Threads(2, 10**9))),
    "in memory, several a rank": (LARGE, Asked(Processes(2, 10**9), 5, "balanced")),
    "experts travel": (LARGE, Asked(Processes(3, 2 * 10**9), travel="experts")),
    "too many travel": (LARGE, Asked(Processes(3, 10**9), travel="experts")),
    "as stored": (replace(LARGE, rows=40_000), Asked(Threads(1, 700 * 10**6))),
    "hold": (LARGE, Asked(Threads(2, 600 * 10**6))),
    "spill": (replace(LARGE, num_experts=256), Asked(Processes(2, 640 * 10**6))),
    "hold what is stored in chunks": (
        replace(LARGE, stored_rows=70),
        Asked(Threads(2, 700 * 10**6)),
    ),
    "asked to spill": (LARGE, Asked(Threads(1, 500 * 10**6), travel="rows")),
    "asked to hold on workers": (
        replace(LARGE, num_experts=256),
        Asked(Processes(2, 640 * 10**6), travel="experts"),
    ),
    "travel on threads": (LARGE, Asked(Threads(2), travel="auto")),
    "chunks too large": (
        replace(LARGE, rows=20_000),
        Asked(Threads(2, 480 * 10**6), world_size=1, chunk_rows=20_000),
    ),
    "nothing fits": (LARGE, Asked(Threads(2, 310 * 10**6))),
}
"""A job that goes each way, or is refused."""


@dataclass(frozen=True)
class Begun(Exception):
    """A run that ends before its output is begun."""

    decision: Decision
    placement: Placement


def begin_run(monkeypatch: pytest.MonkeyPatch, job: Job, asked: Asked) -> Begun:
    """Run a job until its graph is built, as if for workers, which are not started."""
    decided = []

    def build_only(inputs: Inputs, decision: Decision, *by: Any, **how: Any) -> None:
        built = build(inputs, decision, *by, **how)
        owned = contiguous(decision.work.experts, decision.layout.world_size)
        decided.append(Begun(decision, built.placement or owned))
        raise decided[0]

    with monkeypatch.context() as changed:
        changed.setattr(run, "build", build_only)
        changed.setattr(run, "started", lambda *_: contextlib.nullcontext((1, None)))
        with pytest.raises(Begun):
            run_job(job, asked.where, chunk_rows=asked.chunk_rows, travel=Travel(asked.travel))
    return decided[0]


def plan_of_job(job: Job, asked: Asked) -> Plan:
    """Plan a job as the command does, where it runs."""
    travel = Travel(asked.travel)
    return plan_job(job, asked.where, chunk_rows=asked.chunk_rows, travel=travel, rates=RATES)


def plan_in_python(job: Job, asked: Asked) -> Plan:
    """Plan a job by `dask_ep.plan`, from arrays in the chunks of a run."""
    inputs, workers = open_inputs(job), asked.where.count if asked.on_processes else 1
    rows = 100
    with contextlib.suppress(MemoryError, ValueError):  # it is for `plan` to refuse
        run_so = {"chunk_rows": asked.chunk_rows, "travel": Travel(asked.travel)}
        rows = decide(inputs.work(), lay_out(job, asked.where), **run_so).chunk_rows
    tokens = open_tokens(inputs.tokens, chunks=rows, name="tokens")
    routing = inputs.routing and open_tokens(inputs.routing, like=tokens, name="routing")
    return plan(
        tokens,
        routing,
        inputs.layer or inputs.experts,
        topk_weights=inputs.topk_weights,
        world_size=asked.ranks if asked.world_size or asked.on_processes else None,
        placement=job.placement,
        chunk_rows=asked.chunk_rows,
        travel=Travel(asked.travel),
        machine=Machine(
            workers=None if asked.world_size is None and asked.on_processes else workers,
            threads=1 if asked.on_processes else asked.where.count,
            memory_limit=asked.where.memory_limit,
        ),
        rates=RATES,
        files=[inputs.tokens, inputs.routing, inputs.topk_weights],
    )


def answer_of(ask: Any, *args: Any) -> dict[str, Any] | str:
    """How a run or a plan goes, in plain numbers; or the words of its refusal."""
    try:
        answer = ask(*args)
    except (MemoryError, ValueError) as refusal:
        return f"{type(refusal).__name__}: {refusal}"
    decision, layout = answer.decision, answer.decision.layout
    return {
        "ranks": layout.world_size,
        "workers": layout.serving,
        "threads": layout.threads,
        "asked": layout.placement,
        "placement": None if decision.passes else answer.placement.to_json(),
        "chunk rows": decision.chunk_rows,
        "as stored": decision.as_stored,
        "passes": None if decision.passes is None else asdict(decision.passes),
        "travel": decision.travel,
        "spare experts": decision.spare_experts,
        "memory": decision.need.at(decision.chunk_rows),
    }


def check_alike(folder: Path, sizes: Sizes, asked: Asked) -> dict[str, Any] | str:
    """Decide a run, plan it in both ways, and compare; give how it goes."""
    job = asked.job(sizes.write(folder))
    with pytest.MonkeyPatch.context() as monkeypatch:
        ran = answer_of(begin_run, monkeypatch, job, asked)
    assert answer_of(plan_of_job, job, asked) == ran
    if not (asked.on_processes and asked.where.count == 1):  # to `dask_ep.plan` 1 is this process
        assert answer_of(plan_in_python, job, asked) == ran
    return ran


@pytest.mark.slow
@settings(max_examples=JOBS)
@given(sizes=sizes, asked=asked)
def test_a_plan_and_a_run_are_decided_alike_or_refused_alike(tmp_path_factory, sizes, asked):
    check_alike(tmp_path_factory.mktemp("job"), sizes, asked)


@pytest.mark.parametrize("name", WAYS)
def test_a_plan_and_a_run_go_every_way_alike(tmp_path, name):
    ran = check_alike(tmp_path, *WAYS[name])
    if isinstance(ran, str):
        words = {
            "asked to hold on workers": "they can travel only to rows that are held in memory",
            "too many travel": "experts, but the placement gives it 160",
            "travel on threads": "threads share memory, so nothing travels between them",
            "chunks too large": "it runs with --chunk-rows",
            "nothing fits": "It does not fit with experts in passes either",
        }
        assert words[name] in ran
        return
    way = "in memory" if ran["passes"] is None else ran["passes"]["way"]
    assert ("as stored" if ran["as stored"] else way) == {
        "in memory, several a rank": "in memory",
        "experts travel": "in memory",
        "hold what is stored in chunks": "hold",
        "asked to spill": "spill",
    }.get(name, name)


small = st.builds(
    Sizes,
    kind=st.sampled_from([*EXPERT_KINDS, "layer"]),
    rows=st.integers(0, 400),
    k=st.none() | st.integers(1, 4),
    d=st.just(256),
    hidden=st.sampled_from([8, 256]),
    num_experts=st.sampled_from([4, 512]),
    dtype=st.sampled_from(DTYPES),
    weights=st.just("f2"),
    stored_rows=st.none() | st.integers(20, 200),
    weighted=st.booleans(),
    seed=st.integers(0, 1000),
)


@settings(max_examples=max(JOBS // 6, 1))
@given(
    sizes=small,
    threads=st.integers(1, 3),
    limit=st.none() | st.integers(310, 400).map(lambda mb: mb * 10**6),
    ranks=st.none() | st.integers(1, 4),
    policy=st.sampled_from([None, *POLICIES]),
    chunk_rows=st.none() | st.integers(20, 500),
    travel=st.sampled_from([None, None, None, *TRAVELS]),
)
def test_a_run_on_threads_does_what_its_plan_says(
    tmp_path_factory, sizes, threads, limit, ranks, policy, chunk_rows, travel
):
    asked = Asked(Threads(threads, limit), ranks, policy, chunk_rows, travel)
    job = asked.job(sizes.write(tmp_path_factory.mktemp("job")))
    told = []

    def go() -> Plan:
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr("dask_ep.jobs.price_job.probe", lambda *_, **__: RATES)
            run_job(
                job,
                asked.where,
                chunk_rows=chunk_rows,
                travel=Travel(travel),
                on_record=lambda *both: told.append(both),
            )
        return told[0][0] if told else plan_of_job(job, asked)

    ran = answer_of(go)
    assert answer_of(plan_of_job, job, asked) == ran
    if isinstance(ran, str):
        assert not list(Path(job.out).parent.glob("out*"))
        return
    planned, manifest = plan_of_job(job, asked), read_manifest(progress_directory(job.out))
    done, said = manifest["settings"], planned.decision
    assert tuple(manifest["rows"]) == (planned.chunks or (0,))
    assert done["world_size"] == said.layout.world_size
    assert done.get("passes") == (said.passes and vars(said.passes))
    if done["placement"] is not None:
        assert Placement.from_json(done["placement"]) == planned.placement
    if told:  # rates that are measured are not those that are given
        counted = told[0][0]
        assert counted.to_dict() == replace(planned, rates=counted.rates).to_dict()
