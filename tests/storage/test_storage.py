"""What goes out comes back bit for bit, each chunk read once, one task per missing block."""

import json
import os
import threading

import dask
import dask.array as da
import ml_dtypes
import numpy as np
import pytest
import zarr
from dask.array.utils import assert_eq
from distributed import Client, as_completed, futures_of
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from dask_ep import Experts, expert_parallel
from dask_ep.errors import ReadError
from dask_ep.storage import files, writers
from dask_ep.storage.output import Receipt, progress_directory
from dask_ep.storage.sources import Source, open_source
from dask_ep.storage.storage import open_tokens, store
from dask_ep.storage.writers import chunk_rows
from dask_ep.storage.zarr_layout import create_array

KINDS = (".zarr", ".npy", ".safetensors")


def numbers(shape, dtype="f4"):
    return (np.arange(1, 1 + int(np.prod(shape))) % 200).astype(dtype).reshape(shape)


def bits(array):
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


class CountingSource(Source):
    """Another source that remembers which rows were asked of it."""

    def __init__(self, source):
        self.source, self.asked, self.lock = source, [], threading.Lock()
        self.shape, self.dtype, self.name = source.shape, source.dtype, source.name
        self.chunk_rows = source.chunk_rows

    def read(self, start, stop, out=None):
        with self.lock:
            self.asked.append((start, stop))
        return self.source.read(start, stop, out)

    def fingerprint(self):
        return self.source.fingerprint()


def refuse(*_, **__):
    raise AssertionError("building must not compute")


@pytest.fixture
def tokens(tmp_path):
    """The path of (10, 4) tokens in Zarr chunks of 3 rows."""
    path = str(tmp_path / "tokens.zarr")
    create_array(path, (10, 4), 3, np.dtype("f4"))[:] = numbers((10, 4))
    return path


def read_with_the_formats_own_library(path, dtype):
    if path.endswith(".npy"):
        return np.load(path)
    if path.endswith(".safetensors"):
        (tensor,) = load_file(path).values()
        return tensor
    if np.dtype(dtype).isbuiltin == 1:
        return zarr.open_array(path, mode="r")[:]
    return open_source(path).read(0, open_source(path).shape[0])


@st.composite
def blocked_arrays(draw):
    """Any array of numbers in any row blocks, some of them empty."""
    blocks = draw(st.lists(st.integers(0, 6), min_size=1, max_size=6))
    rest = draw(st.lists(st.integers(0, 4), max_size=2))
    kind = draw(st.sampled_from(KINDS))
    dtypes = ["f4", "f8", "f2", "i8", "u1", "?"] + ([] if kind == ".npy" else ["bfloat16"])
    array = numbers((sum(blocks), *rest), draw(st.sampled_from(dtypes)))
    return da.from_array(array, chunks=(tuple(blocks), *rest)), array, kind


@given(blocked_arrays(), st.booleans())
@settings(deadline=None)
def test_round_trip(tmp_path_factory, case, sync):
    y, array, kind = case
    path = str(tmp_path_factory.mktemp("out") / f"y{kind}")
    output = store(y, path, scheduler="sync", sync=sync)
    assert output.complete
    assert output.rows == y.chunks[0]
    theirs = read_with_the_formats_own_library(path, array.dtype)
    assert (theirs.shape, theirs.dtype) == (array.shape, array.dtype)
    np.testing.assert_array_equal(bits(theirs), bits(array))
    assert_eq(open_tokens(path), array)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=8))
def test_zarr_chunks_never_cross_blocks(blocks):
    rows = chunk_rows(blocks)
    starts = np.cumsum([0, *blocks[:-1]])
    assert rows >= 1
    assert not (starts % rows).any()
    assert (
        rows == max(blocks) or rows == 1 or any((starts % (rows * f)).any() for f in (2, 3, 5, 7))
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheduler", ["sync", "threads", "processes"])
def test_every_scheduler_writes_the_same(tmp_path, tokens, kind, scheduler):
    path = str(tmp_path / f"y{kind}")
    receipts = []
    with store(open_tokens(tokens, 3) * 2, path, compute=False) as output:
        returned = output.compute(on_block=receipts.append, scheduler=scheduler)
    assert returned == [Receipt(b, n, n * 16, path=path) for b, n in enumerate((3, 3, 3, 1))]
    assert sorted(receipts) == returned
    assert_eq(open_tokens(path), numbers((10, 4)) * 2)


@pytest.mark.slow
def test_a_cluster_gives_a_future_for_each_receipt(tmp_path, tokens):
    with Client(n_workers=2, threads_per_worker=1, dashboard_address=":0"):
        y = open_tokens(tokens, 3) * 2
        with store(y, tmp_path / "a.zarr", compute=False) as output:
            futures = futures_of(output.persist())
            done = [receipt for _, receipt in as_completed(futures, with_results=True)]
            assert [f.result().block for f in futures] == list(output.missing) == [0, 1, 2, 3]
            assert sorted(receipt.block for receipt in done) == [0, 1, 2, 3]
            assert output.count_done() == 4
            output.finish()
        seen = []
        with store(y, tmp_path / "b.npy", compute=False) as output:
            output.compute(on_block=seen.append)
        assert len(seen) == 4
        with store(y, tmp_path / "c.zarr", compute=False) as output:
            os.rename(tmp_path / "c.zarr.progress", tmp_path / "elsewhere")
            with pytest.raises(OSError, match=r"block . \(rows .* could not be written"):
                output.compute()
    for name in ("a.zarr", "b.npy"):
        assert_eq(open_tokens(tmp_path / name), numbers((10, 4)) * 2)


def test_compressed_zarr(tmp_path, tokens):
    for dtype in ("f4", "bfloat16"):
        path = str(tmp_path / f"{dtype}.zarr")
        y = open_tokens(tokens, 3).astype(dtype)
        store(y, path, compressors=zarr.codecs.ZstdCodec(), sync=True, scheduler="threads")
        assert open_source(path).array.compressors
        np.testing.assert_array_equal(open_tokens(path).compute(), numbers((10, 4), dtype))


def test_blocks_and_not_copies_of_them_are_written(tmp_path, monkeypatch):
    made, written = [], []
    pwrite = os.pwrite

    def make(block):
        made.append(numbers(block.shape))
        return made[-1]

    def spy(file, view, offset):
        written.append((np.shares_memory(np.asarray(view), made[-1]), len(view)))
        return pwrite(file, view, offset)

    monkeypatch.setattr(writers.os, "pwrite", spy)
    y = da.zeros((9, 4), chunks=(4, 4)).map_blocks(make, meta=np.empty((0, 0), "f4"))
    for kind in KINDS:
        del written[:]
        store(y, tmp_path / f"y{kind}", scheduler="sync")
        assert sorted(written) == [(True, 16), (True, 64), (True, 64)]


@pytest.mark.parametrize(
    ("kind", "compressors"), [(kind, None) for kind in KINDS] + [(".zarr", "auto")]
)
def test_data_is_on_the_disk_before_its_line_is(tmp_path, monkeypatch, kind, compressors):
    synced, fsync = [], os.fsync

    def spy(file):
        synced.append(os.readlink(f"/proc/self/fd/{file}"))
        fsync(file)

    monkeypatch.setattr(writers.os, "fsync", spy)
    y = da.from_array(numbers((9, 4)), chunks=(4, 4))
    with store(
        y, tmp_path / f"y{kind}", sync=True, compute=False, compressors=compressors
    ) as output:
        del synced[:]
        output.compute(scheduler="sync")
    lines = [i for i, path in enumerate(synced) if "/done-" in path]
    assert len(lines) == 3
    for before, line in zip([-1, *lines], lines, strict=False):
        data = synced[before + 1 : line]
        assert all("/partial-" in path for path in data)
        assert os.path.basename(data[0]).startswith("c." if kind == ".zarr" else "partial-")
        assert (kind == ".zarr") == data[-1].endswith(".zarr")  # the names in the directory
    synced_data = {synced[before + 1] for before in [-1, *lines[:-1]]}
    assert len(synced_data) == (3 if kind == ".zarr" else 1)


def test_chunks_that_were_unknown_and_computed(tmp_path):
    y = da.from_array(numbers((10, 4)), chunks=(3, 4))
    y = y[y[:, 0] > 8]
    y.compute_chunk_sizes()
    store(y, tmp_path / "y.zarr", scheduler="sync", overwrite=True)
    assert_eq(open_tokens(tmp_path / "y.zarr"), numbers((10, 4))[2:])


@pytest.mark.parametrize("kind", KINDS)
def test_short_writes_are_continued(tmp_path, monkeypatch, kind):
    pwrite = os.pwrite
    monkeypatch.setattr(writers.os, "pwrite", lambda f, view, at: pwrite(f, view[:5], at))
    store(da.from_array(numbers((9, 4)), chunks=(4, 4)), tmp_path / f"y{kind}", scheduler="sync")
    np.testing.assert_array_equal(
        read_with_the_formats_own_library(f"{tmp_path}/y{kind}", "f4"), numbers((9, 4))
    )


def test_blocks_in_any_memory_order(tmp_path):
    y = da.from_array(numbers((9, 4)), chunks=(4, 4))
    blocks = y.map_blocks(np.asfortranarray, meta=y._meta)
    store(blocks, tmp_path / "y.npy", scheduler="sync")
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), numbers((9, 4)))


@pytest.mark.parametrize("kind", KINDS)
def test_the_graph_has_one_task_for_each_missing_block_and_what_that_needs(tmp_path, kind):
    y = da.ones((10, 4), chunks=(3, 4)).map_blocks(np.negative, meta=np.empty((0, 0)))
    with dask.config.set(scheduler=refuse):
        output = store(y, tmp_path / f"y{kind}", compute=False)
        output.close()
    keys = output.__dask_keys__()
    assert keys == [(output._name, b, 0) for b in range(4)]
    graph = dict(output.__dask_graph__())
    assert sum(key[0] == output._name for key in graph) == 4
    optimized = dict(output.__dask_optimize__(output.__dask_graph__(), keys))
    assert sum(key in optimized for key in keys) == 4


def test_opening_computes_nothing_and_every_chunk_is_read_once(tokens):
    source = CountingSource(open_source(tokens))
    with dask.config.set(scheduler=refuse):
        x = open_tokens(source, chunks=3)
    assert source.asked == []
    assert len(x.__dask_graph__()) == x.npartitions == 4
    assert_eq((x + x.sum(axis=1, keepdims=True))[:0], np.empty((0, 4), "f4"))
    del source.asked[:]
    y = (x + 1).compute(scheduler="threads")
    np.testing.assert_array_equal(y, numbers((10, 4)) + 1)
    assert sorted(source.asked) == [(0, 3), (3, 6), (6, 9), (9, 10)]
    del source.asked[:]
    x[4:5].compute()
    assert source.asked == [(3, 6)]


def test_bytes_read_are_the_bytes_of_the_array(tmp_path, tokens, monkeypatch):
    counts, preadv = [], os.preadv

    def spy(file, buffers, offset):
        counts.append(preadv(file, buffers, offset))
        return counts[-1]

    monkeypatch.setattr(files.os, "preadv", spy)
    x = open_tokens(tokens, chunks=6)
    store(x, tmp_path / "y.npy", inputs={"tokens": tokens}, scheduler="sync")
    assert sorted(counts) == [16, 48, 48, 48]


def test_tasks_that_read_are_data_producers(tokens):
    tasks = dict(open_tokens(tokens).__dask_graph__()).values()
    assert all(task.data_producer for task in tasks)


def test_names_follow_from_the_data(tmp_path, tokens):
    x = open_tokens(tokens)
    assert x.name == open_tokens(tokens).name
    assert x.name.startswith("ep_read-")
    assert open_tokens(tokens, chunks=2).name != x.name
    with dask.config.set({"tokenize.ensure-deterministic": True}):
        assert open_tokens(tokens).name == x.name
    os.utime(f"{tokens}/c.1.0", ns=(5, 5))
    assert open_tokens(tokens).name != x.name


def test_chunks(tmp_path, tokens):
    assert open_tokens(tokens).chunks == ((10,), (4,))
    assert open_tokens(tokens, 4).chunks == ((4, 4, 2), (4,))
    assert open_tokens(tokens, (1, 9)).chunks == ((1, 9), (4,))
    assert open_tokens(tokens, 100).chunks == ((10,), (4,))
    assert open_tokens(np.empty((0, 3))).chunks == ((0,), (3,))
    x = open_tokens(tokens, 4)
    routing = np.arange(20).reshape(10, 2)
    assert open_tokens(routing, like=x).chunks == ((4, 4, 2), (2,))
    assert open_tokens(routing[:, 0], like=x).chunks == ((4, 4, 2),)
    wide = zarr.create_array(
        tmp_path / "wide.zarr", shape=(100, 1 << 20), chunks=(3, 1 << 20), dtype="f4"
    )
    assert open_tokens(wide, missing="fill").chunks[0] == (6,) * 16 + (4,)
    huge = zarr.create_array(
        tmp_path / "huge.zarr", shape=(100, 1 << 20), chunks=(60, 1 << 20), dtype="f4"
    )
    assert open_tokens(huge, missing="fill").chunks[0] == (60, 40)
    np.save(tmp_path / "x.npy", np.zeros((9, 1 << 20), "f2"))
    assert open_tokens(tmp_path / "x.npy").chunks[0] == (9,)


def test_chunks_in_a_number_of_numpys_own(tokens):
    assert open_tokens(tokens, chunks=np.int64(7)).chunks == open_tokens(tokens, chunks=7).chunks


def test_a_numpy_array_is_refused(tmp_path):
    with pytest.raises(TypeError, match="store writes a Dask array, but got a ndarray; wrap it"):
        store(np.ones((3, 2)), tmp_path / "y.npy")


def test_the_size_of_chunks_may_be_text(tokens):
    whole = open_tokens(tokens)
    row_bytes = whole.dtype.itemsize * whole.shape[1]
    stored = zarr.open_array(tokens).chunks[0]
    assert open_tokens(tokens, chunks="auto").chunks == whole.chunks
    assert open_tokens(tokens, chunks=f"{row_bytes * stored} B").chunks[0][0] == stored
    with pytest.raises(ValueError, match=r"chunks of tokens.zarr: invalid size: 'many' \(try"):
        open_tokens(tokens, chunks="many")


def test_chunks_that_do_not_fit(tokens):
    x = open_tokens(tokens, 4)
    with pytest.raises(ValueError, match="add up to its 10 rows, not 9"):
        open_tokens(tokens, (4, 5))
    with pytest.raises(ValueError, match="add up to its 10 rows"):
        open_tokens(tokens, (11, -1))
    with pytest.raises(ValueError, match="must have 1 row or more, not 0"):
        open_tokens(tokens, 0)
    with pytest.raises(ValueError, match="mutually exclusive"):
        open_tokens(tokens, 4, like=x)
    with pytest.raises(ValueError, match=r"routing must have as many rows as `like`, 10, not 9"):
        open_tokens(np.zeros((9, 2), int), name="routing", like=x)
    with pytest.raises(ValueError, match="is a single number and has no rows"):
        open_tokens(np.array(3.0))


def test_a_lost_token_chunk_is_an_error_when_opened_and_when_read(tokens):
    x = open_tokens(tokens, 4, name="tokens")
    os.unlink(f"{tokens}/c.2.0")
    with pytest.raises(ReadError, match=r"1 chunks are missing in .* \(c.2.0\).*missing=\"fill\""):
        open_tokens(tokens)
    for source in (tokens, open_source(tokens)):
        filled = open_tokens(source, missing="fill").compute()
        assert (filled[6:9] == 0).all()
        assert (filled[:6] == numbers((6, 4))).all()
    message = r"block . of tokens could not be read: chunk 2 \(rows \[., .\)\) of tokens: .*c\.2\.0"
    for scheduler in ("sync", "threads"):
        with pytest.raises(ReadError, match=message):
            x.compute(scheduler=scheduler)
    with pytest.raises(ReadError, match="chunks are missing"):
        open_tokens(open_source(tokens))  # opened to be filled, but tokens are not


@pytest.mark.parametrize("scheduler", ["sync", pytest.param("processes", marks=pytest.mark.slow)])
def test_a_truncated_token_chunk_names_block_rows_and_bytes(tmp_path, tokens, scheduler):
    x = open_tokens(tokens, 4)
    os.truncate(f"{tokens}/c.1.0", 40)
    with pytest.raises(
        ReadError, match=r"block 0 of tokens.zarr .* must have 48 bytes, but has 40"
    ):
        store(x[:4], tmp_path / "y.zarr", scheduler=scheduler)
    assert not os.path.exists(tmp_path / "y.zarr")


def test_what_cannot_be_written(tmp_path):
    y = da.ones((10, 4), chunks=(3, 4))
    unknown = y[y[:, 0] > 0]
    with pytest.raises(
        ValueError, match=r"must be known, but are nan: call y.compute_chunk_sizes\(\) first"
    ):
        store(unknown, tmp_path / "y.zarr")
    with pytest.raises(ValueError, match=r"chunks are \(4, 2\) .* y.rechunk\({1: -1}\)"):
        store(y.rechunk((3, 2)), tmp_path / "y.zarr")
    with pytest.raises(
        ValueError, match=r"unsupported output format: .*y.parquet; use one of .zarr, .npy"
    ):
        store(y, tmp_path / "y.parquet")
    with pytest.raises(ValueError, match="but this is a single number"):
        store(y.sum(), tmp_path / "y.zarr")
    with pytest.raises(ValueError, match=r"npy cannot store bfloat16.*Write .zarr or .safetensors"):
        store(y.astype(ml_dtypes.bfloat16), tmp_path / "y.npy")
    with pytest.raises(
        ValueError, match="safetensors cannot store complex128; it supports bool, uint8"
    ):
        store(y.astype("c16"), tmp_path / "y.safetensors")
    for kind in KINDS:
        with pytest.raises(TypeError, match=r"byte order of this machine.* >f4; .*'float32'"):
            store(y.astype(">f4"), tmp_path / f"y{kind}")
    with pytest.raises(ValueError, match="compressors need a .zarr output"):
        store(y, tmp_path / "y.npy", compressors="auto")
    with pytest.raises(ValueError, match=r"only chunks of 1 rows in common.*rechunk\({0: 100}\)"):
        store(da.ones((300, 1), chunks=((100, 99, 100, 1), 1)), tmp_path / "y.zarr")
    with pytest.raises(TypeError, match="must be serializable as JSON"):
        store(y, tmp_path / "y.zarr", settings={"a": object()})
    with pytest.raises(ValueError, match="two inputs have the name 'array'"):
        store(y, tmp_path / "y.zarr", inputs=[np.ones(2), np.zeros(2)])
    with pytest.raises(ValueError, match="mutually exclusive"):
        store(y, tmp_path / "y.zarr", resume=True, overwrite=True)
    assert os.listdir(tmp_path) == []


def test_an_output_is_refused_where_its_record_cannot_be(tmp_path):
    (tmp_path / "y.zarr.progress").write_text("a file")
    with pytest.raises(OSError, match=r"cannot be made a directory \(File exists\).*elsewhere"):
        store(da.ones((10, 4), chunks=(3, 4)), tmp_path / "y.zarr")


def test_an_address_is_not_written_to(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"not a URL \(s3://bucket/y.zarr\); write"):
        store(da.ones((2, 2)), "s3://bucket/y.zarr")
    assert not os.listdir(tmp_path)


def test_a_block_that_is_not_what_the_array_says(tmp_path):
    y = da.ones((10, 4), chunks=(3, 4))
    for wrong, found in (
        (lambda b: b[:2], r"\(2, 4\) of float64"),
        (lambda b: b.astype("f4"), "f"),
    ):
        bad = y.map_blocks(wrong, meta=y._meta, chunks=y.chunks)
        with pytest.raises(ValueError, match=rf"must be \(., 4\) of float64, .* gave .*{found}"):
            store(bad, tmp_path / "y.zarr", overwrite=True, scheduler="sync")


def test_an_output_never_replaces_its_own_input(tmp_path, tokens):
    y = open_tokens(tokens) * 2
    for inputs in ([tokens], {"tokens": open_source(tokens)}, [open_source(tokens)]):
        with pytest.raises(ValueError, match=r"would replace its own input .*tokens.zarr"):
            store(y, tokens, inputs=inputs, overwrite=True)
    np.save(tmp_path / "x.npy", np.ones(3))
    with pytest.raises(ValueError, match="would replace its own input"):
        store(y, tmp_path / "x.npy", inputs=[tmp_path / "x.npy"], overwrite=True)
    with pytest.raises(ValueError, match=r"would replace its own input .*tokens.zarr"):
        store(y, tokens, overwrite=True)
    assert_eq(open_tokens(tokens), numbers((10, 4)))


@pytest.mark.parametrize(
    "read",
    [
        da.from_zarr,
        lambda path: da.from_zarr(f"file://{path}", inline_array=True),
        lambda path: da.from_array(zarr.open_array(path, mode="r"), chunks=(3, 4)),
        lambda path: open_tokens(path, chunks=3),
    ],
)
@pytest.mark.parametrize("optimize", [False, True])
def test_an_output_never_replaces_what_its_graph_reads(tmp_path, tokens, read, optimize):
    y = read(tokens) * 2
    y = dask.optimize(y)[0] if optimize else y
    with pytest.raises(ValueError, match=r"would replace its own input .*tokens.zarr"):
        store(y, tokens, overwrite=True, scheduler="sync")
    assert_eq(open_tokens(tokens), numbers((10, 4)))
    for _ in range(2):
        store(y, tmp_path / "y.zarr", overwrite=True, scheduler="sync")
    assert_eq(open_tokens(tmp_path / "y.zarr"), numbers((10, 4)) * 2)


@pytest.mark.parametrize("world_size", [1, 2])
def test_an_output_never_replaces_its_own_experts(tmp_path, world_size):
    path = tmp_path / "w.npy"
    np.save(path, np.ones((2, 4, 4)))
    rows, routing = da.ones((6, 4), chunks=(2, 4)), da.zeros(6, chunks=2, dtype=int)
    y = expert_parallel(rows, routing, Experts.linear(path), world_size=world_size)
    with pytest.raises(ValueError, match=r"would replace its own input .*w.npy"):
        store(y + 1, path, overwrite=True)
    assert np.load(path).shape == (2, 4, 4)


def test_only_outputs_are_replaced(tmp_path):
    y = da.ones((4, 2), chunks=(2, 2))
    (tmp_path / "data.zarr").mkdir()
    (tmp_path / "data.zarr" / "precious").write_text("x")
    group = zarr.create_group(tmp_path / "group.zarr")
    group.create_array("a", shape=(3,), dtype="f4")
    for name in ("data.zarr", "group.zarr"):
        with pytest.raises(FileExistsError, match="is a directory but not a Zarr array"):
            store(y, tmp_path / name, overwrite=True)
    save_file({"a": np.ones(3), "b": np.ones(3)}, tmp_path / "model.safetensors")
    (tmp_path / "words.npy").write_text("precious")
    for name in ("model.safetensors", "words.npy"):
        with pytest.raises(FileExistsError, match=f"{name} does not hold one array, as an output"):
            store(y, tmp_path / name, overwrite=True)
        assert not os.path.exists(progress_directory(str(tmp_path / name)))
    zarr.create_array(tmp_path / "old.zarr", shape=(9,), dtype="i4")
    save_file({"w": np.ones(3)}, tmp_path / "old.safetensors")
    for name in ("old.zarr", "old.safetensors"):
        store(y, tmp_path / name, overwrite=True, scheduler="sync")
        assert_eq(open_tokens(tmp_path / name), np.ones((4, 2)))


def test_a_zarr_output_is_readable_by_anybody(tmp_path):
    y = da.from_array(numbers((10, 4)), chunks=(3, 4))
    store(y, tmp_path / "y.zarr", scheduler="sync")
    metadata = json.loads((tmp_path / "y.zarr" / "zarr.json").read_text())
    assert metadata["chunk_grid"]["configuration"]["chunk_shape"] == [3, 4]
    assert [codec["name"] for codec in metadata["codecs"]] == ["bytes"]
    assert sorted(os.listdir(tmp_path / "y.zarr")) == [
        "c.0.0",
        "c.1.0",
        "c.2.0",
        "c.3.0",
        "zarr.json",
    ]


@pytest.mark.parametrize("name", ["we::ird.zarr", "y.safetensors::y.npy"])
def test_an_output_is_not_an_array_within_a_file(tmp_path, name):
    with pytest.raises(ValueError, match="must be a whole file or directory, but '::' in"):
        store(da.ones((4, 2)), tmp_path / name)
    assert os.listdir(tmp_path) == []
