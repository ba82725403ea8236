"""Every released teacher-student pair.

Settings are those of the released configs, all at one commit; ``Preset.differs`` lists the exceptions. Heads of 8 and 8
are the default of the released loss. The V1d stem of the advanced ResNet-50 is timm's ``resnet50d``. The L/14 teacher
runs at 224 pixels, i.e. on a grid of 16 x 16, which is why its Mixer and ViT students have patches of 14; the paper's
88.58 % for it are at 196 pixels.
"""

import difflib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from feature_store.errors import InputError
from student_trainer.config import TrainConfig
from student_trainer.methods.scalekd import ScaleKDConfig
from student_trainer.recipes.preset import Preset, Published, Source, Teacher
from student_trainer.recipes.schedules import A1, A2, A3, T1, T2

COMMIT = "7ba1c12"
"""Parent of becc118, which deleted eleven of the seventeen configs; the six left are the same at 478a7db."""

SWIN_S = Teacher("swin_small_patch4_window7_224.ms_in1k")
SWIN_B = Teacher("swin_base_patch4_window7_224.ms_in22k_ft_in1k")
SWIN_L = Teacher("swin_large_patch4_window7_224.ms_in22k_ft_in1k")
EVA_L14 = Teacher(
    "eva_large_patch14_196.in22k_ft_in22k_in1k",
    model_kwargs={
        "img_size": 224,
        # as released, see docs/decisions/0005-eva-sees-imagenet-statistics.md
        "pretrained_cfg_overlay": {"mean": list(IMAGENET_DEFAULT_MEAN), "std": list(IMAGENET_DEFAULT_STD)},
    },
    depth=2,
    drop_prefix=True,
)

_NO_CLASS_TOKEN = {"class_token": False, "global_pool": "avg", "fc_norm": False}
_EVA_PRODUCTS: dict[str, Any] = {"stage3": (0.016, 0.008), "stage4": (0.016, 0.008)}

_PER_STEP = {"rate is updated after warm-up": "released: per epoch; here: per step; no measurable effect"}
_EVAL_MODE = {
    "teacher mode while training": "released: train mode, in which drop path acts; here: eval mode; its features are "
    "computed once and should be its own"
}
_OPENCV = dict.fromkeys(
    ("crop interpolation", "test interpolation"),
    "released: OpenCV's bilinear filter, not antialiased; here: Pillow's, antialiased; views are Pillow's to the bit",
)
_MIXER_EPS = {"norm eps of the student": "released: 1e-5; here: 1e-6; exports stay timm's own architecture"}


def _batch(readme: int, here: int, why: str) -> dict[str, str]:
    return {"batch": f"released: {readme} by the README's 32 GPUs; here: {here}, {why}; which one was run is not known"}


def _file(strategy: str, pair: str) -> Source:
    return Source(COMMIT, f"configs/distillers/{strategy}/{pair}_img_s3_s4.py")


def _traditional(pair: str) -> Source:
    return _file("traditional_traning_strategy", pair)


def _advanced(pair: str) -> Source:
    return _file("advanced_training_strategy", pair)


_ALL = (
    Preset(
        "trad-swin_s-resnet50",
        _traditional("swin-s_distill_res50"),
        SWIN_S,
        "resnet50",
        T1,
        {**_EVAL_MODE, **_OPENCV},
        ScaleKDConfig.from_products(heads_stage3=3, heads_stage4=6, stage4=(0.08, 0.0), kd_alpha=None),
    ),
    Preset(
        "trad-swin_b-resnet50",
        _traditional("swin-b_distill_res50"),
        SWIN_B,
        "resnet50",
        T1,
        {**_EVAL_MODE, **_OPENCV},
        ScaleKDConfig.from_products(heads_stage3=8, heads_stage4=16),
    ),
    Preset(
        "trad-swin_l-resnet50",
        _traditional("swin-l_distill_res50"),
        SWIN_L,
        "resnet50",
        T1,
        {**_EVAL_MODE, **_OPENCV},
        ScaleKDConfig.from_products(heads_stage3=16, heads_stage4=24),
    ),
    Preset(
        "trad-swin_l-mobilenetv1",
        _traditional("swin-l_distill_mbv1"),
        SWIN_L,
        "mobilenetv1_100",
        T2,
        {**_EVAL_MODE, **_OPENCV, **_PER_STEP},
        ScaleKDConfig.from_products(heads_stage3=16, heads_stage4=24),
        {"label_smoothing": 0.1, "student_kwargs": {"act_layer": "relu"}},
        Published(72.10, 75.15),
    ),
    Preset(
        "adv-swin_l-resnet50",
        _advanced("swin-l_distill_res50"),
        SWIN_L,
        "resnet50d",
        A1,
        {**_EVAL_MODE, **_PER_STEP},
        ScaleKDConfig.from_products(heads_stage3=16, heads_stage4=24),
        {"task": "bce"},
        Published(78.64, 82.03),
    ),
    Preset(
        "adv-swin_l-vit_b16",
        _advanced("swin-l_distill_deit-b"),
        SWIN_L,
        "vit_base_patch16_224",
        A2,
        {**_EVAL_MODE, **_PER_STEP, **_batch(512, 1024, "by a comment in the config")},
        ScaleKDConfig.from_products(heads_stage3=8, heads_stage4=8),
        {"student_kwargs": _NO_CLASS_TOKEN, "crop_pct": 1.0},
        Published(81.80, 85.53),
    ),
    Preset(
        "adv-swin_l-vit_s16",
        _advanced("swin-l_distill_deit-s"),
        SWIN_L,
        "vit_small_patch16_224",
        A2,
        {**_EVAL_MODE, **_PER_STEP},
        ScaleKDConfig.from_products(heads_stage3=8, heads_stage4=8),
        {"student_kwargs": _NO_CLASS_TOKEN},
        Published(79.90, 83.93),
    ),
    Preset(
        "adv-swin_l-swin_t",
        _advanced("swin-l_distill_swin-t"),
        SWIN_L,
        "swin_tiny_patch4_window7_224",
        A2,
        {**_EVAL_MODE, **_PER_STEP, **_batch(512, 1024, "which the config labels its rate for")},
        ScaleKDConfig.from_products(heads_stage3=24, heads_stage4=48, softmax_scale=1.0, norm="layer"),
        {"student_kwargs": {"drop_path_rate": 0.05}, "optim": replace(A2.optim, decay_positions=True)},
        Published(81.18, 83.80),
    ),
    Preset(
        "adv-swin_l-convnext_t",
        _advanced("swin-l_distill_convnext-t"),
        SWIN_L,
        "convnext_tiny",
        A2,
        {**_EVAL_MODE, **_PER_STEP},
        ScaleKDConfig.from_products(heads_stage3=8, heads_stage4=16, softmax_scale=1.0),
        {
            "student_kwargs": {"drop_path_rate": 0.1, "head_norm_first": True},
            "optim": replace(A2.optim, clip_grad=None, decay_positions=True),
        },
        Published(82.14, 84.16),
    ),
    Preset(
        "adv-swin_l-mixer_s16",
        _advanced("swin-l_distill_mlp_s"),
        SWIN_L,
        "mixer_s16_224",
        A3,
        {**_EVAL_MODE, **_PER_STEP, **_MIXER_EPS, **_batch(768, 1536, "by a comment in the config")},
        ScaleKDConfig.from_products(heads_stage3=8, heads_stage4=8),
        {"ema_decay": 1 - 1e-4, "ema_eval": False},
        Published(74.02, 78.63),
    ),
    Preset(
        "adv-swin_l-mixer_b16",
        _advanced("swin-l_distill_mlp_b"),
        SWIN_L,
        "mixer_b16_224",
        A3,
        {
            **_EVAL_MODE,
            **_PER_STEP,
            **_MIXER_EPS,
            "sync BN of the student": "released: on; here: off; the student has no BatchNorm",
        },
        ScaleKDConfig.from_products(heads_stage3=8, heads_stage4=8),
        {"student_kwargs": {"drop_path_rate": 0.1}},
        Published(76.44, 81.96),
    ),
    Preset(
        "adv-eva_l14-resnet50",
        _advanced("eva-l_distill_res50"),
        EVA_L14,
        "resnet50d",
        A1,
        _PER_STEP,
        ScaleKDConfig.from_products(heads_stage3=8, heads_stage4=8, softmax_scale=0.2, **_EVA_PRODUCTS),
        {"task": "bce"},
        Published(78.64, 82.34),
    ),
    Preset(
        "adv-eva_l14-mixer_b14",
        _advanced("eva-l_distill_mixer_b"),
        EVA_L14,
        "mixer_b14_224",
        A3,
        {**_PER_STEP, **_batch(768, 1536, "by a comment in the config")},
        ScaleKDConfig.from_products(heads_stage3=8, heads_stage4=8, softmax_scale=1.0, **_EVA_PRODUCTS),
        {"student_kwargs": {"drop_path_rate": 0.1}, "ema_decay": 1 - 1e-4, "label_smoothing": 0.1},
        Published(76.62, 82.89),
    ),
    Preset(
        "adv-eva_l14-vit_b14",
        _advanced("eva-l_distill_vit_b"),
        EVA_L14,
        "vit_base_patch14_two_norms_224",
        A2,
        _PER_STEP,
        ScaleKDConfig.from_products(heads_stage3=8, heads_stage4=8, softmax_scale=1.0, **_EVA_PRODUCTS),
        {"ema_decay": None},
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


def preset_rows() -> list[dict[str, Any]]:
    """A line per preset: what it trains, what to cache for it, and what the paper reports."""
    return [
        {
            "preset": preset.name,
            "student": preset.student,
            "teacher": preset.teacher.name,
            "size": preset.teacher.input_size[0],
            "model_kwargs": preset.teacher.model_kwargs,
            "depth": preset.teacher.depth,
            "drop_prefix": preset.teacher.drop_prefix,
            "schedule": preset.schedule.name,
            "views": preset.schedule.policy,
            "epochs": preset.schedule.epochs,
            "batch": preset.schedule.batch_size,
            "paper": f"{preset.published.baseline:.2f} -> {preset.published.scalekd:.2f}" if preset.published else "-",
            "source": f"{preset.source.file} at {preset.source.commit}",
        }
        for preset in PRESETS.values()
    ]
