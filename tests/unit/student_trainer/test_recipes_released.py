"""Every preset against the released configs, field by field; ours are read off what a run would be made of."""

import json
import re
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from distilled_presets import distilled
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers.drop import DropPath
from timm.models import create_model
from torch import Tensor, nn
from training_world import shared_world

from feature_store.teacher import LaterBlocks, split_teacher
from feature_store.teacher.model import build_model, teacher_info
from feature_store.views import view_policy
from student_trainer.config import TrainConfig
from student_trainer.distilled import DistilledStudent
from student_trainer.engine.distributed import Group
from student_trainer.engine.optimizer import make_optimizer, make_scheduler
from student_trainer.methods import Method
from student_trainer.plan import resolve
from student_trainer.recipes import PRESETS, preset_config
from student_trainer.teachers.config import StoreTeacher
from student_trainer.teachers.expectations import ExpectConfig
from student_trainer.train import Run

RELEASED = json.loads((Path(__file__).parent / "data" / "released_settings.json").read_text())["presets"]
STEPS = 10  # per epoch


@cache
def teacher(preset: str) -> tuple[Any, LaterBlocks]:
    """TeacherInfo and later blocks of a preset's teacher, without weights."""
    asked = PRESETS[preset].teacher
    with torch.device("meta"):
        model = build_model(asked.name, asked.model_kwargs)
    _, later = split_teacher(model, asked.depth, drop_prefix=asked.drop_prefix)
    return teacher_info(model, asked.name, asked.model_kwargs, "float32", ""), later


def our_settings(preset: str) -> dict[str, Any]:
    config = preset_config(PRESETS, preset, run=Path("r"), tars=("a.tar",), teacher=StoreTeacher("s"))
    info, later = teacher(preset)
    with torch.device("meta"):
        module = distilled(config, 1000, info.input_size, later, group=Group(size=2), device=torch.device("cuda"))
    return {
        **of_teacher(preset),
        **of_student(preset, module),
        **of_loss(config, module),
        **of_optimizer(config, module),
        **of_views(config),
        "sync BN of the student": synchronised(module.student),
        "sync BN of the projectors": synchronised(module.method),
    }


def of_teacher(preset: str) -> dict[str, Any]:
    info, later = teacher(preset)
    statistics = (info.mean, info.std) == (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    split, blocks = later.info, 24
    if split.family == "swin":
        merges, norm = later.blocks[0].downsample is not None, isinstance(later.norm, nn.LayerNorm)
        between = f"{'patch merging after stage 3, ' * merges}stage 4 ({split.depth} blocks){', norm3' * norm}"
        final = "norm3 of stage 4" if norm else "stage 4"
    else:
        norm = "no norm" if isinstance(later.norm, nn.Identity) else "norm"
        token = "no class token" if split.prefix == "dropped" else "class token"
        between = f"blocks {blocks - split.depth} and {blocks - 1} of 0..{blocks - 1}, {token}, {norm}"
        final = f"block {blocks - 1}, patch tokens, {'before any norm' if norm == 'no norm' else 'normed'}"
    rates = [module.drop_prob for module in later.modules() if isinstance(module, DropPath)]
    eval_mode = not any(module.training for module in later.train().modules())
    return {
        "teacher model and weights": PRESETS[preset].teacher.name,
        "teacher image size": info.input_size[0],
        "teacher normalisation": "ImageNet mean and std" if statistics else "others",
        "student normalisation": "ImageNet mean and std" if statistics else "others",  # always the teacher's
        "teacher mode while training": "eval mode" if rates and eval_mode else "no drop path",
        "later blocks (TPP)": between,
        "F^t": final,
    }


def of_student(preset: str, module: DistilledStudent) -> dict[str, Any]:
    student, model = module.student, module.student.model
    stage3, stage4 = taps(module)
    norms = {module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)}
    rates = [module.drop_prob for module in model.modules() if isinstance(module, DropPath)]
    settings = {
        "student architecture": RELEASED[preset]["settings"]["student architecture"]
        if shapes(model) == released_shapes(preset) else student.name,
        "student drop path": max(rates, default=0.0),
        "student stage 3": stage3,
        "student stage 4": stage4,
    }  # fmt: skip
    match type(model).__name__:
        case "VisionTransformer" | "TwoNormViT":
            settings |= {"class token": model.num_prefix_tokens > 0, "classifier input": vit_classifier_input(model)}
        case "ConvNeXt":
            first = isinstance(model.norm_pre, nn.Module) and not isinstance(model.norm_pre, nn.Identity)
            settings |= {"classifier input": "norm on the map, then mean" if first else "mean, then norm"}
        case "MlpMixer":
            (settings["norm eps of the student"],) = norms
        case "EfficientNet":
            settings["activation"] = type(model.bn1.act).__name__
            settings["student drop path"] = settings["student drop path"] or None  # the released network knows none
    return settings


def products(loss: Method, stage: str) -> list[float]:
    return [round(loss.weights.get(f"{stage}_{view}", 0.0), 15) for view in ("original", "alternative")]


def of_loss(config: TrainConfig, module: DistilledStudent) -> dict[str, Any]:
    loss = module.method
    caps = [*loss.stage3.values(), *loss.stage4.values()]
    (heads3,), (heads4,) = ({cap.num_heads for cap in stage.values()} for stage in (loss.stage3, loss.stage4))
    (scale,) = {round(cap.scale * (cap.teacher_dim // cap.num_heads) ** 0.5, 9) for cap in caps}
    (windows,), (norm,) = {cap.windows for cap in caps}, {type(cap.key_proj[1]) for cap in caps}
    return {
        "heads of stage 3": heads3,
        "heads of stage 4": heads4,
        "softmax scale": scale,
        "windows": list(windows),
        "alphas of stage 3": products(loss, "stage3"),
        "alphas of stage 4": products(loss, "stage4"),
        "projector norm": "batch" if norm is nn.BatchNorm2d or norm is nn.SyncBatchNorm else "layer",
        "TPP and both views": loss.config.tpp and loss.config.dual_view and len(loss.stage3) == 2,
        "stage-4 queries": "stage 3's output" if all(c.query is None for c in loss.stage4.values()) else "learned",
        "logit distillation alpha": loss.config.kd_alpha,
        "logit distillation temperature": loss.config.kd_temperature,
        "task loss": config.task,
        "label smoothing": config.label_smoothing,
        "mixed precision": config.amp != "off",
    }


def of_optimizer(config: TrainConfig, module: DistilledStudent) -> dict[str, Any]:
    optimizer, positions = make_optimizer(config.optim.at(config.batch_size), module), module.projector_positions()
    world = shared_world()
    plain = replace(
        config, student="test_resnet", method="none", teacher=StoreTeacher(world.store), tars=world.tars, workers=0,
        batch_size=8, student_kwargs={}, sync_bn=False, expect=ExpectConfig(),
    )  # fmt: skip
    run = Run(resolve(plain))
    decays = {id(leaf): group["weight_decay"] > 0 for group in optimizer.param_groups for leaf in group["params"]}
    named = dict(module.named_parameters())
    (on_norms,) = {decays[id(leaf)] for leaf in named.values() if leaf.ndim == 1}
    (on_positions,) = {decays[id(named[name])] for name in positions}
    names = {torch.optim.SGD: "momentum", torch.optim.AdamW: "adamw"}
    settings = {
        "optimizer": names.get(type(optimizer), type(optimizer).__name__.lower()),
        "weight decay": max(group["weight_decay"] for group in optimizer.param_groups),
        "decay on norms and biases": on_norms,
        "decay on the projectors' positions": on_positions,
        "betas": list(optimizer.defaults["betas"]) if "betas" in optimizer.defaults else None,
        "gradient clipping": config.optim.clip_grad,
        "batch": config.batch_size,
        "epochs": config.epochs,
        "EMA decay": config.ema_decay,
        "evaluated weights": "averaged" if run.ema and run.eval_model is run.ema.module else "raw",
    }
    return settings | of_schedule(config, optimizer)


def of_schedule(config: TrainConfig, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    scheduler, rates = make_scheduler(config, optimizer, STEPS), []
    for step in range(config.epochs * STEPS + 1):
        scheduler.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    rising = [after > before for before, after in pairwise(rates)]
    warmup = rising.index(False)
    settings = {"learning rate": max(rates), "schedule": config.optim.sched, "warm-up epochs": warmup / STEPS}
    if warmup:
        settings["warm-up starts at"] = rates[0]
    falls = [step + 1 for step in range(warmup, len(rates) - 1) if rates[step + 1] < rates[step]]
    if config.optim.sched == "step":
        (factor,) = {round(rates[step] / rates[step - 1], 9) for step in falls}
        return settings | {"steps": [[step / STEPS for step in falls], factor]}
    updated = "per step" if len(falls) > 2 * config.epochs else "per epoch"
    return settings | {"rate at the end": rates[-1], "rate is updated after warm-up": updated}


def of_views(config: TrainConfig) -> dict[str, Any]:
    policy = view_policy(config.expect.policy or "center", 224)
    filters = {"bicubic": "bicubic (Pillow)", "bilinear": "bilinear (Pillow, antialiased)"}
    drawn = [policy.level, policy.max_level, policy.level_std] if policy.num_ops else None
    return {
        "crop interpolation": filters[policy.interpolation],
        "crop area and aspect": [list(policy.scale), [round(end, 4) for end in policy.ratio]],
        "flip": policy.flip,
        "RandAugment [level, of, std]": drawn,
        "erasing": policy.erase,
        "Mixup and CutMix": None,  # there is no such option
        "test crop fraction": config.crop_pct,
        "test interpolation": filters[policy.interpolation],
    }


def synchronised(module: nn.Module) -> bool:
    return any(isinstance(part, nn.SyncBatchNorm) for part in module.modules())


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(leaf.shape) for name, leaf in model.named_parameters()}


def released_shapes(preset: str) -> dict[str, tuple[int, ...]]:
    """Of the released student, as the table gives it in timm's words."""
    student = RELEASED[preset]["student"]
    with torch.device("meta"):
        model = create_model(student["name"], num_classes=1000, **student["kwargs"])
    second = {"fc_norm.weight": (768,), "fc_norm.bias": (768,)} if student["second_norm"] else {}
    return shapes(model) | second


def vit_classifier_input(model: Any) -> str:
    if model.global_pool == "token":
        return "normed class token"
    first, second = (not isinstance(norm, nn.Identity) for norm in (model.norm, model.fc_norm))
    return f"mean of the {'normed ' * first}tokens{', normed again' * second}"


def taps(module: DistilledStudent) -> tuple[str, str]:
    """Which module's output each of the student's maps is, in the table's words."""
    student, made = module.student, {}

    def remember(name: str):
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.grad_fn is not None:
                made[output.grad_fn] = name  # outer modules come last: layer3, not layer3.5.act3

        return hook

    hooks = [
        module.register_forward_hook(remember(name))
        for name, module in student.model.named_modules()
        if name and not isinstance(module, nn.Identity)
    ]
    maps = student(torch.empty(1, 3, 224, 224, device="meta")).maps
    for hook in hooks:
        hook.remove()
    stage3, stage4 = (in_words(origin(tap, made), student.model) for tap in maps)
    return stage3, stage4


def origin(tensor: Tensor, made: dict[Any, str]) -> str:
    """The module that made a tensor, changes of layout left out."""
    node = tensor.grad_fn
    while node not in made:
        assert re.match(r"(Permute|Transpose|View|UnsafeView|Clone|Slice|Squeeze|Reshape)", node.name()), node.name()
        node = node.next_functions[0][0]
    return made[node]


def in_words(module: str, model: Any) -> str:
    if module == "norm":
        return f"block {len(model.blocks) - 1} after the final norm" if hasattr(model, "blocks") else (
            "stage 4 after the final norm"
        )  # fmt: skip
    for pattern, words in ((r"norm_pre", "stage 4 after norm3"), (r"(?:layers|stages)\.2", "stage 3 raw")):
        if re.fullmatch(pattern, module):
            return words
    numbered = re.fullmatch(r"blocks\.(\d+)", module)
    return f"block {numbered[1]} raw" if numbered and type(model).__name__ != "EfficientNet" else module


def same(released: Any, ours: Any) -> bool:
    if isinstance(released, list) and isinstance(ours, list):
        return len(released) == len(ours) and all(map(same, released, ours))
    if released is None or isinstance(released, bool | str):
        return ours is released or (isinstance(released, str) and ours == released)
    return ours == pytest.approx(released, rel=1e-6, abs=0)


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_has_the_released_settings_but_for_those_it_says_differ(preset):
    released, ours = RELEASED[preset]["settings"], our_settings(preset)
    assert ours.keys() == released.keys()
    differing = {name: (released[name], ours[name]) for name in released if not same(released[name], ours[name])}
    assert differing.keys() == PRESETS[preset].differs.keys(), differing


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_names_its_config_and_the_papers_accuracies(preset):
    released, ours = RELEASED[preset], PRESETS[preset]
    assert (ours.source.commit, ours.source.file) == (released["source"]["commit"], released["source"]["file"])
    published = ours.published and [ours.published.baseline, ours.published.scalekd]
    assert published == released["published"]


def test_presets_are_those_of_the_released_table_when_listed():
    assert sorted(PRESETS) == sorted(RELEASED)
    assert sum(len(preset["settings"]) for preset in RELEASED.values()) == 718


def test_preset_gives_both_values_when_a_setting_differs():
    for preset in PRESETS.values():
        for name, sentence in preset.differs.items():
            assert re.match(r"released: .+; here: .+; .+", sentence), (preset.name, name)
