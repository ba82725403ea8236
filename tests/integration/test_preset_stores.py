"""From the line a preset says to cache with to a trained student, and the stores that a preset refuses.

The teacher is thinned behind timm's back: the line runs as it is printed, but for its two placeholders.
"""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
from training_world import samples, write_tar

from feature_store import open_store
from student_trainer.cli import main as student_trainer
from student_trainer.engine.metrics import read_metrics
from teacher_service.cli import main as teacher_service

PRESET = "adv-eva_l14-resnet50"
THIN = {"embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 4}
STUDENT = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "stem_width": 8}
Command = Callable[..., list[str]]


@pytest.fixture(scope="module")
def tar(tmp_path_factory) -> str:
    return write_tar(tmp_path_factory.mktemp("tars") / "train.tar", samples(8, seed=0))


@pytest.fixture(autouse=True)
def thin_teacher(monkeypatch) -> None:
    create = timm.create_model

    def thin(name: str, pretrained: bool = False, **kwargs: Any) -> Any:
        return create(name, **({**THIN, **kwargs} if name.startswith("eva_large") else kwargs))

    monkeypatch.setattr(timm, "create_model", thin)


@pytest.fixture
def cache(tar, tmp_path, capsys) -> Callable[..., Path]:
    """Run the preset's line, changed by options given after it (the last of several counts) or left out."""

    def run(*changes: str, without: tuple[str, ...] = ()) -> Path:
        assert student_trainer(["presets", PRESET, "--cache-command"]) == 0
        program, *line = shlex.split(capsys.readouterr().out)
        assert program == "teacher-service"
        line = [{"TARS": tar, "STORE": str(tmp_path / "store")}.get(word, word) for word in line if word not in without]
        assert teacher_service([*line, "--workers", "0", "--device", "cpu", *changes]) == 0
        return tmp_path / "store"

    return run


def train(store: Path, tar: str, run: Path, *more: str) -> int:
    return student_trainer(
        ["train", "--preset", PRESET, "--run", str(run), "--tars", tar, "--store", str(store), "--student-kwargs",
         json.dumps(STUDENT), "--epochs", "1", "--batch-size", "4", "--log-every", "1", "--workers", "0",
         "--no-progress", "--no-report", *more]
    )  # fmt: skip


def test_preset_trains_on_the_store_that_its_line_caches(cache, tar, tmp_path):
    store = cache()
    manifest = open_store(store).manifest
    assert (manifest.num_views, manifest.split.depth, manifest.split.prefix) == (4, 2, "dropped")
    assert (manifest.teacher.input_size, manifest.teacher.mean) == ((224, 224), (0.485, 0.456, 0.406))
    assert manifest.taps.keys() == {"stage4"}
    assert train(store, tar, tmp_path / "run") == 0
    steps = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "step"]
    assert len(steps) == 2
    assert {"stage3_original", "stage3_alternative", "stage4_original", "stage4_alternative", "kd"} <= steps[0][
        "raw"
    ].keys()
    assert json.loads((tmp_path / "run" / "config.json").read_text())["config"]["preset"] == PRESET


OVERLAY = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
OTHERS = {  # what the store is written with instead -> how the run refuses it, and the option that accepts it
    "crop area": (["--policy-options", '{"scale": [0.35, 1.0]}'], (), "policy.scale", "[0.08, 1.0], got [0.35, 1.0]"),
    "flip": (["--policy-options", '{"flip": 0.0}'], (), "policy.flip", "0.5, got 0.0"),
    "filter": (["--policy-options", '{"interpolation": "bilinear"}'], (), "policy.interpolation", "'bilinear'"),
    "named policy": (["--policy", "a2"], (), "policy.level", "7.0, got 9.0"),
    "size": (["--model-kwargs", json.dumps({"img_size": 196, "pretrained_cfg_overlay": OVERLAY})], (), "input_size",
             "(224, 224), got (196, 196)"),
    "prefix": ([], ("--drop-prefix",), "prefix", "'dropped', got 'cached'"),
    "depth": (["--depth", "1"], (), "depth", "2, got 1"),
    "statistics": (["--model-kwargs", '{"img_size": 224}'], (), "model_kwargs", "got {'img_size': 224}"),
}  # fmt: skip


@pytest.mark.parametrize("other", OTHERS)
def test_preset_refuses_a_store_by_the_name_of_what_is_other(cache, tar, tmp_path, capsys, other):
    changes, without, field, values = OTHERS[other]
    store = cache(*changes, without=without)
    capsys.readouterr()
    assert train(store, tar, tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"student-trainer: error: expect.{field} differs: the run has ")
    assert values in error
    assert f"`student-trainer presets {PRESET} --cache-command` prints the" in error
    assert not (tmp_path / "run").exists()
    option = error.split("give ")[1].split(" to train")[0]
    lifted = [*option.split(), *(["--expect.model-kwargs", "None"] if other == "size" else [])]
    assert train(store, tar, tmp_path / "run", *lifted) == 0
