"""Results keep their bits wherever Dask puts the arrays that it has received."""

import dask
import dask.array as da
import numpy as np
import pytest

from dask_ep import Experts, expert_parallel, expert_parallel_dispatch, load_moe_layer
from dask_ep.arrays.memory import aligned
from dask_ep.layers.collect import collect
from tests import unaligned
from tests.checkpoints import FIXTURES

N, CHUNK, E, K = 90, 13, 4, 2


def given(d, f):
    rng = np.random.default_rng(d)
    x = rng.standard_normal((N, d), np.float32)
    routing = np.stack([rng.permutation(E)[:K] for _ in range(N)])
    weights = {"gate": (f, d), "up": (f, d), "down": (d, f)}
    matrices = {
        name: rng.standard_normal((E, *shape), np.float32) / 8 for name, shape in weights.items()
    }
    return x, routing, matrices


@pytest.mark.parametrize("order", "CF")
@pytest.mark.parametrize("d", [1, 32, 256])
def test_an_aligned_copy_is_stored_in_the_same_order(order, d):
    array = np.asarray(np.random.default_rng(0).standard_normal((d, 3)), order=order)
    there = unaligned.moved(array)
    assert not there.flags.aligned
    copy = aligned(there)
    assert copy.flags.aligned
    assert copy.strides == array.strides
    np.testing.assert_array_equal(copy, array)


@pytest.mark.parametrize("order", "CF")
@pytest.mark.parametrize("d", [32, 256])
def test_unaligned_matrices_multiply_as_aligned_ones_do(d, order):
    x, routing, matrices = given(d, d + 16)
    Ws = [np.asarray(W, order=order) for W in matrices["up"].transpose(0, 2, 1)]
    expected = expert_parallel_dispatch(x, routing, Ws, 0, 1)
    arrived = unaligned.moved([x, routing, Ws])
    assert not any(W.flags.aligned for W in arrived[2])
    np.testing.assert_array_equal(expert_parallel_dispatch(*arrived, 0, 1), expected)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("d", [32, 256])
def test_a_layer_has_the_same_bits_from_arrays_that_moved(d, world_size, transposed):
    x, routing, matrices = given(d, d + 16)
    if not transposed:
        matrices = {n: np.ascontiguousarray(W.transpose(0, 2, 1)) for n, W in matrices.items()}
    experts = Experts.gated(*matrices.values(), transposed=transposed)
    tokens, lazy = (da.from_array(a, chunks=(CHUNK, -1)) for a in (x, routing))
    y = expert_parallel(tokens, lazy, experts, world_size=world_size)
    np.testing.assert_array_equal(y.compute(scheduler=unaligned.get), y.compute(scheduler="sync"))


@pytest.mark.parametrize("what", ["usage", "reap", "gram", "router"])
def test_statistics_have_the_same_bits_from_arrays_that_moved(what):
    layer = load_moe_layer(FIXTURES / "mixtral", 1)
    x = np.random.default_rng(0).standard_normal((N, layer.experts.d), np.float32)
    found = collect(da.from_array(x, chunks=(CHUNK, -1)), layer, what=[what])
    (expected,) = dask.compute(found, scheduler="sync")
    (arrived,) = dask.compute(found, scheduler=unaligned.get)
    assert arrived.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(arrived[name], expected[name])


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "nemotron_h", "qwen2_moe"])
def test_a_layer_of_a_checkpoint_has_the_same_bits_from_arrays_that_moved(family):
    layer = load_moe_layer(FIXTURES / family, 1)
    x = np.random.default_rng(0).standard_normal((N, layer.d), np.float32)
    y = layer(da.from_array(x, chunks=(CHUNK, -1)))
    np.testing.assert_array_equal(y.compute(scheduler=unaligned.get), y.compute(scheduler="sync"))
