from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_jobs import TinyTeacher

from feature_store.errors import ResourceError
from feature_store.teacher.model import Teacher, TeacherOutput, load_teacher, prepare_for_gpu
from teacher_service.cache.forward import Forward
from teacher_service.cache.stage_timer import StageTimer


@pytest.fixture
def teacher(tiny_swin: TinyTeacher) -> Teacher:
    return load_teacher(tiny_swin.name, checkpoint=tiny_swin.checkpoint, model_kwargs=tiny_swin.model_kwargs)


@pytest.fixture
def pixels() -> torch.Tensor:
    """Seven images."""
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (7, 32, 32, 3), np.uint8))


def _limit_memory(teacher: Teacher, monkeypatch: pytest.MonkeyPatch, images: int) -> list[int]:
    """Let passes of more images run out of memory; gives the sizes tried."""
    tried, forward = [], teacher.forward

    def limited(pixels_BHWC: torch.Tensor, taps: Sequence[str]) -> TeacherOutput:
        tried.append(len(pixels_BHWC))
        if len(pixels_BHWC) > images:
            raise torch.OutOfMemoryError("no room\nfor this")
        return forward(pixels_BHWC, taps)

    monkeypatch.setattr(teacher, "forward", limited)
    return tried


@pytest.mark.parametrize("batch_size", [16, 7, 3, 1])
def test_forward_gives_what_the_teacher_gives_whatever_its_batch_size(
    teacher: Teacher, pixels: torch.Tensor, batch_size: int
) -> None:
    expected, timer = teacher(pixels), StageTimer()

    arrays = Forward(teacher, ["stage4", "stage3"], batch_size, timer)(pixels).arrays()

    assert arrays.keys() == {"stage4", "stage3", "logits"}
    for name, values in arrays.items():
        wanted = expected.logits if name == "logits" else expected.taps[name]
        np.testing.assert_allclose(values, wanted, rtol=1e-3, atol=1e-4)
    assert timer.times().busy["forward"] > 0


def test_forward_halves_its_batches_for_good_when_memory_runs_out(
    teacher: Teacher, pixels: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = teacher(pixels).taps["stage4"]
    tried = _limit_memory(teacher, monkeypatch, 2)
    forward = Forward(teacher, ["stage4"], 8, StageTimer())

    arrays = forward(pixels).arrays()
    forward(pixels[:4])

    np.testing.assert_allclose(arrays["stage4"], expected, rtol=1e-3, atol=1e-4)
    assert tried == [7, 4, 2, 2, 2, 1, 2, 2]
    assert forward.batch_size == 2


def test_forward_says_what_to_do_when_one_image_is_too_much(
    teacher: Teacher, pixels: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    _limit_memory(teacher, monkeypatch, 0)

    with pytest.raises(ResourceError, match="single image: no room; use a GPU with more memory"):
        Forward(teacher, ["stage4"], 4, StageTimer())(pixels)


def test_forward_compiles_one_shape_when_the_last_batch_is_smaller(
    teacher: Teacher, pixels: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]):
        shapes.append([tuple(each.shape) for each in inputs if each.dtype == torch.uint8])
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    expected = teacher(pixels)

    arrays = Forward(teacher, ["stage4"], 4, StageTimer(), compile=True)(pixels).arrays()

    assert [each for each in shapes if each] == [[(4, 32, 32, 3)]]
    assert len(arrays["stage4"]) == len(arrays["logits"]) == 7
    np.testing.assert_allclose(arrays["stage4"], expected.taps["stage4"], rtol=1e-3, atol=1e-4)


def test_preparing_for_a_gpu_keeps_the_teachers_numbers(teacher: Teacher, pixels: torch.Tensor) -> None:
    expected = teacher(pixels)

    prepare_for_gpu(teacher)

    attention = [module for module in teacher.modules() if hasattr(module, "fused_attn")]
    assert attention
    assert all(module.fused_attn for module in attention)
    convolution = teacher.model.patch_embed.proj.weight  # pyright: ignore[reportAttributeAccessIssue]
    assert convolution.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(teacher(pixels).taps["stage4"], expected.taps["stage4"], rtol=1e-3, atol=1e-4)


def test_features_note_the_gpus_time_by_stage_when_its_events_have_happened() -> None:
    from teacher_service.cache.forward import Features, PendingBatch

    waited, timer = [], StageTimer()

    def event(name: str) -> SimpleNamespace:
        return SimpleNamespace(synchronize=lambda: waited.append(name), elapsed_time=lambda end: 1500.0)

    events = {stage: (event("begin"), event(stage)) for stage in ("transfer", "forward", "copy out")}
    part = PendingBatch({"stage4": torch.arange(12.0).reshape(4, 3, 1)}, 3, events)

    arrays = Features([part, part], timer).arrays()

    assert waited == ["transfer", "forward", "copy out"] * 2
    assert timer.times().busy == {"transfer": 3, "forward": 3, "copy out": 3, "decode": 0, "encode": 0, "write": 0}
    assert arrays["stage4"][:, 0, 0].tolist() == [0, 3, 6, 0, 3, 6]  # without the padding
