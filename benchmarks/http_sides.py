"""Rows over HTTP by two checkouts in turns, each beside its own raw socket.

    python -m benchmarks.http_sides --before ../other --out benchmarks/results/http_sides.json

Each side is a client process of its own checkout with that checkout's service. Sides take turns batch by batch and the
order alternates, so that what else the machine does hurts both alike; ratios are medians within one run.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from benchmarks.http import client_cpu, rows_of
from benchmarks.http_servers import RawSocket, service
from benchmarks.store import BATCH, batches_of, random_batches
from benchmarks.store_data import ROW_BYTES, make_store
from feature_store import connect, open_store

_WARM = 40  # batches, see benchmarks.http
_CONTENDERS = ("raw socket", "service")
_PATTERNS = {"sequential": batches_of, "random": random_batches}
_GIGABYTES = BATCH * ROW_BYTES / 1e9


@dataclass(frozen=True)
class Config:
    """Options of the benchmark.

    Attributes:
        before: The other checkout.
        folder: Where the store is written, 300 MB, in a folder that is removed in the end; default the system's
            temporary one.
        out: JSON file to write; None prints only.
        runs: Number of fresh starts of both sides.
        rounds: Batches per side, contender and pattern.
    """

    before: Path
    folder: Path | None = None
    out: Path | None = None
    runs: int = 3
    rounds: int = 48


def main(config: Config) -> None:
    with tempfile.TemporaryDirectory(dir=config.folder, prefix="http-sides-") as name:
        store = Path(name, "store")
        make_store(store, 2, 1, 1024)
        runs = [measure(config, store, number) for number in range(config.runs)]
    text = json.dumps({"rows": 2048, "batch": BATCH, "cores": os.cpu_count(), "runs": runs}, indent=1)
    print(text)
    if config.out is not None:
        config.out.write_text(text + "\n")


def measure(config: Config, store: Path, number: int) -> dict[str, Any]:
    """One run: rates, ratios and CPU of both sides by pattern."""
    load, sides = os.getloadavg()[0], {"before": config.before, "after": Path(__file__).parents[1]}
    processes = {name: _start(store, checkout, config.rounds) for name, checkout in sides.items()}
    found: dict[str, Any] = {"run": number + 1, "load": round(load, 2)}
    try:
        for pattern in _PATTERNS:
            taken: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
            for turn in range(config.rounds):
                for name in sorted(sides, reverse=turn % 2 == 0):
                    taken[name].append(_ask(processes[name], pattern, turn))
            found[pattern] = {name: _summary(some) for name, some in taken.items()}
    finally:
        for process in processes.values():
            assert process.stdin is not None
            process.stdin.close()
            process.wait(60)
    return found


def _start(store: Path, checkout: Path, rounds: int) -> "subprocess.Popen[str]":
    command = [sys.executable, "-P", __file__, str(store), str(rounds)]  # -P: a module here is named http
    environment = {**os.environ, "PYTHONPATH": str(checkout.resolve())}
    process = subprocess.Popen(
        command, cwd=checkout, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()  # warm
    return process


def _ask(process: "subprocess.Popen[str]", pattern: str, turn: int) -> dict[str, float]:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{pattern} {turn}\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def _summary(taken: list[dict[str, float]]) -> dict[str, Any]:
    medians = {name: statistics.median(each[name] for each in taken) for name in _CONTENDERS}
    ratios = [each["raw socket"] / each["service"] for each in taken]
    cpu = {name: round(sum(each[name] for each in taken) / len(taken) / _GIGABYTES, 3) for name in ("client", "server")}
    return {
        "GB_per_s": {name: round(_GIGABYTES / seconds, 3) for name, seconds in medians.items()},
        "ratio": round(medians["raw socket"] / medians["service"], 3),
        "median_of_ratios": round(statistics.median(ratios), 3),
        "service_cpu_seconds_per_GB": cpu,
    }


def side(store: Path, rounds: int) -> None:
    """One side: reads ``PATTERN TURN`` from stdin and prints the seconds of each contender."""
    rows = rows_of(open_store(store))
    batches = {pattern: make(rows, rounds) for pattern, make in _PATTERNS.items()}
    with service(store) as server:
        source, floor = connect(server.url).source(), RawSocket(BATCH * ROW_BYTES)
        memory = source.buffers(BATCH)
        read = {
            "raw socket": lambda _: floor.read(memory["stage4"]),
            "service": lambda some: source.read(some, out=memory),
        }
        for turn in range(_WARM):
            for contender in read.values():
                contender(batches["random"][turn % rounds])
        print("warm", flush=True)
        for line in sys.stdin:
            pattern, turn = line.split()
            batch, found = batches[pattern][int(turn) % len(batches[pattern])], {}
            for name in _CONTENDERS:
                cpu, started = (client_cpu(), server.cpu_seconds()), time.perf_counter()
                read[name](batch)
                found[name] = time.perf_counter() - started
                found["client"], found["server"] = client_cpu() - cpu[0], server.cpu_seconds() - cpu[1]
            print(json.dumps(found), flush=True)
        floor.close()


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[2].isdecimal():
        side(Path(sys.argv[1]), int(sys.argv[2]))
    else:
        main(tyro.cli(Config))
