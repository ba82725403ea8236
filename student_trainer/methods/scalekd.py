"""ScaleKD (Fan et al., NeurIPS 2024).

Shape legend: B batch, C student channels, D teacher channels, H W student grid, N teacher positions,
P prefix tokens, K classes.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, nn

from feature_store.errors import InputError
from feature_store.tools.options import check_fields
from student_trainer.methods.base import (
    DistillBatch,
    Grid,
    Method,
    Needs,
    StudentOutput,
    StudentShape,
    TaskLoss,
    TeacherShape,
    Terms,
)
from student_trainer.methods.cap import CrossAttentionProjector
from student_trainer.methods.criterion import cross_entropy
from student_trainer.methods.dfm import VIEW_LOSSES, dual_view_losses
from student_trainer.methods.kd import kd_loss
from student_trainer.methods.tpp import TeacherParameterPerception

_BETA = 4 / 7  # alpha * beta = 0.08 and alpha * (1 - beta) = 0.06, the released products


@dataclass(frozen=True)
class ScaleKDConfig:
    """Weights and parts of ScaleKD.

    The original view path of a stage is weighted by alpha * beta, the alternative one by alpha * (1 - beta). A path of
    weight 0 is not built; the total stays the same (the released code computes these terms too).

    Attributes:
        alpha_stage3: alpha of the stage-3 path (TPP).
        beta_stage3: beta of the stage-3 path.
        alpha_stage4: alpha of stage 4.
        beta_stage4: beta of stage 4.
        kd_alpha: Weight alpha_kd of logit distillation, 1 - alpha_kd is left to the task; None: off.
        kd_temperature: Temperature T of logit distillation.
        softmax_scale: Factor on the projectors' attention logits on top of 1 / sqrt(head channels).
        windows: Rows and columns of attention windows in every projector.
        heads_stage3: Attention heads of the stage-3 projectors; None: inferred, see default_heads.
        heads_stage4: Attention heads of the stage-4 projectors; None: inferred.
        norm: Norm in the projectors: ``batch``, or ``layer`` as released for Swin-T.
        patchify: Convolution of the student map in the projectors: ``full`` 3x3 as released; ``separable`` 1x1 to the
            teacher's width and depthwise 3x3: fewer FLOPs and weights, another network.
        tpp: Teacher parameter perception, i.e. the stage-3 path. Off, and always off for a teacher without later
            blocks: its projectors, its two terms and with them F3 drop out, and the stage-4 projectors use learned
            queries.
        dual_view: The alternative view path; --scalekd.no-dual-view leaves the original one alone.
        checkpoint_later_blocks: Recompute the later blocks for the backward pass instead of keeping their
            activations: less memory, more time, the same numbers.
    """

    alpha_stage3: float = 0.14
    beta_stage3: float = _BETA
    alpha_stage4: float = 0.14
    beta_stage4: float = _BETA
    kd_alpha: float | None = 0.5
    kd_temperature: float = 1.0
    softmax_scale: float = 5.0
    windows: tuple[int, int] = (1, 1)
    heads_stage3: int | None = None
    heads_stage4: int | None = None
    norm: Literal["batch", "layer"] = "batch"
    patchify: Literal["full", "separable"] = "full"
    tpp: bool = True
    dual_view: bool = True
    checkpoint_later_blocks: bool = False

    def __post_init__(self) -> None:
        check_fields(self, "scalekd.")
        for stage in ("stage3", "stage4"):
            alpha, beta = getattr(self, f"alpha_{stage}"), getattr(self, f"beta_{stage}")
            if not alpha >= 0:
                raise InputError(f"alpha_{stage} is {alpha}, expected a weight of at least 0")
            if not 0 <= beta <= 1:
                raise InputError(f"beta_{stage} is {beta}, expected 0..1")
        if self.kd_alpha is not None and not 0 <= self.kd_alpha <= 1:
            raise InputError(f"kd_alpha is {self.kd_alpha}, expected 0..1, or None to switch logit distillation off")
        if not self.kd_temperature > 0:
            raise InputError(f"kd_temperature is {self.kd_temperature}, expected a number above 0")

    @classmethod
    def from_products(
        cls,
        stage3: tuple[float, float] = (0.08, 0.06),
        stage4: tuple[float, float] = (0.08, 0.06),
        **options: Any,
    ) -> "ScaleKDConfig":
        """The config of the released code's weights.

        Args:
            stage3: alpha * beta and alpha * (1 - beta) of stage 3.
            stage4: The same of stage 4.
            **options: Other fields.

        Raises:
            InputError: A value that cannot be used.
        """
        (alpha_stage3, beta_stage3), (alpha_stage4, beta_stage4) = _alpha_and_beta(stage3), _alpha_and_beta(stage4)
        return cls(alpha_stage3, beta_stage3, alpha_stage4, beta_stage4, **options)

    def weights(self) -> dict[str, float]:
        """The weight of each feature term that is switched on, by name; terms of weight 0 are left out."""
        stages = {"stage4": (self.alpha_stage4, self.beta_stage4)}
        if self.tpp:
            stages = {"stage3": (self.alpha_stage3, self.beta_stage3), **stages}
        weights = {}
        for stage, (alpha, beta) in stages.items():
            weights[f"{stage}_original"] = alpha * beta
            if self.dual_view:
                weights[f"{stage}_alternative"] = alpha * (1 - beta)
        return {name: weight for name, weight in weights.items() if weight > 0}


class ScaleKD(Method):
    """CAP, DFM, TPP and KD: total = (1 - alpha_kd) L_task + L_ori^s + L_alt^s + L_ori^st + L_alt^st + alpha_kd L_kd.

    Attributes:
        stage3: CAP3a and CAP3b by view path (``original``, ``alternative``); empty without TPP.
        stage4: CAP4a and CAP4b by view path.
    """

    Config = ScaleKDConfig
    shared_terms = frozenset({"task", "kd"})

    def __init__(
        self, config: ScaleKDConfig, student: StudentShape, teacher: TeacherShape, task: TaskLoss = cross_entropy
    ) -> None:
        """Build the projectors; see Method.

        Raises:
            InputError: Heads or windows that do not divide, or options of TPP for a teacher without later blocks.
        """
        split, notes = teacher.split, []
        if config.tpp and not split.has_later_blocks:
            _refuse_stage3_options(config, split.family)
            config = replace(config, tpp=False)
            notes.append(f"TPP is off: the teacher, a {split.family}, has no later blocks")
        super().__init__(config, student, teacher, task)
        kd_alpha = config.kd_alpha if teacher.num_classes else None
        self.weights = {"task": 1.0, **config.weights()}
        if kd_alpha is not None:
            self.weights |= {"task": 1 - kd_alpha, "kd": kd_alpha}
        elif config.kd_alpha is not None:
            notes.append("KD is off: the teacher has no classifier")
        self.notes = tuple(notes)
        views4 = [view for view in VIEW_LOSSES if f"stage4_{view}" in self.weights]
        # CAP4 takes its queries from TPP, whether or not stage 3 has a term of its own
        views3 = [view for view in VIEW_LOSSES if f"stage3_{view}" in self.weights or (config.tpp and view in views4)]
        self.stage3 = _projectors(
            config,
            views3,
            student=(student.dims[0], student.grids[0]),
            teacher=(split.input_dim, split.input_grid),
            heads=config.heads_stage3,
            learned_query=True,
        )
        if views3:
            self.perception = TeacherParameterPerception(teacher.tail(), checkpoint=config.checkpoint_later_blocks)
        self.stage4 = _projectors(
            config,
            views4,
            student=(student.dims[1], student.grids[1]),
            teacher=(split.output_dim, split.output_grid),
            heads=config.heads_stage4,
            learned_query=not config.tpp,
        )
        features = ("stage4",) if views3 or views4 else ()
        prefix = ("stage3_prefix",) if views3 and split.prefix == "cached" else ()
        self.needs = Needs(taps=(*features, *prefix), logits=kd_alpha is not None, tail=bool(views3))

    def forward(self, student: StudentOutput, batch: DistillBatch) -> Terms:
        """All terms that are switched on.

        Returns:
            ``task``, ``stage3_original``, ``stage3_alternative``, ``stage4_original``, ``stage4_alternative``, ``kd``.

        Raises:
            InputError: Shapes that do not fit, or teacher logits or prefix tokens missing.
        """
        (F3_BCHW, F4_BCHW), teacher = student.maps, batch.teacher
        raw = {"task": self.task(student.logits, batch.labels)}  # L_task
        # y_a = P(CAP3a(F3)), y_b = P(CAP3b(F3))
        y = self.perceive(F3_BCHW, teacher.taps.get("stage3_prefix"))
        # z_a = CAP4a(F4; y_a), z_b = CAP4b(F4; y_b); y is not detached, stage-4 losses reach F3 through it
        z = {view: cap(F4_BCHW, y.get(view)) for view, cap in self.stage4.items()}
        y = {view: y_BND for view, y_BND in y.items() if f"stage3_{view}" in self.weights}
        if y or z:
            F_t_BND = teacher.taps["stage4"]
            raw |= dual_view_losses("stage3", y, F_t_BND)  # L_ori^st, L_alt^st
            raw |= dual_view_losses("stage4", z, F_t_BND)  # L_ori^s, L_alt^s
        if "kd" in self.weights:
            T = self.config.kd_temperature
            raw["kd"] = kd_loss(student.logits, teacher.probabilities(T), T)  # L_kd
        return Terms(raw, self.weights)

    def perceive(self, F3_BCHW: Tensor, prefix_BPD: Tensor | None = None) -> dict[str, Tensor]:
        """TPP: final feature maps [B, N, D] that the later blocks make of F3, by view path."""
        if not self.stage3:
            return {}
        return self.perception({view: cap(F3_BCHW) for view, cap in self.stage3.items()}, prefix_BPD)


def _refuse_stage3_options(config: ScaleKDConfig, teacher: str) -> None:
    """Refuse options of the stage-3 path that differ from their defaults: TPP was then asked for.

    Raises:
        InputError: Names the option.
    """
    for name in ("alpha_stage3", "beta_stage3", "heads_stage3", "checkpoint_later_blocks"):
        if (value := getattr(config, name)) != getattr(ScaleKDConfig, name):
            raise InputError(
                f"{name} is {value}, an option of TPP, but the teacher, a {teacher}, has no later blocks; leave it "
                "out, or choose a teacher that has them, see docs/reference/teachers.md"
            )


def default_heads(teacher_dim: int) -> int:
    """Attention heads for a width: one per 64 channels, lowered to the next number that divides it."""
    return next(heads for heads in range(max(1, teacher_dim // 64), 0, -1) if teacher_dim % heads == 0)


def _projectors(
    config: ScaleKDConfig,
    views: Iterable[str],
    student: tuple[int, Grid],
    teacher: tuple[int, Grid],
    heads: int | None,
    *,
    learned_query: bool,
) -> nn.ModuleDict:
    """One projector per view path, from the student's to the teacher's (channels, grid)."""
    (student_dim, student_grid), (teacher_dim, teacher_grid) = student, teacher
    projectors = nn.ModuleDict()
    for view in views:
        projectors[view] = CrossAttentionProjector(
            student_dim,
            teacher_dim,
            query_hw=teacher_grid,
            key_hw=student_grid,
            num_heads=default_heads(teacher_dim) if heads is None else heads,
            softmax_scale=config.softmax_scale,
            windows=config.windows,
            learned_query=learned_query,
            norm=config.norm,
            patchify=config.patchify,
        )
    return projectors


def _alpha_and_beta(products: tuple[float, float]) -> tuple[float, float]:
    original, alternative = products
    if min(products) < 0:
        raise InputError(f"products of alpha and beta are {products}, expected two weights of at least 0")
    alpha = original + alternative
    return alpha, original / alpha if alpha else _BETA
