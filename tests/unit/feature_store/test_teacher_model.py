import pytest
import timm
import torch
from safetensors.torch import save_file

from feature_store.errors import InputError, Remedy, ResourceError
from feature_store.teacher.model import build_model, load_teacher, normalise, weights_sha256

SWIN = {"img_size": 32, "patch_size": 2, "window_size": 2, "depths": (1, 1, 2, 2), "embed_dim": 24, "num_classes": 5}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("weights") / "swin.safetensors"
    save_file(timm.create_model("swin_tiny_patch4_window7_224", **SWIN).state_dict(), path)
    return path


def load(**kwargs):
    return load_teacher("swin_tiny_patch4_window7_224", **{"model_kwargs": SWIN, **kwargs})


def test_teacher_gives_what_timm_gives_on_normalised_pixels(checkpoint):
    teacher = load(checkpoint=checkpoint)
    pixels = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    output = teacher(pixels)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (teacher.info.mean, teacher.info.std))
    images = (pixels.permute(0, 3, 1, 2) / 255 - mean) / std
    with torch.no_grad():
        torch.testing.assert_close(output.logits, teacher.model(images), rtol=1e-3, atol=1e-4)
        features = teacher.model.forward_features(images).flatten(1, 2)
    torch.testing.assert_close(output.taps["stage4"], features, rtol=1e-3, atol=1e-4)
    assert {name: tuple(tap.shape[1:]) for name, tap in output.taps.items()} == teacher.tap_shapes
    assert teacher.later_blocks(output.taps["stage3"]).equal(output.taps["stage4"])


def test_prefix_tap_feeds_the_later_blocks_when_the_teacher_has_a_class_token():
    teacher = load_teacher("test_vit", pretrained=False)
    taps = teacher(torch.randint(0, 256, (2, 160, 160, 3), dtype=torch.uint8)).taps
    assert set(taps) == {"stage4", "stage3", "stage3_prefix"}
    assert teacher.later_blocks(taps["stage3"], taps["stage3_prefix"]).equal(taps["stage4"])


def test_teacher_without_classifier_gives_no_logits():
    teacher = load_teacher("test_vit", pretrained=False, model_kwargs={"num_classes": 0})
    assert teacher(torch.zeros(1, 160, 160, 3, dtype=torch.uint8)).logits is None


def test_teacher_stays_in_eval_mode_and_frozen(checkpoint):
    teacher = load(checkpoint=checkpoint, model_kwargs={**SWIN, "drop_path_rate": 0.9}).train()
    pixels = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8)
    assert teacher(pixels).taps["stage4"].equal(teacher(pixels).taps["stage4"])
    assert not any(p.requires_grad for p in teacher.parameters())


def test_bfloat16_stays_near_float32_and_is_recorded(checkpoint):
    pixels = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    exact, fast = load(checkpoint=checkpoint), load(checkpoint=checkpoint, compute_dtype="bfloat16")
    difference = (exact(pixels).taps["stage4"] - fast(pixels).taps["stage4"]).abs().max()
    assert 0 < difference < 0.2
    assert fast.info.compute_dtype == "bfloat16"


def test_torch_and_safetensors_checkpoints_give_the_same_weights(checkpoint, tmp_path):
    teacher = load(checkpoint=checkpoint)
    torch.save({"state_dict": teacher.model.state_dict()}, tmp_path / "swin.pt")
    assert load(checkpoint=tmp_path / "swin.pt").info == teacher.info


def test_weights_sha256_sees_a_single_changed_bit():
    state = {"a": torch.zeros(3), "b": torch.zeros(2, dtype=torch.int64)}
    changed = {**state, "a": torch.tensor([0.0, -0.0, 0.0])}
    renamed = {"c": state["a"], "b": state["b"]}
    assert len({weights_sha256(s) for s in (state, changed, renamed)}) == 3


def test_load_refuses_when_pixels_do_not_fit(checkpoint):
    with pytest.raises(InputError, match=r"uint8 pixels \[B, 32, 32, 3\], got torch.uint8 \(1, 16, 16, 3\)"):
        load(checkpoint=checkpoint)(torch.zeros(1, 16, 16, 3, dtype=torch.uint8))


def test_load_refuses_with_suggestions_when_the_name_is_unknown():
    with pytest.raises(InputError, match=r"knows no model 'test_vitt.r160_in1k'; did you mean test_vit") as caught:
        build_model("test_vitt.r160_in1k")
    assert caught.value.remedy is Remedy.LIST_TEACHERS
    with pytest.raises(InputError, match="knows no pretrained tag 'r161_in1k' of test_vit; expected one of r160_in1k$"):
        build_model("test_vit.r161_in1k")
    with pytest.raises(InputError, match="knows no model 'swin_larg_patch4_window7_224'; did you mean swin_large"):
        load_teacher("swin_larg_patch4_window7_224", pretrained=False)


def test_load_refuses_when_arguments_are_impossible():
    with pytest.raises(InputError, match="timm cannot build 'test_vit'"):
        load_teacher("test_vit", pretrained=False, model_kwargs={"no_such_argument": 1})
    with pytest.raises(InputError, match="unknown compute dtype 'int4'"):
        load_teacher("test_vit", pretrained=False, compute_dtype="int4")


def test_load_refuses_when_checkpoint_does_not_fit(checkpoint, tmp_path):
    with pytest.raises(InputError, match=r"does not fit.*size mismatch"):
        load(checkpoint=checkpoint, model_kwargs={**SWIN, "num_classes": 7})


def test_load_names_some_keys_only_when_all_of_a_checkpoints_differ(checkpoint):
    with pytest.raises(
        InputError, match=r"Missing key.*\.\.\.; Unexpected key.*\.\.\.;.*check the model name"
    ) as caught:
        load_teacher("test_vit", checkpoint=checkpoint)
    assert len(str(caught.value)) < 1200


def test_load_never_unpickles_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "pwned"), "w"))

    torch.save({"state_dict": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(InputError, match=r"evil.pt holds Python objects beside tensors \(\S*open\)"):
        load(checkpoint=tmp_path / "evil.pt")
    assert not (tmp_path / "pwned").exists()


def test_load_says_to_pass_a_checkpoint_when_weights_cannot_be_fetched(monkeypatch):
    """What timm raises without a network, without waiting for its retries."""

    def no_network(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", no_network)
    with pytest.raises(ResourceError, match="could not be fetched .*pass a local file"):
        load_teacher("test_vit.r160_in1k", pretrained=True)


def test_normalise_gives_contiguous_images_and_leaves_the_pixels_when_it_computes_in_place():
    pixels = torch.randint(0, 256, (2, 5, 4, 3), dtype=torch.uint8)
    before, mean, std = pixels.clone(), torch.tensor([1.0, 2.0, 3.0]), torch.tensor([3.0, 7.0, 9.0])
    images = normalise(pixels, mean, std)
    assert torch.equal(images, ((before.float() - mean) / std).permute(0, 3, 1, 2))
    assert images.is_contiguous()
    assert torch.equal(pixels, before)
