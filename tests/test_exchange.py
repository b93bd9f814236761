"""A row goes once to each rank that serves it, and comes back summed; none is lost."""

from __future__ import annotations

import numpy as np
import pytest
from dask_ep.exchange import Packet, send, sum_ranks
from hypothesis import given

from tests.strategies import Case, cases


def packets(case: Case) -> list[Packet]:
    each = case.num_experts // case.world_size
    return [
        send(case.tokens, case.routing, case.topk_weights, rank, each, case.num_experts)
        for rank in range(case.world_size)
    ]


def by_slot(array: np.ndarray) -> np.ndarray:
    return array[:, None] if array.ndim == 1 else array


@given(cases())
def test_packets_hold_every_slot_exactly_once_and_every_row_once_per_rank(case: Case):
    each = case.num_experts // case.world_size
    routing = by_slot(case.routing)
    sent = packets(case)
    assert sum((by_slot(p.routing) >= 0).sum() for p in sent) == (routing >= 0).sum()
    for rank, packet in enumerate(sent):
        there = (routing >= rank * each) & (routing < (rank + 1) * each)
        assert len(packet.rows) == there.any(axis=1).sum()
        np.testing.assert_array_equal(
            np.sort(by_slot(packet.routing)[by_slot(packet.routing) >= 0]), np.sort(routing[there])
        )


@given(cases())
def test_a_packet_comes_ordered_by_expert(case: Case):
    for packet in packets(case):
        slots = by_slot(packet.routing).astype(float)
        first = np.where(slots < 0, np.inf, slots).min(axis=1, initial=np.inf)
        assert (np.diff(first) >= 0).all()


@given(cases(dtypes=[np.float64]))
def test_rows_come_back_to_their_places(case: Case):
    """Ranks that answer with the rows themselves give each row times the ranks that it went to."""
    each = case.num_experts // case.world_size
    routing = by_slot(case.routing)
    back = sum_ranks(case.routing, [p.rows for p in packets(case)], each, case.tokens.dtype)
    ranks = [
        ((routing >= rank * each) & (routing < (rank + 1) * each)).any(axis=1)
        for rank in range(case.world_size)
    ]
    np.testing.assert_allclose(back, case.tokens * np.sum(ranks, axis=0)[:, None], rtol=1e-12)


@given(cases(dtypes=[np.float32]))
def test_little_travels_beside_the_rows(case: Case):
    for packet in packets(case):
        slots = by_slot(packet.routing).size
        assert packet.routing.nbytes == slots  # fewer than 128 experts: one byte each
        assert packet.rows.nbytes == len(packet.rows) * case.tokens.shape[1] * 4
        weights = 0 if packet.topk_weights is None else packet.topk_weights.nbytes
        assert weights in (0, 4 * slots, 8 * slots)


@pytest.mark.parametrize("value", [4, -2, 100])
def test_an_index_out_of_range_is_refused_at_every_rank(value):
    routing = np.array([[0, 1], [value, 2]])
    for rank in range(2):
        with pytest.raises(
            ValueError, match=rf"\[-1, 4\), but routing\[1.*\] is {value}, and 1 of 4"
        ):
            send(np.ones((2, 3)), routing, None, rank, 2, 4)


def test_a_lost_answer_is_noticed():
    with pytest.raises(ValueError, match="rank 1 must answer .* 2 rows were sent and 1 came back"):
        sum_ranks(np.array([0, 1, 1]), [np.ones((1, 2)), np.ones((1, 2))], 1, np.dtype("f8"))
