"""The HTTP service on loopback: rows beside a raw socket and other clients, training, the live teacher, overload.

    python -m benchmarks.http --out benchmarks/results/http.json

Contenders take turns and the order rotates, as in ``benchmarks.store``; ratios are medians within one run. The raw
socket carries as many bytes from a server that does nothing but send them. nginx serves the same files to tensorstore
and zarr-python if it is installed, else the service does.
"""

import importlib
import json
import os
import resource
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from benchmarks.http_live import measure_live
from benchmarks.http_servers import RawSocket, Server, nginx, service
from benchmarks.http_training import measure_training
from benchmarks.store import BATCH, batches_of, compare, random_batches, settings
from benchmarks.store_data import ROW_BYTES, make_store
from feature_store import RowId, Store, connect
from feature_store.format.addressing import row_ids

_SLOW_BATCHES = 4
_WARM_BATCHES = 40  # connections grow their buffers with the first tens of MB, and an idle machine takes a second


@dataclass(frozen=True)
class Config:
    """Options of the benchmark.

    Attributes:
        folder: Where data is written, about 1.5 GB, in a folder that is removed in the end; default the system's
            temporary one.
        out: JSON file to write; None prints only.
        units: Units of the store.
        views: Views.
        samples: Samples per unit.
        rounds: Batches per contender and pattern.
        parts: Parts to measure.
        teacher: Live teacher, a timm name.
        clients: Clients of the live teacher at once.
        live_rounds: Forward passes' worth of views per measurement of the live teacher.
    """

    folder: Path | None = None
    out: Path | None = None
    units: int = 4
    views: int = 1
    samples: int = 1024
    rounds: int = 32
    parts: tuple[str, ...] = ("rows", "peers", "training", "live")
    teacher: str = "vit_small_patch16_224"
    clients: int = 32
    live_rounds: int = 4


def main(config: Config) -> None:
    result: dict[str, Any] = {"settings": {**settings(config), "loopback": True, "tcp": _congestion_control()}}  # pyright: ignore[reportArgumentType]
    with tempfile.TemporaryDirectory(dir=config.folder, prefix="http-benchmark-") as name:
        folder = Path(name)
        if {"rows", "peers"} & set(config.parts):
            store = make_store(folder / "store", config.units, config.views, config.samples)
            with service(store.path) as server:
                if "rows" in config.parts:
                    result["rows"] = measure_rows(store, server, config)
                if "peers" in config.parts:
                    result["peers"] = measure_peers(store, server, config)
        if "training" in config.parts:
            result["training"] = measure_training(folder / "training")
        if "live" in config.parts:
            result["live"] = measure_live(folder / "live", config.teacher, config.clients, config.live_rounds)
    text = json.dumps(result, indent=1)
    print(text)
    if config.out is not None:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        config.out.write_text(text + "\n")


def _congestion_control() -> str:
    """The system's, which decides what loopback costs; unknown beyond Linux."""
    setting = Path("/proc/sys/net/ipv4/tcp_congestion_control")
    return setting.read_text().strip() if setting.exists() else "unknown"


def measure_rows(store: Store, server: Server, config: Config) -> dict[str, Any]:
    """Batches of 256 rows into memory that is used again, sequential and random, and the CPU both sides spend."""
    ordered = rows_of(store)
    source = connect(server.url).source()
    memory, floor = source.buffers(BATCH), RawSocket(BATCH * ROW_BYTES)
    shard = max((path for path in store.path.rglob("taps/stage4/c/**/*") if path.is_file()), key=os.path.getsize)
    reading = RawSocket(BATCH * ROW_BYTES, shard)
    local = store.source()

    def over_http(rows: Sequence[RowId]) -> None:
        source.read(rows, out=memory)

    contenders: dict[str, Callable[[Sequence[RowId]], Any]] = {
        "raw socket": lambda rows: floor.read(memory["stage4"]),
        "raw socket, read from the file": lambda rows: reading.read(memory["stage4"]),
        "service": over_http,
        "store": lambda rows: local.read(rows, out=memory),
    }
    found: dict[str, Any] = {}
    try:
        warm_up(contenders, ordered)
        for name, batches in {
            "sequential": batches_of(ordered, config.rounds),
            "random": random_batches(ordered, config.rounds),
        }.items():
            found[name] = compare(contenders, batches, base="raw socket")
            found[name]["cpu_seconds_per_GB"] = {
                "service": cpu_per_gb(lambda rows: over_http(rows), server, batches),
                "raw socket": cpu_per_gb(lambda rows: floor.read(memory["stage4"]), floor.server, batches),
                "raw socket, read from the file": cpu_per_gb(
                    lambda rows: reading.read(memory["stage4"]), reading.server, batches
                ),
            }
    finally:
        floor.close()
        reading.close()
    return found


def warm_up(contenders: dict[str, Callable[[Sequence[RowId]], Any]], rows: Sequence[RowId]) -> None:
    """Let connections grow their buffers, as in a training run."""
    for batch in random_batches(rows, _WARM_BATCHES):
        for read in contenders.values():
            read(batch)


def cpu_per_gb(read: Callable[[Sequence[RowId]], Any], server: Server, batches: Sequence[Any]) -> dict[str, float]:
    """CPU seconds per GB of this process and of the server."""
    before = client_cpu(), server.cpu_seconds()
    for batch in batches:
        read(batch)
    gigabytes = len(batches) * BATCH * ROW_BYTES / 1e9
    return {
        "client": round((client_cpu() - before[0]) / gigabytes, 3),
        "server": round((server.cpu_seconds() - before[1]) / gigabytes, 3),
    }


def client_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def measure_peers(store: Store, server: Server, config: Config) -> dict[str, Any]:
    """Random batches by general zarr clients, over nginx if there is one; each beside the service, for itself."""
    rows, source = rows_of(store), connect(server.url).source()
    memory = source.buffers(BATCH)
    found: dict[str, Any] = {}
    with nginx(store.path) as files:
        base = files.url if files is not None else f"{server.url}/v1/zarr"
        for name, open_reader, rounds in (
            ("tensorstore", tensorstore_reader, config.rounds),
            ("zarr-python", zarr_reader, _SLOW_BATCHES),  # seconds a batch
        ):
            read = open_reader(base, store.manifest.capacity)
            batches = random_batches(rows, rounds)
            expected = store.source().read(batches[0]).taps["stage4"]
            np.testing.assert_array_equal(np.asarray(read(batches[0])), expected)
            contenders = {"service": lambda rows: source.read(rows, out=memory), name: read}
            warm_up(contenders, rows)
            found[name] = compare(contenders, batches, base="service")
            found[name]["times_faster"] = round(1 / found[name][name]["median_of_ratios"], 1)
    found["over"] = "nginx" if files is not None else "this service"
    return found


def tensorstore_reader(base: str, capacity: int) -> Callable[[Sequence[RowId]], Any]:
    ts = importlib.import_module("tensorstore")
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "http", "base_url": base, "path": "/taps/stage4/"},
        "context": {"cache_pool": {"total_bytes_limit": 64 << 20}},
    }
    array = ts.open(spec, read=True).result()
    return lambda rows: array[rows[0].view, [row.row(capacity) for row in rows]].read().result()


def zarr_reader(base: str, capacity: int) -> Callable[[Sequence[RowId]], Any]:
    zarr, obstore = importlib.import_module("zarr"), importlib.import_module("obstore.store")
    http = obstore.HTTPStore.from_url(f"{base}/taps/stage4", client_options={"allow_http": True})
    array = zarr.open_array(zarr.storage.ObjectStore(http, read_only=True), mode="r")
    return lambda rows: array.oindex[rows[0].view, [row.row(capacity) for row in rows]]


def rows_of(store: Store) -> list[RowId]:
    places = [(unit, view) for view in range(store.manifest.num_views) for unit in store.committed.units]
    return [row for place in places for row in row_ids(store.source().unit_rows(*place))]


if __name__ == "__main__":
    main(tyro.cli(Config))
