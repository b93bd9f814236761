"""Named arrays in one place, with words about them."""

from __future__ import annotations

import numpy as np
import pytest
import zarr
from safetensors.numpy import load_file

from dask_ep.errors import ReadError
from dask_ep.storage import bundle
from dask_ep.storage.sources import open_source
from tests.storage.test_storage import CountingSource, numbers


@pytest.fixture
def arrays(tmp_path):
    np.save(tmp_path / "large.npy", numbers((10, 4)))
    return {
        "small": np.arange(3, dtype=np.int16),
        "large": CountingSource(open_source(tmp_path / "large.npy")),
        "none": np.zeros((0, 2)),
    }


@pytest.mark.parametrize("kind", bundle.KINDS_OF_BUNDLES)
def test_each_row_is_read_once_and_all_are_returned(arrays, kind, tmp_path, monkeypatch):
    monkeypatch.setattr(bundle, "CHUNK_BYTES", 3 * 16)
    path = tmp_path / f"stats{kind}"
    (tmp_path / f"{path.name}.progress").mkdir()
    bundle.write_bundle(str(path), arrays, {"format": "a test"})
    assert arrays["large"].asked == [(0, 3), (3, 6), (6, 9), (9, 10)]
    bundle.check_content(str(path))
    words = bundle.read_metadata(str(path))
    assert words["format"] == "a test"
    assert len(words["content"]) == len(bundle.NOT_KNOWN)
    found = load_file(path) if kind == ".safetensors" else dict(zarr.open_group(path, mode="r"))
    assert found.keys() == arrays.keys()
    for name, array in (arrays | {"large": numbers((10, 4))}).items():
        np.testing.assert_array_equal(found[name][:], array)


@pytest.mark.parametrize("kind", bundle.KINDS_OF_BUNDLES)
def test_a_number_that_was_changed_is_found(arrays, kind, tmp_path):
    path = tmp_path / f"stats{kind}"
    (tmp_path / f"{path.name}.progress").mkdir()
    bundle.write_bundle(str(path), arrays, {})
    if kind == ".zarr":
        zarr.open_group(path, mode="r+")["small"][1] = 9
    else:
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    with pytest.raises(ReadError, match="is damaged"):
        bundle.check_content(str(path))


@pytest.mark.parametrize("length", [1 << 40, (1 << 64) - 1])
def test_a_header_that_is_longer_than_its_file_is_not_read(length, tmp_path):
    path = tmp_path / "stats.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{}")
    with pytest.raises(ReadError, match=rf"is damaged: .* header should have {length} bytes"):
        bundle.check_content(str(path))
