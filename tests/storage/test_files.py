"""A file gets its name when it is complete; until then the one before it stays."""

import os

import pytest

from dask_ep.storage.files import named, replacing, write_text


def test_a_file_is_replaced_when_the_new_one_is_complete(tmp_path):
    path = tmp_path / "x.json"
    write_text(path, "old")
    with replacing(path) as new:
        (tmp_path / new).write_text("n\u00e4w")
        assert path.read_text() == "old"
    assert path.read_text(encoding="utf-8") == "n\u00e4w"
    assert os.listdir(tmp_path) == ["x.json"]


def test_a_file_stays_if_its_successor_is_not_completed(tmp_path):
    path = tmp_path / "x.json"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError, match="surrogates"):
        write_text(path, "half \udcff")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["x.json"]


def test_a_link_stays_a_link_to_the_new_file(tmp_path):
    (tmp_path / "real.txt").write_text("old")
    os.symlink("real.txt", tmp_path / "link.txt")
    write_text(tmp_path / "link.txt", "new")
    assert os.readlink(tmp_path / "link.txt") == "real.txt"
    assert (tmp_path / "real.txt").read_text() == "new"


def test_a_device_is_written_to(capfd):
    write_text("/dev/stdout", "shown")
    assert capfd.readouterr().out == "shown"
    write_text(os.devnull, "lost")
    assert not os.path.isfile(os.devnull)


def test_an_error_of_a_full_disk_names_the_file(tmp_path):
    with pytest.raises(OSError, match="No space left") as caught, named("y.html"):
        write_text("/dev/full", "x" * 10**5)
    assert caught.value.filename == "y.html"
    with pytest.raises(OSError, match="words") as caught, named("y.html"):
        raise OSError("words")
    assert caught.value.filename is None
