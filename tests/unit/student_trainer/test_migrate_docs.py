"""docs/migrate.md: its snippets run, on small models in place of the large ones, and its presets exist."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from golden_files import arguments, golden, swin, under
from safetensors.torch import load_file, save_file

import feature_store
from feature_store.teacher import split_teacher
from student_trainer.recipes import PRESETS

PAGE = (Path(__file__).parents[3] / "docs" / "migrate.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def run(snippet: str, settings: str) -> dict:
    """Run a snippet with another line of settings (its one line of several names)."""
    changed, count = re.subn(r"^\w+, .* = .*$", settings.replace("\\", r"\\"), snippet, flags=re.MULTILINE)
    assert count == 1
    names: dict = {}
    exec(changed, names)
    return names


def test_every_preset_has_its_config_when_the_page_lists_them():
    rows = re.findall(r"^\| `(\S+\.py)` \| (kept|deleted) \| `(\S+)` \|$", PAGE, re.MULTILINE)
    assert {preset: f"configs/distillers/{file}" for file, _, preset in rows} == {
        name: preset.source.file for name, preset in PRESETS.items()
    }
    released = json.loads((Path(__file__).parent / "data" / "released_settings.json").read_text())["presets"]
    assert {preset: kept == "kept" for _, kept, preset in rows} == {
        name: preset["at_head"] for name, preset in released.items()
    }


def test_every_difference_of_a_preset_has_a_row_when_the_page_lists_them():
    rows = re.findall(r"^\| ([^|`]+) \| [^|]+ \| [^|]+ \| [^|]+ \|$", PAGE, re.MULTILINE)
    listed = {setting.strip() for row in rows for setting in row.split(",")} - {"setting", "---"}
    assert listed == {setting for preset in PRESETS.values() for setting in preset.differs}


def test_eva_snippet_resamples_positions_when_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    thin = {"embed_dim": 16, "depth": 2, "num_heads": 2}
    converted = timm.create_model("eva_large_patch14_196", **thin)
    save_file(converted.state_dict(), "vit.safetensors")
    run(SNIPPETS[2], f'name, arguments = "eva_large_patch14_196", {thin!r}')
    model = timm.create_model("eva_large_patch14_196", img_size=224, **thin)
    model.load_state_dict(load_file("eva-224.safetensors"))
    assert model.pos_embed.shape == (1, 257, 16)
    assert torch.equal(model.head.weight, converted.head.weight)


@pytest.mark.golden
def test_swin_snippet_converts_a_teacher_when_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": under(golden("e2e_teacher"), "param/")}, "swin-official.pth")
    shape = arguments("e2e_teacher")["arch"]
    kwargs = {
        "embed_dim": shape["embed_dims"], "depths": shape["depths"], "num_heads": shape["num_heads"],
        "window_size": arguments("e2e_teacher")["window_size"], "num_classes": arguments("e2e_teacher")["num_classes"],
    }  # fmt: skip
    run(SNIPPETS[0], f'name, arguments = "swin_large_patch4_window7_224", {kwargs!r}')
    expected = swin("e2e_teacher", torch.float32).state_dict()
    got = load_file("swin.safetensors")
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in got)


@pytest.mark.golden
def test_vit_snippet_converts_a_teacher_when_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    official, args = under(golden("tpp_vit"), "param/"), arguments("tpp_vit")
    torch.save(official, "vit-official.pth")
    kwargs = {
        "img_size": args["img_size"], "patch_size": args["patch_size"], "embed_dim": args["arch"]["embed_dims"],
        "depth": args["arch"]["num_layers"], "num_heads": args["arch"]["num_heads"], "mlp_ratio": 2, "num_classes": 0,
        "global_pool": "token",
    }  # fmt: skip
    run(SNIPPETS[1], f'name, arguments = "vit_large_patch16_224", {kwargs!r}')
    model = timm.create_model("vit_large_patch16_224", **kwargs)
    model.load_state_dict(load_file("vit.safetensors"))
    assert torch.equal(model.blocks[3].mlp.fc2.weight, official["layers.3.ffn.layers.1.weight"])


@pytest.mark.golden
@pytest.mark.parametrize("fixture", ["e2e_a_cnn_student"])
def test_projector_snippet_fills_all_four_when_run(tmp_path, monkeypatch, fixture):
    monkeypatch.chdir(tmp_path)
    args, caps = arguments(fixture), under(golden(fixture), "cap/")
    official = {f"distill_losses.loss_fmd_{name.replace('/', '.')}": leaf for name, leaf in caps.items()}
    torch.save({"state_dict": official, "meta": {"epoch": 3}}, "distiller-official.pth")
    _, later_blocks = split_teacher(swin("e2e_teacher", torch.float32))
    monkeypatch.setattr(feature_store, "open_store", lambda url: SimpleNamespace(later_blocks=lambda: later_blocks))
    s3, s4 = args["s3"], args["s4"]
    dims, grids = (s3["student_dims"], s4["student_dims"]), (tuple(s3["pos_hw"]), tuple(s4["pos_hw"]))
    heads = f"ScaleKDConfig(heads_stage3={s3['num_heads']}, heads_stage4={s4['num_heads']})"
    loss = run(SNIPPETS[3], f"dims, grids, config = {dims}, {grids}, {heads}")["loss"]
    for stage, official_stage in ((loss.stage3, "s3"), (loss.stage4, "s4")):
        for view, number in (("original", 0), ("alternative", 1)):
            expected = caps[f"{official_stage}/projector_{number}/pos_embed"]
            assert torch.equal(stage[view].position, expected)


def test_every_snippet_is_run_when_the_page_grows():
    assert len(SNIPPETS) == 4
