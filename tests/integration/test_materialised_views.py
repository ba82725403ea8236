"""Materialised views: written beside the store, they train exactly as the source tars replayed do."""

import io
import json
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import webdataset
from PIL import Image
from servers import WebServer, s3_server
from tiny_jobs import cache_config, make_teacher, store_files, with_options
from training_world import CLASSES, changed, samples, train_config, write_tar

from feature_store import open_store
from feature_store.commits.locks import locked
from feature_store.errors import InputError, MismatchError, ResourceError, UserError
from feature_store.inputs.tar import Tar
from feature_store.tools.info import summarise
from feature_store.views import decode_view, encode_view, pixel_crc, view_tar
from student_trainer.config import TrainConfig
from student_trainer.engine.checkpoint import load_checkpoint
from student_trainer.train import train
from teacher_service.cache import pipeline
from teacher_service.cache.decode import Task
from teacher_service.cache.job import cache
from teacher_service.cache.write_views import ViewTarWriter, tar_of
from teacher_service.config import StoredInputs
from teacher_service.share.store_lock import lock_folder
from teacher_service.verify.config import VerifyConfig
from teacher_service.verify.recompute import verify

SIZE = 32
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two source tars (one sample unreadable), and a job that materialises two views of each."""
    root = tmp_path_factory.mktemp("materialised")
    first = samples(10, seed=1, prefix="a")
    first[4]["png"] = b"not an image"
    tars = (write_tar(root / "train-0.tar", first), write_tar(root / "train-1.tar", samples(8, seed=2, prefix="b")))
    teacher = make_teacher(root, "test_vit", {"img_size": SIZE, "num_classes": CLASSES})
    config = cache_config(tars, teacher, root / "store", views=2, policy="a2", seed=3, views_out=str(root / "views"))
    cache(config)
    return config


@pytest.fixture
def run(world, tmp_path) -> TrainConfig:
    return train_config(
        tmp_path / "run", tars=world.inputs.tars, store=world.store, epochs=2, shuffle_units=2, check_all_pixels=True
    )


def steps(config: TrainConfig) -> list[dict]:
    lines = [json.loads(line) for line in (config.run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "second" not in k} for line in lines if line["kind"] == "step"]


def losses(config: TrainConfig) -> list[tuple]:
    train(config)
    return [tuple(line["loss"][name] for name in ("total", "task", "kd", "stage4_original")) for line in steps(config)]


def test_training_is_bit_for_bit_the_same_when_views_are_read_or_made_anew(world, run, tmp_path):
    read = replace(run, tars=(), views_from=world.views.out, run=tmp_path / "read")
    replayed = losses(run)
    assert len(replayed) == 4
    assert losses(read) == replayed
    weights = [load_checkpoint(each.run / "last.pt").weights for each in (run, read)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_training_needs_no_source_tars_and_no_worker_either(world, run, tmp_path):
    """Source tars gone, the place moved, batches made by worker processes."""
    moved = shutil.copytree(world.views.out, tmp_path / "moved")
    read = replace(run, tars=(), views_from=str(moved), workers=1, start_method="fork")
    assert len(losses(read)) == 4
    assert losses(replace(read, run=tmp_path / "again", workers=0)) == [
        tuple(line["loss"][name] for name in ("total", "task", "kd", "stage4_original")) for line in steps(read)
    ]


def test_teacher_sees_what_the_tars_hold(world):
    store = open_store(world.store)
    assert summarise(store)["view_encoding"] == store.manifest.view_encoding == "jpeg95"
    for unit in range(2):
        for view in range(2):
            tar = Tar.open(str(Path(world.views.out) / view_tar(unit, view)))
            readable = [i for i in range(len(store.keys(unit))) if i not in store.quarantined(unit)]
            assert list(tar.keys) == [store.keys(unit)[i] for i in readable]
            stored = [int(store.pixel_crcs(unit, view)[i]) for i in readable]
            read = [tar.read(i) for i in range(len(tar))]
            assert [pixel_crc(decode_view(sample.image)) for sample in read] == stored
            assert [sample.label for sample in read] == [int(store.labels(unit)[i]) for i in readable]


def test_tars_are_ordinary_webdatasets(world):
    with (Path(world.views.out) / view_tar(0, 0)).open("rb") as file:
        files = webdataset.tariterators.tar_file_expander([{"stream": file, "url": "u00000.tar"}])
        decode = webdataset.autodecode.Decoder([webdataset.imagehandler("pil")])
        seen = list(map(decode, webdataset.tariterators.group_by_keys(files)))
    assert [sample["__key__"] for sample in seen] == [f"a{i:03}" for i in range(10) if i != 4]
    assert {sample["jpg"].size for sample in seen} == {(SIZE, SIZE)}
    assert [sample["cls"] for sample in seen[:4]] == [0, 1, 2, 3]


def test_verify_computes_rows_anew_through_the_jpegs(world):
    inputs = StoredInputs(tars=world.inputs.tars)
    report = verify(VerifyConfig(inputs=inputs, store=str(world.store), checkpoint=world.checkpoint, sample=100))
    assert (report.rows, report.mismatches) == (34, [])


def test_same_bytes_when_a_job_is_stopped_in_between(world, tmp_path, monkeypatch):
    """A unit's tars are there before its commit record; a job killed between the two writes them again."""
    config = with_options(world, store=tmp_path / "store", views_out=str(tmp_path / "views"))
    write_unit = pipeline.write_unit

    def killed(store, task, data):
        assert {view_tar(task.unit, view) for view in task.views} <= store_files(tmp_path / "views").keys()
        if task.unit == 1:
            raise ResourceError("killed")
        write_unit(store, task, data)

    monkeypatch.setattr(pipeline, "write_unit", killed)
    with pytest.raises(ResourceError, match="killed"):
        cache(config)
    monkeypatch.setattr(pipeline, "write_unit", write_unit)
    (tmp_path / "views" / view_tar(1, 0)).write_bytes(b"half a tar")
    assert cache(config).units_written == 1
    assert store_files(tmp_path / "views") == store_files(Path(world.views.out))
    assert store_files(config.store) == store_files(world.store)


_KILLED_WHILE_WRITING = """
import os, pickle, signal, sys
from pathlib import Path
from teacher_service.cache.job import cache
from teacher_service.share.store_lock import lock_folder
from teacher_service.cache.decode import Task

rename = Path.rename

def rename_or_die(path, target):
    if target.as_posix().endswith("views/v1/u00001.tar"):
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(path, target)

if __name__ == "__main__":
    Path.rename = rename_or_die
    cache(pickle.loads(Path(sys.argv[1]).read_bytes()))
"""


def test_next_run_removes_what_a_job_left_when_it_was_killed_while_it_wrote_a_tar(world, tmp_path):
    config = with_options(world, store=tmp_path / "store", views_out=str(tmp_path / "views"))
    script, pickled = tmp_path / "job.py", tmp_path / "config"
    script.write_text(_KILLED_WHILE_WRITING)
    pickled.write_bytes(pickle.dumps(config))

    assert subprocess.run([sys.executable, script, pickled], check=False).returncode == -signal.SIGKILL
    (partial,) = (tmp_path / "views").rglob("*.partial")
    assert partial.stat().st_size == (Path(world.views.out) / view_tar(1, 1)).stat().st_size
    assert not (tmp_path / "views" / view_tar(1, 1)).exists()

    assert cache(config).units_written == 1
    assert store_files(tmp_path / "views") == store_files(Path(world.views.out))
    assert store_files(config.store) == store_files(world.store)


def test_orphans_are_removed_unless_a_process_is_writing_them_or_they_are_not_ours(world, views):
    store = open_store(world.store)
    dead, living, foreign = (
        views / name for name in ("v0/u00000.tar.7-7.partial", "v1/u00001.tar.8-8.partial", "v1/notes.partial")
    )
    for path in (dead, living, foreign):
        path.write_bytes(b"half")
    before = store_files(views)

    with locked(lock_folder(store.objects) / "views-u00001"):
        ViewTarWriter(str(views), store).remove_orphans()
    assert before.keys() - store_files(views).keys() == {"v0/u00000.tar.7-7.partial"}

    ViewTarWriter(str(views), store).remove_orphans()
    assert before.keys() - store_files(views).keys() == {path.relative_to(views).as_posix() for path in (dead, living)}


def test_orphans_stay_when_their_tar_is_being_written(world, tmp_path, monkeypatch):
    store = open_store(world.store)
    views_out = ViewTarWriter(str(tmp_path / "views"), store)
    rename, seen = Path.rename, []

    def looked_at(path: Path, target: Path) -> Path:
        ViewTarWriter(str(tmp_path / "views"), store).remove_orphans()
        seen.append(path.exists())
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", looked_at)
    views_out.write(Task(1, range(2)), [{"k": (b"jpeg", 1)}] * 2)

    assert seen == [True, True]
    assert store_files(tmp_path / "views").keys() == {view_tar(1, 0), view_tar(1, 1)}


def test_views_are_added_when_a_store_grows(world, tmp_path):
    config = with_options(world, store=tmp_path / "store", views_out=str(tmp_path / "views"), views=1)
    cache(config)
    cache(with_options(config, views=2))
    assert store_files(tmp_path / "views") == store_files(Path(world.views.out))


def test_job_is_refused_when_its_store_was_begun_the_other_way(world, tmp_path):
    with pytest.raises(MismatchError, match=r"view_encoding differs: store has 'jpeg95', got None; give the --v"):
        cache(with_options(world, views_out=None))
    without = with_options(world, store=tmp_path / "store", views_out=None)
    cache(without)
    with pytest.raises(MismatchError, match=r"view_encoding differs: store has None, got 'jpeg95'; leave out --"):
        cache(with_options(without, views_out=str(tmp_path / "views")))
    assert not (tmp_path / "views").exists()


def test_job_is_refused_when_it_goes_on_elsewhere_or_cannot_write(world, tmp_path):
    with pytest.raises(InputError, match=r"lacks 4 of the 4 view tars .*v0/u00000.tar.*the place of the first run"):
        cache(with_options(world, views_out=str(tmp_path / "elsewhere")))
    with pytest.raises(InputError, match=r"--views-out https://x/y is read only; give a folder, s3:// or gs://"):
        cache(with_options(world, store=tmp_path / "store", views_out="https://x/y"))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ResourceError, match=r"the views of unit 0 cannot be written to .*; committed units are safe"):
        cache(with_options(world, store=tmp_path / "store", views_out=str(tmp_path / "file")))


def test_job_is_refused_when_another_stores_views_are_in_its_place(world, views, tmp_path):
    before = store_files(views)
    with pytest.raises(InputError, match=r"v0/u00000.tar in --views-out .* holds other views than this job's"):
        cache(with_options(world, store=tmp_path / "store", views_out=str(views), seed=4))
    assert store_files(views) == before

    cache(with_options(world, store=tmp_path / "store-f32", views_out=str(views), tap_codec="f32"))  # the same views
    assert store_files(views) == before


def test_view_tars_take_in_samples_that_can_be_used_by_now(world, tmp_path):
    good = samples(3, seed=5, prefix="r")
    broken = [sample | {"png": b"?" * len(sample["png"])} if i == 1 else sample for i, sample in enumerate(good)]
    tar, options = tmp_path / "r.tar", {"capacity": None, "key_width": None}
    write_tar(tar, broken)
    config = with_options(
        world, tars=(str(tar),), store=tmp_path / "store", views_out=str(tmp_path / "views"), **options
    )
    assert cache(config).quarantined == 1

    write_tar(tar, good)
    assert cache(replace(config, retry_quarantined=True)).quarantined == 0

    tar = Tar.open(str(tmp_path / "views" / view_tar(0, 1)))
    assert list(tar.keys) == [sample["__key__"] for sample in good]


@pytest.fixture
def views(world, tmp_path) -> Path:
    return Path(shutil.copytree(world.views.out, tmp_path / "views"))


def refused(config: TrainConfig, kind: type[UserError], message: str) -> None:
    with pytest.raises(kind, match=message):
        train(config)


def rewritten(tar: Path, **changes) -> None:
    """The tar with each sample's (key, jpeg, label) changed by a function."""
    opened = Tar.open(str(tar))
    read = [opened.read(i) for i in range(len(opened))]
    kept = [changes["change"](sample) for sample in read]
    tar.write_bytes(tar_of({key: (image, label) for key, image, label in kept if key}))


def brighter(sample):
    pixels = decode_view(sample.image)
    return sample._replace(image=encode_view((pixels // 2 + 100).astype("uint8")))


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (brighter, MismatchError, r"pixels of sample '.*', view \d differs"),
        (lambda sample: sample._replace(label=(sample.label + 1) % 4), MismatchError, r"label of sample '.*' differs"),
        (lambda sample: sample._replace(key=sample.key.replace("b000", "")), MismatchError, r"'b000'\", got 'none of"),
        (lambda sample: sample._replace(key=sample.key.replace("b", "c")), MismatchError, r"sample 'b000'"),
        (lambda sample: sample._replace(image=sample.image[:100]), InputError, r"readable when the store was written"),
    ],
)
def test_run_is_refused_when_a_view_tar_is_not_the_stores(run, views, change, kind, message):
    rewritten(views / view_tar(1, 0), change=change)
    refused(replace(run, tars=(), views_from=str(views)), kind, message)


def test_run_is_refused_when_views_are_missing_or_not_of_this_store(run, views, world, tmp_path):
    read = replace(run, tars=(), views_from=str(views))
    (views / view_tar(1, 1)).unlink()
    refused(read, InputError, r"lacks 1 of the store's 4 view tars: v1/u00001.tar.*place --views-out wrote to")
    assert len(losses(changed(read, num_views=1))) == 4
    plain = cache(with_options(world, store=tmp_path / "plain", views_out=None))
    refused(changed(read, store=Path(plain.store)), InputError, r"views are not materialised .* --views-out")
    shutil.copy(views / view_tar(0, 0), views / view_tar(1, 0))
    refused(changed(read, run=tmp_path / "other", num_views=1), MismatchError, r"samples of .*v0/u00001.tar differs")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tars": ()}, "give either --tars or --views-from"),
        ({"views_from": "views"}, "give either --tars or --views-from"),
        ({"tars": (), "views_from": "views", "store": None, "method": "none"}, "give that --store"),
    ],
)
def test_config_is_refused_when_the_source_of_views_is_not_clear(run, changes, message):
    with pytest.raises(InputError, match=message):
        train(changed(run, **changes))


def test_jpegs_are_of_quality_95_with_full_chroma(world):
    with tarfile.open(Path(world.views.out) / view_tar(0, 0)) as tar:
        image = Image.open(io.BytesIO(tar.extractfile("a000.jpg").read()))
    assert [component[1:3] for component in image.layer] == [(1, 1)] * 3
    reference = io.BytesIO()
    Image.new("RGB", (8, 8)).save(reference, "JPEG", quality=95)
    assert image.quantization == Image.open(io.BytesIO(reference.getvalue())).quantization


def test_tar_holds_keys_that_are_long_or_not_ascii(tmp_path):
    keys = ["ü" * 60, "folder/" + "x" * 150]
    (tmp_path / "long.tar").write_bytes(tar_of(dict.fromkeys(keys, (b"jpeg", 7))))
    tar = Tar.open(str(tmp_path / "long.tar"))
    assert list(tar.keys) == keys
    assert tar.read(1) == (keys[1], b"jpeg", 7)


def test_views_go_to_a_bucket_and_come_back(world, run, tmp_path):
    with s3_server() as new_bucket:
        config = with_options(world, store=tmp_path / "store", views_out=f"{new_bucket()}/views")
        cache(config)
        ViewTarWriter(config.views.out, open_store(config.store)).require_committed()
        read = changed(run, tars=(), store=config.store, views_from=config.views.out, scratch=tmp_path / "scratch")
        assert losses(read) == losses(replace(run, run=tmp_path / "replayed"))


def test_views_come_from_a_web_server(world, run, tmp_path):
    with WebServer(Path(world.views.out)) as server:
        read = replace(run, tars=(), views_from=server.url, scratch=tmp_path / "scratch")
        assert losses(read) == losses(replace(run, run=tmp_path / "replayed"))
        gone = replace(read, views_from=f"{server.url}/nowhere", run=tmp_path / "gone")
        refused(gone, InputError, r"view tar http://.*/nowhere/v\d/u0000\d.tar is not there; give the place")
