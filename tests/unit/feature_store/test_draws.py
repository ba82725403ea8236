"""draw_view: fixed numbers, independence of everything but its arguments, boxes inside, right statistics."""

import dataclasses
import hashlib
import math
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_store.errors import InputError
from feature_store.views import POLICIES, ViewParams, draw_view, view_policy
from feature_store.views.augment import CHOICES, Op
from feature_store.views.draws import NO_BOX, _words

POLICY = view_policy("a1", 64)
SIDES = st.integers(1, 64)


def draws(policy, count, source_size=(500, 375)):
    return [draw_view(policy, 7, f"n01440764/{i}", 0, source_size) for i in range(count)]


# Drawn once and never to change: a store's seed and policy must keep meaning the same views.
GOLDEN = [
    (
        ("rrc_flip", 0, "000000", 0, (500, 375)),
        ViewParams(
            crop=(31, 95, 210, 239),
            flip=True,
            ops=(),
            magnitudes=(),
            erase=(0, 0, 0, 0),
            noise_seed=0,
            interpolation="bilinear",
        ),
    ),
    (
        ("a1", 2024, "n01440764/n01440764_10026", 1, (500, 375)),
        ViewParams(
            crop=(25, 41, 370, 310),
            flip=False,
            ops=(0, 0),
            magnitudes=(0.0, 0.0),
            erase=(0, 0, 0, 0),
            noise_seed=0,
            interpolation="bicubic",
        ),
    ),
    (
        ("a2", 2**64 - 1, "schlüssel", 3, (64, 97)),
        ViewParams(
            crop=(17, 41, 34, 36),
            flip=True,
            ops=(0, 1),
            magnitudes=(0.0, 0.0),
            erase=(0, 0, 0, 0),
            noise_seed=0,
            interpolation="bicubic",
        ),
    ),
    (
        ("a2", 5, "x", 24, (1000, 13)),
        ViewParams(
            crop=(491, 0, 17, 13),
            flip=False,
            ops=(1, 13),
            magnitudes=(0.0, 0.2698034942150116),
            erase=(0, 24, 128, 68),
            noise_seed=17868937578344027443,
            interpolation="bicubic",
        ),
    ),
    (
        ("a2", 5, "x", 27, (1000, 13)),
        ViewParams(
            crop=(491, 0, 17, 13),
            flip=True,
            ops=(9, 1),
            magnitudes=(0.7746270298957825, 0.0),
            erase=(82, 9, 84, 190),
            noise_seed=15079674160915581468,
            interpolation="bicubic",
        ),
    ),
]


@pytest.mark.parametrize(("arguments", "expected"), GOLDEN)
def test_draw_view_gives_pinned_parameters_when_drawn_by_any_release(arguments, expected):
    policy, seed, key, view, source_size = arguments
    assert draw_view(view_policy(policy, 224), seed, key, view, source_size) == expected


@given(seed=st.integers(0, 2**64 - 1), view=st.integers(0, 2**64 - 1), key=st.text(max_size=8))
def test_words_are_philoxs_when_it_is_given_the_key_itself(seed, view, key):
    name = seed.to_bytes(8, "little") + view.to_bytes(8, "little") + key.encode()
    digest = hashlib.blake2b(name, digest_size=16, person=b"scalekd-view-v1").digest()
    words = np.random.Philox(key=int.from_bytes(digest, "little")).random_raw(91)
    assert _words(seed, key, view, 91) == words.tolist()


@pytest.mark.parametrize("triples", [((1, "a", 0), (0, "a", 1)), ((0, "a", 49), (0, "a1", 0))])
def test_draw_view_differs_when_triples_are_easily_confused(triples):
    left, right = (draw_view(POLICY, *triple, (500, 375)) for triple in triples)
    assert left.crop != right.crop


def test_draw_view_keeps_other_parameters_when_one_augmentation_is_switched_off():
    off = {
        "crop": dataclasses.replace(POLICY, scale=(1.0, 1.0), ratio=(1.0, 1.0)),
        "flip": dataclasses.replace(POLICY, flip=0.0),
        "ops": dataclasses.replace(POLICY, num_ops=0),
        "erase": dataclasses.replace(POLICY, erase=0.0),
    }
    belongs = {"crop": {"crop"}, "flip": {"flip"}, "ops": {"ops", "magnitudes"}, "erase": {"erase", "noise_seed"}}
    for name, policy in off.items():
        pairs = list(zip(draws(POLICY, 40), draws(policy, 40), strict=True))
        differing = {
            field.name
            for field in dataclasses.fields(ViewParams)
            if any(getattr(full, field.name) != getattr(reduced, field.name) for full, reduced in pairs)
        }
        assert differing == belongs[name]


def test_draw_view_keeps_first_operations_when_more_are_drawn():
    more = dataclasses.replace(POLICY, num_ops=4)
    for few, many in zip(draws(POLICY, 20), draws(more, 20), strict=True):
        assert (many.ops[:2], many.magnitudes[:2]) == (few.ops, few.magnitudes)


@given(name=st.sampled_from(sorted(POLICIES)), width=SIDES, height=SIDES, view=st.integers(0, 2**64 - 1),
       key=st.text(max_size=8), size=st.tuples(SIDES, SIDES))  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_draw_view_stays_inside_when_image_has_any_size(name, width, height, view, key, size):
    policy = view_policy(name, size, **({"erase": 1.0} if name == "a2" else {}))
    params = draw_view(policy, 3, key, view, (width, height))
    for (left, top, w, h), (outer_w, outer_h) in ((params.crop, (width, height)), (params.erase, size[::-1])):
        assert min(left, top) >= 0
        assert left + w <= outer_w
        assert top + h <= outer_h
    assert min(params.crop[2:]) >= 1
    assert (params.erase == NO_BOX) == (params.noise_seed == 0)
    assert len(params.ops) == len(params.magnitudes) == policy.num_ops
    assert all(float(np.float32(magnitude)) == magnitude for magnitude in params.magnitudes)


@pytest.mark.parametrize(
    ("source_size", "crop"),
    [
        ((1, 1), (0, 0, 1, 1)),
        ((1, 90), (0, 44, 1, 1)),
        ((90, 1), (44, 0, 1, 1)),
        ((300, 30), (130, 0, 40, 30)),
        ((30, 300), (0, 130, 30, 40)),
    ],
)
def test_draw_view_falls_back_to_middle_when_no_try_fits(source_size, crop):
    whole = view_policy("rrc_flip", 8, scale=(1.0, 1.0))
    assert draw_view(whole, 0, "k", 0, source_size).crop == crop


@pytest.mark.parametrize(
    ("size", "source_size", "crop"),
    [
        (224, (500, 375), (86, 23, 328, 328)),  # 375 * .875
        (224, (375, 500), (23, 86, 328, 328)),
        ((100, 200), (400, 400), (25, 112, 350, 175)),
        (224, (1, 1), (0, 0, 1, 1)),
        (224, (1, 200), (0, 99, 1, 1)),
    ],
)
def test_draw_view_takes_the_middle_when_policy_is_center(size, source_size, crop):
    params = draw_view(view_policy("center", size), 0, "k", 5, source_size)
    assert params == ViewParams(crop, False, (), (), NO_BOX, 0, "bicubic")


def test_draw_view_follows_policy_when_drawn_often():
    n = 4000
    params = draws(POLICY, n)
    areas = [p.crop[2] * p.crop[3] / (500 * 375) for p in params]
    ratios = [math.log(p.crop[2] / p.crop[3]) for p in params]
    assert min(areas) > 0.075
    assert max(areas) <= 1.0
    # the two means are those of torchvision, whose tries also fail more often for large and for narrow boxes
    assert statistics.mean(areas) == pytest.approx(0.435, abs=0.01)
    assert min(ratios) > math.log(3 / 4) - 0.02
    assert max(ratios) < math.log(4 / 3) + 0.02
    assert statistics.mean(ratios) == pytest.approx(0.0315, abs=0.01)
    assert statistics.mean(p.flip for p in params) == pytest.approx(0.5, abs=0.03)
    assert statistics.mean(p.erase != NO_BOX for p in params) == pytest.approx(0.25, abs=0.03)
    erased = [p.erase[2] * p.erase[3] / 64**2 for p in params if p.erase != NO_BOX]
    assert min(erased) > 0.015
    assert max(erased) < 0.35
    ops = [op for p in params for op in p.ops]
    assert ops.count(Op.NONE) / len(ops) == pytest.approx(0.5, abs=0.03)
    for op in CHOICES:
        assert ops.count(op) / len(ops) == pytest.approx(0.5 / 15, abs=0.01)


def test_draw_view_spreads_levels_when_std_is_set():
    magnitudes = [m for p in draws(POLICY, 4000) for op, m in zip(p.ops, p.magnitudes, strict=True) if op == Op.ROTATE]
    levels = [abs(m) / 30 * 8 for m in magnitudes]
    assert statistics.mean(levels) == pytest.approx(7.0, abs=0.1)
    assert statistics.stdev(levels) == pytest.approx(0.5, abs=0.07)
    assert max(levels) <= 8
    assert statistics.mean(m < 0 for m in magnitudes) == pytest.approx(0.5, abs=0.12)


def test_draw_view_falls_back_to_the_whole_image_when_boxes_vanish():
    assert draw_view(view_policy("rrc_flip", 8, scale=(1e-4, 1e-4)), 0, "k", 0, (12, 10)).crop == (0, 0, 12, 10)


def test_draw_view_gives_every_place_of_a_box_when_drawn_often():
    """A box as large as a side may lie at its first and its last pixel."""
    quarter = view_policy("rrc_flip", 8, scale=(0.25, 0.25), ratio=(1.0, 1.0), erase=1.0, erase_area=(0.25, 0.25),
                          erase_ratio=(1.0, 1.0))  # fmt: skip
    for boxes in zip(*[(p.crop, p.erase) for p in draws(quarter, 200, (8, 8))], strict=True):
        assert {box[2:] for box in boxes} == {(4, 4)}
        assert {box[0] for box in boxes} == {box[1] for box in boxes} == {0, 1, 2, 3, 4}


def test_draw_view_turns_ratios_into_width_by_height_of_crops_and_height_by_width_of_erased_boxes():
    policy = view_policy("a1", (100, 80), scale=(0.08, 0.08), ratio=(2.0, 2.0), erase=1.0, erase_area=(0.06, 0.06),
                         erase_ratio=(3.0, 3.0))  # fmt: skip
    for params in draws(policy, 20, (200, 100)):
        assert params.crop[2:] == (57, 28)  # of 1600 pixels
        assert params.erase[2:] == (13, 38)  # of 480 pixels


@pytest.mark.parametrize("area", [1e-4, 1.0])
def test_draw_view_erases_nothing_when_no_box_is_smaller_than_the_view(area):
    policy = view_policy("a1", (8, 8), erase=1.0, erase_area=(area, area), erase_ratio=(1.0, 1.0))
    assert {(p.erase, p.noise_seed) for p in draws(policy, 5)} == {(NO_BOX, 0)}


def test_draw_view_always_or_never_acts_when_probabilities_are_one_or_zero():
    always = view_policy("a1", 64, flip=1.0, op_probability=1.0, erase=1.0)
    for params in draws(always, 50):
        assert params.flip
        assert Op.NONE not in params.ops
        assert params.erase != NO_BOX
    never = view_policy("a1", 64, flip=0.0, op_probability=0.0, erase=0.0)
    assert {(p.flip, p.ops, p.magnitudes, p.erase) for p in draws(never, 50)} == {(False, (0, 0), (0.0, 0.0), NO_BOX)}


def test_draw_view_clips_levels_at_both_ends_when_they_are_spread_wide():
    wide = view_policy("a1", 64, op_probability=1.0, level=4.0, max_level=8.0, level_std=1000.0)
    rotations = [abs(m) for p in draws(wide, 400) for op, m in zip(p.ops, p.magnitudes, strict=True) if op == Op.ROTATE]
    assert set(rotations) >= {0.0, 30.0}
    assert max(rotations) == 30.0
    assert rotations.count(0.0) / len(rotations) == pytest.approx(0.5, abs=0.2)


def test_draw_view_accepts_the_ends_of_all_ranges():
    for seed, view in ((0, 0), (2**64 - 1, 2**64 - 1)):
        assert draw_view(POLICY, seed, "", view, (1, 1)).crop == (0, 0, 1, 1)


@pytest.mark.parametrize(
    ("seed", "view", "size"),
    [(-1, 0, (9, 9)), (2**64, 0, (9, 9)), (0, -1, (9, 9)), (0, 0, (0, 9)), (0, 0, (9, 0)), (0, 2**64, (9, 9))],
)
def test_draw_view_refuses_when_argument_is_out_of_range(seed, view, size):
    with pytest.raises(InputError, match="expected"):
        draw_view(POLICY, seed, "k", view, size)
