"""What the page asks: samples, neighbours, colours, quarantine, activity; and the page's own files."""

import io

import numpy as np
import pytest
from app_transport import service_app
from fastapi.testclient import TestClient
from PIL import Image
from training_world import World, make_world, shared_world

from feature_store.errors import InputError, UncommittedError
from feature_store.format.addressing import RowId
from feature_store.store import open_store
from feature_store.tools.info import summarise
from teacher_service.serve.feature_browser import FeatureBrowser, ReferenceRows, predictions


@pytest.fixture(scope="module")
def world() -> World:
    return shared_world("vit")


@pytest.fixture(scope="module")
def client(world) -> TestClient:
    return TestClient(service_app(world.store, tars=world.tars), base_url="http://localhost")


def picture(client: TestClient, path: str) -> np.ndarray:
    answer = client.get(path)
    assert answer.status_code == 200
    return np.asarray(Image.open(io.BytesIO(answer.content)))


def test_summary_says_what_info_says_when_compared(client, world):
    found, expected = client.get("/v1/browse/summary").json(), summarise(open_store(world.store))
    assert found["rows"] == expected["committed_rows"] == 50
    assert found["of_rows"] == 52
    assert (found["bytes"], found["objects"]) == (expected["bytes"], expected["objects"])
    assert (found["quarantined"], found["units"], found["samples"]) == (1, 2, 26)
    assert str(world.store) not in str(found)


def test_activity_counts_when_rows_are_served(client):
    before = client.get("/v1/browse/activity").json()
    assert (before["committed"], before["of_committed"]) == (4, 4)
    client.post("/v1/rows:batch", json={"rows": [[0, 0, 0], [0, 1, 0]]})
    after = client.get("/v1/browse/activity").json()
    assert after["rows"] - before["rows"] == 2
    assert after["requests"] - before["requests"] == 2
    assert after["bytes"] > before["bytes"]
    assert after["seconds"] > before["seconds"]


def test_entries_come_in_pages_when_asked_so(client):
    whole = client.get("/v1/browse/units").json()
    assert [unit["tar"] for unit in whole["units"]] == ["train-0.tar", "train-1.tar"]
    part = client.get("/v1/browse/units?first=1&count=1").json()
    assert part == {"units": whole["units"][1:], "total": 2}
    samples = client.get("/v1/browse/units/0/samples?first=8&count=3").json()
    assert [(each["position"], each["key"], each["quarantined"]) for each in samples["samples"]] == [
        (8, "a008", False), (9, "a009", True), (10, "a010", False),
    ]  # fmt: skip
    assert samples["total"] == 14
    quarantine = client.get("/v1/browse/quarantine").json()
    assert [(each["tar"], each["key"]) for each in quarantine["samples"]] == [("train-0.tar", "a009")]
    assert client.get("/v1/browse/quarantine?first=1").json() == {"samples": [], "total": 1}


def test_row_has_its_own_classes_and_other_samples_near_it_when_looked_at(client, world):
    found = client.get("/v1/browse/units/1/views/1/rows/4").json()
    logits = open_store(world.store).source().read([RowId(1, 4, 1)]).logits[0].astype(float)
    assert (found["key"], found["tar"]) == ("b004", "train-1.tar")
    assert [each["label"] for each in found["classes"]] == np.argsort(-logits).tolist()
    assert sum(each["probability"] for each in found["classes"]) == pytest.approx(1)
    keys = [each["key"] for each in found["neighbours"]]
    assert len(keys) == len(set(keys)) == 8
    assert "b004" not in keys
    similarities = [each["similarity"] for each in found["neighbours"]]
    assert similarities == sorted(similarities, reverse=True)


def test_nearest_neighbour_is_the_likest_row_when_there_is_a_likeness(world):
    store = open_store(world.store)
    sample = ReferenceRows.of(store)
    features = store.source(["stage4"]).read(sample.rows).taps["stage4"].astype(np.float32)
    at = sample.rows.index(RowId(0, 3, 0))
    likest = sample.neighbours(RowId(7, 7, 0), features[at], 1)[0]
    assert likest.row == RowId(0, 3, 0)
    assert likest.similarity == pytest.approx(1, abs=1e-4)
    pooled = features.mean(axis=1)
    standard = (pooled - pooled.mean(axis=0)) / pooled.std(axis=0)
    others = [i for i, row in enumerate(sample.rows) if row[:2] != (0, 3)]
    cosines = standard[others] @ standard[at] / np.linalg.norm(standard[others], axis=1) / np.linalg.norm(standard[at])
    assert sample.neighbours(RowId(0, 3, 0), features[at], 1)[0].row == sample.rows[others[int(cosines.argmax())]]


def test_pictures_are_the_view_and_its_colours_when_asked_for(client, world):
    from feature_store.inputs.tar import Tar
    from feature_store.tools.features import replay_views

    view = picture(client, "/v1/browse/units/0/views/1/rows/2/view.png")
    expected = replay_views(open_store(world.store), [Tar.open(url) for url in world.tars], [RowId(0, 2, 1)])[0]
    np.testing.assert_array_equal(view, expected)
    colours = picture(client, "/v1/browse/units/0/views/1/rows/2/map.png")
    assert colours.shape == (4, 4, 3)
    assert len(np.unique(colours.reshape(-1, 3), axis=0)) > 4
    assert not np.array_equal(colours, picture(client, "/v1/browse/units/1/views/1/rows/2/map.png"))


@pytest.mark.parametrize(
    ("path", "status", "kind"),
    [
        ("units/0/views/0/rows/9", 410, "quarantined"),
        ("units/0/views/0/rows/9/map.png", 410, "quarantined"),
        ("units/0/views/0/rows/9/view.png", 410, "quarantined"),
        ("units/0/views/5/rows/0/map.png", 404, "uncommitted"),
        ("units/0/views/0/rows/99", 404, "uncommitted"),
        ("units/9/samples", 404, "uncommitted"),
        ("units/0/samples?count=501", 422, "invalid-request"),
    ],
)
def test_request_is_refused_when_there_is_nothing_to_show(client, path, status, kind):
    answer = client.get(f"/v1/browse/{path}")
    assert (answer.status_code, answer.json()["type"].rpartition(":")[2]) == (status, kind)


def test_views_are_not_shown_when_the_service_has_no_tars(world):
    client = TestClient(service_app(world.store), base_url="http://localhost")
    assert client.get("/v1/browse/summary").json()["pixels"] is False
    answer = client.get("/v1/browse/units/0/views/0/rows/0/view.png")
    assert answer.status_code == 404
    assert "start it with --tars" in answer.json()["detail"]
    with pytest.raises(InputError, match=r"train-0\.tar is not among those"):
        FeatureBrowser(lambda: open_store(world.store)).pixels(RowId(0, 0, 0))
    with pytest.raises(UncommittedError):
        FeatureBrowser(lambda: open_store(world.store)).pixels(RowId(0, 0, 7))


def test_sample_is_taken_anew_only_when_the_store_is_another_or_twice_as_large(tmp_path):
    store = open_store(make_world(tmp_path / "some", skip=[(0, 1), (1, 0), (1, 1)]).store)
    whole = open_store(make_world(tmp_path / "whole").store)
    current = [store]
    gallery = FeatureBrowser(lambda: current[0])
    first = gallery.sample()
    assert gallery.sample() is first
    current[0] = whole
    assert gallery.sample() is not first
    assert {row.unit for row in gallery.sample().rows} == {0, 1}


def test_sample_is_taken_anew_when_some_of_its_rows_are_withdrawn(tmp_path):
    world = make_world(tmp_path)
    current = [open_store(world.store)]
    gallery = FeatureBrowser(lambda: current[0])
    assert {row.unit for row in gallery.sample().rows} == {0, 1}
    current[0].withdraw_unit(1)
    current[0] = open_store(world.store)
    assert {row.unit for row in gallery.sample().rows} == {0}


def test_nothing_is_sampled_when_nothing_is_committed(tmp_path):
    world = make_world(tmp_path, skip=[(unit, view) for unit in (0, 1) for view in (0, 1)])
    client = TestClient(service_app(world.store), base_url="http://localhost")
    assert client.get("/v1/browse/summary").json()["rows"] == 0
    assert client.get("/v1/browse/units/0/samples").status_code == 404
    assert client.get("/v1/browse/quarantine").json()["total"] == 0


def test_probabilities_are_right_when_logits_are_large():
    found = predictions(np.array([1000.0, 999.0, -1000.0], np.float16), 2)
    assert [each.label for each in found] == [0, 1]
    assert found[0].probability == pytest.approx(1 / (1 + np.exp(-1)))


@pytest.mark.parametrize("path", ["/", "/page.css", "/page.js", "/icon.svg"])
def test_pages_files_forbid_everything_foreign_when_served(client, path):
    answer = client.get(path)
    assert answer.status_code == 200
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert not any(word in answer.text for word in ("http://cdn", "https://", "eval(", "innerHTML", "style="))
