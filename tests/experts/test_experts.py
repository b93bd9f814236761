"""Experts compute what the plain loops compute, and are read lazily, each by its own rank."""

from __future__ import annotations

import os
import pickle
import sys

import dask.array as da
import ml_dtypes
import numpy as np
import pytest
import zarr
from dask.base import tokenize
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from dask_ep import Experts, expert_parallel_dispatch
from dask_ep.arrays import blas
from dask_ep.arrays.onednn import OneDnn
from dask_ep.arrays.onednn_kernels import Packed
from dask_ep.errors import ReadError
from dask_ep.experts import local_experts
from dask_ep.experts.experts import as_experts
from dask_ep.experts.local_experts import LocalExperts
from dask_ep.kernel import reference
from dask_ep.kernel.expert import laid_out
from dask_ep.laws.work import Work
from dask_ep.storage import files
from dask_ep.storage.sources import Source, open_source
from tests.compare import assert_close

E, D, F, O = 4, 6, 10, 5  # noqa: E741
ACTIVATIONS = ["silu", "gelu", "gelu_tanh", "relu", "relu2"]
SHAPES = {
    "w": (E, D, O),
    "bias": (E, O),
    "gate": (E, D, F),
    "up": (E, D, F),
    "down": (E, F, O),
    "gate_up": (E, D, 2 * F),
    "gate_bias": (E, F),
    "up_bias": (E, F),
    "gate_up_bias": (E, 2 * F),
    "down_bias": (E, O),
    "output_scale": (E, O),
}


def weight(name: str, seed: int = 0, dtype=np.float32) -> np.ndarray:
    rng = np.random.default_rng([seed, *name.encode()])
    return rng.standard_normal(SHAPES[name]).astype(dtype)


def weights(*names: str, **kwargs) -> dict[str, np.ndarray]:
    return {name: weight(name, **kwargs) for name in names}


def outputs(experts: Experts, rows: np.ndarray) -> np.ndarray:
    """(E, m, O): what each expert makes of the rows."""
    return np.stack([expert(rows) for expert in experts.load(dtype=rows.dtype)])


def rows(seed: int = 1, m: int = 7) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((m, D))


def check(experts: Experts, plain: list[reference.RowExpert]) -> None:
    x = rows()
    want = np.stack([[expert(row) for row in x] for expert in plain])
    assert_close(outputs(experts, x), want, 1e-12)
    assert_close(outputs(experts, x.astype("f4")), want, 1e-5)


def transposed(given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {
        n: np.ascontiguousarray(w.swapaxes(1, 2)) if w.ndim == 3 else w for n, w in given.items()
    }


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("names", [("w",), ("w", "bias")])
def test_linear(names, flip):
    given = weights(*names)
    experts = Experts.linear(**(transposed(given) if flip else given), transposed=flip)
    plain = [reference.linear(*(given[n][e] for n in names)) for e in range(E)]
    check(experts, plain)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("biases", [(), ("up_bias", "down_bias"), ("down_bias",)])
def test_mlp(activation, biases, flip):
    given = weights("up", "down", *biases)
    experts = Experts.mlp(
        **(transposed(given) if flip else given), activation=activation, transposed=flip
    )
    plain = [
        reference.mlp(activation=activation, **{n: w[e] for n, w in given.items()})
        for e in range(E)
    ]
    check(experts, plain)


@given(
    activation=st.sampled_from(ACTIVATIONS),
    biases=st.sets(st.sampled_from(["gate_bias", "up_bias", "down_bias", "output_scale"])),
    limit=st.sampled_from([None, 0.5, 7.0]),
    alpha=st.sampled_from([1.0, 1.702]),
    up_offset=st.sampled_from([0.0, 1.0]),
    clamp_after=st.booleans(),
    caps=st.sampled_from([None, (0.7, 1.3)]),
    eps=st.sampled_from([None, 0.1]),
    form=st.sampled_from(["apart", "halves", "interleaved"]),
    flip=st.booleans(),
)
def test_gated_in_every_form(
    activation, biases, limit, alpha, up_offset, clamp_after, caps, eps, form, flip
):
    fused_bias = form != "apart" and biases >= {"gate_bias"}
    biases = biases | {"up_bias"} if fused_bias else biases
    biases = biases if form == "apart" or fused_bias else biases - {"gate_bias", "up_bias"}
    given = weights("gate", "up", "down", *sorted(biases))
    options = {"activation": activation, "limit": limit, "alpha": alpha, "up_offset": up_offset}
    options |= {"clamp_after": clamp_after, "soft_caps": caps if activation == "silu" else None}
    options["output_norm_eps"] = eps
    plain = [reference.gated(**{n: w[e] for n, w in given.items()}, **options) for e in range(E)]
    if form == "apart":
        stored = transposed(given) if flip else given
        check(Experts.gated(**stored, transposed=flip, **options), plain)
        return

    def fuse(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
        pair = np.stack([gate, up], axis=-1 if form == "interleaved" else -2)
        return pair.reshape(*gate.shape[:-1], -1)

    fused = {"gate_up": fuse(given["gate"], given["up"]), "down": given["down"]}
    if "gate_bias" in given:
        fused["gate_up_bias"] = fuse(given["gate_bias"], given["up_bias"])
    fused |= {name: given[name] for name in ("down_bias", "output_scale") if name in given}
    stored = transposed(fused) if flip else fused
    interleaved = form == "interleaved"
    check(Experts.gated_fused(**stored, interleaved=interleaved, transposed=flip, **options), plain)


@pytest.mark.parametrize("m", [1, 17, 100])
@pytest.mark.parametrize("options", [{}, {"alpha": 1.702, "limit": 1.0}, {"activation": "relu"}])
def test_matrices_of_checkpoints_are_laid_out_once_where_that_pays(m, options, monkeypatch):
    """They lie by columns, (out, in); and these are large enough."""
    rng = np.random.default_rng(0)
    gate, up, down = (rng.standard_normal((2, 128, 128), "f4") / 11 for _ in range(3))
    x = rng.standard_normal((m, 128), "f4")
    plain = [reference.gated(*(w[e].T for w in (gate, up, down)), **options) for e in range(2)]
    experts = Experts.gated(gate, up, down, transposed=True, **options)
    want = np.stack([[expert(row.astype("f8")) for row in x] for expert in plain])
    library = blas.faster_than_numpy()
    assert isinstance(laid_out(gate[0].T), Packed) == isinstance(library, OneDnn)
    assert not isinstance(laid_out(gate[0]), Packed), "by rows they are as fast"
    assert_close(outputs(experts, x), want, 1e-5)
    tokens = np.empty((0, 128), "f4")
    copied = gate[0].nbytes if isinstance(library, OneDnn) else 0
    assert Work.of(tokens, experts, rows=1, slots=1).copied == copied
    monkeypatch.setattr(blas, "packing_library", lambda w: None)
    assert_close(outputs(experts, x), want, 1e-5)


@pytest.mark.parametrize("columns", [1, 4, 10])
@pytest.mark.parametrize("flip", [False, True])
def test_wide_experts_are_sums_of_narrow_ones(columns, flip, monkeypatch):
    monkeypatch.setattr(local_experts, "HIDDEN_COLUMNS", columns)
    given = weights("gate", "up", "down", "gate_bias", "up_bias", "down_bias", "output_scale")
    stored, norm = transposed(given) if flip else given, {"output_norm_eps": 0.1}
    plain = [reference.gated(**{n: w[e] for n, w in given.items()}, **norm) for e in range(E)]
    experts = Experts.gated(**stored, transposed=flip, **norm)
    check(experts, plain)
    assert experts.load()[0].widest == max(columns, D, O)
    del given["gate"], given["gate_bias"], given["output_scale"]
    stored = transposed(given) if flip else given
    plain = [reference.mlp(**{n: w[e] for n, w in given.items()}) for e in range(E)]
    check(Experts.mlp(**stored, transposed=flip), plain)


def test_silu_of_large_values_neither_warns_nor_overflows():
    up = np.full((1, 1, 3), 1.0, "f4")
    experts = Experts.mlp(up, np.eye(3, dtype="f4")[None], activation="silu")
    y = experts.load()[0](np.array([[-1e4], [1e4]], "f4"))
    np.testing.assert_array_equal(y, [[0, 0, 0], [1e4, 1e4, 1e4]])


def test_the_norm_of_an_output_takes_large_and_infinite_rows():
    eye = np.eye(2, dtype="f4")[None]
    options = {"activation": "relu", "output_norm_eps": 1e-8}
    x = np.array([[1e15, 1e15], [0, 0]], "f4")
    y = Experts.gated(eye, eye, eye, **options).load()[0](x)
    np.testing.assert_array_equal(y, [[1, 1], [0, 0]])
    bias = np.array([[np.inf, 1]], "f4")
    y = Experts.gated(eye, eye, eye, down_bias=bias, **options).load()[0](x)
    np.testing.assert_array_equal(y, [[np.nan, 0], [np.nan, 0]])
    with pytest.raises(ValueError, match="output_norm_eps must be a number above 0, or None"):
        Experts.gated(eye, eye, eye, output_norm_eps=0.0)
    with pytest.raises(ValueError, match="output_norm_eps must be a finite number, not '1e-8'"):
        Experts.gated(eye, eye, eye, output_norm_eps="1e-8")


def test_weights_on_the_input_are_not_weights_on_the_output():
    given, x = weights("gate", "up", "down"), rows()
    routing, topk = np.arange(7) % E, np.linspace(0.1, 2.0, 7)
    plain = [reference.gated(**{n: w[e] for n, w in given.items()}) for e in range(E)]
    for on_input in (True, False):
        local = Experts.gated(**given, apply_router_weight_on_input=on_input).load(dtype="f8")
        got = expert_parallel_dispatch(x, routing, local, 0, 1, topk_weights=topk)
        want = reference.moe(
            x, routing, plain, topk, d_out=O, apply_router_weight_on_input=on_input
        )
        assert_close(got, want, 1e-12)


# --- where weights lie ---------------------------------------------------------------------------


def stored(kind: str, folder) -> object:
    w = weight("w")
    if kind == "npy":
        np.save(folder / "w.npy", w)
        return folder / "w.npy"
    if kind == "memmap":
        np.save(folder / "w.npy", w)
        return np.load(folder / "w.npy", mmap_mode="r")
    if kind == "plain zarr":
        data = {"data": w, "chunks": (3, D, O), "compressors": None}
        return zarr.create_array(folder / "w.zarr", **data)
    if kind in ("zarr", "zarr path"):
        array = zarr.create_array(folder / "w.zarr", data=w, chunks=(1, D, O))
        return array if kind == "zarr" else str(folder / "w.zarr")
    if kind == "safetensors":
        save_file({"w": w, "other": w[:1]}, folder / "w.safetensors")
        return f"{folder}/w.safetensors::w"
    if kind == "list":
        return list(w)
    if kind == "list of files":
        save_file({f"w.{e}": w[e] for e in range(E)}, folder / "w.safetensors")
        return [f"{folder}/w.safetensors::w.{e}" for e in range(E)]
    if kind == "dask":
        return da.from_array(w, chunks=(3, 4, 2))
    if kind == "list of dask":
        return [da.from_array(w[e], chunks=(4, 2)) for e in range(E)]
    return w


KINDS = ["array", "npy", "memmap", "zarr", "zarr path", "safetensors", "list", "list of files"]


@pytest.mark.parametrize("kind", [*KINDS, "dask", "list of dask"])
def test_weights_wherever_they_lie(kind, tmp_path):
    experts = Experts.linear(stored(kind, tmp_path))
    assert (experts.num_experts, experts.d, experts.d_out) == (E, D, O)
    assert experts.nbytes == weight("w").nbytes
    x = rows().astype("f4")
    for ids in ([0, 1, 2, 3], [2], [3, 0], [1, -1]):
        local = experts.load(ids)
        assert len(local) == len(ids)
        for expert, e in zip(local, ids, strict=True):
            if e >= 0:
                np.testing.assert_array_equal(expert(x), x @ weight("w")[e])


def test_files_of_several_formats_have_one_fingerprint(tmp_path):
    np.save(tmp_path / "first.npy", weight("w")[0])
    zarr.create_array(tmp_path / "second.zarr", data=weight("w")[1])
    both = [tmp_path / "first.npy", tmp_path / "second.zarr"]
    assert Experts.linear(both).fingerprint() == Experts.linear(both).fingerprint()
    assert Experts.linear(both).fingerprint() != Experts.linear(both[::-1]).fingerprint()


@pytest.mark.parametrize("compressors", [None, "auto"])
def test_weights_that_were_lost_are_no_zeros(compressors, tmp_path):
    path = tmp_path / "w.zarr"
    zarr.create_array(path, data=weight("w"), chunks=(1, D, O), compressors=compressors)
    (path / "c" / "2" / "0" / "0").unlink()
    with pytest.raises(ReadError, match=r"w.zarr: 1 chunks are missing in .* \(c/2/0/0\)"):
        Experts.linear(path)
    meant = Experts.linear(open_source(path, missing="fill"))
    assert not meant.load([2])[0](rows()).any()


class FileLike(Source):
    """A source that notes which rows are read."""

    def __init__(self, array):
        self.shape, self.dtype, self.name = array.shape, array.dtype, "file"
        self.array, self.reads = array, []

    def read(self, start, stop, out=None):
        self.reads.append((start, stop))
        return self.array[start:stop]

    def fingerprint(self):
        return self._describe()


def test_a_rank_reads_its_own_experts_once_and_nothing_else():
    source = FileLike(weight("w"))
    experts = Experts.linear(source)
    assert source.reads == []
    local = experts.load([2, 3])
    for _ in range(3):
        local[0](rows().astype("f4"))
    assert source.reads == [(2, 3), (3, 4)]


@pytest.mark.parametrize("kind", ["npy", "memmap", "safetensors", "list of files", "plain zarr"])
def test_of_files_no_byte_of_another_experts_is_read(kind, tmp_path, monkeypatch):
    experts, read, preadv = Experts.linear(stored(kind, tmp_path)), [], os.preadv

    def count(file, buffers, offset):
        read.append(preadv(file, buffers, offset))
        return read[-1]

    monkeypatch.setattr(files.os, "preadv", count)
    experts.load([1, 2])
    assert sum(read) == 2 * D * O * 4


def test_of_dask_arrays_only_the_blocks_of_ones_own_experts_are_computed():
    made = []

    def make(block, block_id):
        made.append(block_id)
        return block

    w = da.from_array(weight("w"), chunks=(2, 3, -1))
    experts = Experts.linear(w.map_blocks(make, dtype=w.dtype, meta=w._meta))
    assert made == []
    experts.load([2, 3])
    assert sorted(made) == [(1, 0, 0), (1, 1, 0)]


@pytest.mark.parametrize("ids", [[2, 3], [3, 0], [0, -1, 3], [-1]])
def test_a_subset_of_arrays_in_memory_is_views_of_its_part_alone(ids):
    """However far apart they lie: those of a rank do where experts are placed by load."""
    w = np.arange(4 * 100 * 100, dtype="f4").reshape(4, 100, 100)
    part = Experts.linear(w).subset(ids)
    held = [e for e in ids if e >= 0]
    assert part.nbytes == len(held) * w[0].nbytes
    assert all(np.shares_memory(one.array, w) for one in part.weights["w"].parts)
    assert len(pickle.dumps(part)) < max(len(held), 1) * w[0].nbytes + 2000
    found = [one for one in part.weights["w"].read(w.dtype) if one is not None]
    np.testing.assert_array_equal(found, w[held] if held else [])
    again = part.subset(range(len(ids))).weights["w"].read(w.dtype)
    assert [one is None for one in again] == [e < 0 for e in ids]


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16])
def test_weights_of_other_dtypes_are_held_in_the_computing_dtype(dtype, float32_products):
    experts = Experts.linear(weight("w", dtype=dtype))
    local = experts.load(dtype=np.float32)
    assert local.nbytes == E * D * O * 4
    x = rows().astype("f4")
    np.testing.assert_array_equal(local[1](x), x @ weight("w", dtype=dtype)[1].astype("f4"))


def test_local_experts_tell_their_size_and_travel_without_their_weights(tmp_path):
    w = np.ones((2, 512, 512), "f4")
    save_file({"w": w}, tmp_path / "w.safetensors")
    local = Experts.linear(tmp_path / "w.safetensors").load()
    assert isinstance(local, LocalExperts)
    assert w.nbytes <= sys.getsizeof(local) < w.nbytes + 1000
    travelled = pickle.dumps(local)
    assert len(travelled) < 5000
    x = np.ones((1, 512), "f4")
    np.testing.assert_array_equal(pickle.loads(travelled)[1](x), x @ w[1])


def test_a_row_at_an_empty_slot_is_an_error():
    local = Experts.linear(weight("w")).load([0, -1])
    with pytest.raises(ValueError, match="7 rows are routed to an empty place"):
        local[1](rows().astype("f4"))
    functions = Experts.callables([np.negative]).load([0, -1])
    assert functions[1](np.empty((0, 3))).shape == (0, 3)
    with pytest.raises(ValueError, match="2 rows are routed to an empty place"):
        functions[1](np.empty((2, 3)))


def test_tokens_of_experts_follow_their_content():
    def token(**changes):
        return tokenize(Experts.gated(**(weights("gate", "up", "down") | changes)))

    assert token() == token()
    assert len({token(), token(down=weight("down", seed=1)), token(activation="relu")}) == 3


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (
            lambda: Experts.mlp(np.ones((4, 6, 9)), np.ones((4, 10, 5))),
            ValueError,
            r"axis f is 9 and 10. They are up \(E, d, f\) = \(4, 6, 9\); down .* = \(4, 10, 5",
        ),
        (
            lambda: Experts.mlp(np.ones((4, 6, 9)), np.ones((3, 9, 5))),
            ValueError,
            r"axis E is 4 and 3",
        ),
        (
            lambda: Experts.linear(np.ones((6, 5))),
            ValueError,
            r"w of linear experts must be \(E, d, o\), but has shape \(6, 5\)",
        ),
        (
            lambda: Experts.gated_fused(np.ones((4, 6, 9)), np.ones((4, 5, 6))),
            ValueError,
            r"gate_up holds gate and up, so 9 must be even",
        ),
        (lambda: Experts.linear(np.ones((0, 6, 5))), ValueError, "at least one"),
        (lambda: Experts.linear(np.ones((4, 6, 5), int)), TypeError, "w must hold floats.*int64"),
        (
            lambda: Experts.linear([np.ones((6, 5)), np.ones((6, 4))]),
            ValueError,
            r"w\[1\] is \(6, 4\) and w\[0\] is \(6, 5\)",
        ),
        (
            lambda: Experts.mlp(weight("up"), weight("down"), activation="swish"),
            ValueError,
            r"activation must be one of \['silu', .*not 'swish'",
        ),
        (
            lambda: Experts.gated(
                **weights("gate", "up", "down"), apply_router_weight_on_input="both"
            ),
            ValueError,
            "apply_router_weight_on_input must be True or False, not 'both'",
        ),
        (lambda: Experts.callables([1]), TypeError, "expert 0 must be callable, but is a int"),
        (
            lambda: as_experts(list(Experts.gated(**weights("gate", "up", "down")).load())),
            TypeError,
            "expert 0 .* is a loaded Expert; pass the Experts that it was loaded from",
        ),
        (lambda: as_experts([]), ValueError, "w must have one entry per expert, but has none"),
        (lambda: Experts.linear(None), TypeError, "w must be given"),
        (lambda: as_experts(3), TypeError, "experts must be an Experts .* not a int"),
    ],
)
def test_bad_experts_are_refused(build, error, message):
    with pytest.raises(error, match=message):
        build()


def test_every_bfloat16_number_is_widened_to_the_same_bits():
    bits = np.arange(1 << 16, dtype=np.uint16).reshape(1, 256, 256)
    local = Experts.linear(bits.view(ml_dtypes.bfloat16)).load()
    found = local[0].W.view(np.uint32)
    np.testing.assert_array_equal(found, bits[0].astype(np.uint32) << 16)
