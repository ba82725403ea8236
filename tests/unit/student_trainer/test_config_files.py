from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from feature_store.errors import InputError
from feature_store.tools.options import build_config
from student_trainer.config import OptimConfig, TrainConfig, config_to_dict
from student_trainer.methods.scalekd import ScaleKDConfig
from student_trainer.sweeps.values import merge, parse_assignments, parse_yaml, read_yaml
from student_trainer.teachers.config import StoreTeacher

FULL = TrainConfig(
    run=Path("r"),
    student="test_resnet",
    tars=("a.tar", "b.tar"),
    teacher=StoreTeacher("s"),
    student_kwargs={"drop_rate": 0.1},
    optim=OptimConfig(lr=0.5, clip_grad=5.0),
    scalekd=ScaleKDConfig(kd_alpha=None, alpha_stage4=0.08, beta_stage4=1.0, tpp=False),
)


def test_config_is_the_same_when_built_from_its_own_dictionary():
    assert build_config(TrainConfig, config_to_dict(FULL)) == FULL


def test_yaml_scalars_mean_what_they_say_when_read():
    text = "{amp: off, lr: 1e-3, opt: no, a: 5, b: -.5, c: null, d: true, e: 1.5, f: none, g: ~, h: 1_000, i: .inf}"
    assert parse_yaml(text, "x") == {
        "amp": "off", "lr": 0.001, "opt": "no", "a": 5, "b": -0.5, "c": None, "d": True, "e": 1.5, "f": "none",
        "g": None, "h": 1000, "i": float("inf"),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{a: 1, a: 2}", 'x.yaml is not YAML: line 1: found duplicate key "a"'),
        ("a: 1\nb: {", "x.yaml is not YAML: line 2: expected the node content"),
        ("!!python/object/apply:os.system [ls]", "is not YAML: line 1: could not determine a constructor"),
        ("- 1", "holds a list, expected a mapping"),
        ("", "holds a NoneType, expected a mapping"),
    ],
)
def test_file_is_refused_when_it_is_no_plain_mapping(tmp_path, text, message):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        read_yaml(tmp_path / "x.yaml")


def test_file_is_refused_when_missing(tmp_path):
    with pytest.raises(InputError, match=r"no.yaml cannot be read"):
        read_yaml(tmp_path / "no.yaml")


def test_later_layers_rule_when_merged():
    merged = merge({"optim": {"lr": 1, "opt": "a"}, "tars": [1, 2]}, {"optim": {"lr": 2}, "tars": [3]}, {"seed": 1})
    assert merged == {"optim": {"lr": 2, "opt": "a"}, "tars": [3], "seed": 1}


def test_assignments_nest_when_their_names_have_dots():
    values = parse_assignments(["optim.lr=1e-2", "optim.opt=lamb", "tars=t-{000..007}.tar", "kw={a: 1}"], "--set")
    assert values == {"optim": {"lr": 0.01, "opt": "lamb"}, "tars": "t-{000..007}.tar", "kw": {"a": 1}}


@pytest.mark.parametrize("text", ["lr", "=3"])
def test_assignment_is_refused_when_it_assigns_nothing(text):
    with pytest.raises(InputError, match=r"assigns nothing; expected NAME=VALUE"):
        parse_assignments([text], "--set")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epoch": 3}, r"f: epoch is unknown; did you mean epochs\?"),
        ({"optim": {"learning": 3}}, "f: optim.learning is unknown; expected one of opt, lr"),
        ({"epochs": "three"}, "f: epochs is 'three', expected a whole number"),
        ({"epochs": True}, "f: epochs is True, expected a whole number"),
        ({"epochs": 1.5}, "f: epochs is 1.5, expected a whole number"),
        ({"optim": 3}, "f: optim is 3, expected a mapping"),
        ({"optim": {"lr": "1e"}}, "f: optim.lr is '1e', expected a number"),
        ({"method": "cap"}, "--method is 'cap', expected one of scalekd, "),
        ({"scalekd": {"windows": [1]}}, r"f: scalekd.windows is \[1\], expected 2 values"),
        ({"scalekd": {"windows": [1, "x"]}}, r"windows\[1\] is 'x', expected a"),
        ({"resume": "yes"}, "f: resume is 'yes', expected true or false"),
        ({"student_kwargs": [1]}, r"f: student_kwargs is \[1\], expected a mapping"),
        ({"student": None}, "f: student is None, expected text"),
    ],
)
def test_value_is_refused_by_name_when_it_is_of_another_kind(values, message):
    with pytest.raises(InputError, match=message):
        build_config(TrainConfig, {**config_to_dict(FULL), **values}, "f: ")


def test_config_is_refused_when_a_needed_field_is_missing():
    values = config_to_dict(FULL)
    del values["student"]
    with pytest.raises(InputError, match=r"^student is missing; give it a value"):
        build_config(TrainConfig, values)


def test_one_pattern_is_a_list_of_one_when_text_is_given():
    built = build_config(TrainConfig, {**config_to_dict(FULL), "tars": "x-{0..3}.tar"})
    assert built == replace(FULL, tars=("x-{0..3}.tar",))


@dataclass(frozen=True)
class Store:
    store: str
    num_views: int | None = None


@dataclass(frozen=True)
class Service:
    url: str


@dataclass(frozen=True)
class Sided:
    teacher: Store | Service | tuple[Store, ...]


@pytest.mark.parametrize(
    ("text", "teacher"),
    [
        ("teacher: {store: swin_l.zarr, num_views: 1}", Store("swin_l.zarr", 1)),
        ("teacher: {url: 'http://host'}", Service("http://host")),
        ("teacher: [{store: a}, {store: b}]", (Store("a"), Store("b"))),
    ],
)
def test_config_of_a_union_is_told_by_its_fields_when_read_from_yaml(text, teacher):
    assert build_config(Sided, parse_yaml(text, "f")) == Sided(teacher)
