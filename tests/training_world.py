"""A small world to train in: image tars, a tiny teacher's checkpoint, and a store written from both."""

import atexit
import io
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image
from safetensors.torch import save_file

from feature_store.errors import ImageError
from feature_store.format.codecs.bound import bind_codecs
from feature_store.format.manifest import Manifest, TapInfo, TarInfo
from feature_store.format.versions import software_versions
from feature_store.inputs.tar import Tar
from feature_store.store import Store
from feature_store.teacher.bundle import bundle_sha256, bundle_state
from feature_store.teacher.model import Teacher, load_teacher
from feature_store.views import ViewPolicy, apply_view, decode_image, draw_view, pixel_crc, view_policy
from feature_store.write.unit import EncodedUnit
from student_trainer.config import TrainConfig
from student_trainer.teachers.config import (
    LiveOptions,
    LiveTeacher,
    NoTeacher,
    ServiceTeacher,
    StoreTeacher,
    TeacherConfig,
    TeacherOptions,
)

CLASSES = 4
SIZE = 64
VIT: tuple[str, dict[str, Any]] = ("test_vit", {"img_size": SIZE, "num_classes": CLASSES})
SWIN: tuple[str, dict[str, Any]] = (
    "swin_tiny_patch4_window7_224",
    {
        "img_size": SIZE, "num_classes": CLASSES, "embed_dim": 16, "depths": [1, 1, 1, 1],
        "num_heads": [1, 2, 2, 4], "window_size": 2,
    },
)  # fmt: skip

_SMALL = {"img_size": SIZE, "num_classes": CLASSES, "embed_dim": 64, "depth": 4, "num_heads": 2}
BEIT: tuple[str, dict[str, Any]] = ("beitv2_large_patch16_224", _SMALL)
DINOV3: tuple[str, dict[str, Any]] = ("vit_large_patch16_dinov3", _SMALL)
FAMILIES = {"vit": VIT, "swin": SWIN, "beit": BEIT, "dinov3": DINOV3}

TEACHER_OPTIONS = frozenset(field.name for field in fields(TeacherOptions))

# what no two runs share in metrics.jsonl
TIMING = {"speed"}


@dataclass(frozen=True)
class World:
    """Where everything lies."""

    tars: tuple[str, ...]
    val_tars: tuple[str, ...]
    store: Path
    teacher: tuple[str, dict[str, Any]]
    checkpoint: Path


def png(rng: np.random.Generator, label: int) -> bytes:
    """A noisy image whose colour tells its label, of a random size."""
    height, width = rng.integers(40, 90, 2)
    colour = np.array([40 + 60 * label, 200 - 50 * label, 120])
    pixels = np.clip(colour + rng.normal(0, 30, (height, width, 3)), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def samples(count: int, seed: int, prefix: str = "s") -> list[dict[str, Any]]:
    """webdataset samples."""
    rng = np.random.default_rng(seed)
    return [
        {"__key__": f"{prefix}{i:03d}", "png": png(rng, i % CLASSES), "cls": str(i % CLASSES)} for i in range(count)
    ]


def write_tar(path: Path, content: Sequence[dict[str, Any]]) -> str:
    """Write samples as they are; the same content gives the same bytes."""
    with webdataset.TarWriter(str(path), encoder=False, mtime=0) as writer:
        for sample in content:
            writer.write({k: v.encode() if k == "cls" else v for k, v in sample.items()})
    return str(path)


def make_teacher(spec: tuple[str, dict[str, Any]], checkpoint: Path, seed: int = 0) -> Teacher:
    """A teacher with random weights, saved to a checkpoint."""
    torch.manual_seed(seed)
    name, kwargs = spec
    teacher = load_teacher(name, pretrained=False, model_kwargs=kwargs)
    torch.manual_seed(seed + 1)
    with torch.no_grad():  # timm's initial weights give features that hardly depend on the image
        for parameter in teacher.model.parameters():
            if parameter.ndim > 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in teacher.model.state_dict().items()}, checkpoint)
    return load_teacher(name, checkpoint=checkpoint, model_kwargs=kwargs)


def write_store(
    path: Path,
    tars: Sequence[str],
    teacher: Teacher,
    *,
    num_views: int = 2,
    codec: str = "f16",
    policy: ViewPolicy | None = None,
    taps: Sequence[str] | None = None,
    skip: Sequence[tuple[int, int]] = (),
    seed: int = 5,
) -> Store:
    """A store of everything in the tars, except the (unit, view) pairs to skip."""
    opened = [Tar.open(url) for url in tars]
    policy = policy or view_policy("a2", SIZE)
    prefix = ("stage3_prefix",) if teacher.split.prefix == "cached" else ()
    names = ("stage4", *prefix) if taps is None else taps
    blocks = bundle_state(teacher.later_blocks)
    manifest = Manifest(
        teacher=teacher.info,
        split=teacher.split,
        blocks_sha256=bundle_sha256(blocks),
        taps={name: TapInfo(*teacher.tap_shapes[name], codec) for name in names},
        logits_codec=codec if teacher.info.num_classes else None,
        policy=policy,
        seed=seed,
        num_views=num_views,
        tars=tuple(TarInfo(tar.name, len(tar), tar.header_sha256) for tar in opened),
        capacity=max(map(len, opened)),
        key_width=max(len(key) for tar in opened for key in tar.keys),
        software=software_versions(),
    )
    store = Store.create(path, manifest, blocks)
    for unit, tar in enumerate(opened):
        for view in range(num_views):
            if (unit, view) not in skip:
                store.write_unit(unit, view, _unit(manifest, teacher, tar, view))
    return store


def _unit(manifest: Manifest, teacher: Teacher, tar: Tar, view: int) -> EncodedUnit:
    count, (height, width) = len(tar), manifest.policy.size
    pixels = np.zeros((count, height, width, 3), np.uint8)
    params, quarantined, labels = [], {}, np.full(count, -1, np.int64)
    for position, key in enumerate(tar.keys):
        try:
            sample = tar.read(position)
            labels[position] = sample.label
            image = decode_image(sample.image)
        except ImageError as error:
            quarantined[position] = str(error)
            params.append(None)
            continue
        params.append(draw_view(manifest.policy, manifest.seed, key, view, image.size))
        pixels[position] = apply_view(image, params[-1], manifest.policy.size)
    crcs = np.array([0 if params[i] is None else pixel_crc(pixels[i]) for i in range(count)], np.uint32)
    output = teacher(torch.from_numpy(pixels))
    values = output.taps if output.logits is None else {**output.taps, "logits": output.logits}
    return EncodedUnit(
        keys=list(tar.keys),
        labels=labels,
        quarantined=quarantined,
        params=[params],
        pixel_crc=crcs[None],
        features={name: codec.encode(values[name].numpy()[None]) for name, codec in bind_codecs(manifest).items()},
    )


@cache
def shared_world(family: str = "vit", codec: str = "f16") -> World:
    """The world of this test process, made once; to be read only."""
    root = Path(tempfile.mkdtemp(prefix="world-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return make_world(root, FAMILIES[family], codec=codec)


def make_world(root: Path, spec: tuple[str, dict[str, Any]] = VIT, *, codec: str = "f16", **store: Any) -> World:
    """Two training tars of 14 and 12 samples (one unreadable), one validation tar, teacher and store."""
    root.mkdir(parents=True, exist_ok=True)
    first = samples(14, seed=1, prefix="a")
    first[9]["png"] = b"not an image"
    tars = (
        write_tar(root / "train-0.tar", first),
        write_tar(root / "train-1.tar", samples(12, seed=2, prefix="b")),
    )
    val = write_tar(root / "val-0.tar", samples(10, seed=3, prefix="v"))
    checkpoint = root / "teacher" / "teacher.safetensors"
    write_store(root / "store", tars, make_teacher(spec, checkpoint), codec=codec, **store)
    return World(tars, (val,), root / "store", spec, checkpoint)


def train_config(run: Path, world: World | None = None, **changes: Any) -> TrainConfig:
    """One epoch of three batches of a small network on a world, the shared one unless given, with changes.

    Options of the teacher (store, source, teacher, views...) are given as on the command line.
    """
    world = world or shared_world()
    common: dict[str, Any] = {
        "student": "test_resnet", "tars": world.tars, "store": world.store, "epochs": 1, "batch_size": 8, "workers": 0,
        "log_every": 1, "report": False, "progress": False,
    }  # fmt: skip
    return TrainConfig(run=run, **_with_teacher({**common, **changes}))


def changed(config: TrainConfig, **changes: Any) -> TrainConfig:
    """A config with other values; options of the teacher are given as on the command line."""
    if TEACHER_OPTIONS & changes.keys():
        changes = _with_teacher({**_options_of(config.teacher), **changes})
    return replace(config, **changes)


def _with_teacher(values: dict[str, Any]) -> dict[str, Any]:
    options = {name: values.pop(name) for name in TEACHER_OPTIONS & values.keys()}
    store = options.pop("store", None)
    stores = () if store is None else tuple(map(str, store if isinstance(store, tuple) else (store,)))
    return {**values, "teacher": TeacherOptions(stores, **options).config()}


def _options_of(teacher: TeacherConfig) -> dict[str, Any]:
    match teacher:
        case StoreTeacher(store, _, replay):
            return {"store": store, **vars(replay)}
        case ServiceTeacher(url, live, token_file, replay):
            return {"source": f"live+{url}" if live else url, "token_file": token_file, **vars(replay)}
        case LiveTeacher(store=store, replay=replay, views=views):
            own = {field.name: getattr(teacher, field.name) for field in fields(LiveOptions)}
            return {"source": "live", "store": store, "teacher": LiveOptions(**own), "views": views, **vars(replay)}
        case NoTeacher(views):
            return {"views": views}
    return {"store": tuple(one.store for one in teacher), "store_weights": tuple(one.weight for one in teacher)}
