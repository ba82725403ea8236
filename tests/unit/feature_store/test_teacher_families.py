"""Split, bundle and later blocks of every family are bitwise timm's own forward pass."""

import dataclasses
import json
import os
import subprocess
import sys
from inspect import signature

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from timm.models.eva import Eva
from tiny_store import tiny_manifest
from tiny_teachers import TEACHERS, randomise, tiny_images, tiny_model
from training_world import samples, write_store, write_tar

from feature_store import Store, open_store
from feature_store.errors import InputError
from feature_store.format.addressing import RowId
from feature_store.format.manifest import TapInfo
from feature_store.teacher import split_teacher
from feature_store.teacher.bundle import bundle_sha256, bundle_state
from feature_store.teacher.model import build_model, load_teacher, normalise
from feature_store.views import view_policy

FAMILIES = {
    "convnext": "convnext",
    "hiera": "hiera",
    "swin": "swin",
    "beit": "beit",
    "beitv2": "beit",
    "eva02": "eva",
    "dinov3": "eva",
    "rope": "eva",
}


BY_STAGE = ("swin", "convnext", "convnextv2", "hiera", "hiera_oblong")


def grid_tokens(features, later):
    """Final features or a stage-3 output, tokens or a grid, as grid tokens."""
    if features.ndim == 3:
        return features[:, later.info.prefix_tokens :]
    return features.flatten(2).transpose(1, 2) if later.info.family == "convnext" else features.flatten(1, 2)


def grid_and_prefix(stage3, later):
    """What a store holds of a stage-3 output: grid tokens and, if there are any, prefix tokens."""
    if stage3.ndim == 4:
        return grid_tokens(stage3, later), None
    prefix = later.info.prefix_tokens
    return stage3[:, prefix:], stage3[:, :prefix] if prefix else None


@pytest.mark.parametrize("name", TEACHERS)
def test_split_is_bitwise_the_models_own_forward(name):
    model, images = tiny_model(name), tiny_images(name)
    with torch.no_grad():
        features, logits = model.forward_features(images), model(images)
        early, later = split_teacher(model)
        stage3 = early(images)
        assert torch.equal(later(stage3), features)
        assert torch.equal(model.forward_head(later(stage3)), logits)
        tokens, prefix = grid_and_prefix(stage3, later)
        assert torch.equal(later(tokens, prefix), grid_tokens(features, later))
        assert not torch.equal(later(stage3.roll(1, dims=1)), features)
    family = next((value for key, value in FAMILIES.items() if name.startswith(key)), "vit")
    assert (later.info.family, later.info.prefix_tokens) == (family, TEACHERS[name].prefix)


@pytest.mark.parametrize("name", [name for name in TEACHERS if name not in BY_STAGE])
def test_split_is_exact_at_every_depth(name):
    model, images = tiny_model(name), tiny_images(name)
    with torch.no_grad():
        features = model.forward_features(images)
        for depth in (1, 2, 3):
            early, later = split_teacher(model, depth)
            assert len(later.blocks) == depth == later.info.depth
            assert torch.equal(later(early(images)), features)


@pytest.mark.parametrize("name", TEACHERS)
def test_early_stages_and_later_blocks_share_out_the_parameters(name):
    model = tiny_model(name)
    early, later = split_teacher(model)
    ids = [{id(parameter) for parameter in part.parameters()} for part in (early, later)]
    neither = ("head", "fc_norm", "attn_pool", "rope.", "rel_pos_bias.")  # after both, or made into a table for both
    assert ids[0].isdisjoint(ids[1])
    assert ids[0] | ids[1] == {id(p) for name, p in model.named_parameters() if not name.startswith(neither)}


@pytest.mark.parametrize(
    ("name", "part"),
    [("dinov3", "rope"), ("rope_mixed", "rope"), ("eva02", "rope"), ("beit_shared_bias", "rel_pos_bias")],
)
def test_position_tables_are_made_once_and_not_for_every_batch(name, part, monkeypatch):
    model, images = tiny_model(name), tiny_images(name)
    with torch.no_grad():
        features = model.forward_features(images)
        early, later = split_teacher(model)
        monkeypatch.setattr(getattr(model, part), "forward", None)
        monkeypatch.setattr(getattr(model, part), "get_embed", None, raising=False)
        with pytest.raises(TypeError, match="not callable"):
            model.forward_features(images)
        assert torch.equal(later(early(images)), features)


@pytest.mark.parametrize("name", TEACHERS)
def test_gradients_flow_to_grid_tokens_through_frozen_blocks(name):
    early, later = split_teacher(tiny_model(name))
    tokens, prefix = grid_and_prefix(early(tiny_images(name)).detach(), later)
    tokens.requires_grad_()
    later.train()
    later(tokens, prefix).square().sum().backward()
    assert tokens.grad is not None
    assert torch.isfinite(tokens.grad).all()
    assert (tokens.grad.abs().amax(dim=2) > 0).all()
    assert not any(parameter.requires_grad for parameter in later.parameters())
    assert not any(module.training for module in later.modules())


def make_teacher(name, folder):
    """The teacher a user gets from a checkpoint of this name."""
    spec = TEACHERS[name]
    model = build_model(spec.name, spec.kwargs)
    randomise(model, seed=3)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "teacher.safetensors")
    return load_teacher(spec.name, checkpoint=folder / "teacher.safetensors", model_kwargs=spec.kwargs)


def make_store(path, teacher):
    blocks = bundle_state(teacher.later_blocks)
    manifest = dataclasses.replace(
        tiny_manifest(),
        teacher=teacher.info,
        split=teacher.split,
        blocks_sha256=bundle_sha256(blocks),
        taps={"stage4": TapInfo(*teacher.tap_shapes["stage4"], "f32")},
        logits_codec="f32" if teacher.info.num_classes else None,
    )
    return Store.create(path, manifest, blocks)


@pytest.mark.parametrize("name", TEACHERS)
def test_teacher_from_a_checkpoint_gives_bitwise_timms_features_and_logits(name, tmp_path):
    teacher = make_teacher(name, tmp_path)
    height, width = teacher.info.input_size
    pixels = torch.from_numpy(np.random.default_rng(2).integers(0, 256, (2, height, width, 3), np.uint8))
    mean, std = (255 * torch.tensor(values) for values in (teacher.info.mean, teacher.info.std))
    images = normalise(pixels, mean, std)
    with torch.no_grad():
        features, logits = teacher.model.forward_features(images), teacher.model(images)
    output = teacher(pixels)
    assert torch.equal(output.taps["stage4"], grid_tokens(features, teacher.later_blocks))
    assert {tap: tuple(values.shape[1:]) for tap, values in output.taps.items()} == teacher.tap_shapes
    if TEACHERS[name].kwargs["num_classes"]:
        assert output.logits is not None
        assert torch.equal(output.logits, logits)
    else:
        assert output.logits is None


_STUDENT = """
import json, sys
from safetensors.torch import load_file, save_file
from feature_store import open_store

for folder in json.loads(sys.argv[1]):
    blocks = open_store(f"{folder}/store").later_blocks()
    given = load_file(f"{folder}/given.safetensors")
    assert not any(tensor.is_meta for tensor in [*blocks.parameters(), *blocks.buffers()])
    save_file({"out": blocks(given["tokens"], given.get("prefix")).contiguous()}, f"{folder}/got.safetensors")
"""


def test_blocks_of_a_store_give_bitwise_the_same_when_a_process_has_no_teacher(tmp_path):
    """One process for all families: it sees the stores and the stage-3 tokens, nothing else.

    It has as many threads as this one: sums of matrix products depend on that in their last bits.
    """
    expected = {}
    for name in TEACHERS:
        folder = tmp_path / name
        folder.mkdir()
        teacher = make_teacher(name, folder)
        make_store(folder / "store", teacher)
        (folder / "teacher.safetensors").unlink()
        with torch.no_grad():
            stage3 = split_teacher(teacher.model)[0](tiny_images(name))
            tokens, prefix = grid_and_prefix(stage3, teacher.later_blocks)
            given = {"tokens": tokens, **({} if prefix is None else {"prefix": prefix})}
            save_file({key: value.contiguous() for key, value in given.items()}, folder / "given.safetensors")
            expected[name] = teacher.later_blocks(tokens, prefix)
    folders = json.dumps([str(tmp_path / name) for name in TEACHERS])
    threads = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    subprocess.run([sys.executable, "-c", _STUDENT, folders], check=True, env=threads)
    got = {name: load_file(tmp_path / name / "got.safetensors")["out"] for name in TEACHERS}
    assert [name for name in TEACHERS if not torch.equal(got[name], expected[name])] == []


@pytest.fixture(scope="module")
def tar(tmp_path_factory):
    return write_tar(tmp_path_factory.mktemp("tars") / "train.tar", samples(5, seed=1))


@pytest.mark.parametrize("name", TEACHERS)
def test_rows_of_a_store_are_bitwise_joined_by_its_blocks(name, tmp_path, tar):
    """Stage-3 and prefix tokens as stored, through the blocks as stored, are the final map as stored."""
    teacher = make_teacher(name, tmp_path)
    policy = view_policy("a2", teacher.info.input_size)
    write_store(
        tmp_path / "store", [tar], teacher, num_views=1, codec="f32", policy=policy, taps=tuple(teacher.tap_shapes)
    )
    store = open_store(tmp_path / "store")
    batch = store.source().read([RowId(0, position, 0) for position in range(5)])
    taps = {tap: torch.from_numpy(values) for tap, values in batch.taps.items()}
    with torch.no_grad():
        assert torch.equal(store.later_blocks()(taps["stage3"], taps.get("stage3_prefix")), taps["stage4"])
    assert (batch.logits is None) == (TEACHERS[name].kwargs["num_classes"] == 0)


@pytest.mark.parametrize(
    ("name", "tensor", "shape"),
    [
        ("eva02", "rope", (16, 32)),
        ("dinov3", "rope", (16, 32)),
        ("rope_mixed", "rope", (1, 2, 16, 32)),
        ("beit_shared_bias", "shared_rel_pos_bias", (2, 17, 17)),
    ],
)
def test_bundle_holds_what_blocks_take_beside_tokens(tmp_path, name, tensor, shape):
    teacher = make_teacher(name, tmp_path)
    assert bundle_state(teacher.later_blocks)[tensor].shape == shape
    assert make_store(tmp_path / "store", teacher).later_blocks().get_buffer(tensor).shape == shape
    assert (
        open_store(tmp_path / "store").later_blocks().get_buffer(tensor).equal(teacher.later_blocks.get_buffer(tensor))
    )


@pytest.mark.skipif(
    "rope_shift_coords" not in signature(Eva.__init__).parameters, reason="timm is older than this option"
)
def test_split_takes_the_unshifted_grid_when_the_model_trains_with_shifted_coordinates():
    spec = TEACHERS["dinov3"]
    model = build_model(spec.name, {**spec.kwargs, "rope_shift_coords": 0.5}).train()
    early, later = split_teacher(model)
    model.eval()
    with torch.no_grad():
        images = tiny_images("dinov3")
        assert torch.equal(later(early(images)), model.forward_features(images))


@pytest.mark.parametrize("name", ["vit_relpos_small_patch16_224", "test_resnet", "samvit_base_patch16_224"])
def test_split_refuses_with_the_known_families_when_the_class_is_none_of_them(name):
    with torch.device("meta"):
        model = build_model(name)
    known = "SwinTransformer, VisionTransformer, Beit, Eva, ConvNeXt, Hiera"
    message = rf"cannot split a {type(model).__name__}: .*{known}; choose"
    with pytest.raises(InputError, match=message):
        split_teacher(model)


def test_load_refuses_when_the_teacher_does_not_take_rgb():
    with pytest.raises(InputError, match="takes images of 1 channels, but views are RGB"):
        load_teacher("test_vit", pretrained=False, model_kwargs={"in_chans": 1})


def test_load_refuses_when_the_teacher_has_logits_for_each_token():
    with pytest.raises(InputError, match="test_vit with global_pool '' has logits for each token; leave it out"):
        load_teacher("test_vit", pretrained=False, model_kwargs={"global_pool": ""})


@pytest.mark.parametrize("name", ["beitv2", "eva02", "dinov3"])
def test_split_refuses_to_drop_the_prefix_when_positions_are_laid_out_for_all_tokens(name):
    with pytest.raises(InputError, match=r"cannot run without its prefix tokens.*is for timm's VisionTransformer"):
        split_teacher(tiny_model(name), drop_prefix=True)
