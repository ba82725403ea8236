import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn
from training_world import samples, write_tar

from feature_store.errors import FailedError, InputError
from feature_store.inputs.tar import Tar
from student_trainer.engine.checkpoint import Checkpoint, Progress, rng_state, save_checkpoint
from student_trainer.evaluate import EvaluateConfig, Evaluator, count_flops, evaluate, forward_speed
from student_trainer.students.load import describe_student
from student_trainer.students.preprocessing import Normaliser, Preprocessing
from student_trainer.students.student import Student

# Python 3.12 and later warn of fork under threads
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")

HOW = Preprocessing((32, 32), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "bicubic", 0.875)


class ByColour(nn.Module):
    """Knows the test images' colours: red rises with the label; wrong for one label, and then right in the top five."""

    def __init__(self, classes: int = 8, confused: int | None = None) -> None:
        super().__init__()
        self.classes, self.confused = classes, confused

    def forward(self, images_BCHW):
        red = (images_BCHW.mean(dim=(2, 3)) * torch.tensor(HOW.std) + torch.tensor(HOW.mean))[:, 0] * 255
        label = ((red - 40) / 60).round().long()
        logits = torch.nn.functional.one_hot(label, self.classes).float()
        if self.confused is not None:
            logits[label == self.confused, (self.confused + 1) % self.classes] = 2.0
        return logits


@pytest.fixture
def tars(tmp_path):
    content = samples(10, seed=3, prefix="v")
    content[4]["png"] = b"junk"
    del content[7]["cls"]
    return [Tar.open(write_tar(tmp_path / "val.tar", content))]


def evaluator(tars, classes: int = 8, **changes) -> Evaluator:
    return Evaluator(tars, HOW, classes, **{"batch_size": 3, "device": torch.device("cpu"), **changes})


def test_accuracy_counts_top1_and_top5_when_some_predictions_are_wrong(tars):
    right = evaluator(tars)(ByColour())
    assert (right.top1, right.top5, right.samples) == (100.0, 100.0, 8)
    wrong = evaluator(tars)(ByColour(confused=1))  # samples 1, 5 and 9 have label 1
    assert wrong.top1 == pytest.approx(100 * 5 / 8)
    assert wrong.top5 == 100.0


def test_accuracy_names_what_could_not_be_read_when_images_or_labels_are_bad(tars):
    unreadable = evaluator(tars)(ByColour()).unreadable
    assert [line.split(":")[0] for line in unreadable] == ["val.tar/v004", "val.tar/v007"]
    assert "not an image" in unreadable[0]


def test_accuracy_is_the_same_when_batches_and_workers_differ(tars):
    model = ByColour(confused=1)
    assert evaluator(tars)(model) == evaluator(tars, batch_size=256, workers=1, start_method="fork")(model)


def test_accuracy_uses_all_classes_when_there_are_fewer_than_five(tars):
    assert evaluator(tars, classes=4)(ByColour(classes=4, confused=1)).top5 == 100.0


def test_model_keeps_its_mode_when_evaluated(tars):
    model = ByColour().train()
    seen = []
    model.register_forward_hook(lambda module, *_: seen.append(module.training))
    evaluator(tars)(model)
    assert model.training
    assert not any(seen)


def test_evaluation_is_refused_when_nothing_can_be_read(tmp_path):
    content = samples(2, seed=3)
    for sample in content:
        sample["png"] = b"junk"
    tars = [Tar.open(write_tar(tmp_path / "val.tar", content))]
    with pytest.raises(InputError, match=r"none of 2 validation images can be read, first: val.tar/s000"):
        evaluator(tars)(ByColour())


def test_evaluation_is_refused_when_a_label_is_out_of_range(tars):
    with pytest.raises(InputError, match=r"label of sample 'v002' in val.tar is 2, expected 0..1"):
        evaluator(tars, classes=2)(ByColour())


def test_normaliser_gives_zero_when_pixels_are_the_mean():
    pixels = torch.full((1, 2, 2, 3), 51, dtype=torch.uint8)
    images = Normaliser((0.2, 0.2, 0.0), (0.5, 0.25, 0.1), torch.device("cpu"))(pixels)
    assert images.shape == (1, 3, 2, 2)
    torch.testing.assert_close(images[0, :, 0, 0], torch.tensor([0.0, 0.0, 2.0]))


def test_config_is_refused_when_neither_or_both_of_run_and_checkpoint_are_given(tmp_path):
    for given in ({}, {"run": tmp_path, "checkpoint": tmp_path}):
        with pytest.raises(InputError, match="give either --run or --checkpoint"):
            EvaluateConfig(tars=("a",), **given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "--batch-size is 0, expected at least 1"),
        ({"workers": -1}, "--workers is -1, expected 0 or more"),
        ({"crop_pct": 0.0}, "--crop-pct is 0.0, expected above 0, at most 1"),
        ({"crop_pct": 1.01}, "--crop-pct is 1.01, expected above 0, at most 1"),
    ],
)
def test_config_is_refused_when_a_value_cannot_be_used(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        EvaluateConfig(tars=("a",), run=tmp_path, **changes)


def test_config_takes_the_least_and_the_largest_values_when_given(tmp_path):
    config = EvaluateConfig(tars=("a",), run=tmp_path, batch_size=1, workers=0, crop_pct=1.0)
    assert (config.batch_size, config.crop_pct, config.device) == (1, 1.0, "auto")


def test_accuracy_is_counted_per_class_when_one_is_confused(tars):
    found = evaluator(tars)(ByColour(confused=1))
    assert found.per_class == (100.0, 0.0, 100.0, 100.0, None, None, None, None)
    assert found.class_samples == (2, 3, 2, 1, 0, 0, 0, 0)  # samples 4 (label 0) and 7 (label 3) cannot be read
    assert sum(found.class_samples) == found.samples


def test_flops_count_multiply_adds_twice_when_layers_are_plain():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * 8 * 8, 5)).train()
    assert count_flops(model, torch.zeros(1, 3, 8, 8)) == 2 * (8 * 8 * 4 * 27) + 2 * (4 * 8 * 8 * 5)
    assert model.training


def test_forward_speed_is_images_over_median_seconds_when_passes_differ(monkeypatch):
    clock = iter([0.0, 9.0, 0.0, 1.0, 0.0, 2.0, 0.0, 4.0])  # warm-up, then passes of 1, 2 and 4 seconds
    monkeypatch.setattr("student_trainer.evaluate.time.perf_counter", lambda: next(clock))
    assert forward_speed(nn.Identity(), torch.zeros(10, 1), passes=3) == 5.0


@pytest.mark.parametrize(("name", "flops"), [("vit_small_patch16_224", 9.20e9), ("deit_tiny_patch16_224", 2.51e9)])
def test_flops_hold_attention_when_the_device_fuses_it(name, flops):
    model = timm.create_model(name)
    counted = count_flops(model, torch.zeros(1, 3, 224, 224))
    assert counted == pytest.approx(flops, rel=2e-3)
    assert counted == count_flops(model.to("meta"), torch.zeros(1, 3, 224, 224, device="meta"))


class Broken(ByColour):
    """Gives a value in place of some logits, for the images of one colour."""

    def __init__(self, value: float, label: int = 1) -> None:
        super().__init__()
        self.value, self.label = value, label

    def forward(self, images_BCHW):
        logits = super().forward(images_BCHW)
        logits[logits.argmax(dim=1) == self.label, 2] = self.value
        return logits


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_evaluation_fails_naming_an_image_when_logits_are_not_finite(tars, value):
    with pytest.raises(
        FailedError, match=r"NaN or infinite for 1 of 3 images of a batch, first val.tar/v001: "
    ) as caught:
        evaluator(tars)(Broken(value))
    assert caught.value.exit_code == 1


def test_evaluation_fails_when_all_logits_are_equal(tars):
    class Constant(nn.Module):
        def forward(self, images_BCHW):
            return torch.full((len(images_BCHW), 8), 0.25)

    with pytest.raises(FailedError, match="gives all 8 classes the same logit, for each of 8 images"):
        evaluator(tars)(Constant())


def test_evaluation_counts_when_there_is_one_class_only(tmp_path):
    class One(nn.Module):
        def forward(self, images_BCHW):
            return images_BCHW.new_ones(len(images_BCHW), 1)

    tar = Tar.open(write_tar(tmp_path / "one.tar", [{**s, "cls": "0"} for s in samples(3, seed=3)]))
    assert evaluator([tar], classes=1)(One()).top1 == 100.0


def picture_tar(path, pixels: np.ndarray) -> list[Tar]:
    """One image, labelled 0."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return [Tar.open(write_tar(path, [{"__key__": "k", "png": file.getvalue(), "cls": "0"}]))]


def pixels_seen(tars: list[Tar], **preprocessing: Any) -> np.ndarray:
    """What a student with this preprocessing is shown of the one image, as uint8 [H, W, 3]."""
    how, seen = replace(Preprocessing((32, 32), (0.0,) * 3, (1.0,) * 3, "bicubic", 1.0), **preprocessing), []

    class Watching(nn.Module):
        def forward(self, images_BCHW):
            seen.append((images_BCHW[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy())
            return torch.tensor([[1.0, 0.0]])

    Evaluator(tars, how, 2, device=torch.device("cpu"))(Watching())
    return seen[0]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_evaluated_images_are_resized_by_the_students_filter_when_it_names_one(tmp_path, interpolation):
    pixels = np.random.default_rng(0).integers(0, 256, (48, 48, 3), np.uint8)
    resized = Image.fromarray(pixels).resize((32, 32), getattr(Image.Resampling, interpolation.upper()))
    seen = pixels_seen(picture_tar(tmp_path / "t.tar", pixels), interpolation=interpolation)
    np.testing.assert_array_equal(seen, np.asarray(resized))


@pytest.mark.parametrize(("crop_pct", "margin"), [(1.0, 0), (0.5, 16)])
def test_evaluated_images_are_cropped_by_the_students_part_when_it_keeps_less(tmp_path, crop_pct, margin):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    side = 32 + 2 * margin  # resized to size / crop_pct, and the middle kept
    resized = np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC))
    seen = pixels_seen(picture_tar(tmp_path / "t.tar", pixels), crop_pct=crop_pct)
    inner = slice(4, -4)  # at its edges, a crop is resized without its surroundings
    np.testing.assert_array_equal(seen[inner, inner], resized[margin : margin + 32, margin : margin + 32][inner, inner])


@pytest.mark.parametrize(("asked", "brightest"), [(None, 1.0), (0.5, 0.2)])
def test_evaluation_crops_as_asked_when_the_checkpoint_says_otherwise(tmp_path, asked, brightest):
    framed = np.full((64, 64, 3), 255, np.uint8)
    framed[12:-12, 12:-12] = 51  # a white frame, outside the middle half
    picture_tar(tmp_path / "t.tar", framed)
    torch.manual_seed(0)
    student = Student("test_resnet", 2, (32, 32))
    how = Preprocessing((32, 32), (0.0,) * 3, (1.0,) * 3, "bilinear", 1.0)
    state = Checkpoint(
        student=describe_student(student, how), weights=student.model.state_dict(), loss={}, optimizer={},
        progress=Progress(), rng=rng_state(),
    )  # fmt: skip
    save_checkpoint(tmp_path / "s.pt", state)
    shown: list[torch.Tensor] = []
    hook = nn.modules.module.register_module_forward_pre_hook(lambda module, inputs: shown.append(inputs[0]))
    try:
        found = evaluate(
            EvaluateConfig(
                checkpoint=tmp_path / "s.pt", tars=(str(tmp_path / "t.tar"),), workers=0, crop_pct=asked, device="cpu"
            )
        )
    finally:
        hook.remove()
    values = [images.max().item() for images in shown if images.shape == (1, 3, 32, 32)]
    assert max(values) == pytest.approx(brightest, abs=1e-3)
    assert found.accuracy.samples == 1
    assert found.parameters == sum(leaf.numel() for leaf in student.model.parameters())
    assert found.flops == count_flops(student.model, torch.zeros(1, 3, 32, 32))
    assert min(found.images_per_second, found.forward_images_per_second) > 0
