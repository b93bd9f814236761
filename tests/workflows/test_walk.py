"""The parts of a walk that need no torch: documents, options, record and progress."""

from __future__ import annotations

import importlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from walk.documents import (
    AT_ONCE,
    MAX_PADDING,
    Documents,
    batch_documents,
    chunk_documents,
    hidden_shape,
    next_tokens,
    read_documents,
    read_hidden,
)
from walk.options import Options
from walk.progress import Progress
from walk.record import Record, keep_documents

ROOT = Path(__file__).parents[2]

LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=40)


def split(line):
    return [int(word) for word in line.split()]


def tokenize(lines):
    return [split(line) for line in lines]


# --- documents -------------------------------------------------------------------------------


def test_each_line_of_a_text_is_a_document_and_long_ones_are_cut(tmp_path):
    (tmp_path / "text.txt").write_text("1 2 3 4 5\n\n6\n7 8\n")
    read = read_documents(str(tmp_path / "text.txt"), 2, tokenize)
    np.testing.assert_array_equal(read.ids, np.arange(1, 9))
    np.testing.assert_array_equal(read.lengths, [2, 2, 1, 1, 2])


def test_ids_end_where_the_padding_begins(tmp_path):
    np.save(tmp_path / "ids.npy", np.array([[5, 6, -1], [0, 1, 2]]))
    read = read_documents(str(tmp_path / "ids.npy"), 8, tokenize)
    np.testing.assert_array_equal(read.ids, [5, 6, 0, 1, 2])
    np.testing.assert_array_equal(read.lengths, [2, 3])


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([[5, -1, 6]]), "sequence 0 .* at the end, but has a negative id at position 1"),
        (np.zeros(3, int), r"\(sequences, length\) integers, but has shape \(3,\)"),
        (np.zeros((2, 3)), "integers, but has shape .* and dtype float64"),
        (np.full((2, 3), -1), "must hold at least one token"),
    ],
)
def test_arrays_that_hold_no_token_ids_are_refused(array, message, tmp_path):
    np.save(tmp_path / "ids.npy", array)
    with pytest.raises(ValueError, match=message):
        read_documents(str(tmp_path / "ids.npy"), 8, tokenize)


def test_files_of_vllm_are_documents_with_hidden_states(tmp_path):
    hidden = np.random.default_rng(0).standard_normal((3, 2, 4), dtype=np.float32)
    save_file({"token_ids": np.arange(3), "hidden_states": hidden}, tmp_path / "a.safetensors")
    save_file({"token_ids": np.arange(1), "hidden_states": hidden[:1]}, tmp_path / "b.safetensors")
    read = read_documents(str(tmp_path), 8, tokenize)
    np.testing.assert_array_equal(read.lengths, [3, 1])
    with pytest.raises(ValueError, match="the longest of .* has 3 tokens: set --length to at"):
        read_documents(str(tmp_path), 2, tokenize)
    path = str(tmp_path / "a.safetensors")
    assert hidden_shape(path, 1) == (3, 4)
    np.testing.assert_array_equal(read_hidden(path, 1, np.dtype("f4")), hidden[:, 1])
    with pytest.raises(ValueError, match=r"layer number 2, .* but has shape \(3, 2, 4\)"):
        hidden_shape(path, 2)
    save_file({"token_ids": np.arange(2), "hidden_states": hidden}, tmp_path / "d.safetensors")
    with pytest.raises(ValueError, match="has 2 token_ids and hidden states of 3 tokens"):
        hidden_shape(str(tmp_path / "d.safetensors"), 1)
    (tmp_path / "d.safetensors").unlink()
    save_file({"x": np.arange(3)}, tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match=r"c.safetensors must hold token_ids .* but has x"):
        read_documents(str(tmp_path), 8, tokenize)


def test_a_directory_without_requests_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must hold a .safetensors file for each request"):
        read_documents(str(tmp_path), 8, tokenize)


@given(LENGTHS, st.integers(1, 64))
def test_chunks_hold_whole_documents_in_order_and_are_few(lengths, rows):
    counts = chunk_documents(lengths, rows)
    assert sum(counts) == len(lengths)
    first, fewest, filled = 0, 0, rows
    for count in counts:
        assert sum(lengths[first : first + count]) <= rows or count == 1
        first += count
    for length in lengths:
        fits = filled + length <= rows
        fewest, filled = (fewest, filled + length) if fits else (fewest + 1, length)
    assert fewest <= len(counts) <= -(-fewest // AT_ONCE) * AT_ONCE


@given(st.lists(st.integers(1, 8), min_size=40, max_size=80))
def test_chunks_are_about_equal(lengths):
    counts = chunk_documents(lengths, 64)
    ends = np.cumsum(counts)
    sums = [sum(lengths[end - count : end]) for count, end in zip(counts, ends, strict=True)]
    assert max(sums) <= sum(lengths) / len(counts) + 8


@given(LENGTHS, st.integers(1, 128))
def test_batches_hold_each_document_once_and_little_padding(lengths, tokens):
    batches = batch_documents(lengths, tokens)
    assert sorted(np.concatenate(batches)) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[d] for d in batch)
        assert len(batch) * longest <= tokens or len(batch) == 1
        real = sum(lengths[d] for d in batch)
        assert real >= (1 - MAX_PADDING) * len(batch) * longest


def test_nothing_follows_the_last_token_of_a_document():
    documents = Documents(np.array([4, 5, 6, 7, 8]), np.array([3, 2]))
    np.testing.assert_array_equal(next_tokens(documents), [5, 6, -1, 8, -1])


# --- options ---------------------------------------------------------------------------------


def options(**changes):
    return Options(**{"model": "model", "text": "text", "out": "out"} | changes)


@pytest.mark.parametrize(
    ("asked", "dtype", "precision"),
    [
        ("auto", "torch.bfloat16", "bfloat16"),
        ("auto", "torch.float16", "float32"),
        ("auto", "torch.float32", "float32"),
        ("float32", "torch.bfloat16", "float32"),
        ("bfloat16", "torch.float32", "bfloat16"),
    ],
)
def test_experts_are_rounded_as_the_rest_of_the_block_unless_asked_otherwise(
    asked, dtype, precision
):
    assert options(precision=asked).precision_for(dtype) == precision


def test_a_walk_ends_after_the_last_block_that_was_asked_for():
    assert options().blocks([6]) == range(6)
    assert options(layers=range(1, 3)).blocks([6]) == range(3)
    assert options(layers=range(3, 4), start=2).blocks([6]) == range(2, 4)


@pytest.mark.parametrize(
    ("changes", "counts", "message"),
    [
        ({"layers": range(4, 7)}, [6], r"must be in \[0, 6\), .* but are 4 to 6; change --layers"),
        ({"layers": range(1, 3), "start": 2}, [6], r"\[2, 6\).* --start on, but are 1 to 2"),
        ({"start": 6}, [6], r"\[6, 6\)"),
        ({"compare": "other"}, [6, 5], "they have 6 and 5"),
    ],
)
def test_blocks_that_a_model_lacks_are_refused(changes, counts, message):
    with pytest.raises(ValueError, match=message):
        options(**changes).blocks(counts)


@pytest.fixture
def command(monkeypatch, tmp_path):
    (tmp_path / "text.txt").write_text("some text\n")
    main = importlib.import_module("walk_model").main

    def invoke(*arguments):
        return CliRunner().invoke(main, [str(tmp_path), str(tmp_path / "text.txt"), *arguments])

    return invoke


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing option '--out'"),
        (["--out", "x", "--save", "hidden,colours"], "must be some of hidden, routing, moe_input"),
        (["--out", "x", "--layers", "3-1"], "invalid blocks: '3-1' (try 3, or 0-23)"),
        (["--out", "x", "--memory-limit", "much"], "invalid size: 'much'"),
        (["--out", "x", "--processes", "2", "--scheduler", "y"], "has no effect on a cluster"),
        (["--out", "x", "--threads", "2", "--processes", "2"], "are mutually exclusive"),
        (["--out", "x", "--gpu"], "a walk computes on the host: run without --gpu"),
        (["--out", "x", "--length", "0"], "--length"),
    ],
)
def test_wrong_arguments_are_refused_before_torch_is_needed(command, arguments, message):
    result = command(*arguments)
    assert result.exit_code == 2
    assert message in result.output


HELP = """
import runpy, sys
sys.path.insert(0, "workflows")
sys.argv = ["walk_model.py", "--help"]
try:
    runpy.run_path("workflows/walk_model.py", run_name="__main__")
except SystemExit:
    print(sorted({"torch", "transformers"} & sys.modules.keys()))
"""


@pytest.mark.slow
def test_help_needs_no_torch():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", HELP],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=True,
    )
    assert "--compare MODEL2" in done.stdout
    assert done.stdout.endswith("[]\n")


# --- the record ------------------------------------------------------------------------------


def test_a_record_is_continued_with_what_it_was_started_with(tmp_path):
    out = str(tmp_path / "acts")
    first = Record(out, {"models": ["a"], "chunk_rows": 8}, resume=False)
    first.keep("moe_memory", 100)
    first.add(10, {"bytes_read": 7})
    first.add(9, {"bytes_read": 5})
    first.add(9, {"loss": 1.0}, "compare")
    again = Record(out, {"models": ["a"], "chunk_rows": 8}, resume=True)
    again.keep("moe_memory", 50)
    assert again.begun["moe_memory"] == 100
    assert [took["block"] for took in again.blocks] == [9, 10]
    assert again.has(9, "compare")
    assert not again.has(10, "compare")
    assert again.blocks[0]["bytes_read"] == 5


def test_a_record_of_something_else_is_refused(tmp_path):
    out = str(tmp_path / "acts")
    Record(out, {"models": ["a"], "chunk_rows": 8}, resume=False)
    with pytest.raises(
        ValueError, match=r"acts must be resumed with .* but chunk_rows was 8 and is 9"
    ):
        Record(out, {"models": ["a"], "chunk_rows": 9}, resume=True)
    with pytest.raises(FileExistsError, match="acts exists; use --resume to continue it"):
        Record(out, {"models": ["a"], "chunk_rows": 8}, resume=False)


def test_a_directory_in_which_no_walk_was_started_is_not_resumed(tmp_path):
    (tmp_path / "block_000.zarr").mkdir()
    with pytest.raises(FileExistsError, match=r"exists; it has no walk.json to resume from, or"):
        Record(str(tmp_path), {"models": ["a"]}, resume=True)


def test_a_walk_with_other_token_chunks_is_not_the_same(tmp_path, monkeypatch):
    options = Options(model=str(tmp_path), text="", out="", chunk_rows=8)
    documents = Documents(np.arange(3), np.ones(3, int))
    before = options.decisive(documents)
    monkeypatch.setattr("walk.options.chunk_documents", lambda lengths, rows: [1, 2])
    after = options.decisive(documents)
    assert [name for name in before if before[name] != after[name]] == ["token_chunks"]


def test_a_record_may_begin_in_an_empty_directory(tmp_path):
    """Or in that of a walk that was stopped while it wrote its record."""
    (tmp_path / "walk.json.new").write_text('{"begun"')
    Record(str(tmp_path), {"models": ["a"]}, resume=True)
    assert json.loads((tmp_path / "walk.json").read_text())["begun"] == {"models": ["a"]}


def test_documents_are_written_once(tmp_path):
    documents = Documents(np.array([4, 5, 6]), np.array([3]))
    keep_documents(str(tmp_path), documents)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert before.keys() == {"tokens.npy", "lengths.npy", "targets.npy"}
    keep_documents(str(tmp_path), documents)
    assert before == {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}


# --- progress --------------------------------------------------------------------------------


def test_progress_shows_block_chunk_and_time_left():
    file = io.StringIO()
    progress = Progress(4, file)
    progress.begin(0)
    progress.started -= 60
    progress.tell("attention", 0.5)
    assert "block 0, attention 50%; 4% of all, 1:00, 25:" in file.getvalue()
    took = {
        "attention_seconds": 6.0,
        "experts_seconds": 3.0,
        "sum_seconds": 1.0,
        "bytes_read": 2 * 10**9,
    }
    progress.end(took)
    progress.begin(1)
    progress.tell("experts", 0.5)
    assert progress.blocks_done == pytest.approx(1 + 0.6 + 0.15)
    assert str(progress).endswith("2.00 GB read")


def test_time_left_is_estimated_from_what_this_run_has_done():
    progress = Progress(4, io.StringIO())
    progress.skip()
    progress.skip()
    progress.started -= 60
    progress.end({"bytes_read": 0})
    assert "75% of all, 1:00, 1:00 left" in str(progress)
