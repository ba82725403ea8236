"""KD against the released code's numbers and against its formula."""

import pytest
import torch
from golden_files import DTYPES, arguments, assert_recorded, golden, inputs, under
from hypothesis import given, settings
from hypothesis import strategies as st
from method_batches import logits_batch
from torch import Tensor

from feature_store.errors import InputError
from student_trainer.methods import KD, KDConfig
from student_trainer.methods.kd import kd_loss

CASES = {case["case"]: case for case in arguments("kd")["cases"]}


@pytest.mark.golden
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_kd_gives_released_value_and_gradient_when_logits_are_given(case, dtype):
    args, expected = CASES[case], under(golden("kd"), f"{case}/")

    def compute(dtype: torch.dtype) -> dict[str, Tensor]:
        arrays = under(inputs("kd", dtype), f"{case}/")
        student = arrays["logit_s"].requires_grad_()
        small = logits_batch(student, arrays["logit_t"])
        value = small.terms(small.build("kd", alpha=args["alpha"], temperature=args["temp"])).weighted["kd"]
        value.backward()
        return {"loss": value, "gradient": student.grad}

    assert_recorded(compute, dtype, {"loss": expected["loss_f64"], "gradient": expected["grad_s_f64"]})


@pytest.mark.golden
@pytest.mark.parametrize("case", CASES)
def test_kd_scales_the_task_as_released_when_alpha_is_given(case):
    args, arrays = CASES[case], inputs("kd", torch.float64)
    small = logits_batch(arrays[f"{case}/logit_s"], arrays[f"{case}/logit_t"])
    method = KD(
        KDConfig(args["alpha"], args["temp"]), small.shape, small.teacher, lambda *_: torch.tensor(2.0).double()
    )
    terms = small.terms(method)
    expected = under(golden("kd"), f"{case}/")
    task, kd = 2 * expected["ori_factor"], expected["loss_f64"]
    got = {**terms.weighted, "total": terms.total}
    assert_recorded(lambda _: got, torch.float64, {"task": task, "kd": kd, "total": task + kd})


@settings(max_examples=25, deadline=None)
@given(T=st.floats(0.3, 8), alpha=st.floats(0, 1), batch=st.integers(1, 4), classes=st.integers(2, 6))
def test_kd_equals_the_written_out_formula(T, alpha, batch, classes):
    torch.manual_seed(0)
    s, z = torch.randn(2, batch, classes, dtype=torch.float64)
    small = logits_batch(s, z)
    p, q = (torch.exp(x / T) / torch.exp(x / T).sum(dim=1, keepdim=True) for x in (z, s))
    L_kd = -sum(p[n, k] * torch.log(q[n, k]) for n in range(batch) for k in range(classes)) * T**2 / batch
    L_task = -torch.log(torch.exp(s) / torch.exp(s).sum(dim=1, keepdim=True))[:, 0].mean()
    terms = small.terms(small.build("kd", alpha=alpha, temperature=T))
    torch.testing.assert_close(terms.raw, {"task": L_task, "kd": L_kd})
    torch.testing.assert_close(terms.total, (1 - alpha) * L_task + alpha * L_kd)


@pytest.mark.parametrize("gap", [1e2, 1e3, 1e4])
def test_kd_stays_finite_when_the_logit_gap_is_large(gap):
    student = torch.tensor([[gap, 0.0, 0.0]], requires_grad=True)
    value = kd_loss(student, torch.tensor([[0.0, gap, 0.0]]).softmax(dim=1))
    value.backward()
    assert value.item() == pytest.approx(gap)
    assert student.grad.isfinite().all()


def test_kd_is_summed_in_float32_when_logits_are_half_precision():
    torch.manual_seed(0)
    s, p = torch.randn(3, 9).bfloat16(), torch.randn(3, 9).half().softmax(dim=1)
    assert kd_loss(s, p).dtype == torch.float32
    torch.testing.assert_close(kd_loss(s, p, 2.0), kd_loss(s.float(), p.float(), 2.0))


def test_kd_names_both_shapes_when_class_counts_differ():
    with pytest.raises(InputError, match=r"\(2, 10\), the teacher's \(2, 1000\)"):
        kd_loss(torch.zeros(2, 10), torch.zeros(2, 1000))


def test_kd_needs_logits_alone():
    small = logits_batch(torch.zeros(2, 3), torch.zeros(2, 3))
    assert tuple(small.build("kd").needs) == ((), True, False, False, False)


def test_kd_is_refused_when_the_teacher_has_no_classifier():
    small = logits_batch(torch.zeros(2, 3), torch.zeros(2, 0))
    with pytest.raises(InputError, match="the kd method needs teacher logits.*choose --method scalekd or fd"):
        small.build("kd")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -0.1}, "alpha of KD is -0.1, expected 0..1"),
        ({"alpha": 1.1}, "alpha of KD is 1.1"),
        ({"temperature": 0.0}, "temperature of KD is 0.0, expected a number above 0"),
        ({"temperature": float("nan")}, "temperature of KD is nan"),
    ],
)
def test_kd_config_refuses_when_a_value_is_impossible(options, message):
    with pytest.raises(InputError, match=message):
        KDConfig(**options)


def test_kd_config_takes_the_ends_of_its_ranges():
    assert (KDConfig(alpha=0.0).alpha, KDConfig(alpha=1.0).alpha, KDConfig(temperature=0.1).temperature) == (0, 1, 0.1)
    assert (KDConfig().alpha, KDConfig().temperature) == (0.5, 1.0)
