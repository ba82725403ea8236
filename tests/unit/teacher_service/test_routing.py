"""Rules of declared routes, as middleware sees them."""

import pytest
from fastapi import FastAPI

from teacher_service.serve.routing import Routes, RouteTable


@pytest.fixture
def routes():
    routes = Routes("things")

    @routes.declare("GET", "/alive", None, probe=True)
    async def alive() -> str:
        """Whether it is alive."""
        return "yes"

    @routes.declare("POST", "/things/{name}/parts", "compute", problems=["too-large", "not-ready"], large_body=True)
    async def parts(name: str, deep: bool = False) -> str:
        """Parts of a thing."""
        return name

    return routes


@pytest.mark.parametrize(
    ("path", "scope", "probe", "large_body"),
    [
        ("/alive", None, True, False),
        ("/things/a/parts", "compute", False, True),
        ("/things/a%2Fb/parts", "compute", False, True),
        ("/things/a/b/parts", "admin", False, False),
        ("/things/a", "admin", False, False),
        ("/alive/", "admin", False, False),
        ("/alive\n", "admin", False, False),
        ("", "admin", False, False),
    ],
)
def test_rule_is_the_declared_one_or_an_admins(routes, path, scope, probe, large_body):
    rule = RouteTable(routes.rules).rule(path)
    assert (rule.scope, rule.probe, rule.large_body) == (scope, probe, large_body)


def test_declaration_is_the_openapi_of_its_route(routes):
    app = FastAPI()
    app.include_router(routes)
    paths = app.openapi()["paths"]
    declared = paths["/things/{name}/parts"]["post"]
    assert declared["security"] == [{"token": ["compute"]}]
    assert {"400", "401", "403", "413", "421", "422", "429", "431", "500", "503"} <= declared["responses"].keys()
    assert set(declared["responses"]["503"]["content"]) == {"application/problem+json"}
    assert "security" not in paths["/alive"]["get"]
    assert "401" not in paths["/alive"]["get"]["responses"]
