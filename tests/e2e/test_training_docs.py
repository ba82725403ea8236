"""The Python of docs/training.md runs as written."""

import re
import shutil
from pathlib import Path

from training_world import make_teacher, shared_world, write_store

TEXT = (Path(__file__).parents[2] / "docs" / "training.md").read_text()


def test_training_from_python_runs_as_written(tmp_path, monkeypatch, capsys):
    world = shared_world()
    monkeypatch.chdir(tmp_path)
    shutil.copy(world.tars[1], tmp_path / "train.tar")
    write_store(tmp_path / "store", ["train.tar"], make_teacher(world.teacher, tmp_path / "teacher.safetensors"))
    blocks = re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 1
    names: dict = {}
    exec(compile(blocks[0], "training.md", "exec"), names)
    assert names["result"].steps == 1  # 12 samples, a batch of 8
    step, total = capsys.readouterr().out.split()
    assert (step, float(total)) == ("1", names["result"].history[0]["loss"]["total"])
    assert (tmp_path / "runs/notebook/last.pt").is_file()
