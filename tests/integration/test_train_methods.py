"""Methods as plug-ins, several teachers at once, callbacks and loggers of one's own."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from training_world import SIZE, SWIN, changed, make_teacher, shared_world, train_config, write_store

from feature_store.errors import InputError, MismatchError, UncommittedError
from feature_store.views import view_policy
from student_trainer.cli import main
from student_trainer.config import TrainConfig
from student_trainer.engine.callbacks import Callback
from student_trainer.engine.checkpoint import load_checkpoint
from student_trainer.engine.metrics import read_metrics
from student_trainer.methods import METHODS, Method, Needs, Terms
from student_trainer.methods.scalekd import ScaleKDConfig
from student_trainer.plan import resolve
from student_trainer.teachers.config import StoreTeacher
from student_trainer.train import Run, train


@dataclass(frozen=True)
class LogitMSEConfig:
    """Options of the method below.

    Attributes:
        weight: Weight of the squared error.
    """

    weight: float = 1.0


class LogitMSE(Method):
    """A user's own: squared error of logits, scaled by a weight that is learned."""

    Config = LogitMSEConfig
    needs = Needs(logits=True)

    def __init__(self, config, student, teacher, task) -> None:
        super().__init__(config, student, teacher, task)
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, student, batch) -> Terms:
        error = F.mse_loss(self.scale * student.logits, batch.teacher.logits)
        raw = {"task": self.task(student.logits, batch.labels), "mse": error}
        return Terms(raw, {"task": 1.0, "mse": self.config.weight})


OWN = f"{__name__}:LogitMSE"


@pytest.fixture
def config(tmp_path) -> TrainConfig:
    return train_config(tmp_path / "run", val_tars=shared_world().val_tars)


def steps(run: Path) -> list[dict]:
    return [line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "step"]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_by_its_name_and_its_terms_are_logged(config, method):
    assert train(replace(config, method=method)).steps == 3
    for line in steps(config.run):
        assert "task" in line["raw"]
        assert line["loss"]["total"] == pytest.approx(sum(line["loss"].values()) - line["loss"]["total"], rel=1e-5)
    described = json.loads((config.run / "config.json").read_text())
    assert described["plan"]["method"]["name"] == method
    assert not (METHODS.keys() - {method}) & described["config"].keys()  # options of others are not saved


def test_method_of_ones_own_trains_with_its_options_and_is_kept_in_checkpoints(config):
    config = replace(config, method=OWN, method_options={"weight": 0.25})
    train(config)
    (first, *_) = steps(config.run)
    assert first["loss"]["mse"] == pytest.approx(0.25 * first["raw"]["mse"])
    assert load_checkpoint(config.run / "last.pt").loss["scale"] != 1.0
    described = json.loads((config.run / "config.json").read_text())["plan"]
    assert described["method"] == {"name": OWN, "weight": 0.25}
    assert described["needs"]["logits"] is True


def test_method_of_ones_own_is_found_from_the_command_line(config, own_module, capsys):
    own_module("my_methods", Path(__file__).read_text().split("OWN = ")[0])
    line = ["train", "--run", str(config.run), "--student", "test_resnet", "--tars", *config.tars, "--store",
            str(config.teacher.store), "--method", "my_methods:LogitMSE", "--method-options", '{"weight": 2}',
            "--epochs", "1", "--batch-size", "8", "--workers", "0", "--no-progress", "--no-report",
            "--log-every", "1"]  # fmt: skip
    assert main(line) == 0
    assert steps(config.run)[0]["loss"]["mse"] == pytest.approx(2 * steps(config.run)[0]["raw"]["mse"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "scalekt"}, "--method is 'scalekt', did you mean scalekd"),
        ({"method": "nowhere:X"}, "--method nowhere:X: No module named 'nowhere'; the module must be importable"),
        ({"method": "json:dumps"}, "--method json:dumps is .*, expected a subclass"),
        ({"method": "json:nothing"}, "has no attribute 'nothing'"),
        ({"method": OWN, "method_options": {"wait": 1}}, "wait is unknown; did you mean weight"),
        ({"method_options": {"weight": 1}}, "--method-options is for a method of your own"),
    ],
)
def test_method_is_refused_when_there_is_none_of_that_name_or_option(config, changes, message):
    with pytest.raises(InputError, match=message):
        replace(config, **changes)


def test_method_that_reads_logits_is_refused_when_the_teacher_has_other_classes(config):
    with pytest.raises(MismatchError, match="num_classes differs: the teacher has 4, got 9"):
        train(replace(config, method=OWN, num_classes=9))


class Nothing(Method):
    """A method that forgets to wrap its loss."""

    def forward(self, student, batch):
        return self.task(student.logits, batch.labels)


def test_method_is_refused_when_it_returns_no_terms(config):
    with pytest.raises(InputError, match=r"Nothing.forward returned a Tensor, expected student_trainer.methods.Terms"):
        train(replace(config, method=f"{__name__}:Nothing"))


@pytest.mark.parametrize(
    ("method", "way"), [("scalekd", "--scalekd.kd-alpha None"), ("kd", "--method fd"), (OWN, "--method fd")]
)
def test_way_to_train_without_logits_is_one_of_the_method(config, method, way):
    with pytest.raises(MismatchError, match=rf"or train without logits \({way}\)$"):
        train(replace(config, method=method, num_classes=9))


def test_notes_tell_the_teachers_accuracy_and_options_without_effect(config):
    unused = resolve(replace(config, method="kd", scalekd=ScaleKDConfig(tpp=False))).notes()
    assert "options --scalekd.* have no effect on --method kd" in unused
    assert any(note.startswith("top-1 of the teacher's stored logits: ") for note in unused)
    assert not any("top-1" in note for note in resolve(replace(config, method="fd")).notes())
    used = resolve(replace(config, scalekd=ScaleKDConfig(tpp=False))).notes()
    assert not any("no effect" in note or "warms up" in note for note in used)
    warming = replace(config, epochs=2, optim=replace(config.optim, warmup_epochs=2))
    assert any(
        "warms up: --optim.warmup-epochs is 2, the run has 2 epochs" in note for note in resolve(warming).notes()
    )


@pytest.fixture(scope="module")
def second_store(tmp_path_factory):
    """Writes a store of the shared world's tars by a Swin."""
    folder = tmp_path_factory.mktemp("second")

    def write(name: str = "store", **changes) -> Path:
        if not (folder / name).exists():
            write_store(folder / name, shared_world().tars, make_teacher(SWIN, folder / "swin.safetensors"), **changes)
        return folder / name

    return write


def test_two_teachers_have_projectors_of_their_own_and_share_task_and_kd(config, second_store):
    stores = (StoreTeacher(config.teacher.store), StoreTeacher(second_store(), weight=0.5))
    config = replace(config, task="bce", label_smoothing=0.1)
    assert train(replace(config, teacher=stores)).steps == 3
    (first, *_) = steps(config.run)
    own = {f"{stage}_{view}" for stage in ("stage3", "stage4") for view in ("original", "alternative")}
    assert first["raw"].keys() == {"task", "kd"} | {f"teacher{i}_{name}" for i in (1, 2) for name in own}
    alone = replace(config, run=config.run.with_name("alone"))
    train(alone)
    single = steps(alone.run)[0]
    for name in own:  # a teacher's weight is a factor on its terms
        factor = single["loss"][name] / single["raw"][name]
        assert first["loss"][f"teacher1_{name}"] == pytest.approx(factor * first["raw"][f"teacher1_{name}"])
        assert first["loss"][f"teacher2_{name}"] == pytest.approx(0.5 * factor * first["raw"][f"teacher2_{name}"])
    # the first teacher's projectors are drawn as they would be alone, the task is the same
    assert first["raw"]["task"] == pytest.approx(single["raw"]["task"], rel=1e-6)
    assert json.loads((config.run / "config.json").read_text())["plan"]["weights"] == [1.0, 0.5]


def test_two_teachers_resume_where_they_stopped_and_not_with_other_weights(config, second_store):
    stores = (StoreTeacher(config.teacher.store), StoreTeacher(second_store(), weight=0.5))
    config = replace(config, teacher=stores, scalekd=ScaleKDConfig(tpp=False))
    train(config)
    assert train(replace(config, epochs=2, resume=True)).steps == 6
    swapped = (stores[0], replace(stores[1], weight=0.25))
    with pytest.raises(MismatchError, match=r"inputs.weights differs: the run has \[1.0, 0.5\], got \[1.0, 0.25\]"):
        train(replace(config, epochs=2, resume=True, teacher=swapped))


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"policy": view_policy("a1", SIZE)}, "policy"), ({"seed": 6}, "seed")],
)
def test_second_teacher_is_refused_when_it_saw_other_views(config, second_store, changes, field):
    other = second_store(field, **changes)
    first = f"--store {config.teacher.store}"
    with pytest.raises(
        MismatchError, match=rf"^{field}[\w.]* differs: {first} has .*; that is of --store .*{field}; .* same tars"
    ):
        train(changed(config, store=(config.teacher.store, str(other))))
    assert not config.run.exists()


def test_second_teacher_is_refused_when_it_lacks_views(config, second_store):
    other = second_store("lacking", skip=[(1, 1)])
    with pytest.raises(UncommittedError, match=r"1 of 2 units lack views: train-1.tar \(views 1\)"):
        train(changed(config, store=(str(config.teacher.store), str(other))))


def test_second_teacher_is_refused_when_it_is_the_first(config):
    store = str(config.teacher.store)
    with pytest.raises(InputError, match="holds the same features as one before it; give each once"):
        train(changed(config, store=(store, store)))


class Recorder(Callback):
    """Notes what it is called with."""

    def __init__(self) -> None:
        self.calls = []

    def on_start(self, run: Run) -> None:
        self.calls.append(("start", run.progress.step))

    def on_step(self, run: Run) -> None:
        self.calls.append(("step", run.progress.step))

    def on_epoch(self, run: Run, values) -> None:
        self.calls.append(("epoch", values["val"]["samples"]))

    def on_end(self, run: Run) -> None:
        self.calls.append(("end", run.progress.epoch))


class Lines:
    """A logger of one's own."""

    def __init__(self) -> None:
        self.lines, self.closed = [], False

    def scalars(self, values, step) -> None:
        self.lines.append((step, values))

    def close(self) -> None:
        self.closed = True


def test_callbacks_and_loggers_are_called_in_order_when_handed_in(config):
    recorder, logger = Recorder(), Lines()
    train(config, callbacks=[recorder], loggers=[logger])
    assert recorder.calls == [("start", 0), ("step", 1), ("step", 2), ("step", 3), ("epoch", 10), ("end", 1)]
    assert [step for step, _ in logger.lines] == [1, 2, 3, 3]
    assert logger.lines[0][1]["step/loss/total"] == steps(config.run)[0]["loss"]["total"]
    assert {"epoch/val/top1", "epoch/raw/task"} <= logger.lines[-1][1].keys()
    assert logger.closed
