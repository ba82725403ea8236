"""Exported backbones under Mask R-CNN and UperNet: the weights arrive, and one real step trains on COCO-format data."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from torchvision.models._utils import IntermediateLayerGetter

from examples import detection, segmentation
from examples.coco import CocoInstances, average_precision
from examples.detection import DetectionConfig, mask_rcnn, train_detector, train_step
from examples.detection import make_optimizer as detection_optimizer
from examples.segmentation import (
    IGNORED,
    SceneParsing,
    SegmentationConfig,
    UperNet,
    mean_iou,
    train_segmenter,
)
from examples.segmentation import make_optimizer as segmentation_optimizer
from examples.segmentation import train_step as segmentation_step
from feature_store.errors import InputError, MismatchError
from student_trainer.engine.checkpoint import Checkpoint, Progress, rng_state, save_checkpoint
from student_trainer.export import ExportConfig, export
from student_trainer.students.backbone import TimmPyramid, fpn_backbone, load_backbone
from student_trainer.students.load import describe_student
from student_trainer.students.preprocessing import Preprocessing
from student_trainer.students.student import Student

# pycocotools' mask decoding predates numpy 2's copy keyword
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

SIDE = 64
SWIN = {"embed_dim": 16, "depths": [1, 1, 2, 2], "num_heads": [1, 1, 2, 2], "window_size": 2}
STUDENTS = {
    "resnet18": {},
    "resnet50": {},
    "swin_tiny_patch4_window7_224": SWIN,
    "test_vit": {"depth": 4},
}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Folder of an exported student by architecture; made once each."""
    root, done = tmp_path_factory.mktemp("exports"), {}

    def make(name):
        if name not in done:
            torch.manual_seed(0)
            student = Student(name, 5, (SIDE, SIDE), STUDENTS[name]).train()
            with torch.no_grad():
                student.model(torch.randn(4, 3, SIDE, SIDE))  # batch statistics must arrive too
            how = Preprocessing((SIDE, SIDE), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "bilinear", 1.0)
            state = Checkpoint(
                student=describe_student(student, how), weights=student.model.state_dict(), loss={}, optimizer={},
                progress=Progress(), rng=rng_state(),
            )  # fmt: skip
            save_checkpoint(root / f"{name}.pt", state)
            export(ExportConfig(run=root / f"{name}.pt", out=root / name, backbone=True))
            done[name] = student.model.eval()
        return root / name, done[name]

    yield make
    shutil.rmtree(root)  # 400 MB


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """Six images of one square or disc each, as COCO instances, and as class maps in ADE20K's layout."""
    root, rng = tmp_path_factory.mktemp("coco"), np.random.default_rng(0)
    images, annotations = [], []
    for split in ("training", "validation"):
        (root / "images" / split).mkdir(parents=True)
        (root / "annotations" / split).mkdir(parents=True)
    for i in range(6):
        width, height = (int(side) for side in rng.integers(56, 80, 2))
        picture, classes = Image.new("RGB", (width, height), "grey"), Image.new("L", (width, height))
        x, y, size = (int(rng.integers(4, 16)), int(rng.integers(4, 16)), int(rng.integers(20, 32)))
        corners = (x, y, x + size, y + size)
        draw = "rectangle" if i % 2 else "ellipse"
        getattr(ImageDraw.Draw(picture), draw)(corners, fill="red" if i % 2 else "blue")
        getattr(ImageDraw.Draw(classes), draw)(corners, fill=1 + i % 2)
        for split in ("training", "validation"):
            picture.save(root / "images" / split / f"{i}.png")
            classes.save(root / "annotations" / split / f"{i}.png")
        images.append({"id": 10 + i, "file_name": f"{i}.png", "width": width, "height": height})
        outline = [x, y, x + size, y, x + size, y + size, x, y + size]
        common = {"image_id": 10 + i, "iscrowd": 0, "area": size * size, "segmentation": [outline]}
        annotations.append({"id": i + 1, "category_id": (7, 3)[i % 2], "bbox": [x, y, size, size], **common})
    images.append({"id": 99, "file_name": "0.png", "width": 8, "height": 8})  # no objects
    categories = [{"id": 3, "name": "square"}, {"id": 7, "name": "disc"}]
    file = root / "instances.json"
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return root, root / "images" / "training", file


def detection_config(folder, coco, tmp_path, **changes) -> DetectionConfig:
    _, images, annotations = coco
    return DetectionConfig(
        backbone=folder, images=images, annotations=annotations, out=tmp_path / "out",
        **{"min_size": SIDE, "max_size": 96, "batch_size": 2, "workers": 0, "warmup": 0, "lr": 0.01, **changes},
    )  # fmt: skip


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_torchvision_resnet_gives_timms_maps_when_it_got_the_exported_weights(exported, name):
    folder, model = exported(name)
    body = fpn_backbone(load_backbone(folder)).body.eval()
    assert isinstance(body, IntermediateLayerGetter)  # torchvision's own, not timm's
    images = torch.randn(2, 3, SIDE, SIDE)
    with torch.no_grad():
        expected = model.forward_intermediates(images, indices=[1, 2, 3, 4], intermediates_only=True)
        got = list(body(images).values())
    assert len(got) == 4
    for ours, theirs in zip(got, expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-3 * theirs.abs().max()


@pytest.mark.parametrize("name", ["resnet18", "test_vit"])
def test_pyramid_gives_the_students_maps_at_four_reductions_when_loaded(exported, name):
    folder, model = exported(name)
    pyramid = TimmPyramid(load_backbone(folder)).eval()
    images = torch.randn(2, 3, SIDE, SIDE)
    indices = [1, 2, 3, 4] if name == "resnet18" else [0, 1, 2, 3]
    with torch.no_grad():
        maps = list(pyramid(images).values())
        expected = model.forward_intermediates(images, indices=indices, intermediates_only=True)
    assert [tuple(m.shape[2:]) for m in maps] == [(16, 16), (8, 8), (4, 4), (2, 2)]
    at = {"resnet18": 3, "test_vit": 2}[name]  # where the reduction is the network's own
    torch.testing.assert_close(maps[at], pyramid.norms[at](expected[at]), rtol=1e-3, atol=1e-3)


def test_swin_pyramid_takes_any_size_and_shifts_its_last_windows_when_built_for_large_images(exported):
    folder, model = exported("swin_tiny_patch4_window7_224")
    pyramid = TimmPyramid(load_backbone(folder))
    assert [tuple(m.shape[1:]) for m in pyramid(torch.randn(1, 3, 96, 160)).values()] == [
        (16, 24, 40), (32, 12, 20), (64, 6, 10), (128, 3, 5)
    ]  # fmt: skip
    assert model.layers[3].blocks[1].shift_size == (0, 0)
    assert pyramid.net.model.layers[3].blocks[1].shift_size == (1, 1)
    own = pyramid.net.model.state_dict()
    assert all(torch.equal(own[name], leaf) for name, leaf in model.state_dict().items() if name in own)


@pytest.mark.parametrize("name", ["resnet50", "swin_tiny_patch4_window7_224"])
def test_mask_rcnn_trains_the_exported_backbone_when_stepped_on_coco_data(exported, coco, tmp_path, name):
    folder, _ = exported(name)
    config = detection_config(folder, coco, tmp_path, opt="sgd" if name == "resnet50" else "adamw")
    data = CocoInstances(config.images, config.annotations, train=True)
    torch.manual_seed(0)
    backbone = load_backbone(folder)
    model = mask_rcnn(backbone, data.num_classes, config)
    last = "layer4.2.conv3.weight" if name == "resnet50" else "net.model.layers.3.blocks.1.mlp.fc2.weight"
    before = model.backbone.body.state_dict()[last].clone()
    assert torch.equal(before, backbone.weights[last.removeprefix("net.model.")])
    images, targets = zip(*(data[i] for i in range(2)), strict=True)
    torch.manual_seed(1)  # the proposals that are trained on are drawn
    with torch.no_grad():
        expected = sum(model.train()(list(images), list(targets)).values()).item()
    torch.manual_seed(1)
    loss = train_step(model, detection_optimizer(config, model), images, targets, CPU)
    assert loss == pytest.approx(expected, rel=1e-3)
    assert not torch.equal(model.backbone.body.state_dict()[last], before)
    if name == "resnet50":  # the stem and first stage are frozen, as in torchvision's recipe
        assert torch.equal(
            model.backbone.body.state_dict()["layer1.0.conv1.weight"], backbone.weights["layer1.0.conv1.weight"]
        )


@pytest.mark.parametrize("name", ["resnet18", "swin_tiny_patch4_window7_224", "test_vit"])
def test_upernet_trains_the_exported_backbone_when_stepped(exported, coco, tmp_path, name):
    folder, _ = exported(name)
    config = SegmentationConfig(
        backbone=folder, data=coco[0], out=tmp_path, num_classes=2, crop=SIDE, warmup=0, lr=1e-3
    )
    data = SceneParsing(config.data, "training", 2, SIDE)
    torch.manual_seed(0)
    model = UperNet(load_backbone(folder), 2, channels=16)
    images, labels = (torch.stack(part) for part in zip(*(data[i] for i in range(4)), strict=True))
    before = {name: value.clone() for name, value in model.named_parameters()}
    optimizer = segmentation_optimizer(config, model)
    losses = [segmentation_step(model, optimizer, images, labels) for _ in range(4)]
    assert losses[-1] < losses[0]
    frozen = {name for name, value in model.named_parameters() if torch.equal(value, before[name])}
    assert not frozen
    assert model(images[:, :, :50, :40]).shape == (4, 2, 50, 40)


def test_commands_train_and_score_when_run_on_generated_data(exported, coco, tmp_path, capsys):
    folder, _ = exported("resnet18")
    root, images, everything = coco
    described = json.loads(everything.read_text())
    annotations = tmp_path / "two.json"  # images, that is one step
    annotations.write_text(
        json.dumps({**described, "images": described["images"][:2], "annotations": described["annotations"][:2]})
    )
    detect = f"--backbone {folder} --images {images} --annotations {annotations} --out {tmp_path / 'd'}"
    small = "--epochs 1 --batch-size 2 --min-size 64 --max-size 96 --workers 0 --warmup 0 --lr 0.001 --device cpu"
    assert (
        detection.main(
            [*detect.split(), "--val-images", str(images), "--val-annotations", str(annotations), *small.split()]
        )
        == 0
    )
    scores = json.loads(capsys.readouterr().out.split("\n", 1)[1])
    assert scores.keys() == {"loss", "box_ap", "mask_ap"}
    segment = f"--backbone {folder} --data {root} --out {tmp_path / 's'} --num-classes 2 --steps 2"
    small = "--batch-size 3 --crop 64 --channels 16 --workers 0 --device cpu"
    assert segmentation.main([*segment.split(), *small.split()]) == 0
    assert 0 <= json.loads(capsys.readouterr().out)["miou"] <= 100
    assert (tmp_path / "d" / "model.pt").is_file()
    assert (tmp_path / "s" / "model.pt").is_file()


def test_detection_rate_warms_up_and_falls_twice_when_trained(exported, coco, tmp_path, monkeypatch):
    folder, _ = exported("resnet18")
    rates = []

    def step(model, optimizer, images, targets, device) -> float:
        rates.append(optimizer.param_groups[0]["lr"])
        return 0.0

    monkeypatch.setattr("examples.detection.train_step", step)
    monkeypatch.setattr(torch, "save", lambda *_: None)
    config = detection_config(folder, coco, tmp_path, epochs=12, warmup=4, lr=0.1, device="cpu")
    train_detector(config)  # three steps an epoch
    assert rates[:5] == pytest.approx([1e-4, 0.0251, 0.0501, 0.0751, 0.1])
    assert rates[5:24] == pytest.approx([0.1] * 19)
    assert rates[24:33] == pytest.approx([0.01] * 9)  # from epoch 9 of 12 on
    assert rates[33:] == pytest.approx([0.001] * 3)  # and in epoch 12


@pytest.mark.parametrize(
    ("opt", "middle"),
    [("sgd", 0.01 * 0.5**0.9), ("adamw", 6e-5 * 0.5)],  # mmsegmentation's schedules: poly 0.9, linear
)
def test_segmentation_rate_warms_up_and_decays_by_the_recipes_power_when_trained(coco, tmp_path, opt, middle):
    config = SegmentationConfig(backbone=tmp_path, data=coco[0], out=tmp_path, opt=opt, steps=1000, warmup=100)
    peak = {"sgd": 0.01, "adamw": 6e-5}[opt]
    power = {"sgd": 0.9, "adamw": 1.0}[opt]
    assert config.rate(500) == pytest.approx(middle)
    assert config.rate(0) == pytest.approx(peak / 100)
    assert config.rate(49) == pytest.approx(0.5 * peak * 0.951**power)
    assert config.rate(999) == pytest.approx(peak * 0.001**power)


def test_coco_data_is_what_the_file_says_when_read(coco):
    _, images, annotations = coco
    data = CocoInstances(images, annotations, train=False)
    assert (len(data), data.num_classes, data.category_ids) == (7, 3, (0, 3, 7))
    assert len(CocoInstances(images, annotations, train=True)) == 6
    image, target = data[1]
    described = data.coco.loadAnns(2)[0]
    x, y, width, height = described["bbox"]
    assert target["boxes"].tolist() == [[x, y, x + width, y + height]]
    assert target["labels"].tolist() == [1]
    inside = target["masks"][0].bool()
    assert abs(int(inside.sum()) - width * height) <= 2 * (width + height)
    assert image[0][inside].min() == 1.0  # red


def test_mirrored_objects_stay_on_their_pixels_when_training(coco):
    _, images, annotations = coco
    data = CocoInstances(images, annotations, train=True)
    torch.manual_seed(0)
    seen = set()
    for _ in range(8):
        image, target = data[1]
        assert image[0][target["masks"][0].bool()].min() == 1.0
        columns = target["masks"][0].any(0).nonzero()
        left, _, right, _ = target["boxes"][0].tolist()
        assert abs(left - columns.min()) <= 1
        assert abs(right - columns.max() - 1) <= 1
        seen.add(left)
    assert len(seen) == 2


def test_average_precision_is_full_when_detections_are_the_truth_and_zero_when_there_are_none(coco):
    _, images, annotations = coco
    data = CocoInstances(images, annotations, train=False)
    perfect = []
    for i in range(6):
        _, target = data[i]
        found = {**target, "scores": torch.ones(1), "masks": target["masks"][:, None].float()}
        perfect.append((int(target["image_id"]), found))
    assert average_precision(data, perfect) == pytest.approx({"box_ap": 100.0, "mask_ap": 100.0})
    assert average_precision(data, []) == {"box_ap": 0.0, "mask_ap": 0.0}


def test_mean_iou_counts_pixels_when_half_of_a_class_is_found(coco):
    data = SceneParsing(coco[0], "validation", 2, SIDE)

    class FirstClass(torch.nn.Module):
        def forward(self, images):
            return torch.stack([torch.ones_like(images[:, 0]), torch.zeros_like(images[:, 0])], dim=1)

    labels = [data[i][1] for i in range(len(data))]
    first, second = (sum(int((one == k).sum()) for one in labels) for k in (0, 1))
    expected = 100 * (first / (first + second) + 0) / 2
    assert mean_iou(FirstClass(), data, 2, CPU) == pytest.approx(expected, abs=1e-3)
    assert IGNORED in labels[0]


def test_backbone_holds_all_but_the_classifier_when_exported(exported):
    folder, model = exported("resnet18")
    weights = load_file(folder / "backbone.safetensors")
    assert model.state_dict().keys() - weights.keys() == {"fc.weight", "fc.bias"}
    plain = timm.create_model("resnet18", num_classes=0)
    plain.load_state_dict(weights)


def test_backbone_is_refused_when_the_export_lacks_it_or_is_another_architectures(exported, tmp_path):
    with pytest.raises(InputError, match="holds no exported backbone .*export --run RUN --out FOLDER --backbone"):
        load_backbone(tmp_path)
    backbone = load_backbone(exported("resnet18")[0])
    with pytest.raises(MismatchError, match=r"shape of layer1.0.\S+ differs: torchvision's ResNet"):
        fpn_backbone(replace(backbone, name="resnet50"))
    with pytest.raises(MismatchError, match="shape of .* differs: timm's resnet26"):
        TimmPyramid(replace(backbone, name="resnet26"))
    with pytest.raises(InputError, match="mixer_s32_224 takes images of one size only"):
        TimmPyramid(replace(backbone, name="mixer_s32_224"))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("detection --images . --annotations absent.json", "annotations absent.json do not exist"),
        ("detection --images . --annotations a --val-images .", "give --val-images and --val-annotations together"),
        ("detection --images . --annotations a --batch-size 0", "--batch-size is 0, expected at least 1"),
        ("segmentation --data absent", "holds no .jpg or .png"),
        ("segmentation --data absent --crop 100", "--crop is 100, expected a multiple of 32"),
    ],
)
def test_command_says_what_is_wrong_when_its_input_is(exported, tmp_path, capsys, command, message):
    folder, _ = exported("resnet18")
    example, *arguments = command.split()
    main = {"detection": detection.main, "segmentation": segmentation.main}[example]
    assert main([*arguments, "--backbone", str(folder), "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


def test_training_is_refused_before_it_begins_when_it_could_not_be_scored(exported, coco, tmp_path):
    folder, _ = exported("resnet18")
    root, images, annotations = coco
    described = json.loads(annotations.read_text())
    other = tmp_path / "other.json"
    other.write_text(json.dumps({**described, "categories": [{"id": 3, "name": "square"}], "annotations": []}))
    config = detection_config(folder, coco, tmp_path, val_images=images, val_annotations=other)
    with pytest.raises(MismatchError, match=r"category ids differs: .*instances.json has \(3, 7\), got \(3,\)"):
        train_detector(config)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "training").symlink_to(root / "images" / "training")
    with pytest.raises(InputError, match=r"validation holds no .jpg or .png"):
        train_segmenter(SegmentationConfig(backbone=folder, data=tmp_path, out=tmp_path / "out", workers=0))
    assert not (tmp_path / "out").exists()


def test_segmentation_labels_are_refused_when_they_exceed_the_classes(coco):
    data = SceneParsing(coco[0], "training", 1, SIDE)
    with pytest.raises(InputError, match="labels up to 2, expected one channel and at most --num-classes 1"):
        data[1]


def test_weights_are_refused_when_one_is_missing(exported, tmp_path):
    folder, _ = exported("resnet18")
    weights = load_file(folder / "backbone.safetensors")
    del weights["layer2.0.conv1.weight"]
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    save_file(weights, tmp_path / "backbone.safetensors")
    with pytest.raises(MismatchError, match="shape of layer2.0.conv1.weight differs"):
        fpn_backbone(load_backbone(tmp_path))
