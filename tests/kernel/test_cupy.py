"""Does CuPy itself offer what the package takes from it, and what the tests' double stands for?

No card is needed, but CuPy is, and for some of it CUDA's libraries: pip install 'cupy-cuda12x[ctk]'
"""

from __future__ import annotations

import inspect
import re
from types import ModuleType

import ml_dtypes
import numpy as np
import pytest

from dask_ep.arrays.gemms import CUDA_TYPES
from dask_ep.arrays.namespaces import namespace
from dask_ep.kernel import cuda_kernels, reference
from tests.device_double import DeviceArray, MemoryPool
from tests.device_double import namespace as xp
from tests.device_kernels import TYPES, Cublas, RawKernel


@pytest.fixture(scope="module")
def cupy() -> ModuleType:
    return pytest.importorskip("cupy", reason="CuPy is not installed; no card is needed for this")


@pytest.fixture
def cublas(cupy: ModuleType) -> ModuleType:
    try:
        return cupy.cuda.cublas
    except ImportError as error:
        pytest.skip(f"cuBLAS is not installed: {error}")


@pytest.fixture
def nvrtc(cupy: ModuleType) -> ModuleType:
    try:
        cupy.cuda.nvrtc.getVersion()
    except RuntimeError as error:
        pytest.skip(f"NVRTC is not installed: {error}")
    return cupy.cuda.nvrtc


def parameters(function: object) -> list[str] | None:
    """Names of the arguments, from the signature or the first line of the docstring."""
    try:
        names = list(inspect.signature(function).parameters)
    except (ValueError, TypeError):
        found = re.search(r"\w\((.*?)\)", (function.__doc__ or "").split("\n")[0])
        if found is None:
            return None
        names = [part.split("=")[0].split()[-1] for part in found[1].split(", ") if part]
    return [name.lstrip("*") for name in names if name != "self"]


def test_cupys_own_arrays_are_known_for_what_they_are(cupy):
    array = cupy.ndarray.__new__(cupy.ndarray, _no_init=True)  # an array without memory
    assert namespace(array) is cupy


def test_the_double_offers_what_cupy_offers_with_its_arguments(cupy):
    for name, ours in vars(xp).items():
        if name.startswith("__") or name == "DeviceArray":
            continue
        theirs = getattr(cupy, name)
        if inspect.isfunction(ours):
            assert parameters(ours) == parameters(theirs), name
    for name in dir(DeviceArray):
        theirs = getattr(cupy.ndarray, name, None)
        if name.startswith("__r") or name in ("_a", "__module__"):
            continue
        assert hasattr(cupy.ndarray, name), name
        ours = inspect.getattr_static(DeviceArray, name)
        if inspect.isfunction(ours) and not name.startswith("__"):
            assert parameters(ours) == parameters(theirs), name
    for name, ours in vars(xp.cuda).items():
        assert hasattr(cupy.cuda, name), name
        for inner, function in vars(ours).items() if inspect.isclass(ours) else ():
            if inspect.isfunction(function) and not inner.startswith("_"):
                theirs = getattr(getattr(cupy.cuda, name), inner)
                assert parameters(function) == parameters(theirs), (name, inner)
    assert hasattr(cupy, "get_default_memory_pool")
    for name in ("set_limit", "get_limit", "free_bytes", "used_bytes", "total_bytes"):
        ours, theirs = getattr(MemoryPool, name), getattr(cupy.cuda.MemoryPool, name)
        assert parameters(ours) == parameters(theirs), name
    for name in vars(xp.cuda.runtime):
        assert hasattr(cupy.cuda.runtime, name), name
    assert hasattr(cupy.ndarray, "__array_namespace__") == hasattr(
        DeviceArray, "__array_namespace__"
    )


def test_cublas_has_the_numbers_and_arguments_of_the_double(cupy, cublas):
    for name, ours in vars(Cublas).items():
        if name.startswith("CUBLAS"):
            assert getattr(cublas, name) == ours, name
        elif inspect.isfunction(ours) and not name.startswith("_"):
            assert parameters(ours) == parameters(getattr(cublas, name)), name
    for number, dtype in TYPES.items():
        assert getattr(cupy.cuda.runtime, CUDA_TYPES[np.dtype(dtype).name]) == number


def test_a_raw_kernel_takes_what_it_is_given(cupy):
    names = ["code", "name", "options"]
    assert parameters(RawKernel.__init__)[:3] == parameters(cupy.RawKernel)[:3] == names


COMPILED = [
    {},
    {"activation": "gelu", "weighted": True, "vector": 16, "key": np.int64, "index": np.uint64},
    {
        "activation": "gelu_tanh",
        "ordered": True,
        "limited": True,
        "vector": 8,
        "index": np.int8,
        "source": np.float32,
    },
    {"activation": "relu", "vector": 4, "index": np.uint8},
    {"activation": "relu2", "vector": 2, "index": np.int32},
]
"""Each type and switch of the source once; an activation in each."""


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
def test_every_kernel_compiles_for_a_device_as_cupy_compiles_it(nvrtc, dtype, architecture):
    """With the options that CuPy adds to those of a RawKernel."""
    options = ("--fmad=false", "-ftz=true", "--device-as-default-execution-space")
    assert {switches.get("activation", "silu") for switches in COMPILED} == {*reference.ACTIVATIONS}
    in_parts = [{"parts": 3, "source": np.float32, "weighted": True}]
    for switches in COMPILED + (in_parts if dtype == ml_dtypes.bfloat16 else []):
        program = nvrtc.createProgram(
            cuda_kernels.source_of(dtype, **switches), "kernels.cu", (), ()
        )
        try:
            nvrtc.compileProgram(program, (*options, f"-arch={architecture}"))
            assert nvrtc.getProgramLog(program).strip("\0\n ") == ""
            assert len(nvrtc.getCUBIN(program)) > 1000
        finally:
            nvrtc.destroyProgram(program)
