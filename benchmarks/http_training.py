"""A trainer fed over HTTP beside the same trainer fed by the store."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.http_servers import service
from benchmarks.step import Bench, Setting
from benchmarks.turns import medians, ratio, take_turns, timed
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

        def step(run: Run, turn: int) -> None:
            run.step([run.plan.dataset[batches[turn % len(batches)]]])

        times = take_turns({name: timed(partial(step, run)) for name, run in runs.items()}, repeats, warm_up=2)
    return {
        "teacher": setting.teacher,
        "student": setting.student,
        "batch": setting.batch,
        "seconds": {name: round(value, 4) for name, value in medians(times).items()},
        "step_rate_ratio": round(ratio(times, "store", "service"), 3),
    }
