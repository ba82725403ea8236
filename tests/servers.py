"""Servers on loopback: S3 by moto, and a plain web server with ranges that can be told to fail."""

import http.client
import http.server
import itertools
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import uvicorn

_buckets = itertools.count()


@contextmanager
def s3_server() -> Iterator[Callable[[], str]]:
    """A running server; what it gives makes a new bucket and returns its URL."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    patch = pytest.MonkeyPatch()
    for name, value in {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
    }.items():
        patch.setenv(name, value)
    try:
        yield lambda: _make_bucket(host, port)
    finally:
        patch.undo()
        server.stop()


def _make_bucket(host: str, port: int) -> str:
    import http.client

    name = f"bucket-{next(_buckets)}"
    connection = http.client.HTTPConnection(host, port)
    connection.request("PUT", f"/{name}")
    assert connection.getresponse().status == 200
    connection.close()
    return f"s3://{name}"


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate of 127.0.0.1 that signs itself, and its key."""
    key, certificate = folder / "key.pem", folder / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "1",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    return certificate, key


class UvicornThread:
    """An ASGI application on a port of this process, in a thread."""

    def __init__(self, app: Any, **options: Any) -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        self.port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", **options))
        self.thread = threading.Thread(target=self.server.run, args=([listener],))
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    @contextmanager
    def raw(self, receive_bytes: int | None = None) -> Iterator[socket.socket]:
        """An open socket to it; with few receive_bytes, what it is sent stays with the sender."""
        with socket.socket() as connection:
            if receive_bytes:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
            connection.settimeout(20)
            connection.connect(("127.0.0.1", self.port))
            yield connection

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join(20)


class WebServer:
    """Serves a folder.

    ``failures`` answers so many requests with 503 first; ``requests`` counts what came, ``authorizations`` has
    what each brought; ``redirect`` is a server that all are sent on to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.failures, self.requests = folder, 0, []
        self.authorizations, self.redirect = [], ""
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self):
                self.do_GET()

            def do_GET(self):
                outer.authorizations.append(self.headers.get("Authorization"))
                outer.requests.append((self.command, self.path, self.headers.get("Range")))
                file = outer.folder / unquote(self.path).lstrip("/")
                if outer.failures:
                    outer.failures -= 1
                    self.answer(503, b"")
                elif outer.redirect:
                    self.answer(302, b"")
                elif "forbidden" in self.path:
                    self.answer(403, b"")
                elif not file.is_file():
                    self.answer(404, b"")
                else:
                    self.answer_with(file.read_bytes())

            def answer_with(self, content):
                wanted = self.headers.get("Range")
                if wanted is None:
                    return self.answer(200, content)
                first, _, last = wanted.removeprefix("bytes=").partition("-")
                start, stop = int(first), min(int(last) + 1, len(content))
                if start >= len(content):
                    return self.answer(416, b"", f"bytes */{len(content)}")
                return self.answer(206, content[start:stop], f"bytes {start}-{stop - 1}/{len(content)}")

            def answer(self, status, body, content_range=None):
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
                if content_range:
                    self.send_header("Content-Range", content_range)
                if status == 302:
                    self.send_header("Location", outer.redirect + self.path)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


class FlakyProxy:
    """Passes requests on to a server, but fails every so-manyth; ``failed`` counts those.

    It answers 503, hangs up before passing the request on, and hangs up after that, in turn.
    """

    def __init__(self, target: str, every: int) -> None:
        self.failed, self._count = 0, itertools.count(1)
        host = target.removeprefix("http://")
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                fails = next(outer._count) % every == 0
                outer.failed += fails
                self.close_connection = fails
                if fails and outer.failed % 3 == 0:
                    return self.send_error(503)
                if fails and outer.failed % 3 == 1:
                    return None
                connection = http.client.HTTPConnection(host)
                connection.request(self.command, self.path, body, dict(self.headers))
                answer = connection.getresponse()
                content = answer.read()
                connection.close()
                if fails:
                    return None
                self.send_response(answer.status)
                for name, value in answer.getheaders():
                    if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                        self.send_header(name, value)
                length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(content))
                self.send_header("Content-Length", length or "0")
                self.end_headers()
                self.wfile.write(content)
                return None

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any  # noqa: N815

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()
