"""The main job from end to end: digits, teacher, store, students, report."""

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from demo.digits import Digits, write_digits
from demo.feature_maps import read_feature_maps
from demo.report import write_report
from demo.results import Results, StoreResult, StudentResult, TeacherResult
from demo.settings import CLASSES, QUICK, SIDE, VIEW_POLICY, Settings
from demo.students import SettingResult, Students, summarise
from demo.teacher import TeacherReport, train_teacher
from feature_store import open_store
from feature_store.errors import InputError
from feature_store.format.versions import software_versions
from student_trainer.students.student import Student
from teacher_service.cache.job import cache
from teacher_service.config import CacheConfig, ComputeSpec, Inputs, StorageSpec, TeacherSpec, ViewSpec
from teacher_service.plan.sizes import plan

STORAGE = StorageSpec(tap_codec="f16")  # store-fed and live students then differ by 16-bit rounding at most
_MARKER = ".made-by-demo"  # a folder is emptied only if this file is in it


def run_demo(out: Path, settings: Settings, console: Console) -> Results:
    """Do everything, and write results.json and report.html beside the data, the store and the runs.

    Args:
        out: The output folder; emptied first if an earlier demo made it.
        settings: Sizes.
        console: Where to show progress.

    Raises:
        InputError: The output folder holds something else.
    """
    begun = time.perf_counter()
    _empty(out)
    with _step(console, "write the digits as tars"):
        digits = write_digits(out / "data", settings)
    with _step(console, "train the teacher on all labels"), _one_thread():
        teacher = train_teacher(digits, settings, out / "teacher.safetensors")
    with _step(console, "run the teacher once over all views"), _one_thread():
        store = _cache(out / "store", digits, teacher, settings)
    with _step(console, "train the students"):
        rows = _train(Students(out / "runs", digits, out / "store", teacher.checkpoint, settings.student), console)
    with _step(console, "write the report"):
        maps = read_feature_maps(open_store(out / "store"), digits.train_tars, teacher.checkpoint)
        results = Results(
            quick=settings == QUICK,
            test_images=digits.test_images,
            teacher=TeacherResult(settings.teacher.name, teacher.parameters, teacher.top1, teacher.seconds),
            store=store,
            student=_describe_student(settings),
            settings=tuple(rows),
            seconds=time.perf_counter() - begun,
            cpu_seconds=_cpu_seconds(),
            software=software_versions(),
        )
        results.write(out / "results.json")
        write_report(out / "report.html", results, maps)
    return results


def digits_store(out: Path, settings: Settings, storage: StorageSpec = STORAGE) -> Digits:
    """Write the digits as tars, train the teacher, and run it once into ``out/store``; no students.

    Args:
        out: A new folder.
        settings: Sizes.
        storage: Taps and codecs of the store.
    """
    digits = write_digits(out / "data", settings)
    teacher = train_teacher(digits, settings, out / "teacher.safetensors")
    cache(_cache_config(out / "store", digits, teacher, settings, storage))
    return digits


def _empty(out: Path) -> None:
    """Make the folder, without what an earlier demo left in it."""
    if out.exists() and any(out.iterdir()):
        if not (out / _MARKER).is_file():
            raise InputError(f"--out {out} holds something the demo did not make; choose another folder")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / _MARKER).touch()


@contextmanager
def _step(console: Console, what: str) -> Iterator[None]:
    """Print the name of a part as it begins, and its time."""
    begun = time.perf_counter()
    console.print(f"[bold]{what}[/bold] ...")
    yield
    console.print(f"  took {time.perf_counter() - begun:.1f} s", highlight=False)


def _cache(store: Path, digits: Digits, teacher: TeacherReport, settings: Settings) -> StoreResult:
    """Plan, then cache."""
    config = _cache_config(store, digits, teacher, settings, STORAGE)
    planned = plan(config)
    summary = cache(config)
    return StoreResult(
        planned_bytes=planned.total_bytes,
        bytes=sum(file.stat().st_size for file in store.rglob("*") if file.is_file()),
        rows=summary.images,
        views=settings.views,
        teacher_seconds=summary.teacher_seconds,
        seconds=summary.seconds,
    )


def _cache_config(
    store: Path, digits: Digits, teacher: TeacherReport, settings: Settings, storage: StorageSpec
) -> CacheConfig:
    return CacheConfig(
        inputs=Inputs(tars=digits.train_tars),
        teacher=TeacherSpec(name=settings.teacher.name, model_kwargs=settings.teacher.model_kwargs),
        views=ViewSpec(
            count=settings.views, policy=VIEW_POLICY, policy_options=settings.view_options, seed=settings.seed
        ),
        storage=storage,
        compute=ComputeSpec(device="cpu", workers=0),
        checkpoint=teacher.checkpoint,
        store=store,
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """As in the students' processes, so that seconds compare; on a busy machine threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _train(students: Students, console: Console) -> list[SettingResult]:
    runs = []
    total = sum(len(setting.seeds) for setting in students.settings())
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(f"{total} students", total=total)
        for setting, result in students.run():
            runs.append((setting, result))
            bar.advance(task)
    return summarise(runs)


def _describe_student(settings: Settings) -> StudentResult:
    chosen = settings.student
    model = Student(chosen.name, CLASSES, (SIDE, SIDE), chosen.model_kwargs)
    return StudentResult(chosen.name, sum(parameter.numel() for parameter in model.parameters()))


def _cpu_seconds() -> float:
    """CPU time of this process and the ones it waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
