"""Weight files of every kind are read as what they are, or refused as what they are."""

import os
import pickle
import re
import warnings
import zipfile
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from feature_store.errors import InputError
from feature_store.teacher.model import build_model, load_teacher
from feature_store.teacher.weights import read_file, read_weights
from student_trainer.engine.checkpoint import load_checkpoint
from student_trainer.official import load_vit
from student_trainer.students.student import Student

STATE = {"w": torch.arange(3.0)}


class Code:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def script(path: Path) -> None:
    with warnings.catch_warnings(action="ignore"):
        torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), path)


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("weights.txt", "1")


KINDS = {
    "lfs": (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"),
            "is a Git LFS pointer.*git lfs pull"),
    "empty": (lambda p: p.touch(), "is empty; copy or download it again"),
    "html": (lambda p: p.write_text("\n<!DOCTYPE html><title>Sign in</title>"), "is a web page"),
    "xml": (lambda p: p.write_text("<?xml version='1.0'?><Error>Denied</Error>"), "is a web page or X"),
    "index": (lambda p: p.write_text('{"weight_map": {}}'), "is JSON text, such as the index of a model in several"),
    "script": (script, "is a TorchScript archive, which holds code"),
    "cut zip": (lambda p: (torch.save({"w": torch.zeros(999)}, p), cut(p, 900)), "cut short at 900 bytes"),
    "cut old": (lambda p: (torch.save(STATE, p, _use_new_zipfile_serialization=False), cut(p, 200)), "is damaged"),
    "cut safetensors": (lambda p: (save_file(STATE, p), cut(p, 70)), "is a damaged safetensors file"),
    "zip": (zipped, "is a zip archive that torch did not write"),
    "gzip": (lambda p: p.write_bytes(b"\x1f\x8b\x08" + bytes(30)), "is a gzip archive; unpack it"),
    "tar": (lambda p: p.write_bytes(bytes(257) + b"ustar" + bytes(250)), "is a tar archive; unpack it"),
    "folder": (lambda p: (p.mkdir(), save_file(STATE, p / "model.safetensors")),
               "is not a file but a folder; give a file in it: model.safetensors"),
    "empty folder": (lambda p: p.mkdir(), "but a folder; give a safetensors or torch file; it holds none$"),
    "fifo": (lambda p: os.mkfifo(p), "is not a file but a pipe or device"),
    "absent": (lambda p: None, "is not a file: it does not exist"),
    "text": (lambda p: p.write_text("404: Not Found"), "is no safetensors or torch file, or is damaged"),
    "code": (lambda p: torch.save({"state_dict": Code()}, p), r"holds Python objects beside tensors \(\S+mkdir\)"),
    "old code": (lambda p: torch.save({"s": Code()}, p, _use_new_zipfile_serialization=False), "holds Python objects"),
    "module": (lambda p: torch.save(torch.nn.Linear(2, 2), p), r"\(torch.nn.modules.linear.Linear\)"),
    "pickle": (lambda p: p.write_bytes(pickle.dumps({"w": [1.0]})), "holds Python objects"),
    "tensor": (lambda p: torch.save(torch.zeros(3), p), "holds a Tensor, expected tensors by name"),
    "numbers": (lambda p: torch.save({"epoch": 3}, p), "holds a dict of epoch, expected tensors by name"),
    "nothing": (lambda p: torch.save({}, p), "holds a dict of nothing, expected tensors by name"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_refused_as_what_they_are_when_they_are_no_weights(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    make, message = KINDS[kind]
    make(path := tmp_path / "w.pth")
    loaders = [
        read_weights,
        lambda p: load_teacher("test_vit", checkpoint=p),
        lambda p: load_vit(torch.nn.Linear(1, 1), p),
        lambda p: Student("test_resnet", 5, (64, 64), {"checkpoint_path": str(p)}),
    ]
    for load in loaders:
        with pytest.raises(InputError, match=rf"checkpoint \S+w.pth .*{message}") as caught:
            load(path)
        assert "weights_only" not in str(caught.value)
        assert "does not fit" not in str(caught.value)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"folder", "absent"}))
def test_run_checkpoint_is_refused_as_what_it_is_when_it_is_none(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    KINDS[kind][0](path := tmp_path / "last.pt")
    with pytest.raises(
        InputError, match=r"last.pt is not a checkpoint of student-trainer: it (is|holds|has)"
    ) as caught:
        load_checkpoint(path)
    assert "weights_only" not in str(caught.value)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["w.safetensors", "w.bin", "w.pth"])
def test_safetensors_are_read_when_the_name_says_otherwise(tmp_path, name):
    save_file(STATE, tmp_path / name)
    assert torch.equal(read_file(tmp_path / name)["w"], STATE["w"])


@pytest.mark.parametrize("nest", ["state_dict", "model", "model_ema", "state_dict_ema"])
def test_tensors_are_found_when_a_training_checkpoint_holds_them(tmp_path, nest):
    torch.save(
        {nest: {f"module.{k}": v for k, v in STATE.items()}, "epoch": 3, "args": Namespace(lr=1)}, tmp_path / "w.pt"
    )
    assert torch.equal(read_weights(tmp_path / "w.pt")["w"], STATE["w"])


def test_run_checkpoint_is_sent_to_export_when_it_is_given_as_a_teachers_weights(tmp_path):
    torch.save({"format": 2, "student": {}, "weights": STATE}, tmp_path / "best.pt")
    with pytest.raises(InputError, match=r"best.pt is a training run's.*; export the run first"):
        read_weights(tmp_path / "best.pt")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_teacher_is_refused_when_its_weights_are_not_finite(tmp_path, value):
    model = build_model("test_vit", {"num_classes": 3})
    with torch.no_grad():
        model.get_parameter("head.bias")[1] = value
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=r"NaN or infinite values in 1 tensors, first head.bias; give one from before"):
        load_teacher("test_vit", checkpoint=tmp_path / "w.safetensors", model_kwargs={"num_classes": 3})


def test_weights_are_refused_without_advice_to_run_code_when_timm_itself_reads_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Code()}, tmp_path / "w.pth")
    with pytest.raises(InputError) as caught:
        Student("test_resnet", 5, (64, 64), {"pretrained": True, "pretrained_cfg_overlay": {"file": "w.pth"}})
    assert "Python objects" in str(caught.value)
    assert "weights_only" not in str(caught.value)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["hf-hub:timm/resnet18.a1_in1k", "hf_hub:some/model", "local-dir:nowhere"])
def test_model_name_is_refused_with_the_reason_when_it_names_a_place(name):
    with pytest.raises(
        InputError, match=rf"{re.escape(name)}.* depends on what lies at .*; give the architecture as in"
    ):
        load_teacher(name)


def test_folder_name_is_refused_with_what_to_give_when_it_was_saved_by_timm(tmp_path):
    (tmp_path / "config.json").write_text(
        '{"architecture": "test_vit", "num_classes": 7, "model_args": {"img_size": 64}}'
    )
    with pytest.raises(
        InputError, match=r"give the name 'test_vit', the arguments {\"num_classes\": 7, \"img_size\": 64}"
    ):
        Student(f"local-dir:{tmp_path}", 7, (64, 64))


def test_weights_are_not_looked_at_when_the_model_is_on_the_meta_device(tmp_path):
    save_file(build_model("test_vit", {"num_classes": 3}).state_dict(), tmp_path / "w.safetensors")
    with torch.device("meta"), warnings.catch_warnings(action="ignore"):
        build_model("test_vit", {"num_classes": 3, "checkpoint_path": str(tmp_path / "w.safetensors")})
