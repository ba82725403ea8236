"""Files appear whole or not at all, with the mode of any new file."""

import os
from pathlib import Path

import pytest

from feature_store.backends.files import replacing, write_text


@pytest.fixture
def umask():
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_file_follows_the_umask_when_its_writer_makes_it_private(tmp_path, umask, mask, mode):
    os.umask(mask)
    with replacing(tmp_path / "weights") as partial:
        partial.unlink()
        os.close(os.open(partial, os.O_CREAT | os.O_WRONLY, 0o600))  # as safetensors does
    assert (tmp_path / "weights").stat().st_mode & 0o777 == mode


def test_file_stays_as_it_was_when_writing_fails(tmp_path):
    path = tmp_path / "kept"
    write_text(path, "before", durable=True)
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "half \ud800")
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_temporary_names_differ_when_two_write_one_file(tmp_path):
    names: list[Path] = []
    with replacing(tmp_path / "one") as first, replacing(tmp_path / "one") as second:
        names += [first, second]
    assert names[0] != names[1]
    assert [path.name for path in tmp_path.iterdir()] == ["one"]
