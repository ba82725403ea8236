"""FD against the released code's numbers, and its resizing."""

import pytest
import torch
from golden_files import DTYPES, arguments, assert_recorded, golden, inputs, under
from method_batches import maps_batch
from torch import Tensor

from feature_store.errors import InputError
from student_trainer.methods import FD, FDConfig
from student_trainer.methods.dfm import original_view_loss
from student_trainer.methods.resize import resized

CASES = {case["case"]: case for case in arguments("fd")["cases"]}


def build(student_BCHW: Tensor, teacher_BND: Tensor, grid: tuple[int, int], alpha: float = 1.0) -> FD:
    return maps_batch(student_BCHW, teacher_BND, grid).build("fd", alpha=alpha)


@pytest.mark.golden
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_fd_gives_released_value_and_gradients_when_maps_are_given(case, dtype):
    args, released = CASES[case], under(golden("fd"), f"{case}/")

    def compute(dtype: torch.dtype) -> dict[str, Tensor | None]:
        arrays = under(inputs("fd", dtype), f"{case}/")
        student, teacher = arrays["s_map"].requires_grad_(), arrays["t_map"]
        small = maps_batch(student, teacher.flatten(2).mT, tuple(teacher.shape[2:]))
        fd = small.build("fd", alpha=args["alpha_fd"])
        fd.load_state_dict(under(released, "param/"))
        terms = small.terms(fd.to(dtype))
        terms.total.backward()
        got = {**terms.weighted, "total": terms.total, "map": student.grad}
        return {**got, **{name: leaf.grad for name, leaf in fd.named_parameters()}}

    loss = released["loss_f64"]
    terms = {"task": torch.zeros(()).double(), "fd": loss, "total": loss, "map": released["grad_s_f64"]}
    assert_recorded(compute, dtype, {**terms, **under(released, "grad_f64/")})


def test_fd_resizes_the_student_when_grids_differ():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 7, 3), torch.randn(2, 10, 3)
    small = maps_batch(student, teacher, (5, 2))
    fd = small.build("fd")
    projected = resized(student, (5, 2)).flatten(2).mT
    torch.testing.assert_close(fd.project(student), projected)
    torch.testing.assert_close(small.terms(fd).raw["fd"], original_view_loss(projected, teacher))


def test_resizing_averages_and_keeps_constants_when_grids_differ():
    constant = torch.randn(2, 3, 1, 1)
    torch.testing.assert_close(resized(constant.expand(-1, -1, 7, 3), (5, 2)), constant.expand(-1, -1, 5, 2))
    halved = resized(torch.arange(8.0).expand(1, 1, 4, 8), (2, 4))[0, 0]
    assert halved[0, 1:3].tolist() == pytest.approx([2.5, 4.5])
    pixels = torch.zeros(1, 1, 8, 8, requires_grad=True)
    resized(pixels, (2, 2)).sum().backward()
    assert (pixels.grad > 0).all()  # shrinking skips no pixel
    same = torch.randn(1, 2, 3, 4).bfloat16()
    assert resized(same, (3, 4)) is same
    assert resized(same, (4, 3)).dtype == torch.float32


def test_fd_adapts_the_width_only_when_it_differs():
    map_BCHW = torch.randn(2, 3, 2, 2)
    assert [*build(map_BCHW, torch.zeros(2, 4, 3), (2, 2)).parameters()] == []
    assert [*build(map_BCHW, torch.zeros(2, 4, 5), (2, 2)).state_dict()] == ["align.weight", "align.bias"]


def test_fd_stays_close_to_float32_when_maps_are_bfloat16_under_autocast():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 7, 7), torch.randn(2, 12, 5)
    small = maps_batch(student.bfloat16(), teacher, (3, 4))
    fd = small.build("fd")
    with torch.autocast("cpu", torch.bfloat16):
        low = small.terms(fd).raw["fd"]
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, original_view_loss(fd.project(student), teacher), rtol=0.02, atol=0.0)


def test_fd_needs_the_final_map_alone_and_no_classifier():
    small = maps_batch(torch.zeros(2, 3, 2, 2), torch.zeros(2, 4, 3), (2, 2))
    assert tuple(small.build("fd").needs) == (("stage4",), False, False, False, False)
    assert small.terms(small.build("fd", alpha=0.3)).weights == {"task": 1.0, "fd": 0.3}


def test_fd_config_refuses_a_negative_weight():
    with pytest.raises(InputError, match="alpha of FD is -0.1, expected a number of at least 0"):
        FDConfig(-0.1)
    assert (FDConfig().alpha, FDConfig(0.0).alpha) == (0.08, 0.0)
