"""A small teacher trained on real images, and a store of its features: what codecs are measured on.

Shape legend: B batch, H W pixels.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from timm.data.config import resolve_model_data_config
from torch import Tensor, nn

from feature_store import Store
from feature_store.format.manifest import Manifest, TapInfo, TarInfo
from feature_store.format.versions import software_versions
from feature_store.inputs.tar import Tar
from feature_store.teacher.bundle import bundle_sha256, bundle_state
from feature_store.teacher.model import Teacher, build_model, load_teacher, normalise
from feature_store.views import ViewPolicy, apply_view, decode_image, draw_view, pixel_crc, view_policy
from feature_store.write.unit import EncodedUnit

CLASSES, SIDE, BATCH = 100, 32, 64
TEACHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "swin": (
        "swin_tiny_patch4_window7_224",
        {
            "img_size": SIDE, "patch_size": 2, "window_size": 4, "embed_dim": 64,
            "depths": [2, 2, 4], "num_heads": [2, 4, 8], "num_classes": CLASSES,
        },
    ),
    "vit": (
        "vit_tiny_patch16_224",
        {"img_size": SIDE, "patch_size": 4, "embed_dim": 192, "depth": 6, "num_heads": 6, "num_classes": CLASSES},
    ),
}  # fmt: skip


def train_teacher(kind: str, tars: Sequence[str], folder: Path, minutes: float) -> dict[str, Any]:
    """Train for a given time with a one-cycle schedule over it, or continue where an earlier call ended.

    Saves ``<folder>/<kind>.safetensors`` and ``<kind>.json``, a report.
    """
    checkpoint, report = folder / f"{kind}.safetensors", folder / f"{kind}.json"
    torch.manual_seed(0)
    name, kwargs = TEACHERS[kind]
    model = build_model(name, kwargs)
    images = minutes_before = 0
    if checkpoint.exists():
        model.load_state_dict(load_file(checkpoint))
        before = json.loads(report.read_text())
        images, minutes_before = before["images"], before["minutes"]
    images_BHWC, labels_B = _load(tars)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    begun = time.perf_counter()
    while (spent := (time.perf_counter() - begun) / 60 / minutes) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(spent / 0.1, 1) * (0.5 + 0.5 * np.cos(np.pi * spent))
        chosen = torch.randint(len(images_BHWC), (BATCH,))
        loss = _step(model, optimizer, _crop_and_flip(images_BHWC[chosen]), labels_B[chosen])
        images += len(chosen)
        if images % (BATCH * 100) == 0:
            print(f"{kind}: {spent:4.0%}, {images} images, loss {loss:.3f}", flush=True)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, checkpoint)
    said = {"images": images, "minutes": minutes_before + minutes}
    report.write_text(json.dumps(said))
    return said


def _load(tars: Sequence[str]) -> tuple[Tensor, Tensor]:
    samples = [sample for url in tars for tar in [Tar.open(url)] for sample in map(tar.read, range(len(tar)))]
    pixels = np.stack([np.asarray(decode_image(sample.image)) for sample in samples])
    return torch.from_numpy(pixels), torch.tensor([sample.label for sample in samples])


def _crop_and_flip(images_BHWC: Tensor) -> Tensor:
    """Each image shifted by up to four pixels and half of them mirrored."""
    padded = F.pad(images_BHWC.permute(0, 3, 1, 2), (4, 4, 4, 4))
    tops, lefts, flips = torch.randint(9, (len(padded),)), torch.randint(9, (len(padded),)), torch.rand(len(padded))
    rows = tops[:, None] + torch.arange(SIDE)
    columns = lefts[:, None] + torch.where(flips[:, None] < 0.5, torch.arange(SIDE), torch.arange(SIDE).flip(0))
    picked = padded[torch.arange(len(padded))[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return picked.contiguous()  # advanced indexing puts the channels last


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, images_BHWC: Tensor, labels_B: Tensor) -> float:
    data = resolve_model_data_config(model)
    mean, std = (torch.tensor(data[name]) * 255 for name in ("mean", "std"))
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(normalise(images_BHWC, mean, std))
    loss = F.cross_entropy(logits.float(), labels_B, label_smoothing=0.1)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 5.0)
    optimizer.step()
    return loss.item()


def accuracy(teacher: Teacher, tars: Sequence[str]) -> float:
    """Top-1 on a tar set, in percent."""
    images_BHWC, labels_B = _load(tars)
    logits = torch.cat([_logits(teacher, part) for part in images_BHWC.split(500)])
    return 100 * (logits.argmax(1) == labels_B).float().mean().item()


def _logits(teacher: Teacher, pixels_BHWC: Tensor) -> Tensor:
    logits = teacher(pixels_BHWC).logits
    assert logits is not None
    return logits


def write_store(kind: str, checkpoint: Path, tars: Sequence[str], path: Path) -> Store:
    """Features of the tars' samples, one augmented view each, exact (f32), as one unit per tar."""
    name, kwargs = TEACHERS[kind]
    teacher = load_teacher(name, checkpoint=checkpoint, model_kwargs=kwargs)
    opened = [Tar.open(url) for url in tars]
    manifest = _manifest(teacher, opened, view_policy("rrc_flip", SIDE, scale=(0.35, 1.0)))
    store = Store.create(path, manifest, bundle_state(teacher.later_blocks))
    for unit, tar in enumerate(opened):
        store.write_unit(unit, 0, _unit(store, teacher, tar))
    return store


def _manifest(teacher: Teacher, tars: Sequence[Tar], policy: ViewPolicy) -> Manifest:
    return Manifest(
        teacher=teacher.info,
        split=teacher.split,
        blocks_sha256=bundle_sha256(bundle_state(teacher.later_blocks)),
        taps={tap: TapInfo(*teacher.tap_shapes[tap], "f32") for tap in teacher.tap_shapes if tap != "stage3"},
        logits_codec="f32",
        policy=policy,
        seed=0,
        num_views=1,
        tars=tuple(TarInfo(tar.name, len(tar), tar.header_sha256) for tar in tars),
        capacity=max(map(len, tars)),
        key_width=max(len(key.encode()) for tar in tars for key in tar.keys),
        software=software_versions(),
    )


def _unit(store: Store, teacher: Teacher, tar: Tar) -> EncodedUnit:
    policy = store.manifest.policy
    samples = [tar.read(position) for position in range(len(tar))]
    images = [decode_image(sample.image) for sample in samples]
    params = [draw_view(policy, 0, s.key, 0, image.size) for s, image in zip(samples, images, strict=True)]
    pixels = np.stack([apply_view(image, drawn, SIDE) for image, drawn in zip(images, params, strict=True)])
    outputs = [teacher(part) for part in torch.from_numpy(pixels).split(250)]
    values = {name: torch.cat([o.taps[name] for o in outputs]).numpy()[None] for name in teacher.tap_shapes}
    values["logits"] = torch.cat([o.logits for o in outputs if o.logits is not None]).numpy()[None]
    return EncodedUnit(
        keys=list(tar.keys),
        labels=np.array([sample.label for sample in samples]),
        quarantined={},
        params=[list(params)],
        pixel_crc=np.array([[pixel_crc(view) for view in pixels]], np.uint32),
        features={name: codec.encode(values[name]) for name, codec in store.layout.codecs.items()},
    )
