"""The dual-view losses against the released code's numbers, and phi against the DCT it stands for."""

import pytest
import torch
import torch.nn.functional as F
from golden_files import DTYPES, arguments, assert_recorded, golden, inputs, under
from scipy.fft import dctn, idctn
from torch import Tensor

from feature_store.errors import InputError
from student_trainer.methods.dfm import (
    alternative_view_loss,
    dual_view_losses,
    original_view_loss,
    without_spatial_mean,
)

CASES = {case["case"]: case for case in arguments("dfm")["cases"]}
LOSSES = {"spat": (original_view_loss, 0), "freq": (alternative_view_loss, 1)}


@pytest.mark.golden
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("term", LOSSES)
@pytest.mark.parametrize("case", CASES)
def test_view_loss_gives_released_value_and_gradient_when_maps_are_given(case, term, dtype):
    released, (loss, alpha) = under(golden("dfm"), f"{case}/"), LOSSES[term]

    def compute(dtype: torch.dtype) -> dict[str, Tensor]:
        arrays = under(inputs("dfm", dtype), f"{case}/")
        student = arrays["s_tokens"].requires_grad_()
        value = CASES[case]["alpha"][alpha] * loss(student, arrays["t_map"].flatten(2).mT)
        value.backward()
        return {"loss": value, "gradient": student.grad}

    assert_recorded(compute, dtype, {"loss": released[f"{term}_f64"], "gradient": released[f"grad_{term}_f64"]})


@pytest.mark.golden
@pytest.mark.parametrize("norm", ["none", "ortho"])
@pytest.mark.parametrize("case", CASES)
def test_removing_the_mean_equals_zeroing_the_first_dct_coefficient_when_transform_is_scaled(case, norm):
    arrays, scaling = golden("dfm"), None if norm == "none" else norm
    x = arrays[f"{case}/dct_x"].double()
    coefficients = torch.from_numpy(dctn(x.numpy(), axes=(-2, -1), norm=scaling))
    high_frequencies = coefficients.clone()
    high_frequencies[..., 0, 0] = 0
    high_pass = torch.from_numpy(idctn(high_frequencies.numpy(), axes=(-2, -1), norm=scaling))
    ours = without_spatial_mean(x.flatten(2).mT).mT.unflatten(2, x.shape[2:])
    got = {"dct": coefficients, "idct_of_dct": x, "highpass": ours}
    assert_recorded(lambda _: got, torch.float64, {name: arrays[f"{case}/{name}_{norm}_f64"] for name in got})
    assert_recorded(lambda _: {"phi": ours}, torch.float64, {"phi": high_pass})


def test_removing_the_mean_equals_zeroing_the_first_dct_coefficient_when_grid_is_not_square():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 9, dtype=torch.float64)
    coefficients = dctn(x.numpy(), axes=(-2, -1))
    coefficients[..., 0, 0] = 0
    high_pass = torch.from_numpy(idctn(coefficients, axes=(-2, -1)))
    ours = without_spatial_mean(x.flatten(2).mT).mT.unflatten(2, (5, 9))
    torch.testing.assert_close(ours, high_pass, rtol=1e-13, atol=1e-14)


def test_original_view_loss_is_two_minus_two_cosines_when_tokens_are_compared():
    torch.manual_seed(0)
    p, t = torch.randn(3, 6, 5, dtype=torch.float64), torch.randn(3, 6, 5, dtype=torch.float64)
    expected = 2 * (1 - F.cosine_similarity(p, t, dim=2)).sum() / 3
    torch.testing.assert_close(original_view_loss(p, t), expected)


def test_alternative_view_loss_is_unmoved_when_a_channel_is_shifted_everywhere():
    torch.manual_seed(0)
    p, t, shift = torch.randn(2, 9, 4).double(), torch.randn(2, 9, 4).double(), torch.randn(2, 1, 4).double()
    torch.testing.assert_close(alternative_view_loss(p + shift, t), alternative_view_loss(p, t))
    assert (original_view_loss(p + shift, t) - original_view_loss(p, t)).abs() > 0.1


@pytest.mark.parametrize("loss", [original_view_loss, alternative_view_loss])
def test_view_loss_is_summed_in_float32_when_features_are_half_precision(loss):
    torch.manual_seed(0)
    p, t = torch.randn(2, 49, 64).bfloat16(), torch.randn(2, 49, 64).half()
    value = loss(p, t)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(p.float(), t.float()))


@pytest.mark.parametrize("loss", [original_view_loss, alternative_view_loss])
def test_view_loss_names_both_shapes_when_they_differ(loss):
    with pytest.raises(InputError, match=r"\(2, 4, 8\).*\(2, 1, 8\)"):
        loss(torch.zeros(2, 4, 8), torch.zeros(2, 1, 8))


def test_dual_view_losses_name_the_paths_that_are_given():
    torch.manual_seed(0)
    p, q, t = torch.randn(3, 2, 4, 5).double()
    losses = dual_view_losses("stage4", {"original": p, "alternative": q}, t)
    assert losses == {
        "stage4_original": original_view_loss(p, t),
        "stage4_alternative": alternative_view_loss(q, t),
    }
    assert list(dual_view_losses("stage3", {"alternative": p}, t)) == ["stage3_alternative"]
