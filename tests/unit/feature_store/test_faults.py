"""Faults on purpose: everything is detected or harmless, nothing is silent.

A short campaign by default; ``FAULT_CAMPAIGN=long`` runs the whole one (a quarter of an hour).
"""

import errno
import itertools
import os
import random
import resource
import signal
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from tiny_store import BLOCKS, everything, tiny_manifest, tiny_store, view_data

from feature_store import RowId, Store, open_store
from feature_store.backends.local import LocalObjects
from feature_store.errors import CommittedError, ResourceError, UserError
from feature_store.format.manifest import TarInfo
from feature_store.tools.verify import verify

LONG = os.environ.get("FAULT_CAMPAIGN") == "long"
FLIPS, OBJECTS, KILLS = (1000, 10**6, 200) if LONG else (80, 20, 10)
METADATA = ("metadata", "blocks", "index", "growth")


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A store with everything in it, its values, and its files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        store = tiny_store(tmp_path_factory.mktemp("sound") / "s", units=())
        for unit in range(3):
            store.write_unit(
                unit, 0, view_data(store.manifest, unit, range(2), {1: "unreadable"} if unit == 1 else None)
            )
        store.write_commit_index()
    files = sorted(f for f in store.path.rglob("*") if f.is_file())
    return store.path, everything(open_store(store.path)), files


def outcome(path, clean):
    """How a damaged store behaves: ``refused`` or ``harmless`` on reading; wrong values fail the test."""
    try:
        got = everything(open_store(path))
    except UserError:
        return "refused"
    assert got == clean, "wrong values were read without an error"
    return "harmless"


def detected(path, file):
    """Whether verify finds the damage, and says to which unit it belongs."""
    try:
        findings = verify(path).findings
    except UserError:
        return file.name == "zarr.json"
    name = file.relative_to(path).as_posix()
    for finding in findings:
        if finding.kind in METADATA and name.startswith(finding.path):
            return True
        if finding.path == name and finding.unit is not None:
            return True
    return False


def test_a_flipped_bit_anywhere_is_found_by_verify_and_never_read(sound):
    path, clean, files = sound
    rng, counts = random.Random(1), Counter()
    weights = [f.stat().st_size for f in files]
    for trial in range(FLIPS):
        file = rng.choice(files) if trial % 2 else rng.choices(files, weights)[0]
        raw = file.read_bytes()
        if not raw:
            continue
        at = rng.randrange(len(raw))
        try:
            file.write_bytes(raw[:at] + bytes([raw[at] ^ (1 << rng.randrange(8))]) + raw[at + 1 :])
            counts[outcome(path, clean)] += 1
            assert detected(path, file), f"verify missed byte {at} of {file}"
        finally:
            file.write_bytes(raw)
    print(f"flipped bits: {dict(counts)}, all found by verify")
    assert min(counts["refused"], counts["harmless"]) > FLIPS // 5  # metadata and the index are harmless
    assert verify(path).findings == []


@pytest.mark.parametrize("fault", ["deleted", "truncated", "emptied", "longer"])
def test_a_damaged_object_is_found_by_verify_and_never_read(sound, fault):
    path, clean, files = sound
    rng, counts = random.Random(2), Counter()
    for file in rng.sample(files, min(OBJECTS, len(files))):
        raw = file.read_bytes()
        try:
            if fault == "deleted":
                file.unlink()
            else:
                cut = {"truncated": raw[: rng.randrange(1, len(raw))], "emptied": b"", "longer": raw + b"\0"}
                file.write_bytes(cut[fault])
            if file.parent.name == "commits" and fault == "deleted":
                counts[gone(path, file)] += 1
                continue
            counts[outcome(path, clean)] += 1
            assert detected(path, file), f"verify missed {file}"
        finally:
            file.write_bytes(raw)
    print(f"{fault}: {dict(counts)}, all found by verify")


def gone(path, file):
    """A deleted index is nothing; a deleted record takes its unit with it, which is then not served."""
    if file.name == "index":
        assert verify(path).findings == []
        return "harmless"
    unit = int(file.name[1:6])
    store = open_store(path)
    assert store.committed_views(unit) == set()
    with pytest.raises(UserError, match=f"unit {unit} .* was never committed"):
        store.source().read([RowId(unit, 0, 0)])
    report = verify(path)
    assert report.missing_views == {unit: [0, 1]}
    assert {(finding.kind, finding.unit) for finding in report.findings} == {("orphan", unit)}
    return "refused"


def test_swapped_objects_of_one_array_are_found_by_verify_and_never_read(sound):
    path, clean, files = sound
    chunks = [f for f in files if "/c/" in f.as_posix() and "teacher" not in f.parts]
    pairs = [
        (one, two)
        for one, two in itertools.combinations(chunks, 2)
        if one.as_posix().partition("/c/")[0] == two.as_posix().partition("/c/")[0]
        and one.read_bytes() != two.read_bytes()
    ]
    chosen = pairs if LONG else random.Random(3).sample(pairs, 15)
    counts = Counter()
    for one, two in chosen:
        contents = one.read_bytes(), two.read_bytes()
        try:
            one.write_bytes(contents[1]), two.write_bytes(contents[0])
            counts[outcome(path, clean)] += 1
            assert detected(path, one)
            assert detected(path, two)
        finally:
            one.write_bytes(contents[0]), two.write_bytes(contents[1])
    print(f"swapped: {dict(counts)} of {len(chosen)}, all found by verify")
    # key_hash is for others to read; the store itself compares keys
    assert counts["refused"] >= len(chosen) * 0.8


class TestStaleIndex:
    """The index is a cache: it may be old, gone, damaged or another store's."""

    def test_records_it_does_not_know_are_served(self, tmp_path):
        store = tiny_store(tmp_path / "s", units=(0,))
        store.write_commit_index()
        open_store(store.path).write_unit(1, 0, view_data(store.manifest, 1, range(2)))
        assert open_store(store.path).committed.units == [0, 1]

    def test_records_that_are_gone_are_not_served(self, tmp_path):
        store = tiny_store(tmp_path / "s")
        store.write_commit_index()
        (store.path / "commits/u00001-v0-1.json").unlink()
        assert open_store(store.path).committed.units == [0, 2]

    def test_a_unit_written_again_is_served_with_its_new_values(self, tmp_path):
        store = tiny_store(tmp_path / "s")
        store.write_commit_index()
        (store.path / "commits/u00001-v0-1.json").unlink()
        open_store(store.path).write_unit(1, 0, view_data(store.manifest, 1, range(2), salt=5))
        assert np.array_equal(
            open_store(store.path).source().read([RowId(1, 0, 0)]).taps["stage4"][0],
            view_data(store.manifest, 1, range(1), salt=5).features["stage4"][""][0, 0],
        )
        assert verify(store.path).findings == []

    def test_another_stores_is_ignored(self, tmp_path):
        store, other = tiny_store(tmp_path / "s", units=(0,)), tiny_store(tmp_path / "o", tiny_manifest(seed=8))
        other.write_commit_index()
        (store.path / "commits/index").write_bytes((other.path / "commits/index").read_bytes())
        assert open_store(store.path).committed.units == [0]

    @pytest.mark.parametrize("raw", [b"", b"\0" * 4, b"\0" * 100])
    def test_an_empty_one_is_ignored(self, tmp_path, raw):
        """Nothing has the checksum 0, and so does not count as whole."""
        store = tiny_store(tmp_path / "s", units=(0,))
        (store.path / "commits/index").write_bytes(raw)
        assert open_store(store.path).committed.units == [0]
        assert [finding.kind for finding in verify(store.path).findings] == ["index"]

    def test_it_gives_the_same_records_as_reading_them(self, tmp_path):
        store = tiny_store(tmp_path / "s", quarantined={0: "zero bytes"})
        before = open_store(store.path).committed.records
        assert store.write_commit_index() == 3
        after = open_store(store.path).committed
        assert after.is_indexed(1, range(2))
        assert after.records == before


@pytest.mark.parametrize("limit", [0, 30, 60, 100, 200, 400, 800, 10**6])
def test_a_full_disk_commits_nothing_or_everything(tmp_path, limit):
    """A real refusal by the kernel: the file size limit of a child process."""
    store = tiny_store(tmp_path / "s", units=(0,))
    before = everything(store)
    twin = tiny_store(tmp_path / "twin", units=(1,))
    largest = max(
        (twin.path / path).stat().st_size for path in (*twin.committed.record(1, 0).objects, "commits/u00001-v0-1.json")
    )
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            store.write_unit(1, 0, view_data(store.manifest, 1, range(2)))
        except OSError as error:
            os._exit(3 if error.errno == errno.EFBIG else 4)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    after = open_store(store.path)
    assert (code, after.committed.units) in ((3, [0]), (0, [0, 1]))
    assert code == (0 if limit >= largest else 3)
    if code:
        assert everything(after) == before
        after.remove_orphans()
        after.write_unit(1, 0, view_data(store.manifest, 1, range(2)))
    assert verify(store.path).findings == []


FAILING_WRITES = ("pwritev", "fsync", "link", "rename", "open")


@pytest.mark.parametrize("call", FAILING_WRITES)
def test_an_input_output_error_on_writing_commits_nothing_or_everything(tmp_path, monkeypatch, call):
    """The k-th call fails with EIO, for every k there is (some k by default)."""
    store = tiny_store(tmp_path / "s", units=())
    real, data = getattr(os, call), view_data(store.manifest, 0, range(2))
    for k in itertools.count(0, 1 if LONG else 9):
        calls = itertools.count()

        def failing(*arguments, k=k, calls=calls, **options):
            if next(calls) == k:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, failing)
            try:
                store.write_unit(0, 0, data)
                refused = False
            except (OSError, UserError):
                refused = True
        after = open_store(store.path)
        if after.committed.units:
            assert verify(store.path).findings == []
            (store.path / "commits/u00000-v0-1.json").unlink()
        else:
            assert refused
        assert {finding.kind for finding in verify(store.path).findings} <= {"orphan"}
        store.remove_orphans()
        if next(calls) <= k:
            break
    assert k > 0
    store.write_unit(0, 0, data)
    assert verify(store.path).findings == []


@pytest.mark.parametrize("call", ["preadv", "open"])
def test_an_input_output_error_on_reading_is_raised_and_never_read(sound, monkeypatch, call):
    path, clean, _ = sound
    real, raised = getattr(os, call), 0
    for k in itertools.count(0, 1 if LONG else 7):
        calls = itertools.count()

        def failing(*arguments, k=k, calls=calls, **options):
            if next(calls) == k:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, failing)
            try:
                assert everything(open_store(path)) == clean
            except (OSError, UserError):
                raised += 1
        if next(calls) <= k:
            break
    assert raised > 0


@pytest.mark.parametrize("writers", [1, 3])
def test_a_kill_at_any_moment_leaves_whole_units_or_orphans(tmp_path, writers):
    manifest = tiny_manifest()
    tars = tuple(TarInfo(f"tar-{unit}.tar", 1 + unit % 5, f"{unit:064d}") for unit in range(8))
    manifest = manifest.__class__(**{**manifest.__dict__, "tars": tars})
    rng, counts, path = random.Random(writers), Counter(), tmp_path / "0"
    Store.create(path, manifest, BLOCKS)
    for kill in range(KILLS):
        pids = [_start_writer(path, manifest, rng.randrange(10**6)) for _ in range(writers)]
        time.sleep(rng.uniform(0, 0.15))
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        for pid in pids:
            os.waitpid(pid, 0)
        counts[_state(path, manifest)] += 1
        store = open_store(path)
        store.remove_orphans()
        assert verify(path).findings == []
        if not store.committed.missing_views():
            path = tmp_path / f"{kill + 1}"
            Store.create(path, manifest, BLOCKS)
    print(f"kills with {writers} writers: {dict(counts)}")
    assert sum(counts.values()) == KILLS


def _start_writer(path: Path, manifest, seed: int) -> int:
    """Fork a writer that goes through all units in some order until it dies."""
    pid = os.fork()
    if pid:
        return pid
    try:
        store, order = open_store(path), random.Random(seed).sample(range(8), 8)
        for unit in order:
            for first in (0, 1):
                try:
                    store.write_unit(unit, first, view_data(manifest, unit, range(first, first + 1)))
                except (CommittedError, ResourceError):
                    continue
            if unit == 3:
                store.write_commit_index()
        signal.pause()
    finally:
        os._exit(9)


def _state(path, manifest):
    """What a kill left: every committed view reads as it was written, and verify finds orphans at most."""
    store = open_store(path)
    for unit in store.committed.units:
        for view in store.committed_views(unit):
            expected = view_data(manifest, unit, range(view, view + 1))
            (batch,) = store.source().iter_unit(unit, view)
            assert np.array_equal(batch.taps["stage4"], expected.features["stage4"][""][0])
            assert np.array_equal(store.pixel_crcs(unit, view), expected.pixel_crc[0])
            assert store.view_params(unit, view) == expected.params[0]
    kinds = {finding.kind for finding in verify(path).findings}
    assert kinds <= {"orphan"}
    done = sum(len(store.committed_views(unit)) for unit in range(8))
    return ("orphans" if kinds else "clean") + (" after some views" if done else " before any view")


def test_a_read_of_a_local_object_never_comes_back_short(tmp_path, monkeypatch):
    """The kernel may read less than asked for; the rest is asked for again."""
    (tmp_path / "x").write_bytes(bytes(range(200)))
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda d, buffers, offset: real(d, [buffers[0][:7]], offset))
    target = bytearray(150)
    LocalObjects(tmp_path).read_into("x", 20, [memoryview(target)])
    assert bytes(target) == bytes(range(20, 170))
