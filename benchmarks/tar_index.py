"""Opening many tars: first start, later starts, and reading their headers alone.

Tars are generated, opened once with an empty cache folder and again with the kept indexes, each time in a fresh
process; the floor is our header reader on the same tars, one process per core and nothing else.

    python -m benchmarks.tar_index --tars 64
"""

import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from multiprocessing import get_context
from pathlib import Path

import tyro
from PIL import Image

from feature_store.inputs.headers import read_headers
from feature_store.inputs.index_cache import VARIABLE
from feature_store.inputs.tar import open_tars
from feature_store.processes import usable_cpus


@dataclass(frozen=True)
class Config:
    """Options of the benchmark.

    Attributes:
        folder: Where tars are generated, in a folder that is removed in the end; None for the system's temporary one.
        tars: Tars.
        samples: Samples per tar, an image and a label each.
        repeats: Measurements of each kind.
    """

    folder: Path | None = None
    tars: int = 1281
    samples: int = 1000
    repeats: int = 3


def main(config: Config) -> None:
    """Generate the tars, measure, print JSON."""
    with tempfile.TemporaryDirectory(dir=config.folder, prefix="tar-index-") as name:
        folder = Path(name)
        write_tars(folder, config)
        runs = [_run(folder, folder / f"cache-{repeat}") for repeat in range(config.repeats)]
    medians = {kind: statistics.median(run[kind] for run in runs) for kind in runs[0]}
    result = {
        "tars": config.tars,
        "samples": config.tars * config.samples,
        "cores": usable_cpus(),
        **medians,
        "first_over_headers": medians["first_seconds"] / medians["headers_seconds"],
    }
    print(json.dumps(result, indent=2))


def _run(folder: Path, cache: Path) -> dict[str, float]:
    headers = header_seconds(sorted(folder.glob("*.tar")))
    first, second = opened(folder, cache), opened(folder, cache)
    return {
        "headers_seconds": headers,
        "first_seconds": first["seconds"],
        "second_seconds": second["seconds"],
        "second_megabytes": second["megabytes"],
        "index_megabytes": sum(file.stat().st_size for file in cache.rglob("*.index")) / 1e6,
    }


def write_tars(folder: Path, config: Config) -> None:
    """Tars of small images and labels, names as ImageNet's."""
    buffer = BytesIO()
    Image.new("RGB", (8, 8), (90, 120, 30)).save(buffer, "JPEG")
    for tar in range(config.tars):
        with tarfile.open(folder / f"train-{tar:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
            for sample in range(config.samples):
                key = f"n{tar * 7919 % 10**8:08d}_{tar:05d}{sample:04d}"
                for extension, content in (("jpg", buffer.getvalue()), ("cls", str(tar % 1000).encode())):
                    info = tarfile.TarInfo(f"{key}.{extension}")
                    info.size = len(content)
                    archive.addfile(info, BytesIO(content))


def header_seconds(tars: list[Path]) -> float:
    """Reading the headers of all tars with all cores, without an index of samples."""
    with ProcessPoolExecutor(usable_cpus(), get_context("spawn")) as pool:
        list(pool.map(count_members, tars[: usable_cpus()]))  # so that the processes run
        started = time.perf_counter()
        list(pool.map(count_members, tars))
        return time.perf_counter() - started


def count_members(tar: Path) -> int:
    """Regular members of a tar."""
    return len(read_headers(str(tar), tar).members)


def opened(folder: Path, cache: Path) -> dict[str, float]:
    """Open all tars in a fresh process: seconds, and peak memory beyond that of imports."""
    command = [sys.executable, "-m", "benchmarks.tar_index", "measure", str(folder)]
    environment = os.environ | {VARIABLE: str(cache)}
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)


def measure(folder: str) -> dict[str, float]:
    """Request of a measured process."""
    before = _peak_megabytes()
    started = time.perf_counter()
    open_tars([f"{folder}/*.tar"])
    return {"seconds": time.perf_counter() - started, "megabytes": _peak_megabytes() - before}


def _peak_megabytes() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        print(json.dumps(measure(sys.argv[2])))
    else:
        main(tyro.cli(Config))
