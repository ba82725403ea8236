"""Alert rules and dashboards: against the code's metrics, promtool, and a real Prometheus."""

import json
import math
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from fastapi.testclient import TestClient
from forked_programs import Program
from prometheus_client.parser import text_string_to_metric_families
from promql_parser import AggregateExpr, BinaryExpr, MatchOp, VectorSelector, parse, walk
from served_store import make_store, make_tokens, running
from tiny_jobs import TinyTeacher, cache_config, encode_image, noise, write_tars
from tiny_store import tiny_manifest, tiny_store

from feature_store.store import open_store
from teacher_service.cache.decode import Task
from teacher_service.cache.job import cache
from teacher_service.cache.observers import Metrics
from teacher_service.cache.stage_timer import STAGES, StageTimes
from teacher_service.serve.app import create_app
from teacher_service.serve.config import ServeConfig
from teacher_service.serve.service import Service
from teacher_service.share.leases import open_leases

FOLDER = Path(__file__).parents[2] / "deploy" / "monitoring"
RULES = yaml.safe_load((FOLDER / "rules.yaml").read_text())
ALERTS = {rule["alert"]: rule for group in RULES["groups"] for rule in group["rules"]}
TARGET_LABELS = {"job", "instance"}
REQUESTS = 4
JOBS = ("scalekd-service", "scalekd-cache")


def _panels() -> Iterator[tuple[str, str]]:
    for path in sorted((FOLDER / "dashboards").glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel["targets"]:
                name = f"{path.stem}: {panel['title']} {target['refId']}"
                text = target["expr"].replace("$__rate_interval", "1m")
                yield name, text.replace("$job", path.stem).replace("$instance", ".*")


EXPRESSIONS = {**{name: rule["expr"] for name, rule in ALERTS.items()}, **dict(_panels())}


def _nodes(expression: str) -> list[Any]:
    found: list[Any] = []
    walk(parse(expression), found.append)
    return found


def _selectors(expression: str) -> list[VectorSelector]:
    return [node for node in _nodes(expression) if isinstance(node, VectorSelector)]


def _labels_by_sample(text: str) -> dict[str, set[str]]:
    samples: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            samples.setdefault(sample.name, set()).update(sample.labels)
    return samples


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Service:
    path = tmp_path_factory.mktemp("service") / "store"
    tiny_store(path)
    service = Service(ServeConfig(store=str(path)))
    service.load()
    return service


@pytest.fixture(scope="module")
def exposed(service: Service) -> dict[str, set[str]]:
    """Labels by sample name, as the service and a cache job expose them."""
    client = TestClient(create_app(service), base_url="http://localhost")
    assert client.get("/livez").status_code == 200
    with Metrics("127.0.0.1", 0, tiny_manifest(), [Task(0, range(1))]) as metrics:
        metrics.computed(1, StageTimes(dict.fromkeys(STAGES, 1.0), dict.fromkeys(STAGES, 2.0)))
        with urllib.request.urlopen(metrics.url, timeout=10) as response:
            job = response.read().decode()
    return {"up": set(), **_labels_by_sample(client.get("/metrics").text), **_labels_by_sample(job)}


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_every_metric_and_label_is_one_of_the_code(name: str, exposed: dict[str, set[str]]) -> None:
    selectors = _selectors(EXPRESSIONS[name])
    assert selectors
    labels = set(TARGET_LABELS)
    for selector in selectors:
        assert selector.name in exposed
        own = exposed[selector.name] | TARGET_LABELS
        assert {matcher.name for matcher in selector.matchers.matchers} <= own
        labels |= own
    for node in _nodes(EXPRESSIONS[name]):
        if isinstance(node, AggregateExpr) and node.modifier:
            assert set(node.modifier.labels) <= labels
        if isinstance(node, BinaryExpr) and node.modifier and node.modifier.matching:
            assert set(node.modifier.matching.labels) <= labels


def _known_values(service: Service) -> dict[str, list[str]]:
    app = create_app(service)
    paths = [*app.openapi()["paths"], "/v1/features:compute"]
    statuses = {"0"}
    for operations in app.openapi()["paths"].values():
        for operation in operations.values():
            statuses |= set(operation["responses"])
    return {"route": paths, "status": sorted(statuses), "stage": list(STAGES), "job": list(JOBS)}


def test_every_label_value_that_is_matched_can_occur(service: Service) -> None:
    known = _known_values(service)
    for name, expression in EXPRESSIONS.items():
        for selector in _selectors(expression):
            for matcher in selector.matchers.matchers:
                if matcher.name == "instance":
                    continue
                values = known[matcher.name]
                if matcher.op in (MatchOp.Equal, MatchOp.NotEqual):
                    assert matcher.value in values, name
                else:
                    for part in matcher.value.split("|"):
                        assert any(re.fullmatch(part, value) for value in values), (name, part)


def test_every_label_in_an_alert_s_text_is_kept_by_its_expression() -> None:
    for name, rule in ALERTS.items():
        used = set(re.findall(r"\$labels\.(\w+)", json.dumps(rule["annotations"])))
        kept = {label for node in _nodes(rule["expr"]) if isinstance(node, AggregateExpr) and node.modifier
                for label in node.modifier.labels}  # fmt: skip
        aggregates = any(isinstance(node, AggregateExpr) for node in _nodes(rule["expr"]))
        assert used <= (kept if aggregates else TARGET_LABELS), name


def test_the_runbook_has_a_section_for_each_alarm_and_no_other() -> None:
    sections = re.findall(r"^### (\w+)$", (FOLDER / "README.md").read_text(), re.MULTILINE)
    assert sections == list(dict.fromkeys(sections))
    assert set(sections) == set(ALERTS)


def test_every_alarm_has_unit_tests_in_which_it_fires_and_one_in_which_it_is_silent() -> None:
    cases = [case for test in yaml.safe_load((FOLDER / "rules.test.yaml").read_text())["tests"]
             for case in test["alert_rule_test"]]  # fmt: skip
    assert {case["alertname"] for case in cases if case.get("exp_alerts")} == set(ALERTS)
    assert sum("exp_alerts" not in case for case in cases) >= 5


def test_the_committed_dashboards_are_what_the_script_writes(tmp_path: Path) -> None:
    script = tmp_path / "make_dashboards.py"
    shutil.copy(FOLDER / "make_dashboards.py", script)
    subprocess.run([sys.executable, script], check=True)
    made = {path.name: path.read_text() for path in (tmp_path / "dashboards").iterdir()}
    assert made == {path.name: path.read_text() for path in (FOLDER / "dashboards").iterdir()}


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (apt package prometheus)")
def test_promtool_accepts_the_configuration_and_the_rules_pass_their_tests() -> None:
    for command in (["check", "config", "prometheus.yaml"], ["test", "rules", "rules.test.yaml"]):
        (FOLDER / "metrics.token").touch()  # the configuration names it
        try:
            run = subprocess.run(["promtool", *command], cwd=FOLDER, capture_output=True, text=True)
        finally:
            (FOLDER / "metrics.token").unlink()
        assert run.returncode == 0, run.stdout + run.stderr


class Prometheus:
    """A running server."""

    def __init__(self, url: str) -> None:
        self.url = url

    def get(self, path: str, **parameters: str) -> Any:
        with urllib.request.urlopen(f"{self.url}{path}?{urllib.parse.urlencode(parameters)}", timeout=20) as response:
            return json.loads(response.read())["data"]

    def query(self, expression: str) -> list[float]:
        """The values of an instant vector."""
        return [float(sample["value"][1]) for sample in self.get("/api/v1/query", query=expression)["result"]]

    def wait_for(self, expression: str) -> None:
        """Wait until an expression returns something."""
        _until(lambda: bool(self.query(expression)), expression)


def _until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.1)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def _prometheus(folder: Path, service: str, token: str, cache_port: int) -> Iterator[Prometheus]:
    """The committed configuration with other addresses and a short interval."""
    config = yaml.safe_load((FOLDER / "prometheus.yaml").read_text())
    config["global"] = {"scrape_interval": "500ms", "evaluation_interval": "1s"}
    addresses = {"scalekd-service": service.removeprefix("http://"), "scalekd-cache": f"127.0.0.1:{cache_port}"}
    for job in config["scrape_configs"]:
        job["static_configs"][0]["targets"] = [addresses[job["job_name"]]]
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    shutil.copy(FOLDER / "rules.yaml", folder)
    (folder / "metrics.token").write_text(token)
    port = _free_port()
    command = ["prometheus", f"--config.file={folder}/prometheus.yaml", f"--storage.tsdb.path={folder}/data",
               f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"]  # fmt: skip
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        server = Prometheus(f"http://127.0.0.1:{port}")
        _until(lambda: _answers(server.url + "/-/ready"), (folder / "prometheus.log").read_text())
        yield server
    finally:
        process.terminate()
        process.wait(20)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except OSError:
        return False


@contextmanager
def _cache_process(folder: Path, teacher: TinyTeacher, port: int) -> Iterator[Callable[[int], None]]:
    """A cache job that waits for units 2 and 3, whose leases are held here; gives what releases one."""
    tars = write_tars(folder, 4, 4, 12, 4)
    store = folder / "cache.zarr"
    cache(cache_config(tars[:1], teacher, store, capacity=12))
    command = ["cache", *tars, *teacher.arguments, "--checkpoint",
               teacher.checkpoint, "--store", store, "--workers", "0", "--batch-size", "4", "--tap-codec", "f16",
               "--capacity", "12", "--metrics-port", str(port)]  # fmt: skip
    with open_leases(open_store(store).objects, 120) as leases:
        assert leases.take(2)
        assert leases.take(3)
        process = Program("teacher-service", command, folder)
        try:
            yield leases.release
            assert process.poll() is None, process.communicate()
            leases.release(3)
            _, errors = process.communicate(60)
            assert process.returncode == 0, errors
        finally:
            process.kill()


def _ask_for_everything(started: Any, store: Path, tokens: dict[str, str]) -> None:
    """Requests that end in every way the rules tell apart."""
    bearer = {"Authorization": f"Bearer {tokens['read']}"}
    compute = {"Authorization": f"Bearer {tokens['compute']}", "Content-Type": "image/png"}
    shard = min(store.glob("taps/stage4/c/0/*/*/*"))
    assert started.get("/v1/manifest").status == 401
    assert started.get("/v1/rows/u0-000?view=0", **bearer).status == 200
    json_body = {**bearer, "Content-Type": "application/json"}
    assert _post(started.url + "/v1/rows:batch", b'{"rows": [[0, 0, 0]]}', json_body) == 200
    assert _post(started.url + "/v1/features:compute", encode_image(noise()), compute) == 200
    away = shard.rename(store.parent / "shard")
    assert started.get(f"/v1/zarr/{shard.relative_to(store)}", **bearer).status == 410
    away.rename(shard)
    _invert(shard)
    assert started.get("/v1/rows/u0-000?view=0", **bearer).status == 500
    _invert(shard)
    store.rename(store.with_suffix(".away"))
    assert started.get("/readyz").status == 503
    assert started.get("/v1/rows/u0-000?view=0", **bearer).status == 503
    store.with_suffix(".away").rename(store)
    host, port = started.url.removeprefix("http://").split(":")
    head = "POST /v1/rows:batch HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 9\r\n"
    with ExitStack() as stack:  # as many requests as may be in work, none of which ends
        for _ in range(REQUESTS):
            unfinished = stack.enter_context(socket.create_connection((host, int(port))))
            unfinished.sendall(f"{head}Authorization: Bearer {tokens['read']}\r\n\r\n{{".encode())
        _until(lambda: started.get("/v1/manifest", **bearer).status == 429, "429")
    _until(lambda: started.get("/v1/manifest", **bearer).status == 200, "200")


def _invert(file: Path) -> None:
    """Change every byte in place: the service may hold the file open."""
    with file.open("r+b") as opened:
        content = opened.read()
        opened.seek(0)
        opened.write(bytes(byte ^ 255 for byte in content))


def _post(url: str, body: bytes, headers: dict[str, str]) -> int:
    with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=60) as response:
        return response.status


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed (apt package prometheus)")
def test_every_expression_returns_something_in_a_real_prometheus(tmp_path: Path, tiny_swin: TinyTeacher) -> None:
    store, cache_port = make_store(tmp_path, tiny_swin), _free_port()
    tokens = make_tokens(tmp_path / "tokens")
    options = ("--tokens", str(tmp_path / "tokens"), "--max-requests", str(REQUESTS), "--teacher", tiny_swin.name,
               "--checkpoint", str(tiny_swin.checkpoint), "--device", "cpu")  # fmt: skip
    (tmp_path / "cache").mkdir()
    with ExitStack() as stack:
        started = stack.enter_context(running(store, tmp_path, *options, warnings="default"))
        _until(lambda: _answers(started.url + "/readyz"), "the service is ready")
        prometheus = stack.enter_context(_prometheus(tmp_path, started.url, tokens["admin"], cache_port))
        release = stack.enter_context(_cache_process(tmp_path / "cache", tiny_swin, cache_port))
        # The last status that is asked for: a scrape that has it has all others. A rate needs two scrapes.
        refused = 'scalekd_http_requests_total{status="429"}'
        _ask_for_everything(started, store, tokens)
        prometheus.wait_for(refused)
        prometheus.wait_for("teacher_service_tasks_committed_total > 0")
        _ask_for_everything(started, store, tokens)
        release(2)
        prometheus.wait_for(f"increase({refused}[1m]) > 0")
        prometheus.wait_for("teacher_service_tasks_committed_total > 1")

        selectors = {selector.prettify().partition(" offset ")[0]
                     for expression in EXPRESSIONS.values() for selector in _selectors(expression)}  # fmt: skip
        assert [text for text in sorted(selectors) if not prometheus.query(text)] == []
        # A comparison drops what does not hold; with `bool` it is 0 or 1.
        whole = {name: re.sub(r"\s(==|!=|>=|<=|>|<)\s", r" \1 bool ", text) for name, text in EXPRESSIONS.items()}
        assert [name for name, text in whole.items() if not any(map(math.isfinite, prometheus.query(text)))] == []
        rules = [rule for group in prometheus.get("/api/v1/rules")["groups"] for rule in group["rules"]]
        assert {rule["name"]: rule["health"] for rule in rules} == dict.fromkeys(ALERTS, "ok")
        due = {"ScalekdStoreDamaged", "ScalekdInternalErrors"}  # pending at the next evaluation of the rules
        _until(
            lambda: due <= {one["labels"]["alertname"] for one in prometheus.get("/api/v1/alerts")["alerts"]}, "alerts"
        )
