"""Checkpoints and tokens on a server of S3: the bytes of each rank, and what goes wrong."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest

from dask_ep.errors import ReadError
from dask_ep.experts.stored_experts import held_as_stored
from dask_ep.jobs.inspect import inspect_path
from dask_ep.layers.checkpoint import load_moe_layer
from dask_ep.storage import remote
from dask_ep.storage.sources import open_source
from dask_ep.storage.storage import open_tokens
from tests.checkpoints import FIXTURES, LAYER, expected
from tests.s3_server import S3, Request, s3_server, s3fs

CASE = "mixtral"
FILE = f"{CASE}/model.safetensors"


@pytest.fixture(scope="module")
def server() -> Iterator[S3]:
    with s3_server() as s3:
        s3.put_folder(FIXTURES / CASE)
        yield s3


@pytest.fixture
def s3(server, monkeypatch) -> Iterator[S3]:
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 2)
    server.requests.clear()
    yield server
    server.fault = lambda request: None


def put_rows(s3: S3, key: str, rows: np.ndarray, folder) -> str:
    np.save(folder / "x.npy", rows)
    return s3.put(key, folder / "x.npy")


def faulty(s3: S3, kind: str, key: str, times: int | None = None) -> list[Request]:
    """Let reads of parts of an object fail, the first few or all; the list has those that did."""
    failed: list[Request] = []

    def fault(request: Request) -> str | None:
        hit = request.key == key and request.method == "GET" and request.range is not None
        if not hit or (times is not None and len(failed) == times):
            return None
        failed.append(request)
        return kind

    s3.fault = fault
    return failed


@pytest.mark.slow
def test_a_layer_and_its_rows_come_from_s3_as_from_a_directory(s3, tmp_path):
    rows = expected(CASE)["hidden"].reshape(24, -1)
    address = put_rows(s3, "rows.npy", rows, tmp_path)
    y = load_moe_layer(f"s3://bucket/{CASE}", LAYER)(open_tokens(address, chunks=10))
    local = load_moe_layer(FIXTURES / CASE, LAYER)(open_tokens(tmp_path / "x.npy", chunks=10))
    got = y.compute(scheduler="threads", num_workers=2)
    assert got.tobytes() == local.compute(scheduler="sync").tobytes()
    (found,) = inspect_path(f"s3://bucket/{CASE}")
    assert dict(found.facts)["model type"] == "mixtral"


@pytest.mark.slow
def test_each_rank_reads_its_own_bytes_once_and_no_others(s3):
    layer = load_moe_layer(f"s3://bucket/{CASE}", LAYER)
    read: list[set[int]] = []
    for ids in ([0, 1, 2, 3], [4, 5, 6, 7]):
        s3.requests.clear()
        experts = layer.experts.subset(ids)
        experts.load()
        ranges = s3.ranges(FILE)
        assert len(ranges) == 1, "its matrices lie side by side"
        assert sum(stop - start for start, stop in ranges) == experts.nbytes
        read.append({byte for start, stop in ranges for byte in range(start, stop)})
        assert len(read[-1]) == experts.nbytes
    assert not read[0] & read[1]


def test_a_request_joins_neighbours_up_to_a_limit_and_passes_others_over(s3, monkeypatch):
    layer = load_moe_layer(f"s3://bucket/{CASE}", LAYER)
    want = load_moe_layer(FIXTURES / CASE, LAYER).experts.load([5, 2])
    one = layer.experts.nbytes // 8
    for limit, requests in ((64 << 20, 2), (one, 2), (one - 1, 4), (0, 6)):
        monkeypatch.setattr(remote, "JOINED_BYTES", limit)
        for experts in (layer.experts, held_as_stored(layer.experts)):
            s3.requests.clear()
            local = experts.load([5, 2])
            assert len(s3.ranges(FILE)) == requests
            assert sum(stop - start for start, stop in s3.ranges(FILE)) == 2 * one
            rows = np.ones((1, local[0].d), np.float32)
            for got, expert in zip(local, want, strict=True):
                assert got(rows).tobytes() == expert(rows).tobytes()


@pytest.mark.parametrize(
    ("case", "requests"),
    [
        ("deepseek_v3_fp8", 4),  # codes and scales, of which 10 and 11 lie between 1 and 2
        ("gpt_oss_mxfp4", 6),  # blocks, scales and biases of two stacks
        ("qwen3_moe_gptq", 2),  # words, and scales
    ],
)
def test_what_a_matrix_is_made_of_is_joined_as_well(s3, case, requests):
    s3.put_folder(FIXTURES / case)
    experts = load_moe_layer(f"s3://bucket/{case}", LAYER).experts.subset([1, 2, 3])
    s3.requests.clear()
    local = experts.load()
    ranges = s3.ranges(f"{case}/model.safetensors")
    assert sum(stop - start for start, stop in ranges) == experts.nbytes
    assert len(ranges) == requests
    rows = np.ones((1, experts.d), np.float32)
    wanted = load_moe_layer(FIXTURES / case, LAYER).experts.load([1, 2, 3])
    for got, want in zip(local, wanted, strict=True):
        assert got(rows).tobytes() == want(rows).tobytes()


def test_chunks_of_rows_are_ranges(s3, tmp_path):
    rows = np.random.default_rng(0).standard_normal((40, 8)).astype("f4")
    source = open_source(put_rows(s3, "some.npy", rows, tmp_path))
    s3.requests.clear()
    np.testing.assert_array_equal(source.read(10, 30), rows[10:30])
    assert [stop - start for start, stop in s3.ranges("some.npy")] == [20 * 8 * 4]


def test_pieces_of_a_large_array_are_requested_at_the_same_time(s3, tmp_path, monkeypatch):
    """A barrier lets requests pass in pairs only."""
    rows = np.random.default_rng(2).standard_normal((40, 8)).astype("f4")
    source = open_source(put_rows(s3, "large.npy", rows, tmp_path))
    monkeypatch.setattr(remote, "PIECE_BYTES", rows.nbytes // 8)
    monkeypatch.setattr(remote, "AT_ONCE", rows.nbytes // 4)
    s3.requests.clear()
    both = threading.Barrier(2)

    def in_pairs(request: Request) -> None:
        if request.method == "GET":
            both.wait(20)

    s3.fault = in_pairs
    np.testing.assert_array_equal(source.read(0, 40), rows)
    ranges = sorted(s3.ranges("large.npy"))
    assert [stop - start for start, stop in ranges] == [rows.nbytes // 8] * 8
    assert [stop for _, stop in ranges[:-1]] == [start for start, _ in ranges[1:]]


def test_a_refused_key_is_named(s3):
    s3.fault = lambda request: "refuse" if request.key == FILE else None
    with pytest.raises(ReadError, match=f"s3://bucket/{FILE}: PermissionError: Access Denied"):
        load_moe_layer(f"s3://bucket/{CASE}", LAYER)
    s3.fault = lambda request: "refuse" if request.key == f"{CASE}/config.json" else None
    with pytest.raises(ReadError, match=r"mixtral/config.json.*PermissionError"):
        load_moe_layer(f"s3://bucket/{CASE}", LAYER)
    s3.fault = lambda request: "refuse"
    with pytest.raises(ReadError, match=r"s3://bucket/mixtral.*PermissionError"):
        load_moe_layer(f"s3://bucket/{CASE}", LAYER)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["refuse", "wait", "cut"])
def test_what_fails_on_and_on_is_an_error_with_rows_file_and_reason(s3, tmp_path, kind):
    rows = np.ones((40, 8), "f4")
    source = open_source(put_rows(s3, "lost.npy", rows, tmp_path))
    failed = faulty(s3, kind, "lost.npy")
    reason = {"refuse": "PermissionError", "wait": "Timeout", "cut": "Payload|Incomplete|Closed"}
    with pytest.raises(ReadError, match=rf"rows \[10, 30\) of lost.npy: .*({reason[kind]})"):
        source.read(10, 30)
    assert len(failed) >= (1 if kind == "refuse" else 2), "tried again"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wait", "cut"])
def test_what_fails_once_is_tried_again_and_right(s3, tmp_path, kind):
    rows = np.random.default_rng(1).standard_normal((40, 8)).astype("f4")
    address = put_rows(s3, "flaky.npy", rows, tmp_path)
    tokens = open_tokens(address, chunks=20)
    failed = faulty(s3, kind, "flaky.npy", times=1)
    np.testing.assert_array_equal(tokens.compute(scheduler="sync"), rows)
    assert len(failed) == 1


def test_an_object_that_is_replaced_gives_no_row_of_another(s3, tmp_path):
    """Of the same size, and in the midst of a run."""
    rows = np.zeros((40, 8), "f4")
    tokens = open_tokens(put_rows(s3, "new.npy", rows, tmp_path), chunks=10)
    seen = []

    def replace_in_the_midst(request: Request) -> None:
        if request.key == "new.npy" and request.method == "GET":
            seen.append(request)
            if len(seen) == 4:  # the header is the first
                put_rows(s3, "new.npy", rows + 1, tmp_path)

    s3.fault = replace_in_the_midst
    given = []
    with pytest.raises(ReadError, match=r"rows \[\d+, \d+\) of new.npy: .* was replaced since"):
        tokens.map_blocks(lambda x: given.append(x) or x, meta=tokens).compute(scheduler="sync")
    assert 0 < len(given) < 4
    assert not any(block.any() for block in given)


def test_weights_that_are_replaced_are_named(s3, tmp_path):
    layer = load_moe_layer(f"s3://bucket/{CASE}", LAYER)
    whole = (FIXTURES / CASE / "model.safetensors").read_bytes()
    s3.put(FILE, whole[:-4] + b"\1\2\3\4")
    try:
        with pytest.raises(ReadError, match=r"model.safetensors:.*w1.* was replaced since it was"):
            layer.experts.load([0])
    finally:
        s3.put(FILE, whole)
