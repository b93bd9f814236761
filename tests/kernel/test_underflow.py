"""Numbers that become too small for their dtype are 0, whatever `np.seterr` says."""

from __future__ import annotations

import math

import dask.array as da
import numpy as np
import pytest

from dask_ep import Experts, MoELayer, Router, expert_parallel, expert_parallel_dispatch
from dask_ep.kernel import reference
from dask_ep.kernel.kinds import ACTIVATIONS
from dask_ep.layers.capacity import Capacity, ExpertChoice
from dask_ep.layers.routing import all_scores, route, weigh_chosen

E, D = 4, 8
TINY = 1e-30


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype("f4")


W = normal(E, D, D, seed=1)
ROUTING = np.arange(24).reshape(12, 2) % E
WEIGHTS = np.full((12, 2), TINY, "f4")


def hidden(dtype):
    """Rows of all sizes: products of some underflow, and activations of others."""
    rows = normal(12, D) * np.array([1e-38, 1e-25, 1e-8, 0.1, 1.0, 20.0])[:, None].repeat(2, 0)
    return rows.astype(dtype)


def kinds():
    yield "linear", Experts.linear(W * np.float32(TINY))
    yield "float64 weights", Experts.linear(W.astype("f8") * 1e-45)
    for name in ("silu", "gelu", "gelu_tanh", "relu", "relu2"):
        yield f"gated {name}", Experts.gated(W, W, W, activation=name)
        yield f"mlp {name}", Experts.mlp(W, W, activation=name)


KINDS = dict(kinds())


def same_under_seterr(compute):
    """What is computed, as NumPy comes and with every floating point error raised."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore", divide="ignore"):
        want = compute()
    with np.errstate(all="raise"):
        got = compute()
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world_size", [1, 2])
def test_experts(dtype, kind, world_size):
    x = da.from_array(hidden(dtype), chunks=(5, D))
    routing, weights = (da.from_array(a, chunks=(5, 2)) for a in (ROUTING, WEIGHTS))
    y = expert_parallel(x, routing, KINDS[kind], topk_weights=weights, world_size=world_size)
    same_under_seterr(lambda: y.compute(scheduler="sync"))


def test_the_kernel():
    x = hidden(np.float16)
    same_under_seterr(
        lambda: expert_parallel_dispatch(x, ROUTING, list(W), 0, 1, topk_weights=WEIGHTS)
    )


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrtsoftplus", "softmax_chosen",
                                   "sigmoid_chosen", "sparsemixer"])  # fmt: skip
def test_routers(score):
    x, weight, router = hidden(np.float64), W[:, :, 0].astype("f8"), Router(E, 2, score)
    same_under_seterr(lambda: route(x, router, weight)[1])
    if score in ("softmax", "sigmoid", "sqrtsoftplus"):
        same_under_seterr(lambda: all_scores(x, score, weight))
    if score != "sparsemixer":
        same_under_seterr(lambda: weigh_chosen(x, ROUTING, router, weight))


LAYERS = {
    "shared": {"shared": Experts.gated(W, W, W), "shared_gate": normal(D).astype("f8") * 1e-45},
    "capacity": {"capacity": Capacity(0.8)},
    "expert choice": {"router": ExpertChoice(E, 1.0)},
    "residual": {"residual": True},
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_layers(kind, dtype):
    given = {"router": Router(E, 2), "router_weight": W[:, :, 0].astype("f8") * 1e-40}
    layer = MoELayer(experts=Experts.gated(W, W, W), **given | LAYERS[kind])
    x = da.from_array(hidden(dtype), chunks=(5, D))
    same_under_seterr(lambda: layer(x, world_size=1).compute(scheduler="sync"))


@pytest.mark.parametrize(
    ("name", "at", "exact"),
    [
        ("silu", -50.0, -50 * math.exp(-50) / (1 + math.exp(-50))),
        ("gelu", -7.0, -3.5 * math.erfc(7 / math.sqrt(2))),
        ("gelu_tanh", -5.0, -5 / (1 + math.exp(math.sqrt(8 / math.pi) * (5 + 0.044715 * 125)))),
    ],
)
def test_activations_keep_their_digits_far_below_zero(name, at, exact):
    """Where 1 + tanh(x) or 1 + erf(x) would have none left."""
    assert reference.ACTIVATIONS[name](np.array([at]), 1.0)[0] == pytest.approx(exact, rel=1e-13)
    x = np.array([at], np.float32)
    ACTIVATIONS[name](x, 1.0)
    assert x[0] == pytest.approx(exact, rel=1e-5)
