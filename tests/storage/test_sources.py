"""Reading by rows gives the stored rows, with one read per chunk, or an error that says where."""

import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
import warnings

import fsspec
import ml_dtypes
import numpy as np
import pytest
import zarr
from dask.base import tokenize
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from dask_ep.jobs.inspect import inspect_path
from dask_ep.storage import files
from dask_ep.storage.sources import (
    ArraySource,
    ReadError,
    Region,
    open_safetensors,
    open_source,
    refuse_missing,
)
from dask_ep.storage.zarr_layout import EXTENSION_DTYPES, create_array, open_array

DTYPES = [np.dtype(t) for t in ("f4", "f8", "f2", "i8", "i4", "u1", "?", "c8")]
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
SMALL_DTYPES = [BFLOAT16, np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2)]


def numbers(shape, dtype):
    """An array whose values tell where they belong."""
    values = np.arange(1, 1 + int(np.prod(shape)))
    return (values % 200).astype(dtype).reshape(shape)


def bits(array):
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


@st.composite
def arrays_and_ranges(draw, dtypes, min_ndim=1):
    shape = draw(st.lists(st.integers(0, 9), min_size=min_ndim, max_size=3).map(tuple))
    start = draw(st.integers(0, shape[0]))
    stop = draw(st.integers(start, shape[0]))
    return numbers(shape, draw(st.sampled_from(dtypes))), start, stop


def check_rows(source, array, start, stop):
    assert (source.shape, source.dtype) == (array.shape, array.dtype)
    assert (source.ndim, source.nbytes) == (array.ndim, array.nbytes)
    expected = array[start:stop]
    found = source.read(start, stop)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert found.flags.c_contiguous
    np.testing.assert_array_equal(bits(found), bits(expected))
    out = np.empty(expected.shape, expected.dtype)
    assert source.read(start, stop, out=out) is out
    np.testing.assert_array_equal(bits(out), bits(expected))


@pytest.fixture
def reads(monkeypatch):
    """The bytes of every read from a file, in order."""
    seen, lock, preadv = [], threading.Lock(), os.preadv

    def spy(file, buffers, offset):
        count = preadv(file, buffers, offset)
        with lock:
            seen.append(count)
        return count

    monkeypatch.setattr(files.os, "preadv", spy)
    return seen


@given(arrays_and_ranges(DTYPES))
def test_rows_of_npy_and_memory(tmp_path_factory, case):
    array, start, stop = case
    path = tmp_path_factory.mktemp("npy") / "x.npy"
    np.save(path, array)
    check_rows(open_source(path), array, start, stop)
    check_rows(open_source(array), array, start, stop)
    check_rows(open_source(array[::-1]), array[::-1], start, stop)


@given(arrays_and_ranges(DTYPES + SMALL_DTYPES), st.integers(0, 3))
def test_rows_of_safetensors(tmp_path_factory, case, others):
    array, start, stop = case
    path = tmp_path_factory.mktemp("tensors") / "m.safetensors"
    tensors = {"layers.0.w": array, "scale": np.array(2.5, "f4")}
    tensors |= {f"other.{i}": numbers((i + 1, 3), "u1") for i in range(others)}
    save_file(tensors, path, metadata={"format": "pt"})
    found = open_safetensors(path)
    assert set(found) == set(tensors)
    check_rows(found["layers.0.w"], array, start, stop)
    check_rows(open_source(f"{path}::layers.0.w"), array, start, stop)
    assert found["scale"].read(0, 1).shape == ()
    for name, tensor in tensors.items():
        rows = found[name].read(0, len(tensor) if tensor.ndim else 1)
        np.testing.assert_array_equal(bits(rows), bits(tensor))


@st.composite
def zarr_layouts(draw):
    """Any array, chunking, codec and key encoding, with some chunks left out."""
    shape = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple))
    whole_rows = draw(st.booleans())
    chunks = tuple(
        n if i and whole_rows else draw(st.integers(1, n + 2)) for i, n in enumerate(shape)
    )
    options = {"shape": shape, "chunks": chunks, "dtype": draw(st.sampled_from(DTYPES))}
    options["compressors"] = draw(st.sampled_from([None, None, "auto"]))
    if draw(st.integers(0, 3)) == 0:
        options["shards"] = tuple(c * draw(st.integers(1, 2)) for c in chunks)
    if draw(st.integers(0, 3)) == 0:
        options["serializer"] = zarr.codecs.BytesCodec(endian="big")
    options["chunk_key_encoding"] = draw(
        st.sampled_from(
            [
                {"name": "default", "separator": "/"},
                {"name": "default", "separator": "."},
                {"name": "v2", "separator": "."},
            ]
        )
    )
    options["fill_value"] = draw(st.sampled_from([0, 1]))
    return options, draw(st.integers(0, shape[0]))


@given(zarr_layouts(), st.data())
@settings(deadline=None)
def test_direct_reads_agree_with_zarr(tmp_path_factory, layout, data):
    options, written = layout
    path = tmp_path_factory.mktemp("zarr") / "x.zarr"
    array = zarr.create_array(path, **options)
    array[:written] = numbers(options["shape"], options["dtype"])[:written]
    start = data.draw(st.integers(0, options["shape"][0]))
    stop = data.draw(st.integers(start, options["shape"][0]))
    expected = zarr.open_array(path, mode="r")[:]
    for obj in (path, array):
        source = open_source(obj, missing="fill")
        check_rows(source, expected.reshape(options["shape"]), start, stop)


@pytest.mark.parametrize("dtype", [*EXTENSION_DTYPES.values()], ids=str)
@pytest.mark.parametrize("compressors", [None, "auto"])
def test_types_that_zarr_lacks_are_stored_under_their_registered_names(
    tmp_path, dtype, compressors
):
    path = str(tmp_path / "x.zarr")
    rows = numbers((7, 5), "f4").astype(dtype)
    create_array(path, rows.shape, 3, dtype, compressors)
    assert json.loads((tmp_path / "x.zarr" / "zarr.json").read_text())["data_type"] == dtype.name
    with pytest.raises(ValueError, match=dtype.name):
        zarr.open_array(path)
    source = open_source(path, missing="fill")
    assert not bits(source.read(0, 7)).any()
    array, _ = open_array(path, mode="r+")
    array[:] = rows.view(array.dtype)
    check_rows(open_source(path), rows, 2, 7)


@pytest.mark.parametrize(
    ("options", "direct"),
    [
        ({}, True),
        ({"dtype": "i8"}, True),
        ({"chunks": (5, 4)}, True),
        ({"chunk_key_encoding": {"name": "v2", "separator": "/"}}, True),
        ({"chunks": (2, 2)}, False),
        ({"compressors": "auto"}, False),
        ({"shards": (4, 4)}, False),
        ({"serializer": zarr.codecs.BytesCodec(endian="big")}, False),
        ({"filters": [zarr.codecs.TransposeCodec(order=(1, 0))]}, False),
        ({"zarr_format": 2}, False),
        ({"store": zarr.storage.MemoryStore()}, False),
    ],
)
def test_only_plain_rows_are_read_directly(tmp_path, reads, options, direct):
    settings = {"store": tmp_path / "x.zarr", "shape": (10, 4), "chunks": (2, 4), "dtype": "f4"}
    array = zarr.create_array(**(settings | {"compressors": None} | options))
    array[:] = numbers((10, 4), "f4")
    source = open_source(array)
    check_rows(source, numbers((10, 4), array.dtype), 1, 9)
    assert bool(reads) == direct == (source.files is not None)


def test_a_read_is_one_system_call_per_chunk_of_no_more_bytes_than_asked(tmp_path, reads):
    array = create_array(str(tmp_path / "x.zarr"), (10, 4), 4, np.dtype("f4"))
    array[:] = numbers((10, 4), "f4")
    np.save(tmp_path / "x.npy", numbers((10, 4), "f4"))
    open_source(tmp_path / "x.zarr").read(2, 9)
    assert reads == [2 * 16, 4 * 16, 1 * 16]
    del reads[:]
    open_source(tmp_path / "x.npy").read(2, 9)
    assert reads == [7 * 16]
    del reads[:]
    save_file({"a": numbers((5,), "f4"), "w": numbers((10, 4), "f4")}, tmp_path / "m.safetensors")
    open_source(f"{tmp_path}/m.safetensors::w").read(3, 4)
    assert reads == [16]


def test_opening_reads_no_rows(tmp_path, reads):
    create_array(str(tmp_path / "x.zarr"), (10, 4), 4, np.dtype("f4"))[:] = 1
    np.save(tmp_path / "x.npy", np.ones((10, 4)))
    for path in ("x.zarr", "x.npy"):
        source = open_source(tmp_path / path)
        source.fingerprint()
        tokenize(source)
        assert len(pickle.dumps(source)) < 2000
    assert reads == []


def test_short_reads_are_continued(tmp_path, monkeypatch):
    np.save(tmp_path / "x.npy", numbers((10, 4), "f4"))
    preadv = os.preadv
    monkeypatch.setattr(files.os, "preadv", lambda f, b, at: preadv(f, [b[0][:7]], at))
    check_rows(open_source(tmp_path / "x.npy"), numbers((10, 4), "f4"), 1, 9)


def test_rows_in_memory_are_pickled_as_they_are_then():
    """Files are read when a task runs; of a store in memory the rows travel with the task."""
    store = zarr.storage.MemoryStore()
    array = zarr.create_array(store, shape=(4, 2), chunks=(2, 2), dtype="f4")
    source = open_source(array)
    for value in (1, 2):
        array[:] = value
        got = pickle.loads(pickle.dumps(source)).read(0, 4)
        np.testing.assert_array_equal(got, np.full((4, 2), value, "f4"))


def test_a_source_of_files_is_unpickled_once(tmp_path):
    path = str(tmp_path / "x.zarr")
    zarr.create_array(path, shape=(4, 2), chunks=(2, 2), dtype="f4")[:] = 1
    source = open_source(path)
    one, other = (pickle.loads(pickle.dumps(source)) for _ in range(2))
    assert one is other
    zarr.open_array(path)[:] = 2
    np.testing.assert_array_equal(one.read(0, 4), np.full((4, 2), 2, "f4"))


@pytest.mark.parametrize("kind", ["npy", "safetensors", "zarr", "array", "compressed"])
def test_sources_survive_pickling(tmp_path, kind):
    rows = numbers((6, 3), "f4")
    if kind == "npy":
        np.save(tmp_path / "x.npy", rows)
        source = open_source(tmp_path / "x.npy")
    elif kind == "safetensors":
        save_file({"w": rows}, tmp_path / "x.safetensors")
        source = open_source(tmp_path / "x.safetensors")
    elif kind == "array":
        source = open_source(rows)
    else:
        compressors = "auto" if kind == "compressed" else None
        create_array(str(tmp_path / "x.zarr"), (6, 3), 2, rows.dtype, compressors)[:] = rows
        source = open_source(tmp_path / "x.zarr")
    copy = pickle.loads(pickle.dumps(source))
    check_rows(copy, rows, 1, 5)
    assert tokenize(copy) == tokenize(source)
    assert repr(copy) == repr(source)


def test_memory_maps_are_their_files(tmp_path, reads):
    np.save(tmp_path / "x.npy", numbers((5000, 3), "f4"))
    whole = np.load(tmp_path / "x.npy", mmap_mode="r")
    for part in (whole, whole[7:], whole[4000:4400], whole[4000:][10:20]):
        source = open_source(part)
        assert isinstance(source, Region)
        check_rows(source, np.array(part), 1, len(part) - 1)
    assert len(reads) == 8
    assert isinstance(open_source(whole[::2]), ArraySource)
    private = np.load(tmp_path / "x.npy", mmap_mode="c")
    private[0] = 99
    assert open_source(private).read(0, 1)[0, 0] == 99


def test_rows_of_memory_are_a_view_that_cannot_be_written(tmp_path):
    array = np.ones((4, 2))
    rows = open_source(array).read(1, 3)
    assert np.shares_memory(rows, array)
    with pytest.raises(ValueError, match="read-only"):
        rows[0] = 5
    array[0] = 7  # the array itself stays its owner's


def test_a_source_stays_itself_and_keeps_its_name(tmp_path):
    source = open_source(np.ones((2, 2)), name="hidden")
    assert open_source(source) is source
    assert source.name == "hidden"
    group = zarr.create_group(tmp_path / "model.zarr")
    group.create_array("layers/w", shape=(3, 2), dtype="f4")
    assert open_source(tmp_path / "model.zarr" / "layers" / "w").name == "model.zarr/layers/w"
    np.save(tmp_path / "x.npy", np.ones(3))
    assert open_source(tmp_path / "x.npy").name == "x.npy"
    save_file({"a": np.ones(2), "b": np.ones(3)}, tmp_path / "m.safetensors")
    assert open_source(f"{tmp_path}/m.safetensors::b").name == "m.safetensors:b"
    (tmp_path / "two\nlines").symlink_to(tmp_path)
    assert open_source(f"{tmp_path}/two\nlines/m.safetensors::b").shape == (3,)
    assert open_source(f"{tmp_path}/m.safetensors::b", name="bias").name == "bias"


def test_fingerprints_tell_changed_data_and_not_moved_data(tmp_path):
    np.save(tmp_path / "x.npy", np.ones((4, 2), "f4"))
    create_array(str(tmp_path / "x.zarr"), (4, 2), 2, np.dtype("f4"))[:] = 1
    save_file({"w": np.ones((4, 2), "f4")}, tmp_path / "x.safetensors")
    for name in ("x.npy", "x.zarr", "x.safetensors"):
        before = open_source(tmp_path / name)
        mark, token = before.fingerprint(), tokenize(before)
        assert json.loads(json.dumps(mark)) == mark
        assert mark["name"].startswith("x.")
        assert (mark["shape"], mark["dtype"]) == ([4, 2], "float32")
        (tmp_path / "moved").mkdir(exist_ok=True)
        os.rename(tmp_path / name, tmp_path / "moved" / name)
        moved = open_source(tmp_path / "moved" / name)
        assert moved.fingerprint() == mark
        assert tokenize(moved) != token
        file = (
            tmp_path / "moved" / name / "c.1.0" if name == "x.zarr" else tmp_path / "moved" / name
        )
        os.utime(file, ns=(1, file.stat().st_mtime_ns + 1))
        assert moved.fingerprint() != mark
    a, b = open_source(np.ones(3)), open_source(np.ones(3))
    assert a.fingerprint() == b.fingerprint() != open_source(np.zeros(3)).fingerprint()
    assert tokenize(a) == tokenize(b)


@pytest.mark.parametrize("name", ["x.npy", "x.zarr", "x.safetensors"])
def test_a_file_of_another_content_is_told_apart_by_samples(tmp_path, name):
    """Archives unpack all files with one time of change; a copy of the same bytes is the same."""
    rows = np.arange(1e6, dtype="f4").reshape(-1, 4)

    def write(directory, rows):
        (tmp_path / directory).mkdir()
        path = tmp_path / directory / name
        if name == "x.npy":
            np.save(path, rows)
        elif name == "x.zarr":
            create_array(str(path), rows.shape, 1000, rows.dtype)[:] = rows
        else:
            save_file({"x": rows}, path)
        for file in (path, *path.rglob("*")):
            os.utime(file, ns=(1, 1))
        return open_source(path)

    first = write("first", rows)
    assert write("same", rows).fingerprint() == first.fingerprint()
    assert write("other", rows + 1).fingerprint() != first.fingerprint()
    mark = first.fingerprint()
    shutil.rmtree(tmp_path / "first")
    assert write("first", rows[::-1]).fingerprint() != mark


def test_remote_arrays_are_read_through_zarr(tmp_path):
    path = f"memory://{tmp_path.name}/x.zarr"
    array = zarr.create_array(path, shape=(9, 4), chunks=(2, 4), dtype="f4", compressors=None)
    array[:5] = numbers((9, 4), "f4")[:5]
    source = open_source(path, missing="fill")
    assert source.path is None
    assert source.name == "x.zarr"
    check_rows(source, array[:], 1, 8)
    assert tokenize(source) == tokenize(open_source(path, missing="fill"))
    strict = open_source(path)
    strict.read(0, 6)
    with pytest.raises(ReadError, match=r"rows \[5, 8\) of x.zarr: chunk c/3/0 is missing"):
        strict.read(5, 8)
    assert strict.find_missing() == ["c/3/0", "c/4/0"]


def put(address: str, path) -> str:
    """Copy a file to an address."""
    files, place = fsspec.core.url_to_fs(address)
    files.pipe_file(place, path.read_bytes())
    return address


@settings(max_examples=20)
@given(arrays_and_ranges(DTYPES))
def test_remote_npy_and_safetensors_are_read_as_local_ones(tmp_path_factory, case):
    array, start, stop = case
    folder = tmp_path_factory.mktemp("remote")
    np.save(folder / "x.npy", array)
    save_file({"w": array, "scale": np.array(2.5, "f4")}, folder / "m.safetensors")
    npy, tensors = (
        put(f"memory://{folder.name}/{name}", folder / name) for name in ("x.npy", "m.safetensors")
    )
    for place, name in ((npy, "x.npy"), (f"{tensors}::w", "m.safetensors:w")):
        source = open_source(place)
        assert source.name == name
        check_rows(source, array, start, stop)
        check_rows(pickle.loads(pickle.dumps(source)), array, start, stop)
        assert tokenize(source) == tokenize(open_source(place))


def test_remote_files_that_are_damaged_or_gone_are_named(tmp_path):
    np.save(tmp_path / "x.npy", np.ones((5, 3)))
    with open(tmp_path / "x.npy", "r+b") as file:
        file.truncate(200)
    cut = put(f"memory://{tmp_path.name}/x.npy", tmp_path / "x.npy")
    with pytest.raises(ReadError, match=rf"{cut} is too short for x.npy: \(5, 3\) of float64"):
        open_source(cut)
    (tmp_path / "x.npy").write_bytes(b"not an array at all")
    with pytest.raises(ValueError, match=rf"{cut} is not a .npy file of numbers"):
        open_source(put(cut, tmp_path / "x.npy"))
    for name in ("none.npy", "none.safetensors", "none.safetensors::w"):
        with pytest.raises(ReadError, match=r"memory://gone/none.* cannot be opened"):
            open_source(f"memory://gone/{name}")


@pytest.mark.parametrize("compressors", [None, "auto"])
def test_missing_chunks_are_the_fill_value_or_an_error(tmp_path, compressors):
    path = str(tmp_path / "x.zarr")
    create_array(path, (6, 2), 2, np.dtype("f4"), compressors)[:] = 5
    os.unlink(f"{path}/c.1.0")
    filled = open_source(path, missing="fill")
    refuse_missing(filled)
    assert filled.read(1, 5)[:, 0].tolist() == [5, 0, 0, 5]
    assert filled.find_missing() == ["c.1.0"]
    strict = open_source(path)
    assert strict.read(4, 6)[:, 0].tolist() == [5, 5]
    with pytest.raises(ReadError, match=r'1 chunks are missing in .*c\.1\.0.*set missing="fill"'):
        refuse_missing(strict)
    with pytest.raises(ReadError, match=r"rows \[.*c\.1\.0"):
        strict.read(1, 5)
    with pytest.raises(ValueError, match=r"must be \"error\" or \"fill\", not 'zero'"):
        open_source(path, missing="zero")


@pytest.mark.parametrize("place", ["{}/x.zarr", "memory://{}/x.zarr"])
@pytest.mark.parametrize("index_location", ["start", "end"])
def test_a_shard_that_was_written_in_part_is_an_error(tmp_path, place, index_location):
    path = place.format(tmp_path if place[0] == "{" else tmp_path.name)
    codec = zarr.codecs.ShardingCodec(chunk_shape=(2, 4), index_location=index_location)
    array = zarr.create_array(
        path, shape=(11, 6), chunks=(6, 8), dtype="f4", serializer=codec, compressors=None
    )
    array[:] = numbers((11, 6), "f4")  # the ends of the last shard and of its chunks are padding
    assert open_source(path).find_missing() == []
    array[2:4, 4:] = 0  # Zarr writes no such chunk
    filled, strict = open_source(path, missing="fill"), open_source(path)
    check_rows(filled, array[:], 1, 8)
    check_rows(strict, array[:], 4, 11)
    assert strict.find_missing() == ["1.1 of shard c/0/0"]
    with pytest.raises(ReadError, match=r"rows \[3, 4\) .*: chunk 1.1 of shard c/0/0 is missing"):
        strict.read(3, 4)


@pytest.mark.parametrize(
    "options",
    [
        {"serializer": zarr.codecs.ShardingCodec(chunk_shape=(2, 4)), "compressors": "auto"},
        {
            "serializer": zarr.codecs.ShardingCodec(chunk_shape=(2, 2)),
            "filters": zarr.codecs.TransposeCodec(order=(1, 0)),
            "chunks": (4, 4),
        },
        {
            "serializer": zarr.codecs.ShardingCodec(
                chunk_shape=(4, 4), codecs=[zarr.codecs.ShardingCodec(chunk_shape=(2, 4))]
            )
        },
    ],
    ids=["compressed", "transposed", "nested"],
)
@pytest.mark.filterwarnings("ignore:Combining a `sharding_indexed` codec")
def test_shards_whose_chunks_cannot_be_missed_are_refused(tmp_path, options):
    path = tmp_path / "x.zarr"
    given = {"shape": (8, 8), "chunks": (4, 8), "dtype": "f4", "compressors": None} | options
    array = zarr.create_array(path, **given)
    array[:] = numbers((8, 8), "f4")  # no chunk is missing, which cannot be seen
    check_rows(open_source(path, missing="fill"), array[:], 1, 8)
    assert dict(inspect_path(path)[0].facts)["chunks never written"].startswith("not known")
    for read in (refuse_missing, lambda source: source.read(0, 1)):
        with pytest.raises(ReadError, match=r'shards together with .*, or set missing="fill"'):
            read(open_source(path))


def test_chunks_without_numbers_are_refused(tmp_path):
    """From 3.4 on, Zarr itself warns of them, and says how it reads them instead."""
    zarr.create_array(tmp_path / "x.zarr", shape=(4, 2), chunks=(2, 2), dtype="f4")
    metadata = (tmp_path / "x.zarr" / "zarr.json").read_text()
    grid = json.loads(metadata)
    grid["chunk_grid"]["configuration"]["chunk_shape"] = [0, 2]
    (tmp_path / "x.zarr" / "zarr.json").write_text(json.dumps(grid))
    said = r"chunks of x.zarr must have numbers, but are \(0, 2\)|chunk shape \[0, 2\] is invalid"
    with pytest.raises((ValueError, UserWarning), match=said):
        open_source(tmp_path / "x.zarr")


def test_a_group_is_no_array_but_has_some(tmp_path):
    group = zarr.create_group(tmp_path / "g.zarr")
    with pytest.raises(ValueError, match=r"It is a group; name an array in it$"):
        open_source(tmp_path / "g.zarr")
    group.create_array("hidden", data=numbers((4, 2), "f4"))
    with pytest.raises(ValueError, match=r"name an array in it, such as .*g.zarr/hidden"):
        open_source(tmp_path / "g.zarr")


@pytest.mark.parametrize("compressors", [None, "auto"])
def test_damaged_chunks_are_errors(tmp_path, compressors):
    path = str(tmp_path / "x.zarr")
    create_array(path, (6, 200), 2, np.dtype("f4"), compressors)[:] = numbers((6, 200), "f4")
    chunk = tmp_path / "x.zarr" / "c.1.0"
    chunk.write_bytes(chunk.read_bytes()[:-100])
    source = open_source(path)
    source.read(0, 2)
    message = r"rows \[2, 4\).* of x.zarr"
    if compressors is None:
        message = (
            r"chunk 1 \(rows \[2, 4\)\) of x.zarr: .*c\.1\.0 must have 1600 bytes, but has 1500"
        )
    with pytest.raises(ReadError, match=message):
        source.read(0, 6) if compressors is None else source.read(2, 4)


@pytest.mark.parametrize("name", ["x.npy", "x.zarr"])
def test_what_the_disk_cannot_read_is_named(tmp_path, monkeypatch, name):
    np.save(tmp_path / "x.npy", np.ones((6, 2), "f4"))
    create_array(str(tmp_path / "x.zarr"), (6, 2), 2, np.dtype("f4"))[:] = 5
    source = open_source(tmp_path / name)

    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(files.os, "preadv", fail)
    with pytest.raises(ReadError, match=rf"of {name}: /.*{name}.* cannot be read: Input/output"):
        source.read(2, 4)


@pytest.mark.parametrize("missing", ["error", "fill"])
@pytest.mark.parametrize("options", [{}, {"compressors": None}, {"shards": (20, 4)}])
def test_what_is_no_chunk_file_is_never_taken_for_the_fill_value(tmp_path, options, missing):
    ones = np.ones((40, 4), "f4")
    zarr.create_array(tmp_path / "x.zarr", data=ones, chunks=(10, 4), **options)
    chunk = tmp_path / "x.zarr" / "c" / "1" / "0"
    chunk.rename(tmp_path / "moved")
    source = open_source(tmp_path / "x.zarr", missing=missing)
    chunk.symlink_to(tmp_path / "moved")
    np.testing.assert_array_equal(source.read(0, 40), ones)
    (tmp_path / "moved").unlink()
    with pytest.raises(ReadError, match="c/1/0 cannot be opened: No such file"):
        source.read(0, 40)
    chunk.unlink()
    chunk.mkdir()
    with pytest.raises(ReadError, match="c/1/0 must (be a file, but is a|have 160 bytes, but has)"):
        source.read(0, 40)
    chunk.rmdir()
    chunk.parent.rmdir()
    chunk.parent.write_text("")
    with pytest.raises(ReadError, match="c/1/0 cannot be opened: Not a directory"):
        source.read(0, 40)


def test_files_that_are_cut_short_or_gone_are_errors(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, np.ones((4, 2), "f4"))
    source, whole = open_source(path), path.read_bytes()
    path.write_bytes(whole[:-9])
    with pytest.raises(
        ReadError, match=r"rows \[1, 4\) of x.npy: expected 24 bytes from byte 136 of .*, got 15"
    ):
        source.read(1, 4)
    with pytest.raises(ReadError, match=r"too short for x.npy: \(4, 2\) .* 160, the file at 151"):
        open_source(path)
    path.unlink()
    with pytest.raises(ReadError, match=r"rows \[1, 4\).*x.npy cannot be opened: No such file"):
        source.read(1, 4)
    for gone in ("x.npy", "x.safetensors"):
        with pytest.raises(ReadError, match=f"{gone}: No such file"):
            open_source(tmp_path / gone)
    with pytest.raises(ReadError, match=r"/x.zarr: No such file or directory"):
        open_source(tmp_path / "x.zarr")
    (tmp_path / "x.npy").mkdir()
    os.mkfifo(tmp_path / "x.safetensors")
    for other, words in (("x.npy", "a directory"), ("x.safetensors", "a device or a pipe")):
        with pytest.raises(ReadError, match=f"/{other} must be a file, but is {words}"):
            open_source(tmp_path / other)
    assert issubclass(ReadError, OSError)


def test_a_npy_file_of_an_unknown_version(tmp_path):
    np.save(tmp_path / "x.npy", np.ones(3))
    content = bytearray((tmp_path / "x.npy").read_bytes())
    content[7] = 64
    (tmp_path / "x.npy").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.npy .*: its format has version 1\.64, not 1\.0 or"):
        open_source(tmp_path / "x.npy")


def test_npy_files_that_are_no_plain_rows_of_numbers(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, np.asfortranarray(np.ones((3, 2))))
    with pytest.raises(ValueError, match=r"Fortran order.*ascontiguousarray"):
        open_source(path)
    np.save(path, np.array([{}, []], dtype=object), allow_pickle=True)
    with pytest.raises(TypeError, match=r"x.npy must hold numbers, not object"):
        open_source(path)
    np.save(path, np.array(["a", "b"]))
    with pytest.raises(TypeError, match=r"must hold numbers, not <U1"):
        open_source(path)
    np.save(path, np.ones((3, 2), ">f4"))
    with pytest.raises(TypeError, match=r"byte order of this machine.* >f4.*'float32'"):
        open_source(path)
    np.save(path, np.ones((3, 2), "f4"))
    content = path.read_bytes()
    path.write_bytes(content.replace(b"(3, 2)", b"((3,2)"))
    with pytest.raises(ValueError, match=r"x.npy is not a .npy file of numbers"):
        open_source(path)
    path.write_bytes(content.replace(b"(3, 2)", b"(2, 2)"))
    with pytest.raises(ReadError, match=r"x.npy has 8 bytes after the array \(2, 2\) of float32"):
        open_source(path)
    path.write_bytes(b"not an array at all")
    with pytest.raises(ValueError, match=r"is not a .npy file of numbers"):
        open_source(path)


def test_raw_bytes_are_no_numbers_until_somebody_says_which(tmp_path):
    rows = numbers((4, 2), BFLOAT16)
    path = tmp_path / "x.npy"
    np.save(path, rows)
    with pytest.raises(TypeError, match=r"x.npy holds raw bytes \(\|V2\).*Pass the type as dtype="):
        open_source(path)
    check_rows(open_source(path, dtype="bfloat16"), rows, 1, 4)
    with pytest.raises(TypeError, match=r"x.npy holds \|V2, not float32"):
        open_source(path, dtype="float32")
    with warnings.catch_warnings(action="ignore"):  # that others may not know this type
        array = zarr.create_array(tmp_path / "x.zarr", shape=(4, 2), chunks=(2, 2), dtype="V2")
    with pytest.raises(TypeError, match="holds raw bytes"):
        open_source(array, name="x.zarr")
    np.save(path, np.ones(3, "f8"))
    with pytest.raises(TypeError, match=r"x.npy holds float64, not bfloat16"):
        open_source(path, dtype="bfloat16")


def test_what_is_no_source(tmp_path):
    with pytest.raises(
        TypeError, match=r"path, a NumPy or Zarr array or a Source, not builtins.int"
    ):
        open_source(3)
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(ValueError, match=r"x.txt is not a supported array"):
        open_source(tmp_path / "x.txt")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"folder cannot be opened as a Zarr array"):
        open_source(tmp_path / "folder")
    zarr.create_group(tmp_path / "group.zarr")
    with pytest.raises(ValueError, match=r"group.zarr cannot be opened as a Zarr array"):
        open_source(tmp_path / "group.zarr")


@pytest.mark.parametrize(
    "text",
    ["", "{", "3", "{}", '{"zarr_format": 3, "node_type": "array"}', '{"data_type": "bfloat16"}'],
)
def test_metadata_that_is_not_that_of_an_array_is_refused_with_its_path(tmp_path, text):
    (tmp_path / "x.zarr").mkdir()
    (tmp_path / "x.zarr" / "zarr.json").write_text(text)
    with pytest.raises(ValueError, match=r"x.zarr cannot be opened as a Zarr array: ."):
        open_source(tmp_path / "x.zarr")


def test_requests_that_cannot_be_met(tmp_path):
    np.save(tmp_path / "x.npy", np.ones((4, 2), "f4"))
    create_array(str(tmp_path / "x.zarr"), (4, 2), 2, np.dtype("f4"))[:] = 1
    for source in map(
        open_source, (tmp_path / "x.npy", tmp_path / "x.zarr", np.ones((4, 2), "f4"))
    ):
        for start, stop in ((-1, 2), (3, 2), (2, 5)):
            with pytest.raises(ValueError, match=rf"within \[0, 4\), not \[{start}, {stop}\)"):
                source.read(start, stop)
        for out in (
            np.empty((3, 2), "f4"),
            np.empty((2, 2), "f8"),
            np.empty((2, 2), "f4", order="F"),
            np.broadcast_to(np.zeros(2, "f4"), (2, 2)),
        ):
            with pytest.raises(
                ValueError, match=r"writeable C-contiguous \(2, 2\) array of float32"
            ):
                source.read(1, 3, out=out)


def test_a_safetensors_file_with_several_tensors_needs_a_name(tmp_path):
    path = tmp_path / "m.safetensors"
    save_file({f"w{i}": np.ones(i + 1) for i in range(7)}, path)
    with pytest.raises(ValueError, match=r"has 7 tensors; name one as m.safetensors::<tensor>"):
        open_source(path)
    with pytest.raises(ValueError, match=r"no tensor 'x'.* It has w\d, w\d, w\d, w\d, w\d, \.\.\."):
        open_source(f"{path}::x")


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": entry(), "b": entry(offsets=(4, 12))}, 12, "'b' overlaps the one before it"),
        ({"a": entry(), "b": entry(offsets=(12, 20))}, 20, "'b' leaves a gap before it"),
        ({"a": entry(offsets=(4, 12))}, 12, "'a' leaves a gap"),
        ({"a": entry()}, 7, "must end with the file, at byte .* but the file has"),
        ({"a": entry()}, 9, "must end with the file"),
        ({"a": entry(shape=(3,))}, 8, r"'a': shape \[3\] of F32 takes 12 bytes, but .* hold 8"),
        ({"a": entry(offsets=(8, 0))}, 8, r"takes 8 bytes, but data_offsets \[8, 0\] hold -8"),
        ({"a": entry(shape=(-2,))}, 8, r"must be integers of at least 0, not \[-2\]"),
        ({"a": entry(shape=(2.0,))}, 8, "must be integers of at least 0"),
        ({"a": entry(shape=(True,), offsets=(0, 4))}, 4, "must be integers of at least 0"),
        ({"a": entry(dtype="F4")}, 8, "'a' has dtype 'F4'; supported are BOOL"),
        ({"a": {"dtype": "F32", "shape": [2]}}, 8, "must have dtype, shape and data_offsets"),
        ({"a": {**entry(), "shape": 2}}, 8, "must be integers of at least 0, not 2"),
        ({"a": entry(offsets=(0, 4, 8))}, 8, "must have dtype, shape and data_offsets"),
        ({"a": 5}, 8, "must have dtype, shape and data_offsets"),
        ([1], 0, "must be a JSON object"),
        (b"{", 0, "is not valid JSON"),
        (b'{"a": 1, "a": 2}', 0, "the name 'a' appears twice"),
        (b"\xff\xfe", 0, "is not valid JSON"),
    ],
)
def test_headers_that_break_the_rules(tmp_path, header, data, message):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = tmp_path / "m.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(data))
    with pytest.raises(ValueError, match=message) as caught:
        open_safetensors(path)
    assert "m.safetensors" in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"", b"abc", (1 << 40).to_bytes(8, "little") + b"{}", bytes(7)]
)
def test_headers_that_do_not_fit_the_file(tmp_path, content):
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is not a safetensors file"):
        open_safetensors(path)


@given(st.data())
@settings(deadline=None)
def test_a_damaged_file_is_refused_or_read_as_its_own_library_reads_it(tmp_path_factory, data):
    from safetensors import safe_open

    path = tmp_path_factory.mktemp("damage") / "m.safetensors"
    save_file({"a": numbers((3, 2), "f4"), "b": numbers((4,), "i4")}, path)
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content) - 41))  # the header; all data bytes are good data
    content[at] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        found = {
            name: s.read(0, s.shape[0] if s.shape else 1)
            for name, s in open_safetensors(path).items()
        }
    except (ValueError, ReadError):
        return
    with safe_open(path, "np") as theirs:
        assert set(theirs.keys()) == set(found)
        for name, rows in found.items():
            np.testing.assert_array_equal(bits(theirs.get_tensor(name)), bits(rows))


@pytest.mark.slow
def test_importing_sources_loads_no_storage_library():
    code = (
        "import sys, dask_ep.storage.sources, dask_ep.storage.storage; "
        "print([m for m in ('zarr', 'safetensors', 'distributed', 'cupy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- places that do not stay what they were ------------------------------------------------------


@pytest.mark.parametrize("how", ["replaced", "removed", "moved"])
@pytest.mark.parametrize("part", [slice(None), slice(1, 3)])
def test_a_memory_map_whose_file_lost_its_name_is_refused(tmp_path, how, part):
    path = tmp_path / "x.npy"
    np.save(path, np.arange(8.0))
    mapped = np.load(path, mmap_mode="r")[part]
    np.testing.assert_array_equal(open_source(mapped).read(0, 2), mapped[:2])
    if how == "replaced":
        np.save(tmp_path / "new.npy", np.ones(8))
        os.replace(tmp_path / "new.npy", path)
    elif how == "removed":
        os.unlink(path)
    else:
        os.rename(path, tmp_path / "elsewhere.npy")
    with pytest.raises(
        ReadError, match=r"x\.npy was replaced or moved since it was mapped .* again"
    ):
        open_source(mapped)
    np.testing.assert_array_equal(open_source(np.array(mapped)).read(0, 2), mapped[:2])


def test_a_memory_map_by_a_link_or_of_a_file_with_two_names(tmp_path):
    path = tmp_path / "a file\nof two lines.npy"
    np.save(path, np.arange(8.0))
    os.link(path, tmp_path / "other.npy")
    os.symlink(path, tmp_path / "link.npy")
    for name in (path, tmp_path / "other.npy", tmp_path / "link.npy"):
        mapped = np.load(name, mmap_mode="r")
        assert isinstance(open_source(mapped), Region)
    mapped = np.load(tmp_path / "other.npy", mmap_mode="r")
    os.unlink(tmp_path / "other.npy")
    with pytest.raises(ReadError, match="was replaced or moved"):
        open_source(mapped)


@pytest.mark.parametrize("options", [{}, {"compressors": None}, {"zarr_format": 2}])
@pytest.mark.parametrize("member", [False, True])
def test_a_zarr_array_opened_by_a_relative_path_is_read_from_anywhere(
    tmp_path, monkeypatch, options, member
):
    """As by a worker that was started in another directory."""
    monkeypatch.chdir(tmp_path)
    data = np.arange(8.0).reshape(4, 2)
    if member:
        group = zarr.open_group("g.zarr", mode="w", zarr_format=options.get("zarr_format", 3))
        rest = {key: value for key, value in options.items() if key != "zarr_format"}
        array = group.create_array("x", data=data, chunks=(2, 2), **rest)
    else:
        array = zarr.create_array("x.zarr", data=data, chunks=(2, 2), **options)
    source = open_source(array)
    assert os.path.isabs(source.path)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(source)).read(0, 4), data)
    assert source.find_missing() == []
