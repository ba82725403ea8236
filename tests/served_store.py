"""A served store for tests: cached from noise images by a tiny teacher, asked in process or behind a real uvicorn."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
from tiny_jobs import TinyTeacher, cache_config, noise_samples, write_tar
from tiny_store import encoded

from feature_store.client import frames
from feature_store.format.manifest import TapInfo
from feature_store.read.blocks import read_blocks
from feature_store.store import Store, open_store
from feature_store.write.unit import EncodedUnit
from teacher_service.cache.job import cache
from teacher_service.serve.app import create_app
from teacher_service.serve.config import Limits, ServeConfig
from teacher_service.serve.service import Service
from teacher_service.serve.tokens import TokenFile, create_token

QUARANTINED = "u0-001"
COMMITTED_KEYS = ["u0-000", "u0-002", "u0-003", "u1-000", "u1-001"]
UNCOMMITTED_UNIT = 2
BROKEN = b"\x89PNG broken"


def make_store(folder: Path, teacher: TinyTeacher, **options: Any) -> Path:
    """Three units of two views: one with a quarantined sample, one whole, one written and not committed."""
    first = noise_samples("u0-", 4, 0)
    first[1]["png"] = BROKEN
    tars = [write_tar(folder / "0.tar", first)]
    tars += [write_tar(folder / f"{unit}.tar", noise_samples(f"u{unit}-", 2, unit)) for unit in (1, 2)]
    config = cache_config(tars, teacher, folder / "store.zarr", **{"views": 2, "policy": "a2", **options})
    cache(config)
    store = open_store(config.store)
    store.objects.delete(store.committed.record(UNCOMMITTED_UNIT, 0).path)
    return config.store


def make_wide_store(folder: Path, path: Path) -> Path:
    """A store as the one at the path, of its first unit only, with features of 50 KB a row."""
    small = open_store(path)
    taps = {"stage4": TapInfo(49, 512, "f16")}
    large = Store.create(folder / "wide.zarr", replace(small.manifest, taps=taps), read_blocks(small.objects))
    samples, views = small.manifest.tars[0].samples, small.manifest.num_views
    rng = np.random.default_rng(0)
    data = EncodedUnit(
        keys=small.keys(0),
        labels=small.labels(0),
        quarantined=small.quarantined(0),
        params=[small.view_params(0, view) for view in range(views)],
        pixel_crc=np.stack([small.pixel_crcs(0, view) for view in range(views)]),
        features=encoded(
            large.manifest,
            stage4=rng.standard_normal((views, samples, 49, 512), np.float32),
            logits=rng.standard_normal((views, samples, 4), np.float32),
        ),
    )
    large.write_unit(0, 0, data)
    return folder / "wide.zarr"


@dataclass(frozen=True)
class Answer:
    """What came back."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    def frame(self) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        return frames.decode(self.body)

    @property
    def problem(self) -> str:
        """The kind of problem; it must be a well-formed one."""
        assert self.headers["content-type"] == "application/problem+json", self
        document = self.json()
        assert document["status"] == self.status
        assert document["title"]
        assert document["detail"]
        return document["type"].removeprefix("urn:scalekd-cache:problem:")


def headers_of(named: Mapping[str, str]) -> list[tuple[str, str]]:
    """Headers by name, with a Host."""
    return list({"host": "127.0.0.1", **{name.lower(): value for name, value in named.items()}}.items())


class InProcess:
    """Asks an application as uvicorn would, without a socket: what is asked for is sent as it is."""

    def __init__(self, service: Service, tokens: TokenFile | None = None) -> None:
        self.service, self.app = service, create_app(service, tokens)
        self._runner = asyncio.Runner()

    def __call__(
        self,
        target: str,
        method: str = "GET",
        headers: Mapping[str, str] | list[tuple[str, str]] | None = None,
        body: bytes | list[bytes] = b"",
        json_body: Any = None,
    ) -> Answer:
        """The answer; headers as a list are sent as they are, without a Host of its own."""
        if json_body is not None:
            body, headers = json.dumps(json_body).encode(), {"content-type": "application/json", **(headers or {})}
        return self._runner.run(self.ask(target, method, {} if headers is None else headers, body))

    async def ask(
        self, target: str, method: str, headers: Mapping[str, str] | list[tuple[str, str]], body: bytes | list[bytes]
    ) -> Answer:
        raw_path, _, query = target.encode("latin-1").partition(b"?")
        chunks = [body] if isinstance(body, bytes) else list(body)
        pairs = headers if isinstance(headers, list) else headers_of(headers)
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http",
            "path": unquote(raw_path.decode("ascii")), "raw_path": raw_path, "query_string": query, "root_path": "",
            "headers": [(name.encode(), value.encode("latin-1")) for name, value in pairs],
            "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80), "state": {},
        }  # fmt: skip
        sent: list[dict] = []

        async def receive() -> dict:
            if chunks:
                return {"type": "http.request", "body": chunks.pop(0), "more_body": bool(chunks)}
            await asyncio.Event().wait()
            raise AssertionError

        async def send(message) -> None:
            sent.append({**message, "body": bytes(message.get("body", b""))})

        await self.app(scope, receive, send)
        found = {name.decode(): value.decode("latin-1") for name, value in sent[0]["headers"]}
        return Answer(sent[0]["status"], found, b"".join(message["body"] for message in sent[1:]))

    def memory_comes_back(self) -> bool:
        """Whether no answer takes memory any more, as soon as pool threads have let go of what they made."""
        deadline = time.monotonic() + 5
        while self.service.memory.used and time.monotonic() < deadline:
            time.sleep(0.01)
        return self.service.memory.used == 0

    def close(self) -> None:
        self._runner.close()


def in_process(store: Path, *, tokens: Path | None = None, limits: Limits | None = None, **options: Any) -> InProcess:
    """A loaded service on a store."""
    config = ServeConfig(store=str(store), tokens=tokens, **options)
    service = Service(replace(config, limits=limits) if limits else config)
    service.load()
    return InProcess(service, TokenFile(tokens) if tokens else None)


def make_tokens(file: Path) -> dict[str, str]:
    """A token per scope, by scope."""
    return {scope: create_token(file, scope, (scope,)) for scope in ("read", "compute", "admin")}


@dataclass
class Running:
    """A service in a process of its own."""

    process: subprocess.Popen
    url: str
    log: Path

    def get(self, target: str, **headers: str) -> Answer:
        request = urllib.request.Request(self.url + target, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return Answer(answer.status, {k.lower(): v for k, v in answer.headers.items()}, answer.read())
        except urllib.error.HTTPError as error:
            with error:
                return Answer(error.code, {k.lower(): v for k, v in error.headers.items()}, error.read())

    def wait_until_ready(self) -> None:
        end = time.monotonic() + 60
        while not self._is_ready():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.05)

    def _is_ready(self) -> bool:
        try:
            return self.get("/readyz").status == 200
        except TimeoutError:  # of a busy machine
            return False

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@contextmanager
def running(store: Path, folder: Path, *arguments: str, warnings: str = "error", **env: str) -> Iterator[Running]:
    """``teacher-service serve`` on a free port; killed at the end if it still runs."""
    log = folder / "log.txt"
    command = [sys.executable, "-W", warnings, "-m", "teacher_service", "serve", "--store", str(store), "--port", "0"]
    with log.open("w") as out:
        process = subprocess.Popen([*command, *arguments], stdout=out, stderr=out, env={**os.environ, **env})
    try:
        end = time.monotonic() + 60
        while '"url"' not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end
            time.sleep(0.02)
        yield Running(process, json.loads(log.read_text().splitlines()[0])["url"], log)
    finally:
        process.kill()
        process.wait()
