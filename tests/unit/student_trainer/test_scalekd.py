"""ScaleKD against the released code's complete losses."""

from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import pytest
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
from method_batches import SmallBatch, small_batch
from torch import Tensor

from feature_store.errors import InputError
from feature_store.teacher import split_teacher
from student_trainer.methods import (
    CrossAttentionProjector,
    DistillBatch,
    ScaleKD,
    ScaleKDConfig,
    StudentOutput,
    StudentShape,
    TeacherOutput,
    TeacherShape,
)
from student_trainer.methods.criterion import binary_cross_entropy, cross_entropy
from student_trainer.methods.scalekd import default_heads
from student_trainer.official import load_projector, projector_names

CASES = [name for name in names("e2e_") if "distill_class" in arguments(name)]
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


def official_loss(case: str, later) -> ScaleKD:
    args = arguments(case)
    s3, s4, kd = args["s3"], args["s4"], args["kd"]
    config = ScaleKDConfig.from_products(
        stage3=tuple(alpha or 1.0 for alpha in s3["alpha"]),
        stage4=tuple(alpha or 1.0 for alpha in s4["alpha"]),
        kd_alpha=kd["alpha"] if kd else None,
        kd_temperature=kd["temp"] if kd else 1.0,
        softmax_scale=s3["softmax_scale"][0],
        heads_stage3=s3["num_heads"],
        heads_stage4=s4["num_heads"],
    )
    classes = len(golden(case)["student_fc.bias"])
    student = StudentShape(
        (s3["student_dims"], s4["student_dims"]), (tuple(s3["pos_hw"]), tuple(s4["pos_hw"])), classes
    )
    loss = ScaleKD(config, student, TeacherShape(later.info, classes, lambda: later), partial(task_loss, args["head"]))
    # the released code computes terms of weight 0, which ours leaves out
    idle = {f"{stage}_{view}" for stage in ("stage3", "stage4") for view, alpha in
            zip(PATHS.values(), args[stage.replace("tage", "")]["alpha"], strict=True) if not alpha}  # fmt: skip
    loss.weights |= dict.fromkeys(idle, 0.0)
    for prefix, projector in projectors(loss).items():
        load_projector(projector, under(golden(case), prefix))
    return loss


def projectors(loss: ScaleKD) -> dict[str, CrossAttentionProjector]:
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
    teacher_output = TeacherOutput({"stage4": final_BHWD.flatten(1, 2)}, teacher_logits)
    output = StudentOutput((leaves["s3"], leaves["s4"]), student_logits)
    found = loss(output, DistillBatch(torch.empty(0), arrays[args["labels"]], teacher_output))
    terms = {**found.weighted, "total": found.total}
    terms["total"].backward(retain_graph=True)
    return Run(
        final_BHWD.permute(0, 3, 1, 2), teacher_logits, student_logits, found.raw["task"], terms, leaves,
        *gradients_and_buffers(loss, case, leaves), middle,
    )  # fmt: skip


def record_middle(loss: ScaleKD) -> dict[str, Tensor]:
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
    loss: ScaleKD, case: str, leaves: dict[str, Tensor]
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


@pytest.fixture
def batch() -> SmallBatch:
    return small_batch()


DISTILLED = {"stage3_original", "stage3_alternative", "stage4_original", "stage4_alternative"}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, {*DISTILLED, "kd"}),
        ({"kd_alpha": None}, DISTILLED),
        ({"tpp": False}, {"stage4_original", "stage4_alternative", "kd"}),
        ({"dual_view": False}, {"stage3_original", "stage4_original", "kd"}),
        ({"tpp": False, "dual_view": False, "kd_alpha": None}, {"stage4_original"}),
        ({"alpha_stage3": 0.0, "alpha_stage4": 0.0}, {"kd"}),
        ({"beta_stage3": 0.0, "beta_stage4": 1.0}, {"stage3_alternative", "stage4_original", "kd"}),
    ],
)
def test_scalekd_gives_its_terms_and_their_plain_sum_when_parts_are_switched(batch, config, expected):
    terms = batch.terms(batch.build(**config))
    assert set(terms.raw) == {"task", *expected}
    torch.testing.assert_close(terms.total, sum(terms.weighted.values()))
    torch.testing.assert_close(terms.raw["task"], cross_entropy(batch.student.logits, batch.batch.labels))
    assert terms.weights["task"] == (0.5 if "kd" in expected else 1.0)


def test_scalekd_weighs_paths_by_alpha_and_beta_when_given(batch):
    method = batch.build(alpha_stage3=0.2, beta_stage3=0.25, alpha_stage4=0.4, beta_stage4=0.75, kd_alpha=0.1)
    expected = {
        "task": 0.9, "stage3_original": 0.05, "stage3_alternative": 0.15, "stage4_original": 0.3,
        "stage4_alternative": 0.1, "kd": 0.1,
    }  # fmt: skip
    assert batch.terms(method).weights == pytest.approx(expected)


def test_config_gives_the_released_products_when_left_alone():
    released = {
        "stage3_original": 0.08, "stage3_alternative": 0.06, "stage4_original": 0.08, "stage4_alternative": 0.06,
    }  # fmt: skip
    assert ScaleKDConfig().weights() == pytest.approx(released, rel=1e-15)
    assert ScaleKDConfig.from_products().weights() == pytest.approx(released, rel=1e-15)


@pytest.mark.parametrize("products", [(0.08, 0.0), (0.0, 0.06), (0.016, 0.008), (0.0, 0.0)])
def test_config_takes_released_products_when_some_are_zero(products):
    config = ScaleKDConfig.from_products(stage4=products, kd_alpha=None, tpp=False)
    terms = zip(("stage4_original", "stage4_alternative"), products, strict=True)
    assert config.weights() == pytest.approx({name: product for name, product in terms if product}, rel=1e-14)
    assert config.kd_alpha is None


def test_config_refuses_products_when_negative():
    with pytest.raises(InputError, match=r"\(-0.1, 0.2\), expected two weights"):
        ScaleKDConfig.from_products(stage3=(-0.1, 0.2))


@pytest.mark.parametrize(
    ("config", "stage3", "stage4"),
    [
        ({}, {"original", "alternative"}, {"original", "alternative"}),
        ({"beta_stage4": 1.0}, {"original", "alternative"}, {"original"}),
        ({"beta_stage3": 0.0}, {"original", "alternative"}, {"original", "alternative"}),
        ({"beta_stage3": 1.0, "beta_stage4": 1.0}, {"original"}, {"original"}),
        ({"beta_stage3": 1.0, "beta_stage4": 0.0}, {"original", "alternative"}, {"alternative"}),
        ({"alpha_stage3": 0.0}, {"original", "alternative"}, {"original", "alternative"}),
        ({"alpha_stage4": 0.0, "beta_stage3": 0.0}, {"alternative"}, set()),
        ({"tpp": False, "beta_stage4": 0.0}, set(), {"alternative"}),
    ],
)
def test_scalekd_builds_only_projectors_that_reach_a_term_when_weights_are_zero(batch, config, stage3, stage4):
    """A stage-3 projector also gives the queries of its view path's stage-4 projector."""
    method = batch.build(**config)
    assert (set(method.stage3), set(method.stage4)) == (stage3, stage4)
    terms = batch.terms(method)
    assert set(terms.raw) == {"task", "kd", *method.config.weights()}
    terms.total.backward()
    assert [name for name, leaf in method.named_parameters() if leaf.grad is None] == []


@pytest.mark.parametrize(
    ("config", "needs"),
    [
        ({}, (("stage4", "stage3_prefix"), True, False, True, False)),
        ({"kd_alpha": None}, (("stage4", "stage3_prefix"), False, False, True, False)),
        ({"tpp": False}, (("stage4",), True, False, False, False)),
        ({"alpha_stage3": 0.0, "alpha_stage4": 0.0}, ((), True, False, False, False)),
    ],
)
def test_scalekd_needs_what_its_terms_read_when_parts_are_switched(batch, config, needs):
    method = batch.build(**config)
    assert tuple(method.needs) == needs
    kept = {name: tap for name, tap in batch.batch.teacher.taps.items() if name in method.needs.taps}
    logits = batch.batch.teacher.logits if method.needs.logits else None
    torch.testing.assert_close(batch.terms(method, taps=kept, logits=logits).total, batch.terms(method).total)


def test_scalekd_loads_no_later_blocks_when_tpp_is_off(batch):
    batch.teacher = replace(batch.teacher, tail=lambda: pytest.fail("loaded"))
    batch.terms(batch.build(tpp=False))


def test_scalekd_needs_no_prefix_tokens_when_the_split_drops_them(batch):
    batch.teacher = replace(batch.teacher, split=replace(batch.teacher.split, prefix="dropped"))
    assert batch.build().needs.taps == ("stage4",)


def test_scalekd_leaves_kd_out_with_a_note_when_the_teacher_has_no_classifier(batch):
    with_classifier = batch.build()
    batch.teacher = replace(batch.teacher, num_classes=0)
    method = batch.build()
    assert method.notes == ("KD is off: the teacher has no classifier",)
    assert not method.needs.logits
    terms = batch.terms(method, logits=None)
    assert "kd" not in terms.raw
    assert terms.weights["task"] == 1.0
    assert batch.build(kd_alpha=None).notes == with_classifier.notes == ()


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"tpp": False},
        {"dual_view": False},
        {"kd_alpha": None},
        {"norm": "layer"},
        {"windows": (1, 2)},
        {"patchify": "separable"},
    ],
)
def test_scalekd_gives_every_own_parameter_a_gradient_when_parts_are_switched(batch, config):
    """A parameter without one would stop distributed training."""
    method = batch.build(**config)
    batch.terms(method).total.backward()
    assert [name for name, leaf in method.named_parameters() if leaf.grad is None] == []
    assert all(leaf.grad is None for leaf in batch.teacher.tail().parameters())
    F3, F4 = batch.student.maps
    assert (F3.grad is not None) == config.get("tpp", True)
    assert F4.grad.abs().max() > 0


def test_stage4_loss_reaches_the_stage3_map_when_tpp_is_on(batch):
    F3, _ = batch.student.maps
    (gradient,) = torch.autograd.grad(batch.terms(batch.build()).raw["stage4_original"], F3)
    assert gradient.abs().max() > 0


def test_stage4_holds_a_learned_query_only_when_tpp_is_off(batch):
    assert [cap.query is None for cap in batch.build().stage4.values()] == [True, True]
    assert [cap.query is None for cap in batch.build(tpp=False).stage4.values()] == [False, False]


def test_scalekd_checkpoints_its_projectors_only_when_saved(batch):
    method = batch.build()
    assert {name.split(".")[0] for name in method.state_dict()} == {"stage3", "stage4"}
    assert "stage3.original.key_proj.0.weight" in method.state_dict()
    restored = batch.build()
    restored.load_state_dict(method.state_dict())
    expected = batch.terms(restored).raw
    for name, term in batch.terms(method).raw.items():
        torch.testing.assert_close(term, expected[name])


def test_scalekd_falls_when_projectors_learn_one_batch(batch):
    method = batch.build(kd_alpha=None)
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-2)
    totals = []
    for _ in range(15):
        terms = batch.terms(method)
        totals.append(terms.total - terms.weighted["task"])
        optimizer.zero_grad()
        totals[-1].backward()
        optimizer.step()
    assert totals[-1] < 0.7 * totals[0]


def test_scalekd_asks_for_teacher_logits_when_kd_is_on_and_there_are_none(batch):
    with pytest.raises(InputError, match="carries no teacher logits"):
        batch.terms(batch.build(), logits=None)


def test_scalekd_asks_for_prefix_tokens_when_the_teacher_has_them(batch):
    with pytest.raises(InputError, match="prefix_BPD"):
        batch.terms(batch.build(), taps={"stage4": batch.batch.teacher.taps["stage4"]})


def test_scalekd_names_both_shapes_when_teacher_features_are_on_another_grid(batch):
    taps = batch.batch.teacher.taps
    with pytest.raises(InputError, match=r"\(2, 12, 64\).*\(2, 6, 64\)"):
        batch.terms(batch.build(), taps={**taps, "stage4": taps["stage4"][:, :6]})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"kd_alpha": 1.5}, "kd_alpha is 1.5"),
        ({"kd_alpha": -0.1}, "kd_alpha is -0.1"),
        ({"kd_temperature": 0.0}, "kd_temperature is 0.0"),
        ({"alpha_stage3": -0.1}, "alpha_stage3 is -0.1, expected a weight"),
        ({"alpha_stage4": float("nan")}, "alpha_stage4 is nan"),
        ({"beta_stage3": -0.1}, "beta_stage3 is -0.1, expected 0..1"),
        ({"beta_stage4": 1.1}, "beta_stage4 is 1.1, expected 0..1"),
        ({"heads_stage4": 7}, "num_heads 7 does not divide"),
        ({"windows": (2, 2)}, r"windows \(2, 2\) do not divide"),
    ],
)
def test_scalekd_refuses_when_its_config_is_impossible(batch, config, message):
    with pytest.raises(InputError, match=message):
        batch.build(**config)


@pytest.mark.parametrize(
    "config", [{"kd_alpha": 0.0}, {"kd_alpha": 1.0}, {"beta_stage3": 0.0, "beta_stage4": 1.0}, {"kd_temperature": 1e-3}]
)
def test_scalekd_takes_the_ends_of_its_ranges(batch, config):
    assert batch.terms(batch.build(**config)).total.isfinite()


def test_projectors_take_heads_and_windows_of_the_config_when_built(batch):
    method = batch.build(heads_stage3=2, heads_stage4=8, windows=(3, 1), norm="layer")
    assert {cap.num_heads for cap in method.stage3.values()} == {2}
    assert {cap.num_heads for cap in method.stage4.values()} == {8}
    caps = [*method.stage3.values(), *method.stage4.values()]
    assert {cap.windows for cap in caps} == {(3, 1)}
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in method.modules())
    assert {cap.num_heads for cap in batch.build().stage4.values()} == {default_heads(64)}


@pytest.mark.parametrize("checkpoint", [False, True])
def test_later_blocks_run_again_for_backward_only_when_asked(batch, checkpoint):
    runs = []
    handle = batch.teacher.tail().register_forward_pre_hook(lambda *_: runs.append(1))
    batch.terms(batch.build(checkpoint_later_blocks=checkpoint)).total.backward()
    handle.remove()
    assert len(runs) == (2 if checkpoint else 1)


def test_projectors_take_the_softmax_scale_of_the_config_when_built(batch):
    plain, sharp = (batch.build(softmax_scale=scale) for scale in (1.0, 4.0))
    for stage in ("stage3", "stage4"):
        for one, other in zip(getattr(plain, stage).values(), getattr(sharp, stage).values(), strict=True):
            assert other.scale == pytest.approx(4 * one.scale)
    sharp.load_state_dict(plain.state_dict())
    assert batch.terms(plain).raw["stage4_original"] != batch.terms(sharp).raw["stage4_original"]


@pytest.mark.parametrize(
    ("teacher_dim", "heads"),
    [(192, 3), (384, 6), (768, 12), (1024, 16), (1536, 24), (32, 1), (64, 1), (160, 2), (200, 2), (325, 5), (259, 1)],
)
def test_default_heads_is_one_per_64_channels_lowered_until_it_divides_when_width_varies(teacher_dim, heads):
    assert default_heads(teacher_dim) == heads
    assert teacher_dim % heads == 0
