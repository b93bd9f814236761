"""Experts that do not fit go by in passes, and rows get what they would get otherwise."""

from __future__ import annotations

import os
from dataclasses import replace

import dask
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dask_ep.expert_major import Rows, Spilled, Walk, collect, hold
from dask_ep.experts import Experts
from dask_ep.output import Step
from dask_ep.passes import Passes
from dask_ep.survey import survey
from tests.compare import assert_close, whole_layer
from tests.strategies import Case, cases

MB = 10**6


def passes_of(way: str, **changes: object) -> Passes:
    """A way to go through experts, for jobs that are too small to need one."""
    plain = Passes(
        way=way,
        passes=1,
        chunk_rows=1,
        group_chunks=2,
        block_experts=1,
        alive=2,
        threads=2,
        piece_rows=8,
        stored_rows=1,
        memory_bytes=0,
        spill_bytes=0,
        read_bytes=0,
        moved_bytes=0,
        seconds=0.0,
    )
    return replace(plain, **changes)


def go(case: Case, passes: Passes, folder: os.PathLike, ranks: int = 1) -> np.ndarray:
    """What the layer gives, group after group."""
    tokens, routing, topk_weights = case.dask()
    experts = Experts.linear(case.W)
    counts = survey(routing, case.num_experts).rows_by_chunk(case.chunks)
    rows, walk = Rows(tokens, routing, topk_weights), Walk(experts, passes, str(folder))
    groups = list(passes.groups(len(counts)))
    if passes.way == "hold":
        y = hold(rows, walk, counts)
        parts = [dask.compute(*[y.blocks[c] for c in group]) for group in groups]
        return np.concatenate([part for group in parts for part in group])
    spilled = [
        Spilled(rows, walk, counts, group, f"{folder}/spill-{g}", ranks)
        for g, group in enumerate(groups)
    ]
    y, parts = collect(rows, walk, spilled), []
    for group in spilled:
        group.create("out", 0)
        Step(*group.write_step(group.group)).compute(scheduler="threads")
        Step(*group.serve_step()).compute(scheduler="threads")
        parts += dask.compute(*[y.blocks[c] for c in group.group])
        group.files.remove()
    return np.concatenate(parts)


ways = st.builds(
    passes_of,
    st.sampled_from(["hold", "spill"]),
    group_chunks=st.integers(1, 5),
    block_experts=st.integers(1, 3),
    alive=st.integers(1, 4),
    threads=st.integers(1, 3),
    piece_rows=st.integers(1, 50),
)


@settings(max_examples=60)
@given(case=cases(), passes=ways, ranks=st.integers(1, 3))
def test_both_ways_give_what_the_plain_loops_give(tmp_path_factory, case, passes, ranks):
    got = go(case, passes, tmp_path_factory.mktemp("passes"), ranks)
    assert got.dtype == case.tokens.dtype
    assert_close(got, whole_layer(case), case.tolerance)
