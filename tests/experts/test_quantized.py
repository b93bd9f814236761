"""FP8 and MXFP4 become the floats that their formats say, whichever rows are read."""

from __future__ import annotations

import pickle

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dask_ep.arrays.unpack import (
    IN_CACHE,
    Rounding,
    apply_shared,
    round_to,
    scale_into,
    split_factor,
)
from dask_ep.errors import ReadError
from dask_ep.experts import quantized
from dask_ep.experts.codings import FLOAT8
from dask_ep.experts.quantized import QuantizedSource, float8, mxfp4
from dask_ep.experts.scales import ScaleSource, ZeroPoints
from dask_ep.storage.sources import open_source
from tests.one_pass import scaled_by  # noqa: F401


def random_float8(shape, block, *, seed=0, dtype=ml_dtypes.float8_e4m3fn, scale=np.float32):
    """Random values and scales, and the float32 matrix that they stand for, element by element."""
    rng = np.random.default_rng(seed)
    values = (rng.standard_normal(shape) * 20).astype(dtype)
    grid = (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))
    scales = rng.uniform(0.5, 2, grid).astype(scale)
    expected = np.empty(shape, np.float32)
    for place in np.ndindex(*shape):
        at = (*place[:-2], place[-2] // block[0], place[-1] // block[1])
        expected[place] = np.float32(values[place]) * np.float32(scales[at])
    return values, scales, expected


@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    block=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    experts=st.none() | st.integers(1, 3),
    together=st.sampled_from([1, 9, 40, IN_CACHE]),
    data=st.data(),
)
@settings(max_examples=120, deadline=None)
def test_float8_rows_are_values_times_the_scale_of_their_block(
    shape, block, experts, together, data
):
    shape = shape if experts is None else (experts, *shape)
    values, scales, expected = random_float8(shape, block)
    source = float8(open_source(values), open_source(scales), block)
    start = data.draw(st.integers(0, shape[0]))
    stop = data.draw(st.integers(start, shape[0]))
    out = np.empty((stop - start, *shape[1:]), np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantized, "IN_CACHE", together)
        assert source.read(start, stop, out) is out
    np.testing.assert_array_equal(out, expected[start:stop])
    assert (source.shape, source.dtype) == (shape, np.float32)
    assert source.nbytes == values.nbytes + scales.nbytes


@given(
    words=st.tuples(st.integers(1, 5), st.integers(1, 3)),
    group=st.integers(1, 40),
    bits=st.sampled_from([4, 8]),
    together=st.sampled_from([1, 200, 600, IN_CACHE]),
    seed=st.integers(0, 99),
)
@settings(max_examples=120, deadline=None)
def test_numbers_in_words_of_columns_are_scaled_by_groups_of_rows(
    words, group, bits, together, seed
):
    """With groups that begin within a word, and however many rows are decoded at a time."""
    rng, shape = np.random.default_rng(seed), (words[0] * 32 // bits, words[1] * 8)
    codes, grid = rng.integers(0, 1 << bits, shape), (-(-shape[0] // group), shape[1])
    zeros = rng.integers(0, 1 << bits, grid)
    scales = rng.uniform(-2, 2, grid).astype(np.float16)
    places = np.arange(0, 32, bits)
    stored = (codes.reshape(words[0], -1, shape[1]) << places[:, None]).sum(axis=1)
    packed = (zeros.reshape(grid[0], -1, 32 // bits) << places).sum(axis=2)
    source = QuantizedSource(
        open_source(stored.astype(np.uint32)), f"column{bits}", open_source(scales), (group, 1),
        zeros=ZeroPoints(open_source(packed.astype(np.uint32)), f"uint{bits}", grid),
        rounded=np.dtype(np.float16),
    )  # fmt: skip
    each = np.arange(shape[0]) // group
    want = ((codes - zeros[each]) * scales[each].astype(np.float32)).astype(np.float16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantized, "IN_CACHE", together)
        np.testing.assert_array_equal(source.read(0, shape[0]), want.astype(np.float32))


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
@pytest.mark.parametrize("scale", [np.float32, ml_dtypes.bfloat16])
def test_every_float8_format_and_dtype_of_scales(dtype, scale):
    values, scales, expected = random_float8((6, 8), (4, 4), dtype=dtype, scale=scale)
    source = float8(open_source(values), open_source(scales), (4, 4))
    np.testing.assert_array_equal(source.read(0, 6), expected)


def test_every_byte_of_mxfp4_at_every_scale():
    # The standard's table of E2M1: sign, exponent (2 bits, bias 1), mantissa (1 bit).
    def value(nibble):
        sign, exponent, mantissa = nibble >> 3, nibble >> 1 & 3, nibble & 1
        size = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
        return -size if sign else size

    blocks = np.arange(256, dtype=np.uint8).reshape(1, 16, 1, 16)
    blocks = np.broadcast_to(blocks, (5, 16, 1, 16))
    exponents = np.array([0, 1, 127, 130, 250], np.uint8)
    scales = np.broadcast_to(exponents[:, None, None], (5, 16, 1))
    decoded = mxfp4(open_source(blocks), open_source(scales)).read(0, 5)
    for e, exponent in enumerate(exponents.tolist()):
        pairs = [(value(byte & 15), value(byte >> 4)) for byte in range(256)]
        expected = np.ldexp(np.array(pairs), exponent - 127).astype(np.float32)
        np.testing.assert_array_equal(decoded[e].reshape(256, 2), expected)


def test_only_the_experts_asked_for_are_read_and_decoded():
    rng = np.random.default_rng(1)
    blocks = rng.integers(0, 256, (4, 3, 2, 16), np.uint8)
    scales = rng.integers(120, 130, (4, 3, 2), np.uint8)
    source = mxfp4(open_source(blocks), open_source(scales))
    assert source.shape == (4, 3, 64)
    np.testing.assert_array_equal(source.read(1, 3), source.read(0, 4)[1:3])
    assert source.read(2, 2).shape == (0, 3, 64)


def test_decoding_sources_are_pickled_and_distinguished():
    values, scales, expected = random_float8((4, 6), (2, 3))
    source = float8(open_source(values), open_source(scales), (2, 3))
    again = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(again.read(0, 4), expected)
    assert again.fingerprint() == source.fingerprint()
    other = float8(open_source(values), open_source(scales * 2), (2, 3))
    assert other.fingerprint() != source.fingerprint()


@pytest.mark.parametrize(
    "changed",
    [
        {"coding": "awq"},
        {"block": (4, 2)},
        {"divides": True},
        {"zeros": 3.0},
        {"rounded": np.dtype(np.float16)},
        {"zeros_coding": "awq"},
        {"more": 1},
        {"mask": 7},
    ],
)
def test_every_choice_of_how_numbers_are_decoded_counts(changed):
    """In a fingerprint: the same files, decoded in another way, are another input."""

    def source(
        coding="uint4", block=(2, 4), divides=False, zeros=None, rounded=None,
        zeros_coding="uint4", more=2, mask=15,
    ):  # fmt: skip
        grid = (4 // block[0], 8 // block[1])
        stored = open_source(np.zeros((grid[0], -(-grid[1] // 8)), np.int32))
        points = ZeroPoints(stored, zeros_coding, grid, more, mask)
        factor = open_source(np.ones(1, np.float32))
        scales = ScaleSource(open_source(np.ones(grid, np.float32)), grid, factor, divides)
        codes, zeros = open_source(np.zeros((4, 1), np.int32)), points if zeros is None else zeros
        return QuantizedSource(codes, coding, scales, block, zeros=zeros, rounded=rounded)

    assert source().fingerprint() == source().fingerprint()
    other = {"zeros": 0.0} if isinstance(changed.get("zeros"), float) else {}
    assert source(**changed).fingerprint() != source(**other).fingerprint()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_scale_that_is_no_number_is_refused_by_name(bad):
    values, scales, _ = random_float8((4, 6), (2, 3))
    scales[1, 0] = bad
    source = float8(open_source(values, "w"), open_source(scales, "w_scale_inv"), (2, 3))
    source.read(0, 2)  # its scales are good
    with pytest.raises(ReadError, match="w_scale_inv holds a scale that is NaN or infinite"):
        source.read(2, 4)


def test_an_mxfp4_scale_that_is_no_number_is_refused_by_name():
    blocks, scales = np.zeros((1, 1, 1, 16), np.uint8), np.full((1, 1, 1), 255, np.uint8)
    source = mxfp4(open_source(blocks, "w_blocks"), open_source(scales, "w_scales"))
    with pytest.raises(ReadError, match="w_scales holds the scale 255, which stands for NaN"):
        source.read(0, 1)


def test_what_cannot_be_decoded_is_refused():
    values, scales, _ = random_float8((4, 6), (2, 3))
    with pytest.raises(ValueError, match=r"so \(2, 2\), but has shape \(1, 2\)"):
        float8(open_source(values), open_source(scales[:1]), (2, 3))
    with pytest.raises(TypeError, match="must hold 8-bit floats, but has dtype float32"):
        float8(open_source(np.zeros((4, 6), np.float32)), open_source(scales), (2, 3))
    blocks, scales = np.zeros((2, 3, 1, 16), np.uint8), np.zeros((2, 3, 1), np.uint8)
    with pytest.raises(TypeError, match="must hold uint8, but has dtype float32"):
        mxfp4(open_source(blocks), open_source(scales.astype(np.float32)))
    with pytest.raises(ValueError, match=r"must be \(experts, out, in / 32, 16\)"):
        mxfp4(open_source(blocks[..., :8]), open_source(scales))
    with pytest.raises(ValueError, match=r"so \(2, 3, 1\), but has shape \(2, 3\)"):
        mxfp4(open_source(blocks), open_source(scales[..., 0]))


@pytest.mark.parametrize("scale", [1.0, 0.3, 2.0**-140, 2.0**100])
@pytest.mark.parametrize("dtype", FLOAT8, ids=lambda dtype: dtype.name)
def test_every_float8_code_is_its_number_times_the_scale(dtype, scale):
    """With infinities and NaN among them, and with none; scales of all sizes; an odd number."""
    every = np.arange(255, dtype=np.uint8)[None].view(dtype)
    finite = every[np.isfinite(every.astype(np.float32))][None]
    scales = np.full((1, 1), scale, np.float32)
    for codes in (every, finite):
        with np.errstate(over="ignore"):
            want = codes.astype(np.float32) * np.float32(scale)
            got = float8(open_source(codes), open_source(scales), (1, 256)).read(0, 1)
        np.testing.assert_array_equal(got, want)
        assert np.array_equal(np.signbit(got), np.signbit(want))


@pytest.mark.parametrize(("dtype", "bits"), [(ml_dtypes.bfloat16, 8), (np.float16, 11)])
def test_products_of_all_fractions_and_whole_numbers_are_rounded_half_to_even(dtype, bits):
    fractions = np.arange(1 << (bits - 1), 1 << bits, dtype=np.float32)[:, None] * 2.0**-bits
    products = np.float32(fractions) * np.arange(-255, 256, dtype=np.float32)
    want = products.astype(dtype).astype(np.float32)
    split = split_factor(np.float32(fractions), np.dtype(dtype))
    assert split is not None
    products *= split
    round_to(products, np.dtype(dtype), split, np.empty_like(products))
    assert products.tobytes() == want.tobytes()


@pytest.mark.parametrize("zero", [0, 3, -128])
def test_products_with_scales_of_0_and_below_are_rounded_with_their_signs(zero):
    codes = np.arange(-128, 128, dtype=np.int8).reshape(2, 128)
    scales = np.float32([[0.3, 0.0, -0.7, 1.7]] * 2).astype(ml_dtypes.bfloat16)
    whole = codes.astype(np.float32) - np.float32(zero)
    want = (whole * np.repeat(scales.astype(np.float32), 32, axis=1)).astype(ml_dtypes.bfloat16)
    zeros = open_source(np.full((2, 4), zero, np.int8))
    for chosen in (slice(0, 1), slice(0, 4)):
        source = QuantizedSource(
            open_source(np.ascontiguousarray(codes[:, : 32 * chosen.stop])), "int8",
            open_source(np.ascontiguousarray(scales[:, chosen])), (1, 32),
            zeros=open_source(np.ascontiguousarray(zeros.array[:, chosen])),
            rounded=np.dtype(ml_dtypes.bfloat16),
        )  # fmt: skip
        got = source.read(0, 2)
        assert got.tobytes() == want[:, : 32 * chosen.stop].astype(np.float32).tobytes()


def test_zero_points_that_are_not_whole_are_refused():
    zeros = open_source(np.full((1, 1), 0.5, np.float32), "w_zero_point")
    codes, scales = open_source(np.zeros((1, 4), np.int8)), open_source(np.ones((1, 1), "f4"))
    source = QuantizedSource(codes, "int8", scales, (1, 4), zeros=zeros)
    with pytest.raises(ReadError, match="w_zero_point must hold whole numbers of 8 bits"):
        source.read(0, 1)


@pytest.mark.parametrize("wide", [1, 4, 16, 32, 48, 128, 600])
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("cut", [0, 3])
def test_what_numbers_share_reaches_all_of_them(wide, together, cut):
    rng = np.random.default_rng(wide)
    rows = rng.standard_normal((5, 3 * wide - cut * (wide > cut)), np.float32)
    values = rng.standard_normal((1 if together else 5, 3), np.float32)
    want = rows * np.repeat(values, wide, axis=1)[:, : rows.shape[1]]
    usual = np.getbufsize()
    apply_shared(np.multiply, rows, values, wide)
    assert rows.tobytes() == want.tobytes()
    assert np.getbufsize() == usual


SHARED = [  # rows, columns, bands, blocks, wide
    (4, 64, 1, 1, 64),
    (4, 64, 4, 1, 64),
    (6, 64, 2, 1, 64),
    (4, 64, 4, 4, 16),
    (6, 64, 2, 4, 16),
    (4, 60, 4, 4, 16),
    (6, 60, 2, 4, 16),
    (6, 64, 2, 64, 1),
    (6, 64, 1, 64, 1),
    (1, 64, 1, 4, 16),
]


@pytest.mark.parametrize(("r", "columns", "bands", "blocks", "wide"), SHARED)
@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("spare", [0, 3])
@pytest.mark.parametrize("rounded", [None, ml_dtypes.bfloat16, np.float16])
def test_numbers_are_scaled_by_what_they_share(
    r, columns, bands, blocks, wide, dtype, spare, rounded
):
    rng = np.random.default_rng(0)
    numbers = rng.integers(0, 16, (r, columns + spare)).astype(dtype)[:, :columns]
    values = rng.uniform(0.01, 2, (bands, blocks)).astype(rounded or np.float32).astype("f4")
    each = np.repeat(np.repeat(values, r // bands, axis=0), wide, axis=1)[:, :columns]
    want = numbers.astype(np.float32) * each
    rows = np.full((r, columns), np.nan, np.float32)
    rounding = None
    if rounded is not None:
        dtype16 = np.dtype(rounded)
        want = want.astype(dtype16).astype(np.float32)
        scratch = np.empty(rows.size, np.float32)
        rounding = Rounding(dtype16, split_factor(values, dtype16), scratch)
    scale_into(rows, numbers, values, wide, rounding)
    assert rows.tobytes() == want.tobytes()


def test_zero_points_of_128_leave_the_codes_as_they_are():
    """Eight bits each, stored with the sign that int8 lacks, in memory that cannot be written."""
    codes = np.random.default_rng(0).integers(0, 256, (8, 64)).astype(np.uint8)
    codes.flags.writeable = False
    zeros = open_source(np.full((8, 2), 128, np.float32))
    scales = open_source(np.ones((8, 2), np.float32))
    source = QuantizedSource(open_source(codes), "uint8", scales, (1, 32), zeros=zeros)
    for _ in range(2):
        np.testing.assert_array_equal(source.read(0, 8), codes.astype(np.float32) - 128)
