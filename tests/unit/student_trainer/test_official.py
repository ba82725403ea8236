"""Loading of released weights: names, prefixes, nesting and refusals; the golden tests check the numbers."""

import pytest
import timm
import torch
from golden_files import arguments, golden, swin, under
from timm.layers.patch_embed import PatchEmbed
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from feature_store.errors import InputError
from student_trainer.methods.cap import CrossAttentionProjector
from student_trainer.official import load_projector, load_swin, load_vit, projector_names

pytestmark = pytest.mark.golden


def projector(**change) -> CrossAttentionProjector:
    args = {"student_dim": 12, "teacher_dim": 16, "query_hw": (4, 4), "key_hw": (4, 4), "num_heads": 2}
    return CrossAttentionProjector(**{**args, **change})


@pytest.fixture
def projector_state():
    return under(golden("cap_a"), "param/")


@pytest.fixture
def teacher_state():
    """``backbone.*`` and ``head.*``, as the released classifiers save themselves."""
    return under(golden("e2e_teacher"), "param/")


def tiny_swin(**change) -> SwinTransformer:
    args, arch = arguments("e2e_teacher"), arguments("e2e_teacher")["arch"]
    kwargs = {"embed_dim": arch["embed_dims"], "depths": arch["depths"], "num_heads": arch["num_heads"]}
    return SwinTransformer(
        **{"window_size": args["window_size"], "num_classes": args["num_classes"], **kwargs, **change}
    )


def test_projector_names_cover_every_released_leaf_when_listed(projector_state):
    ours = projector()
    assert projector_names(ours).keys() == projector_state.keys()
    assert set(projector_names(ours).values()) == set(ours.state_dict())


@pytest.mark.parametrize(
    "prefix", ["", "distill_losses.loss_fmd_s3.projector_0.", "s3/projector_1/", "module.projector_0."]
)
@pytest.mark.parametrize("nested", [False, True])
def test_load_projector_finds_the_projector_when_names_are_prefixed(projector_state, prefix, nested):
    state = {f"{prefix}{name}": leaf for name, leaf in projector_state.items()}
    if prefix:
        state["student.head.fc.weight"] = torch.zeros(1)
    ours = projector()
    load_projector(ours, {"state_dict": state, "meta": {}} if nested else state)
    assert torch.equal(ours.position, projector_state["pos_embed"])
    assert torch.equal(ours.query_proj[0].weight, projector_state["proj_pos.0.weight"].flatten(1))


def test_load_projector_takes_the_named_one_when_there_are_several(projector_state):
    state = {f"a.{name}": leaf for name, leaf in projector_state.items()}
    state |= {f"b.{name}": leaf + 1 for name, leaf in projector_state.items()}
    ours = projector()
    with pytest.raises(InputError, match=r"found 'a\.', 'b\.'; pass the prefix"):
        load_projector(ours, state)
    load_projector(ours, state, prefix="b.")
    torch.testing.assert_close(ours.position, projector_state["pos_embed"] + 1)


def test_load_projector_leaves_the_query_out_when_ours_has_none(projector_state):
    ours = projector(learned_query=False)
    load_projector(ours, projector_state)
    torch.testing.assert_close(ours.to_q.weight, projector_state["pos_attention.q.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student_dim": 10}, r"pos_embed .* shape \(1, 12, 4, 4\), position .* has \(1, 10, 4, 4\)"),
        ({"query_hw": (4, 5)}, r"query.weight .* shape \(16, 16\), query .* has \(20, 16\)"),
        ({"norm": "layer"}, r"proj_student.1.running_mean .* has no place"),
    ],
)
def test_load_projector_names_the_leaf_and_both_shapes_when_dimensions_differ(projector_state, change, message):
    with pytest.raises(InputError, match=message):
        load_projector(projector(**change), projector_state)


def test_load_projector_names_the_leaf_when_it_is_missing(projector_state):
    del projector_state["query.weight"]
    with pytest.raises(InputError, match="nothing for query of"):
        load_projector(projector(), projector_state)


def test_load_projector_refuses_when_there_is_no_projector(teacher_state):
    with pytest.raises(InputError, match="expected one released projector, found none"):
        load_projector(projector(), teacher_state)


@pytest.mark.parametrize("prefix", ["", "teacher.", "module.teacher.", "module."])
@pytest.mark.parametrize("nested", [False, True])
def test_load_swin_finds_the_teacher_when_names_are_prefixed(teacher_state, prefix, nested):
    state = {f"{prefix}{name}": leaf for name, leaf in teacher_state.items()}
    if "teacher" in prefix:
        state["student.backbone.conv1.weight"] = torch.zeros(1)
    model = tiny_swin()
    load_swin(model, {"meta": {}, "state_dict": state} if nested else state)
    for name, leaf in swin("e2e_teacher", torch.float32).state_dict().items():
        assert torch.equal(model.state_dict()[name], leaf)


def test_load_swin_leaves_the_classifier_out_when_ours_has_none(teacher_state):
    model = tiny_swin(num_classes=0)
    load_swin(model, teacher_state)
    assert torch.equal(model.norm.weight, teacher_state["backbone.norm3.weight"])


def test_load_swin_keeps_merging_channels_apart_when_order_differs(teacher_state):
    """timm[(2 j + i) C + c] = released[4 c + 2 i + j] for row offset i and column offset j."""
    model, channels = tiny_swin(), arguments("e2e_teacher")["arch"]["embed_dims"]
    load_swin(model, teacher_state)
    released = teacher_state["backbone.stages.0.downsample.reduction.weight"]
    for c in range(channels):
        for i in range(2):
            for j in range(2):
                ours = model.layers[1].downsample.reduction.weight[:, (2 * j + i) * channels + c]
                assert torch.equal(ours, released[:, 4 * c + 2 * i + j])


def test_load_swin_skips_index_buffers_when_the_checkpoint_has_them(teacher_state):
    teacher_state["backbone.stages.0.blocks.0.attn.w_msa.relative_position_index"] = torch.zeros(49, 49).long()
    load_swin(tiny_swin(), teacher_state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"num_classes": 7},
            r"head.fc.weight .* shape \(10, 32\), head.fc.weight of this SwinTransformer has \(7, 32\)",
        ),
        ({"depths": (1, 1, 2, 1)}, r"stages.3.blocks.1.norm1.weight .* has no place in this SwinTransformer"),
        ({"depths": (1, 1, 2, 3)}, r"nothing for layers.3.blocks.2."),
        ({"embed_dim": 8}, r"patch_embed.projection.weight .* shape \(4, 3, 4, 4\), patch_embed.proj.weight"),
    ],
)
def test_load_swin_names_the_leaf_when_architectures_differ(teacher_state, change, message):
    with pytest.raises(InputError, match=message):
        load_swin(tiny_swin(**change), teacher_state)


def test_load_swin_refuses_when_the_classifier_is_missing(teacher_state):
    state = {name: leaf for name, leaf in teacher_state.items() if not name.startswith("head.")}
    with pytest.raises(InputError, match=r"nothing for head\.fc\.bias, head\.fc\.weight"):
        load_swin(tiny_swin(), state)


def test_load_swin_changes_nothing_when_it_refuses(teacher_state):
    model = tiny_swin(num_classes=7)
    before = {name: leaf.clone() for name, leaf in model.state_dict().items()}
    with pytest.raises(InputError):
        load_swin(model, teacher_state)
    assert all(torch.equal(leaf, before[name]) for name, leaf in model.state_dict().items())


def test_load_swin_refuses_when_given_another_model(teacher_state):
    with pytest.raises(InputError, match="got a ResNet"):
        load_swin(timm.create_model("test_resnet", pretrained=False), teacher_state)


def test_load_vit_takes_the_classifier_when_both_have_one():
    args, arch, state = arguments("tpp_vit"), arguments("tpp_vit")["arch"], under(golden("tpp_vit"), "param/")
    state["head.layers.head.weight"], state["head.layers.head.bias"] = (
        torch.randn(3, arch["embed_dims"]),
        torch.randn(3),
    )
    model = VisionTransformer(
        img_size=args["img_size"], patch_size=args["patch_size"], embed_dim=arch["embed_dims"],
        depth=arch["num_layers"], num_heads=arch["num_heads"], mlp_ratio=2, num_classes=3,
    )  # fmt: skip
    load_vit(
        model, {f"backbone.{name}" if not name.startswith("head.") else name: leaf for name, leaf in state.items()}
    )
    assert isinstance(model.patch_embed, PatchEmbed)
    assert torch.equal(model.head.weight, state["head.layers.head.weight"])
    assert torch.equal(model.blocks[3].mlp.fc2.weight, state["layers.3.ffn.layers.1.weight"])


def official_eva(model: VisionTransformer) -> dict[str, torch.Tensor]:
    """A timm model's weights under the names of the released EVA teacher, whose norm follows the pooling."""
    names = {
        "patch_embed.proj.": "patch_embed.projection.", "blocks.": "layers.", ".norm1.": ".ln1.", ".norm2.": ".ln2.",
        ".mlp.fc1.": ".ffn.layers.0.0.", ".mlp.fc2.": ".ffn.layers.1.", "fc_norm.": "ln2.",
    }  # fmt: skip
    state = {}
    for name, leaf in model.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        state[name.replace("head.", "head.fc.") if name.startswith("head.") else f"backbone.{name}"] = leaf
    return state


def test_load_vit_fills_the_norm_after_pooling_when_the_teacher_is_eva():
    shape = {"img_size": 28, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
    released, model = (timm.create_model("eva_large_patch14_196", **shape) for _ in range(2))
    with torch.no_grad():
        for leaf in released.parameters():
            leaf.normal_()
    state = official_eva(released)
    assert "backbone.ln2.weight" in state
    load_vit(model, {f"teacher.{name}": leaf for name, leaf in state.items()})
    assert all(torch.equal(leaf, released.state_dict()[name]) for name, leaf in model.state_dict().items())


def test_load_vit_refuses_when_the_model_is_not_a_transformer():
    with pytest.raises(InputError, match="has no place in this Linear"):
        load_vit(nn.Linear(2, 2), under(golden("tpp_vit"), "param/"))
