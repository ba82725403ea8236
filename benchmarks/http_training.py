"""A trainer fed over HTTP beside the same trainer fed by the store."""

import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.http_servers import service
from benchmarks.step import Bench, Setting
from student_trainer.plan import resolve
from student_trainer.teachers.config import ServiceTeacher
from student_trainer.train import Run


def measure_training(folder: Path, repeats: int = 24) -> dict[str, Any]:
    """Seconds of a step with its batch, in this process, so that nothing of a read is hidden behind the step."""
    folder.mkdir()
    setting = Setting(batch=8, samples=64)
    bench = Bench(setting, folder)
    bench.write()
    local = bench.run("store")
    with service(bench.store) as server:
        remote = Run(resolve(replace(local.config, teacher=ServiceTeacher(server.url))))
        remote.module.train()
        runs = {"store": local, "service": remote}
        batches = list(local.plan.sampler)
        times: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(-2, repeats):
            for name in sorted(runs, reverse=bool(turn % 2)):
                rows = batches[turn % len(batches)]
                started = time.perf_counter()
                runs[name].step([runs[name].plan.dataset[rows]])
                if turn >= 0:
                    times[name].append(time.perf_counter() - started)
    return {
        "teacher": setting.teacher,
        "student": setting.student,
        "batch": setting.batch,
        "seconds": {name: round(statistics.median(values), 4) for name, values in times.items()},
        "step_rate_ratio": round(
            statistics.median(near / far for near, far in zip(times["store"], times["service"], strict=True)), 3
        ),
    }
