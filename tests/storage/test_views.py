"""Arrays that lie in another order are read as they are wanted."""

from __future__ import annotations

import numpy as np
import pytest

from dask_ep.storage.sources import open_source
from dask_ep.storage.views import FirstRow, Regrouped, Repeated, Transposed

MATRIX = np.arange(12.0).reshape(6, 2)  # its thirds are square
VIEWS = {
    "transposed": (Transposed, MATRIX.T),
    "first row": (FirstRow, MATRIX[:1]),
    "repeated": (lambda s: Repeated(s, 3, plus=1.0), np.stack([MATRIX + 1.0] * 3)),
    "repeated, plus 2": (lambda s: Repeated(s, 3, plus=2.0), np.stack([MATRIX + 2.0] * 3)),
    "regrouped": (lambda s: Regrouped(s, 3), MATRIX.reshape(3, 2, 2)),
    "turned": (lambda s: Regrouped(s, 3, turned=True), MATRIX.reshape(3, 2, 2).swapaxes(1, 2)),
}


@pytest.mark.parametrize(("view", "want"), VIEWS.values(), ids=VIEWS)
def test_a_view_reads_rows_in_its_own_order(view, want, tmp_path):
    np.save(tmp_path / "m.npy", MATRIX)
    source = view(open_source(tmp_path / "m.npy"))
    assert (source.shape, source.dtype) == (want.shape, want.dtype)
    for start in range(len(want) + 1):
        for stop in range(start, len(want) + 1):
            out = np.empty((stop - start, *want.shape[1:]))
            assert source.read(start, stop, out) is out
            np.testing.assert_array_equal(out, want[start:stop])
            np.testing.assert_array_equal(source.read(start, stop), want[start:stop])
    with pytest.raises(ValueError, match="must be within"):
        source.read(0, len(want) + 1)


def test_views_are_distinguished(tmp_path):
    np.save(tmp_path / "m.npy", MATRIX)
    prints = [
        str(view(open_source(tmp_path / "m.npy")).fingerprint()) for view, _ in VIEWS.values()
    ]
    assert len(set(prints)) == len(prints)
