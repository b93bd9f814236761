"""The recipes for clusters: the script by hand runs, and the Kubernetes manifest fits together."""

import importlib
import os
import subprocess
import sys

import dask
import kubernetes_validate
import pytest
import yaml
from distributed import Client, LocalCluster

from dask_ep.example import Example, write_example
from dask_ep.job import load_job
from dask_ep.verify import verify_job
from tests.cluster_processes import DEADLINE, REPOSITORY

WORKFLOWS = REPOSITORY / "workflows"
KUBERNETES = "1.33"
"""The version whose schema the manifest keeps."""


def test_a_cluster_by_hand(tmp_path):
    job = write_example(tmp_path / "job", Example(rows=600, d=16, num_experts=4, chunk_rows=100))
    commands = os.path.dirname(sys.executable)
    ran = subprocess.run(
        [WORKFLOWS / "cluster_by_hand.sh", job],
        env=os.environ
        | {"PATH": f"{commands}:{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY)}
        | {"SHARED": str(tmp_path), "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert "out.zarr: 600 rows in" in ran.stdout
    assert "dashboard: http://127.0.0.1:" in ran.stderr
    assert "100 %, 600 of 600 rows" in ran.stderr
    assert verify_job(load_job(job)).good


@pytest.fixture(scope="module")
def manifest():
    """Give the resources of the manifest by kind and name."""
    documents = yaml.safe_load_all((WORKFLOWS / "kubernetes.yaml").read_text())
    return {(each["kind"], each["metadata"]["name"]): each for each in documents}


def _container(resource):
    (container,) = resource["spec"]["template"]["spec"]["containers"]
    return container


def test_kubernetes_each_resource_keeps_the_schema_of_its_kind(manifest):
    for resource in manifest.values():
        kubernetes_validate.validate(resource, KUBERNETES, strict=True)


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


def test_kubernetes_one_rank_per_worker(manifest):
    args = _container(manifest["Job", "dask-ep-run"])["args"]
    replicas = manifest["Deployment", "dask-ep-worker"]["spec"]["replicas"]
    assert args[args.index("--world-size") + 1] == str(replicas)


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


def test_a_job_on_gpu_nodes_is_told_how_many_workers_to_wait_for(monkeypatch, capsys):
    monkeypatch.syspath_prepend(WORKFLOWS)
    gpu_cluster = importlib.import_module("gpu_cluster")
    monkeypatch.setattr(gpu_cluster, "started", None)
    monkeypatch.setattr(sys, "argv", ["gpu_cluster.py", "job.toml", "--nodes", "localhost"])
    with pytest.raises(SystemExit):
        gpu_cluster.main()
    assert "give a job and --ranks, or --print" in capsys.readouterr().err
