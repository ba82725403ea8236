"""docs/how-to/migrate.md: its snippets run, on small models in place of the large ones, and what it names exists."""

import json
import re
from dataclasses import fields
from fnmatch import fnmatch
from inspect import signature
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from golden_files import arguments, golden, swin, under
from safetensors.torch import load_file, save_file

import feature_store
import student_trainer.cli
import teacher_service.cli
from feature_store.teacher import split_teacher
from student_trainer import official
from student_trainer.methods import cap as projector
from student_trainer.methods.dfm import VIEW_LOSSES
from student_trainer.methods.scalekd import ScaleKDConfig
from student_trainer.recipes import PRESETS
from student_trainer.recipes.preset import Preset
from student_trainer.students import networks

DOCS = Path(__file__).parents[3] / "docs"
PAGE = (DOCS / "how-to" / "migrate.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
PROSE = re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL)
NAMES = re.findall(r"`([^`]+)`", PROSE)
PROGRAMS = {"student-trainer": student_trainer.cli.main, "teacher-service": teacher_service.cli.main}
THEIRS = {
    "configs/distillers", "478a7db", "7ba1c12", "becc118", "swin-b_distill_res50", "swin-l_distill_mbv1",
    "swin-l_distill_swin-t", "swin-s_distill_res50", "eva-l_distill_eva-02-s_img_336px", "loss_fmd_s3", "loss_fmd_s4",
    "loss_kd", "loss_fd", "self_query", "projector_0", "projector_1", "alpha", "temp", "use_logit", "student_dims",
    "teacher_dims", "query_hw", "pos_hw", "num_heads", "window_shapes", "FreqMaskingDistillLossConvNext",
    "evaluate_on_ema", "dis_freq", "auto_scale_lr", "find_unused_parameters", "eval", "None", "log_softmax", "norm",
    "forward_intermediates", "timm.create_model", "torch.save", "weights_only",
}  # fmt: skip
"""Names of the official code, torch and timm, which are not looked for."""


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


def test_counts_of_configs_are_the_tables_when_the_page_gives_them():
    (unlisted,) = re.findall(r"The remaining advanced configs \(([^)]+)\) have no\s+preset", PAGE)
    kept, others = len(re.findall(r"^\| .* \| kept \|", PAGE, re.MULTILINE)), unlisted.count("`") // 2
    assert (kept, len(PRESETS) - kept + others, len(PRESETS) + others) == (6, 11, 17)
    assert re.search(r"all 17 configs: the next one, `becc118`, deleted eleven\. The other\s+six are unchanged", PAGE)
    assert f"of the {len(PRESETS)} presets" in PAGE


def presets_meant(words: str) -> set[str]:
    """By a cell of the table of differences."""
    if words == "all with Swin teachers":
        return {name for name, preset in PRESETS.items() if preset.teacher.name.startswith("swin")}
    if words == "all with cosine":
        return {name for name, preset in PRESETS.items() if preset.config().optim.sched == "cosine"}
    patterns = re.findall(r"`([^`]+)`", words)
    return {name for name in PRESETS if any(fnmatch(name, p) or name.endswith(f"-{p}") for p in patterns)}


def test_every_difference_of_a_preset_has_a_row_that_names_it_when_the_page_lists_them():
    _, _, *rows = re.findall(r"^\| ([^|`]+) \| [^|]+ \| [^|]+ \| ([^|]+) \|$", PAGE, re.MULTILINE)
    listed = {(setting, name) for some, words in rows for setting in some.split(", ") for name in presets_meant(words)}
    assert listed == {(setting, name) for name, preset in PRESETS.items() for setting in preset.differs}


def test_commands_have_the_options_when_the_page_names_them(capsys):
    def options(program: str, command: str) -> set[str]:
        assert PROGRAMS[program]([command, "--help"]) == 0
        text = capsys.readouterr().out
        assert text.startswith(f"usage: {program} {command} ")  # not the help of the whole program
        return {*text.split()}

    named = [name.split() for name in NAMES if name.startswith(tuple(PROGRAMS))]
    assert len(named) == 4
    for program, command, *words in named:
        assert {*words} - {"NAME"} <= options(program, command)
    of_train, of_cache = options("student-trainer", "train"), options("teacher-service", "cache")
    line = ["train", "--run", "r", "--tars", "t", "--teacher.name", "any", "--student", "any", "--print-config"]
    for option, *values in (name.replace(" a b", " 0.5 0.25").split() for name in NAMES if name.startswith("--")):
        if option not in of_train:
            assert {word for word in (option, *values) if word.startswith("--")} <= of_cache
        elif values:
            line += [option, *values]
    assert PROGRAMS["student-trainer"](line) == 0  # so each value is one the option takes


def test_names_are_ours_or_theirs_when_the_page_gives_them():
    files = (preset.source.file.removeprefix("configs/distillers/") for preset in PRESETS.values())
    fields_of = (field.name for made in (Preset, ScaleKDConfig) for field in fields(made))
    known = {
        *files,
        *fields_of,
        *VIEW_LOSSES,
        *dir(official),
        *dir(projector),
        *dir(ScaleKDConfig),
        f"import {networks.__name__}",
        *THEIRS,
    }
    for name in NAMES:
        (word,) = re.findall(r"^\W*((?:import )?[\w./-]*\w)", name)  # without arguments
        option = name.startswith(("--", *PROGRAMS))
        assert option or word in known or timm.is_model(word) or presets_meant(f"`{name}`"), name
    assert {word for word in THEIRS if word not in PAGE} == set()
    assert "token_order" in signature(projector.CrossAttentionProjector).parameters


def test_linked_pages_exist_when_the_page_refers_to_them():
    links = re.findall(r"\]\((?!https:)([^)]+)\)", re.sub(r"`[^`]*`", "", PROSE))
    assert links
    assert [link for link in links if not (DOCS / "how-to" / link).is_file()] == []


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
