"""The total loss against the released code's complete losses, its parts, and the baselines."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from golden_files import (
    DTYPES,
    arguments,
    assert_recorded,
    golden,
    images,
    inputs,
    names,
    swin,
    under,
)
from torch import Tensor

from feature_store.errors import InputError
from feature_store.teacher import split_teacher
from student_trainer.methods.cap import CrossAttentionProjector
from student_trainer.methods.criterion import binary_cross_entropy, cross_entropy
from student_trainer.methods.dfm import original_view_loss
from student_trainer.methods.scalekd import (
    METHODS,
    FDLoss,
    KDLoss,
    ScaleKDConfig,
    ScaleKDLoss,
    TaskLoss,
    build_loss,
    default_heads,
    kd_loss,
)
from student_trainer.official import load_projector, projector_names

CASES = [name for name in names("e2e_") if "distill_class" in arguments(name)]
KD_CASES = {case["case"]: case for case in arguments("kd")["cases"]}
FD_CASES = {case["case"]: case for case in arguments("fd")["cases"]}
TERMS = {
    "ori_loss": "task",
    "loss_s3": "stage3_original",
    "loss_s3_alt": "stage3_alternative",
    "loss_s4": "stage4_original",
    "loss_s4_alt": "stage4_alternative",
    "loss_kd": "kd",
    "total": "total",
}
PATHS = {"spat": "original", "freq": "alternative"}
SMOOTHING = {"ce": 0.0, "ls": 0.1}


@dataclass
class Run:
    """One evaluation of the complete loss, its results under the recording's names."""

    final_map: Tensor
    teacher_logits: Tensor
    student_logits: Tensor
    task_loss: Tensor
    terms: dict[str, Tensor]
    leaves: dict[str, Tensor]
    gradients: dict[str, Tensor | None]
    buffers: dict[str, Tensor]
    middle: dict[str, Tensor]


def official_loss(case: str, later) -> ScaleKDLoss:
    args = arguments(case)
    s3, s4, kd = args["s3"], args["s4"], args["kd"]
    config = ScaleKDConfig(
        alphas_stage3=tuple(s3["alpha"]),
        alphas_stage4=tuple(s4["alpha"]),
        kd_alpha=kd["alpha"] if kd else None,
        kd_temperature=kd["temp"] if kd else 1.0,
        softmax_scale=s3["softmax_scale"][0],
        heads_stage3=s3["num_heads"],
        heads_stage4=s4["num_heads"],
    )
    loss = ScaleKDLoss(
        config,
        (s3["student_dims"], s4["student_dims"]),
        (tuple(s3["pos_hw"]), tuple(s4["pos_hw"])),
        later,
    )
    for prefix, projector in projectors(loss).items():
        load_projector(projector, under(golden(case), prefix))
    return loss


def projectors(loss: ScaleKDLoss) -> dict[str, CrossAttentionProjector]:
    """By the recording's prefix."""
    stages = {"s3": loss.stage3, "s4": loss.stage4}
    views = ("original", "alternative")
    return {f"cap/{stage}/projector_{i}/": stages[stage][view] for stage in stages for i, view in enumerate(views)}


def task_loss(head: str, logits: Tensor, targets: Tensor) -> Tensor:
    return binary_cross_entropy(logits, targets) if head == "bce" else cross_entropy(logits, targets, SMOOTHING[head])


@cache
def run(case: str, dtype: torch.dtype) -> Run:
    args, arrays = arguments(case), inputs(case, dtype)
    teacher_name = args["teacher"].removesuffix(".npz")
    teacher = swin(teacher_name, dtype)
    with torch.no_grad():
        final_BHWD = teacher.forward_features(images(teacher_name, dtype))
        teacher_logits = teacher.head.fc(final_BHWD.mean(dim=(1, 2)))
    loss = official_loss(case, split_teacher(teacher)[1]).to(dtype).train()
    middle = record_middle(loss)
    leaves = {name: arrays[name].requires_grad_() for name in ("s3", "s4", "student_fc.weight", "student_fc.bias")}
    student_logits = F.linear(leaves["s4"].mean(dim=(2, 3)), leaves["student_fc.weight"], leaves["student_fc.bias"])
    task = task_loss(args["head"], student_logits, arrays[args["labels"]])
    terms = loss((leaves["s3"], leaves["s4"]), student_logits, final_BHWD.flatten(1, 2), teacher_logits, task)
    terms["total"].backward(retain_graph=True)
    return Run(
        final_BHWD.permute(0, 3, 1, 2), teacher_logits, student_logits, task, terms, leaves,
        *gradients_and_buffers(loss, case, leaves), middle,
    )  # fmt: skip


def record_middle(loss: ScaleKDLoss) -> dict[str, Tensor]:
    """Intermediate tokens under the recording's names, filled while the loss runs."""
    middle: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda module, args, out: middle.update({name: out})

    for stage, caps in (("s3", loss.stage3), ("s4", loss.stage4)):
        for path, view in PATHS.items():
            caps[view].register_forward_hook(keep(f"{stage}_{path}_cap"))
    loss.perception.register_forward_hook(
        lambda module, args, out: middle.update({f"s3_{path}_tpp": out[view] for path, view in PATHS.items()})
    )
    return middle


def gradients_and_buffers(
    loss: ScaleKDLoss, case: str, leaves: dict[str, Tensor]
) -> tuple[dict[str, Tensor | None], dict[str, Tensor]]:
    gradients: dict[str, Tensor | None] = {name: leaf.grad for name, leaf in leaves.items()}
    buffers: dict[str, Tensor] = {}
    for prefix, projector in projectors(loss).items():
        parameters = dict(projector.named_parameters())
        for name, ours in projector_names(projector).items():
            if ours in parameters:
                gradients[prefix + name] = parameters[ours].grad.reshape(golden(case)[prefix + name].shape)
            else:
                buffers[prefix + name] = projector.state_dict()[ours]
    return gradients, buffers


@pytest.mark.golden
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_teacher_gives_released_targets_when_released_swin_is_loaded(case, dtype):
    names = {"final_map": "teacher/F_t_f64", "teacher_logits": "teacher/logits_f64",
             "student_logits": "student/logits_f64"}  # fmt: skip
    assert_recorded(
        lambda dtype: {ours: getattr(run(case, dtype), ours) for ours in names},
        dtype,
        {ours: golden(case)[released] for ours, released in names.items()},
    )


@pytest.mark.golden
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_loss_gives_released_terms_when_released_weights_are_loaded(case, dtype):
    released = under(golden(case), "loss/")
    expected = {ours: released[f"{name}_f64"] for name, ours in TERMS.items() if f"{name}_f64" in released}
    expected["unscaled task"] = released["ori_unscaled_f64"]
    if arguments(case)["head"] == "ls":  # the released label smoothing builds its target in float32
        expected |= {name: expected[name].float() for name in ("task", "total", "unscaled task")}
    assert_recorded(
        lambda dtype: {**run(case, dtype).terms, "unscaled task": run(case, dtype).task_loss}, dtype, expected
    )


@pytest.mark.golden
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_loss_gives_released_gradients_when_total_is_propagated(case, dtype):
    expected = under(golden(case), "grad_f64/")
    if arguments(case)["head"] == "ls":
        expected = {name: leaf.float() for name, leaf in expected.items()}
    used = {name: leaf for name, leaf in expected.items() if not unused(case, name)}
    assert {"s3", "s4", "student_fc.weight", "student_fc.bias"} <= used.keys()
    assert_recorded(lambda dtype: run(case, dtype).gradients, dtype, used)


def unused(case: str, name: str) -> bool:
    """A learned query of the released stage-4 projectors, which gets no gradient and which ours do not hold."""
    return name.removeprefix("cap/") in arguments(case)["params_without_grad"]


@pytest.mark.golden
@pytest.mark.parametrize("case", [case for case in CASES if under(golden(case), "grad_term_f64/")])
def test_each_term_gives_released_gradient_when_propagated_alone(case):
    got, expected = run(case, torch.float64), under(golden(case), "grad_term_f64/")
    gradients = {}
    for name in expected:
        term, student_map = name.split("/")
        (gradients[name],) = torch.autograd.grad(got.terms[TERMS[term]], got.leaves[student_map], retain_graph=True)
    assert_recorded(lambda _: gradients, torch.float64, expected)


@pytest.mark.golden
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_loss_updates_batchnorm_as_released_when_training(case, dtype):
    assert_recorded(lambda dtype: run(case, dtype).buffers, dtype, under(golden(case), "buffer_after_f64/"))


@pytest.mark.golden
@pytest.mark.parametrize("case", CASES)
def test_loss_passes_through_released_intermediates_when_training(case):
    assert_recorded(lambda dtype: run(case, dtype).middle, torch.float64, under(golden(case), "mid/"))


@pytest.mark.golden
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", KD_CASES)
def test_kd_gives_released_value_and_gradient_when_logits_are_given(case, dtype):
    args, expected = KD_CASES[case], under(golden("kd"), f"{case}/")

    def compute(dtype: torch.dtype) -> dict[str, Tensor]:
        arrays = under(inputs("kd", dtype), f"{case}/")
        student = arrays["logit_s"].requires_grad_()
        value = kd_loss(student, arrays["logit_t"], args["temp"], args["alpha"])
        value.backward()
        return {"loss": value, "gradient": student.grad}

    assert_recorded(compute, dtype, {"loss": expected["loss_f64"], "gradient": expected["grad_s_f64"]})


@pytest.mark.golden
@pytest.mark.parametrize("case", KD_CASES)
def test_kd_baseline_scales_the_task_as_released_when_alpha_is_given(case):
    args, arrays = KD_CASES[case], inputs("kd", torch.float64)
    student, teacher = arrays[f"{case}/logit_s"], arrays[f"{case}/logit_t"]
    config = ScaleKDConfig(kd_alpha=args["alpha"], kd_temperature=args["temp"])
    terms = KDLoss(config)((), student, torch.empty(0), teacher, torch.tensor(2.0).double())
    expected = under(golden("kd"), f"{case}/")
    task, kd = 2 * expected["ori_factor"], expected["loss_f64"]
    assert_recorded(lambda _: terms, torch.float64, {"task": task, "kd": kd, "total": task + kd})


@pytest.mark.golden
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", FD_CASES)
def test_fd_gives_released_value_and_gradients_when_maps_are_given(case, dtype):
    args, released = FD_CASES[case], under(golden("fd"), f"{case}/")

    def compute(dtype: torch.dtype) -> dict[str, Tensor | None]:
        arrays = under(inputs("fd", dtype), f"{case}/")
        fd = FDLoss(args["student_dims"], args["teacher_dims"], args["alpha_fd"])
        fd.load_state_dict(under(released, "param/"))
        fd, student = fd.to(dtype), arrays["s_map"].requires_grad_()
        terms = fd((student,), torch.empty(0), arrays["t_map"].flatten(2).mT, None, torch.zeros((), dtype=dtype))
        terms["total"].backward()
        return {**terms, "map": student.grad, **{name: leaf.grad for name, leaf in fd.named_parameters()}}

    loss = released["loss_f64"]
    terms = {"task": torch.zeros(()).double(), "fd": loss, "total": loss, "map": released["grad_s_f64"]}
    assert_recorded(compute, dtype, {**terms, **under(released, "grad_f64/")})


def test_fd_resizes_the_student_when_grids_differ():
    """Halving averages, and a constant map stays constant at any size."""
    torch.manual_seed(0)
    fd = FDLoss(3, 3, alpha=1.0, teacher_grid=(5, 2))
    constant = torch.randn(2, 3, 1, 1)
    torch.testing.assert_close(fd.project(constant.expand(-1, -1, 7, 3)), constant.flatten(2).mT.expand(-1, 10, -1))
    ramp = torch.arange(8.0).expand(1, 1, 4, 8)
    halved = FDLoss(1, 1, alpha=1.0, teacher_grid=(2, 4)).project(ramp).view(2, 4)
    assert halved[0, 1:3].tolist() == pytest.approx([2.5, 4.5])
    pixels = torch.zeros(1, 1, 8, 8, requires_grad=True)
    FDLoss(1, 1, alpha=1.0, teacher_grid=(2, 2)).project(pixels).sum().backward()
    assert (pixels.grad > 0).all()  # shrinking skips no pixel
    teacher = torch.randn(2, 10, 3)
    maps = (torch.randn(2, 3, 7, 3, requires_grad=True),)
    terms = fd(maps, torch.empty(0), teacher, None, torch.zeros(()))
    torch.testing.assert_close(terms["fd"], original_view_loss(fd.project(maps[0]), teacher, 1.0))


def test_fd_stays_close_to_float32_when_maps_are_bfloat16_under_autocast():
    torch.manual_seed(0)
    fd, student, teacher = FDLoss(3, 5, 1.0, teacher_grid=(3, 4)), torch.randn(2, 3, 7, 7), torch.randn(2, 12, 5)
    with torch.autocast("cpu", torch.bfloat16):
        low = fd((student.bfloat16(),), torch.empty(0), teacher, None, torch.zeros(()))["fd"]
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, original_view_loss(fd.project(student), teacher, 1.0), rtol=0.02, atol=0.0)


def test_fd_names_both_shapes_when_grids_differ_and_none_was_given():
    with pytest.raises(InputError, match=r"\(2, 49, 3\).*\(2, 16, 3\)"):
        FDLoss(3, 3, 1.0)((torch.zeros(2, 3, 7, 7),), torch.empty(0), torch.zeros(2, 16, 3), None, torch.zeros(()))


@pytest.mark.parametrize("gap", [1e2, 1e3, 1e4])
def test_kd_stays_finite_when_the_logit_gap_is_large(gap):
    student = torch.tensor([[gap, 0.0, 0.0]], requires_grad=True)
    value = kd_loss(student, torch.tensor([[0.0, gap, 0.0]]), temperature=1.0, alpha=0.5)
    value.backward()
    assert value.item() == pytest.approx(0.5 * gap)
    assert student.grad.isfinite().all()


def test_kd_names_both_shapes_when_class_counts_differ():
    with pytest.raises(InputError, match=r"\(2, 10\), the teacher's \(2, 1000\)"):
        kd_loss(torch.zeros(2, 10), torch.zeros(2, 1000), 1.0, 0.5)


@pytest.mark.parametrize(
    ("teacher_dim", "heads"),
    [(192, 3), (384, 6), (768, 12), (1024, 16), (1536, 24), (32, 1), (64, 1), (160, 2), (200, 2), (325, 5), (259, 1)],
)
def test_default_heads_is_one_per_64_channels_lowered_until_it_divides_when_width_varies(teacher_dim, heads):
    assert default_heads(teacher_dim) == heads
    assert teacher_dim % heads == 0


@dataclass
class Batch:
    """A small teacher with a class token, and what a student would hand over."""

    later: Any
    student_maps: tuple[Tensor, Tensor]
    student_logits: Tensor
    teacher: Tensor
    teacher_logits: Tensor
    task_loss: Tensor
    prefix: Tensor

    def build(self, method: str = "scalekd", **config: Any):
        dims = tuple(leaf.shape[1] for leaf in self.student_maps)
        grids = tuple(tuple(leaf.shape[2:]) for leaf in self.student_maps)
        return build_loss(method, ScaleKDConfig(**config), dims, grids, self.later)

    def terms(self, loss, **change: Any) -> dict[str, Tensor]:
        arguments = {
            "student_maps": self.student_maps,
            "student_logits_BK": self.student_logits,
            "teacher_BND": self.teacher,
            "teacher_logits_BK": self.teacher_logits,
            "task_loss": self.task_loss,
            "prefix_BPD": self.prefix,
        }
        return loss(**{**arguments, **change})


@pytest.fixture
def batch() -> Batch:
    torch.manual_seed(0)
    model = timm.create_model("test_vit", pretrained=False, img_size=(48, 64), num_classes=5).eval()
    early, later = split_teacher(model, depth=1)
    with torch.no_grad():
        tokens = early(torch.randn(2, 3, 48, 64))
        final = later(tokens)
        logits = model.forward_head(final)
    prefix = later.info.prefix_tokens
    maps = torch.randn(2, 6, 6, 8, requires_grad=True), torch.randn(2, 10, 3, 4, requires_grad=True)
    student_logits = torch.randn(2, 5, requires_grad=True)
    task = cross_entropy(student_logits, torch.tensor([0, 4]))
    return Batch(later, maps, student_logits, final[:, prefix:], logits, task, tokens[:, :prefix])


DISTILLED = {"stage3_original", "stage3_alternative", "stage4_original", "stage4_alternative"}


@pytest.mark.parametrize(
    ("method", "config", "expected"),
    [
        ("scalekd", {}, {*DISTILLED, "kd"}),
        ("scalekd", {"kd_alpha": None}, DISTILLED),
        ("scalekd", {"tpp": False}, {"stage4_original", "stage4_alternative", "kd"}),
        ("scalekd", {"dual_view": False}, {"stage3_original", "stage4_original", "kd"}),
        ("scalekd", {"tpp": False, "dual_view": False, "kd_alpha": None}, {"stage4_original"}),
        ("fd", {}, {"fd"}),
        ("kd", {}, {"kd"}),
        ("none", {}, set()),
    ],
)
def test_method_returns_its_terms_and_their_plain_sum_when_parts_are_switched(batch, method, config, expected):
    terms = batch.terms(batch.build(method, **config))
    assert set(terms) == {"task", "total", *expected}
    torch.testing.assert_close(
        terms["total"], sum(leaf for name, leaf in terms.items() if name != "total"), rtol=1e-5, atol=1e-5
    )
    with_kd = "kd" in expected
    torch.testing.assert_close(terms["task"], batch.task_loss * (0.5 if with_kd else 1.0))


@pytest.mark.parametrize(
    "config", [{}, {"tpp": False}, {"dual_view": False}, {"kd_alpha": None}, {"norm": "layer"}, {"windows": (1, 2)}]
)
def test_loss_gives_every_own_parameter_a_gradient_when_parts_are_switched(batch, config):
    """A parameter without one would stop distributed training."""
    loss = batch.build(**config)
    batch.terms(loss)["total"].backward()
    assert [name for name, leaf in loss.named_parameters() if leaf.grad is None] == []
    assert all(leaf.grad is None for leaf in batch.later.parameters())
    F3, F4 = batch.student_maps
    assert (F3.grad is not None) == config.get("tpp", True)
    assert F4.grad.abs().max() > 0


def test_stage4_loss_reaches_the_stage3_map_when_tpp_is_on(batch):
    F3, _ = batch.student_maps
    (gradient,) = torch.autograd.grad(batch.terms(batch.build())["stage4_original"], F3)
    assert gradient.abs().max() > 0


def test_stage4_holds_a_learned_query_only_when_tpp_is_off(batch):
    assert [cap.query is None for cap in batch.build().stage4.values()] == [True, True]
    assert [cap.query is None for cap in batch.build(tpp=False).stage4.values()] == [False, False]


def test_loss_checkpoints_its_projectors_only_when_saved(batch):
    loss = batch.build()
    assert {name.split(".")[0] for name in loss.state_dict()} == {"stage3", "stage4"}
    restored = batch.build()
    restored.load_state_dict(loss.state_dict())
    for name, leaf in batch.terms(loss).items():
        torch.testing.assert_close(batch.terms(restored)[name], leaf)


def test_loss_falls_when_projectors_learn_one_batch(batch):
    loss = batch.build(kd_alpha=None)
    optimizer = torch.optim.AdamW(loss.parameters(), lr=1e-2)
    totals = []
    for _ in range(15):
        totals.append(batch.terms(loss, task_loss=torch.zeros(()))["total"])
        optimizer.zero_grad()
        totals[-1].backward()
        optimizer.step()
    assert totals[-1] < 0.7 * totals[0]


def test_loss_asks_for_teacher_logits_when_kd_is_on_and_there_are_none(batch):
    with pytest.raises(InputError, match="carry no logits"):
        batch.terms(batch.build(), teacher_logits_BK=None)
    assert "kd" not in batch.terms(batch.build(kd_alpha=None), teacher_logits_BK=None)


def test_loss_asks_for_prefix_tokens_when_the_teacher_has_them(batch):
    with pytest.raises(InputError, match="prefix_BPD"):
        batch.terms(batch.build(), prefix_BPD=None)


def test_loss_names_both_shapes_when_teacher_features_are_on_another_grid(batch):
    with pytest.raises(InputError, match=r"\(2, 12, 64\).*\(2, 6, 64\)"):
        batch.terms(batch.build(), teacher_BND=batch.teacher[:, :6])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"kd_alpha": 1.5}, "kd_alpha is 1.5"),
        ({"kd_temperature": 0.0}, "kd_temperature is 0.0"),
        ({"alphas_stage3": (0.1, -0.1)}, "alphas_stage3"),
        ({"heads_stage4": 7}, "num_heads 7 does not divide"),
        ({"windows": (2, 2)}, r"windows \(2, 2\) do not divide"),
    ],
)
def test_loss_refuses_when_its_config_is_impossible(batch, config, message):
    with pytest.raises(InputError, match=message):
        batch.build(**config)


def test_methods_are_built_by_name_when_asked(batch):
    built = {method: type(batch.build(method)) for method in METHODS}
    assert built == {"scalekd": ScaleKDLoss, "fd": FDLoss, "kd": KDLoss, "none": TaskLoss}
    with pytest.raises(InputError, match="unknown method 'at', expected one of scalekd, fd, kd, none"):
        batch.build("at")
    with pytest.raises(InputError, match="kd_alpha is None"):
        batch.build("kd", kd_alpha=None)


def test_fd_is_weighed_by_stage_4_when_the_stages_have_other_weights(batch):
    loss = batch.build("fd", alphas_stage3=(7.0, 7.0), alphas_stage4=(0.5, 7.0))
    double = batch.build("fd", alphas_stage3=(7.0, 7.0), alphas_stage4=(1.0, 7.0))
    double.load_state_dict(loss.state_dict())
    torch.testing.assert_close(batch.terms(double)["fd"], 2 * batch.terms(loss)["fd"])
    again = batch.build("fd", alphas_stage3=(1.0, 1.0), alphas_stage4=(0.5, 1.0))
    again.load_state_dict(loss.state_dict())
    torch.testing.assert_close(batch.terms(again)["fd"], batch.terms(loss)["fd"])


def test_projectors_take_the_softmax_scale_of_the_config_when_built(batch):
    plain, sharp = (batch.build(softmax_scale=scale) for scale in (1.0, 4.0))
    for stage in ("stage3", "stage4"):
        for one, other in zip(getattr(plain, stage).values(), getattr(sharp, stage).values(), strict=True):
            assert other.scale == pytest.approx(4 * one.scale)
    sharp.load_state_dict(plain.state_dict())
    assert batch.terms(plain)["stage4_original"] != batch.terms(sharp)["stage4_original"]
