"""An old output goes only when the new one is complete, and never if the new one is made of it."""

import errno
import os
from functools import partial

import dask
import dask.array as da
import ml_dtypes
import numpy as np
import pytest
import zarr
from dask.array.utils import assert_eq

from dask_ep import Experts, MoELayer, Router, expert_parallel
from dask_ep.experts.quantized import float8, mxfp4
from dask_ep.storage import output, replace, resume, writers
from dask_ep.storage.output import progress_directory
from dask_ep.storage.sources import open_source
from dask_ep.storage.storage import open_tokens, store
from tests.storage.test_resume import BLOCKS, KINDS, Steps, Stopped, begin, manifest_of, run

OLD = np.full((5, 3), 7.0)


@pytest.fixture(params=KINDS)
def path(tmp_path, request):
    """Of a finished output."""
    path = str(tmp_path / f"y{request.param}")
    store(da.from_array(OLD, chunks=(2, 3)), path, scheduler="sync")
    return path


# --- the old output stays ------------------------------------------------------------------------


@pytest.mark.parametrize("stop_after", range(BLOCKS))
def test_a_run_that_fails_leaves_the_old_output(path, stop_after):
    begin(path, stop_after, overwrite=True)
    assert_eq(open_tokens(path), OLD)
    rest = Steps()
    run(path, rest, resume=True)
    assert len(rest.made) == BLOCKS - stop_after
    assert_eq(open_tokens(path), rest.expected)
    assert sorted(os.listdir(progress_directory(path)))[-2:] == ["lock", "manifest.json"]


def test_what_another_program_wrote_is_overwritten_when_the_new_one_is_complete(tmp_path):
    np.save(tmp_path / "y.npy", OLD)
    zarr.create_array(tmp_path / "y.zarr", data=OLD)
    for name in ("y.npy", "y.zarr"):
        begin(tmp_path / name, overwrite=True)
        assert_eq(open_tokens(tmp_path / name), OLD)
        run(tmp_path / name, Steps(), resume=True)
        assert_eq(open_tokens(tmp_path / name), Steps().expected)


def test_space_for_both_is_checked_before_anything_is_touched(path, monkeypatch):
    before = manifest_of(path)
    monkeypatch.setattr(resume, "free_bytes", lambda _: 5)
    y = da.zeros((5000, 3), chunks=(2000, 3))
    message = r"need 120000 bytes, \d+ are free; the old output, \d+ bytes, stays until the new one"
    with pytest.raises(OSError, match=message) as caught:
        store(y, path, overwrite=True)
    assert caught.value.errno == errno.ENOSPC
    assert_eq(open_tokens(path), OLD)
    assert manifest_of(path) == before
    assert [n for n in os.listdir(progress_directory(path)) if n.startswith("partial")] == []


def test_what_has_no_space_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(resume, "free_bytes", lambda _: 5)
    with pytest.raises(OSError, match="not enough space for the 3 missing blocks"):
        store(da.zeros((5000, 3), chunks=(2000, 3)), tmp_path / "new" / "y.zarr")
    assert os.listdir(tmp_path) == []


def test_a_full_disk_in_the_midst_leaves_the_old_output(path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writers.os, "pwrite", fail)
    with pytest.raises(OSError, match="no space left for block"):
        run(path, Steps(), overwrite=True)
    monkeypatch.undo()
    assert_eq(open_tokens(path), OLD)


@pytest.mark.parametrize("renames", [0, 1])
def test_a_run_stopped_between_the_renames_of_directories(tmp_path, monkeypatch, renames):
    """Killed there, so that nothing is cleaned up."""
    path, rename, left = str(tmp_path / "y.zarr"), os.rename, [renames]
    store(da.from_array(OLD, chunks=(2, 3)), path, scheduler="sync")

    def stop(*places):
        left[0] -= 1
        if left[0] < 0:
            raise Stopped
        rename(*places)

    monkeypatch.setattr(replace.os, "rename", stop)
    with pytest.raises(Stopped):
        run(path, Steps(), overwrite=True)
    monkeypatch.undo()
    again = Steps()
    assert os.path.exists(path) == (renames == 0)
    run(path, again, resume=True)
    assert again.made == []
    assert_eq(open_tokens(path), again.expected)
    assert not os.path.exists(os.path.join(progress_directory(path), replace.ASIDE))


def test_an_exchange_that_fails_brings_the_old_one_back(tmp_path):
    path = str(tmp_path / "y.zarr")
    store(da.from_array(OLD, chunks=(2, 3)), path, scheduler="sync")
    with pytest.raises(FileNotFoundError):
        replace.replace(str(tmp_path / "nothing"), path, progress_directory(path))
    assert_eq(open_tokens(path), OLD)


def test_what_comes_to_be_at_the_place_meanwhile_is_not_replaced(tmp_path):
    path = tmp_path / "y.npy"
    with store(Steps().array, path, compute=False) as unfinished:
        dask.compute(unfinished, scheduler="sync")
        np.save(path, OLD)
        with pytest.raises(FileExistsError, match=r"is complete in .*partial-.*move that away and"):
            unfinished.finish()
    np.testing.assert_array_equal(np.load(path), OLD)
    os.rename(path, tmp_path / "old.npy")
    again = Steps()
    run(path, again, resume=True)
    assert again.made == []
    assert_eq(open_tokens(path), again.expected)


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_of_a_link_the_target_is_written(tmp_path, kind, there):
    target, link = tmp_path / "far" / f"t{kind}", tmp_path / f"link{kind}"
    target.parent.mkdir()
    if there:
        store(da.from_array(OLD, chunks=(2, 3)), target, scheduler="sync")
    link.symlink_to(target)
    run(link, Steps(), overwrite=there)
    assert link.is_symlink()
    for path in (link, target):
        assert_eq(open_tokens(path), Steps().expected)
    assert run(link, Steps(), resume=True).done_before == set(range(BLOCKS))
    assert os.listdir(tmp_path) != []
    assert sorted(os.listdir(target.parent)) == [f"t{kind}", f"t{kind}.progress"]


# --- what is read stays --------------------------------------------------------------------------


def matrices(folder, name, array):
    """A path of an array in a file of its own."""
    np.save(folder / f"{name}.npy", array)
    return str(folder / f"{name}.npy")


def reading(place):
    """Graphs that read a .npy file of (4, 4, 4), by all ways that can be seen in a graph."""
    tokens = da.ones((6, 4), chunks=(2, 4))
    routing = da.zeros((6, 1), chunks=(2, 1), dtype=int)
    mapped = np.load(place, mmap_mode="r")
    experts = Experts.linear(place)

    def show(rows, array):
        return rows + array[0, 0, 0]

    yield "tokens", open_tokens(place)
    yield "experts", expert_parallel(tokens, routing, experts, world_size=2)
    yield (
        "a memory map among the arguments",
        tokens.map_blocks(show, array=mapped, meta=tokens._meta),
    )
    yield "a view of it", tokens.map_blocks(show, array=np.asarray(mapped)[1:], meta=tokens._meta)
    yield "in a partial", tokens.map_blocks(partial(show, array=mapped), meta=tokens._meta)
    yield "in a closure", tokens.map_blocks(lambda rows: show(rows, mapped), meta=tokens._meta)
    yield "a path", da.from_delayed(dask.delayed(np.load)(place), (4, 4, 4), float)


@pytest.mark.parametrize("way", range(7))
def test_what_the_graph_reads_is_not_replaced(tmp_path, way):
    place = matrices(tmp_path, "x", np.ones((4, 4, 4)))
    what, y = list(reading(place))[way]
    with pytest.raises(ValueError, match=r"would replace its own input .*x\.npy"):
        store(y, place, overwrite=True)
    assert os.path.exists(place), what
    assert not os.path.exists(progress_directory(place))


def test_a_layers_router_is_not_replaced(tmp_path):
    place = matrices(tmp_path, "r", np.ones((4, 4)))
    layer = MoELayer(Router(4, 1), Experts.linear(np.ones((4, 4, 4))), place)
    y = layer(da.ones((6, 4), chunks=(2, 4)))
    for inputs in ({}, {"layer": layer}):
        with pytest.raises(ValueError, match=r"would replace its own input .*r\.npy"):
            store(y, place, overwrite=True, inputs=inputs)


@pytest.mark.parametrize("name", ["values", "scales"])
def test_neither_values_nor_scales_of_quantized_experts_are_replaced(tmp_path, name):
    arrays = {"values": np.ones((4, 4, 4), ml_dtypes.float8_e4m3fn), "scales": np.ones((4, 2, 2))}
    for key, array in arrays.items():
        zarr.create_array(
            tmp_path / f"{key}.zarr", data=array.view("u1") if key == "values" else array
        )
    values = open_source(arrays["values"])
    values.path = str(tmp_path / "values.zarr")  # as if it lay there
    experts = Experts.linear(float8(values, open_source(tmp_path / "scales.zarr"), (2, 2)))
    y = expert_parallel(
        da.ones((6, 4), chunks=(2, 4)), da.zeros((6, 1), chunks=(2, 1), dtype=int), experts
    )
    for inputs in ({}, {"experts": experts}):
        with pytest.raises(ValueError, match=f"would replace its own input .*{name}"):
            store(y, tmp_path / f"{name}.zarr", overwrite=True, inputs=inputs)


def test_scales_of_mxfp4_are_not_replaced(tmp_path):
    blocks, scales = np.ones((2, 4, 1, 16), "u1"), np.full((2, 4, 1), 127, "u1")
    place = matrices(tmp_path, "scales", scales)
    experts = Experts.linear(mxfp4(open_source(blocks), open_source(place)), transposed=True)
    y = expert_parallel(
        da.ones((6, 32), chunks=(2, 32)), da.zeros((6, 1), chunks=(2, 1), dtype=int), experts
    )
    with pytest.raises(ValueError, match=r"would replace its own input .*scales\.npy"):
        store(y, place, overwrite=True)


def test_an_unfinished_output_that_is_read_is_not_removed(tmp_path):
    path = str(tmp_path / "y.zarr")
    begin(path)
    (partial_output,) = (tmp_path / "y.zarr.progress").glob("partial-*")
    y = open_tokens(partial_output, missing="fill")
    with pytest.raises(ValueError, match=r"would replace its own input .*partial-"):
        store(y, path, overwrite=True)
    assert partial_output.exists()


def test_what_is_read_where_nobody_sees_it_stays_too_if_the_run_fails(tmp_path):
    place = matrices(tmp_path, "x", OLD)
    folder = str(tmp_path)

    def read(block_info=None):
        if block_info[None]["chunk-location"][0] == 2:
            raise Stopped
        return np.load(os.path.join(folder, "x.npy"), mmap_mode="r")[:2] * 1

    y = da.map_blocks(read, chunks=((2, 2, 1), (3,)), dtype=float, meta=np.empty((0, 0)))
    with pytest.raises(Stopped):
        store(y, place, overwrite=True, scheduler="sync")
    np.testing.assert_array_equal(np.load(place), OLD)


def test_the_output_is_known_by_what_it_was_when_it_was_finished(path):
    assert output.fingerprint_output(path) == manifest_of(path)["output"]
