"""What every SampleSource promises."""

import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from image_folders import class_samples, write_class_tars, write_folder, write_parquet
from tiny_jobs import Sample as Members

from feature_store.errors import InputError
from feature_store.inputs.base import NO_LABEL, SampleSource
from feature_store.inputs.labels import LabelReader
from feature_store.inputs.open import open_sources
from feature_store.inputs.options import SourceOptions


def _tar(folder: Path, samples: list[Members]) -> str:
    return write_class_tars(folder, samples, 100)[0]


def _folder(folder: Path, samples: list[Members]) -> str:
    return str(write_folder(folder, samples))


def _parquet(folder: Path, samples: list[Members]) -> str:
    return str(write_parquet(folder / "a.parquet", samples))


@pytest.mark.parametrize("write", [_tar, _folder, _parquet])
class TestSampleSource:
    """Each kind of source over the same eight images."""

    def _open(self, write: Callable[[Path, list[Members]], str], folder: Path, **options) -> SampleSource:
        (source,) = open_sources([write(folder, class_samples(8))], SourceOptions(**options)).sources
        return source

    def test_source_reads_every_sample_at_its_position(self, write, tmp_path: Path) -> None:
        source = self._open(write, tmp_path / "a")

        samples = [source.read(position) for position in range(len(source))]

        assert isinstance(source, SampleSource)
        assert [sample.key for sample in samples] == list(source.keys)
        assert [source.label(position) for position in range(len(source))] == [sample.label for sample in samples]
        expected = sorted((each["png"], int(each["cls"])) for each in class_samples(8))
        assert sorted(sample[1:] for sample in samples) == expected

    def test_source_refuses_positions_it_does_not_have(self, write, tmp_path: Path) -> None:
        source = self._open(write, tmp_path / "a")
        for position in (-1, 8):
            for call in (source.read, source.label):
                with pytest.raises(InputError, match=f"has no position {position}, expected 0 to 7"):
                    call(position)

    def test_source_is_the_same_in_a_worker_and_in_threads(self, write, tmp_path: Path) -> None:
        source = self._open(write, tmp_path / "a")
        again = pickle.loads(pickle.dumps(source))  # noqa: S301

        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(again.read, [*range(8)] * 10))

        assert found == [source.read(position) for position in range(8)] * 10
        assert (again.name, again.url, again.header_sha256) == (source.name, source.url, source.header_sha256)

    def test_hashes_do_not_depend_on_the_place(self, write, tmp_path: Path) -> None:
        here, there = self._open(write, tmp_path / "a"), self._open(write, tmp_path / "b" / "c")
        assert (here.header_sha256, here.content_sha256()) == (there.header_sha256, there.content_sha256())
        assert list(here.keys) == list(there.keys)

    def test_source_has_no_labels_when_none_are_read(self, write, tmp_path: Path) -> None:
        source = self._open(write, tmp_path / "a", labels="none")
        assert [source.label(position) for position in range(8)] == [NO_LABEL] * 8
        assert not source.problems


@pytest.mark.parametrize("value", [True, 2.0, "1.0", "+1", [1], {"a": 1}, "9" * 19, b"\xff"])
def test_label_reader_takes_nothing_that_only_looks_like_an_index(value: object) -> None:
    with pytest.raises(InputError, match="expected a class index in decimal digits"):
        LabelReader().index(value)


@pytest.mark.parametrize("classes", [("0", "1", "2"), ("1999", "00a", "7b"), ("5", "x", "7")])
def test_label_reader_takes_names_that_are_numbers_when_they_cannot_be_taken_for_indexes(classes: list[str]) -> None:
    reader = LabelReader(classes=classes)
    assert [reader.index(name) for name in classes] == [0, 1, 2]
    assert [reader.index(value) for value in (0, b"1\n", "2")] == [0, 1, 2]


@pytest.mark.parametrize("classes", [("1", "0"), ("0", "1", "10", "11", *map(str, range(2, 10))), ("01", "02")])
@pytest.mark.parametrize("value", ["1", b" 0\n", "01"])
def test_label_reader_refuses_a_number_that_is_a_name_or_the_index_of_another_class(
    classes: list[str], value: str | bytes
) -> None:
    reader = LabelReader(classes=classes)
    with pytest.raises(InputError, match="may be a class name or a class index"):
        reader.index(value)
    assert reader.index(1) == 1  # an integer is an index
