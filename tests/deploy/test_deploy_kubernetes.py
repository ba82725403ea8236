"""Kubernetes jobs: schemas, command lines, and what makes them safe on spot nodes."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_lines import DEPLOY
from manifests import arguments, parse, pods, unknown_variables, validate
from training_world import make_world

from student_trainer.config import TrainConfig
from teacher_service.config import CacheConfig
from teacher_service.stopping import GRACE_SECONDS

FOLDER = DEPLOY / "kubernetes"
DOCUMENTS: dict[str, dict[str, Any]] = {
    f"{path.stem} {manifest['kind']}": manifest
    for path in sorted(FOLDER.glob("*.yaml"))
    for manifest in yaml.safe_load_all(path.read_text())
}
CACHE, RAY, TRAIN = (DOCUMENTS[name] for name in ("cache-job Job", "cache-rayjob RayJob", "train-job Job"))


def _parsed(manifest: dict[str, Any]) -> Any:
    (argv,) = arguments(manifest)
    return parse(argv)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_manifest_fits_kubernetes_own_schema(name: str) -> None:
    validate(DOCUMENTS[name])


def test_a_field_that_kubernetes_does_not_have_is_found() -> None:
    wrong = yaml.safe_load(yaml.safe_dump(CACHE))
    wrong["spec"]["template"]["spec"]["containers"][0]["imagePullPolice"] = "Always"
    with pytest.raises(Exception, match="imagePullPolice"):
        validate(wrong)
    wrong = yaml.safe_load(yaml.safe_dump(RAY))
    wrong["spec"]["shutdownAfterJobEnds"] = True
    with pytest.raises(Exception, match="shutdownAfterJobEnds"):
        validate(wrong)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_no_variable_is_set_that_nothing_reads(name: str) -> None:
    assert unknown_variables(DOCUMENTS[name]) == set()


def test_both_cache_jobs_are_one_job() -> None:
    job, ray = _parsed(CACHE), _parsed(RAY)
    assert isinstance(job, CacheConfig)
    assert (job.inputs, job.teacher, job.views, job.storage, job.compute, job.store, job.checkpoint) == (
        ray.inputs, ray.teacher, ray.views, ray.storage, ray.compute, ray.store, ray.checkpoint,
    )  # fmt: skip
    assert (job.sharing.engine, ray.sharing.engine) == ("local", "ray")


def test_training_reads_the_store_that_the_cache_job_writes_and_resumes() -> None:
    train, job = _parsed(TRAIN), _parsed(CACHE)
    assert isinstance(train, TrainConfig)
    assert (str(train.teacher.store), tuple(train.tars), train.resume) == (str(job.store), tuple(job.inputs.tars), True)
    assert train.expect.teacher == job.teacher.name.split(".")[0]


def test_torchrun_starts_as_many_processes_as_pods_have_gpus() -> None:
    (pod,) = pods(TRAIN)
    spec, container, service = TRAIN["spec"], pod["containers"][0], DOCUMENTS["train-job Service"]
    name, headless = TRAIN["metadata"]["name"], service["metadata"]["name"]
    script, gpus = container["args"][0], container["resources"]["limits"]["nvidia.com/gpu"]
    assert spec["completions"] == spec["parallelism"]
    assert f"--nnodes {spec['completions']} " in script
    assert f"--nproc-per-node {gpus} " in script
    address = f"--master-addr {name}-0.{headless} --master-port {service['spec']['ports'][0]['port']} "
    assert address in script
    assert pod["subdomain"] == headless
    assert service["spec"]["selector"] == {"job-name": name}


class Pod:
    """The container of the training job as a process of this machine, on a CPU and another run."""

    def __init__(self, index: int, script: str, log: Path) -> None:
        environment = {**os.environ, "JOB_COMPLETION_INDEX": str(index), "OMP_NUM_THREADS": "1"}
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
        with log.open("a") as out:
            self.process = subprocess.Popen(["bash", "-c", script], env=environment, stdout=out, stderr=out)

    def lose(self) -> None:
        """End all processes at once, as a lost node does."""
        for pid in _tree(self.process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


def _tree(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children")
    below = children.read_text().split() if children.exists() else []
    return [pid, *(each for child in below for each in _tree(int(child)))]


@pytest.mark.skipif(os.environ.get("SCALEKD_TEST_PODS") != "1", reason="takes minutes: run deploy/check/kubernetes.sh")
def test_a_training_run_goes_on_when_one_of_its_pods_is_lost(tmp_path: Path) -> None:
    world, run = make_world(tmp_path / "world"), tmp_path / "run"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = next(pods(TRAIN))["containers"][0]["args"][0].partition("student_trainer train ")[0]
    for old, new in (("scalekd-train-0.scalekd-train", "127.0.0.1"), ("29500", str(port)),
                     ("--nproc-per-node 8", "--nproc-per-node 1")):  # fmt: skip
        assert old in script
        script = script.replace(old, new)
    script += shlex.join(["student_trainer", "train", "--student", "test_resnet", "--epochs", "12", "--batch-size", "8",
                          "--workers", "0", "--device", "cpu", "--no-report", "--no-progress", "--run", str(run),
                          "--resume", "--tars", *world.tars, "--store", str(world.store)])  # fmt: skip
    log, metrics = tmp_path / "log", run / "metrics.jsonl"
    running, lost, ends = [Pod(0, script, log), Pod(1, script, log)], False, time.monotonic() + 240
    try:
        while any(pod.process.poll() != 0 for pod in running):
            assert time.monotonic() < ends, log.read_text()
            time.sleep(0.1)
            if not lost and metrics.is_file() and metrics.read_text().count('"epoch"') > 3:
                running[1].lose()
                lost = True
            if any(pod.process.poll() not in (None, 0) for pod in running):
                time.sleep(10)  # a Job's controller waits as long before it replaces failed pods
                for index, pod in enumerate(running):
                    if pod.process.poll() is not None:
                        running[index] = Pod(index, script, log)
    finally:
        for pod in running:
            pod.lose()
    assert lost
    assert {json.loads(line)["epoch"] for line in metrics.read_text().splitlines() if '"epoch"' in line} >= set(
        range(12)
    )


@pytest.mark.parametrize("job", [CACHE, TRAIN], ids=["cache", "train"])
def test_a_lost_node_is_no_failure_of_a_job(job: dict[str, Any]) -> None:
    assert job["spec"]["completionMode"] == "Indexed"
    assert {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]} in (
        job["spec"]["podFailurePolicy"]["rules"]
    )


@pytest.mark.parametrize("name", ["cache-job Job", "cache-rayjob RayJob", "train-job Job"])
def test_pods_have_time_to_stop_and_room_in_shared_memory(name: str) -> None:
    for pod in pods(DOCUMENTS[name]):
        container = pod["containers"][0]
        if "nvidia.com/gpu" not in container["resources"]["limits"]:
            continue  # the head of a Ray cluster
        assert pod["terminationGracePeriodSeconds"] > GRACE_SECONDS
        mounted = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert volumes[mounted["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
        assert volumes[mounted["/data"]]["persistentVolumeClaim"]["claimName"] == "scalekd-data"


def test_workers_are_fewer_than_the_cores_asked_for() -> None:
    workers = {name: _parsed(job).compute.workers for name, job in (("cache", CACHE), ("ray", RAY))}
    workers["train"] = _parsed(TRAIN).workers
    for name, manifest, processes in (("cache", CACHE, 1), ("ray", RAY, 1), ("train", TRAIN, 8)):
        resources = [container["resources"] for pod in pods(manifest) for container in pod["containers"]]
        cores = {int(each["requests"]["cpu"]) for each in resources if "nvidia.com/gpu" in each["limits"]}
        assert cores == {processes * (workers[name] + 1)}, name


def test_the_readme_lists_every_file() -> None:
    listed = re.findall(r"^\| `([\w-]+\.yaml)`", (FOLDER / "README.md").read_text(), re.MULTILINE)
    assert listed == sorted(path.name for path in Path(FOLDER).glob("*.yaml"))
