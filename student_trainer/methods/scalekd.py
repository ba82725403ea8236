"""ScaleKD's total loss, behind one call signature with the baselines it is compared to.

Shape legend: B batch, C student channels, D teacher channels, H W student grid, N teacher positions,
P prefix tokens, K classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from feature_store.errors import InputError
from feature_store.teacher import LaterBlocks
from student_trainer.methods.cap import CrossAttentionProjector, Grid
from student_trainer.methods.dfm import VIEW_LOSSES, dual_view_losses, original_view_loss
from student_trainer.methods.precision import at_least_float32
from student_trainer.methods.tpp import TeacherParameterPerception

Maps = Sequence[Tensor]  # (F3 [B, C3, H3, W3], F4 [B, C4, H4, W4])


@dataclass(frozen=True)
class ScaleKDConfig:
    """Weights and parts of the ScaleKD loss.

    Attributes:
        alphas_stage3: Weights of the original and the alternative view path of stage 3 (TPP).
        alphas_stage4: The same for stage 4. The first one is also the FD baseline's weight.
        kd_alpha: Weight alpha_kd of logit distillation, 1 - alpha_kd is left to the task; None: off.
        kd_temperature: Temperature T of logit distillation.
        softmax_scale: Factor on the projectors' attention logits on top of 1 / sqrt(head channels).
        windows: Rows and columns of attention windows in every projector.
        heads_stage3: Attention heads of the stage-3 projectors; None: inferred, see default_heads.
        heads_stage4: Attention heads of the stage-4 projectors; None: inferred.
        norm: Norm in the projectors: ``batch``, or ``layer`` as released for Swin-T.
        tpp: Teacher parameter perception, i.e. the stage-3 path. Off: its projectors, its two terms and with
            them F3 drop out, and the stage-4 projectors use learned queries.
        dual_view: The alternative view path. Off: only the original one is left.
        checkpoint_later_blocks: Run the later blocks again for the backward pass instead of keeping what happens in
            them: less memory, more time, the same numbers.
    """

    alphas_stage3: tuple[float, float] = (0.08, 0.06)
    alphas_stage4: tuple[float, float] = (0.08, 0.06)
    kd_alpha: float | None = 0.5
    kd_temperature: float = 1.0
    softmax_scale: float = 5.0
    windows: tuple[int, int] = (1, 1)
    heads_stage3: int | None = None
    heads_stage4: int | None = None
    norm: Literal["batch", "layer"] = "batch"
    tpp: bool = True
    dual_view: bool = True
    checkpoint_later_blocks: bool = False

    def __post_init__(self) -> None:
        for name in ("alphas_stage3", "alphas_stage4"):
            if min(getattr(self, name)) < 0:
                raise InputError(f"{name} is {getattr(self, name)}, expected two weights of at least 0")
        if self.kd_alpha is not None and not 0 <= self.kd_alpha <= 1:
            raise InputError(f"kd_alpha is {self.kd_alpha}, expected 0..1, or None to switch logit distillation off")
        if self.kd_temperature <= 0:
            raise InputError(f"kd_temperature is {self.kd_temperature}, expected a number above 0")


class ScaleKDLoss(nn.Module):
    """CAP, DFM, TPP and KD as one loss: everything of ScaleKD that is not the student.

    Only the projectors learn and are kept in checkpoints; all of it is dropped on export.

    Attributes:
        stage3: CAP3a and CAP3b by view path (``original``, ``alternative``); only with TPP.
        stage4: CAP4a and CAP4b by view path.
    """

    def __init__(
        self,
        config: ScaleKDConfig,
        student_dims: tuple[int, int],
        student_grids: tuple[Grid, Grid],
        later_blocks: LaterBlocks,
    ) -> None:
        """Build the projectors.

        Args:
            config: Weights and parts.
            student_dims: Channels (C3, C4) of the student's last two stages.
            student_grids: Their grids ((H3, W3), (H4, W4)).
            later_blocks: P, the teacher between its stage-3 output and F^t.

        Raises:
            InputError: Heads or windows that do not divide.
        """
        super().__init__()
        self.config = config
        self._idle_stage3: set[str] = set()
        split = later_blocks.info
        if config.tpp:
            self.stage3 = _projectors(
                config,
                student=(student_dims[0], student_grids[0]),
                teacher=(split.input_dim, split.input_grid),
                heads=config.heads_stage3,
                learned_query=True,
            )
            self.perception = TeacherParameterPerception(later_blocks, checkpoint=config.checkpoint_later_blocks)
        self.stage4 = _projectors(
            config,
            student=(student_dims[1], student_grids[1]),
            teacher=(split.output_dim, split.output_grid),
            heads=config.heads_stage4,
            learned_query=not config.tpp,
        )

    def forward(
        self,
        student_maps: Maps,
        student_logits_BK: Tensor,
        teacher_BND: Tensor,
        teacher_logits_BK: Tensor | None,
        task_loss: Tensor,
        prefix_BPD: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """All weighted terms, and their sum.

        Args:
            student_maps: F3 and F4, the student's last two stages.
            student_logits_BK: Student logits s.
            teacher_BND: F^t, the teacher's final feature map as tokens.
            teacher_logits_BK: Teacher logits z; needed when logit distillation is on.
            task_loss: L_task, unweighted.
            prefix_BPD: The teacher's prefix tokens at the split, if its later blocks need any.

        Returns:
            Scalars by name: ``task``, ``stage3_original``, ``stage3_alternative``, ``stage4_original``,
            ``stage4_alternative``, ``kd`` as far as they are switched on, and ``total``.

        Raises:
            InputError: Shapes that do not fit, or teacher logits or prefix tokens missing.
        """
        config, (F3_BCHW, F4_BCHW) = self.config, student_maps
        # y_a = P(CAP3a(F3)), y_b = P(CAP3b(F3))
        y = self.perceive(F3_BCHW, prefix_BPD) if config.tpp else {}
        # z_a = CAP4a(F4; y_a), z_b = CAP4b(F4; y_b); y is not detached, stage-4 losses reach F3 through it
        z = {view: cap(F4_BCHW, y.get(view)) for view, cap in self.stage4.items()}
        return _with_total(
            _task_term(task_loss, config.kd_alpha)  # (1 - alpha_kd) L_task
            | dual_view_losses("stage3", self._counted(y), teacher_BND, config.alphas_stage3)  # L_ori^st + L_alt^st
            | dual_view_losses("stage4", z, teacher_BND, config.alphas_stage4)  # L_ori^s + L_alt^s
            | _kd_term(student_logits_BK, teacher_logits_BK, config)  # L_kd
        )

    def without_idle_paths(self) -> "ScaleKDLoss":
        """Compute nothing for terms of weight 0, and drop projectors that reach no other; the total stays the same.

        The released code computes these terms too.
        """
        for view, weight in zip(VIEW_LOSSES, self.config.alphas_stage4, strict=True):
            if weight == 0 and view in self.stage4:
                del self.stage4[view]
        for view, weight in zip(VIEW_LOSSES, self.config.alphas_stage3, strict=True):
            if weight == 0 and self.config.tpp:
                self._idle_stage3.add(view)
                if view in self.stage3 and view not in self.stage4:  # nobody asks for its y either
                    del self.stage3[view]
        return self

    def _counted(self, y: dict[str, Tensor]) -> dict[str, Tensor]:
        return {view: y_BND for view, y_BND in y.items() if view not in self._idle_stage3}

    def perceive(self, F3_BCHW: Tensor, prefix_BPD: Tensor | None = None) -> dict[str, Tensor]:
        """TPP: final feature maps [B, N, D] that the later blocks make of F3, by view path."""
        if not self.stage3:
            return {}
        return self.perception({view: cap(F3_BCHW) for view, cap in self.stage3.items()}, prefix_BPD)


class FDLoss(nn.Module):
    """FD baseline: the student's last map, brought to the teacher's width and grid, against F^t.

    A 1x1 convolution stands in where the widths differ. Where the grids differ, which the released baseline
    cannot do, the student's map is first resized to the teacher's (bilinear, antialiased).
    """

    def __init__(self, student_dim: int, teacher_dim: int, alpha: float, teacher_grid: Grid | None = None) -> None:
        """Build the baseline.

        Args:
            student_dim: Channels of the student's last map.
            teacher_dim: Channels of F^t.
            alpha: Weight of the loss.
            teacher_grid: (H, W) of F^t; None where the student's grid is the same.
        """
        super().__init__()
        self.alpha, self.teacher_grid = alpha, teacher_grid
        self.align = nn.Identity() if student_dim == teacher_dim else nn.Conv2d(student_dim, teacher_dim, 1)

    def forward(
        self,
        student_maps: Maps,
        student_logits_BK: Tensor,
        teacher_BND: Tensor,
        teacher_logits_BK: Tensor | None,
        task_loss: Tensor,
        prefix_BPD: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Terms ``task``, ``fd`` and ``total``; see ScaleKDLoss.forward."""
        p_BND = self.project(student_maps[-1])
        return _with_total(
            _task_term(task_loss, None)  # L_task
            | {"fd": original_view_loss(p_BND, teacher_BND, self.alpha)}  # L_fd
        )

    def project(self, student_BCHW: Tensor) -> Tensor:
        """The student's map as tokens [B, N, D] on the teacher's grid."""
        if self.teacher_grid is not None and student_BCHW.shape[2:] != tuple(self.teacher_grid):
            (student_BCHW,) = at_least_float32(student_BCHW)  # antialiasing on the CPU knows no bfloat16
            student_BCHW = F.interpolate(student_BCHW, size=self.teacher_grid, mode="bilinear", antialias=True)
        return self.align(student_BCHW).flatten(2).transpose(1, 2)


class KDLoss(nn.Module):
    """KD baseline: logit distillation alone."""

    def __init__(self, config: ScaleKDConfig) -> None:
        """Build the baseline.

        Args:
            config: Its kd_alpha and kd_temperature count.

        Raises:
            InputError: kd_alpha is None.
        """
        super().__init__()
        if config.kd_alpha is None:
            raise InputError("kd_alpha is None, but logit distillation is all the kd method does; set it to 0..1")
        self.config = config

    def forward(
        self,
        student_maps: Maps,
        student_logits_BK: Tensor,
        teacher_BND: Tensor,
        teacher_logits_BK: Tensor | None,
        task_loss: Tensor,
        prefix_BPD: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Terms ``task``, ``kd`` and ``total``; see ScaleKDLoss.forward."""
        return _with_total(
            _task_term(task_loss, self.config.kd_alpha)  # (1 - alpha_kd) L_task
            | _kd_term(student_logits_BK, teacher_logits_BK, self.config)  # L_kd
        )


class TaskLoss(nn.Module):
    """No distillation: the student's own task."""

    def forward(
        self,
        student_maps: Maps,
        student_logits_BK: Tensor,
        teacher_BND: Tensor | None,
        teacher_logits_BK: Tensor | None,
        task_loss: Tensor,
        prefix_BPD: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Terms ``task`` and ``total``, equal; see ScaleKDLoss.forward."""
        return _with_total(_task_term(task_loss, None))


def kd_loss(student_BK: Tensor, teacher_BK: Tensor, temperature: float, alpha: float) -> Tensor:
    """L_kd = -alpha * T^2 * mean_n sum_k softmax(z / T)_k log softmax(s / T)_k.

    The cross entropy with the teacher; the KL form differs by the teacher's entropy, a constant here.

    Args:
        student_BK: Student logits s.
        teacher_BK: Teacher logits z.
        temperature: T.
        alpha: Weight alpha_kd.

    Returns:
        The loss, a scalar in float32 or wider.

    Raises:
        InputError: The two have different shapes.
    """
    if student_BK.shape != teacher_BK.shape:
        raise InputError(
            f"student logits have shape {tuple(student_BK.shape)}, the teacher's {tuple(teacher_BK.shape)}; "
            "give the student the teacher's number of classes or switch logit distillation off"
        )
    student_BK, teacher_BK = at_least_float32(student_BK, teacher_BK)
    # log_softmax stays finite at any logit gap; the released log(softmax) does not from about 100 on
    log_student_BK = F.log_softmax(student_BK / temperature, dim=1)
    cross_entropy_B = -(F.softmax(teacher_BK / temperature, dim=1) * log_student_BK).sum(dim=1)
    return alpha * temperature**2 * cross_entropy_B.mean()


def default_heads(teacher_dim: int) -> int:
    """Attention heads for a width: one per 64 channels, lowered to the next number that divides it."""
    return next(heads for heads in range(max(1, teacher_dim // 64), 0, -1) if teacher_dim % heads == 0)


METHODS = ("scalekd", "fd", "kd", "none")


def build_loss(
    method: str,
    config: ScaleKDConfig,
    student_dims: tuple[int, int],
    student_grids: tuple[Grid, Grid],
    later_blocks: LaterBlocks,
) -> nn.Module:
    """The loss of a method by name; all of them take ScaleKDLoss.forward's arguments.

    Args:
        method: One of METHODS.
        config: ScaleKD's settings; the baselines read the fields that concern them.
        student_dims: Channels (C3, C4) of the student's last two stages.
        student_grids: Their grids ((H3, W3), (H4, W4)).
        later_blocks: P; only its split is read by the baselines.

    Raises:
        InputError: Unknown method, or a config it cannot work with.
    """
    split = later_blocks.info
    match method:
        case "scalekd":
            return ScaleKDLoss(config, student_dims, student_grids, later_blocks).without_idle_paths()
        case "fd":
            return FDLoss(student_dims[1], split.output_dim, config.alphas_stage4[0], split.output_grid)
        case "kd":
            return KDLoss(config)
        case "none":
            return TaskLoss()
    raise InputError(f"unknown method {method!r}, expected one of {', '.join(METHODS)}")


def _projectors(
    config: ScaleKDConfig,
    student: tuple[int, Grid],
    teacher: tuple[int, Grid],
    heads: int | None,
    *,
    learned_query: bool,
) -> nn.ModuleDict:
    """One projector per view path, from the student's to the teacher's (channels, grid)."""
    (student_dim, student_grid), (teacher_dim, teacher_grid) = student, teacher
    projectors = nn.ModuleDict()
    for view in VIEW_LOSSES if config.dual_view else ("original",):
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
        )
    return projectors


def _task_term(task_loss: Tensor, kd_alpha: float | None) -> dict[str, Tensor]:
    return {"task": task_loss if kd_alpha is None else (1 - kd_alpha) * task_loss}


def _kd_term(student_BK: Tensor, teacher_BK: Tensor | None, config: ScaleKDConfig) -> dict[str, Tensor]:
    if config.kd_alpha is None:
        return {}
    if teacher_BK is None:
        raise InputError(
            "logit distillation is on, but the teacher features carry no logits; "
            "use a teacher with a classifier or set kd_alpha to None"
        )
    return {"kd": kd_loss(student_BK, teacher_BK, config.kd_temperature, config.kd_alpha)}


def _with_total(terms: dict[str, Tensor]) -> dict[str, Tensor]:
    """The terms and their plain sum."""
    return {**terms, "total": sum(terms.values(), start=next(iter(terms.values())).new_zeros(()))}
