"""Products go to the library that is installed, for any layout of matrices, with one thread."""

from __future__ import annotations

import ctypes
import re
import threading
import tomllib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from threadpoolctl import threadpool_info

from dask_ep.arrays import blas, onednn
from dask_ep.arrays.blas import (
    Cblas,
    faster_than_numpy,
    installed_mkl,
    limit_blas_for_good,
    one_blas_thread,
    product,
)

MKL_NEEDED = pytest.mark.skipif(
    not isinstance(faster_than_numpy(), Cblas),
    reason="the package mkl is not installed, or the CPU not Intel's",
)


def numpys_openblas() -> Cblas | None:
    """The library that NumPy brought along, by the interface that is used for others."""
    for info in threadpool_info():
        if "libscipy_openblas64_" in info["filepath"]:
            names = {"float32": "scipy_cblas_sgemm64_", "float64": "scipy_cblas_dgemm64_"}
            return Cblas(ctypes.CDLL(info["filepath"]), names)
    return None


LIBRARIES = {"NumPy's OpenBLAS": numpys_openblas(), "MKL": installed_mkl()}
libraries = pytest.mark.parametrize(
    "library",
    [
        pytest.param(
            library,
            id=name,
            marks=pytest.mark.skipif(library is None, reason=f"{name} is not installed"),
        )
        for name, library in LIBRARIES.items()
    ],
)


@st.composite
def matrices(draw, rows: int, columns: int, dtype: str) -> np.ndarray:
    """A matrix that lies by rows or columns, alone or as a part of a larger one."""
    spare = [draw(st.integers(0, 3)) for _ in range(4)]
    by_columns = draw(st.booleans())
    shape = (columns, rows) if by_columns else (rows, columns)
    seed = draw(st.integers(0, 99))
    whole = np.random.default_rng(seed).standard_normal(
        (shape[0] + spare[0] + spare[1], shape[1] + spare[2] + spare[3])
    )
    part = whole.astype(dtype)[spare[0] : spare[0] + shape[0], spare[2] : spare[2] + shape[1]]
    return part.T if by_columns else part


@libraries
@given(data=st.data())
def test_matrices_that_lie_in_any_way(library, data):
    m, d, f = (data.draw(st.integers(1, 9)) for _ in range(3))
    dtype = data.draw(st.sampled_from(["float32", "float64"]))
    x, w = data.draw(matrices(m, d, dtype)), data.draw(matrices(d, f, dtype))
    whole = np.full((m, f + 2), np.nan, dtype)
    out = whole[:, 1:-1]
    assert library.multiply(x, w, out)
    np.testing.assert_allclose(out, x.astype("f8") @ w, rtol=0, atol=1e-5)
    assert np.isnan(whole[:, [0, -1]]).all()  # nothing next to it was touched


@libraries
def test_what_the_library_cannot_multiply_is_left_alone(library):
    x, w, out = np.ones((4, 4), "f4"), np.ones((4, 4), "f4"), np.zeros((4, 4), "f4")
    wide = np.ones((4, 8), "f4")
    unaligned = np.ones(65, "u1")[1:].view("f4").reshape(4, 4)
    for a, b, c in [
        (x.astype("f2"), w.astype("f2"), out.astype("f2")),  # of a dtype that it has not
        (x.astype("f8"), w, out),
        (x, w, out.astype("f8")),
        (wide[:, ::2], w, out),  # with gaps in the rows
        (x[:, ::-1], w, out),
        (np.broadcast_to(x[:1], (4, 4)), w, out),  # the same row again
        (x.astype(">f4"), w, out),
        (unaligned, w, out),
        (x, w, out.T),
    ]:
        before = c.copy()
        assert not library.multiply(a, b, c)
        np.testing.assert_array_equal(c, before)


@libraries
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", ">f4"])
def test_a_large_product_is_the_same_from_any_library(library, dtype, monkeypatch):
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal((100, 100)).astype(dtype) for _ in range(2))
    want = x.astype("f8") @ w.astype("f8")
    monkeypatch.setattr(blas, "faster_than_numpy", lambda: library)
    out = np.empty((100, 100), np.matmul(x, w).dtype)
    assert product(x, w, out) is out
    for y in (out, product(x, w)):
        assert y.dtype == out.dtype
        close = 0.1 if dtype == "float16" else 1e-4
        np.testing.assert_allclose(y.astype("f8"), want, rtol=0, atol=close)


def test_small_products_stay_with_numpy(monkeypatch):
    monkeypatch.setattr(blas, "faster_than_numpy", lambda: pytest.fail("asked for"))
    x = np.ones((8, 64), "f4")
    assert (product(x, x.T) == 64).all()
    assert product(x[:0], x.T).shape == (0, 8)


@pytest.mark.parametrize(
    ("cpuinfo", "taken"),
    [
        ("vendor_id\t: GenuineIntel\nflags\t: avx512f", "MKL"),
        ("vendor_id\t: GenuineIntel\nflags\t: avx2", "MKL"),
        ("vendor_id\t: AuthenticAMD\nflags\t: avx2 avx512f", "oneDNN"),
        ("vendor_id\t: AuthenticAMD\nflags\t: avx2", None),
        ("", None),
    ],
)
def test_the_library_is_chosen_by_the_cpu(cpuinfo, taken, monkeypatch):
    monkeypatch.setattr(blas, "installed_mkl", lambda: "MKL")
    monkeypatch.setattr(blas, "installed_onednn", lambda: "oneDNN")
    monkeypatch.setattr(blas, "_cpuinfo", lambda: cpuinfo)
    assert faster_than_numpy.__wrapped__() == taken


@MKL_NEEDED
def test_experts_are_multiplied_by_mkl(monkeypatch):
    from dask_ep import Experts, expert_parallel_dispatch

    calls = []
    monkeypatch.setattr(
        Cblas,
        "multiply",
        lambda self, *which, do=Cblas.multiply: calls.append(do(self, *which)) or calls[-1],
    )
    rng = np.random.default_rng(0)
    experts = Experts.gated(*(rng.standard_normal((2, 128, 128), "f4") for _ in range(3)))
    tokens = rng.standard_normal((200, 128), "f4")
    expert_parallel_dispatch(tokens, np.arange(200) % 2, experts.load(), 0, 1)
    assert calls == [True] * 6


@pytest.mark.skipif(installed_mkl() is None, reason="the package mkl is not installed")
def test_mkl_gets_one_thread_in_all_threads():
    """threadpoolctl limits the thread that asks alone."""

    def numbers() -> set[int]:
        seen: set[int] = set()
        ask = threading.Thread(
            target=lambda: seen.update(lib.MKL_Get_Max_Threads() for lib in blas._loaded_mkls())
        )
        ask.start()
        ask.join()
        return seen

    before = numbers()
    with one_blas_thread():
        assert numbers() == {1}
    assert numbers() == before
    limit_blas_for_good()
    assert numbers() == {1}
    for library in blas._loaded_mkls():
        library.MKL_Set_Num_Threads(max(before))


INTEL, AMD = "GenuineIntel", "AuthenticAMD"


@pytest.mark.parametrize(
    ("cpuinfo", "installed", "said"),
    [
        (f"{INTEL} avx512f", (), r"MKL multiplies float32 about 10 % .* pip install mkl$"),
        (f"{INTEL} avx512f amx_bf16", (), r", and oneDNN multiplies bfloat16 .* mkl onednn-cpu-g"),
        (
            f"{INTEL} avx512f amx_bf16",
            ("mkl",),
            r"CPU oneDNN multiplies bfloat16 .* install onednn",
        ),
        (f"{INTEL} avx512f amx_bf16", ("mkl", "onednn"), None),
        (f"{INTEL} avx2", (), None),
        (f"{AMD} avx512f", (), r"oneDNN multiplies float32 about 10 % faster than OpenBLAS; inst"),
        (
            f"{AMD} avx512f avx512_bf16",
            (),
            r"float32 .* and bfloat16 .* install onednn-cpu-gomp$",
        ),
        (f"{AMD} avx512f avx512_bf16", ("onednn",), None),
        (f"{AMD} avx2", (), None),
    ],
)
def test_what_would_multiply_faster_is_named(cpuinfo, installed, said, monkeypatch):
    monkeypatch.setattr(blas, "installed_mkl", lambda: "mkl" in installed or None)
    monkeypatch.setattr(blas, "installed_onednn", lambda: "onednn" in installed or None)
    monkeypatch.setattr(blas, "_cpuinfo", lambda: cpuinfo)
    monkeypatch.setattr(blas, "numpys_blas", lambda: "OpenBLAS")
    hint = blas.faster_blas()
    assert (hint is None) if said is None else re.search(said, hint)


def test_there_is_an_extra_for_each_library_that_hints_name():
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    extras = tomllib.loads(text)["project"]["optional-dependencies"]
    assert extras["mkl"][0].startswith("mkl>=")
    assert extras["onednn"][0].startswith(onednn.PACKAGE)


def test_a_product_that_has_no_value_does_not_warn():
    """Other libraries do not warn either; a run reports rows that hold NaN."""
    x = np.array([[np.inf, -np.inf]], "f4")
    assert np.isnan(blas.product(x, np.ones((2, 1), "f4"))).all()
