import pytest
import timm
import torch

from feature_store.errors import InputError
from feature_store.teacher import split_teacher

SWIN = {"img_size": 64, "window_size": 2, "depths": (1, 1, 2, 2), "embed_dim": 24, "num_heads": (1, 2, 4, 8)}
TEACHERS = {
    "swin": ("swin_tiny_patch4_window7_224", SWIN, 64),
    "swin_patch2": ("swin_tiny_patch4_window7_224", {**SWIN, "patch_size": 2, "window_size": 4}, 64),
    "swin_oblong": ("swin_tiny_patch4_window7_224", {**SWIN, "img_size": (64, 128)}, (64, 128)),
    "vit_class_token": ("test_vit", {}, 160),
    "vit_no_prefix": ("test_vit", {"class_token": False, "global_pool": "avg"}, 160),
    "vit_registers": ("test_vit", {"reg_tokens": 4}, 160),
    "deit_distilled": ("deit_tiny_distilled_patch16_224", {"depth": 4, "embed_dim": 48, "num_heads": 3}, 224),
}


def teacher(name):
    model_name, kwargs, size = TEACHERS[name]
    torch.manual_seed(0)
    height, width = (size, size) if isinstance(size, int) else size
    return timm.create_model(model_name, **kwargs).eval(), torch.randn(2, 3, height, width)


@pytest.mark.parametrize("name", TEACHERS)
def test_later_blocks_of_the_stage3_output_are_bitwise_the_models_final_features(name):
    model, images = teacher(name)
    early, later = split_teacher(model)
    with torch.no_grad():
        assert torch.equal(later(early(images)), model.forward_features(images))


@pytest.mark.parametrize("name", TEACHERS)
def test_later_blocks_of_grid_tokens_are_bitwise_the_models_grid_tokens(name):
    model, images = teacher(name)
    early, later = split_teacher(model)
    with torch.no_grad():
        stage3, final = early(images), model.forward_features(images)
        prefix = later.info.prefix_tokens
        if later.info.family == "swin":
            tokens, prefix_BPD, expected = stage3.flatten(1, 2), None, final.flatten(1, 2)
        else:
            tokens, prefix_BPD, expected = stage3[:, prefix:], stage3[:, :prefix], final[:, prefix:]
        assert torch.equal(later(tokens, prefix_BPD), expected)
    assert tokens.shape[1:] == (later.grid_tokens, later.info.input_dim)
    assert expected.shape[1:] == (later.info.output_grid[0] * later.info.output_grid[1], later.info.output_dim)


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_split_depth_moves_the_cut_of_a_vit(depth):
    model, images = teacher("vit_class_token")
    early, later = split_teacher(model, depth)
    assert len(later.blocks) == depth == later.info.depth
    with torch.no_grad():
        assert torch.equal(later(early(images)), model.forward_features(images))


def test_split_takes_the_last_quarter_of_a_vit_by_default():
    with torch.device("meta"):
        model = timm.create_model("vit_large_patch14_clip_224")
    assert split_teacher(model)[1].info.depth == 6


def test_early_stages_and_later_blocks_share_out_the_weights():
    model, _ = teacher("swin")
    total = {name for name, _ in model.named_parameters() if not name.startswith("head")}
    early, later = split_teacher(model)
    sizes = [sum(p.numel() for p in part.parameters()) for part in (early, later)]
    assert sum(sizes) == sum(p.numel() for name, p in model.named_parameters() if name in total)


def test_later_blocks_pass_gradients_but_never_learn_or_leave_eval_mode():
    model, images = teacher("vit_class_token")
    early, later = split_teacher(model)
    later.train()
    assert not any(module.training for module in later.modules())
    tokens = early(images).detach().requires_grad_()
    later(tokens).sum().backward()
    assert tokens.grad is not None
    assert tokens.grad.abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in later.parameters())


def test_split_refuses_when_family_is_unknown():
    with pytest.raises(InputError, match="cannot split a ResNet"):
        split_teacher(timm.create_model("test_resnet"))


@pytest.mark.parametrize(("name", "depth"), [("swin", 1), ("vit_class_token", 0), ("vit_class_token", 6)])
def test_split_refuses_when_depth_is_impossible(name, depth):
    with pytest.raises(InputError, match=f"depth {depth} is not possible"):
        split_teacher(teacher(name)[0], depth)


def test_later_blocks_refuse_when_tokens_or_prefix_do_not_fit():
    model, images = teacher("vit_class_token")
    early, later = split_teacher(model)
    stage3 = early(images)
    with pytest.raises(InputError, match=r"take \[B, 101, 64\], got \(2, 100, 64\).*need prefix_BPD"):
        later(stage3[:, 1:])
    with pytest.raises(InputError, match=r"prefix tokens have shape \(2, 2, 64\), expected \(2, 1, 64\)"):
        later(stage3[:, 1:], stage3[:, :2])


@pytest.mark.parametrize("name", ["vit_class_token", "vit_registers", "deit_distilled"])
def test_later_blocks_run_on_grid_tokens_alone_when_the_prefix_is_dropped(name):
    model, images = teacher(name)
    early, later = split_teacher(model, 2, drop_prefix=True)
    prefix = later.info.prefix_tokens
    assert (prefix > 0, later.info.prefix) == (True, "dropped")
    with torch.no_grad():
        stage3 = early(images)
        alone = expected = stage3[:, prefix:]
        for block in model.blocks[-2:]:
            expected = block(expected)
        assert torch.equal(later(alone), model.norm(expected))
        assert torch.equal(later(stage3), model.forward_features(images))  # the teacher's own pass keeps them


def test_later_blocks_refuse_prefix_tokens_when_they_are_dropped():
    model, images = teacher("vit_class_token")
    early, later = split_teacher(model, drop_prefix=True)
    stage3 = early(images)
    with pytest.raises(InputError, match="grid tokens alone .*leave out prefix_BPD"):
        later(stage3[:, 1:], stage3[:, :1])
    with pytest.raises(InputError, match=r"take \[B, 101, 64\], got \(2, 99, 64\)"):
        later(stage3[:, 2:])


@pytest.mark.parametrize("name", ["swin", "vit_no_prefix"])
def test_split_refuses_to_drop_a_prefix_when_there_is_none(name):
    with pytest.raises(InputError, match="take no prefix tokens that could be dropped"):
        split_teacher(teacher(name)[0], drop_prefix=True)
