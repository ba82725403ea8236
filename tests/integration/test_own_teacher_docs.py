"""The teacher of docs/how-to/own-teacher.md, on a tiny DINOv2: cached, verified, served, trained from, live."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from training_world import samples, train_config, write_tar

from feature_store import RowId, open_store
from feature_store.errors import InputError, MismatchError
from student_trainer.cli import main as student_trainer
from student_trainer.data.loader import BatchLoader
from student_trainer.plan import resolve
from student_trainer.teachers.config import LiveOptions
from student_trainer.train import Run
from teacher_service.cli import main as teacher_service
from teacher_service.serve.config import ServeConfig
from teacher_service.serve.live.teacher import TeacherModel
from teacher_service.serve.server import load_stored_teacher

PAGE = (Path(__file__).parents[2] / "docs" / "how-to" / "own-teacher.md").read_text()
NAME = "hub_teacher:build"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders ``one`` and ``two`` as transformers saves a model; the second has other weights."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("hub")
    sizes = {"image_size": 56, "patch_size": 14, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        transformers.Dinov2Model(transformers.Dinov2Config(**sizes, num_labels=0)).save_pretrained(folder / name)
    return folder


@pytest.fixture
def module(own_module, hub: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(code.splitlines()) < 30
    own_module("hub_teacher", code)


@pytest.fixture
def tar(tmp_path: Path) -> str:
    return write_tar(tmp_path / "train.tar", samples(8, seed=1))


def commands(**values: str) -> list[list[str]]:
    """The page's commands, with values in place of its names."""
    (block,) = re.findall(r"-->\n```\n(export.*?)```", PAGE, re.DOTALL)
    lines = [shlex.split(line) for line in block.splitlines()[1:]]
    return [[values.get(word, word) for word in words] for words in lines]


@pytest.fixture
def store(module: None, hub: Path, tar: str, tmp_path: Path) -> Path:
    """The store that the page's command writes."""
    path = tmp_path / "dino.zarr"
    _, cache, *_ = commands(**words(hub, tar, path))
    assert teacher_service([*cache[1:], "--workers", "0", "--device", "cpu"]) == 0
    return path


def words(hub: Path, tar: str, store: Path) -> dict[str, str]:
    return {
        "train-{0000..1280}.tar": tar,
        "dino.zarr": str(store),
        '{"name": "facebook/dinov2-large"}': json.dumps({"name": str(hub / "one")}),
        "runs/r50": str(store.parent / "run"),
        "resnet50": "test_resnet",
    }


def test_commands_of_the_page_run_when_the_hub_is_a_folder(store: Path, hub: Path, tar: str, capsys) -> None:
    teachers, _, verify, train = commands(**words(hub, tar, store))
    assert teacher_service(teachers[1:]) == 0
    assert teacher_service([*verify[1:], "--workers", "1", "--device", "cpu"]) == 0
    small = ["--epochs", "1", "--batch-size", "4", "--workers", "0", "--device", "cpu", "--no-progress"]
    assert student_trainer([*train[1:], *small]) == 0
    assert "hub_teacher:build" in capsys.readouterr().out


def test_features_are_the_librarys_own_when_cached(store: Path, hub: Path, tar: str) -> None:
    import transformers

    opened = open_store(store)
    manifest = opened.manifest
    assert manifest.teacher.name == NAME
    assert (manifest.teacher.input_size, manifest.teacher.num_classes) == ((56, 56), 0)
    assert (manifest.split.depth, manifest.split.prefix_tokens, manifest.split.output_grid) == (0, 1, (4, 4))
    rows = [RowId(0, position, 0) for position in range(8)]
    pixels = (
        resolve(train_config(store.parent / "x", None, store=store, tars=(tar,), num_classes=4)).dataset[rows].pixels
    )
    mean, std = (torch.tensor(values) for values in (manifest.teacher.mean, manifest.teacher.std))
    images = ((pixels / 255 - mean) / std).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = transformers.AutoModel.from_pretrained(hub / "one")(pixel_values=images).last_hidden_state[:, 1:]
    stored = torch.from_numpy(opened.source().read(rows).taps["stage4"])
    assert ((stored - expected).norm() / expected.norm()).item() < 2e-2  # int8


def test_live_terms_are_the_stores_when_the_teacher_is_ones_own(store: Path, tar: str, tmp_path: Path) -> None:
    def terms(source: str, **options) -> dict[str, float]:
        config = train_config(
            tmp_path / source, None, tars=(tar,), store=store, source=source, method="fd", num_classes=4, batch_size=4,
            **options,
        )  # fmt: skip
        run = Run(resolve(config))
        batch = next(iter(BatchLoader(run.plan.dataset, run.plan.sampler)))
        return {name: term.item() for name, term in run.terms(batch).weighted.items()}

    cached, live = terms("store"), terms("live", teacher=LiveOptions(name=NAME))
    assert cached == pytest.approx(live, rel=2e-2)  # the store's default codec is int8
    with pytest.raises(InputError, match=f"the store's teacher is {NAME}, which is code, and is imported only"):
        terms("live", teacher=LiveOptions(compute_dtype="float32"))


def test_store_refuses_the_function_when_its_weights_are_others(
    store: Path, hub: Path, tar: str, tmp_path: Path
) -> None:
    other = {"name": str(hub / "two")}
    options = LiveOptions(name=NAME, model_kwargs=other)
    with pytest.raises(MismatchError, match=r"teacher.weights_sha256 differs"):
        resolve(train_config(tmp_path / "run", None, tars=(tar,), store=store, source="live", teacher=options))


def test_verify_imports_nothing_when_only_the_store_names_the_function(
    store: Path, tar: str, monkeypatch, capsys
) -> None:
    monkeypatch.setattr("feature_store.teacher.own.import_object", None)
    assert teacher_service(["verify", tar, "--store", str(store), "--device", "cpu", "--workers", "1"]) == 2
    assert (
        "which is code, and is imported only if you name it yourself; give it as --teacher" in capsys.readouterr().err
    )


def test_service_computes_with_it_when_it_is_named(store: Path) -> None:
    config = ServeConfig(store=str(store), teacher=NAME, device="cpu")
    model = TeacherModel(load_stored_teacher(config))
    assert model.teacher.info == open_store(store).manifest.teacher
    assert model(np.zeros((2, 56, 56, 3), np.uint8))["stage4"].shape == (2, 16, 32)
    with pytest.raises(MismatchError, match=r"teacher.name differs: .*got 'os:abort'"):
        load_stored_teacher(ServeConfig(store=str(store), teacher="os:abort", device="cpu"))
