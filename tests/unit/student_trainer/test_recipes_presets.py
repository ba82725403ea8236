"""Every preset in its true shapes, without memory or time: on the meta device, where only shapes exist."""

import json
import shlex
from functools import cache
from pathlib import Path

import pytest
import torch
from distilled_presets import distilled
from timm.optim import Lamb

from feature_store.errors import InputError
from feature_store.teacher import LaterBlocks, split_teacher
from feature_store.teacher.model import build_model
from feature_store.views import POLICIES
from student_trainer.cli import main
from student_trainer.config import OptimConfig, TrainConfig
from student_trainer.engine.optimizer import make_optimizer
from student_trainer.methods import DistillBatch, TeacherOutput
from student_trainer.recipes import A1, A2, PRESETS, SCHEDULES, T1, preset_config
from student_trainer.teachers.config import StoreTeacher

B, K = 2, 1000


@cache
def later_blocks(teacher: str) -> LaterBlocks:
    preset = next(preset for preset in PRESETS.values() if preset.teacher.name == teacher)
    with torch.device("meta"):
        model = build_model(teacher, preset.teacher.model_kwargs)
        return split_teacher(model, preset.teacher.depth, drop_prefix=preset.teacher.drop_prefix)[1]


def run_config(name: str, **options) -> TrainConfig:
    return preset_config(PRESETS, name, run=Path("r"), tars=("a.tar",), teacher=StoreTeacher("s"), **options)


@pytest.mark.parametrize("name", PRESETS)
def test_preset_makes_a_step_in_its_true_shapes_when_built_on_the_meta_device(name):
    config, later = run_config(name), later_blocks(PRESETS[name].teacher.name)
    split = later.info
    with torch.device("meta"):
        module = distilled(config, K, (224, 224), later)
        taps = {"stage4": torch.empty(B, split.output_grid[0] * split.output_grid[1], split.output_dim)}
        if split.prefix == "cached":
            taps["stage3_prefix"] = torch.empty(B, split.prefix_tokens, split.input_dim)
        images, labels = torch.empty(B, 3, 224, 224), torch.zeros(B, dtype=torch.int64)
        terms = module(DistillBatch(images, labels, TeacherOutput(taps, torch.empty(B, K))))
        optimizer = make_optimizer(config.optim, module)
        terms.total.backward()
    optimizer.step()  # outside: torch 2.6 would put its count of steps there too
    assert "stage3_alternative" in terms.raw
    assert ("stage4_alternative" in terms.raw) == (config.scalekd.beta_stage4 < 1)
    assert ("kd" in terms.raw) == (config.scalekd.kd_alpha is not None)
    # every parameter learns; one without a gradient would stop distributed training
    assert [name for name, leaf in module.named_parameters() if leaf.grad is None] == []
    assert all(leaf.grad is None for leaf in later.parameters())
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(module.parameters()))


@pytest.mark.parametrize(
    ("name", "dims", "grids", "heads", "queries"),
    [
        ("trad-swin_s-resnet50", (1024, 2048), (14, 7), (3, 6), (196, 49)),
        ("trad-swin_b-resnet50", (1024, 2048), (14, 7), (8, 16), (196, 49)),
        ("trad-swin_l-mobilenetv1", (512, 1024), (14, 7), (16, 24), (196, 49)),
        ("adv-swin_l-resnet50", (1024, 2048), (14, 7), (16, 24), (196, 49)),
        ("adv-swin_l-vit_b16", (768, 768), (14, 14), (8, 8), (196, 49)),
        ("adv-eva_l14-mixer_b14", (768, 768), (16, 16), (8, 8), (256, 256)),
        ("adv-eva_l14-vit_b14", (768, 768), (16, 16), (8, 8), (256, 256)),
    ],
)
def test_preset_has_the_released_shapes_when_built(name, dims, grids, heads, queries):
    with torch.device("meta"):
        module = distilled(run_config(name), K, (224, 224), later_blocks(PRESETS[name].teacher.name))
    assert module.student.dims == dims
    assert module.student.grids == tuple((grid, grid) for grid in grids)
    caps = module.method.stage3["original"], module.method.stage4["original"]
    assert tuple(cap.num_heads for cap in caps) == heads
    assert tuple(cap.query_hw[0] * cap.query_hw[1] for cap in caps) == queries
    assert [cap.key_hw for cap in caps] == list(module.student.grids)


def test_schedules_name_known_policies_when_listed():
    assert list(SCHEDULES) == ["T1", "T2", "A1", "A2", "A3"]
    assert {schedule.policy for schedule in SCHEDULES.values()} <= POLICIES.keys()


def test_learning_rate_follows_the_batch_when_it_is_not_the_schedules():
    linear, root = T1.optim.at(512), A1.optim.at(512)
    assert linear.lr == pytest.approx(0.2)
    assert (root.lr, root.warmup_lr) == pytest.approx((2.5e-3, 0.625e-3))
    assert A2.optim.at(2048).min_lr == pytest.approx(2e-5)
    assert OptimConfig(lr=0.3).at(7).lr == 0.3  # without lr_batch rates are as given


def test_optimizer_is_timms_with_the_scaled_rate_when_a_preset_trains():
    config = run_config("adv-swin_l-resnet50", batch_size=512)
    with torch.device("meta"):
        module = distilled(config, K, (224, 224), later_blocks(PRESETS["adv-swin_l-resnet50"].teacher.name))
    optimizer = make_optimizer(config.optim.at(config.batch_size), module)
    assert isinstance(optimizer, Lamb)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(2.5e-3)


def test_a2_spares_norms_biases_positions_and_class_token_when_decaying():
    config = run_config("adv-swin_l-vit_s16")
    with torch.device("meta"):
        module = distilled(config, K, (224, 224), later_blocks(PRESETS["adv-swin_l-vit_s16"].teacher.name))
    spared = {
        id(p) for g in make_optimizer(config.optim, module).param_groups if not g["weight_decay"] for p in g["params"]
    }
    for name, leaf in module.named_parameters():
        free = leaf.ndim <= 1 or name.endswith(("bias", "position", "pos_embed", "cls_token"))
        assert (id(leaf) in spared) == free, name


def test_preset_name_is_corrected_when_unknown():
    with pytest.raises(InputError, match=r"no preset 'adv-swin_l-resnet5'; did you mean adv-swin_l-resnet50"):
        run_config("adv-swin_l-resnet5")


LINE = ["train", "--preset", "adv-swin_l-vit_s16", "--run", "r", "--tars", "a.tar", "--store", "s", "--print-config"]


def test_command_prints_the_presets_settings_when_asked(capsys):
    assert main(LINE) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["preset"] == "adv-swin_l-vit_s16"
    assert (printed["student"], printed["epochs"], printed["ema_decay"]) == ("vit_small_patch16_224", 300, 0.9999)
    assert printed["expect"] == {
        "teacher": "swin_large_patch4_window7_224", "model_kwargs": {}, "input_size": [224, 224], "depth": None,
        "prefix": None, "policy": "a2",
    }  # fmt: skip
    assert not Path("r").exists()


def test_command_overrides_the_preset_when_options_are_given_beside_it(capsys):
    changes = [
        "--epochs",
        "3",
        "--ema-decay",
        "None",
        "--optim.opt",
        "lamb",
        "--scalekd.no-tpp",
        "--expect.policy",
        "None",
    ]
    assert main([*LINE, *changes]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["epochs"], printed["ema_decay"], printed["optim"]["opt"]) == (3, None, "lamb")
    assert printed["optim"]["lr"] == 1e-3  # what was not given stays the preset's
    assert printed["scalekd"]["tpp"] is False
    assert printed["expect"]["policy"] is None


def test_command_takes_the_last_preset_when_several_are_given(capsys):
    assert main([*LINE, "--preset", "trad-swin_l-resnet50"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["preset"], printed["student"]) == ("trad-swin_l-resnet50", "resnet50")


def test_command_lists_presets_when_asked(capsys):
    assert main(["presets", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["presets"]
    assert [row["preset"] for row in rows] == list(PRESETS)
    assert main(["presets"]) == 0
    assert all(name in capsys.readouterr().out for name in ("adv-eva_l14-vit_b14",))
    assert main(["presets", "trad-swin_s-resnet50"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["sync_bn"] is True
    assert printed["source"] == {
        "commit": "7ba1c12",
        "file": "configs/distillers/traditional_traning_strategy/swin-s_distill_res50_img_s3_s4.py",
    }
    assert printed["differs"] == dict(PRESETS["trad-swin_s-resnet50"].differs)


def test_command_shows_a_teachers_image_size_when_listing(capsys):
    assert main(["presets", "--json"]) == 0
    rows = {row["preset"]: row for row in json.loads(capsys.readouterr().out)["presets"]}
    assert {row["size"] for row in rows.values()} == {224}
    eva = rows["adv-eva_l14-resnet50"]
    assert (eva["model_kwargs"]["img_size"], eva["depth"], eva["drop_prefix"]) == (224, 2, True)


def test_command_prints_the_line_to_cache_with_when_asked(capsys):
    assert main(["presets", "adv-eva_l14-mixer_b14", "--cache-command"]) == 0
    assert shlex.split(capsys.readouterr().out) == [
        "teacher-service", "cache", "TARS", "--teacher", "eva_large_patch14_196.in22k_ft_in22k_in1k", "--model-kwargs",
        '{"img_size": 224, "pretrained_cfg_overlay": {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}}',
        "--depth", "2", "--drop-prefix", "--policy", "a3", "--views", "4", "--store", "STORE",
    ]  # fmt: skip
    assert main(["presets", "trad-swin_s-resnet50", "--cache-command"]) == 0
    assert shlex.split(capsys.readouterr().out)[3:-4] == [
        "--teacher", "swin_small_patch4_window7_224.ms_in1k", "--policy", "rrc_flip",
    ]  # fmt: skip


def test_command_asks_for_a_preset_when_the_line_to_cache_with_is_wanted_of_all(capsys):
    assert main(["presets", "--cache-command"]) == 2
    assert "name the preset" in capsys.readouterr().err


def test_command_names_the_presets_when_an_unknown_one_is_asked_for(capsys):
    assert main(["train", "--preset", "nope", "--run", "r", "--tars", "a.tar"]) == 2
    assert "adv-swin_l-resnet50" in capsys.readouterr().err
