"""A store grows by views and tars, survives a kill at every step of it, and never forgets what it had."""

import dataclasses
import os
import signal

import numpy as np
import pytest
import zarr
from tiny_store import everything, tiny_manifest, tiny_store, view_data

from feature_store import RowId, Store, open_store
from feature_store.commits.locks import exclusive, lock_name
from feature_store.errors import InputError, MismatchError, ResourceError
from feature_store.format.manifest import TarInfo
from feature_store.tools.info import summarise
from feature_store.tools.verify import verify

NEW_TARS = (TarInfo("tar-3.tar", 5, "3" * 64), TarInfo("tar-4.tar", 1, "4" * 64))


def grown(manifest, views=4, tars=NEW_TARS):
    return dataclasses.replace(manifest, num_views=views, tars=(*manifest.tars, *tars))


def filled(path, units=(0, 1, 2)):
    store = tiny_store(path, units=())
    for unit in units:
        store.write_unit(unit, 0, view_data(store.manifest, unit, range(2)))
    return store


def test_grow_adds_views_and_tars_and_keeps_everything(tmp_path):
    store = filled(tmp_path / "s")
    before = everything(store)
    larger = store.grow(grown(store.manifest))
    assert everything(larger) == before
    assert (larger.manifest.num_views, len(larger.manifest.tars)) == (4, 5)
    assert larger.committed.missing_views() == {0: [2, 3], 1: [2, 3], 2: [2, 3], 3: [0, 1, 2, 3], 4: [0, 1, 2, 3]}
    for unit in range(3):
        larger.write_unit(unit, 2, view_data(larger.manifest, unit, range(2, 4)))
    for unit in (3, 4):
        larger.write_unit(unit, 0, view_data(larger.manifest, unit, range(4)))
    assert verify(store.path).findings == []
    assert everything(open_store(store.path)) == everything(larger)
    whole = Store.create(tmp_path / "whole", larger.manifest, {})
    for unit in range(5):
        whole.write_unit(unit, 0, view_data(whole.manifest, unit, range(4)))
    assert everything(whole) == everything(larger)
    assert summarise(open_store(store.path))["bytes"] == summarise(whole)["bytes"]


def test_grow_shows_new_rows_as_fill_values_when_opened_with_plain_zarr(tmp_path):
    store = filled(tmp_path / "s")
    store.grow(grown(store.manifest))
    group = zarr.open_group(store.path, mode="r")
    assert group["taps/stage4"].shape == (4, 25, 4, 6)
    assert group["label"].shape == (25,)
    assert np.isnan(group["taps/stage4"][2:]).all()
    assert np.isfinite(group["taps/stage4"][:2, :5]).all()


def test_an_old_reader_and_an_old_writer_go_on_when_the_store_grew(tmp_path):
    reader = filled(tmp_path / "s", units=(0, 1))
    source, writer = reader.source(), open_store(reader.path)
    before = everything(reader)
    larger = reader.grow(grown(reader.manifest))
    larger.write_unit(3, 0, view_data(larger.manifest, 3, range(4)))
    assert everything(reader) == before
    assert source.read([RowId(1, 2, 1)]).rows.tolist() == [[1, 2, 1]]
    writer.write_unit(2, 0, view_data(writer.manifest, 2, range(2)))
    assert open_store(reader.path).committed.units == [0, 1, 2, 3]
    assert verify(reader.path).findings == []


def test_appended_views_do_not_rewrite_what_other_views_share(tmp_path):
    store = filled(tmp_path / "s")
    larger = store.grow(grown(store.manifest, tars=()))
    label = store.path / "label/c/0"
    before = label.stat().st_ino
    larger.write_unit(0, 2, view_data(larger.manifest, 0, range(2, 4)))
    assert label.stat().st_ino == before
    changed = view_data(larger.manifest, 1, range(2, 4))
    with pytest.raises(MismatchError, match=r"label/c/1 differs.*tar-1.tar changed since"):
        larger.write_unit(1, 2, dataclasses.replace(changed, labels=changed.labels + 1))
    assert everything(open_store(store.path)) == everything(larger)


def test_grow_does_nothing_when_nothing_is_new(tmp_path):
    store = filled(tmp_path / "s")
    smaller_need = dataclasses.replace(store.manifest, capacity=4 + 1, key_width=7, software={"numpy": "9"})
    files = {f: f.stat().st_mtime_ns for f in store.path.rglob("zarr.json")}
    assert not smaller_need.growth_from(store.manifest)
    assert store.grow(smaller_need).manifest == store.manifest
    assert {f: f.stat().st_mtime_ns for f in store.path.rglob("zarr.json")} == files


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("seed", {"seed": 4}),
        ("teacher.weights_sha256", {"teacher": dataclasses.replace(tiny_manifest().teacher, weights_sha256="f" * 64)}),
        ("num_views", {"num_views": 1}),
        ("tars", {"tars": tiny_manifest().tars[:2]}),
        ("tars[0].header_sha256", {"tars": (NEW_TARS[0], *tiny_manifest().tars)}),
        ("tars[2].header_sha256", {"tars": (*tiny_manifest().tars[:2], TarInfo("tar-2.tar", 4, "f" * 64))}),
        ("capacity", {"capacity": 6}),
        ("key_width", {"key_width": 17}),
        ("samples of big.tar", {"tars": (*tiny_manifest().tars, TarInfo("big.tar", 6, "b" * 64))}),
    ],
)
def test_growth_refuses_by_field_when_more_than_views_and_tars_differs(tmp_path, field, changes):
    store = filled(tmp_path / "s")
    with pytest.raises(MismatchError) as caught:
        store.grow(dataclasses.replace(store.manifest, **changes))
    assert caught.value.field == field
    assert open_store(store.path).manifest == store.manifest


def test_growth_fits_larger_tars_when_the_store_was_made_with_room(tmp_path):
    manifest = dataclasses.replace(tiny_manifest(), capacity=8, key_width=32)
    store = Store.create(tmp_path / "s", manifest, {})
    larger = store.grow(grown(dataclasses.replace(manifest, capacity=7), tars=(TarInfo("big.tar", 7, "b" * 64),)))
    larger.write_unit(3, 0, view_data(larger.manifest, 3, range(4)))
    assert larger.source().read([RowId(3, 6, 3)]).rows.tolist() == [[3, 6, 3]]
    assert larger.manifest.capacity == 8


def test_create_refuses_when_a_tar_does_not_fit(tmp_path):
    with pytest.raises(InputError, match=r"tar-0.tar has 5 samples, the capacity is 4"):
        Store.create(tmp_path / "s", dataclasses.replace(tiny_manifest(), capacity=4), {})
    assert not (tmp_path / "s").exists()


def test_grow_refuses_when_another_process_is_growing_the_store(tmp_path):
    store = filled(tmp_path / "s", units=())
    with (
        exclusive(store.objects, lock_name(None), "-"),
        pytest.raises(ResourceError, match="another process is growing"),
    ):
        store.grow(grown(store.manifest))


@pytest.mark.parametrize("when", ["before", "half", "after"])
def test_grow_survives_a_kill_at_every_step(tmp_path, when):
    """A child is killed with SIGKILL before, in the middle of, or after its k-th write, for every k there is."""
    store = filled(tmp_path / "s")
    wanted, before = grown(store.manifest), everything(store)
    steps = 0
    while not killed_growing(store, wanted, steps, when):
        steps += 1
        assert everything(open_store(store.path)) == before
        kinds = {finding.kind for finding in verify(store.path).findings}
        assert kinds <= {"growth", "orphan"}
        if open_store(store.path).manifest == store.manifest:
            plain = zarr.open_group(store.path, mode="r")
            assert all(plain[name].shape[0] >= 2 for name in ("taps/stage4", "logits", "view/crop"))
    assert steps == len(list(store.path.rglob("zarr.json"))) - 6  # arrays and the root; not groups and blocks
    open_store(store.path).remove_orphans()
    assert verify(store.path).findings == []
    larger = open_store(store.path)
    assert larger.manifest == wanted
    larger.write_unit(4, 0, view_data(wanted, 4, range(4)))
    assert verify(store.path).findings == []


def killed_growing(store, wanted, step, when):
    """Grow in a child that dies at a step; whether it lived because there are fewer steps."""
    pid = os.fork()
    if pid == 0:
        put, count = type(store.objects).put, iter(range(10**6))

        def dying_put(self, path, payload, **options):
            if next(count) != step:
                return put(self, path, payload, **options)
            if when == "half":
                (self.root / f"{path}.1-1.partial").write_bytes(bytes(payload)[:40])
            elif when == "after":
                put(self, path, payload, **options)
            return os.kill(os.getpid(), signal.SIGKILL)

        type(store.objects).put = dying_put
        try:
            open_store(store.path).grow(wanted)
            os._exit(0)
        finally:
            os._exit(9)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status == 0
