"""Both ways to scale numbers of few bits: by NumPy alone, and in one pass of oneDNN."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dask_ep.arrays import unpack
from dask_ep.arrays.onednn import installed_onednn


@pytest.fixture(scope="module", autouse=True, params=["NumPy", "one pass"])
def scaled_by(request) -> Iterator[str]:
    """Import this into a module of tests: each of them runs twice."""
    if request.param == "one pass" and installed_onednn() is None:
        pytest.skip("oneDNN is not installed")
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "NumPy":
            patch.setattr(unpack, "installed_onednn", lambda: None)
        patch.setattr(unpack, "SMALLEST_PASS", 1)
        yield request.param
