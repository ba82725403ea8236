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


def test_cli_plan_says_when_it_pays_only_if_something_was_timed(
    tmp_path: Path, tiny_swin: TinyTeacher, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["plan", *write_tars(tmp_path, 6), *tiny_swin.arguments, "--store", str(tmp_path / "store")]

    assert main(command) == 0
    untimed = capsys.readouterr().out
    assert main([*command, "--time-samples", "4", "--workers", "0", "--batch-size", "2"]) == 0
    timed = capsys.readouterr().out

    for words in ("--tap-codec", "int8-channel", "--views"):
        assert words in untimed
        assert words in timed
    assert "--time-samples N times N samples" in untimed
    for words in ("pays after epochs", "100 epochs: 1", "images/s from then on", "timed with 2 samples on cpu"):
        assert words in timed
        assert words not in untimed


def test_cli_plan_says_what_it_takes_for_granted_when_processes_share_the_job(
    tmp_path: Path, tiny_swin: TinyTeacher, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["plan", *write_tars(tmp_path, 4, 4), *tiny_swin.arguments, "--store", str(tmp_path / "store"),
               "--time-samples", "4", "--workers", "0", "--batch-size", "2", "--processes"]  # fmt: skip

    assert main([*command, "2"]) == 0
    shown = capsys.readouterr().out
    for words in ("on 2 devices, ", "divided by 2 tar by tar", "cores for 0 decode workers", "B/s from all of them"):
        assert words in " ".join(shown.split())

    assert main([*command, "0"]) == 2
    assert "--processes is 0, expected at least 1" in capsys.readouterr().err


def test_cli_cache_logs_and_shows_what_was_predicted_beside_what_was_seen(
    tmp_path: Path, tiny_swin: TinyTeacher, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "log.jsonl"
    command = ["cache", *write_tars(tmp_path, 6, 2), *tiny_swin.arguments, "--checkpoint", str(tiny_swin.checkpoint),
               "--store", str(tmp_path / "store"), "--workers", "0", "--batch-size", "2", "--time-samples", "4",
               "--log-jsonl", str(log), "--metrics-port", "0"]  # fmt: skip

    assert main(command) == 0

    out, err = capsys.readouterr()
    events = [json.loads(line) for line in log.read_text().splitlines()]
    assert [event["event"] for event in events] == ["start", "unit", "unit", "end"]
    end = events[-1]
    assert end["predicted_seconds"] > 0
    assert end["bytes_written"] == sum(event["bytes"] for event in events[1:3]) + _record_bytes(tmp_path / "store")
    assert end["bytes_written"] == pytest.approx(end["predicted_bytes"], rel=0.03)
    assert "metrics: http://127.0.0.1:" in err
    for words in ("predicted", "device-hours", "stages worked: ", "bottleneck: "):
        assert words in out

    assert main(command[:-6]) == 0
    out, _ = capsys.readouterr()
    assert "0 units written, 2 already committed" in out
    assert "stages worked" not in out  # none did


def _record_bytes(store: Path) -> int:
    return sum(path.stat().st_size for path in store.glob("commits/u*.json"))


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
