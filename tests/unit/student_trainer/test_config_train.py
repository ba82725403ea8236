import json
from pathlib import Path

import pytest
import tyro
from training_world import changed

from feature_store.errors import InputError
from student_trainer.cli import main
from student_trainer.config import OptimConfig, TrainConfig, config_to_dict
from student_trainer.teachers.config import (
    LiveOptions,
    LiveTeacher,
    NoTeacher,
    Replay,
    ServiceTeacher,
    StoreTeacher,
    TeacherOptions,
    ViewsConfig,
)

GOOD = TrainConfig(run=Path("r"), student="test_resnet", tars=("a.tar",), teacher=StoreTeacher(Path("s")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "--epochs is 0, expected at least 1"),
        ({"batch_size": 0}, "--batch-size is 0"),
        ({"workers": -1}, "--workers is -1"),
        ({"num_views": 0}, "--num-views is 0"),
        ({"label_smoothing": 1.0}, "--label-smoothing is 1.0"),
        ({"crop_pct": 0.0}, "--crop-pct is 0.0"),
        ({"accumulate": 0}, "--accumulate is 0, expected at least 1"),
        ({"accumulate": 3}, "--accumulate is 3, expected a divisor of --batch-size 256"),
        ({"ema_decay": 1.0}, "--ema-decay is 1.0, expected between 0 and 1"),
        ({"store": None}, "--method scalekd needs teacher features; give --store"),
        (
            {"store": None, "source": "live"},
            "live teacher without a store needs a name: give --teacher.name or --store",
        ),
        ({"method": "none", "source": "live"}, "--method none uses no teacher"),
        ({"teacher": LiveOptions(name="vit")}, "--teacher options are for --source live"),
        ({"views": ViewsConfig(size=32)}, "--views options are for runs without --store"),
        ({"store": None, "method": "none", "num_views": 2}, "--num-views limits a store's views"),
        ({"store": None, "method": "none", "check_all_pixels": False}, "--no-check-all-pixels is for replayed"),
    ],
)
def test_config_is_refused_when_it_cannot_work(change, message):
    with pytest.raises(InputError, match=message):
        changed(GOOD, **change)


def test_help_states_the_defaults_of_the_teachers_options_plainly(capsys):
    assert main(["train", "--help"]) == 0
    printed = capsys.readouterr().out
    assert "Height and width of a view, in pixels. (default: 224)" in printed
    assert "default if used" not in printed


@pytest.mark.parametrize(
    ("config", "values", "message"),
    [
        (OptimConfig, {"lr": 0.0}, "--optim.lr is 0.0"),
        (OptimConfig, {"clip_grad": 0.0}, "--optim.clip-grad"),
        (OptimConfig, {"lr_batch": 0}, "--optim.lr-batch is 0"),
        (OptimConfig, {"decay_epochs": 0}, "--optim.decay-epochs"),
        (OptimConfig, {"decay_rate": 0}, "--optim.decay-rate"),
        (OptimConfig, {"min_lr": -1e-5}, "--optim.min-lr is -1e-05, expected at least 0"),
        (OptimConfig, {"warmup_lr": -1}, "--optim.warmup-lr"),
        (ViewsConfig, {"size": 0}, "--views.size"),
        (ViewsConfig, {"seed": -1}, "--views.seed"),
    ],
)
def test_nested_config_is_refused_when_a_value_is_out_of_range(config, values, message):
    with pytest.raises(InputError, match=message):
        config(**values)


def test_config_is_read_from_a_command_line_when_given_as_flags():
    line = (
        '--run r --student test_resnet --tars a.tar b-{0..2}.tar --store s --student-kwargs {"drop_rate":0.1} '
        "--optim.lr 0.5 --scalekd.kd-alpha None --scalekd.alpha-stage4 0.08 --scalekd.beta-stage4 1"
    )
    config = tyro.cli(TrainConfig, args=line.split())
    assert config.tars == ("a.tar", "b-{0..2}.tar")
    assert config.student_kwargs == {"drop_rate": 0.1}
    assert config.optim == OptimConfig(lr=0.5)
    assert config.scalekd.kd_alpha is None
    assert config.scalekd.weights()["stage4_original"] == 0.08


@pytest.mark.parametrize(
    ("options", "teacher"),
    [
        ("--store s3://bucket/swin.zarr", StoreTeacher("s3://bucket/swin.zarr")),
        ("--store a b --store-weights 1 0.5", (StoreTeacher("a"), StoreTeacher("b", 0.5))),
        ("--store a --num-views 2", StoreTeacher("a", replay=Replay(2))),
        ("--source http://gpu:8000 --token-file t", ServiceTeacher("http://gpu:8000", token_file=Path("t"))),
        ("--source live+https://gpu:8000", ServiceTeacher("https://gpu:8000", live=True)),
        ("--source live --store a --teacher.depth 2", LiveTeacher(store="a", depth=2)),
        ("--source live --teacher.name x --views.size 32", LiveTeacher("x", views=ViewsConfig(size=32))),
        ("--method none --views.count 3", NoTeacher(ViewsConfig(count=3))),
    ],
)
def test_teacher_is_the_one_that_the_options_ask_for(options, teacher):
    config = tyro.cli(TrainConfig, args=f"--run r --student test_resnet --tars a.tar {options}".split())
    assert config.teacher == teacher


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"store": ("a", "b"), "store_weights": (1.0,)}, "--store-weights has 1 values for 2 stores"),
        ({"store": ("a", "b"), "store_weights": (0.0, 1.0)}, "--store-weights is 0.0, expected above 0"),
        ({"store": ("a",), "store_weights": (2.0,)}, "--store-weights balances several stores"),
        ({"store": ("a",), "source": "live", "store_weights": (2.0,)}, "--store-weights balances several stores"),
        ({"store_weights": (2.0,)}, "--store-weights balances several stores"),
        ({"store": ("a", "b"), "source": "live"}, "--source live takes at most one --store"),
        ({"store": ("a",), "source": "http://gpu:8000"}, "brings its own store; leave out --store"),
        ({"source": "gpu:8000"}, "--source is 'gpu:8000', expected store, live, http"),
        ({"store": ("a",), "token_file": Path("t")}, "--token-file is for --source http"),
    ],
)
def test_options_of_the_teacher_are_refused_when_they_do_not_go_together(options, message):
    with pytest.raises(InputError, match=message):
        TeacherOptions(**options).config()


@pytest.mark.parametrize("text", ["{", "[1]", "3"])
def test_student_kwargs_are_refused_when_they_are_no_json_object(text, capsys):
    with pytest.raises(SystemExit):
        tyro.cli(TrainConfig, args=["--run", "r", "--student", "x", "--tars", "a", "--student-kwargs", text])
    assert "student-kwargs" in capsys.readouterr().err


def test_config_is_plain_json_when_saved():
    saved = config_to_dict(GOOD)
    assert json.loads(json.dumps(saved)) == saved
    assert saved["teacher"]["store"] == "s"
    assert saved["optim"]["lr"] == 1e-3


def test_raw_evaluation_is_refused_when_no_average_is_kept():
    with pytest.raises(InputError, match=r"--no-ema-eval is for runs that keep an average; .* or give --ema-decay"):
        TrainConfig(run=Path("r"), student="test_vit", tars=("a.tar",), method="none", ema_eval=False)
