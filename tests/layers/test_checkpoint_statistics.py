"""Statistics of real checkpoints are those that hooks in transformers' own blocks gave.

`fixtures/make_statistics.py` listened to them; no torch is needed here.
"""

from __future__ import annotations

import dask
import dask.array as da
import numpy as np
import pytest

from dask_ep import collect, load_moe_layer
from tests.checkpoints import FIXTURES, LAYER, expected

HEARD = np.load(FIXTURES / "statistics.npz")
CASES = sorted({name.partition(".")[0] for name in HEARD})


def test_five_families_were_listened_to():
    assert len(CASES) == 5


@pytest.mark.parametrize("case", CASES)
def test_what_experts_see_is_what_transformers_shows_them(case):
    layer = load_moe_layer(FIXTURES / case, LAYER)
    hidden = da.from_array(expected(case)["hidden"], chunks=(2, 5, -1))
    got = collect(hidden, layer, what=["reap", "amax", "sumsq"], world_size=2)
    (got,) = dask.compute(got, scheduler="sync")
    for name in HEARD:
        if name.partition(".")[0] == case:
            want, found = HEARD[name], got[name.partition(".")[2]]
            scale = np.abs(want).max()
            assert np.abs(found - want).max() <= 5e-6 * scale, name
