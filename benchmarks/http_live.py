"""The live teacher behind the service: its rate beside the bare forward pass, latencies, and what overload does."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from benchmarks.http_servers import Server, service
from benchmarks.store_data import make_manifest
from feature_store.format.manifest import TapInfo
from feature_store.store import Store
from feature_store.teacher.bundle import bundle_sha256, bundle_state
from feature_store.teacher.model import Teacher, load_teacher
from teacher_service.serve.live.teacher import TeacherModel

OVERLOAD = 10
OVERLOAD_SECONDS = 60.0  # of batches that take a second each on a CPU
MAX_BATCH = 16  # half the clients: while one batch is computed, the next one arrives


def measure_live(folder: Path, teacher: str, clients: int, rounds: int) -> dict[str, Any]:
    """Views per second of the bare forward pass, of the service for clients at once, and under overload.

    Half of the cores are the server's, and the bare forward pass's; the clients have the others.
    """
    folder.mkdir()
    everywhere = os.sched_getaffinity(0)
    cores = sorted(everywhere)
    own, others = cores[: max(1, len(cores) // 2)], cores[len(cores) // 2 :]
    torch.set_num_threads(len(own))
    os.sched_setaffinity(0, own)
    try:
        return _measure(folder, teacher, clients, rounds, own, others)
    finally:
        os.sched_setaffinity(0, everywhere)


def _measure(
    folder: Path, teacher: str, clients: int, rounds: int, own: list[int], others: list[int]
) -> dict[str, Any]:
    checkpoint = folder / "teacher.safetensors"
    model = _teacher(teacher, checkpoint)
    store = _store_of(model, folder / "store")
    views = np.random.default_rng(0).integers(0, 256, (MAX_BATCH, *model.info.input_size, 3), np.uint8)
    options = ("--teacher", teacher, "--checkpoint", str(checkpoint), "--max-batch", str(MAX_BATCH),
               "--queue-rows", str(2 * MAX_BATCH), "--max-wait", "0.05")  # fmt: skip
    bare = TeacherModel(model, ["stage4"])
    with service(store.path, *options, cores=own) as server:
        ratios, rates, latencies = [], [], []
        together = ("together", clients, rounds * MAX_BATCH // clients)
        _load(server, others, *together[:2], 1)
        bare(views)
        for _ in range(3):  # in turns: the machine's other work hurts both alike
            forward = MAX_BATCH * rounds / _seconds(lambda: [bare(views) for _ in range(rounds)])
            found = _load(server, others, *together)
            ratios.append(found["rate"] / forward)
            rates.append((forward, found["rate"]))
            latencies += found["latencies"]
        overload = _overload(server, others, together)
    return {
        "teacher": teacher,
        "max_batch": MAX_BATCH,
        "clients": clients,
        "threads": torch.get_num_threads(),
        "cores": {"server, bare forward": len(own), "clients": len(others)},
        "views_per_s": {
            "bare forward": round(statistics.median(forward for forward, _ in rates), 2),
            "service": round(statistics.median(rate for _, rate in rates), 2),
        },
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "latency_s": {f"p{p}": round(float(np.percentile(latencies, p)), 3) for p in (50, 99)},
        "overload": overload,
    }


def _overload(server: Server, others: list[int], together: tuple[str, int, int]) -> dict[str, Any]:
    """Ten times the capacity, beside the capacity itself just before and after.

    The main thread of the server is its event loop: all that a refusal costs is spent there.
    """
    peaks: list[float] = []

    def peak() -> dict[str, float]:
        before = server.cpu_seconds(), server.loop_seconds()
        peaks.append(_load(server, others, *together)["rate"])
        views = together[1] * together[2]
        return {"all": (server.cpu_seconds() - before[0]) / views, "loop": (server.loop_seconds() - before[1]) / views}

    view, memory, loop = peak(), server.peak_memory(), server.loop_seconds()
    found = _load(server, others, "offer", OVERLOAD * peaks[0], OVERLOAD_SECONDS)
    loop, growth = server.loop_seconds() - loop, server.peak_memory() - memory
    peak()
    served, answers = found["answers"].get("200", 0), sum(found["answers"].values())
    capacity = statistics.mean(peaks)
    return {
        "offered_over_capacity": round(found["offered"] / capacity, 1),
        "goodput_over_peak": round(found["goodput"] / capacity, 3),
        "peaks": [round(rate, 2) for rate in peaks],
        "answers": found["answers"],
        "server_cpu_ms": {
            "per view": round(1e3 * view["all"], 2),
            "per view, outside of the teacher's threads": round(1e3 * view["loop"], 2),
            "per refusal": round(1e3 * (loop - served * view["loop"]) / max(1, answers - served), 3),
        },
        "peak_memory_growth_MB": round(growth / 1e6, 1),
    }


def _load(server: Server, cores: list[int], *arguments: object) -> dict[str, Any]:
    """See benchmarks.http_load."""
    command = [sys.executable, "-m", "benchmarks.http_load", server.url, *map(str, arguments)]
    pin = partial(os.sched_setaffinity, 0, cores)
    return json.loads(subprocess.run(command, check=True, capture_output=True, preexec_fn=pin).stdout)


def _seconds(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


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
