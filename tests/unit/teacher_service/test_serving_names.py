"""Names that are not UTF-8, hold escapes or are markup, from a store to every answer of the service."""

import json
from contextlib import closing

import pytest
from served_store import in_process, make_store
from signed_store import sign

EVIL = "caf\udce9\x1b[2J\u202e<b>\n.tar"
SHOWN = r"caf\udce9\x1b[2J\u202e<b>\n.tar"


@pytest.fixture(scope="module")
def ask(tmp_path_factory, tiny_swin):
    path = make_store(tmp_path_factory.mktemp("names"), tiny_swin)

    def manifest(stated):
        stated.update(licence=EVIL, software={EVIL: EVIL})
        stated["tars"][0].update(name=EVIL)
        stated["teacher"]["model_kwargs"].update(drop_rate=EVIL)

    def record(stated):
        stated.update(tar=EVIL, quarantined=dict.fromkeys(stated["quarantined"], EVIL))

    sign(path, manifest, record)
    with closing(in_process(path)) as client:
        yield client


def test_every_answer_is_given_when_names_are_no_text(ask):
    paths = json.loads(ask("/openapi.json").body)["paths"]
    places = {"{unit}": "0", "{position}": "0", "{view}": "0", "{path}": "zarr.json", "{key}": "u0-000"}
    for path in (path for path, methods in paths.items() if "get" in methods):
        for name, value in places.items():
            path = path.replace(name, value)
        answer = ask(path)
        assert answer.status != 500, (path, answer.body)


def test_manifest_keeps_names_exactly_when_they_are_no_text(ask):
    assert ask("/v1/manifest").json()["manifest"]["tars"][0]["name"] == EVIL


def test_page_shows_names_as_text_when_they_are_no_text(ask):
    assert ask("/v1/browse/summary").json()["licence"] == SHOWN
    assert ask("/v1/browse/units").json()["units"][0]["tar"] == SHOWN
    (entry,) = ask("/v1/browse/quarantine").json()["samples"]
    assert (entry["tar"], entry["reason"]) == (SHOWN, SHOWN)
