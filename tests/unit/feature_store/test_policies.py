"""ViewPolicy: named policies, JSON form, refusals."""

import dataclasses
import json
from typing import get_args

import pytest

from feature_store.errors import InputError
from feature_store.views import POLICIES, PolicyName, ViewPolicy, view_policy


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_policy_survives_json_when_written_and_read(name):
    policy = view_policy(name, (192, 224))
    assert ViewPolicy.from_dict(json.loads(json.dumps(policy.to_dict()))) == policy


def test_view_policy_gives_released_schedules_when_named():
    rrc_flip, a1, a2, a3, center = (view_policy(name, 224) for name in ("rrc_flip", "a1", "a2", "a3", "center"))
    assert (rrc_flip.interpolation, rrc_flip.num_ops, rrc_flip.erase, rrc_flip.flip) == ("bilinear", 0, 0, 0.5)
    assert (a1.interpolation, a1.num_ops, a1.level, a1.max_level, a1.erase) == ("bicubic", 2, 7, 8, 0.25)
    assert (a2.interpolation, a2.num_ops, a2.level, a2.max_level, a2.erase) == ("bicubic", 2, 9, 10, 0.25)
    assert a3 == dataclasses.replace(a2, name="a3", level=12, max_level=15)
    assert (a1.level_std, a1.op_probability, a1.erase_area) == (0.5, 0.5, (0.02, 1 / 3))
    assert (center.crop, center.flip, center.num_ops, center.erase) == ("center", 0, 0, 0)
    assert a1.size == (224, 224)


def test_policy_has_the_json_form_of_every_store_when_all_fields_are_the_defaults():
    assert json.dumps(view_policy("rrc_flip", (192, 224)).to_dict()) == json.dumps({
        "name": "rrc_flip", "size": [192, 224], "crop": "random", "interpolation": "bilinear", "scale": [0.08, 1.0],
        "ratio": [0.75, 4 / 3], "crop_pct": 0.875, "flip": 0.5, "num_ops": 0, "op_probability": 0.5, "level": 0.0,
        "max_level": 10.0, "level_std": 0.5, "erase": 0.0, "erase_area": [0.02, 1 / 3], "erase_ratio": [0.3, 1 / 0.3],
    })  # fmt: skip


EDGES = [
    {"size": (1, 1)}, {"scale": (1e-9, 1.0)}, {"scale": (1, 1)}, {"ratio": (5, 5)}, {"ratio": (0.1, 1e9)},
    {"crop_pct": 1}, {"crop_pct": 1e-9}, {"flip": 0}, {"flip": 1}, {"num_ops": 0}, {"num_ops": 16},
    {"op_probability": 1.0}, {"level": 10.0}, {"level": 0}, {"max_level": 1e-9}, {"level_std": 0}, {"erase": 1},
    {"erase_area": (1, 1)}, {"erase_ratio": (9, 9)},
]  # fmt: skip


@pytest.mark.parametrize("values", EDGES, ids=str)
def test_policy_accepts_values_at_the_edge_of_their_range(values):
    policy = view_policy("rrc_flip", **{"size": 224, **values})
    assert {name: getattr(policy, name) for name in values} == values


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": ""}, "field name is '', expected a name; correct it"),
        ({"size": (0, 1)}, "expected (height, width), whole numbers from 1; correct it"),
        ({"crop": ""}, "expected 'random' or 'center'; correct it"),
        ({"interpolation": ""}, "expected 'bilinear' or 'bicubic'; correct it"),
        ({"scale": (1, 2)}, "expected two numbers, 0 < low <= high <= 1; correct it"),
        ({"ratio": (2, 1)}, "expected two numbers, 0 < low <= high; correct it"),
        ({"crop_pct": 2}, "expected a number over 0, at most 1; correct it"),
        ({"flip": 2}, "expected a number from 0 to 1; correct it"),
        ({"num_ops": 17}, "expected a whole number from 0 to 16; correct it"),
        ({"level": -1}, "expected a number from 0; correct it"),
        ({"max_level": 0}, "expected a number over 0; correct it"),
        ({"level": 4, "max_level": 3}, "field level is 4, expected at most max_level = 3; correct it"),
    ],
)
def test_policy_says_what_is_expected_when_value_is_bad(values, message):
    with pytest.raises(InputError) as caught:
        ViewPolicy(**{"name": "mine", "size": (8, 8), **values})
    assert str(caught.value).endswith(message)


def test_view_policy_takes_overrides_when_given():
    assert view_policy("center", 224, crop_pct=1.0, interpolation="bilinear").crop_pct == 1.0


def test_view_policy_refuses_when_name_is_unknown():
    with pytest.raises(InputError, match="'a4' is unknown, expected one of rrc_flip, a1, a2, a3, center"):
        view_policy("a4", 224)


def test_policy_names_are_those_of_the_policies_when_listed_for_options():
    assert get_args(PolicyName) == tuple(POLICIES)


def test_from_dict_refuses_when_field_is_unknown():
    known = "crop, crop_pct, erase, erase_area, .*, size; remove it, or use the release that wrote it"
    with pytest.raises(InputError, match=f"unknown field hue, jitter, expected {known}"):
        ViewPolicy.from_dict({**view_policy("a1", 224).to_dict(), "jitter": 1, "hue": 0.1})


def test_from_dict_refuses_when_field_is_missing():
    with pytest.raises(InputError, match="lacks field size"):
        ViewPolicy.from_dict({"name": "mine"})
    with pytest.raises(InputError, match="lacks field name, size; add it"):
        ViewPolicy.from_dict({"flip": 0.5})


BAD_VALUES = [
    ("name", ""),
    ("name", 7),
    ("size", (0, 224)),
    ("size", (224,)),
    ("size", (224, 224, 3)),
    ("size", (224, True)),
    ("size", [224, 224.0]),
    ("size", (224.0, 224)),
    ("size", "224"),
    ("crop", "five"),
    ("crop", ["random"]),
    ("interpolation", "nearest"),
    ("scale", (0.0, 1.0)),
    ("scale", (0.5, 0.4)),
    ("scale", (0.5, 1.5)),
    ("scale", (0.5, 0.6, 0.7)),
    ("scale", ("0.5", 0.6)),
    ("scale", 0.5),
    ("ratio", (-1.0, 1.0)),
    ("ratio", (1.0, float("inf"))),
    ("crop_pct", 0),
    ("crop_pct", 1.1),
    ("flip", 1.5),
    ("flip", True),
    ("flip", float("nan")),
    ("num_ops", -1),
    ("num_ops", 17),
    ("num_ops", True),
    ("num_ops", 1.0),
    ("op_probability", "0.5"),
    ("level", -1),
    ("level", 11),
    ("max_level", 0),
    ("level_std", -0.5),
    ("level_std", float("inf")),
    ("erase", -0.1),
    ("erase_area", (0.02, 1.2)),
    ("erase_ratio", (0, 1)),
]


@pytest.mark.parametrize(("field", "value"), BAD_VALUES)
def test_policy_refuses_and_names_field_when_value_is_bad(field, value):
    with pytest.raises(InputError, match=f"field {field} is .*expected"):
        view_policy("rrc_flip", **{"size": 224, field: value}) if field != "name" else dataclasses.replace(
            view_policy("rrc_flip", 224), name=value
        )
