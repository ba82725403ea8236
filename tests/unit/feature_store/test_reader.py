"""Reading rows: into given memory, through tables that do not fit, from many threads and from any kind of process."""

import gc
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_store import CLASSES, tiny_manifest, tiny_store, unit_data
from torch.utils.data import DataLoader, Dataset

from feature_store import RowId, open_store
from feature_store.backends.local import LocalObjects
from feature_store.errors import CorruptStoreError, InputError, QuarantinedError, ResourceError, UncommittedError
from feature_store.format.checksums import CRC_BYTES
from feature_store.format.codecs.bound import calibrated
from feature_store.format.manifest import TarInfo
from feature_store.read import transfers
from feature_store.read.locate import ShardIndexCache, bytes_per_shard
from feature_store.read.page_cache import PageCacheReader
from feature_store.read.reader import ZarrSource
from feature_store.read.transfers import _ROWS_PER_REQUEST

ROWS = [RowId(unit, i, view) for unit, n in enumerate((5, 3, 4)) for view in (0, 1) for i in range(n)]


@pytest.fixture
def store(tmp_path):
    tiny_store(tmp_path / "store")
    return open_store(tmp_path / "store")


def expected(store, rows):
    units = {unit: unit_data(store.manifest, unit) for unit in range(3)}
    return np.float16([units[r.unit].features["stage4"][""][r.view, r.position] for r in rows])


def test_read_fills_the_given_memory_and_refers_to_it(store):
    out = store.source().buffers(9)
    batch = store.source().read(ROWS[:7], out=out)
    assert np.shares_memory(batch.taps["stage4"], out["stage4"])
    assert np.shares_memory(batch.logits, out["logits"])
    assert np.array_equal(out["stage4"][:7], expected(store, ROWS[:7]))
    assert not out["stage4"][7:].any()


def test_read_fills_memory_of_torch_tensors(store):
    tensor = torch.zeros(7, 4, 6, dtype=torch.float16)
    store.source().read(ROWS[:7], out={"stage4": tensor.numpy()})
    assert np.array_equal(tensor.numpy(), expected(store, ROWS[:7]))


def test_read_gives_the_same_for_row_ids_and_integers(store):
    rows = [ROWS[at] for at in np.random.default_rng(0).integers(0, len(ROWS), 30)]
    source, ids = store.source(), store.source().read(rows)
    for given in (np.array(rows), np.array(rows, np.int32), np.array(rows, np.uint16), [tuple(row) for row in rows]):
        batch = source.read(given)
        assert (batch.rows.dtype, batch.rows.tolist()) == (np.int64, ids.rows.tolist())
        assert batch.taps["stage4"].tobytes() == ids.taps["stage4"].tobytes()
        assert batch.logits.tobytes() == ids.logits.tobytes()


@pytest.mark.parametrize("rows", [np.zeros(3, np.int64), np.zeros((2, 2), np.int64), np.zeros((2, 3), np.float32)])
def test_read_refuses_arrays_that_are_no_rows(store, rows):
    with pytest.raises(InputError, match=r"expected integers \[n, 3\]: unit, position, view"):
        store.source().read(rows)


@pytest.mark.parametrize(
    "memory",
    [
        np.zeros((6, 4, 6), np.float16),
        np.zeros((7, 4, 6), np.float32),
        np.zeros((7, 6, 4), np.float16),
        np.zeros((4, 7, 6), np.float16).swapaxes(0, 1),
        np.broadcast_to(np.zeros((7, 4, 6), np.float16), (7, 4, 6)),
    ],
)
def test_read_refuses_memory_that_does_not_fit(store, memory):
    with pytest.raises(
        InputError, match=r"out\['stage4'\] is float\d\d \[\d, \d, 6\], expected float16 \[7, 4, 6\]|6, 4"
    ):
        store.source().read(ROWS[:7], out={"stage4": memory})


def test_read_refuses_memory_for_what_is_not_read(store):
    with pytest.raises(InputError, match="out has 'stage3', which is not read; expected some of stage4, logits"):
        store.source().read(ROWS[:7], out={"stage3": np.zeros(3)})


def test_read_of_nothing_gives_an_empty_batch(store):
    batch = store.source().read([])
    assert (batch.rows.dtype, batch.rows.shape) == (np.int64, (0, 3))
    assert batch.taps["stage4"].shape == (0, 4, 6)
    assert batch.logits.shape == (0, CLASSES)


def test_read_names_the_first_bad_row_whatever_comes_after(tmp_path):
    store = tiny_store(tmp_path / "s", units=(0, 2), quarantined={1: "broken JPEG"})
    source, good = store.source(), RowId(0, 0, 0)
    quarantined, uncommitted, beyond = RowId(0, 1, 0), RowId(1, 0, 0), RowId(2, 4, 0)
    for first, second, error in (
        (quarantined, uncommitted, QuarantinedError),
        (uncommitted, quarantined, UncommittedError),
        (beyond, RowId(9, 0, 0), UncommittedError),
        (RowId(0, 0, 2), beyond, UncommittedError),
        (RowId(0, -1, 0), quarantined, UncommittedError),
        (RowId(-1, 0, 0), quarantined, InputError),
    ):
        with pytest.raises(error) as caught:
            source.read([good, first, second])
        assert str(first.unit) in str(caught.value)
    with pytest.raises(UncommittedError, match="unit 2 has 4 samples"):
        source.read([good, beyond])


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_read_gives_the_same_rows_with_any_number_of_threads(store, threads, monkeypatch):
    monkeypatch.setattr(LocalObjects, "bytes_per_thread", 1)
    source = ZarrSource(store.objects, store.layout, store.committed, threads=threads)
    rng = np.random.default_rng(threads)
    for _ in range(20):
        rows = [ROWS[at] for at in rng.integers(0, len(ROWS), 40)]
        assert np.array_equal(source.read(rows).taps["stage4"], expected(store, rows))


@pytest.mark.parametrize("threads", [1, 8])
def test_read_gives_the_same_rows_when_some_are_not_in_memory(store, threads, monkeypatch):
    monkeypatch.setattr(LocalObjects, "bytes_per_thread", 1)
    rng, take = np.random.default_rng(threads), PageCacheReader.take
    monkeypatch.setattr(PageCacheReader, "take", lambda runs, at: rng.random() < 0.5 and take(runs, at))
    source = ZarrSource(store.objects, store.layout, store.committed, threads=threads)
    for _ in range(20):
        rows = [ROWS[at] for at in rng.integers(0, len(ROWS), 40)]
        assert np.array_equal(source.read(rows).taps["stage4"], expected(store, rows))


def test_source_refuses_no_threads(store):
    with pytest.raises(InputError, match="threads must be at least 1, got 0"):
        ZarrSource(store.objects, store.layout, store.committed, threads=0)


class CountingObjects(LocalObjects):
    """Counts what is asked for; none of it is taken from the machine's memory."""

    def opened(self, path):
        return None

    def __init__(self, root):
        super().__init__(root)
        self.calls = []

    def read_into(self, path, offset, parts, *, wait=True):
        self.calls.append(path)
        return super().read_into(path, offset, parts, wait=wait)

    def get_range(self, path, offset, length):
        self.calls.append(path)
        return super().get_range(path, offset, length)


def test_rows_side_by_side_are_read_in_one_request(store):
    objects = CountingObjects(store.path)
    source = ZarrSource(objects, store.layout, store.committed)
    source.read(ROWS)
    objects.calls.clear()
    source.read(ROWS[::-1])
    assert sorted(objects.calls) == sorted(
        f"{name}/c/{view}/{unit}/{end}" for name, end in (("taps/stage4", "0/0"), ("logits", "0"))
        for view in (0, 1) for unit in (0, 1, 2)
    )  # fmt: skip


def test_requests_are_cut_where_the_object_store_says(store, monkeypatch):
    row = store.layout.arrays["taps/stage4"].row_bytes
    monkeypatch.setattr(LocalObjects, "request_bytes", 2 * (row + 4))
    objects = CountingObjects(store.path)
    source = ZarrSource(objects, store.layout, store.committed)
    rows = [RowId(0, i, 0) for i in range(5)]
    assert np.array_equal(source.read(rows).taps["stage4"], expected(store, rows))
    assert objects.calls.count("taps/stage4/c/0/0/0/0") == 1 + 3
    monkeypatch.setattr(LocalObjects, "gap_bytes", 3)
    objects.calls.clear()
    source.read(rows)
    assert objects.calls.count("taps/stage4/c/0/0/0/0") == 5


@pytest.fixture
def little_is_much(monkeypatch):
    """A byte is worth another thread."""
    monkeypatch.setattr(LocalObjects, "bytes_per_thread", 1)


@pytest.mark.usefixtures("little_is_much")
@pytest.mark.parametrize("in_memory", [0.5, 1])
@pytest.mark.parametrize("threads", [1, 2])
def test_rows_are_read_in_runs_and_alone(store, threads, in_memory, monkeypatch):
    rng, take = np.random.default_rng(threads), PageCacheReader.take
    monkeypatch.setattr(PageCacheReader, "take", lambda runs, at: rng.random() < in_memory and take(runs, at))
    source = ZarrSource(store.objects, store.layout, store.committed, threads=threads)
    for _ in range(20):
        starts = rng.integers(0, len(ROWS), 6)
        rows = [row for start in starts for row in ROWS[start : start + rng.integers(1, 9)]]
        assert np.array_equal(source.read(rows).taps["stage4"], expected(store, rows))


def test_rows_side_by_side_are_taken_from_memory_at_once(store, monkeypatch):
    rows = [RowId(0, i, 0) for i in range(5)] + [RowId(1, i, 0) for i in (1, 2, 0)]
    source, take, taken = store.source(taps=["stage4"]), PageCacheReader.take, []
    source.read(rows)
    monkeypatch.setattr(PageCacheReader, "take", lambda runs, at: take(runs, at) and not taken.append(runs.rows(at)))
    source.read(rows)
    assert taken[:3] == [slice(0, 5), slice(5, 7), slice(7, 8)]


def test_rows_are_no_longer_looked_for_in_memory_when_many_are_not_there(store, monkeypatch):
    source, asked = store.source(), []
    monkeypatch.setattr(transfers, "_CORES", 1)
    monkeypatch.setattr(PageCacheReader, "take", lambda runs, at: bool(asked.append(at)))
    rows = ROWS[::-1]
    assert np.array_equal(source.read(rows).taps["stage4"], expected(store, rows))
    assert len(asked) == transfers._COLD < len(rows)


@pytest.mark.usefixtures("little_is_much")
@pytest.mark.parametrize("threads", [1, 2])
def test_damaged_row_in_a_run_is_named(store, threads, monkeypatch):
    monkeypatch.setattr(transfers, "_CORES", 2)
    source = ZarrSource(store.objects, store.layout, store.committed, threads=threads)
    source.read(ROWS)
    size = store.layout.arrays["taps/stage4"].row_bytes + CRC_BYTES
    shard = store.path / "taps/stage4/c/1/2/0/0"
    content = shard.read_bytes()
    for position in range(4):
        damaged = bytearray(content)
        damaged[position * size + size // 2] ^= 1
        shard.write_bytes(damaged)
        with pytest.raises(CorruptStoreError, match=f"c/1/2/0/0.*crc32c of position {position} does not match"):
            source.read(ROWS)
    rows = [content[at : at + size] for at in range(0, 4 * size, size)]
    shard.write_bytes(b"".join([rows[0], rows[2], rows[1], *rows[3:]]) + content[4 * size :])
    with pytest.raises(CorruptStoreError, match="crc32c of position 1 does not match"):
        source.read(ROWS)
    shard.write_bytes(content[: 3 * size])
    with pytest.raises(CorruptStoreError, match="c/1/2/0/0 is damaged: it ends at byte"):
        source.read(ROWS)


def test_more_rows_than_one_system_call_takes(tmp_path):
    """Logits of six bytes: thousands of neighbours."""
    samples = 2 * _ROWS_PER_REQUEST + 7
    manifest = tiny_manifest(policy="rrc_flip", views=1)
    manifest = replace(manifest, tars=(TarInfo("tar-0.tar", samples, "0" * 64),), capacity=samples)
    data = unit_data(manifest, 0)
    store = tiny_store(tmp_path / "s", manifest, units=(0,))
    rows = [RowId(0, i, 0) for i in range(samples)]
    assert np.array_equal(store.source().read(rows).logits, data.features["logits"][""][0])


def test_tables_stay_within_their_budget_when_shards_do_not_fit(store):
    """Six shards, room for two: every batch still comes out right, in any order."""
    specs = [store.layout.arrays[path] for path in ("taps/stage4", "logits")]
    budget = 2 * 2 * max(bytes_per_shard(spec, 5) for spec in specs)
    source = ZarrSource(store.objects, store.layout, store.committed, table_bytes=budget)
    rng = np.random.default_rng(0)
    for _ in range(30):
        rows = [ROWS[at] for at in rng.permutation(len(ROWS))]
        assert np.array_equal(source.read(rows).taps["stage4"], expected(store, rows))
        tables = source._tables().by_path.values()
        assert sum(table.nbytes for table in tables) <= budget


def test_files_are_closed_as_soon_as_a_source_is_let_go_of(store):
    """A service opens a growing store again and again: each would hold half the process's descriptors."""
    again = open_store(store.path)
    source = again.source()
    source.read(ROWS)
    left = weakref.ref(again.objects)
    gc.disable()
    try:
        del again, source
        assert left() is None
    finally:
        gc.enable()


def test_tables_load_each_shard_once_while_they_fit(store):
    spec = store.layout.arrays["taps/stage4"]
    tables, loaded = ShardIndexCache(spec, 6, 5, 1 << 20), []

    def load(shards):
        loaded.extend(shards)
        source = store.source()
        return [source._shard_table(spec, *divmod(shard, 2)) for shard in shards]

    for _ in range(3):
        tables.locate(np.arange(6), np.zeros(6, np.int64), load)
    assert loaded == [0, 1, 2, 3, 4, 5]


def test_a_source_is_read_from_many_threads_at_once(store):
    source = store.source()

    def read(seed):
        rows = [ROWS[at] for at in np.random.default_rng(seed).integers(0, len(ROWS), 9)]
        return np.array_equal(source.read(rows).taps["stage4"], expected(store, rows))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(100)))


def test_read_reports_a_disk_error_as_one(store, monkeypatch):
    source = store.source()
    source.read(ROWS)

    def fail(*_, wait):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(PageCacheReader, "take", lambda *_: False)
    monkeypatch.setattr(source._reader.objects, "read_into", fail)
    with pytest.raises(ResourceError, match=r"cannot read taps/stage4/c/0/0/0/0: .*Input/output error"):
        source.read(ROWS[:2])


def test_read_after_an_error_in_another_thread_still_works(store, monkeypatch):
    monkeypatch.setattr(LocalObjects, "bytes_per_thread", 1)
    source = store.source()
    source.read(ROWS)
    shard = store.path / "taps/stage4/c/1/2/0/0"
    content = shard.read_bytes()
    shard.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    for _ in range(5):
        with pytest.raises(CorruptStoreError, match="crc32c of position 0 does not match"):
            source.read(ROWS)
    shard.write_bytes(content)
    assert np.array_equal(source.read(ROWS).taps["stage4"], expected(store, ROWS))


@pytest.mark.parametrize("codec", ["int8", "int8-channel+zstd", "f16+zstd", "bf16"])
def test_encoded_parts_come_without_decoding_when_asked(tmp_path, codec):
    manifest = tiny_manifest(codec="f16")
    sample = unit_data(manifest, 0).features["stage4"][""][0].astype(np.float32)
    taps = {name: replace(tap, codec=codec) for name, tap in manifest.taps.items()}
    manifest = calibrated(replace(manifest, taps=taps), {"stage4": sample})
    source = tiny_store(tmp_path / "s", manifest).source()
    decoded = source.read(ROWS)
    out = source.buffers(len(ROWS))
    encoded = source.read(ROWS, decode=False, out=out)
    value = source.codecs["stage4"]
    assert encoded.taps == {}
    assert encoded.encoded["stage4"].keys() == {part.suffix for part in value.parts}
    assert all(
        np.shares_memory(part, out[name]) for name, part in zip(out, encoded.encoded["stage4"].values(), strict=False)
    )
    assert np.array_equal(value.decode(encoded.encoded["stage4"]), decoded.taps["stage4"])
    assert np.array_equal(encoded.logits, decoded.logits)


class Rows(Dataset):
    def __init__(self, source):
        self.source = source

    def __len__(self):
        return 12

    def __getitem__(self, at):
        return torch.from_numpy(self.source.read(ROWS[at : at + 6]).taps["stage4"])


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "forkserver"])  # spawn hands over the same pickle as forkserver
def test_data_loader_workers_read_after_the_parent_has_read(store, method, monkeypatch):
    monkeypatch.setattr(LocalObjects, "bytes_per_thread", 1)  # threads in the parent, before it forks
    source = store.source()
    before = source.read(ROWS).taps["stage4"]
    loader = DataLoader(Rows(source), batch_size=4, num_workers=1, multiprocessing_context=method, timeout=60)
    got = torch.cat(list(loader)).numpy()
    assert np.array_equal(got, np.stack([expected(store, ROWS[at : at + 6]) for at in range(12)]))
    assert np.array_equal(source.read(ROWS).taps["stage4"], before)


def test_a_pickled_source_opens_its_own_files_and_tables(store):
    source = store.source()
    source.read(ROWS)
    copy = pickle.loads(pickle.dumps(source))  # noqa: S301 - our own object
    assert copy._tables._made is None
    assert not copy._reader.objects._files._files
    assert np.array_equal(copy.read(ROWS).taps["stage4"], expected(store, ROWS))
