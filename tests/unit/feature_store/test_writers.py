"""Many writers: real processes, no coordination; of two that write the same one wins whole and the other is told."""

import multiprocessing
import random
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress

import numpy as np
import pytest
from tiny_store import BLOCKS, everything, tiny_manifest, tiny_store, view_data

from feature_store import Store, open_store
from feature_store.commits import orphans as orphans
from feature_store.commits.locks import exclusive, lock_name, locked
from feature_store.errors import CommittedError, ResourceError
from feature_store.format.manifest import TarInfo
from feature_store.tools.verify import verify

FORK = multiprocessing.get_context("fork")
WRITERS = 3


def wide_manifest(units=9):
    tars = tuple(TarInfo(f"tar-{unit}.tar", 1 + unit % 5, f"{unit:064d}") for unit in range(units))
    return tiny_manifest().__class__(**{**tiny_manifest().__dict__, "tars": tars})


def in_processes(target, *per_writer):
    """Run target(barrier, *arguments) in WRITERS processes; their answers."""
    barrier, answers = FORK.Barrier(WRITERS), FORK.SimpleQueue()

    def run(arguments):
        answers.put((arguments[0], target(barrier, *arguments)))

    processes = [FORK.Process(target=run, args=(arguments,)) for arguments in zip(*per_writer, strict=True)]
    for process in processes:
        process.start()
    found = dict(answers.get() for _ in processes)
    for process in processes:
        process.join()
        assert process.exitcode == 0
    return [found[arguments[0]] for arguments in zip(*per_writer, strict=True)]


def test_three_writers_fill_disjoint_units_without_coordination(tmp_path):
    manifest = wide_manifest()
    path = Store.create(tmp_path / "s", manifest, BLOCKS).path

    def write(barrier, writer):
        store = open_store(path)
        barrier.wait()
        for unit in range(writer, len(manifest.tars), WRITERS):
            store.write_unit(unit, 0, view_data(manifest, unit, range(2)))
        store.write_commit_index()
        return store.committed.units

    assert in_processes(write, range(WRITERS)) == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]
    alone = Store.create(tmp_path / "alone", manifest, BLOCKS)
    for unit in range(len(manifest.tars)):
        alone.write_unit(unit, 0, view_data(manifest, unit, range(2)))
    assert everything(open_store(path)) == everything(alone)
    assert verify(path).findings == []


@pytest.mark.parametrize("together", range(4))
def test_of_three_writers_of_the_same_units_one_wins_whole(tmp_path, together):
    """Each writes other values, so that a mixture would show."""
    manifest = wide_manifest(4)
    path = Store.create(tmp_path / "s", manifest, BLOCKS).path

    def write(barrier, writer):
        store, told = open_store(path), {}
        order = random.Random(writer + together).sample(range(4), 4) if together % 2 else range(4)
        barrier.wait()
        for unit in order:
            try:
                store.write_unit(unit, 0, view_data(manifest, unit, range(2), salt=writer))
                told[unit] = "won"
            except (CommittedError, ResourceError) as error:
                assert f"unit {unit} (tar-{unit}.tar)" in str(error)  # noqa: PT017
                told[unit] = type(error).__name__
        return told

    told = in_processes(write, range(WRITERS))
    store = open_store(path)
    assert verify(path).findings == []
    for unit in range(4):
        (winner,) = [writer for writer in range(WRITERS) if told[writer][unit] == "won"]
        expected = view_data(manifest, unit, range(2), salt=winner)
        for view in range(2):
            batches = list(store.source().iter_unit(unit, view))
            values = np.concatenate([batch.taps["stage4"] for batch in batches])
            assert np.array_equal(values, expected.features["stage4"][""][view])
            assert np.array_equal(store.pixel_crcs(unit, view), expected.pixel_crc[view])


def test_a_writer_is_told_at_once_when_another_one_holds_the_unit(tmp_path):
    store = tiny_store(tmp_path / "s", units=())
    with exclusive(store.objects, lock_name(1), "-"):
        with pytest.raises(ResourceError, match=r"another process is writing unit 1 \(tar-1.tar\)"):
            store.write_unit(1, 0, view_data(store.manifest, 1, range(2)))
        store.write_unit(2, 0, view_data(store.manifest, 2, range(2)))
    store.write_unit(1, 0, view_data(store.manifest, 1, range(2)))
    assert open_store(store.path).committed.units == [1, 2]
    assert list((store.path / ".locks").iterdir()) == []


@pytest.mark.parametrize("views", [range(2), range(1), range(1, 2)])
def test_a_late_writer_of_overlapping_views_is_told_and_changes_nothing(tmp_path, views):
    store = tiny_store(tmp_path / "s", units=())
    late = open_store(store.path)
    store.write_unit(0, 0, view_data(store.manifest, 0, range(2)))
    before = {f: f.read_bytes() for f in store.path.rglob("*") if f.is_file()}
    with pytest.raises(CommittedError, match=r"committed already by commits/u00000-v0-1.json"):
        late.write_unit(0, views.start, view_data(store.manifest, 0, views, salt=1))
    assert {f: f.read_bytes() for f in store.path.rglob("*") if f.is_file()} == before


def test_remove_orphans_leaves_a_unit_alone_when_its_writer_is_at_work(tmp_path):
    store = tiny_store(tmp_path / "s", units=(0,))
    (store.path / "commits/u00000-v0-1.json").unlink()
    with exclusive(store.objects, lock_name(0), "-"):
        assert store.remove_orphans() == []
    assert len(store.remove_orphans()) > 20


def test_remove_orphans_locks_only_units_of_which_something_is_left(tmp_path, monkeypatch):
    store = tiny_store(tmp_path / "s", units=(0, 1))
    stray = store.path / "logits/c/1/2/0"
    stray.parent.mkdir(parents=True, exist_ok=True)
    stray.write_bytes(b"half")
    (store.path / ".locks").mkdir(exist_ok=True)
    (store.path / ".locks/u00001").write_bytes(b"")  # its holder died after it committed
    names = []
    monkeypatch.setattr(orphans, "exclusive", lambda objects, name, refusal: names.append(name) or nullcontext())

    assert store.remove_orphans() == ["logits/c/1/2/0"]

    assert sorted(names) == [lock_name(1), lock_name(2)]  # a writer of another would have been refused meanwhile


def test_locked_waits_its_turn_when_others_remove_the_empty_folder(tmp_path):
    def take_turns():
        for _ in range(300):
            with locked(tmp_path / "locks" / "one"):
                pass
            with suppress(OSError):
                (tmp_path / "locks").rmdir()

    with ThreadPoolExecutor(4) as pool:
        for turn in [pool.submit(take_turns) for _ in range(4)]:
            turn.result()


def test_remove_orphans_keeps_what_was_committed_since_the_store_was_opened(tmp_path):
    store = tiny_store(tmp_path / "s", units=())
    open_store(store.path).write_unit(0, 0, view_data(store.manifest, 0, range(2)))
    assert store.remove_orphans() == []
    assert open_store(store.path).committed.units == [0]
