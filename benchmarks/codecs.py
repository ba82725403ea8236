"""Measures every codec on features of a teacher trained here: bytes, speed, and errors of each ScaleKD loss term.

    python -m benchmarks.codecs --tars 'cifar100-train-{000..009}.tar.gz' --val-tars cifar100-val-000.tar.gz \
        --teacher swin --minutes 9 --work /tmp/codecs --out benchmarks/results/codecs.json

A second call with another teacher adds to the same file; one with a trained teacher in ``--work`` and ``--minutes 0``
measures again.

Shape legend: B batch, C channels, H W grid, N tokens, D teacher channels, K classes.
"""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import timm
import torch
import tyro
from torch import Tensor, nn

from benchmarks.trained_teacher import CLASSES, SIDE, TEACHERS, accuracy, train_teacher, write_store
from feature_store import Store
from feature_store.format.codecs.bound import BoundCodec
from feature_store.format.codecs.registry import CODECS, get_codec
from feature_store.inputs.tar import Tar, expand_tars
from feature_store.teacher.model import load_teacher
from feature_store.teacher.torch_codecs import TorchDecoder
from feature_store.tools.bench import bench_codecs
from feature_store.views import apply_view, decode_image
from student_trainer.methods import (
    DistillBatch,
    ScaleKD,
    ScaleKDConfig,
    StudentOutput,
    StudentShape,
    TeacherOutput,
    TeacherShape,
)

BATCH = 64
MEASURED_BATCHES = 3
LOGITS_CODECS = ("f16", "bf16", "top20", "top10", "top5")


@dataclass(frozen=True)
class Config:
    """Options of the benchmark.

    Attributes:
        tars: Training images; the teacher is trained on all, the store holds the first.
        val_tars: Images its accuracy is measured on.
        work: Folder for the teacher and the store.
        teacher: Which teacher.
        minutes: Minutes to train it, after what it was trained before; 0 for no more.
        steps: Steps the student is trained before the second measurement.
        rows: Rows of the measurement without a student.
        out: JSON file; this teacher's part is replaced.
    """

    tars: tuple[str, ...]
    val_tars: tuple[str, ...]
    work: Path
    teacher: Literal["swin", "vit"] = "swin"
    minutes: float = 9.0
    steps: int = 150
    rows: int = 1024
    out: Path = field(default=Path("benchmarks/results/codecs.json"))


def main(config: Config) -> None:
    tars = expand_tars(config.tars)
    config.work.mkdir(parents=True, exist_ok=True)
    if config.minutes:
        train_teacher(config.teacher, tars, config.work, config.minutes)
    checkpoint, path = config.work / f"{config.teacher}.safetensors", config.work / f"{config.teacher}.zarr"
    shutil.rmtree(path, ignore_errors=True)
    store = write_store(config.teacher, checkpoint, tars[:1], path)
    name, kwargs = TEACHERS[config.teacher]
    teacher = load_teacher(name, checkpoint=checkpoint, model_kwargs=kwargs)
    result = {
        "teacher": {
            "name": name,
            "model_kwargs": kwargs,
            "top1": accuracy(teacher, expand_tars(config.val_tars)),
            **json.loads((config.work / f"{config.teacher}.json").read_text()),
        },
        "features": bench_codecs(store, rows=config.rows),
        "scalekd": scalekd_errors(store, tars[0], config.steps),
        "machine": {"cpus": os.cpu_count(), "torch": torch.__version__, "numpy": np.__version__},
    }
    result["features"]["store"] = path.name
    found = json.loads(config.out.read_text()) if config.out.exists() else {}
    config.out.parent.mkdir(parents=True, exist_ok=True)
    config.out.write_text(json.dumps({**found, config.teacher: _rounded(result)}, indent=1) + "\n")


def _rounded(value: Any) -> Any:
    """Three digits of every number: what repeats."""
    if isinstance(value, dict):
        return {name: _rounded(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_rounded(entry) for entry in value]
    return float(f"{value:.3g}") if isinstance(value, float) else value


class Student(nn.Module):
    """A small ViT that gives the maps of its last two stages [B, C, H, W] and its logits."""

    dims, grids = (96, 96), ((8, 8), (8, 8))

    def __init__(self) -> None:
        super().__init__()
        self.vit: Any = timm.create_model(
            "vit_tiny_patch16_224", img_size=SIDE, patch_size=4, embed_dim=96, depth=4, num_heads=3, num_classes=CLASSES
        )

    def forward(self, images_BCHW: Tensor) -> tuple[Sequence[Tensor], Tensor]:
        """Maps and logits."""
        last, maps = self.vit.forward_intermediates(images_BCHW, indices=[2, 3], norm=True)
        return maps, self.vit.forward_head(last)


@dataclass(frozen=True)
class Batch:
    """Views [B, C, H, W] with labels [B], taps [B, N, D] and logits [B, K] of their rows."""

    images: Tensor
    labels: Tensor
    taps: dict[str, np.ndarray]
    logits: np.ndarray


class Measurement:
    """A student and its ScaleKD loss, stepped with exact features and measured with decoded ones."""

    def __init__(self, store: Store, tar: str) -> None:
        torch.manual_seed(0)
        self.student = Student()
        later_blocks = store.later_blocks()
        self.loss = ScaleKD(
            ScaleKDConfig(),
            StudentShape(Student.dims, Student.grids, CLASSES),
            TeacherShape(later_blocks.info, CLASSES, lambda: later_blocks),
        )
        self.parameters = [*self.student.parameters(), *self.loss.parameters()]
        self.batches = _batches(store, tar)

    def train(self, steps: int) -> None:
        """Take steps with exact features."""
        optimizer = torch.optim.AdamW(self.parameters, lr=1e-3)
        for _ in range(steps):
            batch = next(self.batches)
            terms = self.terms(batch, torch.from_numpy(batch.taps["stage4"]), torch.from_numpy(batch.logits))
            optimizer.zero_grad()
            terms["total"].backward()
            optimizer.step()

    def terms(self, batch: Batch, teacher_BND: Tensor, logits_BK: Tensor) -> dict[str, Tensor]:
        """ScaleKD's weighted terms."""
        (F3_BCHW, F4_BCHW), student_BK = self.student(batch.images)
        taps = {name: torch.from_numpy(tap) for name, tap in batch.taps.items()} | {"stage4": teacher_BND}
        given = DistillBatch(batch.images, batch.labels, TeacherOutput(taps, logits_BK))
        terms = self.loss(StudentOutput((F3_BCHW, F4_BCHW), student_BK), given)
        return {**terms.weighted, "total": terms.total}

    def gradients(self, batch: Batch, teacher_BND: Tensor, logits_BK: Tensor) -> dict[str, tuple[float, Tensor]]:
        """Loss and its gradient with respect to every weight of student and projectors, by term."""
        terms = self.terms(batch, teacher_BND, logits_BK)
        return {name: (term.item(), self._gradient(term)) for name, term in terms.items() if name != "task"}

    def _gradient(self, term: Tensor) -> Tensor:
        found = torch.autograd.grad(term, self.parameters, retain_graph=True, materialize_grads=True)
        return torch.cat([gradient.flatten() for gradient in found]).double()


def scalekd_errors(store: Store, tar: str, steps: int) -> dict[str, Any]:
    """Errors of ScaleKD's terms and their gradients by codec, for a new student and for one after some steps."""
    measurement = Measurement(store, tar)
    sample = store.source().read(store.source().unit_rows(0, 0)[:256])
    taps = [BoundCodec.learn("stage4", get_codec(name), sample.taps["stage4"]) for name in CODECS]
    logits = [BoundCodec("logits", get_codec(name), (CLASSES,)) for name in LOGITS_CODECS]
    report = {"start": _errors(measurement, taps, logits)}
    measurement.train(steps)
    report[f"after {steps} steps"] = _errors(measurement, taps, logits)
    return report


def _errors(measurement: Measurement, taps: Sequence[BoundCodec], logits: Sequence[BoundCodec]) -> dict[str, Any]:
    batches = [next(measurement.batches) for _ in range(MEASURED_BATCHES)]
    exact = [_gradients(measurement, batch, None) for batch in batches]
    report: dict[str, Any] = {"terms": {name: float(np.mean([e[name][0] for e in exact])) for name in exact[0]}}
    for kind, codecs in (("taps", taps), ("logits", logits)):
        report[kind] = {}
        for codec in codecs:
            got = [_gradients(measurement, batch, codec) for batch in batches]
            report[kind][codec.codec.name] = {
                name: _term_error([e[name] for e in exact], [g[name] for g in got])
                for name in exact[0]
                if (name == "kd") == (kind == "logits") or name == "total"
            }
    return report


def _gradients(measurement: Measurement, batch: Batch, codec: BoundCodec | None) -> dict[str, tuple[float, Tensor]]:
    values = {"stage4": batch.taps["stage4"], "logits": batch.logits}
    teacher = {name: torch.from_numpy(array) for name, array in values.items()}
    if codec is not None:
        teacher[codec.name] = TorchDecoder(codec)(codec.encode(values[codec.name]))
    return measurement.gradients(batch, teacher["stage4"], teacher["logits"])


def _term_error(exact: Sequence[tuple[float, Tensor]], got: Sequence[tuple[float, Tensor]]) -> dict[str, float]:
    """Worst relative error over the batches."""
    pairs = list(zip(exact, got, strict=True))
    return {
        "loss": max(abs(g[0] - e[0]) / abs(e[0]) for e, g in pairs),
        "gradient": max(((g[1] - e[1]).norm() / e[1].norm()).item() for e, g in pairs),
    }


def _batches(store: Store, url: str) -> Iterator[Batch]:
    """Random batches of the first unit with their replayed views."""
    tar, params, labels, source = Tar.open(url), store.view_params(0, 0), store.labels(0), store.source()
    rows, rng = source.unit_rows(0, 0), np.random.default_rng(0)
    while True:
        chosen = rows[rng.permutation(len(rows))[:BATCH]]
        pixels = []
        for position in chosen[:, 1].tolist():
            drawn = params[position]
            assert drawn is not None
            pixels.append(apply_view(decode_image(tar.read(position).image), drawn, SIDE))
        images_BCHW = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1
        batch = source.read(chosen)
        assert batch.logits is not None
        picked = torch.from_numpy(labels[chosen[:, 1]])
        yield Batch(images_BCHW, picked, batch.taps, batch.logits)


if __name__ == "__main__":
    main(tyro.cli(Config))
