"""deploy/nginx for real: TLS, tokens, ranges, the 410 rule, limits, slow clients."""

import http.client
import json
import re
import shutil
import socket
import ssl
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from nginx_process import BINARY, running_nginx
from servers import make_certificate
from service_process import running_service
from tiny_store import tiny_store

from feature_store.client.connection import connect
from feature_store.store import open_store
from teacher_service.serve.tokens import create_token

pytestmark = pytest.mark.skipif(BINARY is None, reason="nginx is not installed (apt-get install nginx-light)")
SHARD, UNCOMMITTED = "taps/stage4/c/0/0/0/0", "taps/stage4/c/0/2/0/0"


class Proxied:
    """A service over a store of which one unit is not committed, behind nginx."""

    def __init__(self, folder: Path, store: Path, service: str, ports: tuple[int, int], tokens: dict[str, str]) -> None:
        self.folder, self.store, self.service, self.tokens = folder, store, service, tokens
        self.http, self.https = ports
        self.tls = ssl.create_default_context(cafile=str(folder / "cert.pem"))

    def ask(
        self, path: str, method: str = "GET", token: str | None = "read", body: bytes | None = None, **headers: str
    ):
        """Status, headers and body of a request over TLS."""
        connection = http.client.HTTPSConnection("127.0.0.1", self.https, context=self.tls, timeout=20)
        if token is not None:
            headers["Authorization"] = f"Bearer {self.tokens[token]}"
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        body = response.read()
        connection.close()
        return response.status, response.headers, body

    @contextmanager
    def raw(self):
        """A TLS connection to write bytes to."""
        with (
            socket.create_connection(("127.0.0.1", self.https), 10) as plain,
            self.tls.wrap_socket(plain, server_hostname="127.0.0.1") as connection,
        ):
            yield connection

    def sent_by_the_service(self, route: str) -> float:
        """Bytes of bodies the service has sent for a route."""
        connection = http.client.HTTPConnection(self.service.removeprefix("http://"))
        connection.request("GET", "/metrics", headers={"Authorization": f"Bearer {self.tokens['admin']}"})
        text = connection.getresponse().read().decode()
        connection.close()
        found = re.search(rf'scalekd_http_response_bytes_total{{route="{re.escape(route)}"}} (\S+)', text)
        return float(found[1]) if found else 0.0


@pytest.fixture(scope="module")
def proxied(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nginx")
    store = tiny_store(folder / "store").path
    opened = open_store(store)
    opened.objects.delete(opened.committed.record(2, 0).path)
    tokens = {scope: create_token(folder / "tokens.jsonl", scope, (scope,)) for scope in ("read", "admin")}
    certificate = make_certificate(folder)
    quick = {
        "client_header_timeout 10s": "client_header_timeout 1s",
        "client_body_timeout 20s": "client_body_timeout 1s",
    }
    with (
        running_service(store, "--tokens", str(folder / "tokens.jsonl"), "--refresh-seconds", "0") as service,
        running_nginx(folder, service.url.removeprefix("http://"), store, certificate, quick) as ports,
    ):
        yield Proxied(folder, store, service.url, ports, tokens)


def test_plain_http_is_sent_to_https(proxied):
    connection = http.client.HTTPConnection("127.0.0.1", proxied.http, timeout=20)
    connection.request("GET", "/v1/manifest?x=1", headers={"Host": "127.0.0.1"})
    response = connection.getresponse()
    assert (response.status, response.headers["Location"]) == (308, "https://127.0.0.1/v1/manifest?x=1")
    connection.close()


def test_old_tls_is_refused(proxied):
    old = ssl.create_default_context(cafile=str(proxied.folder / "cert.pem"))
    old.set_ciphers("DEFAULT:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1"):
        old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    with socket.create_connection(("127.0.0.1", proxied.https), 5) as plain, pytest.raises((ssl.SSLError, OSError)):
        old.wrap_socket(plain, server_hostname="127.0.0.1")


def test_client_reads_rows_through_tls_with_its_token(proxied, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(proxied.folder / "cert.pem"))
    client = connect(f"https://127.0.0.1:{proxied.https}", proxied.tokens["read"])
    assert client.rows(["key/1-0"], view=1)["stage4"].shape == (1, 4, 6)


@pytest.mark.parametrize("path", ["/v1/manifest", f"/v1/zarr/{SHARD}", f"/v1/zarr/{UNCOMMITTED}"])
def test_request_without_a_token_is_refused_with_the_services_problem(proxied, path):
    status, headers, body = proxied.ask(path, token=None)
    assert (status, json.loads(body)["type"]) == (401, "urn:scalekd-cache:problem:unauthorized")
    assert headers["WWW-Authenticate"].startswith("Bearer")


def test_metrics_are_not_there_from_outside(proxied):
    assert proxied.ask("/metrics", token="admin")[0] == 404


def test_probes_need_no_token(proxied):
    assert proxied.ask("/readyz", token=None)[0] == 200


def test_every_committed_shard_is_sent_by_nginx_as_its_file(proxied):
    before = proxied.sent_by_the_service("/v1/zarr/{path:path}")
    opened = open_store(proxied.store)
    paths = [path for unit in (0, 1) for path in opened.layout.object_paths(unit, range(2))]
    assert len(paths) > 20
    for path in paths:
        status, headers, body = proxied.ask(f"/v1/zarr/{path}")
        assert (status, body) == (200, (proxied.store / path).read_bytes()), path
        assert headers["ETag"] == proxied.ask(f"/v1/zarr/{path}", "HEAD")[1]["ETag"]
    assert proxied.sent_by_the_service("/v1/zarr/{path:path}") == before


def test_shard_has_the_services_tag_and_answers_to_it(proxied):
    _, direct, _ = proxied.ask(f"/v1/zarr/{SHARD}", If_None_Match='"another"')
    _, headers, _ = proxied.ask(f"/v1/zarr/{SHARD}")
    assert headers["ETag"] == direct["ETag"]
    assert re.fullmatch('"[0-9a-f]{32}"', headers["ETag"])
    assert headers["Content-Type"] == "application/octet-stream"
    assert headers["Strict-Transport-Security"]
    assert proxied.ask(f"/v1/zarr/{SHARD}", If_None_Match=headers["ETag"])[0] == 304
    assert proxied.ask(f"/v1/zarr/{SHARD}", If_Match='"another"')[0] == 412


@pytest.mark.parametrize(
    ("asked", "start", "end"), [("bytes=0-9", 0, 10), ("bytes=5-", 5, None), ("bytes=-7", -7, None)]
)
def test_range_of_a_shard(proxied, asked, start, end):
    whole = (proxied.store / SHARD).read_bytes()
    status, headers, body = proxied.ask(f"/v1/zarr/{SHARD}", Range=asked)
    assert (status, body) == (206, whole[start:end])
    assert headers["Content-Range"].endswith(f"/{len(whole)}")


def test_range_beyond_a_shard_is_416(proxied):
    assert proxied.ask(f"/v1/zarr/{SHARD}", Range="bytes=999999-")[0] == 416


def test_uncommitted_object_is_404_though_its_file_is_there(proxied):
    assert (proxied.store / UNCOMMITTED).is_file()
    status, _, body = proxied.ask(f"/v1/zarr/{UNCOMMITTED}")
    assert (status, json.loads(body)["type"]) == (404, "urn:scalekd-cache:problem:not-found")


def test_committed_object_that_is_missing_is_410(proxied):
    kept = proxied.folder / "kept"
    shutil.move(proxied.store / SHARD, kept)
    try:
        status, _, body = proxied.ask(f"/v1/zarr/{SHARD}")
    finally:
        shutil.move(kept, proxied.store / SHARD)
    assert (status, json.loads(body)["type"]) == (410, "urn:scalekd-cache:problem:object-missing")


def test_committed_object_of_another_length_is_refused(proxied):
    file = proxied.store / SHARD
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    try:
        status, _, body = proxied.ask(f"/v1/zarr/{SHARD}")
    finally:
        file.write_bytes(whole)
    assert (status, json.loads(body)["type"]) == (500, "urn:scalekd-cache:problem:corrupt-store")


def test_symbolic_link_in_place_of_a_shard_is_not_followed(proxied):
    file, kept = proxied.store / SHARD, proxied.folder / "kept"
    shutil.move(file, kept)
    file.symlink_to(kept)
    try:
        status, _, _ = proxied.ask(f"/v1/zarr/{SHARD}")
    finally:
        file.unlink()
        shutil.move(kept, file)
    assert status == 410


def test_store_that_was_moved_away_is_503(proxied):
    away = proxied.store.with_name("away")
    proxied.store.rename(away)
    try:
        status, _, body = proxied.ask(f"/v1/zarr/{SHARD}")
    finally:
        away.rename(proxied.store)
    assert (status, json.loads(body)["type"]) == (503, "urn:scalekd-cache:problem:not-ready")


@pytest.mark.parametrize(
    "path", ["../tokens.jsonl/c/0", "%2e%2e/tokens.jsonl/c/0", "taps/..%2f..%2fc/0", "taps//stage4/c/0/0/0/0", "c/0"]
)
def test_path_out_of_the_store_is_not_served(proxied, path):
    assert proxied.ask(f"/v1/zarr/{path}")[0] in (400, 404)


def test_service_may_not_be_asked_by_the_internal_paths(proxied):
    assert {proxied.ask(path)[0] for path in ("/.committed", "/.service")} == {404}


def test_body_above_the_limit_is_refused_by_its_length(proxied):
    with proxied.raw() as connection:
        connection.sendall(
            b"POST /v1/rows:batch HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            b"Content-Length: 67108865\r\n\r\n"
        )
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize("part", [
    b"GET /readyz HTTP/1.1\r\nHost: 127.0.0.1\r\n",
    b"POST /v1/rows:batch HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100\r\n\r\n{",
])  # fmt: skip
def test_client_that_stops_halfway_is_let_go_while_others_are_answered(proxied, part):
    begun = time.monotonic()
    with proxied.raw() as connection:
        connection.sendall(part)
        assert proxied.ask("/readyz", token=None)[0] == 200
        answer = connection.recv(1000)  # limits of a second here, see the fixture
        assert answer == b"" or b" 408 " in answer
    assert 0.9 < time.monotonic() - begun < 8


def test_access_log_is_json_without_query_or_token(proxied):
    proxied.ask("/v1/rows/key%2F0-0?view=0&secret=1")
    lines = [json.loads(line) for line in (proxied.folder / "access.log").read_text().splitlines()]
    assert {"request_id", "client", "method", "path", "status"} <= lines[-1].keys()
    text = (proxied.folder / "access.log").read_text()
    assert "secret" not in text
    assert "skc_" not in text
