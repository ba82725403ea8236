import pytest
import timm
import torch

import student_trainer.student
from feature_store.errors import InputError
from student_trainer.student import Student

SWIN = {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 4), "window_size": 2}
FAMILIES = [  # name, extra arguments, dims and grids of stages 3 and 4 at 64 x 64
    ("test_resnet", {}, (192, 96), ((4, 4), (2, 2))),
    ("test_efficientnet", {}, (48, 64), ((4, 4), (2, 2))),
    ("mobilenetv3_small_050", {}, (24, 288), ((4, 4), (2, 2))),
    ("test_convnext", {}, (48, 64), ((4, 4), (2, 2))),
    ("swin_tiny_patch4_window7_224", SWIN, (64, 128), ((4, 4), (2, 2))),
    ("test_vit", {}, (64, 64), ((4, 4), (4, 4))),
    ("test_vit_relpos", {"img_size": 64}, (96, 96), ((4, 4), (4, 4))),
    ("mixer_s16_224", {}, (512, 512), ((4, 4), (4, 4))),
]


@pytest.mark.parametrize(("name", "kwargs", "dims", "grids"), FAMILIES, ids=[family[0] for family in FAMILIES])
def test_student_finds_its_stages_when_built_by_name(name, kwargs, dims, grids):
    torch.manual_seed(0)
    student = Student(name, 5, (64, 64), kwargs)
    assert (student.dims, student.grids) == (dims, grids)
    assert student.training  # the dry forward pass must not leave it in eval mode
    output = student(torch.randn(3, 3, 64, 64))
    assert [tuple(stage.shape) for stage in output.maps] == [
        (3, dim, *grid) for dim, grid in zip(dims, grids, strict=True)
    ]
    assert output.logits.shape == (3, 5)


@pytest.mark.parametrize(("name", "kwargs"), [family[:2] for family in FAMILIES], ids=[f[0] for f in FAMILIES])
def test_student_logits_are_bitwise_the_models_when_in_eval_mode(name, kwargs):
    torch.manual_seed(0)
    student = Student(name, 5, (64, 64), kwargs).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(student(images).logits, student.model(images))


def test_student_takes_block_outputs_when_the_model_is_a_plain_vit():
    torch.manual_seed(0)
    student = Student("test_vit", 5, (64, 64)).eval()
    seen = {}
    model = student.model
    model.blocks[3].register_forward_hook(lambda _m, _i, out: seen.update(stage3=out))  # 6 blocks: 3/4 is the 4th
    model.norm.register_forward_hook(lambda _m, _i, out: seen.update(stage4=out))
    with torch.no_grad():
        maps = student(torch.randn(2, 3, 64, 64)).maps
    for got, name in zip(maps, ("stage3", "stage4"), strict=True):
        tokens = seen[name][:, model.num_prefix_tokens :]
        assert torch.equal(got.flatten(2).transpose(1, 2), tokens)


def test_student_takes_stage_outputs_when_the_model_is_a_cnn():
    torch.manual_seed(0)
    student = Student("test_resnet", 5, (64, 64)).eval()
    seen = {}
    student.model.layer3.register_forward_hook(lambda _m, _i, out: seen.update(stage3=out))
    student.model.layer4.register_forward_hook(lambda _m, _i, out: seen.update(stage4=out))
    with torch.no_grad():
        maps = student(torch.randn(2, 3, 64, 64)).maps
    assert torch.equal(maps[0], seen["stage3"])
    assert torch.equal(maps[1], seen["stage4"])


def test_student_keeps_random_state_and_batch_statistics_when_built():
    torch.manual_seed(0)
    student = Student("test_resnet", 5, (64, 64))
    after = torch.rand(3)
    torch.manual_seed(0)
    timm.create_model("test_resnet", num_classes=5)
    assert torch.equal(after, torch.rand(3))
    assert torch.equal(student.model.bn1.running_mean, torch.zeros_like(student.model.bn1.running_mean))


def test_student_starts_from_timms_weights_when_asked(monkeypatch):
    asked = []
    build = student_trainer.student.build_model
    monkeypatch.setattr(
        "student_trainer.student.build_model",
        lambda name, kwargs, pretrained: asked.append(pretrained) or build(name, kwargs),
    )
    student = Student("test_resnet", 5, (64, 64), {"pretrained": True})
    assert asked == [True]
    assert student.model_kwargs == {"num_classes": 5}  # a checkpoint of it is loaded without fetching anything


def test_student_starts_from_a_files_weights_when_asked_and_needs_it_no_more(tmp_path):
    torch.manual_seed(0)
    saved = Student("test_resnet", 5, (64, 64)).model.state_dict()
    torch.save(saved, tmp_path / "w.pth")
    student = Student("test_resnet", 5, (64, 64), {"checkpoint_path": str(tmp_path / "w.pth"), "drop_rate": 0.1})
    assert all(torch.equal(leaf, saved[name]) for name, leaf in student.model.state_dict().items())
    assert student.model_kwargs == {"drop_rate": 0.1, "num_classes": 5}


def test_student_adapts_positions_when_the_views_are_not_the_models_own_size():
    student = Student("test_vit", 5, (32, 48))
    assert student.grids == ((2, 3), (2, 3))
    assert student.model_kwargs["img_size"] == (32, 48)


@pytest.mark.parametrize(
    ("name", "kwargs", "size", "message"),
    [
        ("test_resnett", {}, (64, 64), r"knows no model 'test_resnett'; did you mean .*test_resnet"),
        ("test_resnet", {"no_such": 1}, (64, 64), r"cannot build 'test_resnet' with .*no_such"),
        ("vit_tiny_patch16_224", {"img_size": 160, "depth": 2}, (64, 64), r"cannot take 64 x 64 views: .*; choose"),
    ],
)
def test_student_is_refused_when_it_cannot_be_used(name, kwargs, size, message):
    with pytest.raises(InputError, match=message):
        Student(name, 5, size, kwargs)


def test_student_is_refused_when_the_model_gives_no_intermediate_maps(monkeypatch):
    monkeypatch.setattr("student_trainer.student.build_model", lambda *_, **__: torch.nn.Linear(3, 5))
    with pytest.raises(InputError, match=r"'test_resnet' \(Linear\) does not give intermediate maps; expected a timm"):
        Student("test_resnet", 5, (64, 64))
