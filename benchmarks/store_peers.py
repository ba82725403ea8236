"""Other stores on the same rows, each beside the floor and this store; those that are not installed are named."""

import importlib
import itertools
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import store as bench
from benchmarks.store_data import CHANNELS, ROW_BYTES, TOKENS
from benchmarks.store_floor import RawFiles
from feature_store import RowId, Store

UNITS = 5  # of one view: every peer needs a copy of its own
SLOW_BATCHES = 6
Read = Callable[[Sequence[RowId]], Any]
Rows = Callable[[], Iterator[tuple[RowId, np.ndarray]]]


def measure_peers(store: Store, folder: Path, rounds: int) -> dict[str, Any]:
    """Sequential, unit-shuffled and random reads of every peer, one peer at a time to save disk."""
    peers = {
        "tensorstore": _tensorstore,
        "zarr": _zarr,
        "webdataset": _webdataset,
        "litdata": _litdata,
        "streaming": _streaming,
    }
    found: dict[str, Any] = {}
    for name, open_peer in peers.items():
        try:
            importlib.import_module(name)
        except ImportError as error:
            found[name] = f"not installed: {error}"
            continue
        copy = folder / "peer"
        shutil.rmtree(copy, ignore_errors=True)
        try:
            found[name] = _beside(store, open_peer(store, copy), rounds)
        finally:
            shutil.rmtree(copy, ignore_errors=True)
    return found


def _beside(store: Store, patterns: dict[str, Read | Rows], rounds: int) -> dict[str, Any]:
    samples = store.manifest.capacity
    memory = store.source().buffers(bench.BATCH)
    raw = RawFiles(store.path, [(unit, 0) for unit in range(UNITS)])
    ordered = [RowId(unit, at, 0) for unit in range(UNITS) for at in range(samples)]
    shuffled = [
        RowId(unit, at, 0) for unit in np.random.default_rng(2).permutation(UNITS).tolist() for at in range(samples)
    ]
    batches = {
        "sequential": bench.batches_of(ordered, rounds),
        "shard-shuffled": bench.batches_of(shuffled, rounds),
        "random": bench.random_batches(ordered, SLOW_BATCHES),
    }
    found = {}
    for pattern, read in patterns.items():
        contenders = {
            "preadv, 8 threads": bench.floor(raw, memory, 8),
            "store": bench.ours(store, memory, 8),
            "peer": read,
        }
        found[pattern] = bench.compare(contenders, batches[pattern], base="preadv, 8 threads")
    return found


def _tensorstore(store: Store, _: Path) -> dict[str, Any]:
    """Reads this very store through its own zarr3 driver, with a cache for shard indexes."""
    ts = importlib.import_module("tensorstore")
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{store.path}/taps/stage4"},
        "context": {"cache_pool": {"total_bytes_limit": 64 << 20}},
    }
    array = ts.open(spec, read=True).result()

    def ranges(rows: Sequence[RowId]) -> np.ndarray:
        first = rows[0].row(store.manifest.capacity)
        return array[0, first : first + len(rows)].read().result()

    def indices(rows: Sequence[RowId]) -> np.ndarray:
        return array[0, [row.row(store.manifest.capacity) for row in rows]].read().result()

    return {"sequential": ranges, "shard-shuffled": ranges, "random": indices}


def _zarr(store: Store, _: Path) -> dict[str, Any]:
    """Reads this very store with zarr-python."""
    zarr = importlib.import_module("zarr")
    array = zarr.open_array(store.path / "taps/stage4", mode="r")

    def ranges(rows: Sequence[RowId]) -> np.ndarray:
        first = rows[0].row(store.manifest.capacity)
        return array[0, first : first + len(rows)]

    def indices(rows: Sequence[RowId]) -> np.ndarray:
        return array.oindex[0, [row.row(store.manifest.capacity) for row in rows]]

    return {"sequential": ranges, "shard-shuffled": ranges, "random": indices}


def _webdataset(store: Store, folder: Path) -> dict[str, Any]:
    """Tars of .npy members; it has no random access."""
    wds = importlib.import_module("webdataset")
    folder.mkdir()
    for unit in range(UNITS):
        with wds.TarWriter(str(folder / f"{unit:05d}.tar")) as tar:
            for batch in store.source().iter_unit(unit, 0):
                for row, values in zip(batch.rows, batch.taps["stage4"], strict=True):
                    tar.write({"__key__": f"{row.position:06d}", "npy": values})

    def sequential(order: Sequence[int]) -> Read:
        urls = [str(folder / f"{unit:05d}.tar") for unit in order]

        def samples() -> Iterator[np.ndarray]:
            while True:
                dataset = wds.WebDataset(urls, shardshuffle=False, empty_check=False).decode().to_tuple("npy")
                yield from (values for (values,) in dataset)

        stream = samples()
        return lambda rows: np.stack(list(itertools.islice(stream, len(rows))))

    shuffled = np.random.default_rng(2).permutation(UNITS).tolist()
    return {"sequential": sequential(range(UNITS)), "shard-shuffled": sequential(shuffled)}


def _litdata(store: Store, folder: Path) -> dict[str, Any]:
    """Its own chunks, written by its optimiser."""
    litdata = importlib.import_module("litdata")
    cache = importlib.import_module("litdata.streaming.writer").BinaryWriter(str(folder), chunk_bytes=64 << 20)
    number = itertools.count()
    for unit in range(UNITS):
        for batch in store.source().iter_unit(unit, 0):
            for values in batch.taps["stage4"]:
                cache.add_item(next(number), values.copy())
    cache.done()
    cache.merge()
    dataset = litdata.StreamingDataset(str(folder))
    return _indexed(dataset.__getitem__, store.manifest.capacity)


def _streaming(store: Store, folder: Path) -> dict[str, Any]:
    """MosaicML's MDS."""
    mds = importlib.import_module("streaming")
    columns = {"values": f"ndarray:float16:{TOKENS},{CHANNELS}"}
    with mds.MDSWriter(out=str(folder), columns=columns, size_limit=64 << 20) as writer:
        for unit in range(UNITS):
            for batch in store.source().iter_unit(unit, 0):
                for values in batch.taps["stage4"]:
                    writer.write({"values": values})
    dataset = mds.StreamingDataset(local=str(folder), shuffle=False, batch_size=bench.BATCH)
    return _indexed(lambda at: dataset[at]["values"], store.manifest.capacity)


def _indexed(read: Callable[[int], np.ndarray], capacity: int) -> dict[str, Any]:
    """A store that is asked row by row, in whichever order."""

    def by_row(rows: Sequence[RowId]) -> np.ndarray:
        values = np.stack([np.asarray(read(row.row(capacity))) for row in rows])
        if values.nbytes != len(rows) * ROW_BYTES:
            raise ValueError(f"{values.nbytes} bytes for {len(rows)} rows")
        return values

    return {"sequential": by_row, "shard-shuffled": by_row, "random": by_row}
