"""An error about a value names its row: of the whole array, or of its chunk if that is unknown."""

from __future__ import annotations

import re

import dask.array as da
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dask_ep import Experts, MoELayer, Router, expert_parallel
from dask_ep.layers.capacity import ExpertChoice
from tests.strategies import row_chunks

E, D = 4, 3
W = np.ones((E, D, D), "f4")
LAYER = MoELayer(Router(E, 2), Experts.linear(W), W[:, :, 0])
CHOICE = MoELayer(ExpertChoice(E, 1.0), Experts.linear(W), W[:, :, 0])
TABLE = MoELayer(Router(E, 2), Experts.linear(W), table=np.array([[0, 1], [2, 3]]))


def bad_index(x, chunks, row, ranks):
    routing = np.zeros((len(x), 2), int)
    routing[row, 1] = 9
    return expert_parallel(chunks(x), chunks(routing), W, world_size=ranks)


def nan_weight(x, chunks, row, ranks):
    weights = np.ones((len(x), 2), "f4")
    weights[row, 0] = np.nan
    routing = chunks(np.zeros((len(x), 2), int))
    return expert_parallel(chunks(x), routing, W, topk_weights=chunks(weights), world_size=ranks)


def nan_row(layer):
    def build(x, chunks, row, ranks):
        x = x.copy()
        x[row, 1] = np.nan
        return layer(chunks(x), world_size=ranks)

    return build


def bad_token(x, chunks, row, ranks):
    ids = np.zeros((len(x), 1), int)
    ids[row] = 2
    return TABLE(chunks(x), token_ids=chunks(ids)[:, 0], world_size=ranks)


BUILDERS = {
    "index": bad_index,
    "weight": nan_weight,
    "router": nan_row(LAYER),
    "token": bad_token,
}


@pytest.mark.parametrize("kind", BUILDERS)
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_the_row_of_the_whole_array_is_named(kind, data):
    n = data.draw(st.integers(2, 30))  # Dask takes a single row for one to broadcast
    sizes, row = data.draw(row_chunks(n)), data.draw(st.integers(0, n - 1))
    known = data.draw(st.booleans())

    def chunks(array):
        lazy = da.from_array(array, chunks=(sizes, -1))
        # Rows picked by a mask come in chunks of unknown lengths.
        return lazy if known else lazy[da.ones(n, chunks=(sizes,), dtype=bool)]

    y = BUILDERS[kind](np.ones((n, D), "f4"), chunks, row, data.draw(st.integers(1, 2)))
    with pytest.raises(ValueError, match="token chunk") as caught:
        y.compute(scheduler="sync")
    words = str(caught.value)
    chunk = int(re.search(r"token chunk (\d+)", words)[1])
    starts = np.cumsum([0, *sizes])
    assert starts[chunk] <= row < starts[chunk + 1]
    first_known = known or chunk == 0
    assert (f"row {row} of the whole array" in words) == first_known, words
    assert str(row - starts[chunk]) in words


def test_indices_that_count_from_1_are_an_error_that_says_so():
    routing = da.from_array(np.array([1, 2, 3, 4]), chunks=2)
    y = expert_parallel(da.ones((4, D), chunks=(2, D)), routing, W, world_size=1)
    with pytest.raises(ValueError, match="no index here is 0: they count from 0, not from 1"):
        y.compute(scheduler="sync")
