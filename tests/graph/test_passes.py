"""Experts that do not fit are processed in passes, and rows get what they would get otherwise."""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import threading
import time
import tracemalloc
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import dask
import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dask_ep.arrays import memory
from dask_ep.errors import ReadError
from dask_ep.experts import local_experts, together
from dask_ep.experts.experts import Experts
from dask_ep.experts.prefetch import ExpertsAhead
from dask_ep.experts.quantized import float8
from dask_ep.experts.weights import Weight
from dask_ep.graph import expert_schedule, passes_disk, passes_memory
from dask_ep.graph.expert_schedule import READS, Rows, Walk
from dask_ep.graph.passes_disk import Spilled, sum_answers
from dask_ep.graph.passes_memory import hold
from dask_ep.graph.spill_files import SpillLayout
from dask_ep.kernel import reference
from dask_ep.laws.costs import Rates
from dask_ep.laws.memory_law import Layout
from dask_ep.laws.pass_blocks import PASSES_PROCESS_BYTES, cut_pieces
from dask_ep.laws.passes import Passes, choose_passes
from dask_ep.laws.work import LayerWork, Work
from dask_ep.placement.routing_stats import survey
from dask_ep.storage.journal import count_done
from dask_ep.storage.sources import open_source
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
        decoded=1,
        ahead=1,
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


def go(
    case: Case, passes: Passes, folder: os.PathLike, ranks: int = 1, in_place: bool = False
) -> np.ndarray:
    """What the layer gives, group after group."""
    tokens, routing, topk_weights = case.dask()
    tokens = tokens.map_blocks(np.copy) if in_place else tokens
    experts = Experts.linear(case.W)
    counts = survey(routing, case.num_experts).rows_by_chunk(case.chunks)
    rows, walk = Rows(tokens, routing, topk_weights), Walk(experts, passes, str(folder))
    groups = list(passes.groups(len(counts)))
    if passes.way == "hold":
        y = hold(rows, walk, counts, in_place=in_place)
        parts = [dask.compute(*[y.blocks[c] for c in group]) for group in groups]
        return np.concatenate([part for group in parts for part in group])
    spilled = [
        Spilled(rows, walk, counts, group, f"{folder}/spill-{g}", ranks)
        for g, group in enumerate(groups)
    ]
    y, parts = sum_answers(rows, walk, spilled), []
    for group in spilled:
        group.create("out", 0)
        group.write_step(group.group).compute(scheduler="threads")
        group.serve_step().compute(scheduler="threads")
        parts += dask.compute(*[y.blocks[c] for c in group.group])
        group.files.remove()
    return np.concatenate(parts)


ways = st.builds(
    passes_of,
    st.sampled_from(["hold", "spill"]),
    group_chunks=st.integers(1, 5),
    block_experts=st.integers(1, 3),
    decoded=st.integers(1, 3),
    ahead=st.integers(0, 2),
    threads=st.integers(1, 3),
    piece_rows=st.integers(1, 50),
)


@pytest.mark.slow
@settings(max_examples=60)
@given(case=cases(), passes=ways, ranks=st.integers(1, 3), in_place=st.booleans())
def test_both_ways_give_what_the_plain_loops_give(tmp_path_factory, case, passes, ranks, in_place):
    got = go(case, passes, tmp_path_factory.mktemp("passes"), ranks, in_place)
    assert got.dtype == case.tokens.dtype
    assert_close(got, whole_layer(case), case.tolerance)


@given(
    case=cases(dtypes=[np.float32, np.float64], max_k=1),
    passes=ways,
    contiguous=st.booleans(),
    on_input=st.booleans(),
)
def test_outputs_may_take_the_place_of_the_tokens(case, passes, contiguous, on_input):
    n, d = case.tokens.shape
    rng = np.random.default_rng(n)
    W = [rng.standard_normal((case.num_experts, d, d), dtype=np.float32) for _ in range(3)]
    if contiguous:
        case = case.with_(routing=np.sort(case.routing, axis=0))
    experts = Experts.gated(*W, activation="relu", apply_router_weight_on_input=on_input)
    tokens, routing, topk_weights = case.dask()
    counts = survey(routing, case.num_experts).rows_by_chunk(case.chunks)
    rows = Rows(tokens.map_blocks(np.copy), routing, topk_weights)
    walk = Walk(experts, replace(passes, way="hold"), ".")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expert_schedule, "_count_read", lambda *_: None)
        patch.setattr(local_experts, "HIDDEN_COLUMNS", 2)  # experts that are the sum of several
        got = hold(rows, walk, counts, in_place=True).compute()
        kept = hold(replace(rows, tokens=tokens), walk, counts).compute()
    np.testing.assert_array_equal(got, kept)
    alone = [
        reference.gated(*(w[e] for w in W), activation="relu") for e in range(case.num_experts)
    ]
    want = reference.moe(
        case.tokens,
        case.routing,
        alone,
        case.topk_weights,
        d_out=d,
        apply_router_weight_on_input=on_input,
    )
    assert_close(got, want, 1e-4)


# --- which way, how often, with how much memory --------------------------------------------------

LARGE = Work(
    rows=250_000,
    slots=2,
    d=2048,
    d_out=2048,
    dtype=np.dtype("f4"),
    experts=256,
    expert_stored=50 * MB,
    expert_loaded=100 * MB,
    widest=2048,
    matrix_stored=17 * MB,
)
"""12.8 GB of experts in 16 bits, over 2 GB of tokens."""


def choose(
    work: Work, limit: int, threads: int = 2, workers: int | None = None, **asked: object
) -> Passes:
    """Choose passes on threads, or on so many Dask workers."""
    layout = Layout(1, workers or 1, threads, limit, in_process=workers is None)
    return choose_passes(work, layout, **asked)


TABLE = [
    # what, where, limit, way, passes, blocks decoded, ahead
    (LARGE, {}, 8_000 * MB, "hold", 1, 2, 2),
    (LARGE, {}, 3_000 * MB, "hold", 2, 2, 2),
    (replace(LARGE, slots=1), {}, 3_000 * MB, "hold", 1, 2, 2),
    (LARGE, {}, 1_500 * MB, "spill", 1, 2, 2),
    (LARGE, {}, 900 * MB, "spill", 1, 2, 2),
    (LARGE, {}, 750 * MB, "spill", 1, 2, 1),
    (LARGE, {}, 650 * MB, "spill", 1, 1, 1),
    (LARGE, {}, 600 * MB, "spill", 1, 1, 0),
    (replace(LARGE, rows=10_000_000), {}, 3_000 * MB, "spill", 1, 2, 2),
    (replace(LARGE, slots=8), {}, 3_000 * MB, "hold", 2, 2, 2),
    (LARGE, {"threads": 8}, 3_000 * MB, "spill", 1, 8, 2),
    (LARGE, {"workers": 2, "threads": 1}, 3_000 * MB, "spill", 1, 1, 2),
]


@pytest.mark.parametrize(("work", "where", "limit", "way", "passes", "decoded", "ahead"), TABLE)
def test_the_way_follows_from_the_limit(work, where, limit, way, passes, decoded, ahead):
    chosen = choose(work, limit, **where)
    assert (chosen.way, chosen.passes, chosen.decoded, chosen.ahead) == (
        way, passes, decoded, ahead,
    )  # fmt: skip
    assert chosen.memory_bytes <= limit
    assert chosen.read_bytes == passes * work.experts * work.expert_stored
    assert (chosen.spill_bytes > 0) == (way == "spill")


def test_dear_weights_are_read_once_and_dear_disks_are_not_spilled_to():
    slow_reads = choose(LARGE, 3_000 * MB, rates=Rates(flops=1, copy=5e9, read=1e8))
    slow_writes = choose(LARGE, 1_500 * MB, rates=Rates(flops=1, copy=5e9, write=1e7))
    assert (slow_reads.way, slow_writes.way) == ("spill", "hold")


works = st.builds(
    Work,
    rows=st.integers(0, 10**7),
    slots=st.integers(1, 8),
    d=st.integers(1, 8192),
    d_out=st.integers(1, 8192),
    dtype=st.sampled_from([np.dtype("f2"), np.dtype("f4")]),
    experts=st.integers(1, 512),
    expert_stored=st.integers(1, 400 * MB),
    expert_loaded=st.integers(1, 800 * MB),
    widest=st.integers(1, 8192),
    matrix_stored=st.integers(0, 100 * MB),
    stored_rows=st.none() | st.integers(1, 100_000),
)


@given(
    work=works,
    limit=st.integers(PASSES_PROCESS_BYTES, 64_000 * MB),
    free=st.none() | st.integers(0, 10**13),
    threads=st.integers(1, 16),
    workers=st.none() | st.integers(1, 4),
)
@example(
    work=Work(
        rows=0, slots=1, d=1, d_out=1, dtype=np.dtype("f2"), experts=1, expert_stored=1,
        expert_loaded=1, widest=1,
    ),
    limit=PASSES_PROCESS_BYTES + 36_353,
    free=None,
    threads=1,
    workers=None,
)  # fmt: skip
def test_what_is_chosen_fits_and_covers_all_rows(work, limit, free, threads, workers):
    found = {}
    for way in ("hold", "spill"):
        with contextlib.suppress(MemoryError):
            found[way] = choose(work, limit, threads, workers, free=free, ways=[way])
    for chosen in found.values():
        assert PASSES_PROCESS_BYTES < chosen.memory_bytes <= limit
        assert free is None or chosen.spill_bytes <= free
        chunks = -(-work.rows // chosen.chunk_rows)
        assert [c for group in chosen.groups(chunks) for c in group] == list(range(chunks))
        assert len(list(chosen.groups(chunks))) in (chosen.passes, chosen.passes - 1)
        assert chosen.chunk_rows % chosen.stored_rows == 0
        assert Passes(**vars(chosen)) == chosen
    if found:
        best = choose(work, limit, threads, workers, free=free, ways=list(found))
        assert best.seconds == min(chosen.seconds for chosen in found.values())


def test_workers_share_what_is_read_and_written():
    one, two = (choose(LARGE, 3_000 * MB, workers=workers, chunk_rows=1000) for workers in (1, 2))
    assert two.seconds == pytest.approx(one.seconds / 2)


def test_more_memory_never_means_more_passes():
    passes = [choose(LARGE, limit * MB, ways=["hold"]).passes for limit in range(900, 9000, 100)]
    assert passes == sorted(passes, reverse=True)
    assert passes[-1] == 1


def test_little_disk_means_more_groups_and_none_means_another_way():
    whole = choose(LARGE, 1_500 * MB)
    assert whole.spill_bytes == LARGE.rows * 2 * 2 * 2048 * 4
    half = choose(LARGE, 1_500 * MB, free=whole.spill_bytes * 2 // 3)
    assert (half.way, half.passes) == ("spill", 2)
    assert choose(LARGE, 1_500 * MB, free=10 * MB).way == "hold"
    with pytest.raises(MemoryError, match="10 MB are free there and a chunk needs"):
        choose(LARGE, 600 * MB, free=10 * MB, ways=["spill"])


def test_what_no_pass_can_fit_is_refused_with_the_numbers():
    with pytest.raises(
        MemoryError,
        match=r"may use 400 MB, but needs at least .* MB: 300 MB for itself, and either .* to "
        r"compute \(experts: 1 of 100 MB, threads: 2\) .* rows; allow more memory",
    ):
        choose(LARGE, 400 * MB)


def test_a_refusal_counts_what_shared_experts_give_as_the_choice_does():
    layer = replace(LARGE, layer=LayerWork(loaded=1))
    with pytest.raises(MemoryError, match="may use 8000 MB, but needs at least 13484 MB"):
        choose(layer, 8_000 * MB, chunk_rows=100_000, ways=["spill"])


def test_chunk_rows_that_are_given_are_kept():
    for way in ("hold", "spill"):
        chosen = choose(LARGE, 3_000 * MB, chunk_rows=1000, ways=[way])
        assert chosen.chunk_rows == 1000
    assert choose(LARGE, 3_000 * MB, chunk_rows=1000, ways=["hold"]).passes == 125
    with pytest.raises(MemoryError, match="chunks of 200000 rows"):
        choose(LARGE, 3_000 * MB, chunk_rows=200_000)


@given(
    rows=st.lists(st.integers(0, 5000), max_size=8),
    piece_rows=st.integers(1, 2000),
    threads=st.integers(1, 8),
)
def test_pieces_hold_every_row_once_and_are_not_too_large(rows, piece_rows, threads):
    pieces = cut_pieces(rows, piece_rows, threads)
    runs = [run for piece in pieces for run in piece]
    for expert, count in enumerate(rows):
        mine = [(start, stop) for e, start, stop in runs if e == expert]
        covered = [row for start, stop in mine for row in range(start, stop)]
        assert covered == list(range(count))
    assert [e for e, _, _ in runs] == sorted(e for e, _, _ in runs)
    for piece in pieces:
        assert 0 < sum(stop - start for _, start, stop in piece) <= piece_rows


@pytest.mark.parametrize(
    ("popularity", "times_read"),
    [
        ([25, 25, 25, 25], [1, 1, 1, 1]),
        ([90, 4, 3, 3], [2, 1, 1, 1]),
        ([5, 5, 85, 5], [1, 1, 2, 1]),
    ],
)
def test_an_expert_has_one_rank_unless_it_has_more_rows_than_a_ranks_share(
    tmp_path, popularity, times_read
):
    routing = np.repeat(np.arange(4), popularity)
    rng = np.random.default_rng(0)
    case = Case(rng.random((100, 3)), routing, None, rng.random((4, 3, 2)), 1, (60, 40))
    assert_close(go(case, passes_of("spill"), tmp_path, ranks=2), whole_layer(case), 1e-12)
    reads = count_done(str(tmp_path), READS, what=READS)
    assert [reads[e] for e in range(4)] == times_read


@given(counts=st.lists(st.lists(st.integers(0, 5), min_size=3, max_size=3), min_size=1, max_size=5))
def test_every_slot_has_one_place_on_either_side(counts):
    layout = SpillLayout(np.array(counts))
    places = []
    for e in range(3):
        total = int(layout.counts[:, e].sum())
        for start in range(0, total, 4):  # an expert's rows in pieces of 4
            run = layout.run(e, start, min(start + 4, total))
            ends = [*run.starts[1:].tolist(), run.count]
            for first, last, place in zip(
                run.starts.tolist(), ends, run.places.tolist(), strict=True
            ):
                places += [(run.first + i, place + i - first) for i in range(first, last)]
    rows, answers = zip(*sorted(places), strict=True) if places else ((), ())
    assert list(rows) == list(range(layout.slots))
    assert sorted(answers) == list(range(layout.slots))
    # Chunk by chunk, the answers of each expert after those of the one before.
    owner = {answer: row for row, answer in places}
    wanted = [
        layout.rows_at[c, e] + i
        for c in range(len(counts))
        for e in range(3)
        for i in range(counts[c][e])
    ]
    assert [owner[answer] for answer in range(layout.slots)] == wanted


def test_experts_ahead_are_read_again_elsewhere():
    experts = Experts.linear(np.arange(24, dtype=np.float16).reshape(2, 3, 4))
    here = ExpertsAhead(experts, np.dtype(np.float32))
    there = pickle.loads(pickle.dumps(here))
    rows = np.ones((1, 3), np.float32)
    assert len(there) == 2
    for e in range(2):
        np.testing.assert_array_equal(there[e](rows), here[e](rows))


def test_experts_that_are_not_needed_any_more_are_not_read(monkeypatch):
    monkeypatch.setattr(together, "READERS", 1)
    monkeypatch.setattr(together, "readers", together.Readers())
    busy, told = threading.Event(), []
    together.readers.submit(busy.wait, 20)
    experts = Experts.linear(np.ones((1, 2, 2), np.float32))
    wanted, unwanted = (
        ExpertsAhead(experts, np.dtype(np.float32), partial(told.append, name))
        for name in ("wanted", "unwanted")
    )
    del unwanted
    gc.collect()
    busy.set()
    assert wanted[0].d == 2
    together.readers.submit(int).result(timeout=20)
    assert told == ["wanted"]


@pytest.mark.parametrize("ahead_too", [True, False])
def test_gate_and_up_that_alternate_are_taken_apart_one_expert_after_the_other(ahead_too):
    E, d = 8, 128
    experts = Experts.gated_fused(
        np.ones((E, d, 2 * d), np.float16), np.ones((E, d, d), np.float16), interleaved=True
    )
    one = 3 * d * d * 4
    memory.release()
    tracemalloc.start()
    loaded = ExpertsAhead(experts, np.dtype(np.float32)) if ahead_too else experts.load()
    assert len([loaded[e] for e in range(E)]) == E
    memory.release()
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert E * one <= held < 1.1 * E * one
    assert peak < 1.1 * (E + 1 + together.READERS) * one


FEW_BITS = {
    "float16": (np.float16, 2),
    "bfloat16": (ml_dtypes.bfloat16, 2),
    "float32": (np.float32, 4),
    "float64": (np.float64, 8),
}


@pytest.mark.parametrize("stored", FEW_BITS)
def test_experts_wait_as_they_are_stored(stored):
    dtype, nbytes = FEW_BITS[stored]
    w = np.arange(24).reshape(2, 3, 4).astype(dtype)
    waiting = ExpertsAhead(Experts.linear(w), np.dtype(np.float32))
    steps = waiting._coming.result(timeout=20).decoding.waiting
    held = [step.args[0] for step, _ in steps]
    assert [(weight.dtype, weight.nbytes) for weight in held] == [(w.dtype, 12 * nbytes)] * 2
    for e in range(2):
        rows = np.eye(3, dtype=np.float32)
        np.testing.assert_array_equal(waiting[e](rows), w[e].astype(np.float32))
    assert not steps


def test_threads_that_want_one_expert_decode_it_together_and_once(monkeypatch):
    both, read, decoded = threading.Barrier(2), Weight.read, []

    def read_together(self, dtype, given=None):
        if given is None:
            decoded.append(self)
            if len(decoded) <= 2:
                both.wait(20)  # passed only if two threads decode at a time
        return read(self, dtype, given)

    w = np.ones((1, 2, 2), np.float16)
    waiting = ExpertsAhead(Experts.gated(w, w, w), np.dtype(np.float32))
    waiting._coming.result(timeout=20)
    monkeypatch.setattr(Weight, "read", read_together)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: waiting[0], range(8)))
    assert len(decoded) == 3
    assert len(set(map(id, found))) == 1


def test_what_cannot_be_decoded_is_an_error_for_all_who_want_it():
    values = open_source(np.ones((1, 2, 2), ml_dtypes.float8_e4m3fn))
    scales = np.ones((1, 1, 1), np.float32)
    good = float8(values, open_source(scales), (2, 2))
    waiting = ExpertsAhead(Experts.linear(good), np.dtype(np.float32))
    waiting._coming.result(timeout=20)
    scales[:] = np.nan
    for _ in range(2):
        with pytest.raises(ReadError, match="NaN"):
            waiting[0]


@pytest.mark.parametrize("way", ["hold", "spill"])
@pytest.mark.parametrize(("decoded", "ahead"), [(1, 0), (1, 1), (2, 1), (2, 2), (3, 0)])
def test_no_more_experts_are_in_memory_than_the_law_counts(
    monkeypatch, tmp_path, way, decoded, ahead
):
    events = []

    def note(module, name, begun, done, expert_of):
        plain = getattr(module, name)

        def noted(*args, **more):
            events.append((begun, expert_of(args)))
            result = plain(*args, **more)
            time.sleep(0.001)
            events.append((done, expert_of(args)))
            return result

        monkeypatch.setattr(module, name, noted)

    note(expert_schedule, "_read_ahead", "read", "coming", lambda args: args[2][0])
    note(passes_memory, "_serve_held", "serve", "done", lambda args: args[3][0])
    note(passes_disk, "_serve_piece", "serve", "done", lambda args: args[-1][0])
    rng = np.random.default_rng(0)
    routing = rng.integers(0, 12, (60, 2))
    case = Case(rng.random((60, 3)), routing, None, rng.random((12, 3, 2)), 1, (15,) * 4)
    passes = passes_of(way, decoded=decoded, ahead=ahead, group_chunks=4, threads=4, piece_rows=3)
    with dask.config.set(num_workers=4):
        assert_close(go(case, passes, tmp_path), whole_layer(case), 1e-12)

    left = Counter(expert for event, expert in events if event == "done")
    assert sorted(left) == list(range(12))
    begun, read, computing, most_read, most_computing = set(), set(), set(), 0, 0
    for event, expert in events:
        if event == "read":
            begun.add(expert)
            read.add(expert)
        elif event == "serve":
            assert min(expert + ahead, 11) in begun, "it is read ahead"
            computing.add(expert)
        elif event == "done":
            left[expert] -= 1
            if left[expert] == 0:
                read.remove(expert)
                computing.remove(expert)
        most_read = max(most_read, len(read))
        most_computing = max(most_computing, len(computing))
    assert ahead < most_read <= decoded + ahead
    assert 1 <= most_computing <= decoded


def test_what_cannot_be_read_ahead_is_an_error_where_it_is_needed(tmp_path):
    np.save(tmp_path / "w.npy", np.ones((2, 3, 4)))
    experts = Experts.linear(tmp_path / "w.npy")
    (tmp_path / "w.npy").write_bytes(b"")
    damaged = ExpertsAhead(experts, np.dtype(np.float32))
    with pytest.raises(ReadError, match=r"w.npy.* expected .* got 0"):
        damaged[0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # forks while threads run
def test_a_forked_process_reads_for_itself():
    experts = Experts.linear(np.ones((1, 2, 2), np.float32))
    assert ExpertsAhead(experts, np.dtype(np.float32))[0].d == 2
    child = os.fork()
    if child == 0:
        mine = ExpertsAhead(experts, np.dtype(np.float32))
        os._exit(mine._coming.result(timeout=20).experts()[0].d)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
