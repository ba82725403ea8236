import pytest
import torch

from feature_store.errors import InputError
from feature_store.teacher.model import load_teacher
from feature_store.teacher.own import is_own, require_named

CODE = """
import torch
from torch import nn

CONFIG = {"input_size": (3, 24, 16), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.2)}


class Cnn(nn.Module):
    def __init__(self, classes=3, config=CONFIG, width=6):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 4, 4), nn.Conv2d(4, width, 2, 2)
        self.num_classes, self.pretrained_cfg = classes, config
        self.head = nn.Linear(width, classes or 1)

    def forward_intermediates(self, images, indices=None):
        maps = [self.first(images)]
        maps.append(self.second(maps[0]))
        wanted = range(2) if indices is None else indices
        return maps[1].relu(), [maps[i] for i in wanted]

    def forward_head(self, features):
        return self.head(features.mean(dim=(2, 3)))


class Values(Cnn):
    def forward_intermediates(self, images, indices=None):
        assert images.sum().item() == images.sum().item()  # reads values, which the meta device has not
        return super().forward_intermediates(images, indices)


class Headless(Cnn):
    forward_head = None


def build(**arguments):
    torch.manual_seed(0)
    return Cnn(**arguments)


def without_config():
    return Cnn(config=None)


def half_a_config():
    return Cnn(config={"input_size": (3, 8, 8)})


def no_module():
    return "a string"


def broken():
    return {}["gone"]


NUMBER = 7
"""


@pytest.fixture
def own(own_module) -> str:
    own_module("own_cnn", CODE)
    return "own_cnn"


@pytest.mark.parametrize("build", ["build", "Values"])
def test_own_teacher_gives_its_final_map_blocks_and_logits(own, build):
    torch.manual_seed(0)
    teacher = load_teacher(f"{own}:{build}")
    assert (teacher.info.input_size, teacher.info.num_classes, teacher.info.mean) == ((24, 16), 3, (0.5, 0.4, 0.3))
    assert (teacher.split.depth, teacher.split.output_grid, teacher.split.output_dim) == (0, (3, 2), 6)
    assert (teacher.tap_shapes, teacher.taps.of("block0")) == ({"stage4": (6, 6)}, (24, 4))
    assert teacher.later_blocks is None
    pixels = torch.randint(0, 256, (2, 24, 16, 3), dtype=torch.uint8)
    mean, std = (torch.tensor(values) for values in (teacher.info.mean, teacher.info.std))
    images = ((pixels / 255 - mean) / std).permute(0, 3, 1, 2)
    output = teacher(pixels, ["stage4", "block0", "block1"])
    with torch.no_grad():
        final, maps = teacher.model.forward_intermediates(images)
        expected = {"stage4": final, "block0": maps[0], "block1": maps[1]}
        for tap, map_BCHW in expected.items():
            torch.testing.assert_close(output.taps[tap], map_BCHW.flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(output.logits, teacher.model.forward_head(final), rtol=1e-4, atol=1e-5)


def test_own_teacher_takes_arguments_and_weights_from_a_file(own, tmp_path):
    first = load_teacher(f"{own}:build", model_kwargs={"width": 8})
    assert first.split.output_dim == 8
    assert first.info.model_kwargs == {"width": 8}
    weights = {name: tensor + 1 for name, tensor in first.model.state_dict().items()}
    torch.save(weights, tmp_path / "w.pt")
    second = load_teacher(f"{own}:build", model_kwargs={"width": 8}, checkpoint=tmp_path / "w.pt")
    assert second.info.weights_sha256 != first.info.weights_sha256
    assert torch.equal(second.model.head.bias, weights["head.bias"])
    with pytest.raises(InputError, match=r"w.pt does not fit own_cnn:build: .*size mismatch"):
        load_teacher(f"{own}:build", checkpoint=tmp_path / "w.pt")


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("no_such_module:build", {}, "^teacher no_such_module:build: No module named .*PYTHONPATH=FOLDER"),
        ("own_cnn:bild", {}, "^teacher own_cnn:bild: module 'own_cnn' has no attribute 'bild'"),
        ("own_cnn:NUMBER", {}, "^teacher own_cnn:NUMBER is 7, expected a function that returns the teacher"),
        ("own_cnn:build", {"deep": 3}, "^teacher own_cnn:build cannot be called with {'deep': 3}: .*deep"),
        ("own_cnn:broken", {}, "^teacher own_cnn:broken failed with {}: KeyError: 'gone'; call it in Python"),
        ("own_cnn:no_module", {}, "own_cnn:no_module gave a str, expected a torch module .*own-teacher.md"),
        ("own_cnn:without_config", {}, "its attribute pretrained_cfg lacks input_size, mean, std; set it to"),
        ("own_cnn:half_a_config", {}, "its attribute pretrained_cfg lacks mean, std"),
        ("own_cnn:Headless", {}, "has num_classes 3 but no forward_head.*or set num_classes to 0"),
    ],
)
def test_own_teacher_is_refused_with_what_it_lacks(own, name, arguments, message):
    with pytest.raises(InputError, match=message):
        load_teacher(name, model_kwargs=arguments)


def test_own_teacher_is_refused_options_of_later_blocks(own):
    with pytest.raises(InputError, match=r"own_cnn:build has no later blocks.*leave out depth and drop_prefix"):
        load_teacher(f"{own}:build", depth=1)


def test_a_stores_own_teacher_is_never_imported_unasked():
    for name in (
        "hf-hub:timm/vit",
        "local-dir:/x",
        "swin_large_patch4_window7_224",
        "vit_base_patch16_224.augreg_in1k",
    ):
        assert not is_own(name)
        require_named(name)
    with pytest.raises(
        InputError, match=r"teacher is os:abort, which is code, and is imported only if you name it yourself"
    ):
        require_named("os:abort")
