"""What may be had without a token: nothing, however a path is spelt."""

import pytest
from served_store import make_store, make_tokens, running
from test_serve_process import ask_raw


@pytest.fixture(scope="module")
def guarded(tmp_path_factory, tiny_swin):
    folder = tmp_path_factory.mktemp("guarded")
    secrets = make_tokens(folder / "tokens")
    with running(make_store(folder, tiny_swin), folder, "--tokens", str(folder / "tokens")) as started:
        started.wait_until_ready()
        yield started, secrets
        assert started.stop() == 0
        assert "Traceback" not in started.log.read_text()


def ask(url, method, target, *headers):
    lines = [method + b" " + target + b" HTTP/1.1", b"Host: localhost", b"Connection: close", *headers]
    return ask_raw(url, b"\r\n".join([*lines, b"", b""]))


TARGETS = [
    b"/v1/zarr/../manifest", b"//v1/manifest", b"/livez/../v1/manifest", b"/livez/%2e%2e/v1/manifest",
    b"/./v1/manifest",
    b"/v1%2fmanifest", b"/v1%252fmanifest", b"/V1/manifest", b"/v1/Manifest", b"/v1/manifest/", b"/v1/manifest%00",
    b"/livez%00/../v1/manifest", b"/v1\\manifest", b"/livez\\..\\v1\\manifest", b"/livez;/v1/manifest",
    b"/v1/manifest;x",
    b"/v1/manifest%3f", b"/v1/manifest#x", b"/v1/%6danifest", b"/v1/zarr/zarr.json", b"/v1/zarr/%7aarr.json",
    b"/v1/browse/summary", b"/v1/browse/../../livez", b"/metrics", b"/metrics/", b"/openapi.json", b"/openapi.json/",
    b"/docs", b"/redoc", b"/v1/%ef%bc%8fmanifest", b"/v1%e2%88%95manifest", b"/v1%c0%afmanifest",
    b"http://localhost/v1/manifest", b"http://localhost//v1/manifest", b"http://x@localhost/v1/manifest",
    b"https://elsewhere/livez/../v1/manifest", b"//livez/v1/manifest",
    b"/livez?/../v1/manifest#/v1/manifest", b"/page.js/../v1/manifest",
]  # fmt: skip


@pytest.mark.parametrize(
    "method", [b"GET", b"HEAD", b"OPTIONS", b"TRACE", b"POST", b"PUT", b"DELETE", b"get", b"PROPFIND"]
)
def test_nothing_is_answered_without_a_token_however_a_path_is_spelt(guarded, method):
    started, _ = guarded
    for target in TARGETS:
        answer = ask(started.url, method, target)
        status = answer.split(b" ", 2)[1]
        public = target.startswith(b"/livez?")
        assert status in ((b"200", b"400", b"405") if public else (b"400", b"401")), (target, answer[:300])
        for secret in (b"identity", b"fingerprint", b"zarr_format", b"scalekd_", b"paths"):
            assert secret not in answer, (target, answer[:300])


def test_a_token_counts_only_as_the_one_authorization_header(guarded):
    started, secrets = guarded
    good = secrets["read"].encode()
    for scheme in (b"Bearer ", b"bearer ", b"BEARER "):
        assert ask(started.url, b"GET", b"/v1/manifest", b"Authorization: " + scheme + good).startswith(b"HTTP/1.1 200")
    refused = [
        [b"Authorization: Bearer skc_wrong", b"Authorization: Bearer " + good],
        [b"Authorization: Basic " + good], [b"Authorization: " + good], [b"Authorization: Bearer"],
        [b"Authorization: Bearer " + good[:-1]], [b"Authorization: Bearer " + good + b"x"],
        [b"Authorization: Bearer " + b"a" * 7000], [b"Authorization: Bearer \xff\xfe\x80"],
        [b"Authorization: Bearer " + good + b", Bearer " + good], [b"X-Authorization: Bearer " + good],
        [b"Authorization: Bearer " + good.swapcase()],
    ]  # fmt: skip
    for headers in refused:
        answer = ask(started.url, b"GET", b"/v1/manifest", *headers)
        assert answer.startswith((b"HTTP/1.1 401", b"HTTP/1.1 400")), (headers, answer[:200])
        assert b"identity" not in answer
