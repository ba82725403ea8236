from dataclasses import replace

import numpy as np
import pytest
from training_world import SIZE, shared_world

from feature_store.errors import InputError, MismatchError
from feature_store.format.addressing import RowId
from feature_store.inputs.tar import Tar, TarSample
from feature_store.store import Store, open_store
from feature_store.views import ViewPolicy, apply_view, decode_image, draw_view, view_policy
from student_trainer.data.replayed import CHECKED_ROWS, DrawnViews, StoredViews


@pytest.fixture
def store():
    return open_store(shared_world().store)


@pytest.fixture
def tar():
    return Tar.open(shared_world().tars[0])


def replay(views, tar: Tar, row: RowId) -> tuple[TarSample, np.ndarray]:
    sample = tar.read(row.position)
    return sample, views.pixels(row, sample)


def test_stored_views_are_those_of_the_store_when_replayed(store, tar):
    views = StoredViews(store, check_all=True)
    assert views.size == (SIZE, SIZE)
    for position in (0, 13):
        for view in (0, 1):
            row = RowId(0, position, view)
            sample, pixels = replay(views, tar, row)
            views.check(row, sample, pixels)
            image = decode_image(sample.image)
            drawn = draw_view(store.manifest.policy, store.manifest.seed, sample.key, view, image.size)
            assert views.params(row, sample.key, image.size) == drawn
            assert np.array_equal(pixels, apply_view(image, drawn, (SIZE, SIZE)))


def test_stored_views_are_the_stored_parameters_when_the_seed_would_draw_others(store, tar, monkeypatch):
    other = [replace(params, flip=not params.flip) if params else None for params in store.view_params(0, 1)]
    monkeypatch.setattr(Store, "view_params", lambda *_: other)
    sample, pixels = replay(StoredViews(store), tar, RowId(0, 0, 1))
    assert np.array_equal(pixels, apply_view(decode_image(sample.image), other[0], (SIZE, SIZE)))
    assert not np.array_equal(
        pixels, replay(DrawnViews(store.manifest.policy, store.manifest.seed), tar, RowId(0, 0, 1))[1]
    )


@pytest.mark.parametrize(("position", "checks", "caught"), [
    (0, {"check_all": False}, True), (CHECKED_ROWS - 1, {"check_all": False}, True),
    (CHECKED_ROWS, {"check_all": False}, False), (CHECKED_ROWS, {}, True), (13, {}, True),
])  # fmt: skip
def test_stored_views_catch_changed_pixels_when_the_row_is_checked(store, tar, position, checks, caught):
    views, row = StoredViews(store, **checks), RowId(0, position, 1)
    sample, pixels = replay(views, tar, row)
    pixels[3, 5, 1] ^= 1
    if not caught:
        views.check(row, sample, pixels)
        return
    with pytest.raises(MismatchError, match=r"pixels of sample 'a0\d\d', view 1 differs.*CRC-32.*Pillow"):
        views.check(row, sample, pixels)


def test_stored_views_catch_a_changed_label_when_checked(store, tar):
    views, row = StoredViews(store), RowId(0, 12, 0)
    sample, pixels = replay(views, tar, row)
    with pytest.raises(MismatchError, match=r"label of sample 'a012' differs: store has 0, got 3; train on the images"):
        views.check(row, sample._replace(label=3), pixels)


def test_stored_views_refuse_a_quarantined_sample_when_asked_for_it(store):
    with pytest.raises(InputError, match=r"sample 'a009' \(unit 0\) is quarantined"):
        StoredViews(store).params(RowId(0, 9, 0), "a009", (50, 50))


ASKED = [(0, 0), (1, 1), (0, 0), (1, 0), (0, 0), (1, 1)]  # units and views


@pytest.mark.parametrize(
    ("kept", "reads"), [(1, ASKED), (2, [(0, 0), (1, 1), (1, 0), (1, 1)]), (3, [*ASKED[:2], (1, 0)])]
)
def test_stored_views_keep_the_units_used_last_when_the_data_set_is_large(store, monkeypatch, kept, reads):
    read, view_params = [], Store.view_params
    monkeypatch.setattr(Store, "view_params", lambda self, *at: read.append(at) or view_params(self, *at))
    views = StoredViews(store, units_in_memory=kept)
    params = [views.params(RowId(unit, 0, view), "any", (50, 50)) for unit, view in ASKED]
    assert params == [view_params(store, *at)[0] for at in ASKED]
    assert read == reads


@pytest.mark.parametrize("supplier", [StoredViews, lambda store: DrawnViews(store.manifest.policy)])
def test_views_read_the_sample_of_the_rows_position_when_asked(store, tar, supplier):
    views = supplier(store)
    for position in (3, 0, 13):
        sample = views.read(tar, RowId(0, position, 1))
        assert (sample.key, sample.label) == (f"a{position:03}", position % 4)


def test_stored_views_are_checked_by_their_own_units_label_and_crc_when_units_take_turns(store, monkeypatch):
    labels = Store.labels
    monkeypatch.setattr(Store, "labels", lambda self, unit: labels(self, unit) + 10 * unit)
    tars, views = [Tar.open(url) for url in shared_world().tars], StoredViews(store)
    for unit, view in [(0, 0), (1, 1), (0, 1), (1, 0), (0, 0)]:
        row = RowId(unit, 2, view)
        sample, pixels = replay(views, tars[unit], row)
        views.check(row, sample._replace(label=2 + 10 * unit), pixels)
        with pytest.raises(
            MismatchError, match=f"store has {2 + 10 * unit}, got {12 - 10 * unit}; train on the images"
        ):
            views.check(row, sample._replace(label=12 - 10 * unit), pixels)


@pytest.mark.parametrize(("software", "written_with"), [("9.{unit}.{view}", None), (None, "of unknown version")])
def test_stored_views_name_the_pillow_that_wrote_the_row_when_pixels_differ(store, software, written_with):
    tars, views = [Tar.open(url) for url in shared_world().tars], StoredViews(store)
    for unit in (0, 1):
        for view in (0, 1):
            version = software and software.format(unit=unit, view=view)
            record = replace(store.committed.record(unit, view), software={"pillow": version} if version else {})
            store.committed.replace(record)
            row = RowId(unit, 0, view)
            sample, pixels = replay(views, tars[unit], row)
            with pytest.raises(
                MismatchError, match=rf"store has 'CRC-32 \w+ by Pillow {written_with or version}', got"
            ):
                views.check(row, sample, pixels ^ 1)


def test_drawn_views_are_a_stores_when_policy_and_seed_are_its_own(store, tar):
    row = RowId(0, 3, 1)
    drawn = DrawnViews(store.manifest.policy, store.manifest.seed)
    assert np.array_equal(replay(drawn, tar, row)[1], replay(StoredViews(store), tar, row)[1])
    other = DrawnViews(store.manifest.policy, store.manifest.seed + 1)
    assert not np.array_equal(replay(other, tar, row)[1], replay(drawn, tar, row)[1])


def test_drawn_views_keep_the_middle_when_the_policy_is_center(tar):
    policy: ViewPolicy = view_policy("center", 16, crop_pct=1.0)
    params = DrawnViews(policy).params(RowId(0, 0, 0), "any", (40, 20))
    assert (params.crop, params.flip) == ((10, 0, 20, 20), False)
