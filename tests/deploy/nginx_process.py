"""A real nginx with deploy/nginx's configuration before a service, on free ports of loopback."""

import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

TEMPLATE = Path(__file__).parents[2] / "deploy/nginx/teacher-service.conf.template"
BINARY = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
_MAIN = """
daemon off;
{user}
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{ worker_connections 256; }}
http {{
    client_body_temp_path {folder}/bodies;
    proxy_temp_path {folder}/proxied;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    include {folder}/teacher-service.conf;
}}
"""


def rendered(values: Mapping[str, object]) -> str:
    """The template as envsubst leaves it: variables that are given, replaced; nginx's own, kept."""
    return re.sub(r"\$\{(\w+)\}", lambda found: str(values.get(found[1], found[0])), TEMPLATE.read_text())


def write_configuration(folder: Path, values: Mapping[str, object], changes: Mapping[str, str]) -> Path:
    """The main configuration file; changes replace text of the template, which must hold it."""
    text = rendered(values)
    for old, new in changes.items():
        assert old in text, old
        text = text.replace(old, new)
    (folder / "teacher-service.conf").write_text(text)
    main = folder / "nginx.conf"
    main.write_text(_MAIN.format(folder=folder, user="user root;" if os.geteuid() == 0 else ""))
    return main


def free_port() -> int:
    """A port that is free now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


@contextmanager
def running_nginx(
    folder: Path, upstream: str, store: Path, certificate: tuple[Path, Path], changes: Mapping[str, str] | None = None
) -> Iterator[tuple[int, int]]:
    """nginx as the template configures it; gives its ports for http and https."""
    assert BINARY is not None
    http, https = free_port(), free_port()
    values = {
        "SCALEKD_UPSTREAM": upstream, "SCALEKD_SERVER_NAME": "127.0.0.1", "SCALEKD_STORE": store,
        "SCALEKD_TLS_CERT": certificate[0], "SCALEKD_TLS_KEY": certificate[1],
        "SCALEKD_HTTP_PORT": f"127.0.0.1:{http}", "SCALEKD_HTTPS_PORT": f"127.0.0.1:{https}",
        "SCALEKD_ACCESS_LOG": folder / "access.log",
    }  # fmt: skip
    main = write_configuration(folder, values, changes or {})
    command = [BINARY, "-p", str(folder), "-c", str(main), "-e", str(folder / "error.log")]
    subprocess.run([*command, "-t"], check=True, capture_output=True)
    with (folder / "stderr.log").open("w") as log:
        process = subprocess.Popen(command, stderr=log)
    try:
        _wait_for(https, process)
        yield http, https
    finally:
        process.terminate()
        assert process.wait(10) == 0


def _wait_for(port: int, process: subprocess.Popen) -> None:
    for _ in range(200):
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            assert process.poll() is None
            time.sleep(0.02)
        else:
            return
    raise AssertionError("nginx does not listen")
