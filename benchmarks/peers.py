"""A training step beside other programs for the same work: ScaleKD's released code, timm, torchdistill, LightlyTrain.

    python -m benchmarks.peers --released ScaleKD --out benchmarks/results/peers.json
    python -m benchmarks.peers --teacher vit_small_patch14_dinov2 \
        --teacher-kwargs '{"img_size": 224, "num_classes": 1000}' --out benchmarks/results/peers_dino.json

Each contender is a process of its own. All get the same JPEGs, decoded and cut by the same code, and make whole steps:
images, teacher or its features, student, loss, backward pass, AdamW. They take turns, so that a busy machine disturbs
all alike; only their ratios mean anything.

The released code (``--released``, a checkout of its repository) needs mmengine 0.10.7, mmcv-lite 2.0.1, model-index and
opencv-python-headless; LightlyTrain was tried as lightly-train 0.18.0. Contenders that cannot be imported, or are not
made for the networks that are asked for, are named in the result.
"""

import json
import multiprocessing
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

import timm
import torch
import tyro
from timm.task import FeatureDistillationTask, LogitDistillationTask
from torch import Tensor, nn

from benchmarks import peer_lightly, peer_released
from benchmarks.step import Bench, peak_memory
from benchmarks.step import Setting as StepSetting
from benchmarks.turns import ratio, take_turns, timed
from feature_store.store import open_store
from feature_store.teacher.model import build_model

Step = Callable[[int], object]
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Setting(StepSetting):
    """Options of the benchmark.

    Attributes:
        released: A checkout of ScaleKD's released code; None leaves it out.
    """

    released: Path | None = None


def ours(method: str, source: str) -> Callable[[Bench, Setting], Step]:
    """Steps of this project."""

    def make(bench: Bench, _: Setting) -> Step:
        run = bench.run(source, method=method)  # pyright: ignore[reportArgumentType]
        batches, dataset = list(run.plan.sampler), run.plan.dataset
        return lambda i: run.step([dataset[batches[i % len(batches)]]])

    return make


def peer(make_loss: Callable[[Setting], tuple[Loss, nn.Module]]) -> Callable[[Bench, Setting], Step]:
    """Steps of other code: a loss of normalised images float32 [B, 3, H, W] and labels [B], and what it trains."""

    def make(bench: Bench, setting: Setting) -> Step:
        plan = bench.run("store", method="none").plan
        batches, dataset, normalise = list(plan.sampler), plan.dataset, plan.preprocessing.normaliser(plan.device)
        loss, module = make_loss(setting)
        optimizer = torch.optim.AdamW([leaf for leaf in module.parameters() if leaf.requires_grad], lr=1e-3)

        def step(i: int) -> None:
            batch = dataset[batches[i % len(batches)]]
            optimizer.zero_grad(set_to_none=True)
            loss(normalise(batch.pixels.to(plan.device)), batch.labels.to(plan.device)).backward()
            optimizer.step()

        return step

    return make


def timm_task(kind: type[LogitDistillationTask | FeatureDistillationTask]) -> Callable[[Setting], Any]:
    """The steps that timm's ``train.py`` makes with ``--kd-distill-type logit`` or ``feature``."""

    def make(setting: Setting) -> tuple[Loss, nn.Module]:
        task = kind(_student(setting), _teacher(setting), criterion=nn.CrossEntropyLoss(), verbose=False)
        task.train()
        trained = task.trainable_module
        assert isinstance(trained, nn.Module)
        return lambda images, labels: task(images, labels)["loss"], trained

    return make


def torchdistill_kd(setting: Setting) -> tuple[Loss, nn.Module]:
    """A loop of torchdistill's forward hooks and its KD loss."""
    from torchdistill.core.forward_hook import ForwardHookManager  # pyright: ignore[reportMissingImports]
    from torchdistill.losses.mid_level import KDLoss  # pyright: ignore[reportMissingImports]

    teacher, student, device = _teacher(setting), _student(setting), torch.device(setting.device)
    hooks = {name: ForwardHookManager(device) for name in ("teacher", "student")}
    hooks["teacher"].add_hook(teacher, "head", requires_input=False, requires_output=True)
    hooks["student"].add_hook(student, "fc", requires_input=False, requires_output=True)
    criterion = KDLoss("fc", "output", "head", "output", temperature=1.0, alpha=0.5)

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            teacher(images)
        student(images)
        return criterion(hooks["student"].pop_io_dict(), hooks["teacher"].pop_io_dict(), labels)

    return loss, student


def released(setting: Setting) -> tuple[Loss, nn.Module]:
    """The released distiller with all parts of ScaleKD and KD."""
    if setting.released is None:
        raise ImportError("no --released")
    _expect_networks(setting, peer_released.TEACHER, peer_released.STUDENT)
    distiller, loss = peer_released.released_distiller(setting.released)
    return loss, distiller


def lightly(setting: Setting) -> tuple[Loss, nn.Module]:
    """LightlyTrain's method ``distillationv2``: maps of the teacher's last two blocks, of mixed images."""
    _expect_networks(setting, peer_lightly.TEACHER, peer_lightly.STUDENT)
    method, loss = peer_lightly.lightly_distiller(setting.batch)
    return loss, method


def _expect_networks(setting: Setting, teacher: str, student: str) -> None:
    if (setting.teacher, setting.student) != (teacher, student):
        raise ImportError(f"it is run with {teacher} and {student} only")


CONTENDERS: dict[str, Callable[[Bench, Setting], Step]] = {
    "ScaleKD, store": ours("scalekd", "store"),
    "ScaleKD, live": ours("scalekd", "live"),
    "ScaleKD, released code": peer(released),
    "KD, store": ours("kd", "store"),
    "KD, live": ours("kd", "live"),
    "KD, timm": peer(timm_task(LogitDistillationTask)),
    "KD, torchdistill": peer(torchdistill_kd),
    "FD, store": ours("fd", "store"),
    "FD, timm (pooled features)": peer(timm_task(FeatureDistillationTask)),
    "FD, LightlyTrain": peer(lightly),
}


def measure(setting: Setting) -> dict[str, Any]:
    """Images a second, memory and ratios of all contenders that can be imported."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(setting, Path(folder))
        bench.write()
        seconds, memory, missing = _measure_processes(bench, setting)
        row_bytes = open_store(bench.store).source().row_bytes()
    results = {
        name: {
            "images_per_second": round(setting.batch / statistics.median(taken), 2),
            "seconds_over_store": round(ratio(seconds, name, f"{name.split(',')[0]}, store"), 3),
            "peak_memory_bytes": memory[name],
            "store_bytes_per_view": row_bytes if name.endswith("store") else 0,
        }
        for name, taken in seconds.items()
    }
    return {
        "setting": {**asdict(setting), "released": setting.released is not None, "torch": torch.__version__},
        "timm": timm.__version__,
        "contenders": results,
        "left_out": missing,
    }


def _measure_processes(bench: Bench, setting: Setting) -> tuple[dict[str, list[float]], dict[str, int], dict[str, str]]:
    """Seconds of each contender's steps and its peak memory; and why the others are left out."""
    pools: dict[str, Pool] = {}
    missing: dict[str, str] = {}
    try:
        for name in CONTENDERS:
            pool = multiprocessing.get_context("spawn").Pool(1)
            try:
                pool.apply(_build, (name, bench, setting))
            except ImportError as error:
                missing[name] = str(error)
                pool.terminate()
            else:
                pools[name] = pool
        turns = {name: lambda i, pool=pool: pool.apply(_timed_step, (i,)) for name, pool in pools.items()}
        seconds = take_turns(turns, setting.repeats)
        return seconds, {name: pool.apply(peak_memory, (setting.device,)) for name, pool in pools.items()}, missing
    finally:
        for pool in pools.values():
            pool.terminate()


_step: Step  # of this process's contender


def _build(name: str, bench: Bench, setting: Setting) -> None:
    global _step
    if setting.threads:
        torch.set_num_threads(setting.threads)
    _step = CONTENDERS[name](bench, setting)


def _timed_step(i: int) -> float:
    return timed(_step, torch.cuda.synchronize)(i) if torch.cuda.is_initialized() else timed(_step)(i)


def _teacher(setting: Setting) -> nn.Module:
    return build_model(setting.teacher, setting.teacher_kwargs).to(setting.device).eval()


def _student(setting: Setting) -> nn.Module:
    return timm.create_model(setting.student).to(setting.device).train()


def main() -> None:
    setting = tyro.cli(Setting, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,))
    if setting.amp != "off":
        sys.exit(f"--amp is {setting.amp}, expected off: all programs are compared in float32")
    result = json.dumps(measure(setting), indent=1, default=str)
    print(result)
    if setting.out is not None:
        setting.out.write_text(result + "\n")


if __name__ == "__main__":
    main()
