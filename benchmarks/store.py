"""Reading, writing and growth of the store as ratios to raw system calls in one run.

    python -m benchmarks.store --out benchmarks/results/store.json [--peers]

Contenders take turns batch by batch and the order rotates, so that a noisy neighbour hurts all of them alike; what is
reported is the median. ``--peers`` adds every other store that is installed (tensorstore, zarr, webdataset, litdata,
mosaicml-streaming), each beside the floor and this store on the same rows.
"""

import json
import os
import platform
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from benchmarks.store_data import CHANNELS, ROW_BYTES, TOKENS, make_data, make_linked_store, make_manifest, make_store
from benchmarks.store_floor import RawFiles, write_raw
from benchmarks.turns import medians, ratio, take_turns
from feature_store import RowId, Store
from feature_store.format.addressing import row_ids
from feature_store.format.arrays import ShardBuilder
from feature_store.format.layout import StoreLayout
from feature_store.format.versions import software_versions
from feature_store.read.reader import ZarrSource

BATCH = 256
Contenders = Mapping[str, Callable[[Sequence[RowId]], Any]]


@dataclass(frozen=True)
class Config:
    """Options of the benchmark.

    Attributes:
        folder: Where data is written, about 3 GB, in a folder that is removed in the end; default the system's
            temporary one.
        out: JSON file to write; None prints only.
        units: Units of the store.
        views: Views.
        samples: Samples per unit.
        rounds: Batches per contender and pattern.
        growth: Rows of the growing stores.
        peers: Whether other stores are measured too.
    """

    folder: Path | None = None
    out: Path | None = None
    units: int = 7
    views: int = 2
    samples: int = 1024
    rounds: int = 48
    growth: tuple[int, ...] = (1_000, 100_000, 2_000_000)
    peers: bool = False


def main(config: Config) -> None:
    with tempfile.TemporaryDirectory(dir=config.folder, prefix="store-benchmark-") as name:
        folder = Path(name)
        store = make_store(folder / "store", config.units, config.views, config.samples)
        result: dict[str, Any] = {"settings": settings(config), "reading": reading(store, config)}
        result["writing"] = writing(config, folder / "written")
        if config.peers:
            from benchmarks.store_peers import measure_peers

            result["peers"] = measure_peers(store, folder, config.rounds)
        shutil.rmtree(folder / "store")
        result["growth"] = growth(config, folder)
    text = json.dumps(result, indent=1)
    print(text)
    if config.out is not None:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        config.out.write_text(text + "\n")


def settings(config: Config) -> dict[str, Any]:
    rows = config.units * config.views * config.samples
    return {
        "rows": rows,
        "bytes": rows * ROW_BYTES,
        "batch": BATCH,
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],
        "machine": platform.processor() or platform.machine(),
        "software": software_versions(),
    }


def reading(store: Store, config: Config) -> dict[str, Any]:
    places = [(unit, view) for view in range(config.views) for unit in range(config.units)]
    raw, direct = RawFiles(store.path, places), RawFiles(store.path, places, direct=True)
    ordered = [row for place in places for row in row_ids(store.source().unit_rows(*place))]
    memory = store.source().buffers(BATCH)
    found = {}
    for name, batches in {
        "sequential": batches_of(ordered, config.rounds),
        "shard-shuffled": batches_of(shard_shuffled(store.source(), places), config.rounds),
        "random": random_batches(ordered, config.rounds),
    }.items():
        for threads in (1, 2, 8):
            found[f"{name}, warm, {threads} threads"] = compare(
                {"preadv": floor(raw, memory, threads), "store": ours(store, memory, threads)}, batches, base="preadv"
            )
    found["random, cold"] = compare(
        {
            "O_DIRECT, 8 in flight": floor(direct, memory, 8),
            "preadv, 8 threads": floor(raw, memory, 8),
            "store": ours(store, memory, 8),
        },
        random_batches(ordered, config.rounds // 2),
        base="O_DIRECT, 8 in flight",
        before=raw.drop_cache,
    )
    return found


def ours(store: Store, memory: dict[str, np.ndarray], threads: int) -> Callable[[Sequence[RowId]], Any]:
    source = ZarrSource(store.objects, store.layout, store.committed, threads=threads)
    return lambda rows: source.read(rows, out=memory)


def floor(raw: RawFiles, memory: dict[str, np.ndarray], threads: int) -> Callable[[Sequence[RowId]], Any]:
    flat = memory["stage4"].view(np.uint8).reshape(-1, ROW_BYTES)
    return lambda rows: raw.read(rows, flat[: len(rows)], threads)


def shard_shuffled(source: ZarrSource, places: Sequence[tuple[int, int]], together: int = 4) -> list[RowId]:
    """Rows of shards in random order, shuffled across a few shards at a time."""
    rng, rows = np.random.default_rng(0), []
    order = rng.permutation(len(places))
    for start in range(0, len(places), together):
        some = np.concatenate([source.unit_rows(*places[at]) for at in order[start : start + together]])
        rows += row_ids(some[rng.permutation(len(some))])
    return rows


def writing(config: Config, target: Path, repeats: int = 9) -> dict[str, Any]:
    """One unit: its objects and its commit record, against its shards alone as raw files."""
    manifest = make_manifest(1, config.views, config.samples)
    data, spec = make_data(manifest, 0), StoreLayout(manifest).arrays["taps/stage4"]
    payloads = []
    for values in data.features["stage4"][""]:
        shard = ShardBuilder(spec, config.samples)
        rows = shard.add(np.arange(config.samples), values)
        payloads.append(np.concatenate([part.reshape(-1) for part in (*rows, shard.finish())]))

    def clear() -> None:
        shutil.rmtree(target, ignore_errors=True)

    def write_store(_: Sequence[RowId]) -> None:
        stores.pop().write_unit(0, 0, data)

    def prepare() -> None:
        clear()
        stores[:] = [Store.create(target / "store", manifest, {})]

    stores: list[Store] = []
    rows = [RowId(0, at, view) for view in range(config.views) for at in range(config.samples)]
    found = compare(
        {
            "write + fsync, one after the other": lambda _: write_raw(target / "raw", payloads, 1),
            "write + fsync, all in flight": lambda _: write_raw(target / "raw", payloads, len(payloads)),
            "store": write_store,
        },
        [rows] * repeats,
        base="write + fsync, all in flight",
        before=prepare,
    )
    clear()
    return found


def growth(config: Config, folder: Path, samples: int = 1024) -> dict[str, Any]:
    """Random batches over ever more rows. All units are links to one, so that only the store's own part can grow."""
    stores = {rows: make_linked_store(folder / f"rows-{rows}", -(-rows // samples), samples) for rows in config.growth}
    sources = {rows: store.source() for rows, store in stores.items()}
    memory = next(iter(sources.values())).buffers(BATCH)
    rng = np.random.default_rng(0)
    touched = {}
    for rows, source in sources.items():  # every shard once: what a first epoch pays for indexes and checksums
        first = [RowId(unit, 0, 0) for unit in range(-(-rows // samples))]
        started = time.perf_counter()
        for start in range(0, len(first), BATCH):
            source.read(first[start : start + BATCH], out=memory)
        touched[f"{rows:,} rows"] = round((time.perf_counter() - started) / len(first) * 1e6, 1)
    numbers = [rng.random(BATCH) for _ in range(config.rounds)]

    def read(rows: int) -> Callable[[Sequence[RowId]], Any]:
        def run(batch: Sequence[RowId]) -> None:
            sources[rows].read(pick(numbers[batch[0].unit], rows), out=memory)

        return run

    def pick(fractions: np.ndarray, rows: int) -> list[RowId]:
        return [RowId(at // samples, at % samples, 0) for at in (fractions * rows).astype(int).tolist()]

    batches = [[RowId(at, 0, 0)] * BATCH for at in range(config.rounds)]
    names = {f"{rows:,} rows": read(rows) for rows in config.growth}
    found = compare(names, batches, base=next(iter(names)))
    return {
        **found,
        "first touch of a shard, microseconds": touched,
        "open files allowed": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    }


def batches_of(rows: Sequence[RowId], most: int) -> list[Sequence[RowId]]:
    return [rows[start : start + BATCH] for start in range(0, len(rows) - BATCH + 1, BATCH)][:most]


def random_batches(rows: Sequence[RowId], count: int) -> list[list[RowId]]:
    rng = np.random.default_rng(1)
    return [[rows[at] for at in rng.choice(len(rows), BATCH, replace=False)] for _ in range(count)]


def compare(
    contenders: Contenders,
    batches: Sequence[Sequence[RowId]],
    *,
    base: str,
    before: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Median time per batch of each contender, as rates and as ratios to one of them."""

    def read(run: Callable[[Sequence[RowId]], Any], turn: int) -> float:
        batch = batches[max(turn - 1, 0)]  # the first also warms up: files open, tables loaded, pages cached
        before()
        started = time.perf_counter()
        run(batch)
        return (time.perf_counter() - started) / len(batch)

    times = take_turns({name: partial(read, run) for name, run in contenders.items()}, len(batches))
    typical = medians(times)
    return {
        name: {
            "GB_per_s": round(ROW_BYTES / seconds / 1e9, 3),
            "ratio": round(typical[base] / seconds, 3),
            "median_of_ratios": round(ratio(times, base, name), 3),
        }
        for name, seconds in typical.items()
    }


if __name__ == "__main__":
    assert ROW_BYTES == TOKENS * CHANNELS * 2
    main(tyro.cli(Config))
