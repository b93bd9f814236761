"""Products of oneDNN are right whatever way the matrices lie, packed or not, in any thread."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dask_ep.arrays import blas, onednn, onednn_kernels
from dask_ep.arrays.onednn import ROWS, ROWS_AT_ONCE, installed_onednn
from dask_ep.arrays.onednn_kernels import BFLOAT16, FLOAT32, PRODUCT

library = installed_onednn()
pytestmark = pytest.mark.skipif(library is None, reason=f"{onednn.PACKAGE} is not installed")


def has(dtype: np.dtype) -> bool:
    """Whether this CPU multiplies such numbers faster than one after the other."""
    some = np.ones((64, 64), dtype)
    return library is not None and library.multiply(some, some, np.empty((64, 64), FLOAT32))


DTYPES = [
    pytest.param(
        dtype,
        id=dtype.name,
        marks=pytest.mark.skipif(not has(dtype), reason=f"this CPU has no kernel for {dtype}"),
    )
    for dtype in (FLOAT32, BFLOAT16)
]
dtypes = pytest.mark.parametrize("dtype", DTYPES)


def some(*shape: int, dtype: np.dtype = FLOAT32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32).astype(dtype)


@st.composite
def matrices(draw, rows: int, columns: int, dtype: np.dtype) -> np.ndarray:
    """A matrix that lies by rows or columns, alone or as a part of a larger one."""
    spare = [draw(st.integers(0, 3)) for _ in range(4)]
    by_columns = draw(st.booleans())
    m, n = (columns, rows) if by_columns else (rows, columns)
    whole = some(m + spare[0] + spare[1], n + spare[2] + spare[3], seed=draw(st.integers(0, 99)))
    part = whole.astype(dtype)[spare[0] : spare[0] + m, spare[2] : spare[2] + n]
    return part.T if by_columns else part


@dtypes
@settings(deadline=None)
@given(data=st.data())
def test_matrices_that_lie_in_any_way(dtype, data):
    m, d, f = (data.draw(st.sampled_from([1, 2, 3, 9, 40, 64, 65])) for _ in range(3))
    x, w = data.draw(matrices(m, d, dtype)), data.draw(matrices(d, f, dtype))
    whole = np.full((m, f + 2), np.nan, FLOAT32)
    out, want = whole[:, 1:-1], x.astype("f8") @ w.astype("f8")
    assert library.multiply(x, w, out)
    np.testing.assert_allclose(out, want, rtol=0, atol=1e-4)
    assert np.isnan(whole[:, [0, -1]]).all()  # nothing next to it was touched
    out = out.copy()
    times = 1 + library.multiply(x, w, out, add=True)
    np.testing.assert_allclose(out, times * want, rtol=0, atol=2e-4)


@dtypes
@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_packed_matrices(dtype, data):
    m = data.draw(st.sampled_from([1, 5, *ROWS, ROWS_AT_ONCE, 2 * ROWS_AT_ONCE + 77]))
    d, f = (64 * data.draw(st.integers(1, 4)) for _ in range(2))
    x, w = some(m, d + 3, dtype=dtype)[:, 2:-1], data.draw(matrices(d, f, dtype))
    packed, out = library.pack(w), np.full((m, f), np.nan, FLOAT32)
    assert (packed.shape, packed.dtype, packed.nbytes) == (w.shape, w.dtype, w.nbytes)
    want = x.astype("f8") @ w.astype("f8")
    assert library.multiply(x, packed, out)
    np.testing.assert_allclose(out, want, rtol=0, atol=1e-3)
    assert library.multiply(x, packed, out, add=True)
    np.testing.assert_allclose(out, 2 * want, rtol=0, atol=2e-3)
    np.testing.assert_array_equal(library.widened(packed), w.astype(FLOAT32))
    np.testing.assert_array_equal(library.widened(w), w.astype(FLOAT32))


@dtypes
def test_packed_matrices_are_multiplied_by_few_kernels(dtype):
    """A kernel takes longer to make than most products."""
    mine, w = onednn.OneDnn(library._library, onednn.openmp()), some(64, 64, dtype=dtype)
    packed = mine.pack(w)
    for m in (*range(1, 300, 3), 1000, 1001):
        x, out = some(m, 64, dtype=dtype, seed=m), np.empty((m, 64), FLOAT32)
        assert mine.multiply(x, packed, out)
        np.testing.assert_allclose(out, x.astype("f8") @ w.astype("f8"), rtol=0, atol=1e-4)
    made = [key for key in mine._idle[0].kernels if key[0] == PRODUCT]
    assert len(made) == ROWS_AT_ONCE // ROWS[0] + ROWS[0] // ROWS[1] - 1


@dtypes
def test_an_output_in_pieces_gets_the_product_of_a_packed_matrix(dtype):
    x, w = some(70, 64, dtype=dtype), some(64, 128, dtype=dtype)
    whole = np.full((70, 130), np.nan, FLOAT32)
    assert library.multiply(x, library.pack(w), whole[:, 1:-1])
    np.testing.assert_allclose(whole[:, 1:-1], x.astype("f8") @ w.astype("f8"), atol=1e-4)
    assert np.isnan(whole[:, [0, -1]]).all()


@pytest.mark.skipif(not has(BFLOAT16), reason="this CPU has no kernel for bfloat16")
@pytest.mark.parametrize("spare", [0, 1, 2, 30])
def test_all_bits_are_packed_whichever_way_they_lie(spare):
    """NaN and infinities of each kind, too; rows and columns of the matrix lie `spare` apart."""
    bits = np.random.default_rng(0).integers(0, 1 << 16, (192, 96 + spare), np.uint16)
    w = bits.view(BFLOAT16)[:, :96].T
    got, want = library.pack(w), library.pack(np.ascontiguousarray(w))
    np.testing.assert_array_equal(got._data, want._data)


@dtypes
@pytest.mark.parametrize("d", [1024, 2048, 7168])
@pytest.mark.parametrize("f", [64, 192, 256])
def test_columns_that_collide_in_cache_are_packed_the_same(dtype, d, f, monkeypatch):
    panels, copy = [], onednn.OneDnn._pack

    def noted(self, w, packed):
        panels.append(w.shape[1])
        return copy(self, w, packed)

    monkeypatch.setattr(onednn.OneDnn, "_pack", noted)
    w = some(f, d, dtype=dtype).T
    got, want = library.pack(w), library.pack(np.ascontiguousarray(w))
    np.testing.assert_array_equal(got._data, want._data)
    collides = w.strides[1] >= 4096 and f > onednn.PANEL
    assert panels == ([128, f - 128] if collides else [f]) + [f]


@pytest.mark.parametrize("rows", [1, 63, 64, 200, 1000])
@pytest.mark.parametrize(
    ("packed", "dtype"), [(BFLOAT16, FLOAT32), (BFLOAT16, BFLOAT16), (FLOAT32, FLOAT32)]
)
@pytest.mark.parametrize("alpha", [1.0, 1.702])
def test_gates_are_multiplied_as_they_come(rows, packed, dtype, alpha):
    if not has(packed):
        pytest.skip(f"this CPU has no kernel for {packed}")
    x, (gate, up) = some(rows, 128, dtype=packed), some(2, 128, 192, dtype=packed, seed=1)
    out = np.full((rows, 192), np.nan, dtype)
    assert library.gated(x, library.pack(gate), library.pack(up), out, alpha)
    a, b = (x.astype("f8") @ w.astype("f8") for w in (gate, up))
    want = a / (1 + np.exp(-alpha * a)) * b
    error = np.abs(out.astype("f8") - want).max() / np.abs(want).max()
    assert error < (1e-6 if dtype == FLOAT32 else 2**-8)


@dtypes
def test_what_would_grow_is_not_packed(dtype):
    assert library.pack(some(100, 30, dtype=dtype)) is None
    assert library.pack(some(64, 64)[:, ::2].astype(dtype)[:, ::2]) is None
    assert library.pack(np.ones((64, 64))) is None


@dtypes
def test_what_it_cannot_multiply_is_left_alone(dtype):
    x, w, out = some(4, 4, dtype=dtype), some(4, 4, dtype=dtype), np.zeros((4, 4), FLOAT32)
    wide = some(4, 8, dtype=dtype)
    for a, b, c in [
        (x.astype("f2"), w.astype("f2"), out),  # of a dtype that it has not
        (x.astype("f8"), w, out),
        (x, w, out.astype("f8")),
        (wide[:, ::2], w, out),  # with gaps in the rows
        (x[:, ::-1], w, out),
        (np.broadcast_to(x[:1], (4, 4)), w, out),  # the same row again
        (x[:0], w, out[:0]),
    ]:
        before = c.copy()
        assert not library.multiply(a, b, c)
        np.testing.assert_array_equal(c, before)


def test_a_kernel_is_used_only_for_its_kind_of_numbers():
    """Of the same shape and layout: the bytes of a number the other way round, or out of step."""
    x, w, out = some(4, 4), some(4, 4, seed=1), np.zeros((4, 4), FLOAT32)
    unaligned = np.empty(65, np.uint8)[1:].view(FLOAT32).reshape(4, 4)
    unaligned[...] = x
    others = [(x.astype(">f4"), w), (x, w.astype(">f4")), (unaligned, w)]
    for _ in range(2):
        assert library.multiply(x, w, out)
        np.testing.assert_allclose(out, x.astype("f8") @ w, rtol=0, atol=1e-5)
        out[...] = 7
        for a, b in others:
            assert not library.multiply(a, b, out)
        assert (out == 7).all()
    np.testing.assert_allclose(blas.product(others[0][0], w), x @ w, rtol=0, atol=1e-5)


@dtypes
def test_threads_share_the_library_and_get_the_same_bits(dtype):
    w = library.pack(some(256, 128, dtype=dtype))
    rows = [some(m, 256, dtype=dtype, seed=m) for m in range(1, 150, 7)]

    def product(x: np.ndarray) -> np.ndarray:
        out = np.empty((len(x), 128), FLOAT32)
        assert library.multiply(x, w, out)
        return out

    with blas.one_blas_thread(), ThreadPoolExecutor(4) as threads:
        every = [list(threads.map(product, rows)) for _ in range(3)]
        alone = list(map(product, rows))
    for products in every:
        for y, z in zip(products, alone, strict=True):
            np.testing.assert_array_equal(y, z)


def test_a_product_gets_as_many_threads_as_the_process_allows():
    """OpenMP has a number for each thread that asks."""
    x, seen = some(70, 70), []

    def ask() -> None:
        library.multiply(x, x, np.empty_like(x))
        seen.append(openmp.omp_get_max_threads())

    openmp = onednn.openmp()
    every = openmp.omp_get_max_threads()
    with blas.one_blas_thread():
        for run in (ask, lambda: _in_a_thread(ask)):
            run()
    ask()
    assert seen == [1, 1, every]


def _in_a_thread(work) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def test_kernels_that_nobody_used_lately_are_let_go(monkeypatch):
    monkeypatch.setattr(onednn_kernels, "KERNELS_KEPT", 4)
    for m in range(1, 20):
        assert library.multiply(some(m, 8), some(8, 8), np.empty((m, 8), FLOAT32))
    assert len(library._idle[-1].kernels) <= 4


def test_threads_take_what_others_have_left():
    x = some(50, 40)
    for _ in range(5):
        _in_a_thread(lambda: library.multiply(x, x.T, np.empty((50, 50), FLOAT32)))
    benches = list(library._idle)
    _in_a_thread(lambda: library.multiply(x, x.T, np.empty((50, 50), FLOAT32)))
    assert list(library._idle) == benches


def test_a_library_that_lacks_what_it_needs_is_named(monkeypatch):
    monkeypatch.setattr(onednn.ctypes, "CDLL", lambda name: (_ for _ in ()).throw(OSError("gone")))
    with pytest.warns(RuntimeWarning, match=r"cannot be loaded \(gone\).* libgomp1"):
        assert installed_onednn.__wrapped__() is None


def test_a_status_of_the_library_is_an_error():
    with pytest.raises(RuntimeError, match=r"oneDNN's engine_create failed with status \d"):
        library._new("engine", 77, 0)
