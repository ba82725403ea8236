"""A store against a dictionary: any sequence of writing, crashing, resuming, growing, compacting and reading."""

import dataclasses
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tiny_store import BLOCKS, everything, tiny_manifest, view_data

from feature_store import RowId, Store, open_store
from feature_store.backends.base import PARTIAL_SUFFIX
from feature_store.backends.local import LocalObjects
from feature_store.errors import CommittedError, UncommittedError
from feature_store.format.manifest import TarInfo
from feature_store.tools.verify import verify

LONG = os.environ.get("FAULT_CAMPAIGN") == "long"
MOST_UNITS, MOST_VIEWS = 4, 4


class Crash(BaseException):
    """The process died here."""


class CrashingObjects(LocalObjects):
    """Dies at its k-th change: before it, after it, or leaving half of an object under a temporary name."""

    def __init__(self, root, step, how):
        super().__init__(root)
        self._left, self._how = step, how

    def put(self, path, payload, **options):
        self._left -= 1
        if self._left != 0:
            if self._left < 0:
                raise Crash
            return super().put(path, payload, **options)
        if self._how == "half":
            target = self.root / f"{path}.1-1{PARTIAL_SUFFIX}"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(b"half")
        elif self._how == "after":
            super().put(path, payload, **options)
        raise Crash

    def delete(self, path):
        self._left -= 1
        if self._left <= 0:
            raise Crash
        super().delete(path)


class StoreMachine(RuleBasedStateMachine):
    """The model: which values (salt) and quarantined samples each committed view has."""

    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.path = self.folder / "store"
        self.model: dict[tuple[int, int], tuple[int, tuple[int, ...]]] = {}
        self.indexes: list[bytes] = []
        self.readers: list[tuple[Store, tuple]] = []

    def teardown(self):
        shutil.rmtree(self.folder)

    @initialize(policy=st.sampled_from(["a2", "rrc_flip"]))
    def create(self, policy):
        manifest = tiny_manifest(policy=policy, views=1)
        tars = (TarInfo("0.tar", 3, "0" * 64),)
        self.manifest = dataclasses.replace(manifest, tars=tars)
        Store.create(self.path, self.manifest, BLOCKS)

    @rule(unit=st.integers(0, MOST_UNITS - 1), first=st.integers(0, MOST_VIEWS - 1), more=st.integers(0, 2),
          salt=st.integers(0, 5), bad=st.booleans())  # fmt: skip
    def write(self, unit, first, more, salt, bad):
        unit, views, quarantined = self.place(unit, first, more, bad)
        try:
            open_store(self.path).write_unit(unit, views.start, self.data(unit, views, salt, quarantined))
            assert not any((unit, view) in self.model for view in views)
            self.model.update({(unit, view): (salt, tuple(quarantined)) for view in views})
        except CommittedError:
            assert any((unit, view) in self.model for view in views)

    @rule(unit=st.integers(0, MOST_UNITS - 1), first=st.integers(0, MOST_VIEWS - 1), more=st.integers(0, 2),
          step=st.integers(1, 60), how=st.sampled_from(["before", "half", "after"]))  # fmt: skip
    def crash_while_writing(self, unit, first, more, step, how):
        unit, views, quarantined = self.place(unit, first, more, bad=False)
        store = open_store(self.path)
        store.objects = CrashingObjects(self.path, step, how)
        with suppress(Crash, CommittedError):
            store.write_unit(unit, views.start, self.data(unit, views, 9, quarantined))
        if all(open_store(self.path).is_committed(unit, view) for view in views):
            self.model.update({(unit, view): self.model.get((unit, view), (9, ())) for view in views})

    @rule(views=st.integers(0, 1), tars=st.integers(0, 1), samples=st.integers(1, 5))
    def grow(self, views, tars, samples):
        self.manifest = open_store(self.path).grow(self.larger(views, tars, samples)).manifest

    @rule(step=st.integers(1, 40), how=st.sampled_from(["before", "half", "after"]))
    def crash_while_growing(self, step, how):
        store, wanted = open_store(self.path), self.larger(1, 1, 2)
        store.objects = CrashingObjects(self.path, step, how)
        with suppress(Crash):
            store.grow(wanted)
        now = open_store(self.path).manifest
        assert now in (self.manifest, wanted)
        self.manifest = now

    @rule()
    def resume(self):
        open_store(self.path).remove_orphans()

    @rule()
    def write_commit_index(self):
        store = open_store(self.path)
        assert store.write_commit_index() == len(store.committed.records)
        self.indexes.append((self.path / "commits/index").read_bytes())

    @precondition(lambda self: self.indexes)
    @rule(data=st.data())
    def put_an_old_index_back(self, data):
        (self.path / "commits/index").write_bytes(data.draw(st.sampled_from(self.indexes)))

    @precondition(lambda self: self.indexes)
    @rule(at=st.integers(0), bit=st.integers(0, 7))
    def damage_the_index(self, at, bit):
        raw = bytearray(self.indexes[-1])
        raw[at % len(raw)] ^= 1 << bit
        (self.path / "commits/index").write_bytes(raw)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def lose_a_record(self, data):
        record = data.draw(st.sampled_from(open_store(self.path).committed.records))
        (self.path / record.path).unlink()
        for view in record.views:
            del self.model[record.unit, view]
        # Readers that were opened before hold on to what they knew; these bytes may be written anew. Nor may an index
        # from before come back: its lengths alone cannot tell a record from one written in its place.
        self.readers, self.indexes = [], []

    @rule()
    def keep_a_reader(self):
        store = open_store(self.path)
        self.readers.append((store, everything(store)))

    @invariant()
    def old_readers_go_on(self):
        for store, seen in self.readers[-2:]:
            assert everything(store) == seen

    @invariant()
    def the_store_is_the_model(self):
        if not hasattr(self, "manifest"):
            return
        store = open_store(self.path)
        units = range(len(self.manifest.tars))
        assert {(unit, view) for unit in units for view in store.committed_views(unit)} == set(self.model)
        source = store.source()
        for (unit, view), (salt, quarantined) in self.model.items():
            expected = self.data(unit, range(view, view + 1), salt, quarantined)
            good = [i for i in range(len(expected.keys)) if i not in quarantined]
            batch = source.read([RowId(unit, i, view) for i in good])
            assert np.array_equal(batch.taps["stage4"], expected.features["stage4"][""][0, good])
            assert np.array_equal(store.pixel_crcs(unit, view)[good], expected.pixel_crc[0, good])
            assert store.rows(expected.keys, view).tolist() == [[unit, i, view] for i in range(len(expected.keys))]
        for unit in units:
            for view in set(range(self.manifest.num_views)) - store.committed_views(unit):
                try:
                    source.read([RowId(unit, 0, view)])
                    raise AssertionError(f"view {view} of unit {unit} was never committed, and read")
                except UncommittedError:
                    pass

    @invariant()
    def verify_finds_no_damage(self):
        if hasattr(self, "manifest"):
            kinds = {finding.kind for finding in verify(self.path).findings}
            assert kinds <= {"orphan", "growth", "index"}

    def place(self, unit, first, more, bad):
        unit, first = unit % len(self.manifest.tars), first % self.manifest.num_views
        views = range(first, min(first + more + 1, self.manifest.num_views))
        return unit, views, {0: "bad"} if bad and not self.shared(unit) else {}

    def shared(self, unit):
        return any(committed == unit for committed, _ in self.model)

    def data(self, unit, views, salt, quarantined):
        return view_data(self.manifest, unit, views, dict.fromkeys(quarantined, "bad"), salt)

    def larger(self, views, tars, samples):
        units = len(self.manifest.tars)
        new = tuple(TarInfo(f"{units}.tar", samples, f"{units}" * 64) for _ in range(tars if units < MOST_UNITS else 0))
        return dataclasses.replace(
            self.manifest,
            num_views=min(MOST_VIEWS, self.manifest.num_views + views),
            tars=(*self.manifest.tars, *new),
        )


TestStore = StoreMachine.TestCase
TestStore.settings = settings(
    max_examples=300 if LONG else 12,
    stateful_step_count=30 if LONG else 15,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
