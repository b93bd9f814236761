"""A stopped run is resumed only where everything that decides a row's value is what it was."""

import inspect
import json
import os
from dataclasses import fields, replace

import dask.array as da
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dask_ep import Experts, MoELayer, Router, load_moe_layer
from dask_ep.errors import UnfitClusterError
from dask_ep.experts.stored_experts import held_as_stored
from dask_ep.jobs.backends import Cluster, Threads, multiplies_as_tf32
from dask_ep.jobs.job import EXPERT_KEYS, load_job
from dask_ep.jobs.run import run_job
from dask_ep.layers.capacity import Capacity, ExpertChoice
from dask_ep.layers.row_steps import Around, RowStep
from dask_ep.storage.fingerprint import describe, find_sources
from dask_ep.storage.journal import describe_differences
from dask_ep.storage.sources import open_source
from dask_ep.storage.storage import store
from tests.checkpoints import CASES, LAYER, altered, expected, read_tensors, write_tensors

E, D, F = 4, 6, 6


def weights(kind, **changed):
    """Arguments of a classmethod of `Experts`, all of its arrays given."""
    shapes = {
        "linear": {"w": (E, D, D), "bias": (E, D)},
        "mlp": {"up": (E, D, F), "up_bias": (E, F)},
        "gated": {"gate": (E, D, F), "gate_bias": (E, F), "up": (E, D, F), "up_bias": (E, F)},
        "gated_fused": {"gate_up": (E, D, 2 * F), "gate_up_bias": (E, 2 * F)},
    }[kind]
    if kind != "linear":
        shapes |= {"down": (E, F, D), "down_bias": (E, D)}
    if kind.startswith("gated"):
        shapes["output_scale"] = (E, D)
    return {name: np.full(shape, 0.5, "f4") for name, shape in shapes.items()} | changed


OTHER = {
    "transposed": True,
    "interleaved": True,
    "activation": "gelu",
    "limit": 7.0,
    "alpha": 1.7,
    "up_offset": 1.0,
    "clamp_after": True,
    "soft_caps": [4.0, 25.0],
    "output_norm_eps": 1e-6,
    "apply_router_weight_on_input": True,
}
"""A value of each option that is not its default."""

ROUTER = Router(8, 2, "sigmoid", groups=4, topk_groups=2)
OTHER_ROUTERS = {
    "num_experts": 12,
    "k": 3,
    "score": "softmax",
    "groups": 2,
    "topk_groups": 3,
    "group_score": "top2",
    "norm_topk_prob": True,
    "norm_eps": 1e-3,
    "norm_min": 0.25,
    "scale": 2.5,
    "apply_router_weight_on_input": True,
    "jitter": 0.02,
    "logit_scale": 2.0,
    "logit_softcap": 30.0,
    "input_norm_eps": 1e-6,
    "masked_score": 0.0,
    "always": 4,
}


def differences(old, new):
    """What a resumed run says that was begun with one thing as its input and now has another."""
    old, new = ({"inputs": {"layer": json.loads(json.dumps(describe(one)))}} for one in (old, new))
    return describe_differences(old, new)


@pytest.mark.parametrize("kind", EXPERT_KEYS)
def test_every_option_and_array_of_every_kind_of_experts_counts(kind):
    build = getattr(Experts, kind)
    before = build(**weights(kind))
    assert differences(before, build(**weights(kind))) == []
    for name in inspect.signature(build).parameters:
        if name in OTHER:
            if name == "transposed" and kind == "gated_fused":
                given = {"gate_up": np.full((E, 2 * F, D), 0.5, "f4")}
            else:
                given = {}
            changed = build(**weights(kind, **given, **{name: OTHER[name]}))
            (said,) = [s for s in differences(before, changed) if f"options.{name} was" in s]
            assert said.endswith(f"is {OTHER[name]}")
        else:
            array = weights(kind)[name]
            for other in (array + 1, array.astype("f8"), array.astype(ml_dtypes.bfloat16)):
                (*_, said) = differences(before, build(**weights(kind, **{name: other})))
                assert f"input layer: weights.{name}." in said
            if array.ndim == 2:
                (said,) = differences(before, build(**weights(kind, **{name: None})))
                assert f"weights.{name} was" in said


def test_every_field_of_a_router_counts():
    assert set(OTHER_ROUTERS) == {field.name for field in fields(Router)}
    for name, value in OTHER_ROUTERS.items():
        (said,) = differences({"router": ROUTER}, {"router": replace(ROUTER, **{name: value})})
        was = getattr(ROUTER, name)
        was = "absent" if was is None else was
        assert said == f"input layer: router.{name} was {was}, is {value}"


EXPERTS = Experts.linear(np.ones((E, D, D), "f4"))
LAYER_OF = {
    "router": Router(E, 2),
    "experts": EXPERTS,
    "router_weight": np.ones((E, D), "f4"),
    "router_bias": np.ones(E, "f4"),
    "selection_bias": np.ones(E, "f4"),
    "shared": Experts.linear(np.ones((1, D, D), "f4")),
    "shared_gate": np.ones(D, "f4"),
}
"""Arguments of a layer."""

OTHER_IN_LAYER = {
    "router": Router(E, 2, norm_topk_prob=True),
    "experts": Experts.linear(np.ones((E, D, D), "f4"), bias=np.ones((E, D), "f4")),
    "router_weight": np.zeros((E, D), "f4"),
    "router_bias": None,
    "selection_bias": np.zeros(E, "f4"),
    "shared": Experts.linear(np.zeros((1, D, D), "f4")),
    "shared_gate": None,
    "capacity": Capacity(1.0),
    "table": np.zeros((9, 2), int),
    "per_expert_scale": np.ones(E, "f4"),
    "input_scale": np.ones(D, "f4"),
    "around": Around(after=(RowStep("scale", factor=0.5),)),
    "residual": True,
}
"""Another value of each."""


def test_every_argument_of_a_layer_counts():
    before = MoELayer(**LAYER_OF)
    assert differences(before, MoELayer(**LAYER_OF)) == []
    assert set(OTHER_IN_LAYER) == set(inspect.signature(MoELayer).parameters)
    for name, value in OTHER_IN_LAYER.items():
        changed = LAYER_OF | {name: value}
        if name == "table":
            changed["selection_bias"] = None
        assert differences(before, MoELayer(**changed)), name
    drops = [MoELayer(**LAYER_OF, capacity=Capacity(1.0, drop)) for drop in ("score", "position")]
    assert differences(*drops) == ["input layer: capacity.drop was score, is position"]
    choosing = [ExpertChoice(E, 2.0, apply_router_weight_on_input=False), Router(E, 2)]
    assert "router.kind was ExpertChoice, is Router" in differences(
        *({"router": router} for router in choosing)
    )[0].removeprefix("input layer: ")


@given(st.data())
def test_an_attribute_that_nobody_has_named_here_counts_too(data):
    """An option that will be added to whatever computes is compared without being listed."""
    value, other = data.draw(
        st.lists(st.integers() | st.text(), min_size=2, max_size=2, unique=True)
    )
    old, new = MoELayer(**LAYER_OF), MoELayer(**LAYER_OF)
    place = data.draw(st.sampled_from(["", "experts", "shared"]))
    for layer, said in ((old, value), (new, other)):
        owner = getattr(layer, place) if place else layer
        # Options of experts are shared by name between the two; each layer gets its own.
        own = owner if not place else Experts(owner.kind, owner.weights, owner.options)
        own.never_heard_of = said
        if place:
            setattr(layer, place, own)
    (words,) = differences(old, new)
    assert words.startswith(f"input layer: {place + '.' if place else ''}never_heard_of was")


@given(st.data())
def test_of_many_weights_each_counts(data):
    arrays = [np.full((D, D), e, "f4") for e in range(E)]
    changed = list(arrays)
    e = data.draw(st.integers(0, E - 1))
    changed[e] = changed[e] + 1
    said = differences(Experts.linear(arrays), Experts.linear(changed))
    assert len(said) == 1
    assert "weights.w.xxh3_128 was 4 values, " in said[0]
    swapped = list(arrays)
    f = data.draw(st.integers(0, E - 1).filter(lambda f: f != e))
    swapped[e], swapped[f] = swapped[f], swapped[e]
    assert differences(Experts.linear(arrays), Experts.linear(swapped))


def test_how_experts_are_held_does_not_count():
    experts = Experts.linear(np.ones((E, D, D), ml_dtypes.bfloat16))
    assert differences(experts, held_as_stored(experts)) == []


def test_what_cannot_be_told_is_refused(tmp_path):
    layer = MoELayer(Router(2, 1), Experts.callables([abs, abs], d_out=D), np.ones((2, D), "f4"))
    with pytest.raises(TypeError, match="whether a CallableExperts has changed .* in settings"):
        store(da.ones((2, D)), tmp_path / "y.npy", inputs={"layer": layer})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("case", CASES)
def test_the_files_of_a_layer_are_all_found(case, tmp_path):
    layer = load_moe_layer(altered(tmp_path, case), LAYER)
    names = {source.name for source in find_sources(layer) if source.path is not None}
    assert len(names) >= len(layer.arrays) + 1
    assert {os.path.dirname(s.path) for s in find_sources(layer) if s.path} == {
        str(tmp_path / case)
    }


# --- whole runs, stopped and resumed -------------------------------------------------------------


class Stopped(Exception):
    """What stops a run in these tests."""


def begin(job, **options):
    """Run until the first block is done."""

    def stop(progress):
        if progress.rows_done:
            raise Stopped

    with pytest.raises(Stopped):
        run_job(job, Threads(1), chunk_rows=6, on_progress=stop, **options)


def half_done(tmp_path, case):
    """A run of a layer of a checkpoint of one's own that was stopped; give the checkpoint too."""
    copy = altered(tmp_path, case)
    hidden = expected(case)["hidden"].reshape(24, -1)
    np.save(tmp_path / "x.npy", hidden)
    job = load_job(
        tokens=str(tmp_path / "x.npy"), layer=str(copy), layer_index=LAYER,
        out=str(tmp_path / "y.npy"),
    )  # fmt: skip
    begin(job)
    return copy, job


@pytest.mark.parametrize(
    ("case", "change", "said"),
    [
        ("mixtral", {"num_experts_per_tok": 1}, "layer: router.k was 2, is 1"),
        ("qwen3_moe", {"norm_topk_prob": False}, "layer: router.norm_topk_prob was True, is False"),
        ("mixtral", {"hidden_act": "gelu"}, r"experts.options.activation was silu, is gelu"),
        ("deepseek_v3_fp8_cut", {"routed_scaling_factor": 9.0}, r"router.scale was .*, is 9.0"),
    ],
)
def test_another_config_is_refused(tmp_path, case, change, said):
    copy, job = half_done(tmp_path, case)
    path = copy / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=f"cannot be resumed, since .*{said}"):
        run_job(job, Threads(1), resume=True)


def test_the_same_checkpoint_elsewhere_is_resumed(tmp_path):
    copy, job = half_done(tmp_path, "mixtral")
    os.rename(copy, tmp_path / "moved")
    path = tmp_path / "moved" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_cache": False}))
    assert run_job(replace(job, layer=str(tmp_path / "moved")), Threads(1), resume=True).rows_before


def test_weights_in_another_format_are_refused(tmp_path):
    copy, job = half_done(tmp_path, "mixtral")
    path = copy / "model.safetensors"
    tensors = read_tensors(path)
    write_tensors(path, {name: array.astype(np.float16) for name, array in tensors.items()})
    with pytest.raises(ValueError, match=r"experts.weights.gate.dtype was .*, is float16"):
        run_job(job, Threads(1), resume=True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"activation": "gelu"}, "input experts: options.activation was silu, is gelu"),
        ({"limit": 1.0}, "input experts: options.limit was absent, is 1.0"),
        ({"kind": "mlp"}, "input experts: kind was gated, is mlp"),
    ],
)
def test_other_options_of_a_job_are_refused(tmp_path, change, said):
    arrays = {"x": np.ones((24, D), "f4"), "r": np.zeros((24, 1), int)}
    arrays |= {name: np.ones((E, D, F), "f4") for name in ("gate", "up", "down")}
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array)
    places = {name: str(tmp_path / f"{name}.npy") for name in arrays}
    table = {"kind": "gated"} | {name: places[name] for name in ("gate", "up", "down")}
    keys = {"tokens": places["x"], "routing": places["r"], "out": str(tmp_path / "y.npy")}
    begin(load_job(experts=table, **keys))
    changed = table | change
    if changed["kind"] == "mlp":
        del changed["gate"]
    with pytest.raises(ValueError, match=said):
        run_job(load_job(experts=changed, **keys), Threads(1), resume=True)


@pytest.mark.parametrize("switch", ["1", "0"])
def test_workers_of_a_cluster_say_how_they_multiply(monkeypatch, switch):
    monkeypatch.setenv("DASK_EP_TF32", switch)

    class Client:
        def run(self, function):
            return {"tcp://a": function(), "tcp://b": function()}

    assert multiplies_as_tf32(Cluster(gpus=True), Client()) == (switch == "1")
    assert not multiplies_as_tf32(Cluster(), Client())
    monkeypatch.setattr(Client, "run", lambda *_: {"tcp://a": True, "tcp://b": False})
    with pytest.raises(UnfitClusterError, match=r"only some GPU workers have .*, tcp://a; start"):
        multiplies_as_tf32(Cluster(gpus=True), Client())


def test_the_files_of_scales_count_as_read():
    from dask_ep.experts.quantized import float8

    values = open_source(np.ones((2, 4), ml_dtypes.float8_e4m3fn))
    scales = open_source(np.ones((1, 2), np.float32))
    both = float8(values, scales, (2, 2))
    assert list(find_sources(Experts.linear([both]))) == [both, values, both.scales, scales]
