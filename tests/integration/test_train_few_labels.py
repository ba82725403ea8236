"""A few labels and many unlabelled images teach more than the few labels alone."""

import json
from io import BytesIO
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from timm.data.config import resolve_model_data_config
from tiny_jobs import TinyTeacher, write_tar

from feature_store.teacher.model import build_model
from student_trainer.cli import main as trainer_main
from teacher_service.cli import main as teacher_main

SIDE, TRAINED, LABELLED = 32, 1000, 100
VIT: dict[str, Any] = {
    "img_size": SIDE, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 10,
    "global_pool": "avg", "class_token": False,
}  # fmt: skip
STUDENT = ("--student", "resnet10t", "--student-kwargs", '{"channels": [8, 12, 16, 24], "stem_width": 8}')
STEPS, BATCH = 100, 50


def _digits() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's scans as uint8 [n, H, W, 3], and their labels, in one shuffled order."""
    digits, labels = map(np.asarray, load_digits(return_X_y=True))
    order = np.random.default_rng(0).permutation(len(labels))[:1400]
    scans = (digits[order].reshape(-1, 8, 8) * 15.9).astype(np.uint8)
    images = [Image.fromarray(scan).resize((SIDE, SIDE), Image.Resampling.BICUBIC).convert("RGB") for scan in scans]
    return np.stack([np.asarray(image) for image in images]), labels[order]


def _sample(at: int, image: np.ndarray, label: int | None) -> dict[str, Any]:
    file = BytesIO()
    Image.fromarray(image).save(file, "PNG")
    members = {"__key__": f"d{at:04}", "png": file.getvalue()}
    return members if label is None else {**members, "cls": str(label).encode()}


def _teacher(folder: Path, images: np.ndarray, labels: np.ndarray) -> TinyTeacher:
    """A ViT that has learned the digits from all labels."""
    torch.manual_seed(0)
    model = build_model("vit_tiny_patch16_224", VIT)
    data = resolve_model_data_config(model)
    mean_C, std_C = (torch.tensor(data[name])[:, None, None] for name in ("mean", "std"))
    images_BCHW = (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - mean_C) / std_C
    targets, epochs = torch.from_numpy(labels).long(), 18
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=epochs * (len(labels) // BATCH))
    for _ in range(epochs):
        for some in torch.randperm(len(labels)).split(BATCH):
            F.cross_entropy(model(images_BCHW[some]), targets[some], label_smoothing=0.1).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    save_file({name: leaf.contiguous() for name, leaf in model.state_dict().items()}, folder / "teacher.safetensors")
    return TinyTeacher("vit_tiny_patch16_224", VIT, folder / "teacher.safetensors")


def test_few_labels_and_unlabelled_images_beat_the_few_labels_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, labels = _digits()
    samples = [
        _sample(at, image, label if at < LABELLED or at >= TRAINED else None)
        for at, (image, label) in enumerate(zip(images, labels.tolist(), strict=True))
    ]
    train, val = write_tar(tmp_path / "t.tar", samples[:TRAINED]), write_tar(tmp_path / "v.tar", samples[TRAINED:])
    teacher, store = _teacher(tmp_path, images[:TRAINED], labels[:TRAINED]), str(tmp_path / "store")
    (tmp_path / "few.txt").write_text("".join(f"{sample['__key__']}\n" for sample in samples[:LABELLED]))
    views = ("--views", "2", "--policy-options", '{"flip": 0, "scale": [0.8, 1.0]}', "--tap-codec", "f16")
    given = ("--checkpoint", str(teacher.checkpoint), "--store", store, "--workers", "0", "--labels", "optional")
    assert teacher_main(["cache", train, *teacher.arguments, *given, *views]) == 0

    def top1(name: str, seed: int, method: str, samples: int, *options: str) -> float:
        epochs = str(STEPS // (samples // BATCH))
        command = ["train", "--run", str(tmp_path / f"{name}-{seed}"), "--tars", train, "--store", store, *STUDENT,
                   "--val-tars", val, "--val-every", epochs, "--epochs", epochs, "--batch-size", str(BATCH),
                   "--seed", str(seed), "--optim.lr", "1e-2", "--crop-pct", "1", "--workers", "0", "--no-report",
                   "--no-progress", "--device", "cpu", "--method", method, *options]  # fmt: skip
        capsys.readouterr()
        assert trainer_main([*command, "--json"]) == 0
        return json.loads(capsys.readouterr().out)["last_top1"]

    both = [top1("both", seed, "kd", TRAINED, "--kd.alpha", "0.9") for seed in (0, 1)]
    alone = [top1("alone", seed, "none", LABELLED, "--keys-file", str(tmp_path / "few.txt")) for seed in (0, 1)]

    assert all(ours > theirs for ours, theirs in zip(both, alone, strict=True))
    assert mean(both) > mean(alone) + 3  # measured: 95.6 and 90.0 %
