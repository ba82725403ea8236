"""Data, then its directories, then the record, then its directory: synced in this order before a unit counts."""

import os
from pathlib import Path

from tiny_store import tiny_manifest, tiny_store, unit_data

from feature_store import Store


def watched(monkeypatch, root):
    """What happens to the files below root: ``("sync" | "name", path)`` in order."""
    events = []
    link, rename = os.link, os.rename

    def sync(descriptor):
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        events.append(("sync", os.path.relpath(path, root)))

    def named(call):
        def inner(source, target, **options):
            call(source, target, **options)
            events.append(("name", os.path.relpath(target, root)))

        return inner

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "link", named(link))
    monkeypatch.setattr(os, "rename", named(rename))
    return events


def require_durable(events, before, path):
    """A file was synced under its temporary name, got its name, and then its folder was synced; all before an event."""
    done = events[:before]
    named = max(at for at, event in enumerate(done) if event == ("name", path))
    partial = [at for at, (what, name) in enumerate(done[:named]) if what == "sync" and name.startswith(f"{path}.")]
    assert partial, f"{path} got its name before its bytes were synced"
    folder = Path(path).parent.as_posix()
    while True:
        assert ("sync", folder) in done[named:], f"{folder} was not synced after {path} got its name"
        if folder == ".":
            return
        folder = Path(folder).parent.as_posix()


def test_write_syncs_every_object_and_folder_before_the_record_counts(tmp_path, monkeypatch):
    store = tiny_store(tmp_path / "s", units=())
    events = watched(monkeypatch, store.path)
    store.write_unit(0, 0, unit_data(store.manifest, 0))
    record = store.committed.record(0, 0)
    published = events.index(("name", record.path))
    assert len(record.objects) > 20
    for path in record.objects:
        require_durable(events, published, path)
    require_durable(events, len(events), record.path)


def test_create_syncs_everything_before_the_root_makes_it_a_store(tmp_path, monkeypatch):
    (tmp_path / "s").mkdir()
    events = watched(monkeypatch, tmp_path / "s")
    tiny_store_path = Store.create(tmp_path / "s", tiny_manifest(), {}).path
    born = events.index(("name", "zarr.json"))
    arrays = [str(f.relative_to(tiny_store_path)) for f in tiny_store_path.rglob("zarr.json")]
    for path in arrays:
        require_durable(events, len(events) if path == "zarr.json" else born, path)


def test_grow_syncs_the_arrays_before_the_root_says_so(tmp_path, monkeypatch):
    manifest = tiny_manifest()
    store = Store.create(tmp_path / "s", manifest, {})
    events = watched(monkeypatch, store.path)
    store.grow(tiny_manifest(views=5))
    said = events.index(("name", "zarr.json"))
    for path in store.layout.arrays:
        require_durable(events, said, f"{path}/zarr.json")
    require_durable(events, len(events), "zarr.json")
