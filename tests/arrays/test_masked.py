"""What is masked has no value, and is refused at every door: a mask would be lost in silence."""

from __future__ import annotations

import dask.array as da
import numpy as np
import pytest

from dask_ep import (
    Experts,
    MoELayer,
    Router,
    expert_parallel,
    expert_parallel_dispatch,
    open_tokens,
    store,
)
from dask_ep.layers.capacity import Capacity, choose_rows, limit_capacity
from dask_ep.layers.routing import look_up, route, weigh_chosen
from dask_ep.placement.policies import balance_layers, place
from dask_ep.placement.routing_stats import survey

E, D = 4, 6
W = np.random.default_rng(0).standard_normal((E, D, D)).astype("f4")
TOKENS = np.ones((5, D), "f4")
ROUTING = np.array([0, 1, 2, 3, 0])
ROUTER = Router(E, 1)


def masked(array):
    """The same values, one of them masked."""
    mask = np.zeros(array.shape, bool)
    mask.flat[1] = True
    return np.ma.MaskedArray(array, mask)


def lazy(array):
    return da.from_array(array, chunks=-1)


def secretly_masked(array):
    """A Dask array whose blocks are masked, though it says that they are not."""
    return lazy(array).map_blocks(masked, dtype=array.dtype, meta=np.empty((0,) * array.ndim, "f4"))


def layer(**arrays):
    given = {"router_weight": W[:, :, 0]} | arrays
    return MoELayer(ROUTER, Experts.linear(W), **given)


BIAS = masked(W[:, 0])
GATED = {"gate": W, "up": W, "down": W}
DOORS = {
    "linear": lambda: Experts.linear(masked(W)),
    "bias": lambda: Experts.linear(W, bias=BIAS),
    "list": lambda: Experts.linear([W[0], masked(W[1])]),
    "list of Dask arrays": lambda: Experts.linear([lazy(W[0]), lazy(masked(W[1]))]),
    "list with one Dask array": lambda: Experts.linear([lazy(W[0]), masked(W[1])]),
    "Dask array": lambda: Experts.linear(lazy(masked(W))),
    "Dask array that hides it": lambda: Experts.linear(secretly_masked(W)).load(),
    "up of an mlp": lambda: Experts.mlp(masked(W), W),
    "down of an mlp": lambda: Experts.mlp(W, masked(W)),
    **{f"{n} of gated": lambda n=n: Experts.gated(**GATED | {n: masked(W)}) for n in GATED},
    **{
        f"{n}_bias of gated": lambda n=n: Experts.gated(**GATED, **{f"{n}_bias": BIAS})
        for n in GATED
    },
    "gate_up": lambda: Experts.gated_fused(masked(W), W[:, : D // 2]),
    "bare experts": lambda: expert_parallel(lazy(TOKENS), lazy(ROUTING), masked(W)),
    "bare list": lambda: expert_parallel(lazy(TOKENS), lazy(ROUTING), [*W[:3], masked(W[3])]),
    "bare Dask array": lambda: expert_parallel(lazy(TOKENS), lazy(ROUTING), lazy(masked(W))),
    "kernel, stacked": lambda: expert_parallel_dispatch(TOKENS, ROUTING, masked(W), 0, 1),
    "kernel, list": lambda: expert_parallel_dispatch(TOKENS, ROUTING, [masked(W[0])] * 4, 0, 1),
    "kernel, rows of a function": lambda: expert_parallel_dispatch(
        TOKENS, ROUTING, [lambda rows: np.ma.masked_greater(rows, 0)] * 4, 0, 1
    ),
    "router_weight": lambda: layer(router_weight=masked(W[:, :, 0])),
    "router_bias": lambda: layer(router_bias=BIAS[:, 0]),
    "selection_bias": lambda: layer(selection_bias=BIAS[:, 0]),
    "shared": lambda: layer(shared=Experts.linear(masked(W))),
    "shared_gate": lambda: layer(shared=Experts.linear(W), shared_gate=masked(W[0, 0])),
    "table": lambda: layer(table=masked(ROUTING[:, None])),
    "token_ids": lambda: layer(table=ROUTING[:, None])(
        lazy(TOKENS), token_ids=lazy(masked(ROUTING))
    ),
    "routing of a layer": lambda: layer()(
        lazy(TOKENS[None]), routing=(lazy(masked(ROUTING[None, :, None])), lazy(W[:1, :5, :1]))
    ),
    "weights of a layer": lambda: layer()(
        lazy(TOKENS[None]), routing=(lazy(ROUTING[None, :, None]), lazy(masked(W[:1, :5, :1])))
    ),
    "route, weight": lambda: route(TOKENS, ROUTER, masked(W[:, :, 0])),
    "route, bias": lambda: route(TOKENS, ROUTER, W[:, :, 0], bias=BIAS[:, 0]),
    "look_up, ids": lambda: look_up(masked(ROUTING), ROUTING[:, None]),
    "look_up, table": lambda: look_up(ROUTING, masked(ROUTING[:, None])),
    "weigh_chosen": lambda: weigh_chosen(TOKENS, masked(ROUTING[:, None]), ROUTER, W[:, :, 0]),
    "capacity, indices": lambda: limit_capacity(
        lazy(masked(ROUTING[:, None])), lazy(W[0, :5, :1]), E, Capacity(1)
    ),
    "capacity, weights": lambda: limit_capacity(
        lazy(ROUTING[:, None]), lazy(masked(W[0, :5, :1])), E, Capacity(1)
    ),
    "expert choice": lambda: choose_rows(lazy(masked(W[0])), 1.0),
    **{
        f"loads of {policy}": lambda policy=policy: place(policy, masked(np.arange(4)), 2)
        for policy in ("packed", "balanced", "exact")
    },
    "loads of layers": lambda: balance_layers(
        masked(np.ones((2, 4))), num_physical=4, world_size=2
    ),
    "a survey": lambda: survey(masked(ROUTING), E),
    "tokens opened": lambda: open_tokens(masked(TOKENS)),
}


@pytest.mark.parametrize("door", DOORS)
def test_what_is_masked_is_refused(door):
    with pytest.raises(TypeError, match="must not be a masked array; fill it"):
        DOORS[door]()


def test_a_masked_output_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(TypeError, match="an output must not be a masked array"):
        store(lazy(masked(TOKENS)), tmp_path / "y.npy")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [np.complex64, object, "U3"])
def test_a_function_gives_real_numbers(dtype):
    experts = [lambda rows: rows.astype(dtype)] * E
    with pytest.raises(TypeError, match=r"expert_Ws\[0\] must give rows of real numbers, but gave"):
        expert_parallel_dispatch(TOKENS, ROUTING, experts, 0, 1)
    y = expert_parallel(lazy(TOKENS), lazy(ROUTING), experts, world_size=2)
    with pytest.raises(TypeError, match="real numbers, but gave"):
        y.compute(scheduler="sync")


def test_a_function_may_give_whole_numbers():
    experts = [lambda rows: rows.astype(np.int64)] * E
    y = expert_parallel_dispatch(TOKENS, ROUTING, experts, 0, 1)
    np.testing.assert_array_equal(y, TOKENS)
