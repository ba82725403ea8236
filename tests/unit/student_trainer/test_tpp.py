"""Later blocks against the released teachers' numbers, and TPP's way through them."""

from collections.abc import Callable, Sequence
from functools import cache

import pytest
import timm
import torch
from golden_files import DTYPES, arguments, assert_recorded, golden, images, inputs, swin, under
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from feature_store.errors import InputError
from feature_store.teacher import split_teacher
from student_trainer.methods.tpp import TeacherParameterPerception
from student_trainer.official import load_vit

VITS = ("tpp_vit", "tpp_vitn")


def as_map(x_BND: Tensor, like: Tensor) -> Tensor:
    return x_BND.mT.reshape(like.shape)


def assert_path_recorded(path: Callable[[torch.dtype], nn.Module], case: str, stage: str, dtype: torch.dtype) -> None:
    """Output and input gradient of a stage path on the recorded tokens."""

    def compute(dtype: torch.dtype) -> dict[str, Tensor]:
        arrays = inputs(case, dtype)
        own = under(arrays, f"{stage}/") if case == "tpp_swin" else arrays
        tokens = own["tokens_in"].requires_grad_()
        out = path(dtype)(tokens)
        (out * own["cot"]).sum().backward()
        return {"out": out, "grad_in": tokens.grad}

    expected = under(golden(case), f"{stage}/")
    assert_recorded(compute, dtype, {name: expected[f"{name}_f64"] for name in ("out", "grad_in")})


def assert_maps_recorded(compute: Callable[[torch.dtype], Sequence[Tensor]], case: str, dtype: torch.dtype) -> None:
    """Maps [B, D, H, W] after the stages, in the recording's order."""
    expected = under(golden(case), "full/")
    assert_recorded(
        lambda dtype: {f"map {i}": got for i, got in enumerate(compute(dtype))},
        dtype,
        {f"map {i}": expected[name] for i in range(len(expected)) if (name := f"out{i}_f64") in expected},
    )


@pytest.mark.golden
@pytest.mark.parametrize("dtype", DTYPES)
def test_swin_later_blocks_give_released_stage4_path_when_released_weights_are_loaded(dtype):
    assert_path_recorded(lambda dtype: split_teacher(swin("tpp_swin", dtype))[1], "tpp_swin", "s4", dtype)


def swin_maps(dtype: torch.dtype) -> dict[str, Tensor]:
    """By the recording's names: whole maps, or a corner and the mean over all places."""
    model = swin("tpp_swin", dtype)
    early, later = split_teacher(model)
    x = model.patch_embed(images("tpp_swin", dtype))
    maps = [x]
    for stage in model.layers:
        maps.append(x := stage(x))
    maps[-1] = later(early(images("tpp_swin", dtype)))
    results = {}
    for i, got in enumerate(maps):
        results[f"out{i}_f64"] = got.movedim(-1, 1)
        results[f"out{i}_f32_8x8corner"] = got[:, :8, :8].movedim(-1, 1)
        results[f"out{i}_f32_chanmean"] = got.mean(dim=(1, 2))
    return results


@pytest.mark.golden
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("run", "recorded"), [("f64", None), ("f32", 1e-5)])
def test_swin_gives_released_maps_when_released_weights_are_loaded(dtype, run, recorded):
    released = under(golden("tpp_swin"), "full/")
    expected = {name: released[name] for name in swin_maps(torch.float64).keys() & released.keys() if run in name}
    assert len(expected) == {"f64": 2, "f32": 6}[run]
    assert_recorded(
        lambda dtype: {name: leaf for name, leaf in swin_maps(dtype).items() if name in expected},
        dtype,
        expected,
        recorded=recorded,
    )


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


@pytest.mark.golden
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", VITS)
def test_vit_later_blocks_give_released_stage5_path_when_cut_before_last_block(case, dtype):
    def later(dtype: torch.dtype) -> nn.Module:
        return split_teacher(vit(case, dtype, class_token=False), depth=1)[1]

    assert_path_recorded(later, case, "s5", dtype)


@pytest.mark.golden
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("case", "blocks"), [("tpp_vit", slice(8, 11)), ("tpp_vitn", slice(10, 12))])
def test_vit_blocks_give_released_stage4_path_when_released_weights_are_loaded(case, blocks, dtype):
    assert_path_recorded(lambda dtype: vit(case, dtype, class_token=False).blocks[blocks], case, "s4", dtype)


@pytest.mark.golden
@pytest.mark.parametrize("dtype", DTYPES)
def test_vit_gives_released_maps_when_class_token_is_dropped_first(dtype):
    def maps(dtype: torch.dtype) -> list[Tensor]:
        model, images = vit("tpp_vit", dtype, class_token=False), inputs("tpp_vit", dtype)["img"]
        taken = model.forward_intermediates(images, indices=[2, 5, 8], intermediates_only=True)
        return [*taken, *[as_map(model.forward_features(images), taken[-1])] * 2]

    assert_maps_recorded(maps, "tpp_vit", dtype)


@pytest.mark.golden
@pytest.mark.parametrize("dtype", DTYPES)
def test_vit_gives_released_maps_when_class_token_is_kept(dtype):
    def maps(dtype: torch.dtype) -> list[Tensor]:
        model, images = vit("tpp_vitn", dtype, class_token=True), inputs("tpp_vitn", dtype)["img"]
        final, taken = model.forward_intermediates(images, indices=[2, 5, 9, 11])
        return [*taken, as_map(final[:, 1:], taken[-1])]

    assert_maps_recorded(maps, "tpp_vitn", dtype)


@pytest.mark.golden
def test_vit_later_blocks_give_released_final_map_when_prefix_token_is_cached():
    """Cut before block 10, whose input is map 2 of the recording plus our own class token."""
    model, expected = vit("tpp_vitn", torch.float64, class_token=True), under(golden("tpp_vitn"), "full/")
    early, later = split_teacher(model, depth=2)
    prefix = early(inputs("tpp_vitn", torch.float64)["img"])[:, :1]
    got = as_map(later(expected["out2_f64"].flatten(2).mT, prefix), expected["out4_f64"])
    assert_recorded(lambda _: {"final map": got}, torch.float64, {"final map": expected["out4_f64"]})


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


@pytest.mark.golden
@pytest.mark.parametrize("dtype", DTYPES)
def test_beit_blocks_give_released_paths_when_released_weights_are_loaded(dtype):
    def last_blocks(dtype: torch.dtype) -> nn.Module:
        return nn.Sequential(*beit(dtype).blocks[22:], beit(dtype).norm)

    assert_path_recorded(last_blocks, "tpp_beit", "s4", dtype)
    assert_path_recorded(lambda _: nn.Identity(), "tpp_beit", "s5", dtype)


@pytest.mark.golden
@pytest.mark.parametrize("dtype", DTYPES)
def test_beit_gives_released_maps_when_released_weights_are_loaded(dtype):
    def maps(dtype: torch.dtype) -> list[Tensor]:
        model = beit(dtype)
        final, taken = model.forward_intermediates(inputs("tpp_beit", dtype)["img"], indices=[8, 12, 16])
        return [*taken, *[as_map(final[:, 1:], taken[-1])] * 2]

    assert_maps_recorded(maps, "tpp_beit", dtype)


@pytest.fixture
def later():
    torch.manual_seed(0)
    model = timm.create_model("test_vit", pretrained=False, num_classes=0).eval()
    return split_teacher(model, depth=1)[1]


def random_paths(later, batch: int = 2, dtype: torch.dtype | None = None) -> tuple[dict[str, Tensor], Tensor]:
    shape = (batch, later.grid_tokens, later.info.input_dim)
    paths = {view: torch.randn(shape, dtype=dtype) for view in ("original", "alternative")}
    return paths, torch.randn(batch, later.info.prefix_tokens, later.info.input_dim, dtype=dtype)


def test_perception_equals_one_pass_per_path_when_both_are_batched(later):
    paths, prefix = random_paths(later.double(), dtype=torch.float64)
    perceived = TeacherParameterPerception(later)(paths, prefix)
    assert list(perceived) == ["original", "alternative"]
    for view, x_BND in paths.items():
        torch.testing.assert_close(perceived[view], later(x_BND, prefix))


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


def test_perception_needs_no_prefix_tokens_when_the_split_drops_them():
    torch.manual_seed(0)
    model = timm.create_model("test_vit", pretrained=False, num_classes=0).eval()
    _, later = split_teacher(model, depth=1, drop_prefix=True)
    (path, *_) = random_paths(later)[0].values()
    for checkpoint in (False, True):
        perceived = TeacherParameterPerception(later, checkpoint=checkpoint)({"original": path})
        assert list(perceived) == ["original"]
        torch.testing.assert_close(perceived["original"], later(path))


@pytest.mark.parametrize(("options", "runs"), [({}, 1), ({"checkpoint": False}, 1), ({"checkpoint": True}, 2)])
def test_perception_gives_the_same_gradients_when_blocks_run_again_for_backward(later, options, runs):
    paths, prefix = random_paths(later)
    leaves = [path.requires_grad_() for path in paths.values()]
    weights_BMD = torch.randn(leaves[0].shape)
    expected = [later(leaf, prefix) for leaf in leaves]
    gradients = torch.autograd.grad([(out * weights_BMD).sum() for out in expected], leaves)
    seen: list[int] = []
    later.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    perceived = TeacherParameterPerception(later, **options).train()(paths, prefix)
    assert seen == [4]
    got = torch.autograd.grad([(out * weights_BMD).sum() for out in perceived.values()], leaves)
    assert seen[1:] == [4] * (runs - 1)
    torch.testing.assert_close([*perceived.values()], expected)
    torch.testing.assert_close(got, gradients)


def test_perception_keeps_few_activations_when_checkpointed(later):
    kept = {}
    for checkpoint in (False, True):
        paths, prefix = random_paths(later)
        saved: list[int] = []
        perceive = TeacherParameterPerception(later, checkpoint=checkpoint)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda leaf, to=saved: to.append(leaf.nbytes) or leaf, lambda x: x
        ):
            perceive({view: path.requires_grad_() for view, path in paths.items()}, prefix)
        kept[checkpoint] = sum(saved)
    assert kept[True] < kept[False] / 10


@pytest.mark.parametrize("needs_gradients", [False, True])
def test_perception_runs_checkpointed_blocks_once_when_nothing_is_propagated(later, needs_gradients):
    paths, prefix = random_paths(later)
    expected = [later(path, prefix) for path in paths.values()]
    seen: list[int] = []
    later.norm.register_forward_hook(lambda *_: seen.append(1))
    for path in paths.values():
        path.requires_grad_(needs_gradients)
    with torch.set_grad_enabled(not needs_gradients):  # either the features need none, or nobody does
        perceived = TeacherParameterPerception(later, checkpoint=True)(paths, prefix)
    assert seen == [1]
    assert not any(out.requires_grad for out in perceived.values())
    torch.testing.assert_close([*perceived.values()], expected)
