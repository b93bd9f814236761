"""A layer is its router, experts, shared experts and residual, whatever the chunks and ranks."""

from __future__ import annotations

import pickle
import warnings

import dask
import dask.array as da
import ml_dtypes
import numpy as np
import pytest
from dask.array.utils import assert_eq
from hypothesis import given, settings
from hypothesis import strategies as st

from dask_ep.errors import ReadError
from dask_ep.experts.experts import Experts
from dask_ep.graph.pipeline import UnpinnedWarning, expert_parallel
from dask_ep.kernel import reference
from dask_ep.layers.capacity import Capacity, ExpertChoice
from dask_ep.layers.checkpoint import load_moe_layer
from dask_ep.layers.layer import MoELayer
from dask_ep.layers.routing import Router
from dask_ep.placement.policies import place
from dask_ep.placement.replica_choice import ticket_load
from dask_ep.storage.storage import open_tokens, store
from tests import plain_routers
from tests.checkpoints import FIXTURES, LAYER, expected
from tests.strategies import row_chunks

E, D, F = 5, 6, 4


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape, dtype=np.float32)


PLAIN = {
    "router_weight": normal(E, D, seed=1),
    "gate": normal(E, D, F, seed=2),
    "up": normal(E, D, F, seed=3),
    "down": normal(E, F, D, seed=4),
    "shared": (normal(1, D, 3, seed=5), normal(1, D, 3, seed=6), normal(1, 3, D, seed=7)),
    "shared_gate": normal(D, seed=8),
}
ROUTER = Router(E, 2, norm_topk_prob=True)


def make(router=ROUTER, **changes) -> MoELayer:
    experts = Experts.gated(
        PLAIN["gate"],
        PLAIN["up"],
        PLAIN["down"],
        apply_router_weight_on_input=router.apply_router_weight_on_input,
    )
    arguments = {"router": router, "experts": experts, "router_weight": PLAIN["router_weight"]}
    return MoELayer(**arguments | changes)


def shared() -> dict:
    return {"shared": Experts.gated(*PLAIN["shared"]), "shared_gate": PLAIN["shared_gate"]}


def plain_layer(hidden, router=ROUTER, *, with_shared=False, gated=False, residual=False):
    """The layer on rows (n, d), one row at a time, in float64."""
    hidden = hidden.astype(np.float64)
    logits = hidden @ PLAIN["router_weight"].T.astype(np.float64)
    chosen = [plain_routers.route_row(list(map(float, row)), router) for row in logits]
    indices = np.array([[e for e, _ in pairs] for pairs in chosen]).reshape(-1, router.k)
    weights = np.array([[w for _, w in pairs] for pairs in chosen]).reshape(-1, router.k)
    experts = [
        reference.gated(PLAIN["gate"][e], PLAIN["up"][e], PLAIN["down"][e]) for e in range(E)
    ]
    y = reference.moe(
        hidden,
        indices,
        experts,
        weights,
        d_out=D,
        apply_router_weight_on_input=router.apply_router_weight_on_input,
    )
    if with_shared:
        one = reference.gated(*(matrix[0] for matrix in PLAIN["shared"]))
        for row, x in enumerate(hidden):
            logit = float(x @ PLAIN["shared_gate"].astype(np.float64))
            y[row] += one(x) * (plain_routers.sigmoid(logit) if gated else 1)
    return y + hidden if residual else y


@st.composite
def chunked_hidden(draw):
    """Hidden states of two to four axes, with any chunks along all of them."""
    leading = draw(st.lists(st.integers(0, 4), min_size=1, max_size=3))
    shape = (*leading, D)
    chunks = tuple(draw(row_chunks(n)) for n in shape)
    return da.from_array(normal(*shape, seed=9), chunks=chunks)


@pytest.mark.slow
@given(
    hidden=chunked_hidden(),
    world_size=st.integers(1, 7),
    with_shared=st.booleans(),
    gated=st.booleans(),
    residual=st.booleans(),
    on_input=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_any_layer_on_any_chunks_and_ranks_is_the_plain_one(
    hidden, world_size, with_shared, gated, residual, on_input
):
    router = Router(E, 2, norm_topk_prob=True, apply_router_weight_on_input=on_input)
    options = shared() if with_shared else {}
    if not gated:
        options.pop("shared_gate", None)
    y = make(router, residual=residual, **options)(hidden, world_size=world_size)
    rows = hidden.compute().reshape(-1, D)
    want = plain_layer(rows, router, with_shared=with_shared, gated=gated, residual=residual)
    assert y.chunks[:-1] == hidden.chunks[:-1]
    assert y.dtype == np.float32
    assert_eq(y, want.reshape(hidden.shape).astype(np.float32), rtol=1e-4, atol=1e-4)


BATCHES = {
    "capacity": lambda: make(capacity=Capacity(0.8), **shared()),
    "capacity by position": lambda: make(capacity=Capacity(0.8, "position")),
    "expert choice": lambda: make(ExpertChoice(E, factor=1.5)),
    "table": lambda: make(table=np.arange(14).reshape(7, 2) % E),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", BATCHES)
@given(hidden=chunked_hidden(), world_size=st.integers(1, 3))
@settings(max_examples=10, deadline=None)
def test_a_layer_gives_each_row_the_same_in_any_chunks(kind, hidden, world_size):
    assert_same_in_one_chunk(kind, hidden, world_size)


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("chunks", [(0, 1), (1, 0), (0, 1, 0)], ids=str)
def test_a_single_row_next_to_an_empty_chunk_is_one_row(kind, chunks):
    """Dask broadcasts an axis of length 1, if it is left to align the chunks."""
    hidden = da.from_array(normal(1, D, seed=9), chunks=(chunks, D))
    assert_same_in_one_chunk(kind, hidden, world_size=2)


def assert_same_in_one_chunk(kind, hidden, world_size):
    layer = BATCHES[kind]()
    ids = np.arange(hidden.size // D).reshape(hidden.shape[:-1]) % 7
    together = hidden.rechunk(-1)
    results = []
    for x in (hidden, together):
        token_ids = da.from_array(ids, chunks=x.chunks[:-1]) if kind == "table" else None
        y = layer(x, token_ids=token_ids, world_size=world_size)
        load = layer.tokens_per_expert(x, token_ids=token_ids)
        results += [(y, *layer.route(x, token_ids=token_ids), load)]
    for some, all_in_one in zip(*results, strict=True):
        assert_eq(some, all_in_one, rtol=1e-5, atol=1e-5)


def test_results_do_not_depend_on_chunks_ranks_and_schedulers():
    case = "deepseek_v3"
    want = expected(case)
    layer = load_moe_layer(FIXTURES / case, LAYER)
    scale = np.abs(want["output"]).max()
    for chunks in [(3, 8, -1), (1, 8, -1), (2, 3, 7), (1, 1, -1)]:
        for world_size, scheduler in [(1, "sync"), (2, "threads"), (5, "threads"), (12, "sync")]:
            hidden = da.from_array(want["hidden"], chunks=chunks)
            y = layer(hidden, world_size=world_size).compute(scheduler=scheduler)
            assert np.abs(y - want["output"]).max() <= 1e-6 * scale


def test_a_layer_runs_on_a_cluster():
    from distributed import Client, LocalCluster

    want = expected("qwen2_moe")
    layer = load_moe_layer(FIXTURES / "qwen2_moe", LAYER)
    hidden = da.from_array(want["hidden"], chunks=(1, 3, -1))
    with (
        LocalCluster(
            n_workers=2, threads_per_worker=1, processes=False, dashboard_address="127.0.0.1:0"
        ) as cluster,
        Client(cluster),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", UnpinnedWarning)
        y = layer(hidden, world_size=2).compute()
    assert np.abs(y - want["output"]).max() <= 1e-6 * np.abs(want["output"]).max()


def test_experts_may_be_functions():
    functions = [lambda x, e=e: x * (e + 1) for e in range(E)]
    layer = make(experts=Experts.callables(functions), residual=True, **shared())
    hidden = da.from_array(normal(2, 9, D, seed=9), chunks=(1, 4, D))
    indices, weights = dask.compute(*layer.route(hidden))
    factor = 1 + (weights * (indices + 1)).sum(axis=-1, keepdims=True)
    rest = make(**shared())(hidden) - make()(hidden)
    want = hidden.compute() * factor + rest.compute()
    np.testing.assert_allclose(layer(hidden, world_size=2).compute(), want, rtol=1e-4, atol=1e-4)


def test_layers_can_be_stacked():
    hidden = da.from_array(normal(9, D, seed=9), chunks=(4, D))
    first, second = make(residual=True), make(**shared())
    y = second(first(hidden))
    want = plain_layer(plain_layer(hidden.compute(), residual=True), with_shared=True, gated=True)
    np.testing.assert_allclose(y.compute(), want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(np.float64, 1e-6), (np.float16, 2e-3), (ml_dtypes.bfloat16, 1e-2)]
)
def test_the_output_has_the_dtype_of_the_hidden_states(dtype, tolerance):
    rows = normal(20, D, seed=9).astype(dtype)
    y = make(residual=True, **shared())(da.from_array(rows, chunks=(7, D)))
    assert y.dtype == dtype
    got = y.compute()
    assert got.dtype == dtype
    want = plain_layer(rows, with_shared=True, gated=True, residual=True)
    assert np.abs(got.astype(float) - want).max() <= tolerance * np.abs(want).max()


# --- routing by itself ---------------------------------------------------------------------------


def test_a_routing_can_be_looked_at_stored_and_replayed():
    hidden = da.from_array(normal(3, 5, D, seed=9), chunks=(2, 2, -1))
    layer = make(**shared())
    indices, weights = layer.route(hidden)
    assert indices.chunks == weights.chunks == ((2, 1), (2, 2, 1), (2,))
    assert (indices.dtype, weights.dtype) == (np.int32, np.float32)
    stored = dask.compute(indices, weights)
    plain = [plain_routers.route_row(list(map(float, row)), ROUTER) for row in
             hidden.compute().reshape(-1, D) @ PLAIN["router_weight"].T]  # fmt: skip
    assert stored[0].reshape(-1, 2).tolist() == [[e for e, _ in pairs] for pairs in plain]
    again = tuple(da.from_array(a, chunks=(1, -1, 1)) for a in stored)
    assert_eq(layer(hidden, routing=again), layer(hidden).compute())
    other = (da.zeros_like(indices), weights)
    assert not np.allclose(layer(hidden, routing=other), layer(hidden))


def test_a_routing_can_be_replayed_from_files(tmp_path):
    rows = da.from_array(normal(20, D, seed=9), chunks=(6, D))
    layer = make(capacity=Capacity(0.8), **shared())
    for name, array in zip(("indices", "weights"), layer.route(rows), strict=True):
        store(array, tmp_path / f"{name}.zarr")
    again = [open_tokens(tmp_path / f"{name}.zarr") for name in ("indices", "weights")]
    assert_eq(layer(rows, routing=tuple(again)), layer(rows), rtol=0, atol=0)
    y = expert_parallel(rows, again[0], layer.experts, topk_weights=again[1], world_size=2)
    assert_eq(y, make(capacity=Capacity(0.8))(rows), rtol=1e-6, atol=1e-6)


def test_tokens_per_expert_counts_the_rows_of_each_expert():
    hidden = da.from_array(normal(3, 5, D, seed=9), chunks=(2, 2, -1))
    layer = make()
    load = layer.tokens_per_expert(hidden)
    indices = layer.route(hidden)[0].compute()
    assert isinstance(load, da.Array)
    assert_eq(load, np.bincount(indices.ravel(), minlength=E))


def test_row_chunks_may_be_unknown():
    rows = normal(20, D, seed=9)
    hidden = da.from_array(rows, chunks=(6, D))
    some = hidden[da.from_array(rows[:, 0] > -0.5, chunks=6)]
    layer = make(residual=True, **shared())
    want = plain_layer(rows[rows[:, 0] > -0.5], with_shared=True, gated=True, residual=True)
    np.testing.assert_allclose(layer(some, world_size=2).compute(), want, rtol=1e-4, atol=1e-4)
    ragged = some[:, None, :]  # (nan, 1, d)
    np.testing.assert_allclose(layer(ragged).compute()[:, 0], want, rtol=1e-4, atol=1e-4)


def test_an_empty_array_is_a_layer_of_nothing():
    y = make(**shared())(da.zeros((0, D), chunks=(1, D), dtype=np.float32))
    assert y.compute().shape == (0, D)


# --- whole batches -------------------------------------------------------------------------------


@pytest.mark.parametrize("drop", ["score", "position"])
@pytest.mark.parametrize("chunks", [(3, 5, -1), (2, 2, -1), (1, 1, 2)])
def test_a_capacity_counts_over_the_whole_batch_in_c_order(drop, chunks):
    data = normal(3, 5, D, seed=9)
    hidden = da.from_array(data, chunks=chunks)
    limited = make(capacity=Capacity(0.8, drop))
    indices, weights = dask.compute(*limited.route(hidden))
    free = [a.compute().reshape(-1, 2).tolist() for a in make().route(hidden)]
    capacity = int(np.ceil(round(0.8 * 30 / E, 6)))
    want = plain_routers.drop_over_capacity(*free, capacity, drop)
    assert indices.reshape(-1, 2).tolist() == want
    assert (indices == -1).any()
    y = limited(hidden).compute()
    experts = [
        reference.gated(PLAIN["gate"][e], PLAIN["up"][e], PLAIN["down"][e]) for e in range(E)
    ]
    rows, weights = data.reshape(-1, D), weights.reshape(-1, 2)
    plain = reference.moe(rows, np.array(want), experts, weights, d_out=D)
    np.testing.assert_allclose(y.reshape(-1, D), plain, rtol=1e-4, atol=1e-4)
    assert int(limited.tokens_per_expert(hidden).max()) <= capacity


def test_experts_may_choose_their_rows():
    data = normal(11, D, seed=9)
    hidden = da.from_array(data, chunks=(4, D))
    layer = make(ExpertChoice(E, factor=1.5))
    assert layer.tokens_per_expert(hidden).compute().tolist() == [int(np.ceil(1.5 * 11 / E))] * E
    logits = data.astype(np.float64) @ PLAIN["router_weight"].T.astype(np.float64)
    scores = [plain_routers.softmax(list(map(float, row))) for row in logits]
    want = np.zeros((11, D))
    for row, e in plain_routers.expert_choice(scores, 4):
        expert = reference.gated(PLAIN["gate"][e], PLAIN["up"][e], PLAIN["down"][e])
        want[row] += scores[row][e] * expert(data[row].astype(np.float64))
    np.testing.assert_allclose(layer(hidden, world_size=2).compute(), want, rtol=1e-4, atol=1e-4)


# --- tables --------------------------------------------------------------------------------------


def test_a_table_routes_by_token_id():
    table = np.array([[0, 1], [4, 2], [3, 0]])
    hidden = da.from_array(normal(2, 4, D, seed=9), chunks=(1, 3, -1))
    token_ids = da.from_array(np.array([[0, 1, 2, 0], [2, 2, 1, 0]]), chunks=(2, 2))
    layer = make(router_weight=None, table=table)
    indices, weights = dask.compute(*layer.route(hidden, token_ids=token_ids))
    np.testing.assert_array_equal(indices, table[token_ids.compute()])
    assert (weights == 1).all()
    weighed = make(Router(E, 2, "sqrtsoftplus", norm_topk_prob=True), table=table)
    _, weights = weighed.route(hidden, token_ids=token_ids)
    np.testing.assert_allclose(weights.compute().sum(axis=-1), 1, rtol=1e-6)
    assert weighed(hidden, token_ids=token_ids).shape == hidden.shape
    load = layer.tokens_per_expert(hidden, token_ids=token_ids)
    assert load.compute().tolist() == [6, 3, 2, 3, 2]


# --- graphs --------------------------------------------------------------------------------------


def refuse(*args, **kwargs):
    raise AssertionError("computed")


def test_building_computes_nothing_and_names_follow_from_the_inputs():
    with dask.config.set(scheduler=refuse):
        names = []
        for _ in range(2):
            hidden = da.zeros((6, 4, D), chunks=(2, 3, D), dtype=np.float32)
            layer = make(residual=True, capacity=Capacity(1.0), **shared())
            names.append([layer(hidden).name, *(a.name for a in layer.route(hidden))])
            names[-1].append(layer.tokens_per_expert(hidden).name)
    assert names[0] == names[1]
    assert len(set(names[0])) == 4


def test_other_weights_are_another_layer():
    hidden = da.zeros((6, D), chunks=(2, D), dtype=np.float32)
    one, other = make(), make(router_weight=PLAIN["router_weight"] * 2)
    assert one(hidden).name != other(hidden).name


def test_a_layer_in_files_is_small_and_travels():
    case = "deepseek_v3_fp8"
    layer = load_moe_layer(FIXTURES / case, LAYER)
    again = pickle.loads(pickle.dumps(layer))
    hidden = da.from_array(expected(case)["hidden"], chunks=-1)
    assert len(pickle.dumps(layer)) < 25_000
    assert again(hidden).name == layer(hidden).name


def test_the_graph_grows_by_few_tasks_per_chunk():
    rows = da.zeros((40, D), chunks=(4, D), dtype=np.float32)
    y = make(**shared())(rows, world_size=2)
    graph = dict(y.__dask_graph__())
    mine = [k for k in graph if str(k[0] if isinstance(k, tuple) else k).startswith("ep_")]
    # route, indices, weights, layer, exchange a chunk; R slices and their join, router, shared
    assert len(mine) == 10 * (3 + 1 + 1) + 2 + 1 + 1 + 1


# --- messages ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"router": Router(4, 2)}, ValueError, "weight must be .* for E=4"),
        ({"router": Router(4, 2), "router_weight": None}, ValueError,
         "num_experts=4 and there are 5 experts"),
        ({"router_weight": normal(E, 3)}, ValueError, r"weight must be \(5, 6\) .* \(5, 3\)"),
        ({"router_weight": np.ones((E, D), int)}, TypeError, "weight must hold floats"),
        ({"selection_bias": normal(3)}, ValueError, r"selection_bias must be \(5,\)"),
        ({"shared_gate": normal(D)}, ValueError, "must be None without them"),
        ({"shared": Experts.linear(normal(1, 3, 3))}, ValueError,
         "as wide as the others, 6 to 6, but are 3 to 3"),
        ({"router": Router(E, 2, apply_router_weight_on_input=True),
          "experts": Experts.linear(normal(E, D, D))},
         ValueError, "agree on apply_router_weight_on_input, but the router has True and the"),
        ({"experts": Experts.linear(normal(E, D, 3)), "residual": True}, ValueError,
         "experts go from 6 to 3"),
        ({"router": ExpertChoice(E, 1.0), "capacity": Capacity(1.0)}, ValueError,
         "capacity must be None with it"),
        ({"table": np.ones((3, 2), int), "selection_bias": normal(E)}, ValueError,
         "must be None where a table or the experts choose"),
        ({"router": ExpertChoice(E, 1.0), "selection_bias": normal(E)}, ValueError,
         "must be None where a table or the experts choose"),
        ({"table": np.ones((3, 2))}, ValueError, r"table must be a \(vocabulary, k\) table"),
        ({"table": np.ones((3, 4), int)}, ValueError, r"must have k columns .* shape \(3, 4\)"),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit_are_refused(changes, error, message):
    with pytest.raises(error, match=message):
        make(**changes)


def test_calls_that_do_not_fit_are_refused():
    hidden = da.zeros((6, D), chunks=(2, D), dtype=np.float32)
    layer = make()
    with pytest.raises(TypeError, match="hidden must not be a masked array"):
        layer(da.ma.masked_equal(hidden, 0))
    with pytest.raises(TypeError, match="hidden must have the byte order of this machine"):
        layer(hidden.astype(">f4"))
    with pytest.raises(TypeError, match="must be a Dask array, but is a ndarray; wrap it"):
        layer(hidden.compute())
    with pytest.raises(ValueError, match=r"layer's width d=6, but has shape \(6, 4\)"):
        layer(hidden[:, :4])
    with pytest.raises(ValueError, match=r"must be \(\.\.\., d\) floats .* shape \(6,\)"):
        layer(hidden[:, 0])
    with pytest.raises(ValueError, match="and dtype int64"):
        layer.route(hidden.astype(np.int64))
    with pytest.raises(ValueError, match="this layer has no table"):
        layer(hidden, token_ids=da.zeros(6, dtype=int))
    with pytest.raises(
        ValueError, match=r"token_ids must have the leading axes .* \(6,\), but has"
    ):
        make(table=np.zeros((2, 2), int)).route(hidden, token_ids=da.zeros(5, dtype=int))
    with pytest.raises(ValueError, match="pass routing="):
        make(router_weight=None)(hidden)
    with pytest.raises(ValueError, match=r"routing must have the leading axes .* \(6,\), but has"):
        layer(hidden, routing=(da.zeros((5, 2), dtype=int), da.zeros((5, 2))))


def test_a_bad_row_is_named_with_its_chunk():
    rows = normal(6, D)
    rows[5, 1] = np.nan
    hidden = da.from_array(rows, chunks=(4, D))
    with pytest.raises(
        ValueError,
        match=r"routing of token chunk 1 \(row 1 .*\): the router's weights are NaN for row 1",
    ):
        make()(hidden).compute(scheduler="sync")
    with pytest.raises(ValueError, match="routing of token chunk 1"):
        make(ExpertChoice(E, 1.0)).route(hidden)[0].compute(scheduler="sync")


def test_nan_in_a_routers_weights_is_named():
    bad = PLAIN["router_weight"].copy()
    bad[2, 2] = np.nan
    hidden = da.zeros((6, D), chunks=(2, D), dtype=np.float32)
    with pytest.raises(ReadError, match="weight holds NaN"):
        make(router_weight=bad)(hidden).compute(scheduler="sync")


@pytest.mark.parametrize("policy", ["balanced", "exact"])
def test_a_layer_places_its_experts_by_what_its_router_says(policy):
    hidden = da.from_array(normal(40, D), chunks=(10, -1))
    layer = make(**shared())
    with dask.config.set(scheduler="sync"):
        placed = layer(hidden, world_size=2, placement=policy)
        plain = layer(hidden, world_size=1)
        np.testing.assert_allclose(placed.compute(), plain.compute(), atol=1e-6)
        load = ticket_load(layer.route(hidden)[0].compute(), E)
    assert placed.name == layer(hidden, world_size=2, placement=place(policy, load, 2)).name
