"""Tensors of GGUF files are the numbers that the format's own library makes of them."""

from __future__ import annotations

import pickle
import sys

import numpy as np
import pytest

from dask_ep.errors import ReadError
from dask_ep.experts.quantized import in_memory
from dask_ep.storage.gguf_blocks import FORMS, STEP
from dask_ep.storage.gguf_files import GgufSource, open_gguf
from dask_ep.storage.sources import ArraySource, open_source
from tests.gguf_files import Form, gguf, write_gguf
from tests.one_pass import scaled_by  # noqa: F401

NOT_DECODED = {Form.Q8_1, Form.Q8_K, Form.Q1_0, *(Form[f"I{bits}"] for bits in (8, 16, 32, 64))}
DECODED = [form for form in Form if form not in NOT_DECODED]


def some_file(folder, form: Form, rows: int = 5, columns: int = 512):
    """Experts (3, rows, columns) of random bytes; of floats, random numbers."""
    numbers, width = gguf.GGML_QUANT_SIZES[form]
    rng = np.random.default_rng(form.value)
    if form in (Form.F64, Form.F32, Form.F16):
        data = rng.standard_normal((3, rows, columns)).astype(f"f{width}")
    else:  # of small exponents, as a scale may be any of them
        data = rng.integers(0, 64, (3, rows, columns // numbers * width)).astype(np.uint8)
    settings = {"block_count": 1, "token_list": ["a", "b"]}
    tensors = {"before": (np.ones(7, np.float32), Form.F32), "w": (data, form)}
    return write_gguf(folder / "m.gguf", "llama", settings, tensors)


@pytest.mark.parametrize("form", DECODED, ids=lambda form: form.name)
def test_any_rows_are_read_held_and_sent_with_the_librarys_bits(form, tmp_path):
    path = some_file(tmp_path, form)
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == "w")
    plain = form in (Form.F64, Form.F32, Form.F16)
    want = tensor.data if plain else gguf.dequantize(tensor.data, form)
    source = open_source(f"{path}::w")
    assert source.shape == (3, 5, 512)
    assert source.nbytes == tensor.n_bytes
    sent = pickle.loads(pickle.dumps(source))
    held = in_memory(source, 1, 3)
    assert held.nbytes * 3 == source.nbytes * 2
    for got, rows in (
        (source.read(0, 3), want),
        (sent.read(2, 3), want[2:]),
        (held.read(0, 2), want[1:]),
    ):
        np.testing.assert_array_equal(got.astype(np.float32), rows.astype(np.float32))


@pytest.mark.parametrize("label", [*FORMS, "Q3_K"])
def test_any_blocks_are_the_librarys_numbers_bit_for_bit(label):
    """Random bytes, so that scales are of all sizes; more blocks than are decoded at once."""
    form = Form[label]
    numbers, width = gguf.GGML_QUANT_SIZES[form]
    blocks = np.random.default_rng(1).integers(0, 256, (STEP // numbers + 3, width), np.uint8)
    with np.errstate(all="ignore"):
        want = gguf.dequantize(blocks, form)
        whole = np.isfinite(want).all(axis=1)
    assert whole.sum() > 0
    blocks, want = blocks[whole], want[whole]
    got = GgufSource(ArraySource(blocks), label, want.shape).read(0, len(blocks))
    assert got.tobytes() == want.tobytes()


@pytest.mark.parametrize("label", FORMS)
def test_a_block_that_is_not_finite_is_named_wherever_it_is(label):
    form = Form[label]
    numbers, width = gguf.GGML_QUANT_SIZES[form]
    blocks = np.zeros((STEP // numbers + 3, width), np.uint8)
    blocks[-2] = 255  # a scale that is NaN or, of MXFP4, so large that numbers overflow
    if label == "MXFP4":
        blocks[-2, 1:] = 0x77
    source = GgufSource(ArraySource(blocks, "w"), label, (len(blocks), numbers))
    with pytest.raises(ReadError, match="NaN or infinite"):
        source.read(0, len(blocks))
    assert not source.read(0, len(blocks) - 2).any()


def test_forms_that_the_library_does_not_decode_are_named(tmp_path):
    source = open_source(f"{some_file(tmp_path, Form.Q8_K)}::w")
    with pytest.raises(
        ReadError, match=r"m.gguf:w is Q8_K, which the package gguf does not decode"
    ):
        source.read(0, 1)


def test_a_scale_that_is_no_number_is_named(tmp_path):
    blocks = gguf.quantize(np.ones((2, 3, 64), np.float32), Form.Q8_0)
    blocks[1, 2, :2] = np.array([np.nan], np.float16).view(np.uint8)
    path = write_gguf(tmp_path / "m.gguf", "llama", {}, {"w": (blocks, Form.Q8_0)})
    source = open_source(f"{path}::w")
    source.read(0, 1)
    with pytest.raises(ReadError, match=r"rows \[1, 2\) of m.gguf:w \(Q8_0, .*NaN or infinite"):
        source.read(1, 2)


def test_a_file_that_is_not_whole_is_named(tmp_path):
    path = some_file(tmp_path, Form.Q8_0)
    whole = path.read_bytes()
    for part in (whole[:-100], whole[:200], b"GGML" + whole[4:]):
        path.write_bytes(part)
        with pytest.raises(ValueError, match=r"m.gguf is not a GGUF file that the package gguf"):
            open_gguf(path)
    with pytest.raises(ReadError, match=r"No such file"):
        open_gguf(tmp_path / "n.gguf")
    with pytest.raises(ValueError, match=r"must be copied to one first"):
        open_gguf("s3://bucket/m.gguf")


def test_tensors_follow_on_each_other_to_the_end(tmp_path):
    """As llama.cpp requires: then wrong shapes and offsets do not give other numbers."""
    path = some_file(tmp_path, Form.F32)
    whole = path.read_bytes()
    header = gguf.GGUFReader(path).tensors[1].field
    place = header.offset + sum(part.nbytes for part in header.parts[:5])
    assert int.from_bytes(whole[place : place + 8], "little") == 32
    for wrong in (0, 64, 2**64 - 32):
        path.write_bytes(whole[:place] + wrong.to_bytes(8, "little") + whole[place + 8 :])
        with pytest.raises(ValueError, match=r"m\.gguf") as raised:
            open_gguf(path)
        if wrong != 64:  # which the library refuses, as the file is too short
            assert "'w' must begin at byte" in str(raised.value)
    path.write_bytes(whole + bytes(40))
    with pytest.raises(ValueError, match=r"m\.gguf has 40 bytes after its last tensor"):
        open_gguf(path)


def test_numbers_in_another_order_of_bytes_are_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.add_tensor("w", np.ones((2, 3), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"m\.gguf has the byte order of other machines"):
        open_gguf(tmp_path / "m.gguf")


def test_a_vector_in_blocks_is_named(tmp_path):
    blocks = np.zeros(34, np.uint8)
    path = write_gguf(tmp_path / "m.gguf", "llama", {}, {"w": (blocks, Form.Q8_0)})
    with pytest.raises(ReadError, match=r"m\.gguf:w is a vector in blocks \(Q8_0\)"):
        open_source(f"{path}::w").read(0, 32)


def test_files_are_as_many_as_the_first_says(tmp_path):
    tensors = {"w": (np.ones(3, np.float32), Form.F32)}
    path = write_gguf(tmp_path / "m-00001-of-00003.gguf", "llama", {}, tensors, split_count=2)
    with pytest.raises(ValueError, match="one of 2 files: open .* NAME-00001-of-00002.gguf"):
        open_gguf(path)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("split.count", "two")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"split.count of .* must be a whole number, but is 'two'"):
        open_gguf(path)


def test_a_tensor_that_two_files_have_is_an_error(tmp_path):
    for number, names in ((1, "ab"), (2, "bc")):
        tensors = {name: (np.full(3, number, np.float32), Form.F32) for name in names}
        write_gguf(tmp_path / f"m-{number:05}-of-00002.gguf", "llama", {}, tensors, split_count=2)
    with pytest.raises(ValueError, match="-00002-of-00002.gguf has the tensor 'b', and an earlier"):
        open_gguf(tmp_path / "m-00001-of-00002.gguf")


def test_without_the_package_the_error_says_how_to_install_it(tmp_path, monkeypatch):
    path = some_file(tmp_path, Form.F32)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"which is not installed: pip install gguf"):
        open_gguf(path)


def test_the_fingerprint_is_that_of_the_blocks(tmp_path):
    a = open_source(f"{some_file(tmp_path, Form.Q8_0)}::w")
    b = open_source(f"{some_file(tmp_path, Form.Q4_0)}::w")
    assert a.fingerprint() != b.fingerprint()
    assert a.__dask_tokenize__() != b.__dask_tokenize__()
