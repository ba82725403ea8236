"""The Helm chart: values and examples without helm; rendered manifests where helm is installed."""

import base64
import hashlib
import http.server
import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_lines import DEPLOY
from jsonschema import Draft7Validator
from manifests import arguments, parse, pods, unknown_variables, validate

from teacher_service.serve.config import ServeConfig
from teacher_service.serve.tokens import TokenFile

CHART = DEPLOY / "helm" / "scalekd-cache"
MONITORING = DEPLOY / "monitoring"
EXAMPLES = {path.stem: path for path in sorted((CHART / "examples").glob("*.yaml"))}
VALUES = yaml.safe_load((CHART / "values.yaml").read_text())
SCHEMA = json.loads((CHART / "values.schema.json").read_text())
HELM = os.environ.get("HELM") or shutil.which("helm")
with_helm = pytest.mark.skipif(HELM is None, reason="helm is not installed: run deploy/check/helm.sh, or set HELM")


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Values as helm merges them: objects by key, anything else as a whole."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _merged(base[key], value) if both else value
    return merged


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_fits_the_schema(name: str) -> None:
    Draft7Validator.check_schema(SCHEMA)
    Draft7Validator(SCHEMA).validate(_merged(VALUES, yaml.safe_load(EXAMPLES[name].read_text())))


def _paths(values: dict[str, Any], schema: dict[str, Any], path: str = "") -> tuple[set[str], set[str]]:
    """Names of all values, and of all properties of the schema, down to where the schema leaves things open."""
    given, described = set(), set()
    for name, part in schema["properties"].items():
        described.add(path + name)
        if "properties" in part and isinstance(values.get(name), dict) and name != "resources":
            inner_given, inner_described = _paths(values[name], part, f"{path}{name}.")
            given, described = given | inner_given, described | inner_described
    return given | {path + name for name in values}, described


def test_schema_and_values_name_the_same() -> None:
    given, described = _paths(VALUES, SCHEMA)
    assert described - {"global"} == given


def test_the_store_has_to_be_given() -> None:
    (error,) = Draft7Validator(SCHEMA).iter_errors(VALUES)
    assert list(error.absolute_path) == ["store", "url"]


def test_files_are_those_of_monitoring() -> None:
    assert (CHART / "files" / "rules.yaml").resolve() == MONITORING / "rules.yaml"
    assert (CHART / "files" / "dashboards").resolve() == MONITORING / "dashboards"


def _helm(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    assert HELM is not None
    return subprocess.run([HELM, *command], capture_output=True, text=True, env={**os.environ, **environment})


def _render(values: Path, *options: str, **environment: str) -> dict[str, dict[str, Any]]:
    """Rendered manifests by kind and name."""
    run = _helm(
        "template", "features", str(CHART), "--namespace", "lab", "--values", str(values), *options, **environment
    )
    assert run.returncode == 0, run.stderr
    found = [manifest for manifest in yaml.safe_load_all(run.stdout) if manifest]
    return {f"{each['kind']} {each['metadata']['name']}": each for each in found}


def _one(manifests: dict[str, dict[str, Any]], kind: str) -> dict[str, Any]:
    (found,) = [each for each in manifests.values() if each["kind"] == kind]
    return found


def _serve(manifests: dict[str, dict[str, Any]]) -> ServeConfig:
    (argv,) = arguments(_one(manifests, "Deployment"))
    return parse(argv)


@pytest.fixture(scope="module")
def rendered() -> dict[str, dict[str, dict[str, Any]]]:
    return {name: _render(path) for name, path in EXAMPLES.items()}


@with_helm
def test_helm_lint_finds_nothing() -> None:
    for path in EXAMPLES.values():
        run = _helm("lint", str(CHART), "--strict", "--values", str(path))
        assert run.returncode == 0, run.stdout + run.stderr


@with_helm
@pytest.mark.parametrize("name", EXAMPLES)
def test_rendered_example_fits_kubernetes_schema_and_the_service_s_options(name: str, rendered: dict) -> None:
    for manifest in rendered[name].values():
        validate(manifest)
        assert unknown_variables(manifest) - {"AWS_REGION"} == set()
    config = _serve(rendered[name])
    values = _merged(VALUES, yaml.safe_load(EXAMPLES[name].read_text()))
    assert (config.store, config.workers, config.teacher or "") == (
        values["store"]["url"], values["workers"], values["teacher"]["name"],
    )  # fmt: skip
    pod = next(pods(_one(rendered[name], "Deployment")))
    assert pod["terminationGracePeriodSeconds"] > config.drain_delay + config.drain_seconds


@with_helm
def test_every_kind_is_rendered_by_the_production_example(rendered: dict) -> None:
    kinds = {manifest["kind"] for manifest in rendered["production"].values()}
    assert kinds == {
        "Deployment", "Service", "ServiceAccount", "Secret", "PersistentVolumeClaim", "Ingress", "HTTPRoute",
        "ConfigMap", "PodDisruptionBudget", "HorizontalPodAutoscaler", "NetworkPolicy", "ServiceMonitor",
        "PrometheusRule",
    }  # fmt: skip
    assert {manifest["kind"] for manifest in rendered["simple"].values()} == {
        "Deployment", "Service", "ServiceAccount", "Secret", "PodDisruptionBudget",
    }  # fmt: skip


@with_helm
def test_selectors_find_the_pods(rendered: dict) -> None:
    manifests = rendered["production"]
    labels = _one(manifests, "Deployment")["spec"]["template"]["metadata"]["labels"].items()
    for kind, path in (("Service", ["selector"]), ("PodDisruptionBudget", ["selector", "matchLabels"]),
                       ("NetworkPolicy", ["podSelector", "matchLabels"]),
                       ("Deployment", ["selector", "matchLabels"])):  # fmt: skip
        selector = _one(manifests, kind)["spec"]
        for key in path:
            selector = selector[key]
        assert selector.items() <= labels
    monitor = _one(manifests, "ServiceMonitor")["spec"]
    assert monitor["selector"]["matchLabels"].items() <= _one(manifests, "Service")["metadata"]["labels"].items()


@with_helm
def test_pods_run_without_privileges(rendered: dict) -> None:
    for manifests in rendered.values():
        pod = next(pods(_one(manifests, "Deployment")))
        (container,) = pod["containers"]
        assert pod["securityContext"]["runAsNonRoot"]
        assert not pod["automountServiceAccountToken"]
        security = container["securityContext"]
        assert security["readOnlyRootFilesystem"]
        assert not security["allowPrivilegeEscalation"]
        assert security["capabilities"] == {"drop": ["ALL"]}


@with_helm
def test_rules_and_dashboards_are_the_tested_ones(rendered: dict) -> None:
    rule = _one(rendered["production"], "PrometheusRule")
    assert rule["spec"] == yaml.safe_load((MONITORING / "rules.yaml").read_text())
    boards = [each["data"] for each in rendered["production"].values() if each["kind"] == "ConfigMap"]
    assert {name: json.loads(text) for board in boards for name, text in board.items()} == {
        path.name: json.loads(path.read_text()) for path in (MONITORING / "dashboards").iterdir()
    }


@with_helm
def test_pods_are_scaled_on_a_metric_of_the_service(rendered: dict) -> None:
    from teacher_service.serve.metrics import Metrics

    gauges = {family.name for family in Metrics().registry.collect() if family.type == "gauge"}
    for name, expected in (("live-teacher", "scalekd_queue_rows"), ("production", "scalekd_http_requests_in_work")):
        (metric,) = _one(rendered[name], "HorizontalPodAutoscaler")["spec"]["metrics"]
        assert metric["pods"]["metric"]["name"] == expected
        assert expected in gauges
        assert "replicas" not in _one(rendered[name], "Deployment")["spec"]


@with_helm
def test_the_scrape_s_token_is_one_the_service_accepts_with_scope_admin(rendered: dict, tmp_path: Path) -> None:
    manifests = rendered["production"]
    credentials = _one(manifests, "ServiceMonitor")["spec"]["endpoints"][0]["authorization"]["credentials"]
    clear = manifests[f"Secret {credentials['name']}"]["data"]
    (volume,) = [each for each in next(pods(_one(manifests, "Deployment")))["volumes"] if each["name"] == "tokens"]
    hashes = manifests[f"Secret {volume['secret']['secretName']}"]["data"]
    assert hashes.keys() == {"tokens.jsonl"}
    file = tmp_path / "tokens.jsonl"
    file.write_bytes(base64.b64decode(hashes["tokens.jsonl"]))
    file.chmod(0o440)
    tokens = TokenFile(file)
    found = {name: tokens.find(base64.b64decode(value).decode()) for name, value in clear.items()}
    assert {name: token and token.scopes for name, token in found.items()} == {
        "metrics": ("admin",), "vision-team": ("read",),
    }  # fmt: skip
    assert found[credentials["key"]].allows("admin")


@with_helm
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "/store/url"),
        ({"store": {"url": "/store/a.zarr"}}, "set persistence.existingClaim or persistence.create"),
        ({"store": {"url": "/data/a.zarr"}, "persistence": {"create": True}}, "expected a path below"),
        ({"store": {"url": "s3://b/a"}, "teacher": {"name": "test_vit"}, "workers": 2}, "expected 1 with teacher.name"),
        (
            {"store": {"url": "s3://b/a"}, "tokens": {"existingSecret": "t"}, "serviceMonitor": {"enabled": True}},
            "metricsKey",
        ),
        ({"store": {"url": "s3://b/a"}, "replica": 3}, "replica"),
        ({"store": {"url": "s3://b/a"}, "ingress": {"enabled": True}}, "hosts"),
    ],
)
def test_values_that_cannot_work_are_refused(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    path = tmp_path / "values.yaml"
    path.write_text(yaml.safe_dump(values))
    run = _helm("template", "features", str(CHART), "--values", str(path))
    assert run.returncode != 0
    assert message in run.stderr


def _group(name: str) -> dict[str, Any]:
    version = {"groupVersion": f"{name}/v1", "version": "v1"}
    return {"name": name, "versions": [version], "preferredVersion": version}


def _resources(version: str, **kinds: str) -> dict[str, Any]:
    resources = [{"name": name, "singularName": kind.lower(), "namespaced": True, "kind": kind, "verbs": ["get"]}
                 for kind, name in kinds.items()]  # fmt: skip
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version, "resources": resources}


class _ApiServer(http.server.BaseHTTPRequestHandler):
    """As much of a Kubernetes API as helm asks for to look up a Secret."""

    secrets: dict[str, dict[str, Any]]

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        secret = re.fullmatch(r"/api/v1/namespaces/lab/secrets/([\w-]+)", path)
        answers: dict[str, Any] = {
            "/version": {"major": "1", "minor": "34", "gitVersion": "v1.34.0"},
            "/api": {"kind": "APIVersions", "versions": ["v1"]},
            "/apis": {"kind": "APIGroupList", "apiVersion": "v1", "groups": [_group("apps"), _group("policy")]},
            "/api/v1": _resources("v1", Secret="secrets", Service="services", ServiceAccount="serviceaccounts"),
            "/apis/apps/v1": _resources("apps/v1", Deployment="deployments"),
            "/apis/policy/v1": _resources("policy/v1", PodDisruptionBudget="poddisruptionbudgets"),
        }
        answer = self.secrets.get(secret[1]) if secret else answers.get(path)
        missing = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404}
        body = json.dumps(answer or missing).encode()
        self.send_response(200 if answer else 404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[tuple[dict[str, dict[str, Any]], str]]:
    """Secrets of a pretended cluster, and the kubeconfig that leads there."""
    handler = type("Handler", (_ApiServer,), {"secrets": {}})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        config = tmp_path / "kubeconfig"
        config.write_text(yaml.safe_dump({
            "apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
            "users": [{"name": "u", "user": {}}],
        }))  # fmt: skip
        yield handler.secrets, str(config)
        server.shutdown()
        thread.join()


@with_helm
def test_tokens_are_kept_across_upgrades_and_a_removed_one_is_made_anew(
    cluster: tuple[dict[str, dict[str, Any]], str],
) -> None:
    secrets, kubeconfig = cluster

    def upgrade() -> tuple[dict[str, str], list[dict[str, Any]]]:
        manifests = _render(
            EXAMPLES["simple"], "--dry-run=server", "--disable-openapi-validation", KUBECONFIG=kubeconfig
        )
        made = {each["metadata"]["name"]: each for each in manifests.values() if each["kind"] == "Secret"}
        assert all(each["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep" for each in made.values())
        for name, secret in made.items():
            created = secrets.get(name, {}).get("metadata", {}).get("creationTimestamp", "2026-01-01T00:00:00Z")
            owner = {"meta.helm.sh/release-name": "features", "meta.helm.sh/release-namespace": "lab"}  # helm adds it
            metadata = {**secret["metadata"], "annotations": owner, "creationTimestamp": created}
            secrets[name] = {**secret, "metadata": metadata}
        clear = next(each["data"] for name, each in made.items() if name.endswith("-clients"))
        hashes = next(each["data"] for name, each in made.items() if name.endswith("-tokens"))["tokens.jsonl"]
        lines = [json.loads(line) for line in base64.b64decode(hashes).decode().splitlines()]
        return {name: base64.b64decode(value).decode() for name, value in clear.items()}, lines

    first, _ = upgrade()
    second, lines = upgrade()
    assert first == second
    assert {line["name"]: line["sha256"] for line in lines} == {
        name: hashlib.sha256(token.encode()).hexdigest() for name, token in first.items()
    }
    assert {line["created"] for line in lines} == {"2026-01-01T00:00:00Z"}
    name = next(name for name in secrets if name.endswith("-clients"))
    del secrets[name]["data"]["trainers"]  # rotation: kubectl patch removes the key, then helm upgrade
    third, _ = upgrade()
    assert third["metrics"] == first["metrics"]
    assert third["trainers"] != first["trainers"]
