"""Which runs of a sweep are done already: by what their paths hold now, wherever the folders lie."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from training_world import VIT, World, make_teacher, make_world, samples, write_store, write_tar

from feature_store.errors import FailedError, InputError
from student_trainer.sweeps.compare import CompareConfig, compare, is_finished
from student_trainer.sweeps.file import read_sweep

SETTINGS = """
settings:
  cached: {method: kd, store: STORE}
  live: {method: kd, source: live, store: STORE, teacher: {checkpoint: TEACHER}}
  drawn: {method: none, num_classes: 4, views: {size: 64}, keys_file: KEYS}
  started: {method: none, num_classes: 4, views: {size: 64}, student_kwargs: {checkpoint_path: START}}
seeds: [0]
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> tuple[CompareConfig, World]:
    """A sweep that has been run, every setting with other inputs."""
    root = tmp_path_factory.mktemp("sweep")
    world = make_world(root / "world")
    (root / "keys").write_text("\n".join(f"b{i:03d}" for i in range(12)))
    import timm

    save_file(timm.create_model("test_resnet", num_classes=4).state_dict(), root / "start.safetensors")
    text = SETTINGS
    for name, path in (("STORE", world.store), ("TEACHER", world.checkpoint), ("KEYS", root / "keys"),
                       ("START", root / "start.safetensors")):  # fmt: skip
        text = text.replace(name, str(path))
    (root / "sweep.yaml").write_text(text)
    changes = {"student": "test_resnet", "tars": f"[{', '.join(world.tars)}]", "val_tars": world.val_tars[0],
               "epochs": 1, "batch_size": 4, "workers": 0, "device": "cpu", "report": "false"}  # fmt: skip
    config = CompareConfig(
        sweep=root / "sweep.yaml", out=root / "out", set=tuple(f"{k}={v}" for k, v in changes.items()), progress=False
    )
    compare(config)
    return config, world


def unfinished(config: CompareConfig) -> set[str]:
    return {
        run.setting for run in read_sweep(config.sweep, config.folder, config.set).runs if not is_finished(run.config)
    }


def changed(path: Path, change: Callable[[], object], config: CompareConfig) -> set[str]:
    """The settings to run again once what lies at a path is changed; it is restored."""
    kept = path.with_name("kept")
    (shutil.copytree if path.is_dir() else shutil.copy)(path, kept)
    try:
        change()
        return unfinished(config)
    finally:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        kept.rename(path)


def relabelled(path: str, seed: int, prefix: str) -> None:
    """The samples with other labels of the same length; the first label stays."""
    content = samples(10 if prefix == "v" else 12, seed, prefix)
    write_tar(Path(path), [{**s, "cls": str((int(s["cls"]) + (i > 0)) % 4)} for i, s in enumerate(content)])


def test_finished_runs_count_when_nothing_changed(done):
    assert unfinished(done[0]) == set()


def test_run_is_unfinished_when_its_store_is_anothers_now(done):
    config, world = done

    def other_teacher() -> None:
        shutil.rmtree(world.store)
        write_store(world.store, world.tars, make_teacher(VIT, world.store.parent / "other.safetensors", seed=8))

    assert changed(world.store, other_teacher, config) == {"cached", "live"}


def test_run_is_unfinished_when_its_live_teachers_weights_are_others_now(done):
    config, world = done
    assert changed(world.checkpoint, lambda: make_teacher(VIT, world.checkpoint, seed=8), config) == {"live"}


def test_run_is_unfinished_when_its_training_tar_is_another_now(done):
    config, world = done
    tar = Path(world.tars[1])
    replaced = changed(tar, lambda: write_tar(tar, samples(12, seed=7, prefix="b")), config)
    assert replaced == {"cached", "live", "drawn", "started"}
    assert changed(tar, lambda: relabelled(world.tars[1], 2, "b"), config) == {"drawn", "started"}


def test_runs_are_unfinished_when_validation_labels_of_the_same_length_changed(done):
    config, world = done
    assert len(changed(Path(world.val_tars[0]), lambda: relabelled(world.val_tars[0], 3, "v"), config)) == 4


def test_runs_are_unfinished_when_validation_images_of_the_same_length_changed(done):
    config, world = done
    tar = Path(world.val_tars[0])

    def spoil() -> None:
        content = samples(10, seed=3, prefix="v")
        write_tar(tar, [{**s, "png": s["png"][:-16] + bytes(16)} for s in content])

    assert len(changed(tar, spoil, config)) == 4


def test_run_is_unfinished_when_its_key_list_changed(done):
    config, _ = done
    keys = config.sweep.with_name("keys")
    assert changed(keys, lambda: keys.write_text("\n".join(f"b{i:03d}" for i in range(11))), config) == {"drawn"}


def test_run_is_unfinished_when_the_weights_it_starts_from_changed(done):
    config, _ = done
    start = config.sweep.with_name("start.safetensors")
    halved = {name: value / 2 for name, value in load_file(start).items()}
    assert changed(start, lambda: save_file(halved, start), config) == {"started"}


def test_runs_fail_one_by_one_when_their_inputs_are_gone(done):
    config, world = done
    away = world.store.rename(world.store.with_name("away"))
    try:
        with pytest.raises(FailedError, match="2 of 4 runs failed") as caught:
            compare(config)
    finally:
        away.rename(world.store)
    assert caught.value.exit_code == 1
    message = "\n".join(["", *caught.value.__notes__])
    assert "\n  cached, seed 0: " in message
    assert "\n  live, seed 0: " in message
    assert unfinished(config) == set()


def test_finished_run_is_known_without_its_checkpoints_when_its_folder_was_copied(done, tmp_path):
    config, _ = done
    shutil.copytree(config.folder, tmp_path / "copy", ignore=shutil.ignore_patterns("*.pt"))
    moved = CompareConfig(sweep=config.sweep, out=tmp_path / "copy", set=config.set, progress=False)
    assert unfinished(moved) == set()
    assert compare(moved).settings[0].runs[0].top1 == compare(config).settings[0].runs[0].top1


def test_run_is_unfinished_while_it_is_made_again_when_it_was_finished_before(done, tmp_path):
    config, _ = done
    shutil.copytree(config.folder, tmp_path / "copy")
    moved = CompareConfig(sweep=config.sweep, out=tmp_path / "copy", set=config.set, progress=False)
    run = read_sweep(moved.sweep, moved.folder, moved.set).runs[0].config.run
    progress = json.loads((run / "progress.json").read_text())
    assert (progress["epoch"], progress["step"], progress["finished"]) == (1, 6, True)
    (run / "progress.json").write_text(
        json.dumps({**progress, "finished": False})
    )  # as if it was killed after its last checkpoint
    assert unfinished(moved) == {"cached"}
    compare(moved)
    assert unfinished(moved) == set()


@pytest.mark.parametrize("content", ["{}", "[]", "3", "{", '{"config": {}}'])
def test_comparison_names_the_file_when_a_runs_description_is_damaged(done, tmp_path, content):
    config, _ = done
    shutil.copytree(config.folder, tmp_path / "copy")
    moved = CompareConfig(sweep=config.sweep, out=tmp_path / "copy", set=config.set, progress=False)
    (tmp_path / "copy/runs/live-seed0/config.json").write_text(content)
    with pytest.raises(InputError, match=r"live-seed0/config.json is damaged: "):
        compare(moved)
