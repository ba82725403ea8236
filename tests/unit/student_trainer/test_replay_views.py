from dataclasses import replace

import numpy as np
import pytest
from training_world import SIZE, shared_world

from feature_store.errors import InputError, MismatchError
from feature_store.format.addressing import RowId
from feature_store.inputs.tar import Tar, TarSample
from feature_store.store import Store, open_store
from feature_store.views import ViewPolicy, apply_view, decode_image, draw_view, view_policy
from student_trainer.replay import CHECKED_ROWS, DrawnViews, StoredViews


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
    with pytest.raises(MismatchError, match=r"label of sample 'a012' differs: store has 0, got 3; train on the tars"):
        views.check(row, sample._replace(label=3), pixels)


def test_stored_views_refuse_a_quarantined_sample_when_asked_for_it(store):
    with pytest.raises(InputError, match=r"sample 'a009' \(unit 0\) is quarantined"):
        StoredViews(store).params(RowId(0, 9, 0), "a009", (50, 50))


@pytest.mark.parametrize(("kept", "reads"), [(1, [(0, 0), (1, 1), (0, 0)]), (2, [(0, 0), (1, 1)])])
def test_stored_views_keep_so_many_units_when_the_data_set_is_large(store, monkeypatch, kept, reads):
    seen, view_params = [], Store.view_params
    monkeypatch.setattr(Store, "view_params", lambda self, *at: seen.append(at) or view_params(self, *at))
    views = StoredViews(store, units_in_memory=kept)
    first = views.params(RowId(0, 0, 0), "a000", (50, 50))
    assert views.params(RowId(1, 0, 1), "b000", (50, 50)) != first
    assert views.params(RowId(0, 0, 0), "a000", (50, 50)) == first
    assert seen == reads


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
