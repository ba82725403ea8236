r"""Cache job over the bare teacher, with its memory and its plan.

    python -m benchmarks.cache --tars "images-{000..015}.tar" --out benchmarks/results/cache.json
    python -m benchmarks.cache --tars "images-{000..015}.tar" --device cuda --compute-dtype bfloat16 --batch-size 256 \
        --workers 16 --samples 8192 --teacher swin_large_patch4_window7_224

Parts:

    resident: pixels in memory: pipeline over bare forward
    jpeg: pipeline over the slower of bare forward and decoding alone
    views: eight views of one decode over eight passes
    memory: RSS over 200 units
    bounds: units in memory with a writer slowed to a tenth
    plan: prediction over the job's time
    gpu: on a GPU: dtype, compile, fraction of peak

Weights are random. Both sides take turns within each repeat, so that a busy machine disturbs both; only ratios count.
"""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import cycle
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
import tyro
from safetensors.torch import save_file

from benchmarks.cache_gpu import forward_variants
from benchmarks.cache_limits import ForgetfulStore, memory_slope, queue_bounds
from feature_store.store import Store
from feature_store.teacher.model import build_model
from feature_store.tools.options import JsonObject
from teacher_service.cache.decode import Span, Task, ViewBatch, ViewDataset, batch_spans, read_batches
from teacher_service.cache.forward import Forward
from teacher_service.cache.job import cache
from teacher_service.cache.pipeline import Pipeline
from teacher_service.cache.prepare import Job, prepare
from teacher_service.cache.stage_timer import StageTimer, StageTimes
from teacher_service.config import CacheConfig, ComputeSpec, Inputs, TeacherSpec, ViewSpec
from teacher_service.plan.forecast import forecast
from teacher_service.plan.survey import survey

Part = Literal["resident", "jpeg", "views", "memory", "bounds", "plan", "gpu"]
PARTS: tuple[Part, ...] = ("resident", "jpeg", "views", "memory", "bounds", "plan", "gpu")
MANY_VIEWS = 8


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Options of the benchmark.

    Attributes:
        tars: Image tars, as ``teacher-service cache`` takes them.
        parts: Which measurements to make.
        teacher: timm model name.
        teacher_kwargs: Extra arguments of timm.create_model, as JSON.
        small_teacher: A model so fast that decoding is the bottleneck.
        small_kwargs: Its extra arguments; {"img_size": 96, "patch_size": 4} makes large units for memory.
        device: Where the teacher runs.
        compute_dtype: dtype of its forward pass.
        compile: Run it through torch.compile.
        batch_size: View images per forward pass.
        workers: Decode workers.
        samples: Images of each measurement with the teacher; a whole number of batches.
        small_samples: Images of each measurement with the small one.
        repeats: Measurements of each kind.
        threads: CPU threads of the teacher; 0 leaves torch's own number.
        folder: Where stores are written meanwhile; default the system's temporary folder.
        out: Where the JSON goes, besides stdout; parts that are not measured now stay in it.
    """

    tars: tuple[str, ...]
    parts: tuple[Part, ...] = PARTS
    teacher: str = "swin_tiny_patch4_window7_224"
    teacher_kwargs: JsonObject = field(default_factory=dict)
    small_teacher: str = "test_vit"
    small_kwargs: JsonObject = field(default_factory=lambda: {"img_size": 224, "patch_size": 56})
    device: str = "auto"
    compute_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    compile: bool = False
    batch_size: int = 16
    workers: int = 1
    samples: int = 64
    small_samples: int = 512
    repeats: int = 3
    threads: int = 0
    folder: Path | None = None
    out: Path | None = None


class Bench:
    """Jobs on the setting's tars, each with a store of its own."""

    def __init__(self, setting: Setting, folder: Path) -> None:
        self.setting, self.folder = setting, folder
        self._stores = 0

    def config(self, teacher: str, *, workers: int | None = None, views: int = 1) -> CacheConfig:
        """A job of the setting."""
        self._stores += 1
        setting = self.setting
        small = teacher == setting.small_teacher
        kwargs = setting.small_kwargs if small else setting.teacher_kwargs
        return CacheConfig(
            inputs=Inputs(tars=setting.tars),
            teacher=TeacherSpec(name=teacher, model_kwargs=kwargs, compute_dtype=setting.compute_dtype),
            views=ViewSpec(count=views),
            compute=ComputeSpec(
                device=setting.device,
                compile=setting.compile and not small,
                batch_size=setting.batch_size,
                workers=setting.workers if workers is None else workers,
            ),
            checkpoint=self._checkpoint(teacher, kwargs),
            store=self.folder / f"store-{self._stores}",
        )

    def job(self, teacher: str, **options: Any) -> Job:
        """The same, ready to run repeatedly: its commits are forgotten."""
        config = self.config(teacher, **options)
        job = prepare(survey(config), config)
        return replace(job, store=cast(Store, ForgetfulStore(job.store)))

    def _checkpoint(self, teacher: str, kwargs: dict[str, Any]) -> Path:
        path = self.folder / f"{teacher}.safetensors"
        if not path.exists():
            torch.manual_seed(0)
            state = build_model(teacher, kwargs).state_dict()
            save_file({name: leaf.contiguous() for name, leaf in state.items()}, path)
        return path


class ResidentDataset:
    """Batches that are in memory already; the pixels are noise."""

    def __init__(self, job: Job) -> None:
        height, width = job.store.manifest.policy.size
        rng = np.random.default_rng(0)
        pixels = rng.integers(0, 256, (job.compute.batch_size, 1, height, width, 3), np.uint8)
        self._real = ViewDataset(job.tars, job.store.manifest.policy, job.store.manifest.seed)
        self._template = self._real[Span(Task(0, range(1)), 0, 1)]
        self.pixels = torch.from_numpy(pixels)

    def __getitem__(self, span: Span) -> ViewBatch:
        """A batch whose pixels cost nothing."""
        assert isinstance(self._template, ViewBatch)
        count = span.stop - span.start
        return replace(
            self._template,
            task=span.task,
            start=span.start,
            labels=self._template.labels.repeat(count),
            params=[self._template.params[0] * count],
            pixel_crc=self._template.pixel_crc.repeat(count, axis=1),
            pixels=self.pixels[:count],
            seconds=0.0,
        )


def tasks_of(job: Job, images: int, views: range = range(1)) -> list[Task]:
    """Tasks of a least number of images, whole units; the tars repeatedly if needed."""
    tasks: list[Task] = []
    for unit in cycle(range(len(job.tars))):
        if images <= 0:
            break
        tasks.append(Task(unit, views))
        images -= len(views) * len(job.tars[unit])
    return tasks


def pipeline_rate(job: Job, tasks: Sequence[Task], dataset: Any = None) -> tuple[float, StageTimes]:
    """Images per second from the first batch's end to the last one's, and how the stages worked."""
    marks: list[tuple[float, int]] = []
    pipeline = Pipeline(job, dataset)
    report = pipeline.run(
        tasks,
        on_commit=lambda done: None,
        on_batch=lambda images, times: marks.append((time.perf_counter(), images)),
    )
    return _rate(marks), report.times


def bare_rate(job: Job, batches: int) -> float:
    """Images per second of the teacher alone on one batch that is in memory, features brought to the host."""
    forward = _forward(job)
    pixels = ResidentDataset(job).pixels[:, 0]
    pixels = pixels.pin_memory() if forward.device.type == "cuda" else pixels
    forward(pixels).arrays()
    started = time.perf_counter()
    waiting = None
    for _ in range(batches):  # one ahead, as on a GPU the host must not make it wait
        outputs, waiting = waiting, forward(pixels)
        if outputs is not None:
            outputs.arrays()
    if waiting is not None:
        waiting.arrays()
    return batches * job.compute.batch_size / (time.perf_counter() - started)


def _forward(job: Job) -> Forward:
    return Forward(job.teacher, ["stage4"], job.compute.batch_size, StageTimer(), compile=job.compute.compile)


def decode_rate(job: Job, tasks: Sequence[Task]) -> float:
    """Images per second of the decode workers alone."""
    manifest = job.store.manifest
    dataset = ViewDataset(job.tars, manifest.policy, manifest.seed)
    spans = batch_spans(tasks, [len(tar) for tar in job.tars], job.compute.batch_size)
    most_images = max(job.compute.batch_size, manifest.num_views)
    marks, images = [], 0
    for batch in read_batches(dataset, spans, most_images=most_images, workers=job.compute.workers, pin_memory=False):
        images += batch.images
        marks.append((time.perf_counter(), images))
    return _rate(marks)


def _rate(marks: Sequence[tuple[float, int]]) -> float:
    return (marks[-1][1] - marks[0][1]) / (marks[-1][0] - marks[0][0])


def resident(bench: Bench) -> dict[str, Any]:
    """Pixels in memory: images/s of the whole pipeline over those of the bare forward pass."""
    setting, found = bench.setting, []
    job = bench.job(setting.teacher, workers=0)
    tasks = tasks_of(job, setting.samples)
    for _ in range(setting.repeats):
        bare = bare_rate(job, setting.samples // setting.batch_size)
        rate, times = pipeline_rate(job, tasks, ResidentDataset(job))
        found.append({"bare": bare, "pipeline": rate, "ratio": rate / bare, "teacher_waited": times.waited("forward")})
    return _medians(found)


def jpeg(bench: Bench) -> dict[str, Any]:
    """From JPEGs: images/s over the slower of the bare forward pass and decoding alone with the same workers."""
    setting = bench.setting
    sizes = {setting.teacher: setting.samples, setting.small_teacher: setting.small_samples}
    return {teacher: _jpeg(bench, teacher, images) for teacher, images in sizes.items()}


def _jpeg(bench: Bench, teacher: str, images: int) -> dict[str, Any]:
    found = []
    job = bench.job(teacher)
    tasks = tasks_of(job, images)
    for _ in range(bench.setting.repeats):
        bare, decode = bare_rate(job, images // job.compute.batch_size), decode_rate(job, tasks)
        rate, times = pipeline_rate(job, tasks)
        shares = {f"{stage} busy": times.share(stage) for stage in times.available}
        ratio = rate / min(bare, decode)
        found.append({"bare": bare, "decode": decode, "pipeline": rate, "ratio": ratio, **shares})
    return _medians(found)


def views(bench: Bench) -> dict[str, Any]:
    """Eight views of one decode over eight passes of a view each, decoding being the bottleneck."""
    setting, found = bench.setting, []
    job = bench.job(setting.small_teacher, views=MANY_VIEWS)
    images = MANY_VIEWS * setting.small_samples // 4
    together = tasks_of(job, images, range(MANY_VIEWS))
    singles = [Task(task.unit, range(view, view + 1)) for view in range(MANY_VIEWS) for task in together]
    for _ in range(setting.repeats):
        at_once, times = pipeline_rate(job, together)
        apart, _ = pipeline_rate(job, singles)
        decode, alone = decode_rate(job, together), decode_rate(job, singles)
        found.append(
            {
                "at_once": at_once,
                "one_by_one": apart,
                "ratio": at_once / apart,
                "ratio_of_decoding_alone": decode / alone,
                "teacher_waited": times.waited("forward"),
            }
        )
    return _medians(found)


def plan(bench: Bench) -> dict[str, Any]:
    """Ratio of the plan's prediction to the job's time."""
    setting, found = bench.setting, []
    for _ in range(min(2, setting.repeats)):
        config = bench.config(setting.teacher)
        timed = replace(config, compute=replace(config.compute, time_samples=setting.samples))
        said = forecast(survey(timed), timed)
        summary = cache(config)
        written = sum(path.stat().st_size for path in Path(config.store).rglob("*") if path.is_file())
        assert said.seconds is not None
        found.append(
            {
                "seconds_predicted": said.seconds,
                "seconds": summary.seconds,
                "time_ratio": said.seconds / summary.seconds,
                "bytes_ratio": said.plan.total_bytes / written,
                "images": summary.images,
            }
        )
    return _medians(found)


def _medians(found: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Median of each figure, and the ratios of every repeat."""
    medians: dict[str, Any] = {name: statistics.median(each[name] for each in found) for name in found[0]}
    return medians | {f"{name}s": [each[name] for each in found] for name in found[0] if name.endswith("ratio")}


def measure(setting: Setting) -> dict[str, Any]:
    """Every part that was asked for and is possible here; kept as soon as it is measured."""
    if setting.threads:
        torch.set_num_threads(setting.threads)
    runs: dict[str, Callable[[Bench], Any]] = {
        "resident": resident,
        "jpeg": jpeg,
        "views": views,
        "memory": lambda bench: memory_slope(bench.job(setting.small_teacher)),
        "bounds": lambda bench: queue_bounds(bench.job(setting.small_teacher)),
        "plan": plan,
        "gpu": lambda bench: forward_variants(setting.teacher, setting.teacher_kwargs, setting.batch_size),
    }
    machine = {"torch": torch.__version__, "cpus": os.cpu_count(), "threads": torch.get_num_threads()}
    results: dict[str, Any] = {"setting": asdict(setting), "machine": machine}
    with tempfile.TemporaryDirectory(dir=setting.folder) as folder:
        bench = Bench(setting, Path(folder))
        for part in setting.parts:
            if part == "gpu" and not torch.cuda.is_available():
                continue
            before = os.getloadavg()[0]
            results[part] = runs[part](bench)
            results[part]["load_before_and_after"] = [before, os.getloadavg()[0]]
            _keep(setting.out, results)
    return results


def _keep(out: Path | None, results: dict[str, Any]) -> None:
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        before = json.loads(out.read_text()) if out.exists() else {}
        out.write_text(json.dumps(before | results, indent=2, default=str) + "\n")


def main() -> None:
    setting = tyro.cli(Setting, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,))
    print(json.dumps(measure(setting), indent=2, default=str))


if __name__ == "__main__":
    main()
