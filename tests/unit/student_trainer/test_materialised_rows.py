"""Materialised views one by one: which tar, which sample, and what is refused."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from servers import WebServer
from tiny_jobs import cache_config, make_teacher
from training_world import CLASSES, samples, write_tar

from feature_store import open_store
from feature_store.errors import InputError, MismatchError
from feature_store.format.addressing import RowId
from feature_store.inputs.tar import Tar
from feature_store.store import Store
from feature_store.views import pixel_crc, view_tar
from student_trainer.data.materialised import MaterialisedViews, StoredUnit, require_view_tars, stored_units
from student_trainer.data.replayed import StoredViews
from teacher_service.cache.job import cache
from teacher_service.cache.write_views import tar_of

SIZE = 32
ROWS = [RowId(unit, position, view) for unit in (0, 1) for position in (0, 2) for view in (0, 1)]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> tuple[Store, Path]:
    """A store of two tars and two views, one sample quarantined, and the folder of its views."""
    root = tmp_path_factory.mktemp("materialised")
    first = samples(5, seed=1, prefix="a")
    first[1]["png"] = b"not an image"
    tars = (write_tar(root / "one.tar", first), write_tar(root / "two.tar", samples(4, seed=2, prefix="b")))
    teacher = make_teacher(root, "test_vit", {"img_size": SIZE, "num_classes": CLASSES})
    cache(cache_config(tars, teacher, root / "store", views=2, policy="a2", seed=3, views_out=str(root / "views")))
    return open_store(root / "store"), root / "views"


@pytest.fixture
def views(world, tmp_path) -> Path:
    """A copy of the views, to be changed."""
    return Path(shutil.copytree(world[1], tmp_path / "views"))


def reader(store: Store, url: Path | str, **options) -> MaterialisedViews:
    return MaterialisedViews(StoredViews(store), str(url), **options)


def rename(tar: Path, names: dict[str, str]) -> None:
    """Give samples of a tar other keys; without a name they are left out."""
    opened = Tar.open(str(tar))
    read = [opened.read(position) for position in range(len(opened))]
    kept = {names.get(sample.key, sample.key): (sample.image, sample.label) for sample in read}
    tar.write_bytes(tar_of({key: value for key, value in kept.items() if key}))


def test_units_are_the_stores_tars_when_views_stand_for_them(world):
    store, views = world
    units = stored_units(store, str(views))
    assert [(unit.name, len(unit), unit.url) for unit in units] == [
        ("one.tar", 5, str(views)),
        ("two.tar", 4, str(views)),
    ]
    assert [unit.header_sha256 for unit in units] == [tar.header_sha256 for tar in store.manifest.tars]
    assert units[0].keys == ("a000", "a001", "a002", "a003", "a004")
    assert units[0].readable == {"a000", "a002", "a003", "a004"}
    assert units[1].readable == {"b000", "b001", "b002", "b003"}


def test_row_is_the_stores_view_of_its_sample_when_read(world):
    store, folder = world
    views, units = reader(store, folder), stored_units(store, str(folder))
    assert (views.size, views.skips_unreadable) == ((SIZE, SIZE), False)
    for row in ROWS:
        sample = views.read(units[row.unit], row)
        pixels = views.pixels(row, sample)
        assert sample.key == units[row.unit].keys[row.position]
        assert sample.label == store.labels(row.unit)[row.position]
        assert pixel_crc(pixels) == store.pixel_crcs(row.unit, row.view)[row.position]
        views.check(row, sample, pixels)


def test_row_is_refused_when_its_pixels_or_label_are_not_the_stores(world):
    store, folder = world
    views, row = reader(store, folder), ROWS[1]
    sample = views.read(stored_units(store, str(folder))[0], row)
    pixels = np.array(views.pixels(row, sample))
    with pytest.raises(MismatchError, match="label of sample 'a000'"):
        views.check(row, sample._replace(label=sample.label + 1), pixels)
    pixels[0, 0, 0] ^= 1
    with pytest.raises(MismatchError, match="pixels of sample 'a000', view 1"):
        views.check(row, sample, pixels)


@pytest.mark.parametrize(("kept", "opened"), [(1, [0, 1, 0]), (2, [0, 1])])
def test_tars_stay_open_as_far_as_asked_when_rows_go_back_and_forth(world, monkeypatch, kept, opened):
    store, folder = world
    seen, open_tar = [], Tar.open
    monkeypatch.setattr(Tar, "open", lambda path, **how: seen.append(Path(path).name) or open_tar(path, **how))
    views, units = reader(store, folder, units_in_memory=kept), stored_units(store, str(folder))
    for unit in (0, 1, 0, 0):
        assert views.read(units[unit], RowId(unit, 2, 0)).key == units[unit].keys[2]
    assert seen == [f"u0000{unit}.tar" for unit in opened]


def test_the_tar_used_longest_ago_is_closed_when_there_are_too_many(world, monkeypatch):
    store, folder = world
    seen, open_tar = [], Tar.open

    def opening(path, **how):
        seen.append("/".join(Path(path).parts[-2:]))
        return open_tar(path, **how)

    monkeypatch.setattr(Tar, "open", opening)
    views, units = reader(store, folder, units_in_memory=2), stored_units(store, str(folder))
    for unit, view in ((0, 0), (1, 0), (0, 0), (0, 1), (0, 0)):
        views.read(units[unit], RowId(unit, 0, view))
    assert seen == [view_tar(0, 0), view_tar(1, 0), view_tar(0, 1)]


@pytest.mark.parametrize(
    ("names", "expected", "got"),
    [
        ({"a000": "", "a002": ""}, "sample 'a000'", "none of that key"),
        ({"a002": "x002"}, "sample 'a002'", "none of that key"),
    ],
)
def test_view_tar_is_refused_naming_a_sample_when_it_lacks_some(world, views, names, expected, got):
    store, _ = world
    rename(views / view_tar(0, 1), names)
    with pytest.raises(MismatchError) as caught:
        reader(store, views).read(stored_units(store, str(views))[0], RowId(0, 3, 1))
    assert (caught.value.expected, caught.value.got) == (expected, got)
    assert str(caught.value).startswith(f"samples of {views}/{view_tar(0, 1)} differs: ")
    assert "it was not written with this store, or changed since: give the place --views-out wrote to" in str(
        caught.value
    )


def test_view_tar_is_refused_naming_a_sample_when_it_has_a_foreign_one(world, views):
    store, _ = world
    target = views / view_tar(1, 0)
    opened = Tar.open(str(target))
    content = {sample.key: (sample.image, sample.label) for sample in map(opened.read, range(len(opened)))}
    target.write_bytes(tar_of({**content, "z": content["b000"], "y": content["b001"]}))
    with pytest.raises(MismatchError) as caught:
        reader(store, views).read(stored_units(store, str(views))[1], RowId(1, 0, 0))
    assert (caught.value.expected, caught.value.got) == ("those of the store", "sample 'y'")
    assert "give the place --views-out wrote to" in str(caught.value)


def test_view_of_a_quarantined_sample_is_taken_when_it_became_readable(world, views):
    """The tar may hold more than the store uses, as long as the samples are the store's."""
    store, _ = world
    target = views / view_tar(0, 0)
    opened = Tar.open(str(target))
    content = {sample.key: (sample.image, sample.label) for sample in map(opened.read, range(len(opened)))}
    target.write_bytes(tar_of({**content, "a001": content["a000"]}))
    unit = stored_units(store, str(views))[0]
    assert reader(store, views).read(unit, RowId(0, 0, 0)).key == "a000"


def test_views_are_copied_once_to_the_scratch_folder_when_they_are_on_a_web_server(world, tmp_path):
    store, folder = world
    with WebServer(folder) as server:
        views, units = reader(store, server.url, scratch=tmp_path / "scratch"), stored_units(store, server.url)
        local = reader(store, folder)
        for row in ROWS:
            assert views.read(units[row.unit], row) == local.read(units[row.unit], row)
        assert len(list((tmp_path / "scratch").glob("*.tar"))) == 4
        again = reader(store, server.url, scratch=tmp_path / "scratch")
        again.read(units[0], ROWS[0])
        assert len(list((tmp_path / "scratch").glob("*.tar"))) == 4
        gone = reader(store, f"{server.url}/nowhere", scratch=tmp_path / "scratch")
        with pytest.raises(InputError, match=rf"^view tar {server.url}/nowhere/v0/u00000.tar is not there; give the"):
            gone.read(units[0], ROWS[0])


def test_place_is_accepted_when_it_holds_the_views_or_cannot_be_listed(world):
    store, folder = world
    require_view_tars(store, str(folder), 2)
    with WebServer(folder) as server:
        require_view_tars(store, f"{server.url}/nowhere", 2)


def test_place_is_refused_when_it_lacks_views_that_are_used(world, views):
    store, _ = world
    (views / view_tar(1, 1)).unlink()
    require_view_tars(store, str(views), 1)
    with pytest.raises(InputError) as caught:
        require_view_tars(store, str(views), 2)
    assert str(caught.value) == (
        f"--views-from {views} lacks 1 of the store's 4 view tars: v1/u00001.tar...; "
        "give the place --views-out wrote to"
    )
    with pytest.raises(
        InputError, match=r"lacks 3 of the store's 6 view tars: v1/u00001.tar, v2/u00000.tar, v2/u00001"
    ):
        require_view_tars(store, str(views), 3)


def test_stored_unit_is_as_long_as_its_keys():
    assert len(StoredUnit("a.tar", "views", "0" * 64, ("x", "y", "z"), frozenset("x"))) == 3
