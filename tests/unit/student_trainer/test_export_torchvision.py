"""Students that are networks of torchvision: exported by its names, loaded by it and as backbones."""

import json
from dataclasses import replace

import pytest
import torch
import torchvision
from safetensors.torch import load_file

from feature_store.errors import InputError, MismatchError
from student_trainer.export import ExportConfig, export
from student_trainer.students.backbone import fpn_backbone, load_backbone
from student_trainer.students.load import describe_student, save_student
from student_trainer.students.preprocessing import Preprocessing
from student_trainer.students.student import Student

HOW = Preprocessing((64, 64), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "bilinear", 1.0)


@pytest.fixture
def exported(tmp_path):
    """Export a network by its name in torchvision; the folder and the student."""

    def make(name: str):
        root = tmp_path / name
        root.mkdir()
        torch.manual_seed(0)
        student = Student(f"torchvision:{name}", 7, HOW.input_size).train()
        with torch.no_grad():
            student(torch.randn(4, 3, 64, 64))  # batch statistics must be exported too
        save_student(root / "best.safetensors", describe_student(student, HOW), student.model.state_dict())
        export(ExportConfig(run=root / "best.safetensors", out=root / "out", backbone=True))
        return root / "out", student.eval()

    return make


def test_export_loads_in_torchvision_with_equal_logits(exported):
    folder, student = exported("mobilenet_v3_small")
    net = torchvision.models.get_model("mobilenet_v3_small", num_classes=7).eval()
    net.load_state_dict(load_file(folder / "model.safetensors"))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(net(images), student(images).logits)
    config = json.loads((folder / "config.json").read_text())
    assert (config["architecture"], config["num_classes"]) == ("torchvision:mobilenet_v3_small", 7)
    assert config["pretrained_cfg"]["mean"] == [0.5, 0.4, 0.3]


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "swin_t"])
def test_backbone_gives_the_students_maps_to_a_detector(exported, name):
    folder, student = exported(name)
    backbone = load_backbone(folder)
    assert not any(key.startswith(("classifier", "head")) for key in backbone.weights)
    with_fpn = fpn_backbone(backbone).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        maps = list(with_fpn.body(images).values())
        expected = student(images).maps
        levels = with_fpn(torch.randn(1, 3, 96, 128))
    assert [tuple(each.shape[2:]) for each in maps] == [(16, 16), (8, 8), (4, 4), (2, 2)]
    for got, norm, ours in zip(maps[2:], with_fpn.body.norms[2:], expected, strict=True):
        torch.testing.assert_close(got, norm(ours), rtol=1e-3, atol=1e-4)
    assert tuple(levels["0"].shape) == (1, 256, 24, 32)
    assert len(levels) == 5


def test_backbone_is_refused_when_its_weights_are_of_another_network(exported):
    backbone = load_backbone(exported("mobilenet_v3_small")[0])
    with pytest.raises(MismatchError, match=r"shape of features.*torchvision:mobilenet_v3_large"):
        fpn_backbone(replace(backbone, name="torchvision:mobilenet_v3_large"))
    with pytest.raises(InputError, match="knows no classifier 'mobilenet'"):
        fpn_backbone(replace(backbone, name="torchvision:mobilenet"))
