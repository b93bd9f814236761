"""Jobs run with one worker per GPU: each sees its own device, and chunks stay there in between.

No card is needed: the workers are real processes, and their device is `device_double`, put in the
place of CuPy where the package looks its name up. Only `find_devices` is asked of nobody.
"""

from __future__ import annotations

import gc
import math
import os
import re
import sys
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import dask
import dask.array as da
import ml_dtypes
import numpy as np
import pytest
from dask.utils import Dispatch
from distributed import Client
from distributed.protocol import deserialize, serialize
from safetensors.numpy import save_file

from dask_ep import Experts, Router, collect, expert_parallel, open_tokens, store
from dask_ep.arrays import device
from dask_ep.arrays.device import Device, NoDeviceError
from dask_ep.arrays.device_streams import Lanes, download, pinned_empty, upload
from dask_ep.cli import main, run_command
from dask_ep.cluster import device_serialize, gpus
from dask_ep.cluster.gpus import Gpus, OnGpu, choose_protocol, start_gpus
from dask_ep.errors import DeviceMemoryError, DoesNotFit
from dask_ep.experts.stored_experts import held_as_stored
from dask_ep.graph.chunk import ChunkPlace, Exchange, combine, cut, pack
from dask_ep.jobs import backends
from dask_ep.jobs.backends import Cluster, Threads, lay_out
from dask_ep.jobs.build import ComputedBy, build, open_inputs
from dask_ep.jobs.compare import compare_checkpoints
from dask_ep.jobs.decide import decide
from dask_ep.jobs.difference import differences, join
from dask_ep.jobs.example import Example, write_example
from dask_ep.jobs.job import Job, load_job
from dask_ep.jobs.run import run_job
from dask_ep.jobs.save_routing import path_of_weights
from dask_ep.jobs.verify import ROUNDED_TOLERANCE, TF32_TOLERANCE, TOLERANCES, verify_job
from dask_ep.kernel import device_kernel
from dask_ep.kernel.pack import Packing
from dask_ep.laws.costs import FEWEST_ROWS
from dask_ep.laws.device_memory import DEVICE_PROCESS_BYTES
from dask_ep.laws.memory_law import Layout, need
from dask_ep.layers.lazy_routing import _route_chunk
from dask_ep.layers.row_steps import Rest, finish
from dask_ep.storage.sources import open_source
from tests.checkpoints import FIXTURES, LAYER, expected
from tests.device_double import DeviceArray, MemoryPool, on_device, watch
from tests.device_double import namespace as xp

ROOT = Path(__file__).parents[2]


def here(capsys, *arguments: object) -> tuple[int, str, str]:
    """Run the command in this process: exit code, stdout and stderr."""
    with pytest.raises(SystemExit) as end:
        main.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return end.value.code or 0, captured.out, captured.err


@pytest.fixture
def small_job(tmp_path) -> Path:
    sizes = {"rows": 700, "d": 16, "num_experts": 6, "chunk_rows": 100, "kind": "gated"}
    return write_example(tmp_path / "small", Example(**sizes))


@pytest.fixture
def two_doubles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two devices that this machine does not have; workers find `device_double` by its name."""
    monkeypatch.syspath_prepend(ROOT / "tests")
    monkeypatch.setattr(device, "NAMESPACE", "device_double")
    devices = [Device(index, "double", 8 << 30) for index in range(2)]
    monkeypatch.setattr(device, "find_devices", lambda: devices)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-2f")


# --- no GPU is a clear error -------------------------------------------------------------------


def test_without_cupy_it_says_what_to_install(monkeypatch, capsys, small_job):
    monkeypatch.setitem(sys.modules, "cupy", None)
    code, _, err = here(capsys, "run", small_job, "--gpu")
    assert code == 2
    assert "pip install 'cupy-cuda12x" in err
    assert not Path(load_job(small_job).out).exists()
    assert here(capsys, "run", small_job, "--threads", 1)[0] == 0, "everything else works"


@pytest.mark.parametrize("count", ["none", "error"])
def test_without_a_device_it_says_where_to_look(monkeypatch, capsys, small_job, count):
    class CUDARuntimeError(RuntimeError):
        """As CuPy's."""

    def get_device_count() -> int:
        if count == "error":
            raise CUDARuntimeError("cudaErrorInsufficientDriver")
        return 0

    runtime = type("runtime", (), {})
    runtime.getDeviceCount, runtime.CUDARuntimeError = get_device_count, CUDARuntimeError
    cupy = type(sys)("cupy")
    cupy.cuda = type("cuda", (), {"runtime": runtime})
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    code, _, err = here(capsys, "run", small_job, "--gpu")
    assert code == 2
    assert "CuPy finds no GPU" in err
    assert "CUDA_VISIBLE_DEVICES" in err


@pytest.mark.parametrize("missing", ["cublas", "nvrtc"])
def test_without_cudas_libraries_it_says_what_to_install(monkeypatch, capsys, small_job, missing):
    def not_found() -> None:
        raise RuntimeError("no libnvrtc.so.12")

    cuda = type(sys)("cupy.cuda")
    cuda.runtime = SimpleNamespace(getDeviceCount=lambda: 1, CUDARuntimeError=OSError)
    cuda.nvrtc = SimpleNamespace(getVersion=not_found)
    if missing == "nvrtc":
        cuda.cublas = object()
    else:
        cuda.__getattr__ = lambda name: exec("raise ImportError('no libcublas.so.12')")
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=cuda))
    code, _, err = here(capsys, "run", small_job, "--gpu")
    assert code == 2
    assert f"no lib{missing}.so.12" in err
    assert "cupy-cuda12x[ctk]" in err


def test_a_device_that_shares_the_memory_of_the_host_is_recognised(monkeypatch):
    found = {"name": b"chip", "totalGlobalMem": 1 << 30}
    cupy = type(sys)("cupy")
    cupy.cuda = type("cuda", (), {"cublas": None, "nvrtc": SimpleNamespace(getVersion=int)})
    cupy.cuda.runtime = SimpleNamespace(
        getDeviceCount=lambda: 2,
        getDeviceProperties=lambda index: found | {"integrated": index},
        CUDARuntimeError=OSError,
    )
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    assert [one.of_host for one in device.find_devices()] == [False, True]


def test_options_that_say_nothing_are_refused(capsys, small_job):
    for options, words in [
        (["--protocol", "tcp"], "--protocol needs --gpu"),
        (["--tf32", "--threads", 2], "--tf32 needs --gpu"),
        (["--gpu", "--processes", 2], "--processes has no effect with --gpu"),
        (["--device-memory-limit", "1GB"], "--device-memory-limit needs --gpu"),
        (
            ["--gpu", "--scheduler", "tcp://x:1", "--tf32"],
            "has no effect on a cluster: set it where the workers start",
        ),
    ]:
        code, _, err = here(capsys, "run", small_job, *options)
        assert (code, words in err) == (2, True), err


def test_options_say_where_and_how(monkeypatch, capsys, small_job):
    wheres = []

    def run_job(job: object, where: object, **options: object) -> None:
        wheres.append(where)
        raise SystemExit(0)  # nothing is run, so there is nothing to tell

    monkeypatch.setattr(run_command, "run_job", run_job)
    sizes = ("--device-memory-limit", "2GiB", "--memory-limit", "1GiB", "--dashboard", 8787)
    assert here(capsys, "run", small_job, "--gpu")[0] == 0
    assert here(capsys, "run", small_job, "--gpu", "--protocol", "ucx", "--tf32", *sizes)[0] == 0
    assert here(capsys, "run", small_job, "--gpu", "--scheduler", "tcp://x:1")[0] == 0
    assert wheres == [
        Gpus(),
        Gpus(2 << 30, "ucx", tf32=True, memory_limit=1 << 30, dashboard_port=8787),
        Cluster("tcp://x:1", gpus=True),
    ]


def test_the_protocol_is_the_best_that_is_there(monkeypatch):
    for found in ([], ["distributed_ucxx"], ["rmm"]):
        monkeypatch.setattr(gpus, "find_spec", lambda name, found=found: name in found or None)
        assert choose_protocol(None) == "tcp"
        with pytest.raises(NoDeviceError, match="pip install distributed-ucxx-cu12 rmm-cu12"):
            choose_protocol("ucx")
    monkeypatch.setattr(gpus, "find_spec", lambda name: name)
    assert [choose_protocol(asked) for asked in (None, "ucx", "tcp")] == ["ucx", "ucx", "tcp"]


# --- one worker per device ---------------------------------------------------------------------


SEEN = """(
    __import__("os").environ["CUDA_VISIBLE_DEVICES"],
    __import__("os").environ["DASK_EP_TF32"],
    "CUPY_TF32" in __import__("os").environ,
    __import__("dask").config.get("distributed-ucxx.create-cuda-context"),
    __import__("device_double").get_default_memory_pool().get_limit(),
)"""


@pytest.mark.slow
def test_each_worker_sees_its_own_device(two_doubles):
    with start_gpus(Gpus(device_memory_limit=5 << 30, tf32=True)) as client:
        seen = client.run(eval, SEEN)
        assert sorted(seen.values()) == [
            ("5", "1", False, True, 5 << 30),
            ("GPU-2f", "1", False, True, 5 << 30),
        ]
        assert set(client.nthreads().values()) == {gpus.THREADS_PER_GPU}
        workers = client.scheduler_info(n_workers=-1)["workers"].values()
        assert [worker["resources"] for worker in workers] == [{"GPU": 1}] * 2


@pytest.mark.slow
def test_a_job_on_two_devices_gives_what_it_gives_on_threads(two_doubles, capsys, small_job):
    """By a placement whose counts come from the devices to this process."""
    job = load_job(small_job, placement="balanced")
    done = run_job(job, Gpus(protocol="tcp"), chunk_rows=100)
    assert (done.rows_done, done.rows) == (700, 700)
    on_threads = load_job(small_job, out=str(small_job.parent / "threads.zarr"), world_size=2)
    run_job(on_threads, Threads(1), chunk_rows=100)
    got, want = (open_source(path).read(0, 700) for path in (job.out, on_threads.out))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    assert here(capsys, "verify", small_job)[0] == 0
    for where in (Threads(1), Gpus(protocol="tcp", tf32=True)):
        with pytest.raises(ValueError, match="computed_by"):
            run_job(job, where, resume=True)
    assert verify_job(job).tolerance == TOLERANCES["float32"]
    assert done.multiplied_by == "cuBLAS"
    done = run_job(job, Gpus(protocol="tcp", tf32=True), overwrite=True)
    assert done.multiplied_by == "cuBLAS, as TF32"
    assert verify_job(job).tolerance == TF32_TOLERANCE


@pytest.mark.slow
def test_a_job_on_devices_tells_its_precision_and_is_verified_by_it(two_doubles, tmp_path):
    rng, narrow, shapes = (
        np.random.default_rng(0),
        ml_dtypes.bfloat16,
        {"up": (8, 16), "down": (16, 8)},
    )
    np.save(tmp_path / "x.npy", rng.standard_normal((40, 8), np.float32))
    np.save(tmp_path / "r.npy", rng.integers(0, 4, (40, 2)))
    weights = {n: rng.standard_normal((4, *s)).astype(narrow) for n, s in shapes.items()}
    save_file(weights, tmp_path / "w.safetensors")
    paths = {
        n: str(tmp_path / f"{f}.npy")
        for n, f in {"tokens": "x", "routing": "r", "out": "y"}.items()
    }
    experts = {n: f"{tmp_path}/w.safetensors::{n}" for n in weights}
    job = load_job(experts={"kind": "mlp", **experts}, **paths)
    for precision, said, tolerance in (
        ("float32", "as exact as float32", TOLERANCES["float32"]),
        ("bfloat16", "rounded", ROUNDED_TOLERANCE),
    ):
        of_precision = replace(job, precision=precision)
        done = run_job(of_precision, Gpus(protocol="tcp"), chunk_rows=20, overwrite=True)
        assert done.multiplied_by == f"cuBLAS in 16 bits, {said}"
        found = verify_job(of_precision)
        assert (found.good, found.tolerance) == (True, tolerance)
        assert (found.relative_error < 1e-6) == (precision == "float32")
    with pytest.raises(ValueError, match=r"options\.precision was bfloat16, is absent"):
        run_job(job, Gpus(protocol="tcp"), resume=True)


@pytest.mark.slow
@pytest.mark.usefixtures("two_doubles")
def test_dask_cuda_starts_the_workers_where_it_is_installed(monkeypatch):
    """What it is called with; the names are those of LocalCUDACluster and LocalCluster."""
    called = {}

    def start(**keywords: object) -> None:
        called.update(keywords)
        raise KeyboardInterrupt

    fake = type(sys)("dask_cuda")
    fake.LocalCUDACluster = start
    monkeypatch.setitem(sys.modules, "dask_cuda", fake)
    monkeypatch.setattr(gpus, "find_spec", lambda name: name == "dask_cuda" or None)
    with pytest.raises(KeyboardInterrupt), start_gpus(Gpus(device_memory_limit=10 << 30)):
        pass
    assert called["CUDA_VISIBLE_DEVICES"] == ["5", "GPU-2f"]
    assert called["device_memory_limit"] == 8 << 30
    assert (called["protocol"], called["resources"]) == ("tcp", {"GPU": 1})
    called.clear()
    devices = [replace(one, of_host=True) for one in device.find_devices()]
    monkeypatch.setattr(device, "find_devices", lambda: devices)
    with start_gpus(Gpus()) as client:
        assert len(client.nthreads()) == 2, "plain processes: it has no use for shared memory"
    assert not called


@pytest.mark.parametrize("on_gpus", [False, True])
def test_a_client_of_gpus_makes_a_cuda_context_before_ucx_starts(monkeypatch, small_job, on_gpus):
    made = []

    def connect(address: str, **options: object) -> None:
        made.append(dask.config.get("distributed-ucxx.create-cuda-context", False))
        raise KeyboardInterrupt

    monkeypatch.setattr(backends, "connect", connect)
    monkeypatch.setattr(device, "find_devices", lambda: [Device(0, "double", 8 << 30)])
    with pytest.raises(KeyboardInterrupt):
        run_job(load_job(small_job), Cluster("ucx://x:1", gpus=on_gpus))
    assert made == [on_gpus]


def test_dask_cuda_leaves_experts_on_the_device(monkeypatch):
    """It asks `is_spillable_object` first, and moves nothing of which that says yes."""
    spills_itself = Dispatch("is_spillable_object")
    spills_itself.register(object, lambda obj: False)
    modules = {name: type(sys)(name) for name in ("dask_cuda", "dask_cuda.is_spillable_object")}
    modules["dask_cuda.is_spillable_object"].is_spillable_object = spills_itself
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(gpus, "limit_blas_for_good", lambda: None)
    OnGpu(namespace="device_double").setup(None)
    experts = Experts.linear(np.ones((2, 4, 4), "f4"))
    for one in (experts, held_as_stored(experts)):
        assert [spills_itself(one.load(xp=where)) for where in (xp, np)] == [True, False]
    assert not spills_itself(on_device(np.ones(3)))


def test_workers_of_a_cluster_without_a_gpu_are_named(monkeypatch):
    answers = iter([[Device(0, "double", 1)]])

    def find_devices() -> list[Device]:
        found = next(answers, None)
        if found is None:
            raise NoDeviceError("CuPy finds no GPU: none")
        return found

    monkeypatch.setattr(device, "find_devices", find_devices)
    with (
        Client(n_workers=1, processes=False, dashboard_address=":0") as client,
        pytest.raises(NoDeviceError, match=r"worker inproc://.*: CuPy finds no GPU: none"),
    ):
        gpus.check_gpus(client)


@pytest.mark.usefixtures("two_doubles")
def test_a_job_on_a_cluster_of_gpus_fits_the_memory_that_they_have(monkeypatch, small_job):
    """The devices of the workers say how much; 300 rows of a chunk are asked for, and too many."""
    job, inputs = load_job(small_job), open_inputs(load_job(small_job))
    monkeypatch.setattr(gpus, "limit_blas_for_good", lambda: None)
    law = need(inputs.work(True), lay_out(replace(job, world_size=2), Cluster(gpus=True)))
    with Client(
        n_workers=2, threads_per_worker=1, processes=False, dashboard_address=":0"
    ) as client:
        cluster = Cluster(client.scheduler.address, gpus=True)
        for rows in (299, 300):
            memory = math.ceil(law.at(rows) / gpus.MEMORY_SHARE) + 1
            card = Device(0, "double", memory)
            monkeypatch.setattr(device, "find_devices", lambda card=card: [card])
            if rows < 300:
                with pytest.raises(DoesNotFit, match="the memory limit of a GPU of"):
                    run_job(job, cluster, chunk_rows=300)
        assert run_job(job, cluster, chunk_rows=300).rows_done == 700
    on_threads = load_job(small_job, out=str(small_job.parent / "threads.zarr"), world_size=2)
    run_job(on_threads, Threads(1))
    got, want = (open_source(path).read(0, 700) for path in (job.out, on_threads.out))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scheduler", ["sync", "threads"])
def test_from_file_to_file_each_byte_goes_up_once_and_down_once(tmp_path, small_job, scheduler):
    job = load_job(small_job)
    tokens = open_tokens(job.tokens, chunks=200, xp="device_double")
    assert type(tokens._meta) is DeviceArray
    routing, weights = (
        open_tokens(path, like=tokens, xp="device_double")
        for path in (job.routing, job.topk_weights)
    )
    experts = open_inputs(job).experts
    y = expert_parallel(tokens, routing, experts, topk_weights=weights, world_size=1)
    with watch() as traffic:
        store(y, tmp_path / "out.npy", scheduler=scheduler)
    chunks = [tokens.nbytes, routing.nbytes, weights.nbytes]
    assert sum(traffic.to_device) == sum(chunks) + experts.nbytes
    assert sum(traffic.to_host) == y.nbytes + 4 * 8 * (6 + 3)
    run_job(job, Threads(1))
    want = open_source(job.out).read(0, 700)
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), want, rtol=1e-5, atol=1e-6)


def layer_job(tmp_path: Path, hidden: np.ndarray, **more: str) -> Job:
    np.save(tmp_path / "hidden.npy", hidden)
    places = {"tokens": str(tmp_path / "hidden.npy"), "out": str(tmp_path / "out.npy")}
    layer = os.fspath(FIXTURES / "qwen2_moe")
    return load_job(layer=layer, layer_index=LAYER, **places, **more)


def test_a_saved_routing_goes_to_devices_and_statistics_stay_on_the_host(tmp_path):
    want = expected("qwen2_moe")
    hidden = want["hidden"].reshape(-1, want["hidden"].shape[-1])
    saved = tmp_path / "routing.npy"
    run_job(layer_job(tmp_path, hidden), Threads(1), save_routing=saved)
    saved_too = {"routing": str(saved), "topk_weights": path_of_weights(str(saved))}
    inputs = open_inputs(layer_job(tmp_path, hidden, **saved_too))
    decision = decide(inputs.work(), Layout(2, 2, 1), chunk_rows=10)
    built = build(inputs, decision, ComputedBy("device_double"))
    got = dask.compute(*built.y.to_delayed().ravel(), scheduler="sync")
    assert {type(block) for block in got} == {DeviceArray}
    got = np.concatenate([block.get() for block in got]).reshape(want["output"].shape)
    np.testing.assert_allclose(got, want["output"], atol=1e-5 * np.abs(want["output"]).max())
    tokens = open_tokens(tmp_path / "hidden.npy", chunks=10, xp="device_double")
    with pytest.raises(TypeError, match="the rows are on a GPU: give NumPy chunks"):
        collect(tokens, inputs.layer, what=["usage"], routing=built.routing)


def test_outputs_on_devices_are_compared_there():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 40, 6), dtype="f4")
    routing = np.argsort(rng.random((2, 40, 5)), axis=2)[:, :, :2]
    host = [da.from_array(x, chunks=(7, -1)) for x in (a, b, *routing)]
    there = [x.map_blocks(on_device, meta=on_device(x._meta)) for x in host]
    found, want = (
        join(differences(*x[:2], x[2:], num_experts=5, tolerance=1.0))
        .compute(scheduler="sync")
        .item()
        for x in (there, host)
    )
    assert (found.rows, found.beyond, found.worst, found.pairs, found.bins) == (
        40, want.beyond, want.worst, want.pairs, want.bins
    )  # fmt: skip
    np.testing.assert_array_equal(found.expert_errors, want.expert_errors)


@pytest.mark.slow
@pytest.mark.usefixtures("two_doubles")
def test_a_layer_of_two_checkpoints_is_compared_on_devices(tmp_path, capsys):
    tokens = tmp_path / "x.npy"
    np.save(tokens, np.random.default_rng(0).standard_normal((200, 32), dtype="f4"))
    pair = (FIXTURES / "deepseek_v3_bfloat16", FIXTURES / "deepseek_v3_fp8_cut")
    found, want = (
        compare_checkpoints(*pair, tokens, LAYER, where, chunk_rows=50, tolerance=0.1)
        for where in (Gpus(protocol="tcp"), Threads(1))
    )
    assert found.difference.rows == want.difference.rows == 200
    assert found.difference.moved == want.difference.moved
    assert found.difference.quantile(0.5) == pytest.approx(want.difference.quantile(0.5), rel=0.05)
    options = ("--layer", pair[0], "--layer-index", LAYER, "--tokens", tokens, "--gpu")
    stats = ("--what", "usage", "--out", tmp_path / "s.zarr")
    code, _, err = here(capsys, "collect", *options, *stats)
    assert (code, "statistics are collected on the host: run without --gpu" in err) == (2, True)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_layer_of_a_checkpoint_is_computed_on_devices(tmp_path, world_size):
    want = expected("qwen2_moe")
    hidden = want["hidden"].reshape(-1, want["hidden"].shape[-1])
    inputs = open_inputs(layer_job(tmp_path, hidden))
    decision = decide(inputs.work(), Layout(world_size, world_size, 1), chunk_rows=10)
    y = build(inputs, decision, ComputedBy("device_double")).y
    got = dask.compute(*y.to_delayed().ravel(), scheduler="sync")
    assert {type(block) for block in got} == {DeviceArray}
    got = np.concatenate([block.get() for block in got]).reshape(want["output"].shape)
    np.testing.assert_allclose(got, want["output"], atol=1e-5 * np.abs(want["output"]).max())


@pytest.mark.usefixtures("two_doubles")
def test_a_chunk_fits_next_to_the_experts(small_job):
    """6 gated experts of 3 * 16 * 32 numbers, 3 on each of two devices."""
    job, inputs = load_job(small_job), open_inputs(load_job(small_job))
    law = need(inputs.work(True), lay_out(job, Gpus()))
    assert law.expert_bytes == 3 * 3 * 16 * 32 * 4
    fits = Gpus(device_memory_limit=law.at(100))
    assert decide(inputs.work(True), lay_out(job, fits), chunk_rows=100).chunk_rows == 100
    for where, asked in ((fits, 101), (Gpus(device_memory_limit=DEVICE_PROCESS_BYTES), None)):
        with pytest.raises(DoesNotFit, match="must hold"):
            decide(inputs.work(True), lay_out(job, where), chunk_rows=asked)


@pytest.mark.slow
def test_a_job_whose_experts_fit_a_device_only_as_they_are_stored(
    two_doubles, monkeypatch, tmp_path
):
    monkeypatch.setattr(device, "find_devices", lambda: [Device(0, "double", 8 << 30)])
    want = expected("deepseek_v3_fp8")
    hidden = want["hidden"].reshape(-1, want["hidden"].shape[-1])
    np.save(tmp_path / "hidden.npy", hidden)
    places = {"tokens": str(tmp_path / "hidden.npy"), "out": str(tmp_path / "out.npy")}
    job = load_job(layer=os.fspath(FIXTURES / "deepseek_v3_fp8"), layer_index=LAYER, **places)
    work = open_inputs(job).work(True)
    law = need(work, lay_out(job, Gpus()))
    where = Gpus(device_memory_limit=law.at(FEWEST_ROWS) - 1)
    assert decide(work, lay_out(job, where)).as_stored
    assert run_job(job, where).rows_done == len(hidden)
    got = np.load(job.out).reshape(want["output"].shape)
    np.testing.assert_allclose(got, want["output"], atol=1e-5 * np.abs(want["output"]).max())


# --- out of memory -------------------------------------------------------------------------------


@pytest.fixture
def little_memory() -> Iterator[MemoryPool]:
    pool = xp.get_default_memory_pool()
    pool.set_limit(size=100_000)
    yield pool
    pool.set_limit(size=0)


@pytest.mark.usefixtures("little_memory")
def test_an_error_says_what_was_needed_what_is_free_and_what_fits():
    rng = np.random.default_rng(0)
    tokens, routing = rng.random((800, 8), dtype="f4"), rng.integers(0, 4, (800, 2))
    W = rng.random((4, 8, 8), dtype="f4")

    def run(chunk_rows: int) -> np.ndarray:
        there = [
            da.from_array(a, chunks=(chunk_rows, -1)).map_blocks(
                on_device, dtype=a.dtype, meta=xp.empty((0, 0), dtype=a.dtype)
            )
            for a in (tokens, routing)
        ]
        return expert_parallel(*there, W, world_size=1).to_delayed().ravel()

    with pytest.raises(DeviceMemoryError) as error:
        dask.compute(*run(800), scheduler="sync")
    needed = 800 * (4 * (2 * 16 + 2 * (16 + 8)) + 2 * device_kernel.INDEX_BYTES)
    assert str(error.value).startswith(
        "dispatch of token chunk 0 at rank 0 of 1: not enough device memory for a chunk of "
        f"800 rows: it needs {needed} bytes, "
    )
    free, total, fits = re.search(
        r"(\d+) of (\d+) are free.*; (\d+) rows would fit into this step", str(error.value)
    ).groups()
    assert (int(total), int(fits)) == (100_000, (int(free) + 800 * 8 * 4) * 800 // needed)
    del error
    gc.collect()  # its frames hold the chunk
    for block in run(int(fits)):
        block.compute(scheduler="sync")


@pytest.mark.parametrize(
    "name", ["routing", "pack", "combine", "shared experts and residual", "residual"]
)
def test_every_step_states_the_memory_it_needs_and_needs_no_more(request, name):
    rng, (n, d, E) = np.random.default_rng(0), (900, 32, 8)
    shapes = [(n, d), (E, d), (n, 2)]
    tokens, weight, weights = (on_device(rng.random(shape, "f4")) for shape in shapes)
    routing = on_device(rng.integers(0, E, (n, 2)))
    shared = Experts.gated(*rng.random((2, 2, d, 24), "f4"), rng.random((2, 24, d), "f4"))
    loaded = shared.load(xp=xp)
    packing = Packing(tokens, routing, None, 4, 2)
    answers = [(rank, packing.packet([rank]).rows) for rank in (0, 1)]
    exchange, where = Exchange("", 2, 4, d, None), ChunkPlace(7, 0, None)
    rest = Rest(loaded, None, (), (), None, E, residual=True)
    step = {
        "routing": lambda: _route_chunk(tokens, {"weight": weight}, Router(E, 2), 7),
        "pack": lambda: cut(pack(tokens, routing, weights, where, exchange), [1], 7),
        "combine": lambda: combine(packing, answers, where, exchange),
        "shared experts and residual": lambda: finish(tokens, tokens, rest, 7),
        "residual": lambda: finish(tokens, tokens, rest._replace(shared=None), 7),
    }[name]
    pool = request.getfixturevalue("little_memory")
    pool.set_limit(size=20_000)
    with pytest.raises(DeviceMemoryError, match=f"{name} of token chunk 7") as error:
        step()
    words = (
        r"a chunk of 900 rows: it needs (\d+) bytes, .* continue with --resume --chunk-rows \d+$"
    )
    pool.set_limit(size=int(re.search(words, str(error.value))[1]))
    step()


@pytest.mark.usefixtures("little_memory")
def test_a_chunk_that_cannot_be_read_to_the_device_says_that_later_steps_need_more(tmp_path):
    np.save(tmp_path / "tokens.npy", np.ones((4000, 8), "f4"))
    tokens = open_tokens(tmp_path / "tokens.npy", chunks=4000, xp="device_double")
    words = "it needs 128000 bytes, .*; 2000 rows would fit into this step, and other steps may"
    with pytest.raises(DeviceMemoryError, match=words):
        tokens.compute(scheduler="sync")


@pytest.mark.usefixtures("little_memory")
def test_experts_that_do_not_fit_are_an_error():
    arrays = [np.ones((4, 8), "f4"), np.zeros(4, int)]
    there = [
        da.from_array(a).map_blocks(
            on_device, dtype=a.dtype, meta=xp.empty((0,) * a.ndim, dtype=a.dtype)
        )
        for a in arrays
    ]
    y = expert_parallel(*there, np.ones((500, 8, 8), "f4"), world_size=1)
    words = r"experts of rank 0: .* it needs 128000 bytes, \d+ of 100000 are free"
    with pytest.raises(DeviceMemoryError, match=words):
        y.compute(scheduler="sync")


@pytest.mark.slow
def test_a_job_that_ran_out_of_memory_continues_in_smaller_chunks(
    two_doubles, monkeypatch, small_job
):
    monkeypatch.setattr(device, "find_devices", lambda: [Device(0, "double", 8 << 30)])
    monkeypatch.setattr(gpus, "OnGpu", lambda _, tf32: OnGpu(300_000, tf32))
    job = load_job(small_job)
    with pytest.raises(DeviceMemoryError, match="continue with --resume --chunk-rows") as error:
        run_job(job, Gpus(), chunk_rows=700)
    fits = int(str(error.value).rpartition(" ")[2])
    assert fits <= 350
    done = run_job(job, Gpus(), resume=True, chunk_rows=50)
    assert done.rows_before + done.rows_done == 700
    on_threads = load_job(small_job, out=str(small_job.parent / "threads.zarr"))
    run_job(on_threads, Threads(1))
    got, want = (open_source(path).read(0, 700) for path in (job.out, on_threads.out))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


# --- how rows get there and back ----------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 3), (0, 3), (7,)])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.int16])
def test_rows_are_copied_to_the_device_and_back_in_one_copy_each(shape, dtype):
    host = pinned_empty(xp, shape, dtype)
    host[...] = np.arange(host.size).reshape(shape)
    want = host.copy()
    with watch() as traffic:
        there = upload(xp, host)
        assert type(there) is DeviceArray
        doubled = there + there
        got = download(doubled)
    np.testing.assert_array_equal(got.astype("f4"), 2 * want.astype("f4"))
    assert got.dtype == there.dtype == dtype
    expected = [host.nbytes] if host.size else []
    assert (traffic.to_device, traffic.to_host) == (expected, expected)


def test_a_host_without_page_locked_memory_says_so(monkeypatch):
    def refuse(size: int) -> None:
        raise xp.cuda.runtime.CUDARuntimeError("cudaErrorMemoryAllocation: out of memory")

    monkeypatch.setattr(xp.cuda, "alloc_pinned_memory", refuse)
    with pytest.raises(
        MemoryError, match=r"allocate 80 bytes of page-locked host memory .* --chunk-rows"
    ):
        pinned_empty(xp, (10,), np.float64)


def pinned(*numbers: float) -> np.ndarray:
    host = pinned_empty(xp, (len(numbers),), np.float64)
    host[...] = numbers
    return host


def test_memory_on_the_device_is_used_again_when_its_last_view_is_dead():
    lanes = Lanes(xp)
    first = lanes.upload(pinned(1, 2, 3))
    view, address = first[1:], first.data.ptr
    del first
    second = lanes.upload(pinned(4, 5, 6))
    assert second.data.ptr != address, "a view of it lives"
    np.testing.assert_array_equal(view.get(), [2, 3])
    del view
    third = lanes.upload(pinned(7, 8, 9))
    assert third.data.ptr == address
    np.testing.assert_array_equal(second.get(), [4, 5, 6])
    np.testing.assert_array_equal(third.get(), [7, 8, 9])


def test_memory_of_another_size_is_given_back_when_the_device_is_done_with_it():
    """A weight's, after the weights are loaded; but not before it has been read."""
    lanes, compute = Lanes(xp), xp.cuda.Stream(non_blocking=True)
    with compute:
        lanes.upload(pinned(*range(1000)))
        kept = [weakref.ref(block.memory._a) for blocks in lanes._free.values() for block in blocks]
        second = lanes.upload(pinned(*range(100)))
        assert [block() is None for block in kept] == [False], "compute has not reached the mark"
        compute.synchronize()
        third = lanes.upload(pinned(*range(100)))
    assert [block() is None for block in kept] == [True]
    compute.synchronize()
    for there in (second, third):
        np.testing.assert_array_equal(there.get(), range(100))


def test_an_upload_waits_until_the_device_has_read_what_was_there():
    """The compute stream may be far behind: here it has not even begun."""
    lanes, compute = Lanes(xp), xp.cuda.Stream(non_blocking=True)
    with compute:
        first = lanes.upload(pinned(1, 2, 3))
        address, seen = first.data.ptr, np.zeros(3)
        memory = xp.cuda.MemoryPointer(xp.cuda.UnownedMemory(address, 24, None), 0)
        read = DeviceArray(3, np.float64, memory)
        compute._start(lambda: np.copyto(seen, read._a))
        del first
        second = lanes.upload(pinned(4, 5, 6))
        assert second.data.ptr == address
    lanes._up.synchronize()
    np.testing.assert_array_equal(seen, [1, 2, 3])
    compute.synchronize()
    np.testing.assert_array_equal(second.get(), [4, 5, 6])


# --- between workers -----------------------------------------------------------------------------


@pytest.fixture
def registered() -> None:
    device_serialize.register(xp)


def travel(obj: object, family: str) -> object:
    header, frames = serialize(obj, serializers=[family], on_error="raise")
    assert header["serializer"] == family
    return deserialize(header, frames, deserializers=[family])


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("shape", [(5, 3), (0, 3), ()])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.int64])
@pytest.mark.parametrize("family", ["dask", "cuda"])
def test_arrays_travel_with_their_dtype(family, dtype, shape):
    host = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
    with watch() as traffic:
        got = travel(on_device(host), family)
    assert type(got) is DeviceArray
    assert (got.dtype, got.shape) == (host.dtype, shape)
    assert got.get().tobytes() == host.tobytes()
    copies = [host.nbytes] if family == "dask" and host.size else []
    assert traffic.to_host == copies
    assert sum(traffic.to_device) == sum(copies)


def test_a_worker_whose_threads_have_a_stream_each_is_refused(monkeypatch):
    monkeypatch.setattr(gpus, "limit_blas_for_good", lambda: None)
    monkeypatch.setenv("CUPY_CUDA_PER_THREAD_DEFAULT_STREAM", "1")
    plugin = OnGpu(namespace="device_double")
    plugin.setup(None)
    assert os.environ["CUPY_CUDA_PER_THREAD_DEFAULT_STREAM"] == "0"
    monkeypatch.setattr(xp.cuda, "get_current_stream", lambda: xp.cuda.Stream.ptds)
    with pytest.raises(NoDeviceError, match="one stream, but CuPy was imported with CUPY_CUDA_PER"):
        plugin.setup(None)


def test_a_worker_is_prepared_once(monkeypatch):
    assert OnGpu.idempotent
    plugin = OnGpu(memory_limit=1 << 30, namespace="device_double")
    monkeypatch.setattr(gpus, "limit_blas_for_good", lambda: None)
    plugin.setup(None)
    assert xp.get_default_memory_pool().get_limit() == 1 << 30
    xp.get_default_memory_pool().set_limit(size=0)
