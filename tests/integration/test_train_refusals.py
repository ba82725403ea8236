"""Things that would train a wrong student: each is refused before the first step, naming field, values and remedy."""

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from training_world import (
    SIZE,
    SWIN,
    VIT,
    changed,
    make_teacher,
    samples,
    shared_world,
    train_config,
    write_store,
    write_tar,
)

import student_trainer.data.replayed
from feature_store.errors import (
    CorruptStoreError,
    InputError,
    MismatchError,
    ResourceError,
    UncommittedError,
    UserError,
)
from feature_store.inputs.tar import Tar
from feature_store.views import decode_image, view_policy
from student_trainer.config import OptimConfig, TrainConfig
from student_trainer.engine.callbacks import Callback
from student_trainer.engine.checkpoint import load_checkpoint
from student_trainer.methods.scalekd import ScaleKDConfig
from student_trainer.teachers.config import LiveOptions, ViewsConfig
from student_trainer.train import Run, train

# Python 3.12 and later warn of fork under threads
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")

HEADLESS = (VIT[0], {**VIT[1], "num_classes": 0})


@pytest.fixture
def config(tmp_path) -> TrainConfig:
    return train_config(tmp_path / "run")


def refused(config: TrainConfig, kind: type[UserError], message: str) -> None:
    with pytest.raises(kind, match=message):
        train(config)
    assert not config.run.exists()  # the folder stays free for the corrected command


@pytest.fixture
def other_store(tmp_path):
    """Writes a store of the shared world's tars with changes."""
    world = shared_world()

    def write(spec=VIT, **changes) -> Path:
        teacher = make_teacher(spec, tmp_path / "other" / "teacher.safetensors", seed=7)
        write_store(tmp_path / "other" / "store", world.tars, teacher, num_views=1, **changes)
        return tmp_path / "other" / "store"

    return write


def test_live_teacher_is_refused_when_its_weights_are_not_the_stores(config, tmp_path):
    make_teacher(VIT, tmp_path / "other.safetensors", seed=9)
    refused(
        changed(config, source="live", teacher=LiveOptions(checkpoint=tmp_path / "other.safetensors")),
        MismatchError,
        r"^teacher.weights_sha256 differs: store has '[0-9a-f]{64}', got '[0-9a-f]{64}'; use the --teacher options",
    )


def test_live_teacher_is_refused_when_it_is_another_model_or_cut_or_pooled_otherwise(config, tmp_path):
    world = shared_world()
    make_teacher(SWIN, tmp_path / "swin.safetensors")
    swin = LiveOptions(name=SWIN[0], model_kwargs=SWIN[1], checkpoint=tmp_path / "swin.safetensors")
    refused(changed(config, source="live", teacher=swin), MismatchError, r"^teacher.name differs: store has 'test_vit'")
    deeper = LiveOptions(checkpoint=world.checkpoint, depth=3)
    refused(changed(config, source="live", teacher=deeper), MismatchError, r"^split differs: store has .*depth.*1.*got")
    pooled = {**world.teacher[1], "global_pool": "avg", "fc_norm": False}  # the same weights, other logits
    refused(
        changed(config, source="live", teacher=LiveOptions(checkpoint=world.checkpoint, model_kwargs=pooled)),
        MismatchError,
        r"^teacher.model_kwargs differs: store has {.*got {.*'avg'.*; use the --teacher options the store was written",
    )


def test_tar_is_refused_when_it_changed_since_the_store_was_written(config, tmp_path):
    changed = write_tar(tmp_path / "train-0.tar", samples(14, seed=8, prefix="a"))
    refused(
        replace(config, tars=(changed, config.tars[1])),
        MismatchError,
        r"^tars\[train-0.tar\].header_sha256 differs: .*changed since the store was written: restore it",
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_training_stops_when_pillow_resizes_differently(config, monkeypatch, workers):
    resize = Image.Image.resize

    def blocky(self, size, resample=None, *arguments, **options):
        return resize(self, size, Image.Resampling.BOX, *arguments, **options)

    monkeypatch.setattr(Image.Image, "resize", blocky)
    with pytest.raises(MismatchError, match=r"pixels of sample '.*', view 0 differs: .*CRC-32 \w+ by Pillow .*, got"):
        train(replace(config, workers=workers, start_method="fork"))


def test_training_stops_when_pixels_change_beyond_the_first_rows(config, monkeypatch):
    replay_view = student_trainer.data.replayed.replay_view
    odd = decode_image(Tar.open(config.tars[0]).read(12).image).size  # a sample beyond those that are always checked

    def spoiled(image, *arguments):
        pixels = replay_view(image, *arguments)
        if image.size == odd:
            pixels[0, 0, 0] ^= 1
        return pixels

    monkeypatch.setattr(student_trainer.data.replayed, "replay_view", spoiled)
    config = replace(config, batch_size=25)
    with pytest.raises(MismatchError, match="pixels of sample 'a012', view 0"):
        train(config)
    shutil.rmtree(config.run)
    assert train(changed(config, check_all_pixels=False)).steps == 1


def test_training_stops_when_a_source_image_changed_under_the_same_size(config, tmp_path):
    """Names and sizes, which the store remembers of a tar, are as before; the pixels are not."""
    content = samples(8, seed=1)
    for sample in content:
        sample["png"] = bitmap(sample["png"])
    tar = write_tar(tmp_path / "train.tar", content)
    write_store(tmp_path / "store", [tar], make_teacher(VIT, tmp_path / "teacher.safetensors"), num_views=1)
    content[3]["png"] = content[3]["png"][:54] + bytes(255 - byte for byte in content[3]["png"][54:])
    write_tar(tmp_path / "train.tar", content)
    with pytest.raises(MismatchError, match=r"pixels of sample 's003', view 0 differs"):
        train(changed(config, tars=(tar,), store=tmp_path / "store"))


def bitmap(png: bytes) -> bytes:
    file = io.BytesIO()
    decode_image(png).save(file, "BMP")
    return file.getvalue()


def test_store_is_refused_when_views_are_missing(config, other_store):
    store = other_store(skip=[(1, 0)])
    refused(
        changed(config, store=store),
        UncommittedError,
        r"1 of 2 units lack views: train-1.tar \(views 0\); run the same `teacher-service cache` command again",
    )


def test_store_is_refused_when_more_views_are_asked_for_than_it_has(config):
    refused(changed(config, num_views=3), UncommittedError, r"2 of 2 units lack views: train-0.tar \(views 2\)")


def test_store_is_refused_when_a_tap_the_loss_needs_is_missing(config, other_store):
    store = other_store(taps=("stage4",))
    refused(changed(config, store=store), InputError, r"the store has no tap 'stage3_prefix'; it has: stage4")
    assert train(changed(config, store=store, scalekd=ScaleKDConfig(tpp=False))).steps == 3


def test_store_is_refused_when_its_later_blocks_are_from_another_checkpoint(config, other_store, tmp_path):
    mixed = tmp_path / "mixed"
    shutil.copytree(config.teacher.store, mixed)
    shutil.rmtree(mixed / "teacher" / "blocks")
    shutil.copytree(other_store() / "teacher" / "blocks", mixed / "teacher" / "blocks")
    refused(changed(config, store=mixed), MismatchError, r"^blocks_sha256 differs: .* come from another checkpoint")


def test_training_stops_when_a_shard_is_truncated(config, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(config.teacher.store, damaged)
    shard = next(path for path in (damaged / "taps" / "stage4" / "c").rglob("*") if path.is_file())
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CorruptStoreError, match=r"object taps/stage4/c/\d/\d/0/0 is damaged"):
        train(changed(config, store=damaged, epochs=2))


def test_student_name_is_corrected_when_unknown(config):
    refused(
        replace(config, student="test_resnt"), InputError, r"knows no model 'test_resnt'; did you mean .*test_resnet"
    )


def test_student_is_refused_when_its_classes_are_not_the_teachers_and_logits_are_compared(config):
    refused(
        replace(config, num_classes=9),
        MismatchError,
        r"^num_classes differs: the teacher has 4, got 9; leave out --num-classes, or train without logits",
    )
    assert train(replace(config, num_classes=9, scalekd=ScaleKDConfig(kd_alpha=None))).steps == 3


def test_student_is_refused_when_labels_are_beyond_its_classes(config):
    refused(
        replace(config, num_classes=3, method="fd"),
        InputError,
        r"the store has labels up to 3, but the student 3 classes; give --num-classes 4 or more",
    )


def test_kd_is_off_and_the_run_says_so_when_the_teacher_has_no_classifier(config, other_store, tmp_path, capfd):
    store = other_store(HEADLESS)
    refused(changed(config, store=store, method="kd"), InputError, r"kd method needs teacher logits.* no classifier")
    asked = changed(config, store=store, progress=True)
    without = changed(config, store=store, run=tmp_path / "without", scalekd=ScaleKDConfig(kd_alpha=None))
    first, second = (train(run).history[-1] for run in (asked, without))
    assert "KD is off: the teacher has no classifier" in capfd.readouterr().err
    assert json.loads((asked.run / "config.json").read_text())["plan"]["notes"] == [
        "KD is off: the teacher has no classifier"
    ]
    assert "kd" not in first
    assert first["loss"]["total"] == second["loss"]["total"]


def test_classes_are_counted_from_the_labels_when_the_teacher_has_no_classifier(config, other_store):
    train(changed(config, store=other_store(HEADLESS)))
    assert '"num_classes": 4' in (config.run / "config.json").read_text()


def test_classes_must_be_given_when_nobody_knows_them(config):
    refused(
        changed(config, store=None, method="none", views=ViewsConfig(size=SIZE)),
        InputError,
        r"the number of classes is unknown without .* class names or stored labels; give --num-classes",
    )


def test_views_are_refused_when_they_are_not_the_live_teachers_size(config):
    world = shared_world()
    teacher = LiveOptions(name=world.teacher[0], model_kwargs=world.teacher[1], checkpoint=world.checkpoint)
    refused(
        changed(config, store=None, source="live", teacher=teacher, views=ViewsConfig(size=32)),
        InputError,
        r"views are 32 x 32, but teacher test_vit takes 64 x 64; set --views.size",
    )


def test_store_with_other_view_size_sets_the_students_input_when_read(config, tmp_path):
    world = shared_world()
    name, kwargs = VIT
    teacher = make_teacher((name, {**kwargs, "img_size": 48}), tmp_path / "small.safetensors")
    write_store(tmp_path / "small", world.tars, teacher, num_views=1, policy=view_policy("a1", 48))
    train(changed(config, store=tmp_path / "small", student="test_vit"))
    saved = torch.load(config.run / "last.pt", weights_only=True)
    assert saved["student"]["preprocessing"]["input_size"] == (48, 48)
    assert saved["student"]["model_kwargs"]["img_size"] == (48, 48)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"optim": OptimConfig(opt="adamwww")}, InputError, r"--optim.opt 'adamwww' cannot be used"),
        ({"optim": OptimConfig(opt="adahessian")}, InputError, r"'adahessian' needs derivatives of gradients"),
        ({"device": "tpu9"}, InputError, r"--device is 'tpu9', expected auto, cpu, cuda"),
        ({"device": "cuda:99"}, ResourceError, r"--device is cuda:99, but torch sees \d+ GPUs here"),
        ({"store": Path("nowhere")}, InputError, r"nowhere is not a store"),
        ({"batch_size": 26}, InputError, r"25 samples do not fill one batch of 26"),
        (
            {"scalekd": ScaleKDConfig(heads_stage4=5)},
            InputError,
            r"num_heads 5 does not divide the teacher's 64 channels",
        ),
    ],
)
def test_option_is_refused_when_it_cannot_be_used(config, change, kind, message):
    refused(changed(config, **change), kind, message)


def relabelled(path: Path, label: Callable[[int], str], count: int = 10) -> str:
    content = samples(count, seed=3, prefix="v")
    for number, sample in enumerate(content):
        sample["cls"] = label(number)
    return write_tar(path, content)


def test_validation_tars_are_refused_before_training_when_their_labels_count_from_one(config, tmp_path):
    tar = relabelled(tmp_path / "val.tar", lambda i: str(i % 4 + 1))
    refused(
        replace(config, val_tars=(*shared_world().val_tars, tar)),
        InputError,
        rf"^--val-tars: label of sample 'v003' in {tar} is 4, expected 0..3 \(are labels counted from one\?\); raise",
    )


def test_training_tars_are_refused_before_training_when_a_label_has_no_class(config, tmp_path):
    tar = relabelled(tmp_path / "train.tar", lambda i: "7" if i == 9 else "0")
    config = changed(config, tars=(tar,), store=None, method="none", views=ViewsConfig(size=SIZE), num_classes=4)
    refused(config, InputError, rf"^--tars: label of sample 'v009' in {tar} is 7, expected 0..3; raise --num-classes")
    keys = tmp_path / "keys"
    keys.write_text("".join(f"v{i:03d}\n" for i in range(9)))
    assert train(replace(config, keys_file=keys)).steps == 1


def test_run_is_refused_when_its_disk_has_no_room_for_a_checkpoint(config, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000, total=2_000))
    with pytest.raises(
        ResourceError, match=rf"takes about \d.* MB, but the disk of --run {config.run} has 1.0 kB free"
    ):
        train(config)


def test_run_is_refused_when_its_folder_cannot_be_made(config, tmp_path):
    (tmp_path / "file").write_text("")
    refused(
        replace(config, run=tmp_path / "file" / "run"), ResourceError, r"--run .*/file/run cannot be written: .*choose"
    )
    with pytest.raises(InputError, match=r"--run .*file already exists and is no folder; choose another one"):
        train(replace(config, run=tmp_path / "file"))


def test_weights_that_are_not_finite_are_not_saved(config):
    config = replace(config, epochs=3)

    class Spoil(Callback):
        def on_step(self, run: Run) -> None:
            if run.progress.step == 6:  # the last one of the second epoch
                run.optimizer.param_groups[0]["params"][0].data[0] = float("nan")

    with pytest.raises(UserError, match=r"weights are not finite after step 6: not saved, the checkpoint"):
        train(config, callbacks=[Spoil()])
    assert load_checkpoint(config.run / "last.pt").progress.step == 3
