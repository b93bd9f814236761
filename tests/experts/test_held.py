"""Experts held as they are stored give the same bits from less memory."""

from __future__ import annotations

import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import dask.array as da
import ml_dtypes
import numpy as np
import pytest

from dask_ep.experts.experts import Experts
from dask_ep.experts.stored_experts import held_as_stored
from dask_ep.layers.checkpoint import load_moe_layer
from tests.checkpoints import CASES, FIXTURES, LAYER, expected


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_layer_held_as_stored_gives_the_same_bits(case):
    hidden = da.from_array(expected(case)["hidden"], chunks=(2, 5, -1))
    plain, stored = (load_moe_layer(FIXTURES / case, LAYER, as_stored=s) for s in (False, True))
    for world_size in (1, 3):
        want, got = (layer(hidden, world_size=world_size) for layer in (plain, stored))
        np.testing.assert_array_equal(got.compute(), want.compute())
    assert stored(hidden).name != plain(hidden).name


@pytest.mark.parametrize(
    ("case", "least"),
    [("deepseek_v3_bfloat16", 2), ("deepseek_v3_fp8", 3.5), ("gpt_oss_mxfp4", 5)],
)
def test_memory_is_that_of_the_file(case, least, float32_products):
    experts = load_moe_layer(FIXTURES / case, LAYER, as_stored=True).experts
    local = experts.load([1, 2])
    assert local.nbytes == experts.nbytes * 2 // experts.num_experts
    assert sys.getsizeof(local) >= local.nbytes
    plain = load_moe_layer(FIXTURES / case, LAYER).experts.load([1, 2])
    assert plain.nbytes >= least * local.nbytes


def test_threads_do_not_get_each_others_expert():
    rng = np.random.default_rng(0)
    experts = Experts.linear(rng.standard_normal((6, 8, 8)).astype(ml_dtypes.bfloat16))
    rows = rng.standard_normal((5, 8), dtype=np.float32)
    local, plain = held_as_stored(experts).load(), experts.load()

    def look(i):
        e = i * 5 % 6
        return np.array_equal(local[e](rows), plain[e](rows))

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(look, range(400)))


def test_a_copy_in_another_process_reads_its_files_again():
    local = load_moe_layer(FIXTURES / "gpt_oss_mxfp4", LAYER, as_stored=True).experts.load([0, 3])
    sent = pickle.dumps(local)
    assert len(sent) < 3000 < local.nbytes
    rows = np.ones((2, 64), np.float32)
    for mine, theirs in zip(local, pickle.loads(sent), strict=True):
        np.testing.assert_array_equal(theirs(rows), mine(rows))


def test_an_empty_slot_holds_nothing_and_takes_no_rows():
    experts = held_as_stored(Experts.linear(np.ones((3, 2, 2), np.float32)))
    local = experts.load([2, -1])
    assert local.nbytes == 16
    with pytest.raises(ValueError, match="3 rows are routed to an empty place"):
        local[1](np.ones((3, 2), np.float32))


def test_dask_arrays_have_no_stored_form():
    experts = Experts.linear(da.ones((3, 2, 2), dtype=np.float32))
    with pytest.raises(ValueError, match="but w is a Dask array"):
        held_as_stored(experts)
