"""Packed tars hold the source's samples, byte for byte the same at every run."""

import json
from pathlib import Path

import pytest
from image_folders import CLASSES, class_samples, write_folder, write_parquet

from feature_store.inputs.base import NO_LABEL, SampleSource
from feature_store.inputs.open import open_sources
from feature_store.inputs.options import SourceOptions
from feature_store.inputs.tar import open_tars
from teacher_service.cli import main

SAMPLES = class_samples(10)


def _content(sources: list[SampleSource]) -> dict[str, tuple[bytes, int]]:
    return {source.keys[at]: source.read(at)[1:] for source in sources for at in range(len(source))}


def _tars(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}


@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_tars_hold_the_samples_of_the_source_in_its_order(tmp_path: Path, kind: str) -> None:
    if kind == "folder":
        source = write_folder(tmp_path / "tree", SAMPLES)
    else:
        source = write_parquet(tmp_path / "train-00000-of-00001.parquet", SAMPLES)
    options = SourceOptions(unit_samples=4, shuffle_seed=3)

    assert main(["pack", str(source), str(tmp_path / "out"), "--unit-samples", "4", "--shuffle-seed", "3"]) == 0

    units, tars = open_sources([str(source)], options).sources, open_tars([str(tmp_path / "out" / "*.tar")])
    assert list(_tars(tmp_path / "out")) == ["000000.tar", "000001.tar", "000002.tar"]
    assert [list(tar.keys) for tar in tars] == [list(unit.keys) for unit in units]
    assert _content([*tars]) == _content(units)
    assert (tmp_path / "out" / "classes.txt").read_text().split() == [*CLASSES]
    assert main(["pack", str(source), str(tmp_path / "again"), "--unit-samples", "4", "--shuffle-seed", "3"]) == 0
    assert _tars(tmp_path / "again") == _tars(tmp_path / "out")


def test_pack_goes_on_where_it_was_interrupted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = write_folder(tmp_path / "tree", SAMPLES), tmp_path / "out"
    command = ["pack", str(source), str(out), "--unit-samples", "4", "--json"]
    assert main(command) == 0
    whole, kept = _tars(out), (out / "000000.tar").stat().st_mtime_ns
    (out / "000002.tar").unlink()
    (out / "000002.tar.x.partial").write_bytes(b"half")
    capsys.readouterr()

    assert main(command) == 0

    assert json.loads(capsys.readouterr().out)["written"] == 1
    assert _tars(out) == whole
    assert not list(out.glob("*.partial"))
    assert (out / "000000.tar").stat().st_mtime_ns == kept


def test_pack_refuses_a_folder_of_another_pack(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = write_folder(tmp_path / "tree", SAMPLES), tmp_path / "out"
    assert main(["pack", str(source), str(out), "--unit-samples", "4"]) == 0
    assert main(["pack", str(source), str(out), "--unit-samples", "5"]) == 2
    assert "holds tars of another source, seed or size" in capsys.readouterr().err
    (out / "pack.json").unlink()
    assert main(["pack", str(source), str(out)]) == 2
    assert "holds tars that pack did not write (000000.tar)" in capsys.readouterr().err
    assert main(["pack", str(out / "000000.tar"), str(tmp_path / "more")]) == 2
    assert "is a tar already" in capsys.readouterr().err
    assert main(["pack", str(source), str(out / "000000.tar")]) == 2
    assert "000000.tar, expected a folder: there is a file" in capsys.readouterr().err


def test_pack_keeps_samples_without_labels_and_leaves_out_those_that_need_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_parquet(tmp_path / "a.parquet", [{"png": SAMPLES[0]["png"]}, *SAMPLES[1:4]])
    assert main(["pack", str(source), str(tmp_path / "optional"), "--labels", "optional"]) == 0
    assert main(["pack", str(source), str(tmp_path / "required")]) == 0
    assert "1 samples are left out: a/0000000: no label" in capsys.readouterr().out

    optional = open_sources([str(tmp_path / "optional/000000.tar")], SourceOptions(labels="optional")).sources
    assert sorted(label for _, label in _content(optional).values()) == [NO_LABEL, 1, 2, 3]
    assert len(open_tars([str(tmp_path / "required/000000.tar")])[0]) == 3


def test_pack_replaces_dots_in_keys_and_refuses_what_would_collide(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_folder(tmp_path / "tree", [{"__key__": "ant/a.b", "png": SAMPLES[0]["png"]}])
    assert main(["pack", str(source), str(tmp_path / "out")]) == 0
    assert list(open_tars([str(tmp_path / "out/000000.tar")])[0].keys) == ["ant/a_b"]
    write_folder(source, [{"__key__": "ant/a_b", "png": SAMPLES[1]["png"]}])
    assert main(["pack", str(source), str(tmp_path / "more")]) == 2
    assert "two samples would have key 'ant/a_b'" in capsys.readouterr().err
