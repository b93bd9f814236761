"""Quantized matrices become the numbers that the library of their format makes of them."""

from __future__ import annotations

import json
import pickle
import re

import dask
import dask.array as da
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from dask_ep.errors import ReadError
from dask_ep.experts.quantized import QuantizedSource, in_memory
from dask_ep.jobs.inspect import inspect_path
from dask_ep.layers.checkpoint import load_moe_layer
from dask_ep.layers.formats import Parts, find_parts
from dask_ep.storage.sources import Source, open_safetensors, open_source
from dask_ep.storage.views import View
from tests.checkpoints import FIXTURES, LAYER, altered, expected, write_tensors
from tests.one_pass import scaled_by  # noqa: F401

FORMATS = FIXTURES / "formats"
CASES = sorted(path.stem for path in FORMATS.glob("*.safetensors"))
BEYOND = {"fp8_channel_bfloat16", "nvfp4"}
"""Whose library rounds its numbers to bfloat16, though scales and codes say more."""


def config_of(case: str) -> dict:
    with safe_open(FORMATS / f"{case}.safetensors", "numpy") as file:
        return json.loads(file.metadata()["quantization_config"])


def stored(case: str) -> dict[str, Source]:
    return open_safetensors(FORMATS / f"{case}.safetensors")


def parts_of(tensors: dict[str, Source], case: str, **config) -> Parts:
    found = find_parts("w.weight", tensors, config_of(case) | config, "model.layers.1.")
    assert found is not None
    return found


def opened(case: str) -> tuple[QuantizedSource, np.ndarray]:
    """The matrix, and the library's numbers of it."""
    tensors = stored(case)
    decoded = tensors["decoded"].read(0, tensors["decoded"].shape[0])
    return parts_of(tensors, case).open(decoded.shape), decoded


@pytest.mark.parametrize("case", CASES)
def test_what_bfloat16_holds_is_decoded_to_it(case):
    source, _ = opened(case)
    if not isinstance(source, QuantizedSource):
        source = source.stored
    whole, narrow = source.read(0, source.shape[0]), source.read_bfloat16(0, source.shape[0])
    assert (narrow is not None) == source.is_bfloat16
    if narrow is not None:
        assert narrow.dtype == ml_dtypes.bfloat16
        assert narrow.astype(np.float32).tobytes() == whole.tobytes()


@pytest.mark.parametrize("scale", [2.0**-101, 2.0**101])
def test_numbers_that_bfloat16_may_not_hold_are_not_decoded_to_it(scale):
    """Powers of two, and products that are rounded: both are exact if they are neither tiny nor
    huge."""
    codes = open_source(np.full((1, 32), 113, np.uint8).view(ml_dtypes.float8_e4m3fn))
    powers = np.full((1, 1), scale, np.float32).astype(ml_dtypes.float8_e8m0fnu)
    source = QuantizedSource(codes, "float8_e4m3fn", open_source(powers), (1, 32))
    assert source.is_bfloat16
    assert source.read_bfloat16(0, 1) is None
    np.testing.assert_array_equal(source.read(0, 1), np.full((1, 32), 144 * scale, np.float32))


@pytest.mark.parametrize("case", CASES)
def test_numbers_are_those_of_the_library_bit_for_bit(case):
    source, decoded = opened(case)
    got = source.read(0, source.shape[0])
    assert got.astype(decoded.dtype).tobytes() == decoded.tobytes()
    exact = np.array_equal(got, decoded.astype(np.float32))
    assert exact == (case not in BEYOND)


@pytest.mark.parametrize("case", CASES)
def test_any_rows_are_read_held_and_sent_with_the_same_bits(case):
    source, _ = opened(case)
    source = source.stored if isinstance(source, View) else source  # as it lies
    whole = source.read(0, source.shape[0])
    for start, stop in [(0, 1), (1, 4), (3, source.shape[0]), (2, 2)]:
        assert source.read(start, stop).tobytes() == whole[start:stop].tobytes()
    held = in_memory(source, 0, source.shape[0])
    assert held.nbytes == source.nbytes
    assert held.nbytes < 0.6 * whole.nbytes
    for other in (held, pickle.loads(pickle.dumps(source))):
        assert other.read(0, source.shape[0]).tobytes() == whole.tobytes()
    assert pickle.loads(pickle.dumps(source)).fingerprint() == source.fingerprint()


@pytest.mark.parametrize("case", CASES)
def test_every_byte_of_codes_and_scales_counts(case):
    source, decoded = opened(case)
    whole = source.read(0, source.shape[0])
    for role in ("codes", "scales"):
        tensors = stored(case)
        name = parts_of(tensors, case).names[role]
        array = np.array(tensors[name].read(0, tensors[name].shape[0]))
        array.view(np.uint8).reshape(-1)[0] ^= 1
        tensors[name] = open_source(array, name)
        other = parts_of(tensors, case).open(decoded.shape)
        assert not np.array_equal(other.read(0, source.shape[0]), whole)
        assert other.fingerprint() != source.fingerprint()


# --- what no library here writes ---------------------------------------------------------------

E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def float4(byte: int, place: int) -> float:
    """One of the two numbers of a byte, by the format's table."""
    code = byte >> 4 * place & 15
    return -E2M1[code & 7] if code & 8 else E2M1[code]


def read_all(names: dict[str, np.ndarray], shape: tuple[int, ...], **config) -> np.ndarray:
    tensors = {name: open_source(array, name) for name, array in names.items()}
    found = find_parts("w.weight", tensors, config)
    assert set(found.names.values()) == names.keys()
    return found.open(shape).read(0, shape[0])


@pytest.mark.parametrize("extra", [(), (1,)], ids=["one number", "an axis of one"])
def test_modelopt_nvfp4_multiplies_by_its_second_scale(extra):
    rng = np.random.default_rng(2)
    codes = rng.integers(0, 256, (3, 16), np.uint8)
    scales = rng.uniform(1, 400, (3, 2)).astype(ml_dtypes.float8_e4m3fn)
    second = np.full(extra, 0.0123, np.float32)
    parts = {"w.weight": codes, "w.weight_scale": scales, "w.weight_scale_2": second}
    want = np.empty((3, 32), np.float32)
    for o, i in np.ndindex(3, 32):
        scale = np.float32(scales[o, i // 16]) * np.float32(0.0123)
        want[o, i] = np.float32(float4(int(codes[o, i // 2]), i % 2)) * scale
    got = read_all(parts, (3, 32), quant_method="modelopt", quant_algo="NVFP4")
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("name", ["w.scale", "w.weight_scale_inv"])
@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e8m0fnu, np.uint8])
def test_float4_in_int8_has_a_power_of_two_for_32_numbers(name, dtype):
    rng = np.random.default_rng(3)
    codes, exponents = rng.integers(-128, 128, (4, 32), np.int8), rng.integers(100, 140, (4, 2))
    parts = {"w.weight": codes, name: exponents.astype(np.uint8).view(dtype)}
    want = np.empty((4, 64), np.float32)
    for o, i in np.ndindex(4, 64):
        byte = int(codes[o, i // 2]) & 255
        want[o, i] = float4(byte, i % 2) * 2.0 ** float(exponents[o, i // 32] - 127)
    got = read_all(parts, (4, 64), quant_method="fp8", weight_block_size=[128, 128])
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    "shape", [(), (1,), (6, 1), (6,), (2, 2)], ids=["none", "one", "rows", "flat rows", "blocks"]
)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_float8_scales_of_every_shape(shape, dtype):
    rng = np.random.default_rng(4)
    codes = rng.standard_normal((6, 10)).astype(ml_dtypes.float8_e4m3fn)
    scales = rng.uniform(0.5, 2, shape).astype(dtype)
    block = {0: (6, 10), 1: (6, 10), 6: (1, 10), 4: (4, 8)}[scales.size]
    want = np.empty((6, 10), np.float32)
    grid = scales.astype(np.float32).reshape(-(-6 // block[0]), -1)
    for o, i in np.ndindex(6, 10):
        want[o, i] = np.float32(codes[o, i]) * grid[o // block[0], i // block[1]]
    ending = "weight_scale_inv" if scales.size == 4 else "weight_scale"
    config = {"weight_block_size": [4, 8]} if scales.size == 4 else {"quant_algo": "FP8"}
    got = read_all({"w.weight": codes, f"w.{ending}": scales}, (6, 10), **config)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("zeros", [False, True])
def test_columns_may_be_in_other_groups_than_their_order_says(zeros):
    """As compressed-tensors wrote it until 2026, with ``actorder`` "group"."""
    case = "int4_zeros" if zeros else "int4_group"
    tensors, decoded = stored(case), opened(case)[1]
    columns, groups = decoded.shape[1], decoded.shape[1] // 32
    order = np.random.default_rng(5).permutation(columns)
    source = tensors["w.weight_scale"]
    scales = source.read(0, source.shape[0]).astype(np.float32)
    index = np.arange(columns, dtype=np.int32)[order] // 32
    plain = parts_of(tensors, case).open(decoded.shape)
    unscaled = plain.read(0, len(decoded)) / np.repeat(scales, 32, axis=1)
    if not zeros:  # the codes stay where they are, and only their scales are others
        tensors["w.weight_g_idx"] = open_source(index, "w.weight_g_idx")
        got = parts_of(tensors, case).open(decoded.shape).read(0, len(decoded))
        want = np.round(unscaled) * scales[:, index]
        np.testing.assert_array_equal(got, want.astype(ml_dtypes.bfloat16).astype(np.float32))
        return
    tensors["w.weight_g_idx"] = open_source(np.sort(index), "w.weight_g_idx")
    sorted_ = parts_of(tensors, case).open(decoded.shape).read(0, len(decoded))
    np.testing.assert_array_equal(sorted_, plain.read(0, len(decoded)))
    tensors["w.weight_g_idx"] = open_source(np.full(columns, -1, np.int32), "w.weight_g_idx")
    unset = parts_of(tensors, case).open(decoded.shape).read(0, len(decoded))
    np.testing.assert_array_equal(unset, plain.read(0, len(decoded)))
    tensors["w.weight_g_idx"] = open_source(index + groups, "w.weight_g_idx")
    with pytest.raises(ReadError, match=r"g_idx must hold indices of groups in \[0, 2\)"):
        parts_of(tensors, case).open(decoded.shape).read(0, len(decoded))


# --- which group of the config names a matrix --------------------------------------------------


def scheme_by(*groups: list[str]) -> str | None:
    """Which of some groups names the experts' matrix."""
    config_groups = {
        f"group_{n}": {"targets": targets, "weights": {"observer": str(n)}}
        for n, targets in enumerate(groups)
    }
    parts = parts_of(stored("int4_group"), "int4_group", config_groups=config_groups)
    return parts.scheme["observer"]


def test_a_name_comes_before_a_pattern_of_classes():
    assert scheme_by(["Linear"]) == "0"
    assert scheme_by(["Linear"], ["re:.*layers.*w$"]) == "1"
    assert scheme_by(["re:.*attn.*"], ["model.layers.1.w"]) == "1"
    with pytest.raises(ValueError, match=r"have model.layers.1.w among its targets; they are re:x"):
        scheme_by(["re:x"])


# --- damage ----------------------------------------------------------------------------------


def set_first(value):
    def change(array):
        array = array.copy()
        array.reshape(-1)[0] = value
        return array

    return change


def as_nan(array):
    return set_first(np.nan)(array)


DAMAGED = [
    ("int4_group", "weight_packed", lambda t: t[:, :-1], ValueError,
     "weight_packed must hold 96 numbers of 4 or 8 bits side by side, but has 11 words of 32 bits"),
    ("int4_group", "weight_packed", lambda t: t[:-1], ValueError,
     r"weight_packed must hold \(24, 96\) numbers, but \(23, 12\) of int32 are \(23, 96\)"),
    ("int4_group", "weight_scale", lambda t: t[:, :-1], ValueError,
     r"one scale for 48 numbers of a row, but config.json says group_size 32"),
    ("int4_group", "weight_scale", lambda t: np.repeat(t, 2, axis=1)[:, :5], ValueError,
     r"each for the same number of the 96 numbers of a row .* but has shape \(24, 5\)"),
    ("int4_group", "weight_scale", as_nan, ReadError, "weight_scale holds a scale that is NaN"),
    ("int4_group", "weight_shape", set_first(23), ReadError,
     r"weight_shape must hold the shape of .*weight_packed, \(24, 96\), but holds \(23, 96\)"),
    ("int4_zeros", "weight_zero_point", lambda t: t[:1], ValueError,
     r"zero_point must hold \(13, 2\) zero points, so \(2, 2\) words, but has shape \(1, 2\)"),
    ("int8_rows_quantized", "weight_scale", set_first(np.inf), ReadError, "NaN or infinite"),
    ("fp8_channel", "weight_scale", lambda t: t[:-1], ValueError, "must have weight_block_size"),
    ("fp8_block", "weight_scale", lambda t: t[:-1], ValueError,
     r"one scale per block of 8 x 16 of .*weight \(20, 40\), so \(3, 3\), but has shape \(2, 3\)"),
    ("nvfp4", "weight_scale", lambda t: t[:, :-1], ValueError,
     r"one scale per block of 1 x 16 of .* so \(12, 5\), but has shape \(12, 4\)"),
    ("nvfp4", "weight_scale", as_nan, ReadError, "weight_scale holds a scale that is NaN"),
    ("nvfp4", "weight_global_scale", set_first(0), ReadError,
     "weight_global_scale must be a number above 0, but is 0.0"),
    ("nvfp4", "weight_global_scale", as_nan, ReadError, "must be a number above 0, but is nan"),
    ("nvfp4", "weight_global_scale", lambda t: np.repeat(t, 2), ValueError,
     r"weight_global_scale must be one number, but has shape \(2,\)"),
    ("int4_zeros", "weight_zero_point", lambda t: t.astype(np.float32), TypeError,
     "weight_zero_point must hold zero points in words of 32 bits, but has dtype float32"),
    ("int4_zeros", "weight_zero_point", lambda t: t.astype(np.uint8), TypeError, "dtype uint8"),
    ("int4_group", "weight_scale", lambda t: t.astype(np.int32), TypeError,
     "weight_scale must hold scales, floats or exponents of 8 bits, but has dtype int32"),
    ("fp8_channel", "weight", np.ravel, ValueError,
     r"weight is FP8, so it must be a matrix, but has shape \(440,\)"),
    ("gptq_int4", "qweight", lambda t: t[:-1], ValueError,
     "qweight must hold 96 numbers of 4 or 8 bits side by side, but has 11 words"),
    ("gptq_int4", "qzeros", lambda t: t[:, :-1], ValueError,
     r"qzeros must hold \(3, 64\) zero points, so \(3, 8\) words, but has shape \(3, 7\)"),
    ("gptq_int4", "scales", lambda t: t[:-1], ValueError, r"so \(3, 64\), but has shape \(2, 64\)"),
    ("gptq_int4", "scales", as_nan, ReadError, "scales holds a scale that is NaN"),
    ("gptq_int4_act_order", "g_idx", set_first(4), ReadError,
     r"g_idx must hold indices of groups in \[0, 4\), but holds 0 to 4"),
    ("awq_int4", "qweight", lambda t: t[:, :-1], ValueError,
     r"qweight must hold \(96, 64\) numbers, but \(96, 7\) of int32 are \(96, 56\)"),
    ("mxfp4", "weight_scale", set_first(255), ReadError, "holds the scale 255"),
    ("mxfp4", "weight_packed", lambda t: t[:, :-1], ValueError, r"must hold \(12, 96\) numbers"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("case", "part", "change", "error", "message"),
    DAMAGED, ids=[f"{case}-{part}-{n}" for n, (case, part, *_) in enumerate(DAMAGED)],
)  # fmt: skip
def test_damage_is_an_error_with_the_tensor_its_shape_and_its_file(
    tmp_path, case, part, change, error, message
):
    arrays = {name: source.read(0, source.shape[0]) for name, source in stored(case).items()}
    decoded = arrays.pop("decoded")
    arrays[f"w.{part}"] = change(arrays[f"w.{part}"])
    write_tensors(tmp_path / "some.safetensors", arrays)
    tensors = open_safetensors(tmp_path / "some.safetensors")
    with pytest.raises(error, match=message) as raised:
        parts_of(tensors, case).open(decoded.shape).read(0, len(decoded))
    assert "some.safetensors" in str(raised.value)


@pytest.mark.parametrize(
    ("case", "part", "kind"),
    [("int4_zeros", "weight_zero_point", "int4 or int8"), ("gptq_int4", "qzeros", "GPTQ"),
     ("awq_int4", "qzeros", "AWQ"), ("fp8_channel", "weight_scale", "FP8"),
     ("nvfp4", "weight_global_scale", "NVFP4"), ("gptq_int4_act_order", "g_idx", "GPTQ")],
)  # fmt: skip
def test_a_part_that_is_missing_is_named(case, part, kind):
    tensors = stored(case)
    shape = tensors["decoded"].shape
    del tensors[f"w.{part}"]
    message = f"is {kind}, so the block must have the tensor .*w.{part}"
    with pytest.raises(ValueError, match=message):
        parts_of(tensors, case).open(shape)


def test_columns_in_groups_of_their_own_order_need_their_groups():
    groups = {"group_0": {"targets": ["Linear"], "weights": {"actorder": "group"}}}
    parts = parts_of(stored("int4_group"), "int4_group", config_groups=groups)
    with pytest.raises(ValueError, match="must have the tensor .*w.weight_g_idx"):
        parts.open((24, 96))


def test_other_kinds_of_awq_are_refused():
    with pytest.raises(
        ValueError, match="AWQ must be of version gemm, but config.json says 'gemv'"
    ):
        parts_of(stored("awq_int4"), "awq_int4", version="gemv").open((64, 96))


def test_rows_that_groups_do_not_divide_are_refused():
    tensors = stored("nvfp4")
    with pytest.raises(ValueError, match=r"rows must be multiples of 16, but have 72"):
        parts_of(tensors, "nvfp4").open((12, 72))


def test_config_and_tensors_must_agree_on_bits():
    groups = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 3}}}
    parts = parts_of(stored("int4_group"), "int4_group", config_groups=groups)
    with pytest.raises(ValueError, match="config.json says 3 bits"):
        parts.open((24, 96))


# --- checkpoints -----------------------------------------------------------------------------


def as_modelopt(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The names of ModelOpt, whose second scale multiplies."""
    out = {}
    for name, array in tensors.items():
        if name.endswith("_global_scale"):
            stem = name.removesuffix("_global_scale")
            name = name.replace("input_global", "input") if "input" in name else f"{stem}_scale_2"
            array = (1 / array).reshape(())
        out[name.removesuffix("_packed")] = array
    return out


def test_an_older_export_of_modelopt_has_its_format_in_a_separate_file(tmp_path):
    plain = load_moe_layer(FIXTURES / "qwen3_moe_nvfp4", LAYER)
    folder = altered(tmp_path, "qwen3_moe_nvfp4", tensors=as_modelopt, quantization_config=None)
    other = folder / "hf_quant_config.json"
    other.write_text(json.dumps({"quantization": {"quant_algo": "NVFP4", "group_size": 16}}))
    want, got = plain.experts.load([3])[0], load_moe_layer(folder, LAYER).experts.load([3])[0]
    rows = np.random.default_rng(0).standard_normal((5, 32)).astype(np.float32)
    np.testing.assert_allclose(got(rows), want(rows), rtol=1e-5, atol=1e-6)
    other.write_text(json.dumps({"quantization": {"quant_algo": "W4A8_AWQ"}}))
    with pytest.raises(ValueError, match="is quantized by 'W4A8_AWQ'; supported are FP8, NVFP4"):
        load_moe_layer(folder, LAYER)
    other.write_text(json.dumps({"quantization": ["NVFP4"]}))
    with pytest.raises(ValueError, match=r"hf_quant_config.json: quantization must be an object"):
        load_moe_layer(folder, LAYER)


@pytest.mark.parametrize("case", ["deepseek_v3_int4", "qwen3_moe_nvfp4", "qwen3_moe_gptq"])
def test_held_as_stored_gives_the_same_bits_in_less_memory(case):
    hidden = da.from_array(expected(case)["hidden"].reshape(24, -1), chunks=(9, -1))
    plain = load_moe_layer(FIXTURES / case, LAYER)
    held = load_moe_layer(FIXTURES / case, LAYER, as_stored=True)
    with dask.config.set(scheduler="sync"):
        assert held(hidden).compute().tobytes() == plain(hidden).compute().tobytes()
    assert held.experts.load().nbytes < 0.4 * plain.experts.load().nbytes


@pytest.mark.parametrize("ending", ["input_scale", "activation_scale", "input_global_scale"])
def test_scales_of_activations_are_said_to_be_ignored(ending, tmp_path):
    def with_scales(tensors):
        kept = {n: a for n, a in tensors.items() if not n.endswith("input_scale")}
        names = [n.removesuffix("weight") for n in tensors if re.search(r"experts.*weight$", n)]
        return kept | {name + ending: np.ones((), np.float32) for name in names}

    folder = altered(tmp_path, "qwen3_moe_nvfp4", tensors=with_scales)
    (found,) = inspect_path(folder)
    said = "scales of activations, which are not quantized here (30 tensors, 120 B)"
    assert dict(found.facts)["not read"] == said
    hidden = da.from_array(expected("qwen3_moe_nvfp4")["hidden"], chunks=-1)
    layers = [load_moe_layer(path, LAYER) for path in (folder, FIXTURES / "qwen3_moe_nvfp4")]
    a, b = (layer(hidden).compute(scheduler="sync") for layer in layers)
    assert a.tobytes() == b.tobytes()
