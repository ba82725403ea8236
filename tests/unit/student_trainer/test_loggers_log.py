import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest

from feature_store.errors import InputError
from student_trainer.config import TrainConfig
from student_trainer.engine.loggers import RunLog, make_loggers, require_loggers
from student_trainer.engine.metrics import MetricsLog, read_metrics

VALUES = {"epoch": 0, "lr": 0.1, "loss": {"total": 1.5, "kd": 0.5}, "speed": {"data_wait": 0.25, "memory": 1000}}
NAMES = {
    "step/epoch": 0, "step/lr": 0.1, "step/loss/total": 1.5, "step/loss/kd": 0.5, "step/speed/data_wait": 0.25,
    "step/speed/memory": 1000,
}  # fmt: skip


@pytest.fixture
def config(tmp_path) -> TrainConfig:
    run = tmp_path / "run"
    run.mkdir()
    return TrainConfig(run=run, student="test_resnet", tars=("a.tar",), method="none", num_classes=2)


def open_log(config: TrainConfig, first_step: int) -> RunLog:
    return RunLog(MetricsLog(config.run / "metrics.jsonl"), make_loggers(config, first_step))


def log_some(config: TrainConfig, first_step: int = 0) -> None:
    with open_log(config, first_step) as log:
        log.write("start", first_step, samples=3)
        log.write("step", first_step + 1, **VALUES)
        log.write("epoch", first_step + 1, epoch=0, val={"top1": 50.0, "unreadable": ["x"]}, speed={"s": None})


def test_only_the_log_is_written_when_no_logger_is_asked_for(config):
    log_some(config)
    assert [line["kind"] for line in read_metrics(config.run / "metrics.jsonl")] == ["start", "step", "epoch"]
    assert read_metrics(config.run / "metrics.jsonl")[1] == {"kind": "step", "step": 1, **VALUES}
    assert {path.name for path in config.run.iterdir()} == {"metrics.jsonl"}


def test_tensorboard_holds_every_number_when_asked_for(config):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = replace(config, tensorboard=True)
    log_some(config)
    log_some(config, first_step=1)
    events = EventAccumulator(str(config.run / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == NAMES.keys() | {"epoch/epoch", "epoch/val/top1"}
    assert [(event.step, event.value) for event in events.Scalars("step/loss/kd")] == [(1, 0.5), (2, 0.5)]


def test_tensorboard_forgets_what_a_crash_left_beyond_the_checkpoint_when_resumed(config):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = replace(config, tensorboard=True)
    for step in (1, 2, 3):
        log_some(config, first_step=step)
    with open_log(config, 2) as log:  # the checkpoint was at step 2
        log.write("step", 3, loss={"total": 9.0})
    events = EventAccumulator(str(config.run / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("step/loss/total")][-2:] == [(2, 1.5), (3, 9.0)]


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the wandb package, of the two calls that are made."""
    calls = []

    def init(**options):
        calls.append(("init", options))
        return SimpleNamespace(log=lambda v, step: calls.append((step, v)), finish=lambda: calls.append(("finish", {})))

    module = ModuleType("wandb")
    module.init = init
    module.__spec__ = SimpleNamespace(name="wandb")
    monkeypatch.setitem(sys.modules, "wandb", module)
    return calls


def test_wandb_gets_config_and_numbers_and_the_same_run_when_resumed(config, wandb):
    config = replace(config, wandb="my-project")
    require_loggers(config)
    log_some(config)
    log_some(config)
    (_, first), step, epoch, finish, (_, second), *_ = wandb
    assert (first["project"], first["name"], first["resume"]) == ("my-project", "run", "allow")
    assert first["id"] == second["id"] == (config.run / "wandb_id").read_text()  # a later process finds it there
    assert first["dir"] == str(config.run)
    assert first["config"]["student"] == "test_resnet"
    assert step == (1, NAMES)
    assert epoch == (1, {"epoch/epoch": 0, "epoch/val/top1": 50.0})
    assert finish[0] == "finish"


@pytest.mark.filterwarnings("ignore:The filesystem tracking backend:FutureWarning")  # of mlflow 3.11 to 3.13
def test_mlflow_gets_config_and_numbers_and_the_same_run_when_resumed(config, tmp_path, monkeypatch):
    """The real library, writing files."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    import mlflow

    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    config = replace(config, mlflow="my-experiment")
    require_loggers(config)
    log_some(config)
    log_some(config, first_step=1)
    (run,) = mlflow.MlflowClient().search_runs([mlflow.get_experiment_by_name("my-experiment").experiment_id])
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
    logged = mlflow.MlflowClient().get_metric_history(run.info.run_id, "step/loss/kd")
    assert [(metric.step, metric.value) for metric in logged] == [(1, 0.5), (2, 0.5)]
    assert run.data.metrics.keys() == {*NAMES, "epoch/epoch", "epoch/val/top1"}
    assert mlflow.artifacts.load_dict(f"{run.info.artifact_uri}/config.json")["student"] == "test_resnet"


@pytest.mark.parametrize(
    ("change", "package"),
    [({"tensorboard": True}, "tensorboard"), ({"wandb": "p"}, "wandb"), ({"mlflow": "e"}, "mlflow")],
)
def test_run_is_refused_before_it_starts_when_a_logger_is_not_installed(config, monkeypatch, change, package):
    monkeypatch.setattr("student_trainer.engine.loggers.find_spec", lambda name: None)
    with pytest.raises(
        InputError, match=rf"--{package} needs {package}; install with `pip install 'scalekd-cache\[{package}\]'`"
    ):
        require_loggers(replace(config, **change))


def test_loggers_are_closed_when_a_run_fails(config, wandb):
    with pytest.raises(RuntimeError), open_log(replace(config, wandb="p"), 0):
        raise RuntimeError
    assert wandb[-1][0] == "finish"
