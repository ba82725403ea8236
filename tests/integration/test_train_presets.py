"""Presets from the command line to a trained student; teachers and students are thinned, the rest is as released."""

import json
from pathlib import Path

import pytest
import torch
from stopped_runs import before_updates
from timm.optim import Lamb
from training_world import CLASSES, SIZE, World, make_world

from feature_store.views import view_policy
from student_trainer.cli import main
from student_trainer.engine.checkpoint import load_checkpoint
from student_trainer.engine.metrics import read_metrics
from student_trainer.recipes import PRESETS
from student_trainer.students.load import load_student

THIN_SWIN = {
    "img_size": SIZE, "num_classes": CLASSES, "embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 4],
    "window_size": 2,
}  # fmt: skip
WORLDS = {  # view policy -> teacher
    "rrc_flip": "swin_small_patch4_window7_224",
    "a1": "swin_large_patch4_window7_224",
    "a2": "swin_large_patch4_window7_224",
    "a3": "swin_large_patch4_window7_224",
}


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    made: dict[str, World] = {}

    def world(policy: str) -> World:
        if policy not in made:
            root = tmp_path_factory.mktemp(policy)
            made[policy] = make_world(root, (WORLDS[policy], THIN_SWIN), policy=view_policy(policy, SIZE), num_views=1)
        return made[policy]

    return world


def line(preset: str, world: World, run: Path, student: dict, *more: str) -> list[str]:
    kwargs = {**PRESETS[preset].options.get("student_kwargs", {}), **student}
    return [
        "train", "--preset", preset, "--run", str(run), "--tars", *world.tars, "--store", str(world.store),
        "--expect.model-kwargs", "None", "--expect.input-size", "None",  # the thinned teacher's
        "--student-kwargs", json.dumps(kwargs), "--epochs", "1", "--batch-size", "8", "--log-every", "1",
        "--workers", "0", "--no-progress", "--no-report", *more,
    ]  # fmt: skip


HEADS = ("--scalekd.heads-stage3", "2", "--scalekd.heads-stage4", "2")  # the thinned teacher is 64 and 128 wide
THIN_RESNET = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "stem_width": 8}
CASES = {
    "trad-swin_s-resnet50": ("rrc_flip", THIN_RESNET, HEADS),
    "adv-swin_l-resnet50": ("a1", THIN_RESNET, HEADS),
    "adv-swin_l-vit_s16": ("a2", {"depth": 4, "embed_dim": 48, "num_heads": 2}, ()),
    "adv-swin_l-convnext_t": ("a2", {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}, ()),
    "adv-swin_l-swin_t": (
        "a2", {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 2}, HEADS,
    ),
    "adv-swin_l-mixer_s16": ("a3", {}, ()),
}  # fmt: skip


@pytest.mark.parametrize("preset", CASES)
def test_preset_trains_when_given_its_teachers_store(worlds, tmp_path, preset):
    policy, student, more = CASES[preset]
    optimizers = []
    with before_updates(lambda _, optimizer: optimizers.append(optimizer)):
        assert main(line(preset, worlds(policy), tmp_path / "run", student, *more)) == 0
    steps = [entry for entry in read_metrics(tmp_path / "run" / "metrics.jsonl") if entry["kind"] == "step"]
    assert [entry["step"] for entry in steps] == [1, 2, 3]
    expected = {
        "rrc_flip": (torch.optim.SGD, 0.1 * 8 / 256),
        "a1": (Lamb, 1.25e-3 * (8 / 2048) ** 0.5),
        "a2": (torch.optim.AdamW, 1e-6 * 8 / 1024),
        "a3": (torch.optim.AdamW, 7e-10 * 8 / 1536),
    }[policy]
    assert isinstance(optimizers[0], expected[0])
    assert steps[0]["lr"] == pytest.approx(expected[1])
    checkpoint = load_checkpoint(tmp_path / "run" / "last.pt")
    used = load_student(tmp_path / "run" / "last.pt").student.model.state_dict()
    assert (checkpoint.ema is not None) == (policy in ("a2", "a3"))
    expected = checkpoint.ema if policy == "a2" else checkpoint.weights  # mixer_s16 keeps an average, uses raw weights
    assert all(torch.equal(used[name], value) for name, value in expected.items())
    assert json.loads((tmp_path / "run" / "config.json").read_text())["config"]["preset"] == preset


def test_preset_refuses_a_store_of_another_teacher_unless_told(worlds, tmp_path, capsys):
    world, (_, student, more) = worlds("rrc_flip"), CASES["adv-swin_l-resnet50"]
    arguments = line("adv-swin_l-resnet50", world, tmp_path / "run", student, *more)
    assert main(arguments) == 2
    assert capsys.readouterr().err.strip() == (
        "student-trainer: error: expect.teacher differs: the run has 'swin_large_patch4_window7_224', got "
        "'swin_small_patch4_window7_224'; `student-trainer presets adv-swin_l-resnet50 --cache-command` prints the "
        "teacher and view options it expects; or give --expect.teacher None to train with this one all the same"
    )
    assert main([*arguments, "--expect.teacher", "None"]) == 2
    assert "expect.policy.interpolation differs: the run has 'bicubic', got 'bilinear'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert main([*arguments, "--expect.teacher", "None", "--expect.policy", "None"]) == 0
