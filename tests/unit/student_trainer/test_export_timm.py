import json
import os
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from onnx import TensorProto, helper, numpy_helper
from packaging.version import Version
from safetensors.torch import load_file

from feature_store.errors import InputError, MismatchError
from student_trainer.cli import main
from student_trainer.engine.checkpoint import Checkpoint, Progress, load_checkpoint, rng_state, save_checkpoint
from student_trainer.export import ExportConfig, export
from student_trainer.students.load import describe_student, load_student, save_student
from student_trainer.students.preprocessing import Preprocessing
from student_trainer.students.student import Student

NAMES = tuple("abcdefg")
HOW = Preprocessing((64, 64), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "bilinear", 1.0)

torch_exports = pytest.mark.skipif(
    Version(torch.__version__) < Version("2.7"), reason="torch 2.6 and onnxscript of today do not fit together"
)


def save(path, student: Student) -> None:
    save_checkpoint(
        path,
        Checkpoint(
            student=describe_student(student, HOW, NAMES),
            weights=student.model.state_dict(),
            loss={"stage4.original.query": torch.ones(2, 2)},
            optimizer={},
            progress=Progress(),
            rng=[rng_state()],
        ),
    )


@pytest.fixture(params=[("test_resnet", {"drop_rate": 0.1}), ("test_vit", {})], ids=["cnn", "vit"])
def run(request, tmp_path):
    torch.manual_seed(0)
    name, kwargs = request.param
    student = Student(name, 7, HOW.input_size, kwargs).train()
    with torch.no_grad():
        for _ in range(2):  # batch statistics must be exported too
            student(torch.randn(4, 3, 64, 64))
        for parameter in student.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    folder = tmp_path / "run"
    folder.mkdir()
    save(folder / "last.pt", student)
    return folder, student.eval()


def test_export_loads_in_timm_with_equal_logits_when_written(run, tmp_path):
    folder, student = run
    files = export(ExportConfig(run=folder, out=tmp_path / "out"))
    assert [file.name for file in files] == ["config.json", "model.safetensors"]
    images = torch.randn(2, 3, 64, 64)
    size = {"img_size": (64, 64)} if student.name == "test_vit" else {}
    by_name = timm.create_model(
        student.name, checkpoint_path=str(tmp_path / "out/model.safetensors"), num_classes=7, **size
    )
    models = [by_name]
    if Version(timm.__version__) >= Version("1.0.31"):  # earlier ones read no safetensors from a folder
        models.append(timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True))
    with torch.no_grad():
        expected = student.model(images)
        for model in models:
            assert torch.equal(model.eval()(images), expected)


def test_export_holds_only_the_student_and_its_preprocessing_when_written(run, tmp_path):
    folder, student = run
    export(ExportConfig(run=folder, out=tmp_path / "out"))
    assert load_file(tmp_path / "out/model.safetensors").keys() == student.model.state_dict().keys()
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["architecture"] == student.name
    pretrained = config["pretrained_cfg"]
    assert pretrained["mean"] == [0.5, 0.4, 0.3]
    assert (pretrained["input_size"], pretrained["crop_pct"], pretrained["num_classes"]) == ([3, 64, 64], 1.0, 7)
    assert config["label_names"] == list(NAMES)
    assert not any(pretrained[name] for name in ("tag", "license", "origin_url"))  # timm's, of other weights


@pytest.mark.parametrize("name", ["best.safetensors", "best.pt"])  # the second is of runs of release 0.1
def test_best_student_is_taken_when_a_run_has_one(run, name):
    folder, student = run
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    if name == "best.pt":
        save(folder / name, student)
    else:
        described = load_checkpoint(folder / "last.pt").student
        save_student(folder / name, described, student.model.state_dict())
    weights = load_student(folder).student.model.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in student.model.state_dict().items())
    other = load_student(folder / "last.pt").student.model.state_dict()
    assert not all(torch.equal(other[name], value) for name, value in student.model.state_dict().items())


def test_checkpoint_is_refused_when_its_weights_do_not_fit_the_model(run):
    folder, _ = run
    checkpoint = load_checkpoint(folder / "last.pt")
    weights = dict(list(checkpoint.weights.items())[1:])
    save_checkpoint(folder / "last.pt", replace(checkpoint, weights=weights))
    with pytest.raises(InputError, match=r"last.pt does not fit timm's test_\w+ any more: .*Missing key"):
        load_student(folder)


@pytest.mark.parametrize("command", ["export", "evaluate"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_student_is_refused_by_name_when_its_weights_are_not_finite(run, tmp_path, capsys, command, value):
    folder, student = run
    name = next(name for name, _ in student.model.named_parameters())
    student.model.get_parameter(name).data.flatten()[0] = value
    save(folder / "last.pt", student)
    options = {"export": ["--out", str(tmp_path / "out")], "evaluate": ["--tars", "val.tar"]}[command]
    assert main([command, "--run", str(folder), *options]) == 1
    assert f"last.pt holds NaN or infinite values in 1 tensors, first {name}: the training" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("described", [{}, {"name": "test_vit", "model_kwargs": {}, "preprocessing": {"mean": 1}}])
def test_student_is_refused_when_its_checkpoint_does_not_describe_it(run, described):
    folder, _ = run
    save_checkpoint(folder / "last.pt", replace(load_checkpoint(folder / "last.pt"), student=described))
    with pytest.raises(InputError, match=r"last.pt does not describe its student: .*; use the release that wrote it"):
        load_student(folder)


def test_export_is_refused_when_the_folder_is_not_empty(run):
    folder, _ = run
    with pytest.raises(InputError, match=r"--out .*run already exists; choose another folder"):
        export(ExportConfig(run=folder, out=folder))


@torch_exports
def test_onnx_gives_the_students_logits_when_run_with_another_batch_size(run, tmp_path):
    folder, student = run
    export(ExportConfig(run=folder, out=tmp_path / "out", onnx=True))
    session = onnxruntime.InferenceSession(str(tmp_path / "out/model.onnx"), providers=["CPUExecutionProvider"])
    images = torch.randn(5, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = student.model.eval()(images)
    got = torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])
    assert torch.allclose(got, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def write_other_network(_model, _arguments, path: str, **_) -> None:
    """In place of torch.onnx.export: a network whose logits are zero."""
    images, logits = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("images", ["batch", 3, 64, 64]), ("logits", ["batch", 7]))
    )
    nodes = [
        helper.make_node("Flatten", ["images"], ["flat"]),
        helper.make_node("MatMul", ["flat", "zeros"], ["logits"]),
    ]
    zeros = numpy_helper.from_array(np.zeros((3 * 64 * 64, 7), np.float32), "zeros")
    graph = helper.make_graph(nodes, "other", [images], [logits], [zeros])
    onnx.save(helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)]), path)


def test_onnx_is_removed_when_it_gives_other_logits(run, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.onnx, "export", write_other_network)
    with pytest.raises(MismatchError, match=r"logits of model.onnx.*was removed"):
        export(ExportConfig(run=run[0], out=tmp_path / "out", onnx=True))
    assert not (tmp_path / "out/model.onnx").exists()


def test_export_says_what_to_install_when_onnx_is_absent(run, tmp_path, monkeypatch):
    monkeypatch.setattr("student_trainer.export.find_spec", lambda name: None if name == "onnxruntime" else object())
    with pytest.raises(
        InputError, match=r"--onnx needs onnxruntime; install with `pip install 'scalekd-cache\[onnx\]'`"
    ):
        export(ExportConfig(run=run[0], out=tmp_path / "out", onnx=True))
    assert not (tmp_path / "out").exists()


def test_export_follows_the_umask_when_written(run, tmp_path):
    before = os.umask(0o022)
    try:
        files = export(ExportConfig(run=run[0], out=tmp_path / "out", backbone=True))
    finally:
        os.umask(before)
    assert [file.name for file in files] == ["backbone.safetensors", "config.json", "model.safetensors"]
    assert {file.stat().st_mode & 0o777 for file in files} == {0o644}


BEIT = ("beit_base_patch16_224", {"img_size": 64, "embed_dim": 48, "depth": 2, "num_heads": 3})


@torch_exports
def test_onnx_gives_the_students_logits_when_its_attention_is_fused(tmp_path):
    save(tmp_path / "last.pt", Student(BEIT[0], 7, HOW.input_size, BEIT[1]))
    export(ExportConfig(run=tmp_path / "last.pt", out=tmp_path / "out", onnx=True))  # compares the logits itself
    assert (tmp_path / "out/model.onnx").is_file()


def test_onnx_is_refused_in_one_line_when_torch_cannot_export_the_model(run, tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise RuntimeError("Failed\nlong text") from ValueError("no function for aten::odd\n at line 3")

    monkeypatch.setattr(torch.onnx, "export", fail)
    assert main(["export", "--run", str(run[0]), "--out", str(tmp_path / "out"), "--onnx"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"cannot export {run[1].name} to ONNX (no function for aten::odd at line 3); the other files in" in line
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
