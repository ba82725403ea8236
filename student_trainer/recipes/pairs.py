"""Every released pair of teacher and student.

Heads are the released ones where they are known, and inferred from the teacher's width elsewhere. The V1d stem of the
advanced ResNet-50 is timm's ``resnet50d``. The L/14 teacher runs at 224 pixels, i.e. on a grid of 16 x 16, which is
why its Mixer and ViT students have patches of 14; the paper's 88.58 % for it are at 196 pixels.
"""

import difflib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from feature_store.errors import InputError
from student_trainer.config import TrainConfig
from student_trainer.recipes.preset import Preset, Published, Teacher
from student_trainer.recipes.schedules import A1, A2, T1, T2
from student_trainer.scalekd import ScaleKDConfig

SWIN_S = Teacher("swin_small_patch4_window7_224.ms_in1k")
SWIN_B = Teacher("swin_base_patch4_window7_224.ms_in22k_ft_in1k")
SWIN_L = Teacher("swin_large_patch4_window7_224.ms_in22k_ft_in1k")
EVA_L14 = Teacher("eva_large_patch14_196.in22k_ft_in22k_in1k", {"img_size": 224})

_SMOOTH: dict[str, Any] = {"label_smoothing": 0.1}
_WHOLE_IMAGE: dict[str, Any] = {**_SMOOTH, "crop_pct": 1.0}  # ViTs are tested on the resized image, uncropped
_SWIN_L_HEADS: dict[str, Any] = {"heads_stage3": 16, "heads_stage4": 24}

_ALL = (
    Preset(
        "trad-swin_s-resnet50",
        SWIN_S,
        "resnet50",
        T1,
        ScaleKDConfig(heads_stage3=3, heads_stage4=6, alphas_stage4=(0.08, 0.0), kd_alpha=None),
    ),
    Preset("trad-swin_b-resnet50", SWIN_B, "resnet50", T1, ScaleKDConfig(heads_stage3=8, heads_stage4=16)),
    Preset("trad-swin_l-resnet50", SWIN_L, "resnet50", T1, ScaleKDConfig(**_SWIN_L_HEADS)),
    Preset(
        "trad-swin_l-mobilenetv1",
        SWIN_L,
        "mobilenetv1_100",
        T2,
        ScaleKDConfig(**_SWIN_L_HEADS),
        _SMOOTH,
        Published(72.10, 75.15),
    ),
    Preset(
        "adv-swin_l-resnet50",
        SWIN_L,
        "resnet50d",
        A1,
        ScaleKDConfig(**_SWIN_L_HEADS),
        {"task": "bce"},
        Published(78.64, 82.03),
    ),
    Preset(
        "adv-swin_l-vit_b16",
        SWIN_L,
        "vit_base_patch16_224",
        A2,
        ScaleKDConfig(heads_stage3=8, heads_stage4=8),
        _WHOLE_IMAGE,
        Published(81.80, 85.53),
    ),
    Preset(
        "adv-swin_l-vit_s16",
        SWIN_L,
        "vit_small_patch16_224",
        A2,
        options=_WHOLE_IMAGE,
        published=Published(79.90, 83.93),
    ),
    Preset(
        "adv-swin_l-swin_t",
        SWIN_L,
        "swin_tiny_patch4_window7_224",
        A2,
        options=_SMOOTH,
        published=Published(81.18, 83.80),
    ),
    Preset(
        "adv-swin_l-convnext_t",
        SWIN_L,
        "convnext_tiny",
        A2,
        ScaleKDConfig(norm="layer"),
        _SMOOTH,
        Published(82.14, 84.16),
    ),
    Preset("adv-swin_l-mixer_s16", SWIN_L, "mixer_s16_224", A2, options=_SMOOTH, published=Published(74.02, 78.63)),
    Preset("adv-swin_l-mixer_b16", SWIN_L, "mixer_b16_224", A2, options=_SMOOTH, published=Published(76.44, 81.96)),
    Preset(
        "adv-eva_l14-resnet50",
        EVA_L14,
        "resnet50d",
        A1,
        options={"task": "bce"},
        published=Published(78.64, 82.34),
    ),
    Preset("adv-eva_l14-mixer_b14", EVA_L14, "mixer_b14_224", A2, options=_SMOOTH, published=Published(76.62, 82.89)),
    Preset(
        "adv-eva_l14-vit_b14",
        EVA_L14,
        "vit_base_patch16_224",
        A2,
        ScaleKDConfig(alphas_stage3=(0.016, 0.008), alphas_stage4=(0.016, 0.008)),
        {**_WHOLE_IMAGE, "student_kwargs": {"patch_size": 14}},
        Published(82.02, 86.43),
    ),
)
PRESETS: dict[str, Preset] = {preset.name: preset for preset in _ALL}


def preset_config(presets: Mapping[str, Preset], name: str, **options: Any) -> TrainConfig:
    """The configuration of a preset's run, from Python.

    Args:
        presets: Where to look it up, PRESETS.
        name: The preset.
        **options: Options of TrainConfig, at least run, tars and store; they rule over the preset's.

    Raises:
        InputError: No such preset, or a value that cannot be used.
    """
    if name not in presets:
        close = difflib.get_close_matches(name, presets, n=3) or presets
        raise InputError(f"there is no preset {name!r}; did you mean {', '.join(close)}?")
    return replace(presets[name].config(), **options)


def preset_rows() -> list[dict[str, str | int]]:
    """A line per preset: what it trains, what to cache for it, and what the paper reports."""
    return [
        {
            "preset": preset.name,
            "student": preset.student,
            "teacher": preset.teacher.name,
            "schedule": preset.schedule.name,
            "views": preset.schedule.policy,
            "epochs": preset.schedule.epochs,
            "batch": preset.schedule.batch_size,
            "paper": f"{preset.published.baseline:.2f} -> {preset.published.scalekd:.2f}" if preset.published else "-",
        }
        for preset in PRESETS.values()
    ]
