"""Questions of the study as data: which settings are compared, on which stores."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from benchmarks.study.tiers import TIERS, Tier

Settings = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class StoreSpec:
    """A store of the study.

    Attributes:
        teacher: ``strong`` or ``weak``.
        codec: Tap codec.
        all_views: With a view for every epoch; otherwise the tier's usual number.
        few_labels: Of the images of which few have labels.
    """

    teacher: str = "strong"
    codec: str = "int8"
    all_views: bool = False
    few_labels: bool = False


STORES = {
    "int8": StoreSpec(all_views=True),
    "f32": StoreSpec(codec="f32"),
    "int6": StoreSpec(codec="int6"),
    "int4": StoreSpec(codec="int4"),
    "few": StoreSpec(few_labels=True),
    "weak": StoreSpec(teacher="weak"),
}


@dataclass(frozen=True)
class Question:
    """A sweep.

    Attributes:
        name: Its file among the results.
        asks: The question as a sentence.
        student: ``cnn``, ``mixer`` or ``vit``.
        baseline: The setting that the others are compared with.
        settings: Name to what it changes in the base run; ``store`` is a name of STORES, and ``checkpoint`` of a live
            teacher one of the tier's teachers. Settings of one name are the same runs in all questions of a student.
        prediction: Heading in predictions.md.
        labels: Names of settings on the page, where they differ from those of the sweep.
    """

    name: str
    asks: str
    student: str
    baseline: str
    settings: Callable[[Tier], Settings]
    prediction: str
    labels: dict[str, str] = field(default_factory=dict)

    def label(self, setting: str) -> str:
        """Name of a setting on the page."""
        return self.labels.get(setting, setting)


def _kd(views: int) -> dict[str, Any]:
    return {"method": "kd", "store": "int8", "num_views": views}


def _scalekd(views: int, store: str = "int8", **changes: Any) -> dict[str, Any]:
    scalekd = {"scalekd": changes} if changes else {}
    return {"method": "scalekd", "store": store, "num_views": views, **scalekd}


def _none(tier: Tier) -> dict[str, Any]:
    """Plain training sees a new view in every epoch: a student without a teacher needs no store."""
    return {"method": "none", "store": "int8", "num_views": tier.epochs}


def _methods(tier: Tier) -> Settings:
    return {
        "No distillation": _none(tier),
        "KD": _kd(tier.views),
        "FD": {"method": "fd", "store": "int8", "num_views": tier.views},
        "ScaleKD": _scalekd(tier.views),
    }


def _views(tier: Tier) -> Settings:
    live = {"source": "live", "teacher": {"checkpoint": "strong"}}
    return {
        "ScaleKD, live": {**_scalekd(tier.epochs), **live},
        **{
            "ScaleKD" if count == tier.views else f"ScaleKD, {count} views": _scalekd(count)
            for count in tier.view_counts
        },
    }


def _codecs(tier: Tier) -> Settings:
    others = {f"ScaleKD, {codec}": _scalekd(tier.views, codec) for codec in ("int6", "int4")}
    return {"ScaleKD, f32": _scalekd(tier.views, "f32"), "ScaleKD": _scalekd(tier.views), **others}


def _few_labels(tier: Tier) -> Settings:
    given, alone = {"store": "few", "num_views": tier.views}, {"keys_file": "few", "epochs": "few"}
    return {
        "Few labels alone, more views": {**_none(tier), **alone},
        "Few labels alone": {"method": "none", **given, **alone},
        "Few labels, KD": {"method": "kd", **given},
        "Few labels, FD": {"method": "fd", **given},
        "Few labels, ScaleKD": {"method": "scalekd", **given},
    }


def _ablation(tier: Tier) -> Settings:
    views = tier.views
    return {
        "No distillation": _none(tier),
        "CAP": _scalekd(views, dual_view=False, tpp=False, kd_alpha=None),
        "CAP + DFM": _scalekd(views, tpp=False, kd_alpha=None),
        "CAP + DFM + TPP": _scalekd(views, kd_alpha=None),
        "ScaleKD": _scalekd(views),
    }


def _beta(tier: Tier) -> Settings:
    others = {f"ScaleKD, beta {beta}": _scalekd(tier.views, beta_stage3=beta, beta_stage4=beta) for beta in (0, 1)}
    return {"ScaleKD": _scalekd(tier.views), **others}


def _projector(tier: Tier) -> Settings:
    return {"ScaleKD": _scalekd(tier.views), "ScaleKD, separable": _scalekd(tier.views, patchify="separable")}


def _teachers(tier: Tier) -> Settings:
    weak = {"store": "weak", "num_views": tier.views}
    return {
        "No distillation": _none(tier),
        "KD": _kd(tier.views),
        "KD, weak teacher": {"method": "kd", **weak},
        "ScaleKD": _scalekd(tier.views),
        "ScaleKD, weak teacher": {"method": "scalekd", **weak},
    }


_NONE, _PLAIN = "No distillation", "ScaleKD"

QUESTIONS = (
    Question("methods-cnn", "Is none < KD < FD < ScaleKD, for a CNN?", "cnn", _NONE, _methods, "methods"),
    Question(
        "views", "How many cached views are enough?", "cnn", "ScaleKD, live", _views, "views",
        {**{f"ScaleKD, {count} views": f"{count} views" for tier in TIERS.values() for count in tier.view_counts},
         _PLAIN: "8 views", "ScaleKD, 1 views": "1 view", "ScaleKD, live": "live, fresh views"},
    ),
    Question(
        "codec", "Does the student notice the codec?", "cnn", "ScaleKD, f32", _codecs, "codec",
        {_PLAIN: "int8", **{f"ScaleKD, {codec}": codec for codec in ("f32", "int6", "int4")}},
    ),
    Question(
        "few-labels", "And with few labels and many images without?", "cnn", "Few labels alone, more views",
        _few_labels, "few-labels",
        {"Few labels alone, more views": "Few labels alone", "Few labels alone": "Few labels alone, 8 views"},
    ),
    Question("ablation", "What does each part of ScaleKD add?", "cnn", _NONE, _ablation, "ablation"),
    Question(
        "projector", "Separable projectors instead of full ones?", "cnn", _PLAIN, _projector, "projector",
        {_PLAIN: "full", "ScaleKD, separable": "separable"},
    ),
    Question("methods-mixer", "The same methods for an MLP-Mixer?", "mixer", _NONE, _methods, "students"),
    Question("methods-vit", "The same methods for a ViT?", "vit", _NONE, _methods, "students"),
    Question("teachers", "Better teacher, better student?", "cnn", _NONE, _teachers, "teachers"),
    Question(
        "beta", "How much does beta matter?", "cnn", _PLAIN, _beta, "beta",
        {_PLAIN: "beta 0.57", **{f"ScaleKD, beta {beta}": f"beta {beta}" for beta in (0, 1)}},
    ),
)  # fmt: skip
"""In the order of running, the most valuable first."""
