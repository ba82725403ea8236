"""Later blocks against the released teachers' numbers, and TPP's way through them."""

from functools import cache

import pytest
import timm
import torch
from golden_files import DTYPES, arguments, assert_matches, golden, images, inputs, swin, under
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from feature_store.errors import InputError
from feature_store.teacher import split_teacher
from student_trainer.official import load_vit
from student_trainer.perception import TeacherParameterPerception

VITS = ("tpp_vit", "tpp_vitn")


def as_map(x_BND: Tensor, like: Tensor) -> Tensor:
    return x_BND.mT.reshape(like.shape)


def assert_path_matches(path: nn.Module, case: str, stage: str, dtype: torch.dtype) -> None:
    """Output and input gradient of a stage path on the recorded tokens."""
    arrays, expected = inputs(case, dtype), under(golden(case), f"{stage}/")
    own = under(arrays, f"{stage}/") if case == "tpp_swin" else arrays
    tokens = own["tokens_in"].requires_grad_()
    out = path(tokens)
    (out * own["cot"]).sum().backward()
    assert_matches(out, expected["out_f64"], "output")
    assert_matches(tokens.grad, expected["grad_in_f64"], "gradient")


@pytest.mark.parametrize("dtype", DTYPES)
def test_swin_later_blocks_give_released_stage4_path_when_released_weights_are_loaded(dtype):
    _, later = split_teacher(swin("tpp_swin", dtype))
    assert_path_matches(later, "tpp_swin", "s4", dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_swin_gives_released_maps_when_released_weights_are_loaded(dtype):
    model, expected = swin("tpp_swin", dtype), golden("tpp_swin")
    early, later = split_teacher(model)
    x = model.patch_embed(images("tpp_swin", dtype))
    maps = [x]
    for stage in model.layers:
        maps.append(x := stage(x))
    maps[-1] = later(early(images("tpp_swin", dtype)))
    for i, got in enumerate(maps):
        if f"full/out{i}_f64" in expected:
            assert_matches(got.movedim(-1, 1), expected[f"full/out{i}_f64"], f"map {i}")
        else:  # the first maps are recorded as excerpts of the float32 run
            corner, mean = (expected[f"full/out{i}_f32_{part}"] for part in ("8x8corner", "chanmean"))
            assert_matches(got[:, :8, :8].movedim(-1, 1), corner, f"corner of map {i}", tolerance=1e-5)
            assert_matches(got.mean(dim=(1, 2)), mean, f"mean of map {i}", tolerance=1e-5)


@cache
def vit(case: str, dtype: torch.dtype, *, class_token: bool) -> VisionTransformer:
    """The recorded ViT; without its class token, patch tokens keep their own position embeddings."""
    args, arch, state = arguments(case), arguments(case)["arch"], under(golden(case), "param/")
    if not class_token:
        state = {name: leaf for name, leaf in state.items() if name != "cls_token"}
        state["pos_embed"] = state["pos_embed"][:, 1:]
    model = VisionTransformer(
        img_size=args["img_size"],
        patch_size=args["patch_size"],
        embed_dim=arch["embed_dims"],
        depth=arch["num_layers"],
        num_heads=arch["num_heads"],
        mlp_ratio=arch["feedforward_channels"] / arch["embed_dims"],
        class_token=class_token,
        global_pool="token" if class_token else "avg",
        fc_norm=False,
        num_classes=0,
    )
    load_vit(model, state)
    return model.to(dtype).eval()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", VITS)
def test_vit_later_blocks_give_released_stage5_path_when_cut_before_last_block(case, dtype):
    _, later = split_teacher(vit(case, dtype, class_token=False), depth=1)
    assert_path_matches(later, case, "s5", dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("case", "blocks"), [("tpp_vit", slice(8, 11)), ("tpp_vitn", slice(10, 12))])
def test_vit_blocks_give_released_stage4_path_when_released_weights_are_loaded(case, blocks, dtype):
    assert_path_matches(vit(case, dtype, class_token=False).blocks[blocks], case, "s4", dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_vit_gives_released_maps_when_class_token_is_dropped_first(dtype):
    expected = under(golden("tpp_vit"), "full/")
    taken = vit("tpp_vit", dtype, class_token=False).forward_intermediates(
        inputs("tpp_vit", dtype)["img"], indices=[2, 5, 8], intermediates_only=True
    )
    final = vit("tpp_vit", dtype, class_token=False).forward_features(inputs("tpp_vit", dtype)["img"])
    taken += [as_map(final, expected["out3_f64"])] * 2
    for i, got in enumerate(taken):
        assert_matches(got, expected[f"out{i}_f64"], f"map {i}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_vit_gives_released_maps_when_class_token_is_kept(dtype):
    model, expected = vit("tpp_vitn", dtype, class_token=True), under(golden("tpp_vitn"), "full/")
    final, taken = model.forward_intermediates(inputs("tpp_vitn", dtype)["img"], indices=[2, 5, 9, 11])
    for i, got in enumerate([*taken, as_map(final[:, 1:], expected["out4_f64"])]):
        assert_matches(got, expected[f"out{i}_f64"], f"map {i}")


def test_vit_later_blocks_give_released_final_map_when_prefix_token_is_cached():
    """Cut before block 10, whose input is map 2 of the recording plus our own class token."""
    model, expected = vit("tpp_vitn", torch.float64, class_token=True), under(golden("tpp_vitn"), "full/")
    early, later = split_teacher(model, depth=2)
    prefix = early(inputs("tpp_vitn", torch.float64)["img"])[:, :1]
    got = later(expected["out2_f64"].flatten(2).mT, prefix)
    assert_matches(as_map(got, expected["out4_f64"]), expected["out4_f64"], "final map")


@cache
def beit(dtype: torch.dtype) -> Beit:
    args, arch = arguments("tpp_beit"), arguments("tpp_beit")["arch"]
    model = Beit(
        img_size=args["img_size"],
        patch_size=args["patch_size"],
        embed_dim=arch["embed_dims"],
        depth=arch["num_layers"],
        num_heads=arch["num_heads"],
        mlp_ratio=arch["feedforward_channels"] / arch["embed_dims"],
        qkv_bias=True,
        init_values=0.1,
        use_abs_pos_emb=False,
        use_rel_pos_bias=True,
        global_pool="token",
        num_classes=0,
    )
    load_vit(model, under(golden("tpp_beit"), "param/"))
    return model.to(dtype).eval()


@pytest.mark.parametrize("dtype", DTYPES)
def test_beit_blocks_give_released_paths_when_released_weights_are_loaded(dtype):
    assert_path_matches(nn.Sequential(*beit(dtype).blocks[22:], beit(dtype).norm), "tpp_beit", "s4", dtype)
    assert_path_matches(nn.Identity(), "tpp_beit", "s5", dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_beit_gives_released_maps_when_released_weights_are_loaded(dtype):
    model, expected = beit(dtype), under(golden("tpp_beit"), "full/")
    final, taken = model.forward_intermediates(inputs("tpp_beit", dtype)["img"], indices=[8, 12, 16])
    taken += [as_map(final[:, 1:], expected["out3_f64"])] * 2
    for i, got in enumerate(taken):
        assert_matches(got, expected[f"out{i}_f64"], f"map {i}")


@pytest.fixture
def later():
    torch.manual_seed(0)
    model = timm.create_model("test_vit", pretrained=False, num_classes=0).eval()
    return split_teacher(model, depth=1)[1]


def random_paths(later, batch: int = 2) -> tuple[dict[str, Tensor], Tensor]:
    shape = (batch, later.grid_tokens, later.info.input_dim)
    paths = {view: torch.randn(shape) for view in ("original", "alternative")}
    return paths, torch.randn(batch, later.info.prefix_tokens, later.info.input_dim)


def test_perception_equals_one_pass_per_path_when_both_are_batched(later):
    paths, prefix = random_paths(later)
    perceived = TeacherParameterPerception(later)(paths, prefix)
    assert list(perceived) == ["original", "alternative"]
    for view, x_BND in paths.items():
        torch.testing.assert_close(perceived[view], later(x_BND, prefix), rtol=1e-5, atol=1e-6)


def test_perception_runs_the_later_blocks_once_when_there_are_two_paths(later):
    batches = []
    later.norm.register_forward_hook(lambda _, args, out: batches.append(len(out)))
    TeacherParameterPerception(later)(*random_paths(later, batch=3))
    assert batches == [6]


def test_perception_sends_gradients_through_frozen_blocks_when_features_need_them(later):
    paths, prefix = random_paths(later)
    for x_BND in paths.values():
        x_BND.requires_grad_()
    perceived = TeacherParameterPerception(later).train()(paths, prefix)
    perceived["original"].square().sum().backward()
    assert paths["original"].grad.abs().max() > 0
    assert paths["alternative"].grad.abs().max() == 0
    assert all(leaf.grad is None for leaf in later.parameters())
    assert not any(module.training for module in later.modules())


def test_perception_moves_but_does_not_own_the_teacher_when_cast(later):
    perception = TeacherParameterPerception(later).double()
    assert {leaf.dtype for leaf in later.parameters()} == {torch.float64}
    assert not list(perception.parameters())
    assert not perception.state_dict()


def test_perception_asks_for_prefix_tokens_when_the_teacher_has_them(later):
    with pytest.raises(InputError, match="prefix_BPD"):
        TeacherParameterPerception(later)(random_paths(later)[0])
