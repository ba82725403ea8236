"""Opening a large store and finding keys: commit records of 15,000 units x 10 views, 1.3 million sample keys.

The store is sparse: records, commit index and keys are real, features are not there.

    python -m benchmarks.opening
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from feature_store import Store, open_store
from feature_store.commits.record import CommitRecord, ObjectChecksum, encode_record
from feature_store.format.addressing import encode_keys
from feature_store.format.arrays import encode_chunk
from feature_store.format.checksums import object_checksum
from feature_store.format.manifest import Manifest, SplitInfo, TapInfo, TarInfo, TeacherInfo
from feature_store.format.versions import software_versions
from feature_store.views import view_policy

BATCH = 1024


@dataclass(frozen=True)
class Config:
    """Options of the benchmark.

    Attributes:
        folder: Where the store is made, in a folder that is removed in the end; default the system's temporary one.
        units: Tars.
        samples: Samples per tar.
        views: Views.
        views_per_record: Views a writer committed at once.
        repeats: Measurements of each kind.
    """

    folder: Path | None = None
    units: int = 15_000
    samples: int = 88
    views: int = 10
    views_per_record: int = 10
    repeats: int = 5


def main(config: Config) -> None:
    """Make the store, measure in fresh processes, print JSON."""
    with tempfile.TemporaryDirectory(dir=config.folder, prefix="opening-") as name:
        path = Path(name, "store")
        compact_seconds = make_store(config, path)
        runs = [measured(config, path, "with_index") for _ in range(config.repeats)]
        (path / "commits/index").unlink()
        without = measured(config, path, "without_index")
    medians = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    result = {
        "units": config.units,
        "views": config.views,
        "records": config.units * config.views // config.views_per_record,
        "compact_seconds": compact_seconds,
        **medians,
        "open_without_index_seconds": without["open_seconds"],
    }
    print(json.dumps(result, indent=2))


def make_store(config: Config, store_path: Path) -> float:
    """Write records and keys; seconds the commit index took."""
    manifest = sparse_manifest(config)
    store = Store.create(store_path, manifest, {})
    spec, rng = store.layout.arrays["key"], np.random.default_rng(0)
    (store_path / "commits").mkdir()
    (store_path / spec.path / "c").mkdir()
    for unit, tar in enumerate(manifest.tars):
        chunk = encode_chunk(spec, encode_keys(keys_of(config, unit), manifest.key_width), manifest.capacity)
        path = store_path / spec.object_path(unit)
        path.parent.mkdir()
        path.write_bytes(chunk.tobytes())
        for first in range(0, config.views, config.views_per_record):
            views = range(first, first + config.views_per_record)
            paths = store.layout.object_paths(unit, views)
            proofs = {p: ObjectChecksum(10**8 + i, int(rng.integers(2**32))) for i, p in enumerate(paths)}
            proofs[spec.object_path(unit)] = ObjectChecksum(chunk.nbytes, object_checksum(chunk))
            record = CommitRecord(
                manifest.identity(), unit, first, views.stop - 1, tar.name, tar.header_sha256, tar.samples, {}, proofs,
                manifest.software,
            )  # fmt: skip
            (store_path / record.path).write_bytes(encode_record(record))
    started = time.perf_counter()
    store.write_commit_index()
    return time.perf_counter() - started


def measured(config: Config, path: Path, what: str) -> dict[str, float]:
    """Open the store in a fresh process, and with its index look keys up."""
    arguments = [path, config.units, config.samples, what]
    command = [sys.executable, __file__, "measure", *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure(folder: str, units: str, samples: str, what: str) -> dict[str, float]:
    """Request of a measured process."""
    config = Config(Path(folder), int(units), int(samples))
    before = _peak_megabytes()
    started, cpu = time.perf_counter(), time.process_time()
    store = open_store(folder)
    result = {
        "open_seconds": time.perf_counter() - started,
        "open_cpu_seconds": time.process_time() - cpu,
        "open_megabytes": _peak_megabytes(),
        "imports_megabytes": before,
    }
    if what == "without_index":
        return result
    started = time.perf_counter()
    store.rows(keys_of(config, 0)[:1], 0)
    result["key_index_seconds"] = time.perf_counter() - started
    result["with_keys_megabytes"] = _peak_megabytes()
    rng = np.random.default_rng(0)
    cpus, walls = [], []
    for _ in range(100):
        chosen = zip(rng.integers(config.units, size=BATCH), rng.integers(config.samples, size=BATCH), strict=True)
        batch = [key_of(int(unit), int(position)) for unit, position in chosen]
        started, cpu = time.perf_counter(), time.thread_time()
        store.rows(batch, 3)
        walls.append(time.perf_counter() - started)
        cpus.append(time.thread_time() - cpu)
    result["lookup_microseconds_per_key"] = statistics.median(walls) / BATCH * 1e6
    result["lookup_cpu_microseconds_per_key"] = statistics.median(cpus) / BATCH * 1e6
    return result


def key_of(unit: int, position: int) -> str:
    """A key as ImageNet's are."""
    return f"n{unit * 7919 % 10**8:08d}_{unit:05d}{position:04d}"


def keys_of(config: Config, unit: int) -> list[str]:
    """Keys of a tar."""
    return [key_of(unit, position) for position in range(config.samples)]


def sparse_manifest(config: Config) -> Manifest:
    """A Swin-L teacher's."""
    return Manifest(
        teacher=TeacherInfo("swin_large", {}, "0" * 64, (224, 224), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), 1000, "bfloat16"),
        split=SplitInfo("swin", 2, 768, (14, 14), 1536, (7, 7), 0, "none"),
        blocks_sha256="1" * 64,
        taps={"stage4": TapInfo(49, 1536, "f16")},
        logits_codec="f16",
        policy=view_policy("a2", 224),
        seed=0,
        num_views=config.views,
        tars=tuple(TarInfo(f"train-{unit:05d}.tar", config.samples, f"{unit:064x}") for unit in range(config.units)),
        capacity=config.samples,
        key_width=24,
        software=software_versions(),
    )


def _peak_megabytes() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()  # getrusage also counts the parent before exec
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        print(json.dumps(measure(*sys.argv[2:])))
    else:
        main(tyro.cli(Config))
