"""Configs made in Python or from plain values: what is converted, what is refused, in which words."""

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import tyro

from feature_store.errors import InputError
from feature_store.tools.options import JsonObject, build_config, check_fields, require


@dataclass(frozen=True)
class Optim:
    lr: float = 0.1
    clip_grad: float | None = None
    alphas: tuple[float, float] = (0.5, 0.5)

    def __post_init__(self):
        check_fields(self, "optim.")
        require(self.lr > 0, "--optim.lr", self.lr, "above 0")


@dataclass(frozen=True)
class StoreTeacher:
    store: str | Path
    num_views: int | None = None


@dataclass(frozen=True)
class ServiceTeacher:
    url: str
    num_views: int | None = None


@dataclass(frozen=True)
class NoTeacher:
    pass


Teacher = StoreTeacher | ServiceTeacher | NoTeacher | tuple[StoreTeacher, ...]


@dataclass(frozen=True)
class Run:
    run: Path
    tars: tyro.conf.Positional[tuple[str, ...]] = ()
    epochs: Annotated[int, tyro.conf.arg(name="passes")] = 1
    amp: Literal["off", "bfloat16", "float16"] = "off"
    batch: int | Literal["auto"] = "auto"
    resume: bool = False
    student_kwargs: JsonObject = field(default_factory=dict)
    by_name: dict[str, Any] = field(default_factory=dict)
    optim: tyro.conf.OmitArgPrefixes[Optim] = field(default_factory=Optim)
    teacher: Teacher = field(default_factory=NoTeacher)

    def __post_init__(self):
        check_fields(self)


def test_shorthands_of_a_notebook_are_converted_when_a_config_is_made():
    made = Run(
        run="runs/x", tars="abc.tar", optim=Optim(lr=1, alphas=[1, 0]), teacher=[StoreTeacher("a"), StoreTeacher("b")]
    )
    assert made == Run(
        run=Path("runs/x"), tars=("abc.tar",), optim=Optim(1.0, None, (1.0, 0.0)),
        teacher=(StoreTeacher("a"), StoreTeacher("b")),
    )  # fmt: skip
    assert isinstance(made.optim.lr, float)
    assert isinstance(made.run, Path)
    assert Run(run="r", tars=["a", "b"]).tars == ("a", "b")
    assert Run(run="r", optim={"lr": 2}).optim == Optim(2.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"run": 3}, r"^--run is 3, expected a path$"),
        ({"tars": 3}, r"^--tars is 3, expected a list$"),
        ({"tars": ["a", 1]}, r"^--tars\[1\] is 1, expected text$"),
        ({"epochs": "3"}, r"^--passes is '3', expected a whole number$"),
        ({"epochs": 1.5}, r"^--passes is 1.5, expected a whole number$"),
        ({"epochs": True}, r"^--passes is True, expected a whole number$"),
        ({"amp": "fp8"}, r"^--amp is 'fp8', expected one of off, bfloat16, float16$"),
        ({"amp": "bfloat"}, r"^--amp is 'bfloat', expected .*; did you mean bfloat16\?$"),
        ({"amp": False}, r"^--amp is False, expected one of off"),
        ({"batch": "all"}, r"^--batch is 'all', expected a whole number or one of auto$"),
        ({"resume": 1}, r"^--resume is 1, expected true or false$"),
        ({"student_kwargs": [1]}, r"^--student-kwargs is \[1\], expected a mapping$"),
        ({"by_name": {1: 2}}, r"^--by-name has the name 1, expected text; put it in quotes$"),
        ({"optim": 3}, r"^--optim is 3, expected a mapping$"),
        ({"optim": {"rate": 3}}, r"^--optim.rate is unknown; expected one of lr, clip_grad, alphas$"),
        ({"teacher": "swin"}, r"^--teacher is 'swin', expected a mapping$"),
    ],
)
def test_value_is_refused_by_its_option_when_it_is_of_another_type(values, message):
    with pytest.raises(InputError, match=message):
        Run(**{"run": "r", **values})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": "0.1"}, r"^--optim.lr is '0.1', expected a number$"),
        ({"lr": True}, r"^--optim.lr is True, expected a number$"),
        ({"clip_grad": "5"}, r"^--optim.clip-grad is '5', expected a number$"),
        ({"alphas": (0.1,)}, r"^--optim.alphas is \(0.1,\), expected 2 values$"),
        ({"alphas": (0.1, "x")}, r"^--optim.alphas\[1\] is 'x', expected a number$"),
    ],
)
def test_nested_value_is_refused_with_its_prefix_when_it_is_of_another_type(values, message):
    with pytest.raises(InputError, match=message):
        Optim(**values)


def test_value_is_checked_when_a_config_is_replaced():
    with pytest.raises(InputError, match=r"^--passes is None, expected a whole number$"):
        replace(Run("r"), epochs=None)


def test_value_left_to_tyro_passes_when_a_config_is_made():
    left_open = Run(run=tyro.MISSING, amp=tyro.MISSING)
    assert left_open.run is tyro.MISSING
    assert tyro.cli(Run, default=left_open, args=["--run", "r", "--amp", "off"]) == Run("r")


def test_command_line_makes_the_config_of_python_when_it_gives_the_same_values():
    line = 'a.tar --run r --passes 3 --batch 8 --student-kwargs {"a":1} --lr 1 teacher:store-teacher --teacher.store s'
    made = Run("r", ("a.tar",), 3, batch=8, student_kwargs={"a": 1}, optim=Optim(1.0), teacher=StoreTeacher("s"))
    assert tyro.cli(Run, args=line.split()) == made


@pytest.mark.parametrize(
    ("values", "teacher"),
    [
        ({}, NoTeacher()),
        ({"store": "swin_l.zarr", "num_views": 1}, StoreTeacher("swin_l.zarr", 1)),
        ({"store": Path("swin_l.zarr")}, StoreTeacher(Path("swin_l.zarr"))),
        ({"url": "http://host"}, ServiceTeacher("http://host")),
        ([{"store": "a"}, {"store": "b"}], (StoreTeacher("a"), StoreTeacher("b"))),
        (ServiceTeacher("http://host"), ServiceTeacher("http://host")),
    ],
)
def test_member_of_a_union_is_built_when_its_fields_are_given(values, teacher):
    assert build_config(Run, {"run": "r", "teacher": values}) == Run("r", teacher=teacher)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_views": 1}, r"^f: teacher.store is missing; give it a value$"),
        ({"stor": "a"}, r"^f: teacher.stor is unknown; did you mean store\?$"),
        ({"store": "a", "num_view": 1}, r"^f: teacher.num_view is unknown; did you mean num_views\?$"),
        ({"store": "a", "url": "b"}, r"^f: teacher.url is unknown; expected one of store, num_views$"),
        ({"url": 3}, r"^f: teacher.url is 3, expected text$"),
        ({"store": 3}, r"^f: teacher.store is 3, expected text or a path$"),
        (
            [{"store": "a"}, {"store": "b", "num_views": "2"}],
            r"^f: teacher\[1\].num_views is '2', expected a whole number",
        ),
        ([{"url": "a"}], r"^f: teacher\[0\].url is unknown; expected one of store"),
        (3, r"^f: teacher is 3, expected a mapping$"),
    ],
)
def test_member_of_a_union_is_refused_by_the_field_when_one_does_not_fit(values, message):
    with pytest.raises(InputError, match=message):
        build_config(Run, {"run": "r", "teacher": values}, "f: ")


def test_config_is_the_same_when_built_from_its_own_fields():
    made = Run("r", ("a",), 2, "float16", 8, True, {"a": {"b": 1}}, {"c": None}, Optim(2.0), StoreTeacher("s"))
    assert build_config(Run, {f.name: getattr(made, f.name) for f in fields(made)}) == made


def test_own_check_of_a_nested_config_is_raised_when_values_have_the_right_types():
    with pytest.raises(InputError, match=r"^--optim.lr is -1.0, expected above 0$"):
        build_config(Run, {"run": "r", "optim": {"lr": -1}}, "f: ")
