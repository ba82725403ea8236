"""Every kind of source is cached, verified and shown, and equal images give equal features."""

import json
from pathlib import Path

import numpy as np
import pytest
from app_transport import TestClient, service_app
from image_folders import CLASSES, class_samples, write_class_tars, write_folder
from tiny_jobs import TinyTeacher

from feature_store import Store, open_store
from feature_store.tools.cli import main as store_main
from teacher_service.cli import main


def _cache(teacher: TinyTeacher, store: Path, *arguments: str) -> int:
    given = [*teacher.arguments, "--checkpoint", str(teacher.checkpoint), "--store", str(store), "--tap-codec", "f16"]
    return main(["cache", *arguments, *given, "--workers", "0", "--batch-size", "4", "--views", "2", "--policy", "a2"])


def _verify(teacher: TinyTeacher, store: Path, *arguments: str) -> int:
    return main(["verify", *arguments, "--store", str(store), "--checkpoint", str(teacher.checkpoint)])


def _rows(store: Store) -> dict[tuple[str, int], tuple[int, bytes, bytes]]:
    """Label, features and logits by key and view."""
    found = {}
    for unit in range(len(store.manifest.tars)):
        labels = store.labels(unit)
        for at, key in enumerate(store.keys(unit)):
            for view in range(store.manifest.num_views):
                batch = store.source().read(store.rows([key], view=view))
                assert batch.logits is not None
                found[key, view] = (int(labels[at]), batch.taps["stage4"].tobytes(), np.asarray(batch.logits).tobytes())
    return found


def test_folder_and_tars_of_the_same_images_give_equal_features(tmp_path: Path, tiny_swin: TinyTeacher) -> None:
    samples = class_samples(10)
    folder, tars = write_folder(tmp_path / "tree", samples), write_class_tars(tmp_path / "tars", samples, 4)

    assert _cache(tiny_swin, tmp_path / "of-folder", str(folder), "--unit-samples", "3") == 0
    assert _cache(tiny_swin, tmp_path / "of-tars", *tars) == 0

    of_folder, of_tars = open_store(tmp_path / "of-folder"), open_store(tmp_path / "of-tars")
    assert [tar.samples for tar in of_folder.manifest.tars] == [3, 3, 3, 1]
    assert _rows(of_folder) == _rows(of_tars)
    assert of_folder.manifest.inputs is not None
    assert of_folder.manifest.inputs.classes == CLASSES
    assert of_tars.manifest.inputs is None  # as before there were other sources


def test_every_command_takes_a_folder_and_finds_its_units_again(
    tmp_path: Path, tiny_swin: TinyTeacher, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_folder(tmp_path / "tree", class_samples(10))
    options = (str(folder), "--unit-samples", "4", "--shuffle-seed", "5")
    assert main(["plan", *options, *tiny_swin.arguments, "--store", str(tmp_path / "store"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["units"] == 3
    assert _cache(tiny_swin, tmp_path / "store", *options) == 0
    moved = folder.rename(tmp_path / "moved")

    assert _verify(tiny_swin, tmp_path / "store", str(moved)) == 0  # the store says how it was divided
    assert store_main(["plot", str(tmp_path / "store"), "--out", str(tmp_path / "plots"), "--tars", str(moved)]) == 0
    client = TestClient(service_app(str(tmp_path / "store"), tars=(str(moved),)), base_url="http://localhost")
    assert client.get("/v1/browse/units/2/views/0/rows/0/view.png").status_code == 200
    capsys.readouterr()
    assert _cache(tiny_swin, tmp_path / "store", str(moved), "--unit-samples", "4", "--shuffle-seed", "5") == 0
    assert _cache(tiny_swin, tmp_path / "store", str(moved), "--unit-samples", "5") == 2
    assert "differs: store has" in capsys.readouterr().err
    (moved / "ant" / "more.png").write_bytes((moved / "ant" / "s000.png").read_bytes())
    assert _verify(tiny_swin, tmp_path / "store", str(moved)) == 2
