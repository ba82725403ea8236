import pytest
import timm
import torch
import torchvision

import student_trainer.students.student
from feature_store.errors import InputError
from student_trainer.students.networks import TORCHVISION_RESNETS
from student_trainer.students.student import Student

SWIN = {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 4), "window_size": 2}
RELPOS = {"img_size": 64, "embed_dim": 96, "depth": 4, "num_heads": 3}
FAMILIES = [  # name, extra arguments, dims and grids of stages 3 and 4 at 64 x 64
    ("test_resnet", {}, (192, 96), ((4, 4), (2, 2))),
    ("test_efficientnet", {}, (48, 256), ((4, 4), (2, 2))),
    ("mobilenetv3_small_050", {}, (24, 288), ((4, 4), (2, 2))),
    ("test_convnext", {}, (48, 64), ((4, 4), (2, 2))),
    ("swin_tiny_patch4_window7_224", SWIN, (64, 128), ((4, 4), (2, 2))),
    ("test_vit", {}, (64, 64), ((4, 4), (4, 4))),
    ("vit_relpos_small_patch16_224", RELPOS, (96, 96), ((4, 4), (4, 4))),
    ("mixer_s16_224", {}, (512, 512), ((4, 4), (4, 4))),
    ("test_mambaout", {}, (48, 64), ((4, 4), (2, 2))),  # its final map has channels last
    ("hiera_tiny_224", {"embed_dim": 8, "num_heads": 1, "stages": (1, 1, 1, 1)}, (32, 64), ((4, 4), (2, 2))),
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
    build = student_trainer.students.student.build_network
    monkeypatch.setattr(
        "student_trainer.students.student.build_network",
        lambda name, kwargs, size, pretrained: asked.append(pretrained) or build(name, kwargs, size),
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
    monkeypatch.setattr("student_trainer.students.student.build_network", lambda *_, **__: torch.nn.Linear(3, 5))
    with pytest.raises(InputError, match=r"'test_resnet' \(Linear\) does not give intermediate maps; expected a timm"):
        Student("test_resnet", 5, (64, 64))


def module_outputs(student, *names):
    """Maps of a random image, and what the named modules gave for it."""
    seen = {}
    for name in names:
        student.model.get_submodule(name).register_forward_hook(lambda _m, _i, out, name=name: seen.update({name: out}))
    with torch.no_grad():
        maps = student.eval()(torch.randn(2, 3, 64, 64)).maps
    return maps, [seen[name] for name in names]


def test_student_ends_in_the_normed_map_when_the_model_is_a_swin():
    maps, (stage3, normed) = module_outputs(
        Student("swin_tiny_patch4_window7_224", 5, (64, 64), SWIN), "layers.2", "norm"
    )
    for got, expected in zip(maps, (stage3, normed), strict=True):
        assert torch.equal(got, expected.permute(0, 3, 1, 2))


def test_student_ends_in_the_normed_map_when_a_convnext_norms_before_pooling():
    thin = {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 32]}
    student = Student("convnext_tiny", 5, (64, 64), {**thin, "head_norm_first": True})
    maps, (stage3, normed) = module_outputs(student, "stages.2", "norm_pre")
    assert torch.equal(maps[0], stage3)
    assert torch.equal(maps[1], normed)
    maps, (raw,) = module_outputs(Student("convnext_tiny", 5, (64, 64), thin), "stages.3")
    assert torch.equal(maps[1], raw)


@pytest.mark.parametrize(("blocks", "third"), [(8, 5), (12, 9), (2, 0)])
def test_student_takes_raw_blocks_when_the_model_is_a_mixer(blocks, third):
    student = Student("mixer_b14_224", 5, (64, 64), {"num_blocks": blocks, "embed_dim": 32, "patch_size": 16})
    maps, outputs = module_outputs(student, f"blocks.{third}", f"blocks.{blocks - 1}")
    for got, tokens in zip(maps, outputs, strict=True):
        assert torch.equal(got.flatten(2).transpose(1, 2), tokens)


def test_student_norms_twice_when_it_is_the_released_vit_b14():
    student = Student(
        "vit_base_patch14_two_norms_224", 5, (56, 56), {"embed_dim": 32, "depth": 4, "num_heads": 2}
    ).eval()
    assert (student.dims, student.grids) == ((32, 32), ((4, 4), (4, 4)))
    images = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        student.model.fc_norm.weight.normal_()
        output = student(images)
        pooled = output.maps[1].mean(dim=(2, 3))
        torch.testing.assert_close(output.logits, student.model.head(student.model.fc_norm(pooled)))
        assert torch.equal(output.logits, student.model(images))


@pytest.mark.parametrize(
    ("name", "kwargs", "stages"),
    [
        ("levit_128s", {}, (0, 1)),  # reductions 16, 32, 64
        ("test_resnet", {}, (3, 4)),  # 2, 4, 8, 16, 32
    ],
)
def test_student_takes_reductions_16_and_32_when_it_has_them(name, kwargs, stages):
    student = Student(name, 5, (64, 64), kwargs)
    assert student.grids == ((4, 4), (2, 2))
    info = student.model.feature_info
    assert student.dims == tuple(info[stage]["num_chs"] for stage in stages)


DILATED = {"output_stride": 16}  # test_resnet then has reductions 2, 4, 8, 16, 16


def test_student_is_refused_by_name_when_a_reduction_is_missing():
    with pytest.raises(
        InputError, match=r"'test_resnet' has stages of reductions 2, 4, 8, 16, 16, expected 16 and then"
    ):
        Student("test_resnet", 5, (64, 64), DILATED)
    with pytest.raises(InputError, match=r"two of its stages 0 to 4 with --student-stages, e.g. 3 4"):
        Student("test_resnet", 5, (64, 64), DILATED)


def test_student_takes_the_stages_it_is_asked_for_when_they_are_given():
    student = Student("test_resnet", 5, (64, 64), DILATED, stages=(2, 4))
    assert student.grids == ((8, 8), (4, 4))
    student = Student("test_vit", 5, (64, 64), stages=(1, 4))
    maps, outputs = module_outputs(student, "blocks.1", "blocks.4")
    for got, tokens in zip(maps, outputs, strict=True):  # not the last block: no norm
        assert torch.equal(got.flatten(2).transpose(1, 2), tokens[:, student.model.num_prefix_tokens :])


@pytest.mark.parametrize("stages", [(4, 3), (3, 3), (-1, 2), (3, 5)])
def test_student_is_refused_when_the_stages_asked_for_do_not_rise_within_it(stages):
    with pytest.raises(
        InputError, match=r"--student-stages is .* two rising indices from 0 to 4: student 'test_resnet'"
    ):
        Student("test_resnet", 5, (64, 64), stages=stages)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_student_is_torchvisions_network_when_named_so(name):
    torch.manual_seed(0)
    theirs = torchvision.models.get_model(name, num_classes=5).eval()
    student = Student(f"torchvision:{name}", 5, (64, 64)).eval()
    student.model.load_state_dict(theirs.state_dict())  # the same names and shapes
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(student(images).logits, theirs(images))
    assert (student.name, student.grids) == (name, ((4, 4), (2, 2)))


TORCHVISION = [  # name, modules of stages 3 and 4, whether their maps have channels last
    ("mobilenet_v3_small", "features.8", "features.12", False),
    ("efficientnet_b0", "features.5", "features.8", False),
    ("regnet_y_400mf", "trunk_output.block3", "trunk_output.block4", False),
    ("convnext_tiny", "features.5", "features.7", False),
    ("shufflenet_v2_x0_5", "stage3", "conv5", False),
    ("mnasnet0_5", "layers.11", "layers.16", False),
    ("densenet121", "features.denseblock3", "features.norm5", False),
    ("swin_t", "features.5", "permute", True),
]


@pytest.mark.parametrize(("name", "third", "fourth", "last"), TORCHVISION, ids=[each[0] for each in TORCHVISION])
def test_student_finds_the_stages_of_a_torchvision_network(name, third, fourth, last):
    torch.manual_seed(0)
    student = Student(f"torchvision:{name}", 5, (64, 64)).eval()
    assert (student.name, student.grids) == (f"torchvision:{name}", ((4, 4), (2, 2)))
    net, seen = student.model.net, {}
    for at, module in (("third", third), ("fourth", fourth)):
        net.get_submodule(module).register_forward_hook(lambda _m, _i, out, at=at: seen.update({at: out}))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        output = student(images)
        assert torch.equal(output.maps[0], seen["third"].permute(0, 3, 1, 2) if last else seen["third"])
        assert torch.equal(output.maps[1], seen["fourth"])
        assert torch.equal(output.logits, net(images))
    assert output.logits.shape == (2, 5)
    assert student.dims == tuple(stage.shape[1] for stage in output.maps)


def test_torchvision_student_learns_through_both_maps_and_gives_plain_logits_in_training():
    student = Student("torchvision:googlenet", 5, (64, 64), {"aux_logits": True, "init_weights": False}).train()
    output = student(torch.randn(2, 3, 64, 64))
    assert output.logits.shape == (2, 5)
    sum(stage.mean() for stage in output.maps).backward()
    assert student.model.net.conv1.conv.weight.grad.abs().sum() > 0


def test_torchvision_student_starts_from_a_files_weights(tmp_path):
    theirs = torchvision.models.get_model("mobilenet_v3_small", num_classes=5)
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    student = Student("torchvision:mobilenet_v3_small", 5, (64, 64), {"checkpoint_path": str(tmp_path / "w.pth")})
    assert student.model.weights().keys() == theirs.state_dict().keys()
    assert torch.equal(student.model.net.classifier[3].weight, theirs.classifier[3].weight)
    assert student.model_kwargs == {"num_classes": 5}


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("mobilenet_v3_smal", {}, "knows no classifier 'mobilenet_v3_smal'; did you mean mobilenet_v3_small"),
        ("squeezenet1_1", {}, r"stages of reductions 2, 4, 8, 16, expected 16 and then 32.*--student-stages, e.g. 2 3"),
        ("vit_b_32", {"image_size": 64}, "'torchvision:vit_b_32' .* does not give intermediate maps"),
        ("mobilenet_v3_small", {"pretrained": True}, "download its weights and give the file as checkpoint_path"),
        ("densenet121", {"no_such": 1}, "torchvision cannot build 'densenet121' with .*no_such"),
    ],
)
def test_torchvision_student_is_refused_by_name_when_it_cannot_be_used(name, kwargs, message):
    with pytest.raises(InputError, match=message):
        Student(f"torchvision:{name}", 5, (64, 64), kwargs)


def test_torchvision_student_takes_the_stages_it_is_asked_for():
    assert Student("torchvision:squeezenet1_1", 5, (64, 64), stages=(1, 3)).grids == ((15, 15), (3, 3))


def test_every_torchvision_resnet_has_the_weights_of_timms_network():
    with torch.device("meta"):
        for name in TORCHVISION_RESNETS:
            theirs, ours = torchvision.models.get_model(name).state_dict(), timm.create_model(name).state_dict()
            assert {key: leaf.shape for key, leaf in theirs.items()} == {key: leaf.shape for key, leaf in ours.items()}
