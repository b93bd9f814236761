"""Whatever stops a run, resuming computes the missing blocks only, and gives the same bits."""

import errno
import gc
import json
import multiprocessing
import os
import runpy
import shutil
import time
from contextlib import suppress
from itertools import pairwise

import dask
import dask.array as da
import numpy as np
import pytest
from dask.array.utils import assert_eq
from distributed import Client, futures_of, wait
from hypothesis import given
from hypothesis import strategies as st

from dask_ep.errors import OutputInUse, ReadError
from dask_ep.storage import journal, output, replace, resume, writers
from dask_ep.storage.journal import read_done, record_done
from dask_ep.storage.output import progress_directory
from dask_ep.storage.sources import open_source
from dask_ep.storage.storage import open_tokens, store
from tests.cluster_processes import wait_until

KINDS = (".zarr", ".npy", ".safetensors")
BLOCKS = 5


class Stopped(Exception):
    """What stops a run in these tests."""


class Steps:
    """An array of 5 blocks that remembers which it made, and can stop before another one."""

    def __init__(self, stop_after=BLOCKS):
        self.made, self.stop_after = [], stop_after
        x = da.from_array(np.arange(18.0).reshape(9, 2), chunks=(2, 2), asarray=False)
        self.array = x.map_blocks(self.make, meta=x._meta, name="steps")
        self.expected = np.arange(18.0).reshape(9, 2) * 2

    def make(self, rows):
        if len(self.made) == self.stop_after:
            raise Stopped
        self.made.append(int(rows[0, 0]) // 4)
        return rows * 2


def run(path, steps, **options):
    return store(steps.array, path, scheduler="sync", **options)


def begin(path, stop_after=3, **options):
    """Run until so many blocks are made; give these."""
    steps = Steps(stop_after)
    with pytest.raises(Stopped):
        run(path, steps, **options)
    return steps.made


@pytest.fixture(params=KINDS)
def path(tmp_path, request):
    return str(tmp_path / f"y{request.param}")


def partials(path):
    names = os.listdir(progress_directory(path))
    return [name for name in names if name.startswith("partial-")]


def manifest_of(path):
    with open(f"{progress_directory(path)}/manifest.json") as file:
        return json.load(file)


@pytest.mark.parametrize("stop_after", range(BLOCKS))
def test_a_run_stopped_at_any_block_is_resumed_with_the_others(path, stop_after):
    made = begin(path, stop_after)
    assert len(made) == stop_after
    assert not os.path.exists(path)
    assert not manifest_of(path)["complete"]
    rest = Steps()
    with store(rest.array, path, resume=True, compute=False) as output:
        assert output.done_before == set(made)
        assert sorted({*output.done_before, *output.missing}) == list(range(BLOCKS))
        seen = []
        output.compute(on_block=seen.append, scheduler="sync")
    assert sorted(rest.made) == sorted(set(range(BLOCKS)) - set(made))
    assert [receipt.block for receipt in seen] == rest.made
    assert manifest_of(path)["complete"]
    assert_eq(open_tokens(path), rest.expected)


def test_blocks_that_are_done_cost_nothing_upstream(path):
    made = begin(path)
    with store(Steps().array, path, resume=True, compute=False) as output:
        keys = output.__dask_keys__()
        graph = dict(output.__dask_optimize__(output.__dask_graph__(), keys))
    fresh = Steps()
    with store(fresh.array, path, overwrite=True, compute=False) as output:
        whole = dict(output.__dask_optimize__(output.__dask_graph__(), output.__dask_keys__()))
    assert len(keys) == BLOCKS - len(made)
    assert len(graph) * BLOCKS == len(whole) * len(keys)


def test_resuming_a_complete_output_computes_nothing(path):
    run(path, Steps())
    again = Steps()
    output = run(path, again, resume=True)
    assert output.complete
    assert output.missing == ()
    assert output.count_done() == BLOCKS
    assert again.made == []
    assert "5 of 5 blocks done" in repr(output)
    assert_eq(open_tokens(path), again.expected)


def test_computing_a_complete_output_again_does_nothing(path):
    with store(Steps().array, path, compute=False) as output:
        assert len(output.compute(scheduler="sync")) == BLOCKS
        assert output.compute(scheduler="sync") == []


def test_resuming_nothing_begins(path):
    steps = Steps()
    run(path, steps, resume=True)
    assert sorted(steps.made) == list(range(BLOCKS))


def test_an_existing_output_is_left_alone(path):
    run(path, Steps())
    with pytest.raises(
        FileExistsError, match=r"exists; --resume .*, --overwrite .*, or write elsewhere"
    ):
        run(path, Steps())
    steps = Steps()
    run(path, steps, overwrite=True)
    assert len(steps.made) == BLOCKS
    replace.remove(path)
    begin(path, overwrite=True)
    with pytest.raises(FileExistsError, match="was begun by an earlier run; --resume"):
        run(path, Steps())
    steps = Steps()
    run(path, steps, overwrite=True)
    assert len(steps.made) == BLOCKS
    assert_eq(open_tokens(path), steps.expected)


def test_what_others_made_is_not_resumed(tmp_path):
    np.save(tmp_path / "y.npy", np.ones((9, 2)))
    with pytest.raises(FileExistsError, match="does not say what it was made of"):
        run(tmp_path / "y.npy", Steps(), resume=True)
    assert os.listdir(tmp_path) == ["y.npy"]


def test_changed_inputs_are_refused_with_what_changed(tmp_path, path):
    np.save(tmp_path / "tokens.npy", np.ones((9, 2)))
    np.save(tmp_path / "routing.npy", np.zeros((9,), int))
    inputs = {"tokens": tmp_path / "tokens.npy", "routing": tmp_path / "routing.npy"}
    settings = {"world_size": 4, "placement": [1, 2]}
    begin(path, inputs=inputs, settings=settings)
    with pytest.raises(ValueError, match=r"setting world_size was 4, is 8\. Overwrite it"):
        run(path, Steps(), resume=True, inputs=inputs, settings=settings | {"world_size": 8})
    with pytest.raises(ValueError, match=r"setting placement was .*, is absent"):
        run(path, Steps(), resume=True, inputs=inputs, settings={"world_size": 4})
    other = {"tokens": inputs["tokens"], "W": np.ones(3)}
    with pytest.raises(ValueError, match="input routing is missing now; input W is new"):
        run(path, Steps(), resume=True, inputs=other, settings=settings)
    os.utime(tmp_path / "tokens.npy", ns=(1, 10**18))
    with pytest.raises(ValueError, match=r"input tokens: mtime_ns was 20.*, is 2001-09-09 .*\."):
        run(path, Steps(), resume=True, inputs=inputs, settings=settings)
    np.save(tmp_path / "tokens.npy", np.ones((10, 2)))
    with pytest.raises(
        ValueError,
        match=r"tokens: shape was \[9, 2\], is \[10, 2\]; input tokens: size was 272, is",
    ):
        run(path, Steps(), resume=True, inputs=inputs, settings=settings)
    # Nothing of that has touched what was done.
    assert len(read_done(progress_directory(path), manifest_of(path)["run"])) == 3


@pytest.mark.parametrize("name", ["x.npy", "x.zarr"])
def test_an_input_that_is_changed_during_the_run_is_an_error(tmp_path, path, name):
    place = tmp_path / name
    store(da.ones((9, 2), chunks=(2, 2)), place)

    def read_and_touch(rows, block_info):
        if block_info[0]["chunk-location"] == (3, 0):
            file = place / "c.0.0" if place.is_dir() else place
            os.utime(file, ns=(1, 10**18))
        return rows

    y = open_tokens(place, chunks=2).map_blocks(read_and_touch, dtype="f8")
    with pytest.raises(ReadError, match=r"changed while .* input x.*: .* Overwrite it"):
        store(y, path, inputs=[place], scheduler="sync")
    assert not os.path.exists(path)
    with pytest.raises(ValueError, match="cannot be resumed, since inputs"):
        store(y, path, inputs=[place], resume=True)
    store(y, path, inputs=[place], overwrite=True, scheduler="sync")
    assert_eq(open_tokens(path), np.ones((9, 2)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda y: y.astype("f4"), "output dtype was float64, is float32"),
        (lambda y: y[:8], r"output shape was \[9, 2\], is \[8, 2\]"),
        (lambda y: y.rechunk((3, 2)), r"output rows was \[2, 2, 2, 2, 1\], is \[3, 3, 3\]"),
    ],
)
def test_another_array_is_refused(path, change, message):
    begin(path)
    with pytest.raises(ValueError, match=message):
        store(change(Steps().array), path, resume=True)


def test_of_another_array_without_inputs_is_warned(path):
    begin(path)
    with pytest.warns(UserWarning, match=r"array of another name.* inputs or settings"):
        store(Steps().array * 7, path, resume=True, scheduler="sync")
    begin(path, settings={"factor": 2}, overwrite=True)
    store(Steps().array * 1, path, resume=True, settings={"factor": 2}, scheduler="sync")


def test_another_array_is_not_mentioned_where_nothing_is_kept(path):
    begin(path, stop_after=0)
    store(Steps().array * 7, path, resume=True, scheduler="sync")
    assert_eq(open_tokens(path), Steps().expected * 7)
    replace.remove(path)
    store(Steps().array * 5, path, resume=True, scheduler="sync")
    assert_eq(open_tokens(path), Steps().expected * 5)


def test_what_a_killed_overwrite_leaves_is_removed(path, monkeypatch):
    def stop(path):
        raise Stopped

    made = begin(path)
    with monkeypatch.context() as patch:
        patch.setattr(resume, "remove", stop)
        with pytest.raises(Stopped):
            run(path, Steps(), overwrite=True)
    assert len(partials(path)) == 2
    assert run(path, Steps(), resume=True).done_before == set(made)
    assert partials(path) == []


def test_what_is_refused_at_the_start_has_overwritten_nothing(tmp_path):
    path = str(tmp_path / "y.zarr")
    run(path, Steps())
    for options in ({"compressors": "nonsense"}, {"stored_rows": 2.5}, {"stored_rows": 3}):
        with pytest.raises((ValueError, TypeError)):
            run(path, Steps(), overwrite=True, **options)
        assert_eq(open_tokens(path), Steps().expected)
        assert run(path, Steps(), resume=True).done_before == set(range(BLOCKS))
    run(path, Steps(), overwrite=True, stored_rows=np.int64(1))
    assert open_source(path).chunk_rows == 1


def test_the_same_inputs_are_the_same_wherever_they_lie(tmp_path, path):
    np.save(tmp_path / "tokens.npy", np.ones((9, 2)))
    begin(path, inputs=[tmp_path / "tokens.npy"])
    (tmp_path / "moved").mkdir()
    os.rename(tmp_path / "tokens.npy", tmp_path / "moved" / "tokens.npy")
    run(path, Steps(), resume=True, inputs=[open_source(tmp_path / "moved" / "tokens.npy")])


@given(st.data())
def test_a_torn_or_damaged_journal_loses_blocks_and_never_adds_one(tmp_path_factory, data):
    folder = str(tmp_path_factory.mktemp("journal"))
    blocks = data.draw(st.lists(st.integers(0, 99), min_size=1, max_size=9))
    for block in blocks:
        record_done(folder, "run", block)
    (name,) = os.listdir(folder)
    with open(f"{folder}/{name}", "rb") as file:
        whole = file.read()
    assert read_done(folder, "run") == set(blocks)
    assert read_done(folder, "other") == set()
    at = data.draw(st.integers(0, len(whole)))
    torn = whole[:at]
    if data.draw(st.booleans()):
        torn = whole[:at] + data.draw(st.binary(min_size=1, max_size=3)) + whole[at + 1 :]
    with open(f"{folder}/{name}", "wb") as file:
        file.write(torn)
    assert read_done(folder, "run") <= set(blocks)
    record_done(folder, "run", 100)
    assert 100 in read_done(folder, "run")


def test_a_torn_last_line_costs_one_block(path):
    made = begin(path)
    directory = progress_directory(path)
    (name,) = (name for name in os.listdir(directory) if name.startswith("done-"))
    os.truncate(f"{directory}/{name}", os.path.getsize(f"{directory}/{name}") - 4)
    rest = Steps()
    run(path, rest, resume=True)
    assert set(rest.made) == set(range(BLOCKS)) - set(made[:-1])
    assert_eq(open_tokens(path), rest.expected)


def test_lines_of_an_overwritten_run_do_not_count(path):
    begin(path)
    old = manifest_of(path)["run"]
    begin(path, stop_after=0, overwrite=True)
    for block in range(BLOCKS):
        record_done(progress_directory(path), old, block)  # a straggler of the first run
    rest = Steps()
    run(path, rest, resume=True)
    assert len(rest.made) == BLOCKS
    assert_eq(open_tokens(path), rest.expected)


def test_data_that_was_removed_is_made_again(tmp_path):
    path = str(tmp_path / "y.zarr")
    gone, short, good = begin(path)
    (partial,) = (tmp_path / "y.zarr.progress").glob("partial-*")
    (partial / f"c.{gone}.0").unlink()
    os.truncate(partial / f"c.{short}.0", 5)
    (partial / "c.2.0.17-17.writing").write_bytes(b"half")
    rest = Steps()
    run(path, rest, resume=True)
    assert set(rest.made) == set(range(BLOCKS)) - {good}
    assert_eq(open_tokens(path), rest.expected)
    assert not [name for name in os.listdir(path) if name.endswith(".writing")]


def test_an_output_whose_files_are_gone_is_made_from_the_start(path):
    begin(path)
    partial = f"{progress_directory(path)}/partial-{manifest_of(path)['run']}"
    replace.remove(partial + os.path.splitext(path)[1])
    rest = Steps()
    run(path, rest, resume=True)
    assert sorted(rest.made) == list(range(BLOCKS))
    replace.remove(path)
    again = Steps()
    run(path, again, resume=True)
    assert sorted(again.made) == list(range(BLOCKS))
    assert_eq(open_tokens(path), again.expected)


@pytest.mark.parametrize("moment", ["before the rename", "after the rename"])
def test_a_run_stopped_while_it_finishes(path, monkeypatch, moment):
    def stop(*_):
        raise Stopped

    target = (
        (output.os, "replace") if moment == "before the rename" else (journal, "write_manifest")
    )
    with store(Steps().array, path, compute=False) as unfinished:
        dask.compute(unfinished, scheduler="sync")
        monkeypatch.setattr(*target, stop)
        with pytest.raises(Stopped):
            unfinished.finish()
        monkeypatch.undo()
    assert os.path.exists(path) == (moment == "after the rename")
    rest = Steps()
    assert run(path, rest, resume=True).complete
    assert rest.made == []
    assert manifest_of(path)["complete"]
    assert_eq(open_tokens(path), rest.expected)


def test_an_unfinished_output_has_no_name(path):
    with store(Steps().array, path, compute=False) as unfinished:
        with pytest.raises(ValueError, match=r"5 of 5 blocks of .* are missing"):
            unfinished.finish()
        assert not os.path.exists(path)


def test_a_full_disk_says_where_and_how_much_and_loses_nothing(path, monkeypatch):
    pwrite, left = os.pwrite, [3]

    def fill(file, view, offset):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(file, view, offset)

    monkeypatch.setattr(writers.os, "pwrite", fill)
    message = (
        r"no space left for block \d \(rows \[.*\)\) of .*y.*: it needs \d+ bytes, \d+ are free"
    )
    with pytest.raises(OSError, match=message) as caught:
        run(path, Steps())
    assert caught.value.errno == errno.ENOSPC
    assert "free some space and resume" in str(caught.value)
    monkeypatch.undo()
    rest = Steps()
    run(path, rest, resume=True)
    assert len(rest.made) == 2
    assert_eq(open_tokens(path), rest.expected)


def test_other_failures_to_write_name_the_block_too(path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(writers.os, "pwrite", fail)
    with pytest.raises(OSError, match=r"block \d \(rows .* could not be written: .*Input/output"):
        run(path, Steps())


def test_a_disk_that_is_too_small_is_found_at_the_start(path):
    y = da.zeros((1 << 20, 1 << 20), chunks=(1 << 19, 1 << 20), dtype="u1")
    with pytest.raises(
        OSError, match=r"2 missing blocks .* need 1099511627776 bytes, \d+ are free"
    ):
        store(y, path, compute=False)
    steps = Steps()  # nothing was begun, and nothing is locked
    run(path, steps)
    assert_eq(open_tokens(path), steps.expected)


def test_a_disk_that_became_too_small_is_found_when_resuming(path, monkeypatch):
    begin(path)
    monkeypatch.setattr(resume, "free_bytes", lambda _: 5)
    with pytest.raises(OSError, match=r"2 missing blocks of .* need \d+ bytes, 5 are free"):
        run(path, Steps(), resume=True)
    monkeypatch.undo()
    run(path, Steps(), resume=True)


def test_a_line_that_does_not_fit_on_the_disk_is_no_success(path, monkeypatch):
    write = os.write
    monkeypatch.setattr(journal.os, "write", lambda file, line: write(file, line[:9]))
    with pytest.raises(OSError, match="no space left for block"):
        run(path, Steps())
    monkeypatch.undo()
    rest = Steps()
    run(path, rest, resume=True)
    assert len(rest.made) == BLOCKS


def test_two_runs_at_once_are_refused(path):
    with store(Steps().array, path, compute=False):
        for options in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(OutputInUse, match=rf"process {os.getpid()} on .* since 20"):
                run(path, Steps(), **options)
    run(path, Steps(), resume=True)


def test_a_lock_goes_with_its_owner(path):
    unfinished = store(Steps().array, path, compute=False)
    del unfinished
    run(path, Steps(), resume=True)


@pytest.fixture(scope="module")
def client():
    with Client(
        n_workers=1, threads_per_worker=1, processes=False, dashboard_address=":0"
    ) as client:
        yield client


def waiting_array(gate):
    """An array whose blocks wait for a file."""

    def wait(rows):
        while not gate.exists():
            time.sleep(0.01)
        return rows * 2

    x = da.from_array(np.arange(18.0).reshape(9, 2), chunks=(2, 2))
    return x.map_blocks(wait, meta=x._meta)


HANDED = {
    "persist": lambda client, output: output.persist(),
    "futures": lambda client, output: futures_of(client.persist(output)),
    "compute": lambda client, output: client.compute(output),
    "dask.persist": lambda client, output: dask.persist(output),
}
"""Ways to give an output's tasks to a cluster, and what is left of it in the user's hands."""


@pytest.mark.slow
@pytest.mark.parametrize("how", HANDED)
def test_a_lock_is_held_as_long_as_a_cluster_writes(tmp_path, client, how):
    path, gate = tmp_path / "y.zarr", tmp_path / "gate"
    held = HANDED[how](
        client, store(waiting_array(gate), path, compute=False, settings={"factor": 2})
    )
    gc.collect()
    for options in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(OutputInUse, match=rf"process {os.getpid()} on .* since 20"):
            run(path, Steps(), **options)
    gate.touch()
    wait(held if how == "compute" else futures_of(held))
    rest = Steps()
    run(path, rest, resume=True, settings={"factor": 2})
    assert rest.made == [], "all blocks were written by the first"
    assert_eq(open_tokens(path), rest.expected)


def overwrite_when_free(path):
    """Overwrite an output, as soon as the threads of a cluster have let go of what wrote it."""

    def is_free():
        gc.collect()
        with suppress(OutputInUse):
            return store(steps.array, path, overwrite=True, scheduler="sync").complete

    steps = Steps()
    wait_until(is_free, "the lock is gone")
    assert len(steps.made) == BLOCKS


@pytest.mark.slow
def test_a_lock_goes_when_nobody_waits_for_what_a_cluster_writes(tmp_path, client):
    path, gate = tmp_path / "y.zarr", tmp_path / "gate"
    held = store(waiting_array(gate), path, compute=False).persist()
    gc.collect()
    with pytest.raises(OutputInUse):
        run(path, Steps(), resume=True)
    del held
    gate.touch()
    overwrite_when_free(path)


@pytest.mark.slow
def test_a_lock_goes_with_the_client_that_wrote(tmp_path):
    path, gate = tmp_path / "y.zarr", tmp_path / "gate"
    y = waiting_array(gate)
    with Client(n_workers=1, processes=False, dashboard_address=":0") as client:
        held = client.persist(store(y, path, compute=False))
        gc.collect()
        gate.touch()
        wait(futures_of(held))
        held = client.persist(store(y, path, compute=False, overwrite=True))
        gc.collect()
    overwrite_when_free(path)


@pytest.mark.parametrize(
    ("holder", "free"),
    [
        ({}, False),
        ({"born": "1"}, True),  # the number went to another process
        ({"pid": 2**22 + 5}, True),  # there is no such process
        ({"host": "elsewhere"}, False),
        ({"host": "elsewhere", "pid": 2**22 + 5}, False),
    ],
)
def test_the_lock_of_a_dead_process_is_taken_over(path, holder, free):
    begin(path)
    with open(f"{progress_directory(path)}/lock", "w") as file:
        json.dump(journal._this_process() | holder, file)
    if free:
        run(path, Steps(), resume=True)
    else:
        with pytest.raises(OutputInUse, match=r"If that process is gone, remove .*progress/lock"):
            run(path, Steps(), resume=True)


@pytest.mark.parametrize("text", ["[1]", '{"pid": 1}', '{"pid'])
def test_a_damaged_lock_is_named(path, text):
    begin(path)
    with open(f"{progress_directory(path)}/lock", "w") as file:
        file.write(text)
    message = "/lock is damaged .* Check that none does, .*; then remove this one file, and run"
    with pytest.raises(OutputInUse, match=message) as error:
        run(path, Steps(), resume=True)
    os.unlink(str(error.value).split(" is damaged")[0])
    run(path, Steps(), resume=True)


def test_a_manifest_of_another_version_is_refused(path):
    begin(path)
    manifest = manifest_of(path) | {"format": 99}
    place = f"{progress_directory(path)}/manifest.json"
    with open(place, "w") as file:
        json.dump(manifest, file)
    with pytest.raises(ValueError, match="must have format 2, not 99: it was written by another"):
        run(path, Steps(), resume=True)
    for text, message in (
        ('{"format": 2}', "is not a manifest: it lacks complete, dtype, .*again with overwrite"),
        ("[]", "must have format 2, not None"),
    ):
        with open(place, "w") as file:
            file.write(text)
        with pytest.raises(ValueError, match=message):
            run(path, Steps(), resume=True)
    good = manifest | {"format": 2}
    for key, value, words in (
        ("inputs", True, "inputs is True"),
        ("rows", ["4"], r"rows is \['4'\]"),
        ("rows", [1], "its blocks have 1 rows, and its shape is"),
        ("overwrite", 1, "overwrite is 1"),
    ):
        with open(place, "w") as file:
            json.dump(good | {key: value}, file)
        with pytest.raises(ValueError, match=f"not a manifest: {words}.*; start again with overw"):
            run(path, Steps(), resume=True)
    with open(place, "w") as file:
        file.write("{")
    with pytest.raises(ValueError, match=r"is not a manifest: .*; start again with overwrite"):
        run(path, Steps(), resume=True)
    run(path, Steps(), overwrite=True)


PROGRAM = """
import time
from dask_ep.storage.storage import open_tokens, store

tokens, path, log, most = arguments
made = []

def step(rows):
    time.sleep(0.004)
    made.append(rows)
    if len(made) > most:
        time.sleep(60)
    with open(log, "a") as file:
        file.write(f"{int(rows[0, 0])}\\n")
    return rows * 2

x = open_tokens(tokens, chunks=64)
y = x.map_blocks(step, meta=x._meta)
store(y, path, inputs=[tokens], resume=True, scheduler="threads", num_workers=2)
"""


@pytest.fixture(scope="module")
def forkserver():
    """Starts processes in milliseconds, with the libraries loaded."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dask_ep.storage.storage", "zarr"])
    return context


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_kill_9_at_five_moments(tmp_path, kind, forkserver):
    rows = np.zeros((64 * 40, 512), "f4")
    rows[:, 0] = np.arange(len(rows)) // 64
    rows[:, 1:] = np.random.default_rng(0).random((len(rows), 511), "f4")
    np.save(tmp_path / "tokens.npy", rows)
    program, path, log = tmp_path / "run.py", str(tmp_path / f"y{kind}"), tmp_path / "log"
    program.write_text(PROGRAM)
    log.touch()

    def start(most):
        arguments = {"arguments": [str(tmp_path / "tokens.npy"), path, str(log), most]}
        process = forkserver.Process(target=runpy.run_path, args=(str(program), arguments))
        process.start()
        return process

    counted = []
    for kill in range(5):
        process = start(most=6)  # however slowly the kill comes, it comes in the middle
        wanted = len(log.read_text().split()) + 2 + kill % 3
        while len(log.read_text().split()) < wanted and process.is_alive():
            time.sleep(0.001)
        assert process.is_alive()
        process.kill()
        process.join()
        assert not os.path.exists(path)
        counted.append(read_done(progress_directory(path), manifest_of(path)["run"]))
    assert all(before <= after for before, after in pairwise(counted))
    assert 0 < len(counted[-1]) < 40
    process = start(most=40)
    process.join()
    assert process.exitcode == 0
    np.testing.assert_array_equal(open_tokens(path).compute(), rows * 2)
    made = list(map(int, log.read_text().split()))
    # Each block once, and once more at most for the two under way at each of the five kills.
    assert set(made) == set(range(40))
    assert len(made) <= 40 + 5 * 2
    made_last = made[-(40 - len(counted[-1])) :]
    assert set(made_last) == set(range(40)) - counted[-1]


# --- finished outputs that are not what they were ------------------------------------------------


def finished(path):
    """Give the rows of a finished output, and the size of its header where it is one file."""
    steps = Steps()
    run(path, steps)
    header = 0 if path.endswith(".zarr") else os.path.getsize(path) - steps.expected.nbytes
    return steps.expected, header


@pytest.mark.slow
@given(st.data())
def test_what_is_missing_of_a_finished_output_is_made_again(tmp_path_factory, data):
    kind = data.draw(st.sampled_from(KINDS))
    path = str(tmp_path_factory.mktemp("finished") / f"y{kind}")
    expected, header = finished(path)
    if kind == ".zarr":
        gone = data.draw(st.sets(st.integers(0, BLOCKS - 1), min_size=1))
        for block in gone:
            place = f"{path}/c.{block}.0"
            if data.draw(st.booleans()):
                os.unlink(place)
            else:
                os.truncate(place, data.draw(st.integers(0, 31)))
    else:
        size = data.draw(st.integers(0, header + expected.nbytes - 1))
        os.truncate(path, size)
        gone = {b for b in range(BLOCKS) if header + min(32 * (b + 1), 144) > size}
    rest = Steps()
    again = run(path, rest, resume=True)
    assert set(rest.made) == gone
    assert again.complete
    assert_eq(open_tokens(path), expected)
    whole = Steps()
    run(path, whole, resume=True)
    assert whole.made == []


@pytest.mark.parametrize("dtype", ["f4", "bfloat16"])
@pytest.mark.parametrize("compressors", [None, "auto"])
def test_chunks_of_zeros_are_written(tmp_path, compressors, dtype):
    rows = np.arange(12).reshape(6, 2).astype(dtype)
    rows[2:4] = 0
    array = da.from_array(rows, chunks=(2, 2))
    store(array, tmp_path / "y.zarr", compressors=compressors, scheduler="sync")
    assert_eq(open_tokens(tmp_path / "y.zarr"), rows)


@pytest.mark.parametrize("compressors", [None, "auto"])
def test_of_compressed_chunks_the_lost_and_the_damaged_are_made_again(tmp_path, compressors):
    path = str(tmp_path / "y.zarr")
    run(path, Steps(), compressors=compressors)
    os.unlink(f"{path}/c.1.0")
    os.truncate(f"{path}/c.3.0", 9)
    rest = Steps()
    run(path, rest, resume=True, compressors=compressors)
    assert sorted(rest.made) == [1, 3]
    assert_eq(open_tokens(path), rest.expected)


def test_a_run_stopped_while_it_computes_missing_blocks_is_resumed(path):
    expected, header = finished(path)
    if path.endswith(".zarr"):
        for block in (1, 3, 4):
            os.unlink(f"{path}/c.{block}.0")
        gone = {1, 3, 4}
    else:
        os.truncate(path, header + 64)
        gone = {2, 3, 4}
    made = begin(path, stop_after=1, resume=True)
    assert not os.path.exists(path), "no output that lacks rows is taken for a whole one"
    rest = Steps()
    run(path, rest, resume=True)
    assert {*made, *rest.made} == gone
    assert len(rest.made) == 2
    assert_eq(open_tokens(path), expected)


@pytest.mark.slow
@given(st.data())
def test_other_rows_in_a_finished_output_are_refused_and_kept(tmp_path_factory, data):
    kind = data.draw(st.sampled_from(KINDS))
    path = str(tmp_path_factory.mktemp("finished") / f"y{kind}")
    expected, header = finished(path)
    block = data.draw(st.integers(0, BLOCKS - 1))
    place, offset = (f"{path}/c.{block}.0", 0) if kind == ".zarr" else (path, header + 32 * block)
    with open(place, "r+b") as file:
        file.seek(offset + data.draw(st.integers(0, 15)))
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ data.draw(st.integers(1, 255))]))
    os.utime(place, ns=(1, data.draw(st.integers(1, 10**18))))
    with open(place, "rb") as file:
        changed = file.read()
    with pytest.raises(
        FileExistsError, match=rf"rows \[{2 * block}, \d\) have other values. Overwrite it"
    ):
        run(path, Steps(), resume=True)
    with open(place, "rb") as file:
        assert file.read() == changed
    run(path, Steps(), overwrite=True)
    assert_eq(open_tokens(path), expected)


@pytest.mark.parametrize("other", [np.ones((9, 2), "f4"), np.ones((8, 2)), np.ones((2, 9))])
def test_another_array_in_its_place_is_refused(path, other):
    finished(path)
    replace.remove(path)
    store(da.from_array(other), f"{path}2{os.path.splitext(path)[1]}", scheduler="sync")
    os.rename(f"{path}2{os.path.splitext(path)[1]}", path)
    with pytest.raises(FileExistsError, match="of another format, shape or dtype. Overwrite it"):
        run(path, Steps(), resume=True)
    assert_eq(open_tokens(path), other)


def test_a_file_of_another_kind_in_its_place_is_refused(path):
    finished(path)
    replace.remove(path)
    with open(path, "wb") as file:
        file.write(b"something else, and longer than any header is" * 9)
    with pytest.raises(FileExistsError, match="of another format, shape or dtype. Overwrite it"):
        run(path, Steps(), resume=True)


def test_a_copy_of_a_finished_output_is_as_good(path):
    expected, _ = finished(path)
    if os.path.isdir(path):
        shutil.copytree(path, f"{path}.copy", copy_function=shutil.copyfile)
    else:
        shutil.copyfile(path, f"{path}.copy")
    replace.remove(path)
    os.rename(f"{path}.copy", path)
    for _ in range(2):
        again = Steps()
        assert run(path, again, resume=True).complete
        assert again.made == []
    assert manifest_of(path)["output"] == output.fingerprint_output(path)
    assert_eq(open_tokens(path), expected)
