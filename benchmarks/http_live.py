"""The live teacher behind the service: its rate beside the bare forward pass, latencies, and what overload does."""

import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from benchmarks.http_servers import Server, service
from benchmarks.store_data import make_manifest
from feature_store import wire
from feature_store.manifest import TapInfo
from feature_store.remote.service import Patience, Service
from feature_store.remote.transport import LOST, HttpTransport
from feature_store.store import Store
from feature_store.teacher.bundle import bundle_sha256, bundle_state
from feature_store.teacher.model import Teacher, load_teacher
from teacher_service.serving.live import TeacherModel

OVERLOAD = 10
MAX_BATCH = 16  # half the clients: while one batch is computed, the next one arrives


def measure_live(folder: Path, teacher: str, clients: int, rounds: int) -> dict[str, Any]:
    """Views per second of the bare forward pass, of the service for clients at once, and under overload."""
    folder.mkdir()
    checkpoint = folder / "teacher.safetensors"
    model = _teacher(teacher, checkpoint)
    store = _store_of(model, folder / "store")
    size = model.info.input_size
    views = np.random.default_rng(0).integers(0, 256, (MAX_BATCH, *size, 3), np.uint8)
    options = ("--teacher", teacher, "--checkpoint", str(checkpoint), "--max-batch", str(MAX_BATCH),
               "--queue-rows", str(2 * MAX_BATCH), "--max-wait", "0.05")  # fmt: skip
    bare = TeacherModel(model, ["stage4"])
    with service(store.path, *options) as server:
        ratios, rates, latencies = [], [], []
        _together(server, views, clients, 1)
        bare(views)
        for _ in range(3):  # in turns: the machine's other work hurts both alike
            forward = MAX_BATCH * rounds / _seconds(lambda: [bare(views) for _ in range(rounds)])
            rate, waits = _together(server, views, clients, rounds * MAX_BATCH // clients)
            ratios.append(rate / forward)
            rates.append((forward, rate))
            latencies += waits
        overload = _overload(server, views, clients, rounds)
    return {
        "teacher": teacher,
        "max_batch": MAX_BATCH,
        "clients": clients,
        "threads": torch.get_num_threads(),
        "views_per_s": {
            "bare forward": round(statistics.median(forward for forward, _ in rates), 2),
            "service": round(statistics.median(rate for _, rate in rates), 2),
        },
        "ratio": round(statistics.median(ratios), 3),
        "latency_s": {f"p{p}": round(float(np.percentile(latencies, p)), 3) for p in (50, 99)},
        "overload": overload,
    }


def _together(server: Server, views: np.ndarray, clients: int, each: int) -> tuple[float, list[float]]:
    """Views per second of clients that each ask for one view after the other, and how long each took."""
    calls = Service.at(server.url, patience=Patience(deadline=600, timeout=300))
    latencies: list[float] = []
    bodies = [_body(views[at % len(views)][None]) for at in range(clients)]

    def client(body: bytes) -> None:
        for _ in range(each):
            started = time.perf_counter()
            calls.frame("POST", "/v1/features:compute?taps=stage4", body, media_type=wire.MEDIA_TYPE)
            latencies.append(time.perf_counter() - started)

    threads = [threading.Thread(target=client, args=(body,)) for body in bodies]
    seconds = _seconds(lambda: _run(threads))
    return clients * each / seconds, latencies


def _overload(server: Server, views: np.ndarray, clients: int, rounds: int, seconds: float = 20.0) -> dict[str, Any]:
    """Ten times the capacity, beside the capacity itself just before and after."""
    each = rounds * MAX_BATCH // clients
    before, _ = _together(server, views, clients, each)
    found = _offer(server, views, OVERLOAD * before, seconds)
    after, _ = _together(server, views, clients, each)
    peak = (before + after) / 2
    return {
        "offered_over_capacity": round(OVERLOAD * before / peak, 1),
        "goodput_over_peak": round(found.pop("goodput") / peak, 3),
        **found,
    }


def _offer(server: Server, views: np.ndarray, rate: float, seconds: float) -> dict[str, Any]:
    """Requests that come so many a second whatever becomes of them, each of one view."""
    transport, body = HttpTransport(server.url), _body(views[:1])
    headers = {"Content-Type": wire.MEDIA_TYPE}
    statuses: Counter[str] = Counter()
    done: list[float] = []
    memory = server.peak_memory()
    lock, begun = threading.Lock(), time.perf_counter()
    numbers = iter(range(int(rate * seconds)))

    def ask() -> None:
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            time.sleep(max(0.0, begun + number / rate - time.perf_counter()))
            try:
                with transport.send("POST", "/v1/features:compute?taps=stage4", headers, body, 120) as answer:
                    kind = str(answer.status)
                    if answer.status in (429, 503) and not answer.getheader("retry-after", "").isdecimal():
                        kind += " without Retry-After"
                    while answer.read(1 << 20):
                        pass
            except LOST as error:
                kind = type(error).__name__
            with lock:
                statuses[kind] += 1
                if kind == "200":
                    done.append(time.perf_counter() - begun)

    _run([threading.Thread(target=ask) for _ in range(int(min(240, 4 * 2 * MAX_BATCH)))])
    return {
        "answers": dict(sorted(statuses.items())),
        "goodput": sum(stamp <= seconds for stamp in done) / seconds,
        "peak_memory_growth_MB": round((server.peak_memory() - memory) / 1e6, 1),
    }


def _run(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _seconds(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _body(pixels: np.ndarray) -> bytes:
    return b"".join(wire.encode({"pixels": pixels}).chunks())


def _teacher(name: str, checkpoint: Path) -> Teacher:
    torch.manual_seed(0)
    model = load_teacher(name, pretrained=False)
    save_file({key: leaf.contiguous() for key, leaf in model.model.state_dict().items()}, checkpoint)
    return load_teacher(name, checkpoint=checkpoint)


def _store_of(teacher: Teacher, path: Path) -> Store:
    """An empty store of this teacher: what the service needs to know it."""
    blocks = {name: leaf.numpy() for name, leaf in bundle_state(teacher.later_blocks).items()}
    manifest = replace(
        make_manifest(1, 1, 8),
        teacher=teacher.info,
        split=teacher.split,
        blocks_sha256=bundle_sha256(bundle_state(teacher.later_blocks)),
        taps={"stage4": TapInfo(*teacher.tap_shapes["stage4"], "f16")},
    )
    return Store.create(path, manifest, blocks)
