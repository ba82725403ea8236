import json
import re
import shlex
from pathlib import Path

import pytest
import timm
from tiny_jobs import make_config, write_tars

from feature_store.errors import InputError
from teacher_service.cli import main
from teacher_service.config import PlanConfig, TeacherListConfig
from teacher_service.plan.sizes import plan
from teacher_service.teachers import list_teachers


def test_list_gives_shapes_and_bytes_without_weights_when_a_pattern_matches():
    found = list_teachers(TeacherListConfig(pattern="test_vit*"))
    assert [each.name for each in found.teachers] == timm.list_models("test_vit*")  # newer releases have more
    (relative,) = list_teachers(TeacherListConfig(pattern="vit_relpos_small_patch16_224")).teachers
    first = found.teachers[0]
    assert (first.input_size, first.grid, first.channels, first.blocks) == ((160, 160), (10, 10), 64, 6)
    assert (first.num_classes, first.later_blocks, relative.later_blocks) == (1000, "vit", None)


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_convnext"])
def test_bytes_a_view_are_those_that_plan_gives(name, tmp_path):
    (entry,) = list_teachers(TeacherListConfig(pattern=name)).teachers
    tars = write_tars(tmp_path, 200)
    promised = plan(make_config(PlanConfig, tars=tars, teacher=name, store=tmp_path / "store"))
    values = sum(size for kind, size in promised.bytes.items() if kind.startswith(("taps", "logits", "samples")))
    assert entry.view_bytes == pytest.approx(values / 200, rel=0.02)  # plan counts keys and labels too


def test_list_says_why_when_a_model_cannot_be_a_teacher(monkeypatch):
    import timm.models.resnet

    monkeypatch.delattr(timm.models.resnet.ResNet, "forward_intermediates")
    with pytest.raises(InputError, match="ResNet has no forward_intermediates"):
        list_teachers(TeacherListConfig(pattern="test_resnet"))
    found = list_teachers(TeacherListConfig(pattern="test_*net"))
    assert "ResNet has no forward_intermediates" in found.left_out["test_resnet"]
    assert "test_efficientnet" in [each.name for each in found.teachers]


def test_list_builds_a_model_on_the_cpu_when_it_reads_values(monkeypatch):
    import timm.models.resnet

    give = timm.models.resnet.ResNet.forward_intermediates

    def reading(self, images, **options):
        assert images.sum().item() == 0.0
        return give(self, images, **options)

    monkeypatch.setattr(timm.models.resnet.ResNet, "forward_intermediates", reading)
    (entry,) = list_teachers(TeacherListConfig(pattern="test_resnet")).teachers
    assert (entry.grid, entry.channels) == ((5, 5), 96)


def test_list_takes_a_part_of_names_and_refuses_what_matches_nothing():
    assert [each.name for each in list_teachers(TeacherListConfig(pattern="st_mamba")).teachers] == ["test_mambaout"]
    with pytest.raises(InputError, match=r"has no model that matches 'nothing_such'; give a part of a name"):
        list_teachers(TeacherListConfig(pattern="nothing_such"))


def test_command_prints_a_line_each_and_json(capsys):
    assert main(["teachers", "test_*resnet"]) == 0
    header, line = capsys.readouterr().out.splitlines()
    assert header.split()[:4] == ["teacher", "input", "tokens", "channels"]
    assert line.split()[:4] == ["test_resnet", "160x160", "5x5", "96"]
    assert line.endswith("none: TPP is off")
    options = ["--model-kwargs", '{"pretrained_cfg_overlay": {"input_size": [3, 64, 96]}}', "--json"]
    assert main(["teachers", "test_resnet", *options]) == 0
    (entry,) = json.loads(capsys.readouterr().out)["teachers"]
    assert (entry["input_size"], entry["grid"]) == ([64, 96], [2, 3])


def test_commands_of_the_teachers_page_run(capsys):
    page = (Path(__file__).parents[3] / "docs" / "reference" / "teachers.md").read_text()
    (block,) = re.findall(r"-->\n```\n(.*?)```", page, re.DOTALL)
    for line in block.splitlines():
        program, *argv = shlex.split(line)
        assert (program, main(argv)) == ("teacher-service", 0)
    out = capsys.readouterr().out
    assert "swin_large_patch4_window7_224" in out
    assert '"later_blocks": null' in out
