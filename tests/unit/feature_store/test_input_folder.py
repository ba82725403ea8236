"""A class-per-folder tree is listed as ImageFolder lists it, and divided into units that can be found again."""

import pickle
import shutil
from pathlib import Path

import pytest
from image_folders import CLASSES, class_samples, write_folder
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from feature_store.errors import ImageError, InputError
from feature_store.inputs.base import NO_LABEL, SampleSource
from feature_store.inputs.folder import EXTENSIONS
from feature_store.inputs.open import open_sources, recognised
from feature_store.inputs.options import SourceOptions
from feature_store.inputs.slices import shuffled


def _open(root: Path, **options) -> list[SampleSource]:
    return open_sources([str(root)], SourceOptions(**options)).sources


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "tree", class_samples(10))


def test_folder_gives_the_images_and_labels_of_imagefolder(tree: Path) -> None:
    theirs = ImageFolder(str(tree))
    (unit,) = _open(tree)

    ours = {sample.key: (sample.image, sample.label) for sample in map(unit.read, range(len(unit)))}

    assert ours == {
        Path(path).relative_to(tree).with_suffix("").as_posix(): (Path(path).read_bytes(), label)
        for path, label in theirs.samples
    }
    assert tuple(theirs.classes) == CLASSES
    assert frozenset(IMG_EXTENSIONS) == EXTENSIONS


def test_folder_keeps_class_names_and_how_it_was_divided(tree: Path) -> None:
    info = open_sources([str(tree)], SourceOptions(unit_samples=4, shuffle_seed=7)).info

    assert info is not None
    assert (info.format, info.classes, info.unit_samples, info.shuffle_seed) == ("folder", CLASSES, 4, 7)


def test_units_are_slices_of_one_shuffle_and_mix_classes(tree: Path) -> None:
    units = _open(tree, unit_samples=4)

    assert [len(unit) for unit in units] == [4, 4, 2]
    keys = [key for unit in units for key in unit.keys]
    assert sorted(keys) == sorted(sample["__key__"] for sample in class_samples(10))
    assert keys != sorted(keys)
    assert [key for unit in _open(tree, unit_samples=4, shuffle_seed=1) for key in unit.keys] != keys


def test_shuffle_is_pinned() -> None:
    assert shuffled(["a", "b", "c", "d", "e"], 0) == [0, 4, 1, 3, 2]
    assert shuffled(["a", "b", "c", "d", "e"], 1) == [2, 3, 1, 4, 0]


def test_header_hash_is_the_same_elsewhere_and_differs_for_another_listing(tree: Path, tmp_path: Path) -> None:
    here = [unit.header_sha256 for unit in _open(tree, unit_samples=4)]
    shutil.copytree(tree, tmp_path / "elsewhere" / "copy")

    assert [unit.header_sha256 for unit in _open(tmp_path / "elsewhere" / "copy", unit_samples=4)] == here
    assert len(set(here)) == 3
    for options in ({"unit_samples": 5}, {"unit_samples": 4, "shuffle_seed": 1}, {"unit_samples": 4, "labels": "none"}):
        assert not {unit.header_sha256 for unit in _open(tree, **options)} & set(here)
    image = tree / "ant" / "s000.png"
    image.write_bytes(image.read_bytes() + b"x")
    assert not {unit.header_sha256 for unit in _open(tree, unit_samples=4)} & set(here)


def test_unit_survives_the_way_to_a_worker(tree: Path) -> None:
    unit = _open(tree, unit_samples=4)[1]
    again = pickle.loads(pickle.dumps(unit))  # noqa: S301

    assert [again.read(at) for at in range(4)] == [unit.read(at) for at in range(4)]
    assert again.content_sha256() == unit.content_sha256()


def test_classes_file_gives_the_indexes_when_the_tree_lacks_classes(tree: Path, tmp_path: Path) -> None:
    names = tmp_path / "classes.txt"
    names.write_text("zebra\ndog\ncat\nbee\nant\n")
    (unit,) = _open(tree, classes=names)

    assert {(key.split("/")[0], unit.label(at)) for at, key in enumerate(unit.keys)} == {
        ("dog", 1), ("cat", 2), ("bee", 3), ("ant", 4)
    }  # fmt: skip


def test_loose_images_have_no_label_when_labels_are_optional(tree: Path) -> None:
    shutil.copy(tree / "ant" / "s000.png", tree / "loose.png")

    (unit,) = _open(tree, labels="optional")
    assert {key: unit.label(at) for at, key in enumerate(unit.keys)}["loose"] == NO_LABEL
    assert sum(unit.label(at) == NO_LABEL for at in range(len(unit))) == 1
    (unit,) = _open(tree, labels="none")
    assert {unit.label(at) for at in range(len(unit))} == {NO_LABEL}


def test_hidden_files_links_and_other_files(tree: Path, tmp_path: Path) -> None:
    (tree / ".ipynb_checkpoints").mkdir()
    for name in (".ipynb_checkpoints/x.png", "ant/._s000.png", "ant/notes.md"):
        (tree / name).write_bytes(b"x")
    (tree / "ant" / "loop").symlink_to(tree / "ant")
    (tmp_path / "far.png").write_bytes((tree / "ant" / "s000.png").read_bytes())
    (tree / "ant" / "linked.png").symlink_to(tmp_path / "far.png")

    (unit,) = _open(tree)

    assert len(unit) == 11
    assert "ant/linked" in unit.keys
    assert any("2 hidden files and folders are skipped" in note for note in unit.notes)
    assert any("1 files are no images and are skipped ('ant/notes.md')" in note for note in unit.notes)


def test_unit_refuses_a_file_that_changed_or_went(tree: Path) -> None:
    (unit,) = _open(tree)
    at = list(unit.keys).index("ant/s000")
    (tree / "ant" / "s000.png").write_bytes(b"short")
    with pytest.raises(InputError, match="changed since the folder was listed: it had .* bytes, it has 5"):
        unit.read(at)
    (tree / "ant" / "s000.png").unlink()
    with pytest.raises(InputError, match="is gone since the folder was listed"):
        unit.read(at)
    with pytest.raises(InputError, match="has no position 10, expected 0 to 9"):
        unit.label(10)
    with pytest.raises(InputError, match="has no position -1"):
        unit.read(-1)


def test_folder_is_refused_when_no_image_can_be_used(tmp_path: Path) -> None:
    (tmp_path / "t" / "ant").mkdir(parents=True)
    (tmp_path / "t" / "ant" / "a.png").write_bytes(b"no image")
    with pytest.raises(InputError, match="none of the 1 samples of 1 units can be used; the first, 'ant/a'") as caught:
        _open(tmp_path / "t")
    assert not isinstance(caught.value, ImageError)


def test_plain_folder_of_tars_or_an_empty_one_is_refused_as_before(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder; name the tars in it"):
        _open(tmp_path)
    (tmp_path / "a.tar").write_bytes(b"")
    with pytest.raises(InputError, match="is a folder; name the tars in it"):
        _open(tmp_path)


@pytest.mark.parametrize("pattern", ["x" * 5000, "~no-such-user/a.tar", "http://[bad", "a\0b", "none"])
def test_what_is_no_folder_is_taken_for_a_tar(pattern: str) -> None:
    assert recognised([pattern]) == "tar"
