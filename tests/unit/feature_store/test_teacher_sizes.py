"""The teachers users name, full size on the meta device: names, shapes and sizes, without weights."""

import pytest
import torch

from feature_store.errors import InputError
from feature_store.teacher import split_teacher
from feature_store.teacher.model import build_model, teacher_info
from feature_store.teacher.taps import tap_shapes

# name: family, parameters of the later blocks, depth, input size, F^t, stage 3, prefix tokens, classes
TEACHERS = {
    "swin_small_patch4_window7_224": ("swin", 15_368_112, 2, 224, (49, 768), (196, 384), 0, 1000),
    "swin_base_patch4_window7_224": ("swin", 27_306_560, 2, 224, (49, 1024), (196, 512), 0, 1000),
    "swin_large_patch4_window7_224": ("swin", 61_407_072, 2, 224, (49, 1536), (196, 768), 0, 1000),
    "vit_large_patch14_clip_224": ("vit", 75_579_392, 6, 224, (256, 1024), (256, 1024), 1, 1000),
    "beit_large_patch16_224": ("beit", 75_653_760, 6, 224, (196, 1024), (196, 1024), 1, 1000),
    "beitv2_large_patch16_224": ("beit", 75_653_760, 6, 224, (196, 1024), (196, 1024), 1, 1000),
    "eva_large_patch14_196": ("vit", 75_577_344, 6, 196, (196, 1024), (196, 1024), 1, 1000),
    "eva_large_patch14_336": ("vit", 75_577_344, 6, 336, (576, 1024), (576, 1024), 1, 1000),
    "eva02_large_patch14_224": ("eva", 75_599_856, 6, 224, (256, 1024), (256, 1024), 1, 0),
    "eva02_large_patch14_448": ("eva", 75_599_856, 6, 448, (1024, 1024), (1024, 1024), 1, 1000),
    "vit_large_patch14_dinov2": ("vit", 75_591_680, 6, 518, (1369, 1024), (1369, 1024), 1, 0),
    "vit_large_patch14_reg4_dinov2": ("vit", 75_591_680, 6, 518, (1369, 1024), (1369, 1024), 5, 0),
    "vit_large_patch16_dinov3": ("eva", 75_573_248, 6, 256, (256, 1024), (256, 1024), 5, 0),
    "vit_7b_patch16_dinov3": ("eva", 1_678_221_312, 10, 256, (256, 4096), (256, 4096), 5, 0),
}


def block_parameters(width, hidden, *, biases=True, q_and_v_bias=False, layer_scale=True, gated=False):
    """Weights of one transformer block, counted from its sizes."""
    attention = 4 * width * width + width + (3 * width if biases else 2 * width if q_and_v_bias else 0)
    mlp = (3 * width * hidden + 2 * hidden + width) if gated else (2 * width * hidden + hidden + width)
    return attention + mlp + 4 * width + (2 * width if layer_scale else 0)


@pytest.mark.parametrize("name", TEACHERS)
def test_full_size_teacher_has_the_shapes_of_its_paper(name):
    family, parameters, depth, size, final, stage3, prefix, classes = TEACHERS[name]
    with torch.device("meta"):
        model = build_model(name)
        early, later = split_teacher(model)
    info, split = teacher_info(model, name, {}, "float32", sha256=""), later.info
    assert (split.family, split.depth, split.prefix_tokens) == (family, depth, prefix)
    assert (info.input_size, info.num_classes) == ((size, size), classes)
    shapes = {"stage4": final, "stage3": stage3, **({"stage3_prefix": (prefix, stage3[1])} if prefix else {})}
    assert tap_shapes(split).standard == shapes
    assert sum(parameter.numel() for parameter in later.parameters()) == parameters
    with torch.no_grad():  # on the meta device a forward pass is only its shapes
        early_BND = early(torch.empty(2, 3, size, size, device="meta"))
        tokens = torch.empty(2, *stage3, device="meta")
        prefix_BPD = torch.empty(2, prefix, stage3[1], device="meta") if prefix else None
        assert later(early_BND).shape == model.forward_features(torch.empty(2, 3, size, size, device="meta")).shape
        assert later(tokens, prefix_BPD).shape == (2, *final)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vit_large_patch14_clip_224", 6 * block_parameters(1024, 4096, layer_scale=False) + 2 * 1024),
        ("vit_large_patch14_dinov2", 6 * block_parameters(1024, 4096) + 2 * 1024),
        (
            "beit_large_patch16_224",
            6 * (block_parameters(1024, 4096, biases=False, q_and_v_bias=True) + 16 * (27 * 27 + 3)),
        ),
        ("vit_large_patch16_dinov3", 6 * block_parameters(1024, 4096, biases=False) + 2 * 1024),
        ("vit_7b_patch16_dinov3", 10 * block_parameters(4096, 8192, biases=False, gated=True) + 2 * 4096),
    ],
)
def test_later_blocks_have_the_parameters_their_sizes_give(name, expected):
    assert TEACHERS[name][1] == expected


@pytest.mark.parametrize("name", ["vit_large_patch14_dinov2", "vit_large_patch16_dinov3"])
def test_input_size_follows_img_size_when_a_teacher_is_made_smaller(name):
    with torch.device("meta"):
        model = build_model(name, {"img_size": 224})
        _, later = split_teacher(model)
    patch = 14 if "14" in name else 16
    assert teacher_info(model, name, {}, "float32", sha256="").input_size == (224, 224)
    assert later.info.input_grid == later.info.output_grid == (224 // patch, 224 // patch)


def test_depth_moves_the_cut_of_the_largest_teacher_and_is_refused_beyond_it():
    with torch.device("meta"):
        model = build_model("vit_7b_patch16_dinov3")
        assert len(split_teacher(model, 4)[1].blocks) == 4
    with pytest.raises(InputError, match=r"depth 40 is not possible: the teacher has 40 blocks, expected 1\.\.39"):
        split_teacher(model, 40)
