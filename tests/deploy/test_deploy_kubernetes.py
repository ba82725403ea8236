"""Kubernetes jobs: schemas, command lines, and what makes them safe on spot nodes."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_lines import DEPLOY
from manifests import arguments, parse, pods, unknown_variables, validate

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
    script = pod["containers"][0]["args"][0]
    spec = TRAIN["spec"]
    assert re.search(r"--nnodes (\d+)", script)[1] == str(spec["completions"]) == str(spec["parallelism"])
    gpus = pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
    assert re.search(r"--nproc-per-node (\d+)", script)[1] == str(gpus)
    service = DOCUMENTS["train-job Service"]
    host = f"{TRAIN['metadata']['name']}-0.{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    assert f"--rdzv-endpoint {host} " in script
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": TRAIN["metadata"]["name"]}


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
