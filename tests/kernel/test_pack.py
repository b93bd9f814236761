"""A row goes once to each owner that serves it, and comes back summed by rank; none is lost."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dask_ep.kernel import reference
from dask_ep.kernel.host_kernel import answer_of_rank
from dask_ep.kernel.pack import Combining, Packet, Packing
from dask_ep.kernel.segments import sort_slots
from tests.strategies import Case, cases


def packing_of(case: Case) -> Packing:
    each = case.num_experts // case.world_size
    return Packing(case.tokens, case.routing, case.topk_weights, each, case.world_size)


def by_slot(array: np.ndarray) -> np.ndarray:
    return array[:, None] if array.ndim == 1 else array


def combined(packing: Packing, answers: dict[int, np.ndarray], dtype: np.dtype) -> np.ndarray:
    width = next((answer.shape[1] for answer in answers.values()), 1)
    total = Combining(packing, width, dtype)
    for rank in packing.ranks:
        total.add(rank, answers[rank])
    return total.output()


@st.composite
def owners(draw: st.DrawFn, case: Case) -> list[list[int]]:
    """Ranks dealt out to a few owners, in order."""
    dealt = [draw(st.integers(0, 2)) for _ in range(case.world_size)]
    return [[r for r, owner in enumerate(dealt) if owner == o] for o in range(3) if o in dealt]


@given(st.data(), cases())
def test_packets_hold_every_slot_exactly_once_and_every_row_once_per_owner(data, case: Case):
    each, routing, packing = case.num_experts // case.world_size, by_slot(case.routing), None
    packing = packing_of(case)
    slots = 0
    for ranks in data.draw(owners(case)):
        served = [rank for rank in ranks if rank in packing.ranks]
        there = np.isin(routing // each, ranks) & (routing >= 0)
        if not served:
            assert not there.any()
            continue
        packet = packing.packet(served)
        sent = by_slot(packet.routing)
        slots += (sent >= 0).sum()
        assert len(packet.rows) == there.any(axis=1).sum()
        np.testing.assert_array_equal(np.sort(sent[sent >= 0]), np.sort(routing[there]))
    assert slots == (routing >= 0).sum()


@given(cases())
def test_rows_with_one_slot_are_sorted_by_expert_and_others_stay_in_order(case: Case):
    packing = packing_of(case)
    for rank in packing.ranks:
        packet = packing.packet([rank])
        if packing.k == 1:
            assert (np.diff(by_slot(packet.routing)[:, 0].astype(int)) >= 0).all()
        else:
            rows = packing.rows(rank)
            assert (np.diff(rows) > 0).all()


@given(cases(dtypes=[np.float64]))
def test_rows_return_to_their_places(case: Case):
    """Ranks that answer with the rows themselves give each row times the ranks that it went to."""
    each, routing, packing = case.num_experts // case.world_size, by_slot(case.routing), None
    packing = packing_of(case)
    answers = {rank: packing.packet([rank]).rows for rank in packing.ranks}
    if not answers:
        return
    back = combined(packing, answers, case.tokens.dtype)
    ranks = [
        ((routing >= rank * each) & (routing < (rank + 1) * each)).any(axis=1)
        for rank in range(case.world_size)
    ]
    np.testing.assert_allclose(back, case.tokens * np.sum(ranks, axis=0)[:, None], rtol=1e-12)


def served(packet: Packet, ranks: Sequence[int], experts: np.ndarray, world_size: int):
    """What ranks answer to a packet that they share."""
    each = len(experts) // world_size
    segments = sort_slots(packet.routing, packet.topk_weights, len(experts), 0, 1)
    return {
        rank: answer_of_rank(
            packet.rows,
            segments,
            packet.topk_weights,
            experts[rank * each : (rank + 1) * each],
            rank,
        )
        for rank in ranks
    }


@given(st.data(), cases(dtypes=[np.float32, np.float64]))
def test_the_bits_do_not_depend_on_who_shares_a_packet(data, case: Case):
    """And they are those of the ranks without any packet, and the values of the reference."""
    packing = packing_of(case)
    if not packing.ranks:
        return
    d = case.tokens.shape[1]
    experts = np.random.default_rng(0).standard_normal((case.num_experts, d, 3))
    experts = experts.astype(case.tokens.dtype)
    each = case.num_experts // case.world_size
    in_place = {
        rank: answer_of_rank(
            case.tokens,
            packing.segments,
            case.topk_weights,
            experts[rank * each : (rank + 1) * each],
            rank,
        )
        for rank in packing.ranks
    }
    for ranks in data.draw(owners(case)):
        here = [rank for rank in ranks if rank in packing.ranks]
        if here:
            for rank, answer in served(
                packing.packet(here), here, experts, case.world_size
            ).items():
                np.testing.assert_array_equal(answer, in_place[rank])
    got = combined(packing, in_place, case.tokens.dtype)
    want = reference.expert_parallel_dispatch(
        case.tokens, case.routing, [reference.linear(W) for W in experts], 0, 1,
        case.topk_weights, d_out=3,
    )  # fmt: skip
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4)


@given(cases(dtypes=[np.float32]))
def test_little_travels_with_the_rows(case: Case):
    packing = packing_of(case)
    for rank in packing.ranks:
        packet = packing.packet([rank])
        slots = by_slot(packet.routing).size
        assert packet.routing.nbytes == slots  # fewer than 128 experts: one byte each
        assert packet.rows.nbytes == len(packet.rows) * case.tokens.shape[1] * 4
        weights = 0 if packet.topk_weights is None else packet.topk_weights.nbytes
        assert weights in (0, 4 * slots, 8 * slots)


@pytest.mark.parametrize("value", [4, -2, 100])
def test_an_index_out_of_range_is_refused(value):
    routing = np.array([[0, 1], [value, 2]])
    with pytest.raises(ValueError, match=rf"\[-1, 4\).*{value}, and 1 of 4 values"):
        Packing(np.ones((2, 3)), routing, None, 2, 2)


def test_a_lost_answer_is_noticed():
    packing = Packing(np.ones((3, 2)), np.array([0, 1, 1]), None, 1, 2)
    total = Combining(packing, 2, np.dtype("f8"))
    total.add(0, np.ones((1, 2)))
    with pytest.raises(ValueError, match="rank 1 must answer .* 2 rows were sent and 1 came back"):
        total.add(1, np.ones((1, 2)))


def test_16_bit_answers_are_rounded_once():
    """Two ranks whose answers cancel leave what float32 leaves, not what 16 bits lose."""
    tokens = np.ones((4, 2), np.float16)
    packing = Packing(tokens, np.array([[0, 1]] * 4), None, 1, 2)
    large = np.full((4, 2), 6e4, np.float32)
    total = Combining(packing, 2, tokens.dtype)
    total.add(0, large * 2)
    total.add(1, 0.5 - large * 2)
    assert total.output().dtype == np.float16
    np.testing.assert_array_equal(total.output(), 0.5)
