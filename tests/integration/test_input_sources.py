"""Every kind of source is cached, verified and shown, and equal images give equal features."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from app_transport import TestClient, service_app
from image_folders import CLASSES, class_samples, write_class_tars, write_folder, write_parquet
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


def test_parquet_is_cached_verified_and_shown_when_a_store_is_written_from_it(
    tmp_path: Path, tiny_swin: TinyTeacher
) -> None:
    samples = class_samples(10)
    parquet, store = write_parquet(tmp_path / "data" / "train-00000-of-00001.parquet", samples), tmp_path / "store"

    assert _cache(tiny_swin, store, str(parquet.parent), "--unit-samples", "4") == 0

    opened = open_store(store)
    assert [tar.samples for tar in opened.manifest.tars] == [4, 4, 2]
    labels = {
        key: label for unit in range(3) for key, label in zip(opened.keys(unit), opened.labels(unit), strict=True)
    }
    assert labels == {f"train-00000-of-00001/{at:07}": int(each["cls"]) for at, each in enumerate(samples)}
    assert _verify(tiny_swin, store, str(parquet)) == 0
    client = TestClient(service_app(str(store), tars=(str(parquet),)), base_url="http://localhost")
    assert client.get("/v1/browse/units/2/views/1/rows/1/view.png").status_code == 200


def test_samples_without_labels_are_rows_like_others_when_labels_are_optional(
    tmp_path: Path, tiny_swin: TinyTeacher
) -> None:
    samples = class_samples(6)
    tars = write_class_tars(tmp_path / "all", samples, 6)
    some = [{name: sample[name] for name in sample if name != "cls" or at < 2} for at, sample in enumerate(samples)]
    few = write_class_tars(tmp_path / "few", [*some, {"__key__": "z/broken", "png": b"no image"}], 7)
    views = ("--views-out", str(tmp_path / "v"))

    assert _cache(tiny_swin, tmp_path / "labelled", *tars) == 0
    assert _cache(tiny_swin, tmp_path / "materialised", *few, "--labels", "optional", *views) == 0
    assert _cache(tiny_swin, tmp_path / "optional", *few, "--labels", "optional") == 0
    assert _cache(tiny_swin, tmp_path / "none", *few, "--labels", "none") == 0

    optional, none = open_store(tmp_path / "optional"), open_store(tmp_path / "none")
    assert optional.labels(0).tolist() == [0, 1, -1, -1, -1, -1, -1]
    assert none.labels(0).tolist() == [-1] * 7
    assert list(optional.quarantined(0)) == list(none.quarantined(0)) == [6]  # what cannot be decoded still is
    features = {key: row[1:] for key, row in _rows(open_store(tmp_path / "labelled")).items()}
    for store in (optional, none):
        rows = store.rows([sample["__key__"] for sample in samples], view=1)
        stored = store.source().read(rows).taps["stage4"]
        assert [each.tobytes() for each in stored] == [features[sample["__key__"], 1][0] for sample in samples]
    with tarfile.open(tmp_path / "v" / "v0" / "u00000.tar") as archive:
        names = [name for name in archive.getnames() if name.endswith(".cls")]
    assert names == [f"{sample['__key__']}.cls" for sample in samples[:2]]
    assert _verify(tiny_swin, tmp_path / "optional", *few) == 0  # the store says that labels are optional
    assert _verify(tiny_swin, tmp_path / "none", *few) == 0


def test_labels_of_json_and_text_members_and_class_names_are_those_of_cls(
    tmp_path: Path, tiny_swin: TinyTeacher, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = class_samples(6)
    names = tmp_path / "classes.txt"
    names.write_text("\n".join(CLASSES) + "\n")
    bare = [{name: each[name] for name in each if name != "cls"} for each in samples]
    indexes = [int(each["cls"]) for each in samples]
    words = [CLASSES[index].encode() for index in indexes]
    nested = [json.dumps({"meta": {"label": index}}).encode() for index in indexes]
    variants = {
        "json": ("json", nested, ("--label-field", "json.meta.label")),
        "txt": ("txt", words, ("--label-field", "txt", "--classes", str(names))),
        "words": ("cls", words, ("--classes", str(names))),
    }
    assert _cache(tiny_swin, tmp_path / "plain", *write_class_tars(tmp_path / "cls", samples, 6)) == 0
    expected = _rows(open_store(tmp_path / "plain"))

    for name, (member, labels, options) in variants.items():
        members = [{**each, member: label} for each, label in zip(bare, labels, strict=True)]
        tars = write_class_tars(tmp_path / name, members, 6)
        assert _cache(tiny_swin, tmp_path / f"store-{name}", *tars, *options) == 0, name
        assert _rows(open_store(tmp_path / f"store-{name}")) == expected, name
        names.rename(tmp_path / "away.txt")
        assert _verify(tiny_swin, tmp_path / f"store-{name}", *tars) == 0, name  # class names are in the store
        (tmp_path / "away.txt").rename(names)
    one_based = [{**each, "cls": str(index + 1).encode()} for each, index in zip(bare, indexes, strict=True)]
    tars = write_class_tars(tmp_path / "one", one_based, 6)
    capsys.readouterr()
    assert _cache(tiny_swin, tmp_path / "x", *tars, "--classes", str(names)) == 2
    assert "labels are counted from one: subtract one from each" in capsys.readouterr().err
