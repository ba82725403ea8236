"""ZarrSource: rows from the shards into memory, each checked against its checksum."""

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np

from feature_store.backends.base import ObjectStore
from feature_store.commits.log import CommitLog
from feature_store.errors import InputError, UncommittedError
from feature_store.format.addressing import RowId, Rows, row_array
from feature_store.format.arrays import ArraySpec, shard_index_bytes
from feature_store.format.checksums import damaged
from feature_store.format.codecs.bound import LOGITS, BoundCodec
from feature_store.format.layout import StoreLayout
from feature_store.processes import PerProcess
from feature_store.read.locate import NO_ROW, RowLocations, ShardIndexCache, ShardTable, shard_table
from feature_store.read.objects import ObjectReader
from feature_store.read.page_cache import PageCacheReader
from feature_store.read.transfers import Transfer, read_all, run_all
from feature_store.source import FeatureBatch

TABLE_BYTES = 64 << 20


class ZarrSource:
    """FeatureSource over a store's committed rows.

    Rows are read with several requests in flight, rows that lie side by side in one request. Memory beside the rows
    themselves: ``table_bytes`` for shard indexes and row checksums, and ``threads * request_bytes`` of the object
    store for what is on its way (nothing for local files). Threads and files are opened in the process that reads:
    an instance may be used, forked, pickled and used again. It may be used from several threads.

    Args:
        objects: The store's objects.
        layout: Its layout.
        committed: Which rows may be read.
        taps: Taps to read by default; None for all.
        threads: Requests in flight; None for what suits the object store.
        table_bytes: Most bytes of cached shard indexes and row checksums.

    Attributes:
        codecs: Codec of every tap, and of ``logits``, by name.
        stride_bytes: Bytes that keep all requests in flight busy; reading more at once is no faster.
    """

    needs_pixels = False

    def __init__(
        self,
        objects: ObjectStore,
        layout: StoreLayout,
        committed: CommitLog,
        taps: Sequence[str] | None = None,
        *,
        threads: int | None = None,
        table_bytes: int = TABLE_BYTES,
    ) -> None:
        if threads is not None and threads < 1:
            raise InputError(f"threads must be at least 1, got {threads}; leave it out for a fitting number")
        self.objects, self.layout = objects, layout
        self._committed = committed
        self._threads = objects.in_flight if threads is None else threads
        self.stride_bytes = objects.in_flight * objects.request_bytes
        self._reader = ObjectReader(objects, layout.capacity)
        self.codecs = layout.codecs
        self._specs = {
            _buffer_name(name, suffix): spec
            for name, parts in layout.features.items()
            for suffix, spec in parts.items()
        }
        # Not by a method of this source: the circle would keep its files open until a garbage collection.
        shards = len(layout.manifest.tars) * layout.manifest.num_views
        self._tables = PerProcess(partial(_Tables, list(self._specs.values()), shards, layout.capacity, table_bytes))
        self.tap_names = self._known(layout.manifest.taps if taps is None else taps)

    def read(
        self,
        rows: Rows,
        taps: Sequence[str] | None = None,
        *,
        pixels: np.ndarray | None = None,
        out: Mapping[str, np.ndarray] | None = None,
        decode: bool = True,
    ) -> FeatureBatch:
        """See FeatureSource.read; pixels are not looked at.

        Args:
            rows: Addresses, RowIds or integers [B, 3]; any order, repeats allowed.
            taps: Tap names; None for all the source has.
            pixels: Not looked at.
            out: Memory to read into by array, for as many as wanted: ``stage4``, ``stage4.scale``, ``logits``, each
                with at least len(rows) rows in the stored dtype, C-contiguous; see buffers. The batch refers to it.
            decode: False leaves taps as stored, in ``FeatureBatch.encoded``.

        Raises:
            UncommittedError: A row was never committed.
            QuarantinedError: A row's sample was quarantined.
            CorruptStoreError: Committed bytes are missing or damaged.
            ResourceError: The disk or the network failed.
            InputError: Unknown tap, or memory in out that does not fit.
        """
        rows = row_array(rows)
        memory = self.memory(len(rows), taps, out or {})
        self.fill(rows, memory)
        return self.batch(rows, memory, taps, decode=decode)

    def iter_unit(
        self,
        unit: int,
        view: int,
        taps: Sequence[str] | None = None,
        *,
        batch_size: int = 256,
        out: Mapping[str, np.ndarray] | None = None,
        decode: bool = True,
    ) -> Iterator[FeatureBatch]:
        """See FeatureSource.iter_unit; out and decode as in read, out used again for each batch."""
        rows = self.unit_rows(unit, view)
        for start in range(0, len(rows), batch_size):
            yield self.read(rows[start : start + batch_size], taps, out=out, decode=decode)

    def unit_rows(self, unit: int, view: int) -> np.ndarray:
        """All readable rows of one unit and view in position order: int64 [n, 3].

        Raises:
            UncommittedError: They were never committed.
        """
        return self._committed.record(unit, view).rows(view)

    def buffers(self, rows: int, taps: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """Memory that fits ``out`` of read: arrays [rows, ...] by name, their pages touched."""
        specs = self._specs_of(taps).items()
        return {name: np.zeros((rows, *spec.row_shape), spec.dtype) for name, spec in specs}

    def memory(self, rows: int, taps: Sequence[str] | None, out: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Arrays to fill for some rows: those of out where it has them, else new ones.

        Raises:
            InputError: out has an array that is not read, or that does not fit.
        """
        specs = self._specs_of(taps)
        if unknown := [name for name in out if name not in specs]:
            raise InputError(f"out has {unknown[0]!r}, which is not read; expected some of {', '.join(specs)}")
        return {
            name: _fitting(name, spec, rows, out[name])
            if name in out
            else np.empty((rows, *spec.row_shape), spec.dtype)
            for name, spec in specs.items()
        }

    def row_bytes(self, taps: Sequence[str] | None = None) -> int:
        """Bytes of one row in the buffers."""
        return sum(spec.row_bytes for spec in self._specs_of(taps).values())

    def fill(self, rows: np.ndarray, memory: Mapping[str, np.ndarray]) -> None:
        """Read rows [n, 3] into memory that fits, see buffers; what it holds no array for is not read.

        Raises:
            UncommittedError, QuarantinedError, CorruptStoreError, ResourceError: See read.
        """
        if not len(rows) or not memory:
            return self._refuse(rows)
        shards, positions = self._places(rows)
        located = {name: self._locate(self._specs[name], shards, positions, rows) for name in memory}
        return self.fill_located(rows, located, memory)

    def fill_located(
        self, rows: np.ndarray, located: Mapping[str, RowLocations], memory: Mapping[str, np.ndarray]
    ) -> None:
        """Read rows [n, 3] whose locations are known, see locate, into memory that fits.

        Raises:
            CorruptStoreError, ResourceError: See read.
        """
        shards, positions = self._places(rows)
        transfers = []
        for name, array in memory.items():
            flat = array[: len(rows)].reshape(len(rows), -1).view(np.uint8)
            transfers.append(Transfer(self._specs[name], shards, positions, located[name], flat))
        read_all(self.objects, transfers, self._threads)

    def locate(self, rows: np.ndarray, taps: Sequence[str] | None = None) -> dict[str, RowLocations]:
        """Row locations of rows [n, 3] in each array; at least one row.

        Raises:
            UncommittedError, QuarantinedError, CorruptStoreError, ResourceError: See read.
        """
        shards, positions = self._places(rows)
        return {name: self._locate(spec, shards, positions, rows) for name, spec in self._specs_of(taps).items()}

    def page_cache(self, located: Mapping[str, RowLocations]) -> dict[str, PageCacheReader]:
        """Readers by array of rows that may be in the machine's memory; see compressed."""
        return {name: PageCacheReader(self.objects, self._specs[name], some) for name, some in located.items()}

    def compressed(self, taps: Sequence[str] | None = None) -> bool:
        """Whether rows are stored compressed, so that their checksums are not of the bytes that fill gives."""
        return any(spec.zstd for spec in self._specs_of(taps).values())

    def batch(
        self,
        rows: np.ndarray,
        memory: Mapping[str, np.ndarray],
        taps: Sequence[str] | None = None,
        *,
        decode: bool = True,
    ) -> FeatureBatch:
        """A batch over memory that holds the rows [n, 3]."""
        parts = {
            name: {suffix: memory[_buffer_name(name, suffix)][: len(rows)] for suffix in self.layout.features[name]}
            for name in self._wanted(taps)
        }
        decoded = {n: _decoded(self.codecs[n], part) for n, part in parts.items() if decode or n == LOGITS}
        encoded = {} if decode else {name: part for name, part in parts.items() if name != LOGITS}
        return FeatureBatch(rows, decoded, decoded.pop(LOGITS, None), encoded)

    def _wanted(self, taps: Sequence[str] | None) -> list[str]:
        names = self.tap_names if taps is None else self._known(taps)
        return [*names, *([LOGITS] if LOGITS in self.codecs else [])]

    def _known(self, taps: Iterable[str]) -> tuple[str, ...]:
        names = tuple(taps)
        for name in names:
            if name not in self.layout.manifest.taps:
                stored = ", ".join(self.layout.manifest.taps)
                raise InputError(f"the store has no tap {name!r}; it has: {stored}; write a store with this tap")
        return names

    def _specs_of(self, taps: Sequence[str] | None) -> dict[str, ArraySpec]:
        wanted = [_buffer_name(name, suffix) for name in self._wanted(taps) for suffix in self.layout.features[name]]
        return {name: self._specs[name] for name in wanted}

    def _places(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Number of the shard and position in its unit, int64 [n] each, of rows that may be there."""
        manifest = self.layout.manifest
        units, positions, views = rows.T
        bounds = len(manifest.tars), manifest.capacity, manifest.num_views
        for column, bound in zip((units, positions, views), bounds, strict=True):
            if column.min() < 0 or column.max() >= bound:
                self._refuse(rows)
        return units * manifest.num_views + views, positions

    def _locate(self, spec: ArraySpec, shards: np.ndarray, positions: np.ndarray, rows: np.ndarray) -> RowLocations:
        tables = self._tables()
        try:
            with tables.lock:
                located = tables.by_path[spec.path].locate(shards, positions, partial(self._load, spec))
        except UncommittedError:
            self._refuse(rows)
            raise
        if (absent := np.flatnonzero(located.offsets == NO_ROW)).size:
            self._refuse(rows)
            row = RowId(*rows[int(absent[0])].tolist())
            path = spec.object_path(row.unit, row.view)
            raise damaged(path, f"position {row.position} has no row")
        return located

    def _refuse(self, rows: np.ndarray) -> None:
        """Raise what is wrong with the first row that may not be read, if there is one."""
        for row in rows.tolist():
            self._committed.require(RowId(*row))

    def _load(self, spec: ArraySpec, shards: list[int]) -> list[ShardTable]:
        places = [divmod(shard, self.layout.manifest.num_views) for shard in shards]
        return run_all([partial(self._shard_table, spec, unit, view) for unit, view in places], self._threads)

    def _shard_table(self, spec: ArraySpec, unit: int, view: int) -> ShardTable:
        record = self._committed.record(unit, view)
        readable = np.zeros(self.layout.capacity, bool)
        readable[record.readable] = True
        checksums = self._reader.chunk(spec.checksums, record, view)
        path, index = spec.object_path(unit, view), self._reader.index(spec, record, view)
        nbytes = record.proof(path).bytes - shard_index_bytes(self.layout.capacity)
        return shard_table(spec, path, nbytes, index, checksums, readable)


class _Tables:
    """Tables of all arrays, and the lock to hold while looking into them."""

    def __init__(self, specs: Sequence[ArraySpec], shards: int, capacity: int, table_bytes: int) -> None:
        share = table_bytes // len(specs)
        self.by_path = {spec.path: ShardIndexCache(spec, shards, capacity, share) for spec in specs}
        self.lock = threading.Lock()


def _buffer_name(name: str, suffix: str) -> str:
    """Name of an array in ``buffers``: ``stage4``, ``stage4.scale``, ``logits``."""
    return f"{name}.{suffix}" if suffix else name


def _decoded(value: BoundCodec, parts: dict[str, np.ndarray]) -> np.ndarray:
    return parts[""] if value.codec.plain else value.decode(parts)


def _fitting(name: str, spec: ArraySpec, rows: int, memory: np.ndarray) -> np.ndarray:
    fits = memory.dtype == spec.dtype and memory.shape[1:] == spec.row_shape and len(memory) >= rows
    if not fits or not memory.flags.c_contiguous or not memory.flags.writeable:
        raise InputError(
            f"out[{name!r}] is {memory.dtype} {list(memory.shape)}, expected {spec.dtype} "
            f"{[rows, *spec.row_shape]} or more rows, C-contiguous and writeable; see ZarrSource.buffers"
        )
    return memory[:rows]
