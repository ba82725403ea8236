"""Calls to the service: when they are tried again, how long, and what their refusals become."""

import email.utils
import json
import pickle
import time
from http.client import RemoteDisconnected

import numpy as np
import pytest
from scripted_transport import Answered, ScriptedTransport, frame_of, in_turn

from feature_store.client.service import RetryPolicy, ServiceClient
from feature_store.errors import (
    CorruptStoreError,
    InputError,
    QuarantinedError,
    ResourceError,
    UncommittedError,
    WireError,
)

ARRAYS = {"stage4": np.arange(24, dtype=np.float16).reshape(2, 3, 4), "logits": np.ones((2, 5), np.float32)}
GOOD = frame_of(ARRAYS, store="one")


class Time:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now, self.pauses = 0.0, []

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


def service(*answers, **retry) -> tuple[ServiceClient, ScriptedTransport, Time]:
    transport, clock = ScriptedTransport(in_turn(*answers)), Time()
    made = ServiceClient(transport, "secret", RetryPolicy(**retry), clock.sleep, lambda: clock.now)
    return made, transport, clock


def problem(status: int, kind: str, detail: str = "why", **headers: str) -> Answered:
    body = json.dumps({"type": f"urn:scalekd-cache:problem:{kind}", "status": status, "detail": detail})
    return Answered(status, body.encode(), headers)


def test_frame_is_read_into_the_memory_given_when_it_is_good():
    made, transport, clock = service(Answered(body=GOOD))
    memory = np.zeros((4, 3, 4), np.float16)
    arrays, metadata = made.frame("POST", "/v1/x", b"body", media_type="text/plain", out={"stage4": memory})
    np.testing.assert_array_equal(memory[:2], ARRAYS["stage4"])
    assert np.shares_memory(arrays["stage4"], memory)
    np.testing.assert_array_equal(arrays["logits"], ARRAYS["logits"])
    assert metadata["store"] == "one"
    assert clock.pauses == []
    asked = transport.asked[0]
    assert (asked.method, asked.target, asked.body) == ("POST", "/v1/x", b"body")
    assert asked.headers["Authorization"] == "Bearer secret"
    assert asked.headers["Content-Type"] == "text/plain"


damaged = bytearray(GOOD)
damaged[-1] ^= 1


@pytest.mark.parametrize(
    "bad",
    [
        problem(429, "overloaded"),
        problem(503, "not-ready"),
        Answered(502, b"<html>bad gateway</html>"),
        Answered(504, b"[]"),
        ConnectionRefusedError(111, "refused"),
        RemoteDisconnected("closed without response"),
        TimeoutError("timed out"),
        Answered(body=GOOD, breaks=40),
        Answered(body=GOOD, breaks=len(GOOD) - 1),
        Answered(body=GOOD[:-1], headers={"content-length": str(len(GOOD))}),
        Answered(body=bytes(damaged)),
        Answered(body=GOOD, headers={"content-length": ""}),
    ],
)
def test_call_is_tried_again_when_that_can_help(bad):
    made, transport, clock = service(bad, Answered(body=GOOD))
    arrays, _ = made.frame("GET", "/v1/x")
    np.testing.assert_array_equal(arrays["stage4"], ARRAYS["stage4"])
    assert len(transport.asked) == 2
    assert len(clock.pauses) == 1


def test_damaged_frame_is_reported_at_once_when_it_is_not_to_be_asked_for_again():
    bad = [problem(429, "overloaded"), ConnectionResetError("reset"), Answered(body=bytes(damaged))]
    made, transport, _ = service(*bad, Answered(body=GOOD))
    with pytest.raises(WireError, match="crc32c of array .* does not match"):
        made.frame("POST", "/v1/x", retry_damaged=False)
    assert len(transport.asked) == 3


def test_pauses_grow_and_differ_when_tries_go_on():
    made, _, clock = service(*[problem(503, "resource")] * 7, Answered(body=GOOD), first_pause=0.1, longest_pause=2)
    made.frame("GET", "/v1/x")
    for pause, whole in zip(clock.pauses, (0.1, 0.2, 0.4, 0.8, 1.6, 2, 2), strict=True):
        assert whole / 2 <= pause <= whole
    assert clock.pauses[5] != clock.pauses[6]


def test_servers_pause_is_honoured_when_it_asks_for_one():
    made, _, clock = service(problem(429, "overloaded", **{"retry-after": "7"}), Answered(body=GOOD))
    made.frame("GET", "/v1/x")
    assert 7.0 < clock.pauses[0] <= 7.1


def test_clients_told_the_same_pause_come_back_at_different_times():
    pauses = []
    for _ in range(8):
        made, _, clock = service(problem(429, "overloaded", **{"retry-after": "1"}), Answered(body=GOOD))
        made.frame("GET", "/v1/x")
        pauses += clock.pauses
    assert len(set(pauses)) == len(pauses)
    assert min(pauses) > 1


def test_servers_pause_is_honoured_when_it_is_a_date():
    date = email.utils.formatdate(time.time() + 30, usegmt=True)
    made, _, clock = service(problem(503, "not-ready", **{"retry-after": date}), Answered(body=GOOD))
    made.frame("GET", "/v1/x")
    assert 28 < clock.pauses[0] <= 30.1


@pytest.mark.parametrize(
    ("answer", "kind", "words"),
    [
        (problem(503, "not-ready", "the teacher is loading"), ResourceError, "http://service: the teacher is loading"),
        (
            ConnectionRefusedError("refused"),
            ResourceError,
            r"the connection failed \(refused\); is the service running",
        ),
        (Answered(body=bytes(damaged)), WireError, "crc32c of array .* does not match"),
    ],
)
def test_call_is_given_up_when_its_deadline_passes(answer, kind, words):
    made, transport, clock = service(*[answer] * 50, deadline=5.0, first_pause=1.0, longest_pause=1.0)
    with pytest.raises(kind, match=words) as error:
        made.frame("GET", "/v1/x")
    assert f"failed after {len(transport.asked)} tries within 5 s" in str(error.value)
    assert 5 <= len(transport.asked) <= 10
    assert clock.now < 5


def test_call_is_given_up_at_once_when_the_server_asks_for_more_than_is_left():
    made, transport, clock = service(problem(429, "overloaded", **{"retry-after": "600"}), deadline=5.0)
    with pytest.raises(ResourceError, match="failed after 1 tries"):
        made.frame("GET", "/v1/x")
    assert clock.pauses == []
    assert len(transport.asked) == 1


def test_a_single_try_waits_no_longer_than_is_left_when_the_deadline_is_near():
    made, transport, _ = service(problem(503, "resource"), Answered(body=GOOD), deadline=4.0, timeout=3, first_pause=2)
    made.frame("GET", "/v1/x")
    assert transport.asked[0].timeout == 3
    assert 2 <= transport.asked[1].timeout < 3.01


@pytest.mark.parametrize(
    ("answer", "kind", "words"),
    [
        (problem(404, "uncommitted", "view 3 was never committed"), UncommittedError, "view 3 was never committed"),
        (problem(410, "quarantined"), QuarantinedError, "why"),
        (problem(500, "corrupt-store"), CorruptStoreError, "why"),
        (problem(410, "object-missing"), CorruptStoreError, "why"),
        (problem(422, "invalid-request"), InputError, "http://service: why"),
        (problem(413, "too-large"), InputError, "why"),
        (problem(500, "internal"), ResourceError, "why"),
        (
            problem(401, "unauthorized", "this token is not known here; ask for a new one"),
            InputError,
            "refuses: this token is not known here; set FEATURE_STORE_TOKEN to a token that it accepts$",
        ),
        (problem(403, "forbidden"), InputError, "http://service refuses: why"),
        (Answered(404, b"nothing here"), InputError, "GET http://service/v1/x was answered with status 404"),
    ],
)
def test_refusal_is_this_projects_error_when_trying_again_cannot_help(answer, kind, words):
    made, transport, _ = service(answer)
    with pytest.raises(kind, match=words) as error:
        made.frame("GET", "/v1/x")
    assert type(error.value) is kind
    assert len(transport.asked) == 1
    assert "secret" not in str(error.value)


def test_json_is_refused_when_something_else_answers():
    made, _, _ = service(*[Answered(body=b"<html>")] * 9, deadline=0.0)
    with pytest.raises(WireError, match="the answer is not JSON; is this the service"):
        made.json("/v1/manifest")


@pytest.mark.parametrize("url", ["ftp://host", "host:8000", "http://", "http://user:pass@host"])
def test_service_is_refused_when_its_url_cannot_be_one(url):
    with pytest.raises(InputError, match="expected http://host:port"):
        ServiceClient.at(url)


@pytest.mark.parametrize("token", ["", "two words", "line\nbreak", "é"])
def test_service_is_refused_when_its_token_cannot_be_one(token):
    with pytest.raises(InputError, match="no bearer token") as error:
        ServiceClient.at("http://host", token)
    assert not token or token not in str(error.value)


def test_token_is_kept_but_not_shown_when_pickled_or_printed():
    made = ServiceClient.at("https://host:1/base", "secret")
    again = pickle.loads(pickle.dumps(made))  # noqa: S301 - made here
    assert (again.token, again.url) == ("secret", "https://host:1/base")
    assert "secret" not in repr(again)
