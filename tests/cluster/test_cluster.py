"""Is a cluster fit for a job: versions, files, deaths allowed, BLAS threads, certificates."""

import asyncio
import platform
import resource
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
from distributed.core import connect as connect_to_worker
from distributed.security import Security
from threadpoolctl import threadpool_info

from dask_ep.cluster import checks as clusters
from dask_ep.cluster.checks import WorkerSettings, check_cluster, connect, probe_process
from dask_ep.errors import UnfitClusterError
from tests.certificates import make_certificates, options
from tests.cluster_processes import DEADLINE, REPOSITORY, Cluster, addresses, wait_until

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """One worker with two BLAS threads; the scheduler gives a task up at the first death."""
    directory = tmp_path_factory.mktemp("cluster")
    config = {"distributed.scheduler.allowed-failures": 0}
    threads = {"OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2"}
    with Cluster(directory, ["good"], config=config, environment=threads) as running:
        yield running


@pytest.fixture(scope="module")
def client(cluster):
    with cluster.client() as connected:
        yield connected


# --- is it fit? ------------------------------------------------------------------------------


def test_a_worker_without_the_package_is_named(cluster, client, tmp_path):
    without_package = tmp_path / "without_package.py"
    without_package.write_text(WITHOUT_PACKAGE)
    cluster.start_worker("bare", "--preload", str(without_package))
    wait_until(lambda: "bare" in addresses(client), "the bare worker has come")
    with pytest.raises(UnfitClusterError, match="No module named 'dask_ep'") as error:
        check_cluster(client)
    (problem,) = error.value.problems
    assert f"worker bare ({addresses(client)['bare']}) cannot run this check" in problem
    cluster.stop_worker("bare")
    wait_until(lambda: "bare" not in addresses(client), "the bare worker has gone")


WITHOUT_PACKAGE = """
import sys
class Absent:
    def find_spec(name, path, target=None):
        if name.partition(".")[0] == "dask_ep":
            raise ModuleNotFoundError("No module named 'dask_ep'")
sys.meta_path.insert(0, Absent)
"""
"""Makes a worker one on whose machine the package is not installed."""


def test_other_versions_are_named_with_their_places(client, monkeypatch):
    numpy = probe_process([])["versions"]["numpy"]
    monkeypatch.setattr(clusters.metadata, "version", lambda package: "0.1")
    with pytest.raises(UnfitClusterError) as error:
        check_cluster(client)
    for who in ("the scheduler", f"worker good ({addresses(client)['good']})"):
        assert any(
            problem.startswith(who)
            and f"has numpy {numpy}, but the client has 0.1; install the same version" in problem
            for problem in error.value.problems
        )


def test_files_that_a_worker_does_not_see_are_named(cluster, client, tmp_path):
    seen, unseen, other = (tmp_path / name for name in ("seen.npy", "unseen.npy", "other.npy"))
    for path in (seen, unseen, other):
        np.save(path, np.zeros(3))
    far_machine = tmp_path / "far_machine.py"
    far_machine.write_text(FAR_MACHINE.format(unseen=str(unseen), other=str(other)))
    cluster.start_worker("far", "--preload", str(far_machine))
    wait_until(lambda: "far" in addresses(client), "the far worker has come")
    far = f"worker far ({addresses(client)['far']})"
    with pytest.raises(UnfitClusterError) as error:
        check_cluster(client, {"tokens": seen, "experts.w": unseen, "routing": other})
    unseen_there, other_there = error.value.problems
    assert unseen_there == (
        f"{far} does not see experts.w: {unseen} does not exist there; put it on a file system "
        "that all workers share, at the same path"
    )
    assert other_there == (
        f"{far} sees a different routing: {other} is a file of 1 bytes there and a file of 152 "
        "bytes at the client; make it the same file on both"
    )
    cluster.stop_worker("far")
    wait_until(lambda: "far" not in addresses(client), "the far worker has gone")


FAR_MACHINE = """
from dask_ep.cluster import checks
def dask_setup(worker):
    look_at = checks._look_at
    other_disk = {{{unseen!r}: None, {other!r}: ("file", 1)}}
    checks._look_at = lambda path: other_disk[path] if path in other_disk else look_at(path)
"""
"""Makes a worker see the files of a machine of its own."""


def test_a_file_that_is_not_there_is_the_clients_mistake(client, tmp_path):
    with pytest.raises(UnfitClusterError, match=r"tokens: .*nowhere\.npy does not exist$"):
        check_cluster(client, {"tokens": tmp_path / "nowhere.npy"})


def test_a_scheduler_that_allows_too_few_deaths_is_warned_of(client, tmp_path):
    with pytest.warns(UserWarning, match="when 1 workers have died .* there are 1 workers") as seen:
        check_cluster(client, {"directory": tmp_path})
    assert "allowed-failures to 1 or more" in str(seen[0].message)


# --- how many BLAS threads? ------------------------------------------------------------------


def test_one_blas_thread_without_a_nanny_on_workers_there_and_to_come(cluster, client):
    assert set(client.run(_blas_threads).values()) == {2}
    client.register_plugin(WorkerSettings())
    client.register_plugin(WorkerSettings())
    assert set(client.run(_blas_threads).values()) == {1}
    cluster.start_worker("late")
    client.wait_for_workers(2, timeout=DEADLINE)
    assert list(client.run(_blas_threads).values()) == [1, 1]
    cluster.stop_worker("late")
    wait_until(lambda: "late" not in addresses(client), "the late worker has gone")


def test_one_blas_thread_with_a_nanny_and_after_its_restart(tmp_path):
    threads = {"distributed.nanny.pre-spawn-environ": "{'OPENBLAS_NUM_THREADS': 2}"}
    running = Cluster(tmp_path, ["w0"], nanny=True, config=threads)
    with running, running.client() as client:
        assert set(client.run(_blas_threads).values()) == {2}
        client.register_plugin(WorkerSettings())
        assert set(client.run(_blas_threads).values()) == {1}
        client.restart(timeout=DEADLINE)
        assert set(client.run(_blas_threads).values()) == {1}


def _faults_of_freed_memory() -> int:
    """Page faults of 50 arrays of 1000 KB, one after the other: 250 pages each."""
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    for _ in range(50):
        np.empty(1_000_000, np.uint8).fill(1)
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_workers_keep_the_memory_of_freed_packets(tmp_path):
    running = Cluster(tmp_path, ["w0"], nanny=True)
    with running, running.client() as client:
        (fresh,) = client.run(_faults_of_freed_memory).values()
        client.register_plugin(WorkerSettings())
        client.run(_faults_of_freed_memory)
        (kept,) = client.run(_faults_of_freed_memory).values()
    assert fresh > 5000
    assert kept < 500


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_owners_keep_the_memory_of_freed_packets(tmp_path):
    from dask_ep import own_experts  # with SciPy, whose BLAS workers would load: see above

    running = Cluster(tmp_path, ["w0"], nanny=True)
    with running, running.client() as client, own_experts(client, 1):
        client.run(_faults_of_freed_memory)
        (kept,) = client.run(_faults_of_freed_memory).values()
    assert kept < 500


def test_one_blas_thread_in_process():
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", IN_PROCESS],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        cwd=REPOSITORY,
        check=False,
    )
    assert (ran.returncode, ran.stdout) == (0, "1\n"), ran.stderr


IN_PROCESS = """
from distributed import Client
from dask_ep.cluster.checks import WorkerSettings
from tests.cluster.test_cluster import _blas_threads
with Client(processes=False, n_workers=1, dashboard_address=":0") as client:
    client.register_plugin(WorkerSettings())
    print(*client.run(_blas_threads).values())
"""


# --- may one use it? -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    return make_certificates(tmp_path_factory.mktemp("ours"))


@pytest.fixture(scope="module")
def other_certificates(tmp_path_factory):
    return make_certificates(tmp_path_factory.mktemp("theirs"))


@pytest.fixture(scope="module")
def tls_cluster(certificates, tmp_path_factory):
    directory = tmp_path_factory.mktemp("tls")
    with Cluster(directory, ["w0"], options=options(certificates)) as running:
        yield running


@pytest.fixture(scope="module")
def tls_client(tls_cluster, certificates):
    with connect(tls_cluster.address, certificates=certificates, timeout=DEADLINE) as client:
        client.wait_for_workers(1, timeout=DEADLINE)
        yield client


def test_with_certificates_all_is_well(tls_client):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_cluster(tls_client, {"here": REPOSITORY})


def test_a_worker_without_a_certificate_of_the_cluster_cannot_join(
    tls_cluster, tls_client, other_certificates, tmp_path
):
    with Cluster(tmp_path) as elsewhere:  # processes without the options of the TLS cluster
        elsewhere.scheduler_file = tls_cluster.scheduler_file
        elsewhere.start_worker("without")
        elsewhere.start_worker("foreign", *options(other_certificates))
        for name in ("without", "foreign"):
            wait_until(
                lambda name=name: (
                    "TLS" in elsewhere.log(name)
                    or elsewhere.log(name).count("Waiting to connect") > 3
                ),
                f"{name} has tried to connect: {elsewhere.log(name)}",
            )
        assert set(addresses(tls_client)) == {"w0"}


@pytest.mark.parametrize("proof", ["none", "foreign", "plain tcp"])
def test_nobody_without_a_certificate_reads_a_row(tls_client, other_certificates, proof):
    (address,) = addresses(tls_client).values()
    (secret,) = tls_client.scatter([np.arange(3)])
    security = other_certificates.security() if proof == "foreign" else Security()
    if proof == "plain tcp":
        address = address.replace("tls://", "tcp://")

    async def read():
        comm = await connect_to_worker(address, timeout=2, **security.get_connection_args("worker"))
        await comm.write({"op": "get_data", "keys": [secret.key], "who": "me"})
        return await comm.read()

    with pytest.raises((OSError, TypeError)):
        asyncio.run(read())


@pytest.mark.parametrize(
    ("proof", "message"),
    [
        ("none", "uses TLS, but no certificates were given; pass --tls-ca-file"),
        ("foreign", "TLS certificate does not match.*signed by its authority"),
        ("plain tcp", "could not connect.*if it speaks TLS, give certificates"),
    ],
)
def test_a_client_without_a_certificate_is_refused(tls_cluster, other_certificates, proof, message):
    proofs = {"foreign": other_certificates}
    address = tls_cluster.address
    if proof == "plain tcp":
        address = address.replace("tls://", "tcp://")
    with pytest.raises(ConnectionError, match=message):
        connect(address, certificates=proofs.get(proof), timeout=2 if proof == "plain tcp" else 30)


def test_no_scheduler_there(tmp_path):
    begun = time.monotonic()
    with pytest.raises(ConnectionError, match=r"127\.0\.0\.1:1: .*check that it runs"):
        connect("tcp://127.0.0.1:1", timeout=1)
    assert time.monotonic() - begun < DEADLINE


def test_no_scheduler_file_there(tmp_path):
    with pytest.raises(ConnectionError, match="must hold a scheduler's address, but after 0.1 s"):
        connect(scheduler_file=tmp_path / "none.json", timeout=0.1)


def test_an_address_or_a_file_must_be_given():
    with pytest.raises(TypeError, match="an address or a scheduler_file must be given"):
        connect()


def test_a_scheduler_file_says_where(cluster):
    with connect(scheduler_file=cluster.scheduler_file, timeout=DEADLINE) as client:
        assert client.scheduler.address == cluster.address


def _blas_threads():
    pools = [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]
    (threads,) = set(pools)
    return threads
