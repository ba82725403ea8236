"""deploy/compose without an engine: schema, mounts, variables, and the command as the program reads it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tyro
import yaml
from nginx_process import TEMPLATE

from teacher_service.serve.config import ServeConfig

FOLDER = Path(__file__).parents[2] / "deploy/compose"
MONITORING = FOLDER.parent / "monitoring"
FILE = FOLDER / "compose.yaml"
VARIABLE = re.compile(r"\$\{(\w+)(?::[-?][^}]*)?\}")


def compose() -> dict:
    """The file with the example's variables."""
    values = example()
    text = "\n".join(line for line in FILE.read_text().splitlines() if not line.startswith("#"))
    return yaml.safe_load(VARIABLE.sub(lambda found: values[found[1]], text))


def example() -> dict[str, str]:
    lines = (FOLDER / ".env.example").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def mounts() -> list[str]:
    volumes = [volume for service in compose()["services"].values() for volume in service.get("volumes", ())]
    return sorted({each["source"] for each in volumes if each["type"] == "bind" and each["source"].startswith(".")})


def test_file_follows_the_compose_specification():
    done = subprocess.run(
        [Path(sys.executable).with_name("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", FILE],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


def test_example_has_every_variable_and_no_other():
    assert set(VARIABLE.findall(FILE.read_text())) == example().keys()


def test_defaults_are_the_examples_values():
    given = example()
    for name, value in re.findall(r"\$\{(\w+):-([^}]*)\}", FILE.read_text()):
        assert given[name] == value, name


@pytest.mark.parametrize("source", mounts())
def test_mounted_file_is_in_the_repository(source):
    path = (FOLDER / source).resolve()
    if path.is_relative_to(MONITORING) and not MONITORING.is_dir():
        pytest.skip("this checkout has no deploy/monitoring")
    assert path.exists()


def test_build_finds_its_dockerfile_and_target():
    build = compose()["services"]["teacher-service"]["build"]
    dockerfile = (FOLDER / build["context"] / build["dockerfile"]).resolve()
    assert re.search(rf"^FROM \S+ AS {build['target']}$", dockerfile.read_text(), re.MULTILINE)


def test_service_command_is_one_the_program_reads_and_drains_in_time():
    service = compose()["services"]["teacher-service"]
    command, *options = service["command"]
    assert command == "serve"
    config = tyro.cli(tyro.conf.OmitArgPrefixes[ServeConfig], args=options, config=(tyro.conf.FlagCreatePairsOff,))
    assert config.store in {volume["target"] for volume in service["volumes"]}
    assert config.tokens == Path("/run/secrets/tokens")
    assert service["secrets"] == ["tokens"]
    grace = float(service["stop_grace_period"].removesuffix("s"))
    assert grace > config.drain_delay + config.drain_seconds + 1


def test_nginx_is_given_every_variable_of_its_template_and_reaches_the_service():
    services = compose()["services"]
    environment = services["nginx"]["environment"]
    wanted = set(re.findall(r"\$\{(\w+)\}", TEMPLATE.read_text()))
    assert wanted == {name for name in environment if name.startswith("SCALEKD_")}
    host, _, port = environment["SCALEKD_UPSTREAM"].partition(":")
    assert f"--port={port}" in services[host]["command"]
    assert environment["SCALEKD_STORE"] in {volume["target"] for volume in services["nginx"]["volumes"]}


@pytest.mark.parametrize("name", compose()["services"])
def test_container_has_no_more_rights_than_it_needs(name):
    service = compose()["services"][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["mem_limit"]
    assert all(volume["read_only"] for volume in service["volumes"] if volume["type"] == "bind")
    assert not service.get("privileged")


def test_only_nginx_is_reached_from_other_machines():
    services = compose()["services"]
    public = {name for name, service in services.items() for port in service.get("ports", ()) if port.count(":") == 1}
    local = {
        name for name, service in services.items() for port in service.get("ports", ()) if port.startswith("127.0.0.1:")
    }
    assert (public, local) == ({"nginx"}, {"grafana"})
    assert "outside" not in services["teacher-service"]["networks"]
    assert compose()["networks"]["inside"] == {"internal": True}


def test_prometheus_asks_the_service_with_a_token_and_loads_the_mounted_rules():
    services = compose()["services"]
    config = yaml.safe_load((FOLDER / "prometheus.yaml").read_text())
    (job,) = config["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["teacher-service:8000"]}]
    assert job["authorization"]["credentials_file"] == f"/run/secrets/{services['prometheus']['secrets'][0]}"
    targets = {volume["target"] for volume in services["prometheus"]["volumes"]}
    assert set(config["rule_files"]) <= targets
    assert "--config.file=/etc/prometheus/prometheus.yaml" in services["prometheus"]["command"]


def test_jobs_of_the_rules_are_scraped():
    rules = MONITORING / "rules.yaml"
    if not rules.is_file():
        pytest.skip("this checkout has no deploy/monitoring")
    jobs = set(re.findall(r'job="([\w-]+)"', rules.read_text()))
    assert "scalekd-service" in jobs
    config = yaml.safe_load((FOLDER / "prometheus.yaml").read_text())
    assert {job["job_name"] for job in config["scrape_configs"]} <= jobs


def test_grafana_is_provisioned_with_that_prometheus_and_the_mounted_dashboards():
    services = compose()["services"]
    (source,) = yaml.safe_load((FOLDER / "grafana/datasources/prometheus.yaml").read_text())["datasources"]
    assert source["url"].removeprefix("http://").partition(":")[0] in services
    (provider,) = yaml.safe_load((FOLDER / "grafana/dashboards/scalekd.yaml").read_text())["providers"]
    assert provider["options"]["path"] in {volume["target"] for volume in services["grafana"]["volumes"]}
    for dashboard in MONITORING.glob("dashboards/*.json"):
        assert json.loads(dashboard.read_text())["panels"]


def test_secrets_are_files_that_git_ignores():
    secrets = compose()["secrets"]
    assert {Path(secret["file"]).parent.as_posix() for secret in secrets.values()} == {"secrets"}
    ignored = (FOLDER.parents[1] / ".gitignore").read_text().splitlines()
    assert {"deploy/compose/.env", "deploy/compose/secrets/"} <= set(ignored)
