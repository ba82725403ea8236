"""Parquet files and dataset folders give their rows, read by row group."""

import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from image_folders import CLASSES, class_samples, image_table, write_parquet

from feature_store.errors import ImageError, InputError
from feature_store.inputs.base import NO_LABEL, SampleSource
from feature_store.inputs.open import open_sources
from feature_store.inputs.options import SourceOptions

SAMPLES = class_samples(10)


def _open(*paths: Path, **options) -> list[SampleSource]:
    return open_sources([str(path) for path in paths], SourceOptions(**options)).sources


def _content(units: list[SampleSource]) -> dict[str, tuple[bytes, int]]:
    return {unit.keys[at]: unit.read(at)[1:] for unit in units for at in range(len(unit))}


EXPECTED = {f"train-00000-of-00001/{row:07}": (each["png"], int(each["cls"])) for row, each in enumerate(SAMPLES)}


def test_parquet_gives_images_labels_and_class_names(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "train-00000-of-00001.parquet", SAMPLES)

    opened = open_sources([str(path)], SourceOptions(unit_samples=4))

    assert opened.info is not None
    assert (opened.info.format, opened.info.classes) == ("parquet", CLASSES)
    assert [len(unit) for unit in opened.sources] == [4, 4, 2]
    assert _content(opened.sources) == EXPECTED
    assert [_content(pickle.loads(pickle.dumps(opened.sources)))] == [EXPECTED]  # noqa: S301


def test_dataset_folder_on_disk_gives_the_same_rows(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "dataset_info.json").write_text("{}")
    table = image_table(SAMPLES)
    with (
        pa.OSFile(str(folder / "train-00000-of-00001.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, table.schema) as out,
    ):
        out.write_table(table, max_chunksize=4)

    units = _open(folder, unit_samples=4)

    assert _content(units) == EXPECTED


def test_plain_binary_column_and_class_indexes(tmp_path: Path) -> None:
    table = pa.table({"jpg": [sample["png"] for sample in SAMPLES], "target": [int(s["cls"]) for s in SAMPLES]})
    pq.write_table(table, tmp_path / "train-00000-of-00001.parquet")

    assert _content(_open(tmp_path / "train-00000-of-00001.parquet", label_field="target")) == EXPECTED


def test_unit_reads_each_row_group_once_in_order_of_positions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    units = _open(write_parquet(tmp_path / "a.parquet", SAMPLES, group_rows=2), unit_samples=4)
    read: list[int] = []
    read_row_group = pq.ParquetFile.read_row_group

    def counted(self: pq.ParquetFile, number: int, **options) -> pa.Table:
        read.append(number)
        return read_row_group(self, number, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)

    _content(units)

    assert len(set(read)) == len(read) == 4  # opening read the first
    assert read != sorted(read)  # row groups come in seeded order


def test_header_hash_changes_with_labels_seed_and_rows_only(tmp_path: Path) -> None:
    def hashes(samples=SAMPLES, name: str = "x", **options) -> list[str]:
        path = write_parquet(tmp_path / name / "a.parquet", samples)
        return [unit.header_sha256 for unit in _open(path, **{"unit_samples": 4, **options})]

    first = hashes()
    assert hashes(name="elsewhere") == first
    assert len(set(first)) == 3
    changed = [{**SAMPLES[0], "cls": b"3"}, *SAMPLES[1:]]
    for other in (hashes(changed), hashes(SAMPLES[:9]), hashes(shuffle_seed=1), hashes(unit_samples=5)):
        assert not set(other) & set(first)


def test_rows_without_label_are_unlabelled_or_cannot_be_used(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [{"png": SAMPLES[0]["png"]}, *SAMPLES[1:]])

    (unit,) = _open(path, labels="optional")
    at = list(unit.keys).index("a/0000000")
    assert unit.read(at).label == NO_LABEL
    assert [unit.label(position) for position in range(10)].count(NO_LABEL) == 1
    (unit,) = _open(path)
    with pytest.raises(ImageError, match="no label: it is None, expected a class index"):
        unit.read(list(unit.keys).index("a/0000000"))
    (unit,) = _open(path, labels="none")
    assert {unit.label(position) for position in range(10)} == {NO_LABEL}


def test_several_splits_in_one_folder_are_refused(tmp_path: Path) -> None:
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        write_parquet(tmp_path / "data" / f"{name}.parquet", SAMPLES[:2])

    with pytest.raises(InputError, match=r"holds the splits test, train; name the files of one in quotes: '.*test-\*"):
        _open(tmp_path)
    assert sum(map(len, _open(tmp_path / "data" / "train-*.parquet"))) == 4


@pytest.mark.parametrize(
    ("names", "hint"),
    [
        (("train", "test"), "test.parquet"),
        (("train-00000-of-00001", "test"), "test.parquet"),
        (("train/0000", "test/0001"), r"test/\*.parquet"),
        (("mnist_Train", "mnist_Val"), "mnist_Train.parquet"),
        (("a-00000-of-00001", "b-00000-of-00001"), r"a-\*.parquet"),
        (("train_0", "test_0"), r"test_\*.parquet"),
        (("train", "unlabeled"), "train.parquet"),
    ],
)
def test_splits_are_told_by_the_names_of_files_and_folders(tmp_path: Path, names: tuple[str, str], hint: str) -> None:
    for name in names:
        write_parquet(tmp_path / "data" / f"{name}.parquet", SAMPLES[:2])

    with pytest.raises(InputError, match=f"holds the splits .*, .*; name the files of one in quotes: '.*{hint}'$"):
        _open(tmp_path)
    assert sum(map(len, _open(tmp_path / "data" / f"{names[0]}.parquet"))) == 2


def test_files_of_one_split_are_opened_together_when_their_names_tell_nothing_else(tmp_path: Path) -> None:
    for name in ("train-first", "train-second", "more"):
        write_parquet(tmp_path / f"{name}.parquet", SAMPLES[:2])

    assert sum(map(len, _open(tmp_path))) == 6


def test_integers_mean_the_names_of_their_files_schema(tmp_path: Path) -> None:
    """Whatever the order of the names in each schema, and of the classes asked for."""
    turned = [{**sample, "cls": b"%d" % (3 - int(sample["cls"]))} for sample in SAMPLES[5:]]
    write_parquet(tmp_path / "a.parquet", SAMPLES[:5])
    write_parquet(tmp_path / "b.parquet", turned, names=CLASSES[::-1])

    assert sorted(label for _, label in _content(_open(tmp_path)).values()) == sorted(int(s["cls"]) for s in SAMPLES)
    (tmp_path / "classes.txt").write_text("\n".join(["cat", "ant", "dog", "bee", "eel"]))
    given = [("cat", "ant", "dog", "bee").index(CLASSES[int(sample["cls"])]) for sample in SAMPLES]
    found = _content(_open(tmp_path, classes=tmp_path / "classes.txt"))
    assert [found[key][1] for key in sorted(found)] == given


def test_schemas_that_contradict_the_classes_are_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", SAMPLES[:5])
    write_parquet(tmp_path / "b.parquet", SAMPLES[5:], names=("ant", "bee", "cat", "eel"))
    with pytest.raises(
        InputError, match=r"b\.parquet has the class 'eel' in its schema, expected one of the 4 classes"
    ):
        _open(tmp_path)
    write_parquet(tmp_path / "b.parquet", SAMPLES[5:], names=("w", "x", "y", "z"))
    with pytest.raises(InputError, match=r"b\.parquet has the class 'w' in its schema"):
        _open(tmp_path)
    write_parquet(tmp_path / "b.parquet", SAMPLES[5:], names=None)
    with pytest.raises(InputError, match=r"b\.parquet has no class names in the schema of column label"):
        _open(tmp_path)
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    assert sum(map(len, _open(tmp_path, classes=tmp_path / "classes.txt"))) == 10


def test_as_many_classes_by_other_names_keep_the_schemas_order_with_a_note(tmp_path: Path) -> None:
    names = ("Ant, an insect", "Bee", "Cat", "Dog")
    turned = [{**sample, "cls": b"%d" % (3 - int(sample["cls"]))} for sample in SAMPLES[5:]]
    write_parquet(tmp_path / "a.parquet", SAMPLES[:5], names=names)
    write_parquet(tmp_path / "b.parquet", turned, names=names[::-1])
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))

    (unit,) = _open(tmp_path, classes=tmp_path / "classes.txt")

    found = _content([unit])
    assert [found[key][1] for key in sorted(found)] == [int(sample["cls"]) for sample in SAMPLES]
    assert [note.partition(": ")[2] for note in unit.notes] == [
        "the schema's names (Ant, an insect, Bee...) are taken for the classes (ant, bee...), in their order"
    ]


def test_unit_refuses_a_file_that_changed(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", SAMPLES)
    (unit,) = _open(path)
    write_parquet(path, SAMPLES[:5])
    with pytest.raises(InputError, match="changed since it was listed"):
        unit.read(9)


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "a.parquet", SAMPLES)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"which is not installed; pip install 'scalekd-cache\[parquet\]'"):
        _open(path)
