import shutil

import numpy as np
import pytest
import torch
from training_world import SIZE, samples, shared_world, write_tar

from feature_store.errors import InputError, MismatchError, UncommittedError
from feature_store.format.addressing import RowId
from feature_store.inputs.tar import Tar, open_tars
from feature_store.store import Store, open_store
from feature_store.teacher.torch_codecs import TorchDecoder
from feature_store.views import view_policy
from student_trainer.data.batch import (
    ViewDataset,
    match_tars,
    read_keys,
    require_views,
    training_positions,
)
from student_trainer.data.loader import BatchLoader
from student_trainer.data.replayed import DrawnViews, StoredViews
from student_trainer.data.sampler import EpochSampler

# Python 3.12 and later warn of fork under threads
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


@pytest.fixture
def world():
    return shared_world()


@pytest.fixture
def store(world) -> Store:
    return open_store(world.store)


@pytest.fixture
def tars(world, store) -> list[Tar]:
    return match_tars(store, open_tars(world.tars))


@pytest.fixture
def dataset(store, tars) -> ViewDataset:
    return ViewDataset(
        tars, StoredViews(store, check_all=True), num_classes=4, sources=[store.source(("stage4", "stage3_prefix"))]
    )


def planned(store, tars, **changes) -> EpochSampler:
    units = training_positions(tars, store=store)
    return EpochSampler(units, **{"batch_size": 6, "seed": 0, "num_views": 2, **changes})


def flat(taps):
    return {(tap, name): part for tap, parts in taps.items() for name, part in parts.items()}


def assert_same(batch, other):
    for name, value in batch._asdict().items():
        mine, theirs = value, getattr(other, name)
        if isinstance(value, torch.Tensor):
            assert torch.equal(mine, theirs), name
        elif name == "features":
            for raw, also in zip(mine, theirs, strict=True):
                assert flat(raw.taps).keys() == flat(also.taps).keys()
                assert all(torch.equal(part, flat(also.taps)[key]) for key, part in flat(raw.taps).items())
                assert torch.equal(raw.logits, also.logits)
        else:
            assert mine == theirs, name


def test_batch_joins_pixels_labels_and_features_of_its_rows_when_read(dataset, store):
    rows = [RowId(1, 3, 1), RowId(0, 0, 0), RowId(1, 3, 1)]
    batch = dataset[rows]
    assert batch.row_ids() == rows
    assert batch.pixels.shape == (3, SIZE, SIZE, 3)
    assert batch.pixels.dtype == torch.uint8
    assert batch.labels.tolist() == [3, 0, 3]
    features = store.source().read(rows)
    decoded = TorchDecoder(store.layout.codecs["stage4"])(batch.features[0].taps["stage4"])
    assert np.array_equal(decoded.numpy(), features.taps["stage4"])
    assert np.array_equal(batch.features[0].logits.numpy(), features.logits)
    assert batch.unreadable == []


def test_batch_reads_only_the_taps_it_needs_when_some_are_named(store, tars):
    batch = ViewDataset(tars, StoredViews(store), sources=[store.source(())])[[RowId(0, 0, 0)]]
    assert batch.features[0].taps == {}
    assert batch.features[0].logits.shape == (1, 4)


@pytest.mark.parametrize("start_method", ["fork", "forkserver"])  # spawn hands over the same pickle as forkserver
def test_loader_gives_the_same_batches_when_workers_make_them(dataset, store, tars, start_method):
    alone = list(BatchLoader(dataset, planned(store, tars)))
    with_workers = list(BatchLoader(dataset, planned(store, tars), workers=2, start_method=start_method))
    assert len(alone) == len(with_workers) == 4
    for batch, other in zip(alone, with_workers, strict=True):
        assert_same(batch, other)


def test_loader_leaves_the_global_random_state_when_iterated(dataset, store, tars):
    torch.manual_seed(0)
    list(BatchLoader(dataset, planned(store, tars)))
    after = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(after, torch.rand(1))


@pytest.mark.parametrize("workers", [0, 1])
def test_loader_raises_the_user_error_itself_when_a_worker_meets_one(store, tars, workers):
    dataset = ViewDataset(tars, StoredViews(store), num_classes=2)
    with pytest.raises(InputError, match=r"^label of sample '.*' in train-\d.tar is [23], expected 0..1; raise"):
        list(BatchLoader(dataset, planned(store, tars), workers=workers, start_method="fork"))


def test_loader_keeps_the_fields_of_a_mismatch_when_a_worker_meets_one(store, world, tmp_path):
    content = samples(14, seed=1, prefix="a")
    content[9]["png"] = b"not an image"
    content[2]["cls"], content[3]["cls"] = content[3]["cls"], content[2]["cls"]  # same sizes: the header hash agrees
    tars = match_tars(store, open_tars([write_tar(tmp_path / "train-0.tar", content), world.tars[1]]))
    loader = BatchLoader(ViewDataset(tars, StoredViews(store)), planned(store, tars), workers=1, start_method="fork")
    with pytest.raises(MismatchError, match="label of sample") as caught:
        list(loader)
    assert (caught.value.expected, caught.value.got) in {(2, 3), (3, 2)}


def test_unreadable_sample_is_left_out_and_named_when_views_are_drawn(tars):
    dataset = ViewDataset(tars, DrawnViews(view_policy("rrc_flip", 16)))
    batch = dataset[[RowId(0, 8, 0), RowId(0, 9, 0), RowId(0, 10, 0)]]
    assert batch.row_ids() == [RowId(0, 8, 0), RowId(0, 10, 0)]
    assert len(batch.pixels) == len(batch.labels) == 2
    assert len(batch.unreadable) == 1
    assert batch.unreadable[0].startswith("train-0.tar/a009: not an image")


def test_batch_keeps_its_types_and_shapes_when_none_of_its_images_can_be_read(tars):
    dataset = ViewDataset(tars, DrawnViews(view_policy("rrc_flip", (16, 24))))
    whole, empty = dataset[[RowId(0, 8, 0)]], dataset[[RowId(0, 9, 0)]]
    for batch, rows in ((whole, 1), (empty, 0)):
        assert (batch.rows.shape, batch.rows.dtype) == ((rows, 3), torch.int64)
        assert (batch.pixels.shape, batch.pixels.dtype) == ((rows, 16, 24, 3), torch.uint8)
        assert (batch.labels.shape, batch.labels.dtype) == ((rows,), torch.int64)
        assert batch.features == ()
    assert empty.row_ids() == []
    assert [line.partition(":")[0] for line in empty.unreadable] == ["train-0.tar/a009"]


def test_sample_is_refused_when_it_was_readable_in_the_teachers_pass_but_is_not_now(store, world, tmp_path):
    content = samples(14, seed=1, prefix="a")
    content[9]["png"] = b"not an image"
    content[11]["png"] = bytes(len(content[11]["png"]))  # the header hash cannot see it
    tars = match_tars(store, open_tars([write_tar(tmp_path / "train-0.tar", content), world.tars[1]]))
    with pytest.raises(InputError, match=r"sample 'a011' of .*train-0.tar was readable when the store was written"):
        ViewDataset(tars, StoredViews(store))[[RowId(0, 11, 0)]]


def test_positions_leave_out_quarantined_samples_when_a_store_has_some(store, tars):
    units = training_positions(tars, store=store)
    assert units[0].tolist() == [*range(9), *range(10, 14)]
    assert units[1].tolist() == list(range(12))
    assert {unit.dtype for unit in units} == {np.dtype(np.int64)}


def test_positions_are_those_of_the_keys_file_when_given(store, tars, tmp_path):
    file = tmp_path / "keys.txt"
    file.write_text("a003\n\n  b011\na009\n")  # a009 is quarantined
    assert [unit.tolist() for unit in training_positions(tars, store=store, keys=read_keys(file))] == [[3], [11]]


def test_keys_file_is_refused_when_a_key_is_in_no_tar(store, tars):
    with pytest.raises(InputError, match=r"2 keys of --keys-file are in no tar: nope, zzz; correct the file"):
        training_positions(tars, store=store, keys=frozenset({"a003", "zzz", "nope"}))


@pytest.mark.parametrize(("content", "message"), [(None, "cannot be read"), ("\n \n", "holds no key")])
def test_keys_file_is_refused_when_missing_or_empty(tmp_path, content, message):
    file = tmp_path / "keys.txt"
    if content is not None:
        file.write_text(content)
    with pytest.raises(InputError, match=message):
        read_keys(file)


def test_tars_are_put_in_unit_order_when_given_in_another(store, world):
    assert [tar.name for tar in match_tars(store, open_tars(world.tars[::-1]))] == ["train-0.tar", "train-1.tar"]


def test_tars_are_refused_when_one_is_missing_or_unknown(store, world):
    with pytest.raises(
        InputError, match=r"1 tars of the store are missing: train-1.tar \(unit 1\); add them to --tars"
    ):
        match_tars(store, open_tars(world.tars[:1]))
    with pytest.raises(InputError, match=r"1 tars are not in the store: val-0.tar; leave them out"):
        match_tars(store, open_tars([*world.tars, *world.val_tars]))


def test_tars_are_found_by_content_when_their_names_are_others_or_equal(store, world, tmp_path):
    (tmp_path / "b").mkdir()
    moved = [shutil.copy(world.tars[0], tmp_path / "x.tar"), shutil.copy(world.tars[1], tmp_path / "b" / "x.tar")]
    tars = match_tars(store, open_tars([str(path) for path in reversed(moved)]))
    assert [tar.url for tar in tars] == [str(path) for path in moved]


def test_tars_are_refused_when_one_is_given_twice(store, world, tmp_path):
    copy = shutil.copy(world.tars[0], tmp_path / "train-0.tar")
    with pytest.raises(InputError, match=r"1 tars are given twice, under several names: .*train-0.tar; give each once"):
        match_tars(store, open_tars([*world.tars, str(copy)]))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda content: content.pop(), r"tars\[train-1.tar\].samples"),
        (lambda content: content[2].update(png=content[3]["png"]), r"tars\[train-1.tar\].header_sha256"),
        (lambda content: content[2].update(__key__="x002"), r"tars\[train-1.tar\].header_sha256"),
    ],
)
def test_tar_is_refused_when_it_changed(store, world, tmp_path, change, field):
    content = samples(12, seed=2, prefix="b")
    change(content)
    changed = write_tar(tmp_path / "train-1.tar", content)
    with pytest.raises(MismatchError, match=rf"^{field} differs: store has .*, got .*; .*train-1.tar changed since"):
        match_tars(store, open_tars([world.tars[0], changed]))


def test_tar_is_refused_when_its_keys_are_not_the_stored_ones(store, world, monkeypatch):
    keys = Store.keys
    monkeypatch.setattr(Store, "keys", lambda self, unit: [*keys(self, unit)[:-1], "other"])
    with pytest.raises(MismatchError, match=r"tars\[train-0.tar\].keys\[13\] differs: store has 'other', got 'a013'"):
        match_tars(store, open_tars(world.tars))


def test_store_is_refused_when_views_are_missing(store):
    require_views(store, 2)
    with pytest.raises(
        UncommittedError,
        match=r"2 of 2 units lack views: train-0.tar \(views 2\), .*teacher-service cache.*--num-views",
    ):
        require_views(store, 3)
