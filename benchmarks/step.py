r"""Cost of a training step: from a store, from memory, with the teacher live; and the loss against a plain one.

    python -m benchmarks.step --out benchmarks/results/step.json
    python -m benchmarks.step --device cuda --amp bfloat16 --batch 128 --repeats 30 \
        --teacher swin_large_patch4_window7_224 --student resnet50

Everything is random but of true shapes. Times are medians of repeats that take turns, so that a busy machine disturbs
all alike; only their ratios mean anything.
"""

import io
import json
import multiprocessing
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
import tyro
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from webdataset.writer import TarWriter

from benchmarks.official_style import official_style_loss
from benchmarks.turns import medians, ratio, take_turns, timed
from feature_store.format.addressing import RowId, Rows, row_array
from feature_store.source import FeatureBatch, FeatureSource
from feature_store.store import Store, open_store
from feature_store.teacher.model import build_model
from feature_store.tools.options import JsonObject
from feature_store.tools.terminal import Console
from student_trainer.config import TrainConfig
from student_trainer.data.batch import Batch, ViewDataset
from student_trainer.methods import DistillBatch, ScaleKD, ScaleKDConfig, StudentOutput, Terms
from student_trainer.plan import resolve
from student_trainer.teachers.config import LiveTeacher, StoreTeacher
from student_trainer.teachers.live import LiveSide
from student_trainer.train import Run
from teacher_service.cache.job import cache
from teacher_service.config import CacheConfig, ComputeSpec, Inputs, TeacherSpec


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Options of the benchmark.

    Attributes:
        teacher: timm model name.
        teacher_kwargs: Extra arguments of timm.create_model for the teacher, as JSON.
        student: timm model name.
        device: Where.
        amp: Autocast of student, loss and teacher.
        batch: Samples per step.
        samples: Images that exist; a whole number of batches.
        repeats: Measurements of each kind.
        threads: CPU threads; 0 leaves torch's own number.
        out: Where the JSON goes, besides stdout.
    """

    teacher: str = "swin_tiny_patch4_window7_224"
    teacher_kwargs: JsonObject = field(default_factory=dict)
    student: str = "resnet18"
    device: str = "cpu"
    amp: Literal["off", "bfloat16", "float16"] = "off"
    batch: int = 8
    samples: int = 64
    repeats: int = 7
    threads: int = 0
    out: Path | None = None


class MemorySource:
    """The features of a store, read beforehand."""

    needs_pixels = False

    def __init__(self, store: Store, rows: Sequence[RowId], taps: Sequence[str]) -> None:
        whole = store.source(taps).read(rows, taps, decode=False)
        self._at = {row: i for i, row in enumerate(rows)}
        self._encoded, self._logits = whole.encoded, whole.logits

    def read(
        self,
        rows: Rows,
        taps: Sequence[str] | None = None,
        *,
        pixels: np.ndarray | None = None,
        decode: bool = False,
    ) -> FeatureBatch:
        """See FeatureSource.read; what a trainer asks for, nothing is decoded."""
        at = [self._at[RowId(*row)] for row in row_array(rows).tolist()]
        encoded = {tap: {name: part[at] for name, part in self._encoded[tap].items()} for tap in taps or self._encoded}
        return FeatureBatch(row_array(rows), {}, None if self._logits is None else self._logits[at], encoded)


class Bench:
    """A store, and runs on it."""

    def __init__(self, setting: Setting, folder: Path) -> None:
        self.setting, self.folder = setting, folder
        self.tar, self.checkpoint, self.store = folder / "images.tar", folder / "teacher.safetensors", folder / "store"

    def write(self) -> None:
        """Images, teacher and store."""
        setting = self.setting
        _write_images(self.tar, setting.samples)
        torch.manual_seed(0)
        teacher = build_model(setting.teacher, setting.teacher_kwargs)
        save_file({name: leaf.contiguous() for name, leaf in teacher.state_dict().items()}, self.checkpoint)
        job = CacheConfig(
            inputs=Inputs(tars=(str(self.tar),)),
            teacher=TeacherSpec(name=setting.teacher, model_kwargs=setting.teacher_kwargs),
            compute=ComputeSpec(device=setting.device, batch_size=setting.batch, workers=0),
            checkpoint=self.checkpoint,
            store=self.store,
        )
        cache(job, Console(stderr=True, quiet=True))

    def run(
        self,
        source: Literal["store", "live"],
        patchify: Literal["full", "separable"] = "full",
        method: str = "scalekd",
    ) -> Run:
        """A run that reads the store, or asks the teacher, which computes in the dtype of the student's autocast."""
        setting = self.setting
        dtype = "float32" if setting.amp == "off" else setting.amp
        live = LiveTeacher(checkpoint=self.checkpoint, compute_dtype=dtype, store=self.store)
        config = TrainConfig(
            run=self.folder / source,
            student=setting.student,
            tars=(str(self.tar),),
            teacher=live if source == "live" else StoreTeacher(self.store),
            method=method,
            scalekd=ScaleKDConfig(patchify=patchify),
            batch_size=setting.batch,
            device=setting.device,
            amp=setting.amp,
            workers=0,
        )
        run = Run(resolve(config))
        run.module.train()
        return run


def measure(setting: Setting) -> dict[str, Any]:
    """All measurements of a setting."""
    if setting.threads:
        torch.set_num_threads(setting.threads)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(setting, Path(folder))
        bench.write()
        steps = step_times(bench)
        return {
            "setting": {**asdict(setting), "torch": torch.__version__, "threads": torch.get_num_threads()},
            **steps,
            "peak_memory_bytes": {
                "store": in_own_process(peak_of_steps, bench, "store"),
                "live": in_own_process(peak_of_steps, bench, "live"),
                "separable": in_own_process(peak_of_steps, bench, "store", "separable"),
            },
            "loss": loss_times(bench),
        }


def step_times(bench: Bench) -> dict[str, Any]:
    """Seconds of a step with features from the store, from memory, from the live teacher; and with lean projectors."""
    run, live, separable = bench.run("store"), bench.run("live"), bench.run("store", "separable")
    batches, dataset, taps = list(run.plan.sampler), run.plan.dataset, run.method.needs.taps
    memory = MemorySource(open_store(bench.store), [row for rows in batches for row in rows], taps)
    in_memory = ViewDataset(dataset.tars, dataset.views, sources=[cast(FeatureSource, memory)])
    (source,) = dataset.sources
    turns: dict[str, Callable[[int], object]] = {
        "store": lambda i: run.step([dataset[batches[i % len(batches)]]]),
        "memory": lambda i: run.step([in_memory[batches[i % len(batches)]]]),
        "live": lambda i: live.step([live.plan.dataset[batches[i % len(batches)]]]),
        "separable": lambda i: separable.step([dataset[batches[i % len(batches)]]]),
        "reading": lambda i: source.read(batches[i % len(batches)], taps),
    }
    taken = take_turns({name: _timed(run, bench.setting) for name, run in turns.items()}, bench.setting.repeats)
    batch = dataset[batches[0]]
    teacher = cast(LiveSide, live.plan.teacher).teacher
    flops = {
        "step": count_flops(lambda: run.terms(batch).total.backward()),
        "separable": count_flops(lambda: separable.terms(batch).total.backward()),
        "teacher": count_flops(lambda: teacher(batch.pixels)),
    }
    return {
        "seconds": medians(taken),
        "store_over_memory": ratio(taken, "store", "memory"),
        "live_over_store": ratio(taken, "live", "store"),
        "live_over_store_from_flops": 1 + flops["teacher"] / flops["step"],
        "full_over_separable": ratio(taken, "store", "separable"),
        "full_over_separable_from_flops": flops["step"] / flops["separable"],
        "flops_per_sample": {name: count / bench.setting.batch for name, count in flops.items()},
        "parameters": {
            "student": _parameters(run.student),
            "projectors": _parameters(run.method),
            "separable_projectors": _parameters(separable.method),
        },
    }


def _parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def loss_times(bench: Bench) -> dict[str, Any]:
    """Forward and backward of the loss alone, ours and official-style, on the same numbers; their difference too.

    ``official_style_unfrozen`` also computes the frozen blocks' own gradients, which are not used.
    """
    whole = bench.run("store")
    loss = whole.method
    assert isinstance(loss, ScaleKD)
    student, given = loss_arguments(whole, whole.plan.dataset[next(iter(whole.plan.sampler))])

    def run(compute: Callable[[StudentOutput, DistillBatch], Terms]) -> tuple[float, list[Tensor]]:
        leaves = [leaf.detach().requires_grad_() for leaf in (*student.maps, student.logits)]
        device = whole.device.type
        dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(bench.setting.amp)
        with torch.autocast(device, dtype, enabled=dtype is not None):
            total = compute(StudentOutput((leaves[0], leaves[1]), leaves[2]), given).total
        total.backward()
        loss.zero_grad(set_to_none=True)
        loss.perception.later_blocks.zero_grad(set_to_none=True)
        return total.item(), [leaf.grad for leaf in leaves if leaf.grad is not None]

    def plain(student: StudentOutput, batch: DistillBatch) -> Terms:
        return official_style_loss(loss, student, batch)

    def plain_unfrozen(student: StudentOutput, batch: DistillBatch) -> Terms:
        loss.perception.later_blocks.requires_grad_(True)
        terms = plain(student, batch)
        loss.perception.later_blocks.requires_grad_(False)  # what is recorded by now keeps its gradients
        return terms

    kinds = {"ours": loss, "official_style": plain, "official_style_unfrozen": plain_unfrozen}
    (value, gradients), (other_value, expected) = run(loss), run(plain)
    turns = {kind: _timed(lambda _, compute=compute: run(compute), bench.setting) for kind, compute in kinds.items()}
    taken = take_turns(turns, bench.setting.repeats)
    flops = {kind: count_flops(lambda compute=compute: run(compute)) for kind, compute in kinds.items()}
    return {
        "seconds": medians(taken),
        **{f"{kind}_over_ours": ratio(taken, kind, "ours") for kind in kinds if kind != "ours"},
        **{f"{kind}_over_ours_from_flops": flops[kind] / flops["ours"] for kind in kinds if kind != "ours"},
        "value_difference": abs(value - other_value) / abs(other_value),
        "gradient_difference": max(
            ((a - b).abs().max() / b.abs().max()).item() for a, b in zip(gradients, expected, strict=True)
        ),
    }


def loss_arguments(run: Run, batch: Batch) -> tuple[StudentOutput, DistillBatch]:
    """Input of the method in a step."""
    seen: list[tuple[StudentOutput, DistillBatch]] = []
    handle = run.method.register_forward_pre_hook(lambda _, args: seen.append(args))
    run.terms(batch)
    handle.remove()
    (student, given) = seen[0]
    stage3, stage4, logits = (leaf.detach().float() for leaf in (*student.maps, student.logits))
    return StudentOutput((stage3, stage4), logits), given


def count_flops(run: Callable[[], object]) -> int:
    """Floating-point operations of a call; a multiply-add counts as two."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def peak_of_steps(
    bench: Bench, source: Literal["store", "live"], patchify: Literal["full", "separable"] = "full"
) -> int:
    """Most bytes held while building a run and making two steps: torch's on a GPU, else the process's."""
    run = bench.run(source, patchify)
    for rows in list(run.plan.sampler)[:2]:
        run.step([run.plan.dataset[rows]])
    return peak_memory(bench.setting.device)


def peak_memory(device: str) -> int:
    """Most bytes that this process has held: torch's on a GPU, else its own."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()  # getrusage's figure would be the parent's, if that is larger
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """A function's result from a fresh process, whose memory is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def _timed(run: Callable[[int], object], setting: Setting) -> Callable[[int], float]:
    return timed(run, torch.cuda.synchronize) if setting.device.startswith("cuda") else timed(run)


def _write_images(path: Path, count: int) -> None:
    rng = np.random.default_rng(0)
    with TarWriter(str(path), encoder=False, mtime=0) as writer:
        for i in range(count):
            coarse = Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8))
            file = io.BytesIO()
            coarse.resize((320, 280), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
            writer.write({"__key__": f"{i:06}", "jpg": file.getvalue(), "cls": str(i % 1000).encode()})


def main() -> None:
    setting = tyro.cli(Setting, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,))
    result = json.dumps(measure(setting), indent=2, default=str)
    print(result)
    if setting.out is not None:
        setting.out.parent.mkdir(parents=True, exist_ok=True)
        setting.out.write_text(result + "\n")


if __name__ == "__main__":
    main()
