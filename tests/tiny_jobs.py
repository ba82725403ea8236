"""Tiny inputs of the cache job: image tars, teachers with checkpoints, and views of a store's files."""

import io
import json
from collections.abc import Iterable
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import numpy as np
import timm
import torch
import webdataset
from PIL import Image
from safetensors.torch import save_file

from teacher_service.config import CacheConfig

Sample = dict[str, Any]
T = TypeVar("T")

_OPTIONS = {"name": "teacher", "count": "views", "out": "views_out", "address": "ray_address"}

TINY_SWIN = {
    "img_size": 32, "patch_size": 2, "window_size": 2, "embed_dim": 8,
    "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "num_classes": 4,
}  # fmt: skip
TINY_VIT = {"img_size": 32, "depth": 4, "num_classes": 4}


@dataclass(frozen=True)
class TinyTeacher:
    """A timm model small enough for tests, and a checkpoint of it."""

    name: str
    model_kwargs: dict[str, Any]
    checkpoint: Path

    @property
    def arguments(self) -> list[str]:
        """Options that name the model on the command line, plan's and cache's."""
        return ["--teacher", self.name, "--model-kwargs", json.dumps(self.model_kwargs)]


def make_teacher(folder: Path, name: str, model_kwargs: dict[str, Any], seed: int = 0) -> TinyTeacher:
    """A teacher with random weights and a checkpoint of them."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        model = timm.create_model(name, pretrained=False, **model_kwargs)
    checkpoint = folder / f"{name}-{seed}.safetensors"
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, checkpoint)
    return TinyTeacher(name, model_kwargs, checkpoint)


def encode_image(pixels: np.ndarray, image_format: str = "PNG", mode: str | None = None) -> bytes:
    """An image file of pixels, converted to a Pillow mode if one is given."""
    image = Image.fromarray(pixels)
    buffer = io.BytesIO()
    (image.convert(mode) if mode else image).save(buffer, image_format)
    return buffer.getvalue()


def noise(height: int = 40, width: int = 48, seed: int = 0) -> np.ndarray:
    """Pixels of coloured noise, uint8 [height, width, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def noise_samples(prefix: str, count: int, seed: int = 0) -> list[Sample]:
    """Samples of noise images with keys ``<prefix>000``... and labels 0, 1, 2, 3, 0..."""
    return [
        {"__key__": f"{prefix}{i:03}", "png": encode_image(noise(seed=1000 * seed + i)), "cls": str(i % 4).encode()}
        for i in range(count)
    ]


def write_tar(path: Path, samples: Iterable[Sample]) -> str:
    """Write a webdataset tar with fixed bytes; returns its path."""
    with webdataset.TarWriter(str(path), encoder=False, mtime=0) as writer:
        for sample in samples:
            writer.write(sample)
    return str(path)


def write_tars(folder: Path, *counts: int) -> tuple[str, ...]:
    """One tar of noise images per count."""
    return tuple(
        write_tar(folder / f"images-{unit:03}.tar", noise_samples(f"u{unit:03}-", count, unit))
        for unit, count in enumerate(counts)
    )


def make_config(kind: type[T], **options: Any) -> T:
    """A configuration from options by their names on the command line, with underscores."""
    made = _made(kind, options)
    assert not options, f"{kind.__name__} has no options {', '.join(options)}"
    return made


def _made(kind: type[T], options: dict[str, Any]) -> T:
    values = {}
    for name, hint in get_type_hints(kind).items():
        if is_dataclass(hint):
            values[name] = _made(hint, options)
        elif (option := _OPTIONS.get(name, name)) in options:
            values[name] = options.pop(option)
    return kind(**values)


def with_options(config: T, **options: Any) -> T:
    """The configuration with some options changed."""
    changed = _changed(config, options)
    assert not options, f"{type(config).__name__} has no options {', '.join(options)}"
    return changed


def _changed(config: Any, options: dict[str, Any]) -> Any:
    values = {each.name: getattr(config, each.name) for each in fields(config)}
    parts = {name: _changed(value, options) for name, value in values.items() if is_dataclass(value)}
    own = {name: options.pop(option) for name in values if (option := _OPTIONS.get(name, name)) in options
           and name not in parts}  # fmt: skip
    return replace(config, **parts, **own)


def cache_config(tars: Iterable[str], teacher: TinyTeacher, store: Path, **options: Any) -> CacheConfig:
    """A cache job without worker processes, unless told."""
    return make_config(
        CacheConfig,
        tars=tuple(tars),
        teacher=teacher.name,
        model_kwargs=teacher.model_kwargs,
        checkpoint=teacher.checkpoint,
        store=store,
        **{"workers": 0, "batch_size": 4, "tap_codec": "f16", **options},
    )


def store_files(store: Path) -> dict[str, bytes]:
    """Contents of all files of a store, by relative path."""
    return {file.relative_to(store).as_posix(): file.read_bytes() for file in store.rglob("*") if file.is_file()}
