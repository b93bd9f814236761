"""The recipes for clusters: the script by hand runs, and the Kubernetes manifest fits together."""

import contextlib
import importlib
import os
import re
import signal
import subprocess
import sys

import dask
import psutil
import pytest
import yaml
from distributed import Client, LocalCluster

from dask_ep.cli.command import WRONG_USE
from dask_ep.cli.run_command import run_command
from dask_ep.jobs.example import Example, write_example
from dask_ep.jobs.job import load_job
from dask_ep.jobs.verify import verify_job
from tests.cli.test_cluster_command import end, wait_for_blocks
from tests.cluster_processes import REPOSITORY

WORKFLOWS = REPOSITORY / "workflows"
KUBERNETES = "1.33"
"""The version whose schema the manifest keeps."""


@pytest.fixture
def job(tmp_path):
    return write_example(
        tmp_path / "job", Example(rows=600, d=16, num_experts=4, chunk_rows=100, format="npy")
    )


def by_hand(directory, *arguments, **environment):
    """Start the script, in a session of its own."""
    commands = os.path.dirname(sys.executable)
    return subprocess.Popen(
        [WORKFLOWS / "cluster_by_hand.sh", *map(str, arguments)],
        env=os.environ
        | {"PATH": f"{commands}:{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY)}
        | {"SHARED": str(directory), "TMPDIR": str(directory)}
        | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def in_session(leader):
    """Processes that the script has started and that still run."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


@pytest.mark.slow
def test_a_cluster_by_hand_prints_what_run_prints(tmp_path, job):
    process = by_hand(tmp_path, job)
    code, printed, told = end(process)
    assert code == 0, told
    assert re.fullmatch(r".*out.npy: 600 rows in .*\nexperts: 4 of 4 were used; .*\n", printed)
    lines = told.splitlines()
    assert lines[-1].startswith("100 %, 600 of 600 rows")
    assert "workers: 2 running" in lines
    assert all(re.match(r"workers: |dashboard: http://127.0.0.1:|\d+ %", line) for line in lines)
    assert verify_job(load_job(job)).good
    assert not in_session(process.pid)

    code, printed, told = end(by_hand(tmp_path, job))
    assert (code, printed) == (1, "")
    (line,) = told.splitlines()
    assert "out.npy exists; --resume continues it, --overwrite starts again" in line


@pytest.mark.slow
def test_ctrl_c_on_a_cluster_by_hand(tmp_path):
    """Sent to the script alone, as a terminal does: what it starts has groups of its own."""
    sizes = {"rows": 6400, "d": 256, "num_experts": 2, "k": 1, "kind": "gated", "hidden": 4096}
    job = write_example(tmp_path / "job", Example(**sizes, format="npy"))
    process = by_hand(tmp_path, job, "--chunk-rows", 64)
    wait_for_blocks(load_job(job).out, 5, process)
    os.killpg(process.pid, signal.SIGINT)
    code, printed, told = end(process)
    assert (code, printed) == (1, "")
    assert "stopped;" in told
    assert "Traceback" not in told
    assert not in_session(process.pid)
    code, printed, told = end(by_hand(tmp_path, job, "--resume", WORKERS="1"))
    assert code == 0, told
    assert "were done before" in printed
    assert verify_job(load_job(job)).good


@pytest.mark.slow
def test_workers_by_hand_that_do_not_start_end_the_run(tmp_path, job):
    process = by_hand(tmp_path, job, MEMORY="a lot")
    code, printed, told = end(process)
    assert (code, printed) == (1, "")
    assert f"workers ended; the end of {tmp_path}/workers.log:" in told
    assert "Could not interpret" in told
    assert not in_session(process.pid)


@pytest.fixture(scope="module")
def manifest():
    """Give the resources of the manifest by kind and name."""
    documents = yaml.safe_load_all((WORKFLOWS / "kubernetes.yaml").read_text())
    return {(each["kind"], each["metadata"]["name"]): each for each in documents}


def _container(resource):
    (container,) = resource["spec"]["template"]["spec"]["containers"]
    return container


def test_kubernetes_each_resource_keeps_the_schema_of_its_kind(manifest):
    schema = pytest.importorskip("kubernetes_validate", reason="its schema is not installed")
    for resource in manifest.values():
        schema.validate(resource, KUBERNETES, strict=True)


def test_kubernetes_all_containers_have_one_image(manifest):
    pods = [resource for (kind, _), resource in manifest.items() if kind != "Service"]
    assert len({_container(pod)["image"] for pod in pods}) == 1


def test_kubernetes_labels_and_ports_meet(manifest):
    for kind, name in manifest:
        if kind == "Deployment":
            spec = manifest[kind, name]["spec"]
            labels = spec["template"]["metadata"]["labels"]
            assert spec["selector"]["matchLabels"].items() <= labels.items()
    service = manifest["Service", "dask-ep-scheduler"]["spec"]
    scheduler = manifest["Deployment", "dask-ep-scheduler"]["spec"]["template"]
    assert service["selector"].items() <= scheduler["metadata"]["labels"].items()
    offered = {(port["name"], port["port"]) for port in service["ports"]}
    ports = _container(manifest["Deployment", "dask-ep-scheduler"])["ports"]
    assert {(port["name"], port["containerPort"]) for port in ports} == offered


def test_kubernetes_everybody_calls_the_scheduler_by_its_service(manifest):
    address = "tcp://dask-ep-scheduler:8786"
    assert address in _container(manifest["Deployment", "dask-ep-worker"])["args"]
    assert address in _container(manifest["Job", "dask-ep-run"])["args"]


def test_kubernetes_workers_and_job_see_the_same_files(manifest):
    def data(resource):
        spec = resource["spec"]["template"]["spec"]
        claims = {
            volume["name"]: volume["persistentVolumeClaim"]["claimName"]
            for volume in spec["volumes"]
            if "persistentVolumeClaim" in volume
        }
        mounts = {
            mount["name"]: mount["mountPath"] for mount in _container(resource)["volumeMounts"]
        }
        return {(claim, mounts[name]) for name, claim in claims.items()}

    job = manifest["Job", "dask-ep-run"]
    assert data(job) == data(manifest["Deployment", "dask-ep-worker"]) != set()
    assert _container(job)["args"][0].startswith("/data/")


def test_kubernetes_a_worker_spills_before_its_pod_is_killed(manifest):
    worker = _container(manifest["Deployment", "dask-ep-worker"])
    (limit,) = [arg for arg in worker["args"] if arg.startswith("--memory-limit=")]
    assert int(limit.partition("=")[2].removesuffix("GiB")) < int(
        worker["resources"]["limits"]["memory"].removesuffix("Gi")
    )


def test_kubernetes_the_run_waits_for_all_workers_and_ranks_are_not_tied_to_them(manifest):
    args = _container(manifest["Job", "dask-ep-run"])["args"]
    replicas = manifest["Deployment", "dask-ep-worker"]["spec"]["replicas"]
    assert args[args.index("--workers") + 1] == str(replicas)
    assert "--world-size" not in args


def test_kubernetes_a_run_starts_again_unless_it_was_asked_wrongly(manifest):
    job = manifest["Job", "dask-ep-run"]["spec"]
    assert "--resume" in _container({"spec": job})["args"]
    fatal, evicted = job["podFailurePolicy"]["rules"]
    assert fatal["onExitCodes"]["values"] == [WRONG_USE]
    assert fatal["onExitCodes"]["containerName"] == _container({"spec": job})["name"]
    assert (fatal["action"], evicted["action"]) == ("FailJob", "Ignore")
    assert job["template"]["spec"]["restartPolicy"] == "Never", "or no policy is allowed"


def test_kubernetes_the_arguments_are_those_of_the_command(manifest):
    args = _container(manifest["Job", "dask-ep-run"])["args"]
    context = run_command.make_context("run", list(args))
    assert context.params["workers"] == 4


@pytest.mark.slow
def test_a_job_on_gpu_nodes_waits_for_its_workers(monkeypatch):
    monkeypatch.syspath_prepend(WORKFLOWS)
    gpu_cluster = importlib.import_module("gpu_cluster")
    monkeypatch.setattr(gpu_cluster, "WORKERS_SECONDS", 0.5)
    with LocalCluster(n_workers=1, processes=False, dashboard_address=":0") as cluster:
        gpu_cluster.wait_for_workers(cluster.scheduler_address, 1)
        with pytest.raises(TimeoutError, match="1/2 workers"):
            gpu_cluster.wait_for_workers(cluster.scheduler_address, 2)


def test_the_client_that_waits_for_gpu_nodes_starts_ucx_with_a_cuda_context(monkeypatch):
    monkeypatch.syspath_prepend(WORKFLOWS)
    gpu_cluster = importlib.import_module("gpu_cluster")
    contexts = []

    class Seen(Client):
        def __init__(self, address):
            contexts.append(dask.config.get("distributed-ucxx.create-cuda-context", False))
            super().__init__(address)

    monkeypatch.setattr(gpu_cluster, "Client", Seen)
    with LocalCluster(n_workers=1, processes=False, dashboard_address=":0") as cluster:
        gpu_cluster.wait_for_workers(cluster.scheduler_address, 1)
    assert contexts == [True]


def test_a_job_on_gpu_nodes_knows_how_many_workers_to_wait_for(monkeypatch, capsys):
    monkeypatch.syspath_prepend(WORKFLOWS)
    gpu_cluster = importlib.import_module("gpu_cluster")
    monkeypatch.setattr(gpu_cluster, "started", None)
    monkeypatch.setattr(sys, "argv", ["gpu_cluster.py", "job.toml", "--nodes", "localhost"])
    with pytest.raises(SystemExit):
        gpu_cluster.main()
    assert "give a job and --ranks, or --print" in capsys.readouterr().err
