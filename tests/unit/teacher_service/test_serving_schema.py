"""Schemathesis over the whole OpenAPI: no 5xx, no undocumented answer; ``make nightly`` asks for more of it."""

import math
import os
from contextlib import closing
from dataclasses import replace

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    positive_data_acceptance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from served_store import InProcess, in_process, make_store, make_tokens

from feature_store.teacher.model import load_teacher
from teacher_service.serve.live.teacher import LiveTeacher
from teacher_service.serve.routes.parameters import COMPUTE
from teacher_service.serve.service import Service
from teacher_service.serve.tokens import TokenFile

CASES = int(os.environ.get("SERVICE_CASES", "600"))
REFUSED_FOR_WHAT_IS_STORED = (410, 412, 413, 416)  # of requests that have the right form


def accepts_what_has_the_right_form(ctx, response, case):
    if response.status_code in REFUSED_FOR_WHAT_IS_STORED:
        return None
    if response.status_code == 422 and case.path == COMPUTE:  # not an image, or a crop outside of it
        return None
    return positive_data_acceptance(ctx, response, case)


CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
    accepts_what_has_the_right_form,
]


@pytest.fixture(scope="module")
def service(tmp_path_factory, tiny_swin):
    """Every route there is, the live teacher's included."""
    folder = tmp_path_factory.mktemp("schema")
    secrets = make_tokens(folder / "tokens.jsonl")
    with closing(in_process(make_store(folder, tiny_swin), tokens=folder / "tokens.jsonl")) as cached:
        live = LiveTeacher(
            lambda: load_teacher(
                tiny_swin.name, checkpoint=tiny_swin.checkpoint, model_kwargs=tiny_swin.model_kwargs, device="cpu"
            )
        )
        live.start(wait=True)
        whole = Service(replace(cached.service.config), live)
        whole.load()
        with closing(InProcess(whole, TokenFile(folder / "tokens.jsonl"))) as client:
            yield client, secrets["admin"]
        live.close()


def test_openapi_is_complete(service):
    """Every operation says what it is, whom it is for and what can go wrong, with examples."""
    schema = service[0].app.openapi()
    assert schema["openapi"].startswith("3.1")
    operations = [operation for path in schema["paths"].values() for operation in path.values()]
    assert len(operations) > 10
    names = [operation["operationId"] for operation in operations]
    assert len(set(names)) == len(names)
    for operation in operations:
        assert operation.get("description"), operation["operationId"]
        if not operation.get("security"):
            continue
        assert {"401", "403", "429", "431", "500"} <= operation["responses"].keys(), operation["operationId"]
        for status, answer in operation["responses"].items():
            if int(status) < 400:
                continue
            (media_type, content), *others = answer["content"].items()
            assert media_type == "application/problem+json"
            assert not others
            for example in content["examples"].values():
                assert example["value"]["status"] == int(status)


def without_lifespan(app):
    """The service is loaded already; the client would load it anew."""

    async def answer(scope, receive, send):
        if scope["type"] != "lifespan":
            return await app(scope, receive, send)
        for _ in ("startup", "shutdown"):
            await send({"type": f"{(await receive())['type']}.complete"})
        return None

    return answer


def test_service_answers_as_its_openapi_says_whatever_it_is_asked(service):
    client, token = service
    schema = schemathesis.openapi.from_dict(client.app.openapi())
    schema.app = without_lifespan(client.app)
    operations = [result.ok() for result in schema.get_all_operations()]
    each, asked = math.ceil(CASES / (len(operations) - 3)), 0  # three probes and metrics have nothing to vary
    failures = []
    for operation in operations:
        for mode, share in ((GenerationMode.POSITIVE, 0.6), (GenerationMode.NEGATIVE, 0.6)):

            @settings(
                max_examples=max(1, math.ceil(each * share)),
                deadline=None,
                database=None,
                derandomize=True,
                suppress_health_check=list(HealthCheck),
            )
            @given(case=operation.as_strategy(mode))
            def ask(case):
                nonlocal asked
                asked += 1
                case.call_and_validate(headers={"Authorization": f"Bearer {token}"}, checks=CHECKS)

            try:
                ask()
            except Unsatisfiable:  # nothing about this operation can be wrong
                pass
            except FailureGroup as error:
                failures.append(f"{operation.label}: {error}")
    assert not failures, "\n".join(failures)
    assert asked >= CASES, asked
