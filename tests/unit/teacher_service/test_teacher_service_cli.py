import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_jobs import TinyTeacher, write_tars

from teacher_service.cli import main


def test_cli_plan_prints_one_json_object_when_asked(
    tmp_path: Path, tiny_swin: TinyTeacher, capsys: pytest.CaptureFixture[str]
) -> None:
    tars = write_tars(tmp_path, 3, 2)
    argv = [
        "plan",
        *tars,
        *tiny_swin.arguments,
        "--views",
        "2",
        "--taps",
        "stage4",
        "stage3",
        "--tap-codec",
        "f16",
        "--json",
    ]

    assert main([*argv, "--store", str(tmp_path / "store")]) == 0

    plan = json.loads(capsys.readouterr().out)
    assert (plan["samples"], plan["units"], plan["rows"], plan["fits"]) == (5, 2, 10, True)
    assert plan["taps"] == {"stage4": [4, 64, "f16"], "stage3": [16, 32, "f16"]}


def test_cli_plan_prints_a_table_for_people(
    tmp_path: Path, tiny_swin: TinyTeacher, capsys: pytest.CaptureFixture[str]
) -> None:
    tars = write_tars(tmp_path, 3, 2)

    assert main(["plan", *tars, *tiny_swin.arguments, "--store", str(tmp_path / "store")]) == 0

    table = capsys.readouterr().out
    for words in ("5 in 2 units", "4 tokens x 64 channels, int8", "taps/stage4", "teacher/blocks", "objects", "fits"):
        assert words in table


def test_cli_plan_expands_braces(tmp_path: Path, tiny_swin: TinyTeacher, capsys: pytest.CaptureFixture[str]) -> None:
    write_tars(tmp_path, 3, 2, 4)

    assert main(["plan", f"{tmp_path}/images-{{000..002}}.tar", *tiny_swin.arguments, "--json"]) == 0

    assert json.loads(capsys.readouterr().out)["samples"] == 9


@pytest.mark.parametrize(
    "argv", [[], ["bake"], ["cache", "a.tar", "--teacher", "x"], ["cache", "a.tar", "--store", "s"]]
)
def test_cli_exits_2_when_used_wrongly(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_cli_help_does_not_wait_for_torch() -> None:
    script = "import sys; from teacher_service.cli import main; code = main(['cache', '--help'])\n"
    script += "sys.exit(code or 'torch' in sys.modules)"

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    assert "--batch-size" in done.stdout
